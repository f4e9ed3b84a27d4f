//! Heat maps: a grid of coloured cells.

use super::check::{Extent, MOST_VALUES, gather};
use super::common::Common;
use super::figure::Figure;
use super::heat_draw;
use super::number::plain;
use super::value::Value;
use super::words::{MOST_READ, Words};
use crate::error::Result;

/// Where a diverging colour scale turns, and what lies on its two sides.
#[derive(Debug, Clone)]
pub(super) struct Diverging {
    pub center: f64,
    pub below: String,
    pub above: String,
}

/// A grid of values as colours: dark for low and light for high, or diverging from a centre.
///
/// ```
/// use course::chart::HeatMap;
///
/// let figure = HeatMap::new("Accuracy by rank and scale", "scale α", "rank r")
///     .columns(["8", "16"])
///     .rows(["4", "8"])
///     .values(vec![vec![0.81, 0.84], vec![0.83, 0.88]])
///     .unit("accuracy")
///     .draw()?;
/// assert!(figure.describe().contains("highest 0.88 in row 8, column 16"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct HeatMap {
    pub(super) common: Common,
    pub(super) columns: Vec<String>,
    pub(super) rows: Vec<String>,
    pub(super) values: Vec<Vec<Value>>,
    pub(super) unit: Option<String>,
    pub(super) diverging: Option<Diverging>,
    range: Option<(f64, f64)>,
}

impl HeatMap {
    /// An empty map; the labels say what columns and rows are.
    ///
    /// ```
    /// let map = course::chart::HeatMap::new("Attention", "key", "query");
    /// assert!(map.draw().is_err(), "there are no values yet");
    /// ```
    pub fn new(
        title: impl Into<String>,
        x_label: impl Into<String>,
        y_label: impl Into<String>,
    ) -> Self {
        Self {
            common: Common::new(title.into(), x_label.into(), y_label.into()),
            columns: Vec::new(),
            rows: Vec::new(),
            values: Vec::new(),
            unit: None,
            diverging: None,
            range: None,
        }
    }

    /// Names the columns from left to right.
    ///
    /// ```
    /// # use course::chart::HeatMap;
    /// let map = HeatMap::new("t", "x", "y").columns(["a", "b"]).rows(["r"]).values([[1, 2]]);
    /// assert!(map.draw()?.describe().contains("column b"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn columns<S: Into<String>>(mut self, names: impl IntoIterator<Item = S>) -> Self {
        let names = names.into_iter().take(MOST_VALUES + 1);
        self.columns = names.map(Into::into).collect();
        self
    }

    /// Names the rows from top to bottom.
    ///
    /// ```
    /// # use course::chart::HeatMap;
    /// let map = HeatMap::new("t", "x", "y").columns(["a", "b"]).rows(["r"]).values([[1, 2]]);
    /// assert!(map.draw()?.describe().contains("row r"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn rows<S: Into<String>>(mut self, names: impl IntoIterator<Item = S>) -> Self {
        let names = names.into_iter().take(MOST_VALUES + 1);
        self.rows = names.map(Into::into).collect();
        self
    }

    /// Sets the values, row by row from the top.
    ///
    /// A value may be a [`Spread`](crate::metrics::Spread): its mean gives the colour, and its
    /// range is written below the mean where every cell has room for both.
    ///
    /// ```
    /// # use course::chart::HeatMap;
    /// let rows: Vec<Vec<f32>> = vec![vec![0.0, 1.0], vec![2.0, 3.0]];
    /// let map = HeatMap::new("t", "x", "y").columns(["a", "b"]).rows(["c", "d"]).values(rows);
    /// assert!(map.draw()?.describe().contains("highest 3"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn values<R>(mut self, rows: impl IntoIterator<Item = R>) -> Self
    where
        R: IntoIterator,
        R::Item: Into<Value>,
    {
        self.values = gather(rows);
        self
    }

    /// Says beside the colour bar what the values are, such as `"accuracy"`.
    ///
    /// ```
    /// # use course::chart::HeatMap;
    /// let map = HeatMap::new("t", "x", "y").columns(["a", "b"]).rows(["r"]).values([[1, 2]]);
    /// assert!(map.unit("loss (nats)").draw()?.describe().contains("loss (nats)"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn unit(mut self, unit: impl Into<String>) -> Self {
        self.unit = Some(unit.into());
        self
    }

    /// Sets the values of the darkest and the lightest colour, so that several maps compare.
    ///
    /// ```
    /// # use course::chart::HeatMap;
    /// let map = HeatMap::new("t", "x", "y").columns(["a", "b"]).rows(["r"]).values([[1, 1]]);
    /// assert!(map.clone().draw().is_err(), "one value gives no colours");
    /// assert!(map.range(0, 2).draw().is_ok());
    /// ```
    pub fn range(mut self, low: impl Into<f64>, high: impl Into<f64>) -> Self {
        self.range = Some((low.into(), high.into()));
        self
    }

    /// Makes the colours diverge from near white at `center`: blue below it, orange above it, and
    /// the darker the farther from it. `below` and `above` say what lies there, such as
    /// `"worse"` and `"better"`.
    ///
    /// Both sides get the same range unless [`range`](Self::range) sets the ends; equally far
    /// from the centre is always equally dark.
    ///
    /// ```
    /// # use course::chart::HeatMap;
    /// let map = HeatMap::new("t", "x", "y").columns(["a", "b"]).rows(["r"]).values([[-1, 2]]);
    /// let words = map.diverging(0, "worse", "better").draw()?.describe().to_string();
    /// assert!(words.contains("from −2 (blue) to 2 (orange), white at 0; below 0: worse"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn diverging(
        mut self,
        center: impl Into<f64>,
        below: impl Into<String>,
        above: impl Into<String>,
    ) -> Self {
        self.diverging = Some(Diverging {
            center: center.into(),
            below: below.into(),
            above: above.into(),
        });
        self
    }

    /// Adds a sentence to the description, for those who cannot see the figure.
    ///
    /// ```
    /// # use course::chart::HeatMap;
    /// let map = HeatMap::new("t", "x", "y").columns(["a", "b"]).rows(["r"]).values([[1, 2]]);
    /// assert!(map.words("b wins").draw()?.describe().ends_with("b wins."));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn words(mut self, sentence: impl Into<String>) -> Self {
        self.common.words.push(sentence.into());
        self
    }

    /// Sets width and height in pixels, instead of 800 × 460.
    ///
    /// ```
    /// # use course::chart::HeatMap;
    /// let map = HeatMap::new("t", "x", "y").columns(["a", "b"]).rows(["r"]).values([[1, 2]]);
    /// assert_eq!(map.size(500, 500).draw()?.size(), (500, 500));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn size(mut self, width: u32, height: u32) -> Self {
        self.common.size = (width, height);
        self
    }

    /// Draws the map.
    ///
    /// # Errors
    ///
    /// [`Error::Chart`](crate::error::Error::Chart) names the row and what to do: no values,
    /// rows of different lengths, names that do not match, values that are not finite or all
    /// equal, a range that does not rise or misses the centre, an empty text, a useless size,
    /// more cells than pixels.
    ///
    /// ```
    /// # use course::chart::HeatMap;
    /// let map = HeatMap::new("t", "x", "y")
    ///     .columns(["a", "b"])
    ///     .rows(["c", "d"])
    ///     .values(vec![vec![1.0, 2.0], vec![3.0]]);
    /// assert!(map.draw().unwrap_err().to_string().contains("row 1 (\"d\")"));
    /// ```
    pub fn draw(&self) -> Result<Figure> {
        let range = self.validate()?;
        let (scene, fonts) = heat_draw::scene(self, range)?;
        Figure::paint(&self.common.title, &scene, fonts, self.describe(range))
    }

    /// Checks everything; returns the values of the darkest and the lightest colour.
    fn validate(&self) -> Result<Extent> {
        let check = self.common.check();
        self.common.check_page(true)?;
        check.need(!self.values.is_empty(), || {
            "has no values: give .values() at least one row".into()
        })?;
        check.amount(|| "the map".into(), self.values.iter().map(Vec::len).sum())?;
        self.validate_names()?;
        for row in 0..self.values.len() {
            self.validate_row(row)?;
        }
        if let Some(unit) = &self.unit {
            check.text("the unit", unit)?;
        }
        if let Some(Diverging {
            center,
            below,
            above,
        }) = &self.diverging
        {
            check.value(|| "the center of .diverging()".into(), *center, None)?;
            check.text("what .diverging() calls values below its center", below)?;
            check.text("what .diverging() calls values above its center", above)?;
        }
        self.validate_range()
    }

    fn validate_names(&self) -> Result<()> {
        let check = self.common.check();
        check.need(self.rows.len() == self.values.len(), || {
            format!(
                ".rows() has {} names for {} rows of values: give one name for each row",
                self.rows.len(),
                self.values.len()
            )
        })?;
        check.need(!self.columns.is_empty(), || {
            "has no columns: name them with .columns()".into()
        })?;
        check.names("row", self.rows.iter().map(String::as_str))?;
        check.names("column", self.columns.iter().map(String::as_str))
    }

    fn validate_row(&self, row: usize) -> Result<()> {
        let check = self.common.check();
        let (name, values) = (&self.rows[row], &self.values[row]);
        check.need(values.len() == self.columns.len(), || {
            format!(
                "row {row} (\"{name}\") has {} values for {} columns: \
                 give every row one value for each column",
                values.len(),
                self.columns.len()
            )
        })?;
        for (column, value) in values.iter().enumerate() {
            let whose = || {
                format!(
                    "row {row} (\"{name}\"), column {column} (\"{}\")",
                    self.columns[column]
                )
            };
            value.check(check, whose, None)?;
        }
        Ok(())
    }

    fn validate_range(&self) -> Result<Extent> {
        let check = self.common.check();
        let center = self.diverging.as_ref().map(|d| d.center);
        if let Some((low, high)) = self.range {
            check.value(|| "the low end of .range()".into(), low, None)?;
            check.value(|| "the high end of .range()".into(), high, None)?;
            check.need(low < high, || {
                format!("range({low:?}, {high:?}) does not rise: the first must be below")
            })?;
            let range = Extent { low, high };
            check.range("the ends of .range()", range)?;
            let inside = center.is_none_or(|center| low <= center && center <= high);
            check.need(inside, || {
                format!(
                    "range({low:?}, {high:?}) leaves out the center of .diverging(): \
                     give ends that enclose it"
                )
            })?;
            return Ok(range);
        }
        let cells = Extent::of(self.values.iter().flatten().map(|v| v.number));
        let range = match center {
            Some(center) => {
                let reach = (center - cells.low).max(cells.high - center);
                Extent::of([center - reach, center + reach])
            }
            None => cells,
        };
        check.need(!range.flat(), || {
            format!(
                "every cell from row 0 (\"{}\") on is {:?}, which gives no colours: \
                 set them with .range(low, high)",
                self.rows[0], range.low
            )
        })?;
        check.range("the cells", range)?;
        Ok(range)
    }

    fn describe(&self, range: Extent) -> String {
        let mut words = Words::new("Heat map", &self.common);
        words.say(&format!(
            "Columns: {}, {} in all; rows: {}, {} in all",
            self.common.x_label.trim(),
            self.columns.len(),
            self.common.y_label.trim(),
            self.rows.len()
        ));
        let unit = self.unit.as_deref().unwrap_or("values");
        let (low, high) = (plain(range.low), plain(range.high));
        words.say(&match &self.diverging {
            None => format!("Colours: {unit} from {low} (dark) to {high} (light)"),
            Some(Diverging {
                center,
                below,
                above,
            }) => {
                let (center, below, above) = (plain(*center), below.trim(), above.trim());
                format!(
                    "Colours: {unit} from {low} (blue) to {high} (orange), white at {center}; \
                     below {center}: {below}, above {center}: {above}"
                )
            }
        });
        let cells = || {
            let rows = self.values.iter().enumerate();
            rows.flat_map(|(r, row)| row.iter().enumerate().map(move |(c, v)| (r, c, *v)))
        };
        type Cell = (usize, usize, Value);
        let by_value = |a: &Cell, b: &Cell| a.2.number.total_cmp(&b.2.number);
        let told = |cell: Option<Cell>| match cell {
            Some((row, column, value)) => format!(
                "{} in row {}, column {}",
                value.told(),
                self.rows[row],
                self.columns[column]
            ),
            None => String::new(),
        };
        words.say(&format!(
            "Cells: lowest {}; highest {}",
            told(cells().min_by(by_value)),
            told(cells().max_by(by_value))
        ));
        let ranges = self.values.iter().flatten().any(|v| v.whisker.is_some());
        if ranges && self.rows.len() <= MOST_READ && self.columns.len() <= MOST_READ {
            for (name, values) in self.rows.iter().zip(&self.values) {
                let cell =
                    |(column, value): (&String, &Value)| format!("{column} {}", value.told());
                let cells: Vec<String> = self.columns.iter().zip(values).map(cell).collect();
                words.say(&format!("Row {name}: {}", cells.join("; ")));
            }
        }
        words.finish(&self.common)
    }
}
