//! The run.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device, Tensor};
use course::models::{GenerationConfig, Llama, LlamaConfig, Pretrained};
use course::rng::rng;
use lora::LoraModel;
use lora::ops::IGNORE_INDEX;
use lora::optim::{GradientAccumulator, LoraOptimizer, ParameterGroup, clip_grad_norm};

use crate::arguments::{Arguments, On, Settings};
use crate::data::{Learned, Words};
use crate::output::{ADAPTER, History, Output};
use crate::progress::Progress;

/// Tokens of an answer to `--prompt`.
const ANSWER: usize = 60;

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Finished,
    Stopped,
}

/// All of it.
pub fn run(arguments: &Arguments) -> Result<End> {
    arguments.check()?;
    let device = match arguments.device {
        On::Cpu => Device::Cpu,
        On::Cuda => Device::new_cuda(0).context("--device cuda")?,
    };
    let base = Pretrained::open(&arguments.model).context("--model")?;
    let config: LlamaConfig = base.config().context("--model")?;
    let max_length = arguments.max_length(config.max_position_embeddings)?;
    let words = Words::of(&base)?;
    let learn = words.learned(&arguments.data, max_length, &device)?;
    let held_out = match &arguments.eval_data {
        Some(file) => {
            let held_out = words.learned(file, max_length, &device)?;
            Some(held_out.sequences.in_order(arguments.batch)?)
        }
        None => None,
    };
    ensure!(
        arguments.batch <= learn.sequences.len(),
        "--batch {}: there are {} sequences only",
        arguments.batch,
        learn.sequences.len()
    );
    if let Some(prompt) = &arguments.prompt {
        let (ids, _) = words.asked(prompt, learn.chats).context("--prompt")?;
        let longest = config.max_position_embeddings.saturating_sub(ANSWER);
        ensure!(
            (1..=longest).contains(&ids.len()),
            "--prompt has {} tokens; give 1 to {longest}",
            ids.len()
        );
    }
    let weights = base.weights_file();
    let settings = arguments.settings(&weights, (learn.sequences.len(), max_length))?;
    let lora = settings.lora();
    let (llama, mut model) = match settings.quantization() {
        Some(quantization) => base.quantized(&device, &quantization, Llama::new)?,
        None => base.frozen(&device, Llama::new)?,
    };
    model.add_adapter(ADAPTER, &lora, &mut rng(settings.seed))?;
    // Only now, so that a run that cannot be leaves no folder.
    let output = Output::open(&arguments.out, &settings)?;
    if output.is_finished()? {
        println!(
            "{} holds this run, and it is finished",
            arguments.out.display()
        );
        return Ok(End::Finished);
    }
    println!("{}", learn.said);
    println!("{}", model.parameter_count());
    let run = Run {
        arguments,
        settings: &settings,
        words: &words,
        llama: &llama,
        model: &model,
        learn: &learn,
        held_out: held_out.as_deref(),
        output: &output,
    };
    run.all()
}

struct Run<'r> {
    arguments: &'r Arguments,
    settings: &'r Settings,
    words: &'r Words,
    llama: &'r Llama,
    model: &'r LoraModel,
    learn: &'r Learned,
    held_out: Option<&'r [(Tensor, Tensor)]>,
    output: &'r Output,
}

impl Run<'_> {
    fn all(&self) -> Result<End> {
        let settings = self.settings;
        let group = ParameterGroup::all(self.model.trainable_parameters(), settings.learning_rate)
            .with_weight_decay(settings.weight_decay);
        let mut optimizer = LoraOptimizer::new(vec![group])?;
        let mut history = match self.output.resume(self.model, &mut optimizer)? {
            Some(history) => {
                println!("going on after step {}", history.losses.len());
                history
            }
            None => {
                self.answer("before")?;
                History {
                    held_out_before: self.measure()?,
                    ..History::default()
                }
            }
        };
        if self.steps(&mut optimizer, &mut history)? == End::Stopped {
            return Ok(End::Stopped);
        }
        let after = self.measure()?;
        self.output.finish(self.model, settings, &history, after)?;
        if let (Some(before), Some(after)) = (history.held_out_before, after) {
            println!("held-out loss {before:.4} before, {after:.4} after");
        }
        self.answer("after")?;
        println!(
            "{} steps in {:.0} s, {:.0} tokens/s; the adapter is in {}",
            history.losses.len(),
            history.seconds,
            history.tokens as f64 / history.seconds.max(1e-9),
            self.arguments.out.display()
        );
        Ok(End::Finished)
    }

    fn steps(&self, optimizer: &mut LoraOptimizer, history: &mut History) -> Result<End> {
        let (settings, schedule) = (self.settings, self.settings.schedule());
        let stop = Stop::listen()?;
        let done = history.losses.len();
        let mut batches = self.learn.sequences.batches(settings.batch, settings.seed);
        // What was seen before a stop is not seen again.
        for batch in batches.by_ref().take(done * settings.accumulate) {
            batch?;
        }
        let mut progress = Progress::new(settings.steps, done);
        let tokens_before = history.tokens;
        for step in done..settings.steps {
            let start = Instant::now();
            optimizer.set_learning_rate_factor(schedule.factor(step, settings.steps))?;
            let mut gradients = GradientAccumulator::new(optimizer.parameters());
            let (mut sum, mut counted) = (0.0, 0.0);
            for batch in batches.by_ref().take(settings.accumulate) {
                let (ids, next) = batch?;
                let loss = self.llama.loss(&ids, &next, true)?;
                let count = next.ne(IGNORE_INDEX)?.to_dtype(DType::F64)?;
                let count = count.sum_all()?.to_scalar::<f64>()?;
                // A batch counts by its tokens, as if all were in one.
                sum += count * loss.to_dtype(DType::F64)?.to_scalar::<f64>()?;
                counted += count;
                history.tokens += ids.elem_count();
                gradients.add_weighted(&loss.backward()?, count)?;
            }
            let loss = sum / counted;
            if !loss.is_finite() {
                bail!(
                    "the loss of step {} is {loss}; the checkpoints before it are whole. Lower \
                     --learning-rate (it is {}) and give a new --out",
                    step + 1,
                    settings.learning_rate
                );
            }
            let mut gradients = gradients.take_mean()?;
            clip_grad_norm(
                &mut gradients,
                optimizer.parameters(),
                settings.max_grad_norm,
            )?;
            optimizer.step(&gradients)?;
            history.losses.push(loss);
            history.seconds += start.elapsed().as_secs_f64();
            progress.step(step + 1, loss, history.tokens - tokens_before);

            let (stopping, last) = (stop.requested(), step + 1 == settings.steps);
            // The last step is kept too: what follows may take a while.
            if stopping || last || (step + 1).is_multiple_of(self.arguments.save_every) {
                let kept = self.output.save(self.model, optimizer, settings, history)?;
                if stopping {
                    progress.end();
                    println!(
                        "stopped after step {} of {}; {} is kept, and the same command goes on",
                        step + 1,
                        settings.steps,
                        kept.display()
                    );
                    return Ok(End::Stopped);
                }
                progress.say(&format!("kept {}", kept.display()));
            }
        }
        progress.end();
        Ok(End::Finished)
    }

    fn measure(&self) -> Result<Option<f64>> {
        let windows = self
            .held_out
            .map(|windows| self.llama.held_out_loss(windows));
        Ok(windows.transpose()?)
    }

    /// The answer to `--prompt`, if there is one.
    fn answer(&self, when: &str) -> Result<()> {
        let Some(prompt) = &self.arguments.prompt else {
            return Ok(());
        };
        let (ids, end) = self.words.asked(prompt, self.learn.chats)?;
        let config = GenerationConfig {
            max_new_tokens: ANSWER,
            temperature: 0.0,
            eos_token_id: end,
            ..GenerationConfig::default()
        };
        let new = self
            .llama
            .generate(&ids, &config, &mut rng(self.settings.seed))?;
        println!("{when}: {}", self.words.tokenizer.decode(&new)?);
        Ok(())
    }
}

/// Whether the process is asked to end; once this is dropped, a signal ends it as ever.
struct Stop {
    asked: Arc<AtomicBool>,
    over: Arc<AtomicBool>,
}

impl Stop {
    fn listen() -> Result<Self> {
        use signal_hook::flag;
        let new = || Arc::new(AtomicBool::new(false));
        let (asked, over) = (new(), new());
        for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
            flag::register_conditional_default(signal, over.clone())?;
            // The second one ends the process at once.
            flag::register_conditional_shutdown(signal, 130, asked.clone())?;
            flag::register(signal, asked.clone())?;
        }
        Ok(Self { asked, over })
    }

    fn requested(&self) -> bool {
        self.asked.load(Ordering::Relaxed)
    }
}

impl Drop for Stop {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}
