#![doc = include_str!("../README.md")]
#![deny(missing_docs)]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used))]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]

mod config;
mod count;
mod error;
mod linear;

pub use config::{Init, LoraConfig};
pub use count::ParameterCount;
pub use error::{Error, Result};
pub use linear::LoraLinear;
