//! The sizes of a Llama model, and its weights before any training.

use std::collections::BTreeMap;
use std::fmt;

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::chart::grouped;
use crate::rng::Rng;
use crate::{Error, Result};

/// The sizes of a [`Llama`](super::Llama), under the names of Hugging Face's `config.json`.
///
/// ```
/// use course::models::LlamaConfig;
///
/// let config: LlamaConfig = serde_json::from_str(r#"{"hidden_size": 64, "vocab_size": 100,
///     "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
///     "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
///     "max_position_embeddings": 128, "tie_word_embeddings": true}"#)?;
/// assert_eq!(config.head_dim(), 16);
/// assert_eq!(LlamaConfig::smollm2_135m().parameter_count(), 134_515_008);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "ConfigFile")]
pub struct LlamaConfig {
    /// Tokens in the vocabulary.
    pub vocab_size: usize,
    /// Numbers in a token's vector.
    pub hidden_size: usize,
    /// Numbers inside the feed-forward part.
    pub intermediate_size: usize,
    /// Transformer layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads, each for as many query heads.
    pub num_key_value_heads: usize,
    /// ε of the RMS norms.
    pub rms_norm_eps: f64,
    /// θ of the rotary embedding.
    pub rope_theta: f64,
    /// The longest text.
    pub max_position_embeddings: usize,
    /// Whether the output layer is the embedding.
    pub tie_word_embeddings: bool,
}

/// `config.json`, of transformers before 5 and since.
#[derive(Deserialize)]
struct ConfigFile {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    rms_norm_eps: f64,
    rope_theta: Option<f64>,
    rope_scaling: Option<serde_json::Value>,
    rope_parameters: Option<RopeParameters>,
    max_position_embeddings: usize,
    #[serde(default)]
    tie_word_embeddings: bool,
    model_type: Option<String>,
    hidden_act: Option<String>,
    head_dim: Option<usize>,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
}

impl ConfigFile {
    /// What makes it another kind of model, if anything does.
    fn other(&self) -> Option<String> {
        if let Some(kind) = self.model_type.as_deref().filter(|kind| *kind != "llama") {
            return Some(format!("its model_type is {kind:?}, not \"llama\""));
        }
        if let Some(act) = self.hidden_act.as_deref().filter(|act| *act != "silu") {
            return Some(format!("its hidden_act is {act:?}, not \"silu\""));
        }
        if self.attention_bias || self.mlp_bias {
            return Some("its linear layers have biases, which this model does not".to_string());
        }
        let usual = self.hidden_size / self.num_attention_heads.max(1);
        let given = self.head_dim.filter(|dim| *dim != usual)?;
        Some(format!(
            "its head_dim is {given}, not hidden_size / num_attention_heads = {usual}"
        ))
    }
}

#[derive(Deserialize)]
struct RopeParameters {
    rope_theta: f64,
    rope_type: String,
}

impl TryFrom<ConfigFile> for LlamaConfig {
    type Error = Error;

    fn try_from(file: ConfigFile) -> Result<Self> {
        let refuse = |problem: &str| Error::Model {
            model: "Llama",
            problem: problem.to_string(),
        };
        if let Some(problem) = file.other() {
            return Err(refuse(&problem));
        }
        let newer = file.rope_parameters.as_ref();
        if file.rope_scaling.is_some() || newer.is_some_and(|rope| rope.rope_type != "default") {
            return Err(refuse(
                "its rotary embedding is scaled, which this model does not do",
            ));
        }
        let theta = file.rope_theta.or(newer.map(|rope| rope.rope_theta));
        let config = Self {
            vocab_size: file.vocab_size,
            hidden_size: file.hidden_size,
            intermediate_size: file.intermediate_size,
            num_hidden_layers: file.num_hidden_layers,
            num_attention_heads: file.num_attention_heads,
            num_key_value_heads: file.num_key_value_heads,
            rms_norm_eps: file.rms_norm_eps,
            rope_theta: theta.ok_or_else(|| refuse("its config.json has no rope_theta"))?,
            max_position_embeddings: file.max_position_embeddings,
            tie_word_embeddings: file.tie_word_embeddings,
        };
        config.validate()?;
        Ok(config)
    }
}

impl LlamaConfig {
    /// The shape of SmolLM2-135M.
    ///
    /// Source: `config.json` of HuggingFaceTB/SmolLM2-135M.
    #[must_use]
    pub fn smollm2_135m() -> Self {
        Self {
            vocab_size: 49_152,
            hidden_size: 576,
            intermediate_size: 1536,
            num_hidden_layers: 30,
            num_attention_heads: 9,
            num_key_value_heads: 3,
            rms_norm_eps: 1e-5,
            rope_theta: 100_000.0,
            max_position_embeddings: 8192,
            tie_word_embeddings: true,
        }
    }

    /// Numbers in one head: `hidden_size` / `num_attention_heads`.
    #[must_use]
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads.max(1)
    }

    /// The base's parameters, a tied output layer counted once.
    #[must_use]
    pub fn parameter_count(&self) -> usize {
        let (h, kv) = (self.hidden_size, self.num_key_value_heads * self.head_dim());
        let attention = 2 * h * h + 2 * h * kv;
        let layer = attention + 3 * h * self.intermediate_size + 2 * h;
        let heads = if self.tie_word_embeddings { 1 } else { 2 };
        heads * self.vocab_size * h + self.num_hidden_layers * layer + h
    }

    /// 1 / √`head_dim`, by which the scores are multiplied.
    pub(super) fn attention_scale(&self) -> f64 {
        1.0 / (self.head_dim() as f64).sqrt()
    }

    /// The weights of a model that has not been trained, under transformers' names: normal
    /// numbers with a deviation of 0.02, norms at 1.
    ///
    /// Source: transformers `initializer_range`.
    ///
    /// # Errors
    ///
    /// What candle reports when it moves a tensor to `device`.
    ///
    /// ```
    /// use course::models::LlamaConfig;
    /// use course::prelude::*;
    ///
    /// let config = LlamaConfig { vocab_size: 9, num_hidden_layers: 1, ..LlamaConfig::smollm2_135m() };
    /// let weights = config.random_weights(&mut rng(1), &Device::Cpu)?;
    /// let count: usize = weights.values().map(|w| w.elem_count()).sum();
    /// assert_eq!(count, config.parameter_count());
    /// # Ok::<(), course::Error>(())
    /// ```
    pub fn random_weights(
        &self,
        rng: &mut Rng,
        device: &Device,
    ) -> Result<BTreeMap<String, Tensor>> {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let kv = self.num_key_value_heads * self.head_dim();
        let mut tensors = BTreeMap::new();
        let mut matrix = |name: String, outputs: usize, inputs: usize| -> Result<()> {
            let weight = (rng.randn((outputs, inputs), device)? * 0.02)?;
            tensors.insert(format!("{name}.weight"), weight);
            Ok(())
        };
        matrix("model.embed_tokens".to_string(), self.vocab_size, hidden)?;
        let mut norms = vec!["model.norm".to_string()];
        for layer in 0..self.num_hidden_layers {
            let at = format!("model.layers.{layer}");
            for (part, outputs, inputs) in [
                ("self_attn.q_proj", hidden, hidden),
                ("self_attn.k_proj", kv, hidden),
                ("self_attn.v_proj", kv, hidden),
                ("self_attn.o_proj", hidden, hidden),
                ("mlp.gate_proj", inner, hidden),
                ("mlp.up_proj", inner, hidden),
                ("mlp.down_proj", hidden, inner),
            ] {
                matrix(format!("{at}.{part}"), outputs, inputs)?;
            }
            norms.push(format!("{at}.input_layernorm"));
            norms.push(format!("{at}.post_attention_layernorm"));
        }
        if !self.tie_word_embeddings {
            matrix("lm_head".to_string(), self.vocab_size, hidden)?;
        }
        for norm in norms {
            let ones = Tensor::ones(hidden, DType::F32, device)?;
            tensors.insert(format!("{norm}.weight"), ones);
        }
        Ok(tensors)
    }

    pub(super) fn validate(&self) -> Result<()> {
        let refuse = |problem: String| {
            Err(Error::Model {
                model: "Llama",
                problem,
            })
        };
        let (heads, kv) = (self.num_attention_heads, self.num_key_value_heads);
        if heads == 0 || kv == 0 || !heads.is_multiple_of(kv) {
            return refuse(format!(
                "num_attention_heads = {heads} must be a multiple of num_key_value_heads = {kv}"
            ));
        }
        // A table of all positions is made.
        if self.max_position_embeddings > 1 << 22 {
            return refuse(format!(
                "max_position_embeddings = {} is more than 4,194,304",
                self.max_position_embeddings
            ));
        }
        let positive = |number: f64| number.is_finite() && number > 0.0;
        if !positive(self.rope_theta) || !positive(self.rms_norm_eps) {
            return refuse(format!(
                "rope_theta = {} and rms_norm_eps = {} must be above 0",
                self.rope_theta, self.rms_norm_eps
            ));
        }
        if !self.hidden_size.is_multiple_of(heads) || !self.head_dim().is_multiple_of(2) {
            return refuse(format!(
                "hidden_size = {} must split into {heads} heads of an even size",
                self.hidden_size
            ));
        }
        Ok(())
    }
}

/// The parts and their numbers of parameters.
///
/// ```
/// let text = course::models::LlamaConfig::smollm2_135m().to_string();
/// assert!(text.starts_with("Llama with 134,515,008 parameters"));
/// ```
impl fmt::Display for LlamaConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (h, inner, layers) = (
            self.hidden_size,
            self.intermediate_size,
            self.num_hidden_layers,
        );
        let (heads, kv) = (self.num_attention_heads, self.num_key_value_heads);
        let table = self.vocab_size * h;
        let number = |count: usize| grouped(&count.to_string());
        let mut parts = vec![
            (
                "embedding",
                table,
                format!("{} tokens of {h} numbers", number(self.vocab_size)),
            ),
            (
                "attention",
                layers * (2 * h * h + 2 * h * kv * self.head_dim()),
                format!(
                    "{layers} layers, {heads} heads of {}, {kv} for keys and values",
                    self.head_dim()
                ),
            ),
            (
                "feed-forward",
                layers * 3 * h * inner,
                format!("{layers} layers, {h} → {inner} → {h}, gated"),
            ),
            (
                "norms",
                (2 * layers + 1) * h,
                "a scale for each number".to_string(),
            ),
        ];
        match self.tie_word_embeddings {
            true => parts.push(("output", 0, "the embedding again".to_string())),
            false => parts.push(("output", table, "a matrix of its own".to_string())),
        }
        write!(
            f,
            "Llama with {} parameters",
            number(self.parameter_count())
        )?;
        for (part, count, how) in parts {
            write!(f, "\n  {part:<12}  {:>11}  {how}", number(count))?;
        }
        Ok(())
    }
}
