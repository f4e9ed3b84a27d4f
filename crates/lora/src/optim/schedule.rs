//! How the learning rate moves over a run.

use std::f64::consts::PI;

/// A learning rate schedule with a linear warm-up.
///
/// [`factor`](Self::factor) is the number that multiplies each group's base learning rate. With
/// w = `warmup_steps`, T the total number of steps and t = 0, 1, … the step about to be taken:
///
/// t < w: t / w, and from then on, with p = (t − w) / max(1, T − w),
///
/// - `Constant`: 1
/// - `Linear`: max(0, (T − t) / max(1, T − w)), which is 1 − p where w < T
/// - `Cosine`: ½ (1 + cos π p)
///
/// With a warm-up the very first step has factor 0, as in transformers: it fills AdamW's moments
/// and moves nothing.
///
/// Source: transformers `optimization.py`, `get_constant_schedule_with_warmup`,
/// `get_linear_schedule_with_warmup` and `get_cosine_schedule_with_warmup` (half a wave).
///
/// ```
/// use lora::optim::Schedule;
///
/// let schedule = Schedule::Linear { warmup_steps: 2 };
/// let factors: Vec<f64> = (0..=6).map(|step| schedule.factor(step, 6)).collect();
/// assert_eq!(factors, [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]);
/// assert_eq!(Schedule::default().factor(5, 6), 1.0);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Schedule {
    /// Up to the full rate, and staying there.
    Constant {
        /// Steps until the full rate; 0 for none.
        warmup_steps: usize,
    },
    /// Up to the full rate, then straight down to 0 at the last step.
    Linear {
        /// Steps until the full rate; 0 for none.
        warmup_steps: usize,
    },
    /// Up to the full rate, then down to 0 along half a cosine wave.
    Cosine {
        /// Steps until the full rate; 0 for none.
        warmup_steps: usize,
    },
}

impl Default for Schedule {
    /// A constant rate without a warm-up.
    fn default() -> Self {
        Schedule::Constant { warmup_steps: 0 }
    }
}

impl Schedule {
    /// The factor for step `step` (counted from 0) of `total_steps`; between 0 and 1.
    ///
    /// The formulas stand at [`Schedule`]. Past the end, `Linear` and `Cosine` stay at 0;
    /// transformers' cosine would climb again there. `Constant` does not look at `total_steps`.
    ///
    /// Source: transformers `optimization.py`.
    ///
    /// ```
    /// use lora::optim::Schedule;
    ///
    /// let schedule = Schedule::Cosine { warmup_steps: 0 };
    /// assert_eq!(schedule.factor(0, 10), 1.0);
    /// assert!((schedule.factor(5, 10) - 0.5).abs() < 1e-12);
    /// assert_eq!(schedule.factor(10, 10), 0.0);
    /// ```
    #[must_use]
    pub fn factor(self, step: usize, total_steps: usize) -> f64 {
        let (Schedule::Constant { warmup_steps }
        | Schedule::Linear { warmup_steps }
        | Schedule::Cosine { warmup_steps }) = self;
        if step < warmup_steps {
            return step as f64 / warmup_steps as f64;
        }
        let remaining = total_steps.saturating_sub(step) as f64;
        let decay_steps = total_steps.saturating_sub(warmup_steps).max(1) as f64;
        match self {
            Schedule::Constant { .. } => 1.0,
            Schedule::Linear { .. } => remaining / decay_steps,
            Schedule::Cosine { .. } => {
                let progress = (step - warmup_steps) as f64 / decay_steps;
                0.5 * (1.0 + (PI * progress.min(1.0)).cos())
            }
        }
    }
}
