//! The models of the lessons, built so that LoRA can sit on any of their layers.

mod llama;

pub use llama::{Llama, LlamaConfig};
