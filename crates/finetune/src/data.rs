//! Texts and chats from JSON lines.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use course::data::Sequences;
use course::models::Pretrained;
use course::prelude::{Device, Tokenizer};
use course::tokenizer::{ChatTemplate, END_OF_TEXT, Message};
use serde::Deserialize;

/// A file's content.
#[derive(Debug, PartialEq, Eq)]
pub enum Data {
    Texts(Vec<String>),
    Chats(Vec<Vec<Message>>),
}

/// A line.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    text: Option<String>,
    messages: Option<Vec<Said>>,
    prompt: Option<String>,
    completion: Option<String>,
}

/// A [`Message`] with nothing beside it that would be passed over, such as a weight of 0.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Said {
    role: String,
    content: String,
}

impl From<Said> for Message {
    fn from(Said { role, content }: Said) -> Self {
        Self { role, content }
    }
}

impl Data {
    /// Reads a file; a blank line counts for nothing.
    pub fn read(file: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
        let (mut texts, mut chats) = (Vec::new(), Vec::new());
        for (number, line) in (1..).zip(text.lines()) {
            if line.trim().is_empty() {
                continue;
            }
            let place = || format!("{}, line {number}", file.display());
            let line: Line = serde_json::from_str(line).with_context(place)?;
            match line {
                Line {
                    text: Some(text),
                    messages: None,
                    prompt: None,
                    completion: None,
                } => texts.push(text),
                Line {
                    text: None,
                    messages: Some(messages),
                    prompt: None,
                    completion: None,
                } => chats.push(messages.into_iter().map(Message::from).collect()),
                Line {
                    text: None,
                    messages: None,
                    prompt: Some(prompt),
                    completion: Some(completion),
                } => chats.push(vec![Message::user(prompt), Message::assistant(completion)]),
                _ => bail!(
                    "{}: give \"text\", or \"messages\", or \"prompt\" and \"completion\"",
                    place()
                ),
            }
            ensure!(
                texts.is_empty() || chats.is_empty(),
                "{}: texts and chats in one file; give one kind",
                place()
            );
        }
        match (texts.is_empty(), chats.is_empty()) {
            (false, _) => Ok(Self::Texts(texts)),
            (_, false) => Ok(Self::Chats(chats)),
            _ => bail!("{}: it has no line", file.display()),
        }
    }
}

/// How texts and chats become tokens, and tokens a text again.
pub struct Words {
    pub tokenizer: Tokenizer,
    /// Of a model that was trained to chat; what there is instead otherwise.
    template: Result<ChatTemplate, course::Error>,
    /// The token that ends a text.
    end: String,
}

/// What a model learns from, and in words how much that is.
pub struct Learned {
    pub sequences: Sequences,
    pub said: String,
    /// Whether these are chats and not texts.
    pub chats: bool,
}

impl Words {
    pub fn of(base: &Pretrained) -> Result<Self> {
        let tokenizer = base.tokenizer()?;
        let known = |token: &String| tokenizer.token_to_id(token).is_some();
        let own = base.eos_token()?;
        let usual = [END_OF_TEXT, "</s>"].map(|token| Some(token.to_string()));
        let end = [own].into_iter().chain(usual).flatten().find(known);
        Ok(Self {
            end: end.context(
                "the tokenizer has no token that ends a text; name one as eos_token in \
                 tokenizer_config.json",
            )?,
            tokenizer,
            template: base.chat_template(),
        })
    }

    fn template(&self) -> Result<&ChatTemplate> {
        let said = |error: &course::Error| anyhow::anyhow!("{error}");
        self.template.as_ref().map_err(said)
    }

    /// What a model learns from a file.
    pub fn learned(&self, file: &Path, max_length: usize, device: &Device) -> Result<Learned> {
        let data = Data::read(file)?;
        let (made, kind) = match &data {
            Data::Texts(texts) => (
                Sequences::texts(texts, &self.tokenizer, &self.end, max_length, device),
                "pieces of text",
            ),
            Data::Chats(chats) => {
                let template = self.template();
                let template =
                    template.with_context(|| format!("{} holds chats", file.display()))?;
                let made = Sequences::chats(chats, &self.tokenizer, template, max_length, device);
                (made, "chats")
            }
        };
        let made = made.with_context(|| file.display().to_string())?;
        let mut said = format!(
            "{} {kind}, {} tokens, {} of them to learn",
            made.len(),
            made.tokens(),
            made.counted()
        );
        if made.left_out() > 0 {
            let left = format!(
                "; {} left out, with nothing to learn in the first {max_length} tokens",
                made.left_out()
            );
            said.push_str(&left);
        }
        Ok(Learned {
            sequences: made,
            said,
            chats: matches!(data, Data::Chats(_)),
        })
    }

    /// A question to a model that chats, or the beginning of a text; and the token that ends what
    /// comes after it.
    pub fn asked(&self, prompt: &str, chats: bool) -> Result<(Vec<u32>, Option<u32>)> {
        let (ids, end) = if chats {
            let template = self.template()?;
            let text = template.apply(&[Message::user(prompt)], true)?;
            (self.tokenizer.encode(&text)?, template.eos_token())
        } else {
            let mut ids = self.tokenizer.encode_for_model(prompt, usize::MAX)?;
            let end = self.tokenizer.token_to_id(&self.end);
            ids.pop_if(|last| Some(*last) == end);
            (ids, self.end.as_str())
        };
        Ok((ids, self.tokenizer.token_to_id(end)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(lines: &str) -> Result<Data> {
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("data.jsonl");
        std::fs::write(&file, lines)?;
        Data::read(&file)
    }

    #[test]
    fn three_kinds_of_lines() -> Result<()> {
        let texts = read("{\"text\": \"one\"}\n\n{\"text\": \"\"}\r\n")?;
        assert_eq!(texts, Data::Texts(vec!["one".into(), String::new()]));
        let chats = read(
            "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}\n\
             {\"prompt\": \"b\", \"completion\": \"c\"}",
        )?;
        let wanted = vec![
            vec![Message::user("a")],
            vec![Message::user("b"), Message::assistant("c")],
        ];
        assert_eq!(chats, Data::Chats(wanted));
        Ok(())
    }

    /// A tokenizer that puts marks around a text, as those of Llama 2 and 3 do: the prompt is not
    /// ended before the answer.
    #[test]
    fn a_prompt_has_its_beginning_and_no_end() -> Result<()> {
        let bytes = Tokenizer::train(&[""], 257)?;
        let id = |token: &str| bytes.token_to_id(token).unwrap();
        let special =
            |token: &str| serde_json::json!({"SpecialToken": {"id": token, "type_id": 0}});
        let text = serde_json::json!({"Sequence": {"id": "A", "type_id": 0}});
        let mut json: serde_json::Value = serde_json::from_str(&bytes.to_json()?)?;
        json["post_processor"] = serde_json::json!({
            "type": "TemplateProcessing",
            "single": [special("<"), text, special("|")],
            "pair": [text],
            "special_tokens": {
                "<": {"id": "<", "ids": [id("<")], "tokens": ["<"]},
                "|": {"id": "|", "ids": [id("|")], "tokens": ["|"]},
            },
        });
        let words = Words {
            tokenizer: Tokenizer::from_json(json.to_string().as_bytes())?,
            template: ChatTemplate::new("{{ messages[0].content }}!", "", "|"),
            end: "|".into(),
        };
        let (ids, end) = words.asked("ab", false)?;
        assert_eq!(ids, ["<", "a", "b"].map(id));
        assert_eq!(end, Some(id("|")));
        // A chat has the marks that its template writes.
        let (ids, end) = words.asked("ab", true)?;
        assert_eq!(ids, ["a", "b", "!"].map(id));
        assert_eq!(end, Some(id("|")));
        Ok(())
    }

    #[test]
    fn a_bad_line_is_named() {
        for (lines, said) in [
            ("{\"text\": \"a\"}\n{\"text\": 1}", "line 2"),
            ("{\"txt\": \"a\"}", "line 1"),
            ("{\"prompt\": \"a\"}", "\"prompt\" and \"completion\""),
            ("{\"text\": \"a\", \"messages\": []}", "line 1: give"),
            (
                "\n{\"text\": \"a\"}\n{\"prompt\": \"a\", \"completion\": \"b\"}",
                "line 3: texts and chats",
            ),
            ("\n", "no line"),
            ("[]", "line 1"),
            (
                "{\"messages\": [{\"role\": \"user\", \"content\": \"a\", \"weight\": 0}]}",
                "weight",
            ),
        ] {
            let error = format!("{:#}", read(lines).unwrap_err());
            assert!(
                error.contains(said) && error.contains("data.jsonl"),
                "{error}"
            );
        }
    }
}
