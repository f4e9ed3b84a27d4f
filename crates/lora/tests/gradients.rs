//! Every gradient of every layer and variant, against finite differences of formulas written out
//! in plain f64 loops, and what dropout does.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::needless_range_loop)]

use std::collections::HashMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Conv1d, Conv1dConfig, Conv2d, Conv2dConfig, Embedding, Linear};
use lora::{
    Adapter, AnyLayer, Bias, Init, LoraConfig, LoraConv1d, LoraConv2d, LoraEmbedding, LoraLinear,
    LoraModel, ScaledEmbedding, VeraConfig, VeraProjection,
};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

const CPU: Device = Device::Cpu;

fn seeded(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

fn numbers(n: usize, rng: &mut ChaCha8Rng) -> Vec<f64> {
    (0..n).map(|_| rng.random_range(-1.0..1.0)).collect()
}

fn random(shape: &[usize], rng: &mut ChaCha8Rng) -> Tensor {
    Tensor::from_vec(numbers(shape.iter().product(), rng), shape, &CPU).unwrap()
}

fn values(t: &Tensor) -> Vec<f64> {
    let t = t.flatten_all().unwrap().to_dtype(DType::F64).unwrap();
    t.to_vec1().unwrap()
}

/// The largest difference relative to the largest number wanted.
fn gap(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len(), "lengths");
    assert!(got.iter().all(|v| v.is_finite()), "not finite: {got:?}");
    let largest = want.iter().fold(0.0f64, |m, v| m.max(v.abs()));
    let pairs = got.iter().zip(want);
    let off = pairs.fold(0.0f64, |m, (g, w)| m.max((g - w).abs()));
    if off == 0.0 { 0.0 } else { off / largest }
}

/// The layers of the table.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Linear,
    /// Kernel, stride, padding, dilation, batch, length.
    Conv1(usize, usize, usize, usize, usize, usize),
    /// Kernel (height, width), stride, padding, dilation, groups, height, width.
    Conv2([usize; 2], usize, usize, usize, usize, usize, usize),
    /// `embed_scale`.
    Embedding(f64),
}

const KINDS: [Kind; 13] = [
    Kind::Linear,
    Kind::Conv1(3, 2, 1, 2, 2, 9),
    Kind::Conv1(3, 1, 0, 1, 3, 5),
    Kind::Conv1(2, 3, 0, 1, 2, 7),
    // An input shorter than the padding and the stride.
    Kind::Conv1(3, 4, 2, 1, 2, 1),
    Kind::Conv2([3, 3], 2, 1, 1, 1, 5, 5),
    // Height and width leave different remainders of the stride.
    Kind::Conv2([3, 3], 2, 1, 1, 1, 5, 6),
    Kind::Conv2([2, 3], 3, 2, 1, 1, 6, 4),
    Kind::Conv2([3, 3], 1, 1, 2, 1, 5, 5),
    Kind::Conv2([1, 1], 1, 0, 1, 1, 3, 4),
    Kind::Conv2([3, 3], 2, 1, 1, 2, 5, 6),
    Kind::Embedding(1.0),
    Kind::Embedding(2.5),
];

const IN: usize = 4;
const OUT: usize = 6;
const VOCABULARY: usize = 7;
/// Id 3 comes twice and id 1 never.
const IDS: [u32; 6] = [3, 0, 6, 3, 5, 2];

/// One of the four types of layers.
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

impl Kind {
    fn groups(self) -> usize {
        match self {
            Kind::Conv2(_, _, _, _, groups, _, _) => groups,
            _ => 1,
        }
    }

    fn weight_shape(self) -> Vec<usize> {
        match self {
            Kind::Linear => vec![OUT, IN],
            Kind::Conv1(k, ..) => vec![OUT, IN, k],
            Kind::Conv2([h, w], _, _, _, groups, ..) => vec![OUT, IN / groups, h, w],
            Kind::Embedding(_) => vec![VOCABULARY, OUT],
        }
    }

    fn input_shape(self) -> Vec<usize> {
        match self {
            Kind::Linear => vec![2, 3, IN],
            Kind::Conv1(_, _, _, _, batch, length) => vec![batch, IN, length],
            Kind::Conv2(.., height, width) => vec![2, IN, height, width],
            Kind::Embedding(_) => vec![2, 3],
        }
    }

    fn frozen(self, name: &str, rng: &mut ChaCha8Rng) -> Layer {
        let weight = random(&self.weight_shape(), rng);
        let bias = Some(random(&[OUT], rng));
        match self {
            Kind::Linear => {
                Layer::Linear(LoraLinear::frozen(name, Linear::new(weight, bias)).unwrap())
            }
            Kind::Conv1(_, stride, padding, dilation, ..) => {
                let config = Conv1dConfig {
                    stride,
                    padding,
                    dilation,
                    ..Default::default()
                };
                let base = Conv1d::new(weight, bias, config);
                Layer::Conv1(LoraConv1d::frozen(name, base).unwrap())
            }
            Kind::Conv2(_, stride, padding, dilation, groups, ..) => {
                let config = Conv2dConfig {
                    stride,
                    padding,
                    dilation,
                    groups,
                    ..Default::default()
                };
                let base = Conv2d::new(weight, bias, config);
                Layer::Conv2(LoraConv2d::frozen(name, base).unwrap())
            }
            Kind::Embedding(scale) => {
                let base = ScaledEmbedding::from(Embedding::new(weight, OUT));
                let base = base.with_embed_scale(scale);
                Layer::Embedding(LoraEmbedding::frozen(name, base).unwrap())
            }
        }
    }

    fn input(self, rng: &mut ChaCha8Rng) -> Tensor {
        match self {
            Kind::Embedding(_) => Tensor::from_slice(&IDS, (2, 3), &CPU).unwrap(),
            _ => random(&self.input_shape(), rng),
        }
    }

    /// For each output position and each weight of one output the input it meets.
    fn geometry(self) -> Geometry {
        let mut taps = vec![];
        let place = |out: usize, stride: usize, k: usize, dilation: usize, padding: usize| {
            (out * stride + k * dilation).checked_sub(padding)
        };
        let outputs = |size: usize, k: usize, stride: usize, padding: usize, dilation: usize| {
            (size + 2 * padding - dilation * (k - 1) - 1) / stride + 1
        };
        match self {
            Kind::Linear => {
                for (position, i) in (0..6).flat_map(|p| (0..IN).map(move |i| (p, i))) {
                    taps.push((position, i, position * IN + i));
                }
                Geometry::new(taps, 6, 1, IN, 1.0, 1)
            }
            Kind::Embedding(scale) => {
                // One-hot: the ids index into a row of ones behind no input at all.
                for (position, id) in IDS.iter().enumerate() {
                    taps.push((position, *id as usize, usize::MAX));
                }
                Geometry::new(taps, 6, 1, VOCABULARY, scale, 1)
            }
            Kind::Conv1(k, stride, padding, dilation, batch, length) => {
                let out = outputs(length, k, stride, padding, dilation);
                for b in 0..batch {
                    for o in 0..out {
                        for i in 0..IN {
                            for t in 0..k {
                                match place(o, stride, t, dilation, padding) {
                                    Some(at) if at < length => taps.push((
                                        b * out + o,
                                        i * k + t,
                                        (b * IN + i) * length + at,
                                    )),
                                    _ => {}
                                }
                            }
                        }
                    }
                }
                Geometry::new(taps, batch * out, out, IN * k, 1.0, 1)
            }
            Kind::Conv2([kh, kw], stride, padding, dilation, groups, height, width) => {
                let (oh, ow) = (
                    outputs(height, kh, stride, padding, dilation),
                    outputs(width, kw, stride, padding, dilation),
                );
                for (b, y, x) in product(2, oh, ow) {
                    for (i, k, l) in product(IN, kh, kw) {
                        let row = place(y, stride, k, dilation, padding);
                        let column = place(x, stride, l, dilation, padding);
                        if let (Some(row), Some(column)) = (row, column)
                            && row < height
                            && column < width
                        {
                            taps.push((
                                (b * oh + y) * ow + x,
                                (i * kh + k) * kw + l,
                                ((b * IN + i) * height + row) * width + column,
                            ));
                        }
                    }
                }
                Geometry::new(taps, 2 * oh * ow, oh * ow, IN * kh * kw, 1.0, groups)
            }
        }
    }
}

fn product(a: usize, b: usize, c: usize) -> impl Iterator<Item = (usize, usize, usize)> {
    (0..a).flat_map(move |i| (0..b).flat_map(move |j| (0..c).map(move |k| (i, j, k))))
}

/// A layer as a matrix product: which numbers of the input each output position sees.
struct Geometry {
    /// Position, feature, index in the input (`usize::MAX`: a one).
    taps: Vec<(usize, usize, usize)>,
    positions: usize,
    /// Positions of one row of the batch; output channels lie before them.
    spatial: usize,
    features: usize,
    scale: f64,
    groups: usize,
}

impl Geometry {
    fn new(
        taps: Vec<(usize, usize, usize)>,
        positions: usize,
        spatial: usize,
        features: usize,
        scale: f64,
        groups: usize,
    ) -> Self {
        Self {
            taps,
            positions,
            spatial,
            features,
            scale,
            groups,
        }
    }

    /// (positions, features) of an input.
    fn unfold(&self, x: &[f64]) -> Vec<f64> {
        let mut u = vec![0.0; self.positions * self.features];
        for (position, feature, index) in &self.taps {
            let value = x.get(*index).copied().unwrap_or(1.0);
            u[position * self.features + feature] = value;
        }
        u
    }

    /// Where output `o` of a position lies in the flat output.
    fn at(&self, position: usize, o: usize) -> usize {
        let (row, place) = (position / self.spatial, position % self.spatial);
        (row * OUT + o) * self.spatial + place
    }
}

/// What an adapter of the reference is made of.
#[derive(Clone, Debug)]
struct Spec {
    name: &'static str,
    r: usize,
    scaling: f64,
    dora: bool,
    /// VeRA's A (r, in) and B (out, r).
    vera: Option<(Vec<f64>, Vec<f64>)>,
}

/// The variables by "adapter.part", or the values in their place.
type Values = HashMap<String, Vec<f64>>;

struct Reference {
    geometry: Geometry,
    /// (out, features / groups).
    weight: Vec<f64>,
    bias: Vec<f64>,
    specs: Vec<Spec>,
    /// DoRA's norms by adapter, which no gradient flows through.
    norms: HashMap<&'static str, Vec<f64>>,
}

impl Reference {
    /// ‖W + s B A‖ of each output for the values that hold now.
    fn hold_norms(&mut self, values: &Values) {
        let features = self.geometry.features;
        for spec in self.specs.iter().filter(|spec| spec.dora) {
            let (a, b) = (
                &values[&format!("{}.a", spec.name)],
                &values[&format!("{}.b", spec.name)],
            );
            let norm = |o: usize| -> f64 {
                let entry = |f: usize| {
                    let ba: f64 = (0..spec.r)
                        .map(|k| b[o * spec.r + k] * a[k * features + f])
                        .sum();
                    self.weight[o * features + f] + spec.scaling * ba
                };
                (0..features).map(|f| entry(f).powi(2)).sum::<f64>().sqrt()
            };
            self.norms.insert(spec.name, (0..OUT).map(norm).collect());
        }
    }

    fn output(&self, x: &[f64], values: &Values) -> Vec<f64> {
        let g = &self.geometry;
        let u = g.unfold(x);
        let weight = values.get("base.weight").unwrap_or(&self.weight);
        let bias = values.get("base.bias").unwrap_or(&self.bias);
        let (fan, block) = (g.features / g.groups, OUT / g.groups);
        let mut y = vec![0.0; g.positions * OUT];
        for p in 0..g.positions {
            for o in 0..OUT {
                let first = (o / block) * fan;
                let sum: f64 = (0..fan)
                    .map(|f| weight[o * fan + f] * u[p * g.features + first + f])
                    .sum();
                y[g.at(p, o)] = g.scale * sum + bias[o];
            }
        }
        for spec in &self.specs {
            for p in 0..g.positions {
                for o in 0..OUT {
                    let seen = &u[p * g.features..(p + 1) * g.features];
                    let thin = self.thin(spec, values, seen, o);
                    let y = &mut y[g.at(p, o)];
                    *y = match self.norms.get(spec.name) {
                        Some(norms) => {
                            let m = values[&format!("{}.magnitude", spec.name)][o];
                            bias[o] + m / norms[o] * (*y - bias[o] + thin)
                        }
                        None => *y + thin,
                    };
                }
            }
        }
        y
    }

    /// Output `o` of the update alone.
    fn thin(&self, spec: &Spec, values: &Values, seen: &[f64], o: usize) -> f64 {
        let get = |part: &str| values.get(&format!("{}.{part}", spec.name));
        let dot = |a: &[f64], k: usize| -> f64 {
            seen.iter()
                .zip(&a[k * seen.len()..])
                .map(|(x, a)| x * a)
                .sum()
        };
        if let Some((a, b)) = &spec.vera {
            let (d, lambda_b) = (get("lambda_d").unwrap(), get("lambda_b").unwrap());
            let sum: f64 = (0..spec.r)
                .map(|k| b[o * spec.r + k] * d[k] * dot(a, k))
                .sum();
            return lambda_b[o] * sum;
        }
        let Some(a) = get("a") else { return 0.0 };
        let b = get("b").unwrap();
        let groups = self.geometry.groups;
        let (ranks, first) = (spec.r / groups, o / (OUT / groups) * (spec.r / groups));
        let sum: f64 = (0..ranks)
            .map(|k| b[o * ranks + k] * dot(a, first + k))
            .sum();
        let bias = get("bias").map_or(0.0, |bias| bias[o]);
        self.geometry.scale * spec.scaling * sum + spec.scaling * bias
    }
}

/// The variants of the table.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Variant {
    Plain,
    RsLora,
    Dora,
    LoraBias,
    Vera,
    Pissa,
    Olora,
    Orthogonal,
    /// A LoRA, then a DoRA on top of it.
    Two,
    /// The other order, with biases on the LoRA.
    TwoTurned,
    /// `modules_to_save`.
    Saved,
    /// `bias = "lora_only"`.
    OwnBias,
    /// `bias = "lora_only"` with DoRA.
    OwnBiasDora,
    /// `bias = "all"` on a layer that is no target.
    OnlyBias,
}

const VARIANTS: [Variant; 14] = [
    Variant::Plain,
    Variant::RsLora,
    Variant::Dora,
    Variant::LoraBias,
    Variant::Vera,
    Variant::Pissa,
    Variant::Olora,
    Variant::Orthogonal,
    Variant::Two,
    Variant::TwoTurned,
    Variant::Saved,
    Variant::OwnBias,
    Variant::OwnBiasDora,
    Variant::OnlyBias,
];

impl Variant {
    /// Whether this kind of layer has it.
    fn fits(self, kind: Kind) -> bool {
        let (linear, embedding) = (kind == Kind::Linear, matches!(kind, Kind::Embedding(_)));
        match self {
            Variant::Plain | Variant::RsLora | Variant::Saved => true,
            Variant::Vera | Variant::Pissa | Variant::Olora | Variant::Orthogonal => linear,
            Variant::Dora | Variant::Two => kind.groups() == 1,
            Variant::TwoTurned | Variant::OwnBiasDora => kind.groups() == 1 && !embedding,
            Variant::LoraBias | Variant::OwnBias | Variant::OnlyBias => !embedding,
        }
    }
}

/// A layer of one kind with adapters of one variant, its variables at random values.
struct Setup {
    layer: Layer,
    variables: Vec<(String, Var)>,
    reference: Reference,
}

fn setup(kind: Kind, variant: Variant, rng: &mut ChaCha8Rng) -> Setup {
    let layer = kind.frozen("net.case", rng);
    let mut specs = vec![];
    let mut add = |name: &'static str, config: LoraConfig, rng: &mut ChaCha8Rng| {
        each!(&layer, l => l.add_adapter(name, &config, rng)).unwrap();
        // The scaling, written out again.
        let r = config.r as f64;
        specs.push(Spec {
            name,
            r: config.r,
            scaling: config.lora_alpha / if config.use_rslora { r.sqrt() } else { r },
            dora: config.use_dora,
            vera: None,
        });
    };
    let plain = LoraConfig::new(2, 3.0);
    match variant {
        Variant::Plain => add("one", plain, rng),
        Variant::RsLora => add("one", plain.with_rslora(true), rng),
        Variant::Dora => add("one", plain.with_dora(true), rng),
        Variant::LoraBias => add("one", plain.with_lora_bias(true), rng),
        Variant::Pissa => add("one", plain.with_init(Init::Pissa), rng),
        Variant::Olora => add("one", plain.with_init(Init::Olora), rng),
        Variant::Orthogonal => add("one", plain.with_init(Init::Orthogonal), rng),
        Variant::Two => {
            add("one", plain, rng);
            add("two", LoraConfig::new(3, 1.5).with_dora(true), rng);
        }
        Variant::TwoTurned => {
            add("two", LoraConfig::new(3, 1.5).with_dora(true), rng);
            add("one", plain.with_lora_bias(true), rng);
        }
        Variant::OwnBias | Variant::OwnBiasDora => {
            let config = LoraConfig {
                bias: Bias::LoraOnly,
                use_dora: variant == Variant::OwnBiasDora,
                ..plain
            };
            add("one", config, rng);
        }
        Variant::Vera => {
            let shared = VeraProjection::new(5, IN + 2, OUT + 1, DType::F64, &CPU, rng).unwrap();
            let config = VeraConfig {
                r: 5,
                ..Default::default()
            };
            each!(&layer, l => l.add_vera("one", &config, &shared, rng)).unwrap();
            let part = |t: &Tensor, dim| {
                let size = if dim == 1 { IN } else { OUT };
                values(&t.narrow(dim, 0, size).unwrap())
            };
            specs.push(Spec {
                name: "one",
                r: 5,
                scaling: 1.0,
                dora: false,
                vera: Some((part(shared.a(), 1), part(shared.b(), 0))),
            });
        }
        Variant::Saved | Variant::OnlyBias => {
            let other = Kind::Linear.frozen("net.other", rng);
            let config = LoraConfig {
                modules_to_save: match variant {
                    Variant::Saved => vec!["case".to_string()],
                    _ => vec![],
                },
                bias: match variant {
                    Variant::OnlyBias => Bias::All,
                    _ => Bias::None,
                },
                ..plain.with_targets("other")
            };
            let layers: [&dyn AnyLayer; 2] =
                [each!(&layer, l => l as _), each!(&other, l => l as _)];
            let mut model = LoraModel::new(&layers).unwrap();
            model.add_adapter("one", &config, rng).unwrap();
            assert_eq!(each!(&layer, l => l.active_adapters()), ["one"]);
        }
    }
    let names: Vec<&str> = specs.iter().map(|spec| spec.name).collect();
    if !names.is_empty() {
        each!(&layer, l => l.set_adapter(&names)).unwrap();
    }

    let mut variables: Vec<(String, Var)> = vec![];
    for name in &names {
        let adapter: Adapter = each!(&layer, l => l.adapter(name)).unwrap();
        let parts = [
            ("a", adapter.lora_a()),
            ("b", adapter.lora_b()),
            ("magnitude", adapter.magnitude()),
            ("bias", adapter.lora_bias()),
            ("lambda_d", adapter.vera_lambdas().map(|l| l.0)),
            ("lambda_b", adapter.vera_lambdas().map(|l| l.1)),
        ];
        for (part, var) in parts {
            variables.extend(var.map(|var| (format!("{name}.{part}"), var.clone())));
        }
    }
    let trainable = each!(&layer, l => l.trainable_parameters());
    for (name, var) in &trainable {
        let path = name.strip_prefix("base_model.model.net.case.").unwrap();
        match path {
            "weight" => variables.push(("base.weight".to_string(), var.clone())),
            "bias" | "base_layer.bias" => variables.push(("base.bias".to_string(), var.clone())),
            _ => {}
        }
    }
    assert_eq!(
        variables.len(),
        trainable.len(),
        "{kind:?} {variant:?}: {trainable:?}"
    );
    for (_, var) in &trainable {
        assert!(variables.iter().any(|(_, v)| v.id() == var.id()));
        // Near where it was: PiSSA's and OLoRA's pairs stay what they are, and nothing is zero.
        let moved = (var.as_tensor() + (random(var.dims(), rng) * 0.4).unwrap()).unwrap();
        var.set(&moved).unwrap();
    }

    let (mut weight, bias) = base(&layer);
    if matches!(kind, Kind::Embedding(_)) {
        weight = weight.t().unwrap();
    }
    let mut reference = Reference {
        geometry: kind.geometry(),
        weight: values(&weight),
        bias: bias.map_or(vec![0.0; OUT], |b| values(&b)),
        specs,
        norms: HashMap::new(),
    };
    let now = current(kind, &variables);
    reference.hold_norms(&now);
    Setup {
        layer,
        variables,
        reference,
    }
}

/// The variables' values as the reference wants them.
fn current(kind: Kind, variables: &[(String, Var)]) -> Values {
    let turned = |name: &str, t: &Tensor| match (kind, name) {
        (Kind::Embedding(_), "base.weight") => t.t().unwrap(),
        _ => t.clone(),
    };
    variables
        .iter()
        .map(|(name, var)| (name.clone(), values(&turned(name, var.as_tensor()))))
        .collect()
}

/// Σ c y + y²/4: curved, so that a wrong output shows in the gradient too.
fn loss(y: &[f64], c: &[f64]) -> f64 {
    y.iter().zip(c).map(|(y, c)| c * y + 0.25 * y * y).sum()
}

/// Central differences of `f` at `at`.
fn differences(at: &[f64], mut f: impl FnMut(&[f64]) -> f64) -> Vec<f64> {
    const STEP: f64 = 1e-5;
    let mut point = at.to_vec();
    (0..at.len())
        .map(|i| {
            point[i] = at[i] + STEP;
            let up = f(&point);
            point[i] = at[i] - STEP;
            let down = f(&point);
            point[i] = at[i];
            (up - down) / (2.0 * STEP)
        })
        .collect()
}

fn gradients(layer: &Layer, x: &Tensor, c: &[f64]) -> (Vec<f64>, GradStore) {
    let y = each!(layer, l => l.forward_t(x, true)).unwrap();
    let c = Tensor::from_slice(c, y.shape(), &CPU).unwrap();
    let loss = ((&y * c).unwrap() + (y.sqr().unwrap() * 0.25).unwrap()).unwrap();
    let grads = loss.sum_all().unwrap().backward().unwrap();
    (values(&y), grads)
}

/// Compares every gradient of one layer; what is wrong goes to `failures`.
fn check(kind: Kind, variant: Variant, failures: &mut Vec<String>) -> usize {
    let what = format!("{kind:?} {variant:?}");
    let mut rng = seeded(11);
    let Setup {
        layer,
        variables,
        reference,
    } = setup(kind, variant, &mut rng);
    let x = kind.input(&mut rng);
    let floats = !matches!(kind, Kind::Embedding(_));
    let input = if floats {
        Var::from_tensor(&x).unwrap().as_tensor().clone()
    } else {
        x.clone()
    };
    let c = numbers(reference.geometry.positions * OUT, &mut rng);
    let now = current(kind, &variables);
    let numbers_of_x = if floats { values(&x) } else { vec![] };

    let (y, grads) = gradients(&layer, &input, &c);
    let off = gap(&y, &reference.output(&numbers_of_x, &now));
    if off > 1e-12 {
        failures.push(format!("{what}: output off by {off:e}"));
    }
    let mut checked = 0;
    let mut compare = |name: &str, grad: Option<&Tensor>, want: Vec<f64>| {
        checked += 1;
        assert!(
            want.iter().any(|g| g.abs() > 1e-3),
            "{what}: {name}: nothing to see"
        );
        match grad.map(|grad| gap(&values(grad), &want)) {
            None => failures.push(format!("{what}: {name} has no gradient")),
            Some(off) if off > 1e-6 => failures.push(format!("{what}: {name} off by {off:.2}")),
            Some(_) => {}
        }
    };
    for (name, var) in &variables {
        let want = differences(&now[name], |point| {
            let mut moved = now.clone();
            moved.insert(name.clone(), point.to_vec());
            loss(&reference.output(&numbers_of_x, &moved), &c)
        });
        let turned = match (kind, name.as_str()) {
            (Kind::Embedding(_), "base.weight") => grads.get(var).map(|g| g.t().unwrap()),
            _ => grads.get(var).cloned(),
        };
        compare(name, turned.as_ref(), want);
    }
    if floats {
        let output = |point: &[f64]| loss(&reference.output(point, &now), &c);
        compare("x", grads.get(&input), differences(&numbers_of_x, output));
    }

    // The base gets none, whether or not the input has one.
    for x in [&input, &x] {
        let (_, grads) = gradients(&layer, x, &c);
        let (weight, bias) = base(&layer);
        if grads.get(&weight).is_some() || bias.iter().any(|b| grads.get(b).is_some()) {
            failures.push(format!("{what}: the base has a gradient"));
        }
        assert!(
            !weight.is_variable() && !weight.track_op(),
            "{what}: weight"
        );
        assert!(bias.is_none_or(|b| !b.track_op()), "{what}: bias");
    }
    checked
}

/// The whole table: every variable and the input, against finite differences.
#[test]
fn every_gradient_is_that_of_the_formula() {
    let (mut failures, mut checked) = (vec![], 0);
    for kind in KINDS {
        for variant in VARIANTS.into_iter().filter(|v| v.fits(kind)) {
            checked += check(kind, variant, &mut failures);
        }
    }
    assert!(
        failures.is_empty(),
        "{} wrong:\n{}",
        failures.len(),
        failures.join("\n")
    );
    assert!(checked > 350, "only {checked} gradients checked");
}

/// Kernels, strides, paddings and dilations that leave every kind of remainder.
#[test]
fn convolutions_of_every_geometry_have_their_gradients() {
    let (mut failures, mut checked) = (vec![], 0);
    for (k, stride, padding) in product(3, 3, 3).map(|(k, s, p)| (k + 1, s + 1, p)) {
        for dilation in [1, 2] {
            for (height, width) in [(5, 6), (4, 3)] {
                let reach = dilation * (k - 1) + 1;
                let mut kinds = vec![];
                if reach <= width {
                    kinds.push(Kind::Conv1(k, stride, padding, dilation, 2, width));
                    let kernel = [k, 1 + k % 2];
                    kinds.push(Kind::Conv2(
                        kernel, stride, padding, dilation, 1, height, width,
                    ));
                }
                for kind in kinds {
                    checked += check(kind, Variant::Saved, &mut failures);
                    checked += check(kind, Variant::Plain, &mut failures);
                }
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert!(checked > 500, "only {checked} gradients checked");
}

/// Why the layers bring gradients of their own. When this fails, candle has been repaired: drop
/// the workaround in `ops/convolution/composed.rs`.
#[test]
fn candle_still_gets_these_gradients_wrong() {
    let mut rng = seeded(5);
    let mut var = |shape: &[usize]| Var::from_tensor(&random(shape, &mut rng)).unwrap();
    // y = w x for one position: dw = Σ x and dx = Σ w.
    let (x, w) = (var(&[2, 3, 1]), var(&[4, 3, 1]));
    let y = x.conv1d(&w, 0, 1, 1, 1).unwrap();
    let grads = y.sum_all().unwrap().backward().unwrap();
    let (dx, dw) = (grads.get(&x).unwrap(), grads.get(&w).unwrap());
    let (sum_x, sum_w) = (values(&x.sum(0).unwrap()), values(&w.sum(0).unwrap()));
    // A gradient of ones hides what goes wrong, one of other numbers does not.
    assert!(gap(&values(dw), &[&sum_x[..]; 4].concat()) < 1e-12);
    assert!(gap(&values(dx), &[&sum_w[..]; 2].concat()) < 1e-12);
    let c = var(&[2, 4, 1]);
    let grads = (&y * c.as_tensor()).unwrap().sum_all().unwrap();
    let grads = grads.backward().unwrap();
    let flat = |t: &Var| t.flatten_from(1).unwrap();
    let want_w = flat(&c).t().unwrap().matmul(&flat(&x)).unwrap();
    let want_x = flat(&c).matmul(&flat(&w)).unwrap();
    assert!(gap(&values(grads.get(&w).unwrap()), &values(&want_w)) > 0.1);
    assert!(gap(&values(grads.get(&x).unwrap()), &values(&want_x)) > 0.1);

    // Height and width with different remainders of the stride.
    let (x, w) = (var(&[1, 1, 5, 6]), var(&[1, 1, 3, 3]));
    let y = x.conv2d(&w, 1, 2, 1, 1).unwrap();
    assert!(y.sum_all().unwrap().backward().is_err());
}

/// The frozen weight, as the layer holds it, and the bias.
fn base(layer: &Layer) -> (Tensor, Option<Tensor>) {
    match layer {
        Layer::Linear(l) => (l.base().weight().clone(), l.base().bias().cloned()),
        Layer::Conv1(l) => (l.base().weight().clone(), l.base().bias().cloned()),
        Layer::Conv2(l) => (l.base().weight().clone(), l.base().bias().cloned()),
        Layer::Embedding(l) => (l.base().embeddings().clone(), None),
    }
}

#[test]
fn the_same_seed_drops_the_same_numbers() {
    for kind in KINDS {
        let outputs = |seed: u64, train: bool| -> Vec<Vec<f64>> {
            let layer = kind.frozen("case", &mut seeded(1));
            let config = LoraConfig::new(2, 4.0).with_dropout(0.4);
            let config = config.with_init(Init::Random);
            each!(&layer, l => l.add_adapter("one", &config, &mut seeded(seed))).unwrap();
            // Only the masks depend on the seed now.
            let adapter = each!(&layer, l => l.adapter("one")).unwrap();
            for var in [adapter.lora_a().unwrap(), adapter.lora_b().unwrap()] {
                var.set(&random(var.dims(), &mut seeded(2))).unwrap();
            }
            let x = kind.input(&mut seeded(3));
            let pass = || each!(&layer, l => l.forward_t(&x, train)).unwrap();
            (0..3).map(|_| values(&pass())).collect()
        };
        let trained = outputs(7, true);
        assert_eq!(trained, outputs(7, true), "{kind:?}: one seed");
        let eval = outputs(7, false);
        assert_eq!(eval, outputs(8, false), "{kind:?}: evaluation drops");
        assert_eq!(eval[0], eval[1], "{kind:?}: evaluation drops");
        if matches!(kind, Kind::Embedding(_)) {
            assert_eq!(trained, eval, "an embedding has nothing to drop");
        } else {
            assert_ne!(trained, outputs(8, true), "{kind:?}: two seeds");
            assert_ne!(trained[0], trained[1], "{kind:?}: two passes");
            assert_ne!(trained[0], eval[0], "{kind:?}: nothing dropped");
        }
    }
}

#[test]
fn evaluation_is_as_if_there_were_no_dropout() {
    for kind in KINDS {
        for dora in [false, true] {
            if dora && kind.groups() > 1 {
                continue;
            }
            let output = |p: f64| {
                let mut rng = seeded(4);
                let layer = kind.frozen("case", &mut rng);
                let config = LoraConfig::new(2, 4.0).with_dropout(p).with_dora(dora);
                let config = config.with_init(Init::Random);
                each!(&layer, l => l.add_adapter("one", &config, &mut rng)).unwrap();
                let x = kind.input(&mut seeded(3));
                values(&each!(&layer, l => l.forward_t(&x, false)).unwrap())
            };
            assert_eq!(output(0.7), output(0.0), "{kind:?} DoRA {dora}");
        }
    }
}

#[test]
fn dropout_is_right_on_average() {
    const PASSES: usize = 2000;
    let mut rng = seeded(21);
    for kind in [KINDS[0], KINDS[1], KINDS[6], KINDS[10]] {
        for variant in [Variant::Plain, Variant::LoraBias, Variant::Dora] {
            if !variant.fits(kind) {
                continue;
            }
            let what = format!("{kind:?} {variant:?}");
            let layer = kind.frozen("case", &mut rng);
            let config = LoraConfig::new(2, 4.0)
                .with_init(Init::Random)
                .with_dropout(0.3)
                .with_dora(variant == Variant::Dora)
                .with_lora_bias(variant == Variant::LoraBias);
            each!(&layer, l => l.add_adapter("one", &config, &mut rng)).unwrap();
            let x = kind.input(&mut rng);
            let pass = |train| values(&each!(&layer, l => l.forward_t(&x, train)).unwrap());
            each!(&layer, l => l.enable_adapters(false));
            let bare = pass(false);
            each!(&layer, l => l.enable_adapters(true));
            // The adapter's part alone.
            let part =
                |y: Vec<f64>| -> Vec<f64> { y.iter().zip(&bare).map(|(y, b)| y - b).collect() };
            let want = part(pass(false));
            let (mut sum, mut squares) = (vec![0.0; want.len()], vec![0.0; want.len()]);
            for _ in 0..PASSES {
                for (i, y) in part(pass(true)).into_iter().enumerate() {
                    sum[i] += y;
                    squares[i] += y * y;
                }
            }
            let n = PASSES as f64;
            let largest = want.iter().fold(0.0f64, |m, v| m.max(v.abs()));
            for i in 0..want.len() {
                let mean = sum[i] / n;
                let error = ((squares[i] / n - mean * mean).max(0.0) / n).sqrt();
                assert!(error < 0.05 * largest, "{what}: too few passes to tell");
                let off = (mean - want[i]).abs();
                assert!(
                    off <= 4.0 * error + 1e-6 * largest,
                    "{what}: {i}: {mean} ± {error}, not {}",
                    want[i]
                );
            }
        }
    }
}

/// In training DoRA's base part sees the dropped input too, as in PEFT:
/// y = W x + b + (f − 1) W x' + f s B A x'.
#[test]
fn dora_drops_the_input_of_the_base_part() {
    for kind in [KINDS[0], Kind::Conv2([3, 3], 1, 1, 1, 1, 3, 4)] {
        // With W = 0, B = (1; 0) and A the identity a layer of the same seed shows the mask.
        let built = |dora: bool| {
            let layer = kind.frozen("case", &mut seeded(1));
            let config = LoraConfig::new(IN, IN as f64)
                .with_dropout(0.4)
                .with_dora(dora);
            each!(&layer, l => l.add_adapter("one", &config, &mut seeded(9))).unwrap();
            layer
        };
        let probe = built(false);
        let adapter = each!(&probe, l => l.adapter("one")).unwrap();
        let (a, b) = (adapter.lora_a().unwrap(), adapter.lora_b().unwrap());
        let taps = a.elem_count() / (IN * IN);
        let mut identity = vec![0.0; a.elem_count()];
        (0..IN).for_each(|i| identity[(i * IN + i) * taps + taps / 2] = 1.0);
        a.set(&Tensor::from_vec(identity, a.shape(), &CPU).unwrap())
            .unwrap();
        let mut top = vec![0.0; OUT * IN];
        (0..IN).for_each(|i| top[i * IN + i] = 1.0);
        b.set(&Tensor::from_vec(top, b.shape(), &CPU).unwrap())
            .unwrap();

        let mut rng = seeded(2);
        let x = kind.input(&mut rng);
        let ones = x.ones_like().unwrap();
        let shown = each!(&probe, l => l.forward_t(&ones, true)).unwrap();
        let bare = match &probe {
            Layer::Linear(l) => candle_nn::Module::forward(&l.base(), &ones.flatten_to(1).unwrap())
                .unwrap()
                .reshape(shown.shape())
                .unwrap(),
            Layer::Conv2(l) => candle_nn::Module::forward(&l.base(), &ones).unwrap(),
            _ => unreachable!(),
        };
        let channels = if kind == Kind::Linear { 2 } else { 1 };
        let mask = (shown - bare).unwrap().narrow(channels, 0, IN).unwrap();
        let mask: Vec<f64> = values(&mask)
            .into_iter()
            .map(|m| {
                if m.abs() < 0.5 {
                    0.0
                } else {
                    f64::from((1.0 / 0.6) as f32)
                }
            })
            .collect();
        assert!(mask.contains(&0.0) && mask.iter().any(|m| *m > 0.0));

        let layer = built(true);
        let adapter = each!(&layer, l => l.adapter("one")).unwrap();
        let magnitude = adapter.magnitude().unwrap();
        for var in [
            adapter.lora_a().unwrap(),
            adapter.lora_b().unwrap(),
            magnitude,
        ] {
            var.set(&random(var.dims(), &mut rng)).unwrap();
        }
        let (weight, bias) = base(&layer);
        let none = vec![0.0; OUT];
        let reference = |weight: Vec<f64>, bias: &[f64], specs: &[Spec]| Reference {
            geometry: kind.geometry(),
            weight,
            bias: bias.to_vec(),
            specs: specs.to_vec(),
            norms: HashMap::new(),
        };
        let spec = |dora| Spec {
            name: "one",
            r: IN,
            scaling: 1.0,
            dora,
            vera: None,
        };
        let now: Values = [
            ("one.a", adapter.lora_a().unwrap()),
            ("one.b", adapter.lora_b().unwrap()),
            ("one.magnitude", magnitude),
        ]
        .into_iter()
        .map(|(name, var)| (name.to_string(), values(var)))
        .collect();
        let mut norms = reference(values(&weight), &none, &[spec(true)]);
        norms.hold_norms(&now);
        let plain = reference(values(&weight), &values(&bias.unwrap()), &[]);
        let unbiased = reference(values(&weight), &none, &[]);
        let thin = reference(vec![0.0; values(&weight).len()], &none, &[spec(false)]);

        let numbers_of_x = values(&x);
        let want = |now: &Values| {
            let dropped: Vec<f64> = numbers_of_x.iter().zip(&mask).map(|(x, m)| x * m).collect();
            let y = plain.output(&numbers_of_x, now);
            let (w, thin) = (unbiased.output(&dropped, now), thin.output(&dropped, now));
            let mut all = y.clone();
            for p in 0..plain.geometry.positions {
                for o in 0..OUT {
                    let i = plain.geometry.at(p, o);
                    let f = now["one.magnitude"][o] / norms.norms["one"][o];
                    all[i] = y[i] + (f - 1.0) * w[i] + f * thin[i];
                }
            }
            all
        };
        let c = numbers(plain.geometry.positions * OUT, &mut rng);
        let (y, grads) = gradients(&layer, &x, &c);
        let off = gap(&y, &want(&now));
        assert!(off < 1e-12, "{kind:?}: off by {off:e}");
        for (name, var) in [
            ("one.a", adapter.lora_a().unwrap()),
            ("one.b", adapter.lora_b().unwrap()),
            ("one.magnitude", magnitude),
        ] {
            let differences = differences(&now[name], |point| {
                let mut moved = now.clone();
                moved.insert(name.to_string(), point.to_vec());
                loss(&want(&moved), &c)
            });
            let off = gap(&values(grads.get(var).unwrap()), &differences);
            assert!(off < 1e-6, "{kind:?}: {name} off by {off:e}");
        }
    }
}
