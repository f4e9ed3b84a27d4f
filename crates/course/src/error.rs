//! The one error type of this crate.

use std::fmt::Display;
use std::io;
use std::path::Path;

use thiserror::Error;

/// Everything that can go wrong in the course's own rooms. The message says what to do.
///
/// ```
/// let error = course::metrics::record("loss", f64::NAN).unwrap_err();
/// assert!(matches!(error, course::Error::Metric { .. }));
/// ```
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// A figure cannot be drawn from what it was given.
    #[error("chart \"{chart}\": {problem}")]
    Chart {
        /// The chart's title.
        chart: String,
        /// What is wrong, which series it concerns, and what to do.
        problem: String,
    },
    /// Data that cannot be had as they were asked for.
    #[error("data \"{name}\": {problem}")]
    Data {
        /// Which data.
        name: String,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// The device that was asked for is not there.
    #[error("device: {problem}")]
    Device {
        /// What is missing, and what to do.
        problem: String,
    },
    /// Random numbers that do not exist were asked for.
    #[error("rng: {problem}")]
    Random {
        /// Which numbers, and what to do.
        problem: String,
    },
    /// A result that cannot be recorded.
    #[error("metric \"{name}\": {problem}")]
    Metric {
        /// The metric's name.
        name: String,
        /// What is wrong with it, and what to do.
        problem: String,
    },
    /// Runs that have no mean and no range.
    #[error("spread: {problem}")]
    Spread {
        /// Which run, what is wrong with it, and what to do.
        problem: String,
    },
    /// A tensor that cannot be taken apart.
    #[error("linalg: a tensor of shape {shape:?} cannot be decomposed: {problem}")]
    Linalg {
        /// The tensor's shape.
        shape: Vec<usize>,
        /// What is wrong with it.
        problem: String,
    },
    /// A model's sizes do not fit each other, or its input does not fit them.
    #[error("{model}: {problem}")]
    Model {
        /// The model's name.
        model: &'static str,
        /// Which sizes, and what they must be.
        problem: String,
    },
    /// An environment refused an action, a seed or an option.
    #[error("environment: {problem}")]
    Environment {
        /// Which environment, what it refused, and what to do.
        problem: String,
    },
    /// A training run cannot start or go on.
    #[error("training \"{name}\": {problem}")]
    Training {
        /// The run's name.
        name: String,
        /// What is wrong, since which step, and what to do.
        problem: String,
    },
    /// Something that a training run calls failed at one of its steps.
    #[error("training \"{name}\", step {step} of {steps}: {source}")]
    TrainingStep {
        /// The run's name.
        name: String,
        /// The step, counted from 1; for an evaluation, the number of steps done before.
        step: usize,
        /// How many steps there were to be.
        steps: usize,
        /// What failed.
        source: Box<Error>,
    },
    /// Text that cannot be cut into tokens, or a file that says not how.
    #[error("tokenizer: {problem}")]
    Tokenizer {
        /// What is wrong.
        problem: String,
    },
    /// A tensor operation failed in candle.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// A LoRA layer refused what it was given.
    #[error(transparent)]
    Lora(#[from] lora::Error),
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    File {
        /// The file's path.
        path: String,
        /// What the operating system said.
        source: io::Error,
    },
}

impl Error {
    /// What the operating system said of a file: `std::fs::read(path).map_err(Error::file(path))`.
    pub(crate) fn file(path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.display().to_string();
        |source| Self::File { path, source }
    }

    /// A file that is not what it should be, and what to do about it.
    pub(crate) fn damaged(path: impl Display, problem: &str, remedy: &str) -> Self {
        let hint = format!("{problem}: {remedy}");
        Self::File {
            path: path.to_string(),
            source: io::Error::new(io::ErrorKind::InvalidData, hint),
        }
    }
}

/// `Result` with this crate's [`enum@Error`].
///
/// ```
/// fn double(name: &str, value: f64) -> course::Result<f64> {
///     Ok(2.0 * course::metrics::record(name, value)?)
/// }
/// assert_eq!(double("loss", 0.5).unwrap(), 1.0);
/// ```
pub type Result<T, E = Error> = std::result::Result<T, E>;
