//! Writes a checkpoint.

use crate::Result;
use course::candle_core::{DType, Device, Tensor, Var, safetensors};
use course::candle_nn::VarBuilder;
use course::data;
use course::lora::LoraBuilder;
use course::models::Card;
use serde::Serialize;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

/// A builder of a network that trains, from these weights.
pub fn builder(weights: BTreeMap<String, Tensor>) -> LoraBuilder<'static> {
    let weights = weights.into_iter().collect();
    LoraBuilder::trainable(VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu))
}

/// A checkpoint's folder, which is made.
pub fn folder(name: &str) -> Result<PathBuf> {
    let folder = data::folder().join("checkpoints").join(name);
    std::fs::create_dir_all(&folder)?;
    Ok(folder)
}

/// Rounds the weights to half precision, so that what is measured is what is kept.
pub fn round(variables: &[(String, Var)]) -> Result<()> {
    for (_, var) in variables {
        var.set(&var.to_dtype(DType::F16)?.to_dtype(DType::F32)?)?;
    }
    Ok(())
}

/// Writes the weights in half precision.
pub fn weights(folder: &Path, variables: &[(String, Var)]) -> Result<()> {
    let half = |(name, var): &(String, Var)| Ok((name.clone(), var.to_dtype(DType::F16)?));
    let tensors: HashMap<_, _> = variables.iter().map(half).collect::<Result<_>>()?;
    safetensors::save(&tensors, folder.join("model.safetensors"))?;
    Ok(())
}

/// Writes a file of JSON.
pub fn json(folder: &Path, file: &str, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value)?;
    std::fs::write(folder.join(file), text + "\n")?;
    Ok(())
}

/// Writes the card and prints it.
pub fn card(folder: &Path, card: &Card) -> Result<()> {
    json(folder, "card.json", card)?;
    println!("{}", serde_json::to_string_pretty(card)?);
    Ok(())
}

/// Numbers in all variables.
pub fn count(variables: &[(String, Var)]) -> usize {
    variables.iter().map(|(_, var)| var.elem_count()).sum()
}

/// The day, as 2026-01-31.
pub fn today() -> Result<String> {
    let date = std::process::Command::new("date").arg("+%F").output()?;
    Ok(String::from_utf8(date.stdout)?.trim().to_string())
}
