use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use super::*;

fn rng() -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(5)
}

fn tensor(values: &[f64], rows: usize, columns: usize) -> Tensor {
    Tensor::new(values, &Device::Cpu)
        .unwrap()
        .reshape((rows, columns))
        .unwrap()
}

fn values(x: &Tensor) -> Vec<f64> {
    let x = x.to_dtype(DType::F64).unwrap();
    x.flatten_all().unwrap().to_vec1().unwrap()
}

fn close(found: &Tensor, expected: &[f64], tolerance: f64, name: &str) {
    let found = values(found);
    assert_eq!(found.len(), expected.len(), "{name}");
    for (i, (x, y)) in found.iter().zip(expected).enumerate() {
        assert!(
            (x - y).abs() < tolerance,
            "{name}: entry {i} is {x}, not {y}"
        );
    }
}

/// Three adapters of rank 2 for a layer 3 → 4; the last has a negative weight.
fn three() -> Vec<Weighted> {
    let a = [
        [0.5, -1.25, 2.0, -0.75, 0.1, 1.5],
        [-0.6, -1.0, 0.3, 2.5, -0.2, -1.75],
        [0.9, 1.1, -0.4, 0.7, -3.0, 0.05],
    ];
    let b = [
        [1.0, -0.5, 0.25, 2.0, -1.5, 0.8, 0.6, -0.9],
        [-0.3, 1.2, 0.35, -0.7, 1.6, 0.45, -2.2, 0.15],
        [0.65, 0.55, -1.1, 1.3, -0.85, -0.05, 0.95, 1.75],
    ];
    let factors = [(2.0, 0.7), (0.5, 1.5), (1.0, -0.4)];
    let adapters = a.iter().zip(&b).zip(factors);
    adapters
        .map(|((a, b), (scaling, weight))| Weighted {
            a: tensor(a, 2, 3),
            b: tensor(b, 4, 2),
            scaling,
            weight,
        })
        .collect()
}

/// Adapters of ranks 1, 2, … from a generator, for a layer `ins` → `outs`.
fn random(ranks: &[usize], outs: usize, ins: usize) -> Vec<Weighted> {
    let mut rng = rng();
    let mut draw = |rows: usize, columns: usize| {
        let values: Vec<f64> = (0..rows * columns)
            .map(|_| rng.random::<f64>() - 0.5)
            .collect();
        tensor(&values, rows, columns)
    };
    let adapters = ranks.iter().enumerate().map(|(i, &r)| Weighted {
        a: draw(r, ins),
        b: draw(outs, r),
        scaling: 0.5 + i as f64,
        weight: 1.5 - i as f64,
    });
    adapters.collect()
}

/// Σ wᵢsᵢ BᵢAᵢ.
fn exact(adapters: &[Weighted]) -> Vec<f64> {
    let mut sum = vec![];
    for part in adapters {
        let update = values(&part.b.matmul(&part.a).unwrap());
        sum.resize(update.len(), 0.0);
        for (sum, x) in sum.iter_mut().zip(update) {
            *sum += part.weight * part.scaling * x;
        }
    }
    sum
}

fn update(combined: &Combined) -> Tensor {
    combined.b.matmul(&combined.a).unwrap()
}

fn message(adapters: &[Weighted], how: &Combination) -> String {
    combine(adapters, how, &mut rng()).unwrap_err().to_string()
}

/// The numbers are PEFT 0.21's: with `from peft.utils.merge_utils import *` and the adapters of
/// `three()` as tensors in float64,
///
/// ```python
/// ws = torch.tensor(w) * torch.tensor(s)
/// wa, wb = ws.sign() * ws.abs().sqrt(), ws.abs().sqrt()
/// task_arithmetic(A, wa), task_arithmetic(B, wb)                             # linear
/// ties(A, wa, 0.6, m), ties(B, wb, 0.6, m)                                   # ties
/// magnitude_prune(A, wa, 0.6), magnitude_prune(B, wb, 0.6)                   # magnitude_prune
/// ```
#[test]
fn factors_equal_peft() {
    use CombinationType::{Linear, MagnitudePrune, Ties};
    use MajoritySign::{Frequency, Total};

    let ties_a = [
        -0.56920997883,
        -1.17252267478,
        2.36643191324,
        2.165063509461,
        1.897366596101,
    ];
    let ties_b = [
        1.18321595662,
        1.039230484541,
        -0.695701085237,
        1.594312052442,
        1.385640646055,
    ];
    let cases = [
        (
            Linear,
            Total,
            vec![
                -0.497217242791,
                -3.040746434796,
                2.879221747189,
                0.834932669573,
                1.842483111006,
                0.227656701705,
            ],
            vec![
                1.334504431306,
                0.79547304885,
                -0.096788204758,
                2.582406322235,
                -0.926770491103,
                1.304661420397,
                -0.594493558922,
                0.171806630669,
            ],
        ),
        (
            Ties,
            Total,
            [&ties_a[..], &[-1.515544456623]].concat(),
            [&ties_b[..], &[0.0, -1.905255888326, 1.106797181059]].concat(),
        ),
        (
            Ties,
            Frequency,
            [&ties_a[..], &[1.77482393493]].concat(),
            [&ties_b[..], &[0.0, 0.600832755432, 1.106797181059]].concat(),
        ),
        (
            MagnitudePrune,
            Total,
            vec![
                -0.56920997883,
                -3.040746434796,
                2.36643191324,
                2.165063509461,
                1.897366596101,
                0.259279478307,
            ],
            vec![
                1.18321595662,
                1.039230484541,
                -0.695701085237,
                2.582406322235,
                -0.389183288875,
                0.0,
                -1.304423132894,
                0.041902820101,
            ],
        ),
    ];
    for (method, sign, a, b) in cases {
        let how = Combination::new(method)
            .with_density(0.6)
            .with_majority_sign(sign);
        let combined = combine(&three(), &how, &mut rng()).unwrap();
        assert_eq!(
            (combined.a.dims(), combined.b.dims()),
            (&[2, 3][..], &[4, 2][..])
        );
        close(&combined.a, &a, 1e-11, &format!("A of {method} {sign:?}"));
        close(&combined.b, &b, 1e-11, &format!("B of {method} {sign:?}"));
    }
}

/// As above, with `dw = [s * b @ a for …]` and the best rank-2 part of
/// `task_arithmetic(dw, w)`, `ties(dw, w, 0.6, m)` and `magnitude_prune(dw, w, 0.6)` from
/// `torch.linalg.svd`.
#[test]
fn updates_equal_peft() {
    use CombinationType::{MagnitudePruneSvd, Svd, TiesSvd};
    use MajoritySign::{Frequency, Total};

    let cases = [
        (
            Svd,
            Total,
            [
                2.91729925886,
                -1.87933296839,
                0.097721870325,
                -3.71859938047,
                1.17076405157,
                5.575553330027,
                -1.552511276204,
                1.616686255204,
                -2.921467824616,
                0.437981383773,
                -0.011330105671,
                -1.245728926654,
            ],
        ),
        (
            TiesSvd,
            Total,
            [
                0.268582919764,
                -1.063289870173,
                1.64949434389,
                -1.423657399156,
                2.171666368704,
                2.986456653282,
                -0.901482886606,
                2.682695274938,
                -2.536039066986,
                -0.592293447695,
                1.303480808384,
                -0.111796803367,
            ],
        ),
        (
            TiesSvd,
            Frequency,
            [
                1.016009347595,
                -0.708034377732,
                1.745879735797,
                -1.336710642303,
                2.352374553421,
                2.863849779295,
                -0.449326505936,
                -0.189842524436,
                -2.598990006559,
                -0.682252583573,
                0.856645507922,
                0.212228005789,
            ],
        ),
        (
            MagnitudePruneSvd,
            Total,
            [
                1.229570826676,
                -1.919525806231,
                -0.140034882232,
                -3.239049136532,
                2.140226154703,
                5.947802073422,
                -0.706322096954,
                2.316414032435,
                -2.241420014448,
                -1.231929670315,
                2.278334221775,
                -0.539040314415,
            ],
        ),
    ];
    for (method, sign, expected) in cases {
        let how = Combination::new(method)
            .with_density(0.6)
            .with_majority_sign(sign);
        let combined = combine(&three(), &how, &mut rng()).unwrap();
        assert_eq!(
            (combined.a.dims(), combined.b.dims()),
            (&[2, 3][..], &[4, 2][..])
        );
        close(
            &update(&combined),
            &expected,
            1e-11,
            &format!("{method} {sign:?}"),
        );
        // B = U·S, A = Vᵀ: A's rows are orthonormal, B's columns not.
        let rows = combined.a.matmul(&combined.a.t().unwrap()).unwrap();
        close(&rows, &[1.0, 0.0, 0.0, 1.0], 1e-13, "A·Aᵀ");
    }
}

#[test]
fn cat_is_exact_with_any_ranks_and_negative_weights() {
    let adapters = random(&[1, 3, 2], 5, 4);
    assert!(adapters[2].weight < 0.0);
    let how = Combination::new(CombinationType::Cat);
    let combined = combine(&adapters, &how, &mut rng()).unwrap();
    assert_eq!(
        (combined.a.dims(), combined.b.dims()),
        (&[6, 4][..], &[5, 6][..])
    );
    close(&update(&combined), &exact(&adapters), 1e-14, "cat");
    // The factor lies on A alone.
    assert_eq!(
        values(&combined.b.narrow(1, 0, 1).unwrap()),
        values(&adapters[0].b)
    );
}

#[test]
fn svd_is_exact_at_full_rank_and_the_nearest_below() {
    let adapters = random(&[1, 3, 2], 5, 4);
    let exact = exact(&adapters);
    let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
    let full = svd::truncated(&tensor(&exact, 5, 4), 4).unwrap().1;
    for rank in 1..=4 {
        let how = Combination::new(CombinationType::Svd).with_svd_rank(rank);
        let combined = combine(&adapters, &how, &mut rng()).unwrap();
        assert_eq!(
            (combined.a.dims(), combined.b.dims()),
            (&[rank, 4][..], &[5, rank][..])
        );
        let rest: Vec<f64> = values(&update(&combined))
            .iter()
            .zip(&exact)
            .map(|(x, y)| x - y)
            .collect();
        assert!(
            (norm(&rest) - norm(&full[rank..])).abs() < 1e-13,
            "rank {rank}"
        );
    }
}

#[test]
fn the_rank_of_svd() {
    let rank = |ranks: &[usize], outs, ins, how: &Combination| {
        let combined = combine(&random(ranks, outs, ins), how, &mut rng()).unwrap();
        (combined.a.dims()[0], combined.b.dims()[1])
    };
    for method in CombinationType::ALL {
        if !method.name().ends_with("svd") {
            continue;
        }
        let how = Combination::new(method).with_density(0.5);
        assert_eq!(rank(&[1, 3, 2], 5, 4, &how), (3, 3), "the largest");
        assert_eq!(rank(&[1, 6], 3, 4, &how), (3, 3), "no more than fits");
        // Above the rank of the sum, and with one adapter.
        assert_eq!(rank(&[2], 5, 4, &how.clone().with_svd_rank(4)), (4, 4));
        for bad in [0, 5] {
            let text = message(&random(&[2], 5, 4), &how.clone().with_svd_rank(bad));
            assert!(text.contains(&format!("rank {bad} of a 5 x 4")), "{text}");
        }
    }
}

#[test]
fn linear_has_cross_terms_and_one_sign() {
    let scalar = |a: f64, b: f64, scaling: f64, weight: f64| Weighted {
        a: tensor(&[a], 1, 1),
        b: tensor(&[b], 1, 1),
        scaling,
        weight,
    };
    let how = Combination::new(CombinationType::Linear);
    let run =
        |adapters: &[Weighted]| values(&update(&combine(adapters, &how, &mut rng()).unwrap()));
    let two = [scalar(1.0, 2.0, 1.0, 1.0), scalar(3.0, -1.0, 1.0, 1.0)];
    assert_eq!(run(&two), [4.0]);
    assert_eq!(exact(&two), [-1.0]);
    // One adapter has no cross terms, whatever the signs of weight and scaling.
    assert_eq!(run(&[scalar(3.0, 5.0, 2.0, -2.0)]), [-60.0]);
    assert_eq!(run(&[scalar(3.0, 5.0, -2.0, -2.0)]), [60.0]);
    assert_eq!(run(&[scalar(3.0, 5.0, 2.0, 0.0)]), [0.0]);
}

#[test]
fn the_scaling_counts_once() {
    // PEFT's svd has seen both the scaling forgotten and applied twice.
    let mut one = random(&[2], 5, 4);
    one[0].scaling = 3.0;
    one[0].weight = 0.5;
    let expected = exact(&one);
    for method in CombinationType::ALL {
        let how = Combination::new(method).with_density(1.0);
        let combined = combine(&one, &how, &mut rng()).unwrap();
        close(&update(&combined), &expected, 1e-13, method.name());
    }
}

#[test]
fn dare_keeps_the_mean() {
    let adapters = three();
    let linear = Combination::new(CombinationType::Linear);
    let expected = combine(&adapters, &linear, &mut rng()).unwrap();
    let how = Combination::new(CombinationType::DareLinear).with_density(0.3);
    let mut sums = (vec![0.0; 6], vec![0.0; 8]);
    let mut rng = rng();
    let runs = 40_000;
    for _ in 0..runs {
        let combined = combine(&adapters, &how, &mut rng).unwrap();
        for (sum, x) in [(&mut sums.0, &combined.a), (&mut sums.1, &combined.b)] {
            for (sum, x) in sum.iter_mut().zip(values(x)) {
                *sum += x / f64::from(runs);
            }
        }
    }
    // A mean's deviation is at most √(Σ (wt)² · 0.7/0.3 / runs) < 0.027.
    close(
        &tensor(&sums.0, 2, 3),
        &values(&expected.a),
        0.11,
        "mean of A",
    );
    close(
        &tensor(&sums.1, 4, 2),
        &values(&expected.b),
        0.11,
        "mean of B",
    );
}

/// DARE is the plain rule on matrices whose entries were dropped and rescaled before.
#[test]
fn dare_is_the_plain_rule_on_thinned_matrices() {
    use CombinationType::{DareLinear, DareLinearSvd, DareTies, DareTiesSvd};
    use CombinationType::{Linear, Svd, Ties, TiesSvd};

    let density = 0.5;
    let (outs, ins, r) = (6, 5, 5);
    let adapters = random(&[r, r, r], outs, ins);
    for (method, plain) in [(DareLinear, Linear), (DareTies, Ties)] {
        let mut draws = rng();
        let mut thin = |x: &Tensor| {
            let mut kept = values(x);
            keep_random(&mut kept, density, &mut draws);
            tensor(&kept, x.dims()[0], x.dims()[1])
        };
        let mut thinned = adapters.clone();
        // All A first, as in PEFT.
        thinned.iter_mut().for_each(|part| part.a = thin(&part.a));
        thinned.iter_mut().for_each(|part| part.b = thin(&part.b));
        let how = Combination::new(method).with_density(density);
        let found = combine(&adapters, &how, &mut rng()).unwrap();
        let how = Combination::new(plain).with_density(1.0);
        let expected = combine(&thinned, &how, &mut rng()).unwrap();
        close(&found.a, &values(&expected.a), 1e-15, method.name());
        close(&found.b, &values(&expected.b), 1e-15, method.name());
    }
    for (method, plain) in [(DareLinearSvd, Svd), (DareTiesSvd, TiesSvd)] {
        let mut draws = rng();
        let mut thinned = adapters.clone();
        for part in &mut thinned {
            // s B A, thinned, as an adapter with A = I.
            let delta = (part.b.matmul(&part.a).unwrap() * part.scaling).unwrap();
            let mut kept = values(&delta);
            keep_random(&mut kept, density, &mut draws);
            part.b = tensor(&kept, outs, ins);
            part.a = Tensor::eye(ins, DType::F64, &Device::Cpu).unwrap();
            part.scaling = 1.0;
        }
        let how = Combination::new(method).with_density(density);
        let found = combine(&adapters, &how, &mut rng()).unwrap();
        let how = Combination::new(plain).with_density(1.0);
        let expected = combine(&thinned, &how, &mut rng()).unwrap();
        close(
            &update(&found),
            &values(&update(&expected)),
            1e-13,
            method.name(),
        );
    }
}

#[test]
fn random_pruning_drops_and_rescales() {
    let ones = vec![3.0; 10_000];
    for density in [0.1, 0.5, 0.9] {
        let mut kept = ones.clone();
        keep_random(&mut kept, density, &mut rng());
        assert!(kept.iter().all(|x| *x == 0.0 || *x == 3.0 / density));
        let share = kept.iter().filter(|x| **x != 0.0).count() as f64 / 1e4;
        assert!((share - density).abs() < 0.02, "{share} for {density}");
    }
}

#[test]
fn dare_that_keeps_all_draws_nothing() {
    for method in CombinationType::ALL {
        let how = Combination::new(method).with_density(1.0);
        let mut used = rng();
        combine(&three(), &how, &mut used).unwrap();
        assert_eq!(used.random::<u64>(), rng().random::<u64>(), "{method}");
    }
}

#[test]
fn the_same_seed_gives_the_same_numbers() {
    for method in CombinationType::ALL {
        let how = Combination::new(method).with_density(0.5).with_svd_rank(2);
        let run = |seed| -> (Vec<f64>, u64) {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let combined = combine(&three(), &how, &mut rng).unwrap();
            (values(&update(&combined)), rng.random())
        };
        assert_eq!(run(1), run(1), "{method}");
        // Only DARE reads the generator.
        assert_eq!(
            run(1).0 != run(2).0,
            method.name().contains("dare"),
            "{method}"
        );
        let untouched: u64 = ChaCha8Rng::seed_from_u64(1).random();
        assert_eq!(
            run(1).1 != untouched,
            method.name().contains("dare"),
            "{method}"
        );
    }
}

#[test]
fn keeps_the_largest_and_the_earlier_of_equals() {
    let kept = |density: f64| {
        let mut x = [2.0, -1.0, 1.0, 0.5, -3.0, 1.0, 0.0, -1.0, 1.0, 0.25];
        keep_largest(&mut x, density);
        x
    };
    assert_eq!(kept(0.2), [2., 0., 0., 0., -3., 0., 0., 0., 0., 0.]);
    assert_eq!(kept(0.4), [2., -1., 1., 0., -3., 0., 0., 0., 0., 0.]);
    assert_eq!(kept(0.59), [2., -1., 1., 0., -3., 1., 0., 0., 0., 0.]);
    assert_eq!(kept(1.0), [2., -1., 1., 0.5, -3., 1., 0., -1., 1., 0.25]);
    assert_eq!(kept(0.0), [0.0; 10]);
    assert_eq!(kept(0.09), [0.0; 10]);
}

#[test]
fn sign_elections() {
    use MajoritySign::{Frequency, Total};

    for (entries, total, frequency) in [
        (&[-3.0, 1.0, 1.0][..], -1.0, 1.0),
        (&[3.0, -1.0, -1.0], 1.0, -1.0),
        (&[1.0, -1.0], 1.0, 1.0),
        (&[0.0, 0.0], 1.0, 1.0),
        (&[0.0, -1.0], -1.0, -1.0),
        // A negative zero has no vote.
        (&[-0.0, -0.0, 1.0], 1.0, 1.0),
    ] {
        assert_eq!(Total.of(entries.iter().copied()), total, "{entries:?}");
        assert_eq!(
            Frequency.of(entries.iter().copied()),
            frequency,
            "{entries:?}"
        );
    }
    // Divided by the number that agree, not by the weights.
    let how = Combination::new(CombinationType::Ties).with_density(1.0);
    let merged = |entries: [f64; 3]| {
        how.merged(
            entries.map(|x| vec![x]).to_vec(),
            &[2.0, 4.0, 8.0],
            &mut rng(),
        )
    };
    assert_eq!(merged([1.0, 3.0, -2.0]), [(2.0 + 12.0) / 2.0]);
    assert_eq!(merged([1.0, 0.0, 0.0]), [2.0]);
    assert_eq!(merged([0.0, 0.0, 0.0]), [0.0]);
}

#[test]
fn keeps_the_type_and_drops_the_graph() {
    for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64] {
        let mut adapters = three();
        for part in &mut adapters {
            let var = |x: &Tensor| candle_core::Var::from_tensor(&x.to_dtype(dtype).unwrap());
            part.a = var(&part.a).unwrap().as_tensor().clone();
            part.b = var(&part.b).unwrap().as_tensor().clone();
        }
        for method in CombinationType::ALL {
            let how = Combination::new(method).with_density(0.5);
            let combined = combine(&adapters, &how, &mut rng()).unwrap();
            for x in [combined.a, combined.b] {
                assert_eq!(x.dtype(), dtype);
                assert!(!x.track_op(), "{method}");
            }
        }
    }
}

#[test]
fn refuses_adapters_that_do_not_fit() {
    let cat = Combination::new(CombinationType::Cat);
    assert!(message(&[], &cat).contains("at least one"));

    let with = |a: Tensor, b: Tensor| {
        let mut adapters = random(&[2, 2], 5, 4);
        (adapters[1].a, adapters[1].b) = (a, b);
        adapters
    };
    let ones = |shape: &[usize]| Tensor::ones(shape, DType::F64, &Device::Cpu).unwrap();
    for (a, b) in [
        (&[2, 3][..], &[5, 2][..]),
        (&[2, 4], &[6, 2]),
        (&[2, 4], &[5, 3]),
        (&[2, 2, 2], &[5, 2]),
        (&[2, 4], &[5, 2, 1]),
        (&[0, 4], &[5, 0]),
    ] {
        for method in CombinationType::ALL {
            let how = Combination::new(method).with_density(0.5);
            let text = message(&with(ones(a), ones(b)), &how);
            assert!(text.contains("adapter 1"), "{text}");
            for shape in [a, b, &[2, 4], &[5, 2]] {
                assert!(text.contains(&format!("{shape:?}")), "{text}");
            }
        }
    }
    // Also when the first is the broken one.
    let vector = Weighted {
        a: ones(&[4]),
        b: ones(&[5]),
        scaling: 1.0,
        weight: 1.0,
    };
    assert!(message(&[vector], &cat).contains("adapter 0"));
}

#[test]
fn refuses_differing_ranks_where_one_is_needed() {
    let adapters = random(&[2, 2, 3], 5, 4);
    for method in CombinationType::ALL {
        let how = Combination::new(method).with_density(0.5);
        let free = method == CombinationType::Cat || method.name().ends_with("svd");
        if free {
            assert!(combine(&adapters, &how, &mut rng()).is_ok(), "{method}");
            continue;
        }
        let text = message(&adapters, &how);
        assert!(text.contains(&format!("combine: {method} needs")), "{text}");
        assert!(text.contains("r = 2 and adapter 2 r = 3"), "{text}");
    }
}

#[test]
fn refuses_numbers_that_are_none() {
    for method in CombinationType::ALL {
        let how = Combination::new(method).with_density(0.5);
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let mut adapters = three();
            adapters[1].weight = bad;
            let text = message(&adapters, &how);
            assert!(
                text.contains("adapter 1") && text.contains(&format!("weight {bad}")),
                "{text}"
            );
            let mut adapters = three();
            adapters[2].scaling = bad;
            let text = message(&adapters, &how);
            assert!(
                text.contains("adapter 2") && text.contains(&format!("scaling {bad}")),
                "{text}"
            );
            let mut adapters = three();
            adapters[1].b = (adapters[1].b.clone() * bad).unwrap();
            let text = message(&adapters, &how);
            assert!(text.contains("B of adapter 1"), "{text}");
        }
    }
}

#[test]
fn refuses_densities_outside_their_range() {
    for method in CombinationType::ALL {
        let how = Combination::new(method).with_svd_rank(2);
        let run = |density: Option<f64>| {
            let how = Combination {
                density,
                ..how.clone()
            };
            combine(&three(), &how, &mut rng()).map_err(|error| error.to_string())
        };
        let prunes = method.pruning() != Pruning::None;
        for bad in [
            None,
            Some(-0.1),
            Some(1.1),
            Some(f64::NAN),
            Some(f64::INFINITY),
        ] {
            assert_eq!(run(bad).is_err(), prunes, "{method} {bad:?}");
            if let Err(text) = run(bad) {
                assert!(text.contains(&format!("combine: {method} keeps")), "{text}");
                assert!(text.contains("with_density"), "{text}");
            }
        }
        assert!(run(Some(1.0)).is_ok());
        // 0 keeps nothing; a method that divides by it cannot.
        assert_eq!(run(Some(0.0)).is_err(), method.draws(), "{method}");
        if prunes && !method.draws() {
            let nothing = run(Some(0.0)).unwrap();
            close(&update(&nothing), &[0.0; 12], 1e-300, method.name());
        }
    }
}

#[test]
fn names_are_pefts() {
    let text = "mean".parse::<CombinationType>().unwrap_err().to_string();
    assert!(
        text.contains("\"mean\"") && text.contains("svd, linear, cat, ties"),
        "{text}"
    );
    let text = "Total".parse::<MajoritySign>().unwrap_err().to_string();
    assert!(
        text.contains("\"Total\"") && text.contains("total, frequency"),
        "{text}"
    );
    assert_eq!(
        "total".parse::<MajoritySign>().unwrap(),
        MajoritySign::Total
    );
    let names = CombinationType::ALL.map(CombinationType::name);
    let distinct: std::collections::HashSet<_> = names.iter().collect();
    assert_eq!(distinct.len(), 11);
}
