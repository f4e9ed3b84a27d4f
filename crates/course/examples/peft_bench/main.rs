//! Times LoRA in Rust for `cargo course bench --against peft` and `cargo course bench growth`.
//!
//! Reads one JSON request a line and answers each with one line; the requests stand in
//! `crates/cli/python/peft_bench/__main__.py`, which answers the same ones with PEFT. Only the
//! case `floor`, the matrix products that no implementation can do without, is asked of this side
//! alone.

mod attention;
mod case;
mod figure;
mod floor;
mod linear;
mod llama;
mod merged;
mod mixed;
mod mlp;
mod weights;

use case::{Case, Result, Spec};
use course::candle_core::Tensor;
use course::candle_core::utils::get_num_threads;
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::io::{BufRead, Write};
use std::path::PathBuf;
use std::time::Instant;
use weights::Weights;

/// Iterations before anything is recorded.
const WARM_UP: usize = 3;

/// What the driver asks for.
#[derive(Deserialize)]
#[serde(tag = "do", rename_all = "lowercase")]
enum Request {
    Load { id: String, case: Spec },
    Time { id: String, n: usize },
    Check { case: Spec, file: PathBuf },
    Peak,
    Quit,
}

/// The cases that are loaded, and the memory before the first.
struct Worker {
    loaded: HashMap<String, Case>,
    at_start: u64,
}

fn main() -> Result<()> {
    if let [_, option, file] = std::env::args().collect::<Vec<_>>().as_slice()
        && option == "--figure"
    {
        return figure::draw(std::path::Path::new(file));
    }
    course::lora::tune_process();
    let mut worker = Worker {
        loaded: HashMap::new(),
        at_start: memory("VmRSS"),
    };
    say(&json!({"ready": true, "threads": get_num_threads()}))?;
    for line in std::io::stdin().lock().lines() {
        let request = serde_json::from_str(&line?)?;
        if matches!(request, Request::Quit) {
            break;
        }
        let answer = worker.answer(request);
        say(&answer.unwrap_or_else(|error| json!({"error": error.to_string()})))?;
    }
    Ok(())
}

fn say(answer: &Value) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{answer}")?;
    Ok(stdout.flush()?)
}

impl Worker {
    fn answer(&mut self, request: Request) -> Result<Value> {
        match request {
            Request::Load { id, case } => {
                let mut case = build(&case, Weights::seeded())?;
                let seconds = timed(&mut case, WARM_UP)?;
                self.loaded.insert(id, case);
                Ok(json!({ "seconds": seconds }))
            }
            Request::Time { id, n } => {
                let case = self.loaded.get_mut(&id).ok_or("no such case is loaded")?;
                case()?;
                Ok(json!({ "seconds": timed(case, n)? }))
            }
            Request::Check { case, file } => Ok(json!({ "losses": losses(&case, &file)? })),
            Request::Peak => Ok(json!({"peak": memory("VmHWM"), "start": self.at_start})),
            Request::Quit => Ok(Value::Null),
        }
    }
}

/// Seconds of n iterations, each timed singly.
fn timed(case: &mut Case, n: usize) -> Result<Vec<f64>> {
    let mut seconds = Vec::with_capacity(n);
    for _ in 0..n {
        let start = Instant::now();
        case()?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    Ok(seconds)
}

/// The first three losses with the weights and the data of a file.
fn losses(spec: &Spec, file: &std::path::Path) -> Result<Vec<f64>> {
    let weights = Weights::read(file)?;
    let target = weights.given("target");
    let mut case = build(spec, weights)?;
    (0..3).map(|_| loss(&case()?, target.as_ref())).collect()
}

/// A step gives its loss; a forward pass gives an output to compare with the target.
fn loss(result: &Tensor, target: Option<&Tensor>) -> Result<f64> {
    let loss = match target {
        Some(target) if result.rank() > 0 => course::lora::ops::mse_loss(result, target)?,
        _ => result.clone(),
    };
    Ok(f64::from(loss.to_scalar::<f32>()?))
}

fn build(spec: &Spec, weights: Weights) -> Result<Case> {
    match spec.case.as_str() {
        "floor" => floor::products(spec),
        "linear-forward" => linear::forward(spec, weights),
        "linear-step" => linear::step(spec, weights),
        "mlp-step" => mlp::step(spec, weights),
        "attention-step" => attention::step(spec, weights),
        "merged" => merged::forward(spec, weights),
        "mixed" => mixed::forward(spec, weights),
        "llama-step" => llama::step(spec, weights),
        other => Err(format!("there is no case {other:?}").into()),
    }
}

/// A field of /proc/self/status in bytes, 0 where the system has none.
fn memory(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with(field));
    let kilobytes = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
    kilobytes.unwrap_or(0) * 1024
}
