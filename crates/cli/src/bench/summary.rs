//! From samples to a table, ratios and verdicts.

use super::cases::{Case, Goal};
use anyhow::{Result, bail};
use serde_json::{Value, json};

/// The seconds of one part's iterations.
#[derive(Clone, Debug, Default)]
pub struct Samples {
    /// The products alone, in Rust.
    pub floor: Vec<f64>,
    pub rust: Vec<f64>,
    pub eager: Vec<f64>,
    pub compiled: Vec<f64>,
}

/// Peak memory of each side, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Peaks {
    pub rust: f64,
    pub eager: f64,
    pub compiled: f64,
}

/// A case's measurement.
pub struct Measured {
    pub parts: Vec<Samples>,
    pub peaks: Option<Peaks>,
}

/// A goal beside what was measured.
#[derive(Debug)]
pub struct Verdict {
    pub words: String,
    /// `None` where it could not be measured.
    pub value: Option<f64>,
    pub at_most: f64,
}

impl Verdict {
    /// At the goal or below it; something unmeasured never is.
    pub fn met(&self) -> bool {
        self.value.is_some_and(|value| value <= self.at_most)
    }

    pub fn json(&self) -> Value {
        json!({"goal": self.words, "value": self.value, "at_most": self.at_most, "met": self.met()})
    }
}

/// The middle one of some numbers.
pub fn median(numbers: &[f64]) -> Option<f64> {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (low, high) = (
        sorted.get(sorted.len().checked_sub(1)? / 2)?,
        sorted.get(sorted.len() / 2)?,
    );
    Some((low + high) / 2.0)
}

/// The smallest of some numbers.
pub fn least(numbers: &[f64]) -> Option<f64> {
    numbers.iter().copied().min_by(f64::total_cmp)
}

/// Median over median.
fn ratio(over: &[f64], under: &[f64]) -> Option<f64> {
    let ratio = median(over)? / median(under)?;
    ratio.is_finite().then_some(ratio)
}

/// Every goal of a case, judged.
pub fn judge(case: &Case, measured: &Measured) -> Vec<Verdict> {
    case.goals
        .iter()
        .map(|goal| verdict(case, measured, *goal))
        .collect()
}

fn verdict(case: &Case, measured: &Measured, goal: Goal) -> Verdict {
    let first = measured.parts.first();
    let of = |other: fn(&Samples) -> &Vec<f64>| first.and_then(|s| ratio(&s.rust, other(s)));
    let labelled = |label: &str| {
        let place = case.parts.iter().position(|part| part.label == label)?;
        Some(&measured.parts.get(place)?.rust)
    };
    let (words, value, at_most) = match goal {
        Goal::Eager(most) => ("Rust / eager".to_owned(), of(|s| &s.eager), most),
        Goal::Compiled(most) => ("Rust / compiled".to_owned(), of(|s| &s.compiled), most),
        Goal::Floor(most) => ("Rust / its products".to_owned(), of(|s| &s.floor), most),
        Goal::Memory(most) => {
            let value = measured.peaks.map(|peaks| peaks.rust / peaks.eager);
            ("peak memory, Rust / eager".to_owned(), value, most)
        }
        Goal::Parts {
            part,
            over,
            at_most,
        } => {
            let sides = labelled(part).zip(labelled(over));
            let value = sides.and_then(|(one, other)| ratio(one, other));
            (format!("Rust, {part} / {over}"), value, at_most)
        }
    };
    Verdict {
        words,
        value,
        at_most,
    }
}

/// Refuses two sides that do not compute the same, and a check that shows nothing.
pub fn equal_work(label: &str, trains: bool, rust: &[f64], eager: &[f64]) -> Result<()> {
    let apart = |a: f64, b: f64| (a - b).abs() > 1e-4 * b.abs();
    let differ = rust.len() != eager.len()
        || rust.is_empty()
        || rust
            .iter()
            .zip(eager)
            .any(|(a, b)| !a.is_finite() || !b.is_finite() || apart(*a, *b));
    if differ {
        bail!(
            "{label}: from the same weights, the losses are {rust:?} in Rust and {eager:?} under \
             PEFT. The sides do unequal work, so their times are not compared."
        );
    }
    if trains && !eager.windows(2).all(|pair| apart(pair[0], pair[1])) {
        bail!("{label}: the losses {eager:?} do not move, so they show nothing of the training");
    }
    Ok(())
}

/// The head of the table.
pub fn head() -> String {
    let columns = ["products", "Rust", "", "eager", "", "compiled", ""];
    let mut line = format!("{:<40}", "milliseconds, median and least");
    columns
        .iter()
        .for_each(|name| line += &format!(" {name:>8}"));
    line + &format!(" {:>8} {:>8} {:>8}", "/eager", "/comp.", "/prod.")
}

/// One part's line of the table.
pub fn row(case: &Case, label: &str, samples: &Samples) -> String {
    let number = |value: Option<f64>, places| match value {
        Some(value) => format!(" {value:>8.places$}"),
        None => format!(" {:>8}", "-"),
    };
    let mut line = format!("{:<40}", format!("{} ({label})", case.name));
    line += &number(median(&samples.floor).map(|s| s * 1e3), 3);
    for seconds in [&samples.rust, &samples.eager, &samples.compiled] {
        line += &number(median(seconds).map(|s| s * 1e3), 3);
        line += &number(least(seconds).map(|s| s * 1e3), 3);
    }
    for other in [&samples.eager, &samples.compiled, &samples.floor] {
        line += &number(ratio(&samples.rust, other), 3);
    }
    line
}

/// A goal's line.
pub fn line(case: &Case, verdict: &Verdict) -> String {
    let value = verdict
        .value
        .map_or("not measured".to_owned(), |value| format!("{value:.3}"));
    let word = if verdict.met() { "met" } else { "MISSED" };
    let words = format!("  {}: {}", case.name, verdict.words);
    format!(
        "{words:<48} {value:>12}, at most {:.2}: {word}",
        verdict.at_most
    )
}

#[cfg(test)]
mod tests {
    use super::super::cases::chosen;
    use super::*;

    fn case(name: &str) -> Case {
        chosen(&[name.to_owned()]).unwrap().remove(0)
    }

    fn samples(rust: f64) -> Samples {
        Samples {
            floor: vec![1.0, 1.0, 9.0],
            rust: vec![rust, rust, 9.0],
            eager: vec![2.0, 2.0, 9.0],
            compiled: vec![1.5, 1.5, 9.0],
        }
    }

    fn met(case: &Case, parts: Vec<Samples>, peaks: Option<Peaks>) -> Vec<bool> {
        let verdicts = judge(case, &Measured { parts, peaks });
        verdicts.iter().map(Verdict::met).collect()
    }

    #[test]
    fn medians_and_least() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(least(&[3.0, 1.0]), Some(1.0));
        assert_eq!((median(&[]), least(&[])), (None, None));
    }

    #[test]
    fn each_goal_is_judged_by_its_own_ratio() {
        let mlp = case("mlp-step");
        assert_eq!(met(&mlp, vec![samples(1.25)], None), [true, true, true]);
        assert_eq!(met(&mlp, vec![samples(1.3)], None), [true, true, false]);
        assert_eq!(met(&mlp, vec![samples(1.5)], None), [true, false, false]);
        assert_eq!(met(&mlp, vec![samples(1.8)], None), [false, false, false]);
    }

    #[test]
    fn what_is_not_measured_is_missed() {
        assert_eq!(met(&case("mlp-step"), vec![], None), [false; 3]);
        let none = vec![Samples::default()];
        assert_eq!(met(&case("mlp-step"), none, None), [false; 3]);
        assert_eq!(met(&case("mixed"), vec![samples(1.0)], None), [false]);
    }

    #[test]
    fn parts_are_compared_with_each_other() {
        let parts = |last| [1.0, 5.0, last].map(samples).to_vec();
        assert_eq!(met(&case("mixed"), parts(1.3), None), [true]);
        assert_eq!(met(&case("mixed"), parts(1.4), None), [false]);
        let parts = |merged| [1.0, merged, 5.0].map(samples).to_vec();
        assert_eq!(met(&case("merged"), parts(1.02), None), [true]);
        assert_eq!(met(&case("merged"), parts(1.03), None), [false]);
    }

    #[test]
    fn memory_is_judged() {
        let peaks = |rust| {
            Some(Peaks {
                rust,
                eager: 100.0,
                compiled: 10.0,
            })
        };
        let llama = case("llama-step");
        assert_eq!(
            met(&llama, vec![samples(1.0)], peaks(90.0)),
            [true, true, true]
        );
        assert_eq!(
            met(&llama, vec![samples(1.0)], peaks(91.0)),
            [true, true, false]
        );
        assert_eq!(met(&llama, vec![samples(1.0)], None), [true, true, false]);
    }

    #[test]
    fn unequal_work_is_refused() {
        let refused =
            |trains, rust: &[f64], eager: &[f64]| equal_work("mlp", trains, rust, eager).is_err();
        assert!(!refused(
            true,
            &[1.0, 0.9, 0.8],
            &[1.00005, 0.90005, 0.80005]
        ));
        assert!(refused(true, &[1.0, 0.9, 0.8], &[1.0, 0.9, 0.8002]));
        assert!(refused(true, &[1.0, 0.9], &[1.0, 0.9, 0.8]));
        assert!(refused(true, &[], &[]));
        assert!(refused(true, &[f64::NAN], &[1.0]));
        // A training that does nothing proves nothing; a forward pass stays as it is.
        assert!(refused(true, &[1.0, 1.0, 1.0], &[1.0, 1.0, 1.0]));
        assert!(!refused(false, &[1.0, 1.0, 1.0], &[1.0, 1.0, 1.0]));
    }

    #[test]
    fn lines_say_what_was_missed() {
        let mlp = case("mlp-step");
        let verdicts = judge(
            &mlp,
            &Measured {
                parts: vec![samples(1.5)],
                peaks: None,
            },
        );
        assert!(line(&mlp, &verdicts[0]).ends_with("0.750, at most 0.85: met"));
        assert!(line(&mlp, &verdicts[1]).ends_with("1.000, at most 0.95: MISSED"));
        let row = row(&mlp, "x", &samples(1.5));
        assert!(row.contains(" 1500.000") && row.contains(" 0.750"), "{row}");
        assert_eq!(row.len(), head().len());
    }
}
