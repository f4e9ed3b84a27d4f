//! All adapted layers of a network under one name.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use candle_core::Var;
use rand::{Rng, RngCore};

use crate::adapter::Adapter;
use crate::base::{Base, sealed};
use crate::config::unsupported;
use crate::layer::{LoraLayer, checked_adapter_name};
use crate::peft::{AdapterConfig, ModuleTensors};
use crate::targets::{Candidate, Pattern, TargetModules, nearest, saved_whole, targeted};
use crate::{Bias, Error, LoraConfig, ParameterCount, Result, VeraConfig, VeraProjection, rows};

/// A [`LoraLayer`] over any base; the trait is sealed.
pub trait AnyLayer: any::AnyLayer {}

impl<B: Base> AnyLayer for LoraLayer<B> {}

pub(crate) mod any {
    use super::*;

    /// What a model asks of a layer, whatever its base.
    pub trait AnyLayer: Send + Sync {
        fn path(&self) -> &str;
        fn handle(&self) -> Arc<dyn AnyLayer>;
        fn candidate(&self) -> Candidate<'_>;
        fn has_bias(&self) -> bool;
        fn sizes(&self) -> (usize, usize);
        fn names(&self) -> Vec<String>;
        fn get(&self, adapter: &str) -> Result<Adapter>;
        fn add(&self, adapter: &str, config: &LoraConfig, rng: &mut dyn RngCore) -> Result<()>;
        fn add_shared(
            &self,
            adapter: &str,
            config: &VeraConfig,
            shared: &VeraProjection,
            rng: &mut dyn RngCore,
        ) -> Result<()>;
        fn add_whole(&self, adapter: &str, weight: bool) -> Result<()>;
        /// Gives the layer back the base and the adapters that it has now.
        fn undo(&self) -> Box<dyn FnOnce()>;
        fn choose(&self, adapters: &[&str]) -> Result<()>;
        fn may_lose(&self, adapter: &str) -> Result<()>;
        fn delete(&self, adapter: &str) -> Result<()>;
        fn enable(&self, enabled: bool);
        fn join(&self, safe: bool) -> Result<()>;
        fn part(&self);
        fn joined(&self) -> bool;
        fn trainable(&self) -> Vec<(String, Var)>;
        /// Puts the tensors of a file into the variables of an adapter.
        fn fill(&self, adapter: &str, tensors: &ModuleTensors) -> Result<()>;
        /// The variables of one adapter under PEFT's names.
        fn variables(&self, adapter: &str) -> Result<Vec<(String, Var)>>;
        fn count(&self) -> ParameterCount;
        fn text(&self) -> String;
    }
}

impl<B: Base> any::AnyLayer for LoraLayer<B> {
    fn path(&self) -> &str {
        self.name()
    }

    fn handle(&self) -> Arc<dyn any::AnyLayer> {
        Arc::new(self.clone())
    }

    fn candidate(&self) -> Candidate<'_> {
        let state = self.read();
        Candidate {
            path: self.name(),
            linear: state.base.is_linear(),
            embedding: state.base.is_embedding(),
            groups: state.base.groups(),
            output_head: state.output_head,
        }
    }

    fn has_bias(&self) -> bool {
        self.read().base.bias().is_some()
    }

    fn sizes(&self) -> (usize, usize) {
        (self.in_features(), self.out_features())
    }

    fn names(&self) -> Vec<String> {
        self.adapters()
    }

    fn get(&self, adapter: &str) -> Result<Adapter> {
        self.adapter(adapter)
    }

    fn add(&self, adapter: &str, config: &LoraConfig, rng: &mut dyn RngCore) -> Result<()> {
        self.add_adapter(adapter, config, rng)
    }

    fn add_shared(
        &self,
        adapter: &str,
        config: &VeraConfig,
        shared: &VeraProjection,
        rng: &mut dyn RngCore,
    ) -> Result<()> {
        self.add_vera(adapter, config, shared, rng)
    }

    fn add_whole(&self, adapter: &str, weight: bool) -> Result<()> {
        let mut state = self.write();
        state.check_new(self.name(), adapter)?;
        let new = Adapter::whole(self.name(), &state.base, weight)?;
        state.insert(adapter, new);
        Ok(())
    }

    fn undo(&self) -> Box<dyn FnOnce()> {
        let (layer, now) = (self.clone(), self.read());
        let (base, adapters) = (now.base.clone(), now.adapters.clone());
        let active = now.active.clone();
        drop(now);
        Box::new(move || {
            let mut state = layer.write();
            (state.base, state.adapters, state.active) = (base, adapters, active);
        })
    }

    fn choose(&self, adapters: &[&str]) -> Result<()> {
        self.set_adapter(adapters)
    }

    fn may_lose(&self, adapter: &str) -> Result<()> {
        self.read().may_lose(self.name(), adapter)
    }

    fn delete(&self, adapter: &str) -> Result<()> {
        self.delete_adapter(adapter)
    }

    fn enable(&self, enabled: bool) {
        self.enable_adapters(enabled);
    }

    fn join(&self, safe: bool) -> Result<()> {
        if safe {
            self.safe_merge()
        } else {
            self.merge()
        }
    }

    fn part(&self) {
        self.unmerge();
    }

    fn joined(&self) -> bool {
        self.is_merged()
    }

    fn trainable(&self) -> Vec<(String, Var)> {
        self.trainable_parameters()
    }

    fn variables(&self, adapter: &str) -> Result<Vec<(String, Var)>> {
        let adapter = self.adapter(adapter)?;
        let named = |(key, var): (&str, &Var)| {
            (
                format!("base_model.model.{}.{key}", self.name()),
                var.clone(),
            )
        };
        Ok(adapter
            .variables(<B as sealed::Base>::KEYS)
            .into_iter()
            .map(named)
            .collect())
    }

    fn fill(&self, adapter: &str, tensors: &ModuleTensors) -> Result<()> {
        let mut state = self.write();
        let base = state.base.clone();
        state
            .adapter_mut(self.name(), adapter)?
            .fill(self.name(), &base, tensors)
    }

    fn count(&self) -> ParameterCount {
        self.parameter_count()
    }

    fn text(&self) -> String {
        self.to_string()
    }
}

/// The layers of a network that can take adapters: PEFT's `LoraModel`.
///
/// It holds handles on the layers that a network is built of, so that one call adds, chooses,
/// merges or saves an adapter in all of them while the network itself stays as it is written.
/// Layers come from a [`LoraBuilder`](crate::LoraBuilder) or are given one by one.
///
/// Source: PEFT `tuners/lora/model.py`, `tuners/tuners_utils.py`.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{Linear, Module};
/// use lora::{LoraConfig, LoraLinear, LoraModel};
/// use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
///
/// let frozen = |name, out, inputs| {
///     let weight = Tensor::ones((out, inputs), DType::F32, &Device::Cpu)?;
///     LoraLinear::frozen(name, Linear::new(weight, None))
/// };
/// let (up, down) = (frozen("mlp.up", 16, 4)?, frozen("mlp.down", 4, 16)?);
/// let mut rng = ChaCha8Rng::seed_from_u64(1);
///
/// let mut model = LoraModel::new(&[&up, &down])?;
/// model.add_adapter("default", &LoraConfig::new(2, 4.0).with_targets("up"), &mut rng)?;
/// assert_eq!(
///     model.parameter_count().to_string(),
///     "trainable params: 40 || all params: 168 || trainable%: 23.8095"
/// );
///
/// let typo = LoraConfig::new(2, 4.0).with_targets("dwon");
/// let message = model.add_adapter("other", &typo, &mut rng).unwrap_err().to_string();
/// assert!(message.contains(r#"["dwon"] matches no layer"#) && message.contains("mlp.down"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct LoraModel {
    pub(crate) layers: Vec<Arc<dyn any::AnyLayer>>,
    /// How each adapter was made, as its file will say.
    pub(crate) configs: Vec<(String, AdapterConfig)>,
    pub(crate) shared: HashMap<String, VeraProjection>,
    active: Vec<String>,
    /// Numbers of the network that lie in no layer of this crate.
    others: ParameterCount,
}

impl LoraModel {
    /// A model of these layers, which keep the adapters they have.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] when two different layers have one name, or when a layer has an
    /// adapter already: add adapters through the model.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraLinear, LoraModel};
    /// let weight = Tensor::ones((3, 4), DType::F32, &Device::Cpu)?;
    /// let layer = LoraLinear::frozen("fc", Linear::new(weight, None))?;
    /// assert_eq!(LoraModel::new(&[&layer])?.layer_names(), ["fc"]);
    /// assert!(LoraModel::new(&[&layer, &layer]).is_err());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn new(layers: &[&dyn AnyLayer]) -> Result<Self> {
        let layers = layers.iter().map(|layer| layer.handle()).collect();
        Self::of(layers, ParameterCount::default())
    }

    pub(crate) fn of(
        mut layers: Vec<Arc<dyn any::AnyLayer>>,
        others: ParameterCount,
    ) -> Result<Self> {
        layers.sort_by(|a, b| a.path().cmp(b.path()));
        for pair in layers.windows(2) {
            if pair[0].path() == pair[1].path() {
                return Err(unsupported(
                    &format!("two layers named {:?}", pair[0].path()),
                    "their parameters would have one name; give each its path in the model",
                ));
            }
        }
        if let Some(layer) = layers.iter().find(|layer| !layer.names().is_empty()) {
            return Err(unsupported(
                &format!(
                    "layer {} with the adapters {:?}",
                    layer.path(),
                    layer.names()
                ),
                "a model adds its adapters itself; build the layer with frozen(...)",
            ));
        }
        Ok(Self {
            layers,
            configs: Vec::new(),
            shared: HashMap::new(),
            active: Vec::new(),
            others,
        })
    }

    /// The paths of all layers, sorted.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraConfig, LoraLinear, LoraModel};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let weight = Tensor::ones((3, 4), DType::F32, &Device::Cpu)?;
    /// # let layer = LoraLinear::frozen("fc", Linear::new(weight, None))?;
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// # let mut model = LoraModel::new(&[&layer])?;
    /// # model.add_adapter("default", &LoraConfig::new(2, 4.0).with_targets("fc"), &mut rng)?;
    /// assert_eq!(model.layer_names(), ["fc"]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn layer_names(&self) -> Vec<&str> {
        self.layers.iter().map(|layer| layer.path()).collect()
    }

    /// Adds a fresh adapter to the layers that the configuration names; the first one becomes
    /// active.
    ///
    /// `target_modules` decides, `exclude_modules` and `layers_to_transform` narrow,
    /// `rank_pattern` and `alpha_pattern` change single layers. Layers of `modules_to_save` train
    /// whole. Either all layers get the adapter or, on an error, none.
    ///
    /// # Errors
    ///
    /// [`Error::NoTarget`] when nothing is matched, and when one name of a list, of
    /// `modules_to_save` or of a pattern matches nothing, where PEFT says nothing; whatever
    /// [`LoraLayer::add_adapter`] refuses.
    ///
    /// Source: PEFT `tuners/tuners_utils.py`, `inject_adapter`.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraConfig, LoraLinear, LoraModel, TargetModules};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let frozen = |name: &str| {
    /// #     let weight = Tensor::ones((4, 4), DType::F32, &Device::Cpu)?;
    /// #     LoraLinear::frozen(name, Linear::new(weight, None))
    /// # };
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// let (q, v) = (frozen("layers.0.q_proj")?, frozen("layers.1.v_proj")?);
    /// let mut model = LoraModel::new(&[&q, &v])?;
    /// let config = LoraConfig::new(8, 16.0).with_targets(TargetModules::regex(r".*\.[qv]_proj"));
    /// model.add_adapter("default", &config, &mut rng)?;
    /// assert_eq!(model.targets("default")?, ["layers.0.q_proj", "layers.1.v_proj"]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn add_adapter(
        &mut self,
        adapter: &str,
        config: &LoraConfig,
        mut rng: &mut (impl Rng + ?Sized),
    ) -> Result<()> {
        config.validate()?;
        let plan = self.plan(config)?;
        let rng: &mut dyn RngCore = &mut rng;
        self.insert(adapter, config.clone().into(), |layers| {
            for (layer, place) in layers.iter().zip(&plan) {
                match place {
                    Place::Adapted => layer.add(adapter, &config.for_layer(layer.path())?, rng)?,
                    Place::Saved => layer.add_whole(adapter, true)?,
                    Place::Bias => layer.add_whole(adapter, false)?,
                    Place::Frozen => {}
                }
            }
            Ok(())
        })
    }

    /// Adds a fresh VeRA adapter with shared matrices drawn from `rng`.
    ///
    /// # Errors
    ///
    /// As [`add_adapter`](Self::add_adapter).
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraLinear, LoraModel, VeraConfig};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let weight = Tensor::ones((3, 4), DType::F32, &Device::Cpu)?;
    /// # let layer = LoraLinear::frozen("fc", Linear::new(weight, None))?;
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// let mut model = LoraModel::new(&[&layer])?;
    /// let config = VeraConfig { r: 8, target_modules: Some("fc".into()), ..Default::default() };
    /// model.add_vera("default", &config, &mut rng)?;
    /// assert_eq!(model.parameter_count().trainable, 8 + 3);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn add_vera(
        &mut self,
        adapter: &str,
        config: &VeraConfig,
        mut rng: &mut (impl Rng + ?Sized),
    ) -> Result<()> {
        config.validate()?;
        let plan = self.plan(&config.as_lora())?;
        let chosen = self
            .layers
            .iter()
            .zip(&plan)
            .filter(|(_, p)| **p == Place::Adapted);
        let sizes: Vec<(usize, usize)> = chosen.map(|(layer, _)| layer.sizes()).collect();
        let inputs = sizes.iter().map(|s| s.0).max().unwrap_or(1);
        let out = sizes.iter().map(|s| s.1).max().unwrap_or(1);
        let (dtype, device) = (candle_core::DType::F32, candle_core::Device::Cpu);
        let shared = VeraProjection::new(config.r, inputs, out, dtype, &device, &mut rng)?;
        self.add_vera_over(adapter, config, &shared, &mut rng)
    }

    pub(crate) fn add_vera_over(
        &mut self,
        adapter: &str,
        config: &VeraConfig,
        shared: &VeraProjection,
        rng: &mut dyn RngCore,
    ) -> Result<()> {
        config.validate()?;
        let plan = self.plan(&config.as_lora())?;
        self.insert(adapter, config.clone().into(), |layers| {
            for (layer, _) in layers
                .iter()
                .zip(&plan)
                .filter(|(_, p)| **p == Place::Adapted)
            {
                layer.add_shared(adapter, config, shared, rng)?;
            }
            Ok(())
        })?;
        self.shared.insert(adapter.to_string(), shared.clone());
        Ok(())
    }

    fn check_new(&self, adapter: &str) -> Result<()> {
        checked_adapter_name(adapter)?;
        if self.configs.iter().any(|(name, _)| name == adapter) {
            return Err(Error::AdapterExists {
                place: "the model".to_string(),
                adapter: adapter.to_string(),
            });
        }
        if let Some(layer) = self.layers.iter().find(|layer| layer.joined()) {
            return Err(Error::Merged {
                place: format!("layer {}", layer.path()),
                adapters: self.active.clone(),
                before: "adding an adapter",
            });
        }
        Ok(())
    }

    /// Adds an adapter to all layers that `add` adds it to or, when that fails, to none.
    pub(crate) fn insert(
        &mut self,
        adapter: &str,
        config: AdapterConfig,
        add: impl FnOnce(&[Arc<dyn any::AnyLayer>]) -> Result<()>,
    ) -> Result<()> {
        self.check_new(adapter)?;
        // Not by deleting: a layer may have had an adapter of this name before, and taking PiSSA's
        // part out of a weight and adding it again rounds.
        let undo: Vec<_> = self.layers.iter().map(|layer| layer.undo()).collect();
        if let Err(error) = add(&self.layers) {
            undo.into_iter().for_each(|undo| undo());
            return Err(error);
        }
        self.configs.push((adapter.to_string(), config));
        if self.configs.len() == 1 {
            self.active = vec![adapter.to_string()];
        }
        self.choose_active()
    }

    /// What becomes of each layer.
    fn plan(&self, config: &LoraConfig) -> Result<Vec<Place>> {
        let Some(targets) = &config.target_modules else {
            return Err(Error::NoTarget {
                field: "target_modules",
                wanted: "(not given)".to_string(),
                clause: String::new(),
                nearest: format!(
                    "name layers with with_targets; {}",
                    nearest(&TargetModules::AllLinear, &self.layer_names())
                ),
            });
        };
        let mut plan = Vec::new();
        for layer in &self.layers {
            plan.push(if targeted(config, &layer.candidate())? {
                Place::Adapted
            } else if saved_whole(config, layer.path())? {
                Place::Saved
            } else if config.bias == Bias::All && layer.has_bias() {
                Place::Bias
            } else {
                Place::Frozen
            });
        }
        let chosen: Vec<&str> = self
            .layers
            .iter()
            .zip(&plan)
            .filter(|(_, place)| **place == Place::Adapted)
            .map(|(layer, _)| layer.path())
            .collect();
        if chosen.is_empty() {
            return Err(self.no_target("target_modules", targets, config));
        }
        self.check_every_name(config, targets, &chosen)?;
        Ok(plan)
    }

    fn check_every_name(
        &self,
        config: &LoraConfig,
        targets: &TargetModules,
        chosen: &[&str],
    ) -> Result<()> {
        if let TargetModules::List(names) = targets {
            for name in names {
                let one = TargetModules::List(vec![name.clone()]);
                let found = self
                    .layer_names()
                    .iter()
                    .map(|p| one.matches(p))
                    .collect::<Result<Vec<_>>>()?;
                if !found.contains(&true) {
                    return Err(self.no_target("target_modules", &one, &LoraConfig::default()));
                }
            }
        }
        let keys = config
            .rank_pattern
            .iter()
            .map(|(key, _)| ("rank_pattern", key));
        let keys = keys.chain(
            config
                .alpha_pattern
                .iter()
                .map(|(key, _)| ("alpha_pattern", key)),
        );
        for (field, key) in keys {
            let pattern = Pattern::ending(field, key)?;
            let found = chosen
                .iter()
                .map(|path| pattern.matches(path))
                .collect::<Result<Vec<_>>>()?;
            if !found.contains(&true) {
                return Err(self.no_target(
                    field,
                    &TargetModules::regex(key),
                    &LoraConfig::default(),
                ));
            }
        }
        for name in &config.modules_to_save {
            let one = LoraConfig {
                modules_to_save: vec![name.clone()],
                ..Default::default()
            };
            let found = self
                .layer_names()
                .iter()
                .map(|p| saved_whole(&one, p))
                .collect::<Result<Vec<_>>>()?;
            if !found.contains(&true) {
                let one = TargetModules::from(name.as_str());
                return Err(self.no_target("modules_to_save", &one, &LoraConfig::default()));
            }
        }
        Ok(())
    }

    fn no_target(
        &self,
        field: &'static str,
        targets: &TargetModules,
        config: &LoraConfig,
    ) -> Error {
        let mut clause = String::new();
        if let Some(exclude) = &config.exclude_modules {
            clause += &format!(" with exclude_modules {exclude}");
        }
        if let Some(range) = &config.layers_to_transform {
            clause += &format!(" with layers_to_transform {range:?}");
        }
        Error::NoTarget {
            field,
            wanted: targets.to_string(),
            clause,
            nearest: nearest(targets, &self.layer_names()),
        }
    }

    /// The paths of the layers that hold this adapter, sorted.
    ///
    /// # Errors
    ///
    /// [`Error::NoAdapter`].
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraConfig, LoraLinear, LoraModel};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let weight = Tensor::ones((3, 4), DType::F32, &Device::Cpu)?;
    /// # let layer = LoraLinear::frozen("fc", Linear::new(weight, None))?;
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// # let mut model = LoraModel::new(&[&layer])?;
    /// # model.add_adapter("default", &LoraConfig::new(2, 4.0).with_targets("fc"), &mut rng)?;
    /// assert_eq!(model.targets("default")?, ["fc"]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn targets(&self, adapter: &str) -> Result<Vec<&str>> {
        self.peft_config(adapter)?;
        let with = self.holding(adapter);
        Ok(with.into_iter().map(|layer| layer.path()).collect())
    }

    pub(crate) fn holding(&self, adapter: &str) -> Vec<&Arc<dyn any::AnyLayer>> {
        let has = |layer: &&Arc<dyn any::AnyLayer>| layer.names().iter().any(|n| n == adapter);
        self.layers.iter().filter(has).collect()
    }

    /// How an adapter was made, as its file will say.
    ///
    /// # Errors
    ///
    /// [`Error::NoAdapter`].
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraConfig, LoraLinear, LoraModel};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let weight = Tensor::ones((3, 4), DType::F32, &Device::Cpu)?;
    /// # let layer = LoraLinear::frozen("fc", Linear::new(weight, None))?;
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// # let mut model = LoraModel::new(&[&layer])?;
    /// # model.add_adapter("default", &LoraConfig::new(2, 4.0).with_targets("fc"), &mut rng)?;
    /// assert_eq!(model.peft_config("default")?.lora().unwrap().r, 2);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn peft_config(&self, adapter: &str) -> Result<&AdapterConfig> {
        match self.configs.iter().find(|(name, _)| name == adapter) {
            Some((_, config)) => Ok(config),
            None => Err(Error::NoAdapter {
                place: "the model".to_string(),
                adapter: adapter.to_string(),
                known: self.adapters(),
            }),
        }
    }

    /// The names of all adapters, in the order in which they were added.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraConfig, LoraLinear, LoraModel};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let weight = Tensor::ones((3, 4), DType::F32, &Device::Cpu)?;
    /// # let layer = LoraLinear::frozen("fc", Linear::new(weight, None))?;
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// # let mut model = LoraModel::new(&[&layer])?;
    /// # model.add_adapter("default", &LoraConfig::new(2, 4.0).with_targets("fc"), &mut rng)?;
    /// assert_eq!(model.adapters(), ["default"]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn adapters(&self) -> Vec<String> {
        self.configs.iter().map(|(name, _)| name.clone()).collect()
    }

    /// The names of the active adapters, in the order in which they act.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraConfig, LoraLinear, LoraModel};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let weight = Tensor::ones((3, 4), DType::F32, &Device::Cpu)?;
    /// # let layer = LoraLinear::frozen("fc", Linear::new(weight, None))?;
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// # let mut model = LoraModel::new(&[&layer])?;
    /// # model.add_adapter("default", &LoraConfig::new(2, 4.0).with_targets("fc"), &mut rng)?;
    /// assert_eq!(model.active_adapters(), ["default"]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn active_adapters(&self) -> &[String] {
        &self.active
    }

    /// Makes exactly these adapters active in every layer that has them.
    ///
    /// # Errors
    ///
    /// [`Error::NoAdapter`], [`Error::Merged`].
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraConfig, LoraLinear, LoraModel};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let weight = Tensor::ones((3, 4), DType::F32, &Device::Cpu)?;
    /// # let layer = LoraLinear::frozen("fc", Linear::new(weight, None))?;
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// let mut model = LoraModel::new(&[&layer])?;
    /// model.add_adapter("fr", &LoraConfig::new(2, 4.0).with_targets("fc"), &mut rng)?;
    /// model.add_adapter("de", &LoraConfig::new(2, 4.0).with_targets("fc"), &mut rng)?;
    /// assert_eq!(model.active_adapters(), ["fr"]);
    /// model.set_adapter(&["de"])?;
    /// assert_eq!(layer.active_adapters(), ["de"]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn set_adapter(&mut self, adapters: &[&str]) -> Result<()> {
        for adapter in adapters {
            self.peft_config(adapter)?;
        }
        let before = std::mem::replace(
            &mut self.active,
            adapters.iter().map(ToString::to_string).collect(),
        );
        if let Err(error) = self.choose_active() {
            self.active = before;
            self.choose_active()?;
            return Err(error);
        }
        Ok(())
    }

    fn choose_active(&self) -> Result<()> {
        for layer in &self.layers {
            let names = layer.names();
            let here: Vec<&str> = self
                .active
                .iter()
                .filter(|a| names.contains(a))
                .map(String::as_str)
                .collect();
            layer.choose(&here)?;
        }
        Ok(())
    }

    /// Takes an adapter out of every layer.
    ///
    /// # Errors
    ///
    /// As [`LoraLayer::delete_adapter`]; then every layer keeps it.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraConfig, LoraLinear, LoraModel};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let weight = Tensor::ones((3, 4), DType::F32, &Device::Cpu)?;
    /// # let layer = LoraLinear::frozen("fc", Linear::new(weight, None))?;
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// # let mut model = LoraModel::new(&[&layer])?;
    /// # model.add_adapter("default", &LoraConfig::new(2, 4.0).with_targets("fc"), &mut rng)?;
    /// model.delete_adapter("default")?;
    /// assert!(model.adapters().is_empty() && layer.adapters().is_empty());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn delete_adapter(&mut self, adapter: &str) -> Result<()> {
        self.peft_config(adapter)?;
        if let Some(layer) = self.layers.iter().find(|layer| layer.joined()) {
            return Err(Error::Merged {
                place: format!("layer {}", layer.path()),
                adapters: self.active.clone(),
                before: "deleting an adapter",
            });
        }
        for layer in self.holding(adapter) {
            layer.may_lose(adapter)?;
        }
        for layer in self.holding(adapter) {
            layer.delete(adapter)?;
        }
        self.configs.retain(|(name, _)| name != adapter);
        self.active.retain(|name| name != adapter);
        self.shared.remove(adapter);
        Ok(())
    }

    /// Turns all adapters off (`false`) or on again (`true`).
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::{Linear, Module};
    /// # use lora::{LoraConfig, LoraLinear, LoraModel};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let weight = Tensor::ones((3, 4), DType::F32, &Device::Cpu)?;
    /// # let layer = LoraLinear::frozen("fc", Linear::new(weight, None))?;
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// # let mut model = LoraModel::new(&[&layer])?;
    /// # model.add_adapter("default", &LoraConfig::new(2, 4.0).with_targets("fc"), &mut rng)?;
    /// layer.lora_b()?.set(&Tensor::ones((3, 2), DType::F32, &Device::Cpu)?)?;
    /// let x = Tensor::ones((1, 4), DType::F32, &Device::Cpu)?;
    /// model.enable_adapters(false);
    /// assert_eq!(layer.forward(&x)?.to_vec2::<f32>()?, [[4f32; 3]]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn enable_adapters(&self, enabled: bool) {
        for layer in &self.layers {
            layer.enable(enabled);
        }
    }

    /// Merges the active adapters into the weights of all layers.
    ///
    /// # Errors
    ///
    /// As [`LoraLayer::merge`]; then no layer is merged.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraConfig, LoraLinear, LoraModel};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let weight = Tensor::ones((3, 4), DType::F32, &Device::Cpu)?;
    /// # let layer = LoraLinear::frozen("fc", Linear::new(weight, None))?;
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// # let mut model = LoraModel::new(&[&layer])?;
    /// # model.add_adapter("default", &LoraConfig::new(2, 4.0).with_targets("fc"), &mut rng)?;
    /// model.merge()?;
    /// assert!(layer.is_merged());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn merge(&self) -> Result<()> {
        self.merge_all(false)
    }

    /// As [`merge`](Self::merge), but refuses weights that are NaN or infinite.
    ///
    /// # Errors
    ///
    /// [`Error::MergeNotFinite`] with the layer's name; then no layer is merged.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraConfig, LoraLinear, LoraModel};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let weight = Tensor::ones((3, 4), DType::F32, &Device::Cpu)?;
    /// # let layer = LoraLinear::frozen("fc", Linear::new(weight, None))?;
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// # let mut model = LoraModel::new(&[&layer])?;
    /// # model.add_adapter("default", &LoraConfig::new(2, 4.0).with_targets("fc"), &mut rng)?;
    /// let infinite = (Tensor::ones((3, 2), DType::F32, &Device::Cpu)? / 0.0)?;
    /// layer.lora_b()?.set(&infinite)?;
    /// assert!(model.safe_merge().unwrap_err().to_string().contains("layer fc"));
    /// assert!(!layer.is_merged());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn safe_merge(&self) -> Result<()> {
        self.merge_all(true)
    }

    fn merge_all(&self, safe: bool) -> Result<()> {
        let mut done: Vec<&Arc<dyn any::AnyLayer>> = Vec::new();
        for layer in self.layers.iter().filter(|layer| !layer.joined()) {
            if let Err(error) = layer.join(safe) {
                done.iter().for_each(|layer| layer.part());
                return Err(error);
            }
            done.push(layer);
        }
        Ok(())
    }

    /// Takes merged adapters out of all weights, which are then exactly what they were.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraConfig, LoraLinear, LoraModel};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let weight = Tensor::ones((3, 4), DType::F32, &Device::Cpu)?;
    /// # let layer = LoraLinear::frozen("fc", Linear::new(weight, None))?;
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// # let mut model = LoraModel::new(&[&layer])?;
    /// # model.add_adapter("default", &LoraConfig::new(2, 4.0).with_targets("fc"), &mut rng)?;
    /// model.merge()?;
    /// model.unmerge();
    /// assert!(!layer.is_merged());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn unmerge(&self) {
        self.layers.iter().for_each(|layer| layer.part());
    }

    /// Runs a forward pass in which each row of the batch has its own adapter.
    ///
    /// `adapters` names one adapter for each row of dimension 0; [`BASE_ROW`](crate::BASE_ROW),
    /// PEFT's `"__base__"`, stands for none. It holds for the calls of this thread inside `pass`.
    /// Rows give what they give alone.
    ///
    /// # Errors
    ///
    /// [`Error::NoAdapter`]; inside `pass`, [`Error::Rows`] from a layer whose input has another
    /// number of rows.
    ///
    /// Source: PEFT's `model(x, adapter_names=[...])`.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::{Linear, Module};
    /// # use lora::{BASE_ROW, Init, LoraConfig, LoraLinear, LoraModel};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let weight = Tensor::ones((3, 4), DType::F32, &Device::Cpu)?;
    /// # let layer = LoraLinear::frozen("fc", Linear::new(weight, None))?;
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// let mut model = LoraModel::new(&[&layer])?;
    /// let config = LoraConfig::new(2, 4.0).with_targets("fc").with_init(Init::Random);
    /// model.add_adapter("fr", &config, &mut rng)?;
    /// let x = Tensor::ones((2, 4), DType::F32, &Device::Cpu)?;
    /// let y = model.with_adapters(&["fr", BASE_ROW], || layer.forward(&x))??;
    /// assert_eq!(y.get(1)?.to_vec1::<f32>()?, [4.0; 3]);
    /// assert_ne!(y.get(0)?.to_vec1::<f32>()?, [4.0; 3]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn with_adapters<T>(
        &self,
        adapters: &[impl AsRef<str>],
        pass: impl FnOnce() -> T,
    ) -> Result<T> {
        for name in adapters
            .iter()
            .map(AsRef::as_ref)
            .filter(|name| *name != rows::BASE)
        {
            self.peft_config(name)?;
        }
        let rows = adapters
            .iter()
            .map(|name| name.as_ref().to_string())
            .collect();
        Ok(rows::with(rows, pass))
    }

    /// The variables of the active adapters that train, under PEFT's names and sorted by them.
    ///
    /// A base that trains has its own in [`LoraBuilder::variables`](crate::LoraBuilder::variables),
    /// under the checkpoint's names: full fine-tuning takes those, and training both takes both, in
    /// groups of their own.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraConfig, LoraLinear, LoraModel};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let weight = Tensor::ones((3, 4), DType::F32, &Device::Cpu)?;
    /// # let layer = LoraLinear::frozen("fc", Linear::new(weight, None))?;
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// let mut model = LoraModel::new(&[&layer])?;
    /// model.add_adapter("default", &LoraConfig::new(2, 4.0).with_targets("fc"), &mut rng)?;
    /// assert_eq!(model.trainable_parameters()[0].0, "base_model.model.fc.lora_A.weight");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn trainable_parameters(&self) -> Vec<(String, Var)> {
        let mut all: Vec<_> = self
            .layers
            .iter()
            .flat_map(|layer| layer.trainable())
            .collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    }

    /// How many numbers the network holds and how many of them train; printed as PEFT prints it.
    ///
    /// Those that train are the active adapters' and, in a network of
    /// [`LoraBuilder::trainable`](crate::LoraBuilder::trainable), the base's, norms included.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraConfig, LoraLinear, LoraModel};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let weight = Tensor::ones((3, 4), DType::F32, &Device::Cpu)?;
    /// # let layer = LoraLinear::frozen("fc", Linear::new(weight, None))?;
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// # let mut model = LoraModel::new(&[&layer])?;
    /// # model.add_adapter("default", &LoraConfig::new(2, 4.0).with_targets("fc"), &mut rng)?;
    /// let count = model.parameter_count();
    /// assert_eq!((count.trainable, count.all), (2 * (4 + 3), 2 * (4 + 3) + 3 * 4));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn parameter_count(&self) -> ParameterCount {
        let layers: ParameterCount = self.layers.iter().map(|layer| layer.count()).sum();
        layers + self.others
    }
}

/// What becomes of a layer when an adapter comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Adapted,
    Saved,
    Bias,
    Frozen,
}

impl fmt::Display for LoraModel {
    /// One line for each layer of which something trains, and the count.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for layer in self
            .layers
            .iter()
            .filter(|layer| layer.count().trainable > 0)
        {
            writeln!(f, "{}", layer.text())?;
        }
        write!(f, "{}", self.parameter_count())
    }
}

impl fmt::Debug for LoraModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
