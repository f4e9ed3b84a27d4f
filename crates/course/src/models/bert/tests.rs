use std::collections::HashMap;
use std::path::PathBuf;

use candle_core::{DType, Device};
use candle_nn::VarBuilder;
use lora::{LoraConfig, LoraModel};

use super::*;
use crate::data::Encodings;
use crate::models::Pretrained;
use crate::models::testing::gap;
use crate::rng::rng;

const CPU: Device = Device::Cpu;

/// A tiny model of transformers with an adapter of PEFT's; how it was made stands beside it.
fn fixture() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../lora/tests/fixtures/transformers/bert")
}

fn case() -> HashMap<String, Tensor> {
    candle_core::safetensors::load(fixture().join("case.safetensors"), &CPU).unwrap()
}

fn model() -> (Bert, LoraModel) {
    let base = Pretrained::open(fixture()).unwrap();
    base.frozen(&CPU, Bert::new).unwrap()
}

fn batch() -> TextBatch {
    let ids = case()["input"].to_dtype(DType::U32).unwrap();
    TextBatch::new(&ids.to_vec2::<u32>().unwrap(), 0, &CPU).unwrap()
}

#[test]
fn hidden_states_are_those_of_transformers_and_peft() {
    let (case, (bert, mut model)) = (case(), model());
    let base = bert.forward_t(&batch(), false).unwrap();
    assert!(gap(&base, &case["output_base"]) < 1e-6);
    model.load_adapter(fixture(), "default").unwrap();
    let adapted = bert.forward_t(&batch(), false).unwrap();
    assert!(gap(&adapted, &case["output"]) < 1e-6);
    assert!(gap(&adapted, &base) > 0.1);
}

/// What a text is does not depend on the longer ones beside it.
#[test]
fn padding_changes_nothing() {
    let (bert, mut model) = model();
    model.load_adapter(fixture(), "default").unwrap();
    let rows = [vec![3u32, 1, 4, 1, 5, 9, 2, 6], vec![5, 3, 5], vec![8]];
    let together = TextBatch::new(&rows, 0, &CPU).unwrap();
    let together = bert.embed(&together, false).unwrap();
    for (place, row) in rows.iter().enumerate() {
        let alone = TextBatch::new(&[row], 0, &CPU).unwrap();
        let alone = bert.embed(&alone, false).unwrap();
        assert!(gap(&together.narrow(0, place, 1).unwrap(), &alone) < 1e-6);
        // And the length is 1.
        let length = alone.sqr().unwrap().sum_all().unwrap();
        assert!((length.to_scalar::<f32>().unwrap() - 1.0).abs() < 1e-6);
    }
}

#[test]
fn a_pass_may_be_cut_between_any_two_layers() {
    let (bert, mut model) = model();
    model.load_adapter(fixture(), "default").unwrap();
    let batch = batch();
    let whole = bert.forward_t(&batch, false).unwrap();
    let layers = bert.config().num_hidden_layers;
    for cut in 0..=layers {
        let h = bert.forward_to(cut, &batch, false).unwrap();
        let rest = bert.forward_from(cut, &h, &batch, false).unwrap();
        assert!(gap(&rest, &whole) == 0.0, "cut at {cut}");
    }
    let h = bert.embeddings(&batch).unwrap();
    let said = bert.forward_from(layers + 1, &h, &batch, false);
    let said = said.unwrap_err().to_string();
    assert!(
        said.contains(&format!("layers {} to {layers}", layers + 1)),
        "{said}"
    );
}

/// The gradient of every adapter matrix and, in a base that trains, of every weight, against
/// differences of the loss.
#[test]
fn gradients_are_those_of_the_loss() {
    let rows = [vec![3u32, 1, 4, 1, 5], vec![5, 3]];
    let batch = TextBatch::new(&rows, 0, &CPU).unwrap();
    let base = Pretrained::open(fixture()).unwrap();
    let (frozen, mut model) = base.frozen(&CPU, Bert::new).unwrap();
    model.load_adapter(fixture(), "default").unwrap();
    let (trained, weights) = base.trainable(&CPU, Bert::new, |_| true).unwrap();
    let target = rng(7).randn((2, base.config::<BertConfig>().unwrap().hidden_size), &CPU);
    let target = target.unwrap();
    for (bert, vars) in [(frozen, model.trainable_parameters()), (trained, weights)] {
        let loss = || {
            let pooled = bert.pool(&batch, true).unwrap();
            (pooled * &target).unwrap().sum_all().unwrap()
        };
        let gradients = loss().backward().unwrap();
        let mut checked = 0;
        for (name, var) in vars {
            let Some(gradient) = gradients.get(&var) else {
                panic!("{name} has no gradient");
            };
            // Along a direction, so that one difference tests all numbers.
            let before = var.as_tensor().copy().unwrap();
            let along = rng(11).randn(var.dims(), &CPU).unwrap();
            let step = 1e-2
                / along
                    .sqr()
                    .unwrap()
                    .sum_all()
                    .unwrap()
                    .sqrt()
                    .unwrap()
                    .to_scalar::<f32>()
                    .unwrap();
            let at = |sign: f32| {
                let moved = (&along * f64::from(sign * step)).unwrap();
                var.set(&(&before + moved).unwrap()).unwrap();
                loss().to_scalar::<f32>().unwrap()
            };
            let difference = (at(1.0) - at(-1.0)) / (2.0 * step);
            var.set(&before).unwrap();
            let want = (gradient * &along).unwrap().sum_all().unwrap();
            let want = want.to_scalar::<f32>().unwrap();
            let size = gradient.sqr().unwrap().sum_all().unwrap().sqrt().unwrap();
            let size = size.to_scalar::<f32>().unwrap().max(0.05);
            let off = (difference - want).abs() / size;
            assert!(off < 2e-2, "{name}: {difference}, not {want}");
            checked += 1;
        }
        assert!(checked >= 8, "{checked}");
    }
}

/// A base under `bert.` and with the names that TensorFlow's norms have.
#[test]
fn the_names_of_other_checkpoints_are_found() {
    let base = Pretrained::open(fixture()).unwrap();
    let renamed = |name: String| {
        let name = name.replace("LayerNorm.weight", "LayerNorm.gamma");
        format!("bert.{}", name.replace("LayerNorm.bias", "LayerNorm.beta"))
    };
    let tensors = base.tensors(&CPU).unwrap().into_iter();
    let tensors = tensors
        .map(|(name, tensor)| (renamed(name), tensor))
        .collect();
    let builder = LoraBuilder::new(VarBuilder::from_tensors(tensors, DType::F32, &CPU));
    let bert = Bert::new(&base.config().unwrap(), &builder).unwrap();
    let got = bert.forward_t(&batch(), false).unwrap();
    assert!(gap(&got, &case()["output_base"]) < 1e-6);
    let mut model = builder.model().unwrap();
    let config = LoraConfig::new(2, 4.0).with_targets(["query"]);
    model.add_adapter("default", &config, &mut rng(1)).unwrap();
    let targets = model.targets("default").unwrap();
    assert_eq!(targets[0], "bert.encoder.layer.0.attention.self.query");
}

/// Rows with their own adapters are what separate passes give.
#[test]
fn a_mixed_batch_is_its_rows() {
    let (bert, mut model) = model();
    let mut rng = rng(5);
    for name in ["one", "two"] {
        let config = LoraConfig::new(2, 4.0).with_targets(["query", "dense", "word_embeddings"]);
        model.add_adapter(name, &config, &mut rng).unwrap();
    }
    model.set_adapter(&["one", "two"]).unwrap();
    for (_, var) in model.trainable_parameters() {
        let fresh = rng.randn(var.dims(), &CPU).unwrap();
        var.set(&(fresh * 0.3).unwrap()).unwrap();
    }
    let rows = [vec![3u32, 1, 4], vec![5, 3], vec![8, 1, 1], vec![2, 7]];
    let batch = TextBatch::new(&rows, 0, &CPU).unwrap();
    let names = ["two", lora::BASE_ROW, "one", "two"];
    let mixed = model.with_adapters(&names, || bert.embed(&batch, false));
    let mixed = mixed.unwrap().unwrap();
    for (place, name) in names.into_iter().enumerate() {
        let active: &[&str] = if name == lora::BASE_ROW { &[] } else { &[name] };
        model.set_adapter(active).unwrap();
        let alone = TextBatch::new(&rows[place..=place], 0, &CPU).unwrap();
        let alone = bert.embed(&alone, false).unwrap();
        assert!(
            gap(&mixed.narrow(0, place, 1).unwrap(), &alone) < 1e-5,
            "row {place}"
        );
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let json = std::fs::read_to_string(fixture().join("config.json")).unwrap();
    let mut file: serde_json::Value = serde_json::from_str(&json).unwrap();
    let mut with = |key: &str, value: serde_json::Value| {
        let before = file[key].take();
        file[key] = value;
        let said = serde_json::from_value::<BertConfig>(file.clone());
        file[key] = before;
        said.unwrap_err().to_string()
    };
    let said = with("position_embedding_type", "relative_key".into());
    assert!(said.contains("absolute ones only"), "{said}");
    let said = with("model_type", "roberta".into());
    assert!(said.contains("\"roberta\""), "{said}");
    assert!(with("is_decoder", true.into()).contains("encoder only"));
    let said = with("num_attention_heads", 3.into());
    assert!(
        said.contains("multiple of num_attention_heads = 3"),
        "{said}"
    );
    let said = with("hidden_act", "swish".into());
    assert!(said.contains("swish") && said.contains("gelu"), "{said}");

    let (bert, _) = model();
    let said = bert.pooler_output(&batch(), false).unwrap_err().to_string();
    assert!(said.contains("no pooler.dense"), "{said}");
    let longest = bert.config().max_position_embeddings;
    let long = TextBatch::new(&[vec![1u32; longest + 1]], 0, &CPU).unwrap();
    let said = bert.forward_t(&long, false).unwrap_err().to_string();
    assert!(
        said.contains(&format!("max_position_embeddings is {longest}")),
        "{said}"
    );
    let said = TextBatch::new(&[vec![], vec![1u32]], 0, &CPU)
        .unwrap_err()
        .to_string();
    assert!(said.contains("without a token"), "{said}");
}

/// Texts of one to four tokens, whose ids lie in the fixture's vocabulary.
fn texts() -> Encodings {
    texts_padded_with("null")
}

/// The same of a tokenizer with this padding.
fn texts_padded_with(padding: &str) -> Encodings {
    let json = r##"{"version": "1.0", "truncation": null, "padding": PADDING, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null,
        "decoder": null, "model": {"type": "WordLevel", "unk_token": "a",
        "vocab": {"a": 3, "b": 17, "c": 21, "d": 39}}}"##;
    let json = json.replace("PADDING", padding);
    let tokenizer = crate::tokenizer::Tokenizer::from_json(json.as_bytes()).unwrap();
    Encodings::new(&["a", "b c d a", "c a", "d d b", "b"], &tokenizer, 8, &CPU).unwrap()
}

/// An adapter whose numbers are not zero.
fn adapt(model: &mut LoraModel, name: &str, layers: Vec<usize>) {
    let config = LoraConfig {
        layers_to_transform: Some(layers),
        ..LoraConfig::new(2, 4.0).with_targets(["query", "output.dense"])
    };
    model.add_adapter(name, &config, &mut rng(3)).unwrap();
    for (name, var) in model.trainable_parameters() {
        let fresh = rng(name.len() as u64).randn(var.dims(), &CPU).unwrap();
        var.set(&(fresh * 0.3).unwrap()).unwrap();
    }
}

#[test]
fn precomputed_texts_give_what_texts_give() {
    let (bert, mut model) = model();
    let plain = texts();
    let kept = bert.precompute(1, &plain).unwrap();
    adapt(&mut model, "upper", vec![1]);
    let places = [4, 1, 3, 0];
    let some = (plain.at(&places).unwrap(), kept.at(&places).unwrap());
    let join = |one: &Encodings, two| Encodings::concat(&[one, two]).unwrap();
    let joined = (join(&plain, &some.0), join(&kept, &some.1));
    let padding = r#"{"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of":
        null, "pad_id": 17, "pad_type_id": 0, "pad_token": "b"}"#;
    let other = Encodings::concat(&[&plain, &texts_padded_with(padding)]).unwrap_err();
    assert!(
        other.to_string().contains("different tokenizers"),
        "{other}"
    );
    assert!(Encodings::concat(&[&plain, &kept]).is_err());
    assert!(Encodings::concat(&[&kept, &bert.precompute(0, &plain).unwrap()]).is_err());
    for (plain, kept) in [(plain, kept), some, joined] {
        for batch in [1, 3, 5] {
            let of = |texts: &Encodings| texts.map(batch, |b| bert.embed(b, false)).unwrap();
            assert!(gap(&of(&kept), &of(&plain)) < 1e-6);
        }
    }
    // An adapter above is no hindrance, and gets the same gradients.
    let (plain, kept) = (texts(), bert.precompute(1, &texts()).unwrap());
    let loss = |texts: &Encodings| {
        let pooled = bert.pool(&texts.batch(&[0, 1, 2]).unwrap(), true).unwrap();
        pooled
            .narrow(1, 0, 5)
            .unwrap()
            .sqr()
            .unwrap()
            .sum_all()
            .unwrap()
    };
    let (ours, theirs) = (
        loss(&kept).backward().unwrap(),
        loss(&plain).backward().unwrap(),
    );
    for (name, var) in model.trainable_parameters() {
        let off = gap(ours.get(&var).unwrap(), theirs.get(&var).unwrap());
        assert!(off < 1e-5, "{name}: {off:e}");
    }
}

#[test]
fn what_was_precomputed_with_other_weights_is_refused() {
    let (bert, mut lower) = model();
    let kept = bert.precompute(1, &texts()).unwrap();
    let said = |bert: &Bert| bert.embed(&kept.batch(&[0, 1]).unwrap(), false);
    assert!(said(&bert).is_ok());

    // The same weights in another model are as good.
    let base = Pretrained::open(fixture()).unwrap();
    let (other, vars) = base.trainable(&CPU, Bert::new, |_| true).unwrap();
    assert!(said(&other).is_ok());
    let below = ["position", "token_type", "embeddings.LayerNorm", "layer.0."];
    for (name, var) in vars {
        let counts = below.iter().any(|part| name.contains(part));
        let before = var.as_tensor().copy().unwrap();
        var.set(&(&before + 1e-4).unwrap()).unwrap();
        assert_eq!(said(&other).is_err(), counts, "{name}");
        var.set(&before).unwrap();
    }
    assert!(said(&other).is_ok());

    adapt(&mut lower, "lower", vec![0]);
    let error = said(&bert).unwrap_err().to_string();
    assert!(
        error.contains("encoder.layer.0") && error.contains("lower"),
        "{error}"
    );
    let error = bert.precompute(1, &texts()).unwrap_err().to_string();
    assert!(error.contains("layers_to_transform"), "{error}");
    let error = bert.precompute(3, &texts()).unwrap_err().to_string();
    assert!(error.contains("no layer 3"), "{error}");
}
