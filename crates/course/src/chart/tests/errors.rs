//! Every mistake a learner can make gives an error that names it and says what to do.

use super::*;
use crate::error::{Error, Result};

/// The drawing fails, and the message has all these parts.
#[track_caller]
fn refuses(result: Result<Figure>, parts: &[&str]) {
    let error = result.expect_err("it was drawn");
    assert!(matches!(error, Error::Chart { .. }), "{error:?}");
    let message = error.to_string();
    for part in parts {
        assert!(message.contains(part), "no \"{part}\" in: {message}");
    }
}

fn chart() -> LineChart {
    LineChart::new("Loss", "step", "loss")
}

fn good() -> LineChart {
    chart().line("fine", [(0, 1), (1, 2)])
}

#[test]
fn lines_need_points() {
    refuses(chart().draw(), &["chart \"Loss\"", "no series", ".line("]);
    let none: [(f64, f64); 0] = [];
    refuses(
        good().line("void", none).draw(),
        &["\"void\" is empty", "two points"],
    );
    refuses(
        good().line("dot", [(3, 1)]).draw(),
        &["\"dot\"", "1 point", "x = 3.0"],
    );
    refuses(
        good().line("wall", [(3, 1), (3, 2)]).draw(),
        &["\"wall\"", "2 points", "x values"],
    );
    refuses(
        good().points("void", none).draw(),
        &["\"void\" is empty", "one point"],
    );
    refuses(
        chart().points("wall", [(3, 1), (3, 2)]).draw(),
        &["every x value is 3.0", "another x"],
    );
    assert!(good().points("dot", [(3, 1)]).draw().is_ok());
    refuses(
        chart().line("flat", [(0, 5), (1, 5)]).draw(),
        &["\"flat\"", "5.0", ".y_range"],
    );
    let flat = chart()
        .line("a", [(0, 5), (1, 5)])
        .line("b", [(0, 5), (1, 5)]);
    refuses(flat.draw(), &["\"a\", \"b\"", ".y_range"]);
    assert!(
        good().line("flat", [(0, 5), (1, 5)]).draw().is_ok(),
        "flat beside another"
    );
}

#[test]
fn values_must_be_finite() {
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let value = format!("{bad:?}");
        let points = [(0.0, 1.0), (1.0, 2.0), (2.0, bad)];
        let y = good().line("bad", points);
        refuses(
            y.draw(),
            &["\"bad\" at point 2", "y is", &value, "no place on an axis"],
        );
        let x = good().line("bad", points.map(|(x, y)| (y, x)));
        refuses(x.draw(), &["\"bad\" at point 2", "x is", &value]);
        refuses(
            good().reference("base", bad).draw(),
            &["reference \"base\"", &value],
        );
        let bars = BarChart::new("t", "x", "y").bar("ok", 1).bar("bad", bad);
        refuses(bars.draw(), &["bar \"bad\" (number 1", &value]);
        let bars = BarChart::new("t", "x", "y").bar("bad", 1.0).error(bad, 2.0);
        refuses(bars.draw(), &["low error of bar \"bad\"", &value]);
        let map = HeatMap::new("t", "x", "y")
            .columns(["a", "b"])
            .rows(["c", "d"]);
        let map = map.values([[0.0, 1.0], [2.0, bad]]);
        refuses(map.draw(), &["row 1 (\"d\"), column 1 (\"b\")", &value]);
        let runs = vec![vec![1.0, 2.0], vec![1.0, bad]];
        let runs = RewardChart::new("t", "x", "y").runs("r4", runs);
        refuses(runs.draw(), &["runs \"r4\", seed 1, value 1", &value]);
        let grid = ImageGrid::new("t").gray("seven", 2, 1, [0.0, bad]);
        refuses(grid.draw(), &["image \"seven\"", "index 1", &value]);
    }
}

#[test]
fn log_axes_need_values_above_zero() {
    for bad in [0.0, -3.0] {
        let value = format!("{bad:?}");
        let y = chart().line("bad", [(1.0, 1.0), (2.0, bad)]).log_y();
        refuses(
            y.draw(),
            &["\"bad\" at point 1", "y is", &value, "above 0", ".log_y()"],
        );
        let x = chart().line("bad", [(1.0, 1.0), (bad, 2.0)]).log_x();
        refuses(
            x.draw(),
            &["\"bad\" at point 1", "x is", &value, "above 0", ".log_x()"],
        );
        let bars = BarChart::new("t", "x", "y")
            .bar("bad", bad)
            .bar("b", 1)
            .log_y();
        refuses(bars.draw(), &["bar \"bad\"", &value, ".log_y()"]);
        let bars = BarChart::new("t", "x", "y")
            .bar("bad", 1)
            .error(bad, 2)
            .log_y();
        refuses(bars.draw(), &["low error of bar \"bad\"", &value]);
        refuses(
            good().log_y().reference("base", bad).draw(),
            &["\"base\"", &value],
        );
        refuses(
            good().log_y().y_range(bad, 9).draw(),
            &[".y_range()", &value],
        );
    }
}

#[test]
fn texts_must_not_be_empty() {
    for empty in ["", "  ", "\n"] {
        let line = [(0, 1), (1, 2)];
        refuses(
            LineChart::new(empty, "x", "y").line("a", line).draw(),
            &["title is empty"],
        );
        refuses(
            LineChart::new("t", empty, "y").line("a", line).draw(),
            &["x axis is empty"],
        );
        refuses(
            LineChart::new("t", "x", empty).line("a", line).draw(),
            &["y axis is empty"],
        );
        refuses(good().line(empty, line).draw(), &["series 1", "is empty"]);
        refuses(
            good().reference(empty, 1).draw(),
            &["reference 0", "is empty"],
        );
        refuses(
            BarChart::new(empty, "x", "y").bar("a", 1).draw(),
            &["title is empty"],
        );
        refuses(
            BarChart::new("t", "x", "y").bar(empty, 1).draw(),
            &["bar 0", "is empty"],
        );
        refuses(
            RewardChart::new("t", "x", empty).runs("a", [[1, 2]]).draw(),
            &["y axis"],
        );
        let map = HeatMap::new("t", "x", "y")
            .columns(["a", empty])
            .rows(["c"]);
        refuses(map.values([[0, 1]]).draw(), &["column 1", "is empty"]);
        refuses(heat().unit(empty).draw(), &["unit is empty"]);
        refuses(
            ImageGrid::new(empty).gray("a", 1, 1, [0.5]).draw(),
            &["title is empty"],
        );
        refuses(
            ImageGrid::new("t").gray(empty, 1, 1, [0.5]).draw(),
            &["image 0", "is empty"],
        );
    }
}

#[test]
fn names_must_differ() {
    refuses(
        good().line("fine", [(0, 1), (1, 2)]).draw(),
        &["\"fine\"", "rename"],
    );
    let bars = BarChart::new("t", "x", "y").bar("q", 1).bar("q", 2);
    refuses(bars.draw(), &["\"q\"", "rename"]);
    let runs = RewardChart::new("t", "x", "y")
        .runs("a", [[1, 2]])
        .runs("a", [[1, 2]]);
    refuses(runs.draw(), &["\"a\"", "rename"]);
}

#[test]
fn ranges_must_rise_and_sizes_must_be_sane() {
    refuses(good().y_range(2, 1).draw(), &["y_range(2.0, 1.0)", "below"]);
    refuses(good().y_range(1, 1).draw(), &["y_range(1.0, 1.0)"]);
    refuses(good().y_range(0.0, f64::NAN).draw(), &[".y_range()", "NaN"]);
    refuses(
        good().y_range(1e16, 1e16 + 2.0).draw(),
        &[".y_range()", "too close"],
    );
    for (width, height) in [
        (0, 0),
        (800, 0),
        (100, 460),
        (800, 5000),
        (u32::MAX, u32::MAX),
    ] {
        refuses(good().size(width, height).draw(), &["the size", ".size()"]);
        refuses(images().size(width, height).draw(), &["size"]);
    }
    let many = (0..150).fold(chart(), |c, i| {
        c.line(format!("series {i}"), [(0, 0), (1, i + 1)])
    });
    refuses(many.draw(), &["no room", ".size()"]);
    refuses(heat().range(3, 3).draw(), &["range(3.0, 3.0)"]);
}

#[test]
fn bars_must_make_sense() {
    let bars = || BarChart::new("Size", "layer", "parameters");
    refuses(bars().draw(), &["no bars", ".bar("]);
    let none: [(&str, f64); 0] = [];
    refuses(bars().group("void", none).draw(), &["\"void\" is empty"]);
    refuses(
        bars().bar("a", 1).group("g", [("a", 1)]).draw(),
        &[".bar() and .group()"],
    );
    refuses(
        bars().bar("a", 0).bar("b", 0).draw(),
        &["\"a\"", "0", ".y_range"],
    );
    refuses(
        bars().bar("a", 1).y_range(0.5, 2).draw(),
        &["leaves out 0", "LineChart"],
    );
    refuses(bars().error(0, 1).draw(), &[".error(", "after a .bar()"]);
    refuses(
        bars().bar("a", 5).error(0.1, 0.2).draw(),
        &["bar \"a\"", "not as distances"],
    );
    let group = || bars().group("g", [("a", 1), ("b", 2)]);
    refuses(group().errors([(0, 1)]).draw(), &["fewer", "2"]);
    refuses(
        group().errors([(0, 1), (1, 2), (2, 3)]).draw(),
        &["more", "2"],
    );
    let many = (0..2000).fold(bars(), |chart, i| chart.bar(format!("bar {i}"), 1));
    refuses(many.draw(), &["2000 bars", "too many", ".size()"]);
    assert!(
        bars().bar("a", 0).y_range(0, 1).draw().is_ok(),
        "flat, but with a range"
    );
}

#[test]
fn heat_maps_must_be_rectangles_with_names() {
    let map = || HeatMap::new("t", "x", "y");
    refuses(map().draw(), &["no values", ".values()"]);
    let two = || map().columns(["a", "b"]).rows(["c", "d"]);
    refuses(two().values([[1, 2]]).draw(), &["2 names for 1 rows"]);
    refuses(
        two().values(vec![vec![1, 2], vec![3]]).draw(),
        &["row 1 (\"d\")", "1 values"],
    );
    refuses(
        two().values([[1, 2, 3], [4, 5, 6]]).draw(),
        &["row 0 (\"c\")", "3 values"],
    );
    let none: [&str; 0] = [];
    refuses(
        map().columns(none).rows(["c"]).values([[1]]).draw(),
        &["no columns"],
    );
    refuses(
        two().values([[7, 7], [7, 7]]).draw(),
        &["row 0 (\"c\")", "7.0", ".range("],
    );
    let wide = map().columns((0..900).map(|i| i.to_string())).rows(["r"]);
    refuses(
        wide.values([(0..900).collect::<Vec<_>>()]).draw(),
        &["900 columns", "pixels"],
    );
}

#[test]
fn images_must_be_complete() {
    let grid = || ImageGrid::new("Digits");
    refuses(grid().draw(), &["no images"]);
    let short = grid().gray("fine", 1, 1, [0.5]).gray("short", 2, 2, [0.5]);
    refuses(
        short.draw(),
        &["image \"short\" (number 1", "1 values", "need 4"],
    );
    let gray = grid().rgb("gray", 2, 2, [0.5; 4]);
    refuses(gray.draw(), &["image \"gray\"", "need 12", ".rgb()"]);
    refuses(
        grid().gray("zero", 0, 3, [0.5; 0]).draw(),
        &["\"zero\"", "0 × 3"],
    );
    refuses(
        grid().gray("huge", usize::MAX, 3, [0.5]).draw(),
        &["\"huge\""],
    );
    for bad in [-0.1, 1.1, 255.0] {
        let image = grid().gray("bright", 2, 1, [0.0, bad]);
        refuses(
            image.draw(),
            &["\"bright\"", &format!("{bad:?} at index 1"), "255"],
        );
    }
    refuses(images().columns(0).draw(), &[".columns(0)"]);
    refuses(images().size(300, 300).draw(), &["do not fit", ".size()"]);
    let large = grid().gray("large", 3990, 1200, vec![0.5; 3990 * 1200]);
    refuses(large.draw(), &["values"]);
}

#[test]
fn runs_must_be_of_one_length() {
    let chart = || RewardChart::new("t", "x", "y");
    refuses(chart().draw(), &["no runs", ".runs("]);
    let none: Vec<Vec<f64>> = Vec::new();
    refuses(chart().runs("void", none).draw(), &["\"void\"", "no seeds"]);
    refuses(
        chart().runs("void", [Vec::<f64>::new()]).draw(),
        &["\"void\"", "0 values"],
    );
    refuses(
        chart().runs("one", [[1.0]]).draw(),
        &["\"one\"", "1 value ", "two"],
    );
    let uneven = vec![vec![1, 2, 3], vec![1, 2]];
    refuses(
        chart().runs("uneven", uneven).draw(),
        &["\"uneven\", seed 1", "2 values", "3"],
    );
    refuses(
        chart().runs("flat", [[5, 5]]).draw(),
        &["\"flat\"", "5.0", ".y_range"],
    );
    for bad in [0.0, -1.0, f64::NAN] {
        refuses(chart().runs("a", [[1, 2]]).every(bad).draw(), &[".every("]);
    }
}

#[test]
fn whiskers_of_lines_must_go_around_their_points() {
    let line = || chart().line("a", [(1, 1.0), (2, 2.0)]);
    refuses(
        chart().errors([(0, 1)]).draw(),
        &[".errors(", "after a .line()"],
    );
    refuses(
        line().errors([(0, 1)]).draw(),
        &["fewer whiskers than its line has points (2)"],
    );
    refuses(
        line().errors((0..).map(|i| (i, i))).draw(),
        &["more whiskers than its line has points (2)"],
    );
    refuses(
        line().errors([(0.5, 1.5), (0.1, 0.2)]).draw(),
        &["series \"a\" at point 1", "0.1 to 0.2", "not as distances"],
    );
    for bad in [f64::NAN, f64::INFINITY] {
        refuses(
            line().errors([(0.5, 1.5), (1.5, bad)]).draw(),
            &["high error of series \"a\" at point 1", &format!("{bad:?}")],
        );
    }
    refuses(
        line().errors([(0.0, 1.5), (1.5, 2.5)]).log_y().draw(),
        &["low error of series \"a\" at point 0", ".log_y()"],
    );
    let upside_down = Spread {
        mean: 1.0,
        low: 2.0,
        high: 0.0,
        n: 3,
    };
    refuses(
        chart()
            .line("a", [(1, upside_down), (2, upside_down)])
            .draw(),
        &["series \"a\" at point 0", "from 2.0 to 0.0"],
    );
}

#[test]
fn upright_references_are_checked_like_the_others() {
    for bad in [f64::NAN, f64::INFINITY] {
        refuses(
            good().reference_x("switch", bad).draw(),
            &["reference \"switch\"", &format!("{bad:?}")],
        );
    }
    refuses(
        chart()
            .line("a", [(1, 1), (2, 2)])
            .log_x()
            .reference_x("start", 0)
            .draw(),
        &["reference \"start\"", "0.0", ".log_x()"],
    );
    refuses(
        good().reference_x(" ", 1).draw(),
        &["reference 0", "is empty"],
    );
    refuses(
        good().reference("end", 1).reference_x("end", 1).draw(),
        &["\"end\"", "rename"],
    );
}

#[test]
fn a_diverging_scale_needs_a_center_in_its_range() {
    for bad in [f64::NAN, f64::INFINITY] {
        refuses(
            heat().diverging(bad, "worse", "better").draw(),
            &["center of .diverging()", &format!("{bad:?}")],
        );
    }
    refuses(
        heat().diverging(0, "", "better").draw(),
        &[".diverging()", "below", "is empty"],
    );
    refuses(
        heat().diverging(0, "worse", " ").draw(),
        &[".diverging()", "above", "is empty"],
    );
    refuses(
        heat().diverging(0, "worse", "better").range(0.1, 1).draw(),
        &["range(0.1, 1.0)", "center", "enclose"],
    );
    let flat = HeatMap::new("t", "x", "y")
        .columns(["a", "b"])
        .rows(["c"])
        .values([[7, 7]]);
    refuses(
        flat.clone().diverging(7, "worse", "better").draw(),
        &["row 0 (\"c\")", "7.0", ".range("],
    );
    assert!(flat.diverging(6, "worse", "better").draw().is_ok());
}

#[test]
fn a_cell_must_lie_in_its_range() {
    let inside_out = Spread {
        mean: 3.0,
        low: 1.0,
        high: 2.0,
        n: 3,
    };
    let fine = seeds(1.0, 0.5);
    let map = HeatMap::new("t", "x", "y").columns(["a", "b"]).rows(["c"]);
    refuses(
        map.values([[fine, inside_out]]).draw(),
        &["row 0 (\"c\"), column 1 (\"b\")", "from 1.0 to 2.0", "3.0"],
    );
}
