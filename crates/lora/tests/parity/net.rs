//! Fixture folders, and the networks they are about.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{D, DType, Device, Tensor};
use candle_nn::{
    Conv1d, Conv1dConfig, Conv2d, Conv2dConfig, Embedding, Linear, Module, VarBuilder,
};
use lora::peft::{AdapterConfig, AdapterKind};
use lora::{
    LoraBuilder, LoraConv1d, LoraConv2d, LoraEmbedding, LoraLinear, LoraModel, ScaledEmbedding,
};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rand_distr::StandardNormal;
use serde_json::Value;

pub const CPU: Device = Device::Cpu;

pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/peft")
}

pub fn folders(parent: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(parent).unwrap().map(|entry| entry.unwrap());
    let entries = entries.filter(|entry| entry.path().is_dir());
    entries
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect()
}

/// Every folder with a case; `from_rust` belongs to the test of the way back.
pub fn case_folders() -> BTreeSet<String> {
    let mut all = folders(&fixtures());
    all.retain(|name| !["from_rust", "wild", "__pycache__"].contains(&name.as_str()));
    all.extend(
        folders(&fixtures().join("wild"))
            .iter()
            .map(|name| format!("wild/{name}")),
    );
    all
}

/// A case folder, which remembers what of it was looked at.
pub struct Case {
    pub folder: PathBuf,
    pub info: Value,
    pub tensors: HashMap<String, Tensor>,
    pub read: RefCell<BTreeSet<String>>,
}

impl Case {
    pub fn read(name: &str) -> Self {
        Self::at(&fixtures().join(name))
    }

    pub fn at(folder: &Path) -> Self {
        let info = fs::read(folder.join("case.json")).unwrap();
        let info: Value = serde_json::from_slice(&info).unwrap();
        let file = folder.join("case.safetensors");
        let own = file.is_file();
        assert!(own || info["expect"].is_string(), "{}", file.display());
        let tensors = own.then(|| candle_core::safetensors::load(&file, &CPU).unwrap());
        Self {
            folder: folder.to_path_buf(),
            info,
            tensors: tensors.unwrap_or_default(),
            read: RefCell::default(),
        }
    }

    /// A tensor that must be there.
    pub fn get(&self, name: &str) -> Tensor {
        self.find(name)
            .unwrap_or_else(|| panic!("{} has no {name}", self.folder.display()))
    }

    pub fn find(&self, name: &str) -> Option<Tensor> {
        self.read.borrow_mut().insert(name.to_string());
        self.tensors.get(name).cloned()
    }

    pub fn starting(&self, prefix: &str) -> BTreeMap<String, Tensor> {
        let names = self
            .tensors
            .keys()
            .filter_map(|k| Some((k.strip_prefix(prefix)?, k)));
        names
            .map(|(name, key)| (name.to_string(), self.get(key)))
            .collect()
    }

    pub fn unread(&self) -> Vec<&String> {
        let read = self.read.borrow();
        let mut all: Vec<&String> = self.tensors.keys().filter(|k| !read.contains(*k)).collect();
        all.sort();
        all
    }

    pub fn text(&self, key: &str) -> &str {
        self.info[key].as_str().unwrap_or_default()
    }

    pub fn dtype(&self) -> DType {
        match self.text("dtype") {
            "f32" => DType::F32,
            "bf16" => DType::BF16,
            "f16" => DType::F16,
            other => panic!("dtype {other:?}"),
        }
    }

    pub fn adapter_folder(&self, adapter: &str) -> PathBuf {
        if adapter == "default" {
            self.folder.clone()
        } else {
            self.folder.join(adapter)
        }
    }
}

/// The tensors of an adapter file under the names that stand in it.
pub fn raw_tensors(folder: &Path) -> BTreeMap<String, Tensor> {
    let file = folder.join("adapter_model.safetensors");
    candle_core::safetensors::load(file, &CPU)
        .unwrap()
        .into_iter()
        .collect()
}

/// The settings of an adapter folder.
pub fn config_of(folder: &Path) -> AdapterConfig {
    AdapterConfig::from_json(&fs::read(folder.join("adapter_config.json")).unwrap()).unwrap()
}

/// A JSON string.
pub fn text(value: &Value) -> String {
    value.as_str().unwrap().to_string()
}

pub fn json_file(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

pub enum AnyLayer {
    Linear(LoraLinear),
    Conv1d(LoraConv1d),
    Conv2d(LoraConv2d),
    Embedding(LoraEmbedding),
}

macro_rules! on {
    ($layer:expr, $l:ident => $result:expr) => {
        match $layer {
            $crate::net::AnyLayer::Linear($l) => $result,
            $crate::net::AnyLayer::Conv1d($l) => $result,
            $crate::net::AnyLayer::Conv2d($l) => $result,
            $crate::net::AnyLayer::Embedding($l) => $result,
        }
    };
}

/// Weight and bias of a plain layer.
pub trait Parts {
    fn parts(&self) -> (Tensor, Option<Tensor>);
}

pub(crate) use on;

macro_rules! parts {
    ($($layer:ty: $weight:ident, $bias:expr;)*) => {
        $(impl Parts for $layer {
            fn parts(&self) -> (Tensor, Option<Tensor>) {
                let bias: fn(&Self) -> Option<Tensor> = $bias;
                (self.$weight().clone(), bias(self))
            }
        })*
    };
}

parts! {
    Linear: weight, |l| l.bias().cloned();
    Conv1d: weight, |l| l.bias().cloned();
    Conv2d: weight, |l| l.bias().cloned();
    ScaledEmbedding: embeddings, |_| None;
}

/// A 2-d convolution whose strides or paddings differ: candle has one number for both axes, so
/// the input is padded before the layer, and rows and columns are taken out after it.
#[derive(Clone, Copy)]
pub struct Grid {
    stride: [usize; 2],
    padding: [usize; 2],
}

/// The network of a case.
pub struct Net {
    pub layers: BTreeMap<String, AnyLayer>,
    pub model: LoraModel,
    /// Weight and bias of the layer norm, which is not a layer of this crate.
    pub norm: Option<(Tensor, Tensor)>,
    grid: Option<Grid>,
}

pub fn size2(info: &Value, key: &str, default: usize) -> [usize; 2] {
    let size = |i: usize| info[key][i].as_u64().map_or(default, |n| n as usize);
    [size(0), size(1)]
}

impl Net {
    pub fn of(case: &Case) -> Self {
        let mut base = case.starting("base.");
        if case.info["fan_in_fan_out"] == true {
            transpose(&mut base);
        }
        Self::build(&case.info, base, case.dtype())
    }

    pub fn build(info: &Value, base: BTreeMap<String, Tensor>, dtype: DType) -> Self {
        let kind = |path: &str| match info["kind"].as_str().unwrap() {
            "model" if path.ends_with("embed") => "embedding".to_string(),
            "model" => "linear".to_string(),
            kind => kind.to_string(),
        };
        let builder = VarBuilder::from_tensors(base.clone().into_iter().collect(), dtype, &CPU);
        let builder = LoraBuilder::new(builder);
        let (mut layers, mut norm, mut grid) = (BTreeMap::new(), None, None);
        for (name, weight) in &base {
            let Some(path) = name.strip_suffix(".weight") else {
                continue;
            };
            let (b, d) = (builder.pp(path), weight.dims());
            let bias = base.contains_key(&format!("{path}.bias"));
            if path == "model.norm" {
                norm = Some((
                    b.vb().get(d, "weight").unwrap(),
                    b.vb().get(d, "bias").unwrap(),
                ));
                continue;
            }
            let one = |key: &str, default| size2(info, key, default)[0];
            let layer = match kind(path).as_str() {
                "linear" if bias => AnyLayer::Linear(b.linear(d[1], d[0]).unwrap()),
                "linear" => AnyLayer::Linear(b.linear_no_bias(d[1], d[0]).unwrap()),
                "conv1d" => {
                    assert!(bias);
                    let config = Conv1dConfig {
                        stride: one("stride", 1),
                        padding: one("padding", 0),
                        dilation: one("dilation", 1),
                        groups: 1,
                        ..Default::default()
                    };
                    AnyLayer::Conv1d(b.conv1d(d[1], d[0], d[2], config).unwrap())
                }
                "conv2d" => {
                    let (stride, padding) = (size2(info, "stride", 1), size2(info, "padding", 0));
                    let groups = info["groups"].as_u64().unwrap_or(1) as usize;
                    let even = stride[0] == stride[1] && padding[0] == padding[1];
                    grid = (!even).then_some(Grid { stride, padding });
                    let config = Conv2dConfig {
                        stride: if even { stride[0] } else { 1 },
                        padding: if even { padding[0] } else { 0 },
                        dilation: one("dilation", 1),
                        groups,
                        ..Default::default()
                    };
                    let square = d[2] == d[3];
                    AnyLayer::Conv2d(if square && bias {
                        b.conv2d(d[1] * groups, d[0], d[2], config).unwrap()
                    } else if square {
                        b.conv2d_no_bias(d[1] * groups, d[0], d[2], config).unwrap()
                    } else {
                        assert!(!bias);
                        b.noted(Conv2d::new(b.vb().get(d, "weight").unwrap(), None, config))
                            .unwrap()
                    })
                }
                "embedding" => AnyLayer::Embedding(match info["embed_scale"].as_f64() {
                    None => b.embedding(d[0], d[1]).unwrap(),
                    Some(scale) => {
                        let plain = Embedding::new(b.vb().get(d, "weight").unwrap(), d[1]);
                        b.noted(ScaledEmbedding::from(plain).with_embed_scale(scale))
                            .unwrap()
                    }
                }),
                other => panic!("kind {other:?}"),
            };
            layers.insert(path.to_string(), layer);
        }
        let model = builder.model().unwrap();
        Self {
            layers,
            model,
            norm,
            grid,
        }
    }

    pub fn apply(&self, path: &str, x: &Tensor) -> Tensor {
        on!(&self.layers[path], l => l.forward(x).unwrap())
    }

    pub fn forward(&self, x: &Tensor) -> Tensor {
        if let (1, Some(path)) = (self.layers.len(), self.layers.keys().next()) {
            let Some(Grid { stride, padding }) = self.grid else {
                return self.apply(path, x);
            };
            let mut x = x.clone();
            for (axis, pad) in padding.into_iter().enumerate() {
                x = x.pad_with_zeros(axis + 2, pad, pad).unwrap();
            }
            let mut y = self.apply(path, &x);
            for (axis, step) in stride.into_iter().enumerate() {
                let places = (0..y.dim(axis + 2).unwrap() as u32).step_by(step);
                let places = Tensor::from_iter(places, &CPU).unwrap();
                y = y.index_select(&places, axis + 2).unwrap();
            }
            return y;
        }
        let Some((weight, bias)) = &self.norm else {
            return self.apply("model.layers.1.proj", &self.apply("model.layers.0.proj", x));
        };
        let mut h = self.apply("model.embed", x);
        for i in 0..2 {
            let on = |name: &str, x: &Tensor| self.apply(&format!("model.layers.{i}.{name}"), x);
            let gate = (on("q_proj", &h).silu().unwrap() * on("v_proj", &h)).unwrap();
            h = (&h + on("mlp.down", &(gate + on("mlp.up", &h)).unwrap())).unwrap();
        }
        let centred = h
            .broadcast_sub(&h.mean_keepdim(D::Minus1).unwrap())
            .unwrap();
        let variance = centred.sqr().unwrap().mean_keepdim(D::Minus1).unwrap();
        let h = centred
            .broadcast_div(&(variance + 1e-5).unwrap().sqrt().unwrap())
            .unwrap();
        let h = h
            .broadcast_mul(weight)
            .unwrap()
            .broadcast_add(bias)
            .unwrap();
        self.apply("head", &h)
    }

    /// Weight and bias of every frozen layer, under the names of a state dict.
    pub fn base(&self) -> BTreeMap<String, Tensor> {
        self.state(|layer| on!(layer, l => l.base().parts()))
    }

    /// The same with the active adapters in it.
    pub fn merged(&self) -> BTreeMap<String, Tensor> {
        self.state(|layer| on!(layer, l => l.merged().unwrap().parts()))
    }

    fn state(
        &self,
        of: impl Fn(&AnyLayer) -> (Tensor, Option<Tensor>),
    ) -> BTreeMap<String, Tensor> {
        let mut all = BTreeMap::new();
        for (path, layer) in &self.layers {
            let (weight, bias) = of(layer);
            all.insert(format!("{path}.weight"), weight);
            bias.map(|bias| all.insert(format!("{path}.bias"), bias));
        }
        all
    }

    /// The layers with A and B (or λ), as PEFT lists them.
    pub fn adapted(&self, adapter: &str) -> BTreeSet<String> {
        let has = |layer: &AnyLayer| {
            let adapter = on!(layer, l => l.adapter(adapter));
            adapter.is_ok_and(|a| a.lora_a().is_some() || a.vera_lambdas().is_some())
        };
        let layers = self.layers.iter().filter(|(_, layer)| has(layer));
        layers.map(|(path, _)| path.clone()).collect()
    }

    /// Adds a fresh adapter, or the one of the files.
    pub fn add(&mut self, adapter: &str, config: &AdapterConfig) -> lora::Result<()> {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        match &config.kind {
            AdapterKind::Lora(config) => self.model.add_adapter(adapter, config, &mut rng),
            AdapterKind::Vera(config) => self.model.add_vera(adapter, config, &mut rng),
        }
    }
}

/// PEFT keeps a GPT-2 weight as (in, out), the layers here always as (out, in).
pub fn transpose(state: &mut BTreeMap<String, Tensor>) {
    for (name, tensor) in state {
        if name.ends_with(".weight") {
            *tensor = tensor.t().unwrap().contiguous().unwrap();
        }
    }
}

/// Normal numbers of a shape.
pub fn normal(shape: &[usize], std: f64, rng: &mut ChaCha8Rng) -> Tensor {
    let count = shape.iter().product();
    let draw = || (std * rng.sample::<f64, _>(StandardNormal)) as f32;
    let numbers: Vec<f32> = std::iter::repeat_with(draw).take(count).collect();
    Tensor::from_vec(numbers, shape, &CPU).unwrap()
}
