//! A pole on a cart that is pushed left or right.

use gymnasium_rs::core::{Env, Info, Options, Space};
use ndarray::{Array3, array};
use plotters::style::RGBColor;

use super::draw::{self, Shape};
use super::env::{self, Observation};
use super::seeding::NumpyRandom;

/// Where the cart leaves the track, in m.
const X_THRESHOLD: f64 = 2.4;
/// Where the pole counts as fallen, in rad: 12°.
const THETA_THRESHOLD: f64 = 12.0 * 2.0 * std::f64::consts::PI / 360.0;

/// The physics of a [`CartPole`], under Gymnasium's names; the default is that of CartPole-v1.
///
/// ```
/// use course::rl::{CartPole, CartPoleConfig};
/// let long = CartPole::with(CartPoleConfig { length: 2.0, ..Default::default() });
/// assert_eq!(long.config().gravity, 9.8);
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct CartPoleConfig {
    /// Gravity, in m/s².
    pub gravity: f64,
    /// The cart's mass, in kg.
    pub masscart: f64,
    /// The pole's mass, in kg.
    pub masspole: f64,
    /// Half of the pole's length, in m.
    pub length: f64,
    /// The force of a push, in N.
    pub force_mag: f64,
    /// Time between two states, in s.
    pub tau: f64,
    /// Rewards 0 for a step and −1 for the fall, as in Sutton and Barto's book, instead of 1 for
    /// every step.
    pub sutton_barto_reward: bool,
}

impl Default for CartPoleConfig {
    fn default() -> Self {
        Self {
            gravity: 9.8,
            masscart: 1.0,
            masspole: 0.1,
            length: 0.5,
            force_mag: 10.0,
            tau: 0.02,
            sutton_barto_reward: false,
        }
    }
}

/// CartPole: push a cart to the left (0) or right (1) so that the pole on it stays up.
///
/// The state is x in m, ẋ, θ in rad (0 is upright) and θ̇; it starts evenly within ±0.05, or
/// within the options `low` and `high`. With M the total mass, m the pole's, l half its length
/// and the force F,
///
/// t = (F + m l θ̇² sin θ) / M, θ̈ = (g sin θ − t cos θ) / (l (4/3 − m cos² θ / M)),
/// ẍ = t − m l θ̈ cos θ / M,
///
/// and every 0.02 s an explicit Euler step: the old velocities move the positions. The episode
/// terminates where |x| > 2.4 or |θ| > 12°. Each step is rewarded with 1, the one with the fall
/// too. If you go on after the end, a step is worth 0 while the pole or the cart is still beyond
/// its limit, and 1 again should both come back: reset instead. CartPole-v1 is this with a time limit of 500 steps; it
/// counts as solved at a mean return of 475.
///
/// Source: Gymnasium 1.4.0, `classic_control/cartpole.py`; Barto, Sutton and Anderson 1983.
///
/// ```
/// use course::rl::{self, CartPole};
/// let mut env = CartPole::new();
/// rl::reset(&mut env, Some(123), [("low".into(), 0.0.into()), ("high".into(), 0.0.into())].into())?;
/// let step = rl::step(&mut env, 1)?;
/// assert_eq!(step.observation.to_vec(), [0.0, 0.195_121_95, 0.0, -0.292_682_92]);
/// # Ok::<(), course::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct CartPole {
    config: CartPoleConfig,
    random: NumpyRandom,
    state: Option<[f64; 4]>,
    fallen: bool,
}

env::frame!(CartPole, CartPoleConfig, "CartPole-v1", "(x, ẋ, θ, θ̇)", 4, fallen: false);

impl CartPole {
    /// The state after `tau` seconds of a force.
    fn moved(&self, [x, x_dot, theta, theta_dot]: [f64; 4], force: f64) -> [f64; 4] {
        let c = &self.config;
        let (sin, cos) = theta.sin_cos();
        let total_mass = c.masspole + c.masscart;
        let polemass_length = c.masspole * c.length;
        let temp = (force + polemass_length * (theta_dot * theta_dot) * sin) / total_mass;
        let thetaacc = (c.gravity * sin - cos * temp)
            / (c.length * (4.0 / 3.0 - c.masspole * (cos * cos) / total_mass));
        let xacc = temp - polemass_length * thetaacc * cos / total_mass;
        [
            x + c.tau * x_dot,
            x_dot + c.tau * xacc,
            theta + c.tau * theta_dot,
            theta_dot + c.tau * thetaacc,
        ]
    }

    /// The cart, the pole, its axle and the track, which is as wide as the picture.
    fn shapes(&self, [x, _, theta, _]: [f64; 4]) -> [Shape; 4] {
        let scale = 600.0 / (2.0 * X_THRESHOLD);
        let length = 2.0 * self.config.length * scale;
        let (cart, axle) = ((300.0 + x * scale, 100.0), (300.0 + x * scale, 107.5));
        let (brown, blue) = (RGBColor(202, 152, 101), RGBColor(129, 132, 203));
        [
            draw::rectangle((-25.0, 25.0), (-15.0, 15.0), 0.0, cart, draw::BLACK),
            draw::rectangle((-5.0, 5.0), (-5.0, length - 5.0), -theta, axle, brown),
            Shape::Disc(axle, 5.0, blue),
            Shape::Lines(vec![(0.0, 100.0), (600.0, 100.0)], draw::BLACK),
        ]
    }
}

impl Env<Observation, i32> for CartPole {
    fn observation_space(&self) -> Space {
        // Twice the thresholds, so that the last observation lies inside.
        let high = array![
            (2.0 * X_THRESHOLD) as f32,
            f32::INFINITY,
            (2.0 * THETA_THRESHOLD) as f32,
            f32::INFINITY
        ];
        Space::Box {
            low: -high.clone(),
            high,
        }
    }

    fn action_space(&self) -> Space {
        Space::Discrete(2)
    }

    fn reset(&mut self, seed: Option<i32>, options: Options) -> (Observation, Info) {
        match env::begin("CartPole", &mut self.random, seed, &options, (-0.05, 0.05)) {
            Err(problem) => (env::nothing(4), env::refusal(problem)),
            Ok((low, high)) => {
                let state = std::array::from_fn(|_| self.random.uniform(low, high));
                (self.state, self.fallen) = (Some(state), false);
                (env::observation(state), Info::new())
            }
        }
    }

    fn step(&mut self, action: i32) -> (Observation, f32, bool, bool, Info) {
        let state = match env::ready("CartPole", self.state, action, 2) {
            Err(problem) => return env::refused_step(4, problem),
            Ok(state) => state,
        };
        let force = if action == 1 { 1.0 } else { -1.0 } * self.config.force_mag;
        let state = self.moved(state, force);
        self.state = Some(state);
        let [x, _, theta, _] = state;
        let terminated = x.abs() > X_THRESHOLD || theta.abs() > THETA_THRESHOLD;
        let reward = match (self.config.sutton_barto_reward, terminated) {
            (true, true) => -1.0,
            (true, false) => 0.0,
            (false, true) if self.fallen => 0.0,
            (false, _) => 1.0,
        };
        self.fallen |= terminated;
        (
            env::observation(state),
            reward,
            terminated,
            false,
            Info::new(),
        )
    }

    fn render(&self) -> Option<Array3<u8>> {
        draw::picture(600, 400, &self.shapes(self.state?))
    }

    fn close(&mut self) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rl;

    fn from(state: [f64; 4]) -> CartPole {
        CartPole {
            state: Some(state),
            ..CartPole::new()
        }
    }

    #[test]
    fn falls_at_step_9_when_pushed_to_the_right_only() {
        let mut env = from([0.0; 4]);
        let steps: Vec<_> = (0..9).map(|_| rl::step(&mut env, 1).unwrap()).collect();
        let ends: Vec<_> = steps.iter().map(|step| step.terminated).collect();
        assert_eq!(ends, [[false; 8].as_slice(), &[true]].concat());
        assert!(steps.iter().all(|step| step.reward == 1.0));
        assert_eq!(rl::step(&mut env, 1).unwrap().reward, 0.0);
    }

    /// The steps that Gymnasium's issue 790 prints.
    #[test]
    fn what_an_issue_prints() {
        let mut env = from([-0.049_245_37, 0.018_544_42, -0.025_989_1, 0.001_655_13]);
        let printed = [
            (1, [-0.048_874_48, 0.214_029_27, -0.025_956, -0.299_113_07]),
            (1, [-0.044_593_9, 0.409_511_4, -0.031_938_26, -0.599_867_7]),
            (
                0,
                [-0.036_403_67, 0.214_850_5, -0.043_935_62, -0.317_413_48],
            ),
            (
                0,
                [-0.032_106_66, 0.020_380_97, -0.050_283_89, -0.038_903_62],
            ),
            (0, [-0.031_699_04, -0.173_985_2, -0.051_061_96, 0.237_499_9]),
            (0, [-0.035_178_74, -0.368_341_9, -0.046_311_96, 0.513_649_2]),
            (
                1,
                [-0.042_545_58, -0.172_599_32, -0.036_038_98, 0.206_739_35],
            ),
        ];
        for (action, expected) in printed {
            let step = rl::step(&mut env, action).unwrap();
            for (x, expected) in step.observation.iter().zip(expected) {
                assert!((x - expected).abs() < 1e-7, "{step:?}");
            }
        }
    }

    /// The start that Gymnasium's docstring prints.
    #[test]
    fn other_bounds_of_the_start() {
        let options = [("low".into(), (-0.1).into()), ("high".into(), 0.1.into())];
        let start = rl::reset(&mut CartPole::new(), Some(123), options.into()).unwrap();
        let printed = [0.036_470_37, -0.089_235_8, -0.055_928_03, -0.063_125_64];
        for (x, printed) in start.iter().zip(printed) {
            assert!((x - printed).abs() < 6e-9, "{start}");
        }
    }

    #[test]
    fn the_limits_themselves_are_no_end() {
        for (state, ends) in [
            ([X_THRESHOLD, 0.0, 0.0, 0.0], false),
            ([X_THRESHOLD.next_up(), 0.0, 0.0, 0.0], true),
            ([-X_THRESHOLD, 0.0, 0.0, 0.0], false),
            ([0.0, 0.0, THETA_THRESHOLD, 0.0], false),
            ([0.0, 0.0, -THETA_THRESHOLD, 0.0], false),
            ([0.0, 0.0, (-THETA_THRESHOLD).next_down(), 0.0], true),
        ] {
            assert_eq!(rl::step(&mut from(state), 0).unwrap().terminated, ends);
        }
    }

    #[test]
    fn a_refusal_changes_nothing() {
        let mut env = CartPole::new();
        assert!(env.render().is_none());
        rl::reset(&mut env, Some(4), Options::new()).unwrap();
        let state = env.state();
        let refused = |env: &mut CartPole, key: &str, value: serde_json::Value| {
            let problem = rl::reset(env, Some(5), [(key.into(), value)].into()).unwrap_err();
            problem.to_string()
        };
        assert!(refused(&mut env, "low", 0.1.into()).contains("lies above"));
        assert!(refused(&mut env, "high", "wide".into()).contains("must be a number"));
        let problem = rl::step(&mut env, -1).unwrap_err().to_string();
        assert_eq!(
            problem,
            "environment: CartPole: there is no action -1: give one from 0 to 1"
        );
        assert!(rl::reset(&mut env, Some(-5), Options::new()).is_err());
        assert_eq!(env.state(), state);
        let goes_on = rl::reset(&mut env, None, Options::new()).unwrap();
        rl::reset(&mut env, Some(4), Options::new()).unwrap();
        assert_eq!(rl::reset(&mut env, None, Options::new()).unwrap(), goes_on);
    }
}
