//! Weights in 4 bits, for QLoRA: the base is frozen, so it may be coarse, and the adapter beside it
//! trains in full precision.
//!
//! A weight goes in blocks of 64 numbers. Each block keeps its largest magnitude, and each number a
//! code of 4 bits for its part of that ([`QuantType`]). With double quantisation the magnitudes
//! are themselves kept in 8 bits, in blocks of 256. A number then takes
//!
//! 4 + 8/64 + 32/(64 · 256) = 4.127 bits.
//!
//! With NF4 and FP4 the layout and the codes are those of bitsandbytes on the CPU, byte by byte.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use lora::quant::{QuantConfig, quantize};
//!
//! let w = (Tensor::arange(0f32, 4096.0, &Device::Cpu)?.reshape((64, 64))? / 4096.0)?;
//! let quantized = quantize(&w, &QuantConfig::default())?;
//! let gap = (quantized.dequantize()? - &w)?.abs()?.max_all()?.to_scalar::<f32>()?;
//! assert!(gap < 0.15);
//! # Ok::<(), lora::Error>(())
//! ```
//!
//! Source: Dettmers et al. 2023, arXiv:2305.14314; bitsandbytes `functional.quantize_4bit`.

mod codes;
mod expand;
mod linear;
mod tensor;
mod weight;

pub(crate) use expand::View;
pub use linear::{AnyLinear, Linear4bit};
pub use tensor::{Quantized, quantize};
pub(crate) use weight::Weight;

use crate::{Error, Result};

#[cfg(test)]
mod tests;

/// What a code of 4 bits stands for: bitsandbytes' `nf4` and `fp4`, and evenly spaced values to
/// compare them with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum QuantType {
    /// Quantiles of the normal distribution, which weights nearly follow.
    #[default]
    Nf4,
    /// A floating-point number with two bits of exponent and one of mantissa.
    Fp4,
    /// Evenly spaced, from −7 to 7 sevenths.
    Int4,
}

/// How a weight becomes 4 bits; by default as in QLoRA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuantConfig {
    /// The codes: NF4.
    pub quant_type: QuantType,
    /// Numbers in a block: 64.
    pub block_size: usize,
    /// Whether the blocks' magnitudes are kept in 8 bits: true.
    pub double_quant: bool,
}

impl Default for QuantConfig {
    fn default() -> Self {
        Self {
            quant_type: QuantType::Nf4,
            block_size: 64,
            double_quant: true,
        }
    }
}

impl QuantConfig {
    /// Refuses a block size that is no power of two from 2 to 65,536.
    fn validate(&self) -> Result<()> {
        let size = self.block_size;
        if size.is_power_of_two() && (2..=1 << 16).contains(&size) {
            return Ok(());
        }
        Err(Error::Quantize {
            what: format!("block_size = {size}"),
            wants: "a power of two from 2 to 65536; QLoRA's is 64".into(),
        })
    }
}
