//! What a run leaves behind.

use std::fmt;

use serde::Serialize;

use super::progress::{number, steps};

/// One step of the optimiser.
///
/// ```
/// use course::train::StepRecord;
///
/// let record = StepRecord { step: 1, loss: 2.5, lr: 1e-3, grad_norm: 0.7, seconds: 0.1 };
/// assert_eq!(record.clone(), record);
/// ```
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StepRecord {
    /// The step, counted from 1.
    pub step: usize,
    /// The loss before the step: the mean over its micro-batches.
    pub loss: f64,
    /// The learning rate of the first group, the schedule's factor included.
    pub lr: f64,
    /// The norm of the gradient over all parameters, before clipping.
    pub grad_norm: f64,
    /// How long the step took, batch and backward pass included.
    pub seconds: f64,
}

/// What a run did: every step, every evaluation, and what it cost.
///
/// The methods that give points give (step, value), as [`LineChart::line`](crate::chart::LineChart)
/// takes them. Printed, it is one line without a word about time:
/// `LoRA r = 8: 120 steps, loss 3.1024 → 2.3451, held-out 3.0518 → 2.4103`.
///
/// ```
/// use course::prelude::*;
///
/// let w = Var::new(&[3f32], &Device::Cpu)?;
/// let history = Training::new("descent", 3)
///     .evaluate(|| Ok(w.sqr()?.sum_all()?.to_scalar::<f32>()?))
///     .quiet()
///     .run(
///         (vec![("w".to_string(), w.clone())], 0.5),
///         std::iter::repeat_with(|| Ok(())),
///         |()| Ok(w.sqr()?.sum_all()?),
///     )?;
/// assert_eq!((history.steps.len(), history.stopped, history.trainable), (3, false, 1));
/// assert_eq!(history.smoothed(2)[1], (2.0, (9.0 + 6.25) / 2.0));
/// assert_eq!(history.lowest_evaluation()?, (3, history.last_evaluation()?));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Serialize)]
pub struct History {
    /// The run's name.
    pub name: String,
    /// Every step that was done, in order.
    pub steps: Vec<StepRecord>,
    /// What was measured, each with the number of steps done before.
    pub evaluations: Vec<(usize, f64)>,
    /// For each [`record_norms`](super::Training::record_norms) its text and a norm for each step.
    pub norms: Vec<(String, Vec<f64>)>,
    /// Whether the stop button ended the run early.
    pub stopped: bool,
    /// How many numbers were trained.
    pub trainable: usize,
    /// The memory of the optimiser's moments, in bytes.
    pub optimizer_bytes: usize,
    /// The most bytes that the whole process had in use, above those at the start: after a forward
    /// pass, after a backward pass with loss and gradients alive, or after a step, with the
    /// optimiser's moments. What candle needs within a pass is not seen. None where the allocator
    /// does not tell (it does on Linux with glibc 2.33 or later) or a parameter is not on the CPU.
    pub memory: Option<usize>,
    /// How long the whole run took, evaluations included.
    pub seconds: f64,
}

impl fmt::Display for History {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stopped = if self.stopped { ", then stopped" } else { "" };
        let steps = steps(self.steps.len());
        write!(f, "{}: {steps}{stopped}{}", self.name, Change(self))
    }
}

/// ", loss 3.1024 → 2.3451, held-out 3.0518 → 2.4103", as far as there is any.
pub(super) struct Change<'h>(pub(super) &'h History);

impl fmt::Display for Change<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let losses = self.0.steps.first().zip(self.0.steps.last());
        let losses = losses.map(|(first, last)| (first.loss, last.loss));
        let held_out = self.0.evaluations.first().zip(self.0.evaluations.last());
        let held_out = held_out.map(|(first, last)| (first.1, last.1));
        for (what, ends) in [("loss", losses), ("held-out", held_out)] {
            if let Some((first, last)) = ends {
                write!(f, ", {what} {} → {}", number(first), number(last))?;
            }
        }
        Ok(())
    }
}
