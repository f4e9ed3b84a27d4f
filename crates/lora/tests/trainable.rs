//! Bases that train: every layer's own gradients, networks of `LoraBuilder::trainable`, adapters on
//! top, and what stays frozen where it should.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::HashMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{
    Conv1d, Conv1dConfig, Conv2d, Conv2dConfig, Embedding, Linear, Module, VarBuilder, VarMap,
};
use lora::ops::{cross_entropy, linear, linear_cross_entropy, rms_norm};
use lora::optim::{LoraOptimizer, ParameterGroup};
use lora::{
    Bias, Init, LoraBuilder, LoraConfig, LoraConv1d, LoraConv2d, LoraEmbedding, LoraLinear,
    LoraModel, ScaledEmbedding,
};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

const CPU: Device = Device::Cpu;

fn seeded(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

fn random(shape: &[usize], seed: u64) -> Tensor {
    let mut rng = seeded(seed);
    let numbers = (0..shape.iter().product()).map(|_| rng.random_range(-1.0f64..1.0));
    Tensor::from_vec(numbers.collect(), shape, &CPU).unwrap()
}

fn var(shape: &[usize], seed: u64) -> Var {
    Var::from_tensor(&random(shape, seed)).unwrap()
}

fn values(t: &Tensor) -> Vec<f64> {
    let t = t.flatten_all().unwrap().to_dtype(DType::F64).unwrap();
    t.to_vec1().unwrap()
}

fn gap(got: &Tensor, want: &Tensor) -> f64 {
    assert_eq!(got.dims(), want.dims(), "shapes");
    let (got, want) = (values(got), values(want));
    let largest = want.iter().fold(0f64, |m, v| m.max(v.abs()));
    let off = got
        .iter()
        .zip(&want)
        .fold(0f64, |m, (g, w)| m.max((g - w).abs()));
    if off == 0.0 { 0.0 } else { off / largest }
}

/// A number of which every output has a share of its own.
fn weighed(y: &Tensor) -> Tensor {
    let c = random(y.dims(), 99).to_dtype(y.dtype()).unwrap();
    (y.sqr().unwrap() * c).unwrap().sum_all().unwrap()
}

/// The gradient of each variable against central differences of the loss.
fn differences(what: &str, vars: &[(String, Var)], loss: &dyn Fn() -> Tensor) {
    const STEP: f64 = 1e-5;
    let gradients = loss().backward().unwrap();
    for (name, var) in vars {
        let before = values(var);
        let at = |i: usize, by: f64| {
            let mut moved = before.clone();
            moved[i] += by;
            var.set(&Tensor::from_vec(moved, var.dims(), &CPU).unwrap())
                .unwrap();
            loss().to_scalar::<f64>().unwrap()
        };
        let slope = |i| (at(i, STEP) - at(i, -STEP)) / (2.0 * STEP);
        let slopes: Vec<f64> = (0..before.len()).map(slope).collect();
        var.set(&Tensor::from_vec(before, var.dims(), &CPU).unwrap())
            .unwrap();
        let want = Tensor::from_vec(slopes, var.dims(), &CPU).unwrap();
        let got = gradients.get(var);
        let off = gap(
            got.unwrap_or_else(|| panic!("{what}: {name} has none")),
            &want,
        );
        assert!(off < 1e-7, "{what}: {name} is {off:e} from the differences");
    }
}

fn named(vars: &[(&str, &Var)]) -> Vec<(String, Var)> {
    let named = vars.iter();
    named.map(|(n, v)| (n.to_string(), (*v).clone())).collect()
}

/// Without an adapter, and with a random one on top, whose A and B train too.
macro_rules! trains {
    ($what:expr, $layer:expr, $x:expr, $vars:expr) => {{
        let (what, layer, x): (&str, _, &Tensor) = ($what, &$layer, $x);
        let mut vars: Vec<(String, Var)> = $vars;
        let pass = || weighed(&layer.forward_t(x, true).unwrap());
        differences(what, &vars, &pass);
        let config = LoraConfig::new(2, 3.0).with_init(Init::Random);
        layer
            .add_adapter("default", &config, &mut seeded(5))
            .unwrap();
        vars.extend(layer.trainable_parameters());
        differences(&format!("{what} with an adapter"), &vars, &pass);
    }};
}

#[test]
fn a_linear_layer_trains() {
    for biased in [false, true] {
        let (w, b) = (var(&[5, 3], 1), var(&[5], 2));
        let mut vars = named(&[("weight", &w)]);
        let bias = biased.then(|| b.as_tensor().clone());
        if biased {
            vars.extend(named(&[("bias", &b)]));
        }
        let base = Linear::new(w.as_tensor().clone(), bias);
        let layer = LoraLinear::unfrozen("fc", base).unwrap();
        let x = var(&[2, 4, 3], 3);
        vars.extend(named(&[("x", &x)]));
        trains!("linear", layer, &x, vars);
    }
    // A bias that trains alone.
    let b = var(&[5], 2);
    let base = Linear::new(random(&[5, 3], 1), Some(b.as_tensor().clone()));
    let layer = LoraLinear::unfrozen("fc", base).unwrap();
    assert_eq!(layer.parameter_count().trainable, 5);
    trains!(
        "a bias alone",
        layer,
        &random(&[4, 3], 3),
        named(&[("bias", &b)])
    );
}

#[test]
fn views_of_a_variable_train_it() {
    // As attention cuts its projections out of one tensor.
    let whole = var(&[9, 4], 1);
    let cut = |from| Linear::new(whole.narrow(0, from, 3).unwrap(), None);
    let layers: Vec<_> = [0, 3, 6]
        .map(|from| LoraLinear::unfrozen("fc", cut(from)).unwrap())
        .into();
    let x = random(&[5, 4], 2);
    let pass = || {
        let outputs: Vec<_> = layers.iter().map(|l| l.forward(&x).unwrap()).collect();
        weighed(&Tensor::cat(&outputs, 1).unwrap())
    };
    differences("a cut weight", &named(&[("whole", &whole)]), &pass);
    let turned = var(&[4, 3], 1);
    let base = Linear::new(turned.t().unwrap(), None);
    let layer = LoraLinear::unfrozen("fc", base).unwrap();
    let vars = named(&[("turned", &turned)]);
    trains!("a turned weight", layer, &x, vars);
}

#[test]
fn an_embedding_trains() {
    for scale in [1.0, 2.5] {
        let w = var(&[7, 3], 1);
        let base = ScaledEmbedding::from(Embedding::new(w.as_tensor().clone(), 3));
        let layer = LoraEmbedding::unfrozen("embed", base.with_embed_scale(scale)).unwrap();
        // Id 3 comes twice, and some never.
        let ids = Tensor::new(&[[3u32, 0, 6], [3, 5, 2]], &CPU).unwrap();
        trains!("embedding", layer, &ids, named(&[("weight", &w)]));
        let unused = weighed(&layer.forward(&ids).unwrap()).backward().unwrap();
        let row = unused.get(&w).unwrap().get(1).unwrap();
        assert_eq!(values(&row), [0.0; 3]);
    }
}

/// Kernel, stride, padding, dilation, groups, batch, sizes.
type Geometry = ([usize; 2], usize, usize, usize, usize, usize, [usize; 2]);

const GEOMETRIES: [Geometry; 11] = [
    ([3, 3], 1, 0, 1, 1, 3, [5, 5]),
    ([3, 3], 2, 1, 1, 1, 2, [5, 6]),
    ([2, 2], 3, 0, 1, 1, 2, [7, 6]),
    ([3, 3], 1, 2, 2, 1, 2, [5, 6]),
    ([2, 3], 2, 1, 3, 1, 2, [6, 9]),
    // Shorter than the padding and the stride.
    ([3, 3], 4, 2, 1, 1, 2, [1, 1]),
    ([1, 1], 1, 0, 1, 2, 3, [3, 4]),
    ([3, 3], 1, 1, 1, 2, 2, [4, 5]),
    ([3, 2], 2, 1, 2, 2, 2, [7, 6]),
    ([2, 2], 3, 2, 1, 4, 3, [5, 4]),
    // One group for each input.
    ([2, 2], 1, 0, 2, 4, 1, [5, 5]),
];

#[test]
fn convolutions_train() {
    for geometry in GEOMETRIES {
        let ([k, l], stride, padding, dilation, groups, batch, [height, width]) = geometry;
        for biased in [false, true] {
            let b = var(&[8], 2);
            let bias = biased.then(|| b.as_tensor().clone());
            let parts = |w: &Var, x: &Var| {
                let mut vars = named(&[("weight", w), ("x", x)]);
                vars.extend(named(&[("bias", &b)]).into_iter().filter(|_| biased));
                vars
            };
            let config = |r: usize| LoraConfig::new(r, 3.0).with_init(Init::Random);

            let w = var(&[8, 4 / groups, k], 1);
            let conv = Conv1dConfig {
                stride,
                padding,
                dilation,
                groups,
                ..Default::default()
            };
            let base = Conv1d::new(w.as_tensor().clone(), bias.clone(), conv);
            let layer = LoraConv1d::unfrozen("conv", base).unwrap();
            let x = var(&[batch, 4, height], 3);
            let pass = || weighed(&layer.forward(&x).unwrap());
            let mut vars = parts(&w, &x);
            differences(&format!("conv1d {geometry:?}"), &vars, &pass);
            if biased {
                let add = layer.add_adapter("default", &config(groups), &mut seeded(5));
                add.unwrap();
                vars.extend(layer.trainable_parameters());
                let what = format!("conv1d {geometry:?} with an adapter");
                differences(&what, &vars, &pass);
            }

            let w = var(&[8, 4 / groups, k, l], 1);
            let conv = Conv2dConfig {
                stride,
                padding,
                dilation,
                groups,
                ..Default::default()
            };
            let base = Conv2d::new(w.as_tensor().clone(), bias, conv);
            let layer = LoraConv2d::unfrozen("conv", base).unwrap();
            let x = var(&[batch, 4, height, width], 3);
            let pass = || weighed(&layer.forward(&x).unwrap());
            let mut vars = parts(&w, &x);
            differences(&format!("conv2d {geometry:?}"), &vars, &pass);
            if biased {
                let add = layer.add_adapter("default", &config(groups), &mut seeded(5));
                add.unwrap();
                vars.extend(layer.trainable_parameters());
                let what = format!("conv2d {geometry:?} with an adapter");
                differences(&what, &vars, &pass);
            }
        }
    }
}

/// An embedding, a convolution over the tokens, a norm, a linear layer, and the embedding again as
/// the output layer.
struct Net {
    embed: LoraEmbedding,
    conv: LoraConv1d,
    norm: Tensor,
    fc: LoraLinear,
}

const NAMES: [&str; 6] = [
    "conv.bias",
    "conv.weight",
    "embed.weight",
    "fc.bias",
    "fc.weight",
    "norm.weight",
];

impl Net {
    fn new(b: &LoraBuilder<'_>) -> lora::Result<Self> {
        let same = Conv1dConfig {
            padding: 1,
            ..Default::default()
        };
        Ok(Self {
            embed: b.pp("embed").embedding(6, 4)?,
            conv: b.pp("conv").conv1d(4, 4, 3, same)?,
            norm: b.pp("norm").vb().get(4, "weight")?,
            fc: b.pp("fc").linear(4, 4)?,
        })
    }

    fn weights() -> HashMap<String, Tensor> {
        let shapes: [(&str, &[usize]); 8] = [
            ("conv.bias", &[4]),
            ("conv.weight", &[4, 4, 3]),
            ("embed.weight", &[6, 4]),
            ("fc.bias", &[4]),
            ("fc.weight", &[4, 4]),
            ("norm.weight", &[4]),
            // Of a checkpoint, but not of the network.
            ("head.weight", &[6, 4]),
            ("rotary.inv_freq", &[2]),
        ];
        let random = |(i, (name, shape)): (usize, &(&str, &[usize]))| {
            (name.to_string(), random(shape, i as u64))
        };
        shapes.iter().enumerate().map(random).collect()
    }

    fn builder(trains: bool) -> LoraBuilder<'static> {
        let vb = VarBuilder::from_tensors(Self::weights(), DType::F64, &CPU);
        match trains {
            true => LoraBuilder::trainable(vb),
            false => LoraBuilder::new(vb),
        }
    }

    fn hidden(&self, ids: &Tensor) -> lora::Result<Tensor> {
        let h = self.embed.forward_t(ids, true)?.transpose(1, 2)?;
        let h = self.conv.forward_t(&h, true)?.transpose(1, 2)?;
        let h = rms_norm(&h, &self.norm, 1e-5)?;
        self.fc.forward_t(&h, true)
    }

    fn loss(&self, ids: &Tensor, next: &Tensor) -> lora::Result<Tensor> {
        let head = self.embed.base().embeddings().clone();
        linear_cross_entropy(&self.hidden(ids)?, &head, next)
    }

    fn tokens() -> (Tensor, Tensor) {
        let ids = Tensor::new(&[[0u32, 3, 3, 1], [5, 2, 0, 3]], &CPU).unwrap();
        let next = Tensor::new(&[[3i64, 3, 1, 4], [2, -100, 3, 5]], &CPU).unwrap();
        (ids, next)
    }
}

fn names(vars: &[(String, Var)]) -> Vec<&str> {
    vars.iter().map(|(name, _)| name.as_str()).collect()
}

#[test]
fn every_variable_of_a_network_trains() {
    let builder = Net::builder(true);
    let net = Net::new(&builder).unwrap();
    let vars = builder.variables();
    assert_eq!(names(&vars), NAMES);
    assert_eq!(builder.pp("anywhere").variables().len(), vars.len());
    let (ids, next) = Net::tokens();
    differences("net", &vars, &|| net.loss(&ids, &next).unwrap());

    // Both uses of the embedding add up: as where the logits are there as a whole.
    let once = net.loss(&ids, &next).unwrap();
    let logits = || -> lora::Result<Tensor> {
        let head = net.embed.base().embeddings().clone();
        linear(&net.hidden(&ids)?, &head, None)
    };
    let twice = cross_entropy(&logits().unwrap(), &next).unwrap();
    let (got, want) = (once.backward().unwrap(), twice.backward().unwrap());
    for (name, var) in &vars {
        let off = gap(got.get(var).unwrap(), want.get(var).unwrap());
        assert!(off < 1e-12, "{name}: {off:e}");
    }
}

#[test]
fn a_frozen_network_has_no_variable() {
    let builder = Net::builder(false);
    let net = Net::new(&builder).unwrap();
    assert!(builder.variables().is_empty());
    assert_eq!(builder.model().unwrap().parameter_count().trainable, 0);
    let (ids, next) = Net::tokens();
    assert!(!net.loss(&ids, &next).unwrap().track_op());

    // Not where there are variables behind it either, norms included.
    let map = VarMap::new();
    let vb = VarBuilder::from_varmap(&map, DType::F64, &CPU);
    let builder = LoraBuilder::new(vb.clone());
    let net = Net::new(&builder).unwrap();
    assert!(builder.variables().is_empty());
    assert!(!net.loss(&ids, &next).unwrap().track_op());
    let before = values(&net.norm);
    for var in map.all_vars() {
        var.set(&random(var.dims(), 8)).unwrap();
    }
    assert_eq!(values(&net.norm), before);
}

#[test]
fn variables_stay_the_ones_they_are() {
    let map = VarMap::new();
    let vb = VarBuilder::from_varmap(&map, DType::F64, &CPU);
    let builder = LoraBuilder::trainable(vb);
    let _net = Net::new(&builder).unwrap();
    let data = map.data().lock().unwrap();
    for (name, var) in builder.variables() {
        assert_eq!(var.id(), data[&name].id(), "{name}");
    }
    assert_eq!(builder.variables().len(), data.len());
}

#[test]
fn a_step_moves_the_network_and_not_where_it_came_from() {
    let weights = Net::weights();
    let vb = VarBuilder::from_tensors(weights.clone(), DType::F64, &CPU);
    let builder = LoraBuilder::trainable(vb);
    let net = Net::new(&builder).unwrap();
    let (ids, next) = Net::tokens();
    let loss = |net: &Net| net.loss(&ids, &next).unwrap();
    let first = loss(&net).to_scalar::<f64>().unwrap();
    let group = ParameterGroup::all(builder.variables(), 0.02);
    let mut optimizer = LoraOptimizer::new(vec![group]).unwrap();
    for _ in 0..60 {
        optimizer.backward_step(&loss(&net)).unwrap();
    }
    let last = loss(&net).to_scalar::<f64>().unwrap();
    assert!(last < 0.3 * first, "{first} to {last}");
    for (name, tensor) in Net::weights() {
        assert_eq!(values(&weights[&name]), values(&tensor), "{name}");
    }
    // What was trained is a checkpoint of the frozen network.
    let trained = builder.variables().into_iter();
    let trained: HashMap<_, _> = trained.map(|(n, v)| (n, v.as_tensor().clone())).collect();
    let vb = VarBuilder::from_tensors(trained, DType::F64, &CPU);
    let frozen = Net::new(&LoraBuilder::new(vb)).unwrap();
    assert_eq!(values(&loss(&frozen)), [last]);
}

#[test]
fn what_is_fetched_twice_is_one_variable() {
    for vb in [
        VarBuilder::from_tensors(Net::weights(), DType::F64, &CPU),
        VarBuilder::zeros(DType::F64, &CPU),
    ] {
        let builder = LoraBuilder::trainable(vb);
        let embed = builder.pp("embed").embedding(6, 4).unwrap();
        let head = builder.pp("embed").vb().get((6, 4), "weight").unwrap();
        assert_eq!(head.id(), embed.base().embeddings().id());
        assert_eq!(builder.variables().len(), 1);
        let half = builder.vb().set_dtype(DType::F32).pp("embed");
        let message = half.get((6, 4), "weight").unwrap_err().to_string();
        for word in ["embed.weight", "F64", "F32"] {
            assert!(message.contains(word), "{word} is missing in: {message}");
        }
    }
    // Zeros have any shape.
    let builder = LoraBuilder::trainable(VarBuilder::zeros(DType::F64, &CPU));
    let vb = builder.vb();
    vb.get((6, 4), "w").unwrap();
    assert!(vb.get((4, 6), "w").is_err());
}

#[test]
fn other_types() {
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let vb = VarBuilder::from_tensors(Net::weights(), dtype, &CPU);
        let builder = LoraBuilder::trainable(vb);
        let net = Net::new(&builder).unwrap();
        let (ids, next) = Net::tokens();
        let gradients = net.loss(&ids, &next).unwrap().backward().unwrap();
        let exact = Net::builder(true);
        let want = Net::new(&exact).unwrap().loss(&ids, &next).unwrap();
        let want = want.backward().unwrap();
        for ((name, var), (_, exact)) in builder.variables().iter().zip(exact.variables()) {
            assert_eq!(var.dtype(), dtype);
            let off = gap(gradients.get(var).unwrap(), want.get(&exact).unwrap());
            let bound = match dtype {
                DType::F32 => 1e-5,
                _ => 0.1,
            };
            assert!(off < bound, "{dtype:?} {name}: {off:e}");
        }
    }
    // Numbers that are no weights stay what they are.
    let places = Tensor::new(&[0u32, 1, 2], &CPU).unwrap();
    let tensors = HashMap::from([("places".to_string(), places)]);
    let builder = LoraBuilder::trainable(VarBuilder::from_tensors(tensors, DType::U32, &CPU));
    assert!(!builder.vb().get(3, "places").unwrap().is_variable());
    assert!(builder.variables().is_empty());
}

#[test]
fn counts_hold_all_that_trains() {
    let whole = 4 + 4 * 4 * 3 + 6 * 4 + 4 + 4 * 4 + 4;
    let pair = 2 * (4 + 4);
    for (trains, of_base) in [(false, 0), (true, whole)] {
        let builder = Net::builder(trains);
        let net = Net::new(&builder).unwrap();
        let mut model = builder.model().unwrap();
        let count = model.parameter_count();
        assert_eq!((count.trainable, count.all), (of_base, whole));
        let config = LoraConfig::new(2, 4.0).with_targets("fc");
        model
            .add_adapter("default", &config, &mut seeded(1))
            .unwrap();
        let count = model.parameter_count();
        assert_eq!((count.trainable, count.all), (of_base + pair, whole + pair));
        let adapters = model.trainable_parameters();
        let base = builder.variables();
        let numbers = adapters.iter().chain(&base);
        let numbers: usize = numbers.map(|(_, var)| var.elem_count()).sum();
        assert_eq!(numbers, count.trainable);
        assert_eq!(
            model.to_string().lines().count(),
            if trains { 4 } else { 2 }
        );
        assert_eq!(net.fc.adapters(), ["default"]);
    }
    // An adapter's own bias takes the place of the base's, which then does not train.
    let builder = Net::builder(true);
    let net = Net::new(&builder).unwrap();
    let config = LoraConfig {
        bias: Bias::LoraOnly,
        ..LoraConfig::new(2, 4.0)
    };
    net.fc
        .add_adapter("default", &config, &mut seeded(1))
        .unwrap();
    let count = net.fc.parameter_count();
    assert_eq!((count.trainable, count.all), (16 + pair + 4, 20 + pair + 4));
}

fn gradients_of(net: &Net) -> GradStore {
    let (ids, next) = Net::tokens();
    net.loss(&ids, &next).unwrap().backward().unwrap()
}

#[test]
fn adapters_of_every_kind_train_on_top() {
    let builder = Net::builder(true);
    let net = Net::new(&builder).unwrap();
    let mut model = builder.model().unwrap();
    let plain = LoraConfig::new(2, 4.0)
        .with_targets(["embed", "conv", "fc"])
        .with_init(Init::Random);
    for (name, config) in [
        ("plain", plain.clone()),
        ("dora", plain.clone().with_dora(true)),
        ("dropout", plain.clone().with_dropout(0.2)),
        ("rslora", plain.with_rslora(true)),
    ] {
        model.add_adapter(name, &config, &mut seeded(2)).unwrap();
        model.set_adapter(&[name]).unwrap();
        let gradients = gradients_of(&net);
        let base = builder.variables();
        for (part, var) in model.trainable_parameters().iter().chain(&base) {
            assert!(gradients.get(var).is_some(), "{name}: {part}");
        }
    }
    // Several rows with several adapters.
    let (ids, next) = Net::tokens();
    let mixed = |rows: &[&str]| -> Tensor {
        let pass = || net.loss(&ids, &next);
        model.with_adapters(rows, pass).unwrap().unwrap()
    };
    differences("mixed", &builder.variables(), &|| {
        mixed(&["plain", "rslora"])
    });
}

#[test]
fn a_weight_that_trains_is_not_rewritten() {
    let builder = Net::builder(true);
    let net = Net::new(&builder).unwrap();
    for init in [Init::Pissa, Init::Olora] {
        let config = LoraConfig::new(2, 4.0).with_init(init);
        let refused = net.fc.add_adapter("default", &config, &mut seeded(1));
        let message = refused.unwrap_err().to_string();
        assert!(message.contains("layer fc"), "{message}");
        assert!(message.contains("a weight that trains"), "{message}");
    }
    assert!(net.fc.adapters().is_empty());
}

#[test]
fn merging_takes_the_weight_as_it_is_then() {
    let (w, b) = (var(&[3, 4], 1), var(&[3], 2));
    let base = Linear::new(w.as_tensor().clone(), Some(b.as_tensor().clone()));
    let layer = LoraLinear::unfrozen("fc", base).unwrap();
    let x = random(&[5, 4], 3);
    let forward = |layer: &LoraLinear| layer.forward(&x).unwrap();
    let move_all = |seed| {
        w.set(&random(&[3, 4], seed)).unwrap();
        b.set(&random(&[3], seed)).unwrap();
    };
    // Without an adapter too, where merged is the base.
    for adapted in [false, true] {
        if adapted {
            let config = LoraConfig::new(2, 4.0).with_init(Init::Random);
            layer
                .add_adapter("default", &config, &mut seeded(4))
                .unwrap();
        }
        let apart = forward(&layer);
        let merged = layer.merged().unwrap();
        let parts = [merged.weight(), merged.bias().unwrap()];
        assert!(parts.iter().all(|t| !t.track_op()), "adapted: {adapted}");
        assert!(gap(&merged.forward(&x).unwrap(), &apart) < 1e-12);
        let before = values(&merged.forward(&x).unwrap());
        move_all(5);
        assert_eq!(values(&merged.forward(&x).unwrap()), before);
        move_all(6);
    }
    let apart = forward(&layer);
    layer.merge().unwrap();
    assert!(gap(&forward(&layer), &apart) < 1e-12);
    assert!(!forward(&layer).track_op());
    assert!(layer.forward_t(&x, true).is_err());
    layer.unmerge();
    assert_eq!(layer.base().weight().id(), w.id());
    assert_eq!(values(&forward(&layer)), values(&apart));
    let gradients = weighed(&forward(&layer)).backward().unwrap();
    assert!(gradients.get(&w).is_some() && gradients.get(&b).is_some());
    layer.delete_adapter("default").unwrap();
    assert_eq!(layer.base().weight().id(), w.id());
}

#[test]
fn layers_of_one_model_may_differ() {
    let w = var(&[3, 3], 1);
    let linear = || Linear::new(w.as_tensor().clone(), None);
    let trains = LoraLinear::unfrozen("a", linear()).unwrap();
    let frozen = LoraLinear::frozen("b", linear()).unwrap();
    let count = LoraModel::new(&[&trains, &frozen])
        .unwrap()
        .parameter_count();
    assert_eq!((count.trainable, count.all), (9, 18));
    let bad = Linear::new(random(&[3], 1), None);
    assert!(LoraLinear::unfrozen("a", bad).is_err());
    assert!(LoraLinear::unfrozen("", linear()).is_err());
}

/// A norm of candle's own, and a layer that was built elsewhere.
#[test]
fn parts_of_other_crates_train_too() -> Result<()> {
    let builder = LoraBuilder::trainable(VarBuilder::zeros(DType::F64, &CPU));
    let _norm = candle_nn::layer_norm(4, 1e-5, builder.pp("norm").vb())?;
    let head = candle_nn::linear(4, 2, builder.pp("head").vb())?;
    let head = builder.pp("head").noted(head).unwrap();
    assert!(head.base().weight().is_variable());
    let wanted = ["head.bias", "head.weight", "norm.bias", "norm.weight"];
    assert_eq!(names(&builder.variables()), wanted);
    let count = builder.model().unwrap().parameter_count();
    assert_eq!((count.trainable, count.all), (18, 18));
    Ok(())
}
