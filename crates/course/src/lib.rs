//! What a notebook of the LoRA course imports.
//!
//! This crate is a dylib, so that every cell of a notebook shares one candle: candle numbers its
//! tensors with a counter, and a counter per cell would let gradients go to the wrong tensor.
//! A notebook therefore has this crate as its only dependency and reaches everything through it.
#![deny(missing_docs)]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used))]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]

pub use candle_core;
pub use candle_nn;
pub use gymnasium_rs;
pub use lora;
pub use plotters;

pub mod chart;
pub mod data;
pub mod device;
pub mod exercise;
pub mod interrupt;
pub mod linalg;
pub mod meta;
pub mod metrics;
pub mod models;
pub mod prelude;
pub mod rl;
pub mod rng;
pub mod tokenizer;
pub mod train;

mod error;

pub use error::{Error, Result};
