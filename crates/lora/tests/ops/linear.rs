use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Linear, Module};
use lora::ops::{cross_entropy, linear, linear_cross_entropy, lora_linear};
use lora::{BASE_ROW, Init, LoraConfig, LoraLinear, LoraModel};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use super::common::{
    Ours, Plain, check_one_pass, differences, gap, only_what_is_tracked, random, refused, run,
    same_on_any_threads, takes_views, takes_views_within, values,
};

/// Numbers that every type holds exactly, so that all types multiply by the same weight.
fn exact(shape: &[usize], seed: u64) -> Tensor {
    ((random(shape, 16.0, seed).round().unwrap()) / 16.0).unwrap()
}

fn like(t: &Tensor, x: &Tensor) -> Tensor {
    t.to_dtype(x.dtype()).unwrap()
}

/// A and B are in f32 beside half precision, as the layers have them.
fn wide(t: &Tensor) -> candle_core::Result<Tensor> {
    match t.dtype() {
        DType::F16 | DType::BF16 => t.to_dtype(DType::F32),
        _ => Ok(t.clone()),
    }
}

/// Leading sizes, in, out, r: odd ones, and beyond what one thread takes.
const SHAPES: [(&[usize], usize, usize, usize); 9] = [
    (&[], 3, 2, 1),
    (&[1], 1, 1, 1),
    (&[2], 3, 5, 2),
    (&[2, 3], 8, 7, 3),
    (&[2, 1, 4], 9, 33, 4),
    (&[65], 40, 100, 8),
    (&[3], 300, 500, 2),
    (&[130], 200, 97, 16),
    (&[2, 150], 64, 200, 40),
];

fn of(leading: &[usize], last: usize) -> Vec<usize> {
    [leading, &[last]].concat()
}

#[test]
fn linear_is_the_composition() {
    for (leading, inputs, outputs, _) in SHAPES {
        let all = [
            random(&of(leading, inputs), 1.0, 3),
            random(&[outputs, inputs], 1.0, 1),
            random(&[outputs], 1.0, 2),
        ];
        let ours: Ours<'_> = &|t| linear(&t[0], &t[1], t.get(2));
        let plain: Plain<'_> = &|t| {
            let y = t[0].reshape(((), inputs))?.matmul(&t[1].t()?)?;
            let y = y.reshape(of(leading, outputs))?;
            t.get(2).map_or(Ok(y.clone()), |bias| y.broadcast_add(bias))
        };
        check_one_pass("linear", &all[..2], ours, plain);
        check_one_pass("linear with a bias", &all, ours, plain);
    }
}

#[test]
fn linear_takes_what_the_others_take() {
    let all = [
        random(&[2, 3, 5], 1.0, 3),
        random(&[7, 5], 1.0, 1),
        random(&[7], 1.0, 2),
    ];
    // Beyond what one thread takes, with several blocks of rows for the bias.
    let large = [
        random(&[700, 64], 1.0, 3),
        random(&[300, 64], 1.0, 1),
        random(&[300], 1.0, 2),
    ];
    let thin = [
        random(&[5000, 70], 1.0, 3),
        random(&[3, 70], 1.0, 1),
        random(&[3], 1.0, 2),
    ];
    let ours: Ours<'_> = &|t| linear(&t[0], &t[1], t.get(2));
    for count in [2, 3] {
        differences("linear", &all[..count], ours);
        only_what_is_tracked("linear", &all[..count], ours);
        takes_views_within(1e-6, "linear", &all[..count], ours);
        same_on_any_threads("linear", &large[..count], ours);
        same_on_any_threads("linear", &thin[..count], ours);
    }
}

#[test]
fn no_rows_move_no_weight() {
    let all = [
        random(&[0, 4], 1.0, 1),
        random(&[3, 4], 1.0, 2),
        random(&[3], 1.0, 3),
    ];
    let (y, gradients) = run(&|t| linear(&t[0], &t[1], Some(&t[2])), &all, &[true; 3]);
    assert_eq!(y.dims(), [0, 3]);
    for (gradient, numbers) in gradients.iter().zip([0, 12, 3]) {
        assert_eq!(values(gradient.as_ref().unwrap()), vec![0.0; numbers]);
    }
}

#[test]
fn lora_linear_is_the_composition() {
    for (leading, inputs, outputs, r) in SHAPES {
        let w = exact(&[outputs, inputs], 1);
        let bias = exact(&[outputs], 2);
        let all = [
            random(&of(leading, inputs), 1.0, 3),
            random(&[r, inputs], 1.0, 4),
            random(&[outputs, r], 1.0, 5),
        ];
        for with_bias in [false, true] {
            let bias = with_bias.then_some(&bias);
            let ours: Ours<'_> = &|t| {
                let bias = bias.map(|b| like(b, &t[0]));
                let (a, b) = (wide(&t[1])?, wide(&t[2])?);
                lora_linear(&t[0], &like(&w, &t[0]), bias.as_ref(), &a, &b, 1.5)
            };
            let plain: Plain<'_> = &|t| {
                let x = t[0].reshape(((), inputs))?;
                let thin = (x.matmul(&t[1].t()?)?.matmul(&t[2].t()?)? * 1.5)?;
                let y = (x.matmul(&w.t()?)? + thin)?.reshape(of(leading, outputs))?;
                bias.map_or(Ok(y.clone()), |bias| y.broadcast_add(bias))
            };
            check_one_pass("lora_linear", &all, ours, plain);
        }
    }
}

/// In half precision both are what candle's own layer gives, to the bit, with A and B in f32.
#[test]
fn half_precision_is_candles_own() {
    for dtype in [DType::F16, DType::BF16] {
        let of = |shape: &[usize], seed| random(shape, 1.0, seed).to_dtype(dtype).unwrap();
        let base = Linear::new(of(&[7, 5], 1), Some(of(&[7], 2)));
        let (w, bias) = (base.weight().clone(), base.bias().cloned());
        let x = [of(&[4, 5], 3)];
        let (y, dx) = run(&|x| linear(&x[0], &w, bias.as_ref()), &x, &[true]);
        let (want, want_dx) = run(&|x| Ok(base.forward(&x[0])?), &x, &[true]);
        assert_eq!(values(&y), values(&want));
        assert_eq!(
            values(dx[0].as_ref().unwrap()),
            values(want_dx[0].as_ref().unwrap())
        );

        let wide = |shape: &[usize], seed| random(shape, 1.0, seed).to_dtype(DType::F32).unwrap();
        let all = [of(&[4, 5], 3), wide(&[2, 5], 4), wide(&[7, 2], 5)];
        let ours: Ours<'_> = &|t| lora_linear(&t[0], &w, bias.as_ref(), &t[1], &t[2], 1.5);
        let plain: Ours<'_> = &|t| {
            let y = base.forward(&t[0])?.to_dtype(DType::F32)?;
            let x = t[0].to_dtype(DType::F32)?;
            let thin = (x.matmul(&t[1].t()?)?.matmul(&t[2].t()?)? * 1.5)?;
            Ok((y + thin)?.to_dtype(dtype)?)
        };
        let ((y, got), (want, wanted)) =
            (run(ours, &all, &[true; 3]), run(plain, &all, &[true; 3]));
        assert_eq!(values(&y), values(&want));
        for (got, want) in got.iter().zip(&wanted) {
            assert_eq!(
                values(got.as_ref().unwrap()),
                values(want.as_ref().unwrap())
            );
        }
    }
}

#[test]
fn lora_linear_takes_what_the_others_take() {
    let w = random(&[7, 5], 1.0, 1);
    let bias = random(&[7], 1.0, 2);
    let all = [
        random(&[2, 3, 5], 1.0, 3),
        random(&[2, 5], 1.0, 4),
        random(&[7, 2], 1.0, 5),
    ];
    let ours: Ours<'_> = &|t| {
        let (w, bias) = (like(&w, &t[0]), like(&bias, &t[0]));
        let (a, b) = (wide(&t[1])?, wide(&t[2])?);
        lora_linear(&t[0], &w, Some(&bias), &a, &b, 0.5)
    };
    differences("lora_linear", &all, ours);
    only_what_is_tracked("lora_linear", &all, ours);
    takes_views("lora_linear", &all, ours);
    let w = random(&[300, 64], 1.0, 1);
    let all = [
        random(&[150, 64], 1.0, 3),
        random(&[16, 64], 1.0, 4),
        random(&[300, 16], 1.0, 5),
    ];
    same_on_any_threads("lora_linear", &all, &|t| {
        lora_linear(&t[0], &like(&w, &t[0]), None, &t[1], &t[2], 0.5)
    });
}

#[test]
fn a_weight_in_any_layout_gives_the_same() {
    let x = random(&[4, 6], 1.0, 1);
    let w = random(&[5, 6], 1.0, 2);
    let want = linear(&x, &w, None).unwrap();
    let turned = w.t().unwrap().contiguous().unwrap().t().unwrap();
    let part = Tensor::cat(&[&w, &w, &w], 0)
        .unwrap()
        .narrow(0, 5, 5)
        .unwrap();
    for weight in [turned, part] {
        assert!(gap(&linear(&x, &weight, None).unwrap(), &want) < 1e-15);
        let (_, dx) = run(
            &|x| linear(&x[0], &weight, None),
            std::slice::from_ref(&x),
            &[true],
        );
        let (_, same) = run(
            &|x| linear(&x[0], &w, None),
            std::slice::from_ref(&x),
            &[true],
        );
        assert!(gap(dx[0].as_ref().unwrap(), same[0].as_ref().unwrap()) < 1e-15);
    }
}

#[test]
fn lora_linear_with_a_weight_that_trains() {
    let all = [
        random(&[2, 3], 1.0, 1),
        random(&[4, 3], 1.0, 2),
        random(&[4], 1.0, 3),
        random(&[2, 3], 1.0, 4),
        random(&[4, 2], 1.0, 5),
    ];
    let ours: Ours<'_> = &|t| lora_linear(&t[0], &t[1], Some(&t[2]), &t[3], &t[4], 2.0);
    differences("lora_linear", &all, ours);
    takes_views_within(1e-6, "lora_linear", &all, ours);
    // Each alone too, where some of them have a pass of their own.
    for alone in 0..all.len() {
        let tracked: Vec<bool> = (0..all.len()).map(|i| i == alone).collect();
        let (_, some) = run(ours, &all, &tracked);
        let (_, every) = run(ours, &all, &[true; 5]);
        for (i, gradient) in some.iter().enumerate() {
            assert_eq!(gradient.is_some(), i == alone, "{alone}: {i}");
        }
        let off = gap(
            some[alone].as_ref().unwrap(),
            every[alone].as_ref().unwrap(),
        );
        assert!(off < 1e-14, "{alone}: {off:e}");
    }
}

/// Every row of a mixed batch as if it were alone, with the gradients of all adapters.
#[test]
fn a_mixed_batch_is_its_rows() {
    let weight = random(&[20, 12], 1.0, 1).to_dtype(DType::F32).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let layer = LoraLinear::frozen("proj", Linear::new(weight, None)).unwrap();
    let mut model = LoraModel::new(&[&layer]).unwrap();
    let names = ["de", "fr", "fi"];
    for (i, name) in names.iter().enumerate() {
        let config = LoraConfig::new(i + 1, 4.0).with_targets(["proj"]);
        let config = config.with_init(Init::Random);
        model.add_adapter(name, &config, &mut rng).unwrap();
    }
    let x = random(&[8, 3, 12], 1.0, 2).to_dtype(DType::F32).unwrap();
    let x = Var::from_tensor(&x).unwrap();
    let g = random(&[8, 3, 20], 1.0, 3).to_dtype(DType::F32).unwrap();
    // Together and apart, one that comes back, and one that is nowhere.
    let rows = ["fr", "fr", BASE_ROW, "de", "fr", BASE_ROW, "de", "de"];
    let loss = |y: &Tensor, g: &Tensor| (y * g).unwrap().sum_all().unwrap();

    let mixed = model
        .with_adapters(&rows, || layer.forward_t(&x, true))
        .unwrap()
        .unwrap();
    let gradients = loss(&mixed, &g).backward().unwrap();

    let mut total = Tensor::zeros((), DType::F32, &Device::Cpu).unwrap();
    for (i, row) in rows.iter().enumerate() {
        let chosen: &[&str] = if *row == BASE_ROW { &[] } else { &[row] };
        model.set_adapter(chosen).unwrap();
        let alone = layer.forward_t(&x.narrow(0, i, 1).unwrap(), true).unwrap();
        assert!(
            gap(&mixed.narrow(0, i, 1).unwrap(), &alone) < 1e-6,
            "row {i}"
        );
        total = (total + loss(&alone, &g.narrow(0, i, 1).unwrap())).unwrap();
    }
    let wanted = total.backward().unwrap();
    let dx = gap(gradients.get(&x).unwrap(), wanted.get(&x).unwrap());
    assert!(dx < 1e-6, "x: {dx:e}");
    for name in names {
        let adapter = layer.adapter(name).unwrap();
        for var in [adapter.lora_a().unwrap(), adapter.lora_b().unwrap()] {
            match (gradients.get(var), wanted.get(var)) {
                (Some(got), Some(want)) => assert!(gap(got, want) < 2e-6, "{name}"),
                (None, None) => assert_eq!(name, "fi"),
                (got, want) => panic!("{name}: {got:?} for {want:?}"),
            }
        }
    }
}

#[test]
fn linear_cross_entropy_is_the_two() {
    for (rows, inputs, classes) in [(1usize, 1usize, 1usize), (5, 3, 7), (70, 40, 90)] {
        let targets: Vec<i64> = (0..rows).map(|i| (i * 31 % classes) as i64).collect();
        let targets = Tensor::from_vec(targets, rows, &Device::Cpu).unwrap();
        let both = [
            random(&[rows, inputs], 1.0, 2),
            random(&[classes, inputs], 1.0, 1),
        ];
        let ours: Ours<'_> = &|t| linear_cross_entropy(&t[0], &t[1], &targets);
        for (dtype, forward, backward) in [(DType::F32, 1e-6, 3e-6), (DType::F64, 1e-12, 1e-12)] {
            let both = both.clone().map(|t| t.to_dtype(dtype).unwrap());
            let (loss, gradients) = run(ours, &both, &[true; 2]);
            let two: Ours<'_> = &|t| cross_entropy(&linear(&t[0], &t[1], None)?, &targets);
            let (want, wanted) = run(two, &both, &[true; 2]);
            assert!(
                (values(&loss)[0] - values(&want)[0]).abs() <= forward * (1.0 + values(&want)[0])
            );
            for (got, want) in gradients.iter().zip(&wanted).filter(|_| classes > 1) {
                let off = gap(got.as_ref().unwrap(), want.as_ref().unwrap());
                assert!(off <= backward, "{rows} {dtype:?}: {off:e}");
            }
        }
    }
    let targets = Tensor::new(&[[5i64, -100, 0], [1, 2, 2]], &Device::Cpu).unwrap();
    let both = [random(&[2, 3, 4], 1.0, 2), random(&[6, 4], 1.0, 1)];
    let ours: Ours<'_> = &|t| linear_cross_entropy(&t[0], &t[1], &targets);
    differences("linear_cross_entropy", &both, ours);
    only_what_is_tracked("linear_cross_entropy", &both, ours);
    takes_views_within(1e-6, "linear_cross_entropy", &both, ours);
    let targets: Vec<u32> = (0..150).map(|i| i * 31 % 700).collect();
    let targets = Tensor::new(targets, &Device::Cpu).unwrap();
    let large = [random(&[150, 64], 1.0, 2), random(&[700, 64], 1.0, 1)];
    same_on_any_threads("linear_cross_entropy", &large, &|t| {
        linear_cross_entropy(&t[0], &t[1], &targets)
    });
}

/// One tensor as input and as weight, and a loss that is not the last step: gradients add up.
#[test]
fn a_tied_weight_gets_both_gradients() {
    let targets = Tensor::new(&[1u32, 0, 2], &Device::Cpu).unwrap();
    let square = [random(&[3, 4], 1.0, 1)];
    differences("tied", &square, &|t| {
        let loss = linear_cross_entropy(&(&t[0] * 2.0)?, &t[0], &targets)?;
        Ok((loss * 3.0)?)
    });
}

/// More logits than are held at a time.
#[test]
fn linear_cross_entropy_in_several_parts() {
    let (rows, inputs, classes) = (41usize, 2usize, 300_000usize);
    let to_f32 = |t: Tensor| t.to_dtype(DType::F32).unwrap();
    let w = to_f32(random(&[classes, inputs], 3.0, 1));
    let both = [to_f32(random(&[rows, inputs], 1.0, 2)), w];
    let targets: Vec<u32> = (0..rows).map(|i| (i * 7919 % classes) as u32).collect();
    let targets = Tensor::from_vec(targets, rows, &Device::Cpu).unwrap();
    let once: Ours<'_> = &|t| linear_cross_entropy(&t[0], &t[1], &targets);
    let (loss, gradients) = run(once, &both, &[true; 2]);
    let two: Ours<'_> = &|t| cross_entropy(&linear(&t[0], &t[1], None)?, &targets);
    let (want, wanted) = run(two, &both, &[true; 2]);
    assert!(gap(&loss, &want) < 1e-6);
    for (got, want) in gradients.iter().zip(&wanted) {
        let off = gap(got.as_ref().unwrap(), want.as_ref().unwrap());
        assert!(off < 3e-6, "{off:e}");
    }
    // Without a gradient the loss is the same.
    let plain = linear_cross_entropy(&both[0], &both[1], &targets).unwrap();
    assert_eq!(values(&plain), values(&loss));
}

#[test]
fn refusals_name_the_tensors() {
    let t = |shape: &[usize]| random(shape, 1.0, 1);
    let x = t(&[2, 3]);
    refused(
        linear(&x, &t(&[4, 5]), None),
        &["linear", "x [2, 3]", "W [4, 5]", "5"],
    );
    refused(
        linear(&x, &t(&[4, 3]), Some(&t(&[3]))),
        &["b [3]", "must be [4]"],
    );
    refused(linear(&x, &t(&[3]), None), &["W must be [out, in]"]);
    let half = t(&[4, 3]).to_dtype(DType::F16).unwrap();
    refused(linear(&x, &half, None), &["F64", "F16", "one type"]);
    let w = t(&[4, 3]);
    let lora = |a: &[usize], b: &[usize]| lora_linear(&x, &w, None, &t(a), &t(b), 1.0);
    refused(lora(&[2, 4], &[4, 2]), &["A [2, 4]", "A must be [r, 3]"]);
    refused(lora(&[2, 3], &[4, 1]), &["B [4, 1]", "B [4, r]"]);
    let targets = Tensor::new(&[4u32, 0], &Device::Cpu).unwrap();
    refused(
        linear_cross_entropy(&x, &w, &targets),
        &["target 4", "below 4"],
    );
}
