//! One seeded generator for everything random in a lesson.
//!
//! candle's own generator cannot be seeded on the CPU. ChaCha8 gives the same numbers on every
//! platform, so the same seed gives the same notebook on every run.

use candle_core::{DType, Device, Shape, Tensor};
use rand::seq::SliceRandom;
use rand::{Rng as _, RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;

use crate::{Error, Result};

/// A generator that starts from `seed`: the same seed, the same numbers.
///
/// ```
/// let (mut one, mut two) = (course::rng::rng(42), course::rng::rng(42));
/// assert_eq!(one.permutation(100), two.permutation(100));
/// ```
#[must_use]
pub fn rng(seed: u64) -> Rng {
    Rng {
        inner: ChaCha8Rng::seed_from_u64(seed),
    }
}

/// A seeded ChaCha8 generator that makes tensors. Build one with [`rng`].
///
/// It implements [`rand::RngCore`], so it can be handed to [`lora::LoraLinear::new`].
/// A clone repeats the numbers that are still to come.
///
/// ```
/// use course::lora::{LoraConfig, LoraLinear};
/// use course::{candle_core::Device, candle_nn::Linear};
///
/// let mut rng = course::rng::rng(1);
/// let base = Linear::new(rng.randn((3, 4), &Device::Cpu)?, None);
/// let layer = LoraLinear::new("proj", base, &LoraConfig::default(), &mut rng)?;
/// assert_eq!(layer.lora_a()?.dims(), [8, 4]);
/// # Ok::<(), course::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Rng {
    inner: ChaCha8Rng,
}

impl Rng {
    /// A tensor of standard normal numbers, mean 0 and deviation 1, in f32.
    ///
    /// # Shapes
    ///
    /// `shape`: a number, a tuple of numbers or a slice, as candle takes them.
    ///
    /// # Errors
    ///
    /// What candle reports when it moves the tensor to `device`.
    ///
    /// ```
    /// use course::candle_core::Device;
    ///
    /// let x = course::rng::rng(1).randn((2, 3), &Device::Cpu)?;
    /// assert_eq!(x.dims(), [2, 3]);
    /// # Ok::<(), course::Error>(())
    /// ```
    pub fn randn(&mut self, shape: impl Into<Shape>, device: &Device) -> Result<Tensor> {
        self.filled(shape.into(), device, |inner| inner.sample(StandardNormal))
    }

    /// A tensor of numbers drawn evenly from lo ≤ x < hi, in f32.
    ///
    /// (Rounding to f32 can give `hi` itself when the two ends lie close together.)
    ///
    /// # Shapes
    ///
    /// `shape`: a number, a tuple of numbers or a slice, as candle takes them.
    ///
    /// # Errors
    ///
    /// [`Error::Random`] unless lo < hi and both are finite.
    ///
    /// ```
    /// use course::candle_core::Device;
    ///
    /// let x = course::rng::rng(1).uniform(-1.0, 1.0, 1000, &Device::Cpu)?;
    /// assert!(x.abs()?.max_all()?.to_scalar::<f32>()? <= 1.0);
    /// # Ok::<(), course::Error>(())
    /// ```
    pub fn uniform(
        &mut self,
        lo: f64,
        hi: f64,
        shape: impl Into<Shape>,
        device: &Device,
    ) -> Result<Tensor> {
        if !(lo < hi && (hi - lo).is_finite()) {
            return Err(Error::Random {
                problem: format!("uniform({lo}, {hi}): give two finite ends with lo < hi"),
            });
        }
        self.filled(shape.into(), device, |inner| {
            lo + (hi - lo) * inner.random::<f64>()
        })
    }

    /// The numbers 0 … n − 1 in random order.
    ///
    /// ```
    /// let mut order = course::rng::rng(1).permutation(10);
    /// assert_ne!(order, (0..10).collect::<Vec<_>>());
    /// order.sort();
    /// assert_eq!(order, (0..10).collect::<Vec<_>>());
    /// ```
    pub fn permutation(&mut self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        order.shuffle(&mut self.inner);
        order
    }

    /// A number drawn evenly from 0 … n − 1.
    ///
    /// # Errors
    ///
    /// [`Error::Random`] when n = 0: there is no such number.
    ///
    /// ```
    /// assert!(course::rng::rng(1).below(6)? < 6);
    /// assert!(course::rng::rng(1).below(0).is_err());
    /// # Ok::<(), course::Error>(())
    /// ```
    pub fn below(&mut self, n: usize) -> Result<usize> {
        if n == 0 {
            return Err(Error::Random {
                problem: "below(0): no number lies below 0; give n >= 1".to_string(),
            });
        }
        Ok(self.inner.random_range(0..n))
    }

    /// Draws in f64 and rounds once, so that no platform's f32 arithmetic shows.
    fn filled(
        &mut self,
        shape: Shape,
        device: &Device,
        mut draw: impl FnMut(&mut ChaCha8Rng) -> f64,
    ) -> Result<Tensor> {
        let values: Vec<f64> = (0..shape.elem_count())
            .map(|_| draw(&mut self.inner))
            .collect();
        let tensor = Tensor::from_vec(values, shape, &Device::Cpu)?;
        Ok(tensor.to_dtype(DType::F32)?.to_device(device)?)
    }
}

impl RngCore for Rng {
    fn next_u32(&mut self) -> u32 {
        self.inner.next_u32()
    }

    fn next_u64(&mut self) -> u64 {
        self.inner.next_u64()
    }

    fn fill_bytes(&mut self, bytes: &mut [u8]) {
        self.inner.fill_bytes(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CPU: Device = Device::Cpu;

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// These numbers may never change: every notebook's outputs hang on them.
    #[test]
    fn golden_values() {
        let mut rng = rng(42);
        assert_eq!(
            values(&rng.randn(6, &CPU).unwrap()),
            [
                0.47798124,
                1.3340706,
                -0.21086669,
                0.4763469,
                -0.5120906,
                -0.93397844
            ]
        );
        assert_eq!(
            values(&rng.uniform(-2.0, 3.0, 4, &CPU).unwrap()),
            [-0.4597972, 2.0193639, 1.8562438, -0.80707365]
        );
        assert_eq!(rng.permutation(8), [6, 3, 7, 2, 1, 4, 5, 0]);
        let below: Vec<usize> = (0..8).map(|_| rng.below(1000).unwrap()).collect();
        assert_eq!(below, [506, 378, 901, 585, 956, 771, 592, 895]);
        assert_eq!(rng.next_u64(), 5_685_714_972_711_225_760);
    }

    #[test]
    fn the_seed_decides_and_the_generator_moves_on() {
        let draw = |seed| values(&rng(seed).randn((3, 5), &CPU).unwrap());
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
        let mut one = rng(1);
        let first = values(&one.randn(5, &CPU).unwrap());
        assert_ne!(first, values(&one.randn(5, &CPU).unwrap()));
    }

    /// A shape only folds the same numbers.
    #[test]
    fn shapes_share_their_numbers() {
        let flat = rng(3).randn(24, &CPU).unwrap();
        let folded = rng(3).randn((2, 3, 4), &CPU).unwrap();
        assert_eq!(folded.dims(), [2, 3, 4]);
        assert_eq!(folded.dtype(), DType::F32);
        assert_eq!(values(&flat), values(&folded));
        assert_eq!(rng(3).randn((0, 4), &CPU).unwrap().dims(), [0, 4]);
    }

    #[test]
    fn distributions() {
        let moments = |v: &[f32]| {
            let n = v.len() as f64;
            let mean = v.iter().map(|x| f64::from(*x)).sum::<f64>() / n;
            let squares: f64 = v.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum();
            (mean, (squares / n).sqrt())
        };
        let (mean, std) = moments(&values(&rng(4).randn(40_000, &CPU).unwrap()));
        assert!(
            mean.abs() < 0.02 && (std - 1.0).abs() < 0.02,
            "{mean} {std}"
        );

        let even = values(&rng(5).uniform(-2.0, 3.0, 40_000, &CPU).unwrap());
        let (mean, std) = moments(&even);
        let want = 5.0 / 12f64.sqrt();
        assert!(
            (mean - 0.5).abs() < 0.03 && (std - want).abs() < 0.03,
            "{mean} {std}"
        );
        assert!(even.iter().all(|x| (-2.0..3.0).contains(x)));
        assert!(even.iter().any(|x| *x < -1.99) && even.iter().any(|x| *x > 2.99));

        let mut dice = rng(6);
        let mut counts = [0; 6];
        for _ in 0..6000 {
            counts[dice.below(6).unwrap()] += 1;
        }
        assert!(counts.iter().all(|c| (850..1150).contains(c)), "{counts:?}");
    }

    #[test]
    fn refused() {
        for (lo, hi) in [
            (1.0, 1.0),
            (2.0, 1.0),
            (f64::NAN, 1.0),
            (0.0, f64::INFINITY),
            (f64::MIN, f64::MAX),
        ] {
            let text = rng(1).uniform(lo, hi, 2, &CPU).unwrap_err().to_string();
            assert!(text.contains("lo < hi"), "{text}");
        }
        assert!(rng(1).below(0).is_err());
        assert_eq!(rng(1).permutation(0), Vec::<usize>::new());
    }

    #[test]
    fn lora_takes_it() {
        let layer = |seed| {
            let mut rng = rng(seed);
            let base = candle_nn::Linear::new(rng.randn((3, 4), &CPU).unwrap(), None);
            let config = lora::LoraConfig::default();
            lora::LoraLinear::new("proj", base, &config, &mut rng).unwrap()
        };
        assert_eq!(
            values(&layer(1).lora_a().unwrap()),
            values(&layer(1).lora_a().unwrap())
        );
        assert_ne!(
            values(&layer(1).lora_a().unwrap()),
            values(&layer(2).lora_a().unwrap())
        );
    }
}
