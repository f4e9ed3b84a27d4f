//! How series differ without colour: markers and dashes on lines, hatching on bars.

use super::colour::{REFERENCE, Rgb, WHITE, series};
use super::geometry::{clip, clip_line, dashes, length};
use super::scene::{Point, Rect, Scene};
use super::value::InSight;

pub(super) const TITLE_SIZE: f64 = 19.0;
pub(super) const LABEL_SIZE: f64 = 14.5;
/// Ticks, legend, numbers: nothing is ever smaller.
pub(super) const SMALL_SIZE: f64 = 13.0;

const LINE_WIDTH: f64 = 2.2;
const REFERENCE_WIDTH: f64 = 1.6;

/// Dash and gap lengths in pixels; seven colours, six markers and five patterns have no
/// common factor, so 210 series look different.
const DASHES: [&[f64]; 5] = [
    &[],
    &[9.0, 4.0],
    &[2.5, 3.5],
    &[11.0, 3.5, 2.5, 3.5],
    &[17.0, 4.0],
];
const REFERENCE_DASHES: [&[f64]; 3] = [&[6.0, 4.0], &[2.0, 3.0], &[12.0, 3.0, 2.0, 3.0]];

/// Beyond this many pixels a line fills its area, and dashes would only cost space.
const LONGEST_DASHED: f64 = 6_000.0;

/// Draws the part of a series' line inside `area`.
pub(super) fn series_line(scene: &mut Scene, index: usize, points: &[Point], area: Rect) {
    let pieces = clip_line(points, area);
    let total: f64 = pieces.iter().map(|p| length(p)).sum();
    let pattern = if total > LONGEST_DASHED {
        &[]
    } else {
        DASHES[index % DASHES.len()]
    };
    for piece in &pieces {
        for dash in dashes(piece, pattern) {
            scene.line(dash, LINE_WIDTH, series(index));
        }
    }
}

/// Draws reference line number `index`.
pub(super) fn reference_line(scene: &mut Scene, index: usize, ends: [Point; 2]) {
    let pattern = REFERENCE_DASHES[index % REFERENCE_DASHES.len()];
    for dash in dashes(&ends, pattern) {
        scene.line(dash, REFERENCE_WIDTH, REFERENCE);
    }
}

/// Draws the marker of a series, with a white rim so that it stands off its own line.
pub(super) fn marker(scene: &mut Scene, index: usize, at: Point) {
    let rim = 1.3;
    match index % 6 {
        0 => {
            scene.circle(at, 4.3 + rim, WHITE);
            scene.circle(at, 4.3, series(index));
        }
        5 => {
            cross(scene, at, 4.0, 4.4, WHITE);
            cross(scene, at, 3.8, 2.2, series(index));
        }
        shape => {
            scene.polygon(corners(shape, at, 4.6 + rim * 1.25), WHITE);
            scene.polygon(corners(shape, at, 4.6), series(index));
        }
    }
}

fn corners(shape: usize, (x, y): Point, r: f64) -> Vec<Point> {
    let places: &[Point] = match shape {
        1 => &[(-0.87, -0.87), (0.87, -0.87), (0.87, 0.87), (-0.87, 0.87)],
        2 => &[(0.0, -1.2), (1.1, 0.8), (-1.1, 0.8)],
        3 => &[(0.0, -1.25), (1.25, 0.0), (0.0, 1.25), (-1.25, 0.0)],
        _ => &[(0.0, 1.2), (1.1, -0.8), (-1.1, -0.8)],
    };
    places.iter().map(|p| (x + r * p.0, y + r * p.1)).collect()
}

fn cross(scene: &mut Scene, (x, y): Point, r: f64, width: f64, colour: Rgb) {
    scene.line(vec![(x - r, y - r), (x + r, y + r)], width, colour);
    scene.line(vec![(x - r, y + r), (x + r, y - r)], width, colour);
}

/// Draws the part of a whisker that is in sight, on a white rim; `reach` is half the width of
/// its caps. An end that is cut off gets no cap.
pub(super) fn whisker(scene: &mut Scene, shown: InSight, (x, reach): (f64, f64), colour: Rgb) {
    let InSight { low, high, caps } = shown;
    for (thickness, colour) in [(3.4, WHITE), (1.7, colour)] {
        scene.line(vec![(x, low), (x, high)], thickness, colour);
        for (end, capped) in [low, high].into_iter().zip(caps) {
            if capped {
                scene.line(vec![(x - reach, end), (x + reach, end)], thickness, colour);
            }
        }
    }
}

/// Fills a bar in a series' colour and hatches it; the first series stays plain.
pub(super) fn bar(scene: &mut Scene, index: usize, at: Rect) {
    scene.rect(at, series(index));
    let slopes: &[Point] = match index % 6 {
        0 => &[],
        1 => &[(1.0, -1.0)],
        2 => &[(1.0, 1.0)],
        3 => &[(1.0, 0.0)],
        4 => &[(1.0, -1.0), (1.0, 1.0)],
        _ => &[(0.0, 1.0)],
    };
    for &slope in slopes {
        hatch(scene, at, slope);
    }
}

/// White lines across `at`, seven pixels apart, in the direction of `slope`.
fn hatch(scene: &mut Scene, at: Rect, slope: Point) {
    let gap = 7.0;
    let reach = at.width() + at.height();
    let lines = ((2.0 * reach / gap) as usize).min(2000);
    let (x, y) = (at.left, at.bottom);
    for i in 0..=lines {
        // Half a gap off the corner; steep and flat hatching steps along the other edge.
        let off = (i as f64 + 0.5) * gap - reach;
        let from = if slope.0 == 0.0 {
            (x + off, y - reach)
        } else {
            (x - reach * slope.0, y + off - reach * slope.1)
        };
        let to = (
            from.0 + 3.0 * reach * slope.0,
            from.1 + 3.0 * reach * slope.1,
        );
        if let Some((from, to)) = clip(from, to, at) {
            scene.line(vec![from, to], 1.3, WHITE);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chart::scene::Shape;

    #[test]
    fn series_differ_without_colour() {
        let area = Rect::new(0.0, 0.0, 300.0, 300.0);
        let mut looks = std::collections::HashSet::new();
        for index in 0..30 {
            let mut scene = Scene::new((300, 300));
            series_line(&mut scene, index, &[(0.0, 50.0), (300.0, 50.0)], area);
            marker(&mut scene, index, (150.0, 150.0));
            for shape in &mut scene.shapes {
                match shape {
                    Shape::Line { colour, .. } => *colour = WHITE,
                    Shape::Polygon { fill, .. } | Shape::Circle { fill, .. } => *fill = WHITE,
                    _ => {}
                }
            }
            assert!(
                looks.insert(format!("{:?}", scene.shapes)),
                "series {index}"
            );
        }
    }

    #[test]
    fn hatching_stays_inside_its_bar() {
        let at = Rect::new(50.0, 20.0, 80.0, 200.0);
        for index in 1..6 {
            let mut scene = Scene::new((300, 300));
            bar(&mut scene, index, at);
            assert!(scene.shapes.len() > 3, "bar {index} is not hatched");
            for shape in &scene.shapes {
                if let Shape::Line { points, .. } = shape {
                    assert!(points.iter().all(|p| at.holds(*p)), "{points:?}");
                }
            }
        }
    }
}
