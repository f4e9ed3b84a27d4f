//! A training step of x + attention(layer_norm(x)), causal, with adapters on q and v.

use crate::case::{Case, Result, Spec};
use crate::weights::{ADAPTER, Weights};
use course::lora::ops::{layer_norm, mse_loss};
use course::lora::{AttentionConfig, AttentionInput, LoraMultiHeadAttention};

pub const WIDTH: usize = 768;
pub const HEADS: usize = 12;

/// The attention block of a transformer.
pub fn step(spec: &Spec, mut weights: Weights) -> Result<Case> {
    let names = ["q_proj", "k_proj", "v_proj", "out_proj"];
    let builder = weights.builder(&names.map(|name| (name, WIDTH, WIDTH)))?;
    let layer = |name: &str| builder.pp(name).linear(WIDTH, WIDTH);
    let (q, k, v, out) = (
        layer(names[0])?,
        layer(names[1])?,
        layer(names[2])?,
        layer(names[3])?,
    );
    weights.adapt(ADAPTER, &spec.lora(["q_proj", "v_proj"]), &[&q, &v])?;
    let config = AttentionConfig::new(HEADS).with_batch_first(true);
    let attention = LoraMultiHeadAttention::new("attn", q, k, v, out, &config)?;
    let gain = weights.tensor("norm.weight", &[WIDTH], 1.0)?;
    let shift = weights.tensor("norm.bias", &[WIDTH], 0.1)?;
    let shape = [spec.batch.unwrap_or(2), spec.tokens.unwrap_or(128), WIDTH];
    let (x, target) = weights.data(&shape, &shape)?;
    spec.training(attention.trainable_parameters(), move || {
        let h = layer_norm(&x, &gain, Some(&shift), 1e-5)?;
        let input = AttentionInput {
            is_causal: true,
            ..AttentionInput::self_attention(&h)
        };
        let y = (&x + attention.forward_t(&input, true)?.output)?;
        Ok(mse_loss(&y, &target)?)
    })
}
