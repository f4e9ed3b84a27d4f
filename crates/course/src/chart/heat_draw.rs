//! The cells and the colour bar of a heat map.

use super::axis::Scale;
use super::check::Extent;
use super::colour::{AXIS, INK, Rgb, diverging, text_on, viridis};
use super::font::Fonts;
use super::heat::{Diverging, HeatMap};
use super::number::{Alike, plain};
use super::page::Page;
use super::plot::{Along, frame};
use super::scene::{Anchor, Rect, Scene, Text};
use super::style::{LABEL_SIZE, SMALL_SIZE};
use super::text::{Room, cut, one_line};
use super::ticks::Tick;
use super::value::Value;
use crate::error::Result;

const BAR_WIDTH: f64 = 18.0;
const BAR_GAP: f64 = 20.0;
const STEPS: usize = 64;

/// Lays out the whole map.
pub(super) fn scene(map: &HeatMap, range: Extent) -> Result<(Scene, &'static Fonts)> {
    let mut page = Page::open(&map.common, map.common.size)?;
    let scale = Scale::new(range.low, range.high, false);
    let ticks = scale.ticks(6, false);
    let tick_width = ticks
        .iter()
        .map(|t| page.fonts.width(&t.label, SMALL_SIZE, false))
        .fold(0.0, f64::max);
    let unit = if map.unit.is_some() { 24.0 } else { 4.0 };
    let sides = if map.diverging.is_some() { 22.0 } else { 0.0 };
    let right = (BAR_GAP + BAR_WIDTH + 8.0 + tick_width + sides + unit + 12.0).ceil();
    let across = Along::Names(&map.columns);
    let area = frame(&mut page, &across, &Along::Names(&map.rows), right)?;
    cells(map, &mut page, area, &scale)?;
    colour_bar(map, &mut page, area, &scale, &ticks);
    Ok((page.scene, page.fonts))
}

fn cells(map: &HeatMap, page: &mut Page<'_>, area: Rect, scale: &Scale) -> Result<()> {
    let (rows, columns) = (map.rows.len() as f64, map.columns.len() as f64);
    let (width, height) = (area.width() / columns, area.height() / rows);
    map.common.check().need(width >= 1.0 && height >= 1.0, || {
        format!(
            "has {columns} columns and {rows} rows, more than there are pixels: \
                 draw a part of it, or give .size() more"
        )
    })?;
    let texts = Texts::fit(map, page, (width, height));
    for (row, values) in map.values.iter().enumerate() {
        for (column, value) in values.iter().enumerate() {
            // Edges between whole pixels, so that no seams shine through.
            let x = |column: usize| (area.left + width * column as f64).round();
            let y = |row: usize| (area.top + height * row as f64).round();
            let at = Rect::new(x(column), y(row), x(column + 1), y(row + 1));
            let fill = colour(map, scale, scale.place(value.number));
            page.scene.rect(at, fill);
            texts.draw(&mut page.scene, value, at, text_on(fill));
        }
    }
    Ok(())
}

/// The colour at a place of the colour bar, 0 at its lower end.
fn colour(map: &HeatMap, scale: &Scale, place: f64) -> Rgb {
    match &map.diverging {
        None => viridis(place),
        Some(Diverging { center, .. }) => {
            let center = scale.place(*center);
            diverging((place - center) / center.max(1.0 - center))
        }
    }
}

/// What is written into the cells.
struct Texts {
    alike: Alike,
    numbers: bool,
    ranges: bool,
}

const LEADING: f64 = 16.0;

impl Texts {
    /// Numbers if all cells have room for theirs, and ranges if all have room for both.
    fn fit(map: &HeatMap, page: &Page<'_>, (width, height): (f64, f64)) -> Self {
        let values = || map.values.iter().flatten();
        let alike = Alike::of(values().flat_map(|value| {
            let Extent { low, high } = value.extent();
            [value.number, low, high]
        }));
        let fits = |text: String| page.fonts.width(&text, SMALL_SIZE, false) + 6.0 <= width;
        let numbers =
            height >= SMALL_SIZE + 4.0 && values().all(|value| fits(alike.write(value.number)));
        let mut ranges = values().filter_map(|value| range(alike, value));
        let ranges = numbers && height >= SMALL_SIZE + LEADING + 4.0 && ranges.all(fits);
        Self {
            alike,
            numbers,
            ranges,
        }
    }

    fn draw(&self, scene: &mut Scene, value: &Value, cell: Rect, colour: Rgb) {
        if !self.numbers {
            return;
        }
        let mut lines = vec![self.alike.write(value.number)];
        lines.extend(range(self.alike, value).filter(|_| self.ranges));
        let (x, y) = cell.middle();
        let first = y - LEADING * (lines.len() - 1) as f64 / 2.0;
        for (row, line) in lines.into_iter().enumerate() {
            let y = first + LEADING * row as f64 + SMALL_SIZE * 0.36;
            let text = Text::new(line, (x, y.round()), SMALL_SIZE, Anchor::Middle);
            scene.text(text.colour(colour));
        }
    }
}

fn range(alike: Alike, value: &Value) -> Option<String> {
    let (low, high) = value.whisker?;
    Some(format!("{} to {}", alike.write(low), alike.write(high)))
}

fn colour_bar(map: &HeatMap, page: &mut Page<'_>, area: Rect, scale: &Scale, ticks: &[Tick]) {
    let left = area.right + BAR_GAP;
    let right = left + BAR_WIDTH;
    let edge = |i: usize| (area.bottom - area.height() * i as f64 / STEPS as f64).round();
    for i in 0..STEPS {
        let at = Rect::new(left, edge(i + 1), right, edge(i));
        page.scene
            .rect(at, colour(map, scale, (i as f64 + 0.5) / STEPS as f64));
    }
    if let Some(Diverging { center, .. }) = &map.diverging {
        let y = area.bottom - scale.place(*center) * area.height();
        page.scene.across(left - 3.0, right, y, INK);
    }
    let mut widest = 0.0_f64;
    for tick in ticks {
        let y = area.bottom - scale.place(tick.value) * area.height();
        page.scene.across(right, right + 4.0, y, AXIS);
        let at = (right + 8.0, (y + SMALL_SIZE * 0.36).round());
        page.scene
            .text(Text::new(&tick.label, at, SMALL_SIZE, Anchor::Start));
        widest = widest.max(page.fonts.width(&tick.label, SMALL_SIZE, false));
    }
    let mut x = right + 8.0 + widest + 8.0 + LABEL_SIZE * 0.8;
    let mut beside = |text: String| {
        let at = (x.round(), area.middle().1);
        let text = Text::new(text, at, LABEL_SIZE, Anchor::Middle);
        page.scene.text(text.turned());
        x += 22.0;
    };
    let room = |width: f64| Room {
        bold: false,
        size: LABEL_SIZE,
        smallest: LABEL_SIZE,
        width,
        lines: 1,
    };
    let fonts = page.fonts;
    if let Some(Diverging {
        center,
        below,
        above,
    }) = &map.diverging
    {
        // It reads from bottom to top, as the colours rise.
        let middle = format!(" ← {} → ", plain(*center));
        let (below, above) = (one_line(below), one_line(above));
        let whole = format!("{below}{middle}{above}");
        if fonts.width(&whole, LABEL_SIZE, false) <= area.height() {
            beside(whole);
        } else {
            let half = room((area.height() - fonts.width(&middle, LABEL_SIZE, false)) / 2.0);
            let side = |text: &str| cut(fonts, text, half);
            beside(format!("{}{middle}{}", side(&below), side(&above)));
        }
    }
    if let Some(unit) = &map.unit {
        beside(cut(fonts, &one_line(unit), room(area.height())));
    }
}
