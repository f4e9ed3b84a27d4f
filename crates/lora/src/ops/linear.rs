//! The frozen linear layer and the LoRA product beside it, each as one node of the graph.

use std::ops::Range;
use std::sync::OnceLock;

use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp3, DType, Layout, MetalStorage, Shape, Storage,
    Tensor, bail,
};

use rayon::iter::{IntoParallelIterator, IntoParallelRefIterator, ParallelIterator};

use super::cpu::{Matrix, Real, for_real, one_pass, product, read, slice, stored, tensor, written};
use super::given;
use crate::{Error, Result};

/// y = x Wᵀ + b for a W and b that do not train.
///
/// candle's own product computes the gradient of W whether W trains or not, which costs as much as
/// the forward pass; this one leaves it out, and that of x too where x needs none. A W or b that
/// is a variable, or comes from one, gets its gradient: then this is candle's own product.
///
/// # Shapes
///
/// x (…, in), `weight` W (out, in), `bias` b (out); → (…, out).
///
/// # Errors
///
/// [`Error::Operation`] when the tensors do not fit each other.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use lora::ops::frozen_linear;
///
/// let x = Var::new(&[[1f32, 2.]], &Device::Cpu)?;
/// let w = Tensor::new(&[[3f32, 4.], [5., 6.], [7., 8.]], &Device::Cpu)?;
/// let y = frozen_linear(&x, &w, None)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[11., 17., 23.]]);
///
/// let gradients = y.sum_all()?.backward()?;
/// assert_eq!(gradients.get(&x).unwrap().to_vec2::<f32>()?, [[15., 18.]]);
/// assert!(gradients.get(&w).is_none());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn frozen_linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    check_base("frozen_linear", x, weight, bias)?;
    if weight.track_op() || bias.is_some_and(Tensor::track_op) {
        let y = flat(x)?.matmul(&weight.t()?)?;
        let y = y.reshape(output_dims(x, weight))?;
        return Ok(match bias {
            Some(bias) => y.broadcast_add(bias)?,
            None => y,
        });
    }
    let one_pass = one_pass(&[x, weight]);
    // Where the product cannot start from the bias, it is added.
    let (inside, outside) = if one_pass {
        (bias.map(Tensor::contiguous).transpose()?, None)
    } else {
        (None, bias)
    };
    let y = x.contiguous()?.apply_op1(Frozen {
        weight: weight.clone(),
        bias: inside,
    })?;
    Ok(match outside {
        Some(bias) => y.broadcast_add(bias)?,
        None => y,
    })
}

/// y = x Wᵀ + b + s · (x Aᵀ) Bᵀ, the output of a linear layer with LoRA.
///
/// On the CPU in f32 and f64 both products go into one buffer, and so do the two parts of x's
/// gradient; B A is never formed. Elsewhere, and with A and B in another type than x, this is
/// [`frozen_linear`] and candle's products beside it.
///
/// The gradients, with g that of y: dA = s (g B)ᵀ x, dB = s gᵀ (x Aᵀ), dx = g W + s (g B) A.
/// None is computed for W and b, and that of x only where x needs it.
///
/// # Shapes
///
/// x (…, in), `weight` W (out, in), `bias` b (out), `lora_a` A (r, in), `lora_b` B (out, r);
/// → (…, out) in x's type.
///
/// # Errors
///
/// [`Error::Operation`] when the tensors do not fit each other.
///
/// Source: Hu et al. 2021, arXiv:2106.09685, equation 3.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use lora::ops::lora_linear;
///
/// let x = Tensor::new(&[[10f32, 100.]], &Device::Cpu)?;
/// let w = Tensor::new(&[[1f32, 2.], [3., 4.], [5., 6.]], &Device::Cpu)?;
/// let a = Var::new(&[[1f32, 1.]], &Device::Cpu)?;
/// let b = Var::new(&[[1f32], [0.], [0.]], &Device::Cpu)?;
/// let y = lora_linear(&x, &w, None, &a, &b, 2.0)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[430., 430., 650.]]);
///
/// let gradients = y.sum_all()?.backward()?;
/// assert_eq!(gradients.get(&b).unwrap().to_vec2::<f32>()?, [[220.], [220.], [220.]]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn lora_linear(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    lora_a: &Tensor,
    lora_b: &Tensor,
    scaling: f64,
) -> Result<Tensor> {
    check_base("lora_linear", x, weight, bias)?;
    let (out, inputs) = weight.dims2()?;
    let fits = matches!((lora_a.dims(), lora_b.dims()), ([ra, i], [o, rb])
        if ra == rb && *i == inputs && *o == out);
    if !fits || lora_a.dtype() != lora_b.dtype() {
        return Err(Error::Operation {
            op: "lora_linear",
            given: given(&[("W", weight), ("A", lora_a), ("B", lora_b)]),
            wants: format!("A must be [r, {inputs}] and B [{out}, r], of one type"),
        });
    }
    if !weight.track_op() && !bias.is_some_and(Tensor::track_op) {
        let rows = x.elem_count() / inputs.max(1);
        let share = Share::all(rows, lora_a.dims()[0], scaling);
        if let Some(y) = lora_shares(x, weight, bias, lora_a, lora_b, vec![share])? {
            return Ok(y);
        }
    }
    let y = frozen_linear(x, weight, bias)?.to_dtype(lora_a.dtype())?;
    let h = flat(x)?.to_dtype(lora_a.dtype())?.matmul(&lora_a.t()?)?;
    let thin = (h.matmul(&lora_b.t()?)? * scaling)?;
    Ok((y + thin.reshape(output_dims(x, weight))?)?.to_dtype(x.dtype())?)
}

/// The rows of a batch that one adapter serves.
pub struct Share {
    /// Rows of the flat input.
    pub rows: Range<usize>,
    /// The adapter's rows of A; its B begins at `ranks.start` · out.
    pub ranks: Range<usize>,
    pub scaling: f64,
}

/// [`lora_linear`] where different rows have different adapters: A (Σr, in) holds theirs one after
/// the other, and so does B with each (out, r) row by row. Nothing where it cannot be one pass.
///
/// The shares must be in order and must not overlap; rows of none get the base's output. W and b
/// must not train.
pub(crate) fn lora_shares(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    lora_a: &Tensor,
    lora_b: &Tensor,
    shares: Vec<Share>,
) -> Result<Option<Tensor>> {
    if !one_pass(&[x, weight, lora_a, lora_b]) {
        return Ok(None);
    }
    let bias = bias.map(Tensor::contiguous).transpose()?;
    let (x, a, b) = (x.contiguous()?, lora_a.contiguous()?, lora_b.contiguous()?);
    let y = for_real!(x, T => {
        let op = Lora::<T> {
            weight: weight.clone(),
            bias,
            shares,
            down: OnceLock::new(),
        };
        x.apply_op3(&a, &b, op)?
    });
    Ok(Some(y))
}

pub(super) fn check_base(
    op: &'static str,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<()> {
    let refuse = |wants: String| {
        let mut all = vec![("x", x), ("W", weight)];
        all.extend(bias.map(|bias| ("b", bias)));
        let given = given(&all);
        Err(Error::Operation { op, given, wants })
    };
    let [out, inputs] = weight.dims() else {
        return refuse("W must be [out, in]".to_string());
    };
    if x.dims().last() != Some(inputs) {
        return refuse(format!("x must be […, {inputs}]"));
    }
    if bias.is_some_and(|bias| bias.dims() != [*out]) {
        return refuse(format!("b must be [{out}]"));
    }
    if x.dtype() != weight.dtype() || bias.is_some_and(|bias| bias.dtype() != x.dtype()) {
        return refuse("all must be of one type".to_string());
    }
    if !x.device().same_device(weight.device()) {
        return refuse("both must be on one device".to_string());
    }
    Ok(())
}

/// (…, in) as a matrix.
fn flat(x: &Tensor) -> candle_core::Result<Tensor> {
    let inputs = x.dim(candle_core::D::Minus1)?;
    x.reshape((x.elem_count() / inputs.max(1), inputs))
}

/// (…, out).
fn output_dims(x: &Tensor, weight: &Tensor) -> Vec<usize> {
    let mut dims = x.dims().to_vec();
    if let Some(last) = dims.last_mut() {
        *last = weight.dims()[0];
    }
    dims
}

/// A matrix (rows, cols) of a tensor whatever its strides.
fn matrix<'a, T: Real>(
    storage: &'a CpuStorage,
    layout: &Layout,
) -> candle_core::Result<Matrix<'a, T>> {
    let (&[rows, cols], &[row_stride, col_stride]) = (layout.dims(), layout.stride()) else {
        bail!("internal: a weight that is no matrix")
    };
    let numbers = &storage.as_slice::<T>()?[layout.start_offset()..];
    Ok(Matrix::strided(numbers, rows, cols, row_stride, col_stride))
}

/// The weight as a matrix, for as long as the closure runs.
pub(super) fn with_matrix<T: Real, R>(
    weight: &Tensor,
    f: impl FnOnce(Matrix<'_, T>) -> candle_core::Result<R>,
) -> candle_core::Result<R> {
    let (storage, layout) = weight.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => f(matrix(storage, layout)?),
        _ => bail!("internal: a one-pass operation got a weight of another device"),
    }
}

/// A buffer (rows, cols) whose rows start as `first`, or as nothing; and how much of it counts.
fn started<T: Real>(rows: usize, cols: usize, first: Option<&[T]>) -> (Vec<T>, T) {
    let mut buffer = Vec::with_capacity(rows * cols);
    match first {
        Some(first) => {
            for _ in 0..rows {
                buffer.extend_from_slice(first);
            }
            (buffer, T::one())
        }
        None => (buffer, T::zero()),
    }
}

/// x Wᵀ + b.
fn base_forward<T: Real>(
    x: &[T],
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> candle_core::Result<Vec<T>> {
    with_matrix::<T, _>(weight, |w| {
        let (rows, out) = (x.len() / w.cols.max(1), w.rows);
        let (mut y, keep) = match bias {
            Some(bias) => read(bias, |bias| Ok(started(rows, out, Some(bias))))?,
            None => started(rows, out, None),
        };
        let x = Matrix::new(x, rows, w.cols);
        // SAFETY: the buffer has room for (rows, out) and holds numbers where they are kept; the
        // product writes all of it.
        unsafe {
            product(y.as_mut_ptr(), out, keep, T::one(), x, w.t());
            y.set_len(rows * out);
        }
        Ok(y)
    })
}

/// g W.
fn base_backward<T: Real>(g: &[T], weight: &Tensor) -> candle_core::Result<Vec<T>> {
    with_matrix::<T, _>(weight, |w| {
        let rows = g.len() / w.rows.max(1);
        let g = Matrix::new(g, rows, w.rows);
        // SAFETY: the product writes all of (rows, in).
        let dx = unsafe {
            written(rows * w.cols, |dx| {
                product(dx, w.cols, T::zero(), T::one(), g, w);
            })
        };
        Ok(dx)
    })
}

/// x Wᵀ (+ b) with a gradient for x alone.
struct Frozen {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Frozen {
    /// The product by the backend's own means.
    fn composed<S: BackendStorage>(
        &self,
        x: &S,
        layout: &Layout,
        pick: impl Fn(&Storage) -> Option<&S>,
    ) -> candle_core::Result<(S, Shape)> {
        let (weight, weight_layout) = self.weight.storage_and_layout();
        let Some(weight) = pick(&weight) else {
            bail!("frozen_linear: x and W must be on one device")
        };
        let (out, inputs) = self.weight.dims2()?;
        let rows = layout.shape().elem_count() / inputs.max(1);
        let x_layout = Layout::contiguous_with_offset((rows, inputs), layout.start_offset());
        let w_layout = weight_layout.transpose(0, 1)?;
        let y = x.matmul(weight, (1, rows, out, inputs), &x_layout, &w_layout)?;
        Ok((y, output_shape(layout, out)))
    }
}

fn output_shape(x: &Layout, out: usize) -> Shape {
    let mut dims = x.dims().to_vec();
    if let Some(last) = dims.last_mut() {
        *last = out;
    }
    dims.into()
}

impl CustomOp1 for Frozen {
    fn name(&self) -> &'static str {
        "frozen_linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        if !matches!(x.dtype(), DType::F32 | DType::F64) {
            return self.composed(x, layout, |storage| match storage {
                Storage::Cpu(storage) => Some(storage),
                _ => None,
            });
        }
        let shape = output_shape(layout, self.weight.dims()[0]);
        for_real!(x, T => {
            let y = base_forward::<T>(slice(x, layout)?, &self.weight, self.bias.as_ref())?;
            Ok((stored(y), shape))
        })
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        self.composed(x, layout, |storage| match storage {
            Storage::Cuda(storage) => Some(storage),
            _ => None,
        })
    }

    fn metal_fwd(
        &self,
        x: &MetalStorage,
        layout: &Layout,
    ) -> candle_core::Result<(MetalStorage, Shape)> {
        self.composed(x, layout, |storage| match storage {
            Storage::Metal(storage) => Some(storage),
            _ => None,
        })
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, g: &Tensor) -> candle_core::Result<Option<Tensor>> {
        if !x.track_op() {
            return Ok(None);
        }
        if one_pass(&[g, &self.weight]) {
            return for_real!(g, T => {
                let dx = read(g, |g| base_backward::<T>(g, &self.weight))?;
                tensor(dx, x.shape()).map(Some)
            });
        }
        let dx = flat(&g.contiguous()?)?.matmul(&self.weight)?;
        dx.reshape(x.shape()).map(Some)
    }
}

/// x Wᵀ + b + s (x Aᵀ) Bᵀ with gradients for x, A and B.
struct Lora<T> {
    weight: Tensor,
    bias: Option<Tensor>,
    shares: Vec<Share>,
    /// x Aᵀ of each share, for the gradient of B.
    down: OnceLock<Vec<Vec<T>>>,
}

/// The sizes of one call.
#[derive(Clone, Copy)]
struct Sizes {
    rows: usize,
    inputs: usize,
    out: usize,
    /// Σr.
    ranks: usize,
}

impl<T: Real> Lora<T> {
    fn sizes(&self, x: &[T], a: &[T]) -> candle_core::Result<Sizes> {
        let (out, inputs) = self.weight.dims2()?;
        Ok(Sizes {
            rows: x.len() / inputs.max(1),
            inputs,
            out,
            ranks: a.len() / inputs.max(1),
        })
    }

    fn forward(&self, x: &[T], a: &[T], b: &[T]) -> candle_core::Result<Vec<T>> {
        let sizes = self.sizes(x, a)?;
        let mut y = base_forward(x, &self.weight, self.bias.as_ref())?;
        let x = Matrix::new(x, sizes.rows, sizes.inputs);
        let down = self.each_share(&mut y, sizes.out, |at, y| {
            let share = &self.shares[at];
            let r = share.ranks.len();
            let a = share.a(a, sizes);
            let x = x.rows(share.rows.start, share.rows.len());
            // SAFETY: the first product writes all of (rows, r), the second adds to all of y.
            unsafe {
                let h = written(x.rows * r, |h| {
                    product(h, r, T::zero(), T::one(), x, a.t());
                });
                let (hs, b) = (Matrix::new(&h, x.rows, r), share.b(b, sizes));
                let s = T::of(share.scaling);
                product(y.as_mut_ptr(), sizes.out, T::one(), s, hs, b.t());
                h
            }
        });
        let _ = self.down.set(down);
        Ok(y)
    }

    /// Runs `f` for every share, by number, and its rows of `numbers`, on all threads.
    fn each_share<R: Send>(
        &self,
        mut numbers: &mut [T],
        cols: usize,
        f: impl Fn(usize, &mut [T]) -> R + Sync,
    ) -> Vec<R> {
        let (mut parts, mut done) = (Vec::new(), 0);
        for (at, share) in self.shares.iter().enumerate() {
            let (_, rest) = numbers.split_at_mut((share.rows.start - done) * cols);
            let (part, rest) = rest.split_at_mut(share.rows.len() * cols);
            parts.push((at, part));
            (numbers, done) = (rest, share.rows.end);
        }
        parts
            .into_par_iter()
            .map(|(at, part)| f(at, part))
            .collect()
    }

    fn backward(
        &self,
        [x, a, b]: [&[T]; 3],
        g: &[T],
        [for_x, for_a, for_b]: [bool; 3],
    ) -> candle_core::Result<[Option<Vec<T>>; 3]> {
        let Some(down) = self.down.get() else {
            bail!("internal: lora_linear's backward pass without its forward pass")
        };
        let sizes = self.sizes(x, a)?;
        let Sizes {
            rows,
            inputs,
            out,
            ranks,
        } = sizes;
        let (xs, gs) = (Matrix::new(x, rows, inputs), Matrix::new(g, rows, out));
        // s · g B, which A's gradient and x's have in common.
        let gb = self.shares.par_iter().map(|share| {
            let g = gs.rows(share.rows.start, share.rows.len());
            let (r, b) = (share.ranks.len(), share.b(b, sizes));
            // SAFETY: the product writes all of (rows, r).
            unsafe {
                written(g.rows * r, |gb| {
                    product(gb, r, T::zero(), T::of(share.scaling), g, b);
                })
            }
        });
        let gb: Vec<Vec<T>> = gb.collect();
        // Several shares may have one adapter: their gradients add up.
        let of_share = |share: &Share, thin| Matrix::new(thin, share.rows.len(), share.ranks.len());
        let da = for_a.then(|| {
            let mut da = vec![T::zero(); ranks * inputs];
            for (share, gb) in self.shares.iter().zip(&gb) {
                let x = xs.rows(share.rows.start, share.rows.len());
                let da = &mut da[share.ranks.start * inputs..];
                // SAFETY: the product adds to r rows of (Σr, in).
                unsafe {
                    let gb = of_share(share, gb);
                    product(da.as_mut_ptr(), inputs, T::one(), T::one(), gb.t(), x);
                }
            }
            da
        });
        let db = for_b.then(|| {
            let mut db = vec![T::zero(); out * ranks];
            for (share, h) in self.shares.iter().zip(down) {
                let g = gs.rows(share.rows.start, share.rows.len());
                let (h, s) = (of_share(share, h), T::of(share.scaling));
                let db = &mut db[share.ranks.start * out..];
                // SAFETY: the product adds to all of (out, r).
                unsafe { product(db.as_mut_ptr(), h.cols, T::one(), s, g.t(), h) }
            }
            db
        });
        let dx = for_x.then(|| -> candle_core::Result<Vec<T>> {
            let mut dx = base_backward(g, &self.weight)?;
            self.each_share(&mut dx, inputs, |at, dx| {
                let (share, a) = (&self.shares[at], self.shares[at].a(a, sizes));
                let gb = of_share(share, &gb[at]);
                // SAFETY: the product adds to all of the share's rows.
                unsafe { product(dx.as_mut_ptr(), inputs, T::one(), T::one(), gb, a) }
            });
            Ok(dx)
        });
        Ok([dx.transpose()?, da, db])
    }
}

impl Share {
    /// All rows with one adapter of rank `r`.
    pub(crate) fn all(rows: usize, r: usize, scaling: f64) -> Self {
        Self {
            rows: 0..rows,
            ranks: 0..r,
            scaling,
        }
    }

    /// Its rows of the stacked A: (r, in).
    fn a<'a, T>(&self, a: &'a [T], sizes: Sizes) -> Matrix<'a, T> {
        Matrix::new(a, sizes.ranks, sizes.inputs).rows(self.ranks.start, self.ranks.len())
    }

    /// Its B: (out, r).
    fn b<'a, T>(&self, b: &'a [T], sizes: Sizes) -> Matrix<'a, T> {
        Matrix::new(
            &b[self.ranks.start * sizes.out..],
            sizes.out,
            self.ranks.len(),
        )
    }
}

impl<T: Real> CustomOp3 for Lora<T> {
    fn name(&self) -> &'static str {
        "lora_linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let x = slice::<T>(x, x_layout)?;
        let y = self.forward(x, slice(a, a_layout)?, slice(b, b_layout)?)?;
        Ok((stored(y), output_shape(x_layout, self.weight.dims()[0])))
    }

    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _: &Tensor,
        g: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let wanted = [x, a, b].map(Tensor::track_op);
        let [dx, da, db] = read::<T, _>(x, |xs| {
            read(a, |a| {
                read(b, |b| read(g, |g| self.backward([xs, a, b], g, wanted)))
            })
        })?;
        let shaped = |numbers: Option<Vec<T>>, like: &Tensor| {
            numbers
                .map(|numbers| tensor(numbers, like.shape()))
                .transpose()
        };
        Ok((shaped(dx, x)?, shaped(da, a)?, shaped(db, b)?))
    }
}
