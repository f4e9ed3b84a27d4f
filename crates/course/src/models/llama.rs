//! A language model of the Llama family: SmolLM2 and its relatives.

use candle_core::{Device, Module, Tensor};
use lora::ops::{self, AttentionMask};
use lora::{LoraBuilder, LoraEmbedding, LoraLinear};
use serde::Deserialize;

use crate::{Error, Result};

/// The sizes of a [`Llama`], under the names of Hugging Face's `config.json`.
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
#[derive(Clone, Debug, PartialEq, Deserialize)]
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

    fn validate(&self) -> Result<()> {
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
        if !self.hidden_size.is_multiple_of(heads) || !self.head_dim().is_multiple_of(2) {
            return refuse(format!(
                "hidden_size = {} must split into {heads} heads of an even size",
                self.hidden_size
            ));
        }
        Ok(())
    }
}

/// A decoder-only transformer with RMS norms, rotary positions, grouped-query attention and a
/// gated feed-forward part.
///
/// h ← h + Wₒ attention(rope(W_q n), rope(W_k n), W_v n) with n = norm(h), then
/// h ← h + W_down (silu(W_gate n) · W_up n) with n = norm(h), in every layer.
///
/// Its layers are named as in transformers (`model.layers.0.self_attn.q_proj`), so weights load
/// under their own names and adapters exchange with PEFT.
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
}

#[derive(Debug)]
struct Layer {
    input_layernorm: Tensor,
    q_proj: LoraLinear,
    k_proj: LoraLinear,
    v_proj: LoraLinear,
    o_proj: LoraLinear,
    post_attention_layernorm: Tensor,
    gate_proj: LoraLinear,
    up_proj: LoraLinear,
    down_proj: LoraLinear,
}

/// Each token sees itself and those before it.
const CAUSAL: AttentionMask<'_> = AttentionMask {
    causal: true,
    masks: &[],
};

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
                q_proj: attn.pp("q_proj").linear_no_bias(hidden, hidden)?,
                k_proj: attn.pp("k_proj").linear_no_bias(hidden, kv)?,
                v_proj: attn.pp("v_proj").linear_no_bias(hidden, kv)?,
                o_proj: attn.pp("o_proj").linear_no_bias(hidden, hidden)?,
                post_attention_layernorm: norm(b.pp("post_attention_layernorm"))?,
                gate_proj: mlp.pp("gate_proj").linear_no_bias(hidden, inner)?,
                up_proj: mlp.pp("up_proj").linear_no_bias(hidden, inner)?,
                down_proj: mlp.pp("down_proj").linear_no_bias(inner, hidden)?,
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
        let hidden = self.hidden(ids, train)?;
        match &self.lm_head {
            Some(head) => Ok(head.forward_t(&hidden, train)?),
            None => Ok(ops::linear(&hidden, &self.tied(), None)?),
        }
    }

    /// The mean cross entropy of the tokens `next`, one for each of `ids`.
    ///
    /// With a tied or unadapted output layer the logits are never held in memory as a whole.
    ///
    /// # Shapes
    ///
    /// Both [batch, length]; → a number.
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
        let (_, length) = ids.dims2()?;
        let longest = self.config.max_position_embeddings;
        if length > longest {
            return Err(Error::Model {
                model: "Llama",
                problem: format!("a text of {length} tokens; max_position_embeddings is {longest}"),
            });
        }
        let (cos, sin) = (
            self.cos.narrow(0, 0, length)?,
            self.sin.narrow(0, 0, length)?,
        );
        let mut h = self.embed_tokens.forward(ids)?;
        for layer in &self.layers {
            h = layer.forward(&self.config, &h, (&cos, &sin), train)?;
        }
        Ok(ops::rms_norm(&h, &self.norm, self.config.rms_norm_eps)?)
    }

    fn tied(&self) -> Tensor {
        self.embed_tokens.base().embeddings().clone()
    }
}

impl Layer {
    fn forward(
        &self,
        config: &LlamaConfig,
        h: &Tensor,
        (cos, sin): (&Tensor, &Tensor),
        train: bool,
    ) -> Result<Tensor> {
        let (batch, length, _) = h.dims3()?;
        let (eps, dim) = (config.rms_norm_eps, config.head_dim());
        let heads = |x: Tensor, count: usize| x.reshape((batch, length, count, dim));
        let (all, kv) = (config.num_attention_heads, config.num_key_value_heads);

        let n = ops::rms_norm(h, &self.input_layernorm, eps)?;
        let q = heads(self.q_proj.forward_t(&n, train)?, all)?;
        let k = heads(self.k_proj.forward_t(&n, train)?, kv)?;
        let v = heads(self.v_proj.forward_t(&n, train)?, kv)?;
        let (q, k) = (ops::rope(&q, cos, sin)?, ops::rope(&k, cos, sin)?);
        let scale = 1.0 / (dim as f64).sqrt();
        let mixed = ops::attention(&q, &k, &v, scale, &CAUSAL)?;
        let mixed = mixed.reshape((batch, length, all * dim))?;
        let h = (h + self.o_proj.forward_t(&mixed, train)?)?;

        let n = ops::rms_norm(&h, &self.post_attention_layernorm, eps)?;
        let gate = self.gate_proj.forward_t(&n, train)?;
        let inner = ops::swiglu(&gate, &self.up_proj.forward_t(&n, train)?)?;
        Ok((h + self.down_proj.forward_t(&inner, train)?)?)
    }
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
mod tests {
    use std::collections::HashMap;
    use std::path::PathBuf;

    use candle_core::DType;
    use candle_nn::VarBuilder;

    use super::*;

    /// A tiny model of transformers with an adapter of PEFT's; how it was made stands beside it.
    fn fixture(file: &str) -> PathBuf {
        PathBuf::from(env!("CARGO_MANIFEST_DIR"))
            .join("../lora/tests/fixtures/transformers/llama")
            .join(file)
    }

    fn case() -> HashMap<String, Tensor> {
        candle_core::safetensors::load(fixture("case.safetensors"), &Device::Cpu).unwrap()
    }

    fn model(tied: bool) -> (Llama, lora::LoraModel) {
        let json = std::fs::read_to_string(fixture("config.json")).unwrap();
        let mut config: LlamaConfig = serde_json::from_str(&json).unwrap();
        assert!(!config.tie_word_embeddings);
        config.tie_word_embeddings = tied;
        let bytes = std::fs::read(fixture("model.safetensors")).unwrap();
        let vb = VarBuilder::from_buffered_safetensors(bytes, DType::F32, &Device::Cpu).unwrap();
        let builder = LoraBuilder::new(vb);
        (
            Llama::new(&config, &builder).unwrap(),
            builder.model().unwrap(),
        )
    }

    fn gap(got: &Tensor, want: &Tensor) -> f32 {
        let largest = |t: Tensor| t.abs()?.max_all()?.to_scalar::<f32>();
        assert_eq!(got.dims(), want.dims());
        largest((got - want).unwrap()).unwrap() / largest(want.clone()).unwrap()
    }

    #[test]
    fn logits_are_those_of_transformers_and_peft() {
        let (case, (llama, mut model)) = (case(), model(false));
        let ids = case["input"].to_dtype(DType::U32).unwrap();
        // The fixture holds the logits of the last token.
        let logits = |llama: &Llama| {
            let all = llama.forward_t(&ids, false).unwrap();
            let length = all.dim(1).unwrap();
            all.narrow(1, length - 1, 1).unwrap().squeeze(1).unwrap()
        };
        assert!(gap(&logits(&llama), &case["output_base"]) < 1e-6);
        model.load_adapter(fixture(""), "default").unwrap();
        assert!(gap(&logits(&llama), &case["output"]) < 1e-6);
    }

    #[test]
    fn the_loss_is_the_cross_entropy_of_the_logits() {
        let ids = case()["input"].to_dtype(DType::U32).unwrap();
        for tied in [false, true] {
            let (llama, mut model) = model(tied);
            model.load_adapter(fixture(""), "default").unwrap();
            let logits = llama.forward_t(&ids, true).unwrap();
            let want = ops::cross_entropy(&logits, &ids).unwrap();
            let loss = llama.loss(&ids, &ids, true).unwrap();
            assert!(gap(&loss, &want) < 1e-6, "tied: {tied}");
            let (got, wanted) = (loss.backward().unwrap(), want.backward().unwrap());
            for (name, var) in model.trainable_parameters() {
                let off = gap(got.get(&var).unwrap(), wanted.get(&var).unwrap());
                assert!(off < 1e-5, "{name}: {off:e}");
            }
        }
    }

    /// Pretraining and full fine-tuning: the same model over a builder whose base trains.
    #[test]
    fn every_weight_trains_where_the_base_does() {
        let json = std::fs::read_to_string(fixture("config.json")).unwrap();
        let ids = case()["input"].to_dtype(DType::U32).unwrap();
        for tied in [false, true] {
            let mut config: LlamaConfig = serde_json::from_str(&json).unwrap();
            config.tie_word_embeddings = tied;
            let bytes = std::fs::read(fixture("model.safetensors")).unwrap();
            let vb = VarBuilder::from_buffered_safetensors(bytes, DType::F32, &Device::Cpu);
            let builder = LoraBuilder::trainable(vb.unwrap());
            let llama = Llama::new(&config, &builder).unwrap();
            let count = builder.model().unwrap().parameter_count();
            assert_eq!(count.trainable, config.parameter_count());
            assert_eq!(count.all, config.parameter_count());

            let logits = llama.forward_t(&ids, true).unwrap();
            let want = ops::cross_entropy(&logits, &ids).unwrap();
            let loss = llama.loss(&ids, &ids, true).unwrap();
            assert!(gap(&loss, &want) < 1e-6, "tied: {tied}");
            let (got, wanted) = (loss.backward().unwrap(), want.backward().unwrap());
            for (name, var) in builder.variables() {
                let off = gap(got.get(&var).unwrap(), wanted.get(&var).unwrap());
                assert!(off < 1e-5, "{name}: {off:e}");
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let json = std::fs::read_to_string(fixture("config.json")).unwrap();
        let with = |from: &str, to: &str| {
            assert!(json.contains(from), "{from}");
            let config = serde_json::from_str::<LlamaConfig>(&json.replace(from, to));
            config.unwrap_err().to_string()
        };
        assert!(with("\"rope_type\": \"default\"", "\"rope_type\": \"llama3\"").contains("scaled"));
        let heads = with("\"num_key_value_heads\": 2", "\"num_key_value_heads\": 3");
        assert!(
            heads.contains("multiple of num_key_value_heads = 3"),
            "{heads}"
        );

        let (llama, _) = model(false);
        let long = Tensor::zeros((1, 33), DType::U32, &Device::Cpu).unwrap();
        let error = llama.forward_t(&long, false).unwrap_err().to_string();
        assert!(
            error.contains("33 tokens") && error.contains("32"),
            "{error}"
        );
    }
}
