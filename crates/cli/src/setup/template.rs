//! The warm kernel folder: evcxr's working folder after its first cell, with candle and the
//! course compiled. Each kernel starts from a copy, so that its first cell answers at once.

use super::cuda::Toolkit;
use super::{Installed, tool};
use crate::device::Device;
use crate::home::{Checkout, Home, short_hash, write_atomic};
use crate::lean_cargo;
use crate::progress::Steps;
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Changes whenever this file makes templates of another kind.
const FORMAT: &str = "5: for everybody to read, no Python linked";

/// How many crates a template compiles (for the progress line only).
const CRATES: usize = 130;

/// Applies to everything built in a folder below: evcxr's own profile keeps debug assertions.
const CARGO_CONFIG: &str = "\
[profile.dev.package.\"*\"]
opt-level = 3
debug-assertions = false
overflow-checks = false
";

/// Tells pyo3 to link no Python, as the checkout's `.cargo/config.toml` does for what is built there.
const PYO3: &str = include_str!("../../../../.cargo/pyo3.txt");

/// Typed once at the kernel's start, so that the analyser has read candle before the first cell
/// and `?` needs no second compilation.
const PRELUDE: &str = "\
let course_kernel = course::candle_core::Tensor::zeros(
    1, course::candle_core::DType::F32, &course::candle_core::Device::Cpu)?.elem_count();
";

/// Where the template of a checkout lies and whether it is there.
pub struct Template {
    /// The folder to copy.
    pub dir: PathBuf,
    /// evcxr's configuration folder (`init.evcxr`, `prelude.rs`).
    pub config: PathBuf,
}

impl Template {
    /// The template that fits the checkout's sources, compiler, kernel and device.
    fn of(home: &Home, checkout: &Checkout, installed: &Installed, device: Device) -> Result<Self> {
        let key = key(checkout, installed, toolkit(installed, device)?)?;
        Ok(Self {
            dir: home.templates().join(format!("{}{key}", prefix(device))),
            config: home.join("config").join(key),
        })
    }

    /// Whether the template is complete.
    pub fn ready(&self) -> bool {
        self.dir.join("complete").exists() && self.config.join("init.evcxr").exists()
    }
}

/// How the folders of templates are called.
fn prefix(device: Device) -> &'static str {
    match device {
        Device::Cpu => "template-",
        Device::Cuda => "cuda-template-",
    }
}

/// The toolkit that a device needs.
fn toolkit(installed: &Installed, device: Device) -> Result<Option<&Toolkit>> {
    match (device, &installed.cuda) {
        (Device::Cpu, _) => Ok(None),
        (Device::Cuda, Some(toolkit)) => Ok(Some(toolkit)),
        (Device::Cuda, None) => {
            bail!("the kernel is not prepared for a card: run `cargo course setup --device cuda`")
        }
    }
}

/// Everything that the compiled folder depends on.
fn key(checkout: &Checkout, installed: &Installed, toolkit: Option<&Toolkit>) -> Result<String> {
    let rustc = &installed.rustc;
    let mut parts: Vec<Vec<u8>> = vec![
        FORMAT.into(),
        CARGO_CONFIG.into(),
        PYO3.into(),
        PRELUDE.into(),
        super::evcxr::VERSION.into(),
        rustc.version.clone().into(),
        rustc.sysroot.as_os_str().as_encoded_bytes().to_vec(),
        checkout.root().as_os_str().as_encoded_bytes().to_vec(),
    ];
    let cuda = toolkit.iter().flat_map(|toolkit| toolkit.key());
    parts.extend(cuda.map(<[u8]>::to_vec));
    let mut files = vec![checkout.join("Cargo.toml"), checkout.join("Cargo.lock")];
    for krate in ["lora", "course"] {
        collect(&checkout.join("crates").join(krate), &mut files)?;
    }
    files.sort();
    for file in files {
        let content = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
        parts.push(file.into_os_string().into_encoded_bytes());
        parts.push(content);
    }
    Ok(short_hash(parts.iter().map(Vec::as_slice)))
}

/// The files that make up a crate's library: its manifest, sources and assets.
fn collect(dir: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let path = entry?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let part_of_library = !matches!(name.as_str(), "tests" | "benches" | "examples" | "target");
        if path.is_dir() && part_of_library {
            collect(&path, files)?;
        } else if path.is_file() && !name.starts_with('.') {
            files.push(path);
        }
    }
    Ok(())
}

/// Where pyo3's settings lie: in one place, as it is compiled anew when they are elsewhere.
fn pyo3(home: &Home) -> PathBuf {
    home.templates().join(".cargo/pyo3.txt")
}

/// Prepares a folder whose own folders are worked in.
pub fn settle(dir: &Path) -> Result<()> {
    write_atomic(&dir.join(".cargo/config.toml"), CARGO_CONFIG)
}

/// Makes the template if it is missing or stale. Safe to call from several processes.
pub fn ensure(
    home: &Home,
    checkout: &Checkout,
    installed: &Installed,
    device: Device,
    steps: &mut Steps,
) -> Result<Template> {
    let toolkit = toolkit(installed, device)?;
    let template = Template::of(home, checkout, installed, device)?;
    if template.ready() {
        steps.skip();
        return Ok(template);
    }
    let _lock = home.lock("template", || {
        eprintln!("      another process prepares the kernel: waiting for it");
    })?;
    if template.ready() {
        steps.skip();
        return Ok(template);
    }
    let mut old = templates(home, device);
    old.retain(|old| *old != template.dir);
    let estimate = match (old.is_empty(), device) {
        (false, _) => "about a minute",
        (true, Device::Cpu) => "about 6 minutes on two cores",
        (true, Device::Cuda) => "about 10 minutes on two cores",
    };
    let what = match device {
        Device::Cpu => "Kernel template: candle and the course, compiled",
        Device::Cuda => "Kernel template: candle and the course, compiled for a card",
    };
    let mut step = steps.start(what, Some(estimate));

    let dir = &template.dir;
    fs::remove_dir_all(dir).ok();
    let unfinished = home.templates().join(match device {
        Device::Cpu => "unfinished",
        Device::Cuda => "unfinished-cuda",
    });
    if !unfinished.exists() {
        // Start from the last template: only what changed is compiled.
        match old.last() {
            Some(old) => tool::copy(old, &unfinished)?,
            None => fs::create_dir_all(&unfinished)?,
        }
    }
    fs::remove_file(unfinished.join("complete")).ok();
    fs::copy(checkout.join("Cargo.lock"), unfinished.join("Cargo.lock"))
        .context("cannot copy Cargo.lock")?;
    settle(&home.templates())?;
    write_atomic(&pyo3(home), PYO3)?;
    write_init(&template.config, checkout, device)?;
    write_atomic(&template.config.join("prelude.rs"), PRELUDE)?;

    let mut command = Command::new(&installed.python);
    command
        .args(["-m", "course_jupyter.probe"])
        .arg(&installed.evcxr)
        .current_dir(checkout.join("notebooks"));
    let environment = KernelEnvironment {
        home,
        checkout,
        installed,
        toolkit,
        config: &template.config,
    };
    environment.apply(&mut command, &unfinished)?;
    let prepared = tool::run(
        "preparing the kernel",
        &mut command,
        tool::compile_progress(&mut step, CRATES),
    );
    if device == Device::Cuda {
        // A dylib needs all that the bindings name, also what no lesson calls.
        prepared.context(
            "no kernel for a card. If everything compiled and it did not start, the CUDA toolkit or the \
             driver is older than candle's bindings: update it, or unset CUDA_HOME and CUDA_PATH and \
             take nvcc off PATH to get a toolkit that fits",
        )?;
    } else {
        prepared?;
    }

    // For learners who share the tools: rustc keeps some of its files to itself.
    let mut open = Command::new("chmod");
    open.args(["-R", "a+rX"]).arg(&unfinished);
    tool::run("opening the template", &mut open, |_| ())?;
    fs::rename(&unfinished, dir)?;
    fs::write(
        dir.join("complete"),
        checkout.root().as_os_str().as_encoded_bytes(),
    )?;
    for old in old.iter().filter(|old| stale(old, checkout)) {
        fs::remove_dir_all(old).ok();
        if let Some(key) = old
            .file_name()
            .and_then(|name| name.to_str()?.strip_prefix(prefix(device)))
        {
            fs::remove_dir_all(home.join("config").join(key)).ok();
        }
    }
    step.done();
    Ok(template)
}

/// Writes evcxr's first commands. A kernel for a card has a second crate beside the course, which
/// turns on the course's feature `cuda`: a notebook's own `:dep` names none, and cargo unites the
/// features that a crate is asked for.
fn write_init(config: &Path, checkout: &Checkout, device: Device) -> Result<()> {
    let course = toml_string(&checkout.join("crates/course"));
    let mut init = format!(":dep course = {{ path = {course} }}\n");
    if device == Device::Cuda {
        let dir = config.join("course-cuda");
        let manifest = format!(
            "[package]\nname = \"course-cuda\"\nversion = \"0.0.0\"\nedition = \"2024\"\n\n\
             [dependencies]\ncourse = {{ path = {course}, features = [\"cuda\"] }}\n"
        );
        write_atomic(&dir.join("Cargo.toml"), manifest)?;
        write_atomic(&dir.join("src/lib.rs"), "")?;
        init += &format!(":dep course-cuda = {{ path = {} }}\n", toml_string(&dir));
    }
    write_atomic(&config.join("init.evcxr"), init)
}

/// Whether a template other than the current one is of no more use: it belongs to this checkout,
/// or to one that is gone. (A kernel works on its copy.)
fn stale(template: &Path, checkout: &Checkout) -> bool {
    let root = fs::read_to_string(template.join("complete")).unwrap_or_default();
    Path::new(&root) == checkout.root() || !Path::new(&root).join("crates/course").is_dir()
}

/// The complete template made last for a device, for whatever sources.
pub fn newest(home: &Home, device: Device) -> Option<PathBuf> {
    templates(home, device).pop()
}

/// The complete templates for a device, oldest first.
fn templates(home: &Home, device: Device) -> Vec<PathBuf> {
    let mut found: Vec<_> = fs::read_dir(home.templates())
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with(prefix(device)) && path.join("complete").exists()
        })
        .collect();
    found.sort_by_key(|path| {
        fs::metadata(path.join("complete"))
            .and_then(|m| m.modified())
            .ok()
    });
    found
}

/// The environment in which evcxr runs, for the template and for every kernel alike.
pub struct KernelEnvironment<'a> {
    /// The tools.
    pub home: &'a Home,
    /// The checkout whose crates the notebook uses.
    pub checkout: &'a Checkout,
    /// Python, evcxr and compiler.
    pub installed: &'a Installed,
    /// NVIDIA's compiler, for tensors on a card.
    pub toolkit: Option<&'a Toolkit>,
    /// evcxr's configuration folder.
    pub config: &'a Path,
}

impl KernelEnvironment<'_> {
    /// Sets it for a command whose evcxr works in `dir`.
    pub fn apply(&self, command: &mut Command, dir: &Path) -> Result<()> {
        without_cargo(command, self.checkout);
        if let Some(toolchain) = self.installed.rustc.toolchain() {
            command.env("RUSTUP_TOOLCHAIN", toolchain);
        }
        if let Some(toolkit) = self.toolkit {
            toolkit.apply(command);
        }
        // A cell's library lies one folder above where its relative path to Rust's standard
        // library fits. (Under `cargo run` the variable is set; a plain Jupyter knows nothing.)
        let own = self.installed.rustc.library();
        let of_toolkit = self.toolkit.map(Toolkit::libraries);
        let libraries = std::iter::once(own).chain(of_toolkit);
        library_path(command, libraries, self.checkout);
        command
            .env("EVCXR_TMPDIR", dir)
            .env("EVCXR_CONFIG_DIR", self.config)
            // evcxr_jupyter looks here for an older installation of itself to renew: leave the
            // user's own alone.
            .env("JUPYTER_PATH", dir.join("no-jupyter"))
            .env("PYO3_CONFIG_FILE", pyo3(self.home))
            // glibc hands large blocks back after each use and faults them in anew: keep them.
            .env("MALLOC_MMAP_THRESHOLD_", "1073741824")
            .env("MALLOC_TRIM_THRESHOLD_", "2147483648")
            // candle's own threads spin after each operation and take the cores from the next.
            .env("CANDLE_BARRIER_POOL_SPIN_LIMIT", "100")
            .env("COURSE_KERNEL", dir);
        lean_cargo::apply(command, self.home, self.checkout, &self.installed.rustc)
    }
}

/// Takes from a command's environment what the cargo that started this program put there: a
/// cargo or a kernel below must not see it.
pub fn without_cargo(command: &mut Command, checkout: &Checkout) {
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        let of_cargo = name.starts_with("CARGO_") && name != "CARGO_HOME";
        let asked_for = [
            "CARGO_NET_",
            "CARGO_HTTP_",
            "CARGO_REGISTR",
            "CARGO_BUILD_JOBS",
        ]
        .iter()
        .any(|prefix| name.starts_with(prefix));
        if (of_cargo && !asked_for) || name == "RUSTFLAGS" {
            command.env_remove(name);
        }
    }
    if let Ok(kept) = std::env::join_paths(without_target("LD_LIBRARY_PATH", checkout)) {
        command.env("LD_LIBRARY_PATH", kept);
    }
}

/// Lets a command's programs find libraries in folders, before those of the environment.
pub fn library_path(
    command: &mut Command,
    folders: impl IntoIterator<Item = PathBuf>,
    checkout: &Checkout,
) {
    let variable = if cfg!(target_os = "macos") {
        "DYLD_FALLBACK_LIBRARY_PATH"
    } else {
        "LD_LIBRARY_PATH"
    };
    let others = without_target(variable, checkout);
    if let Ok(paths) = std::env::join_paths(folders.into_iter().chain(others)) {
        command.env(variable, paths);
    }
}

/// The folders of a search path that do not lie in the checkout's `target`, where an older
/// libcourse may be.
fn without_target(variable: &str, checkout: &Checkout) -> Vec<PathBuf> {
    let target = checkout.join("target");
    let path = std::env::var_os(variable).unwrap_or_default();
    std::env::split_paths(&path)
        .filter(|dir| !dir.as_os_str().is_empty() && !dir.starts_with(&target))
        .collect()
}

/// A path as a TOML string, in the form in which evcxr writes it.
fn toml_string(path: &Path) -> String {
    let escaped = path
        .to_string_lossy()
        .replace('\\', "\\\\")
        .replace('"', "\\\"");
    format!("\"{escaped}\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_follows_the_sources_and_not_the_tests() {
        let dir = tempfile::tempdir().unwrap();
        for file in [
            "Cargo.toml",
            "Cargo.lock",
            "crates/lora/src/lib.rs",
            "crates/course/Cargo.toml",
            "crates/course/src/lib.rs",
            "crates/course/tests/x.rs",
        ] {
            write_atomic(&dir.path().join(file), "one").unwrap();
        }
        let checkout = Checkout::holding(dir.path()).unwrap();
        let mut installed: Installed = serde_json::from_value(serde_json::json!({
            "checkout": dir.path(), "python": "/p", "evcxr": "/e",
            "rustc": {"version": "1", "sysroot": "/x"},
            "cuda": {"root": "/cuda", "version": "13", "capability": "90"},
        }))
        .unwrap();
        let of = |installed: &Installed, device| {
            key(&checkout, installed, toolkit(installed, device).unwrap()).unwrap()
        };
        let first = of(&installed, Device::Cpu);
        write_atomic(&checkout.join("crates/course/tests/x.rs"), "two").unwrap();
        assert_eq!(of(&installed, Device::Cpu), first);
        for file in ["Cargo.lock", "crates/lora/src/lib.rs"] {
            write_atomic(&checkout.join(file), "two").unwrap();
            assert_ne!(of(&installed, Device::Cpu), first, "{file}");
            write_atomic(&checkout.join(file), "one").unwrap();
        }
        assert_ne!(of(&installed, Device::Cuda), first);
        installed.cuda = None;
        assert_eq!(of(&installed, Device::Cpu), first);
        let refused = toolkit(&installed, Device::Cuda).unwrap_err().to_string();
        assert!(refused.contains("setup --device cuda"), "{refused}");
        installed.rustc.version = "2".into();
        assert_ne!(of(&installed, Device::Cpu), first);
    }

    #[test]
    fn a_kernel_for_a_card_turns_the_feature_on() {
        let dir = tempfile::tempdir().unwrap();
        write_atomic(&dir.path().join("crates/course/Cargo.toml"), "").unwrap();
        let checkout = Checkout::holding(dir.path()).unwrap();
        let config = dir.path().join("config");
        write_init(&config, &checkout, Device::Cpu).unwrap();
        let cpu = fs::read_to_string(config.join("init.evcxr")).unwrap();
        assert_eq!(cpu.lines().count(), 1);
        write_init(&config, &checkout, Device::Cuda).unwrap();
        let cuda = fs::read_to_string(config.join("init.evcxr")).unwrap();
        assert!(
            cuda.starts_with(&cpu) && cuda.contains("course-cuda"),
            "{cuda}"
        );
        let manifest = fs::read_to_string(config.join("course-cuda/Cargo.toml")).unwrap();
        let manifest: toml::Table = toml::from_str(&manifest).unwrap();
        let course = &manifest["dependencies"]["course"];
        assert_eq!(course["features"][0].as_str(), Some("cuda"));
    }
}
