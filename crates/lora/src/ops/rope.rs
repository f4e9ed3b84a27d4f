//! Rotary position embedding.

use std::mem::MaybeUninit;

use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};
use rayon::prelude::*;

use super::cpu::{
    Real, filled, for_real, one_pass, read, rows_each, slice, stored, tensor, vectorised,
};
use super::{check_alike, refuse, wide};
use crate::Result;

/// Turns each pair (xᵢ, xᵢ₊ₕ) by the angle of its position, h = dim / 2: GPT-NeoX's and Llama's
/// rotary embedding.
///
/// yᵢ = xᵢ cos θᵢ - xᵢ₊ₕ sin θᵢ and yᵢ₊ₕ = xᵢ₊ₕ cos θᵢ + xᵢ sin θᵢ for i < h. The gradient is
/// turned back by the same angles. The heads come after the length, as in flash attention:
/// (batch, length, heads · dim) needs no transpose. Half precision is computed in f32, with the
/// tables as exact as they are given.
///
/// # Shapes
///
/// x (batch, length, heads, dim), `cos` and `sin` (length, dim / 2); → (batch, length, heads, dim).
///
/// # Errors
///
/// [`Error::Operation`](crate::Error::Operation) when the tensors do not fit each other, dim is
/// odd, or one holds no floating-point numbers.
///
/// Source: Su et al. 2021, arXiv:2104.09864, equation 34, with the pairs of Llama's `rotate_half`.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use lora::ops::rope;
///
/// // One position, one head, one pair, turned by a right angle.
/// let x = Var::new(&[[[[1f32, 2.]]]], &Device::Cpu)?;
/// let cos = Tensor::new(&[[0f32]], &Device::Cpu)?;
/// let sin = Tensor::new(&[[1f32]], &Device::Cpu)?;
/// let y = rope(&x, &cos, &sin)?;
/// assert_eq!(y.flatten_all()?.to_vec1::<f32>()?, [-2., 1.]);
///
/// let gradients = y.sum_all()?.backward()?;
/// let dx = gradients.get(&x).unwrap().flatten_all()?;
/// assert_eq!(dx.to_vec1::<f32>()?, [1., -1.]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let all = [("x", x), ("cos", cos), ("sin", sin)];
    check_alike("rope", &all[..1])?;
    let &[_, length, _, dim] = x.dims() else {
        return refuse("rope", &all, "x must be [batch, length, heads, dim]");
    };
    if dim == 0 || dim % 2 != 0 {
        return refuse("rope", &all, "x's last dimension must be even");
    }
    if [cos, sin]
        .iter()
        .any(|table| table.dims() != [length, dim / 2])
    {
        return refuse(
            "rope",
            &all,
            format!("cos and sin must be [{length}, {}]", dim / 2),
        );
    }
    check_alike("rope", &[("cos", cos), ("sin", sin)])?;
    let x_wide = wide(x)?;
    let (cos, sin) = (cos.to_dtype(x_wide.dtype())?, sin.to_dtype(x_wide.dtype())?);
    check_alike("rope", &[("x", &x_wide), ("cos", &cos), ("sin", &sin)])?;
    if one_pass(&[x, &cos, &sin]) && !cos.track_op() && !sin.track_op() {
        let (cos, sin) = (cos.contiguous()?, sin.contiguous()?);
        return Ok(x.contiguous()?.apply_op1(Rope { cos, sin })?);
    }
    let (cos, sin) = (cos.unsqueeze(1)?, sin.unsqueeze(1)?);
    let first = x_wide.narrow(3, 0, dim / 2)?;
    let second = x_wide.narrow(3, dim / 2, dim / 2)?;
    let turned = Tensor::cat(
        &[
            (first.broadcast_mul(&cos)? - second.broadcast_mul(&sin)?)?,
            (second.broadcast_mul(&cos)? + first.broadcast_mul(&sin)?)?,
        ],
        3,
    )?;
    Ok(turned.to_dtype(x.dtype())?)
}

struct Rope {
    cos: Tensor,
    sin: Tensor,
}

impl Rope {
    /// x turned forward (`sign` 1) or back (-1).
    fn turned<T: Real>(&self, x: &[T], shape: &Shape, sign: T) -> candle_core::Result<Vec<T>> {
        let (_, length, heads, dim) = shape.dims4()?;
        let (cos, sin) = (&self.cos, &self.sin);
        read(cos, |cos| {
            read(sin, |sin| {
                let fill = |y: &mut [MaybeUninit<T>]| {
                    turn(x, cos, sin, y, [length, heads * dim, dim], sign);
                };
                // SAFETY: `turn` writes all of y, which is as long as x.
                Ok(unsafe { filled(x.len(), fill) })
            })
        })
    }
}

/// Writes y; `sizes` are the positions, the numbers of a position and those of a head.
fn turn<T: Real>(
    x: &[T],
    cos: &[T],
    sin: &[T],
    y: &mut [MaybeUninit<T>],
    [length, row, dim]: [usize; 3],
    sign: T,
) {
    let half = dim / 2;
    let each = rows_each(x.len() / row.max(1), row);
    let piece = (each * row).max(1);
    let pieces = y.par_chunks_mut(piece).zip(x.par_chunks(piece));
    pieces.enumerate().for_each(|(i, (y, x))| {
        vectorised!(|| {
            let rows = y.chunks_exact_mut(row).zip(x.chunks_exact(row));
            for (at, (y, x)) in rows.enumerate() {
                let table = (i * each + at) % length * half..;
                let (cos, sin) = (&cos[table.clone()][..half], &sin[table][..half]);
                for (y, x) in y.chunks_exact_mut(dim).zip(x.chunks_exact(dim)) {
                    turn_head(x, cos, sin, y, sign);
                }
            }
        })
    });
}

#[inline(always)]
fn turn_head<T: Real>(x: &[T], cos: &[T], sin: &[T], y: &mut [MaybeUninit<T>], sign: T) {
    let (x1, x2) = x.split_at(cos.len());
    let (y1, y2) = y.split_at_mut(cos.len());
    let pairs = y1.iter_mut().zip(y2).zip(x1.iter().zip(x2));
    for (((y1, y2), (&x1, &x2)), (&cos, &sin)) in pairs.zip(cos.iter().zip(sin)) {
        let sin = sign * sin;
        y1.write(x1 * cos - x2 * sin);
        y2.write(x2 * cos + x1 * sin);
    }
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        for_real!(x, T => {
            let y = self.turned::<T>(slice(x, layout)?, layout.shape(), T::of(1.0))?;
            Ok((stored(y), layout.shape().clone()))
        })
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, g: &Tensor) -> candle_core::Result<Option<Tensor>> {
        if !x.track_op() {
            return Ok(None);
        }
        for_real!(g, T => {
            let dx = read(g, |g| self.turned::<T>(g, x.shape(), T::of(-1.0)))?;
            tensor(dx, x.shape()).map(Some)
        })
    }
}
