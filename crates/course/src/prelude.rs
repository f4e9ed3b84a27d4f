//! What every lesson starts with: `use course::prelude::*;`.
//!
//! - tensors: [`Tensor`], [`Device`], [`DType`], [`Var`], [`D`], [`IndexOp`];
//! - layers and optimisers: [`Module`], [`Linear`], [`AdamW`], [`ParamsAdamW`], [`SGD`],
//!   [`Optimizer`];
//! - LoRA: [`LoraLinear`], [`LoraConv1d`], [`LoraConv2d`], [`LoraEmbedding`],
//!   [`LoraMultiHeadAttention`], [`AttentionConfig`], [`AttentionInput`], [`LoraConfig`], [`Init`],
//!   [`TargetModules`], [`LoraBuilder`], [`LoraModel`], [`ParameterCount`];
//! - models: [`Checkpoint`], [`Pretrained`], [`Llama`], [`LlamaConfig`], [`GenerationConfig`],
//!   [`Bert`], [`BertConfig`], [`ViT`], [`ViTConfig`], [`Classifier`], [`Cnn`], [`CnnConfig`],
//!   [`Generator`], [`Discriminator`], [`GanConfig`], [`Vae`], [`VaeConfig`], [`QNetwork`],
//!   [`QNetworkConfig`], and [`Tokens`],
//!   [`Encodings`], [`Labelled`] and [`Tokenizer`] to feed them;
//! - training: [`Training`], [`History`], [`Schedule`], [`ParameterGroup`], and [`optim`](mod@optim)
//!   for the rest, such as [`optim::loraplus_groups`];
//! - charts: [`LineChart`], [`BarChart`], [`HeatMap`], [`ImageGrid`], [`RewardChart`], [`Figure`];
//! - the course's rooms by name: [`chart`](mod@chart), [`data`](mod@data),
//!   [`exercise`](mod@exercise), [`interrupt`](mod@interrupt), [`linalg`](mod@linalg),
//!   [`meta`](mod@meta), [`metrics`](mod@metrics), [`models`](mod@models), [`rl`](mod@rl),
//!   [`train`](mod@train);
//! - its commonest words: [`device`](fn@device), [`rng`](fn@rng), [`Rng`], [`record`],
//!   [`Spread`], [`Exercise`];
//! - whole crates by name: `candle_core`, `candle_nn`, `lora`, `plotters`, `gymnasium_rs`, so that
//!   a cell can write `candle_nn::loss::mse` without a dependency of its own.
//!
//! `Result` and `Error` stay std's. candle's `VarMap` is left out: it lists its variables in an
//! order that changes from run to run; a lesson makes its variables itself.
//!
//! ```
//! use course::prelude::*;
//!
//! let mut rng = rng(1);
//! let device = device()?;
//! let base = Linear::new(rng.randn((3, 4), &device)?, None);
//! let layer = LoraLinear::new("proj", base, &LoraConfig::new(2, 4.0), &mut rng)?;
//! let x = rng.randn((5, 4), &device)?;
//! let loss = candle_nn::loss::mse(&layer.forward(&x)?, &x.narrow(1, 0, 3)?)?;
//! let loss: f32 = record("loss", loss.to_scalar::<f32>()?)? as f32;
//! assert!(loss > 0.0);
//! let std_result: Result<u8, std::num::ParseIntError> = "7".parse();
//! assert_eq!(std_result, Ok(7));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub use candle_core::{D, DType, Device, IndexOp, Module, Tensor, Var};
pub use candle_nn::{AdamW, Linear, Optimizer, ParamsAdamW, SGD};
pub use lora::optim::{self, ParameterGroup, Schedule};
pub use lora::{
    AttentionConfig, AttentionInput, Init, LoraBuilder, LoraConfig, LoraConv1d, LoraConv2d,
    LoraEmbedding, LoraLinear, LoraModel, LoraMultiHeadAttention, ParameterCount, TargetModules,
};

pub use crate::data::{Encodings, Labelled, Tokens};
pub use crate::models::{
    Bert, BertConfig, Checkpoint, Classifier, Cnn, CnnConfig, Discriminator, GanConfig,
    GenerationConfig, Generator, Llama, LlamaConfig, Pretrained, QNetwork, QNetworkConfig, Vae,
    VaeConfig, ViT, ViTConfig,
};
pub use crate::tokenizer::{TextBatch, Tokenizer};

pub use crate::chart::{BarChart, Figure, HeatMap, ImageGrid, LineChart, RewardChart};
pub use crate::device::device;
pub use crate::exercise::{Exercise, Outcome};
pub use crate::metrics::{Spread, record};
pub use crate::rng::{Rng, rng};
pub use crate::train::{History, Training};

pub use crate::{candle_core, candle_nn, gymnasium_rs, lora, plotters};
pub use crate::{chart, data, exercise, interrupt, linalg, meta, metrics, models, rl, train};
