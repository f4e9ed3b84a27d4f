#![doc = include_str!("../README.md")]
#![deny(missing_docs)]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used))]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]

mod adapter;
mod attention;
mod base;
mod builder;
mod combine;
mod config;
mod conv;
mod count;
mod dropout;
mod embedding;
mod error;
mod init;
mod layer;
mod linear;
pub mod longlora;
mod merge;
mod model;
pub mod ops;
pub mod optim;
pub mod peft;
mod process;
pub mod quant;
mod rows;
mod svd;
mod targets;
mod through;
mod vera;

pub use adapter::Adapter;
pub use attention::{
    AttentionConfig, AttentionInput, AttentionOutput, AttentionWeights, LoraMultiHeadAttention,
};
pub use base::Base;
pub use builder::LoraBuilder;
pub use combine::{Combination, CombinationType, Combined, MajoritySign, Weighted, combine};
pub use config::{Bias, LoraConfig, VeraConfig};
pub use conv::{LoraConv1d, LoraConv2d};
pub use count::ParameterCount;
pub use embedding::{LoraEmbedding, ScaledEmbedding};
pub use error::{Error, Result};
pub use init::Init;
pub use layer::{DEFAULT_ADAPTER, LoraLayer};
pub use linear::{LoraAnyLinear, LoraLinear, LoraLinear4bit};
pub use model::{AnyLayer, LoraModel};
pub use process::tune_process;
pub use rows::BASE as BASE_ROW;
pub use targets::TargetModules;
pub use vera::VeraProjection;
