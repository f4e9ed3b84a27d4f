//! Each one-pass operation beside what it replaces: the same from candle's operations that keep
//! the gradient. `cargo bench -p lora --bench ops`; a part of a name chooses some.
//!
//! `forward` is the value, `both` the value and its gradients: of everything but weights that do not
//! train beside LoRA, except where a name says `trained`.
#![allow(clippy::unwrap_used, missing_docs)]

use std::hint::black_box;
use std::time::Duration;

use candle_core::{D, Device, Result, Tensor, Var};
use candle_nn::Conv2dConfig;
use criterion::{Criterion, criterion_group, criterion_main};
use lora::ops;
use lora::quant::{QuantConfig, quantize};

const CPU: Device = Device::Cpu;

fn random(shape: &[usize]) -> Tensor {
    Tensor::randn(0f32, 1.0, shape, &CPU).unwrap()
}

type Op<'a> = &'a dyn Fn(&[Tensor]) -> Result<Tensor>;

/// Forward alone, and forward with backward, of ours and of the composition.
fn measure(c: &mut Criterion, name: &str, inputs: &[Tensor], ours: Op<'_>, composed: Op<'_>) {
    let mut group = c.benchmark_group(name);
    for (who, op) in [("ours", ours), ("candle", composed)] {
        group.bench_function(format!("forward/{who}"), |b| {
            b.iter(|| black_box(op(inputs).unwrap()));
        });
        let vars: Vec<Var> = inputs
            .iter()
            .map(|x| Var::from_tensor(x).unwrap())
            .collect();
        let vars: Vec<Tensor> = vars.iter().map(|x| x.as_tensor().clone()).collect();
        group.bench_function(format!("both/{who}"), |b| {
            b.iter(|| black_box(op(&vars).unwrap().backward().unwrap()));
        });
    }
    group.finish();
}

fn activations(c: &mut Criterion) {
    let x = [random(&[256, 3072])];
    measure(c, "relu 256x3072", &x, &|x| Ok(ops::relu(&x[0])?), &|x| {
        x[0].relu()
    });
    measure(c, "gelu 256x3072", &x, &|x| Ok(ops::gelu(&x[0])?), &|x| {
        x[0].gelu()
    });
    let ours: Op<'_> = &|x| Ok(ops::gelu_erf(&x[0])?);
    measure(c, "gelu_erf 256x3072", &x, ours, &|x| x[0].gelu_erf());
    measure(c, "silu 256x3072", &x, &|x| Ok(ops::silu(&x[0])?), &|x| {
        x[0].silu()
    });
    let both = [random(&[256, 3072]), random(&[256, 3072])];
    let ours: Op<'_> = &|x| Ok(ops::swiglu(&x[0], &x[1])?);
    measure(c, "swiglu 256x3072", &both, ours, &|x| x[0].silu()? * &x[1]);
}

fn plain_rms(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let size = (x.sqr()?.mean_keepdim(D::Minus1)? + 1e-5)?.sqrt()?;
    x.broadcast_div(&size)?.broadcast_mul(w)
}

fn norms(c: &mut Criterion) {
    for n in [768, 3072] {
        let x = [random(&[256, n])];
        let (w, b) = (random(&[n]), random(&[n]));
        let name = format!("layer_norm 256x{n}");
        let ours: Op<'_> = &|x| Ok(ops::layer_norm(&x[0], &w, Some(&b), 1e-5)?);
        measure(c, &name, &x, ours, &|x| {
            let centred = x[0].broadcast_sub(&x[0].mean_keepdim(D::Minus1)?)?;
            plain_rms(&centred, &w)?.broadcast_add(&b)
        });
        let name = format!("rms_norm 256x{n}");
        let ours: Op<'_> = &|x| Ok(ops::rms_norm(&x[0], &w, 1e-5)?);
        measure(c, &name, &x, ours, &|x| plain_rms(&x[0], &w));
    }
    let all = [random(&[256, 768]), random(&[768])];
    let ours: Op<'_> = &|x| Ok(ops::rms_norm(&x[0], &x[1], 1e-5)?);
    let name = "rms_norm 256x768, weight trained";
    measure(c, name, &all, ours, &|x| plain_rms(&x[0], &x[1]));
}

fn softmaxes(c: &mut Criterion) {
    let x = [random(&[12, 256, 256])];
    let ours: Op<'_> = &|x| Ok(ops::softmax_last_dim(&x[0])?);
    measure(c, "softmax 12x256x256", &x, ours, &|x| {
        candle_nn::ops::softmax(&x[0], 2)
    });
    let hidden = (0..256).flat_map(|i| (0..256).map(move |j| if j > i { -1e9f32 } else { 0.0 }));
    let mask = Tensor::from_vec(hidden.collect::<Vec<_>>(), (256, 256), &CPU).unwrap();
    let ours: Op<'_> = &|x| Ok(ops::causal_softmax(&x[0])?);
    measure(c, "causal_softmax 12x256x256", &x, ours, &|x| {
        candle_nn::ops::softmax(&x[0].broadcast_add(&mask)?, 2)
    });
}

fn ropes(c: &mut Criterion) {
    let x = [random(&[1, 256, 12, 64])];
    let angles = random(&[256, 32]);
    let (cos, sin) = (angles.cos().unwrap(), angles.sin().unwrap());
    let ours: Op<'_> = &|x| Ok(ops::rope(&x[0], &cos, &sin)?);
    measure(c, "rope 1x256x12x64", &x, ours, &|x| {
        // candle's own wants the heads first.
        let x = x[0].transpose(1, 2)?.contiguous()?;
        candle_nn::rotary_emb::rope_slow(&x, &cos, &sin)?.transpose(1, 2)
    });
}

fn losses(c: &mut Criterion) {
    let logits = [random(&[256, 49_152])];
    let targets: Vec<u32> = (0..256).map(|i| i * 191).collect();
    let targets = Tensor::new(targets, &CPU).unwrap();
    let ours: Op<'_> = &|x| Ok(ops::cross_entropy(&x[0], &targets)?);
    measure(c, "cross_entropy 256x49152", &logits, ours, &|x| {
        candle_nn::loss::cross_entropy(&x[0], &targets)
    });
    let both = [random(&[256, 3072]), random(&[256, 3072])];
    let ours: Op<'_> = &|x| Ok(ops::mse_loss(&x[0], &x[1])?);
    measure(c, "mse_loss 256x3072", &both, ours, &|x| {
        candle_nn::loss::mse(&x[0], &x[1])
    });
}

fn linears(c: &mut Criterion) {
    let w = random(&[768, 768]);
    let all = [random(&[256, 768]), random(&[8, 768]), random(&[768, 8])];
    let ours: Op<'_> = &|t| Ok(ops::lora_linear(&t[0], &w, None, &t[1], &t[2], 2.0)?);
    measure(c, "lora_linear 256x768-768, r 8", &all, ours, &|t| {
        let thin = t[0].matmul(&t[1].t()?)?.matmul(&t[2].t()?)?;
        t[0].matmul(&w.t()?)? + (thin * 2.0)?
    });
    let x = [random(&[256, 768])];
    let ours: Op<'_> = &|x| Ok(ops::linear(&x[0], &w, None)?);
    measure(c, "linear 256x768-768", &x, ours, &|x| x[0].matmul(&w.t()?));
    for (inputs, outputs) in [(192, 512), (576, 1536)] {
        let all = [
            random(&[1024, inputs]),
            random(&[outputs, inputs]),
            random(&[outputs]),
        ];
        let name = format!("linear 1024x{inputs}-{outputs}, trained");
        let ours: Op<'_> = &|t| Ok(ops::linear(&t[0], &t[1], Some(&t[2]))?);
        measure(c, &name, &all, ours, &|t| {
            t[0].matmul(&t[1].t()?)?.broadcast_add(&t[2])
        });
    }
    // Logits of about 1, or the softmax is nearly 0 nearly everywhere.
    let w = (random(&[49_152, 576]) / 24.0).unwrap();
    let x = [random(&[256, 576])];
    let targets: Vec<u32> = (0..256).map(|i| i * 191).collect();
    let targets = Tensor::new(targets, &CPU).unwrap();
    let ours: Op<'_> = &|x| Ok(ops::linear_cross_entropy(&x[0], &w, &targets)?);
    measure(c, "linear_cross_entropy 256x576-49152", &x, ours, &|x| {
        candle_nn::loss::cross_entropy(&x[0].matmul(&w.t()?)?, &targets)
    });
    let both = [x[0].clone(), w];
    let ours: Op<'_> = &|t| Ok(ops::linear_cross_entropy(&t[0], &t[1], &targets)?);
    let name = "linear_cross_entropy 256x576-49152, trained";
    measure(c, name, &both, ours, &|t| {
        candle_nn::loss::cross_entropy(&t[0].matmul(&t[1].t()?)?, &targets)
    });
}

fn convolutions(c: &mut Criterion) {
    let config = Conv2dConfig {
        padding: 1,
        ..Default::default()
    };
    // As the lessons' network has them, and as a larger one has.
    for (batch, inputs, outputs, side) in [(16, 16, 32, 14), (4, 64, 64, 28)] {
        let w = random(&[outputs, inputs, 3, 3]);
        let size = format!("{batch}x{inputs}x{side}x{side}-{outputs}");
        let all = [
            random(&[batch, inputs, side, side]),
            random(&[4, inputs, 3, 3]),
            random(&[outputs, 4, 1, 1]),
        ];
        let ours: Op<'_> = &|t| {
            Ok(ops::lora_conv2d(
                &t[0], &w, None, &t[1], &t[2], 2.0, &config,
            )?)
        };
        let name = format!("lora_conv2d {size}, r 4");
        measure(c, &name, &all, ours, &|t| {
            let h = t[0].conv2d(&t[1], 1, 1, 1, 1)?;
            t[0].conv2d(&w, 1, 1, 1, 1)? + (h.conv2d(&t[2], 0, 1, 1, 1)? * 2.0)?
        });
        let all = [all[0].clone(), w.clone()];
        let ours: Op<'_> = &|t| Ok(ops::conv2d(&t[0], &t[1], None, &config)?);
        measure(c, &format!("conv2d {size}, trained"), &all, ours, &|t| {
            t[0].conv2d(&t[1], 1, 1, 1, 1)
        });
    }
    let x = [random(&[16, 16, 28, 28])];
    let ours: Op<'_> = &|x| Ok(ops::avg_pool2d(&x[0], 2)?);
    measure(c, "avg_pool2d 16x16x28x28", &x, ours, &|x| {
        x[0].avg_pool2d(2)
    });
}

fn quick() -> Criterion {
    // As a training run should: or the system's clearing of new memory is most of what is measured.
    lora::tune_process();
    Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(500))
}

/// QLoRA's layer: the weight in f32, in 4 bits, and in 4 bits that are expanded as a whole.
fn quantized(c: &mut Criterion) {
    let (w, a, b) = (random(&[1536, 576]), random(&[8, 576]), random(&[1536, 8]));
    let four = quantize(&w, &QuantConfig::default()).unwrap();
    for rows in [1, 256] {
        let mut group = c.benchmark_group(format!("lora 4bit {rows}x576x1536"));
        let x = Var::from_tensor(&random(&[rows, 576])).unwrap();
        let (a, b) = (Var::from_tensor(&a).unwrap(), Var::from_tensor(&b).unwrap());
        let thin = |y: Tensor| -> Result<Tensor> {
            let h = ops::linear(&x, &a, None)?;
            y + ops::linear(&h, &b, None)?
        };
        let f32s = || thin(ops::linear(&x, &w, None)?);
        let in_4_bits = || thin(ops::linear_4bit(&x, &four, None)?);
        let expanded = || thin(ops::linear(&x, &four.dequantize()?, None)?);
        let ways: [(&str, &dyn Fn() -> Result<Tensor>); 3] = [
            ("f32", &f32s),
            ("4bit", &in_4_bits),
            ("expanded", &expanded),
        ];
        for (who, op) in ways {
            group.bench_function(format!("forward/{who}"), |b| {
                b.iter(|| black_box(op().unwrap()));
            });
            group.bench_function(format!("both/{who}"), |b| {
                b.iter(|| black_box(op().unwrap().backward().unwrap()));
            });
        }
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = quick();
    targets = linears, quantized, convolutions, activations, norms, softmaxes, ropes, losses
}
criterion_main!(benches);
