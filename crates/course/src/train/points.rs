//! What charts and lessons read from a history.

use super::{History, StepRecord};
use crate::{Error, Result};

impl History {
    /// The loss of every step.
    ///
    /// ```
    /// # use course::prelude::*;
    /// # let w = Var::new(&[3f32], &Device::Cpu)?;
    /// # let history = Training::new("descent", 2)
    /// #     .evaluate_every(1, || Ok(w.sum_all()?.to_scalar::<f32>()?))
    /// #     .record_norms("w")
    /// #     .quiet()
    /// #     .run((vec![("w".to_string(), w.clone())], 0.5), vec![Ok(()), Ok(())], |()| {
    /// #         Ok(w.sqr()?.sum_all()?)
    /// #     })?;
    /// assert_eq!(history.losses(), [(1.0, 9.0), (2.0, 6.25)]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn losses(&self) -> Vec<(f64, f64)> {
        self.points(|record| record.loss)
    }

    /// The mean loss of each step and up to `window` − 1 steps before it: fewer at the start, so
    /// that there are as many points as steps. A window of 0 counts as 1.
    ///
    /// ```
    /// # use course::prelude::*;
    /// # let w = Var::new(&[3f32], &Device::Cpu)?;
    /// # let history = Training::new("descent", 2)
    /// #     .evaluate_every(1, || Ok(w.sum_all()?.to_scalar::<f32>()?))
    /// #     .record_norms("w")
    /// #     .quiet()
    /// #     .run((vec![("w".to_string(), w.clone())], 0.5), vec![Ok(()), Ok(())], |()| {
    /// #         Ok(w.sqr()?.sum_all()?)
    /// #     })?;
    /// assert_eq!(history.smoothed(2), [(1.0, 9.0), (2.0, 7.625)]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn smoothed(&self, window: usize) -> Vec<(f64, f64)> {
        let window = window.max(1);
        let mean = |records: &[StepRecord]| {
            records.iter().map(|record| record.loss).sum::<f64>() / records.len() as f64
        };
        (1..=self.steps.len())
            .map(|end| {
                (
                    self.steps[end - 1].step as f64,
                    mean(&self.steps[end.saturating_sub(window)..end]),
                )
            })
            .collect()
    }

    /// What was measured, by the number of steps done before.
    ///
    /// ```
    /// # use course::prelude::*;
    /// # let w = Var::new(&[3f32], &Device::Cpu)?;
    /// # let history = Training::new("descent", 2)
    /// #     .evaluate_every(1, || Ok(w.sum_all()?.to_scalar::<f32>()?))
    /// #     .record_norms("w")
    /// #     .quiet()
    /// #     .run((vec![("w".to_string(), w.clone())], 0.5), vec![Ok(()), Ok(())], |()| {
    /// #         Ok(w.sqr()?.sum_all()?)
    /// #     })?;
    /// assert_eq!(history.evaluations(), [(0.0, 3.0), (1.0, 2.5), (2.0, w.to_vec1::<f32>()?[0].into())]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn evaluations(&self) -> Vec<(f64, f64)> {
        let point = |&(step, value): &(usize, f64)| (step as f64, value);
        self.evaluations.iter().map(point).collect()
    }

    /// The norm of the gradient at every step, before clipping.
    ///
    /// ```
    /// # use course::prelude::*;
    /// # let w = Var::new(&[3f32], &Device::Cpu)?;
    /// # let history = Training::new("descent", 2)
    /// #     .evaluate_every(1, || Ok(w.sum_all()?.to_scalar::<f32>()?))
    /// #     .record_norms("w")
    /// #     .quiet()
    /// #     .run((vec![("w".to_string(), w.clone())], 0.5), vec![Ok(()), Ok(())], |()| {
    /// #         Ok(w.sqr()?.sum_all()?)
    /// #     })?;
    /// assert_eq!(history.grad_norms(), [(1.0, 6.0), (2.0, 5.0)]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn grad_norms(&self) -> Vec<(f64, f64)> {
        self.points(|record| record.grad_norm)
    }

    /// The learning rate of the first group at every step.
    ///
    /// ```
    /// # use course::prelude::*;
    /// # let w = Var::new(&[3f32], &Device::Cpu)?;
    /// # let history = Training::new("descent", 2)
    /// #     .evaluate_every(1, || Ok(w.sum_all()?.to_scalar::<f32>()?))
    /// #     .record_norms("w")
    /// #     .quiet()
    /// #     .run((vec![("w".to_string(), w.clone())], 0.5), vec![Ok(()), Ok(())], |()| {
    /// #         Ok(w.sqr()?.sum_all()?)
    /// #     })?;
    /// assert_eq!(history.learning_rates(), [(1.0, 0.5), (2.0, 0.5)]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn learning_rates(&self) -> Vec<(f64, f64)> {
        self.points(|record| record.lr)
    }

    /// The norms that [`record_norms`](super::Training::record_norms) recorded for `part`.
    ///
    /// # Errors
    ///
    /// [`Error::Training`] when nothing was recorded under this text.
    ///
    /// ```
    /// # use course::prelude::*;
    /// # let w = Var::new(&[3f32], &Device::Cpu)?;
    /// # let history = Training::new("descent", 2)
    /// #     .evaluate_every(1, || Ok(w.sum_all()?.to_scalar::<f32>()?))
    /// #     .record_norms("w")
    /// #     .quiet()
    /// #     .run((vec![("w".to_string(), w.clone())], 0.5), vec![Ok(()), Ok(())], |()| {
    /// #         Ok(w.sqr()?.sum_all()?)
    /// #     })?;
    /// assert_eq!(history.norms_of("w")?, [(1.0, 6.0), (2.0, 5.0)]);
    /// assert!(history.norms_of("lora_B").is_err());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn norms_of(&self, part: &str) -> Result<Vec<(f64, f64)>> {
        let (_, norms) = self
            .norms
            .iter()
            .find(|(name, _)| name == part)
            .ok_or_else(|| {
                self.lacks(format!(
                    "norms of {part:?}; train with .record_norms({part:?})"
                ))
            })?;
        let step = |record: &StepRecord| record.step as f64;
        Ok(self
            .steps
            .iter()
            .map(step)
            .zip(norms.iter().copied())
            .collect())
    }

    /// The loss of the first step: that of the untrained model.
    ///
    /// # Errors
    ///
    /// [`Error::Training`] when the run was stopped before its first step.
    ///
    /// ```
    /// # use course::prelude::*;
    /// # let w = Var::new(&[3f32], &Device::Cpu)?;
    /// # let history = Training::new("descent", 2)
    /// #     .evaluate_every(1, || Ok(w.sum_all()?.to_scalar::<f32>()?))
    /// #     .record_norms("w")
    /// #     .quiet()
    /// #     .run((vec![("w".to_string(), w.clone())], 0.5), vec![Ok(()), Ok(())], |()| {
    /// #         Ok(w.sqr()?.sum_all()?)
    /// #     })?;
    /// assert_eq!(history.first_loss()?, 9.0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn first_loss(&self) -> Result<f64> {
        let first = self.steps.first().ok_or_else(|| self.no_steps())?;
        Ok(first.loss)
    }

    /// The loss of the last step.
    ///
    /// # Errors
    ///
    /// [`Error::Training`] when the run was stopped before its first step.
    ///
    /// ```
    /// # use course::prelude::*;
    /// # let w = Var::new(&[3f32], &Device::Cpu)?;
    /// # let history = Training::new("descent", 2)
    /// #     .evaluate_every(1, || Ok(w.sum_all()?.to_scalar::<f32>()?))
    /// #     .record_norms("w")
    /// #     .quiet()
    /// #     .run((vec![("w".to_string(), w.clone())], 0.5), vec![Ok(()), Ok(())], |()| {
    /// #         Ok(w.sqr()?.sum_all()?)
    /// #     })?;
    /// assert_eq!(history.last_loss()?, 6.25);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn last_loss(&self) -> Result<f64> {
        let last = self.steps.last().ok_or_else(|| self.no_steps())?;
        Ok(last.loss)
    }

    /// What was measured before the first step.
    ///
    /// # Errors
    ///
    /// [`Error::Training`] when nothing was measured.
    ///
    /// ```
    /// # use course::prelude::*;
    /// # let w = Var::new(&[3f32], &Device::Cpu)?;
    /// # let history = Training::new("descent", 2)
    /// #     .evaluate_every(1, || Ok(w.sum_all()?.to_scalar::<f32>()?))
    /// #     .record_norms("w")
    /// #     .quiet()
    /// #     .run((vec![("w".to_string(), w.clone())], 0.5), vec![Ok(()), Ok(())], |()| {
    /// #         Ok(w.sqr()?.sum_all()?)
    /// #     })?;
    /// assert_eq!(history.first_evaluation()?, 3.0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn first_evaluation(&self) -> Result<f64> {
        self.evaluation(self.evaluations.first())
    }

    /// What was measured last: after the last step, unless the run was stopped.
    ///
    /// # Errors
    ///
    /// [`Error::Training`] when nothing was measured.
    ///
    /// ```
    /// # use course::prelude::*;
    /// # let w = Var::new(&[3f32], &Device::Cpu)?;
    /// # let history = Training::new("descent", 2)
    /// #     .evaluate_every(1, || Ok(w.sum_all()?.to_scalar::<f32>()?))
    /// #     .record_norms("w")
    /// #     .quiet()
    /// #     .run((vec![("w".to_string(), w.clone())], 0.5), vec![Ok(()), Ok(())], |()| {
    /// #         Ok(w.sqr()?.sum_all()?)
    /// #     })?;
    /// assert!(history.last_evaluation()? < 2.5);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn last_evaluation(&self) -> Result<f64> {
        self.evaluation(self.evaluations.last())
    }

    /// The lowest value that was measured, such as the best held-out loss, and after how many steps
    /// it was first reached.
    ///
    /// # Errors
    ///
    /// [`Error::Training`] when nothing was measured.
    ///
    /// ```
    /// # use course::prelude::*;
    /// # let w = Var::new(&[3f32], &Device::Cpu)?;
    /// # let history = Training::new("descent", 2)
    /// #     .evaluate_every(1, || Ok(w.sum_all()?.to_scalar::<f32>()?))
    /// #     .record_norms("w")
    /// #     .quiet()
    /// #     .run((vec![("w".to_string(), w.clone())], 0.5), vec![Ok(()), Ok(())], |()| {
    /// #         Ok(w.sqr()?.sum_all()?)
    /// #     })?;
    /// assert_eq!(history.lowest_evaluation()?.0, 2);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn lowest_evaluation(&self) -> Result<(usize, f64)> {
        let lowest = self.evaluations.iter().min_by(|a, b| a.1.total_cmp(&b.1));
        lowest.copied().ok_or_else(|| self.no_evaluations())
    }

    /// The highest value that was measured, such as the best accuracy, and after how many steps it
    /// was first reached.
    ///
    /// # Errors
    ///
    /// [`Error::Training`] when nothing was measured.
    ///
    /// ```
    /// # use course::prelude::*;
    /// # let w = Var::new(&[3f32], &Device::Cpu)?;
    /// # let history = Training::new("descent", 2)
    /// #     .evaluate_every(1, || Ok(w.sum_all()?.to_scalar::<f32>()?))
    /// #     .record_norms("w")
    /// #     .quiet()
    /// #     .run((vec![("w".to_string(), w.clone())], 0.5), vec![Ok(()), Ok(())], |()| {
    /// #         Ok(w.sqr()?.sum_all()?)
    /// #     })?;
    /// assert_eq!(history.highest_evaluation()?, (0, 3.0));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn highest_evaluation(&self) -> Result<(usize, f64)> {
        // Of equals, min_by takes the first and max_by the last.
        let highest = self.evaluations.iter().min_by(|a, b| b.1.total_cmp(&a.1));
        highest.copied().ok_or_else(|| self.no_evaluations())
    }

    /// The median time of a step in seconds, without the first, in which much happens for the
    /// first time.
    ///
    /// # Errors
    ///
    /// [`Error::Training`] when there are fewer than two steps.
    ///
    /// ```
    /// # use course::prelude::*;
    /// # let w = Var::new(&[3f32], &Device::Cpu)?;
    /// # let history = Training::new("descent", 2)
    /// #     .evaluate_every(1, || Ok(w.sum_all()?.to_scalar::<f32>()?))
    /// #     .record_norms("w")
    /// #     .quiet()
    /// #     .run((vec![("w".to_string(), w.clone())], 0.5), vec![Ok(()), Ok(())], |()| {
    /// #         Ok(w.sqr()?.sum_all()?)
    /// #     })?;
    /// assert!(history.seconds_per_step()? > 0.0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn seconds_per_step(&self) -> Result<f64> {
        let mut seconds: Vec<f64> = self
            .steps
            .iter()
            .skip(1)
            .map(|record| record.seconds)
            .collect();
        seconds.sort_by(f64::total_cmp);
        let middle = seconds.len() / 2;
        match seconds.len() {
            0 => Err(self.lacks("second step to time; train for 2 steps or more".to_string())),
            n if n % 2 == 1 => Ok(seconds[middle]),
            _ => Ok((seconds[middle - 1] + seconds[middle]) / 2.0),
        }
    }

    fn points(&self, value: impl Fn(&StepRecord) -> f64) -> Vec<(f64, f64)> {
        let point = |record: &StepRecord| (record.step as f64, value(record));
        self.steps.iter().map(point).collect()
    }

    fn evaluation(&self, which: Option<&(usize, f64)>) -> Result<f64> {
        which
            .map(|&(_, value)| value)
            .ok_or_else(|| self.no_evaluations())
    }

    fn no_evaluations(&self) -> Error {
        self.lacks("evaluation; train with .evaluate(…) or .evaluate_every(…)".to_string())
    }

    fn no_steps(&self) -> Error {
        self.lacks("step, for it was stopped before; run the cell again".to_string())
    }

    fn lacks(&self, what: String) -> Error {
        Error::Training {
            name: self.name.clone(),
            problem: format!("the history has no {what}"),
        }
    }
}
