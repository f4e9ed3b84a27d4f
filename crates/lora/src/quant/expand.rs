//! Codes back to numbers, any stretch of them.

use super::codes::dynamic;

/// The memory of a quantised weight on the CPU.
pub(crate) struct View<'a> {
    /// Two codes a byte, the first in the high half.
    pub codes: &'a [u8],
    /// What the two codes of a byte stand for.
    pub pairs: &'static [[f32; 2]; 256],
    pub block_size: usize,
    pub absmax: Absmax<'a>,
}

/// The largest magnitude of each block.
pub(crate) enum Absmax<'a> {
    Plain(&'a [f32]),
    /// offset + value of the code · the magnitude of its own block.
    Double {
        codes: &'a [u8],
        absmax: &'a [f32],
        block_size: usize,
        offset: f32,
    },
}

impl Absmax<'_> {
    fn of(&self, block: usize) -> f32 {
        match self {
            Self::Plain(absmax) => absmax[block],
            Self::Double {
                codes,
                absmax,
                block_size,
                offset,
            } => dynamic()[usize::from(codes[block])] * absmax[block / block_size] + offset,
        }
    }
}

impl View<'_> {
    /// Writes the numbers from place `start` on.
    pub fn expand<T: From<f32> + Copy>(&self, start: usize, mut out: &mut [T]) {
        let mut at = start;
        while !out.is_empty() {
            let block = at / self.block_size;
            let left = (block + 1) * self.block_size - at;
            let (now, rest) = out.split_at_mut(left.min(out.len()));
            self.within(at, now, self.absmax.of(block));
            at += now.len();
            out = rest;
        }
    }

    /// Numbers of one block.
    fn within<T: From<f32> + Copy>(&self, at: usize, out: &mut [T], absmax: f32) {
        let number = |value: f32| T::from(value * absmax);
        let byte = |at: usize| self.pairs[usize::from(self.codes[at])];
        // An odd place is the low half of a byte.
        let (first, out) = out.split_at_mut(at % 2);
        for last in first {
            *last = number(byte(at / 2)[1]);
        }
        let (pairs, last) = out.as_chunks_mut::<2>();
        let from = at.div_ceil(2);
        for (pair, code) in pairs.iter_mut().zip(&self.codes[from..]) {
            *pair = self.pairs[usize::from(*code)].map(number);
        }
        if let [first] = last {
            *first = number(byte(from + pairs.len())[0]);
        }
    }
}
