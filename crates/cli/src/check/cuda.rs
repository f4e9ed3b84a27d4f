//! `cargo course check --cuda`: everything compiled and linked for an NVIDIA card, on a machine that
//! need not have one.

use crate::export;
use crate::home::{Checkout, Home};
use crate::progress::Steps;
use crate::setup::cuda::Toolkit;
use crate::setup::template::without_cargo;
use crate::setup::tool;
use anyhow::Result;
use std::process::Command;

/// Builds the crates with their tests, then the notebooks as one program.
pub fn check(home: &Home, checkout: &Checkout) -> Result<bool> {
    let mut steps = Steps::new(3);
    let (toolkit, _) = Toolkit::for_any(home, &mut steps)?;
    let mut step = steps.start(
        "The crates and their tests, with the feature cuda",
        Some("about 10 minutes on two cores at first"),
    );
    let mut cargo = Command::new("cargo");
    without_cargo(&mut cargo, checkout);
    toolkit.apply(&mut cargo);
    cargo
        .args(["test", "--no-run", "--workspace"])
        .args(["--features", "course/cuda"])
        .current_dir(checkout.root())
        .env("CARGO_TARGET_DIR", checkout.join("target/cuda"));
    let progress = tool::compile_progress(&mut step, 420);
    tool::run("compiling the crates for CUDA", &mut cargo, progress)?;
    step.done();
    let program = checkout.join("target/course-notebooks-cuda");
    export::build(checkout, &[], Some(&toolkit), &program, &mut steps)?;
    println!(
        "check: the crates, their tests and the notebooks compile and link for a card of compute \
         capability {}. None of it has run: that takes a card.",
        toolkit.capability()
    );
    Ok(true)
}
