//! The program on a small model: whole runs, stops, kills, and what is wrong.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use candle_core::Device;
use course::models::{Llama, Pretrained};
use tempfile::TempDir;

/// Texts to learn, and room for runs of a small Llama.
struct Place(TempDir);

/// 1.8 million parameters, trained on speeches; it reads 256 tokens.
fn model() -> PathBuf {
    course::data::folder().join("checkpoints/sotu-lm")
}

impl Place {
    fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        let play = course::data::text("hamlet").unwrap();
        for (file, part) in [
            ("texts.jsonl", play.train),
            ("held_out.jsonl", play.held_out),
        ] {
            let lines = part
                .split("\n\n")
                .flat_map(|scene| scene.lines().skip(10).take(40));
            let lines = lines
                .take(80)
                .map(|text| serde_json::json!({ "text": text }));
            let lines: Vec<String> = lines.map(|line| line.to_string()).collect();
            place.write(file, &lines.join("\n"));
        }
        place
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.at(name), text).unwrap();
    }

    fn command(&self, out: &str, more: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_finetune"));
        command.arg("--model").arg(model());
        command.arg("--data").arg(self.at("texts.jsonl"));
        command.arg("--out").arg(self.at(out));
        command.args(["--rank", "4", "--max-length", "32"]);
        if !more.contains(&"--learning-rate") {
            command.args(["--learning-rate", "0.02"]);
        }
        command.args(more).stdin(Stdio::null());
        command
    }

    fn run(&self, out: &str, more: &[&str]) -> Output {
        self.command(out, more).output().unwrap()
    }

    /// The files of a finished run that hold its numbers.
    fn result(&self, out: &str) -> (Vec<u8>, Vec<f64>) {
        let adapter = std::fs::read(self.at(out).join("adapter_model.safetensors")).unwrap();
        (
            adapter,
            losses(&run_file(&self.at(out))["result"]["history"]),
        )
    }
}

fn run_file(out: &Path) -> serde_json::Value {
    let bytes = std::fs::read(out.join("finetune.json")).unwrap();
    serde_json::from_slice(&bytes).unwrap()
}

fn losses(history: &serde_json::Value) -> Vec<f64> {
    let losses = history["losses"].as_array().unwrap();
    losses.iter().map(|loss| loss.as_f64().unwrap()).collect()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[track_caller]
fn good(output: &Output) -> String {
    let said = text(&output.stdout);
    assert!(output.status.success(), "{said}\n{}", text(&output.stderr));
    said
}

#[track_caller]
fn refused(output: &Output) -> String {
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.starts_with("error: ") && !said.contains("panicked"),
        "{said}"
    );
    said
}

/// Waits for a checkpoint.
fn wait_for(folder: &Path) {
    let start = Instant::now();
    while !folder.exists() {
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "{}",
            folder.display()
        );
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn it_learns_and_the_adapter_is_read_again() {
    let place = Place::new();
    for (out, more) in [
        ("f32", &[][..]),
        ("nf4", &["--qlora"]),
        ("dora", &["--dora"]),
    ] {
        let held_out = place.at("held_out.jsonl").display().to_string();
        let mut more = [more, &["--steps", "40", "--eval-data", &held_out]].concat();
        more.extend(["--prompt", "the cat"]);
        let said = good(&place.run(out, &more));
        assert!(
            said.contains("before: ") && said.contains("after: "),
            "{said}"
        );
        let (_, losses) = place.result(out);
        assert_eq!(losses.len(), 40);
        let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
        let (first, last) = (mean(&losses[..10]), mean(&losses[30..]));
        assert!(last < first - 0.5, "{out}: {losses:?}");
        let result = &run_file(&place.at(out))["result"];
        let after = result["held_out_after"].as_f64().unwrap();
        let before = result["history"]["held_out_before"].as_f64().unwrap();
        assert!(after < before - 0.3, "{out}: {before} {after}");

        // The library reads it, and finds the loss that the program measured.
        let base = Pretrained::open(model()).unwrap();
        let (llama, mut model) = match out {
            "nf4" => base
                .quantized(&Device::Cpu, &Default::default(), Llama::new)
                .unwrap(),
            _ => base.frozen(&Device::Cpu, Llama::new).unwrap(),
        };
        model.load_adapter(place.at(out), "default").unwrap();
        let texts = std::fs::read_to_string(place.at("held_out.jsonl")).unwrap();
        let texts: Vec<String> = texts
            .lines()
            .map(|line| {
                serde_json::from_str::<serde_json::Value>(line).unwrap()["text"]
                    .as_str()
                    .unwrap()
                    .into()
            })
            .collect();
        let tokenizer = base.tokenizer().unwrap();
        let end = course::tokenizer::END_OF_TEXT;
        let all =
            course::data::Sequences::texts(&texts, &tokenizer, end, 256, &Device::Cpu).unwrap();
        let loss = llama.held_out_loss(&all.in_order(4).unwrap()).unwrap();
        assert!((loss - after).abs() < 1e-6, "{out}: {loss} for {after}");
        let config = std::fs::read_to_string(place.at(out).join("adapter_config.json")).unwrap();
        assert!(config.contains("\"task_type\": \"CAUSAL_LM\""), "{config}");
    }
}

#[test]
fn a_killed_run_goes_on_with_the_same_numbers() {
    let place = Place::new();
    let usual = ["--steps", "50", "--save-every", "10", "--accumulate", "2"];
    for (whole, cut, more) in [
        ("lora", "lora-cut", &[][..]),
        (
            "qlora",
            "qlora-cut",
            &["--qlora", "--dora", "--schedule", "linear"],
        ),
    ] {
        let more = [&usual[..], more].concat();
        good(&place.run(whole, &more));
        let mut child = place.command(cut, &more).spawn().unwrap();
        wait_for(&place.at(cut).join("checkpoint-20"));
        // Nobody else works on it at the same time.
        let second = refused(&place.run(cut, &more));
        assert!(second.contains("another process"), "{second}");
        child.kill().unwrap();
        child.wait().unwrap();
        let adapter = place.at(cut).join("adapter_model.safetensors");
        assert!(!adapter.exists(), "killed too late");
        // What a kill in the middle of writing leaves is no checkpoint.
        std::fs::create_dir_all(place.at(cut).join(".partial/rest")).unwrap();
        let said = good(&place.run(cut, &more));
        assert!(said.contains("going on after step "), "{said}");
        assert_eq!(place.result(cut), place.result(whole), "{cut}");
        let kept = |step: usize| place.at(cut).join(format!("checkpoint-{step}")).exists();
        assert_eq!(
            [10, 20, 30, 40, 50].map(kept),
            [false, false, false, true, true]
        );
        let checkpoint = place.at(cut).join("checkpoint-50/adapter_config.json");
        let config = std::fs::read_to_string(checkpoint).unwrap();
        assert!(config.contains("CAUSAL_LM"), "{config}");
        // And once more there is nothing to do.
        assert!(good(&place.run(cut, &more)).contains("finished"));
    }
}

/// Batches of other lengths count by their tokens: the step is that of one large batch.
#[test]
fn accumulated_batches_are_one_large_batch() {
    let place = Place::new();
    let texts = [
        "To be.",
        "Or not to be, that is the question of today.",
        "Words.",
        "The rest is silence, my lord.",
    ];
    let lines = texts.map(|text| serde_json::json!({ "text": text }).to_string());
    place.write("texts.jsonl", &lines.join("\n"));
    good(&place.run("large", &["--steps", "3", "--batch", "4"]));
    good(&place.run(
        "small",
        &["--steps", "3", "--batch", "2", "--accumulate", "2"],
    ));
    let (large, small) = (place.result("large").1, place.result("small").1);
    for (large, small) in large.iter().zip(&small) {
        assert!((large - small).abs() < 1e-4, "{large} and {small}");
    }
}

/// A gradient of a length that AdamW takes for nothing: the model stays.
#[test]
fn the_longest_gradient_is_kept_to() {
    let place = Place::new();
    let losses = |out: &str, more: &[&str]| {
        good(&place.run(out, &[&["--steps", "6"], more].concat()));
        place.result(out).1
    };
    let still = losses("still", &["--learning-rate", "0"]);
    let clipped = losses("clipped", &["--max-grad-norm", "1e-14"]);
    let learns = losses("learns", &[]);
    let apart = |other: &[f64]| {
        let apart = still.iter().zip(other).map(|(a, b)| (a - b).abs());
        apart.fold(0.0, f64::max)
    };
    assert!(apart(&clipped) < 1e-4, "{clipped:?} for {still:?}");
    assert!(apart(&learns) > 0.1, "{learns:?} for {still:?}");
}

#[cfg(unix)]
#[test]
fn a_stopped_run_keeps_what_it_has() {
    let place = Place::new();
    let more = ["--steps", "4000", "--save-every", "10"];
    let mut command = place.command("stopped", &more);
    let child = command.stdout(Stdio::piped()).spawn().unwrap();
    wait_for(&place.at("stopped/checkpoint-10"));
    let pid = child.id().to_string();
    Command::new("kill").args(["-INT", &pid]).status().unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    let said = text(&output.stdout);
    let step = said.split("stopped after step ").nth(1).unwrap();
    let step: usize = step.split(' ').next().unwrap().parse().unwrap();
    let kept = place.at(&format!("stopped/checkpoint-{step}"));
    let state = std::fs::read(kept.join("trainer_state.json")).unwrap();
    assert_eq!(losses(&serde_json::from_slice(&state).unwrap()).len(), step);
    // PEFT's files are there as well.
    assert!(kept.join("adapter_config.json").is_file());
}

#[test]
fn a_damaged_checkpoint_is_named() {
    let place = Place::new();
    let more = ["--steps", "4000", "--save-every", "5"];
    let mut child = place
        .command("run", &more)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    wait_for(&place.at("run/checkpoint-10"));
    child.kill().unwrap();
    child.wait().unwrap();
    let entries = std::fs::read_dir(place.at("run")).unwrap().flatten();
    let steps = entries.filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        name.strip_prefix("checkpoint-")?.parse::<usize>().ok()
    });
    let newest = place.at(&format!("run/checkpoint-{}", steps.max().unwrap()));
    let tensors = newest.join("trainer_state.safetensors");
    let whole = std::fs::read(&tensors).unwrap();
    std::fs::write(&tensors, &whole[..whole.len() / 2]).unwrap();
    let said = refused(&place.run("run", &more));
    assert!(
        said.contains(&newest.display().to_string()) && said.contains("delete it"),
        "{said}"
    );
    // Whole again, but the losses are those of another step.
    std::fs::write(&tensors, &whole).unwrap();
    let state = newest.join("trainer_state.json");
    let text = std::fs::read_to_string(&state).unwrap();
    let mut other: serde_json::Value = serde_json::from_str(&text).unwrap();
    other["losses"].as_array_mut().unwrap().pop();
    std::fs::write(&state, other.to_string()).unwrap();
    let said = refused(&place.run("run", &more));
    assert!(
        said.contains("losses") && said.contains("delete it"),
        "{said}"
    );
}

#[test]
fn what_cannot_be_is_refused_and_leaves_nothing() {
    let place = Place::new();
    place.write("bad.jsonl", "{\"text\": \"a b\"}\n{\"txt\": \"a\"}\n");
    place.write(
        "chats.jsonl",
        "{\"prompt\": \"a\", \"completion\": \"b\"}\n",
    );
    let file = |name: &str| place.at(name).display().to_string();
    let (bad, chats, none) = (file("bad.jsonl"), file("chats.jsonl"), file("none.jsonl"));
    for (more, said) in [
        (&["--data", &bad][..], "line 2"),
        (&["--data", &none], "none.jsonl"),
        (&["--data", &chats], "chat template"),
        (&["--eval-data", &bad], "line 2"),
        (&["--max-length", "257"], "256 tokens at most"),
        (&["--max-length", "1"], "max_length = 1"),
        (&["--batch", "0"], "--batch is 0"),
        (&["--batch", "81"], "80 sequences"),
        (&["--rank", "0"], "r = 0"),
        (&["--targets", "qproj"], "qproj"),
        (&["--warmup", "2"], "--warmup"),
        (&["--learning-rate", "-1"], "--learning-rate -1"),
        (&["--weight-decay", "NaN"], "--weight-decay NaN"),
        (&["--max-grad-norm", "0"], "--max-grad-norm 0"),
        (&["--accumulate", "18446744073709551615"], "--accumulate"),
        (&["--rank", "1000000000000"], "--rank"),
        (&["--prompt", ""], "--prompt has 0 tokens"),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_finetune"));
        command
            .arg("--model")
            .arg(model())
            .arg("--out")
            .arg(place.at("out"));
        if !more.contains(&"--data") {
            command.arg("--data").arg(place.at("texts.jsonl"));
        }
        let told = refused(&command.args(more).output().unwrap());
        assert!(told.contains(said), "{more:?}: {told}");
        assert!(!place.at("out").exists(), "{more:?} left a folder");
    }
    // A run with another model, or other settings, in the same folder.
    std::fs::create_dir_all(place.at("full")).unwrap();
    place.write("full/file", "mine");
    assert!(refused(&place.run("full", &[])).contains("not empty"));
    good(&place.run("run", &["--steps", "2"]));
    let said = refused(&place.run("run", &["--steps", "2", "--batch", "2"]));
    assert!(said.contains("batch: 4 there, 2 here"), "{said}");
    let missing = Command::new(env!("CARGO_BIN_EXE_finetune"))
        .args(["--model", "no/such", "--data", "x", "--out", "y"])
        .output()
        .unwrap();
    assert!(refused(&missing).contains("no/such/config.json"));
}
