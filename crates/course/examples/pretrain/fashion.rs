//! A training on Fashion-MNIST of all weights of a network.

use crate::Result;
use crate::store::Told;
use course::candle_core::{Device, Tensor};
use course::data::{self, Images};
use course::lora::LoraBuilder;
use course::lora::optim::Schedule;
use course::models::{Cnn, ViT};
use course::train::Training;
use serde::Serialize;
use std::fmt::Display;

pub const SEED: u64 = 1;
pub const DEVICE: Device = Device::Cpu;
pub const BATCH: usize = 64;
/// What a training on Fashion-MNIST learns from.
pub const DATA: [&str; 2] = ["fashion/train-images.gz", "fashion/train-labels.gz"];

/// What learns the ten classes.
pub trait Network: Display {
    fn loss(&self, batch: &Images) -> course::Result<Tensor>;
    fn accuracy(&self, images: &Images) -> course::Result<f64>;
}

impl Network for Cnn {
    fn loss(&self, batch: &Images) -> course::Result<Tensor> {
        self.loss(&batch.images, &batch.labels, true)
    }

    fn accuracy(&self, images: &Images) -> course::Result<f64> {
        self.accuracy(&images.images, &images.labels)
    }
}

impl Network for ViT {
    fn loss(&self, batch: &Images) -> course::Result<Tensor> {
        self.loss(&batch.images, &batch.labels, true)
    }

    fn accuracy(&self, images: &Images) -> course::Result<f64> {
        self.accuracy(&images.images, &images.labels)
    }
}

/// What sets one training apart from another.
pub struct Run {
    pub name: &'static str,
    pub about: &'static str,
    pub steps: usize,
    pub rate: f64,
}

impl Run {
    /// Trains the network of a builder; `vary` makes of each batch what the network sees.
    pub fn train(
        &self,
        (network, builder): (&impl Network, &LoraBuilder<'_>),
        config: &impl Serialize,
        mut vary: impl FnMut(Images) -> course::Result<Images>,
    ) -> Result<()> {
        let fashion = data::fashion(&DEVICE)?;
        let variables = builder.variables();
        println!("{network}");
        let accuracy = || network.accuracy(&fashion.test);
        let batches = fashion.train.batches(BATCH, SEED);
        let history = Training::new(self.name, self.steps)
            .schedule(Schedule::Cosine {
                warmup_steps: self.steps / 30,
            })
            .clip(1.0)
            .evaluate_every(250, accuracy)
            .run(
                (variables.clone(), self.rate),
                batches.map(|batch| vary(batch?)),
                |batch| network.loss(batch),
            )?;

        let told = Told {
            name: self.name,
            about: self.about,
            data: DATA.map(String::from).to_vec(),
            seed: SEED,
            steps: self.steps,
            batch: BATCH,
            rate: self.rate,
            seconds: history.seconds,
        };
        told.keep(&variables, config, || Ok(vec![("accuracy", accuracy()?)]))?;
        Ok(())
    }
}
