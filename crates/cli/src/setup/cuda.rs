//! NVIDIA's compiler and libraries, for a kernel whose tensors live on a card: those of this
//! machine, or else the pinned packages of PyPI, laid out as a toolkit.
//!
//! A compiler is enough to build; to link, the driver's library must be named, and to run, it must
//! be there. A machine without a card gets a stub of it, which is linked against and never loaded.

use super::python::{self, Recipe};
use super::{need_space, tool};
use crate::home::{Home, write_atomic};
use crate::progress::Steps;
use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

const RECIPE: Recipe = Recipe {
    prefix: "cuda",
    requirements: include_str!("../../python/cuda-requirements.txt"),
    what: "NVIDIA's compiler and libraries, CUDA 13.0",
    estimate: "about 1 minute, 1.2 GB",
};

const NEEDED_BYTES: u64 = 3_000_000_000;

/// The driver's library; no package holds it.
const DRIVER: &str = "libcuda.so.1";

/// Names the card to compile for, as candle's kernels read it.
const CAPABILITY: &str = "CUDA_COMPUTE_CAP";

/// What is compiled for where neither a card nor the variable says: H100 and H200.
const USUAL_CAPABILITY: &str = "90";

/// A CUDA toolkit, and the card for which it compiles.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Toolkit {
    /// Its folder, with `bin`, `include` and `lib64`.
    root: PathBuf,
    /// What its `nvcc --version` says.
    version: String,
    /// The card's compute capability without the point, such as `90`.
    capability: String,
}

impl Toolkit {
    /// The toolkit for the card of this machine.
    ///
    /// Fails when there is no driver or no card.
    pub fn for_card(home: &Home, steps: &mut Steps) -> Result<Self> {
        need_driver()?;
        let capability = match asked_capability() {
            Some(asked) => asked,
            None => capability_of_card()?,
        };
        Self::ensure(home, capability, steps)
    }

    /// The toolkit for a card that may be elsewhere; the flag says whether its kind was guessed.
    pub fn for_any(home: &Home, steps: &mut Steps) -> Result<(Self, bool)> {
        let known = asked_capability().or_else(|| capability_of_card().ok());
        let guessed = known.is_none();
        let capability = known.unwrap_or_else(|| USUAL_CAPABILITY.to_owned());
        Ok((Self::ensure(home, capability, steps)?, guessed))
    }

    fn ensure(home: &Home, capability: String, steps: &mut Steps) -> Result<Self> {
        if !capability.chars().all(|digit| digit.is_ascii_digit()) {
            bail!("{CAPABILITY}={capability} is no compute capability: write 90 for 9.0");
        }
        need_host_compiler()?;
        let root = match own()? {
            Some(root) => {
                steps.skip();
                root
            }
            None => from_packages(home, steps)?,
        };
        let nvcc = root.join("bin/nvcc");
        let output = Command::new(&nvcc)
            .arg("--version")
            .output()
            .with_context(|| format!("cannot start {}", nvcc.display()))?;
        ensure!(
            output.status.success(),
            "{} does not start: {}",
            nvcc.display(),
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(Self {
            root,
            version: String::from_utf8_lossy(&output.stdout).trim().to_owned(),
            capability,
        })
    }

    /// The compute capability without the point, such as `90`.
    pub fn capability(&self) -> &str {
        &self.capability
    }

    /// Whether it is still there.
    pub fn is_there(&self) -> bool {
        self.root.join("bin/nvcc").is_file()
    }

    /// What a compiled folder depends on.
    pub fn key(&self) -> [&[u8]; 3] {
        [
            self.root.as_os_str().as_encoded_bytes(),
            self.version.as_bytes(),
            self.capability.as_bytes(),
        ]
    }

    /// The folder of the libraries that a program needs when it runs.
    pub fn libraries(&self) -> PathBuf {
        let lib64 = self.root.join("lib64");
        if lib64.is_dir() {
            lib64
        } else {
            self.root.join("lib")
        }
    }

    /// Lets what a command compiles and links use the toolkit.
    pub fn apply(&self, command: &mut Command) {
        let libraries = self.libraries();
        let stubs = libraries.join("stubs");
        command
            .env("CUDA_HOME", &self.root)
            .env("CUDA_PATH", &self.root)
            .env(CAPABILITY, &self.capability)
            .env("PATH", before("PATH", [self.root.join("bin")]))
            .env("LIBRARY_PATH", before("LIBRARY_PATH", [libraries, stubs]));
    }
}

/// A search path of the environment with folders before its own.
fn before<const N: usize>(variable: &str, folders: [PathBuf; N]) -> OsString {
    let path = std::env::var_os(variable).unwrap_or_default();
    let others = std::env::split_paths(&path).filter(|dir| !dir.as_os_str().is_empty());
    let folders: Vec<_> = folders.into_iter().chain(others).collect();
    // Only a folder with a colon in its name cannot be joined.
    std::env::join_paths(folders).unwrap_or(path)
}

fn variable(name: &str) -> Option<OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty())
}

fn asked_capability() -> Option<String> {
    let asked = variable(CAPABILITY)?.to_string_lossy().trim().to_owned();
    Some(asked.replace('.', ""))
}

/// nvcc leaves the code for the processor to a C++ compiler.
fn need_host_compiler() -> Result<()> {
    let found = ["g++", "c++"].iter().any(|compiler| {
        let said = Command::new(compiler).arg("--version").output();
        said.is_ok_and(|output| output.status.success())
    });
    ensure!(
        found,
        "NVIDIA's compiler needs a C++ compiler beside it (Debian and Ubuntu: sudo apt install g++; \
         Fedora: sudo dnf install gcc-c++)"
    );
    Ok(())
}

/// Asks the cards; of several kinds the oldest, for which the code of no other is too new.
fn capability_of_card() -> Result<String> {
    let advice = format!(
        "Check that `nvidia-smi` lists a card; to compile for one that is elsewhere, name its compute \
         capability, such as {CAPABILITY}=90."
    );
    let output = Command::new("nvidia-smi")
        .args(["--query-gpu=compute_cap", "--format=csv,noheader"])
        .output()
        .map_err(|error| anyhow::anyhow!("nvidia-smi cannot be started ({error}). {advice}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    match capability_in(&text) {
        Some(capability) if output.status.success() => Ok(capability),
        _ => bail!("nvidia-smi names no card: {}. {advice}", text.trim()),
    }
}

/// The smallest `9.0` of the lines, as `90`.
fn capability_in(text: &str) -> Option<String> {
    let capability = |line: &str| -> Option<(u32, u32)> {
        let (major, minor) = line.trim().split_once('.')?;
        Some((major.parse().ok()?, minor.parse().ok()?))
    };
    let (major, minor) = text.lines().filter_map(capability).min()?;
    Some(format!("{major}{minor}"))
}

/// Fails unless a program that is linked with the driver's library can start.
fn need_driver() -> Result<()> {
    let name = std::ffi::CString::new(DRIVER)?;
    // SAFETY: the name is a C string; the driver's library does nothing when it is loaded.
    let handle = unsafe { nix::libc::dlopen(name.as_ptr(), nix::libc::RTLD_LAZY) };
    ensure!(
        !handle.is_null(),
        "--device cuda needs an NVIDIA card with its driver, and this machine has none: {DRIVER} is not \
         found. `cargo course check --cuda` compiles the course for a card without one."
    );
    // SAFETY: the handle is that of `dlopen`.
    unsafe { nix::libc::dlclose(handle) };
    Ok(())
}

/// The toolkit of this machine: that of `CUDA_HOME` or `CUDA_PATH`, or that of the `nvcc` on PATH.
fn own() -> Result<Option<PathBuf>> {
    for name in ["CUDA_HOME", "CUDA_PATH"] {
        if let Some(root) = variable(name).map(PathBuf::from) {
            ensure!(
                root.join("bin/nvcc").is_file(),
                "{name} is {}, and there is no bin/nvcc in it: name a CUDA toolkit, or unset {name} \
                 (and take nvcc off PATH) to get one of the course's own",
                root.display()
            );
            return Ok(Some(root));
        }
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let nvcc = std::env::split_paths(&path).map(|dir| dir.join("nvcc"));
    let root = |nvcc: PathBuf| Some(nvcc.canonicalize().ok()?.parent()?.parent()?.to_owned());
    let mut roots = nvcc.filter_map(root);
    Ok(roots.find(|root| root.join("bin/nvcc").is_file()))
}

/// The toolkit made of NVIDIA's packages.
fn from_packages(home: &Home, steps: &mut Steps) -> Result<PathBuf> {
    if cfg!(not(target_os = "linux")) {
        bail!("NVIDIA's compiler is for Linux (on Windows: WSL2)");
    }
    let _lock = home.lock("cuda", || {
        eprintln!("Another `cargo course` is installing NVIDIA's compiler: waiting for it.");
    })?;
    let space = || need_space(&home.join(""), NEEDED_BYTES);
    let environment = python::make(home, steps, &RECIPE, &python::interpreter()?, space)?;
    let root = environment.join("toolkit");
    if !root.is_dir() {
        let part = environment.join("toolkit.part");
        crate::home::remove_folder(&part)?;
        lay_out(&environment.site_packages()?.join("nvidia/cu13"), &part)?;
        stub(&part)?;
        fs::rename(&part, &root)?;
    }
    Ok(root)
}

/// Links the packages' files as a toolkit has them: libraries also by their names without a version.
fn lay_out(packages: &Path, root: &Path) -> Result<()> {
    fs::create_dir_all(root.join("lib64/stubs"))?;
    for folder in ["bin", "include", "nvvm"] {
        symlink(packages.join(folder), root.join(folder))?;
    }
    let lib = packages.join("lib");
    let files = fs::read_dir(&lib).with_context(|| format!("cannot read {}", lib.display()))?;
    for file in files {
        let file = file?.path();
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        let at = root.join("lib64");
        symlink(&file, at.join(&*name))?;
        // What lies beside a library under another name, such as libnvrtc.alt, is loaded by it alone.
        if let Some((stem, _)) = name.split_once(".so.")
            && !stem.contains('.')
        {
            symlink(&*name, at.join(format!("{stem}.so")))?;
        }
    }
    Ok(())
}

/// Makes `lib64/stubs/libcuda.so`: every function that `cuda.h` declares, in all its versions, and
/// those of `cudaProfiler.h`, which no package holds; each says that there is no device.
fn stub(root: &Path) -> Result<()> {
    let stubs = root.join("lib64/stubs");
    let header = stubs.join("names.c");
    write_atomic(&header, "#include <cuda.h>\n")?;
    let mut names = BTreeSet::new();
    // As a program sees the header, and with each name as it stands there.
    for versions in [&[][..], &["-D__CUDA_API_VERSION_INTERNAL"]] {
        let output = Command::new("cc")
            .args(["-E", "-P"])
            .args(versions)
            .arg("-I")
            .arg(root.join("include"))
            .arg(&header)
            .output()
            .context("cannot start cc")?;
        ensure!(
            output.status.success(),
            "cc cannot read NVIDIA's cuda.h: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
        names.extend(functions(&String::from_utf8_lossy(&output.stdout)));
    }
    ensure!(!names.is_empty(), "NVIDIA's cuda.h declares no function");
    names.extend(["Initialize", "Start", "Stop"].map(|name| format!("cuProfiler{name}")));
    let mut source = String::new();
    for name in &names {
        // CUDA_ERROR_NO_DEVICE
        let _ = writeln!(source, "int {name}(void) {{ return 100; }}");
    }
    write_atomic(&header, source)?;
    let mut cc = Command::new("cc");
    cc.args(["-shared", "-fPIC", "-o"])
        .arg(stubs.join("libcuda.so"))
        .arg(format!("-Wl,-soname,{DRIVER}"))
        .arg(&header);
    tool::run("making a stub of NVIDIA's driver", &mut cc, |_| ())?;
    fs::remove_file(&header).context("cannot remove the stub's source")
}

/// The functions of NVIDIA's driver that a preprocessed header declares: `cu`, a capital, and an
/// opening parenthesis.
fn functions(header: &str) -> impl Iterator<Item = String> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    header.match_indices('(').filter_map(move |(at, _)| {
        let before = header[..at].trim_end();
        let start = before.rfind(|c| !is_part(c)).map_or(0, |at| at + 1);
        let name = &before[start..];
        let capital = name.strip_prefix("cu")?.chars().next()?;
        capital.is_ascii_uppercase().then(|| name.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_requirement_is_pinned_by_hash() {
        assert!(RECIPE.requirements.contains("\nnvidia-cuda-nvcc==13.0."));
        python::tests::assert_pinned(RECIPE.requirements);
    }

    #[test]
    fn a_card_s_capability_is_read() {
        assert_eq!(capability_in("9.0\n").as_deref(), Some("90"));
        assert_eq!(capability_in("12.0\n8.6\n9.0\n").as_deref(), Some("86"));
        assert_eq!(capability_in("12.1").as_deref(), Some("121"));
        for text in ["", "No devices were found", "[N/A]", "9"] {
            assert_eq!(capability_in(text), None, "{text}");
        }
    }

    #[test]
    fn the_driver_s_functions_are_found_in_a_header() {
        let header = "typedef int CUresult;\nCUresult cuInit(unsigned int f);\nCUresult cuMemAlloc_v2\n\
                      (int *p, size_t n); void custom(int); int cudaMalloc(int);";
        let found: Vec<_> = functions(header).collect();
        assert_eq!(found, ["cuInit", "cuMemAlloc_v2"]);
    }

    #[test]
    fn packages_are_laid_out_as_a_toolkit() {
        let dir = tempfile::tempdir().unwrap();
        let (packages, root) = (dir.path().join("cu13"), dir.path().join("toolkit"));
        for file in ["bin/nvcc", "lib/libcublas.so.13", "lib/libnvrtc.alt.so.13"] {
            write_atomic(&packages.join(file), file).unwrap();
        }
        lay_out(&packages, &root).unwrap();
        for (at, holds) in [
            ("bin/nvcc", "bin/nvcc"),
            ("lib64/libcublas.so", "lib/libcublas.so.13"),
            ("lib64/libcublas.so.13", "lib/libcublas.so.13"),
        ] {
            assert_eq!(fs::read_to_string(root.join(at)).unwrap(), holds);
        }
        assert!(!root.join("lib64/libnvrtc.alt.so").exists());
    }

    #[test]
    fn a_command_finds_the_toolkit_before_anything_else() {
        let toolkit = Toolkit {
            root: "/cuda".into(),
            version: String::new(),
            capability: "90".into(),
        };
        let mut command = Command::new("true");
        toolkit.apply(&mut command);
        let value = |name: &str| {
            let mut all = command.get_envs();
            let found = all.find_map(|(key, value)| (key == name).then_some(value?));
            found.unwrap().to_string_lossy().into_owned()
        };
        assert_eq!(value("CUDA_HOME"), "/cuda");
        assert!(value("PATH").starts_with("/cuda/bin:"));
        assert!(value("LIBRARY_PATH").starts_with("/cuda/lib:/cuda/lib/stubs"));
    }
}
