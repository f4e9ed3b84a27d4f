//! An encoder of the BERT family: MiniLM and its relatives.

mod config;
mod precompute;

use std::fmt;

use candle_core::{Module, Tensor};
use lora::ops::{self, AttentionMask};
use lora::{LoraBuilder, LoraEmbedding, LoraLinear};

use super::norm::Norm;
use crate::chart::grouped;
use crate::tokenizer::TextBatch;
use crate::{Error, Result};

pub use config::{BertConfig, HiddenAct};

/// An encoder-only transformer with learned positions and a layer norm after each part.
///
/// h = norm(E token + E position + E segment), then in every layer
/// h ← norm(h + Wₒ attention(W_q h, W_k h, W_v h)) and h ← norm(h + W₂ gelu(W₁ h)).
///
/// Its layers are named as in transformers (`encoder.layer.0.attention.self.query`), so weights
/// load under their own names and adapters exchange with PEFT. A checkpoint with a head, whose
/// names begin with `bert.`, keeps that; so does one of TensorFlow's origin, whose norms have a
/// `gamma` and a `beta`. A pooler that the checkpoint has is there too, so that PEFT's adapters find
/// it; `"all-linear"` leaves it out, since sentence vectors do not go through it.
///
/// Source: Devlin et al. 2018, arXiv:1810.04805; transformers `modeling_bert.py`.
///
/// ```
/// use course::models::{Bert, BertConfig};
/// use course::prelude::*;
/// use course::candle_nn::{VarBuilder, VarMap};
/// use course::tokenizer::TextBatch;
///
/// let config = BertConfig {
///     vocab_size: 11, hidden_size: 8, num_hidden_layers: 2, num_attention_heads: 2,
///     intermediate_size: 16, max_position_embeddings: 16, ..BertConfig::minilm_l6()
/// };
/// let weights = VarMap::new();
/// let builder = LoraBuilder::new(VarBuilder::from_varmap(&weights, DType::F32, &Device::Cpu));
/// let bert = Bert::new(&config, &builder)?;
/// let lora = LoraConfig::new(2, 4.0).with_targets(["query", "value"]);
/// builder.model()?.add_adapter("default", &lora, &mut rng(1))?;
///
/// let batch = TextBatch::new(&[vec![1, 2, 3, 4], vec![5, 6]], 0, &Device::Cpu)?;
/// assert_eq!(bert.forward_t(&batch, false)?.dims(), [2, 4, 8]);
/// assert_eq!(bert.embed(&batch, false)?.dims(), [2, 8]);
/// # Ok::<(), course::Error>(())
/// ```
#[derive(Debug)]
pub struct Bert {
    config: BertConfig,
    word_embeddings: LoraEmbedding,
    position_embeddings: LoraEmbedding,
    token_type_embeddings: LoraEmbedding,
    norm: Norm,
    layers: Vec<Layer>,
    /// Where the checkpoint has one.
    pooler: Option<LoraLinear>,
}

#[derive(Debug)]
struct Layer {
    query: LoraLinear,
    key: LoraLinear,
    value: LoraLinear,
    attention_output: LoraLinear,
    attention_norm: Norm,
    intermediate: LoraLinear,
    output: LoraLinear,
    output_norm: Norm,
}

impl Bert {
    /// The model of the builder's weights, which are frozen with [`LoraBuilder::new`] and train with
    /// [`LoraBuilder::trainable`]; adapters come from the builder's [`model`](LoraBuilder::model).
    ///
    /// # Errors
    ///
    /// Sizes that do not fit each other; a weight that is missing or of another shape.
    pub fn new(config: &BertConfig, builder: &LoraBuilder<'_>) -> Result<Self> {
        config.validate()?;
        let word = "embeddings.word_embeddings.weight";
        let builder = match builder.vb().contains_tensor(&format!("bert.{word}")) {
            true => builder.pp("bert"),
            false => builder.clone(),
        };
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let norm = |b: LoraBuilder<'_>| Norm::new(hidden, config.layer_norm_eps, &b);
        let layer = |number: usize| -> Result<Layer> {
            let b = builder.pp("encoder").pp("layer").pp(number);
            let attention = b.pp("attention");
            let (of, out) = (attention.pp("self"), attention.pp("output"));
            Ok(Layer {
                query: of.pp("query").linear(hidden, hidden)?,
                key: of.pp("key").linear(hidden, hidden)?,
                value: of.pp("value").linear(hidden, hidden)?,
                attention_output: out.pp("dense").linear(hidden, hidden)?,
                attention_norm: norm(out.pp("LayerNorm"))?,
                intermediate: b.pp("intermediate").pp("dense").linear(hidden, inner)?,
                output: b.pp("output").pp("dense").linear(inner, hidden)?,
                output_norm: norm(b.pp("output").pp("LayerNorm"))?,
            })
        };
        let (table, pooler) = (builder.pp("embeddings"), builder.pp("pooler").pp("dense"));
        let pooler = match pooler.vb().contains_tensor("weight") {
            true => Some(pooler.linear(hidden, hidden)?.output_head()),
            false => None,
        };
        let embedding = |name: &str, rows: usize| table.pp(name).embedding(rows, hidden);
        Ok(Self {
            word_embeddings: embedding("word_embeddings", config.vocab_size)?,
            position_embeddings: embedding("position_embeddings", config.max_position_embeddings)?,
            token_type_embeddings: embedding("token_type_embeddings", config.type_vocab_size)?,
            norm: norm(table.pp("LayerNorm"))?,
            layers: (0..config.num_hidden_layers)
                .map(layer)
                .collect::<Result<_>>()?,
            pooler,
            config: config.clone(),
        })
    }

    /// The last layer's vector of every token; `train` turns the adapters' dropout on.
    ///
    /// Vectors of padding are there too and mean nothing. Where the texts are
    /// [`precompute`](Self::precompute)d, the pass begins at the layer that is left to do.
    ///
    /// # Shapes
    ///
    /// A batch of n texts, padded to `length` tokens → [n, length, `hidden_size`].
    ///
    /// # Errors
    ///
    /// Texts longer than `max_position_embeddings`, an id outside the vocabulary; texts that were
    /// precomputed with other weights.
    pub fn forward_t(&self, batch: &TextBatch, train: bool) -> Result<Tensor> {
        match &batch.precomputed {
            Some(kept) => {
                self.check_precomputed(kept)?;
                self.forward_from(kept.first, &kept.hidden, batch, train)
            }
            None => self.forward_from(0, &self.embeddings(batch)?, batch, train),
        }
    }

    /// The vectors that go into the first layer: tokens, positions and segment, normed.
    ///
    /// # Shapes
    ///
    /// A batch of n texts, padded to `length` tokens → [n, length, `hidden_size`].
    ///
    /// # Errors
    ///
    /// As [`forward_t`](Self::forward_t).
    pub fn embeddings(&self, batch: &TextBatch) -> Result<Tensor> {
        let ids = &batch.input_ids;
        let (texts, length) = ids.dims2()?;
        let longest = self.config.max_position_embeddings;
        if length > longest {
            return Err(Error::Model {
                model: "Bert",
                problem: format!(
                    "a text of {length} tokens; max_position_embeddings is {longest}, so cut \
                     texts to that when you encode them"
                ),
            });
        }
        let positions = Tensor::arange(0, length as u32, ids.device())?;
        // Of each text, not one for all: in a mixed batch every text has its own adapter.
        let positions = positions.broadcast_as((texts, length))?.contiguous()?;
        let tokens = self.word_embeddings.forward(ids)?;
        let places = self.position_embeddings.forward(&positions)?;
        let kinds = self.token_type_embeddings.forward(&ids.zeros_like()?)?;
        self.norm.forward(&((tokens + kinds)? + places)?)
    }

    /// What comes out of the last layer where `h` goes into layer `first`, counted from 0.
    ///
    /// With frozen layers below `first`, their output can be computed once and kept.
    ///
    /// # Shapes
    ///
    /// `h` [n, length, `hidden_size`] of a batch of n texts → the same.
    ///
    /// # Errors
    ///
    /// A `first` above the number of layers; an `h` that is not of this batch.
    pub fn forward_from(
        &self,
        first: usize,
        h: &Tensor,
        batch: &TextBatch,
        train: bool,
    ) -> Result<Tensor> {
        self.pass(first..self.layers.len(), h, batch, train)
    }

    /// What goes into layer `last` where `h` goes into the first one: see
    /// [`forward_from`](Self::forward_from).
    ///
    /// # Shapes
    ///
    /// A batch of n texts, padded to `length` tokens → [n, length, `hidden_size`].
    ///
    /// # Errors
    ///
    /// A `last` above the number of layers; as [`forward_t`](Self::forward_t).
    pub fn forward_to(&self, last: usize, batch: &TextBatch, train: bool) -> Result<Tensor> {
        self.pass(0..last, &self.embeddings(batch)?, batch, train)
    }

    fn pass(
        &self,
        layers: std::ops::Range<usize>,
        h: &Tensor,
        batch: &TextBatch,
        train: bool,
    ) -> Result<Tensor> {
        let Some(chosen) = self.layers.get(layers.clone()) else {
            return Err(Error::Model {
                model: "Bert",
                problem: format!(
                    "layers {} to {} of {}",
                    layers.start,
                    layers.end,
                    self.layers.len()
                ),
            });
        };
        let (texts, length) = batch.input_ids.dims2()?;
        // The keys to hide, for every head and query.
        let hidden = batch.attention_mask.eq(0u8)?;
        let hidden = hidden.reshape((texts, 1, 1, length))?;
        let mut h = h.clone();
        for layer in chosen {
            h = layer.forward(&self.config, &h, &hidden, train)?;
        }
        Ok(h)
    }

    /// A text's vector: the mean of its tokens' ones, `[CLS]` and `[SEP]` among them.
    ///
    /// # Shapes
    ///
    /// A batch of n texts → [n, `hidden_size`].
    ///
    /// # Errors
    ///
    /// As [`forward_t`](Self::forward_t).
    ///
    /// Source: sentence-transformers `Pooling`, mode `mean`.
    pub fn pool(&self, batch: &TextBatch, train: bool) -> Result<Tensor> {
        batch.mean(&self.forward_t(batch, train)?)
    }

    /// A text's vector of length 1, whose product with another one's is their cosine similarity:
    /// what sentence-transformers' `encode` returns.
    ///
    /// # Shapes
    ///
    /// A batch of n texts → [n, `hidden_size`].
    ///
    /// # Errors
    ///
    /// As [`forward_t`](Self::forward_t).
    pub fn embed(&self, batch: &TextBatch, train: bool) -> Result<Tensor> {
        let pooled = self.pool(batch, train)?;
        let length = pooled.sqr()?.sum_keepdim(1)?.sqrt()?;
        Ok(pooled.broadcast_div(&length.maximum(1e-12)?)?)
    }

    /// tanh(W h + b) of the first token's vector h, on which BERT's own heads sit; a sentence
    /// encoder does not need it.
    ///
    /// # Shapes
    ///
    /// A batch of n texts → [n, `hidden_size`].
    ///
    /// # Errors
    ///
    /// As [`forward_t`](Self::forward_t); a checkpoint without `pooler.dense`.
    ///
    /// Source: transformers `BertPooler`.
    pub fn pooler_output(&self, batch: &TextBatch, train: bool) -> Result<Tensor> {
        let Some(pooler) = &self.pooler else {
            return Err(Error::Model {
                model: "Bert",
                problem: "its checkpoint has no pooler.dense; take `pool`, the mean".to_string(),
            });
        };
        let first = self.forward_t(batch, train)?.narrow(1, 0, 1)?.squeeze(1)?;
        Ok(pooler.forward_t(&first, train)?.tanh()?)
    }

    /// The sizes.
    #[must_use]
    pub fn config(&self) -> &BertConfig {
        &self.config
    }
}

impl Layer {
    fn forward(
        &self,
        config: &BertConfig,
        h: &Tensor,
        hidden: &Tensor,
        train: bool,
    ) -> Result<Tensor> {
        let (texts, length, _) = h.dims3()?;
        let heads = |layer: &LoraLinear| -> Result<Tensor> {
            let shape = (texts, length, config.num_attention_heads, config.head_dim());
            Ok(layer.forward_t(h, train)?.reshape(shape)?)
        };
        let (q, k, v) = (heads(&self.query)?, heads(&self.key)?, heads(&self.value)?);
        let mask = AttentionMask {
            causal: false,
            masks: &[hidden],
        };
        let mixed = ops::attention(&q, &k, &v, config.attention_scale(), &mask)?;
        let mixed = self
            .attention_output
            .forward_t(&mixed.flatten_from(2)?, train)?;
        let h = self.attention_norm.forward(&(mixed + h)?)?;

        let inner = self.intermediate.forward_t(&h, train)?;
        let inner = config.hidden_act.forward(&inner)?;
        let inner = self.output.forward_t(&inner, train)?;
        self.output_norm.forward(&(inner + h)?)
    }
}

impl fmt::Display for Bert {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.config, f)?;
        match &self.pooler {
            Some(pooler) => {
                let count = grouped(&pooler.parameter_count().all.to_string());
                write!(
                    f,
                    "\n  and a pooler, {count:>13}  on the first token, not in the sum"
                )
            }
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
