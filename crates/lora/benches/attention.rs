//! `ops::attention` beside the same formula of candle's operations.

use std::hint::black_box;

use candle_core::{D, DType, Device, Tensor, Var};
use criterion::{Criterion, criterion_group, criterion_main};
use lora::ops::{AttentionMask, attention};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// batch, L, heads, kv heads, dim, causal.
const SHAPES: [(usize, usize, usize, usize, usize, bool); 3] = [
    (2, 128, 12, 12, 64, false),
    (1, 256, 9, 3, 64, true),
    (1, 2048, 9, 3, 64, true),
];

/// What a model does without the operation: the weights of all heads, then their product with v.
fn composed(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, hidden: &Tensor) -> Result<Tensor> {
    let (n, l, heads, dim) = q.dims4()?;
    let kv = k.dim(2)?;
    let by_head = |x: &Tensor| x.transpose(1, 2)?.contiguous();
    let q = by_head(q)?.reshape((n, kv, heads / kv * l, dim))?;
    let scores = (q.matmul(&by_head(k)?.t()?)? * scale)?.reshape((n, heads, l, l))?;
    let weights = candle_nn::ops::softmax(&scores.broadcast_add(hidden)?, D::Minus1)?;
    let mixed = weights
        .reshape((n, kv, heads / kv * l, l))?
        .matmul(&by_head(v)?)?;
    let mixed = mixed.reshape((n, heads, l, dim))?.transpose(1, 2)?;
    Ok(mixed.contiguous()?)
}

fn bench(c: &mut Criterion) -> Result<()> {
    for (n, l, heads, kv, dim, causal) in SHAPES {
        let random = |heads| Var::randn(0f32, 1., (n, l, heads, dim), &Device::Cpu);
        let (q, k, v) = (random(heads)?, random(kv)?, random(kv)?);
        let probe = random(heads)?.detach();
        let scale = 1.0 / (dim as f64).sqrt();
        let mask = AttentionMask {
            causal,
            ..Default::default()
        };
        let hidden = if causal {
            let rows = (0..l * l).map(|i| if i % l > i / l { f32::NEG_INFINITY } else { 0. });
            Tensor::from_vec(rows.collect(), (l, l), &Device::Cpu)?
        } else {
            Tensor::zeros((l, l), DType::F32, &Device::Cpu)?
        };
        let (q0, k0, v0) = (q.detach(), k.detach(), v.detach());
        let backward = |y: Tensor| -> Result<()> {
            black_box((y * &probe)?.sum_all()?.backward()?);
            Ok(())
        };
        let mut group = c.benchmark_group(format!("attention {n}x{l}, {heads}/{kv} heads"));
        if l > 1000 {
            group.sample_size(10);
        }
        group.bench_function("ours, forward", |b| {
            b.iter(|| attention(&q0, &k0, &v0, scale, &mask).map(black_box))
        });
        group.bench_function("composed, forward", |b| {
            b.iter(|| composed(&q0, &k0, &v0, scale, &hidden).map(black_box))
        });
        group.bench_function("ours, forward and backward", |b| {
            b.iter(|| backward(attention(&q, &k, &v, scale, &mask)?))
        });
        group.bench_function("composed, forward and backward", |b| {
            b.iter(|| backward(composed(&q, &k, &v, scale, &hidden)?))
        });
        group.finish();
    }
    Ok(())
}

fn run(c: &mut Criterion) {
    if let Err(error) = bench(c) {
        eprintln!("attention: {error}");
        std::process::exit(1);
    }
}

criterion_group!(benches, run);
criterion_main!(benches);
