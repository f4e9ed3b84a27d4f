use candle_core::{D, DType, Result, Tensor, Var};
use lora::ops::{layer_norm, rms_norm};

use super::common::{
    CPU, Ours, Plain, SIZES, check, differences, gap, only_what_is_tracked, random, refused, run,
    same_on_any_threads, takes_views, values,
};

const EPS: f64 = 1e-5;

fn plain_rms(x: &Tensor, eps: f64) -> Result<Tensor> {
    x.broadcast_div(&(x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?)
}

fn plain_layer(x: &Tensor, eps: f64) -> Result<Tensor> {
    plain_rms(&x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?, eps)
}

const RMS: Ours<'static> = &|x| rms_norm(&x[0], &x[1], EPS);
const LAYER: Ours<'static> = &|x| layer_norm(&x[0], &x[1], x.get(2), EPS);
const PLAIN_RMS: Plain<'static> = &|x| plain_rms(&x[0], EPS)?.broadcast_mul(&x[1]);
const PLAIN_LAYER: Plain<'static> = &|x| {
    let y = plain_layer(&x[0], EPS)?.broadcast_mul(&x[1])?;
    match x.get(2) {
        Some(b) => y.broadcast_add(b),
        None => Ok(y),
    }
};

fn inputs(shape: &[usize], count: usize) -> Vec<Tensor> {
    let n = shape.last().copied().unwrap();
    let mut inputs = vec![
        random(shape, 2.0, 1),
        random(&[n], 2.0, 2),
        random(&[n], 2.0, 3),
    ];
    inputs.truncate(count);
    inputs
}

/// The operation, its composition, and its number of inputs.
const NORMS: [(&str, Ours<'static>, Plain<'static>, usize); 3] = [
    ("rms_norm", RMS, PLAIN_RMS, 2),
    ("layer_norm", LAYER, PLAIN_LAYER, 2),
    ("layer_norm with a bias", LAYER, PLAIN_LAYER, 3),
];

#[test]
fn norms_are_the_composition() {
    for (name, ours, plain, count) in NORMS {
        for (rows, n) in SIZES {
            // Rows of one number lose nearly all of their gradient, and f32 its digits.
            if n > 2 {
                check(name, &inputs(&[rows, n], count), ours, plain);
            }
        }
        check(name, &inputs(&[5], count), ours, plain);
        check(name, &inputs(&[2, 3, 2, 5], count), ours, plain);
        let few = inputs(&[2, 3, 7], count);
        differences(name, &few, ours);
        only_what_is_tracked(name, &few, ours);
        only_what_is_tracked(name, &inputs(&[40, 515], count), ours);
        takes_views(name, &few, ours);
        // Several blocks of rows, the last one short.
        same_on_any_threads(name, &inputs(&[403, 77], count), ours);
        check(name, &inputs(&[403, 77], count), ours, plain);
        check(name, &inputs(&[3000, 3], count), ours, plain);
    }
}

#[test]
fn eps_counts() {
    // With less, the gradient of a row of one number is lost among its digits.
    differences("rms_norm", &inputs(&[4, 1], 2), &|x| {
        rms_norm(&x[0], &x[1], 10.0)
    });
    for eps in [0.0, 1e-12, 1e-3, 10.0] {
        let all = inputs(&[3, 33], 3);
        check(
            &format!("rms_norm, eps {eps}"),
            &all[..2],
            &|x| rms_norm(&x[0], &x[1], eps),
            &|x| plain_rms(&x[0], eps)?.broadcast_mul(&x[1]),
        );
        let ours: Ours<'_> = &|x| layer_norm(&x[0], &x[1], Some(&x[2]), eps);
        check(&format!("layer_norm, eps {eps}"), &all, ours, &|x| {
            plain_layer(&x[0], eps)?
                .broadcast_mul(&x[1])?
                .broadcast_add(&x[2])
        });
    }
}

/// Rows whose numbers are all alike, where ε alone keeps the division from being by 0.
#[test]
fn rows_of_one_number_are_zero_after_layer_norm() {
    for n in [1, 3, 8, 33, 1000] {
        for value in [0.0f32, 1.0 / 3.0, -12345.678, 1e4 * std::f32::consts::PI] {
            let x = Tensor::full(value, (2, n), &CPU).unwrap();
            let w = Tensor::ones(n, DType::F32, &CPU).unwrap();
            let (y, gradients) = run(LAYER, &[x, w], &[true, true]);
            let worst = values(&y).iter().fold(0f64, |m, v| m.max(v.abs()));
            assert!(worst <= 1e-6, "{n} times {value}: {worst:e}");
            // g - mean(g), over √ε.
            let dx = values(gradients[0].as_ref().unwrap());
            assert!(
                dx.iter()
                    .all(|v| v.is_finite() && v.abs() < 2.0 / EPS.sqrt()),
                "{dx:?}"
            );
        }
    }
}

#[test]
fn norms_stand_large_and_small_numbers() {
    for (name, ours, plain, count) in NORMS {
        for size in [1e4, 1e-4] {
            let mut all = inputs(&[3, 1000], count);
            all[0] = (&all[0] * size).unwrap();
            close(name, &all, ours, plain, 1e-6, 3e-6);
        }
    }
    // Small differences on a large mean, which a single pass over the row would lose.
    let mut all = inputs(&[3, 1000], 3);
    all[0] = (&all[0] + 1e4).unwrap();
    close(
        "layer_norm far from 0",
        &all,
        LAYER,
        PLAIN_LAYER,
        1e-6,
        3e-6,
    );
}

/// f32 against f64 of the same numbers.
fn close(name: &str, all: &[Tensor], ours: Ours<'_>, plain: Plain<'_>, forward: f64, back: f64) {
    let tracked = vec![true; all.len()];
    let single: Vec<Tensor> = all
        .iter()
        .map(|x| x.to_dtype(DType::F32).unwrap())
        .collect();
    let (y, gradients) = run(ours, &single, &tracked);
    let double = single.iter().map(|x| x.to_dtype(DType::F64).unwrap());
    let vars: Vec<Var> = double.map(|x| Var::from_tensor(&x).unwrap()).collect();
    let given: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let want = plain(&given).unwrap();
    let off = gap(&y, &want);
    assert!(off <= forward, "{name}: off by {off:e}");
    let g = random(y.dims(), 1.0, 77).to_dtype(DType::F32).unwrap();
    let loss = (want * g.to_dtype(DType::F64).unwrap())
        .unwrap()
        .sum_all()
        .unwrap();
    let wanted = loss.backward().unwrap();
    for (gradient, x) in gradients.iter().zip(&given) {
        let off = gap(gradient.as_ref().unwrap(), wanted.get(x).unwrap());
        assert!(off <= back, "{name}: gradient off by {off:e}");
    }
}

#[test]
fn norms_pass_nan_on() {
    let x = Tensor::new(&[[1f32, f32::NAN, 3.0], [1.0, 2.0, 3.0]], &CPU).unwrap();
    let w = Tensor::ones(3, DType::F32, &CPU).unwrap();
    for y in [
        rms_norm(&x, &w, EPS).unwrap(),
        layer_norm(&x, &w, None, EPS).unwrap(),
    ] {
        let y = values(&y);
        assert!(y[..3].iter().all(|v| v.is_nan()) && y[3..].iter().all(|v| v.is_finite()));
    }
}

#[test]
fn norms_refuse_by_name() {
    let (x, w) = (random(&[2, 3], 1.0, 1), random(&[3], 1.0, 1));
    let other = random(&[2], 1.0, 1);
    refused(
        rms_norm(&x, &other, EPS),
        &["rms_norm", "x [2, 3]", "w [2]", "[…, 2]"],
    );
    refused(rms_norm(&x, &x, EPS), &["rms_norm", "w must be [n]"]);
    refused(
        layer_norm(&x, &w, Some(&other), EPS),
        &["layer_norm", "b [2]", "b must be [3]"],
    );
    refused(rms_norm(&x, &w, -1.0), &["eps = -1"]);
    refused(rms_norm(&x, &w, f64::NAN), &["eps = NaN"]);
    let single = w.to_dtype(DType::F32).unwrap();
    refused(
        layer_norm(&x, &single, None, EPS),
        &["w [3] of F32", "one floating-point type"],
    );
    let none = random(&[2, 0], 1.0, 1);
    refused(
        layer_norm(&none, &random(&[0], 1.0, 1), None, EPS),
        &["at least 1"],
    );
}

#[test]
fn no_rows_are_no_rows() {
    for (name, ours, _, count) in NORMS {
        let mut all = inputs(&[1, 4], count);
        all[0] = random(&[0, 4], 1.0, 1);
        let (y, gradients) = run(ours, &all, &vec![true; count]);
        assert_eq!(y.dims(), [0, 4], "{name}");
        assert_eq!(values(gradients[1].as_ref().unwrap()), [0.0; 4], "{name}");
    }
}
