//! `adapter_model.safetensors`, in memory.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use safetensors::{Dtype, SafeTensors};

use super::modules::is_float;
use super::{ReadOptions, bad_file, cut, names};
use crate::Result;

/// The largest header that is read: some hundred thousand tensors.
const HEADER_LIMIT: u64 = 16 << 20;
const MOST_DIMS: usize = 8;

/// Refuses a file whose header cannot fit it. `start` is at least its first eight bytes.
pub(super) fn check_header(start: &[u8], len: u64, file: &Path) -> Result<()> {
    let Some(start) = start.first_chunk::<8>() else {
        return Err(bad_file(
            file,
            format!("{len} bytes are too few for a safetensors file"),
        ));
    };
    let header = u64::from_le_bytes(*start);
    if header > HEADER_LIMIT || header.saturating_add(8) > len {
        return Err(bad_file(
            file,
            format!(
                "its header would be {header} bytes of {len}; at most {HEADER_LIMIT} are read. \
                 The file is damaged, cut short or no safetensors file"
            ),
        ));
    }
    Ok(())
}

/// The tensors under the names that PEFT saves, as f32, or as f64 where the file says so.
pub(super) fn parse(
    bytes: &[u8],
    file: &Path,
    options: &ReadOptions,
    device: &Device,
) -> Result<BTreeMap<String, Tensor>> {
    check_header(bytes, bytes.len() as u64, file)?;
    let tensors = SafeTensors::deserialize(bytes).map_err(|error| {
        let why = format!(
            "not a whole safetensors file of {} bytes: {}; download or save it again",
            bytes.len(),
            cut(&error.to_string())
        );
        bad_file(file, why)
    })?;
    let keys = tensors.names();
    if keys.is_empty() {
        return Err(bad_file(file, "no tensor is in it"));
    }
    let mut out = BTreeMap::new();
    let mut broken = Vec::new();
    for (as_saved, (_, key)) in names::canonical(keys, file)? {
        let view = tensors
            .tensor(key)
            .map_err(|error| bad_file(file, cut(&error.to_string())))?;
        let named = |why: String| bad_file(file, format!("tensor {:?}: {why}", cut(key)));
        let dtype = match view.dtype() {
            Dtype::F32 => DType::F32,
            Dtype::F64 => DType::F64,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            other => {
                return Err(named(format!(
                    "type {other}; f32, f64, f16 and bf16 are read"
                )));
            }
        };
        let shape = view.shape();
        if shape.is_empty() || shape.len() > MOST_DIMS {
            return Err(named(format!("{} dimensions", shape.len())));
        }
        if shape.contains(&0) {
            return Err(named(format!(
                "shape {shape:?} is empty; it may have been saved from one shard of a model \
                 (DeepSpeed ZeRO-3, FSDP) before the shards were gathered"
            )));
        }
        if !options.allow_non_finite {
            let count = non_finite(view.data(), dtype);
            if count > 0 {
                let of: usize = shape.iter().product();
                broken.push(format!("{count} of {of} values of {:?}", cut(key)));
                continue;
            }
        }
        let tensor = Tensor::from_raw_buffer(view.data(), dtype, shape, &Device::Cpu)?;
        let wide = if dtype == DType::F64 {
            DType::F64
        } else {
            DType::F32
        };
        out.insert(as_saved, tensor.to_dtype(wide)?.to_device(device)?);
    }
    if let [first @ .., last] = broken.as_slice() {
        let listed = first
            .iter()
            .take(4)
            .chain([last])
            .cloned()
            .collect::<Vec<_>>()
            .join(", ");
        return Err(bad_file(
            file,
            format!(
                "non-finite value (NaN or infinite) in {} of {} tensors: {listed}; the training \
                 seems to have diverged. ReadOptions::allow_non_finite reads it all the same",
                broken.len(),
                broken.len() + out.len(),
            ),
        ));
    }
    Ok(out)
}

/// How many numbers are NaN or infinite: those whose exponent bits are all set.
fn non_finite(data: &[u8], dtype: DType) -> usize {
    let half = |mask: u16| {
        let chunks = data.chunks_exact(2);
        chunks
            .filter(|c| matches!(c, [a, b] if u16::from_le_bytes([*a, *b]) & mask == mask))
            .count()
    };
    match dtype {
        DType::F16 => half(0x7c00),
        DType::BF16 => half(0x7f80),
        DType::F32 => {
            let mask = 0x7f80_0000;
            let set = |c: &&[u8]| {
                c.first_chunk::<4>()
                    .is_some_and(|c| u32::from_le_bytes(*c) & mask == mask)
            };
            data.chunks_exact(4).filter(set).count()
        }
        _ => {
            let mask = 0x7ff0_0000_0000_0000;
            let set = |c: &&[u8]| {
                c.first_chunk::<8>()
                    .is_some_and(|c| u64::from_le_bytes(*c) & mask == mask)
            };
            data.chunks_exact(8).filter(set).count()
        }
    }
}

/// The bytes of a safetensors file with these tensors: the same tensors, the same bytes.
pub(super) fn serialize(tensors: &BTreeMap<String, Tensor>, file: &Path) -> Result<Vec<u8>> {
    let keys = names::canonical(tensors.keys().map(String::as_str), file)?;
    let mut ready = Vec::with_capacity(tensors.len());
    for (as_saved, (_, key)) in keys {
        let Some(tensor) = tensors.get(key) else {
            continue;
        };
        if !is_float(tensor.dtype()) {
            let why = format!(
                "tensor {key:?} is {:?}; f32, f64, f16 and bf16 are written",
                tensor.dtype()
            );
            return Err(bad_file(file, why));
        }
        ready.push((as_saved, tensor.to_device(&Device::Cpu)?.contiguous()?));
    }
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    let views = ready.iter().map(|(key, tensor)| (key.as_str(), tensor));
    safetensors::serialize(views, Some(metadata)).map_err(|e| bad_file(file, e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn non_finite_values_are_counted() {
        let values = [
            1.0f32,
            f32::NAN,
            f32::INFINITY,
            -0.0,
            f32::MAX,
            f32::NEG_INFINITY,
            1e-45,
        ];
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        assert_eq!(non_finite(&bytes, DType::F32), 3);
        let bytes: Vec<u8> = values
            .iter()
            .flat_map(|x| f64::from(*x).to_le_bytes())
            .collect();
        assert_eq!(non_finite(&bytes, DType::F64), 3);
        let half = [0x3c00u16, 0x7c00, 0xfc00, 0x7e00, 0x7bff, 0x0001];
        let bytes: Vec<u8> = half.iter().flat_map(|x| x.to_le_bytes()).collect();
        assert_eq!(non_finite(&bytes, DType::F16), 3);
        let half = [0x3f80u16, 0x7f80, 0xff80, 0x7fc0, 0x7f7f, 0x0001];
        let bytes: Vec<u8> = half.iter().flat_map(|x| x.to_le_bytes()).collect();
        assert_eq!(non_finite(&bytes, DType::BF16), 3);
    }
}
