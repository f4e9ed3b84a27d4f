//! Cross-entropy of logits against class numbers.

use std::mem::MaybeUninit;
use std::sync::OnceLock;

use candle_core::{
    CpuStorage, CustomOp1, D, DType, Device, Layout, Shape, Tensor, WithDType, bail,
};
use rayon::prelude::*;

use super::cpu::{
    Real, filled, for_real, largest, one_pass, read, rows_each, slice, stored, sums, tensor,
    vectorised,
};
use super::{check_alike, refuse, wide};
use crate::Result;

/// The target of type i64 that does not count, as in PyTorch's `cross_entropy` and in the labels
/// of Hugging Face's data collators.
///
/// ```
/// assert_eq!(lora::ops::IGNORE_INDEX, -100);
/// ```
pub const IGNORE_INDEX: i64 = -100;

/// The mean over the targets t of log Σⱼ e^(xⱼ) - xₜ.
///
/// Targets of type i64 that are [`IGNORE_INDEX`] do not count, and their logits get a gradient
/// of 0. On the CPU no buffer beside the logits and their gradient is as large as the logits: the
/// backward pass computes the softmax a second time. Half precision is computed in f32.
///
/// # Shapes
///
/// `logits` x (…, n, classes), `targets` (…, n) of type u32 or i64; → () in the logits' type.
///
/// # Errors
///
/// [`Error::Operation`](crate::Error::Operation) when the tensors do not fit each other, a target
/// is not a class, or no target counts.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use lora::ops::{IGNORE_INDEX, cross_entropy};
///
/// let logits = Var::new(&[[0f64, 3f64.ln()], [9.0, 9.0]], &Device::Cpu)?;
/// let targets = Tensor::new(&[1i64, IGNORE_INDEX], &Device::Cpu)?;
/// let loss = cross_entropy(&logits, &targets)?;
/// assert!((loss.to_scalar::<f64>()? - (4f64 / 3.0).ln()).abs() < 1e-15);
///
/// let gradients = loss.backward()?;
/// let dx = gradients.get(&logits).unwrap().to_vec2::<f64>()?;
/// assert!((dx[0][0] - 0.25).abs() < 1e-15 && (dx[0][1] + 0.25).abs() < 1e-15);
/// assert_eq!(dx[1], [0.0, 0.0]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let (classes, counted) = check(logits, targets)?;
    let count = counted.iter().flatten().count();
    if one_pass(&[logits]) {
        return Ok(logits.contiguous()?.apply_op1(CrossEntropy {
            classes,
            targets: counted,
            count,
            saved: OnceLock::new(),
        })?);
    }
    Ok(composed(&wide(logits)?, &counted, count)?.to_dtype(logits.dtype())?)
}

/// The number of classes, and each target that counts.
fn check(logits: &Tensor, targets: &Tensor) -> Result<(usize, Vec<Option<usize>>)> {
    let op = "cross_entropy";
    let all = [("logits", logits), ("targets", targets)];
    check_alike(op, &all[..1])?;
    let Some((&classes, leading)) = logits.dims().split_last() else {
        return refuse(op, &all, "logits must be […, n, classes]");
    };
    Ok((
        classes,
        counted_targets(op, &all, targets, leading, classes)?,
    ))
}

/// The class of each target that counts; `all` are the operation's tensors, for a message.
pub(super) fn counted_targets(
    op: &'static str,
    all: &[(&str, &Tensor)],
    targets: &Tensor,
    leading: &[usize],
    classes: usize,
) -> Result<Vec<Option<usize>>> {
    if !matches!(targets.dtype(), DType::U32 | DType::I64) {
        return refuse(op, all, "targets must be of type u32 or i64");
    }
    if targets.dims() != leading {
        return refuse(op, all, format!("targets must be {leading:?}"));
    }
    let signed = targets.dtype() == DType::I64;
    let numbers = targets.to_device(&Device::Cpu)?.flatten_all()?;
    let numbers = numbers.to_dtype(DType::I64)?.to_vec1::<i64>()?;
    let mut counted = Vec::with_capacity(numbers.len());
    for (at, number) in numbers.into_iter().enumerate() {
        counted.push(match usize::try_from(number) {
            Ok(class) if class < classes => Some(class),
            _ if signed && number == IGNORE_INDEX => None,
            _ => {
                let wants = format!(
                    "target {number} at position {at} must be a class from 0 to below {classes}\
                     , or {IGNORE_INDEX} of type i64 not to count"
                );
                return refuse(op, all, wants);
            }
        });
    }
    if counted.iter().flatten().next().is_none() {
        return refuse(
            op,
            all,
            "at least one target must count: the mean of none is no number",
        );
    }
    Ok(counted)
}

/// The loss from candle's operations.
fn composed(
    logits: &Tensor,
    targets: &[Option<usize>],
    count: usize,
) -> candle_core::Result<Tensor> {
    let (rows, classes) = (targets.len(), logits.dim(D::Minus1)?);
    let kept = targets
        .iter()
        .enumerate()
        .filter_map(|(row, t)| Some((row as u32, (*t)?)));
    let (kept, classes_of): (Vec<u32>, Vec<usize>) = kept.unzip();
    let mut x = logits.reshape((rows, classes))?;
    if count < rows {
        x = x.index_select(&Tensor::from_vec(kept, count, logits.device())?, 0)?;
    }
    let below = x.broadcast_sub(&x.max_keepdim(1)?.detach())?;
    let total = below.exp()?.sum_keepdim(1)?.log()?.flatten_all()?;
    // Not gather, whose gradient has no gradient in candle.
    let places = classes_of.iter().enumerate();
    let places: Vec<i64> = places
        .map(|(row, class)| (row * classes + class) as i64)
        .collect();
    let places = Tensor::from_vec(places, count, logits.device())?;
    let at_target = below.flatten_all()?.index_select(&places, 0)?;
    (total - at_target)?.mean_all()
}

struct CrossEntropy {
    classes: usize,
    targets: Vec<Option<usize>>,
    count: usize,
    /// The largest logit of each row and Σ e^(x - largest), for the backward pass.
    saved: OnceLock<Tensor>,
}

/// The numbers that are saved of each row.
const SAVED: usize = 2;

impl CrossEntropy {
    fn forward<T: Real>(&self, x: &[T]) -> candle_core::Result<T> {
        let (rows, n) = (self.targets.len(), self.classes);
        let mut saved = vec![T::zero(); rows * SAVED];
        let each = rows_each(rows, n);
        let pieces = saved
            .par_chunks_mut(each * SAVED)
            .zip(x.par_chunks(each * n));
        let pieces = pieces.zip(self.targets.par_chunks(each));
        pieces.for_each(|((saved, x), targets)| {
            vectorised!(|| {
                let rows = saved.chunks_exact_mut(SAVED).zip(x.chunks_exact(n));
                for ((saved, x), target) in rows.zip(targets) {
                    if target.is_some() {
                        let top = largest(x);
                        let total = sums([x], |[x]| ((x - top).exp_fast(), T::zero())).0;
                        saved.copy_from_slice(&[top, total]);
                    }
                }
            })
        });
        let rows = saved.chunks_exact(SAVED).zip(x.chunks_exact(n));
        let losses = rows.zip(&self.targets).filter_map(|((saved, x), target)| {
            let loss = saved[1].ln() + (saved[0] - x[(*target)?]);
            Some(WithDType::to_f64(loss))
        });
        let mean = losses.sum::<f64>() / self.count as f64;
        let _ = self.saved.set(tensor(saved, (self.targets.len(), SAVED))?);
        Ok(T::of(mean))
    }

    /// g / count · (softmax(x) - the target's 1), and 0 where the target does not count.
    fn backward<T: Real>(&self, x: &[T], saved: &[T], g: T) -> Vec<T> {
        let (rows, n) = (self.targets.len(), self.classes);
        let g = g / T::of(self.count as f64);
        let each = rows_each(rows, n);
        let fill = |dx: &mut [MaybeUninit<T>]| {
            let given = x.par_chunks(each * n).zip(saved.par_chunks(each * SAVED));
            let given = given.zip(self.targets.par_chunks(each));
            let pieces = dx.par_chunks_mut(each * n).zip(given);
            pieces.for_each(|(dx, ((x, saved), targets))| {
                vectorised!(|| {
                    let given = x.chunks_exact(n).zip(saved.chunks_exact(SAVED));
                    let rows = dx.chunks_exact_mut(n).zip(given.zip(targets));
                    for (dx, ((x, saved), &target)) in rows {
                        backward_row(x, saved, target, g, dx);
                    }
                })
            });
        };
        // SAFETY: x is a row of n numbers for each target, as is dx, and each row is written.
        unsafe { filled(rows * n, fill) }
    }
}

#[inline(always)]
fn backward_row<T: Real>(
    x: &[T],
    saved: &[T],
    target: Option<usize>,
    g: T,
    dx: &mut [MaybeUninit<T>],
) {
    let Some(target) = target else {
        dx.fill(MaybeUninit::new(T::zero()));
        return;
    };
    let (top, share) = (saved[0], g / saved[1]);
    for (dx, &x) in dx.iter_mut().zip(x) {
        dx.write((x - top).exp_fast() * share);
    }
    let at_target = (x[target] - top).exp_fast() * share;
    dx[target].write(at_target - g);
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross_entropy"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        for_real!(x, T => {
            let loss = self.forward::<T>(slice(x, layout)?)?;
            Ok((stored(vec![loss]), ().into()))
        })
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, g: &Tensor) -> candle_core::Result<Option<Tensor>> {
        if !x.track_op() {
            return Ok(None);
        }
        let Some(saved) = self.saved.get() else {
            bail!("internal: cross_entropy's backward pass without its forward pass")
        };
        for_real!(g, T => {
            let g = g.to_scalar::<T>()?;
            let dx = read(x, |x| read(saved, |saved| Ok(self.backward::<T>(x, saved, g))))?;
            tensor(dx, x.shape()).map(Some)
        })
    }
}
