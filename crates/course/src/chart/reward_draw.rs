//! The bands and step lines of a reward chart, and the chart in words.

use super::axis::Scale;
use super::check::Extent;
use super::colour;
use super::legend::BAND_ALPHA;
use super::number::plain;
use super::page::Page;
use super::plot::place;
use super::reward::RewardChart;
use super::scene::{Point, Rect, Scene, Shape};
use super::style::{marker, series_line};
use super::words::{Words, count};
use crate::metrics::Spread;

/// Runs of one kind with different seeds.
#[derive(Debug, Clone)]
pub(super) struct Runs {
    pub name: String,
    pub seeds: Vec<Vec<f64>>,
}

impl Runs {
    pub fn length(&self) -> usize {
        self.seeds.first().map_or(0, Vec::len)
    }

    fn spreads(&self) -> Vec<Spread> {
        (0..self.length()).map(|step| self.at(step)).collect()
    }

    fn at(&self, step: usize) -> Spread {
        Spread::of_finite(self.seeds.iter().filter_map(|seed| seed.get(step).copied()))
    }
}

/// Where the values of a chart lie.
struct Place<'p> {
    area: Rect,
    x: &'p Scale,
    y: &'p Scale,
    every: f64,
}

impl Place<'_> {
    /// Step number `step` (counted from 0) at height `value`.
    fn at(&self, step: f64, value: f64) -> Point {
        place(
            self.area,
            self.x,
            self.y,
            ((step + 1.0) * self.every, value),
        )
    }

    /// The part inside the area of a box from step `first` to before step `end`.
    fn rect(&self, first: usize, end: usize, low: f64, high: f64) -> Rect {
        let (left, bottom) = self.at(first as f64 - 0.5, low);
        let (right, top) = self.at(end as f64 - 0.5, high);
        let inside = |y: f64| y.clamp(self.area.top, self.area.bottom);
        Rect::new(left, inside(top), right, inside(bottom))
    }
}

/// Draws all runs: bands below, lines above them, markers on top.
pub(super) fn runs(chart: &RewardChart, page: &mut Page<'_>, area: Rect, x: &Scale, y: &Scale) {
    let every = chart.every;
    let place = Place { area, x, y, every };
    let spreads: Vec<Vec<Spread>> = chart.runs.iter().map(Runs::spreads).collect();
    let scene = &mut page.scene;
    for (index, spreads) in spreads.iter().enumerate() {
        scene.shapes.push(Shape::Band {
            boxes: band(spreads, &place),
            fill: colour::series(index),
            alpha: BAND_ALPHA,
        });
    }
    for (index, spreads) in spreads.iter().enumerate() {
        let ends = |(step, spread): (usize, &Spread)| {
            let step = step as f64;
            [
                place.at(step - 0.5, spread.mean),
                place.at(step + 0.5, spread.mean),
            ]
        };
        let steps: Vec<Point> = spreads.iter().enumerate().flat_map(ends).collect();
        let steps = super::geometry::thin(steps, area.width());
        series_line(scene, index, &steps, area);
    }
    for (index, spreads) in spreads.iter().enumerate() {
        let first = index * spreads.len().div_ceil(12) / chart.runs.len();
        markers(scene, index, first, spreads, &place);
    }
}

/// The band; where a pixel holds several steps, they share a box.
fn band(spreads: &[Spread], place: &Place<'_>) -> Vec<Rect> {
    let together = (spreads.len() as f64 / place.area.width()).ceil().max(1.0) as usize;
    let boxes = spreads.chunks(together).enumerate();
    boxes
        .map(|(number, chunk)| {
            let low = Extent::of(chunk.iter().map(|s| s.low)).low;
            let high = Extent::of(chunk.iter().map(|s| s.high)).high;
            let first = number * together;
            place.rect(first, first + chunk.len(), low, high)
        })
        .collect()
}

/// About a dozen markers.
fn markers(scene: &mut Scene, index: usize, first: usize, spreads: &[Spread], place: &Place<'_>) {
    let every = spreads.len().div_ceil(12);
    for (step, spread) in spreads.iter().enumerate().skip(first).step_by(every) {
        let at = place.at(step as f64, spread.mean);
        if place.area.holds(at) {
            marker(scene, index, at);
        }
    }
}

/// The chart in words.
pub(super) fn describe(chart: &RewardChart, data: Extent, longest: f64) -> String {
    let mut words = Words::new("Reward chart", &chart.common);
    let x = Extent {
        low: chart.every,
        high: longest * chart.every,
    };
    words.axis("Horizontal", &chart.common.x_label, x, false);
    words.y_axis(&chart.common, data, false);
    words.say(
        "Each line is the mean over seeds; each band goes from the lowest seed to the highest",
    );
    for runs in &chart.runs {
        words.say(&describe_runs(runs, chart.every));
    }
    words.finish(&chart.common)
}

fn describe_runs(runs: &Runs, every: f64) -> String {
    let spreads = runs.spreads();
    let named = |what: &str, step: usize| match spreads.get(step) {
        Some(spread) => format!(
            "{what} {} at {}",
            plain(spread.mean),
            plain((step as f64 + 1.0) * every)
        ),
        None => String::new(),
    };
    let by_mean = |a: &usize, b: &usize| spreads[*a].mean.total_cmp(&spreads[*b].mean);
    let steps = || 0..spreads.len();
    let seeds = Extent::of(runs.seeds.iter().flatten().copied());
    format!(
        "Runs \"{}\": {}, {} each; {}, {}; {}, {}; any seed from {} to {}",
        runs.name,
        count(runs.seeds.len(), "seed"),
        count(spreads.len(), "value"),
        named("mean first", 0),
        named("mean last", spreads.len().saturating_sub(1)),
        named("mean lowest", steps().min_by(by_mean).unwrap_or(0)),
        named("mean highest", steps().max_by(by_mean).unwrap_or(0)),
        plain(seeds.low),
        plain(seeds.high),
    )
}
