//! Adapter folders that PEFT has written, and such as one meets elsewhere.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use lora::peft::{AdapterConfig, AdapterFiles, AdapterKind, ReadOptions};
use lora::{Error, Init, LoraConfig, TargetModules};
use safetensors::SafeTensors;
use serde_json::Value;

const CPU: Device = Device::Cpu;
const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/peft")
}

/// Every folder below `root` that holds an adapter_config.json, sorted.
fn adapters(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![root.to_path_buf()];
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else if path.ends_with(CONFIG) {
                found.push(folder.clone());
            }
        }
    }
    found.sort();
    found
}

fn name(folder: &Path) -> String {
    let short = folder.strip_prefix(fixtures()).unwrap();
    short
        .components()
        .map(|c| c.as_os_str().to_str().unwrap())
        .collect::<Vec<_>>()
        .join("/")
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// A configuration with lists where PEFT takes a single value for a list of one.
fn as_lists(mut config: Value) -> Value {
    for key in ["layers_to_transform", "layers_pattern"] {
        if let Some(one @ (Value::Number(_) | Value::String(_))) = config.get(key) {
            config[key] = Value::Array(vec![one.clone()]);
        }
    }
    config
}

fn numbers(tensor: &Tensor) -> Vec<f64> {
    tensor
        .to_dtype(DType::F64)
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1()
        .unwrap()
}

fn assert_same(a: &AdapterFiles, b: &AdapterFiles, what: &str) {
    let keys = |files: &AdapterFiles| files.tensors.keys().cloned().collect::<Vec<_>>();
    assert_eq!(keys(a), keys(b), "{what}");
    for (key, tensor) in &a.tensors {
        let other = &b.tensors[key];
        assert_eq!(tensor.dims(), other.dims(), "{what}: {key}");
        assert_eq!(tensor.dtype(), other.dtype(), "{what}: {key}");
        assert_eq!(numbers(tensor), numbers(other), "{what}: {key}");
    }
}

fn message(result: lora::Result<AdapterFiles>) -> String {
    result.unwrap_err().to_string()
}

/// The names in a folder, sorted.
fn listing(folder: &Path) -> Vec<String> {
    let name = |e: fs::DirEntry| e.file_name().into_string().unwrap();
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|e| name(e.unwrap()))
        .collect();
    names.sort();
    names
}

/// A small adapter of one layer "x".
fn small(config: impl Into<AdapterConfig>) -> AdapterFiles {
    let config = config.into();
    let r = config.lora().unwrap().r;
    let tensor = |shape, from: f32| {
        let (a, b) = shape;
        let to = from + (a * b) as f32;
        Tensor::arange(from, to, &CPU)
            .unwrap()
            .reshape(shape)
            .unwrap()
    };
    let tensors = BTreeMap::from([
        (
            "base_model.model.x.lora_A.weight".to_string(),
            tensor((r, 5), 1.0),
        ),
        (
            "base_model.model.x.lora_B.weight".to_string(),
            tensor((7, r), -3.0),
        ),
    ]);
    AdapterFiles { config, tensors }
}

#[test]
fn every_adapter_that_peft_writes() {
    let mut read = 0;
    for folder in adapters(&fixtures()) {
        let case = name(&folder);
        if case.starts_with("wild") {
            continue;
        }
        if case == "model_patterns" {
            // PEFT sorted the patterns when it saved, and cannot load this file either.
            let message = message(AdapterFiles::read(&folder, &CPU));
            assert!(
                message.contains("layer model.layers.0.q_proj: A and B have rank 4"),
                "{message}"
            );
            assert!(message.contains("the configuration says 8"), "{message}");
            assert!(
                message.contains(WEIGHTS) && message.contains("sorts rank_pattern"),
                "{message}"
            );
            continue;
        }
        let files = AdapterFiles::read(&folder, &CPU).unwrap_or_else(|e| panic!("{case}: {e}"));
        let bytes = fs::read(folder.join(WEIGHTS)).unwrap();
        let header = SafeTensors::deserialize(&bytes).unwrap();
        let saved: BTreeSet<&str> = header.names().into_iter().collect();
        let keys: BTreeSet<&str> = files.tensors.keys().map(String::as_str).collect();
        assert_eq!(
            keys, saved,
            "{case}: PEFT's own names must stay as they are"
        );
        let modules = files.modules().unwrap();
        assert!(
            modules.values().any(|module| module.has_adapter()),
            "{case}"
        );

        // Every key that PEFT wrote comes back with its value.
        let text = files.config.to_json().unwrap();
        let written: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(written, as_lists(json(&folder.join(CONFIG))), "{case}");
        assert_eq!(
            AdapterConfig::from_json(text.as_bytes()).unwrap(),
            files.config,
            "{case}"
        );
        let keys: Vec<&String> = written.as_object().unwrap().keys().collect();
        assert!(keys.is_sorted(), "{case}");

        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        files.write(one.path()).unwrap();
        let again = AdapterFiles::read(one.path(), &CPU).unwrap();
        assert_eq!(again.config, files.config, "{case}");
        assert_same(&again, &files, &case);
        again.write(two.path()).unwrap();
        for file in [CONFIG, WEIGHTS] {
            let bytes = |folder: &Path| fs::read(folder.join(file)).unwrap();
            assert_eq!(
                bytes(one.path()),
                bytes(two.path()),
                "{case}: {file} differs"
            );
        }
        if header
            .iter()
            .all(|(_, view)| view.dtype() == safetensors::Dtype::F32)
        {
            let ours = fs::read(one.path().join(WEIGHTS)).unwrap();
            assert_eq!(ours, bytes, "{case}: PEFT's own bytes");
            let config = fs::read_to_string(folder.join(CONFIG)).unwrap();
            if written == json(&folder.join(CONFIG)) {
                assert_eq!(text, config, "{case}");
            }
        }
        read += 1;
    }
    assert!(read >= 40, "only {read} adapters were found");
}

#[test]
fn every_adapter_from_elsewhere() {
    // What the reader says; None: it reads the folder.
    let table: BTreeMap<&str, Option<&str>> = BTreeMap::from([
        ("ab_mismatch", Some("lora_A has rank 3, lora_B rank 2")),
        ("alpha_float", None),
        ("bf16_tensors", None),
        ("bias_new_names", None),
        ("bias_old_names", None),
        ("bin_fallback", Some("weights_only=True")),
        ("default_in_key", None),
        ("duplicate_names", Some("two tensors for one parameter")),
        (
            "inf_in_b",
            Some("1 of 14 values of \"base_model.model.model.layers.0.proj.lora_B.weight\""),
        ),
        ("kasa_config", Some("kasa_config = {\"beta\"")),
        ("layers_int", None),
        ("missing_b", Some("lora_B is missing")),
        ("nan_in_b", Some("non-finite value")),
        ("no_prefix", None),
        // Only the model can tell these two.
        ("no_such_layer", None),
        ("wrong_shape", None),
        ("old_config_v02", None),
        ("other_name", None),
        ("subfolder", None),
        ("target_null", None),
        ("truncated", Some("not a whole safetensors file")),
        ("unknown_null", None),
        ("unknown_option_set", Some("future_option = \"rotate\"")),
        ("unknown_truthy", Some("use_qalora = true")),
        ("wrong_rank", Some("have rank 2, the configuration says 4")),
    ]);
    let root = fixtures().join("wild");
    let found = listing(&root);
    assert_eq!(
        found,
        table.keys().copied().collect::<Vec<_>>(),
        "a folder or an entry is missing"
    );
    let (mut ok, mut refused) = (0, 0);
    for (case, want) in table {
        let folder = root.join(case);
        let info = json(&folder.join("case.json"));
        let expect = info["expect"].as_str().unwrap();
        let read = match info["subfolder"].as_str() {
            Some(adapter) => AdapterFiles::read_named(&folder, adapter, &CPU),
            None => AdapterFiles::read(&folder, &CPU),
        };
        match want {
            Some(part) => {
                assert!(
                    expect.starts_with("refuse") || case == "bin_fallback",
                    "{case}: {expect}"
                );
                let message = message(read);
                assert!(message.contains(part), "{case}: {message}");
                assert!(
                    message.contains(folder.to_str().unwrap()),
                    "{case}: no path in {message}"
                );
                refused += 1;
            }
            None => {
                let by_model = ["no_such_layer", "wrong_shape"].contains(&case);
                assert!(expect == "ok" || by_model, "{case}: {expect}");
                let files = read.unwrap_or_else(|e| panic!("{case}: {e}"));
                assert!(
                    files
                        .modules()
                        .unwrap()
                        .values()
                        .all(|module| module.has_adapter())
                );
                ok += 1;
            }
        }
    }
    println!("{ok} read, {refused} refused");
    assert!(ok >= 12 && refused >= 10);
}

#[test]
fn the_same_adapter_under_other_names() {
    let wild = fixtures().join("wild");
    let plain = AdapterFiles::read(fixtures().join("linear_plain"), &CPU).unwrap();
    for case in [
        "default_in_key",
        "no_prefix",
        "other_name",
        "old_config_v02",
        "target_null",
        "unknown_null",
    ] {
        let files = AdapterFiles::read(wild.join(case), &CPU).unwrap();
        assert_same(&files, &plain, case);
    }
    for folder in [wild.join("subfolder"), wild.join("subfolder/fr")] {
        assert_same(
            &AdapterFiles::read_named(folder, "fr", &CPU).unwrap(),
            &plain,
            "subfolder",
        );
    }
    let old = AdapterFiles::read(wild.join("bias_old_names"), &CPU).unwrap();
    let new = AdapterFiles::read(wild.join("bias_new_names"), &CPU).unwrap();
    assert_same(&old, &new, "bias names");
    assert!(
        old.modules().unwrap()["model.layers.0.proj"]
            .base_bias
            .is_some()
    );

    let old = AdapterFiles::read(wild.join("old_config_v02"), &CPU).unwrap();
    let lora = old.config.lora().unwrap();
    assert_eq!(
        (lora.r, lora.lora_alpha, lora.init_lora_weights),
        (2, 5.0, Init::Kaiming)
    );
    assert_eq!(old.config.other["merge_weights"], Value::Bool(false));
    assert_eq!(old.config.other["enable_lora"], Value::Null);

    let alpha = AdapterFiles::read(wild.join("alpha_float"), &CPU).unwrap();
    let alpha = alpha.config.lora().unwrap().lora_alpha;
    assert!((alpha - 11.313_708_498_984_761).abs() < 1e-14, "{alpha}");
    let null = AdapterFiles::read(wild.join("target_null"), &CPU).unwrap();
    assert_eq!(null.config.lora().unwrap().target_modules, None);
    let layer = AdapterFiles::read(wild.join("layers_int"), &CPU).unwrap();
    assert_eq!(
        layer.config.lora().unwrap().layers_to_transform,
        Some(vec![1])
    );
}

#[test]
fn configurations_survive() {
    let mut count = 0;
    for folder in adapters(&fixtures()) {
        let bytes = fs::read(folder.join(CONFIG)).unwrap();
        let Ok(config) = AdapterConfig::from_json(&bytes) else {
            continue;
        };
        let text = config.to_json().unwrap();
        let mut again = AdapterConfig::from_json(text.as_bytes()).unwrap();
        assert_eq!(again.to_json().unwrap(), text);
        assert_eq!(again.kind, config.kind, "{}", name(&folder));
        // Writing adds the keys that an older file lacks, and nothing else.
        again.other.retain(|key, _| config.other.contains_key(key));
        assert_eq!(again, config, "{}", name(&folder));
        let written: Value = serde_json::from_str(&text).unwrap();
        for (key, value) in as_lists(json(&folder.join(CONFIG))).as_object().unwrap() {
            assert_eq!(&written[key], value, "{}: {key}", name(&folder));
        }
        count += 1;
    }
    assert!(count >= 60, "{count}");
}

#[test]
fn patterns_keep_their_order() {
    let mut lora = LoraConfig::new(2, 4.0).with_targets(TargetModules::regex(".*x"));
    lora.rank_pattern = vec![("z".into(), 1), ("x".into(), 2), ("a".into(), 3)];
    lora.alpha_pattern = vec![("y".into(), 0.5), ("b".into(), 7.0)];
    let files = small(lora.clone());
    let folder = tempfile::tempdir().unwrap();
    files.write(folder.path()).unwrap();
    let again = AdapterFiles::read(folder.path(), &CPU).unwrap();
    assert_eq!(again.config.kind, AdapterKind::Lora(lora));
    let text = fs::read_to_string(folder.path().join(CONFIG)).unwrap();
    let at = |part: &str| text.find(part).unwrap();
    assert!(at("\"z\": 1") < at("\"x\": 2") && at("\"x\": 2") < at("\"a\": 3"));
    assert!(at("\"y\": 0.5") < at("\"b\": 7"));
}

#[test]
fn types_of_numbers() {
    let read = |dtype: DType| {
        let mut files = small(LoraConfig::new(2, 4.0));
        for tensor in files.tensors.values_mut() {
            *tensor = tensor.to_dtype(dtype).unwrap();
        }
        let folder = tempfile::tempdir().unwrap();
        files.write(folder.path()).unwrap();
        (AdapterFiles::read(folder.path(), &CPU), files)
    };
    for (dtype, becomes) in [
        (DType::F32, DType::F32),
        (DType::F64, DType::F64),
        (DType::F16, DType::F32),
        (DType::BF16, DType::F32),
    ] {
        let (again, files) = read(dtype);
        for (key, tensor) in again.unwrap().tensors {
            assert_eq!(tensor.dtype(), becomes, "{dtype:?}");
            assert_eq!(numbers(&tensor), numbers(&files.tensors[&key]), "{dtype:?}");
        }
    }
    let mut files = small(LoraConfig::new(2, 4.0));
    for tensor in files.tensors.values_mut() {
        *tensor = tensor.to_dtype(DType::I64).unwrap();
    }
    let folder = tempfile::tempdir().unwrap();
    let refused = files.write(folder.path()).unwrap_err().to_string();
    assert!(refused.contains("lora_A.weight\" is I64"), "{refused}");
    assert!(listing(folder.path()).is_empty());

    let views = files.tensors.iter();
    let bytes = safetensors::serialize(views, None).unwrap();
    let config = files.config.to_json().unwrap();
    let read = AdapterFiles::from_bytes(config.as_bytes(), &bytes, &ReadOptions::default(), &CPU);
    assert!(message(read).contains("lora_A.weight\": type I64"));
}

#[test]
fn broken_weights() {
    let files = small(LoraConfig::new(2, 4.0));
    let config = files.config.to_json().unwrap();
    let bytes = safetensors::serialize(files.tensors.iter(), None).unwrap();
    let read = |bytes: &[u8]| {
        AdapterFiles::from_bytes(config.as_bytes(), bytes, &ReadOptions::default(), &CPU)
    };
    assert!(read(&bytes).is_ok());
    for cut in 0..bytes.len() {
        assert!(read(&bytes[..cut]).is_err(), "{cut} bytes");
    }
    assert!(read(&[&bytes[..], &[0]].concat()).is_err());
    let mut long = bytes.clone();
    long[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(message(read(&long)).contains("its header would be 18446744073709551615 bytes"));
    long[..8].copy_from_slice(&(99_000_000u64).to_le_bytes());
    assert!(message(read(&long)).contains("at most 16777216"));

    let none: BTreeMap<String, Tensor> = BTreeMap::new();
    let bytes = safetensors::serialize(none.iter(), None).unwrap();
    assert!(message(read(&bytes)).contains("no tensor is in it"));
    let empty = BTreeMap::from([(
        "x.lora_A.weight",
        Tensor::zeros((0, 5), DType::F32, &CPU).unwrap(),
    )]);
    let bytes = safetensors::serialize(empty.iter(), None).unwrap();
    assert!(message(read(&bytes)).contains("shape [0, 5] is empty"));
    let unknown = BTreeMap::from([("x.lora_diag", Tensor::zeros(5, DType::F32, &CPU).unwrap())]);
    let bytes = safetensors::serialize(unknown.iter(), None).unwrap();
    assert!(
        message(read(&bytes)).contains("1 of 1 tensor names are not understood: \"x.lora_diag\"")
    );
}

#[test]
fn messages_stay_short() {
    let long = "x".repeat(50_000);
    let length = |json: String| {
        let message = AdapterConfig::from_json(json.as_bytes())
            .unwrap_err()
            .to_string();
        assert!(message.contains("xxx"), "{message}");
        message.len()
    };
    assert!(length(format!(r#"{{"peft_type": "LORA", "{long}": 1}}"#)) < 600);
    assert!(length(format!(r#"{{"peft_type": "LORA", "a": "{long}"}}"#)) < 600);
    assert!(length(format!(r#"{{"peft_type": "{long}"}}"#)) < 600);
    assert!(length(format!(r#"{{"peft_type": "LORA", "bias": "{long}"}}"#)) < 600);
    let many = (0..1000).map(|i| {
        let tensor = Tensor::zeros(1, DType::F32, &CPU).unwrap();
        (format!("{}{i}", "x".repeat(500)), tensor)
    });
    let bytes = safetensors::serialize(many, None).unwrap();
    let config = br#"{"peft_type": "LORA"}"#;
    let read = AdapterFiles::from_bytes(config, &bytes, &ReadOptions::default(), &CPU);
    let message = message(read);
    assert!(
        message.contains("and 995 more") && message.len() < 1200,
        "{message}"
    );
}

#[test]
fn dimensions_of_a_saved_weight() {
    let read = |dims: usize| {
        let mut files = small(LoraConfig::new(2, 4.0));
        let tensor = Tensor::zeros(vec![1; dims], DType::F32, &CPU).unwrap();
        files.tensors.insert("head.weight".into(), tensor);
        let bytes = safetensors::serialize(files.tensors.iter(), None).unwrap();
        let config = files.config.to_json().unwrap();
        AdapterFiles::from_bytes(config.as_bytes(), &bytes, &ReadOptions::default(), &CPU)
    };
    assert!(read(8).is_ok());
    assert!(message(read(9)).contains("head.weight\": 9 dimensions"));
    assert!(message(read(0)).contains("head.weight\": 0 dimensions"));
}

#[test]
fn a_folder_in_the_place_of_a_file_is_not_read() {
    for file in [CONFIG, WEIGHTS] {
        let folder = tempfile::tempdir().unwrap();
        small(LoraConfig::new(2, 4.0)).write(folder.path()).unwrap();
        fs::remove_file(folder.path().join(file)).unwrap();
        fs::create_dir(folder.path().join(file)).unwrap();
        let refused = message(AdapterFiles::read(folder.path(), &CPU));
        assert!(
            refused.contains(file) && refused.contains("this is no file"),
            "{refused}"
        );
    }
}

#[test]
fn non_finite_on_request() {
    let options = ReadOptions {
        allow_non_finite: true,
        ..ReadOptions::default()
    };
    for case in ["nan_in_b", "inf_in_b"] {
        let folder = fixtures().join("wild").join(case);
        let files = AdapterFiles::read_with(&folder, &options, &CPU).unwrap();
        let broken = files
            .tensors
            .values()
            .flat_map(numbers)
            .filter(|x| !x.is_finite())
            .count();
        assert_eq!(broken, 1, "{case}");
    }
}

#[test]
fn names_of_adapters() {
    let folder = tempfile::tempdir().unwrap();
    let files = small(LoraConfig::new(2, 4.0));
    for bad in [
        "", ".", "..", "a/b", "/tmp", "a\\b", "../x", "a b", "a.b", "a\0b", "~",
    ] {
        let read = AdapterFiles::read_named(folder.path(), bad, &CPU);
        assert!(matches!(read, Err(Error::AdapterName { .. })), "{bad:?}");
        let write = files.write_named(folder.path(), bad);
        assert!(matches!(write, Err(Error::AdapterName { .. })), "{bad:?}");
    }
    assert!(listing(folder.path()).is_empty());

    for name in ["fr", "de-1", "en_2", "größe"] {
        files.write_named(folder.path(), name).unwrap();
    }
    let refused = message(AdapterFiles::read(folder.path(), &CPU));
    assert!(
        refused.contains("\"de-1\", \"en_2\", \"fr\", \"größe\"; give one"),
        "{refused}"
    );
    let other = small(LoraConfig::new(3, 4.0));
    other.write_named(folder.path(), "default").unwrap();
    assert!(folder.path().join(CONFIG).is_file());
    let r = |adapter| {
        let files = AdapterFiles::read_named(folder.path(), adapter, &CPU).unwrap();
        files.config.lora().unwrap().r
    };
    assert_eq!((r("fr"), r("default")), (2, 3));
    // PEFT too loads the folder itself under any name.
    assert_eq!(r("elsewhere"), 3);
    let missing = AdapterFiles::read_named(folder.path().join("none"), "fr", &CPU);
    assert!(message(missing).contains("neither here nor in a folder"));
    let missing = AdapterFiles::read(folder.path().join("none"), &CPU);
    assert!(message(missing).contains("this is no folder"));
}

#[test]
fn a_write_that_fails_leaves_the_old_adapter() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let old = small(LoraConfig::new(2, 4.0));
    old.write(path).unwrap();
    let bytes = || {
        (
            fs::read(path.join(CONFIG)).unwrap(),
            fs::read(path.join(WEIGHTS)).unwrap(),
        )
    };
    let before = bytes();

    let mut broken = small(LoraConfig::new(2, 8.0));
    broken.tensors.remove("base_model.model.x.lora_B.weight");
    assert!(
        broken
            .write(path)
            .unwrap_err()
            .to_string()
            .contains("lora_B is missing")
    );
    let mut broken = small(LoraConfig::new(2, 8.0));
    let b = broken.tensors["base_model.model.x.lora_B.weight"].clone();
    broken.tensors.insert("x.lora_B.default.weight".into(), b);
    assert!(
        broken
            .write(path)
            .unwrap_err()
            .to_string()
            .contains("two tensors for one")
    );
    let mut broken = small(LoraConfig::new(2, 8.0));
    broken
        .config
        .other
        .insert("use_qalora".into(), Value::Bool(true));
    assert!(
        broken
            .write(path)
            .unwrap_err()
            .to_string()
            .contains("use_qalora")
    );
    let mut broken = small(LoraConfig::new(2, 8.0));
    broken.tensors.clear();
    assert!(
        broken
            .write(path)
            .unwrap_err()
            .to_string()
            .contains("no tensor to write")
    );
    assert_eq!(bytes(), before);
    assert_eq!(listing(path), [CONFIG, WEIGHTS]);

    // The folder is a file; a file is a folder; the name is impossible.
    let new = small(LoraConfig::new(2, 8.0));
    let refused = new.write(path.join(CONFIG)).unwrap_err().to_string();
    assert!(refused.contains("cannot be written"), "{refused}");
    assert!(new.write(path.join("x".repeat(300))).is_err());
    assert_eq!(bytes(), before);
    for file in [CONFIG, WEIGHTS] {
        let folder = tempfile::tempdir().unwrap();
        old.write(folder.path()).unwrap();
        fs::remove_file(folder.path().join(file)).unwrap();
        fs::create_dir(folder.path().join(file)).unwrap();
        let refused = new.write(folder.path()).unwrap_err().to_string();
        assert!(
            refused.contains(file) && refused.contains("a folder lies where"),
            "{refused}"
        );
        assert_eq!(listing(folder.path()), [CONFIG, WEIGHTS]);
        assert!(AdapterFiles::read(folder.path(), &CPU).is_err());
    }

    // Nothing is left behind but the two files, and what was there.
    fs::write(path.join("tokenizer.json"), "{}").unwrap();
    new.write(path).unwrap();
    assert_eq!(listing(path), [CONFIG, WEIGHTS, "tokenizer.json"]);
    let again = AdapterFiles::read(path, &CPU).unwrap();
    assert_eq!(again.config.lora().unwrap().lora_alpha, 8.0);
}

#[cfg(unix)]
#[test]
fn a_folder_that_cannot_be_written() {
    use std::os::unix::fs::PermissionsExt;

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    small(LoraConfig::new(2, 4.0)).write(path).unwrap();
    let allow = |mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    allow(0o555);
    // The superuser may write everywhere.
    if fs::write(path.join("probe"), "").is_err() {
        let refused = small(LoraConfig::new(2, 8.0))
            .write(path)
            .unwrap_err()
            .to_string();
        assert!(refused.contains("cannot be written"), "{refused}");
        let files = AdapterFiles::read(path, &CPU).unwrap();
        assert_eq!(files.config.lora().unwrap().lora_alpha, 4.0);
    }
    allow(0o755);
}

#[cfg(unix)]
#[test]
fn links_are_read_and_not_written_through() {
    let (store, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    small(LoraConfig::new(2, 4.0)).write(store.path()).unwrap();
    for file in [CONFIG, WEIGHTS] {
        std::os::unix::fs::symlink(store.path().join(file), folder.path().join(file)).unwrap();
    }
    assert!(AdapterFiles::read(folder.path(), &CPU).is_ok());
    small(LoraConfig::new(3, 8.0)).write(folder.path()).unwrap();
    let r = |path: &Path| {
        AdapterFiles::read(path, &CPU)
            .unwrap()
            .config
            .lora()
            .unwrap()
            .r
    };
    assert_eq!((r(store.path()), r(folder.path())), (2, 3));
}

#[cfg(unix)]
#[test]
fn files_are_as_readable_as_any_other() {
    use std::os::unix::fs::PermissionsExt;

    let folder = tempfile::tempdir().unwrap();
    small(LoraConfig::new(2, 4.0)).write(folder.path()).unwrap();
    fs::write(folder.path().join("plain"), "").unwrap();
    let mode = |file| {
        fs::metadata(folder.path().join(file))
            .unwrap()
            .permissions()
            .mode()
    };
    assert_eq!(mode(CONFIG), mode("plain"));
    assert_eq!(mode(WEIGHTS), mode("plain"));
}

#[test]
fn pickles_are_not_read() {
    let folder = tempfile::tempdir().unwrap();
    let files = small(LoraConfig::new(2, 4.0));
    files.write(folder.path()).unwrap();
    fs::write(folder.path().join("adapter_model.bin"), "cos\nsystem\n").unwrap();
    assert!(AdapterFiles::read(folder.path(), &CPU).is_ok());
    fs::remove_file(folder.path().join(WEIGHTS)).unwrap();
    let refused = message(AdapterFiles::read(folder.path(), &CPU));
    assert!(
        refused.contains("adapter_model.bin") && refused.contains("save_file("),
        "{refused}"
    );
    fs::remove_file(folder.path().join("adapter_model.bin")).unwrap();
    let refused = message(AdapterFiles::read(folder.path(), &CPU));
    assert!(
        refused.contains(WEIGHTS) && refused.contains("the file is missing"),
        "{refused}"
    );
}
