//! Text to tokens and back, by the `tokenizer.json` of Hugging Face.

mod batch;
pub(crate) mod chat;
mod gguf;

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use candle_core::Device;
use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::utils::truncation::TruncationDirection;
use tokenizers::{AddedToken, PostProcessor, TokenizerBuilder};

use crate::{Error, Result};

pub(crate) use batch::Precomputed;
pub use batch::TextBatch;
pub use chat::{ChatTemplate, Message};

/// The token between two documents, as in GPT-2 and SmolLM2.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// Cuts text into tokens and puts them together again.
///
/// ```
/// let text = "It is the duty of the people. It is the duty of the Congress.";
/// let tokenizer = course::tokenizer::Tokenizer::train(&[text], 270)?;
/// let ids = tokenizer.encode(text)?;
/// assert!(ids.len() < text.len(), "frequent pairs of letters have become one token");
/// assert_eq!(tokenizer.decode(&ids)?, text);
/// # Ok::<(), course::Error>(())
/// ```
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<dyn Inner>,
    /// The token of padding.
    pad: u32,
}

/// Hides the type, so that a notebook's cells need not compile how its many parts are dropped.
trait Inner: Send + Sync {
    fn get(&self) -> &tokenizers::Tokenizer;
}

impl Inner for tokenizers::Tokenizer {
    fn get(&self) -> &tokenizers::Tokenizer {
        self
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tokenizer({} tokens)", self.vocab_size())
    }
}

impl Tokenizer {
    /// Byte-pair encoding learned from `texts`: it starts from the 256 bytes and joins the most
    /// frequent pair until there are `vocab_size` tokens. [`END_OF_TEXT`] is token 0.
    ///
    /// Any text can be encoded and comes back as it was.
    ///
    /// Source: Sennrich et al. 2016, arXiv:1508.07909; byte-level as in GPT-2.
    ///
    /// # Errors
    ///
    /// A `vocab_size` below 257.
    ///
    /// ```
    /// use course::tokenizer::Tokenizer;
    ///
    /// assert!(Tokenizer::train(&["abc"], 256).is_err());
    /// ```
    pub fn train(texts: &[&str], vocab_size: usize) -> Result<Self> {
        if vocab_size < 257 {
            return Err(refused(format!(
                "vocab_size = {vocab_size}: 256 bytes and {END_OF_TEXT} need 257 at least"
            )));
        }
        let alphabet = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
        let mut trainer = BpeTrainerBuilder::new()
            .vocab_size(vocab_size)
            .show_progress(false)
            .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
            .initial_alphabet(alphabet.into_iter().collect())
            .build();
        let byte_level = || ByteLevel::default().add_prefix_space(false);
        let mut tokenizer = TokenizerBuilder::<
            BPE,
            tokenizers::NormalizerWrapper,
            ByteLevel,
            ByteLevel,
            ByteLevel,
        >::new()
        .with_model(BPE::default())
        .with_pre_tokenizer(Some(byte_level()))
        .with_decoder(Some(byte_level()))
        .build()
        .map_err(|error| refused(error.to_string()))?;
        tokenizer
            .train(&mut trainer, texts.iter())
            .map_err(|error| refused(error.to_string()))?;
        let json = tokenizer
            .to_string(false)
            .map_err(|error| refused(error.to_string()))?;
        Self::from_json(json.as_bytes())
    }

    /// The tokenizer of a `tokenizer.json`, without padding or truncation.
    ///
    /// # Errors
    ///
    /// A file that cannot be read or is no tokenizer.
    pub fn open(file: impl AsRef<Path>) -> Result<Self> {
        let file = file.as_ref();
        let bytes = std::fs::read(file).map_err(Error::file(file))?;
        Self::from_json(&bytes).map_err(|error| refused(format!("{}: {error}", file.display())))
    }

    /// As [`open`](Self::open), of a file's bytes.
    ///
    /// # Errors
    ///
    /// Bytes that are no tokenizer.
    pub fn from_json(json: &[u8]) -> Result<Self> {
        let read = tokenizers::Tokenizer::from_bytes(json);
        Self::of(read.map_err(|error| refused(error.to_string()))?, None)
    }

    /// The tokenizer, without padding or truncation; `pad` where its own does not say.
    fn of(mut inner: tokenizers::Tokenizer, pad: Option<u32>) -> Result<Self> {
        let padding = inner.get_padding().map(|padding| padding.pad_id);
        let padding = padding.or_else(|| inner.token_to_id("[PAD]"));
        let pad = padding.or(pad).unwrap_or(0);
        // Some files, MiniLM's among them, cut or fill every text to a fixed length.
        inner.with_padding(None);
        let cut = inner.with_truncation(None);
        cut.map_err(|error| refused(error.to_string()))?;
        Ok(Self {
            inner: Arc::new(inner),
            pad,
        })
    }

    /// The text of a `tokenizer.json`.
    ///
    /// # Errors
    ///
    /// What the crate tokenizers reports.
    pub fn to_json(&self) -> Result<String> {
        let json = self.inner.get().to_string(true);
        json.map_err(|error| refused(error.to_string()))
    }

    /// The tokens of a text, without any marks before or after it.
    ///
    /// # Errors
    ///
    /// What the crate tokenizers reports.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.inner.get().encode_fast(text, false);
        let encoding = encoding.map_err(|error| refused(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// As [`encode`](Self::encode), each token with the byte of the text at which it begins.
    ///
    /// # Errors
    ///
    /// What the crate tokenizers reports.
    pub(crate) fn encode_with_starts(&self, text: &str) -> Result<Vec<(u32, usize)>> {
        let encoding = self.inner.get().encode(text, false);
        let encoding = encoding.map_err(|error| refused(error.to_string()))?;
        let starts = encoding.get_offsets().iter().map(|(start, _)| *start);
        Ok(encoding.get_ids().iter().copied().zip(starts).collect())
    }

    /// The tokens of a text as the model reads it: with the special tokens that its
    /// `tokenizer.json` puts around it, such as `[CLS]` and `[SEP]`, and at most `max_length` with these.
    /// What is too long loses its end.
    ///
    /// # Errors
    ///
    /// A `max_length` that has no room for the special tokens and one more; what the crate
    /// tokenizers reports.
    ///
    /// ```
    /// let text = "It is the duty of the people.";
    /// let tokenizer = course::tokenizer::Tokenizer::train(&[text], 270)?;
    /// let ids = tokenizer.encode(text)?;
    /// // This one has no special tokens.
    /// assert_eq!(tokenizer.encode_for_model(text, 5)?, ids[..5]);
    /// # Ok::<(), course::Error>(())
    /// ```
    pub fn encode_for_model(&self, text: &str, max_length: usize) -> Result<Vec<u32>> {
        let (inner, failed) = (self.inner.get(), |error: tokenizers::Error| {
            refused(error.to_string())
        });
        let special = inner.get_post_processor();
        let special = special.map_or(0, |processor| processor.added_tokens(false));
        if max_length <= special {
            return Err(refused(format!(
                "max_length = {max_length}: {special} special tokens and one of the text need {}",
                special + 1
            )));
        }
        let mut encoding = inner.encode_fast(text, false).map_err(failed)?;
        encoding.truncate(max_length - special, 0, TruncationDirection::Right);
        let encoding = inner.post_process(encoding, None, true).map_err(failed)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Texts as the model reads them, each as
    /// [`encode_for_model`](Self::encode_for_model) gives it, filled up to the longest one.
    ///
    /// # Errors
    ///
    /// As there; no text at all, or one without any token.
    ///
    /// ```
    /// use course::prelude::*;
    ///
    /// let tokenizer = course::tokenizer::Tokenizer::train(&["ab"], 257)?;
    /// let batch = tokenizer.encode_batch(&["ab", "b"], 16, &Device::Cpu)?;
    /// assert_eq!(batch.attention_mask.to_vec2::<u8>()?, [[1, 1], [1, 0]]);
    /// # Ok::<(), course::Error>(())
    /// ```
    pub fn encode_batch(
        &self,
        texts: &[impl AsRef<str>],
        max_length: usize,
        device: &Device,
    ) -> Result<TextBatch> {
        let rows = texts.iter();
        let rows = rows.map(|text| self.encode_for_model(text.as_ref(), max_length));
        TextBatch::new(&rows.collect::<Result<Vec<_>>>()?, self.pad, device)
    }

    /// The id that fills up shorter texts of a batch.
    #[must_use]
    pub fn pad_id(&self) -> u32 {
        self.pad
    }

    /// The text of tokens; bytes that are no UTF-8 become �.
    ///
    /// # Errors
    ///
    /// What the crate tokenizers reports.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        let text = self.inner.get().decode(ids, false);
        text.map_err(|error| refused(error.to_string()))
    }

    /// The id of a token, such as the `<|im_end|>` at which an answer ends.
    ///
    /// ```
    /// use course::tokenizer::{END_OF_TEXT, Tokenizer};
    ///
    /// let tokenizer = Tokenizer::train(&["ab"], 257)?;
    /// assert_eq!(tokenizer.token_to_id(END_OF_TEXT), Some(0));
    /// assert_eq!(tokenizer.token_to_id("<|im_end|>"), None);
    /// # Ok::<(), course::Error>(())
    /// ```
    #[must_use]
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.get().token_to_id(token)
    }

    /// How many tokens there are.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.inner.get().get_vocab_size(true)
    }
}

fn refused(problem: String) -> Error {
    Error::Tokenizer { problem }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "the cat sat on the mat, the cat sat.";

    #[test]
    fn every_text_comes_back() {
        let tokenizer = Tokenizer::train(&[TEXT], 280).unwrap();
        for text in [
            TEXT,
            "",
            " two  spaces\n\nnew line",
            "Grüße, 日本 🙂",
            "\u{0}\r\t",
        ] {
            let ids = tokenizer.encode(text).unwrap();
            assert_eq!(tokenizer.decode(&ids).unwrap(), text);
        }
    }

    #[test]
    fn training_is_the_same_every_time_and_survives_the_file() {
        let one = Tokenizer::train(&[TEXT], 280).unwrap();
        let two = Tokenizer::train(&[TEXT], 280).unwrap();
        let json = one.to_json().unwrap();
        assert_eq!(json, two.to_json().unwrap());
        let again = Tokenizer::from_json(json.as_bytes()).unwrap();
        assert_eq!(again.vocab_size(), one.vocab_size());
        assert_eq!(again.encode(TEXT).unwrap(), one.encode(TEXT).unwrap());
        // " the" and " cat" are frequent enough to be single tokens.
        assert_eq!(one.encode(" cat").unwrap().len(), 1);
    }

    #[test]
    fn the_mark_between_documents_is_token_0() {
        let tokenizer = Tokenizer::train(&[TEXT], 280).unwrap();
        let ids = tokenizer.encode(&format!("cat{END_OF_TEXT}mat")).unwrap();
        assert_eq!(ids.iter().filter(|id| **id == 0).count(), 1);
    }

    #[test]
    fn refused() {
        let error = Tokenizer::from_json(b"{}").unwrap_err().to_string();
        assert!(error.starts_with("tokenizer: "), "{error}");
        let error = Tokenizer::open("no/such/tokenizer.json").unwrap_err();
        assert!(error.to_string().contains("no/such/tokenizer.json"));
    }
}
