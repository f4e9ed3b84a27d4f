//! What is learned, and how.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::models::mlp;
use crate::rng::Rng;
use crate::{Error, Result};

/// What the inner loop moves; everything else is the same for all tasks.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Adapt {
    /// All weights and biases, as in MAML.
    Full,
    /// A LoRA pair on each layer: W + s·B·A with s = `lora_alpha` / r. Weights and biases stay.
    Lora {
        /// The rank.
        r: usize,
        /// The numerator of the scaling s.
        lora_alpha: f64,
    },
    /// One LoRA pair from the network's input to its output, added to what the network says:
    /// y + s·B·A·x. The network stays. Whatever the pair learns is linear in x.
    Beside {
        /// The rank.
        r: usize,
        /// The numerator of the scaling s.
        lora_alpha: f64,
    },
}

impl Adapt {
    /// The rank and the scaling of the pairs, where there are some.
    fn pair(self) -> Option<(usize, f64)> {
        match self {
            Self::Full => None,
            Self::Lora { r, lora_alpha } | Self::Beside { r, lora_alpha } => {
                Some((r, lora_alpha / r as f64))
            }
        }
    }

    /// s of the pairs.
    pub(super) fn scaling(self) -> f64 {
        self.pair().map_or(0.0, |(_, scaling)| scaling)
    }
}

/// How the outer loop moves the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MetaMethod {
    /// Down the gradient of the query loss after the inner steps, through these steps.
    ///
    /// Source: Finn et al. 2017, arXiv:1703.03400.
    Maml,
    /// The same with each inner gradient taken for a constant: no second derivatives.
    FirstOrder,
    /// A part of the way to where the inner steps lead. These use the support and the query points
    /// in turn, for Reptile needs steps on different points.
    ///
    /// Source: Nichol et al. 2018, arXiv:1803.02999.
    Reptile,
    /// No inner steps: down the gradient of the support loss of all tasks together, the baseline of
    /// Finn et al.
    Pretrain,
}

/// The settings of a [`MetaLearner`](super::MetaLearner); by default those of Finn et al. 2017 for
/// sinusoids.
///
/// ```
/// use course::meta::{Adapt, MetaConfig};
///
/// let all = MetaConfig::default();
/// assert_eq!((all.parameters(), all.adapted()), (1761, 1761));
/// let lora = MetaConfig { adapt: Adapt::Lora { r: 1, lora_alpha: 1.0 }, ..all };
/// assert_eq!((lora.parameters(), lora.adapted()), (1923, 162));
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MetaConfig {
    /// Numbers before, between and after the layers: 1, 40, 40, 1.
    pub layer_sizes: Vec<usize>,
    /// What the inner loop moves.
    pub adapt: Adapt,
    /// How the outer loop learns.
    pub method: MetaMethod,
    /// Inner steps before the outer loss is measured: 1.
    pub inner_steps: usize,
    /// The step size α of the inner loop: 0.01.
    pub inner_rate: f64,
    /// Whether each tensor that the inner loop moves has a step size of its own, which starts at
    /// `inner_rate` and is learned by the outer loop. Off by default.
    ///
    /// Source: Li et al. 2017, arXiv:1707.09835 (Meta-SGD), with one step size per number.
    pub learn_inner_rates: bool,
    /// The learning rate of the outer loop: of Adam, 0.001, or for Reptile the part of the way.
    pub outer_rate: f64,
}

impl Default for MetaConfig {
    fn default() -> Self {
        Self {
            layer_sizes: vec![1, 40, 40, 1],
            adapt: Adapt::Full,
            method: MetaMethod::Maml,
            inner_steps: 1,
            inner_rate: 0.01,
            learn_inner_rates: false,
            outer_rate: 0.001,
        }
    }
}

impl MetaConfig {
    /// Shapes of all LoRA pairs: the name before `lora_A.weight`, its inputs and its outputs.
    fn pairs(&self) -> Vec<(String, usize, usize)> {
        let sizes = &self.layer_sizes;
        match self.adapt {
            Adapt::Full => Vec::new(),
            Adapt::Lora { .. } => {
                let layers = sizes.windows(2).enumerate();
                layers.map(|(i, s)| (layer(i), s[0], s[1])).collect()
            }
            Adapt::Beside { .. } => {
                let ends = (sizes.first().copied(), sizes.last().copied());
                vec![(
                    BESIDE.into(),
                    ends.0.unwrap_or_default(),
                    ends.1.unwrap_or_default(),
                )]
            }
        }
    }

    /// Numbers in weights, biases, LoRA pairs and learned step sizes: all that the outer loop
    /// learns.
    #[must_use]
    pub fn parameters(&self) -> usize {
        let rates = match self.learn_inner_rates {
            true => self.adapted_names().len(),
            false => 0,
        };
        mlp::count(&self.layer_sizes) + self.in_pairs() + rates
    }

    /// Numbers that the inner loop moves.
    #[must_use]
    pub fn adapted(&self) -> usize {
        match self.adapt {
            Adapt::Full => mlp::count(&self.layer_sizes),
            Adapt::Lora { .. } | Adapt::Beside { .. } => self.in_pairs(),
        }
    }

    fn in_pairs(&self) -> usize {
        let r = self.adapt.pair().map_or(0, |(r, _)| r);
        self.pairs().iter().map(|(_, i, o)| r * (i + o)).sum()
    }

    /// A start that has not been trained: weights and biases drawn evenly from ±1 / √fan-in, as
    /// PyTorch's `Linear`; LoRA pairs as PEFT's, A drawn evenly from ±1 / √fan-in and B = 0.
    ///
    /// The network of a seed is the same for every [`Adapt`].
    ///
    /// # Errors
    ///
    /// Sizes without a layer, or of 0; a rank of 0.
    pub fn random_weights(
        &self,
        rng: &mut Rng,
        device: &Device,
    ) -> Result<BTreeMap<String, Tensor>> {
        self.validate()?;
        let mut all = mlp::random_weights((NETWORK, &self.layer_sizes), rng, device)?;
        let r = self.adapt.pair().map_or(0, |(r, _)| r);
        for (name, inputs, outputs) in self.pairs() {
            let a = mlp::by_fan_in(inputs, (r, inputs), rng, device)?;
            let b = Tensor::zeros((outputs, r), DType::F32, device)?;
            all.insert(format!("{name}.lora_A.weight"), a);
            all.insert(format!("{name}.lora_B.weight"), b);
        }
        if self.learn_inner_rates {
            for name in self.adapted_names() {
                let rate = Tensor::new(self.inner_rate as f32, device)?;
                all.insert(format!("{RATE}{name}"), rate);
            }
        }
        Ok(all)
    }

    /// The names of the tensors that the inner loop moves.
    #[must_use]
    pub fn adapted_names(&self) -> Vec<String> {
        if self.adapt == Adapt::Full {
            let layers = 0..self.layer_sizes.len().saturating_sub(1);
            let names = |i| ["weight", "bias"].map(|part| format!("{}.{part}", layer(i)));
            return layers.flat_map(names).collect();
        }
        let pairs = self.pairs().into_iter();
        let names = |(name, ..): (String, usize, usize)| {
            ["lora_A", "lora_B"].map(|part| format!("{name}.{part}.weight"))
        };
        pairs.flat_map(names).collect()
    }

    /// The names and shapes of all tensors.
    pub(super) fn shapes(&self) -> Vec<(String, Vec<usize>)> {
        let mut all = Vec::new();
        for (i, s) in self.layer_sizes.windows(2).enumerate() {
            all.push((format!("{}.weight", layer(i)), vec![s[1], s[0]]));
            all.push((format!("{}.bias", layer(i)), vec![s[1]]));
        }
        let r = self.adapt.pair().map_or(0, |(r, _)| r);
        for (name, inputs, outputs) in self.pairs() {
            all.push((format!("{name}.lora_A.weight"), vec![r, inputs]));
            all.push((format!("{name}.lora_B.weight"), vec![outputs, r]));
        }
        if self.learn_inner_rates {
            let names = self.adapted_names().into_iter();
            all.extend(names.map(|name| (format!("{RATE}{name}"), vec![])));
        }
        all
    }

    pub(super) fn validate(&self) -> Result<()> {
        let refuse = |problem: &str| {
            Err(Error::Model {
                model: "MetaConfig",
                problem: problem.into(),
            })
        };
        if self.layer_sizes.len() < 2 || self.layer_sizes.contains(&0) {
            return refuse(
                "layer_sizes needs the numbers before and after each layer, none of them 0",
            );
        }
        if self
            .adapt
            .pair()
            .is_some_and(|(r, scaling)| r == 0 || !scaling.is_finite())
        {
            return refuse("r must be at least 1 and lora_alpha a finite number");
        }
        let rates = [self.inner_rate, self.outer_rate];
        if rates.iter().any(|rate| !(rate.is_finite() && *rate >= 0.0)) {
            return refuse("inner_rate and outer_rate must be finite and not negative");
        }
        let inner = matches!(self.method, MetaMethod::Maml | MetaMethod::FirstOrder);
        if self.learn_inner_rates && !inner {
            return refuse(
                "learn_inner_rates needs an outer loss behind inner steps: Maml or FirstOrder",
            );
        }
        if self.method != MetaMethod::Pretrain && self.inner_steps == 0 {
            return refuse(
                "inner_steps must be at least 1; Pretrain is the method without inner steps",
            );
        }
        if self.method == MetaMethod::Reptile && self.adapt != Adapt::Full {
            return refuse("Reptile moves only what the inner loop moves, so it needs Adapt::Full");
        }
        Ok(())
    }
}

/// What the names of the network's layers begin with.
const NETWORK: &str = "network";
/// The name of the pair beside the network.
pub(super) const BESIDE: &str = "beside";
/// What the name of a learned inner step size begins with.
pub(super) const RATE: &str = "inner_rate.";

/// The name of a layer.
pub(super) fn layer(i: usize) -> String {
    format!("{NETWORK}.layers.{i}")
}
