//! A weight, whatever it is kept in.

use candle_core::{DType, Device, Tensor};

use super::Quantized;
use crate::Result;

/// The weight of a layer: a tensor, or codes of 4 bits.
#[derive(Clone, Copy)]
pub enum Weight<'a> {
    Dense(&'a Tensor),
    Quantized(&'a Quantized),
}

impl<'a> From<&'a Tensor> for Weight<'a> {
    fn from(weight: &'a Tensor) -> Self {
        Self::Dense(weight)
    }
}

impl<'a> From<&'a Quantized> for Weight<'a> {
    fn from(weight: &'a Quantized) -> Self {
        Self::Quantized(weight)
    }
}

impl<'a> Weight<'a> {
    pub fn dims(self) -> &'a [usize] {
        match self {
            Self::Dense(weight) => weight.dims(),
            Self::Quantized(weight) => weight.dims(),
        }
    }

    /// The type of its numbers, when they stand in full.
    pub fn dtype(self) -> DType {
        match self {
            Self::Dense(weight) => weight.dtype(),
            Self::Quantized(weight) => weight.dtype(),
        }
    }

    pub fn device(self) -> &'a Device {
        match self {
            Self::Dense(weight) => weight.device(),
            Self::Quantized(weight) => weight.device(),
        }
    }

    /// Whether it trains or comes from something that does.
    pub fn track_op(self) -> bool {
        matches!(self, Self::Dense(weight) if weight.track_op())
    }

    /// All of its numbers.
    pub fn dense(self) -> Result<Tensor> {
        match self {
            Self::Dense(weight) => Ok(weight.clone()),
            Self::Quantized(weight) => weight.dequantize(),
        }
    }
}
