//! Several environments that step together.

use candle_core::{Device, Tensor};
use gymnasium_rs::core::{Env, Options};

use super::env::{self, Observation, Step};
use crate::{Error, Result};

/// Environments of one kind, stepped together; one whose episode is over begins the next.
///
/// (gymnasium-rs has a trait `VectorEnv`, whose `new` takes nothing, so that it cannot hold
/// environments of changed physics.)
///
/// ```
/// use course::rl::{CartPole, EnvBatch};
/// let mut envs = EnvBatch::new(3, CartPole::new, 7)?;
/// let steps = envs.step(&[0, 1, 1])?;
/// assert_eq!(steps.len(), 3);
/// # Ok::<(), course::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct EnvBatch<E> {
    envs: Vec<E>,
    observations: Vec<Observation>,
}

impl<E: Env<Observation, i32>> EnvBatch<E> {
    /// `n` environments, of which the i-th starts with the seed `seed` + i.
    ///
    /// # Errors
    ///
    /// [`Error::Environment`] when n is 0 or a seed is too large.
    pub fn new(n: usize, make: impl Fn() -> E, seed: u64) -> Result<Self> {
        if n == 0 {
            let problem = "a batch of no environments: give it at least one".to_string();
            return Err(Error::Environment { problem });
        }
        let mut envs: Vec<E> = (0..n).map(|_| make()).collect();
        let mut observations = Vec::with_capacity(n);
        for (env, i) in envs.iter_mut().zip(0..) {
            let seed = seed.saturating_add(i);
            let seed = i32::try_from(seed).map_err(|_| Error::Environment {
                problem: format!("the seed {seed} is too large: give one below 2,147,483,648"),
            })?;
            observations.push(env::reset(env, Some(seed), Options::new())?);
        }
        Ok(Self { envs, observations })
    }

    /// How many environments there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.envs.len()
    }

    /// Never: a batch has at least one.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.envs.is_empty()
    }

    /// What each environment shows now: after an episode's end the start of the next.
    #[must_use]
    pub fn observations(&self) -> &[Observation] {
        &self.observations
    }

    /// The same as a tensor.
    ///
    /// # Shapes
    ///
    /// [n, numbers of an observation].
    ///
    /// # Errors
    ///
    /// What candle reports.
    pub fn tensor(&self, device: &Device) -> Result<Tensor> {
        let all: Vec<f32> = self.observations.iter().flatten().copied().collect();
        let size = all.len() / self.len();
        Ok(Tensor::from_vec(all, (self.len(), size), device)?)
    }

    /// Takes an action in each environment. A step's observation is the true one, also where the
    /// episode ended with it and [`observations`](Self::observations) already shows the next start.
    ///
    /// # Errors
    ///
    /// [`Error::Environment`] for another number of actions, or one outside the action space.
    pub fn step(&mut self, actions: &[i32]) -> Result<Vec<Step>> {
        if actions.len() != self.len() {
            let (got, want) = (actions.len(), self.len());
            let problem = format!("{got} actions for {want} environments: give each its own");
            return Err(Error::Environment { problem });
        }
        let mut steps = Vec::with_capacity(self.len());
        for ((env, seen), action) in self
            .envs
            .iter_mut()
            .zip(&mut self.observations)
            .zip(actions)
        {
            let step = env::step(env, *action)?;
            *seen = match step.done() {
                true => env::reset(env, None, Options::new())?,
                false => step.observation.clone(),
            };
            steps.push(step);
        }
        Ok(steps)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rl::{CartPole, TimeLimit};

    #[test]
    fn each_environment_has_its_seed() {
        let envs = EnvBatch::new(3, CartPole::new, 40).unwrap();
        for (i, seen) in envs.observations().iter().enumerate() {
            let seed = Some(40 + i as i32);
            let alone = env::reset(&mut CartPole::new(), seed, Options::new()).unwrap();
            assert_eq!(*seen, alone);
        }
        let tensor = envs.tensor(&Device::Cpu).unwrap();
        let rows = tensor.to_vec2::<f32>().unwrap();
        assert_eq!(rows[2], envs.observations()[2].to_vec());
    }

    /// A pole pushed to one side falls within ten steps.
    #[test]
    fn the_last_observation_is_the_true_one_and_the_next_start_follows() {
        let mut envs = EnvBatch::new(2, CartPole::new, 1).unwrap();
        let fallen = loop {
            let steps = envs.step(&[1, 0]).unwrap();
            if let Some(i) = steps.iter().position(Step::done) {
                break (i, steps[i].clone());
            }
        };
        let (i, step) = fallen;
        assert!(step.terminated && !step.truncated && step.reward == 1.0);
        assert!(step.observation[2].abs() > 0.2, "{}", step.observation);
        assert!(envs.observations()[i].iter().all(|x| x.abs() <= 0.05));
    }

    #[test]
    fn a_time_limit_truncates() {
        let make = || TimeLimit::new(CartPole::new(), 3);
        let mut envs = EnvBatch::new(1, make, 1).unwrap();
        let ends: Vec<_> = (0..6)
            .map(|i| envs.step(&[i % 2]).unwrap()[0].clone())
            .map(|step| (step.terminated, step.truncated))
            .collect();
        let (on, cut) = ((false, false), (false, true));
        assert_eq!(ends, [on, on, cut, on, on, cut]);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let said = |error: Error| error.to_string();
        assert!(said(EnvBatch::new(0, CartPole::new, 1).unwrap_err()).contains("at least one"));
        let far = EnvBatch::new(1, CartPole::new, 1 << 40);
        assert!(said(far.unwrap_err()).contains("too large"));
        let mut envs = EnvBatch::new(2, CartPole::new, 1).unwrap();
        let few = said(envs.step(&[0]).unwrap_err());
        assert!(few.contains("1 actions for 2"), "{few}");
        let wrong = said(envs.step(&[0, 7]).unwrap_err());
        assert!(wrong.contains("no action 7"), "{wrong}");
    }
}
