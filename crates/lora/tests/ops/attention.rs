//! `ops::attention` against the plain formula, its gradients, its masks, its refusals.
use candle_core::{DType, Tensor, Var};
use lora::ops::{AttentionMask, attention, packed_attention};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use super::common::{CPU, gap, values};

type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

const NONE: AttentionMask<'static> = AttentionMask {
    causal: false,
    masks: &[],
};

fn random(shape: &[usize], dtype: DType, seed: u64) -> Result<Tensor> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let numbers = (0..shape.iter().product()).map(|_| rng.random_range(-1.5..1.5));
    let numbers: Vec<f64> = numbers.collect();
    Ok(Tensor::from_vec(numbers, shape, &CPU)?.to_dtype(dtype)?)
}

/// 1 with this probability, 0 without.
fn coins(shape: &[usize], p: f64, seed: u64) -> Result<Tensor> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let coins = (0..shape.iter().product()).map(|_| u8::from(rng.random_bool(p)));
    let coins: Vec<u8> = coins.collect();
    Ok(Tensor::from_vec(coins, shape, &CPU)?)
}

/// 0 where the mask is 0, −∞ elsewhere.
fn infinite(mask: &Tensor, dtype: DType) -> Result<Tensor> {
    let zero = mask.to_dtype(dtype)?.zeros_like()?;
    Ok(mask.where_cond(&(zero.ones_like()? * f64::NEG_INFINITY)?, &zero)?)
}

/// The formula by candle's operations, in f64 whatever the type.
///
/// What is hidden has a weight of 0 because its exponential is multiplied by 0.
fn formula(
    [q, k, v]: [&Tensor; 3],
    scale: f64,
    mask: &AttentionMask<'_>,
) -> candle_core::Result<Tensor> {
    let (n, l, heads, _) = q.dims4()?;
    let (_, s, kv, _) = k.dims4()?;
    let wide = |x: &Tensor| {
        let x = x.to_dtype(DType::F64)?.transpose(1, 2)?;
        let group = heads / x.dim(1)?;
        let heads: candle_core::Result<Vec<Tensor>> =
            (0..heads).map(|h| x.narrow(1, h / group, 1)).collect();
        Tensor::cat(&heads?, 1)?.contiguous()
    };
    assert!(heads >= kv);
    let (q, k, v) = (wide(q)?, wide(k)?, wide(v)?);
    let mut scores = (q.matmul(&k.t()?)? * scale)?;
    let mut seen = Tensor::ones((n, heads, l, s), DType::F64, &CPU)?;
    for mask in mask.masks {
        if mask.dtype() == DType::U8 {
            seen = seen.broadcast_mul(&mask.eq(0u8)?.to_dtype(DType::F64)?)?;
        } else {
            let mask = mask.to_dtype(DType::F64)?;
            let open = mask.ne(f64::NEG_INFINITY)?;
            let finite = open.where_cond(&mask, &mask.zeros_like()?)?;
            scores = scores.broadcast_add(&finite)?;
            seen = seen.broadcast_mul(&open.to_dtype(DType::F64)?)?;
        }
    }
    if mask.causal {
        let rows: Vec<f64> = (0..l * s).map(|i| f64::from(i % s <= i / s)).collect();
        seen = seen.broadcast_mul(&Tensor::from_vec(rows, (l, s), &CPU)?)?;
    }
    let parts = (scores.exp()? * seen)?;
    let sum = parts.sum_keepdim(3)?;
    let sum = (&sum + sum.eq(0f64)?.to_dtype(DType::F64)?)?;
    let weights = parts.broadcast_div(&sum)?;
    weights.matmul(&v)?.transpose(1, 2)?.contiguous()
}

/// batch, L, S, heads, kv heads, dim, dim of v.
type Sizes = [usize; 7];

fn arguments([n, l, s, heads, kv, dim, value]: Sizes, dtype: DType) -> Result<[Var; 3]> {
    Ok([
        Var::from_tensor(&random(&[n, l, heads, dim], dtype, 1)?)?,
        Var::from_tensor(&random(&[n, s, kv, dim], dtype, 2)?)?,
        Var::from_tensor(&random(&[n, s, kv, value], dtype, 3)?)?,
    ])
}

/// Output and gradients against the formula's.
fn compare(sizes: Sizes, dtype: DType, mask: &AttentionMask<'_>) -> Result {
    let [q, k, v] = arguments(sizes, dtype)?;
    let scale = 1.0 / (sizes[5] as f64).sqrt();
    let ours = attention(&q, &k, &v, scale, mask)?;
    let theirs = formula([&q, &k, &v], scale, mask)?;
    assert_eq!(ours.dtype(), dtype);
    let probe = random(ours.dims(), dtype, 4)?;
    let our_gradients = (&ours * &probe)?.sum_all()?.backward()?;
    let their_gradients = (&theirs * probe.to_dtype(DType::F64)?)?
        .sum_all()?
        .backward()?;
    let (forward, backward) = match dtype {
        DType::F32 => (1e-6, 3e-6),
        _ => (1e-12, 1e-12),
    };
    let case = format!("{sizes:?} {dtype:?} causal {}", mask.causal);
    let off = gap(&ours, &theirs);
    assert!(off <= forward, "{case}: output {off:.1e}");
    for (name, x) in [("q", &q), ("k", &k), ("v", &v)] {
        let (ours, theirs) = (
            our_gradients.get(x).unwrap(),
            their_gradients.get(x).unwrap(),
        );
        assert_eq!(ours.dtype(), dtype);
        if (sizes[2] == 1 || (sizes[1] == 1 && mask.causal)) && name != "v" {
            // One key has all the weight whatever its score.
            assert!(
                values(ours).iter().all(|x| x.abs() < 1e-6),
                "{case}: {name}"
            );
            continue;
        }
        let off = gap(ours, theirs);
        assert!(off <= backward, "{case}: gradient of {name} {off:.1e}");
    }
    Ok(())
}

fn causal() -> AttentionMask<'static> {
    AttentionMask {
        causal: true,
        masks: &[],
    }
}

#[test]
fn the_edges_of_the_tiles() -> Result {
    for length in [1, 2, 3, 31, 63, 64, 65, 127, 128, 129, 255, 257, 300] {
        for dtype in [DType::F32, DType::F64] {
            let sizes = [1, length, length, 2, 2, 8, 8];
            compare(sizes, dtype, &NONE)?;
            if length > 1 {
                compare(sizes, dtype, &causal())?;
            }
        }
    }
    Ok(())
}

#[test]
fn more_and_fewer_keys_than_queries() -> Result {
    for (l, s) in [
        (1, 300),
        (2, 1),
        (129, 64),
        (64, 129),
        (300, 5),
        (5, 300),
        (130, 520),
    ] {
        for dtype in [DType::F32, DType::F64] {
            compare([2, l, s, 3, 1, 16, 16], dtype, &NONE)?;
            compare([2, l, s, 3, 1, 16, 16], dtype, &causal())?;
        }
    }
    Ok(())
}

#[test]
fn grouped_heads_and_values_of_another_size() -> Result {
    for (heads, kv) in [(1, 1), (4, 1), (4, 2), (4, 4), (9, 3), (7, 7)] {
        for (dim, value) in [(1, 1), (5, 5), (64, 64), (16, 24), (24, 7)] {
            for dtype in [DType::F32, DType::F64] {
                compare([2, 70, 70, heads, kv, dim, value], dtype, &NONE)?;
                compare([1, 140, 140, heads, kv, dim, value], dtype, &causal())?;
            }
        }
    }
    Ok(())
}

#[test]
fn masks_of_every_shape() -> Result {
    let sizes = [2, 140, 70, 4, 2, 8, 8];
    for shape in [
        &[2, 4, 140, 70][..],
        &[1, 4, 140, 70],
        &[2, 1, 140, 70],
        &[140, 70],
        &[2, 1, 1, 70],
        &[70],
        &[2, 4, 140, 1],
        &[1, 1, 1, 1],
    ] {
        // The last dimension alone hides a query altogether.
        let p = if shape.contains(&70) { 0.4 } else { 0.1 };
        let blocked = if shape == [1, 1, 1, 1] {
            Tensor::zeros(shape, DType::U8, &CPU)?
        } else {
            (coins(shape, p, 5)? * 3.0)?
        };
        for dtype in [DType::F32, DType::F64] {
            let added = random(shape, dtype, 6)?;
            let cut = infinite(&blocked, dtype)?;
            let both = (&added + &cut)?;
            for causal in [false, true] {
                for masks in [
                    &[&blocked][..],
                    &[&added],
                    &[&both],
                    &[&added, &blocked],
                    &[&blocked, &added, &cut],
                ] {
                    compare(sizes, dtype, &AttentionMask { causal, masks })?;
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_mask_of_another_type_of_floats() -> Result {
    let mask = (random(&[6, 9], DType::F32, 5)? * 4.0)?.round()?;
    let narrow = mask.to_dtype(DType::BF16)?;
    let [q, k, v] = arguments([2, 6, 9, 2, 1, 4, 4], DType::F64)?;
    let with = |mask: &Tensor| {
        let masks = [mask];
        let mask = AttentionMask {
            masks: &masks,
            ..NONE
        };
        attention(&q, &k, &v, 0.5, &mask)
    };
    assert_eq!(values(&with(&mask)?), values(&with(&narrow)?));
    Ok(())
}

#[test]
fn a_query_that_sees_nothing() -> Result {
    for dtype in [DType::F32, DType::F64] {
        let [q, k, v] = arguments([2, 70, 80, 2, 1, 4, 4], dtype)?;
        let mut rows = vec![0u8; 70 * 80];
        rows[3 * 80..4 * 80].fill(1);
        rows[69 * 80..].fill(1);
        let blocked = Tensor::from_vec(rows, (70, 80), &CPU)?;
        for mask in [&blocked, &infinite(&blocked, dtype)?] {
            for causal in [false, true] {
                let masks = [mask];
                let mask = AttentionMask {
                    causal,
                    masks: &masks,
                };
                let y = attention(&q, &k, &v, 0.5, &mask)?;
                let gradients = y.sqr()?.sum_all()?.backward()?;
                let dq = gradients.get(&q).unwrap();
                for row in [3, 69] {
                    assert_eq!(values(&y.narrow(1, row, 1)?), [0.0; 16]);
                    assert_eq!(values(&dq.narrow(1, row, 1)?), [0.0; 16]);
                }
                assert!(values(&y.narrow(1, 4, 1)?).iter().all(|x| *x != 0.0));
                for x in [&q, &k, &v] {
                    let gradient = values(gradients.get(x).unwrap());
                    assert!(gradient.iter().all(|x| x.is_finite()));
                    assert!(gradient.iter().any(|x| *x != 0.0));
                }
            }
        }
        // Nobody sees anything.
        let all = Tensor::ones((1, 1, 1, 80), DType::U8, &CPU)?;
        let y = attention(
            &q,
            &k,
            &v,
            0.5,
            &AttentionMask {
                masks: &[&all],
                ..NONE
            },
        )?;
        let gradients = y.sum_all()?.backward()?;
        for x in [
            &y,
            gradients.get(&q).unwrap(),
            gradients.get(&k).unwrap(),
            gradients.get(&v).unwrap(),
        ] {
            assert!(values(x).iter().all(|x| *x == 0.0));
        }
        // The lowest number is no −∞: such a row is even over its keys.
        let lowest = match dtype {
            DType::F32 => f64::from(f32::MIN),
            _ => f64::MIN,
        };
        let lowest = (Tensor::ones((70, 80), dtype, &CPU)? * lowest)?;
        let y = attention(
            &q,
            &k,
            &v,
            0.0,
            &AttentionMask {
                masks: &[&lowest],
                ..NONE
            },
        )?;
        let even = attention(&q, &k, &v, 0.0, &NONE)?;
        assert_eq!(values(&y), values(&even));
    }
    Ok(())
}

/// What is hidden may hold anything finite, however large.
#[test]
fn hidden_keys_have_no_influence() -> Result {
    let [q, k, v] = arguments([1, 150, 150, 2, 2, 8, 8], DType::F32)?;
    let noise = |x: &Tensor| -> Result<Tensor> {
        let tail = (x.narrow(1, 100, 50)? * 1e18)?;
        Ok(Tensor::cat(&[&x.narrow(1, 0, 100)?, &tail], 1)?)
    };
    let (k2, v2) = (noise(&k)?, noise(&v)?);
    let padding: Vec<u8> = (0..150).map(|j| u8::from(j >= 100)).collect();
    let padding = Tensor::from_vec(padding, (1, 1, 1, 150), &CPU)?;
    let masks = [&padding];
    for causal in [false, true] {
        let mask = AttentionMask {
            causal,
            masks: &masks,
        };
        let with = |k: &Tensor, v: &Tensor| attention(&q, k, v, 0.3, &mask);
        assert_eq!(values(&with(&k, &v)?), values(&with(&k2, &v2)?));
    }
    let first = |y: Tensor| values(&y.narrow(1, 0, 100).unwrap());
    let with = |k: &Tensor, v: &Tensor| attention(&q, k, v, 0.3, &causal()).unwrap();
    assert_eq!(first(with(&k, &v)), first(with(&k2, &v2)));
    Ok(())
}

#[test]
fn large_scores_keep_their_digits() -> Result {
    let [q, k, v] = arguments([1, 140, 300, 1, 1, 8, 8], DType::F64)?;
    let (q, k, v) = (q.as_tensor(), k.as_tensor(), v.as_tensor());
    // All scores are near 20000, and differ by little.
    let shifted = Tensor::cat(
        &[
            &q.narrow(3, 0, 7)?,
            &(q.narrow(3, 7, 1)?.zeros_like()? + 200.)?,
        ],
        3,
    )?;
    let k = Tensor::cat(
        &[
            &k.narrow(3, 0, 7)?,
            &(k.narrow(3, 7, 1)?.zeros_like()? + 100.)?,
        ],
        3,
    )?;
    let plain = Tensor::cat(&[&q.narrow(3, 0, 7)?, &q.narrow(3, 7, 1)?.zeros_like()?], 3)?;
    let (q, k, v) = (
        Var::from_tensor(&shifted)?,
        Var::from_tensor(&k)?,
        Var::from_tensor(v)?,
    );
    let theirs = [
        Var::from_tensor(&plain)?,
        Var::from_tensor(&k)?,
        Var::from_tensor(&v)?,
    ];
    let ours = attention(&q, &k, &v, 1.0, &NONE)?;
    let formula = formula([&theirs[0], &theirs[1], &theirs[2]], 1.0, &NONE)?;
    assert!(gap(&ours, &formula) < 1e-11);
    let ours = ours.sqr()?.sum_all()?.backward()?;
    let formula = formula.sqr()?.sum_all()?.backward()?;
    let off = gap(ours.get(&v).unwrap(), formula.get(&theirs[2]).unwrap());
    assert!(off < 1e-11, "{off}");
    // 10⁸ in f32: one key has all the weight, nothing overflows.
    let [q, k, v] = arguments([2, 70, 70, 2, 1, 4, 4], DType::F32)?;
    let y = attention(&q, &k, &v, 1e8, &causal())?;
    let gradients = y.sum_all()?.backward()?;
    for x in [
        &y,
        gradients.get(&q).unwrap(),
        gradients.get(&k).unwrap(),
        gradients.get(&v).unwrap(),
    ] {
        assert!(values(x).iter().all(|x| x.is_finite()));
    }
    Ok(())
}

#[test]
fn nan_is_not_hidden() -> Result {
    let [q, k, v] = arguments([1, 3, 3, 1, 1, 2, 2], DType::F32)?;
    let nan = |x: &Tensor| -> Result<Tensor> {
        let mut numbers = values(x);
        numbers[2] = f64::NAN; // of position 1
        Ok(Tensor::from_vec(numbers, x.shape(), &CPU)?.to_dtype(DType::F32)?)
    };
    // A weight of 0 does not make up for a value that is no number.
    for (q, k, v, spared) in [
        (&nan(&q)?, k.as_tensor(), v.as_tensor(), true),
        (q.as_tensor(), &nan(&k)?, v.as_tensor(), true),
        (q.as_tensor(), k.as_tensor(), &nan(&v)?, false),
    ] {
        let y = values(&attention(q, k, v, 1.0, &causal())?);
        assert!(!spared || y[..2].iter().all(|x| x.is_finite()), "{y:?}");
        assert!(y[2].is_nan(), "{y:?}");
    }
    Ok(())
}

/// Parts of one projection, transposed tensors and every other column.
#[test]
fn strided_arguments() -> Result {
    let (n, l, heads, kv, dim) = (2, 70, 4, 2, 6);
    for dtype in [DType::F32, DType::F64] {
        let fused = Var::from_tensor(&random(&[n, l, heads + 2 * kv, dim], dtype, 1)?)?;
        let probe = random(&[n, l, heads, dim], dtype, 4)?;
        let narrowed = |copied: bool| -> Result<[Tensor; 3]> {
            let part = |start, count| -> Result<Tensor> {
                let part = fused.narrow(2, start, count)?;
                Ok(if copied { part.contiguous()? } else { part })
            };
            Ok([part(0, heads)?, part(heads, kv)?, part(heads + kv, kv)?])
        };
        for mask in [NONE, causal()] {
            let [q, k, v] = narrowed(false)?;
            let strided = attention(&q, &k, &v, 0.4, &mask)?;
            let [q, k, v] = narrowed(true)?;
            let copied = attention(&q, &k, &v, 0.4, &mask)?;
            let packed = packed_attention(&fused, kv, 0.4, &mask)?;
            let theirs = formula([&q, &k, &v], 0.4, &mask)?;
            assert!(gap(&copied, &theirs) < 1e-6);
            let gradient = |y: &Tensor| -> Result<Vec<f64>> {
                let gradients = (y * &probe)?.sum_all()?.backward()?;
                Ok(values(gradients.get(&fused).unwrap()))
            };
            for other in [&strided, &packed] {
                assert_eq!(values(&copied), values(other));
                assert_eq!(gradient(&copied)?, gradient(other)?);
            }
        }

        // (batch, heads, L, dim), seen as (batch, L, heads, dim).
        let [q, k, v] = arguments([n, l, l, heads, kv, dim, dim], dtype)?;
        let by_head =
            |x: &Var| -> Result<Var> { Ok(Var::from_tensor(&x.transpose(1, 2)?.contiguous()?)?) };
        let (q2, k2, v2) = (by_head(&q)?, by_head(&k)?, by_head(&v)?);
        let ours = attention(
            &q2.transpose(1, 2)?,
            &k2.transpose(1, 2)?,
            &v2.transpose(1, 2)?,
            0.4,
            &causal(),
        )?;
        let plain = attention(&q, &k, &v, 0.4, &causal())?;
        assert_eq!(values(&ours), values(&plain));
        let ours = (&ours * &probe)?.sum_all()?.backward()?;
        let plain = (&plain * &probe)?.sum_all()?.backward()?;
        for (x, y) in [(&q2, &q), (&k2, &k), (&v2, &v)] {
            let ours = ours.get(x).unwrap().transpose(1, 2)?;
            assert_eq!(values(&ours), values(plain.get(y).unwrap()));
        }

        // A last dimension with gaps; keys and values shared by the rows of the batch.
        let gaps = random(&[n, l, dim, heads], dtype, 1)?.transpose(2, 3)?;
        let shared = random(&[1, l, kv, dim], dtype, 2)?.broadcast_as((n, l, kv, dim))?;
        let ours = attention(&gaps, &shared, &shared, 0.4, &NONE)?;
        let (gaps, shared) = (gaps.contiguous()?, shared.contiguous()?);
        let plain = attention(&gaps, &shared, &shared, 0.4, &NONE)?;
        assert_eq!(values(&ours), values(&plain));
    }
    Ok(())
}

#[test]
fn only_what_is_tracked_has_a_gradient() -> Result {
    let [q, k, v] = arguments([1, 70, 70, 6, 2, 4, 4], DType::F64)?;
    let all = attention(&q, &k, &v, 0.5, &causal())?
        .sqr()?
        .sum_all()?
        .backward()?;
    for wanted in 0..8 {
        let given: Vec<Tensor> = [&q, &k, &v]
            .iter()
            .enumerate()
            .map(|(i, x)| {
                if wanted >> i & 1 == 1 {
                    x.as_tensor().clone()
                } else {
                    x.as_tensor().detach()
                }
            })
            .collect();
        let y = attention(&given[0], &given[1], &given[2], 0.5, &causal())?;
        assert_eq!(y.track_op(), wanted != 0);
        if wanted == 0 {
            continue;
        }
        let gradients = y.sqr()?.sum_all()?.backward()?;
        assert_eq!(
            gradients.get_ids().count(),
            1 + u32::count_ones(wanted) as usize - 1
        );
        for (i, x) in [&q, &k, &v].iter().enumerate() {
            match gradients.get(x) {
                Some(gradient) => assert_eq!(values(gradient), values(all.get(x).unwrap())),
                None => assert_eq!(wanted >> i & 1, 0),
            }
        }
    }
    // One tensor for all three.
    let y = attention(&k, &k, &k, 0.5, &NONE)?
        .sqr()?
        .sum_all()?
        .backward()?;
    let theirs = formula([&k, &k, &k], 0.5, &NONE)?
        .sqr()?
        .sum_all()?
        .backward()?;
    assert!(gap(y.get(&k).unwrap(), theirs.get(&k).unwrap()) < 1e-12);
    Ok(())
}

#[test]
fn the_same_on_every_run() -> Result {
    let [q, k, v] = arguments([1, 300, 300, 9, 3, 16, 16], DType::F32)?;
    let run = || -> Result<Vec<Vec<f64>>> {
        let y = attention(&q, &k, &v, 0.25, &causal())?;
        let gradients = y.sqr()?.sum_all()?.backward()?;
        let mut all = vec![values(&y)];
        for x in [&q, &k, &v] {
            all.push(values(gradients.get(x).unwrap()));
        }
        Ok(all)
    };
    let first = run()?;
    for _ in 0..5 {
        assert_eq!(first, run()?);
    }
    Ok(())
}

#[test]
fn a_mask_that_learns() -> Result {
    let [q, k, v] = arguments([2, 6, 9, 4, 2, 4, 4], DType::F64)?;
    let bias = Var::from_tensor(&random(&[4, 6, 9], DType::F64, 5)?)?;
    let masks = [bias.as_tensor()];
    let mask = AttentionMask {
        causal: true,
        masks: &masks,
    };
    let ours = attention(&q, &k, &v, 0.5, &mask)?;
    let theirs = formula([&q, &k, &v], 0.5, &mask)?;
    assert!(gap(&ours, &theirs) < 1e-12);
    let (ours, theirs) = (
        ours.sqr()?.sum_all()?.backward()?,
        theirs.sqr()?.sum_all()?.backward()?,
    );
    for x in [&q, &k, &v, &bias] {
        assert!(gap(ours.get(x).unwrap(), theirs.get(x).unwrap()) < 1e-12);
    }
    Ok(())
}

#[test]
fn half_precision() -> Result {
    for (dtype, tolerance) in [(DType::F16, 2e-3), (DType::BF16, 2e-2)] {
        let [q, k, v] = arguments([2, 70, 80, 4, 2, 8, 8], dtype)?;
        let padding = coins(&[2, 1, 1, 80], 0.3, 5)?;
        for causal in [false, true] {
            let masks = [&padding];
            let mask = AttentionMask {
                causal,
                masks: &masks,
            };
            let ours = attention(&q, &k, &v, 0.4, &mask)?;
            assert_eq!(ours.dtype(), dtype);
            let off = gap(&ours, &formula([&q, &k, &v], 0.4, &mask)?);
            assert!(off < tolerance, "{dtype:?} {off}");
            let gradients = ours.sum_all()?.backward()?;
            assert!(gradients.get(&q).is_some() && gradients.get(&v).is_some());
        }
        let fused = random(&[2, 5, 8, 4], dtype, 1)?;
        let packed = packed_attention(&fused, 2, 0.4, &NONE)?;
        let part = |start, count| fused.narrow(2, start, count).unwrap();
        let apart = attention(&part(0, 4), &part(4, 2), &part(6, 2), 0.4, &NONE)?;
        assert_eq!(values(&packed), values(&apart));
    }
    Ok(())
}

#[test]
fn gradients_by_finite_differences() -> Result {
    let [q, k, v] = arguments([2, 3, 4, 4, 2, 3, 2], DType::F64)?;
    let blocked = Tensor::new(&[[0u8, 0, 0, 1], [0, 1, 0, 0], [1, 1, 1, 1]], &CPU)?;
    let added = random(&[4, 3, 4], DType::F64, 5)?;
    let masks = [&blocked, &added];
    for causal in [false, true] {
        let mask = AttentionMask {
            causal,
            masks: &masks,
        };
        let probe = random(&[2, 3, 4, 2], DType::F64, 6)?;
        let loss =
            || -> Result<Tensor> { Ok((attention(&q, &k, &v, 0.7, &mask)? * &probe)?.sum_all()?) };
        let gradients = loss()?.backward()?;
        for x in [&q, &k, &v] {
            let (start, gradient) = (x.as_tensor().copy()?, values(gradients.get(x).unwrap()));
            for (i, &g) in gradient.iter().enumerate() {
                let at = |by: f64| -> Result<f64> {
                    let mut numbers = values(&start);
                    numbers[i] += by;
                    x.set(&Tensor::from_vec(numbers, start.shape(), &CPU)?)?;
                    Ok(loss()?.to_scalar()?)
                };
                let slope = (at(1e-5)? - at(-1e-5)?) / 2e-5;
                assert!((slope - g).abs() < 1e-8, "[{i}]: {g} against {slope}");
            }
            x.set(&start)?;
        }
    }
    Ok(())
}

#[test]
fn refuses_what_does_not_fit() -> Result {
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &CPU).unwrap();
    let refused = |q: &Tensor, k: &Tensor, v: &Tensor, masks: &[&Tensor], wanted: &[&str]| {
        let mask = AttentionMask { masks, ..NONE };
        let message = attention(q, k, v, 1.0, &mask).unwrap_err().to_string();
        for wanted in wanted {
            assert!(message.contains(wanted), "{message:?} without {wanted:?}");
        }
        assert!(message.starts_with("attention: q ["), "{message}");
    };
    let (q, k) = (zeros(&[2, 5, 4, 3]), zeros(&[2, 6, 2, 3]));
    assert!(attention(&q, &k, &k, 1.0, &NONE).is_ok());
    refused(
        &zeros(&[2, 5, 3]),
        &k,
        &k,
        &[],
        &["q [2, 5, 3] of F32", "[batch, length, heads, dim]"],
    );
    refused(&q, &zeros(&[2, 6, 6]), &k, &[], &["k [2, 6, 6]"]);
    for (k, v) in [
        ([1, 6, 2, 3], [2, 6, 2, 3]),
        ([2, 6, 2, 4], [2, 6, 2, 3]),
        ([2, 6, 2, 3], [1, 6, 2, 3]),
        ([2, 6, 2, 3], [2, 5, 2, 3]),
        ([2, 6, 2, 3], [2, 6, 4, 3]),
    ] {
        let wanted = [
            format!("k {k:?} of F32, v {v:?} of F32"),
            "k must be [2, ".to_string(),
        ];
        refused(&q, &zeros(&k), &zeros(&v), &[], &[&wanted[0], &wanted[1]]);
    }
    let three = zeros(&[2, 6, 3, 3]);
    refused(
        &q,
        &three,
        &three,
        &[],
        &["4 heads must be a multiple of k's 3"],
    );
    let empty = zeros(&[2, 0, 2, 3]);
    refused(&q, &empty, &empty, &[], &["at least 1"]);
    refused(&zeros(&[2, 0, 4, 3]), &k, &k, &[], &["at least 1"]);
    let wide = k.to_dtype(DType::F64)?;
    refused(&q, &wide, &k, &[], &["k [2, 6, 2, 3] of F64", "one type"]);
    refused(&q, &k, &wide, &[], &["v [2, 6, 2, 3] of F64", "one type"]);
    let whole = |x: &Tensor| x.to_dtype(DType::U32).unwrap();
    refused(&whole(&q), &whole(&k), &whole(&k), &[], &["floats"]);
    for mask in [
        zeros(&[6, 5]),
        zeros(&[2, 6]),
        zeros(&[3, 1, 1, 6]),
        zeros(&[1, 2, 4, 5, 6]),
        whole(&zeros(&[5, 6])),
    ] {
        let given = format!("mask {:?} of {:?}", mask.dims(), mask.dtype());
        refused(&q, &k, &k, &[&mask], &[&given, "broadcast to [2, 4, 5, 6]"]);
    }
    for (shape, kv) in [
        (&[2, 5, 6][..], 2),
        (&[2, 5, 4, 3], 2),
        (&[2, 5, 7, 3], 2),
        (&[2, 5, 4, 3], 0),
        (&[2, 0, 6, 3], 2),
        (&[2, 5, 4, 3], usize::MAX),
    ] {
        let message = packed_attention(&zeros(shape), kv, 1.0, &NONE)
            .unwrap_err()
            .to_string();
        assert!(
            message.starts_with(&format!("packed_attention: qkv {shape:?} of F32; ")),
            "{message}"
        );
    }
    Ok(())
}
