//! Models of candle-transformers, unchanged, over a checkpoint with an adapter of real PEFT in it.
//!
//! The fixtures are tiny random models of transformers; see fixtures/transformers/generate.py.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{bert, llama};
use lora::LoraConfig;
use lora::peft::{AdapterFiles, MergedVarBuilder, merged_var_builder, merged_var_builder_tied};

const CPU: Device = Device::Cpu;

fn folder(model: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/transformers")
        .join(model)
}

fn base(model: &str, dtype: DType) -> VarBuilder<'static> {
    let bytes = std::fs::read(folder(model).join("model.safetensors")).unwrap();
    VarBuilder::from_buffered_safetensors(bytes, dtype, &CPU).unwrap()
}

fn adapter(model: &str) -> AdapterFiles {
    AdapterFiles::read(folder(model), &CPU).unwrap()
}

fn case(model: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(folder(model).join("case.safetensors"), &CPU).unwrap()
}

fn run_bert(vb: VarBuilder<'_>) -> Tensor {
    let json = std::fs::read(folder("bert").join("config.json")).unwrap();
    let config: bert::Config = serde_json::from_slice(&json).unwrap();
    let ids = case("bert")["input"].to_dtype(DType::U32).unwrap();
    let model = bert::BertModel::load(vb, &config).unwrap();
    model
        .forward(&ids, &ids.zeros_like().unwrap(), None)
        .unwrap()
}

fn run_llama(vb: VarBuilder<'_>) -> Tensor {
    let json = std::fs::read(folder("llama").join("config.json")).unwrap();
    let config: llama::LlamaConfig = serde_json::from_slice(&json).unwrap();
    let config = config.into_config(false);
    let mut cache = llama::Cache::new(false, vb.dtype(), &config, &CPU).unwrap();
    let ids = case("llama")["input"].to_dtype(DType::U32).unwrap();
    llama::Llama::load(vb, &config)
        .unwrap()
        .forward(&ids, 0, &mut cache)
        .unwrap()
}

/// The largest difference, relative to the largest expected value.
fn gap(got: &Tensor, want: &Tensor) -> f32 {
    let got = got.to_dtype(DType::F32).unwrap();
    let largest = |t: Tensor| {
        t.abs()
            .unwrap()
            .max_all()
            .unwrap()
            .to_scalar::<f32>()
            .unwrap()
    };
    assert_eq!(got.dims(), want.dims());
    largest((&got - want).unwrap()) / largest(want.clone())
}

#[test]
fn bert_with_a_peft_adapter_gives_pefts_output() {
    let case = case("bert");
    let plain = run_bert(base("bert", DType::F32));
    assert!(gap(&plain, &case["output_base"]) < 1e-5, "the base itself");
    let merged = merged_var_builder(base("bert", DType::F32), &adapter("bert")).unwrap();
    assert_eq!(merged.unread().len(), 6, "{:?}", merged.unread());
    let output = run_bert(merged.vb());
    let gap = gap(&output, &case["output"]);
    println!("BERT with the adapter: largest relative difference from PEFT {gap:.1e}");
    assert!(gap < 1e-5, "off by {gap:e}");
    assert!(merged.unread().is_empty(), "{:?}", merged.unread());
}

#[test]
fn llama_with_a_dora_adapter_gives_pefts_output() {
    let case = case("llama");
    let plain = run_llama(base("llama", DType::F32));
    assert!(gap(&plain, &case["output_base"]) < 1e-5, "the base itself");
    let merged = merged_var_builder(base("llama", DType::F32), &adapter("llama")).unwrap();
    let output = run_llama(merged.vb());
    let gap = gap(&output, &case["output"]);
    println!("Llama with the DoRA adapter: largest relative difference from PEFT {gap:.1e}");
    assert!(gap < 1e-5, "off by {gap:e}");
    assert!(merged.unread().is_empty(), "{:?}", merged.unread());
}

/// Every weight is rounded once to bf16, 8 bits; two layers and their norms add up a few of them.
#[test]
fn a_half_precision_checkpoint_is_merged_in_f32() {
    let merged = merged_var_builder(base("llama", DType::BF16), &adapter("llama")).unwrap();
    let name = "model.layers.0.self_attn.q_proj";
    let half = merged.vb().pp(name).get((16, 16), "weight").unwrap();
    assert_eq!(half.dtype(), DType::BF16);
    let full = merged_var_builder(base("llama", DType::F32), &adapter("llama")).unwrap();
    let full = full.vb().pp(name).get((16, 16), "weight").unwrap();
    // The base is rounded before and the sum after: two times half a unit of 2⁻⁸.
    assert!(gap(&half, &full) <= 2f32.powi(-8), "{}", gap(&half, &full));
}

fn files(config: LoraConfig, tensors: &[(&str, &[usize])]) -> AdapterFiles {
    let ones = |shape: &[usize]| Tensor::ones(shape, DType::F32, &CPU).unwrap();
    let tensors = tensors
        .iter()
        .map(|(k, s)| (format!("base_model.model.{k}"), ones(s)));
    AdapterFiles {
        config: config.into(),
        tensors: tensors.collect(),
    }
}

fn checkpoint(tensors: &[(&str, &[usize])]) -> VarBuilder<'static> {
    let ones = |shape: &[usize]| Tensor::ones(shape, DType::F32, &CPU).unwrap();
    let tensors = tensors
        .iter()
        .map(|(k, s)| (k.to_string(), ones(s)))
        .collect();
    VarBuilder::from_tensors(tensors, DType::F32, &CPU)
}

fn refused(result: lora::Result<MergedVarBuilder<'_>>, words: &[&str]) {
    let text = result.err().expect("must be refused").to_string();
    for word in words {
        assert!(text.contains(word), "{word:?} is not in: {text}");
    }
}

#[test]
fn a_module_that_the_checkpoint_lacks_is_refused_and_can_be_renamed() {
    let adapter = files(
        LoraConfig::new(1, 2.0),
        &[
            ("bert.q.lora_A.weight", &[1, 4]),
            ("bert.q.lora_B.weight", &[3, 1]),
        ],
    );
    let base = checkpoint(&[("q.weight", &[3, 4])]);
    refused(
        merged_var_builder(base.clone(), &adapter),
        &["bert.q.weight", "renamed"],
    );
    let adapter = adapter
        .renamed(|p| p.trim_start_matches("bert.").to_string())
        .unwrap();
    let merged = merged_var_builder(base, &adapter).unwrap();
    let weight = merged.vb().get((3, 4), "q.weight").unwrap();
    assert_eq!(weight.to_vec2::<f32>().unwrap(), [[3.0; 4]; 3]);
}

#[test]
fn an_embedding_that_may_be_tied_is_refused() {
    let adapter = files(
        LoraConfig::new(1, 2.0),
        &[
            ("wte.lora_embedding_A", &[1, 5]),
            ("wte.lora_embedding_B", &[3, 1]),
        ],
    );
    let tied = checkpoint(&[("wte.weight", &[5, 3])]);
    refused(
        merged_var_builder(tied.clone(), &adapter),
        &["wte", "head", "tied"],
    );
    let untied = checkpoint(&[("wte.weight", &[5, 3]), ("lm_head.weight", &[5, 3])]);
    for (base, own_head) in [(untied, true), (tied, false)] {
        let merged = if own_head {
            merged_var_builder(base, &adapter)
        } else {
            merged_var_builder_tied(base, &adapter)
        };
        let merged = merged.unwrap();
        let embedding = merged.vb().get((5, 3), "wte.weight").unwrap();
        assert_eq!(embedding.to_vec2::<f32>().unwrap(), [[3.0; 3]; 5]);
        if own_head {
            let head = merged.vb().get((5, 3), "lm_head.weight").unwrap();
            assert_eq!(head.to_vec2::<f32>().unwrap(), [[1.0; 3]; 5]);
        }
    }
}

#[test]
fn weights_stored_the_other_way_round_need_fan_in_fan_out() {
    let tensors: &[(&str, &[usize])] =
        &[("c.lora_A.weight", &[1, 4]), ("c.lora_B.weight", &[3, 1])];
    let base = || checkpoint(&[("c.weight", &[4, 3])]);
    let plain = merged_var_builder(base(), &files(LoraConfig::new(1, 2.0), tensors)).unwrap();
    let error = plain.vb().get((4, 3), "c.weight").unwrap_err().to_string();
    assert!(
        error.contains("fan_in_fan_out") && error.contains("[4, 3]"),
        "{error}"
    );
    let config = LoraConfig {
        fan_in_fan_out: true,
        ..LoraConfig::new(1, 2.0)
    };
    let merged = merged_var_builder(base(), &files(config, tensors)).unwrap();
    let weight = merged.vb().get((4, 3), "c.weight").unwrap();
    assert_eq!(weight.to_vec2::<f32>().unwrap(), [[3.0; 3]; 4]);
}

#[test]
fn biases_saved_modules_and_convolutions() {
    let config = LoraConfig {
        lora_bias: true,
        modules_to_save: vec!["head".to_string()],
        ..LoraConfig::new(1, 2.0)
    };
    let adapter = files(
        config,
        &[
            ("c.lora_A.weight", &[1, 2, 3, 3]),
            ("c.lora_B.weight", &[4, 1, 1, 1]),
            ("c.lora_B.bias", &[4]),
            ("head.weight", &[2, 2]),
            ("head.bias", &[2]),
        ],
    );
    let base = checkpoint(&[
        ("c.weight", &[4, 2, 3, 3]),
        ("c.bias", &[4]),
        ("head.weight", &[2, 2]),
        ("head.bias", &[2]),
        ("norm.bias", &[2]),
    ]);
    let merged = merged_var_builder(base, &adapter).unwrap();
    let vb = merged.vb();
    let sum = |t: Tensor| t.sum_all().unwrap().to_scalar::<f32>().unwrap();
    assert_eq!(sum(vb.get((4, 2, 3, 3), "c.weight").unwrap()), 3.0 * 72.0);
    assert_eq!(
        vb.get(4, "c.bias").unwrap().to_vec1::<f32>().unwrap(),
        [3.0; 4]
    );
    assert_eq!(merged.unread(), ["head.bias", "head.weight"]);
    assert_eq!(sum(vb.get((2, 2), "head.weight").unwrap()), 4.0);
    assert_eq!(sum(vb.get(2, "head.bias").unwrap()), 2.0);
    assert_eq!(sum(vb.get(2, "norm.bias").unwrap()), 2.0);
    assert!(merged.unread().is_empty());
}

#[test]
fn a_bias_without_a_place_a_grouped_convolution_and_pissa_niter_are_refused() {
    let lora_bias = LoraConfig::new(1, 2.0).with_lora_bias(true);
    let adapter = files(
        lora_bias,
        &[
            ("q.lora_A.weight", &[1, 4]),
            ("q.lora_B.weight", &[3, 1]),
            ("q.lora_B.bias", &[3]),
        ],
    );
    refused(
        merged_var_builder(checkpoint(&[("q.weight", &[3, 4])]), &adapter),
        &["q.bias"],
    );

    let conv: &[(&str, &[usize])] = &[
        ("c.lora_A.weight", &[2, 4, 3]),
        ("c.lora_B.weight", &[4, 1, 1]),
    ];
    let grouped = files(LoraConfig::new(2, 2.0), conv);
    let merged = merged_var_builder(checkpoint(&[("c.weight", &[4, 2, 3])]), &grouped).unwrap();
    let error = merged
        .vb()
        .get((4, 2, 3), "c.weight")
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("layer c") && error.contains("groups"),
        "{error}"
    );

    let pissa = LoraConfig::new(1, 2.0).with_init(lora::Init::PissaNiter(4));
    let adapter = AdapterFiles {
        config: pissa.into(),
        tensors: BTreeMap::new(),
    };
    refused(
        merged_var_builder(checkpoint(&[]), &adapter),
        &["pissa_niter_4", "conversion"],
    );
}
