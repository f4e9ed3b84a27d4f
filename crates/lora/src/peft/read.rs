//! Reading an adapter folder.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use candle_core::Device;

use super::config::CONFIG_LIMIT;
use super::write::pending_config;
use super::{
    AdapterConfig, AdapterFiles, CONFIG_NAME, PICKLE_NAME, WEIGHTS_NAME, bad_file, checked_name,
    shown, tensors,
};
use crate::Result;

/// How an adapter folder is read.
///
/// ```
/// let options = lora::peft::ReadOptions::default();
/// assert!(options.adapter.is_none() && !options.allow_non_finite);
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReadOptions {
    /// The adapter's name, when it lies in a folder of that name inside the given one. PEFT puts
    /// every adapter there but `"default"`. The given folder itself is read when there is no
    /// such folder in it.
    pub adapter: Option<String>,
    /// Reads a file with NaN or infinite numbers too.
    pub allow_non_finite: bool,
}

impl AdapterFiles {
    /// Reads and checks the adapter in `folder`.
    ///
    /// The tensors become f32 on `device`; f64 stays f64.
    ///
    /// # Errors
    ///
    /// What [`AdapterConfig::from_json`] and [`modules`](Self::modules) refuse, with the file's
    /// path, and [`Error::File`](crate::Error::File) when a file is missing, damaged or too
    /// large, when there is only an `adapter_model.bin`, or when a tensor has another type than
    /// f32, f64, f16 and bf16 or holds a number that is not finite.
    ///
    /// ```
    /// use candle_core::Device;
    /// use lora::peft::AdapterFiles;
    ///
    /// let folder = tempfile::tempdir()?;
    /// let message = AdapterFiles::read(folder.path(), &Device::Cpu).unwrap_err().to_string();
    /// assert!(message.contains("no adapter_config.json"));
    /// # Ok::<(), std::io::Error>(())
    /// ```
    pub fn read(folder: impl AsRef<Path>, device: &Device) -> Result<Self> {
        Self::read_with(folder, &ReadOptions::default(), device)
    }

    /// Reads the adapter of this name: from the folder of that name inside `folder`, or from
    /// `folder` itself.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read), and [`Error::AdapterName`](crate::Error::AdapterName) when the
    /// name has other characters than letters, digits, `-` and `_`.
    ///
    /// ```
    /// use candle_core::Device;
    /// use lora::peft::AdapterFiles;
    ///
    /// let folder = tempfile::tempdir()?;
    /// let message = AdapterFiles::read_named(folder.path(), "../fr", &Device::Cpu).unwrap_err();
    /// assert!(message.to_string().contains("adapter name \"../fr\""));
    /// # Ok::<(), std::io::Error>(())
    /// ```
    pub fn read_named(folder: impl AsRef<Path>, adapter: &str, device: &Device) -> Result<Self> {
        let options = ReadOptions {
            adapter: Some(adapter.to_string()),
            ..ReadOptions::default()
        };
        Self::read_with(folder, &options, device)
    }

    /// Reads the adapter in `folder`, with options.
    ///
    /// # Errors
    ///
    /// As [`read_named`](Self::read_named).
    ///
    /// ```
    /// use std::collections::BTreeMap;
    /// use candle_core::{Device, Tensor};
    /// use lora::{LoraConfig, peft::{AdapterFiles, ReadOptions}};
    ///
    /// let folder = tempfile::tempdir()?;
    /// let row = Tensor::new(&[[f32::NAN]], &Device::Cpu)?;
    /// let tensors = BTreeMap::from([
    ///     ("x.lora_A.weight".to_string(), row.clone()),
    ///     ("x.lora_B.weight".to_string(), row),
    /// ]);
    /// AdapterFiles { config: LoraConfig::new(1, 1.0).into(), tensors }.write(folder.path())?;
    ///
    /// assert!(AdapterFiles::read(folder.path(), &Device::Cpu).is_err());
    /// let options = ReadOptions { allow_non_finite: true, ..ReadOptions::default() };
    /// assert!(AdapterFiles::read_with(folder.path(), &options, &Device::Cpu).is_ok());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn read_with(
        folder: impl AsRef<Path>,
        options: &ReadOptions,
        device: &Device,
    ) -> Result<Self> {
        let folder = located(folder.as_ref(), options.adapter.as_deref())?;
        let config_path = folder.join(CONFIG_NAME);
        let weights_path = folder.join(WEIGHTS_NAME);
        let (config, weights) = if pending_config::any(&folder) {
            let weights = read_weights(&weights_path)?;
            let own = pending_config::path(&folder, &weights);
            let config = read_config(if own.is_file() { &own } else { &config_path })?;
            (config, weights)
        } else {
            (read_config(&config_path)?, read_weights(&weights_path)?)
        };
        Self::checked(config, &weights, &weights_path, options, device)
    }

    /// Reads an adapter whose two files are in memory; [`ReadOptions::adapter`] has no effect.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read), with the files' names for their paths.
    ///
    /// ```
    /// use candle_core::Device;
    /// use lora::peft::{AdapterFiles, ReadOptions};
    ///
    /// let config = br#"{"peft_type": "LORA"}"#;
    /// let read = AdapterFiles::from_bytes(config, b"oops", &ReadOptions::default(), &Device::Cpu);
    /// assert!(read.unwrap_err().to_string().contains("4 bytes are too few"));
    /// ```
    pub fn from_bytes(
        config: &[u8],
        weights: &[u8],
        options: &ReadOptions,
        device: &Device,
    ) -> Result<Self> {
        let config = AdapterConfig::from_json(config)?;
        Self::checked(config, weights, Path::new(WEIGHTS_NAME), options, device)
    }

    fn checked(
        config: AdapterConfig,
        weights: &[u8],
        weights_path: &Path,
        options: &ReadOptions,
        device: &Device,
    ) -> Result<Self> {
        let files = Self {
            config,
            tensors: tensors::parse(weights, weights_path, options, device)?,
        };
        files.modules_of(weights_path)?;
        Ok(files)
    }
}

/// The folder that holds the adapter's files.
fn located(folder: &Path, adapter: Option<&str>) -> Result<PathBuf> {
    let own = match adapter {
        None => None,
        Some(name) => Some(folder.join(checked_name(name)?)),
    };
    let candidates = match own {
        None => vec![folder.to_path_buf()],
        Some(own) if adapter == Some("default") => vec![folder.to_path_buf(), own],
        Some(own) => vec![own, folder.to_path_buf()],
    };
    let holds = |path: &&PathBuf| path.join(CONFIG_NAME).exists() || pending_config::any(path);
    if let Some(found) = candidates.iter().find(holds) {
        return Ok(found.clone());
    }
    let mut inside: Vec<String> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.path().join(CONFIG_NAME).is_file())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    inside.sort();
    let hint = match (inside.as_slice(), adapter) {
        ([], Some(_)) => "neither here nor in a folder of the adapter's name".to_string(),
        ([], None) if !folder.is_dir() => "this is no folder".to_string(),
        ([], None) => "give the folder that PEFT's save_pretrained has written".to_string(),
        (names, _) => format!(
            "there are adapters in the folders {}; give one of these names",
            shown(names.iter().map(String::as_str))
        ),
    };
    Err(bad_file(folder, format!("no {CONFIG_NAME}; {hint}")))
}

fn read_config(path: &Path) -> Result<AdapterConfig> {
    let (file, len) = opened(path)?;
    if len > CONFIG_LIMIT as u64 {
        return Err(bad_file(
            path,
            format!("{len} bytes; at most {CONFIG_LIMIT} are read"),
        ));
    }
    AdapterConfig::parse(&content(path, file, Vec::new(), len)?, path)
}

fn read_weights(path: &Path) -> Result<Vec<u8>> {
    if !path.exists() {
        let pickle = path.with_file_name(PICKLE_NAME);
        return Err(if pickle.exists() {
            bad_file(&pickle, pickle_refused())
        } else {
            bad_file(
                path,
                "the file is missing; the folder must hold it beside adapter_config.json",
            )
        });
    }
    let (mut file, len) = opened(path)?;
    let mut start = Vec::with_capacity(8);
    let read = file.by_ref().take(8).read_to_end(&mut start);
    read.map_err(|error| bad_file(path, error.to_string()))?;
    tensors::check_header(&start, len, path)?;
    content(path, file, start, len)
}

fn pickle_refused() -> String {
    format!(
        "this is a pickle file, which is not read: it can hold any program. Convert it in Python:\n\
         import torch; from safetensors.torch import save_file\n\
         save_file({{k: v.clone().contiguous() for k, v in torch.load(\"{PICKLE_NAME}\", \
         map_location=\"cpu\", weights_only=True).items()}}, \"{WEIGHTS_NAME}\", \
         metadata={{\"format\": \"pt\"}})"
    )
}

/// A regular file and its length; never a pipe, which would wait forever.
fn opened(path: &Path) -> Result<(File, u64)> {
    let failed = |error: std::io::Error| bad_file(path, format!("cannot be read: {error}"));
    if !fs::metadata(path).map_err(failed)?.is_file() {
        return Err(bad_file(path, "this is no file"));
    }
    let file = File::open(path).map_err(failed)?;
    let len = file.metadata().map_err(failed)?.len();
    Ok((file, len))
}

/// All `len` bytes of the file; `start` holds those that were read already.
fn content(path: &Path, file: File, mut start: Vec<u8>, len: u64) -> Result<Vec<u8>> {
    let failed = |error: std::io::Error| bad_file(path, format!("cannot be read: {error}"));
    let more = len.saturating_sub(start.len() as u64);
    let room = usize::try_from(more).map_err(|_| bad_file(path, "too large for this machine"))?;
    let too_large = |_| bad_file(path, format!("{len} bytes do not fit into memory"));
    start.try_reserve_exact(room).map_err(too_large)?;
    file.take(more).read_to_end(&mut start).map_err(failed)?;
    if start.len() as u64 == len {
        Ok(start)
    } else {
        Err(bad_file(
            path,
            format!("{} of {len} bytes could be read", start.len()),
        ))
    }
}
