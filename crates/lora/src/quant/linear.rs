//! The linear layer in 4 bits, or in full as well.

use candle_core::Tensor;
use candle_nn::{Linear, Module};

use super::{QuantConfig, Quantized, Weight, quantize};
use crate::base::plain;
use crate::{Result, ops};

/// A frozen linear layer whose weight is in 4 bits; bitsandbytes' `Linear4bit`.
///
/// With adapters beside it, it is a [`LoraLinear4bit`](crate::LoraLinear4bit).
///
/// # Shapes
///
/// As [`ops::linear_4bit`].
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{Linear, Module};
/// use lora::quant::{Linear4bit, QuantConfig};
///
/// let w = Tensor::ones((3, 64), DType::F32, &Device::Cpu)?;
/// let layer = Linear4bit::quantize(&Linear::new(w, None), &QuantConfig::default())?;
/// let y = layer.forward(&Tensor::ones((2, 64), DType::F32, &Device::Cpu)?)?;
/// assert_eq!(y.dims(), [2, 3]);
/// assert_eq!(layer.dequantize()?.weight().dims(), [3, 64]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Linear4bit {
    weight: Quantized,
    bias: Option<Tensor>,
}

impl Linear4bit {
    /// The layer of a weight (out, in) and a bias (out). Whether they fit, a
    /// [`LoraLinear4bit`](crate::LoraLinear4bit) says when it is made, and the product when it is
    /// taken.
    #[must_use]
    pub fn new(weight: Quantized, bias: Option<Tensor>) -> Self {
        Self { weight, bias }
    }

    /// A layer with its weight put into 4 bits. The bias keeps its numbers, and does not train.
    ///
    /// # Errors
    ///
    /// As [`quantize`].
    pub fn quantize(linear: &Linear, config: &QuantConfig) -> Result<Self> {
        let bias = linear.bias().map(plain).transpose()?;
        Ok(Self::new(quantize(linear.weight(), config)?, bias))
    }

    /// The weight.
    #[must_use]
    pub fn weight(&self) -> &Quantized {
        &self.weight
    }

    /// The bias.
    #[must_use]
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// The layer with its weight in full, rounded as it is.
    ///
    /// # Errors
    ///
    /// What candle reports.
    pub fn dequantize(&self) -> Result<Linear> {
        Ok(Linear::new(self.weight.dequantize()?, self.bias.clone()))
    }
}

impl Module for Linear4bit {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        ops::linear_4bit(x, &self.weight, self.bias()).map_err(Into::into)
    }
}

/// A frozen linear layer whose weight is a tensor or in 4 bits.
///
/// With adapters beside it, it is a [`LoraAnyLinear`](crate::LoraAnyLinear).
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{Linear, Module};
/// use lora::quant::{AnyLinear, Linear4bit, QuantConfig};
///
/// let full = Linear::new(Tensor::ones((3, 64), DType::F32, &Device::Cpu)?, None);
/// let four = AnyLinear::from(Linear4bit::quantize(&full, &QuantConfig::default())?);
/// let x = Tensor::ones((2, 64), DType::F32, &Device::Cpu)?;
/// assert_eq!(four.forward(&x)?.to_vec2::<f32>()?, full.forward(&x)?.to_vec2::<f32>()?);
/// assert_eq!((AnyLinear::from(full).bytes(), four.bytes()), (768, 107));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub enum AnyLinear {
    /// A weight in full.
    Full(Linear),
    /// A weight in 4 bits.
    In4Bits(Linear4bit),
}

impl From<Linear> for AnyLinear {
    fn from(linear: Linear) -> Self {
        Self::Full(linear)
    }
}

impl From<Linear4bit> for AnyLinear {
    fn from(linear: Linear4bit) -> Self {
        Self::In4Bits(linear)
    }
}

impl AnyLinear {
    pub(crate) fn weight(&self) -> Weight<'_> {
        match self {
            Self::Full(linear) => linear.weight().into(),
            Self::In4Bits(linear) => linear.weight().into(),
        }
    }

    /// The bias.
    #[must_use]
    pub fn bias(&self) -> Option<&Tensor> {
        match self {
            Self::Full(linear) => linear.bias(),
            Self::In4Bits(linear) => linear.bias(),
        }
    }

    /// What the weight takes in memory, in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match self.weight() {
            Weight::Dense(weight) => weight.elem_count() * weight.dtype().size_in_bytes(),
            Weight::Quantized(weight) => weight.bytes(),
        }
    }
}

impl Module for AnyLinear {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        match self {
            Self::Full(linear) => linear.forward(x),
            Self::In4Bits(linear) => linear.forward(x),
        }
    }
}
