//! Differences, and the table of them.

use candle_core::{DType, Tensor};

/// What a row found.
pub struct Tally {
    pub case: String,
    pub checks: usize,
    pub output: Worst,
    pub gradients: Worst,
    pub merged: Worst,
    pub failures: Vec<String>,
}

/// The column of the table that a comparison belongs to.
#[derive(Clone, Copy)]
pub enum Column {
    Output,
    Gradients,
    Merged,
}

/// The largest error, and the bound it had to keep.
#[derive(Clone, Copy, Default)]
pub struct Worst(Option<(f64, f64)>);

/// How large a difference may be.
#[derive(Clone, Copy)]
pub enum Bound {
    /// As a share of PEFT's largest value.
    Relative(f64),
    Absolute(f64),
}

pub const OUTPUT: Bound = Bound::Relative(1e-5);
pub const GRADIENTS: Bound = Bound::Relative(1e-4);
pub const MERGED: Bound = Bound::Relative(1e-5);

impl Worst {
    fn note(&mut self, error: f64, bound: f64) {
        if self
            .0
            .is_none_or(|(worst, _)| error >= worst || error.is_nan())
        {
            self.0 = Some((error, bound));
        }
    }

    /// The error, and its bound where it is not the usual one.
    pub fn text(&self) -> String {
        let Some((error, bound)) = self.0 else {
            return "-".to_string();
        };
        let error = match error {
            0.0 => "0".to_string(),
            error => format!("{error:.1e}"),
        };
        if bound <= 1e-4 {
            error
        } else {
            format!("{error} (<= {bound:.1e})")
        }
    }
}

impl Tally {
    pub fn new(case: &str) -> Self {
        Self {
            case: case.to_string(),
            checks: 0,
            output: Worst::default(),
            gradients: Worst::default(),
            merged: Worst::default(),
            failures: Vec::new(),
        }
    }

    pub fn check(&mut self, what: &str, good: bool) {
        self.checks += 1;
        if !good {
            self.failures.push(format!("{}: {what}", self.case));
        }
    }

    pub fn equal<T: PartialEq + std::fmt::Debug>(&mut self, what: &str, ours: T, theirs: T) {
        let good = ours == theirs;
        self.check(&format!("{what}: {ours:?} here, {theirs:?} there"), good);
    }

    /// The same type, shape and bits (but for the sign of zero).
    pub fn same(&mut self, what: &str, ours: &Tensor, theirs: &Tensor) {
        let alike = ours.dtype() == theirs.dtype() && ours.dims() == theirs.dims();
        self.check(
            &format!("{what}: not bit for bit"),
            alike && numbers(ours) == numbers(theirs),
        );
    }

    pub fn close(
        &mut self,
        column: Column,
        what: &str,
        ours: &Tensor,
        theirs: &Tensor,
        bound: Bound,
    ) {
        let (dims, wanted) = (ours.dims(), theirs.dims());
        if dims != wanted {
            return self.check(&format!("{what}: {dims:?} here, {wanted:?} there"), false);
        }
        let (difference, size) = (gap(ours, theirs), largest(theirs));
        let bound = match bound {
            Bound::Relative(bound) => bound,
            Bound::Absolute(bound) => bound / size,
        };
        let error = if difference == 0.0 {
            0.0
        } else {
            difference / size
        };
        match column {
            Column::Output => self.output.note(error, bound),
            Column::Gradients => self.gradients.note(error, bound),
            Column::Merged => self.merged.note(error, bound),
        }
        // A bound that is not a number is not kept.
        self.check(
            &format!("{what}: off by {error:.2e}, at most {bound:.1e}"),
            error <= bound,
        );
    }
}

pub fn numbers(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64)
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1()
        .unwrap()
}

pub fn largest(t: &Tensor) -> f64 {
    numbers(t).into_iter().map(f64::abs).fold(0.0, worse)
}

/// The largest difference; NaN where there is one.
pub fn gap(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    numbers(a)
        .into_iter()
        .zip(numbers(b))
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, worse)
}

pub fn worse(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() {
        f64::NAN
    } else {
        a.max(b)
    }
}

/// A table in Markdown whose columns stand below each other.
#[derive(Default)]
pub struct Table(Vec<Vec<String>>);

impl Table {
    pub fn row(&mut self, cells: &[String]) {
        self.0.push(cells.to_vec());
    }

    pub fn text(&self, head: &[&str]) -> String {
        let head: Vec<String> = head.iter().map(ToString::to_string).collect();
        let width = |i: usize| {
            let cells = self.0.iter().map(|row| &row[i]).chain([&head[i]]);
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let line = |row: &[String]| {
            let cells = row
                .iter()
                .enumerate()
                .map(|(i, c)| format!("{c:<w$}", w = width(i)));
            format!("| {} |", cells.collect::<Vec<_>>().join(" | "))
        };
        let rule: Vec<String> = (0..head.len()).map(|i| "-".repeat(width(i))).collect();
        let rows = self.0.iter().map(|row| line(row));
        [line(&head), line(&rule)]
            .into_iter()
            .chain(rows)
            .collect::<Vec<_>>()
            .join("\n")
    }
}
