//! The linear layer and the LoRA product beside it, each as one node of the graph.

use std::ops::Range;
use std::sync::OnceLock;

use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp2, CustomOp3, DType, Layout, MetalStorage, Shape, Storage,
    Tensor, bail,
};
use rayon::iter::{IntoParallelIterator, IntoParallelRefIterator, ParallelIterator};

use super::cpu::{
    Gradients, Held, Matrix, Real, column_sums, for_real, one_pass, product, read, slice, stored,
    tensor, written,
};
use super::frozen::{Frozen, runs_as_one_pass};
use super::given;
use crate::quant::Weight;
use crate::{Error, Result};

/// y = x Wᵀ + b, with a gradient for each of x, W and b that needs one and for no other.
///
/// With g the gradient of y: dx = g W, dW = gᵀ x, db = the sum of g's rows. candle's own product
/// computes dx and dW whatever trains, each at the cost of the forward pass: here a frozen W costs
/// none, nor does the input of the first layer. dW and db come out the same on any number of
/// threads.
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
/// use lora::ops::linear;
///
/// let x = Var::new(&[[1f32, 2.]], &Device::Cpu)?;
/// let w = Tensor::new(&[[3f32, 4.], [5., 6.], [7., 8.]], &Device::Cpu)?;
/// let y = linear(&x, &w, None)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[11., 17., 23.]]);
///
/// let gradients = y.sum_all()?.backward()?;
/// assert_eq!(gradients.get(&x).unwrap().to_vec2::<f32>()?, [[15., 18.]]);
/// assert!(gradients.get(&w).is_none());
///
/// let w = Var::from_tensor(&w)?;
/// let gradients = linear(&x, &w, None)?.sum_all()?.backward()?;
/// assert_eq!(gradients.get(&w).unwrap().to_vec2::<f32>()?, [[1., 2.]; 3]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    check_base("linear", x, weight, bias)?;
    let (one_pass, x) = (one_pass(&[x, weight]), x.contiguous()?);
    Ok(match bias {
        // Where the product cannot start from the bias, it is added.
        Some(bias) if one_pass => x.apply_op3(weight, &bias.contiguous()?, Product)?,
        Some(bias) => x.apply_op2(weight, Product)?.broadcast_add(bias)?,
        None => x.apply_op2(weight, Product)?,
    })
}

/// y = x Wᵀ + b + s · (x Aᵀ) Bᵀ, the output of a linear layer with LoRA.
///
/// On the CPU in f32 and f64 both products go into one buffer, and so do the two parts of x's
/// gradient; B A is never formed. Elsewhere, and with A and B in another type than x, this is
/// [`linear()`] and candle's products beside it; so it is where W or b trains.
///
/// The gradients, with g that of y: dA = s (g B)ᵀ x, dB = s gᵀ (x Aᵀ), dx = g W + s (g B) A.
/// That of x is computed only where x needs it, and those of W and b, as [`linear()`] has them,
/// where they train.
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
    let rows = x.elem_count() / inputs.max(1);
    let share = Share::all(rows, lora_a.dims()[0], scaling);
    if let Some(y) = lora_shares(x, weight.into(), bias, lora_a, lora_b, vec![share])? {
        return Ok(y);
    }
    let y = linear(x, weight, bias)?.to_dtype(lora_a.dtype())?;
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
/// the other, and so does B with each (out, r) row by row. Nothing where it cannot be one pass, or
/// where W or b trains.
///
/// The shares must be in order and must not overlap; rows of none get the base's output.
pub(crate) fn lora_shares(
    x: &Tensor,
    weight: Weight<'_>,
    bias: Option<&Tensor>,
    lora_a: &Tensor,
    lora_b: &Tensor,
    shares: Vec<Share>,
) -> Result<Option<Tensor>> {
    let trains = weight.track_op() || bias.is_some_and(Tensor::track_op);
    if trains || !runs_as_one_pass(x, weight) || !one_pass(&[x, lora_a, lora_b]) {
        return Ok(None);
    }
    let like_x = |bias: &Tensor| bias.to_dtype(x.dtype())?.contiguous();
    let bias = bias.map(like_x).transpose()?;
    let (x, a, b) = (x.contiguous()?, lora_a.contiguous()?, lora_b.contiguous()?);
    let y = for_real!(x, T => {
        let op = Lora::<T> {
            weight: weight.into(),
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
pub(super) fn flat(x: &Tensor) -> candle_core::Result<Tensor> {
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
pub(super) fn matrix<'a, T: Real>(
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
pub(super) fn started<T: Real>(rows: usize, cols: usize, first: Option<&[T]>) -> (Vec<T>, T) {
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
pub(super) fn base_forward<T: Real>(x: &[T], w: Matrix<'_, T>, bias: Option<&[T]>) -> Vec<T> {
    let (rows, out) = (x.len() / w.cols.max(1), w.rows);
    let (mut y, keep) = started(rows, out, bias);
    let x = Matrix::new(x, rows, w.cols);
    // SAFETY: the buffer has room for (rows, out) and holds numbers where they are kept; the
    // product writes all of it.
    unsafe {
        product(y.as_mut_ptr(), out, keep, T::one(), x, w.t());
        y.set_len(rows * out);
    }
    y
}

/// g W.
pub(super) fn base_backward<T: Real>(g: &[T], w: Matrix<'_, T>) -> Vec<T> {
    let rows = g.len() / w.rows.max(1);
    let g = Matrix::new(g, rows, w.rows);
    // SAFETY: the product writes all of (rows, in).
    unsafe {
        written(rows * w.cols, |dx| {
            product(dx, w.cols, T::zero(), T::one(), g, w);
        })
    }
}

/// gᵀ x.
fn weight_backward<T: Real>(g: &[T], x: &[T], out: usize, inputs: usize) -> Vec<T> {
    let rows = x.len() / inputs.max(1);
    let (g, x) = (Matrix::new(g, rows, out), Matrix::new(x, rows, inputs));
    // SAFETY: the product writes all of (out, in).
    unsafe {
        written(out * inputs, |dw| {
            product(dw, inputs, T::zero(), T::one(), g.t(), x);
        })
    }
}

/// x Wᵀ, or x Wᵀ + b, as a node of the graph.
pub(super) struct Product;

impl Product {
    fn on_cpu(
        (x, x_layout): Held<'_>,
        (w, w_layout): Held<'_>,
        bias: Option<Held<'_>>,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        if !matches!(x.dtype(), DType::F32 | DType::F64) {
            return Self::composed(x, x_layout, w, w_layout);
        }
        for_real!(x, T => {
            let (w, bias) = (matrix::<T>(w, w_layout)?, bias.map(|b| slice(b.0, b.1)).transpose()?);
            let y = base_forward(slice(x, x_layout)?, w, bias);
            Ok((stored(y), output_shape(x_layout, w.rows)))
        })
    }

    /// The product by the backend's own means.
    pub(super) fn composed<S: BackendStorage>(
        x: &S,
        x_layout: &Layout,
        w: &S,
        w_layout: &Layout,
    ) -> candle_core::Result<(S, Shape)> {
        let (out, inputs) = w_layout.shape().dims2()?;
        let rows = x_layout.shape().elem_count() / inputs.max(1);
        let flat = Layout::contiguous_with_offset((rows, inputs), x_layout.start_offset());
        let turned = w_layout.transpose(0, 1)?;
        let y = x.matmul(w, (1, rows, out, inputs), &flat, &turned)?;
        Ok((y, output_shape(x_layout, out)))
    }

    fn gradients(
        x: &Tensor,
        w: &Tensor,
        b: Option<&Tensor>,
        g: &Tensor,
    ) -> candle_core::Result<Gradients> {
        let (for_x, for_w) = (x.track_op(), w.track_op());
        let for_b = b.is_some_and(Tensor::track_op);
        let (out, inputs) = w.dims2()?;
        if !one_pass(&[g, w]) {
            // Of candle's operations, which have gradients of their own.
            let g = flat(&g.contiguous()?)?;
            let dx = for_x.then(|| g.matmul(w)?.reshape(x.shape())).transpose()?;
            let dw = for_w.then(|| g.t()?.matmul(&flat(x)?)).transpose()?;
            let db = for_b.then(|| g.sum(0)).transpose()?;
            return Ok((dx, dw, db));
        }
        for_real!(g, T => read::<T, _>(g, |g| {
            let dx = for_x.then(|| {
                tensor(with_matrix(w, |w| Ok(base_backward(g, w)))?, x.shape())
            });
            let dw = for_w.then(|| {
                let dw = read::<T, _>(x, |x| Ok(weight_backward(g, x, out, inputs)))?;
                tensor(dw, (out, inputs))
            });
            let db = for_b.then(|| tensor(column_sums(g, out), out));
            Ok((dx.transpose()?, dw.transpose()?, db.transpose()?))
        }))
    }
}

pub(super) fn output_shape(x: &Layout, out: usize) -> Shape {
    let mut dims = x.dims().to_vec();
    if let Some(last) = dims.last_mut() {
        *last = out;
    }
    dims.into()
}

impl CustomOp2 for Product {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        w: &CpuStorage,
        w_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        Self::on_cpu((x, x_layout), (w, w_layout), None)
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        w: &CudaStorage,
        w_layout: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        Self::composed(x, x_layout, w, w_layout)
    }

    fn metal_fwd(
        &self,
        x: &MetalStorage,
        x_layout: &Layout,
        w: &MetalStorage,
        w_layout: &Layout,
    ) -> candle_core::Result<(MetalStorage, Shape)> {
        Self::composed(x, x_layout, w, w_layout)
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _: &Tensor,
        g: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let (dx, dw, _) = Self::gradients(x, w, None, g)?;
        Ok((dx, dw))
    }
}

/// On the CPU in f32 and f64 alone.
impl CustomOp3 for Product {
    fn name(&self) -> &'static str {
        "linear"
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
        Self::on_cpu((x, x_layout), (w, w_layout), Some((b, b_layout)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _: &Tensor,
        g: &Tensor,
    ) -> candle_core::Result<Gradients> {
        Self::gradients(x, w, Some(b), g)
    }
}

/// x Wᵀ + b + s (x Aᵀ) Bᵀ with gradients for x, A and B.
struct Lora<T> {
    weight: Frozen,
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
        let mut y = match &self.bias {
            Some(bias) => read(bias, |bias| self.weight.forward(x, Some(bias)))?,
            None => self.weight.forward(x, None)?,
        };
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
            let mut dx = self.weight.backward(g)?;
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
        Ok((stored(y), output_shape(x_layout, self.weight.dims2()?.0)))
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
