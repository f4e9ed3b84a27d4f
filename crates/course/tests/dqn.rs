//! A DQN learns CartPole-v1 from nothing.

use course::candle_core::{DType, Device};
use course::candle_nn::VarBuilder;
use course::lora::LoraBuilder;
use course::metrics::Spread;
use course::models::{QNetwork, QNetworkConfig};
use course::rl::{self, Dqn};
use course::rng::rng;

/// Gymnasium's registry calls CartPole-v1 solved at a mean return of 475.
const SOLVED: f64 = 475.0;

#[test]
fn five_of_five_seeds_solve_cartpole() {
    let dqn = Dqn {
        reward_threshold: Some(490.0),
        n_eval_episodes: 50,
        ..Dqn::default()
    };
    let sizes = QNetworkConfig::default();
    let mut told = Vec::new();
    for seed in 1..=5 {
        let weights = sizes.random_weights(&mut rng(seed), &Device::Cpu).unwrap();
        let weights = weights.into_iter().collect();
        let vb = VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu);
        let builder = LoraBuilder::trainable(vb);
        let q = QNetwork::new(&sizes, &builder).unwrap();
        let variables = builder.variables();
        let history = dqn.learn((&q, &variables), rl::cartpole_v1, seed, &Device::Cpu);
        let last = *history.unwrap().evaluations.last().unwrap();
        // Episodes that neither the training nor its evaluations have seen.
        let q = q.snapshot().unwrap();
        let returns = rl::evaluate(&q, rl::cartpole_v1, 100, 100_000, &Device::Cpu).unwrap();
        let mean = Spread::of(&returns).unwrap().mean;
        told.push(format!("seed {seed}: {mean} after {} steps", last.steps));
        assert!(mean >= SOLVED, "{}", told.join("; "));
    }
    println!("{}", told.join("\n"));
}
