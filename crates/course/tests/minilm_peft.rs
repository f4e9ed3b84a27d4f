//! MiniLM with adapters is PEFT's, in both directions: `fixtures/minilm` holds what PyTorch computed.
//!
//! `peft_check.py train` trains adapters with PEFT, which the tests load; `write_adapters` trains
//! adapters here, and `peft_check.py check` loads these in PEFT. To make them anew, with MODEL_DIR as
//! in `fixtures/minilm/README.md`:
//!
//! ```text
//! env/bin/python peft_check.py train MODEL_DIR .
//! cargo test -p course --test minilm_peft -- --ignored write_adapters
//! env/bin/python peft_check.py check MODEL_DIR from_rust/*
//! ```

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use course::candle_core::safetensors;
use course::candle_nn::loss::cross_entropy;
use course::lora::peft::AdapterKind;
use course::prelude::*;
use serde::Deserialize;

/// The longest text in tokens, as in `peft_check.py`; a longer one loses its end.
const MAX_LENGTH: usize = 128;
/// What another order of the sums may cost in a vector of length 1.
const SAME: f32 = 1e-6;
/// How far an adapter must move every sentence; one that does nothing proves nothing.
const DIFFERENT: f32 = 1e-2;

/// A text of `sentences.json` and its tokens by transformers.
#[derive(Deserialize)]
struct Sentence {
    text: String,
    ids: Vec<u32>,
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/minilm")
}

fn texts() -> Vec<String> {
    sentences().into_iter().map(|s| s.text).collect()
}

fn sentences() -> Vec<Sentence> {
    serde_json::from_slice(&fs::read(fixtures().join("sentences.json")).unwrap()).unwrap()
}

/// The embeddings in a file, by name.
fn embeddings(file: impl AsRef<Path>) -> HashMap<String, Tensor> {
    safetensors::load(fixtures().join(file), &Device::Cpu).unwrap()
}

struct MiniLm {
    bert: Bert,
    model: LoraModel,
    tokenizer: Tokenizer,
}

impl MiniLm {
    fn open() -> Self {
        let base = Pretrained::fetched("minilm").unwrap_or_else(|error| panic!("{error}"));
        let (bert, model) = base.frozen(&Device::Cpu, Bert::new).unwrap();
        Self {
            bert,
            model,
            tokenizer: base.tokenizer().unwrap(),
        }
    }

    fn batch(&self, texts: &[impl AsRef<str>]) -> TextBatch {
        let batch = self.tokenizer.encode_batch(texts, MAX_LENGTH, &Device::Cpu);
        batch.unwrap()
    }

    fn embed(&self, texts: &[impl AsRef<str>]) -> Tensor {
        self.bert.embed(&self.batch(texts), false).unwrap()
    }

    /// The embeddings of the sentences.
    fn sentences(&self) -> Tensor {
        self.embed(&texts())
    }

    /// What the pooler makes of the sentences.
    fn pooled(&self) -> Tensor {
        let batch = self.batch(&texts());
        self.bert.pooler_output(&batch, false).unwrap()
    }
}

/// The largest difference of each sentence, sorted.
fn gaps(a: &Tensor, b: &Tensor) -> Vec<f32> {
    assert_eq!(a.dims(), b.dims());
    let differences = (a - b).unwrap().abs().unwrap();
    let sum = differences.sum_all().unwrap().to_scalar::<f32>().unwrap();
    assert!(sum.is_finite(), "an embedding is no number");
    let mut gaps = differences.max(1).unwrap().to_vec1::<f32>().unwrap();
    gaps.sort_by(f32::total_cmp);
    gaps
}

fn assert_same(what: &str, ours: &Tensor, theirs: &Tensor) {
    let largest = *gaps(ours, theirs).last().unwrap();
    println!("{what}: {largest:.1e} apart");
    assert!(largest <= SAME, "{what}: {largest:e} apart");
}

fn assert_moved(what: &str, adapted: &Tensor, base: &Tensor) {
    let smallest = gaps(adapted, base)[0];
    println!("{what}: moves every sentence by {smallest:.3}");
    assert!(
        smallest > DIFFERENT,
        "{what}: moves a sentence by {smallest:e} alone"
    );
}

/// The names of the adapters in a folder of the fixtures.
fn adapters(folder: &str) -> Vec<String> {
    let entries = fs::read_dir(fixtures().join(folder)).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.collect::<BTreeSet<_>>().into_iter().collect()
}

#[test]
fn texts_become_the_tokens_of_transformers() {
    let sentences = sentences();
    let texts: Vec<&str> = sentences.iter().map(|s| s.text.as_str()).collect();
    let batch = MiniLm::open().batch(&texts);
    assert_eq!(batch.input_ids.dims(), [10, MAX_LENGTH]);
    let ids = batch.input_ids.to_vec2::<u32>().unwrap();
    let mask = batch.attention_mask.to_vec2::<u8>().unwrap();
    for ((sentence, ids), mask) in sentences.iter().zip(ids).zip(mask) {
        let (tokens, padding) = ids.split_at(sentence.ids.len());
        assert_eq!(tokens, sentence.ids, "{:?}", sentence.text);
        assert!(padding.iter().all(|id| *id == 0));
        let tokens = mask.iter().take_while(|m| **m == 1).count();
        let all = mask.iter().filter(|m| **m == 1).count();
        assert_eq!((tokens, all), (sentence.ids.len(), sentence.ids.len()));
    }
}

#[test]
fn the_base_embeds_as_in_transformers() {
    let minilm = MiniLm::open();
    let expected = &embeddings("expected.safetensors")["base"];
    assert_same("base", &minilm.sentences(), expected);
    // Without the padding of a batch.
    for (row, sentence) in sentences().into_iter().enumerate() {
        let alone = minilm.embed(&[sentence.text]);
        let theirs = expected.narrow(0, row, 1).unwrap();
        assert_same(&format!("base, sentence {row} alone"), &alone, &theirs);
    }
}

#[test]
fn adapters_of_peft_embed_here_as_there() {
    let mut minilm = MiniLm::open();
    let base = minilm.sentences();
    let expected = embeddings("expected.safetensors");
    let names = adapters("from_peft");
    assert_eq!(names, ["all_linear", "dense_rslora", "query_value"]);
    for name in &names {
        let folder = fixtures().join("from_peft").join(name);
        minilm.model.load_adapter(&folder, name).unwrap();
        minilm.model.set_adapter(&[name]).unwrap();
        let ours = minilm.sentences();
        assert_same(name, &ours, &expected[name]);
        assert_moved(name, &ours, &base);
        if let Some(theirs) = expected.get(&format!("{name}.pooler")) {
            assert_same("pooler, adapted", &minilm.pooled(), theirs);
            assert_moved("pooler", &minilm.pooled(), &expected["base.pooler"]);
        }
    }
    minilm.model.enable_adapters(false);
    assert_same("pooler", &minilm.pooled(), &expected["base.pooler"]);
    assert_same("adapters off", &minilm.sentences(), &expected["base"]);
}

#[test]
fn adapters_written_here_embed_in_peft_as_here() {
    let mut minilm = MiniLm::open();
    let base = minilm.sentences();
    assert_eq!(adapters("from_rust"), made().map(|(name, _)| name));
    for (name, config) in made() {
        let folder = fixtures().join("from_rust").join(name);
        minilm.model.load_adapter(&folder, name).unwrap();
        minilm.model.set_adapter(&[name]).unwrap();
        let kind = &minilm.model.peft_config(name).unwrap().kind;
        assert_eq!(kind, &AdapterKind::Lora(config), "{name}: as in made()");
        let ours = minilm.sentences();
        let of = |file| embeddings(folder.join(file)).remove("embeddings").unwrap();
        let (written, theirs) = (of("embeddings.safetensors"), of("peft.safetensors"));
        assert_same(&format!("{name}, as written"), &ours, &written);
        assert_same(&format!("{name}, in PEFT"), &ours, &theirs);
        assert_moved(name, &ours, &base);

        // What PEFT read is what is written now.
        let again = tempfile::tempdir().unwrap();
        minilm.model.save_adapter(again.path(), name).unwrap();
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            let read = |folder: &Path| fs::read(folder.join(file)).unwrap();
            assert!(read(again.path()) == read(&folder), "{name}/{file}");
        }
    }
}

/// The adapters that are trained here.
fn made() -> [(&'static str, LoraConfig); 2] {
    let dense = LoraConfig {
        layers_to_transform: Some(vec![0, 5]),
        ..LoraConfig::new(2, 3.0).with_targets(["key", "output.dense"])
    };
    let plain = LoraConfig::new(4, 8.0).with_targets(["query", "value"]);
    [
        ("dense_dora", dense.with_dora(true).with_rslora(true)),
        ("query_value", plain),
    ]
}

/// Texts that belong together; an adapter learns to keep each pair close and the pairs apart.
const PAIRS: [(&str, &str); 6] = [
    ("The kettle began to sing.", "Tea was ready at last."),
    ("Snow fell all night.", "In the morning the road was white."),
    ("The judge read the verdict.", "Nobody in the court moved."),
    ("Our team lost again.", "The fans went home early."),
    (
        "Die Bibliothek schließt um acht.",
        "Bitte bring die Bücher zurück.",
    ),
    ("Le train part à midi.", "Nous avons déjà les billets."),
];

#[test]
#[ignore = "writes the fixtures in from_rust; peft_check.py check must run after it"]
fn write_adapters() {
    for (name, config) in made() {
        let mut minilm = MiniLm::open();
        let base = minilm.sentences();
        minilm
            .model
            .add_adapter(name, &config, &mut rng(1))
            .unwrap();
        let left = minilm.batch(&PAIRS.map(|(left, _)| left));
        let right = minilm.batch(&PAIRS.map(|(_, right)| right));
        let pair = Tensor::arange(0, PAIRS.len() as u32, &Device::Cpu).unwrap();
        let batches = std::iter::repeat_with(|| Ok(()));
        Training::new(name, 12)
            .run((minilm.model.trainable_parameters(), 3e-3), batches, |()| {
                let left = minilm.bert.embed(&left, true)?;
                let right = minilm.bert.embed(&right, true)?;
                let scores = (left.matmul(&right.t()?)? * 20.0)?;
                Ok(cross_entropy(&scores, &pair)?)
            })
            .unwrap();
        let folder = fixtures().join("from_rust").join(name);
        minilm.model.save_adapter(&folder, name).unwrap();
        let ours = minilm.sentences();
        assert_moved(name, &ours, &base);
        let tensors = HashMap::from([("embeddings".to_string(), ours)]);
        safetensors::save(&tensors, folder.join("embeddings.safetensors")).unwrap();
    }
}
