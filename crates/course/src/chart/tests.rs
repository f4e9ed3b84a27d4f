//! Tests of whole charts; those of single ideas are in their own files.

mod degenerate;
mod errors;
mod looks;
mod output;
mod said;

use super::*;
use crate::metrics::Spread;

/// Values that look random and are always the same.
fn noise(seed: u64) -> impl FnMut() -> f64 {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1_u64 << 53) as f64
    }
}

fn lines() -> LineChart {
    let ranks = [1_u32, 2, 4, 8, 16, 32, 64, 128, 256];
    LineChart::new("Parameters against rank", "rank r", "trainable parameters")
        .line("query <only> & \"more\"", ranks.map(|r| (r, r * 1536)))
        .line("every layer", ranks.map(|r| (r, r * 13_824)))
        .reference("full matrix", 589_824)
        .log_x()
        .log_y()
}

fn bars() -> BarChart {
    BarChart::new("Accuracy", "task", "accuracy")
        .group(
            "full fine-tuning",
            [("sentiment (SST-2)", 0.94), ("grammar (CoLA)", 0.61)],
        )
        .errors([(0.93, 0.95), (0.59, 0.64)])
        .group(
            "LoRA",
            [("sentiment (SST-2)", 0.95), ("grammar (CoLA)", 0.633)],
        )
        .values()
        .reference("chance", 0.5)
}

fn long_names() -> BarChart {
    let names = [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ];
    let weights = (0..14).map(|i| {
        let name = format!("model.layers.{}.mlp.{}.weight", i / 7, names[i % 7]);
        (name, 10_f64.powi(i as i32 % 7))
    });
    BarChart::new("Many long names", "weight", "parameters")
        .group("one", weights)
        .values()
        .log_y()
}

fn heat() -> HeatMap {
    let mut random = noise(4);
    let values: Vec<Vec<f64>> = (0..6).map(|_| (0..6).map(|_| random()).collect()).collect();
    HeatMap::new("Accuracy by rank and scale", "scale α", "rank r")
        .columns(["1", "2", "4", "8", "16", "32"])
        .rows(["1", "2", "4", "8", "16", "a rather long name of a row"])
        .values(values)
        .unit("accuracy")
}

fn images() -> ImageGrid {
    let mut random = noise(5);
    (0..32).fold(ImageGrid::new("Digits").columns(8), |grid, i| {
        let pixels: Vec<f64> = (0..28 * 28).map(|_| random()).collect();
        grid.gray(format!("label {i}"), 28, 28, pixels)
    })
}

fn rewards() -> RewardChart {
    let mut random = noise(6);
    let mut runs = |speed: f64| -> Vec<Vec<f64>> {
        (0..5)
            .map(|_| {
                let rise = |t: i32| 500.0 * (1.0 - (-f64::from(t) * speed).exp());
                (0..40).map(|t| rise(t) - 30.0 * random()).collect()
            })
            .collect()
    };
    RewardChart::new("CartPole", "environment step", "return of an episode")
        .runs("LoRA, r = 4", runs(0.1))
        .runs("LoRA, r = 1", runs(0.04))
        .runs("full", runs(0.2))
        .every(1000)
        .reference("solved", 475)
}

fn crowded() -> LineChart {
    let chart = LineChart::new(
        "A very long title that goes on and on, as one sometimes writes when a figure has to \
         say everything about an experiment in one place, with rank, scale, and seed",
        "training step of the adapter while the base model stays frozen",
        "cross-entropy loss (nats per token), mean over a batch of 32 sequences",
    );
    (0..9).fold(chart, |chart, k| {
        let mut random = noise(k + 1);
        let fall = |t: i32| (-f64::from(t) / (200.0 * (k + 1) as f64)).exp();
        let points: Vec<(f64, f64)> = (0..3000)
            .map(|t| (f64::from(t), fall(t) + 0.1 * random()))
            .collect();
        chart.line(format!("learning rate number {k} of nine"), points)
    })
}

/// Ticks so long that not all of them have room.
fn wide_ticks() -> LineChart {
    let points = (0..9).map(|i| (1_000_000_000.0 + 2.0 * f64::from(i), i % 4));
    LineChart::new("Long ticks", "second", "value")
        .line("a", points)
        .points("b", [(1_000_000_003.0, 2.5), (1_000_000_009.0, 0.5)])
}

/// Runs of three seeds around `mean`.
fn seeds(mean: f64, width: f64) -> Spread {
    Spread::of([mean - width, mean, mean + width]).unwrap()
}

/// Lines of means whose whiskers cover each other in places.
fn ranges() -> LineChart {
    let line = |best: f64| {
        let loss = move |(i, r): (usize, u32)| (r, seeds(best + 0.3 / (i + 1) as f64, 0.04));
        [1, 2, 4, 8, 16, 32].into_iter().enumerate().map(loss)
    };
    LineChart::new(
        "Held-out loss, three seeds",
        "rank r",
        "loss (nats per token)",
    )
    .line("q and v", line(4.05))
    .line("all linear layers", line(4.03))
    .line("the MLP", line(4.3))
    .line("the mean of all", [(1, 4.4), (32, 4.2)])
    .log_x()
}

/// Reference lines of both directions.
fn references() -> LineChart {
    let falling = (0..=40).map(|i| (i * 10, 4.5 - f64::from(i) / 60.0));
    LineChart::new("Loss of one run", "step", "loss (nats per token)")
        .line("LoRA, r = 8", falling)
        .reference("full fine-tuning", 3.84)
        .reference_x("end of warm-up", 40)
        .reference_x("best on the validation set", 320)
}

/// A diverging map.
fn changes() -> HeatMap {
    let mut random = noise(7);
    let values: Vec<Vec<f64>> = (0..5)
        .map(|_| (0..7).map(|_| random() - 0.4).collect())
        .collect();
    HeatMap::new("What an adapter changes", "tested on", "trained on")
        .columns(["kjv", "hamlet", "sotu", "law", "code", "news", "letters"])
        .rows(["kjv", "hamlet", "sotu", "law", "code"])
        .values(values)
        .unit("change of the loss (nats per token)")
        .diverging(0, "better", "worse")
}

/// A diverging map of means with their ranges.
fn transfer() -> HeatMap {
    let losses = [
        [3.98, 4.469, 3.055],
        [4.436, 4.125, 3.127],
        [4.264, 4.295, 3.787],
    ];
    HeatMap::new("Losses of adapters", "tested on", "adapter")
        .columns(["kjv", "hamlet", "sotu"])
        .rows(["kjv", "hamlet", "cat"])
        .values(losses.map(|row| row.map(|loss| seeds(loss, 0.04))))
        .unit("loss (nats per token)")
        .diverging(4.2, "better than the base", "worse")
}

/// One figure of each kind, and some difficult ones.
fn figures() -> Vec<Figure> {
    [
        lines().draw(),
        crowded().draw(),
        bars().draw(),
        long_names().draw(),
        heat().draw(),
        images().draw(),
        rewards().draw(),
        lines().size(360, 300).draw(),
        wide_ticks().draw(),
        bars().size(1200, 800).draw(),
        ranges().draw(),
        references().draw(),
        changes().draw(),
        transfer().draw(),
    ]
    .into_iter()
    .map(|figure| figure.unwrap())
    .collect()
}
