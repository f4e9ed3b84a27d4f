//! `cargo course bench growth`: how a step's time and memory grow with its sizes.

use super::against::{per_turn, rust_worker, turn};
use super::worker::Worker;
use super::{machine, summary};
use crate::example;
use crate::home::{Checkout, write_atomic};
use crate::progress::Steps;
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

/// Every size gets so many turns.
const TURNS: usize = 12;

/// What grows: a name for people, and the settings at one size.
struct Axis {
    name: &'static str,
    words: &'static str,
    sizes: Vec<usize>,
    settings: fn(usize) -> Value,
}

/// One size's figures.
struct Point {
    size: usize,
    seconds: Vec<f64>,
    peak: u64,
    start: u64,
}

fn axes() -> Vec<Axis> {
    let doubled = |from: usize, to: usize| {
        std::iter::successors(Some(from), |n| Some(2 * n))
            .take_while(|n| *n <= to)
            .collect::<Vec<_>>()
    };
    vec![
        Axis {
            name: "rank",
            words: "step of a linear layer 768 to 768, batch 256",
            sizes: doubled(1, 256),
            settings: |n| json!({"case": "linear-step", "batch": 256, "r": n}),
        },
        Axis {
            name: "batch",
            words: "step of a linear layer 768 to 768, r = 8",
            sizes: doubled(1, 1024),
            settings: |n| json!({"case": "linear-step", "batch": n, "r": 8}),
        },
        Axis {
            name: "sequence length",
            words: "step of an attention block, 768 dimensions, 12 heads, one sequence",
            sizes: doubled(128, 2048),
            settings: |n| json!({"case": "attention-step", "batch": 1, "tokens": n}),
        },
        Axis {
            name: "adapters",
            words: "forward pass of 256 rows of 4 tokens through a linear layer 768 to 768, r = 8",
            sizes: doubled(1, 256),
            settings: |n| json!({"case": "mixed", "rows": 256, "tokens": 4, "adapters": n}),
        },
    ]
}

/// Measures and prints a Markdown table for each axis.
pub fn command(checkout: &Checkout, json: Option<&Path>, figure: Option<&Path>) -> Result<bool> {
    let program = example::build(checkout, "peft_bench", &mut Steps::new(1))?;
    machine::warn_when_busy();
    let mut report = machine::described(checkout)?;
    let mut all = Vec::new();
    for axis in axes() {
        let points = measure(&program, &axis)?;
        println!("{}", table(&axis, &points));
        all.push(described(&axis, &points));
    }
    report["axes"] = all.into();
    if let Some(file) = json {
        write_atomic(file, serde_json::to_string_pretty(&report)? + "\n")?;
    }
    if let Some(file) = figure {
        draw(&program, &report, file)?;
    }
    Ok(true)
}

/// Draws the report's times to a file.
fn draw(program: &Path, report: &Value, file: &Path) -> Result<()> {
    let mut child = Command::new(program)
        .arg("--figure")
        .arg(file)
        .stdin(Stdio::piped())
        .spawn()
        .context("the figure: the program does not start")?;
    if let Some(mut stdin) = child.stdin.take() {
        writeln!(stdin, "{report}").context("the figure: the program reads nothing")?;
    }
    if !child.wait()?.success() {
        bail!("the figure could not be drawn (see above)");
    }
    Ok(())
}

/// A size that is being measured.
struct Running {
    size: usize,
    rust: Worker,
    /// Iterations in a turn.
    n: usize,
    seconds: Vec<f64>,
}

/// All sizes in turns, so that a machine that slows down for a while slows all of them; each in a
/// program of its own, whose peak memory is that of this size alone.
fn measure(program: &Path, axis: &Axis) -> Result<Vec<Point>> {
    let start = |&size: &usize| -> Result<Running> {
        let mut rust = rust_worker(program, machine::threads())?;
        let request = json!({"do": "load", "id": "it", "case": (axis.settings)(size)});
        let n = per_turn(summary::least(&rust.seconds(&request)?).unwrap_or(1.0));
        let seconds = Vec::new();
        Ok(Running {
            size,
            rust,
            n,
            seconds,
        })
    };
    eprintln!("{}: warming up", axis.name);
    let mut all: Vec<Running> = axis.sizes.iter().map(start).collect::<Result<_>>()?;
    for number in 1..=TURNS {
        eprintln!("{}: turn {number} of {TURNS}", axis.name);
        for it in &mut all {
            it.seconds.extend(turn(&mut it.rust, "it", it.n)?);
        }
    }
    let point = |mut it: Running| -> Result<Point> {
        let peak = it.rust.peak()?;
        let bytes = |key: &str| peak[key].as_u64().unwrap_or(0);
        Ok(Point {
            size: it.size,
            seconds: it.seconds,
            peak: bytes("peak"),
            start: bytes("start"),
        })
    };
    all.into_iter().map(point).collect()
}

fn table(axis: &Axis, points: &[Point]) -> String {
    let mut text = format!(
        "| {} | median, ms | least, ms | peak memory, MB |\n|---:|---:|---:|---:|\n",
        axis.name
    );
    for point in points {
        let ms = |value: Option<f64>| value.map_or("-".to_owned(), |s| format!("{:.3}", s * 1e3));
        let (median, least) = (
            summary::median(&point.seconds),
            summary::least(&point.seconds),
        );
        let peak = point.peak as f64 / 1e6;
        text += &format!(
            "| {} | {} | {} | {peak:.1} |\n",
            point.size,
            ms(median),
            ms(least)
        );
    }
    format!("{}: {}\n\n{text}", axis.name, axis.words)
}

fn described(axis: &Axis, points: &[Point]) -> Value {
    let points: Vec<_> = points
        .iter()
        .map(|point| {
            json!({"size": point.size, "settings": (axis.settings)(point.size),
                   "seconds": point.seconds, "median": summary::median(&point.seconds), "peak": point.peak, "start": point.start})
        })
        .collect();
    json!({"axis": axis.name, "words": axis.words, "points": points})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_double() {
        let sizes: Vec<_> = axes().into_iter().map(|axis| axis.sizes).collect();
        assert_eq!(sizes[0], [1, 2, 4, 8, 16, 32, 64, 128, 256]);
        assert_eq!((sizes[1][0], sizes[1].len()), (1, 11));
        assert_eq!(sizes[2], [128, 256, 512, 1024, 2048]);
        assert_eq!(sizes[3].last(), Some(&256));
    }

    #[test]
    fn a_table_is_markdown() {
        let point = Point {
            size: 8,
            seconds: vec![0.003, 0.001, 0.002],
            peak: 12_340_000,
            start: 1,
        };
        let text = table(&axes()[0], &[point]);
        assert!(text.ends_with("| 8 | 2.000 | 1.000 | 12.3 |\n"), "{text}");
        assert_eq!(described(&axes()[1], &[])["axis"], "batch");
    }
}
