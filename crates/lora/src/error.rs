//! The one error type of this crate.

use candle_core::DType;
use thiserror::Error;

/// Everything this crate refuses, with the layer's name, both shapes and what to do.
///
/// ```
/// use lora::LoraConfig;
///
/// let message = LoraConfig::new(0, 16.0).validate().unwrap_err().to_string();
/// assert!(message.contains("r = 0") && message.contains("r >= 1"));
/// ```
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// The rank is zero.
    #[error("LoraConfig: rank r = 0 leaves nothing to train; use r >= 1 (PEFT's default is r = 8)")]
    Rank,

    /// `lora_alpha` is not a positive finite number.
    #[error(
        "LoraConfig: lora_alpha = {alpha} must be positive and finite; \
         common choices are lora_alpha = r and lora_alpha = 2 r"
    )]
    Alpha {
        /// The value given.
        alpha: f64,
    },

    /// The layer's name cannot become part of a parameter name.
    #[error(
        "layer name {name:?}: give the module's dotted path, such as \"layers.0.q_proj\"; \
         no part of it may be empty or hold white space"
    )]
    Name {
        /// The name given.
        name: String,
    },

    /// The base weight is not a matrix with at least one element.
    #[error(
        "layer {layer}: the base weight must be a matrix [out, in] with both sizes at least 1, \
         got {weight:?}; reshape it or wrap another layer"
    )]
    Weight {
        /// The layer's name.
        layer: String,
        /// The weight's shape.
        weight: Vec<usize>,
    },

    /// The base bias does not fit the base weight.
    #[error(
        "layer {layer}: bias {bias:?} does not fit weight {weight:?}; it must be [{}]",
        weight[0]
    )]
    Bias {
        /// The layer's name.
        layer: String,
        /// The bias's shape.
        bias: Vec<usize>,
        /// The weight's shape.
        weight: Vec<usize>,
    },

    /// The base weight's type holds no fractions (or too few of them) to be adapted.
    #[error(
        "layer {layer}: a weight of type {dtype:?} cannot be adapted; \
         convert the base to f32, f64, f16 or bf16 first"
    )]
    WeightType {
        /// The layer's name.
        layer: String,
        /// The type of the base weight.
        dtype: DType,
    },

    /// The input's last dimension is not the layer's number of input features.
    #[error(
        "layer {layer}: input {input:?} does not fit weight {weight:?}; \
         the input's last dimension must be {}{}",
        weight[1],
        transposed_hint(input, weight)
    )]
    Input {
        /// The layer's name.
        layer: String,
        /// The input's shape.
        input: Vec<usize>,
        /// The base weight's shape, (out, in).
        weight: Vec<usize>,
    },

    /// The input's type is not the layer's.
    #[error(
        "layer {layer}: the input is {input:?}, the base weight {weight:?}; \
         convert the input with x.to_dtype(DType::{weight:?})"
    )]
    InputType {
        /// The layer's name.
        layer: String,
        /// The input's type.
        input: DType,
        /// The base weight's type.
        weight: DType,
    },

    /// A tensor operation failed in candle.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl From<Error> for candle_core::Error {
    /// Keeps the message as it is, so that `Module::forward` reports it unchanged.
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(inner) => inner,
            other => candle_core::Error::Wrapped(Box::new(other)),
        }
    }
}

/// `Result` with this crate's [`enum@Error`].
///
/// ```
/// fn rank(r: usize) -> lora::Result<f64> {
///     let config = lora::LoraConfig::new(r, 16.0);
///     config.validate()?;
///     Ok(config.scaling())
/// }
/// assert_eq!(rank(8).unwrap(), 2.0);
/// assert!(rank(0).is_err());
/// ```
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The commonest slip: the tensor lies the other way round.
fn transposed_hint(input: &[usize], weight: &[usize]) -> &'static str {
    match input {
        [first, _] if *first == weight[1] => "; x.t()? would fit",
        [] => "; a scalar has none, unsqueeze it first",
        _ => "",
    }
}
