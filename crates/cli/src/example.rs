//! Programs of the course's crate that `cargo course` builds and starts: its examples.

use crate::home::Checkout;
use crate::progress::Steps;
use crate::setup::template::without_cargo;
use crate::setup::tool;
use anyhow::Result;
use std::path::PathBuf;
use std::process::Command;

/// Builds an example of the course's crate in release; returns the program.
pub fn build(checkout: &Checkout, example: &str, steps: &mut Steps) -> Result<PathBuf> {
    let mut cargo = Command::new("cargo");
    without_cargo(&mut cargo, checkout);
    let target = match std::env::var_os("CARGO_TARGET_DIR").filter(|dir| !dir.is_empty()) {
        Some(dir) => std::path::absolute(PathBuf::from(dir))?,
        None => checkout.join("target"),
    };
    cargo
        .args(["build", "--release", "--package", "course"])
        .args(["--example", example])
        .env("CARGO_TARGET_DIR", &target)
        .current_dir(checkout.root());
    let mut step = steps.start(
        &format!("The program {example}, in release"),
        Some("about 3 minutes at first"),
    );
    let progress = tool::compile_progress(&mut step, 300);
    tool::run(
        &format!("building the example {example}"),
        &mut cargo,
        progress,
    )?;
    step.done();
    Ok(target.join("release/examples").join(example))
}
