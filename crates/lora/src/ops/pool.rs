//! The mean of squares of a picture.

use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};
use rayon::prelude::*;

use super::cpu::{
    Real, filled, for_real, one_pass, read, rows_each, slice, stored, tensor, vectorised,
};
use super::{check_alike, refuse, wide};
use crate::Result;

/// Each output is the mean of a square of `size` × `size` numbers; rows and columns that fill no
/// square are left out, and their gradient is 0. Half precision is computed in f32.
///
/// # Shapes
///
/// x (…, height, width) → (…, ⌊height / size⌋, ⌊width / size⌋).
///
/// # Errors
///
/// [`Error::Operation`](crate::Error::Operation) when x has fewer than two dimensions, is smaller
/// than a square, or holds no floating-point numbers; when `size` is 0.
///
/// ```
/// use candle_core::{Device, Var};
/// use lora::ops::avg_pool2d;
///
/// let x = Var::new(&[[1f32, 2., 9.], [3., 6., 9.]], &Device::Cpu)?;
/// let y = avg_pool2d(&x, 2)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[3.]]);
///
/// let dx = y.sum_all()?.backward()?.get(&x).unwrap().to_vec2::<f32>()?;
/// assert_eq!(dx, [[0.25, 0.25, 0.], [0.25, 0.25, 0.]]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn avg_pool2d(x: &Tensor, size: usize) -> Result<Tensor> {
    check_alike("avg_pool2d", &[("x", x)])?;
    let fits = matches!(*x.dims(), [.., h, w] if size > 0 && h >= size && w >= size);
    if !fits {
        let wants = format!("x must be […, height, width] with squares of {size} × {size} in it");
        return refuse("avg_pool2d", &[("x", x)], wants);
    }
    if one_pass(&[x]) {
        return Ok(x.contiguous()?.apply_op1(Pool { size })?);
    }
    let (rank, shape) = (x.rank(), pooled(x.dims(), size));
    let (height, width) = (shape[rank - 2], shape[rank - 1]);
    let squares = wide(x)?
        .narrow(rank - 2, 0, height * size)?
        .narrow(rank - 1, 0, width * size)?
        .reshape(((), height, size, width, size))?;
    Ok(squares.mean((2, 4))?.reshape(shape)?.to_dtype(x.dtype())?)
}

fn pooled(dims: &[usize], size: usize) -> Vec<usize> {
    let (leading, picture) = dims.split_at(dims.len() - 2);
    [leading, &[picture[0] / size, picture[1] / size]].concat()
}

struct Pool {
    size: usize,
}

impl Pool {
    fn forward<T: Real>(&self, x: &[T], [height, width]: [usize; 2]) -> Vec<T> {
        let (size, wide) = (self.size, width / self.size);
        let rows = x.len() / (height * width) * (height / size);
        let share = T::one() / T::of((size * size) as f64);
        let each = rows_each(rows, size * width);
        // SAFETY: every number of every row is written.
        unsafe {
            filled(rows * wide, |y| {
                let rows = y.par_chunks_mut(each * wide).enumerate();
                rows.for_each_init(Vec::new, |line: &mut Vec<T>, (part, y)| {
                    vectorised!(|| for (at, y) in y.chunks_exact_mut(wide).enumerate() {
                        let (picture, row) = (
                            (part * each + at) / (height / size),
                            (part * each + at) % (height / size),
                        );
                        let x = &x[(picture * height + row * size) * width..][..size * width];
                        line.clear();
                        line.extend_from_slice(&x[..width]);
                        for x in x[width..].chunks_exact(width) {
                            for (sum, &x) in line.iter_mut().zip(x) {
                                *sum += x;
                            }
                        }
                        for (y, square) in y.iter_mut().zip(line.chunks_exact(size)) {
                            let mut sum = square[0];
                            for &x in &square[1..] {
                                sum += x;
                            }
                            y.write(sum * share);
                        }
                    });
                });
            })
        }
    }

    fn backward<T: Real>(&self, g: &[T], [height, width]: [usize; 2], len: usize) -> Vec<T> {
        let (size, wide) = (self.size, width / self.size);
        let share = T::one() / T::of((size * size) as f64);
        let each = rows_each(len / width, width);
        // SAFETY: every number of every row is written.
        unsafe {
            filled(len, |dx| {
                let rows = dx.par_chunks_mut(each * width).enumerate();
                rows.for_each(|(part, dx)| {
                    vectorised!(|| for (at, dx) in dx.chunks_exact_mut(width).enumerate() {
                        let (picture, row) = (
                            (part * each + at) / height,
                            (part * each + at) % height / size,
                        );
                        let (squares, rest) = dx.split_at_mut(wide * size);
                        if row == height / size {
                            for dx in squares {
                                dx.write(T::zero());
                            }
                        } else {
                            let g = &g[(picture * (height / size) + row) * wide..][..wide];
                            for (square, &g) in squares.chunks_exact_mut(size).zip(g) {
                                for dx in square {
                                    dx.write(g * share);
                                }
                            }
                        }
                        for dx in rest {
                            dx.write(T::zero());
                        }
                    });
                });
            })
        }
    }
}

fn picture(dims: &[usize]) -> [usize; 2] {
    [dims[dims.len() - 2], dims[dims.len() - 1]]
}

impl CustomOp1 for Pool {
    fn name(&self) -> &'static str {
        "avg_pool2d"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        for_real!(x, T => {
            let y = self.forward(slice::<T>(x, layout)?, picture(layout.dims()));
            Ok((stored(y), pooled(layout.dims(), self.size).into()))
        })
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, g: &Tensor) -> candle_core::Result<Option<Tensor>> {
        for_real!(g, T => {
            let dx = read::<T, _>(g, |g| Ok(self.backward(g, picture(x.dims()), x.elem_count())))?;
            tensor(dx, x.shape()).map(Some)
        })
    }
}
