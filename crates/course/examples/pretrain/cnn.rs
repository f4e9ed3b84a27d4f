//! The convolutional network that knows clothes.

use crate::fashion::{DEVICE, Run, SEED};
use crate::{Result, store};
use course::models::{Cnn, CnnConfig};
use course::rng::rng;

/// `fashion-cnn`: a small convolutional network that learns Fashion-MNIST.
pub fn base() -> Result<()> {
    let config = CnnConfig::default();
    let weights = config.random_weights(&mut rng(SEED), &DEVICE)?;
    let builder = store::builder(weights);
    let cnn = Cnn::new(&config, &builder)?;
    let run = Run {
        name: "fashion-cnn",
        about: "A small convolutional network trained on 12,000 images of Fashion-MNIST",
        // Eight times through the images.
        steps: 1500,
        rate: 2e-3,
    };
    run.train((&cnn, &builder), &config, Ok)
}
