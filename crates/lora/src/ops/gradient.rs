//! What happens to gradients between the backward pass and the step, as one pass each.

use std::mem::MaybeUninit;

use candle_core::{DType, Device, Result, Tensor, WithDType};
use rayon::prelude::*;

use super::cpu::{Real, filled, for_real, one_pass, read, streamed_each, sums, tensor, vectorised};

/// ‖x‖² of every tensor. The squares are of the tensor's type, so they may overflow.
pub(crate) fn square_norms(tensors: &[&Tensor]) -> Result<Vec<f64>> {
    let alike =
        |a: &&Tensor, b: &&Tensor| a.dtype() == b.dtype() && a.device().same_device(b.device());
    let mut norms = Vec::with_capacity(tensors.len());
    for run in tensors.chunk_by(alike) {
        if one_pass(run) {
            for x in run {
                norms.push(for_real!(x, T => read(x, |x| Ok(square_norm::<T>(x)))?));
            }
        } else {
            let squares = run.iter().map(|x| x.detach().sqr()?.sum_all());
            // One transfer for all of them.
            let squares = Tensor::stack(&squares.collect::<Result<Vec<_>>>()?, 0)?;
            let squares = squares.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
            norms.extend(squares.to_vec1::<f64>()?);
        }
    }
    Ok(norms)
}

/// Numbers whose squares are added up by themselves, so that the sum is the same on any number of
/// threads.
const BLOCK: usize = 1 << 13;

fn square_norm<T: Real>(x: &[T]) -> f64 {
    let blocks = x
        .par_chunks(BLOCK)
        .with_min_len(streamed_each(x.len()).div_ceil(BLOCK))
        .map(|x| vectorised!(|| sums([x], |[x]| (x * x, T::zero())).0))
        .map(WithDType::to_f64);
    blocks.collect::<Vec<_>>().into_iter().sum()
}

/// factor · x.
pub(crate) fn scaled(x: &Tensor, factor: f64) -> Result<Tensor> {
    if !one_pass(&[x]) {
        return x * factor;
    }
    for_real!(x, T => tensor(read(x, |x| Ok(scale(x, T::of(factor))))?, x.shape()))
}

fn scale<T: Real>(x: &[T], factor: T) -> Vec<T> {
    let each = streamed_each(x.len());
    let fill = |y: &mut [MaybeUninit<T>]| {
        let pieces = y.par_chunks_mut(each).zip(x.par_chunks(each));
        pieces.for_each(|(y, x)| {
            vectorised!(|| {
                for (y, &x) in y.iter_mut().zip(x) {
                    y.write(x * factor);
                }
            })
        });
    };
    // SAFETY: x is as long as y, and each number of y is written.
    unsafe { filled(x.len(), fill) }
}

/// sum + factor · x, of two tensors of one shape and type.
pub(crate) fn plus_scaled(sum: &Tensor, x: &Tensor, factor: f64) -> Result<Tensor> {
    if !one_pass(&[sum, x]) {
        return sum + (x * factor)?;
    }
    for_real!(x, T => {
        let y = read(sum, |sum| read(x, |x| Ok(add_scaled(sum, x, T::of(factor)))))?;
        tensor(y, x.shape())
    })
}

fn add_scaled<T: Real>(sum: &[T], x: &[T], factor: T) -> Vec<T> {
    assert_eq!(sum.len(), x.len(), "internal: sizes of gradients");
    let each = streamed_each(x.len());
    let fill = |y: &mut [MaybeUninit<T>]| {
        let given = sum.par_chunks(each).zip(x.par_chunks(each));
        let pieces = y.par_chunks_mut(each).zip(given);
        pieces.for_each(|(y, (sum, x))| {
            vectorised!(|| {
                for ((y, &sum), &x) in y.iter_mut().zip(sum).zip(x) {
                    y.write(sum + x * factor);
                }
            })
        });
    };
    // SAFETY: sum and x are as long as y, and each number of y is written.
    unsafe { filled(x.len(), fill) }
}
