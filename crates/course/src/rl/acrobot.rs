//! Two links that hang from a joint and must swing up.

use std::f64::consts::{FRAC_PI_2, PI, TAU};

use gymnasium_rs::core::{Env, Info, Options, Space};
use ndarray::Array3;
use plotters::style::RGBColor;

use super::draw::{self, Shape};
use super::env::{self, Observation};
use super::seeding::NumpyRandom;

/// Gravity, in m/s²: fixed in Gymnasium.
const GRAVITY: f64 = 9.8;

/// The physics of an [`Acrobot`], under Gymnasium's names in small letters; the default is that of
/// Acrobot-v1.
///
/// ```
/// use course::rl::{Acrobot, AcrobotConfig};
/// let heavy = Acrobot::with(AcrobotConfig { link_mass_2: 2.0, ..Default::default() });
/// assert_eq!(heavy.config().link_mass_1, 1.0);
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct AcrobotConfig {
    /// Time between two states, in s.
    pub dt: f64,
    /// Length of the upper link, in m. The height to reach does not depend on it.
    pub link_length_1: f64,
    /// Length of the lower link, in m: for the picture only, no equation has it.
    pub link_length_2: f64,
    /// Mass of the upper link, in kg.
    pub link_mass_1: f64,
    /// Mass of the lower link, in kg.
    pub link_mass_2: f64,
    /// From the upper joint to the upper link's centre of mass, in m.
    pub link_com_pos_1: f64,
    /// From the lower joint to the lower link's centre of mass, in m.
    pub link_com_pos_2: f64,
    /// The moment of inertia of either link, in kg m².
    pub link_moi: f64,
    /// The fastest the upper link turns, in rad/s.
    pub max_vel_1: f64,
    /// The fastest the lower link turns against the upper one, in rad/s.
    pub max_vel_2: f64,
    /// The torques of the three actions, in N m.
    pub avail_torque: [f64; 3],
}

impl Default for AcrobotConfig {
    fn default() -> Self {
        Self {
            dt: 0.2,
            link_length_1: 1.0,
            link_length_2: 1.0,
            link_mass_1: 1.0,
            link_mass_2: 1.0,
            link_com_pos_1: 0.5,
            link_com_pos_2: 0.5,
            link_moi: 1.0,
            max_vel_1: 4.0 * PI,
            max_vel_2: 9.0 * PI,
            avail_torque: [-1.0, 0.0, 1.0],
        }
    }
}

/// Acrobot: turn the joint between two links to the left (0), not at all (1) or to the right (2)
/// so that the free end swings one link's length above the joint from which they hang.
///
/// The state is θ₁ in rad (0 hangs down), θ₂ in rad against the upper link (0 is stretched), θ̇₁
/// and θ̇₂; it starts evenly within ±0.1 in single precision, or within the options `low` and
/// `high`. What an agent sees is cos θ₁, sin θ₁, cos θ₂, sin θ₂, θ̇₁, θ̇₂.
///
/// With masses m, length l of the upper link, distances c of the centres of mass, inertia I,
/// g = 9.8 and the torque τ of −1, 0 or 1 N m,
///
/// d₁ = m₁c₁² + m₂(l² + c₂² + 2 l c₂ cos θ₂) + 2I, d₂ = m₂(c₂² + l c₂ cos θ₂) + I,
/// φ₂ = m₂ c₂ g cos(θ₁ + θ₂ − π/2),
/// φ₁ = −m₂ l c₂ θ̇₂² sin θ₂ − 2 m₂ l c₂ θ̇₂θ̇₁ sin θ₂ + (m₁c₁ + m₂l) g cos(θ₁ − π/2) + φ₂,
/// θ̈₂ = (τ + φ₁ d₂/d₁ − m₂ l c₂ θ̇₁² sin θ₂ − φ₂) / (m₂c₂² + I − d₂²/d₁),
/// θ̈₁ = −(d₂ θ̈₂ + φ₁) / d₁,
///
/// and every 0.2 s one step of Runge and Kutta's fourth order. Then the angles go to ±π, and the
/// velocities stay within ±4π and ±9π. The episode terminates where −cos θ₁ − cos(θ₁ + θ₂) > 1.
/// Every step is rewarded with −1, those that are that high with 0. Acrobot-v1 is this with a time
/// limit of 500 steps; it counts as solved at a mean return of −100.
///
/// Source: Gymnasium 1.4.0, `classic_control/acrobot.py` with its default, the equations of Sutton
/// and Barto's book; Sutton 1996.
///
/// ```
/// use course::rl::{self, Acrobot};
/// let mut env = Acrobot::new();
/// let still = [("low".into(), 0.0.into()), ("high".into(), 0.0.into())];
/// let start = rl::reset(&mut env, Some(0), still.into())?;
/// assert_eq!(start.to_vec(), [1.0, 0.0, 1.0, 0.0, 0.0, 0.0]);
/// let step = rl::step(&mut env, 2)?;
/// assert!(step.observation[4] < 0.0 && step.observation[5] > 0.0, "one against the other");
/// # Ok::<(), course::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Acrobot {
    config: AcrobotConfig,
    random: NumpyRandom,
    state: Option<[f64; 4]>,
}

env::frame!(Acrobot, AcrobotConfig, "Acrobot-v1", "(θ₁, θ₂, θ̇₁, θ̇₂)", 4);

impl Acrobot {
    /// How fast the state changes under a torque.
    fn change(&self, [theta1, theta2, dtheta1, dtheta2]: [f64; 4], torque: f64) -> [f64; 4] {
        let c = &self.config;
        let (m1, m2, l1) = (c.link_mass_1, c.link_mass_2, c.link_length_1);
        let (lc1, lc2, inertia) = (c.link_com_pos_1, c.link_com_pos_2, c.link_moi);
        let (sin2, cos2) = theta2.sin_cos();
        let reach = l1 * l1 + lc2 * lc2 + 2.0 * l1 * lc2 * cos2;
        let d1 = m1 * (lc1 * lc1) + m2 * reach + inertia + inertia;
        let d2 = m2 * (lc2 * lc2 + l1 * lc2 * cos2) + inertia;
        let phi2 = m2 * lc2 * GRAVITY * (theta1 + theta2 - FRAC_PI_2).cos();
        let phi1 = -m2 * l1 * lc2 * (dtheta2 * dtheta2) * sin2
            - 2.0 * m2 * l1 * lc2 * dtheta2 * dtheta1 * sin2
            + (m1 * lc1 + m2 * l1) * GRAVITY * (theta1 - FRAC_PI_2).cos()
            + phi2;
        let turning = torque + d2 / d1 * phi1 - m2 * l1 * lc2 * (dtheta1 * dtheta1) * sin2 - phi2;
        let ddtheta2 = turning / (m2 * (lc2 * lc2) + inertia - d2 * d2 / d1);
        let ddtheta1 = -(d2 * ddtheta2 + phi1) / d1;
        [dtheta1, dtheta2, ddtheta1, ddtheta2]
    }

    /// The state after `dt` seconds of a torque.
    fn moved(&self, state: [f64; 4], torque: f64) -> [f64; 4] {
        let c = &self.config;
        let ahead = |time: f64, change: [f64; 4]| {
            self.change(std::array::from_fn(|i| state[i] + time * change[i]), torque)
        };
        let half = c.dt / 2.0;
        let k1 = self.change(state, torque);
        let k2 = ahead(half, k1);
        let k3 = ahead(half, k2);
        let k4 = ahead(c.dt, k3);
        let [theta1, theta2, dtheta1, dtheta2] = std::array::from_fn(|i| {
            state[i] + c.dt / 6.0 * (k1[i] + 2.0 * k2[i] + 2.0 * k3[i] + k4[i])
        });
        [
            wrapped(theta1),
            wrapped(theta2),
            env::within(dtheta1, -c.max_vel_1, c.max_vel_1),
            env::within(dtheta2, -c.max_vel_2, c.max_vel_2),
        ]
    }

    /// The height to reach, the links and the joints.
    fn shapes(&self, [theta1, theta2, ..]: [f64; 4]) -> [Shape; 5] {
        let (length1, length2) = (self.config.link_length_1, self.config.link_length_2);
        let scale = 500.0 / (2.0 * (length1 + length2 + 0.2));
        let (top, width) = ((250.0, 250.0), 0.1 * scale);
        let joint = draw::turned((0.0, -length1 * scale), theta1, top);
        let link = |length: f64, angle: f64, from| {
            let (along, across) = ((0.0, length * scale), (-width, width));
            draw::rectangle(
                along,
                across,
                angle - FRAC_PI_2,
                from,
                RGBColor(0, 204, 204),
            )
        };
        let disc = |at| Shape::Disc(at, width, RGBColor(204, 204, 0));
        let goal = [-2.2, 2.2].map(|x| (x * scale + 250.0, scale + 250.0));
        [
            Shape::Lines(goal.to_vec(), draw::BLACK),
            link(length1, theta1, top),
            disc(top),
            link(length2, theta1 + theta2, joint),
            disc(joint),
        ]
    }
}

/// The angle without whole turns, from −π to π.
fn wrapped(angle: f64) -> f64 {
    let turns = ((angle.abs() - PI) / TAU).ceil().max(0.0);
    angle - (turns * TAU).copysign(angle)
}

/// What an agent sees of a state.
fn seen([theta1, theta2, dtheta1, dtheta2]: [f64; 4]) -> Observation {
    env::observation([
        theta1.cos(),
        theta1.sin(),
        theta2.cos(),
        theta2.sin(),
        dtheta1,
        dtheta2,
    ])
}

impl Env<Observation, i32> for Acrobot {
    fn observation_space(&self) -> Space {
        let c = &self.config;
        let high = env::observation([1.0, 1.0, 1.0, 1.0, c.max_vel_1, c.max_vel_2]);
        Space::Box {
            low: -high.clone(),
            high,
        }
    }

    fn action_space(&self) -> Space {
        Space::Discrete(3)
    }

    fn reset(&mut self, seed: Option<i32>, options: Options) -> (Observation, Info) {
        match env::begin("Acrobot", &mut self.random, seed, &options, (-0.1, 0.1)) {
            Err(problem) => (env::nothing(6), env::refusal(problem)),
            Ok((low, high)) => {
                let state =
                    std::array::from_fn(|_| f64::from(self.random.uniform(low, high) as f32));
                self.state = Some(state);
                (seen(state), Info::new())
            }
        }
    }

    fn step(&mut self, action: i32) -> (Observation, f32, bool, bool, Info) {
        let state = match env::ready("Acrobot", self.state, action, 3) {
            Err(problem) => return env::refused_step(6, problem),
            Ok(state) => state,
        };
        let state = self.moved(state, self.config.avail_torque[action as usize]);
        self.state = Some(state);
        let [theta1, theta2, ..] = state;
        let terminated = -theta1.cos() - (theta2 + theta1).cos() > 1.0;
        let reward = if terminated { 0.0 } else { -1.0 };
        (seen(state), reward, terminated, false, Info::new())
    }

    fn render(&self) -> Option<Array3<u8>> {
        draw::picture(500, 500, &self.shapes(self.state?))
    }

    fn close(&mut self) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rl;

    fn from(state: [f64; 4]) -> Acrobot {
        Acrobot {
            state: Some(state),
            ..Acrobot::new()
        }
    }

    #[test]
    fn a_step() {
        let mut env = from([0.05, -0.05, 0.02, -0.02]);
        rl::step(&mut env, 2).unwrap();
        let expected = [0.033_562_91, -0.009_712_58, -0.179_527_53, 0.412_921_10];
        for (x, expected) in env.state().unwrap().into_iter().zip(expected) {
            assert!((x - expected).abs() < 6e-9, "{x} instead of {expected}");
        }
    }

    /// The start that Gymnasium's docstring prints.
    #[test]
    fn other_bounds_of_the_start() {
        let options = [("low".into(), (-0.2).into()), ("high".into(), 0.2.into())];
        let start = rl::reset(&mut Acrobot::new(), Some(123), options.into()).unwrap();
        let printed = [
            0.997_341,
            0.072_876_08,
            0.984_116_2,
            -0.177_525_65,
            -0.111_856_05,
            -0.126_251_28,
        ];
        for (x, expected) in start.iter().zip(printed) {
            assert!((x - expected).abs() < 1e-7, "{start}");
        }
    }

    #[test]
    fn angles_lose_whole_turns() {
        for (angle, expected) in [
            (0.5, 0.5),
            (-3.0, -3.0),
            (PI, PI),
            (-PI, -PI),
            (4.0, 4.0 - TAU),
            (-4.0, TAU - 4.0),
            (10.0, 10.0 - 2.0 * TAU),
            (-10.0, 2.0 * TAU - 10.0),
            (PI.next_up(), PI.next_up() - TAU),
        ] {
            assert_eq!(wrapped(angle), expected, "{angle}");
        }
        assert!(wrapped(1e300).is_finite() && wrapped(f64::INFINITY).is_nan());
    }

    /// Both angles go beyond ±π; the state is what Gymnasium gives.
    #[test]
    fn both_links_go_round() {
        let mut env = from([3.0, -3.0, 3.0, -6.0]);
        rl::step(&mut env, 1).unwrap();
        let expected = [
            -2.665_859_413_5,
            2.069_059_380_2,
            3.372_835_895_1,
            -6.373_034_722_6,
        ];
        for (x, expected) in env.state().unwrap().into_iter().zip(expected) {
            assert!((x - expected).abs() < 1e-9, "{x} instead of {expected}");
        }
    }

    #[test]
    fn the_goal_is_above_one() {
        // Stretched, the free end is at height −2 cos θ₁; no time passes.
        let ends = |theta1: f64| {
            let config = AcrobotConfig {
                dt: 0.0,
                ..AcrobotConfig::default()
            };
            let mut env = Acrobot {
                config,
                ..from([theta1, 0.0, 0.0, 0.0])
            };
            let step = rl::step(&mut env, 1).unwrap();
            assert_eq!(step.reward, if step.terminated { 0.0 } else { -1.0 });
            step.terminated
        };
        let third = 2.0 * PI / 3.0;
        assert!(ends(third + 1e-9) && !ends(third - 1e-9));
        assert!(ends(-third - 1e-9) && !ends(1e-9 - third));
        assert!(ends(PI));
    }

    #[test]
    fn refusals() {
        let mut env = Acrobot::new();
        assert!(env.render().is_none());
        assert!(rl::step(&mut env, 0).is_err());
        rl::reset(&mut env, Some(1), Options::new()).unwrap();
        let state = env.state();
        let problem = rl::step(&mut env, 3).unwrap_err().to_string();
        assert!(
            problem.contains("Acrobot: there is no action 3"),
            "{problem}"
        );
        assert!(rl::reset(&mut env, Some(-1), Options::new()).is_err());
        assert_eq!(env.state(), state);
    }
}
