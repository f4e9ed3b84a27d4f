//! A step of the inner loop.

use candle_core::Tensor;

use super::Parameters;
use super::network::refused;
use crate::Result;

/// The step sizes of the inner loop.
#[derive(Clone, Debug)]
pub enum InnerRates {
    /// One number for all.
    Same(f64),
    /// One for each adapted tensor, by its name: a number, or as many as the tensor has. Where they
    /// are variables, the outer loop's backward pass gives their gradients.
    Each(Parameters),
}

/// A step of gradient descent as an ordinary computation: w ← w − α · g.
///
/// Nothing is changed in place; the result hangs together with what it was made of, so that a later
/// `backward` reaches the start, through w and through g. Parameters without a gradient stay as they
/// are.
///
/// # Shapes
///
/// w alike for all tasks or one per task, g [tasks, …] → [tasks, …].
///
/// # Errors
///
/// A gradient of a parameter that is not there, or whose step size is not there.
///
/// ```
/// use course::meta::{InnerRates, Parameters, inner_step};
/// use course::prelude::*;
///
/// let w = Var::new(&[1f64, 2.0], &Device::Cpu)?;
/// let start = Parameters::from([("w".to_string(), w.as_tensor().clone())]);
/// // The gradient of Σ w⁴ / 4, written out: w³.
/// let gradients = Parameters::from([("w".to_string(), (w.sqr()? * w.as_tensor())?)]);
/// let stepped = inner_step(&start, &gradients, &InnerRates::Same(0.1))?;
/// assert_eq!(stepped["w"].to_vec1::<f64>()?, [0.9, 1.2]);
/// // d (w − 0.1 w³) / dw = 1 − 0.3 w²: the second derivative is in it.
/// let outer = stepped["w"].sum_all()?.backward()?;
/// let gap = (outer.get(&w).unwrap() - Tensor::new(&[0.7, -0.2], &Device::Cpu)?)?;
/// assert!(gap.abs()?.max_all()?.to_scalar::<f64>()? < 1e-12);
/// # Ok::<(), course::Error>(())
/// ```
pub fn inner_step(
    parameters: &Parameters,
    gradients: &Parameters,
    rates: &InnerRates,
) -> Result<Parameters> {
    let mut stepped = parameters.clone();
    for (name, gradient) in gradients {
        let missing = |what| refused(format!("{name} has a gradient and no {what}"));
        let step = match rates {
            InnerRates::Same(rate) => (gradient * *rate)?,
            InnerRates::Each(rates) => {
                let rate = rates.get(name).ok_or_else(|| missing("step size"))?;
                gradient.broadcast_mul(rate)?
            }
        };
        let w = stepped.get_mut(name).ok_or_else(|| missing("value"))?;
        *w = (per_task(w, &step)? - step)?;
    }
    Ok(stepped)
}

/// w, repeated for every task where all tasks share it so far.
///
/// As a product with ones: its backward pass is a product too, and a fast one. That of a broadcast
/// adds up number by number.
fn per_task(w: &Tensor, step: &Tensor) -> Result<Tensor> {
    if w.shape() == step.shape() {
        return Ok(w.clone());
    }
    let ones = Tensor::ones((step.dim(0)?, 1), w.dtype(), w.device())?;
    let row = w.reshape((1, w.elem_count()))?;
    Ok(ones.matmul(&row)?.reshape(step.shape())?)
}
