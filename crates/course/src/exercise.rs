//! Exercises that check themselves.
//!
//! In a notebook an exercise is a statement with a hint, a starter cell that runs as it is, a check
//! cell, and a solution folded away. The check cell compares what the starter cell defines with
//! what is right, and says in a friendly line how it stands:
//!
//! ```
//! use course::exercise::Exercise;
//!
//! // The starter cell: replace the 0.
//! fn lora_parameters(inputs: usize, outputs: usize, r: usize) -> usize {
//!     r * (inputs + outputs)
//! }
//!
//! // The check cell.
//! let outcome = Exercise::new("lora_parameters")
//!     .hint("A has r rows of `inputs` numbers, B has `outputs` rows of r numbers.")
//!     .expect("768 → 512, r = 8", lora_parameters(768, 512, 8), 10_240)
//!     .expect("3 → 5, r = 1", lora_parameters(3, 5, 1), 8)
//!     .check();
//! assert!(outcome.passed());
//! assert_eq!(outcome.to_string(), "✓ Exercise lora_parameters: all 2 cases right.");
//! ```

use std::fmt::{self, Debug};
use std::io::Write;

use candle_core::{Shape, Tensor, Var};

use crate::metrics;

/// The longest value a message shows, in characters.
const LONGEST: usize = 200;

/// An exercise's check: a name, a hint and cases that must hold. [`check`](Self::check) closes it.
///
/// ```
/// use course::exercise::Exercise;
///
/// assert!(Exercise::new("sum").expect("1 + 1", 1 + 1, 2).check().passed());
/// ```
#[derive(Clone, Debug)]
#[must_use = "close the exercise with .check()"]
pub struct Exercise {
    name: String,
    hint: Option<String>,
    cases: Vec<Case>,
}

/// One expectation, and what is wrong where it does not hold.
#[derive(Clone, Debug)]
struct Case {
    what: String,
    mismatch: Option<Mismatch>,
}

#[derive(Clone, Debug)]
struct Mismatch {
    expected: String,
    got: String,
}

impl Exercise {
    /// An exercise named with a-z, 0-9 and _, the name it is recorded under.
    ///
    /// ```
    /// use course::exercise::Exercise;
    ///
    /// let outcome = Exercise::new("Rank One").expect_true("so", true).check();
    /// assert!(!outcome.passed(), "a name must be made of a-z, 0-9 and _");
    /// ```
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            hint: None,
            cases: Vec::new(),
        }
    }

    /// What a learner reads below the first case that does not hold.
    ///
    /// ```
    /// use course::exercise::Exercise;
    ///
    /// let exercise = Exercise::new("rank").hint("Count the rows.");
    /// let outcome = exercise.expect("the identity", 0, 3).check();
    /// assert!(outcome.to_string().contains("Hint: Count the rows."));
    /// ```
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Expects `got` to equal `want`; `what` names the case.
    ///
    /// ```
    /// use course::exercise::Exercise;
    ///
    /// let outcome = Exercise::new("rank").expect("r = 8", 7, 8).check();
    /// let text = outcome.to_string();
    /// assert!(text.contains("expected 8") && text.contains("got      7"));
    /// ```
    pub fn expect<T: PartialEq + Debug>(self, what: impl Into<String>, got: T, want: T) -> Self {
        let mismatch = (got != want).then(|| Mismatch {
            expected: shown(&want),
            got: shown(&got),
        });
        self.case(what, mismatch)
    }

    /// Expects |got − want| ≤ tolerance · |want|, or ≤ tolerance where `want` is 0.
    ///
    /// NaN and infinity never hold.
    ///
    /// ```
    /// use course::exercise::Exercise;
    ///
    /// let near = Exercise::new("root").expect_close("√2", 1.4142, 2f64.sqrt(), 1e-4);
    /// assert!(near.check().passed());
    /// let far = Exercise::new("root").expect_close("√2", 1.41, 2f64.sqrt(), 1e-4);
    /// assert!(!far.check().passed());
    /// ```
    pub fn expect_close(
        self,
        what: impl Into<String>,
        got: impl Into<f64>,
        want: impl Into<f64>,
        tolerance: f64,
    ) -> Self {
        let (got, want) = (got.into(), want.into());
        let scale = if want == 0.0 { 1.0 } else { want.abs() };
        let holds = got.is_finite() && want.is_finite() && (got - want).abs() <= tolerance * scale;
        let mismatch = (!holds).then(|| Mismatch {
            expected: format!(
                "{want} (within {tolerance:e}{})",
                if want == 0.0 { "" } else { " of it" }
            ),
            got: got.to_string(),
        });
        self.case(what, mismatch)
    }

    /// Expects a shape; `got` is a tensor, or its dimensions.
    ///
    /// ```
    /// use course::candle_core::{DType, Device, Tensor};
    /// use course::exercise::Exercise;
    ///
    /// let a = Tensor::zeros((8, 768), DType::F32, &Device::Cpu)?;
    /// assert!(Exercise::new("shape").expect_shape("A", &a, &[8, 768]).check().passed());
    /// assert!(!Exercise::new("shape").expect_shape("A", &[768, 8], &[8, 768]).check().passed());
    /// # Ok::<(), course::Error>(())
    /// ```
    pub fn expect_shape(
        self,
        what: impl Into<String>,
        got: &(impl HasShape + ?Sized),
        want: &[usize],
    ) -> Self {
        let got = got.shape_of();
        let mismatch = (got != want).then(|| Mismatch {
            expected: format!("shape {}", shown(&want)),
            got: format!("shape {}", shown(&got)),
        });
        self.case(what, mismatch)
    }

    /// Expects `holds` to be true; let `what` be the statement.
    ///
    /// ```
    /// use course::exercise::Exercise;
    ///
    /// let losses = [2.0, 1.0, 0.5];
    /// let exercise = Exercise::new("training")
    ///     .expect_true("the loss falls in every step", losses.is_sorted_by(|a, b| a > b));
    /// assert!(exercise.check().passed());
    /// ```
    pub fn expect_true(self, what: impl Into<String>, holds: bool) -> Self {
        let mismatch = (!holds).then(|| Mismatch {
            expected: "this to be true".to_string(),
            got: "false".to_string(),
        });
        self.case(what, mismatch)
    }

    /// Closes the exercise: prints on stdout how it stands, and records it when the environment
    /// variable `COURSE_METRICS` names a file, as `{"exercise":"name","passed":true}`.
    ///
    /// It never panics and never writes to stderr: an exercise that is not solved yet is no error.
    /// An exercise without a case does not pass, for its check could not fail.
    ///
    /// ```
    /// use course::exercise::Exercise;
    ///
    /// assert!(Exercise::new("one").expect("one", 1, 1).check().passed());
    /// assert!(!Exercise::new("none").check().passed());
    /// ```
    pub fn check(self) -> Outcome {
        let mut outcome = self.outcome();
        if let Err(error) = metrics::record_exercise(&self.name, outcome.passed) {
            outcome.text += &format!("\n  (This could not be recorded: {error})");
        }
        // A closed stdout is no reason to panic, so no `println!`.
        let _ = writeln!(std::io::stdout(), "{outcome}");
        outcome
    }

    fn case(mut self, what: impl Into<String>, mismatch: Option<Mismatch>) -> Self {
        self.cases.push(Case {
            what: what.into(),
            mismatch,
        });
        self
    }

    fn outcome(&self) -> Outcome {
        let name = &self.name;
        let not_passed = |text: String| Outcome {
            passed: false,
            text,
        };
        if !metrics::is_name(name) {
            return not_passed(format!(
                "○ Exercise {name:?}: its author must name it with a-z, 0-9 and _ only."
            ));
        }
        if self.cases.is_empty() {
            return not_passed(format!(
                "○ Exercise {name}: its check has no case, so nothing was checked."
            ));
        }
        let first = self
            .cases
            .iter()
            .find_map(|case| Some((&case.what, case.mismatch.as_ref()?)));
        let Some((what, mismatch)) = first else {
            let cases = match self.cases.len() {
                1 => "the case is".to_string(),
                n => format!("all {n} cases"),
            };
            return Outcome {
                passed: true,
                text: format!("✓ Exercise {name}: {cases} right."),
            };
        };
        let right = self.cases.iter().filter(|c| c.mismatch.is_none()).count();
        let mut text = format!(
            "○ Not yet: {name} ({right} of {} right). First to look at: {what}\n  \
             expected {}\n  got      {}",
            self.cases.len(),
            mismatch.expected,
            mismatch.got,
        );
        if let Some(hint) = &self.hint {
            text += &format!("\n  Hint: {hint}");
        }
        not_passed(text)
    }
}

/// How an exercise stands, from [`Exercise::check`], which has already printed it.
///
/// ```
/// use course::exercise::Exercise;
///
/// let outcome = Exercise::new("two").expect("1 + 1", 2, 2).check();
/// assert!(outcome.passed());
/// assert_eq!(outcome.to_string(), "✓ Exercise two: the case is right.");
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    passed: bool,
    text: String,
}

impl Outcome {
    /// Whether every case holds.
    ///
    /// ```
    /// use course::exercise::Exercise;
    ///
    /// assert!(!Exercise::new("two").expect("1 + 1", 3, 2).check().passed());
    /// ```
    #[must_use]
    pub fn passed(&self) -> bool {
        self.passed
    }

    /// What a notebook shows for an outcome at the end of a cell: nothing, as
    /// [`Exercise::check`] has printed it already.
    ///
    /// ```
    /// use course::exercise::Exercise;
    ///
    /// let outcome = Exercise::new("two").expect("1 + 1", 2, 2).check();
    /// assert_eq!(outcome.evcxr_display(), ());
    /// ```
    pub fn evcxr_display(&self) {}
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// What has a shape to compare: a tensor, a variable, or the dimensions themselves.
///
/// ```
/// use course::exercise::HasShape;
///
/// assert_eq!([2, 3].shape_of(), [2, 3]);
/// ```
pub trait HasShape {
    /// The dimensions.
    fn shape_of(&self) -> Vec<usize>;
}

impl HasShape for Tensor {
    fn shape_of(&self) -> Vec<usize> {
        self.dims().to_vec()
    }
}

impl HasShape for Var {
    fn shape_of(&self) -> Vec<usize> {
        self.dims().to_vec()
    }
}

impl HasShape for Shape {
    fn shape_of(&self) -> Vec<usize> {
        self.dims().to_vec()
    }
}

impl HasShape for [usize] {
    fn shape_of(&self) -> Vec<usize> {
        self.to_vec()
    }
}

impl<const N: usize> HasShape for [usize; N] {
    fn shape_of(&self) -> Vec<usize> {
        self.to_vec()
    }
}

impl HasShape for Vec<usize> {
    fn shape_of(&self) -> Vec<usize> {
        self.clone()
    }
}

impl<T: HasShape + ?Sized> HasShape for &T {
    fn shape_of(&self) -> Vec<usize> {
        (**self).shape_of()
    }
}

/// A value on one line, cut where it grows long.
fn shown(value: &impl Debug) -> String {
    let text = format!("{value:?}");
    let mut line: String = text.chars().take(LONGEST).collect();
    if line.len() < text.len() {
        line.push('…');
    }
    line.replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};

    #[test]
    fn all_right() {
        let outcome = Exercise::new("break_even_rank")
            .hint("not shown")
            .expect("in = 768, out = 512", 307, 307)
            .expect_close("close", 1.0 + 1e-7, 1.0, 1e-6)
            .expect_true("true", true)
            .outcome();
        assert!(outcome.passed());
        assert_eq!(
            outcome.to_string(),
            "✓ Exercise break_even_rank: all 3 cases right."
        );
    }

    #[test]
    fn the_first_failing_case_is_shown_with_the_hint() {
        let outcome = Exercise::new("break_even_rank")
            .hint("Solve r · (in + out) = in · out for r.")
            .expect("in = 3, out = 3", 1, 1)
            .expect("in = 768, out = 512", 0, 307)
            .expect("in = 8, out = 8", 0, 4)
            .outcome();
        assert!(!outcome.passed());
        assert_eq!(
            outcome.to_string(),
            "○ Not yet: break_even_rank (1 of 3 right). First to look at: in = 768, out = 512\n  \
             expected 307\n  got      0\n  Hint: Solve r · (in + out) = in · out for r."
        );
    }

    #[test]
    fn without_a_hint_no_empty_hint() {
        let outcome = Exercise::new("a").expect("b", 1, 2).outcome();
        assert!(!outcome.to_string().contains("Hint"));
    }

    #[test]
    fn close_is_relative_and_finite() {
        let passes = |got: f64, want: f64, tolerance: f64| {
            let exercise = Exercise::new("close").expect_close("case", got, want, tolerance);
            exercise.outcome().passed()
        };
        for (got, want, tolerance, holds) in [
            (1000.9, 1000.0, 1e-3, true),
            (1001.1, 1000.0, 1e-3, false),
            (998.9, 1000.0, 1e-3, false),
            (-1.0, 1.0, 1e-3, false),
            (-1.0005, -1.0, 1e-3, true),
            (1e-9, 2e-9, 1e-3, false),
            (0.0005, 0.0, 1e-3, true),
            (-0.002, 0.0, 1e-3, false),
            (0.0, 1e-9, 0.5, false),
            (f64::NAN, 1.0, 1e-3, false),
            (1.0, f64::NAN, 1e-3, false),
            (f64::INFINITY, f64::INFINITY, 1e-3, false),
            (1.0, 1.0, f64::NAN, false),
            (1.0, 1.0, 0.0, true),
        ] {
            assert_eq!(passes(got, want, tolerance), holds, "{got} {want}");
        }
        let outcome = Exercise::new("close")
            .expect_close("case", 1.5f32, 1.0f32, 1e-3)
            .outcome();
        let text = outcome.to_string();
        assert!(text.contains("expected 1 (within 1e-3 of it)"), "{text}");
    }

    #[test]
    fn shapes() {
        let x = Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap();
        let var = Var::zeros((2, 3), DType::F32, &Device::Cpu).unwrap();
        let scalar = Tensor::zeros((), DType::F32, &Device::Cpu).unwrap();
        let outcome = Exercise::new("shapes")
            .expect_shape("tensor", &x, &[2, 3])
            .expect_shape("variable", &var, &[2, 3])
            .expect_shape("shape", x.shape(), &[2, 3])
            .expect_shape("dims", x.dims(), &[2, 3])
            .expect_shape("vector", &vec![2, 3], &[2, 3])
            .expect_shape("array", &[2, 3], &[2, 3])
            .expect_shape("scalar", &scalar, &[])
            .outcome();
        assert!(outcome.passed(), "{outcome}");
        for wrong in [&[3, 2][..], &[2], &[2, 3, 1], &[]] {
            let outcome = Exercise::new("shapes")
                .expect_shape("x", &x, wrong)
                .outcome();
            let text = outcome.to_string();
            assert!(!outcome.passed() && text.contains(&format!("shape {wrong:?}")));
            assert!(text.contains("got      shape [2, 3]"), "{text}");
        }
    }

    #[test]
    fn false_is_not_true() {
        let outcome = Exercise::new("a")
            .expect_true("the loss falls", false)
            .outcome();
        let text = outcome.to_string();
        assert!(!outcome.passed() && text.contains("the loss falls"));
    }

    #[test]
    fn a_check_that_cannot_fail_does_not_pass() {
        let outcome = Exercise::new("empty").hint("h").outcome();
        assert!(!outcome.passed() && outcome.to_string().contains("no case"));
    }

    #[test]
    fn names_are_checked() {
        for name in ["", "Break Even", "a-b"] {
            let outcome = Exercise::new(name).expect_true("so", true).outcome();
            assert!(!outcome.passed() && outcome.to_string().contains("a-z"));
        }
    }

    #[test]
    fn long_values_are_cut() {
        let long = vec!['é'; 1000];
        let outcome = Exercise::new("long").expect("v", long, vec![]).outcome();
        let longest = outcome.to_string().lines().map(|l| l.chars().count()).max();
        assert!(longest < Some(220), "{longest:?}");
    }
}
