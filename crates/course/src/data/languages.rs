//! The same texts in several languages.

use super::text::decode;
use super::{Texts, damaged, read, refused};
use crate::Result;

/// The languages in which [`emoji`] and [`declaration`] exist: English, French, German, Spanish,
/// Italian, Finnish, Russian, Portuguese.
pub const LANGUAGES: [&str; 8] = ["en", "fr", "de", "es", "it", "fi", "ru", "pt"];

/// The groups of [`emoji`], by their label.
pub const EMOJI_GROUPS: [&str; 6] = [
    "smileys-emotion",
    "animals-nature",
    "food-drink",
    "travel-places",
    "activities",
    "objects",
];

/// How many paragraphs the articles of the declaration have.
const PARAGRAPHS: usize = 50;

/// Emoji in one language.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Emoji {
    /// Their names, such as "cat face", with their group: a place in [`EMOJI_GROUPS`].
    pub texts: Texts,
    /// What each has to do with, such as "cat", "face", "pet".
    pub tags: Vec<Vec<String>>,
    /// The signs themselves.
    pub characters: Vec<String>,
}

/// The names of 1,032 emoji of six groups in one of the [`LANGUAGES`] (Unicode CLDR, from
/// emojibase).
///
/// A row is the same emoji in every language. They are in Unicode's order, group after group.
///
/// # Errors
/// [`Error::Data`](crate::Error::Data) when the language is not there; it names those that are.
/// [`Error::File`](crate::Error::File) when a file cannot be read or is damaged.
///
/// ```
/// # fn main() -> Result<(), course::Error> {
/// use course::data;
/// let (english, french) = (data::emoji("en")?, data::emoji("fr")?);
/// assert_eq!(english.texts.texts[0], "grinning face");
/// assert_eq!(french.texts.texts[0], "visage rieur");
/// assert_eq!(english.characters, french.characters);
/// assert_eq!(english.texts.counts(), [171, 160, 131, 219, 85, 266]);
/// # Ok(())
/// # }
/// ```
pub fn emoji(language: &str) -> Result<Emoji> {
    known(language)?;
    let file = format!("text/emoji/{language}.tsv");
    emoji_of(&file, &decode(&file, read(&file)?)?)
}

/// The articles of the Universal Declaration of Human Rights in one of the [`LANGUAGES`]: 50
/// paragraphs without the preamble.
///
/// A place is the same paragraph in every language.
///
/// # Errors
/// As [`emoji`].
///
/// ```
/// # fn main() -> Result<(), course::Error> {
/// use course::data;
/// let english = data::declaration("en")?;
/// assert_eq!(english.len(), 50);
/// assert!(english[3].starts_with("Everyone has the right to life"));
/// assert!(data::declaration("de")?[3].starts_with("Jeder hat das Recht auf Leben"));
/// # Ok(())
/// # }
/// ```
pub fn declaration(language: &str) -> Result<Vec<String>> {
    known(language)?;
    let file = format!("text/declaration/{language}.txt");
    declaration_of(&file, &decode(&file, read(&file)?)?)
}

fn known(language: &str) -> Result<()> {
    if LANGUAGES.contains(&language) {
        return Ok(());
    }
    let problem = format!(
        "there is no such language; take one of {}",
        LANGUAGES.join(", ")
    );
    Err(refused(language, problem))
}

/// A line is sign, hexcode, group, name and tags, with tabs between them and `|` between tags.
fn emoji_of(file: &str, table: &str) -> Result<Emoji> {
    let (mut names, mut labels) = (Vec::new(), Vec::new());
    let (mut tags, mut characters) = (Vec::new(), Vec::new());
    for (i, line) in table.lines().enumerate() {
        let fields: Vec<_> = line.split('\t').collect();
        let [sign, _, group, name, tag] = fields[..] else {
            let problem = format!("line {} has {} fields, not 5", i + 1, fields.len());
            return Err(damaged(file, &problem));
        };
        let Some(label) = EMOJI_GROUPS.iter().position(|&known| known == group) else {
            return Err(damaged(file, &format!("there is no group {group:?}")));
        };
        names.push(name.to_owned());
        labels.push(label as u32);
        tags.push(tag.split('|').map(str::to_owned).collect());
        characters.push(sign.to_owned());
    }
    if names.is_empty() {
        return Err(damaged(file, "it is empty"));
    }
    Ok(Emoji {
        texts: Texts::new(names, labels, EMOJI_GROUPS.map(str::to_owned).to_vec())?,
        tags,
        characters,
    })
}

fn declaration_of(file: &str, text: &str) -> Result<Vec<String>> {
    let paragraphs: Vec<_> = text.lines().map(str::to_owned).collect();
    if paragraphs.len() != PARAGRAPHS {
        let problem = format!("it has {} lines, not {PARAGRAPHS}", paragraphs.len());
        return Err(damaged(file, &problem));
    }
    Ok(paragraphs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn a_row_is_the_same_emoji_in_every_language() -> Result<()> {
        let english = emoji("en")?;
        for (language, dog) in LANGUAGES.iter().zip([
            "dog",
            "chien",
            "Hund",
            "perro",
            "cane",
            "koira",
            "собака",
            "cachorro",
        ]) {
            let emoji = emoji(language)?;
            assert_eq!(emoji.characters, english.characters, "{language}");
            assert_eq!(emoji.texts.labels, english.texts.labels, "{language}");
            assert_eq!(emoji.texts.counts(), [171, 160, 131, 219, 85, 266]);
            assert_eq!(emoji.tags.len(), 1032);
            let place = emoji.characters.iter().position(|c| c == "🐕️");
            assert_eq!(emoji.texts.texts[place.unwrap_or(0)], dog, "{language}");
            // The hexcodes, which the source joins languages by.
            let file = format!("text/emoji/{language}.tsv");
            let table = decode(&file, read(&file)?)?;
            for (line, character) in table.lines().zip(&english.characters) {
                let points = line.split('\t').nth(1).unwrap_or_default().split('-');
                let points = points.map(|point| u32::from_str_radix(point, 16).unwrap());
                let bare = |point: &u32| *point != 0xfe0f; // "show it in colour"
                let sign = character.chars().map(u32::from).filter(bare);
                assert!(sign.eq(points.filter(bare)), "{line}");
            }
        }
        assert_eq!(
            english.characters.iter().collect::<HashSet<_>>().len(),
            1032
        );
        assert_eq!(english.tags[0][..3], ["cheerful", "cheery", "face"]);
        Ok(())
    }

    #[test]
    fn a_place_is_the_same_paragraph_in_every_language() -> Result<()> {
        for (language, right_to_life) in LANGUAGES.iter().zip([
            "Everyone has the right to life, liberty",
            "Tout individu a droit à la vie",
            "Jeder hat das Recht auf Leben",
            "Todo individuo tiene derecho a la vida",
            "Ogni individuo ha diritto alla vita",
            "Kullakin yksilöllä on oikeus elämään",
            "Каждый человек имеет право на жизнь",
            "Todo o indivíduo tem direito à vida",
        ]) {
            let paragraphs = declaration(language)?;
            assert_eq!(paragraphs.len(), 50);
            assert!(paragraphs[3].starts_with(right_to_life), "{language}");
            for paragraph in &paragraphs {
                assert!(paragraph.chars().next().is_some_and(char::is_alphabetic));
                let printed = |c| matches!(c, '\u{2010}' | '\u{2011}' | '\u{2019}' | '\u{a0}');
                assert!(!paragraph.contains(printed), "{paragraph}");
            }
        }
        Ok(())
    }

    #[test]
    fn an_unknown_language_is_answered_with_those_that_exist() {
        for error in [emoji("sv").unwrap_err(), declaration("sv").unwrap_err()] {
            let said = error.to_string();
            assert!(said.contains("\"sv\""), "{said}");
            assert!(said.contains("en, fr, de, es, it, fi, ru, pt"), "{said}");
        }
    }

    #[test]
    fn a_damaged_file_says_what_is_wrong_and_how_to_get_it_back() {
        let good = "🐕\t1F415\tanimals-nature\tdog\tpet";
        assert_eq!(emoji_of("f", good).unwrap().tags, [["pet"]]);
        let errors = [
            (emoji_of("f", "").err(), "empty"),
            (emoji_of("f", "🐕\t1F415\tdog").err(), "line 1 has 3 fields"),
            (
                emoji_of("f", &good.replace("animals", "beasts")).err(),
                "no group \"beasts-nature\"",
            ),
            (declaration_of("f", "a\nb\n").err(), "2 lines, not 50"),
        ];
        for (error, says) in errors {
            let said = error.unwrap().to_string();
            assert!(
                said.contains(says) && said.contains("git restore data"),
                "{said}"
            );
        }
    }
}
