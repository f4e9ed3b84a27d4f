//! Clipping and a step of `LoraOptimizer` beside the same with candle's operations and its AdamW.
//! `cargo bench -p lora --bench optim`.
#![allow(clippy::unwrap_used, missing_docs)]

use std::time::Duration;

use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor, Var};
use candle_nn::{AdamW, Optimizer};
use criterion::{Criterion, criterion_group, criterion_main};
use lora::optim::{LoraOptimizer, ParameterGroup, clip_grad_norm};

fn random(shape: &[usize]) -> Tensor {
    Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap()
}

/// The gradients in a store of their own, for a clipping that changes it.
fn copied(gradients: &GradStore, parameters: &[(String, Var)]) -> GradStore {
    let mut store = GradStore::default();
    for (_, var) in parameters {
        store.insert(var, gradients.get(var).unwrap().clone());
    }
    store
}

/// Scales the gradients as [`clip_grad_norm`] does.
fn clip_with_candle(gradients: &mut GradStore, parameters: &[(String, Var)], max_norm: f64) {
    let mut square = 0.0;
    for (_, var) in parameters {
        let sum = gradients.get(var).unwrap().sqr().unwrap().sum_all();
        square += f64::from(sum.unwrap().to_scalar::<f32>().unwrap());
    }
    let factor = max_norm / (square.sqrt() + 1e-6);
    for (_, var) in parameters {
        let scaled = (gradients.get(var).unwrap() * factor).unwrap();
        gradients.insert(var, scaled);
    }
}

fn steps(c: &mut Criterion) {
    for (name, count, shape) in [
        ("1.77 M numbers in 40 tensors", 40, [192, 230]),
        ("56 tensors of 16x192", 56, [16, 192]),
        ("8 tensors of 8x16", 8, [8, 16]),
    ] {
        let parameters: Vec<(String, Var)> = (0..count)
            .map(|i| (format!("{i}"), Var::from_tensor(&random(&shape)).unwrap()))
            .collect();
        let mut gradients = GradStore::default();
        for (_, var) in &parameters {
            gradients.insert(var, random(&shape));
        }
        let mut group = c.benchmark_group(name);
        let all = ParameterGroup::all(parameters.clone(), 1e-4).with_weight_decay(0.01);
        let mut ours = LoraOptimizer::new(vec![all]).unwrap();
        let vars = parameters.iter().map(|(_, var)| var.clone()).collect();
        let mut candle = AdamW::new_lr(vars, 1e-4).unwrap();
        group.bench_function("step/ours", |b| b.iter(|| ours.step(&gradients).unwrap()));
        group.bench_function("step/candle", |b| {
            b.iter(|| candle.step(&gradients).unwrap());
        });
        group.bench_function("clip and step/ours", |b| {
            b.iter(|| {
                let mut gradients = copied(&gradients, &parameters);
                clip_grad_norm(&mut gradients, &parameters, 1.0).unwrap();
                ours.step(&gradients).unwrap();
            });
        });
        group.bench_function("clip and step/candle", |b| {
            b.iter(|| {
                let mut gradients = copied(&gradients, &parameters);
                clip_with_candle(&mut gradients, &parameters, 1.0);
                candle.step(&gradients).unwrap();
            });
        });
        group.finish();
    }
}

fn quick() -> Criterion {
    // As a training run should: or the system's clearing of new memory is most of what is measured.
    lora::tune_process();
    Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(1000))
}

criterion_group! {
    name = benches;
    config = quick();
    targets = steps
}
criterion_main!(benches);
