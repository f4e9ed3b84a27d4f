//! Painting the shapes of a scene with plotters, on any of its backends.

use plotters::coord::Shift;
use plotters::drawing::{DrawingArea, DrawingAreaErrorKind};
use plotters::element::{Circle, PathElement, Polygon, Rectangle};
use plotters::prelude::DrawingBackend;
use plotters::style::{Color, RGBColor, ShapeStyle};

use super::colour::Rgb;
use super::scene::{Point, Rect, Scene, Shape};

/// An area of plotters in pixels.
pub(super) type Area<DB> = DrawingArea<DB, Shift>;
type Painted<DB> = Result<(), DrawingAreaErrorKind<<DB as DrawingBackend>::ErrorType>>;

/// Plotters counts in whole pixels, so everything is painted `zoom` times too large and
/// shrunk afterwards: by the viewer of an SVG, by averaging for a PNG.
#[derive(Debug, Clone, Copy)]
pub(super) struct Painter {
    pub zoom: f64,
    /// A vector backend draws wide lines itself; for pixels they become polygons.
    pub vector: bool,
}

impl Painter {
    pub fn paint<DB: DrawingBackend>(&self, area: &Area<DB>, scene: &Scene) -> Painted<DB> {
        for shape in &scene.shapes {
            self.shape(area, shape)?;
        }
        Ok(())
    }

    fn shape<DB: DrawingBackend>(&self, area: &Area<DB>, shape: &Shape) -> Painted<DB> {
        match shape {
            Shape::Rect { at, fill } => self.rect(area, *at, filled(*fill, 1.0)),
            Shape::Line {
                points,
                width,
                colour,
            } => self.line(area, points, *width, *colour),
            Shape::Polygon { points, fill } => self.polygon(area, points, filled(*fill, 1.0)),
            Shape::Circle {
                centre,
                radius,
                fill,
            } => self.circle(area, *centre, *radius, *fill),
            Shape::Band { boxes, fill, alpha } => self.band(area, boxes, filled(*fill, *alpha)),
        }
    }

    fn rect<DB: DrawingBackend>(&self, area: &Area<DB>, at: Rect, fill: ShapeStyle) -> Painted<DB> {
        let corners = [(at.left, at.top), (at.right, at.bottom)].map(|p| self.pixel(p));
        // Plotters cannot fill an area without width or height.
        if corners[0].0 == corners[1].0 || corners[0].1 == corners[1].1 {
            return Ok(());
        }
        area.draw(&Rectangle::new(corners, fill))
    }

    fn polygon<DB: DrawingBackend>(
        &self,
        area: &Area<DB>,
        points: &[Point],
        fill: ShapeStyle,
    ) -> Painted<DB> {
        let points: Vec<_> = points.iter().map(|p| self.pixel(*p)).collect();
        area.draw(&Polygon::new(points, fill))
    }

    fn circle<DB: DrawingBackend>(
        &self,
        area: &Area<DB>,
        centre: Point,
        radius: f64,
        fill: Rgb,
    ) -> Painted<DB> {
        let radius = (radius * self.zoom).round() as u32;
        area.draw(&Circle::new(self.pixel(centre), radius, filled(fill, 1.0)))
    }

    fn line<DB: DrawingBackend>(
        &self,
        area: &Area<DB>,
        points: &[Point],
        width: f64,
        colour: Rgb,
    ) -> Painted<DB> {
        if self.vector {
            let style = ShapeStyle {
                stroke_width: (width * self.zoom).round() as u32,
                ..filled(colour, 1.0)
            };
            let points: Vec<_> = points.iter().map(|p| self.pixel(*p)).collect();
            return area.draw(&PathElement::new(points, style));
        }
        for pair in points.windows(2) {
            if let Some(corners) = thick(pair[0], pair[1], width) {
                self.polygon(area, &corners, filled(colour, 1.0))?;
            }
        }
        // Round joints, where the polygons of two pieces meet.
        for &joint in points.iter().skip(1).take(points.len().saturating_sub(2)) {
            self.circle(area, joint, width / 2.0, colour)?;
        }
        Ok(())
    }

    fn band<DB: DrawingBackend>(
        &self,
        area: &Area<DB>,
        boxes: &[Rect],
        fill: ShapeStyle,
    ) -> Painted<DB> {
        if self.vector {
            let top = boxes
                .iter()
                .flat_map(|b| [(b.left, b.top), (b.right, b.top)]);
            let bottom = boxes
                .iter()
                .rev()
                .flat_map(|b| [(b.right, b.bottom), (b.left, b.bottom)]);
            let outline: Vec<_> = top.chain(bottom).collect();
            return self.polygon(area, &outline, fill);
        }
        for at in boxes {
            self.rect(area, *at, fill)?;
        }
        Ok(())
    }

    fn pixel(&self, (x, y): Point) -> (i32, i32) {
        let whole = |v: f64| (v * self.zoom).round().clamp(-1e6, 1e6) as i32;
        (whole(x), whole(y))
    }
}

fn filled((r, g, b): Rgb, alpha: f64) -> ShapeStyle {
    RGBColor(r, g, b).mix(alpha).filled()
}

/// The corners of a straight line of some width.
fn thick(from: Point, to: Point, width: f64) -> Option<[Point; 4]> {
    let (dx, dy) = (to.0 - from.0, to.1 - from.1);
    let length = dx.hypot(dy);
    if length < 1e-6 {
        return None;
    }
    let (x, y) = (-dy / length * width / 2.0, dx / length * width / 2.0);
    Some([
        (from.0 + x, from.1 + y),
        (to.0 + x, to.1 + y),
        (to.0 - x, to.1 - y),
        (from.0 - x, from.1 - y),
    ])
}
