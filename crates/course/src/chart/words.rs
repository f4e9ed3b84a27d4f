//! A figure in words.

use super::check::Extent;
use super::common::Common;
use super::number::plain;
use super::text::one_line;

/// The most values of a series that are read out one by one.
pub(super) const MOST_READ: usize = 12;

/// Sentences, one a line.
pub(super) struct Words(Vec<String>);

impl Words {
    /// Starts with the kind of chart and its title.
    pub fn new(kind: &str, common: &Common) -> Self {
        Self(vec![sentence(&format!(
            "{kind}: {}",
            one_line(&common.title)
        ))])
    }

    pub fn say(&mut self, text: &str) {
        self.0.push(sentence(&one_line(text)));
    }

    /// One axis with the range of what it shows.
    pub fn axis(&mut self, which: &str, label: &str, Extent { low, high }: Extent, log: bool) {
        let kind = if log { ", logarithmic scale" } else { "" };
        self.say(&format!(
            "{which} axis: {}, from {} to {}{kind}",
            one_line(label),
            plain(low),
            plain(high)
        ));
    }

    /// The y axis, which the learner may have set.
    pub fn y_axis(&mut self, common: &Common, data: Extent, log: bool) {
        let shown = match common.y_range {
            Some((low, high)) => Extent { low, high },
            None => common
                .references
                .iter()
                .fold(data, |extent, (_, y)| extent.with(*y)),
        };
        self.axis("Vertical", &common.y_label, shown, log);
        if common.y_range.is_some() && (data.low < shown.low || data.high > shown.high) {
            self.say(&format!(
                "Some values lie outside the vertical axis; they run from {} to {}",
                plain(data.low),
                plain(data.high)
            ));
        }
    }

    /// The x axis of numbers, with its reference lines.
    pub fn x_axis(&mut self, common: &Common, data: Extent, log: bool) {
        let shown = common.upright.iter().fold(data, |e, (_, x)| e.with(*x));
        self.axis("Horizontal", &common.x_label, shown, log);
    }

    /// The reference lines and whatever the learner added.
    pub fn finish(mut self, common: &Common) -> String {
        for (name, value) in &common.references {
            self.say(&format!("Reference line \"{name}\": {}", plain(*value)));
        }
        for (name, value) in &common.upright {
            self.say(&format!(
                "Vertical reference line \"{name}\": at {} on the horizontal axis",
                plain(*value)
            ));
        }
        for words in &common.words {
            self.say(words);
        }
        self.0.retain(|line| !line.is_empty());
        self.0.join("\n")
    }
}

/// `text` with a full stop at its end, unless it has one.
fn sentence(text: &str) -> String {
    if text.is_empty() || text.ends_with(['.', '!', '?', '…']) {
        text.into()
    } else {
        format!("{text}.")
    }
}

/// "1 point", "2 points".
pub(super) fn count(number: usize, thing: &str) -> String {
    let s = if number == 1 { "" } else { "s" };
    format!("{} {thing}{s}", plain(number as f64))
}
