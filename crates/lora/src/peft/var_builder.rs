//! A checkpoint whose weights already carry an adapter.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::Tensor;
use candle_nn::{Conv1d, Conv1dConfig, Conv2d, Conv2dConfig, Embedding, Linear, VarBuilder};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::model::repeatable;
use super::{AdapterFiles, AdapterKind, ModuleTensors};
use crate::base::Base;
use crate::config::unsupported;
use crate::layer::{DEFAULT_ADAPTER, LoraLayer};
use crate::model::any::AnyLayer;
use crate::through::through;
use crate::{Error, Init, Result, ScaledEmbedding, VeraProjection};

/// Output heads of their own, in the checkpoints of the common models.
const HEADS: [&str; 5] = [
    "lm_head.weight",
    "embed_out.weight",
    "output.weight",
    "cls.predictions.decoder.weight",
    "model.lm_head.weight",
];

/// A `VarBuilder` over `base` whose weights already carry the adapter: any model that is built from
/// a `VarBuilder`, all of candle-transformers, runs with a PEFT adapter unchanged.
///
/// A weight is merged when the model asks for it: W + s B A, DoRA, VeRA, `lora_bias` and
/// `modules_to_save` included, computed in f32 and rounded once to the type asked for. Nothing
/// trains; the cost in the forward pass is the base's. The paths of the adapter must be those of
/// the checkpoint; [`AdapterFiles::renamed`] changes them.
///
/// # Errors
///
/// [`Error::File`] when the files do not fit together; [`Error::Unsupported`] for a module that the
/// checkpoint does not have, for a randomised PiSSA, and for an adapter on an embedding in a
/// checkpoint without an output head of its own: a model that ties both would be changed twice.
/// [`merged_var_builder_tied`] accepts that. When the model reads a weight: a shape that does not
/// fit.
///
/// ```
/// use std::collections::{BTreeMap, HashMap};
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::VarBuilder;
/// use lora::{LoraConfig, peft::{AdapterFiles, merged_var_builder}};
///
/// let weight = Tensor::new(&[[1f32, 2.], [3., 4.]], &Device::Cpu)?;
/// let weights = HashMap::from([("proj.weight".to_string(), weight)]);
/// let base = VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu);
/// let key = |part| format!("base_model.model.proj.{part}.weight");
/// let adapter = AdapterFiles {
///     config: LoraConfig::new(1, 2.0).with_targets("proj").into(),
///     tensors: BTreeMap::from([
///         (key("lora_A"), Tensor::new(&[[1f32, 1.]], &Device::Cpu)?),
///         (key("lora_B"), Tensor::new(&[[10f32], [0.]], &Device::Cpu)?),
///     ]),
/// };
/// let merged = merged_var_builder(base, &adapter)?;
/// let proj = candle_nn::linear_no_bias(2, 2, merged.vb().pp("proj"))?;
/// assert_eq!(proj.weight().to_vec2::<f32>()?, [[21., 22.], [3., 4.]]);
/// assert!(merged.unread().is_empty());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn merged_var_builder<'a>(
    base: VarBuilder<'a>,
    adapter: &AdapterFiles,
) -> Result<MergedVarBuilder<'a>> {
    let merged = merged_var_builder_tied(base.clone(), adapter)?;
    let embedding = |module: &ModuleTensors| module.embedding_a.is_some();
    let path = merged
        .expected
        .modules
        .iter()
        .find(|(_, m)| embedding(m))
        .map(|(path, _)| path);
    match path {
        Some(path) if !HEADS.iter().any(|head| base.root().contains_tensor(head)) => {
            Err(unsupported(
                &format!("an adapter on the embedding {path:?} of a base without an output head"),
                "if the model ties its head to the embedding, both would change; store the head as a \
             tensor of its own, or use merged_var_builder_tied when that is meant",
            ))
        }
        _ => Ok(merged),
    }
}

/// As [`merged_var_builder`], for an adapter on an embedding that the model may use twice.
///
/// # Errors
///
/// As [`merged_var_builder`].
///
/// ```
/// # use std::collections::{BTreeMap, HashMap};
/// # use candle_core::{DType, Device, Tensor};
/// # use candle_nn::VarBuilder;
/// # use lora::{LoraConfig, peft::{AdapterFiles, merged_var_builder, merged_var_builder_tied}};
/// # let ones = |shape| Tensor::ones(shape, DType::F32, &Device::Cpu);
/// # let key = |part| format!("base_model.model.wte.{part}");
/// # let adapter = AdapterFiles {
/// #     config: LoraConfig::new(1, 2.0).into(),
/// #     tensors: BTreeMap::from([
/// #         (key("lora_embedding_A"), ones((1, 5))?),
/// #         (key("lora_embedding_B"), ones((3, 1))?),
/// #     ]),
/// # };
/// # let weights = HashMap::from([("wte.weight".to_string(), ones((5, 3))?)]);
/// # let base = VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu);
/// assert!(merged_var_builder(base.clone(), &adapter).is_err());
/// let merged = merged_var_builder_tied(base, &adapter)?;
/// assert_eq!(merged.vb().get((5, 3), "wte.weight")?.to_vec2::<f32>()?, [[3f32; 3]; 5]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn merged_var_builder_tied<'a>(
    base: VarBuilder<'a>,
    adapter: &AdapterFiles,
) -> Result<MergedVarBuilder<'a>> {
    if let AdapterKind::Lora(config) = &adapter.config.kind {
        repeatable(config)?;
    }
    let shared = match adapter.vera_projection() {
        Some((a, b)) => Some(VeraProjection::from_tensors(a.clone(), b.clone())?),
        None => None,
    };
    let root = base.root();
    let modules = adapter.modules()?;
    let mut unread = BTreeSet::new();
    for (path, module) in &modules {
        let has = |part: &str| root.contains_tensor(&format!("{path}.{part}"));
        if (module.has_adapter() || module.saved_weight.is_some()) && !has("weight") {
            return Err(unsupported(
                &format!("the adapter's module {path:?}"),
                &format!(
                    "the base has no tensor {path}.weight; if the checkpoint names it otherwise, \
                     change the adapter's paths with AdapterFiles::renamed"
                ),
            ));
        }
        let bias = [&module.lora_b_bias, &module.base_bias, &module.saved_bias];
        let bias = bias.iter().any(|b| b.is_some());
        if bias && !has("bias") {
            return Err(unsupported(
                &format!("the adapter's bias for {path:?}"),
                &format!("the base has no tensor {path}.bias, so the model would not read it"),
            ));
        }
        if module.has_adapter() || module.saved_weight.is_some() {
            unread.insert(format!("{path}.weight"));
        }
        if bias {
            unread.insert(format!("{path}.bias"));
        }
    }
    let expected = Arc::new(Expected {
        modules,
        kind: adapter.config.kind.clone(),
        shared,
        unread: Mutex::new(unread),
    });
    let adapter = expected.clone();
    let vb = through(&base, move |name, tensor| Ok(adapter.merged(name, tensor)?));
    Ok(MergedVarBuilder { vb, expected })
}

/// What [`merged_var_builder`] gives: the builder, and what of the adapter no model has read yet.
///
/// ```
/// # use std::collections::{BTreeMap, HashMap};
/// # use candle_core::{DType, Device, Tensor};
/// # use candle_nn::VarBuilder;
/// # use lora::{LoraConfig, peft::{AdapterFiles, merged_var_builder_tied}};
/// # let ones = |shape| Tensor::ones(shape, DType::F32, &Device::Cpu);
/// # let key = |part| format!("base_model.model.wte.{part}");
/// # let adapter = AdapterFiles {
/// #     config: LoraConfig::new(1, 2.0).into(),
/// #     tensors: BTreeMap::from([
/// #         (key("lora_embedding_A"), ones((1, 5))?),
/// #         (key("lora_embedding_B"), ones((3, 1))?),
/// #     ]),
/// # };
/// # let weights = HashMap::from([("wte.weight".to_string(), ones((5, 3))?)]);
/// # let base = VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu);
/// let merged = merged_var_builder_tied(base, &adapter)?;
/// assert_eq!(merged.unread(), ["wte.weight"]);
/// let _embedding = candle_nn::embedding(5, 3, merged.vb().pp("wte"))?;
/// assert!(merged.unread().is_empty());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct MergedVarBuilder<'a> {
    vb: VarBuilder<'a>,
    expected: Arc<Expected>,
}

impl<'a> MergedVarBuilder<'a> {
    /// The builder to load a model from.
    ///
    /// ```
    /// # use std::collections::{BTreeMap, HashMap};
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::VarBuilder;
    /// # use lora::{LoraConfig, peft::{AdapterFiles, merged_var_builder_tied}};
    /// # let ones = |shape| Tensor::ones(shape, DType::F32, &Device::Cpu);
    /// # let key = |part| format!("base_model.model.wte.{part}");
    /// # let adapter = AdapterFiles {
    /// #     config: LoraConfig::new(1, 2.0).into(),
    /// #     tensors: BTreeMap::from([
    /// #         (key("lora_embedding_A"), ones((1, 5))?),
    /// #         (key("lora_embedding_B"), ones((3, 1))?),
    /// #     ]),
    /// # };
    /// # let weights = HashMap::from([("wte.weight".to_string(), ones((5, 3))?)]);
    /// # let base = VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu);
    /// let merged = merged_var_builder_tied(base, &adapter)?;
    /// assert!(merged.vb().contains_tensor("wte.weight"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn vb(&self) -> VarBuilder<'a> {
        self.vb.clone()
    }

    /// The tensors that the adapter changes and that were not read: empty after a model is loaded,
    /// or part of the adapter has no effect.
    ///
    /// ```
    /// # use std::collections::{BTreeMap, HashMap};
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::VarBuilder;
    /// # use lora::{LoraConfig, peft::{AdapterFiles, merged_var_builder_tied}};
    /// # let ones = |shape| Tensor::ones(shape, DType::F32, &Device::Cpu);
    /// # let key = |part| format!("base_model.model.wte.{part}");
    /// # let adapter = AdapterFiles {
    /// #     config: LoraConfig::new(1, 2.0).into(),
    /// #     tensors: BTreeMap::from([
    /// #         (key("lora_embedding_A"), ones((1, 5))?),
    /// #         (key("lora_embedding_B"), ones((3, 1))?),
    /// #     ]),
    /// # };
    /// # let weights = HashMap::from([("wte.weight".to_string(), ones((5, 3))?)]);
    /// # let base = VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu);
    /// let merged = merged_var_builder_tied(base, &adapter)?;
    /// assert_eq!(merged.unread(), ["wte.weight"]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn unread(&self) -> Vec<String> {
        let unread = self
            .expected
            .unread
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        unread.iter().cloned().collect()
    }
}

impl AdapterFiles {
    /// The same adapter with other module paths, such as a prefix less or more.
    ///
    /// # Errors
    ///
    /// [`Error::File`] when a tensor's name is not understood, or two modules would have one path.
    ///
    /// ```
    /// use std::collections::BTreeMap;
    /// use candle_core::{DType, Device, Tensor};
    /// use lora::{LoraConfig, peft::AdapterFiles};
    ///
    /// let a = Tensor::ones((1, 4), DType::F32, &Device::Cpu)?;
    /// let key = "base_model.model.bert.pooler.lora_A.weight".to_string();
    /// let config = LoraConfig::new(1, 2.0).into();
    /// let files = AdapterFiles { config, tensors: BTreeMap::from([(key, a)]) };
    /// let files = files.renamed(|path| path.trim_start_matches("bert.").to_string())?;
    /// assert!(files.tensors.contains_key("base_model.model.pooler.lora_A.weight"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn renamed(&self, rename: impl Fn(&str) -> String) -> Result<Self> {
        let mut tensors = BTreeMap::new();
        for (key, tensor) in &self.tensors {
            let refused = |why: &str| {
                super::bad_file(
                    super::WEIGHTS_NAME.as_ref(),
                    format!("tensor {key:?}: {why}"),
                )
            };
            let mut name =
                super::TensorName::parse(key).ok_or_else(|| refused("not a name of PEFT"))?;
            if !name.path.is_empty() {
                name.path = rename(&name.path);
            }
            if tensors.insert(name.key(), tensor.clone()).is_some() {
                return Err(refused("two modules would have this name after renaming"));
            }
        }
        Ok(Self {
            config: self.config.clone(),
            tensors,
        })
    }
}

/// The adapter, and what of it is still to be read.
struct Expected {
    modules: BTreeMap<String, ModuleTensors>,
    kind: AdapterKind,
    shared: Option<VeraProjection>,
    unread: Mutex<BTreeSet<String>>,
}

impl Expected {
    /// The module and the part that a tensor's name means, when the adapter changes it.
    fn module<'n>(&self, name: &'n str) -> Option<(&ModuleTensors, &'n str, &'n str)> {
        let (path, part) = name.rsplit_once('.')?;
        Some((self.modules.get(path)?, path, part))
    }

    /// `tensor` of the base with the adapter's part in it.
    fn merged(&self, name: &str, tensor: Tensor) -> Result<Tensor> {
        let Some((module, path, part)) = self.module(name) else {
            return Ok(tensor);
        };
        let merged = match part {
            "weight" => self.weight(path, module, &tensor)?,
            "bias" => self.bias(path, module, &tensor)?,
            _ => return Ok(tensor),
        };
        self.unread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(name);
        if merged.dims() != tensor.dims() {
            return Err(unsupported(
                &format!("{name} {:?} of the adapter", merged.dims()),
                &format!(
                    "the base holds {:?}; the adapter belongs to another model",
                    tensor.dims()
                ),
            ));
        }
        Ok(merged
            .to_dtype(tensor.dtype())?
            .to_device(tensor.device())?)
    }

    fn bias(&self, path: &str, module: &ModuleTensors, bias: &Tensor) -> Result<Tensor> {
        let own = module.saved_bias_or_base().as_ref().unwrap_or(bias);
        match (&module.lora_b_bias, &self.kind) {
            (Some(more), AdapterKind::Lora(config)) => {
                let more = (more * config.for_layer(path)?.scaling())?;
                let own = own.to_dtype(more.dtype())?.to_device(more.device())?;
                Ok((own + more)?)
            }
            _ => Ok(own.clone()),
        }
    }

    fn weight(&self, path: &str, module: &ModuleTensors, weight: &Tensor) -> Result<Tensor> {
        if let Some(saved) = &module.saved_weight {
            return Ok(saved.clone());
        }
        if !module.has_adapter() {
            return Ok(weight.clone());
        }
        if module.embedding_a.is_some() {
            let dim = *weight.dims().last().unwrap_or(&0);
            let base = ScaledEmbedding::from(Embedding::new(weight.clone(), dim));
            return self.layer(path, module, base);
        }
        match module.lora_a.as_ref().map_or(2, Tensor::rank) {
            2 if self.transposed(path, module, weight)? => {
                let base = Linear::new(weight.t()?.contiguous()?, None);
                Ok(self.layer(path, module, base)?.t()?.contiguous()?)
            }
            2 => self.layer(path, module, Linear::new(weight.clone(), None)),
            3 => {
                self.ungrouped(path, module, weight)?;
                self.layer(
                    path,
                    module,
                    Conv1d::new(weight.clone(), None, Conv1dConfig::default()),
                )
            }
            4 => {
                self.ungrouped(path, module, weight)?;
                self.layer(
                    path,
                    module,
                    Conv2d::new(weight.clone(), None, Conv2dConfig::default()),
                )
            }
            rank => Err(unsupported(
                &format!("layer {path}: lora_A with {rank} dimensions"),
                "this crate has linear layers, Conv1d and Conv2d",
            )),
        }
    }

    /// Whether the checkpoint stores this weight as (in, out).
    fn transposed(&self, path: &str, module: &ModuleTensors, weight: &Tensor) -> Result<bool> {
        let (AdapterKind::Lora(config), Some(a), Some(b)) =
            (&self.kind, &module.lora_a, &module.lora_b)
        else {
            return Ok(false);
        };
        let (inputs, out) = (a.dims()[1], b.dims()[0]);
        match weight.dims() {
            // PEFT ignores the flag, with a warning, on a layer that stores (out, in).
            [rows, columns] if [*rows, *columns] == [out, inputs] => {
                Ok(config.fan_in_fan_out && inputs == out)
            }
            [rows, columns] if [*rows, *columns] == [inputs, out] && config.fan_in_fan_out => {
                Ok(true)
            }
            [rows, columns] if [*rows, *columns] == [inputs, out] => Err(unsupported(
                &format!(
                    "layer {path}: weight {:?} beside A {:?} and B {:?}",
                    weight.dims(),
                    a.dims(),
                    b.dims()
                ),
                "the base stores (in, out), as GPT-2 does; set fan_in_fan_out",
            )),
            dims => Err(unsupported(
                &format!(
                    "layer {path}: weight {dims:?} beside A {:?} and B {:?}",
                    a.dims(),
                    b.dims()
                ),
                "the adapter belongs to another model",
            )),
        }
    }

    fn ungrouped(&self, path: &str, module: &ModuleTensors, weight: &Tensor) -> Result<()> {
        let inputs = module.lora_a.as_ref().map_or(0, |a| a.dims()[1]);
        let fits = weight.rank() > 1 && weight.dims()[1] == inputs;
        if fits {
            return Ok(());
        }
        Err(unsupported(
            &format!(
                "layer {path}: weight {:?} beside an adapter of {inputs} channels",
                weight.dims()
            ),
            "an adapter on a convolution with groups cannot be merged",
        ))
    }

    fn layer<B: Base>(&self, path: &str, module: &ModuleTensors, base: B) -> Result<Tensor> {
        let layer = LoraLayer::<B>::frozen(path, base)?;
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        match (&self.kind, &self.shared) {
            (AdapterKind::Lora(config), _) => {
                let mut own = config.for_layer(path)?;
                if !own.init_lora_weights.rewrites_base() {
                    own.init_lora_weights = Init::Kaiming;
                }
                own.bias = crate::Bias::None;
                layer.add(DEFAULT_ADAPTER, &own, &mut rng)?;
            }
            (AdapterKind::Vera(config), Some(shared)) => {
                layer.add_shared(DEFAULT_ADAPTER, config, shared, &mut rng)?;
            }
            (AdapterKind::Vera(_), None) => {
                return Err(Error::Unsupported {
                    what: format!("layer {path}: VeRA without its shared matrices"),
                    why: "save it in PEFT with save_projection=True".to_string(),
                });
            }
        }
        let mut module = module.clone();
        module.base_bias = None;
        layer.fill(DEFAULT_ADAPTER, &module)?;
        crate::base::sealed::Base::weight(&layer.merged()?).dense()
    }
}
