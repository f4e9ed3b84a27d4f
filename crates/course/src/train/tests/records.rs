//! What a history hands out.

use super::*;

fn history(losses: &[f64], seconds: &[f64]) -> History {
    let steps = losses.iter().zip(seconds).enumerate();
    let record = |(i, (&loss, &seconds)): (usize, (&f64, &f64))| StepRecord {
        step: i + 1,
        loss,
        lr: 0.1 * (i + 1) as f64,
        grad_norm: 10.0 * loss,
        seconds,
    };
    History {
        name: "h".to_string(),
        steps: steps.map(record).collect(),
        evaluations: Vec::new(),
        norms: Vec::new(),
        stopped: false,
        trainable: 1,
        optimizer_bytes: 8,
        memory: None,
        seconds: 1.0,
    }
}

#[test]
fn points_for_charts() {
    let mut h = history(&[4.0, 2.0, 3.0], &[1.0; 3]);
    assert_eq!(h.losses(), [(1.0, 4.0), (2.0, 2.0), (3.0, 3.0)]);
    assert_eq!(h.grad_norms(), [(1.0, 40.0), (2.0, 20.0), (3.0, 30.0)]);
    assert_eq!(h.learning_rates()[1], (2.0, 0.2));
    assert_eq!(h.smoothed(2), [(1.0, 4.0), (2.0, 3.0), (3.0, 2.5)]);
    assert_eq!(h.smoothed(9), [(1.0, 4.0), (2.0, 3.0), (3.0, 3.0)]);
    assert_eq!((h.smoothed(0), h.smoothed(1)), (h.losses(), h.losses()));
    h.evaluations = vec![(0, 5.0), (2, 1.0), (3, 1.0), (4, 5.0)];
    assert_eq!(h.evaluations()[1], (2.0, 1.0));
    assert_eq!(
        (h.first_loss().unwrap(), h.last_loss().unwrap()),
        (4.0, 3.0)
    );
    assert_eq!(
        (h.first_evaluation().unwrap(), h.last_evaluation().unwrap()),
        (5.0, 5.0)
    );
    assert_eq!(h.lowest_evaluation().unwrap(), (2, 1.0));
    assert_eq!(h.highest_evaluation().unwrap(), (0, 5.0));
    assert_eq!(
        h.to_string(),
        "h: 3 steps, loss 4.0000 → 3.0000, held-out 5.0000 → 5.0000"
    );
}

#[test]
fn the_median_time_leaves_out_the_first_step() {
    let median = |seconds: &[f64]| history(&[0.0; 9], seconds).seconds_per_step();
    assert_eq!(median(&[99.0, 3.0, 1.0, 2.0]).unwrap(), 2.0);
    assert_eq!(median(&[0.0, 4.0, 1.0, 2.0, 9.0]).unwrap(), 3.0);
    assert!(median(&[1.0]).is_err());
}

#[test]
fn what_is_not_there_is_an_error_that_says_what_to_call() {
    let h = history(&[], &[]);
    let texts = [
        (h.first_loss().unwrap_err(), "no step"),
        (h.last_loss().unwrap_err(), "no step"),
        (h.first_evaluation().unwrap_err(), ".evaluate("),
        (h.last_evaluation().unwrap_err(), ".evaluate("),
        (h.lowest_evaluation().unwrap_err(), ".evaluate("),
        (h.highest_evaluation().unwrap_err(), ".evaluate("),
        (
            h.norms_of("lora_B").unwrap_err(),
            ".record_norms(\"lora_B\")",
        ),
    ];
    for (error, part) in texts {
        let text = error.to_string();
        assert!(text.contains(part) && text.contains("\"h\""), "{text}");
    }
    assert_eq!(h.smoothed(3), []);
    assert_eq!(h.to_string(), "h: 0 steps");
}

#[test]
fn norms_of_parts_of_the_adapter() {
    let task = Task::new();
    let training = Training::new("n", 3)
        .clip(1e-3)
        .record_norms("lora_A")
        .record_norms("lora_B")
        .record_norms("proj");
    let history = task.run(training, 0.05, 1);
    let norms = |part| history.norms_of(part).unwrap();
    let (a, b, all) = (norms("lora_A"), norms("lora_B"), norms("proj"));
    assert_eq!(
        (a[0].1, a.len()),
        (0.0, 3),
        "B = 0 lets no gradient through to A"
    );
    assert!(a[1].1 > 0.0 && b[0].1 > 1e-2, "measured before clipping");
    assert_eq!(all, history.grad_norms());
    let joint = (a[2].1.powi(2) + b[2].1.powi(2)).sqrt();
    assert!((joint - all[2].1).abs() < 1e-9, "{joint} {all:?}");
}

#[test]
fn it_can_be_written_as_json() {
    let json = serde_json::to_value(history(&[4.0], &[1.0])).unwrap();
    assert_eq!(json["steps"][0]["loss"], 4.0);
    assert_eq!(json["memory"], serde_json::Value::Null);
}
