//! The embedding as a base.

use candle_core::{DType, Tensor};
use candle_nn::Embedding;

use crate::Result;
use crate::base::{Keys, filled, sealed};
use crate::quant::Weight;

/// An embedding with trainable low-rank updates beside it.
///
/// y = W\[ids\] · e + s · Aᵀ\[ids\] Bᵀ · e, with the embedding's own factor e (1 by default). See
/// [`LoraLayer`](crate::LoraLayer) for everything it can do.
///
/// # Shapes
///
/// W (V, d), A (r, V), B (d, r); ids of any shape (…) → output (…, d). The ids are u32, u8 or i64.
///
/// Source: PEFT `tuners/lora/layer.py`, `Embedding`. As in PEFT A starts at zero and B at N(0, 1).
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_nn::{Embedding, Module};
/// use lora::{LoraConfig, LoraEmbedding};
/// use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
///
/// let w = Tensor::new(&[[1f32, 2.], [3., 4.], [5., 6.]], &Device::Cpu)?;
/// let mut rng = ChaCha8Rng::seed_from_u64(1);
/// let config = LoraConfig::new(1, 2.0);
/// let layer = LoraEmbedding::new("embed_tokens", Embedding::new(w, 2), &config, &mut rng)?;
/// let ids = Tensor::new(&[2u32, 0], &Device::Cpu)?;
/// assert_eq!(layer.forward(&ids)?.to_vec2::<f32>()?, [[5., 6.], [1., 2.]]);
///
/// // s = 2, A = [0, 0, 1], B = [10, 20]ᵀ move the row of id 2 only.
/// layer.lora_a()?.set(&Tensor::new(&[[0f32, 0., 1.]], &Device::Cpu)?)?;
/// layer.lora_b()?.set(&Tensor::new(&[[10f32], [20.]], &Device::Cpu)?)?;
/// assert_eq!(layer.forward(&ids)?.to_vec2::<f32>()?, [[25., 46.], [1., 2.]]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub type LoraEmbedding = crate::LoraLayer<ScaledEmbedding>;

/// A [`candle_nn::Embedding`] whose output may carry a factor, as Gemma's √d.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::Embedding;
/// use lora::ScaledEmbedding;
///
/// let plain = Embedding::new(Tensor::ones((5, 3), DType::F32, &Device::Cpu)?, 3);
/// let scaled = ScaledEmbedding::from(plain).with_embed_scale(2.0);
/// assert_eq!(scaled.embed_scale(), 2.0);
/// assert_eq!(scaled.embeddings().dims(), [5, 3]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct ScaledEmbedding {
    weight: Tensor,
    embed_scale: f64,
}

impl ScaledEmbedding {
    /// Sets the factor on the output.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::{Embedding, Module};
    /// # use lora::ScaledEmbedding;
    /// # let plain = Embedding::new(Tensor::ones((5, 3), DType::F32, &Device::Cpu)?, 3);
    /// let scaled = ScaledEmbedding::from(plain).with_embed_scale(2.0);
    /// let y = scaled.forward(&Tensor::new(&[4u32], &Device::Cpu)?)?;
    /// assert_eq!(y.to_vec2::<f32>()?, [[2.0; 3]]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn with_embed_scale(mut self, embed_scale: f64) -> Self {
        self.embed_scale = embed_scale;
        self
    }

    /// The factor on the output.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Embedding;
    /// # use lora::ScaledEmbedding;
    /// # let plain = Embedding::new(Tensor::ones((5, 3), DType::F32, &Device::Cpu)?, 3);
    /// assert_eq!(ScaledEmbedding::from(plain).embed_scale(), 1.0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn embed_scale(&self) -> f64 {
        self.embed_scale
    }

    /// W (V, d).
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Embedding;
    /// # use lora::ScaledEmbedding;
    /// # let plain = Embedding::new(Tensor::ones((5, 3), DType::F32, &Device::Cpu)?, 3);
    /// assert_eq!(ScaledEmbedding::from(plain).embeddings().dims(), [5, 3]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn embeddings(&self) -> &Tensor {
        &self.weight
    }

    fn scaled(&self, y: Tensor) -> Result<Tensor> {
        if self.embed_scale == 1.0 {
            Ok(y)
        } else {
            Ok((y * self.embed_scale)?)
        }
    }
}

impl From<Embedding> for ScaledEmbedding {
    fn from(embedding: Embedding) -> Self {
        Self {
            weight: embedding.embeddings().clone(),
            embed_scale: 1.0,
        }
    }
}

impl candle_nn::Module for ScaledEmbedding {
    fn forward(&self, ids: &Tensor) -> candle_core::Result<Tensor> {
        let shape = [ids.dims(), &self.weight.dims()[1..]].concat();
        let y = sealed::Base::forward(self, &sealed::Base::flat(self, ids)?)?;
        y.reshape(shape)
    }
}

impl sealed::Base for ScaledEmbedding {
    const LAYER: &'static str = "LoraEmbedding";
    const KEYS: Keys = Keys::EMBEDDING;

    fn weight(&self) -> Weight<'_> {
        (&self.weight).into()
    }

    fn bias(&self) -> Option<&Tensor> {
        None
    }

    fn with(&self, weight: Tensor, _: Option<Tensor>) -> Result<Self> {
        Ok(Self {
            weight,
            ..self.clone()
        })
    }

    fn refused_shape(&self) -> Option<&'static str> {
        let good = self.weight.rank() == 2 && filled(&self.weight);
        (!good).then_some("a matrix [vocabulary, features] with both sizes at least 1")
    }

    fn out(&self) -> usize {
        self.weight.dims()[1]
    }

    fn inputs(&self) -> usize {
        self.weight.dims()[0]
    }

    fn fan_in(&self) -> usize {
        self.inputs()
    }

    fn refused_input(&self, _: &Tensor) -> Option<String> {
        None
    }

    fn flat(&self, x: &Tensor) -> Result<Tensor> {
        let ids = x.flatten_all()?;
        // candle answers the largest number of the ids' type with zeros, in range or not.
        if x.dtype() != DType::I64 {
            return Ok(ids.to_dtype(DType::I64)?);
        }
        let checked = x.device().is_cpu() && x.elem_count() > 0;
        if checked && ids.max(0)?.to_scalar::<i64>()? == i64::MAX {
            let message = format!("id {} is not in the vocabulary", i64::MAX);
            return Err(candle_core::Error::Msg(message).into());
        }
        Ok(ids)
    }

    fn unflat(&self, y: Tensor, x: &Tensor) -> Result<Tensor> {
        Ok(y.reshape([x.dims(), &[self.out()]].concat())?)
    }

    fn flat_output(&self, y: &Tensor) -> Result<Tensor> {
        let rows = y.elem_count() / self.out();
        Ok(y.reshape((rows, self.out()))?)
    }

    fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        self.scaled(self.weight.contiguous()?.index_select(ids, 0)?)
    }

    fn a_shape(&self, r: usize) -> Vec<usize> {
        vec![r, self.inputs()]
    }

    fn b_shape(&self, r: usize) -> Vec<usize> {
        vec![self.out(), r]
    }

    fn magnitude_shape(&self) -> Vec<usize> {
        vec![self.out()]
    }

    fn down(&self, ids: &Tensor, a: &Tensor) -> Result<Tensor> {
        Ok(a.index_select(ids, 1)?.t()?)
    }

    fn up(&self, h: &Tensor, b: &Tensor) -> Result<Tensor> {
        self.scaled(h.matmul(&b.t()?)?)
    }

    fn to_weight_layout(&self, product: Tensor) -> Result<Tensor> {
        Ok(product.t()?.contiguous()?)
    }

    fn to_matrix(&self, weight: &Tensor) -> Result<Tensor> {
        Ok(weight.t()?)
    }

    fn over_output(&self, v: &Tensor) -> Result<Tensor> {
        Ok(v.clone())
    }

    fn is_embedding(&self) -> bool {
        true
    }
}
