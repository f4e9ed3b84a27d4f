//! A pendulum whose motor is too weak to lift it at once.

use std::f64::consts::{FRAC_PI_2, PI, TAU};

use gymnasium_rs::core::{Env, Info, Options, Space};
use ndarray::{Array3, array};
use plotters::style::RGBColor;

use super::draw::{self, Shape};
use super::env::{self, Observation};
use super::seeding::NumpyRandom;

/// The physics of a [`Pendulum`], under Gymnasium's names; the default is that of Pendulum-v1.
///
/// ```
/// use course::rl::{Pendulum, PendulumConfig};
/// let heavy = Pendulum::with(PendulumConfig { m: 2.0, ..Default::default() });
/// assert_eq!(heavy.config().g, 10.0);
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct PendulumConfig {
    /// Gravity, in m/s².
    pub g: f64,
    /// The rod's mass, in kg.
    pub m: f64,
    /// The rod's length, in m.
    pub l: f64,
    /// Time between two states, in s.
    pub dt: f64,
    /// The fastest the rod turns, in rad/s.
    pub max_speed: f64,
    /// The largest torque, in N m.
    pub max_torque: f64,
}

impl Default for PendulumConfig {
    fn default() -> Self {
        Self {
            g: 10.0,
            m: 1.0,
            l: 1.0,
            dt: 0.05,
            max_speed: 8.0,
            max_torque: 2.0,
        }
    }
}

/// Pendulum: turn a rod with a torque so that it swings up and stays there. The action is one
/// number, the torque u in N m to the left; beyond ±2 it counts as ±2.
///
/// The state is θ in rad (0 is upright) and θ̇; it starts evenly within ±π and ±1, or within ± the
/// options `x_init` and `y_init`. What an agent sees is cos θ, sin θ, θ̇. In a step of dt = 0.05 s
///
/// θ̇ ← θ̇ + (3g / (2l) sin θ + 3u / (m l²)) dt, kept within ±8, and then θ ← θ + θ̇ dt,
///
/// with g = 10 and m = l = 1: the new velocity moves the angle. The reward is that of the state
/// before the step, −(θ² + 0.1 θ̇² + 0.001 u²), θ without whole turns. The episode never
/// terminates. Pendulum-v1 is this with a time limit of 200 steps.
///
/// Source: Gymnasium 1.4.0, `classic_control/pendulum.py`.
///
/// ```
/// use course::rl::{self, Observation, Pendulum};
/// let mut env = Pendulum::new();
/// let upright = [("x_init".into(), 0.0.into()), ("y_init".into(), 0.0.into())];
/// let start = rl::reset(&mut env, Some(0), upright.into())?;
/// assert_eq!(start.to_vec(), [1.0, 0.0, 0.0]);
/// let step = rl::step(&mut env, Observation::from(vec![5.0]))?;
/// assert!((step.observation[2] - 3.0 * 2.0 * 0.05).abs() < 1e-6, "clipped to 2");
/// assert!((step.reward + 0.001 * 2.0 * 2.0).abs() < 1e-6);
/// # Ok::<(), course::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Pendulum {
    config: PendulumConfig,
    random: NumpyRandom,
    state: Option<[f64; 2]>,
    /// The last torque, for the picture.
    last_u: Option<f64>,
}

env::frame!(Pendulum, PendulumConfig, "Pendulum-v1", "(θ, θ̇), θ with its whole turns,", 2, last_u: None);

impl Pendulum {
    /// The state before a step and the torque, if the action is one.
    fn ready(&self, action: &Observation) -> Result<([f64; 2], f32), String> {
        let state = env::begun("Pendulum", self.state)?;
        match action.as_slice() {
            Some([u]) if !u.is_nan() => Ok((state, *u)),
            Some([_]) => Err("Pendulum: the torque is NaN: give a number".into()),
            _ => Err(format!(
                "Pendulum: an action of {} numbers: give one, the torque",
                action.len()
            )),
        }
    }

    /// The state after `dt` seconds of a torque, which is within its bounds.
    fn moved(&self, [theta, speed]: [f64; 2], u: f32) -> [f64; 2] {
        let c = &self.config;
        // NumPy multiplies a torque in single precision.
        let torque = f64::from((3.0 / (c.m * (c.l * c.l))) as f32 * u);
        let speed = speed + (3.0 * c.g / (2.0 * c.l) * theta.sin() + torque) * c.dt;
        let speed = env::within(speed, -c.max_speed, c.max_speed);
        [theta + speed * c.dt, speed]
    }

    /// The rod with its round ends, an arrow for the torque, and the axle.
    fn shapes(&self, [theta, _]: [f64; 2]) -> Vec<Shape> {
        let scale = 500.0 / 4.4;
        let (axle, width) = ((250.0, 250.0), 0.2 * scale);
        let (angle, red) = (theta + FRAC_PI_2, RGBColor(204, 77, 77));
        let sides = (-width / 2.0, width / 2.0);
        let mut shapes = vec![
            draw::rectangle((0.0, scale), sides, angle, axle, red),
            Shape::Disc(axle, width / 2.0, red),
            Shape::Disc(draw::turned((scale, 0.0), angle, axle), width / 2.0, red),
        ];
        if let Some(u) = self.last_u {
            shapes.extend(arrow(axle, scale * u.abs() / 2.0, u > 0.0));
        }
        shapes.push(Shape::Disc(axle, 0.05 * scale, draw::BLACK));
        shapes
    }
}

/// Three quarters of a circle with a tip, in a square of this size: clockwise, or `left`.
fn arrow(centre: draw::Point, size: f64, left: bool) -> Vec<Shape> {
    let place = |(x, y): draw::Point| {
        let x = if left { -x } else { x };
        (centre.0 + x * size, centre.1 + y * size)
    };
    let area = |corners: &[draw::Point]| {
        Shape::Polygon(corners.iter().map(|c| place(*c)).collect(), draw::BLACK)
    };
    // In parts of the size: the line's width without its outline, and the circle's centre and radii.
    let half = (0.031 - 1.0 / size).max(0.0) / 2.0;
    let (x, radii) = (0.027, (0.459, 0.484));
    let point = |part: f64, out: f64| {
        let (sin, cos) = (FRAC_PI_2 - part * 1.5 * PI).sin_cos();
        (x + (radii.0 + out) * cos, (radii.1 + out) * sin)
    };
    let parts = 24.0;
    let ring = (0..24).map(f64::from).map(|i| {
        let (from, to) = (i / parts, (i + 1.0) / parts);
        area(&[
            point(from, -half),
            point(from, half),
            point(to, half),
            point(to, -half),
        ])
    });
    let (tip, notch) = ((-0.434, 0.147), (-0.434, -0.005));
    let barbs = [(-0.5, -0.045), (-0.364, -0.045)];
    ring.chain(barbs.map(|barb| area(&[tip, barb, notch])))
        .collect()
}

/// The angle without whole turns, from −π up to π.
fn angle_normalize(x: f64) -> f64 {
    (x + PI).rem_euclid(TAU) - PI
}

/// What an agent sees of a state.
fn seen([theta, speed]: [f64; 2]) -> Observation {
    env::observation([theta.cos(), theta.sin(), speed])
}

impl Env<Observation, Observation> for Pendulum {
    fn observation_space(&self) -> Space {
        let high = env::observation([1.0, 1.0, self.config.max_speed]);
        Space::Box {
            low: -high.clone(),
            high,
        }
    }

    fn action_space(&self) -> Space {
        let max_torque = self.config.max_torque as f32;
        Space::Box {
            low: array![-max_torque],
            high: array![max_torque],
        }
    }

    fn reset(&mut self, seed: Option<i32>, options: Options) -> (Observation, Info) {
        let bound = |key: &str, default: f64| {
            let bound = env::option("Pendulum", &options, key, default)?;
            if bound < 0.0 {
                return Err(format!(
                    "Pendulum: the option {key:?} = {bound} is negative: give one from 0 on"
                ));
            }
            Ok(bound)
        };
        let bounds = bound("x_init", PI).and_then(|x| Ok((x, bound("y_init", 1.0)?)));
        let begun = bounds.and_then(|bounds| {
            env::reseed("Pendulum", &mut self.random, seed)?;
            Ok(bounds)
        });
        match begun {
            Err(problem) => (env::nothing(3), env::refusal(problem)),
            Ok((x, y)) => {
                let state = [self.random.uniform(-x, x), self.random.uniform(-y, y)];
                (self.state, self.last_u) = (Some(state), None);
                (seen(state), Info::new())
            }
        }
    }

    fn step(&mut self, action: Observation) -> (Observation, f32, bool, bool, Info) {
        let (state, u) = match self.ready(&action) {
            Err(problem) => return env::refused_step(3, problem),
            Ok(ready) => ready,
        };
        let max_torque = self.config.max_torque;
        let u = env::within(f64::from(u), -max_torque, max_torque) as f32;
        let [theta, speed] = state;
        let angle = angle_normalize(theta);
        let cost = angle * angle + 0.1 * (speed * speed) + f64::from(0.001 * (u * u));
        let state = self.moved(state, u);
        (self.state, self.last_u) = (Some(state), Some(f64::from(u)));
        (seen(state), -cost as f32, false, false, Info::new())
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

    fn from(state: [f64; 2]) -> Pendulum {
        Pendulum {
            state: Some(state),
            ..Pendulum::new()
        }
    }

    #[test]
    fn a_step() {
        let mut env = from([FRAC_PI_2, 0.5]);
        let step = rl::step(&mut env, array![0.0]).unwrap();
        assert!((step.reward + 2.492_401_1).abs() < 1e-6, "{step:?}");
        assert!(!step.done());
        let [theta, speed] = env.state().unwrap();
        assert!((theta - 1.633_296_33).abs() < 5e-9 && speed == 1.25);
    }

    /// The start that Gymnasium's docstring prints.
    #[test]
    fn other_bounds_of_the_start() {
        let options = [
            ("x_init".into(), FRAC_PI_2.into()),
            ("y_init".into(), 0.5.into()),
        ];
        let start = rl::reset(&mut Pendulum::new(), Some(123), options.into()).unwrap();
        let printed = [0.840_345_9, 0.542_050_54, -0.446_178_97];
        assert_eq!(start.to_vec(), printed);
    }

    #[test]
    fn the_cost_counts_no_whole_turns() {
        for (theta, angle) in [
            (3.0, 3.0),
            (4.0, 4.0 - TAU),
            (-4.0, TAU - 4.0),
            (13.0, 13.0 - 2.0 * TAU),
        ] {
            let reward = rl::step(&mut from([theta, 0.0]), array![0.0])
                .unwrap()
                .reward;
            assert!((f64::from(reward) + angle * angle).abs() < 1e-6, "{theta}");
        }
    }

    #[test]
    fn torque_and_speed_have_limits() {
        let after = |state, u| {
            let mut env = from(state);
            let reward = rl::step(&mut env, array![u]).unwrap().reward;
            (env.state(), reward)
        };
        assert_eq!(after([0.1, 0.0], 2.0), after([0.1, 0.0], f32::INFINITY));
        assert_eq!(after([0.1, 0.0], -2.0), after([0.1, 0.0], -2.1));
        assert_ne!(after([0.1, 0.0], 2.0), after([0.1, 0.0], 1.9));
        assert_eq!(after([FRAC_PI_2, 7.9], 0.0).0.unwrap()[1], 8.0);
        assert_eq!(after([-FRAC_PI_2, -7.9], 0.0).0.unwrap()[1], -8.0);
    }

    #[test]
    fn the_picture_has_an_arrow_after_a_step_only() {
        let mut env = Pendulum::new();
        let start = |env: &mut Pendulum| {
            rl::reset(env, Some(3), Options::new()).unwrap();
            env.render().unwrap()
        };
        let without = start(&mut env);
        rl::step(&mut env, array![1.0]).unwrap();
        let black = |picture: &Array3<u8>| picture.iter().filter(|byte| **byte == 0).count();
        assert!(black(&env.render().unwrap()) > black(&without) + 300);
        assert_eq!(start(&mut env), without);
    }

    #[test]
    fn refusals() {
        let mut env = Pendulum::new();
        assert!(env.render().is_none());
        assert!(rl::step(&mut env, array![0.0]).is_err());
        rl::reset(&mut env, Some(1), Options::new()).unwrap();
        let state = env.state();
        let mut refused = |action| rl::step(&mut env, action).unwrap_err().to_string();
        assert!(refused(array![f32::NAN]).contains("the torque is NaN"));
        assert!(refused(array![]).contains("an action of 0 numbers: give one"));
        assert!(refused(array![0.0, 0.0]).contains("an action of 2 numbers"));
        let mut refused = |seed, key: &str, value: serde_json::Value| {
            let problem = rl::reset(&mut env, Some(seed), [(key.into(), value)].into());
            problem.unwrap_err().to_string()
        };
        assert!(refused(2, "x_init", (-1.0).into()).contains("negative"));
        assert!(refused(2, "y_init", "fast".into()).contains("must be a number"));
        assert!(refused(-2, "y_init", 1.0.into()).contains("seed -2 is negative"));
        assert_eq!(env.state(), state);
    }
}
