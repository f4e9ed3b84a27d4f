//! What a policy gains when it does what it holds best.

use candle_core::{D, Device, Tensor};
use gymnasium_rs::core::Env;

use super::batch::EnvBatch;
use super::env::Observation;
use crate::models::QSnapshot;
use crate::{Error, Result, interrupt};

/// The returns of `episodes` episodes without exploration, the i-th begun with the seed
/// `seed` + i.
///
/// # Errors
///
/// [`Error::Environment`] when there are to be no episodes, or the learner presses stop before
/// they have ended, since the returns of a part would be too low; what the environments refuse.
///
/// ```
/// use course::prelude::*;
/// use course::rl;
/// let (q, _) = Checkpoint::open("cartpole-dqn")?.frozen(&Device::Cpu, QNetwork::new)?;
/// let returns = rl::evaluate(&q.snapshot()?, rl::cartpole_v1, 5, 0, &Device::Cpu)?;
/// assert_eq!(returns, [500.0; 5]);
/// # Ok::<(), course::Error>(())
/// ```
pub fn evaluate<E: Env<Observation, i32>>(
    q: &QSnapshot,
    make: impl Fn() -> E,
    episodes: usize,
    seed: u64,
    device: &Device,
) -> Result<Vec<f64>> {
    let mut envs = EnvBatch::new(episodes, make, seed)?;
    let mut returns = vec![0.0; episodes];
    let mut open = vec![true; episodes];
    while open.contains(&true) {
        if interrupt::requested() {
            let left = open.iter().filter(|open| **open).count();
            let problem =
                format!("the evaluation was stopped with {left} of {episodes} episodes open");
            return Err(Error::Environment { problem });
        }
        let actions = best(&q.forward(&envs.tensor(device)?)?)?;
        for (i, step) in envs.step(&actions)?.into_iter().enumerate() {
            if open[i] {
                returns[i] += f64::from(step.reward);
                open[i] = !step.done();
            }
        }
    }
    Ok(returns)
}

/// The action of the highest value in each row.
pub(super) fn best(values: &Tensor) -> Result<Vec<i32>> {
    let best = values.argmax(D::Minus1)?.to_vec1::<u32>()?;
    Ok(best.into_iter().map(|action| action as i32).collect())
}

/// What a policy does where it sees `observation`: the action of the highest value.
///
/// # Errors
///
/// An observation of another size.
///
/// ```
/// use course::prelude::*;
/// use course::rl::{self, CartPole};
/// let (q, _) = Checkpoint::open("cartpole-dqn")?.frozen(&Device::Cpu, QNetwork::new)?;
/// let seen = rl::reset(&mut CartPole::new(), Some(1), Default::default())?;
/// assert!([0, 1].contains(&rl::greedy(&q.snapshot()?, &seen, &Device::Cpu)?));
/// # Ok::<(), course::Error>(())
/// ```
pub fn greedy(q: &QSnapshot, observation: &Observation, device: &Device) -> Result<i32> {
    let seen = Tensor::from_iter(observation.iter().copied(), device)?.unsqueeze(0)?;
    Ok(best(&q.forward(&seen)?)?[0])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::{QNetwork, QNetworkConfig};
    use crate::rl::{self, CartPole, TimeLimit};
    use crate::rng::rng;
    use candle_core::DType;
    use candle_nn::VarBuilder;
    use lora::LoraBuilder;

    fn network(seed: u64) -> QSnapshot {
        let sizes = QNetworkConfig::default();
        let weights = sizes.random_weights(&mut rng(seed), &Device::Cpu).unwrap();
        let weights = weights.into_iter().collect();
        let vb = VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu);
        let q = QNetwork::new(&sizes, &LoraBuilder::new(vb)).unwrap();
        q.snapshot().unwrap()
    }

    /// Each of the episodes, also where others end earlier and begin anew beside it.
    #[test]
    fn an_evaluation_is_its_episodes_one_by_one() {
        let make = || TimeLimit::new(CartPole::new(), 9);
        let mut all = Vec::new();
        for seed in 1..=4 {
            let q = network(seed);
            let together = evaluate(&q, make, 12, 30, &Device::Cpu).unwrap();
            for (seed, want) in (30..).zip(&together) {
                let mut env = make();
                let mut seen = rl::reset(&mut env, Some(seed), Default::default()).unwrap();
                let mut sum = 0.0;
                loop {
                    let action = greedy(&q, &seen, &Device::Cpu).unwrap();
                    let step = rl::step(&mut env, action).unwrap();
                    sum += f64::from(step.reward);
                    if step.done() {
                        break;
                    }
                    seen = step.observation;
                }
                assert_eq!(sum, *want);
            }
            all.extend(together);
        }
        let short = all.iter().filter(|sum| **sum < 9.0).count();
        assert!(short > 0 && short < all.len(), "both kinds of end: {all:?}");
    }

    #[test]
    fn no_episodes_are_refused() {
        let none = evaluate(&network(1), CartPole::new, 0, 0, &Device::Cpu);
        assert!(none.unwrap_err().to_string().contains("at least one"));
    }
}
