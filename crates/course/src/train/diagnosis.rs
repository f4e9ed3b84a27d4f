//! Why a loss is NaN or infinite, as far as the run can tell.

use candle_core::{DType, Var};

use super::StepRecord;
use super::progress::{number, steps};
use crate::Result;

/// Above this, AdamW's steps are suspicious by themselves: each moves a parameter by about the
/// learning rate.
const HIGH_RATE: f64 = 0.1;
/// How many times the usual norm or the first loss is an explosion.
const EXPLODED: f64 = 10.0;

/// What is known when `what` ("step 3 of 9: the loss") turns out not to be finite.
pub(super) struct Symptoms<'s> {
    pub(super) what: &'s str,
    pub(super) value: f64,
    /// The steps done before, all good.
    pub(super) done: &'s [StepRecord],
    /// Each group's name and learning rate.
    pub(super) rates: &'s [(&'s str, f64)],
    /// The first parameter that is not finite.
    pub(super) broken: Option<&'s str>,
}

impl Symptoms<'_> {
    /// What happened and what to do.
    pub(super) fn explain(&self) -> String {
        let Self { what, value, .. } = self;
        let facts = match self.done.last() {
            Some(last) => format!(
                "{}; the step before had loss {} and gradient norm {}",
                self.rates(),
                number(last.loss),
                number(last.grad_norm)
            ),
            None => self.rates(),
        };
        let kept = match self.done.len() {
            0 => "the parameters are as they were".to_string(),
            done => format!("the parameters are those after {}", steps(done)),
        };
        format!("{what} is {value} ({facts}). {} ({kept})", self.cause())
    }

    fn cause(&self) -> String {
        let arithmetic = if self.value.is_nan() {
            "NaN in the data, 0 / 0, or the logarithm or root of a negative number"
        } else {
            "infinity in the data, the logarithm of 0, a division by 0, or an exp that overflows"
        };
        let highest = self.rates.iter().map(|rate| rate.1).fold(0.0, f64::max);
        match (self.broken, self.done) {
            (Some(name), []) => format!(
                "Parameter {name} holds NaN or infinity before the first step: \
                 look at how it was made or loaded"
            ),
            (Some(name), _) => format!(
                "Parameter {name} holds NaN or infinity: the learning rate is too high; lower it \
                 and make the parameters anew"
            ),
            (None, []) => format!(
                "No step has been taken, so the learning rate is not to blame: look for {arithmetic}"
            ),
            (None, done) if exploded(done) => {
                "The run diverged before: lower the learning rate, warm it up with .schedule(…), \
                 or limit the gradient with .clip(1.0)"
                    .to_string()
            }
            (None, _) if highest > HIGH_RATE => format!(
                "A learning rate above {HIGH_RATE} is likely too high for AdamW, which moves every \
                 parameter by about that much in each step: lower it"
            ),
            (None, _) => format!(
                "The steps before look healthy, so the cause is likely this batch or how the loss is \
                 computed: look for {arithmetic}. If that is not it, lower the learning rate"
            ),
        }
    }

    fn rates(&self) -> String {
        match self.rates {
            [(_, rate)] => format!("learning rate {rate}"),
            rates => {
                let rates = rates.iter().map(|(name, rate)| format!("{name} {rate}"));
                format!("learning rates {}", rates.collect::<Vec<_>>().join(", "))
            }
        }
    }
}

/// Whether the last step stands out: its gradient from the usual one, or its loss from the first.
fn exploded(done: &[StepRecord]) -> bool {
    let (Some(first), Some(last)) = (done.first(), done.last()) else {
        return false;
    };
    let mut norms: Vec<f64> = done.iter().map(|record| record.grad_norm).collect();
    norms.sort_by(f64::total_cmp);
    let usual = norms[(norms.len() - 1) / 2];
    last.grad_norm > EXPLODED * usual || last.loss.abs() > EXPLODED * first.loss.abs()
}

/// The name of the first parameter that holds NaN or infinity.
pub(super) fn first_broken(parameters: &[(String, Var)]) -> Result<Option<&str>> {
    for (name, var) in parameters {
        // 0 · x is 0 where x is finite and NaN elsewhere.
        let zeros = (var.as_detached_tensor() * 0.0)?;
        let sum = zeros.sum_all()?.to_dtype(DType::F64)?;
        if sum.to_scalar::<f64>()? != 0.0 {
            return Ok(Some(name));
        }
    }
    Ok(None)
}
