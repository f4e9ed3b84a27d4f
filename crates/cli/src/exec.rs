//! `cargo course exec`: a program of the course's Python environment, such as `jupyter nbconvert`.

use crate::device::Device;
use crate::home::{Checkout, Home};
use crate::setup;
use crate::setup::template::without_cargo;
use anyhow::{Context, Result, bail};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Sets up what is missing and becomes the program, in the folder where it was asked for; returns
/// only if that cannot start.
pub fn command(home: &Home, checkout: &Checkout, name: &str, arguments: &[String]) -> Result<bool> {
    let (environment, _) = setup::ensure(home, checkout, Device::chosen(None)?)?;
    let program = environment.bin(name);
    if !program.is_file() {
        bail!(
            "the course's environment has no program {name:?}; it has jupyter, pytest and what \
             else lies in {}",
            environment.bin("").display()
        );
    }
    let mut command = Command::new(program);
    without_cargo(&mut command, checkout);
    let error = command
        .args(arguments)
        .env("COURSE_HOME", home.join(""))
        .exec();
    Err(error).with_context(|| format!("cannot start {name}"))
}
