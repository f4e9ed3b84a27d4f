//! Where a case's numbers come from: a seed, or the file that PEFT's side wrote.

use crate::case::{Result, Spec};
use course::candle_core::{DType, Device, Tensor, safetensors};
use course::candle_nn::VarBuilder;
use course::lora::{LoraBuilder, LoraConfig, LoraLinear, LoraModel};
use course::models::LlamaConfig;
use course::rng::{Rng, rng};
use std::collections::HashMap;
use std::path::Path;

/// The adapter's name in every case but the mixed batch.
pub const ADAPTER: &str = "default";

/// Numbers by name.
pub struct Weights {
    file: Option<HashMap<String, Tensor>>,
    pub rng: Rng,
}

impl Weights {
    /// Random numbers, the same in every run.
    pub fn seeded() -> Self {
        Self {
            file: None,
            rng: rng(1),
        }
    }

    /// The numbers of a file.
    pub fn read(file: &Path) -> Result<Self> {
        Ok(Self {
            file: Some(safetensors::load(file, &Device::Cpu)?),
            rng: rng(1),
        })
    }

    /// A tensor of the file, where there is one.
    pub fn given(&self, name: &str) -> Option<Tensor> {
        self.file.as_ref()?.get(name).cloned()
    }

    /// A tensor of the file, or standard normal numbers times `scale`.
    pub fn tensor(&mut self, name: &str, shape: &[usize], scale: f64) -> Result<Tensor> {
        let Some(file) = &self.file else {
            return Ok((self.rng.randn(shape, &Device::Cpu)? * scale)?);
        };
        let tensor = file.get(name).ok_or(format!("the file lacks {name}"))?;
        if tensor.dims() != shape {
            return Err(format!("{name} is {:?}, not {shape:?}", tensor.dims()).into());
        }
        Ok(tensor.clone())
    }

    /// The input and the target of a case.
    pub fn data(&mut self, input: &[usize], output: &[usize]) -> Result<(Tensor, Tensor)> {
        let x = self.tensor("x", input, 1.0)?;
        Ok((x, self.tensor("target", output, 1.0)?))
    }

    /// A builder over linear layers with bias: name, inputs, outputs.
    pub fn builder(&mut self, layers: &[(&str, usize, usize)]) -> Result<LoraBuilder<'static>> {
        let mut tensors = HashMap::new();
        for (layer, inputs, outputs) in layers {
            for (part, shape) in [
                ("weight", vec![*outputs, *inputs]),
                ("bias", vec![*outputs]),
            ] {
                let name = format!("{layer}.{part}");
                let scale = (*inputs as f64).powf(-0.5);
                tensors.insert(name.clone(), self.tensor(&name, &shape, scale)?);
            }
        }
        let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
        Ok(LoraBuilder::new(vb))
    }

    /// A builder over a language model's weights.
    pub fn language_model(&mut self, config: &LlamaConfig) -> Result<LoraBuilder<'static>> {
        let tensors = match &self.file {
            Some(file) => file.clone(),
            None => {
                let weights = config.random_weights(&mut self.rng, &Device::Cpu)?;
                weights.into_iter().collect()
            }
        };
        let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
        Ok(LoraBuilder::new(vb))
    }

    /// Tokens of the file, or random ones, i64.
    pub fn tokens(
        &mut self,
        name: &str,
        shape: (usize, usize),
        vocabulary: usize,
    ) -> Result<Tensor> {
        if self.file.is_some() {
            return self.tensor(name, &[shape.0, shape.1], 1.0);
        }
        let mut draw = || Ok(self.rng.below(vocabulary)? as i64);
        let tokens: Vec<i64> = (0..shape.0 * shape.1)
            .map(|_| draw())
            .collect::<Result<_>>()?;
        Ok(Tensor::from_vec(tokens, shape, &Device::Cpu)?)
    }

    /// Sets A and B of every layer of a model to those of the file, where there is one.
    pub fn fill_model(&self, adapter: &str, model: &LoraModel) -> Result<()> {
        if self.file.is_none() {
            return Ok(());
        }
        for (name, var) in model.trainable_parameters() {
            let name = name.trim_start_matches("base_model.model.");
            let name = format!("{}.{adapter}", name.trim_end_matches(".weight"));
            let tensor = self.given(&name).ok_or(format!("the file lacks {name}"))?;
            var.set(&tensor)?;
        }
        Ok(())
    }

    /// Gives `layers` an adapter, with A and B of the file where there is one.
    pub fn adapt(
        &mut self,
        adapter: &str,
        config: &LoraConfig,
        layers: &[&LoraLinear],
    ) -> Result<()> {
        for layer in layers {
            layer.add_adapter(adapter, config, &mut self.rng)?;
            self.fill(adapter, layer)?;
        }
        Ok(())
    }

    /// Sets A and B of a layer's adapter to those of the file, where there is one.
    pub fn fill(&mut self, adapter: &str, layer: &LoraLinear) -> Result<()> {
        if self.file.is_none() {
            return Ok(());
        }
        layer.set_adapter(&[adapter])?;
        for (part, var) in [("A", layer.lora_a()?), ("B", layer.lora_b()?)] {
            let name = format!("{}.lora_{part}.{adapter}", layer.name());
            var.set(&self.tensor(&name, var.dims(), 1.0)?)?;
        }
        Ok(())
    }

    /// One linear layer with an adapter.
    pub fn projection(&mut self, spec: &Spec, inputs: usize, outputs: usize) -> Result<LoraLinear> {
        let builder = self.builder(&[("proj", inputs, outputs)])?;
        let layer = builder.pp("proj").linear(inputs, outputs)?;
        self.adapt(ADAPTER, &spec.lora(["proj"]), &[&layer])?;
        Ok(layer)
    }
}
