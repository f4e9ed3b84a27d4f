//! What attention is set up with, and what goes in and out.

use candle_core::Tensor;

use crate::Result;
use crate::config::unsupported;

/// The settings of an [attention layer](super::LoraMultiHeadAttention), under torch's names and
/// with torch's defaults.
///
/// The sizes embed_dim, kdim and vdim are those of the projections' weights.
///
/// ```
/// use lora::AttentionConfig;
///
/// let config = AttentionConfig::new(8).with_kv_heads(2).with_batch_first(true);
/// assert_eq!((config.num_heads, config.num_kv_heads, config.batch_first), (8, 2, true));
/// assert_eq!(AttentionConfig::new(8).num_kv_heads, 8);
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionConfig {
    /// The number of query heads.
    pub num_heads: usize,
    /// The number of key and value heads; fewer than `num_heads` is grouped-query attention.
    pub num_kv_heads: usize,
    /// Inputs are [N, L, E] (`true`) or sequence-first, [L, N, E] (`false`, torch's default).
    pub batch_first: bool,
    /// The factor of the scores; `None`, the default, is 1/√head_dim.
    pub scale: Option<f64>,
}

impl AttentionConfig {
    /// `num_heads` heads for queries, keys and values; the rest as in torch's defaults.
    ///
    /// ```
    /// let config = lora::AttentionConfig::new(4);
    /// assert_eq!((config.num_kv_heads, config.batch_first, config.scale), (4, false, None));
    /// ```
    #[must_use]
    pub fn new(num_heads: usize) -> Self {
        Self {
            num_heads,
            num_kv_heads: num_heads,
            batch_first: false,
            scale: None,
        }
    }

    /// Sets the number of key and value heads, which must divide the number of query heads.
    ///
    /// ```
    /// assert_eq!(lora::AttentionConfig::new(8).with_kv_heads(2).num_kv_heads, 2);
    /// ```
    #[must_use]
    pub fn with_kv_heads(mut self, num_kv_heads: usize) -> Self {
        self.num_kv_heads = num_kv_heads;
        self
    }

    /// Chooses between [N, L, E] (`true`) and [L, N, E] (`false`).
    ///
    /// ```
    /// assert!(lora::AttentionConfig::new(8).with_batch_first(true).batch_first);
    /// ```
    #[must_use]
    pub fn with_batch_first(mut self, batch_first: bool) -> Self {
        self.batch_first = batch_first;
        self
    }

    /// Sets the factor of the scores in place of 1/√head_dim.
    ///
    /// ```
    /// assert_eq!(lora::AttentionConfig::new(8).with_scale(0.5).scale, Some(0.5));
    /// ```
    #[must_use]
    pub fn with_scale(mut self, scale: f64) -> Self {
        self.scale = Some(scale);
        self
    }

    pub(super) fn check(&self, layer: &str) -> Result<()> {
        let (heads, kv) = (self.num_heads, self.num_kv_heads);
        if heads == 0 || kv == 0 || !heads.is_multiple_of(kv) {
            return Err(unsupported(
                &format!("layer {layer}: num_heads = {heads} with num_kv_heads = {kv}"),
                "both must be at least 1, and each key head serves the same number of query \
                 heads, so num_kv_heads must divide num_heads",
            ));
        }
        match self.scale {
            Some(scale) if !(scale.is_finite() && scale > 0.0) => Err(unsupported(
                &format!("layer {layer}: scale = {scale}"),
                "it must be positive and finite; None is 1/√head_dim",
            )),
            _ => Ok(()),
        }
    }
}

/// Which attention weights a pass returns.
///
/// ```
/// assert_eq!(lora::AttentionWeights::default(), lora::AttentionWeights::No);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AttentionWeights {
    /// None.
    #[default]
    No,
    /// The mean over the heads: [N, L, S].
    Averaged,
    /// Those of each head: [N, num_heads, L, S].
    PerHead,
}

/// The inputs and masks of one pass through an [attention layer](super::LoraMultiHeadAttention).
///
/// Masks are as in torch. One of type u8 is boolean: 1 (any number but 0) means *not allowed*, 0
/// allowed. One of floats is added to the scaled scores; −∞ forbids. All that are given hold
/// together. A float mask may be computed from variables: gradients reach it.
///
/// # Shapes
///
/// With N rows, L queries and S keys, and `batch_first` as the layer's:
///
/// - `query` [L, N, E] or [N, L, E]; unbatched [L, E]
/// - `key` [S, N, kdim] or [N, S, kdim], `value` with vdim; unbatched [S, kdim], [S, vdim]
/// - `attn_mask` [L, S] or [N · num_heads, L, S] (row by row, the heads of a row together)
/// - `key_padding_mask` [N, S]; unbatched \[S\] or [1, S]
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use lora::{AttentionInput, AttentionWeights};
///
/// let x = Tensor::zeros((4, 3, 6), DType::F32, &Device::Cpu)?;
/// let input = AttentionInput {
///     is_causal: true,
///     weights: AttentionWeights::PerHead,
///     ..AttentionInput::self_attention(&x)
/// };
/// assert_eq!(input.key.id(), input.query.id());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct AttentionInput<'a> {
    /// What asks.
    pub query: &'a Tensor,
    /// What is compared with the queries.
    pub key: &'a Tensor,
    /// What is averaged; as many as keys.
    pub value: &'a Tensor,
    /// Which query may see which key, or what is added to the scores.
    pub attn_mask: Option<&'a Tensor>,
    /// Which keys of a row are padding, or what is added to all scores of a key.
    pub key_padding_mask: Option<&'a Tensor>,
    /// Query i sees the keys 0 … i only, counted from the first key, as in torch.
    pub is_causal: bool,
    /// Which attention weights are returned.
    pub weights: AttentionWeights,
}

impl<'a> AttentionInput<'a> {
    /// Queries, keys and values without masks.
    ///
    /// Where two of them are the same, pass the same tensor (or a clone of it): then a fused
    /// in-projection runs once for both.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use lora::AttentionInput;
    /// let x = Tensor::zeros((4, 3, 6), DType::F32, &Device::Cpu)?;
    /// let memory = Tensor::zeros((5, 3, 6), DType::F32, &Device::Cpu)?;
    /// let input = AttentionInput::new(&x, &memory, &memory);
    /// assert!(!input.is_causal && input.attn_mask.is_none());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn new(query: &'a Tensor, key: &'a Tensor, value: &'a Tensor) -> Self {
        Self {
            query,
            key,
            value,
            attn_mask: None,
            key_padding_mask: None,
            is_causal: false,
            weights: AttentionWeights::No,
        }
    }

    /// `x` as query, key and value, without masks.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use lora::AttentionInput;
    /// let x = Tensor::zeros((4, 3, 6), DType::F32, &Device::Cpu)?;
    /// assert_eq!(AttentionInput::self_attention(&x).value.id(), x.id());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn self_attention(x: &'a Tensor) -> Self {
        Self::new(x, x, x)
    }
}

/// What a pass through an [attention layer](super::LoraMultiHeadAttention) gives.
///
/// ```
/// # use candle_core::{DType, Device, Tensor};
/// # use lora::AttentionOutput;
/// let output = Tensor::zeros((4, 3, 6), DType::F32, &Device::Cpu)?;
/// let answer = AttentionOutput { output, weights: None };
/// assert_eq!(answer.output.dims(), [4, 3, 6]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct AttentionOutput {
    /// In the layout of the query: [L, N, out], [N, L, out] or [L, out].
    pub output: Tensor,
    /// What [`AttentionInput::weights`] asked for, without the dimension N for unbatched inputs.
    pub weights: Option<Tensor>,
}
