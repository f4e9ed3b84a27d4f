use candle_core::{Tensor, Var};
use candle_nn::{Conv1dConfig, Conv2dConfig};
use lora::ops::{
    AttentionMask, attention, avg_pool2d, causal_softmax, conv1d, cross_entropy, gelu, gelu_erf,
    layer_norm, linear, linear_cross_entropy, lora_conv2d, lora_linear, mse_loss, relu, rms_norm,
    rope, silu, softmax_last_dim, swiglu,
};

use super::common::{CPU, Ours, gap, random, values};

/// candle reads its switch once in a thread, so what needs it runs in a process of its own.
#[test]
fn derivatives_of_derivatives() {
    let me = std::env::current_exe().unwrap();
    let run = std::process::Command::new(me)
        .args(["--exact", "second_order::with_the_switch", "--ignored"])
        .env("CANDLE_GRAD_DO_NOT_DETACH", "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&run.stdout);
    assert!(run.status.success() && said.contains("1 passed"), "{said}");
}

fn operations() -> Vec<(&'static str, Vec<usize>, Ours<'static>)> {
    let ours: [(_, _, Ours<'static>); 21] = [
        ("gelu", vec![2, 5], &|x| gelu(&x[0])),
        ("gelu_erf", vec![2, 5], &|x| gelu_erf(&x[0])),
        ("silu", vec![2, 5], &|x| silu(&x[0])),
        ("swiglu", vec![2, 5], &|x| swiglu(&x[0], &x[0])),
        ("relu", vec![2, 5], &|x| relu(&x[0])),
        ("avg_pool2d", vec![2, 3, 5], &|x| avg_pool2d(&x[0], 2)),
        ("conv1d that trains", vec![4, 2, 3], &|x| {
            let config = Conv1dConfig {
                padding: 1,
                groups: 2,
                ..Default::default()
            };
            let x = &x[0];
            conv1d(&Tensor::cat(&[x, x], 1)?, x, Some(&x.sum((1, 2))?), &config)
        }),
        // Of third degree in x too, with places that the kernel leaves out.
        ("lora_conv2d", vec![2, 2, 2, 2], &|x| {
            let config = Conv2dConfig {
                padding: 1,
                stride: 2,
                ..Default::default()
            };
            let (w, b) = (random(&[3, 2, 2, 2], 1.0, 1), random(&[1, 2, 1, 1], 1.0, 2));
            let b = Tensor::cat(&[&x[0].narrow(2, 0, 1)?.narrow(3, 1, 1)?, &b], 0)?;
            lora_conv2d(&x[0], &w, None, &x[0], &b, 0.5, &config)
        }),
        ("rms_norm", vec![2, 5], &|x| {
            rms_norm(&x[0], &random(&[5], 1.0, 1), 1e-3)
        }),
        ("layer_norm", vec![2, 5], &|x| {
            let w = random(&[5], 1.0, 1);
            layer_norm(&x[0], &w, Some(&w), 1e-3)
        }),
        ("softmax", vec![2, 5], &|x| softmax_last_dim(&x[0])),
        ("causal_softmax", vec![3, 5], &|x| causal_softmax(&x[0])),
        ("rope", vec![1, 2, 1, 4], &|x| {
            let angles = random(&[2, 2], 1.0, 1);
            rope(&x[0], &angles.cos()?, &angles.sin()?)
        }),
        ("attention", vec![1, 3, 2, 4], &|x| {
            attention(&x[0], &x[0], &x[0], 0.5, &AttentionMask::default())
        }),
        ("cross_entropy", vec![2, 5], &|x| {
            cross_entropy(&x[0], &Tensor::new(&[3i64, 1], &CPU)?)
        }),
        ("linear", vec![2, 5], &|x| {
            linear(&x[0], &random(&[3, 5], 1.0, 1), None)
        }),
        ("linear that trains", vec![3, 2], &|x| {
            linear(&x[0], &x[0], Some(&x[0].sum(1)?))
        }),
        // Of third degree in x, so that every part of the gradient has one of its own.
        ("lora_linear", vec![2, 2], &|x| {
            let w = random(&[2, 2], 1.0, 1);
            lora_linear(&x[0], &w, None, &x[0], &x[0], 0.5)
        }),
        ("linear_cross_entropy", vec![2, 5], &|x| {
            let w = random(&[3, 5], 1.0, 1);
            linear_cross_entropy(&x[0], &w, &Tensor::new(&[2i64, 1], &CPU)?)
        }),
        ("linear_cross_entropy that trains", vec![2, 5], &|x| {
            linear_cross_entropy(&x[0], &x[0], &Tensor::new(&[0i64, 1], &CPU)?)
        }),
        ("mse_loss", vec![2, 5], &|x| {
            mse_loss(&x[0], &random(&[2, 5], 1.0, 1))
        }),
    ];
    ours.into_iter().collect()
}

/// The gradient of Σ w y², for weights w: a function whose own gradient needs that of the op's.
fn gradient(ours: Ours<'_>, x: &Var) -> Tensor {
    let y = ours(&[x.as_tensor().clone()]).unwrap();
    let w = random(y.dims(), 1.0, 3);
    let loss = (y.sqr().unwrap() * w).unwrap().sum_all().unwrap();
    loss.backward().unwrap().get(x).unwrap().clone()
}

#[test]
#[ignore = "needs CANDLE_GRAD_DO_NOT_DETACH=1; derivatives_of_derivatives runs it"]
fn with_the_switch() {
    const STEP: f64 = 1e-5;
    for (name, shape, ours) in operations() {
        let x = Var::from_tensor(&random(&shape, 2.0, 2)).unwrap();
        let direction = random(&shape, 1.0, 4);
        let along = (gradient(ours, &x) * &direction).unwrap();
        let second = along.sum_all().unwrap().backward().unwrap();
        let second = second.get(&x).unwrap();
        let moved = |by: f64| {
            let x = (x.as_tensor() + (&direction * by).unwrap()).unwrap();
            gradient(ours, &Var::from_tensor(&x.detach()).unwrap())
        };
        let want = ((moved(STEP) - moved(-STEP)).unwrap() / (2.0 * STEP)).unwrap();
        let off = gap(second, &want);
        assert!(
            off <= 1e-7,
            "{name}: {off:e}\n{:?}\n{:?}",
            values(second),
            values(&want)
        );
    }
}
