//! The tasks: sine waves, of which a learner sees a few points.

use std::f64::consts::PI;

use candle_core::{DType, Device, Tensor};

use crate::rng::{Rng, rng};
use crate::{Error, Result};

/// A seeded source of sine waves: y = amplitude · sin(x − phase).
///
/// The ranges are those of Finn et al. 2017, section 5.1. The minus is that of the authors' code.
/// With a plus, the phases from 0 to π would give other waves: x − phase and x + phase are one
/// family only where the phase runs through a whole circle. By symmetry they are equally hard: to
/// put −x for x and −y for y turns one family into the other.
///
/// ```
/// use course::meta::Sinusoids;
/// use course::candle_core::Device;
///
/// let mut sinusoids = Sinusoids::new(1, &Device::Cpu);
/// let tasks = sinusoids.tasks(25, 10, 100)?;
/// assert_eq!(tasks.support_x.dims(), [25, 10, 1]);
/// assert_eq!(tasks.query_y.dims(), [25, 100, 1]);
/// # Ok::<(), course::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Sinusoids {
    /// The lowest and the highest amplitude: 0.1 and 5.
    pub amplitude: [f64; 2],
    /// The lowest and the highest phase: 0 and π.
    pub phase: [f64; 2],
    /// Where the points lie: −5 to 5.
    pub x: [f64; 2],
    rng: Rng,
    device: Device,
}

impl Sinusoids {
    /// The waves that follow from a seed.
    #[must_use]
    pub fn new(seed: u64, device: &Device) -> Self {
        Self {
            amplitude: [0.1, 5.0],
            phase: [0.0, PI],
            x: [-5.0, 5.0],
            rng: rng(seed),
            device: device.clone(),
        }
    }

    /// The next `count` tasks, each with `support` points to adapt to and `query` others to judge by.
    ///
    /// Waves are drawn before points: two generators of one seed first give the same waves, whatever
    /// the numbers of points.
    ///
    /// # Errors
    ///
    /// No task or no point; a range whose ends are not in order.
    pub fn tasks(&mut self, count: usize, support: usize, query: usize) -> Result<Tasks> {
        if count == 0 || support == 0 || query == 0 {
            return Err(Error::Data {
                name: "sinusoids".into(),
                problem: format!(
                    "{count} tasks with {support} and {query} points; ask for at least one of each"
                ),
            });
        }
        let mut draw =
            |[lo, hi]: [f64; 2], n| self.rng.uniform(lo, hi, (count, n, 1), &self.device);
        let (amplitude, phase) = (draw(self.amplitude, 1)?, draw(self.phase, 1)?);
        let (support_x, query_x) = (draw(self.x, support)?, draw(self.x, query)?);
        Ok(Tasks {
            support_y: wave(&amplitude, &phase, &support_x)?,
            query_y: wave(&amplitude, &phase, &query_x)?,
            amplitude,
            phase,
            support_x,
            query_x,
        })
    }
}

/// Some tasks, with the points that each is learned from (support) and judged by (query).
#[derive(Clone, Debug)]
pub struct Tasks {
    /// Their amplitudes, [tasks, 1, 1].
    pub amplitude: Tensor,
    /// Their phases, [tasks, 1, 1].
    pub phase: Tensor,
    /// Where the support points lie, [tasks, points, 1].
    pub support_x: Tensor,
    /// Their values, of the same shape.
    pub support_y: Tensor,
    /// Where the query points lie, [tasks, points, 1].
    pub query_x: Tensor,
    /// Their values, of the same shape.
    pub query_y: Tensor,
}

impl Tasks {
    /// The values of the waves at other points, to draw them.
    ///
    /// # Shapes
    ///
    /// `x` [tasks, n, 1] or [n, 1] → [tasks, n, 1].
    ///
    /// # Errors
    ///
    /// Points of another shape.
    pub fn at(&self, x: &Tensor) -> Result<Tensor> {
        wave(&self.amplitude, &self.phase, x)
    }

    /// The same tasks in another type, such as f64.
    ///
    /// # Errors
    ///
    /// What candle reports.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        Ok(Self {
            amplitude: self.amplitude.to_dtype(dtype)?,
            phase: self.phase.to_dtype(dtype)?,
            support_x: self.support_x.to_dtype(dtype)?,
            support_y: self.support_y.to_dtype(dtype)?,
            query_x: self.query_x.to_dtype(dtype)?,
            query_y: self.query_y.to_dtype(dtype)?,
        })
    }
}

/// amplitude · sin(x − phase)
fn wave(amplitude: &Tensor, phase: &Tensor, x: &Tensor) -> Result<Tensor> {
    let sine = x.broadcast_sub(phase)?.sin()?;
    Ok(sine.broadcast_mul(amplitude)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CPU: Device = Device::Cpu;

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    fn span(tensor: &Tensor) -> (f32, f32) {
        let all = values(tensor);
        let low = all.iter().copied().fold(f32::INFINITY, f32::min);
        (low, all.into_iter().fold(f32::NEG_INFINITY, f32::max))
    }

    #[test]
    fn ranges_of_the_paper() {
        let tasks = Sinusoids::new(1, &CPU).tasks(2000, 5, 3).unwrap();
        let reach = |tensor: &Tensor, lo: f32, hi: f32| {
            let (low, high) = span(tensor);
            let near = 0.01 * (hi - lo);
            assert!(lo <= low && low < lo + near, "{low} of {lo}");
            assert!(hi - near < high && high <= hi, "{high} of {hi}");
        };
        reach(&tasks.amplitude, 0.1, 5.0);
        reach(&tasks.phase, 0.0, std::f32::consts::PI);
        reach(&tasks.support_x, -5.0, 5.0);
        reach(&tasks.query_x, -5.0, 5.0);
    }

    #[test]
    fn values_by_their_formula() {
        let tasks = Sinusoids::new(2, &CPU).tasks(7, 4, 6).unwrap();
        let (amplitude, phase) = (values(&tasks.amplitude), values(&tasks.phase));
        for (x, y, n) in [
            (&tasks.support_x, &tasks.support_y, 4),
            (&tasks.query_x, &tasks.query_y, 6),
        ] {
            for (i, (x, y)) in values(x).into_iter().zip(values(y)).enumerate() {
                let want = amplitude[i / n] * (x - phase[i / n]).sin();
                assert!((y - want).abs() < 1e-5, "{y}, not {want}");
            }
        }
        let at = tasks.at(&tasks.query_x).unwrap();
        assert_eq!(values(&at), values(&tasks.query_y));
        let grid = Tensor::new(&[[0f32], [1.0]], &CPU).unwrap();
        assert_eq!(tasks.at(&grid).unwrap().dims(), [7, 2, 1]);
    }

    #[test]
    fn the_seed_decides_and_the_source_moves_on() {
        let first = |seed, support| Sinusoids::new(seed, &CPU).tasks(5, support, 2).unwrap();
        assert_eq!(values(&first(1, 3).query_y), values(&first(1, 3).query_y));
        assert_ne!(values(&first(1, 3).query_y), values(&first(2, 3).query_y));
        // The same waves, whatever the number of points.
        assert_eq!(
            values(&first(1, 3).amplitude),
            values(&first(1, 9).amplitude)
        );
        assert_eq!(values(&first(1, 3).phase), values(&first(1, 9).phase));
        let mut source = Sinusoids::new(1, &CPU);
        let before = source.tasks(5, 3, 2).unwrap();
        let after = source.tasks(5, 3, 2).unwrap();
        assert_ne!(values(&before.phase), values(&after.phase));
    }

    #[test]
    fn nothing_is_refused() {
        for (count, support, query) in [(0, 1, 1), (1, 0, 1), (1, 1, 0)] {
            let error = Sinusoids::new(1, &CPU).tasks(count, support, query);
            let error = error.unwrap_err().to_string();
            assert!(error.contains("at least one"), "{error}");
        }
        let mut source = Sinusoids::new(1, &CPU);
        source.amplitude = [5.0, 0.1];
        let error = source.tasks(1, 1, 1).unwrap_err().to_string();
        assert!(error.contains("lo < hi"), "{error}");
    }
}
