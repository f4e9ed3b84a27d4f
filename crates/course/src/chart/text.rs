//! Making a text fit: breaking it into lines, shrinking it, and at last cutting it.

use super::font::Fonts;

/// A text broken into lines of one size.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Fitted {
    pub lines: Vec<String>,
    pub size: f64,
}

impl Fitted {
    /// The distance from one baseline to the next.
    pub fn leading(&self) -> f64 {
        (self.size * 1.25).round()
    }

    pub fn height(&self) -> f64 {
        self.leading() * self.lines.len() as f64
    }
}

/// How a text may be fitted.
#[derive(Debug, Clone, Copy)]
pub(super) struct Room {
    pub bold: bool,
    pub size: f64,
    pub smallest: f64,
    pub width: f64,
    pub lines: usize,
}

/// Fits `text`: first breaks it between words, then shrinks it, then breaks inside words,
/// and only at last cuts it with an ellipsis.
pub(super) fn fit(fonts: &Fonts, text: &str, room: Room) -> Fitted {
    // No figure has room for more, and measuring a whole book would take long.
    let end = text.char_indices().nth(2000).map_or(text.len(), |c| c.0);
    let text = &text[..end];
    fit_whole(fonts, text, room).unwrap_or_else(|| squeeze(fonts, text, room))
}

/// Fits `text` with its words whole, if that is possible; its lines become about equally long.
pub(super) fn fit_whole(fonts: &Fonts, text: &str, room: Room) -> Option<Fitted> {
    let mut size = room.size;
    while size >= room.smallest {
        let room = Room { size, ..room };
        let lines = wrap(fonts, text, room, false);
        if fits(fonts, &lines, room) {
            let lines = balanced(fonts, text, room, lines);
            return Some(Fitted { lines, size });
        }
        size -= 1.0;
    }
    None
}

fn fits(fonts: &Fonts, lines: &[String], room: Room) -> bool {
    lines.len() <= room.lines
        && lines
            .iter()
            .all(|line| fonts.width(line, room.size, room.bold) <= room.width)
}

/// The lines broken at the narrowest width that needs no more of them.
fn balanced(fonts: &Fonts, text: &str, room: Room, mut best: Vec<String>) -> Vec<String> {
    let (mut low, mut high) = (room.width / 4.0, room.width);
    for _ in 0..8 {
        let width = (low + high) / 2.0;
        let narrow = Room {
            width,
            lines: best.len(),
            ..room
        };
        let lines = wrap(fonts, text, narrow, false);
        if fits(fonts, &lines, narrow) {
            (best, high) = (lines, width);
        } else {
            low = width;
        }
    }
    best
}

fn squeeze(fonts: &Fonts, text: &str, room: Room) -> Fitted {
    let size = room.smallest;
    let room = Room { size, ..room };
    let mut lines = wrap(fonts, text, room, true);
    if lines.len() > room.lines {
        lines.truncate(room.lines);
        if let Some(last) = lines.last_mut() {
            while !last.is_empty() && fonts.width(&format!("{last}…"), size, room.bold) > room.width
            {
                last.pop();
            }
            last.push('…');
        }
    }
    Fitted { lines, size }
}

/// Cuts the middle out of a text so that it fits into one line: names often differ at an end.
pub(super) fn cut(fonts: &Fonts, text: &str, room: Room) -> String {
    if fonts.width(text, room.size, room.bold) <= room.width {
        return text.into();
    }
    let letters: Vec<char> = text.chars().collect();
    // No font has letters narrower than a tenth of an em, so more need not be tried.
    let most = (room.width / room.size * 10.0) as usize;
    let mut kept = most.min(letters.len().saturating_sub(1));
    loop {
        let (head, tail) = (kept.div_ceil(2), kept / 2);
        let head: String = letters[..head].iter().collect();
        let tail: String = letters[letters.len() - tail..].iter().collect();
        let short = format!("{}…{}", head.trim_end(), tail.trim_start());
        if kept == 0 || fonts.width(&short, room.size, room.bold) <= room.width {
            return short;
        }
        kept -= 1;
    }
}

/// A learner's text without line breaks, control characters and outer spaces.
pub(super) fn one_line(text: &str) -> String {
    let spaced = text.replace(
        |c: char| c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}'),
        " ",
    );
    spaced.trim().to_string()
}

/// Fills lines with words; words that are wider than a line are broken only `inside_words`.
fn wrap(fonts: &Fonts, text: &str, room: Room, inside_words: bool) -> Vec<String> {
    let width = |text: &str| fonts.width(text, room.size, room.bold);
    let mut lines = vec![String::new()];
    let mut used = 0.0;
    for chunk in chunks(text) {
        let pieces: Vec<&str> = if inside_words && width(chunk.trim_end()) > room.width {
            chunk.split_inclusive(|_| true).collect()
        } else {
            vec![chunk]
        };
        for piece in pieces {
            if used > 0.0 && used + width(piece.trim_end()) > room.width {
                lines.push(String::new());
                used = 0.0;
            }
            if let Some(line) = lines.last_mut() {
                line.push_str(piece);
            }
            used += width(piece);
        }
    }
    for line in &mut lines {
        line.truncate(line.trim_end().len());
    }
    lines.retain(|line| !line.is_empty());
    lines
}

/// Pieces after each of which a line may end; together they are the text.
fn chunks(text: &str) -> Vec<&str> {
    let mut chunks = Vec::new();
    let mut start = 0;
    let mut letters = text.char_indices().peekable();
    while let Some((_, c)) = letters.next() {
        let Some(&(next, after)) = letters.peek() else {
            break;
        };
        let ends = match c {
            ' ' => after != ' ',
            '-' | '–' | '_' | '/' | '+' | '.' => after.is_alphabetic(),
            _ => false,
        };
        if ends {
            chunks.push(&text[start..next]);
            start = next;
        }
    }
    chunks.push(&text[start..]);
    chunks
}

#[cfg(test)]
mod tests {
    use super::*;

    fn room(width: f64, lines: usize) -> Room {
        Room {
            bold: false,
            size: 18.0,
            smallest: 13.0,
            width,
            lines,
        }
    }

    #[test]
    fn a_long_text_wraps_then_shrinks_then_is_cut() {
        let fonts = Fonts::load().unwrap();
        let text = "low-rank adaptation of a weight";
        let wrapped = fit(fonts, text, room(200.0, 2));
        assert_eq!((wrapped.lines.len(), wrapped.size), (2, 18.0));
        let shrunk = fit(fonts, text, room(250.0, 1));
        assert!(shrunk.lines.len() == 1 && shrunk.size < 18.0);
        let short = fit(fonts, text, room(100.0, 1));
        assert!(short.lines[0].ends_with('…'), "{short:?}");
    }

    #[test]
    fn lines_are_balanced_and_end_at_good_places() {
        let fonts = Fonts::load().unwrap();
        let title = fit(fonts, "one two three four five six seven", room(270.0, 2));
        assert_eq!(title.lines, ["one two three", "four five six seven"]);
        let name = fit(fonts, "model.layers.0.self_attn.q_proj", room(150.0, 3));
        assert_eq!(name.lines, ["model.layers.0.", "self_attn.q_proj"]);
    }

    #[test]
    fn a_name_keeps_both_ends() {
        let fonts = Fonts::load().unwrap();
        let name = cut(fonts, "model.layers.0.self_attn.q_proj", room(150.0, 1));
        assert!(
            name.starts_with("model") && name.ends_with("q_proj"),
            "{name}"
        );
    }

    #[test]
    fn nothing_fitted_is_wider_than_its_room() {
        let fonts = Fonts::load().unwrap();
        let long = "x".repeat(5000);
        for text in ["model.layers.0.self_attn.q_proj", "a b", &long, "–––– –––"] {
            for width in [20.0, 60.0, 300.0] {
                let fitted = fit(fonts, text, room(width, 3));
                for line in &fitted.lines {
                    assert!(fonts.width(line, fitted.size, false) <= width, "{line}");
                }
                assert!(fitted.lines.len() <= 3 && fitted.size >= 13.0);
            }
        }
    }
}
