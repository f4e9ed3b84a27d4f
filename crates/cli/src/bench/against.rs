//! `cargo course bench --against peft`: the same work here and under PEFT, in turns.

use super::Against;
use super::cases::{Case, Part, chosen};
use super::machine;
use super::summary::{self, Measured, Peaks, Samples, Verdict};
use super::worker::Worker;
use crate::example;
use crate::home::{Checkout, Home, write_atomic};
use crate::progress::Steps;
use crate::setup::peft;
use anyhow::Result;
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// A turn takes about so long, in seconds.
const TURN: f64 = 0.1;

/// After a switch the threads of the side before get so long to fall asleep.
const PAUSE: Duration = Duration::from_millis(20);

/// How each side is started.
struct Sides {
    rust: PathBuf,
    python: PathBuf,
    script: PathBuf,
    cache: PathBuf,
    threads: usize,
}

/// The running sides of a case.
struct Running {
    rust: Worker,
    eager: Worker,
    compiled: Worker,
}

/// Measures; false when a goal is missed or a case failed.
pub fn command(home: &Home, checkout: &Checkout, options: &Against) -> Result<bool> {
    let cases = chosen(&options.only)?;
    let mut steps = Steps::new(2);
    let python = peft::ensure(home, &mut steps)?;
    let sides = Sides {
        rust: example::build(checkout, "peft_bench", &mut steps)?,
        script: peft::write_script(home)?,
        cache: home.join("peft-compiled"),
        python,
        threads: machine::threads(),
    };
    machine::warn_when_busy();
    let mut report = machine::described(checkout)?;
    report["rounds"] = options.rounds.into();
    let (mut well, mut results) = (true, Vec::new());
    for case in &cases {
        let mut result = match measure(&sides, case, usize::from(options.rounds)) {
            Ok((measured, detail)) => {
                let verdicts = summary::judge(case, &measured);
                print(case, &measured, &verdicts);
                well &= verdicts.iter().all(Verdict::met);
                let goals: Vec<_> = verdicts.iter().map(Verdict::json).collect();
                with(detail, "goals", goals.into())
            }
            Err(error) => {
                well = false;
                println!("{}: not measured. {error:#}", case.name);
                json!({"error": format!("{error:#}")})
            }
        };
        if let Some(rival) = result.get("versions").and_then(Value::as_object).cloned() {
            rival
                .into_iter()
                .for_each(|(name, version)| report["versions"][name] = version);
        }
        result["name"] = case.name.into();
        results.push(result);
    }
    report["cases"] = results.into();
    if let Some(file) = &options.json {
        write_atomic(file, serde_json::to_string_pretty(&report)? + "\n")?;
    }
    Ok(well)
}

fn with(mut object: Value, key: &str, value: Value) -> Value {
    object[key] = value;
    object
}

fn print(case: &Case, measured: &Measured, verdicts: &[Verdict]) {
    println!("{}", summary::head());
    for (part, samples) in case.parts.iter().zip(&measured.parts) {
        println!("{}", summary::row(case, &part.label, samples));
    }
    if let Some(peaks) = measured.peaks {
        let mb = |bytes: f64| format!("{:.0} MB", bytes / 1e6);
        let (rust, eager, compiled) = (mb(peaks.rust), mb(peaks.eager), mb(peaks.compiled));
        println!("  peak memory: Rust {rust}, eager {eager}, compiled {compiled}");
    }
    for verdict in verdicts {
        println!("{}", summary::line(case, verdict));
    }
    println!();
}

/// Checks that both sides do the same work, then times them in turns.
fn measure(sides: &Sides, case: &Case, rounds: usize) -> Result<(Measured, Value)> {
    eprintln!("{}: the same weights on both sides", case.name);
    let losses = check(sides, case)?;
    eprintln!("{}: warming up", case.name);
    let mut running = sides.start()?;
    let turns: Vec<usize> = case
        .parts
        .iter()
        .map(|part| running.load(part))
        .collect::<Result<_>>()?;
    let mut parts = vec![Samples::default(); case.parts.len()];
    for round in 1..=rounds {
        eprintln!("{}: round {round} of {rounds}", case.name);
        running.round(case, &turns, &mut parts)?;
    }
    let (peaks, memory) = match case.memory {
        true => running.peaks()?,
        false => (None, Value::Null),
    };
    let of_part = |((part, samples), losses): ((&Part, &Samples), Value)| {
        json!({"label": part.label, "settings": part.settings, "losses": losses, "seconds": {
            "products": samples.floor, "rust": samples.rust,
            "eager": samples.eager, "compiled": samples.compiled}})
    };
    let each: Vec<_> = case
        .parts
        .iter()
        .zip(&parts)
        .zip(losses)
        .map(of_part)
        .collect();
    let versions = running.eager.hello["versions"].clone();
    let detail = json!({"parts": each, "memory": memory, "versions": versions});
    Ok((Measured { parts, peaks }, detail))
}

/// The first losses of every part from the weights that PEFT's side writes, in programs of their
/// own: what they hold in memory ends with them.
fn check(sides: &Sides, case: &Case) -> Result<Vec<Value>> {
    let folder = tempfile::tempdir()?;
    let mut eager = sides.python("eager")?;
    let mut rust = sides.rust()?;
    let mut all = Vec::new();
    for part in &case.parts {
        let file = folder.path().join("weights.safetensors");
        let mut settings = part.settings.clone();
        // Large enough to move the loss in two steps.
        settings["lr"] = json!(1e-3);
        let request = json!({"do": "check", "case": settings, "file": file});
        let theirs = eager.losses(&request)?;
        let ours = rust.losses(&request)?;
        let label = format!("{} ({})", case.name, part.label);
        summary::equal_work(&label, case.name.ends_with("-step"), &ours, &theirs)?;
        all.push(json!({"rust": ours, "eager": theirs}));
    }
    Ok(all)
}

impl Sides {
    fn start(&self) -> Result<Running> {
        Ok(Running {
            rust: self.rust()?,
            eager: self.python("eager")?,
            compiled: self.python("compiled")?,
        })
    }

    fn rust(&self) -> Result<Worker> {
        rust_worker(&self.rust, self.threads)
    }

    fn python(&self, mode: &str) -> Result<Worker> {
        let threads = self.threads.to_string();
        let mut command = Command::new(&self.python);
        command
            .arg(&self.script)
            .args([threads.as_str(), mode])
            .env("OMP_NUM_THREADS", &threads)
            .env("MKL_NUM_THREADS", &threads)
            .env("TORCHINDUCTOR_CACHE_DIR", &self.cache)
            .env("TOKENIZERS_PARALLELISM", "false")
            .env("HF_HUB_OFFLINE", "1")
            .env_remove("PYTHONPATH")
            .env_remove("PYTHONHOME");
        Worker::start(&format!("PEFT ({mode})"), &mut command)
    }
}

/// Starts the Rust side.
pub fn rust_worker(program: &Path, threads: usize) -> Result<Worker> {
    let mut command = Command::new(program);
    command.env("RAYON_NUM_THREADS", threads.to_string());
    Worker::start("The Rust side", &mut command)
}

/// How many iterations of so many seconds make a turn of about `TURN`.
pub fn per_turn(seconds: f64) -> usize {
    ((TURN / seconds.max(1e-6)).ceil() as usize).clamp(1, 200)
}

impl Running {
    /// Loads a part on every side; returns how many iterations make a turn.
    fn load(&mut self, part: &Part) -> Result<usize> {
        let floor = json!({"case": "floor", "of": part.settings});
        let id = format!("products of {}", part.label);
        self.rust
            .ask(&json!({"do": "load", "id": id, "case": floor}))?;
        let request = json!({"do": "load", "id": part.label, "case": part.settings});
        let mut slowest = 0.0;
        for side in [&mut self.rust, &mut self.eager, &mut self.compiled] {
            let least = summary::least(&side.seconds(&request)?).unwrap_or(TURN);
            slowest = f64::max(slowest, least);
        }
        Ok(per_turn(slowest))
    }

    /// Every part on every side, one after the other.
    fn round(&mut self, case: &Case, turns: &[usize], parts: &mut [Samples]) -> Result<()> {
        for ((part, n), samples) in case.parts.iter().zip(turns).zip(parts) {
            let floor = format!("products of {}", part.label);
            samples.floor.extend(turn(&mut self.rust, &floor, *n)?);
            samples.rust.extend(turn(&mut self.rust, &part.label, *n)?);
            samples
                .eager
                .extend(turn(&mut self.eager, &part.label, *n)?);
            samples
                .compiled
                .extend(turn(&mut self.compiled, &part.label, *n)?);
        }
        Ok(())
    }

    fn peaks(&mut self) -> Result<(Option<Peaks>, Value)> {
        let all: Map<String, Value> = [
            ("rust", &mut self.rust),
            ("eager", &mut self.eager),
            ("compiled", &mut self.compiled),
        ]
        .into_iter()
        .map(|(name, worker)| Ok((name.to_owned(), worker.peak()?)))
        .collect::<Result<_>>()?;
        let peak = |name: &str| all[name]["peak"].as_f64().unwrap_or(f64::NAN);
        let peaks = Peaks {
            rust: peak("rust"),
            eager: peak("eager"),
            compiled: peak("compiled"),
        };
        Ok((Some(peaks), all.into()))
    }
}

/// Times `n` iterations of a loaded case, after a pause.
pub fn turn(worker: &mut Worker, id: &str, n: usize) -> Result<Vec<f64>> {
    std::thread::sleep(PAUSE);
    worker.seconds(&json!({"do": "time", "id": id, "n": n}))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_takes_about_a_tenth_of_a_second() {
        assert_eq!(per_turn(0.01), 10);
        assert_eq!(per_turn(3.0), 1);
        assert_eq!(per_turn(1e-9), 200);
    }
}
