//! Hamlet as chats.

use super::text;
use crate::Result;
use crate::tokenizer::Message;

/// Chats in two parts that share no scene.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dialogue {
    /// What a model learns from.
    pub train: Vec<Vec<Message>>,
    /// What it is tested on.
    pub held_out: Vec<Vec<Message>>,
}

/// The play as chats of two messages: somebody speaks, as the user, and the next one answers, as the
/// assistant. Lines of verse stay lines; stage directions are left out.
///
/// A chat has at most `words` words in each message, so that the many short answers of the play are
/// not drowned by its monologues.
///
/// # Errors
/// As [`text`].
///
/// ```
/// # fn main() -> Result<(), course::Error> {
/// let hamlet = course::data::dialogue(40)?;
/// assert_eq!(hamlet.train[0][0].content, "Who's there?");
/// assert_eq!(hamlet.train[0][1].content, "Nay, answer me: stand, and unfold yourself.");
/// assert!(hamlet.train.len() > 5 * hamlet.held_out.len());
/// # Ok(())
/// # }
/// ```
pub fn dialogue(words: usize) -> Result<Dialogue> {
    let play = text("hamlet")?;
    let short = |speech: &String| speech.split_whitespace().count() <= words;
    let chats = |part: &str| {
        let scenes = part.split("\n\n").map(speeches);
        let chats = scenes.flat_map(|speeches| {
            let pairs = speeches.windows(2);
            let chats = pairs.filter(|pair| pair.iter().all(short));
            let chats =
                chats.map(|pair| vec![Message::user(&pair[0]), Message::assistant(&pair[1])]);
            chats.collect::<Vec<_>>()
        });
        chats.collect()
    };
    Ok(Dialogue {
        train: chats(&play.train),
        held_out: chats(&play.held_out),
    })
}

/// Who speaks and is not written in capitals.
const SPEAKERS: [&str; 17] = [
    "Ghost",
    "First Player",
    "Player King",
    "Player Queen",
    "Prologue",
    "First Clown",
    "Second Clown",
    "First Priest",
    "First Sailor",
    "First Ambassador",
    "Captain",
    "Gentleman",
    "Messenger",
    "Servant",
    "Danes",
    "Lord",
    "All",
];

/// Stage directions in which nobody is named.
const DIRECTIONS: [&str; 31] = [
    "A noise within",
    "Aside",
    "Cock crows",
    "Dies",
    "Falls and dies",
    "Flourish of trumpets within",
    "Giving a paper",
    "Grappling with him",
    "He digs and sings",
    "Leaps into the grave",
    "March within",
    "Noise within",
    "Pours the poison into the sleeper's ears",
    "Puts down the skull",
    "Reads",
    "Retires and kneels",
    "Scattering flowers",
    "Sings",
    "Sleeps",
    "Takes the skull",
    "The Attendants part them, and they come out of the grave",
    "They play",
    "They prepare to play",
    "They retire without the door",
    "They swear",
    "Throws up a skull",
    "Throws up another skull",
    "To some Attendants",
    "Trumpets sound, and cannon shot off within",
    "A flourish of trumpets, and ordnance shot off, within",
    "Writing",
];

/// The speeches of a scene in their order.
fn speeches(scene: &str) -> Vec<String> {
    let mut speeches: Vec<String> = Vec::new();
    // What stands before the first speaker, the name of the scene among them, is no speech.
    let mut lines: Option<Vec<&str>> = None;
    for line in scene.lines() {
        if is_speaker(line) {
            speeches.extend(joined(lines.replace(Vec::new())));
        } else if let Some(lines) = lines.as_mut().filter(|_| !is_direction(line)) {
            lines.push(without_hint(line));
        }
    }
    speeches.extend(joined(lines));
    speeches
}

fn joined(lines: Option<Vec<&str>>) -> Option<String> {
    let lines: Vec<&str> = lines?.into_iter().filter(|line| !line.is_empty()).collect();
    (!lines.is_empty()).then(|| lines.join("\n"))
}

fn is_speaker(line: &str) -> bool {
    let capitals = line.len() > 2 && line.chars().all(|c| c == ' ' || c.is_ascii_uppercase());
    capitals && !line.starts_with("ACT ") || SPEAKERS.contains(&line)
}

fn is_direction(line: &str) -> bool {
    let first = line.split([' ', ',']).next().unwrap_or_default();
    let name = |word: &str| word.len() > 3 && word.chars().all(|c| c.is_ascii_uppercase());
    // A letter's signature ends in a quotation mark, a hint stands in brackets.
    let names = line.split(|c: char| !c.is_ascii_alphabetic()).any(name);
    matches!(first, "Enter" | "Exit" | "Exeunt" | "Re-enter")
        || DIRECTIONS.contains(&line)
        || names && !line.ends_with('\'') && !line.starts_with('[')
        || line.contains("Exeunt")
}

/// A line without the `[Aside]` before it.
fn without_hint(line: &str) -> &str {
    match line.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((_, said)) => said.trim_start(),
        None => line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scene_is_its_speeches() {
        let scene = "ACT I\nSCENE I. A platform.\nFRANCISCO at his post. Enter BERNARDO\nBERNARDO\n\
                     Who's there?\nFRANCISCO\n[Aside] Nay, answer me:\nSings\nunfold yourself.\n\
                     Enter Ghost\nGhost\nHAMLET\n'From HAMLET.'\nExeunt";
        let wanted = [
            "Who's there?",
            "Nay, answer me:\nunfold yourself.",
            "'From HAMLET.'",
        ];
        assert_eq!(speeches(scene), wanted);
    }

    #[test]
    fn no_direction_and_no_speaker_is_left_in_the_speeches() -> Result<()> {
        let play = text("hamlet")?;
        let mut count = 0;
        for speech in [&play.train, &play.held_out]
            .into_iter()
            .flat_map(|part| part.split("\n\n"))
            .flat_map(speeches)
        {
            count += 1;
            for line in speech.lines() {
                let capitals = line.split(|c: char| !c.is_ascii_alphabetic());
                let capitals = capitals.filter(|w| w.len() > 3 && *w == w.to_ascii_uppercase());
                assert!(capitals.count() == 0 || line.contains("HAMLET.'"), "{line}");
                assert!(
                    !line.contains("Exeunt") && !line.contains("Enter "),
                    "{line}"
                );
                // The edition marks a word that is lost.
                assert!(!line.replace("[ ]", "").contains(['[', ']']), "{line}");
            }
        }
        // As many as there are names before speeches, less where a direction stands alone.
        assert!((1100..1150).contains(&count), "{count}");
        Ok(())
    }

    #[test]
    fn chats_are_short_and_apart() -> Result<()> {
        let hamlet = dialogue(40)?;
        for chat in hamlet.train.iter().chain(&hamlet.held_out) {
            assert_eq!(
                (chat[0].role.as_str(), chat[1].role.as_str()),
                ("user", "assistant")
            );
            for message in chat {
                let words = message.content.split_whitespace().count();
                assert!((1..=40).contains(&words), "{message:?}");
            }
        }
        let long = |chat: &&Vec<Message>| chat.iter().all(|m| m.content.len() > 20);
        for chat in hamlet.held_out.iter().filter(long) {
            assert!(!hamlet.train.contains(chat), "{chat:?}");
        }
        assert_eq!(dialogue(0)?.train, Vec::<Vec<Message>>::new());
        Ok(())
    }
}
