//! Text that goes on: one token after the other.

use candle_core::{DType, IndexOp, Tensor};
use rand::Rng as _;

use super::Llama;
use crate::rng::Rng;
use crate::{Error, Result, interrupt};

/// How a text goes on, under the names of Hugging Face's `generation_config.json`.
///
/// ```
/// use course::models::GenerationConfig;
///
/// let config = GenerationConfig { max_new_tokens: 20, ..Default::default() };
/// assert_eq!((config.temperature, config.top_k), (0.8, 40));
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct GenerationConfig {
    /// The most tokens that are added.
    pub max_new_tokens: usize,
    /// What the logits are divided by: small is careful, 1 is as trained, 0 always takes the
    /// likeliest token.
    pub temperature: f64,
    /// Only so many of the likeliest tokens are drawn from.
    pub top_k: usize,
    /// A token that ends the text; it is not part of the answer.
    pub eos_token_id: Option<u32>,
}

impl Default for GenerationConfig {
    fn default() -> Self {
        Self {
            max_new_tokens: 100,
            temperature: 0.8,
            top_k: 40,
            eos_token_id: None,
        }
    }
}

impl Llama {
    /// The tokens that come after `prompt`, drawn one by one from
    /// softmax(logits / temperature) over the `top_k` likeliest.
    ///
    /// Keys and values of earlier tokens are kept, so a token costs one row through the layers.
    /// The stop button ends the text where it is.
    ///
    /// # Errors
    ///
    /// An empty prompt; more tokens in all than `max_position_embeddings`; a temperature that is
    /// negative or not finite; a `top_k` of 0.
    ///
    /// ```
    /// use course::models::{GenerationConfig, Llama, LlamaConfig};
    /// use course::prelude::*;
    /// use course::candle_nn::VarBuilder;
    ///
    /// let config = LlamaConfig {
    ///     vocab_size: 11, hidden_size: 8, intermediate_size: 16, num_hidden_layers: 2,
    ///     num_attention_heads: 2, num_key_value_heads: 1, max_position_embeddings: 16,
    ///     ..LlamaConfig::smollm2_135m()
    /// };
    /// let weights = config.random_weights(&mut rng(1), &Device::Cpu)?.into_iter().collect();
    /// let vb = VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu);
    /// let llama = Llama::new(&config, &LoraBuilder::new(vb))?;
    ///
    /// let how = GenerationConfig { max_new_tokens: 5, ..Default::default() };
    /// let new = llama.generate(&[1, 2, 3], &how, &mut rng(2))?;
    /// assert_eq!(new.len(), 5);
    /// assert_eq!(new, llama.generate(&[1, 2, 3], &how, &mut rng(2))?);
    /// # Ok::<(), course::Error>(())
    /// ```
    pub fn generate(
        &self,
        prompt: &[u32],
        config: &GenerationConfig,
        rng: &mut Rng,
    ) -> Result<Vec<u32>> {
        self.check(prompt, config)?;
        let device = self.norm.device();
        let mut cache = Cache::new(self.layers.len());
        let mut new: Vec<u32> = Vec::new();
        let mut input = prompt.to_vec();
        while new.len() < config.max_new_tokens && !interrupt::requested() {
            let ids = Tensor::new(input.as_slice(), device)?.unsqueeze(0)?;
            let hidden = self.hidden_after(&ids, false, Some(&mut cache))?;
            let last = self.logits(&hidden.i((.., hidden.dim(1)? - 1..))?.detach(), false)?;
            let logits: Vec<f32> = last.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?;
            let token = drawn(&logits, config, rng)?;
            if config.eos_token_id == Some(token) {
                break;
            }
            new.push(token);
            input = vec![token];
        }
        Ok(new)
    }

    fn check(&self, prompt: &[u32], config: &GenerationConfig) -> Result<()> {
        let refuse = |problem: String| {
            Err(Error::Model {
                model: "Llama::generate",
                problem,
            })
        };
        let (given, more) = (prompt.len(), config.max_new_tokens);
        let longest = self.config.max_position_embeddings;
        if given == 0 {
            return refuse("the prompt is empty; give at least one token".to_string());
        }
        if given.saturating_add(more) > longest {
            return refuse(format!(
                "a prompt of {given} and {more} new tokens are more than the {longest} of \
                 max_position_embeddings; lower max_new_tokens"
            ));
        }
        if !(config.temperature.is_finite() && config.temperature >= 0.0) {
            let temperature = config.temperature;
            return refuse(format!("temperature = {temperature}; give 0 or more"));
        }
        if config.top_k == 0 {
            return refuse("top_k = 0 leaves no token; give 1 or more".to_string());
        }
        Ok(())
    }
}

/// A token by its logit: the likeliest at temperature 0, else one of the `top_k` likeliest.
fn drawn(logits: &[f32], config: &GenerationConfig, rng: &mut Rng) -> Result<u32> {
    if logits.iter().any(|logit| logit.is_nan()) {
        return Err(Error::Model {
            model: "Llama::generate",
            problem: "the logits are NaN; the weights were broken by training".to_string(),
        });
    }
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
    let best = logits[order[0]];
    if config.temperature == 0.0 {
        return Ok(order[0] as u32);
    }
    order.truncate(config.top_k);
    let weight = |i: &usize| (f64::from(logits[*i] - best) / config.temperature).exp();
    let mut left = rng.random::<f64>() * order.iter().map(weight).sum::<f64>();
    for token in &order {
        left -= weight(token);
        if left < 0.0 {
            return Ok(*token as u32);
        }
    }
    // Only rounding leads here.
    Ok(order[order.len() - 1] as u32)
}

/// Keys and values of the tokens so far.
pub(super) struct Cache {
    slots: Vec<Slot>,
}

/// Those of one layer: [1, length, heads, dim] each.
#[derive(Clone, Default)]
pub(super) struct Slot {
    seen: Option<(Tensor, Tensor)>,
}

impl Cache {
    fn new(layers: usize) -> Self {
        Self {
            slots: vec![Slot::default(); layers],
        }
    }

    pub fn length(&self) -> usize {
        let first = self.slots.first().and_then(|slot| slot.seen.as_ref());
        first.map_or(0, |(k, _)| k.dims()[1])
    }

    pub fn slots(&mut self) -> &mut [Slot] {
        &mut self.slots
    }
}

impl Slot {
    /// All keys and values with the new ones, without the graph behind them.
    pub fn appended(&mut self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let (k, v) = (k.detach(), v.detach());
        let all = match &self.seen {
            None => (k, v),
            Some((old_k, old_v)) => (Tensor::cat(&[old_k, &k], 1)?, Tensor::cat(&[old_v, &v], 1)?),
        };
        Ok(self.seen.insert(all).clone())
    }
}
