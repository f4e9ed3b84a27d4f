//! Layer normalisation and RMS normalisation.

use std::mem::MaybeUninit;
use std::sync::OnceLock;

use candle_core::{CpuStorage, CustomOp2, CustomOp3, D, Layout, Shape, Tensor, bail};
use rayon::prelude::*;

use super::cpu::{
    Held, Real, block_rows, filled, for_real, in_order, one_pass, read, rows_each, slice, stored,
    sums, tensor, vectorised,
};
use super::{check_alike, refuse, wide};
use crate::Result;

/// y = (x - mean) / √(variance + ε) · w + b over the last dimension.
///
/// The variance is that of PyTorch's `layer_norm`: divided by n, not n - 1. Half precision is
/// computed in f32. x, w and b get their gradients where they are variables or come from some;
/// those of w and b are sums over the rows in an order that depends on the shape alone, so they
/// come out the same on any number of threads.
///
/// # Shapes
///
/// x (…, n), `weight` w (n), `bias` b (n); → (…, n).
///
/// # Errors
///
/// [`Error::Operation`](crate::Error::Operation) when the tensors do not fit each other, n = 0, or
/// ε is negative or not finite.
///
/// Source: Ba, Kiros & Hinton 2016, arXiv:1607.06450, equation 3.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use lora::ops::layer_norm;
///
/// let x = Var::new(&[[1f32, 3.]], &Device::Cpu)?;
/// let w = Tensor::new(&[10f32, 10.], &Device::Cpu)?;
/// let b = Tensor::new(&[0f32, 1.], &Device::Cpu)?;
/// let y = layer_norm(&x, &w, Some(&b), 0.0)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[-10., 11.]]);
///
/// // Two numbers become -1 and 1 whatever they are: no gradient is left.
/// let gradients = y.sqr()?.sum_all()?.backward()?;
/// assert_eq!(gradients.get(&x).unwrap().to_vec2::<f32>()?, [[0., 0.]]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    check("layer_norm", x, weight, bias, eps)?;
    if one_pass(&[x, weight]) {
        let (x, weight) = (x.contiguous()?, weight.contiguous()?);
        let op = Norm::<true>::new(eps);
        return Ok(match bias {
            Some(bias) => x.apply_op3(&weight, &bias.contiguous()?, op)?,
            None => x.apply_op2(&weight, op)?,
        });
    }
    let wide_x = wide(x)?;
    let centred = wide_x.broadcast_sub(&wide_x.mean_keepdim(D::Minus1)?)?;
    let y = scaled(&centred, weight, eps)?;
    let y = match bias {
        Some(bias) => y.broadcast_add(&wide(bias)?)?,
        None => y,
    };
    Ok(y.to_dtype(x.dtype())?)
}

/// y = x / √(mean of x² + ε) · w over the last dimension.
///
/// Half precision is computed in f32. x and w get their gradients where they are variables or
/// come from some; that of w comes out the same on any number of threads.
///
/// # Shapes
///
/// x (…, n), `weight` w (n); → (…, n).
///
/// # Errors
///
/// [`Error::Operation`](crate::Error::Operation) when the tensors do not fit each other, n = 0, or
/// ε is negative or not finite.
///
/// Source: Zhang & Sennrich 2019, arXiv:1910.07467, equation 4.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use lora::ops::rms_norm;
///
/// let x = Tensor::new(&[[3f32, 3.], [-2., 2.]], &Device::Cpu)?;
/// let w = Var::new(&[1f32, 10.], &Device::Cpu)?;
/// let y = rms_norm(&x, &w, 0.0)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[1., 10.], [-1., 10.]]);
///
/// let gradients = y.sum_all()?.backward()?;
/// assert_eq!(gradients.get(&w).unwrap().to_vec1::<f32>()?, [0., 2.]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    check("rms_norm", x, weight, None, eps)?;
    if one_pass(&[x, weight]) {
        let op = Norm::<false>::new(eps);
        return Ok(x.contiguous()?.apply_op2(&weight.contiguous()?, op)?);
    }
    Ok(scaled(&wide(x)?, weight, eps)?.to_dtype(x.dtype())?)
}

fn check(
    op: &'static str,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    eps: f64,
) -> Result<()> {
    let mut all = vec![("x", x), ("w", weight)];
    all.extend(bias.map(|bias| ("b", bias)));
    check_alike(op, &all)?;
    let n = match weight.dims() {
        [n] if *n > 0 => *n,
        _ => return refuse(op, &all, "w must be [n] with n at least 1"),
    };
    if x.dims().last() != Some(&n) {
        return refuse(op, &all, format!("x must be […, {n}]"));
    }
    if bias.is_some_and(|bias| bias.dims() != [n]) {
        return refuse(op, &all, format!("b must be [{n}]"));
    }
    if !(eps >= 0.0 && eps.is_finite()) {
        return refuse(
            op,
            &all,
            format!("eps = {eps} must be finite and not negative"),
        );
    }
    Ok(())
}

/// x / √(mean of x² + ε) · w from candle's operations.
fn scaled(x: &Tensor, weight: &Tensor, eps: f64) -> candle_core::Result<Tensor> {
    let size = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    x.broadcast_div(&size)?.broadcast_mul(&wide(weight)?)
}

/// Layer normalisation where `CENTRED`, RMS normalisation where not.
struct Norm<const CENTRED: bool> {
    eps: f64,
    /// What [`Row`] holds of each row, for the backward pass.
    saved: OnceLock<Tensor>,
}

/// How a number of a row is normalised: x̂ = (x - mean) · scale - rest.
///
/// A mean in f32 is off by its rounding. `rest` is what this leaves of the mean, times the scale.
#[derive(Clone, Copy)]
struct Row<T> {
    mean: T,
    scale: T,
    rest: T,
}

/// The numbers of a [`Row`].
const SAVED: usize = 3;

impl<T: Real> Row<T> {
    #[inline(always)]
    fn of<const CENTRED: bool>(x: &[T], eps: T) -> Self {
        let n = T::of(x.len() as f64);
        if !CENTRED {
            let square = sums([x], |[x]| (x * x, T::zero())).0 / n;
            return Self {
                mean: T::zero(),
                scale: T::one() / (square + eps).sqrt(),
                rest: T::zero(),
            };
        }
        let mean = sums([x], |[x]| (x, T::zero())).0 / n;
        let (first, second) = sums([x], |[x]| (x - mean, (x - mean) * (x - mean)));
        let rest = first / n;
        let variance = second / n - rest * rest;
        // Rounding may leave a variance of 0 below 0.
        let variance = if variance < T::zero() {
            T::zero()
        } else {
            variance
        };
        let scale = T::one() / (variance + eps).sqrt();
        Self {
            mean,
            scale,
            rest: rest * scale,
        }
    }

    #[inline(always)]
    fn saved(numbers: &[T]) -> Self {
        Self {
            mean: numbers[0],
            scale: numbers[1],
            rest: numbers[2],
        }
    }

    #[inline(always)]
    fn normal(self, x: T) -> T {
        (x - self.mean) * self.scale - self.rest
    }
}

/// One row of the forward pass.
#[inline(always)]
fn forward_row<const CENTRED: bool, T: Real>(
    x: &[T],
    w: &[T],
    b: Option<&[T]>,
    eps: T,
    y: &mut [MaybeUninit<T>],
    saved: &mut [T],
) {
    let row = Row::of::<CENTRED>(x, eps);
    saved.copy_from_slice(&[row.mean, row.scale, row.rest]);
    let numbers = y.iter_mut().zip(x).zip(w);
    match b {
        Some(b) => {
            for (((y, &x), &w), &b) in numbers.zip(b) {
                y.write(row.normal(x) * w + b);
            }
        }
        None => {
            for ((y, &x), &w) in numbers {
                y.write(row.normal(x) * w);
            }
        }
    }
}

/// One row of x's gradient: s (h - mean(h) - x̂ mean(h x̂)) with h = g w and s the scale.
#[inline(always)]
fn backward_row<const CENTRED: bool, T: Real>(
    row: Row<T>,
    x: &[T],
    w: &[T],
    g: &[T],
    dx: &mut [MaybeUninit<T>],
) {
    let n = T::of(x.len() as f64);
    let (h, hx) = sums([x, w, g], |[x, w, g]| (g * w, g * w * row.normal(x)));
    let (h, hx) = (if CENTRED { h / n } else { T::zero() }, hx / n);
    for (((dx, &x), &w), &g) in dx.iter_mut().zip(x).zip(w).zip(g) {
        dx.write(row.scale * (g * w - h - row.normal(x) * hx));
    }
}

/// Gradients as numbers; those that are not wanted are empty.
struct Gradients<T> {
    x: Vec<T>,
    w: Vec<T>,
    b: Vec<T>,
}

/// Which gradients are wanted.
#[derive(Clone, Copy)]
struct Wanted {
    x: bool,
    w: bool,
    b: bool,
}

impl<const CENTRED: bool> Norm<CENTRED> {
    fn new(eps: f64) -> Self {
        let saved = OnceLock::new();
        Self { eps, saved }
    }

    fn label() -> &'static str {
        if CENTRED { "layer_norm" } else { "rms_norm" }
    }

    fn on_cpu(
        &self,
        (x, layout): Held<'_>,
        w: Held<'_>,
        b: Option<Held<'_>>,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        for_real!(x, T => {
            let b = b.map(|b| slice(b.0, b.1)).transpose()?;
            let y = self.forward::<T>(slice(x, layout)?, slice(w.0, w.1)?, b)?;
            Ok((stored(y), layout.shape().clone()))
        })
    }

    fn forward<T: Real>(&self, x: &[T], w: &[T], b: Option<&[T]>) -> candle_core::Result<Vec<T>> {
        let n = w.len();
        let rows = x.len() / n;
        let each = rows_each(rows, n);
        let mut saved = vec![T::zero(); rows * SAVED];
        let eps = T::of(self.eps);
        let fill = |y: &mut [MaybeUninit<T>]| {
            let given = x
                .par_chunks(each * n)
                .zip(saved.par_chunks_mut(each * SAVED));
            y.par_chunks_mut(each * n)
                .zip(given)
                .for_each(|(y, (x, saved))| {
                    vectorised!(|| {
                        let rows = y.chunks_exact_mut(n).zip(x.chunks_exact(n));
                        for ((y, x), saved) in rows.zip(saved.chunks_exact_mut(SAVED)) {
                            forward_row::<CENTRED, T>(x, w, b, eps, y, saved);
                        }
                    })
                });
        };
        // SAFETY: x is whole rows of n numbers, as is y, and each row of y is written.
        let y = unsafe { filled(x.len(), fill) };
        let _ = self.saved.set(tensor(saved, (rows, SAVED))?);
        Ok(y)
    }

    /// The gradients of a few rows: x's written, and w's and b's summed.
    fn block<T: Real>(
        x: &[T],
        w: &[T],
        g: &[T],
        saved: &[T],
        dx: Option<&mut [MaybeUninit<T>]>,
        wanted: Wanted,
    ) -> (Vec<T>, Vec<T>) {
        let n = w.len();
        let mut dw = vec![T::zero(); if wanted.w { n } else { 0 }];
        let mut db = vec![T::zero(); if wanted.b { n } else { 0 }];
        vectorised!(|| {
            let mut dx = dx.map(|dx| dx.chunks_exact_mut(n));
            let rows = x.chunks_exact(n).zip(g.chunks_exact(n));
            for ((x, g), saved) in rows.zip(saved.chunks_exact(SAVED)) {
                let row = Row::saved(saved);
                if let Some(dx) = dx.as_mut().and_then(Iterator::next) {
                    backward_row::<CENTRED, T>(row, x, w, g, dx);
                }
                for ((dw, &x), &g) in dw.iter_mut().zip(x).zip(g) {
                    *dw += g * row.normal(x);
                }
                for (db, &g) in db.iter_mut().zip(g) {
                    *db += g;
                }
            }
        });
        (dw, db)
    }

    fn backward<T: Real>(
        x: &[T],
        w: &[T],
        g: &[T],
        saved: &[T],
        wanted: Wanted,
    ) -> candle_core::Result<Gradients<T>> {
        if x.len() != g.len() {
            bail!("internal: sizes of a normalisation")
        }
        let n = w.len();
        let rows = block_rows(n);
        let mut sums = Vec::new();
        let fill = |dx: &mut [MaybeUninit<T>]| {
            let mut dx = dx.chunks_mut(rows * n);
            let blocks = x.chunks(rows * n).zip(g.chunks(rows * n));
            let blocks: Vec<_> = blocks
                .zip(saved.chunks(rows * SAVED))
                .map(|((x, g), saved)| (x, g, saved, dx.next()))
                .collect();
            sums = blocks
                .into_par_iter()
                .map(|(x, g, saved, dx)| Self::block(x, w, g, saved, dx, wanted))
                .collect();
        };
        // SAFETY: dx has as many blocks and rows as x where it is wanted, and no numbers where it
        // is not; each of its rows is written.
        let dx = unsafe { filled(if wanted.x { x.len() } else { 0 }, fill) };
        let (dw, db): (Vec<_>, Vec<_>) = sums.into_iter().unzip();
        Ok(Gradients {
            x: dx,
            w: in_order(dw, n),
            b: in_order(db, n),
        })
    }

    #[allow(clippy::type_complexity)]
    fn gradients(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: Option<&Tensor>,
        g: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let Some(saved) = self.saved.get() else {
            bail!("internal: a normalisation's backward pass without its forward pass")
        };
        let wanted = Wanted {
            x: x.track_op(),
            w: w.track_op(),
            b: b.is_some_and(Tensor::track_op),
        };
        for_real!(g, T => {
            let all = read(x, |x| read(w, |w| read(g, |g| read(saved, |saved| {
                Self::backward::<T>(x, w, g, saved, wanted)
            }))))?;
            let dx = wanted.x.then(|| tensor(all.x, x.shape())).transpose()?;
            let dw = wanted.w.then(|| tensor(all.w, w.shape())).transpose()?;
            let db = wanted.b.then(|| tensor(all.b, w.shape())).transpose()?;
            Ok((dx, dw, db))
        })
    }
}

impl<const CENTRED: bool> CustomOp2 for Norm<CENTRED> {
    fn name(&self) -> &'static str {
        Self::label()
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        w: &CpuStorage,
        w_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.on_cpu((x, x_layout), (w, w_layout), None)
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _: &Tensor,
        g: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let (dx, dw, _) = self.gradients(x, w, None, g)?;
        Ok((dx, dw))
    }
}

impl<const CENTRED: bool> CustomOp3 for Norm<CENTRED> {
    fn name(&self) -> &'static str {
        Self::label()
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        w: &CpuStorage,
        w_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.on_cpu((x, x_layout), (w, w_layout), Some((b, b_layout)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _: &Tensor,
        g: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        self.gradients(x, w, Some(b), g)
    }
}
