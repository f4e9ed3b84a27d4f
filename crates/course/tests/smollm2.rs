//! SmolLM2, as `cargo course data fetch smollm2` brings it, against transformers and
//! candle-transformers.

#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::io::{Cursor, Seek};

use candle_transformers::models::quantized_llama::ModelWeights;
use course::candle_core::quantized::{GgmlDType, QTensor, gguf_file};
use course::models::AdapterCheckpoint;
use course::prelude::*;
use course::tokenizer::Message;
use lora::quant::{QuantConfig, quantize};
use serde_json::Value;

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/smollm2");

fn smollm2() -> Pretrained {
    Pretrained::fetched("smollm2").unwrap()
}

fn expected() -> Value {
    let json = std::fs::read_to_string(format!("{FIXTURES}/expected.json")).unwrap();
    serde_json::from_str(&json).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    let ids = value.as_array().unwrap().iter();
    ids.map(|id| id.as_u64().unwrap() as u32).collect()
}

fn prompts() -> Vec<Vec<u32>> {
    let expected = expected();
    let prompts = expected["prompts"].as_array().unwrap().iter();
    prompts.map(|prompt| ids(&prompt["ids"])).collect()
}

/// One row of ids.
fn row(ids: &[u32]) -> Tensor {
    Tensor::new(ids, &Device::Cpu)
        .unwrap()
        .unsqueeze(0)
        .unwrap()
}

fn largest(t: &Tensor) -> f32 {
    t.abs().unwrap().max_all().unwrap().to_scalar().unwrap()
}

#[test]
fn tokens_and_chats_are_those_of_transformers() {
    let (base, expected) = (smollm2(), expected());
    let tokenizer = base.tokenizer().unwrap();
    assert_eq!(tokenizer.vocab_size(), 49_152);
    assert_eq!(tokenizer.pad_id(), 2);
    for case in expected["tokens"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let got = tokenizer.encode(text).unwrap();
        assert_eq!(got, ids(&case["ids"]), "{text:?}");
        assert_eq!(tokenizer.decode(&got).unwrap(), text);
    }
    let template = base.chat_template().unwrap();
    assert_eq!(template.eos_token(), "<|im_end|>");
    for case in expected["chats"].as_array().unwrap() {
        let messages: Vec<Message> = serde_json::from_value(case["messages"].clone()).unwrap();
        let prompt = case["prompt"].as_bool().unwrap();
        assert_eq!(
            template.apply(&messages, prompt).unwrap(),
            case["text"].as_str().unwrap()
        );
    }
}

#[test]
fn logits_and_answers_are_those_of_transformers() {
    let (base, expected) = (smollm2(), expected());
    let (llama, mut model) = base.frozen(&Device::Cpu, Llama::new).unwrap();
    assert_eq!(llama.config(), &LlamaConfig::smollm2_135m());
    assert_eq!(model.parameter_count().all, 134_515_008);
    let file = format!("{FIXTURES}/logits.safetensors");
    let logits = course::candle_core::safetensors::load(file, &Device::Cpu).unwrap();
    // The fixture holds every 64th logit of each place.
    let every = Tensor::arange_step(0u32, 49_152, 64, &Device::Cpu).unwrap();
    let some = |given: &[u32]| {
        let got = llama.forward_t(&row(given), false).unwrap();
        got.squeeze(0).unwrap().index_select(&every, 1).unwrap()
    };
    let equal = |given: &[u32], name: &str| {
        let (got, want) = (some(given), &logits[name]);
        let off = largest(&(&got - want).unwrap()) / largest(want);
        println!("{name} differ by {off:e} of the largest");
        assert!(off < 1e-5, "{name}: {off:e}");
    };
    for (number, prompt) in expected["prompts"].as_array().unwrap().iter().enumerate() {
        let given = ids(&prompt["ids"]);
        equal(&given, &format!("logits.{number}"));

        let how = GenerationConfig {
            max_new_tokens: 24,
            temperature: 0.0,
            ..Default::default()
        };
        let new = llama.generate(&given, &how, &mut rng(1)).unwrap();
        // transformers stops with the mark of the end, which stays.
        let want = ids(&prompt["greedy"]);
        assert_eq!(new[..want.len()], want, "prompt {number}");
    }

    // With the committed adapter they are those of PEFT.
    let given = &prompts()[2];
    let before = some(given);
    let adapter = AdapterCheckpoint::open("smollm2-hamlet").unwrap();
    model.load_adapter(adapter.folder(), "hamlet").unwrap();
    equal(given, "logits.hamlet");
    assert!(largest(&(some(given) - before).unwrap()) > 1.0);
}

/// The file with all weights in f32, so that candle's products do not round what they multiply.
fn widened() -> Cursor<Vec<u8>> {
    let path = data::fetched("smollm2").unwrap().join("model.gguf");
    let mut file = std::fs::File::open(path).unwrap();
    let content = gguf_file::Content::read(&mut file).unwrap();
    let wide: Vec<(String, QTensor)> = content
        .tensor_infos
        .keys()
        .map(|name| {
            let tensor = content.tensor(&mut file, name, &Device::Cpu).unwrap();
            let tensor = tensor.dequantize(&Device::Cpu).unwrap();
            (
                name.clone(),
                QTensor::quantize(&tensor, GgmlDType::F32).unwrap(),
            )
        })
        .collect();
    let metadata: Vec<(&str, &gguf_file::Value)> = content
        .metadata
        .iter()
        .map(|(key, value)| (key.as_str(), value))
        .collect();
    let tensors: Vec<(&str, &QTensor)> = wide.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let mut out = Cursor::new(Vec::new());
    gguf_file::write(&mut out, &metadata, &tensors).unwrap();
    out.rewind().unwrap();
    out
}

/// Their logits of the last token.
fn reference(file: &mut (impl std::io::Read + Seek), prompts: &[Vec<u32>]) -> Vec<Tensor> {
    let content = gguf_file::Content::read(file).unwrap();
    let mut theirs = ModelWeights::from_gguf(content, file, &Device::Cpu).unwrap();
    let logits = prompts.iter().map(|ids| theirs.forward(&row(ids), 0));
    logits.collect::<Result<_, _>>().unwrap()
}

#[test]
fn logits_are_those_of_candle_transformers() {
    let prompts = prompts();
    let path = data::fetched("smollm2").unwrap().join("model.gguf");
    let mut file = std::fs::File::open(path).unwrap();
    let exact = reference(&mut widened(), &prompts);
    let rounded = reference(&mut file, &prompts);
    let (llama, _) = smollm2().frozen(&Device::Cpu, Llama::new).unwrap();
    for (number, ids) in prompts.iter().enumerate() {
        let all = llama.forward_t(&row(ids), false).unwrap();
        let ours = all.i((.., ids.len() - 1)).unwrap();
        let off = |theirs: &Tensor| largest(&(&ours - theirs).unwrap()) / largest(theirs);
        let (exact, rounded) = (off(&exact[number]), off(&rounded[number]));
        println!(
            "prompt {number}: {exact:e} of the largest logit, {rounded:e} where candle rounds"
        );
        assert!(exact < 1e-5, "prompt {number}: {exact:e}");
        // candle rounds what it multiplies with Q4_1 to 8 bits.
        assert!(
            rounded > exact && rounded < 0.05,
            "prompt {number}: {rounded:e}"
        );
    }
}

/// The weights, of which each may be changed, as a clone of a repository of Hugging Face's hub.
fn as_folder(base: &Pretrained, change: impl Fn(&str, Tensor) -> Tensor) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let tensors = base.tensors(&Device::Cpu).unwrap().into_iter();
    let changed = tensors.map(|(name, tensor)| {
        let tensor = change(&name, tensor);
        (name, tensor)
    });
    let tensors: HashMap<String, Tensor> = changed.collect();
    assert_eq!(tensors.len(), 272);
    let file = |name: &str| folder.path().join(name);
    course::candle_core::safetensors::save(&tensors, file("model.safetensors")).unwrap();
    let config: LlamaConfig = base.config().unwrap();
    std::fs::write(file("config.json"), serde_json::to_string(&config).unwrap()).unwrap();
    folder
}

#[test]
fn a_folder_gives_the_same_as_the_file() {
    let base = smollm2();
    let folder = as_folder(&base, |_, tensor| tensor);
    let file = |name: &str| folder.path().join(name);
    std::fs::write(
        file("tokenizer.json"),
        base.tokenizer().unwrap().to_json().unwrap(),
    )
    .unwrap();
    let template = serde_json::json!({
        "chat_template": "{% for message in messages %}{{ message.content + eos_token }}{% endfor %}",
        "bos_token": null,
        "eos_token": {"content": "<|im_end|>", "lstrip": false},
    });
    std::fs::write(file("tokenizer_config.json"), template.to_string()).unwrap();

    let copy = Pretrained::open(folder.path()).unwrap();
    let text = expected()["tokens"][4]["text"]
        .as_str()
        .unwrap()
        .to_string();
    assert_eq!(
        copy.tokenizer().unwrap().encode(&text).unwrap(),
        base.tokenizer().unwrap().encode(&text).unwrap()
    );
    let chat = [Message::user("a"), Message::assistant("b")];
    let said = copy.chat_template().unwrap().apply(&chat, false).unwrap();
    assert_eq!(said, "a<|im_end|>b<|im_end|>");
    let ids = &prompts()[0];
    let logits = |base: &Pretrained| {
        let (llama, _) = base.frozen(&Device::Cpu, Llama::new).unwrap();
        llama.forward_t(&row(ids), false).unwrap()
    };
    assert_eq!(largest(&(logits(&base) - logits(&copy)).unwrap()), 0.0);
}

#[test]
fn in_4_bits_it_is_a_coarser_model_with_the_same_adapters() {
    let base = smollm2();
    let nf4 = QuantConfig::default();
    let (llama, mut model) = base.quantized(&Device::Cpu, &nf4, Llama::new).unwrap();
    assert_eq!(model.parameter_count().all, 134_515_008);
    let (full, _) = base.frozen(&Device::Cpu, Llama::new).unwrap();
    // The same rounded weights, written out in f32.
    let folder = as_folder(&base, |name, tensor| match name.contains("_proj.") {
        true => quantize(&tensor, &nf4).unwrap().dequantize().unwrap(),
        false => tensor,
    });
    let rounded = Pretrained::open(folder.path()).unwrap();
    let (rounded, _) = rounded.frozen(&Device::Cpu, Llama::new).unwrap();
    let ids = &prompts()[2];
    let logits = |llama: &Llama| llama.forward_t(&row(ids), false).unwrap();
    let (ours, want) = (logits(&llama), logits(&rounded));
    let off = |want: &Tensor| largest(&(&ours - want).unwrap()) / largest(want);
    let (exact, coarser) = (off(&want), off(&logits(&full)));
    println!(
        "logits in NF4: {exact:e} from those of the rounded weights, {coarser:e} from the file's"
    );
    assert!(exact < 1e-5, "{exact:e}");
    assert!(coarser > 0.01, "{coarser:e}");
    let lora = LoraConfig::new(8, 16.0).with_targets(TargetModules::AllLinear);
    model.add_adapter("default", &lora, &mut rng(1)).unwrap();
    // Seven matrices in each of 30 layers.
    assert_eq!(model.trainable_parameters().len(), 2 * 7 * 30);
    let (ids, next) = (row(&ids[..ids.len() - 1]), row(&ids[1..]));
    let loss = llama.loss(&ids, &next, true).unwrap();
    let gradients = loss.backward().unwrap();
    for (name, var) in model.trainable_parameters() {
        assert!(gradients.get(&var).is_some(), "{name}");
    }
}
