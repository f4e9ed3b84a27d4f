//! Where PEFT 0.21.2 is wrong: `flaws.json` says how far, these tests what this crate does.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{DType, Tensor};
use candle_nn::{Conv1d, Conv1dConfig, Conv2d, Conv2dConfig, Embedding, Linear, Module};
use lora::peft::{AdapterFiles, AdapterKind};
use lora::{
    Base, Combination, CombinationType, Error, Init, LoraConfig, LoraConv1d, LoraConv2d,
    LoraEmbedding, LoraLayer, LoraLinear, LoraModel,
};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use serde_json::Value;

use crate::compare::{Table, gap, largest, numbers};
use crate::net::{CPU, Case, Net, Parts, config_of, fixtures, json_file, normal, raw_tensors};
use crate::{Kind, ROWS};

/// Answers with PEFT's number and ours.
type Check = fn(&Flaw) -> [String; 2];

const FLAWS: &[(&str, Check)] = &[
    ("conv_dilation", conv_dilation),
    ("dora_zero_row", dora_zero_row),
    ("unmerge_residue", unmerge_residue),
    ("tied_embedding", tied_embedding),
    ("combine_existing_name", combine_existing_name),
    ("combine_linear_cross_terms", combine_linear_cross_terms),
    ("combine_rslora_scale", combine_rslora_scale),
    ("combine_dora", combine_dora),
    ("combine_lora_bias", combine_lora_bias),
    ("combine_svd_conv1d", combine_svd_conv1d),
    ("pissa_niter_reload", pissa_niter_reload),
    ("pattern_order", pattern_order),
    ("train_while_merged", train_while_merged),
    ("lora_bias_half_merge", lora_bias_half_merge),
    ("olora_conv1d", olora_conv1d),
    ("unmatched_keys", unmatched_keys),
    ("old_bias_names", old_bias_names),
    ("safe_merge_rounding", safe_merge_rounding),
    ("non_finite_adapter", non_finite_adapter),
];

/// What has no counterpart in this test.
const NOT_HERE: &[&str] = &[
    // Attention has its own test.
    "mha_out_proj_twice",
    "mha_base_drift",
    "mha_lora_bias_ignored",
    // candle's convolutions pad with zeros only.
    "conv_padding_mode",
    // candle's embedding has no max_norm.
    "embedding_max_norm",
];

#[test]
fn right_where_peft_is_wrong() {
    let file = json_file(&fixtures().join("flaws.json"));
    let all = candle_core::safetensors::load(fixtures().join("flaws.safetensors"), &CPU).unwrap();
    let flaws: BTreeMap<&str, &Value> = file
        .as_array()
        .unwrap()
        .iter()
        .map(|flaw| (flaw["id"].as_str().unwrap(), &flaw["numbers"]))
        .collect();
    let tested = FLAWS
        .iter()
        .map(|(id, _)| *id)
        .chain(NOT_HERE.iter().copied());
    let tested: BTreeSet<&str> = tested.collect();
    assert_eq!(
        tested,
        flaws.keys().copied().collect(),
        "tested here, in flaws.json"
    );

    let mut table = Table::default();
    for (id, check) in FLAWS {
        let own = |(key, tensor): (&String, &Tensor)| {
            let name = key.strip_prefix(id)?.strip_prefix('.')?;
            Some((name.to_string(), tensor.clone()))
        };
        let flaw = Flaw {
            id,
            numbers: flaws[id].clone(),
            tensors: all.iter().filter_map(own).collect(),
        };
        let [peft, ours] = check(&flaw);
        table.row(&[id.to_string(), peft, ours]);
    }
    // Files that PEFT takes and that are refused here (by the other test).
    let mut silent = 0;
    for (name, _) in ROWS
        .iter()
        .filter(|(_, kind)| matches!(kind, Kind::Refused(_)))
    {
        let case = Case::read(name);
        let peft = case.text("peft").to_string();
        if !peft.starts_with("raises") && !name.ends_with("bin_fallback") {
            silent += 1;
            table.row(&[name.to_string(), peft, "refused".to_string()]);
        }
    }
    println!("{}", table.text(&["flaw", "PEFT 0.21.2", "here"]));
    assert_eq!((FLAWS.len(), silent), (19, 8));
}

struct Flaw {
    id: &'static str,
    numbers: Value,
    tensors: BTreeMap<String, Tensor>,
}

impl Flaw {
    fn get(&self, name: &str) -> &Tensor {
        let found = self.tensors.get(name);
        found.unwrap_or_else(|| panic!("flaws.safetensors has no {}.{name}", self.id))
    }

    /// A number, by its keys.
    fn number(&self, keys: &[&str]) -> f64 {
        let found = keys.iter().fold(&self.numbers, |value, key| &value[key]);
        found
            .as_f64()
            .unwrap_or_else(|| panic!("flaws.json: {} has no {keys:?}", self.id))
    }

    /// A difference as PEFT had it, and ours, at most `bound`.
    fn gaps(&self, keys: &[&str], ours: f64, bound: f64) -> [String; 2] {
        let peft = self.number(keys);
        assert!(peft > 100.0 * bound, "{}: {peft} is no flaw", self.id);
        assert!(
            ours <= bound,
            "{}: off by {ours:.2e}, in PEFT by {peft:.2e}",
            self.id
        );
        let ours = if ours == 0.0 {
            "0".to_string()
        } else {
            format!("{ours:.1e}")
        };
        [format!("off by {peft:.2}"), format!("off by {ours}")]
    }
}

/// The settings of `flaws.py`: rank 2, α 3, so s = 1.5.
fn plain() -> LoraConfig {
    LoraConfig::new(2, 3.0).with_targets(PATH)
}

const PATH: &str = "model.layers.0.proj";

/// Random numbers of a shape.
fn random(shape: &[usize], seed: u64) -> Tensor {
    normal(shape, 0.5, &mut ChaCha8Rng::seed_from_u64(seed))
}

fn linear(weight: &Tensor, bias: Option<Tensor>) -> LoraLinear {
    LoraLinear::frozen(PATH, Linear::new(weight.clone(), bias)).unwrap()
}

/// A model of one layer with an adapter whose numbers are all drawn.
fn with<B: Base>(layer: &LoraLayer<B>, adapter: &str, config: &LoraConfig) -> LoraModel {
    let mut model = LoraModel::new(&[layer]).unwrap();
    add(&mut model, adapter, config, 1);
    model
}

fn add(model: &mut LoraModel, adapter: &str, config: &LoraConfig, seed: u64) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    model.add_adapter(adapter, config, &mut rng).unwrap();
    model.set_adapter(&[adapter]).unwrap();
    for (name, var) in model.trainable_parameters() {
        let drawn = normal(var.dims(), 0.6, &mut rng);
        let near = (var.as_tensor() * drawn.affine(0.2, 1.0).unwrap()).unwrap();
        var.set(if name.contains("magnitude") {
            &near
        } else {
            &drawn
        })
        .unwrap();
    }
}

/// Puts A and B of the fixture into the active adapter.
fn fill<B: Base>(flaw: &Flaw, layer: &LoraLayer<B>, a: &str, b: &str) {
    layer.lora_a().unwrap().set(flaw.get(a)).unwrap();
    layer.lora_b().unwrap().set(flaw.get(b)).unwrap();
}

fn relative(ours: &Tensor, theirs: &Tensor) -> f64 {
    gap(ours, theirs) / largest(theirs)
}

// ---------------------------------------------------------------------------------- layers

fn conv_dilation(flaw: &Flaw) -> [String; 2] {
    let conv = |stride, padding| {
        let config = Conv2dConfig {
            stride,
            padding,
            dilation: 2,
            ..Default::default()
        };
        let base = Conv2d::new(
            flaw.get("weight").clone(),
            Some(flaw.get("bias").clone()),
            config,
        );
        let layer = LoraConv2d::frozen("conv", base).unwrap();
        let model = with(&layer, "default", &plain().with_targets("conv"));
        fill(flaw, &layer, "lora_A", "lora_B");
        (layer, model)
    };
    let (layer, model) = conv(3, 1);
    let x = flaw.get("input");
    let y = layer.forward(x).unwrap();
    model.merge().unwrap();
    let z = layer.forward(x).unwrap();
    assert!(relative(&z, flaw.get("output_merged")) <= 1e-5);
    assert!(gap(flaw.get("output"), flaw.get("output_merged")) > 1.0);

    // A shape with which PEFT raises.
    let (other, model) = conv(1, 2);
    let wide = other.forward(x).unwrap();
    model.merge().unwrap();
    assert_eq!(wide.dims(), [1, 3, 6, 6]);
    assert!(relative(&other.forward(x).unwrap(), &wide) <= 1e-5);

    let key = "silent: kernel 3, dilation 2, stride 3, padding 1, input 6x6: unmerged vs merged";
    flaw.gaps(&[key], gap(&y, &z), 1e-5)
}

fn dora_zero_row(flaw: &Flaw) -> [String; 2] {
    let layer = linear(flaw.get("weight"), Some(flaw.get("bias").clone()));
    let mut model = LoraModel::new(&[&layer]).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    model
        .add_adapter("default", &plain().with_dora(true), &mut rng)
        .unwrap();
    let y = layer.forward(flaw.get("input")).unwrap();
    assert!(
        relative(&y, flaw.get("output_base")) <= 1e-6,
        "a fresh adapter changes nothing"
    );
    let nan = |t: &Tensor| numbers(t).iter().filter(|v| !v.is_finite()).count();
    assert_eq!(
        nan(flaw.get("output")) as f64,
        flaw.number(&["nan_outputs"])
    );
    let merged = layer.merged().unwrap().parts().0;
    // Neither with an update.
    layer.lora_b().unwrap().set(&random(&[4, 2], 2)).unwrap();
    let moved = layer.forward(flaw.get("input")).unwrap();
    assert_eq!((nan(&y), nan(&merged), nan(&moved)), (0, 0, 0));
    let of = flaw.number(&["outputs"]);
    [
        format!("{} of {of} outputs NaN", flaw.number(&["nan_outputs"])),
        format!("0 of {of}"),
    ]
}

fn unmerge_residue(flaw: &Flaw) -> [String; 2] {
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let weight = flaw.get("weight").to_dtype(dtype).unwrap();
        let layer = linear(&weight, None);
        let model = with(&layer, "default", &plain());
        fill(flaw, &layer, "lora_A", "lora_B");
        for _ in 0..100 {
            model.merge().unwrap();
            assert!(
                gap(&layer.merged().unwrap().parts().0, &weight) > 0.1,
                "nothing merged"
            );
            model.unmerge();
        }
        assert_eq!(
            numbers(&layer.base().parts().0),
            numbers(&weight),
            "{dtype:?}"
        );
    }
    let once = gap(flaw.get("after"), flaw.get("weight"));
    assert!((once - flaw.number(&["bf16", "largest_residue"])).abs() < 1e-6);
    flaw.gaps(&["bf16", "largest_residue_after_100_rounds"], 0.0, 0.0)
}

fn tied_embedding(flaw: &Flaw) -> [String; 2] {
    let weight = flaw.get("weight");
    let embed = LoraEmbedding::frozen("embed_tokens", Embedding::new(weight.clone(), 4)).unwrap();
    let head = LoraLinear::frozen("lm_head", Linear::new(weight.clone(), None)).unwrap();
    let mut model = LoraModel::new(&[&embed, &head]).unwrap();
    add(
        &mut model,
        "default",
        &plain().with_targets("embed_tokens"),
        1,
    );
    fill(flaw, &embed, "lora_embedding_A", "lora_embedding_B");
    let run = || {
        head.forward(&embed.forward(flaw.get("input")).unwrap())
            .unwrap()
    };
    let y = run();
    assert!(relative(&y, flaw.get("output")) <= 1e-5);
    model.merge().unwrap();
    for state in [head.base(), head.merged().unwrap()] {
        assert_eq!(numbers(&state.parts().0), numbers(weight), "lm_head");
    }
    flaw.gaps(&["unmerged vs merged output"], gap(&run(), &y), 1e-5)
}

fn train_while_merged(flaw: &Flaw) -> [String; 2] {
    let layer = linear(&random(&[4, 5], 1), None);
    let model = with(&layer, "default", &plain());
    model.merge().unwrap();
    let error = layer.forward_t(&random(&[3, 5], 2), true).unwrap_err();
    assert!(matches!(error, Error::Merged { .. }), "{error}");
    model.unmerge();
    assert!(layer.forward_t(&random(&[3, 5], 2), true).is_ok());
    assert_eq!(flaw.number(&["with a gradient"]), 0.0);
    [
        "no gradient, no warning".to_string(),
        "error: call unmerge() first".to_string(),
    ]
}

fn lora_bias_half_merge(flaw: &Flaw) -> [String; 2] {
    let weight = random(&[4, 5], 1);
    let layer = linear(&weight, None);
    let model = with(&layer, "default", &plain().with_lora_bias(true));
    let x = random(&[3, 5], 2);
    let y = layer.forward(&x).unwrap();
    for safe in [false, true] {
        if safe {
            model.safe_merge().unwrap()
        } else {
            model.merge().unwrap()
        }
        let bias = layer.merged().unwrap().parts().1.unwrap();
        assert!(largest(&bias) > 0.1);
        assert!(relative(&layer.forward(&x).unwrap(), &y) <= 1e-6);
        model.unmerge();
        assert_eq!(numbers(&layer.base().parts().0), numbers(&weight));
        assert!(layer.base().parts().1.is_none());
    }
    let off = gap(&layer.forward(&x).unwrap(), &y);
    flaw.gaps(&["safe_merge=False: output changed by"], off, 0.0)
}

fn olora_conv1d(flaw: &Flaw) -> [String; 2] {
    let (weight, x) = (flaw.get("weight"), flaw.get("input"));
    let before = flaw.get("output_before");
    let rest = (before - x.matmul(weight).unwrap()).unwrap();
    let bias = rest.get(0).unwrap();
    assert!(
        gap(&rest.get(2).unwrap(), &bias) < 1e-5,
        "the bias is the same in every row"
    );
    let layer = linear(&weight.t().unwrap().contiguous().unwrap(), Some(bias));
    let mut model = LoraModel::new(&[&layer]).unwrap();
    let mut config = plain().with_init(Init::Olora);
    config.fan_in_fan_out = true;
    model
        .add_adapter("default", &config, &mut ChaCha8Rng::seed_from_u64(1))
        .unwrap();
    assert!(largest(&layer.lora_b().unwrap()) > 0.1);
    let key = ["6 -> 6", "output change by the initialisation"];
    assert!((gap(flaw.get("output_after"), before) - flaw.number(&key)).abs() < 1e-4);
    flaw.gaps(&key, gap(&layer.forward(x).unwrap(), before), 1e-5)
}

fn safe_merge_rounding(flaw: &Flaw) -> [String; 2] {
    let weight = random(&[12, 16], 1);
    for (dtype, name) in [(DType::BF16, "bf16"), (DType::F16, "f16")] {
        let layer = linear(&weight.to_dtype(dtype).unwrap(), None);
        let model = with(&layer, "default", &plain());
        let wide = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
        let exact = (wide(&layer.base().parts().0) + wide(&layer.delta_weight().unwrap())).unwrap();
        let mut results = Vec::new();
        for safe in [false, true] {
            if safe {
                model.safe_merge().unwrap()
            } else {
                model.merge().unwrap()
            }
            let merged = layer.merged().unwrap().parts().0;
            // One rounding of the exact sum (of an f32 delta, so its last bit is free).
            let nearest = exact.to_dtype(DType::F32).unwrap().to_dtype(dtype).unwrap();
            let off = numbers(&merged).into_iter().zip(numbers(&nearest));
            assert!(off.filter(|(a, b)| a != b).count() <= 2, "{name}");
            results.push(numbers(&merged));
            model.unmerge();
        }
        assert_eq!(results[0], results[1], "{name}");
        assert!(flaw.number(&[name, "weights that differ"]) > 50.0);
    }
    let of = flaw.number(&["bf16", "weights"]);
    let differ = flaw.number(&["bf16", "weights that differ"]);
    [
        format!("{differ} of {of} weights differ"),
        format!("0 of {of}"),
    ]
}

fn non_finite_adapter(flaw: &Flaw) -> [String; 2] {
    let weight = random(&[4, 5], 1);
    let layer = linear(&weight, None);
    let model = with(&layer, "default", &plain());
    let mut b = vec![0.5f32; 8];
    b[0] = f32::INFINITY;
    layer
        .lora_b()
        .unwrap()
        .set(&Tensor::from_vec(b, (4, 2), &CPU).unwrap())
        .unwrap();
    let error = model.safe_merge().unwrap_err();
    assert!(
        matches!(
            error,
            Error::MergeNotFinite {
                count: 5,
                of: 20,
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(numbers(&layer.base().parts().0), numbers(&weight));
    assert!(!layer.is_merged());
    // And such a file is not loaded in the first place.
    let folder = tempfile::tempdir().unwrap();
    let saved = model.save_adapter(folder.path(), "default");
    let mut again = LoraModel::new(&[&linear(&weight, None)]).unwrap();
    let loaded = saved.and_then(|()| again.load_adapter(folder.path(), "default"));
    assert!(loaded.unwrap_err().to_string().contains("NaN or infinite"));
    let count = flaw.number(&["non-finite outputs"]);
    let of = flaw.number(&["of"]);
    [
        format!("{count} of {of} outputs not finite"),
        "the file is refused".to_string(),
    ]
}

// --------------------------------------------------------------------------- combinations

/// Two adapters `default` and `b` on one layer.
fn two<B: Base>(layer: &LoraLayer<B>, one: &LoraConfig, other: &LoraConfig) -> LoraModel {
    let mut model = with(layer, "default", one);
    add(&mut model, "b", other, 2);
    model
}

fn mix(
    model: &mut LoraModel,
    kind: CombinationType,
    to: &str,
    weights: [f64; 2],
) -> lora::Result<()> {
    let pair = [("default", weights[0]), ("b", weights[1])];
    let mut how = Combination::new(kind);
    how.svd_rank = None;
    model.add_weighted_adapter(&pair, to, &how, &mut ChaCha8Rng::seed_from_u64(1))?;
    model.set_adapter(&[to])
}

fn combine_existing_name(flaw: &Flaw) -> [String; 2] {
    let layer = linear(&random(&[4, 5], 1), None);
    let mut model = two(&layer, &plain(), &plain());
    mix(&mut model, CombinationType::Cat, "mix", [1.0, 1.0]).unwrap();
    let delta = numbers(&layer.delta_weight().unwrap());
    let error = mix(&mut model, CombinationType::Cat, "mix", [5.0, -3.0]).unwrap_err();
    assert!(matches!(error, Error::AdapterExists { .. }), "{error}");
    assert_eq!(numbers(&layer.delta_weight().unwrap()), delta);
    let off = flaw.number(&["error_against_asked_for"]);
    assert_eq!(flaw.number(&["warnings"]), 0.0);
    [
        format!("no warning, off by {off:.2}"),
        "error: there is one already".to_string(),
    ]
}

fn combine_linear_cross_terms(flaw: &Flaw) -> [String; 2] {
    let layer = linear(&random(&[1, 1], 1), None);
    let config = LoraConfig::new(1, 1.0).with_targets(PATH);
    let mut model = two(&layer, &config, &config);
    let one = |v: f32| Tensor::new(&[[v]], &CPU).unwrap();
    for (name, a, b) in [("default", 1.0, 2.0), ("b", 3.0, -1.0)] {
        let adapter = layer.adapter(name).unwrap();
        adapter.lora_a().unwrap().set(&one(a)).unwrap();
        adapter.lora_b().unwrap().set(&one(b)).unwrap();
    }
    // `linear` has them by its definition, here as there; the documentation says so.
    let mut ours = Vec::new();
    for name in ["linear", "cat", "svd"] {
        mix(&mut model, name.parse().unwrap(), name, [1.0, 1.0]).unwrap();
        let delta = numbers(&layer.delta_weight().unwrap())[0];
        let peft = flaw.number(&[name]);
        assert!(
            (delta - peft).abs() < 1e-5,
            "{name}: {delta}, in PEFT {peft}"
        );
        ours.push(format!("{name} {delta:.0}"));
    }
    assert_eq!(flaw.number(&["exact"]), -1.0);
    [ours.join(", "), "the same, told in the docs".to_string()]
}

fn combine_rslora_scale(flaw: &Flaw) -> [String; 2] {
    let exact = flaw.get("exact_delta");
    let config = LoraConfig::new(4, 6.0).with_rslora(true).with_targets(PATH);
    for (name, svd_rank) in [("cat", None), ("svd", Some(6))] {
        let layer = linear(&random(&[6, 7], 1), None);
        let mut model = two(&layer, &config, &config);
        for adapter in ["default", "b"] {
            model.set_adapter(&[adapter]).unwrap();
            fill(
                flaw,
                &layer,
                &format!("{adapter}.lora_A"),
                &format!("{adapter}.lora_B"),
            );
        }
        let mut how = Combination::new(name.parse().unwrap());
        how.svd_rank = svd_rank;
        let (pair, mut rng) = (
            [("default", 0.5), ("b", 0.25)],
            ChaCha8Rng::seed_from_u64(1),
        );
        model
            .add_weighted_adapter(&pair, "mix", &how, &mut rng)
            .unwrap();
        model.set_adapter(&["mix"]).unwrap();
        let delta = layer.delta_weight().unwrap();
        assert!(
            relative(&delta, exact) <= 1e-5,
            "{name}: {}",
            relative(&delta, exact)
        );
        assert!(relative(flaw.get(&format!("{name}.delta")), exact) > 1.0);
        assert_eq!(layer.adapter("mix").unwrap().scaling(), 1.0);
    }
    let times = flaw.number(&["cat", "norm_over_exact"]);
    [format!("{times:.2} times too large"), "exact".to_string()]
}

fn combine_dora(flaw: &Flaw) -> [String; 2] {
    let layer = linear(&random(&[4, 5], 1), None);
    let mut model = with(&layer, "default", &plain().with_dora(true));
    let how = Combination::new(CombinationType::Linear);
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let copied = model.add_weighted_adapter(&[("default", 1.0)], "copy", &how, &mut rng);
    let error = copied.unwrap_err().to_string();
    assert!(error.contains("DoRA magnitude"), "{error}");
    assert_eq!(model.adapters(), ["default"]);
    let off = flaw.number(&["output of the adapter vs of its weight-1 copy"]);
    [
        format!("no warning, off by {off:.2}"),
        "refused".to_string(),
    ]
}

fn combine_lora_bias(flaw: &Flaw) -> [String; 2] {
    let layer = linear(&random(&[4, 5], 1), Some(random(&[4], 2)));
    let mut model = with(&layer, "default", &plain().with_lora_bias(true));
    let x = random(&[3, 5], 3);
    let y = layer.forward(&x).unwrap();
    let how = Combination::new(CombinationType::Linear);
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    model
        .add_weighted_adapter(&[("default", 1.0)], "copy", &how, &mut rng)
        .unwrap();
    model.set_adapter(&["copy"]).unwrap();
    let off = gap(&layer.forward(&x).unwrap(), &y);
    flaw.gaps(
        &["output of the adapter vs of its weight-1 copy"],
        off,
        1e-5,
    )
}

fn combine_svd_conv1d(flaw: &Flaw) -> [String; 2] {
    let base = Conv1d::new(random(&[4, 3, 3], 1), None, Conv1dConfig::default());
    let layer = LoraConv1d::frozen("model.conv", base).unwrap();
    let config = plain().with_targets("conv");
    let mut model = two(&layer, &config, &config);
    model.set_adapter(&["default", "b"]).unwrap();
    let sum = layer.delta_weight().unwrap();
    let mut how = Combination::new(CombinationType::Svd);
    how.svd_rank = Some(4);
    let (pair, mut rng) = ([("default", 1.0), ("b", 1.0)], ChaCha8Rng::seed_from_u64(1));
    model
        .add_weighted_adapter(&pair, "svd", &how, &mut rng)
        .unwrap();
    model.set_adapter(&["svd"]).unwrap();
    assert!(relative(&layer.delta_weight().unwrap(), &sum) <= 1e-5);
    assert_eq!(flaw.numbers["adapter left behind"], true);
    [
        "raises, a broken adapter stays".to_string(),
        "exact".to_string(),
    ]
}

// ------------------------------------------------------------------------------------ files

fn pissa_niter_reload(flaw: &Flaw) -> [String; 2] {
    // A file of PEFT's.
    let case = Case::read("pissa_trained");
    let mut config = config_of(&case.folder);
    let AdapterKind::Lora(lora) = &mut config.kind else {
        panic!()
    };
    lora.init_lora_weights = Init::PissaNiter(4);
    let files = AdapterFiles {
        config,
        tensors: raw_tensors(&case.folder),
    };
    let mut net = Net::of(&case);
    let error = net
        .model
        .add_files(&files, "default")
        .unwrap_err()
        .to_string();
    assert!(error.contains("pissa_niter_4"), "{error}");

    // One made here survives saving.
    let (weight, x) = (random(&[12, 16], 1), random(&[3, 16], 2));
    let layer = linear(&weight, None);
    let mut model = LoraModel::new(&[&layer]).unwrap();
    let config = plain().with_init(Init::PissaNiter(4));
    model
        .add_adapter("default", &config, &mut ChaCha8Rng::seed_from_u64(1))
        .unwrap();
    let b = layer.lora_b().unwrap();
    b.set(&(b.as_tensor() + random(&[12, 2], 3)).unwrap())
        .unwrap();
    let again = linear(&weight, None);
    let mut twin = LoraModel::new(&[&again]).unwrap();
    twin.add_files(&model.adapter_files("default").unwrap(), "default")
        .unwrap();
    let off = gap(&again.forward(&x).unwrap(), &layer.forward(&x).unwrap());
    flaw.gaps(
        &["pissa_niter_4", "largest_output_change_over_5_reloads"],
        off,
        1e-5,
    )
}

fn pattern_order(flaw: &Flaw) -> [String; 2] {
    let layers = |_| {
        [0, 1].map(|i| {
            let base = Linear::new(random(&[5, 6], i), None);
            LoraLinear::frozen(format!("model.layers.{i}.q_proj"), base).unwrap()
        })
    };
    for rank in [true, false] {
        let (first, again) = (layers(0), layers(1));
        let mut config = LoraConfig::new(2, 3.0).with_targets("q_proj");
        let keys = ["q_proj", ".*layers.0.*q_proj"].map(str::to_string);
        if rank {
            config.rank_pattern = keys.into_iter().zip([4, 8]).collect();
        } else {
            config.alpha_pattern = keys.into_iter().zip([4.0, 8.0]).collect();
        }
        let mut model = LoraModel::new(&[&first[0], &first[1]]).unwrap();
        add(&mut model, "default", &config, 1);
        let folder = tempfile::tempdir().unwrap();
        model.save_pretrained(folder.path()).unwrap();
        let mut twin = LoraModel::new(&[&again[0], &again[1]]).unwrap();
        twin.load_adapter(folder.path(), "default").unwrap();
        let x = random(&[3, 6], 9);
        for (a, b) in first.iter().zip(&again) {
            let (one, other) = (a.adapter("default").unwrap(), b.adapter("default").unwrap());
            let wanted = if rank { (4, 0.75) } else { (2, 2.0) };
            assert_eq!((one.r(), one.scaling()), wanted);
            assert_eq!((other.r(), other.scaling()), wanted);
            assert_eq!(
                numbers(&a.forward(&x).unwrap()),
                numbers(&b.forward(&x).unwrap())
            );
        }
    }
    flaw.gaps(&["alpha_pattern", "output_change"], 0.0, 0.0)
}

/// The largest error of a file that must give what `right` says.
fn loaded(name: &str, right: &str) -> f64 {
    let (case, plain) = (
        fixtures().join("wild").join(name),
        Case::read("linear_plain"),
    );
    let mut net = Net::of(&plain);
    net.model.load_adapter(case, "default").unwrap();
    gap(
        &net.forward(&plain.get("input")),
        &Case::read(right).get("output"),
    )
}

fn unmatched_keys(flaw: &Flaw) -> [String; 2] {
    let key = "output vs right one";
    flaw.gaps(
        &["no prefix", key],
        loaded("no_prefix", "linear_plain"),
        1e-5,
    );
    flaw.gaps(
        &["other adapter's name", key],
        loaded("other_name", "linear_plain"),
        1e-5,
    )
}

fn old_bias_names(flaw: &Flaw) -> [String; 2] {
    let off = loaded("bias_old_names", "wild/bias_new_names");
    flaw.gaps(&["old name", "output vs right one"], off, 1e-5)
}
