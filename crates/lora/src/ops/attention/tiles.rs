//! Attention tile by tile: a few queries and a few keys at a time, on one thread each.
//!
//! The scores of a tile are kept by key: a row for each key, with the queries side by side. So
//! largest score, sum and exponential of all queries are taken in step, vector by vector, and
//! nothing is ever summed across a vector.

use candle_core::{CpuStorage, Layout, Result, Storage, Tensor, bail};
use rayon::prelude::*;

use super::super::cpu::{Matrix, Real, product_here, rows_each, vectorised};
use super::Groups;

/// The most queries of a tile.
const QUERIES: usize = 128;
/// The most keys of a tile.
const KEYS: usize = 256;
/// The most keys of a tile that the causal diagonal runs through.
const DIAGONAL: usize = 64;
/// Multiplications that are worth a second thread.
const PARALLEL: usize = 1 << 17;

/// How many of what there are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub batch: usize,
    pub queries: usize,
    pub keys: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub dim: usize,
    pub value_dim: usize,
}

impl Sizes {
    /// Of queries, keys and values that lie side by side.
    pub fn packed([batch, queries, dim]: [usize; 3], (heads, kv_heads): (usize, usize)) -> Self {
        Self {
            batch,
            queries,
            keys: queries,
            heads,
            kv_heads,
            dim,
            value_dim: dim,
        }
    }
}

/// Queries, keys or values in memory; the numbers of one head of one row lie together.
#[derive(Clone, Copy)]
pub(super) struct Heads<'a, T> {
    numbers: &'a [T],
    batch: usize,
    row: usize,
    head: usize,
    dim: usize,
}

impl<'a, T: Real> Heads<'a, T> {
    /// The heads from `first` of (batch, rows, heads, dim) or (batch, rows, heads · dim).
    pub fn new(storage: &'a CpuStorage, layout: &Layout, first: usize, dim: usize) -> Result<Self> {
        let (batch, row, head) = match *layout.stride() {
            [batch, row, head, _] => (batch, row, head),
            [batch, row, _] => (batch, row, dim),
            _ => bail!("internal: heads of {:?}", layout.dims()),
        };
        let start = layout.start_offset() + first * head;
        let numbers = &storage.as_slice::<T>()?[start..];
        Ok(Self {
            numbers,
            batch,
            row,
            head,
            dim,
        })
    }

    /// Row after row of (batch, rows, heads, dim).
    pub fn packed(numbers: &'a [T], rows: usize, heads: usize, dim: usize) -> Self {
        Self {
            numbers,
            batch: rows * heads * dim,
            row: heads * dim,
            head: dim,
            dim,
        }
    }

    fn rows(self, batch: usize, head: usize, first: usize, count: usize) -> Matrix<'a, T> {
        let start = batch * self.batch + head * self.head + first * self.row;
        Matrix::strided(&self.numbers[start..], count, self.dim, self.row, 1)
    }
}

/// Where results of (batch, rows, heads, dim) go.
#[derive(Clone, Copy)]
pub(super) struct Slots<T> {
    start: *mut T,
    batch: usize,
    row: usize,
    head: usize,
}

// SAFETY: every task writes places of its own; that is what each `unsafe` below vouches for.
unsafe impl<T: Send> Send for Slots<T> {}
unsafe impl<T: Send> Sync for Slots<T> {}

impl<T> Slots<T> {
    /// The heads from `first` of a buffer (batch, rows, heads, dim).
    ///
    /// # Safety
    ///
    /// The buffer must be that large, and live as long as anything is written.
    pub unsafe fn new(buffer: *mut T, rows: usize, heads: usize, dim: usize, first: usize) -> Self {
        Self {
            // SAFETY: the caller's word.
            start: unsafe { buffer.add(first * dim) },
            batch: rows * heads * dim,
            row: heads * dim,
            head: dim,
        }
    }

    /// A buffer (batch, heads, rows, dim).
    ///
    /// # Safety
    ///
    /// As [`new`](Self::new).
    pub unsafe fn by_head(buffer: *mut T, rows: usize, heads: usize, dim: usize) -> Self {
        Self {
            start: buffer,
            batch: rows * heads * dim,
            row: dim,
            head: rows * dim,
        }
    }

    /// # Safety
    ///
    /// The place must be in the buffer.
    unsafe fn at(self, batch: usize, head: usize, row: usize) -> *mut T {
        // SAFETY: the caller's word.
        unsafe {
            self.start
                .add(batch * self.batch + head * self.head + row * self.row)
        }
    }
}

enum Kind<'a, T> {
    Blocked(&'a [u8]),
    Added(&'a [T]),
}

/// A mask over (batch, heads, L, S): strides of 0 where it is broadcast.
pub(super) struct Mask<'a, T> {
    kind: Kind<'a, T>,
    strides: [usize; 4],
}

impl<'a, T: Real> Mask<'a, T> {
    pub fn new(storage: &'a Storage, layout: &Layout) -> Result<Self> {
        let (Storage::Cpu(storage), &[a, b, c, d]) = (storage, layout.stride()) else {
            bail!("internal: a mask of {:?}", layout.dims())
        };
        let start = layout.start_offset();
        let kind = match storage {
            CpuStorage::U8(numbers) => Kind::Blocked(&numbers[start..]),
            other => Kind::Added(&other.as_slice::<T>()?[start..]),
        };
        Ok(Self {
            kind,
            strides: [a, b, c, d],
        })
    }

    /// Over scores with a row for each key from `key` and a column for each query from `query`.
    fn apply(
        &self,
        scores: &mut [T],
        lanes: usize,
        (batch, head): (usize, usize),
        query: usize,
        key: usize,
    ) {
        let [a, b, per_query, per_key] = self.strides;
        let start = batch * a + head * b + query * per_query + key * per_key;
        let steps = (per_query, per_key);
        match self.kind {
            Kind::Blocked(mask) => each(scores, lanes, start, steps, |x, i| {
                if mask[i] != 0 {
                    *x = T::neg_infinity();
                }
            }),
            Kind::Added(mask) => each(scores, lanes, start, steps, |x, i| *x += mask[i]),
        }
    }
}

/// Every score with the index of its number in the mask.
fn each<T>(
    scores: &mut [T],
    lanes: usize,
    start: usize,
    (per_query, per_key): (usize, usize),
    f: impl Fn(&mut T, usize),
) {
    if per_query == 0 {
        for (key, row) in scores.chunks_exact_mut(lanes).enumerate() {
            row.iter_mut().for_each(|x| f(x, start + key * per_key));
        }
        return;
    }
    // A few keys at a time: the mask is read along the keys, the scores along the queries.
    const FEW: usize = 16;
    for (few, rows) in scores.chunks_mut(lanes * FEW).enumerate() {
        for lane in 0..lanes {
            for (key, row) in rows.chunks_exact_mut(lanes).enumerate() {
                let key = few * FEW + key;
                f(&mut row[lane], start + lane * per_query + key * per_key);
            }
        }
    }
}

/// Keys that a tile of queries looks at together.
struct Span {
    key: usize,
    keys: usize,
    /// The first query that sees any of them.
    query: usize,
}

/// Queries of one group of a head: from `from` to `to`; they see no key before `first`.
#[derive(Clone, Copy)]
struct Run {
    first: usize,
    from: usize,
    to: usize,
}

/// The keys that the queries of a run see. All of them see the first span.
fn spans(Run { first, from, to }: Run, keys: usize, causal: bool) -> Vec<Span> {
    let mut spans = Vec::new();
    let (seen_by_all, seen) = if causal {
        (from.min(keys), to.min(keys))
    } else {
        (keys, keys)
    };
    for (start, end, most) in [(first, seen_by_all, KEYS), (seen_by_all, seen, DIAGONAL)] {
        for key in (start..end).step_by(most) {
            spans.push(Span {
                key,
                keys: most.min(end - key),
                query: if causal { from.max(key) } else { from },
            });
        }
    }
    spans
}

/// Room for the scores of a tile.
struct Scores<T>(Vec<T>);

impl<T: Real> Scores<T> {
    fn new(lanes: usize, keys: usize) -> Self {
        Self(Vec::with_capacity(lanes * keys.min(KEYS.max(DIAGONAL))))
    }

    /// scale · keys · queriesᵀ.
    fn of(&mut self, scale: T, keys: Matrix<'_, T>, queries: Matrix<'_, T>) -> &mut [T] {
        let (rows, lanes) = (keys.rows, queries.rows);
        self.0.clear();
        self.0.reserve(rows * lanes);
        // SAFETY: there is room for (rows, lanes), and the product writes all of it.
        unsafe {
            let start = self.0.as_mut_ptr();
            product_here(start, lanes, T::zero(), scale, keys, queries.t());
            self.0.set_len(rows * lanes);
        }
        &mut self.0
    }
}

/// One attention: its arguments.
pub(super) struct Attention<'a, T> {
    pub sizes: Sizes,
    pub scale: T,
    pub causal: bool,
    /// Only with a causal mask.
    pub groups: Option<Groups>,
    pub masks: Vec<Mask<'a, T>>,
    pub q: Heads<'a, T>,
    pub k: Heads<'a, T>,
    pub v: Heads<'a, T>,
}

/// What the backward pass needs of the forward pass: for each query of (batch, heads, L) its
/// largest score and 1 / Σ exp(score − largest), two rows of numbers.
///
/// Their sum in one number, the logarithm of Σ exp(score), would cost digits where scores are
/// large.
pub(super) struct Norms<T> {
    pub largest: Slots<T>,
    pub inverse: Slots<T>,
}

impl<T: Real> Attention<'_, T> {
    fn kv_head(&self, head: usize) -> usize {
        head / (self.sizes.heads / self.sizes.kv_heads)
    }

    /// The queries from `from` to `to`, group by group.
    fn runs(&self, head: usize, from: usize, to: usize) -> impl Iterator<Item = Run> + use<T> {
        let (groups, mut at) = (self.groups, from);
        std::iter::from_fn(move || {
            let (first, end) = groups.map_or((0, to), |groups| groups.of(head, at));
            let run = Run {
                first,
                from: at,
                to: end.min(to),
            };
            at = run.to;
            (run.from < to).then_some(run)
        })
    }

    /// How many queries a tile has: fewer where the threads would go short of tiles.
    fn tile(&self) -> usize {
        let Sizes {
            batch,
            queries,
            heads,
            ..
        } = self.sizes;
        let wanted = 4 * rayon::current_num_threads();
        let mut tile = QUERIES;
        while tile > 32 && batch * heads * queries.div_ceil(tile) < wanted {
            tile /= 2;
        }
        tile
    }

    /// How many tasks one thread takes at least.
    fn at_least(&self, tasks: usize) -> usize {
        let s = &self.sizes;
        let work = s.batch * s.heads * s.queries * s.keys * (s.dim + s.value_dim);
        if work < PARALLEL { tasks.max(1) } else { 1 }
    }

    /// Scores with masks, −∞ for what is hidden.
    fn scores<'s>(
        &self,
        room: &'s mut Scores<T>,
        place: (usize, usize),
        span: &Span,
        lanes: usize,
    ) -> &'s mut [T] {
        let (batch, head) = place;
        let keys = self.k.rows(batch, self.kv_head(head), span.key, span.keys);
        let queries = self.q.rows(batch, head, span.query, lanes);
        let scores = room.of(self.scale, keys, queries);
        for mask in &self.masks {
            mask.apply(scores, lanes, place, span.query, span.key);
        }
        if self.causal && span.key + span.keys > span.query + 1 {
            for (key, row) in scores.chunks_exact_mut(lanes).enumerate() {
                let hidden = (span.key + key).saturating_sub(span.query);
                row[..hidden.min(lanes)].fill(T::neg_infinity());
            }
        }
        scores
    }

    /// The output, and what the backward pass needs.
    ///
    /// # Safety
    ///
    /// `output` must be of (batch, L, heads, `value_dim`), the norms of (batch, heads, L); all of
    /// it is written.
    pub unsafe fn forward(&self, output: Slots<T>, norms: &Norms<T>) {
        let Sizes {
            batch,
            queries,
            heads,
            ..
        } = self.sizes;
        let tile = self.tile();
        let (places, tiles) = (batch * heads, queries.div_ceil(tile));
        let tasks = places * tiles;
        (0..tasks)
            .into_par_iter()
            .with_min_len(self.at_least(tasks))
            .with_max_len(self.at_least(tasks))
            .for_each(|task| {
                // The last queries see the most keys, so they come first.
                let from = (tiles - 1 - task / places) * tile;
                let place = (task % places / heads, task % places % heads);
                let to = queries.min(from + tile);
                for run in self.runs(place.1, from, to) {
                    // SAFETY: every task has its own queries of its own head.
                    unsafe { self.forward_tile(place, run, output, norms) };
                }
            });
    }

    unsafe fn forward_tile(
        &self,
        place: (usize, usize),
        run: Run,
        output: Slots<T>,
        norms: &Norms<T>,
    ) {
        let ((batch, head), Run { from, to, .. }) = (place, run);
        let (kv_head, count, dim) = (self.kv_head(head), to - from, self.sizes.value_dim);
        let mut room = Scores::new(count, self.sizes.keys);
        // The lowest number rather than −∞: with it nothing becomes NaN where all is hidden.
        let mut largest = vec![T::min_value(); count];
        let mut sum = vec![T::zero(); count];
        let (mut part, mut fade) = (sum.clone(), sum.clone());
        let mut keep = T::zero();
        for span in spans(run, self.sizes.keys, self.causal) {
            let (skip, lanes) = (span.query - from, to - span.query);
            let weights = self.scores(&mut room, place, &span, lanes);
            vectorised!(|| {
                soften(
                    weights,
                    &mut largest[skip..],
                    &mut sum[skip..],
                    &mut part[skip..],
                    &mut fade[skip..],
                );
            });
            // SAFETY: the rows are this task's, and written before they are kept.
            unsafe {
                if keep != T::zero() {
                    for (i, &fade) in fade[skip..].iter().enumerate() {
                        if fade != T::one() {
                            let row = output.at(batch, head, span.query + i);
                            scale(std::slice::from_raw_parts_mut(row, dim), fade);
                        }
                    }
                }
                product_here(
                    output.at(batch, head, span.query),
                    output.row,
                    keep,
                    T::one(),
                    Matrix::new(weights, span.keys, lanes).t(),
                    self.v.rows(batch, kv_head, span.key, span.keys),
                );
            }
            keep = T::one();
        }
        for (i, (&sum, &largest)) in sum.iter().zip(&largest).enumerate() {
            let inverse = if sum == T::zero() { sum } else { sum.recip() };
            // SAFETY: as above.
            unsafe {
                let row = output.at(batch, head, from + i);
                scale(std::slice::from_raw_parts_mut(row, dim), inverse);
                *norms.largest.at(batch, head, from + i) = largest;
                *norms.inverse.at(batch, head, from + i) = inverse;
            }
        }
    }
}

#[inline(always)]
fn scale<T: Real>(row: &mut [T], by: T) {
    row.iter_mut().for_each(|x| *x *= by);
}

/// Scores to exp(score − largest), where `largest` is that of all tiles so far, and their sums.
///
/// `fade` is what the exponentials of earlier tiles must be multiplied by.
#[inline(always)]
fn soften<T: Real>(
    scores: &mut [T],
    largest: &mut [T],
    sum: &mut [T],
    part: &mut [T],
    fade: &mut [T],
) {
    let lanes = largest.len();
    fade.copy_from_slice(largest);
    for row in scores.chunks_exact(lanes) {
        for (largest, &x) in largest.iter_mut().zip(row) {
            *largest = if x > *largest { x } else { *largest };
        }
    }
    part.fill(T::zero());
    if lanes == 1 {
        // One query: its scores are a vector.
        let largest = largest[0];
        scores
            .iter_mut()
            .for_each(|x| *x = (*x - largest).exp_fast());
        part[0] = scores.iter().copied().sum();
    } else {
        for row in scores.chunks_exact_mut(lanes) {
            for ((x, part), &largest) in row.iter_mut().zip(part.iter_mut()).zip(largest.iter()) {
                *x = (*x - largest).exp_fast();
                *part += *x;
            }
        }
    }
    for (((fade, sum), &part), &largest) in fade.iter_mut().zip(sum).zip(part.iter()).zip(&*largest)
    {
        *fade = (*fade - largest).exp_fast();
        *sum = *sum * *fade + part;
    }
}

/// The gradients asked for. Queries' are written, keys' and values' added to what is there.
pub(super) struct Wanted<T> {
    pub q: Option<Slots<T>>,
    pub k: Option<Slots<T>>,
    pub v: Option<Slots<T>>,
}

/// The tasks of a backward pass.
pub(super) struct Shares {
    /// Queries of a tile.
    tile: usize,
    /// Tasks of one key head, each with its own sums of the keys' and values' gradients.
    pub parts: usize,
}

impl<T: Real> Attention<'_, T> {
    /// How the backward pass is shared out.
    pub fn shares(&self) -> Shares {
        let threads = rayon::current_num_threads();
        let s = &self.sizes;
        let heads = s.batch * s.kv_heads;
        let mut tile = QUERIES;
        let items = |tile| s.heads / s.kv_heads * s.queries.div_ceil(tile);
        while tile > 32 && heads * items(tile) < 4 * threads {
            tile /= 2;
        }
        let mut parts = (4 * threads).div_ceil(heads);
        // As many tasks for each thread, or so many that it matters little.
        while !(heads * parts).is_multiple_of(threads) && heads * parts < 8 * threads {
            parts += 1;
        }
        if self.at_least(heads) > 1 {
            parts = 1;
        }
        Shares {
            tile,
            parts: parts.clamp(1, items(tile)),
        }
    }

    /// The gradients. Those of keys and values have a head for each part of each key head.
    ///
    /// # Safety
    ///
    /// The slots must be of the sizes, and those of keys and values hold zeros.
    pub unsafe fn backward(
        &self,
        shares: &Shares,
        output: Heads<'_, T>,
        gradient: Heads<'_, T>,
        (largest, inverse): (&[T], &[T]),
        wanted: &Wanted<T>,
    ) {
        let s = self.sizes;
        let (group, tiles) = (s.heads / s.kv_heads, s.queries.div_ceil(shares.tile));
        let tasks = s.batch * s.kv_heads * shares.parts;
        (0..tasks)
            .into_par_iter()
            .with_min_len(self.at_least(tasks))
            .with_max_len(self.at_least(tasks))
            .for_each(|task| {
                let (place, part) = (task / shares.parts, task % shares.parts);
                let (batch, kv_head) = (place / s.kv_heads, place % s.kv_heads);
                let mut rooms = (
                    Scores::new(shares.tile, s.keys),
                    Scores::new(shares.tile, s.keys),
                );
                // To and fro, so that no part has all the long rows of a causal mask.
                for round in 0..(group * tiles).div_ceil(shares.parts) {
                    let at = if round.is_multiple_of(2) {
                        part
                    } else {
                        shares.parts - 1 - part
                    };
                    let item = round * shares.parts + at;
                    if item >= group * tiles {
                        continue;
                    }
                    let head = kv_head * group + item % group;
                    let from = item / group * shares.tile;
                    let to = s.queries.min(from + shares.tile);
                    let start = (batch * s.heads + head) * s.queries;
                    for run in self.runs(head, from, to) {
                        let count = run.to - run.from;
                        let norms = (
                            &largest[start + run.from..][..count],
                            &inverse[start + run.from..][..count],
                        );
                        let given = (
                            output.rows(batch, head, run.from, count),
                            gradient.rows(batch, head, run.from, count),
                        );
                        // SAFETY: the queries of this head are in no other item, and the key
                        // head's part is this task's.
                        unsafe {
                            self.backward_tile(
                                &mut rooms,
                                (batch, head, kv_head * shares.parts + part),
                                run,
                                given,
                                norms,
                                wanted,
                            );
                        }
                    }
                }
            });
    }

    unsafe fn backward_tile(
        &self,
        rooms: &mut (Scores<T>, Scores<T>),
        (batch, head, slot): (usize, usize, usize),
        run: Run,
        (output, gradient): (Matrix<'_, T>, Matrix<'_, T>),
        (largest, inverse): (&[T], &[T]),
        wanted: &Wanted<T>,
    ) {
        let (kv_head, Run { from, to, .. }) = (self.kv_head(head), run);
        let scores_too = wanted.q.is_some() || wanted.k.is_some();
        let row = |x: Matrix<'_, T>, i: usize| {
            let start = i * x.row_stride;
            start..start + x.cols
        };
        // Σ gradient · output of each query.
        let mut along = vec![T::zero(); to - from];
        if scores_too {
            vectorised!(|| {
                for (i, along) in along.iter_mut().enumerate() {
                    *along = dot(
                        &output.numbers[row(output, i)],
                        &gradient.numbers[row(gradient, i)],
                    );
                }
            });
        }
        let mut keep = T::zero();
        for span in spans(run, self.sizes.keys, self.causal) {
            let (skip, lanes) = (span.query - from, to - span.query);
            let weights = self.scores(&mut rooms.0, (batch, head), &span, lanes);
            let (largest, inverse) = (&largest[skip..], &inverse[skip..]);
            let start = skip * gradient.row_stride;
            let gradient = Matrix::strided(
                &gradient.numbers[start..],
                lanes,
                gradient.cols,
                gradient.row_stride,
                1,
            );
            let slopes = if scores_too {
                let values = self.v.rows(batch, kv_head, span.key, span.keys);
                let slopes = rooms.1.of(T::one(), values, gradient);
                vectorised!(|| recall(weights, Some(slopes), largest, inverse, &along[skip..]));
                Some(Matrix::new(&*slopes, span.keys, lanes))
            } else {
                vectorised!(|| recall(weights, None, largest, inverse, &along[skip..]));
                None
            };
            let weights = Matrix::new(&*weights, span.keys, lanes);
            // SAFETY: the caller's word; the first span is that of all queries.
            unsafe {
                if let Some(v) = wanted.v {
                    let start = v.at(batch, slot, span.key);
                    product_here(start, v.row, T::one(), T::one(), weights, gradient);
                }
                let Some(slopes) = slopes else { continue };
                if let Some(k) = wanted.k {
                    let queries = self.q.rows(batch, head, span.query, lanes);
                    let start = k.at(batch, slot, span.key);
                    product_here(start, k.row, T::one(), self.scale, slopes, queries);
                }
                if let Some(q) = wanted.q {
                    let keys = self.k.rows(batch, kv_head, span.key, span.keys);
                    let start = q.at(batch, head, span.query);
                    product_here(start, q.row, keep, self.scale, slopes.t(), keys);
                }
            }
            keep = T::one();
        }
    }
}

/// Scores to weights, and the gradients of the weights to those of the scores.
#[inline(always)]
fn recall<T: Real>(
    scores: &mut [T],
    slopes: Option<&mut [T]>,
    largest: &[T],
    inverse: &[T],
    along: &[T],
) {
    let lanes = largest.len();
    for row in scores.chunks_exact_mut(lanes) {
        for ((x, &largest), &inverse) in row.iter_mut().zip(largest).zip(inverse) {
            *x = (*x - largest).exp_fast() * inverse;
        }
    }
    let Some(slopes) = slopes else { return };
    for (row, slopes) in scores
        .chunks_exact(lanes)
        .zip(slopes.chunks_exact_mut(lanes))
    {
        for ((slope, &x), &along) in slopes.iter_mut().zip(row).zip(along) {
            *slope = x * (*slope - along);
        }
    }
}

#[inline(always)]
fn dot<T: Real>(a: &[T], b: &[T]) -> T {
    const SUMS: usize = 16;
    let mut sums = [T::zero(); SUMS];
    let (whole_a, rest_a) = a.as_chunks::<SUMS>();
    let (whole_b, rest_b) = b.as_chunks::<SUMS>();
    for (a, b) in whole_a.iter().zip(whole_b) {
        for i in 0..SUMS {
            sums[i] += a[i] * b[i];
        }
    }
    let rest: T = rest_a.iter().zip(rest_b).map(|(&a, &b)| a * b).sum();
    sums.iter().copied().sum::<T>() + rest
}

/// (batch, kv heads, parts, S, dim) summed over the parts, in their order.
///
/// # Safety
///
/// `sums` must be of (batch, S, kv heads, dim), and hold numbers.
pub(super) unsafe fn gathered<T: Real>(
    partial: &[T],
    sizes: &Sizes,
    parts: usize,
    dim: usize,
    sums: Slots<T>,
) {
    let (keys, kv_heads) = (sizes.keys, sizes.kv_heads);
    let (rows, row) = (sizes.batch * keys, kv_heads * dim);
    let each = rows_each(rows, row * parts);
    let chunks = rows.div_ceil(each.max(1));
    (0..chunks).into_par_iter().for_each(|chunk| {
        for at in chunk * each..rows.min((chunk + 1) * each) {
            let (batch, key) = (at / keys, at % keys);
            for head in 0..kv_heads {
                // SAFETY: every row of a head is written once.
                let sum = unsafe { std::slice::from_raw_parts_mut(sums.at(batch, head, key), dim) };
                for part in 0..parts {
                    let start = (((batch * kv_heads + head) * parts + part) * keys + key) * dim;
                    for (sum, &x) in sum.iter_mut().zip(&partial[start..start + dim]) {
                        *sum = if part == 0 { x } else { *sum + x };
                    }
                }
            }
        }
    });
}

/// The numbers of a tensor on the CPU, whatever its strides.
pub(super) fn cpu(storage: &Storage) -> Result<&CpuStorage> {
    match storage {
        Storage::Cpu(storage) => Ok(storage),
        _ => bail!("internal: a one-pass operation got a tensor of another device"),
    }
}

/// The masks over (batch, heads, L, S), for as long as the closure runs.
pub(super) fn with_masks<T: Real, R>(
    masks: &[Tensor],
    f: impl FnOnce(Vec<Mask<'_, T>>) -> Result<R>,
) -> Result<R> {
    let held: Vec<_> = masks.iter().map(Tensor::storage_and_layout).collect();
    let masks = held
        .iter()
        .map(|(storage, layout)| Mask::new(storage, layout));
    f(masks.collect::<Result<_>>()?)
}
