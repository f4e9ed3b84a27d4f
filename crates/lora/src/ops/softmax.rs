//! Softmax over the last dimension, with and without a causal mask.

use std::mem::MaybeUninit;

use candle_core::{CpuStorage, CustomOp1, D, DType, Layout, Shape, Tensor};
use rayon::prelude::*;

use super::cpu::{
    LANES, Real, filled, for_real, largest, one_pass, read, rows_each, slice, stored, sums, tensor,
    vectorised,
};
use super::{check_alike, refuse, wide};
use crate::Result;

/// yⱼ = e^(xⱼ) / Σₖ e^(xₖ) over the last dimension.
///
/// Half precision is computed in f32.
///
/// # Shapes
///
/// x (…, n); → (…, n).
///
/// # Errors
///
/// [`Error::Operation`](crate::Error::Operation) when x has no dimension or holds no
/// floating-point numbers.
///
/// ```
/// use candle_core::{Device, Var};
/// use lora::ops::softmax_last_dim;
///
/// let x = Var::new(&[[0f64, 3f64.ln()]], &Device::Cpu)?;
/// let y = softmax_last_dim(&x)?;
/// let [a, b]: [f64; 2] = y.to_vec2::<f64>()?[0].clone().try_into().unwrap();
/// assert!((a - 0.25).abs() < 1e-15 && (b - 0.75).abs() < 1e-15);
///
/// // The rows add up to 1 whatever x is.
/// let slope = y.sum_all()?.backward()?.get(&x).unwrap().to_vec2::<f64>()?;
/// assert!(slope[0].iter().all(|v| v.abs() < 1e-15));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn softmax_last_dim(x: &Tensor) -> Result<Tensor> {
    let op = "softmax_last_dim";
    check_alike(op, &[("x", x)])?;
    if x.rank() == 0 {
        return refuse(op, &[("x", x)], "x must have a dimension");
    }
    if one_pass(&[x]) {
        return Ok(x.contiguous()?.apply_op1(Softmax { queries: None })?);
    }
    if x.elem_count() == 0 {
        return Ok(x.clone());
    }
    let x32 = wide(x)?;
    let e = x32
        .broadcast_sub(&x32.max_keepdim(D::Minus1)?.detach())?
        .exp()?;
    let y = e.broadcast_div(&e.sum_keepdim(D::Minus1)?)?;
    Ok(y.to_dtype(x.dtype())?)
}

/// The softmax of attention scores whose queries see no later key.
///
/// Query i of L sees the keys j <= i + (S - L) of S: with as many keys as queries its own and
/// those before, and with more, as when earlier keys are cached, those all the more. The others get 0
/// and their scores a gradient of 0, whatever the scores are. No mask is built, and no infinity
/// takes part. Half precision is computed in f32.
///
/// # Shapes
///
/// `scores` (…, L, S) with L <= S; → (…, L, S).
///
/// # Errors
///
/// [`Error::Operation`](crate::Error::Operation) when there are fewer dimensions than two, more
/// queries than keys, or no floating-point numbers.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use lora::ops::causal_softmax;
///
/// let scores = Tensor::zeros((2, 3), candle_core::DType::F32, &Device::Cpu)?;
/// let third = 1f32 / 3.0;
/// assert_eq!(
///     causal_softmax(&scores)?.to_vec2::<f32>()?,
///     [[0.5, 0.5, 0.0], [third, third, third]]
/// );
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn causal_softmax(scores: &Tensor) -> Result<Tensor> {
    let op = "causal_softmax";
    let all = [("scores", scores)];
    check_alike(op, &all)?;
    let &[.., queries, keys] = scores.dims() else {
        return refuse(op, &all, "scores must be […, L, S]");
    };
    if queries > keys {
        return refuse(
            op,
            &all,
            "scores must be […, L, S] with no more queries L than keys S",
        );
    }
    if one_pass(&[scores]) {
        let queries = Some(queries);
        return Ok(scores.contiguous()?.apply_op1(Softmax { queries })?);
    }
    if scores.elem_count() == 0 {
        return Ok(scores.clone());
    }
    Ok(causal_composed(&wide(scores)?, queries, keys)?.to_dtype(scores.dtype())?)
}

/// The causal softmax from candle's operations.
fn causal_composed(scores: &Tensor, queries: usize, keys: usize) -> candle_core::Result<Tensor> {
    let seen: Vec<u8> = (0..queries)
        .flat_map(|i| (0..keys).map(move |j| u8::from(j <= i + keys - queries)))
        .collect();
    let seen = Tensor::from_vec(seen, (queries, keys), scores.device())?;
    let seen = seen.broadcast_as(scores.shape())?;
    // The largest of those seen, and no gradient through it: a softmax does not depend on it.
    let lowest = if scores.dtype() == DType::F64 {
        f64::MIN
    } else {
        f32::MIN.into()
    };
    let lowest = Tensor::full(lowest, (), scores.device())?.to_dtype(scores.dtype())?;
    let lowest = lowest.broadcast_as(scores.shape())?;
    let top = seen
        .where_cond(&scores.detach(), &lowest)?
        .max_keepdim(D::Minus1)?;
    let below = scores.broadcast_sub(&top)?;
    let zeros = below.zeros_like()?;
    let e = seen.where_cond(&below, &zeros)?.exp()?;
    let e = seen.where_cond(&e, &zeros)?;
    e.broadcast_div(&e.sum_keepdim(D::Minus1)?)
}

struct Softmax {
    /// L of a causal softmax.
    queries: Option<usize>,
}

impl Softmax {
    /// How many numbers of a row of n take part.
    #[inline(always)]
    fn seen(&self, row: usize, n: usize) -> usize {
        match self.queries {
            Some(queries) => row % queries + 1 + n - queries,
            None => n,
        }
    }

    fn forward<T: Real>(&self, x: &[T], n: usize) -> Vec<T> {
        let each = rows_each(x.len() / n.max(1), n);
        let piece = (each * n).max(1);
        let fill = |y: &mut [MaybeUninit<T>]| {
            let pieces = y.par_chunks_mut(piece).zip(x.par_chunks(piece));
            pieces.enumerate().for_each(|(i, (y, x))| {
                vectorised!(|| {
                    let rows = y.chunks_exact_mut(n).zip(x.chunks_exact(n));
                    for (row, (y, x)) in rows.enumerate() {
                        let seen = self.seen(i * each + row, n);
                        forward_row(&x[..seen], y);
                    }
                })
            });
        };
        // SAFETY: x is whole rows of n numbers, as is y, and each row of y is written.
        unsafe { filled(x.len(), fill) }
    }

    fn backward<T: Real>(&self, y: &[T], g: &[T], n: usize) -> Vec<T> {
        assert_eq!(y.len(), g.len(), "internal: sizes of a softmax");
        let each = rows_each(y.len() / n.max(1), n);
        let piece = (each * n).max(1);
        let fill = |dx: &mut [MaybeUninit<T>]| {
            let given = y.par_chunks(piece).zip(g.par_chunks(piece));
            let pieces = dx.par_chunks_mut(piece).zip(given);
            pieces.enumerate().for_each(|(i, (dx, (y, g)))| {
                vectorised!(|| {
                    let given = y.chunks_exact(n).zip(g.chunks_exact(n));
                    for (row, (dx, (y, g))) in dx.chunks_exact_mut(n).zip(given).enumerate() {
                        let seen = self.seen(i * each + row, n);
                        backward_row(&y[..seen], &g[..seen], dx);
                    }
                })
            });
        };
        // SAFETY: y and g are whole rows of n numbers, as is dx, and each row of dx is written.
        unsafe { filled(y.len(), fill) }
    }
}

/// The softmax of x, and zeros in what y has beyond it.
#[inline(always)]
fn forward_row<T: Real>(x: &[T], y: &mut [MaybeUninit<T>]) {
    let top = largest(x);
    let (y, beyond) = y.split_at_mut(x.len());
    let mut lanes = [T::zero(); LANES];
    let (mut xs, mut ys) = (x.chunks_exact(LANES), y.chunks_exact_mut(LANES));
    for (x, y) in (&mut xs).zip(&mut ys) {
        for ((y, &x), lane) in y.iter_mut().zip(x).zip(&mut lanes) {
            *lane += *y.write((x - top).exp_fast());
        }
    }
    let mut total: T = lanes.into_iter().sum();
    for (y, &x) in ys.into_remainder().iter_mut().zip(xs.remainder()) {
        total += *y.write((x - top).exp_fast());
    }
    let share = T::one() / total;
    // SAFETY: the loops above wrote all of this part of y.
    for y in unsafe { y.assume_init_mut() } {
        *y *= share;
    }
    beyond.fill(MaybeUninit::new(T::zero()));
}

/// y (g - Σ g y), and zeros beyond it.
#[inline(always)]
fn backward_row<T: Real>(y: &[T], g: &[T], dx: &mut [MaybeUninit<T>]) {
    let mean = sums([y, g], |[y, g]| (y * g, T::zero())).0;
    let (dx, beyond) = dx.split_at_mut(y.len());
    for ((dx, &y), &g) in dx.iter_mut().zip(y).zip(g) {
        dx.write(y * (g - mean));
    }
    beyond.fill(MaybeUninit::new(T::zero()));
}

impl CustomOp1 for Softmax {
    fn name(&self) -> &'static str {
        match self.queries {
            Some(_) => "causal_softmax",
            None => "softmax_last_dim",
        }
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let n = layout.dims().last().copied().unwrap_or(1);
        for_real!(x, T => {
            let y = self.forward::<T>(slice(x, layout)?, n);
            Ok((stored(y), layout.shape().clone()))
        })
    }

    fn bwd(&self, x: &Tensor, y: &Tensor, g: &Tensor) -> candle_core::Result<Option<Tensor>> {
        if !x.track_op() {
            return Ok(None);
        }
        let n = x.dim(D::Minus1)?;
        for_real!(g, T => {
            let dx = read(y, |y| read(g, |g| Ok(self.backward::<T>(y, g, n))))?;
            tensor(dx, x.shape()).map(Some)
        })
    }
}
