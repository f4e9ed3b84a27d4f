//! The language models: one trained from nothing, and one fine-tuned from it as a whole.

use crate::Result;
use crate::store::{self, Told};
use course::candle_core::{Device, Tensor};
use course::data::{self, Tokens};
use course::lora::optim::Schedule;
use course::models::{Checkpoint, Llama, LlamaConfig};
use course::rng::rng;
use course::tokenizer::Tokenizer;
use course::train::Training;
use serde_json::{Value, json};
use std::collections::BTreeMap;

const SEED: u64 = 1;
const DEVICE: Device = Device::Cpu;
/// Tokens in a window, and windows in a step.
const LENGTH: usize = 128;
const BATCH: usize = 16;

/// `sotu-lm`: a small Llama that learns to write from the State of the Union addresses.
pub fn base() -> Result<()> {
    const STEPS: usize = 2400;
    const RATE: f64 = 3e-3;
    let corpus = data::text("sotu")?;
    let tokenizer = Tokenizer::train(&[&corpus.train], 1024)?;
    let config = LlamaConfig {
        vocab_size: tokenizer.vocab_size(),
        hidden_size: 192,
        intermediate_size: 512,
        num_hidden_layers: 4,
        num_attention_heads: 6,
        num_key_value_heads: 2,
        rms_norm_eps: 1e-5,
        rope_theta: 1e4,
        max_position_embeddings: 256,
        tie_word_embeddings: true,
    };
    println!("{config}");
    let weights = config.random_weights(&mut rng(SEED), &DEVICE)?;
    let run = Run {
        name: "sotu-lm",
        about: "A small Llama trained from nothing on State of the Union addresses",
        corpus: "sotu",
        steps: STEPS,
        rate: RATE,
    };
    run.train(&config, weights, &tokenizer)
}

/// `sotu-lm-kjv`: all weights of `sotu-lm` trained on, on the King James Bible.
pub fn tuned() -> Result<()> {
    let base = Checkpoint::open("sotu-lm")?;
    let tokenizer = base.tokenizer()?;
    let run = Run {
        name: "sotu-lm-kjv",
        about: "sotu-lm fully fine-tuned on the King James Bible, to see what an update looks like",
        corpus: "kjv",
        steps: 300,
        rate: 1e-3,
    };
    run.train(&base.config()?, base.tensors(&DEVICE)?, &tokenizer)
}

/// A training of all weights.
struct Run {
    name: &'static str,
    about: &'static str,
    corpus: &'static str,
    steps: usize,
    rate: f64,
}

impl Run {
    fn train(
        &self,
        config: &LlamaConfig,
        weights: BTreeMap<String, Tensor>,
        tokenizer: &Tokenizer,
    ) -> Result<()> {
        let corpus = data::text(self.corpus)?;
        let train = Tokens::new(tokenizer.encode(&corpus.train)?);
        let held_out = Tokens::new(tokenizer.encode(&corpus.held_out)?);
        let windows = held_out.windows(BATCH, LENGTH, &DEVICE)?;
        println!(
            "{} tokens to train on, {} held out",
            train.len(),
            held_out.len()
        );

        let builder = store::builder(weights);
        let llama = Llama::new(config, &builder)?;
        let variables = builder.variables();
        let loss = || llama.held_out_loss(&windows);
        let history = Training::new(self.name, self.steps)
            .schedule(Schedule::Cosine {
                warmup_steps: self.steps / 30,
            })
            .clip(1.0)
            .evaluate_every(250, loss)
            .run(
                (variables.clone(), self.rate),
                train.batches(BATCH, LENGTH, SEED, &DEVICE),
                |(ids, next)| llama.loss(ids, next, true),
            )?;

        let told = Told {
            name: self.name,
            about: self.about,
            data: vec![format!("text/{}/train.txt", self.corpus)],
            seed: SEED,
            steps: self.steps,
            batch: BATCH,
            rate: self.rate,
            seconds: history.seconds,
        };
        let config = for_transformers(config)?;
        let folder = told.keep(&variables, &config, || Ok(vec![("loss", loss()?)]))?;
        std::fs::write(folder.join("tokenizer.json"), tokenizer.to_json()?)?;
        Ok(())
    }
}

/// As transformers reads it.
fn for_transformers(config: &LlamaConfig) -> Result<Value> {
    let mut json = serde_json::to_value(config)?;
    for (key, value) in [
        ("architectures", json!(["LlamaForCausalLM"])),
        ("model_type", json!("llama")),
        ("hidden_act", json!("silu")),
        ("attention_bias", json!(false)),
        ("mlp_bias", json!(false)),
        ("torch_dtype", json!("float16")),
    ] {
        json[key] = value;
    }
    Ok(json)
}
