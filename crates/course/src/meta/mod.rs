//! Meta-learning: a start from which a network learns a new task in a few steps.
//!
//! The tasks are the sinusoids of Finn et al. 2017 ([`Sinusoids`]). An *inner loop* takes a few
//! gradient steps on the few points of one task; an *outer loop* moves the start, so that the error
//! after these steps gets smaller. [`MetaLearner`] does both; [`Adapt`] says what the inner loop
//! moves, all weights or LoRA pairs only, and [`MetaMethod`] how the outer loop learns.
//!
//! # Second derivatives
//!
//! The outer gradient goes through the inner steps, so the inner gradient must itself be something
//! that can be differentiated. candle cuts that: its backward pass detaches the gradients, unless
//! an environment variable says otherwise, so that they are constants. Here the inner gradient is
//! therefore written out by hand, as a forward computation of candle's tensors
//! ([`MetaNetwork::gradients`]). One ordinary backward pass through it then gives the exact gradient
//! of the outer loss, second derivatives and all.
//!
//! # Many tasks at once
//!
//! Every tensor of a task has the task as its first dimension, so that one operation serves a whole
//! batch of tasks. Parameters start without it, shared by all tasks, and get it with the first inner
//! step.
//!
//! ```
//! use course::meta::{Adapt, MetaConfig, MetaLearner, Sinusoids};
//! use course::prelude::*;
//!
//! let config = MetaConfig { adapt: Adapt::Lora { r: 4, lora_alpha: 8.0 }, ..Default::default() };
//! let weights = config.random_weights(&mut rng(1), &Device::Cpu)?;
//! let mut learner = MetaLearner::new(&config, &weights)?;
//!
//! let mut sinusoids = Sinusoids::new(2, &Device::Cpu);
//! for _ in 0..3 {
//!     // 25 tasks with 10 points to adapt to and 10 to judge by
//!     let loss = learner.meta_step(&sinusoids.tasks(25, 10, 10)?)?;
//!     assert!(loss > 0.0);
//! }
//! // The error of each of 8 new tasks after 0, 1, … 5 steps on 5 points.
//! let errors = learner.evaluate(&Sinusoids::new(3, &Device::Cpu).tasks(8, 5, 100)?, 5)?;
//! assert_eq!((errors.len(), errors[0].len()), (6, 8));
//! # Ok::<(), course::Error>(())
//! ```
//!
//! Source: Finn et al. 2017, arXiv:1703.03400.

mod config;
mod inner;
mod learner;
mod network;
mod sinusoids;

pub use config::{Adapt, MetaConfig, MetaMethod};
pub use inner::{InnerRates, inner_step};
pub use learner::MetaLearner;
pub use network::{MetaNetwork, Parameters};
pub use sinusoids::{Sinusoids, Tasks};

#[cfg(test)]
mod tests;
