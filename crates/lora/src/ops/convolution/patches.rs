//! The sizes of a convolution, and its patches as the columns of a matrix and back.

use std::ops::Range;

use super::How;
use crate::ops::cpu::{Real, vectorised};

/// Numbers of a matrix of patches that stay in the second cache beside what they meet.
const CACHED: usize = 1 << 17;

/// Columns of a product: below the least gemm runs slower, above the most no faster.
const LEAST: usize = 64;
const MOST: usize = 1024;

/// Parts of a batch that threads share, where it has as many images.
const PARTS: usize = 8;

/// The sizes of one call. A convolution over a line has one of height 1.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub batch: usize,
    pub inputs: usize,
    pub out: usize,
    pub groups: usize,
    pub input: [usize; 2],
    pub kernel: [usize; 2],
    pub output: [usize; 2],
    padding: [usize; 2],
    stride: usize,
    dilation: usize,
}

impl Sizes {
    /// Nothing where the tensors do not fit each other.
    pub fn of(x: &[usize], w: &[usize], how: How) -> Option<Self> {
        let (&[batch, inputs, ref input @ ..], &[out, of_group, ref kernel @ ..]) = (x, w) else {
            return None;
        };
        let flat = |sizes: &[usize]| match *sizes {
            [width] => Some([1, width]),
            [height, width] => Some([height, width]),
            _ => None,
        };
        let (input_size, kernel_size) = (flat(input)?, flat(kernel)?);
        let fits = input.len() == kernel.len()
            && how.stride > 0
            && how.dilation > 0
            && how.groups > 0
            && out.is_multiple_of(how.groups)
            && of_group.checked_mul(how.groups) == Some(inputs)
            && w.iter().chain(&x[1..]).all(|size| *size > 0);
        if !fits {
            return None;
        }
        let padding = match input.len() {
            1 => [0, how.padding],
            _ => [how.padding; 2],
        };
        let mut output = [0; 2];
        for axis in 0..2 {
            let padded = padding[axis]
                .checked_mul(2)?
                .checked_add(input_size[axis])?;
            let reach = (kernel_size[axis] - 1).checked_mul(how.dilation)?;
            output[axis] = padded.checked_sub(reach.checked_add(1)?)? / how.stride + 1;
        }
        let [height, width] = output;
        height
            .checked_mul(width)?
            .checked_mul(batch)?
            .checked_mul(out)?;
        Some(Self {
            batch,
            inputs,
            out,
            groups: how.groups,
            input: input_size,
            kernel: kernel_size,
            output,
            padding,
            stride: how.stride,
            dilation: how.dilation,
        })
    }

    /// Numbers of a channel of the input.
    pub fn pixels(&self) -> usize {
        self.input[0] * self.input[1]
    }

    /// Numbers of a channel of the output.
    pub fn places(&self) -> usize {
        self.output[0] * self.output[1]
    }

    /// Numbers of a patch of all inputs: in · kh · kw.
    pub fn patch(&self) -> usize {
        self.inputs * self.kernel[0] * self.kernel[1]
    }

    /// The output's shape for an input of `rank` dimensions.
    pub fn output_shape(&self, rank: usize) -> Vec<usize> {
        let [height, width] = self.output;
        match rank {
            3 => vec![self.batch, self.out, width],
            _ => vec![self.batch, self.out, height, width],
        }
    }

    /// Zeros on each side of rows and of columns.
    pub fn padding(&self) -> [usize; 2] {
        self.padding
    }

    /// Which number of a padded channel each place of its part of a patch sees: (kh · kw, oh · ow).
    pub fn seen(&self) -> Vec<u32> {
        let ([kh, kw], [height, width]) = (self.kernel, self.output);
        let padded = self.input[1] + 2 * self.padding[1];
        let pairs = |a: usize, b: usize| (0..a).flat_map(move |i| (0..b).map(move |j| (i, j)));
        let (stride, dilation) = (self.stride, self.dilation);
        let seen = pairs(kh, kw).flat_map(|(ky, kx)| {
            pairs(height, width).map(move |(y, x)| {
                let row = y * stride + ky * dilation;
                (row * padded + x * stride + kx * dilation) as u32
            })
        });
        seen.collect()
    }

    /// Whether the image is its own matrix of patches.
    pub fn is_pointwise(&self) -> bool {
        self.kernel == [1, 1] && self.stride == 1 && self.padding == [0, 0]
    }

    fn columns(&self) -> usize {
        (CACHED / self.patch()).clamp(LEAST, MOST)
    }

    /// How many images go into one product.
    pub fn images_each(&self) -> usize {
        let share = self.batch.div_ceil(PARTS).max(1);
        (self.columns() / self.places()).clamp(1, share)
    }

    /// The rows of the output that go into one product.
    pub fn strips(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let height = self.output[0];
        let most = (self.columns() / self.output[1]).clamp(1, height);
        let count = match self.images_each() {
            1 => height.div_ceil(most),
            _ => 1,
        };
        (0..count).map(move |at| height * at / count..height * (at + 1) / count)
    }

    /// The columns of the output that see the input through column `kx` of the kernel, and the
    /// column of the input that the first of them sees.
    fn span(&self, kx: usize) -> (Range<usize>, usize) {
        let (offset, padding) = (kx * self.dilation, self.padding[1]);
        let end = (self.input[1] + padding).saturating_sub(offset);
        let end = end.div_ceil(self.stride).min(self.output[1]);
        let start = padding.saturating_sub(offset).div_ceil(self.stride);
        let start = start.min(end);
        let from = (start * self.stride + offset).saturating_sub(padding);
        (start..end, from)
    }

    /// The row of the input at row `y` of the padded one.
    fn input_row(&self, y: usize) -> Option<usize> {
        y.checked_sub(self.padding[0])
            .filter(|y| *y < self.input[0])
    }

    /// Whether neighbouring rows of the output see the same rows of the input, so that these are
    /// put in place once for all rows of the kernel.
    fn rows_overlap(&self) -> bool {
        self.stride == 1 && self.dilation == 1 && self.kernel[0] > 1
    }
}

/// What one product computes: some rows of the output of some images.
///
/// The columns of its matrices go by row, then by image, then by place in the row.
#[derive(Clone, Debug)]
pub(super) struct Strip {
    pub images: Range<usize>,
    pub rows: Range<usize>,
}

impl Strip {
    pub fn columns(&self, sizes: &Sizes) -> usize {
        self.rows.len() * self.images.len() * sizes.output[1]
    }

    /// Where the numbers of output row `row` of a channel lie in an array (batch, channels, oh,
    /// ow), with their place among the columns.
    fn runs(
        &self,
        sizes: &Sizes,
        channels: usize,
    ) -> impl Iterator<Item = (usize, Range<usize>, Range<usize>)> + use<> {
        let (width, places) = (sizes.output[1], sizes.places());
        let (strip, n) = (self.clone(), self.columns(sizes));
        (0..channels).flat_map(move |channel| {
            let strip = strip.clone();
            strip.rows.clone().flat_map(move |row| {
                let (images, first) = (strip.images.clone(), strip.rows.start);
                let (count, start) = (images.len(), images.start);
                images.map(move |image| {
                    let there = (image * channels + channel) * places + row * width;
                    let here = channel * n + ((row - first) * count + image - start) * width;
                    (image, there..there + width, here..here + width)
                })
            })
        })
    }

    /// A matrix (channels, columns) of an array (batch, channels, oh, ow).
    pub fn gather<T: Real>(&self, sizes: &Sizes, channels: usize, from: &[T], to: &mut [T]) {
        for (_, there, here) in self.runs(sizes, channels) {
            to[here].copy_from_slice(&from[there]);
        }
    }

    /// The runs of a matrix (channels, columns) and where each belongs.
    pub fn scatter<T: Real>(
        &self,
        sizes: &Sizes,
        channels: usize,
        from: &[T],
        mut put: impl FnMut(usize, &[T]),
    ) {
        for (_, there, here) in self.runs(sizes, channels) {
            put(there.start, &from[here]);
        }
    }
}

/// The patches of a strip as a matrix (in · kh · kw, columns).
pub(super) fn unfold<T: Real>(
    sizes: &Sizes,
    strip: &Strip,
    x: &[T],
    lines: &mut Vec<T>,
    patches: &mut [T],
) {
    let (width, pixels) = (sizes.output[1], sizes.pixels());
    let ([kh, kw], [_, input]) = (sizes.kernel, sizes.input);
    let (wide, n) = (strip.images.len() * width, strip.columns(sizes));
    // One row of the output of all images, from row `y` of the padded input.
    let seen = |line: &mut [T], channel: usize, (span, from): &(Range<usize>, usize), y: usize| {
        let Some(y) = sizes.input_row(y) else {
            return line.fill(T::zero());
        };
        for (image, row) in strip.images.clone().zip(line.chunks_exact_mut(width)) {
            let at = (image * sizes.inputs + channel) * pixels + y * input + from;
            row[..span.start].fill(T::zero());
            row[span.end..].fill(T::zero());
            let row = &mut row[span.clone()];
            if row.is_empty() {
                continue;
            }
            if sizes.stride == 1 {
                row.copy_from_slice(&x[at..at + row.len()]);
            } else {
                for (place, x) in row.iter_mut().zip(x[at..].iter().step_by(sizes.stride)) {
                    *place = *x;
                }
            }
        }
    };
    let tall = strip.rows.len() + kh - 1;
    if sizes.rows_overlap() {
        lines.resize(tall * wide, T::zero());
    }
    for channel in 0..sizes.inputs {
        for kx in 0..kw {
            let span = sizes.span(kx);
            let row = |ky: usize| ((channel * kh + ky) * kw + kx) * n;
            if sizes.rows_overlap() {
                for (at, line) in lines.chunks_exact_mut(wide).enumerate() {
                    seen(line, channel, &span, strip.rows.start + at);
                }
                for ky in 0..kh {
                    patches[row(ky)..][..n].copy_from_slice(&lines[ky * wide..][..n]);
                }
                continue;
            }
            for ky in 0..kh {
                let lines = patches[row(ky)..][..n].chunks_exact_mut(wide);
                for (y, line) in strip.rows.clone().zip(lines) {
                    seen(line, channel, &span, y * sizes.stride + ky * sizes.dilation);
                }
            }
        }
    }
}

/// Adds the gradient of a strip's patches to that of the images; `dx` begins with image `first`.
pub(super) fn fold<T: Real>(
    sizes: &Sizes,
    strip: &Strip,
    patches: &[T],
    lines: &mut Vec<T>,
    first: usize,
    dx: &mut [T],
) {
    vectorised!(|| fold_here(sizes, strip, patches, lines, first, dx));
}

#[inline(always)]
fn fold_here<T: Real>(
    sizes: &Sizes,
    strip: &Strip,
    patches: &[T],
    lines: &mut Vec<T>,
    first: usize,
    dx: &mut [T],
) {
    let (width, pixels) = (sizes.output[1], sizes.pixels());
    let ([kh, kw], [_, input]) = (sizes.kernel, sizes.input);
    let (wide, n) = (strip.images.len() * width, strip.columns(sizes));
    let mut seen = |line: &[T], channel: usize, (span, from): &(Range<usize>, usize), y: usize| {
        let Some(y) = sizes.input_row(y) else {
            return;
        };
        for (image, row) in strip.images.clone().zip(line.chunks_exact(width)) {
            let at = ((image - first) * sizes.inputs + channel) * pixels + y * input + from;
            let row = &row[span.clone()];
            if row.is_empty() {
                continue;
            }
            if sizes.stride == 1 {
                for (dx, g) in dx[at..at + row.len()].iter_mut().zip(row) {
                    *dx += *g;
                }
            } else {
                for (dx, g) in dx[at..].iter_mut().step_by(sizes.stride).zip(row) {
                    *dx += *g;
                }
            }
        }
    };
    let tall = strip.rows.len() + kh - 1;
    for channel in 0..sizes.inputs {
        for kx in 0..kw {
            let span = sizes.span(kx);
            let row = |ky: usize| &patches[((channel * kh + ky) * kw + kx) * n..][..n];
            if sizes.rows_overlap() {
                lines.clear();
                lines.resize(tall * wide, T::zero());
                for ky in 0..kh {
                    for (line, g) in lines[ky * wide..].iter_mut().zip(row(ky)) {
                        *line += *g;
                    }
                }
                for (at, line) in lines.chunks_exact(wide).enumerate() {
                    seen(line, channel, &span, strip.rows.start + at);
                }
                continue;
            }
            for ky in 0..kh {
                for (y, line) in strip.rows.clone().zip(row(ky).chunks_exact(wide)) {
                    seen(line, channel, &span, y * sizes.stride + ky * sizes.dilation);
                }
            }
        }
    }
}
