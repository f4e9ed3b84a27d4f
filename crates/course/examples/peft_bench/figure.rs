//! The figure of `cargo course bench growth`.

use crate::case::Result;
use course::chart::LineChart;
use serde::Deserialize;
use std::path::Path;

#[derive(Deserialize)]
struct Report {
    axes: Vec<Axis>,
}

#[derive(Deserialize)]
struct Axis {
    axis: String,
    points: Vec<Measured>,
}

#[derive(Deserialize)]
struct Measured {
    size: usize,
    /// Seconds.
    median: f64,
}

/// Draws the median times of a report, as JSON on stdin, to a file.
pub fn draw(file: &Path) -> Result<()> {
    let report: Report = serde_json::from_reader(std::io::stdin().lock())?;
    let mut chart = LineChart::new("Time against size", "size", "time (ms)")
        .log_x()
        .log_y();
    for axis in report.axes {
        let points = axis.points.into_iter();
        chart = chart.line(axis.axis, points.map(|p| (p.size as f64, p.median * 1e3)));
    }
    chart.draw()?.save(file)?;
    Ok(())
}
