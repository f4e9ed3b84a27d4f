//! What meets the world outside: evaluations, the stop button, printed lines.

use std::cell::{Cell, RefCell};
use std::time::Duration;

use super::*;

/// A world in which a step's loss takes `pace` and the learner presses stop when the button's been
/// asked for `patience` times. Hands out what was printed, and when.
fn outside(
    training: Training<'_>,
    pace: Duration,
    patience: usize,
) -> (Vec<(Duration, String)>, History, Var) {
    let (parameters, w) = square();
    let (time, asked, lines) = (Cell::new(Duration::ZERO), Cell::new(0), RefCell::default());
    let mut world = World {
        now: Box::new(|| time.get()),
        stop: Box::new(|| {
            asked.set(asked.get() + 1);
            asked.get() > patience
        }),
        say: Box::new(|line| {
            let lines: &RefCell<Vec<_>> = &lines;
            lines.borrow_mut().push((time.get(), line.to_string()));
        }),
    };
    let groups = (parameters, 0.1).into();
    let history = training
        .run_in(&mut world, groups, forever(), |()| {
            time.set(time.get() + pace);
            squared(&w)
        })
        .unwrap();
    drop(world);
    (lines.into_inner(), history, w)
}

const NEVER: usize = usize::MAX;
const TENTH: Duration = Duration::from_millis(100);

#[test]
fn evaluations_at_the_start_every_so_often_and_at_the_end() {
    let steps = |training: Training<'_>| {
        let history = outside(training.quiet(), TENTH, NEVER).1;
        history.evaluations.iter().map(|e| e.0).collect::<Vec<_>>()
    };
    let new = |steps| Training::new("x", steps);
    assert_eq!(steps(new(7)), [0; 0]);
    assert_eq!(steps(new(7).evaluate(|| Ok(1.0))), [0, 7]);
    assert_eq!(steps(new(7).evaluate_every(3, || Ok(1.0))), [0, 3, 6, 7]);
    assert_eq!(steps(new(6).evaluate_every(3, || Ok(1.0))), [0, 3, 6]);
    assert_eq!(steps(new(2).evaluate_every(3, || Ok(1.0))), [0, 2]);
    assert_eq!(steps(new(2).evaluate_every(1, || Ok(1.0))), [0, 1, 2]);
}

#[test]
fn evaluations_see_the_weights_of_their_step() {
    let (parameters, w) = square();
    let history = Training::new("x", 4)
        .evaluate_every(2, || scalar(squared(&w)))
        .quiet()
        .run((parameters, 0.1), forever(), |()| squared(&w))
        .unwrap();
    assert_eq!(history.evaluations[0], (0, 9.0));
    assert_eq!(history.evaluations[1], (2, history.steps[2].loss));
    assert!(history.evaluations[2].1 < history.steps[3].loss);
}

#[test]
fn the_stop_button_keeps_what_was_done() {
    // Asked before each of two micro-batches: the seventh time is within the fourth step.
    let training = Training::new("x", 50).accumulate(2).quiet();
    let (lines, history, w) = outside(training, TENTH, 7);
    assert!(history.stopped);
    assert_eq!(history.steps.len(), 3);
    assert!(
        (values(&w)[0] - 2.7).abs() < 1e-2,
        "three steps of 0.1: {:?}",
        values(&w)
    );
    let [(_, line)] = lines.as_slice() else {
        panic!("{lines:?}");
    };
    assert!(
        line.contains("x: stopped after step 3 of 50") && line.contains("weights keep"),
        "{line}"
    );
    assert!(
        history.to_string().contains("3 steps, then stopped"),
        "{history}"
    );
}

#[test]
fn the_stop_button_is_asked_before_an_evaluation() {
    let calls = Cell::new(0);
    let run = |patience| {
        calls.set(0);
        let training = Training::new("x", 50).evaluate_every(1, || {
            calls.set(calls.get() + 1);
            Ok(1.0)
        });
        let history = outside(training.quiet(), TENTH, patience).1;
        assert!(history.stopped);
        (calls.get(), history.steps.len())
    };
    assert_eq!(run(0), (0, 0));
    assert_eq!(run(1), (1, 0));
    assert_eq!(run(2), (1, 1));
    assert_eq!(run(3), (2, 1));
}

#[test]
fn lines_come_early_then_once_a_second_and_at_the_end() {
    let training = Training::new("LoRA r = 8", 34).evaluate(|| Ok(2.5));
    let (lines, history, _) = outside(training, TENTH, NEVER);
    let times: Vec<u128> = lines.iter().map(|(time, _)| time.as_millis()).collect();
    assert_eq!(times, [100, 1100, 2100, 3100, 3400]);
    let loss = |step: usize| format!("{:.4}", history.steps[step - 1].loss);
    assert_eq!(lines[0].1, "LoRA r = 8: step 1 of 34, loss 9.0000");
    let second = format!(
        "LoRA r = 8: step 11 of 34, loss {}, 10.0 steps/s, 2.3 s left",
        loss(11)
    );
    assert_eq!(lines[1].1, second);
    let last = format!(
        "LoRA r = 8: 34 steps in 3.4 s, loss 9.0000 → {}, held-out 2.5000 → 2.5000",
        loss(34)
    );
    assert_eq!(lines[4].1, last);
}

#[test]
fn slow_steps_print_one_line_each() {
    let (lines, ..) = outside(Training::new("slow", 4), Duration::from_secs(40), NEVER);
    let texts: Vec<&str> = lines.iter().map(|(_, line)| line.as_str()).collect();
    assert_eq!(texts.len(), 4, "{texts:?}");
    assert!(
        texts[1].ends_with("0.025 steps/s, 1 min 20 s left"),
        "{texts:?}"
    );
    assert!(
        texts[3].starts_with("slow: 4 steps in 2 min 40 s, loss 9.0000 → "),
        "{texts:?}"
    );
}

#[test]
fn quiet_prints_nothing() {
    assert!(!outside(Training::new("x", 30), TENTH, NEVER).0.is_empty());
    assert_eq!(outside(Training::new("x", 30).quiet(), TENTH, NEVER).0, []);
}

#[test]
fn numbers_and_times_read_well() {
    use super::super::progress::{number, time};
    let numbers = [2.5, 0.0, -1234.5, 0.00012, 1e9].map(number);
    assert_eq!(
        numbers,
        ["2.5000", "0.0000", "-1234.5000", "1.200e-4", "1.000e9"]
    );
    let times = [0.04, 9.949, 9.95, 59.6, 125.0, 7500.0].map(time);
    assert_eq!(
        times,
        [
            "0.0 s",
            "9.9 s",
            "10 s",
            "1 min 0 s",
            "2 min 5 s",
            "2 h 5 min"
        ]
    );
}
