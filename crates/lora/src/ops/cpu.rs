//! What the one-pass operations share on the CPU: types, slices, threads, vectors, products.

use std::mem::MaybeUninit;

use candle_core::{CpuStorage, DType, Layout, Result, Shape, Storage, Tensor, WithDType, bail};
use rayon::iter::{IntoParallelIterator, ParallelIterator};
use rayon::slice::ParallelSlice;

/// The types of the one-pass operations: f32 and f64.
pub(super) trait Real:
    WithDType
    + num_traits::Float
    + num_traits::NumAssign
    + From<f32>
    + Send
    + Sync
    + std::iter::Sum
    + 'static
{
    /// eˣ, of code that vectorises; in f32 within 1 unit in the last place.
    fn exp_fast(self) -> Self;
    fn of(x: f64) -> Self;
}

impl Real for f32 {
    #[inline(always)]
    fn exp_fast(self) -> Self {
        // eˣ = 2ⁿ eʳ with n = round(x / ln 2) and |r| <= ln 2 / 2; eʳ by a polynomial whose
        // coefficients are those of Cephes' expf. ln 2 in two parts keeps r exact.
        const LOG2_E: f32 = std::f32::consts::LOG2_E;
        const ROUND: f32 = 12_582_912.0; // 1.5 · 2²³: adding it rounds to an integer
        let x = self.clamp(-104.0, 89.0);
        let shifted = x * LOG2_E + ROUND;
        let whole = shifted - ROUND;
        let r = x - whole * 0.693_359_4;
        let r = r - whole * -2.121_944_4e-4;
        let p = 1.987_569_1e-4_f32;
        let p = p * r + 1.398_2e-3;
        let p = p * r + 8.333_452e-3;
        let p = p * r + 4.166_579_6e-2;
        let p = p * r + 1.666_666_5e-1;
        let p = p * r + 0.5;
        let e = p * (r * r) + r + 1.0;
        // 2ⁿ in two halves, so that results below 2⁻¹²⁶ and above 2¹²⁷ come out as they should.
        let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
        let half = n >> 1;
        let power = |n: i32| f32::from_bits((n.wrapping_add(127) as u32) << 23);
        let y = e * power(half) * power(n.wrapping_sub(half));
        if self.is_nan() { self } else { y }
    }

    #[inline(always)]
    fn of(x: f64) -> Self {
        x as f32
    }
}

impl Real for f64 {
    #[inline(always)]
    fn exp_fast(self) -> Self {
        self.exp()
    }

    #[inline(always)]
    fn of(x: f64) -> Self {
        x
    }
}

/// Whether candle keeps the graph of a backward pass, for derivatives of derivatives.
///
/// candle reads the variable once in each thread and so does this.
pub(super) fn second_order() -> bool {
    thread_local! {
        static KEPT: bool = std::env::var("CANDLE_GRAD_DO_NOT_DETACH")
            .is_ok_and(|value| !value.is_empty() && value != "0");
    }
    KEPT.with(|kept| *kept)
}

/// Whether an operation on these runs as one pass: f32 or f64, all alike, on the CPU, and no
/// derivative of the derivative is wanted.
pub(super) fn one_pass(tensors: &[&Tensor]) -> bool {
    let dtype = tensors[0].dtype();
    matches!(dtype, DType::F32 | DType::F64)
        && tensors
            .iter()
            .all(|t| t.dtype() == dtype && t.device().is_cpu())
        && !second_order()
}

/// Runs a block for f32 or f64 with `$T` standing for the type of `$tensor`.
macro_rules! for_real {
    ($tensor:expr, $T:ident => $body:expr) => {{
        // For the type of a storage.
        #[allow(unused_imports)]
        use candle_core::backend::BackendStorage as _;
        match $tensor.dtype() {
            candle_core::DType::F32 => {
                type $T = f32;
                $body
            }
            candle_core::DType::F64 => {
                type $T = f64;
                $body
            }
            other => {
                let message = format!("one-pass operations are for f32 and f64, not {other:?}");
                return Err(candle_core::Error::Msg(message).into());
            }
        }
    }};
}
pub(super) use for_real;

/// An argument of a custom operation.
pub(super) type Held<'a> = (&'a CpuStorage, &'a Layout);

/// The gradients of three arguments, those that are wanted.
pub(super) type Gradients = (Option<Tensor>, Option<Tensor>, Option<Tensor>);

/// The numbers of a contiguous argument of a custom operation.
pub(super) fn slice<'a, T: WithDType>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<T>()?[start..end]),
        None => bail!("internal: a one-pass operation got a strided tensor"),
    }
}

/// The numbers of a contiguous CPU tensor, for as long as the closure runs.
pub(super) fn read<T: WithDType, R>(
    tensor: &Tensor,
    f: impl FnOnce(&[T]) -> Result<R>,
) -> Result<R> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => f(slice(storage, layout)?),
        _ => bail!("internal: a one-pass operation got a tensor of another device"),
    }
}

/// A tensor of these numbers, without a copy.
pub(super) fn tensor<T: WithDType>(numbers: Vec<T>, shape: impl Into<Shape>) -> Result<Tensor> {
    Tensor::from_vec(numbers, shape.into(), &candle_core::Device::Cpu)
}

/// A vector that `fill` writes.
///
/// # Safety
///
/// `fill` must write every element.
pub(super) unsafe fn filled<T>(len: usize, fill: impl FnOnce(&mut [MaybeUninit<T>])) -> Vec<T> {
    let mut numbers = Vec::with_capacity(len);
    fill(&mut numbers.spare_capacity_mut()[..len]);
    // SAFETY: the capacity is `len`, and the caller vouches that all of it was written.
    unsafe { numbers.set_len(len) };
    numbers
}

/// A vector that `write` fills through a pointer, as a product does.
///
/// # Safety
///
/// `write` must write all `len` elements.
pub(super) unsafe fn written<T>(len: usize, write: impl FnOnce(*mut T)) -> Vec<T> {
    // SAFETY: the caller's word is the same.
    unsafe { filled(len, |numbers| write(numbers.as_mut_ptr().cast())) }
}

/// What a custom operation gives back.
pub(super) fn stored<T: WithDType>(numbers: Vec<T>) -> CpuStorage {
    T::to_cpu_storage_owned(numbers)
}

/// Numbers that are worth a second thread.
const PARALLEL: usize = 1 << 14;

/// How many rows of `row` numbers a thread should take: all of them when they are few.
///
/// Each core gets two pieces or more, so that a core that starts late holds nobody up.
pub(super) fn rows_each(rows: usize, row: usize) -> usize {
    let threads = rayon::current_num_threads();
    if threads == 1 || rows.saturating_mul(row) < PARALLEL {
        return rows.max(1);
    }
    rows.div_ceil(threads * 4)
        .max((PARALLEL / 4).div_ceil(row.max(1)))
}

/// How many numbers a thread should take where so little is done with each that memory sets the
/// pace.
pub(super) fn streamed_each(numbers: usize) -> usize {
    match numbers < 8 * PARALLEL {
        true => numbers.max(1),
        false => rows_each(numbers, 1),
    }
}

/// Runs a closure compiled for the widest vectors that this CPU has.
///
/// What the closure calls must be `#[inline(always)]` to be compiled for them too. A macro, so that
/// each kind of vector gets a closure of its own: LLVM leaves a large closure with three callers
/// outside of all three, in the vectors of the oldest CPU.
macro_rules! vectorised {
    (|| $body:expr) => {
        match pulp::Arch::new() {
            #[cfg(target_arch = "x86_64")]
            pulp::Arch::V4(simd) => simd.vectorize(|| $body),
            #[cfg(target_arch = "x86_64")]
            pulp::Arch::V3(simd) => simd.vectorize(|| $body),
            _ => $body,
        }
    };
}
pub(super) use vectorised;

/// How many sums run beside each other, as vectors do and as their latency wants.
pub(super) const LANES: usize = 32;

/// The sums of both numbers that `f` makes of each place of the rows.
///
/// The order is that of the lanes and of blocks, so it depends on the length alone, and a long
/// row loses hardly more digits than a short one.
#[inline(always)]
pub(super) fn sums<T: Real, const M: usize>(
    rows: [&[T]; M],
    f: impl Fn([T; M]) -> (T, T),
) -> (T, T) {
    const BLOCK: usize = 128 * LANES;
    let len = rows[0].len();
    let mut total = (T::zero(), T::zero());
    let mut start = 0;
    while start < len {
        let end = len.min(start + BLOCK);
        let (a, b) = block_sums(rows.map(|row| &row[start..end]), &f);
        total = (total.0 + a, total.1 + b);
        start = end;
    }
    total
}

#[inline(always)]
fn block_sums<T: Real, const M: usize>(rows: [&[T]; M], f: &impl Fn([T; M]) -> (T, T)) -> (T, T) {
    let chunks = rows.map(|row| row.as_chunks::<LANES>().0);
    let rests = rows.map(|row| row.as_chunks::<LANES>().1);
    let (mut a, mut b) = ([T::zero(); LANES], [T::zero(); LANES]);
    for i in 0..chunks[0].len() {
        let chunk = chunks.map(|chunk| &chunk[i]);
        for lane in 0..LANES {
            let (x, y) = f(chunk.map(|chunk| chunk[lane]));
            a[lane] += x;
            b[lane] += y;
        }
    }
    for i in 0..rests[0].len() {
        let (x, y) = f(rests.map(|rest| rest[i]));
        a[i] += x;
        b[i] += y;
    }
    (folded(a, |a, b| a + b), folded(b, |a, b| a + b))
}

/// The lanes as one, by halves.
#[inline(always)]
fn folded<T: Real>(mut lanes: [T; LANES], f: impl Fn(T, T) -> T) -> T {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] = f(lanes[i], lanes[i + half]);
        }
        half /= 2;
    }
    lanes[0]
}

/// The rows of a block whose columns are added up by themselves, in rows of `n` numbers.
pub(super) fn block_rows(n: usize) -> usize {
    (8192 / n).max(16)
}

/// The sum of the blocks' sums, first to last; zeros where there is no block.
pub(super) fn in_order<T: Real>(blocks: Vec<Vec<T>>, n: usize) -> Vec<T> {
    let mut blocks = blocks.into_iter();
    let mut total = blocks.next().unwrap_or_else(|| vec![T::zero(); n]);
    for block in blocks {
        for (total, block) in total.iter_mut().zip(block) {
            *total += block;
        }
    }
    total
}

/// The sum of the rows of `n` numbers, in an order that depends on the shape alone.
pub(super) fn column_sums<T: Real>(rows: &[T], n: usize) -> Vec<T> {
    if n == 0 {
        return Vec::new();
    }
    let blocks = rows.par_chunks(block_rows(n) * n).map(|block| {
        let mut sum = vec![T::zero(); n];
        vectorised!(|| {
            for row in block.chunks_exact(n) {
                for (sum, &x) in sum.iter_mut().zip(row) {
                    *sum += x;
                }
            }
        });
        sum
    });
    in_order(blocks.collect(), n)
}

/// The largest number, which is no NaN; -∞ of none.
#[inline(always)]
pub(super) fn largest<T: Real>(x: &[T]) -> T {
    let larger = |a: T, b: T| if b > a { b } else { a };
    let (chunks, rest) = x.as_chunks::<LANES>();
    let mut lanes = [T::neg_infinity(); LANES];
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, x);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane = larger(*lane, x);
    }
    folded(lanes, larger)
}

/// A matrix in memory: where it starts, and how far apart its rows and columns are.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a, T> {
    pub numbers: &'a [T],
    pub rows: usize,
    pub cols: usize,
    pub row_stride: usize,
    pub col_stride: usize,
}

impl<'a, T> Matrix<'a, T> {
    /// Row after row.
    pub fn new(numbers: &'a [T], rows: usize, cols: usize) -> Self {
        Self::strided(numbers, rows, cols, cols, 1)
    }

    pub fn strided(
        numbers: &'a [T],
        rows: usize,
        cols: usize,
        row_stride: usize,
        col_stride: usize,
    ) -> Self {
        assert!(
            rows == 0
                || cols == 0
                || (rows - 1) * row_stride + (cols - 1) * col_stride < numbers.len(),
            "internal: a matrix reaches beyond its numbers"
        );
        Self {
            numbers,
            rows,
            cols,
            row_stride,
            col_stride,
        }
    }

    pub fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    /// Some of the rows.
    pub fn rows(self, from: usize, count: usize) -> Self {
        let numbers = &self.numbers[(from * self.row_stride).min(self.numbers.len())..];
        Self::strided(numbers, count, self.cols, self.row_stride, self.col_stride)
    }

    /// Some of the columns.
    pub fn cols(self, from: usize, count: usize) -> Self {
        self.t().rows(from, count).t()
    }
}

/// An array of which threads write different parts.
pub(super) struct Parts<T>(pub *mut T);
// SAFETY: who writes through it vouches that the parts do not overlap.
unsafe impl<T> Send for Parts<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Parts<T> {}

/// dst = keep · dst + scale · lhs · rhs, on all threads.
///
/// gemm's own sharing between threads costs a fifth more where one side has a few hundred rows,
/// and does not help a product that is thin: here each thread takes panels of columns, and where
/// there are too few of them parts of the rows.
///
/// `dst` is read only where `keep` is not 0, so it may hold nothing yet.
///
/// # Safety
///
/// `dst` must be valid for writes of `lhs.rows` rows, `row_stride` apart, of `rhs.cols` numbers,
/// and for reads of them too when `keep` is not 0.
pub(super) unsafe fn product<T: Real>(
    dst: *mut T,
    row_stride: usize,
    keep: T,
    scale: T,
    lhs: Matrix<'_, T>,
    rhs: Matrix<'_, T>,
) {
    let (rows, cols) = (lhs.rows, rhs.cols);
    let (down, across) = tiles(rows, cols, lhs.cols, rayon::current_num_threads());
    if down * across == 1 {
        // SAFETY: the caller's word.
        return unsafe { product_here(dst, row_stride, keep, scale, lhs, rhs) };
    }
    let dst = Parts(dst);
    (0..down * across).into_par_iter().for_each(|tile| {
        let dst = &dst;
        let (row, tall) = part(rows, down, tile % down);
        let (col, wide) = part(cols, across, tile / down);
        let (lhs, rhs) = (lhs.rows(row, tall), rhs.cols(col, wide));
        // SAFETY: each tile is a part of what the caller vouches for.
        unsafe {
            let dst = dst.0.add(row * row_stride + col);
            product_here(dst, row_stride, keep, scale, lhs, rhs);
        }
    });
}

/// Where part `at` of `parts` begins, and how much it is of `all`.
fn part(all: usize, parts: usize, at: usize) -> (usize, usize) {
    let from = all * at / parts;
    (from, all * (at + 1) / parts - from)
}

/// Columns of a panel: wide enough for gemm's kernels, and 96 rows of W of a few hundred numbers
/// fit the second cache.
const PANEL: usize = 96;

/// Multiplications that are worth a thread's while.
const TILE: usize = 1 << 17;

/// Into how many parts the rows and the columns of a product go.
///
/// gemm adds up a product of at most 64 rows and columns in another order than a larger one. No
/// tile is that small unless the whole product is, so the numbers are the same on any number of
/// threads.
fn tiles(rows: usize, cols: usize, depth: usize, threads: usize) -> (usize, usize) {
    let most = rows.saturating_mul(cols).saturating_mul(depth) / TILE;
    if threads == 1 || most < 2 {
        return (1, 1);
    }
    let across = (cols / PANEL).clamp(1, most);
    if across >= threads {
        return (1, across);
    }
    let (parts, least) = match across {
        1 if cols <= 64 => (threads, 65),
        1 => (threads, 16),
        _ => ((2 * threads).div_ceil(across), 16),
    };
    (parts.min(rows / least).min(most / across).max(1), across)
}

/// [`product`] on this thread alone.
///
/// # Safety
///
/// As [`product`].
pub(super) unsafe fn product_here<T: Real>(
    dst: *mut T,
    row_stride: usize,
    keep: T,
    scale: T,
    lhs: Matrix<'_, T>,
    rhs: Matrix<'_, T>,
) {
    assert_eq!(lhs.cols, rhs.rows, "internal: sizes of a product");
    // SAFETY: `Matrix` has checked that its numbers reach far enough; `dst` is the caller's word.
    unsafe {
        gemm::gemm(
            lhs.rows,
            rhs.cols,
            lhs.cols,
            dst,
            1,
            row_stride as isize,
            keep != T::zero(),
            lhs.numbers.as_ptr(),
            lhs.col_stride as isize,
            lhs.row_stride as isize,
            rhs.numbers.as_ptr(),
            rhs.col_stride as isize,
            rhs.row_stride as isize,
            keep,
            scale,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_are_many_but_not_small() {
        for threads in [1, 2, 3, 16, 64] {
            for (rows, cols, depth) in [
                (0, 5, 3),
                (1, 1, 1),
                (256, 768, 768),
                (256, 192, 576),
                (256, 8, 3072),
                (8, 3072, 256),
                (3072, 8, 256),
                (4096, 100, 64),
                (16, 49_152, 576),
                (1, 100_000, 10),
                (65, 65, 4000),
            ] {
                let (down, across) = tiles(rows, cols, depth, threads);
                let what = format!("{rows} x {cols} x {depth} on {threads}: {down} x {across}");
                let least =
                    |all: usize, parts: usize| (0..parts).map(|at| part(all, parts, at).1).min();
                let (tall, wide) = (least(rows, down).unwrap(), least(cols, across).unwrap());
                assert_eq!(
                    (0..down).map(|at| part(rows, down, at).1).sum::<usize>(),
                    rows,
                    "{what}"
                );
                assert!(tall > 64 || wide > 64 || rows <= 64 && cols <= 64, "{what}");
                if threads <= 3 && rows * cols * depth >= 8 * TILE && (rows > 200 || cols > 200) {
                    assert!(down * across >= threads, "{what}");
                }
            }
        }
    }

    #[test]
    fn products_are_those_of_the_definition() {
        let numbers = |n: usize, seed: usize| -> Vec<f64> {
            (0..n)
                .map(|i| ((i * 7919 + seed) % 1009) as f64 / 1009.0 - 0.5)
                .collect()
        };
        for (rows, cols, depth) in [
            (1, 1, 1),
            (3, 200, 70),
            (200, 3, 70),
            (130, 250, 33),
            (4, 5, 0),
        ] {
            let (a, b) = (numbers(rows * depth, 1), numbers(depth * cols, 2));
            let stride = cols + 3;
            let before = numbers(rows * stride, 3);
            let across = Matrix::strided(&b, cols, depth, 1, cols);
            for (rhs, keep) in [(Matrix::new(&b, depth, cols), 0.0), (across.t(), 0.5)] {
                let lhs = Matrix::new(&a, rows, depth);
                for threads in [1, 2, 5] {
                    let pool = rayon::ThreadPoolBuilder::new()
                        .num_threads(threads)
                        .build()
                        .unwrap();
                    let mut dst = before.clone();
                    // SAFETY: `dst` has `rows` rows of `stride` numbers.
                    pool.install(|| unsafe {
                        product(dst.as_mut_ptr(), stride, keep, 2.0, lhs, rhs);
                    });
                    for row in 0..rows {
                        for col in 0..stride {
                            let at = row * stride + col;
                            let sum = |col: usize| -> f64 {
                                (0..depth)
                                    .map(|k| a[row * depth + k] * b[k * cols + col])
                                    .sum()
                            };
                            let want = match col < cols {
                                true => keep * before[at] + 2.0 * sum(col),
                                false => before[at],
                            };
                            assert!((dst[at] - want).abs() < 1e-12, "{rows} {cols} {row} {col}");
                        }
                    }
                }
            }
        }
    }

    /// The distance to the exact result in units of the last place of f32.
    fn ulps(x: f32, got: f32) -> f64 {
        let want = f64::from(x).exp();
        let place = 2f64.powi((want.log2().floor() as i32).max(-126) - 23);
        (f64::from(got) - want).abs() / place
    }

    #[test]
    fn exp_fast_is_within_one_place_everywhere() {
        // 9.65 million numbers, and all that lie near 0.
        let wide = (0..=9_650_000).map(|i| -104.0 + i as f32 * 2e-5);
        let near = (0..=2_000_000).map(|i| -1.0 + i as f32 * 1e-6);
        let mut x: Vec<f32> = wide.chain(near).filter(|x| *x <= 88.722_83).collect();
        for power in -126..6 {
            x.extend([2f32.powi(power), -2f32.powi(power)]);
        }
        let mut y = x.clone();
        vectorised!(|| y.iter_mut().for_each(|y| *y = y.exp_fast()));
        let (mut worst, mut at) = (0.0, 0.0);
        for (&x, &y) in x.iter().zip(&y) {
            if ulps(x, y) > worst {
                (worst, at) = (ulps(x, y), x);
            }
        }
        assert!(worst <= 1.0, "{worst} places at {at}");
    }

    #[test]
    fn exp_fast_of_extremes() {
        let exp = |x: f32| x.exp_fast();
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        assert!(exp(f32::NAN).is_nan());
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(89.0), f32::INFINITY);
        assert_eq!(exp(f32::MAX), f32::INFINITY);
        assert_eq!(exp(-104.0), 0.0);
        assert_eq!(exp(f32::MIN), 0.0);
        // Below the normal numbers, and the last before infinity.
        assert!(exp(-88.0) > 0.0 && exp(-88.0) < f32::MIN_POSITIVE);
        assert_eq!(exp(-103.0).to_bits(), 1);
        assert!(exp(88.722_83).is_finite());
    }

    #[test]
    fn sums_and_largest_see_every_number() {
        for len in [0usize, 1, 31, 32, 33, 64, 100, 4095, 4096, 4097, 10_000] {
            let x: Vec<f64> = (0..len).map(|i| ((i * 7919) % 1009) as f64).collect();
            let y: Vec<f64> = (0..len).map(|i| ((i * 31) % 17) as f64).collect();
            let (a, b) = sums([&x, &y], |[x, y]| (x * y, x));
            assert_eq!(
                a,
                x.iter().zip(&y).map(|(x, y)| x * y).sum::<f64>(),
                "{len}"
            );
            assert_eq!(b, x.iter().sum::<f64>(), "{len}");
            assert_eq!(
                largest(&x),
                x.iter().copied().fold(f64::NEG_INFINITY, f64::max)
            );
            for at in [0, len / 2, len.saturating_sub(1)] {
                let mut x = x.clone();
                x.iter_mut().skip(at).take(1).for_each(|x| *x = 1e6);
                assert!(len == 0 || largest(&x) == 1e6, "{at} of {len}");
            }
        }
    }
}
