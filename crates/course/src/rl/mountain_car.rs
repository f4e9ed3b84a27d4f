//! A car in a valley that is too weak to drive straight up.

use gymnasium_rs::core::{Env, Info, Options, Space};
use ndarray::Array3;
use plotters::style::RGBColor;

use super::draw::{self, Shape};
use super::env::{self, Observation};
use super::seeding::NumpyRandom;

/// The physics of a [`MountainCar`], under Gymnasium's names; the default is that of
/// MountainCar-v0. Lengths and times have no unit, a step lasts 1.
///
/// ```
/// use course::rl::{MountainCar, MountainCarConfig};
/// let fast = MountainCar::with(MountainCarConfig { goal_velocity: 0.02, ..Default::default() });
/// assert_eq!(fast.config().goal_position, 0.5);
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct MountainCarConfig {
    /// Where the wall on the left is.
    pub min_position: f64,
    /// Beyond this the car does not get on the right.
    pub max_position: f64,
    /// The fastest the car gets, in either direction.
    pub max_speed: f64,
    /// Where the flag is.
    pub goal_position: f64,
    /// How fast the car must be at the flag.
    pub goal_velocity: f64,
    /// What the engine adds to the velocity in a step.
    pub force: f64,
    /// What the slope takes from it, at most.
    pub gravity: f64,
}

impl Default for MountainCarConfig {
    fn default() -> Self {
        Self {
            min_position: -1.2,
            max_position: 0.6,
            max_speed: 0.07,
            goal_position: 0.5,
            goal_velocity: 0.0,
            force: 0.001,
            gravity: 0.0025,
        }
    }
}

/// MountainCar: accelerate a car to the left (0), not at all (1) or to the right (2) so that it
/// reaches the flag on the hill, for which it has to swing.
///
/// The state is the position p and the velocity v. It starts at rest with p evenly from −0.6 to
/// −0.4, or within the options `low` and `high`. In a step
///
/// v ← v + 0.001 (action − 1) − 0.0025 cos 3p, kept within ±0.07, and then p ← p + v, kept from
/// −1.2 to 0.6;
///
/// at the wall on the left, and only there, a car that moves left stops. The episode terminates
/// where p ≥ 0.5 and v ≥ the goal velocity, which is 0. Every step is rewarded with −1, those
/// after the end too. MountainCar-v0 is this with a time limit of 200 steps; it counts as solved
/// at a mean return of −110.
///
/// Source: Gymnasium 1.4.0, `classic_control/mountain_car.py`; Moore 1990.
///
/// ```
/// use course::rl::{self, MountainCar};
/// let mut env = MountainCar::new();
/// let at = [("low".into(), (-0.5).into()), ("high".into(), (-0.5).into())];
/// rl::reset(&mut env, Some(0), at.into())?;
/// let step = rl::step(&mut env, 2)?;
/// assert_eq!(step.observation.to_vec(), [-0.499_176_84, 0.000_823_157]);
/// assert_eq!(step.reward, -1.0);
/// # Ok::<(), course::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct MountainCar {
    config: MountainCarConfig,
    random: NumpyRandom,
    state: Option<[f64; 2]>,
}

env::frame!(
    MountainCar,
    MountainCarConfig,
    "MountainCar-v0",
    "(position, velocity)",
    2
);

impl MountainCar {
    /// The state a step later.
    fn moved(&self, [position, velocity]: [f64; 2], action: i32) -> [f64; 2] {
        let c = &self.config;
        let push = f64::from(action - 1) * c.force - c.gravity * (3.0 * position).cos();
        let velocity = env::within(velocity + push, -c.max_speed, c.max_speed);
        let position = env::within(position + velocity, c.min_position, c.max_position);
        let at_wall = position == c.min_position && velocity < 0.0;
        [position, if at_wall { 0.0 } else { velocity }]
    }

    /// The hills, the car on its wheels, and the flag.
    fn shapes(&self, [position, _]: [f64; 2]) -> Vec<Shape> {
        let c = &self.config;
        let scale = 600.0 / (c.max_position - c.min_position);
        // A point of the hills in pixels.
        let hill = |x: f64| {
            let height = (3.0 * x).sin() * 0.45 + 0.55;
            ((x - c.min_position) * scale, height * scale)
        };
        let hills = (0..100).map(|i| {
            hill(c.min_position + (c.max_position - c.min_position) * f64::from(i) / 99.0)
        });
        let (x, y) = hill(position);
        let (car, slope) = ((x, y + 10.0), (3.0 * position).cos());
        let (grey, yellow) = (RGBColor(128, 128, 128), RGBColor(204, 204, 0));
        let (x, y) = hill(c.goal_position);
        let (x, y) = (x.trunc(), y.trunc() + 50.0);
        let flag = vec![(x, y), (x, y - 10.0), (x + 25.0, y - 5.0)];
        vec![
            Shape::Lines(hills.collect(), draw::BLACK),
            draw::rectangle((-20.0, 20.0), (0.0, 20.0), slope, car, draw::BLACK),
            Shape::Disc(draw::turned((10.0, 0.0), slope, car), 8.0, grey),
            Shape::Disc(draw::turned((-10.0, 0.0), slope, car), 8.0, grey),
            Shape::Lines(vec![(x, y - 50.0), (x, y)], draw::BLACK),
            Shape::Polygon(flag, yellow),
        ]
    }
}

impl Env<Observation, i32> for MountainCar {
    fn observation_space(&self) -> Space {
        let c = &self.config;
        Space::Box {
            low: env::observation([c.min_position, -c.max_speed]),
            high: env::observation([c.max_position, c.max_speed]),
        }
    }

    fn action_space(&self) -> Space {
        Space::Discrete(3)
    }

    fn reset(&mut self, seed: Option<i32>, options: Options) -> (Observation, Info) {
        let default = (-0.6, -0.4);
        match env::begin("MountainCar", &mut self.random, seed, &options, default) {
            Err(problem) => (env::nothing(2), env::refusal(problem)),
            Ok((low, high)) => {
                let state = [self.random.uniform(low, high), 0.0];
                self.state = Some(state);
                (env::observation(state), Info::new())
            }
        }
    }

    fn step(&mut self, action: i32) -> (Observation, f32, bool, bool, Info) {
        let state = match env::ready("MountainCar", self.state, action, 3) {
            Err(problem) => return env::refused_step(2, problem),
            Ok(state) => state,
        };
        let state = self.moved(state, action);
        self.state = Some(state);
        let [position, velocity] = state;
        let terminated =
            position >= self.config.goal_position && velocity >= self.config.goal_velocity;
        (
            env::observation(state),
            -1.0,
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

    fn from(config: MountainCarConfig, state: [f64; 2]) -> MountainCar {
        MountainCar {
            state: Some(state),
            ..MountainCar::with(config)
        }
    }

    /// One step by hand: the car, and whether the episode has ended.
    fn after(state: [f64; 2], action: i32) -> ([f64; 2], bool) {
        let mut env = from(MountainCarConfig::default(), state);
        let step = rl::step(&mut env, action).unwrap();
        assert_eq!((step.reward, step.truncated), (-1.0, false));
        (env.state().unwrap(), step.terminated)
    }

    #[test]
    fn a_step() {
        let ([position, velocity], terminated) = after([-0.5, 0.0], 2);
        assert!((position + 0.499_176_84).abs() < 5e-9, "{position}");
        assert!((velocity - 0.000_823_16).abs() < 5e-9, "{velocity}");
        assert!(!terminated);
    }

    /// The start that Gymnasium's docstring prints.
    #[test]
    fn other_bounds_of_the_start() {
        let options = [("low".into(), (-0.7).into()), ("high".into(), 0.5.into())];
        let start = rl::reset(&mut MountainCar::new(), Some(123), options.into()).unwrap();
        assert_eq!(start.to_vec(), [0.118_822_24, 0.0]);
    }

    #[test]
    fn only_the_wall_on_the_left_stops_the_car() {
        assert_eq!(after([-1.19, -0.06], 0), ([-1.2, 0.0], false));
        let ([position, velocity], terminated) = after([0.58, 0.06], 2);
        assert_eq!((position, terminated), (0.6, true));
        assert!(velocity > 0.06);
        // Whoever stands at the wall may leave it.
        assert!(after([-1.2, 0.0], 2).0[1] > 0.0);
    }

    #[test]
    fn the_speed_has_a_limit() {
        assert_eq!(after([-1.0, 0.0699], 2).0[1], 0.07);
        assert_eq!(after([-0.2, -0.0699], 0).0[1], -0.07);
    }

    #[test]
    fn the_flag_counts_at_speed_only() {
        let config = |goal_velocity| MountainCarConfig {
            goal_velocity,
            ..MountainCarConfig::default()
        };
        let ends = |goal_velocity, state| {
            let mut env = from(config(goal_velocity), state);
            rl::step(&mut env, 1).unwrap().terminated
        };
        assert!(ends(0.0, [0.49, 0.02]) && ends(0.01, [0.49, 0.02]));
        assert!(!ends(0.03, [0.49, 0.02]));
        assert!(!ends(0.0, [0.52, -0.01]), "rolls back");
        assert!(!ends(0.0, [0.47, 0.02]), "not there yet");
        let edge = MountainCarConfig {
            max_position: 0.5,
            ..config(0.0)
        };
        let step = rl::step(&mut from(edge, [0.49, 0.02]), 1).unwrap();
        assert!(step.terminated, "at the flag and not beyond");
    }

    #[test]
    fn refusals() {
        let mut env = MountainCar::new();
        assert!(env.render().is_none());
        assert!(rl::step(&mut env, 0).is_err());
        rl::reset(&mut env, Some(1), Options::new()).unwrap();
        let state = env.state();
        let problem = rl::step(&mut env, 3).unwrap_err().to_string();
        assert!(
            problem.contains("MountainCar: there is no action 3"),
            "{problem}"
        );
        assert!(rl::reset(&mut env, Some(-1), Options::new()).is_err());
        assert_eq!(env.state(), state);
    }
}
