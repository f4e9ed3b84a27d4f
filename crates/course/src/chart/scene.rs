//! What a figure consists of, before anything is painted: shapes, texts and pictures in pixels.

use super::colour::Rgb;

/// A place in the figure, in pixels from the upper left corner.
pub(super) type Point = (f64, f64);

/// An upright rectangle in pixels.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Rect {
    pub left: f64,
    pub top: f64,
    pub right: f64,
    pub bottom: f64,
}

impl Rect {
    pub fn new(left: f64, top: f64, right: f64, bottom: f64) -> Self {
        Self {
            left,
            top,
            right,
            bottom,
        }
    }

    pub fn width(&self) -> f64 {
        self.right - self.left
    }

    pub fn height(&self) -> f64 {
        self.bottom - self.top
    }

    pub fn middle(&self) -> Point {
        (
            (self.left + self.right) / 2.0,
            (self.top + self.bottom) / 2.0,
        )
    }

    pub fn holds(&self, (x, y): Point) -> bool {
        let slack = 0.01;
        x >= self.left - slack
            && x <= self.right + slack
            && y >= self.top - slack
            && y <= self.bottom + slack
    }
}

/// One thing to paint.
#[derive(Debug, Clone)]
pub(super) enum Shape {
    Rect {
        at: Rect,
        fill: Rgb,
    },
    Line {
        points: Vec<Point>,
        width: f64,
        colour: Rgb,
    },
    Polygon {
        points: Vec<Point>,
        fill: Rgb,
    },
    Circle {
        centre: Point,
        radius: f64,
        fill: Rgb,
    },
    /// Upright boxes side by side, painted as one see-through area.
    Band {
        boxes: Vec<Rect>,
        fill: Rgb,
        alpha: f64,
    },
}

/// Which part of a text sits at its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Anchor {
    Start,
    Middle,
    End,
}

/// One line of text. Its place is on the baseline; a turned text reads from bottom to top.
#[derive(Debug, Clone)]
pub(super) struct Text {
    pub text: String,
    pub at: Point,
    pub size: f64,
    pub bold: bool,
    pub colour: Rgb,
    pub anchor: Anchor,
    pub turned: bool,
}

impl Text {
    /// An ordinary dark text.
    pub fn new(text: impl Into<String>, at: Point, size: f64, anchor: Anchor) -> Self {
        Self {
            text: text.into(),
            at,
            size,
            bold: false,
            colour: super::colour::INK,
            anchor,
            turned: false,
        }
    }

    pub fn bold(mut self) -> Self {
        self.bold = true;
        self
    }

    pub fn turned(mut self) -> Self {
        self.turned = true;
        self
    }

    pub fn colour(mut self, colour: Rgb) -> Self {
        self.colour = colour;
        self
    }
}

/// A picture that is already as large as it will be shown, three bytes a pixel.
#[derive(Debug, Clone)]
pub(super) struct Picture {
    pub left: u32,
    pub top: u32,
    pub width: u32,
    pub height: u32,
    pub rgb: Vec<u8>,
}

/// Everything in one figure; shapes lie under pictures, pictures under texts.
#[derive(Debug, Clone)]
pub(super) struct Scene {
    pub width: u32,
    pub height: u32,
    pub shapes: Vec<Shape>,
    pub pictures: Vec<Picture>,
    pub texts: Vec<Text>,
}

impl Scene {
    /// An empty scene; the painters make it white.
    pub fn new((width, height): (u32, u32)) -> Self {
        Self {
            width,
            height,
            shapes: Vec::new(),
            pictures: Vec::new(),
            texts: Vec::new(),
        }
    }

    pub fn rect(&mut self, at: Rect, fill: Rgb) {
        self.shapes.push(Shape::Rect { at, fill });
    }

    pub fn line(&mut self, points: Vec<Point>, width: f64, colour: Rgb) {
        if points.len() > 1 {
            self.shapes.push(Shape::Line {
                points,
                width,
                colour,
            });
        }
    }

    pub fn polygon(&mut self, points: Vec<Point>, fill: Rgb) {
        self.shapes.push(Shape::Polygon { points, fill });
    }

    pub fn circle(&mut self, centre: Point, radius: f64, fill: Rgb) {
        self.shapes.push(Shape::Circle {
            centre,
            radius,
            fill,
        });
    }

    pub fn text(&mut self, text: Text) {
        self.texts.push(text);
    }

    /// A sharp one-pixel line across, at `y`.
    pub fn across(&mut self, left: f64, right: f64, y: f64, colour: Rgb) {
        let y = y.round();
        self.rect(Rect::new(left, y, right, y + 1.0), colour);
    }

    /// A sharp one-pixel line down, at `x`.
    pub fn down(&mut self, x: f64, top: f64, bottom: f64, colour: Rgb) {
        let x = x.round();
        self.rect(Rect::new(x, top, x + 1.0, bottom), colour);
    }
}
