//! Names below a plot: in a row if there is room, broken into lines, or turned upright.

use super::font::Fonts;
use super::scene::{Anchor, Rect, Scene, Text};
use super::style::SMALL_SIZE;
use super::text::{Fitted, Room, cut, fit_whole};

const LEADING: f64 = 16.0;
/// A turned name needs this much width.
const NARROWEST: f64 = 16.0;

/// Names fitted under slots of equal width.
pub(super) enum Names {
    Flat(Vec<Fitted>),
    Turned { names: Vec<String>, every: usize },
}

impl Names {
    /// Fits `names` under slots `slot` wide; turned ones may be `tallest` high.
    pub fn fit(fonts: &Fonts, names: &[String], slot: f64, tallest: f64) -> Self {
        let room = Room {
            bold: false,
            size: SMALL_SIZE,
            smallest: SMALL_SIZE,
            width: slot - 8.0,
            lines: 3,
        };
        let flat: Option<Vec<Fitted>> = names.iter().map(|n| fit_whole(fonts, n, room)).collect();
        if let Some(flat) = flat {
            return Self::Flat(flat);
        }
        let room = Room {
            width: tallest,
            ..room
        };
        let wide = |name: &String| fonts.width(name, SMALL_SIZE, false) > tallest;
        let names = if names.iter().any(wide) {
            without_shared_ends(names)
        } else {
            names.to_vec()
        };
        Self::Turned {
            names: names.iter().map(|name| cut(fonts, name, room)).collect(),
            every: (NARROWEST / slot).ceil().max(1.0) as usize,
        }
    }

    pub fn height(&self, fonts: &Fonts) -> f64 {
        match self {
            Self::Flat(names) => {
                let lines = names.iter().map(|n| n.lines.len()).max().unwrap_or(1);
                LEADING * lines as f64
            }
            Self::Turned { names, .. } => names
                .iter()
                .map(|n| fonts.width(n, SMALL_SIZE, false))
                .fold(0.0, f64::max)
                .ceil(),
        }
    }

    /// Draws the names below `area`, each under the middle of its slot.
    pub fn draw(&self, scene: &mut Scene, area: Rect) {
        let top = area.bottom + 7.0;
        match self {
            Self::Flat(names) => {
                for (name, x) in names.iter().zip(middles(area, names.len())) {
                    for (row, line) in name.lines.iter().enumerate() {
                        let at = (x, top + 11.0 + LEADING * row as f64);
                        scene.text(Text::new(line, at, SMALL_SIZE, Anchor::Middle));
                    }
                }
            }
            Self::Turned { names, every } => {
                let places = names.iter().zip(middles(area, names.len()));
                for (name, x) in places.step_by(*every) {
                    let at = ((x + SMALL_SIZE * 0.36).round(), top);
                    scene.text(Text::new(name, at, SMALL_SIZE, Anchor::End).turned());
                }
            }
        }
    }
}

/// The middles of `count` slots from left to right.
fn middles(area: Rect, count: usize) -> impl Iterator<Item = f64> {
    let slot = area.width() / count as f64;
    (0..count).map(move |i| area.left + slot * (i as f64 + 0.5))
}

/// Names without the words that all of them start or end with: in a long list of weights only
/// the rest tells them apart.
fn without_shared_ends(names: &[String]) -> Vec<String> {
    let ends = |c: char| matches!(c, '.' | '/' | ' ');
    let split: Vec<Vec<&str>> = names
        .iter()
        .map(|n| n.split_inclusive(ends).collect())
        .collect();
    let shared = |from_end: bool| {
        let word = |words: &Vec<&str>, i: usize| {
            let at = if from_end {
                words.len().checked_sub(i + 1)?
            } else {
                i
            };
            words.get(at).map(|w| w.to_string())
        };
        let alike = |i: &usize| {
            let first = split.first().and_then(|words| word(words, *i));
            first.is_some() && split.iter().all(|words| word(words, *i) == first)
        };
        (0..).take_while(alike).count()
    };
    let (head, tail) = (shared(false), shared(true));
    // Something must be left of every name.
    if split.iter().any(|words| words.len() <= head + tail) {
        return names.to_vec();
    }
    let dots = |count: usize| if count > 0 { "…" } else { "" };
    let middle = |words: &Vec<&str>| words[head..words.len() - tail].concat();
    split
        .iter()
        .map(|words| format!("{}{}{}", dots(head), middle(words), dots(tail)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_ends_are_left_out() {
        let names = |list: &[&str]| list.iter().map(|n| n.to_string()).collect::<Vec<_>>();
        let weights = names(&[
            "model.layers.0.q_proj.weight",
            "model.layers.1.v_proj.weight",
        ]);
        assert_eq!(
            without_shared_ends(&weights),
            ["…0.q_proj.…", "…1.v_proj.…"]
        );
        let nothing = names(&["a.b", "a.b.b"]);
        assert_eq!(without_shared_ends(&nothing), nothing);
        assert_eq!(
            without_shared_ends(&names(&["alpha", "beta"])),
            ["alpha", "beta"]
        );
        assert!(without_shared_ends(&[]).is_empty());
    }
}
