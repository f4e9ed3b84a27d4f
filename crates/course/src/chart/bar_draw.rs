//! Where the bars of a bar chart go.

use super::axis::Scale;
use super::bar::{Bar, BarChart};
use super::check::Extent;
use super::colour::{AXIS, INK, WHITE};
use super::font::Fonts;
use super::legend::{Sample, entries};
use super::number::{Alike, exponent};
use super::page::Page;
use super::plot::{Along, frame, references};
use super::scene::{Anchor, Rect, Scene, Text};
use super::style::{SMALL_SIZE, bar as draw_bar, whisker as draw_whisker};
use super::value::in_sight;
use crate::error::Result;

/// The names below the axis, in the order in which they first appear.
pub(super) fn categories(chart: &BarChart) -> Vec<String> {
    let mut seen = std::collections::HashSet::new();
    let names = chart.bars().map(|bar| &bar.category);
    names.filter(|name| seen.insert(*name)).cloned().collect()
}

/// Lays out the whole chart.
pub(super) fn scene(chart: &BarChart, data: Extent) -> Result<(Scene, &'static Fonts)> {
    let categories = categories(chart);
    let mut page = Page::open(&chart.common, chart.common.size)?;
    let names = chart.series.iter().filter_map(|s| s.name.as_deref());
    page.legend(&entries(names, Sample::Bar, &chart.common));
    let numbers = Numbers::fit(chart, &page, categories.len());
    let y = y_scale(chart, data, &numbers, &page)?;
    let across = Along::Names(&categories);
    let up = Along::Numbers {
        scale: y,
        whole: false,
    };
    let area = frame(&mut page, &across, &up, 0.0)?;
    let slots = Slots::new(area, categories.len(), chart.series.len());
    chart.common.check().need(slots.bar >= 1.5, || {
        format!(
            "has {} bars, too many for its width: draw fewer, give .size() more width, \
             or use LineChart",
            categories.len() * chart.series.len()
        )
    })?;
    let places: std::collections::HashMap<&str, usize> = categories
        .iter()
        .enumerate()
        .map(|(index, name)| (name.as_str(), index))
        .collect();
    for (series, bars) in chart.series.iter().enumerate() {
        for bar in &bars.bars {
            let category = places.get(bar.category.as_str()).copied().unwrap_or(0);
            let slot = (slots.left(category, series), slots.bar);
            one(&mut page.scene, bar, series, slot, area, &y);
            numbers.draw(&mut page.scene, bar, slot, area, &y);
        }
    }
    let zero = height(area, &y, 0.0);
    if !y.log && area.holds((area.left, zero)) {
        page.scene.across(area.left, area.right, zero, AXIS);
    }
    ground_of_references(&mut page, area, &y);
    references(&mut page, area, &y);
    Ok((page.scene, page.fonts))
}

fn y_scale(chart: &BarChart, data: Extent, numbers: &Numbers, page: &Page<'_>) -> Result<Scale> {
    if chart.common.y_range.is_some() {
        return chart.common.y_scale(data, chart.log_y);
    }
    let references = &chart.common.references;
    let all = references.iter().fold(data, |e, (_, y)| e.with(*y));
    // The numbers at the ends of the bars need air of their height.
    let air = 0.05 + numbers.height() / (page.height() - page.top - 90.0).max(80.0);
    if chart.log_y {
        let low = below(all.low);
        return Ok(Scale::new(low, all.high.max(low * 10.0), true).widened(0.0, air));
    }
    let all = all.with(0.0);
    chart.common.check().range("the y values", all)?;
    let below = if all.low < 0.0 { air } else { 0.0 };
    let above = if all.high > 0.0 { air } else { 0.0 };
    Ok(Scale::new(all.low, all.high, false).widened(below, above))
}

/// A power of ten clearly below `value`, so that its bar has some height.
fn below(value: f64) -> f64 {
    let decade = 10_f64.powi(exponent(value));
    if value < 2.0 * decade {
        decade / 10.0
    } else {
        decade
    }
}

/// Reference lines cross the bars, so they get a white ground.
fn ground_of_references(page: &mut Page<'_>, area: Rect, y: &Scale) {
    for (_, value) in &page.common.references {
        if y.holds(*value) {
            let at = height(area, y, *value);
            let ground = Rect::new(area.left, at - 1.6, area.right, at + 1.6);
            page.scene.rect(ground, WHITE);
        }
    }
}

/// The places of bars that stand in groups.
struct Slots {
    left: f64,
    slot: f64,
    bar: f64,
    group: f64,
}

impl Slots {
    fn new(area: Rect, categories: usize, series: usize) -> Self {
        let slot = area.width() / categories as f64;
        let bar = (slot * 0.8 / series as f64).min(90.0);
        Self {
            left: area.left,
            slot,
            bar,
            group: bar * series as f64,
        }
    }

    fn left(&self, category: usize, series: usize) -> f64 {
        let middle = self.left + self.slot * (category as f64 + 0.5);
        middle - self.group / 2.0 + self.bar * series as f64
    }
}

fn height(area: Rect, y: &Scale, value: f64) -> f64 {
    area.bottom - y.place(value) * area.height()
}

fn one(
    scene: &mut Scene,
    bar: &Bar,
    series: usize,
    (left, width): (f64, f64),
    area: Rect,
    y: &Scale,
) {
    let inside = |value: f64| height(area, y, value).clamp(area.top, area.bottom);
    let base = if y.log { area.bottom } else { inside(0.0) };
    let end = inside(bar.value.number);
    // A hair of white keeps neighbours apart.
    let gap = if width > 6.0 { 0.5 } else { 0.0 };
    let at = Rect::new(left + gap, base.min(end), left + width - gap, base.max(end));
    draw_bar(scene, series, at);
    if let Some(whisker) = bar.value.whisker.and_then(|w| in_sight(w, area, y)) {
        let reach = (width * 0.22).clamp(2.0, 8.0);
        draw_whisker(scene, whisker, (left + width / 2.0, reach), INK);
    }
}

/// The numbers at the ends of the bars.
struct Numbers {
    way: Way,
    alike: Alike,
    longest: f64,
}

/// How they stand.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Absent,
    Flat,
    Turned,
}

impl Numbers {
    fn fit(chart: &BarChart, page: &Page<'_>, categories: usize) -> Self {
        let alike = Alike::of_bars(chart.bars().map(|bar| bar.value.number));
        let longest = chart
            .bars()
            .map(|bar| alike.write(bar.value.number))
            .map(|text| page.fonts.width(&text, SMALL_SIZE, false))
            .fold(0.0, f64::max);
        // The plot's width is not known yet; the margins take about 100 pixels.
        let area = Rect::new(0.0, 0.0, page.width() - 100.0, 1.0);
        let slots = Slots::new(area, categories, chart.series.len());
        // Single bars may write into the gap beside them.
        let room = if chart.series.len() == 1 {
            slots.slot
        } else {
            slots.bar
        };
        let way = match room {
            _ if !chart.numbers => Way::Absent,
            room if room >= longest + 4.0 => Way::Flat,
            room if room >= SMALL_SIZE + 2.0 => Way::Turned,
            _ => Way::Absent,
        };
        Self {
            way,
            alike,
            longest,
        }
    }

    fn height(&self) -> f64 {
        match self.way {
            Way::Absent => 0.0,
            Way::Flat => 18.0,
            Way::Turned => self.longest + 8.0,
        }
    }

    fn draw(&self, scene: &mut Scene, bar: &Bar, (left, width): (f64, f64), area: Rect, y: &Scale) {
        let Extent { low, high } = bar.value.extent();
        let up = bar.value.number >= 0.0;
        let end = height(area, y, if up { high } else { low });
        if self.way == Way::Absent || !area.holds((area.left, end)) {
            return;
        }
        let middle = left + width / 2.0;
        let turned_x = (middle + SMALL_SIZE * 0.36).round();
        let (at, anchor) = match (self.way, up) {
            (Way::Turned, true) => ((turned_x, end - 5.0), Anchor::Start),
            (Way::Turned, false) => ((turned_x, end + 5.0), Anchor::End),
            (_, true) => ((middle, end - 5.0), Anchor::Middle),
            (_, false) => ((middle, end + 15.0), Anchor::Middle),
        };
        let text = Text::new(self.alike.write(bar.value.number), at, SMALL_SIZE, anchor);
        scene.text(if self.way == Way::Turned {
            text.turned()
        } else {
            text
        });
    }
}
