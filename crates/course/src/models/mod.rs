//! The models of the lessons, built so that LoRA can sit on any of their layers, and their
//! trained weights.

mod accuracy;
mod bert;
mod checkpoint;
mod classifier;
mod cnn;
mod gan;
mod llama;
pub(crate) mod mlp;
mod norm;
mod pretrained;
mod q_network;
mod vae;
mod vit;

pub use bert::{Bert, BertConfig, HiddenAct};
pub use checkpoint::{AdapterCheckpoint, Card, Checkpoint};
pub use classifier::Classifier;
pub use cnn::{Cnn, CnnConfig};
pub use gan::{Discriminator, GanConfig, Generator};
pub use llama::{GenerationConfig, Llama, LlamaConfig};
pub use pretrained::{ModelConfig, Pretrained};
pub use q_network::{QNetwork, QNetworkConfig, QSnapshot};
pub use vae::{Vae, VaeConfig};
pub use vit::{ViT, ViTConfig};

/// What the models' tests share.
#[cfg(test)]
mod testing {
    use candle_core::Tensor;

    /// The largest difference, relative to the largest expected number.
    pub fn gap(got: &Tensor, want: &Tensor) -> f32 {
        let largest = |t: Tensor| t.abs()?.max_all()?.to_scalar::<f32>();
        assert_eq!(got.dims(), want.dims());
        largest((got - want).unwrap()).unwrap() / largest(want.clone()).unwrap()
    }
}
