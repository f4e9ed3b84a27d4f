//! The bundled fonts: loading, registering with plotters, measuring.

use std::sync::OnceLock;

use ab_glyph::{Font, FontRef, GlyphId, PxScale, ScaleFont};
use plotters::style::{FontStyle, register_font};

use crate::error::{Error, Result};

/// The font of every text: the bundled one, then close relatives for viewers of the SVG.
pub(super) const FAMILY: &str = "DejaVu Sans, Verdana, sans-serif";

static REGULAR: &[u8] = include_bytes!("../../assets/DejaVuSans.ttf");
static BOLD: &[u8] = include_bytes!("../../assets/DejaVuSans-Bold.ttf");

/// Both weights, ready to measure and to draw with.
pub(super) struct Fonts {
    regular: FontRef<'static>,
    bold: FontRef<'static>,
}

impl Fonts {
    /// The bundled fonts; read and registered once, then shared.
    pub fn load() -> Result<&'static Self> {
        static FONTS: OnceLock<Option<Fonts>> = OnceLock::new();
        FONTS
            .get_or_init(|| {
                register().ok()?;
                Some(Fonts {
                    regular: FontRef::try_from_slice(REGULAR).ok()?,
                    bold: FontRef::try_from_slice(BOLD).ok()?,
                })
            })
            .as_ref()
            .ok_or_else(unreadable)
    }

    pub fn face(&self, bold: bool) -> &FontRef<'static> {
        if bold { &self.bold } else { &self.regular }
    }

    /// The scale at which `size` pixels make one em, as in CSS. (ab_glyph's own unit is the
    /// distance from the lowest to the highest edge of the font, 1.16 em for DejaVu Sans.)
    pub fn scale(&self, size: f64, bold: bool) -> PxScale {
        let face = self.face(bold);
        let em = face.units_per_em().unwrap_or(2048.0);
        PxScale::from(size as f32 * face.height_unscaled() / em)
    }

    /// The glyphs of `text` with the place of each, in pixels from the start, and the width.
    pub fn place(&self, text: &str, size: f64, bold: bool) -> (Vec<(GlyphId, f32)>, f32) {
        let face = self.face(bold).as_scaled(self.scale(size, bold));
        let mut x = 0.0;
        let mut last = None;
        let mut places = Vec::new();
        for c in text.chars() {
            let id = face.glyph_id(c);
            if let Some(last) = last {
                x += face.kern(last, id);
            }
            places.push((id, x));
            x += face.h_advance(id);
            last = Some(id);
        }
        (places, x)
    }

    /// The width of `text` in pixels.
    pub fn width(&self, text: &str, size: f64, bold: bool) -> f64 {
        f64::from(self.place(text, size, bold).1)
    }
}

/// Registers the bundled font with plotters, for cells that draw with plotters themselves.
///
/// Afterwards the family `"sans-serif"` works without any system font. The charts of this
/// module call it on their own; calling it again does no harm.
///
/// # Errors
///
/// When the bundled font cannot be read, which would be a fault of this crate.
///
/// ```
/// course::chart::register_fonts()?;
/// assert!(course::chart::register_fonts().is_ok());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn register_fonts() -> Result<()> {
    Fonts::load().map(|_| ())
}

fn register() -> Result<()> {
    for family in ["sans-serif", FAMILY] {
        register_font(family, FontStyle::Normal, REGULAR).map_err(|_| unreadable())?;
        register_font(family, FontStyle::Bold, BOLD).map_err(|_| unreadable())?;
    }
    Ok(())
}

fn unreadable() -> Error {
    Error::Chart {
        chart: "any chart".into(),
        problem: "the bundled font crates/course/assets/DejaVuSans.ttf cannot be read: \
                  restore it from the repository"
            .into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use plotters::style::IntoFont;

    #[test]
    fn widths_are_those_of_a_browser() {
        // DejaVu Sans: "0" is 1303 of 2048 units wide, so ten of them at 16 px are 101.8 px.
        let fonts = Fonts::load().unwrap();
        let width = fonts.width("0000000000", 16.0, false);
        assert!((width - 101.8).abs() < 0.1, "{width}");
        assert!(fonts.width("0000000000", 16.0, true) > width);
    }

    #[test]
    fn the_letters_of_the_course_are_there() {
        let fonts = Fonts::load().unwrap();
        for c in "aZ09ÄäßéŁαβΔσ×·±≤≥≈−→←∞√∑∂⁰¹²³⁴⁵⁶⁷⁸⁹⁻₀₁ₙ…–—“”ЖяЪ€".chars()
        {
            assert_ne!(fonts.face(false).glyph_id(c).0, 0, "{c} is missing");
            assert_ne!(fonts.face(true).glyph_id(c).0, 0, "{c} is missing in bold");
        }
    }

    #[test]
    fn plotters_knows_the_font() {
        register_fonts().unwrap();
        assert!(("sans-serif", 20).into_font().layout_box("x").is_ok());
    }
}
