//! A small convolutional network for pictures of 28 × 28 pixels.

use std::collections::BTreeMap;
use std::fmt;

use candle_core::{Device, Module, Tensor};
use candle_nn::Conv2dConfig;
use lora::ops;
use lora::{LoraBuilder, LoraConv2d, LoraLinear};
use serde::{Deserialize, Serialize};

use super::accuracy::accuracy;
use super::mlp;
use crate::Result;
use crate::chart::grouped;
use crate::rng::Rng;

/// The sizes of a [`Cnn`].
///
/// ```
/// let config = course::models::CnnConfig::default();
/// assert_eq!(config.parameter_count(), 155_786);
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CnnConfig {
    /// Channels of the picture and after each convolution.
    pub channels: [usize; 4],
    /// Numbers between the convolutions and the classes.
    pub hidden: usize,
    /// Classes.
    pub classes: usize,
}

impl Default for CnnConfig {
    fn default() -> Self {
        Self {
            channels: [1, 16, 32, 64],
            hidden: 128,
            classes: 10,
        }
    }
}

/// The side of a kernel, and of the picture after the last convolution.
const KERNEL: usize = 3;
const SIDE: usize = 4;

impl CnnConfig {
    /// Weights and biases of all layers.
    #[must_use]
    pub fn parameter_count(&self) -> usize {
        let shapes = self.shapes();
        let layer = |shape: &Vec<usize>| shape.iter().product::<usize>() + shape[0];
        shapes.iter().map(|(_, shape)| layer(shape)).sum()
    }

    /// Each layer's name and the shape of its weight.
    fn shapes(&self) -> Vec<(&'static str, Vec<usize>)> {
        let [image, one, two, three] = self.channels;
        let flat = three * SIDE * SIDE;
        vec![
            ("conv1", vec![one, image, KERNEL, KERNEL]),
            ("conv2", vec![two, one, KERNEL, KERNEL]),
            ("conv3", vec![three, two, KERNEL, KERNEL]),
            ("fc", vec![self.hidden, flat]),
            ("head", vec![self.classes, self.hidden]),
        ]
    }

    /// The weights of a network that has not been trained: drawn evenly from ±1 / √fan-in.
    ///
    /// Source: PyTorch's `Conv2d` and `Linear`.
    ///
    /// # Errors
    ///
    /// What candle reports when it moves a tensor to `device`.
    pub fn random_weights(
        &self,
        rng: &mut Rng,
        device: &Device,
    ) -> Result<BTreeMap<String, Tensor>> {
        let mut tensors = BTreeMap::new();
        for (layer, shape) in self.shapes() {
            let (fan_in, out) = (shape[1..].iter().product(), shape[0]);
            let weight = mlp::by_fan_in(fan_in, shape, rng, device)?;
            tensors.insert(format!("{layer}.weight"), weight);
            let bias = mlp::by_fan_in(fan_in, out, rng, device)?;
            tensors.insert(format!("{layer}.bias"), bias);
        }
        Ok(tensors)
    }
}

/// Three convolutions of 3 × 3 and two linear layers, with ReLU between them.
///
/// 28 × 28 → `conv1`, mean of 2 × 2 → 14 × 14 → `conv2`, mean of 2 × 2 → 7 × 7 → `conv3` with
/// stride 2 → 4 × 4 → `fc` → `head`.
///
/// ```
/// use course::models::{Cnn, CnnConfig};
/// use course::prelude::*;
/// use course::candle_nn::VarBuilder;
///
/// let config = CnnConfig::default();
/// let weights = config.random_weights(&mut rng(1), &Device::Cpu)?.into_iter().collect();
/// let builder = LoraBuilder::new(VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu));
/// let cnn = Cnn::new(&config, &builder)?;
/// let images = Tensor::zeros((5, 1, 28, 28), DType::F32, &Device::Cpu)?;
/// assert_eq!(cnn.forward_t(&images, false)?.dims(), [5, 10]);
/// # Ok::<(), course::Error>(())
/// ```
#[derive(Debug)]
pub struct Cnn {
    config: CnnConfig,
    conv1: LoraConv2d,
    conv2: LoraConv2d,
    conv3: LoraConv2d,
    fc: LoraLinear,
    head: LoraLinear,
}

impl Cnn {
    /// The network of the builder's weights; adapters come from the builder's
    /// [`model`](LoraBuilder::model).
    ///
    /// # Errors
    ///
    /// A weight that is missing or of another shape.
    pub fn new(config: &CnnConfig, builder: &LoraBuilder<'_>) -> Result<Self> {
        let [image, one, two, three] = config.channels;
        let conv = |name: &str, from: usize, to: usize, stride: usize| {
            let how = Conv2dConfig {
                padding: 1,
                stride,
                ..Conv2dConfig::default()
            };
            builder.pp(name).conv2d(from, to, KERNEL, how)
        };
        let head = builder.pp("head").linear(config.hidden, config.classes)?;
        Ok(Self {
            config: config.clone(),
            conv1: conv("conv1", image, one, 1)?,
            conv2: conv("conv2", one, two, 1)?,
            conv3: conv("conv3", two, three, 2)?,
            fc: builder
                .pp("fc")
                .linear(three * SIDE * SIDE, config.hidden)?,
            head: head.output_head(),
        })
    }

    /// The logits of the classes; `train` turns the adapters' dropout on.
    ///
    /// # Shapes
    ///
    /// `images` [batch, channels, 28, 28] → [batch, classes].
    ///
    /// # Errors
    ///
    /// Images of another size.
    pub fn forward_t(&self, images: &Tensor, train: bool) -> Result<Tensor> {
        Ok(self.head.forward_t(&self.features(images, train)?, train)?)
    }

    /// What the head reads: the numbers behind `fc` and its ReLU. The distance of two sets of
    /// images in them is a measure of likeness, see
    /// [`frechet_distance`](crate::linalg::frechet_distance).
    ///
    /// # Shapes
    ///
    /// `images` as in [`forward_t`](Self::forward_t) → [batch, hidden].
    ///
    /// # Errors
    ///
    /// Images of another size.
    pub fn features(&self, images: &Tensor, train: bool) -> Result<Tensor> {
        let h = ops::relu(&self.conv1.forward_t(images, train)?)?;
        let h = ops::avg_pool2d(&h, 2)?;
        let h = ops::relu(&self.conv2.forward_t(&h, train)?)?;
        let h = ops::avg_pool2d(&h, 2)?;
        let h = ops::relu(&self.conv3.forward_t(&h, train)?)?;
        Ok(ops::relu(&self.fc.forward_t(&h.flatten_from(1)?, train)?)?)
    }

    /// The mean cross entropy of the right classes, in nats.
    ///
    /// # Shapes
    ///
    /// `images` as in [`forward_t`](Self::forward_t), `labels` (batch) of u32; → a number.
    ///
    /// # Errors
    ///
    /// As [`forward_t`](Self::forward_t); a label that is no class.
    pub fn loss(&self, images: &Tensor, labels: &Tensor, train: bool) -> Result<Tensor> {
        Ok(ops::cross_entropy(&self.forward_t(images, train)?, labels)?)
    }

    /// The share of images whose likeliest class is the right one, from 0 to 1.
    ///
    /// # Errors
    ///
    /// As [`loss`](Self::loss); no image at all.
    pub fn accuracy(&self, images: &Tensor, labels: &Tensor) -> Result<f64> {
        accuracy("Cnn::accuracy", images, labels, |images| {
            self.forward_t(images, false)
        })
    }

    /// The first convolution, whose filters can be looked at.
    #[must_use]
    pub fn conv1(&self) -> &LoraConv2d {
        &self.conv1
    }
}

impl Module for Cnn {
    fn forward(&self, images: &Tensor) -> candle_core::Result<Tensor> {
        self.forward_t(images, false)
            .map_err(candle_core::Error::wrap)
    }
}

/// The layers and their numbers of parameters.
impl fmt::Display for Cnn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = |count: usize| grouped(&count.to_string());
        let all = self.config.parameter_count();
        write!(f, "Cnn with {} parameters", number(all))?;
        for (layer, shape) in self.config.shapes() {
            let count = shape.iter().product::<usize>() + shape[0];
            write!(f, "\n  {layer:<6}  {:>8}  weight {shape:?}", number(count))?;
        }
        Ok(())
    }
}
