//! A `VarBuilder` that remembers the layers it builds.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Tensor, Var, bail};
use candle_nn::{Conv1d, Conv1dConfig, Conv2d, Conv2dConfig, Embedding, Linear, VarBuilder};

use crate::base::{Base, plain};
use crate::config::unsupported;
use crate::layer::LoraLayer;
use crate::model::{LoraModel, any::AnyLayer};
use crate::quant::{AnyLinear, Linear4bit, QuantConfig, quantize};
use crate::through::through;
use crate::{
    Error, LoraAnyLinear, LoraConv1d, LoraConv2d, LoraEmbedding, LoraLinear, LoraLinear4bit,
    ParameterCount, Result,
};

/// Builds a network's layers from a checkpoint, as [`candle_nn::VarBuilder`] does, and keeps a
/// handle on each of them for the [`LoraModel`].
///
/// A network takes it in place of a `VarBuilder`: `b.pp("q_proj").linear(768, 768)` in place of
/// `candle_nn::linear(768, 768, vb.pp("q_proj"))`. Parts that never take an adapter, such as
/// norms, are built from [`vb`](Self::vb) as ever; their parameters are counted too.
///
/// | | what the tensors of the checkpoint become | for |
/// |---|---|---|
/// | [`new`](Self::new) | plain tensors, frozen | LoRA and its kind, inference |
/// | [`trainable`](Self::trainable) | variables | pretraining, full fine-tuning |
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
    quantization: Option<QuantConfig>,
}

/// Says which tensors train.
type Chooser = Box<dyn Fn(&str) -> bool + Send + Sync>;

/// What was built.
#[derive(Default)]
struct Book {
    /// The names that train, in a network whose base does.
    trains: Option<Chooser>,
    layers: Mutex<Vec<Arc<dyn AnyLayer>>>,
    fetched: Mutex<BTreeMap<String, Fetched>>,
}

/// A tensor of the checkpoint that the network has taken.
struct Fetched {
    numbers: usize,
    var: Option<Var>,
}

impl Fetched {
    fn count(&self) -> ParameterCount {
        ParameterCount {
            trainable: self.var.as_ref().map_or(0, |_| self.numbers),
            all: self.numbers,
        }
    }
}

impl Book {
    /// What the network gets for a tensor of the checkpoint.
    fn fetch(&self, name: &str, tensor: Tensor) -> candle_core::Result<Tensor> {
        let mut fetched = self.fetched.lock().unwrap_or_else(PoisonError::into_inner);
        let numbers = tensor.elem_count();
        let trains = self.trains.as_ref().is_some_and(|trains| trains(name));
        if !trains || !tensor.dtype().is_float() {
            fetched.insert(name.to_string(), Fetched { numbers, var: None });
            return Ok(plain(&tensor)?);
        }
        if let Some(Fetched { var: Some(var), .. }) = fetched.get(name) {
            let same = var.dims() == tensor.dims()
                && var.dtype() == tensor.dtype()
                && var.device().same_device(tensor.device());
            if !same {
                bail!(
                    "{name} is a variable {:?} of {:?} on {:?} already and cannot be {:?} of {:?} \
                     on {:?} too; fetch it once and convert it in the forward pass",
                    var.dims(),
                    var.dtype(),
                    var.device().location(),
                    tensor.dims(),
                    tensor.dtype(),
                    tensor.device().location()
                )
            }
            return Ok(var.as_tensor().clone());
        }
        // What is a variable already stays that one.
        let var = Var::from_tensor(&tensor)?;
        let tensor = var.as_tensor().clone();
        let var = Some(var);
        fetched.insert(name.to_string(), Fetched { numbers, var });
        Ok(tensor)
    }
}

impl<'a> LoraBuilder<'a> {
    /// A builder over `vb` of a network whose base is frozen; layers are named by their path in it.
    ///
    /// All that comes from it, through [`vb`](Self::vb) too, is a plain tensor: a variable behind
    /// `vb` is copied and neither trains nor moves the network. For a base that trains use
    /// [`trainable`](Self::trainable); for a part that should train beside LoRA, a norm say, take
    /// its tensors from a `VarBuilder` of your own.
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
        Self::over(vb, None)
    }

    /// A builder over `vb` of the same network with a base that trains, for pretraining and full
    /// fine-tuning.
    ///
    /// Each tensor that the network takes becomes a variable, whether through a layer or through
    /// [`vb`](Self::vb): once per name, so what is fetched twice is tied. A tensor that is a
    /// variable already, of a `VarMap` say, stays that one; any other is copied, and what gave it
    /// stays as it was. [`variables`](Self::variables) lists them for an optimiser.
    ///
    /// Adapters may lie on top of such a base; then both train.
    ///
    /// ```
    /// use std::collections::HashMap;
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_nn::{Module, VarBuilder};
    /// use lora::LoraBuilder;
    ///
    /// let start = Tensor::ones((1, 2), DType::F32, &Device::Cpu)?;
    /// let start = HashMap::from([("fc.weight".to_string(), start)]);
    /// let b = LoraBuilder::trainable(VarBuilder::from_tensors(start, DType::F32, &Device::Cpu));
    /// let layer = b.pp("fc").linear_no_bias(2, 1)?;
    /// assert_eq!(b.model()?.parameter_count().trainable, 2);
    ///
    /// let x = Tensor::new(&[[1f32, -1.]], &Device::Cpu)?;
    /// let gradients = layer.forward(&x)?.sum_all()?.backward()?;
    /// let (name, weight) = &b.variables()[0];
    /// assert_eq!(name, "fc.weight");
    /// assert_eq!(gradients.get(weight).unwrap().to_vec2::<f32>()?, [[1., -1.]]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn trainable(vb: VarBuilder<'a>) -> Self {
        Self::trainable_where(vb, |_| true)
    }

    /// As [`trainable`](Self::trainable), but only those tensors train whose full name `which` says
    /// yes to: the last layer, the head, the norms. The others are frozen and cost no gradient.
    ///
    /// ```
    /// # use candle_core::{DType, Device};
    /// # use candle_nn::VarBuilder;
    /// # use lora::LoraBuilder;
    /// let vb = VarBuilder::zeros(DType::F32, &Device::Cpu);
    /// let b = LoraBuilder::trainable_where(vb, |name| name.starts_with("head."));
    /// let _layers = (b.pp("fc").linear(4, 3)?, b.pp("head").linear(3, 2)?);
    /// let names: Vec<String> = b.variables().into_iter().map(|(name, _)| name).collect();
    /// assert_eq!(names, ["head.bias", "head.weight"]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn trainable_where(
        vb: VarBuilder<'a>,
        which: impl Fn(&str) -> bool + Send + Sync + 'static,
    ) -> Self {
        Self::over(vb, Some(Box::new(which)))
    }

    fn over(vb: VarBuilder<'a>, trains: Option<Chooser>) -> Self {
        let book = Arc::new(Book {
            trains,
            ..Book::default()
        });
        let notes = book.clone();
        let vb = through(&vb, move |name, tensor| notes.fetch(name, tensor));
        Self {
            vb,
            book,
            quantization: None,
        }
    }

    /// The same builder with the weights of [`any_linear`](Self::any_linear) in 4 bits from here on;
    /// all other layers keep theirs in full.
    ///
    /// ```
    /// # use candle_core::{DType, Device};
    /// # use candle_nn::VarBuilder;
    /// # use lora::{LoraBuilder, quant::QuantConfig};
    /// let b = LoraBuilder::new(VarBuilder::zeros(DType::F32, &Device::Cpu));
    /// let layer = b.quantized(QuantConfig::default()).pp("fc").any_linear(128, 64)?;
    /// assert_eq!(layer.base().bytes(), 4232); // of 32,768 in f32
    /// # Ok::<(), lora::Error>(())
    /// ```
    #[must_use]
    pub fn quantized(mut self, config: QuantConfig) -> Self {
        self.quantization = Some(config);
        self
    }

    /// The base's variables, under the checkpoint's names and sorted by them: those of all that was
    /// built so far of a [`trainable`](Self::trainable) network, of which each is listed once.
    ///
    /// A tensor of the checkpoint that the network does not use is not among them, so each of them
    /// gets a gradient. A frozen network has none. Those of adapters are
    /// [`LoraModel::trainable_parameters`].
    ///
    /// ```
    /// # use candle_core::{DType, Device};
    /// # use candle_nn::VarBuilder;
    /// # use lora::LoraBuilder;
    /// let names = |b: &LoraBuilder| -> lora::Result<Vec<String>> {
    ///     let _norm = candle_nn::layer_norm(4, 1e-5, b.pp("norm").vb())?;
    ///     let _fc = b.pp("fc").linear(4, 3)?;
    ///     Ok(b.variables().into_iter().map(|(name, _)| name).collect())
    /// };
    /// let vb = || VarBuilder::zeros(DType::F32, &Device::Cpu);
    /// let trained = names(&LoraBuilder::trainable(vb()))?;
    /// assert_eq!(trained, ["fc.bias", "fc.weight", "norm.bias", "norm.weight"]);
    /// assert!(names(&LoraBuilder::new(vb()))?.is_empty());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn variables(&self) -> Vec<(String, Var)> {
        let fetched = self.book.fetched.lock();
        let fetched = fetched.unwrap_or_else(PoisonError::into_inner);
        let named =
            |(name, fetched): (&String, &Fetched)| Some((name.clone(), fetched.var.clone()?));
        fetched.iter().filter_map(named).collect()
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
            quantization: self.quantization,
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

    /// A linear layer with its weight in 4 bits, for QLoRA: `weight` (out, in) is quantised, and the
    /// full one let go; and `bias` (out).
    ///
    /// # Errors
    ///
    /// As [`linear`](Self::linear), and as [`quantize`](crate::quant::quantize); a weight that
    /// trains.
    ///
    /// ```
    /// # use candle_core::{DType, Device};
    /// # use candle_nn::VarBuilder;
    /// # use lora::{LoraBuilder, quant::QuantConfig};
    /// let b = LoraBuilder::new(VarBuilder::zeros(DType::F32, &Device::Cpu));
    /// let layer = b.pp("q").linear_4bit(4, 3, &QuantConfig::default())?;
    /// assert_eq!(layer.base().weight().dims(), [3, 4]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn linear_4bit(
        &self,
        in_features: usize,
        out_features: usize,
        config: &QuantConfig,
    ) -> Result<LoraLinear4bit> {
        let linear = |vb| candle_nn::linear(in_features, out_features, vb);
        self.noted(self.in_4_bits(linear, config)?)
    }

    /// A linear layer with its weight in 4 bits and without bias: `weight` (out, in).
    ///
    /// # Errors
    ///
    /// As [`linear_4bit`](Self::linear_4bit).
    ///
    /// ```
    /// # use candle_core::{DType, Device};
    /// # use candle_nn::VarBuilder;
    /// # use lora::{LoraBuilder, quant::QuantConfig};
    /// let b = LoraBuilder::new(VarBuilder::zeros(DType::F32, &Device::Cpu));
    /// let layer = b.pp("q").linear_4bit_no_bias(4, 3, &QuantConfig::default())?;
    /// assert!(layer.base().bias().is_none());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn linear_4bit_no_bias(
        &self,
        in_features: usize,
        out_features: usize,
        config: &QuantConfig,
    ) -> Result<LoraLinear4bit> {
        let linear = |vb| candle_nn::linear_no_bias(in_features, out_features, vb);
        self.noted(self.in_4_bits(linear, config)?)
    }

    /// A linear layer for a network that serves LoRA and QLoRA: as [`linear_4bit`](Self::linear_4bit)
    /// where the builder is [`quantized`](Self::quantized), and as [`linear`](Self::linear)
    /// elsewhere.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn any_linear(&self, in_features: usize, out_features: usize) -> Result<LoraAnyLinear> {
        self.either(|vb| candle_nn::linear(in_features, out_features, vb))
    }

    /// As [`any_linear`](Self::any_linear), without bias.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn any_linear_no_bias(
        &self,
        in_features: usize,
        out_features: usize,
    ) -> Result<LoraAnyLinear> {
        self.either(|vb| candle_nn::linear_no_bias(in_features, out_features, vb))
    }

    fn either(
        &self,
        linear: impl FnOnce(VarBuilder<'a>) -> candle_core::Result<Linear>,
    ) -> Result<LoraAnyLinear> {
        self.noted(match &self.quantization {
            Some(config) => AnyLinear::from(self.in_4_bits(linear, config)?),
            None => AnyLinear::from(linear(self.vb())?),
        })
    }

    fn in_4_bits(
        &self,
        linear: impl FnOnce(VarBuilder<'a>) -> candle_core::Result<Linear>,
        config: &QuantConfig,
    ) -> Result<Linear4bit> {
        let name = format!("{}.weight", self.vb.prefix());
        if self
            .book
            .trains
            .as_ref()
            .is_some_and(|trains| trains(&name))
        {
            return Err(unsupported(
                &format!("{name} in 4 bits, and trained"),
                "codes do not train; keep this layer out of 4 bits, or its weight from training",
            ));
        }
        let linear = linear(self.vb())?;
        let weight = quantize(linear.weight(), config).map_err(|error| match error {
            Error::Quantize { what, wants } => Error::Quantize {
                what: format!("{name}, {what},"),
                wants,
            },
            other => other,
        })?;
        Ok(Linear4bit::new(weight, linear.bias().cloned()))
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

    /// Adds a layer that was built elsewhere: frozen, or kept as it is where the network is
    /// [`trainable`](Self::trainable).
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
        let layer = match self.book.trains {
            Some(_) => LoraLayer::unfrozen(self.vb.prefix(), base)?,
            None => LoraLayer::frozen(self.vb.prefix(), base)?,
        };
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
        let all: ParameterCount = fetched.values().map(Fetched::count).sum();
        let own: ParameterCount = layers.iter().map(|layer| layer.count()).sum();
        let others = ParameterCount {
            trainable: all.trainable.saturating_sub(own.trainable),
            all: all.all.saturating_sub(own.all),
        };
        LoraModel::of(layers, others)
    }
}
