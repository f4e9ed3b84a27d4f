//! What an agent has seen, to learn from again.

use candle_core::{Device, Tensor};

use super::env::{Observation, Step};
use crate::rng::Rng;
use crate::{Error, Result};

/// The last `capacity` transitions; older ones are overwritten.
///
/// ```
/// use course::prelude::*;
/// use course::rl::{self, CartPole, ReplayBuffer};
///
/// let (mut env, mut buffer) = (CartPole::new(), ReplayBuffer::new(100, 4)?);
/// let seen = rl::reset(&mut env, Some(1), Default::default())?;
/// let step = rl::step(&mut env, 1)?;
/// buffer.push(&seen, 1, &step)?;
/// let batch = buffer.sample(3, &mut rng(1), &Device::Cpu)?;
/// assert_eq!(batch.observations.dims(), [3, 4]);
/// # Ok::<(), course::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct ReplayBuffer {
    capacity: usize,
    size: usize,
    observations: Vec<f32>,
    nexts: Vec<f32>,
    actions: Vec<u32>,
    rewards: Vec<f32>,
    /// 1 where the task went on, 0 where it ended.
    going: Vec<f32>,
    at: usize,
}

/// Transitions as tensors.
#[derive(Clone, Debug)]
pub struct Transitions {
    /// What was seen, [n, size].
    pub observations: Tensor,
    /// What was done, [n, 1], u32.
    pub actions: Tensor,
    /// What it gave, `[n]`.
    pub rewards: Tensor,
    /// What was seen then, [n, size].
    pub nexts: Tensor,
    /// 0 where the task had ended, otherwise 1, `[n]`.
    pub going: Tensor,
}

impl ReplayBuffer {
    /// A buffer for observations of `size` numbers.
    ///
    /// # Errors
    ///
    /// [`Error::Environment`] when either number is 0.
    pub fn new(capacity: usize, size: usize) -> Result<Self> {
        if capacity == 0 || size == 0 {
            let problem = format!("a replay buffer for {capacity} observations of {size} numbers");
            return Err(Error::Environment { problem });
        }
        Ok(Self {
            capacity,
            size,
            observations: Vec::new(),
            nexts: Vec::new(),
            actions: Vec::new(),
            rewards: Vec::new(),
            going: Vec::new(),
            at: 0,
        })
    }

    /// How many transitions it holds.
    #[must_use]
    pub fn len(&self) -> usize {
        self.actions.len()
    }

    /// Whether it holds none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.actions.is_empty()
    }

    /// Adds what was seen, what was done then, and what that gave; when full, in the place of the
    /// oldest. At the end of an episode the step's observation must be the last of the episode,
    /// not the next start.
    ///
    /// # Errors
    ///
    /// [`Error::Environment`] for observations of another size and a negative action.
    pub fn push(&mut self, observation: &Observation, action: i32, step: &Step) -> Result<()> {
        let action = u32::try_from(action).map_err(|_| Error::Environment {
            problem: format!("there is no action {action}"),
        })?;
        for seen in [observation, &step.observation] {
            if seen.len() != self.size {
                let (got, want) = (seen.len(), self.size);
                let problem = format!("an observation of {got} numbers; the buffer holds {want}");
                return Err(Error::Environment { problem });
            }
        }
        let going = f32::from(u8::from(!step.terminated));
        if self.len() < self.capacity {
            self.observations.extend(observation);
            self.nexts.extend(&step.observation);
            self.actions.push(action);
            self.rewards.push(step.reward);
            self.going.push(going);
        } else {
            let row = self.at * self.size..(self.at + 1) * self.size;
            for (place, (seen, next)) in row.zip(observation.iter().zip(&step.observation)) {
                (self.observations[place], self.nexts[place]) = (*seen, *next);
            }
            self.actions[self.at] = action;
            self.rewards[self.at] = step.reward;
            self.going[self.at] = going;
        }
        self.at = (self.at + 1) % self.capacity;
        Ok(())
    }

    /// `n` transitions, each drawn evenly from all.
    ///
    /// # Errors
    ///
    /// An empty buffer.
    pub fn sample(&self, n: usize, rng: &mut Rng, device: &Device) -> Result<Transitions> {
        let rows: Vec<usize> = (0..n)
            .map(|_| rng.below(self.len()))
            .collect::<Result<_>>()?;
        let wide = |from: &[f32]| -> Result<Tensor> {
            let mut all = Vec::with_capacity(n * self.size);
            for row in &rows {
                all.extend_from_slice(&from[row * self.size..(row + 1) * self.size]);
            }
            Ok(Tensor::from_vec(all, (n, self.size), device)?)
        };
        let one = |from: &[f32]| -> Result<Tensor> {
            let all: Vec<f32> = rows.iter().map(|row| from[*row]).collect();
            Ok(Tensor::from_vec(all, n, device)?)
        };
        let actions: Vec<u32> = rows.iter().map(|row| self.actions[*row]).collect();
        Ok(Transitions {
            observations: wide(&self.observations)?,
            actions: Tensor::from_vec(actions, (n, 1), device)?,
            rewards: one(&self.rewards)?,
            nexts: wide(&self.nexts)?,
            going: one(&self.going)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rl::Info;
    use crate::rng::rng;
    use ndarray::array;

    fn step(next: f32, terminated: bool, truncated: bool) -> Step {
        Step {
            observation: array![next, -next],
            reward: 10.0 * next,
            terminated,
            truncated,
            info: Info::new(),
        }
    }

    #[test]
    fn what_went_in_comes_out_and_the_oldest_goes() {
        let mut buffer = ReplayBuffer::new(3, 2).unwrap();
        assert!(buffer.is_empty() && buffer.sample(1, &mut rng(1), &Device::Cpu).is_err());
        for i in 0..5u8 {
            let (x, step) = (f32::from(i), step(f32::from(i) + 1.0, i == 3, i == 4));
            buffer.push(&array![x, -x], i32::from(i), &step).unwrap();
        }
        assert_eq!(buffer.len(), 3);
        let batch = buffer.sample(300, &mut rng(1), &Device::Cpu).unwrap();
        let rows = batch.observations.to_vec2::<f32>().unwrap();
        let nexts = batch.nexts.to_vec2::<f32>().unwrap();
        let actions = batch.actions.to_vec2::<u32>().unwrap();
        let rewards = batch.rewards.to_vec1::<f32>().unwrap();
        let going = batch.going.to_vec1::<f32>().unwrap();
        let mut seen = [0; 5];
        for (row, here) in rows.iter().enumerate() {
            let x = here[0];
            assert_eq!(here, &[x, -x]);
            assert_eq!(nexts[row], [x + 1.0, -x - 1.0]);
            assert_eq!((actions[row][0] as f32, rewards[row]), (x, 10.0 * x + 10.0));
            // Only a termination ends the value, not a time limit.
            assert_eq!(going[row], if x == 3.0 { 0.0 } else { 1.0 });
            seen[x as usize] += 1;
        }
        assert_eq!(seen[..2], [0, 0], "the oldest two are gone");
        assert!(seen[2..].iter().all(|n| (60..140).contains(n)), "{seen:?}");
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        assert!(ReplayBuffer::new(0, 2).is_err() && ReplayBuffer::new(2, 0).is_err());
        let mut buffer = ReplayBuffer::new(3, 2).unwrap();
        let error = buffer.push(&array![1.0], 0, &step(1.0, false, false));
        assert!(error.unwrap_err().to_string().contains("1 numbers"));
        let error = buffer.push(&array![1.0, 2.0], -1, &step(1.0, false, false));
        assert!(error.unwrap_err().to_string().contains("action -1"));
        assert!(buffer.is_empty(), "nothing half written");
    }
}
