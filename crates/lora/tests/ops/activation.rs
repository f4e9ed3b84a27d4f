use candle_core::{DType, Result, Tensor};
use lora::ops::{gelu, gelu_erf, relu, silu, swiglu};

use super::common::{
    CPU, Ours, Plain, SIZES, check, differences, only_what_is_tracked, random, refused, run,
    same_on_any_threads, takes_views, values,
};

fn plain_gelu(x: &Tensor) -> Result<Tensor> {
    let z = ((x + (x.powf(3.0)? * 0.044715)?)? * (2.0 / std::f64::consts::PI).sqrt())?;
    (x * 0.5)? * (z.tanh()? + 1.0)?
}

fn plain_gelu_erf(x: &Tensor) -> Result<Tensor> {
    (x * 0.5)? * ((x / 2f64.sqrt())?.erf()? + 1.0)?
}

fn plain_silu(x: &Tensor) -> Result<Tensor> {
    x / (x.neg()?.exp()? + 1.0)?
}

const CURVES: [(&str, Ours<'static>, Plain<'static>); 4] = [
    ("relu", &|x| relu(&x[0]), &|x| x[0].relu()),
    ("gelu", &|x| gelu(&x[0]), &|x| plain_gelu(&x[0])),
    ("gelu_erf", &|x| gelu_erf(&x[0]), &|x| plain_gelu_erf(&x[0])),
    ("silu", &|x| silu(&x[0]), &|x| plain_silu(&x[0])),
];

const SWIGLU: Ours<'static> = &|x| swiglu(&x[0], &x[1]);

#[test]
fn curves_are_the_composition() {
    for (name, ours, plain) in CURVES {
        for (rows, n) in SIZES {
            check(name, &[random(&[rows, n], 6.0, 1)], ours, plain);
        }
        check(name, &[random(&[], 3.0, 2)], ours, plain);
        check(name, &[random(&[2, 3, 1, 5], 3.0, 3)], ours, plain);
        let few = [random(&[3, 7], 4.0, 4)];
        differences(name, &few, ours);
        only_what_is_tracked(name, &few, ours);
        takes_views(name, &few, ours);
        takes_views(name, &[random(&[70, 300], 4.0, 5)], ours);
        same_on_any_threads(name, &[random(&[70, 301], 4.0, 6)], ours);
    }
}

#[test]
fn swiglu_is_the_composition() {
    let plain: Plain<'_> = &|x| plain_silu(&x[0])? * &x[1];
    for (rows, n) in SIZES {
        let both = [random(&[rows, n], 6.0, 7), random(&[rows, n], 2.0, 8)];
        check("swiglu", &both, SWIGLU, plain);
    }
    let few = [random(&[2, 3, 7], 4.0, 9), random(&[2, 3, 7], 4.0, 10)];
    differences("swiglu", &few, SWIGLU);
    only_what_is_tracked("swiglu", &few, SWIGLU);
    takes_views("swiglu", &few, SWIGLU);
    let many = [random(&[70, 301], 4.0, 11), random(&[70, 301], 4.0, 12)];
    same_on_any_threads("swiglu", &many, SWIGLU);
}

#[test]
fn swiglu_of_a_tensor_with_itself_gets_both_gradients() {
    let x = random(&[3, 9], 3.0, 13);
    let twice: Ours<'_> = &|x| swiglu(&x[0], &x[0]);
    check("swiglu(x, x)", &[x], twice, &|x| plain_silu(&x[0])? * &x[0]);
}

/// Values and slopes of a curve at f32 numbers.
fn curve(ours: Ours<'_>, at: &[f32]) -> (Vec<f64>, Vec<f64>) {
    let x = Tensor::new(at, &CPU).unwrap();
    let x = candle_core::Var::from_tensor(&x).unwrap();
    let y = ours(&[x.as_tensor().clone()]).unwrap();
    let gradients = y.sum_all().unwrap().backward().unwrap();
    (values(&y), values(gradients.get(&x).unwrap()))
}

#[test]
fn curves_stand_extremes() {
    let at = [
        0.0f32,
        -0.0,
        1e-40,
        -1e-40,
        20.0,
        -20.0,
        87.0,
        -87.0,
        88.0,
        -88.0,
        89.0,
        -89.0,
        104.0,
        -104.0,
        1e4,
        -1e4,
        1e19,
        -1e19,
        1e30,
        -1e30,
        f32::MAX,
        f32::MIN,
    ];
    for (name, ours, _) in CURVES {
        let (y, slope) = curve(ours, &at);
        for ((&x, y), slope) in at.iter().zip(y).zip(slope) {
            let x = f64::from(x);
            if name == "relu" {
                assert_eq!((y, slope), (x.max(0.0), f64::from(x >= 0.0)), "at {x}");
                continue;
            }
            // All three are 0 far below and x far above; silu comes near last.
            let (far, near) = (x.abs() >= 20.0, if name == "silu" { 1e-6 } else { 1e-30 });
            if far {
                assert!(
                    (y - x.max(0.0)).abs() <= near * x.abs().min(100.0),
                    "{name}({x}) = {y}"
                );
                let want = f64::from(x > 0.0);
                assert!(
                    (slope - want).abs() <= near * 40.0,
                    "{name}'({x}) = {slope}"
                );
            } else {
                assert!((y - x / 2.0).abs() <= 1e-45, "{name}({x}) = {y}");
                assert!((slope - 0.5).abs() < 1e-7, "{name}'({x}) = {slope}");
            }
        }
        let (y, slope) = curve(ours, &[f32::NAN; 9]);
        assert!(
            y.iter().chain(&slope).all(|v| v.is_nan()),
            "{name} hides NaN"
        );
        let (y, _) = curve(ours, &[f32::INFINITY; 9]);
        assert!(y.iter().all(|v| *v == f64::INFINITY), "{name}(∞) = {y:?}");
    }
}

#[test]
fn gelu_erf_keeps_its_digits_in_the_tail() {
    let at: Vec<f32> = (0..=200_000).map(|i| -12.5 + i as f32 * 1.25e-4).collect();
    let (y, slope) = curve(&|x| gelu_erf(&x[0]), &at);
    for ((&x, y), slope) in at.iter().zip(y).zip(slope) {
        let x = f64::from(x);
        let below = 0.5 * libm_erfc(-x / 2f64.sqrt());
        let density = (-x * x / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
        let (want, wanted) = (x * below, below + x * density);
        assert!(
            (y - want).abs() <= 1.3e-7 * x.abs().max(1.0),
            "{x}: {y} for {want}"
        );
        assert!(
            (slope - wanted).abs() <= 2e-7,
            "{x}: slope {slope} for {wanted}"
        );
        if x < -2.0 {
            assert!((y / want - 1.0).abs() <= 6e-6, "{x}: {y} for {want}");
            assert!(
                (slope / wanted - 1.0).abs() <= 6e-6,
                "{x}: slope {slope} for {wanted}"
            );
        }
    }
}

/// erfc by its continued fraction in the tail, and by erf elsewhere.
fn libm_erfc(t: f64) -> f64 {
    if t < 1.4 {
        return 1.0 - candle_core::cpu::erf::erf_f64(t);
    }
    let mut fraction = 0.0;
    for k in (1..200).rev() {
        fraction = f64::from(k) / 2.0 / (t + fraction);
    }
    (-t * t).exp() / std::f64::consts::PI.sqrt() / (t + fraction)
}

#[test]
fn activations_refuse_by_name() {
    let ids = Tensor::new(&[1u32, 2], &CPU).unwrap();
    refused(gelu(&ids), &["gelu", "[2]", "U32", "floating"]);
    refused(gelu_erf(&ids), &["gelu_erf"]);
    refused(silu(&ids), &["silu"]);
    refused(relu(&ids), &["relu"]);
    let (a, b) = (random(&[2, 3], 1.0, 1), random(&[3], 1.0, 1));
    refused(
        swiglu(&a, &b),
        &["swiglu", "gate [2, 3]", "up [3]", "one shape"],
    );
    let b = a.to_dtype(DType::F32).unwrap();
    refused(
        swiglu(&a, &b),
        &["gate [2, 3] of F64", "up [2, 3] of F32", "one floating"],
    );
}

#[test]
fn nothing_is_nothing() {
    for (name, ours, _) in CURVES {
        let (y, gradients) = run(ours, &[random(&[0, 4], 1.0, 1)], &[true]);
        assert_eq!(y.dims(), [0, 4], "{name}");
        assert!(gradients[0].is_some(), "{name}");
    }
}
