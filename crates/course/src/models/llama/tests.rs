use std::collections::HashMap;
use std::path::PathBuf;

use candle_core::{DType, IndexOp};
use candle_nn::VarBuilder;

use super::*;
use crate::models::testing::gap;
use crate::rng::rng;

/// A tiny model of transformers with an adapter of PEFT's; how it was made stands beside it.
fn fixture(file: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../lora/tests/fixtures/transformers/llama")
        .join(file)
}

fn case() -> HashMap<String, Tensor> {
    candle_core::safetensors::load(fixture("case.safetensors"), &Device::Cpu).unwrap()
}

fn model(tied: bool) -> (Llama, lora::LoraModel) {
    let json = std::fs::read_to_string(fixture("config.json")).unwrap();
    let mut config: LlamaConfig = serde_json::from_str(&json).unwrap();
    assert!(!config.tie_word_embeddings);
    config.tie_word_embeddings = tied;
    let bytes = std::fs::read(fixture("model.safetensors")).unwrap();
    let vb = VarBuilder::from_buffered_safetensors(bytes, DType::F32, &Device::Cpu).unwrap();
    let builder = LoraBuilder::new(vb);
    (
        Llama::new(&config, &builder).unwrap(),
        builder.model().unwrap(),
    )
}

#[test]
fn logits_are_those_of_transformers_and_peft() {
    let (case, (llama, mut model)) = (case(), model(false));
    let ids = case["input"].to_dtype(DType::U32).unwrap();
    // The fixture holds the logits of the last token.
    let logits = |llama: &Llama| {
        let all = llama.forward_t(&ids, false).unwrap();
        let length = all.dim(1).unwrap();
        all.narrow(1, length - 1, 1).unwrap().squeeze(1).unwrap()
    };
    assert!(gap(&logits(&llama), &case["output_base"]) < 1e-6);
    model.load_adapter(fixture(""), "default").unwrap();
    assert!(gap(&logits(&llama), &case["output"]) < 1e-6);
}

#[test]
fn what_does_not_count_is_not_in_the_loss() {
    let ids = case()["input"].to_dtype(DType::U32).unwrap();
    let (llama, _) = model(true);
    let (rows, length) = ids.dims2().unwrap();
    let next = ids.to_dtype(DType::I64).unwrap();
    let ignored = Tensor::full(ops::IGNORE_INDEX, (rows, length - 2), &Device::Cpu).unwrap();
    let two = Tensor::cat(&[ignored, next.narrow(1, length - 2, 2).unwrap()], 1).unwrap();
    let (all, two) = ((ids.clone(), next), (ids.clone(), two));
    let number = |t: &Tensor| f64::from(t.to_scalar::<f32>().unwrap());
    let logits = llama.forward_t(&ids, false).unwrap();
    let want = number(&ops::cross_entropy(&logits, &two.1).unwrap());
    assert!((number(&llama.loss(&two.0, &two.1, false).unwrap()) - want).abs() < 1e-6);
    // A window counts by its targets.
    let whole = number(&llama.loss(&all.0, &all.1, false).unwrap());
    let mean = (2.0 * want + length as f64 * whole) / (2 + length) as f64;
    let got = llama.held_out_loss(&[two, all]).unwrap();
    assert!((got - mean).abs() < 1e-6, "{got} for {mean}");
}

#[test]
fn the_loss_is_the_cross_entropy_of_the_logits() {
    let ids = case()["input"].to_dtype(DType::U32).unwrap();
    for tied in [false, true] {
        let (llama, mut model) = model(tied);
        model.load_adapter(fixture(""), "default").unwrap();
        let logits = llama.forward_t(&ids, true).unwrap();
        let want = ops::cross_entropy(&logits, &ids).unwrap();
        let loss = llama.loss(&ids, &ids, true).unwrap();
        assert!(gap(&loss, &want) < 1e-6, "tied: {tied}");
        let (got, wanted) = (loss.backward().unwrap(), want.backward().unwrap());
        for (name, var) in model.trainable_parameters() {
            let off = gap(got.get(&var).unwrap(), wanted.get(&var).unwrap());
            assert!(off < 1e-5, "{name}: {off:e}");
        }
    }
}

/// Pretraining and full fine-tuning: the same model over a builder whose base trains.
#[test]
fn every_weight_trains_where_the_base_does() {
    let json = std::fs::read_to_string(fixture("config.json")).unwrap();
    let ids = case()["input"].to_dtype(DType::U32).unwrap();
    for tied in [false, true] {
        let mut config: LlamaConfig = serde_json::from_str(&json).unwrap();
        config.tie_word_embeddings = tied;
        let bytes = std::fs::read(fixture("model.safetensors")).unwrap();
        let vb = VarBuilder::from_buffered_safetensors(bytes, DType::F32, &Device::Cpu);
        let builder = LoraBuilder::trainable(vb.unwrap());
        let llama = Llama::new(&config, &builder).unwrap();
        let count = builder.model().unwrap().parameter_count();
        assert_eq!(count.trainable, config.parameter_count());
        assert_eq!(count.all, config.parameter_count());

        let logits = llama.forward_t(&ids, true).unwrap();
        let want = ops::cross_entropy(&logits, &ids).unwrap();
        let loss = llama.loss(&ids, &ids, true).unwrap();
        assert!(gap(&loss, &want) < 1e-6, "tied: {tied}");
        let (got, wanted) = (loss.backward().unwrap(), want.backward().unwrap());
        for (name, var) in builder.variables() {
            let off = gap(got.get(&var).unwrap(), wanted.get(&var).unwrap());
            assert!(off < 1e-5, "{name}: {off:e}");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let json = std::fs::read_to_string(fixture("config.json")).unwrap();
    let with = |from: &str, to: &str| {
        assert!(json.contains(from), "{from}");
        let config = serde_json::from_str::<LlamaConfig>(&json.replace(from, to));
        config.unwrap_err().to_string()
    };
    assert!(with("\"rope_type\": \"default\"", "\"rope_type\": \"llama3\"").contains("scaled"));
    for (from, to, said) in [
        (
            "\"model_type\": \"llama\"",
            "\"model_type\": \"qwen2\"",
            "\"qwen2\"",
        ),
        (
            "\"hidden_act\": \"silu\"",
            "\"hidden_act\": \"gelu\"",
            "\"gelu\"",
        ),
        (
            "\"attention_bias\": false",
            "\"attention_bias\": true",
            "biases",
        ),
        ("\"mlp_bias\": false", "\"mlp_bias\": true", "biases"),
        ("\"rope_theta\": 10000.0", "\"rope_theta\": 0.0", "above 0"),
        (
            "\"max_position_embeddings\": 32",
            "\"max_position_embeddings\": 4294967295",
            "max_position_embeddings = 4294967295",
        ),
        ("\"head_dim\": 4", "\"head_dim\": 8", "head_dim is 8"),
    ] {
        let error = with(from, to);
        assert!(error.contains(said), "{error}");
    }
    let heads = with("\"num_key_value_heads\": 2", "\"num_key_value_heads\": 3");
    assert!(
        heads.contains("multiple of num_key_value_heads = 3"),
        "{heads}"
    );

    let (llama, _) = model(false);
    let long = Tensor::zeros((1, 33), DType::U32, &Device::Cpu).unwrap();
    let error = llama.forward_t(&long, false).unwrap_err().to_string();
    assert!(
        error.contains("33 tokens") && error.contains("32"),
        "{error}"
    );
}

#[test]
fn generation_with_kept_keys_is_that_of_the_whole_text() {
    let (llama, mut model) = model(false);
    model.load_adapter(fixture(""), "default").unwrap();
    let config = GenerationConfig {
        max_new_tokens: 12,
        temperature: 0.0,
        ..GenerationConfig::default()
    };
    let new = llama
        .generate(&[3, 1, 4, 1, 5], &config, &mut rng(1))
        .unwrap();
    let mut text = vec![3u32, 1, 4, 1, 5];
    for token in &new {
        let ids = Tensor::new(text.as_slice(), &Device::Cpu).unwrap();
        let logits = llama.forward_t(&ids.unsqueeze(0).unwrap(), false).unwrap();
        let last = logits.i((0, text.len() - 1)).unwrap();
        assert_eq!(last.argmax(0).unwrap().to_scalar::<u32>().unwrap(), *token);
        text.push(*token);
    }
    assert_eq!(new.len(), 12);

    // The third token as the mark of the end: the first two stay.
    let ends = GenerationConfig {
        eos_token_id: Some(new[2]),
        ..config
    };
    let first = new.iter().position(|token| *token == new[2]).unwrap();
    let cut = llama
        .generate(&[3, 1, 4, 1, 5], &ends, &mut rng(1))
        .unwrap();
    assert_eq!(cut, new[..first]);
}

#[test]
fn drawn_tokens_follow_the_softmax_of_the_likeliest() {
    let (llama, _) = model(false);
    let logits = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let prompt = Tensor::new(&[[1u32, 2]], &Device::Cpu).unwrap();
    let last = llama.forward_t(&prompt, false).unwrap().i((0, 1)).unwrap();
    let last = logits(&last);
    let mut order: Vec<usize> = (0..last.len()).collect();
    order.sort_by(|a, b| last[*b].total_cmp(&last[*a]));
    let (top_k, draws) = (3, 2000);
    let mut rng = rng(7);
    // Cold, where the three differ, and warm, where without top_k others would be drawn.
    for temperature in [0.05, 2.0] {
        let weight = |i: &usize| (f64::from(last[*i]) / temperature).exp();
        let all: f64 = order[..top_k].iter().map(weight).sum();
        let config = GenerationConfig {
            max_new_tokens: 1,
            temperature,
            top_k,
            eos_token_id: None,
        };
        let mut counts = HashMap::new();
        for _ in 0..draws {
            let new = llama.generate(&[1, 2], &config, &mut rng).unwrap();
            *counts.entry(new[0] as usize).or_insert(0) += 1;
        }
        for token in &order[..top_k] {
            let share = counts.remove(token).unwrap_or(0) as f64 / draws as f64;
            let want = weight(token) / all;
            // Four standard errors.
            let slack = 4.0 * (want * (1.0 - want) / draws as f64).sqrt();
            assert!((share - want).abs() < slack, "{share} instead of {want}");
        }
        assert!(counts.is_empty(), "{counts:?}");
    }
}

#[test]
fn what_cannot_be_generated_is_refused() {
    let (llama, _) = model(false);
    let refused = |prompt: &[u32], config: GenerationConfig| {
        let error = llama.generate(prompt, &config, &mut rng(1)).unwrap_err();
        error.to_string()
    };
    let good = GenerationConfig::default;
    assert!(refused(&[], good()).contains("prompt is empty"));
    let long = refused(&[1], good());
    assert!(
        long.contains("32") && long.contains("max_new_tokens"),
        "{long}"
    );
    let with = |temperature: f64, top_k: usize| GenerationConfig {
        max_new_tokens: 3,
        temperature,
        top_k,
        eos_token_id: None,
    };
    for bad in [-1.0, f64::NAN, f64::INFINITY] {
        assert!(refused(&[1], with(bad, 5)).contains("temperature"));
    }
    assert!(refused(&[1], with(1.0, 0)).contains("top_k"));
}

#[test]
fn attention_maps_are_what_the_attention_mixes_with() {
    let (llama, mut model) = model(false);
    model.load_adapter(fixture(""), "default").unwrap();
    let ids = case()["input"].to_dtype(DType::U32).unwrap();
    let maps = llama.attentions(&ids).unwrap();
    assert_eq!(maps.len(), llama.config().num_hidden_layers);

    let length = ids.dim(1).unwrap();
    let pass = llama.pass(0, length, false).unwrap();
    let (layer, config) = (&llama.layers[0], llama.config());
    let h = llama.embed_tokens.forward(&ids).unwrap();
    let n = ops::rms_norm(&h, &layer.input_layernorm, config.rms_norm_eps).unwrap();
    let [q, k, v] = layer.project(&pass, &n).unwrap();
    let mask = AttentionMask {
        causal: true,
        masks: &[],
    };
    let want = ops::attention(&q, &k, &v, config.attention_scale(), &mask).unwrap();
    for head in 0..config.num_attention_heads {
        let kv = head * config.num_key_value_heads / config.num_attention_heads;
        let v = v.i((.., .., kv)).unwrap().contiguous().unwrap();
        let map = maps[0].i((.., head)).unwrap().contiguous().unwrap();
        let want = want.i((.., .., head)).unwrap();
        assert!(gap(&map.matmul(&v).unwrap(), &want) < 1e-5, "head {head}");
    }
}

#[test]
fn the_summary_counts_every_parameter() {
    let json = std::fs::read_to_string(fixture("config.json")).unwrap();
    for tied in [true, false] {
        let mut config: LlamaConfig = serde_json::from_str(&json).unwrap();
        config.tie_word_embeddings = tied;
        let weights = config.random_weights(&mut rng(1), &Device::Cpu).unwrap();
        let count: usize = weights.values().map(Tensor::elem_count).sum();
        assert_eq!(count, config.parameter_count());
        let text = config.to_string();
        let parts = text.lines().skip(1).map(|line| {
            let number = line.split_whitespace().nth(1).unwrap();
            number.replace(',', "").parse::<usize>().unwrap()
        });
        assert_eq!(parts.sum::<usize>(), count, "{text}");
    }
}
