//! The data that the notebooks learn from, and how it becomes batches.
//!
//! - [`digits`](fn@digits): handwritten digits, 8 × 8 pixels;
//! - [`fashion`](fn@fashion): photographs of clothing, 28 × 28 pixels, as [`Images`];
//! - [`text`](fn@text): three kinds of English, each with a part that is held out;
//! - [`dialogue`](fn@dialogue): one of them as chats;
//! - [`emoji`](fn@emoji) and [`declaration`](fn@declaration): the same texts in eight languages;
//! - [`sentiment`](fn@sentiment): praise and blame in four domains, as [`TextSet`];
//! - [`newsgroups`](fn@newsgroups) and [`newswire`](fn@newswire): texts by their topic;
//! - [`Tokens`]: a stream of token ids, cut into windows for a language model;
//! - [`Sequences`]: chats or texts of their own, for its fine-tuning;
//! - [`Encodings`]: texts as token ids, in batches for an encoder;
//! - [`Labelled`]: the same with a class each; [`rows`](fn@rows): rows of a tensor by their places;
//! - [`fetched`](fn@fetched): the folder of what is too large to be committed.
//!
//! Every committed file lies in the checkout's `data/`, with its source and licence in
//! `data/manifest.toml`; `cargo course data list` shows them.

mod batches;
mod dialogue;
mod digits;
mod encodings;
mod fashion;
mod fetched;
mod labelled;
mod languages;
mod sentiment;
mod sequences;
mod text;
mod texts;
mod topics;

pub use batches::{ImageBatches, TokenBatches, Tokens};
pub use dialogue::{Dialogue, dialogue};
pub use digits::{Digits, digits};
pub use encodings::{Encodings, TextBatches};
pub use fashion::{FASHION_NAMES, Fashion, Images, fashion};
pub use fetched::fetched;
pub use labelled::Labelled;
pub use languages::{EMOJI_GROUPS, Emoji, LANGUAGES, declaration, emoji};
pub use sentiment::{DOMAINS, SENTIMENT_NAMES, sentiment};
pub use sequences::{SequenceBatches, Sequences};
pub use text::{Corpus, text};
pub use texts::{TextSet, Texts};
pub use topics::{NEWSGROUP_NAMES, NEWSWIRE_NAMES, newsgroups, newswire};

use crate::{Error, Result};
use candle_core::Tensor;
use std::path::{Path, PathBuf};

/// The checkout's `data/`; the environment variable `COURSE_DATA` names a copy of it elsewhere.
///
/// ```
/// assert!(course::data::folder().join("manifest.toml").is_file());
/// ```
#[must_use]
pub fn folder() -> PathBuf {
    match std::env::var_os("COURSE_DATA").filter(|folder| !folder.is_empty()) {
        Some(folder) => folder.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../data"),
    }
}

/// A file of the checkout's `data/`.
pub(crate) fn read(name: &str) -> Result<Vec<u8>> {
    let path = folder().join(name);
    std::fs::read(&path).map_err(Error::file(&path))
}

/// The error of a file of `data/` that is not what it should be.
pub(crate) fn damaged(name: &str, problem: &str) -> Error {
    let path = format_args!("data/{name}");
    Error::damaged(path, problem, "get it back with `git restore data`")
}

/// The error of data that cannot be had as it was asked for.
fn refused(name: &str, problem: impl Into<String>) -> Error {
    Error::Data {
        name: name.to_owned(),
        problem: problem.into(),
    }
}

/// The rows of a tensor at some places, in that order: vectors or labels of some texts.
///
/// # Shapes
/// `tensor` [n, …], k places → [k, …].
///
/// # Errors
/// A place beyond the last row; what candle reports.
///
/// ```
/// use course::{candle_core::{Device, Tensor}, data};
///
/// let labels = Tensor::new(&[7u32, 8, 9], &Device::Cpu)?;
/// assert_eq!(data::rows(&labels, &[2, 0])?.to_vec1::<u32>()?, [9, 7]);
/// # Ok::<(), course::Error>(())
/// ```
pub fn rows(tensor: &Tensor, places: &[usize]) -> Result<Tensor> {
    let places: Vec<u32> = places.iter().map(|&place| place as u32).collect();
    let places = Tensor::new(places, tensor.device())?;
    Ok(tensor.index_select(&places, 0)?)
}
