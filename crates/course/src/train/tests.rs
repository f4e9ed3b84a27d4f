use candle_core::{Device, Tensor, Var};
use candle_nn::{Linear, Module, loss::mse};
use lora::optim::{LoraPlusOptions, ParameterGroup, Schedule, loraplus_groups};
use lora::{LoraConfig, LoraLinear};

use super::*;
use crate::rng::rng;

mod errors;
mod outside;
mod records;

const CPU: Device = Device::Cpu;

/// A frozen layer with an adapter, and 32 samples of a linear map that the adapter can reach.
struct Task {
    layer: LoraLinear,
    x: Tensor,
    y: Tensor,
}

impl Task {
    fn new() -> Self {
        let mut rng = rng(5);
        let base = rng.randn((3, 4), &CPU).unwrap();
        let (b, a) = (
            rng.randn((3, 2), &CPU).unwrap(),
            rng.randn((2, 4), &CPU).unwrap(),
        );
        let target = (&base + b.matmul(&a).unwrap()).unwrap();
        let x = rng.randn((32, 4), &CPU).unwrap();
        let y = x.matmul(&target.t().unwrap()).unwrap();
        let config = LoraConfig::new(2, 4.0);
        let layer = LoraLinear::new("proj", Linear::new(base, None), &config, &mut rng).unwrap();
        Self { layer, x, y }
    }

    fn loss(&self, x: &Tensor, y: &Tensor) -> Result<Tensor> {
        Ok(mse(&self.layer.forward(x)?, y)?)
    }

    /// All samples in `parts` equal batches, again and again.
    fn batches(&self, parts: usize) -> impl Iterator<Item = Result<(Tensor, Tensor)>> {
        let (x, y) = (
            self.x.chunk(parts, 0).unwrap(),
            self.y.chunk(parts, 0).unwrap(),
        );
        let parts: Vec<_> = x.into_iter().zip(y).collect();
        parts.into_iter().cycle().map(Ok)
    }

    fn run(&self, training: Training<'_>, lr: f64, parts: usize) -> History {
        training
            .quiet()
            .run(
                (self.layer.trainable_parameters(), lr),
                self.batches(parts),
                |(x, y)| self.loss(x, y),
            )
            .unwrap()
    }

    fn weights(&self) -> Vec<Vec<f32>> {
        let parameters = self.layer.trainable_parameters();
        parameters.iter().map(|(_, var)| values(var)).collect()
    }
}

fn values(var: &Var) -> Vec<f32> {
    var.flatten_all().unwrap().to_vec1().unwrap()
}

/// One parameter w, trained on w² from 3.
fn square() -> (Vec<(String, Var)>, Var) {
    let w = Var::new(&[3f32], &CPU).unwrap();
    (vec![("w".to_string(), w.clone())], w)
}

fn forever() -> impl Iterator<Item = Result<()>> {
    std::iter::repeat_with(|| Ok(()))
}

fn squared(w: &Var) -> Result<Tensor> {
    Ok(w.sqr()?.sum_all()?)
}

fn scalar(tensor: Result<Tensor>) -> Result<f32> {
    Ok(tensor?.to_scalar()?)
}

/// What of a history does not depend on time.
fn timeless(history: &History) -> Vec<(usize, u64, u64, u64)> {
    let bits = |r: &StepRecord| {
        (
            r.step,
            r.loss.to_bits(),
            r.lr.to_bits(),
            r.grad_norm.to_bits(),
        )
    };
    history.steps.iter().map(bits).collect()
}

#[test]
fn an_adapter_learns_and_a_second_run_is_the_same_to_the_bit() {
    let run = || {
        let task = Task::new();
        let history = task.run(Training::new("LoRA", 300).clip(5.0), 0.05, 4);
        (timeless(&history), task.weights(), history)
    };
    let (first, second) = (run(), run());
    let (start, end) = (first.2.first_loss().unwrap(), first.2.last_loss().unwrap());
    assert!(start > 1.0 && end < 1e-3, "{start} → {end}");
    assert_eq!(first.0, second.0);
    assert_eq!(first.1, second.1);
}

#[test]
fn four_micro_batches_are_one_large_batch() {
    let (large, small) = (Task::new(), Task::new());
    let one = large.run(Training::new("large", 10), 0.05, 1);
    let four = small.run(Training::new("small", 10).accumulate(4), 0.05, 4);
    for (a, b) in one.steps.iter().zip(&four.steps) {
        assert!((a.loss - b.loss).abs() < 1e-5 * a.loss, "{a:?} {b:?}");
        assert!(
            (a.grad_norm - b.grad_norm).abs() < 1e-5 * a.grad_norm,
            "{a:?} {b:?}"
        );
    }
    for (a, b) in large
        .weights()
        .concat()
        .iter()
        .zip(small.weights().concat())
    {
        assert!((a - b).abs() < 1e-6, "{a} {b}");
    }
}

/// AdamW hardly minds a constant factor; ε and the moments of a changing gradient do.
#[test]
fn clipping_limits_the_update() {
    let update = |clip: Option<f64>| {
        let (parameters, w) = square();
        let training = Training::new("clip", 1).quiet();
        let training = clip
            .iter()
            .fold(training, |training, &clip| training.clip(clip));
        let history = training
            .run((parameters, 0.5), forever(), |()| squared(&w))
            .unwrap();
        assert_eq!(history.grad_norms(), [(1.0, 6.0)]);
        3.0 - values(&w)[0]
    };
    // lr · g / (g + ε): 0.5 without; with g = ε = 1e-8, the half of it.
    assert!((update(None) - 0.5).abs() < 1e-6);
    assert!((update(Some(100.0)) - 0.5).abs() < 1e-6);
    let clipped = update(Some(1e-8));
    assert!((clipped - 0.25).abs() < 0.01, "{clipped}");
}

#[test]
fn the_schedule_moves_the_rate_and_the_weights() {
    let (parameters, w) = square();
    let history = Training::new("warm", 4)
        .schedule(Schedule::Linear { warmup_steps: 2 })
        .quiet()
        .run((parameters, 0.2), forever(), |()| squared(&w))
        .unwrap();
    assert_eq!(
        history.learning_rates(),
        [(1.0, 0.0), (2.0, 0.1), (3.0, 0.2), (4.0, 0.1)]
    );
    // The first step has rate 0, so the second finds the same loss.
    let losses = history.losses();
    assert!(
        losses[0].1 == 9.0 && losses[1].1 == 9.0 && losses[2].1 < 8.5,
        "{losses:?}"
    );
}

#[test]
fn groups_of_every_kind() {
    let task = Task::new();
    let parameters = || task.layer.trainable_parameters();
    let options = LoraPlusOptions::default();
    let plus = loraplus_groups(parameters(), 0.25, 4.0, options).unwrap();
    let run = |groups: Groups| {
        let loss = |(x, y): &(Tensor, Tensor)| task.loss(x, y);
        Training::new("g", 1)
            .quiet()
            .run(groups, task.batches(1), loss)
            .unwrap()
    };
    for groups in [plus.into(), ParameterGroup::all(parameters(), 0.25).into()] {
        let history = run(groups);
        assert_eq!(history.learning_rates(), [(1.0, 0.25)]);
        assert_eq!(history.trainable, 2 * 4 + 3 * 2);
        assert_eq!(history.optimizer_bytes, 2 * 4 * history.trainable);
    }
}

/// A loader that is lent goes on where the run stopped.
#[test]
fn a_lent_loader_goes_on() {
    let (parameters, w) = square();
    let mut loader = (1..).map(|i| Ok(f64::from(i)));
    let mut seen = Vec::new();
    for _ in 0..2 {
        Training::new("lent", 2)
            .quiet()
            .run((parameters.clone(), 0.1), &mut loader, |i| {
                seen.push(*i);
                squared(&w)
            })
            .unwrap();
    }
    assert_eq!(seen, [1.0, 2.0, 3.0, 4.0]);
}
