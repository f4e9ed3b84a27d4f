//! Several runs of one number: mean and range.

use std::borrow::Borrow;
use std::fmt::{self, Alignment, Write as _};

use crate::{Error, Result};

/// Deviations of a normal distribution within which 95 % of it lie.
const Z: f64 = 1.959_963_984_540_054;

/// What several runs of one number came to, such as a loss under three seeds.
///
/// mean = (v₁ + … + vₙ) / n, low = the least of them, high = the greatest. The range from low to
/// high is of the runs that were made; it is no confidence interval.
///
/// It is written as `mean (low to high)`. A precision counts the digits after the point of all
/// three; without one they get as many as give the largest four digits. A width pads the whole,
/// and a plus sign is set before all three.
///
/// ```
/// use course::metrics::Spread;
///
/// let losses = [3.951, 3.968, 3.958];
/// let loss = Spread::of(&losses)?;
/// assert_eq!((loss.low, loss.high, loss.n), (3.951, 3.968, 3));
/// assert_eq!(loss.to_string(), "3.959 (3.951 to 3.968)");
/// assert_eq!(format!("{loss:.2}"), "3.96 (3.95 to 3.97)");
/// assert_eq!(format!("[{loss:>20.1}]"), "[    4.0 (4.0 to 4.0)]");
///
/// // Convert the runs, not the result: a difference turns low into high.
/// let gain = Spread::of(losses.iter().map(|loss| 4.5 - loss))?;
/// assert_eq!(format!("{gain:+.2}"), "+0.54 (+0.53 to +0.55)");
/// # Ok::<(), course::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spread {
    /// The mean.
    pub mean: f64,
    /// The lowest run.
    pub low: f64,
    /// The highest run.
    pub high: f64,
    /// How many runs, or examples.
    pub n: usize,
}

impl Spread {
    /// The spread of one or more runs: a slice, a vector or any iterator of `f64`.
    ///
    /// # Errors
    ///
    /// [`Error::Spread`] when there is no run, or one is NaN or infinite; it says which.
    ///
    /// ```
    /// # use course::metrics::Spread;
    /// let by_rank: Vec<Vec<f64>> = vec![vec![0.7, 0.9], vec![0.8, 1.0]];
    /// let spreads: Vec<Spread> = by_rank.iter().map(Spread::of).collect::<course::Result<_>>()?;
    /// assert_eq!(spreads[1].mean, 0.9);
    ///
    /// assert!(Spread::of(&[]).is_err());
    /// let error = Spread::of([4.1, f64::NAN]).unwrap_err().to_string();
    /// assert!(error.contains("run 1 (counted from 0) is NaN"));
    /// # Ok::<(), course::Error>(())
    /// ```
    pub fn of<V: Borrow<f64>>(runs: impl IntoIterator<Item = V>) -> Result<Self> {
        let runs: Vec<f64> = runs.into_iter().map(|run| *run.borrow()).collect();
        let refuse = |problem: String| Err(Error::Spread { problem });
        if runs.is_empty() {
            return refuse("there are no runs: give it at least one number".into());
        }
        if let Some(index) = runs.iter().position(|run| !run.is_finite()) {
            return refuse(format!(
                "run {index} (counted from 0) is {}: look for what went wrong in that run, \
                 such as a division by zero or a learning rate too high",
                runs[index]
            ));
        }
        Ok(Self::of_finite(runs.iter().copied()))
    }

    /// The mean of values that were drawn one by one, such as the errors of test tasks, with its 95 %
    /// confidence interval: how far it is from the mean of endlessly many, 19 times out of 20.
    ///
    /// With s² = Σ (vᵢ − mean)² / (n − 1), low and high = mean ± 1.96 s / √n.
    ///
    /// The interval is that of a normal distribution: give it some hundred values.
    ///
    /// # Errors
    ///
    /// [`Error::Spread`] when there are fewer than two values, or one is NaN or infinite; it says
    /// which.
    ///
    /// ```
    /// # use course::metrics::Spread;
    /// let errors: Vec<f64> = (0..400).map(|task| f64::from(task % 2)).collect();
    /// let error = Spread::interval(&errors)?;
    /// assert_eq!(format!("{error:.3}"), "0.500 (0.451 to 0.549)");
    /// assert!(Spread::interval([0.5]).is_err());
    /// # Ok::<(), course::Error>(())
    /// ```
    pub fn interval<V: Borrow<f64>>(values: impl IntoIterator<Item = V>) -> Result<Self> {
        let values: Vec<f64> = values.into_iter().map(|value| *value.borrow()).collect();
        let spread = Self::of(&values)?;
        if spread.n < 2 {
            return Err(Error::Spread {
                problem: "one value has no confidence interval: give it some hundred".into(),
            });
        }
        let squares: f64 = values
            .iter()
            .map(|value| (value - spread.mean).powi(2))
            .sum();
        let n = spread.n as f64;
        let half = Z * (squares / (n - 1.0) / n).sqrt();
        Ok(Self {
            low: spread.mean - half,
            high: spread.mean + half,
            ..spread
        })
    }

    /// `right` of `n`, as a share from 0 to 1, with its 95 % confidence interval: how far an
    /// accuracy on `n` test examples is from the one on endlessly many, 19 times out of 20.
    ///
    /// With p = right / n and z = 1.96, low and high =
    /// (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n).
    ///
    /// The examples must have been drawn one by one; it says nothing of what another seed of the
    /// training would change.
    ///
    /// # Errors
    ///
    /// [`Error::Spread`] when `n` is 0 or `right` is larger than it.
    ///
    /// Source: Wilson 1927, doi:10.1080/01621459.1927.10502953.
    ///
    /// ```
    /// # use course::metrics::Spread;
    /// let accuracy = Spread::share(81, 263)?;
    /// assert_eq!(format!("{accuracy:.4}"), "0.3080 (0.2553 to 0.3662)");
    /// // No example wrong does not mean that none ever is.
    /// assert_eq!(format!("{:.3}", Spread::share(100, 100)?), "1.000 (0.963 to 1.000)");
    /// assert!(Spread::share(1, 0).is_err());
    /// # Ok::<(), course::Error>(())
    /// ```
    pub fn share(right: usize, n: usize) -> Result<Self> {
        if n == 0 || right > n {
            return Err(Error::Spread {
                problem: format!("{right} of {n} is no share; count both again"),
            });
        }
        let (p, size) = (right as f64 / n as f64, n as f64);
        let z2 = Z * Z / size;
        let half = Z * (p * (1.0 - p) / size + z2 / (4.0 * size)).sqrt();
        let at = |half: f64| (p + z2 / 2.0 + half) / (1.0 + z2);
        Ok(Self {
            mean: p,
            low: at(-half).min(p),
            high: at(half).max(p),
            n,
        })
    }

    /// The same of runs that are known to be there and finite.
    pub(crate) fn of_finite(runs: impl Iterator<Item = f64> + Clone) -> Self {
        let n = runs.clone().count();
        let low = runs.clone().fold(f64::INFINITY, f64::min);
        let high = runs.clone().fold(f64::NEG_INFINITY, f64::max);
        let mut mean = runs.clone().sum::<f64>() / n as f64;
        if !mean.is_finite() {
            mean = runs.map(|run| run / n as f64).sum();
        }
        Self {
            // Rounding must not lift the mean out of the range.
            mean: mean.clamp(low, high),
            low,
            high,
            n,
        }
    }

    /// Digits after the point with which the largest of the three has four in all.
    fn places(&self) -> usize {
        let largest = self.low.abs().max(self.high.abs());
        if largest == 0.0 {
            return 3;
        }
        // From the written form: a logarithm may round 1000 down to below 3.
        let text = format!("{largest:.3e}");
        let exponent = text.split_once('e').and_then(|(_, e)| e.parse().ok());
        usize::try_from(3 - exponent.unwrap_or(0_i32)).unwrap_or(0)
    }
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let places = f.precision().unwrap_or_else(|| self.places());
        let write = |value: f64| {
            if f.sign_plus() {
                format!("{value:+.places$}")
            } else {
                format!("{value:.places$}")
            }
        };
        let (mean, low, high) = (write(self.mean), write(self.low), write(self.high));
        let text = format!("{mean} ({low} to {high})");
        // `Formatter::pad` would take the precision for a length.
        let free = f.width().unwrap_or(0).saturating_sub(text.len());
        let before = match f.align() {
            Some(Alignment::Right) => free,
            Some(Alignment::Center) => free / 2,
            Some(Alignment::Left) | None => 0,
        };
        let fill = f.fill();
        (0..before).try_for_each(|_| f.write_char(fill))?;
        f.write_str(&text)?;
        (before..free).try_for_each(|_| f.write_char(fill))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mean_and_range() {
        let spread = Spread::of(vec![4.0, -1.0, 3.0]).unwrap();
        let expected = Spread {
            mean: 2.0,
            low: -1.0,
            high: 4.0,
            n: 3,
        };
        assert_eq!(spread, expected);
        let runs = vec![4.0, -1.0, 3.0];
        assert_eq!(Spread::of(&runs).unwrap(), expected);
        assert_eq!(Spread::of(&runs[..]).unwrap(), expected);
        assert_eq!(Spread::of(runs.iter().map(|r| r + 0.0)).unwrap(), expected);
        let one = Spread::of([0.5]).unwrap();
        assert_eq!((one.mean, one.low, one.high, one.n), (0.5, 0.5, 0.5, 1));
    }

    #[test]
    fn the_mean_lies_in_the_range_and_never_overflows() {
        for value in [0.1, 0.7, 1.0 / 3.0, f64::MAX, -f64::MAX, 5e-324] {
            for n in 1..=11 {
                let spread = Spread::of(vec![value; n]).unwrap();
                assert_eq!(spread.mean, value, "{n} × {value:e}");
            }
        }
        assert_eq!(Spread::of([f64::MAX, -f64::MAX]).unwrap().mean, 0.0);
        let share = Spread::of([f64::MAX, f64::MAX, 0.0]).unwrap().mean / f64::MAX;
        assert!((share - 2.0 / 3.0).abs() < 1e-15, "{share}");
    }

    #[test]
    fn no_runs_and_broken_runs_are_refused() {
        let none: [f64; 0] = [];
        let text = Spread::of(none).unwrap_err().to_string();
        assert_eq!(
            text,
            "spread: there are no runs: give it at least one number"
        );
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            for index in 0..3 {
                let mut runs = [1.0, 2.0, 3.0];
                runs[index] = bad;
                let text = Spread::of(runs).unwrap_err().to_string();
                let which = format!("run {index} (counted from 0) is {bad}:");
                assert!(text.contains(&which), "{text}");
            }
        }
    }

    #[test]
    fn written_with_like_digits() {
        let write = |runs: &[f64]| Spread::of(runs).unwrap().to_string();
        assert_eq!(write(&[0.885, 0.879, 0.8917]), "0.8852 (0.8790 to 0.8917)");
        assert_eq!(write(&[1000.0, 998.0]), "999 (998 to 1000)");
        assert_eq!(write(&[-0.002, 0.001]), "-0.000500 (-0.002000 to 0.001000)");
        assert_eq!(write(&[123_456.7]), "123457 (123457 to 123457)");
        assert_eq!(write(&[0.0]), "0.000 (0.000 to 0.000)");
        assert_eq!(write(&[9.9996]), "10.00 (10.00 to 10.00)");
    }

    #[test]
    fn precision_width_and_sign_are_honoured() {
        let spread = Spread::of([1.0, 2.0]).unwrap();
        assert_eq!(format!("{spread:.0}"), "2 (1 to 2)");
        assert_eq!(format!("{spread:.4}"), "1.5000 (1.0000 to 2.0000)");
        assert_eq!(format!("{spread:18.1}|"), "1.5 (1.0 to 2.0)  |");
        assert_eq!(format!("{spread:<18.1}|"), "1.5 (1.0 to 2.0)  |");
        assert_eq!(format!("{spread:>18.1}|"), "  1.5 (1.0 to 2.0)|");
        assert_eq!(format!("{spread:*^19.1}|"), "*1.5 (1.0 to 2.0)**|");
        assert_eq!(format!("{spread:3.1}|"), "1.5 (1.0 to 2.0)|");
        assert_eq!(format!("{spread:+.1}"), "+1.5 (+1.0 to +2.0)");
    }

    #[test]
    fn the_interval_of_a_mean() {
        let spread = Spread::interval([1.0, 2.0, 6.0]).unwrap();
        // s² = (4 + 1 + 9) / 2 = 7
        let half = 1.959964 * (7.0f64 / 3.0).sqrt();
        assert_eq!((spread.mean, spread.n), (3.0, 3));
        assert!((spread.low - (3.0 - half)).abs() < 1e-6, "{spread}");
        assert!((spread.high - (3.0 + half)).abs() < 1e-6, "{spread}");
        assert!(Spread::interval([1.0]).is_err());
        let error = Spread::interval([1.0, f64::NAN]).unwrap_err().to_string();
        assert!(error.contains("run 1"), "{error}");
    }
}
