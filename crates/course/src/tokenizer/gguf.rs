//! The tokenizer in a GGUF file.

use candle_core::quantized::gguf_file::Content;
use candle_core::quantized::tokenizer::TokenizerFromGguf;
use tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::{byte_level::ByteLevel, digits::Digits, sequence::Sequence};

use super::{Tokenizer, refused};
use crate::Result;

impl Tokenizer {
    /// The tokenizer of a GGUF file's metadata, of the kinds `gpt-2`, `smollm`, `qwen2` and
    /// `llama-bpe`.
    ///
    /// candle reads the tokens; how a text is cut before, it does not know for all of these, and
    /// what it does not know it cuts with a space in front.
    ///
    /// # Errors
    ///
    /// A file without a tokenizer, or with one of another kind.
    pub(crate) fn from_gguf(content: &Content) -> Result<Self> {
        let key = "tokenizer.ggml.pre";
        let kind = content.metadata.get(key).and_then(|v| v.to_string().ok());
        let byte_level = || ByteLevel::default().add_prefix_space(false);
        let cut: Option<PreTokenizerWrapper> = match kind.map(String::as_str) {
            Some("smollm") => {
                let parts = vec![Digits::new(true).into(), byte_level().into()];
                Some(Sequence::new(parts).into())
            }
            Some("gpt-2" | "gpt2") => Some(byte_level().into()),
            // candle's own.
            Some("qwen2" | "llama3" | "smaug-bpe") => None,
            other => {
                let other = other.unwrap_or("missing");
                return Err(refused(format!(
                    "{key} is {other}; known are gpt-2, smollm, qwen2 and llama3: take a folder \
                     with a tokenizer.json"
                )));
            }
        };
        let inner = tokenizers::Tokenizer::from_gguf(content);
        let mut inner = inner.map_err(|error| refused(error.to_string()))?;
        if let Some(cut) = cut {
            inner.with_pre_tokenizer(Some(cut));
        }
        let pad = content.metadata.get("tokenizer.ggml.padding_token_id");
        let pad = pad.and_then(|id| id.to_u32().ok());
        Self::of(inner, pad)
    }
}
