//! A trained model: a folder as Hugging Face lays it out, or a GGUF file.

mod gguf;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarBuilder;
use lora::quant::QuantConfig;
use lora::{LoraBuilder, LoraModel};

use super::{BertConfig, CnnConfig, GanConfig, LlamaConfig, QNetworkConfig, VaeConfig, ViTConfig};
use crate::meta::MetaConfig;
use crate::tokenizer::{ChatTemplate, Tokenizer, chat};
use crate::{Error, Result, data};

use gguf::Gguf;

/// The sizes of a model, as a `config.json` holds them.
///
/// A trait rather than serde's own, so that the reader is compiled with the model and not in every
/// cell of a notebook that loads one.
pub trait ModelConfig: Sized {
    /// The sizes in the text of a `config.json`.
    ///
    /// # Errors
    ///
    /// Text that is no JSON, or the sizes of another kind of model.
    fn from_json(json: &[u8]) -> serde_json::Result<Self>;
}

macro_rules! read_by_serde {
    ($($config:ty),*) => {$(
        impl ModelConfig for $config {
            fn from_json(json: &[u8]) -> serde_json::Result<Self> {
                serde_json::from_slice(json)
            }
        }
    )*};
}

read_by_serde!(
    LlamaConfig,
    BertConfig,
    ViTConfig,
    CnnConfig,
    GanConfig,
    QNetworkConfig,
    VaeConfig,
    MetaConfig
);

/// A folder with `model.safetensors`, `config.json` and, for a model that reads text,
/// `tokenizer.json`; or a GGUF file, which holds all of that.
///
/// The weights may be of any float type, and in a GGUF file of any type that candle reads; the
/// model gets them in f32 and under the names of transformers.
///
/// ```
/// let folder = course::data::folder().join("checkpoints/sotu-lm");
/// let base = course::models::Pretrained::open(folder)?;
/// let config: course::models::LlamaConfig = base.config()?;
/// assert_eq!(config.num_hidden_layers, 4);
/// # Ok::<(), course::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Pretrained {
    source: Source,
    /// What to do about a damaged file.
    remedy: String,
}

#[derive(Clone, Debug)]
enum Source {
    Folder(PathBuf),
    Gguf(Arc<Gguf>),
}

const WEIGHTS: &str = "model.safetensors";
const GGUF: &str = "model.gguf";

impl Pretrained {
    /// The model of a folder, such as a clone of a repository of Hugging Face's hub; or of a GGUF
    /// file of a Llama, such as `SmolLM2-135M-Instruct.Q4_1.gguf`, or of a folder with a `model.gguf`.
    ///
    /// # Errors
    ///
    /// A folder without `config.json` or `model.safetensors`; a GGUF file of another kind of model.
    ///
    /// ```
    /// let error = course::models::Pretrained::open("no/such/folder").unwrap_err().to_string();
    /// assert!(error.starts_with("no/such/folder/config.json"));
    /// ```
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::with_remedy(path.as_ref(), "take another copy of it")
    }

    /// A model that `cargo course data fetch NAME` has fetched: `"minilm"` or `"smollm2"`.
    ///
    /// # Errors
    ///
    /// As [`data::fetched`]; a set that is no model.
    ///
    /// ```
    /// let error = course::models::Pretrained::fetched("no-such-set").unwrap_err();
    /// assert!(error.to_string().contains("cargo course data fetch no-such-set"));
    /// ```
    pub fn fetched(name: &str) -> Result<Self> {
        let remedy = format!("get it anew with `cargo course data fetch {name}`");
        Self::with_remedy(&data::fetched(name)?, &remedy)
    }

    pub(super) fn with_remedy(path: &Path, remedy: &str) -> Result<Self> {
        let is_gguf = path.extension().is_some_and(|kind| kind == "gguf");
        let inside = path.join(GGUF);
        let source = if is_gguf && path.is_file() {
            Source::Gguf(Arc::new(Gguf::open(path, remedy)?))
        } else if inside.is_file() && !path.join(WEIGHTS).exists() {
            Source::Gguf(Arc::new(Gguf::open(&inside, remedy)?))
        } else {
            for file in ["config.json", WEIGHTS] {
                let path = path.join(file);
                // Says what keeps it from being read.
                std::fs::File::open(&path).map_err(Error::file(&path))?;
            }
            Source::Folder(path.to_path_buf())
        };
        Ok(Self {
            source,
            remedy: remedy.to_string(),
        })
    }

    /// A model of these weights, frozen, and the handle by which it gets adapters.
    ///
    /// `new` is the model's own constructor, such as `Llama::new`.
    ///
    /// # Errors
    ///
    /// Files that cannot be read or do not fit the model.
    ///
    /// ```
    /// use course::prelude::*;
    ///
    /// let base = Checkpoint::open("fashion-cnn")?;
    /// let (cnn, mut model) = base.frozen(&Device::Cpu, Cnn::new)?;
    /// let config = LoraConfig::new(4, 8.0).with_targets(["conv2", "conv3"]);
    /// model.add_adapter("default", &config, &mut rng(1))?;
    /// assert_eq!(model.parameter_count().trainable, 4 * (9 * 16 + 32) + 4 * (9 * 32 + 64));
    /// # let _ = cnn;
    /// # Ok::<(), course::Error>(())
    /// ```
    pub fn frozen<C: ModelConfig, M>(
        &self,
        device: &Device,
        new: impl FnOnce(&C, &LoraBuilder<'static>) -> Result<M>,
    ) -> Result<(M, LoraModel)> {
        let builder = LoraBuilder::new(self.vb(device)?);
        let model = new(&self.config()?, &builder)?;
        Ok((model, builder.model()?))
    }

    /// A model of these weights in which those train whose name `which` says yes to, and the
    /// variables of these, sorted by name. The others are frozen and cost no gradient.
    ///
    /// # Errors
    ///
    /// As [`frozen`](Self::frozen).
    ///
    /// ```
    /// use course::prelude::*;
    ///
    /// let base = Checkpoint::open("fashion-cnn")?;
    /// let (_, all) = base.trainable(&Device::Cpu, Cnn::new, |_| true)?;
    /// let (_, head) = base.trainable(&Device::Cpu, Cnn::new, |name| name.starts_with("head."))?;
    /// assert_eq!((all.len(), head.len()), (10, 2));
    /// assert_eq!(head[0].0, "head.bias");
    /// # Ok::<(), course::Error>(())
    /// ```
    pub fn trainable<C: ModelConfig, M>(
        &self,
        device: &Device,
        new: impl FnOnce(&C, &LoraBuilder<'static>) -> Result<M>,
        which: impl Fn(&str) -> bool + Send + Sync + 'static,
    ) -> Result<(M, Vec<(String, Var)>)> {
        let builder = LoraBuilder::trainable_where(self.vb(device)?, which);
        let model = new(&self.config()?, &builder)?;
        Ok((model, builder.variables()))
    }

    /// As [`frozen`](Self::frozen), with the weights of the layers that take it in 4 bits, for
    /// QLoRA: [`LoraBuilder::quantized`]. A [`Llama`](super::Llama)'s seven matrices in each layer
    /// take it; its embedding does not.
    ///
    /// The weights of a GGUF file are read and quantised one by one, so the model never stands in
    /// memory in full; a `model.safetensors` is held as it lies on the disk until the model is made.
    ///
    /// # Errors
    ///
    /// As [`frozen`](Self::frozen) and [`lora::quant::quantize`].
    ///
    /// ```
    /// use course::prelude::*;
    /// use lora::quant::QuantConfig;
    ///
    /// let base = Checkpoint::open("sotu-lm")?;
    /// let nf4 = QuantConfig::default();
    /// let (llama, model) = base.quantized(&Device::Cpu, &nf4, Llama::new)?;
    /// assert_eq!(model.parameter_count().all, llama.config().parameter_count());
    /// # Ok::<(), course::Error>(())
    /// ```
    pub fn quantized<C: ModelConfig, M>(
        &self,
        device: &Device,
        quantization: &QuantConfig,
        new: impl FnOnce(&C, &LoraBuilder<'static>) -> Result<M>,
    ) -> Result<(M, LoraModel)> {
        let builder = LoraBuilder::new(self.vb(device)?).quantized(*quantization);
        let model = new(&self.config()?, &builder)?;
        Ok((model, builder.model()?))
    }

    fn vb(&self, device: &Device) -> Result<VarBuilder<'static>> {
        match &self.source {
            Source::Gguf(gguf) => Ok(gguf.vb(device)),
            Source::Folder(_) => {
                let bytes = self.read(WEIGHTS)?;
                VarBuilder::from_buffered_safetensors(bytes, DType::F32, device)
                    .map_err(|error| self.damaged(WEIGHTS, &error.to_string()))
            }
        }
    }

    /// The weights by name, in f32.
    ///
    /// # Errors
    ///
    /// A file that cannot be read or is damaged.
    pub fn tensors(&self, device: &Device) -> Result<BTreeMap<String, Tensor>> {
        if let Source::Gguf(gguf) = &self.source {
            let tensor = |name: &String| Ok((name.clone(), gguf.tensor(name, device)?));
            return gguf.names().map(tensor).collect();
        }
        let tensors = candle_core::safetensors::load_buffer(&self.read(WEIGHTS)?, device)
            .map_err(|error| self.damaged(WEIGHTS, &error.to_string()))?;
        let wide = |(name, tensor): (String, Tensor)| Ok((name, tensor.to_dtype(DType::F32)?));
        tensors.into_iter().map(wide).collect()
    }

    /// The sizes in `config.json`.
    ///
    /// # Errors
    ///
    /// A file that cannot be read or is of another kind of model.
    pub fn config<C: ModelConfig>(&self) -> Result<C> {
        let (file, json) = match &self.source {
            Source::Gguf(gguf) => (GGUF, gguf.config_json()?),
            Source::Folder(_) => ("config.json", self.read("config.json")?),
        };
        C::from_json(&json).map_err(|error| self.damaged(file, &error.to_string()))
    }

    /// The tokenizer of a model that reads text.
    ///
    /// # Errors
    ///
    /// A file that cannot be read; a GGUF file whose tokenizer is of a kind that is not known.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        match &self.source {
            Source::Gguf(gguf) => Tokenizer::from_gguf(gguf.content()),
            Source::Folder(folder) => Tokenizer::open(folder.join("tokenizer.json")),
        }
    }

    /// How a model that was trained to chat wants its messages: the template of a GGUF file, of
    /// `chat_template.jinja`, or of `tokenizer_config.json`.
    ///
    /// # Errors
    ///
    /// A model without a template, or with one that is no Jinja.
    pub fn chat_template(&self) -> Result<ChatTemplate> {
        match &self.source {
            Source::Gguf(gguf) => ChatTemplate::from_gguf(gguf.content()),
            Source::Folder(folder) => ChatTemplate::open(folder),
        }
    }

    /// The token that ends a text, by `tokenizer_config.json` or the GGUF file; none where neither
    /// says.
    ///
    /// # Errors
    ///
    /// A `tokenizer_config.json` that cannot be read.
    pub fn eos_token(&self) -> Result<Option<String>> {
        match &self.source {
            Source::Gguf(gguf) => Ok(chat::eos_token_of_gguf(gguf.content())),
            Source::Folder(folder) => chat::eos_token_of_folder(folder),
        }
    }

    /// The file with the weights.
    #[must_use]
    pub fn weights_file(&self) -> PathBuf {
        self.path_of(WEIGHTS)
    }

    /// The size of the file with the weights in bytes.
    ///
    /// # Errors
    ///
    /// A file that is no longer there.
    ///
    /// ```
    /// let base = course::models::Checkpoint::open("fashion-cnn")?;
    /// assert_eq!(base.weights_bytes()?, 312_308);
    /// # Ok::<(), course::Error>(())
    /// ```
    pub fn weights_bytes(&self) -> Result<u64> {
        let path = self.weights_file();
        let metadata = std::fs::metadata(&path).map_err(Error::file(&path))?;
        Ok(metadata.len())
    }

    /// A file of the folder.
    pub(super) fn read(&self, file: &str) -> Result<Vec<u8>> {
        let path = self.path_of(file);
        std::fs::read(&path).map_err(Error::file(&path))
    }

    /// A file of the folder; the GGUF file holds all of them.
    fn path_of(&self, file: &str) -> PathBuf {
        match &self.source {
            Source::Gguf(gguf) => gguf.path().to_path_buf(),
            Source::Folder(folder) => folder.join(file),
        }
    }

    /// The error of a file that is not what it should be.
    pub(super) fn damaged(&self, file: &str, problem: &str) -> Error {
        Error::damaged(self.path_of(file).display(), problem, &self.remedy)
    }
}
