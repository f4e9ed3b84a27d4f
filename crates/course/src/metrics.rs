//! The numbers a lesson stands for, written where the tests can read them.
//!
//! A notebook records a few results by name. When the environment variable `COURSE_METRICS` names
//! a file, each becomes a line of JSON in it, which `cargo course test` compares with what is
//! expected. Without the variable nothing is written.
//!
//! A number from several seeds is a [`Spread`]: its mean and its range.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;

use serde::Serialize;

use crate::{Error, Result};

mod spread;

pub use spread::Spread;

/// The environment variable that names the file.
const VARIABLE: &str = "COURSE_METRICS";

#[derive(Serialize)]
struct Metric<'a> {
    metric: &'a str,
    value: f64,
}

#[derive(Serialize)]
struct Exercise<'a> {
    exercise: &'a str,
    passed: bool,
}

/// Records `value` under `name` and gives it back. It prints nothing.
///
/// The line is `{"metric":"name","value":1.5}`.
///
/// # Errors
///
/// [`Error::Metric`] when the name is not made of a-z, 0-9 and _, or the value is NaN or infinite;
/// [`Error::File`] when the file cannot be written.
///
/// ```
/// assert_eq!(course::metrics::record("final_loss", 0.25f32)?, 0.25);
/// assert!(course::metrics::record("final loss", 0.25).is_err());
/// assert!(course::metrics::record("final_loss", f64::NAN).is_err());
/// # Ok::<(), course::Error>(())
/// ```
pub fn record(name: &str, value: impl Into<f64>) -> Result<f64> {
    record_in(file().as_deref().map(Path::new), name, value.into())
}

/// Records whether an exercise was solved, as `{"exercise":"name","passed":true}`.
pub(crate) fn record_exercise(name: &str, passed: bool) -> Result<()> {
    match file() {
        Some(path) => append(
            Path::new(&path),
            &Exercise {
                exercise: name,
                passed,
            },
        ),
        None => Ok(()),
    }
}

/// Whether `name` can name a metric or an exercise.
pub(crate) fn is_name(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    !name.is_empty() && name.chars().all(allowed)
}

/// Read each time: nothing here may depend on when this crate was loaded.
fn file() -> Option<OsString> {
    std::env::var_os(VARIABLE).filter(|path| !path.is_empty())
}

fn record_in(path: Option<&Path>, name: &str, value: f64) -> Result<f64> {
    let refuse = |problem: String| {
        Err(Error::Metric {
            name: name.to_string(),
            problem,
        })
    };
    if !is_name(name) {
        return refuse("name it with a-z, 0-9 and _ only, such as \"final_loss\"".to_string());
    }
    if !value.is_finite() {
        return refuse(format!(
            "the value is {value}; look for a division by zero or a learning rate too high"
        ));
    }
    if let Some(path) = path {
        append(
            path,
            &Metric {
                metric: name,
                value,
            },
        )?;
    }
    Ok(value)
}

/// One line, one write: lines of kernels that share a file do not mix.
fn append(path: &Path, line: &impl Serialize) -> Result<()> {
    let write = || -> std::io::Result<()> {
        let mut bytes = serde_json::to_vec(line)?;
        bytes.push(b'\n');
        OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)?
            .write_all(&bytes)
    };
    write().map_err(Error::file(path))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A path of this test's own in the system's temporary folder.
    pub(crate) fn scratch(name: &str) -> std::path::PathBuf {
        let path = std::env::temp_dir().join(format!("course-{}-{name}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        path
    }

    #[test]
    fn lines_of_json() {
        let path = scratch("metrics.jsonl");
        for (name, value) in [("loss", 0.1), ("rank_8", 3.0), ("loss", -1e-300)] {
            assert_eq!(record_in(Some(&path), name, value).unwrap(), value);
        }
        append(
            &path,
            &Exercise {
                exercise: "first",
                passed: false,
            },
        )
        .unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(
            text,
            "{\"metric\":\"loss\",\"value\":0.1}\n\
             {\"metric\":\"rank_8\",\"value\":3.0}\n\
             {\"metric\":\"loss\",\"value\":-1e-300}\n\
             {\"exercise\":\"first\",\"passed\":false}\n"
        );
    }

    #[test]
    fn refused_before_anything_is_written() {
        let path = scratch("refused.jsonl");
        for name in ["", "Loss", "final loss", "a-b", "é", "a\"b"] {
            let text = record_in(Some(&path), name, 1.0).unwrap_err().to_string();
            assert!(text.contains(name) && text.contains("a-z"), "{text}");
        }
        for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let text = record_in(Some(&path), "loss", value)
                .unwrap_err()
                .to_string();
            assert!(text.contains("\"loss\"") && text.contains(&value.to_string()));
        }
        assert!(!path.exists());
    }

    #[test]
    fn a_file_that_cannot_be_written_is_an_error() {
        let path = scratch("no-such-folder").join("metrics.jsonl");
        let text = record_in(Some(&path), "loss", 1.0).unwrap_err().to_string();
        assert!(text.contains("metrics.jsonl"), "{text}");
    }

    #[test]
    fn lines_of_several_writers_stay_whole() {
        let path = scratch("parallel.jsonl");
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for i in 0..100 {
                        record_in(Some(&path), "parallel", f64::from(i)).unwrap();
                    }
                });
            }
        });
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(text.lines().count(), 400);
        for line in text.lines() {
            let json: serde_json::Value = serde_json::from_str(line).unwrap();
            assert_eq!(json["metric"], "parallel");
        }
    }
}
