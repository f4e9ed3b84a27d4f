//! The trained models of `data/checkpoints/`, each with a card that says how it came about.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarBuilder;
use lora::{LoraBuilder, LoraModel};
use serde::{Deserialize, Serialize};

use super::{CnnConfig, LlamaConfig};
use crate::tokenizer::Tokenizer;
use crate::{Error, Result, data};

/// How a checkpoint came about: `card.json` beside it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Card {
    /// What it is, in a sentence.
    pub about: String,
    /// The command that makes it again.
    pub command: String,
    /// The files of `data/` that it learned from.
    pub data: Vec<String>,
    /// The seed of weights and batches.
    pub seed: u64,
    /// Steps of the optimiser.
    pub steps: usize,
    /// Examples (windows or images) in a step.
    pub batch: usize,
    /// The highest learning rate.
    pub learning_rate: f64,
    /// Parameters of the model.
    pub parameters: usize,
    /// What was measured on held-out data, by name: `loss` in nats, `accuracy` from 0 to 1.
    pub held_out: BTreeMap<String, f64>,
    /// Seconds that the training took.
    pub seconds: f64,
    /// The day of the training, such as 2026-01-31.
    pub date: String,
}

/// The sizes of a model, as a `config.json` holds them.
///
/// A trait rather than serde's own, so that the reader is compiled with the model and not in every
/// cell of a notebook that loads one.
pub trait ModelConfig: Sized {
    /// The sizes in the text of a `config.json`.
    ///
    /// # Errors
    ///
    /// Text that is no JSON, or the sizes of another kind of model.
    fn from_json(json: &[u8]) -> serde_json::Result<Self>;
}

impl ModelConfig for LlamaConfig {
    fn from_json(json: &[u8]) -> serde_json::Result<Self> {
        serde_json::from_slice(json)
    }
}

impl ModelConfig for CnnConfig {
    fn from_json(json: &[u8]) -> serde_json::Result<Self> {
        serde_json::from_slice(json)
    }
}

/// A folder of `data/checkpoints/`: `model.safetensors` in half precision, `config.json`,
/// `card.json` and, for a language model, `tokenizer.json`.
///
/// ```
/// let checkpoint = course::models::Checkpoint::open("sotu-lm")?;
/// assert!(checkpoint.card().held_out["loss"] < 3.5);
/// assert!(course::models::Checkpoint::open("no-such").is_err());
/// # Ok::<(), course::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Checkpoint {
    name: String,
    card: Card,
}

impl Checkpoint {
    /// The checkpoint of a name.
    ///
    /// # Errors
    ///
    /// A name that does not exist, with those that do; a card that cannot be read.
    pub fn open(name: &str) -> Result<Self> {
        let names = names();
        if !names.iter().any(|known| known == name) {
            return Err(Error::Model {
                model: "Checkpoint",
                problem: format!("there is no {name:?}; there are {}", names.join(", ")),
            });
        }
        let name = name.to_string();
        let file = format!("checkpoints/{name}/card.json");
        let card = serde_json::from_slice(&data::read(&file)?)
            .map_err(|error| data::damaged(&file, &error.to_string()))?;
        Ok(Self { name, card })
    }

    /// How it came about.
    #[must_use]
    pub fn card(&self) -> &Card {
        &self.card
    }

    /// A model of these weights, frozen, and the handle by which it gets adapters.
    ///
    /// `new` is the model's own constructor, such as `Llama::new`.
    ///
    /// # Errors
    ///
    /// Files that cannot be read or do not fit the model.
    ///
    /// ```
    /// use course::prelude::*;
    ///
    /// let base = Checkpoint::open("fashion-cnn")?;
    /// let (cnn, mut model) = base.frozen(&Device::Cpu, Cnn::new)?;
    /// let config = LoraConfig::new(4, 8.0).with_targets(["conv2", "conv3"]);
    /// model.add_adapter("default", &config, &mut rng(1))?;
    /// assert_eq!(model.parameter_count().trainable, 4 * (9 * 16 + 32) + 4 * (9 * 32 + 64));
    /// # let _ = cnn;
    /// # Ok::<(), course::Error>(())
    /// ```
    pub fn frozen<C: ModelConfig, M>(
        &self,
        device: &Device,
        new: impl FnOnce(&C, &LoraBuilder<'static>) -> Result<M>,
    ) -> Result<(M, LoraModel)> {
        let builder = LoraBuilder::new(self.vb(device)?);
        let model = new(&self.config()?, &builder)?;
        Ok((model, builder.model()?))
    }

    /// A model of these weights in which those train whose name `which` says yes to, and the
    /// variables of these, sorted by name. The others are frozen and cost no gradient.
    ///
    /// # Errors
    ///
    /// As [`frozen`](Self::frozen).
    ///
    /// ```
    /// use course::prelude::*;
    ///
    /// let base = Checkpoint::open("fashion-cnn")?;
    /// let (_, all) = base.trainable(&Device::Cpu, Cnn::new, |_| true)?;
    /// let (_, head) = base.trainable(&Device::Cpu, Cnn::new, |name| name.starts_with("head."))?;
    /// assert_eq!((all.len(), head.len()), (10, 2));
    /// assert_eq!(head[0].0, "head.bias");
    /// # Ok::<(), course::Error>(())
    /// ```
    pub fn trainable<C: ModelConfig, M>(
        &self,
        device: &Device,
        new: impl FnOnce(&C, &LoraBuilder<'static>) -> Result<M>,
        which: impl Fn(&str) -> bool + Send + Sync + 'static,
    ) -> Result<(M, Vec<(String, Var)>)> {
        let builder = LoraBuilder::trainable_where(self.vb(device)?, which);
        let model = new(&self.config()?, &builder)?;
        Ok((model, builder.variables()))
    }

    fn vb(&self, device: &Device) -> Result<VarBuilder<'static>> {
        let tensors = self.tensors(device)?.into_iter().collect();
        Ok(VarBuilder::from_tensors(tensors, DType::F32, device))
    }

    /// The weights by name, in f32.
    ///
    /// # Errors
    ///
    /// A file that cannot be read or is damaged.
    pub fn tensors(&self, device: &Device) -> Result<BTreeMap<String, Tensor>> {
        let file = self.file("model.safetensors");
        let tensors = candle_core::safetensors::load_buffer(&data::read(&file)?, device)
            .map_err(|error| data::damaged(&file, &error.to_string()))?;
        let wide = |(name, tensor): (String, Tensor)| Ok((name, tensor.to_dtype(DType::F32)?));
        tensors.into_iter().map(wide).collect()
    }

    /// The sizes in `config.json`.
    ///
    /// # Errors
    ///
    /// A file that cannot be read or is of another kind of model.
    pub fn config<C: ModelConfig>(&self) -> Result<C> {
        let file = self.file("config.json");
        C::from_json(&data::read(&file)?).map_err(|error| data::damaged(&file, &error.to_string()))
    }

    /// The tokenizer of a language model.
    ///
    /// # Errors
    ///
    /// A file that cannot be read.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        Tokenizer::from_json(&data::read(&self.file("tokenizer.json"))?)
    }

    fn file(&self, name: &str) -> String {
        format!("checkpoints/{}/{name}", self.name)
    }
}

/// All checkpoints.
fn names() -> Vec<String> {
    let entries = std::fs::read_dir(data::folder().join("checkpoints"));
    let entries = entries.into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter(|entry| entry.path().join("card.json").is_file())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}
