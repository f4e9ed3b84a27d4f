//! `cargo course run`: executes notebooks headless, each in a process and a kernel of its own.

use crate::device::{self, Device};
use crate::home::{Checkout, Home, write_atomic};
use crate::setup::python::Environment;
use crate::{notebook, setup};
use anyhow::{Context, Result};
use clap::Args;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What `cargo course run` can be told.
#[derive(Args)]
pub struct Options {
    /// Lessons, such as 01 02 [default: all]
    lessons: Vec<String>,
    /// Write the results to this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Store the outputs in the notebooks, and the metrics in tests/expected
    #[arg(long)]
    write: bool,
    /// How many notebooks run at once; each kernel takes about 0.6 GB of memory
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=64))]
    jobs: u8,
    /// Where tensors live [default: COURSE_DEVICE, or else cpu]
    #[arg(long)]
    device: Option<Device>,
    /// Seconds that one cell may take
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    timeout: u32,
}

/// How one notebook went, as `course_jupyter.run` reports it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Outcome {
    /// The file's name.
    pub notebook: String,
    /// Whether every cell did what it should.
    pub ok: bool,
    /// Seconds from the first cell to the last.
    #[serde(default)]
    pub seconds: f64,
    /// Seconds until the kernel was ready.
    #[serde(default)]
    pub startup_seconds: f64,
    /// Exercises whose starter failed and whose solution passed.
    #[serde(default)]
    pub exercises: usize,
    /// The metrics that the notebook recorded.
    #[serde(default)]
    pub metrics: BTreeMap<String, f64>,
    /// The failed cell, from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cell: Option<usize>,
    /// Its failed line, from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub line: Option<usize>,
    /// That line's text.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub source: String,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// Where the outputs up to the failure are kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept: Option<PathBuf>,
}

impl Outcome {
    fn failed(notebook: &Path, message: String) -> Self {
        Self {
            notebook: notebook
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
            ok: false,
            seconds: 0.0,
            startup_seconds: 0.0,
            exercises: 0,
            metrics: BTreeMap::new(),
            cell: None,
            line: None,
            source: String::new(),
            message,
            kept: None,
        }
    }

    /// The failure in words: notebook, cell, line, source, message, where the outputs are.
    pub fn failure(&self) -> String {
        let mut text = self.notebook.clone();
        if let Some(cell) = self.cell {
            let _ = write!(text, ", cell {cell}");
        }
        if let Some(line) = self.line {
            let _ = write!(text, ", line {line}: {}", self.source);
        }
        for line in self.message.lines() {
            let _ = write!(text, "\n    {line}");
        }
        if let Some(kept) = &self.kept {
            let _ = write!(
                text,
                "\n    The notebook is as it was; what ran is kept in {}",
                kept.display()
            );
        }
        text
    }
}

/// How to run the notebooks.
pub struct Plan<'a> {
    /// Their files.
    pub notebooks: &'a [PathBuf],
    /// How many at once.
    pub jobs: usize,
    /// Whether each exercise is tried as well.
    pub exercises: bool,
    /// Stores the outputs; those of a notebook that fails go into this folder instead.
    pub write: Option<&'a Path>,
    /// Where tensors live.
    pub device: Device,
    /// Seconds that one cell may take.
    pub timeout: u32,
}

/// `cargo course run`.
pub fn command(home: &Home, checkout: &Checkout, options: &Options) -> Result<bool> {
    let notebooks = notebook::select(checkout, &options.lessons)?;
    let device = Device::chosen(options.device)?;
    let (environment, _) = setup::ensure(home, checkout, device)?;
    let failed = checkout.join("target/notebooks");
    let plan = Plan {
        notebooks: &notebooks,
        jobs: options.jobs.into(),
        exercises: true,
        write: options.write.then_some(failed.as_path()),
        device,
        timeout: options.timeout,
    };
    let outcomes = execute(home, &environment, &plan)?;
    if options.write {
        for outcome in outcomes.iter().filter(|outcome| outcome.ok) {
            crate::test::store_metrics(checkout, outcome)?;
        }
    }
    if let Some(file) = &options.json {
        write_atomic(file, serde_json::to_string_pretty(&outcomes)? + "\n")?;
    }
    print!("{}", summary(&outcomes));
    Ok(outcomes.iter().all(|outcome| outcome.ok))
}

/// Runs the notebooks, `jobs` at a time, and prints each one's row when it ends.
pub fn execute(home: &Home, environment: &Environment, plan: &Plan<'_>) -> Result<Vec<Outcome>> {
    println!(
        "{:<28} {:>8} {:>9} {:>10}  result",
        "notebook", "start s", "cells s", "exercises"
    );
    let next = AtomicUsize::new(0);
    let outcomes = Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        for _ in 0..plan.jobs.min(plan.notebooks.len()) {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(path) = plan.notebooks.get(index) else {
                        break;
                    };
                    let outcome = one(home, environment, plan, path)
                        .unwrap_or_else(|error| Outcome::failed(path, format!("{error:#}")));
                    println!("{}", row(&outcome));
                    if let Ok(mut outcomes) = outcomes.lock() {
                        outcomes.insert(index, outcome);
                    }
                }
            });
        }
    });
    let outcomes = outcomes
        .into_inner()
        .ok()
        .context("a runner thread panicked")?;
    Ok(outcomes.into_values().collect())
}

/// The command that runs a notebook.
fn runner(environment: &Environment, plan: &Plan<'_>, path: &Path) -> Command {
    let mut command = Command::new(environment.python());
    command.args(["-m", "course_jupyter.run"]).arg(path);
    command.args(["--timeout", &plan.timeout.to_string()]);
    if plan.exercises {
        command.arg("--exercises");
    }
    command.args(["--displayed", &notebook::DISPLAYED.join(",")]);
    if let Some(folder) = plan.write {
        let name = path.with_extension("failed.ipynb");
        let failed = folder.join(name.file_name().unwrap_or_default());
        command.args(["--write", "--failed"]).arg(failed);
    }
    command
}

fn one(home: &Home, environment: &Environment, plan: &Plan<'_>, path: &Path) -> Result<Outcome> {
    let output = runner(environment, plan, path)
        .env("COURSE_HOME", home.join(""))
        .env(device::VARIABLE, plan.device.name())
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .stdin(Stdio::null())
        .output()
        .context("cannot start the course's Python")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let report = text.lines().rev().find(|line| line.starts_with('{'));
    let report = report.with_context(|| {
        format!(
            "the runner died: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        )
    })?;
    let mut outcome: Outcome = serde_json::from_str(report)?;
    if !outcome.ok && outcome.cell.is_none() {
        // A kernel that did not start has said why on its own stderr.
        let said = String::from_utf8_lossy(&output.stderr);
        let tail: Vec<_> = said.lines().rev().take(12).collect();
        for line in tail.into_iter().rev() {
            let _ = write!(outcome.message, "\n{line}");
        }
    }
    Ok(outcome)
}

fn row(outcome: &Outcome) -> String {
    format!(
        "{:<28} {:>8.1} {:>9.1} {:>10}  {}",
        outcome.notebook.trim_end_matches(".ipynb"),
        outcome.startup_seconds,
        outcome.seconds,
        outcome.exercises,
        if outcome.ok { "ok" } else { "FAILED" }
    )
}

/// The failures in full and a closing line.
pub fn summary(outcomes: &[Outcome]) -> String {
    let mut text = String::new();
    for outcome in outcomes.iter().filter(|outcome| !outcome.ok) {
        let _ = writeln!(text, "\n{}", outcome.failure());
    }
    let passed = outcomes.iter().filter(|outcome| outcome.ok).count();
    let _ = writeln!(
        text,
        "\nnotebooks: {passed} passed, {} failed",
        outcomes.len() - passed
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_names_notebook_cell_line_and_message() {
        let json = r#"{"notebook": "01_x.ipynb", "ok": false, "seconds": 1.0, "cell": 7,
                       "line": 3, "source": "assert!(false);", "message": "panicked\nhere"}"#;
        let outcome: Outcome = serde_json::from_str(json).unwrap();
        assert_eq!(
            outcome.failure(),
            "01_x.ipynb, cell 7, line 3: assert!(false);\n    panicked\n    here"
        );
        let kept = Outcome {
            kept: Some("target/notebooks/01_x.failed.ipynb".into()),
            ..outcome.clone()
        };
        let said = "what ran is kept in target/notebooks/01_x.failed.ipynb";
        assert!(kept.failure().ends_with(said), "{}", kept.failure());
        let text = summary(&[outcome]);
        assert!(text.ends_with("notebooks: 0 passed, 1 failed\n"), "{text}");
    }

    #[test]
    fn the_runner_is_told_what_to_store_and_where() {
        let arguments = |write| {
            let plan = Plan {
                notebooks: &[],
                jobs: 1,
                exercises: true,
                write,
                device: Device::Cpu,
                timeout: 7,
            };
            let environment = Environment::at(Path::new("env"));
            let command = runner(&environment, &plan, Path::new("notebooks/01_x.ipynb"));
            let arguments = command.get_args().map(|a| a.to_str().unwrap().to_owned());
            arguments.collect::<Vec<_>>().join(" ")
        };
        let plain = "-m course_jupyter.run notebooks/01_x.ipynb --timeout 7 --exercises \
                     --displayed Figure,Outcome";
        assert_eq!(arguments(None), plain);
        let write = format!("{plain} --write --failed t/01_x.failed.ipynb");
        assert_eq!(arguments(Some(Path::new("t"))), write);
    }
}
