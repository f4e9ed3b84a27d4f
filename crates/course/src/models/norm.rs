//! The layer norm that the encoders share.

use candle_core::Tensor;
use lora::{LoraBuilder, ops};

use crate::Result;

/// A layer norm's scale and shift.
#[derive(Debug)]
pub(super) struct Norm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl Norm {
    /// A norm of `size` numbers. In a checkpoint of TensorFlow's origin, scale and shift are called
    /// `gamma` and `beta`.
    pub(super) fn new(size: usize, eps: f64, builder: &LoraBuilder<'_>) -> Result<Self> {
        let vb = builder.vb();
        let (weight, bias) = match vb.contains_tensor("gamma") {
            true => ("gamma", "beta"),
            false => ("weight", "bias"),
        };
        Ok(Self {
            weight: vb.get(size, weight)?,
            bias: vb.get(size, bias)?,
            eps,
        })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(ops::layer_norm(
            x,
            &self.weight,
            Some(&self.bias),
            self.eps,
        )?)
    }

    /// Scale and shift.
    pub(super) fn both(&self) -> [Tensor; 2] {
        [self.weight.clone(), self.bias.clone()]
    }
}
