//! The output layer and the loss of a language model, without the logits between them.

use std::sync::OnceLock;

use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor, WithDType, bail};
use rayon::iter::{IndexedParallelIterator, ParallelIterator};
use rayon::slice::ParallelSliceMut;

use super::cpu::{
    Matrix, Real, for_real, largest, one_pass, product, rows_each, slice, stored, sums, tensor,
    vectorised, written,
};
use super::cross_entropy::{counted_targets, cross_entropy};
use super::linear::{check_base, frozen_linear, with_matrix};
use crate::Result;

/// The mean cross entropy of x Wᵀ against `targets`, for a frozen W: what a language model's
/// output layer and its loss give together.
///
/// [`cross_entropy`] of [`frozen_linear`] would hold the logits, their gradient, and what candle
/// adds it to: for 256 tokens and a vocabulary of 49,152 that is 50 MB each. This takes some rows
/// at a time, and where x needs a gradient computes it on the way, (softmax − one-hot) W / n.
///
/// # Shapes
///
/// x (…, in), `weight` W (classes, in), `targets` (…) of u32 or i64; → a number.
///
/// # Errors
///
/// [`Error::Operation`](crate::Error::Operation) when the tensors do not fit each other, or a
/// target is no class.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use lora::ops::{cross_entropy, frozen_linear, linear_cross_entropy};
///
/// let x = Var::new(&[[1f32, 2.], [3., 4.]], &Device::Cpu)?;
/// let w = Tensor::new(&[[0.1f32, 0.2], [0.3, -0.4], [0.5, 0.6]], &Device::Cpu)?;
/// let targets = Tensor::new(&[2u32, 0], &Device::Cpu)?;
/// let once = linear_cross_entropy(&x, &w, &targets)?;
/// let twice = cross_entropy(&frozen_linear(&x, &w, None)?, &targets)?;
/// assert!((once.to_scalar::<f32>()? - twice.to_scalar::<f32>()?).abs() < 1e-6);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn linear_cross_entropy(x: &Tensor, weight: &Tensor, targets: &Tensor) -> Result<Tensor> {
    const NAME: &str = "linear_cross_entropy";
    check_base(NAME, x, weight, None)?;
    if weight.track_op() || !one_pass(&[x, weight]) {
        return cross_entropy(&frozen_linear(x, weight, None)?, targets);
    }
    let classes = weight.dims()[0];
    let leading = &x.dims()[..x.rank() - 1];
    let all = [("x", x), ("W", weight), ("targets", targets)];
    let targets = counted_targets(NAME, &all, targets, leading, classes)?;
    Ok(
        for_real!(x, T => x.contiguous()?.apply_op1(LinearCrossEntropy::<T> {
        weight: weight.clone(),
        count: targets.iter().flatten().count(),
        targets,
        wanted: x.track_op(),
        gradient: OnceLock::new(),
    })?),
    )
}

struct LinearCrossEntropy<T> {
    weight: Tensor,
    targets: Vec<Option<usize>>,
    count: usize,
    /// Whether x needs a gradient.
    wanted: bool,
    /// That gradient, for a loss whose own is 1.
    gradient: OnceLock<Vec<T>>,
}

/// Logits in memory at a time: 2²³ of f32 are 32 MB.
const AT_ONCE: usize = 1 << 23;

impl<T: Real> LinearCrossEntropy<T> {
    /// The sum of the losses of some rows; their logits become what the gradient is made of.
    fn rows(&self, first: usize, logits: &mut [T], classes: usize) -> f64 {
        let each = rows_each(logits.len() / classes, classes);
        let scale = T::of(1.0 / self.count as f64);
        let losses = logits.par_chunks_mut(each * classes).enumerate();
        let losses = losses.map(|(chunk, logits)| {
            vectorised!(|| {
                let mut loss = 0.0;
                for (row, logits) in logits.chunks_mut(classes).enumerate() {
                    let target = self.targets[first + chunk * each + row];
                    loss += row_loss(logits, target, scale);
                }
                loss
            })
        });
        // In order, so that the sum is the same every time.
        losses.collect::<Vec<f64>>().into_iter().sum()
    }

    fn forward(&self, x: &[T]) -> candle_core::Result<T> {
        with_matrix::<T, _>(&self.weight, |w| {
            let (rows, inputs, classes) = (x.len() / w.cols.max(1), w.cols, w.rows);
            let most = (AT_ONCE / classes.max(1)).max(16);
            let each = rows.div_ceil(rows.div_ceil(most).max(1)).max(1);
            let mut loss = 0.0;
            let mut run = |first: usize, dx: Option<*mut T>| {
                let count = each.min(rows - first);
                let x = Matrix::new(x, rows, inputs).rows(first, count);
                // SAFETY: each product writes all rows of its own buffer; `dx` has room for the
                // rows from `first` on.
                unsafe {
                    let mut logits = written(count * classes, |logits| {
                        product(logits, classes, T::zero(), T::one(), x, w.t());
                    });
                    loss += self.rows(first, &mut logits, classes);
                    if let Some(dx) = dx {
                        let g = Matrix::new(&logits, count, classes);
                        let dx = dx.add(first * inputs);
                        product(dx, inputs, T::zero(), T::one(), g, w);
                    }
                }
            };
            let firsts = (0..rows).step_by(each);
            if self.wanted {
                // SAFETY: the runs write all rows.
                let gradient =
                    unsafe { written(x.len(), |dx| firsts.for_each(|first| run(first, Some(dx)))) };
                let _ = self.gradient.set(gradient);
            } else {
                firsts.for_each(|first| run(first, None));
            }
            Ok(T::of(loss / self.count as f64))
        })
    }
}

/// −log softmax(z)\[target\]; z becomes (softmax(z) − one-hot) · scale, or 0 without a target.
#[inline(always)]
fn row_loss<T: Real>(z: &mut [T], target: Option<usize>, scale: T) -> f64 {
    let Some(target) = target else {
        z.fill(T::zero());
        return 0.0;
    };
    let chosen = z[target];
    let top = largest(z);
    for z in z.iter_mut() {
        *z = (*z - top).exp_fast();
    }
    let total = sums([z], |[z]| (z, T::zero())).0;
    let factor = scale / total;
    for z in z.iter_mut() {
        *z *= factor;
    }
    z[target] -= scale;
    WithDType::to_f64(top - chosen) + WithDType::to_f64(total).ln()
}

impl<T: Real> CustomOp1 for LinearCrossEntropy<T> {
    fn name(&self) -> &'static str {
        "linear_cross_entropy"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let loss = self.forward(slice(x, layout)?)?;
        Ok((stored(vec![loss]), ().into()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, g: &Tensor) -> candle_core::Result<Option<Tensor>> {
        if !self.wanted {
            return Ok(None);
        }
        let Some(gradient) = self.gradient.get() else {
            bail!("internal: linear_cross_entropy's backward pass without its forward pass")
        };
        let g: T = g.to_scalar()?;
        let scaled = gradient.iter().map(|dx| *dx * g).collect();
        tensor(scaled, x.shape()).map(Some)
    }
}
