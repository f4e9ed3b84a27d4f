//! Small images side by side, each pixel enlarged to a square.

use super::check::MOST_VALUES;
use super::common::{Common, DEFAULT_SIZE};
use super::figure::Figure;
use super::image::Image;
use super::number::plain;
use super::page::Page;
use super::scene::{Anchor, Text};
use super::style::SMALL_SIZE;
use super::text::{Room, cut, one_line};
use super::words::{Words, count};
use crate::error::Result;

/// Space between images, and below them for their labels.
const GAP: u32 = 10;
const LABEL: u32 = 22;
const EDGE: u32 = 16;
/// Space between a label and the images below it.
const ROW_GAP: u32 = 8;
/// How large a figure gets that was given no size, unless its images need more.
const ROOM: (u32, u32) = (DEFAULT_SIZE.0, 640);

/// Images in rows, each with a label below it.
///
/// ```
/// use course::chart::ImageGrid;
///
/// let figure = ImageGrid::new("Two digits")
///     .columns(2)
///     .gray("label 0", 2, 2, [0.0, 1.0, 1.0, 0.0])
///     .gray("label 1", 2, 2, [1.0, 0.0, 0.0, 1.0])
///     .draw()?;
/// assert!(figure.describe().contains("2 images"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct ImageGrid {
    common: Common,
    columns: Option<usize>,
    images: Vec<Image>,
    size: Option<(u32, u32)>,
}

impl ImageGrid {
    /// An empty grid.
    ///
    /// ```
    /// assert!(course::chart::ImageGrid::new("Digits").draw().is_err(), "no image yet");
    /// ```
    pub fn new(title: impl Into<String>) -> Self {
        Self {
            common: Common::new(title.into(), String::new(), String::new()),
            columns: None,
            images: Vec::new(),
            size: None,
        }
    }

    /// Sets how many images stand in a row; without it, up to eight.
    ///
    /// ```
    /// # use course::chart::ImageGrid;
    /// let grid = ImageGrid::new("t").columns(1).gray("a", 1, 1, [0.0]).gray("b", 1, 1, [1.0]);
    /// assert!(grid.draw()?.describe().contains("1 column"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn columns(mut self, columns: usize) -> Self {
        self.columns = Some(columns);
        self
    }

    /// Adds a gray image: `width` × `height` values from 0 (black) to 1 (white), row by row.
    ///
    /// ```
    /// # use course::chart::ImageGrid;
    /// let pixels: Vec<f32> = vec![0.0, 0.5, 1.0];
    /// let figure = ImageGrid::new("t").gray("ramp", 3, 1, pixels).draw()?;
    /// assert!(figure.describe().contains("\"ramp\""));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn gray<V: Into<f64>>(
        self,
        label: impl Into<String>,
        width: usize,
        height: usize,
        pixels: impl IntoIterator<Item = V>,
    ) -> Self {
        self.add(label.into(), (width, height, 1), pixels)
    }

    /// Adds a colour image: for each pixel, row by row, red, green and blue from 0 to 1.
    ///
    /// ```
    /// # use course::chart::ImageGrid;
    /// let figure = ImageGrid::new("t").rgb("orange", 1, 1, [0.9, 0.6, 0.0]).draw()?;
    /// assert!(figure.describe().contains("\"orange\""));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn rgb<V: Into<f64>>(
        self,
        label: impl Into<String>,
        width: usize,
        height: usize,
        pixels: impl IntoIterator<Item = V>,
    ) -> Self {
        self.add(label.into(), (width, height, 3), pixels)
    }

    fn add<V: Into<f64>>(
        mut self,
        label: String,
        (width, height, channels): (usize, usize, usize),
        pixels: impl IntoIterator<Item = V>,
    ) -> Self {
        let pixels = pixels.into_iter().take(MOST_VALUES + 1);
        self.images.push(Image {
            label,
            width,
            height,
            channels,
            values: pixels.map(Into::into).collect(),
        });
        self
    }

    /// Adds a sentence to the description, for those who cannot see the figure.
    ///
    /// ```
    /// # use course::chart::ImageGrid;
    /// let grid = ImageGrid::new("t").gray("a", 1, 1, [0.0]).words("A black square.");
    /// assert!(grid.draw()?.describe().ends_with("A black square."));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn words(mut self, sentence: impl Into<String>) -> Self {
        self.common.words.push(sentence.into());
        self
    }

    /// Sets width and height in pixels; without it, the figure is as high as the images need.
    ///
    /// ```
    /// # use course::chart::ImageGrid;
    /// let grid = ImageGrid::new("t").gray("a", 1, 1, [0.0]).size(300, 300);
    /// assert_eq!(grid.draw()?.size(), (300, 300));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn size(mut self, width: u32, height: u32) -> Self {
        self.size = Some((width, height));
        self
    }

    /// Draws the grid.
    ///
    /// # Errors
    ///
    /// [`Error::Chart`](crate::error::Error::Chart) names the image and what to do: no images,
    /// an image without pixels, a wrong number of values, values outside 0 to 1, an empty
    /// text, more images than fit.
    ///
    /// ```
    /// # use course::chart::ImageGrid;
    /// let grid = ImageGrid::new("t").gray("seven", 2, 2, [0.0, 1.0, 0.5]);
    /// assert!(grid.draw().unwrap_err().to_string().contains("image \"seven\""));
    /// ```
    pub fn draw(&self) -> Result<Figure> {
        self.validate()?;
        let grid = self.layout()?;
        let mut page = Page::open(&self.common, grid.size)?;
        for (index, image) in self.images.iter().enumerate() {
            self.one(&mut page, &grid, index, image);
        }
        let words = self.describe(grid.columns);
        Figure::paint(&self.common.title, &page.scene, page.fonts, words)
    }

    fn validate(&self) -> Result<()> {
        let common = Common {
            size: self.size.unwrap_or(DEFAULT_SIZE),
            ..self.common.clone()
        };
        common.check_page(false)?;
        let check = self.common.check();
        check.need(!self.images.is_empty(), || {
            "has no images: add at least one with .gray() or .rgb()".into()
        })?;
        check.need(self.columns != Some(0), || {
            ".columns(0) leaves no place for images: give it at least 1".into()
        })?;
        let total = self.images.iter().map(|i| i.values.len()).sum();
        check.amount(|| "the grid".into(), total)?;
        for (index, image) in self.images.iter().enumerate() {
            image.validate(check, index)?;
        }
        Ok(())
    }

    /// The largest whole enlargement that fits.
    fn layout(&self) -> Result<Grid> {
        let columns = self.columns.unwrap_or(8).min(self.images.len());
        let rows = self.images.len().div_ceil(columns) as u32;
        let columns = columns as u32;
        let width = self.images.iter().map(|i| i.width).max().unwrap_or(1) as u32;
        let height = self.images.iter().map(|i| i.height).max().unwrap_or(1) as u32;
        let full = self.size.unwrap_or(ROOM);
        let top = Page::open(&self.common, full)?.top as u32;
        let free = |full: u32, taken: u32| full.saturating_sub(taken);
        let across = free(full.0, 2 * EDGE + GAP * columns.saturating_sub(1)) / columns / width;
        let down = free(full.1, top + EDGE + rows * (LABEL + ROW_GAP)) / rows / height;
        // Without a given size, images too large for it make the figure grow instead.
        let zoom = if self.size.is_some() {
            across.min(down)
        } else {
            across.min(down).max(1)
        };
        let needed = (
            (columns.saturating_mul(zoom * width + GAP)).saturating_add(2 * EDGE - GAP),
            (rows.saturating_mul(zoom * height + LABEL + ROW_GAP))
                .saturating_add(top + EDGE - ROW_GAP),
        );
        let size = self.size.unwrap_or((needed.0.max(full.0), needed.1));
        self.common
            .check()
            .need(zoom > 0 && size.0 <= 4000 && size.1 <= 4000, || {
                format!(
                    "has {} images of up to {width} × {height} pixels, which do not fit: \
                     show fewer or smaller ones, or change .columns() or .size()",
                    self.images.len()
                )
            })?;
        Ok(Grid {
            columns: columns as usize,
            zoom,
            cell: (zoom * width, zoom * height),
            left: free(size.0, needed.0) / 2 + EDGE,
            top,
            size,
        })
    }

    fn one(&self, page: &mut Page<'_>, grid: &Grid, index: usize, image: &Image) {
        let (row, column) = ((index / grid.columns) as u32, (index % grid.columns) as u32);
        let left = grid.left + column * (grid.cell.0 + GAP);
        let top = grid.top + row * (grid.cell.1 + LABEL + ROW_GAP);
        let picture = image.enlarged(grid.zoom, left, top, grid.cell.0);
        let bottom = f64::from(top + picture.height);
        let middle = f64::from(left) + f64::from(grid.cell.0) / 2.0;
        page.scene.pictures.push(picture);
        let room = Room {
            bold: false,
            size: SMALL_SIZE,
            smallest: SMALL_SIZE,
            width: f64::from(grid.cell.0 + GAP) - 4.0,
            lines: 1,
        };
        let label = cut(page.fonts, &one_line(&image.label), room);
        let at = (middle, bottom + 16.0);
        page.scene
            .text(Text::new(label, at, SMALL_SIZE, Anchor::Middle));
    }

    fn describe(&self, columns: usize) -> String {
        let mut words = Words::new("Image grid", &self.common);
        let rows = self.images.len().div_ceil(columns);
        words.say(&format!(
            "{}, {} and {}",
            count(self.images.len(), "image"),
            count(rows, "row"),
            count(columns, "column")
        ));
        const MOST_READ: usize = 40;
        let labels: Vec<String> = self
            .images
            .iter()
            .take(MOST_READ)
            .map(|i| format!("\"{}\"", i.label.trim()))
            .collect();
        let more = self.images.len().saturating_sub(MOST_READ);
        let more = match more {
            0 => String::new(),
            more => format!(" and {} more", plain(more as f64)),
        };
        words.say(&format!("Labels, row by row: {}{more}", labels.join(", ")));
        words.finish(&self.common)
    }
}

/// Where the images go.
struct Grid {
    columns: usize,
    zoom: u32,
    cell: (u32, u32),
    left: u32,
    top: u32,
    size: (u32, u32),
}
