//! The environment that `cargo course bench --against peft` measures against: torch, transformers
//! and PEFT, every version pinned by hash. No lesson needs it, so `cargo course setup` leaves it.

use super::need_space;
use super::python::{self, Recipe};
use crate::home::{Home, write_atomic};
use crate::progress::Steps;
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

const RECIPE: Recipe = Recipe {
    prefix: "peft",
    requirements: include_str!("../../python/peft-requirements.txt"),
    what: "Python environment with torch and PEFT",
    estimate: SIZE,
};

// On Linux torch comes with NVIDIA's libraries and does not import without them.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
const SIZE: &str = "about 10 minutes, 7 GB on disk";
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
const NEEDED_BYTES: u64 = 12_000_000_000;
#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
const SIZE: &str = "a few minutes";
#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
const NEEDED_BYTES: u64 = 2_000_000_000;

/// Names the Python of an environment that has torch and PEFT already.
const OWN: &str = "COURSE_PEFT_PYTHON";

/// The Python program that times PEFT: name, content.
const SCRIPT: &[(&str, &str)] = &[
    (
        "__main__.py",
        include_str!("../../python/peft_bench/__main__.py"),
    ),
    ("cases.py", include_str!("../../python/peft_bench/cases.py")),
];

/// The Python with torch and PEFT: the one that `COURSE_PEFT_PYTHON` names, or one of the
/// course's own, made where it is missing.
pub fn ensure(home: &Home, steps: &mut Steps) -> Result<PathBuf> {
    if let Some(python) = std::env::var_os(OWN).filter(|name| !name.is_empty()) {
        steps.skip();
        return imports(Path::new(&python)).map(|()| python.into());
    }
    let _lock = home.lock("peft", || {
        eprintln!("Another `cargo course` is installing PEFT: waiting for it.");
    })?;
    let interpreter = python::interpreter()?;
    if !runs_on(&interpreter.version) {
        bail!(
            "torch 2.8 and transformers 5.24 run on Python 3.11 to 3.13, and this one is {}. Name \
             another one with COURSE_PYTHON=/path/to/python3, or an environment that has torch and PEFT with \
             {OWN}=/path/to/its/bin/python.",
            interpreter.version
        );
    }
    let space = || need_space(&home.join(""), NEEDED_BYTES);
    let environment = python::make(home, steps, &RECIPE, &interpreter, space)?;
    Ok(environment.python())
}

fn runs_on(version: &str) -> bool {
    ["3.11", "3.12", "3.13"].contains(&version)
}

fn imports(python: &Path) -> Result<()> {
    let output = Command::new(python)
        .args([
            "-c",
            "import accelerate, peft, safetensors, torch, transformers",
        ])
        .output()
        .with_context(|| format!("{OWN}: cannot start {}", python.display()))?;
    if !output.status.success() {
        bail!(
            "{OWN}: {} has no torch, transformers, accelerate and peft. Install them there, or \
             unset {OWN} to get an environment of the course's own. It said:\n{}",
            python.display(),
            String::from_utf8_lossy(&output.stderr).trim_end()
        );
    }
    Ok(())
}

/// Writes the Python program; returns its folder, which Python runs.
pub fn write_script(home: &Home) -> Result<PathBuf> {
    let folder = home.join("peft_bench");
    for (name, content) in SCRIPT {
        write_atomic(&folder.join(name), content)?;
    }
    Ok(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_requirement_is_pinned_by_hash() {
        assert!(RECIPE.requirements.contains("\npeft==0.21.2"));
        python::tests::assert_pinned(RECIPE.requirements);
    }

    #[test]
    fn pythons_without_a_torch_or_transformers_are_refused() {
        assert!(runs_on("3.11") && runs_on("3.13"));
        assert!(!runs_on("3.10") && !runs_on("3.14"));
    }

    #[test]
    fn an_environment_without_peft_is_refused() {
        let error = imports(Path::new("false")).unwrap_err().to_string();
        assert!(error.contains("unset COURSE_PEFT_PYTHON"), "{error}");
        assert!(imports(Path::new("/no/such/python")).is_err());
    }
}
