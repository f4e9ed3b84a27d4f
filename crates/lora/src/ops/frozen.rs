//! The weight of a product that does not train: a tensor, or codes of 4 bits.

use candle_core::{Result, Tensor, bail};
use rayon::iter::{IntoParallelIterator, ParallelIterator};

use super::cpu::{Matrix, Parts, Real, one_pass, product_here, written};
use super::linear::{base_backward, base_forward, started, with_matrix};
use crate::quant::{Quantized, View, Weight};

/// W (out, in) of a product in one pass.
#[derive(Clone)]
pub(crate) enum Frozen {
    Dense(Tensor),
    Quantized(Quantized),
}

impl From<Weight<'_>> for Frozen {
    fn from(weight: Weight<'_>) -> Self {
        match weight {
            Weight::Dense(weight) => Self::Dense(weight.clone()),
            Weight::Quantized(weight) => Self::Quantized(weight.clone()),
        }
    }
}

impl Frozen {
    pub fn dims2(&self) -> Result<(usize, usize)> {
        let dims = match self {
            Self::Dense(weight) => weight.dims(),
            Self::Quantized(weight) => weight.dims(),
        };
        match *dims {
            [out, inputs] => Ok((out, inputs)),
            _ => bail!("internal: a weight that is no matrix"),
        }
    }

    /// x Wᵀ + b.
    pub(super) fn forward<T: Real>(&self, x: &[T], bias: Option<&[T]>) -> Result<Vec<T>> {
        let dims = self.dims2()?;
        match self {
            Self::Dense(weight) => with_matrix(weight, |w| Ok(base_forward(x, w, bias))),
            Self::Quantized(weight) => weight.view(|w| forward(x, &w, dims, bias)),
        }
    }

    /// g W.
    pub(super) fn backward<T: Real>(&self, g: &[T]) -> Result<Vec<T>> {
        let dims = self.dims2()?;
        match self {
            Self::Dense(weight) => with_matrix(weight, |w| Ok(base_backward(g, w))),
            Self::Quantized(weight) => weight.view(|w| backward(g, &w, dims)),
        }
    }
}

/// Whether a product of `x` with this weight runs as one pass.
pub(super) fn runs_as_one_pass(x: &Tensor, weight: Weight<'_>) -> bool {
    match weight {
        Weight::Dense(weight) => one_pass(&[x, weight]),
        Weight::Quantized(weight) => one_pass(&[x]) && weight.device().is_cpu(),
    }
}

/// Numbers of W that a thread expands at a time: few, so that they stay in its second cache.
const NUMBERS: usize = 1 << 17;

/// How many rows of `depth` numbers are expanded together. With fewer than 16 the product itself
/// would be slow, so long rows take more than [`NUMBERS`].
fn together(depth: usize) -> usize {
    (NUMBERS / depth.max(1)).clamp(16, 128)
}

/// Runs `tile` for the start and the length of every part of `all`, on all threads.
///
/// A thread takes several parts with one buffer: a new one each time would cost more than what is
/// done with it.
fn tiles<T>(all: usize, size: usize, tile: impl Fn(usize, usize, &mut Vec<T>) + Sync) {
    let tiles = all.div_ceil(size);
    let takes = tiles.min(2 * rayon::current_num_threads());
    (0..takes).into_par_iter().for_each(|take| {
        let mut buffer = Vec::new();
        for at in tiles * take / takes..tiles * (take + 1) / takes {
            let from = at * size;
            tile(from, size.min(all - from), &mut buffer);
        }
    });
}

/// x Wᵀ + b, some rows of W at a time.
fn forward<T: Real>(
    x: &[T],
    weight: &View<'_>,
    (out, inputs): (usize, usize),
    bias: Option<&[T]>,
) -> Vec<T> {
    let rows = x.len() / inputs.max(1);
    if rows == 0 {
        return Vec::new();
    }
    let (mut y, keep) = started(rows, out, bias);
    let x = Matrix::new(x, rows, inputs);
    let start = Parts(y.as_mut_ptr());
    tiles(out, together(inputs), |from, tall, w| {
        let start = &start;
        w.resize(tall * inputs, T::zero());
        weight.expand(from * inputs, w);
        let w = Matrix::new(w, tall, inputs);
        // SAFETY: the buffer has room for (rows, out), of which this tile writes its columns, and
        // holds numbers where they are kept.
        unsafe { product_here(start.0.add(from), out, keep, T::one(), x, w.t()) }
    });
    // SAFETY: the tiles have written all columns.
    unsafe { y.set_len(rows * out) };
    y
}

/// The columns of W that the backward pass takes together: two of QLoRA's blocks.
const COLUMNS: usize = 128;

/// g W, some columns of W at a time, and of these some rows.
fn backward<T: Real>(g: &[T], weight: &View<'_>, (out, inputs): (usize, usize)) -> Vec<T> {
    let rows = g.len() / out.max(1);
    if rows == 0 || out == 0 {
        return vec![T::zero(); rows * inputs];
    }
    let g = Matrix::new(g, rows, out);
    let fill = |dx: *mut T| {
        let start = Parts(dx);
        tiles(inputs, COLUMNS, |from, wide, w| {
            let start = &start;
            for row in (0..out).step_by(NUMBERS / COLUMNS) {
                let tall = (NUMBERS / COLUMNS).min(out - row);
                w.resize(tall * wide, T::zero());
                for (i, w) in w.chunks_exact_mut(wide).enumerate() {
                    weight.expand((row + i) * inputs + from, w);
                }
                let (g, w) = (g.cols(row, tall), Matrix::new(w, tall, wide));
                let keep = if row == 0 { T::zero() } else { T::one() };
                // SAFETY: (rows, in) has this tile's columns, which the first rows of W write
                // and the others add to.
                unsafe { product_here(start.0.add(from), inputs, keep, T::one(), g, w) }
            }
        });
    };
    // SAFETY: the tiles write all columns of (rows, in).
    unsafe { written(rows * inputs, fill) }
}
