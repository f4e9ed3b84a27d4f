//! A run's settings, and what depends on them alone.

use candle_core::{DType, Tensor};
use lora::optim::Schedule;

use crate::{Error, Result};

/// The settings of a [`Training`](super::Training).
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) name: String,
    pub(super) steps: usize,
    pub(super) schedule: Schedule,
    /// The largest norm of the gradient; infinite for none.
    pub(super) clip: f64,
    pub(super) accumulate: usize,
    /// Every how many steps to evaluate between the start and the end.
    pub(super) evaluate_every: Option<usize>,
    /// Parts of parameter names whose joint gradient norms are recorded.
    pub(super) watched: Vec<String>,
    pub(super) quiet: bool,
}

impl Plan {
    pub(super) fn check(&self) -> Result<()> {
        if self.steps == 0 {
            return Err(self.error("0 steps train nothing; give Training::new 1 or more"));
        }
        if self.accumulate == 0 {
            return Err(self.error("accumulate(0): a step needs 1 micro-batch or more"));
        }
        if self.evaluate_every == Some(0) {
            return Err(
                self.error("evaluate_every(0, …): give the number of steps between, 1 or more")
            );
        }
        if self.clip.is_nan() || self.clip <= 0.0 {
            let clip = self.clip;
            return Err(self.error(format!("clip({clip}): the largest norm must be above 0")));
        }
        Ok(())
    }

    pub(super) fn error(&self, problem: impl Into<String>) -> Error {
        Error::Training {
            name: self.name.clone(),
            problem: problem.into(),
        }
    }

    /// `error` with the step at which it came up.
    pub(super) fn at(&self, step: usize, error: impl Into<Error>) -> Error {
        Error::TrainingStep {
            name: self.name.clone(),
            step,
            steps: self.steps,
            source: Box::new(error.into()),
        }
    }

    /// Whether to evaluate when `done` steps are done.
    pub(super) fn evaluates_after(&self, done: usize) -> bool {
        let between = self
            .evaluate_every
            .is_some_and(|every| done.is_multiple_of(every));
        done == 0 || done == self.steps || between
    }

    /// The number in `loss`.
    pub(super) fn scalar(&self, step: usize, loss: &Tensor) -> Result<f64> {
        if loss.elem_count() != 1 {
            return Err(self.error(format!(
                "step {step} of {}: the loss is {:?}, not a single number; take loss.mean_all()?",
                self.steps,
                loss.dims()
            )));
        }
        let number = || {
            loss.flatten_all()?
                .get(0)?
                .to_dtype(DType::F64)?
                .to_scalar::<f64>()
        };
        number().map_err(|error| self.at(step, error))
    }
}
