//! Merging adapters into the weight, and taking them out again.

use candle_core::{DType, Tensor};
use candle_nn::Linear;

use crate::adapter::Adapter;
use crate::base::{Base, adapter_dtype, plain, sealed};
use crate::layer::{LoraLayer, Merged, State};
use crate::quant::{Linear4bit, Weight};
use crate::{Error, Result};

impl<B: Base> LoraLayer<B> {
    /// A plain layer with the active adapters in its weight: the same answers at the base's cost.
    ///
    /// W ← W + s B A, or with DoRA W ← (m / n) (W + s B A), for one adapter after the other; the
    /// bias gains s · b of `lora_bias`, and comes to be where the base had none. The layer itself
    /// stays as it is; the result is detached and trains nothing, and a base that trains does not
    /// move it. The sum is taken in the type of A and B and rounded once to the base's type; in 4
    /// bits that is coarse, and [`merged_in_full`](crate::LoraLinear4bit::merged_in_full) is not.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] for a grouped convolution; [`Error::MergeNotFinite`] where the base is
    /// in 4 bits, which numbers that are not finite have no place in.
    ///
    /// Source: arXiv:2106.09685 section 4.1, "No Additional Inference Latency"; PEFT
    /// `tuners/lora/layer.py`, `merge`.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::{Linear, Module};
    /// # use lora::{LoraConfig, LoraLinear};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let base = Linear::new(Tensor::ones((3, 4), DType::F32, &Device::Cpu)?, None);
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// let layer = LoraLinear::new("q_proj", base, &LoraConfig::new(2, 4.0), &mut rng)?;
    /// layer.lora_b()?.set(&Tensor::ones((3, 2), DType::F32, &Device::Cpu)?)?;
    ///
    /// let x = Tensor::new(&[[1f32, 2., 3., 4.]], &Device::Cpu)?;
    /// let (apart, merged) = (layer.forward(&x)?, layer.merged()?.forward(&x)?);
    /// let gap = (apart - merged)?.abs()?.max_all()?.to_scalar::<f32>()?;
    /// assert!(gap < 1e-5);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn merged(&self) -> Result<B> {
        let state = self.read();
        match &state.merged {
            Some(merged) => Ok(merged.base.clone()),
            None => merge(self.name(), &state),
        }
    }

    /// Puts the active adapters into the weight that the layer uses.
    ///
    /// A second call changes nothing. The weight without the adapters stays in memory, so that
    /// [`unmerge`](Self::unmerge) is exact, in half precision too; to save the memory keep
    /// [`merged`](Self::merged) and drop the layer. Whoever shares the base's tensor, such as a
    /// tied output head, keeps the tensor it had.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] for a grouped convolution.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::{Linear, Module};
    /// # use lora::{Init, LoraConfig, LoraLinear};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let base = Linear::new(Tensor::ones((3, 4), DType::BF16, &Device::Cpu)?, None);
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// let config = LoraConfig::new(2, 4.0).with_init(Init::Random);
    /// let layer = LoraLinear::new("q_proj", base, &config, &mut rng)?;
    /// layer.merge()?;
    /// assert!(layer.is_merged());
    /// layer.unmerge();
    /// # use candle_core::DType::F32;
    /// assert_eq!(layer.base().weight().to_dtype(F32)?.to_vec2::<f32>()?, [[1f32; 4]; 3]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn merge(&self) -> Result<()> {
        self.merge_if(|_, _| Ok(()))
    }

    /// As [`merge`](Self::merge), but refuses a weight or bias that is NaN or infinite.
    ///
    /// # Errors
    ///
    /// [`Error::MergeNotFinite`]; the layer is left as it was.
    ///
    /// Source: PEFT's `merge(safe_merge=True)`.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraConfig, LoraLinear};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let base = Linear::new(Tensor::ones((3, 4), DType::F32, &Device::Cpu)?, None);
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// let layer = LoraLinear::new("q_proj", base, &LoraConfig::new(1, 4.0), &mut rng)?;
    /// layer.lora_b()?.set(&Tensor::new(&[[0f32], [f32::INFINITY], [0.]], &Device::Cpu)?)?;
    /// assert!(layer.safe_merge().unwrap_err().to_string().contains("4 of 12 values"));
    /// assert!(!layer.is_merged());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn safe_merge(&self) -> Result<()> {
        self.merge_if(|base, names| {
            let weight = match base.weight() {
                Weight::Dense(weight) => Some(weight),
                // Was looked at before it became codes.
                Weight::Quantized(_) => None,
            };
            let parts = [("weight", weight), ("bias", base.bias())];
            for (what, tensor) in parts {
                let Some(tensor) = tensor else { continue };
                let count = not_finite(tensor)?;
                if count > 0 {
                    return Err(Error::MergeNotFinite {
                        layer: self.name().to_string(),
                        adapters: names.to_vec(),
                        what,
                        count,
                        of: tensor.elem_count(),
                    });
                }
            }
            Ok(())
        })
    }

    fn merge_if(&self, check: impl FnOnce(&B, &[String]) -> Result<()>) -> Result<()> {
        let mut state = self.write();
        if state.merged.is_some() || state.active.is_empty() {
            return Ok(());
        }
        let base = merge(self.name(), &state)?;
        check(&base, &state.active)?;
        state.merged = Some(Merged {
            base,
            names: state.active.clone(),
        });
        Ok(())
    }

    /// Takes merged adapters out of the weight again: it is the very tensor it was before.
    ///
    /// Without merged adapters nothing happens.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraConfig, LoraLinear};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let base = Linear::new(Tensor::ones((3, 4), DType::F32, &Device::Cpu)?, None);
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// # let layer = LoraLinear::new("q_proj", base, &LoraConfig::new(2, 4.0), &mut rng)?;
    /// let before = layer.base().weight().clone();
    /// layer.merge()?;
    /// layer.unmerge();
    /// assert_eq!(layer.base().weight().id(), before.id());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn unmerge(&self) {
        self.write().merged = None;
    }

    /// Whether adapters are merged into the weight.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraConfig, LoraLinear};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let base = Linear::new(Tensor::ones((3, 4), DType::F32, &Device::Cpu)?, None);
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// # let layer = LoraLinear::new("q_proj", base, &LoraConfig::new(2, 4.0), &mut rng)?;
    /// assert!(!layer.is_merged());
    /// layer.merge()?;
    /// assert!(layer.is_merged());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn is_merged(&self) -> bool {
        self.read().merged.is_some()
    }
}

impl LoraLayer<Linear4bit> {
    /// [`merged`](Self::merged) without rounding to 4 bits: the weight in full, in the type that it
    /// was made from, with the active adapters in it.
    ///
    /// # Errors
    ///
    /// [`Error::Merged`] while adapters are merged, and so rounded already.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::{Linear, Module};
    /// # use lora::quant::{Linear4bit, QuantConfig};
    /// # use lora::{Init, LoraConfig, LoraLinear4bit};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let base = Linear::new(Tensor::ones((3, 64), DType::F32, &Device::Cpu)?, None);
    /// # let base = Linear4bit::quantize(&base, &QuantConfig::default())?;
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// let config = LoraConfig::new(2, 4.0).with_init(Init::Random);
    /// let layer = LoraLinear4bit::new("q_proj", base, &config, &mut rng)?;
    /// let x = Tensor::ones((1, 64), DType::F32, &Device::Cpu)?;
    /// let gap = (layer.forward(&x)? - layer.merged_in_full()?.forward(&x)?)?.abs()?;
    /// assert!(gap.max_all()?.to_scalar::<f32>()? < 1e-4);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn merged_in_full(&self) -> Result<Linear> {
        let state = self.read();
        state.unmerged(self.name(), "merging in full")?;
        let base = state.base.dequantize()?;
        merge_all(
            self.name(),
            &base,
            &state.active,
            &state.active(self.name())?,
        )
    }
}

/// The base with the active adapters in its weight and bias.
fn merge<B: sealed::Base>(layer: &str, state: &State<B>) -> Result<B> {
    merge_all(layer, &state.base, &state.active, &state.active(layer)?)
}

/// `base` with these adapters in its weight and bias, one after the other.
pub(crate) fn merge_all<B: sealed::Base>(
    layer: &str,
    base: &B,
    names: &[String],
    adapters: &[&Adapter],
) -> Result<B> {
    let mut base = base.clone();
    for adapter in adapters {
        base = adapter.replaced(&base)?;
    }
    let dtype = base.weight().dtype();
    let wide = adapter_dtype(dtype);
    // Not detached alone: without an update it would share a variable's memory.
    let mut weight = plain(&base.weight().dense()?.to_dtype(wide)?)?;
    let mut gained: Option<Tensor> = None;
    for adapter in adapters {
        weight = adapter.merge_weight(layer, &base, weight)?.detach();
        // As in the forward pass: DoRA scales what earlier adapters added, not the base's bias.
        if let Some(sum) = &gained
            && let Some(factor) = adapter.dora_factor(&base)?
        {
            gained = Some((sum * factor)?.detach());
        }
        gained = match (gained, adapter.merge_bias()?) {
            (Some(sum), Some(more)) => Some((sum + more)?.detach()),
            (sum, more) => sum.or(more.map(|more| more.detach())),
        };
    }
    let bias = match (base.bias(), gained) {
        (Some(bias), Some(gained)) => Some((bias.detach().to_dtype(wide)? + gained)?),
        (bias, gained) => gained.or(bias.map(plain).transpose()?),
    };
    let bias = bias.map(|bias| bias.to_dtype(dtype)).transpose()?;
    let weight = weight.to_dtype(dtype)?;
    let count = match base.weight() {
        Weight::Dense(_) => 0,
        // What is not finite cannot be quantised.
        Weight::Quantized(_) => not_finite(&weight)?,
    };
    if count > 0 {
        return Err(Error::MergeNotFinite {
            layer: layer.to_string(),
            adapters: names.to_vec(),
            what: "weight",
            count,
            of: weight.elem_count(),
        });
    }
    base.with(weight, bias)
}

/// How many values are NaN or infinite.
pub(crate) fn not_finite(tensor: &Tensor) -> Result<usize> {
    // 0 · x is 0 for every finite x and NaN for the others.
    let zero = (tensor.to_dtype(DType::F64)? * 0.0)?;
    let finite = zero.eq(0f64)?.to_dtype(DType::F64)?.sum_all()?;
    Ok(tensor.elem_count() - finite.to_scalar::<f64>()? as usize)
}
