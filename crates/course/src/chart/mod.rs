//! Charts for notebook cells: line, bar, heat map, image grid and reward chart.
//!
//! A chart is built by value, drawn once, and comes out as a [`Figure`] that carries a PNG,
//! an SVG and a description in words. The fonts are compiled in, so no system font is needed.
//!
//! ```
//! use course::chart::LineChart;
//!
//! let figure = LineChart::new("Loss", "step", "loss")
//!     .line("rank 8", [(0, 2.0), (1, 1.2), (2, 0.9)])
//!     .draw()?;
//! assert!(figure.describe().contains("rank 8"));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! How a figure comes about, one file each: `check` refuses what cannot be drawn, `axis` turns
//! values into places and ticks, `page` lays out title, legend, axes and grid, the chart's own
//! file adds its data, and the finished `scene` is painted by plotters in `paint`, once per
//! output (`raster`, `svg`).

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]

mod axis;
mod bar;
mod bar_check;
mod bar_draw;
mod check;
mod colour;
mod common;
mod figure;
mod font;
mod geometry;
mod heat;
mod heat_draw;
mod image;
mod images;
mod legend;
mod line;
mod line_draw;
mod names;
mod number;
mod page;
mod paint;
mod plot;
mod raster;
mod reward;
mod reward_draw;
mod scene;
mod style;
mod svg;
mod text;
mod ticks;
mod value;
mod words;

#[cfg(test)]
mod tests;

pub use bar::BarChart;
pub use figure::Figure;
pub use font::register_fonts;
pub use heat::HeatMap;
pub use images::ImageGrid;
pub use line::LineChart;
pub(crate) use number::grouped;
pub use reward::RewardChart;
pub use value::Value;
