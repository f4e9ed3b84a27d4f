//! The small linear algebra that starts and combinations of adapters need, in f64 on the CPU.

use candle_core::{DType, Device, Tensor};
use nalgebra::{DMatrix, DVector, SymmetricEigen};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;

use crate::{Error, Result};

/// U (m, r), the singular values in falling order, Vᵀ (r, n).
pub(crate) type Svd = (Tensor, Vec<f64>, Tensor);

/// Columns of U, singular values, columns of V.
type Triplets = (DMatrix<f64>, Vec<f64>, DMatrix<f64>);

/// A number this small beside a largest entry near 1 counts as zero: its square still exists.
const ZERO: f64 = 1e-100;

/// The `r` largest singular triplets of `w`: U diag(s) Vᵀ is the nearest matrix of rank r.
///
/// U and Vᵀ come in f64 on the CPU and are orthonormal whatever the rank of `w`; the sign of each
/// pair is arbitrary. Errors are a few hundred roundings of s₀; values below that may come out as
/// 0.
///
/// A few triplets of a large matrix come from a block Lanczos iteration, everything else (and what
/// does not converge) from the eigenvectors of the Gram matrix, finished by Jacobi rotations.
///
/// # Shapes
///
/// `w` (m, n) → U (m, r), s (r), Vᵀ (r, n), with 1 ≤ r ≤ min(m, n).
///
/// # Errors
///
/// [`Error::SvdRank`], [`Error::NotFinite`], what candle reports.
///
/// Source: Golub and Van Loan, Matrix Computations, 4th edition, sections 8.6 and 10.4.
pub(crate) fn truncated(w: &Tensor, r: usize) -> Result<Svd> {
    let w = matrix(w, "the matrix to decompose")?;
    checked_rank(r, w.nrows(), w.ncols())?;
    tensors(leading(w, r)?)
}

/// The `r` largest singular triplets of the product B·A, which is never formed.
///
/// B = Q₁R₁ and Aᵀ = Q₂R₂ give B·A = Q₁ (R₁R₂ᵀ) Q₂ᵀ: only the small core is decomposed. Above the
/// rank of B·A the values are 0 and the vectors an orthonormal continuation.
///
/// # Shapes
///
/// `b` (m, R), `a` (R, n) → U (m, r), s (r), Vᵀ (r, n), with 1 ≤ r ≤ min(m, n), r > R included.
///
/// # Errors
///
/// [`Error::SvdRank`], [`Error::NotFinite`], what candle reports.
pub(crate) fn low_rank_svd(b: &Tensor, a: &Tensor, r: usize) -> Result<Svd> {
    let (b, a) = (matrix(b, "B")?, matrix(a, "A")?);
    if b.ncols() != a.nrows() || b.ncols() == 0 {
        let text = format!("B {:?} and A {:?} do not multiply", b.shape(), a.shape());
        return Err(candle_core::Error::Msg(text).into());
    }
    checked_rank(r, b.nrows(), a.ncols())?;
    let (b_rank, a_rank) = (b.nrows().min(b.ncols()), a.nrows().min(a.ncols()));
    let (q1, r1) = householder(b, b_rank);
    let (q2, r2) = householder(a.transpose(), a_rank);
    let core = r1 * r2.transpose();

    let found = r.min(core.nrows()).min(core.ncols());
    let (u, mut s, v) = leading(core, found)?;
    s.resize(r, 0.0);
    tensors((completed(q1 * u, r), s, completed(q2 * v, r)))
}

/// The first `k` columns of Q and rows of R in W = Q·R, with LAPACK's signs.
///
/// R's diagonal may be negative: each Householder step sends a column to −sign(x₀)·‖x‖, and
/// leaves it alone when it is already zero below. With k = min(m, n) this is the thin QR of
/// `torch.linalg.qr`; a smaller k gives its leading part at k / min(m, n) of the cost.
///
/// # Shapes
///
/// `w` (m, n) → Q (m, k), R (k, n) in f64 on the CPU, with 1 ≤ k ≤ min(m, n).
///
/// # Errors
///
/// [`Error::SvdRank`], [`Error::NotFinite`], what candle reports.
///
/// Source: LAPACK, `dgeqrf` and `dlarfg`.
pub(crate) fn qr(w: &Tensor, k: usize) -> Result<(Tensor, Tensor)> {
    let w = matrix(w, "the matrix to decompose")?;
    checked_rank(k, w.nrows(), w.ncols())?;
    let (q, r) = householder(w, k);
    Ok((tensor(&q)?, tensor(&r)?))
}

fn checked_rank(rank: usize, rows: usize, columns: usize) -> Result<()> {
    if rank == 0 || rank > rows.min(columns) {
        return Err(Error::SvdRank {
            rank,
            rows,
            columns,
        });
    }
    Ok(())
}

/// `w` in f64; `name` is what an error calls it.
fn matrix(w: &Tensor, name: &str) -> Result<DMatrix<f64>> {
    let (m, n) = w.dims2()?;
    let w = w.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
    let rows = w.flatten_all()?.to_vec1::<f64>()?;
    if rows.iter().any(|x| !x.is_finite()) {
        return Err(Error::NotFinite {
            what: name.to_string(),
        });
    }
    Ok(DMatrix::from_row_slice(m, n, &rows))
}

fn tensor(x: &DMatrix<f64>) -> Result<Tensor> {
    // nalgebra keeps columns together, candle rows.
    let rows: Vec<f64> = x.transpose().as_slice().to_vec();
    Ok(Tensor::from_vec(rows, x.shape(), &Device::Cpu)?)
}

fn tensors((u, s, v): Triplets) -> Result<Svd> {
    Ok((tensor(&u)?, s, tensor(&v.transpose())?))
}

/// The `r` largest triplets by the cheaper way, for entries of any size.
fn leading(mut w: DMatrix<f64>, r: usize) -> Result<Triplets> {
    if !w.iter().all(|x| x.is_finite()) {
        let what = "the product of B and A".to_string();
        return Err(Error::NotFinite { what });
    }
    // A power of two, so that scaling rounds nothing and no square leaves the range of f64.
    let scale = match w.amax() {
        0.0 => 1.0,
        largest => 2f64.powi(largest.log2().floor() as i32),
    };
    w /= scale;
    let (u, mut s, v) = match lanczos(&w, r) {
        Some(found) => found,
        None => dense(&w)?,
    };
    s.truncate(r);
    s.iter_mut().for_each(|s| *s *= scale);
    Ok((
        u.columns(0, r).into_owned(),
        s,
        v.columns(0, r).into_owned(),
    ))
}

/// All min(m, n) triplets, in falling order.
///
/// The Gram matrix's eigenvectors V make the columns of W·V orthogonal up to roundings of s₀²,
/// which is too coarse for small singular values; Jacobi rotations finish the work to roundings
/// of each column.
fn dense(w: &DMatrix<f64>) -> Result<Triplets> {
    if w.nrows() < w.ncols() {
        let (v, s, u) = dense(&w.transpose())?;
        return Ok((u, s, v));
    }
    let n = w.ncols();
    let mut v = SymmetricEigen::try_new(w.transpose() * w, f64::EPSILON, 100 * n)
        .map_or_else(|| DMatrix::identity(n, n), |eigen| eigen.eigenvectors);
    let mut y = w * &v;
    rotate(&mut y, &mut v)?;

    let norms: Vec<f64> = y.column_iter().map(|column| column.norm()).collect();
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&i, &j| norms[j].total_cmp(&norms[i]));
    let noise = noise(&y);
    let rank = norms.iter().filter(|&&norm| norm > noise).count();
    let mut s = vec![0.0; n];
    let mut u = y.select_columns(&order[..rank]);
    for (i, mut column) in u.column_iter_mut().enumerate() {
        s[i] = norms[order[i]];
        column /= s[i];
    }
    let u = completed(u, n);
    Ok((u, s, v.select_columns(&order)))
}

/// Columns of `y` = W·V no longer than this are rounding errors of the longest.
fn noise(y: &DMatrix<f64>) -> f64 {
    let longest = y
        .column_iter()
        .map(|column| column.norm())
        .fold(0.0, f64::max);
    f64::EPSILON * y.nrows() as f64 * longest
}

/// Rotates pairs of columns of `y`, and of `v` along with them, until all are orthogonal.
fn rotate(y: &mut DMatrix<f64>, v: &mut DMatrix<f64>) -> Result<()> {
    let n = y.ncols();
    let tolerance = 4.0 * f64::EPSILON * (y.nrows() as f64).sqrt();
    let noise = noise(y);
    for _sweep in 0..100 {
        let mut squares: Vec<f64> = y
            .column_iter()
            .map(|column| column.norm_squared())
            .collect();
        let mut rotated = false;
        for j in 1..n {
            for i in 0..j {
                let product = y.column(i).dot(&y.column(j));
                let (first, second) = (squares[i].sqrt(), squares[j].sqrt());
                // Two columns of rounding errors never come to rest.
                if first.max(second) <= noise || product.abs() <= tolerance * first * second {
                    continue;
                }
                rotated = true;
                let zeta = (squares[j] - squares[i]) / (2.0 * product);
                let tan = zeta.signum() / (zeta.abs() + zeta.hypot(1.0));
                let cos = 1.0 / tan.hypot(1.0);
                for matrix in [&mut *y, &mut *v] {
                    rotate_pair(matrix, i, j, cos, cos * tan);
                }
                squares[i] = y.column(i).norm_squared();
                squares[j] = y.column(j).norm_squared();
            }
        }
        if !rotated {
            return Ok(());
        }
    }
    let text = format!("the SVD of a {:?} matrix did not converge", y.shape());
    Err(candle_core::Error::Msg(text).into())
}

fn rotate_pair(matrix: &mut DMatrix<f64>, i: usize, j: usize, cos: f64, sin: f64) {
    let rows = matrix.nrows();
    let (front, back) = matrix.as_mut_slice().split_at_mut(j * rows);
    let first = &mut front[i * rows..(i + 1) * rows];
    for (x, y) in first.iter_mut().zip(&mut back[..rows]) {
        (*x, *y) = (cos * *x - sin * *y, sin * *x + cos * *y);
    }
}

/// The `r` largest triplets by block Lanczos with thick restarts; `None` when `r` is too large a
/// part of the matrix for it to pay, or when it has not converged after about as much work as
/// [`dense`] needs.
///
/// Two orthonormal bases grow by a block at a time, always with W·V = U·T: the new columns of U
/// come from W times the newest of V, the next ones of V from Wᵀ times the newest of U. The SVD of
/// the small T then gives triplets with W·v = s·u, and ‖Wᵀu − s·v‖ says how good they are. A full
/// basis is cut back to its best columns. The block is wider than r, so a singular value may
/// repeat.
fn lanczos(w: &DMatrix<f64>, r: usize) -> Option<Triplets> {
    let block = r + 8.max(r / 2);
    let (keep, capacity) = (2 * block, 8 * block);
    let smaller = w.nrows().min(w.ncols());
    if 2 * capacity > smaller {
        return None;
    }
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let w_t = w.transpose();
    let mut v = DMatrix::zeros(w.ncols(), 0);
    let mut u = DMatrix::zeros(w.nrows(), 0);
    let mut t = DMatrix::zeros(0, 0);
    let mut new_v = DMatrix::from_fn(w.ncols(), block, |_, _| rng.sample(StandardNormal));
    let mut columns = 0;
    while columns < smaller {
        while v.ncols() + block <= capacity {
            orthonormalise(&v, &mut new_v, &mut rng);
            let product = w * &new_v;
            let mut new_u = product.clone();
            orthonormalise(&u, &mut new_u, &mut rng);

            // T's new columns Uᵀ(W·v); its new rows are zero on the left, as W·V = U·T demands.
            let old = v.ncols();
            v = joined(&v, &new_v);
            u = joined(&u, &new_u);
            t = t.resize(old + block, old + block, 0.0);
            t.columns_mut(old, block)
                .copy_from(&(u.transpose() * product));
            new_v = &w_t * new_u;
            columns += block;
        }
        let (left, s, right) = dense(&t).ok()?;
        let best_u = &u * left.columns(0, keep);
        let best_v = &v * right.columns(0, keep);
        let mut rest = &w_t * best_u.columns(0, r);
        for (i, value) in s.iter().enumerate().take(r) {
            rest.column_mut(i).axpy(-value, &best_v.column(i), 1.0);
        }
        // What roundings leave in a product of this size; a residual does not fall below it.
        let tolerance = 256.0 * f64::EPSILON * s[0];
        if rest.column_iter().all(|column| column.norm() <= tolerance) {
            return Some((best_u, s, best_v));
        }
        // What the cut removes from V must not come back with the next block.
        orthonormalise(&v, &mut new_v, &mut rng);
        (u, v) = (best_u, best_v);
        t = DMatrix::from_diagonal(&DVector::from_column_slice(&s[..keep]));
    }
    None
}

fn joined(left: &DMatrix<f64>, right: &DMatrix<f64>) -> DMatrix<f64> {
    let values = [left.as_slice(), right.as_slice()].concat();
    DMatrix::from_vec(left.nrows(), left.ncols() + right.ncols(), values)
}

/// Orthonormal columns continued to `count` of them.
fn completed(columns: DMatrix<f64>, count: usize) -> DMatrix<f64> {
    let missing = count.saturating_sub(columns.ncols());
    let mut block = DMatrix::zeros(columns.nrows(), missing);
    orthonormalise(&columns, &mut block, &mut ChaCha8Rng::seed_from_u64(0));
    joined(&columns, &block)
}

/// Makes the columns of `block` orthonormal and orthogonal to the orthonormal `basis`.
///
/// A column that depends on those before it becomes an arbitrary direction beside them. Basis and
/// block together must have at most as many columns as rows.
fn orthonormalise(basis: &DMatrix<f64>, block: &mut DMatrix<f64>, rng: &mut ChaCha8Rng) {
    let basis_t = basis.transpose();
    *block -= basis * (&basis_t * &*block);
    for j in 0..block.ncols() {
        let mut column: DVector<f64> = block.column(j).into_owned();
        loop {
            let norm = column.norm();
            if norm <= ZERO {
                column = DVector::from_fn(block.nrows(), |_, _| rng.sample(StandardNormal));
                continue;
            }
            column /= norm;
            let before = block.columns(0, j);
            column -= basis * basis.tr_mul(&column);
            column -= before * before.tr_mul(&column);
            // When little was taken away, little of the rounding was blown up.
            if column.norm() > 0.7 {
                break;
            }
        }
        column.normalize_mut();
        block.set_column(j, &column);
    }
}

/// The first `k` Householder steps; see [`qr`].
fn householder(mut w: DMatrix<f64>, k: usize) -> (DMatrix<f64>, DMatrix<f64>) {
    let (m, n) = w.shape();
    // H = I − τ y yᵀ with y₀ = 1; below R's diagonal W keeps the rest of y.
    let mut taus = vec![0.0; k];
    for (j, tau) in taus.iter_mut().enumerate() {
        let (front, back) = w.as_mut_slice().split_at_mut((j + 1) * m);
        let column = &mut front[j * m + j..];
        let alpha = column[0];
        let tail = column[1..].iter().fold(0.0_f64, |norm, x| norm.hypot(*x));
        if tail == 0.0 {
            continue;
        }
        let beta = -alpha.hypot(tail).copysign(alpha);
        *tau = (beta - alpha) / beta;
        column[0] = beta;
        column[1..].iter_mut().for_each(|x| *x /= alpha - beta);
        for other in back.chunks_exact_mut(m) {
            reflect(&column[1..], *tau, &mut other[j..]);
        }
    }
    let mut q = DMatrix::identity(m, k);
    for j in (0..k).rev() {
        let y = &w.as_slice()[j * m + j + 1..(j + 1) * m];
        for column in q.as_mut_slice().chunks_exact_mut(m).skip(j) {
            reflect(y, taus[j], &mut column[j..]);
        }
    }
    let r = DMatrix::from_fn(k, n, |i, j| if i <= j { w[(i, j)] } else { 0.0 });
    (q, r)
}

/// x ← x − τ (yᵀx) y, where y starts with a 1 that is not stored.
fn reflect(y: &[f64], tau: f64, x: &mut [f64]) {
    let Some((first, rest)) = x.split_first_mut() else {
        return;
    };
    let product: f64 = y.iter().zip(rest.iter()).map(|(y, x)| y * x).sum();
    let step = tau * (*first + product);
    *first -= step;
    for (x, y) in rest.iter_mut().zip(y) {
        *x -= step * y;
    }
}

#[cfg(test)]
mod tests;
