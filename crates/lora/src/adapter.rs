//! One adapter on one layer: the trained numbers and what they add.

use std::sync::Arc;

use candle_core::{Tensor, Var};
use rand::RngCore;

use crate::base::{Keys, adapter_dtype, plain, sealed::Base};
use crate::config::unsupported;
use crate::dropout::Dropout;
use crate::init::{Start, too_large};
use crate::peft::ModuleTensors;
use crate::quant::Weight;
use crate::{Error, Init, LoraConfig, Result, VeraConfig, VeraProjection};

/// The trained numbers of one adapter on one layer. Clones share their variables.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::Linear;
/// use lora::{LoraConfig, LoraLinear};
/// use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
///
/// let base = Linear::new(Tensor::ones((3, 4), DType::F32, &Device::Cpu)?, None);
/// let mut rng = ChaCha8Rng::seed_from_u64(1);
/// let config = LoraConfig::new(2, 4.0).with_dora(true);
/// let adapter = LoraLinear::new("q_proj", base, &config, &mut rng)?.adapter("default")?;
/// assert_eq!((adapter.r(), adapter.scaling()), (2, 2.0));
/// assert_eq!(adapter.lora_a().unwrap().dims(), [2, 4]);
/// // DoRA's magnitude starts as the norm of W's rows.
/// assert_eq!(adapter.magnitude().unwrap().to_vec1::<f32>()?, [2.0; 3]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Adapter {
    pub(crate) update: Option<Update>,
    pub(crate) magnitude: Option<Var>,
    pub(crate) bias: Option<Var>,
    /// Takes the place of the base's weight: a module of `modules_to_save`.
    pub(crate) saved_weight: Option<Var>,
    /// Takes the place of the base's bias.
    pub(crate) base_bias: Option<Var>,
    /// What the initialisation took out of the base: (A, B, s) of the start.
    pub(crate) taken: Option<(Tensor, Tensor, f64)>,
    r: usize,
    lora_alpha: f64,
    scaling: f64,
    dropout: Option<Arc<Dropout>>,
}

/// The pair of matrices and what trains of it.
#[derive(Clone, Debug)]
pub(crate) enum Update {
    Lora {
        a: Var,
        b: Var,
    },
    Vera {
        a: Tensor,
        b: Tensor,
        lambda_d: Var,
        lambda_b: Var,
    },
}

impl Adapter {
    /// A fresh adapter for `base`, and the base's new weight when the initialisation rewrites it.
    pub(crate) fn lora<B: Base>(
        layer: &str,
        base: &B,
        config: &LoraConfig,
        rng: &mut dyn RngCore,
    ) -> Result<(Self, Option<Tensor>)> {
        config.validate()?;
        fits(layer, base, config)?;
        let weight = base.weight();
        let (dtype, device) = (adapter_dtype(weight.dtype()), weight.device());
        let (r, scaling) = (config.r, config.scaling());
        let start = Start::draw(base, config, rng).map_err(|error| match error {
            Error::NotFinite { .. } => Error::NotFinite {
                what: format!("layer {layer}: the weight {:?}", weight.dims()),
            },
            other => other,
        })?;
        let as_var = |t: &Tensor| -> Result<Var> {
            Ok(Var::from_tensor(
                &t.to_dtype(dtype)?.to_device(device)?.contiguous()?,
            )?)
        };
        let (a, b) = (as_var(&start.a)?, as_var(&start.b)?);
        let taken = start
            .rewritten
            .then(|| -> Result<_> { Ok((plain(&a)?, plain(&b)?, scaling)) });
        let taken = taken.transpose()?;
        let rewritten = match &taken {
            Some((a, b, s)) => {
                let part = base.to_weight_layout((base.product(a, b)? * *s)?)?;
                Some((weight.dense()?.to_dtype(dtype)? - part)?.to_dtype(weight.dtype())?)
            }
            None => None,
        };
        let bias = config
            .lora_bias
            .then(|| Var::zeros(base.out(), dtype, device))
            .transpose()?;
        let dropout = Dropout::new(config.lora_dropout, rng);
        let mut adapter = Self {
            update: Some(Update::Lora { a, b }),
            magnitude: None,
            bias,
            saved_weight: None,
            base_bias: None,
            taken,
            r,
            lora_alpha: config.lora_alpha,
            scaling,
            dropout,
        };
        if config.use_dora {
            let base = match &rewritten {
                Some(weight) => base.with(weight.clone(), base.bias().cloned())?,
                None => base.clone(),
            };
            let norm = adapter.norm(&base)?.reshape(base.magnitude_shape())?;
            adapter.magnitude = Some(Var::from_tensor(&norm)?);
        }
        Ok((adapter, rewritten))
    }

    /// A fresh VeRA adapter: λ_d at its start, λ_b zero.
    pub(crate) fn vera<B: Base>(
        layer: &str,
        base: &B,
        config: &VeraConfig,
        projection: &VeraProjection,
        rng: &mut dyn RngCore,
    ) -> Result<Self> {
        config.validate()?;
        if !base.is_linear() {
            return Err(unsupported(
                &format!("layer {layer}: VeRA on a {}", B::LAYER),
                "VeRA is defined for linear layers; leave this one out of target_modules",
            ));
        }
        let weight = base.weight();
        let (dtype, device) = (adapter_dtype(weight.dtype()), weight.device());
        let (a, b) = projection.parts(layer, config.r, base.inputs(), base.out())?;
        let lambda_d = (Tensor::ones(config.r, dtype, device)? * config.d_initial)?;
        Ok(Self {
            update: Some(Update::Vera {
                a: a.to_dtype(dtype)?.to_device(device)?,
                b: b.to_dtype(dtype)?.to_device(device)?,
                lambda_d: Var::from_tensor(&lambda_d)?,
                lambda_b: Var::zeros(base.out(), dtype, device)?,
            }),
            magnitude: None,
            bias: None,
            saved_weight: None,
            base_bias: None,
            taken: None,
            r: config.r,
            lora_alpha: config.r as f64,
            scaling: 1.0,
            dropout: Dropout::new(config.vera_dropout, rng),
        })
    }

    /// No update, but the base's own bias, and its weight too (if `weight`), as variables.
    pub(crate) fn whole<B: Base>(layer: &str, base: &B, weight: bool) -> Result<Self> {
        let weight = match base.weight() {
            Weight::Dense(own) => weight.then(|| trained(own)).transpose()?,
            Weight::Quantized(_) if weight => return Err(cannot_train(layer)),
            Weight::Quantized(_) => None,
        };
        let mut adapter = Self {
            update: None,
            magnitude: None,
            bias: None,
            saved_weight: weight,
            base_bias: None,
            taken: None,
            r: 0,
            lora_alpha: 0.0,
            scaling: 0.0,
            dropout: None,
        };
        adapter.train_bias(base)?;
        Ok(adapter)
    }

    /// Makes a variable of the base's bias, where there is one.
    pub(crate) fn train_bias<B: Base>(&mut self, base: &B) -> Result<()> {
        self.base_bias = base.bias().map(trained).transpose()?;
        Ok(())
    }

    /// The rank r.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraConfig, LoraLinear};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let base = Linear::new(Tensor::ones((3, 4), DType::F32, &Device::Cpu)?, None);
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// # let layer = LoraLinear::new("q_proj", base, &LoraConfig::new(2, 4.0), &mut rng)?;
    /// assert_eq!(layer.adapter("default")?.r(), 2);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn r(&self) -> usize {
        self.r
    }

    /// The numerator α of the scaling.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraConfig, LoraLinear};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let base = Linear::new(Tensor::ones((3, 4), DType::F32, &Device::Cpu)?, None);
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// # let layer = LoraLinear::new("q_proj", base, &LoraConfig::new(2, 4.0), &mut rng)?;
    /// assert_eq!(layer.adapter("default")?.lora_alpha(), 4.0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn lora_alpha(&self) -> f64 {
        self.lora_alpha
    }

    /// The factor s of the update, from [`LoraConfig::scaling`]; 1 for VeRA.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraConfig, LoraLinear};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let base = Linear::new(Tensor::ones((3, 4), DType::F32, &Device::Cpu)?, None);
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// # let layer = LoraLinear::new("q_proj", base, &LoraConfig::new(2, 4.0), &mut rng)?;
    /// assert_eq!(layer.adapter("default")?.scaling(), 4.0 / 2.0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn scaling(&self) -> f64 {
        self.scaling
    }

    /// A, which maps the input down to r numbers; none for VeRA and for a module saved whole.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraConfig, LoraLinear};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let base = Linear::new(Tensor::ones((3, 4), DType::F32, &Device::Cpu)?, None);
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// # let layer = LoraLinear::new("q_proj", base, &LoraConfig::new(2, 4.0), &mut rng)?;
    /// let adapter = layer.adapter("default")?;
    /// assert_eq!(adapter.lora_a().map(|a| a.dims().to_vec()), Some(vec![2, 4]));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn lora_a(&self) -> Option<&Var> {
        match &self.update {
            Some(Update::Lora { a, .. }) => Some(a),
            _ => None,
        }
    }

    /// B, which maps the r numbers up to the output.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraConfig, LoraLinear};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let base = Linear::new(Tensor::ones((3, 4), DType::F32, &Device::Cpu)?, None);
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// # let layer = LoraLinear::new("q_proj", base, &LoraConfig::new(2, 4.0), &mut rng)?;
    /// let adapter = layer.adapter("default")?;
    /// assert_eq!(adapter.lora_b().map(|b| b.dims().to_vec()), Some(vec![3, 2]));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn lora_b(&self) -> Option<&Var> {
        match &self.update {
            Some(Update::Lora { b, .. }) => Some(b),
            _ => None,
        }
    }

    /// DoRA's magnitude m: (out), (1, out, 1, …) for a convolution.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraConfig, LoraLinear};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let base = Linear::new(Tensor::ones((3, 4), DType::F32, &Device::Cpu)?, None);
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// # let layer = LoraLinear::new("q_proj", base, &LoraConfig::new(2, 4.0).with_dora(true), &mut rng)?;
    /// let adapter = layer.adapter("default")?;
    /// assert_eq!(adapter.magnitude().map(|m| m.dims().to_vec()), Some(vec![3]));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn magnitude(&self) -> Option<&Var> {
        self.magnitude.as_ref()
    }

    /// The bias of B (out) with `lora_bias`.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraConfig, LoraLinear};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let base = Linear::new(Tensor::ones((3, 4), DType::F32, &Device::Cpu)?, None);
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// # let layer = LoraLinear::new("q_proj", base, &LoraConfig::new(2, 4.0).with_lora_bias(true), &mut rng)?;
    /// let adapter = layer.adapter("default")?;
    /// assert_eq!(adapter.lora_bias().map(|b| b.dims().to_vec()), Some(vec![3]));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn lora_bias(&self) -> Option<&Var> {
        self.bias.as_ref()
    }

    /// VeRA's λ_d (r) and λ_b (out).
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraLinear, VeraConfig, VeraProjection};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let base = Linear::new(Tensor::ones((3, 4), DType::F32, &Device::Cpu)?, None);
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// # let layer = LoraLinear::frozen("q_proj", base)?;
    /// let config = VeraConfig { r: 16, ..VeraConfig::default() };
    /// let shared = VeraProjection::new(16, 4, 3, DType::F32, &Device::Cpu, &mut rng)?;
    /// layer.add_vera("default", &config, &shared, &mut rng)?;
    /// let adapter = layer.adapter("default")?;
    /// let (lambda_d, lambda_b) = adapter.vera_lambdas().unwrap();
    /// assert_eq!((lambda_d.dims(), lambda_b.dims()), (&[16][..], &[3][..]));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn vera_lambdas(&self) -> Option<(&Var, &Var)> {
        match &self.update {
            Some(Update::Vera {
                lambda_d, lambda_b, ..
            }) => Some((lambda_d, lambda_b)),
            _ => None,
        }
    }

    /// The variables of the adapter, under PEFT's names after the layer's path, sorted.
    pub(crate) fn variables(&self, keys: Keys) -> Vec<(&'static str, &Var)> {
        let mut all: Vec<(&'static str, Option<&Var>)> = vec![
            (keys.a, self.lora_a()),
            (keys.b, self.lora_b()),
            ("lora_B.bias", self.bias.as_ref()),
            ("lora_magnitude_vector", self.magnitude.as_ref()),
            ("vera_lambda_d", self.vera_lambdas().map(|(d, _)| d)),
            ("vera_lambda_b", self.vera_lambdas().map(|(_, b)| b)),
            (
                self.base_key("weight", BASE_WEIGHT),
                self.saved_weight.as_ref(),
            ),
            (
                self.base_key("bias", "base_layer.bias"),
                self.base_bias.as_ref(),
            ),
        ];
        all.sort_by_key(|(key, _)| *key);
        all.into_iter()
            .filter_map(|(key, var)| Some((key, var?)))
            .collect()
    }

    /// Those of [`variables`](Self::variables) that train: not a base weight that came with a file.
    pub(crate) fn trainable(&self, keys: Keys) -> Vec<(&'static str, &Var)> {
        let mut all = self.variables(keys);
        all.retain(|(key, _)| *key != BASE_WEIGHT);
        all
    }

    /// PEFT wraps an adapted layer, so that the base's own tensors lie one level deeper there.
    fn base_key(&self, plain: &'static str, wrapped: &'static str) -> &'static str {
        if self.update.is_some() {
            wrapped
        } else {
            plain
        }
    }

    /// Puts the tensors of a file into the variables.
    pub(crate) fn fill<B: Base>(
        &mut self,
        layer: &str,
        base: &B,
        file: &ModuleTensors,
    ) -> Result<()> {
        if let Some(weight) = file.base_weight.as_ref().filter(|_| self.update.is_some()) {
            let own = base.weight();
            if matches!(own, Weight::Quantized(_)) {
                return Err(cannot_train(layer));
            }
            same_shape(layer, BASE_WEIGHT, weight, own.dims())?;
            let weight = weight.to_dtype(own.dtype())?.to_device(own.device())?;
            self.saved_weight = Some(Var::from_tensor(&weight.copy()?)?);
        }
        let (a, b) = if base.is_embedding() {
            (&file.embedding_a, &file.embedding_b)
        } else {
            (&file.lora_a, &file.lora_b)
        };
        let parts = [
            ("lora_A", self.lora_a(), a),
            ("lora_B", self.lora_b(), b),
            ("lora_B.bias", self.bias.as_ref(), &file.lora_b_bias),
            (
                "lora_magnitude_vector",
                self.magnitude.as_ref(),
                &file.magnitude,
            ),
            (
                "vera_lambda_d",
                self.vera_lambdas().map(|l| l.0),
                &file.vera_lambda_d,
            ),
            (
                "vera_lambda_b",
                self.vera_lambdas().map(|l| l.1),
                &file.vera_lambda_b,
            ),
            ("bias", self.base_bias.as_ref(), file.saved_bias_or_base()),
        ];
        let saved = ("weight", self.saved_weight.as_ref(), &file.saved_weight);
        for (part, var, tensor) in parts.into_iter().chain([saved]) {
            match (var, tensor) {
                (Some(var), Some(tensor)) => {
                    same_shape(layer, part, tensor, var.dims())?;
                    var.set(
                        &tensor
                            .to_dtype(var.dtype())?
                            .to_device(var.device())?
                            .contiguous()?,
                    )?;
                }
                (None, Some(tensor)) => {
                    let what = format!("layer {layer}: {part} {:?} of a file", tensor.dims());
                    let kind = B::LAYER;
                    return Err(unsupported(
                        &what,
                        &format!("a {kind} without it has no place for it"),
                    ));
                }
                (_, None) => {}
            }
        }
        Ok(())
    }

    /// The base with what this adapter puts in its place.
    pub(crate) fn replaced<B: Base>(&self, base: &B) -> Result<B> {
        if self.saved_weight.is_none() && self.base_bias.is_none() {
            return Ok(base.clone());
        }
        let own = base.weight().dtype();
        let as_own = |var: &Var| var.to_dtype(own);
        let weight = self.saved_weight.as_ref().map(as_own).transpose()?;
        let bias = self.base_bias.as_ref().map(as_own).transpose()?;
        let bias = bias.or_else(|| base.bias().cloned());
        match weight {
            Some(weight) => base.with(weight, bias),
            None => base.with_bias(bias),
        }
    }

    /// The factors of ΔW = s · B A, with VeRA's λ multiplied in.
    pub(crate) fn factors(&self) -> Result<Option<(Tensor, Tensor)>> {
        Ok(match &self.update {
            Some(Update::Lora { a, b }) => Some((a.as_tensor().clone(), b.as_tensor().clone())),
            Some(Update::Vera {
                a,
                b,
                lambda_d,
                lambda_b,
            }) => Some((
                a.broadcast_mul(&lambda_d.unsqueeze(1)?)?,
                b.broadcast_mul(&lambda_b.unsqueeze(1)?)?,
            )),
            None => None,
        })
    }

    /// ΔW = s · B A in the weight's layout and the adapter's type.
    pub(crate) fn delta<B: Base>(&self, layer: &str, base: &B) -> Result<Option<Tensor>> {
        let Some((a, b)) = self.factors()? else {
            return Ok(None);
        };
        if base.groups() > 1 {
            return Err(unsupported(
                &format!(
                    "layer {layer}: ΔW of a convolution with {} groups",
                    base.groups()
                ),
                "A sees all inputs, so the update has no place in a grouped weight; \
                 keep the adapter apart",
            ));
        }
        let product = (base.product(&a, &b)? * self.scaling)?;
        Ok(Some(base.to_weight_layout(product)?))
    }

    /// ‖W + ΔW‖ for each output, (out), without a graph.
    pub(crate) fn norm<B: Base>(&self, base: &B) -> Result<Tensor> {
        let dtype = adapter_dtype(base.weight().dtype());
        let weight = base
            .to_matrix(&base.weight().dense()?.to_dtype(dtype)?)?
            .detach();
        let sum = match self.factors()? {
            Some((a, b)) => {
                let (a, b) = (a.detach(), b.detach());
                (weight + (base.product(&a, &b)? * self.scaling)?)?
            }
            None => weight,
        };
        Ok(sum.sqr()?.sum(1)?.sqrt()?)
    }

    /// m / ‖W + ΔW‖ for each output, (out).
    ///
    /// A row of zeros has no direction: its norm counts as 1, where PEFT divides 0 by 0.
    pub(crate) fn dora_factor<B: Base>(&self, base: &B) -> Result<Option<Tensor>> {
        let Some(magnitude) = &self.magnitude else {
            return Ok(None);
        };
        let norm = self.norm(base)?;
        let norm = norm.eq(0f64)?.where_cond(&norm.ones_like()?, &norm)?;
        Ok(Some((magnitude.flatten_all()? / norm)?))
    }

    /// A and B, where they are all there is to this adapter in a pass.
    pub(crate) fn bare_pair(&self, train: bool) -> Option<(&Tensor, &Tensor)> {
        let bare = self.magnitude.is_none()
            && self.bias.is_none()
            && self.saved_weight.is_none()
            && self.base_bias.is_none()
            && !(train && self.dropout.is_some());
        match &self.update {
            Some(Update::Lora { a, b }) if bare => Some((a.as_tensor(), b.as_tensor())),
            _ => None,
        }
    }

    /// The layer's output with this adapter, from the output `y` without it; both flat.
    pub(crate) fn apply<B: Base>(
        &self,
        base: &B,
        x: &Tensor,
        y: Tensor,
        train: bool,
    ) -> Result<Tensor> {
        let Some(update) = &self.update else {
            return Ok(y);
        };
        let dropped = match &self.dropout {
            Some(dropout) if train && !base.is_embedding() => Some(dropout.mask(x)?),
            _ => None,
        };
        let x = dropped.as_ref().unwrap_or(x);
        let mut thin = match update {
            Update::Lora { a, b } => (base.up(&base.down(x, a)?, b)? * self.scaling)?,
            Update::Vera {
                a,
                b,
                lambda_d,
                lambda_b,
            } => {
                let h = base.down(x, a)?.broadcast_mul(lambda_d)?;
                base.up(&h, b)?.broadcast_mul(lambda_b)?
            }
        };
        if let Some(bias) = &self.bias {
            thin = thin.broadcast_add(&base.over_output(&(bias.as_tensor() * self.scaling)?)?)?;
        }
        let Some(factor) = self.dora_factor(base)? else {
            return Ok((y + thin)?);
        };
        let whole = match (&dropped, base.bias()) {
            (None, None) => y.clone(),
            (None, Some(bias)) => {
                y.broadcast_sub(&base.over_output(&bias.to_dtype(y.dtype())?)?)?
            }
            // As PEFT: the base's part of the correction sees the dropped input too.
            (Some(x), _) => {
                let bare = match base.weight() {
                    Weight::Dense(weight) => base.with(weight.to_dtype(x.dtype())?, None)?,
                    Weight::Quantized(_) => base.with_bias(None)?,
                };
                bare.forward(x)?
            }
        };
        let factor = base.over_output(&factor)?;
        let direction = whole.broadcast_mul(&(&factor - 1.0)?)?;
        Ok(((y + direction)? + thin.broadcast_mul(&factor)?)?)
    }

    /// The weight with this adapter in it, from the weight `w` that earlier ones may have changed.
    pub(crate) fn merge_weight<B: Base>(&self, layer: &str, base: &B, w: Tensor) -> Result<Tensor> {
        let Some(delta) = self.delta(layer, base)? else {
            return Ok(w);
        };
        let sum = (w + delta)?;
        let Some(factor) = self.dora_factor(base)? else {
            return Ok(sum);
        };
        let scaled = base.to_matrix(&sum)?.broadcast_mul(&factor.unsqueeze(1)?)?;
        base.to_weight_layout(scaled.contiguous()?)
    }

    /// What this adapter adds to the bias, (out).
    pub(crate) fn merge_bias(&self) -> Result<Option<Tensor>> {
        let scaled = |bias: &Var| bias.as_tensor() * self.scaling;
        Ok(self.bias.as_ref().map(scaled).transpose()?)
    }
}

/// A variable that starts as a tensor of the base; in f32 where that is in half precision.
fn trained(tensor: &Tensor) -> candle_core::Result<Var> {
    Var::from_tensor(&tensor.to_dtype(adapter_dtype(tensor.dtype()))?.copy()?)
}

/// The error of a weight in 4 bits that is to be replaced by one that trains.
fn cannot_train(layer: &str) -> Error {
    unsupported(
        &format!("layer {layer}: a weight of its own for an adapter, beside one in 4 bits"),
        "codes do not train; keep this layer out of 4 bits",
    )
}

/// The name of a base weight that came with a file.
const BASE_WEIGHT: &str = "base_layer.weight";

fn same_shape(layer: &str, part: &str, tensor: &Tensor, wanted: &[usize]) -> Result<()> {
    if tensor.dims() == wanted {
        return Ok(());
    }
    Err(unsupported(
        &format!("layer {layer}: {part} {:?} of a file", tensor.dims()),
        &format!("the layer needs {wanted:?}; the file belongs to another model"),
    ))
}

/// Refuses what PEFT does not define for this kind of layer.
fn fits<B: Base>(layer: &str, base: &B, config: &LoraConfig) -> Result<()> {
    let refuse = |what: &str, why: &str| Err(unsupported(&format!("layer {layer}: {what}"), why));
    let sizes = base
        .a_shape(config.r)
        .iter()
        .chain(&base.b_shape(config.r))
        .copied()
        .collect::<Vec<_>>();
    let square = config.init_lora_weights == Init::Orthogonal;
    if sizes.contains(&0) && base.groups() == 1
        || too_large(&base.a_shape(config.r))
        || too_large(&base.b_shape(config.r))
        || square && too_large(&[config.r, config.r])
    {
        return Err(Error::HugeRank {
            layer: layer.to_string(),
            r: config.r,
            weight: base.weight().dims().to_vec(),
        });
    }
    if base.groups() > 1 && !config.r.is_multiple_of(base.groups()) {
        return refuse(
            &format!("r = {} with {} groups", config.r, base.groups()),
            "B is grouped, so r must be a multiple of groups",
        );
    }
    if base.groups() > 1 && config.use_dora {
        return refuse(
            "DoRA with groups",
            "the update has no place in a grouped weight, whose norm DoRA needs",
        );
    }
    if base.is_embedding() && config.lora_bias {
        return refuse("lora_bias on an embedding", "an embedding has no bias");
    }
    let plain = matches!(
        config.init_lora_weights,
        Init::Kaiming | Init::Gaussian | Init::Random
    );
    if !base.is_linear() && !plain {
        return refuse(
            &format!("{:?} on a {}", config.init_lora_weights, B::LAYER),
            "this initialisation is defined for linear layers; use Init::Kaiming or Init::Gaussian",
        );
    }
    let most = base.inputs().min(base.out());
    if config.init_lora_weights.rewrites_base() && config.r > most {
        return refuse(
            &format!("{:?} with r = {}", config.init_lora_weights, config.r),
            &format!("the weight has only {most} singular values; use r <= {most}"),
        );
    }
    Ok(())
}
