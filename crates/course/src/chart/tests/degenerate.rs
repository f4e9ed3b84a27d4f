//! Ranges on which plotters has hung: each chart must answer, with a figure or an error.

use std::sync::mpsc::channel;
use std::thread::spawn;
use std::time::Duration;

use super::*;
use crate::error::Result;

/// Runs `draw` beside the test, which fails if there is no answer soon.
fn answer(what: String, draw: impl FnOnce() -> Result<Figure> + Send + 'static) -> Result<Figure> {
    let (send, receive) = channel();
    spawn(move || send.send(draw()));
    receive
        .recv_timeout(Duration::from_secs(60))
        .unwrap_or_else(|e| panic!("{what}: {e} (a hang or a panic)"))
}

#[test]
fn extreme_values_give_a_figure_or_an_error() {
    let values = [
        0.0,
        1e-320,
        1e-100,
        1e-17,
        1.0,
        1.0 + f64::EPSILON,
        1e16,
        1e16 + 2.0,
        1e100,
        1e300,
        f64::MAX,
        f64::NAN,
        -1e16,
        f64::NEG_INFINITY,
    ];
    for (i, &a) in values.iter().enumerate() {
        for &b in &values[i + 1..] {
            for log in [false, true] {
                let what = format!("{a:?} and {b:?}, log {log}");
                let result = answer(what.clone(), move || {
                    let chart = LineChart::new("t", "x", "y").size(400, 300);
                    let chart = chart.line("a", [(1.0, a), (2.0, b)]);
                    let drawn = if log { chart.log_y() } else { chart }.draw();
                    let chart = LineChart::new("t", "x", "y").size(400, 300);
                    let chart = chart.line("a", [(a, 1.0), (b, 2.0)]);
                    if log { chart.log_x() } else { chart }.draw()?;
                    drawn
                });
                let fine = |v: f64| v.abs() <= 1e100 && (!log || v >= 1e-100);
                let apart = (a - b).abs() > 1e-9 * a.abs().max(b.abs()) && (a - b).abs() >= 1e-100;
                assert_eq!(
                    result.is_ok(),
                    fine(a) && fine(b) && apart,
                    "{what}: {result:?}"
                );
            }
        }
    }
}

#[test]
fn other_charts_answer_too() {
    for value in [
        0.0,
        1e-320,
        1e-100,
        1.0,
        1e16,
        1e100,
        1e300,
        f64::NAN,
        -1e100,
        f64::INFINITY,
    ] {
        for log in [false, true] {
            let _ = answer(format!("bar {value:?}"), move || {
                let chart = BarChart::new("t", "x", "y")
                    .bar("a", value)
                    .size(400, 300)
                    .values();
                if log { chart.log_y() } else { chart }.draw()
            });
        }
        let _ = answer(format!("heat {value:?}"), move || {
            let map = HeatMap::new("t", "x", "y")
                .columns(["a", "b"])
                .rows(["c"])
                .size(400, 300);
            map.values([[value, 1.0]]).draw()
        });
        let _ = answer(format!("range {value:?}"), move || {
            let chart = RewardChart::new("t", "x", "y")
                .runs("a", [[1, 2]])
                .size(400, 300);
            chart.y_range(0, value).every(value).draw()
        });
        let _ = answer(format!("runs {value:?}"), move || {
            let chart = RewardChart::new("t", "x", "y").size(400, 300);
            chart.runs("a", [[value, 1.0], [2.0, -value]]).draw()
        });
    }
}

#[test]
fn an_endless_iterator_is_an_error() {
    let error = answer("endless".into(), || {
        LineChart::new("t", "x", "y")
            .line("a", (0..).map(|i| (i, i % 7)))
            .draw()
    })
    .unwrap_err()
    .to_string();
    assert!(
        error.contains("series \"a\"") && error.contains("2000000"),
        "{error}"
    );
}

#[test]
fn endless_rows_are_an_error() {
    for kind in 0..3 {
        let error = answer(format!("endless {kind}"), move || {
            let map = HeatMap::new("t", "x", "y").columns(["a", "b"]).rows(["c"]);
            let runs = RewardChart::new("t", "x", "y");
            match kind {
                0 => map.values((0..).map(|_| 0..)).draw(),
                1 => runs.runs("a", (0..).map(|_| 0..)).draw(),
                _ => runs.runs("a", std::iter::repeat([1.0, 2.0])).draw(),
            }
        });
        let error = error.unwrap_err().to_string();
        assert!(error.contains("more than 2000000 values"), "{error}");
    }
}

#[test]
fn a_whole_book_as_a_title_is_cut() {
    let figure = answer("book".into(), || {
        let book = "It was the best of times. ".repeat(40_000);
        LineChart::new(book.clone(), book.clone(), book)
            .line("a", [(0, 1), (1, 2)])
            .draw()
    });
    assert!(figure.unwrap().svg().contains('…'));
}

#[test]
fn many_points_are_quick_and_small() {
    let figure = answer("a million points".into(), || {
        let mut random = noise(1);
        let points = (0..1_000_000).map(|i| (f64::from(i), random()));
        LineChart::new("t", "x", "y")
            .line("a", points.collect::<Vec<_>>())
            .draw()
    })
    .unwrap();
    assert!(figure.svg().len() < 200_000, "{}", figure.svg().len());
    assert!(figure.describe().contains("1,000,000 points"));
}

#[test]
fn a_line_far_outside_the_range_is_cut_off() {
    let figure = answer("far".into(), || {
        LineChart::new("t", "x", "y")
            .line("a", [(0.0, 0.0), (1.0, 1e100), (2.0, -1e100), (3.0, 1.0)])
            .y_range(0, 1)
            .draw()
    })
    .unwrap();
    assert!(figure.describe().contains("outside the vertical axis"));
}
