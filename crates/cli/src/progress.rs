//! One line per step of a set-up: what it does, how long that usually takes, how far it is.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// Prints the steps of a set-up to stderr, numbered.
pub struct Steps {
    total: usize,
    done: usize,
}

impl Steps {
    /// A set-up of `total` steps.
    pub fn new(total: usize) -> Self {
        Self { total, done: 0 }
    }

    /// Starts the next step. `estimate` is shown for the steps that take long.
    pub fn start(&mut self, what: &str, estimate: Option<&str>) -> Step {
        self.done += 1;
        let estimate = estimate.map(|e| format!(" ({e})")).unwrap_or_default();
        let label = format!("[{}/{}] {what}{estimate}", self.done, self.total);
        eprintln!("{label}");
        let now = Instant::now();
        Step {
            start: now,
            shown: now,
            terminal: std::io::stderr().is_terminal(),
        }
    }

    /// Notes a step that had nothing to do.
    pub fn skip(&mut self) {
        self.done += 1;
    }
}

/// A running step.
pub struct Step {
    start: Instant,
    shown: Instant,
    terminal: bool,
}

impl Step {
    /// Shows how far the step is: in place on a terminal, every half minute elsewhere.
    pub fn update(&mut self, state: &str) {
        let pause = Duration::from_millis(if self.terminal { 200 } else { 30_000 });
        if self.shown.elapsed() < pause {
            return;
        }
        self.shown = Instant::now();
        let line = format!("      {} {state}", minutes(self.start.elapsed()));
        if self.terminal {
            let line: String = line.chars().take(78).collect();
            eprint!("\r\x1b[2K{line}");
            let _ = std::io::stderr().flush();
        } else {
            eprintln!("{line}");
        }
    }

    /// Ends the step.
    pub fn done(self) {
        if self.terminal {
            eprint!("\r\x1b[2K");
        }
        eprintln!("      done in {}", minutes(self.start.elapsed()));
    }
}

/// A duration in words: `7.3 s`, `4 min 05 s`.
pub fn minutes(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    if seconds < 60.0 {
        format!("{seconds:.1} s")
    } else {
        format!("{} min {:02} s", time.as_secs() / 60, time.as_secs() % 60)
    }
}
