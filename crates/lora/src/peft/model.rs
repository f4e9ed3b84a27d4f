//! Adapters of a [`LoraModel`] to and from PEFT's files.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::{AdapterFiles, AdapterKind, ModuleTensors, WEIGHTS_NAME, bad_file};
use crate::config::unsupported;
use crate::layer::DEFAULT_ADAPTER;
use crate::model::any::AnyLayer;
use crate::targets::{TargetModules, nearest, targeted};
use crate::{Init, LoraConfig, LoraModel, Result, VeraProjection};

impl LoraModel {
    /// Saves every adapter as PEFT's `save_pretrained` does: `default` in `folder`, each other one
    /// in a subfolder of its name.
    ///
    /// # Errors
    ///
    /// As [`save_adapter`](Self::save_adapter).
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraConfig, LoraLinear, LoraModel};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let weight = Tensor::ones((3, 4), DType::F32, &Device::Cpu)?;
    /// # let layer = LoraLinear::frozen("fc", Linear::new(weight.clone(), None))?;
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// # let folder = tempfile::tempdir()?;
    /// let mut model = LoraModel::new(&[&layer])?;
    /// model.add_adapter("default", &LoraConfig::new(2, 4.0).with_targets("fc"), &mut rng)?;
    /// model.add_adapter("fr", &LoraConfig::new(1, 4.0).with_targets("fc"), &mut rng)?;
    /// model.save_pretrained(folder.path())?;
    /// assert!(folder.path().join("adapter_model.safetensors").is_file());
    /// assert!(folder.path().join("fr/adapter_model.safetensors").is_file());
    ///
    /// let twin = LoraLinear::frozen("fc", Linear::new(weight, None))?;
    /// let mut again = LoraModel::new(&[&twin])?;
    /// again.load_adapter(folder.path().join("fr"), "fr")?;
    /// assert_eq!(twin.lora_a()?.to_vec2::<f32>()?, layer.adapter("fr")?.lora_a().unwrap().to_vec2::<f32>()?);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn save_pretrained(&self, folder: impl AsRef<Path>) -> Result<()> {
        let folder = folder.as_ref();
        for adapter in self.adapters() {
            if adapter == DEFAULT_ADAPTER {
                self.save_adapter(folder, &adapter)?;
            } else {
                self.save_adapter(folder.join(&adapter), &adapter)?;
            }
        }
        Ok(())
    }

    /// Saves one adapter as `adapter_config.json` and `adapter_model.safetensors` in `folder`.
    ///
    /// PEFT's `PeftModel.from_pretrained` reads it. A PiSSA or OLoRA adapter is written as a plain
    /// one of twice the rank that fits the original base, where PEFT's default fits only the
    /// rewritten one. A crash leaves the old files or the new ones.
    ///
    /// # Errors
    ///
    /// [`Error::NoAdapter`](crate::Error::NoAdapter); [`Error::File`](crate::Error::File) when the
    /// folder cannot be written.
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
    /// # let folder = tempfile::tempdir()?;
    /// model.save_adapter(folder.path(), "default")?;
    /// assert!(folder.path().join("adapter_config.json").is_file());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn save_adapter(&self, folder: impl AsRef<Path>, adapter: &str) -> Result<()> {
        self.adapter_files(adapter)?.write(folder)
    }

    /// One adapter as PEFT's files hold it.
    ///
    /// # Errors
    ///
    /// [`Error::NoAdapter`](crate::Error::NoAdapter).
    ///
    /// Source: PEFT `utils/save_and_load.py`, `get_peft_model_state_dict`; the conversion of PiSSA
    /// and OLoRA `tuners/lora/model.py`, `subtract_mutated_init`.
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
    /// let files = model.adapter_files("default")?;
    /// assert!(files.tensors.contains_key("base_model.model.fc.lora_A.weight"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn adapter_files(&self, adapter: &str) -> Result<AdapterFiles> {
        let mut config = self.peft_config(adapter)?.clone();
        let mut tensors = BTreeMap::new();
        let mut taken = false;
        for layer in self.holding(adapter) {
            let values = layer.get(adapter)?;
            for (name, var) in layer.variables(adapter)? {
                let mut tensor = var.as_tensor().detach().copy()?;
                if let Some((a, b, _)) = &values.taken {
                    taken = true;
                    // s' B' A' = s (B A − B₀ A₀), with s' = s.
                    if name.ends_with(".lora_A.weight") {
                        tensor = Tensor::cat(&[&tensor, a], 0)?;
                    } else if name.ends_with(".lora_B.weight") {
                        tensor = Tensor::cat(&[&tensor, &b.neg()?], 1)?;
                    }
                }
                tensors.insert(name, tensor);
            }
        }
        if let (true, AdapterKind::Lora(lora)) = (taken, &mut config.kind) {
            double(lora);
        }
        if let Some(shared) = self.shared.get(adapter) {
            tensors.insert("base_model.vera_A".to_string(), shared.a().clone());
            tensors.insert("base_model.vera_B".to_string(), shared.b().clone());
        }
        Ok(AdapterFiles { config, tensors })
    }

    /// Loads an adapter from a folder of PEFT and adds it under the name `adapter`.
    ///
    /// Every tensor of the file must find its layer and every layer that the configuration names
    /// must find its tensors; PEFT passes over both with a warning. The adapter goes to the layers
    /// that the file has tensors for. A PiSSA or OLoRA adapter that was not converted takes its
    /// part out of the base anew. The first adapter of a model becomes active.
    ///
    /// # Errors
    ///
    /// Whatever [`AdapterFiles::read`] refuses; [`Error::File`](crate::Error::File) for a tensor
    /// without a layer, a layer without tensors, or a shape that does not fit; then the model is
    /// as it was. [`Error::Unsupported`](crate::Error::Unsupported) for `pissa_niter_…`, whose
    /// random decomposition cannot be repeated.
    ///
    /// Source: PEFT `peft_model.py`, `load_adapter`.
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
    /// # let folder = tempfile::tempdir()?;
    /// model.save_adapter(folder.path(), "default")?;
    /// model.load_adapter(folder.path(), "again")?;
    /// assert_eq!(layer.adapters(), ["default", "again"]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn load_adapter(&mut self, folder: impl AsRef<Path>, adapter: &str) -> Result<()> {
        let folder = folder.as_ref();
        let files = AdapterFiles::read(folder, &Device::Cpu)?;
        self.insert_files(&files, adapter, &folder.join(WEIGHTS_NAME))
    }

    /// As [`load_adapter`](Self::load_adapter), from files in memory.
    ///
    /// # Errors
    ///
    /// As [`load_adapter`](Self::load_adapter).
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
    /// let files = model.adapter_files("fr")?;
    /// model.add_files(&files, "copy")?;
    /// assert_eq!(model.adapters(), ["fr", "copy"]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn add_files(&mut self, files: &AdapterFiles, adapter: &str) -> Result<()> {
        self.insert_files(files, adapter, Path::new(WEIGHTS_NAME))
    }

    fn insert_files(&mut self, files: &AdapterFiles, adapter: &str, path: &Path) -> Result<()> {
        let modules = files.modules()?;
        let places = self.places(&modules, path)?;
        if let AdapterKind::Lora(config) = &files.config.kind {
            repeatable(config)?;
            self.check_complete(config, &modules, path)?;
        }
        let shared = match files.vera_projection() {
            Some((a, b)) => Some(VeraProjection::from_tensors(a.clone(), b.clone())?),
            None => None,
        };
        // Draws only what the tensors of the file replace, and the seeds of dropout.
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        self.insert(adapter, files.config.clone(), |_| {
            for (layer, tensors) in &places {
                match (&files.config.kind, &shared) {
                    (AdapterKind::Lora(config), _) if tensors.has_adapter() => {
                        let mut own = config.for_layer(layer.path())?;
                        if !own.init_lora_weights.rewrites_base() {
                            own.init_lora_weights = Init::Kaiming;
                        }
                        layer.add(adapter, &own, &mut rng)?;
                    }
                    (AdapterKind::Vera(config), Some(shared)) if tensors.has_adapter() => {
                        layer.add_shared(adapter, config, shared, &mut rng)?;
                    }
                    _ => layer.add_whole(adapter, tensors.saved_weight.is_some())?,
                }
                layer.fill(adapter, tensors)?;
            }
            Ok(())
        })?;
        if let Some(shared) = shared {
            self.shared.insert(adapter.to_string(), shared);
        }
        Ok(())
    }

    /// The layer of each module in the file.
    fn places<'m>(
        &self,
        modules: &'m BTreeMap<String, ModuleTensors>,
        file: &Path,
    ) -> Result<Vec<(Arc<dyn AnyLayer>, &'m ModuleTensors)>> {
        let mut places = Vec::new();
        for (path, tensors) in modules {
            let found = self.layers.iter().find(|layer| layer.path() == path);
            let Some(layer) = found else {
                let wanted = TargetModules::from(vec![path.clone()]);
                let near = nearest(&wanted, &self.layer_names());
                return Err(bad_file(
                    file,
                    format!("tensors for {path:?}, but the model has no such layer; {near}"),
                ));
            };
            places.push((layer.clone(), tensors));
        }
        Ok(places)
    }

    /// Every layer that the configuration names has tensors.
    fn check_complete(
        &self,
        config: &LoraConfig,
        modules: &BTreeMap<String, ModuleTensors>,
        file: &Path,
    ) -> Result<()> {
        for layer in &self.layers {
            if targeted(config, &layer.candidate())? && !modules.contains_key(layer.path()) {
                return Err(bad_file(
                    file,
                    format!(
                        "no tensors for layer {:?}, which target_modules names; \
                         the file is incomplete, or it belongs to another model",
                        layer.path()
                    ),
                ));
            }
        }
        Ok(())
    }
}

/// PiSSA by a randomised decomposition leaves a base that nobody can compute again.
pub(crate) fn repeatable(config: &LoraConfig) -> Result<()> {
    if let Init::PissaNiter(n) = config.init_lora_weights {
        return Err(unsupported(
            &format!("init_lora_weights = \"pissa_niter_{n}\" in a file"),
            "the adapter fits only the base weight that PEFT's random decomposition left; save it \
             in PEFT with path_initial_model_for_weight_conversion",
        ));
    }
    Ok(())
}

/// The settings of a plain adapter that holds the trained pair and, negated, the first one.
fn double(config: &mut LoraConfig) {
    // α'/r' = α/r, or α'/√r' = α/√r.
    let factor = if config.use_rslora { 2f64.sqrt() } else { 2.0 };
    config.r *= 2;
    config.lora_alpha *= factor;
    config.rank_pattern.iter_mut().for_each(|(_, r)| *r *= 2);
    config
        .alpha_pattern
        .iter_mut()
        .for_each(|(_, alpha)| *alpha *= factor);
    config.init_lora_weights = Init::Kaiming;
}
