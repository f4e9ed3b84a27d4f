//! A GGUF file of llama.cpp, read as the folder of Hugging Face that it was made from.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::BufReader;
use std::panic::{AssertUnwindSafe, catch_unwind};
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
    /// What to do about a damaged file.
    remedy: String,
}

impl fmt::Debug for Gguf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gguf({})", self.path.display())
    }
}

impl Gguf {
    /// Reads what stands before the weights; `remedy` says what to do about a damaged file.
    ///
    /// # Errors
    ///
    /// A file that is no GGUF or not whole, or of another kind of model than Llama.
    pub fn open(path: &Path, remedy: &str) -> Result<Self> {
        let mut file = BufReader::new(File::open(path).map_err(Error::file(path))?);
        let damaged = |problem: &str| Error::damaged(path.display(), problem, remedy);
        // candle divides by the alignment that the file says, which may be 0.
        let content = catch_unwind(AssertUnwindSafe(|| Content::read(&mut file)));
        let content = content
            .map_err(|_| "its header makes no sense".to_string())
            .and_then(|content| content.map_err(|error| error.to_string()))
            .map_err(|problem| damaged(&format!("it cannot be read as GGUF ({problem})")))?;
        let mut gguf = Self {
            path: path.to_path_buf(),
            content,
            file: Mutex::new(file),
            names: BTreeMap::new(),
            remedy: remedy.to_string(),
        };
        let kind = gguf.text("general.architecture")?;
        if kind != "llama" {
            return Err(gguf.damaged(&format!(
                "it holds a model of the kind {kind:?}, and only \"llama\" is read"
            )));
        }
        gguf.check_rotary()?;
        let length = std::fs::metadata(path).map_err(Error::file(path))?.len();
        for (theirs, info) in &gguf.content.tensor_infos {
            let Some(name) = name_of(theirs) else {
                return Err(gguf.damaged(&format!(
                    "it has a tensor {theirs:?}, which this model has no place for"
                )));
            };
            let numbers = info
                .shape
                .dims()
                .iter()
                .try_fold(1usize, |n, d| n.checked_mul(*d));
            let bytes = numbers.and_then(|numbers| {
                let blocks = numbers / info.ggml_dtype.block_size().max(1);
                blocks.checked_mul(info.ggml_dtype.type_size())
            });
            let end = bytes.and_then(|bytes| {
                let start = gguf.content.tensor_data_offset.checked_add(info.offset)?;
                start.checked_add(bytes as u64)
            });
            if end.is_none_or(|end| end > length) {
                return Err(gguf.damaged(&format!("it ends in the middle of {theirs}")));
            }
            gguf.names.insert(name, theirs.clone());
        }
        Ok(gguf)
    }

    /// Refuses a rotary embedding that is scaled, or of a part of each head.
    ///
    /// Source: llama.cpp, which takes a factor without a type for a linear scaling.
    fn check_rotary(&self) -> Result<()> {
        let kind = self.content.metadata.get("llama.rope.scaling.type");
        let kind = kind.map(|kind| kind.to_string().map_or("?", String::as_str));
        let factor = ["llama.rope.scaling.factor", "llama.rope.scale_linear"];
        let factor = factor
            .iter()
            .find_map(|key| self.content.metadata.get(*key));
        let unscaled = factor.is_none_or(|factor| factor.to_f32().is_ok_and(|f| f == 1.0));
        if !(kind == Some("none") || kind.is_none() && unscaled) {
            return Err(
                self.damaged("its rotary embedding is scaled, which this model does not do")
            );
        }
        let turned = "llama.rope.dimension_count";
        if self.has(turned) && self.count(turned)? != self.head_dim()? {
            return Err(
                self.damaged("it turns a part of each head only, which this model does not do")
            );
        }
        Ok(())
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
        // 1e-5 of f32, as it was written: not 0.00000999999974737875.
        let real = |key: &str| -> Result<f64> {
            let value = self.value(key)?.to_f32();
            let value = value.map_err(|_| self.refused(key, "no f32"))?;
            let written = value.to_string().parse();
            written.map_err(|_| self.refused(key, "no number"))
        };
        let vocabulary = self.value("tokenizer.ggml.tokens")?.to_vec();
        let vocabulary =
            vocabulary.map_err(|_| self.refused("tokenizer.ggml.tokens", "no list"))?;
        let config = json!({
            "model_type": "llama",
            "vocab_size": vocabulary.len(),
            "hidden_size": self.count("llama.embedding_length")?,
            "intermediate_size": self.count("llama.feed_forward_length")?,
            "num_hidden_layers": self.count("llama.block_count")?,
            "num_attention_heads": self.heads()?,
            "num_key_value_heads": self.kv_heads()?,
            "head_dim": self.head_dim()?,
            "rms_norm_eps": real("llama.attention.layer_norm_rms_epsilon")?,
            "rope_theta": match self.has("llama.rope.freq_base") {
                true => real("llama.rope.freq_base")?,
                false => 10_000.0,
            },
            "max_position_embeddings": self.count("llama.context_length")?,
            "tie_word_embeddings": !self.names.contains_key("lm_head.weight"),
        });
        Ok(config.to_string().into_bytes())
    }

    fn heads(&self) -> Result<u64> {
        self.count("llama.attention.head_count")
    }

    /// As many as heads, where the file does not say.
    fn kv_heads(&self) -> Result<u64> {
        let key = "llama.attention.head_count_kv";
        if self.has(key) {
            self.count(key)
        } else {
            self.heads()
        }
    }

    fn head_dim(&self) -> Result<u64> {
        let key = "llama.attention.key_length";
        if self.has(key) {
            return self.count(key);
        }
        Ok(self.count("llama.embedding_length")? / self.heads()?.max(1))
    }

    fn has(&self, key: &str) -> bool {
        self.content.metadata.contains_key(key)
    }

    /// A number of the metadata, of whatever width.
    fn count(&self, key: &str) -> Result<u64> {
        let value = self.value(key)?;
        let number = value.to_u64().or_else(|_| value.to_u32().map(u64::from));
        let number = number.or_else(|_| Ok(value.to_i32()?.try_into()?));
        number.map_err(|_: Box<dyn std::error::Error>| self.refused(key, "no number"))
    }

    /// A text of the metadata.
    fn text(&self, key: &str) -> Result<&str> {
        let text = self.value(key)?.to_string();
        text.map(String::as_str)
            .map_err(|_| self.refused(key, "no text"))
    }

    fn value(&self, key: &str) -> Result<&Value> {
        let value = self.content.metadata.get(key);
        value.ok_or_else(|| self.refused(key, "missing"))
    }

    fn refused(&self, key: &str, problem: &str) -> Error {
        self.damaged(&format!("its {key} is {problem}"))
    }

    fn damaged(&self, problem: &str) -> Error {
        Error::damaged(self.path.display(), problem, &self.remedy)
    }

    /// transformers' names of all weights.
    pub fn names(&self) -> impl Iterator<Item = &String> {
        self.names.keys()
    }

    /// A weight by transformers' name, in f32.
    ///
    /// # Errors
    ///
    /// A name that the file does not have; a weight that cannot be read.
    pub fn tensor(&self, name: &str, device: &Device) -> Result<Tensor> {
        let Some(theirs) = self.names.get(name) else {
            return Err(self.damaged(&format!("it has no tensor {name}")));
        };
        let read = || -> CandleResult<Tensor> {
            let quantised = {
                let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
                self.content.tensor(&mut *file, theirs, device)?
            };
            quantised.dequantize(device)
        };
        let weight = read().map_err(|error| self.damaged(&format!("{theirs}: {error}")))?;
        let heads = match name.rsplit('.').nth(1) {
            Some("q_proj") => self.heads()?,
            Some("k_proj") => self.kv_heads()?,
            _ => return Ok(weight),
        };
        halves(&weight, heads as usize).map_err(|error| self.damaged(&format!("{theirs}: {error}")))
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
        let tensor = self.0.tensor(name, device);
        tensor.map_err(candle_core::Error::wrap)?.to_dtype(dtype)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.0.names.contains_key(name)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use candle_core::quantized::{GgmlDType, QTensor, gguf_file};

    use super::*;
    use crate::models::{Llama, LlamaConfig, Pretrained};

    type Metadata = BTreeMap<&'static str, Value>;

    /// A Llama of one layer: two heads of two numbers, three tokens.
    fn metadata() -> Metadata {
        let tokens = ["a", "b", "c"].map(|token| Value::String(token.to_string()));
        BTreeMap::from([
            ("general.architecture", Value::String("llama".to_string())),
            ("llama.embedding_length", Value::U32(4)),
            ("llama.feed_forward_length", Value::U32(6)),
            ("llama.block_count", Value::U32(1)),
            ("llama.attention.head_count", Value::U64(2)),
            ("llama.context_length", Value::U32(8)),
            ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
            ("tokenizer.ggml.tokens", Value::Array(tokens.to_vec())),
        ])
    }

    fn shapes() -> BTreeMap<&'static str, Vec<usize>> {
        BTreeMap::from([
            ("token_embd.weight", vec![3, 4]),
            ("output_norm.weight", vec![4]),
            ("output.weight", vec![3, 4]),
            ("blk.0.attn_norm.weight", vec![4]),
            ("blk.0.attn_q.weight", vec![4, 4]),
            ("blk.0.attn_k.weight", vec![4, 4]),
            ("blk.0.attn_v.weight", vec![4, 4]),
            ("blk.0.attn_output.weight", vec![4, 4]),
            ("blk.0.ffn_norm.weight", vec![4]),
            ("blk.0.ffn_gate.weight", vec![6, 4]),
            ("blk.0.ffn_up.weight", vec![6, 4]),
            ("blk.0.ffn_down.weight", vec![4, 6]),
        ])
    }

    fn bytes(metadata: &Metadata, shapes: &BTreeMap<&'static str, Vec<usize>>) -> Vec<u8> {
        let tensor = |(name, shape): (&&'static str, &Vec<usize>)| {
            let count: usize = shape.iter().product();
            let numbers = (0..count).map(|i| ((i * 7 + name.len()) as f32).sin());
            let tensor = Tensor::from_iter(numbers, &Device::Cpu).unwrap();
            let tensor = tensor.reshape(shape.clone()).unwrap();
            (*name, QTensor::quantize(&tensor, GgmlDType::F32).unwrap())
        };
        let tensors: Vec<(&str, QTensor)> = shapes.iter().map(tensor).collect();
        let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(n, t)| (*n, t)).collect();
        let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(k, v)| (*k, v)).collect();
        let mut out = std::io::Cursor::new(Vec::new());
        gguf_file::write(&mut out, &metadata, &tensors).unwrap();
        out.into_inner()
    }

    fn opened(bytes: &[u8]) -> Result<Gguf> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        Gguf::open(file.path(), "do this")
    }

    #[test]
    fn an_untied_model_is_read_with_what_is_usual() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("small.gguf");
        std::fs::write(&file, bytes(&metadata(), &shapes())).unwrap();
        let base = Pretrained::open(&file).unwrap();
        let config: LlamaConfig = base.config().unwrap();
        assert!(!config.tie_word_embeddings);
        assert_eq!(
            (config.num_key_value_heads, config.rope_theta),
            (2, 10_000.0)
        );
        assert_eq!(config.rms_norm_eps, 1e-5);
        let (llama, _) = base.frozen(&Device::Cpu, Llama::new).unwrap();
        let ids = Tensor::new(&[[0u32, 1, 2]], &Device::Cpu).unwrap();
        assert_eq!(llama.forward_t(&ids, false).unwrap().dims(), [1, 3, 3]);
        // Row 1 of a head of four goes to place 2, row 2 to place 1.
        let one = tempfile::tempdir().unwrap();
        let (mut wide, mut shapes) = (metadata(), shapes());
        wide.insert("llama.attention.head_count", Value::U32(1));
        shapes.retain(|name, _| *name != "output.weight");
        let file = one.path().join("model.gguf");
        std::fs::write(&file, bytes(&wide, &shapes)).unwrap();
        let base = Pretrained::open(one.path()).unwrap();
        assert!(base.config::<LlamaConfig>().unwrap().tie_word_embeddings);
        let tensors = base.tensors(&Device::Cpu).unwrap();
        let row = |name: &str, row: usize| -> Vec<f32> {
            let weight = &tensors[&format!("model.layers.0.self_attn.{name}.weight")];
            weight.get(row).unwrap().to_vec1().unwrap()
        };
        let original = |at: usize| -> Vec<f32> {
            (0..4)
                .map(|i| (((at * 4 + i) * 7 + "blk.0.attn_q.weight".len()) as f32).sin())
                .collect()
        };
        let rows = [0, 1, 2, 3].map(|at| row("q_proj", at));
        assert_eq!(rows, [original(0), original(2), original(1), original(3)]);
        assert_eq!(row("v_proj", 1), original(1));
    }

    #[test]
    fn what_is_another_model_or_broken_is_refused() {
        let said = |change: &dyn Fn(&mut Metadata)| {
            let mut metadata = metadata();
            change(&mut metadata);
            let gguf = opened(&bytes(&metadata, &shapes()));
            let error = gguf.and_then(|gguf| gguf.config_json()).unwrap_err();
            let error = error.to_string();
            assert!(error.ends_with(": do this"), "{error}");
            error
        };
        let text = |text: &str| Value::String(text.to_string());
        for (key, value, part) in [
            ("general.architecture", text("qwen2"), "\"qwen2\""),
            ("llama.rope.scaling.type", text("yarn"), "scaled"),
            ("llama.rope.scaling.factor", Value::F32(4.0), "scaled"),
            ("llama.rope.scale_linear", Value::F32(2.0), "scaled"),
            (
                "llama.rope.dimension_count",
                Value::U32(1),
                "a part of each head",
            ),
            (
                "llama.block_count",
                text("one"),
                "llama.block_count is no number",
            ),
            (
                "llama.block_count",
                Value::I32(-1),
                "llama.block_count is no number",
            ),
            ("tokenizer.ggml.tokens", Value::U32(3), "no list"),
            ("general.alignment", Value::U32(0), "makes no sense"),
        ] {
            let error = said(&|metadata| drop(metadata.insert(key, value.clone())));
            assert!(error.contains(part), "{key}: {error}");
        }
        let error = said(&|metadata| drop(metadata.remove("llama.context_length")));
        assert!(error.contains("llama.context_length is missing"), "{error}");

        let mut more = shapes();
        more.insert("blk.0.attn_q.bias", vec![4]);
        let error = opened(&bytes(&metadata(), &more)).unwrap_err().to_string();
        assert!(error.contains("attn_q.bias"), "{error}");
        let whole = bytes(&metadata(), &shapes());
        let error = opened(&whole[..whole.len() - 64]).unwrap_err().to_string();
        assert!(
            error.contains("in the middle of") && error.ends_with("do this"),
            "{error}"
        );
        // The header alone, cut anywhere.
        for end in 0..whole.len().min(400) {
            assert!(opened(&whole[..end]).is_err(), "{end}");
        }
    }
}
