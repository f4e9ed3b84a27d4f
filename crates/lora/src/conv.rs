//! The convolutions as bases.

use candle_core::Tensor;
use candle_nn::{Conv1d, Conv2d};

use crate::Result;
use crate::base::{Keys, filled, sealed, stacked};
use crate::ops::{self, How, Share};
use crate::quant::Weight;

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
    ($conv:ident, $layer:literal, $rank:literal, $weight:literal,
     $input:literal) => {
        impl sealed::Base for $conv {
            const LAYER: &'static str = $layer;
            const KEYS: Keys = Keys::WEIGHTS;

            fn weight(&self) -> Weight<'_> {
                $conv::weight(self).into()
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
                Ok(x.contiguous()?)
            }

            fn unflat(&self, y: Tensor, _: &Tensor) -> Result<Tensor> {
                Ok(y)
            }

            fn flat_output(&self, y: &Tensor) -> Result<Tensor> {
                Ok(y.clone())
            }

            fn forward(&self, x: &Tensor) -> Result<Tensor> {
                let (weight, bias) = ($conv::weight(self), $conv::bias(self));
                ops::convolution(x, weight, bias, self.config().into())
            }

            fn with_shares(
                &self,
                x: &Tensor,
                pairs: &[(&Tensor, &Tensor)],
                shares: Vec<Share>,
            ) -> Result<Option<Tensor>> {
                let (a, b) = stacked(pairs)?;
                let (weight, bias) = ($conv::weight(self), $conv::bias(self));
                ops::convolution_shares(x, weight, bias, &a, &b, shares, self.config().into())
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
                ops::convolution(x, a, None, How::from(self.config()).down())
            }

            fn up(&self, h: &Tensor, b: &Tensor) -> Result<Tensor> {
                ops::convolution(h, b, None, How::from(self.config()).up())
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
    };
}

convolution!(
    Conv1d,
    "LoraConv1d",
    3,
    "[out, in / groups, kernel] with sizes at least 1, out a multiple of groups, stride and \
     dilation at least 1 and, like the padding, below 2^32",
    "it must be [batch, {}, length]"
);
convolution!(
    Conv2d,
    "LoraConv2d",
    4,
    "[out, in / groups, kernel, kernel] with sizes at least 1, out a multiple of groups, stride \
     and dilation at least 1 and, like the padding, below 2^32",
    "it must be [batch, {}, height, width]"
);
