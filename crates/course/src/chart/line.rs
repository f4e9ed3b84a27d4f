//! Lines through points.

use super::axis::Scale;
use super::check::{Axis, Extent, MOST_VALUES};
use super::common::Common;
use super::figure::Figure;
use super::legend::{Sample, entries};
use super::line_draw;
use super::number::plain;
use super::page::Page;
use super::plot::{Along, frame, references, upright_references};
use super::value::{Value, set_whiskers};
use super::words::{MOST_READ, Words, count};
use crate::error::Result;

/// Points, joined in their order or each by itself.
#[derive(Debug, Clone)]
pub(super) struct Line {
    pub name: String,
    pub points: Vec<(f64, Value)>,
    pub joined: bool,
}

/// A chart of one or more lines.
///
/// Each line has its own colour, dashes and marker. Nothing is checked before
/// [`draw`](Self::draw).
///
/// ```
/// use course::chart::LineChart;
///
/// let ranks = [1_usize, 4, 16, 64];
/// let figure = LineChart::new("Parameters of an adapter", "rank r", "parameters")
///     .line("LoRA", ranks.map(|r| (r as f64, (r * 1536) as f64)))
///     .reference("full matrix", 589_824.0)
///     .log_x()
///     .log_y()
///     .draw()?;
/// assert!(figure.describe().contains("4 points"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct LineChart {
    common: Common,
    pub(super) lines: Vec<Line>,
    log_x: bool,
    log_y: bool,
    /// What a builder method could not do; `draw` reports it.
    problem: Option<String>,
}

impl LineChart {
    /// An empty chart; the labels say what the axes count, with the unit.
    ///
    /// ```
    /// let chart = course::chart::LineChart::new("Loss", "step", "loss (nats)");
    /// assert!(chart.draw().is_err(), "there is no line yet");
    /// ```
    pub fn new(
        title: impl Into<String>,
        x_label: impl Into<String>,
        y_label: impl Into<String>,
    ) -> Self {
        Self {
            common: Common::new(title.into(), x_label.into(), y_label.into()),
            lines: Vec::new(),
            log_x: false,
            log_y: false,
            problem: None,
        }
    }

    /// Adds a line through `points` in their order.
    ///
    /// Anything that turns into `f64` without loss will do; write `n as f64` for a `usize`.
    /// A y may be a [`Spread`](crate::metrics::Spread): its mean is the point, its range a
    /// whisker. Where whiskers of several lines would cover each other, the lines move a few
    /// pixels aside. Of a line of more than 24 points only those with a marker show theirs.
    ///
    /// ```
    /// # use course::chart::LineChart;
    /// let losses: Vec<f32> = vec![2.0, 1.0, 0.5];
    /// let figure = LineChart::new("Loss", "step", "loss")
    ///     .line("SGD", losses.iter().enumerate().map(|(i, &y)| (i as f64, y)))
    ///     .draw()?;
    /// assert!(figure.describe().contains("\"SGD\""));
    ///
    /// use course::metrics::Spread;
    /// let of_seeds = [(1, [2.0, 3.0]), (4, [1.0, 1.5])];
    /// let mut points = Vec::new();
    /// for (rank, losses) in of_seeds {
    ///     points.push((rank, Spread::of(losses)?));
    /// }
    /// let figure = LineChart::new("Loss", "rank", "loss").line("LoRA", points).draw()?;
    /// assert!(figure.describe().contains("2.5 (2 to 3) at 1"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn line<X: Into<f64>, Y: Into<Value>>(
        self,
        name: impl Into<String>,
        points: impl IntoIterator<Item = (X, Y)>,
    ) -> Self {
        self.series(name.into(), points, true)
    }

    /// Adds points that no line joins, such as measurements beside a curve. Each shows its
    /// marker, and the chart's lines show none.
    ///
    /// ```
    /// # use course::chart::LineChart;
    /// let wave = (0..50).map(|i| f64::from(i) / 10.0).map(|x| (x, x.sin()));
    /// let figure = LineChart::new("A wave", "x", "y")
    ///     .line("sine", wave)
    ///     .points("measured", [(0.9, 0.8), (3.1, 0.1)])
    ///     .draw()?;
    /// assert!(figure.describe().contains("Points \"measured\""));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn points<X: Into<f64>, Y: Into<Value>>(
        self,
        name: impl Into<String>,
        points: impl IntoIterator<Item = (X, Y)>,
    ) -> Self {
        self.series(name.into(), points, false)
    }

    fn series<X: Into<f64>, Y: Into<Value>>(
        mut self,
        name: String,
        points: impl IntoIterator<Item = (X, Y)>,
        joined: bool,
    ) -> Self {
        let points = points.into_iter().map(|(x, y)| (x.into(), y.into()));
        // One more than allowed, so that an endless iterator is noticed and left.
        let points = points.take(MOST_VALUES + 1).collect();
        self.lines.push(Line {
            name,
            points,
            joined,
        });
        self
    }

    /// Gives the points of the last line their whiskers, one `(low, high)` for each, both on
    /// the y axis.
    ///
    /// ```
    /// # use course::chart::LineChart;
    /// let chart = LineChart::new("t", "x", "y")
    ///     .line("LoRA", [(1, 2.0), (4, 1.0)])
    ///     .errors([(1.5, 2.5), (0.8, 1.1)]);
    /// assert!(chart.draw()?.describe().contains("1 (0.8 to 1.1) at 4"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn errors<L: Into<f64>, H: Into<f64>>(
        mut self,
        whiskers: impl IntoIterator<Item = (L, H)>,
    ) -> Self {
        let Some(line) = self.lines.last_mut() else {
            self.problem = Some(".errors([...]) belongs after a .line()".into());
            return self;
        };
        let values = line.points.iter_mut().map(|point| &mut point.1);
        if let Err(problem) = set_whiskers(values, whiskers, ("line", "points")) {
            self.problem = Some(problem);
        }
        self
    }

    /// Makes the x axis logarithmic.
    ///
    /// ```
    /// # use course::chart::LineChart;
    /// let chart = LineChart::new("t", "x", "y").line("a", [(1, 1), (100, 2)]).log_x();
    /// assert!(chart.draw()?.describe().contains("from 1 to 100, logarithmic"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn log_x(mut self) -> Self {
        self.log_x = true;
        self
    }

    /// Makes the y axis logarithmic.
    ///
    /// ```
    /// # use course::chart::LineChart;
    /// let chart = LineChart::new("t", "x", "y").line("a", [(0, 0), (1, 9)]).log_y();
    /// assert!(chart.draw().is_err(), "0 has no logarithm");
    /// ```
    pub fn log_y(mut self) -> Self {
        self.log_y = true;
        self
    }

    /// Adds a dashed horizontal line at `y`, such as a baseline; for an upright one see
    /// [`reference_x`](Self::reference_x).
    ///
    /// ```
    /// # use course::chart::LineChart;
    /// let chart = LineChart::new("t", "x", "y").line("a", [(0, 0), (1, 9)]).reference("full", 5);
    /// assert!(chart.draw()?.describe().contains("Reference line \"full\": 5"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn reference(mut self, name: impl Into<String>, y: impl Into<f64>) -> Self {
        self.common.references.push((name.into(), y.into()));
        self
    }

    /// Adds a dashed vertical line at `x`, such as the step at which something changes.
    ///
    /// ```
    /// # use course::chart::LineChart;
    /// let chart = LineChart::new("t", "x", "y").line("a", [(0, 0), (1, 9)]);
    /// let words = chart.reference_x("end of warm-up", 0.1).draw()?.describe().to_string();
    /// assert!(words.contains("Vertical reference line \"end of warm-up\": at 0.1"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn reference_x(mut self, name: impl Into<String>, x: impl Into<f64>) -> Self {
        self.common.upright.push((name.into(), x.into()));
        self
    }

    /// Sets the ends of the y axis; what lies outside is cut off.
    ///
    /// ```
    /// # use course::chart::LineChart;
    /// let flat = LineChart::new("t", "x", "y").line("a", [(0, 5), (1, 5)]);
    /// assert!(flat.clone().draw().is_err());
    /// assert!(flat.y_range(0, 10).draw().is_ok());
    /// ```
    pub fn y_range(mut self, low: impl Into<f64>, high: impl Into<f64>) -> Self {
        self.common.y_range = Some((low.into(), high.into()));
        self
    }

    /// Adds a sentence to the description, for those who cannot see the figure.
    ///
    /// ```
    /// # use course::chart::LineChart;
    /// let chart = LineChart::new("t", "x", "y").line("a", [(0, 0), (1, 9)]).words("It rises.");
    /// assert!(chart.draw()?.describe().ends_with("It rises."));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn words(mut self, sentence: impl Into<String>) -> Self {
        self.common.words.push(sentence.into());
        self
    }

    /// Sets width and height in pixels, instead of 800 × 460.
    ///
    /// ```
    /// # use course::chart::LineChart;
    /// let chart = LineChart::new("t", "x", "y").line("a", [(0, 0), (1, 9)]).size(600, 300);
    /// assert_eq!(chart.draw()?.size(), (600, 300));
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
    /// [`Error::Chart`](crate::error::Error::Chart) names the series and what to do: no or
    /// empty series, values that are not finite or (on a log axis) not above 0, points that
    /// all have one x or one y, a whisker that misses its point, an empty text, a useless
    /// y range or size.
    ///
    /// ```
    /// # use course::chart::LineChart;
    /// let chart = LineChart::new("t", "x", "y").line("loss", [(0.0, 1.0), (1.0, f64::NAN)]);
    /// assert!(chart.draw().unwrap_err().to_string().contains("series \"loss\""));
    /// ```
    pub fn draw(&self) -> Result<Figure> {
        let (x_data, y_data) = self.validate()?;
        let upright = &self.common.upright;
        let all = upright.iter().fold(x_data, |e, (_, x)| e.with(*x));
        let x = Scale::new(all.low, all.high, self.log_x).widened(0.02, 0.02);
        let y = self.common.y_scale(y_data, self.log_y)?;
        let mut page = Page::open(&self.common, self.common.size)?;
        let names = self.lines.iter().map(|line| line.name.as_str());
        let sample = |index: usize| match self.lines[index].joined {
            true if line_draw::bears_markers(&self.lines, index) => Sample::Line(index),
            true => Sample::Bare(index),
            false => Sample::Points(index),
        };
        page.legend(&entries(names, sample, &self.common));
        let whole = self.values().all(|p| p.0.fract() == 0.0);
        let across = Along::Numbers { scale: x, whole };
        let up = Along::Numbers {
            scale: y,
            whole: false,
        };
        let area = frame(&mut page, &across, &up, 0.0)?;
        references(&mut page, area, &y);
        upright_references(&mut page, area, &x);
        line_draw::lines(&self.lines, &mut page.scene, area, &x, &y);
        let words = self.describe(x_data, y_data);
        Figure::paint(&self.common.title, &page.scene, page.fonts, words)
    }

    fn values(&self) -> impl Iterator<Item = &(f64, Value)> {
        self.lines.iter().flat_map(|line| &line.points)
    }

    /// Checks everything; returns the extents of x and y.
    fn validate(&self) -> Result<(Extent, Extent)> {
        let check = self.common.check();
        self.common.check_page(true)?;
        if let Some(problem) = &self.problem {
            return Err(check.fail(problem));
        }
        check.need(!self.lines.is_empty(), || {
            "has no series: add at least one .line(name, points)".into()
        })?;
        check.names("series", self.lines.iter().map(|l| l.name.as_str()))?;
        for line in &self.lines {
            self.validate_line(line)?;
        }
        self.common.check_y(self.log_y)?;
        self.common.check_upright(self.log_x)?;
        let x = Extent::of(self.values().map(|p| p.0));
        let y = self
            .values()
            .fold(Extent::EMPTY, |e, p| e.and(p.1.extent()));
        check.need(!x.flat(), || {
            format!(
                "every x value is {:?}, which gives no axis: add a point at another x",
                x.low
            )
        })?;
        check.range("the x values", x)?;
        check.need(!y.flat() || self.common.y_range.is_some(), || {
            let names: Vec<&str> = self.lines.iter().map(|l| l.name.as_str()).collect();
            format!(
                "every y value of series \"{}\" is {:?}, which gives no axis: \
                 set one with .y_range(low, high)",
                names.join("\", \""),
                y.low
            )
        })?;
        Ok((x, y))
    }

    fn validate_line(&self, line: &Line) -> Result<()> {
        let Line {
            name,
            points,
            joined,
        } = line;
        let check = self.common.check();
        let series = || format!("series \"{name}\"");
        check.need(!points.is_empty(), || {
            let least = if *joined { "two points" } else { "one point" };
            format!("{} is empty: give it at least {least}", series())
        })?;
        check.amount(series, points.len())?;
        for (index, &(x, y)) in points.iter().enumerate() {
            let whose =
                |axis: &str| format!("{} at point {index} (counted from 0): {axis}", series());
            check.value(|| whose("x"), x, self.log_x.then_some(Axis::X))?;
            y.check(check, || whose("y"), self.log_y.then_some(Axis::Y))?;
        }
        let x = Extent::of(points.iter().map(|p| p.0));
        check.need(!joined || !x.flat(), || {
            format!(
                "{} has {}, all at x = {:?}: a line needs two different x values",
                series(),
                count(points.len(), "point"),
                x.low
            )
        })
    }

    fn describe(&self, x: Extent, y: Extent) -> String {
        let mut words = Words::new("Line chart", &self.common);
        words.x_axis(&self.common, x, self.log_x);
        words.y_axis(&self.common, y, self.log_y);
        for line in &self.lines {
            words.say(&describe_line(line));
        }
        words.finish(&self.common)
    }
}

fn describe_line(line: &Line) -> String {
    let Line { name, points, .. } = line;
    let what = if line.joined { "Series" } else { "Points" };
    let read = |(x, y): &(f64, Value)| format!("{} at {}", y.told(), plain(*x));
    let ranges = points.iter().any(|(_, y)| y.whisker.is_some());
    if (ranges || !line.joined) && points.len() <= MOST_READ {
        let points: Vec<String> = points.iter().map(read).collect();
        return format!("{what} \"{name}\": {}", points.join("; "));
    }
    let by_y = |a: &&(f64, Value), b: &&(f64, Value)| a.1.number.total_cmp(&b.1.number);
    let named = |what: &str, point: Option<&(f64, Value)>| match point {
        Some(point) => format!("{what} {}", read(point)),
        None => String::new(),
    };
    format!(
        "{what} \"{name}\": {}; {}, {}; {}, {}",
        count(points.len(), "point"),
        named("first", points.first()),
        named("last", points.last()),
        named("lowest", points.iter().min_by(by_y)),
        named("highest", points.iter().max_by(by_y)),
    )
}
