//! A language model of the Llama family: SmolLM2 and its relatives.

mod config;
mod generate;

use std::fmt;

use candle_core::{DType, Device, Module, Tensor};
use lora::longlora::ShiftedAttention;
use lora::ops::{self, AttentionMask};
use lora::{LoraAnyLinear, LoraBuilder, LoraEmbedding, LoraLinear};

use crate::{Error, Result};

pub use config::LlamaConfig;
pub use generate::GenerationConfig;

use generate::Cache;

/// A decoder-only transformer with RMS norms, rotary positions, grouped-query attention and a
/// gated feed-forward part.
///
/// h ← h + Wₒ attention(rope(W_q n), rope(W_k n), W_v n) with n = norm(h), then
/// h ← h + W_down (silu(W_gate n) · W_up n) with n = norm(h), in every layer.
///
/// Its layers are named as in transformers (`model.layers.0.self_attn.q_proj`), so weights load
/// under their own names and adapters exchange with PEFT. Over a builder that is
/// [`quantized`](LoraBuilder::quantized), the seven matrices of each layer are in 4 bits; the
/// embedding and an output layer of its own are not, as with bitsandbytes.
///
/// Source: Touvron et al. 2023, arXiv:2302.13971; transformers `modeling_llama.py`.
///
/// ```
/// use course::models::{Llama, LlamaConfig};
/// use course::prelude::*;
/// use course::candle_nn::{VarBuilder, VarMap};
///
/// let config = LlamaConfig {
///     vocab_size: 11, hidden_size: 8, intermediate_size: 16, num_hidden_layers: 2,
///     num_attention_heads: 2, num_key_value_heads: 1, max_position_embeddings: 16,
///     ..LlamaConfig::smollm2_135m()
/// };
/// let weights = VarMap::new();
/// let builder = LoraBuilder::new(VarBuilder::from_varmap(&weights, DType::F32, &Device::Cpu));
/// let llama = Llama::new(&config, &builder)?;
/// let mut rng = rng(1);
/// let lora = LoraConfig::new(2, 4.0).with_targets(["q_proj", "v_proj"]);
/// builder.model()?.add_adapter("default", &lora, &mut rng)?;
///
/// let ids = Tensor::new(&[[1u32, 2, 3, 4]], &Device::Cpu)?;
/// assert_eq!(llama.forward_t(&ids, false)?.dims(), [1, 4, 11]);
/// let next = Tensor::new(&[[2u32, 3, 4, 5]], &Device::Cpu)?;
/// let loss = llama.loss(&ids, &next, true)?.to_scalar::<f32>()?;
/// assert!(loss > 1.0 && loss < 4.0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Llama {
    config: LlamaConfig,
    embed_tokens: LoraEmbedding,
    layers: Vec<Layer>,
    norm: Tensor,
    /// None where it is the embedding.
    lm_head: Option<LoraLinear>,
    cos: Tensor,
    sin: Tensor,
    /// Attention while training, where it is not full.
    shifted: Option<ShiftedAttention>,
}

/// How a text goes through the layers.
struct Pass<'a> {
    config: &'a LlamaConfig,
    /// cos and sin of its positions.
    rotation: (Tensor, Tensor),
    train: bool,
    shifted: Option<ShiftedAttention>,
}

#[derive(Debug)]
struct Layer {
    input_layernorm: Tensor,
    q_proj: LoraAnyLinear,
    k_proj: LoraAnyLinear,
    v_proj: LoraAnyLinear,
    o_proj: LoraAnyLinear,
    post_attention_layernorm: Tensor,
    gate_proj: LoraAnyLinear,
    up_proj: LoraAnyLinear,
    down_proj: LoraAnyLinear,
}

impl Llama {
    /// The model of the builder's weights, which are frozen with [`LoraBuilder::new`] and train with
    /// [`LoraBuilder::trainable`]; adapters come from the builder's [`model`](LoraBuilder::model).
    ///
    /// # Errors
    ///
    /// Sizes that do not fit each other; a weight that is missing or of another shape.
    pub fn new(config: &LlamaConfig, builder: &LoraBuilder<'_>) -> Result<Self> {
        config.validate()?;
        let model = builder.pp("model");
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let norm = |b: LoraBuilder<'_>| b.vb().get(hidden, "weight");
        let layer = |number: usize| -> Result<Layer> {
            let b = model.pp("layers").pp(number);
            let (attn, mlp) = (b.pp("self_attn"), b.pp("mlp"));
            let kv = config.num_key_value_heads * config.head_dim();
            let inner = config.intermediate_size;
            Ok(Layer {
                input_layernorm: norm(b.pp("input_layernorm"))?,
                q_proj: attn.pp("q_proj").any_linear_no_bias(hidden, hidden)?,
                k_proj: attn.pp("k_proj").any_linear_no_bias(hidden, kv)?,
                v_proj: attn.pp("v_proj").any_linear_no_bias(hidden, kv)?,
                o_proj: attn.pp("o_proj").any_linear_no_bias(hidden, hidden)?,
                post_attention_layernorm: norm(b.pp("post_attention_layernorm"))?,
                gate_proj: mlp.pp("gate_proj").any_linear_no_bias(hidden, inner)?,
                up_proj: mlp.pp("up_proj").any_linear_no_bias(hidden, inner)?,
                down_proj: mlp.pp("down_proj").any_linear_no_bias(inner, hidden)?,
            })
        };
        let embed_tokens = model.pp("embed_tokens").embedding(vocab, hidden)?;
        let layers = (0..config.num_hidden_layers).map(layer);
        let (cos, sin) = rotations(config, builder.vb().device())?;
        let dtype = builder.vb().dtype();
        Ok(Self {
            layers: layers.collect::<Result<_>>()?,
            norm: norm(model.pp("norm"))?,
            lm_head: match config.tie_word_embeddings {
                true => None,
                false => Some(builder.pp("lm_head").linear_no_bias(hidden, vocab)?),
            },
            embed_tokens,
            config: config.clone(),
            cos: cos.to_dtype(dtype)?,
            sin: sin.to_dtype(dtype)?,
            shifted: None,
        })
    }

    /// The same model with LongLoRA's attention in groups while it trains; without training its
    /// attention stays full.
    ///
    /// ```
    /// use course::prelude::*;
    /// use lora::longlora::ShiftedAttention;
    ///
    /// let (llama, _) = Checkpoint::open("sotu-lm")?.frozen(&Device::Cpu, Llama::new)?;
    /// let llama = llama.shifted(ShiftedAttention::new(4)?);
    /// let ids = Tensor::arange(0u32, 16, &Device::Cpu)?.unsqueeze(0)?;
    /// let [full, grouped] = [false, true].map(|train| llama.forward_t(&ids, train));
    /// let (full, grouped) = (full?.get(0)?, grouped?.get(0)?);
    /// let off = |token| (full.get(token)? - grouped.get(token)?)?.abs()?.max_all()?.to_scalar::<f32>();
    /// assert!(off(0)? < 1e-5 && off(15)? > 1e-2);
    /// # Ok::<(), course::Error>(())
    /// ```
    #[must_use]
    pub fn shifted(mut self, attention: ShiftedAttention) -> Self {
        self.shifted = Some(attention);
        self
    }

    /// A pass over `length` tokens that come after `first` others.
    fn pass(&self, first: usize, length: usize, train: bool) -> Result<Pass<'_>> {
        Ok(Pass {
            config: &self.config,
            rotation: self.rotation(first, length)?,
            train,
            shifted: self.shifted.filter(|_| train),
        })
    }

    /// The logits of the token after each; `train` turns the adapters' dropout on.
    ///
    /// # Shapes
    ///
    /// `ids` [batch, length] of u32 → [batch, length, `vocab_size`].
    ///
    /// # Errors
    ///
    /// A text longer than `max_position_embeddings`, an id outside the vocabulary.
    pub fn forward_t(&self, ids: &Tensor, train: bool) -> Result<Tensor> {
        self.logits(&self.hidden(ids, train)?, train)
    }

    /// The output layer.
    fn logits(&self, hidden: &Tensor, train: bool) -> Result<Tensor> {
        match &self.lm_head {
            Some(head) => Ok(head.forward_t(hidden, train)?),
            None => Ok(ops::linear(hidden, &self.tied(), None)?),
        }
    }

    /// The mean cross entropy of the tokens `next`, one for each of `ids`; where `next` is of i64,
    /// those that are [`IGNORE_INDEX`](ops::IGNORE_INDEX) do not count.
    ///
    /// With a tied or unadapted output layer the logits are never held in memory as a whole.
    ///
    /// # Shapes
    ///
    /// Both [batch, length], `next` of u32 or i64; → a number.
    ///
    /// # Errors
    ///
    /// As [`forward_t`](Self::forward_t); a target outside the vocabulary.
    pub fn loss(&self, ids: &Tensor, next: &Tensor, train: bool) -> Result<Tensor> {
        let hidden = self.hidden(ids, train)?;
        match &self.lm_head {
            Some(head) if !head.active_adapters().is_empty() => {
                let logits = head.forward_t(&hidden, train)?;
                Ok(ops::cross_entropy(&logits, next)?)
            }
            Some(head) => {
                let weight = head.base().weight().clone();
                Ok(ops::linear_cross_entropy(&hidden, &weight, next)?)
            }
            None => Ok(ops::linear_cross_entropy(&hidden, &self.tied(), next)?),
        }
    }

    /// The mean cross entropy of all tokens that count in `windows`, in nats: what
    /// [`Tokens::windows`](crate::data::Tokens::windows) of held-out text gives, or
    /// [`Sequences::in_order`](crate::data::Sequences::in_order) of held-out chats. No dropout.
    ///
    /// # Errors
    ///
    /// As [`loss`](Self::loss); no window at all.
    pub fn held_out_loss(&self, windows: &[(Tensor, Tensor)]) -> Result<f64> {
        let (mut sum, mut tokens) = (0.0, 0.0);
        for (ids, next) in windows {
            let count = counted(next)?;
            let loss = self.loss(ids, next, false)?.to_dtype(DType::F64)?;
            sum += count * loss.to_scalar::<f64>()?;
            tokens += count;
        }
        if tokens == 0.0 {
            return Err(Error::Model {
                model: "Llama::held_out_loss",
                problem: "there is no window to measure".to_string(),
            });
        }
        Ok(sum / tokens)
    }

    /// The last layer's output, normed.
    ///
    /// # Shapes
    ///
    /// `ids` [batch, length] → [batch, length, `hidden_size`].
    ///
    /// # Errors
    ///
    /// As [`forward_t`](Self::forward_t).
    pub fn hidden(&self, ids: &Tensor, train: bool) -> Result<Tensor> {
        self.hidden_after(ids, train, None)
    }

    /// As [`hidden`](Self::hidden), of tokens that come after those in `cache`.
    fn hidden_after(&self, ids: &Tensor, train: bool, cache: Option<&mut Cache>) -> Result<Tensor> {
        let (_, length) = ids.dims2()?;
        let first = cache.as_ref().map_or(0, |cache| cache.length());
        let mut slots = cache.map(Cache::slots);
        let pass = self.pass(first, length, train)?;
        let mut h = self.embed_tokens.forward(ids)?;
        for (number, layer) in self.layers.iter().enumerate() {
            let slot = slots.as_mut().map(|slots| &mut slots[number]);
            h = layer.forward(&pass, &h, slot)?;
        }
        Ok(ops::rms_norm(&h, &self.norm, self.config.rms_norm_eps)?)
    }

    /// What every head looks at, layer by layer: softmax(q kᵀ / √`head_dim`) with later tokens
    /// hidden. Each row sums to 1.
    ///
    /// # Shapes
    ///
    /// `ids` [batch, length] → for each layer [batch, heads, length, length], the query first.
    ///
    /// # Errors
    ///
    /// As [`forward_t`](Self::forward_t).
    pub fn attentions(&self, ids: &Tensor) -> Result<Vec<Tensor>> {
        let (_, length) = ids.dims2()?;
        let pass = self.pass(0, length, false)?;
        let mut h = self.embed_tokens.forward(ids)?;
        let mut maps = Vec::with_capacity(self.layers.len());
        for layer in &self.layers {
            maps.push(layer.attention_map(&pass, &h)?);
            h = layer.forward(&pass, &h, None)?;
        }
        Ok(maps)
    }

    /// What the weights take in memory, in bytes, without adapters.
    ///
    /// ```
    /// use course::prelude::*;
    /// use lora::quant::QuantConfig;
    ///
    /// let base = Checkpoint::open("sotu-lm")?;
    /// let (full, _) = base.frozen(&Device::Cpu, Llama::new)?;
    /// assert_eq!(full.weights_bytes(), 4 * full.config().parameter_count());
    /// let (four, _) = base.quantized(&Device::Cpu, &QuantConfig::default(), Llama::new)?;
    /// assert!(four.weights_bytes() < full.weights_bytes() / 4);
    /// # Ok::<(), course::Error>(())
    /// ```
    #[must_use]
    pub fn weights_bytes(&self) -> usize {
        let of = |tensor: &Tensor| tensor.elem_count() * tensor.dtype().size_in_bytes();
        let layer = |layer: &Layer| {
            let norms = of(&layer.input_layernorm) + of(&layer.post_attention_layernorm);
            let matrices = layer.matrices().map(|matrix| matrix.base().bytes());
            norms + matrices.iter().sum::<usize>()
        };
        let head = self
            .lm_head
            .as_ref()
            .map_or(0, |head| of(head.base().weight()));
        let layers: usize = self.layers.iter().map(layer).sum();
        of(&self.tied()) + of(&self.norm) + head + layers
    }

    /// The sizes.
    #[must_use]
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// cos and sin of the positions from `first` on.
    fn rotation(&self, first: usize, length: usize) -> Result<(Tensor, Tensor)> {
        let (longest, all) = (self.config.max_position_embeddings, first + length);
        if all > longest {
            return Err(Error::Model {
                model: "Llama",
                problem: format!("a text of {all} tokens; max_position_embeddings is {longest}"),
            });
        }
        Ok((
            self.cos.narrow(0, first, length)?,
            self.sin.narrow(0, first, length)?,
        ))
    }

    fn tied(&self) -> Tensor {
        self.embed_tokens.base().embeddings().clone()
    }
}

impl Layer {
    fn matrices(&self) -> [&LoraAnyLinear; 7] {
        [
            &self.q_proj,
            &self.k_proj,
            &self.v_proj,
            &self.o_proj,
            &self.gate_proj,
            &self.up_proj,
            &self.down_proj,
        ]
    }

    /// q, k and v of normed inputs, q and k turned to their positions.
    fn project(&self, pass: &Pass<'_>, n: &Tensor) -> Result<[Tensor; 3]> {
        let (batch, length, _) = n.dims3()?;
        let (config, (cos, sin)) = (pass.config, &pass.rotation);
        let heads = |x: Tensor, count: usize| x.reshape((batch, length, count, config.head_dim()));
        let (all, kv) = (config.num_attention_heads, config.num_key_value_heads);
        let q = heads(self.q_proj.forward_t(n, pass.train)?, all)?;
        let k = heads(self.k_proj.forward_t(n, pass.train)?, kv)?;
        let v = heads(self.v_proj.forward_t(n, pass.train)?, kv)?;
        Ok([ops::rope(&q, cos, sin)?, ops::rope(&k, cos, sin)?, v])
    }

    fn forward(
        &self,
        pass: &Pass<'_>,
        h: &Tensor,
        slot: Option<&mut generate::Slot>,
    ) -> Result<Tensor> {
        let (eps, scale) = (pass.config.rms_norm_eps, pass.config.attention_scale());
        let n = ops::rms_norm(h, &self.input_layernorm, eps)?;
        let [q, mut k, mut v] = self.project(pass, &n)?;
        if let Some(slot) = slot {
            (k, v) = slot.appended(&k, &v)?;
        }
        let mixed = match &pass.shifted {
            Some(shifted) => shifted.attention(&q, &k, &v, scale)?,
            None => {
                // A single new token sees all that came before.
                let mask = AttentionMask {
                    causal: q.dim(1)? > 1,
                    masks: &[],
                };
                ops::attention(&q, &k, &v, scale, &mask)?
            }
        };
        let mixed = mixed.flatten_from(2)?;
        let h = (h + self.o_proj.forward_t(&mixed, pass.train)?)?;

        let n = ops::rms_norm(&h, &self.post_attention_layernorm, eps)?;
        let gate = self.gate_proj.forward_t(&n, pass.train)?;
        let inner = ops::swiglu(&gate, &self.up_proj.forward_t(&n, pass.train)?)?;
        Ok((h + self.down_proj.forward_t(&inner, pass.train)?)?)
    }

    fn attention_map(&self, pass: &Pass<'_>, h: &Tensor) -> Result<Tensor> {
        let config = pass.config;
        let n = ops::rms_norm(h, &self.input_layernorm, config.rms_norm_eps)?;
        let [q, k, _] = self.project(pass, &n)?;
        let (batch, length, heads, dim) = q.dims4()?;
        let kv = config.num_key_value_heads;
        // Each key head serves as many query heads.
        let k = k.transpose(1, 2)?.unsqueeze(2)?;
        let k = k.broadcast_as((batch, kv, heads / kv, length, dim))?;
        let k = k.reshape((batch, heads, length, dim))?;
        let scores = q.transpose(1, 2)?.contiguous()?.matmul(&k.t()?)?;
        Ok(ops::causal_softmax(&(scores * config.attention_scale())?)?)
    }
}

impl fmt::Display for Llama {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.config, f)
    }
}

/// How many targets count.
fn counted(next: &Tensor) -> Result<f64> {
    if next.dtype() != DType::I64 {
        return Ok(next.elem_count() as f64);
    }
    let counts = next.ne(ops::IGNORE_INDEX)?.to_dtype(DType::F64)?;
    Ok(counts.sum_all()?.to_scalar()?)
}

/// cos and sin of position · θ^(−2i / `head_dim`): [`max_position_embeddings`, `head_dim` / 2].
fn rotations(config: &LlamaConfig, device: &Device) -> Result<(Tensor, Tensor)> {
    let half = config.head_dim() / 2;
    let frequency = |i: usize| config.rope_theta.powf(-(i as f64) / half as f64);
    let angles: Vec<f64> = (0..config.max_position_embeddings)
        .flat_map(|position| (0..half).map(move |i| position as f64 * frequency(i)))
        .collect();
    let shape = (config.max_position_embeddings, half);
    let table = |f: fn(f64) -> f64| -> Result<Tensor> {
        let numbers: Vec<f32> = angles.iter().map(|a| f(*a) as f32).collect();
        Ok(Tensor::from_vec(numbers, shape, device)?)
    };
    Ok((table(f64::cos)?, table(f64::sin)?))
}

#[cfg(test)]
mod tests;
