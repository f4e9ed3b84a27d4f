//! `cargo course bench kernel`: how fast a notebook answers.

use super::summary::{least, median};
use crate::device::{self, Device};
use crate::example;
use crate::home::{Checkout, Home, write_atomic};
use crate::progress::Steps;
use crate::setup;
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Stdio};

/// Row of the table: key in the report, words, unit, at most.
const ROWS: &[(&str, &str, &str, f64)] = &[
    ("ready", "kernel ready", "s", 18.0),
    ("first_cell", "first cell (:dep and use)", "s", 1.5),
    ("first_let", "first let of a tensor", "s", 2.0),
    ("println", "println cell", "s", 1.0),
    (
        "matmul_ratio",
        "matrix product, notebook / release",
        "",
        1.15,
    ),
    ("mlp_step_ratio", "MLP step, notebook / release", "", 1.15),
];

/// Measures `runs` kernels; false when a goal is missed.
pub fn command(home: &Home, checkout: &Checkout, runs: u8, json: Option<&Path>) -> Result<bool> {
    let (environment, _) = setup::ensure(home, checkout, Device::Cpu)?;
    let program = example::build(checkout, "kernel", &mut Steps::new(1))?;
    let output = Command::new(environment.python())
        .args(["-m", "course_jupyter.bench", &runs.to_string()])
        .arg(program)
        .arg(checkout.join("crates/course/examples/kernel/cells"))
        .current_dir(checkout.join("notebooks"))
        .env("COURSE_HOME", home.join(""))
        // The goals are those of the processor.
        .env(device::VARIABLE, Device::Cpu.name())
        .stderr(Stdio::inherit())
        .output()?;
    if !output.status.success() {
        bail!("the measurement failed (see above)");
    }
    // The kernels write to the same stdout; the figures are the line of JSON.
    let text = String::from_utf8_lossy(&output.stdout);
    let report = text.lines().rev().find(|line| line.starts_with('{'));
    let report: Value = serde_json::from_str(report.context("no figures came back")?)?;
    let well = print(&report);
    if let Some(file) = json {
        write_atomic(file, serde_json::to_string_pretty(&report)? + "\n")?;
    }
    Ok(well)
}

/// Prints min, median and max of every row, beside its goal.
fn print(report: &Value) -> bool {
    println!(
        "{:<36} {:>8} {:>8} {:>8} {:>9}",
        "", "min", "median", "max", "at most"
    );
    let mut well = true;
    for (key, words, unit, goal) in ROWS {
        let values = report[key].as_array().into_iter().flatten();
        let values: Vec<f64> = values.filter_map(Value::as_f64).collect();
        let max = values.iter().copied().max_by(f64::total_cmp);
        let (Some(min), Some(median), Some(max)) = (least(&values), median(&values), max) else {
            well = false;
            println!("{words:<36} not measured");
            continue;
        };
        let verdict = if median <= *goal { "" } else { "  over" };
        well &= median <= *goal;
        println!("{words:<36} {min:>8.2} {median:>8.2} {max:>8.2} {goal:>7.2} {unit}{verdict}");
    }
    well
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_median_over_its_goal_is_told() {
        let report = |first: f64| {
            json!({"ready": [9.0, 10.0, 99.0], "first_cell": [0.5, first, first],
                   "first_let": [1.0], "println": [0.6], "matmul_ratio": [1.0],
                   "mlp_step_ratio": [1.1]})
        };
        assert!(print(&report(1.4)));
        assert!(!print(&report(1.6)));
        assert!(!print(&json!({})));
    }
}
