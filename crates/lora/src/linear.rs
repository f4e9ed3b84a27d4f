//! The linear layer as a base, its weight in full or in 4 bits.

use candle_core::Tensor;
use candle_nn::Linear;

use crate::Result;
use crate::base::{Keys, sealed, stacked};
use crate::ops::{self, Share, lora_shares};
use crate::quant::{AnyLinear, Linear4bit, Weight, quantize};

/// A [`candle_nn::Linear`] with trainable low-rank updates beside it.
///
/// y = x Wᵀ + b + s · (x Aᵀ) Bᵀ. See [`LoraLayer`](crate::LoraLayer) for everything it can do.
///
/// # Shapes
///
/// W (out, in), b (out), A (r, in), B (out, r); input (…, in) → output (…, out) for any number
/// of leading dimensions, none included.
///
/// Source: Hu et al. 2021, arXiv:2106.09685, section 4.1, equation 3; PEFT
/// `tuners/lora/layer.py`, `Linear`.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_nn::{Linear, Module};
/// use lora::{LoraConfig, LoraLinear};
/// use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
///
/// let w = Tensor::new(&[[1f32, 2.], [3., 4.], [5., 6.]], &Device::Cpu)?;
/// let mut rng = ChaCha8Rng::seed_from_u64(1);
/// let layer = LoraLinear::new("proj", Linear::new(w, None), &LoraConfig::new(1, 2.0), &mut rng)?;
///
/// // B = 0: the base's own answer.
/// let x = Tensor::new(&[[10f32, 100.]], &Device::Cpu)?;
/// assert_eq!(layer.forward(&x)?.to_vec2::<f32>()?, [[210., 430., 650.]]);
///
/// // s = 2, A = [1, 1], B = [1, 0, 0]ᵀ add 2 · (10 + 100) to the first output.
/// layer.lora_a()?.set(&Tensor::new(&[[1f32, 1.]], &Device::Cpu)?)?;
/// layer.lora_b()?.set(&Tensor::new(&[[1f32], [0.], [0.]], &Device::Cpu)?)?;
/// assert_eq!(layer.forward(&x)?.to_vec2::<f32>()?, [[430., 430., 650.]]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub type LoraLinear = crate::LoraLayer<Linear>;

/// A [`Linear4bit`] with trainable low-rank updates beside it: QLoRA.
///
/// y = x dequantised(W)ᵀ + b + s · (x Aᵀ) Bᵀ. W stays in 4 bits, forward and backward
/// ([`ops::linear_4bit`]); A and B are as beside any layer, in the type that W was made from, f32 for
/// half precision. Merging dequantises, adds, and quantises again, so it rounds what the adapter
/// has learned; unmerging is exact, and [`merged_in_full`](Self::merged_in_full) does not round.
/// DoRA's norm takes the weight in full in every pass, as in PEFT.
///
/// Source: Dettmers et al. 2023, arXiv:2305.14314, equation 5; PEFT `tuners/lora/bnb.py`,
/// `Linear4bit`.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{Linear, Module};
/// use lora::quant::{Linear4bit, QuantConfig};
/// use lora::{LoraConfig, LoraLinear4bit};
/// use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
///
/// let mut rng = ChaCha8Rng::seed_from_u64(1);
/// let base = Linear::new(Tensor::ones((64, 128), DType::F32, &Device::Cpu)?, None);
/// let base = Linear4bit::quantize(&base, &QuantConfig::default())?;
/// let layer = LoraLinear4bit::new("q_proj", base, &LoraConfig::new(8, 16.0), &mut rng)?;
/// let y = layer.forward(&Tensor::ones((3, 128), DType::F32, &Device::Cpu)?)?;
/// assert_eq!(y.dims(), [3, 64]);
/// assert_eq!(layer.parameter_count().trainable, 8 * (128 + 64));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub type LoraLinear4bit = crate::LoraLayer<Linear4bit>;

/// A linear layer whose base keeps its weight in full or in 4 bits, so that one network serves LoRA
/// and QLoRA: [`LoraBuilder::quantized`](crate::LoraBuilder::quantized) decides.
///
/// ```
/// use candle_core::{DType, Device};
/// use candle_nn::VarBuilder;
/// use lora::quant::{AnyLinear, QuantConfig};
/// use lora::{LoraAnyLinear, LoraBuilder};
///
/// let network = |b: LoraBuilder| -> lora::Result<LoraAnyLinear> { b.any_linear_no_bias(128, 64) };
/// let b = LoraBuilder::new(VarBuilder::zeros(DType::F32, &Device::Cpu));
/// assert!(matches!(network(b.pp("fc"))?.base(), AnyLinear::Full(_)));
/// let b = b.quantized(QuantConfig::default());
/// assert!(matches!(network(b.pp("fc"))?.base(), AnyLinear::In4Bits(_)));
/// # Ok::<(), lora::Error>(())
/// ```
pub type LoraAnyLinear = crate::LoraLayer<AnyLinear>;

/// What the kinds of linear layers do each in their own way.
trait Kind: Clone {
    fn with(&self, weight: Tensor, bias: Option<Tensor>) -> Result<Self>;
    fn with_bias(&self, bias: Option<Tensor>) -> Self;
    fn forward(&self, x: &Tensor) -> Result<Tensor>;
}

impl Kind for Linear {
    fn with(&self, weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        Ok(Linear::new(weight, bias))
    }

    fn with_bias(&self, bias: Option<Tensor>) -> Self {
        Linear::new(self.weight().clone(), bias)
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::linear(x, self.weight(), self.bias())
    }
}

impl Kind for Linear4bit {
    fn with(&self, weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        let weight = quantize(&weight, self.weight().config())?;
        Ok(Linear4bit::new(weight, bias))
    }

    fn with_bias(&self, bias: Option<Tensor>) -> Self {
        Linear4bit::new(self.weight().clone(), bias)
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::linear_4bit(x, self.weight(), self.bias())
    }
}

impl Kind for AnyLinear {
    fn with(&self, weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        match self {
            Self::Full(linear) => Ok(Self::Full(Kind::with(linear, weight, bias)?)),
            Self::In4Bits(linear) => Ok(Self::In4Bits(Kind::with(linear, weight, bias)?)),
        }
    }

    fn with_bias(&self, bias: Option<Tensor>) -> Self {
        match self {
            Self::Full(linear) => Self::Full(Kind::with_bias(linear, bias)),
            Self::In4Bits(linear) => Self::In4Bits(Kind::with_bias(linear, bias)),
        }
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Full(linear) => Kind::forward(linear, x),
            Self::In4Bits(linear) => Kind::forward(linear, x),
        }
    }
}

/// A linear layer whose weight is of some kind.
macro_rules! linear {
    ($linear:ident, $layer:literal) => {
        impl sealed::Base for $linear {
            const LAYER: &'static str = $layer;
            const KEYS: Keys = Keys::WEIGHTS;

            fn weight(&self) -> Weight<'_> {
                <$linear>::weight(self).into()
            }

            fn bias(&self) -> Option<&Tensor> {
                <$linear>::bias(self)
            }

            fn with(&self, weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
                Kind::with(self, weight, bias)
            }

            fn with_bias(&self, bias: Option<Tensor>) -> Result<Self> {
                Ok(Kind::with_bias(self, bias))
            }

            fn refused_shape(&self) -> Option<&'static str> {
                let dims = sealed::Base::weight(self).dims();
                let good = dims.len() == 2 && !dims.contains(&0);
                (!good).then_some("a matrix [out, in] with both sizes at least 1")
            }

            fn out(&self) -> usize {
                sealed::Base::weight(self).dims()[0]
            }

            fn inputs(&self) -> usize {
                sealed::Base::weight(self).dims()[1]
            }

            fn fan_in(&self) -> usize {
                self.inputs()
            }

            fn refused_input(&self, x: &Tensor) -> Option<String> {
                let wanted = self.inputs();
                let hint = match x.dims() {
                    [.., last] if *last == wanted => return None,
                    [first, _] if *first == wanted => "; x.t()? would fit",
                    [] => "; a scalar has none, unsqueeze it first",
                    _ => "",
                };
                Some(format!("the input's last dimension must be {wanted}{hint}"))
            }

            fn flat(&self, x: &Tensor) -> Result<Tensor> {
                let rows = x.elem_count() / self.inputs();
                Ok(x.reshape((rows, self.inputs()))?)
            }

            fn unflat(&self, y: Tensor, x: &Tensor) -> Result<Tensor> {
                let leading = &x.dims()[..x.rank() - 1];
                Ok(y.reshape([leading, &[self.out()]].concat())?)
            }

            fn flat_output(&self, y: &Tensor) -> Result<Tensor> {
                let rows = y.elem_count() / self.out();
                Ok(y.reshape((rows, self.out()))?)
            }

            fn forward(&self, x: &Tensor) -> Result<Tensor> {
                Kind::forward(self, x)
            }

            fn whole(&self, x: &Tensor) -> Result<Tensor> {
                Kind::forward(self, x)
            }

            fn with_shares(
                &self,
                x: &Tensor,
                pairs: &[(&Tensor, &Tensor)],
                shares: Vec<Share>,
            ) -> Result<Option<Tensor>> {
                let (weight, bias) = (sealed::Base::weight(self), sealed::Base::bias(self));
                let (a, b) = stacked(pairs)?;
                lora_shares(x, weight, bias, &a, &b, shares)
            }

            fn a_shape(&self, r: usize) -> Vec<usize> {
                vec![r, self.inputs()]
            }

            fn b_shape(&self, r: usize) -> Vec<usize> {
                vec![self.out(), r]
            }

            fn magnitude_shape(&self) -> Vec<usize> {
                vec![self.out()]
            }

            fn down(&self, x: &Tensor, a: &Tensor) -> Result<Tensor> {
                Ok(x.matmul(&a.t()?)?)
            }

            fn up(&self, h: &Tensor, b: &Tensor) -> Result<Tensor> {
                Ok(h.matmul(&b.t()?)?)
            }

            fn to_weight_layout(&self, product: Tensor) -> Result<Tensor> {
                Ok(product)
            }

            fn to_matrix(&self, weight: &Tensor) -> Result<Tensor> {
                Ok(weight.clone())
            }

            fn over_output(&self, v: &Tensor) -> Result<Tensor> {
                Ok(v.clone())
            }

            fn is_linear(&self) -> bool {
                true
            }
        }
    };
}

linear!(Linear, "LoraLinear");
linear!(Linear4bit, "LoraLinear4bit");
linear!(AnyLinear, "LoraAnyLinear");
