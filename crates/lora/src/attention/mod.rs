//! Multi-head attention whose projections take adapters.

mod forward;
mod input;
mod torch;

pub use input::{AttentionConfig, AttentionInput, AttentionOutput, AttentionWeights};

use std::fmt;

use candle_core::{Tensor, Var};
use candle_nn::Module;

use crate::config::unsupported;
use crate::count::grouped;
use crate::{Error, LoraLinear, ParameterCount, Result};

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
