//! What goes wrong: the message, and the parameters afterwards.

use super::*;
use crate::Error;

/// The message of a quiet run that fails.
fn failure(result: Result<History>) -> String {
    result.unwrap_err().to_string()
}

fn has(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
}

/// w² for `good` steps, then `bad` · w.
fn turns_bad(good: usize, bad: f64, lr: f64) -> (String, f32, f32) {
    let (parameters, w) = square();
    let (mut step, mut before) = (0, 3.0);
    let result = Training::new("bad", 50)
        .quiet()
        .run((parameters, lr), forever(), |()| {
            step += 1;
            before = values(&w)[0];
            if step > good {
                Ok((w.sum_all()? * bad)?)
            } else {
                squared(&w)
            }
        });
    assert_eq!(step, good + 1);
    (failure(result), before, values(&w)[0])
}

#[test]
fn a_loss_that_is_not_finite_at_once_is_no_fault_of_the_rate() {
    let (text, before, after) = turns_bad(0, f64::NAN, 0.02);
    has(
        &text,
        &[
            "\"bad\"",
            "step 1 of 50",
            "NaN",
            "0.02",
            "not to blame",
            "data",
        ],
    );
    assert_eq!((before, after), (3.0, 3.0));
    has(
        &turns_bad(0, f64::INFINITY, 0.02).0,
        &["inf", "logarithm of 0"],
    );
}

#[test]
fn a_loss_that_is_not_finite_later_leaves_the_last_good_step() {
    let (text, before, after) = turns_bad(4, f64::NAN, 0.02);
    has(
        &text,
        &[
            "step 5 of 50",
            "NaN",
            "0.02",
            "gradient norm",
            "healthy",
            "those after 4 steps",
        ],
    );
    assert_eq!(before, after);
    assert!((after - 2.92).abs() < 1e-3, "{after}");
    has(&turns_bad(4, f64::NAN, 0.5).0, &["above 0.1", "lower it"]);
}

#[test]
fn a_run_that_diverged_is_told_so() {
    let (parameters, w) = square();
    let mut scale = 1.0;
    let result = Training::new("away", 50)
        .quiet()
        .run((parameters, 0.01), forever(), |()| {
            scale *= 100.0;
            if scale > 1e8 {
                Ok((squared(&w)? * f64::NAN)?)
            } else {
                Ok((squared(&w)? * scale)?)
            }
        });
    has(
        &failure(result),
        &["step 5 of 50", "diverged", ".clip(1.0)"],
    );
}

#[test]
fn a_broken_parameter_is_named() {
    let w = Var::new(&[f32::NAN], &CPU).unwrap();
    let parameters = vec![("proj.lora_A".to_string(), w.clone())];
    let result = Training::new("x", 5)
        .quiet()
        .run((parameters, 0.1), forever(), |()| squared(&w));
    has(&failure(result), &["proj.lora_A", "before the first step"]);

    for steps in [1, 5] {
        let (parameters, w) = square();
        let training = Training::new("x", steps).quiet();
        let result = training.run((parameters, 1e300), forever(), |()| squared(&w));
        has(&failure(result), &["arameter w holds", "learning rate"]);
    }
}

#[test]
fn a_held_out_loss_that_is_not_finite_is_an_error() {
    let (parameters, w) = square();
    let mut calls = 0;
    let result = Training::new("x", 5)
        .evaluate_every(2, || {
            calls += 1;
            Ok(if calls == 2 { f64::NAN } else { 1.0 })
        })
        .quiet()
        .run((parameters, 0.1), forever(), |()| squared(&w));
    has(
        &failure(result),
        &["held-out value is NaN", "after step 2 of 5"],
    );
}

#[test]
fn a_parameter_without_a_gradient_is_named_with_the_step() {
    let (mut parameters, w) = square();
    let idle = Var::new(&[1f32], &CPU).unwrap();
    parameters.push(("proj.lora_B.weight".to_string(), idle));
    let result = Training::new("x", 5)
        .quiet()
        .run((parameters, 0.1), forever(), |()| squared(&w));
    let error = result.unwrap_err();
    assert!(matches!(&error, Error::TrainingStep { step: 1, source, .. }
        if matches!(**source, Error::Lora(lora::Error::GradientMissing { .. }))));
    has(
        &error.to_string(),
        &["step 1 of 5", "no gradient for proj.lora_B.weight"],
    );
    assert_eq!(values(&w), [3.0]);
}

#[test]
fn a_gradient_that_is_not_finite_is_named_with_the_step() {
    let (parameters, w) = square();
    let mut step = 0;
    // √0 is 0 with an infinite slope.
    let result = Training::new("x", 5)
        .quiet()
        .run((parameters, 0.1), forever(), |()| {
            step += 1;
            let zero = (w.as_tensor() - w.as_detached_tensor())?;
            if step == 3 {
                Ok(zero.sqrt()?.sum_all()?)
            } else {
                squared(&w)
            }
        });
    has(
        &failure(result),
        &["step 3 of 5", "parameter w", "gradient is"],
    );
    assert!((values(&w)[0] - 2.8).abs() < 1e-3, "{:?}", values(&w));
}

#[test]
fn a_loss_of_several_numbers() {
    let (parameters, w) = square();
    let result = Training::new("x", 5)
        .quiet()
        .run((parameters, 0.1), forever(), |()| {
            Ok(Tensor::cat(&[w.as_tensor(), w.as_tensor()], 0)?)
        });
    has(&failure(result), &["step 1", "[2]", "mean_all"]);
    let (parameters, w) = square();
    let one = Training::new("x", 1)
        .quiet()
        .run((parameters, 0.1), forever(), |()| Ok(w.sqr()?));
    assert_eq!(
        one.unwrap().losses(),
        [(1.0, 9.0)],
        "a tensor of shape [1] is one number"
    );
}

#[test]
fn batches_that_run_out() {
    let (parameters, w) = square();
    let mut after = 0.0;
    let batches = (0..7).map(|_| Ok(()));
    let training = Training::new("x", 5).accumulate(2).quiet();
    let result = training.run((parameters, 0.1), batches, |()| {
        after = values(&w)[0];
        squared(&w)
    });
    has(
        &failure(result),
        &["ran out after 3 of 5 steps", "give 10 (2 for each step)"],
    );
    assert_eq!(values(&w), [after]);
    assert!((after - 2.7).abs() < 1e-2, "{after}");
}

#[test]
fn errors_of_the_lesson_carry_the_step() {
    let bad = || Error::Device {
        problem: "gone".to_string(),
    };
    let (parameters, w) = square();
    let batches = [Ok(()), Err(bad())];
    let result = Training::new("x", 5)
        .quiet()
        .run((parameters.clone(), 0.1), batches, |()| squared(&w));
    has(
        &failure(result),
        &["training \"x\", step 2 of 5: device: gone"],
    );
    let training = Training::new("x", 5).quiet();
    let result = training.run((parameters.clone(), 0.1), forever(), |()| Err(bad()));
    has(&failure(result), &["step 1 of 5: device: gone"]);
    let training = Training::new("x", 5)
        .evaluate(|| Err::<f64, _>(bad()))
        .quiet();
    let result = training.run((parameters, 0.1), forever(), |()| squared(&w));
    has(&failure(result), &["step 0 of 5: device: gone"]);
}

#[test]
fn settings_are_checked_before_anything_runs() {
    let refused = |training: Training<'_>| {
        let (parameters, _) = square();
        let loss = |(): &()| -> Result<Tensor> { panic!("it ran") };
        failure(training.quiet().run((parameters, 0.1), forever(), loss))
    };
    has(&refused(Training::new("x", 0)), &["0 steps"]);
    has(
        &refused(Training::new("x", 1).accumulate(0)),
        &["accumulate(0)"],
    );
    has(
        &refused(Training::new("x", 1).evaluate_every(0, || Ok(1.0))),
        &["evaluate_every(0"],
    );
    for clip in [0.0, -1.0, f64::NAN] {
        has(
            &refused(Training::new("x", 1).clip(clip)),
            &["clip", "above 0"],
        );
    }
    has(
        &refused(Training::new("x", 1).record_norms("lora_C")),
        &["\"lora_C\"", "called w"],
    );
}
