//! `cargo course exec`: a program of the course's Python environment, such as `jupyter nbconvert`.

use crate::home::{Checkout, Home};
use crate::setup;
use crate::setup::template::without_cargo;
use anyhow::{Result, bail};
use std::process::{Command, ExitStatus};

/// Sets up what is missing and runs the program in the folder where it was asked for.
pub fn command(home: &Home, checkout: &Checkout, command: &[String]) -> Result<ExitStatus> {
    let (environment, _) = setup::ensure(home, checkout)?;
    let [name, arguments @ ..] = command else {
        bail!("name a program, such as `cargo course exec jupyter --version`");
    };
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
    command.args(arguments).env("COURSE_HOME", home.join(""));
    Ok(command.status()?)
}
