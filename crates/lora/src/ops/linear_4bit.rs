//! The linear layer whose weight is in 4 bits.

use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, DType, Layout, MetalStorage, Shape, Storage, Tensor, bail,
};

use super::cpu::{for_real, read, slice, stored, tensor};
use super::frozen::{Frozen, runs_as_one_pass};
use super::linear::{Product, flat, output_shape};
use super::{given, refuse};
use crate::quant::Quantized;
use crate::{Error, Result};

/// y = x Wᵀ + b with W in 4 bits, and a gradient for x, and for b where it trains.
///
/// On the CPU W is expanded inside the product, forward and backward, up to 128 rows or columns at a
/// time on each thread and fewer where they are long; half precision is taken through f32 there.
/// Elsewhere W stands in full for the time of the product.
///
/// # Shapes
///
/// x (…, in), `weight` W (out, in), `bias` b (out); → (…, out) in x's type.
///
/// # Errors
///
/// [`Error::Operation`] when they do not fit each other.
///
/// ```
/// use candle_core::{DType, Device, Tensor, Var};
/// use lora::ops::linear_4bit;
/// use lora::quant::{QuantConfig, quantize};
///
/// let w = Tensor::ones((3, 64), DType::F32, &Device::Cpu)?;
/// let w = quantize(&w, &QuantConfig { double_quant: false, ..Default::default() })?;
/// let x = Var::ones((1, 64), DType::F32, &Device::Cpu)?;
/// let y = linear_4bit(&x, &w, None)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[64f32; 3]]);
/// let gradients = y.sum_all()?.backward()?;
/// assert_eq!(gradients.get(&x).unwrap().to_vec2::<f32>()?, [[3f32; 64]]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// Source: Dettmers et al. 2023, arXiv:2305.14314, equation 5.
pub fn linear_4bit(x: &Tensor, weight: &Quantized, bias: Option<&Tensor>) -> Result<Tensor> {
    let &[out, inputs] = weight.dims() else {
        return Err(Error::Operation {
            op: "linear_4bit",
            given: format!("{}, W {:?}", given(&[("x", x)]), weight.dims()),
            wants: "W must be [out, in]".into(),
        });
    };
    let mut all = vec![("x", x)];
    all.extend(bias.map(|bias| ("b", bias)));
    let misplaced = |t: &Tensor| !t.device().same_device(weight.device());
    let wants = if x.dims().last() != Some(&inputs) {
        format!("x must be […, {inputs}] for W [{out}, {inputs}] in 4 bits")
    } else if bias.is_some_and(|bias| bias.dims() != [out]) {
        format!("b must be [{out}]")
    } else if !x.dtype().is_float() {
        "x must be of floating point".into()
    } else if misplaced(x) || bias.is_some_and(misplaced) {
        "all must be on one device".into()
    } else {
        let half = matches!(x.dtype(), DType::F16 | DType::BF16);
        let wide = match half && x.device().is_cpu() {
            true => x.to_dtype(DType::F32)?,
            false => x.clone(),
        };
        let y = wide.contiguous()?.apply_op1(Product4bit(weight.clone()))?;
        let y = match bias {
            Some(bias) => y.broadcast_add(&bias.to_dtype(y.dtype())?)?,
            None => y,
        };
        return Ok(y.to_dtype(x.dtype())?);
    };
    refuse("linear_4bit", &all, wants)
}

/// x Wᵀ.
struct Product4bit(Quantized);

impl Product4bit {
    /// The weight as a whole.
    fn whole(&self, dtype: DType) -> candle_core::Result<Tensor> {
        self.0
            .dequantize_as(dtype)
            .map_err(candle_core::Error::wrap)
    }

    fn frozen(&self) -> Frozen {
        Frozen::Quantized(self.0.clone())
    }

    /// The product by the backend's own means.
    fn composed<S: BackendStorage>(
        x: (&S, &Layout),
        weight: &Tensor,
        of: impl FnOnce(&Storage) -> Option<&S>,
    ) -> candle_core::Result<(S, Shape)> {
        let (storage, layout) = weight.storage_and_layout();
        match of(&storage) {
            Some(w) => Product::composed(x.0, x.1, w, layout),
            None => bail!("internal: a weight in 4 bits of another device"),
        }
    }
}

impl CustomOp1 for Product4bit {
    fn name(&self) -> &'static str {
        "linear_4bit"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        for_real!(x, T => {
            let y = self.frozen().forward::<T>(slice(x, layout)?, None)?;
            Ok((stored(y), output_shape(layout, self.0.dims()[0])))
        })
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        Self::composed((x, layout), &self.whole(x.dtype())?, |of| match of {
            Storage::Cuda(storage) => Some(storage),
            _ => None,
        })
    }

    fn metal_fwd(
        &self,
        x: &MetalStorage,
        layout: &Layout,
    ) -> candle_core::Result<(MetalStorage, Shape)> {
        Self::composed((x, layout), &self.whole(x.dtype())?, |of| match of {
            Storage::Metal(storage) => Some(storage),
            _ => None,
        })
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, g: &Tensor) -> candle_core::Result<Option<Tensor>> {
        if !runs_as_one_pass(g, (&self.0).into()) {
            let dx = flat(&g.contiguous()?)?.matmul(&self.whole(g.dtype())?)?;
            return Ok(Some(dx.reshape(x.shape())?));
        }
        for_real!(g, T => {
            Ok(Some(tensor(read::<T, _>(g, |g| self.frozen().backward(g))?, x.shape())?))
        })
    }
}
