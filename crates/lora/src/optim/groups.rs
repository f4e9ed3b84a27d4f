//! Which parameters train together, and how fast.

use candle_core::Var;

use super::positive;
use crate::Result;

/// Parameters that share a learning rate and a weight decay.
///
/// The fields are open: change a rate or move a parameter before the group goes into
/// [`LoraOptimizer::new`](super::LoraOptimizer::new), which checks them.
///
/// ```
/// use candle_core::{DType, Device, Var};
/// use lora::optim::{LoraOptimizer, ParameterGroup};
///
/// let a = Var::zeros((2, 4), DType::F32, &Device::Cpu)?;
/// let group = ParameterGroup {
///     name: "down".to_string(),
///     parameters: vec![("base_model.model.proj.lora_A.weight".to_string(), a)],
///     lr: 1e-4,
///     weight_decay: 0.0,
/// };
/// let optimizer = LoraOptimizer::new(vec![group])?;
/// assert_eq!(optimizer.learning_rates(), [("down", 1e-4)]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct ParameterGroup {
    /// What the group is called in reports and errors.
    pub name: String,
    /// The variables under their PEFT names.
    pub parameters: Vec<(String, Var)>,
    /// The base learning rate η; a schedule multiplies it.
    pub lr: f64,
    /// The decoupled weight decay λ; 0 switches it off.
    pub weight_decay: f64,
}

impl ParameterGroup {
    /// One group, named `all`, of every parameter.
    ///
    /// The weight decay is 0, as in Hugging Face's `TrainingArguments`; PyTorch's AdamW has 0.01
    /// by default. For another, see [`with_weight_decay`](Self::with_weight_decay).
    ///
    /// Source: transformers `TrainingArguments.weight_decay`.
    ///
    /// ```
    /// use candle_core::{DType, Device, Var};
    /// use lora::optim::ParameterGroup;
    ///
    /// let a = Var::zeros((2, 4), DType::F32, &Device::Cpu)?;
    /// let name = "base_model.model.proj.lora_A.weight".to_string();
    /// let group = ParameterGroup::all(vec![(name, a)], 1e-4);
    /// assert_eq!((group.name.as_str(), group.lr, group.weight_decay), ("all", 1e-4, 0.0));
    /// assert_eq!(group.parameters.len(), 1);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn all(parameters: Vec<(String, Var)>, lr: f64) -> Self {
        Self {
            name: "all".to_string(),
            parameters,
            lr,
            weight_decay: 0.0,
        }
    }

    /// The same group with the decoupled weight decay λ: a step first multiplies each parameter by
    /// 1 − η λ.
    ///
    /// Source: Loshchilov and Hutter, arXiv:1711.05101, algorithm 2.
    ///
    /// ```
    /// use lora::optim::ParameterGroup;
    ///
    /// let group = ParameterGroup::all(Vec::new(), 1e-4).with_weight_decay(0.01);
    /// assert_eq!(group.weight_decay, 0.01);
    /// ```
    #[must_use]
    pub fn with_weight_decay(mut self, weight_decay: f64) -> Self {
        self.weight_decay = weight_decay;
        self
    }
}

/// What [`loraplus_groups`] can be told besides the learning rate and the ratio.
///
/// Source: PEFT `optimizers/loraplus.py`, `loraplus_weight_decay` and `loraplus_lr_embedding`.
///
/// ```
/// use lora::optim::LoraPlusOptions;
///
/// let options = LoraPlusOptions::default();
/// assert_eq!((options.weight_decay, options.lr_embedding), (0.0, 1e-6));
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoraPlusOptions {
    /// The weight decay of every group except `groupB_no_decay`. PEFT's default is 0.
    pub weight_decay: f64,
    /// The learning rate of A and B of embedding layers. PEFT's default is 1e-6.
    pub lr_embedding: f64,
}

impl Default for LoraPlusOptions {
    fn default() -> Self {
        Self {
            weight_decay: 0.0,
            lr_embedding: 1e-6,
        }
    }
}

/// LoRA+: the matrices B learn `ratio` times as fast as the matrices A.
///
/// η_A = lr, η_B = ratio · lr. The paper's experiments favour a ratio of about 2⁴; PEFT advises at
/// least 1, with an lr somewhat below the usual. A ratio of 1 is plain LoRA. Parameters go by
/// their names:
///
/// | group             | learning rate  | weight decay   | holds                                |
/// |-------------------|----------------|----------------|--------------------------------------|
/// | `groupA`          | lr             | `weight_decay` | `lora_A`, other matrices             |
/// | `embedding`       | `lr_embedding` | `weight_decay` | `lora_embedding_A` and `_B`          |
/// | `groupB`          | ratio · lr     | `weight_decay` | `lora_B`, `lora_magnitude_vector`    |
/// | `groupB_no_decay` | ratio · lr     | 0              | `lora_B.bias`, other biases          |
///
/// Groups keep the order of the table and of `parameters`; an empty one is left out. PEFT also
/// spares the weight of a trained `LayerNorm` from decay, which a name alone does not show: with
/// such a parameter and a decay above 0, move it to `groupB_no_decay` yourself.
///
/// # Shapes
///
/// Any; only whether a parameter is a vector (rank 1) matters.
///
/// # Errors
///
/// A ratio that is not finite and positive. The rates themselves are checked by
/// [`LoraOptimizer::new`](super::LoraOptimizer::new).
///
/// Source: Hayou et al. 2024, arXiv:2402.12354, section 4; PEFT `optimizers/loraplus.py`,
/// `create_loraplus_optimizer`.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::Linear;
/// use lora::optim::{LoraOptimizer, LoraPlusOptions, loraplus_groups};
/// use lora::{LoraConfig, LoraLinear};
/// use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
///
/// let base = Linear::new(Tensor::ones((3, 4), DType::F32, &Device::Cpu)?, None);
/// let mut rng = ChaCha8Rng::seed_from_u64(1);
/// let layer = LoraLinear::new("q_proj", base, &LoraConfig::new(2, 4.0), &mut rng)?;
///
/// let options = LoraPlusOptions::default();
/// let groups = loraplus_groups(layer.trainable_parameters(), 0.5, 16.0, options)?;
/// let optimizer = LoraOptimizer::new(groups)?;
/// assert_eq!(optimizer.learning_rates(), [("groupA", 0.5), ("groupB", 8.0)]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn loraplus_groups(
    parameters: Vec<(String, Var)>,
    lr: f64,
    ratio: f64,
    options: LoraPlusOptions,
) -> Result<Vec<ParameterGroup>> {
    let ratio = positive("loraplus_groups: ratio", ratio)?;
    let decay = options.weight_decay;
    let mut groups = [
        ("groupA", lr, decay),
        ("embedding", options.lr_embedding, decay),
        ("groupB", ratio * lr, decay),
        ("groupB_no_decay", ratio * lr, 0.0),
    ]
    .map(|(name, lr, weight_decay)| ParameterGroup {
        name: name.to_string(),
        parameters: Vec::new(),
        lr,
        weight_decay,
    });

    let [a, embedding, b, b_no_decay] = &mut groups;
    for (name, var) in parameters {
        let has = |part: &str| name.split('.').any(|segment| segment == part);
        let group = if has("lora_embedding_A") || has("lora_embedding_B") {
            &mut *embedding
        } else if !has("lora_B") && var.rank() != 1 {
            &mut *a
        } else if name.contains("bias") {
            &mut *b_no_decay
        } else {
            &mut *b
        };
        group.parameters.push((name, var));
    }
    Ok(groups
        .into_iter()
        .filter(|group| !group.parameters.is_empty())
        .collect())
}
