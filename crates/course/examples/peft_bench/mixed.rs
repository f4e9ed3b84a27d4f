//! Inference in which every row of the batch names its adapter.

use crate::case::{Case, Result, Spec};
use crate::weights::Weights;
use course::lora::LoraModel;

const WIDTH: usize = 768;

/// Row i has adapter i modulo their number.
pub fn forward(spec: &Spec, mut weights: Weights) -> Result<Case> {
    let adapters = spec.adapters.unwrap_or(1);
    let (rows, tokens) = (spec.rows.unwrap_or(64), spec.tokens.unwrap_or(16));
    let builder = weights.builder(&[("proj", WIDTH, WIDTH)])?;
    let layer = builder.pp("proj").linear(WIDTH, WIDTH)?;
    let mut model = LoraModel::new(&[&layer])?;
    let config = spec.lora(["proj"]);
    for number in 0..adapters {
        let name = format!("a{number}");
        model.add_adapter(&name, &config, &mut weights.rng)?;
        weights.fill(&name, &layer)?;
    }
    let names: Vec<String> = (0..rows)
        .map(|row| format!("a{}", row % adapters))
        .collect();
    let shape = [rows, tokens, WIDTH];
    let (x, _) = weights.data(&shape, &shape)?;
    Ok(Box::new(move || {
        Ok(model.with_adapters(&names, || layer.forward_t(&x, false))??)
    }))
}
