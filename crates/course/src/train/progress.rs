//! The lines a run prints.

use std::time::Duration;

use super::History;
use super::history::Change;

/// The least time between two lines.
const INTERVAL: Duration = Duration::from_secs(1);

/// Decides when to print, and what.
#[derive(Debug, Default)]
pub(super) struct Progress {
    last: Option<Duration>,
}

impl Progress {
    /// The line after step `step`, where one is due: after the first step, then at most one a
    /// second. None after the last step, for the summary follows.
    ///
    /// `now`: the time since the loop began.
    pub(super) fn line(
        &mut self,
        now: Duration,
        name: &str,
        (step, steps): (usize, usize),
        loss: f64,
    ) -> Option<String> {
        let due = match self.last {
            None => true,
            Some(last) => now >= last + INTERVAL,
        };
        if !due || step >= steps {
            return None;
        }
        let speed = match self.last {
            // One step, with all that happens only once, says little of those to come.
            None => String::new(),
            Some(_) => speed(now, step, steps),
        };
        self.last = Some(now);
        let loss = number(loss);
        Some(format!(
            "{name}: step {step} of {steps}, loss {loss}{speed}"
        ))
    }
}

fn speed(now: Duration, step: usize, steps: usize) -> String {
    let rate = step as f64 / now.as_secs_f64();
    let left = (steps - step) as f64 / rate;
    format!(", {} steps/s, {} left", three_digits(rate), time(left))
}

/// The last line: what was done, in how much time.
pub(super) fn summary(history: &History) -> String {
    let steps = steps(history.steps.len());
    let name = &history.name;
    format!(
        "{name}: {steps} in {}{}",
        time(history.seconds),
        Change(history)
    )
}

/// What is printed after the stop button.
pub(super) fn stopped(history: &History, steps: usize) -> String {
    format!(
        "{}: stopped after step {} of {steps}; the weights keep what they have learned",
        history.name,
        history.steps.len()
    )
}

/// "1 step", "2 steps".
pub(super) fn steps(count: usize) -> String {
    format!("{count} step{}", if count == 1 { "" } else { "s" })
}

/// A loss: four decimals, or a power of ten where these would hide it.
pub(super) fn number(value: f64) -> String {
    if value == 0.0 || (1e-3..1e6).contains(&value.abs()) {
        format!("{value:.4}")
    } else {
        format!("{value:.3e}")
    }
}

/// 0.0123, 1.23, 12.3, 123, 1230.
fn three_digits(value: f64) -> String {
    let decimals = match value {
        v if v >= 100.0 => 0,
        v if v >= 10.0 => 1,
        v if v >= 1.0 => 2,
        _ => 3,
    };
    format!("{value:.decimals$}")
}

/// 9.8 s, 42 s, 3 min 5 s, 2 h 5 min.
pub(super) fn time(seconds: f64) -> String {
    if seconds < 9.95 {
        return format!("{seconds:.1} s");
    }
    let whole = seconds.round() as u64;
    match (whole / 3600, whole / 60 % 60, whole % 60) {
        (0, 0, s) => format!("{s} s"),
        (0, min, s) => format!("{min} min {s} s"),
        (h, min, _) => format!("{h} h {min} min"),
    }
}
