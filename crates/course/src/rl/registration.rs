//! Environments as `gymnasium.make` gives them: the physics with their time limit.
//!
//! Source: Gymnasium 1.4.0, `envs/__init__.py`.

use super::{Acrobot, CartPole, MountainCar, Pendulum, TimeLimit};

/// CartPole-v1: [`CartPole`] for up to 500 steps.
///
/// ```
/// assert_eq!(course::rl::cartpole_v1().max_episode_steps(), 500);
/// ```
#[must_use]
pub fn cartpole_v1() -> TimeLimit<CartPole> {
    TimeLimit::new(CartPole::new(), 500)
}

/// Acrobot-v1: [`Acrobot`] for up to 500 steps.
///
/// ```
/// assert_eq!(course::rl::acrobot_v1().max_episode_steps(), 500);
/// ```
#[must_use]
pub fn acrobot_v1() -> TimeLimit<Acrobot> {
    TimeLimit::new(Acrobot::new(), 500)
}

/// MountainCar-v0: [`MountainCar`] for up to 200 steps.
///
/// ```
/// assert_eq!(course::rl::mountain_car_v0().max_episode_steps(), 200);
/// ```
#[must_use]
pub fn mountain_car_v0() -> TimeLimit<MountainCar> {
    TimeLimit::new(MountainCar::new(), 200)
}

/// Pendulum-v1: [`Pendulum`] for up to 200 steps.
///
/// ```
/// assert_eq!(course::rl::pendulum_v1().max_episode_steps(), 200);
/// ```
#[must_use]
pub fn pendulum_v1() -> TimeLimit<Pendulum> {
    TimeLimit::new(Pendulum::new(), 200)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rl;

    /// (The 500 steps that `tests/gymnasium.rs` replays drift apart where a machine rounds a sine
    /// otherwise; a policy that looks does not mind.)
    #[test]
    fn a_pole_that_is_held_up_is_let_go_at_step_500() {
        let mut env = cartpole_v1();
        for seed in 0..5 {
            let mut seen = rl::reset(&mut env, Some(seed), rl::Options::new()).unwrap();
            for i in 1..=500 {
                let up = seen[2] + 0.2 * seen[3] + 0.1 * seen[1] > 0.0;
                let step = rl::step(&mut env, i32::from(up)).unwrap();
                assert_eq!((step.terminated, step.truncated), (false, i == 500));
                seen = step.observation;
            }
        }
    }
}
