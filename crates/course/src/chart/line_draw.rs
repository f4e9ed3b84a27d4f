//! The lines, whiskers and markers of a line chart.

use super::axis::Scale;
use super::colour;
use super::geometry::thin;
use super::line::Line;
use super::plot::place;
use super::scene::{Point, Rect, Scene};
use super::style::{marker, series_line, whisker};
use super::value::{InSight, Value, in_sight};

/// Half the width of a whisker's caps.
const REACH: f64 = 4.0;
/// Whiskers whose middles are nearer than this cover each other.
const NEAR: f64 = 2.0 * REACH + 1.0;
/// How far to either side lines move at most, in pixels and as a share of the plot's width: at
/// its edges there is no more air.
const FARTHEST: (f64, f64) = (12.0, 0.019);

/// Draws all lines; whiskers lie above them, markers on top, so that no line hides them.
pub(super) fn lines(lines: &[Line], scene: &mut Scene, area: Rect, x: &Scale, y: &Scale) {
    let plot = Plot { lines, area, x, y };
    let aside = plot.aside();
    for (index, line) in lines.iter().enumerate().filter(|(_, line)| line.joined) {
        let points = line.points.iter().map(|p| plot.at(p, aside[index]));
        let points = thin(points.collect(), area.width());
        series_line(scene, index, &points, area);
    }
    for (index, aside) in aside.iter().enumerate() {
        for (x, shown) in plot.whiskers(index) {
            whisker(scene, shown, (x + aside, REACH), colour::series(index));
        }
    }
    for (index, aside) in aside.iter().enumerate() {
        if !bears_markers(lines, index) {
            continue;
        }
        for point in plot.marked(index) {
            if area.holds(plot.at(point, 0.0)) {
                marker(scene, index, plot.at(point, *aside));
            }
        }
    }
}

/// Whether a series shows its markers. Beside points that no line joins, lines do not: a marker on
/// a line would look like one of these points.
pub(super) fn bears_markers(lines: &[Line], index: usize) -> bool {
    !lines[index].joined || lines.iter().all(|line| line.joined)
}

/// Lines and where they lie.
struct Plot<'p> {
    lines: &'p [Line],
    area: Rect,
    x: &'p Scale,
    y: &'p Scale,
}

impl Plot<'_> {
    fn at(&self, (x, y): &(f64, Value), aside: f64) -> Point {
        let (x, y) = place(self.area, self.x, self.y, (*x, y.number));
        (x + aside, y)
    }

    /// The points with a marker: all that no line joins and all of a short line, about a dozen of a
    /// long one.
    fn marked(&self, index: usize) -> impl Iterator<Item = &(f64, Value)> {
        let Line { points, joined, .. } = &self.lines[index];
        let every = points
            .len()
            .div_ceil(if points.len() > 24 { 12 } else { 24 });
        let every = if *joined { every } else { 1 };
        let first = index * every / self.lines.len();
        points.iter().skip(first).step_by(every)
    }

    /// The whiskers of a line: where each stands, and what is seen of it.
    fn whiskers(&self, index: usize) -> impl Iterator<Item = (f64, InSight)> {
        self.marked(index).filter_map(|point| {
            let shown = in_sight(point.1.whisker?, self.area, self.y)?;
            Some((self.at(point, 0.0).0, shown))
        })
    }

    /// How far each line moves to the right so that no whisker covers another.
    fn aside(&self) -> Vec<f64> {
        let mut all: Vec<(f64, usize, InSight)> = Vec::new();
        for index in 0..self.lines.len() {
            all.extend(self.whiskers(index).map(|(x, shown)| (x, index, shown)));
        }
        all.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut moves = vec![false; self.lines.len()];
        for (i, (x, index, shown)) in all.iter().enumerate() {
            let near = all[i + 1..].iter().take_while(|other| other.0 < x + NEAR);
            for (_, other, seen) in near {
                if other != index && overlap(shown, seen) {
                    moves[*index] = true;
                    moves[*other] = true;
                }
            }
        }
        let moved = moves.iter().filter(|moves| **moves).count();
        let steps = moved.saturating_sub(1).max(1) as f64;
        let farthest = FARTHEST.0.min(FARTHEST.1 * self.area.width());
        let step = NEAR.min(2.0 * farthest / steps);
        let mut number = 0.0;
        let place = |moves: bool| {
            if !moves {
                return 0.0;
            }
            number += 1.0;
            step * (number - 1.0 - steps / 2.0)
        };
        moves.into_iter().map(place).collect()
    }
}

/// Whether two whiskers at one place would touch.
fn overlap(a: &InSight, b: &InSight) -> bool {
    a.high <= b.low + 4.0 && b.high <= a.low + 4.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chart::scene::Shape;

    const AREA: Rect = Rect {
        left: 100.0,
        top: 0.0,
        right: 900.0,
        bottom: 100.0,
    };

    fn line(name: &str, points: &[(f64, f64, (f64, f64))]) -> Line {
        let point = |&(x, number, (low, high)): &(f64, f64, (f64, f64))| {
            let whisker = (low < high).then_some((low, high));
            (x, Value { number, whisker })
        };
        Line {
            name: name.into(),
            points: points.iter().map(point).collect(),
            joined: true,
        }
    }

    fn drawn(of: &[Line]) -> Vec<Shape> {
        let mut scene = Scene::new((1000, 100));
        let (x, y) = (Scale::new(0.0, 2.0, false), Scale::new(0.0, 10.0, false));
        lines(of, &mut scene, AREA, &x, &y);
        scene.shapes
    }

    /// The upright lines and the caps of a series' whiskers: points from low to high.
    fn whiskers(shapes: &[Shape], series: usize) -> Vec<Vec<Point>> {
        let of_series = |shape: &Shape| match shape {
            Shape::Line {
                points,
                width,
                colour,
            } if *width == 1.7 && *colour == colour::series(series) => Some(points.clone()),
            _ => None,
        };
        shapes.iter().filter_map(of_series).collect()
    }

    #[test]
    fn a_whisker_goes_from_low_to_high_with_caps() {
        let one = [line("a", &[(0.0, 2.0, (0.0, 0.0)), (1.0, 5.0, (4.0, 7.0))])];
        let expected = vec![
            vec![(500.0, 60.0), (500.0, 30.0)],
            vec![(496.0, 60.0), (504.0, 60.0)],
            vec![(496.0, 30.0), (504.0, 30.0)],
        ];
        assert_eq!(whiskers(&drawn(&one), 0), expected);
    }

    #[test]
    fn a_whisker_that_leaves_the_plot_has_no_cap_there() {
        let one = |whisker| [line("a", &[(0.0, 2.0, (0.0, 0.0)), (1.0, 5.0, whisker)])];
        let expected = vec![
            vec![(500.0, 60.0), (500.0, 0.0)],
            vec![(496.0, 60.0), (504.0, 60.0)],
        ];
        assert_eq!(whiskers(&drawn(&one((4.0, 12.0))), 0), expected);
        assert!(whiskers(&drawn(&one((11.0, 12.0))), 0).is_empty());
    }

    #[test]
    fn whiskers_that_would_cover_each_other_stand_side_by_side() {
        let lines = |low: f64| {
            [
                line("a", &[(0.0, 2.0, (1.0, 3.0)), (1.0, 2.0, (1.0, 3.0))]),
                line(
                    "no range",
                    &[(0.0, 3.0, (0.0, 0.0)), (1.0, 3.0, (0.0, 0.0))],
                ),
                line("b", &[(1.0, low, (low, low + 2.0)), (2.0, 9.0, (0.0, 0.0))]),
                line("far", &[(1.0, 9.0, (8.0, 9.5)), (2.0, 9.0, (0.0, 0.0))]),
            ]
        };
        let place = |shapes: &[Shape], series| whiskers(shapes, series)[0][0].0;
        let covered = drawn(&lines(2.0));
        assert_eq!(whiskers(&covered, 0)[3][0].0, 500.0 - 4.5);
        assert_eq!(place(&covered, 2), 500.0 + 4.5);
        assert_eq!(place(&covered, 3), 500.0, "it covers none");
        let marker = Shape::Circle {
            centre: (495.5, 80.0),
            radius: 4.3,
            fill: colour::series(0),
        };
        assert!(
            covered
                .iter()
                .any(|s| format!("{s:?}") == format!("{marker:?}")),
            "the marker moves with its whisker"
        );
        let apart = drawn(&lines(5.0));
        assert_eq!(place(&apart, 2), 500.0, "nothing is covered");
    }

    #[test]
    fn points_that_no_line_joins_all_have_a_marker() {
        let all: Vec<_> = (0..100)
            .map(|i| (0.02 * f64::from(i), 5.0, (0.0, 0.0)))
            .collect();
        let count = |joined| {
            let beside = line("b", &all[..24]);
            let shapes = drawn(&[
                Line {
                    joined,
                    ..line("a", &all)
                },
                beside,
            ]);
            // Each marker is a circle or a square on a white one.
            let circles = shapes.iter().filter(|s| matches!(s, Shape::Circle { .. }));
            let squares = shapes.iter().filter(|s| matches!(s, Shape::Polygon { .. }));
            let of_first = |shape: &&Shape| match shape {
                Shape::Line { colour, .. } => *colour == colour::series(0),
                _ => false,
            };
            let lines = shapes.iter().filter(of_first).count();
            (circles.count() / 2, squares.count() / 2, lines)
        };
        assert_eq!(count(false), (100, 0, 0), "the line beside has no markers");
        assert_eq!(count(true), (12, 24, 1));
    }

    #[test]
    fn lines_never_move_far() {
        let many: Vec<Line> = (0..9)
            .map(|_| line("a", &[(0.0, 2.0, (0.0, 0.0)), (1.0, 2.0, (1.0, 3.0))]))
            .collect();
        let shapes = drawn(&many);
        // Seven colours: the last two series share theirs with the first two.
        for series in 0..7 {
            for whisker in whiskers(&shapes, series) {
                let away = (whisker[0].0 - 500.0).abs();
                assert!(away <= FARTHEST.0 + REACH, "{away}");
            }
        }
    }
}
