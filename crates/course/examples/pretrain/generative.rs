//! The generative models that draw garments.

use crate::Result;
use crate::fashion::{BATCH, DATA, DEVICE, SEED};
use crate::store::{self, Told};
use course::candle_core::Tensor;
use course::candle_nn::{AdamW, Optimizer, ParamsAdamW};
use course::data::{self, Fashion, Images};
use course::linalg::frechet_distance;
use course::lora::optim::Schedule;
use course::models::{Checkpoint, Cnn, Discriminator, GanConfig, Generator, Vae, VaeConfig};
use course::rng::rng;
use course::train::Training;
use std::time::Instant;

/// T-shirt, trousers, pullover, dress, coat and shirt.
const GARMENTS: [u32; 6] = [0, 1, 2, 3, 4, 6];
/// Images that a Fréchet distance is measured with, on both sides.
const MEASURED: usize = 1000;

/// `fashion-gan`: a generator and a discriminator.
pub fn gan() -> Result<()> {
    const STEPS: usize = 12_000;
    const RATE: f64 = 2e-4;
    let config = GanConfig::default();
    let mut random = rng(SEED);
    let builder = store::builder(config.random_weights(&mut random, &DEVICE)?);
    let generator = Generator::new(&config, &builder)?;
    let discriminator = Discriminator::new(&config, &builder)?;
    println!("{generator}");

    let garments = garments()?;
    let measure = Measure::new(&garments.test)?;
    let optimizer = |player: &str| {
        let own = builder.variables().into_iter();
        let own = own.filter(|(name, _)| name.starts_with(player));
        let params = ParamsAdamW {
            lr: RATE,
            beta1: 0.5,
            weight_decay: 0.0,
            ..Default::default()
        };
        AdamW::new(own.map(|(_, var)| var).collect(), params)
    };
    let (mut of_generator, mut of_discriminator) =
        (optimizer("generator")?, optimizer("discriminator")?);
    let start = Instant::now();
    let noise = rng(SEED + 1).randn((MEASURED, config.latent_size), &DEVICE)?;
    let made =
        || -> course::Result<Tensor> { Ok(generator.forward_t(&noise, false)?.affine(0.5, 0.5)?) };
    for (step, batch) in (1..=STEPS).zip(garments.train.batches(BATCH, SEED)) {
        // The second half of the way slows down to a stop.
        let left = (2.0 * (STEPS - step) as f64 / STEPS as f64).min(1.0);
        of_generator.set_learning_rate(RATE * left);
        of_discriminator.set_learning_rate(RATE * left);
        let real = batch?.images.affine(2.0, -1.0)?;
        let z = random.randn((BATCH, config.latent_size), &DEVICE)?;
        let images = generator.forward_t(&z, true)?;
        let judged = discriminator.forward_t(&images.detach(), true)?;
        let loss = Discriminator::loss(&discriminator.forward_t(&real, true)?, &judged)?;
        of_discriminator.backward_step(&loss)?;
        let fooled = Generator::loss(&discriminator.forward_t(&images, true)?)?;
        of_generator.backward_step(&fooled)?;
        if step % 500 == 0 {
            let [loss, fooled] = [loss, fooled].map(|loss| loss.to_scalar::<f32>());
            println!(
                "step {step} of {STEPS}: discriminator {:.3}, generator {:.3}, distance {:.2}, \
                 {:.1} s",
                loss?,
                fooled?,
                measure.distance(&made()?)?,
                start.elapsed().as_secs_f64()
            );
        }
    }
    let about = "A generator and a discriminator trained on the six garments of Fashion-MNIST";
    let told = told("fashion-gan", about, STEPS, RATE, start);
    told.keep(&builder.variables(), &config, || {
        Ok(vec![("frechet", measure.distance(&made()?)?)])
    })?;
    Ok(())
}

/// `fashion-vae`: a variational autoencoder.
pub fn vae() -> Result<()> {
    const STEPS: usize = 6000;
    const RATE: f64 = 1e-3;
    let config = VaeConfig::default();
    let mut random = rng(SEED);
    let builder = store::builder(config.random_weights(&mut random, &DEVICE)?);
    let vae = Vae::new(&config, &builder)?;
    println!("{vae}");

    let garments = garments()?;
    let measure = Measure::new(&garments.test)?;
    let size = config.latent_size;
    let mut fixed = rng(SEED + 1);
    let z = fixed.randn((MEASURED, size), &DEVICE)?;
    let test_noise = fixed.randn((garments.test.len(), size), &DEVICE)?;
    let test = || -> course::Result<f64> {
        let loss = vae.loss(&garments.test.images, &test_noise, false)?;
        Ok(f64::from(loss.to_scalar::<f32>()?))
    };
    let start = Instant::now();
    Training::new("fashion-vae", STEPS)
        .schedule(Schedule::Cosine { warmup_steps: 100 })
        .clip(10.0)
        .evaluate_every(500, test)
        .run(
            (builder.variables(), RATE),
            garments.train.batches(BATCH, SEED),
            |batch| {
                let noise = random.randn((batch.len(), size), &DEVICE)?;
                vae.loss(&batch.images, &noise, true)
            },
        )?;
    let about = "A variational autoencoder trained on the six garments of Fashion-MNIST";
    let told = told("fashion-vae", about, STEPS, RATE, start);
    told.keep(&builder.variables(), &config, || {
        let frechet = measure.distance(&vae.decode(&z, false)?)?;
        Ok(vec![("loss", test()?), ("frechet", frechet)])
    })?;
    Ok(())
}

fn garments() -> course::Result<Fashion> {
    let Fashion { train, test } = data::fashion(&DEVICE)?;
    Ok(Fashion {
        train: train.of_classes(&GARMENTS)?,
        test: test.of_classes(&GARMENTS)?,
    })
}

/// Measures made images beside real ones, in what `fashion-cnn` sees.
struct Measure {
    cnn: Cnn,
    real: Tensor,
}

impl Measure {
    fn new(real: &Images) -> course::Result<Self> {
        let (cnn, _) = Checkpoint::open("fashion-cnn")?.frozen(&DEVICE, Cnn::new)?;
        let real = cnn.features(&real.take(MEASURED)?.images, false)?;
        Ok(Self { cnn, real })
    }

    /// The Fréchet distance of made images to the real ones.
    fn distance(&self, made: &Tensor) -> course::Result<f64> {
        frechet_distance(&self.cnn.features(made, false)?, &self.real)
    }
}

fn told(name: &'static str, about: &'static str, steps: usize, rate: f64, start: Instant) -> Told {
    Told {
        name,
        about,
        data: DATA.map(String::from).to_vec(),
        seed: SEED,
        steps,
        batch: BATCH,
        rate,
        seconds: start.elapsed().as_secs_f64(),
    }
}
