//! A GGUF file of llama.cpp, read as the folder of Hugging Face that it was made from.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::{DType, Device, Result as CandleResult, Shape, Tensor, bail};
use candle_nn::VarBuilder;
use candle_nn::var_builder::SimpleBackend;
use serde_json::json;

use crate::{Error, Result};

/// A Llama in GGUF: its weights under transformers' names, one at a time, and its sizes as a
/// `config.json`.
///
/// Source: llama.cpp `gguf-py/gguf/tensor_mapping.py` and `convert_hf_to_gguf.py`, `LlamaModel`.
pub(super) struct Gguf {
    path: PathBuf,
    content: Content,
    file: Mutex<BufReader<File>>,
    /// GGUF's names by those of transformers.
    names: BTreeMap<String, String>,
}

impl fmt::Debug for Gguf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gguf({})", self.path.display())
    }
}

impl Gguf {
    /// Reads what stands before the weights.
    ///
    /// # Errors
    ///
    /// A file that is no GGUF, or of another kind of model than Llama.
    pub fn open(path: &Path) -> Result<Self> {
        let mut file = BufReader::new(File::open(path).map_err(Error::file(path))?);
        let damaged = |problem: &str| Error::damaged(path.display(), problem, "take another file");
        let content = Content::read(&mut file)
            .map_err(|error| damaged(&format!("it cannot be read as GGUF ({error})")))?;
        let mut gguf = Self {
            path: path.to_path_buf(),
            content,
            file: Mutex::new(file),
            names: BTreeMap::new(),
        };
        let kind = gguf.text("general.architecture")?;
        if kind != "llama" {
            let problem =
                format!("it holds a model of the kind {kind:?}, and only \"llama\" is read");
            return Err(damaged(&problem));
        }
        let scaled = gguf.content.metadata.get("llama.rope.scaling.type");
        if scaled.is_some_and(|kind| !kind.to_string().is_ok_and(|kind| kind == "none")) {
            return Err(damaged(
                "its rotary embedding is scaled, which this model does not do",
            ));
        }
        for theirs in gguf.content.tensor_infos.keys() {
            let Some(name) = name_of(theirs) else {
                let problem =
                    format!("it has a tensor {theirs:?}, which this model has no place for");
                return Err(damaged(&problem));
            };
            gguf.names.insert(name, theirs.clone());
        }
        Ok(gguf)
    }

    /// The metadata, with the tokenizer among them.
    pub fn content(&self) -> &Content {
        &self.content
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The sizes, as transformers would write them.
    pub fn config_json(&self) -> Result<Vec<u8>> {
        let count = |key: &str| {
            let value = self.value(key)?;
            let number = value.to_u64().or_else(|_| value.to_u32().map(u64::from));
            number.map_err(|_| self.refused(key, "no number"))
        };
        // 1e-5 of f32, as it was written: not 0.00000999999974737875.
        let real = |key: &str| -> Result<f64> {
            let value = self.value(key)?.to_f32();
            let value = value.map_err(|_| self.refused(key, "no f32"))?;
            let written = value.to_string().parse();
            written.map_err(|_| self.refused(key, "no number"))
        };
        let (hidden, heads) = (
            count("llama.embedding_length")?,
            count("llama.attention.head_count")?,
        );
        let vocabulary = self.value("tokenizer.ggml.tokens")?.to_vec();
        let vocabulary =
            vocabulary.map_err(|_| self.refused("tokenizer.ggml.tokens", "no list"))?;
        let mut config = json!({
            "model_type": "llama",
            "vocab_size": vocabulary.len(),
            "hidden_size": hidden,
            "intermediate_size": count("llama.feed_forward_length")?,
            "num_hidden_layers": count("llama.block_count")?,
            "num_attention_heads": heads,
            "num_key_value_heads": count("llama.attention.head_count_kv")?,
            "head_dim": match self.content.metadata.contains_key("llama.attention.key_length") {
                true => count("llama.attention.key_length")?,
                false => hidden / heads.max(1),
            },
            "rms_norm_eps": real("llama.attention.layer_norm_rms_epsilon")?,
            "rope_theta": match self.content.metadata.contains_key("llama.rope.freq_base") {
                true => real("llama.rope.freq_base")?,
                false => 10_000.0,
            },
            "max_position_embeddings": count("llama.context_length")?,
            "tie_word_embeddings": !self.names.contains_key("lm_head.weight"),
        });
        for (name, key) in [
            ("bos_token_id", "tokenizer.ggml.bos_token_id"),
            ("eos_token_id", "tokenizer.ggml.eos_token_id"),
        ] {
            if self.content.metadata.contains_key(key) {
                config[name] = count(key)?.into();
            }
        }
        Ok(config.to_string().into_bytes())
    }

    /// A text of the metadata.
    pub fn text(&self, key: &str) -> Result<&str> {
        let text = self.value(key)?.to_string();
        text.map(String::as_str)
            .map_err(|_| self.refused(key, "no text"))
    }

    fn value(&self, key: &str) -> Result<&Value> {
        let value = self.content.metadata.get(key);
        value.ok_or_else(|| self.refused(key, "missing"))
    }

    fn refused(&self, key: &str, problem: &str) -> Error {
        let problem = format!("its {key} is {problem}");
        Error::damaged(self.path.display(), &problem, "take another file")
    }

    /// transformers' names of all weights.
    pub fn names(&self) -> impl Iterator<Item = &String> {
        self.names.keys()
    }

    /// A weight by transformers' name, in f32.
    pub fn tensor(&self, name: &str, device: &Device) -> CandleResult<Tensor> {
        let Some(theirs) = self.names.get(name) else {
            bail!("{}: there is no tensor {name:?}", self.path.display())
        };
        let quantised = {
            let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
            self.content.tensor(&mut *file, theirs, device)?
        };
        let weight = quantised.dequantize(device)?;
        let heads = match name.rsplit('.').nth(1) {
            Some("q_proj") => "llama.attention.head_count",
            Some("k_proj") => "llama.attention.head_count_kv",
            _ => return Ok(weight),
        };
        let heads = self.content.metadata.get(heads);
        let heads = heads.and_then(|value| value.to_u32().ok()).unwrap_or(0) as usize;
        halves(&weight, heads)
    }

    /// All weights as a `VarBuilder`, which reads each when it is asked for.
    pub fn vb(self: &Arc<Self>, device: &Device) -> VarBuilder<'static> {
        let backend = Box::new(Reader(self.clone()));
        VarBuilder::from_backend(backend, DType::F32, device.clone())
    }
}

/// transformers' name of one of GGUF's.
fn name_of(theirs: &str) -> Option<String> {
    let fixed = match theirs {
        "token_embd.weight" => "model.embed_tokens.weight",
        "output_norm.weight" => "model.norm.weight",
        "output.weight" => "lm_head.weight",
        _ => {
            let (layer, part) = theirs.strip_prefix("blk.")?.split_once('.')?;
            let part = match part.strip_suffix(".weight")? {
                "attn_norm" => "input_layernorm",
                "attn_q" => "self_attn.q_proj",
                "attn_k" => "self_attn.k_proj",
                "attn_v" => "self_attn.v_proj",
                "attn_output" => "self_attn.o_proj",
                "ffn_norm" => "post_attention_layernorm",
                "ffn_gate" => "mlp.gate_proj",
                "ffn_up" => "mlp.up_proj",
                "ffn_down" => "mlp.down_proj",
                _ => return None,
            };
            let layer: usize = layer.parse().ok()?;
            return Some(format!("model.layers.{layer}.{part}.weight"));
        }
    };
    Some(fixed.to_string())
}

/// Rows of queries or keys from llama.cpp's order into that of transformers.
///
/// llama.cpp turns the numbers 2i and 2i + 1 of a head together, transformers i and i + half: each
/// head's even rows come first here, then its odd ones.
fn halves(weight: &Tensor, heads: usize) -> CandleResult<Tensor> {
    let (rows, columns) = weight.dims2()?;
    if heads == 0 || !rows.is_multiple_of(2 * heads) {
        bail!("{rows} rows do not split into {heads} heads of an even size")
    }
    weight
        .reshape((heads, rows / heads / 2, 2, columns))?
        .transpose(1, 2)?
        .reshape((rows, columns))
}

/// A file as the place where a `VarBuilder` finds its tensors.
struct Reader(Arc<Gguf>);

impl SimpleBackend for Reader {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: candle_nn::Init,
        dtype: DType,
        device: &Device,
    ) -> CandleResult<Tensor> {
        let tensor = self.get_unchecked(name, dtype, device)?;
        if tensor.shape() != &shape {
            bail!(
                "{name} is {:?} and should be {:?}",
                tensor.dims(),
                shape.dims()
            )
        }
        Ok(tensor)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> CandleResult<Tensor> {
        self.0.tensor(name, device)?.to_dtype(dtype)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.0.names.contains_key(name)
    }
}
