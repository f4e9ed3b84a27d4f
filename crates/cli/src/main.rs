//! `cargo course`: sets up, opens, runs and tests the course.

mod bench;
mod check;
mod data;
mod example;
mod home;
mod kernel;
mod lab;
mod lean_cargo;
mod notebook;
mod pretrain;
mod progress;
mod run;
mod setup;
mod test;

use anyhow::Result;
use clap::{Parser, Subcommand};
use home::{Checkout, Home};
use std::path::PathBuf;
use std::process::ExitCode;

/// The LoRA course in Rust: fifteen notebooks that run on your own machine.
#[derive(Parser)]
#[command(name = "cargo course", bin_name = "cargo course", version)]
struct Arguments {
    #[command(subcommand)]
    command: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Set up what is missing, then open JupyterLab on the notebooks
    Lab(lab::Options),
    /// Everything: format, lints, crate tests, docs, every notebook headless, metrics
    Test,
    /// The set-up alone: Python environment, data, Rust kernel, template, kernelspec
    Setup,
    /// Execute notebooks headless and print a table
    Run(run::Options),
    /// Type-check the notebooks' code and their structure, without a kernel
    Check {
        /// Lessons, such as 01 02; all without
        lessons: Vec<String>,
    },
    /// The data that the notebooks use
    #[command(subcommand)]
    Data(data::Action),
    /// Train a model of data/checkpoints/ again
    Pretrain {
        /// Its name, such as sotu-lm
        name: String,
    },
    /// Speed and memory
    Bench(bench::Options),
    /// What the kernelspec starts
    Kernel {
        /// Jupyter's connection file
        connection_file: PathBuf,
    },
    #[command(hide = true)]
    KernelGuard { folder: PathBuf },
}

fn main() -> ExitCode {
    if lean_cargo::is_meant() {
        return lean_cargo::run().unwrap_or_else(|error| {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        });
    }
    match act(Arguments::parse().command) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs a command; `false` means that it ran and found something wrong.
fn act(action: Action) -> Result<bool> {
    match action {
        Action::Lab(options) => lab::lab(&Home::find()?, &Checkout::current()?, &options),
        Action::Test => test::test(&Home::find()?, &Checkout::current()?),
        Action::Setup => {
            setup::ensure(&Home::find()?, &Checkout::current()?)?;
            println!("The course is set up. Open it with `cargo course lab`.");
            Ok(true)
        }
        Action::Run(options) => run::command(&Home::find()?, &Checkout::current()?, &options),
        Action::Check { lessons } => check::command(&Checkout::current()?, &lessons),
        Action::Data(action) => data::command(&Home::find()?, &Checkout::current()?, &action),
        Action::Pretrain { name } => pretrain::command(&Checkout::current()?, &name),
        Action::Bench(options) => bench::command(&Home::find()?, &Checkout::current()?, &options),
        Action::Kernel { connection_file } => kernel::kernel(&connection_file).map(|()| true),
        Action::KernelGuard { folder } => kernel::guard(&folder).map(|()| true),
    }
}
