//! MiniLM, as `cargo course data fetch minilm` brings it, against candle-transformers' BERT.

#![allow(clippy::unwrap_used)]

use candle_transformers::models::bert as reference;
use course::candle_nn::VarBuilder;
use course::prelude::*;

const SENTENCES: [&str; 10] = [
    "The cat sleeps on the warm stove.",
    "A cat is sleeping on a stove that is warm.",
    "Interest rates rose by half a percent on Tuesday.",
    "no way to contact their customer service.",
    "Celebrating my wonderful husband. Happy Birthday babe!",
    "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
    "Все люди рождаются свободными и равными.",
    "e = m c ^ 2 (1905) ... really?! \u{1f642}",
    "",
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age \
     of foolishness, it was the epoch of belief, it was the epoch of incredulity, it was the season \
     of light, it was the season of darkness, it was the spring of hope, it was the winter of despair.",
];

fn minilm() -> Pretrained {
    Pretrained::fetched("minilm").unwrap()
}

fn largest(t: &Tensor) -> f32 {
    t.abs().unwrap().max_all().unwrap().to_scalar().unwrap()
}

#[test]
fn embeddings_are_those_of_candle_transformers() {
    let base = minilm();
    let (bert, model) = base.frozen(&Device::Cpu, Bert::new).unwrap();
    let pooler = 384 * 384 + 384;
    let parameters = bert.config().parameter_count() + pooler;
    assert_eq!(model.parameter_count().all, parameters);
    assert_eq!(bert.config(), &BertConfig::minilm_l6());
    let batch = base
        .tokenizer()
        .unwrap()
        .encode_batch(&SENTENCES, 128, &Device::Cpu)
        .unwrap();
    let hidden = bert.forward_t(&batch, false).unwrap();
    let embedded = bert.embed(&batch, false).unwrap();

    let config: reference::Config = {
        let file = data::fetched("minilm").unwrap().join("config.json");
        serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap()
    };
    let tensors = base.tensors(&Device::Cpu).unwrap().into_iter().collect();
    let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    let theirs = reference::BertModel::load(vb, &config).unwrap();
    let kinds = batch.input_ids.zeros_like().unwrap();
    let mask = batch.attention_mask.to_dtype(DType::F32).unwrap();
    let want = theirs
        .forward(&batch.input_ids, &kinds, Some(&batch.attention_mask))
        .unwrap();

    // Of real tokens only: padding means nothing.
    let of_tokens = |h: &Tensor| h.broadcast_mul(&mask.unsqueeze(2).unwrap()).unwrap();
    let off = largest(&(of_tokens(&hidden) - of_tokens(&want)).unwrap());
    assert!(off < 1e-5, "hidden states: {off:e}");

    let count = mask.sum_keepdim(1).unwrap();
    let mean = of_tokens(&want)
        .sum(1)
        .unwrap()
        .broadcast_div(&count)
        .unwrap();
    let length = mean.sqr().unwrap().sum_keepdim(1).unwrap().sqrt().unwrap();
    let want = mean.broadcast_div(&length).unwrap();
    let off = largest(&(&embedded - &want).unwrap());
    println!("largest difference of ten embeddings: {off:e}");
    assert!(off < 1e-5, "embeddings: {off:e}");

    // Sentences 0 and 1 say the same, 0 and 2 do not.
    let cosine = embedded
        .matmul(&embedded.t().unwrap())
        .unwrap()
        .to_vec2::<f32>()
        .unwrap();
    assert!(cosine[0][1] > 0.8 && cosine[0][2] < 0.2, "{:?}", cosine[0]);
}

#[test]
fn an_adapter_goes_through_peft_s_files() {
    let base = minilm();
    let tokenizer = base.tokenizer().unwrap();
    let batch = tokenizer
        .encode_batch(&SENTENCES, 32, &Device::Cpu)
        .unwrap();
    let (bert, mut model) = base.frozen(&Device::Cpu, Bert::new).unwrap();
    let plain = bert.embed(&batch, false).unwrap();
    let config = LoraConfig::new(4, 8.0).with_targets(["query", "value"]);
    model.add_adapter("default", &config, &mut rng(1)).unwrap();
    assert_eq!(model.parameter_count().trainable, 6 * 2 * 2 * 4 * 384);
    assert_eq!(
        largest(&(bert.embed(&batch, false).unwrap() - &plain).unwrap()),
        0.0
    );
    for (name, var) in model.trainable_parameters() {
        let fresh = rng(name.len() as u64)
            .randn(var.dims(), &Device::Cpu)
            .unwrap();
        var.set(&(fresh * 0.05).unwrap()).unwrap();
    }
    let adapted = bert.embed(&batch, false).unwrap();
    assert!(largest(&(&adapted - &plain).unwrap()) > 1e-2);

    let folder = std::env::temp_dir().join(format!("minilm-adapter-{}", std::process::id()));
    model.save_adapter(&folder, "default").unwrap();
    let (again, mut other) = base.frozen(&Device::Cpu, Bert::new).unwrap();
    let loaded = other.load_adapter(&folder, "default");
    std::fs::remove_dir_all(&folder).unwrap();
    loaded.unwrap();
    let reread = again.embed(&batch, false).unwrap();
    assert_eq!(largest(&(reread - &adapted).unwrap()), 0.0);
}
