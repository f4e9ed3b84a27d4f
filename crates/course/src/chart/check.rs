//! Refusing what cannot be drawn, in words that say what to do.
//!
//! Everything is checked before anything is laid out: a degenerate range makes plotters
//! search for ticks for ever (plotters#358), and it must never see one.

use crate::error::{Error, Result};

/// Values beyond this, or logarithms of values below its inverse, leave no digits to draw with.
const LARGEST: f64 = 1e100;
/// The most values one chart takes; an endless iterator ends here.
pub(super) const MOST_VALUES: usize = 2_000_000;

/// Rows of values, up to one value more than a chart takes: rows and values may be endless.
pub(super) fn gather<V, R>(rows: impl IntoIterator<Item = R>) -> Vec<Vec<V>>
where
    R: IntoIterator,
    R::Item: Into<V>,
{
    let mut left = MOST_VALUES + 1;
    let mut gathered = Vec::new();
    for row in rows.into_iter().take(left) {
        let row: Vec<V> = row.into_iter().take(left).map(Into::into).collect();
        left -= row.len();
        gathered.push(row);
        if left == 0 {
            break;
        }
    }
    gathered
}

/// Makes the errors of one chart.
#[derive(Debug, Clone, Copy)]
pub(super) struct Check<'a> {
    pub chart: &'a str,
}

/// Smallest and largest of some values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Extent {
    pub low: f64,
    pub high: f64,
}

impl Extent {
    pub const EMPTY: Self = Self {
        low: f64::INFINITY,
        high: f64::NEG_INFINITY,
    };

    pub fn of(values: impl IntoIterator<Item = f64>) -> Self {
        values.into_iter().fold(Self::EMPTY, Self::with)
    }

    pub fn with(self, value: f64) -> Self {
        Self {
            low: self.low.min(value),
            high: self.high.max(value),
        }
    }

    pub fn and(self, other: Self) -> Self {
        self.with(other.low).with(other.high)
    }

    pub fn flat(&self) -> bool {
        self.low >= self.high
    }
}

impl Check<'_> {
    pub fn fail(&self, problem: impl Into<String>) -> Error {
        let chart = if self.chart.trim().is_empty() {
            "untitled".into()
        } else {
            super::text::one_line(self.chart)
        };
        Error::Chart {
            chart,
            problem: problem.into(),
        }
    }

    pub fn need(&self, holds: bool, problem: impl FnOnce() -> String) -> Result<()> {
        if holds {
            Ok(())
        } else {
            Err(self.fail(problem()))
        }
    }

    /// A text that must not be empty.
    pub fn text(&self, what: &str, text: &str) -> Result<()> {
        self.need(!text.trim().is_empty(), || {
            format!("{what} is empty: write what the reader should see there")
        })
    }

    /// Names that must be there and differ.
    pub fn names<'n>(&self, what: &str, names: impl IntoIterator<Item = &'n str>) -> Result<()> {
        let mut seen = std::collections::HashSet::new();
        for (index, name) in names.into_iter().enumerate() {
            self.text(
                &format!("the name of {what} {index} (counted from 0)"),
                name,
            )?;
            self.need(seen.insert(name), || {
                format!("two are called \"{name}\" among the names of each {what}: rename one")
            })?;
        }
        Ok(())
    }

    /// A value that is finite and neither too large to draw nor, on a log axis, 0 or less.
    pub fn value(&self, whose: impl Fn() -> String, value: f64, log: Option<Axis>) -> Result<()> {
        self.need(value.is_finite(), || {
            format!(
                "{} is {value:?}, which has no place on an axis: leave it out, or find out \
                 where it comes from (a division by zero, an exploding loss)",
                whose()
            )
        })?;
        self.need(value.abs() <= LARGEST, || {
            format!(
                "{} is {value:?}, beyond ±1e100: divide the values by a constant",
                whose()
            )
        })?;
        let Some(axis) = log else { return Ok(()) };
        self.need(value > 0.0, || {
            format!(
                "{} is {value:?}, and a logarithmic axis has room for values above 0 only: \
                 leave it out, or drop {}",
                whose(),
                axis.method()
            )
        })?;
        self.need(value >= 1.0 / LARGEST, || {
            format!(
                "{} is {value:?}, below 1e-100: treat it as 0 and leave it out, or drop {}",
                whose(),
                axis.method()
            )
        })
    }

    /// A range wide enough to have distinct ticks.
    pub fn range(&self, whose: &str, Extent { low, high }: Extent) -> Result<()> {
        let scale = low.abs().max(high.abs());
        let wide = high - low;
        self.need(wide > scale * 1e-9 && wide >= 1.0 / LARGEST, || {
            format!(
                "{whose} run from {low:?} to {high:?}, too close together for an axis: \
                 subtract what they have in common, or multiply them by a constant"
            )
        })
    }

    /// No more values than a chart can take.
    pub fn amount(&self, whose: impl Fn() -> String, amount: usize) -> Result<()> {
        self.need(amount <= MOST_VALUES, || {
            format!(
                "{} has more than {MOST_VALUES} values: keep every tenth, or fewer",
                whose()
            )
        })
    }
}

/// Which axis is logarithmic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Axis {
    X,
    Y,
}

impl Axis {
    fn method(self) -> &'static str {
        match self {
            Self::X => ".log_x()",
            Self::Y => ".log_y()",
        }
    }
}
