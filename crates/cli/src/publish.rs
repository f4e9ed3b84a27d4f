//! `cargo course site` and `cargo course slides`: the notebooks, with the outputs that they hold, as
//! pages that open from the disk.

use crate::home::{Checkout, Home};
use crate::{data, notebook};
use anyhow::{Context, Result};
use clap::Args;
use std::path::PathBuf;
use std::process::Command;

/// Where the pages go.
#[derive(Args)]
pub struct Options {
    /// Lessons, such as 01 02 [default: all]
    lessons: Vec<String>,
    /// The folder [default: target/site or target/slides]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// What to make of the notebooks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A page for each lesson, an index and a search.
    Site,
    /// Slides for each lesson, with the teacher's notes in the speaker view.
    Slides,
}

/// Makes the pages; tells where they are.
pub fn command(home: &Home, checkout: &Checkout, kind: Kind, options: &Options) -> Result<bool> {
    let name = match kind {
        Kind::Site => "site",
        Kind::Slides => "slides",
    };
    let python = data::environment(home)?;
    let extra = match kind {
        Kind::Site => checkout.join("notebooks/TEACHING.md"),
        Kind::Slides => data::obtained(home, checkout, "reveal")?,
    };
    let folder = match &options.out {
        Some(folder) => folder.clone(),
        None => checkout.join(format!("target/{name}")),
    };
    let status = Command::new(python)
        .args(["-m", "course_jupyter.publish", name])
        .args([&folder, &extra])
        .args(notebook::select(checkout, &options.lessons)?)
        .stdin(std::process::Stdio::null())
        .status()
        .context("cannot start the course's Python")?;
    if status.success() {
        println!("Open {}", folder.join("index.html").display());
    }
    Ok(status.success())
}
