//! What a bar chart refuses, and what it says in words.

use super::bar::{Bar, BarChart, Series};
use super::bar_draw;
use super::check::{Axis, Extent};
use super::words::{MOST_READ, Words, count};
use crate::error::Result;

impl BarChart {
    /// Checks everything; returns the extent of values and whiskers.
    pub(super) fn validate(&self) -> Result<Extent> {
        let check = self.common.check();
        self.common.check_page(true)?;
        if let Some(problem) = &self.problem {
            return Err(check.fail(problem));
        }
        check.need(!self.series.is_empty(), || {
            "has no bars: add at least one .bar(name, value)".into()
        })?;
        let named = self.series.iter().filter(|s| s.name.is_some()).count();
        check.need(named == 0 || named == self.series.len(), || {
            "mixes .bar() and .group(): use one of them".into()
        })?;
        check.names(
            "series",
            self.series.iter().filter_map(|s| s.name.as_deref()),
        )?;
        for series in &self.series {
            self.validate_series(series)?;
        }
        self.common.check_y(self.log_y)?;
        let data = self
            .bars()
            .fold(Extent::EMPTY, |e, bar| e.and(bar.value.extent()));
        self.validate_axis(data)?;
        Ok(data)
    }

    fn validate_series(&self, series: &Series) -> Result<()> {
        let check = self.common.check();
        let name = series.name.as_deref().unwrap_or("bars");
        check.need(!series.bars.is_empty(), || {
            format!("series \"{name}\" is empty: give it at least one (category, value)")
        })?;
        check.amount(|| format!("series \"{name}\""), series.bars.len())?;
        check.names("bar", series.bars.iter().map(|b| b.category.as_str()))?;
        for (index, bar) in series.bars.iter().enumerate() {
            self.validate_bar(series, bar, index)?;
        }
        Ok(())
    }

    fn validate_bar(&self, series: &Series, bar: &Bar, index: usize) -> Result<()> {
        let check = self.common.check();
        let log = self.log_y.then_some(Axis::Y);
        let whose = || {
            let group = match &series.name {
                Some(name) => format!(" of series \"{name}\""),
                None => String::new(),
            };
            format!(
                "bar \"{}\"{group} (number {index}, counted from 0)",
                bar.category
            )
        };
        bar.value.check(check, whose, log)
    }

    fn validate_axis(&self, data: Extent) -> Result<()> {
        let check = self.common.check();
        if self.log_y {
            return Ok(());
        }
        if let Some((low, high)) = self.common.y_range {
            return check.need(low <= 0.0 && 0.0 <= high, || {
                format!(
                    "y_range({low:?}, {high:?}) leaves out 0, where bars start: \
                     include 0, or draw points with LineChart"
                )
            });
        }
        let flat = data.low == 0.0 && data.high == 0.0;
        check.need(!flat, || {
            let name = self.bars().next().map_or("", |b| b.category.as_str());
            format!(
                "every bar, from \"{name}\" on, is 0, which gives no axis: \
                 set one with .y_range(low, high)"
            )
        })
    }

    pub(super) fn describe(&self, data: Extent) -> String {
        let mut words = Words::new("Bar chart", &self.common);
        let categories = bar_draw::categories(self).len();
        let what = if categories == 1 {
            "category"
        } else {
            "categories"
        };
        let mut horizontal = format!(
            "Horizontal axis: {}, {categories} {what}",
            self.common.x_label.trim()
        );
        if self.series.iter().any(|s| s.name.is_some()) {
            horizontal += &format!(", {} series", self.series.len());
        }
        words.say(&horizontal);
        let shown = if self.log_y { data } else { data.with(0.0) };
        words.y_axis(&self.common, shown, self.log_y);
        for series in &self.series {
            words.say(&describe_series(series));
        }
        words.finish(&self.common)
    }
}

fn describe_series(series: &Series) -> String {
    let read = |bar: &Bar| format!("{} {}", bar.category, bar.value.told());
    let start = match &series.name {
        Some(name) => format!("Series \"{name}\""),
        None => "Bars".into(),
    };
    if series.bars.len() <= MOST_READ {
        let bars: Vec<String> = series.bars.iter().map(read).collect();
        return format!("{start}: {}", bars.join("; "));
    }
    let by_value = |a: &&Bar, b: &&Bar| a.value.number.total_cmp(&b.value.number);
    let ends = [
        ("first", series.bars.first()),
        ("last", series.bars.last()),
        ("lowest", series.bars.iter().min_by(by_value)),
        ("highest", series.bars.iter().max_by(by_value)),
    ];
    let ends: Vec<String> = ends
        .iter()
        .filter_map(|(what, bar)| bar.map(|b| format!("{what}, {}", read(b))))
        .collect();
    format!(
        "{start}: {}; {}",
        count(series.bars.len(), "bar"),
        ends.join("; ")
    )
}
