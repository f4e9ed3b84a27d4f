//! How far apart two clouds of points are.

use candle_core::Tensor;
use nalgebra::{DMatrix, RowDVector};

use super::{MAX_STEPS, dense, refused};
use crate::Result;

/// The Fréchet distance of the two normal distributions that have the means and covariances of
/// `x` and `y`:
///
/// d² = ‖μₓ − μᵧ‖² + tr(Cₓ + Cᵧ − 2 (Cₓ Cᵧ)^½).
///
/// It is the square that is returned, as in the FID, where the points are an image's features in
/// a network. It is 0 for the same points, has the unit of the points' squares, and does not see
/// what means and covariances do not. C has n − 1 in its denominator. With few points it is too
/// large, even between two draws of the same images: compare draws of the same size, and beside
/// the distance of real ones to real ones.
///
/// The work is done in f64 on the CPU. tr (Cₓ Cᵧ)^½ is the sum of the singular values of Rₓ Rᵧᵀ,
/// where C = RᵀR comes from the QR decomposition of the centred points; so no covariance is formed
/// and none has to be of full rank.
///
/// # Shapes
///
/// `x` (n, d), `y` (m, d): a point each row.
///
/// # Errors
///
/// [`Error::Linalg`](crate::Error::Linalg) when one is no matrix, has fewer than two rows, has
/// NaN or infinity in it, or has other columns than the other.
///
/// Source: Dowson & Landau 1982; Heusel et al. 2017, arXiv:1706.08500, equation 6.
///
/// ```
/// use course::candle_core::{Device, Tensor};
/// use course::linalg::frechet_distance;
///
/// // Means 1 and 4, deviations √2 and 2√2: 3² + (√2)².
/// let x = Tensor::new(&[[0f32], [2.]], &Device::Cpu)?;
/// let y = Tensor::new(&[[2f32], [6.]], &Device::Cpu)?;
/// assert!((frechet_distance(&x, &y)? - 11.0).abs() < 1e-12);
/// # Ok::<(), course::Error>(())
/// ```
pub fn frechet_distance(x: &Tensor, y: &Tensor) -> Result<f64> {
    let (mean_x, root_x) = moments(x)?;
    let (mean_y, root_y) = moments(y)?;
    if mean_x.len() != mean_y.len() {
        let problem = format!("the other has {} columns", mean_x.len());
        return Err(refused(y, &problem));
    }
    let traces = root_x.norm_squared() + root_y.norm_squared();
    let shared = (root_x * root_y.transpose())
        .try_svd_unordered(false, false, f64::EPSILON, MAX_STEPS)
        .ok_or_else(|| refused(y, "the decomposition did not converge"))?;
    let distance = (mean_x - mean_y).norm_squared() + traces - 2.0 * shared.singular_values.sum();
    // Rounding can bring equal points below 0.
    Ok(distance.max(0.0))
}

/// The mean of the rows, and R with RᵀR their covariance.
fn moments(points: &Tensor) -> Result<(RowDVector<f64>, DMatrix<f64>)> {
    let mut centred = dense(points)?;
    let n = centred.nrows();
    if n < 2 {
        return Err(refused(
            points,
            "one point has no covariance; give two at least",
        ));
    }
    let mean = centred.row_mean();
    for mut row in centred.row_iter_mut() {
        row -= &mean;
    }
    let root = (centred / ((n - 1) as f64).sqrt()).qr().r();
    Ok((mean, root))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::rng;
    use candle_core::{DType, Device};

    const CPU: Device = Device::Cpu;

    /// The points of `tests/fixtures/frechet.py`.
    fn points(rows: usize, columns: usize, shift: f64, scale: f64) -> Tensor {
        let at = |k: usize| {
            let (i, j) = ((k / columns) as f64, (k % columns) as f64);
            let wave = (1.0 + j / 4.0) * (1.0 + 3.0 * i + 7.0 * j + i * j).sin();
            scale * (wave + shift * j + (i * j).cos() / 2.0)
        };
        let values: Vec<f64> = (0..rows * columns).map(at).collect();
        Tensor::from_vec(values, (rows, columns), &CPU).unwrap()
    }

    #[test]
    fn what_scipy_gives() {
        // Printed by tests/fixtures/frechet.py with NumPy 2.4.6 and SciPy 1.17.1. The last has
        // fewer points than columns, so a singular covariance, whose eigenvalues near 0 NumPy
        // knows to the rounding of the largest only.
        for ((n, m, columns), want) in [
            ((40, 50, 6), 7.53785686523),
            ((200, 100, 24), 578.25629007),
            ((5, 40, 6), 16.5307876995),
        ] {
            let (x, y) = (points(n, columns, 0.0, 1.0), points(m, columns, 0.3, 1.2));
            for (x, y) in [(&x, &y), (&y, &x)] {
                let got = frechet_distance(x, y).unwrap();
                assert!((got - want).abs() < 1e-8 * want, "{got}, not {want}");
            }
        }
    }

    #[test]
    fn a_shift_counts_squared_and_the_same_points_are_at_0() {
        let x = rng(1).randn((60, 5), &CPU).unwrap();
        let moved = (&x + 2.0).unwrap();
        assert!(frechet_distance(&x, &x).unwrap() < 1e-9);
        let distance = frechet_distance(&x, &moved).unwrap();
        assert!((distance - 5.0 * 4.0).abs() < 1e-4, "{distance}");
    }

    #[test]
    fn refuses_what_is_no_cloud() {
        let x = Tensor::zeros((3, 2), DType::F32, &CPU).unwrap();
        let nan = Tensor::new(&[[1f32, 2.], [f32::NAN, 0.]], &CPU).unwrap();
        for (y, says) in [
            (
                Tensor::zeros((3, 4), DType::F32, &CPU).unwrap(),
                "2 columns",
            ),
            (
                Tensor::zeros((1, 2), DType::F32, &CPU).unwrap(),
                "two at least",
            ),
            (Tensor::zeros(2, DType::F32, &CPU).unwrap(), "matrix"),
            (nan, "NaN"),
        ] {
            let error = frechet_distance(&x, &y).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
