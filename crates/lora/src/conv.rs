//! The convolutions as bases.

use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp2, Layout, MetalStorage, Shape, Storage, Tensor, bail,
};
use candle_nn::{Conv1d, Conv1dConfig, Conv2d, Conv2dConfig, Module};

use crate::Result;
use crate::base::{Keys, filled, sealed};

/// A [`candle_nn::Conv1d`] with trainable low-rank updates beside it.
///
/// y = conv(x, W) + b + s · conv₁(conv(x, A), B): A keeps the base's kernel, stride, padding and
/// dilation, B has a kernel of 1. See [`LoraLayer`](crate::LoraLayer) for everything it can do.
///
/// # Shapes
///
/// W (out, in / groups, k), A (r, in, k), B (out, r / groups, 1); input (batch, in, length).
///
/// Source: PEFT `tuners/lora/layer.py`, `Conv1d`.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{Conv1d, Conv1dConfig, Module};
/// use lora::{LoraConfig, LoraConv1d};
/// use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
///
/// let stride2 = Conv1dConfig { stride: 2, padding: 1, ..Default::default() };
/// let base = Conv1d::new(Tensor::ones((4, 3, 3), DType::F32, &Device::Cpu)?, None, stride2);
/// let mut rng = ChaCha8Rng::seed_from_u64(1);
/// let layer = LoraConv1d::new("conv", base, &LoraConfig::new(2, 4.0), &mut rng)?;
/// assert_eq!(layer.lora_a()?.dims(), [2, 3, 3]);
/// assert_eq!(layer.lora_b()?.dims(), [4, 2, 1]);
/// let y = layer.forward(&Tensor::ones((1, 3, 8), DType::F32, &Device::Cpu)?)?;
/// assert_eq!(y.dims(), [1, 4, 4]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub type LoraConv1d = crate::LoraLayer<Conv1d>;

/// A [`candle_nn::Conv2d`] with trainable low-rank updates beside it.
///
/// y = conv(x, W) + b + s · conv₁(conv(x, A), B): A keeps the base's kernel, stride, padding and
/// dilation, B has a kernel of 1 × 1. Two thin convolutions cost less than one with the whole
/// ΔW\[o, i, k, l\] = s Σ_r B\[o, r\] A\[r, i, k, l\], and give the same.
///
/// With groups > 1 A is not grouped and B is, as in PEFT: r must be a multiple of groups, and
/// since every output sees all inputs through A there is no ΔW of the base's shape; merging is
/// refused. See [`LoraLayer`](crate::LoraLayer) for everything else.
///
/// # Shapes
///
/// W (out, in / groups, k, k), A (r, in, k, k), B (out, r / groups, 1, 1); input
/// (batch, in, height, width).
///
/// Source: PEFT `tuners/lora/layer.py`, `Conv2d`; PEFT 0.21 forgets the dilation
/// (huggingface/peft#3697), here it counts.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{Conv2d, Conv2dConfig, Module};
/// use lora::{LoraConfig, LoraConv2d};
/// use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
///
/// let w = Tensor::ones((64, 3, 3, 3), DType::F32, &Device::Cpu)?;
/// let base = Conv2d::new(w, None, Conv2dConfig::default());
/// let mut rng = ChaCha8Rng::seed_from_u64(1);
/// let layer = LoraConv2d::new("conv", base, &LoraConfig::new(4, 8.0), &mut rng)?;
/// let y = layer.forward(&Tensor::ones((1, 3, 32, 32), DType::F32, &Device::Cpu)?)?;
/// assert_eq!(y.dims(), [1, 64, 30, 30]);
/// assert_eq!(layer.to_string(), "LoraConv2d(conv: 3 → 64, r = 4, scaling = 2, 364 trainable)");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub type LoraConv2d = crate::LoraLayer<Conv2d>;

/// One convolution: the rank of its tensors and how to build and describe it.
macro_rules! convolution {
    ($conv:ident, $config:ident, $layer:literal, $rank:literal, $weight:literal,
     $input:literal) => {
        impl sealed::Base for $conv {
            const LAYER: &'static str = $layer;
            const KEYS: Keys = Keys::WEIGHTS;

            fn weight(&self) -> &Tensor {
                $conv::weight(self)
            }

            fn bias(&self) -> Option<&Tensor> {
                $conv::bias(self)
            }

            fn with(&self, weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
                Ok($conv::new(weight, bias, *self.config()))
            }

            fn refused_shape(&self) -> Option<&'static str> {
                let weight = $conv::weight(self);
                let config = self.config();
                let good = weight.rank() == $rank
                    && filled(weight)
                    && config.stride > 0
                    && config.dilation > 0
                    && config.groups > 0
                    && [config.stride, config.padding, config.dilation]
                        .iter()
                        .all(|n| *n < 1 << 32)
                    && weight.dims()[0].is_multiple_of(config.groups);
                (!good).then_some($weight)
            }

            fn out(&self) -> usize {
                $conv::weight(self).dims()[0]
            }

            fn inputs(&self) -> usize {
                $conv::weight(self).dims()[1] * self.groups()
            }

            fn fan_in(&self) -> usize {
                $conv::weight(self).dims()[2..].iter().product::<usize>() * self.inputs()
            }

            fn groups(&self) -> usize {
                self.config().groups
            }

            fn refused_input(&self, x: &Tensor) -> Option<String> {
                let config = self.config();
                let kernel = &$conv::weight(self).dims()[2..];
                let fits = x.rank() == $rank && x.dims()[1] == self.inputs();
                if !fits {
                    return Some(format!($input, self.inputs()));
                }
                let narrow = x.dims()[2..].iter().zip(kernel).any(|(size, k)| {
                    let padded = size.saturating_add(config.padding.saturating_mul(2));
                    padded < (k - 1).saturating_mul(config.dilation).saturating_add(1)
                });
                if narrow || !filled(x) {
                    return Some(format!(
                        "every size must be at least 1 and, with padding {}, no smaller than the \
                         kernel, which spans {:?}",
                        config.padding,
                        kernel
                            .iter()
                            .map(|k| (k - 1) * config.dilation + 1)
                            .collect::<Vec<_>>()
                    ));
                }
                None
            }

            fn flat(&self, x: &Tensor) -> Result<Tensor> {
                // candle's convolution and its gradient want their input in one piece.
                Ok(x.contiguous()?)
            }

            fn unflat(&self, y: Tensor, _: &Tensor) -> Result<Tensor> {
                Ok(y)
            }

            fn flat_output(&self, y: &Tensor) -> Result<Tensor> {
                Ok(y.clone())
            }

            fn forward(&self, x: &Tensor) -> Result<Tensor> {
                let y = product(self, x)?;
                match $conv::bias(self) {
                    Some(bias) => Ok(y.broadcast_add(&self.over_output(bias)?)?),
                    None => Ok(y),
                }
            }

            fn a_shape(&self, r: usize) -> Vec<usize> {
                let kernel = &$conv::weight(self).dims()[2..];
                [&[r, self.inputs()], kernel].concat()
            }

            fn b_shape(&self, r: usize) -> Vec<usize> {
                [&[self.out(), r / self.groups()][..], &[1; $rank - 2]].concat()
            }

            fn magnitude_shape(&self) -> Vec<usize> {
                [&[1, self.out()][..], &[1; $rank - 2]].concat()
            }

            fn down(&self, x: &Tensor, a: &Tensor) -> Result<Tensor> {
                let thin = $config {
                    groups: 1,
                    ..*self.config()
                };
                product(&$conv::new(a.clone(), None, thin), x)
            }

            fn up(&self, h: &Tensor, b: &Tensor) -> Result<Tensor> {
                let point = $config {
                    groups: self.groups(),
                    ..Default::default()
                };
                product(&$conv::new(b.clone(), None, point), h)
            }

            fn to_weight_layout(&self, product: Tensor) -> Result<Tensor> {
                Ok(product.reshape($conv::weight(self).shape())?)
            }

            fn to_matrix(&self, weight: &Tensor) -> Result<Tensor> {
                Ok(weight.flatten_from(1)?)
            }

            fn over_output(&self, v: &Tensor) -> Result<Tensor> {
                Ok(v.reshape(self.magnitude_shape())?)
            }
        }

        impl Convolution for $conv {
            fn computed(&self, x: &Tensor, w: &Tensor) -> Result<Tensor> {
                let bare = $conv::new(w.clone(), None, *self.config());
                Ok(Module::forward(&bare, x)?)
            }

            fn graph(&self, y: Tensor) -> Graph {
                let config = self.config();
                Graph {
                    y,
                    stride: config.stride,
                    padding: config.padding,
                    dilation: config.dilation,
                    groups: config.groups,
                }
            }
        }
    };
}

convolution!(
    Conv1d,
    Conv1dConfig,
    "LoraConv1d",
    3,
    "[out, in / groups, kernel] with sizes at least 1, out a multiple of groups, stride and \
     dilation at least 1 and, like the padding, below 2^32",
    "it must be [batch, {}, length]"
);
convolution!(
    Conv2d,
    Conv2dConfig,
    "LoraConv2d",
    4,
    "[out, in / groups, kernel, kernel] with sizes at least 1, out a multiple of groups, stride \
     and dilation at least 1 and, like the padding, below 2^32",
    "it must be [batch, {}, height, width]"
);

trait Convolution: sealed::Base {
    /// The convolution of two plain tensors, without the bias.
    fn computed(&self, x: &Tensor, w: &Tensor) -> Result<Tensor>;
    fn graph(&self, y: Tensor) -> Graph;
}

/// The convolution without its bias, with a gradient that is right.
fn product<C: Convolution>(conv: &C, x: &Tensor) -> Result<Tensor> {
    // On the CPU candle's Conv1d computes something else with a kernel that is not in one piece.
    let (x, w) = (x.contiguous()?, conv.weight().contiguous()?);
    let y = conv.computed(&x.detach(), &w.detach())?;
    if x.track_op() || w.track_op() {
        Ok(x.apply_op2(&w, conv.graph(y))?)
    } else {
        Ok(y)
    }
}

/// A convolution that candle has computed, as a node of the graph.
///
/// candle 0.11.1's own gradients cannot be used: on the CPU Conv1d's are wrong for a batch above
/// 1 (the kernel's always, the input's without padding and dilation); Conv2d's fail where height
/// and width leave different remainders of the stride; both overflow for an input shorter than the
/// padding. They also compute the gradient of a frozen kernel, at the cost of the forward pass.
struct Graph {
    y: Tensor,
    stride: usize,
    padding: usize,
    dilation: usize,
    groups: usize,
}

impl Graph {
    /// The transposed convolution, cut to the input's sizes `dims`.
    fn input_gradient(
        &self,
        g: &Tensor,
        w: &Tensor,
        dims: &[usize],
    ) -> candle_core::Result<Tensor> {
        let (s, p, d) = (self.stride, self.padding, self.dilation);
        let left = (2..dims.len()).map(|i| {
            let reached = (g.dims()[i] - 1) * s + (w.dims()[i] - 1) * d + 1;
            dims[i] + 2 * p - reached
        });
        // One more than needed: with no padding of any kind candle's transposed Conv1d mixes up
        // the batch on the CPU.
        let extra = left.max().unwrap_or(0) + 1;
        let mut whole = match dims.len() {
            3 => g.conv_transpose1d(w, 0, extra, s, d, 1)?,
            _ => g.conv_transpose2d(w, 0, extra, s, d)?,
        };
        for (i, size) in dims.iter().enumerate().skip(2) {
            whole = whole.narrow(i, p, *size)?;
        }
        whole.contiguous()
    }

    /// The input convolved with the output's gradient, stride and dilation exchanged.
    fn kernel_gradient(
        &self,
        g: &Tensor,
        x: &Tensor,
        dims: &[usize],
    ) -> candle_core::Result<Tensor> {
        let (s, p, d) = (self.stride, self.padding, self.dilation);
        let turned = |t: &Tensor| t.transpose(0, 1)?.contiguous();
        let (x, g) = (turned(x)?, turned(g)?);
        let mut whole = match dims.len() {
            3 => x.conv1d(&g, p, d, s, 1)?,
            _ => x.conv2d(&g, p, d, s, 1)?,
        };
        for (i, size) in dims.iter().enumerate().skip(2) {
            whole = whole.narrow(i, 0, *size)?;
        }
        turned(&whole)
    }
}

impl CustomOp2 for Graph {
    fn name(&self) -> &'static str {
        "convolution"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (storage, layout) = self.y.storage_and_layout();
        match &*storage {
            Storage::Cpu(y) => Ok((y.try_clone(layout)?, layout.shape().clone())),
            _ => bail!("a convolution on the CPU whose output is elsewhere"),
        }
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        let (storage, layout) = self.y.storage_and_layout();
        match &*storage {
            Storage::Cuda(y) => Ok((y.try_clone(layout)?, layout.shape().clone())),
            _ => bail!("a convolution on CUDA whose output is elsewhere"),
        }
    }

    fn metal_fwd(
        &self,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> candle_core::Result<(MetalStorage, Shape)> {
        let (storage, layout) = self.y.storage_and_layout();
        match &*storage {
            Storage::Metal(y) => Ok((y.try_clone(layout)?, layout.shape().clone())),
            _ => bail!("a convolution on Metal whose output is elsewhere"),
        }
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _: &Tensor,
        g: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let (need_x, need_w) = (x.track_op(), w.track_op());
        let (x, w) = (x.detach(), w.detach());
        let (mut gx, mut gw) = (vec![], vec![]);
        let parts = |t: &Tensor, dim| t.contiguous()?.chunk(self.groups, dim);
        for ((x, w), g) in parts(&x, 1)?.iter().zip(parts(&w, 0)?).zip(parts(g, 1)?) {
            let (w, g) = (w.contiguous()?, g.contiguous()?);
            if need_x {
                gx.push(self.input_gradient(&g, &w, x.dims())?);
            }
            if need_w {
                gw.push(self.kernel_gradient(&g, x, w.dims())?);
            }
        }
        let joined = |parts: Vec<Tensor>, dim| match parts.is_empty() {
            true => Ok(None),
            false => Tensor::cat(&parts, dim).map(Some),
        };
        Ok((joined(gx, 1)?, joined(gw, 0)?))
    }
}
