//! The models of the lessons, built so that LoRA can sit on any of their layers, and their
//! trained weights.

mod bert;
mod checkpoint;
mod classifier;
mod cnn;
mod llama;
mod pretrained;

pub use bert::{Bert, BertConfig, HiddenAct};
pub use checkpoint::{Card, Checkpoint};
pub use classifier::Classifier;
pub use cnn::{Cnn, CnnConfig};
pub use llama::{GenerationConfig, Llama, LlamaConfig};
pub use pretrained::{ModelConfig, Pretrained};
