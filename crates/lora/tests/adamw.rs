//! A step, clipping and accumulation as one pass each: candle's numbers to the last bit, whatever the
//! layout of the gradients and the number of threads. PyTorch's numbers are in `optim.rs`.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use lora::Error;
use lora::optim::{GradientAccumulator, LoraOptimizer, ParameterGroup, Schedule, clip_grad_norm};

const CPU: Device = Device::Cpu;

fn named(name: &str, var: &Var) -> (String, Var) {
    (name.to_string(), var.clone())
}

/// A store of the given gradients and of nothing else.
fn store(gradients: &[(&Var, Tensor)]) -> GradStore {
    let mut store = GradStore::default();
    for (var, gradient) in gradients {
        store.insert(var, gradient.clone());
    }
    store
}

/// Numbers between -1 and 1 of the shape and type, other ones for each seed.
fn numbers(shape: &[usize], dtype: DType, seed: usize) -> Tensor {
    let len = shape.iter().product::<usize>();
    let numbers = (0..len).map(|i| ((i * 7919 + seed * 6271) % 10_007) as f64 / 5003.0 - 1.0);
    let numbers = Tensor::from_vec(numbers.collect::<Vec<_>>(), shape, &CPU).unwrap();
    numbers.to_dtype(dtype).unwrap()
}

/// The values as f64, which holds those of f32 too.
fn exactly(tensor: &Tensor) -> Vec<f64> {
    let tensor = tensor.to_dtype(DType::F64).unwrap();
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// Parameters of odd sizes, of a single number, of none, and so large that threads share them.
const SHAPES: [&[usize]; 10] = [
    &[],
    &[1],
    &[31],
    &[32],
    &[33],
    &[0, 4],
    &[16, 192],
    &[41, 401],
    &[100_003],
    &[2, 70_001],
];

fn parameters(dtype: DType) -> Vec<(String, Var)> {
    let var = |i: usize| Var::from_tensor(&numbers(SHAPES[i], dtype, i)).unwrap();
    (0..SHAPES.len())
        .map(|i| (format!("layers.{i}.lora_A.weight"), var(i)))
        .collect()
}

/// Gradients of step `t`: contiguous, transposed, broadcast, and from the middle of something.
fn gradients(parameters: &[(String, Var)], t: usize) -> GradStore {
    let mut store = GradStore::default();
    for (i, (_, var)) in parameters.iter().enumerate() {
        let scale = 10f64.powi((t % 5) as i32 - 3);
        let numbers = |shape: &[usize]| (numbers(shape, var.dtype(), 100 * t + i) * scale).unwrap();
        let shape = var.dims();
        let gradient = match shape {
            [rows, cols] if t.is_multiple_of(3) => numbers(&[*cols, *rows]).t().unwrap(),
            [_, cols] if t % 3 == 1 => numbers(&[1, *cols]).broadcast_as(shape).unwrap(),
            [len] if t.is_multiple_of(2) => numbers(&[len + 5]).narrow(0, 3, *len).unwrap(),
            _ => numbers(shape),
        };
        store.insert(var, gradient);
    }
    store
}

#[test]
fn two_hundred_steps_are_candles_to_the_last_bit() {
    for dtype in [DType::F32, DType::F64] {
        let [ours, theirs, start] = [(); 3].map(|()| parameters(dtype)[..9].to_vec());
        let (fast, slow) = ours.split_at(6);
        let settings = [(0.03, 0.1), (0.002, 0.0)];
        let groups = vec![
            ParameterGroup::all(fast.to_vec(), settings[0].0).with_weight_decay(settings[0].1),
            ParameterGroup::all(slow.to_vec(), settings[1].0).with_weight_decay(settings[1].1),
        ];
        let mut optimizer = LoraOptimizer::new(groups).unwrap();
        let mut references: Vec<AdamW> = [&theirs[..6], &theirs[6..]]
            .iter()
            .zip(settings)
            .map(|(group, (lr, weight_decay))| {
                // candle's refuses to step with an empty one.
                let vars = group.iter().filter(|(_, var)| var.elem_count() > 0);
                let vars = vars.map(|(_, var)| var.clone()).collect();
                let params = ParamsAdamW {
                    lr,
                    weight_decay,
                    ..ParamsAdamW::default()
                };
                AdamW::new(vars, params).unwrap()
            })
            .collect();
        let schedule = Schedule::Cosine { warmup_steps: 20 };
        for t in 0..200 {
            let factor = schedule.factor(t, 220);
            optimizer.set_learning_rate_factor(factor).unwrap();
            let gradients = gradients(&ours, t);
            optimizer.step(&gradients).unwrap();
            let mut same = GradStore::default();
            for ((_, our), (_, their)) in ours.iter().zip(&theirs) {
                same.insert(their, gradients.get(our).unwrap().clone());
            }
            for (reference, (lr, _)) in references.iter_mut().zip(settings) {
                reference.set_learning_rate(factor * lr);
                reference.step(&same).unwrap();
            }
        }
        for ((name, our), (_, their)) in ours.iter().zip(&theirs) {
            assert!(exactly(our) == exactly(their), "{name} {dtype:?}");
        }
        assert_ne!(exactly(&start[8].1), exactly(&ours[8].1));
    }
}

#[test]
fn clipping_and_steps_are_the_same_on_any_number_of_threads() {
    for dtype in [DType::F32, DType::F64] {
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            pool.install(|| {
                let parameters = parameters(dtype);
                let all = ParameterGroup::all(parameters.clone(), 0.01).with_weight_decay(0.1);
                let mut optimizer = LoraOptimizer::new(vec![all]).unwrap();
                let mut accumulator = GradientAccumulator::new(&parameters);
                let mut numbers = Vec::new();
                for t in 0..6 {
                    accumulator.add(&gradients(&parameters, t)).unwrap();
                    accumulator.add(&gradients(&parameters, t + 50)).unwrap();
                    let mut mean = accumulator.take_mean().unwrap();
                    numbers.push(clip_grad_norm(&mut mean, &parameters, 0.5).unwrap());
                    optimizer.step(&mean).unwrap();
                }
                for (_, var) in &parameters {
                    numbers.extend(exactly(var));
                }
                numbers
            })
        };
        let one = run(1);
        for threads in [2, 4] {
            assert!(run(threads) == one, "{dtype:?} on {threads} threads");
        }
    }
}

#[test]
fn gradients_may_lie_in_the_storage_of_parameters() {
    let vars = |seed: usize| -> [Var; 3] {
        [0, 1, 2].map(|i| Var::from_tensor(&numbers(&[5, 5], DType::F32, seed + i)).unwrap())
    };
    let step = |[a, b, c]: &[Var; 3], gradients: [Tensor; 3]| {
        let [of_a, of_b, of_c] = gradients;
        let parameters = vec![named("a", a), named("b", b), named("c", c)];
        let mut optimizer = LoraOptimizer::new(vec![ParameterGroup::all(parameters, 0.1)]).unwrap();
        optimizer
            .step(&store(&[(a, of_a), (b, of_b), (c, of_c)]))
            .unwrap();
        [a, b, c].map(|var| exactly(var))
    };
    let (shared, apart) = (vars(1), vars(1));
    // The parameter itself, one that has already moved, and one seen crosswise.
    let of = |[a, _, c]: &[Var; 3]| [a.as_tensor().clone(), a.detach(), c.t().unwrap()];
    let copies = of(&apart).map(|gradient| gradient.copy().unwrap());
    assert_eq!(step(&shared, of(&shared)), step(&apart, copies));
}

#[test]
fn a_number_that_is_not_finite_is_found_at_any_place() {
    let a = Var::zeros(50_001, DType::F32, &CPU).unwrap();
    let parameters = [named("a", &a)];
    let group = ParameterGroup::all(parameters.to_vec(), 0.1);
    let mut optimizer = LoraOptimizer::new(vec![group]).unwrap();
    for place in [0, 31, 8191, 8192, 32_768, 49_999, 50_000] {
        for bad in [f32::NAN, f32::INFINITY, -1.9e19] {
            let mut gradient = vec![1f32; 50_001];
            gradient[place] = bad;
            let gradient = Tensor::new(gradient, &CPU).unwrap();
            let mut gradients = store(&[(&a, gradient)]);
            for error in [
                optimizer.step(&gradients).unwrap_err(),
                clip_grad_norm(&mut gradients, &parameters, 1.0).unwrap_err(),
            ] {
                assert!(
                    matches!(&error, Error::GradientNotFinite { name, .. } if name == "a"),
                    "{bad} at {place}: {error}"
                );
            }
        }
    }
    assert!(exactly(&a).iter().all(|&a| a == 0.0));
}

#[test]
fn clipping_scales_gradients_of_any_layout_and_leaves_their_other_holders_alone() {
    for dtype in [DType::F32, DType::F64] {
        let parameters = parameters(dtype);
        for t in 0..3 {
            let before = gradients(&parameters, t);
            let mut after = GradStore::default();
            for (_, var) in &parameters {
                after.insert(var, before.get(var).unwrap().clone());
            }
            let norm = clip_grad_norm(&mut after, &parameters, 1e-3).unwrap();
            let mut square = 0.0;
            for (name, var) in &parameters {
                let gradient = before.get(var).unwrap();
                square += exactly(gradient).iter().map(|g| g * g).sum::<f64>();
                let want = (gradient * (1e-3 / (norm + 1e-6))).unwrap();
                let got = after.get(var).unwrap();
                assert_eq!(got.dims(), want.dims());
                assert!(exactly(got) == exactly(&want), "{name} {t} {dtype:?}");
            }
            let error = (norm / square.sqrt() - 1.0).abs();
            let tolerance = if dtype == DType::F32 { 1e-7 } else { 1e-13 };
            assert!(error < tolerance, "{dtype:?}: {error:e}");
        }
    }
}

#[test]
fn half_precision_is_clipped_and_accumulated_too() {
    let a = Var::zeros(2, DType::BF16, &CPU).unwrap();
    let b = Var::zeros((1, 2), DType::F32, &CPU).unwrap();
    let parameters = [named("a", &a), named("b", &b)];
    let of_a = Tensor::new(&[3f32, 0.], &CPU).unwrap();
    let of_a = of_a.to_dtype(DType::BF16).unwrap();
    let of_b = Tensor::new(&[[0f32, 4.]], &CPU).unwrap();
    let mut accumulator = GradientAccumulator::new(&parameters);
    for weight in [1.0, 3.0] {
        let gradients = store(&[(&a, of_a.clone()), (&b, of_b.clone())]);
        accumulator.add_weighted(&gradients, weight).unwrap();
    }
    let mut mean = accumulator.take_mean().unwrap();
    assert_eq!(clip_grad_norm(&mut mean, &parameters, 2.5).unwrap(), 5.0);
    assert_eq!(exactly(mean.get(&a).unwrap()), [1.5, 0.0]);
    let [zero, two] = exactly(mean.get(&b).unwrap())[..] else {
        panic!("two numbers");
    };
    assert!(zero == 0.0 && (two - 2.0).abs() < 1e-6, "{two}");
}

#[test]
fn sums_of_gradients_of_any_layout_are_candles() {
    for dtype in [DType::F32, DType::F64] {
        let parameters = parameters(dtype);
        let batches = [0, 1, 2].map(|t| gradients(&parameters, t));
        let mut accumulator = GradientAccumulator::new(&parameters);
        for (batch, weight) in batches.iter().zip([3.0, 0.7, 11.0]) {
            accumulator.add_weighted(batch, weight).unwrap();
        }
        let mean = accumulator.take_mean().unwrap();
        for (name, var) in &parameters {
            let [first, second, third] = batches.each_ref().map(|batch| batch.get(var).unwrap());
            let sum = ((first * 3.0).unwrap() + (second * 0.7).unwrap()).unwrap();
            let sum = (sum + (third * 11.0).unwrap()).unwrap();
            let want = (sum / (3.0 + 0.7 + 11.0)).unwrap();
            assert!(exactly(mean.get(var).unwrap()) == exactly(&want), "{name}");
        }
    }
}

/// A run that is cut in two goes as one in one piece, to the last bit.
#[test]
fn a_state_goes_on_where_it_was() {
    for dtype in [DType::F32, DType::F64] {
        let optimizer = |named: &[(String, Var)]| {
            let group = ParameterGroup::all(named.to_vec(), 0.01).with_weight_decay(0.1);
            LoraOptimizer::new(vec![group]).unwrap()
        };
        let step = |optimizer: &mut LoraOptimizer, named: &[(String, Var)], t: usize| {
            let gradients: Vec<(&Var, Tensor)> = named
                .iter()
                .map(|(_, var)| (var, numbers(var.dims(), dtype, t)))
                .collect();
            optimizer.step(&store(&gradients)).unwrap();
        };
        let whole = parameters(dtype);
        let mut first = optimizer(&whole);
        (1..=3).for_each(|t| step(&mut first, &whole, t));
        let state = first.state_dict().unwrap();
        assert_eq!(state.len(), 1 + 2 * whole.len());
        assert_eq!(state["step"].to_scalar::<i64>().unwrap(), 3);

        let copy = |(name, var): &(String, Var)| {
            (
                name.clone(),
                Var::from_tensor(&var.as_tensor().copy().unwrap()).unwrap(),
            )
        };
        let cut: Vec<_> = whole.iter().map(copy).collect();
        let mut second = optimizer(&cut);
        second.load_state_dict(&state).unwrap();
        for t in 4..=6 {
            step(&mut first, &whole, t);
            step(&mut second, &cut, t);
        }
        for ((name, a), (_, b)) in whole.iter().zip(&cut) {
            assert_eq!(exactly(a), exactly(b), "{name}");
        }
        // What was given out is a copy.
        assert_eq!(state["step"].to_scalar::<i64>().unwrap(), 3);
    }
}

#[test]
fn a_state_of_others_is_refused_and_changes_nothing() {
    let a = Var::from_tensor(&numbers(&[2, 3], DType::F32, 1)).unwrap();
    let group = || vec![ParameterGroup::all(vec![named("a", &a)], 0.1)];
    let mut optimizer = LoraOptimizer::new(group()).unwrap();
    let before = optimizer.state_dict().unwrap();
    let with = |name: &str, tensor: Option<Tensor>| {
        let mut state = before.clone();
        match tensor {
            Some(tensor) => state.insert(name.to_string(), tensor),
            None => state.remove(name),
        };
        state
    };
    let ones = |shape: &[usize], dtype| Some(Tensor::ones(shape, dtype, &CPU).unwrap());
    for (name, state) in [
        ("a.exp_avg:", with("a.exp_avg", None)),
        ("step:", with("step", None)),
        (
            "a.exp_avg_sq:",
            with("a.exp_avg_sq", ones(&[3, 2], DType::F32)),
        ),
        ("a.exp_avg:", with("a.exp_avg", ones(&[2, 3], DType::F64))),
        ("b.exp_avg:", with("b.exp_avg", ones(&[2, 3], DType::F32))),
        (
            "step:",
            with("step", Some(Tensor::new(-1i64, &CPU).unwrap())),
        ),
        ("step:", with("step", ones(&[2], DType::I64))),
    ] {
        let error = optimizer.load_state_dict(&state).unwrap_err();
        assert!(matches!(error, Error::OptimizerState { .. }), "{error}");
        assert!(error.to_string().contains(name), "{name} {error}");
    }
    let after = optimizer.state_dict().unwrap();
    assert_eq!(exactly(&after["a.exp_avg"]), exactly(&before["a.exp_avg"]));
    assert_eq!(after["step"].to_scalar::<i64>().unwrap(), 0);
}
