//! The sizes of a BERT model.

use std::fmt;

use candle_core::Tensor;
use lora::ops;
use serde::{Deserialize, Serialize};

use crate::chart::grouped;
use crate::{Error, Result};

/// What stands between the two matrices of a feed-forward part.
///
/// ```
/// let act: course::models::HiddenAct = serde_json::from_str("\"gelu_new\"")?;
/// assert_eq!(act, course::models::HiddenAct::GeluTanh);
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum HiddenAct {
    /// x Φ(x), exactly: [`ops::gelu_erf`].
    #[default]
    #[serde(rename = "gelu")]
    Gelu,
    /// Its approximation by tanh: [`ops::gelu`].
    #[serde(rename = "gelu_new", alias = "gelu_pytorch_tanh")]
    GeluTanh,
    /// max(x, 0).
    #[serde(rename = "relu")]
    Relu,
}

impl HiddenAct {
    pub(in crate::models) fn forward(self, x: &Tensor) -> lora::Result<Tensor> {
        match self {
            Self::Gelu => ops::gelu_erf(x),
            Self::GeluTanh => ops::gelu(x),
            Self::Relu => ops::relu(x),
        }
    }
}

/// The sizes of a [`Bert`](super::Bert), under the names of Hugging Face's `config.json`.
///
/// ```
/// use course::models::BertConfig;
///
/// assert_eq!(BertConfig::minilm_l6().parameter_count(), 22_565_376);
/// let config: BertConfig = serde_json::from_str(r#"{"vocab_size": 100, "hidden_size": 64,
///     "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
///     "max_position_embeddings": 32, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
///     "hidden_act": "gelu"}"#)?;
/// assert_eq!(config.head_dim(), 16);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "ConfigFile")]
pub struct BertConfig {
    /// Tokens in the vocabulary.
    pub vocab_size: usize,
    /// Numbers in a token's vector.
    pub hidden_size: usize,
    /// Transformer layers.
    pub num_hidden_layers: usize,
    /// Attention heads.
    pub num_attention_heads: usize,
    /// Numbers inside the feed-forward part.
    pub intermediate_size: usize,
    /// What stands inside the feed-forward part.
    pub hidden_act: HiddenAct,
    /// The longest text in tokens.
    pub max_position_embeddings: usize,
    /// Kinds of segments; the text is of the first.
    pub type_vocab_size: usize,
    /// ε of the layer norms.
    pub layer_norm_eps: f64,
}

/// `config.json`, with what a model may have that this one does not do.
#[derive(Deserialize)]
struct ConfigFile {
    model_type: Option<String>,
    vocab_size: usize,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    intermediate_size: usize,
    #[serde(default)]
    hidden_act: HiddenAct,
    max_position_embeddings: usize,
    type_vocab_size: usize,
    layer_norm_eps: f64,
    position_embedding_type: Option<String>,
    #[serde(default)]
    is_decoder: bool,
}

impl TryFrom<ConfigFile> for BertConfig {
    type Error = Error;

    fn try_from(file: ConfigFile) -> Result<Self> {
        if let Some(kind) = file.model_type.filter(|kind| kind != "bert") {
            return refuse(format!("its model_type is {kind:?}, not \"bert\""));
        }
        if let Some(kind) = file.position_embedding_type.filter(|k| k != "absolute") {
            return refuse(format!(
                "its position_embedding_type is {kind:?}; this model has absolute ones only"
            ));
        }
        if file.is_decoder {
            return refuse("it is a decoder (is_decoder); this model is an encoder only".into());
        }
        let config = Self {
            vocab_size: file.vocab_size,
            hidden_size: file.hidden_size,
            num_hidden_layers: file.num_hidden_layers,
            num_attention_heads: file.num_attention_heads,
            intermediate_size: file.intermediate_size,
            hidden_act: file.hidden_act,
            max_position_embeddings: file.max_position_embeddings,
            type_vocab_size: file.type_vocab_size,
            layer_norm_eps: file.layer_norm_eps,
        };
        config.validate()?;
        Ok(config)
    }
}

fn refuse<T>(problem: String) -> Result<T> {
    Err(Error::Model {
        model: "Bert",
        problem,
    })
}

impl BertConfig {
    /// The shape of all-MiniLM-L6-v2.
    ///
    /// Source: `config.json` of sentence-transformers/all-MiniLM-L6-v2.
    #[must_use]
    pub fn minilm_l6() -> Self {
        Self {
            vocab_size: 30_522,
            hidden_size: 384,
            num_hidden_layers: 6,
            num_attention_heads: 12,
            intermediate_size: 1536,
            hidden_act: HiddenAct::Gelu,
            max_position_embeddings: 512,
            type_vocab_size: 2,
            layer_norm_eps: 1e-12,
        }
    }

    /// Numbers in one head: `hidden_size` / `num_attention_heads`.
    #[must_use]
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads.max(1)
    }

    /// Weights and biases of the embeddings and all layers; a pooler or head is not part of it.
    #[must_use]
    pub fn parameter_count(&self) -> usize {
        self.parts().iter().map(|(_, count, _)| count).sum()
    }

    /// 1 / √`head_dim`, by which the scores are multiplied.
    pub(super) fn attention_scale(&self) -> f64 {
        1.0 / (self.head_dim() as f64).sqrt()
    }

    pub(super) fn validate(&self) -> Result<()> {
        let (hidden, heads) = (self.hidden_size, self.num_attention_heads);
        if heads == 0 || hidden == 0 || !hidden.is_multiple_of(heads) {
            return refuse(format!(
                "hidden_size = {hidden} must be a multiple of num_attention_heads = {heads}"
            ));
        }
        if self.type_vocab_size == 0 || self.max_position_embeddings == 0 {
            return refuse(format!(
                "type_vocab_size = {} and max_position_embeddings = {} must be at least 1",
                self.type_vocab_size, self.max_position_embeddings
            ));
        }
        Ok(())
    }

    /// Each part's name, its parameters, and a word about it.
    fn parts(&self) -> [(&'static str, usize, String); 4] {
        let (h, inner, layers) = (
            self.hidden_size,
            self.intermediate_size,
            self.num_hidden_layers,
        );
        let table = self.vocab_size + self.max_position_embeddings + self.type_vocab_size;
        [
            (
                "embeddings",
                table * h,
                format!(
                    "{} tokens, {} positions, {} segments of {h} numbers",
                    grouped(&self.vocab_size.to_string()),
                    self.max_position_embeddings,
                    self.type_vocab_size
                ),
            ),
            (
                "attention",
                layers * 4 * (h * h + h),
                format!(
                    "{layers} layers, {} heads of {}",
                    self.num_attention_heads,
                    self.head_dim()
                ),
            ),
            (
                "feed-forward",
                layers * (2 * h * inner + inner + h),
                format!("{layers} layers, {h} → {inner} → {h}"),
            ),
            (
                "norms",
                (2 * layers + 1) * 2 * h,
                "a scale and a shift for each number".to_string(),
            ),
        ]
    }
}

/// The parts and their numbers of parameters.
///
/// ```
/// let text = course::models::BertConfig::minilm_l6().to_string();
/// assert!(text.starts_with("Bert with 22,565,376 parameters"));
/// ```
impl fmt::Display for BertConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = |count: usize| grouped(&count.to_string());
        write!(f, "Bert with {} parameters", number(self.parameter_count()))?;
        for (part, count, how) in self.parts() {
            write!(f, "\n  {part:<12}  {:>11}  {how}", number(count))?;
        }
        Ok(())
    }
}
