//! Texts by topic: newsgroups and newswire.

use super::fetched::{damaged_set, lines_of};
use super::{TextSet, Texts, refused};
use crate::Result;

/// The set that holds the files.
const SET: &str = "topics";

/// The classes of [`newswire`], by their label.
pub const NEWSWIRE_NAMES: [&str; 8] = [
    "acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade",
];

/// The twenty newsgroups of [`newsgroups`].
pub const NEWSGROUP_NAMES: [&str; 20] = [
    "alt.atheism",
    "comp.graphics",
    "comp.os.ms-windows.misc",
    "comp.sys.ibm.pc.hardware",
    "comp.sys.mac.hardware",
    "comp.windows.x",
    "misc.forsale",
    "rec.autos",
    "rec.motorcycles",
    "rec.sport.baseball",
    "rec.sport.hockey",
    "sci.crypt",
    "sci.electronics",
    "sci.med",
    "sci.space",
    "soc.religion.christian",
    "talk.politics.guns",
    "talk.politics.mideast",
    "talk.politics.misc",
    "talk.religion.misc",
];

/// Letters to some newsgroups (20 Newsgroups, K. Lang 1995), with the groups as classes, in the
/// order in which they are named; `&NEWSGROUP_NAMES` are all.
///
/// The parts are the source's. A text that is in both, in two groups or there twice, of all twenty,
/// has left the training part. The texts are letters in lower case only, and as long as the source
/// has them.
///
/// # Errors
/// [`Error::Data`](crate::Error::Data) when a group does not exist (it names those that do) or is
/// named twice, when none is named, and when the set `topics` is not on this machine:
/// `cargo course setup` fetches it. [`Error::File`](crate::Error::File) when a file is damaged.
///
/// ```no_run
/// # fn main() -> Result<(), course::Error> {
/// let groups = ["comp.graphics", "comp.windows.x"];
/// let letters = course::data::newsgroups(&groups)?;
/// assert_eq!(letters.train.names, groups);
/// # Ok(())
/// # }
/// ```
pub fn newsgroups(groups: &[&str]) -> Result<TextSet> {
    check(groups)?;
    let all = both("20newsgroups", &NEWSGROUP_NAMES)?;
    Ok(TextSet {
        train: select(&all.train, groups)?,
        test: select(&all.test, groups)?,
    })
}

/// News of the agency Reuters from 1987 in eight classes, [`NEWSWIRE_NAMES`] (Reuters-21578 R8).
///
/// The parts are the source's; a text that is in both, in two classes or there twice has left the
/// training part. The classes are uneven: of "earn" there are thousands, of "grain" dozens.
///
/// # Errors
/// As [`newsgroups`].
///
/// ```no_run
/// # fn main() -> Result<(), course::Error> {
/// let news = course::data::newswire()?;
/// assert_eq!(news.train.names, course::data::NEWSWIRE_NAMES);
/// # Ok(())
/// # }
/// ```
pub fn newswire() -> Result<TextSet> {
    both("reuters-r8", &NEWSWIRE_NAMES)
}

fn check(groups: &[&str]) -> Result<()> {
    let known = NEWSGROUP_NAMES.join(", ");
    if groups.is_empty() {
        let problem = format!("name the groups that you want, of {known}");
        return Err(refused("newsgroups", problem));
    }
    for (i, group) in groups.iter().enumerate() {
        if !NEWSGROUP_NAMES.contains(group) {
            let problem = format!("there is no group {group:?}; there are {known}");
            return Err(refused("newsgroups", problem));
        }
        if groups[..i].contains(group) {
            let problem = format!("the group {group:?} is named twice; name each once");
            return Err(refused("newsgroups", problem));
        }
    }
    Ok(())
}

fn both(name: &str, classes: &[&str]) -> Result<TextSet> {
    let part = |part: &str| {
        let file = format!("{name}-{part}.tab");
        table(&file, &lines_of(SET, &file)?, classes)
    };
    TextSet::without_repeats(part("train")?, part("test")?)
}

/// Three lines of header and an empty one, then a line is class, tab, text.
fn table(file: &str, text: &str, classes: &[&str]) -> Result<Texts> {
    let (mut texts, mut labels) = (Vec::new(), Vec::new());
    for line in text.lines().skip(3).filter(|line| !line.is_empty()) {
        let row = line.split_once('\t').and_then(|(class, text)| {
            let label = classes.iter().position(|&known| known == class)?;
            (!text.trim().is_empty()).then(|| (label as u32, text.trim()))
        });
        let Some((label, text)) = row else {
            let problem = format!("{line:.60?} is no class and its text");
            return Err(damaged_set(SET, file, &problem));
        };
        texts.push(text.to_owned());
        labels.push(label);
    }
    if texts.is_empty() {
        return Err(damaged_set(SET, file, "it is empty"));
    }
    let names = classes.iter().map(ToString::to_string).collect();
    Texts::new(texts, labels, names)
}

/// The texts of some of the classes, which are numbered anew.
fn select(all: &Texts, classes: &[&str]) -> Result<Texts> {
    let label_of = |label: u32| {
        let name = &all.names[label as usize];
        classes.iter().position(|class| class == name)
    };
    let rows = all.texts.iter().zip(&all.labels);
    let (texts, labels) = rows
        .filter_map(|(text, &label)| Some((text.clone(), label_of(label)? as u32)))
        .unzip();
    let names = classes.iter().map(ToString::to_string).collect();
    Texts::new(texts, labels, names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::texts::tests::assert_apart;

    #[test]
    fn newsgroups_are_what_the_source_says() -> Result<()> {
        let all = newsgroups(&NEWSGROUP_NAMES)?;
        assert_apart(&all);
        assert_eq!(
            all.test.counts(),
            [
                319, 389, 394, 392, 385, 392, 390, 395, 398, 397, 399, 396, 393, 396, 394, 398,
                364, 376, 310, 251
            ]
        );
        assert_eq!(
            all.train.counts(),
            [
                480, 582, 568, 589, 577, 586, 578, 593, 594, 597, 600, 595, 588, 594, 592, 598,
                545, 564, 465, 377
            ]
        );
        let two = newsgroups(&["sci.med", "comp.graphics"])?;
        assert_eq!(two.train.names, ["sci.med", "comp.graphics"]);
        assert_eq!(
            two.train.counts(),
            [all.train.counts()[13], all.train.counts()[1]]
        );
        let first = |label| {
            let place = two.train.labels.iter().position(|&l| l == label);
            two.train.texts[place.unwrap_or(0)].as_str()
        };
        assert!(
            first(0).starts_with("info needed gaucher s disease"),
            "{:.60}",
            first(0)
        );
        assert!(
            first(1).starts_with("call for presentations navy"),
            "{:.60}",
            first(1)
        );
        for text in two.train.texts.iter().chain(&two.test.texts) {
            assert!(text.chars().all(|c| c == ' ' || c.is_ascii_lowercase()));
        }
        Ok(())
    }

    #[test]
    fn the_newswire_is_what_the_source_says() -> Result<()> {
        let news = newswire()?;
        assert_apart(&news);
        assert_eq!(news.test.counts(), [696, 121, 1083, 10, 81, 87, 36, 75]);
        assert_eq!(
            news.train.counts(),
            [1591, 245, 2835, 41, 168, 191, 105, 239]
        );
        assert!(
            news.train.texts[0].starts_with("champion products ch approves"),
            "{:.60}",
            news.train.texts[0]
        );
        Ok(())
    }

    #[test]
    fn groups_that_do_not_exist_are_answered_with_those_that_do() {
        let said = |groups: &[&str]| newsgroups(groups).unwrap_err().to_string();
        let unknown = said(&["sci.med", "sci.bio"]);
        assert!(unknown.contains("\"sci.bio\"") && unknown.contains("sci.med, sci.space"));
        assert!(said(&[]).contains("alt.atheism"));
        assert!(said(&["sci.med", "sci.med"]).contains("twice"));
    }

    #[test]
    fn a_damaged_file_says_what_is_wrong_and_how_to_get_it_anew() {
        let read = |rows: &str| table("f", &format!("h\nh\nh\n\n{rows}"), &["a", "b"]);
        let texts = read("b\tsome words \na\tmore\n").unwrap();
        assert_eq!(
            (texts.texts[0].as_str(), texts.labels),
            ("some words", vec![1, 0])
        );
        for (rows, says) in [
            ("", "empty"),
            ("c\tx", "\"c\\tx\""),
            ("a x", "no class"),
            ("a\t ", "no class"),
        ] {
            let said = read(rows).unwrap_err().to_string();
            assert!(
                said.contains(says) && said.contains("cargo course data fetch topics"),
                "{said}"
            );
        }
    }
}
