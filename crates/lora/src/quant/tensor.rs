//! A tensor in 4 bits.

use candle_core::{DType, Device, Shape, Storage, Tensor};
use rayon::iter::{IndexedParallelIterator, ParallelIterator};
use rayon::slice::{ParallelSlice, ParallelSliceMut};

use super::codes::{dynamic, nearest_dynamic};
use super::{QuantConfig, View, expand};
use crate::{Error, Result};

/// Magnitudes in a block, where they are quantised themselves.
const ABSMAX_BLOCK: usize = 256;

/// A tensor whose numbers are codes of 4 bits; see [`quantize`].
///
/// Clones share the memory.
#[derive(Clone, Debug)]
pub struct Quantized {
    config: QuantConfig,
    shape: Shape,
    dtype: DType,
    /// u8, two codes each, the first in the high half.
    pub(super) codes: Tensor,
    pub(super) absmax: Absmax,
}

/// The largest magnitude of each block.
#[derive(Clone, Debug)]
pub(super) enum Absmax {
    /// f32.
    Plain(Tensor),
    Double {
        /// u8.
        codes: Tensor,
        /// f32, of each 256 codes.
        absmax: Tensor,
        offset: f32,
    },
}

/// `tensor` in 4 bits, on its device.
///
/// The numbers go row by row into blocks. With m the largest magnitude of a block, each of its
/// numbers x gets the code whose value is nearest to x / m. With double quantisation the m of all
/// blocks lose their mean and become codes of 8 bits in the same way, by bitsandbytes' dynamic type,
/// in blocks of 256.
///
/// # Errors
///
/// [`Error::Quantize`] for a block size that is no power of two, a tensor that is empty or not of
/// floating point, and numbers that are NaN or infinite.
///
/// Source: Dettmers et al. 2023, arXiv:2305.14314, section 3; bitsandbytes
/// `functional.quantize_4bit`.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use lora::quant::{QuantConfig, QuantType, quantize};
///
/// let w = Tensor::new(&[[7f32, -3.4], [0.2, 1.6]], &Device::Cpu)?;
/// let config = QuantConfig { quant_type: QuantType::Int4, double_quant: false, ..Default::default() };
/// let back = quantize(&w, &config)?.dequantize()?;
/// let gap = (back - Tensor::new(&[[7f32, -3.0], [0.0, 2.0]], &Device::Cpu)?)?;
/// assert!(gap.abs()?.max_all()?.to_scalar::<f32>()? < 1e-6);
/// # Ok::<(), lora::Error>(())
/// ```
pub fn quantize(tensor: &Tensor, config: &QuantConfig) -> Result<Quantized> {
    config.validate()?;
    let refuse = |wants: &str| {
        Err(Error::Quantize {
            what: format!("a tensor {:?} of {:?}", tensor.dims(), tensor.dtype()),
            wants: wants.to_string(),
        })
    };
    if !tensor.dtype().is_float() {
        return refuse("numbers of floating point");
    }
    if tensor.elem_count() == 0 {
        return refuse("at least one number");
    }
    let flat = tensor.flatten_all()?.to_dtype(DType::F32)?;
    let numbers = flat.to_device(&Device::Cpu)?.to_vec1::<f32>()?;
    if let Some(at) = numbers.iter().position(|x| !x.is_finite()) {
        let wants = format!(
            "numbers that are finite in f32, and number {at} is {}",
            numbers[at]
        );
        return refuse(&wants);
    }
    let nearest = config.quant_type.nearest();
    let mut codes = vec![0; numbers.len().div_ceil(2)];
    // A block has an even number of codes, so that its bytes are its own.
    let blocks = numbers.par_chunks(config.block_size);
    let blocks = blocks.zip(codes.par_chunks_mut(config.block_size / 2));
    let absmax: Vec<f32> = blocks
        .map(|(block, codes)| {
            let absmax = largest(block);
            for (at, x) in block.iter().enumerate() {
                let code = nearest.of(part(*x, absmax));
                codes[at / 2] |= if at % 2 == 0 { code << 4 } else { code };
            }
            absmax
        })
        .collect();
    if let (1, Some(last)) = (numbers.len() % 2, codes.last_mut()) {
        *last |= nearest.of(0.0);
    }
    let device = tensor.device();
    Ok(Quantized {
        config: *config,
        shape: tensor.shape().clone(),
        dtype: tensor.dtype(),
        codes: to(codes, device)?,
        absmax: match config.double_quant {
            true => doubly(&absmax, device)?,
            false => Absmax::Plain(to(absmax, device)?),
        },
    })
}

/// The magnitudes in 8 bits.
fn doubly(absmax: &[f32], device: &Device) -> Result<Absmax> {
    let mean = absmax.iter().map(|m| f64::from(*m)).sum::<f64>() / absmax.len() as f64;
    let offset = mean as f32;
    let centred: Vec<f32> = absmax.iter().map(|m| m - offset).collect();
    let mut codes = Vec::with_capacity(centred.len());
    let mut largests = Vec::new();
    for block in centred.chunks(ABSMAX_BLOCK) {
        let largest = largest(block);
        codes.extend(
            block
                .iter()
                .map(|x| nearest_dynamic().of(part(*x, largest))),
        );
        largests.push(largest);
    }
    Ok(Absmax::Double {
        codes: to(codes, device)?,
        absmax: to(largests, device)?,
        offset,
    })
}

fn largest(block: &[f32]) -> f32 {
    block.iter().fold(0.0, |largest, x| x.abs().max(largest))
}

/// x as a part of the largest magnitude; nothing of nothing is nothing.
fn part(x: f32, largest: f32) -> f32 {
    if largest == 0.0 { 0.0 } else { x / largest }
}

fn to<T: candle_core::WithDType>(numbers: Vec<T>, device: &Device) -> Result<Tensor> {
    let len = numbers.len();
    Ok(Tensor::from_vec(numbers, len, device)?)
}

impl Quantized {
    /// How it was made.
    #[must_use]
    pub fn config(&self) -> &QuantConfig {
        &self.config
    }

    /// Its shape.
    #[must_use]
    pub fn dims(&self) -> &[usize] {
        self.shape.dims()
    }

    /// The type that it was made from and that [`dequantize`](Self::dequantize) gives.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where it lies.
    #[must_use]
    pub fn device(&self) -> &Device {
        self.codes.device()
    }

    /// Bytes of codes and magnitudes. The tables of what codes stand for are shared by all.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let absmax = match &self.absmax {
            Absmax::Plain(absmax) => 4 * absmax.elem_count(),
            // And the offset.
            Absmax::Double { codes, absmax, .. } => {
                codes.elem_count() + 4 * absmax.elem_count() + 4
            }
        };
        self.codes.elem_count() + absmax
    }

    /// Bits for each number, magnitudes included.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use lora::quant::{QuantConfig, quantize};
    ///
    /// let w = Tensor::ones((1024, 1024), DType::F32, &Device::Cpu)?;
    /// let bits = quantize(&w, &QuantConfig::default())?.bits_per_parameter();
    /// assert_eq!(format!("{bits:.3}"), "4.127");
    /// let plain = QuantConfig { double_quant: false, ..Default::default() };
    /// assert_eq!(quantize(&w, &plain)?.bits_per_parameter(), 4.5);
    /// # Ok::<(), lora::Error>(())
    /// ```
    #[must_use]
    pub fn bits_per_parameter(&self) -> f64 {
        8.0 * self.bytes() as f64 / self.shape.elem_count() as f64
    }

    /// The whole tensor, in the type that it was made from.
    ///
    /// # Errors
    ///
    /// What candle reports.
    pub fn dequantize(&self) -> Result<Tensor> {
        self.dequantize_as(self.dtype)
    }

    /// The whole tensor in another type, rounded once.
    pub(crate) fn dequantize_as(&self, dtype: DType) -> Result<Tensor> {
        if !self.device().is_cpu() {
            return Ok(self.composed()?.to_dtype(dtype)?);
        }
        let mut numbers = vec![0f32; self.shape.elem_count()];
        self.view(|view| view.expand(0, &mut numbers))?;
        Ok(Tensor::from_vec(numbers, &self.shape, &Device::Cpu)?.to_dtype(dtype)?)
    }

    /// All numbers in f32, by operations that every device has.
    pub(super) fn composed(&self) -> Result<Tensor> {
        let n = self.shape.elem_count();
        let pairs = Tensor::new(self.config.quant_type.pairs(), self.device())?;
        // candle takes 255, as the largest u8, for the index of nothing.
        let codes = self.codes.to_dtype(DType::U32)?;
        let parts = pairs
            .index_select(&codes, 0)?
            .flatten_all()?
            .narrow(0, 0, n)?;
        let whole = (parts * repeated(&self.absmax()?, self.config.block_size, n)?)?;
        Ok(whole.reshape(&self.shape)?)
    }

    /// The blocks' magnitudes, in f32.
    fn absmax(&self) -> Result<Tensor> {
        let (codes, absmax, offset) = match &self.absmax {
            Absmax::Plain(absmax) => return Ok(absmax.clone()),
            Absmax::Double {
                codes,
                absmax,
                offset,
            } => (codes, absmax, *offset),
        };
        let codes = codes.to_dtype(DType::U32)?;
        let parts = Tensor::new(dynamic(), self.device())?.index_select(&codes, 0)?;
        let absmax = repeated(absmax, ABSMAX_BLOCK, codes.elem_count())?;
        Ok(((parts * absmax)? + f64::from(offset))?)
    }

    /// Its memory on the CPU, for as long as the closure runs.
    pub(crate) fn view<R>(&self, f: impl FnOnce(View<'_>) -> R) -> candle_core::Result<R> {
        let held = self.codes.storage_and_layout().0;
        let codes = slice::<u8>(&held)?;
        let view = |absmax| View {
            codes,
            pairs: self.config.quant_type.pairs(),
            block_size: self.config.block_size,
            absmax,
        };
        match &self.absmax {
            Absmax::Plain(absmax) => {
                let held = absmax.storage_and_layout().0;
                Ok(f(view(expand::Absmax::Plain(slice(&held)?))))
            }
            Absmax::Double {
                codes,
                absmax,
                offset,
            } => {
                let (codes, absmax) = (codes.storage_and_layout().0, absmax.storage_and_layout().0);
                Ok(f(view(expand::Absmax::Double {
                    codes: slice(&codes)?,
                    absmax: slice(&absmax)?,
                    block_size: ABSMAX_BLOCK,
                    offset: *offset,
                })))
            }
        }
    }
}

/// Each number `each` times, `n` in all.
fn repeated(numbers: &Tensor, each: usize, n: usize) -> Result<Tensor> {
    let all = numbers.unsqueeze(1)?.expand((numbers.elem_count(), each))?;
    Ok(all.flatten_all()?.narrow(0, 0, n)?)
}

/// The numbers of a tensor that was made from a vector.
fn slice<T: candle_core::WithDType>(storage: &Storage) -> candle_core::Result<&[T]> {
    match storage {
        Storage::Cpu(storage) => storage.as_slice(),
        _ => candle_core::bail!("internal: a quantised weight of another device"),
    }
}
