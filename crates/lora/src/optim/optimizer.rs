//! AdamW over groups of named parameters.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};

use candle_core::backprop::GradStore;
use candle_core::{DType, Storage, Tensor, Var};
use candle_nn::ParamsAdamW;

use super::gradients::{finite_square_norms, fitting_gradient};
use super::{ParameterGroup, not_negative};
use crate::ops::Moments;
use crate::{Error, Result};

/// AdamW with a learning rate and a weight decay for each group of parameters.
///
/// With β₁ = 0.9, β₂ = 0.999, ε = 1e-8, the group's η and λ, the schedule's factor f and the step
/// t = 1, 2, …:
///
/// m ← β₁ m + (1 − β₁) g, v ← β₂ v + (1 − β₂) g²,
/// θ ← (1 − f η λ) θ − f η · (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε)
///
/// candle's own optimisers skip a variable that has no gradient, which hides the commonest fault
/// of a fine-tuning run: part of the adapter never trains. Here a step needs a finite gradient for
/// every parameter, and says which one lacks it before it changes anything.
///
/// # Shapes
///
/// Parameters of any shape; m and v are as large as their parameter.
///
/// On the CPU a step is one pass over each parameter, on all cores, with the numbers of
/// [`candle_nn::AdamW`]; on a card, `candle_nn::AdamW` takes it.
///
/// Source: Loshchilov and Hutter, arXiv:1711.05101, algorithm 2; PyTorch `torch.optim.AdamW`.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_nn::{Linear, Module, loss::mse};
/// use lora::optim::{LoraOptimizer, ParameterGroup};
/// use lora::{LoraConfig, LoraLinear};
/// use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
///
/// let base = Linear::new(Tensor::new(&[[1f32, 0.], [0., 1.]], &Device::Cpu)?, None);
/// let mut rng = ChaCha8Rng::seed_from_u64(7);
/// let layer = LoraLinear::new("proj", base, &LoraConfig::new(2, 4.0), &mut rng)?;
/// let x = Tensor::new(&[[1f32, 0.], [0., 1.]], &Device::Cpu)?;
/// let y = Tensor::new(&[[2f32, 3.], [-1., -1.]], &Device::Cpu)?;
///
/// let group = ParameterGroup::all(layer.trainable_parameters(), 0.05);
/// let mut optimizer = LoraOptimizer::new(vec![group])?;
/// for _ in 0..200 {
///     optimizer.backward_step(&mse(&layer.forward(&x)?, &y)?)?;
/// }
/// assert!(mse(&layer.forward(&x)?, &y)?.to_scalar::<f32>()? < 1e-3);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct LoraOptimizer {
    groups: Vec<ParameterGroup>,
    /// Every group's parameters in a row.
    parameters: Vec<(String, Var)>,
    /// One for each parameter, in the same order.
    moments: Vec<Moments>,
    /// What multiplies every group's learning rate.
    factor: f64,
    /// Steps taken.
    steps: i32,
}

impl LoraOptimizer {
    /// An optimiser with moments of zero for the parameters of all groups.
    ///
    /// # Shapes
    ///
    /// Parameters of any shape.
    ///
    /// # Errors
    ///
    /// No parameter in any group; two parameters of one name; one variable under two names; a
    /// parameter of another type than f32 and f64 (in f16, ε rounds to zero and B = 0 becomes NaN
    /// at the first step); a learning rate or weight decay that is not finite or is negative.
    ///
    /// Source: PyTorch `torch.optim.Optimizer`, which refuses the same slips.
    ///
    /// ```
    /// use candle_core::{DType, Device, Var};
    /// use lora::optim::{LoraOptimizer, ParameterGroup};
    ///
    /// let half = Var::zeros((2, 4), DType::F16, &Device::Cpu)?;
    /// let name = "base_model.model.proj.lora_A.weight".to_string();
    /// let refused = LoraOptimizer::new(vec![ParameterGroup::all(vec![(name, half)], 1e-4)]);
    /// assert!(refused.unwrap_err().to_string().contains("keep adapters in f32"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn new(groups: Vec<ParameterGroup>) -> Result<Self> {
        let parameters: Vec<(String, Var)> = groups
            .iter()
            .flat_map(|group| group.parameters.iter().cloned())
            .collect();
        check_parameters(&parameters)?;
        for group in &groups {
            let what = |setting: &str| format!("group {}: {setting}", group.name);
            not_negative(what("lr"), group.lr)?;
            not_negative(what("weight_decay"), group.weight_decay)?;
        }
        let moments = parameters.iter().map(|(_, var)| Moments::new(var));
        Ok(Self {
            moments: moments.collect::<candle_core::Result<_>>()?,
            groups,
            parameters,
            factor: 1.0,
            steps: 0,
        })
    }

    /// One step of AdamW for every parameter.
    ///
    /// The formula stands at [`LoraOptimizer`]. Everything is checked first: on the errors below,
    /// neither a parameter nor a moment has changed.
    ///
    /// # Shapes
    ///
    /// Each gradient has its parameter's shape.
    ///
    /// # Errors
    ///
    /// [`Error::GradientMissing`] with the names of all parameters that `gradients` lacks;
    /// a gradient of another shape or type than its parameter; [`Error::GradientNotFinite`] for a
    /// gradient with NaN, an infinity, or numbers whose squares overflow.
    ///
    /// Source: `candle_nn::AdamW`.
    ///
    /// ```
    /// use candle_core::{Device, Var};
    /// use lora::optim::{LoraOptimizer, ParameterGroup};
    ///
    /// let (a, b) = (Var::new(&[3f32], &Device::Cpu)?, Var::new(&[4f32], &Device::Cpu)?);
    /// let parameters = vec![("a".to_string(), a.clone()), ("b".to_string(), b.clone())];
    /// let mut optimizer = LoraOptimizer::new(vec![ParameterGroup::all(parameters, 0.5)])?;
    ///
    /// // b takes no part in this loss
    /// let error = optimizer.step(&a.sqr()?.sum_all()?.backward()?).unwrap_err();
    /// assert!(error.to_string().contains("no gradient for b"));
    /// assert_eq!(a.to_vec1::<f32>()?, [3.0]);
    ///
    /// optimizer.step(&(a.sqr()? + b.sqr()?)?.sum_all()?.backward()?)?;
    /// assert_eq!((a.to_vec1::<f32>()?, b.to_vec1::<f32>()?), (vec![2.5], vec![3.5]));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn step(&mut self, gradients: &GradStore) -> Result<()> {
        let mut present = Vec::with_capacity(self.parameters.len());
        let mut missing = Vec::new();
        for (name, var) in &self.parameters {
            match fitting_gradient(gradients, name, var)? {
                Some(gradient) => present.push((name.as_str(), gradient)),
                None => missing.push(name.clone()),
            }
        }
        if !missing.is_empty() {
            return Err(Error::GradientMissing {
                names: missing,
                of: self.parameters.len(),
            });
        }
        finite_square_norms(present.iter().copied())?;
        let gradients = self.apart(present.into_iter().map(|(_, gradient)| gradient))?;

        self.steps = self.steps.saturating_add(1);
        let parameters = self.parameters.iter().zip(&mut self.moments);
        let mut parameters = parameters.zip(gradients);
        for group in &self.groups {
            let params = ParamsAdamW {
                lr: self.factor * group.lr,
                beta1: 0.9,
                beta2: 0.999,
                eps: 1e-8,
                weight_decay: group.weight_decay,
            };
            let own = parameters.by_ref().take(group.parameters.len());
            for (((_, var), moments), gradient) in own {
                moments.step(var, &gradient, &params, self.steps)?;
            }
        }
        Ok(())
    }

    /// The gradients, copied where they lie in the storage of a parameter, which the step changes.
    fn apart<'a>(&self, gradients: impl Iterator<Item = &'a Tensor>) -> Result<Vec<Tensor>> {
        let changing: HashSet<_> = self.parameters.iter().map(|(_, p)| storage(p)).collect();
        let apart = gradients.map(|gradient| match changing.contains(&storage(gradient)) {
            true => gradient.copy(),
            false => Ok(gradient.clone()),
        });
        Ok(apart.collect::<candle_core::Result<_>>()?)
    }

    /// The backward pass of `loss` and a [`step`](Self::step) with its gradients.
    ///
    /// # Shapes
    ///
    /// `loss`: a single number.
    ///
    /// # Errors
    ///
    /// A loss with more than one number; what the backward pass and [`step`](Self::step) refuse.
    ///
    /// ```
    /// use candle_core::{Device, Var};
    /// use lora::optim::{LoraOptimizer, ParameterGroup};
    ///
    /// let a = Var::new(&[3f32], &Device::Cpu)?;
    /// let group = ParameterGroup::all(vec![("a".to_string(), a.clone())], 0.5);
    /// let mut optimizer = LoraOptimizer::new(vec![group])?;
    /// optimizer.backward_step(&a.sqr()?.sum_all()?)?;
    /// assert_eq!(a.to_vec1::<f32>()?, [2.5]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn backward_step(&mut self, loss: &Tensor) -> Result<()> {
        if loss.elem_count() != 1 {
            return Err(Error::Loss {
                shape: loss.dims().to_vec(),
            });
        }
        self.step(&loss.backward()?)
    }

    /// Sets every group's learning rate to f · its base rate; a [`Schedule`](super::Schedule)
    /// gives the f. Each call starts from the base rates, so factors do not pile up.
    ///
    /// # Errors
    ///
    /// A factor that is not finite or is negative; the rates stay as they were.
    ///
    /// ```
    /// use candle_core::{Device, Var};
    /// use lora::optim::{LoraOptimizer, ParameterGroup};
    ///
    /// let a = Var::new(&[3f32], &Device::Cpu)?;
    /// let group = ParameterGroup::all(vec![("a".to_string(), a)], 0.5);
    /// let mut optimizer = LoraOptimizer::new(vec![group])?;
    /// optimizer.set_learning_rate_factor(0.5)?;
    /// optimizer.set_learning_rate_factor(0.5)?;
    /// assert_eq!(optimizer.learning_rates(), [("all", 0.25)]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn set_learning_rate_factor(&mut self, factor: f64) -> Result<()> {
        self.factor = not_negative("LoraOptimizer: learning rate factor", factor)?;
        Ok(())
    }

    /// Each group's name and the learning rate of its next step, the factor included.
    ///
    /// ```
    /// use candle_core::{Device, Var};
    /// use lora::optim::{LoraOptimizer, ParameterGroup};
    ///
    /// let a = Var::new(&[3f32], &Device::Cpu)?;
    /// let group = ParameterGroup::all(vec![("a".to_string(), a)], 0.5);
    /// assert_eq!(LoraOptimizer::new(vec![group])?.learning_rates(), [("all", 0.5)]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn learning_rates(&self) -> Vec<(&str, f64)> {
        self.groups
            .iter()
            .map(|group| (group.name.as_str(), self.factor * group.lr))
            .collect()
    }

    /// The groups as given, with their base learning rates.
    ///
    /// ```
    /// use candle_core::{Device, Var};
    /// use lora::optim::{LoraOptimizer, ParameterGroup};
    ///
    /// let a = Var::new(&[3f32], &Device::Cpu)?;
    /// let group = ParameterGroup::all(vec![("a".to_string(), a)], 0.5);
    /// let mut optimizer = LoraOptimizer::new(vec![group])?;
    /// optimizer.set_learning_rate_factor(0.1)?;
    /// assert_eq!(optimizer.groups()[0].lr, 0.5);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn groups(&self) -> &[ParameterGroup] {
        &self.groups
    }

    /// The parameters of all groups, for [`clip_grad_norm`](super::clip_grad_norm) and
    /// [`GradientAccumulator`](super::GradientAccumulator).
    ///
    /// ```
    /// use candle_core::{Device, Var};
    /// use lora::optim::{LoraOptimizer, ParameterGroup};
    ///
    /// let a = Var::new(&[3f32], &Device::Cpu)?;
    /// let group = ParameterGroup::all(vec![("a".to_string(), a)], 0.5);
    /// let optimizer = LoraOptimizer::new(vec![group])?;
    /// assert_eq!(optimizer.parameters()[0].0, "a");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn parameters(&self) -> &[(String, Var)] {
        &self.parameters
    }

    /// The memory of the moments m and v: twice that of the parameters.
    ///
    /// ```
    /// use candle_core::{DType, Device, Var};
    /// use lora::optim::{LoraOptimizer, ParameterGroup};
    ///
    /// let a = Var::zeros((8, 768), DType::F32, &Device::Cpu)?;
    /// let group = ParameterGroup::all(vec![("a".to_string(), a)], 1e-4);
    /// assert_eq!(LoraOptimizer::new(vec![group])?.optimizer_bytes(), 2 * 8 * 768 * 4);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn optimizer_bytes(&self) -> usize {
        let bytes = |var: &Var| var.elem_count() * var.dtype().size_in_bytes();
        2 * self.parameters.iter().map(|(_, v)| bytes(v)).sum::<usize>()
    }
}

/// Where a tensor's numbers lie; the same for all its views.
fn storage(tensor: &Tensor) -> *const Storage {
    &raw const *tensor.storage_and_layout().0
}

/// Refuses no parameters, types that AdamW cannot train, and doubles.
fn check_parameters(parameters: &[(String, Var)]) -> Result<()> {
    if parameters.is_empty() {
        return Err(Error::NoParameters);
    }
    let mut vars = HashMap::new();
    let mut names = HashSet::new();
    for (name, var) in parameters {
        if !matches!(var.dtype(), DType::F32 | DType::F64) {
            return Err(Error::ParameterType {
                name: name.clone(),
                dtype: var.dtype(),
            });
        }
        if !names.insert(name) {
            return Err(Error::ParameterName { name: name.clone() });
        }
        match vars.entry(var.id()) {
            Entry::Vacant(entry) => entry.insert(name),
            Entry::Occupied(first) => {
                return Err(Error::ParameterTwice {
                    first: (*first.get()).clone(),
                    second: name.clone(),
                });
            }
        };
    }
    Ok(())
}
