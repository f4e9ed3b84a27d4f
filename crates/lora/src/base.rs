//! What a layer must say of itself so that an adapter can sit beside it.

use candle_core::{DType, Tensor};

use crate::ops::Share;
use crate::quant::Weight;
use crate::{Error, Result};

/// A layer that LoRA can adapt: [`candle_nn::Linear`],
/// [`Linear4bit`](crate::quant::Linear4bit), [`AnyLinear`](crate::quant::AnyLinear),
/// [`candle_nn::Conv1d`], [`candle_nn::Conv2d`] and [`ScaledEmbedding`](crate::ScaledEmbedding).
///
/// [`LoraLayer`](crate::LoraLayer) holds everything that is the same for all of them; a base says
/// how its own product goes. The trait is sealed: its methods are no part of the public API.
pub trait Base: sealed::Base {}

impl<B: sealed::Base> Base for B {}

pub(crate) mod sealed {
    use super::*;

    /// The arithmetic of one kind of layer.
    ///
    /// "Flat" inputs and outputs have their leading dimensions folded into one where the layer
    /// allows any number of them.
    pub trait Base: Clone + Send + Sync + Sized + 'static {
        /// The name of the adapted layer's type, such as `LoraLinear`.
        const LAYER: &'static str;
        /// The tensors' names in a PEFT file.
        const KEYS: Keys;

        fn weight(&self) -> Weight<'_>;
        fn bias(&self) -> Option<&Tensor>;
        /// The same layer with other numbers.
        fn with(&self, weight: Tensor, bias: Option<Tensor>) -> Result<Self>;
        /// The same layer with another bias.
        fn with_bias(&self, bias: Option<Tensor>) -> Result<Self> {
            self.with(self.weight().dense()?, bias)
        }

        /// The shape a weight must have, in words, when this one is no good.
        fn refused_shape(&self) -> Option<&'static str>;
        /// The number of outputs, of which DoRA scales each by itself.
        fn out(&self) -> usize;
        /// The number of inputs, for a printed layer.
        fn inputs(&self) -> usize;
        /// The output, not flat, of rows that have pairs beside the base, where that is one
        /// operation.
        fn with_shares(
            &self,
            _x: &Tensor,
            _pairs: &[(&Tensor, &Tensor)],
            _shares: Vec<Share>,
        ) -> Result<Option<Tensor>> {
            Ok(None)
        }
        /// How many inputs one output is made of.
        fn fan_in(&self) -> usize;
        fn groups(&self) -> usize {
            1
        }

        /// What an input would have to be, when this one does not fit.
        fn refused_input(&self, x: &Tensor) -> Option<String>;
        fn flat(&self, x: &Tensor) -> Result<Tensor>;
        /// A flat output in the shape that belongs to the input `x`.
        fn unflat(&self, y: Tensor, x: &Tensor) -> Result<Tensor>;
        /// An output of any shape, flat.
        fn flat_output(&self, y: &Tensor) -> Result<Tensor>;

        /// The layer's own output of a flat input.
        fn forward(&self, x: &Tensor) -> Result<Tensor>;
        /// The layer's own output of an input that is not flat.
        fn whole(&self, x: &Tensor) -> Result<Tensor> {
            self.unflat(self.forward(&self.flat(x)?)?, x)
        }
        fn a_shape(&self, r: usize) -> Vec<usize>;
        fn b_shape(&self, r: usize) -> Vec<usize>;
        fn magnitude_shape(&self) -> Vec<usize>;
        /// x Aᵀ.
        fn down(&self, x: &Tensor, a: &Tensor) -> Result<Tensor>;
        /// h Bᵀ, times whatever factor the layer puts on its output.
        fn up(&self, h: &Tensor, b: &Tensor) -> Result<Tensor>;
        /// (out, r)·(r, fan) in the weight's layout.
        fn to_weight_layout(&self, product: Tensor) -> Result<Tensor>;
        /// A weight as a matrix (out, fan).
        fn to_matrix(&self, weight: &Tensor) -> Result<Tensor>;
        /// Numbers (out) in a shape that broadcasts over a flat output.
        fn over_output(&self, v: &Tensor) -> Result<Tensor>;

        /// B A as a matrix (out, fan): what the pair adds, unscaled.
        fn product(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
            let (r, fan) = (a.dim(0)?, self.fan_in());
            Ok(b.reshape((self.out(), r))?.matmul(&a.reshape((r, fan))?)?)
        }
        fn is_linear(&self) -> bool {
            false
        }
        fn is_embedding(&self) -> bool {
            false
        }
    }
}

/// The names of a layer's tensors after its path.
#[derive(Clone, Copy, Debug)]
pub struct Keys {
    pub(crate) a: &'static str,
    pub(crate) b: &'static str,
}

impl Keys {
    /// Of linear and convolution layers.
    pub(crate) const WEIGHTS: Keys = Keys {
        a: "lora_A.weight",
        b: "lora_B.weight",
    };
    /// Of embeddings.
    pub(crate) const EMBEDDING: Keys = Keys {
        a: "lora_embedding_A",
        b: "lora_embedding_B",
    };
}

/// `base` as plain tensors that no variable can reach or move, checked.
pub(crate) fn frozen<B: sealed::Base>(layer: &str, base: &B) -> Result<B> {
    check_parts(layer, base)?;
    let bias = base.bias().map(plain).transpose()?;
    match base.weight() {
        Weight::Dense(weight) => base.with(plain(weight)?, bias),
        Weight::Quantized(_) => base.with_bias(bias),
    }
}

/// Refuses a weight and a bias that are none of such a layer.
pub(crate) fn check_parts<B: sealed::Base>(layer: &str, base: &B) -> Result<()> {
    let weight = base.weight();
    let shape = || weight.dims().to_vec();
    if !matches!(
        weight.dtype(),
        DType::F16 | DType::BF16 | DType::F32 | DType::F64
    ) {
        return Err(Error::WeightType {
            layer: layer.to_string(),
            dtype: weight.dtype(),
        });
    }
    if let Some(wants) = base.refused_shape() {
        return Err(Error::Weight {
            layer: layer.to_string(),
            weight: shape(),
            wants,
        });
    }
    if let Some(bias) = base.bias()
        && bias.dims() != [base.out()]
    {
        return Err(Error::Bias {
            layer: layer.to_string(),
            bias: bias.dims().to_vec(),
            weight: shape(),
            out: base.out(),
        });
    }
    Ok(())
}

/// A tensor without a graph that shares no memory with a variable.
pub(crate) fn plain(tensor: &Tensor) -> Result<Tensor> {
    // `detach` alone would share a variable's storage, which an optimiser writes in place.
    if tensor.track_op() {
        Ok(tensor.detach().copy()?)
    } else {
        Ok(tensor.clone())
    }
}

/// Refuses an input that does not fit, with the layer's name and both shapes.
pub(crate) fn check_input<B: sealed::Base>(layer: &str, base: &B, x: &Tensor) -> Result<()> {
    let weight = base.weight();
    if let Some(wants) = base.refused_input(x) {
        return Err(Error::Input {
            layer: layer.to_string(),
            input: x.dims().to_vec(),
            weight: weight.dims().to_vec(),
            wants,
        });
    }
    let integers = matches!(x.dtype(), DType::U8 | DType::U32 | DType::I64);
    let fits = if base.is_embedding() {
        integers
    } else {
        // Codes are expanded to what is asked for.
        let wide = matches!(weight, Weight::Quantized(_)) && x.dtype() == DType::F32;
        x.dtype() == weight.dtype() || wide
    };
    if !fits {
        return Err(Error::InputType {
            layer: layer.to_string(),
            input: x.dtype(),
            weight: weight.dtype(),
            wants: if base.is_embedding() {
                "an embedding takes ids of type u32, u8 or i64".to_string()
            } else {
                format!(
                    "convert the input with x.to_dtype(DType::{:?})",
                    weight.dtype()
                )
            },
        });
    }
    if !x.device().same_device(weight.device()) {
        return Err(Error::Device {
            layer: layer.to_string(),
            shape: x.dims().to_vec(),
            input: x.device().location(),
            weight: weight.dims().to_vec(),
            base: weight.device().location(),
        });
    }
    Ok(())
}

/// The type of A and B beside a base of type `base`.
pub(crate) fn adapter_dtype(base: DType) -> DType {
    match base {
        DType::F16 | DType::BF16 => DType::F32,
        other => other,
    }
}

/// Whether every size is at least 1.
pub(crate) fn filled(tensor: &Tensor) -> bool {
    tensor.dims().iter().all(|d| *d > 0)
}

/// Pairs as one A, row after row, and one B, number after number.
pub(crate) fn stacked(pairs: &[(&Tensor, &Tensor)]) -> Result<(Tensor, Tensor)> {
    if let [(a, b)] = *pairs {
        return Ok((a.clone(), b.clone()));
    }
    let a: Vec<_> = pairs.iter().map(|(a, _)| *a).collect();
    let b = pairs.iter().map(|(_, b)| b.flatten_all());
    let b = b.collect::<candle_core::Result<Vec<_>>>()?;
    Ok((Tensor::cat(&a, 0)?, Tensor::cat(&b, 0)?))
}
