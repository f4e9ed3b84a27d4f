//! The trained models of `data/checkpoints/`, each with a card that says how it came about.

use std::collections::BTreeMap;
use std::ops::Deref;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Pretrained;
use crate::{Error, Result, data};

/// How a checkpoint came about: `card.json` beside it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Card {
    /// What it is, in a sentence.
    pub about: String,
    /// The command that makes it again.
    pub command: String,
    /// The files of `data/` that it learned from; none where the data are drawn at random.
    pub data: Vec<String>,
    /// The seed of weights and batches.
    pub seed: u64,
    /// Steps of the optimiser; of a DQN, those of its environments.
    pub steps: usize,
    /// Examples (windows, images or tasks) in a step.
    pub batch: usize,
    /// The highest learning rate.
    pub learning_rate: f64,
    /// Parameters of the model.
    pub parameters: usize,
    /// What was measured on held-out data, by name: `loss` in nats, `accuracy` from 0 to 1, `frechet`
    /// as [`frechet_distance`](crate::linalg::frechet_distance) of the features of `fashion-cnn`,
    /// `error_n` as the mean squared error after n inner steps
    /// ([`MetaLearner::evaluate`](crate::meta::MetaLearner::evaluate)), `mean_return` of a policy.
    pub held_out: BTreeMap<String, f64>,
    /// Seconds that the training took.
    pub seconds: f64,
    /// The day of the training, such as 2026-01-31.
    pub date: String,
}

/// A folder of `data/checkpoints/`: a [`Pretrained`] model, with weights in half precision, and its
/// [`Card`].
///
/// ```
/// let checkpoint = course::models::Checkpoint::open("sotu-lm")?;
/// assert!(checkpoint.card().held_out["loss"] < 3.5);
/// assert!(course::models::Checkpoint::open("no-such").is_err());
/// # Ok::<(), course::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Checkpoint {
    model: Pretrained,
    card: Card,
}

impl Checkpoint {
    /// The checkpoint of a name.
    ///
    /// # Errors
    ///
    /// A name that does not exist, with those that do; a card that cannot be read.
    pub fn open(name: &str) -> Result<Self> {
        let (folder, card) = folder_and_card(name, "config.json")?;
        let model = Pretrained::with_remedy(&folder, REMEDY)?;
        Ok(Self { model, card })
    }

    /// How it came about.
    #[must_use]
    pub fn card(&self) -> &Card {
        &self.card
    }
}

/// A checkpoint is read as every pretrained model is.
impl Deref for Checkpoint {
    type Target = Pretrained;

    fn deref(&self) -> &Pretrained {
        &self.model
    }
}

/// A folder of `data/checkpoints/` with an adapter, as PEFT lays it out, of a model that is fetched:
/// weights in half precision, and a [`Card`].
///
/// ```
/// let adapter = course::models::AdapterCheckpoint::open("smollm2-hamlet")?;
/// assert!(adapter.folder().join("adapter_model.safetensors").is_file());
/// assert!(adapter.card().held_out["loss"] < 3.6);
/// # Ok::<(), course::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct AdapterCheckpoint {
    folder: PathBuf,
    card: Card,
}

impl AdapterCheckpoint {
    /// The adapter of a name.
    ///
    /// # Errors
    ///
    /// As [`Checkpoint::open`].
    pub fn open(name: &str) -> Result<Self> {
        let (folder, card) = folder_and_card(name, "adapter_config.json")?;
        Ok(Self { folder, card })
    }

    /// The folder, for [`LoraModel::load_adapter`](lora::LoraModel::load_adapter).
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// How it came about.
    #[must_use]
    pub fn card(&self) -> &Card {
        &self.card
    }
}

/// What to do about a damaged file.
const REMEDY: &str = "get it back with `git restore data`";

/// The folder of a name, if there is one with this file, and its card.
fn folder_and_card(name: &str, file: &str) -> Result<(PathBuf, Card)> {
    let names = names(file);
    if !names.iter().any(|known| known == name) {
        return Err(Error::Model {
            model: "Checkpoint",
            problem: format!("there is no {name:?}; there are {}", names.join(", ")),
        });
    }
    let folder = data::folder().join("checkpoints").join(name);
    let file = folder.join("card.json");
    let bytes = std::fs::read(&file).map_err(Error::file(&file))?;
    let card = serde_json::from_slice(&bytes)
        .map_err(|error| Error::damaged(file.display(), &error.to_string(), REMEDY))?;
    Ok((folder, card))
}

/// All checkpoints with this file.
fn names(file: &str) -> Vec<String> {
    let entries = std::fs::read_dir(data::folder().join("checkpoints"));
    let entries = entries.into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter(|entry| entry.path().join(file).is_file())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}
