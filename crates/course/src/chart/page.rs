//! The page of a figure: its title and legend, and what is left for the plot.

use super::common::Common;
use super::font::Fonts;
use super::legend::{self, Entry};
use super::scene::{Anchor, Scene, Text};
use super::style::TITLE_SIZE;
use super::text::{Room, fit, fit_whole, one_line};
use crate::error::Result;

/// A figure under construction.
pub(super) struct Page<'c> {
    pub scene: Scene,
    pub fonts: &'static Fonts,
    pub common: &'c Common,
    /// Everything above is taken.
    pub top: f64,
}

impl<'c> Page<'c> {
    /// A page with the chart's title.
    pub fn open(common: &'c Common, size: (u32, u32)) -> Result<Self> {
        let mut page = Self {
            scene: Scene::new(size),
            fonts: Fonts::load()?,
            common,
            top: 12.0,
        };
        page.title();
        Ok(page)
    }

    pub fn width(&self) -> f64 {
        f64::from(self.scene.width)
    }

    pub fn height(&self) -> f64 {
        f64::from(self.scene.height)
    }

    fn title(&mut self) {
        let room = Room {
            bold: true,
            size: TITLE_SIZE,
            smallest: 15.0,
            width: self.width() - 40.0,
            lines: 3,
        };
        let text = one_line(&self.common.title);
        // A title a little too long shrinks a little; a longer one is broken.
        let in_one_line = Room {
            smallest: 17.0,
            lines: 1,
            ..room
        };
        let title = Some(&text)
            .filter(|text| text.len() < 1000)
            .and_then(|text| fit_whole(self.fonts, text, in_one_line))
            .unwrap_or_else(|| fit(self.fonts, &text, room));
        for line in &title.lines {
            let baseline = self.top + (title.size * 0.95).round();
            let at = (self.width() / 2.0, baseline);
            let text = Text::new(line, at, title.size, Anchor::Middle).bold();
            self.scene.text(text);
            self.top += title.leading();
        }
        self.top += 8.0;
    }

    /// Rows of samples and names below the title.
    pub fn legend(&mut self, entries: &[Entry]) {
        let (fonts, width) = (self.fonts, self.width());
        self.top = legend::draw(&mut self.scene, fonts, entries, width, self.top);
    }
}
