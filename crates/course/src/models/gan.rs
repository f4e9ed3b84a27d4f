//! A generator of images and the discriminator that it plays against.

use std::collections::BTreeMap;
use std::fmt;

use candle_core::{Device, Module, Tensor};
use lora::LoraBuilder;
use serde::{Deserialize, Serialize};

use super::mlp::{self, Between, Mlp, softplus};
use crate::Result;
use crate::chart::grouped;
use crate::rng::Rng;

/// The sizes of a [`Generator`] and its [`Discriminator`].
///
/// ```
/// let config = course::models::GanConfig::default();
/// // 100 → 128 → 256 → 512 → 784
/// assert_eq!(config.generator_parameters(), 579_728);
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GanConfig {
    /// Random numbers that an image is made from.
    pub latent_size: usize,
    /// Numbers between the generator's layers.
    pub generator_sizes: Vec<usize>,
    /// Numbers between the discriminator's layers.
    pub discriminator_sizes: Vec<usize>,
    /// Rows and columns of an image.
    pub image_size: usize,
}

impl Default for GanConfig {
    fn default() -> Self {
        Self {
            latent_size: 100,
            generator_sizes: vec![128, 256, 512],
            discriminator_sizes: vec![256, 128],
            image_size: 28,
        }
    }
}

impl GanConfig {
    fn pixels(&self) -> usize {
        self.image_size * self.image_size
    }

    fn generator(&self) -> Vec<usize> {
        [
            &[self.latent_size],
            &self.generator_sizes[..],
            &[self.pixels()],
        ]
        .concat()
    }

    fn discriminator(&self) -> Vec<usize> {
        [&[self.pixels()], &self.discriminator_sizes[..], &[1]].concat()
    }

    /// Weights and biases of the generator.
    #[must_use]
    pub fn generator_parameters(&self) -> usize {
        mlp::count(&self.generator())
    }

    /// Weights and biases of the discriminator.
    #[must_use]
    pub fn discriminator_parameters(&self) -> usize {
        mlp::count(&self.discriminator())
    }

    /// The weights of two players that have not been trained, below `generator` and
    /// `discriminator`: drawn evenly from ±1 / √fan-in.
    ///
    /// # Errors
    ///
    /// What candle reports when it moves a tensor to `device`.
    pub fn random_weights(
        &self,
        rng: &mut Rng,
        device: &Device,
    ) -> Result<BTreeMap<String, Tensor>> {
        let mut all = mlp::random_weights(("generator", &self.generator()), rng, device)?;
        let of = ("discriminator", &self.discriminator()[..]);
        all.extend(mlp::random_weights(of, rng, device)?);
        Ok(all)
    }
}

/// Linear layers that turn random numbers into an image, with LeakyReLU (slope 0.2) between them
/// and tanh behind the last.
///
/// Its layers are `generator.layers.0` to `generator.layers.3`.
///
/// Source: Goodfellow et al. 2014, arXiv:1406.2661.
///
/// ```
/// use course::models::{GanConfig, Generator};
/// use course::prelude::*;
/// use course::candle_nn::VarBuilder;
///
/// let config = GanConfig::default();
/// let weights = config.random_weights(&mut rng(1), &Device::Cpu)?.into_iter().collect();
/// let builder = LoraBuilder::new(VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu));
/// let generator = Generator::new(&config, &builder)?;
/// let images = generator.forward_t(&rng(2).randn((16, 100), &Device::Cpu)?, false)?;
/// assert_eq!(images.dims(), [16, 1, 28, 28]);
/// assert!(images.abs()?.max_all()?.to_scalar::<f32>()? <= 1.0);
/// # Ok::<(), course::Error>(())
/// ```
#[derive(Debug)]
pub struct Generator {
    config: GanConfig,
    layers: Mlp,
}

impl Generator {
    /// The generator of the builder's weights; adapters come from the builder's
    /// [`model`](LoraBuilder::model).
    ///
    /// # Errors
    ///
    /// A weight that is missing or of another shape.
    pub fn new(config: &GanConfig, builder: &LoraBuilder<'_>) -> Result<Self> {
        Ok(Self {
            layers: Mlp::new(
                &config.generator(),
                Between::LeakyRelu,
                &builder.pp("generator"),
            )?,
            config: config.clone(),
        })
    }

    /// Images of light from −1 (black) to 1 (white); `train` turns the adapters' dropout on.
    ///
    /// # Shapes
    ///
    /// `z` [n, `latent_size`], normal numbers → [n, 1, `image_size`, `image_size`].
    ///
    /// # Errors
    ///
    /// Numbers of another shape.
    pub fn forward_t(&self, z: &Tensor, train: bool) -> Result<Tensor> {
        let side = self.config.image_size;
        let n = mlp::rows(z, &[self.config.latent_size], "Generator")?;
        let image = self.layers.forward_t(z, train)?.tanh()?;
        Ok(image.reshape((n, 1, side, side))?)
    }

    /// How well the discriminator was fooled: the mean of −ln σ(logit) over made images, in nats.
    ///
    /// This is the loss that Goodfellow et al. use in practice, since it has a gradient where the
    /// discriminator is sure (section 3).
    ///
    /// # Errors
    ///
    /// What candle reports.
    pub fn loss(made: &Tensor) -> Result<Tensor> {
        Ok(softplus(&made.neg()?)?.mean_all()?)
    }
}

/// Linear layers that say whether an image is real, with LeakyReLU (slope 0.2) between them.
///
/// Its layers are `discriminator.layers.0` to `discriminator.layers.2`.
#[derive(Debug)]
pub struct Discriminator {
    config: GanConfig,
    layers: Mlp,
}

impl Discriminator {
    /// The discriminator of the builder's weights.
    ///
    /// # Errors
    ///
    /// A weight that is missing or of another shape.
    pub fn new(config: &GanConfig, builder: &LoraBuilder<'_>) -> Result<Self> {
        Ok(Self {
            layers: Mlp::new(
                &config.discriminator(),
                Between::LeakyRelu,
                &builder.pp("discriminator"),
            )?,
            config: config.clone(),
        })
    }

    /// A logit for each image, positive for "real".
    ///
    /// # Shapes
    ///
    /// Images of light from −1 to 1, [n, 1, `image_size`, `image_size`] → [n, 1].
    ///
    /// # Errors
    ///
    /// Images of another size.
    pub fn forward_t(&self, images: &Tensor, train: bool) -> Result<Tensor> {
        let side = self.config.image_size;
        mlp::rows(images, &[1, side, side], "Discriminator")?;
        self.layers.forward_t(&images.flatten_from(1)?, train)
    }

    /// The cross entropy of its verdicts, in nats: the mean of −ln σ(logit) over real images and of
    /// −ln(1 − σ(logit)) over made ones, added.
    ///
    /// It is 2 ln 2 = 1.386 for one that cannot tell them apart.
    ///
    /// # Errors
    ///
    /// What candle reports.
    pub fn loss(real: &Tensor, made: &Tensor) -> Result<Tensor> {
        Ok((softplus(&real.neg()?)?.mean_all()? + softplus(made)?.mean_all()?)?)
    }
}

impl Module for Generator {
    fn forward(&self, z: &Tensor) -> candle_core::Result<Tensor> {
        self.forward_t(z, false).map_err(candle_core::Error::wrap)
    }
}

impl fmt::Display for Generator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sizes = mlp::words(&self.config.generator());
        let count = grouped(&self.config.generator_parameters().to_string());
        write!(f, "Generator {sizes} with {count} parameters")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::testing::gap;
    use crate::rng::rng;
    use candle_core::DType;
    use candle_nn::VarBuilder;

    const CPU: Device = Device::Cpu;

    fn small() -> GanConfig {
        GanConfig {
            latent_size: 5,
            generator_sizes: vec![7, 6],
            discriminator_sizes: vec![4],
            image_size: 3,
        }
    }

    fn builder(weights: &BTreeMap<String, Tensor>) -> LoraBuilder<'static> {
        let weights = weights.clone().into_iter().collect();
        LoraBuilder::new(VarBuilder::from_tensors(weights, DType::F32, &CPU))
    }

    #[test]
    fn the_count_is_that_of_the_weights() {
        let (config, default) = (small(), GanConfig::default());
        let weights = config.random_weights(&mut rng(1), &CPU).unwrap();
        let count: usize = weights.values().map(Tensor::elem_count).sum();
        let of = config.generator_parameters() + config.discriminator_parameters();
        assert_eq!(count, of);
        assert_eq!(default.discriminator_parameters(), 233_985);
    }

    #[test]
    fn both_players_by_hand() -> Result<()> {
        let config = small();
        let weights = config.random_weights(&mut rng(1), &CPU)?;
        let layer = |x: &Tensor, name: &str| -> candle_core::Result<Tensor> {
            let (w, b) = (
                &weights[&format!("{name}.weight")],
                &weights[&format!("{name}.bias")],
            );
            x.matmul(&w.t()?)?.broadcast_add(b)
        };
        let leaky = |x: Tensor| candle_nn::ops::leaky_relu(&x, 0.2);
        let z = rng(2).randn((4, 5), &CPU)?;
        let h = leaky(layer(&z, "generator.layers.0")?)?;
        let h = leaky(layer(&h, "generator.layers.1")?)?;
        let want = layer(&h, "generator.layers.2")?
            .tanh()?
            .reshape((4, 1, 3, 3))?;
        let images = Generator::new(&config, &builder(&weights))?.forward_t(&z, false)?;
        assert!(gap(&images, &want) < 1e-6);

        let h = leaky(layer(&images.flatten_from(1)?, "discriminator.layers.0")?)?;
        let want = layer(&h, "discriminator.layers.1")?;
        let discriminator = Discriminator::new(&config, &builder(&weights))?;
        assert!(gap(&discriminator.forward_t(&images, false)?, &want) < 1e-6);
        Ok(())
    }

    #[test]
    fn the_losses_by_their_formula() -> Result<()> {
        let (real, made) = (vec![1.5f32, -3.0, 80.0], vec![0.5f32, -2.0, -90.0, 60.0]);
        let tensor = |x: &[f32]| Tensor::new(x, &CPU)?.unsqueeze(1);
        let plus = |x: f32| f64::from(x).exp().ln_1p();
        let mean =
            |x: &[f32], sign: f32| x.iter().map(|x| plus(sign * x)).sum::<f64>() / x.len() as f64;
        let scalar = |t: Tensor| t.to_scalar::<f32>().map(f64::from);
        let loss = scalar(Discriminator::loss(&tensor(&real)?, &tensor(&made)?)?)?;
        assert!(
            (loss - mean(&real, -1.0) - mean(&made, 1.0)).abs() < 1e-5,
            "{loss}"
        );
        let loss = scalar(Generator::loss(&tensor(&made)?)?)?;
        assert!((loss - mean(&made, -1.0)).abs() < 1e-5, "{loss}");
        Ok(())
    }

    #[test]
    fn other_shapes_are_refused_by_name() -> Result<()> {
        let (config, weights) = (small(), small().random_weights(&mut rng(1), &CPU)?);
        let generator = Generator::new(&config, &builder(&weights))?;
        let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &CPU);
        for shape in [&[5][..], &[2, 6], &[1, 2, 5]] {
            let error = generator.forward_t(&zeros(shape)?, false).unwrap_err();
            assert!(error.to_string().contains("Generator"), "{error}");
        }
        let discriminator = Discriminator::new(&config, &builder(&weights))?;
        for shape in [&[2, 9][..], &[2, 3, 3], &[2, 1, 3, 4]] {
            let error = discriminator.forward_t(&zeros(shape)?, false).unwrap_err();
            assert!(error.to_string().contains("Discriminator"), "{error}");
        }
        Ok(())
    }
}
