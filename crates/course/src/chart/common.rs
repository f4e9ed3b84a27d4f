//! What the charts have in common: texts, size, reference lines, a fixed y range.

use super::axis::Scale;
use super::check::{Axis, Check, Extent};
use crate::error::Result;

pub(super) const DEFAULT_SIZE: (u32, u32) = (800, 460);

/// The settings every chart has.
#[derive(Debug, Clone)]
pub(super) struct Common {
    pub title: String,
    pub x_label: String,
    pub y_label: String,
    pub size: (u32, u32),
    pub words: Vec<String>,
    /// Lines across, at y values.
    pub references: Vec<(String, f64)>,
    /// Lines upright, at x values.
    pub upright: Vec<(String, f64)>,
    pub y_range: Option<(f64, f64)>,
}

impl Common {
    pub fn new(title: String, x_label: String, y_label: String) -> Self {
        Self {
            title,
            x_label,
            y_label,
            size: DEFAULT_SIZE,
            words: Vec::new(),
            references: Vec::new(),
            upright: Vec::new(),
            y_range: None,
        }
    }

    pub fn check(&self) -> Check<'_> {
        Check { chart: &self.title }
    }

    /// Title, labels and size are usable.
    pub fn check_page(&self, axes: bool) -> Result<()> {
        let check = self.check();
        check.text("the title", &self.title)?;
        if axes {
            check.text("the label of the x axis", &self.x_label)?;
            check.text("the label of the y axis", &self.y_label)?;
        }
        let (width, height) = self.size;
        check.need(
            (240..=4000).contains(&width) && (180..=4000).contains(&height),
            || {
                format!(
                    "the size {width} × {height} is outside 240 × 180 to 4000 × 4000 pixels: \
                     give .size() something like (800, 460)"
                )
            },
        )
    }

    /// Reference lines and the y range are usable.
    pub fn check_y(&self, log: bool) -> Result<()> {
        let check = self.check();
        let axis = log.then_some(Axis::Y);
        let references = self.references.iter().chain(&self.upright);
        check.names("reference", references.map(|(n, _)| n.as_str()))?;
        for (name, value) in &self.references {
            check.value(|| format!("reference \"{name}\""), *value, axis)?;
        }
        let Some((low, high)) = self.y_range else {
            return Ok(());
        };
        check.value(|| "the lower end of .y_range()".into(), low, axis)?;
        check.value(|| "the upper end of .y_range()".into(), high, axis)?;
        check.need(low < high, || {
            format!(
                "y_range({low:?}, {high:?}) does not rise: \
                 the first number must be below the second"
            )
        })?;
        check.range("the ends of .y_range()", Extent { low, high })
    }

    /// Upright reference lines are usable; their names are checked with the others'.
    pub fn check_upright(&self, log: bool) -> Result<()> {
        let axis = log.then_some(Axis::X);
        self.upright.iter().try_for_each(|(name, value)| {
            let whose = || format!("reference \"{name}\"");
            self.check().value(whose, *value, axis)
        })
    }

    /// The y axis for `data`, with some air, unless the learner has set it.
    pub fn y_scale(&self, data: Extent, log: bool) -> Result<Scale> {
        if let Some((low, high)) = self.y_range {
            return Ok(Scale::new(low, high, log));
        }
        let all = self.references.iter().fold(data, |e, (_, y)| e.with(*y));
        self.check().range("the y values", all)?;
        Ok(Scale::new(all.low, all.high, log).widened(0.05, 0.05))
    }
}
