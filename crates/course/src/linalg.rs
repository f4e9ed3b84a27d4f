//! The singular value decomposition, which says how much of a matrix fits into rank r, and the
//! distance of two clouds of points.

mod frechet;

use candle_core::{DType, Device, Tensor};
use nalgebra::DMatrix;

use crate::{Error, Result};

pub use frechet::frechet_distance;

/// A matrix taken apart: M = U · diag(s) · Vᵀ, from [`svd`].
///
/// With k = min(m, n): `u` (m, k) and `vt` (k, n) have orthonormal columns and rows; `s` holds the
/// k singular values, largest first.
///
/// ```
/// use course::candle_core::{Device, Tensor};
///
/// let m = Tensor::new(&[[3f32, 0.], [0., -4.]], &Device::Cpu)?;
/// let svd = course::linalg::svd(&m)?;
/// assert!((svd.s[0] - 4.0).abs() < 1e-12 && (svd.s[1] - 3.0).abs() < 1e-12);
/// # Ok::<(), course::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Svd {
    /// U (m, k): the directions of the output, one per column.
    pub u: Tensor,
    /// The k singular values, largest first.
    pub s: Vec<f64>,
    /// Vᵀ (k, n): the directions of the input, one per row.
    pub vt: Tensor,
}

/// Takes a matrix apart into M = U · diag(s) · Vᵀ.
///
/// The work is done in f64 on the CPU, whatever the tensor's type and device; `u` and `vt` come
/// back in the tensor's own. Signs follow no rule: a column of U and the row of Vᵀ may both be
/// turned round. A matrix of 512 × 768 takes a few seconds on one core; where the values alone are
/// needed, [`singular_values`] takes a tenth of that.
///
/// # Shapes
///
/// M (m, n) → U (m, k), s (k), Vᵀ (k, n) with k = min(m, n).
///
/// # Errors
///
/// [`Error::Linalg`] when the tensor is not a matrix, has no element, or holds NaN or infinity.
///
/// Source: Golub & Van Loan, Matrix Computations, section 2.4; computed by the crate nalgebra.
///
/// ```
/// use course::candle_core::{Device, Tensor};
///
/// let m = Tensor::new(&[[1f64, 2.], [3., 4.], [5., 6.]], &Device::Cpu)?;
/// let svd = course::linalg::svd(&m)?;
/// let s = Tensor::from_vec(svd.s.clone(), (1, 2), &Device::Cpu)?;
/// let again = svd.u.broadcast_mul(&s)?.matmul(&svd.vt)?;
/// assert!((m - again)?.abs()?.max_all()?.to_scalar::<f64>()? < 1e-12);
/// # Ok::<(), course::Error>(())
/// ```
pub fn svd(matrix: &Tensor) -> Result<Svd> {
    let (parts, order) = decompose(matrix, true)?;
    let (Some(u), Some(vt)) = (&parts.u, &parts.v_t) else {
        return Err(refused(matrix, "the decomposition gave no vectors"));
    };
    let u = DMatrix::from_fn(u.nrows(), order.len(), |i, j| u[(i, order[j])]);
    let vt = DMatrix::from_fn(order.len(), vt.ncols(), |i, j| vt[(order[i], j)]);
    Ok(Svd {
        u: tensor(&u, matrix)?,
        s: order.iter().map(|i| parts.singular_values[*i]).collect(),
        vt: tensor(&vt, matrix)?,
    })
}

/// The singular values of a matrix alone, largest first; cheaper than [`svd`].
///
/// # Shapes
///
/// M (m, n) → min(m, n) values.
///
/// # Errors
///
/// As [`svd`].
///
/// ```
/// use course::candle_core::{Device, Tensor};
///
/// // Every row is a multiple of (1, 2): rank 1.
/// let m = Tensor::new(&[[1f32, 2.], [2., 4.], [3., 6.]], &Device::Cpu)?;
/// let s = course::linalg::singular_values(&m)?;
/// assert!((s[0] - 70f64.sqrt()).abs() < 1e-6 && s[1] < 1e-6);
/// # Ok::<(), course::Error>(())
/// ```
pub fn singular_values(matrix: &Tensor) -> Result<Vec<f64>> {
    let (parts, order) = decompose(matrix, false)?;
    Ok(order.iter().map(|i| parts.singular_values[*i]).collect())
}

/// The part of a matrix that no matrix of rank r can hold: √(Σ_{i ≥ r} sᵢ² / Σ sᵢ²).
///
/// That is the smallest possible relative error ‖M − M_r‖ / ‖M‖ in the Frobenius norm, reached by
/// keeping the r largest singular values. It is 1 for r = 0, and 0 for a matrix of zeros and
/// whenever r covers all values.
///
/// `s` holds the singular values, largest first.
///
/// Source: Eckart & Young 1936.
///
/// ```
/// use course::linalg::best_rank_error;
///
/// let s = [4.0, 3.0];
/// assert_eq!(best_rank_error(&s, 0), 1.0);
/// assert_eq!(best_rank_error(&s, 1), 0.6);
/// assert_eq!(best_rank_error(&s, 2), 0.0);
/// ```
#[must_use]
pub fn best_rank_error(s: &[f64], r: usize) -> f64 {
    // Divided by the largest, so that squares neither overflow nor vanish.
    let largest = s.iter().fold(0.0f64, |m, v| m.max(v.abs()));
    if largest == 0.0 {
        return 0.0;
    }
    let energy = |values: &[f64]| values.iter().map(|v| (v / largest).powi(2)).sum::<f64>();
    (energy(s.get(r..).unwrap_or_default()) / energy(s)).sqrt()
}

type Parts = nalgebra::SVD<f64, nalgebra::Dyn, nalgebra::Dyn>;

/// The decomposition, and the order that puts the largest value first.
fn decompose(matrix: &Tensor, vectors: bool) -> Result<(Parts, Vec<usize>)> {
    let parts = dense(matrix)?
        .try_svd_unordered(vectors, vectors, f64::EPSILON, MAX_STEPS)
        .ok_or_else(|| refused(matrix, "the decomposition did not converge"))?;
    let mut order: Vec<usize> = (0..parts.singular_values.len()).collect();
    order.sort_by(|i, j| parts.singular_values[*j].total_cmp(&parts.singular_values[*i]));
    Ok((parts, order))
}

/// The numbers of a matrix.
fn dense(matrix: &Tensor) -> Result<DMatrix<f64>> {
    let &[rows, columns] = matrix.dims() else {
        return Err(refused(matrix, "give a matrix, a tensor of two dimensions"));
    };
    if rows == 0 || columns == 0 {
        return Err(refused(matrix, "the matrix has no element"));
    }
    let values: Vec<f64> = matrix
        .to_device(&Device::Cpu)?
        .to_dtype(DType::F64)?
        .flatten_all()?
        .to_vec1()?;
    if values.iter().any(|v| !v.is_finite()) {
        return Err(refused(matrix, "the matrix holds NaN or infinity"));
    }
    Ok(DMatrix::from_row_slice(rows, columns, &values))
}

/// Far above what a matrix of a lesson needs (about two steps per value).
const MAX_STEPS: usize = 1_000_000;

/// `matrix` as a tensor of the type and on the device of `like`.
fn tensor(matrix: &DMatrix<f64>, like: &Tensor) -> Result<Tensor> {
    let shape = matrix.shape();
    // nalgebra stores columns, candle rows.
    let rows = matrix.transpose().as_slice().to_vec();
    let tensor = Tensor::from_vec(rows, shape, &Device::Cpu)?;
    Ok(tensor.to_dtype(like.dtype())?.to_device(like.device())?)
}

fn refused(matrix: &Tensor, problem: &str) -> Error {
    Error::Linalg {
        shape: matrix.dims().to_vec(),
        problem: problem.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::rng;

    const CPU: Device = Device::Cpu;

    fn largest(t: &Tensor) -> f64 {
        let t = t.to_dtype(DType::F64).unwrap();
        t.abs().unwrap().max_all().unwrap().to_scalar().unwrap()
    }

    #[test]
    fn known_values() {
        // MᵀM = [[35, 44], [44, 56]]: λ = (91 ± √(91² − 4·24)) / 2.
        let m = Tensor::new(&[[1f64, 2.], [3., 4.], [5., 6.]], &CPU).unwrap();
        let root = (91f64 * 91.0 - 96.0).sqrt();
        let want = [((91.0 + root) / 2.0).sqrt(), ((91.0 - root) / 2.0).sqrt()];
        for m in [m.clone(), m.t().unwrap()] {
            let s = singular_values(&m).unwrap();
            assert_eq!(s.len(), 2);
            for (got, want) in s.iter().zip(want) {
                assert!((got - want).abs() < 1e-12 * want.max(1.0), "{s:?}");
            }
        }
        let identity = Tensor::eye(4, DType::F32, &CPU).unwrap();
        let s = singular_values(&identity).unwrap();
        assert!(s.iter().all(|s| (s - 1.0).abs() < 1e-12) && s.len() == 4);
        let zeros = Tensor::zeros((2, 3), DType::F32, &CPU).unwrap();
        assert_eq!(singular_values(&zeros).unwrap(), [0.0, 0.0]);
    }

    #[test]
    fn the_parts_give_the_matrix_back() {
        for (seed, (m, n)) in [(6, 4), (4, 6), (5, 5), (1, 7), (7, 1), (1, 1), (60, 40)]
            .into_iter()
            .enumerate()
        {
            let matrix = rng(seed as u64).randn((m, n), &CPU).unwrap();
            let matrix = matrix.to_dtype(DType::F64).unwrap();
            let Svd { u, s, vt } = svd(&matrix).unwrap();
            let k = m.min(n);
            assert_eq!(
                (u.dims(), s.len(), vt.dims()),
                (&[m, k][..], k, &[k, n][..])
            );
            assert!(s.is_sorted_by(|a, b| a >= b) && s[k - 1] >= 0.0, "{s:?}");

            let diagonal = Tensor::from_vec(s.clone(), (1, k), &CPU).unwrap();
            let again = u.broadcast_mul(&diagonal).unwrap().matmul(&vt).unwrap();
            assert!(largest(&(again - &matrix).unwrap()) < 1e-11, "({m}, {n})");
            let one = Tensor::eye(k, DType::F64, &CPU).unwrap();
            for gram in [u.t().unwrap().matmul(&u), vt.matmul(&vt.t().unwrap())] {
                assert!(
                    largest(&(gram.unwrap() - &one).unwrap()) < 1e-11,
                    "({m}, {n})"
                );
            }

            let alone = singular_values(&matrix).unwrap();
            for (a, b) in alone.iter().zip(&s) {
                assert!((a - b).abs() < 1e-11);
            }
        }
    }

    #[test]
    fn a_product_of_thin_matrices_has_their_rank() {
        let mut rng = rng(9);
        let b = rng.randn((30, 3), &CPU).unwrap();
        let a = rng.randn((3, 20), &CPU).unwrap();
        let s = singular_values(&b.matmul(&a).unwrap()).unwrap();
        assert!(s[2] > 1.0 && s[3] < 1e-4, "{s:?}");
        assert!(best_rank_error(&s, 3) < 1e-5 && best_rank_error(&s, 2) > 1e-2);
    }

    /// Eckart and Young: the formula is the error of the truncated product.
    #[test]
    fn the_error_is_that_of_the_best_approximation() {
        let matrix = rng(10).randn((8, 5), &CPU).unwrap();
        let matrix = matrix.to_dtype(DType::F64).unwrap();
        let Svd { u, s, vt } = svd(&matrix).unwrap();
        let norm = |t: &Tensor| {
            let squares = t.sqr().unwrap().sum_all().unwrap();
            squares.to_scalar::<f64>().unwrap().sqrt()
        };
        for r in 1..=5 {
            let diagonal = Tensor::from_vec(s[..r].to_vec(), (1, r), &CPU).unwrap();
            let left = u.narrow(1, 0, r).unwrap().broadcast_mul(&diagonal).unwrap();
            let best = left.matmul(&vt.narrow(0, 0, r).unwrap()).unwrap();
            let want = norm(&(best - &matrix).unwrap()) / norm(&matrix);
            assert!((best_rank_error(&s, r) - want).abs() < 1e-12, "r = {r}");
        }
    }

    #[test]
    fn rank_errors_at_the_edges() {
        assert_eq!(best_rank_error(&[], 0), 0.0);
        assert_eq!(best_rank_error(&[0.0, 0.0], 1), 0.0);
        assert_eq!(best_rank_error(&[4.0, 3.0], 9), 0.0);
        assert_eq!(best_rank_error(&[4e300, 3e300], 1), 0.6);
        assert_eq!(best_rank_error(&[4e-300, 3e-300], 1), 0.6);
    }

    #[test]
    fn types_are_kept() {
        for dtype in [DType::F32, DType::F64, DType::F16] {
            let m = rng(11).randn((4, 3), &CPU).unwrap();
            let svd = svd(&m.to_dtype(dtype).unwrap()).unwrap();
            assert_eq!((svd.u.dtype(), svd.vt.dtype()), (dtype, dtype));
        }
    }

    #[test]
    fn refused() {
        let nan = Tensor::new(&[[1f32, f32::NAN]], &CPU).unwrap();
        let infinite = Tensor::new(&[[1f32, f32::INFINITY]], &CPU).unwrap();
        let cases = [
            (Tensor::zeros(3, DType::F32, &CPU).unwrap(), "matrix"),
            (
                Tensor::zeros((1, 2, 3), DType::F32, &CPU).unwrap(),
                "matrix",
            ),
            (
                Tensor::zeros((0, 3), DType::F32, &CPU).unwrap(),
                "no element",
            ),
            (
                Tensor::zeros((3, 0), DType::F32, &CPU).unwrap(),
                "no element",
            ),
            (nan, "NaN"),
            (infinite, "infinity"),
        ];
        for (tensor, says) in cases {
            for error in [svd(&tensor).err(), singular_values(&tensor).err()] {
                let text = error.unwrap().to_string();
                let shape = format!("{:?}", tensor.dims());
                assert!(text.contains(says) && text.contains(&shape), "{text}");
            }
        }
    }
}
