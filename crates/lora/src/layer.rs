//! A layer with any number of named adapters.

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use candle_core::{Tensor, Var};
use candle_nn::Module;
use rand::{Rng, RngCore};

use crate::adapter::Adapter;
use crate::base::{Base, adapter_dtype, check_input, check_parts, frozen, sealed};
use crate::config::unsupported;
use crate::count::grouped;
use crate::ops::Share;
use crate::quant::Weight;
use crate::{Error, LoraConfig, ParameterCount, Result, VeraConfig, VeraProjection, rows};

/// The name of the adapter that a layer is built with, as in PEFT.
///
/// ```
/// assert_eq!(lora::DEFAULT_ADAPTER, "default");
/// ```
pub const DEFAULT_ADAPTER: &str = "default";

/// A layer of candle with any number of named low-rank updates beside it.
///
/// [`LoraLinear`](crate::LoraLinear), [`LoraLinear4bit`](crate::LoraLinear4bit),
/// [`LoraAnyLinear`](crate::LoraAnyLinear), [`LoraConv1d`](crate::LoraConv1d),
/// [`LoraConv2d`](crate::LoraConv2d) and [`LoraEmbedding`](crate::LoraEmbedding) are this type
/// over candle's layers. The active adapters act one after the other:
///
/// y ← y + s · B A x, or with DoRA y ← b + (m / n) · (y − b + s · B A x), n = ‖W + s B A‖.
///
/// W and b do not train: [`new`](Self::new) and [`frozen`](Self::frozen) keep plain tensors without
/// a graph behind them, copied where they would share memory with a variable. The one way to a
/// layer whose W and b may train is [`unfrozen`](Self::unfrozen), for pretraining and full
/// fine-tuning. B starts at zero, so a fresh layer computes what its base computes. B·A is formed
/// for merging and for DoRA's norm only.
///
/// A base in f16 or bf16 keeps A and B in f32; the updates are added in f32 and cast once.
///
/// Clones are handles on one layer: an adapter added, chosen or merged through one of them is so
/// for all. That is how a [`LoraModel`](crate::LoraModel) reaches the layers inside a network.
///
/// Source: PEFT `tuners/lora/layer.py`.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{Linear, Module};
/// use lora::{LoraConfig, LoraLinear};
/// use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
///
/// let base = Linear::new(Tensor::ones((3, 4), DType::F32, &Device::Cpu)?, None);
/// let mut rng = ChaCha8Rng::seed_from_u64(1);
/// let layer = LoraLinear::frozen("q_proj", base)?;
/// layer.add_adapter("fr", &LoraConfig::new(2, 4.0), &mut rng)?;
/// layer.add_adapter("de", &LoraConfig::new(8, 4.0), &mut rng)?;
/// assert_eq!(layer.adapters(), ["fr", "de"]);
/// assert_eq!(layer.active_adapters(), ["fr"]);
///
/// layer.set_adapter(&["de"])?;
/// assert_eq!(layer.lora_a()?.dims(), [8, 4]);
/// layer.delete_adapter("fr")?;
/// assert_eq!(layer.adapters(), ["de"]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct LoraLayer<B: Base> {
    shared: Arc<Shared<B>>,
}

struct Shared<B> {
    name: String,
    state: RwLock<State<B>>,
}

/// What of a layer changes.
pub(crate) struct State<B> {
    pub base: B,
    pub adapters: Vec<(String, Adapter)>,
    pub active: Vec<String>,
    pub enabled: bool,
    pub merged: Option<Merged<B>>,
    pub output_head: bool,
}

/// A base with adapters in its weight. The base without them stays, so unmerging is exact.
pub(crate) struct Merged<B> {
    pub base: B,
    pub names: Vec<String>,
}

impl<B: Base> LoraLayer<B> {
    /// Freezes `base` and puts a fresh adapter named `default` beside it; A is drawn from `rng`.
    ///
    /// `name` is the module's path in the model, such as `layers.0.q_proj`; it becomes part of the
    /// parameters' names. A and B lie on the base's device, in the base's type (f32 for a base in
    /// half precision). When the base's weight or bias is a variable, or computed from one, the
    /// layer keeps a copy: whatever still trains the original cannot move the frozen layer.
    ///
    /// # Errors
    ///
    /// What [`LoraConfig::validate`] refuses; an empty name; a weight that has not the layer's
    /// shape, is empty, or is of another type than f32, f64, f16 and bf16; a bias that does not
    /// fit; an option that this kind of layer cannot have.
    ///
    /// ```
    /// # use candle_core::{Device, DType, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraConfig, LoraLinear};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// let base = Linear::new(Tensor::zeros((512, 768), DType::F32, &Device::Cpu)?, None);
    /// let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// let layer = LoraLinear::new("q_proj", base, &LoraConfig::new(8, 16.0), &mut rng)?;
    /// assert_eq!(layer.lora_a()?.dims(), [8, 768]);
    /// assert_eq!(layer.lora_b()?.dims(), [512, 8]);
    /// assert_eq!(
    ///     layer.to_string(),
    ///     "LoraLinear(q_proj: 768 → 512, r = 8, scaling = 2, 10,240 trainable)"
    /// );
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn new(
        name: impl Into<String>,
        base: impl Into<B>,
        config: &LoraConfig,
        rng: &mut (impl Rng + ?Sized),
    ) -> Result<Self> {
        config.validate()?;
        let layer = Self::frozen(name, base)?;
        layer.add_adapter(DEFAULT_ADAPTER, config, rng)?;
        Ok(layer)
    }

    /// Freezes `base` and gives it no adapter yet.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new), for the name and the base.
    ///
    /// ```
    /// # use candle_core::{Device, DType, Tensor};
    /// # use candle_nn::{Linear, Module};
    /// # use lora::LoraLinear;
    /// let base = Linear::new(Tensor::ones((2, 3), DType::F32, &Device::Cpu)?, None);
    /// let layer = LoraLinear::frozen("fc", base)?;
    /// assert!(layer.trainable_parameters().is_empty());
    /// let y = layer.forward(&Tensor::ones((1, 3), DType::F32, &Device::Cpu)?)?;
    /// assert_eq!(y.to_vec2::<f32>()?, [[3., 3.]]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn frozen(name: impl Into<String>, base: impl Into<B>) -> Result<Self> {
        let name = checked_name(name.into())?;
        let base = frozen(&name, &base.into())?;
        Ok(Self::of(name, base))
    }

    /// Keeps `base` as it is and gives it no adapter yet: a weight or bias that is a variable, or a
    /// view of one, gets its gradient and moves with it.
    ///
    /// For pretraining and full fine-tuning; beside a base that should stay, use
    /// [`frozen`](Self::frozen). Adapters may lie on top, and then both train; only PiSSA and
    /// OLoRA, which would rewrite the weight, are refused. A weight that was *computed* from a
    /// variable, such as a cast, sends its gradient back but does not follow when the variable
    /// moves. [`LoraBuilder::trainable`](crate::LoraBuilder::trainable) builds whole networks so.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new), for the name and the base.
    ///
    /// ```
    /// # use candle_core::{Device, DType, Tensor, Var};
    /// # use candle_nn::{Linear, Module};
    /// # use lora::LoraLinear;
    /// let w = Var::ones((2, 3), DType::F32, &Device::Cpu)?;
    /// let layer = LoraLinear::unfrozen("fc", Linear::new(w.as_tensor().clone(), None))?;
    /// assert_eq!(layer.parameter_count().trainable, 6);
    ///
    /// let x = Tensor::new(&[[1f32, 2., 3.]], &Device::Cpu)?;
    /// let gradients = layer.forward(&x)?.sum_all()?.backward()?;
    /// assert_eq!(gradients.get(&w).unwrap().to_vec2::<f32>()?, [[1., 2., 3.]; 2]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn unfrozen(name: impl Into<String>, base: impl Into<B>) -> Result<Self> {
        let (name, base) = (checked_name(name.into())?, base.into());
        check_parts(&name, &base)?;
        Ok(Self::of(name, base))
    }

    fn of(name: String, base: B) -> Self {
        let state = State {
            base,
            adapters: Vec::new(),
            active: Vec::new(),
            enabled: true,
            merged: None,
            output_head: false,
        };
        Self {
            shared: Arc::new(Shared {
                name,
                state: RwLock::new(state),
            }),
        }
    }

    pub(crate) fn read(&self) -> RwLockReadGuard<'_, State<B>> {
        self.shared
            .state
            .read()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn write(&self) -> RwLockWriteGuard<'_, State<B>> {
        self.shared
            .state
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Marks the layer as the model's output head, which `all-linear` leaves out.
    ///
    /// ```
    /// # use candle_core::{Device, DType, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraConfig, LoraLinear, LoraModel, TargetModules};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let w = || Tensor::ones((2, 3), DType::F32, &Device::Cpu);
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// let proj = LoraLinear::frozen("proj", Linear::new(w()?, None))?;
    /// let head = LoraLinear::frozen("lm_head", Linear::new(w()?, None))?.output_head();
    /// let config = LoraConfig::new(1, 2.0).with_targets(TargetModules::AllLinear);
    /// LoraModel::new(&[&proj, &head])?.add_adapter("default", &config, &mut rng)?;
    /// assert_eq!((proj.adapters().len(), head.adapters().len()), (1, 0));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn output_head(self) -> Self {
        self.write().output_head = true;
        self
    }

    /// The module's path in the model, as given to [`new`](Self::new).
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::LoraLinear;
    /// # let base = Linear::new(Tensor::ones((3, 4), DType::F32, &Device::Cpu)?, None);
    /// assert_eq!(LoraLinear::frozen("q_proj", base)?.name(), "q_proj");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// The layer without any adapter; its tensors are shared, not copied.
    ///
    /// After PiSSA or OLoRA this is the rest of W that the adapter left.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::LoraLinear;
    /// # let base = Linear::new(Tensor::ones((3, 4), DType::F32, &Device::Cpu)?, None);
    /// let layer = LoraLinear::frozen("q_proj", base)?;
    /// assert_eq!(layer.base().weight().dims(), [3, 4]);
    /// assert!(!layer.base().weight().is_variable());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn base(&self) -> B {
        self.read().base.clone()
    }

    /// The number of inputs: features, channels or, for an embedding, the vocabulary's size.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::LoraLinear;
    /// # let base = Linear::new(Tensor::ones((3, 4), DType::F32, &Device::Cpu)?, None);
    /// assert_eq!(LoraLinear::frozen("q_proj", base)?.in_features(), 4);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn in_features(&self) -> usize {
        self.read().base.inputs()
    }

    /// The number of outputs: features or channels.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::LoraLinear;
    /// # let base = Linear::new(Tensor::ones((3, 4), DType::F32, &Device::Cpu)?, None);
    /// assert_eq!(LoraLinear::frozen("q_proj", base)?.out_features(), 3);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn out_features(&self) -> usize {
        self.read().base.out()
    }

    /// Adds a fresh adapter; the first one becomes active, as in PEFT.
    ///
    /// With [`Init::Pissa`](crate::Init::Pissa) and [`Init::Olora`](crate::Init::Olora) the
    /// adapter's part leaves the base weight; that is refused beside other adapters, which would
    /// change without a word, and on a weight that trains.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new); [`Error::AdapterExists`], [`Error::AdapterName`]; [`Error::Merged`]
    /// when the base is to be rewritten and is merged.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraConfig, LoraLinear};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let base = Linear::new(Tensor::ones((3, 4), DType::F32, &Device::Cpu)?, None);
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// let layer = LoraLinear::frozen("q_proj", base)?;
    /// layer.add_adapter("fr", &LoraConfig::new(2, 4.0), &mut rng)?;
    /// assert!(layer.add_adapter("fr", &LoraConfig::new(2, 4.0), &mut rng).is_err());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn add_adapter(
        &self,
        adapter: &str,
        config: &LoraConfig,
        mut rng: &mut (impl Rng + ?Sized),
    ) -> Result<()> {
        self.add_lora(adapter, config, &mut rng)
    }

    fn add_lora(&self, adapter: &str, config: &LoraConfig, rng: &mut dyn RngCore) -> Result<()> {
        let mut state = self.write();
        state.check_new(self.name(), adapter)?;
        if config.init_lora_weights.rewrites_base() && !state.adapters.is_empty() {
            return Err(unsupported(
                &format!(
                    "layer {}: {:?} beside other adapters",
                    self.name(),
                    config.init_lora_weights
                ),
                "it rewrites the base weight and would change them; add it first",
            ));
        }
        if config.init_lora_weights.rewrites_base()
            && matches!(state.base.weight(), Weight::Quantized(_))
        {
            return Err(unsupported(
                &format!(
                    "layer {}: {:?} on a weight in 4 bits",
                    self.name(),
                    config.init_lora_weights
                ),
                "what it leaves of the weight would be rounded again; give it the full weight and \
                 quantise the rest, or use another initialisation",
            ));
        }
        if config.init_lora_weights.rewrites_base() && state.base.weight().track_op() {
            return Err(unsupported(
                &format!(
                    "layer {}: {:?} on a weight that trains",
                    self.name(),
                    config.init_lora_weights
                ),
                "it rewrites the base weight, which would no longer be the variable's; \
                 freeze the base or use another initialisation",
            ));
        }
        let (mut new, rewritten) = Adapter::lora(self.name(), &state.base, config, rng)?;
        if config.bias != crate::Bias::None {
            new.train_bias(&state.base)?;
        }
        if let Some(weight) = rewritten {
            state.base = state.base.with(weight, state.base.bias().cloned())?;
        }
        state.insert(adapter, new);
        Ok(())
    }

    /// Adds a fresh VeRA adapter over shared matrices.
    ///
    /// # Errors
    ///
    /// What [`VeraConfig::validate`] refuses; a layer that is not linear; shared matrices of
    /// another rank or smaller than the layer; an adapter of that name.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraLinear, VeraConfig, VeraProjection};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let base = Linear::new(Tensor::ones((3, 4), DType::F32, &Device::Cpu)?, None);
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// let shared = VeraProjection::new(16, 4, 3, DType::F32, &Device::Cpu, &mut rng)?;
    /// let layer = LoraLinear::frozen("q_proj", base)?;
    /// let config = VeraConfig { r: 16, ..VeraConfig::default() };
    /// layer.add_vera("default", &config, &shared, &mut rng)?;
    /// assert_eq!(layer.parameter_count().trainable, 16 + 3);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn add_vera(
        &self,
        adapter: &str,
        config: &VeraConfig,
        projection: &VeraProjection,
        mut rng: &mut (impl Rng + ?Sized),
    ) -> Result<()> {
        let mut state = self.write();
        state.check_new(self.name(), adapter)?;
        let new = Adapter::vera(self.name(), &state.base, config, projection, &mut rng)?;
        state.insert(adapter, new);
        Ok(())
    }

    /// Makes exactly these adapters active, in this order; none at all gives the base's answers.
    ///
    /// # Errors
    ///
    /// [`Error::NoAdapter`]; [`Error::Merged`] while adapters are merged; a name given twice; more
    /// than one adapter that trains the base's own bias or weight.
    ///
    /// Source: PEFT `tuners/tuners_utils.py`, `set_adapter`.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraConfig, LoraLinear};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let base = Linear::new(Tensor::ones((3, 4), DType::F32, &Device::Cpu)?, None);
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// let layer = LoraLinear::new("q_proj", base, &LoraConfig::new(2, 4.0), &mut rng)?;
    /// let message = layer.set_adapter(&["fr"]).unwrap_err().to_string();
    /// assert_eq!(message, r#"layer q_proj: no adapter "fr"; there is "default""#);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn set_adapter(&self, adapters: &[&str]) -> Result<()> {
        let mut state = self.write();
        state.unmerged(self.name(), "choosing other adapters")?;
        let mut replacing = 0;
        for (i, name) in adapters.iter().enumerate() {
            let adapter = state.adapter(self.name(), name)?;
            if adapters[..i].contains(name) {
                return Err(unsupported(
                    &format!("layer {}: {adapters:?} together", self.name()),
                    "one of them comes twice and would act twice; name each once",
                ));
            }
            replacing += usize::from(adapter.saved_weight.is_some() || adapter.base_bias.is_some());
        }
        if replacing > 1 {
            return Err(unsupported(
                &format!("layer {}: {adapters:?} together", self.name()),
                "more than one of them brings a bias or weight for the base; choose one",
            ));
        }
        state.active = adapters.iter().map(ToString::to_string).collect();
        Ok(())
    }

    /// Takes an adapter away. What PiSSA or OLoRA took out of the base goes back into it.
    ///
    /// # Errors
    ///
    /// [`Error::NoAdapter`]; [`Error::Merged`] while adapters are merged; [`Error::Unsupported`] for
    /// an adapter of PiSSA or OLoRA beside others, whose base would change under them.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraConfig, LoraLinear};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let base = Linear::new(Tensor::ones((3, 4), DType::F32, &Device::Cpu)?, None);
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// let layer = LoraLinear::new("q_proj", base, &LoraConfig::new(2, 4.0), &mut rng)?;
    /// layer.delete_adapter("default")?;
    /// assert!(layer.adapters().is_empty() && layer.active_adapters().is_empty());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn delete_adapter(&self, adapter: &str) -> Result<()> {
        let mut state = self.write();
        state.unmerged(self.name(), "deleting an adapter")?;
        state.may_lose(self.name(), adapter)?;
        if let Some((a, b, s)) = &state.adapter(self.name(), adapter)?.taken {
            let part = state
                .base
                .to_weight_layout((state.base.product(a, b)? * *s)?)?;
            let weight = state.base.weight();
            let whole =
                (weight.dense()?.to_dtype(part.dtype())? + part)?.to_dtype(weight.dtype())?;
            state.base = state.base.with(whole, state.base.bias().cloned())?;
        }
        state.adapters.retain(|(name, _)| name != adapter);
        state.active.retain(|name| name != adapter);
        Ok(())
    }

    /// Turns all adapters off (`false`) or on again (`true`), merged ones too.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::{Linear, Module};
    /// # use lora::{Init, LoraConfig, LoraLinear};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let base = Linear::new(Tensor::ones((3, 4), DType::F32, &Device::Cpu)?, None);
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// let config = LoraConfig::new(2, 4.0).with_init(Init::Random);
    /// let layer = LoraLinear::new("q_proj", base, &config, &mut rng)?;
    /// let x = Tensor::ones((1, 4), DType::F32, &Device::Cpu)?;
    /// assert_ne!(layer.forward(&x)?.to_vec2::<f32>()?, [[4f32; 3]]);
    /// layer.enable_adapters(false);
    /// assert_eq!(layer.forward(&x)?.to_vec2::<f32>()?, [[4f32; 3]]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn enable_adapters(&self, enabled: bool) {
        self.write().enabled = enabled;
    }

    /// The names of all adapters, in the order in which they were added.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraConfig, LoraLinear};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let base = Linear::new(Tensor::ones((3, 4), DType::F32, &Device::Cpu)?, None);
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// # let layer = LoraLinear::new("q_proj", base, &LoraConfig::new(2, 4.0), &mut rng)?;
    /// assert_eq!(layer.adapters(), ["default"]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn adapters(&self) -> Vec<String> {
        self.read().names()
    }

    /// The names of the active adapters, in the order in which they act.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraConfig, LoraLinear};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let base = Linear::new(Tensor::ones((3, 4), DType::F32, &Device::Cpu)?, None);
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// # let layer = LoraLinear::new("q_proj", base, &LoraConfig::new(2, 4.0), &mut rng)?;
    /// assert_eq!(layer.active_adapters(), ["default"]);
    /// layer.set_adapter(&[])?;
    /// assert!(layer.active_adapters().is_empty());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn active_adapters(&self) -> Vec<String> {
        self.read().active.clone()
    }

    /// The trained numbers of one adapter.
    ///
    /// # Errors
    ///
    /// [`Error::NoAdapter`].
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraConfig, LoraLinear};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let base = Linear::new(Tensor::ones((3, 4), DType::F32, &Device::Cpu)?, None);
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// let layer = LoraLinear::new("q_proj", base, &LoraConfig::new(2, 4.0), &mut rng)?;
    /// assert_eq!(layer.adapter("default")?.r(), 2);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn adapter(&self, adapter: &str) -> Result<Adapter> {
        Ok(self.read().adapter(self.name(), adapter)?.clone())
    }

    /// The first active adapter.
    fn first(&self) -> Result<Adapter> {
        let state = self.read();
        let Some(name) = state.active.first() else {
            return Err(Error::NoneActive {
                layer: self.name().to_string(),
                known: state.names(),
            });
        };
        Ok(state.adapter(self.name(), name)?.clone())
    }

    /// A of the first active adapter: (r, in), with the kernel's sizes for a convolution.
    ///
    /// # Errors
    ///
    /// [`Error::NoneActive`]; [`Error::Unsupported`] for a VeRA adapter, whose A is shared.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraConfig, LoraLinear};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let base = Linear::new(Tensor::ones((3, 4), DType::F32, &Device::Cpu)?, None);
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// let layer = LoraLinear::new("q_proj", base, &LoraConfig::new(2, 4.0), &mut rng)?;
    /// assert_eq!(layer.lora_a()?.dims(), [2, 4]);
    /// assert!(layer.lora_a()?.is_variable());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn lora_a(&self) -> Result<Var> {
        self.first()?
            .lora_a()
            .cloned()
            .ok_or_else(|| self.no_pair())
    }

    /// B of the first active adapter: (out, r); zero in a fresh layer.
    ///
    /// # Errors
    ///
    /// As [`lora_a`](Self::lora_a).
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraConfig, LoraLinear};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let base = Linear::new(Tensor::ones((3, 4), DType::F32, &Device::Cpu)?, None);
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// let layer = LoraLinear::new("q_proj", base, &LoraConfig::new(2, 4.0), &mut rng)?;
    /// assert_eq!(layer.lora_b()?.to_vec2::<f32>()?, [[0.0; 2]; 3]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn lora_b(&self) -> Result<Var> {
        self.first()?
            .lora_b()
            .cloned()
            .ok_or_else(|| self.no_pair())
    }

    fn no_pair(&self) -> Error {
        unsupported(
            &format!("layer {}: A and B of this adapter", self.name()),
            "it has no pair of its own; use adapter(name) for what it has",
        )
    }

    /// ΔW = Σ s · B A of the active adapters, in the weight's layout and without DoRA's factor.
    ///
    /// For looking at; a forward pass never needs it. It is in the type of A and B and keeps their
    /// graph, so a loss on ΔW can train them.
    ///
    /// # Shapes
    ///
    /// The weight's, whatever the rank.
    ///
    /// # Errors
    ///
    /// [`Error::NoneActive`]; [`Error::Unsupported`] for a grouped convolution.
    ///
    /// Source: PEFT `tuners/lora/layer.py`, `get_delta_weight`.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraConfig, LoraLinear};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let base = Linear::new(Tensor::ones((3, 2), DType::F32, &Device::Cpu)?, None);
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// let layer = LoraLinear::new("q_proj", base, &LoraConfig::new(1, 4.0), &mut rng)?;
    /// layer.lora_a()?.set(&Tensor::new(&[[1f32, 2.]], &Device::Cpu)?)?;
    /// layer.lora_b()?.set(&Tensor::new(&[[1f32], [0.], [3.]], &Device::Cpu)?)?;
    ///
    /// // s = 4 / 1
    /// let delta = layer.delta_weight()?.to_vec2::<f32>()?;
    /// assert_eq!(delta, [[4., 8.], [0., 0.], [12., 24.]]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn delta_weight(&self) -> Result<Tensor> {
        let state = self.read();
        let mut sum: Option<Tensor> = None;
        for adapter in state.active(self.name())? {
            let delta = adapter.delta(self.name(), &state.base)?;
            sum = match (sum, delta) {
                (Some(sum), Some(delta)) => Some((sum + delta)?),
                (sum, delta) => sum.or(delta),
            };
        }
        sum.ok_or_else(|| Error::NoneActive {
            layer: self.name().to_string(),
            known: state.names(),
        })
    }

    /// The variables that train, of the active adapters, under PEFT's names and sorted by them.
    ///
    /// A base that trains is not among them: its variables are
    /// [`LoraBuilder::variables`](crate::LoraBuilder::variables), under the checkpoint's names.
    ///
    /// With more than one active adapter each name carries the adapter's, as in PEFT's memory:
    /// `….lora_A.fr.weight`.
    ///
    /// Source: PEFT `utils/save_and_load.py`, `get_peft_model_state_dict`.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraConfig, LoraLinear};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let base = Linear::new(Tensor::ones((3, 4), DType::F32, &Device::Cpu)?, None);
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// let layer = LoraLinear::new("layers.0.q_proj", base, &LoraConfig::new(2, 4.0), &mut rng)?;
    /// let names: Vec<_> = layer.trainable_parameters().into_iter().map(|(n, _)| n).collect();
    /// assert_eq!(names, [
    ///     "base_model.model.layers.0.q_proj.lora_A.weight",
    ///     "base_model.model.layers.0.q_proj.lora_B.weight",
    /// ]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn trainable_parameters(&self) -> Vec<(String, Var)> {
        let state = self.read();
        let several = state.active.len() > 1;
        let mut all = Vec::new();
        for (name, adapter) in state
            .adapters
            .iter()
            .filter(|(n, _)| state.active.contains(n))
        {
            for (key, var) in adapter.trainable(B::KEYS) {
                let key = if several {
                    with_adapter(key, name)
                } else {
                    key.to_string()
                };
                all.push((
                    format!("base_model.model.{}.{key}", self.name()),
                    var.clone(),
                ));
            }
        }
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    }

    /// How many numbers the layer holds, and how many of them train: those of active adapters, and
    /// an [`unfrozen`](Self::unfrozen) base's where no adapter puts its own in their place.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraConfig, LoraLinear};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let base = Linear::new(Tensor::ones((3, 4), DType::F32, &Device::Cpu)?, None);
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// let layer = LoraLinear::new("q_proj", base, &LoraConfig::new(2, 4.0), &mut rng)?;
    /// let count = layer.parameter_count();
    /// assert_eq!((count.trainable, count.all), (2 * (4 + 3), 2 * (4 + 3) + 3 * 4));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn parameter_count(&self) -> ParameterCount {
        let state = self.read();
        let replaced = |by: fn(&Adapter) -> bool| {
            let mut active = state.adapters.iter();
            active.any(|(name, adapter)| state.active.contains(name) && by(adapter))
        };
        let part = |tensor: Weight<'_>, replaced: bool| {
            let numbers = tensor.dims().iter().product();
            let trains = tensor.track_op() && !replaced;
            ParameterCount {
                trainable: if trains { numbers } else { 0 },
                all: numbers,
            }
        };
        let weight_replaced = replaced(|adapter| adapter.saved_weight.is_some());
        let mut count = part(state.base.weight(), weight_replaced);
        if let Some(bias) = state.base.bias() {
            count = count + part(bias.into(), replaced(|adapter| adapter.base_bias.is_some()));
        }
        for (name, adapter) in &state.adapters {
            let own: usize = adapter
                .trainable(B::KEYS)
                .iter()
                .map(|(_, v)| v.elem_count())
                .sum();
            count.all += own;
            count.trainable += if state.active.contains(name) { own } else { 0 };
        }
        count
    }

    /// The layer's output; `train` turns dropout on.
    ///
    /// [`Module::forward`] is this with `train = false`. candle gives every [`Module`] a
    /// [`ModuleT`](candle_nn::ModuleT) that ignores `train`; in a generic container wrap the layer
    /// with [`candle_nn::func_t`] where dropout is to act.
    ///
    /// # Shapes
    ///
    /// As the base's.
    ///
    /// # Errors
    ///
    /// An input that does not fit, by shape, type or device; the message names the layer and both
    /// shapes. [`Error::Merged`] for training while merged, which would train nothing.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::{Linear, Module};
    /// # use lora::{Init, LoraConfig, LoraLinear};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let base = Linear::new(Tensor::ones((3, 4), DType::F32, &Device::Cpu)?, None);
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// let config = LoraConfig::new(2, 4.0).with_init(Init::Random).with_dropout(0.5);
    /// let layer = LoraLinear::new("q_proj", base, &config, &mut rng)?;
    /// let x = Tensor::ones((8, 4), DType::F32, &Device::Cpu)?;
    /// let once = layer.forward_t(&x, true)?.to_vec2::<f32>()?;
    /// assert_ne!(once, layer.forward_t(&x, true)?.to_vec2::<f32>()?);
    /// assert_eq!(layer.forward(&x)?.to_vec2::<f32>()?, layer.forward(&x)?.to_vec2::<f32>()?);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        let state = self.read();
        check_input(self.name(), &state.base, x)?;
        let output = match rows::current() {
            Some(rows) if state.enabled => state.forward_rows(self.name(), x, &rows, train),
            _ => state.forward(self.name(), x, train),
        };
        output.map_err(|error| self.at(error, &state.base, x))
    }

    /// The same error with the layer's name and both shapes.
    fn at(&self, error: Error, base: &B, x: &Tensor) -> Error {
        match error {
            Error::Candle(source) => Error::Layer {
                layer: self.name().to_string(),
                input: x.dims().to_vec(),
                weight: base.weight().dims().to_vec(),
                source: Box::new(source),
            },
            other => other,
        }
    }
}

impl<B: sealed::Base> State<B> {
    pub fn names(&self) -> Vec<String> {
        self.adapters.iter().map(|(name, _)| name.clone()).collect()
    }

    pub fn adapter(&self, layer: &str, name: &str) -> Result<&Adapter> {
        match self.adapters.iter().find(|(known, _)| known == name) {
            Some((_, adapter)) => Ok(adapter),
            None => Err(Error::NoAdapter {
                place: format!("layer {layer}"),
                adapter: name.to_string(),
                known: self.names(),
            }),
        }
    }

    pub fn adapter_mut(&mut self, layer: &str, name: &str) -> Result<&mut Adapter> {
        self.adapter(layer, name)?;
        let found = self.adapters.iter_mut().find(|(known, _)| known == name);
        found
            .map(|(_, adapter)| adapter)
            .ok_or_else(|| Error::NoAdapter {
                place: format!("layer {layer}"),
                adapter: name.to_string(),
                known: Vec::new(),
            })
    }

    pub fn active(&self, layer: &str) -> Result<Vec<&Adapter>> {
        self.active
            .iter()
            .map(|name| self.adapter(layer, name))
            .collect()
    }

    /// Refuses to delete an adapter when that would change the base under others.
    pub fn may_lose(&self, layer: &str, adapter: &str) -> Result<()> {
        if self.adapter(layer, adapter)?.taken.is_some() && self.adapters.len() > 1 {
            return Err(unsupported(
                &format!("layer {layer}: deleting {adapter:?}, which took its part of the base"),
                "the base would change under the other adapters; delete them first",
            ));
        }
        Ok(())
    }

    pub fn unmerged(&self, layer: &str, before: &'static str) -> Result<()> {
        match &self.merged {
            Some(merged) => Err(Error::Merged {
                place: format!("layer {layer}"),
                adapters: merged.names.clone(),
                before,
            }),
            None => Ok(()),
        }
    }

    pub fn check_new(&self, layer: &str, adapter: &str) -> Result<()> {
        checked_adapter_name(adapter)?;
        if self.adapters.iter().any(|(name, _)| name == adapter) {
            return Err(Error::AdapterExists {
                place: format!("layer {layer}"),
                adapter: adapter.to_string(),
            });
        }
        self.unmerged(layer, "adding an adapter")
    }

    pub fn insert(&mut self, name: &str, adapter: Adapter) {
        if self.adapters.is_empty() {
            self.active = vec![name.to_string()];
        }
        self.adapters.push((name.to_string(), adapter));
    }

    fn forward(&self, layer: &str, x: &Tensor, train: bool) -> Result<Tensor> {
        if !self.enabled {
            return self.base.whole(x);
        }
        if let Some(merged) = &self.merged {
            if train {
                self.unmerged(layer, "training")?;
            }
            return merged.base.whole(x);
        }
        let active = self.active(layer)?;
        if active.is_empty() {
            return self.base.whole(x);
        }
        if let [adapter] = active[..]
            && let Some((a, b)) = adapter.bare_pair(train)
        {
            let rows = x.elem_count() / self.base.inputs();
            let share = Share::all(rows, adapter.r(), adapter.scaling());
            if let Some(y) = self.base.with_shares(x, &[(a, b)], vec![share])? {
                return Ok(y);
            }
        }
        let flat = self.base.flat(x)?;
        self.base
            .unflat(self.adapted(&active, &flat, None, train)?, x)
    }

    /// The flat output of a flat input with these adapters; `y` is the base's, where known.
    pub fn adapted(
        &self,
        active: &[&Adapter],
        x: &Tensor,
        y: Option<Tensor>,
        train: bool,
    ) -> Result<Tensor> {
        let mut base = self.base.clone();
        for adapter in active {
            base = adapter.replaced(&base)?;
        }
        let y = match y {
            Some(y) => y,
            None => base.forward(x)?,
        };
        if active.iter().all(|adapter| adapter.update.is_none()) {
            return Ok(y);
        }
        let (own, wide) = (y.dtype(), adapter_dtype(y.dtype()));
        let x = if base.is_embedding() {
            x.clone()
        } else {
            x.to_dtype(wide)?
        };
        let mut y = y.to_dtype(wide)?;
        for adapter in active {
            y = adapter.apply(&base, &x, y, train)?;
        }
        Ok(y.to_dtype(own)?)
    }
}

impl<B: Base> Clone for LoraLayer<B> {
    fn clone(&self) -> Self {
        Self {
            shared: self.shared.clone(),
        }
    }
}

impl<B: Base> Module for LoraLayer<B> {
    /// The layer's output without dropout: [`forward_t`](LoraLayer::forward_t) with `train = false`.
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        Ok(self.forward_t(x, false)?)
    }
}

impl<B: Base> fmt::Display for LoraLayer<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.read();
        write!(
            f,
            "{}({}: {} → {}",
            B::LAYER,
            self.name(),
            state.base.inputs(),
            state.base.out()
        )?;
        for name in &state.active {
            if let Ok(adapter) = state.adapter(self.name(), name) {
                let label = if state.active.len() > 1 {
                    format!("{name}: ")
                } else {
                    String::new()
                };
                write!(
                    f,
                    ", {label}r = {}, scaling = {}",
                    adapter.r(),
                    adapter.scaling()
                )?;
            }
        }
        drop(state);
        write!(
            f,
            ", {} trainable)",
            grouped(self.parameter_count().trainable)
        )
    }
}

impl<B: Base> fmt::Debug for LoraLayer<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// `lora_A.weight` of adapter `fr` is `lora_A.fr.weight`, `lora_embedding_A` is
/// `lora_embedding_A.fr`: PEFT's names in memory.
fn with_adapter(key: &str, adapter: &str) -> String {
    match key.split_once('.') {
        Some((head, tail)) if head != "base_layer" => format!("{head}.{adapter}.{tail}"),
        _ => format!("{key}.{adapter}"),
    }
}

fn checked_name(name: String) -> Result<String> {
    let broken = |part: &str| part.is_empty() || part.contains(char::is_whitespace);
    if name.split('.').any(broken) {
        return Err(Error::Name { name });
    }
    Ok(name)
}

/// An adapter's name becomes a folder's name and a part of parameter names.
pub(crate) fn checked_adapter_name(name: &str) -> Result<()> {
    let good = |c: char| c.is_alphanumeric() || c == '-' || c == '_';
    if name.is_empty() || name == rows::BASE || !name.chars().all(good) {
        return Err(Error::AdapterName {
            name: name.to_string(),
        });
    }
    Ok(())
}
