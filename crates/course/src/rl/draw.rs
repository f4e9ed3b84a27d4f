//! Pictures of environments, with the colours and the geometry of Gymnasium's `rgb_array`.

use ndarray::Array3;
use plotters::backend::{BitMapBackend, DrawingBackend};
use plotters::style::RGBColor;

use crate::{Error, Result};

/// Pixels from the left and from the bottom.
pub(super) type Point = (f64, f64);

pub(super) const BLACK: RGBColor = RGBColor(0, 0, 0);

/// What a picture is made of; later ones cover earlier ones.
#[derive(Clone, Debug)]
pub(super) enum Shape {
    /// A convex area between its corners.
    Polygon(Vec<Point>, RGBColor),
    /// A centre and a radius.
    Disc(Point, f64, RGBColor),
    /// From point to point, one pixel wide.
    Lines(Vec<Point>, RGBColor),
}

/// A point turned around (0, 0) to the left, and then moved.
pub(super) fn turned((x, y): Point, angle: f64, to: Point) -> Point {
    let (sin, cos) = angle.sin_cos();
    (x * cos - y * sin + to.0, x * sin + y * cos + to.1)
}

/// The rectangle between `x` and between `y`, turned and moved.
pub(super) fn rectangle(
    x: (f64, f64),
    y: (f64, f64),
    angle: f64,
    to: Point,
    colour: RGBColor,
) -> Shape {
    let corners = [(x.0, y.0), (x.0, y.1), (x.1, y.1), (x.1, y.0)];
    let corners = corners.map(|corner| turned(corner, angle, to));
    Shape::Polygon(corners.to_vec(), colour)
}

/// Shapes on white as [height, width, 3].
///
/// Corners, centres and radii go to whole pixels towards zero, as in pygame, and only then is the
/// picture turned upside down. The edges are not smoothed as in pygame.
pub(super) fn picture(width: u32, height: u32, shapes: &[Shape]) -> Option<Array3<u8>> {
    let mut rgb = vec![255; width as usize * height as usize * 3];
    {
        let mut backend = BitMapBackend::with_buffer(&mut rgb, (width, height));
        for shape in shapes {
            paint(&mut backend, height, shape)?;
        }
    }
    Array3::from_shape_vec((height as usize, width as usize, 3), rgb).ok()
}

fn paint(backend: &mut BitMapBackend<'_>, height: u32, shape: &Shape) -> Option<()> {
    // What is far outside comes nearer: plotters would go through all of its pixels.
    let whole = |x: f64| x.clamp(-10_000.0, 10_000.0) as i32;
    let pixel = |(x, y): &Point| (whole(*x), height as i32 - 1 - whole(*y));
    match shape {
        Shape::Polygon(corners, colour) => {
            // The filling lacks its last row or column, which the outline has.
            let mut corners: Vec<_> = corners.iter().map(pixel).collect();
            backend.fill_polygon(corners.iter().copied(), colour).ok()?;
            corners.extend(corners.first().copied());
            backend.draw_path(corners, colour).ok()
        }
        Shape::Disc(centre, radius, colour) => {
            let radius = whole(*radius).unsigned_abs();
            backend
                .draw_circle(pixel(centre), radius, colour, true)
                .ok()
        }
        Shape::Lines(points, colour) => points.windows(2).try_for_each(|ends| {
            backend
                .draw_line(pixel(&ends[0]), pixel(&ends[1]), colour)
                .ok()
        }),
    }
}

/// A rendered picture made smaller, for an [`ImageGrid`](crate::chart::ImageGrid): width, height
/// and for each pixel, row by row, red, green and blue from 0 to 1. Each pixel is the mean of
/// `by` × `by`; what is left over at the right and at the bottom is dropped.
///
/// # Errors
///
/// [`Error::Environment`] where not a pixel is left, and for a picture that has not three colours.
///
/// ```
/// use course::prelude::*;
/// use course::rl::{self, CartPole, Env};
/// let mut env = CartPole::new();
/// rl::reset(&mut env, Some(1), Default::default())?;
/// let picture = env.render().ok_or("reset it first")?;
/// let (width, height, light) = rl::shrink(&picture, 4)?;
/// assert_eq!((width, height, light.len()), (150, 100, 150 * 100 * 3));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn shrink(picture: &Array3<u8>, by: usize) -> Result<(usize, usize, Vec<f64>)> {
    let (high, wide, colours) = picture.dim();
    if by == 0 || high < by || wide < by || colours != 3 {
        let problem =
            format!("a picture of [{high}, {wide}, {colours}] cannot be made {by} times smaller");
        return Err(Error::Environment { problem });
    }
    let (height, width) = (high / by, wide / by);
    let mut light = vec![0.0; height * width * 3];
    for ((row, column, colour), byte) in picture.indexed_iter() {
        let (row, column) = (row / by, column / by);
        if row < height && column < width {
            let share = f64::from(*byte) / 255.0 / (by * by) as f64;
            light[(row * width + column) * 3 + colour] += share;
        }
    }
    // Sums of shares may be a little more than white.
    Ok((
        width,
        height,
        light.into_iter().map(|x| x.min(1.0)).collect(),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_smaller_picture_has_the_means() {
        let picture = Array3::from_shape_fn((5, 7, 3), |(row, column, colour)| {
            if colour == 2 {
                255
            } else {
                (20 * row + column + 100 * colour) as u8
            }
        });
        let (width, height, light) = shrink(&picture, 2).unwrap();
        assert_eq!((width, height, light.len()), (3, 2, 18));
        let at = |row: usize, column: usize| &light[(row * 3 + column) * 3..][..3];
        let mean = |row: f64, column: f64| (20.0 * (row + 0.5) + column + 0.5) / 255.0;
        for (row, column) in [(0, 0), (0, 2), (1, 0), (1, 1)] {
            let want = mean(2.0 * row as f64, 2.0 * column as f64);
            let got = at(row, column);
            assert!((got[0] - want).abs() < 1e-9, "{got:?} {want}");
            assert!((got[1] - want - 100.0 / 255.0).abs() < 1e-9);
            assert!((got[2] - 1.0).abs() < 1e-9 && got[2] <= 1.0);
        }
        assert!(shrink(&picture, 0).is_err() && shrink(&picture, 6).is_err());
    }

    #[test]
    fn shapes_far_outside_are_cut_off() {
        let far = [
            f64::NEG_INFINITY,
            -1e300,
            -30.0,
            5.0,
            60.0,
            1e300,
            f64::INFINITY,
            f64::NAN,
        ];
        let colour = RGBColor(1, 2, 3);
        for x in far {
            for y in far {
                let shapes = [
                    Shape::Polygon(vec![(x, y), (5.0, 5.0), (9.0, 7.0)], colour),
                    Shape::Polygon(vec![(x, y), (x, -y), (y, 7.0)], colour),
                    Shape::Disc((x, y), 8.0, colour),
                    Shape::Lines(vec![(x, y), (4.0, 4.0), (y, x)], colour),
                ];
                assert!(picture(40, 30, &shapes).is_some());
            }
        }
    }

    #[test]
    fn up_is_up() {
        let square = rectangle((0.0, 3.0), (0.0, 1.0), 0.0, (2.0, 10.0), BLACK);
        let picture = picture(20, 30, &[square]).unwrap();
        let dark: Vec<_> = picture
            .indexed_iter()
            .filter(|(_, byte)| **byte == 0)
            .collect();
        let rows = dark.iter().map(|((row, ..), _)| *row);
        let columns = dark.iter().map(|((_, column, _), _)| *column);
        assert_eq!((rows.clone().min(), rows.max()), (Some(18), Some(19)));
        assert_eq!((columns.clone().min(), columns.max()), (Some(2), Some(5)));
    }
}
