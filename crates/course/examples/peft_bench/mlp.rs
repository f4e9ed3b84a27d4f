//! A training step of an MLP, 768 → 3072 → 768, with an adapter on both layers.

use crate::case::{Case, Result, Spec};
use crate::weights::{ADAPTER, Weights};
use course::lora::ops::{gelu, mse_loss};

pub const WIDTH: usize = 768;
pub const HIDDEN: usize = 3072;

/// Up, GELU with tanh, down.
pub fn step(spec: &Spec, mut weights: Weights) -> Result<Case> {
    let builder = weights.builder(&[("up", WIDTH, HIDDEN), ("down", HIDDEN, WIDTH)])?;
    let up = builder.pp("up").linear(WIDTH, HIDDEN)?;
    let down = builder.pp("down").linear(HIDDEN, WIDTH)?;
    weights.adapt(ADAPTER, &spec.lora(["up", "down"]), &[&up, &down])?;
    let shape = [spec.batch.unwrap_or(256), WIDTH];
    let (x, target) = weights.data(&shape, &shape)?;
    let parameters = [&up, &down]
        .iter()
        .flat_map(|layer| layer.trainable_parameters())
        .collect();
    spec.training(parameters, move || {
        let hidden = gelu(&up.forward_t(&x, true)?)?;
        Ok(mse_loss(&down.forward_t(&hidden, true)?, &target)?)
    })
}
