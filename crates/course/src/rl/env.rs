//! Steps and starts that can fail, over gymnasium-rs's trait.

use std::collections::HashMap;

use gymnasium_rs::core::{Env, Info, Options};
use ndarray::Array1;

use super::seeding::NumpyRandom;
use crate::{Error, Result};

/// What an agent sees of an environment.
pub type Observation = Array1<f32>;

/// What one step of an environment gave.
#[derive(Clone, Debug)]
pub struct Step {
    /// What the agent sees now.
    pub observation: Observation,
    /// The reward of the action.
    pub reward: f32,
    /// Whether the task has ended: there is nothing to gain from here.
    pub terminated: bool,
    /// Whether the time limit was reached: the task would have gone on.
    pub truncated: bool,
    /// What else the environment says.
    pub info: Info,
}

impl Step {
    /// Whether the episode is over, for either reason.
    #[must_use]
    pub fn done(&self) -> bool {
        self.terminated || self.truncated
    }
}

/// Begins an episode and gives the first observation.
///
/// With a seed the environment's random numbers start anew, without one they go on.
///
/// # Errors
///
/// [`Error::Environment`] for a negative seed and for options that the environment cannot use.
///
/// ```
/// use course::rl::{self, CartPole};
/// let start = rl::reset(&mut CartPole::new(), Some(1), Default::default())?;
/// assert!(start.iter().all(|x| x.abs() < 0.05));
/// assert!(rl::reset(&mut CartPole::new(), Some(-1), Default::default()).is_err());
/// # Ok::<(), course::Error>(())
/// ```
pub fn reset<A>(
    env: &mut (impl Env<Observation, A> + ?Sized),
    seed: Option<i32>,
    options: Options,
) -> Result<Observation> {
    let (observation, info) = env.reset(seed, options);
    refused(&info)?;
    Ok(observation)
}

/// Takes an action.
///
/// # Errors
///
/// [`Error::Environment`] for an action that the environment does not have (a torque that is only
/// too large is clipped) and before the first [`reset`].
///
/// ```
/// use course::rl::{self, CartPole};
/// let mut env = CartPole::new();
/// assert!(rl::step(&mut env, 1).is_err(), "not reset yet");
/// rl::reset(&mut env, Some(1), Default::default())?;
/// assert_eq!(rl::step(&mut env, 1)?.reward, 1.0);
/// assert!(rl::step(&mut env, 2).is_err(), "there are 0 and 1");
/// # Ok::<(), course::Error>(())
/// ```
pub fn step<A>(env: &mut (impl Env<Observation, A> + ?Sized), action: A) -> Result<Step> {
    let (observation, reward, terminated, truncated, info) = env.step(action);
    refused(&info)?;
    Ok(Step {
        observation,
        reward,
        terminated,
        truncated,
        info,
    })
}

/// The key under which an environment tells what it refused.
const REFUSAL: &str = "error";

fn refused(info: &Info) -> Result<()> {
    match info.get(REFUSAL) {
        None => Ok(()),
        Some(problem) => Err(Error::Environment {
            problem: problem.as_str().unwrap_or("refused").to_string(),
        }),
    }
}

/// The info of a step or start that was refused.
pub(super) fn refusal(problem: String) -> Info {
    HashMap::from([(REFUSAL.to_string(), problem.into())])
}

/// A step of the trait that was refused: nothing has changed, and no number can pass for a result.
pub(super) fn refused_step(size: usize, problem: String) -> (Observation, f32, bool, bool, Info) {
    (nothing(size), f32::NAN, false, false, refusal(problem))
}

/// An observation that is none.
pub(super) fn nothing(size: usize) -> Observation {
    Observation::from_elem(size, f32::NAN)
}

/// What is alike in all environments: making one, and looking inside. After the names come the
/// name of its registration, what the state holds, its size, and further fields with their start.
macro_rules! frame {
    ($env:ident, $config:ident, $id:literal, $holds:literal, $size:literal
     $(, $field:ident: $start:expr)*) => {
        impl Default for $env {
            fn default() -> Self {
                Self::new()
            }
        }

        impl $env {
            #[doc = concat!("The physics of ", $id, ".")]
            /// Without a seed the first start is that of seed 0.
            #[must_use]
            pub fn new() -> Self {
                Self::with($config::default())
            }

            /// Other physics.
            #[must_use]
            pub fn with(config: $config) -> Self {
                Self {
                    config,
                    random: NumpyRandom::seeded(0),
                    state: None,
                    $($field: $start,)*
                }
            }

            /// The physics.
            #[must_use]
            pub fn config(&self) -> &$config {
                &self.config
            }

            #[doc = concat!("The state ", $holds, " in double precision; none before the first reset.")]
            #[must_use]
            pub fn state(&self) -> Option<[f64; $size]> {
                self.state
            }
        }
    };
}
pub(super) use frame;

/// The state before a step, if there is one.
pub(super) fn begun<S>(name: &str, state: Option<S>) -> std::result::Result<S, String> {
    state.ok_or_else(|| format!("{name}: reset it before the first step"))
}

/// The same, if the action is one of `actions`.
pub(super) fn ready<S>(
    name: &str,
    state: Option<S>,
    action: i32,
    actions: i32,
) -> std::result::Result<S, String> {
    let state = begun(name, state)?;
    if (0..actions).contains(&action) {
        return Ok(state);
    }
    let last = actions - 1;
    Err(format!(
        "{name}: there is no action {action}: give one from 0 to {last}"
    ))
}

/// The bounds `low` and `high` of a reset's options; and its random numbers: anew with a seed,
/// otherwise those that go on.
///
/// Source: Gymnasium's `Env.reset` and `maybe_parse_reset_bounds`.
pub(super) fn begin(
    name: &str,
    random: &mut NumpyRandom,
    seed: Option<i32>,
    options: &Options,
    default: (f64, f64),
) -> std::result::Result<(f64, f64), String> {
    let low = option(name, options, "low", default.0)?;
    let high = option(name, options, "high", default.1)?;
    if low > high {
        let problem = format!("{name}: the option \"low\" = {low} lies above \"high\" = {high}");
        return Err(problem);
    }
    reseed(name, random, seed)?;
    Ok((low, high))
}

/// A number among the options of a reset.
pub(super) fn option(
    name: &str,
    options: &Options,
    key: &str,
    default: f64,
) -> std::result::Result<f64, String> {
    match options.get(key).map(serde_json::Value::as_f64) {
        None => Ok(default),
        Some(Some(number)) if number.is_finite() => Ok(number),
        Some(_) => Err(format!("{name}: the option {key:?} must be a number")),
    }
}

/// Starts the random numbers anew if there is a seed.
pub(super) fn reseed(
    name: &str,
    random: &mut NumpyRandom,
    seed: Option<i32>,
) -> std::result::Result<(), String> {
    if let Some(seed) = seed {
        let seed = u32::try_from(seed)
            .map_err(|_| format!("{name}: the seed {seed} is negative: give one from 0 on"))?;
        *random = NumpyRandom::seeded(seed);
    }
    Ok(())
}

/// Whether an environment refused what gave this info.
pub(super) fn is_refusal(info: &Info) -> bool {
    info.contains_key(REFUSAL)
}

/// Numbers in double precision as an observation.
pub(super) fn observation<const N: usize>(numbers: [f64; N]) -> Observation {
    numbers.iter().map(|x| *x as f32).collect()
}

/// `x`, or the nearer one of the bounds. (`clamp` panics where these are in the wrong order.)
pub(super) fn within(x: f64, low: f64, high: f64) -> f64 {
    if x < low {
        low
    } else if x > high {
        high
    } else {
        x
    }
}
