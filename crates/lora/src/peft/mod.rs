//! Adapter folders of Hugging Face PEFT: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! [`AdapterConfig`] is the configuration file, [`AdapterFiles`] the whole folder. Reading checks
//! everything that can be checked without the model: option names, types and values, tensor
//! names, number types, shapes, ranks, and that every number is finite. What is not understood is
//! refused by name; nothing is skipped in silence. Options that change the arithmetic and are not
//! built here stand in [`REFUSED`].
//!
//! Files of PEFT 0.2 and later are read. What is written loads in PEFT 0.21.
//!
//! Limits: a configuration of 4 MiB, a safetensors header of 16 MiB. Whatever the files say, memory
//! stays within a multiple of their size: about 3 bytes for each byte of numbers, and at the very
//! worst 71 for each byte of JSON. `adapter_model.bin` is refused: it is a pickle file, and there
//! is no reader for it that damaged or hostile files cannot bring down. The error tells how to
//! convert it.
//!
//! ```
//! use std::collections::BTreeMap;
//! use candle_core::{DType, Device, Tensor};
//! use lora::LoraConfig;
//! use lora::peft::{AdapterConfig, AdapterFiles};
//!
//! let folder = tempfile::tempdir()?;
//! let mut tensors = BTreeMap::new();
//! for (part, shape) in [("lora_A", (2, 5)), ("lora_B", (7, 2))] {
//!     let key = format!("base_model.model.layers.0.q_proj.{part}.weight");
//!     tensors.insert(key, Tensor::ones(shape, DType::F32, &Device::Cpu)?);
//! }
//! let config = AdapterConfig::from(LoraConfig::new(2, 4.0).with_targets(["q_proj"]));
//! AdapterFiles { config, tensors }.write(folder.path())?;
//!
//! let files = AdapterFiles::read(folder.path(), &Device::Cpu)?;
//! let modules = files.modules()?;
//! assert_eq!(modules["layers.0.q_proj"].lora_b.as_ref().unwrap().dims(), [7, 2]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod config;
mod model;
mod modules;
mod names;
mod read;
mod refused;
mod tensors;
mod var_builder;
mod write;

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::Tensor;

pub use config::{AdapterConfig, AdapterKind};
pub use modules::ModuleTensors;
pub use names::{Part, TensorName};
pub use read::ReadOptions;
pub use refused::REFUSED;
pub use var_builder::{MergedVarBuilder, merged_var_builder, merged_var_builder_tied};

use crate::{Error, Result};

pub(crate) const CONFIG_NAME: &str = "adapter_config.json";
pub(crate) const WEIGHTS_NAME: &str = "adapter_model.safetensors";
const PICKLE_NAME: &str = "adapter_model.bin";

/// An adapter folder in memory.
///
/// ```
/// use std::collections::BTreeMap;
/// use lora::{LoraConfig, peft::{AdapterConfig, AdapterFiles}};
///
/// let config = AdapterConfig::from(LoraConfig::new(2, 4.0));
/// let files = AdapterFiles { config, tensors: BTreeMap::new() };
/// assert!(files.modules()?.is_empty());
/// # Ok::<(), lora::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct AdapterFiles {
    /// `adapter_config.json`.
    pub config: AdapterConfig,
    /// The tensors of `adapter_model.safetensors` under the names that PEFT gives them when it
    /// saves one adapter, such as `base_model.model.layers.0.q_proj.lora_A.weight`.
    ///
    /// Reading turns every other spelling into this one, see [`TensorName`].
    pub tensors: BTreeMap<String, Tensor>,
}

/// What is wrong with a file, said with its path.
fn bad_file(path: &Path, why: impl Into<String>) -> Error {
    Error::File {
        path: path.to_path_buf(),
        why: why.into(),
    }
}

/// The first few of `names`, in quotes, each cut to a readable length.
fn shown<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    const FEW: usize = 5;
    let mut names = names.into_iter();
    let first: Vec<String> = names
        .by_ref()
        .take(FEW)
        .map(|n| format!("{:?}", cut(n)))
        .collect();
    match names.count() {
        0 => first.join(", "),
        more => format!("{} and {more} more", first.join(", ")),
    }
}

/// `text`, or its start when it is long.
fn cut(text: &str) -> String {
    const LONG: usize = 120;
    if text.chars().nth(LONG).is_none() {
        text.to_string()
    } else {
        text.chars().take(LONG).chain("...".chars()).collect()
    }
}

/// Refuses an adapter name that could lead out of its folder.
fn checked_name(name: &str) -> Result<&str> {
    let plain = |c: char| c.is_alphanumeric() || c == '-' || c == '_';
    if !name.is_empty() && name.chars().all(plain) {
        Ok(name)
    } else {
        Err(Error::AdapterName { name: cut(name) })
    }
}
