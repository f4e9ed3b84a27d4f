//! The network that knows clothes.

use crate::{Result, store};
use course::candle_core::Device;
use course::data;
use course::lora::optim::Schedule;
use course::models::{Card, Cnn, CnnConfig};
use course::rng::rng;
use course::train::Training;
use std::collections::BTreeMap;

const SEED: u64 = 1;
const DEVICE: Device = Device::Cpu;
const BATCH: usize = 64;
/// Steps of the optimiser: eight times through the 12,000 images.
const STEPS: usize = 1500;
const RATE: f64 = 2e-3;

/// `fashion-cnn`: a small convolutional network that learns Fashion-MNIST.
pub fn base() -> Result<()> {
    const NAME: &str = "fashion-cnn";
    let fashion = data::fashion(&DEVICE)?;
    let config = CnnConfig::default();
    let weights = config.random_weights(&mut rng(SEED), &DEVICE)?;
    let builder = store::builder(weights);
    let cnn = Cnn::new(&config, &builder)?;
    let variables = builder.variables();
    println!("{cnn}");
    let accuracy = || cnn.accuracy(&fashion.test.images, &fashion.test.labels);
    let history = Training::new(NAME, STEPS)
        .schedule(Schedule::Cosine {
            warmup_steps: STEPS / 30,
        })
        .clip(1.0)
        .evaluate_every(250, accuracy)
        .run(
            (variables.clone(), RATE),
            fashion.train.batches(BATCH, SEED),
            |batch| cnn.loss(&batch.images, &batch.labels, true),
        )?;

    store::round(&variables)?;
    let held_out = BTreeMap::from([("accuracy".to_string(), accuracy()?)]);
    let folder = store::folder(NAME)?;
    store::weights(&folder, &variables)?;
    store::json(&folder, "config.json", &config)?;
    let card = Card {
        about: "A small convolutional network trained on 12,000 images of Fashion-MNIST".into(),
        command: format!("cargo course pretrain {NAME}"),
        data: vec![
            "fashion/train-images.gz".into(),
            "fashion/train-labels.gz".into(),
        ],
        seed: SEED,
        steps: STEPS,
        batch: BATCH,
        learning_rate: RATE,
        parameters: store::count(&variables),
        held_out,
        seconds: history.seconds,
        date: store::today()?,
    };
    store::card(&folder, &card)
}
