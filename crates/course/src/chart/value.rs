//! What is drawn at one place: a number, with or without a range.

use super::axis::Scale;
use super::check::{Axis, Check, Extent};
use super::number::plain;
use super::scene::Rect;
use crate::error::Result;
use crate::metrics::Spread;

/// What a chart draws at one place: a number, or the mean of a [`Spread`] with its range.
///
/// Anything that turns into `f64` without loss is such a number, and charts turn it into a
/// `Value` themselves. The range of a spread of two or more runs is drawn as a whisker; a single
/// run has none.
///
/// ```
/// use course::chart::BarChart;
/// use course::metrics::Spread;
///
/// let loss = Spread::of([3.95, 3.97, 3.96])?;
/// let chart = BarChart::new("Loss", "method", "loss").bar("frozen", 4.5).bar("LoRA", loss);
/// assert!(chart.draw()?.describe().contains("frozen 4.5; LoRA 3.96 (3.95 to 3.97)"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Value {
    pub(super) number: f64,
    pub(super) whisker: Option<Whisker>,
}

/// The ends of a whisker, from low to high.
pub(super) type Whisker = (f64, f64);

impl<N: Into<f64>> From<N> for Value {
    fn from(number: N) -> Self {
        Self {
            number: number.into(),
            whisker: None,
        }
    }
}

impl From<Spread> for Value {
    fn from(spread: Spread) -> Self {
        Self {
            number: spread.mean,
            whisker: (spread.n > 1).then_some((spread.low, spread.high)),
        }
    }
}

impl From<&Spread> for Value {
    fn from(spread: &Spread) -> Self {
        Self::from(*spread)
    }
}

impl Value {
    /// The values on an axis that must show this one and its whisker.
    pub(super) fn extent(&self) -> Extent {
        let (low, high) = self.whisker.unwrap_or((self.number, self.number));
        Extent { low, high }.with(self.number)
    }

    /// As in the words of a figure: the number, and its range in brackets.
    pub(super) fn told(&self) -> String {
        match self.whisker {
            Some((low, high)) => {
                format!("{} ({} to {})", plain(self.number), plain(low), plain(high))
            }
            None => plain(self.number),
        }
    }

    /// The number has a place on the axis, and its whisker lies around it.
    pub(super) fn check(
        &self,
        check: Check<'_>,
        whose: impl Fn() -> String,
        log: Option<Axis>,
    ) -> Result<()> {
        check.value(&whose, self.number, log)?;
        let Some((low, high)) = self.whisker else {
            return Ok(());
        };
        check.value(|| format!("the low error of {}", whose()), low, log)?;
        check.value(|| format!("the high error of {}", whose()), high, log)?;
        check.need(low <= self.number && self.number <= high, || {
            format!(
                "the error of {} goes from {low:?} to {high:?}, not around its value {:?}: \
                 give both ends as values, not as distances",
                whose(),
                self.number
            )
        })
    }
}

/// Gives each of `values` its whisker, or says what is wrong with their number.
pub(super) fn set_whiskers<'v, L: Into<f64>, H: Into<f64>>(
    values: impl ExactSizeIterator<Item = &'v mut Value>,
    whiskers: impl IntoIterator<Item = (L, H)>,
    (series, things): (&str, &str),
) -> std::result::Result<(), String> {
    let amount = values.len();
    let whiskers: Vec<Whisker> = whiskers
        .into_iter()
        .take(amount + 1)
        .map(|(low, high)| (low.into(), high.into()))
        .collect();
    if whiskers.len() != amount {
        return Err(format!(
            ".errors([...]) has {} whiskers than its {series} has {things} ({amount}): \
             give one (low, high) for each",
            if whiskers.len() > amount {
                "more"
            } else {
                "fewer"
            },
        ));
    }
    for (value, whisker) in values.zip(whiskers) {
        value.whisker = Some(whisker);
    }
    Ok(())
}

/// The part of a whisker that is in sight, in pixels.
#[derive(Debug, Clone, Copy)]
pub(super) struct InSight {
    pub low: f64,
    pub high: f64,
    /// Whether its low and its high end are in sight.
    pub caps: [bool; 2],
}

/// The part of a whisker inside `area`, if any.
pub(super) fn in_sight((low, high): Whisker, area: Rect, y: &Scale) -> Option<InSight> {
    let height = |value: f64| area.bottom - y.place(value) * area.height();
    let shown = InSight {
        low: height(low).min(area.bottom),
        high: height(high).max(area.top),
        caps: [y.holds(low), y.holds(high)],
    };
    (shown.high <= shown.low).then_some(shown)
}
