//! Writes a checkpoint.

use crate::Result;
use course::candle_core::{DType, Device, Tensor, Var, safetensors};
use course::candle_nn::VarBuilder;
use course::data;
use course::lora::{LoraBuilder, LoraModel};
use course::models::Card;
use serde::Serialize;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

/// A builder of a network that trains, from these weights.
pub fn builder(weights: BTreeMap<String, Tensor>) -> LoraBuilder<'static> {
    let weights = weights.into_iter().collect();
    LoraBuilder::trainable(VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu))
}

/// A training, as a card tells of it.
pub struct Told {
    pub name: &'static str,
    pub about: &'static str,
    /// The files of `data/` that it learned from.
    pub data: Vec<String>,
    pub seed: u64,
    pub steps: usize,
    pub batch: usize,
    pub rate: f64,
    pub seconds: f64,
}

impl Told {
    /// Writes the checkpoint: the weights, rounded to half precision first, so that what
    /// `held_out` measures is what is kept; `config.json`; and the card, which is printed.
    pub fn keep(
        self,
        variables: &[(String, Var)],
        config: &impl Serialize,
        held_out: impl FnOnce() -> course::Result<Vec<(&'static str, f64)>>,
    ) -> Result<PathBuf> {
        let folder = folder_of(self.name)?;
        let card = self.card(variables, held_out)?;
        let half = |(name, var): &(String, Var)| Ok((name.clone(), var.to_dtype(DType::F16)?));
        let tensors: HashMap<_, _> = variables.iter().map(half).collect::<Result<_>>()?;
        safetensors::save(&tensors, folder.join("model.safetensors"))?;
        json(&folder, "config.json", config)?;
        card_beside(&folder, &card)?;
        Ok(folder)
    }

    /// Writes the model's adapter in the same way, as PEFT reads it.
    pub fn keep_adapter(
        self,
        model: &LoraModel,
        held_out: impl FnOnce() -> course::Result<Vec<(&'static str, f64)>>,
    ) -> Result<()> {
        let folder = folder_of(self.name)?;
        let card = self.card(&model.trainable_parameters(), held_out)?;
        let mut files = model.adapter_files("default")?;
        for tensor in files.tensors.values_mut() {
            *tensor = tensor.to_dtype(DType::F16)?;
        }
        let other = &mut files.config.other;
        other.insert("task_type".to_string(), "CAUSAL_LM".into());
        files.write(&folder)?;
        card_beside(&folder, &card)
    }

    /// The card, once the weights are rounded to half precision.
    fn card(
        self,
        variables: &[(String, Var)],
        held_out: impl FnOnce() -> course::Result<Vec<(&'static str, f64)>>,
    ) -> Result<Card> {
        for (_, var) in variables {
            var.set(&var.to_dtype(DType::F16)?.to_dtype(DType::F32)?)?;
        }
        let held_out = held_out()?.into_iter();
        Ok(Card {
            about: self.about.into(),
            command: format!("cargo course pretrain {}", self.name),
            data: self.data,
            seed: self.seed,
            steps: self.steps,
            batch: self.batch,
            learning_rate: self.rate,
            parameters: variables.iter().map(|(_, var)| var.elem_count()).sum(),
            held_out: held_out.map(|(what, read)| (what.into(), read)).collect(),
            seconds: self.seconds,
            date: today()?,
        })
    }
}

/// The folder of a checkpoint, made if it is missing.
fn folder_of(name: &str) -> Result<PathBuf> {
    let folder = data::folder().join("checkpoints").join(name);
    std::fs::create_dir_all(&folder)?;
    Ok(folder)
}

/// Writes the card, and prints it.
fn card_beside(folder: &Path, card: &Card) -> Result<()> {
    json(folder, "card.json", card)?;
    println!("{}", serde_json::to_string_pretty(card)?);
    Ok(())
}

/// Writes a file of JSON.
fn json(folder: &Path, file: &str, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value)?;
    std::fs::write(folder.join(file), text + "\n")?;
    Ok(())
}

/// The day, as 2026-01-31.
fn today() -> Result<String> {
    let date = std::process::Command::new("date").arg("+%F").output()?;
    Ok(String::from_utf8(date.stdout)?.trim().to_string())
}
