//! Adapters of this crate in PEFT, and back: `from_rust` in the fixtures.
//!
//! `write_roundtrip` writes adapters with their base weights and an input; `roundtrip.py` loads
//! them in PEFT, computes the output and saves them again; the test compares. To make them anew:
//!
//! ```text
//! cargo test -p lora --test parity -- --ignored write_roundtrip
//! env/bin/python crates/lora/tests/fixtures/peft/roundtrip.py
//! ```

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::PathBuf;

use candle_core::{DType, Tensor};
use lora::peft::{AdapterConfig, AdapterFiles, AdapterKind};
use lora::{Bias, Combination, CombinationType, Init, LoraConfig, TargetModules, VeraConfig};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use serde_json::{Value, json};

use crate::compare::{Column, MERGED, OUTPUT, Table, Tally, gap, largest};
use crate::net::{CPU, Case, Net, fixtures, folders, normal, on, text};

fn from_rust() -> PathBuf {
    fixtures().join("from_rust")
}

/// One adapter to write: the layer, and how the adapter is made.
struct Made {
    name: &'static str,
    layer: &'static str,
    config: AdapterConfig,
}

fn made() -> Vec<Made> {
    let lora = |r, alpha: f64, target: &str| LoraConfig::new(r, alpha).with_targets([target]);
    let patterns =
        |config: LoraConfig, ranks: &[(&str, usize)], alphas: &[(&str, f64)]| LoraConfig {
            rank_pattern: ranks.iter().map(|(k, r)| (k.to_string(), *r)).collect(),
            alpha_pattern: alphas.iter().map(|(k, a)| (k.to_string(), *a)).collect(),
            ..config
        };
    let two = LoraConfig::new(2, 3.0).with_targets(["q_proj", "mlp.up"]);
    let vera = VeraConfig {
        r: 3,
        target_modules: Some(TargetModules::from(["q_proj", "down"])),
        projection_prng_key: 17,
        ..VeraConfig::default()
    };
    let lora_only = LoraConfig {
        bias: Bias::LoraOnly,
        ..lora(2, 3.0, "q_proj")
    };
    let head = LoraConfig {
        modules_to_save: vec!["head".into()],
        ..lora(2, 3.0, "v_proj")
    };
    let all: [(&str, &str, AdapterConfig); 19] = [
        ("linear", "linear", lora(2, 5.0, "proj").into()),
        (
            "linear_rslora",
            "linear",
            lora(3, 4.0, "proj").with_rslora(true).into(),
        ),
        (
            "linear_dora",
            "linear",
            lora(2, 5.0, "proj").with_dora(true).into(),
        ),
        (
            "linear_lora_bias",
            "linear",
            lora(2, 5.0, "proj").with_lora_bias(true).into(),
        ),
        (
            "linear_orthogonal",
            "linear",
            lora(2, 5.0, "proj").with_init(Init::Orthogonal).into(),
        ),
        (
            "linear_pissa",
            "linear",
            lora(2, 3.0, "proj").with_init(Init::Pissa).into(),
        ),
        (
            "linear_olora",
            "linear",
            lora(2, 3.0, "proj").with_init(Init::Olora).into(),
        ),
        ("linear_combined", "linear", lora(2, 5.0, "proj").into()),
        ("conv1d", "conv1d", lora(2, 5.0, "conv").into()),
        (
            "conv1d_dora",
            "conv1d",
            lora(2, 5.0, "conv").with_dora(true).into(),
        ),
        ("conv2d", "conv2d", lora(2, 5.0, "conv").into()),
        (
            "conv2d_dora",
            "conv2d",
            lora(2, 5.0, "conv").with_dora(true).into(),
        ),
        (
            "embedding",
            "embedding",
            lora(2, 5.0, "embed_tokens").into(),
        ),
        (
            "embedding_dora",
            "embedding",
            lora(2, 5.0, "embed_tokens").with_dora(true).into(),
        ),
        (
            "model_patterns",
            "model",
            patterns(
                two.clone(),
                &[("^model.layers.0.q_proj", 3)],
                &[(r"mlp\.up", 7.0)],
            )
            .into(),
        ),
        (
            "model_patterns_order",
            "model",
            patterns(two, &[], &[("q_proj", 4.0), (".*layers.0.*q_proj", 8.0)]).into(),
        ),
        ("model_bias_lora_only", "model", lora_only.into()),
        ("model_modules_to_save", "model", head.into()),
        ("model_vera", "model", vera.into()),
    ];
    all.into_iter()
        .map(|(name, layer, config)| Made {
            name,
            layer,
            config,
        })
        .collect()
}

/// The base weights of a layer, what a case says of it, and an input.
fn base_of(layer: &str, rng: &mut ChaCha8Rng) -> (Value, BTreeMap<String, Tensor>, Tensor) {
    type Shapes = Vec<(&'static str, Vec<usize>)>;
    let (info, shapes, input): (Value, Shapes, Vec<usize>) = match layer {
        "linear" => (
            json!({"path": "model.layers.0.proj"}),
            vec![
                ("model.layers.0.proj.weight", vec![7, 5]),
                ("model.layers.0.proj.bias", vec![7]),
            ],
            vec![2, 3, 5],
        ),
        "conv1d" => (
            json!({"path": "model.conv", "stride": [2], "padding": [1], "dilation": [1]}),
            vec![
                ("model.conv.weight", vec![5, 3, 3]),
                ("model.conv.bias", vec![5]),
            ],
            vec![2, 3, 8],
        ),
        "conv2d" => (
            json!({"path": "model.conv", "stride": [2, 2], "padding": [1, 1], "dilation": [1, 1]}),
            vec![
                ("model.conv.weight", vec![4, 3, 3, 3]),
                ("model.conv.bias", vec![4]),
            ],
            vec![2, 3, 5, 4],
        ),
        "embedding" => (
            json!({"path": "model.embed_tokens"}),
            vec![("model.embed_tokens.weight", vec![6, 3])],
            vec![2, 4],
        ),
        _ => {
            let base = Case::read("model_list").starting("base.");
            let ids = Tensor::new(&[[3i64, 0, 6, 2], [5, 1, 1, 4]], &CPU).unwrap();
            return (
                json!({"kind": "model", "path": null, "dtype": "f32"}),
                base,
                ids,
            );
        }
    };
    let mut info = info;
    info["kind"] = layer.into();
    info["dtype"] = "f32".into();
    let base = shapes
        .into_iter()
        .map(|(name, shape)| (name.to_string(), normal(&shape, 0.5, rng)));
    let base = base.collect();
    let x = if layer == "embedding" {
        Tensor::new(&[[3i64, 0, 5, 2], [5, 1, 1, 4]], &CPU).unwrap()
    } else {
        normal(&input, 1.0, rng)
    };
    (info, base, x)
}

/// Moves everything trainable away from where it starts.
fn train(net: &Net, rng: &mut ChaCha8Rng) {
    for (name, var) in net.model.trainable_parameters() {
        let step = normal(var.dims(), 0.4, rng);
        let moved = if name.contains("magnitude") {
            var.as_tensor() * step.affine(0.4, 1.0).unwrap()
        } else {
            var.as_tensor() + step
        };
        var.set(&moved.unwrap()).unwrap();
    }
}

#[test]
#[ignore = "writes the fixtures in from_rust; roundtrip.py must run after it"]
fn write_roundtrip() {
    for Made {
        name,
        layer,
        config,
    } in made()
    {
        let mut rng = ChaCha8Rng::seed_from_u64(name.bytes().map(u64::from).sum());
        let (info, base, x) = base_of(layer, &mut rng);
        let mut net = Net::build(&info, base.clone(), DType::F32);
        net.add("default", &config).unwrap();
        train(&net, &mut rng);
        if name == "linear_combined" {
            let other = LoraConfig::new(1, 3.0)
                .with_rslora(true)
                .with_targets(["proj"]);
            net.add("other", &other.into()).unwrap();
            net.model.set_adapter(&["other"]).unwrap();
            train(&net, &mut rng);
            let how = Combination::new(CombinationType::Cat);
            let pair = [("default", 0.7), ("other", -1.2)];
            net.model
                .add_weighted_adapter(&pair, "both", &how, &mut rng)
                .unwrap();
            net.model.set_adapter(&["both"]).unwrap();
        }
        let adapter = net.model.active_adapters()[0].clone();
        let folder = from_rust().join(name);
        let _ = fs::remove_dir_all(&folder);
        net.model.save_adapter(&folder, &adapter).unwrap();
        let mut tensors: HashMap<String, Tensor> = base
            .into_iter()
            .map(|(name, tensor)| (format!("base.{name}"), tensor))
            .collect();
        tensors.insert("output".to_string(), net.forward(&x));
        tensors.insert("input".to_string(), x);
        candle_core::safetensors::save(&tensors, folder.join("case.safetensors")).unwrap();
        fs::write(folder.join("case.json"), format!("{info}\n")).unwrap();
    }
}

#[test]
fn peft_reads_what_is_written_here() {
    let names: BTreeSet<String> = made().iter().map(|made| made.name.to_string()).collect();
    assert_eq!(
        names,
        folders(&from_rust()),
        "cases of this test, folders in from_rust"
    );
    let (mut table, mut failures, mut checks) = (Table::default(), Vec::new(), 0);
    for Made { name, config, .. } in made() {
        let mut t = Tally::new(name);
        let case = Case::at(&from_rust().join(name));
        let (x, written) = (case.get("input"), case.get("output"));
        let mut net = Net::of(&case);
        net.model.load_adapter(&case.folder, "default").unwrap();
        let y = net.forward(&x);
        net.model.enable_adapters(false);
        let off = net.forward(&x);
        net.model.enable_adapters(true);
        t.check(
            "the adapter does something",
            gap(&y, &off) > 1e-2 * largest(&y),
        );
        t.close(Column::Output, "as written", &y, &written, OUTPUT);

        // What PEFT computes with it.
        let file = case.folder.join("result.safetensors");
        let result = candle_core::safetensors::load(file, &CPU).unwrap();
        t.close(Column::Output, "in PEFT", &y, &result["output"], OUTPUT);
        for (path, layer) in &net.layers {
            let delta = on!(layer, l => l.delta_weight());
            let theirs = result.get(&format!("delta.{path}"));
            t.equal("adapted", delta.is_ok(), theirs.is_some());
            if let (Ok(ours), Some(theirs)) = (delta, theirs) {
                t.close(Column::Merged, "delta", &ours, theirs, MERGED);
            }
        }

        // What PEFT saves again.
        let ours = AdapterFiles::read(&case.folder, &CPU).unwrap();
        let theirs = AdapterFiles::read(case.folder.join("peft"), &CPU).unwrap();
        let keys = |files: &AdapterFiles| files.tensors.keys().cloned().collect::<Vec<_>>();
        t.equal("names", keys(&ours), keys(&theirs));
        for (key, tensor) in &ours.tensors {
            t.same(key, &theirs.tensors[key], tensor);
        }
        t.equal("settings", sorted(&ours.config), sorted(&theirs.config));
        let version = text(&theirs.config.other["peft_version"]);
        t.equal("peft_version", version.as_str(), "0.21.2");

        // The files are those that are written now.
        let folder = tempfile::tempdir().unwrap();
        net.model.save_pretrained(folder.path()).unwrap();
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            let read = |folder: &std::path::Path| fs::read(folder.join(file)).unwrap();
            t.check(
                &format!("{file} is up to date"),
                read(folder.path()) == read(&case.folder),
            );
        }
        let converts = config
            .lora()
            .is_some_and(|l| l.init_lora_weights.rewrites_base());
        if !converts && name != "linear_combined" {
            t.equal("settings as made", &ours.config.kind, &config.kind);
        }
        checks += t.checks;
        table.row(&[
            name.to_string(),
            t.output.text(),
            t.merged.text(),
            t.checks.to_string(),
        ]);
        failures.extend(t.failures);
    }
    println!(
        "{}",
        table.text(&["written here", "output in PEFT", "delta in PEFT", "checks"])
    );
    println!("{checks} checks");
    assert!(
        failures.is_empty(),
        "{} failures:\n{}",
        failures.len(),
        failures.join("\n")
    );
    assert_eq!(checks, 333, "the number of checks");
}

/// The settings with everything in order that PEFT puts in another one.
fn sorted(config: &AdapterConfig) -> AdapterKind {
    let mut kind = config.kind.clone();
    let targets = match &mut kind {
        AdapterKind::Lora(lora) => {
            lora.rank_pattern.sort();
            lora.alpha_pattern.sort_by(|a, b| a.0.cmp(&b.0));
            &mut lora.target_modules
        }
        AdapterKind::Vera(vera) => &mut vera.target_modules,
    };
    if let Some(TargetModules::List(names)) = targets {
        names.sort();
    }
    kind
}
