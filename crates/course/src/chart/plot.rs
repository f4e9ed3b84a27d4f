//! The frame of a plot: margins measured from the texts in them, axes, ticks and grid.

use super::axis::Scale;
use super::colour::{AXIS, GRID, GRID_MINOR};
use super::names::Names;
use super::page::Page;
use super::scene::{Anchor, Point, Rect, Text};
use super::style::{LABEL_SIZE, SMALL_SIZE, reference_line};
use super::text::{Fitted, Room, cut, fit, one_line};
use super::ticks::Tick;
use crate::error::Result;

/// What an axis counts.
pub(super) enum Along<'a> {
    Numbers { scale: Scale, whole: bool },
    Names(&'a [String]),
}

impl Along<'_> {
    fn ticks(&self, length: f64, each: f64) -> Vec<Tick> {
        match self {
            Self::Numbers { scale, whole } => scale.ticks((length / each) as usize, *whole),
            Self::Names(_) => Vec::new(),
        }
    }
}

/// Space between a tick label and the axis.
const TICK_GAP: f64 = 8.0;
const EDGE: f64 = 14.0;

/// The texts around a plot, fitted and measured.
struct Margins {
    x_label: Fitted,
    y_label: Fitted,
    x_ticks: Vec<Tick>,
    y_ticks: Vec<Tick>,
    x_names: Option<Names>,
    y_names: Vec<String>,
    area: Rect,
}

/// Lays out and draws the frame; returns the area inside. `right` is kept free beside it.
pub(super) fn frame(page: &mut Page<'_>, x: &Along<'_>, y: &Along<'_>, right: f64) -> Result<Rect> {
    let margins = measure(page, x, y, right);
    let area = margins.area;
    page.common
        .check()
        .need(area.width() >= 100.0 && area.height() >= 80.0, || {
            format!(
                "a figure of {} × {} pixels leaves no room for the data beside its texts: \
                 give .size() more, use fewer series or shorter names",
                page.scene.width, page.scene.height
            )
        })?;
    labels(page, &margins);
    match y {
        Along::Numbers { scale, .. } => y_ticks(page, &margins, scale),
        Along::Names(_) => row_names(page, &margins),
    }
    if let Along::Numbers { scale, .. } = x {
        x_ticks(page, &margins, scale);
    }
    if let Some(names) = &margins.x_names {
        names.draw(&mut page.scene, area);
    }
    // A grid of cells has its own edges.
    if matches!(y, Along::Numbers { .. }) {
        page.scene
            .across(area.left, area.right + 1.0, area.bottom, AXIS);
        page.scene.down(area.left, area.top, area.bottom, AXIS);
    }
    Ok(area)
}

fn measure(page: &Page<'_>, x: &Along<'_>, y: &Along<'_>, right: f64) -> Margins {
    let fonts = page.fonts;
    // Heights first, as if names took one line; then widths, from which names get theirs.
    let rough = page.height() - page.top - 70.0;
    let y_ticks = y.ticks(rough, 46.0);
    let y_names = row_texts(page, y);
    let widest = y_ticks
        .iter()
        .map(|t| &t.label)
        .chain(&y_names)
        .map(|text| fonts.width(text, SMALL_SIZE, false))
        .fold(0.0, f64::max);
    let y_label = axis_label(page, &page.common.y_label, rough.max(60.0));
    let left = (EDGE + y_label.height() + widest + TICK_GAP + 2.0).ceil();
    let right = page.width() - right.max(EDGE + 8.0);
    let width = (right - left).max(1.0);
    let x_label = axis_label(page, &page.common.x_label, width);
    let x_names = match x {
        Along::Names(names) => {
            let slot = width / names.len().max(1) as f64;
            Some(Names::fit(fonts, names, slot, 0.36 * page.height()))
        }
        Along::Numbers { .. } => None,
    };
    let under = x_names.as_ref().map_or(16.0, |names| names.height(fonts));
    let bottom = page.height() - (TICK_GAP + under + 6.0 + x_label.height() + 6.0).ceil();
    Margins {
        x_label,
        y_label,
        x_ticks: x.ticks(width, 72.0),
        y_ticks,
        x_names,
        y_names,
        area: Rect::new(left, page.top.ceil() + 4.0, right, bottom),
    }
}

fn axis_label(page: &Page<'_>, label: &str, width: f64) -> Fitted {
    let room = Room {
        bold: false,
        size: LABEL_SIZE,
        smallest: SMALL_SIZE,
        width,
        lines: 2,
    };
    fit(page.fonts, &one_line(label), room)
}

fn row_texts(page: &Page<'_>, y: &Along<'_>) -> Vec<String> {
    let Along::Names(names) = y else {
        return Vec::new();
    };
    let room = Room {
        bold: false,
        size: SMALL_SIZE,
        smallest: SMALL_SIZE,
        width: 0.28 * page.width(),
        lines: 1,
    };
    names
        .iter()
        .map(|name| cut(page.fonts, name, room))
        .collect()
}

fn labels(page: &mut Page<'_>, margins: &Margins) {
    let (x, y) = margins.area.middle();
    let label = &margins.x_label;
    let top = page.height() - 8.0 - label.height();
    for (row, line) in label.lines.iter().enumerate() {
        let down = label.leading() * row as f64 + label.size * 0.95;
        let at = (x, (top + down).round());
        page.scene
            .text(Text::new(line, at, label.size, Anchor::Middle));
    }
    let label = &margins.y_label;
    for (row, line) in label.lines.iter().enumerate() {
        let along = EDGE - 6.0 + label.leading() * row as f64 + label.size * 0.95;
        let text = Text::new(line, (along.round(), y), label.size, Anchor::Middle);
        page.scene.text(text.turned());
    }
}

fn y_ticks(page: &mut Page<'_>, margins: &Margins, scale: &Scale) {
    let area = margins.area;
    for tick in &margins.y_ticks {
        let y = area.bottom - scale.place(tick.value) * area.height();
        let labelled = !tick.label.is_empty();
        let colour = if labelled { GRID } else { GRID_MINOR };
        page.scene.across(area.left, area.right, y, colour);
        if labelled {
            page.scene.across(area.left - 4.0, area.left, y, AXIS);
            left_of(page, area, y, &tick.label);
        }
    }
}

fn left_of(page: &mut Page<'_>, area: Rect, y: f64, label: &str) {
    let at = (area.left - TICK_GAP, y + SMALL_SIZE * 0.36);
    let at = (at.0, at.1.round());
    page.scene
        .text(Text::new(label, at, SMALL_SIZE, Anchor::End));
}

fn row_names(page: &mut Page<'_>, margins: &Margins) {
    let area = margins.area;
    let slot = area.height() / margins.y_names.len().max(1) as f64;
    let every = (16.0 / slot).ceil().max(1.0) as usize;
    for (row, name) in margins.y_names.iter().enumerate().step_by(every) {
        let y = area.top + slot * (row as f64 + 0.5);
        left_of(page, area, y, name);
    }
}

fn x_ticks(page: &mut Page<'_>, margins: &Margins, scale: &Scale) {
    let area = margins.area;
    // Where the last label ended, so that none runs into the next.
    let mut free = f64::NEG_INFINITY;
    for tick in &margins.x_ticks {
        let x = area.left + scale.place(tick.value) * area.width();
        let half = page.fonts.width(&tick.label, SMALL_SIZE, false) / 2.0;
        let labelled = !tick.label.is_empty() && x - half > free && x + half < page.width() - 2.0;
        let colour = if labelled { GRID } else { GRID_MINOR };
        page.scene.down(x, area.top, area.bottom, colour);
        if labelled {
            free = x + half + 6.0;
            page.scene.down(x, area.bottom, area.bottom + 5.0, AXIS);
            let at = (x, area.bottom + TICK_GAP + 11.0);
            page.scene
                .text(Text::new(&tick.label, at, SMALL_SIZE, Anchor::Middle));
        }
    }
}

/// The page's reference lines, where they are in sight.
pub(super) fn references(page: &mut Page<'_>, area: Rect, y: &Scale) {
    for (index, (_, value)) in page.common.references.iter().enumerate() {
        if y.holds(*value) {
            let at = area.bottom - y.place(*value) * area.height();
            let ends = [(area.left, at), (area.right, at)];
            reference_line(&mut page.scene, index, ends);
        }
    }
}

/// The page's upright reference lines; the x axis holds them all.
pub(super) fn upright_references(page: &mut Page<'_>, area: Rect, x: &Scale) {
    let before = page.common.references.len();
    for (index, (_, value)) in page.common.upright.iter().enumerate() {
        let at = area.left + x.place(*value) * area.width();
        let ends = [(at, area.bottom), (at, area.top)];
        reference_line(&mut page.scene, before + index, ends);
    }
}

/// Where a pair of values lies in `area`.
pub(super) fn place(area: Rect, x: &Scale, y: &Scale, at: Point) -> Point {
    (
        area.left + x.place(at.0) * area.width(),
        area.bottom - y.place(at.1) * area.height(),
    )
}
