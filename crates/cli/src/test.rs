//! `cargo course test`: everything that must hold before a change lands.

use crate::device::Device;
use crate::home::{Checkout, Home, write_atomic};
use crate::notebook::{self, Notebook};
use crate::progress::minutes;
use crate::run::{self, Outcome};
use crate::setup::cuda::Toolkit;
use crate::setup::python::Environment;
use crate::setup::template::{library_path, without_cargo};
use crate::{check, data, device, setup};
use anyhow::{Context, Result};
use clap::Args;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

/// What `cargo course test` can be told.
#[derive(Args)]
pub struct Options {
    /// Where tensors live [default: COURSE_DEVICE, or else cpu]
    #[arg(long)]
    device: Option<Device>,
}

/// Runs every stage, also after one that failed, and prints a table at the end.
pub fn test(home: &Home, checkout: &Checkout, options: &Options) -> Result<bool> {
    let device = Device::chosen(options.device)?;
    let mut stages = Stages(Vec::new());
    let (environment, installed) = setup::ensure(home, checkout, device)?;
    let toolkit = match device {
        Device::Cpu => None,
        Device::Cuda => installed.cuda.as_ref(),
    };
    let cargo = |arguments: &[&str]| cargo(checkout, toolkit, arguments);
    let features: &[&str] = match toolkit {
        Some(_) => &["--features", "course/cuda"],
        None => &[],
    };
    stages.run("format", || cargo(&["fmt", "--all", "--check"]));
    stages.run("lints", || {
        let what = ["clippy", "--workspace", "--all-targets"];
        cargo(&[&what, features, &["--", "-D", "warnings"]].concat())
    });
    stages.run("crate tests", || {
        cargo(&[&["test", "--workspace"], features].concat())
    });
    stages.run("documentation", || {
        cargo(&["doc", "--workspace", "--no-deps"])
    });
    stages.run("data", || data::verify(home, checkout));
    stages.run("notebooks: types and structure", || {
        check::command(checkout, &[])
    });
    stages.run("kernel and Jupyter", || {
        kernel_tests(home, checkout, &environment, device)
    });
    stages.run("notebooks: headless", || {
        notebooks(home, checkout, &environment, device)
    });
    Ok(stages.report())
}

/// The stages that ran: name, time, result.
struct Stages(Vec<(&'static str, Duration, bool)>);

impl Stages {
    fn run(&mut self, name: &'static str, stage: impl FnOnce() -> Result<bool>) {
        println!("\n== {name}");
        let start = Instant::now();
        let passed = stage().unwrap_or_else(|error| {
            eprintln!("error: {error:#}");
            false
        });
        self.0.push((name, start.elapsed(), passed));
    }

    fn report(&self) -> bool {
        println!("\n== summary");
        for (name, time, passed) in &self.0 {
            println!(
                "{:<32} {:>12}  {}",
                name,
                minutes(*time),
                if *passed { "ok" } else { "FAILED" }
            );
        }
        let passed = self.0.iter().filter(|stage| stage.2).count();
        println!("{passed} passed, {} failed", self.0.len() - passed);
        passed == self.0.len()
    }
}

fn cargo(checkout: &Checkout, toolkit: Option<&Toolkit>, arguments: &[&str]) -> Result<bool> {
    let mut command = Command::new("cargo");
    without_cargo(&mut command, checkout);
    if let Some(toolkit) = toolkit {
        toolkit.apply(&mut command);
        library_path(&mut command, [toolkit.libraries()], checkout);
    }
    command
        .args(arguments)
        .current_dir(checkout.root())
        .env(device::VARIABLE, toolkit.map_or("cpu", |_| "cuda"))
        .env("RUSTDOCFLAGS", "-D warnings");
    Ok(command.status().context("cannot start cargo")?.success())
}

/// The tests that need a kernel: one candle, stop button, nothing left behind, exit codes.
fn kernel_tests(
    home: &Home,
    checkout: &Checkout,
    environment: &Environment,
    device: Device,
) -> Result<bool> {
    let status = Command::new(environment.python())
        .args([
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "tests/jupyter",
        ])
        .current_dir(checkout.root())
        .env("COURSE_CLI", std::env::current_exe()?)
        .env("COURSE_HOME", home.join(""))
        .env(device::VARIABLE, device.name())
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .status()?;
    Ok(status.success())
}

/// Two notebooks at a time: while one waits for the compiler, which is busy on one core, the other
/// computes.
const JOBS: usize = 2;

/// Seconds that one cell may take while another notebook runs beside it.
const TIMEOUT: u32 = 240;

fn notebooks(
    home: &Home,
    checkout: &Checkout,
    environment: &Environment,
    device: Device,
) -> Result<bool> {
    let notebooks = notebook::select(checkout, &[])?;
    let plan = run::Plan {
        notebooks: &notebooks,
        jobs: JOBS,
        exercises: true,
        write: None,
        device,
        timeout: TIMEOUT,
    };
    let outcomes = run::execute(home, environment, &plan)?;
    print!("{}", run::summary(&outcomes));
    let mut well = outcomes.iter().all(|outcome| outcome.ok);
    for (path, outcome) in notebooks
        .iter()
        .zip(&outcomes)
        .filter(|(_, outcome)| outcome.ok)
    {
        let lesson = Notebook::read(path)?;
        let expected = Expected::read(checkout, &lesson.lesson())?;
        let committed: BTreeMap<String, f64> =
            serde_json::from_value(lesson.metadata["course"]["metrics"].clone())
                .unwrap_or_default();
        for (who, metrics) in [
            ("this run", &outcome.metrics),
            ("the committed outputs", &committed),
        ] {
            for difference in expected.differences(metrics) {
                println!("{}, {who}: {difference}", outcome.notebook);
                well = false;
            }
        }
    }
    Ok(well)
}

/// `tests/expected/NN.json`: what a lesson's metrics must be.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(transparent)]
struct Expected(BTreeMap<String, Metric>);

/// A metric's value and how far another run may be from it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Metric {
    value: f64,
    /// Largest |difference| / |value| that passes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    relative: Option<f64>,
    /// Largest |difference| that passes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    absolute: Option<f64>,
}

impl Metric {
    /// A new metric: a whole number must be met exactly, any other to 0.1 %.
    fn new(value: f64) -> Self {
        let relative = if value.fract() == 0.0 { 0.0 } else { 1e-3 };
        Self {
            value,
            relative: Some(relative),
            absolute: None,
        }
    }

    fn tolerance(&self) -> f64 {
        self.absolute
            .unwrap_or(0.0)
            .max(self.relative.unwrap_or(0.0) * self.value.abs())
    }
}

impl Expected {
    fn file(checkout: &Checkout, lesson: &str) -> PathBuf {
        checkout.join(format!("tests/expected/{lesson}.json"))
    }

    fn read(checkout: &Checkout, lesson: &str) -> Result<Self> {
        let path = Self::file(checkout, lesson);
        let text = fs::read_to_string(&path).with_context(|| {
            format!(
                "{} is missing: `cargo course run {lesson} --write` makes it",
                path.display()
            )
        })?;
        serde_json::from_str(&text).with_context(|| format!("{} is damaged", path.display()))
    }

    /// Each metric that is missing, unexpected or too far off, in words.
    fn differences(&self, metrics: &BTreeMap<String, f64>) -> Vec<String> {
        let mut found = Vec::new();
        for (name, metric) in &self.0 {
            match metrics.get(name) {
                None => found.push(format!("metric {name} was not recorded")),
                Some(&value) => {
                    let off = (value - metric.value).abs();
                    if off.is_nan() || off > metric.tolerance() {
                        found.push(format!(
                            "metric {name} is {value}, expected {} ± {:.1e}",
                            metric.value,
                            metric.tolerance()
                        ));
                    }
                }
            }
        }
        for name in metrics.keys().filter(|name| !self.0.contains_key(*name)) {
            found.push(format!("metric {name} is not in the expected ones"));
        }
        found
    }
}

/// Stores the metrics of a run as the expected ones, keeping tolerances that were set by hand.
pub fn store_metrics(checkout: &Checkout, outcome: &Outcome) -> Result<()> {
    let lesson: String = outcome
        .notebook
        .chars()
        .take_while(char::is_ascii_digit)
        .collect();
    if lesson.is_empty() {
        return Ok(()); // A notebook that is no lesson.
    }
    let path = Expected::file(checkout, &lesson);
    let old = if path.exists() {
        Expected::read(checkout, &lesson)?
    } else {
        Expected::default()
    };
    let new = outcome.metrics.iter().map(|(name, &value)| {
        let metric = old
            .0
            .get(name)
            .map_or(Metric::new(value), |old| Metric { value, ..*old });
        (name.clone(), metric)
    });
    let new = Expected(new.collect());
    write_atomic(&path, serde_json::to_string_pretty(&new)? + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expected() -> Expected {
        let text = r#"{"count": {"value": 12288, "relative": 0.0},
                       "loss": {"value": 2.0, "relative": 0.01},
                       "zero": {"value": 0.0, "absolute": 1e-6}}"#;
        serde_json::from_str(text).unwrap()
    }

    fn metrics(count: f64, loss: f64, zero: f64) -> BTreeMap<String, f64> {
        [("count", count), ("loss", loss), ("zero", zero)]
            .map(|(n, v)| (n.to_owned(), v))
            .into()
    }

    #[test]
    fn metrics_within_their_tolerance_pass() {
        assert_eq!(
            expected().differences(&metrics(12288.0, 2.019, 9e-7)),
            Vec::<String>::new()
        );
    }

    #[test]
    fn metrics_off_missing_and_new_are_named() {
        let off = expected().differences(&metrics(12289.0, 2.03, f64::NAN));
        assert_eq!(off.len(), 3, "{off:?}");
        let mut other = metrics(12288.0, 2.0, 0.0);
        other.remove("loss");
        other.insert("extra".into(), 1.0);
        let off = expected().differences(&other);
        assert_eq!(off.len(), 2, "{off:?}");
        assert!(off[0].contains("loss") && off[1].contains("extra"));
    }

    #[test]
    fn new_metrics_get_a_tolerance_and_old_ones_keep_theirs() {
        let dir = tempfile::tempdir().unwrap();
        write_atomic(&dir.path().join("crates/course/Cargo.toml"), "").unwrap();
        let checkout = Checkout::holding(dir.path()).unwrap();
        let outcome = |value: f64| -> Outcome {
            serde_json::from_value(serde_json::json!({
                "notebook": "03_x.ipynb", "ok": true, "metrics": {"a": value, "n": 3.0}
            }))
            .unwrap()
        };
        store_metrics(&checkout, &outcome(0.5)).unwrap();
        let mut stored = Expected::read(&checkout, "03").unwrap();
        assert_eq!(stored.0["a"].relative, Some(1e-3));
        assert_eq!(stored.0["n"].relative, Some(0.0));
        stored.0.get_mut("a").unwrap().relative = Some(0.2);
        let text = serde_json::to_string(&stored).unwrap();
        write_atomic(&Expected::file(&checkout, "03"), text).unwrap();
        store_metrics(&checkout, &outcome(0.6)).unwrap();
        let stored = Expected::read(&checkout, "03").unwrap();
        assert_eq!(
            stored.0["a"],
            Metric {
                value: 0.6,
                relative: Some(0.2),
                absolute: None
            }
        );
    }
}
