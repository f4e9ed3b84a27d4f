//! Linear layers in a row, of which the generative models are made.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use lora::ops;
use lora::{LoraBuilder, LoraLinear};

use crate::rng::Rng;
use crate::{Error, Result};

/// The slope of LeakyReLU below zero.
const SLOPE: f64 = 0.2;

/// Linear layers with LeakyReLU between them, named `layers.0`, `layers.1`, ….
#[derive(Debug)]
pub(super) struct Mlp(Vec<LoraLinear>);

impl Mlp {
    /// Layers of the builder's weights from `sizes[0]` numbers to the last of `sizes`.
    pub(super) fn new(sizes: &[usize], builder: &LoraBuilder<'_>) -> Result<Self> {
        let layer =
            |(i, size): (usize, &[usize])| builder.pp("layers").pp(i).linear(size[0], size[1]);
        let layers = sizes.windows(2).enumerate().map(layer);
        Ok(Self(layers.collect::<lora::Result<_>>()?))
    }

    /// What the last layer gives, without an activation.
    pub(super) fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        let mut h = x.clone();
        for (i, layer) in self.0.iter().enumerate() {
            if i > 0 {
                h = ((ops::relu(&h)? * (1.0 - SLOPE))? + (h * SLOPE)?)?;
            }
            h = layer.forward_t(&h, train)?;
        }
        Ok(h)
    }
}

/// Weights and biases of layers of these sizes.
pub(super) fn count(sizes: &[usize]) -> usize {
    sizes.windows(2).map(|s| (s[0] + 1) * s[1]).sum()
}

/// The sizes for a reader, as 784 → 512 → 40.
pub(super) fn words(sizes: &[usize]) -> String {
    let sizes: Vec<String> = sizes.iter().map(ToString::to_string).collect();
    sizes.join(" → ")
}

/// How many rows a tensor of rows of this shape has.
pub(super) fn rows(x: &Tensor, row: &[usize], model: &'static str) -> Result<usize> {
    match x.dims() {
        [n, rest @ ..] if rest == row => Ok(*n),
        got => Err(Error::Model {
            model,
            problem: format!("an input of shape {got:?}; each of its rows must be {row:?}"),
        }),
    }
}

/// The weights of layers that have not been trained, under `prefix`: drawn evenly from
/// ±1 / √fan-in.
///
/// Source: PyTorch's `Linear`.
pub(super) fn random_weights(
    (prefix, sizes): (&str, &[usize]),
    rng: &mut Rng,
    device: &Device,
) -> Result<BTreeMap<String, Tensor>> {
    let mut tensors = BTreeMap::new();
    for (i, size) in sizes.windows(2).enumerate() {
        let bound = (size[0] as f64).powf(-0.5);
        let mut draw = |part: &str, shape: &[usize]| -> Result<()> {
            let drawn = rng.uniform(-bound, bound, shape, device)?;
            tensors.insert(format!("{prefix}.layers.{i}.{part}"), drawn);
            Ok(())
        };
        draw("weight", &[size[1], size[0]])?;
        draw("bias", &[size[1]])?;
    }
    Ok(tensors)
}

/// ln(1 + eˣ) of each number, which neither overflows nor loses small ones.
pub(super) fn softplus(x: &Tensor) -> Result<Tensor> {
    let rest = (x.abs()?.neg()?.exp()? + 1.0)?.log()?;
    Ok((ops::relu(x)? + rest)?)
}
