//! The linear layer in 4 bits.

use candle_core::Tensor;
use candle_nn::{Linear, Module};

use super::{QuantConfig, Quantized, quantize};
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
