//! The network that balances the pole of CartPole.

use crate::Result;
use crate::store::{self, Told};
use course::candle_core::Device;
use course::metrics::Spread;
use course::models::{QNetwork, QNetworkConfig};
use course::rl::{self, Dqn};
use course::rng::rng;
use std::time::Instant;

/// `cartpole-dqn`: the slide's 4 → 64 → 64 → 2.
pub fn cartpole() -> Result<()> {
    const SEED: u64 = 1;
    /// Where the seeds of the episodes begin that the card tells of; the training saw none of them.
    const HELD_OUT: u64 = 100_000;
    let config = QNetworkConfig::default();
    let builder = store::builder(config.random_weights(&mut rng(SEED), &Device::Cpu)?);
    let q = QNetwork::new(&config, &builder)?;
    println!("{q}");
    let dqn = Dqn {
        reward_threshold: Some(495.0),
        n_eval_episodes: 50,
        ..Dqn::default()
    };
    let start = Instant::now();
    let variables = builder.variables();
    let history = dqn.learn((&q, &variables), rl::cartpole_v1, SEED, &Device::Cpu)?;
    for at in &history.evaluations {
        let (steps, episodes) = (at.steps, at.episodes);
        println!("{steps} steps, {episodes} episodes: {:.1}", at.mean_return);
    }
    let told = Told {
        name: "cartpole-dqn",
        about: "A DQN trained on CartPole-v1 until 50 episodes gave a mean return of 495; a step \
                is one of the environment",
        data: Vec::new(),
        seed: SEED,
        steps: history.evaluations.last().map_or(0, |last| last.steps),
        batch: dqn.batch_size,
        rate: dqn.learning_rate,
        seconds: start.elapsed().as_secs_f64(),
    };
    told.keep(&variables, &config, || {
        let returns = rl::evaluate(&q.snapshot()?, rl::cartpole_v1, 100, HELD_OUT, &Device::Cpu)?;
        Ok(vec![("mean_return", Spread::of(&returns)?.mean)])
    })?;
    Ok(())
}
