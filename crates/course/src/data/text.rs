//! Three kinds of English to read.

use super::{damaged, read, refused};
use crate::Result;

/// The texts that there are.
const NAMES: [&str; 3] = ["sotu", "kjv", "hamlet"];

/// A text in two parts that share no document.
#[derive(Debug, Clone)]
pub struct Corpus {
    /// The name by which [`text`] knows it.
    pub name: String,
    /// What a model learns from. ASCII; a blank line stands between documents.
    pub train: String,
    /// What a model is tested on: whole documents of the same kinds.
    pub held_out: String,
}

/// A text by its name:
///
/// - `"sotu"`: addresses on the State of the Union from 1792 to 2019, one a line (3.5 MB, and four
///   addresses of 1828, 1888, 1949 and 2007 held out);
/// - `"kjv"`: ten books of the King James Bible, one verse a line, a blank line between chapters
///   (0.9 MB, and seven other books held out);
/// - `"hamlet"`: the play, a blank line between scenes (150 kB, and one scene each of the acts I to
///   IV held out).
///
/// # Errors
/// [`Error::Data`](crate::Error::Data) when there is no such text; it names those that exist.
/// [`Error::File`](crate::Error::File) when a file cannot be read or is damaged.
///
/// ```
/// # fn main() -> Result<(), course::Error> {
/// let hamlet = course::data::text("hamlet")?;
/// assert!(hamlet.train.starts_with("ACT I\nSCENE I. Elsinore."));
/// assert!(hamlet.train.len() > 5 * hamlet.held_out.len());
/// assert!(course::data::text("macbeth").is_err());
/// # Ok(())
/// # }
/// ```
pub fn text(name: &str) -> Result<Corpus> {
    if !NAMES.contains(&name) {
        let names = NAMES.join(", ");
        return Err(refused(
            name,
            format!("there is no such text; take one of {names}"),
        ));
    }
    let part = |part: &str| {
        let file = format!("text/{name}/{part}.txt");
        decode(&file, read(&file)?)
    };
    Ok(Corpus {
        name: name.to_owned(),
        train: part("train")?,
        held_out: part("held_out")?,
    })
}

/// The text of a file that is UTF-8 and not empty.
pub(super) fn decode(file: &str, bytes: Vec<u8>) -> Result<String> {
    let text = String::from_utf8(bytes).map_err(|_| damaged(file, "it is not UTF-8"))?;
    if text.trim().is_empty() {
        return Err(damaged(file, "it is empty"));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn documents(text: &str) -> Vec<&str> {
        text.trim_end().split("\n\n").collect()
    }

    #[test]
    fn each_text_is_what_the_source_says() -> Result<()> {
        for (name, train, held_out, begins) in [
            ("sotu", 73, 4, "Fellow-Citizens of the Senate"),
            ("kjv", 346, 48, "In the beginning God created"),
            ("hamlet", 16, 4, "ACT I\nSCENE I. Elsinore. A platform"),
        ] {
            let text = text(name)?;
            assert_eq!(text.name, name);
            assert_eq!(documents(&text.train).len(), train, "{name}");
            assert_eq!(documents(&text.held_out).len(), held_out, "{name}");
            assert!(text.train.starts_with(begins), "{name}");
            for part in [&text.train, &text.held_out] {
                let plain = |c: char| c == '\n' || c == ' ' || c.is_ascii_graphic();
                assert!(part.chars().all(plain), "{name}");
                assert!(part.ends_with('\n') && !part.contains("\n\n\n"), "{name}");
                assert!(!part.contains("  "), "{name}");
            }
        }
        Ok(())
    }

    /// No 200 characters on end of what is held out occur in what is learnt from.
    #[test]
    fn what_is_held_out_is_not_in_the_training_part() -> Result<()> {
        for name in NAMES {
            let text = text(name)?;
            assert!(text.train.is_ascii() && text.held_out.is_ascii());
            let mut pieces = 0;
            for document in documents(&text.held_out) {
                assert!(!text.train.contains(document), "{name}: {document:.60}");
                // Any run of 200 characters holds one of these whole.
                for piece in document.as_bytes().chunks_exact(100) {
                    let piece = std::str::from_utf8(piece).unwrap_or_default();
                    assert!(!text.train.contains(piece), "{name}: {piece}");
                    pieces += 1;
                }
            }
            assert!(pieces > 200, "{name}: {pieces}");
        }
        Ok(())
    }

    #[test]
    fn an_unknown_text_is_answered_with_those_that_exist() {
        let said = text("sotu.txt").unwrap_err().to_string();
        assert!(said.contains("\"sotu.txt\"") && said.contains("sotu, kjv, hamlet"));
    }

    #[test]
    fn a_damaged_text_says_how_to_get_it_back() {
        for bytes in [vec![b'a', 0xff], vec![], b" \n".to_vec()] {
            let said = decode("text/x.txt", bytes).unwrap_err().to_string();
            assert!(said.contains("data/text/x.txt") && said.contains("git restore data"));
        }
    }
}
