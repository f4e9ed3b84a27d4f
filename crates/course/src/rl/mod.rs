//! Reinforcement learning: environments by Gymnasium's rules, and a DQN.
//!
//! [`CartPole`], [`Acrobot`], [`MountainCar`] and [`Pendulum`] stand behind gymnasium-rs's [`Env`]
//! trait and are those of Gymnasium 1.4.0: a test replays what its own environments did. A seed
//! gives the start that it gives in Python, the state is in double precision as there, and
//! `render` paints the same picture but for the smoothness of its edges. [`cartpole_v1`] and its
//! neighbours add the time limit that `gymnasium.make` adds.
//!
//! What the trait cannot return as an error the environments tell in the info under `"error"`,
//! with NaN for the numbers; [`reset`] and [`step`] turn that into an [`Error`](crate::Error), and
//! everything in this room goes through them.
//!
//! # What is wrong in gymnasium-rs 0.1.1
//!
//! Use its [`Env`] and [`Space`], not its `CartPole`, whose learners solve another task:
//!
//! - the total mass is 1.0, not the 1.1 of a cart of 1.0 and a pole of 0.1, and the pole pushes
//!   the cart back as if it weighed 1.0: after a push to the right from rest the cart moves at
//!   0.3622, not at 0.1951, and the pole at −0.3243, not at −0.2927;
//! - the step on which the pole falls is rewarded with 0, not 1, so that the return of an episode
//!   that ends with a fall is one short;
//! - `observation_space` ends at 12°, not at 24°, so that the observation of a fall lies outside;
//! - a seed gives another start than in Gymnasium, and the state is kept in single precision;
//! - a step before the first reset goes on from a state of zeros, and every action but 1 pushes to
//!   the left: neither is refused;
//! - options that are no number and equal bounds `low` and `high` panic;
//! - `render` panics.
//!
//! Tests show each of these, but for the precision, which its source shows. `TimeLimitWrapper`
//! counts right, but borrows its environment: [`TimeLimit`] owns it.

mod acrobot;
mod batch;
mod cartpole;
mod dqn;
mod draw;
mod env;
mod evaluate;
mod mountain_car;
mod pendulum;
mod registration;
mod replay;
mod seeding;
mod time_limit;

pub use acrobot::{Acrobot, AcrobotConfig};
pub use batch::EnvBatch;
pub use cartpole::{CartPole, CartPoleConfig};
pub use dqn::{Dqn, DqnHistory, Evaluation};
pub use draw::shrink;
pub use env::{Observation, Step, reset, step};
pub use evaluate::{evaluate, greedy};
pub use gymnasium_rs::core::{Env, Info, Options, Space};
pub use mountain_car::{MountainCar, MountainCarConfig};
pub use pendulum::{Pendulum, PendulumConfig};
pub use registration::{acrobot_v1, cartpole_v1, mountain_car_v0, pendulum_v1};
pub use replay::{ReplayBuffer, Transitions};
pub use time_limit::TimeLimit;

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use gymnasium_rs::envs::cartpole::CartPole as Theirs;

    use super::*;

    /// gymnasium-rs's CartPole with a start that is as good as zero; equal bounds panic.
    fn theirs() -> Theirs {
        let mut env = Theirs::new();
        env.reset(Some(1), bounds(0.0, 1e-30));
        env
    }

    fn bounds(low: f64, high: f64) -> Options {
        [("low".into(), low.into()), ("high".into(), high.into())].into()
    }

    fn space<E: Env<Observation, i32>>(env: &E) -> (Observation, Observation) {
        match env.observation_space() {
            Space::Box { low, high } => (low, high),
            Space::Discrete(_) => unreachable!("observations are numbers"),
        }
    }

    /// The steps up to the fall, always to the right from rest: rewards and the last observation.
    fn falls(env: &mut impl Env<Observation, i32>) -> (Vec<f32>, Observation) {
        let mut rewards = vec![];
        loop {
            let step = step(env, 1).unwrap();
            rewards.push(step.reward);
            if step.terminated {
                return (rewards, step.observation);
            }
        }
    }

    #[test]
    fn gymnasium_rs_has_other_physics() {
        let mut ours = CartPole::new();
        reset(&mut ours, Some(1), bounds(0.0, 0.0)).unwrap();
        let first = |env: &mut dyn Env<Observation, i32>| {
            let observation = step(env, 1).unwrap().observation;
            observation
                .mapv(|x| (f64::from(x) * 1e4).round() / 1e4)
                .to_vec()
        };
        assert_eq!(first(&mut ours), [0.0, 0.1951, 0.0, -0.2927]);
        assert_eq!(first(&mut theirs()), [0.0, 0.3622, 0.0, -0.3243]);
    }

    #[test]
    fn gymnasium_rs_pays_nothing_for_the_last_step_and_its_space_is_too_small() {
        let mut ours = CartPole::new();
        reset(&mut ours, Some(1), bounds(0.0, 0.0)).unwrap();
        let (rewards, last) = falls(&mut ours);
        assert_eq!(rewards.iter().sum::<f32>(), rewards.len() as f32);
        assert!(last[2].abs() < space(&ours).1[2]);

        let mut theirs = theirs();
        let (rewards, last) = falls(&mut theirs);
        assert_eq!(rewards.iter().sum::<f32>(), rewards.len() as f32 - 1.0);
        assert_eq!(rewards.last(), Some(&0.0));
        assert!(last[2].abs() > space(&theirs).1[2]);
        let twelve = 12_f32.to_radians();
        assert!((space(&theirs).1[2] - twelve).abs() < 1e-6);
        assert!((space(&ours).1[2] - 2.0 * twelve).abs() < 1e-6);
    }

    #[test]
    fn gymnasium_rs_has_other_starts() {
        let ours = reset(&mut CartPole::new(), Some(123), Options::new()).unwrap();
        let theirs = reset(&mut Theirs::new(), Some(123), Options::new()).unwrap();
        assert_eq!(ours[0], 0.018_235_186, "as in Gymnasium");
        assert!(
            (&ours - &theirs).iter().all(|x| x.abs() > 1e-4),
            "{ours} {theirs}"
        );
    }

    #[test]
    fn gymnasium_rs_refuses_nothing_and_panics() {
        let mut env = Theirs::new();
        assert!(step(&mut env, 7).is_ok(), "neither reset nor an action");
        assert_eq!(step(&mut theirs(), 7).unwrap().observation, {
            step(&mut theirs(), 0).unwrap().observation
        });
        let panics =
            |f: &dyn Fn(&mut Theirs)| catch_unwind(AssertUnwindSafe(|| f(&mut theirs()))).is_err();
        assert!(panics(&|env| drop(env.render())));
        assert!(panics(&|env| drop(env.reset(None, bounds(0.1, 0.1)))));
        let words: Options = [("low".into(), "left".into())].into();
        assert!(panics(&|env| drop(env.reset(None, words.clone()))));
        assert!(!panics(&|env| drop(env.reset(None, bounds(0.1, 0.2)))));
    }
}
