//! A `VarBuilder` that remembers the layers it builds.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use candle_nn::{Conv1d, Conv1dConfig, Conv2d, Conv2dConfig, Embedding, Linear, VarBuilder};

use crate::base::Base;
use crate::layer::LoraLayer;
use crate::model::{LoraModel, any::AnyLayer};
use crate::through::through;
use crate::{LoraConv1d, LoraConv2d, LoraEmbedding, LoraLinear, Result};

/// Builds a network's layers from a checkpoint, as [`candle_nn::VarBuilder`] does, and keeps a
/// handle on each of them for the [`LoraModel`].
///
/// A network takes it in place of a `VarBuilder`: `b.pp("q_proj").linear(768, 768)` in place of
/// `candle_nn::linear(768, 768, vb.pp("q_proj"))`. Parts that never take an adapter, such as
/// norms, are built from [`vb`](Self::vb) as ever; their parameters are counted too.
///
/// ```
/// use std::collections::HashMap;
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{Module, VarBuilder};
/// use lora::{LoraBuilder, LoraConfig, LoraLinear};
/// use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
///
/// struct Mlp { norm: candle_nn::LayerNorm, up: LoraLinear, down: LoraLinear }
///
/// impl Mlp {
///     fn new(b: &LoraBuilder) -> lora::Result<Self> {
///         Ok(Self {
///             norm: candle_nn::layer_norm(4, 1e-5, b.pp("norm").vb())?,
///             up: b.pp("up").linear(4, 16)?,
///             down: b.pp("down").linear(16, 4)?,
///         })
///     }
/// }
///
/// let ones = |shape: &[usize]| Tensor::ones(shape, DType::F32, &Device::Cpu);
/// let weights = HashMap::from([
///     ("norm.weight".to_string(), ones(&[4])?), ("norm.bias".to_string(), ones(&[4])?),
///     ("up.weight".to_string(), ones(&[16, 4])?), ("up.bias".to_string(), ones(&[16])?),
///     ("down.weight".to_string(), ones(&[4, 16])?), ("down.bias".to_string(), ones(&[4])?),
/// ]);
/// let builder = LoraBuilder::new(VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu));
/// let mlp = Mlp::new(&builder)?;
///
/// let mut model = builder.model()?;
/// let mut rng = ChaCha8Rng::seed_from_u64(1);
/// model.add_adapter("default", &LoraConfig::new(2, 4.0).with_targets("up"), &mut rng)?;
/// assert_eq!(model.to_string(), "\
/// LoraLinear(up: 4 → 16, r = 2, scaling = 2, 40 trainable)
/// trainable params: 40 || all params: 196 || trainable%: 20.4082");
/// # let _ = (&mlp.norm, &mlp.down, &mlp.up);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct LoraBuilder<'a> {
    vb: VarBuilder<'a>,
    book: Arc<Book>,
}

/// What was built.
#[derive(Default)]
struct Book {
    layers: Mutex<Vec<Arc<dyn AnyLayer>>>,
    /// The tensors fetched, with their numbers of elements.
    fetched: Mutex<BTreeMap<String, usize>>,
}

impl<'a> LoraBuilder<'a> {
    /// A builder over `vb`; layers are named by their path in it.
    ///
    /// ```
    /// # use candle_core::{DType, Device};
    /// # use candle_nn::VarBuilder;
    /// # use lora::LoraBuilder;
    /// let b = LoraBuilder::new(VarBuilder::zeros(DType::F32, &Device::Cpu));
    /// assert_eq!(b.pp("model").vb().prefix(), "model");
    /// ```
    #[must_use]
    pub fn new(vb: VarBuilder<'a>) -> Self {
        let book = Arc::new(Book::default());
        let notes = book.clone();
        let vb = through(&vb, move |name, tensor| {
            let mut fetched = notes.fetched.lock().unwrap_or_else(PoisonError::into_inner);
            fetched.insert(name.to_string(), tensor.elem_count());
            drop(fetched);
            Ok(tensor)
        });
        Self { vb, book }
    }

    /// The builder of a module below this one, as `VarBuilder::pp`.
    ///
    /// ```
    /// # use candle_core::{DType, Device};
    /// # use candle_nn::VarBuilder;
    /// # use lora::LoraBuilder;
    /// let b = LoraBuilder::new(VarBuilder::zeros(DType::F32, &Device::Cpu));
    /// assert_eq!(b.pp("layers").pp(0).linear(4, 3)?.name(), "layers.0");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn pp(&self, name: impl ToString) -> Self {
        Self {
            vb: self.vb.pp(name),
            book: self.book.clone(),
        }
    }

    /// The plain builder of this place, for parts that take no adapter.
    ///
    /// ```
    /// # use candle_core::{DType, Device};
    /// # use candle_nn::VarBuilder;
    /// # use lora::LoraBuilder;
    /// let b = LoraBuilder::new(VarBuilder::zeros(DType::F32, &Device::Cpu));
    /// let norm = candle_nn::layer_norm(4, 1e-5, b.pp("norm").vb())?;
    /// assert_eq!(norm.weight().dims(), [4]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn vb(&self) -> VarBuilder<'a> {
        self.vb.clone()
    }

    /// A linear layer: `weight` (out, in) and `bias` (out).
    ///
    /// # Errors
    ///
    /// A tensor that is missing or has another shape.
    ///
    /// ```
    /// # use candle_core::{DType, Device};
    /// # use candle_nn::VarBuilder;
    /// # use lora::LoraBuilder;
    /// let b = LoraBuilder::new(VarBuilder::zeros(DType::F32, &Device::Cpu));
    /// assert_eq!(b.pp("q").linear(4, 3)?.base().weight().dims(), [3, 4]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn linear(&self, in_features: usize, out_features: usize) -> Result<LoraLinear> {
        self.noted(candle_nn::linear(in_features, out_features, self.vb())?)
    }

    /// A linear layer without bias: `weight` (out, in).
    ///
    /// # Errors
    ///
    /// As [`linear`](Self::linear).
    ///
    /// ```
    /// # use candle_core::{DType, Device};
    /// # use candle_nn::VarBuilder;
    /// # use lora::LoraBuilder;
    /// let b = LoraBuilder::new(VarBuilder::zeros(DType::F32, &Device::Cpu));
    /// assert!(b.pp("q").linear_no_bias(4, 3)?.base().bias().is_none());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn linear_no_bias(&self, in_features: usize, out_features: usize) -> Result<LoraLinear> {
        self.noted::<Linear>(candle_nn::linear_no_bias(
            in_features,
            out_features,
            self.vb(),
        )?)
    }

    /// A convolution: `weight` (out, in / groups, k) and `bias` (out).
    ///
    /// # Errors
    ///
    /// As [`linear`](Self::linear).
    ///
    /// ```
    /// # use candle_core::{DType, Device};
    /// # use candle_nn::VarBuilder;
    /// # use lora::LoraBuilder;
    /// let b = LoraBuilder::new(VarBuilder::zeros(DType::F32, &Device::Cpu));
    /// let conv = b.pp("conv").conv1d(4, 6, 3, Default::default())?;
    /// assert_eq!(conv.base().weight().dims(), [6, 4, 3]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn conv1d(
        &self,
        in_channels: usize,
        out_channels: usize,
        kernel_size: usize,
        config: Conv1dConfig,
    ) -> Result<LoraConv1d> {
        self.noted::<Conv1d>(candle_nn::conv1d(
            in_channels,
            out_channels,
            kernel_size,
            config,
            self.vb(),
        )?)
    }

    /// A convolution: `weight` (out, in / groups, k, k) and `bias` (out).
    ///
    /// # Errors
    ///
    /// As [`linear`](Self::linear).
    ///
    /// ```
    /// # use candle_core::{DType, Device};
    /// # use candle_nn::VarBuilder;
    /// # use lora::LoraBuilder;
    /// let b = LoraBuilder::new(VarBuilder::zeros(DType::F32, &Device::Cpu));
    /// let conv = b.pp("conv").conv2d(4, 6, 3, Default::default())?;
    /// assert_eq!(conv.base().weight().dims(), [6, 4, 3, 3]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn conv2d(
        &self,
        in_channels: usize,
        out_channels: usize,
        kernel_size: usize,
        config: Conv2dConfig,
    ) -> Result<LoraConv2d> {
        self.noted::<Conv2d>(candle_nn::conv2d(
            in_channels,
            out_channels,
            kernel_size,
            config,
            self.vb(),
        )?)
    }

    /// A convolution without bias.
    ///
    /// # Errors
    ///
    /// As [`linear`](Self::linear).
    ///
    /// ```
    /// # use candle_core::{DType, Device};
    /// # use candle_nn::VarBuilder;
    /// # use lora::LoraBuilder;
    /// let b = LoraBuilder::new(VarBuilder::zeros(DType::F32, &Device::Cpu));
    /// let conv = b.pp("conv").conv2d_no_bias(4, 6, 3, Default::default())?;
    /// assert!(conv.base().bias().is_none());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn conv2d_no_bias(
        &self,
        in_channels: usize,
        out_channels: usize,
        kernel_size: usize,
        config: Conv2dConfig,
    ) -> Result<LoraConv2d> {
        let conv =
            candle_nn::conv2d_no_bias(in_channels, out_channels, kernel_size, config, self.vb())?;
        self.noted(conv)
    }

    /// An embedding: `weight` (vocabulary, features).
    ///
    /// # Errors
    ///
    /// As [`linear`](Self::linear).
    ///
    /// ```
    /// # use candle_core::{DType, Device};
    /// # use candle_nn::VarBuilder;
    /// # use lora::LoraBuilder;
    /// let b = LoraBuilder::new(VarBuilder::zeros(DType::F32, &Device::Cpu));
    /// assert_eq!(b.pp("wte").embedding(10, 4)?.base().embeddings().dims(), [10, 4]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn embedding(&self, vocabulary: usize, features: usize) -> Result<LoraEmbedding> {
        self.noted::<crate::ScaledEmbedding>(
            Embedding::new(self.vb.get((vocabulary, features), "weight")?, features).into(),
        )
    }

    /// Adds a layer that was built elsewhere.
    ///
    /// # Errors
    ///
    /// As [`LoraLayer::frozen`].
    ///
    /// ```
    /// # use candle_core::{DType, Device};
    /// # use candle_nn::VarBuilder;
    /// # use lora::LoraBuilder;
    /// let b = LoraBuilder::new(VarBuilder::zeros(DType::F32, &Device::Cpu));
    /// let head = candle_nn::linear(4, 2, b.pp("head").vb())?;
    /// let head = b.pp("head").noted(head)?;
    /// assert_eq!((head.name(), b.model()?.layer_names()), ("head", vec!["head"]));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn noted<B: Base>(&self, base: B) -> Result<LoraLayer<B>> {
        let layer = LoraLayer::frozen(self.vb.prefix(), base)?;
        let mut layers = self
            .book
            .layers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        layers.push(layer.handle());
        Ok(layer)
    }

    /// The model of all layers built so far, through this builder and those made from it.
    ///
    /// # Errors
    ///
    /// As [`LoraModel::new`].
    ///
    /// ```
    /// # use candle_core::{DType, Device};
    /// # use candle_nn::VarBuilder;
    /// # use lora::LoraBuilder;
    /// let b = LoraBuilder::new(VarBuilder::zeros(DType::F32, &Device::Cpu));
    /// let _layers = (b.pp("up").linear(4, 8)?, b.pp("down").linear(8, 4)?);
    /// assert_eq!(b.model()?.layer_names(), ["down", "up"]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn model(&self) -> Result<LoraModel> {
        let layers = self
            .book
            .layers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let fetched = self
            .book
            .fetched
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let all: usize = fetched.values().sum();
        let own: usize = layers.iter().map(|layer| layer.count().all).sum();
        LoraModel::of(layers, all.saturating_sub(own))
    }
}
