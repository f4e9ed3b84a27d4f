//! The outer loop.

use candle_core::{DType, Tensor, Var};
use lora::optim::{LoraOptimizer, ParameterGroup};

use super::config::RATE;
use super::network::refused;
use super::{InnerRates, MetaConfig, MetaMethod, MetaNetwork, Parameters, Tasks, inner_step};
use crate::Result;

/// A start for a network, the inner loop that adapts it to a task, and the outer loop that makes it
/// a better start.
///
/// A checkpoint is opened with `MetaLearner::new(&checkpoint.config()?, &checkpoint.tensors(&device)?)`.
#[derive(Debug)]
pub struct MetaLearner {
    config: MetaConfig,
    network: MetaNetwork,
    variables: Vec<(String, Var)>,
    optimizer: LoraOptimizer,
    /// What multiplies the outer rate.
    factor: f64,
}

impl MetaLearner {
    /// A learner that starts from these weights, in f32 or f64.
    ///
    /// Adam is without weight decay.
    ///
    /// # Errors
    ///
    /// Settings that exclude each other; a weight that is missing, has another shape or is unknown.
    pub fn new(config: &MetaConfig, weights: &Parameters) -> Result<Self> {
        let network = MetaNetwork::new(config)?;
        let shapes = config.shapes();
        if let Some(name) = weights
            .keys()
            .find(|name| shapes.iter().all(|(of, _)| of != *name))
        {
            return Err(refused(format!("{name} is no parameter of this network")));
        }
        let mut variables = Vec::new();
        for (name, shape) in shapes {
            match weights.get(&name) {
                Some(weight) if weight.dims() == shape => {
                    variables.push((name, Var::from_tensor(&weight.copy()?)?));
                }
                got => {
                    let got = got.map_or("missing".into(), |w| format!("of shape {:?}", w.dims()));
                    return Err(refused(format!("{name} must be {shape:?} and is {got}")));
                }
            }
        }
        let group = ParameterGroup::all(variables.clone(), config.outer_rate);
        Ok(Self {
            optimizer: LoraOptimizer::new(vec![group.with_weight_decay(0.0)])?,
            config: config.clone(),
            network,
            variables,
            factor: 1.0,
        })
    }

    /// What the outer loop learns, by name.
    #[must_use]
    pub fn variables(&self) -> &[(String, Var)] {
        &self.variables
    }

    /// The network, for what goes beyond the methods here.
    #[must_use]
    pub fn network(&self) -> &MetaNetwork {
        &self.network
    }

    /// The start as it is now, connected with the variables.
    #[must_use]
    pub fn start(&self) -> Parameters {
        self.named(|var| var.as_tensor().clone())
    }

    /// The start as constants, so that a forward pass keeps nothing for a backward pass.
    fn constants(&self) -> Parameters {
        self.named(|var| var.as_detached_tensor())
    }

    fn named(&self, tensor: impl Fn(&Var) -> Tensor) -> Parameters {
        let each = |(name, var): &(String, Var)| (name.clone(), tensor(var));
        self.variables.iter().map(each).collect()
    }

    /// The step sizes among these parameters, or the constant one.
    fn rates(&self, start: &Parameters) -> InnerRates {
        if !self.config.learn_inner_rates {
            return InnerRates::Same(self.config.inner_rate);
        }
        let rate = |(name, rate): (&String, &Tensor)| {
            let of = name.strip_prefix(RATE)?;
            Some((of.to_string(), rate.clone()))
        };
        InnerRates::Each(start.iter().filter_map(rate).collect())
    }

    /// The parameters after `steps` inner steps on these points, one set per task, as constants.
    ///
    /// # Shapes
    ///
    /// `x` [tasks, n, in], `y` [tasks, n, out].
    ///
    /// # Errors
    ///
    /// Points of another shape.
    pub fn adapt(&self, x: &Tensor, y: &Tensor, steps: usize) -> Result<Parameters> {
        self.descend(self.constants(), |_| (x, y), steps)
    }

    /// What the network says of points with these parameters.
    ///
    /// # Shapes
    ///
    /// `x` [tasks, n, in] → [tasks, n, out].
    ///
    /// # Errors
    ///
    /// Points of another shape.
    pub fn predict(&self, parameters: &Parameters, x: &Tensor) -> Result<Tensor> {
        self.network.forward(parameters, x)
    }

    /// `steps` inner steps from `start`, each on the points that `at` gives for it.
    fn descend<'a>(
        &self,
        start: Parameters,
        at: impl Fn(usize) -> (&'a Tensor, &'a Tensor),
        steps: usize,
    ) -> Result<Parameters> {
        let rates = self.rates(&start);
        let mut parameters = start;
        for step in 0..steps {
            let (x, y) = at(step);
            let mut gradients = self.network.gradients(&parameters, x, y)?;
            if self.config.method == MetaMethod::FirstOrder {
                gradients.values_mut().for_each(|g| *g = g.detach());
            }
            parameters = inner_step(&parameters, &gradients, &rates)?;
        }
        Ok(parameters)
    }

    /// The outer loss: the mean squared error at the query points after the inner steps, averaged
    /// over the tasks; for [`MetaMethod::Pretrain`] that at the support points before any step.
    ///
    /// Its backward pass gives the gradient of every variable. Reptile has no such loss: there it is
    /// only for watching.
    ///
    /// # Shapes
    ///
    /// → ()
    ///
    /// # Errors
    ///
    /// Tasks whose points have another shape.
    pub fn meta_loss(&self, tasks: &Tasks) -> Result<Tensor> {
        let support = (&tasks.support_x, &tasks.support_y);
        let (parameters, (x, y)) = match self.config.method {
            MetaMethod::Pretrain => (self.start(), support),
            _ => {
                let adapted = self.descend(self.start(), |_| support, self.config.inner_steps)?;
                (adapted, (&tasks.query_x, &tasks.query_y))
            }
        };
        Ok(self.network.errors(&parameters, x, y)?.mean_all()?)
    }

    /// One step of the outer loop, and the outer loss before it.
    ///
    /// # Errors
    ///
    /// Tasks whose points have another shape; a gradient, or with Reptile a loss, that is not finite.
    /// The start is then as before.
    pub fn meta_step(&mut self, tasks: &Tasks) -> Result<f64> {
        if self.config.method == MetaMethod::Reptile {
            return self.reptile_step(tasks);
        }
        let loss = self.meta_loss(tasks)?;
        self.optimizer.backward_step(&loss)?;
        Ok(loss.to_dtype(DType::F64)?.to_scalar()?)
    }

    /// φ ← φ + ε (mean of the tasks' φ′ − φ); the loss is that at the query points with φ′, which
    /// the inner steps have seen.
    fn reptile_step(&mut self, tasks: &Tasks) -> Result<f64> {
        let turns = [
            (&tasks.support_x, &tasks.support_y),
            (&tasks.query_x, &tasks.query_y),
        ];
        let adapted = self.descend(self.constants(), |i| turns[i % 2], self.config.inner_steps)?;
        let loss = self.network.errors(&adapted, turns[1].0, turns[1].1)?;
        let loss: f64 = loss.mean_all()?.to_dtype(DType::F64)?.to_scalar()?;
        if !loss.is_finite() {
            return Err(refused(format!(
                "the inner loop of Reptile ended at an error of {loss}; the start is as before. \
                 Lower inner_rate or inner_steps"
            )));
        }
        let part = self.config.outer_rate * self.factor;
        for (name, var) in &self.variables {
            let mean = adapted[name].mean(0)?.reshape(var.shape())?;
            var.set(&((var.as_tensor() * (1.0 - part))? + (mean * part)?)?.detach())?;
        }
        Ok(loss)
    }

    /// Multiplies the outer rate, for a schedule such as [`lora::optim::Schedule`].
    ///
    /// # Errors
    ///
    /// A factor that is negative or not finite.
    pub fn set_outer_rate_factor(&mut self, factor: f64) -> Result<()> {
        self.optimizer.set_learning_rate_factor(factor)?;
        self.factor = factor;
        Ok(())
    }

    /// Another step size for the inner loop from now on, as fine-tuning a baseline may need.
    ///
    /// # Errors
    ///
    /// A step size that is negative or not finite, or where the step sizes are learned.
    pub fn set_inner_rate(&mut self, inner_rate: f64) -> Result<()> {
        let config = MetaConfig {
            inner_rate,
            ..self.config.clone()
        };
        config.validate()?;
        if config.learn_inner_rates {
            let problem = "the inner step sizes are learned and cannot be set";
            return Err(refused(problem.into()));
        }
        self.config = config;
        Ok(())
    }

    /// The mean squared error at the query points of each task, after 0, 1, … `steps` inner steps on
    /// its support points: `errors[step][task]`. A task whose inner loop diverges shows as a huge
    /// number, infinity or NaN.
    ///
    /// # Errors
    ///
    /// Tasks whose points have another shape.
    pub fn evaluate(&self, tasks: &Tasks, steps: usize) -> Result<Vec<Vec<f64>>> {
        let support = (&tasks.support_x, &tasks.support_y);
        let mut parameters = self.constants();
        let mut errors = Vec::with_capacity(steps + 1);
        for step in 0..=steps {
            if step > 0 {
                parameters = self.descend(parameters, |_| support, 1)?;
            }
            let each = self
                .network
                .errors(&parameters, &tasks.query_x, &tasks.query_y)?;
            errors.push(each.to_dtype(DType::F64)?.to_vec1()?);
        }
        Ok(errors)
    }
}
