//! What happens to gradients between the backward pass and the step.

use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};

use super::positive;
use crate::ops::{plus_scaled, scaled, square_norms};
use crate::{Error, Result};

/// Scales the gradients of `parameters` down so that their joint norm is at most `max_norm`.
///
/// norm = √(Σ over all parameters of ‖g‖²); where it is too large, every g becomes
/// g · max_norm / (norm + 1e-6). Returns the norm before the scaling. Pass `f64::INFINITY` to
/// measure without scaling.
///
/// Gradients of other tensors in `gradients` stay as they are. A parameter without a gradient
/// counts as zero here; [`LoraOptimizer::step`](super::LoraOptimizer::step) reports it.
///
/// # Shapes
///
/// Each gradient has its parameter's shape and keeps it.
///
/// # Errors
///
/// A `max_norm` that is NaN, zero or negative; a gradient of another shape or type than its
/// parameter; [`Error::GradientNotFinite`] with the parameter's name when a norm is NaN or
/// infinite. On an error nothing has been scaled.
///
/// Source: PyTorch `torch.nn.utils.clip_grad_norm_`, with `error_if_nonfinite=True`.
///
/// ```
/// use candle_core::{Device, Var};
/// use lora::optim::clip_grad_norm;
///
/// let a = Var::new(&[3f32, 4.], &Device::Cpu)?;
/// let mut gradients = (a.sqr()?.sum_all()? / 2.0)?.backward()?; // the gradient is [3, 4]
/// let parameters = [("base_model.model.proj.lora_A.weight".to_string(), a.clone())];
///
/// let norm = clip_grad_norm(&mut gradients, &parameters, 1.0)?;
/// assert_eq!(norm, 5.0);
/// let clipped = gradients.get(&a).map(|g| g.to_vec1::<f32>()).transpose()?;
/// assert_eq!(clipped, Some(vec![0.59999988, 0.79999984])); // [3, 4] / (5 + 1e-6)
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn clip_grad_norm(
    gradients: &mut GradStore,
    parameters: &[(String, Var)],
    max_norm: f64,
) -> Result<f64> {
    if max_norm.is_nan() || max_norm <= 0.0 {
        return Err(Error::OptimizerSetting {
            what: "clip_grad_norm: max_norm".to_string(),
            value: max_norm,
            must: "positive (f64::INFINITY measures the norm without clipping)",
        });
    }
    let mut present = Vec::with_capacity(parameters.len());
    for (name, var) in parameters {
        if let Some(gradient) = fitting_gradient(gradients, name, var)? {
            present.push((name.as_str(), var, gradient));
        }
    }
    let named = present.iter().map(|&(name, _, gradient)| (name, gradient));
    let norm = finite_square_norms(named)?.iter().sum::<f64>().sqrt();

    let factor = max_norm / (norm + 1e-6);
    if factor < 1.0 {
        let clipped = present
            .into_iter()
            .map(|(_, var, gradient)| Ok((var, scaled(gradient, factor)?)))
            .collect::<Result<Vec<_>>>()?;
        for (var, gradient) in clipped {
            gradients.insert(var, gradient);
        }
    }
    Ok(norm)
}

/// The mean gradient of several micro-batches, for a batch too large for one backward pass.
///
/// g = Σᵢ wᵢ gᵢ / Σᵢ wᵢ. With [`add`](Self::add) every wᵢ is 1; that equals one large batch when
/// the loss is a mean and the micro-batches are equally large. Where they are not, or where the
/// loss is a mean over a varying number of tokens, give that number to
/// [`add_weighted`](Self::add_weighted).
///
/// A parameter that a micro-batch did not reach counts as zero there, as in PyTorch. One that none
/// reached has no gradient in the result, and the step reports it.
///
/// # Shapes
///
/// Each gradient has its parameter's shape.
///
/// Source: transformers `trainer.py`, which divides by the number of tokens of all micro-batches
/// (`num_items_in_batch`).
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use lora::optim::GradientAccumulator;
///
/// let a = Var::new(&[1f32], &Device::Cpu)?;
/// let parameters = [("base_model.model.proj.lora_A.weight".to_string(), a.clone())];
/// let mut accumulator = GradientAccumulator::new(&parameters);
/// for slope in [2.0, 6.0] {
///     accumulator.add(&(a.as_tensor() * slope)?.sum_all()?.backward()?)?;
/// }
/// let gradients = accumulator.take_mean()?;
/// let mean = gradients.get(&a).map(|g| g.to_vec1::<f32>()).transpose()?;
/// assert_eq!(mean, Some(vec![4.0]));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct GradientAccumulator {
    parameters: Vec<(String, Var)>,
    /// Σ wᵢ gᵢ for each parameter; none where no micro-batch reached it.
    sums: Vec<Option<Tensor>>,
    weight: f64,
}

impl GradientAccumulator {
    /// An empty accumulator for these parameters.
    ///
    /// ```
    /// use lora::optim::GradientAccumulator;
    ///
    /// let mut accumulator = GradientAccumulator::new(&[]);
    /// assert!(accumulator.take_mean().is_err()); // nothing was added
    /// ```
    #[must_use]
    pub fn new(parameters: &[(String, Var)]) -> Self {
        Self {
            parameters: parameters.to_vec(),
            sums: vec![None; parameters.len()],
            weight: 0.0,
        }
    }

    /// Adds a micro-batch's gradients with weight 1.
    ///
    /// # Errors
    ///
    /// A gradient of another shape or type than its parameter. Nothing has been added then.
    ///
    /// ```
    /// use candle_core::{Device, Var};
    /// use lora::optim::GradientAccumulator;
    ///
    /// let a = Var::new(&[3f32], &Device::Cpu)?;
    /// let mut accumulator = GradientAccumulator::new(&[("a".to_string(), a.clone())]);
    /// accumulator.add(&a.sqr()?.sum_all()?.backward()?)?;
    /// let gradients = accumulator.take_mean()?;
    /// let mean = gradients.get(&a).map(|g| g.to_vec1::<f32>()).transpose()?;
    /// assert_eq!(mean, Some(vec![6.0]));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn add(&mut self, gradients: &GradStore) -> Result<()> {
        self.add_weighted(gradients, 1.0)
    }

    /// Adds a micro-batch's gradients with a weight: the number of samples or tokens over which
    /// its loss is a mean.
    ///
    /// # Errors
    ///
    /// A weight that is not finite and positive; a gradient of another shape or type than its
    /// parameter. Nothing has been added then.
    ///
    /// ```
    /// use candle_core::{Device, Tensor, Var};
    /// use lora::optim::GradientAccumulator;
    ///
    /// let a = Var::new(&[1f32], &Device::Cpu)?;
    /// let mut accumulator = GradientAccumulator::new(&[("a".to_string(), a.clone())]);
    /// for (slope, tokens) in [(2.0, 1.0), (6.0, 3.0)] {
    ///     accumulator.add_weighted(&(a.as_tensor() * slope)?.sum_all()?.backward()?, tokens)?;
    /// }
    /// let gradients = accumulator.take_mean()?;
    /// let mean = gradients.get(&a).map(|g| g.to_vec1::<f32>()).transpose()?;
    /// assert_eq!(mean, Some(vec![5.0])); // (1 · 2 + 3 · 6) / 4
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn add_weighted(&mut self, gradients: &GradStore, weight: f64) -> Result<()> {
        let weight = positive("GradientAccumulator: weight", weight)?;
        let mut sums = Vec::with_capacity(self.sums.len());
        for ((name, var), sum) in self.parameters.iter().zip(&self.sums) {
            let gradient = fitting_gradient(gradients, name, var)?;
            sums.push(match (sum, gradient) {
                (sum, None) => sum.clone(),
                // A new tensor without a graph: it keeps neither activations nor storage alive.
                (None, Some(gradient)) => Some(scaled(&gradient.detach(), weight)?),
                (Some(sum), Some(g)) => Some(plus_scaled(sum, &g.detach(), weight)?),
            });
        }
        self.sums = sums;
        self.weight += weight;
        Ok(())
    }

    /// Hands out the mean of what was added, and starts afresh.
    ///
    /// # Errors
    ///
    /// [`Error::NothingAccumulated`] when nothing was added since the last time.
    ///
    /// ```
    /// use candle_core::{Device, Var};
    /// use lora::optim::{GradientAccumulator, LoraOptimizer, ParameterGroup};
    ///
    /// let a = Var::new(&[3f32], &Device::Cpu)?;
    /// let group = ParameterGroup::all(vec![("a".to_string(), a.clone())], 0.5);
    /// let mut optimizer = LoraOptimizer::new(vec![group])?;
    /// let mut accumulator = GradientAccumulator::new(optimizer.parameters());
    /// accumulator.add(&a.sqr()?.sum_all()?.backward()?)?;
    ///
    /// optimizer.step(&accumulator.take_mean()?)?;
    /// assert_eq!(a.to_vec1::<f32>()?, [2.5]);
    /// assert!(accumulator.take_mean().is_err());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn take_mean(&mut self) -> Result<GradStore> {
        if self.weight == 0.0 {
            return Err(Error::NothingAccumulated);
        }
        let mut mean = GradStore::default();
        for ((_, var), sum) in self.parameters.iter().zip(&self.sums) {
            if let Some(sum) = sum {
                mean.insert(var, scaled(sum, 1.0 / self.weight)?);
            }
        }
        self.sums.fill(None);
        self.weight = 0.0;
        Ok(mean)
    }
}

/// The gradient of `var`, where there is one, checked to fit it.
pub(super) fn fitting_gradient<'a>(
    gradients: &'a GradStore,
    name: &str,
    var: &Var,
) -> Result<Option<&'a Tensor>> {
    let Some(gradient) = gradients.get(var) else {
        return Ok(None);
    };
    if gradient.dims() != var.dims() || gradient.dtype() != var.dtype() {
        return Err(Error::GradientShape {
            name: name.to_string(),
            gradient: gradient.dims().to_vec(),
            gradient_type: gradient.dtype(),
            parameter: var.dims().to_vec(),
            parameter_type: var.dtype(),
        });
    }
    Ok(Some(gradient))
}

/// ‖g‖² of every gradient, refused by name where it is NaN or infinite.
///
/// The squares are of the gradients' own types: one that overflows there would also overflow
/// AdamW's second moment, and that element would never move again.
pub(super) fn finite_square_norms<'a>(
    gradients: impl IntoIterator<Item = (&'a str, &'a Tensor)>,
) -> Result<Vec<f64>> {
    let (names, gradients): (Vec<_>, Vec<_>) = gradients.into_iter().unzip();
    let norms = square_norms(&gradients)?;
    match names.iter().zip(&norms).find(|(_, norm)| !norm.is_finite()) {
        Some((name, norm)) => Err(Error::GradientNotFinite {
            name: (*name).to_string(),
            norm: norm.sqrt(),
        }),
        None => Ok(norms),
    }
}
