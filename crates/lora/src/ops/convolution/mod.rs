//! Convolutions and the LoRA product beside them, each as one node of the graph.

mod composed;
mod pass;
mod patches;

use std::sync::OnceLock;

use candle_core::{
    CpuStorage, CustomOp2, CustomOp3, Layout, Shape, Storage, Tensor, bail, conv::CudnnFwdAlgo,
};
use candle_nn::{Conv1dConfig, Conv2dConfig};

use self::pass::{Pass, Wanted};
use self::patches::Sizes;
use super::cpu::{
    Gradients, Held, Real, for_real, one_pass, read, second_order, slice, stored, tensor,
};
use super::{Share, check_alike, given};
use crate::{Error, Result};

/// How a convolution goes over its input, in one dimension or two.
#[derive(Clone, Copy, Debug)]
pub(crate) struct How {
    pub stride: usize,
    pub padding: usize,
    pub dilation: usize,
    pub groups: usize,
    algorithm: Option<CudnnFwdAlgo>,
}

macro_rules! how {
    ($config:ident) => {
        impl From<&$config> for How {
            fn from(config: &$config) -> Self {
                Self {
                    stride: config.stride,
                    padding: config.padding,
                    dilation: config.dilation,
                    groups: config.groups,
                    algorithm: config.cudnn_fwd_algo,
                }
            }
        }
    };
}
how!(Conv1dConfig);
how!(Conv2dConfig);

impl How {
    /// A's convolution, which sees all inputs.
    pub fn down(self) -> Self {
        Self { groups: 1, ..self }
    }

    /// B's, of kernel 1.
    pub fn up(self) -> Self {
        Self {
            stride: 1,
            padding: 0,
            dilation: 1,
            ..self
        }
    }
}

/// The convolution of pictures, y\[o\] = Σ W\[o, i\] ⋆ x\[i\] + b\[o\], with a gradient for each of x,
/// W and b that needs one and for no other.
///
/// On the CPU in f32 and f64 each picture's patches become the columns of a matrix, with which W is
/// multiplied; the backward pass makes them again rather than keep them, k² times the input. Sums
/// over the batch come out the same on any number of threads. Elsewhere the forward pass is
/// candle's, with gradients that are right for every stride and padding, as candle's own are not.
///
/// # Shapes
///
/// x (batch, in, height, width), `weight` W (out, in / groups, kh, kw), `bias` b (out);
/// → (batch, out, ⌊(height + 2 padding − dilation (kh − 1) − 1) / stride⌋ + 1, the same of width).
///
/// # Errors
///
/// [`Error::Operation`] when the tensors do not fit each other or `config`.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use candle_nn::Conv2dConfig;
/// use lora::ops::conv2d;
///
/// let x = Tensor::new(&[[[[1f32, 2., 3.], [4., 5., 6.]]]], &Device::Cpu)?;
/// let w = Var::new(&[[[[1f32, 10.]]]], &Device::Cpu)?;
/// let y = conv2d(&x, &w, None, &Conv2dConfig::default())?;
/// assert_eq!(y.flatten_all()?.to_vec1::<f32>()?, [21., 32., 54., 65.]);
///
/// let gradients = y.sum_all()?.backward()?;
/// let dw = gradients.get(&w).unwrap().flatten_all()?;
/// assert_eq!(dw.to_vec1::<f32>()?, [1. + 2. + 4. + 5., 2. + 3. + 5. + 6.]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn conv2d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    config: &Conv2dConfig,
) -> Result<Tensor> {
    checked("conv2d", x, weight, bias, config.into(), 4)?;
    convolution(x, weight, bias, config.into())
}

/// [`conv2d`] over lines: x (batch, in, length), W (out, in / groups, k).
///
/// # Errors
///
/// As [`conv2d`].
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_nn::Conv1dConfig;
/// use lora::ops::conv1d;
///
/// let x = Tensor::new(&[[[1f32, 2., 3.]]], &Device::Cpu)?;
/// let w = Tensor::new(&[[[1f32, 10.]]], &Device::Cpu)?;
/// let padded = Conv1dConfig { padding: 1, ..Default::default() };
/// let y = conv1d(&x, &w, None, &padded)?;
/// assert_eq!(y.to_vec3::<f32>()?, [[[10., 21., 32., 3.]]]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn conv1d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    config: &Conv1dConfig,
) -> Result<Tensor> {
    checked("conv1d", x, weight, bias, config.into(), 3)?;
    convolution(x, weight, bias, config.into())
}

/// y = conv(x, W) + b + s · conv₁(conv(x, A), B), the output of a convolution with LoRA.
///
/// A has W's kernel, stride, padding and dilation and sees all inputs; B has a kernel of 1 × 1 and
/// W's groups. On the CPU in f32 and f64 W and A share the patches, their gradients of x are one,
/// and B A is never formed. Elsewhere, with A and B in another type than x, and where W or b trains,
/// this is [`conv2d`] three times.
///
/// # Shapes
///
/// As [`conv2d`], and `lora_a` A (r, in, kh, kw), `lora_b` B (out, r / groups, 1, 1).
///
/// # Errors
///
/// [`Error::Operation`] when the tensors do not fit each other or `config`.
///
/// Source: PEFT `tuners/lora/layer.py`, `Conv2d`.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use candle_nn::Conv2dConfig;
/// use lora::ops::lora_conv2d;
///
/// let x = Tensor::new(&[[[[1f32, 2., 3.], [4., 5., 6.]]]], &Device::Cpu)?;
/// let w = Tensor::new(&[[[[1f32, 10.]]]], &Device::Cpu)?;
/// let (a, b) = (Var::new(&[[[[0f32, 1.]]]], &Device::Cpu)?, Var::new(&[[[[3f32]]]], &Device::Cpu)?);
/// let y = lora_conv2d(&x, &w, None, &a, &b, 2.0, &Conv2dConfig::default())?;
/// // s · B A = [0, 6] beside W = [1, 10].
/// assert_eq!(y.flatten_all()?.to_vec1::<f32>()?, [33., 50., 84., 101.]);
///
/// let gradients = y.sum_all()?.backward()?;
/// assert!(gradients.get(&w).is_none());
/// let db = gradients.get(&b).unwrap().flatten_all()?;
/// assert_eq!(db.to_vec1::<f32>()?, [2. * (2. + 3. + 5. + 6.)]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn lora_conv2d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    lora_a: &Tensor,
    lora_b: &Tensor,
    scaling: f64,
    config: &Conv2dConfig,
) -> Result<Tensor> {
    let how: How = config.into();
    let sizes = checked("lora_conv2d", x, weight, bias, how, 4)?;
    let r = lora_a.dims().first().copied().unwrap_or(0);
    let [kh, kw] = sizes.kernel;
    let fits = r.is_multiple_of(how.groups)
        && lora_a.dims() == [r, sizes.inputs, kh, kw]
        && lora_b.dims() == [sizes.out, r / how.groups, 1, 1];
    if !fits || lora_a.dtype() != lora_b.dtype() {
        return Err(Error::Operation {
            op: "lora_conv2d",
            given: given(&[("W", weight), ("A", lora_a), ("B", lora_b)]),
            wants: format!(
                "A must be [r, {}, {kh}, {kw}] and B [{}, r / {}, 1, 1], of one type",
                sizes.inputs, sizes.out, how.groups
            ),
        });
    }
    let share = Share::all(sizes.batch * sizes.pixels(), r, scaling);
    if let Some(y) = convolution_shares(x, weight, bias, lora_a, lora_b, vec![share], how)? {
        return Ok(y);
    }
    let y = convolution(x, weight, bias, how)?.to_dtype(lora_a.dtype())?;
    let h = convolution(&x.to_dtype(lora_a.dtype())?, lora_a, None, how.down())?;
    let thin = (convolution(&h, lora_b, None, how.up())? * scaling)?;
    Ok((y + thin)?.to_dtype(x.dtype())?)
}

fn checked(
    op: &'static str,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    how: How,
    rank: usize,
) -> Result<Sizes> {
    let mut all = vec![("x", x), ("W", weight)];
    all.extend(bias.map(|bias| ("b", bias)));
    check_alike(op, &all)?;
    let sizes = Sizes::of(x.dims(), weight.dims(), how).filter(|_| x.rank() == rank);
    let out = weight.dims().first().copied().unwrap_or(0);
    match sizes {
        Some(sizes) if bias.is_none_or(|bias| bias.dims() == [out]) => Ok(sizes),
        _ => {
            let (size, kernel) = match rank {
                3 => ("length", "k"),
                _ => ("height, width", "kh, kw"),
            };
            Err(Error::Operation {
                op,
                given: format!("{} and {how}", given(&all)),
                wants: format!(
                    "x must be [batch, in, {size}], W [out, in / groups, {kernel}] and b [out], \
                     with sizes at least 1, out a multiple of groups, stride and dilation at \
                     least 1, and x with its padding no smaller than the kernel"
                ),
            })
        }
    }
}

impl std::fmt::Display for How {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            stride,
            padding,
            dilation,
            groups,
            ..
        } = self;
        write!(
            f,
            "stride {stride}, padding {padding}, dilation {dilation}, groups {groups}"
        )
    }
}

/// [`conv1d`] or [`conv2d`] of tensors that fit each other.
pub(crate) fn convolution(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    how: How,
) -> Result<Tensor> {
    let (x, w) = (x.contiguous()?, weight.contiguous()?);
    if !one_pass(&[&x, &w]) {
        let y = match second_order() {
            true => composed::looked_up(&x, &w, &fitting(&x, &w, how)?)?,
            false => composed::convolution(&x, &w, how)?,
        };
        return match bias {
            Some(bias) => {
                let mut dims = vec![1; x.rank()];
                dims[1] = bias.elem_count();
                Ok(y.broadcast_add(&bias.reshape(dims)?)?)
            }
            None => Ok(y),
        };
    }
    let plain = Plain(fitting(&x, &w, how)?);
    Ok(match bias {
        Some(bias) => x.apply_op3(&w, &bias.contiguous()?, plain)?,
        None => x.apply_op2(&w, plain)?,
    })
}

/// [`lora_conv2d`], of lines too, where different images have different adapters: A (Σr, in, …)
/// holds theirs one after the other, and so does B with the numbers of each. Nothing where it cannot
/// be one pass, or where W or b trains.
///
/// The shares count the pixels of the input. They must be of whole images, in order, and must not
/// overlap; images of none get the base's output.
pub(crate) fn convolution_shares(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    lora_a: &Tensor,
    lora_b: &Tensor,
    mut shares: Vec<Share>,
    how: How,
) -> Result<Option<Tensor>> {
    let trains = weight.track_op() || bias.is_some_and(Tensor::track_op);
    if trains || !one_pass(&[x, weight, lora_a, lora_b]) {
        return Ok(None);
    }
    let (x, a, b) = (x.contiguous()?, lora_a.contiguous()?, lora_b.contiguous()?);
    let sizes = fitting(&x, weight, how)?;
    for share in &mut shares {
        let (start, end) = (share.rows.start, share.rows.end);
        share.rows = start / sizes.pixels()..end / sizes.pixels();
    }
    let y = for_real!(x, T => {
        let op = Lora::<T> {
            sizes,
            weight: weight.contiguous()?,
            bias: bias.map(Tensor::contiguous).transpose()?,
            shares,
            thin: OnceLock::new(),
        };
        x.apply_op3(&a, &b, op)?
    });
    Ok(Some(y))
}

fn fitting(x: &Tensor, w: &Tensor, how: How) -> candle_core::Result<Sizes> {
    match Sizes::of(x.dims(), w.dims(), how) {
        Some(sizes) => Ok(sizes),
        None => bail!(
            "a convolution of {:?} with the kernel {:?} and {how} cannot be computed",
            x.dims(),
            w.dims()
        ),
    }
}

/// The gradient of `like`, where there is one.
fn shaped<T: Real>(
    wanted: bool,
    numbers: Vec<T>,
    like: &Tensor,
) -> candle_core::Result<Option<Tensor>> {
    wanted.then(|| tensor(numbers, like.shape())).transpose()
}

/// A convolution, with or without a bias.
struct Plain(Sizes);

impl Plain {
    fn forward(
        &self,
        (x, x_layout): Held<'_>,
        (w, w_layout): Held<'_>,
        bias: Option<Held<'_>>,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        for_real!(x, T => {
            let bias = bias.map(|(b, layout)| slice::<T>(b, layout)).transpose()?;
            let pass = Pass::plain(self.0, slice(x, x_layout)?, slice(w, w_layout)?);
            Ok((stored(pass.forward(bias).0), self.0.output_shape(x_layout.dims().len()).into()))
        })
    }

    fn gradients(
        &self,
        x: &Tensor,
        w: &Tensor,
        bias: Option<&Tensor>,
        g: &Tensor,
    ) -> candle_core::Result<Gradients> {
        let wanted = Wanted {
            x: x.track_op(),
            w: w.track_op(),
            bias: bias.is_some_and(Tensor::track_op),
            a: false,
            b: false,
        };
        for_real!(g, T => {
            let (dx, sums) = read::<T, _>(x, |x| read(w, |w| read(g, |g| {
                Ok(Pass::plain(self.0, x, w).backward(g, &[], wanted))
            })))?;
            let db = bias.map(|bias| shaped(wanted.bias, sums.bias, bias)).transpose()?;
            Ok((shaped(wanted.x, dx, x)?, shaped(wanted.w, sums.w, w)?, db.flatten()))
        })
    }
}

impl CustomOp2 for Plain {
    fn name(&self) -> &'static str {
        "convolution"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        w: &CpuStorage,
        w_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.forward((x, x_layout), (w, w_layout), None)
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

impl CustomOp3 for Plain {
    fn name(&self) -> &'static str {
        "convolution"
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
        self.forward((x, x_layout), (w, w_layout), Some((b, b_layout)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _: &Tensor,
        g: &Tensor,
    ) -> candle_core::Result<Gradients> {
        self.gradients(x, w, Some(b), g)
    }
}

/// A frozen convolution and pairs beside it, with gradients for x, A and B.
struct Lora<T> {
    sizes: Sizes,
    weight: Tensor,
    bias: Option<Tensor>,
    shares: Vec<Share>,
    /// A times the patches, for the gradient of B.
    thin: OnceLock<Vec<Vec<T>>>,
}

impl<T: Real> Lora<T> {
    /// Runs `f` with everything but the bias.
    fn with<R>(
        &self,
        [x, a, b]: [&[T]; 3],
        f: impl FnOnce(Pass<'_, T>) -> candle_core::Result<R>,
    ) -> candle_core::Result<R> {
        let (storage, layout) = self.weight.storage_and_layout();
        let Storage::Cpu(storage) = &*storage else {
            bail!("internal: a one-pass operation got a weight of another device")
        };
        f(Pass {
            sizes: self.sizes,
            x,
            w: slice(storage, layout)?,
            a,
            b,
            shares: &self.shares,
        })
    }
}

impl<T: Real> CustomOp3 for Lora<T> {
    fn name(&self) -> &'static str {
        "lora_convolution"
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
        let all = [
            slice(x, x_layout)?,
            slice(a, a_layout)?,
            slice(b, b_layout)?,
        ];
        let (y, thin) = self.with(all, |pass| match &self.bias {
            Some(bias) => read(bias, |bias| Ok(pass.forward(Some(bias)))),
            None => Ok(pass.forward(None)),
        })?;
        let _ = self.thin.set(thin);
        Ok((
            stored(y),
            self.sizes.output_shape(x_layout.dims().len()).into(),
        ))
    }

    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _: &Tensor,
        g: &Tensor,
    ) -> candle_core::Result<Gradients> {
        let Some(thin) = self.thin.get() else {
            bail!("internal: the backward pass of a convolution without its forward pass")
        };
        let wanted = Wanted {
            x: x.track_op(),
            w: false,
            bias: false,
            a: a.track_op(),
            b: b.track_op(),
        };
        let (dx, sums) = read(x, |x| {
            read(a, |a| {
                read(b, |b| {
                    read(g, |g| {
                        self.with([x, a, b], |pass| Ok(pass.backward(g, thin, wanted)))
                    })
                })
            })
        })?;
        Ok((
            shaped(wanted.x, dx, x)?,
            shaped(wanted.a, sums.a, a)?,
            shaped(wanted.b, sums.b, b)?,
        ))
    }
}
