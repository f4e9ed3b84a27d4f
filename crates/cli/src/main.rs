//! `cargo course`: sets up, opens, runs and tests the course.

mod bench;
mod browser;
mod bundle;
mod check;
mod data;
mod device;
mod example;
mod exec;
mod export;
mod home;
mod hub;
mod kernel;
mod lab;
mod lean_cargo;
mod notebook;
mod pretrain;
mod progress;
mod publish;
mod run;
mod setup;
mod teaching;
mod test;

use anyhow::Result;
use clap::{Parser, Subcommand};
use device::Device;
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
    Test(test::Options),
    /// The set-up alone: Python environment, data, Rust kernel, template, kernelspec
    Setup {
        /// Where tensors live in the kernels to prepare for [default: COURSE_DEVICE, or else cpu]
        #[arg(long)]
        device: Option<Device>,
    },
    /// Execute notebooks headless and print a table
    Run(run::Options),
    /// Type-check the notebooks' code and their structure, without a kernel
    Check {
        /// Lessons, such as 01 02 [default: all]
        lessons: Vec<String>,
        /// Compile everything for an NVIDIA card instead; the card need not be there
        #[arg(long, conflicts_with = "lessons")]
        cuda: bool,
    },
    /// The exercises: minutes, and how far you are with each
    Exercises {
        /// Lessons, such as 01 02 [default: all]
        lessons: Vec<String>,
    },
    /// Schedules for a workshop, from the minutes in the notebooks
    Schedule(teaching::Options),
    /// The data that the notebooks use
    #[command(subcommand)]
    Data(data::Action),
    /// Train a model of data/checkpoints/ again
    Pretrain {
        /// Its name, such as sotu-lm
        name: String,
    },
    /// The lessons as web pages that open from the disk
    Site(publish::Options),
    /// The lessons as slides that open from the disk; S shows the teacher's notes
    Slides(publish::Options),
    /// A folder with all that a laptop without a network needs; there, in `course`:
    /// `cargo course lab --offline ..`
    Bundle(bundle::Options),
    /// The notebooks' code as one program, for a machine without Rust or Jupyter
    Export(export::Options),
    /// Speed and memory
    Bench(bench::Options),
    /// Real JupyterLab in a real browser: runs lessons, presses stop, looks at the charts
    Browser(browser::Options),
    /// JupyterHub for a class on one Linux server: an account and kernels for everybody
    Hub(hub::Options),
    /// Run a program of the course's Python environment: `cargo course exec jupyter --version`
    Exec {
        /// The program
        program: String,
        /// What it is told
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// What the kernelspec starts
    #[command(hide = true)]
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

fn publish(kind: publish::Kind, options: &publish::Options) -> Result<bool> {
    publish::command(&Home::find()?, &Checkout::current()?, kind, options)
}

/// Runs a command; `false` means that it ran and found something wrong.
fn act(action: Action) -> Result<bool> {
    match action {
        Action::Lab(options) => lab::lab(&Home::find()?, &Checkout::current()?, &options),
        Action::Test(options) => test::test(&Home::find()?, &Checkout::current()?, &options),
        Action::Setup { device } => {
            let device = Device::chosen(device)?;
            setup::ensure(&Home::find()?, &Checkout::current()?, device)?;
            println!("The course is set up. Open it with `cargo course lab`.");
            Ok(true)
        }
        Action::Run(options) => run::command(&Home::find()?, &Checkout::current()?, &options),
        Action::Check { cuda: true, .. } => check::cuda(&Home::find()?, &Checkout::current()?),
        Action::Check { lessons, .. } => check::command(&Checkout::current()?, &lessons),
        Action::Exercises { lessons } => teaching::exercises(&Checkout::current()?, &lessons),
        Action::Schedule(options) => teaching::schedule(&Checkout::current()?, &options),
        Action::Data(action) => data::command(&Home::find()?, &Checkout::current()?, &action),
        Action::Pretrain { name } => pretrain::command(&Checkout::current()?, &name),
        Action::Site(options) => publish(publish::Kind::Site, &options),
        Action::Slides(options) => publish(publish::Kind::Slides, &options),
        Action::Bundle(options) => bundle::command(&Home::find()?, &Checkout::current()?, &options),
        Action::Export(options) => export::command(&Home::find()?, &Checkout::current()?, &options),
        Action::Bench(options) => bench::command(&Home::find()?, &Checkout::current()?, &options),
        Action::Browser(options) => {
            browser::command(&Home::find()?, &Checkout::current()?, &options)
        }
        Action::Hub(options) => hub::command(&Home::find()?, &Checkout::current()?, &options),
        Action::Exec { program, arguments } => {
            exec::command(&Home::find()?, &Checkout::current()?, &program, &arguments)
        }
        Action::Kernel { connection_file } => kernel::kernel(&connection_file).map(|()| true),
        Action::KernelGuard { folder } => kernel::guard(&folder).map(|()| true),
    }
}
