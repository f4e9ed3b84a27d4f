//! A scene as an SVG that says what it shows.

use std::fmt::Write as _;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use plotters::prelude::{IntoDrawingArea, SVGBackend};

use super::colour::Rgb;
use super::font::FAMILY;
use super::paint::Painter;
use super::scene::{Anchor, Picture, Scene, Text};

/// Plotters counts in whole units, so its part of the file is drawn four times too large.
const ZOOM: u32 = 4;

/// The scene as an SVG file, or what went wrong in words.
pub(super) fn svg(scene: &Scene, title: &str, words: &str) -> Result<String, String> {
    let (width, height) = (scene.width, scene.height);
    let id = format!("chart-{:016x}", fingerprint(&format!("{title}\n{words}")));
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         viewBox=\"0 0 {width} {height}\" role=\"img\" \
         aria-labelledby=\"{id}-title {id}-desc\" font-family=\"{FAMILY}\">\n\
         <title id=\"{id}-title\">{}</title>\n<desc id=\"{id}-desc\">{}</desc>\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"#FFFFFF\"/>\n\
         <g transform=\"scale({})\" stroke-linejoin=\"round\">\n",
        escaped(title),
        escaped(words),
        1.0 / f64::from(ZOOM),
    );
    out.push_str(&shapes(scene)?);
    out.push_str("</g>\n");
    for picture in &scene.pictures {
        push_picture(&mut out, picture)?;
    }
    for text in &scene.texts {
        push_text(&mut out, text);
    }
    out.push_str("</svg>\n");
    Ok(out)
}

/// What plotters draws, without the `<svg>` tag around it.
fn shapes(scene: &Scene) -> Result<String, String> {
    let mut buffer = String::new();
    {
        let size = (scene.width * ZOOM, scene.height * ZOOM);
        let area = SVGBackend::with_string(&mut buffer, size).into_drawing_area();
        let painter = Painter {
            zoom: f64::from(ZOOM),
            vector: true,
        };
        painter.paint(&area, scene).map_err(|e| e.to_string())?;
        area.present().map_err(|e| e.to_string())?;
    }
    let inside = buffer
        .split_once('\n')
        .and_then(|(_, rest)| rest.rsplit_once("</svg>"))
        .map(|(inside, _)| inside)
        .ok_or("plotters wrote an SVG without its closing tag")?;
    Ok(inside.replace(" opacity=\"1\"", ""))
}

fn push_picture(out: &mut String, picture: &Picture) -> Result<(), String> {
    let bytes = super::raster::encode(picture.width, picture.height, &picture.rgb)?;
    // Writing to a String cannot fail.
    let _ = writeln!(
        out,
        "<image x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\" \
         style=\"image-rendering:pixelated\" href=\"data:image/png;base64,{}\"/>",
        picture.left,
        picture.top,
        picture.width,
        picture.height,
        STANDARD.encode(bytes),
    );
    Ok(())
}

fn push_text(out: &mut String, text: &Text) {
    let (x, y) = (hundredths(text.at.0), hundredths(text.at.1));
    let anchor = match text.anchor {
        Anchor::Start => "",
        Anchor::Middle => " text-anchor=\"middle\"",
        Anchor::End => " text-anchor=\"end\"",
    };
    let weight = if text.bold {
        " font-weight=\"bold\""
    } else {
        ""
    };
    let turn = if text.turned {
        format!(" transform=\"rotate(-90 {x} {y})\"")
    } else {
        String::new()
    };
    let _ = writeln!(
        out,
        "<text x=\"{x}\" y=\"{y}\" font-size=\"{}\" fill=\"{}\"{anchor}{weight}{turn}>{}</text>",
        text.size,
        hex(text.colour),
        escaped(&text.text),
    );
}

fn hundredths(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}

fn hex((r, g, b): Rgb) -> String {
    format!("#{r:02X}{g:02X}{b:02X}")
}

/// Text as XML wants it; characters that XML forbids become spaces.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '&' => out.push_str("&amp;"),
            '"' => out.push_str("&quot;"),
            '\n' => out.push('\n'),
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

/// The same number for the same text, on every machine (FNV-1a): two figures on one page
/// must not share their ids, and a figure must not change when it is drawn again.
fn fingerprint(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}
