//! Starts from which a sine wave is learned in a few steps.

use crate::Result;
use crate::store::Told;
use course::candle_core::Device;
use course::meta::{Adapt, MetaConfig, MetaLearner, MetaMethod, Sinusoids};
use course::metrics::Spread;
use course::rng::rng;
use std::time::Instant;

const SEED: u64 = 1;
/// Iterations of the authors' code.
const STEPS: usize = 70_000;
/// Tasks in an iteration.
const TASKS: usize = 25;
/// Points to adapt to, and as many to judge by.
const POINTS: usize = 10;
/// The seed of the tasks that the cards tell of.
const HELD_OUT: u64 = 1_000_001;

/// A squared error that no wave has, whose amplitude is at most 5.
const DIVERGED: f64 = 1000.0;

/// `sinusoid-maml`: every weight is adapted.
pub fn maml() -> Result<()> {
    train(
        "sinusoid-maml",
        "A network from whose weights a few gradient steps lead to any of many sine waves",
        &MetaConfig::default(),
    )
}

/// `sinusoid-maml-lora`: LoRA pairs are adapted, on a network that learned to be adapted so.
pub fn maml_lora() -> Result<()> {
    train(
        "sinusoid-maml-lora",
        "A network with LoRA pairs; a few gradient steps on the pairs lead to any of many sine waves",
        &lora(4),
    )
}

/// `sinusoid-maml-lora-r1`: the same with pairs of rank 1.
pub fn maml_lora_r1() -> Result<()> {
    train(
        "sinusoid-maml-lora-r1",
        "A network with LoRA pairs of rank 1; a few gradient steps on the pairs lead to any of many \
         sine waves",
        &lora(1),
    )
}

fn lora(r: usize) -> MetaConfig {
    MetaConfig {
        adapt: Adapt::Lora {
            r,
            lora_alpha: r as f64,
        },
        ..Default::default()
    }
}

/// `sinusoid-maml-rates`: every weight is adapted, by a step size that each tensor has learned.
pub fn maml_rates() -> Result<()> {
    train(
        "sinusoid-maml-rates",
        "A network whose weights have learned their step sizes, too; one gradient step leads to any \
         of many sine waves",
        &MetaConfig {
            learn_inner_rates: true,
            ..Default::default()
        },
    )
}

/// `sinusoid-first-order`: as `sinusoid-maml`, without second derivatives.
pub fn first_order() -> Result<()> {
    train(
        "sinusoid-first-order",
        "A network as sinusoid-maml, meta-trained without second derivatives",
        &MetaConfig {
            method: MetaMethod::FirstOrder,
            ..Default::default()
        },
    )
}

/// `sinusoid-reptile`: ten inner steps, and a part of the way to where they lead.
pub fn reptile() -> Result<()> {
    train(
        "sinusoid-reptile",
        "A network near to where many inner steps lead on any of many sine waves",
        &MetaConfig {
            method: MetaMethod::Reptile,
            inner_steps: 10,
            outer_rate: 0.1,
            ..Default::default()
        },
    )
}

/// `sinusoid-pretrained`: the baseline, trained on all waves together.
pub fn pretrained() -> Result<()> {
    train(
        "sinusoid-pretrained",
        "A network trained on the points of many sine waves together",
        &MetaConfig {
            method: MetaMethod::Pretrain,
            ..Default::default()
        },
    )
}

fn train(name: &'static str, about: &'static str, config: &MetaConfig) -> Result<()> {
    let device = Device::Cpu;
    let weights = config.random_weights(&mut rng(SEED), &device)?;
    let mut learner = MetaLearner::new(config, &weights)?;
    let mut sinusoids = Sinusoids::new(SEED, &device);
    let start = Instant::now();
    let mut losses = Vec::new();
    for step in 1..=STEPS {
        if config.method == MetaMethod::Reptile {
            // It has no Adam to even out the last steps.
            learner.set_outer_rate_factor(1.0 - (step - 1) as f64 / STEPS as f64)?;
        }
        losses.push(learner.meta_step(&sinusoids.tasks(TASKS, POINTS, POINTS)?)?);
        if step % 5000 == 0 {
            let loss = losses.iter().sum::<f64>() / losses.len() as f64;
            let seconds = start.elapsed().as_secs_f64();
            println!("step {step} of {STEPS}: loss {loss:.3}, {seconds:.1} s");
            losses.clear();
        }
    }
    let told = Told {
        name,
        about,
        data: Vec::new(),
        seed: SEED,
        steps: STEPS,
        batch: TASKS,
        rate: config.outer_rate,
        seconds: start.elapsed().as_secs_f64(),
    };
    told.keep(learner.variables(), config, || {
        // The published figures: 5 points, and the error after 1, 5 and 10 steps.
        let tasks = Sinusoids::new(HELD_OUT, &device).tasks(1000, 5, 100)?;
        let errors = learner.evaluate(&tasks, 10)?;
        let named = [
            ("error_0", 0),
            ("error_1", 1),
            ("error_5", 5),
            ("error_10", 10),
        ];
        // Where a task has diverged, the mean tells of that task alone, and of rounding.
        let sound = |step: usize| errors[step].iter().all(|error| *error < DIVERGED);
        let mean =
            |(name, step): (&'static str, usize)| Ok((name, Spread::interval(&errors[step])?.mean));
        let told = named.into_iter().take_while(|(_, step)| sound(*step));
        told.map(mean).collect()
    })?;
    Ok(())
}
