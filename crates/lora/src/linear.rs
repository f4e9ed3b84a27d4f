//! The linear layer with a low-rank update.

use std::fmt;

use candle_core::{DType, Tensor, Var};
use candle_nn::{Linear, Module};
use rand::Rng;

use crate::count::grouped;
use crate::{Error, LoraConfig, ParameterCount, Result};

/// A frozen [`candle_nn::Linear`] with a trainable low-rank update beside it.
///
/// y = x Wᵀ + b + s · (x Aᵀ) Bᵀ, with the scaling s of [`LoraConfig::scaling`].
///
/// W and b never train: they are kept as plain tensors without a graph behind them, copied where
/// they would share memory with a variable. A and B are the layer's only variables. B starts at
/// zero, so a fresh layer computes what its base computes. The product B·A is never formed in a
/// forward pass: two thin products cost r · (in + out) multiplications per input row instead of
/// in · out more.
///
/// A base in f16 or bf16 keeps A and B in f32; the update is computed in f32 and cast once.
///
/// Clones share A and B.
///
/// # Shapes
///
/// W (out, in), b (out), A (r, in), B (out, r); input (…, in) → output (…, out) for any number
/// of leading dimensions, none included.
///
/// Source: Hu et al. 2021, arXiv:2106.09685, section 4.1, equation 3; PEFT
/// `tuners/lora/layer.py`, `Linear`.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_nn::{Linear, Module};
/// use lora::{LoraConfig, LoraLinear};
/// use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
///
/// let w = Tensor::new(&[[1f32, 2.], [3., 4.], [5., 6.]], &Device::Cpu)?;
/// let mut rng = ChaCha8Rng::seed_from_u64(1);
/// let layer = LoraLinear::new("proj", Linear::new(w, None), &LoraConfig::new(1, 2.0), &mut rng)?;
///
/// // B = 0: the base's own answer.
/// let x = Tensor::new(&[[10f32, 100.]], &Device::Cpu)?;
/// assert_eq!(layer.forward(&x)?.to_vec2::<f32>()?, [[210., 430., 650.]]);
///
/// // s = 2, A = [1, 1], B = [1, 0, 0]ᵀ add 2 · (10 + 100) to the first output.
/// layer.lora_a().set(&Tensor::new(&[[1f32, 1.]], &Device::Cpu)?)?;
/// layer.lora_b().set(&Tensor::new(&[[1f32], [0.], [0.]], &Device::Cpu)?)?;
/// assert_eq!(layer.forward(&x)?.to_vec2::<f32>()?, [[430., 430., 650.]]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct LoraLinear {
    name: String,
    base: Linear,
    lora_a: Var,
    lora_b: Var,
    r: usize,
    scaling: f64,
    in_features: usize,
    out_features: usize,
}

impl LoraLinear {
    /// Freezes `base` and puts a fresh pair A, B beside it; A is drawn from `rng`, B is zero.
    ///
    /// `name` is the module's path in the model, such as `layers.0.q_proj`; it becomes part of the
    /// parameters' names. A and B lie on the base's device, in the base's type (f32 for a base in
    /// half precision). When the base's weight or bias is a variable, or computed from one, the
    /// layer keeps a copy: whatever still trains the original cannot move the frozen layer.
    ///
    /// # Shapes
    ///
    /// `base`: weight (out, in), bias (out) or none.
    ///
    /// # Errors
    ///
    /// What [`LoraConfig::validate`] refuses; an empty name; a weight that is not a matrix, is
    /// empty, or is of another type than f32, f64, f16 and bf16; a bias that does not fit.
    ///
    /// Source: PEFT `tuners/lora/layer.py`, `update_layer` and `reset_lora_parameters`.
    ///
    /// ```
    /// # use candle_core::{Device, DType, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraConfig, LoraLinear};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// let base = Linear::new(Tensor::zeros((512, 768), DType::F32, &Device::Cpu)?, None);
    /// let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// let layer = LoraLinear::new("q_proj", base, &LoraConfig::new(8, 16.0), &mut rng)?;
    /// assert_eq!(layer.lora_a().dims(), [8, 768]);
    /// assert_eq!(layer.lora_b().dims(), [512, 8]);
    /// assert_eq!(
    ///     layer.to_string(),
    ///     "LoraLinear(q_proj: 768 → 512, r = 8, scaling = 2, 10,240 trainable)"
    /// );
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn new(
        name: impl Into<String>,
        base: Linear,
        config: &LoraConfig,
        rng: &mut (impl Rng + ?Sized),
    ) -> Result<Self> {
        config.validate()?;
        let name = checked_name(name.into())?;
        let (out_features, in_features) = checked_base(&name, &base)?;

        let dtype = adapter_dtype(base.weight().dtype());
        let device = base.weight().device();
        let a = config
            .init_lora_weights
            .lora_a(config.r, in_features, dtype, device, rng)?;
        Ok(Self {
            lora_a: Var::from_tensor(&a)?,
            lora_b: Var::zeros((out_features, config.r), dtype, device)?,
            base: frozen(&base)?,
            name,
            r: config.r,
            scaling: config.scaling(),
            in_features,
            out_features,
        })
    }

    /// The module's path in the model, as given to [`new`](Self::new).
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraConfig, LoraLinear};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let base = Linear::new(Tensor::ones((3, 4), DType::F32, &Device::Cpu)?, None);
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// let layer = LoraLinear::new("q_proj", base, &LoraConfig::new(2, 4.0), &mut rng)?;
    /// assert_eq!(layer.name(), "q_proj");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The frozen layer: W (out, in) and, where there is one, b (out).
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraConfig, LoraLinear};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let base = Linear::new(Tensor::ones((3, 4), DType::F32, &Device::Cpu)?, None);
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// let layer = LoraLinear::new("q_proj", base, &LoraConfig::new(2, 4.0), &mut rng)?;
    /// assert_eq!(layer.base().weight().dims(), [3, 4]);
    /// assert!(!layer.base().weight().is_variable());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn base(&self) -> &Linear {
        &self.base
    }

    /// A (r, in), which maps the input down to r numbers.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraConfig, LoraLinear};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let base = Linear::new(Tensor::ones((3, 4), DType::F32, &Device::Cpu)?, None);
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// let layer = LoraLinear::new("q_proj", base, &LoraConfig::new(2, 4.0), &mut rng)?;
    /// assert_eq!(layer.lora_a().dims(), [2, 4]);
    /// assert!(layer.lora_a().is_variable());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn lora_a(&self) -> &Var {
        &self.lora_a
    }

    /// B (out, r), which maps the r numbers up to the output; zero in a fresh layer.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraConfig, LoraLinear};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let base = Linear::new(Tensor::ones((3, 4), DType::F32, &Device::Cpu)?, None);
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// let layer = LoraLinear::new("q_proj", base, &LoraConfig::new(2, 4.0), &mut rng)?;
    /// assert_eq!(layer.lora_b().to_vec2::<f32>()?, [[0.0; 2]; 3]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn lora_b(&self) -> &Var {
        &self.lora_b
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
    /// let layer = LoraLinear::new("q_proj", base, &LoraConfig::new(2, 4.0), &mut rng)?;
    /// assert_eq!(layer.r(), 2);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn r(&self) -> usize {
        self.r
    }

    /// The factor s of the update, from [`LoraConfig::scaling`].
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraConfig, LoraLinear};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let base = Linear::new(Tensor::ones((3, 4), DType::F32, &Device::Cpu)?, None);
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// let layer = LoraLinear::new("q_proj", base, &LoraConfig::new(2, 4.0), &mut rng)?;
    /// assert_eq!(layer.scaling(), 2.0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn scaling(&self) -> f64 {
        self.scaling
    }

    /// The number of input features, the second size of W.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraConfig, LoraLinear};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let base = Linear::new(Tensor::ones((3, 4), DType::F32, &Device::Cpu)?, None);
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// let layer = LoraLinear::new("q_proj", base, &LoraConfig::new(2, 4.0), &mut rng)?;
    /// assert_eq!(layer.in_features(), 4);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// The number of output features, the first size of W.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraConfig, LoraLinear};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let base = Linear::new(Tensor::ones((3, 4), DType::F32, &Device::Cpu)?, None);
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// let layer = LoraLinear::new("q_proj", base, &LoraConfig::new(2, 4.0), &mut rng)?;
    /// assert_eq!(layer.out_features(), 3);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// ΔW = s · B A, the matrix the layer adds to W.
    ///
    /// For looking at and for merging; a forward pass never needs it. It is in the type of A and B
    /// and keeps their graph, so a loss on ΔW can train them.
    ///
    /// # Shapes
    ///
    /// (out, in), whatever the rank.
    ///
    /// # Errors
    ///
    /// What candle reports.
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
    /// layer.lora_a().set(&Tensor::new(&[[1f32, 2.]], &Device::Cpu)?)?;
    /// layer.lora_b().set(&Tensor::new(&[[1f32], [0.], [3.]], &Device::Cpu)?)?;
    ///
    /// // s = 4 / 1
    /// let delta = layer.delta_weight()?.to_vec2::<f32>()?;
    /// assert_eq!(delta, [[4., 8.], [0., 0.], [12., 24.]]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn delta_weight(&self) -> Result<Tensor> {
        Ok((self.lora_b.matmul(&self.lora_a)? * self.scaling)?)
    }

    /// A plain layer with W + ΔW and the same bias: the same answers at the base's cost.
    ///
    /// The layer itself stays as it is; the result is detached and trains nothing. The sum is
    /// taken in the type of A and B and rounded once to the base's type.
    ///
    /// # Shapes
    ///
    /// weight (out, in), bias (out) or none.
    ///
    /// # Errors
    ///
    /// What candle reports.
    ///
    /// Source: arXiv:2106.09685 section 4.1, "No Additional Inference Latency"; PEFT
    /// `tuners/lora/layer.py`, `merge`.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraConfig, LoraLinear};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let base = Linear::new(Tensor::ones((3, 4), DType::F32, &Device::Cpu)?, None);
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// let layer = LoraLinear::new("q_proj", base, &LoraConfig::new(2, 4.0), &mut rng)?;
    /// layer.lora_b().set(&Tensor::ones((3, 2), DType::F32, &Device::Cpu)?)?;
    ///
    /// # use candle_nn::Module;
    /// let x = Tensor::new(&[[1f32, 2., 3., 4.]], &Device::Cpu)?;
    /// let (apart, merged) = (layer.forward(&x)?, layer.merged()?.forward(&x)?);
    /// let gap = (apart - merged)?.abs()?.max_all()?.to_scalar::<f32>()?;
    /// assert!(gap < 1e-5);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn merged(&self) -> Result<Linear> {
        let weight = self.base.weight();
        let delta = self.delta_weight()?.detach();
        let sum = (weight.to_dtype(delta.dtype())? + delta)?;
        Ok(Linear::new(
            sum.to_dtype(weight.dtype())?,
            self.base.bias().cloned(),
        ))
    }

    /// The variables that train, under PEFT's names, sorted by name.
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
        let key = |part: &str| format!("base_model.model.{}.{part}.weight", self.name);
        vec![
            (key("lora_A"), self.lora_a.clone()),
            (key("lora_B"), self.lora_b.clone()),
        ]
    }

    /// r · (in + out) trainable numbers, and these plus the base's in all.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{LoraConfig, LoraLinear};
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let base = Linear::new(Tensor::ones((512, 768), DType::F32, &Device::Cpu)?, None);
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// let layer = LoraLinear::new("q_proj", base, &LoraConfig::new(8, 16.0), &mut rng)?;
    /// let count = layer.parameter_count();
    /// assert_eq!(count.trainable, 8 * (768 + 512));
    /// assert_eq!(count.all, 8 * (768 + 512) + 768 * 512);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn parameter_count(&self) -> ParameterCount {
        let trainable = self.lora_a.elem_count() + self.lora_b.elem_count();
        let bias = self.base.bias().map_or(0, Tensor::elem_count);
        ParameterCount {
            trainable,
            all: trainable + self.base.weight().elem_count() + bias,
        }
    }

    /// The forward pass with this crate's own errors.
    fn adapted(&self, x: &Tensor) -> Result<Tensor> {
        let weight = self.base.weight();
        let Some((&last, batch)) = x.dims().split_last() else {
            return Err(self.refused(x));
        };
        if last != self.in_features {
            return Err(self.refused(x));
        }
        if x.dtype() != weight.dtype() {
            return Err(Error::InputType {
                layer: self.name.clone(),
                input: x.dtype(),
                weight: weight.dtype(),
            });
        }

        // One matrix of rows: candle's products are fastest in two dimensions.
        let rows = x.reshape((batch.iter().product::<usize>(), self.in_features))?;
        let y = (self.base.forward(&rows)? + self.update(&rows)?)?;
        let shape = [batch, &[self.out_features]].concat();
        Ok(y.reshape(shape)?)
    }

    /// s · (x Aᵀ) Bᵀ for rows (n, in); s goes to the thin middle (n, r), where it is cheapest.
    fn update(&self, rows: &Tensor) -> Result<Tensor> {
        let x = rows.to_dtype(self.lora_a.dtype())?;
        let down = (x.matmul(&self.lora_a.t()?)? * self.scaling)?;
        let up = down.matmul(&self.lora_b.t()?)?;
        Ok(up.to_dtype(rows.dtype())?)
    }

    fn refused(&self, x: &Tensor) -> Error {
        Error::Input {
            layer: self.name.clone(),
            input: x.dims().to_vec(),
            weight: vec![self.out_features, self.in_features],
        }
    }
}

impl Module for LoraLinear {
    /// y = x Wᵀ + b + s · (x Aᵀ) Bᵀ.
    ///
    /// # Shapes
    ///
    /// (…, in) → (…, out).
    ///
    /// # Errors
    ///
    /// An input whose last dimension is not in, or whose type is not the base's; the message names
    /// the layer and both shapes.
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        Ok(self.adapted(x)?)
    }
}

impl fmt::Display for LoraLinear {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "LoraLinear({}: {} → {}, r = {}, scaling = {}, {} trainable)",
            self.name,
            self.in_features,
            self.out_features,
            self.r,
            self.scaling,
            grouped(self.parameter_count().trainable),
        )
    }
}

impl fmt::Debug for LoraLinear {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

fn checked_name(name: String) -> Result<String> {
    let broken = |part: &str| part.is_empty() || part.contains(char::is_whitespace);
    if name.split('.').any(broken) {
        return Err(Error::Name { name });
    }
    Ok(name)
}

/// (out, in) of a base that can be adapted.
fn checked_base(name: &str, base: &Linear) -> Result<(usize, usize)> {
    let weight = base.weight();
    let &[out_features, in_features] = weight.dims() else {
        return Err(weight_refused(name, weight));
    };
    if out_features == 0 || in_features == 0 {
        return Err(weight_refused(name, weight));
    }
    if let Some(bias) = base.bias()
        && bias.dims() != [out_features]
    {
        return Err(Error::Bias {
            layer: name.to_string(),
            bias: bias.dims().to_vec(),
            weight: weight.dims().to_vec(),
        });
    }
    match weight.dtype() {
        DType::F16 | DType::BF16 | DType::F32 | DType::F64 => Ok((out_features, in_features)),
        dtype => Err(Error::WeightType {
            layer: name.to_string(),
            dtype,
        }),
    }
}

fn weight_refused(name: &str, weight: &Tensor) -> Error {
    Error::Weight {
        layer: name.to_string(),
        weight: weight.dims().to_vec(),
    }
}

/// The type of A and B beside a base of type `base`.
fn adapter_dtype(base: DType) -> DType {
    match base {
        DType::F16 | DType::BF16 => DType::F32,
        other => other,
    }
}

/// `base` as plain tensors that no variable can reach or move.
fn frozen(base: &Linear) -> Result<Linear> {
    let plain = |tensor: &Tensor| -> Result<Tensor> {
        // `detach` alone would share a variable's storage, which an optimiser writes in place.
        if tensor.track_op() {
            Ok(tensor.detach().copy()?)
        } else {
            Ok(tensor.clone())
        }
    };
    let bias = base.bias().map(plain).transpose()?;
    Ok(Linear::new(plain(base.weight())?, bias))
}
