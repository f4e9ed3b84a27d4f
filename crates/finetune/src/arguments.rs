//! What the command line says, and what of it makes a run.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use lora::quant::{QuantConfig, QuantType};
use lora::{LoraConfig, TargetModules};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Fine-tune a local Llama-shaped model with LoRA or QLoRA. The same command again goes on where a
/// run was stopped.
#[derive(Debug, Parser)]
#[command(name = "finetune", version, allow_negative_numbers = true)]
pub struct Arguments {
    /// The model: a folder with config.json, model.safetensors and tokenizer.json, or a GGUF file
    #[arg(long, value_name = "DIR|FILE.gguf")]
    pub model: PathBuf,
    /// Texts or chats, one JSON object a line: {"text": …}, {"messages": [{"role": …, "content":
    /// …}, …]} or {"prompt": …, "completion": …}
    #[arg(long, value_name = "FILE.jsonl")]
    pub data: PathBuf,
    /// Where checkpoints and the adapter go; a new folder, or that of a run to go on with
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Data of the same kind to measure the loss on, before and after
    #[arg(long, value_name = "FILE.jsonl")]
    pub eval_data: Option<PathBuf>,
    /// A question (or the beginning of a text) to answer before and after
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,
    /// Keep the model in 4 bits
    #[arg(long)]
    pub qlora: bool,
    /// Which 4 bits
    #[arg(long, value_enum, default_value_t = Codes::Nf4, requires = "qlora")]
    pub quant_type: Codes,
    /// Rank of the adapter
    #[arg(long, default_value_t = 16, value_name = "R")]
    pub rank: usize,
    /// Numerator of the scaling alpha / r [default: twice the rank]
    #[arg(long)]
    pub alpha: Option<f64>,
    /// Layers to adapt: all-linear, or names such as q_proj,v_proj
    #[arg(long, default_value = "all-linear", value_name = "NAMES")]
    pub targets: String,
    /// Scale by alpha / sqrt(r)
    #[arg(long)]
    pub rslora: bool,
    /// Weight-decomposed adapters
    #[arg(long)]
    pub dora: bool,
    /// Highest learning rate, of AdamW
    #[arg(long, default_value_t = 2e-4, value_name = "RATE")]
    pub learning_rate: f64,
    /// What becomes of it after the warm-up
    #[arg(long, value_enum, default_value_t = Decay::Cosine)]
    pub schedule: Decay,
    /// Share of the steps in which the learning rate rises
    #[arg(long, default_value_t = 0.03, value_name = "SHARE")]
    pub warmup: f64,
    /// Times that each line is seen
    #[arg(long, default_value_t = 1.0, conflicts_with = "steps")]
    pub epochs: f64,
    /// Steps of the optimiser, in place of epochs
    #[arg(long)]
    pub steps: Option<usize>,
    /// Sequences in a forward pass
    #[arg(long, default_value_t = 4)]
    pub batch: usize,
    /// Forward passes in a step
    #[arg(long, default_value_t = 1, value_name = "PASSES")]
    pub accumulate: usize,
    /// Longest sequence in tokens [default: 512, or what the model reads at most]
    #[arg(long, value_name = "TOKENS")]
    pub max_length: Option<usize>,
    /// Longest gradient
    #[arg(long, default_value_t = 1.0, value_name = "NORM")]
    pub max_grad_norm: f64,
    /// Weight decay
    #[arg(long, default_value_t = 0.0, value_name = "RATE")]
    pub weight_decay: f64,
    /// Steps between two checkpoints
    #[arg(long, default_value_t = 50, value_name = "STEPS")]
    pub save_every: usize,
    /// Seed of the adapter and of the order of the data
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Where to compute
    #[arg(long, value_enum, default_value_t = On::Cpu)]
    pub device: On,
}

/// [`QuantType`], on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Codes {
    /// Quantiles of the normal distribution, as in QLoRA
    Nf4,
    /// Floating point
    Fp4,
    /// Evenly spaced
    Int4,
}

/// What becomes of the learning rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Decay {
    /// It falls to 0 along half a cosine
    Cosine,
    /// It falls to 0 in a straight line
    Linear,
    /// It stays
    Constant,
}

/// A device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum On {
    /// The processor
    Cpu,
    /// The first NVIDIA card; needs a build with --features course/cuda
    Cuda,
}

/// All that decides about the numbers of a run: two runs with the same settings are the same run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// The model's folder or file.
    pub model: String,
    /// SHA-256 of the file with its weights.
    pub weights_sha256: String,
    /// SHA-256 of the data.
    pub data_sha256: String,
    pub eval_data_sha256: Option<String>,
    pub device: On,
    /// None with the weights in full.
    pub quant_type: Option<Codes>,
    pub rank: usize,
    pub alpha: f64,
    pub targets: String,
    pub rslora: bool,
    pub dora: bool,
    pub learning_rate: f64,
    pub schedule: Decay,
    pub warmup: f64,
    pub steps: usize,
    pub batch: usize,
    pub accumulate: usize,
    pub max_length: usize,
    pub max_grad_norm: f64,
    pub weight_decay: f64,
    pub seed: u64,
}

impl Arguments {
    /// Refuses numbers that make no run.
    pub fn check(&self) -> Result<()> {
        for (name, value) in [
            ("--batch", self.batch),
            ("--accumulate", self.accumulate),
            ("--save-every", self.save_every),
            ("--steps", self.steps.unwrap_or(1)),
        ] {
            ensure!(value > 0, "{name} is 0; give 1 or more");
        }
        let positive = |value: f64| value.is_finite() && value > 0.0;
        ensure!(
            positive(self.epochs),
            "--epochs {} must be above 0",
            self.epochs
        );
        let norm = self.max_grad_norm;
        ensure!(norm > 0.0, "--max-grad-norm {norm} must be above 0");
        for (name, rate) in [
            ("--learning-rate", self.learning_rate),
            ("--weight-decay", self.weight_decay),
        ] {
            ensure!(
                rate.is_finite() && rate >= 0.0,
                "{name} {rate} must be 0 or more"
            );
        }
        ensure!(
            self.rank <= 1 << 16,
            "--rank {} is more than 65536",
            self.rank
        );
        let each = self.batch.checked_mul(self.accumulate);
        ensure!(
            each.is_some_and(|each| each <= 1 << 32),
            "--batch {} times --accumulate {} is too much for a step",
            self.batch,
            self.accumulate
        );
        ensure!(
            (0.0..=1.0).contains(&self.warmup),
            "--warmup {} is a share of the steps; give 0 to 1",
            self.warmup
        );
        Ok(())
    }

    /// The longest sequence, for a model that reads `longest` tokens.
    pub fn max_length(&self, longest: usize) -> Result<usize> {
        let length = self.max_length.unwrap_or(longest.min(512));
        ensure!(
            length <= longest,
            "--max-length {length}: the model reads {longest} tokens at most"
        );
        Ok(length)
    }

    /// The settings of a run over so many sequences.
    pub fn settings(
        &self,
        weights: &Path,
        (sequences, max_length): (usize, usize),
    ) -> Result<Settings> {
        let each = self.batch * self.accumulate;
        let epochs = || {
            (self.epochs * sequences as f64 / each as f64)
                .ceil()
                .max(1.0) as usize
        };
        let model = std::path::absolute(&self.model);
        let model = model.with_context(|| self.model.display().to_string())?;
        Ok(Settings {
            model: model.display().to_string(),
            weights_sha256: sha256(weights)?,
            data_sha256: sha256(&self.data)?,
            eval_data_sha256: self.eval_data.as_deref().map(sha256).transpose()?,
            device: self.device,
            quant_type: self.qlora.then_some(self.quant_type),
            rank: self.rank,
            alpha: self.alpha.unwrap_or(2.0 * self.rank as f64),
            targets: self.targets.clone(),
            rslora: self.rslora,
            dora: self.dora,
            learning_rate: self.learning_rate,
            schedule: self.schedule,
            warmup: self.warmup,
            steps: self.steps.unwrap_or_else(epochs),
            batch: self.batch,
            accumulate: self.accumulate,
            max_length,
            max_grad_norm: self.max_grad_norm,
            weight_decay: self.weight_decay,
            seed: self.seed,
        })
    }
}

impl Settings {
    /// The adapter.
    pub fn lora(&self) -> LoraConfig {
        let names: Vec<String> = self
            .targets
            .split(',')
            .map(|name| name.trim().into())
            .collect();
        let targets = match &names[..] {
            [one] => TargetModules::from(one.as_str()),
            _ => TargetModules::from(names),
        };
        LoraConfig::new(self.rank, self.alpha)
            .with_targets(targets)
            .with_rslora(self.rslora)
            .with_dora(self.dora)
    }

    /// The 4 bits of the model, if it is kept in them.
    pub fn quantization(&self) -> Option<QuantConfig> {
        let quant_type = match self.quant_type? {
            Codes::Nf4 => QuantType::Nf4,
            Codes::Fp4 => QuantType::Fp4,
            Codes::Int4 => QuantType::Int4,
        };
        Some(QuantConfig {
            quant_type,
            ..QuantConfig::default()
        })
    }

    /// How the learning rate goes.
    pub fn schedule(&self) -> lora::optim::Schedule {
        use lora::optim::Schedule;
        let warmup_steps = (self.warmup * self.steps as f64).round() as usize;
        match self.schedule {
            Decay::Cosine => Schedule::Cosine { warmup_steps },
            Decay::Linear => Schedule::Linear { warmup_steps },
            Decay::Constant => Schedule::Constant { warmup_steps },
        }
    }
}

fn sha256(file: &Path) -> Result<String> {
    let hash = || -> std::io::Result<String> {
        let mut hasher = Sha256::new();
        std::io::copy(&mut std::fs::File::open(file)?, &mut hasher)?;
        let digest = hasher.finalize();
        Ok(digest.iter().map(|byte| format!("{byte:02x}")).collect())
    };
    hash().with_context(|| file.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use lora::optim::Schedule;

    fn settings(more: &[&str], sequences: usize) -> Settings {
        let file = file!().rsplit('/').next().unwrap();
        let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(file);
        let here = here.display().to_string();
        let usual = ["finetune", "--model", "m", "--data", &here, "--out", "o"];
        let arguments = Arguments::parse_from([&usual, more].concat());
        arguments.check().unwrap();
        arguments
            .settings(Path::new(&here), (sequences, 128))
            .unwrap()
    }

    #[test]
    fn epochs_are_steps_of_all_their_passes() {
        let steps = |more: &[&str]| settings(more, 100).steps;
        assert_eq!(steps(&[]), 25);
        assert_eq!(steps(&["--batch", "8"]), 13);
        assert_eq!(steps(&["--batch", "5", "--accumulate", "4"]), 5);
        assert_eq!(steps(&["--epochs", "2.5"]), 63);
        assert_eq!(steps(&["--epochs", "0.001"]), 1);
        assert_eq!(steps(&["--steps", "7", "--accumulate", "4"]), 7);
    }

    #[test]
    fn the_adapter_is_what_was_asked_for() {
        let lora = settings(&[], 9).lora();
        let usual = LoraConfig::new(16, 32.0).with_targets(TargetModules::AllLinear);
        assert_eq!(lora, usual);
        let more = [
            "--rank",
            "4",
            "--alpha",
            "8",
            "--rslora",
            "--targets",
            "q_proj, v_proj",
        ];
        let wanted = LoraConfig::new(4, 8.0).with_targets(["q_proj", "v_proj"]);
        assert_eq!(settings(&more, 9).lora(), wanted.with_rslora(true));
        let dora = settings(&["--dora", "--targets", "q_proj"], 9).lora();
        let wanted = LoraConfig::new(16, 32.0).with_targets(TargetModules::from("q_proj"));
        assert_eq!(dora, wanted.with_dora(true));
        assert_eq!(settings(&[], 9).quantization(), None);
        let fp4 = settings(&["--qlora", "--quant-type", "fp4"], 9).quantization();
        assert_eq!(fp4.unwrap().quant_type, QuantType::Fp4);
    }

    #[test]
    fn the_learning_rate_goes_as_was_asked_for() {
        let schedule = |more: &[&str]| {
            let more = [&["--steps", "50", "--warmup", "0.1"], more].concat();
            settings(&more, 9).schedule()
        };
        let warmup_steps = 5;
        assert_eq!(schedule(&[]), Schedule::Cosine { warmup_steps });
        let linear = schedule(&["--schedule", "linear"]);
        assert_eq!(linear, Schedule::Linear { warmup_steps });
        let constant = schedule(&["--schedule", "constant"]);
        assert_eq!(constant, Schedule::Constant { warmup_steps });
    }
}
