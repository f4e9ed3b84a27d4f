//! The gradients by candle's autograd and by finite differences, and what learning does.

use candle_core::{DType, Device, Tensor, Var};

use super::*;
use crate::rng::rng;
use crate::{Error, Result};

const CPU: Device = Device::Cpu;
const LORA: Adapt = Adapt::Lora {
    r: 2,
    lora_alpha: 3.0,
};
const BESIDE: Adapt = Adapt::Beside {
    r: 2,
    lora_alpha: 3.0,
};

fn small(adapt: Adapt) -> MetaConfig {
    MetaConfig {
        layer_sizes: vec![1, 6, 5, 1],
        adapt,
        inner_rate: 0.05,
        ..Default::default()
    }
}

fn tasks(dtype: DType) -> Tasks {
    let tasks = Sinusoids::new(5, &CPU).tasks(3, 4, 5).unwrap();
    tasks.to_dtype(dtype).unwrap()
}

/// A start with numbers everywhere, in B too.
fn weights(config: &MetaConfig, dtype: DType) -> Parameters {
    let mut random = rng(7);
    let mut all = config.random_weights(&mut random, &CPU).unwrap();
    for (name, tensor) in &mut all {
        if name.contains("lora_B") {
            *tensor = random.uniform(-0.5, 0.5, tensor.shape(), &CPU).unwrap();
        }
        *tensor = tensor.to_dtype(dtype).unwrap();
    }
    all
}

fn values(tensor: &Tensor) -> Vec<f64> {
    let tensor = tensor.to_dtype(DType::F64).unwrap();
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// The largest difference, relative to the largest expected number.
fn gap(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let largest = |of: &mut dyn Iterator<Item = f64>| of.fold(0.0, f64::max);
    let off = largest(&mut got.iter().zip(want).map(|(got, want)| (got - want).abs()));
    off / largest(&mut want.iter().map(|want| want.abs()))
}

/// Whether a parameter of any task differs from the start, which all share.
fn differs(tensor: &Tensor, start: &Tensor) -> bool {
    let start = values(start);
    values(tensor).chunks(start.len()).any(|task| task != start)
}

/// The network of one task, of candle's own operations.
fn by_hand(adapt: Adapt, w: &Parameters, x: &Tensor) -> candle_core::Result<Tensor> {
    let scaling = 1.5;
    let mut h = x.clone();
    for i in 0..3 {
        if i > 0 {
            h = h.relu()?;
        }
        let of = |part: &str| &w[&format!("network.layers.{i}.{part}")];
        let mut weight = of("weight").clone();
        if adapt == LORA {
            let product = of("lora_B.weight").matmul(of("lora_A.weight"))?;
            weight = (weight + (product * scaling)?)?;
        }
        h = h.matmul(&weight.t()?)?.broadcast_add(of("bias"))?;
    }
    if adapt == BESIDE {
        let product = w["beside.lora_B.weight"].matmul(&w["beside.lora_A.weight"])?;
        h = (h + x.matmul(&(product * scaling)?.t()?)?)?;
    }
    Ok(h)
}

/// One task's parameters: as they are where all share them.
fn of_task(parameters: &Parameters, task: usize) -> Parameters {
    let one = |(name, tensor): (&String, &Tensor)| {
        let shared = tensor.rank() < 3;
        let mut tensor = if shared {
            tensor.clone()
        } else {
            tensor.get(task).unwrap()
        };
        if name.ends_with("bias") && !shared {
            tensor = tensor.squeeze(0).unwrap();
        }
        (name.clone(), tensor)
    };
    parameters.iter().map(one).collect()
}

#[test]
fn forward_and_inner_gradient_are_candles_own() -> Result<()> {
    let tasks = tasks(DType::F32);
    for adapt in [Adapt::Full, LORA, BESIDE] {
        let config = small(adapt);
        let network = MetaNetwork::new(&config)?;
        // At the shared start, and at parameters that differ from task to task.
        let start = weights(&config, DType::F32);
        let learner = MetaLearner::new(&config, &start)?;
        let apart = learner.adapt(&tasks.support_x, &tasks.support_y, 2)?;
        for parameters in [start, apart] {
            let (x, y) = (&tasks.query_x, &tasks.query_y);
            let got = network.gradients(&parameters, x, y)?;
            let forward = network.forward(&parameters, x)?;
            let errors = values(&network.errors(&parameters, x, y)?);
            for (task, error) in errors.into_iter().enumerate() {
                let own = of_task(&parameters, task).into_iter();
                let vars: std::collections::BTreeMap<String, Var> = own
                    .map(|(name, t)| (name, Var::from_tensor(&t).unwrap()))
                    .collect();
                let own = vars
                    .iter()
                    .map(|(n, v)| (n.clone(), v.as_tensor().clone()))
                    .collect();
                let prediction = by_hand(adapt, &own, &x.get(task)?)?;
                assert!(gap(&values(&forward.get(task)?), &values(&prediction)) < 1e-6);
                let loss = (prediction - y.get(task)?)?.sqr()?.mean_all()?;
                assert!(gap(&[error], &values(&loss)) < 1e-6);
                let want = loss.backward()?;
                assert_eq!(
                    got.keys()
                        .cloned()
                        .collect::<std::collections::BTreeSet<_>>(),
                    config.adapted_names().into_iter().collect()
                );
                for (name, gradient) in &got {
                    let want = values(want.get(&vars[name]).unwrap());
                    let off = gap(&values(&gradient.get(task)?), &want);
                    assert!(off < 1e-5, "{adapt:?} {name}: {off}");
                }
            }
        }
    }
    Ok(())
}

/// The gradient of the outer loss by central differences, variable by variable.
fn differences(learner: &MetaLearner, tasks: &Tasks) -> Vec<Vec<f64>> {
    const H: f64 = 1e-6;
    let loss = || values(&learner.meta_loss(tasks).unwrap())[0];
    let mut all = Vec::new();
    for (_, var) in learner.variables() {
        let (start, shape) = (values(var), var.shape().clone());
        let moved = |i: usize, by: f64| {
            let mut to = start.clone();
            to[i] += by;
            var.set(&Tensor::from_vec(to, shape.clone(), &CPU).unwrap())
                .unwrap();
            loss()
        };
        let slopes = (0..start.len()).map(|i| (moved(i, H) - moved(i, -H)) / (2.0 * H));
        all.push(slopes.collect());
        moved(0, 0.0);
    }
    all
}

/// How far the backward pass of the outer loss is from central differences: the worst variable.
fn off(config: &MetaConfig) -> f64 {
    let learner = MetaLearner::new(config, &weights(config, DType::F64)).unwrap();
    let tasks = tasks(DType::F64);
    let gradients = learner.meta_loss(&tasks).unwrap().backward().unwrap();
    let want = differences(&learner, &tasks).into_iter();
    let each = learner.variables().iter().zip(want);
    each.map(|((_, var), want)| gap(&values(gradients.get(var).unwrap()), &want))
        .fold(0.0, f64::max)
}

#[test]
fn the_outer_gradient_is_that_of_finite_differences() {
    for adapt in [Adapt::Full, LORA, BESIDE] {
        for inner_steps in 1..=3 {
            for learn_inner_rates in [false, true] {
                let exact = MetaConfig {
                    inner_steps,
                    learn_inner_rates,
                    ..small(adapt)
                };
                let error = off(&exact);
                assert!(error < 1e-6, "{exact:?}: {error}");
                let method = MetaMethod::FirstOrder;
                let first_order = MetaConfig { method, ..exact };
                let error = off(&first_order);
                assert!(error > 0.01, "{first_order:?}: {error}");
            }
        }
    }
}

#[test]
fn pretraining_goes_down_the_support_loss_of_all_tasks() -> Result<()> {
    let config = MetaConfig {
        method: MetaMethod::Pretrain,
        ..small(Adapt::Full)
    };
    let error = off(&config);
    assert!(error < 1e-6, "{error}");
    let (start, tasks) = (weights(&config, DType::F64), tasks(DType::F64));
    let learner = MetaLearner::new(&config, &start)?;
    let (x, y) = (&tasks.support_x, &tasks.support_y);
    let want = learner.network().errors(&start, x, y)?.mean_all()?;
    let got = learner.meta_loss(&tasks)?;
    assert!(gap(&values(&got), &values(&want)) < 1e-12);
    Ok(())
}

/// Without the second derivatives the gradient is that at the adapted parameters.
#[test]
fn the_first_order_gradient_is_that_of_the_adapted_parameters() -> Result<()> {
    let config = MetaConfig {
        method: MetaMethod::FirstOrder,
        inner_steps: 2,
        ..small(Adapt::Full)
    };
    let learner = MetaLearner::new(&config, &weights(&config, DType::F64))?;
    let tasks = tasks(DType::F64);
    let got = learner.meta_loss(&tasks)?.backward()?;
    let adapted = learner.adapt(&tasks.support_x, &tasks.support_y, 2)?;
    let at = learner
        .network()
        .gradients(&adapted, &tasks.query_x, &tasks.query_y)?;
    for (name, var) in learner.variables() {
        let want = at[name].mean(0)?;
        assert!(
            gap(&values(got.get(var).unwrap()), &values(&want)) < 1e-12,
            "{name}"
        );
    }
    Ok(())
}

#[test]
fn pairs_start_as_nothing_and_the_first_step_moves_only_b() -> Result<()> {
    let tasks = tasks(DType::F32);
    let full = small(Adapt::Full);
    let base = full.random_weights(&mut rng(3), &CPU)?;
    let want = MetaNetwork::new(&full)?.forward(&base, &tasks.query_x)?;
    for adapt in [LORA, BESIDE] {
        let config = small(adapt);
        let start = config.random_weights(&mut rng(3), &CPU)?;
        assert!(
            base.iter()
                .all(|(name, t)| values(t) == values(&start[name]))
        );
        let learner = MetaLearner::new(&config, &start)?;
        let got = learner.predict(&start, &tasks.query_x)?;
        assert_eq!(values(&got), values(&want));

        let moved = |steps| -> Result<Vec<String>> {
            let adapted = learner.adapt(&tasks.support_x, &tasks.support_y, steps)?;
            let other = |(name, tensor): &(&String, &Tensor)| differs(tensor, &start[*name]);
            Ok(adapted
                .iter()
                .filter(other)
                .map(|(name, _)| name.clone())
                .collect())
        };
        let mut names = config.adapted_names();
        names.sort();
        assert_eq!(moved(2)?, names);
        names.retain(|name| name.contains("lora_B"));
        assert_eq!(moved(1)?, names);
    }
    Ok(())
}

#[test]
fn a_task_alone_is_adapted_as_among_others() -> Result<()> {
    let tasks = tasks(DType::F64);
    for adapt in [Adapt::Full, LORA, BESIDE] {
        let config = small(adapt);
        let learner = MetaLearner::new(&config, &weights(&config, DType::F64))?;
        let all = learner.adapt(&tasks.support_x, &tasks.support_y, 2)?;
        for task in 0..3 {
            let one = |tensor: &Tensor| tensor.narrow(0, task, 1);
            let alone = learner.adapt(&one(&tasks.support_x)?, &one(&tasks.support_y)?, 2)?;
            let (alone, all) = (of_task(&alone, 0), of_task(&all, task));
            for (name, tensor) in alone {
                assert_eq!(tensor.dims(), all[&name].dims(), "{name}");
                assert!(
                    gap(&values(&tensor), &values(&all[&name])) < 1e-12,
                    "{name}"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn evaluating_is_adapting_and_measuring() -> Result<()> {
    let tasks = tasks(DType::F32);
    for learn_inner_rates in [false, true] {
        let config = MetaConfig {
            learn_inner_rates,
            ..small(LORA)
        };
        let mut start = weights(&config, DType::F32);
        if learn_inner_rates {
            // B of the last layer alone is to move.
            for (name, tensor) in &mut start {
                if name.starts_with("inner_rate") && !name.contains("layers.2.lora_B") {
                    *tensor = tensor.zeros_like()?;
                }
            }
        }
        let learner = MetaLearner::new(&config, &start)?;
        let errors = learner.evaluate(&tasks, 3)?;
        assert_eq!((errors.len(), errors[0].len()), (4, 3));
        for (steps, errors) in errors.iter().enumerate() {
            let adapted = learner.adapt(&tasks.support_x, &tasks.support_y, steps)?;
            let prediction = learner.predict(&adapted, &tasks.query_x)?;
            let want = (prediction - &tasks.query_y)?.sqr()?.mean((1, 2))?;
            assert!(gap(errors, &values(&want)) < 1e-6);
            let still = |name| !differs(&adapted[name], &start[name]);
            if steps > 0 {
                assert_eq!(still("network.layers.0.lora_B.weight"), learn_inner_rates);
                assert!(!still("network.layers.2.lora_B.weight"));
            }
        }
    }
    Ok(())
}

/// A short training and the error of new tasks before it and after it, both after `steps` steps.
fn trained(config: &MetaConfig, iterations: usize, steps: usize) -> Result<(f64, f64)> {
    let mut learner = MetaLearner::new(config, &config.random_weights(&mut rng(1), &CPU)?)?;
    let held_out = Sinusoids::new(1000, &CPU).tasks(100, 10, 50)?;
    let error = |learner: &MetaLearner| -> Result<f64> {
        let errors = learner.evaluate(&held_out, steps)?;
        Ok(errors[steps].iter().sum::<f64>() / 100.0)
    };
    let before = error(&learner)?;
    let mut sinusoids = Sinusoids::new(2, &CPU);
    for _ in 0..iterations {
        learner.meta_step(&sinusoids.tasks(10, 10, 10)?)?;
    }
    Ok((before, error(&learner)?))
}

#[test]
fn every_method_makes_a_better_start() -> Result<()> {
    let lora = Adapt::Lora {
        r: 4,
        lora_alpha: 8.0,
    };
    let of = |method, adapt| MetaConfig {
        method,
        adapt,
        layer_sizes: vec![1, 20, 20, 1],
        outer_rate: 0.005,
        ..Default::default()
    };
    let reptile = MetaConfig {
        inner_steps: 6,
        outer_rate: 0.3,
        ..of(MetaMethod::Reptile, Adapt::Full)
    };
    for (config, least) in [
        (of(MetaMethod::Maml, Adapt::Full), 0.5),
        (of(MetaMethod::FirstOrder, Adapt::Full), 0.6),
        (of(MetaMethod::Maml, lora), 0.6),
        (reptile, 0.8),
        (of(MetaMethod::Pretrain, Adapt::Full), 0.9),
    ] {
        let (before, after) = trained(&config, 400, 1)?;
        assert!(after < least * before, "{config:?}: {before} and {after}");
    }
    Ok(())
}

#[test]
fn two_runs_are_the_same() -> Result<()> {
    let run = || trained(&small(LORA), 5, 2);
    assert_eq!(run()?, run()?);
    Ok(())
}

#[test]
fn a_schedule_reaches_the_outer_rate() -> Result<()> {
    let reptile = MetaConfig {
        method: MetaMethod::Reptile,
        inner_steps: 2,
        ..small(Adapt::Full)
    };
    for config in [small(Adapt::Full), reptile] {
        let start = weights(&config, DType::F32);
        let mut learner = MetaLearner::new(&config, &start)?;
        let still = |learner: &MetaLearner| {
            let now = learner.start();
            start
                .iter()
                .all(|(name, t)| values(t) == values(&now[name]))
        };
        learner.set_outer_rate_factor(0.0)?;
        learner.meta_step(&tasks(DType::F32))?;
        assert!(still(&learner), "{config:?}");
        learner.set_outer_rate_factor(0.5)?;
        learner.meta_step(&tasks(DType::F32))?;
        assert!(!still(&learner), "{config:?}");
        assert!(learner.set_outer_rate_factor(-1.0).is_err());
    }
    Ok(())
}

/// φ + ε (mean φ′ − φ) with steps on support and query in turn.
#[test]
fn reptile_goes_part_of_the_way() -> Result<()> {
    let config = MetaConfig {
        method: MetaMethod::Reptile,
        inner_steps: 2,
        outer_rate: 0.25,
        ..small(Adapt::Full)
    };
    let start = weights(&config, DType::F64);
    let mut learner = MetaLearner::new(&config, &start)?;
    let tasks = tasks(DType::F64);
    let network = MetaNetwork::new(&config)?;
    let rates = InnerRates::Same(config.inner_rate);
    let first = network.gradients(&start, &tasks.support_x, &tasks.support_y)?;
    let first = inner_step(&start, &first, &rates)?;
    let second = network.gradients(&first, &tasks.query_x, &tasks.query_y)?;
    let second = inner_step(&first, &second, &rates)?;
    let error = learner.meta_step(&tasks)?;
    let want = network.errors(&second, &tasks.query_x, &tasks.query_y)?;
    assert!(gap(&[error], &values(&want.mean_all()?)) < 1e-12);
    for (name, now) in learner.start() {
        let mean = second[&name].mean(0)?.flatten_all()?;
        let start = start[&name].flatten_all()?;
        let want = ((&start * 0.75)? + (mean * 0.25)?)?;
        assert!(gap(&values(&now), &values(&want)) < 1e-12, "{name}");
    }
    Ok(())
}

/// A start that could be lost in one step is kept.
#[test]
fn an_inner_loop_that_diverges_is_an_error_and_leaves_the_start() -> Result<()> {
    for (method, says) in [
        (MetaMethod::Maml, "gradient"),
        (MetaMethod::FirstOrder, "gradient"),
        (MetaMethod::Reptile, "Lower inner_rate"),
    ] {
        let config = MetaConfig {
            method,
            inner_steps: 6,
            inner_rate: 1e30,
            ..small(Adapt::Full)
        };
        let start = weights(&config, DType::F32);
        let mut learner = MetaLearner::new(&config, &start)?;
        let error = problem(learner.meta_step(&tasks(DType::F32)));
        assert!(error.contains(says), "{method:?}: {error}");
        for (name, now) in learner.start() {
            assert_eq!(values(&now), values(&start[&name]), "{method:?}, {name}");
        }
    }
    Ok(())
}

fn problem<T>(result: Result<T>) -> String {
    match result {
        Ok(_) => String::from("no error"),
        Err(error @ Error::Model { .. }) => error.to_string(),
        Err(other) => format!("another error: {other}"),
    }
}

#[test]
fn settings_that_exclude_each_other_are_refused_by_name() {
    type Change = fn(&mut MetaConfig);
    let cases: [(&str, Change); 12] = [
        ("layer_sizes", |c| c.layer_sizes = vec![1]),
        ("layer_sizes", |c| c.layer_sizes = vec![1, 0, 1]),
        ("r must", |c| {
            c.adapt = Adapt::Lora {
                r: 0,
                lora_alpha: 1.0,
            }
        }),
        ("r must", |c| {
            c.adapt = Adapt::Beside {
                r: 1,
                lora_alpha: f64::NAN,
            }
        }),
        ("inner_rate", |c| c.inner_rate = -0.1),
        ("outer_rate", |c| c.outer_rate = f64::INFINITY),
        ("inner_steps", |c| c.inner_steps = 0),
        ("learn_inner_rates", |c| {
            (c.learn_inner_rates, c.method) = (true, MetaMethod::Pretrain);
        }),
        ("learn_inner_rates", |c| {
            (c.learn_inner_rates, c.method) = (true, MetaMethod::Reptile);
        }),
        ("Reptile", |c| {
            (c.method, c.adapt) = (MetaMethod::Reptile, LORA)
        }),
        ("no error", |c| {
            (c.method, c.inner_steps) = (MetaMethod::Pretrain, 0)
        }),
        ("no error", |_| ()),
    ];
    for (word, change) in cases {
        let mut config = MetaConfig::default();
        change(&mut config);
        let text = problem(MetaNetwork::new(&config));
        assert!(text.contains(word), "{config:?}: {text}");
        let text = problem(config.random_weights(&mut rng(1), &CPU));
        assert!(text.contains(word), "{config:?}: {text}");
    }
}

#[test]
fn shapes_that_do_not_fit_are_refused_by_name() -> Result<()> {
    let config = small(Adapt::Full);
    let start = weights(&config, DType::F32);
    let learner = MetaLearner::new(&config, &start)?;
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &CPU).unwrap();
    for shape in [&[4, 1][..], &[3, 4, 2], &[3, 4, 1, 1]] {
        let text = problem(learner.predict(&start, &zeros(shape)));
        assert!(text.contains("[tasks, points, 1]"), "{text}");
    }
    for shape in [&[3, 4][..], &[3, 1, 1], &[1, 4, 1]] {
        let text = problem(learner.adapt(&zeros(&[3, 4, 1]), &zeros(shape), 1));
        assert!(
            text.contains("for predictions of shape [3, 4, 1]"),
            "{text}"
        );
    }

    let name = "network.layers.1.bias";
    let with = |tensor: Option<Tensor>| {
        let mut start = start.clone();
        match tensor {
            Some(tensor) => start.insert(name.into(), tensor),
            None => start.remove(name),
        };
        start
    };
    let text = problem(MetaLearner::new(&config, &with(None)));
    assert!(text.contains(name) && text.contains("missing"), "{text}");
    let text = problem(MetaLearner::new(&config, &with(Some(zeros(&[6])))));
    assert!(text.contains(name) && text.contains("[6]"), "{text}");
    let text = problem(learner.predict(&with(None), &zeros(&[3, 4, 1])));
    assert!(text.contains(name), "{text}");
    let text = problem(MetaLearner::new(
        &config,
        &weights(&small(LORA), DType::F32),
    ));
    assert!(text.contains("lora_A"), "{text}");

    let stray = Parameters::from([("w".to_string(), zeros(&[1]))]);
    let text = problem(inner_step(&start, &stray, &InnerRates::Same(0.1)));
    assert!(text.contains("w has a gradient and no value"), "{text}");
    let none = InnerRates::Each(Parameters::new());
    let text = problem(inner_step(&stray, &stray, &none));
    assert!(text.contains("w has a gradient and no step size"), "{text}");
    Ok(())
}

#[test]
fn another_inner_rate() -> Result<()> {
    let config = small(Adapt::Full);
    let mut learner = MetaLearner::new(&config, &weights(&config, DType::F64))?;
    let tasks = tasks(DType::F64);
    learner.set_inner_rate(0.0)?;
    let errors = learner.evaluate(&tasks, 1)?;
    assert_eq!(errors[0], errors[1]);
    learner.set_inner_rate(0.01)?;
    let errors = learner.evaluate(&tasks, 1)?;
    assert_ne!(errors[0], errors[1]);
    assert!(problem(learner.set_inner_rate(f64::NAN)).contains("inner_rate"));
    let learned = MetaConfig {
        learn_inner_rates: true,
        ..config
    };
    let mut learner = MetaLearner::new(&learned, &weights(&learned, DType::F64))?;
    assert!(problem(learner.set_inner_rate(0.1)).contains("learned"));
    Ok(())
}

#[test]
fn counts_are_those_of_the_weights() -> Result<()> {
    for (adapt, learn_inner_rates) in [
        (Adapt::Full, false),
        (Adapt::Full, true),
        (LORA, false),
        (LORA, true),
        (BESIDE, false),
    ] {
        let config = MetaConfig {
            learn_inner_rates,
            ..small(adapt)
        };
        let weights = config.random_weights(&mut rng(1), &CPU)?;
        let count = |names: &mut dyn Iterator<Item = &String>| -> usize {
            names.map(|name| weights[name].elem_count()).sum()
        };
        assert_eq!(config.parameters(), count(&mut weights.keys()));
        assert_eq!(config.adapted(), count(&mut config.adapted_names().iter()));
    }
    Ok(())
}

#[test]
fn settings_survive_a_file() {
    for adapt in [Adapt::Full, LORA, BESIDE] {
        let config = small(adapt);
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<MetaConfig>(&text).unwrap(), config);
    }
}
