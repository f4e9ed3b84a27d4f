//! Texts as token ids, and endless, seeded batches of them.

use super::batches::{Checked, Shuffled, by_similar_length, next_of};
use super::refused;
use crate::Result;
use crate::tokenizer::{Precomputed, TextBatch, Tokenizer};
use candle_core::{Device, Tensor};
use std::sync::Arc;

/// Texts as token ids, for an encoder. A clone shares the ids.
///
/// ```
/// use course::{candle_core::{Device, Tensor}, data::Encodings, tokenizer::Tokenizer};
///
/// let tokenizer = Tokenizer::train(&["ab"], 257)?;
/// let texts = Encodings::new(&["a", "abb", "ba"], &tokenizer, 16, &Device::Cpu)?;
/// let labels = Tensor::new(&[0u32, 1, 1], &Device::Cpu)?;
/// for batch in texts.batches(&labels, 2, 1).take(10) {
///     let (batch, labels) = batch?;
///     assert_eq!((batch.len(), labels.dims()), (2, &[2][..]));
/// }
/// # Ok::<(), course::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Encodings {
    ids: Arc<[Vec<u32>]>,
    pad: u32,
    device: Device,
    precomputed: Option<Rows>,
}

/// What [`Bert::precompute`](crate::models::Bert::precompute) has kept of each text.
#[derive(Debug, Clone)]
struct Rows {
    first: usize,
    made_by: Arc<[u32]>,
    /// Length × size numbers of each text.
    rows: Arc<[Arc<[f32]>]>,
}

impl Encodings {
    /// The texts as a model reads them, with special tokens and at most `max_length` tokens each:
    /// [`Tokenizer::encode_for_model`].
    ///
    /// # Errors
    /// As there; [`Error::Data`](crate::Error::Data) for a text without any token.
    pub fn new(
        texts: &[impl AsRef<str>],
        tokenizer: &Tokenizer,
        max_length: usize,
        device: &Device,
    ) -> Result<Self> {
        let encode = |text| tokenizer.encode_for_model(text, max_length);
        let ids = texts.iter().map(|text| encode(text.as_ref()));
        let ids = ids.collect::<Result<Vec<_>>>()?;
        if let Some(place) = ids.iter().position(Vec::is_empty) {
            let problem = format!("text {place} of {} has no token; leave it out", ids.len());
            return Err(refused("texts", problem));
        }
        Ok(Self {
            ids: ids.into(),
            pad: tokenizer.pad_id(),
            device: device.clone(),
            precomputed: None,
        })
    }

    /// How many texts there are.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// The tokens of all texts, special ones among them.
    pub fn tokens(&self) -> usize {
        self.ids.iter().map(Vec::len).sum()
    }

    /// The texts at some places, in that order.
    ///
    /// # Errors
    /// [`Error::Data`](crate::Error::Data) for a place where there is none.
    pub fn at(&self, places: &[usize]) -> Result<Self> {
        let ids = places
            .iter()
            .map(|&place| self.row(place).map(<[_]>::to_vec));
        let ids = ids.collect::<Result<Vec<_>>>()?.into();
        let some = |kept: &Rows| Rows {
            rows: places
                .iter()
                .map(|&place| kept.rows[place].clone())
                .collect(),
            ..kept.clone()
        };
        Ok(Self {
            ids,
            precomputed: self.precomputed.as_ref().map(some),
            ..self.clone()
        })
    }

    /// Several sets on end. What [`Bert::precompute`](crate::models::Bert::precompute) has kept stays.
    ///
    /// # Errors
    /// [`Error::Data`](crate::Error::Data) when there is no set; when two belong to different
    /// tokenizers, or were precomputed with different weights, up to different layers, or not both.
    pub fn concat(sets: &[&Self]) -> Result<Self> {
        let Some((first, others)) = sets.split_first() else {
            return Err(refused(
                "texts",
                "there is no set to join; give at least one",
            ));
        };
        let mark = |set: &Self| {
            let kept = set.precomputed.as_ref();
            kept.map(|kept| (kept.first, kept.made_by.clone()))
        };
        if others.iter().any(|set| set.pad != first.pad) {
            let problem = "sets of different tokenizers cannot be joined; read all with one";
            return Err(refused("texts", problem));
        }
        if others.iter().any(|set| mark(set) != mark(first)) {
            let problem = "sets that were not precomputed by the same layers cannot be joined; \
                           precompute all with the same model, or none";
            return Err(refused("texts", problem));
        }
        let rows = |kept: &Rows| Rows {
            rows: sets
                .iter()
                .filter_map(|set| set.precomputed.as_ref())
                .flat_map(|kept| kept.rows.iter().cloned())
                .collect(),
            ..kept.clone()
        };
        Ok(Self {
            ids: sets
                .iter()
                .flat_map(|set| set.ids.iter().cloned())
                .collect(),
            precomputed: first.precomputed.as_ref().map(rows),
            ..(*first).clone()
        })
    }

    /// The texts at some places as one batch.
    ///
    /// # Errors
    /// [`Error::Data`](crate::Error::Data) for a place where there is none; no place at all.
    pub fn batch(&self, places: &[usize]) -> Result<TextBatch> {
        let rows = places.iter().map(|&place| self.row(place));
        let rows = rows.collect::<Result<Vec<_>>>()?;
        let mut batch = TextBatch::new(&rows, self.pad, &self.device)?;
        if let Some(kept) = &self.precomputed {
            batch.precomputed = Some(kept.of(places, batch.input_ids.dim(1)?, self)?);
        }
        Ok(batch)
    }

    /// The same texts with what `f` makes of each, [m, length, size] of m texts: the input of layer
    /// `first` of the model whose weights have the mark `made_by`.
    pub(crate) fn precomputed(
        &self,
        (first, made_by): (usize, Arc<[u32]>),
        mut f: impl FnMut(&TextBatch) -> Result<Tensor>,
    ) -> Result<Self> {
        /// So many texts at a time keep memory small.
        const BATCH: usize = 64;
        let plain = Self {
            precomputed: None,
            ..self.clone()
        };
        let mut rows: Vec<Arc<[f32]>> = vec![Arc::from([]); self.len()];
        for places in plain.by_length().chunks(BATCH) {
            let hidden = f(&plain.batch(places)?)?;
            for (row, &place) in places.iter().enumerate() {
                let kept = hidden.get(row)?.narrow(0, 0, self.ids[place].len())?;
                rows[place] = kept.flatten_all()?.to_vec1::<f32>()?.into();
            }
        }
        let rows = rows.into();
        Ok(Self {
            precomputed: Some(Rows {
                first,
                made_by,
                rows,
            }),
            ..plain
        })
    }

    fn row(&self, place: usize) -> Result<&[u32]> {
        let row = self.ids.get(place);
        row.map(Vec::as_slice).ok_or_else(|| {
            let problem = format!("there is no text {place} among {}", self.len());
            refused("texts", problem)
        })
    }

    /// Endless batches in random order, with the rows of `targets` (labels or vectors) that belong
    /// to them: the same `seed`, the same batches.
    ///
    /// In each epoch every text comes once. Texts of similar length come together, so that there
    /// is little padding: every eight batches of an epoch's random order are sorted by length, cut
    /// into batches and shuffled again. Every batch is full: one that an epoch's last texts do not
    /// fill goes on with the next epoch's.
    ///
    /// # Shapes
    /// `targets` [n, …] for n texts; each item's are [`batch`, …].
    ///
    /// # Errors
    /// The first item, and the only one, is [`Error::Data`](crate::Error::Data) when `batch` is 0
    /// or larger than the set, or when there is another number of targets.
    ///
    /// Source: transformers' `group_by_length`.
    pub fn batches(&self, targets: &Tensor, batch: usize, seed: u64) -> TextBatches {
        let rows = targets.dims().first().copied().unwrap_or(0);
        let problem = if batch == 0 || batch > self.len() {
            format!(
                "batch is {batch}, and there are {}; take a batch from 1 to that",
                self.len()
            )
        } else if rows != self.len() {
            format!(
                "{rows} targets for {} texts; give each text one",
                self.len()
            )
        } else {
            return TextBatches(Ok(Picks {
                texts: self.clone(),
                targets: targets.clone(),
                batch,
                order: Shuffled::new(seed),
            }));
        };
        TextBatches(Err(Some(refused("texts", problem))))
    }

    /// What `f` makes of all texts, in their order, for evaluation: it gets batches of at most
    /// `batch` texts of similar length.
    ///
    /// # Shapes
    /// `f` turns m texts into [m, …]; → [n, …].
    ///
    /// # Errors
    /// [`Error::Data`](crate::Error::Data) when `batch` is 0 or there is no text; what `f` reports.
    ///
    /// ```
    /// use course::{candle_core::Device, data::Encodings, tokenizer::Tokenizer};
    ///
    /// let tokenizer = Tokenizer::train(&["ab"], 257)?;
    /// let texts = Encodings::new(&["a", "abb", "b"], &tokenizer, 16, &Device::Cpu)?;
    /// let lengths = texts.map(2, |batch| Ok(batch.attention_mask.sum(1)?))?;
    /// assert_eq!(lengths.to_vec1::<u8>()?, [1, 3, 1]);
    /// # Ok::<(), course::Error>(())
    /// ```
    pub fn map(
        &self,
        batch: usize,
        mut f: impl FnMut(&TextBatch) -> Result<Tensor>,
    ) -> Result<Tensor> {
        if batch == 0 || self.is_empty() {
            let problem = format!(
                "batches of {batch} of {} texts; take one at least",
                self.len()
            );
            return Err(refused("texts", problem));
        }
        let order = self.by_length();
        let parts = order.chunks(batch).map(|places| f(&self.batch(places)?));
        let parts = parts.collect::<Result<Vec<_>>>()?;
        let mut back = vec![0u32; order.len()];
        for (now, &place) in order.iter().enumerate() {
            back[place] = now as u32;
        }
        let back = Tensor::new(back, parts[0].device())?;
        Ok(Tensor::cat(&parts, 0)?.index_select(&back, 0)?)
    }

    /// All places, those of the shortest texts first.
    fn by_length(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.len()).collect();
        order.sort_by_key(|&place| self.ids[place].len());
        order
    }
}

impl Rows {
    /// Those of some texts, filled up with zeros to `length` tokens.
    fn of(&self, places: &[usize], length: usize, texts: &Encodings) -> Result<Precomputed> {
        let size = self.rows[places[0]].len() / texts.ids[places[0]].len();
        let mut hidden = Vec::with_capacity(places.len() * length * size);
        for (row, &place) in places.iter().enumerate() {
            hidden.extend_from_slice(&self.rows[place]);
            hidden.resize((row + 1) * length * size, 0f32);
        }
        let shape = (places.len(), length, size);
        Ok(Precomputed {
            first: self.first,
            hidden: Tensor::from_vec(hidden, shape, &texts.device)?,
            made_by: self.made_by.clone(),
        })
    }
}

/// The endless batches of [`Encodings::batches`].
#[derive(Debug)]
pub struct TextBatches(Checked<Picks>);

#[derive(Debug)]
struct Picks {
    texts: Encodings,
    targets: Tensor,
    batch: usize,
    order: Shuffled,
}

impl Iterator for TextBatches {
    type Item = Result<(TextBatch, Tensor)>;

    fn next(&mut self) -> Option<Self::Item> {
        next_of(&mut self.0, Picks::next)
    }
}

impl Picks {
    fn next(&mut self) -> Result<(TextBatch, Tensor)> {
        let (texts, batch) = (&self.texts, self.batch);
        let length = |place: usize| texts.ids[place].len();
        let places = self.order.next(batch, |rng| {
            Ok(by_similar_length(texts.len(), batch, length, rng))
        })?;
        let targets = super::rows(&self.targets, &places)?;
        Ok((texts.batch(&places)?, targets))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CPU: Device = Device::Cpu;

    /// Texts of 1 to 12 letters, and their places as targets.
    fn texts(n: usize) -> (Encodings, Tensor) {
        let texts: Vec<String> = (0..n).map(|i| "a".repeat(1 + i * 7 % 12)).collect();
        let tokenizer = Tokenizer::train(&["x"], 257).unwrap();
        let places = Tensor::arange(0, n as u32, &CPU).unwrap();
        (
            Encodings::new(&texts, &tokenizer, 32, &CPU).unwrap(),
            places,
        )
    }

    fn places(batches: TextBatches, count: usize) -> Vec<Vec<u32>> {
        let batches = batches.take(count);
        batches
            .map(|batch| batch.unwrap().1.to_vec1().unwrap())
            .collect()
    }

    #[test]
    fn each_epoch_has_every_text_once() {
        let (texts, targets) = texts(103);
        // 103 batches of 4 are four epochs.
        let all = places(texts.batches(&targets, 4, 9), 103).concat();
        for epoch in all.chunks(103) {
            let mut epoch = epoch.to_vec();
            epoch.sort_unstable();
            assert!(epoch.iter().copied().eq(0..103));
        }
        assert_ne!(all[..103], all[103..206]);
    }

    #[test]
    fn a_seed_is_an_order() {
        let (texts, targets) = texts(50);
        let of = |seed| places(texts.batches(&targets, 4, seed), 20);
        assert_eq!(of(1), of(1));
        assert_ne!(of(1), of(2));
    }

    #[test]
    fn targets_belong_to_their_texts_and_lengths_are_alike() {
        let (texts, targets) = texts(96);
        let (mut padding, mut all) = (0, 0);
        for batch in texts.batches(&targets, 8, 3).take(12) {
            let (batch, places) = batch.unwrap();
            let mask = batch.attention_mask.to_vec2::<u8>().unwrap();
            for (row, place) in mask.iter().zip(places.to_vec1::<u32>().unwrap()) {
                let length = row.iter().map(|&m| usize::from(m)).sum::<usize>();
                assert_eq!(length, 1 + place as usize * 7 % 12);
                padding += row.len() - length;
                all += row.len();
            }
        }
        // In random order, two fifths of such batches would be padding.
        assert!(6 * padding < all, "{padding} of {all}");
    }

    #[test]
    fn a_map_keeps_the_order() {
        let (texts, _) = texts(29);
        for batch in [1, 4, 29, 100] {
            let sums = texts.map(batch, |batch| Ok(batch.attention_mask.sum(1)?));
            let want = (0..29).map(|i| 1 + i * 7 % 12);
            assert!(sums.unwrap().to_vec1::<u8>().unwrap().into_iter().eq(want));
        }
        assert!(texts.map(0, |batch| Ok(batch.input_ids.clone())).is_err());
    }

    #[test]
    fn refused_with_the_reason() {
        let (texts, targets) = texts(5);
        for (batches, words) in [
            (texts.batches(&targets, 0, 1), "batch is 0, and there are 5"),
            (texts.batches(&targets, 6, 1), "batch is 6"),
            (
                texts.at(&[0, 1]).unwrap().batches(&targets, 1, 1),
                "5 targets for 2 texts",
            ),
        ] {
            let items: Vec<_> = batches.take(3).collect();
            assert_eq!(items.len(), 1);
            let said = items[0].as_ref().unwrap_err().to_string();
            assert!(said.contains(words), "{said}");
        }
        let said = texts.batch(&[5]).unwrap_err().to_string();
        assert!(said.contains("no text 5 among 5"), "{said}");
        let tokenizer = Tokenizer::train(&["x"], 257).unwrap();
        let empty = Encodings::new(&["a", ""], &tokenizer, 8, &CPU);
        let said = empty.unwrap_err().to_string();
        assert!(said.contains("text 1 of 2 has no token"), "{said}");
    }
}
