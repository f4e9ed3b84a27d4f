//! The two passes of a convolution on the CPU.

use std::ops::Range;

use rayon::iter::{IndexedParallelIterator, IntoParallelIterator, ParallelIterator};

use super::patches::{Sizes, Strip, fold, unfold};
use crate::ops::Share;
use crate::ops::cpu::{Matrix, Parts, Real, product, product_here, vectorised};

/// One call: W and, where images have adapters, their A and B one after the other.
#[derive(Clone, Copy)]
pub(super) struct Pass<'a, T> {
    pub sizes: Sizes,
    pub x: &'a [T],
    pub w: &'a [T],
    pub a: &'a [T],
    pub b: &'a [T],
    /// Whose rows are images.
    pub shares: &'a [Share],
}

/// Which gradients are wanted.
#[derive(Clone, Copy)]
pub(super) struct Wanted {
    pub x: bool,
    pub w: bool,
    pub bias: bool,
    pub a: bool,
    pub b: bool,
}

/// Images that go into one product, or one image of several.
struct Block<'a> {
    images: Range<usize>,
    share: Option<&'a Share>,
}

/// The gradients that are sums over the batch; empty where not wanted.
pub(super) struct Sums<T> {
    pub w: Vec<T>,
    pub bias: Vec<T>,
    pub a: Vec<T>,
    pub b: Vec<T>,
}

impl<T: Real> Sums<T> {
    fn plus(mut self, other: Self) -> Self {
        let pairs = [
            (&mut self.w, other.w),
            (&mut self.bias, other.bias),
            (&mut self.a, other.a),
            (&mut self.b, other.b),
        ];
        for (total, part) in pairs {
            for (total, part) in total.iter_mut().zip(part) {
                *total += part;
            }
        }
        self
    }
}

/// What a thread computes of the backward pass: the images from `first` on.
struct Part<'a, T> {
    blocks: Range<usize>,
    first: usize,
    dx: &'a mut [T],
}

/// Memory that the blocks of a thread use again.
struct Scratch<T> {
    patches: Vec<T>,
    lines: Vec<T>,
    output: Vec<T>,
    thin: Vec<T>,
}

impl<T> Default for Scratch<T> {
    fn default() -> Self {
        Self {
            patches: Vec::new(),
            lines: Vec::new(),
            output: Vec::new(),
            thin: Vec::new(),
        }
    }
}

/// Multiplications that are worth a second thread.
const PARALLEL: usize = 1 << 18;

/// Parts of the batch whose gradients of the weights are added up apart, and the most numbers that
/// all of them may hold.
const PARTS: usize = 16;
const HELD: usize = 1 << 22;

/// The first `len` numbers of a buffer, whatever they are.
fn room<T: Real>(buffer: &mut Vec<T>, len: usize) -> &mut [T] {
    if buffer.len() < len {
        buffer.resize(len, T::zero());
    }
    &mut buffer[..len]
}

/// dst = keep · dst + scale · lhs · rhs, on all threads where `alone` has them to itself.
///
/// # Safety
///
/// As [`product`].
unsafe fn multiply<T: Real>(
    alone: bool,
    (dst, row_stride): (*mut T, usize),
    (keep, scale): (T, T),
    lhs: Matrix<'_, T>,
    rhs: Matrix<'_, T>,
) {
    // SAFETY: the caller's word.
    unsafe {
        match alone {
            true => product(dst, row_stride, keep, scale, lhs, rhs),
            false => product_here(dst, row_stride, keep, scale, lhs, rhs),
        }
    }
}

impl<'a, T: Real> Pass<'a, T> {
    /// Without an adapter.
    pub fn plain(sizes: Sizes, x: &'a [T], w: &'a [T]) -> Self {
        Self {
            sizes,
            x,
            w,
            a: &[],
            b: &[],
            shares: &[],
        }
    }

    /// Outputs and inputs of a group, and the numbers of a patch of it.
    fn group(&self) -> (usize, usize) {
        let Sizes { out, groups, .. } = self.sizes;
        (out / groups, self.sizes.patch() / groups)
    }

    /// W of a group: (out / groups, patch / groups).
    fn w(&self, group: usize) -> Matrix<'a, T> {
        let (out, patch) = self.group();
        Matrix::new(&self.w[group * out * patch..], out, patch)
    }

    /// A of a share: (r, patch).
    fn a(&self, share: &Share) -> Matrix<'a, T> {
        let patch = self.sizes.patch();
        let from = &self.a[share.ranks.start * patch..];
        Matrix::new(from, share.ranks.len(), patch)
    }

    /// Where B of a share's group begins, with its outputs and ranks.
    fn b_at(&self, share: &Share, group: usize) -> (usize, usize, usize) {
        let Sizes { out, groups, .. } = self.sizes;
        let (outs, ranks) = (out / groups, share.ranks.len() / groups);
        let start = share.ranks.start / groups * out + group * outs * ranks;
        (start, outs, ranks)
    }

    /// B of a share's group: (out / groups, r / groups).
    fn b(&self, share: &Share, group: usize) -> Matrix<'a, T> {
        let (start, outs, ranks) = self.b_at(share, group);
        Matrix::new(&self.b[start..], outs, ranks)
    }

    /// The whole batch in order, each block of one share or of none.
    fn blocks(&self) -> Vec<Block<'a>> {
        let (each, mut blocks, mut done) = (self.sizes.images_each(), Vec::new(), 0);
        let mut cut = |images: Range<usize>, share| {
            for start in images.clone().step_by(each) {
                let images = start..images.end.min(start + each);
                blocks.push(Block { images, share });
            }
        };
        for share in self.shares {
            cut(done..share.rows.start, None);
            cut(share.rows.clone(), Some(share));
            done = share.rows.end;
        }
        cut(done..self.sizes.batch, None);
        blocks
    }

    /// How many of so many tasks a thread should take at least.
    fn least(&self, tasks: usize) -> usize {
        let Sizes { batch, out, .. } = self.sizes;
        let work = [batch, out, self.sizes.places(), self.group().1];
        let work = work.into_iter().fold(1, usize::saturating_mul);
        if work < PARALLEL { tasks.max(1) } else { 1 }
    }

    /// The patches of a strip; where they are the image itself, without a copy.
    fn patches<'b>(
        &self,
        strip: &Strip,
        room_for: &'b mut Vec<T>,
        lines: &mut Vec<T>,
    ) -> Matrix<'b, T>
    where
        'a: 'b,
    {
        let (patch, n) = (self.sizes.patch(), strip.columns(&self.sizes));
        if self.sizes.is_pointwise() && strip.images.len() == 1 {
            return self.part(self.x, patch, strip);
        }
        let patches = room(room_for, patch * n);
        unfold(&self.sizes, strip, self.x, lines, patches);
        Matrix::new(patches, patch, n)
    }

    /// The columns of a strip of one image, in an array (batch, channels, oh, ow).
    fn part<'b>(&self, from: &'b [T], channels: usize, strip: &Strip) -> Matrix<'b, T> {
        let (places, n) = (self.sizes.places(), strip.columns(&self.sizes));
        let start = self.part_start(channels, strip);
        Matrix::strided(&from[start..], channels, n, places, 1)
    }

    fn part_start(&self, channels: usize, strip: &Strip) -> usize {
        strip.images.start * channels * self.sizes.places()
            + strip.rows.start * self.sizes.output[1]
    }

    /// y, and A times the patches of each strip, for B's gradient.
    pub fn forward(&self, bias: Option<&[T]>) -> (Vec<T>, Vec<Vec<T>>) {
        let Sizes { batch, out, .. } = self.sizes;
        let len = batch * out * self.sizes.places();
        let blocks = self.blocks();
        let strips: Vec<(Strip, Option<&Share>)> = blocks
            .iter()
            .flat_map(|block| {
                self.sizes.strips().map(|rows| {
                    let images = block.images.clone();
                    (Strip { images, rows }, block.share)
                })
            })
            .collect();
        let mut y = Vec::with_capacity(len);
        let (to, alone) = (Parts(y.as_mut_ptr()), strips.len() == 1);
        let least = self.least(strips.len());
        let thin = strips
            .into_par_iter()
            .with_min_len(least)
            .map_init(Scratch::default, |scratch, (strip, share)| {
                let to: &Parts<T> = &to;
                // SAFETY: the strips are all of y, each a part of its own.
                unsafe { self.forward_strip(&strip, share, bias, to.0, scratch, alone) }
            })
            .collect();
        // SAFETY: each strip has been written.
        unsafe { y.set_len(len) };
        (y, thin)
    }

    /// Writes a strip of `y` and gives back A times its patches.
    ///
    /// # Safety
    ///
    /// `y` must be valid for writes of the whole output, the strip of it by nobody else.
    unsafe fn forward_strip(
        &self,
        strip: &Strip,
        share: Option<&Share>,
        bias: Option<&[T]>,
        y: *mut T,
        scratch: &mut Scratch<T>,
        alone: bool,
    ) -> Vec<T> {
        let (sizes, n) = (&self.sizes, strip.columns(&self.sizes));
        let single = strip.images.len() == 1;
        let patches = self.patches(strip, &mut scratch.patches, &mut scratch.lines);
        let (output, stride) = match single {
            // SAFETY: within y.
            true => (
                unsafe { y.add(self.part_start(sizes.out, strip)) },
                sizes.places(),
            ),
            false => (room(&mut scratch.output, sizes.out * n).as_mut_ptr(), n),
        };
        if let Some(bias) = bias {
            for (row, &bias) in bias.iter().enumerate() {
                for place in 0..n {
                    // SAFETY: a row of the strip.
                    unsafe { output.add(row * stride + place).write(bias) };
                }
            }
        }
        let keep = if bias.is_some() { T::one() } else { T::zero() };
        let (outs, patch) = self.group();
        for group in 0..sizes.groups {
            let part = patches.rows(group * patch, patch);
            // SAFETY: the rows of a group, which hold numbers where they are kept.
            unsafe {
                let dst = (output.add(group * outs * stride), stride);
                multiply(alone, dst, (keep, T::one()), self.w(group), part);
            }
        }
        let mut thin = Vec::new();
        if let Some(share) = share {
            let (r, s) = (share.ranks.len(), T::of(share.scaling));
            let h = room(&mut thin, r * n);
            // SAFETY: all of (r, n).
            unsafe {
                let dst = (h.as_mut_ptr(), n);
                multiply(alone, dst, (T::zero(), T::one()), self.a(share), patches);
            }
            let h = Matrix::new(h, r, n);
            for group in 0..sizes.groups {
                let b = self.b(share, group);
                // SAFETY: the rows of a group, all written above.
                unsafe {
                    let dst = (output.add(group * outs * stride), stride);
                    let h = h.rows(group * b.cols, b.cols);
                    multiply(alone, dst, (T::one(), s), b, h);
                }
            }
        }
        if !single {
            let output = &scratch.output[..sizes.out * n];
            strip.scatter(sizes, sizes.out, output, |at, run| {
                // SAFETY: a run of the strip.
                unsafe { std::ptr::copy_nonoverlapping(run.as_ptr(), y.add(at), run.len()) };
            });
        }
        thin
    }

    /// The gradient of x, empty where not wanted, and the others, from that of y and what
    /// [`forward`](Self::forward) kept.
    pub fn backward(&self, g: &[T], thin: &[Vec<T>], wanted: Wanted) -> (Vec<T>, Sums<T>) {
        let image = match wanted.x {
            true => self.sizes.inputs * self.sizes.pixels(),
            false => 0,
        };
        let mut dx = vec![T::zero(); self.sizes.batch * image];
        let (blocks, mut parts, mut rest) = (self.blocks(), Vec::new(), &mut dx[..]);
        // By what could be asked for, so that a gradient is the same whatever else is.
        let held = match self.shares.is_empty() {
            true => self.w.len() + self.sizes.out,
            false => self.a.len() + self.b.len(),
        };
        let count = blocks.len().min(PARTS).min((HELD / held.max(1)).max(1));
        for at in 0..count {
            let own = blocks.len() * at / count..blocks.len() * (at + 1) / count;
            let first = blocks[own.start].images.start;
            let images = blocks[own.end - 1].images.end - first;
            let (dx, after) = std::mem::take(&mut rest).split_at_mut(images * image);
            rest = after;
            parts.push(Part {
                blocks: own,
                first,
                dx,
            });
        }
        let (alone, least) = (count == 1, self.least(count));
        let strips: Vec<Range<usize>> = self.sizes.strips().collect();
        let sums = parts
            .into_par_iter()
            .with_min_len(least)
            .map_init(Scratch::default, |scratch, mut part| {
                let mut sums = self.zeros(wanted);
                for at in part.blocks.clone() {
                    for (row, rows) in strips.iter().enumerate() {
                        let (images, rows) = (blocks[at].images.clone(), rows.clone());
                        let backward = Backward {
                            pass: self,
                            strip: Strip { images, rows },
                            share: blocks[at].share,
                            g,
                            h: thin.get(at * strips.len() + row).map_or(&[], |h| &h[..]),
                            wanted,
                            alone,
                        };
                        backward.run(&mut part, &mut sums, scratch);
                    }
                }
                sums
            })
            .collect::<Vec<_>>();
        let sums = sums.into_iter().reduce(Sums::plus);
        (dx, sums.unwrap_or_else(|| self.zeros(wanted)))
    }

    fn zeros(&self, wanted: Wanted) -> Sums<T> {
        let zeros = |wanted: bool, len: usize| vec![T::zero(); if wanted { len } else { 0 }];
        Sums {
            w: zeros(wanted.w, self.w.len()),
            bias: zeros(wanted.bias, self.sizes.out),
            a: zeros(wanted.a, self.a.len()),
            b: zeros(wanted.b, self.b.len()),
        }
    }
}

/// The backward pass of one strip.
struct Backward<'p, 'a, T> {
    pass: &'p Pass<'a, T>,
    strip: Strip,
    share: Option<&'p Share>,
    g: &'p [T],
    /// A times the patches.
    h: &'p [T],
    wanted: Wanted,
    alone: bool,
}

impl<T: Real> Backward<'_, '_, T> {
    fn run(&self, part: &mut Part<'_, T>, sums: &mut Sums<T>, scratch: &mut Scratch<T>) {
        let (pass, strip, wanted) = (self.pass, &self.strip, self.wanted);
        let (sizes, n) = (&pass.sizes, strip.columns(&pass.sizes));
        let Scratch {
            patches: unfolded,
            lines,
            output,
            thin,
        } = scratch;
        let g = if strip.images.len() == 1 {
            pass.part(self.g, sizes.out, strip)
        } else {
            let output = room(output, sizes.out * n);
            strip.gather(sizes, sizes.out, self.g, output);
            Matrix::new(output, sizes.out, n)
        };
        let gb = match self.share {
            Some(share) if wanted.x || wanted.a => Some((
                share,
                self.through_b(share, g, room(thin, share.ranks.len() * n)),
            )),
            _ => None,
        };
        if wanted.bias {
            for (row, sum) in sums.bias.iter_mut().enumerate() {
                let row = &g.numbers[row * g.row_stride..][..n];
                *sum += vectorised!(|| crate::ops::cpu::sums([row], |[g]| (g, T::zero()))).0;
            }
        }
        if let (Some(share), true) = (self.share, wanted.b) {
            self.to_b(share, g, &mut sums.b);
        }
        if wanted.w || wanted.a && self.share.is_some() {
            let patches = pass.patches(strip, unfolded, lines);
            if wanted.w {
                self.to_w(g, patches, &mut sums.w);
            }
            if let (Some((share, gb)), true) = (gb, wanted.a) {
                let patch = sizes.patch();
                let da = &mut sums.a[share.ranks.start * patch..];
                // SAFETY: adds to r rows of (Σr, patch).
                unsafe {
                    let dst = (da.as_mut_ptr(), patch);
                    multiply(self.alone, dst, (T::one(), T::one()), gb, patches.t());
                }
            }
        }
        if !wanted.x {
            return;
        }
        if sizes.is_pointwise() && strip.images.len() == 1 {
            let start =
                pass.part_start(sizes.inputs, strip) - part.first * sizes.inputs * sizes.places();
            self.to_patches(g, gb, &mut part.dx[start..], sizes.places());
        } else {
            let patches = room(unfolded, sizes.patch() * n);
            self.to_patches(g, gb, patches, n);
            fold(sizes, strip, patches, lines, part.first, part.dx);
        }
    }

    /// s · Bᵀ g: (r, columns).
    fn through_b<'b>(&self, share: &Share, g: Matrix<'_, T>, gb: &'b mut [T]) -> Matrix<'b, T> {
        let s = T::of(share.scaling);
        for group in 0..self.pass.sizes.groups {
            let b = self.pass.b(share, group);
            let dst = (gb[group * b.cols * g.cols..].as_mut_ptr(), g.cols);
            // SAFETY: the rows of a group of all (r, columns).
            unsafe {
                let g = g.rows(group * b.rows, b.rows);
                multiply(self.alone, dst, (T::zero(), s), b.t(), g);
            }
        }
        Matrix::new(gb, share.ranks.len(), g.cols)
    }

    /// Adds s · g hᵀ.
    fn to_b(&self, share: &Share, g: Matrix<'_, T>, db: &mut [T]) {
        let h = Matrix::new(self.h, share.ranks.len(), g.cols);
        for group in 0..self.pass.sizes.groups {
            let (start, outs, ranks) = self.pass.b_at(share, group);
            let dst = (db[start..].as_mut_ptr(), ranks);
            // SAFETY: adds to B of a group, (outs, ranks).
            unsafe {
                let (g, h) = (g.rows(group * outs, outs), h.rows(group * ranks, ranks));
                multiply(self.alone, dst, (T::one(), T::of(share.scaling)), g, h.t());
            }
        }
    }

    /// Adds g · patchesᵀ.
    fn to_w(&self, g: Matrix<'_, T>, patches: Matrix<'_, T>, dw: &mut [T]) {
        let (outs, patch) = self.pass.group();
        for group in 0..self.pass.sizes.groups {
            let dst = (dw[group * outs * patch..].as_mut_ptr(), patch);
            // SAFETY: adds to W of a group, (outs, patch).
            unsafe {
                let g = g.rows(group * outs, outs);
                let patches = patches.rows(group * patch, patch);
                multiply(self.alone, dst, (T::one(), T::one()), g, patches.t());
            }
        }
    }

    /// Wᵀ g + Aᵀ (s Bᵀ g), for every row of the patches.
    fn to_patches(
        &self,
        g: Matrix<'_, T>,
        gb: Option<(&Share, Matrix<'_, T>)>,
        patches: &mut [T],
        stride: usize,
    ) {
        let (outs, patch) = self.pass.group();
        for group in 0..self.pass.sizes.groups {
            let dst = (patches[group * patch * stride..].as_mut_ptr(), stride);
            // SAFETY: the rows of a group, of the columns of g.
            unsafe {
                let (w, g) = (self.pass.w(group), g.rows(group * outs, outs));
                multiply(self.alone, dst, (T::zero(), T::one()), w.t(), g);
            }
        }
        if let Some((share, gb)) = gb {
            let dst = (patches.as_mut_ptr(), stride);
            // SAFETY: adds to all that was written above.
            unsafe {
                multiply(
                    self.alone,
                    dst,
                    (T::one(), T::one()),
                    self.pass.a(share).t(),
                    gb,
                );
            }
        }
    }
}
