//! What a run says while it goes: a bar on a terminal, a line now and then elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// The least time between two lines where there is no bar.
const INTERVAL: Duration = Duration::from_secs(10);

/// The progress of some steps.
pub struct Progress {
    bar: Option<ProgressBar>,
    steps: usize,
    first: usize,
    start: Instant,
    last: Option<Instant>,
}

impl Progress {
    /// Of `steps` steps, of which `done` were done before.
    pub fn new(steps: usize, done: usize) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(steps as u64).with_position(done as u64);
            let style = "{bar:32} {pos} of {len} steps, {msg}, {eta} left";
            // A template that cannot be read leaves the bar's own.
            if let Ok(style) = ProgressStyle::with_template(style) {
                bar.set_style(style);
            }
            bar.reset_eta();
            bar
        });
        Self {
            bar,
            steps,
            first: done,
            start: Instant::now(),
            last: None,
        }
    }

    /// After step `step` with this loss, when so many tokens have gone through since the start.
    pub fn step(&mut self, step: usize, loss: f64, tokens: usize) {
        let speed = tokens as f64 / self.start.elapsed().as_secs_f64();
        let message = format!("loss {loss:.4}, {speed:.0} tokens/s");
        if let Some(bar) = &self.bar {
            bar.set_message(message);
            bar.set_position(step as u64);
            return;
        }
        let due = self.last.is_none_or(|last| last.elapsed() >= INTERVAL);
        if due && step < self.steps {
            self.last = Some(Instant::now());
            let each = self.start.elapsed().as_secs_f64() / (step - self.first) as f64;
            let left = each * (self.steps - step) as f64;
            eprintln!("step {step} of {}: {message}, {left:.0} s left", self.steps);
        }
    }

    /// Says something between two steps.
    pub fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{line}")),
            None => eprintln!("{line}"),
        }
    }

    /// Takes the bar away.
    pub fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
