//! Endless, seeded batches of images and of text.

use super::{Images, refused};
use crate::rng::{Rng, rng};
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use std::sync::Arc;

/// A stream of token ids, for language models. A clone shares the ids.
///
/// A window of `length` ids that begins at s teaches `length` predictions: its ids are
/// s … s + length − 1, and the next of each is s + 1 … s + length.
///
/// ```
/// # fn main() -> Result<(), course::Error> {
/// use course::{candle_core::Device, data::Tokens};
/// let tokens = Tokens::new("To be, or not to be".bytes().map(u32::from).collect());
/// for batch in tokens.batches(2, 4, 1, &Device::Cpu).take(10) {
///     let (ids, next) = batch?;
///     assert_eq!(ids.dims(), [2, 4]);
///     let (ids, next) = (ids.to_vec2::<u32>()?, next.to_vec2::<u32>()?);
///     assert_eq!(ids[0][1..], next[0][..3]);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Tokens {
    ids: Arc<[u32]>,
}

impl Tokens {
    /// A stream of these ids.
    pub fn new(ids: Vec<u32>) -> Self {
        Self { ids: ids.into() }
    }

    /// How many ids these are.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Endless batches in random order: the same `seed`, the same batches.
    ///
    /// In each epoch the stream is cut into windows that begin at multiples of `length`, plus an
    /// offset that is drawn anew for the epoch, and each window comes once. A batch that an
    /// epoch's last windows do not fill goes on with the next epoch's.
    ///
    /// # Shapes
    /// Each item is (ids, next), both (batch, length), u32.
    ///
    /// # Errors
    /// The first item, and the only one, is [`Error::Data`] when `batch` or `length` is 0, or when
    /// the stream is shorter than `length` + 1.
    pub fn batches(&self, batch: usize, length: usize, seed: u64, device: &Device) -> TokenBatches {
        let checked = self.check(batch, length).map(|()| Windows {
            tokens: self.clone(),
            batch,
            length,
            order: Shuffled::new(seed),
            device: device.clone(),
        });
        TokenBatches(checked.map_err(Some))
    }

    /// Every full window once, in order, for evaluation: they begin at the multiples of `length`.
    /// Fewer than `length` predictions at the end of the stream are left out.
    ///
    /// # Shapes
    /// Each item is (ids, next), both (batch, length), u32; the last may have fewer rows.
    ///
    /// # Errors
    /// [`Error::Data`] when `batch` or `length` is 0, or when the stream is shorter than
    /// `length` + 1.
    ///
    /// ```
    /// # fn main() -> Result<(), course::Error> {
    /// use course::{candle_core::Device, data::Tokens};
    /// let windows = Tokens::new((0..12).collect()).windows(2, 3, &Device::Cpu)?;
    /// assert_eq!(windows.len(), 2);
    /// assert_eq!(windows[0].0.to_vec2::<u32>()?, [[0, 1, 2], [3, 4, 5]]);
    /// assert_eq!(windows[1].1.to_vec2::<u32>()?, [[7, 8, 9]]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn windows(
        &self,
        batch: usize,
        length: usize,
        device: &Device,
    ) -> Result<Vec<(Tensor, Tensor)>> {
        self.check(batch, length)?;
        let starts = self.starts(0, length);
        starts
            .chunks(batch)
            .map(|starts| self.at(starts, length, device))
            .collect()
    }

    fn check(&self, batch: usize, length: usize) -> Result<()> {
        if batch == 0 || length == 0 {
            let problem = format!("batch is {batch} and length is {length}; make both at least 1");
            return Err(refused("tokens", problem));
        }
        if self.len() <= length {
            let problem = format!(
                "the stream has {} ids, and a window of length {length} with the id after it needs \
                 {}; take a shorter length or more text",
                self.len(),
                length.saturating_add(1)
            );
            return Err(refused("tokens", problem));
        }
        Ok(())
    }

    /// Where the full windows begin.
    fn starts(&self, offset: usize, length: usize) -> Vec<usize> {
        let windows = (self.len() - 1 - offset) / length;
        (0..windows).map(|k| offset + k * length).collect()
    }

    /// The windows that begin at `starts`, and the same one id later.
    fn at(&self, starts: &[usize], length: usize, device: &Device) -> Result<(Tensor, Tensor)> {
        let cut = |shift: usize| {
            let ids: Vec<u32> = starts
                .iter()
                .flat_map(|s| &self.ids[s + shift..s + shift + length])
                .copied()
                .collect();
            Tensor::from_vec(ids, (starts.len(), length), device)
        };
        Ok((cut(0)?, cut(1)?))
    }
}

/// The endless batches of [`Tokens::batches`].
#[derive(Debug)]
pub struct TokenBatches(Checked<Windows>);

#[derive(Debug)]
struct Windows {
    tokens: Tokens,
    batch: usize,
    length: usize,
    order: Shuffled,
    device: Device,
}

impl Iterator for TokenBatches {
    type Item = Result<(Tensor, Tensor)>;

    fn next(&mut self) -> Option<Self::Item> {
        next_of(&mut self.0, Windows::next)
    }
}

impl Windows {
    fn next(&mut self) -> Result<(Tensor, Tensor)> {
        let (tokens, length) = (&self.tokens, self.length);
        let starts = self.order.next(self.batch, |rng| {
            // At least one window must fit behind the offset.
            let offset = rng.below(length.min(tokens.len() - length))?;
            let starts = tokens.starts(offset, length);
            let order = rng.permutation(starts.len());
            Ok(order.into_iter().map(|place| starts[place]).collect())
        })?;
        tokens.at(&starts, length, &self.device)
    }
}

impl Images {
    /// Endless batches in random order: the same `seed`, the same batches.
    ///
    /// In each epoch every image comes once, in an order of its own. Every batch is full: one that
    /// an epoch's last images do not fill goes on with the next epoch's.
    ///
    /// # Errors
    /// The first item, and the only one, is [`Error::Data`] when `batch` is 0 or larger than the
    /// set.
    ///
    /// ```
    /// # fn main() -> Result<(), course::Error> {
    /// let fashion = course::data::fashion(&course::candle_core::Device::Cpu)?;
    /// for batch in fashion.test.batches(64, 1).take(3) {
    ///     assert_eq!(batch?.images.dims(), [64, 1, 28, 28]);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn batches(&self, batch: usize, seed: u64) -> ImageBatches {
        if batch == 0 || batch > self.len() {
            let problem = format!(
                "batch is {batch}, and there are {}; take a batch from 1 to that",
                self.len()
            );
            return ImageBatches(Err(Some(refused("images", problem))));
        }
        ImageBatches(Ok(Picks {
            images: self.clone(),
            batch,
            order: Shuffled::new(seed),
        }))
    }
}

/// The endless batches of [`Images::batches`].
#[derive(Debug)]
pub struct ImageBatches(Checked<Picks>);

#[derive(Debug)]
struct Picks {
    images: Images,
    batch: usize,
    order: Shuffled,
}

impl Iterator for ImageBatches {
    type Item = Result<Images>;

    fn next(&mut self) -> Option<Self::Item> {
        next_of(&mut self.0, Picks::next)
    }
}

impl Picks {
    fn next(&mut self) -> Result<Images> {
        let n = self.images.len();
        let places = self.order.next(self.batch, |rng| Ok(rng.permutation(n)))?;
        self.images.at(&places)
    }
}

/// Batches, or the error that comes in their place, once.
pub(super) type Checked<T> = Result<T, Option<Error>>;

/// The next batch, or the error, or nothing more.
pub(super) fn next_of<T, B>(
    batches: &mut Checked<T>,
    next: impl FnOnce(&mut T) -> Result<B>,
) -> Option<Result<B>> {
    match batches {
        Ok(batches) => Some(next(batches)),
        Err(refusal) => refusal.take().map(Err),
    }
}

/// Places in random order, epoch after epoch.
#[derive(Debug)]
pub(super) struct Shuffled {
    rng: Rng,
    /// What is left of the epoch, the next one last.
    left: Vec<usize>,
}

impl Shuffled {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            rng: rng(seed),
            left: Vec::new(),
        }
    }

    /// The next `count` places. `epoch` draws those of a whole epoch, at least one, in the order
    /// in which they come.
    pub(super) fn next(
        &mut self,
        count: usize,
        epoch: impl Fn(&mut Rng) -> Result<Vec<usize>>,
    ) -> Result<Vec<usize>> {
        let mut places = Vec::with_capacity(count);
        while places.len() < count {
            match self.left.pop() {
                Some(place) => places.push(place),
                None => {
                    self.left = epoch(&mut self.rng)?;
                    self.left.reverse();
                }
            }
        }
        Ok(places)
    }
}

/// So many batches of an epoch are sorted by length together.
const SORTED_TOGETHER: usize = 8;

/// The `count` places of one epoch in random order, those of similar length together.
///
/// Source: transformers' `group_by_length`.
pub(super) fn by_similar_length(
    count: usize,
    batch: usize,
    length: impl Fn(usize) -> usize,
    rng: &mut Rng,
) -> Vec<usize> {
    let mut order = rng.permutation(count);
    let mut grouped = Vec::with_capacity(order.len());
    for part in order.chunks_mut(batch * SORTED_TOGETHER) {
        part.sort_by_key(|&place| length(place));
        let batches: Vec<&[usize]> = part.chunks(batch).collect();
        // What does not fill a batch stays at the end.
        let full = part.len() / batch;
        let mut places = rng.permutation(full);
        places.extend(full..batches.len());
        grouped.extend(places.into_iter().flat_map(|place| batches[place]));
    }
    grouped
}

#[cfg(test)]
mod tests {
    use super::*;

    const CPU: Device = Device::Cpu;

    fn count_up(n: u32) -> Tokens {
        Tokens::new((0..n).collect())
    }

    /// The first id of each window of some batches.
    fn firsts(batches: TokenBatches, count: usize) -> Result<Vec<u32>> {
        let mut firsts = Vec::new();
        for batch in batches.take(count) {
            let ids = batch?.0.to_vec2::<u32>()?;
            firsts.extend(ids.iter().map(|window| window[0]));
        }
        Ok(firsts)
    }

    /// These numbers may never change: every language model's losses hang on them.
    #[test]
    fn golden_windows() -> Result<()> {
        let mut batches = count_up(100).batches(3, 4, 42, &CPU);
        let (ids, next) = batches.next().unwrap()?;
        let want = [[48, 49, 50, 51], [64, 65, 66, 67], [76, 77, 78, 79]];
        assert_eq!(ids.to_vec2::<u32>()?, want);
        let want = [[49, 50, 51, 52], [65, 66, 67, 68], [77, 78, 79, 80]];
        assert_eq!(next.to_vec2::<u32>()?, want);
        Ok(())
    }

    #[test]
    fn the_next_ids_are_one_later() -> Result<()> {
        let ids: Vec<u32> = (0..500).map(|i| i * i % 97).collect();
        for batch in Tokens::new(ids).batches(5, 16, 3, &CPU).take(20) {
            let (ids, next) = batch?;
            assert_eq!((ids.dims(), next.dims()), (&[5, 16][..], &[5, 16][..]));
            let (ids, next) = (ids.to_vec2::<u32>()?, next.to_vec2::<u32>()?);
            for (ids, next) in ids.iter().zip(&next) {
                assert_eq!(ids[1..], next[..15]);
            }
        }
        // Where ids are places, the last one shows the shift too.
        for batch in count_up(50).batches(2, 7, 3, &CPU).take(9) {
            let (ids, next) = batch?;
            assert_eq!((ids + 1.0)?.to_vec2::<u32>()?, next.to_vec2::<u32>()?);
        }
        Ok(())
    }

    /// 100 ids of length 7: 14 windows from offset 0 or 1, 13 from 2 to 6.
    #[test]
    fn every_window_comes_once_an_epoch() -> Result<()> {
        let mut firsts = firsts(count_up(100).batches(5, 7, 11, &CPU), 100)?;
        let mut offsets = std::collections::BTreeSet::new();
        while firsts.len() >= 14 {
            let offset = firsts[0] % 7;
            offsets.insert(offset);
            let windows = (99 - offset as usize) / 7;
            let mut epoch: Vec<u32> = firsts.drain(..windows).collect();
            let in_order: Vec<u32> = (0..windows as u32).map(|k| offset + 7 * k).collect();
            assert_ne!(epoch, in_order);
            epoch.sort_unstable();
            assert_eq!(epoch, in_order);
        }
        assert_eq!(
            offsets.into_iter().collect::<Vec<_>>(),
            [0, 1, 2, 3, 4, 5, 6]
        );
        Ok(())
    }

    #[test]
    fn the_seed_decides_the_windows() -> Result<()> {
        let draw = |seed| firsts(count_up(1000).batches(4, 8, seed, &CPU), 10);
        assert_eq!(draw(1)?, draw(1)?);
        assert_ne!(draw(1)?, draw(2)?);
        Ok(())
    }

    #[test]
    fn a_stream_of_one_window_repeats_it() -> Result<()> {
        let mut batches = count_up(5).batches(3, 4, 1, &CPU);
        let (ids, next) = batches.next().unwrap()?;
        assert_eq!(ids.to_vec2::<u32>()?, vec![vec![0, 1, 2, 3]; 3]);
        assert_eq!(next.to_vec2::<u32>()?, vec![vec![1, 2, 3, 4]; 3]);
        assert_eq!(count_up(5).windows(3, 4, &CPU)?.len(), 1);
        Ok(())
    }

    #[test]
    fn evaluation_sees_every_full_window_once_in_order() -> Result<()> {
        let windows = count_up(24).windows(3, 5, &CPU)?;
        let rows: Vec<_> = windows.iter().map(|(ids, _)| ids.dims()[0]).collect();
        assert_eq!(rows, [3, 1]);
        let flat = |at: fn(&(Tensor, Tensor)) -> &Tensor| -> Result<Vec<u32>> {
            let mut ids = Vec::new();
            for window in &windows {
                ids.extend(at(window).flatten_all()?.to_vec1::<u32>()?);
            }
            Ok(ids)
        };
        assert_eq!(flat(|w| &w.0)?, (0..20).collect::<Vec<_>>());
        assert_eq!(flat(|w| &w.1)?, (1..21).collect::<Vec<_>>());
        // One more id makes no window; 26 ids make a fifth.
        assert_eq!(count_up(25).windows(9, 5, &CPU)?[0].0.dims(), [4, 5]);
        assert_eq!(count_up(26).windows(9, 5, &CPU)?[0].0.dims(), [5, 5]);
        Ok(())
    }

    #[test]
    fn what_gives_no_window_is_refused_once() {
        for (n, batch, length, says) in [
            (9, 0, 4, "batch is 0"),
            (9, 1, 0, "length is 0"),
            (9, 1, 9, "needs 10"),
            (0, 1, 1, "has 0 ids"),
            (9, 1, usize::MAX, "shorter length"),
        ] {
            let tokens = count_up(n);
            let mut batches = tokens.batches(batch, length, 1, &CPU);
            let said = batches.next().unwrap().unwrap_err().to_string();
            assert!(said.contains(says), "{said}");
            assert!(batches.next().is_none());
            let said = tokens.windows(batch, length, &CPU).unwrap_err().to_string();
            assert!(said.contains(says), "{said}");
        }
        assert!(count_up(0).is_empty() && count_up(9).len() == 9);
    }

    /// Images whose light and label say their place.
    fn images(n: u32) -> Images {
        let places = Tensor::arange(0, n, &CPU).unwrap();
        Images {
            images: places
                .to_dtype(candle_core::DType::F32)
                .and_then(|light| light.reshape((n as usize, 1, 1, 1)))
                .unwrap(),
            labels: places,
        }
    }

    fn labels(batches: ImageBatches, count: usize) -> Result<Vec<Vec<u32>>> {
        let label = |batch: Result<Images>| {
            let batch = batch?;
            let labels = batch.labels.to_vec1::<u32>()?;
            let light = batch.images.flatten_all()?.to_vec1::<f32>()?;
            assert!(labels.iter().zip(&light).all(|(&l, &x)| l as f32 == x));
            Ok(labels)
        };
        batches.take(count).map(label).collect()
    }

    #[test]
    fn golden_images() -> Result<()> {
        let batches = labels(images(10).batches(4, 42), 3)?;
        assert_eq!(batches, [[7, 1, 5, 4], [6, 9, 3, 8], [2, 0, 9, 4]]);
        Ok(())
    }

    #[test]
    fn every_image_comes_once_an_epoch_and_every_batch_is_full() -> Result<()> {
        let batches = labels(images(10).batches(4, 5), 25)?;
        assert!(batches.iter().all(|batch| batch.len() == 4));
        let all = batches.concat();
        let mut orders = std::collections::BTreeSet::new();
        for epoch in all.chunks(10) {
            let mut sorted = epoch.to_vec();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..10).collect::<Vec<_>>());
            orders.insert(epoch);
        }
        assert_eq!(orders.len(), 10);
        assert_eq!(batches, labels(images(10).batches(4, 5), 25)?);
        assert_ne!(batches, labels(images(10).batches(4, 6), 25)?);
        Ok(())
    }

    #[test]
    fn a_batch_that_cannot_be_filled_is_refused_once() {
        for batch in [0, 11] {
            let mut batches = images(10).batches(batch, 1);
            let said = batches.next().unwrap().unwrap_err().to_string();
            assert!(said.contains("there are 10"), "{said}");
            assert!(batches.next().is_none());
        }
        assert!(images(10).batches(10, 1).next().unwrap().is_ok());
    }
}
