//! What a figure says about itself in words.

use super::*;

#[test]
fn a_line_chart_in_words() {
    let figure = lines().words("Both rise").draw().unwrap();
    let expected = "\
Line chart: Parameters against rank.
Horizontal axis: rank r, from 1 to 256, logarithmic scale.
Vertical axis: trainable parameters, from 1,536 to 3,538,944, logarithmic scale.
Series \"query <only> & \"more\"\": 9 points; first 1,536 at 1, last 393,216 at 256; \
lowest 1,536 at 1, highest 393,216 at 256.
Series \"every layer\": 9 points; first 13,824 at 1, last 3,538,944 at 256; \
lowest 13,824 at 1, highest 3,538,944 at 256.
Reference line \"full matrix\": 589,824.
Both rise.";
    assert_eq!(figure.describe(), expected);
}

#[test]
fn points_in_words() {
    let chart = LineChart::new("A wave", "x", "y").line("wave", [(0, 0), (9, 1)]);
    let figure = chart.points("seen", [(1, 2.5), (4, 3.0)]).draw().unwrap();
    let words = figure.describe();
    assert!(
        words.contains("Points \"seen\": 2.5 at 1; 3 at 4."),
        "{words}"
    );
}

#[test]
fn bars_in_words() {
    let expected = "\
Bar chart: Accuracy.
Horizontal axis: task, 2 categories, 2 series.
Vertical axis: accuracy, from 0 to 0.95.
Series \"full fine-tuning\": sentiment (SST-2) 0.94 (0.93 to 0.95); \
grammar (CoLA) 0.61 (0.59 to 0.64).
Series \"LoRA\": sentiment (SST-2) 0.95; grammar (CoLA) 0.633.
Reference line \"chance\": 0.5.";
    assert_eq!(bars().draw().unwrap().describe(), expected);
    let many = (0..13).fold(BarChart::new("t", "x", "y"), |chart, i| {
        chart.bar(format!("b{i}"), (i - 6) * (i - 6) + 1)
    });
    let words = many.draw().unwrap().describe().to_string();
    assert!(
        words.contains("Bars: 13 bars; first, b0 37; last, b12 37; lowest, b6 1;"),
        "{words}"
    );
}

#[test]
fn a_heat_map_in_words() {
    let map = HeatMap::new("Accuracy", "scale α", "rank r")
        .columns(["8", "16", "32"])
        .rows(["4", "8"])
        .values([[0.5, 0.7, 0.6], [0.4, 0.8, 0.9]])
        .unit("accuracy");
    let expected = "\
Heat map: Accuracy.
Columns: scale α, 3 in all; rows: rank r, 2 in all.
Colours: accuracy from 0.4 (dark) to 0.9 (light).
Cells: lowest 0.4 in row 8, column 8; highest 0.9 in row 8, column 32.";
    assert_eq!(map.draw().unwrap().describe(), expected);
}

#[test]
fn an_image_grid_in_words() {
    let grid = ImageGrid::new("Two digits").columns(1);
    let grid = grid.gray("one", 1, 1, [0.0]).gray("two", 1, 1, [1.0]);
    let expected = "\
Image grid: Two digits.
2 images, 2 rows and 1 column.
Labels, row by row: \"one\", \"two\".";
    assert_eq!(grid.draw().unwrap().describe(), expected);
}

#[test]
fn a_reward_chart_in_words() {
    let chart = RewardChart::new("CartPole", "step", "return")
        .runs("LoRA", vec![vec![10.0, 30.0, 20.0], vec![20.0, 50.0, 60.0]])
        .every(500);
    let expected = "\
Reward chart: CartPole.
Horizontal axis: step, from 500 to 1,500.
Vertical axis: return, from 10 to 60.
Each line is the mean over seeds; each band goes from the lowest seed to the highest.
Runs \"LoRA\": 2 seeds, 3 values each; mean first 15 at 500, mean last 40 at 1,500; \
mean lowest 15 at 500, mean highest 40 at 1,500; any seed from 10 to 60.";
    assert_eq!(chart.draw().unwrap().describe(), expected);
}

#[test]
fn the_range_of_an_axis_includes_its_references() {
    let chart = LineChart::new("t", "x", "y").line("a", [(0, 1), (1, 2)]);
    let words = |chart: LineChart| chart.draw().unwrap().describe().to_string();
    assert!(words(chart.clone()).contains("Vertical axis: y, from 1 to 2."));
    assert!(words(chart.clone().reference("full", 9)).contains("y, from 1 to 9."));
    assert!(words(chart.y_range(0, 5)).contains("y, from 0 to 5."));
}

#[test]
fn a_line_with_ranges_in_words() {
    let spread = |runs: [f64; 3]| Spread::of(runs).unwrap();
    let chart = LineChart::new("Loss", "rank", "loss")
        .line(
            "LoRA",
            [(1, spread([4.0, 4.3, 4.1])), (8, spread([3.0, 3.5, 3.1]))],
        )
        .line("full", [(1, 3.0), (8, 3.5)]);
    let expected = "\
Line chart: Loss.
Horizontal axis: rank, from 1 to 8.
Vertical axis: loss, from 3 to 4.3.
Series \"LoRA\": 4.133 (4 to 4.3) at 1; 3.2 (3 to 3.5) at 8.
Series \"full\": 2 points; first 3 at 1, last 3.5 at 8; lowest 3 at 1, highest 3.5 at 8.";
    assert_eq!(chart.draw().unwrap().describe(), expected);
    let many = (0..13).map(|i| (i, f64::from(i)));
    let whiskers = (0..13).map(|i| (f64::from(i) - 0.5, f64::from(i) + 0.5));
    let chart = LineChart::new("t", "x", "y")
        .line("a", many)
        .errors(whiskers);
    let words = chart.draw().unwrap().describe().to_string();
    assert!(
        words.contains("Vertical axis: y, from −0.5 to 12.5."),
        "{words}"
    );
    assert!(
        words.contains("13 points; first 0 (−0.5 to 0.5) at 0, last 12 (11.5 to 12.5) at 12;"),
        "{words}"
    );
}

#[test]
fn a_spread_is_a_bar_with_a_whisker() {
    let spread = Spread::of([0.5, 0.7]).unwrap();
    let once = Spread::of([0.4]).unwrap();
    let by_hand = BarChart::new("t", "x", "y")
        .group("g", [("a", 0.6), ("b", 0.4)])
        .group("h", [("a", 0.4)]);
    let bars = BarChart::new("t", "x", "y")
        .group("g", [("a", spread), ("b", once)])
        .group("h", [("a", &once)]);
    let words = bars.draw().unwrap().describe().to_string();
    assert!(words.contains("a 0.6 (0.5 to 0.7); b 0.4.\n"), "{words}");
    assert_ne!(bars.draw().unwrap().svg(), by_hand.draw().unwrap().svg());
    let single = BarChart::new("t", "x", "y").bar("a", spread).bar("b", 1);
    let by_hand = BarChart::new("t", "x", "y").bar("a", 0.6).error(0.5, 0.7);
    let by_hand = by_hand.bar("b", 1).draw().unwrap();
    assert_eq!(single.draw().unwrap().svg(), by_hand.svg());
}

#[test]
fn upright_references_in_words() {
    let chart = lines()
        .reference_x("chosen rank", 512)
        .reference_x("half", 0.5);
    let words = chart.draw().unwrap().describe().to_string();
    assert!(
        words.contains("rank r, from 0.5 to 512, logarithmic"),
        "{words}"
    );
    let ending = "\
Reference line \"full matrix\": 589,824.
Vertical reference line \"chosen rank\": at 512 on the horizontal axis.
Vertical reference line \"half\": at 0.5 on the horizontal axis.";
    assert!(words.ends_with(ending), "{words}");
}

#[test]
fn a_diverging_heat_map_in_words() {
    let map = HeatMap::new("Change", "test", "adapter")
        .columns(["kjv", "sotu"])
        .rows(["kjv", "sotu"])
        .values([[-0.5, 0.2], [0.1, -0.3]])
        .unit("change of the loss")
        .diverging(0, "better", "worse");
    let expected = "\
Heat map: Change.
Columns: test, 2 in all; rows: adapter, 2 in all.
Colours: change of the loss from −0.5 (blue) to 0.5 (orange), white at 0; \
below 0: better, above 0: worse.
Cells: lowest −0.5 in row kjv, column kjv; highest 0.2 in row kjv, column sotu.";
    assert_eq!(map.clone().draw().unwrap().describe(), expected);
    let words = map.range(-1, 0.5).draw().unwrap().describe().to_string();
    assert!(
        words.contains("from −1 (blue) to 0.5 (orange), white at 0;"),
        "{words}"
    );
}

#[test]
fn a_heat_map_with_ranges_in_words() {
    let spread = |low: f64| Spread::of([low, low + 0.2]).unwrap();
    let map = HeatMap::new("Loss", "test", "adapter")
        .columns(["kjv", "sotu"])
        .rows(["kjv", "sotu"])
        .values([[spread(3.0), spread(4.0)], [spread(5.0), spread(2.0)]]);
    let words = map.draw().unwrap().describe().to_string();
    let ending = "\
Cells: lowest 2.1 (2 to 2.2) in row sotu, column sotu; \
highest 5.1 (5 to 5.2) in row sotu, column kjv.
Row kjv: kjv 3.1 (3 to 3.2); sotu 4.1 (4 to 4.2).
Row sotu: kjv 5.1 (5 to 5.2); sotu 2.1 (2 to 2.2).";
    assert!(words.ends_with(ending), "{words}");
}
