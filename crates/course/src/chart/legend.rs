//! The legend: rows between title and plot, where no data can be in the way.

use super::colour::{WHITE, blend, series};
use super::common::Common;
use super::font::Fonts;
use super::scene::{Anchor, Rect, Scene, Text};
use super::style::{SMALL_SIZE, bar, marker, reference_line, series_line};
use super::text::{Room, cut, one_line};

/// What the sample before a name looks like; the numbers are those of series or reference.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sample {
    Line(usize),
    Bare(usize),
    Points(usize),
    Band(usize),
    Bar(usize),
    Reference(usize),
    Upright(usize),
}

/// One name in the legend.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub sample: Sample,
    pub name: String,
}

/// How strongly a band tints the white behind it.
pub(super) const BAND_ALPHA: f64 = 0.22;

const SAMPLE_WIDTH: f64 = 38.0;
const AFTER_SAMPLE: f64 = 7.0;
const BETWEEN: f64 = 24.0;
const ROW: f64 = 21.0;

/// Entries for series drawn with `sample` and for the reference lines of a chart.
pub(super) fn entries<'n>(
    names: impl IntoIterator<Item = &'n str>,
    sample: impl Fn(usize) -> Sample,
    common: &Common,
) -> Vec<Entry> {
    let entry = |sample, name: &str| Entry {
        sample,
        name: one_line(name),
    };
    let series = names
        .into_iter()
        .enumerate()
        .map(|(index, name)| entry(sample(index), name));
    let references = (0..).zip(&common.references);
    let across = references.map(|(index, (name, _))| entry(Sample::Reference(index), name));
    let references = (common.references.len()..).zip(&common.upright);
    let upright = references.map(|(index, (name, _))| entry(Sample::Upright(index), name));
    series.chain(across).chain(upright).collect()
}

/// Draws the legend from `top` on; returns where it ends.
pub(super) fn draw(
    scene: &mut Scene,
    fonts: &Fonts,
    entries: &[Entry],
    width: f64,
    top: f64,
) -> f64 {
    let widest = width - 40.0;
    let entries: Vec<(Entry, f64)> = entries.iter().map(|e| sized(fonts, e, widest)).collect();
    let mut y = top;
    for row in balanced(&entries, widest) {
        let used: f64 = row.iter().map(|(_, w)| w + BETWEEN).sum::<f64>() - BETWEEN;
        let mut x = ((width - used) / 2.0).round();
        for (entry, entry_width) in row {
            one(scene, entry, x, y);
            x += entry_width + BETWEEN;
        }
        y += ROW;
    }
    if entries.is_empty() { y } else { y + 7.0 }
}

/// An entry that is not too wide, and its width.
fn sized(fonts: &Fonts, entry: &Entry, widest: f64) -> (Entry, f64) {
    let room = Room {
        bold: false,
        size: SMALL_SIZE,
        smallest: SMALL_SIZE,
        width: widest - SAMPLE_WIDTH - AFTER_SAMPLE,
        lines: 1,
    };
    let name = cut(fonts, &entry.name, room);
    let width = SAMPLE_WIDTH + AFTER_SAMPLE + fonts.width(&name, SMALL_SIZE, false);
    let entry = Entry {
        name,
        sample: entry.sample,
    };
    (entry, width)
}

/// The rows at the narrowest width that needs no more of them.
fn balanced(entries: &[(Entry, f64)], widest: f64) -> Vec<Vec<&(Entry, f64)>> {
    let mut best = rows(entries, widest);
    let mut width = widest;
    while width > 0.3 * widest {
        width -= 10.0;
        let narrow = rows(entries, width);
        let used = |row: &Vec<&(Entry, f64)>| row.iter().map(|e| e.1 + BETWEEN).sum::<f64>();
        if narrow.len() > best.len() || narrow.iter().any(|r| used(r) - BETWEEN > width) {
            break;
        }
        best = narrow;
    }
    best
}

fn rows(entries: &[(Entry, f64)], widest: f64) -> Vec<Vec<&(Entry, f64)>> {
    let mut rows: Vec<Vec<&(Entry, f64)>> = Vec::new();
    let mut used = 0.0;
    for entry in entries {
        let needed = entry.1 + BETWEEN;
        match rows.last_mut() {
            Some(row) if used + entry.1 <= widest => row.push(entry),
            _ => {
                rows.push(vec![entry]);
                used = 0.0;
            }
        }
        used += needed;
    }
    rows
}

fn one(scene: &mut Scene, entry: &Entry, x: f64, top: f64) {
    let middle = top + 9.0;
    let right = x + SAMPLE_WIDTH;
    let line = [(x, middle), (right, middle)];
    let all = Rect::new(x, top, right, top + ROW);
    match entry.sample {
        Sample::Line(index) => {
            series_line(scene, index, &line, all);
            marker(scene, index, ((x + right) / 2.0, middle));
        }
        Sample::Bare(index) => series_line(scene, index, &line, all),
        Sample::Points(index) => marker(scene, index, (right - 10.0, middle)),
        Sample::Band(index) => {
            let tint = blend(WHITE, series(index), BAND_ALPHA);
            scene.rect(Rect::new(x, middle - 7.0, right, middle + 7.0), tint);
            series_line(scene, index, &line, all);
            marker(scene, index, ((x + right) / 2.0, middle));
        }
        Sample::Bar(index) => {
            let swatch = Rect::new(right - 26.0, middle - 7.0, right, middle + 7.0);
            bar(scene, index, swatch);
        }
        Sample::Reference(index) => reference_line(scene, index, line),
        Sample::Upright(index) => {
            let x = right - 6.0;
            reference_line(scene, index, [(x, top + 18.0), (x, top)]);
        }
    }
    let at = (right + AFTER_SAMPLE, (middle + SMALL_SIZE * 0.36).round());
    scene.text(Text::new(&entry.name, at, SMALL_SIZE, Anchor::Start));
}
