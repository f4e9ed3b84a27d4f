use candle_core::{D, DType, Result, Tensor, Var};
use lora::ops::{IGNORE_INDEX, cross_entropy, mse_loss};

use super::common::{
    CPU, Ours, SIZES, check, differences, only_what_is_tracked, random, refused, run,
    same_on_any_threads, takes_views, values,
};

/// Targets of which every third does not count, if `ignoring`.
fn targets(shape: &[usize], classes: usize, ignoring: bool) -> Tensor {
    let rows: usize = shape.iter().product();
    let target = |i: usize| match ignoring && i % 3 == 1 {
        true => IGNORE_INDEX,
        false => (i * 7919 % classes) as i64,
    };
    let targets: Vec<i64> = (0..rows).map(target).collect();
    Tensor::from_vec(targets, shape, &CPU).unwrap()
}

/// The rows that count, by gather of a log-softmax.
fn plain(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let classes = logits.dim(D::Minus1)?;
    let targets = targets
        .flatten_all()?
        .to_dtype(DType::I64)?
        .to_vec1::<i64>()?;
    let counted = (0..targets.len()).filter(|&i| targets[i] != IGNORE_INDEX);
    let counted: Vec<u32> = counted.map(|i| i as u32).collect();
    let kept: Vec<u32> = counted
        .iter()
        .map(|&i| targets[i as usize] as u32)
        .collect();
    let x = logits.reshape((targets.len(), classes))?;
    let x = x.index_select(&Tensor::new(counted, &CPU)?, 0)?;
    let below = x.broadcast_sub(&x.max_keepdim(1)?.detach())?;
    let logs = below.broadcast_sub(&below.exp()?.sum_keepdim(1)?.log()?)?;
    logs.gather(&Tensor::new(kept, &CPU)?.unsqueeze(1)?, 1)?
        .mean_all()?
        .neg()
}

#[test]
fn cross_entropy_is_the_composition() {
    let shapes: [&[usize]; 3] = [&[7], &[2, 3, 5], &[403, 77]];
    let sizes = SIZES.map(|(rows, n)| [rows, n]);
    let shapes = shapes.into_iter().chain(sizes.iter().map(|s| s.as_slice()));
    for shape in shapes {
        let (classes, leading) = shape.split_last().unwrap();
        for ignoring in [false, true] {
            let targets = targets(leading, *classes, ignoring);
            let logits = [random(shape, 5.0, 1)];
            let ours: Ours<'_> = &|x| cross_entropy(&x[0], &targets);
            check("cross_entropy", &logits, ours, &|x| plain(&x[0], &targets));
        }
    }
}

#[test]
fn cross_entropy_takes_what_the_others_take() {
    let logits = [random(&[2, 3, 7], 2.0, 2)];
    let few = targets(&[2, 3], 7, true);
    let ours: Ours<'_> = &|x| cross_entropy(&x[0], &few);
    differences("cross_entropy", &logits, ours);
    only_what_is_tracked("cross_entropy", &logits, ours);
    takes_views("cross_entropy", &logits, ours);
    let many = targets(&[403], 77, true);
    let logits = [random(&[403, 77], 4.0, 3)];
    same_on_any_threads("cross_entropy", &logits, &|x| cross_entropy(&x[0], &many));
}

#[test]
fn targets_of_both_types_and_any_strides() {
    let logits = random(&[2, 3, 7], 2.0, 4);
    let wide = targets(&[2, 3], 7, false);
    let want = cross_entropy(&logits, &wide).unwrap();
    let narrow = wide.to_dtype(DType::U32).unwrap();
    let strided = narrow.t().unwrap().contiguous().unwrap().t().unwrap();
    for targets in [narrow, strided] {
        let loss = cross_entropy(&logits, &targets).unwrap();
        assert_eq!(values(&loss), values(&want));
    }
}

#[test]
fn what_does_not_count_has_no_say() {
    for dtype in [DType::F32, DType::F64, DType::BF16] {
        let rows = [
            [1f64, 2.0, 0.5],
            [f64::NAN, f64::INFINITY, 0.0],
            [0.0, -1.0, 3.0],
        ];
        let x = Tensor::new(&rows, &CPU).unwrap().to_dtype(dtype).unwrap();
        let counted = Tensor::new(&[0i64, IGNORE_INDEX, 2], &CPU).unwrap();
        let (loss, dx) = run(
            &|x| cross_entropy(&x[0], &counted),
            std::slice::from_ref(&x),
            &[true],
        );
        let kept = Tensor::cat(&[x.narrow(0, 0, 1).unwrap(), x.narrow(0, 2, 1).unwrap()], 0);
        let kept_targets = Tensor::new(&[0u32, 2], &CPU).unwrap();
        let (want, want_dx) = run(
            &|x| cross_entropy(&x[0], &kept_targets),
            &[kept.unwrap()],
            &[true],
        );
        assert_eq!(values(&loss), values(&want), "{dtype:?}");
        let (dx, want_dx) = (
            values(dx[0].as_ref().unwrap()),
            values(want_dx[0].as_ref().unwrap()),
        );
        assert_eq!(dx[..3], want_dx[..3], "{dtype:?}");
        assert_eq!(dx[6..], want_dx[3..], "{dtype:?}");
        assert_eq!(dx[3..6], [0.0; 3], "{dtype:?}");
    }
}

#[test]
fn cross_entropy_stands_large_logits() {
    let rows = [
        [1e4f32, 0.0, -1e4],
        [1e4, 1e4, 1e4 - 1.0],
        [-1e4, -1e4, -1e4],
        [3e38, 0.0, 0.0],
    ];
    let targets = [0u32, 1, 2, 0];
    let x = Var::new(&rows, &CPU).unwrap();
    let loss = cross_entropy(&x, &Tensor::new(&targets, &CPU).unwrap()).unwrap();
    let second = (2.0 + (-1f64).exp()).ln();
    let want = (second + 3f64.ln()) / 4.0;
    assert!((f64::from(loss.to_scalar::<f32>().unwrap()) - want).abs() <= 1e-6 * want);
    let dx = values(loss.backward().unwrap().get(&x).unwrap());
    let (a, b) = ((-second).exp() / 4.0, (-1.0 - second).exp() / 4.0);
    let third = 1.0 / 12.0;
    let want = [
        0.0,
        0.0,
        0.0,
        a,
        a - 0.25,
        b,
        third,
        third,
        third - 0.25,
        0.0,
        0.0,
        0.0,
    ];
    for (got, want) in dx.iter().zip(want) {
        assert!((got - want).abs() <= 1e-7, "{dx:?}");
    }
    // The target far below: the loss is the distance.
    let x = Tensor::new(&[[1e4f32, -1e4]], &CPU).unwrap();
    let loss = cross_entropy(&x, &Tensor::new(&[1u32], &CPU).unwrap()).unwrap();
    assert_eq!(loss.to_scalar::<f32>().unwrap(), 2e4);
}

#[test]
fn cross_entropy_of_a_vocabulary() {
    let (rows, classes) = (3, 49_152);
    let logits = [random(&[rows, classes], 8.0, 5)];
    let targets = targets(&[rows], classes, false);
    let ours: Ours<'_> = &|x| cross_entropy(&x[0], &targets);
    check("cross_entropy", &logits, ours, &|x| plain(&x[0], &targets));
}

#[test]
fn cross_entropy_refuses_by_name() {
    let logits = random(&[2, 3], 1.0, 1);
    let at = |targets: &[i64]| Tensor::new(targets, &CPU).unwrap();
    let op = "cross_entropy";
    refused(
        cross_entropy(&logits, &at(&[0, 3])),
        &[op, "target 3 at position 1", "below 3"],
    );
    refused(
        cross_entropy(&logits, &at(&[-1, 0])),
        &[op, "target -1 at position 0"],
    );
    refused(
        cross_entropy(&logits, &at(&[-100, -100])),
        &[op, "at least one target"],
    );
    let unsigned = Tensor::new(&[0u32, 4_294_967_196], &CPU).unwrap();
    refused(
        cross_entropy(&logits, &unsigned),
        &["target 4294967196 at position 1"],
    );
    refused(
        cross_entropy(&logits, &at(&[0])),
        &["logits [2, 3]", "targets [1]", "must be [2]"],
    );
    refused(
        cross_entropy(&logits, &logits),
        &["targets [2, 3] of F64", "u32 or i64"],
    );
    refused(
        cross_entropy(&at(&[1, 2]), &at(&[0])),
        &["logits [2] of I64", "floating"],
    );
    let (none, no_targets) = (random(&[0, 3], 1.0, 1), Tensor::zeros(0, DType::I64, &CPU));
    refused(
        cross_entropy(&none, &no_targets.unwrap()),
        &["at least one target"],
    );
    refused(
        cross_entropy(&random(&[], 1.0, 1), &at(&[])),
        &["logits []", "classes"],
    );
}

const MSE: Ours<'static> = &|x| mse_loss(&x[0], &x[1]);

#[test]
fn mse_loss_is_the_composition() {
    for (rows, n) in SIZES {
        let both = [random(&[rows, n], 2.0, 6), random(&[rows, n], 2.0, 7)];
        check("mse_loss", &both, MSE, &|x| {
            (&x[0] - &x[1])?.sqr()?.mean_all()
        });
    }
    let few = [random(&[2, 3, 7], 2.0, 8), random(&[2, 3, 7], 2.0, 9)];
    differences("mse_loss", &few, MSE);
    only_what_is_tracked("mse_loss", &few, MSE);
    takes_views("mse_loss", &few, MSE);
    let many = [random(&[403, 77], 2.0, 10), random(&[403, 77], 2.0, 11)];
    same_on_any_threads("mse_loss", &many, MSE);
    let one = random(&[], 1.0, 12);
    check("mse_loss", &[one, random(&[], 1.0, 13)], MSE, &|x| {
        (&x[0] - &x[1])?.sqr()
    });
}

#[test]
fn mse_loss_refuses_by_name() {
    let (a, b) = (random(&[2, 3], 1.0, 1), random(&[3], 1.0, 1));
    refused(
        mse_loss(&a, &b),
        &["mse_loss", "x [2, 3]", "target [3]", "one shape"],
    );
    let single = a.to_dtype(DType::F32).unwrap();
    refused(mse_loss(&a, &single), &["target [2, 3] of F32"]);
    let none = random(&[0], 1.0, 1);
    refused(mse_loss(&none, &none), &["mse_loss", "hold something"]);
}
