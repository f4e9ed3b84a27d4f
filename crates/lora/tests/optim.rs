//! Optimiser, schedules, clipping and accumulation, checked against PyTorch's, Transformers' and
//! PEFT's numbers. The scripts stand beside the numbers (torch 2.8.0, transformers 5.24.0, peft
//! 0.21.2).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::excessive_precision)]

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{Linear, Module, ops};
use lora::optim::{
    GradientAccumulator, LoraOptimizer, LoraPlusOptions, ParameterGroup, Schedule, clip_grad_norm,
    loraplus_groups,
};
use lora::{Error, LoraConfig, LoraLinear};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

const CPU: Device = Device::Cpu;
const A: &str = "base_model.model.proj.lora_A.weight";
const B: &str = "base_model.model.proj.lora_B.weight";

fn named(name: &str, var: &Var) -> (String, Var) {
    (name.to_string(), var.clone())
}

fn group(name: &str, parameters: Vec<(String, Var)>, lr: f64, weight_decay: f64) -> ParameterGroup {
    ParameterGroup {
        name: name.to_string(),
        parameters,
        lr,
        weight_decay,
    }
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn assert_close(got: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len());
    for (g, w) in got.iter().zip(want) {
        assert!((g - w).abs() <= tolerance, "got {got:?}, want {want:?}");
    }
}

/// A store of the given gradients and of nothing else.
fn store(gradients: &[(&Var, Tensor)]) -> GradStore {
    let mut store = GradStore::default();
    for (var, gradient) in gradients {
        store.insert(var, gradient.clone());
    }
    store
}

fn layer(seed: u64) -> LoraLinear {
    let base = Tensor::new(&[[1f32, 0., 2.], [0., 1., -1.]], &CPU).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    LoraLinear::new(
        "proj",
        Linear::new(base, None),
        &LoraConfig::new(2, 4.0),
        &mut rng,
    )
    .unwrap()
}

// ------------------------------------------------------------------------------------- AdamW

/// The pair A, B, the input and the target of the script below.
fn torch_case() -> (Var, Var, Tensor, Tensor) {
    (
        Var::new(&[[0.5f32, -1.0, 2.0]], &CPU).unwrap(),
        Var::new(&[[0.0f32], [1.5]], &CPU).unwrap(),
        Tensor::new(&[[1f32, 2., -1.], [0.5, -0.5, 3.]], &CPU).unwrap(),
        Tensor::new(&[[1f32, -2.], [0., 1.]], &CPU).unwrap(),
    )
}

fn torch_loss(a: &Var, b: &Var, x: &Tensor, y: &Tensor) -> Result<Tensor> {
    let down = x.matmul(&a.t()?)?;
    (down.matmul(&b.t()?)? - y)?.sqr()?.mean_all()
}

// ```python
// import torch
// a = torch.tensor([[0.5, -1.0, 2.0]], requires_grad=True)    # lora_A (1, 3)
// b = torch.tensor([[0.0], [1.5]], requires_grad=True)        # lora_B (2, 1)
// x = torch.tensor([[1.0, 2.0, -1.0], [0.5, -0.5, 3.0]])
// y = torch.tensor([[1.0, -2.0], [0.0, 1.0]])
// optimizer = torch.optim.AdamW(
//     [{"params": [a], "lr": 0.01, "weight_decay": 0.1},
//      {"params": [b], "lr": 0.16, "weight_decay": 0.0}],
//     betas=(0.9, 0.999), eps=1e-8)
// for step in range(3):
//     optimizer.zero_grad()
//     (((x @ a.T) @ b.T - y) ** 2).mean().backward()
//     optimizer.step()
//     print([round(v, 7) for v in a.flatten().tolist() + b.flatten().tolist()])
// ```
const TORCH_STEPS: [[f32; 5]; 3] = [
    [0.4895, -0.989, 1.988, -0.16, 1.34],
    [0.4790142, -0.9781874, 1.9761454, -0.1152493, 1.181078],
    [0.4686027, -0.9677139, 1.9645663, -0.0413581, 1.0241867],
];

#[test]
fn three_steps_with_two_groups_are_torchs() {
    let (a, b, x, y) = torch_case();
    let groups = vec![
        group("A", vec![named(A, &a)], 0.01, 0.1),
        group("B", vec![named(B, &b)], 0.16, 0.0),
    ];
    let mut optimizer = LoraOptimizer::new(groups).unwrap();
    for want in TORCH_STEPS {
        let loss = torch_loss(&a, &b, &x, &y).unwrap();
        optimizer.backward_step(&loss).unwrap();
        let got = [values(&a), values(&b)].concat();
        assert_close(&got, &want, 2e-6);
    }
}

#[test]
fn the_factor_multiplies_every_groups_base_rate() {
    let (a, b, x, y) = torch_case();
    // Twice the rates of the script, halved by the factor.
    let groups = vec![
        group("A", vec![named(A, &a)], 0.02, 0.1),
        group("B", vec![named(B, &b)], 0.32, 0.0),
    ];
    let mut optimizer = LoraOptimizer::new(groups).unwrap();
    optimizer.set_learning_rate_factor(7.0).unwrap();
    for want in TORCH_STEPS {
        optimizer.set_learning_rate_factor(0.5).unwrap();
        assert_eq!(optimizer.learning_rates(), [("A", 0.01), ("B", 0.16)]);
        let loss = torch_loss(&a, &b, &x, &y).unwrap();
        optimizer.backward_step(&loss).unwrap();
        assert_close(&[values(&a), values(&b)].concat(), &want, 2e-6);
    }
    assert_eq!(optimizer.groups()[1].lr, 0.32);

    for factor in [-0.1, f64::NAN, f64::INFINITY] {
        let error = optimizer.set_learning_rate_factor(factor).unwrap_err();
        assert!(error.to_string().contains("factor"), "{error}");
    }
    assert_eq!(optimizer.learning_rates(), [("A", 0.01), ("B", 0.16)]);
}

#[test]
fn a_fresh_layer_learns_from_b_equal_zero() {
    let layer = layer(3);
    let x = Tensor::new(&[[1f32, 0., 0.], [0., 1., 0.], [0., 0., 1.]], &CPU).unwrap();
    let y = Tensor::new(&[[2f32, 1.], [1., 3.], [0., 0.]], &CPU).unwrap();
    let loss = || candle_nn::loss::mse(&layer.forward(&x).unwrap(), &y).unwrap();
    let group = ParameterGroup::all(layer.trainable_parameters(), 0.05);
    let mut optimizer = LoraOptimizer::new(vec![group]).unwrap();
    let before = loss().to_scalar::<f32>().unwrap();
    for _ in 0..300 {
        optimizer.backward_step(&loss()).unwrap();
    }
    let after = loss().to_scalar::<f32>().unwrap();
    assert!(after < 1e-3 * before, "{before} -> {after}");
}

#[test]
fn what_new_refuses() {
    let float = || Var::zeros((2, 3), DType::F32, &CPU).unwrap();
    let refused = |groups: Vec<ParameterGroup>| LoraOptimizer::new(groups).unwrap_err();

    assert!(matches!(refused(vec![]), Error::NoParameters));
    let empty = ParameterGroup::all(vec![], 1e-3);
    assert!(matches!(refused(vec![empty.clone()]), Error::NoParameters));
    // Beside another one an empty group is fine.
    let one = ParameterGroup::all(vec![named(A, &float())], 1e-3);
    assert!(LoraOptimizer::new(vec![empty, one]).is_ok());

    // The same variable twice: in one group and across two.
    let shared = float();
    let first = ParameterGroup::all(vec![named(A, &shared)], 1e-3);
    let second = ParameterGroup::all(vec![named(B, &shared)], 1e-3);
    let both = ParameterGroup::all(vec![named(A, &shared), named(B, &shared)], 1e-3);
    for groups in [vec![first, second], vec![both]] {
        let message = refused(groups).to_string();
        assert!(message.contains(A) && message.contains(B), "{message}");
    }

    // One name twice, across two groups.
    let groups = [float(), float()].map(|v| ParameterGroup::all(vec![named(A, &v)], 1e-3));
    let error = refused(groups.to_vec());
    assert!(matches!(&error, Error::ParameterName { name } if name == A));

    for dtype in [DType::F16, DType::BF16, DType::U32, DType::I64, DType::U8] {
        let var = Var::zeros((2, 3), dtype, &CPU).unwrap();
        let message = refused(vec![ParameterGroup::all(vec![named(B, &var)], 1e-3)]).to_string();
        assert!(
            message.contains(B) && message.contains("keep adapters in f32"),
            "{message}"
        );
    }
    let double = Var::zeros((2, 3), DType::F64, &CPU).unwrap();
    assert!(LoraOptimizer::new(vec![ParameterGroup::all(vec![named(B, &double)], 1e-3)]).is_ok());

    for (lr, decay, word) in [
        (-1e-3, 0.0, "lr = -0.001"),
        (f64::NAN, 0.0, "lr = NaN"),
        (f64::INFINITY, 0.0, "lr = inf"),
        (1e-3, -0.1, "weight_decay = -0.1"),
        (1e-3, f64::NAN, "weight_decay = NaN"),
    ] {
        let message = refused(vec![group("slow", vec![named(A, &float())], lr, decay)]).to_string();
        assert!(
            message.contains("slow") && message.contains(word),
            "{message}"
        );
    }
}

// ------------------------------------------------------------------------- gradients of a step

/// An optimiser over A and B of the script, and both variables, one step already taken.
fn stepped_once() -> (LoraOptimizer, Var, Var) {
    let (a, b, x, y) = torch_case();
    let groups = vec![
        group("A", vec![named(A, &a)], 0.01, 0.1),
        group("B", vec![named(B, &b)], 0.16, 0.0),
    ];
    let mut optimizer = LoraOptimizer::new(groups).unwrap();
    let loss = torch_loss(&a, &b, &x, &y).unwrap();
    optimizer.backward_step(&loss).unwrap();
    (optimizer, a, b)
}

/// The next two steps are still those of the script: no moment and no count of steps has moved.
fn goes_on_as_torch(mut optimizer: LoraOptimizer, a: &Var, b: &Var) {
    let (_, _, x, y) = torch_case();
    assert_close(&[values(a), values(b)].concat(), &TORCH_STEPS[0], 2e-6);
    for want in &TORCH_STEPS[1..] {
        let loss = torch_loss(a, b, &x, &y).unwrap();
        optimizer.backward_step(&loss).unwrap();
        assert_close(&[values(a), values(b)].concat(), want, 2e-6);
    }
}

#[test]
fn a_missing_gradient_is_named_and_changes_nothing() {
    let (mut optimizer, a, b) = stepped_once();
    // B, which comes second, takes no part in the loss.
    let error = optimizer
        .backward_step(&a.sqr().unwrap().sum_all().unwrap())
        .unwrap_err();
    assert!(matches!(&error, Error::GradientMissing { names, of: 2 } if names == &[B]));
    let message = error.to_string();
    assert!(message.contains(B) && !message.contains(A), "{message}");
    for hint in ["forward pass", "merged", "softmax_last_dim", "layer_norm"] {
        assert!(message.contains(hint), "{message}");
    }
    goes_on_as_torch(optimizer, &a, &b);
}

#[test]
fn fused_operations_cut_the_gradient_and_the_error_says_so() {
    let layer = layer(3);
    let group = ParameterGroup::all(layer.trainable_parameters(), 0.1);
    let mut optimizer = LoraOptimizer::new(vec![group]).unwrap();
    let x = Tensor::new(&[[1f32, 2., 3.]], &CPU).unwrap();
    let logits = layer.forward(&x).unwrap();

    let fused = ops::softmax_last_dim(&logits).unwrap().max_all().unwrap();
    let error = optimizer.backward_step(&fused).unwrap_err();
    assert!(matches!(&error, Error::GradientMissing { names, .. } if names == &[A, B]));
    let (alpha, beta) = (
        Tensor::ones(2, DType::F32, &CPU).unwrap(),
        Tensor::zeros(2, DType::F32, &CPU).unwrap(),
    );
    let norms = [
        ops::layer_norm(&logits, &alpha, &beta, 1e-5).unwrap(),
        ops::rms_norm(&logits, &alpha, 1e-5).unwrap(),
    ];
    for normed in norms {
        let error = optimizer
            .backward_step(&normed.sum_all().unwrap())
            .unwrap_err();
        assert!(matches!(error, Error::GradientMissing { .. }));
    }
    // The variants that the message recommends do train.
    let norms = [
        ops::layer_norm_slow(&logits, &alpha, &beta, 1e-5).unwrap(),
        ops::rms_norm_slow(&logits, &alpha, 1e-5).unwrap(),
        ops::softmax(&logits, 1).unwrap(),
    ];
    for normed in norms {
        optimizer.backward_step(&normed.sum_all().unwrap()).unwrap();
    }
}

#[test]
fn a_long_list_of_names_is_cut_in_the_message_only() {
    let parameters: Vec<_> = (0..11)
        .map(|i| {
            let var = Var::zeros(1, DType::F32, &CPU).unwrap();
            named(&format!("layers.{i}.lora_A"), &var)
        })
        .collect();
    let mut optimizer =
        LoraOptimizer::new(vec![ParameterGroup::all(parameters.clone(), 0.1)]).unwrap();
    let loss = parameters[3].1.sqr().unwrap().sum_all().unwrap();
    let error = optimizer.backward_step(&loss).unwrap_err();
    let message = error.to_string();
    assert!(
        message.contains("layers.8.lora_A and 2 more (10 of 11"),
        "{message}"
    );
    let Error::GradientMissing { names, .. } = error else {
        panic!("{error}");
    };
    assert_eq!(names.len(), 10);
    assert!(!names.contains(&"layers.3.lora_A".to_string()));
}

#[test]
fn a_gradient_that_is_not_finite_is_named_and_changes_nothing() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30] {
        let (mut optimizer, a, b) = stepped_once();
        let gradients = store(&[
            (&a, Tensor::ones((1, 3), DType::F32, &CPU).unwrap()),
            (&b, Tensor::new(&[[0f32], [bad]], &CPU).unwrap()),
        ]);
        let error = optimizer.step(&gradients).unwrap_err();
        assert!(
            matches!(&error, Error::GradientNotFinite { name, .. } if name == B),
            "{bad}"
        );
        goes_on_as_torch(optimizer, &a, &b);
    }
}

#[test]
fn a_gradient_of_another_shape_or_type_is_named_and_changes_nothing() {
    for (shape, dtype) in [((1, 2), DType::F32), ((2, 1), DType::F64)] {
        let (mut optimizer, a, b) = stepped_once();
        let mut gradients = store(&[
            (&a, Tensor::ones((1, 3), DType::F32, &CPU).unwrap()),
            (&b, Tensor::ones(shape, dtype, &CPU).unwrap()),
        ]);
        let message = optimizer.step(&gradients).unwrap_err().to_string();
        assert!(
            message.contains(B) && message.contains("[2, 1]"),
            "{message}"
        );
        let clipped = clip_grad_norm(&mut gradients, optimizer.parameters(), 1.0);
        assert!(matches!(clipped, Err(Error::GradientShape { .. })));
        let added = GradientAccumulator::new(optimizer.parameters()).add(&gradients);
        assert!(matches!(added, Err(Error::GradientShape { .. })));
        goes_on_as_torch(optimizer, &a, &b);
    }
}

#[test]
fn a_loss_of_several_numbers_is_refused() {
    let (mut optimizer, a, b) = stepped_once();
    let (_, _, x, _) = torch_case();
    let loss = x
        .matmul(&a.t().unwrap())
        .unwrap()
        .matmul(&b.t().unwrap())
        .unwrap();
    let message = optimizer.backward_step(&loss).unwrap_err().to_string();
    assert!(message.contains("[2, 2]"), "{message}");
    goes_on_as_torch(optimizer, &a, &b);
}

#[test]
fn the_moments_take_twice_the_parameters_bytes() {
    let single = Var::zeros((8, 100), DType::F32, &CPU).unwrap();
    let double = Var::zeros((50, 8), DType::F64, &CPU).unwrap();
    let groups = vec![
        group("A", vec![named(A, &single)], 0.1, 0.0),
        group("B", vec![named(B, &double)], 0.1, 0.0),
    ];
    let optimizer = LoraOptimizer::new(groups).unwrap();
    assert_eq!(optimizer.optimizer_bytes(), 2 * (800 * 4 + 400 * 8));
}

// ------------------------------------------------------------------------------------- LoRA+

// ```python
// import torch
// from peft import LoraConfig, get_peft_model
// from peft.optimizers import create_loraplus_optimizer
// class Model(torch.nn.Module):
//     def __init__(self):
//         super().__init__()
//         self.emb = torch.nn.Embedding(5, 4)
//         self.q_proj = torch.nn.Linear(4, 3)
//         self.head = torch.nn.Linear(3, 2)
//     def forward(self, x):
//         return self.head(self.q_proj(self.emb(x)))
// for targets, kwargs in (
//     (["q_proj"], {"lora_bias": True}),
//     (["emb", "q_proj"], {"use_dora": True}),
//     (["emb", "q_proj"], {"bias": "lora_only", "modules_to_save": ["head"]}),
// ):
//     model = get_peft_model(Model(), LoraConfig(r=2, target_modules=targets, **kwargs))
//     names = {id(p): n for n, p in model.named_parameters()}
//     optimizer = create_loraplus_optimizer(
//         model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16, loraplus_weight_decay=0.1)
//     for g in optimizer.param_groups:
//         print(g["lr"], g["weight_decay"], [names[id(p)] for p in g["params"]])
// ```
// Groups, rates and decays are what it prints; ".default" is taken out of the names and, from the
// magnitude vectors and as in PEFT's files, ".weight".
#[test]
fn loraplus_sorts_as_peft_does() {
    let parameters = [
        ("base_model.model.emb.lora_embedding_A", 2),
        ("base_model.model.emb.lora_embedding_B", 2),
        ("base_model.model.emb.lora_magnitude_vector", 1),
        ("base_model.model.head.bias", 1),
        ("base_model.model.head.weight", 2),
        ("base_model.model.q_proj.base_layer.bias", 1),
        ("base_model.model.q_proj.lora_A.weight", 2),
        ("base_model.model.q_proj.lora_B.bias", 1),
        ("base_model.model.q_proj.lora_B.weight", 2),
        ("base_model.model.q_proj.lora_magnitude_vector", 1),
    ]
    .map(|(name, rank)| {
        let var = Var::zeros(vec![2; rank], DType::F32, &CPU).unwrap();
        (name.to_string(), var)
    });
    let options = LoraPlusOptions {
        weight_decay: 0.1,
        ..LoraPlusOptions::default()
    };
    let groups = loraplus_groups(parameters.to_vec(), 1e-4, 16.0, options).unwrap();
    let got: Vec<_> = groups
        .iter()
        .map(|group| {
            let names: Vec<&str> = group
                .parameters
                .iter()
                .map(|(name, _)| name.trim_start_matches("base_model.model."))
                .collect();
            (group.name.as_str(), group.lr, group.weight_decay, names)
        })
        .collect();
    let want = [
        (
            "groupA",
            1e-4,
            0.1,
            vec!["head.weight", "q_proj.lora_A.weight"],
        ),
        (
            "embedding",
            1e-6,
            0.1,
            vec!["emb.lora_embedding_A", "emb.lora_embedding_B"],
        ),
        (
            "groupB",
            0.0016,
            0.1,
            vec![
                "emb.lora_magnitude_vector",
                "q_proj.lora_B.weight",
                "q_proj.lora_magnitude_vector",
            ],
        ),
        (
            "groupB_no_decay",
            0.0016,
            0.0,
            vec!["head.bias", "q_proj.base_layer.bias", "q_proj.lora_B.bias"],
        ),
    ];
    assert_eq!(got, want);
    for ratio in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let error = loraplus_groups(parameters.to_vec(), 1e-4, ratio, options).unwrap_err();
        assert!(error.to_string().contains("ratio"), "{error}");
    }
}

#[test]
fn loraplus_moves_b_by_the_ratio() {
    // The first step of AdamW moves every number by its learning rate, whatever the gradient.
    for ratio in [1.0, 16.0] {
        let a = Var::new(&[[1f32, -2.]], &CPU).unwrap();
        let b = Var::new(&[[0f32], [0.]], &CPU).unwrap();
        let options = LoraPlusOptions::default();
        let parameters = vec![named(A, &a), named(B, &b)];
        let groups = loraplus_groups(parameters, 0.01, ratio, options).unwrap();
        let mut optimizer = LoraOptimizer::new(groups).unwrap();
        let loss = (a.sum_all().unwrap() + (b.sum_all().unwrap() * 3.0).unwrap()).unwrap();
        optimizer.backward_step(&loss).unwrap();
        let step = 0.01 * ratio as f32;
        assert_close(&values(&a), &[0.99, -2.01], 1e-6);
        assert_close(&values(&b), &[-step, -step], 1e-6);
    }
}

// --------------------------------------------------------------------------------- schedules

// ```python
// import torch
// from transformers.optimization import (
//     get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup,
//     get_linear_schedule_with_warmup)
// def factors(schedule, *args):
//     optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
//     f = schedule(optimizer, *args).lr_lambdas[0]
//     return [f(step) for step in range(11)]
// for warmup in (0, 3):
//     print(warmup, "constant", factors(get_constant_schedule_with_warmup, warmup))
//     print(warmup, "linear", factors(get_linear_schedule_with_warmup, warmup, 10))
//     print(warmup, "cosine", factors(get_cosine_schedule_with_warmup, warmup, 10))
// ```
#[test]
fn schedules_are_transformers() {
    let cases = [
        (Schedule::Constant { warmup_steps: 0 }, [1.0; 11]),
        (
            Schedule::Linear { warmup_steps: 0 },
            [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0],
        ),
        (
            Schedule::Cosine { warmup_steps: 0 },
            [
                1.0,
                0.9755282581475768,
                0.9045084971874737,
                0.7938926261462366,
                0.6545084971874737,
                0.5,
                0.34549150281252633,
                0.2061073738537635,
                0.09549150281252633,
                0.024471741852423234,
                0.0,
            ],
        ),
        (
            Schedule::Constant { warmup_steps: 3 },
            [
                0.0,
                0.3333333333333333,
                0.6666666666666666,
                1.0,
                1.0,
                1.0,
                1.0,
                1.0,
                1.0,
                1.0,
                1.0,
            ],
        ),
        (
            Schedule::Linear { warmup_steps: 3 },
            [
                0.0,
                0.3333333333333333,
                0.6666666666666666,
                1.0,
                0.8571428571428571,
                0.7142857142857143,
                0.5714285714285714,
                0.42857142857142855,
                0.2857142857142857,
                0.14285714285714285,
                0.0,
            ],
        ),
        (
            Schedule::Cosine { warmup_steps: 3 },
            [
                0.0,
                0.3333333333333333,
                0.6666666666666666,
                1.0,
                0.9504844339512095,
                0.8117449009293668,
                0.6112604669781572,
                0.38873953302184283,
                0.18825509907063326,
                0.04951556604879048,
                0.0,
            ],
        ),
    ];
    for (schedule, want) in cases {
        for (step, want) in want.into_iter().enumerate() {
            let got = schedule.factor(step, 10);
            assert!((got - want).abs() < 1e-14, "{schedule:?} at {step}: {got}");
        }
    }
}

#[test]
fn schedules_at_their_edges() {
    let (constant, linear, cosine) = (
        |warmup_steps| Schedule::Constant { warmup_steps },
        |warmup_steps| Schedule::Linear { warmup_steps },
        |warmup_steps| Schedule::Cosine { warmup_steps },
    );
    // Past the end: 0, and the cosine does not climb again.
    for step in [10, 11, 15, 20, 1000] {
        assert_eq!(linear(3).factor(step, 10), 0.0);
        assert!(cosine(3).factor(step, 10).abs() < 1e-12);
        assert_eq!(constant(3).factor(step, 10), 1.0);
    }
    // A run that ends within its warm-up, and one without a step.
    for schedule in [constant(8), linear(8), cosine(8)] {
        assert_eq!(schedule.factor(4, 5), 0.5);
    }
    for schedule in [constant(0), linear(0), cosine(0)] {
        assert!(schedule.factor(0, 0).is_finite());
    }
}

// ---------------------------------------------------------------------------------- clipping

// ```python
// import torch
// a = torch.zeros(2, 2, requires_grad=True)
// b = torch.zeros(3, requires_grad=True)
// for scale, max_norm in ((1.0, 1.0), (1.0, 8.0), (1.0, 100.0), (1e-6, 1e-6)):
//     a.grad = scale * torch.tensor([[1.0, -2.0], [3.0, 0.5]])
//     b.grad = scale * torch.tensor([4.0, 0.0, -1.0])
//     norm = torch.nn.utils.clip_grad_norm_([a, b], max_norm)
//     print(norm.item(), a.grad.tolist(), b.grad.tolist())
// ```
#[test]
fn clipping_is_torchs() {
    let a = Var::zeros((2, 2), DType::F32, &CPU).unwrap();
    let b = Var::zeros(3, DType::F32, &CPU).unwrap();
    let other = Var::zeros(1, DType::F32, &CPU).unwrap();
    let parameters = [named(A, &a), named(B, &b)];
    let fresh = || {
        store(&[
            (&a, Tensor::new(&[[1f32, -2.], [3., 0.5]], &CPU).unwrap()),
            (&b, Tensor::new(&[4f32, 0., -1.], &CPU).unwrap()),
            (&other, Tensor::new(&[1000f32], &CPU).unwrap()),
        ])
    };
    let of = |store: &GradStore, var: &Var| values(store.get(var).unwrap());

    let mut gradients = fresh();
    let norm = clip_grad_norm(&mut gradients, &parameters, 1.0).unwrap();
    assert!((norm - 5.590169906616211).abs() < 1e-6, "{norm}");
    let want = [
        0.17888541519641876,
        -0.3577708303928375,
        0.5366562604904175,
        0.08944270759820938,
    ];
    assert_close(&of(&gradients, &a), &want, 1e-7);
    let want = [0.715541660785675, 0.0, -0.17888541519641876];
    assert_close(&of(&gradients, &b), &want, 1e-7);
    // What is not a parameter is neither counted nor scaled.
    assert_eq!(of(&gradients, &other), [1000.0]);

    for max_norm in [8.0, 100.0, f64::INFINITY] {
        let mut gradients = fresh();
        let norm = clip_grad_norm(&mut gradients, &parameters, max_norm).unwrap();
        assert!((norm - 5.590169906616211).abs() < 1e-6, "{norm}");
        assert_eq!(of(&gradients, &a), [1.0, -2.0, 3.0, 0.5]);
        assert_eq!(of(&gradients, &b), [4.0, 0.0, -1.0]);
    }

    // So small that the 1e-6 beside the norm counts.
    let mut gradients = fresh();
    for var in [&a, &b] {
        let small = (gradients.get(var).unwrap() * 1e-6).unwrap();
        gradients.insert(var, small);
    }
    let norm = clip_grad_norm(&mut gradients, &parameters, 1e-6).unwrap();
    assert!((norm - 5.590170076175127e-06).abs() < 1e-12, "{norm}");
    assert_close(
        &of(&gradients, &a),
        &[
            1.51741161857899e-07,
            -3.03482323715798e-07,
            4.552234997845517e-07,
            7.58705809289495e-08,
        ],
        1e-13,
    );
    assert_close(
        &of(&gradients, &b),
        &[6.06964647431596e-07, 0.0, -1.51741161857899e-07],
        1e-13,
    );

    for max_norm in [0.0, -1.0, f64::NAN] {
        let error = clip_grad_norm(&mut fresh(), &parameters, max_norm).unwrap_err();
        assert!(error.to_string().contains("max_norm"), "{error}");
    }
}

#[test]
fn clipping_names_the_gradient_that_is_not_finite() {
    let a = Var::zeros(2, DType::F32, &CPU).unwrap();
    let b = Var::zeros(2, DType::F64, &CPU).unwrap();
    let parameters = [named(A, &a), named(B, &b)];
    let good = Tensor::new(&[30f32, 40.], &CPU).unwrap();
    for bad in [f64::NAN, f64::INFINITY] {
        let bad = Tensor::new(&[0f64, bad], &CPU).unwrap();
        let mut gradients = store(&[(&a, good.clone()), (&b, bad)]);
        let error = clip_grad_norm(&mut gradients, &parameters, 1.0).unwrap_err();
        assert!(
            matches!(&error, Error::GradientNotFinite { name, .. } if name == B),
            "{error}"
        );
        assert_eq!(values(gradients.get(&a).unwrap()), [30.0, 40.0]);
    }
    // A mixture of types counts as one norm; an absent gradient counts as zero.
    let mut gradients = store(&[
        (&a, good.clone()),
        (&b, Tensor::new(&[120f64, 0.], &CPU).unwrap()),
    ]);
    assert_eq!(
        clip_grad_norm(&mut gradients, &parameters, 1e3).unwrap(),
        130.0
    );
    let mut gradients = store(&[(&a, good)]);
    assert_eq!(
        clip_grad_norm(&mut gradients, &parameters, 1e3).unwrap(),
        50.0
    );
    assert!(gradients.get(&b).is_none());
}

// ------------------------------------------------------------------------------ accumulation

#[test]
fn micro_batches_equal_the_whole_batch() {
    let layer = layer(11);
    let parameters = layer.trainable_parameters();
    let start = Tensor::new(&[[0.5f32, -0.2], [0.1, 0.7]], &CPU).unwrap();
    layer.lora_b().unwrap().set(&start).unwrap(); // else the gradient of A is zero

    let rows = 6;
    let x: Vec<f32> = (0..rows * 3).map(|i| (i as f32 * 0.7).sin()).collect();
    let y: Vec<f32> = (0..rows * 2).map(|i| (i as f32 * 1.3).cos()).collect();
    let x = Tensor::from_vec(x, (rows, 3), &CPU).unwrap();
    let y = Tensor::from_vec(y, (rows, 2), &CPU).unwrap();
    let gradients = |from: usize, count: usize| {
        let (x, y) = (
            x.narrow(0, from, count).unwrap(),
            y.narrow(0, from, count).unwrap(),
        );
        let out = layer.forward(&x).unwrap();
        candle_nn::loss::mse(&out, &y).unwrap().backward().unwrap()
    };
    let whole = gradients(0, rows);
    let equals_whole = |mean: &GradStore| {
        for (_, var) in &parameters {
            let want = values(whole.get(var).unwrap());
            assert!(
                want.iter().all(|w| w.abs() > 1e-3),
                "a gradient near zero proves nothing"
            );
            assert_close(&values(mean.get(var).unwrap()), &want, 1e-6);
        }
    };

    let mut accumulator = GradientAccumulator::new(&parameters);
    // Twice: the second round must not remember the first.
    for _ in 0..2 {
        for from in [0, 2, 4] {
            accumulator.add(&gradients(from, 2)).unwrap();
        }
        equals_whole(&accumulator.take_mean().unwrap());
    }
    // Micro-batches of different sizes need their weights.
    for (from, count) in [(0, 1), (1, 3), (4, 2)] {
        accumulator
            .add_weighted(&gradients(from, count), count as f64)
            .unwrap();
    }
    equals_whole(&accumulator.take_mean().unwrap());
    assert!(matches!(
        accumulator.take_mean(),
        Err(Error::NothingAccumulated)
    ));

    for weight in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let error = accumulator.add_weighted(&whole, weight).unwrap_err();
        assert!(error.to_string().contains("weight"), "{error}");
    }
    assert!(matches!(
        accumulator.take_mean(),
        Err(Error::NothingAccumulated)
    ));
}

#[test]
fn a_refused_micro_batch_adds_nothing() {
    let (a, b) = (
        Var::zeros(1, DType::F32, &CPU).unwrap(),
        Var::zeros(1, DType::F32, &CPU).unwrap(),
    );
    let one = |value: f32| Tensor::new(&[value], &CPU).unwrap();
    let mut accumulator = GradientAccumulator::new(&[named(A, &a), named(B, &b)]);
    accumulator
        .add(&store(&[(&a, one(2.0)), (&b, one(4.0))]))
        .unwrap();
    let wrong = Tensor::zeros(3, DType::F32, &CPU).unwrap();
    accumulator
        .add(&store(&[(&a, one(8.0)), (&b, wrong)]))
        .unwrap_err();
    let mean = accumulator.take_mean().unwrap();
    assert_eq!(values(mean.get(&a).unwrap()), [2.0]);
    assert_eq!(values(mean.get(&b).unwrap()), [4.0]);
}

#[test]
fn a_parameter_that_some_micro_batches_skip_counts_as_zero_there() {
    let (a, b) = (
        Var::zeros(1, DType::F32, &CPU).unwrap(),
        Var::zeros(1, DType::F32, &CPU).unwrap(),
    );
    let one = |value: f32| Tensor::new(&[value], &CPU).unwrap();
    let group = ParameterGroup::all(vec![named(A, &a), named(B, &b)], 0.1);
    let mut optimizer = LoraOptimizer::new(vec![group]).unwrap();
    let mut accumulator = GradientAccumulator::new(optimizer.parameters());
    accumulator.add(&store(&[(&a, one(2.0))])).unwrap();
    accumulator
        .add(&store(&[(&a, one(4.0)), (&b, one(6.0))]))
        .unwrap();
    accumulator.add(&store(&[(&a, one(6.0))])).unwrap();
    let mean = accumulator.take_mean().unwrap();
    assert_eq!(values(mean.get(&a).unwrap()), [4.0]);
    assert_eq!(values(mean.get(&b).unwrap()), [2.0]);

    // One that all of them skip is reported by the step.
    accumulator.add(&store(&[(&a, one(2.0))])).unwrap();
    let mean = accumulator.take_mean().unwrap();
    let error = optimizer.step(&mean).unwrap_err();
    assert!(matches!(&error, Error::GradientMissing { names, .. } if names == &[B]));
}
