//! Episodes that are cut off after a number of steps.

use gymnasium_rs::core::{Env, Info, Options, Space};
use ndarray::Array3;

use super::env;

/// An environment with a time limit: from step `max_episode_steps` of an episode on, the steps are
/// truncated. `terminated` stays what the environment says, so that a step can be both.
///
/// The difference matters to a learner: after a terminated step there is nothing more to gain,
/// while a truncated episode would have gone on.
///
/// It owns its environment. gymnasium-rs's `TimeLimitWrapper` borrows it as a `&mut dyn Env`, so
/// neither a struct nor a `Vec` can hold that wrapper without something else that holds the
/// environment. Both count alike, but for this: here a step or a start that the environment
/// refused does not count.
///
/// Source: Gymnasium 1.4.0, `wrappers/common.py`.
///
/// ```
/// use course::rl::{self, CartPole, TimeLimit};
/// let mut envs: Vec<_> = (2..5).map(|limit| TimeLimit::new(CartPole::new(), limit)).collect();
/// for env in &mut envs {
///     rl::reset(env, Some(0), Default::default())?;
///     let mut steps = 0;
///     while !rl::step(env, steps % 2)?.truncated {
///         steps += 1;
///     }
///     assert_eq!(steps + 1, env.max_episode_steps() as i32);
/// }
/// # Ok::<(), course::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct TimeLimit<E> {
    env: E,
    max_episode_steps: usize,
    elapsed_steps: usize,
}

impl<E> TimeLimit<E> {
    /// Truncates step `max_episode_steps` of each episode; 0 is as good as 1.
    #[must_use]
    pub fn new(env: E, max_episode_steps: usize) -> Self {
        Self {
            env,
            max_episode_steps,
            elapsed_steps: 0,
        }
    }

    /// The environment inside.
    #[must_use]
    pub fn env(&self) -> &E {
        &self.env
    }

    /// The limit.
    #[must_use]
    pub fn max_episode_steps(&self) -> usize {
        self.max_episode_steps
    }
}

impl<Obs, Action, E: Env<Obs, Action>> Env<Obs, Action> for TimeLimit<E> {
    fn observation_space(&self) -> Space {
        self.env.observation_space()
    }

    fn action_space(&self) -> Space {
        self.env.action_space()
    }

    fn reset(&mut self, seed: Option<i32>, options: Options) -> (Obs, Info) {
        let (observation, info) = self.env.reset(seed, options);
        if !env::is_refusal(&info) {
            self.elapsed_steps = 0;
        }
        (observation, info)
    }

    fn step(&mut self, action: Action) -> (Obs, f32, bool, bool, Info) {
        let (observation, reward, terminated, truncated, info) = self.env.step(action);
        if env::is_refusal(&info) {
            return (observation, reward, terminated, truncated, info);
        }
        self.elapsed_steps += 1;
        let truncated = truncated || self.elapsed_steps >= self.max_episode_steps;
        (observation, reward, terminated, truncated, info)
    }

    fn render(&self) -> Option<Array3<u8>> {
        self.env.render()
    }

    fn close(&mut self) {
        self.env.close();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use gymnasium_rs::wrappers::timelimit::TimeLimitWrapper;

    use super::*;
    use crate::rl::{self, CartPole, Observation, Pendulum};

    /// Three episodes of 12 steps, pushed to the right: the pole falls around step 10.
    fn trace(env: &mut dyn Env<Observation, i32>) -> Vec<(Vec<f32>, f32, bool, bool, Info)> {
        let mut steps = vec![];
        for seed in [Some(7), None, None] {
            let (start, info) = env.reset(seed, Options::new());
            steps.push((start.to_vec(), 0.0, false, false, info));
            for _ in 0..12 {
                let (observation, reward, terminated, truncated, info) = env.step(1);
                steps.push((observation.to_vec(), reward, terminated, truncated, info));
            }
        }
        steps
    }

    #[test]
    fn what_the_wrapper_of_gymnasium_rs_gives() {
        let mut flags = BTreeSet::new();
        for limit in [0, 1, 5, 9, 10, 12, 13] {
            let ours = trace(&mut TimeLimit::new(CartPole::new(), limit));
            let mut env = CartPole::new();
            let theirs = trace(&mut TimeLimitWrapper::new(&mut env, limit as i32));
            assert_eq!(ours, theirs);
            let truncated = ours.iter().filter(|step| step.3).count();
            assert_eq!(truncated, 3 * (13 - limit.max(1)));
            flags.extend(ours.iter().map(|step| (step.2, step.3)));
        }
        assert_eq!(flags.len(), 4, "each of the two with and without the other");
    }

    #[test]
    fn what_is_refused_takes_no_time() {
        let mut env = TimeLimit::new(CartPole::new(), 3);
        assert!(rl::step(&mut env, 0).is_err(), "not reset yet");
        assert_eq!(env.elapsed_steps, 0);
        rl::reset(&mut env, Some(0), Options::new()).unwrap();
        for elapsed in 1..=3 {
            assert!(rl::step(&mut env, 2).is_err());
            assert!(rl::reset(&mut env, Some(-1), Options::new()).is_err());
            let step = rl::step(&mut env, elapsed % 2).unwrap();
            assert_eq!((step.terminated, step.truncated), (false, elapsed == 3));
            assert_eq!(env.elapsed_steps, elapsed as usize);
        }
    }

    #[test]
    fn any_action_will_do() {
        let mut env = TimeLimit::new(TimeLimit::new(Pendulum::new(), 2), 5);
        assert_eq!(env.action_space(), Pendulum::new().action_space());
        assert_eq!(env.observation_space(), Pendulum::new().observation_space());
        assert!(env.render().is_none());
        rl::reset(&mut env, Some(0), Options::new()).unwrap();
        let mut truncated = || rl::step(&mut env, Observation::zeros(1)).unwrap().truncated;
        assert_eq!([truncated(), truncated()], [false, true], "the inner limit");
        assert!(env.render().is_some());
        assert!(env.env().env().state().is_some());
    }
}
