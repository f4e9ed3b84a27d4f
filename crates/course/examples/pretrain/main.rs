//! Trains the base models of the lessons: `cargo course pretrain NAME`.

mod cnn;
mod dqn;
mod fashion;
mod generative;
mod llama;
mod meta;
mod store;
mod vit;

use std::process::ExitCode;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;
type Training = fn() -> Result<()>;

/// Every checkpoint: its name and what trains it.
const ALL: [(&str, Training); 10] = [
    ("sotu-lm", llama::base),
    ("sotu-lm-kjv", llama::tuned),
    ("fashion-cnn", cnn::base),
    ("fashion-vit", vit::base),
    ("fashion-gan", generative::gan),
    ("fashion-vae", generative::vae),
    ("cartpole-dqn", dqn::cartpole),
    ("sinusoid-maml", meta::maml),
    ("sinusoid-maml-lora", meta::maml_lora),
    ("sinusoid-pretrained", meta::pretrained),
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
