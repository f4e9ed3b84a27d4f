//! evcxr_jupyter, the Rust kernel, in the pinned version: found on PATH, or built once.

use super::tool;
use crate::home::{Home, short_hash};
use crate::progress::Steps;
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The version that the course is tested with.
pub const VERSION: &str = "0.22.0";

/// How many crates a build compiles (for the progress line only).
const CRATES: usize = 273;

/// The Rust compiler that builds the kernel, the template and every cell.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Rustc {
    /// What `rustc -vV` prints.
    pub version: String,
    /// Its sysroot.
    pub sysroot: PathBuf,
}

impl Rustc {
    /// Asks the compiler that `dir` selects.
    pub fn of(dir: &Path) -> Result<Self> {
        let ask = |arguments: &[&str]| -> Result<String> {
            let output = Command::new("rustc")
                .args(arguments)
                .current_dir(dir)
                .output()
                .context("no rustc was found: install Rust with rustup (see rustup.rs)")?;
            if !output.status.success() {
                bail!(
                    "rustc does not start in {}: {}",
                    dir.display(),
                    String::from_utf8_lossy(&output.stderr).trim()
                );
            }
            Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
        };
        Ok(Self {
            version: ask(&["-vV"])?,
            sysroot: ask(&["--print", "sysroot"])?.into(),
        })
    }

    /// The folder of the standard library's sources, with which variables get their types.
    pub fn library_sources(&self) -> PathBuf {
        self.sysroot.join("lib/rustlib/src/rust/library")
    }

    /// The folder of the standard library, compiled for this machine.
    pub fn library(&self) -> PathBuf {
        let host = self
            .version
            .lines()
            .find_map(|line| line.strip_prefix("host: "));
        self.sysroot
            .join("lib/rustlib")
            .join(host.unwrap_or_default())
            .join("lib")
    }

    /// The toolchain's name for `RUSTUP_TOOLCHAIN`, where rustup manages it.
    pub fn toolchain(&self) -> Option<String> {
        let parent = self.sysroot.parent()?;
        (parent.file_name()? == "toolchains")
            .then(|| self.sysroot.file_name())?
            .map(|name| name.to_string_lossy().into_owned())
    }
}

/// Refuses early when nothing could be linked.
pub fn need_linker() -> Result<()> {
    let found = ["cc", "gcc", "clang"].iter().any(|cc| {
        Command::new(cc)
            .arg("--version")
            .output()
            .is_ok_and(|o| o.status.success())
    });
    if !found {
        bail!("{}", tool::NO_COMPILER);
    }
    Ok(())
}

/// Adds the standard library's sources where they are missing. The kernel works without them,
/// but then every `let` of a notebook needs its type spelled out, so a failure is told.
pub fn ensure_library_sources(rustc: &Rustc, steps: &mut Steps) {
    if rustc.library_sources().is_dir() {
        steps.skip();
        return;
    }
    let step = steps.start("Sources of Rust's standard library (rust-src)", None);
    let mut command = Command::new("rustup");
    command.args(["component", "add", "rust-src"]);
    if let Some(toolchain) = rustc.toolchain() {
        command.args(["--toolchain", &toolchain]);
    }
    match tool::run("rustup component add rust-src", &mut command, |_| ()) {
        Ok(()) => step.done(),
        Err(error) => eprintln!(
            "      not done: {error:#}\n      The notebooks run, but the kernel cannot work out the \
             types of variables by itself: a cell that says \"Couldn't automatically determine \
             type\" wants `let x: Type = …`. Install the component rust-src to mend it."
        ),
    }
}

fn key(rustc: &Rustc) -> String {
    short_hash([
        VERSION.as_bytes(),
        rustc.version.as_bytes(),
        rustc.sysroot.as_os_str().as_encoded_bytes(),
    ])
}

fn root(rustc: &Rustc) -> String {
    format!("evcxr-{VERSION}-{}", key(rustc))
}

/// Where a kernel that was built for this compiler lies.
pub fn binary(home: &Home, rustc: &Rustc) -> PathBuf {
    home.join(root(rustc)).join("bin/evcxr_jupyter")
}

/// Finds the kernel's binary, or builds it.
pub fn ensure(home: &Home, rustc: &Rustc, steps: &mut Steps) -> Result<PathBuf> {
    if let Some(binary) = on_path(rustc) {
        steps.skip();
        return Ok(binary);
    }
    let binary = binary(home, rustc);
    if binary.exists() {
        steps.skip();
        return Ok(binary);
    }
    let mut step = steps.start(
        &format!("evcxr_jupyter {VERSION}, the Rust kernel"),
        Some("about 7 minutes on two cores"),
    );
    // What a build that was cut off had compiled is used again.
    let build = home.join(format!("build-evcxr-{}", key(rustc)));
    let mut command = Command::new("cargo");
    command
        .args([
            "install",
            "evcxr_jupyter",
            "--locked",
            "--version",
            VERSION,
            "--root",
        ])
        .arg(home.join(root(rustc)))
        .current_dir(home.join(""))
        .env("CARGO_TARGET_DIR", &build);
    if let Some(toolchain) = rustc.toolchain() {
        command.env("RUSTUP_TOOLCHAIN", toolchain);
    }
    tool::run(
        "building evcxr_jupyter",
        &mut command,
        tool::compile_progress(&mut step, CRATES),
    )?;
    fs::remove_dir_all(&build).ok();
    step.done();
    Ok(binary)
}

/// An evcxr_jupyter on PATH that is of our version and was built with our compiler (its path is
/// compiled in).
fn on_path(rustc: &Rustc) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?)
        .map(|dir| dir.join("evcxr_jupyter"))
        .filter(|binary| binary.is_file())
        .find(|binary| {
            let install = binary
                .parent()
                .and_then(Path::parent)
                .map(|p| p.join(".crates2.json"));
            let text = install.and_then(|path| fs::read_to_string(path).ok());
            text.is_some_and(|text| is_ours(&text, &rustc.version))
        })
}

/// Whether cargo's record of installed binaries tells of our version, built with this compiler.
fn is_ours(crates2: &str, rustc: &str) -> bool {
    let Ok(record) = serde_json::from_str::<Value>(crates2) else {
        return false;
    };
    let installed = record["installs"].as_object().into_iter().flatten();
    installed
        .filter(|(id, _)| id.starts_with(&format!("evcxr_jupyter {VERSION} ")))
        .any(|(_, install)| install["rustc"].as_str().map(str::trim) == Some(rustc))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_pinned_version_built_with_this_compiler_is_used_from_path() {
        let record = |id: &str, rustc: &str| {
            serde_json::json!({"installs": {id: {"rustc": rustc, "bins": ["evcxr_jupyter"]}}})
                .to_string()
        };
        let id = format!("evcxr_jupyter {VERSION} (registry+x)");
        assert!(is_ours(
            &record(&id, "rustc 1.95.0\nhost: y\n"),
            "rustc 1.95.0\nhost: y"
        ));
        assert!(!is_ours(&record(&id, "rustc 1.94.0"), "rustc 1.95.0"));
        assert!(!is_ours(
            &record("evcxr_jupyter 0.21.0 (x)", "rustc 1.95.0"),
            "rustc 1.95.0"
        ));
        assert!(!is_ours("{", "rustc 1.95.0"));
    }

    #[test]
    fn the_standard_library_of_this_compiler_is_where_it_is_said_to_be() {
        let rustc = Rustc::of(Path::new(env!("CARGO_MANIFEST_DIR"))).unwrap();
        let files = fs::read_dir(rustc.library()).unwrap().flatten();
        let names: Vec<_> = files
            .map(|f| f.file_name().to_string_lossy().into_owned())
            .collect();
        assert!(
            names.iter().any(|name| name.starts_with("libstd-")),
            "{names:?}"
        );
    }

    #[test]
    fn a_toolchain_is_named_only_where_rustup_manages_it() {
        let rustc = |sysroot: &str| Rustc {
            version: String::new(),
            sysroot: sysroot.into(),
        };
        assert_eq!(
            rustc("/h/.rustup/toolchains/1.95.0-x")
                .toolchain()
                .as_deref(),
            Some("1.95.0-x")
        );
        assert_eq!(rustc("/usr/lib/rustlib").toolchain(), None);
    }
}
