//! What a LoRA layer is built from: rank, alpha, the scaling rule and the initialisation.

use candle_core::{DType, Device, Tensor};
use rand::Rng;
use rand_distr::StandardNormal;

use crate::{Error, Result};

/// How the matrix A starts. B starts at zero either way, so a fresh layer changes nothing.
///
/// Source: PEFT `tuners/lora/layer.py`, `reset_lora_parameters`.
///
/// ```
/// use lora::{Init, LoraConfig};
///
/// assert_eq!(LoraConfig::default().init_lora_weights, Init::Kaiming);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Init {
    /// A ~ U(−1/√in, 1/√in): Kaiming uniform with a = √5, PEFT's `init_lora_weights=True`.
    #[default]
    Kaiming,
    /// A ~ N(0, σ = 1/r), PEFT's `init_lora_weights="gaussian"`.
    Gaussian,
}

impl Init {
    /// A fresh A (r, in). Drawn in f64 and rounded once, so every type sees the same numbers.
    pub(crate) fn lora_a(
        self,
        r: usize,
        in_features: usize,
        dtype: DType,
        device: &Device,
        rng: &mut (impl Rng + ?Sized),
    ) -> Result<Tensor> {
        let count = r * in_features;
        let values: Vec<f64> = match self {
            Init::Kaiming => {
                let bound = 1.0 / (in_features as f64).sqrt();
                (0..count)
                    .map(|_| bound * (2.0 * rng.random::<f64>() - 1.0))
                    .collect()
            }
            Init::Gaussian => {
                let std = 1.0 / r as f64;
                (0..count)
                    .map(|_| std * rng.sample::<f64, _>(StandardNormal))
                    .collect()
            }
        };
        let a = Tensor::from_vec(values, (r, in_features), &Device::Cpu)?;
        Ok(a.to_dtype(dtype)?.to_device(device)?)
    }
}

/// The settings of a LoRA layer, under PEFT's names and with PEFT's defaults.
///
/// Source: PEFT `tuners/lora/config.py`; Hu et al. 2021, arXiv:2106.09685, section 4.1.
///
/// ```
/// use lora::LoraConfig;
///
/// let config = LoraConfig { r: 4, lora_alpha: 8.0, ..LoraConfig::default() };
/// assert_eq!(config.scaling(), 2.0);
/// assert!(config.validate().is_ok());
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// The rank: the inner size of B·A. PEFT's default is 8.
    pub r: usize,
    /// The numerator α of the scaling. PEFT's default is 8.
    pub lora_alpha: f64,
    /// Scales by α/√r instead of α/r (rsLoRA, arXiv:2312.03732). Off by default.
    pub use_rslora: bool,
    /// How A starts. PEFT's default is [`Init::Kaiming`].
    pub init_lora_weights: Init,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            r: 8,
            lora_alpha: 8.0,
            use_rslora: false,
            init_lora_weights: Init::Kaiming,
        }
    }
}

impl LoraConfig {
    /// A configuration of rank `r` and α = `lora_alpha`; everything else as in PEFT's defaults.
    ///
    /// ```
    /// use lora::LoraConfig;
    ///
    /// let config = LoraConfig::new(8, 16.0);
    /// assert_eq!((config.r, config.lora_alpha, config.use_rslora), (8, 16.0, false));
    /// ```
    #[must_use]
    pub fn new(r: usize, lora_alpha: f64) -> Self {
        Self {
            r,
            lora_alpha,
            ..Self::default()
        }
    }

    /// Chooses between α/√r (`true`) and α/r (`false`).
    ///
    /// ```
    /// use lora::LoraConfig;
    ///
    /// assert_eq!(LoraConfig::new(16, 8.0).with_rslora(true).scaling(), 2.0);
    /// assert_eq!(LoraConfig::new(16, 8.0).with_rslora(false).scaling(), 0.5);
    /// ```
    #[must_use]
    pub fn with_rslora(mut self, use_rslora: bool) -> Self {
        self.use_rslora = use_rslora;
        self
    }

    /// Chooses how A starts.
    ///
    /// ```
    /// use lora::{Init, LoraConfig};
    ///
    /// let config = LoraConfig::new(8, 16.0).with_init(Init::Gaussian);
    /// assert_eq!(config.init_lora_weights, Init::Gaussian);
    /// ```
    #[must_use]
    pub fn with_init(mut self, init: Init) -> Self {
        self.init_lora_weights = init;
        self
    }

    /// The factor s of the update: s = α/r, or s = α/√r with `use_rslora`.
    ///
    /// This is the only place of the rule. It divides by the rank: [`validate`](Self::validate)
    /// refuses r = 0, and every layer validates before it asks.
    ///
    /// Source: arXiv:2106.09685 section 4.1; rsLoRA arXiv:2312.03732 section 3; PEFT
    /// `tuners/lora/layer.py`, `update_layer`.
    ///
    /// ```
    /// use lora::LoraConfig;
    ///
    /// assert_eq!(LoraConfig::new(8, 16.0).scaling(), 2.0);
    /// assert_eq!(LoraConfig::new(4, 16.0).with_rslora(true).scaling(), 8.0);
    /// ```
    #[must_use]
    pub fn scaling(&self) -> f64 {
        let r = self.r as f64;
        self.lora_alpha / if self.use_rslora { r.sqrt() } else { r }
    }

    /// Says whether a layer can be built from these settings.
    ///
    /// A rank above min(in, out) is allowed, as in PEFT: it trains more numbers than it needs,
    /// but nothing breaks.
    ///
    /// # Errors
    ///
    /// [`Error::Rank`] when r = 0, [`Error::Alpha`] when α is NaN, infinite, zero or negative.
    ///
    /// ```
    /// use lora::LoraConfig;
    ///
    /// assert!(LoraConfig::default().validate().is_ok());
    /// assert!(LoraConfig::new(0, 8.0).validate().is_err());
    /// assert!(LoraConfig::new(8, f64::NAN).validate().is_err());
    /// ```
    pub fn validate(&self) -> Result<()> {
        if self.r == 0 {
            return Err(Error::Rank);
        }
        if !(self.lora_alpha.is_finite() && self.lora_alpha > 0.0) {
            return Err(Error::Alpha {
                alpha: self.lora_alpha,
            });
        }
        Ok(())
    }
}
