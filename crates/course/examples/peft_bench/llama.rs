//! A training step of SmolLM2-135M's shape with adapters on q and v.

use crate::case::{Case, Result, Spec};
use crate::weights::{ADAPTER, Weights};
use course::candle_core::{Device, Tensor};
use course::lora::ops::IGNORE_INDEX;
use course::models::{Llama, LlamaConfig};

/// Next-token training of one text, as transformers computes its loss: the last token has no next.
///
/// A file of weights has transformers' names, and the tokens as `x`.
pub fn step(spec: &Spec, mut weights: Weights) -> Result<Case> {
    let mut config = LlamaConfig::smollm2_135m();
    config.num_hidden_layers = spec.layers.unwrap_or(config.num_hidden_layers);
    let builder = weights.language_model(&config)?;
    let llama = Llama::new(&config, &builder)?;
    let mut model = builder.model()?;
    model.add_adapter(ADAPTER, &spec.lora(["q_proj", "v_proj"]), &mut weights.rng)?;
    weights.fill_model(ADAPTER, &model)?;
    let shape = (spec.batch.unwrap_or(1), spec.tokens.unwrap_or(256));
    let ids = weights.tokens("x", shape, config.vocab_size)?;
    let none = Tensor::full(IGNORE_INDEX, (shape.0, 1), &Device::Cpu)?;
    let next = Tensor::cat(&[ids.narrow(1, 1, shape.1 - 1)?, none], 1)?;
    spec.training(model.trainable_parameters(), move || {
        Ok(llama.loss(&ids, &next, true)?)
    })
}
