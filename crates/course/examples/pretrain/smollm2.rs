//! An adapter of SmolLM2 that answers as in Hamlet.

use crate::Result;
use crate::store::Told;
use course::candle_core::Device;
use course::data::{self, Sequences};
use course::lora::optim::Schedule;
use course::lora::quant::QuantConfig;
use course::lora::{LoraConfig, TargetModules};
use course::models::{Llama, Pretrained};
use course::rng::rng;
use course::train::Training;

const SEED: u64 = 1;
const BATCH: usize = 4;
const RATE: f64 = 2e-3;
/// Each chat is seen so often.
const EPOCHS: usize = 2;
/// Words of a message, and tokens of a chat.
const WORDS: usize = 40;
const LENGTH: usize = 160;

/// `smollm2-hamlet`: the run of lesson 15 on more and longer chats, beside the base in 4 bits.
pub fn hamlet() -> Result<()> {
    let base = Pretrained::fetched("smollm2")?;
    let (tokenizer, template) = (base.tokenizer()?, base.chat_template()?);
    let play = data::dialogue(WORDS)?;
    let encode = |chats: &[_]| Sequences::chats(chats, &tokenizer, &template, LENGTH, &Device::Cpu);
    let (learn, held_out) = (encode(&play.train)?, encode(&play.held_out)?.in_order(8)?);
    let steps = EPOCHS * learn.len() / BATCH;

    let (llama, mut model) = base.quantized(&Device::Cpu, &QuantConfig::default(), Llama::new)?;
    let config = LoraConfig::new(2, 4.0).with_targets(TargetModules::AllLinear);
    model.add_adapter("default", &config, &mut rng(SEED))?;
    println!("{}", model.parameter_count());
    let loss = || llama.held_out_loss(&held_out);
    let history = Training::new("smollm2-hamlet", steps)
        .schedule(Schedule::Cosine {
            warmup_steps: steps / 20,
        })
        .clip(1.0)
        .evaluate_every(50, loss)
        .run(
            (model.trainable_parameters(), RATE),
            learn.batches(BATCH, SEED),
            |(ids, next)| llama.loss(ids, next, true),
        )?;
    for (step, loss) in &history.evaluations {
        println!("after step {step}: {loss:.4}");
    }
    let told = Told {
        name: "smollm2-hamlet",
        about: "An adapter of rank 2 with which SmolLM2-135M-Instruct in NF4 answers as in Hamlet",
        data: vec!["text/hamlet/train.txt".into()],
        seed: SEED,
        steps,
        batch: BATCH,
        rate: RATE,
        seconds: history.seconds,
    };
    told.keep_adapter(&model, || Ok(vec![("loss", loss()?)]))
}
