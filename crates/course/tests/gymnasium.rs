//! The environments of `course::rl` do what Gymnasium's do: `fixtures/gymnasium/trace.json` holds what
//! these did and painted, step by step. `trace.py` beside it makes it anew and says with which versions.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::path::Path;

use course::Result;
use course::rl::{
    self, Acrobot, AcrobotConfig, CartPole, CartPoleConfig, Env, MountainCar, MountainCarConfig,
    Observation, Options, Pendulum, PendulumConfig,
};
use serde::Deserialize;
use serde_json::{Map, Value};

/// What the last digit of single precision may cost, in parts of the number or of 1.
const SAME: f32 = 1e-6;

#[derive(Deserialize)]
struct Fixture {
    traces: Vec<Trace>,
    frames: Vec<Frame>,
}

/// What one environment did.
#[derive(Deserialize)]
struct Trace {
    what: String,
    env: String,
    /// What was changed of the physics.
    config: Map<String, Value>,
    /// The time limit, from `gymnasium.make`.
    limit: Option<usize>,
    /// Up to which step the last bit of a sine cannot grow to something.
    holds: Option<usize>,
    episodes: Vec<Episode>,
}

#[derive(Deserialize)]
struct Episode {
    seed: Option<i32>,
    options: Options,
    start: Vec<f32>,
    actions: Vec<f32>,
    observations: Vec<Vec<f32>>,
    rewards: Vec<f32>,
    terminated: Vec<u8>,
    truncated: Vec<u8>,
}

/// What a picture looked like after some actions.
#[derive(Deserialize)]
struct Frame {
    env: String,
    config: Map<String, Value>,
    seed: i32,
    options: Options,
    actions: Vec<f32>,
    /// Height and width, in pixels.
    size: [usize; 2],
    /// Height and width of a block, in pixels.
    block: usize,
    /// Red, green and blue of each block, on average, row by row.
    means: Vec<f64>,
}

fn fixture() -> Fixture {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gymnasium/trace.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Gives each changed field its number, and panics where there is no such field.
macro_rules! changed {
    ($changes:expr, $config:ident { $($field:ident),* }) => {{
        let mut config = $config::default();
        for (key, value) in $changes {
            match key.as_str() {
                $(stringify!($field) => config.$field = serde_json::from_value(value.clone()).unwrap(),)*
                _ => panic!("no field {key}"),
            }
        }
        config
    }};
}

/// An environment whose actions are numbers.
trait Player {
    fn reset(&mut self, seed: Option<i32>, options: Options) -> Result<Observation>;
    fn step(&mut self, action: f32) -> Result<rl::Step>;
    fn picture(&self) -> Option<Vec<u8>>;
}

/// One action of a few.
struct Discrete<E>(E);
/// One number.
struct Continuous<E>(E);

macro_rules! player {
    ($kind:ident, $action:ty, $convert:expr) => {
        impl<E: Env<Observation, $action>> Player for $kind<E> {
            fn reset(&mut self, seed: Option<i32>, options: Options) -> Result<Observation> {
                rl::reset(&mut self.0, seed, options)
            }

            fn step(&mut self, action: f32) -> Result<rl::Step> {
                rl::step(&mut self.0, $convert(action))
            }

            fn picture(&self) -> Option<Vec<u8>> {
                self.0.render().map(|rgb| rgb.into_raw_vec())
            }
        }
    };
}
player!(Discrete, i32, |action| action as i32);
player!(Continuous, Observation, |action| Observation::from(vec![
    action
]));

fn player(name: &str, changes: &Map<String, Value>, limit: Option<usize>) -> Box<dyn Player> {
    let plain = changes.is_empty();
    // The ids that are registered have the limits of `gymnasium.make`.
    match (name, limit) {
        ("CartPole", Some(500)) if plain => Box::new(Discrete(rl::cartpole_v1())),
        ("Acrobot", Some(500)) if plain => Box::new(Discrete(rl::acrobot_v1())),
        ("MountainCar", Some(200)) if plain => Box::new(Discrete(rl::mountain_car_v0())),
        ("Pendulum", Some(200)) if plain => Box::new(Continuous(rl::pendulum_v1())),
        ("CartPole", None) => Box::new(Discrete(CartPole::with(changed!(
            changes,
            CartPoleConfig {
                gravity,
                masscart,
                masspole,
                length,
                force_mag,
                tau,
                sutton_barto_reward
            }
        )))),
        ("Acrobot", None) => Box::new(Discrete(Acrobot::with(changed!(
            changes,
            AcrobotConfig {
                dt,
                link_length_1,
                link_mass_1,
                link_mass_2,
                link_com_pos_1,
                link_com_pos_2,
                link_moi,
                max_vel_1,
                max_vel_2
            }
        )))),
        ("MountainCar", None) => Box::new(Discrete(MountainCar::with(changed!(
            changes,
            MountainCarConfig {
                min_position,
                max_position,
                max_speed,
                goal_position,
                goal_velocity,
                force,
                gravity
            }
        )))),
        ("Pendulum", None) => Box::new(Continuous(Pendulum::with(changed!(
            changes,
            PendulumConfig {
                g,
                m,
                l,
                dt,
                max_speed,
                max_torque
            }
        )))),
        _ => panic!("{name} with the limit {limit:?}"),
    }
}

/// The largest difference, in parts of the expected number where that is above 1.
fn difference<'a>(
    got: impl IntoIterator<Item = &'a f32>,
    expected: impl IntoIterator<Item = &'a f32>,
) -> f32 {
    let pairs = got.into_iter().zip(expected);
    let differences = pairs.map(|(x, expected)| (x - expected).abs() / expected.abs().max(1.0));
    // NaN is larger than any number, and stays.
    differences.fold(0.0, |largest, x| {
        if x > largest || x.is_nan() {
            x
        } else {
            largest
        }
    })
}

#[test]
fn every_step_is_that_of_gymnasium() {
    let mut names = BTreeSet::new();
    for trace in fixture().traces {
        let mut player = player(&trace.env, &trace.config, trace.limit);
        let holds = trace.holds.unwrap_or(usize::MAX);
        for (number, episode) in trace.episodes.into_iter().enumerate() {
            let place = format!("{}, {}, episode {number}", trace.env, trace.what);
            let start = player.reset(episode.seed, episode.options).unwrap();
            assert_eq!(start.len(), episode.start.len(), "{place}");
            let differs = difference(&start, &episode.start);
            assert!(
                differs < SAME,
                "{place}: {start} is not {:?}",
                episode.start
            );

            for (i, action) in episode.actions.into_iter().enumerate() {
                let step = player.step(action).unwrap();
                let place = format!("{place}, step {i}: {step:?}");
                assert_eq!(u8::from(step.truncated), episode.truncated[i], "{place}");
                if i >= holds {
                    continue;
                }
                assert_eq!(u8::from(step.terminated), episode.terminated[i], "{place}");
                let rewarded = difference([&step.reward], [&episode.rewards[i]]);
                assert!(
                    rewarded < SAME,
                    "{place} is not worth {}",
                    episode.rewards[i]
                );
                let expected = &episode.observations[i];
                assert_eq!(step.observation.len(), expected.len(), "{place}");
                let differs = difference(&step.observation, expected);
                assert!(differs < SAME, "{place} is not {expected:?}");
            }
        }
        names.insert(trace.env);
    }
    assert_eq!(names.len(), 4, "each environment was there");
}

/// The mean colours of the blocks of a picture, row by row.
fn block_means(rgb: &[u8], [height, width]: [usize; 2], block: usize) -> Vec<f64> {
    let columns = width / block;
    let mut sums = vec![0.0; height / block * columns * 3];
    for (i, byte) in rgb.iter().enumerate() {
        let (row, column, channel) = (i / 3 / width, i / 3 % width, i % 3);
        let at = (row / block * columns + column / block) * 3 + channel;
        sums[at] += f64::from(*byte);
    }
    sums.iter()
        .map(|sum| sum / (block * block) as f64)
        .collect()
}

#[test]
fn every_picture_is_that_of_gymnasium() {
    for (number, frame) in fixture().frames.into_iter().enumerate() {
        let mut player = player(&frame.env, &frame.config, None);
        player.reset(Some(frame.seed), frame.options).unwrap();
        for action in frame.actions {
            player.step(action).unwrap();
        }
        let rgb = player.picture().unwrap();
        assert_eq!(rgb.len(), frame.size[0] * frame.size[1] * 3);
        let means = block_means(&rgb, frame.size, frame.block);
        assert_eq!(means.len(), frame.means.len());
        let differences = means.iter().zip(&frame.means).map(|(a, b)| (a - b).abs());
        let differences: Vec<_> = differences.collect();
        let mean = differences.iter().sum::<f64>() / differences.len() as f64;
        let largest = differences.into_iter().fold(0.0, f64::max);
        // Out of 255. Edges are smoother there, and the arrow of the pendulum is an image.
        let (mean_bound, largest_bound) = match frame.env.as_str() {
            "Pendulum" => (0.2, 12.0),
            _ => (0.1, 3.0),
        };
        assert!(
            mean < mean_bound && largest < largest_bound,
            "{} in frame {number}: {mean:.3} on average, {largest:.1} at most",
            frame.env
        );
    }
}
