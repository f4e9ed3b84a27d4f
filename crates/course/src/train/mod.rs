//! The one training loop of all lessons.
//!
//! What a lesson teaches stays in its cell: the loss, the learning rate, the schedule. What every
//! loop needs besides is here: progress lines, the stop button, the norm of the gradient, held-out
//! losses, memory, and errors that name the step and the likely cause.
//!
//! batch → loss → backward → (accumulate) → clip → AdamW, and a line of a [`History`] that charts
//! take as it is.
//!
//! ```
//! use course::prelude::*;
//!
//! let (mut rng, device) = (rng(1), Device::Cpu);
//! let base = Linear::new(rng.randn((3, 4), &device)?, None);
//! let layer = LoraLinear::new("proj", base, &LoraConfig::new(2, 4.0), &mut rng)?;
//! let (x, y) = (rng.randn((16, 4), &device)?, rng.randn((16, 3), &device)?);
//! let batches = std::iter::repeat_with(|| Ok((x.clone(), y.clone())));
//!
//! let history = Training::new("LoRA r = 2", 60)
//!     .schedule(Schedule::Cosine { warmup_steps: 5 })
//!     .clip(1.0)
//!     .quiet()
//!     .run((layer.trainable_parameters(), 0.05), batches, |(x, y)| {
//!         Ok(candle_nn::loss::mse(&layer.forward(x)?, y)?)
//!     })?;
//!
//! assert!(history.last_loss()? < history.first_loss()?);
//! let figure = LineChart::new("Training", "step", "loss")
//!     .line(&history.name, history.losses())
//!     .draw()?;
//! assert!(figure.describe().contains("60 points"));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod diagnosis;
mod groups;
mod history;
mod memory;
mod plan;
mod points;
mod progress;
mod run;

use std::fmt;

use candle_core::Tensor;
use lora::optim::Schedule;

use crate::Result;

pub use groups::Groups;
pub use history::{History, StepRecord};

use plan::Plan;
use run::{Evaluation, World};

/// A training run before it starts: its name, its number of steps and how it goes.
/// [`run`](Self::run) starts it.
///
/// Nothing is checked before `run`, and nothing here is random: with seeded batches and weights,
/// two runs give the same numbers to the bit.
///
/// ```
/// use course::prelude::*;
///
/// let w = Var::new(&[3f32], &Device::Cpu)?;
/// let history = Training::new("descent", 2).quiet().run(
///     (vec![("w".to_string(), w.clone())], 0.5),
///     std::iter::repeat_with(|| Ok(())),
///     |()| Ok(w.sqr()?.sum_all()?),
/// )?;
/// assert_eq!(history.losses(), [(1.0, 9.0), (2.0, 6.25)]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use = "start the training with .run(groups, batches, loss)"]
pub struct Training<'a> {
    plan: Plan,
    evaluation: Option<Box<Evaluation<'a>>>,
}

impl<'a> Training<'a> {
    /// A run of `steps` steps of the optimiser; `name` stands in the progress lines, in errors
    /// and in the legends of charts.
    ///
    /// ```
    /// let training = course::train::Training::new("LoRA r = 8", 120);
    /// assert!(format!("{training:?}").contains("LoRA r = 8"));
    /// ```
    pub fn new(name: impl Into<String>, steps: usize) -> Self {
        let plan = Plan {
            name: name.into(),
            steps,
            schedule: Schedule::default(),
            clip: f64::INFINITY,
            accumulate: 1,
            evaluate_every: None,
            watched: Vec::new(),
            quiet: false,
        };
        Self {
            plan,
            evaluation: None,
        }
    }

    /// Multiplies the learning rates by the schedule's factor of each step; without, they are
    /// constant.
    ///
    /// ```
    /// # use course::prelude::*;
    /// # let w = Var::new(&[3f32], &Device::Cpu)?;
    /// # let groups = (vec![("w".to_string(), w.clone())], 0.5);
    /// # let batches = std::iter::repeat_with(|| Ok(()));
    /// let history = Training::new("descent", 2)
    ///     .schedule(Schedule::Linear { warmup_steps: 0 })
    ///     .quiet()
    ///     .run(groups, batches, |()| Ok(w.sqr()?.sum_all()?))?;
    /// assert_eq!(history.learning_rates(), [(1.0, 0.5), (2.0, 0.25)]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn schedule(mut self, schedule: Schedule) -> Self {
        self.plan.schedule = schedule;
        self
    }

    /// Scales the gradient of a step down to the norm `max_norm` where it is larger, over all
    /// parameters together. Without, the norm is recorded and nothing is scaled.
    ///
    /// ```
    /// # use course::prelude::*;
    /// # let w = Var::new(&[3f32], &Device::Cpu)?;
    /// # let groups = (vec![("w".to_string(), w.clone())], 0.5);
    /// # let batches = std::iter::repeat_with(|| Ok(()));
    /// let history = Training::new("descent", 1)
    ///     .clip(1.0)
    ///     .quiet()
    ///     .run(groups, batches, |()| Ok(w.sqr()?.sum_all()?))?;
    /// assert_eq!(history.grad_norms(), [(1.0, 6.0)]); // the norm before the scaling
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn clip(mut self, max_norm: f64) -> Self {
        self.plan.clip = max_norm;
        self
    }

    /// Takes `micro_batches` batches for each step and steps with the mean of their gradients.
    ///
    /// That equals one batch as large as all of them where the loss is a mean and they are equally
    /// large. The loss of the step is their mean too.
    ///
    /// ```
    /// # use course::prelude::*;
    /// # let w = Var::new(&[3f32], &Device::Cpu)?;
    /// # let groups = (vec![("w".to_string(), w.clone())], 0.5);
    /// let slopes = [2.0, 6.0].map(Ok);
    /// let history = Training::new("two in one", 1)
    ///     .accumulate(2)
    ///     .quiet()
    ///     .run(groups, slopes, |slope| Ok((w.as_tensor() * *slope)?.sum_all()?))?;
    /// assert_eq!(history.grad_norms(), [(1.0, 4.0)]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn accumulate(mut self, micro_batches: usize) -> Self {
        self.plan.accumulate = micro_batches;
        self
    }

    /// Measures something, such as the held-out loss, before the first step and after the last.
    ///
    /// ```
    /// # use course::prelude::*;
    /// # let w = Var::new(&[3f32], &Device::Cpu)?;
    /// # let groups = (vec![("w".to_string(), w.clone())], 0.5);
    /// # let batches = std::iter::repeat_with(|| Ok(()));
    /// let history = Training::new("descent", 2)
    ///     .evaluate(|| Ok(w.sqr()?.sum_all()?.to_scalar::<f32>()?))
    ///     .quiet()
    ///     .run(groups, batches, |()| Ok(w.sqr()?.sum_all()?))?;
    /// assert_eq!(history.evaluations[0], (0, 9.0));
    /// assert_eq!(history.evaluations[1].0, 2);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn evaluate<V: Into<f64>>(mut self, mut measure: impl FnMut() -> Result<V> + 'a) -> Self {
        self.evaluation = Some(Box::new(move || Ok(measure()?.into())));
        self.plan.evaluate_every = None;
        self
    }

    /// Like [`evaluate`](Self::evaluate), and also after every step that `every` divides.
    ///
    /// With `every` = 20 and 50 steps: after steps 0, 20, 40 and 50.
    ///
    /// ```
    /// # use course::prelude::*;
    /// # let w = Var::new(&[3f32], &Device::Cpu)?;
    /// # let groups = (vec![("w".to_string(), w.clone())], 0.01);
    /// # let batches = std::iter::repeat_with(|| Ok(()));
    /// let history = Training::new("descent", 50)
    ///     .evaluate_every(20, || Ok(w.sqr()?.sum_all()?.to_scalar::<f32>()?))
    ///     .quiet()
    ///     .run(groups, batches, |()| Ok(w.sqr()?.sum_all()?))?;
    /// let steps: Vec<usize> = history.evaluations.iter().map(|e| e.0).collect();
    /// assert_eq!(steps, [0, 20, 40, 50]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn evaluate_every<V: Into<f64>>(
        self,
        every: usize,
        measure: impl FnMut() -> Result<V> + 'a,
    ) -> Self {
        let mut training = self.evaluate(measure);
        training.plan.evaluate_every = Some(every);
        training
    }

    /// Records the joint norm of the gradients of all parameters whose name contains `part`, before
    /// clipping: `"lora_B"`, `"layers.3."`, a whole name. Call it once for each part;
    /// [`History::norms_of`] hands the norms out.
    ///
    /// ```
    /// # use course::prelude::*;
    /// # let w = Var::new(&[3f32], &Device::Cpu)?;
    /// # let groups = (vec![("proj.lora_B.weight".to_string(), w.clone())], 0.5);
    /// # let batches = std::iter::repeat_with(|| Ok(()));
    /// let history = Training::new("descent", 1)
    ///     .record_norms("lora_B")
    ///     .quiet()
    ///     .run(groups, batches, |()| Ok(w.sqr()?.sum_all()?))?;
    /// assert_eq!(history.norms_of("lora_B")?, [(1.0, 6.0)]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn record_norms(mut self, part: impl Into<String>) -> Self {
        self.plan.watched.push(part.into());
        self
    }

    /// Prints nothing (but that the stop button was heard).
    ///
    /// Progress lines depend on how fast the machine is. A cell whose output must be the same on
    /// every run is quiet and prints the [`History`], which says nothing of time; a cell with
    /// progress lines wears the tag `timing`.
    ///
    /// ```
    /// # use course::prelude::*;
    /// # let w = Var::new(&[3f32], &Device::Cpu)?;
    /// # let groups = (vec![("w".to_string(), w.clone())], 0.5);
    /// # let batches = std::iter::repeat_with(|| Ok(()));
    /// let history = Training::new("descent", 2)
    ///     .quiet()
    ///     .run(groups, batches, |()| Ok(w.sqr()?.sum_all()?))?;
    /// assert_eq!(history.to_string(), "descent: 2 steps, loss 9.0000 → 6.2500");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn quiet(mut self) -> Self {
        self.plan.quiet = true;
        self
    }

    /// Trains `groups` on `batches`; `loss` turns a batch into a single number to make smaller.
    ///
    /// `groups`: see [`Groups`]; parameters and a learning rate will do. The optimiser is
    /// [`lora::optim::LoraOptimizer`] (AdamW) with fresh moments. `batches`: a loader, endless or
    /// not, or any iterator of results; lend one with `&mut loader` to go on with it later.
    ///
    /// Prints a line after the first step, then at most one a second, and a last one:
    ///
    /// ```text
    /// LoRA r = 8: step 1 of 120, loss 3.1024
    /// LoRA r = 8: step 40 of 120, loss 2.3451, 12.3 steps/s, 6.5 s left
    /// LoRA r = 8: 120 steps in 9.8 s, loss 3.1024 → 2.3451, held-out 3.0518 → 2.4103
    /// ```
    ///
    /// The stop button ends it before the next micro-batch or evaluation. That is no error: the
    /// history has [`stopped`](History::stopped) set and holds what was reached. The weights are
    /// those of its last step, and a new run trains them on.
    ///
    /// # Errors
    ///
    /// On every error the parameters are those of the last step that went well.
    ///
    /// [`Error::Training`](crate::Error::Training): no step, a setting out of range, a part of a
    /// name that no parameter has, a finite `batches` that ran out, a loss that is not a single
    /// number, a loss, an evaluation or a parameter that is NaN or infinite (with the likely cause).
    /// [`Error::TrainingStep`](crate::Error::TrainingStep): what `batches`, `loss`, the evaluation,
    /// the backward pass and lora's optimiser report, such as a parameter without a gradient, with
    /// the step. [`Error::Lora`](crate::Error::Lora): what the optimiser refuses before it starts.
    pub fn run<B>(
        self,
        groups: impl Into<Groups>,
        batches: impl IntoIterator<Item = Result<B>>,
        loss: impl FnMut(&B) -> Result<Tensor>,
    ) -> Result<History> {
        self.run_in(&mut World::real(), groups.into(), batches, loss)
    }

    fn run_in<B>(
        mut self,
        world: &mut World<'_>,
        groups: Groups,
        batches: impl IntoIterator<Item = Result<B>>,
        mut loss: impl FnMut(&B) -> Result<Tensor>,
    ) -> Result<History> {
        // All that depends on the lesson's types; the rest is compiled once, in this crate.
        let mut batches = batches.into_iter();
        let mut next_loss = || match batches.next() {
            Some(batch) => loss(&batch?).map(Some),
            None => Ok(None),
        };
        let evaluation = self.evaluation.as_deref_mut();
        run::train(&self.plan, groups, &mut next_loss, evaluation, world)
    }
}

impl fmt::Debug for Training<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Training")
            .field("plan", &self.plan)
            .field("evaluates", &self.evaluation.is_some())
            .finish()
    }
}

#[cfg(test)]
mod tests;
