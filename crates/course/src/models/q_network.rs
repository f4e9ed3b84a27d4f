//! The network of a DQN: what each action is worth.

use std::collections::BTreeMap;
use std::fmt;

use candle_core::{Device, Module, Tensor};
use lora::LoraBuilder;
use serde::{Deserialize, Serialize};

use super::mlp::{self, Between, Mlp, Snapshot};
use crate::Result;
use crate::chart::grouped;
use crate::rng::Rng;

/// The sizes of a [`QNetwork`].
///
/// ```
/// let config = course::models::QNetworkConfig::default();
/// assert_eq!(config.parameter_count(), 4 * 64 + 64 + 64 * 64 + 64 + 64 * 2 + 2);
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QNetworkConfig {
    /// Numbers of an observation.
    pub state_size: usize,
    /// Numbers between the layers.
    pub hidden_sizes: Vec<usize>,
    /// How many actions there are.
    pub action_size: usize,
}

impl Default for QNetworkConfig {
    /// CartPole's sizes, as on the slide: 4 → 64 → 64 → 2.
    fn default() -> Self {
        Self {
            state_size: 4,
            hidden_sizes: vec![64, 64],
            action_size: 2,
        }
    }
}

impl QNetworkConfig {
    fn sizes(&self) -> Vec<usize> {
        [
            &[self.state_size],
            &self.hidden_sizes[..],
            &[self.action_size],
        ]
        .concat()
    }

    /// Weights and biases.
    #[must_use]
    pub fn parameter_count(&self) -> usize {
        mlp::count(&self.sizes())
    }

    /// The weights of a network that has not been trained, below `q`: drawn evenly from
    /// ±1 / √fan-in.
    ///
    /// # Errors
    ///
    /// What candle reports when it moves a tensor to `device`.
    pub fn random_weights(
        &self,
        rng: &mut Rng,
        device: &Device,
    ) -> Result<BTreeMap<String, Tensor>> {
        mlp::random_weights(("q", &self.sizes()), rng, device)
    }
}

/// Linear layers with ReLU between them that give the value of each action: the discounted
/// rewards that follow if the best is done from then on.
///
/// Its layers are `q.layers.0`, `q.layers.1`, ….
///
/// Source: Mnih et al. 2015, doi:10.1038/nature14236.
///
/// ```
/// use course::models::{QNetwork, QNetworkConfig};
/// use course::prelude::*;
/// use course::candle_nn::VarBuilder;
///
/// let config = QNetworkConfig::default();
/// let weights = config.random_weights(&mut rng(1), &Device::Cpu)?.into_iter().collect();
/// let builder = LoraBuilder::new(VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu));
/// let q = QNetwork::new(&config, &builder)?;
/// let observations = rng(2).randn((3, 4), &Device::Cpu)?;
/// assert_eq!(q.forward_t(&observations, false)?.dims(), [3, 2]);
/// # Ok::<(), course::Error>(())
/// ```
#[derive(Debug)]
pub struct QNetwork {
    config: QNetworkConfig,
    layers: Mlp,
}

impl QNetwork {
    /// The network of the builder's weights; adapters come from the builder's
    /// [`model`](LoraBuilder::model).
    ///
    /// # Errors
    ///
    /// A weight that is missing or of another shape.
    pub fn new(config: &QNetworkConfig, builder: &LoraBuilder<'_>) -> Result<Self> {
        Ok(Self {
            layers: Mlp::new(&config.sizes(), Between::Relu, &builder.pp("q"))?,
            config: config.clone(),
        })
    }

    /// The sizes.
    #[must_use]
    pub fn config(&self) -> &QNetworkConfig {
        &self.config
    }

    /// The value of each action; `train` turns the adapters' dropout on.
    ///
    /// # Shapes
    ///
    /// `observations` [n, `state_size`] → [n, `action_size`].
    ///
    /// # Errors
    ///
    /// Observations of another shape.
    pub fn forward_t(&self, observations: &Tensor, train: bool) -> Result<Tensor> {
        mlp::rows(observations, &[self.config.state_size], "QNetwork")?;
        self.layers.forward_t(observations, train)
    }

    /// The network as it is now, with its adapters merged: a target network, or a policy to keep.
    ///
    /// # Errors
    ///
    /// What candle reports.
    pub fn snapshot(&self) -> Result<QSnapshot> {
        Ok(QSnapshot {
            layers: self.layers.snapshot()?,
            state_size: self.config.state_size,
        })
    }
}

impl Module for QNetwork {
    fn forward(&self, observations: &Tensor) -> candle_core::Result<Tensor> {
        self.forward_t(observations, false)
            .map_err(candle_core::Error::wrap)
    }
}

impl fmt::Display for QNetwork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sizes = mlp::words(&self.config.sizes());
        let count = grouped(&self.config.parameter_count().to_string());
        write!(f, "QNetwork {sizes} with {count} parameters")
    }
}

/// A [`QNetwork`] as it was at one moment; it has no gradients.
#[derive(Clone, Debug)]
pub struct QSnapshot {
    layers: Snapshot,
    state_size: usize,
}

impl QSnapshot {
    /// The value of each action.
    ///
    /// # Shapes
    ///
    /// `observations` [n, `state_size`] → [n, `action_size`].
    ///
    /// # Errors
    ///
    /// Observations of another shape.
    pub fn forward(&self, observations: &Tensor) -> Result<Tensor> {
        mlp::rows(observations, &[self.state_size], "QSnapshot")?;
        self.layers.forward(observations)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::testing::gap;
    use crate::rng::rng;
    use candle_core::DType;
    use candle_nn::VarBuilder;
    use lora::{LoraConfig, LoraModel, TargetModules};

    const CPU: Device = Device::Cpu;

    fn sizes() -> QNetworkConfig {
        QNetworkConfig {
            state_size: 3,
            hidden_sizes: vec![5],
            action_size: 4,
        }
    }

    fn network() -> (BTreeMap<String, Tensor>, QNetwork, LoraModel) {
        let weights = sizes().random_weights(&mut rng(1), &CPU).unwrap();
        let vb = VarBuilder::from_tensors(weights.clone().into_iter().collect(), DType::F32, &CPU);
        let builder = LoraBuilder::new(vb);
        let q = QNetwork::new(&sizes(), &builder).unwrap();
        (weights, q, builder.model().unwrap())
    }

    #[test]
    fn the_values_by_hand() -> Result<()> {
        let (weights, q, _) = network();
        let count: usize = weights.values().map(Tensor::elem_count).sum();
        assert_eq!(count, sizes().parameter_count());
        let x = rng(2).randn((6, 3), &CPU)?;
        let layer = |x: &Tensor, i: usize| -> candle_core::Result<Tensor> {
            let of = |part: &str| &weights[&format!("q.layers.{i}.{part}")];
            x.matmul(&of("weight").t()?)?.broadcast_add(of("bias"))
        };
        let want = layer(&layer(&x, 0)?.relu()?, 1)?;
        assert!(gap(&q.forward_t(&x, false)?, &want) < 1e-6);
        Ok(())
    }

    #[test]
    fn a_snapshot_has_the_adapter_and_stays() -> Result<()> {
        let (_, q, mut model) = network();
        let everywhere = TargetModules::regex(".*layers.*");
        let config = LoraConfig::new(2, 4.0).with_targets(everywhere);
        model.add_adapter("a", &config, &mut rng(3))?;
        let vars = model.trainable_parameters();
        let x = rng(2).randn((6, 3), &CPU)?;
        let base = q.forward_t(&x, false)?;
        for (_, var) in &vars {
            var.set(&rng(4).randn(var.shape(), &CPU)?)?;
        }
        let then = q.forward_t(&x, false)?;
        assert!(gap(&then, &base) > 0.1, "the adapter does something");
        let snapshot = q.snapshot()?;
        assert!(gap(&snapshot.forward(&x)?, &then) < 1e-5);
        for (_, var) in &vars {
            var.set(&(var.as_tensor() * 2.0)?)?;
        }
        assert!(
            gap(&snapshot.forward(&x)?, &then) < 1e-5,
            "training goes on"
        );
        Ok(())
    }

    /// A weight of one row lies in memory as its transpose does: it must be copied all the same.
    #[test]
    fn a_snapshot_of_trained_weights_stays() -> Result<()> {
        let sizes = QNetworkConfig {
            state_size: 1,
            hidden_sizes: vec![],
            action_size: 2,
        };
        let weights = sizes
            .random_weights(&mut rng(1), &CPU)?
            .into_iter()
            .collect();
        let builder = LoraBuilder::trainable(VarBuilder::from_tensors(weights, DType::F32, &CPU));
        let q = QNetwork::new(&sizes, &builder)?;
        let x = Tensor::new(&[[2f32]], &CPU)?;
        let (snapshot, then) = (q.snapshot()?, q.forward_t(&x, false)?);
        for (_, var) in builder.variables() {
            var.set(&var.zeros_like()?)?;
        }
        assert!(gap(&snapshot.forward(&x)?, &then) < 1e-6);
        Ok(())
    }

    #[test]
    fn other_shapes_are_refused_by_name() -> Result<()> {
        let (_, q, _) = network();
        let error = q
            .forward_t(&rng(1).randn((2, 4), &CPU)?, false)
            .unwrap_err();
        assert!(error.to_string().contains("QNetwork"), "{error}");
        let snapshot = q.snapshot()?;
        let error = snapshot.forward(&rng(1).randn(3, &CPU)?).unwrap_err();
        assert!(error.to_string().contains("QSnapshot"), "{error}");
        Ok(())
    }
}
