//! A variational autoencoder.

use std::collections::BTreeMap;
use std::fmt;

use candle_core::{Device, Tensor};
use lora::LoraBuilder;
use serde::{Deserialize, Serialize};

use super::mlp::{self, Between, Mlp, softplus};
use crate::chart::grouped;
use crate::rng::Rng;
use crate::{Error, Result};

/// The sizes of a [`Vae`].
///
/// ```
/// // 784 → 512 → 256 → 2 · 20 and 20 → 256 → 512 → 784
/// assert_eq!(course::models::VaeConfig::default().parameter_count(), 1_082_680);
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VaeConfig {
    /// Numbers that stand for an image.
    pub latent_size: usize,
    /// Numbers between the encoder's layers; the decoder has them in the opposite order.
    pub hidden_sizes: Vec<usize>,
    /// Rows and columns of an image.
    pub image_size: usize,
}

impl Default for VaeConfig {
    fn default() -> Self {
        Self {
            latent_size: 20,
            hidden_sizes: vec![512, 256],
            image_size: 28,
        }
    }
}

impl VaeConfig {
    fn encoder(&self) -> Vec<usize> {
        let pixels = self.image_size * self.image_size;
        [&[pixels], &self.hidden_sizes[..], &[2 * self.latent_size]].concat()
    }

    fn decoder(&self) -> Vec<usize> {
        let mut sizes = self.encoder();
        sizes.reverse();
        sizes[0] = self.latent_size;
        sizes
    }

    /// Weights and biases of all layers.
    #[must_use]
    pub fn parameter_count(&self) -> usize {
        mlp::count(&self.encoder()) + mlp::count(&self.decoder())
    }

    /// The weights of an autoencoder that has not been trained, below `encoder` and `decoder`:
    /// drawn evenly from ±1 / √fan-in.
    ///
    /// # Errors
    ///
    /// What candle reports when it moves a tensor to `device`.
    pub fn random_weights(
        &self,
        rng: &mut Rng,
        device: &Device,
    ) -> Result<BTreeMap<String, Tensor>> {
        let mut all = mlp::random_weights(("encoder", &self.encoder()), rng, device)?;
        all.extend(mlp::random_weights(
            ("decoder", &self.decoder()),
            rng,
            device,
        )?);
        Ok(all)
    }
}

/// An encoder that turns an image into a normal distribution of latent numbers, and a decoder that
/// turns such numbers into an image; linear layers with LeakyReLU (slope 0.2) between them.
///
/// Its layers are `encoder.layers.0` to `encoder.layers.2`, and `decoder.layers.0` to
/// `decoder.layers.2`.
///
/// Source: Kingma and Welling 2013, arXiv:1312.6114.
///
/// ```
/// use course::models::{Vae, VaeConfig};
/// use course::prelude::*;
/// use course::candle_nn::VarBuilder;
///
/// let config = VaeConfig::default();
/// let weights = config.random_weights(&mut rng(1), &Device::Cpu)?.into_iter().collect();
/// let builder = LoraBuilder::new(VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu));
/// let vae = Vae::new(&config, &builder)?;
/// let z = rng(2).randn((16, 20), &Device::Cpu)?;
/// assert_eq!(vae.decode(&z, false)?.dims(), [16, 1, 28, 28]);
/// # Ok::<(), course::Error>(())
/// ```
#[derive(Debug)]
pub struct Vae {
    config: VaeConfig,
    encoder: Mlp,
    decoder: Mlp,
}

impl Vae {
    /// The autoencoder of the builder's weights; adapters come from the builder's
    /// [`model`](LoraBuilder::model).
    ///
    /// # Errors
    ///
    /// A weight that is missing or of another shape.
    pub fn new(config: &VaeConfig, builder: &LoraBuilder<'_>) -> Result<Self> {
        Ok(Self {
            encoder: Mlp::new(
                &config.encoder(),
                Between::LeakyRelu,
                &builder.pp("encoder"),
            )?,
            decoder: Mlp::new(
                &config.decoder(),
                Between::LeakyRelu,
                &builder.pp("decoder"),
            )?,
            config: config.clone(),
        })
    }

    /// Mean μ and logarithm of the variance, ln σ², of an image's latent numbers.
    ///
    /// # Shapes
    ///
    /// Images of light from 0 to 1, [n, 1, `image_size`, `image_size`] → two of
    /// [n, `latent_size`].
    ///
    /// # Errors
    ///
    /// Images of another size.
    pub fn encode(&self, images: &Tensor, train: bool) -> Result<(Tensor, Tensor)> {
        let (side, latent) = (self.config.image_size, self.config.latent_size);
        mlp::rows(images, &[1, side, side], "Vae::encode")?;
        let both = self.encoder.forward_t(&images.flatten_from(1)?, train)?;
        Ok((both.narrow(1, 0, latent)?, both.narrow(1, latent, latent)?))
    }

    /// Images of light from 0 to 1 from latent numbers; normal ones give new images.
    ///
    /// # Shapes
    ///
    /// `z` [n, `latent_size`] → [n, 1, `image_size`, `image_size`].
    ///
    /// # Errors
    ///
    /// Numbers of another shape.
    pub fn decode(&self, z: &Tensor, train: bool) -> Result<Tensor> {
        let side = self.config.image_size;
        let light = candle_nn::ops::sigmoid(&self.logits(z, train)?)?;
        Ok(light.reshape(((), 1, side, side))?)
    }

    /// What goes into the sigmoid: [n, pixels].
    fn logits(&self, z: &Tensor, train: bool) -> Result<Tensor> {
        mlp::rows(z, &[self.config.latent_size], "Vae::decode")?;
        self.decoder.forward_t(z, train)
    }

    /// Minus the evidence lower bound, the mean over images, in nats: with z = μ + σ · noise
    ///
    /// −Σ (x ln y + (1 − x) ln(1 − y)) + ½ Σ (μ² + σ² − 1 − ln σ²),
    ///
    /// the first sum over the pixels x of the image and y of `decode(z)`, the second over the
    /// latent numbers.
    ///
    /// # Shapes
    ///
    /// `images` as in [`encode`](Self::encode), `noise` [n, `latent_size`], normal numbers; → a
    /// number.
    ///
    /// # Errors
    ///
    /// Images or noise of another shape.
    ///
    /// Source: Kingma and Welling 2013, equation 10 and appendix B.
    pub fn loss(&self, images: &Tensor, noise: &Tensor, train: bool) -> Result<Tensor> {
        let (mean, log_variance) = self.encode(images, train)?;
        if noise.dims() != mean.dims() {
            return Err(Error::Model {
                model: "Vae",
                problem: format!(
                    "noise of shape {:?} for latent numbers of shape {:?}; they must be the same",
                    noise.dims(),
                    mean.dims()
                ),
            });
        }
        let deviation = (&log_variance * 0.5)?.exp()?;
        let z = (&mean + deviation * noise)?;
        let (logits, x) = (self.logits(&z, train)?, images.flatten_from(1)?);
        // −x ln σ(l) − (1 − x) ln(1 − σ(l)) = softplus(l) − l x
        let pixels = (softplus(&logits)? - (&logits * x)?)?.sum_all()?;
        let latent = ((mean.sqr()? + log_variance.exp()?)? - (log_variance + 1.0)?)?;
        let n = images.dim(0)? as f64;
        Ok(((pixels + (latent.sum_all()? * 0.5)?)? / n)?)
    }
}

impl fmt::Display for Vae {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let encoder = mlp::words(&self.config.encoder());
        let decoder = mlp::words(&self.config.decoder());
        let count = grouped(&self.config.parameter_count().to_string());
        write!(f, "Vae {encoder} and {decoder} with {count} parameters")
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

    fn small() -> VaeConfig {
        VaeConfig {
            latent_size: 2,
            hidden_sizes: vec![6, 4],
            image_size: 3,
        }
    }

    fn vae() -> (Vae, BTreeMap<String, Tensor>) {
        let weights = small().random_weights(&mut rng(1), &CPU).unwrap();
        let own = weights.clone().into_iter().collect();
        let builder = LoraBuilder::new(VarBuilder::from_tensors(own, DType::F32, &CPU));
        (Vae::new(&small(), &builder).unwrap(), weights)
    }

    #[test]
    fn the_count_is_that_of_the_weights() {
        let (_, weights) = vae();
        let count: usize = weights.values().map(Tensor::elem_count).sum();
        assert_eq!(count, small().parameter_count());
    }

    #[test]
    fn both_parts_and_the_loss_by_hand() -> Result<()> {
        let (vae, weights) = vae();
        let layers = |x: &Tensor, part: &str| -> Result<Tensor> {
            let mut h = x.clone();
            for i in 0..3 {
                if i > 0 {
                    h = candle_nn::ops::leaky_relu(&h, 0.2)?;
                }
                let of = |what: &str| &weights[&format!("{part}.layers.{i}.{what}")];
                h = h.matmul(&of("weight").t()?)?.broadcast_add(of("bias"))?;
            }
            Ok(h)
        };
        let images = rng(2).uniform(0.0, 1.0, (5, 1, 3, 3), &CPU)?;
        let noise = rng(3).randn((5, 2), &CPU)?;
        let both = layers(&images.flatten_from(1)?, "encoder")?;
        let (mean, log_variance) = vae.encode(&images, false)?;
        assert!(gap(&mean, &both.narrow(1, 0, 2)?) < 1e-6);
        assert!(gap(&log_variance, &both.narrow(1, 2, 2)?) < 1e-6);

        let z = (&mean + (&log_variance / 2.0)?.exp()? * &noise)?;
        let made = candle_nn::ops::sigmoid(&layers(&z, "decoder")?)?;
        assert!(gap(&vae.decode(&z, false)?.flatten_from(1)?, &made) < 1e-6);

        let numbers = |t: &Tensor| -> Result<Vec<f64>> {
            Ok(t.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
        };
        let (x, y) = (numbers(&images)?, numbers(&made)?);
        let pixels = x.iter().zip(&y);
        let pixels = pixels.map(|(x, y)| -x * y.ln() - (1.0 - x) * (1.0 - y).ln());
        let (mean, log_variance) = (numbers(&mean)?, numbers(&log_variance)?);
        let latent = mean.iter().zip(&log_variance);
        let latent = latent.map(|(m, l)| 0.5 * (m * m + l.exp() - 1.0 - l));
        let want = (pixels.sum::<f64>() + latent.sum::<f64>()) / 5.0;
        let got = f64::from(vae.loss(&images, &noise, false)?.to_scalar::<f32>()?);
        assert!((got - want).abs() < 1e-5 * want, "{got}, not {want}");
        Ok(())
    }

    #[test]
    fn other_shapes_are_refused_by_name() -> Result<()> {
        let (vae, _) = vae();
        let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &CPU).unwrap();
        let images = zeros(&[5, 1, 3, 3]);
        for (error, says) in [
            (
                vae.encode(&zeros(&[5, 9]), false).err(),
                "Vae::encode: an input of shape [5, 9]",
            ),
            (
                vae.encode(&zeros(&[5, 1, 3, 4]), false).err(),
                "must be [1, 3, 3]",
            ),
            (
                vae.decode(&zeros(&[5, 3]), false).err(),
                "Vae::decode: an input of shape [5, 3]",
            ),
            (
                vae.loss(&images, &zeros(&[1, 2]), false).err(),
                "noise of shape [1, 2]",
            ),
        ] {
            let error = error.map(|error| error.to_string()).unwrap_or_default();
            assert!(error.contains(says), "{error:?} does not say {says}");
        }
        Ok(())
    }
}
