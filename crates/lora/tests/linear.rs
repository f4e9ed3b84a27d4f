//! The behaviour of `LoraLinear`, checked against arithmetic written out in plain f64 loops.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::needless_range_loop)]

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{Linear, Module, Optimizer, SGD};
use lora::{Error, Init, LoraConfig, LoraLinear};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

const CPU: Device = Device::Cpu;

/// One layer to try: α differs from r, out from in, and r once exceeds both.
#[derive(Clone, Copy, Debug)]
struct Case {
    in_features: usize,
    out_features: usize,
    r: usize,
    alpha: f64,
    rslora: bool,
    bias: bool,
    batch: &'static [usize],
}

const CASES: [Case; 6] = [
    Case {
        in_features: 7,
        out_features: 5,
        r: 3,
        alpha: 6.5,
        rslora: false,
        bias: true,
        batch: &[4],
    },
    Case {
        in_features: 5,
        out_features: 9,
        r: 2,
        alpha: 1.0,
        rslora: false,
        bias: false,
        batch: &[2, 3],
    },
    Case {
        in_features: 4,
        out_features: 3,
        r: 6,
        alpha: 16.0,
        rslora: false,
        bias: true,
        batch: &[2, 3],
    },
    Case {
        in_features: 6,
        out_features: 2,
        r: 4,
        alpha: 3.0,
        rslora: true,
        bias: true,
        batch: &[1],
    },
    Case {
        in_features: 3,
        out_features: 4,
        r: 1,
        alpha: 0.5,
        rslora: true,
        bias: false,
        batch: &[2, 1, 3, 2],
    },
    Case {
        in_features: 8,
        out_features: 6,
        r: 2,
        alpha: 5.0,
        rslora: false,
        bias: true,
        batch: &[],
    },
];

impl Case {
    fn config(&self) -> LoraConfig {
        LoraConfig::new(self.r, self.alpha).with_rslora(self.rslora)
    }

    /// The scaling, written out again.
    fn scaling(&self) -> f64 {
        let r = self.r as f64;
        if self.rslora {
            self.alpha / r.sqrt()
        } else {
            self.alpha / r
        }
    }

    fn base(&self, dtype: DType, rng: &mut ChaCha8Rng) -> Result<Linear> {
        let weight = random(&[self.out_features, self.in_features], dtype, rng)?;
        let bias = if self.bias {
            Some(random(&[self.out_features], dtype, rng)?)
        } else {
            None
        };
        Ok(Linear::new(weight, bias))
    }

    /// A layer whose B is no longer zero.
    fn layer(&self, dtype: DType, rng: &mut ChaCha8Rng) -> Result<LoraLinear> {
        let layer = LoraLinear::new("case", self.base(dtype, rng)?, &self.config(), rng)?;
        let b = random(&[self.out_features, self.r], layer.lora_b()?.dtype(), rng)?;
        layer.lora_b()?.set(&b)?;
        Ok(layer)
    }

    fn input(&self, dtype: DType, rng: &mut ChaCha8Rng) -> Result<Tensor> {
        random(&[self.batch, &[self.in_features]].concat(), dtype, rng)
    }
}

fn random(shape: &[usize], dtype: DType, rng: &mut ChaCha8Rng) -> Result<Tensor> {
    let values: Vec<f64> = (0..shape.iter().product())
        .map(|_| rng.random_range(-1.0..1.0))
        .collect();
    Tensor::from_vec(values, shape, &CPU)?.to_dtype(dtype)
}

fn seeded(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

fn values(t: &Tensor) -> Result<Vec<f64>> {
    t.flatten_all()?.to_dtype(DType::F64)?.to_vec1()
}

fn matrix(t: &Tensor) -> Result<Vec<Vec<f64>>> {
    t.to_dtype(DType::F64)?.to_vec2()
}

/// x (W + sBA)ᵀ + b, one multiplication at a time.
fn by_hand(layer: &LoraLinear, scaling: f64, x: &Tensor) -> Result<Vec<f64>> {
    let (w, a, b) = (
        matrix(layer.base().weight())?,
        matrix(layer.lora_a()?.as_tensor())?,
        matrix(layer.lora_b()?.as_tensor())?,
    );
    let bias = layer.base().bias().map(values).transpose()?;
    let mut y = vec![];
    for row in values(x)?.chunks(w[0].len()) {
        for o in 0..w.len() {
            let mut sum = bias.as_ref().map_or(0.0, |bias| bias[o]);
            for (i, x) in row.iter().enumerate() {
                let ba: f64 = (0..a.len()).map(|k| b[o][k] * a[k][i]).sum();
                sum += x * (w[o][i] + scaling * ba);
            }
            y.push(sum);
        }
    }
    Ok(y)
}

/// The largest difference, relative to the largest expected value.
#[track_caller]
fn assert_close(got: &[f64], want: &[f64], tolerance: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: lengths");
    assert!(
        got.iter().all(|v| v.is_finite()),
        "{what}: not finite: {got:?}"
    );
    let scale = want.iter().fold(0.0f64, |m, v| m.max(v.abs()));
    let gap = got
        .iter()
        .zip(want)
        .fold(0.0f64, |m, (g, w)| m.max((g - w).abs()));
    assert!(
        gap <= tolerance * scale,
        "{what}: off by {gap:e} of {scale}"
    );
}

fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-12,
        DType::F32 => 1e-6,
        DType::F16 => 2e-3,
        _ => 2e-2,
    }
}

#[test]
fn a_fresh_layer_is_its_base_exactly() -> Result<()> {
    for case in CASES {
        for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
            for init in [Init::Kaiming, Init::Gaussian] {
                let mut rng = seeded(1);
                let base = case.base(dtype, &mut rng)?;
                let config = case.config().with_init(init);
                let layer = LoraLinear::new("fresh", base.clone(), &config, &mut rng)?;
                let x = case.input(dtype, &mut rng)?;
                // candle's own layer takes no input without a batch dimension.
                let want = base.forward(&x.reshape(((), case.in_features))?)?;
                assert_eq!(
                    values(&layer.forward(&x)?)?,
                    values(&want)?,
                    "{case:?} {dtype:?}"
                );
                assert!(values(&layer.delta_weight()?)?.iter().all(|d| *d == 0.0));
                assert!(
                    values(layer.lora_a()?.as_tensor())?
                        .iter()
                        .any(|a| *a != 0.0),
                    "A must not be zero"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn forward_equals_the_formula() -> Result<()> {
    for case in CASES {
        for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
            let mut rng = seeded(2);
            let layer = case.layer(dtype, &mut rng)?;
            let x = case.input(dtype, &mut rng)?;
            let y = layer.forward(&x)?;
            assert_eq!(
                y.dims(),
                [case.batch, &[case.out_features]].concat(),
                "{case:?}"
            );
            assert_eq!(y.dtype(), dtype);
            let want = by_hand(&layer, case.scaling(), &x)?;
            assert_close(
                &values(&y)?,
                &want,
                tolerance(dtype),
                &format!("{case:?} {dtype:?}"),
            );
        }
    }
    Ok(())
}

#[test]
fn an_input_that_is_not_contiguous_gives_the_same() -> Result<()> {
    let mut rng = seeded(3);
    let case = CASES[1];
    let layer = case.layer(DType::F32, &mut rng)?;
    let x = random(&[case.in_features, 4, 3], DType::F32, &mut rng)?.permute([2, 1, 0])?;
    assert!(!x.is_contiguous());
    let want = by_hand(&layer, case.scaling(), &x.contiguous()?)?;
    assert_close(&values(&layer.forward(&x)?)?, &want, 1e-6, "permuted input");
    Ok(())
}

#[test]
fn delta_weight_is_s_b_a() -> Result<()> {
    for case in CASES {
        let layer = case.layer(DType::F64, &mut seeded(4))?;
        let (a, b) = (
            matrix(layer.lora_a()?.as_tensor())?,
            matrix(layer.lora_b()?.as_tensor())?,
        );
        let mut want = vec![];
        for o in 0..case.out_features {
            for i in 0..case.in_features {
                want.push(case.scaling() * (0..case.r).map(|k| b[o][k] * a[k][i]).sum::<f64>());
            }
        }
        let delta = layer.delta_weight()?;
        assert_eq!(delta.dims(), [case.out_features, case.in_features]);
        assert_close(&values(&delta)?, &want, 1e-12, &format!("{case:?}"));
    }
    Ok(())
}

#[test]
fn merged_equals_unmerged_and_leaves_the_layer_alone() -> Result<()> {
    for case in CASES {
        for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
            let mut rng = seeded(5);
            let layer = case.layer(dtype, &mut rng)?;
            let x = case
                .input(dtype, &mut rng)?
                .reshape(((), case.in_features))?;
            let (weight, apart) = (values(layer.base().weight())?, values(&layer.forward(&x)?)?);
            let merged = layer.merged()?;
            assert_eq!(merged.weight().dtype(), dtype);
            assert_eq!(merged.bias().is_some(), case.bias);
            assert!(!merged.weight().track_op(), "a merged weight must be plain");
            let what = format!("{case:?} {dtype:?}");
            assert_close(
                &values(&merged.forward(&x)?)?,
                &apart,
                2.0 * tolerance(dtype),
                &what,
            );
            assert_eq!(
                values(layer.base().weight())?,
                weight,
                "{what}: base changed"
            );
            assert_eq!(values(&layer.forward(&x)?)?, apart, "{what}: layer changed");
        }
    }
    Ok(())
}

#[test]
fn at_b_zero_only_b_learns() -> Result<()> {
    for case in CASES {
        let mut rng = seeded(6);
        let base = case.base(DType::F32, &mut rng)?;
        let layer = LoraLinear::new("fresh", base, &case.config(), &mut rng)?;
        let x = case.input(DType::F32, &mut rng)?;
        let grads = layer.forward(&x)?.sqr()?.sum_all()?.backward()?;
        let da = grads
            .get(layer.lora_a()?.as_tensor())
            .expect("A is in the graph");
        let db = grads
            .get(layer.lora_b()?.as_tensor())
            .expect("B is in the graph");
        assert!(
            values(da)?.iter().all(|g| *g == 0.0),
            "{case:?}: dA = Bᵀ… is zero"
        );
        assert!(
            values(db)?.iter().any(|g| g.abs() > 1e-3),
            "{case:?}: dB is not"
        );
    }
    Ok(())
}

#[test]
fn a_base_given_as_variables_gets_no_gradient() -> Result<()> {
    let mut rng = seeded(7);
    let case = CASES[0];
    let weight = Var::from_tensor(&random(&[5, 7], DType::F32, &mut rng)?)?;
    let bias = Var::from_tensor(&random(&[5], DType::F32, &mut rng)?)?;
    // Once the variable itself, once something computed from it.
    let scaled = (weight.as_tensor() * 2.0)?;
    let transposed = Var::from_tensor(&weight.t()?.contiguous()?)?;
    for given in [weight.as_tensor().clone(), scaled, transposed.t()?] {
        let base = Linear::new(given, Some(bias.as_tensor().clone()));
        let layer = LoraLinear::new("frozen", base, &case.config(), &mut rng)?;
        layer
            .lora_b()?
            .set(&random(&[5, 3], DType::F32, &mut rng)?)?;
        let grads = layer
            .forward(&case.input(DType::F32, &mut rng)?)?
            .sqr()?
            .sum_all()?
            .backward()?;
        for frozen in [&weight, &bias, &transposed] {
            assert!(
                grads.get(frozen).is_none(),
                "a frozen variable got a gradient"
            );
        }
        assert!(grads.get(layer.base().weight()).is_none());
        assert!(
            grads.get(layer.lora_a()?.as_tensor()).is_some()
                && grads.get(layer.lora_b()?.as_tensor()).is_some()
        );
        assert!(!layer.base().weight().track_op() && !layer.base().bias().unwrap().track_op());
    }
    Ok(())
}

#[test]
fn training_the_original_variable_does_not_move_the_layer() -> Result<()> {
    let mut rng = seeded(8);
    let weight = Var::from_tensor(&random(&[5, 7], DType::F32, &mut rng)?)?;
    let views = [weight.as_tensor().clone(), weight.narrow(0, 0, 3)?];
    for view in views {
        let base = Linear::new(view.clone(), None);
        let layer = LoraLinear::new("frozen", base, &CASES[0].config(), &mut rng)?;
        let before = values(layer.base().weight())?;
        assert_eq!(before, values(&view)?);
        weight.set(&random(&[5, 7], DType::F32, &mut rng)?)?;
        assert_eq!(values(layer.base().weight())?, before);
        assert_ne!(values(&view)?, before, "the test must move the variable");
    }
    Ok(())
}

#[test]
fn a_training_step_moves_a_and_b_and_nothing_else() -> Result<()> {
    let mut rng = seeded(9);
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let layer = CASES[0].layer(dtype, &mut rng)?;
        let state = |l: &LoraLinear| -> Result<[Vec<f64>; 4]> {
            let base = l.base();
            let bias = base.bias().expect("case 0 has a bias");
            Ok([
                values(l.base().weight())?,
                values(bias)?,
                values(l.lora_a()?.as_tensor())?,
                values(l.lora_b()?.as_tensor())?,
            ])
        };
        let before = state(&layer)?;
        let vars = layer
            .trainable_parameters()
            .into_iter()
            .map(|(_, v)| v)
            .collect();
        let x = CASES[0].input(dtype, &mut rng)?;
        let loss = layer.forward(&x)?.to_dtype(DType::F32)?.sqr()?.sum_all()?;
        SGD::new(vars, 0.1)?.backward_step(&loss)?;
        let after = state(&layer)?;
        assert_eq!(before[..2], after[..2], "{dtype:?}: the base moved");
        assert!(
            before[2] != after[2] && before[3] != after[3],
            "{dtype:?}: A and B did not"
        );
    }
    Ok(())
}

#[test]
fn gradients_equal_finite_differences() -> Result<()> {
    for case in CASES {
        let mut rng = seeded(10);
        let layer = case.layer(DType::F64, &mut rng)?;
        let x = Var::from_tensor(&case.input(DType::F64, &mut rng)?)?;
        let probe = random(layer.forward(&x)?.dims(), DType::F64, &mut rng)?;
        // Not a plain sum: every output has a weight of its own, and the loss is curved.
        let loss = || -> Result<Tensor> { (layer.forward(&x)?.sqr()? * &probe)?.sum_all() };
        let grads = loss()?.backward()?;
        for (what, var) in [
            ("A", layer.lora_a()?),
            ("B", layer.lora_b()?),
            ("x", x.clone()),
        ] {
            let (start, shape) = (values(&var)?, var.shape().clone());
            let mut want = vec![];
            for i in 0..start.len() {
                let at = |step: f64| -> Result<f64> {
                    let mut moved = start.clone();
                    moved[i] += step;
                    var.set(&Tensor::from_vec(moved, shape.clone(), &CPU)?)?;
                    loss()?.to_scalar::<f64>()
                };
                let h = 1e-5;
                want.push((at(h)? - at(-h)?) / (2.0 * h));
            }
            var.set(&Tensor::from_vec(start, shape.clone(), &CPU)?)?;
            let got = values(grads.get(&var).expect("in the graph"))?;
            assert_close(&got, &want, 1e-7, &format!("{case:?}: d{what}"));
        }
    }
    Ok(())
}

#[test]
fn scaling_follows_both_rules_and_reaches_the_layer() -> Result<()> {
    for (r, alpha, rslora, want) in [
        (8, 16.0, false, 2.0),
        (8, 8.0, false, 1.0),
        (16, 8.0, true, 2.0),
        (1, 3.5, true, 3.5),
        (4, 1.0, false, 0.25),
    ] {
        let config = LoraConfig::new(r, alpha).with_rslora(rslora);
        assert_eq!(config.scaling(), want);
        let base = Linear::new(Tensor::ones((3, 4), DType::F32, &CPU)?, None);
        let layer = LoraLinear::new("scaled", base, &config, &mut seeded(11))?;
        let adapter = layer.adapter("default")?;
        assert_eq!((adapter.scaling(), adapter.r()), (want, r));
    }
    let default = LoraConfig::default();
    assert_eq!(
        (default.r, default.lora_alpha, default.use_rslora),
        (8, 8.0, false)
    );
    Ok(())
}

#[test]
fn the_seed_decides_a() -> Result<()> {
    for init in [Init::Kaiming, Init::Gaussian] {
        let a = |seed, dtype| -> Result<Vec<f64>> {
            let base = Linear::new(Tensor::ones((3, 4), dtype, &CPU)?, None);
            let config = LoraConfig::new(2, 4.0).with_init(init);
            values(
                LoraLinear::new("seeded", base, &config, &mut seeded(seed))?
                    .lora_a()?
                    .as_tensor(),
            )
        };
        assert_eq!(a(1, DType::F32)?, a(1, DType::F32)?);
        assert_ne!(a(1, DType::F32)?, a(2, DType::F32)?);
        assert_close(
            &a(1, DType::F32)?,
            &a(1, DType::F64)?,
            1e-7,
            "f32 rounds f64",
        );
        assert_eq!(
            a(1, DType::F32)?,
            a(1, DType::BF16)?,
            "half precision keeps f32 adapters"
        );
    }
    Ok(())
}

/// These numbers may never change: trained notebooks hang on them.
#[test]
fn golden_values_of_a() -> Result<()> {
    let kaiming = [
        0.21003563118564939,
        0.5199332556583542,
        -0.08369684864524149,
        0.14706326239483095,
        -0.24411076157234557,
        -0.40419268093064326,
    ];
    let gaussian = [
        0.23899061917551087,
        0.6670353051159039,
        -0.10543334163551514,
        0.23817346190441066,
        -0.2560453110280817,
        -0.46698922469534904,
    ];
    for (init, want) in [(Init::Kaiming, kaiming), (Init::Gaussian, gaussian)] {
        let base = Linear::new(Tensor::ones((4, 3), DType::F64, &CPU)?, None);
        let config = LoraConfig::new(2, 4.0).with_init(init);
        let layer = LoraLinear::new("golden", base, &config, &mut seeded(42))?;
        let got = values(layer.lora_a()?.as_tensor())?;
        assert_close(&got, &want, 1e-15, &format!("{init:?}"));
    }
    Ok(())
}

/// Two layers from one generator must differ: the generator moves on.
#[test]
fn one_generator_feeds_several_layers() -> Result<()> {
    let mut rng = seeded(12);
    let mut a = || -> Result<Vec<f64>> {
        let base = Linear::new(Tensor::ones((3, 4), DType::F32, &CPU)?, None);
        values(
            LoraLinear::new("one", base, &LoraConfig::new(2, 4.0), &mut rng)?
                .lora_a()?
                .as_tensor(),
        )
    };
    assert_ne!(a()?, a()?);
    Ok(())
}

#[test]
fn a_has_pefts_distribution() -> Result<()> {
    let (r, in_features) = (16, 1024);
    let a = |init| -> Result<Vec<f64>> {
        let base = Linear::new(Tensor::ones((2, in_features), DType::F32, &CPU)?, None);
        let config = LoraConfig::new(r, 4.0).with_init(init);
        values(
            LoraLinear::new("drawn", base, &config, &mut seeded(13))?
                .lora_a()?
                .as_tensor(),
        )
    };
    let moments = |v: &[f64]| {
        let mean = v.iter().sum::<f64>() / v.len() as f64;
        let var = v.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / v.len() as f64;
        (mean, var.sqrt())
    };

    // U(−1/32, 1/32): bound 0.03125, deviation bound / √3.
    let kaiming = a(Init::Kaiming)?;
    let bound = 1.0 / 32.0;
    let (mean, std) = moments(&kaiming);
    let widest = kaiming.iter().fold(0.0f64, |m, v| m.max(v.abs()));
    assert!(widest <= bound && widest > 0.99 * bound, "widest {widest}");
    assert!(mean.abs() < 0.03 * bound, "mean {mean}");
    assert!(
        (std / (bound / 3f64.sqrt()) - 1.0).abs() < 0.02,
        "std {std}"
    );

    // N(0, 1/16): some values lie beyond three deviations, few beyond five.
    let gaussian = a(Init::Gaussian)?;
    let (mean, std) = moments(&gaussian);
    let widest = gaussian.iter().fold(0.0f64, |m, v| m.max(v.abs())) * 16.0;
    assert!(mean.abs() < 0.03 / 16.0, "mean {mean}");
    assert!((std * 16.0 - 1.0).abs() < 0.02, "std {std}");
    assert!(widest > 3.0 && widest < 6.0, "widest {widest} deviations");
    Ok(())
}

#[test]
fn adapters_of_a_half_precision_base_are_f32() -> Result<()> {
    for (base, adapter) in [
        (DType::F16, DType::F32),
        (DType::BF16, DType::F32),
        (DType::F32, DType::F32),
        (DType::F64, DType::F64),
    ] {
        let layer = CASES[0].layer(base, &mut seeded(14))?;
        assert_eq!(
            (layer.lora_a()?.dtype(), layer.lora_b()?.dtype()),
            (adapter, adapter)
        );
        assert_eq!(layer.base().weight().dtype(), base);
        assert_eq!(layer.delta_weight()?.dtype(), adapter);
    }
    Ok(())
}

#[test]
fn names_counts_and_text() -> Result<()> {
    let base = Linear::new(
        Tensor::zeros((512, 768), DType::F32, &CPU)?,
        Some(Tensor::zeros(512, DType::F32, &CPU)?),
    );
    let config = LoraConfig::new(8, 16.0);
    let layer = LoraLinear::new("layers.0.q_proj", base, &config, &mut seeded(15))?;

    let parameters = layer.trainable_parameters();
    let names: Vec<&str> = parameters.iter().map(|(name, _)| name.as_str()).collect();
    let want = [
        "base_model.model.layers.0.q_proj.lora_A.weight",
        "base_model.model.layers.0.q_proj.lora_B.weight",
    ];
    assert_eq!(names, want);
    assert!(names.is_sorted());
    assert_eq!(parameters[0].1.id(), layer.lora_a()?.id());
    assert_eq!(parameters[1].1.id(), layer.lora_b()?.id());

    let count = layer.parameter_count();
    assert_eq!(count.trainable, 8 * (768 + 512));
    assert_eq!(count.all, 8 * (768 + 512) + 512 * 768 + 512);
    assert_eq!(
        count.to_string(),
        "trainable params: 10,240 || all params: 403,968 || trainable%: 2.5349"
    );

    let text = "LoraLinear(layers.0.q_proj: 768 → 512, r = 8, scaling = 2, 10,240 trainable)";
    assert_eq!(layer.to_string(), text);
    assert_eq!(format!("{layer:?}"), text);
    assert_eq!(
        (layer.name(), layer.in_features(), layer.out_features()),
        ("layers.0.q_proj", 768, 512)
    );
    Ok(())
}

#[test]
fn clones_share_a_and_b() -> Result<()> {
    let layer = CASES[0].layer(DType::F32, &mut seeded(16))?;
    let twin = layer.clone();
    layer
        .lora_b()?
        .set(&Tensor::ones((5, 3), DType::F32, &CPU)?)?;
    assert_eq!(values(twin.lora_b()?.as_tensor())?, [1.0; 15]);
    Ok(())
}

fn build(
    weight: Tensor,
    bias: Option<Tensor>,
    name: &str,
    config: &LoraConfig,
) -> lora::Result<LoraLinear> {
    LoraLinear::new(name, Linear::new(weight, bias), config, &mut seeded(17))
}

#[test]
fn refused_configurations() -> Result<()> {
    let w = Tensor::ones((3, 4), DType::F32, &CPU)?;
    let error = build(w.clone(), None, "q", &LoraConfig::new(0, 8.0)).unwrap_err();
    assert!(matches!(error, Error::Rank), "{error}");
    for alpha in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let error = build(w.clone(), None, "q", &LoraConfig::new(2, alpha)).unwrap_err();
        assert!(matches!(error, Error::Alpha { .. }), "{error}");
        assert!(error.to_string().contains(&alpha.to_string()), "{error}");
    }
    for name in ["", "a..b", ".a", "a.", "a b", "a.\t"] {
        let error = build(w.clone(), None, name, &LoraConfig::default()).unwrap_err();
        assert!(matches!(error, Error::Name { .. }), "{name:?}: {error}");
    }
    // A rank above both sizes is allowed, as in PEFT.
    assert!(build(w, None, "q", &LoraConfig::new(64, 8.0)).is_ok());
    Ok(())
}

#[test]
fn refused_bases() -> Result<()> {
    let config = LoraConfig::default();
    for shape in [&[4][..], &[2, 3, 4], &[], &[0, 4], &[4, 0], &[0, 0]] {
        let error = build(
            Tensor::zeros(shape, DType::F32, &CPU)?,
            None,
            "q_proj",
            &config,
        )
        .unwrap_err();
        assert!(matches!(error, Error::Weight { .. }), "{error}");
        let text = error.to_string();
        assert!(
            text.contains("q_proj") && text.contains(&format!("{shape:?}")),
            "{text}"
        );
    }

    let w = Tensor::zeros((3, 4), DType::F32, &CPU)?;
    for shape in [&[4][..], &[1, 3], &[]] {
        let bias = Some(Tensor::zeros(shape, DType::F32, &CPU)?);
        let text = build(w.clone(), bias, "q_proj", &config)
            .unwrap_err()
            .to_string();
        assert!(text.contains("q_proj") && text.contains("[3, 4]"), "{text}");
        assert!(
            text.contains(&format!("{shape:?}")) && text.contains("must be [3]"),
            "{text}"
        );
    }

    let integers = Tensor::zeros((3, 4), DType::U32, &CPU)?;
    let text = build(integers, None, "q_proj", &config)
        .unwrap_err()
        .to_string();
    assert!(text.contains("q_proj") && text.contains("U32"), "{text}");
    Ok(())
}

#[test]
fn refused_inputs() -> Result<()> {
    let w = Tensor::zeros((3, 4), DType::F32, &CPU)?;
    let layer = build(w, None, "q_proj", &LoraConfig::default())?;
    for shape in [&[2, 5][..], &[5], &[], &[2, 4, 3], &[0, 3], &[4, 0]] {
        let x = Tensor::zeros(shape, DType::F32, &CPU)?;
        let error = layer.forward(&x).unwrap_err();
        assert!(matches!(error, candle_core::Error::Wrapped(_)), "{error}");
        let text = error.to_string();
        assert!(text.starts_with("layer q_proj: "), "{text}");
        assert!(
            text.contains(&format!("{shape:?}")) && text.contains("[3, 4]"),
            "{text}"
        );
        assert!(text.contains("must be 4"), "{text}");
        assert!(!text.contains('\n'), "a message, not a backtrace: {text}");
    }
    let sideways = Tensor::zeros((4, 2), DType::F32, &CPU)?;
    assert!(
        layer
            .forward(&sideways)
            .unwrap_err()
            .to_string()
            .contains("x.t()? would fit")
    );

    let x = Tensor::zeros((2, 4), DType::F64, &CPU)?;
    let text = layer.forward(&x).unwrap_err().to_string();
    assert!(
        text.contains("q_proj") && text.contains("F64") && text.contains("DType::F32"),
        "{text}"
    );
    Ok(())
}

#[test]
fn empty_batches_pass_through() -> Result<()> {
    for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
        let layer = CASES[0].layer(dtype, &mut seeded(18))?;
        for (shape, want) in [
            (&[0, 7][..], &[0, 5][..]),
            (&[0, 2, 7], &[0, 2, 5]),
            (&[2, 0, 7], &[2, 0, 5]),
        ] {
            let y = layer.forward(&Tensor::zeros(shape, dtype, &CPU)?)?;
            assert_eq!(y.dims(), want);
        }
    }
    // Backward through nothing: no panic, and no gradient but zero (candle drops the graph here).
    let layer = CASES[0].layer(DType::F32, &mut seeded(18))?;
    let y = layer.forward(&Tensor::zeros((0, 7), DType::F32, &CPU)?)?;
    let grads = y.sum_all()?.backward()?;
    if let Some(db) = grads.get(layer.lora_b()?.as_tensor()) {
        assert_eq!(values(db)?, [0.0; 15]);
    }
    Ok(())
}

/// What PiSSA took out of W goes back when it leaves, and not while others count on the rest.
#[test]
fn a_base_that_was_rewritten_comes_back() -> Result<()> {
    let mut rng = seeded(19);
    let weight = random(&[5, 4], DType::F32, &mut rng)?;
    let config = LoraConfig::new(2, 3.0).with_init(Init::Pissa);
    let layer = LoraLinear::new("q", Linear::new(weight.clone(), None), &config, &mut rng)?;
    assert_ne!(values(layer.base().weight())?, values(&weight)?);
    layer.add_adapter("plain", &LoraConfig::new(2, 3.0), &mut rng)?;
    let text = layer.delete_adapter("default").unwrap_err().to_string();
    assert!(
        text.contains("layer q") && text.contains("\"default\""),
        "{text}"
    );
    layer.delete_adapter("plain")?;
    layer.delete_adapter("default")?;
    assert_close(
        &values(layer.base().weight())?,
        &values(&weight)?,
        1e-6,
        "W",
    );
    Ok(())
}

/// A layer that trains whole beside a base in half precision does so in f32.
#[test]
fn whole_layers_of_a_half_precision_base_train_in_f32() -> Result<()> {
    let mut rng = seeded(20);
    let frozen = |name: &str, rng: &mut ChaCha8Rng| -> Result<LoraLinear> {
        let bias = Some(random(&[3], DType::BF16, rng)?);
        let base = Linear::new(random(&[3, 4], DType::BF16, rng)?, bias);
        Ok(LoraLinear::frozen(name, base)?)
    };
    let (proj, head) = (frozen("proj", &mut rng)?, frozen("head", &mut rng)?);
    let x = random(&[2, 4], DType::BF16, &mut rng)?;
    let before = values(&head.forward(&x)?)?;
    let mut config = LoraConfig::new(2, 3.0).with_targets("proj");
    config.modules_to_save = vec!["head".to_string()];
    let mut model = lora::LoraModel::new(&[&proj, &head])?;
    model.add_adapter("default", &config, &mut rng)?;
    assert_eq!(values(&head.forward(&x)?)?, before);
    let parameters = model.trainable_parameters();
    let names: Vec<_> = parameters
        .iter()
        .map(|(n, v)| (n.as_str(), v.dtype()))
        .collect();
    assert!(
        names.contains(&("base_model.model.head.weight", DType::F32)),
        "{names:?}"
    );
    assert!(
        names.contains(&("base_model.model.head.bias", DType::F32)),
        "{names:?}"
    );
    let y = head.forward(&x)?;
    assert_eq!(y.dtype(), DType::BF16);
    let grads = y.to_dtype(DType::F32)?.sum_all()?.backward()?;
    for (name, var) in parameters.iter().filter(|(n, _)| n.contains("head")) {
        assert!(grads.get(var).is_some(), "{name}");
    }
    Ok(())
}
