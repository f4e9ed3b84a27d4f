//! One linear layer, 768 → 768.

use crate::case::{Case, Result, Spec};
use crate::weights::Weights;
use course::lora::ops::mse_loss;

const WIDTH: usize = 768;

/// The forward pass.
pub fn forward(spec: &Spec, mut weights: Weights) -> Result<Case> {
    let layer = weights.projection(spec, WIDTH, WIDTH)?;
    let shape = [spec.batch.unwrap_or(256), WIDTH];
    let (x, _) = weights.data(&shape, &shape)?;
    Ok(Box::new(move || Ok(layer.forward_t(&x, false)?)))
}

/// A training step.
pub fn step(spec: &Spec, mut weights: Weights) -> Result<Case> {
    let layer = weights.projection(spec, WIDTH, WIDTH)?;
    let shape = [spec.batch.unwrap_or(256), WIDTH];
    let (x, target) = weights.data(&shape, &shape)?;
    let parameters = layer.trainable_parameters();
    spec.training(parameters, move || {
        Ok(mse_loss(&layer.forward_t(&x, true)?, &target)?)
    })
}
