//! Cutting lines: to a rectangle, into dashes, and down to what the pixels can show.

use super::scene::{Point, Rect};

/// The part of a straight line inside `area`, if any (Liang and Barsky's method).
pub(super) fn clip(from: Point, to: Point, area: Rect) -> Option<(Point, Point)> {
    let (dx, dy) = (to.0 - from.0, to.1 - from.1);
    let (mut enter, mut leave) = (0.0_f64, 1.0_f64);
    for (speed, room) in [
        (-dx, from.0 - area.left),
        (dx, area.right - from.0),
        (-dy, from.1 - area.top),
        (dy, area.bottom - from.1),
    ] {
        if speed == 0.0 {
            if room < 0.0 {
                return None;
            }
        } else if speed < 0.0 {
            enter = enter.max(room / speed);
        } else {
            leave = leave.min(room / speed);
        }
    }
    let at = |share: f64| (from.0 + share * dx, from.1 + share * dy);
    (enter <= leave).then(|| (at(enter), at(leave)))
}

/// The pieces of a line through `points` that lie inside `area`.
pub(super) fn clip_line(points: &[Point], area: Rect) -> Vec<Vec<Point>> {
    let mut pieces: Vec<Vec<Point>> = Vec::new();
    for pair in points.windows(2) {
        let Some((from, to)) = clip(pair[0], pair[1], area) else {
            continue;
        };
        match pieces.last_mut() {
            Some(piece) if piece.last() == Some(&from) => piece.push(to),
            _ => pieces.push(vec![from, to]),
        }
    }
    pieces
}

/// Cuts a line into dashes; `pattern` holds the lengths of dash, gap, dash, gap … in pixels.
pub(super) fn dashes(points: &[Point], pattern: &[f64]) -> Vec<Vec<Point>> {
    if pattern.is_empty() {
        return vec![points.to_vec()];
    }
    let mut cut = Dasher::new(pattern);
    for pair in points.windows(2) {
        cut.follow(pair[0], pair[1]);
    }
    cut.finish()
}

struct Dasher<'p> {
    pattern: &'p [f64],
    index: usize,
    left: f64,
    current: Vec<Point>,
    done: Vec<Vec<Point>>,
}

impl<'p> Dasher<'p> {
    fn new(pattern: &'p [f64]) -> Self {
        Self {
            pattern,
            index: 0,
            left: pattern[0],
            current: Vec::new(),
            done: Vec::new(),
        }
    }

    fn drawing(&self) -> bool {
        self.index.is_multiple_of(2)
    }

    fn follow(&mut self, from: Point, to: Point) {
        let length = (to.0 - from.0).hypot(to.1 - from.1);
        let mut walked = 0.0;
        while walked < length {
            if self.drawing() && self.current.is_empty() {
                self.current.push(along(from, to, walked / length));
            }
            let next = (walked + self.left).min(length);
            self.left -= next - walked;
            walked = next;
            if self.drawing() {
                self.current.push(along(from, to, walked / length));
            }
            if self.left <= 1e-9 {
                self.turn();
            }
        }
    }

    fn turn(&mut self) {
        self.end_dash();
        self.index = (self.index + 1) % self.pattern.len();
        // Never shorter than a tenth of a pixel, so that every walk comes to its end.
        self.left = self.pattern[self.index].max(0.1);
    }

    fn end_dash(&mut self) {
        let dash = std::mem::take(&mut self.current);
        if dash.len() > 1 {
            self.done.push(dash);
        }
    }

    fn finish(mut self) -> Vec<Vec<Point>> {
        self.end_dash();
        self.done
    }
}

fn along(from: Point, to: Point, share: f64) -> Point {
    (
        from.0 + (to.0 - from.0) * share,
        from.1 + (to.1 - from.1) * share,
    )
}

pub(super) fn length(points: &[Point]) -> f64 {
    points
        .windows(2)
        .map(|p| (p[1].0 - p[0].0).hypot(p[1].1 - p[0].1))
        .sum()
}

/// Leaves out points that no pixel shows: of each column of a line that runs from left to
/// right it keeps the first, the lowest, the highest and the last.
pub(super) fn thin(points: Vec<Point>, columns: f64) -> Vec<Point> {
    let rising = points.windows(2).all(|p| p[0].0 <= p[1].0);
    if !rising || (points.len() as f64) < 2.0 * columns {
        return points;
    }
    let mut kept = Vec::new();
    for column in points.chunk_by(|a, b| a.0.floor() == b.0.floor()) {
        keep_column(column, &mut kept);
    }
    kept
}

fn keep_column(column: &[Point], kept: &mut Vec<Point>) {
    let last = column.len() - 1;
    let by_y = |a: &usize, b: &usize| column[*a].1.total_cmp(&column[*b].1);
    let mut indices = vec![
        0,
        (0..=last).min_by(by_y).unwrap_or(0),
        (0..=last).max_by(by_y).unwrap_or(0),
        last,
    ];
    indices.sort_unstable();
    indices.dedup();
    kept.extend(indices.into_iter().map(|i| column[i]));
}

#[cfg(test)]
mod tests {
    use super::*;

    const AREA: Rect = Rect {
        left: 0.0,
        top: 0.0,
        right: 10.0,
        bottom: 10.0,
    };

    #[test]
    fn clipping_keeps_what_is_inside() {
        assert_eq!(
            clip((-5.0, 5.0), (15.0, 5.0), AREA),
            Some(((0.0, 5.0), (10.0, 5.0)))
        );
        assert_eq!(clip((-5.0, 20.0), (15.0, 20.0), AREA), None);
        assert_eq!(
            clip((3.0, 3.0), (3.0, 3.0), AREA),
            Some(((3.0, 3.0), (3.0, 3.0)))
        );
        let out_and_in = [(1.0, 5.0), (5.0, 30.0), (9.0, 5.0)];
        assert_eq!(clip_line(&out_and_in, AREA).len(), 2);
        let inside = [(1.0, 5.0), (5.0, 3.0), (9.0, 5.0)];
        assert_eq!(clip_line(&inside, AREA), [inside.to_vec()]);
    }

    #[test]
    fn dashes_go_round_corners() {
        let corner = [(0.0, 0.0), (3.0, 0.0), (3.0, 7.0)];
        let cut = dashes(&corner, &[4.0, 2.0]);
        assert_eq!(cut[0], [(0.0, 0.0), (3.0, 0.0), (3.0, 1.0)]);
        assert_eq!(cut[1], [(3.0, 3.0), (3.0, 7.0)]);
        assert_eq!(cut.len(), 2);
        assert_eq!(dashes(&corner, &[]), [corner.to_vec()]);
        assert!(dashes(&corner, &[0.0, 0.0]).len() < 100);
    }

    #[test]
    fn thinning_keeps_peaks() {
        let mut points: Vec<Point> = (0..10_000).map(|i| (f64::from(i) / 100.0, 5.0)).collect();
        points[5555].1 = -80.0;
        let kept = thin(points.clone(), 100.0);
        assert!(kept.len() <= 400 && kept.contains(&points[5555]));
        assert_eq!(kept[0], points[0]);
        assert_eq!(kept.last(), points.last());
        points.reverse();
        assert_eq!(thin(points.clone(), 100.0), points);
    }
}
