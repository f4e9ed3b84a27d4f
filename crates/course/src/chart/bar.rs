//! Bars, single or in groups.

use super::bar_draw;
use super::check::MOST_VALUES;
use super::common::Common;
use super::figure::Figure;
use super::value::{Value, set_whiskers};
use crate::error::Result;

/// One bar: its category and its value.
#[derive(Debug, Clone)]
pub(super) struct Bar {
    pub category: String,
    pub value: Value,
}

/// Bars of one colour; single bars are a series without a name.
#[derive(Debug, Clone)]
pub(super) struct Series {
    pub name: Option<String>,
    pub bars: Vec<Bar>,
}

/// A chart of bars: either single ones from [`bar`](Self::bar) or groups from
/// [`group`](Self::group).
///
/// ```
/// use course::chart::BarChart;
///
/// let figure = BarChart::new("Accuracy after fine-tuning", "task", "accuracy")
///     .group("full", [("SST-2", 0.94), ("RTE", 0.72)])
///     .group("LoRA, r = 8", [("SST-2", 0.95), ("RTE", 0.74)])
///     .values()
///     .draw()?;
/// assert!(figure.describe().contains("RTE 0.74"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct BarChart {
    pub(super) common: Common,
    pub(super) series: Vec<Series>,
    pub(super) log_y: bool,
    pub(super) numbers: bool,
    /// What a builder method could not do; `draw` reports it.
    pub(super) problem: Option<String>,
}

impl BarChart {
    /// An empty chart; the labels say what the bars are and what the y axis counts.
    ///
    /// ```
    /// let chart = course::chart::BarChart::new("Size", "layer", "parameters");
    /// assert!(chart.draw().is_err(), "there is no bar yet");
    /// ```
    pub fn new(
        title: impl Into<String>,
        x_label: impl Into<String>,
        y_label: impl Into<String>,
    ) -> Self {
        Self {
            common: Common::new(title.into(), x_label.into(), y_label.into()),
            series: Vec::new(),
            log_y: false,
            numbers: false,
            problem: None,
        }
    }

    /// Adds a single bar of height `value`, a number or a [`Spread`](crate::metrics::Spread),
    /// whose range becomes its whisker.
    ///
    /// ```
    /// # use course::chart::BarChart;
    /// let chart = BarChart::new("t", "x", "y").bar("full", 1024).bar("LoRA", 64.5);
    /// assert!(chart.draw()?.describe().contains("LoRA 64.5"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn bar(mut self, name: impl Into<String>, value: impl Into<Value>) -> Self {
        if self.series.last().is_none_or(|s| s.name.is_some()) {
            self.series.push(Series {
                name: None,
                bars: Vec::new(),
            });
        }
        if let Some(series) = self.series.last_mut() {
            series.bars.push(Bar {
                category: name.into(),
                value: value.into(),
            });
        }
        self
    }

    /// Adds a series with one bar for each `(category, value)`; bars of the same category
    /// stand together. A value is a number or a [`Spread`](crate::metrics::Spread).
    ///
    /// ```
    /// # use course::chart::BarChart;
    /// let chart = BarChart::new("t", "x", "y")
    ///     .group("full", [("q", 10), ("v", 12)])
    ///     .group("LoRA", [("q", 1), ("v", 2)]);
    /// assert!(chart.draw()?.describe().contains("2 series"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn group<S: Into<String>, V: Into<Value>>(
        mut self,
        series_name: impl Into<String>,
        bars: impl IntoIterator<Item = (S, V)>,
    ) -> Self {
        let bars = bars.into_iter().map(|(category, value)| Bar {
            category: category.into(),
            value: value.into(),
        });
        self.series.push(Series {
            name: Some(series_name.into()),
            bars: bars.take(MOST_VALUES + 1).collect(),
        });
        self
    }

    /// Gives the last bar a whisker from `low` to `high`, both on the y axis.
    ///
    /// ```
    /// # use course::chart::BarChart;
    /// let chart = BarChart::new("t", "x", "y").bar("LoRA", 0.9).error(0.85, 0.93);
    /// assert!(chart.draw()?.describe().contains("0.9 (0.85 to 0.93)"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn error(mut self, low: impl Into<f64>, high: impl Into<f64>) -> Self {
        let bar = self.series.last_mut().and_then(|s| s.bars.last_mut());
        match bar {
            Some(bar) => bar.value.whisker = Some((low.into(), high.into())),
            None => self.problem = Some(".error(low, high) belongs after a .bar()".into()),
        }
        self
    }

    /// Gives the bars of the last group their whiskers, one `(low, high)` for each.
    ///
    /// ```
    /// # use course::chart::BarChart;
    /// let chart = BarChart::new("t", "x", "y")
    ///     .group("LoRA", [("q", 1.0), ("v", 2.0)])
    ///     .errors([(0.5, 1.5), (1.8, 2.1)]);
    /// assert!(chart.draw()?.describe().contains("q 1 (0.5 to 1.5)"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn errors<L: Into<f64>, H: Into<f64>>(
        mut self,
        whiskers: impl IntoIterator<Item = (L, H)>,
    ) -> Self {
        let Some(series) = self.series.last_mut() else {
            self.problem = Some(".errors([...]) belongs after a .group()".into());
            return self;
        };
        let values = series.bars.iter_mut().map(|bar| &mut bar.value);
        if let Err(problem) = set_whiskers(values, whiskers, ("group", "bars")) {
            self.problem = Some(problem);
        }
        self
    }

    /// Makes the y axis logarithmic; bars then start at the axis, not at 0.
    ///
    /// ```
    /// # use course::chart::BarChart;
    /// let chart = BarChart::new("t", "x", "y").bar("a", 3).bar("b", 5000).log_y();
    /// assert!(chart.draw()?.describe().contains("logarithmic"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn log_y(mut self) -> Self {
        self.log_y = true;
        self
    }

    /// Writes each value at the end of its bar, if the bars are wide enough.
    ///
    /// ```
    /// # use course::chart::BarChart;
    /// let figure = BarChart::new("t", "x", "y").bar("a", 4321).values().draw()?;
    /// assert!(figure.svg().contains(">4,321<"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn values(mut self) -> Self {
        self.numbers = true;
        self
    }

    /// Adds a dashed horizontal line at `y`, such as a baseline.
    ///
    /// ```
    /// # use course::chart::BarChart;
    /// let chart = BarChart::new("t", "x", "y").bar("a", 0.7).reference("chance", 0.5);
    /// assert!(chart.draw()?.describe().contains("\"chance\": 0.5"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn reference(mut self, name: impl Into<String>, y: impl Into<f64>) -> Self {
        self.common.references.push((name.into(), y.into()));
        self
    }

    /// Sets the ends of the y axis; unless it is logarithmic they must enclose 0, where bars
    /// start.
    ///
    /// ```
    /// # use course::chart::BarChart;
    /// let chart = BarChart::new("t", "x", "y").bar("a", 0.7).bar("b", 0.8);
    /// assert!(chart.clone().y_range(0, 1).draw().is_ok());
    /// assert!(chart.y_range(0.5, 1).draw().is_err(), "such bars would mislead");
    /// ```
    pub fn y_range(mut self, low: impl Into<f64>, high: impl Into<f64>) -> Self {
        self.common.y_range = Some((low.into(), high.into()));
        self
    }

    /// Adds a sentence to the description, for those who cannot see the figure.
    ///
    /// ```
    /// # use course::chart::BarChart;
    /// let chart = BarChart::new("t", "x", "y").bar("a", 1).words("One bar.");
    /// assert!(chart.draw()?.describe().ends_with("One bar."));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn words(mut self, sentence: impl Into<String>) -> Self {
        self.common.words.push(sentence.into());
        self
    }

    /// Sets width and height in pixels, instead of 800 × 460.
    ///
    /// ```
    /// # use course::chart::BarChart;
    /// let chart = BarChart::new("t", "x", "y").bar("a", 1).size(500, 300);
    /// assert_eq!(chart.draw()?.size(), (500, 300));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn size(mut self, width: u32, height: u32) -> Self {
        self.common.size = (width, height);
        self
    }

    /// Draws the chart.
    ///
    /// # Errors
    ///
    /// [`Error::Chart`](crate::error::Error::Chart) names the bar and what to do: no bars,
    /// single and grouped bars in one chart, two of one name, a value that is not finite or
    /// (on a log axis) not above 0, nothing but zeros, a whisker that misses its bar, an empty
    /// text, a useless y range or size, more bars than fit.
    ///
    /// ```
    /// # use course::chart::BarChart;
    /// let chart = BarChart::new("t", "x", "y").bar("loss", f64::NAN);
    /// assert!(chart.draw().unwrap_err().to_string().contains("bar \"loss\""));
    /// ```
    pub fn draw(&self) -> Result<Figure> {
        let data = self.validate()?;
        let (scene, fonts) = bar_draw::scene(self, data)?;
        Figure::paint(&self.common.title, &scene, fonts, self.describe(data))
    }

    pub(super) fn bars(&self) -> impl Iterator<Item = &Bar> + Clone {
        self.series.iter().flat_map(|s| &s.bars)
    }
}
