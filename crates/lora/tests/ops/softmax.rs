use candle_core::{D, DType, Result, Tensor, Var};
use lora::ops::{causal_softmax, softmax_last_dim};

use super::common::{
    CPU, Ours, Plain, SIZES, check, differences, only_what_is_tracked, random, refused, run,
    same_on_any_threads, takes_views, values,
};

const OURS: Ours<'static> = &|x| softmax_last_dim(&x[0]);
const CAUSAL: Ours<'static> = &|x| causal_softmax(&x[0]);
const PLAIN: Plain<'static> = &|x| plain(&x[0]);
const PLAIN_CAUSAL: Plain<'static> = &|x| {
    let (l, s) = (x[0].dim(D::Minus2)?, x[0].dim(D::Minus1)?);
    let hidden = (0..l).flat_map(|i| (0..s).map(move |j| if j + l > i + s { -1e300 } else { 0.0 }));
    let mask = Tensor::from_vec(hidden.collect::<Vec<f64>>(), (l, s), &CPU)?;
    plain(&x[0].broadcast_add(&mask)?)
};

fn plain(x: &Tensor) -> Result<Tensor> {
    let e = x
        .broadcast_sub(&x.max_keepdim(D::Minus1)?.detach())?
        .exp()?;
    e.broadcast_div(&e.sum_keepdim(D::Minus1)?)
}

#[test]
fn softmax_is_the_composition() {
    for (rows, n) in SIZES {
        check("softmax", &[random(&[rows, n], 5.0, 1)], OURS, PLAIN);
    }
    check("softmax", &[random(&[7], 5.0, 2)], OURS, PLAIN);
    check("softmax", &[random(&[2, 3, 2, 5], 5.0, 3)], OURS, PLAIN);
    let few = [random(&[2, 3, 7], 2.0, 4)];
    differences("softmax", &few, OURS);
    only_what_is_tracked("softmax", &few, OURS);
    takes_views("softmax", &few, OURS);
    same_on_any_threads("softmax", &[random(&[403, 77], 4.0, 5)], OURS);
}

#[test]
fn causal_softmax_is_the_composition() {
    for (l, s) in [
        (1, 1),
        (1, 9),
        (2, 3),
        (7, 7),
        (8, 33),
        (33, 40),
        (130, 131),
    ] {
        let scores = [random(&[2, 3, l, s], 5.0, 6)];
        check("causal_softmax", &scores, CAUSAL, PLAIN_CAUSAL);
    }
    check(
        "causal_softmax",
        &[random(&[5, 8], 5.0, 7)],
        CAUSAL,
        PLAIN_CAUSAL,
    );
    let few = [random(&[2, 4, 6], 2.0, 8)];
    differences("causal_softmax", &few, CAUSAL);
    only_what_is_tracked("causal_softmax", &few, CAUSAL);
    takes_views("causal_softmax", &few, CAUSAL);
    same_on_any_threads("causal_softmax", &[random(&[3, 90, 91], 4.0, 9)], CAUSAL);
}

#[test]
fn what_is_hidden_has_no_say() {
    for dtype in [DType::F32, DType::F64, DType::BF16] {
        let scores = random(&[3, 5], 2.0, 10).to_dtype(DType::F64).unwrap();
        let mut rows = scores.to_vec2::<f64>().unwrap();
        for (i, row) in rows.iter_mut().enumerate() {
            row[i + 3..].fill(f64::INFINITY);
        }
        for (i, row) in rows.iter_mut().enumerate().take(1) {
            row[i + 3..].fill(f64::NAN);
        }
        let hostile = Tensor::new(rows, &CPU).unwrap().to_dtype(dtype).unwrap();
        let (want, _) = run(CAUSAL, &[scores.to_dtype(dtype).unwrap()], &[false]);
        let (y, gradients) = run(CAUSAL, &[hostile], &[true]);
        assert_eq!(values(&y), values(&want), "{dtype:?}");
        let dx = values(gradients[0].as_ref().unwrap());
        assert!(dx.iter().all(|v| v.is_finite()), "{dtype:?}: {dx:?}");
        for (row, seen) in [(0, 3), (1, 4)] {
            assert!(
                dx[row * 5 + seen..(row + 1) * 5].iter().all(|v| *v == 0.0),
                "{dtype:?}"
            );
        }
    }
}

#[test]
fn softmax_stands_extremes() {
    let rows = [
        [1e4f32, -1e4, 0.0, 1.0],
        [1e4, 1e4, 1e4, 1e4],
        [-1e4, -1e4, -1e4, -1e4],
        [3e38, -3e38, 0.0, 0.0],
        [0.0, -87.0, -104.0, -200.0],
        [f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY, 0.0],
    ];
    let want = [
        [1.0, 0.0, 0.0, 0.0],
        [0.25; 4],
        [0.25; 4],
        [1.0, 0.0, 0.0, 0.0],
        [1.0, (-87f64).exp(), 0.0, 0.0],
        [0.0, 0.5, 0.0, 0.5],
    ];
    let x = Var::new(&rows, &CPU).unwrap();
    for y in [
        softmax_last_dim(&x),
        causal_softmax(&x.unsqueeze(1).unwrap()),
    ] {
        let y = y.unwrap();
        for (got, want) in values(&y).iter().zip(want.as_flattened()) {
            assert!((got - want).abs() <= 1e-6 * want, "{got:e} for {want:e}");
        }
        let gradients = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        let dx = values(gradients.get(&x).unwrap());
        assert!(dx.iter().all(|v| v.is_finite()), "{dx:?}");
    }
    let x = Tensor::new(&[[1f32, f32::NAN], [1.0, 2.0]], &CPU).unwrap();
    let y = values(&softmax_last_dim(&x).unwrap());
    assert!(y[..2].iter().all(|v| v.is_nan()) && y[2..].iter().all(|v| v.is_finite()));
}

#[test]
fn softmax_refuses_by_name() {
    refused(
        softmax_last_dim(&random(&[], 1.0, 1)),
        &["softmax_last_dim", "x []", "dimension"],
    );
    let ids = Tensor::new(&[1u32], &CPU).unwrap();
    refused(softmax_last_dim(&ids), &["softmax_last_dim", "U32"]);
    refused(
        causal_softmax(&random(&[3], 1.0, 1)),
        &["causal_softmax", "scores [3]", "L, S"],
    );
    refused(
        causal_softmax(&random(&[3, 2], 1.0, 1)),
        &["causal_softmax", "[3, 2]", "no more"],
    );
}

#[test]
fn nothing_is_nothing() {
    for dtype in [DType::F32, DType::BF16] {
        for shape in [[2, 0, 0], [0, 2, 3], [2, 0, 3]] {
            let x = Tensor::zeros(&shape, dtype, &CPU).unwrap();
            assert_eq!(softmax_last_dim(&x).unwrap().dims(), shape);
            assert_eq!(causal_softmax(&x).unwrap().dims(), shape);
        }
    }
}
