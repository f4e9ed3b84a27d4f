//! The output layer and the loss of a language model, without the logits between them.

use std::sync::OnceLock;

use candle_core::{CpuStorage, CustomOp2, DType, Layout, Shape, Tensor, WithDType, bail};
use rayon::iter::{IndexedParallelIterator, ParallelIterator};
use rayon::slice::ParallelSliceMut;

use super::cpu::{
    Matrix, Real, for_real, largest, one_pass, product, rows_each, slice, stored, sums, tensor,
    vectorised, written,
};
use super::cross_entropy::{counted_targets, cross_entropy};
use super::linear::{check_base, linear, matrix};
use crate::Result;

/// The mean cross entropy of x Wᵀ against `targets`: what a language model's output layer and its
/// loss give together.
///
/// [`cross_entropy`] of [`linear()`] would hold the logits, their gradient, and what candle adds it
/// to: for 256 tokens and a vocabulary of 49,152 that is 50 MB each. This takes some rows at a time
/// and computes the gradients that are needed on the way: with g = (softmax − one-hot) / n,
/// dx = g W, and dW = gᵀ x where W trains, such as an embedding that is the output layer too. Rows
/// whose target is [`IGNORE_INDEX`](super::IGNORE_INDEX) cost nothing.
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
/// use lora::ops::{cross_entropy, linear, linear_cross_entropy};
///
/// let x = Var::new(&[[1f32, 2.], [3., 4.]], &Device::Cpu)?;
/// let w = Tensor::new(&[[0.1f32, 0.2], [0.3, -0.4], [0.5, 0.6]], &Device::Cpu)?;
/// let targets = Tensor::new(&[2u32, 0], &Device::Cpu)?;
/// let once = linear_cross_entropy(&x, &w, &targets)?;
/// let twice = cross_entropy(&linear(&x, &w, None)?, &targets)?;
/// assert!((once.to_scalar::<f32>()? - twice.to_scalar::<f32>()?).abs() < 1e-6);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn linear_cross_entropy(x: &Tensor, weight: &Tensor, targets: &Tensor) -> Result<Tensor> {
    const NAME: &str = "linear_cross_entropy";
    check_base(NAME, x, weight, None)?;
    if !one_pass(&[x, weight]) {
        return cross_entropy(&linear(x, weight, None)?, targets);
    }
    let classes = weight.dims()[0];
    let leading = &x.dims()[..x.rank() - 1];
    let all = [("x", x), ("W", weight), ("targets", targets)];
    let targets = counted_targets(NAME, &all, targets, leading, classes)?;
    let op = LinearCrossEntropy {
        count: targets.iter().flatten().count(),
        targets,
        for_x: x.track_op(),
        for_w: weight.track_op(),
        gradients: OnceLock::new(),
    };
    Ok(x.contiguous()?.apply_op2(weight, op)?)
}

struct LinearCrossEntropy {
    targets: Vec<Option<usize>>,
    count: usize,
    /// Whether x needs a gradient.
    for_x: bool,
    /// Whether W does.
    for_w: bool,
    /// Those gradients, for a loss whose own is 1.
    gradients: OnceLock<[Option<Tensor>; 2]>,
}

/// Logits in memory at a time: 2²³ of f32 are 32 MB.
const AT_ONCE: usize = 1 << 23;

impl LinearCrossEntropy {
    /// The sum of the losses of some rows; their logits become what the gradient is made of.
    fn rows<T: Real>(&self, targets: &[usize], logits: &mut [T], classes: usize) -> f64 {
        let each = rows_each(targets.len(), classes);
        let scale = T::of(1.0 / self.count as f64);
        let losses = logits.par_chunks_mut(each * classes).enumerate();
        let losses = losses.map(|(chunk, logits)| {
            vectorised!(|| {
                let mut loss = 0.0;
                let targets = &targets[chunk * each..];
                for (logits, target) in logits.chunks_mut(classes).zip(targets) {
                    loss += row_loss(logits, *target, scale);
                }
                loss
            })
        });
        // In order, so that the sum is the same every time.
        losses.collect::<Vec<f64>>().into_iter().sum()
    }

    /// The loss and the gradients of x and of W, which are empty where they are not wanted.
    fn forward<T: Real>(&self, x: &[T], w: Matrix<'_, T>) -> (T, Vec<T>, Vec<T>) {
        let targets: Vec<usize> = self.targets.iter().copied().flatten().collect();
        if targets.len() == self.targets.len() {
            return self.forward_counted(x, w, &targets);
        }
        // Only the rows that count, side by side, and their gradients back to where they were.
        let inputs = w.cols;
        let places = || {
            (0..)
                .zip(&self.targets)
                .filter_map(|(row, t)| t.map(|_| row))
        };
        let row = |row: usize| row * inputs..(row + 1) * inputs;
        let kept: Vec<T> = places().flat_map(|place| &x[row(place)]).copied().collect();
        let (loss, of_kept, dw) = self.forward_counted(&kept, w, &targets);
        let mut dx = vec![T::zero(); if self.for_x { x.len() } else { 0 }];
        for (of_kept, place) in of_kept.chunks(inputs.max(1)).zip(places()) {
            dx[row(place)].copy_from_slice(of_kept);
        }
        (loss, dx, dw)
    }

    fn forward_counted<T: Real>(
        &self,
        x: &[T],
        w: Matrix<'_, T>,
        targets: &[usize],
    ) -> (T, Vec<T>, Vec<T>) {
        let (rows, inputs, classes) = (x.len() / w.cols.max(1), w.cols, w.rows);
        let most = (AT_ONCE / classes.max(1)).max(16);
        let each = rows.div_ceil(rows.div_ceil(most).max(1)).max(1);
        let numbers = |wanted: bool, len: usize| vec![T::zero(); if wanted { len } else { 0 }];
        let mut dx = numbers(self.for_x, x.len());
        let mut dw = numbers(self.for_w, classes * inputs);
        let mut loss = 0.0;
        for first in (0..rows).step_by(each) {
            let count = each.min(rows - first);
            let x = Matrix::new(x, rows, inputs).rows(first, count);
            // SAFETY: the product writes all of its buffer.
            let mut logits = unsafe {
                written(count * classes, |logits| {
                    product(logits, classes, T::zero(), T::one(), x, w.t());
                })
            };
            loss += self.rows(&targets[first..][..count], &mut logits, classes);
            let g = Matrix::new(&logits, count, classes);
            if self.for_x {
                let dx = &mut dx[first * inputs..][..count * inputs];
                // SAFETY: these are `count` rows.
                unsafe { product(dx.as_mut_ptr(), inputs, T::zero(), T::one(), g, w) }
            }
            if self.for_w {
                // SAFETY: dW has `classes` rows, and numbers in all of them.
                unsafe { product(dw.as_mut_ptr(), inputs, T::one(), T::one(), g.t(), x) }
            }
        }
        (T::of(loss / self.count as f64), dx, dw)
    }
}

/// −log softmax(z)\[target\]; z becomes (softmax(z) − one-hot) · scale.
#[inline(always)]
fn row_loss<T: Real>(z: &mut [T], target: usize, scale: T) -> f64 {
    let chosen = z[target];
    let top = largest(z);
    for z in z.iter_mut() {
        *z = (*z - top).exp_fast();
    }
    let total = sums([z], |[z]| (z, T::zero())).0;
    let factor = scale / total;
    // Below the normal numbers a product takes tens of times as long, and they add nothing.
    let least = T::min_positive_value();
    for z in z.iter_mut() {
        let share = *z * factor;
        *z = if share < least { T::zero() } else { share };
    }
    z[target] -= scale;
    WithDType::to_f64(top - chosen) + WithDType::to_f64(total).ln()
}

impl CustomOp2 for LinearCrossEntropy {
    fn name(&self) -> &'static str {
        "linear_cross_entropy"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        w: &CpuStorage,
        w_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        for_real!(x, T => {
            let (loss, dx, dw) = self.forward::<T>(slice(x, x_layout)?, matrix(w, w_layout)?);
            let dx = self.for_x.then(|| tensor(dx, x_layout.shape())).transpose()?;
            let dw = self.for_w.then(|| tensor(dw, w_layout.shape())).transpose()?;
            let _ = self.gradients.set([dx, dw]);
            Ok((stored(vec![loss]), ().into()))
        })
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        g: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let Some([dx, dw]) = self.gradients.get() else {
            bail!("internal: linear_cross_entropy's backward pass without its forward pass")
        };
        let g = g.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        let scaled = |gradient: &Option<Tensor>| {
            let gradient = gradient.as_ref();
            gradient
                .map(|gradient| match g {
                    // As from `backward` of the loss itself: no copy.
                    1.0 => Ok(gradient.clone()),
                    g => gradient * g,
                })
                .transpose()
        };
        Ok((scaled(dx)?, scaled(dw)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_has_no_number_below_the_normal_ones() {
        let mut z: Vec<f32> = (0..200).map(|i| -(i as f32)).collect();
        let loss = row_loss(&mut z, 3, 1.0);
        let total: f64 = (0..200).map(|i| f64::from(-i).exp()).sum();
        assert!((loss - (3.0 + total.ln())).abs() < 1e-6);
        for (i, z) in (0..200).zip(z) {
            assert!(z == 0.0 || z.is_normal(), "{i}: {z:e}");
            let want = f64::from(-i).exp() / total - f64::from(u8::from(i == 3));
            assert!((f64::from(z) - want).abs() < 1e-7, "{i}: {z:e}");
        }
        let mut z = [0.0f32, f32::NAN];
        row_loss(&mut z, 0, 1.0);
        assert!(z[1].is_nan());
    }
}
