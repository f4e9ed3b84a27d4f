//! Chats and texts as token ids with what a language model shall learn of them, in batches.

use super::batches::{Checked, Shuffled, by_similar_length, next_of};
use super::refused;
use crate::Result;
use crate::tokenizer::{ChatTemplate, Message, Tokenizer};
use candle_core::{Device, Tensor};
use lora::ops::IGNORE_INDEX;
use std::sync::Arc;

/// Token sequences for supervised fine-tuning of a language model, each with the tokens that count
/// in its loss. A clone shares them.
///
/// ```
/// use course::data::Sequences;
/// use course::prelude::*;
/// use course::tokenizer::{ChatTemplate, Message};
///
/// let tokenizer = Tokenizer::train(&["Hello! Hi."], 262)?;
/// let jinja = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}|{% endfor %}\
///              {% if add_generation_prompt %}a:{% endif %}";
/// let template = ChatTemplate::new(jinja, "", "|")?;
/// let chats = [vec![Message::user("Hello!"), Message::assistant("Hi.")]];
/// let chats = Sequences::chats(&chats, &tokenizer, &template, 64, &Device::Cpu)?;
/// // Of "u:Hello!|a:Hi.|" the answer and the mark of its end count.
/// let answer = tokenizer.encode("Hi.|")?;
/// assert_eq!(chats.counted(), answer.len());
/// let (ids, next) = chats.batches(1, 1).next().unwrap()?;
/// assert_eq!((ids.dtype(), next.dtype()), (DType::U32, DType::I64));
/// # Ok::<(), course::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Sequences {
    rows: Arc<[Row]>,
    pad: u32,
    left_out: usize,
    device: Device,
}

/// Ids, and for each the id that comes after it or [`IGNORE_INDEX`].
#[derive(Debug, Default)]
struct Row {
    ids: Vec<u32>,
    next: Vec<i64>,
}

impl Row {
    /// At most `max_length` of tokens that count or do not; None where none of them does.
    fn new(tokens: &[(u32, bool)], max_length: usize) -> Option<Self> {
        let tokens = &tokens[..tokens.len().min(max_length)];
        let after = tokens.get(1..)?;
        let next = |&(id, counts): &(u32, bool)| match counts {
            true => i64::from(id),
            false => IGNORE_INDEX,
        };
        let row = Self {
            ids: tokens.iter().map(|(id, _)| *id).take(after.len()).collect(),
            next: after.iter().map(next).collect(),
        };
        (row.counted() > 0).then_some(row)
    }

    fn counted(&self) -> usize {
        self.next.iter().filter(|id| **id != IGNORE_INDEX).count()
    }
}

impl Sequences {
    /// Chats, of which the assistant's messages count, each with the token that ends it; at most
    /// `max_length` tokens of each, of which the end is cut off.
    ///
    /// The template is filled in up to each of the assistant's messages and with it, and what is
    /// new is the answer; a token belongs to it that begins there.
    ///
    /// A chat whose answer begins behind `max_length` teaches nothing and is left out:
    /// [`left_out`](Self::left_out) counts these.
    ///
    /// # Errors
    /// [`Error::Data`](crate::Error::Data) for a chat without an answer, with its number; when no
    /// chat is left; for a template that changes earlier messages when there are more.
    pub fn chats(
        chats: &[Vec<Message>],
        tokenizer: &Tokenizer,
        template: &ChatTemplate,
        max_length: usize,
        device: &Device,
    ) -> Result<Self> {
        let end = tokenizer.token_to_id(template.eos_token());
        let mut rows = Vec::with_capacity(chats.len());
        for (number, chat) in chats.iter().enumerate() {
            let tokens = chat_tokens(chat, tokenizer, template, end);
            let tokens = tokens.map_err(|error| {
                refused("chats", format!("chat {number}, counted from 0: {error}"))
            })?;
            rows.push(Row::new(&tokens, max_length));
        }
        Self::of(rows, tokenizer, max_length, device)
    }

    /// Texts, of which every token counts and behind which `end` stands, such as `<|endoftext|>`;
    /// before them what the tokenizer puts there, such as `<s>`. A text longer than `max_length` becomes several sequences.
    ///
    /// # Errors
    /// [`Error::Data`](crate::Error::Data) when no text has two tokens; an `end` that is no token.
    ///
    /// ```
    /// use course::data::Sequences;
    /// use course::prelude::*;
    /// use course::tokenizer::END_OF_TEXT;
    ///
    /// let tokenizer = Tokenizer::train(&["ab"], 257)?;
    /// let texts = Sequences::texts(&["abab"], &tokenizer, END_OF_TEXT, 4, &Device::Cpu)?;
    /// // Four letters and the end: "abab" teaches three, the end alone after the last letter one.
    /// assert_eq!((texts.len(), texts.counted()), (2, 4));
    /// # Ok::<(), course::Error>(())
    /// ```
    pub fn texts(
        texts: &[impl AsRef<str>],
        tokenizer: &Tokenizer,
        end: &str,
        max_length: usize,
        device: &Device,
    ) -> Result<Self> {
        let Some(end) = tokenizer.token_to_id(end) else {
            let problem = format!("the tokenizer has no token {end:?} to end a text with");
            return Err(refused("texts", problem));
        };
        // Below 2 nothing is taught, and `of` says so.
        let step = max_length.saturating_sub(1).max(1);
        let mut rows = Vec::with_capacity(texts.len());
        for text in texts {
            let mut tokens = tokenizer.encode_for_model(text.as_ref(), usize::MAX)?;
            if tokens.last() != Some(&end) {
                tokens.push(end);
            }
            let tokens: Vec<(u32, bool)> = tokens.into_iter().map(|id| (id, true)).collect();
            // The last token of a piece begins the next one, so that each is predicted once.
            let mut first = 0;
            while first + 1 < tokens.len() {
                rows.push(Row::new(&tokens[first..], max_length));
                first += step;
            }
        }
        Self::of(rows, tokenizer, max_length, device)
    }

    fn of(
        rows: Vec<Option<Row>>,
        tokenizer: &Tokenizer,
        max_length: usize,
        device: &Device,
    ) -> Result<Self> {
        let all = rows.len();
        let rows: Vec<Row> = rows.into_iter().flatten().collect();
        if rows.is_empty() {
            let problem = format!(
                "none of {all} sequences has a token to learn within max_length = {max_length}; \
                 take a larger one, or other data"
            );
            return Err(refused("sequences", problem));
        }
        Ok(Self {
            left_out: all - rows.len(),
            rows: rows.into(),
            pad: tokenizer.pad_id(),
            device: device.clone(),
        })
    }

    /// How many sequences there are.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there are none; never so.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// How many were left out because nothing of them counts within the longest length.
    pub fn left_out(&self) -> usize {
        self.left_out
    }

    /// The tokens of all sequences that go through the model.
    pub fn tokens(&self) -> usize {
        self.rows.iter().map(|row| row.ids.len()).sum()
    }

    /// The tokens among them that count in the loss.
    pub fn counted(&self) -> usize {
        self.rows.iter().map(Row::counted).sum()
    }

    /// Endless batches in random order: the same `seed`, the same batches.
    ///
    /// In each epoch every sequence comes once, those of similar length together, as in
    /// [`Encodings::batches`](super::Encodings::batches). Every batch is full.
    ///
    /// # Shapes
    /// Each item is (ids, next), both [`batch`, length]: u32, and i64 with
    /// [`IGNORE_INDEX`] where nothing counts, for [`Llama::loss`](crate::models::Llama::loss).
    /// Shorter sequences are filled up at their end, which a causal model does not look at.
    ///
    /// # Errors
    /// The first item, and the only one, is [`Error::Data`](crate::Error::Data) when `batch` is 0
    /// or larger than the set.
    pub fn batches(&self, batch: usize, seed: u64) -> SequenceBatches {
        if batch == 0 || batch > self.len() {
            let problem = format!(
                "batch is {batch}, and there are {}; take a batch from 1 to that",
                self.len()
            );
            return SequenceBatches(Err(Some(refused("sequences", problem))));
        }
        SequenceBatches(Ok(Picks {
            sequences: self.clone(),
            batch,
            order: Shuffled::new(seed),
        }))
    }

    /// Every sequence once, shortest first, in batches of at most `batch`: for
    /// [`Llama::held_out_loss`](crate::models::Llama::held_out_loss).
    ///
    /// # Shapes
    /// As [`batches`](Self::batches).
    ///
    /// # Errors
    /// [`Error::Data`](crate::Error::Data) when `batch` is 0.
    pub fn in_order(&self, batch: usize) -> Result<Vec<(Tensor, Tensor)>> {
        if batch == 0 {
            return Err(refused("sequences", "batch is 0; take 1 or more"));
        }
        let mut order: Vec<usize> = (0..self.len()).collect();
        order.sort_by_key(|&place| self.rows[place].ids.len());
        let batches = order.chunks(batch).map(|places| self.batch(places));
        batches.collect()
    }

    fn batch(&self, places: &[usize]) -> Result<(Tensor, Tensor)> {
        let rows = || places.iter().map(|&place| &self.rows[place]);
        let length = rows().map(|row| row.ids.len()).max().unwrap_or(0);
        let mut ids = Vec::with_capacity(places.len() * length);
        let mut next = Vec::with_capacity(places.len() * length);
        for row in rows() {
            ids.extend_from_slice(&row.ids);
            next.extend_from_slice(&row.next);
            let full = ids.len().next_multiple_of(length);
            ids.resize(full, self.pad);
            next.resize(full, IGNORE_INDEX);
        }
        let shape = (places.len(), length);
        Ok((
            Tensor::from_vec(ids, shape, &self.device)?,
            Tensor::from_vec(next, shape, &self.device)?,
        ))
    }
}

/// The tokens of a chat, and which of them count.
fn chat_tokens(
    chat: &[Message],
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    end: Option<u32>,
) -> Result<Vec<(u32, bool)>> {
    let mut text = String::new();
    // Where each answer begins and ends in the text.
    let mut answers = Vec::new();
    for (place, message) in chat.iter().enumerate() {
        if message.role != "assistant" {
            continue;
        }
        let asked = template.apply(&chat[..place], true)?;
        let answered = template.apply(&chat[..=place], false)?;
        if !(asked.starts_with(&text) && answered.starts_with(&asked)) {
            return Err(refused(
                "template",
                "it writes earlier messages otherwise when there are more of them, so the answer \
                 cannot be told from the question; take one that only adds",
            ));
        }
        answers.push(asked.len()..answered.len());
        text = answered;
    }
    if answers.is_empty() {
        return Err(refused(
            "chat",
            "there is no message whose role is \"assistant\" to learn; add one",
        ));
    }
    let tokens = tokenizer.encode_with_starts(&text)?;
    let mut counted = vec![false; tokens.len()];
    for answer in answers {
        let own: Vec<usize> = (0..tokens.len())
            .filter(|place| answer.contains(&tokens[*place].1))
            .collect();
        // What the template writes behind the mark of the end, the model never says.
        let last = own.iter().rposition(|place| Some(tokens[*place].0) == end);
        let said = last.map_or(own.len(), |last| last + 1);
        own[..said].iter().for_each(|place| counted[*place] = true);
    }
    let ids = tokens.into_iter().map(|(id, _)| id);
    Ok(ids.zip(counted).collect())
}

/// The endless batches of [`Sequences::batches`].
#[derive(Debug)]
pub struct SequenceBatches(Checked<Picks>);

#[derive(Debug)]
struct Picks {
    sequences: Sequences,
    batch: usize,
    order: Shuffled,
}

impl Iterator for SequenceBatches {
    type Item = Result<(Tensor, Tensor)>;

    fn next(&mut self) -> Option<Self::Item> {
        next_of(&mut self.0, Picks::next)
    }
}

impl Picks {
    fn next(&mut self) -> Result<(Tensor, Tensor)> {
        let rows = &self.sequences.rows;
        let length = |place: usize| rows[place].ids.len();
        let places = self.order.next(self.batch, |rng| {
            Ok(by_similar_length(rows.len(), self.batch, length, rng))
        })?;
        self.sequences.batch(&places)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const JINJA: &str = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}|\n{% endfor %}\
                         {% if add_generation_prompt %}a:{% endif %}";

    fn bytes() -> Tokenizer {
        Tokenizer::train(&[""], 257).unwrap()
    }

    fn chats(chats: &[&[Message]], max_length: usize) -> Result<Sequences> {
        let chats: Vec<Vec<Message>> = chats.iter().map(|chat| chat.to_vec()).collect();
        let template = ChatTemplate::new(JINJA, "", "|")?;
        Sequences::chats(&chats, &bytes(), &template, max_length, &Device::Cpu)
    }

    /// What goes in, and what counts with a dot for each token that does not.
    fn shown(sequences: &Sequences, place: usize) -> (String, String) {
        let (tokenizer, row) = (bytes(), &sequences.rows[place]);
        let next = row.next.iter().map(|id| match u32::try_from(*id) {
            Ok(id) => tokenizer.decode(&[id]).unwrap(),
            Err(_) => ".".to_string(),
        });
        (tokenizer.decode(&row.ids).unwrap(), next.collect())
    }

    #[test]
    fn answers_and_their_ends_count() -> Result<()> {
        let chat = [
            Message::user("ab"),
            Message::assistant("cd"),
            Message::user("e"),
            Message::assistant("f"),
        ];
        let all = chats(&[&chat, &chat[..2]], 100)?;
        let (ids, next) = shown(&all, 0);
        assert_eq!(ids, "u:ab|\na:cd|\nu:e|\na:f|");
        assert_eq!(next, ".......cd|........f|.");
        assert_eq!(shown(&all, 1).1, ".......cd|.");
        assert_eq!((all.len(), all.left_out(), all.counted()), (2, 0, 8));
        // Without a mark of the end that is a token, all of the answer counts.
        let template = ChatTemplate::new(JINJA, "", "")?;
        let chats = [chat[..2].to_vec()];
        let all = Sequences::chats(&chats, &bytes(), &template, 100, &Device::Cpu)?;
        assert_eq!(shown(&all, 0).1, ".......cd|\n");
        Ok(())
    }

    #[test]
    fn what_is_too_long_loses_its_end_or_is_left_out() -> Result<()> {
        let (user, answer) = (Message::user("ab"), Message::assistant("cd"));
        let long = [Message::user("abcdef"), answer.clone()];
        let all = chats(&[&[user, answer], &long], 10)?;
        assert_eq!((all.len(), all.left_out()), (1, 1));
        assert_eq!(shown(&all, 0), ("u:ab|\na:c".into(), ".......cd".into()));
        let error = chats(&[&long], 10).unwrap_err().to_string();
        assert!(error.contains("max_length = 10"), "{error}");
        for max_length in [0, 1] {
            assert!(chats(&[&long], max_length).is_err());
        }
        Ok(())
    }

    #[test]
    fn what_teaches_nothing_is_refused() {
        let error = chats(
            &[
                &[Message::user("a"), Message::assistant("b")],
                &[Message::user("c")],
            ],
            9,
        );
        let error = error.unwrap_err().to_string();
        assert!(
            error.contains("chat 1") && error.contains("assistant"),
            "{error}"
        );
        let jinja = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}";
        let template = ChatTemplate::new(jinja, "", "").unwrap();
        let chat = [vec![Message::user("a"), Message::assistant("b")]];
        let error = Sequences::chats(&chat, &bytes(), &template, 9, &Device::Cpu).unwrap_err();
        assert!(error.to_string().contains("only adds"), "{error}");
        let error = Sequences::texts(&["a"], &bytes(), "<end>", 9, &Device::Cpu).unwrap_err();
        assert!(error.to_string().contains("<end>"), "{error}");
        assert!(
            Sequences::texts(
                &["a"],
                &bytes(),
                crate::tokenizer::END_OF_TEXT,
                1,
                &Device::Cpu
            )
            .is_err()
        );
    }

    #[test]
    fn every_token_of_a_text_is_predicted_once() -> Result<()> {
        let end = crate::tokenizer::END_OF_TEXT;
        let all = Sequences::texts(&["abcdefg", "", "h"], &bytes(), end, 4, &Device::Cpu)?;
        let rows: Vec<_> = (0..all.len()).map(|place| shown(&all, place)).collect();
        let of = |ids: &str, next: &str| (ids.to_string(), next.to_string());
        let last = format!("g{end}").replace('g', "");
        assert_eq!(
            rows,
            [
                of("abc", "bcd"),
                of("def", "efg"),
                of("g", &last),
                of("h", &last)
            ]
        );
        Ok(())
    }

    /// A tokenizer that puts marks around a text, as those of Llama 2 and 3 do.
    #[test]
    fn a_text_has_the_marks_that_its_tokenizer_puts_around_it() -> Result<()> {
        let mut json: serde_json::Value = serde_json::from_str(&bytes().to_json()?).unwrap();
        let id = |token: &str| bytes().token_to_id(token).unwrap();
        let special =
            |token: &str| serde_json::json!({"SpecialToken": {"id": token, "type_id": 0}});
        let text = serde_json::json!({"Sequence": {"id": "A", "type_id": 0}});
        json["post_processor"] = serde_json::json!({
            "type": "TemplateProcessing",
            "single": [special("<"), text, special("|")],
            "pair": [text],
            "special_tokens": {
                "<": {"id": "<", "ids": [id("<")], "tokens": ["<"]},
                "|": {"id": "|", "ids": [id("|")], "tokens": ["|"]},
            },
        });
        let marks = Tokenizer::from_json(json.to_string().as_bytes())?;
        let all = Sequences::texts(&["ab"], &marks, "|", 9, &Device::Cpu)?;
        assert_eq!(shown(&all, 0), ("<ab".into(), "ab|".into()));
        Ok(())
    }

    #[test]
    fn batches_are_full_seeded_and_filled_up() -> Result<()> {
        let end = crate::tokenizer::END_OF_TEXT;
        let texts: Vec<String> = (1..=11).map(|n| "x".repeat(n)).collect();
        let all = Sequences::texts(&texts, &bytes(), end, 64, &Device::Cpu)?;
        let lengths = |seed| -> Result<Vec<i64>> {
            let batches = all.batches(2, seed).take(11);
            let batches = batches.map(|batch| {
                let (ids, next) = batch?;
                assert_eq!(ids.dims(), next.dims());
                assert_eq!(ids.dim(0)?, 2);
                let next = next.to_vec2::<i64>()?;
                for (ids, next) in ids.to_vec2::<u32>()?.iter().zip(&next) {
                    let real = next.iter().filter(|id| **id != IGNORE_INDEX).count();
                    assert!(next[real..].iter().all(|id| *id == IGNORE_INDEX));
                    assert!(ids[real..].iter().all(|id| *id == 0));
                }
                let counts = next
                    .iter()
                    .map(|row| row.iter().filter(|id| **id >= 0).count() as i64);
                Ok(counts.collect::<Vec<_>>())
            });
            Ok(batches.collect::<Result<Vec<_>>>()?.concat())
        };
        let once = lengths(1)?;
        assert_eq!(once, lengths(1)?);
        assert_ne!(once, lengths(2)?);
        // 22 rows are two epochs of 11 texts.
        for epoch in once.chunks(11) {
            let mut epoch = epoch.to_vec();
            epoch.sort_unstable();
            assert_eq!(epoch, (1..=11).collect::<Vec<i64>>());
        }
        let whole: usize = all.in_order(4)?.iter().map(|(ids, _)| ids.dims()[0]).sum();
        assert_eq!(whole, 11);
        assert!(all.in_order(0).is_err());
        assert!(all.batches(12, 1).next().unwrap().is_err());
        assert!(all.batches(0, 1).next().unwrap().is_err());
        Ok(())
    }
}
