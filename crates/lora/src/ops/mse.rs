//! The mean squared error.

use std::mem::MaybeUninit;

use candle_core::{CpuStorage, CustomOp2, Layout, Shape, Tensor, WithDType};
use rayon::prelude::*;

use super::cpu::{
    Real, filled, for_real, one_pass, read, rows_each, slice, stored, sums, tensor, vectorised,
};
use super::{check_alike, refuse, wide};
use crate::Result;

/// The mean of (x - t)² over all numbers.
///
/// x and the target t get their gradients where they are variables or come from some. Half
/// precision is computed in f32.
///
/// # Shapes
///
/// x and `target` t alike, any; → () in their type.
///
/// # Errors
///
/// [`Error::Operation`](crate::Error::Operation) when the two differ in shape, type or device, or
/// hold nothing or no floating-point numbers.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use lora::ops::mse_loss;
///
/// let x = Var::new(&[1f32, 5.], &Device::Cpu)?;
/// let target = Tensor::new(&[1f32, 2.], &Device::Cpu)?;
/// let loss = mse_loss(&x, &target)?;
/// assert_eq!(loss.to_scalar::<f32>()?, 4.5);
/// assert_eq!(loss.backward()?.get(&x).unwrap().to_vec1::<f32>()?, [0., 3.]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn mse_loss(x: &Tensor, target: &Tensor) -> Result<Tensor> {
    let both = [("x", x), ("target", target)];
    check_alike("mse_loss", &both)?;
    if x.dims() != target.dims() || x.elem_count() == 0 {
        return refuse(
            "mse_loss",
            &both,
            "both must have one shape, and hold something",
        );
    }
    if one_pass(&[x, target]) {
        return Ok(x.contiguous()?.apply_op2(&target.contiguous()?, Mse)?);
    }
    let loss = (wide(x)? - wide(target)?)?.sqr()?.mean_all()?;
    Ok(loss.to_dtype(x.dtype())?)
}

struct Mse;

/// Numbers whose squares are added up by themselves, so that the sum is the same on any number of
/// threads.
const BLOCK: usize = 1 << 13;

fn mean<T: Real>(x: &[T], t: &[T]) -> T {
    let blocks = x.par_chunks(BLOCK).zip(t.par_chunks(BLOCK));
    let squares: Vec<f64> = blocks
        .map(|(x, t)| vectorised!(|| sums([x, t], |[x, t]| ((x - t) * (x - t), T::zero())).0))
        .map(WithDType::to_f64)
        .collect();
    T::of(squares.into_iter().sum::<f64>() / x.len() as f64)
}

/// (x - t) · scale.
fn difference<T: Real>(x: &[T], t: &[T], scale: T) -> Vec<T> {
    assert_eq!(x.len(), t.len(), "internal: sizes of mse_loss");
    let each = rows_each(x.len(), 1);
    let fill = |d: &mut [MaybeUninit<T>]| {
        let given = x.par_chunks(each).zip(t.par_chunks(each));
        d.par_chunks_mut(each).zip(given).for_each(|(d, (x, t))| {
            vectorised!(|| {
                for ((d, &x), &t) in d.iter_mut().zip(x).zip(t) {
                    d.write((x - t) * scale);
                }
            })
        });
    };
    // SAFETY: x and t are as long as d, and each number of d is written.
    unsafe { filled(x.len(), fill) }
}

impl CustomOp2 for Mse {
    fn name(&self) -> &'static str {
        "mse_loss"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        t: &CpuStorage,
        t_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        for_real!(x, T => {
            let loss = mean::<T>(slice(x, x_layout)?, slice(t, t_layout)?);
            Ok((stored(vec![loss]), ().into()))
        })
    }

    fn bwd(
        &self,
        x: &Tensor,
        t: &Tensor,
        _: &Tensor,
        g: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        for_real!(g, T => {
            let scale = g.to_scalar::<T>()? * T::of(2.0 / x.elem_count() as f64);
            let toward = |from: &Tensor, to: &Tensor| {
                let d = read(from, |from| read(to, |to| Ok(difference::<T>(from, to, scale))))?;
                tensor(d, from.shape())
            };
            let dx = x.track_op().then(|| toward(x, t)).transpose()?;
            let dt = t.track_op().then(|| toward(t, x)).transpose()?;
            Ok((dx, dt))
        })
    }
}
