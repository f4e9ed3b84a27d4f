//! The loop itself.

use std::fmt;
use std::io::Write;
use std::time::{Duration, Instant};

use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor, Var};
use lora::optim::{GradientAccumulator, LoraOptimizer, clip_grad_norm};

use super::diagnosis::{Symptoms, first_broken};
use super::memory::Memory;
use super::plan::Plan;
use super::progress::{self, Progress};
use super::{Groups, History, StepRecord};
use crate::{Error, Result, interrupt};

/// The loss of the next batch; none where the batches ran out.
pub(super) type NextLoss<'f> = dyn FnMut() -> Result<Option<Tensor>> + 'f;
/// What is measured on held-out data.
pub(super) type Evaluation<'f> = dyn FnMut() -> Result<f64> + 'f;

/// What lies outside the loop; tests put their own in its place.
pub(super) struct World<'w> {
    /// The time since some moment.
    pub(super) now: Box<dyn FnMut() -> Duration + 'w>,
    /// Whether the stop button was pressed.
    pub(super) stop: Box<dyn FnMut() -> bool + 'w>,
    pub(super) say: Box<dyn FnMut(&str) + 'w>,
}

impl World<'_> {
    pub(super) fn real() -> Self {
        let start = Instant::now();
        Self {
            now: Box::new(move || start.elapsed()),
            stop: Box::new(interrupt::requested),
            say: Box::new(|line| {
                // A closed stdout is no reason to panic, so no `println!`.
                let _ = writeln!(std::io::stdout(), "{line}");
            }),
        }
    }
}

/// Runs `plan`: the loop behind [`Training::run`](super::Training::run).
pub(super) fn train(
    plan: &Plan,
    groups: Groups,
    next_loss: &mut NextLoss<'_>,
    evaluation: Option<&mut Evaluation<'_>>,
    world: &mut World<'_>,
) -> Result<History> {
    plan.check()?;
    let vars = || {
        groups
            .0
            .iter()
            .flat_map(|group| &group.parameters)
            .map(|(_, var)| var)
    };
    let memory = Memory::start(vars().all(|var| matches!(var.device(), Device::Cpu)));
    let trainable = vars().map(|var| var.elem_count()).sum();
    let optimizer = LoraOptimizer::new(groups.0)?;
    let watched = watched(plan, optimizer.parameters())?;
    let history = History {
        name: plan.name.clone(),
        steps: Vec::new(),
        evaluations: Vec::new(),
        norms: plan
            .watched
            .iter()
            .map(|part| (part.clone(), Vec::new()))
            .collect(),
        stopped: false,
        trainable,
        optimizer_bytes: optimizer.optimizer_bytes(),
        memory: None,
        seconds: 0.0,
    };
    let run = Run {
        plan,
        optimizer,
        watched,
        next_loss,
        evaluation,
        world,
        memory,
        history,
    };
    run.all()
}

/// For each part of a name the parameters it stands for.
fn watched(plan: &Plan, parameters: &[(String, Var)]) -> Result<Vec<Vec<(String, Var)>>> {
    let named = |part: &String| {
        let found = parameters
            .iter()
            .filter(|(name, _)| name.contains(part))
            .cloned();
        let found: Vec<_> = found.collect();
        match parameters.first() {
            Some((first, _)) if found.is_empty() => Err(plan.error(format!(
                "record_norms({part:?}): none of the {} parameters has this in its name; \
                 the first is called {first}",
                parameters.len()
            ))),
            _ => Ok(found),
        }
    };
    plan.watched.iter().map(named).collect()
}

/// Whether the loop goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Going {
    On,
    Stopped,
}

struct Run<'r, 'f, 'e, 'w> {
    plan: &'r Plan,
    optimizer: LoraOptimizer,
    watched: Vec<Vec<(String, Var)>>,
    next_loss: &'r mut NextLoss<'f>,
    evaluation: Option<&'r mut Evaluation<'e>>,
    world: &'r mut World<'w>,
    memory: Memory,
    history: History,
}

impl Run<'_, '_, '_, '_> {
    fn all(mut self) -> Result<History> {
        let start = (self.world.now)();
        let going = self.steps()?;
        if let Some(name) = first_broken(self.optimizer.parameters())? {
            return Err(self.plan.error(format!(
                "parameter {name} holds NaN or infinity after the last step; lower the learning \
                 rate and make the parameters anew"
            )));
        }
        self.history.memory = self.memory.most();
        self.history.seconds = ((self.world.now)() - start).as_secs_f64();
        self.history.stopped = going == Going::Stopped;
        if self.history.stopped {
            (self.world.say)(&progress::stopped(&self.history, self.plan.steps));
        } else if !self.plan.quiet {
            (self.world.say)(&progress::summary(&self.history));
        }
        Ok(self.history)
    }

    fn steps(&mut self) -> Result<Going> {
        if self.evaluate(0)? == Going::Stopped {
            return Ok(Going::Stopped);
        }
        let start = (self.world.now)();
        let mut progress = Progress::default();
        for step in 1..=self.plan.steps {
            let Some(loss) = self.step(step)? else {
                return Ok(Going::Stopped);
            };
            if self.evaluate(step)? == Going::Stopped {
                return Ok(Going::Stopped);
            }
            if !self.plan.quiet {
                let now = (self.world.now)() - start;
                let line = progress.line(now, &self.plan.name, (step, self.plan.steps), loss);
                line.iter().for_each(|line| (self.world.say)(line));
            }
        }
        Ok(Going::On)
    }

    /// One step of the optimiser; its loss, or none when stopped before.
    fn step(&mut self, step: usize) -> Result<Option<f64>> {
        let plan = self.plan;
        let at = |error: lora::Error| plan.at(step, error);
        let start = (self.world.now)();
        let factor = self.plan.schedule.factor(step - 1, self.plan.steps);
        self.optimizer
            .set_learning_rate_factor(factor)
            .map_err(at)?;
        let Some((loss, mut gradients)) = self.gradients(step)? else {
            return Ok(None);
        };
        // An infinite limit measures and scales nothing.
        let measure = |named: &Vec<_>| clip_grad_norm(&mut gradients, named, f64::INFINITY);
        let norms = self
            .watched
            .iter()
            .map(measure)
            .collect::<lora::Result<Vec<f64>>>();
        let norms = norms.map_err(at)?;
        let parameters = self.optimizer.parameters();
        let grad_norm = clip_grad_norm(&mut gradients, parameters, self.plan.clip).map_err(at)?;
        self.optimizer.step(&gradients).map_err(at)?;
        self.memory.sample();

        for ((_, recorded), norm) in self.history.norms.iter_mut().zip(norms) {
            recorded.push(norm);
        }
        self.history.steps.push(StepRecord {
            step,
            loss,
            lr: self
                .optimizer
                .learning_rates()
                .first()
                .map_or(0.0, |rate| rate.1),
            grad_norm,
            seconds: ((self.world.now)() - start).as_secs_f64(),
        });
        Ok(Some(loss))
    }

    /// The mean loss and gradient of the step's micro-batches; none when stopped before.
    fn gradients(&mut self, step: usize) -> Result<Option<(f64, GradStore)>> {
        if self.plan.accumulate == 1 {
            return self.micro_batch(step);
        }
        let plan = self.plan;
        let at = |error: lora::Error| plan.at(step, error);
        let mut mean = GradientAccumulator::new(self.optimizer.parameters());
        let mut loss = 0.0;
        for _ in 0..self.plan.accumulate {
            let Some((part, gradients)) = self.micro_batch(step)? else {
                return Ok(None);
            };
            mean.add(&gradients).map_err(at)?;
            loss += part / self.plan.accumulate as f64;
        }
        Ok(Some((loss, mean.take_mean().map_err(at)?)))
    }

    /// The loss and the gradient of the next batch; none when stopped before.
    fn micro_batch(&mut self, step: usize) -> Result<Option<(f64, GradStore)>> {
        if (self.world.stop)() {
            return Ok(None);
        }
        let loss = (self.next_loss)().map_err(|error| self.plan.at(step, error))?;
        let loss = loss.ok_or_else(|| self.exhausted())?;
        self.memory.sample();
        let value = self.plan.scalar(step, &loss)?;
        let place = format_args!("step {step} of {}: the loss", self.plan.steps);
        self.finite(place, value)?;
        let gradients = loss.backward().map_err(|error| self.plan.at(step, error))?;
        self.memory.sample();
        Ok(Some((value, gradients)))
    }

    /// Measures what is due after `done` steps.
    fn evaluate(&mut self, done: usize) -> Result<Going> {
        let Some(measure) = self
            .evaluation
            .as_mut()
            .filter(|_| self.plan.evaluates_after(done))
        else {
            return Ok(Going::On);
        };
        if (self.world.stop)() {
            return Ok(Going::Stopped);
        }
        let value = measure().map_err(|error| self.plan.at(done, error))?;
        let place = format_args!(
            "after step {done} of {}: the held-out value",
            self.plan.steps
        );
        self.finite(place, value)?;
        self.history.evaluations.push((done, value));
        Ok(Going::On)
    }

    /// Refuses a `value` that is NaN or infinite, with the likely cause.
    fn finite(&self, what: fmt::Arguments<'_>, value: f64) -> Result<()> {
        if value.is_finite() {
            return Ok(());
        }
        let symptoms = Symptoms {
            what: &what.to_string(),
            value,
            done: &self.history.steps,
            rates: &self.optimizer.learning_rates(),
            broken: first_broken(self.optimizer.parameters())?,
        };
        Err(self.plan.error(symptoms.explain()))
    }

    fn exhausted(&self) -> Error {
        let (done, steps) = (self.history.steps.len(), self.plan.steps);
        let (each, need) = (self.plan.accumulate, steps * self.plan.accumulate);
        self.plan.error(format!(
            "the batches ran out after {done} of {steps} steps; give {need} ({each} for each \
             step), a loader that starts anew, or fewer steps. The parameters keep the {done}"
        ))
    }
}
