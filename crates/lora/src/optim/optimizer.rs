//! AdamW over groups of named parameters.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet};

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Storage, Tensor, Var};
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
/// On the CPU a step is one pass over each parameter, on all cores; on a card, candle's operations
/// make it. The numbers are those of [`candle_nn::AdamW`]. [`state_dict`](Self::state_dict) keeps what
/// a run needs to go on after a stop.
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

    /// What the optimiser remembers: `step`, the steps taken, and for each parameter
    /// `NAME.exp_avg`, which is m, and `NAME.exp_avg_sq`, which is v. Learning rates and weight
    /// decay belong to the groups and are not among it.
    ///
    /// # Shapes
    ///
    /// `step` () of i64; m and v as their parameter, copied.
    ///
    /// # Errors
    ///
    /// What candle reports.
    ///
    /// Source: the names of PyTorch's `torch.optim.AdamW.state_dict`.
    ///
    /// ```
    /// use candle_core::{Device, Tensor, Var};
    /// use lora::optim::{LoraOptimizer, ParameterGroup};
    ///
    /// let optimizer = |a: &Var| {
    ///     LoraOptimizer::new(vec![ParameterGroup::all(vec![("a".to_string(), a.clone())], 0.5)])
    /// };
    /// let step = |optimizer: &mut LoraOptimizer, a: &Var| optimizer.backward_step(&a.sqr()?.sum_all()?);
    /// let a = Var::new(&[3f32], &Device::Cpu)?;
    /// let mut first = optimizer(&a)?;
    /// step(&mut first, &a)?;
    ///
    /// // A copy of the parameter and of the state goes on in the same way.
    /// let b = Var::from_tensor(&a.as_tensor().copy()?)?;
    /// let mut second = optimizer(&b)?;
    /// second.load_state_dict(&first.state_dict()?)?;
    /// step(&mut first, &a)?;
    /// step(&mut second, &b)?;
    /// assert_eq!(a.to_vec1::<f32>()?, b.to_vec1::<f32>()?);
    /// # Ok::<(), lora::Error>(())
    /// ```
    pub fn state_dict(&self) -> Result<BTreeMap<String, Tensor>> {
        let steps = Tensor::new(i64::from(self.steps), &Device::Cpu)?;
        let mut state = BTreeMap::from([("step".to_string(), steps)]);
        for ((name, var), moments) in self.parameters.iter().zip(&self.moments) {
            let [m, v] = moments.tensors(var)?;
            state.insert(format!("{name}.exp_avg"), m);
            state.insert(format!("{name}.exp_avg_sq"), v);
        }
        Ok(state)
    }

    /// Takes over what [`state_dict`](Self::state_dict) gave, of an optimiser over parameters of the
    /// same names.
    ///
    /// # Errors
    ///
    /// [`Error::OptimizerState`] with the name of a tensor that is missing, left over, or of
    /// another shape or type. Nothing has changed then.
    pub fn load_state_dict(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        let refuse = |name: &str, problem: String| Error::OptimizerState {
            name: name.to_string(),
            problem,
        };
        let get = |name: String| {
            let tensor = state.get(&name);
            tensor.ok_or_else(|| refuse(&name, "it is missing".to_string()))
        };
        let steps = get("step".to_string())?;
        let taken = steps
            .to_dtype(DType::I64)?
            .flatten_all()?
            .to_vec1::<i64>()?;
        let taken = match taken[..] {
            [steps] => i32::try_from(steps).ok().filter(|steps| *steps >= 0),
            _ => None,
        };
        let Some(taken) = taken else {
            return Err(refuse("step", format!("{steps} is no number of steps")));
        };
        let mut moments = Vec::with_capacity(self.parameters.len());
        for (name, var) in &self.parameters {
            let pair = [
                get(format!("{name}.exp_avg"))?,
                get(format!("{name}.exp_avg_sq"))?,
            ];
            for (part, moment) in ["exp_avg", "exp_avg_sq"].into_iter().zip(pair) {
                if moment.dims() != var.dims() || moment.dtype() != var.dtype() {
                    let (got, want) = ((moment.dims(), moment.dtype()), (var.dims(), var.dtype()));
                    let problem = format!("it is {got:?}, and its parameter {want:?}");
                    return Err(refuse(&format!("{name}.{part}"), problem));
                }
            }
            moments.push(pair);
        }
        let known = 1 + 2 * moments.len();
        if state.len() != known {
            let of = |(name, _): &(String, Var)| {
                [format!("{name}.exp_avg"), format!("{name}.exp_avg_sq")]
            };
            let ours: HashSet<String> = self.parameters.iter().flat_map(of).collect();
            let other = state
                .keys()
                .find(|name| *name != "step" && !ours.contains(*name));
            let other = other.map_or("", String::as_str);
            return Err(refuse(other, "no parameter has this name".to_string()));
        }
        for (own, pair) in self.moments.iter_mut().zip(moments) {
            own.set(pair)?;
        }
        self.steps = taken;
        Ok(())
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
