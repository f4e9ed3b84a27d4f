//! Texts that belong to classes.

use super::refused;
use crate::rng::{Rng, rng};
use crate::{Error, Result};
use std::collections::{HashMap, HashSet};

/// Texts with labels.
///
/// ```
/// # fn main() -> Result<(), course::Error> {
/// use course::data::Texts;
/// let texts = ["good", "bad", "fine", "poor"].map(String::from).to_vec();
/// let names = ["negative", "positive"].map(String::from).to_vec();
/// let texts = Texts::new(texts, vec![1, 0, 1, 0], names)?;
/// assert_eq!(texts.counts(), [2, 2]);
/// assert_eq!(texts.at(&[2, 1])?.texts, ["fine", "bad"]);
/// assert_eq!(texts.balanced(1, 0)?.counts(), [1, 1]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Texts {
    /// The texts.
    pub texts: Vec<String>,
    /// The class of each: a place in `names`.
    pub labels: Vec<u32>,
    /// The classes.
    pub names: Vec<String>,
}

/// Labelled texts in two parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextSet {
    /// What a model learns from. None of it is in the other part.
    pub train: Texts,
    /// What it is tested on.
    pub test: Texts,
}

impl Texts {
    /// Texts, the class of each and the classes' names.
    ///
    /// # Errors
    /// [`Error::Data`](crate::Error::Data) when there is not one label for each text, or when a
    /// label has no name.
    pub fn new(texts: Vec<String>, labels: Vec<u32>, names: Vec<String>) -> Result<Self> {
        if texts.len() != labels.len() {
            let problem = format!(
                "there are {} texts and {} labels; give one for each",
                texts.len(),
                labels.len()
            );
            return Err(refused("texts", problem));
        }
        if let Some(label) = labels.iter().find(|&&label| label as usize >= names.len()) {
            let problem = format!(
                "the label {label} has no name; the {} names are of the labels from 0 on",
                names.len()
            );
            return Err(refused("texts", problem));
        }
        Ok(Self {
            texts,
            labels,
            names,
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
    /// [`Error::Data`](crate::Error::Data) when a place is out of range.
    pub fn at(&self, places: &[usize]) -> Result<Self> {
        let mut texts = Vec::with_capacity(places.len());
        let mut labels = Vec::with_capacity(places.len());
        for &place in places {
            let (Some(text), Some(&label)) = (self.texts.get(place), self.labels.get(place)) else {
                let problem = format!(
                    "there is no text at place {place}; there are {}, from 0 on",
                    self.len()
                );
                return Err(refused("texts", problem));
            };
            texts.push(text.clone());
            labels.push(label);
        }
        Self::new(texts, labels, self.names.clone())
    }

    /// How many texts each class has.
    pub fn counts(&self) -> Vec<usize> {
        places(&self.names, &self.labels)
            .iter()
            .map(Vec::len)
            .collect()
    }

    /// `per_class` texts of each class, drawn with the seed and shuffled. With the same seed, a
    /// smaller draw is a part of a larger one.
    ///
    /// # Errors
    /// [`Error::Data`](crate::Error::Data) when a class has fewer; it names the class.
    pub fn balanced(&self, per_class: usize, seed: u64) -> Result<Self> {
        let drawn = balanced(&self.names, &self.labels, per_class, &mut rng(seed))?;
        self.at(&drawn)
    }

    /// The first `per_class` texts of each class (all, where there are fewer), and the rest.
    ///
    /// # Errors
    /// None for texts made by [`new`](Self::new).
    ///
    /// ```
    /// # fn main() -> Result<(), course::Error> {
    /// let emoji = course::data::emoji("en")?.texts;
    /// let (choose, learn) = emoji.split(20)?;
    /// assert_eq!(choose.counts(), [20; 6]);
    /// assert_eq!(choose.len() + learn.len(), emoji.len());
    /// # Ok(())
    /// # }
    /// ```
    pub fn split(&self, per_class: usize) -> Result<(Self, Self)> {
        let mut seen = vec![0; self.names.len()];
        let (first, rest): (Vec<usize>, Vec<usize>) = (0..self.len()).partition(|&place| {
            let seen = &mut seen[self.labels[place] as usize];
            *seen += 1;
            *seen <= per_class
        });
        Ok((self.at(&first)?, self.at(&rest)?))
    }

    /// Several sets with the same classes on end.
    ///
    /// # Errors
    /// [`Error::Data`](crate::Error::Data) when there is no set, or when two have other classes.
    ///
    /// ```
    /// # fn main() -> Result<(), course::Error> {
    /// use course::data::{Texts, emoji};
    /// let both = Texts::concat(&[&emoji("en")?.texts, &emoji("fr")?.texts])?;
    /// assert_eq!(both.len(), 2 * 1032);
    /// # Ok(())
    /// # }
    /// ```
    pub fn concat(sets: &[&Self]) -> Result<Self> {
        let Some(first) = sets.first() else {
            return Err(refused(
                "texts",
                "there is no set to join; give at least one",
            ));
        };
        if let Some(other) = sets.iter().find(|set| set.names != first.names) {
            return Err(other_classes(&first.names, &other.names));
        }
        Self::new(
            sets.iter().flat_map(|set| set.texts.clone()).collect(),
            sets.iter().flat_map(|set| set.labels.clone()).collect(),
            first.names.clone(),
        )
    }
}

/// The error of sets that cannot be joined.
pub(super) fn other_classes(one: &[String], other: &[String]) -> Error {
    let (one, other) = (one.join(", "), other.join(", "));
    let problem = format!("sets with other classes cannot be joined: {one} and {other}");
    refused("texts", problem)
}

/// The places of each class's labels.
fn places(names: &[String], labels: &[u32]) -> Vec<Vec<usize>> {
    let mut places = vec![Vec::new(); names.len()];
    for (place, &label) in labels.iter().enumerate() {
        if let Some(class) = places.get_mut(label as usize) {
            class.push(place);
        }
    }
    places
}

/// The places of `per_class` labels of each class, in random order.
pub(super) fn balanced(
    names: &[String],
    labels: &[u32],
    per_class: usize,
    rng: &mut Rng,
) -> Result<Vec<usize>> {
    let mut drawn = Vec::with_capacity(per_class * names.len());
    for (name, places) in names.iter().zip(places(names, labels)) {
        if places.len() < per_class {
            let problem = format!(
                "there are {} texts of class \"{name}\", and you ask for {per_class} of each",
                places.len()
            );
            return Err(refused("texts", problem));
        }
        let order = rng.permutation(places.len());
        drawn.extend(order[..per_class].iter().map(|&i| places[i]));
    }
    let order = rng.permutation(drawn.len());
    Ok(order.iter().map(|&i| drawn[i]).collect())
}

impl TextSet {
    /// Two parts, without the training texts that say nothing new: those that occur in the test
    /// part, stand in two classes, or occurred before. Letters' case and white space do not count.
    pub(super) fn without_repeats(train: Texts, test: Texts) -> Result<Self> {
        let tested: HashSet<String> = test.texts.iter().map(|text| key(text)).collect();
        let mut class: HashMap<String, Option<u32>> = HashMap::new();
        for (text, &label) in train.texts.iter().zip(&train.labels) {
            let class = class.entry(key(text)).or_insert(Some(label));
            *class = class.filter(|&class| class == label);
        }
        let new: Vec<usize> = (0..train.len())
            .filter(|&i| {
                let key = key(&train.texts[i]);
                !tested.contains(&key) && class.remove(&key).flatten().is_some()
            })
            .collect();
        Ok(Self {
            train: train.at(&new)?,
            test,
        })
    }
}

/// What two texts share that are the same to a reader.
fn key(text: &str) -> String {
    let words: Vec<_> = text.split_whitespace().map(str::to_lowercase).collect();
    words.join(" ")
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    fn strings(words: &[&str]) -> Vec<String> {
        words.iter().map(ToString::to_string).collect()
    }

    /// Texts of the classes "a" and "b".
    fn of(texts: &[&str], labels: &[u32]) -> Texts {
        Texts::new(strings(texts), labels.to_vec(), strings(&["a", "b"])).unwrap()
    }

    /// Panics when a text is in both parts, or twice in the first.
    pub(in crate::data) fn assert_apart(set: &TextSet) {
        let tested: HashSet<_> = set.test.texts.iter().map(|text| key(text)).collect();
        let mut seen = HashSet::new();
        for text in &set.train.texts {
            assert!(!tested.contains(&key(text)), "in both parts: {text}");
            assert!(seen.insert(key(text)), "twice: {text}");
        }
    }

    #[test]
    fn a_label_for_each_text_and_a_name_for_each_label() {
        let new = |texts: &[&str], labels: &[u32]| {
            Texts::new(strings(texts), labels.to_vec(), strings(&["a", "b"]))
        };
        let said = |texts: &[&str], labels: &[u32]| new(texts, labels).unwrap_err().to_string();
        assert!(new(&["x"], &[1]).is_ok());
        assert!(new(&[], &[]).unwrap().is_empty());
        assert!(said(&["x", "y"], &[0]).contains("2 texts and 1 labels"));
        assert!(said(&["x", "y"], &[0, 2]).contains("label 2 has no name"));
    }

    #[test]
    fn places_counts_and_joining() -> Result<()> {
        let texts = of(&["v", "w", "x", "y", "z"], &[1, 0, 1, 1, 1]);
        assert_eq!(texts.counts(), [1, 4]);
        assert_eq!(texts.at(&[4, 1, 4])?, of(&["z", "w", "z"], &[1, 0, 1]));
        let said = texts.at(&[0, 5]).unwrap_err().to_string();
        assert!(said.contains("place 5") && said.contains("are 5"), "{said}");
        let joined = Texts::concat(&[&texts.at(&[1])?, &texts.at(&[0])?])?;
        assert_eq!(joined, of(&["w", "v"], &[0, 1]));
        let others = Texts::new(vec![], vec![], strings(&["a", "c"]))?;
        let said = Texts::concat(&[&texts, &others]).unwrap_err().to_string();
        assert!(said.contains("a, b and a, c"), "{said}");
        assert!(Texts::concat(&[]).is_err());
        Ok(())
    }

    #[test]
    fn a_balanced_draw_is_even_seeded_shuffled_and_grows() -> Result<()> {
        let names: Vec<String> = (0..60).map(|i| format!("text {i}")).collect();
        let labels = (0..60).map(|i| u32::from(i >= 20)).collect();
        let texts = Texts::new(names, labels, strings(&["a", "b"]))?;
        let small = texts.balanced(5, 1)?;
        assert_eq!(small.counts(), [5, 5]);
        assert_eq!(small, texts.balanced(5, 1)?);
        assert_ne!(small, texts.balanced(5, 2)?);
        assert!(small.labels != [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]);
        let large = texts.balanced(20, 1)?;
        assert_eq!(large.texts.iter().collect::<HashSet<_>>().len(), 40);
        assert!(small.texts.iter().all(|text| large.texts.contains(text)));
        for (text, label) in large.texts.iter().zip(&large.labels) {
            let place = texts.texts.iter().position(|t| t == text).unwrap();
            assert_eq!(texts.labels[place], *label, "{text}");
        }
        let said = texts.balanced(21, 1).unwrap_err().to_string();
        assert!(
            said.contains("20 texts of class \"a\"") && said.contains("21"),
            "{said}"
        );
        Ok(())
    }

    #[test]
    fn a_split_takes_the_first_of_each_class() -> Result<()> {
        let texts = of(&["p", "q", "r", "s", "t"], &[0, 1, 1, 1, 0]);
        let (first, rest) = texts.split(1)?;
        assert_eq!(first, of(&["p", "q"], &[0, 1]));
        assert_eq!(rest, of(&["r", "s", "t"], &[1, 1, 0]));
        assert_eq!(texts.split(2)?.1, of(&["s"], &[1]));
        assert_eq!(texts.split(3)?, (texts.clone(), of(&[], &[])));
        Ok(())
    }

    #[test]
    fn the_training_part_loses_what_says_nothing_new() -> Result<()> {
        let train = of(
            &["new", "In  TEST", "torn", "twice", "twice ", "Torn", "old"],
            &[0, 1, 0, 1, 1, 1, 0],
        );
        let test = of(&["in test", "in test"], &[1, 1]);
        let set = TextSet::without_repeats(train, test.clone())?;
        assert_eq!(set.train, of(&["new", "twice", "old"], &[0, 1, 0]));
        assert_eq!(set.test, test);
        assert_apart(&set);
        Ok(())
    }
}
