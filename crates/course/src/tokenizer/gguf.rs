//! The tokenizer in a GGUF file.

use candle_core::quantized::gguf_file::Content;
use candle_core::quantized::tokenizer::TokenizerFromGguf;
use tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::{byte_level::ByteLevel, digits::Digits, sequence::Sequence};

use super::{Tokenizer, refused};
use crate::Result;

impl Tokenizer {
    /// The tokenizer of a GGUF file's metadata, of the kinds `gpt-2`, `smollm`, `qwen2` and
    /// `llama3`.
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

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use candle_core::quantized::gguf_file::{Value, VersionedMagic};

    use super::*;

    fn content(kind: Option<&str>) -> Content {
        let text = |text: &str| Value::String(text.to_string());
        let list = |texts: &[&str]| Value::Array(texts.iter().map(|t| text(t)).collect());
        // Ġ stands for a space.
        let tokens = ["a", "b", "1", "2", "\u{120}", "12", "\u{120}a", "ab"];
        let mut metadata = HashMap::from([
            ("tokenizer.ggml.model".to_string(), text("gpt2")),
            ("tokenizer.ggml.tokens".to_string(), list(&tokens)),
            (
                "tokenizer.ggml.merges".to_string(),
                list(&["1 2", "\u{120} a", "a b"]),
            ),
        ]);
        if let Some(kind) = kind {
            metadata.insert("tokenizer.ggml.pre".to_string(), text(kind));
        }
        Content {
            magic: VersionedMagic::GgufV3,
            metadata,
            tensor_infos: HashMap::new(),
            tensor_data_offset: 0,
        }
    }

    #[test]
    fn every_kind_cuts_as_it_should() {
        let ids = |kind: &str, text: &str| {
            let tokenizer = Tokenizer::from_gguf(&content(Some(kind))).unwrap();
            tokenizer.encode(text).unwrap()
        };
        // No space is put in front.
        assert_eq!(ids("gpt-2", "ab a"), [7, 6]);
        assert_eq!(ids("smollm", "ab a"), [7, 6]);
        assert_eq!(ids("gpt-2", "12"), [5]);
        assert_eq!(ids("smollm", "12"), [2, 3], "digit by digit");
        assert_eq!(ids("qwen2", "12"), [2, 3], "digit by digit");
        assert_eq!(ids("llama3", "12"), [5], "up to three digits together");
    }

    #[test]
    fn other_kinds_are_refused_by_name() {
        for (kind, said) in [(Some("llama-bpe"), "llama-bpe"), (None, "missing")] {
            let error = Tokenizer::from_gguf(&content(kind))
                .unwrap_err()
                .to_string();
            assert!(error.contains(said) && error.contains("smollm"), "{error}");
        }
    }
}
