//! The kernelspec `rust` of the course's environment, which starts `cargo course kernel`.

use super::python::Environment;
use crate::home::{Home, write_atomic};
use crate::progress::Steps;
use anyhow::{Context, Result};
use serde_json::json;
use std::fs;

/// Installs this very program as the kernel's launcher and writes the kernelspec.
pub fn ensure(home: &Home, environment: &Environment, steps: &mut Steps) -> Result<()> {
    let this = std::env::current_exe()?;
    let launcher = home.join("bin/course-cli");
    let program = fs::read(&this).with_context(|| format!("cannot read {}", this.display()))?;
    let spec = json!({
        "argv": [launcher, "kernel", "{connection_file}"],
        "display_name": "Rust",
        "language": "rust",
        "interrupt_mode": "signal",
        "env": { "COURSE_HOME": home.join("") },
    });
    let spec = serde_json::to_string_pretty(&spec)?;
    let path = environment.join("share/jupyter/kernels/rust/kernel.json");
    let same = fs::read(&launcher).is_ok_and(|old| old == program)
        && fs::read_to_string(&path).is_ok_and(|old| old == spec);
    if same {
        steps.skip();
        return Ok(());
    }
    let step = steps.start("Kernelspec `rust` in the course's environment", None);
    // Copied with its permissions, then renamed: a running kernel keeps the old file.
    let part = home.join("bin/course-cli.part");
    fs::create_dir_all(home.join("bin"))?;
    fs::copy(&this, &part).and_then(|_| fs::rename(&part, &launcher))?;
    write_atomic(&path, spec)?;
    step.done();
    Ok(())
}
