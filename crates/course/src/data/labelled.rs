//! Texts as token ids, each with its class.

use super::encodings::{Encodings, TextBatches};
use super::texts::{Texts, balanced, other_classes};
use crate::tokenizer::Tokenizer;
use crate::{Result, rng::rng};
use candle_core::{Device, Tensor};

/// [`Texts`] as an encoder reads them, with their labels as a tensor.
///
/// ```
/// # fn main() -> Result<(), course::Error> {
/// use course::{candle_core::Device, data::{Labelled, Texts}, tokenizer::Tokenizer};
///
/// let texts = ["good", "bad", "fine", "poor"].map(String::from).to_vec();
/// let names = ["negative", "positive"].map(String::from).to_vec();
/// let texts = Texts::new(texts, vec![1, 0, 1, 0], names)?;
/// let tokenizer = Tokenizer::train(&["good bad"], 257)?;
/// let set = Labelled::new(&texts, &tokenizer, 16, &Device::Cpu)?;
/// let one_of_each = set.at(&set.balanced(1, 0)?)?;
/// assert_eq!((set.len(), one_of_each.len()), (4, 2));
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Labelled {
    /// The texts. [`Bert::precompute`](crate::models::Bert::precompute) may replace them.
    pub texts: Encodings,
    /// The class of each, a place in `names`: (n) of u32.
    pub labels: Tensor,
    /// The classes.
    pub names: Vec<String>,
}

impl Labelled {
    /// The texts with at most `max_length` tokens each, and their labels on the device.
    ///
    /// # Errors
    /// As [`Encodings::new`].
    pub fn new(
        texts: &Texts,
        tokenizer: &Tokenizer,
        max_length: usize,
        device: &Device,
    ) -> Result<Self> {
        Ok(Self {
            texts: Encodings::new(&texts.texts, tokenizer, max_length, device)?,
            labels: Tensor::new(texts.labels.as_slice(), device)?,
            names: texts.names.clone(),
        })
    }

    /// How many texts these are.
    pub fn len(&self) -> usize {
        self.texts.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.texts.is_empty()
    }

    /// The texts at some places, in that order.
    ///
    /// # Errors
    /// [`Error::Data`](crate::Error::Data) for a place where there is none.
    pub fn at(&self, places: &[usize]) -> Result<Self> {
        Ok(Self {
            texts: self.texts.at(places)?,
            labels: super::rows(&self.labels, places)?,
            names: self.names.clone(),
        })
    }

    /// Several sets with the same classes on end.
    ///
    /// # Errors
    /// [`Error::Data`](crate::Error::Data) when there is no set, or when two have other classes;
    /// as [`Encodings::concat`].
    pub fn concat(sets: &[&Self]) -> Result<Self> {
        let texts: Vec<&Encodings> = sets.iter().map(|set| &set.texts).collect();
        let texts = Encodings::concat(&texts)?;
        let names = sets[0].names.clone();
        if let Some(other) = sets.iter().find(|set| set.names != names) {
            return Err(other_classes(&names, &other.names));
        }
        let labels: Vec<&Tensor> = sets.iter().map(|set| &set.labels).collect();
        Ok(Self {
            texts,
            labels: Tensor::cat(&labels, 0)?,
            names,
        })
    }

    /// The places of `per_class` texts of each class, drawn with the seed and shuffled, for
    /// [`at`](Self::at) and [`data::rows`](super::rows). With the same seed, a smaller draw is a
    /// part of a larger one.
    ///
    /// # Errors
    /// [`Error::Data`](crate::Error::Data) when a class has fewer; it names the class.
    pub fn balanced(&self, per_class: usize, seed: u64) -> Result<Vec<usize>> {
        let labels = self.labels.to_vec1::<u32>()?;
        balanced(&self.names, &labels, per_class, &mut rng(seed))
    }

    /// Endless batches of texts and labels: [`Encodings::batches`].
    ///
    /// # Errors
    /// As there.
    pub fn batches(&self, batch: usize, seed: u64) -> TextBatches {
        self.texts.batches(&self.labels, batch, seed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_bring_texts_and_labels_and_a_draw_is_even() -> Result<()> {
        let names = ["a", "b", "c"].map(String::from).to_vec();
        let texts: Vec<String> = (0..30).map(|i| "x".repeat(i + 1)).collect();
        let texts = Texts::new(texts, (0..30).map(|i| i % 3).collect(), names)?;
        let tokenizer = Tokenizer::train(&["q"], 257)?;
        let set = Labelled::new(&texts, &tokenizer, 64, &Device::Cpu)?;
        let drawn = set.balanced(4, 1)?;
        assert!(
            drawn
                .iter()
                .all(|place| set.balanced(9, 1).unwrap().contains(place))
        );
        let some = set.at(&drawn)?;
        for class in 0..3 {
            let labels = some.labels.to_vec1::<u32>()?;
            assert_eq!(labels.iter().filter(|&&label| label == class).count(), 4);
        }
        // A text's length tells its place, and the place its label.
        for batch in some.batches(5, 1).take(4) {
            let (texts, labels) = batch?;
            let lengths = texts
                .attention_mask
                .to_dtype(candle_core::DType::U32)?
                .sum(1)?;
            let places = lengths
                .to_vec1::<u32>()?
                .into_iter()
                .map(|length| length - 1);
            let own: Vec<u32> = places.map(|place| place % 3).collect();
            assert_eq!(own, labels.to_vec1::<u32>()?);
        }
        let said = set.balanced(11, 1).unwrap_err().to_string();
        assert!(said.contains("10 texts of class \"a\""), "{said}");
        assert!(set.at(&[30]).is_err());
        Ok(())
    }

    #[test]
    fn sets_with_the_same_classes_are_joined() -> Result<()> {
        let tokenizer = Tokenizer::train(&["q"], 257)?;
        let read = |texts: &[&str], labels: &[u32], names: [&str; 2]| {
            let texts = texts.iter().map(ToString::to_string).collect();
            let names = names.map(String::from).to_vec();
            let texts = Texts::new(texts, labels.to_vec(), names)?;
            Labelled::new(&texts, &tokenizer, 64, &Device::Cpu)
        };
        let one = read(&["x", "xx"], &[0, 1], ["a", "b"])?;
        let two = read(&["xxx"], &[1], ["a", "b"])?;
        let both = Labelled::concat(&[&two, &one, &one])?;
        assert_eq!(both.labels.to_vec1::<u32>()?, [1, 0, 1, 0, 1]);
        let lengths = both
            .texts
            .map(2, |batch| Ok(batch.attention_mask.sum(1)?))?;
        assert_eq!(lengths.to_vec1::<u8>()?, [3, 1, 2, 1, 2]);
        let other = read(&["x"], &[0], ["a", "c"])?;
        let said = Labelled::concat(&[&one, &other]).unwrap_err().to_string();
        assert!(said.contains("a, b and a, c"), "{said}");
        assert!(Labelled::concat(&[]).is_err());
        Ok(())
    }
}
