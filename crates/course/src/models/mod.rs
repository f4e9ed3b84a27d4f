//! The models of the lessons, built so that LoRA can sit on any of their layers, and their
//! trained weights.

mod checkpoint;
mod cnn;
mod llama;

pub use checkpoint::{Card, Checkpoint, ModelConfig};
pub use cnn::{Cnn, CnnConfig};
pub use llama::{GenerationConfig, Llama, LlamaConfig};
