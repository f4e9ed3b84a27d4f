//! Sentences that praise or blame, from four domains.

use super::fetched::{damaged_set, lines_of};
use super::{TextSet, Texts, refused};
use crate::Result;
use crate::rng::rng;
use std::collections::HashMap;

/// The set that holds the files.
const SET: &str = "vader";

/// The domains of [`sentiment`]: tweets, reviews of goods at Amazon, of films, and editorials of
/// the New York Times.
pub const DOMAINS: [&str; 4] = ["tweets", "amazon", "movies", "nyt"];

/// The classes of [`sentiment`], by their label.
pub const SENTIMENT_NAMES: [&str; 2] = ["negative", "positive"];

/// A sentence rated nearer to 0 than this, of −4 to 4, is dropped: it hardly praises or blames.
const CLEAR: f64 = 1.0;
/// The share of the sentences that a model learns from.
const TRAIN: f64 = 0.6;
/// What the parts are drawn with.
const SEED: u64 = 9;

/// Sentences of one of the four [`DOMAINS`] that readers found clearly positive or clearly negative
/// (C. J. Hutto and E. Gilbert, VADER, 2014): the mean of at least twenty ratings from −4 to 4
/// lies above 1 or below −1.
///
/// About 60 % are to learn from. All sentences of a review or an editorial are in the same part;
/// tweets stand alone, and of film reviews the source does not say which sentences belong together.
/// Both parts have as many positive as negative sentences, so that guessing is right half of the
/// time; the draw is always the same. The texts stand as in the source, with its quotes and HTML.
///
/// # Errors
/// [`Error::Data`](crate::Error::Data) when there is no such domain (it names those that exist) and
/// when the set `vader` is not on this machine: `cargo course setup` fetches it.
/// [`Error::File`](crate::Error::File) when a file is damaged.
///
/// ```no_run
/// # fn main() -> Result<(), course::Error> {
/// let tweets = course::data::sentiment("tweets")?;
/// let counts = tweets.test.counts();
/// assert_eq!(counts[0], counts[1]);
/// # Ok(())
/// # }
/// ```
pub fn sentiment(domain: &str) -> Result<TextSet> {
    if !DOMAINS.contains(&domain) {
        let problem = format!(
            "there is no such domain; take one of {}",
            DOMAINS.join(", ")
        );
        return Err(refused(domain, problem));
    }
    let file = format!("{domain}.txt");
    split(&sentences(&file, &lines_of(SET, &file)?)?)
}

/// A sentence with a clear sentiment.
struct Sentence {
    /// What it is from: all sentences of it are in the same part.
    document: String,
    text: String,
    label: u32,
}

/// A line is id, tab, mean rating, tab, text; an id is DOCUMENT or DOCUMENT_SENTENCE.
fn sentences(file: &str, lines: &str) -> Result<Vec<Sentence>> {
    let mut clear = Vec::new();
    for line in lines.lines() {
        let fields: Vec<_> = line.splitn(3, '\t').collect();
        let rating = fields.get(1).and_then(|rating| rating.parse::<f64>().ok());
        let ([id, _, text], Some(rating)) = (&fields[..], rating) else {
            let problem = format!("{line:.60?} is no id, rating and text");
            return Err(damaged_set(SET, file, &problem));
        };
        if rating.abs() > CLEAR {
            let document = id.split_once('_').map_or(*id, |(document, _)| document);
            clear.push(Sentence {
                document: document.to_owned(),
                text: text.trim().to_owned(),
                label: u32::from(rating > 0.0),
            });
        }
    }
    if clear.is_empty() {
        return Err(damaged_set(SET, file, "it is empty"));
    }
    Ok(clear)
}

/// Two even parts that share no document.
fn split(sentences: &[Sentence]) -> Result<TextSet> {
    let (train, test) = documents_apart(sentences);
    let of = |part: &[&Sentence]| {
        Texts::new(
            part.iter().map(|sentence| sentence.text.clone()).collect(),
            part.iter().map(|sentence| sentence.label).collect(),
            SENTIMENT_NAMES.map(str::to_owned).to_vec(),
        )
    };
    let set = TextSet::without_repeats(of(&train)?, of(&test)?)?;
    let even = |part: &Texts| {
        let least = part.counts().into_iter().min().unwrap_or_default();
        part.balanced(least, SEED)
    };
    Ok(TextSet {
        train: even(&set.train)?,
        test: even(&set.test)?,
    })
}

/// Documents in random order: to the first part until it has its share of the sentences, then to
/// the second.
fn documents_apart(sentences: &[Sentence]) -> (Vec<&Sentence>, Vec<&Sentence>) {
    let mut documents: Vec<Vec<&Sentence>> = Vec::new();
    let mut places = HashMap::new();
    for sentence in sentences {
        let place = *places.entry(&sentence.document).or_insert(documents.len());
        if place == documents.len() {
            documents.push(Vec::new());
        }
        documents[place].push(sentence);
    }
    let enough = TRAIN * sentences.len() as f64;
    let (mut train, mut test) = (Vec::new(), Vec::new());
    for place in rng(SEED).permutation(documents.len()) {
        let part = if (train.len() as f64) < enough {
            &mut train
        } else {
            &mut test
        };
        part.append(&mut documents[place]);
    }
    (train, test)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::texts::tests::assert_apart;
    use std::collections::HashSet;

    #[test]
    fn every_domain_is_even_and_its_parts_share_nothing() -> Result<()> {
        for (domain, clear, train, test, first) in [
            ("tweets", [815, 1784], 472, 317, "Emitting the uber sad"),
            (
                "amazon",
                [897, 1486],
                525,
                371,
                "i paid twenty dollars more",
            ),
            (
                "movies",
                [4484, 4539],
                2684,
                1799,
                "The nicest thing that can be said about Stealing",
            ),
            (
                "nyt",
                [911, 509],
                293,
                213,
                "The shuttle, looking like a huge Taj Mahal",
            ),
        ] {
            let file = format!("{domain}.txt");
            let sentences = sentences(&file, &lines_of(SET, &file)?)?;
            let of = |label| sentences.iter().filter(|s| s.label == label).count();
            assert_eq!([of(0), of(1)], clear, "{domain}");
            let set = sentiment(domain)?;
            assert_apart(&set);
            assert_eq!(set.train.names, SENTIMENT_NAMES);
            assert_eq!(set.train.counts(), [train; 2], "{domain}");
            assert_eq!(set.test.counts(), [test; 2], "{domain}");
            assert!(set.train.texts[0].starts_with(first), "{domain}");
            assert_eq!(set, sentiment(domain)?);
            // Every text has the label that its sentence was rated for.
            let label_of: HashMap<_, _> = sentences
                .iter()
                .map(|s| (s.text.as_str(), s.label))
                .collect();
            for part in [&set.train, &set.test] {
                for (text, label) in part.texts.iter().zip(&part.labels) {
                    assert_eq!(label_of[text.as_str()], *label, "{text}");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn no_document_lies_in_both_parts() -> Result<()> {
        for (domain, documents) in [("amazon", 298), ("nyt", 452)] {
            let file = format!("{domain}.txt");
            let sentences = sentences(&file, &lines_of(SET, &file)?)?;
            let (train, test) = documents_apart(&sentences);
            assert_eq!(train.len() + test.len(), sentences.len());
            let of = |part: &[&Sentence]| -> HashSet<String> {
                part.iter().map(|s| s.document.clone()).collect()
            };
            assert!(of(&train).is_disjoint(&of(&test)), "{domain}");
            assert_eq!(of(&train).len() + of(&test).len(), documents, "{domain}");
        }
        Ok(())
    }

    #[test]
    fn sentences_that_hardly_praise_or_blame_are_dropped() -> Result<()> {
        let lines =
            "1_1\t1.05\tgood\r\n1_2\t1.0\tso\r\n2_1\t-1\tso\r\n2_10\t-1.1\t\"bad &amp; \t\"\r\n";
        let found = sentences("f", lines)?;
        let found: Vec<_> = found
            .iter()
            .map(|s| (s.document.as_str(), s.text.as_str(), s.label))
            .collect();
        assert_eq!(found, [("1", "good", 1), ("2", "\"bad &amp; \t\"", 0)]);
        Ok(())
    }

    #[test]
    fn an_unknown_domain_is_answered_with_those_that_exist() {
        let said = sentiment("books").unwrap_err().to_string();
        assert!(said.contains("\"books\"") && said.contains("tweets, amazon, movies, nyt"));
    }

    #[test]
    fn a_damaged_file_says_what_is_wrong_and_how_to_get_it_anew() {
        for (lines, says) in [
            ("", "empty"),
            ("1\t2.0", "\"1\\t2.0\""),
            ("1\tx\ty", "rating"),
        ] {
            let said = sentences("f", lines).err().unwrap().to_string();
            assert!(
                said.contains(says) && said.contains("cargo course data fetch vader"),
                "{said}"
            );
        }
    }
}
