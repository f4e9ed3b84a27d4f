//! A finished figure: a PNG, an SVG and a text, and how it shows itself in a notebook.

use std::fmt;
use std::io::Write as _;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::check::Check;
use super::font::Fonts;
use super::scene::Scene;
use super::{raster, svg, text};
use crate::error::{Error, Result};

/// Names the folder into which a figure goes instead of a notebook.
const FOLDER: &str = "COURSE_FIGURES";

/// A finished figure, drawn from a chart by `draw()`.
///
/// As the last value of a notebook cell it shows itself.
///
/// ```
/// use course::chart::BarChart;
///
/// let figure = BarChart::new("Sizes", "layer", "parameters")
///     .bar("full", 1024)
///     .bar("LoRA", 128)
///     .draw()?;
/// assert!(figure.png().starts_with(b"\x89PNG"));
/// assert!(figure.svg().starts_with("<svg"));
/// assert!(figure.describe().contains("1,024"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Figure {
    title: String,
    size: (u32, u32),
    png: Vec<u8>,
    svg: String,
    words: String,
}

impl Figure {
    /// Paints a scene into both formats.
    pub(super) fn paint(title: &str, scene: &Scene, fonts: &Fonts, words: String) -> Result<Self> {
        let title = text::one_line(title);
        let check = Check { chart: &title };
        let fault = |e: String| check.fail(format!("plotters could not paint it: {e}"));
        let png = raster::png(scene, fonts).map_err(fault)?;
        let svg = svg::svg(scene, &title, &words).map_err(fault)?;
        Ok(Self {
            size: (scene.width, scene.height),
            png,
            svg,
            words,
            title,
        })
    }

    /// The figure as the bytes of a PNG file.
    ///
    /// ```
    /// # let figure = course::chart::BarChart::new("t", "x", "y").bar("a", 1).draw()?;
    /// assert_eq!(&figure.png()[1..4], b"PNG");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn png(&self) -> &[u8] {
        &self.png
    }

    /// The figure as the text of an SVG file, with its description inside.
    ///
    /// ```
    /// # let figure = course::chart::BarChart::new("t", "x", "y").bar("a", 1).draw()?;
    /// assert!(figure.svg().contains("<desc"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn svg(&self) -> &str {
        &self.svg
    }

    /// The figure in words, for those who cannot see it.
    ///
    /// ```
    /// # let figure = course::chart::BarChart::new("t", "x", "y").bar("a", 1).draw()?;
    /// assert!(figure.describe().starts_with("Bar chart"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn describe(&self) -> &str {
        &self.words
    }

    /// Width and height in pixels.
    ///
    /// ```
    /// # let figure = course::chart::BarChart::new("t", "x", "y").bar("a", 1).draw()?;
    /// assert_eq!(figure.size(), (800, 460));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn size(&self) -> (u32, u32) {
        self.size
    }

    /// Writes the figure to `path`, which must end in `.png` or `.svg`.
    ///
    /// The file is there whole or not at all: it is written beside its place and then moved.
    ///
    /// # Errors
    ///
    /// [`Error::Chart`] for another ending, [`Error::File`] when the file cannot be written.
    ///
    /// ```
    /// # let figure = course::chart::BarChart::new("t", "x", "y").bar("a", 1).draw()?;
    /// let path = std::env::temp_dir().join("course-doctest-figure.svg");
    /// figure.save(&path)?;
    /// assert_eq!(std::fs::read_to_string(&path)?, figure.svg());
    /// assert!(figure.save("figure.gif").is_err());
    /// # std::fs::remove_file(&path)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let ending = path.extension().and_then(|e| e.to_str()).unwrap_or("");
        let bytes = match ending.to_ascii_lowercase().as_str() {
            "png" => self.png.as_slice(),
            "svg" => self.svg.as_bytes(),
            _ => return Err(self.wrong_ending(path)),
        };
        write_whole(path, bytes).map_err(Error::file(path))
    }

    /// Shows the figure in a notebook; evcxr calls this for the last value of a cell.
    ///
    /// It prints the PNG, the SVG and the description between evcxr's markers; Jupyter picks
    /// what it can show. Where the environment variable `COURSE_FIGURES` names a folder, the PNG
    /// is written there under the figure's title and the description printed alone.
    ///
    /// ```
    /// # let figure = course::chart::BarChart::new("t", "x", "y").bar("a", 1).draw()?;
    /// figure.evcxr_display();
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn evcxr_display(&self) {
        if let Some(folder) = std::env::var_os(FOLDER).filter(|folder| !folder.is_empty()) {
            return self.keep(Path::new(&folder));
        }
        // One write, so that nothing printed elsewhere comes between; a closed stdout is no
        // reason to stop a notebook.
        let mut out = std::io::stdout().lock();
        let _ = out.write_all(self.blocks().as_bytes());
        let _ = out.flush();
    }

    /// Writes the image into a folder, under its title, and prints its words: for a program, which
    /// has no notebook to show it in.
    pub(super) fn keep(&self, folder: &Path) {
        let name: String = self
            .title
            .chars()
            .map(|c| if c.is_alphanumeric() { c } else { '_' })
            .collect();
        let path = folder.join(name).with_extension("png");
        let made = std::fs::create_dir_all(folder).map_err(Error::file(folder));
        let note = match made.and_then(|()| self.save(&path)) {
            Ok(()) => format!("(drawn in {})", path.display()),
            Err(error) => format!("(not drawn: {error})"),
        };
        let _ = writeln!(std::io::stdout(), "{}\n{note}", self.words.trim_end());
    }

    /// The three blocks that evcxr understands.
    pub(super) fn blocks(&self) -> String {
        let png = STANDARD.encode(&self.png);
        [
            ("image/png", png.as_str()),
            ("image/svg+xml", self.svg.as_str()),
            ("text/plain", self.words.as_str()),
        ]
        .iter()
        .map(|(kind, content)| {
            let content = content.trim_end();
            format!("EVCXR_BEGIN_CONTENT {kind}\n{content}\nEVCXR_END_CONTENT\n")
        })
        .collect()
    }

    fn wrong_ending(&self, path: &Path) -> Error {
        Check { chart: &self.title }.fail(format!(
            "cannot be saved as {}: let the name end in .png or .svg",
            path.display()
        ))
    }
}

impl fmt::Debug for Figure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (width, height) = self.size;
        write!(f, "Figure(\"{}\", {width} × {height})", self.title)
    }
}

/// Writes a new file beside `path`, then moves it there.
fn write_whole(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let beside = path.with_file_name(format!(".{name}.{}.part", std::process::id()));
    let written = std::fs::write(&beside, bytes).and_then(|()| std::fs::rename(&beside, path));
    if written.is_err() {
        // What remains of a failed attempt is of no use; the first error is the one to tell.
        let _ = std::fs::remove_file(&beside);
    }
    written
}
