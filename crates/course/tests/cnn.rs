//! The convolutional network of the lessons.

#![allow(clippy::unwrap_used)]

use course::candle_nn::VarBuilder;
use course::prelude::*;

const CPU: Device = Device::Cpu;

fn builder(dtype: DType, trains: bool) -> LoraBuilder<'static> {
    let weights = CnnConfig::default()
        .random_weights(&mut rng(1), &CPU)
        .unwrap();
    let vb = VarBuilder::from_tensors(weights.into_iter().collect(), dtype, &CPU);
    match trains {
        true => LoraBuilder::trainable(vb),
        false => LoraBuilder::new(vb),
    }
}

fn pictures(n: usize) -> (Tensor, Tensor) {
    let images = rng(2).uniform(0.0, 1.0, (n, 1, 28, 28), &CPU).unwrap();
    let labels: Vec<u32> = (0..n as u32).map(|i| i % 10).collect();
    (images, Tensor::new(labels, &CPU).unwrap())
}

#[test]
fn every_weight_is_counted_and_trains() {
    let config = CnnConfig::default();
    let weights = config.random_weights(&mut rng(1), &CPU).unwrap();
    let count: usize = weights.values().map(Tensor::elem_count).sum();
    assert_eq!(count, config.parameter_count());

    let builder = builder(DType::F32, true);
    let cnn = Cnn::new(&config, &builder).unwrap();
    let variables = builder.variables();
    let names: Vec<&str> = variables.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names.len(), 10);
    assert_eq!(builder.model().unwrap().parameter_count().trainable, count);

    let (images, labels) = pictures(6);
    let gradients = cnn
        .loss(&images, &labels, true)
        .unwrap()
        .backward()
        .unwrap();
    for (name, variable) in &variables {
        let gradient = gradients.get(variable).unwrap();
        let size = gradient.abs().unwrap().max_all().unwrap();
        assert!(size.to_scalar::<f32>().unwrap() > 0.0, "{name}");
    }
}

/// The gradient of one number of each weight against a difference of losses.
#[test]
fn gradients_are_those_of_finite_differences() {
    let builder = builder(DType::F64, true);
    let cnn = Cnn::new(&CnnConfig::default(), &builder).unwrap();
    let (images, labels) = pictures(4);
    let images = images.to_dtype(DType::F64).unwrap();
    let loss = || cnn.loss(&images, &labels, true).unwrap();
    let gradients = loss().backward().unwrap();
    for (name, variable) in builder.variables() {
        let gradient = gradients.get(&variable).unwrap().flatten_all().unwrap();
        let values: Vec<f64> = gradient.to_vec1().unwrap();
        let steepest = |a: &usize, b: &usize| values[*a].abs().total_cmp(&values[*b].abs());
        let at = (0..values.len()).max_by(steepest).unwrap();
        let start = variable.as_tensor().copy().unwrap();
        let moved = |by: f64| {
            let mut numbers: Vec<f64> = start.flatten_all().unwrap().to_vec1().unwrap();
            numbers[at] += by;
            let there = Tensor::from_vec(numbers, start.dims(), &CPU).unwrap();
            variable.set(&there).unwrap();
            loss().to_scalar::<f64>().unwrap()
        };
        // Small enough that no ReLU changes its mind.
        let step = 1e-6;
        let slope = (moved(step) - moved(-step)) / (2.0 * step);
        variable.set(&start).unwrap();
        let want = values[at];
        assert!(
            (slope - want).abs() < 1e-5 * want.abs(),
            "{name}: {slope}, {want}"
        );
    }
}

#[test]
fn accuracy_counts_the_images_that_are_read_rightly() {
    let cnn = Cnn::new(&CnnConfig::default(), &builder(DType::F32, false)).unwrap();
    // More than one chunk, and a last one that is not full.
    let (images, _) = pictures(510);
    let guesses = cnn
        .forward_t(&images, false)
        .unwrap()
        .argmax(D::Minus1)
        .unwrap();
    assert_eq!(cnn.accuracy(&images, &guesses).unwrap(), 1.0);
    let mut labels: Vec<u32> = guesses.to_vec1().unwrap();
    for label in &mut labels[..51] {
        *label = (*label + 1) % 10;
    }
    let labels = Tensor::new(labels, &CPU).unwrap();
    assert!((cnn.accuracy(&images, &labels).unwrap() - 0.9).abs() < 1e-12);

    let none = images.narrow(0, 0, 0).unwrap();
    let error = cnn.accuracy(&none, &labels).unwrap_err().to_string();
    assert!(error.contains("no image"), "{error}");
}

#[test]
fn the_head_is_left_out_of_all_linear() {
    let builder = builder(DType::F32, false);
    let _cnn = Cnn::new(&CnnConfig::default(), &builder).unwrap();
    let mut model = builder.model().unwrap();
    let config = LoraConfig::new(2, 4.0).with_targets(TargetModules::AllLinear);
    model.add_adapter("default", &config, &mut rng(3)).unwrap();
    let targets = model.targets("default").unwrap();
    assert!(
        targets.contains(&"fc") && !targets.contains(&"head"),
        "{targets:?}"
    );
}
