//! What a case is: its settings, and one iteration of it.

use course::candle_core::{Tensor, Var};
use course::lora::optim::{LoraOptimizer, ParameterGroup};
use course::lora::{Init, LoraConfig};
use serde::Deserialize;

/// Whatever can go wrong, in words.
pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// One iteration: a step gives its loss, a forward pass its output.
pub type Case = Box<dyn FnMut() -> Result<Tensor>>;

/// The settings of a case, as the driver sends them to every side.
#[derive(Clone, Deserialize)]
pub struct Spec {
    pub case: String,
    /// The case whose products the case `floor` is made of.
    pub of: Option<Box<Spec>>,
    pub r: Option<usize>,
    pub batch: Option<usize>,
    pub rows: Option<usize>,
    pub tokens: Option<usize>,
    pub adapters: Option<usize>,
    pub form: Option<String>,
    pub lr: Option<f64>,
    pub layers: Option<usize>,
}

impl Spec {
    /// The adapter's configuration; B starts random, so that every product counts.
    pub fn lora<const N: usize>(&self, targets: [&str; N]) -> LoraConfig {
        LoraConfig::new(self.r.unwrap_or(8), 16.0)
            .with_targets(targets)
            .with_init(Init::Random)
    }

    /// A training step of `parameters`: forward, loss, backward, AdamW.
    pub fn training(
        &self,
        parameters: Vec<(String, Var)>,
        loss: impl Fn() -> Result<Tensor> + 'static,
    ) -> Result<Case> {
        let group = ParameterGroup::all(parameters, self.lr.unwrap_or(1e-4));
        let mut optimizer = LoraOptimizer::new(vec![group])?;
        Ok(Box::new(move || {
            let loss = loss()?;
            optimizer.backward_step(&loss)?;
            Ok(loss)
        }))
    }
}
