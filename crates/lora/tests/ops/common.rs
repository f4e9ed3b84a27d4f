//! Inputs, and what every operation must hold.

use candle_core::{DType, Device, Tensor, Var};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

pub const CPU: Device = Device::Cpu;

/// Lengths of a row around the widths of vectors, and rows.
pub const SIZES: [(usize, usize); 9] = [
    (1, 1),
    (3, 1),
    (2, 3),
    (3, 7),
    (5, 8),
    (1, 9),
    (4, 33),
    (3, 1000),
    // Beyond what one thread takes.
    (67, 515),
];

/// Numbers from -`size` to `size`.
pub fn random(shape: &[usize], size: f64, seed: u64) -> Tensor {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let n: usize = shape.iter().product();
    let numbers: Vec<f64> = (0..n).map(|_| rng.random_range(-size..size)).collect();
    Tensor::from_vec(numbers, shape, &CPU).unwrap()
}

pub fn values(t: &Tensor) -> Vec<f64> {
    let t = t.flatten_all().unwrap().to_dtype(DType::F64).unwrap();
    t.to_vec1().unwrap()
}

/// The largest difference relative to the largest number wanted.
pub fn gap(got: &Tensor, want: &Tensor) -> f64 {
    assert_eq!(got.dims(), want.dims(), "shapes");
    let (got, want) = (values(got), values(want));
    assert!(got.iter().all(|v| v.is_finite()), "not finite: {got:?}");
    let largest = want.iter().fold(0f64, |m, v| m.max(v.abs()));
    let pairs = got.iter().zip(&want);
    let off = pairs.fold(0f64, |m, (g, w)| m.max((g - w).abs()));
    if off == 0.0 { 0.0 } else { off / largest }
}

pub type Ours<'a> = &'a dyn Fn(&[Tensor]) -> lora::Result<Tensor>;
pub type Plain<'a> = &'a dyn Fn(&[Tensor]) -> candle_core::Result<Tensor>;

/// The value of `f`, and the gradients of Σ g f for those inputs that are tracked.
pub fn run(f: Ours<'_>, inputs: &[Tensor], tracked: &[bool]) -> (Tensor, Vec<Option<Tensor>>) {
    let given: Vec<Tensor> = inputs
        .iter()
        .zip(tracked)
        .map(|(x, tracked)| match tracked {
            true => Var::from_tensor(x).unwrap().as_tensor().clone(),
            false => x.clone(),
        })
        .collect();
    let y = f(&given).unwrap();
    let g = random(y.dims(), 1.0, 77).to_dtype(y.dtype()).unwrap();
    let gradients = (&y * &g).unwrap().sum_all().unwrap().backward().unwrap();
    let gradients = given.iter().map(|x| gradients.get(x).cloned()).collect();
    (y, gradients)
}

/// Values and gradients in every type, against the composition in f64 of the same numbers.
pub fn check(name: &str, inputs: &[Tensor], ours: Ours<'_>, plain: Plain<'_>) {
    check_one_pass(name, inputs, ours, plain);
    let half = [(DType::F16, 6e-4, 1e-3), (DType::BF16, 5e-3, 8e-3)];
    check_types(name, &half, inputs, ours, plain);
}

/// [`check`] in the types that have one pass.
pub fn check_one_pass(name: &str, inputs: &[Tensor], ours: Ours<'_>, plain: Plain<'_>) {
    let types = [(DType::F32, 1e-6, 3e-6), (DType::F64, 1e-12, 1e-12)];
    check_types(name, &types, inputs, ours, plain);
}

/// Types, with how far the value and the gradients may be off.
fn check_types(
    name: &str,
    types: &[(DType, f64, f64)],
    inputs: &[Tensor],
    ours: Ours<'_>,
    plain: Plain<'_>,
) {
    for &(dtype, forward, backward) in types {
        let rounded: Vec<Tensor> = inputs.iter().map(|x| x.to_dtype(dtype).unwrap()).collect();
        let exact = rounded.iter().map(|x| x.to_dtype(DType::F64).unwrap());
        let exact: Vec<Tensor> = exact.collect();
        let all = vec![true; inputs.len()];
        let (y, gradients) = run(ours, &rounded, &all);
        assert_eq!(y.dtype(), dtype, "{name}: the type of the output");
        // The same weights of the outputs, rounded as they were there.
        let weights = random(y.dims(), 1.0, 77).to_dtype(dtype).unwrap();
        let weights = weights.to_dtype(DType::F64).unwrap();
        let vars: Vec<Var> = exact.iter().map(|x| Var::from_tensor(x).unwrap()).collect();
        let given: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
        let want = plain(&given).unwrap();
        let wanted = (&want * weights).unwrap().sum_all().unwrap();
        let wanted = wanted.backward().unwrap();
        let off = gap(&y, &want);
        assert!(
            off <= forward,
            "{name} {dtype:?}: the value is off by {off:e}"
        );
        for (i, (gradient, x)) in gradients.iter().zip(&given).enumerate() {
            let gradient = gradient.as_ref().unwrap();
            assert_eq!(gradient.dtype(), dtype, "{name}: the type of gradient {i}");
            let off = gap(gradient, wanted.get(x).unwrap());
            assert!(
                off <= backward,
                "{name} {dtype:?}: gradient {i} is off by {off:e}"
            );
        }
    }
}

/// Every gradient against central differences in f64.
pub fn differences(name: &str, inputs: &[Tensor], ours: Ours<'_>) {
    const STEP: f64 = 1e-5;
    let (y, gradients) = run(ours, inputs, &vec![true; inputs.len()]);
    let g = values(&random(y.dims(), 1.0, 77));
    let loss = |inputs: &[Tensor]| -> f64 {
        let y = values(&ours(inputs).unwrap());
        y.iter().zip(&g).map(|(y, g)| y * g).sum()
    };
    for (i, x) in inputs.iter().enumerate() {
        let numbers = values(x);
        let mut slopes = Vec::new();
        for at in 0..numbers.len() {
            let moved = |by: f64| {
                let mut numbers = numbers.clone();
                numbers[at] += by;
                let mut inputs = inputs.to_vec();
                inputs[i] = Tensor::from_vec(numbers, x.dims(), &CPU).unwrap();
                loss(&inputs)
            };
            slopes.push((moved(STEP) - moved(-STEP)) / (2.0 * STEP));
        }
        let want = Tensor::from_vec(slopes, x.dims(), &CPU).unwrap();
        let off = gap(gradients[i].as_ref().unwrap(), &want);
        assert!(
            off <= 2e-8,
            "{name}: gradient {i} is {off:e} from the differences"
        );
    }
}

/// Each input gets a gradient where it is tracked, the same whatever else is, and none elsewhere.
pub fn only_what_is_tracked(name: &str, inputs: &[Tensor], ours: Ours<'_>) {
    let types = [DType::F32, DType::F64, DType::BF16];
    only_what_is_tracked_in(&types, name, inputs, ours);
}

pub fn only_what_is_tracked_in(types: &[DType], name: &str, inputs: &[Tensor], ours: Ours<'_>) {
    for &dtype in types {
        let inputs: Vec<Tensor> = inputs.iter().map(|x| x.to_dtype(dtype).unwrap()).collect();
        let (_, all) = run(ours, &inputs, &vec![true; inputs.len()]);
        for mask in 1..1 << inputs.len() {
            let tracked: Vec<bool> = (0..inputs.len()).map(|i| mask >> i & 1 == 1).collect();
            let (_, some) = run(ours, &inputs, &tracked);
            for (i, gradient) in some.iter().enumerate() {
                assert_eq!(
                    gradient.is_some(),
                    tracked[i],
                    "{name}: {tracked:?}, gradient {i}"
                );
                if let (Some(gradient), Some(all)) = (gradient, &all[i]) {
                    assert_eq!(
                        values(gradient),
                        values(all),
                        "{name}: {tracked:?}, gradient {i}"
                    );
                }
            }
        }
    }
}

/// Views of the same numbers: transposed, and cut out of something larger.
pub fn views(x: &Tensor) -> Vec<Tensor> {
    let mut views = Vec::new();
    if x.rank() >= 2 {
        let (a, b) = (x.rank() - 2, x.rank() - 1);
        let there = x.transpose(a, b).unwrap().contiguous().unwrap();
        views.push(there.transpose(a, b).unwrap());
    }
    for dim in 0..x.rank() {
        let padded = x.pad_with_same(dim, 2, 1).unwrap();
        views.push(padded.narrow(dim, 2, x.dims()[dim]).unwrap());
    }
    views
}

/// A strided input gives the same numbers, and so does a strided gradient.
pub fn takes_views(name: &str, inputs: &[Tensor], ours: Ours<'_>) {
    takes_views_within(0.0, name, inputs, ours);
}

/// [`takes_views`] where the strides of a matrix may change the order of a sum.
pub fn takes_views_within(bound: f64, name: &str, inputs: &[Tensor], ours: Ours<'_>) {
    let inputs: Vec<Tensor> = inputs
        .iter()
        .map(|x| x.to_dtype(DType::F32).unwrap())
        .collect();
    let all = vec![true; inputs.len()];
    let (y, gradients) = run(ours, &inputs, &all);
    for i in 0..inputs.len() {
        for view in views(&inputs[i]) {
            let mut given = inputs.clone();
            given[i] = view.clone();
            let (again, _) = run(ours, &given, &vec![false; inputs.len()]);
            let off = gap(&again, &y);
            assert!(
                off <= bound,
                "{name}: input {i} as {:?} is off by {off:e}",
                view.layout()
            );
        }
        let x = Var::from_tensor(&inputs[i]).unwrap();
        for view in views(x.as_tensor()) {
            let mut given = inputs.clone();
            given[i] = view;
            let y = ours(&given).unwrap();
            let g = random(y.dims(), 1.0, 77).to_dtype(DType::F32).unwrap();
            // A gradient with strides: that of a transposed output.
            let (y, g) = match y.rank() {
                0 | 1 => (y, g),
                n => (
                    y.transpose(n - 2, n - 1).unwrap(),
                    g.transpose(n - 2, n - 1).unwrap(),
                ),
            };
            let loss = (y * g).unwrap().sum_all().unwrap();
            let got = loss.backward().unwrap();
            let off = gap(got.get(&x).unwrap(), gradients[i].as_ref().unwrap());
            assert!(
                off <= 1e-6,
                "{name}: gradient {i} through a view is off by {off:e}"
            );
        }
    }
}

/// The same bits on one thread and on several.
pub fn same_on_any_threads(name: &str, inputs: &[Tensor], ours: Ours<'_>) {
    struct Shared<'a>(Ours<'a>);
    // SAFETY: one thread runs it while the other waits.
    unsafe impl Sync for Shared<'_> {}
    let shared = Shared(ours);
    let inputs: Vec<Tensor> = inputs
        .iter()
        .map(|x| x.to_dtype(DType::F32).unwrap())
        .collect();
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        let shared = &shared;
        pool.install(|| {
            let shared: &Shared<'_> = shared;
            let (y, gradients) = run(shared.0, &inputs, &vec![true; inputs.len()]);
            let gradients = gradients.iter().map(|g| values(g.as_ref().unwrap()));
            (values(&y), gradients.collect::<Vec<_>>())
        })
    };
    let one = on(1);
    for threads in [2, 3, 7] {
        assert!(
            on(threads) == one,
            "{name}: {threads} threads give other numbers than one"
        );
    }
}

/// The message of a refusal holds all of these words.
pub fn refused(result: lora::Result<Tensor>, words: &[&str]) {
    let error = result.expect_err("should be refused");
    assert!(matches!(error, lora::Error::Operation { .. }), "{error:?}");
    let message = error.to_string();
    for word in words {
        assert!(message.contains(word), "{word:?} is missing in: {message}");
    }
}
