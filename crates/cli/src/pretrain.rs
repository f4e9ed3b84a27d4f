//! `cargo course pretrain`: makes a checkpoint of `data/checkpoints/` again.

use crate::example;
use crate::home::Checkout;
use crate::progress::Steps;
use anyhow::{Context, Result};
use std::process::Command;

/// Trains `name` in release mode; the example `pretrain` of `crates/course` knows the names.
pub fn command(checkout: &Checkout, name: &str) -> Result<bool> {
    let program = example::build(checkout, "pretrain", &mut Steps::new(1))?;
    let mut training = Command::new(&program);
    let status = training.arg(name).status();
    let status = status.with_context(|| format!("{} cannot be started", program.display()))?;
    Ok(status.success())
}
