//! A history's memory is that of the tensors that live. The counter is the whole process's, so
//! this test has a process of its own.

#![allow(clippy::unwrap_used)]

use course::prelude::*;

/// Numbers in the one parameter: 16 MB, far above what anything else here needs.
const COUNT: usize = 4 << 20;

#[test]
fn memory_is_what_the_tensors_need() {
    let peak = |tensors: usize| {
        let w = Var::ones(COUNT, DType::F32, &Device::Cpu).unwrap();
        let history = Training::new("memory", 3)
            .quiet()
            .run(
                (vec![("w".to_string(), w.clone())], 0.1),
                std::iter::repeat_with(|| Ok(())),
                |()| {
                    // Each sum keeps its input alive: one more tensor of w's size.
                    let mut sum = w.as_tensor().clone();
                    for _ in 0..tensors {
                        sum = (&sum + 1.0)?.sqr()?;
                    }
                    Ok(sum.mean_all()?)
                },
            )
            .unwrap();
        history.memory
    };
    if !cfg!(all(target_os = "linux", target_env = "gnu")) {
        assert_eq!(peak(1), None);
        return;
    }
    // Two moments, the gradient, and for each turn the sum and its square.
    for tensors in [1, 4] {
        let expected = (COUNT * 4 * (3 + 2 * tensors)) as f64;
        let measured = peak(tensors).unwrap() as f64;
        let off = (measured / expected - 1.0).abs();
        assert!(
            off < 0.03,
            "{tensors}: {measured} bytes, expected {expected}"
        );
    }
}
