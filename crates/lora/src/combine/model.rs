//! One new adapter of a model from several of its own.

use candle_core::{Tensor, Var};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{Combination, Weighted, combine};
use crate::config::unsupported;
use crate::model::any::AnyLayer;
use crate::peft::ModuleTensors;
use crate::{LoraConfig, LoraModel, Result, TargetModules};

impl LoraModel {
    /// Adds an adapter that is a weighted combination of others: PEFT's `add_weighted_adapter`.
    ///
    /// What each method does is described at [`CombinationType`](crate::CombinationType). The new
    /// adapter has the scaling 1 and one rank for all layers; where a layer needs less, the rest
    /// is zero. The biases of `lora_bias` are added with their weights, which is exact whatever
    /// the method. The sources stay as they are, and the new adapter is not made active.
    ///
    /// # Errors
    ///
    /// An unknown or twice-named adapter; an existing name; adapters with a DoRA magnitude, with
    /// VeRA or with a weight or bias of the base, whose sum is not defined; what [`combine`]
    /// refuses. Then no layer is changed.
    ///
    /// Source: PEFT `tuners/lora/model.py`, `add_weighted_adapter`. PEFT 0.21 drops magnitudes and
    /// biases without a word, keeps `use_rslora` beside α = r, which makes the result √r too large,
    /// and does nothing when the name exists.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::{Linear, Module};
    /// # use lora::{Combination, CombinationType, Init, LoraConfig, LoraLinear, LoraModel};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let weight = Tensor::ones((3, 4), DType::F32, &Device::Cpu)?;
    /// # let layer = LoraLinear::frozen("fc", Linear::new(weight, None))?;
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// let mut model = LoraModel::new(&[&layer])?;
    /// let config = LoraConfig::new(2, 4.0).with_targets("fc").with_init(Init::Random);
    /// model.add_adapter("fr", &config, &mut rng)?;
    /// model.add_adapter("de", &config, &mut rng)?;
    /// let cat = Combination::new(CombinationType::Cat);
    /// model.add_weighted_adapter(&[("fr", 0.5), ("de", 0.5)], "both", &cat, &mut rng)?;
    ///
    /// // The mean of two updates is the update of the combination.
    /// model.set_adapter(&["fr", "de"])?;
    /// let mean = (layer.delta_weight()? * 0.5)?;
    /// model.set_adapter(&["both"])?;
    /// let gap = (layer.delta_weight()? - mean)?.abs()?.max_all()?.to_scalar::<f32>()?;
    /// assert!(gap < 1e-6);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn add_weighted_adapter(
        &mut self,
        adapters: &[(&str, f64)],
        adapter: &str,
        how: &Combination,
        rng: &mut (impl Rng + ?Sized),
    ) -> Result<()> {
        for (i, (name, _)) in adapters.iter().enumerate() {
            self.peft_config(name)?;
            if adapters[..i].iter().any(|(other, _)| other == name) {
                return Err(unsupported(
                    &format!("adapter {name:?} twice in a combination"),
                    "name it once, with the sum of the weights",
                ));
            }
        }
        let mut parts = Vec::new();
        for layer in &self.layers {
            let names = layer.names();
            let here = adapters
                .iter()
                .filter(|(name, _)| names.iter().any(|n| n == name));
            let here: Vec<_> = here.collect();
            if !here.is_empty() {
                parts.push((layer.clone(), combined(layer.as_ref(), &here, how, rng)?));
            }
        }
        let r = parts
            .iter()
            .map(|(_, part)| part.a.dims()[0])
            .max()
            .unwrap_or(0);
        if parts.is_empty() {
            return Err(crate::Error::CombineNone);
        }
        let paths = parts
            .iter()
            .map(|(layer, _)| layer.path().to_string())
            .collect();
        let config = LoraConfig {
            target_modules: Some(TargetModules::List(paths)),
            lora_bias: parts.iter().any(|(_, part)| part.bias.is_some()),
            ..LoraConfig::new(r, r as f64)
        };
        self.insert(adapter, config.clone().into(), |_| {
            for (layer, part) in &parts {
                let mut nothing = ChaCha8Rng::from_seed([0; 32]);
                layer.add(adapter, &config, &mut nothing)?;
                layer.fill(adapter, &part.padded(r, layer.as_ref(), adapter)?)?;
            }
            Ok(())
        })
    }
}

/// A (r, fan), B (out, r) and the bias of one layer.
struct Part {
    a: Tensor,
    b: Tensor,
    bias: Option<Tensor>,
}

impl Part {
    /// With zeros up to rank `r`, in the shapes of the layer.
    fn padded(&self, r: usize, layer: &dyn AnyLayer, adapter: &str) -> Result<ModuleTensors> {
        let missing = r - self.a.dims()[0];
        let a = self.a.pad_with_zeros(0, 0, missing)?;
        let b = self.b.pad_with_zeros(1, 0, missing)?;
        let own = layer.get(adapter)?;
        let shaped = |t: Tensor, like: Option<&Var>| -> Result<Option<Tensor>> {
            Ok(like.map(|like| t.reshape(like.shape())).transpose()?)
        };
        let (a, b) = (shaped(a, own.lora_a())?, shaped(b, own.lora_b())?);
        let mut tensors = ModuleTensors {
            lora_b_bias: self.bias.clone(),
            ..Default::default()
        };
        if layer.candidate().embedding {
            (tensors.embedding_a, tensors.embedding_b) = (a, b);
        } else {
            (tensors.lora_a, tensors.lora_b) = (a, b);
        }
        Ok(tensors)
    }
}

fn combined(
    layer: &dyn AnyLayer,
    adapters: &[&(&str, f64)],
    how: &Combination,
    rng: &mut (impl Rng + ?Sized),
) -> Result<Part> {
    let mut weighted = Vec::new();
    let mut bias: Option<Tensor> = None;
    for (name, weight) in adapters {
        let adapter = layer.get(name)?;
        let refuse = |what: &str| {
            Err(unsupported(
                &format!(
                    "layer {}: adapter {name:?} with {what} in a combination",
                    layer.path()
                ),
                "only plain pairs A, B have a sum; merge the adapter instead",
            ))
        };
        let (Some(a), Some(b)) = (adapter.lora_a(), adapter.lora_b()) else {
            return refuse("VeRA, or a layer saved whole,");
        };
        if adapter.magnitude().is_some() {
            return refuse("a DoRA magnitude");
        }
        if adapter.saved_weight.is_some() || adapter.base_bias.is_some() {
            return refuse("a weight or bias of the base");
        }
        if layer.candidate().groups > 1 {
            return refuse("a grouped convolution");
        }
        let (r, out) = (a.dim(0)?, b.dim(0)?);
        weighted.push(Weighted {
            a: a.as_tensor().detach().flatten_from(1)?,
            b: b.as_tensor().detach().reshape((out, r))?,
            scaling: adapter.scaling(),
            weight: *weight,
        });
        if let Some(own) = adapter.lora_bias() {
            let own = (own.as_tensor().detach() * (weight * adapter.scaling()))?;
            bias = Some(match bias {
                Some(sum) => (sum + own)?,
                None => own,
            });
        }
    }
    let pair = combine(&weighted, how, rng)?;
    Ok(Part {
        a: pair.a,
        b: pair.b,
        bias,
    })
}
