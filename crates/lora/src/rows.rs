//! A batch in which each row names its adapter.

use std::cell::RefCell;
use std::sync::Arc;

use candle_core::Tensor;

use crate::adapter::Adapter;
use crate::base::sealed;
use crate::layer::State;
use crate::ops::Share;
use crate::{Error, Result};

/// The name that stands for no adapter in a mixed batch, as in PEFT.
///
/// ```
/// assert_eq!(lora::BASE_ROW, "__base__");
/// ```
pub const BASE: &str = "__base__";

thread_local! {
    static CURRENT: RefCell<Option<Arc<[String]>>> = const { RefCell::new(None) };
}

/// The names that hold for the forward passes of this thread.
pub(crate) fn current() -> Option<Arc<[String]>> {
    CURRENT.with_borrow(Clone::clone)
}

/// Runs `pass` with one adapter name for each row of the batch.
pub(crate) fn with<T>(rows: Arc<[String]>, pass: impl FnOnce() -> T) -> T {
    /// Puts back what was there, after a panic too.
    struct Restore(Option<Arc<[String]>>);
    impl Drop for Restore {
        fn drop(&mut self) {
            CURRENT.set(self.0.take());
        }
    }
    let _restore = Restore(CURRENT.replace(Some(rows)));
    pass()
}

impl<B: sealed::Base> State<B> {
    /// One pass over a batch whose rows name their adapters.
    ///
    /// A layer without one of the named adapters answers as its base for those rows.
    pub(crate) fn forward_rows(
        &self,
        layer: &str,
        x: &Tensor,
        rows: &[String],
        train: bool,
    ) -> Result<Tensor> {
        // Of one dimension a linear layer's input has no rows.
        let least = if self.base.is_embedding() { 1 } else { 2 };
        if x.rank() < least || x.dims()[0] != rows.len() {
            return Err(Error::Rows {
                layer: layer.to_string(),
                rows: rows.len(),
                input: x.dims().to_vec(),
            });
        }
        if rows.is_empty() {
            return self.base.whole(x);
        }
        let mut groups: Vec<(&str, Vec<u32>)> = Vec::new();
        for (row, name) in rows.iter().enumerate() {
            let known = self.adapters.iter().any(|(adapter, _)| adapter == name);
            let name = if known { name.as_str() } else { BASE };
            match groups.iter_mut().find(|(group, _)| *group == name) {
                Some((_, members)) => members.push(row as u32),
                None => groups.push((name, vec![row as u32])),
            }
        }
        if let Some(y) = self.as_one(x, rows, &groups, train)? {
            return Ok(y);
        }
        let chosen = |name: &str| -> Result<Vec<&Adapter>> {
            match name {
                BASE => Ok(vec![]),
                name => Ok(vec![self.adapter(layer, name)?]),
            }
        };
        // One product with the base weight for all rows, where all rows have the same one.
        let shared = match groups.iter().any(|(n, _)| chosen(n).is_ok_and(replaces)) {
            true => None,
            false => Some(self.base.whole(x)?),
        };
        let x = x.contiguous()?;
        let mut place = vec![0u32; rows.len()];
        let (mut outputs, mut done) = (Vec::new(), 0u32);
        for (name, members) in &groups {
            let index = Tensor::from_slice(members, members.len(), x.device())?;
            let x = x.index_select(&index, 0)?;
            let flat = self.base.flat(&x)?;
            let y = shared
                .as_ref()
                .map(|y| y.index_select(&index, 0))
                .transpose()?;
            let y = y.map(|y| self.base.flat_output(&y)).transpose()?;
            let y = self.adapted(&chosen(name)?, &flat, y, train)?;
            outputs.push(self.base.unflat(y, &x)?);
            for member in members {
                place[*member as usize] = done;
                done += 1;
            }
        }
        let place = Tensor::from_vec(place, rows.len(), x.device())?;
        Ok(Tensor::cat(&outputs, 0)?.index_select(&place, 0)?)
    }

    /// The pass as one operation, where every adapter is a pair and nothing else.
    fn as_one(
        &self,
        x: &Tensor,
        rows: &[String],
        groups: &[(&str, Vec<u32>)],
        train: bool,
    ) -> Result<Option<Tensor>> {
        // The pairs of the batch, and what each name has of them.
        let (mut pairs, mut places, mut ranks) = (Vec::new(), Vec::new(), 0);
        for (name, _) in groups.iter().filter(|(name, _)| *name != BASE) {
            let adapter = self.adapters.iter().find(|(known, _)| known == name);
            let Some((name, adapter)) = adapter else {
                return Ok(None);
            };
            let Some((a, b)) = adapter.bare_pair(train) else {
                return Ok(None);
            };
            pairs.push((a, b));
            places.push((name, ranks..ranks + adapter.r(), adapter.scaling()));
            ranks += adapter.r();
        }
        if pairs.is_empty() {
            return self.base.whole(x).map(Some);
        }
        let each = x.elem_count() / self.base.inputs() / rows.len();
        let mut shares: Vec<Share> = Vec::new();
        for (row, name) in rows.iter().enumerate() {
            let Some((_, ranks, scaling)) = places.iter().find(|(known, ..)| *known == name) else {
                continue;
            };
            match shares.last_mut() {
                Some(last) if last.ranks == *ranks && last.rows.end == row * each => {
                    last.rows.end += each;
                }
                _ => shares.push(Share {
                    rows: row * each..(row + 1) * each,
                    ranks: ranks.clone(),
                    scaling: *scaling,
                }),
            }
        }
        self.base.with_shares(x, &pairs, shares)
    }
}

/// Whether one of them brings a weight or bias for the base.
fn replaces(adapters: Vec<&Adapter>) -> bool {
    adapters
        .iter()
        .any(|a| a.saved_weight.is_some() || a.base_bias.is_some())
}
