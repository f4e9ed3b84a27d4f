//! Whatever the shapes, types, ranks and names: an answer or an error that says where, never a
//! panic; and where there is an answer, merging, mixing and choosing adapters keep it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Conv1d, Conv1dConfig, Conv2d, Conv2dConfig, Embedding, Linear, Module};
use lora::{
    AnyLayer, BASE_ROW, Base, Bias, Error, Init, LoraConfig, LoraConv1d, LoraConv2d, LoraEmbedding,
    LoraLayer, LoraLinear, LoraModel, Result, ScaledEmbedding, TargetModules, VeraConfig,
    VeraProjection,
};
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

const CPU: Device = Device::Cpu;

fn seeded(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

/// Runs `test` on `cases` values of the strategy, the same ones each time.
#[track_caller]
fn every<S: Strategy>(cases: u32, strategy: S, test: impl Fn(S::Value)) {
    let config = ProptestConfig {
        cases,
        failure_persistence: None,
        max_shrink_iters: 2000,
        ..ProptestConfig::default()
    };
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(config, rng);
    // A panic in the test fails the case, whoever panicked.
    let ran = runner.run(&strategy, |value| {
        test(value);
        Ok(())
    });
    if let Err(failure) = ran {
        panic!("{failure}");
    }
}

/// `call`'s value; a panic inside is a failure that names the call.
#[track_caller]
fn calm<T>(what: &str, call: impl FnOnce() -> T) -> T {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(value) => value,
        Err(_) => panic!("{what} panicked"),
    }
}

fn numbers(n: usize, rng: &mut ChaCha8Rng) -> Vec<f64> {
    (0..n).map(|_| rng.random_range(-1.0..1.0)).collect()
}

fn random(shape: &[usize], dtype: DType, rng: &mut ChaCha8Rng) -> Tensor {
    let all = numbers(shape.iter().product(), rng);
    let t = Tensor::from_vec(all, shape, &CPU).unwrap();
    t.to_dtype(dtype).unwrap()
}

fn values(t: &Tensor) -> Vec<f64> {
    let t = t.flatten_all().unwrap().to_dtype(DType::F64).unwrap();
    t.to_vec1().unwrap()
}

/// The numbers exactly, NaN included.
fn bits(t: &Tensor) -> Vec<u64> {
    values(t).into_iter().map(f64::to_bits).collect()
}

/// The largest difference, relative to the largest number wanted.
fn gap(got: &Tensor, want: &Tensor) -> f64 {
    assert_eq!(got.dims(), want.dims());
    let (got, want) = (values(got), values(want));
    let largest = want.iter().fold(0.0f64, |m, v| m.max(v.abs()));
    let off = got.iter().zip(&want).fold(0.0f64, |m, (g, w)| {
        assert!(g.is_finite() && w.is_finite(), "{g} {w}");
        m.max((g - w).abs())
    });
    if off == 0.0 { 0.0 } else { off / largest }
}

/// One of the four types of layers.
#[derive(Clone)]
enum Layer {
    Linear(LoraLinear),
    Conv1(LoraConv1d),
    Conv2(LoraConv2d),
    Embedding(LoraEmbedding),
}

macro_rules! each {
    ($layer:expr, $l:ident => $body:expr) => {
        match $layer {
            Layer::Linear($l) => $body,
            Layer::Conv1($l) => $body,
            Layer::Conv2($l) => $body,
            Layer::Embedding($l) => $body,
        }
    };
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Linear,
    Conv1,
    Conv2,
    Embedding,
}

const KINDS: [Kind; 4] = [Kind::Linear, Kind::Conv1, Kind::Conv2, Kind::Embedding];

/// Stride, padding, dilation and groups.
type Numbers = [usize; 4];

/// A layer as somebody might build it, good or not.
#[derive(Clone, Debug)]
struct Blueprint {
    kind: Kind,
    name: String,
    weight: Vec<usize>,
    dtype: DType,
    bias: Option<Vec<usize>>,
    conv: Numbers,
    scale: f64,
}

impl Blueprint {
    fn frozen(&self, rng: &mut ChaCha8Rng) -> Result<Layer> {
        let weight = random(&self.weight, self.dtype, rng);
        let bias = self.bias.as_ref().map(|b| random(b, self.dtype, rng));
        let name = self.name.as_str();
        let [stride, padding, dilation, groups] = self.conv;
        Ok(match self.kind {
            Kind::Linear => Layer::Linear(LoraLinear::frozen(name, Linear::new(weight, bias))?),
            Kind::Conv1 => {
                let config = Conv1dConfig {
                    stride,
                    padding,
                    dilation,
                    groups,
                    ..Default::default()
                };
                Layer::Conv1(LoraConv1d::frozen(name, Conv1d::new(weight, bias, config))?)
            }
            Kind::Conv2 => {
                let config = Conv2dConfig {
                    stride,
                    padding,
                    dilation,
                    groups,
                    ..Default::default()
                };
                Layer::Conv2(LoraConv2d::frozen(name, Conv2d::new(weight, bias, config))?)
            }
            Kind::Embedding => {
                let base = ScaledEmbedding::from(Embedding::new(weight, 1));
                let base = base.with_embed_scale(self.scale);
                Layer::Embedding(LoraEmbedding::frozen(name, base)?)
            }
        })
    }

    /// The output's shape, where the input fits.
    fn output(&self, x: &[usize]) -> Option<Vec<usize>> {
        let w = &self.weight;
        match self.kind {
            Kind::Linear => {
                let (last, leading) = x.split_last()?;
                (*last == w[1]).then(|| [leading, &w[..1]].concat())
            }
            Kind::Embedding => Some([x, &w[1..]].concat()),
            Kind::Conv1 | Kind::Conv2 => {
                let [stride, padding, dilation, groups] = self.conv;
                if x.len() != w.len() || x.contains(&0) || x[1] != w[1] * groups {
                    return None;
                }
                let mut out = vec![x[0], w[0]];
                for (size, k) in x[2..].iter().zip(&w[2..]) {
                    let spare = (size + 2 * padding).checked_sub(dilation * (k - 1) + 1)?;
                    out.push(spare / stride + 1);
                }
                Some(out)
            }
        }
    }
}

fn weight_of(layer: &Layer) -> Tensor {
    match layer {
        Layer::Linear(l) => l.base().weight().clone(),
        Layer::Conv1(l) => l.base().weight().clone(),
        Layer::Conv2(l) => l.base().weight().clone(),
        Layer::Embedding(l) => l.base().embeddings().clone(),
    }
}

/// The merged layer's output, its weight and its bias.
fn merged(layer: &Layer, x: &Tensor) -> Result<(Tensor, Tensor, Option<Tensor>)> {
    // candle's own linear layer takes no input of one dimension.
    let pass = |base: &dyn Module, x: &Tensor| base.forward(x);
    Ok(match layer {
        Layer::Linear(l) => {
            let base = l.merged()?;
            let flat = x.reshape((x.elem_count() / l.in_features(), l.in_features()))?;
            let y = pass(&base, &flat)?;
            let shape = [&x.dims()[..x.rank() - 1], &[l.out_features()]].concat();
            (
                y.reshape(shape)?,
                base.weight().clone(),
                base.bias().cloned(),
            )
        }
        Layer::Conv1(l) => {
            let base = l.merged()?;
            (pass(&base, x)?, base.weight().clone(), base.bias().cloned())
        }
        Layer::Conv2(l) => {
            let base = l.merged()?;
            (pass(&base, x)?, base.weight().clone(), base.bias().cloned())
        }
        Layer::Embedding(l) => {
            let base = l.merged()?;
            (pass(&base, x)?, base.embeddings().clone(), None)
        }
    })
}

fn forward(layer: &Layer, x: &Tensor, train: bool) -> Result<Tensor> {
    each!(layer, l => l.forward_t(x, train))
}

/// Everything that can be seen of a layer.
fn seen(layer: &Layer) -> impl PartialEq + std::fmt::Debug + use<> {
    let weight = weight_of(layer);
    let variables: Vec<_> = each!(layer, l => l.adapters())
        .iter()
        .map(|name| {
            let adapter = each!(layer, l => l.adapter(name)).unwrap();
            let parts = [adapter.lora_a(), adapter.lora_b(), adapter.magnitude()];
            let ids: Vec<_> = parts.iter().map(|v| v.map(|v| v.id())).collect();
            (name.clone(), format!("{ids:?}"))
        })
        .collect();
    (
        bits(&weight),
        variables,
        each!(layer, l => (l.active_adapters(), l.is_merged(), l.parameter_count())),
        each!(layer, l => l.trainable_parameters().into_iter().map(|p| p.0).collect::<Vec<_>>()),
    )
}

fn odd_names() -> impl Strategy<Value = String> {
    prop_oneof![
        8 => Just("net.case".to_string()),
        1 => select(vec!["", ".", "a.", ".b", "a..b", " ", "a b", "a\tb", "\u{a0}", "a\n"])
            .prop_map(str::to_string),
        2 => select(vec!["a/b", "é.ü", "层", "\0", "{}", "a\"b", "../..", "🦀", "%s", "a\u{200b}b"])
            .prop_map(str::to_string),
    ]
}

fn sizes(rank: std::ops::Range<usize>) -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(select(vec![0, 1, 1, 2, 3, 4, 5]), rank)
}

fn dtypes() -> impl Strategy<Value = DType> {
    prop_oneof![
        6 => select(vec![DType::F32, DType::F64, DType::F16, DType::BF16]),
        1 => select(vec![DType::U8, DType::U32, DType::I64]),
    ]
}

fn conv_numbers() -> impl Strategy<Value = Numbers> {
    let usual = || select(vec![1, 1, 1, 2, 3]);
    prop_oneof![
        6 => (usual(), select(vec![0, 1, 2]), usual(), select(vec![1, 1, 2]))
            .prop_map(|(s, p, d, g)| [s, p, d, g]),
        1 => prop::array::uniform4(select(vec![0, 1, 7, usize::MAX, usize::MAX / 2, 1 << 40])),
    ]
}

/// Mostly the rank and bias that the kind asks for.
fn blueprints() -> impl Strategy<Value = Blueprint> {
    let kinds = select(KINDS.to_vec());
    (kinds, odd_names(), dtypes(), conv_numbers(), 0..10usize).prop_flat_map(
        |(kind, name, dtype, conv, luck)| {
            let rank = match kind {
                Kind::Linear | Kind::Embedding => 2,
                Kind::Conv1 => 3,
                Kind::Conv2 => 4,
            };
            let ranks = if luck == 0 { 0..6 } else { rank..rank + 1 };
            let bias = prop_oneof![2 => Just(0), 2 => Just(1), 1 => Just(2)];
            let scale = select(vec![1.0, 0.5, -3.0, 0.0]);
            (sizes(ranks), bias, sizes(0..3), scale).prop_map(
                move |(weight, bias, other, scale)| Blueprint {
                    kind,
                    name: name.clone(),
                    bias: match (bias, kind) {
                        (0, _) | (_, Kind::Embedding) => None,
                        (1, _) => Some(weight.iter().take(1).copied().collect()),
                        _ => Some(other),
                    },
                    weight,
                    dtype,
                    conv,
                    scale,
                },
            )
        },
    )
}

const HUGE: [usize; 4] = [usize::MAX, usize::MAX / 2 + 1, 1 << 40, 1 << 35];

fn configs() -> impl Strategy<Value = LoraConfig> {
    let ranks = prop_oneof![
        8 => select(vec![1, 2, 3, 4, 6]),
        1 => Just(0),
        1 => select(HUGE.to_vec()),
    ];
    let alphas = prop_oneof![
        9 => select(vec![1.0, 3.0, 16.0]),
        1 => select(vec![0.0, -1.0, f64::NAN, f64::INFINITY, 1e308, 1e-308]),
    ];
    let dropouts = prop_oneof![
        9 => select(vec![0.0, 0.0, 0.5]),
        1 => select(vec![1.0, -0.1, f64::NAN]),
    ];
    let inits = select(vec![
        Init::Kaiming,
        Init::Kaiming,
        Init::Gaussian,
        Init::Random,
        Init::Random,
        Init::Orthogonal,
        Init::Pissa,
        Init::PissaNiter(0),
        Init::Olora,
    ]);
    let biases = select(vec![Bias::None, Bias::None, Bias::LoraOnly, Bias::All]);
    let flags = (any::<bool>(), any::<bool>(), any::<bool>());
    (ranks, alphas, dropouts, inits, biases, flags).prop_map(
        |(r, alpha, dropout, init, bias, (rslora, dora, lora_bias))| LoraConfig {
            bias,
            lora_bias: lora_bias && !dora,
            ..LoraConfig::new(r, alpha)
                .with_rslora(rslora)
                .with_init(init)
                .with_dropout(dropout)
                .with_dora(dora)
        },
    )
}

/// An input as somebody might pass it: mostly one that fits.
#[derive(Clone, Debug)]
struct Input {
    shape: Vec<usize>,
    /// 0: all sizes as given; else the channels are set right.
    luck: usize,
    dtype: Option<DType>,
    /// A number to put first: NaN or infinite.
    odd: Option<f64>,
    ids: u32,
}

fn inputs() -> impl Strategy<Value = Input> {
    let dtype = prop_oneof![5 => Just(None), 1 => dtypes().prop_map(Some)];
    let odd = prop_oneof![
        4 => Just(None),
        1 => select(vec![f64::NAN, f64::INFINITY]).prop_map(Some),
    ];
    let ids = select(vec![1, 1, 1, 6, 300, u32::MAX]);
    (sizes(0..6), 0..6usize, dtype, odd, ids).prop_map(|(shape, luck, dtype, odd, ids)| Input {
        shape,
        luck,
        dtype,
        odd,
        ids,
    })
}

impl Input {
    fn for_layer(&self, blueprint: &Blueprint, rng: &mut ChaCha8Rng) -> Tensor {
        let w = &blueprint.weight;
        let mut shape = self.shape.clone();
        if self.luck > 0 {
            match blueprint.kind {
                Kind::Linear => {
                    shape.truncate(3);
                    shape.push(w[1]);
                }
                Kind::Embedding => {}
                Kind::Conv1 | Kind::Conv2 => {
                    shape.resize(w.len(), 4);
                    shape[1] = w[1].saturating_mul(blueprint.conv[3]).min(64);
                    shape.iter_mut().skip(2).for_each(|size| *size += 2);
                }
            }
        }
        let embedding = blueprint.kind == Kind::Embedding;
        let dtype = self.dtype.unwrap_or(if embedding {
            DType::U32
        } else {
            blueprint.dtype
        });
        if embedding {
            let n = shape.iter().product();
            let most = if self.ids == 1 { w[0] as u32 } else { self.ids };
            let mut ids: Vec<u32> = (0..n).map(|_| rng.random_range(0..most)).collect();
            if self.ids > 1 && n > 0 {
                ids[0] = self.ids;
            }
            let ids = Tensor::from_vec(ids, shape, &CPU).unwrap();
            return ids.to_dtype(dtype).unwrap();
        }
        let mut all = numbers(shape.iter().product(), rng);
        if let (Some(odd), Some(first)) = (self.odd, all.first_mut()) {
            *first = odd;
        }
        let x = Tensor::from_vec(all, shape, &CPU).unwrap();
        x.to_dtype(dtype).unwrap()
    }
}

/// What must be right of a name: no part empty or with white space.
fn good_name(name: &str) -> bool {
    let good = |part: &str| !part.is_empty() && !part.contains(char::is_whitespace);
    name.split('.').all(good)
}

/// What must be right of a base.
fn good_base(b: &Blueprint) -> bool {
    let rank = match b.kind {
        Kind::Linear | Kind::Embedding => 2,
        Kind::Conv1 => 3,
        Kind::Conv2 => 4,
    };
    let float = matches!(b.dtype, DType::F16 | DType::BF16 | DType::F32 | DType::F64);
    if !float || b.weight.len() != rank || b.weight.contains(&0) {
        return false;
    }
    let [stride, padding, dilation, groups] = b.conv;
    let conv = matches!(b.kind, Kind::Conv1 | Kind::Conv2);
    let numbers = stride > 0
        && dilation > 0
        && groups > 0
        && b.weight[0].is_multiple_of(groups)
        && [stride, padding, dilation].iter().all(|n| *n < 1 << 32);
    let bias = b.bias.as_ref().is_none_or(|bias| *bias == b.weight[..1]);
    bias && (!conv || numbers)
}

#[test]
fn anything_is_answered_or_refused() {
    let strategy = (
        blueprints(),
        configs(),
        prop::collection::vec(inputs(), 3),
        any::<u64>(),
    );
    let count = |cell: &Cell<usize>| cell.set(cell.get() + 1);
    let (built, given, answered, denied) = Default::default();
    every(8000, strategy, |(blueprint, config, inputs, seed)| {
        let mut rng = seeded(seed);
        let layer = match calm("frozen", || blueprint.frozen(&mut rng)) {
            Ok(layer) => layer,
            Err(error) => {
                let message = error.to_string();
                let name = &blueprint.name;
                if good_name(name) {
                    assert!(!good_base(&blueprint), "refused: {message}");
                    assert!(message.contains(name.as_str()), "no name: {message}");
                    assert!(
                        message.contains(&format!("{:?}", blueprint.weight))
                            || matches!(error, Error::WeightType { .. }),
                        "no shape: {message}"
                    );
                } else {
                    assert!(message.contains(&format!("{name:?}")), "no name: {message}");
                }
                return;
            }
        };
        assert!(good_name(&blueprint.name) && good_base(&blueprint));
        count(&built);

        let before = seen(&layer);
        let added = calm(
            "add_adapter",
            || each!(&layer, l => l.add_adapter("one", &config, &mut rng)),
        );
        if let Err(error) = &added {
            let message = error.to_string();
            let known = config.validate().is_err() || message.contains(&blueprint.name);
            assert!(known, "no name: {message}");
            assert_eq!(seen(&layer), before, "changed by a refusal: {message}");
        }
        if HUGE.contains(&config.r) {
            assert!(added.is_err());
        }
        if added.is_ok() {
            count(&given);
        }

        for input in &inputs {
            let x = input.for_layer(&blueprint, &mut rng);
            for train in [false, true] {
                let y = calm("forward", || forward(&layer, &x, train));
                let message = match y {
                    Ok(y) => {
                        let want = blueprint.output(x.dims());
                        assert_eq!(Some(y.dims()), want.as_deref(), "input {:?}", x.dims());
                        assert_eq!(y.dtype(), blueprint.dtype);
                        continue;
                    }
                    Err(error @ Error::InputType { .. }) => error.to_string(),
                    Err(error) => {
                        let message = error.to_string();
                        for shape in [x.dims(), &blueprint.weight] {
                            let shape = format!("{shape:?}");
                            assert!(message.contains(&shape), "no {shape}: {message}");
                        }
                        message
                    }
                };
                assert!(message.contains(&blueprint.name), "no name: {message}");
            }
            // What fits is never refused.
            let embedding = blueprint.kind == Kind::Embedding;
            let typed = match x.dtype() {
                DType::U8 | DType::U32 | DType::I64 => embedding,
                dtype => dtype == blueprint.dtype && !embedding,
            };
            let inside = !embedding || values(&x).iter().all(|id| *id < blueprint.weight[0] as f64);
            let fits = typed && inside && blueprint.output(x.dims()).is_some();
            let y = forward(&layer, &x, false);
            // candle multiplies no bf16 on the CPU.
            if blueprint.dtype != DType::BF16 {
                assert_eq!(y.is_ok(), fits, "{:?}: {y:?}", x.dims());
            }
            assert!(fits || y.is_err());
            count(if fits { &answered } else { &denied });
        }

        let _ = calm("merge", || each!(&layer, l => l.merge()));
        calm("unmerge", || each!(&layer, l => l.unmerge()));
        let _ = calm("safe_merge", || each!(&layer, l => l.safe_merge()));
        each!(&layer, l => l.unmerge());
        let _ = calm("delta", || each!(&layer, l => l.delta_weight()));
        let _ = calm(
            "text",
            || each!(&layer, l => (l.to_string(), format!("{l:?}"))),
        );
        let deleted = calm("delete", || each!(&layer, l => l.delete_adapter("one")));
        assert_eq!(deleted.is_ok(), added.is_ok());
    });
    // The strategies find both sides.
    let counts = [&built, &given, &answered, &denied].map(Cell::get);
    assert!(counts.iter().all(|n| *n > 500), "{counts:?}");
}

#[test]
fn impossible_ranks_are_refused_before_anything_is_allocated() {
    let mut rng = seeded(1);
    for kind in KINDS {
        for r in HUGE {
            for init in [Init::Kaiming, Init::Orthogonal, Init::Random, Init::Pissa] {
                let layer = plain(kind, DType::F32, &mut rng).frozen(&mut rng).unwrap();
                let config = LoraConfig::new(r & !1, 4.0).with_init(init);
                let message = calm(
                    "add_adapter",
                    || each!(&layer, l => l.add_adapter("one", &config, &mut rng)),
                )
                .unwrap_err()
                .to_string();
                assert!(message.contains("net.case"), "{message}");
                let shape = format!("{:?}", weight_of(&layer).dims());
                let huge = message.contains(&(r & !1).to_string()) && message.contains(&shape);
                assert!(
                    huge || init == Init::Orthogonal || init == Init::Pissa,
                    "{message}"
                );
            }
        }
    }
    for r in HUGE {
        let shared = calm("VeraProjection", || {
            VeraProjection::new(r, 4, 4, DType::F32, &CPU, &mut rng)
        });
        assert!(shared.unwrap_err().to_string().contains(&r.to_string()));
        let layer = LoraLinear::frozen(
            "fc",
            Linear::new(random(&[4, 4], DType::F32, &mut rng), None),
        );
        let layer = layer.unwrap();
        let mut model = LoraModel::new(&[&layer]).unwrap();
        let config = VeraConfig {
            r,
            target_modules: Some("fc".into()),
            ..Default::default()
        };
        assert!(calm("add_vera", || model.add_vera("one", &config, &mut rng)).is_err());
        let config = LoraConfig {
            rank_pattern: vec![("fc".to_string(), r)],
            ..LoraConfig::new(2, 4.0).with_targets("fc")
        };
        let message = calm("add_adapter", || {
            model.add_adapter("one", &config, &mut rng)
        });
        assert!(message.unwrap_err().to_string().contains("layer fc"));
        assert!(layer.adapters().is_empty());
    }
    // A rank above both sizes is fine.
    let layer = plain(Kind::Linear, DType::F32, &mut rng)
        .frozen(&mut rng)
        .unwrap();
    each!(&layer, l => l.add_adapter("one", &LoraConfig::new(500, 4.0), &mut rng)).unwrap();
}

/// A layer that is right.
fn plain(kind: Kind, dtype: DType, rng: &mut ChaCha8Rng) -> Blueprint {
    let mut pick = |from: &[usize]| from[rng.random_range(0..from.len())];
    let groups = match kind {
        Kind::Conv1 | Kind::Conv2 => pick(&[1, 1, 1, 2]),
        _ => 1,
    };
    let (out, inputs) = (groups * pick(&[1, 2, 5]), pick(&[1, 3, 4]));
    let weight = match kind {
        Kind::Linear => vec![out, inputs],
        Kind::Conv1 => vec![out, inputs, pick(&[1, 2, 3])],
        Kind::Conv2 => vec![out, inputs, pick(&[1, 2, 3]), pick(&[1, 3])],
        Kind::Embedding => vec![inputs + 3, out],
    };
    Blueprint {
        kind,
        name: "net.case".to_string(),
        bias: (kind != Kind::Embedding && pick(&[0, 1]) == 1).then(|| weight[..1].to_vec()),
        conv: [pick(&[1, 2]), pick(&[0, 1]), pick(&[1, 2]), groups],
        scale: if pick(&[0, 1]) == 1 { 1.0 } else { 2.5 },
        weight,
        dtype,
    }
}

/// An input for it.
fn fitting(blueprint: &Blueprint, batch: usize, rng: &mut ChaCha8Rng) -> Tensor {
    let w = &blueprint.weight;
    match blueprint.kind {
        Kind::Linear => random(&[batch, 3, w[1]], blueprint.dtype, rng),
        Kind::Conv1 => random(&[batch, w[1] * blueprint.conv[3], 7], blueprint.dtype, rng),
        Kind::Conv2 => random(
            &[batch, w[1] * blueprint.conv[3], 7, 6],
            blueprint.dtype,
            rng,
        ),
        Kind::Embedding => {
            let ids: Vec<u32> = (0..batch * 3)
                .map(|_| rng.random_range(0..w[0] as u32))
                .collect();
            Tensor::from_vec(ids, (batch, 3), &CPU).unwrap()
        }
    }
}

const NAMES: [&str; 3] = ["one", "two", "three"];

/// Puts up to three adapters of any kind beside a layer, at random values; the names it has now.
fn adapted(layer: &Layer, blueprint: &Blueprint, rng: &mut ChaCha8Rng) -> Vec<&'static str> {
    let count = rng.random_range(1..=3);
    let (linear, embedding) = (
        blueprint.kind == Kind::Linear,
        blueprint.kind == Kind::Embedding,
    );
    let grouped = blueprint.conv[3] > 1 && !linear && !embedding;
    let mut names = vec![];
    for name in &NAMES[..count] {
        let dora = !grouped && rng.random_bool(0.4);
        if linear && rng.random_bool(0.2) {
            let shared = VeraProjection::new(3, 9, 9, DType::F32, &CPU, rng).unwrap();
            let config = VeraConfig {
                r: 3,
                ..Default::default()
            };
            each!(layer, l => l.add_vera(name, &config, &shared, rng)).unwrap();
        } else {
            let config = LoraConfig::new(2 * rng.random_range(1..=2), 3.0)
                .with_dora(dora)
                .with_rslora(rng.random_bool(0.5))
                .with_init(Init::Random)
                .with_lora_bias(!dora && !embedding && rng.random_bool(0.5));
            each!(layer, l => l.add_adapter(name, &config, rng)).unwrap();
        }
        names.push(*name);
    }
    if rng.random_bool(0.5) {
        names.reverse();
    }
    for name in &names {
        each!(layer, l => l.set_adapter(&[name])).unwrap();
        for (_, var) in each!(layer, l => l.trainable_parameters()) {
            let dtype = var.dtype();
            // Magnitudes stay near the norms, so that nothing cancels.
            let near = (var.as_tensor() + random(var.dims(), dtype, rng) * 0.2).unwrap();
            var.set(&near).unwrap();
        }
    }
    each!(layer, l => l.set_adapter(&names)).unwrap();
    names
}

#[test]
fn merging_changes_no_answer_and_unmerging_gives_everything_back() {
    let float = vec![DType::F32, DType::F32, DType::F16, DType::BF16, DType::F64];
    let strategy = (select(KINDS.to_vec()), select(float), any::<u64>());
    every(400, strategy, |(kind, dtype, seed)| {
        let mut rng = seeded(seed);
        let blueprint = plain(kind, dtype, &mut rng);
        let layer = blueprint.frozen(&mut rng).unwrap();
        adapted(&layer, &blueprint, &mut rng);
        let x = fitting(&blueprint, 2, &mut rng);
        let (before, weight) = (seen(&layer), weight_of(&layer));
        let original = bits(&weight);

        let grouped = blueprint.conv[3] > 1 && matches!(kind, Kind::Conv1 | Kind::Conv2);
        if grouped {
            for refused in [
                each!(&layer, l => l.merge()),
                each!(&layer, l => l.safe_merge()),
                merged(&layer, &x).map(|_| ()),
            ] {
                let message = refused.unwrap_err().to_string();
                assert!(
                    message.contains("net.case") && message.contains("groups"),
                    "{message}"
                );
            }
            assert_eq!(seen(&layer), before);
            return;
        }

        let tolerance = match dtype {
            DType::F64 => 1e-12,
            DType::F32 => 1e-5,
            DType::F16 => 1e-2,
            _ => 6e-2,
        };
        // candle multiplies no bf16 on the CPU in convolutions.
        let apart = forward(&layer, &x, false);
        let (first, second) = (merged(&layer, &x), each!(&layer, l => l.merge()));
        second.unwrap();
        let together = forward(&layer, &x, false);
        assert_eq!(apart.is_ok(), together.is_ok());
        if let (Ok(apart), Ok(together), Ok((plain, ..))) = (&apart, &together, &first) {
            let off = gap(plain, apart);
            assert!(off <= tolerance, "merged() is off by {off:e}");
            let off = gap(together, apart);
            assert!(off <= tolerance, "merge() is off by {off:e}");
        } else {
            assert_eq!(dtype, DType::BF16);
        }

        // A second time, or safely: nothing more, even when an adapter has moved since.
        let once = seen(&layer);
        let (_, var) = each!(&layer, l => l.trainable_parameters()).swap_remove(0);
        let held = var.as_tensor().copy().unwrap();
        var.set(&(&held + 1.0).unwrap()).unwrap();
        each!(&layer, l => l.merge()).unwrap();
        each!(&layer, l => l.safe_merge()).unwrap();
        assert_eq!(seen(&layer), once);
        if let (Ok((_, w, _)), Ok((_, again, _))) = (&first, merged(&layer, &x)) {
            assert_eq!(bits(w), bits(&again));
            assert!(!again.track_op());
        }
        var.set(&held).unwrap();

        // What would lose or train nothing is refused.
        let message = forward(&layer, &x, true).unwrap_err().to_string();
        assert!(
            message.contains("net.case") && message.contains("unmerge"),
            "{message}"
        );
        let config = LoraConfig::new(2, 4.0);
        for refused in [
            each!(&layer, l => l.add_adapter("more", &config, &mut rng)),
            each!(&layer, l => l.set_adapter(&["one"])),
            each!(&layer, l => l.delete_adapter("one")),
        ] {
            assert!(matches!(refused, Err(Error::Merged { .. })), "{refused:?}");
        }
        assert_eq!(seen(&layer), once);

        // Whoever shares the tensor keeps what it had, and unmerging gives it back.
        assert_eq!(bits(&weight), original);
        let clone = layer.clone();
        each!(&layer, l => l.unmerge());
        assert!(!each!(&clone, l => l.is_merged()), "clones are one layer");
        assert_eq!(seen(&layer), before);
        assert_eq!(weight_of(&layer).id(), weight.id());
        if let (Ok(apart), Ok(again)) = (&apart, forward(&layer, &x, false)) {
            assert_eq!(bits(apart), bits(&again));
        }
    });
}

#[test]
fn a_safe_merge_lets_nothing_through_that_is_not_finite() {
    let odd = vec![f64::NAN, f64::INFINITY, f64::NEG_INFINITY];
    let strategy = (select(KINDS.to_vec()), select(odd), any::<u64>());
    every(300, strategy, |(kind, odd, seed)| {
        let mut rng = seeded(seed);
        let mut blueprint = plain(kind, DType::F32, &mut rng);
        if blueprint.conv[3] > 1 {
            blueprint.conv[3] = 1;
        }
        let layer = blueprint.frozen(&mut rng).unwrap();
        adapted(&layer, &blueprint, &mut rng);
        let trainable = each!(&layer, l => l.trainable_parameters());
        let (name, var) = &trainable[rng.random_range(0..trainable.len())];
        let mut all = values(var);
        let at = rng.random_range(0..all.len());
        all[at] = odd;
        let broken = Tensor::from_vec(all, var.shape(), &CPU).unwrap();
        var.set(&broken.to_dtype(var.dtype()).unwrap()).unwrap();

        let before = seen(&layer);
        let error = each!(&layer, l => l.safe_merge()).unwrap_err();
        let message = error.to_string();
        assert!(
            matches!(error, Error::MergeNotFinite { .. }),
            "{name}: {message}"
        );
        assert!(message.contains("net.case"), "{message}");
        assert_eq!(seen(&layer), before, "{name}");
        // Without care it goes through.
        each!(&layer, l => l.merge()).unwrap();
        assert!(each!(&layer, l => l.is_merged()));
    });
}

#[test]
fn a_tied_tensor_or_variable_never_changes() {
    let strategy = (select(KINDS.to_vec()), any::<u64>());
    every(100, strategy, |(kind, seed)| {
        let mut rng = seeded(seed);
        let blueprint = plain(kind, DType::F32, &mut rng);
        let var = Var::from_tensor(&random(&blueprint.weight, DType::F32, &mut rng)).unwrap();
        let tied = var.as_tensor().clone();
        let [stride, padding, dilation, groups] = blueprint.conv;
        let layer = match kind {
            Kind::Linear => {
                Layer::Linear(LoraLinear::frozen("a", Linear::new(tied, None)).unwrap())
            }
            Kind::Embedding => {
                Layer::Embedding(LoraEmbedding::frozen("a", Embedding::new(tied, 1)).unwrap())
            }
            Kind::Conv1 => {
                let config = Conv1dConfig {
                    stride,
                    padding,
                    dilation,
                    groups,
                    ..Default::default()
                };
                Layer::Conv1(LoraConv1d::frozen("a", Conv1d::new(tied, None, config)).unwrap())
            }
            Kind::Conv2 => {
                let config = Conv2dConfig {
                    stride,
                    padding,
                    dilation,
                    groups,
                    ..Default::default()
                };
                Layer::Conv2(LoraConv2d::frozen("a", Conv2d::new(tied, None, config)).unwrap())
            }
        };
        let original = bits(&var);
        let init = if kind == Kind::Linear {
            Init::Olora
        } else {
            Init::Random
        };
        let r = if kind == Kind::Linear { 1 } else { 2 };
        let config = LoraConfig::new(r, 4.0).with_init(init);
        each!(&layer, l => l.add_adapter("one", &config, &mut rng)).unwrap();
        let frozen = bits(&weight_of(&layer));
        let _ = each!(&layer, l => l.merge());
        assert_eq!(bits(&var), original, "the layer moved the variable");
        var.set(&random(&blueprint.weight, DType::F32, &mut rng))
            .unwrap();
        assert_eq!(
            bits(&weight_of(&layer)),
            frozen,
            "the variable moved the layer"
        );
    });
}

#[test]
fn rows_give_what_they_give_alone() {
    let strategy = (select(KINDS.to_vec()), 0..5usize, any::<u64>());
    every(300, strategy, |(kind, batch, seed)| {
        let mut rng = seeded(seed);
        let blueprint = plain(kind, DType::F32, &mut rng);
        let layer = blueprint.frozen(&mut rng).unwrap();
        let grouped = blueprint.conv[3] > 1 && matches!(kind, Kind::Conv1 | Kind::Conv2);
        let embedding = kind == Kind::Embedding;
        let mut model = LoraModel::new(&[each!(&layer, l => l as _)]).unwrap();
        for name in NAMES {
            let config = LoraConfig {
                bias: if rng.random_bool(0.3) {
                    Bias::LoraOnly
                } else {
                    Bias::None
                },
                ..LoraConfig::new(2, 3.0)
                    .with_targets("case")
                    .with_init(Init::Random)
                    .with_dora(!grouped && rng.random_bool(0.3))
            };
            model.add_adapter(name, &config, &mut rng).unwrap();
            model.set_adapter(&[name]).unwrap();
            for (_, var) in model.trainable_parameters() {
                let moved = (var.as_tensor() + random(var.dims(), DType::F32, &mut rng)).unwrap();
                var.set(&moved).unwrap();
            }
        }
        let names = [NAMES[0], NAMES[1], NAMES[2], BASE_ROW];
        let rows: Vec<&str> = (0..batch).map(|_| names[rng.random_range(0..4)]).collect();
        let x = fitting(&blueprint, batch, &mut rng);
        let before = seen(&layer);
        let y = calm("with_adapters", || {
            model.with_adapters(&rows, || forward(&layer, &x, false))
        });
        if batch == 0 && !embedding && kind != Kind::Linear {
            let message = y.unwrap().unwrap_err().to_string();
            assert!(
                message.contains("net.case") && message.contains("[0, "),
                "{message}"
            );
            return;
        }
        let y = y.unwrap().unwrap();
        assert_eq!(Some(y.dims()), blueprint.output(x.dims()).as_deref());
        for (i, name) in rows.iter().enumerate() {
            model
                .set_adapter(if *name == BASE_ROW {
                    &[]
                } else {
                    std::slice::from_ref(name)
                })
                .unwrap();
            let alone = forward(&layer, &x.narrow(0, i, 1).unwrap(), false).unwrap();
            let off = gap(&y.narrow(0, i, 1).unwrap(), &alone);
            assert!(off < 1e-5, "row {i} ({name}) is off by {off:e}");
        }
        model.set_adapter(&[NAMES[2]]).unwrap();
        assert_eq!(seen(&layer), before);

        // Unknown names and another number of names are refused, and nothing lingers.
        let ran = Cell::new(false);
        let message = model
            .with_adapters(&["one", "for"], || ran.set(true))
            .unwrap_err()
            .to_string();
        assert!(message.contains("\"for\"") && !ran.get(), "{message}");
        let more = vec!["one"; batch + 1];
        let refused = model.with_adapters(&more, || forward(&layer, &x, false));
        let message = refused.unwrap().unwrap_err().to_string();
        assert!(message.contains("net.case") && message.contains(&format!("{:?}", x.dims())));
        assert!(forward(&layer, &x, false).is_ok());
    });
}

/// One dimension is no batch: as many names as features must not pass for one per row.
#[test]
fn rows_need_a_batch() {
    let mut rng = seeded(3);
    for (out, inputs) in [(4, 4), (5, 4), (3, 4)] {
        for bias in [Bias::None, Bias::LoraOnly] {
            let weight = random(&[out, inputs], DType::F32, &mut rng);
            let own = Some(random(&[out], DType::F32, &mut rng));
            let layer = LoraLinear::frozen("fc", Linear::new(weight, own)).unwrap();
            let mut model = LoraModel::new(&[&layer]).unwrap();
            let config = LoraConfig {
                bias,
                ..LoraConfig::new(2, 4.0).with_targets("fc")
            };
            model.add_adapter("one", &config, &mut rng).unwrap();
            let x = random(&[inputs], DType::F32, &mut rng);
            let rows = vec!["one"; inputs];
            let y = model.with_adapters(&rows, || layer.forward_t(&x, false));
            let error = y.unwrap().unwrap_err();
            assert!(matches!(error, Error::Rows { .. }), "{error}");
        }
    }
}

#[test]
fn choosing_and_deleting_keep_the_rest() {
    let strategy = (select(KINDS.to_vec()), any::<u64>());
    every(150, strategy, |(kind, seed)| {
        let mut rng = seeded(seed);
        let blueprint = plain(kind, DType::F32, &mut rng);
        let layer = blueprint.frozen(&mut rng).unwrap();
        let x = fitting(&blueprint, 2, &mut rng);
        let bare = forward(&layer, &x, false).unwrap();
        let names = adapted(&layer, &blueprint, &mut rng);
        let all = forward(&layer, &x, false).unwrap();
        assert!(gap(&all, &bare) > 1e-3);
        let before = seen(&layer);

        let config = LoraConfig::new(2, 4.0);
        let twice = [names[0], names[0]];
        for refused in [
            each!(&layer, l => l.add_adapter(names[0], &config, &mut rng)),
            each!(&layer, l => l.set_adapter(&[names[0], "for"])),
            each!(&layer, l => l.set_adapter(&twice)),
            each!(&layer, l => l.delete_adapter("for")),
            each!(&layer, l => l.adapter("for").map(|_| ())),
        ] {
            let message = refused.unwrap_err().to_string();
            assert!(message.contains("net.case"), "{message}");
            assert_eq!(seen(&layer), before, "{message}");
        }
        for odd in ["", "a.b", "a/b", "..", " ", "a b", BASE_ROW, "a\0", "\n"] {
            let refused = calm(
                odd,
                || each!(&layer, l => l.add_adapter(odd, &config, &mut rng)),
            );
            let message = refused.unwrap_err().to_string();
            assert!(message.contains(&format!("{odd:?}")), "{message}");
        }
        assert_eq!(seen(&layer), before);

        each!(&layer, l => l.set_adapter(&[])).unwrap();
        assert_eq!(bits(&forward(&layer, &x, false).unwrap()), bits(&bare));
        each!(&layer, l => l.set_adapter(&names)).unwrap();
        assert_eq!(bits(&forward(&layer, &x, false).unwrap()), bits(&all));
        each!(&layer, l => l.enable_adapters(false));
        assert_eq!(bits(&forward(&layer, &x, false).unwrap()), bits(&bare));
        each!(&layer, l => l.enable_adapters(true));

        // The others answer as if the deleted one had not been chosen.
        let rest = &names[1..];
        each!(&layer, l => l.set_adapter(rest)).unwrap();
        let want = forward(&layer, &x, false).unwrap();
        each!(&layer, l => l.set_adapter(&names)).unwrap();
        each!(&layer, l => l.delete_adapter(names[0])).unwrap();
        assert_eq!(each!(&layer, l => l.active_adapters()), rest);
        assert_eq!(bits(&forward(&layer, &x, false).unwrap()), bits(&want));
        for name in rest {
            each!(&layer, l => l.delete_adapter(name)).unwrap();
        }
        assert_eq!(bits(&forward(&layer, &x, false).unwrap()), bits(&bare));
        assert_eq!(each!(&layer, l => l.parameter_count().trainable), 0);
    });
}

/// Layers of a small network; `odd` breaks one of them for some configurations.
fn network(rng: &mut ChaCha8Rng) -> Vec<Layer> {
    let mut layers = vec![];
    let paths = [
        ("net.layers.0.q", Kind::Linear),
        ("net.layers.0.v", Kind::Linear),
        ("net.layers.1.q", Kind::Linear),
        ("net.layers.1.conv", Kind::Conv1),
        ("net.patch", Kind::Conv2),
        ("net.embed", Kind::Embedding),
        ("head", Kind::Linear),
    ];
    for (path, kind) in paths {
        let mut blueprint = plain(kind, DType::F32, rng);
        blueprint.name = path.to_string();
        layers.push(blueprint.frozen(rng).unwrap());
    }
    layers
}

fn targets() -> impl Strategy<Value = TargetModules> {
    let name = select(vec![
        "q",
        "v",
        "conv",
        "patch",
        "embed",
        "head",
        "layers.0.q",
        "net.layers.1.q",
        "qq",
        "",
        ".",
        "net",
        "é",
        "\0",
        "a b",
        "ll-linear",
    ]);
    let names = prop::collection::vec(name.prop_map(str::to_string), 0..4);
    let regex = select(vec![
        ".*",
        r".*\.q",
        r"net\..*",
        "[qv]",
        r".*\.[qv]",
        "(",
        "[",
        "*",
        r"(?x) a # b",
        r"\",
        "",
        r"(a+)+$",
        r"(?<=q).*",
        r"\p{Greek}",
        ")(",
        "head|net.patch",
        "(?i)HEAD",
        r"(.*)*\1q",
    ]);
    prop_oneof![
        3 => names.prop_map(TargetModules::List),
        2 => regex.prop_map(TargetModules::regex),
        2 => "\\PC{0,8}".prop_map(TargetModules::regex),
        1 => Just(TargetModules::AllLinear),
    ]
}

/// Mostly what a network of these layers can have.
fn model_configs() -> impl Strategy<Value = LoraConfig> {
    fn key() -> impl Strategy<Value = String> {
        let good = vec!["q", "v", ".*", "embed", "layers.1.*"];
        let bad = vec!["(", "nothing", "", "head"];
        prop_oneof![4 => select(good), 1 => select(bad)].prop_map(str::to_string)
    }
    fn rarely<T: Clone + std::fmt::Debug + 'static>(
        usual: T,
        other: impl Strategy<Value = T> + 'static,
    ) -> impl Strategy<Value = T> {
        prop_oneof![6 => Just(usual), 1 => other]
    }
    let good = (any::<bool>(), any::<bool>(), 0..3usize).prop_map(|(rslora, random, bias)| {
        let init = if random { Init::Random } else { Init::Kaiming };
        LoraConfig {
            bias: [Bias::None, Bias::LoraOnly, Bias::All][bias],
            ..LoraConfig::new(2, 3.0).with_rslora(rslora).with_init(init)
        }
    });
    let ranks = (key(), select(vec![2, 4, 4, 9, 0, 1 << 40])).prop_map(|pair| vec![pair]);
    let alphas = (key(), select(vec![1.0, 8.0, 0.0, f64::NAN])).prop_map(|pair| vec![pair]);
    let indices = prop::collection::vec(select(vec![0usize, 1, 7, usize::MAX]), 0..3);
    let config = prop_oneof![3 => good, 1 => configs()];
    let wanted = prop_oneof![
        1 => Just(None),
        8 => targets().prop_map(Some),
        8 => Just(Some(TargetModules::AllLinear)),
        8 => select(vec![r".*", r".*\.q", r"net\..*"]).prop_map(|r| Some(TargetModules::regex(r))),
        8 => select(vec!["q", "v", "conv", "patch", "embed"]).prop_map(|n| Some(n.into())),
    ];
    let rest = (
        rarely(vec![], ranks),
        rarely(vec![], alphas),
        rarely(vec![], prop::collection::vec(key(), 1..3)),
        rarely(None, targets().prop_map(Some)),
        rarely(None, indices.prop_map(Some)),
        rarely(vec![], prop::collection::vec(key(), 1..2)),
    );
    (config, wanted, rest).prop_map(
        |(config, target_modules, (ranks, alphas, saved, exclude, indices, pattern))| LoraConfig {
            target_modules,
            rank_pattern: ranks,
            alpha_pattern: alphas,
            modules_to_save: saved,
            exclude_modules: exclude,
            layers_to_transform: indices,
            layers_pattern: pattern,
            ..config
        },
    )
}

#[test]
fn a_model_adds_an_adapter_everywhere_or_nowhere() {
    let adapters = select(vec![
        "default", "default", "fr", "", "a/b", BASE_ROW, "…", "é",
    ]);
    let one = (adapters, model_configs(), any::<bool>());
    let strategy = (prop::collection::vec(one, 1..5), any::<u64>());
    let (added, refused) = (Cell::new(0), Cell::new(0));
    every(1200, strategy, |(adapters, seed)| {
        let mut rng = seeded(seed);
        let layers = network(&mut rng);
        let handles: Vec<&dyn AnyLayer> = layers.iter().map(|l| each!(l, l => l as _)).collect();
        let mut model = LoraModel::new(&handles).unwrap();
        for (adapter, config, choose) in &adapters {
            let before: Vec<_> = layers.iter().map(seen).collect();
            let of_model = (model.adapters(), model.active_adapters().to_vec());
            let result = calm("add_adapter", || {
                model.add_adapter(adapter, config, &mut rng)
            });
            match result {
                Ok(()) => {
                    added.set(added.get() + 1);
                    let targets = model.targets(adapter).unwrap();
                    assert!(!targets.is_empty());
                    let has = |l: &&Layer| each!(l, l => l.adapters()).iter().any(|a| a == adapter);
                    let holding: Vec<_> = layers.iter().filter(has).collect();
                    assert_eq!(holding.len(), targets.len());
                    if *choose {
                        model.set_adapter(&[*adapter]).unwrap();
                        assert!(!model.trainable_parameters().is_empty());
                    }
                    calm("display", || (model.to_string(), model.parameter_count()));
                }
                Err(error) => {
                    refused.set(refused.get() + 1);
                    assert!(error.to_string().len() > 20, "{error}");
                    let after: Vec<_> = layers.iter().map(seen).collect();
                    assert_eq!(after, before, "{error}");
                    assert_eq!(of_model.0, model.adapters(), "{error}");
                    assert_eq!(of_model.1, model.active_adapters(), "{error}");
                }
            }
            let grouped = layers.iter().any(|l| {
                !each!(l, l => l.active_adapters()).is_empty()
                    && each!(l, l => l.merged().map(|_| ())).is_err()
            });
            let before: Vec<_> = layers.iter().map(seen).collect();
            let merged = calm("merge", || model.merge());
            assert_eq!(merged.is_err(), grouped);
            if merged.is_err() {
                assert_eq!(layers.iter().map(seen).collect::<Vec<_>>(), before);
            }
            model.unmerge();
            assert_eq!(layers.iter().map(seen).collect::<Vec<_>>(), before);
        }
        // Backwards: what PiSSA took can go back only when no other adapter counts on the rest.
        for adapter in model.adapters().into_iter().rev() {
            model.delete_adapter(&adapter).unwrap();
        }
        assert!(
            layers
                .iter()
                .all(|l| each!(l, l => l.adapters()).is_empty())
        );
        assert_eq!(model.parameter_count().trainable, 0);
    });
    assert!(
        added.get() > 500 && refused.get() > 500,
        "{added:?} {refused:?}"
    );
}

/// A failure in the second layer gives the first one its weight back, bit for bit, and leaves an
/// adapter of that name alone that somebody gave a layer directly.
#[test]
fn a_failed_addition_leaves_no_trace() {
    let mut rng = seeded(5);
    let wide = LoraLinear::frozen(
        "a",
        Linear::new(random(&[9, 8], DType::F32, &mut rng), None),
    );
    let thin = LoraLinear::frozen(
        "b",
        Linear::new(random(&[9, 2], DType::F32, &mut rng), None),
    );
    let (wide, thin) = (wide.unwrap(), thin.unwrap());
    let mut model = LoraModel::new(&[&wide, &thin]).unwrap();
    let all = |r| LoraConfig::new(r, 4.0).with_targets(TargetModules::AllLinear);
    let weight = wide.base().weight().clone();
    for init in [Init::Pissa, Init::Olora] {
        let message = model
            .add_adapter("one", &all(4).with_init(init), &mut rng)
            .unwrap_err()
            .to_string();
        assert!(message.contains("layer b"), "{message}");
        assert_eq!(bits(wide.base().weight()), bits(&weight), "{init:?}");
        assert!(wide.adapters().is_empty() && thin.adapters().is_empty());
    }
    thin.add_adapter("one", &LoraConfig::new(2, 4.0), &mut rng)
        .unwrap();
    let message = model.add_adapter("one", &all(2), &mut rng).unwrap_err();
    assert!(matches!(message, Error::AdapterExists { .. }));
    assert!(wide.adapters().is_empty() && model.adapters().is_empty());
    assert_eq!(
        thin.adapters(),
        ["one"],
        "the adapter that was there is gone"
    );
}

#[test]
fn a_weight_that_is_not_finite_is_named() {
    let mut rng = seeded(6);
    let broken = Tensor::from_vec(vec![1f32, f32::NAN, 2.0, 3.0], (2, 2), &CPU).unwrap();
    for init in [Init::Pissa, Init::Olora] {
        let layer = LoraLinear::frozen("net.fc", Linear::new(broken.clone(), None)).unwrap();
        let config = LoraConfig::new(1, 4.0).with_init(init);
        let message = layer
            .add_adapter("one", &config, &mut rng)
            .unwrap_err()
            .to_string();
        assert!(message.contains("net.fc"), "{message}");
        assert!(layer.adapters().is_empty());
    }
}

#[test]
fn ids_outside_the_vocabulary_are_refused() {
    let mut rng = seeded(7);
    let table = |n: usize, rng: &mut ChaCha8Rng| {
        let base = Embedding::new(random(&[n, 3], DType::F32, rng), 3);
        let layer = LoraEmbedding::frozen("net.embed", base).unwrap();
        let config = LoraConfig::new(2, 4.0).with_init(Init::Random);
        layer.add_adapter("one", &config, rng).unwrap();
        layer
    };
    let layer = table(5, &mut rng);
    let tensors = [
        Tensor::new(&[0u32, 5], &CPU),
        Tensor::new(&[0u32, u32::MAX], &CPU),
        Tensor::new(&[0u8, 5], &CPU),
        Tensor::new(&[0u8, 255], &CPU),
        Tensor::new(&[0i64, 5], &CPU),
        Tensor::new(&[0i64, -1], &CPU),
        Tensor::new(&[0i64, i64::MIN], &CPU),
        Tensor::new(&[0i64, i64::MAX], &CPU),
    ];
    for (i, ids) in tensors.into_iter().enumerate() {
        let ids = ids.unwrap();
        for enabled in [true, false] {
            layer.enable_adapters(enabled);
            match calm("forward", || layer.forward_t(&ids, true)) {
                Ok(y) => panic!("tensor {i} gave {:?}", values(&y)),
                Err(error) => {
                    let message = error.to_string();
                    for part in ["net.embed", "[2]", "[5, 3]"] {
                        assert!(message.contains(part), "{message}");
                    }
                }
            }
        }
    }
    // The last id of a byte is an id.
    let layer = table(256, &mut rng);
    let of = |ids: Tensor| values(&layer.forward(&ids).unwrap());
    let byte = of(Tensor::new(&[255u8], &CPU).unwrap());
    assert_eq!(byte, of(Tensor::new(&[255u32], &CPU).unwrap()));
    assert!(byte.iter().any(|v| *v != 0.0));
}

/// A row of zeros has no direction: DoRA must not divide by its norm.
#[test]
fn dora_survives_a_weight_row_of_zeros() {
    let mut rng = seeded(8);
    for kind in KINDS {
        for dtype in [DType::F32, DType::F64, DType::F16] {
            let mut blueprint = plain(kind, dtype, &mut rng);
            (blueprint.conv, blueprint.bias) = ([1, 1, 1, 1], None);
            let out = if kind == Kind::Embedding { 1 } else { 0 };
            blueprint.weight[out] = 3;
            // The second output's weights are zero.
            let mask = Tensor::new(&[1f32, 0., 1.], &CPU)
                .unwrap()
                .to_dtype(dtype)
                .unwrap();
            let mut shape = vec![1; blueprint.weight.len()];
            shape[out] = 3;
            let mask = mask.reshape(shape).unwrap();
            let weight = random(&blueprint.weight, dtype, &mut rng);
            let weight = weight.broadcast_mul(&mask).unwrap();
            let layer = match kind {
                Kind::Linear => {
                    Layer::Linear(LoraLinear::frozen("a", Linear::new(weight, None)).unwrap())
                }
                Kind::Conv1 => {
                    let base = Conv1d::new(weight, None, Conv1dConfig::default());
                    Layer::Conv1(LoraConv1d::frozen("a", base).unwrap())
                }
                Kind::Conv2 => {
                    let base = Conv2d::new(weight, None, Conv2dConfig::default());
                    Layer::Conv2(LoraConv2d::frozen("a", base).unwrap())
                }
                Kind::Embedding => {
                    let base = Embedding::new(weight, 3);
                    Layer::Embedding(LoraEmbedding::frozen("a", base).unwrap())
                }
            };
            let config = LoraConfig::new(2, 4.0).with_dora(true);
            each!(&layer, l => l.add_adapter("one", &config, &mut rng)).unwrap();
            let x = fitting(&blueprint, 2, &mut rng);
            let finite = |t: &Tensor| values(t).iter().all(|v| v.is_finite());
            let what = format!("{kind:?} {dtype:?}");
            for learnt in [false, true] {
                let trainable = each!(&layer, l => l.trainable_parameters());
                if learnt {
                    for (_, var) in &trainable {
                        var.set(&random(var.dims(), var.dtype(), &mut rng)).unwrap();
                    }
                }
                let y = forward(&layer, &x, true).unwrap();
                assert!(finite(&y), "{what}: output");
                let loss = y.to_dtype(DType::F64).unwrap().sqr().unwrap();
                let grads = loss.sum_all().unwrap().backward().unwrap();
                for (name, var) in &trainable {
                    assert!(finite(grads.get(var).unwrap()), "{what}: {name}");
                }
                let (merged, weight, _) = merged(&layer, &x).unwrap();
                assert!(finite(&weight), "{what}: merged");
                let tolerance = if dtype == DType::F16 { 1e-2 } else { 1e-5 };
                assert!(gap(&merged, &y) < tolerance, "{what}: merged");
                each!(&layer, l => l.safe_merge()).unwrap();
                each!(&layer, l => l.unmerge());
            }
        }
    }
}

/// A base weight that does not lie in one piece is the same weight.
#[test]
fn a_transposed_weight_is_a_weight() {
    fn check<B: Base>(base: impl Fn(Tensor) -> B, weight: &Tensor, x: &Tensor)
    where
        LoraLayer<B>: Module,
    {
        assert!(!weight.is_contiguous());
        let output = |weight: Tensor| {
            let layer = LoraLayer::<B>::frozen("a", base(weight)).unwrap();
            for (name, dora) in [("one", false), ("two", true)] {
                let config = LoraConfig::new(2, 4.0)
                    .with_init(Init::Random)
                    .with_dora(dora);
                layer.add_adapter(name, &config, &mut seeded(1)).unwrap();
            }
            layer.set_adapter(&["one", "two"]).unwrap();
            let y = layer.forward(x).unwrap();
            layer.merge().unwrap();
            (y, layer.forward(x).unwrap())
        };
        let (apart, merged) = output(weight.clone());
        let (want, _) = output(weight.contiguous().unwrap());
        assert!(gap(&apart, &want) < 1e-6);
        assert!(gap(&merged, &want) < 1e-5);
    }
    let mut rng = seeded(9);
    let mut new = |shape: &[usize]| random(shape, DType::F32, &mut rng);
    let turned = |t: Tensor| t.transpose(0, 1).unwrap();
    check(
        |w| Linear::new(w, None),
        &turned(new(&[4, 3])),
        &new(&[2, 4]),
    );
    check(
        |w| Conv1d::new(w, None, Conv1dConfig::default()),
        &turned(new(&[4, 3, 3])),
        &new(&[2, 4, 6]),
    );
    check(
        |w| Conv2d::new(w, None, Conv2dConfig::default()),
        &turned(new(&[4, 3, 3, 2])),
        &new(&[2, 4, 6, 5]),
    );
    check(
        |w| ScaledEmbedding::from(Embedding::new(w, 3)),
        &turned(new(&[3, 6])),
        &Tensor::new(&[[0u32, 5], [2, 2]], &CPU).unwrap(),
    );
}
