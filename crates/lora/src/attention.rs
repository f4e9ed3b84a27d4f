//! Multi-head attention whose projections take adapters.

use std::fmt;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Linear, Module};

use crate::base::{adapter_dtype, check_input};
use crate::config::unsupported;
use crate::count::grouped;
use crate::{Error, LoraBuilder, LoraLinear, ParameterCount, Result};

/// The settings of a [`LoraMultiHeadAttention`], under torch's names and with torch's defaults.
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

    fn check(&self, layer: &str) -> Result<()> {
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

/// The inputs and masks of one pass through a [`LoraMultiHeadAttention`].
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

/// What a pass through a [`LoraMultiHeadAttention`] gives.
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

/// Multi-head attention over adapted projections: LoRA on any of q, k, v and out.
///
/// headₕ = softmax(scale · (Q W_Qₕᵀ)(K W_Kₕᵀ)ᵀ + mask) (V W_Vₕᵀ), output = concat(headₕ) W_Oᵀ,
///
/// where each of the products is a [`LoraLinear`], bias and adapters included. The input
/// projection is either three layers with inputs of embed_dim, kdim and vdim, or one fused layer
/// as torch's `in_proj_weight`, rows of q, k and v one below the other. On a fused layer an
/// adapter has **one** A for all three; that is PEFT's `lora.MultiheadAttention`. Separate layers
/// give each of them a pair of its own, or none.
///
/// With `num_kv_heads` = num_heads / g, key head h serves the query heads h · g … (h + 1) · g − 1;
/// nothing is repeated in memory.
///
/// The softmax runs in f32 for inputs in f16 and bf16. A query that may see no key at all gets
/// weights of zero, so its output is the bias of out, and no gradient; torch gives NaN. A key
/// that is not allowed has weight 0 exactly, and its value may be any finite number. Attention
/// weights have no dropout (torch's default); `lora_dropout` acts in the projections.
///
/// PEFT 0.21 adds the update of a fused layer's out_proj twice, in forward and in merge. Here it
/// is added once.
///
/// Clones are handles on the same layers.
///
/// Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2; Hu et al. 2021, arXiv:2106.09685,
/// section 4.2; Ainslie et al. 2023, arXiv:2305.13245, section 2.2; torch
/// `nn/functional.py`, `multi_head_attention_forward`; PEFT `tuners/lora/layer.py`,
/// `MultiheadAttention`.
///
/// ```
/// use std::collections::HashMap;
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::VarBuilder;
/// use lora::{AttentionConfig, AttentionInput, LoraBuilder, LoraConfig};
/// use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
///
/// let ones = |shape: &[usize]| Tensor::ones(shape, DType::F32, &Device::Cpu);
/// let weights = HashMap::from([
///     ("self_attn.in_proj_weight".to_string(), ones(&[12, 4])?),
///     ("self_attn.in_proj_bias".to_string(), ones(&[12])?),
///     ("self_attn.out_proj.weight".to_string(), ones(&[4, 4])?),
///     ("self_attn.out_proj.bias".to_string(), ones(&[4])?),
/// ]);
/// let builder = LoraBuilder::new(VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu));
/// let attention = builder.pp("self_attn").attention(4, &AttentionConfig::new(2))?;
///
/// let mut model = builder.model()?;
/// let mut rng = ChaCha8Rng::seed_from_u64(1);
/// let config = LoraConfig::new(2, 4.0).with_targets(["q_proj", "v_proj"]);
/// model.add_adapter("default", &config, &mut rng)?;
/// assert_eq!(attention.to_string(), "\
/// LoraMultiHeadAttention(self_attn: 2 heads of 2, 32 trainable)
///   LoraLinear(self_attn.q_proj: 4 → 4, r = 2, scaling = 2, 16 trainable)
///   LoraLinear(self_attn.k_proj: 4 → 4, 0 trainable)
///   LoraLinear(self_attn.v_proj: 4 → 4, r = 2, scaling = 2, 16 trainable)
///   LoraLinear(self_attn.out_proj: 4 → 4, 0 trainable)");
///
/// let x = ones(&[3, 1, 4])?; // [L, N, E]
/// let input = AttentionInput { is_causal: true, ..AttentionInput::self_attention(&x) };
/// let y = attention.forward_t(&input, false)?.output;
/// assert_eq!(y.dims(), [3, 1, 4]);
/// assert_eq!(y.get(0)?.to_vec2::<f32>()?, [[21.0; 4]]); // v = 5, out = 4 · 5 + 1
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct LoraMultiHeadAttention {
    name: String,
    input: InProjection,
    out: LoraLinear,
    config: AttentionConfig,
    head_dim: usize,
}

#[derive(Clone)]
enum InProjection {
    Fused(LoraLinear),
    Separate(Box<[LoraLinear; 3]>),
}

/// N, L and S.
#[derive(Clone, Copy)]
struct Sizes {
    batched: bool,
    n: usize,
    l: usize,
    s: usize,
}

impl LoraMultiHeadAttention {
    /// Attention over four layers, which keep the adapters they have.
    ///
    /// `name` is the module's path; it stands in messages.
    ///
    /// # Shapes
    ///
    /// W of q (num_heads · head_dim, embed_dim), of k (num_kv_heads · head_dim, kdim), of v
    /// (num_kv_heads · head_dim, vdim), of out (any, num_heads · head_dim).
    ///
    /// # Errors
    ///
    /// [`Error::Attention`] for sizes that do not fit together; [`Error::Unsupported`] for numbers
    /// of heads or a scale that cannot be, layers of one name, and layers of different types or on
    /// different devices.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{AttentionConfig, LoraConfig, LoraLinear, LoraMultiHeadAttention};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// let frozen = |name: &str, out: usize, inputs: usize| {
    ///     let weight = Tensor::ones((out, inputs), DType::F32, &Device::Cpu)?;
    ///     LoraLinear::frozen(name, Linear::new(weight, None))
    /// };
    /// let (q, k) = (frozen("attn.q_proj", 8, 6)?, frozen("attn.k_proj", 4, 6)?);
    /// let (v, out) = (frozen("attn.v_proj", 4, 6)?, frozen("attn.out_proj", 6, 8)?);
    /// let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// q.add_adapter("default", &LoraConfig::new(2, 4.0), &mut rng)?;
    ///
    /// let config = AttentionConfig::new(4).with_kv_heads(2);
    /// let attention = LoraMultiHeadAttention::new("attn", q, k, v, out, &config)?;
    /// assert_eq!(attention.head_dim(), 2);
    /// assert_eq!(attention.parameter_count().trainable, 2 * (6 + 8));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn new(
        name: impl Into<String>,
        q: LoraLinear,
        k: LoraLinear,
        v: LoraLinear,
        out: LoraLinear,
        config: &AttentionConfig,
    ) -> Result<Self> {
        let name = name.into();
        config.check(&name)?;
        let (heads, kv) = (config.num_heads, config.num_kv_heads);
        if !q.out_features().is_multiple_of(heads) {
            return Err(misfit(
                &name,
                "the weight of q",
                &dims(&q),
                format!("num_heads = {heads}"),
                format!("its rows must be a multiple of {heads}"),
            ));
        }
        let head_dim = q.out_features() / heads;
        for (what, layer) in [("the weight of k", &k), ("the weight of v", &v)] {
            if layer.out_features() != kv * head_dim {
                return Err(misfit(
                    &name,
                    what,
                    &dims(layer),
                    format!("num_kv_heads = {kv} beside q {:?}", dims(&q)),
                    format!("it must have {kv} · {head_dim} rows"),
                ));
            }
        }
        let input = InProjection::Separate(Box::new([q, k, v]));
        Self::checked(name, input, out, config, head_dim)
    }

    /// Attention over one layer for q, k and v together, and one for the output.
    ///
    /// For keys and values other than the query the fused layer runs once for each different
    /// tensor, and what is not needed of its output is left: up to three times the work of
    /// separate layers. Self-attention costs one product.
    ///
    /// # Shapes
    ///
    /// W of in_proj ((num_heads + 2 · num_kv_heads) · head_dim, embed_dim): the rows of q, of k,
    /// of v; of out (any, num_heads · head_dim).
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{AttentionConfig, LoraLinear, LoraMultiHeadAttention};
    /// # let frozen = |name: &str, out: usize, inputs: usize| {
    /// #     let weight = Tensor::ones((out, inputs), DType::F32, &Device::Cpu)?;
    /// #     LoraLinear::frozen(name, Linear::new(weight, None))
    /// # };
    /// let (in_proj, out) = (frozen("attn", 18, 6)?, frozen("attn.base_layer.out_proj", 6, 6)?);
    /// let config = AttentionConfig::new(2);
    /// let attention = LoraMultiHeadAttention::fused("attn", in_proj, out, &config)?;
    /// assert_eq!(attention.head_dim(), 3);
    /// assert!(attention.in_proj().is_some() && attention.q_proj().is_none());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn fused(
        name: impl Into<String>,
        in_proj: LoraLinear,
        out: LoraLinear,
        config: &AttentionConfig,
    ) -> Result<Self> {
        let name = name.into();
        config.check(&name)?;
        let (heads, kv) = (config.num_heads, config.num_kv_heads);
        let parts = heads.saturating_add(kv.saturating_mul(2));
        if !in_proj.out_features().is_multiple_of(parts) {
            return Err(misfit(
                &name,
                "the weight of in_proj",
                &dims(&in_proj),
                format!("num_heads = {heads} and num_kv_heads = {kv}"),
                format!("its rows must be a multiple of {heads} + 2 · {kv}"),
            ));
        }
        let head_dim = in_proj.out_features() / parts;
        Self::checked(name, InProjection::Fused(in_proj), out, config, head_dim)
    }

    fn checked(
        name: String,
        input: InProjection,
        out: LoraLinear,
        config: &AttentionConfig,
        head_dim: usize,
    ) -> Result<Self> {
        let inner = config.num_heads * head_dim;
        if out.in_features() != inner {
            return Err(misfit(
                &name,
                "the weight of out",
                &dims(&out),
                format!("num_heads = {} of {head_dim}", config.num_heads),
                format!("it must have {inner} columns"),
            ));
        }
        let attention = Self {
            name,
            input,
            out,
            config: config.clone(),
            head_dim,
        };
        let layers = attention.layers();
        let kind = |layer: &LoraLinear| {
            let base = layer.base();
            (
                base.weight().dtype(),
                base.weight().device().location(),
                layer.name().to_string(),
            )
        };
        let mut kinds: Vec<_> = layers.into_iter().map(kind).collect();
        for pair in kinds.windows(2) {
            if (pair[0].0, pair[0].1) != (pair[1].0, pair[1].1) {
                return Err(unsupported(
                    &format!("layer {}: {pair:?}", attention.name),
                    "the projections must have one type and lie on one device",
                ));
            }
        }
        kinds.sort_by(|a, b| a.2.cmp(&b.2));
        if let Some(pair) = kinds.windows(2).find(|pair| pair[0].2 == pair[1].2) {
            return Err(unsupported(
                &format!(
                    "layer {}: two projections named {:?}",
                    attention.name, pair[0].2
                ),
                "their parameters would have one name; give each its path in the model",
            ));
        }
        Ok(attention)
    }

    /// The module's path, as given to [`new`](Self::new).
    ///
    /// ```
    /// # use candle_core::{DType, Device};
    /// # use candle_nn::VarBuilder;
    /// # use lora::{AttentionConfig, LoraBuilder};
    /// # let b = LoraBuilder::new(VarBuilder::zeros(DType::F32, &Device::Cpu));
    /// let attention = b.pp("attn").attention(8, &AttentionConfig::new(2))?;
    /// assert_eq!(attention.name(), "attn");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The settings.
    ///
    /// ```
    /// # use candle_core::{DType, Device};
    /// # use candle_nn::VarBuilder;
    /// # use lora::{AttentionConfig, LoraBuilder};
    /// # let b = LoraBuilder::new(VarBuilder::zeros(DType::F32, &Device::Cpu));
    /// let attention = b.pp("attn").attention(8, &AttentionConfig::new(2))?;
    /// assert_eq!(attention.config().num_heads, 2);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn config(&self) -> &AttentionConfig {
        &self.config
    }

    /// The number of features of one head.
    ///
    /// ```
    /// # use candle_core::{DType, Device};
    /// # use candle_nn::VarBuilder;
    /// # use lora::{AttentionConfig, LoraBuilder};
    /// # let b = LoraBuilder::new(VarBuilder::zeros(DType::F32, &Device::Cpu));
    /// let attention = b.pp("attn").attention(8, &AttentionConfig::new(2))?;
    /// assert_eq!(attention.head_dim(), 8 / 2);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// The fused layer of q, k and v, where there is one.
    ///
    /// ```
    /// # use candle_core::{DType, Device};
    /// # use candle_nn::VarBuilder;
    /// # use lora::{AttentionConfig, LoraBuilder};
    /// # let b = LoraBuilder::new(VarBuilder::zeros(DType::F32, &Device::Cpu));
    /// let attention = b.pp("attn").attention_fused(8, &AttentionConfig::new(2))?;
    /// assert_eq!(attention.in_proj().unwrap().out_features(), 3 * 8);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn in_proj(&self) -> Option<&LoraLinear> {
        match &self.input {
            InProjection::Fused(layer) => Some(layer),
            InProjection::Separate(_) => None,
        }
    }

    /// The layer of the queries, unless it is fused with the others.
    ///
    /// ```
    /// # use candle_core::{DType, Device};
    /// # use candle_nn::VarBuilder;
    /// # use lora::{AttentionConfig, LoraBuilder};
    /// # let b = LoraBuilder::new(VarBuilder::zeros(DType::F32, &Device::Cpu));
    /// let attention = b.pp("attn").attention(8, &AttentionConfig::new(2))?;
    /// assert_eq!(attention.q_proj().unwrap().name(), "attn.q_proj");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn q_proj(&self) -> Option<&LoraLinear> {
        self.separate(0)
    }

    /// The layer of the keys, unless it is fused with the others.
    ///
    /// ```
    /// # use candle_core::{DType, Device};
    /// # use candle_nn::VarBuilder;
    /// # use lora::{AttentionConfig, LoraBuilder};
    /// # let b = LoraBuilder::new(VarBuilder::zeros(DType::F32, &Device::Cpu));
    /// let attention = b.pp("attn").attention(8, &AttentionConfig::new(2))?;
    /// assert_eq!(attention.k_proj().unwrap().name(), "attn.k_proj");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn k_proj(&self) -> Option<&LoraLinear> {
        self.separate(1)
    }

    /// The layer of the values, unless it is fused with the others.
    ///
    /// ```
    /// # use candle_core::{DType, Device};
    /// # use candle_nn::VarBuilder;
    /// # use lora::{AttentionConfig, LoraBuilder};
    /// # let b = LoraBuilder::new(VarBuilder::zeros(DType::F32, &Device::Cpu));
    /// let attention = b.pp("attn").attention(8, &AttentionConfig::new(2))?;
    /// assert_eq!(attention.v_proj().unwrap().name(), "attn.v_proj");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn v_proj(&self) -> Option<&LoraLinear> {
        self.separate(2)
    }

    /// The layer of the output.
    ///
    /// ```
    /// # use candle_core::{DType, Device};
    /// # use candle_nn::VarBuilder;
    /// # use lora::{AttentionConfig, LoraBuilder};
    /// # let b = LoraBuilder::new(VarBuilder::zeros(DType::F32, &Device::Cpu));
    /// let attention = b.pp("attn").attention(8, &AttentionConfig::new(2))?;
    /// assert_eq!(attention.out_proj().name(), "attn.out_proj");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn out_proj(&self) -> &LoraLinear {
        &self.out
    }

    fn separate(&self, index: usize) -> Option<&LoraLinear> {
        match &self.input {
            InProjection::Fused(_) => None,
            InProjection::Separate(layers) => layers.get(index),
        }
    }

    /// All projections: q, k, v, out, or in_proj, out.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{AnyLayer, AttentionConfig, LoraLinear, LoraModel, LoraMultiHeadAttention};
    /// # let frozen = |name: &str, out: usize, inputs: usize| {
    /// #     let weight = Tensor::ones((out, inputs), DType::F32, &Device::Cpu)?;
    /// #     LoraLinear::frozen(name, Linear::new(weight, None))
    /// # };
    /// # let (in_proj, out) = (frozen("attn", 18, 6)?, frozen("attn.base_layer.out_proj", 6, 6)?);
    /// # let config = AttentionConfig::new(2);
    /// let attention = LoraMultiHeadAttention::fused("attn", in_proj, out, &config)?;
    /// let layers: Vec<&dyn AnyLayer> =
    ///     attention.layers().into_iter().map(|layer| layer as &dyn AnyLayer).collect();
    /// let model = LoraModel::new(&layers)?;
    /// assert_eq!(model.layer_names(), ["attn", "attn.base_layer.out_proj"]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn layers(&self) -> Vec<&LoraLinear> {
        let mut layers = match &self.input {
            InProjection::Fused(layer) => vec![layer],
            InProjection::Separate(layers) => layers.iter().collect(),
        };
        layers.push(&self.out);
        layers
    }

    /// The variables that train, under PEFT's names and sorted by them.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{AttentionConfig, LoraConfig, LoraLinear, LoraMultiHeadAttention};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let frozen = |name: &str, out: usize, inputs: usize| {
    /// #     let weight = Tensor::ones((out, inputs), DType::F32, &Device::Cpu)?;
    /// #     LoraLinear::frozen(name, Linear::new(weight, None))
    /// # };
    /// # let (in_proj, out) = (frozen("attn", 18, 6)?, frozen("attn.base_layer.out_proj", 6, 6)?);
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// # let config = AttentionConfig::new(2);
    /// let attention = LoraMultiHeadAttention::fused("attn", in_proj, out, &config)?;
    /// attention.out_proj().add_adapter("default", &LoraConfig::new(2, 4.0), &mut rng)?;
    /// let names: Vec<_> = attention.trainable_parameters().into_iter().map(|(n, _)| n).collect();
    /// assert_eq!(names, [
    ///     "base_model.model.attn.base_layer.out_proj.lora_A.weight",
    ///     "base_model.model.attn.base_layer.out_proj.lora_B.weight",
    /// ]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn trainable_parameters(&self) -> Vec<(String, Var)> {
        let layers = self.layers().into_iter();
        let mut all: Vec<_> = layers.flat_map(LoraLinear::trainable_parameters).collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    }

    /// How many numbers the projections hold, and how many of them train.
    ///
    /// ```
    /// # use candle_core::{DType, Device};
    /// # use candle_nn::VarBuilder;
    /// # use lora::{AttentionConfig, LoraBuilder};
    /// # let b = LoraBuilder::new(VarBuilder::zeros(DType::F32, &Device::Cpu));
    /// let attention = b.pp("attn").attention(8, &AttentionConfig::new(2))?;
    /// assert_eq!(attention.parameter_count().all, 4 * (8 * 8 + 8));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn parameter_count(&self) -> ParameterCount {
        self.layers()
            .into_iter()
            .map(LoraLinear::parameter_count)
            .sum()
    }

    /// Merges the active adapters into the weights of all projections.
    ///
    /// # Errors
    ///
    /// As [`LoraLayer::merge`](crate::LoraLayer::merge); then no projection is merged anew.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{AttentionConfig, Init, LoraConfig, LoraLinear, LoraMultiHeadAttention};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let frozen = |name: &str, out: usize, inputs: usize| {
    /// #     let weight = Tensor::ones((out, inputs), DType::F32, &Device::Cpu)?;
    /// #     LoraLinear::frozen(name, Linear::new(weight, None))
    /// # };
    /// # let (in_proj, out) = (frozen("attn", 18, 6)?, frozen("attn.base_layer.out_proj", 6, 6)?);
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// # let config = AttentionConfig::new(2);
    /// let attention = LoraMultiHeadAttention::fused("attn", in_proj, out, &config)?;
    /// attention.out_proj().add_adapter("default", &LoraConfig::new(2, 4.0), &mut rng)?;
    /// attention.merge()?;
    /// assert!(attention.is_merged());
    /// attention.unmerge();
    /// assert!(!attention.is_merged());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn merge(&self) -> Result<()> {
        self.merge_all(LoraLinear::merge)
    }

    /// As [`merge`](Self::merge), but refuses a weight or bias that is NaN or infinite.
    ///
    /// # Errors
    ///
    /// [`Error::MergeNotFinite`]; then no projection is merged anew.
    ///
    /// ```
    /// # use candle_core::{DType, Device};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # use candle_nn::VarBuilder;
    /// # use lora::{AttentionConfig, LoraBuilder, LoraConfig};
    /// # let b = LoraBuilder::new(VarBuilder::zeros(DType::F32, &Device::Cpu));
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// let attention = b.pp("attn").attention(8, &AttentionConfig::new(2))?;
    /// let config = LoraConfig::new(2, 4.0).with_targets(["q_proj", "v_proj"]);
    /// b.model()?.add_adapter("default", &config, &mut rng)?;
    /// attention.safe_merge()?;
    /// assert!(attention.q_proj().unwrap().is_merged());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn safe_merge(&self) -> Result<()> {
        self.merge_all(LoraLinear::safe_merge)
    }

    fn merge_all(&self, merge: impl Fn(&LoraLinear) -> Result<()>) -> Result<()> {
        let mut done: Vec<&LoraLinear> = Vec::new();
        for layer in self.layers().into_iter().filter(|l| !l.is_merged()) {
            if let Err(error) = merge(layer) {
                done.into_iter().for_each(LoraLinear::unmerge);
                return Err(error);
            }
            done.push(layer);
        }
        Ok(())
    }

    /// Takes merged adapters out of all weights, which are then exactly what they were.
    ///
    /// ```
    /// # use candle_core::{DType, Device};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # use candle_nn::VarBuilder;
    /// # use lora::{AttentionConfig, LoraBuilder, LoraConfig};
    /// # let b = LoraBuilder::new(VarBuilder::zeros(DType::F32, &Device::Cpu));
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// let attention = b.pp("attn").attention(8, &AttentionConfig::new(2))?;
    /// let config = LoraConfig::new(2, 4.0).with_targets(["q_proj", "v_proj"]);
    /// b.model()?.add_adapter("default", &config, &mut rng)?;
    /// attention.safe_merge()?;
    /// attention.unmerge();
    /// assert!(!attention.is_merged());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn unmerge(&self) {
        self.layers().into_iter().for_each(LoraLinear::unmerge);
    }

    /// Whether adapters are merged into the weight of any projection.
    ///
    /// ```
    /// # use candle_core::{DType, Device};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # use candle_nn::VarBuilder;
    /// # use lora::{AttentionConfig, LoraBuilder, LoraConfig};
    /// # let b = LoraBuilder::new(VarBuilder::zeros(DType::F32, &Device::Cpu));
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// let attention = b.pp("attn").attention(8, &AttentionConfig::new(2))?;
    /// let config = LoraConfig::new(2, 4.0).with_targets(["q_proj", "v_proj"]);
    /// b.model()?.add_adapter("default", &config, &mut rng)?;
    /// assert!(!attention.is_merged());
    /// attention.safe_merge()?;
    /// assert!(attention.is_merged());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn is_merged(&self) -> bool {
        self.layers().into_iter().any(LoraLinear::is_merged)
    }

    /// One pass; `train` turns the adapters' dropout on.
    ///
    /// [`Module::forward`] is self-attention without masks and with `train = false`. With
    /// [`LoraModel::with_adapters`](crate::LoraModel::with_adapters) each of the N rows has its
    /// own adapter, in either layout.
    ///
    /// # Shapes
    ///
    /// [`AttentionInput`] and [`AttentionOutput`] tell them.
    ///
    /// # Errors
    ///
    /// [`Error::Attention`] for inputs or masks that do not fit each other or hold nothing;
    /// [`Error::Unsupported`] for a mask that is neither of type u8 nor of floats; whatever
    /// [`LoraLayer::forward_t`](crate::LoraLayer::forward_t) refuses.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{AttentionConfig, AttentionInput, AttentionWeights, LoraLinear};
    /// # use lora::LoraMultiHeadAttention;
    /// # let frozen = |name: &str, out: usize, inputs: usize| {
    /// #     let weight = Tensor::ones((out, inputs), DType::F32, &Device::Cpu)?;
    /// #     LoraLinear::frozen(name, Linear::new(weight, None))
    /// # };
    /// # let (in_proj, out) = (frozen("attn", 6, 2)?, frozen("attn.out_proj", 2, 2)?);
    /// let config = AttentionConfig::new(1).with_batch_first(true);
    /// let attention = LoraMultiHeadAttention::fused("attn", in_proj, out, &config)?;
    /// let x = Tensor::ones((1, 3, 2), DType::F32, &Device::Cpu)?;
    /// let padding = Tensor::new(&[[0u8, 0, 1]], &Device::Cpu)?;
    /// let answer = attention.forward_t(&AttentionInput {
    ///     key_padding_mask: Some(&padding),
    ///     weights: AttentionWeights::Averaged,
    ///     ..AttentionInput::self_attention(&x)
    /// }, false)?;
    /// assert_eq!(answer.weights.unwrap().to_vec3::<f32>()?, [[[0.5, 0.5, 0.0]; 3]]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn forward_t(&self, input: &AttentionInput<'_>, train: bool) -> Result<AttentionOutput> {
        let sizes = self.check(input)?;
        let answer = self.attend(input, sizes, train);
        answer.map_err(|error| match error {
            Error::Candle(source) => Error::Layer {
                layer: self.name.clone(),
                input: input.query.dims().to_vec(),
                weight: dims(&self.out),
                source: Box::new(source),
            },
            other => other,
        })
    }

    fn check(&self, input: &AttentionInput<'_>) -> Result<Sizes> {
        let (query, key, value) = (input.query, input.key, input.value);
        let named = [("query", query), ("key", key), ("value", value)];
        let layers = match &self.input {
            InProjection::Fused(layer) => [layer; 3],
            InProjection::Separate(layers) => [&layers[0], &layers[1], &layers[2]],
        };
        for ((what, x), layer) in named.into_iter().zip(layers) {
            check_input(layer.name(), &layer.base(), x)?;
            let beside = format!("query {:?}", query.dims());
            let refuse = |wants: &str| {
                let (beside, wants) = (beside.clone(), wants.to_string());
                Err(misfit(&self.name, what, x.dims(), beside, wants))
            };
            if !matches!(x.rank(), 2 | 3) || x.rank() != query.rank() {
                return refuse(if self.config.batch_first {
                    "all inputs must be [N, L, E], or all [L, E]"
                } else {
                    "all inputs must be [L, N, E], or all [L, E]"
                });
            }
            if x.elem_count() == 0 {
                return refuse("every size must be at least 1");
            }
        }
        let batched = query.rank() == 3;
        let size = |x: &Tensor| match (x.dims(), self.config.batch_first) {
            (&[n, l, _], true) | (&[l, n, _], false) => (n, l),
            (other, _) => (1, other[0]),
        };
        let ((n, l), (_, s)) = (size(query), size(key));
        for (what, x) in [("key", key), ("value", value)] {
            if size(x).0 != n {
                let beside = format!("query {:?}", query.dims());
                let wants = format!("both must have {n} rows");
                return Err(misfit(&self.name, what, x.dims(), beside, wants));
            }
        }
        if size(value).1 != s {
            let beside = format!("key {:?}", key.dims());
            let wants = format!("there must be a value for each of the {s} keys");
            return Err(misfit(&self.name, "value", value.dims(), beside, wants));
        }
        Ok(Sizes { batched, n, l, s })
    }

    fn attend(
        &self,
        input: &AttentionInput<'_>,
        sizes: Sizes,
        train: bool,
    ) -> Result<AttentionOutput> {
        let Sizes { batched, n, l, s } = sizes;
        let (heads, kv, dim) = (
            self.config.num_heads,
            self.config.num_kv_heads,
            self.head_dim,
        );
        let (masks, per_query) = (self.masks(input, sizes)?, heads / kv);
        let (q, k, v) = self.project(input, train)?;
        let own = q.dtype();
        let scale = self.config.scale.unwrap_or(1.0 / (dim as f64).sqrt());
        // The query heads of one key head lie together: one product for all of them.
        let q = (q * scale)?.reshape((n, kv, per_query * l, dim))?;
        let scores = q.matmul(&k.t()?)?.reshape((n, heads, l, s))?;
        let weights = masked_softmax(scores.to_dtype(adapter_dtype(own))?, &masks)?;
        let mixed = weights
            .to_dtype(own)?
            .reshape((n, kv, per_query * l, s))?
            .matmul(&v)?
            .reshape((n, heads, l, dim))?
            .transpose(1, 2)?
            .reshape((n, l, heads * dim))?;
        let output = self.out.forward_t(&mixed, train)?;
        let output = match (batched, self.config.batch_first) {
            (false, _) => output.squeeze(0)?,
            (true, true) => output,
            (true, false) => output.transpose(0, 1)?.contiguous()?,
        };
        let weights = match input.weights {
            AttentionWeights::No => None,
            AttentionWeights::Averaged => Some(weights.mean(1)?),
            AttentionWeights::PerHead => Some(weights),
        };
        let finish = |weights: Tensor| -> Result<Tensor> {
            let weights = weights.to_dtype(own)?;
            Ok(if batched {
                weights
            } else {
                weights.squeeze(0)?
            })
        };
        Ok(AttentionOutput {
            output,
            weights: weights.map(finish).transpose()?,
        })
    }

    /// Queries [N, num_heads, L, head_dim], keys and values [N, num_kv_heads, S, head_dim].
    fn project(&self, input: &AttentionInput<'_>, train: bool) -> Result<(Tensor, Tensor, Tensor)> {
        let (heads, kv) = (self.config.num_heads, self.config.num_kv_heads);
        let batch_first = |x: &Tensor| -> Result<Tensor> {
            let x = match (x.rank(), self.config.batch_first) {
                (2, _) => x.unsqueeze(0)?,
                (_, true) => x.clone(),
                (_, false) => x.transpose(0, 1)?,
            };
            Ok(x.contiguous()?)
        };
        // Each different tensor once; equal ids below tell which are the same.
        let query = batch_first(input.query)?;
        let key = if input.key.id() == input.query.id() {
            query.clone()
        } else {
            batch_first(input.key)?
        };
        let value = if input.value.id() == input.key.id() {
            key.clone()
        } else if input.value.id() == input.query.id() {
            query.clone()
        } else {
            batch_first(input.value)?
        };
        let split = |y: &Tensor, start: usize, count: usize| -> Result<Tensor> {
            let (n, length, features) = y.dims3()?;
            let y = y.reshape((n, length, features / self.head_dim, self.head_dim))?;
            let y = y.narrow(2, start, count)?.transpose(1, 2)?;
            Ok(y.contiguous()?)
        };
        match &self.input {
            InProjection::Separate(layers) => {
                let [q, k, v] = &**layers;
                Ok((
                    split(&q.forward_t(&query, train)?, 0, heads)?,
                    split(&k.forward_t(&key, train)?, 0, kv)?,
                    split(&v.forward_t(&value, train)?, 0, kv)?,
                ))
            }
            InProjection::Fused(layer) => {
                let of_query = layer.forward_t(&query, train)?;
                let of_key = if key.id() == query.id() {
                    of_query.clone()
                } else {
                    layer.forward_t(&key, train)?
                };
                let of_value = if value.id() == key.id() {
                    of_key.clone()
                } else if value.id() == query.id() {
                    of_query.clone()
                } else {
                    layer.forward_t(&value, train)?
                };
                Ok((
                    split(&of_query, 0, heads)?,
                    split(&of_key, heads, kv)?,
                    split(&of_value, heads + kv, kv)?,
                ))
            }
        }
    }

    /// All masks, each of a shape that broadcasts over scores [N, num_heads, L, S].
    fn masks(&self, input: &AttentionInput<'_>, sizes: Sizes) -> Result<Vec<Tensor>> {
        let Sizes { batched, n, l, s } = sizes;
        let heads = self.config.num_heads;
        let refuse = |what, mask: &Tensor, wants: String| {
            let (query, key) = (input.query.dims(), input.key.dims());
            let beside = format!("query {query:?} and key {key:?}");
            Err(misfit(&self.name, what, mask.dims(), beside, wants))
        };
        let mut masks = Vec::new();
        if let Some(mask) = input.attn_mask {
            self.check_mask("attn_mask", mask)?;
            masks.push(match mask.dims() {
                [a, b] if (*a, *b) == (l, s) => mask.reshape((1, 1, l, s))?,
                [a, b, c] if (*a, *b, *c) == (n * heads, l, s) => mask.reshape((n, heads, l, s))?,
                _ => {
                    let wants = format!("it must be [{l}, {s}] or [{}, {l}, {s}]", n * heads);
                    return refuse("attn_mask", mask, wants);
                }
            });
        }
        if let Some(mask) = input.key_padding_mask {
            self.check_mask("key_padding_mask", mask)?;
            masks.push(match mask.dims() {
                [a, b] if (*a, *b) == (n, s) => mask.reshape((n, 1, 1, s))?,
                [a] if !batched && *a == s => mask.reshape((1, 1, 1, s))?,
                _ => {
                    let wants = format!("it must be [{n}, {s}]");
                    return refuse("key_padding_mask", mask, wants);
                }
            });
        }
        if input.is_causal {
            masks.push(later(l, s, input.query.device())?);
        }
        Ok(masks)
    }

    fn check_mask(&self, what: &str, mask: &Tensor) -> Result<()> {
        if mask.dtype() == DType::U8 || mask.dtype().is_float() {
            return Ok(());
        }
        Err(unsupported(
            &format!("layer {}: {what} of type {:?}", self.name, mask.dtype()),
            "use u8 (1 = not allowed) or floats that are added to the scores",
        ))
    }
}

impl Module for LoraMultiHeadAttention {
    /// Self-attention without masks and without dropout.
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let input = AttentionInput::self_attention(x);
        Ok(self.forward_t(&input, false)?.output)
    }
}

impl fmt::Display for LoraMultiHeadAttention {
    /// One line for the whole, and one for each projection.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (heads, kv) = (self.config.num_heads, self.config.num_kv_heads);
        write!(
            f,
            "LoraMultiHeadAttention({}: {heads} heads of {}",
            self.name, self.head_dim
        )?;
        if kv != heads {
            write!(f, ", {kv} for keys and values")?;
        }
        let trainable = grouped(self.parameter_count().trainable);
        write!(f, ", {trainable} trainable)")?;
        self.layers()
            .into_iter()
            .try_for_each(|layer| write!(f, "\n  {layer}"))
    }
}

impl fmt::Debug for LoraMultiHeadAttention {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl LoraBuilder<'_> {
    /// Attention from the checkpoint of a torch `nn.MultiheadAttention`, split into the layers
    /// `q_proj`, `k_proj`, `v_proj` and `out_proj` below this place.
    ///
    /// Reads `in_proj_weight`, `out_proj.weight` and, where the checkpoint has them,
    /// `in_proj_bias` and `out_proj.bias`. Each projection takes adapters of its own, so LoRA on
    /// q and v alone is `with_targets(["q_proj", "v_proj"])`. For checkpoints with other names
    /// build four layers with [`linear`](Self::linear) and join them with
    /// [`LoraMultiHeadAttention::new`].
    ///
    /// # Shapes
    ///
    /// `in_proj_weight` (embed_dim + 2 · num_kv_heads · head_dim, embed_dim), with head_dim =
    /// embed_dim / num_heads; `out_proj.weight` (embed_dim, embed_dim).
    ///
    /// # Errors
    ///
    /// A tensor that is missing or has another shape; one bias without the other; `bias_k` and
    /// `bias_v`, which are not supported; what [`LoraMultiHeadAttention::new`] refuses.
    ///
    /// Source: torch `nn/modules/activation.py`, `MultiheadAttention`.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::VarBuilder;
    /// # use lora::{AttentionConfig, LoraBuilder};
    /// let builder = LoraBuilder::new(VarBuilder::zeros(DType::F32, &Device::Cpu));
    /// let attention = builder.pp("self_attn").attention(8, &AttentionConfig::new(4))?;
    /// assert_eq!(attention.head_dim(), 2);
    /// assert_eq!(builder.model()?.layer_names(), [
    ///     "self_attn.k_proj", "self_attn.out_proj", "self_attn.q_proj", "self_attn.v_proj",
    /// ]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn attention(
        &self,
        embed_dim: usize,
        config: &AttentionConfig,
    ) -> Result<LoraMultiHeadAttention> {
        self.attention_with_dims(embed_dim, embed_dim, embed_dim, config)
    }

    /// As [`attention`](Self::attention), with keys and values of their own sizes.
    ///
    /// Where `kdim` or `vdim` is not `embed_dim`, it reads `q_proj_weight`, `k_proj_weight` and
    /// `v_proj_weight` in place of `in_proj_weight`, as torch does.
    ///
    /// # Shapes
    ///
    /// `q_proj_weight` (embed_dim, embed_dim), `k_proj_weight` (num_kv_heads · head_dim, kdim),
    /// `v_proj_weight` (num_kv_heads · head_dim, vdim).
    ///
    /// # Errors
    ///
    /// As [`attention`](Self::attention).
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::VarBuilder;
    /// # use lora::{AttentionConfig, LoraBuilder};
    /// let builder = LoraBuilder::new(VarBuilder::zeros(DType::F32, &Device::Cpu));
    /// let config = AttentionConfig::new(2);
    /// let attention = builder.pp("cross_attn").attention_with_dims(8, 6, 4, &config)?;
    /// assert_eq!(attention.k_proj().map(|layer| layer.in_features()), Some(6));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn attention_with_dims(
        &self,
        embed_dim: usize,
        kdim: usize,
        vdim: usize,
        config: &AttentionConfig,
    ) -> Result<LoraMultiHeadAttention> {
        let place = TorchAttention::new(self, embed_dim, config)?;
        let (rows, vb) = (place.rows(), self.vb());
        let weights = if kdim == embed_dim && vdim == embed_dim {
            let weight = vb.get((place.all_rows(), embed_dim), "in_proj_weight")?;
            cut(&weight, &rows)?
        } else {
            let [q, k, v] = rows;
            [
                vb.get((q, embed_dim), "q_proj_weight")?,
                vb.get((k, kdim), "k_proj_weight")?,
                vb.get((v, vdim), "v_proj_weight")?,
            ]
        };
        let biases = match place.in_bias()? {
            Some(bias) => cut(&bias, &rows)?.map(Some),
            None => [const { None }; 3],
        };
        let out = place.out()?;
        let noted = |at: &str, weight: Tensor, bias| self.pp(at).noted(Linear::new(weight, bias));
        let ([q, k, v], [q_bias, k_bias, v_bias]) = (weights, biases);
        LoraMultiHeadAttention::new(
            &place.name,
            noted("q_proj", q, q_bias)?,
            noted("k_proj", k, k_bias)?,
            noted("v_proj", v, v_bias)?,
            self.pp("out_proj").noted(out)?,
            config,
        )
    }

    /// As [`attention`](Self::attention), with q, k and v in one layer: the form, and the names,
    /// of PEFT's adapters for `nn.MultiheadAttention`.
    ///
    /// The fused layer has the name of this place, such as `layers.0.self_attn`, the other one
    /// PEFT's `layers.0.self_attn.base_layer.out_proj`. PEFT adapts both for the one target
    /// `self_attn`; here name both: `["self_attn", "out_proj"]`.
    ///
    /// # Errors
    ///
    /// As [`attention`](Self::attention); [`Error::Name`] at the root, which has no name.
    ///
    /// Source: PEFT `tuners/lora/layer.py`, `MultiheadAttention`.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::VarBuilder;
    /// # use lora::{AttentionConfig, LoraBuilder};
    /// let builder = LoraBuilder::new(VarBuilder::zeros(DType::F32, &Device::Cpu));
    /// let attention = builder.pp("self_attn").attention_fused(8, &AttentionConfig::new(4))?;
    /// assert_eq!(attention.in_proj().map(|layer| layer.out_features()), Some(24));
    /// assert_eq!(
    ///     builder.model()?.layer_names(),
    ///     ["self_attn", "self_attn.base_layer.out_proj"]
    /// );
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn attention_fused(
        &self,
        embed_dim: usize,
        config: &AttentionConfig,
    ) -> Result<LoraMultiHeadAttention> {
        let place = TorchAttention::new(self, embed_dim, config)?;
        let shape = (place.all_rows(), embed_dim);
        let weight = self.vb().get(shape, "in_proj_weight")?;
        let (bias, out) = (place.in_bias()?, place.out()?);
        let in_proj = self.noted(Linear::new(weight, bias))?;
        let out = self.pp("base_layer").pp("out_proj").noted(out)?;
        LoraMultiHeadAttention::fused(&place.name, in_proj, out, config)
    }
}

/// Where the tensors of a torch `nn.MultiheadAttention` lie.
struct TorchAttention<'a> {
    builder: &'a LoraBuilder<'a>,
    name: String,
    embed_dim: usize,
    kv_rows: usize,
    biased: bool,
}

impl<'a> TorchAttention<'a> {
    fn new(
        builder: &'a LoraBuilder<'_>,
        embed_dim: usize,
        config: &AttentionConfig,
    ) -> Result<Self> {
        let vb = builder.vb();
        let name = match vb.prefix() {
            empty if empty.is_empty() => "attention".to_string(),
            path => path,
        };
        config.check(&name)?;
        let heads = config.num_heads;
        if embed_dim == 0 || !embed_dim.is_multiple_of(heads) {
            return Err(unsupported(
                &format!("layer {name}: embed_dim = {embed_dim} with num_heads = {heads}"),
                "embed_dim must be a multiple of num_heads",
            ));
        }
        // `VarBuilder::zeros` says yes to every name.
        let honest = !vb.contains_tensor("no tensor has this name");
        if let Some(extra) = ["bias_k", "bias_v"]
            .into_iter()
            .find(|extra| honest && vb.contains_tensor(extra))
        {
            return Err(unsupported(
                &format!("layer {name}: {extra}"),
                "a key and value of the layer's own (torch's add_bias_kv) have no place here",
            ));
        }
        let biased = vb.contains_tensor("in_proj_bias");
        if biased != vb.contains_tensor("out_proj.bias") {
            return Err(unsupported(
                &format!("layer {name}: only one of in_proj_bias and out_proj.bias"),
                "torch has both or none; build the layers one by one for other checkpoints",
            ));
        }
        Ok(Self {
            builder,
            name,
            embed_dim,
            kv_rows: embed_dim / heads * config.num_kv_heads,
            biased,
        })
    }

    fn rows(&self) -> [usize; 3] {
        [self.embed_dim, self.kv_rows, self.kv_rows]
    }

    fn all_rows(&self) -> usize {
        self.embed_dim
            .saturating_add(self.kv_rows.saturating_mul(2))
    }

    fn in_bias(&self) -> Result<Option<Tensor>> {
        Ok(match self.biased {
            true => Some(self.builder.vb().get(self.all_rows(), "in_proj_bias")?),
            false => None,
        })
    }

    fn out(&self) -> Result<Linear> {
        let (size, vb) = (self.embed_dim, self.builder.vb().pp("out_proj"));
        Ok(match self.biased {
            true => candle_nn::linear(size, size, vb)?,
            false => candle_nn::linear_no_bias(size, size, vb)?,
        })
    }
}

/// A tensor in three, by rows.
fn cut(tensor: &Tensor, &[q, k, v]: &[usize; 3]) -> Result<[Tensor; 3]> {
    Ok([
        tensor.narrow(0, 0, q)?,
        tensor.narrow(0, q, k)?,
        tensor.narrow(0, q + k, v)?,
    ])
}

/// 1 where the key is later than the query: [1, 1, L, S].
fn later(l: usize, s: usize, device: &Device) -> Result<Tensor> {
    let queries = Tensor::arange(0u32, l as u32, device)?.reshape((1, 1, l, 1))?;
    let keys = Tensor::arange(0u32, s as u32, device)?.reshape((1, 1, 1, s))?;
    Ok(keys.broadcast_gt(&queries)?)
}

/// softmax(scores + masks) over the last dimension: 0 for what is not allowed, and 0 throughout
/// where nothing is allowed.
///
/// No infinity takes part in arithmetic that gradients pass through, so none becomes NaN.
fn masked_softmax(mut scores: Tensor, masks: &[Tensor]) -> Result<Tensor> {
    let dtype = scores.dtype();
    let either = |a: Option<Tensor>, b: Tensor| -> Result<Tensor> {
        Ok(match a {
            Some(a) => a.broadcast_maximum(&b)?,
            None => b,
        })
    };
    let mut blocked = None;
    let mut added = false;
    for mask in masks {
        if mask.dtype() == DType::U8 {
            blocked = Some(either(blocked, mask.clone())?);
        } else {
            scores = scores.broadcast_add(&mask.to_dtype(dtype)?)?;
            added = true;
        }
    }
    if added {
        blocked = Some(either(blocked, scores.eq(f64::NEG_INFINITY)?)?);
    }
    let blocked = match blocked {
        Some(blocked) => Some(blocked.broadcast_as(scores.shape())?),
        None => None,
    };
    let replaced = |x: Tensor, by: f64| -> Result<Tensor> {
        Ok(match &blocked {
            Some(blocked) => {
                let by = Tensor::new(by, x.device())?.to_dtype(dtype)?;
                blocked.where_cond(&by.broadcast_as(x.shape())?, &x)?
            }
            None => x,
        })
    };
    let lowest = match dtype {
        DType::F64 => f64::MIN,
        _ => f64::from(f32::MIN),
    };
    let scores = replaced(scores, lowest)?;
    // The shift changes nothing, so no gradient has to pass through it.
    let shift = scores.max_keepdim(3)?.detach();
    let parts = replaced(scores.broadcast_sub(&shift)?.exp()?, 0.0)?;
    let sum = parts.sum_keepdim(3)?;
    // A row with anything in it sums to at least 1.
    let sum = (&sum + sum.eq(0f64)?.to_dtype(dtype)?)?;
    Ok(parts.broadcast_div(&sum)?)
}

fn dims(layer: &LoraLinear) -> Vec<usize> {
    layer.base().weight().dims().to_vec()
}

fn misfit(
    layer: &str,
    what: &'static str,
    shape: &[usize],
    beside: String,
    wants: String,
) -> Error {
    Error::Attention {
        layer: layer.to_string(),
        what,
        shape: shape.to_vec(),
        beside,
        wants,
    }
}
