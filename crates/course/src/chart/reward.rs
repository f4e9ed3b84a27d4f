//! Rewards over training: several seeds as one mean and one band.

use super::axis::Scale;
use super::check::{Extent, gather};
use super::common::Common;
use super::figure::Figure;
use super::legend::{Sample, entries};
use super::page::Page;
use super::plot::{Along, frame, references};
use super::reward_draw::{self, Runs};
use super::words::count;
use crate::error::Result;

/// A chart of what several seeds reach: the mean as a step line, and a band from the worst
/// seed to the best.
///
/// ```
/// use course::chart::RewardChart;
///
/// let figure = RewardChart::new("CartPole", "evaluation", "return")
///     .runs("LoRA, r = 4", vec![vec![20.0, 90.0, 200.0], vec![25.0, 130.0, 180.0]])
///     .reference("solved", 195.0)
///     .draw()?;
/// assert!(figure.describe().contains("2 seeds"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct RewardChart {
    pub(super) common: Common,
    pub(super) runs: Vec<Runs>,
    pub(super) every: f64,
}

impl RewardChart {
    /// An empty chart; the labels say what the axes count, with the unit.
    ///
    /// ```
    /// let chart = course::chart::RewardChart::new("CartPole", "episode", "return");
    /// assert!(chart.draw().is_err(), "there are no runs yet");
    /// ```
    pub fn new(
        title: impl Into<String>,
        x_label: impl Into<String>,
        y_label: impl Into<String>,
    ) -> Self {
        Self {
            common: Common::new(title.into(), x_label.into(), y_label.into()),
            runs: Vec::new(),
            every: 1.0,
        }
    }

    /// Adds runs of one kind: for each seed its values in order, equally many for each.
    ///
    /// ```
    /// # use course::chart::RewardChart;
    /// let seeds: Vec<Vec<f32>> = vec![vec![1.0, 3.0], vec![2.0, 5.0]];
    /// let figure = RewardChart::new("t", "episode", "return").runs("LoRA", seeds).draw()?;
    /// assert!(figure.describe().contains("mean last 4"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn runs<R>(mut self, name: impl Into<String>, seeds: impl IntoIterator<Item = R>) -> Self
    where
        R: IntoIterator,
        R::Item: Into<f64>,
    {
        self.runs.push(Runs {
            name: name.into(),
            seeds: gather(seeds),
        });
        self
    }

    /// Says how many x units lie between two values; the first value is at `units`.
    ///
    /// ```
    /// # use course::chart::RewardChart;
    /// let chart = RewardChart::new("t", "step", "return").runs("LoRA", [[1, 2, 3]]).every(500);
    /// assert!(chart.draw()?.describe().contains("from 500 to 1,500"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn every(mut self, units: impl Into<f64>) -> Self {
        self.every = units.into();
        self
    }

    /// Adds a dashed horizontal line at `y`, such as the return at which a task is solved.
    ///
    /// ```
    /// # use course::chart::RewardChart;
    /// let chart = RewardChart::new("t", "x", "y").runs("a", [[1, 2]]).reference("solved", 3);
    /// assert!(chart.draw()?.describe().contains("\"solved\": 3"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn reference(mut self, name: impl Into<String>, y: impl Into<f64>) -> Self {
        self.common.references.push((name.into(), y.into()));
        self
    }

    /// Sets the ends of the y axis; what lies outside is cut off.
    ///
    /// ```
    /// # use course::chart::RewardChart;
    /// let flat = RewardChart::new("t", "x", "y").runs("a", [[500, 500]]);
    /// assert!(flat.clone().draw().is_err());
    /// assert!(flat.y_range(0, 500).draw().is_ok());
    /// ```
    pub fn y_range(mut self, low: impl Into<f64>, high: impl Into<f64>) -> Self {
        self.common.y_range = Some((low.into(), high.into()));
        self
    }

    /// Adds a sentence to the description, for those who cannot see the figure.
    ///
    /// ```
    /// # use course::chart::RewardChart;
    /// let chart = RewardChart::new("t", "x", "y").runs("a", [[1, 2]]).words("It learns.");
    /// assert!(chart.draw()?.describe().ends_with("It learns."));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn words(mut self, sentence: impl Into<String>) -> Self {
        self.common.words.push(sentence.into());
        self
    }

    /// Sets width and height in pixels, instead of 800 × 460.
    ///
    /// ```
    /// # use course::chart::RewardChart;
    /// let chart = RewardChart::new("t", "x", "y").runs("a", [[1, 2]]).size(600, 400);
    /// assert_eq!(chart.draw()?.size(), (600, 400));
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
    /// [`Error::Chart`](crate::error::Error::Chart) names the runs and the seed and what to
    /// do: no runs, seeds, or values; seeds of different lengths; a single value; values that
    /// are not finite or all equal; an empty text; a useless y range or size.
    ///
    /// ```
    /// # use course::chart::RewardChart;
    /// let uneven = vec![vec![1.0, 2.0], vec![1.0]];
    /// let chart = RewardChart::new("t", "x", "y").runs("LoRA", uneven);
    /// assert!(chart.draw().unwrap_err().to_string().contains("runs \"LoRA\", seed 1"));
    /// ```
    pub fn draw(&self) -> Result<Figure> {
        let data = self.validate()?;
        let y = self.common.y_scale(data, false)?;
        let longest = self.runs.iter().map(Runs::length).max().unwrap_or(0) as f64;
        // A step reaches half a unit to either side of its value.
        let x = Scale::new(0.5 * self.every, (longest + 0.5) * self.every, false);
        let mut page = Page::open(&self.common, self.common.size)?;
        let names = self.runs.iter().map(|r| r.name.as_str());
        page.legend(&entries(names, Sample::Band, &self.common));
        let whole = self.every.fract() == 0.0;
        let across = Along::Numbers { scale: x, whole };
        let up = Along::Numbers {
            scale: y,
            whole: false,
        };
        let area = frame(&mut page, &across, &up, 0.0)?;
        reward_draw::runs(self, &mut page, area, &x, &y);
        references(&mut page, area, &y);
        let words = reward_draw::describe(self, data, longest);
        Figure::paint(&self.common.title, &page.scene, page.fonts, words)
    }

    /// Checks everything; returns the extent of all values.
    fn validate(&self) -> Result<Extent> {
        let check = self.common.check();
        self.common.check_page(true)?;
        check.need(!self.runs.is_empty(), || {
            "has no runs: add at least one .runs(name, seeds)".into()
        })?;
        check.names("runs", self.runs.iter().map(|r| r.name.as_str()))?;
        for runs in &self.runs {
            self.validate_runs(runs)?;
        }
        check.value(|| ".every()".into(), self.every, None)?;
        check.need((1e-50..=1e50).contains(&self.every), || {
            format!(
                ".every({:?}) must be above 0: give it the steps between values",
                self.every
            )
        })?;
        self.common.check_y(false)?;
        let values = self.runs.iter().flat_map(|r| r.seeds.iter().flatten());
        let data = Extent::of(values.copied());
        check.need(!data.flat() || self.common.y_range.is_some(), || {
            format!(
                "every value of runs \"{}\" is {:?}, which gives no axis: \
                 set one with .y_range(low, high)",
                self.runs[0].name, data.low
            )
        })?;
        Ok(data)
    }

    fn validate_runs(&self, runs: &Runs) -> Result<()> {
        let check = self.common.check();
        let name = format!("runs \"{}\"", runs.name);
        let length = runs.length();
        check.need(!runs.seeds.is_empty(), || {
            format!("{name} has no seeds: give it one list of values for each seed")
        })?;
        let total = runs.seeds.iter().map(Vec::len).sum();
        check.amount(|| name.clone(), total)?;
        for (seed, values) in runs.seeds.iter().enumerate() {
            check.need(values.len() == length, || {
                format!(
                    "{name}, seed {seed} (counted from 0) has {} values, seed 0 has {length}: \
                     cut all seeds to one length",
                    values.len()
                )
            })?;
            for (index, value) in values.iter().enumerate() {
                let whose = || format!("{name}, seed {seed}, value {index} (counted from 0)");
                check.value(whose, *value, None)?;
            }
        }
        check.need(length >= 2, || {
            format!(
                "{name} has {} for each seed: a step line needs two",
                count(length, "value")
            )
        })
    }
}
