//! Linear layers in a row, of which the generative models and the Q network are made.

use std::collections::BTreeMap;

use candle_core::{Device, Shape, Tensor};
use lora::ops;
use lora::{LoraBuilder, LoraLinear};

use crate::rng::Rng;
use crate::{Error, Result};

/// What stands between the layers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Between {
    /// x where x > 0, otherwise 0.
    Relu,
    /// x where x > 0, otherwise 0.2 x.
    LeakyRelu,
}

impl Between {
    fn forward(self, x: &Tensor) -> lora::Result<Tensor> {
        const SLOPE: f64 = 0.2;
        let relu = ops::relu(x)?;
        match self {
            Self::Relu => Ok(relu),
            Self::LeakyRelu => Ok(((relu * (1.0 - SLOPE))? + (x * SLOPE)?)?),
        }
    }
}

/// Linear layers named `layers.0`, `layers.1`, … with an activation between them.
#[derive(Debug)]
pub(super) struct Mlp {
    layers: Vec<LoraLinear>,
    between: Between,
}

impl Mlp {
    /// Layers of the builder's weights from `sizes[0]` numbers to the last of `sizes`.
    pub(super) fn new(
        sizes: &[usize],
        between: Between,
        builder: &LoraBuilder<'_>,
    ) -> Result<Self> {
        let layer =
            |(i, size): (usize, &[usize])| builder.pp("layers").pp(i).linear(size[0], size[1]);
        let layers = sizes.windows(2).enumerate().map(layer);
        let layers = layers.collect::<lora::Result<_>>()?;
        Ok(Self { layers, between })
    }

    /// What the last layer gives, without an activation.
    pub(super) fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        let mut h = x.clone();
        for (i, layer) in self.layers.iter().enumerate() {
            if i > 0 {
                h = self.between.forward(&h)?;
            }
            h = layer.forward_t(&h, train)?;
        }
        Ok(h)
    }

    /// What the layers give now, with the adapters added to the weights, for good: training that
    /// goes on does not change it.
    pub(super) fn snapshot(&self) -> Result<Snapshot> {
        let merged = |layer: &LoraLinear| -> Result<(Tensor, Option<Tensor>)> {
            let base = layer.merged()?;
            let weight = base.weight().t()?.force_contiguous()?.detach();
            let bias = base.bias().map(Tensor::force_contiguous).transpose()?;
            let bias = bias.map(|b| b.detach());
            Ok((weight, bias))
        };
        let layers = self.layers.iter().map(merged).collect::<Result<_>>()?;
        Ok(Snapshot {
            layers,
            between: self.between,
        })
    }
}

/// The layers of an [`Mlp`] as they were at one moment, with weights [in, out].
#[derive(Clone, Debug)]
pub(super) struct Snapshot {
    layers: Vec<(Tensor, Option<Tensor>)>,
    between: Between,
}

impl Snapshot {
    /// What the last layer gives, without an activation.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut h = x.clone();
        for (i, (weight, bias)) in self.layers.iter().enumerate() {
            if i > 0 {
                h = self.between.forward(&h)?;
            }
            h = h.matmul(weight)?;
            if let Some(bias) = bias {
                h = h.broadcast_add(bias)?;
            }
        }
        Ok(h)
    }
}

/// Weights and biases of layers of these sizes.
pub(crate) fn count(sizes: &[usize]) -> usize {
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

/// Numbers drawn evenly from ±1 / √fan-in.
///
/// Source: PyTorch's `Linear` and `Conv2d`.
pub(crate) fn by_fan_in(
    fan_in: usize,
    shape: impl Into<Shape>,
    rng: &mut Rng,
    device: &Device,
) -> Result<Tensor> {
    let bound = (fan_in as f64).powf(-0.5);
    rng.uniform(-bound, bound, shape, device)
}

/// The weights of layers that have not been trained, under `prefix`, drawn [`by_fan_in`].
pub(crate) fn random_weights(
    (prefix, sizes): (&str, &[usize]),
    rng: &mut Rng,
    device: &Device,
) -> Result<BTreeMap<String, Tensor>> {
    let mut tensors = BTreeMap::new();
    for (i, size) in sizes.windows(2).enumerate() {
        let mut draw = |part: &str, shape: &[usize]| -> Result<()> {
            let drawn = by_fan_in(size[0], shape, rng, device)?;
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
