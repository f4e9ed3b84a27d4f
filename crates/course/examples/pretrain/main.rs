//! Trains the base models of the lessons: `cargo course pretrain NAME`.

mod cnn;
mod dqn;
mod fashion;
mod generative;
mod llama;
mod meta;
mod smollm2;
mod store;
mod vit;

use std::process::ExitCode;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;
type Training = fn() -> Result<()>;

/// Every checkpoint: its name and what trains it.
const ALL: [(&str, Training); 15] = [
    ("sotu-lm", llama::base),
    ("sotu-lm-kjv", llama::tuned),
    ("fashion-cnn", cnn::base),
    ("fashion-vit", vit::base),
    ("fashion-gan", generative::gan),
    ("fashion-vae", generative::vae),
    ("cartpole-dqn", dqn::cartpole),
    ("sinusoid-first-order", meta::first_order),
    ("sinusoid-maml", meta::maml),
    ("sinusoid-maml-lora", meta::maml_lora),
    ("sinusoid-maml-lora-r1", meta::maml_lora_r1),
    ("sinusoid-maml-rates", meta::maml_rates),
    ("sinusoid-pretrained", meta::pretrained),
    ("sinusoid-reptile", meta::reptile),
    ("smollm2-hamlet", smollm2::hamlet),
];

fn main() -> ExitCode {
    let names = || ALL.map(|(name, _)| name).join(", ");
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let [wanted] = &wanted[..] else {
        eprintln!("error: name one checkpoint: {}", names());
        return ExitCode::FAILURE;
    };
    let Some((_, train)) = ALL.iter().find(|(name, _)| name == wanted) else {
        eprintln!("error: there is no {wanted:?}; there are {}", names());
        return ExitCode::FAILURE;
    };
    course::lora::tune_process();
    match train() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
