//! Inference through one linear layer, 768 → 3072: alone, adapter merged in, adapter beside it.

use crate::case::{Case, Result, Spec};
use crate::weights::Weights;
use course::candle_nn::Module;

pub const INPUTS: usize = 768;
pub const OUTPUTS: usize = 3072;
pub const BATCH: usize = 256;

/// The forward pass in the form that the settings name.
pub fn forward(spec: &Spec, mut weights: Weights) -> Result<Case> {
    let form = spec.form.as_deref().unwrap_or_default();
    if form == "base" {
        let builder = weights.builder(&[("proj", INPUTS, OUTPUTS)])?;
        let base = course::candle_nn::linear(INPUTS, OUTPUTS, builder.pp("proj").vb())?;
        let (x, _) = weights.data(&[BATCH, INPUTS], &[BATCH, OUTPUTS])?;
        return Ok(Box::new(move || Ok(base.forward(&x)?)));
    }
    let layer = weights.projection(spec, INPUTS, OUTPUTS)?;
    let (x, _) = weights.data(&[BATCH, INPUTS], &[BATCH, OUTPUTS])?;
    match form {
        "merged" => layer.merge()?,
        "unmerged" => (),
        other => return Err(format!("merged: there is no form {other:?}").into()),
    }
    Ok(Box::new(move || Ok(layer.forward_t(&x, false)?)))
}
