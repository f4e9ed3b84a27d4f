//! Training an adapter: parameter groups, AdamW, schedules, clipping and accumulation.
//!
//! The short way is [`LoraOptimizer::backward_step`]; the long way goes through candle's own
//! [`GradStore`](candle_core::backprop::GradStore), which [`GradientAccumulator`],
//! [`clip_grad_norm`] and [`LoraOptimizer::step`] all speak:
//!
//! loss.backward() → accumulate → clip → step
//!
//! A step gives the numbers of [`candle_nn::AdamW`]; on the CPU it takes one pass over memory where
//! candle takes many. This module adds what an adapter needs around it: a learning rate per
//! group (LoRA+), and a refusal, before anything changes, where candle's optimiser would silently
//! skip a parameter that has no gradient or write NaN into one. The crate candle-optimisers (0.10.2)
//! is bound to candle 0.10, whose tensors are other types than those of candle 0.11, so it cannot be
//! used here.
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use candle_nn::{Linear, Module, loss::mse};
//! use lora::optim::{
//!     GradientAccumulator, LoraOptimizer, LoraPlusOptions, Schedule, clip_grad_norm,
//!     loraplus_groups,
//! };
//! use lora::{LoraConfig, LoraLinear};
//! use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
//!
//! let base = Linear::new(Tensor::new(&[[1f32, 0.], [0., 1.]], &Device::Cpu)?, None);
//! let mut rng = ChaCha8Rng::seed_from_u64(7);
//! let layer = LoraLinear::new("proj", base, &LoraConfig::new(2, 4.0), &mut rng)?;
//! let batches = [
//!     (Tensor::new(&[[1f32, 0.], [0., 1.]], &Device::Cpu)?, [[2f32, 3.], [-1., -1.]]),
//!     (Tensor::new(&[[1f32, 1.], [1., -1.]], &Device::Cpu)?, [[1f32, 2.], [3., 4.]]),
//! ];
//!
//! let options = LoraPlusOptions::default();
//! let groups = loraplus_groups(layer.trainable_parameters(), 0.02, 4.0, options)?;
//! let mut optimizer = LoraOptimizer::new(groups)?;
//! let mut accumulator = GradientAccumulator::new(optimizer.parameters());
//! let schedule = Schedule::Cosine { warmup_steps: 10 };
//! let mut loss = f32::NAN;
//! for step in 0..200 {
//!     for (x, y) in &batches {
//!         let error = mse(&layer.forward(x)?, &Tensor::new(y, &Device::Cpu)?)?;
//!         accumulator.add(&error.backward()?)?;
//!         loss = error.to_scalar()?;
//!     }
//!     let mut gradients = accumulator.take_mean()?;
//!     clip_grad_norm(&mut gradients, optimizer.parameters(), 1.0)?;
//!     optimizer.set_learning_rate_factor(schedule.factor(step, 200))?;
//!     optimizer.step(&gradients)?;
//! }
//! assert!(loss < 1e-3, "loss {loss}");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod gradients;
mod groups;
mod optimizer;
mod schedule;

pub use gradients::{GradientAccumulator, clip_grad_norm};
pub use groups::{LoraPlusOptions, ParameterGroup, loraplus_groups};
pub use optimizer::LoraOptimizer;
pub use schedule::Schedule;

use crate::{Error, Result};

/// `value`, refused where it is NaN, infinite or negative.
fn not_negative(what: impl Into<String>, value: f64) -> Result<f64> {
    checked_setting(what, value, value >= 0.0, "finite and not negative")
}

/// `value`, refused where it is NaN, infinite, negative or zero.
fn positive(what: impl Into<String>, value: f64) -> Result<f64> {
    checked_setting(what, value, value > 0.0, "finite and positive")
}

fn checked_setting(
    what: impl Into<String>,
    value: f64,
    in_range: bool,
    must: &'static str,
) -> Result<f64> {
    if value.is_finite() && in_range {
        return Ok(value);
    }
    Err(Error::OptimizerSetting {
        what: what.into(),
        value,
        must,
    })
}
