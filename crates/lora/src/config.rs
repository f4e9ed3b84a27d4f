//! What a LoRA adapter is built from: PEFT's `LoraConfig` and `VeraConfig`.

use crate::targets::{Pattern, TargetModules};
use crate::{Error, Init, Result};

/// The settings of a LoRA adapter, under PEFT's names and with PEFT's defaults.
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
    /// How A and B start. PEFT's default is [`Init::Kaiming`].
    pub init_lora_weights: Init,
    /// The probability with which training drops a number of the adapter's input. Off by default.
    pub lora_dropout: f64,
    /// Splits the weight into magnitude and direction (DoRA, arXiv:2402.09353). Off by default.
    pub use_dora: bool,
    /// Gives B a bias of its own. Off by default.
    pub lora_bias: bool,
    /// Which biases of the base train beside A and B. [`Bias::None`] by default.
    pub bias: Bias,
    /// The layers that get the adapter; needed by [`LoraModel`](crate::LoraModel) only.
    pub target_modules: Option<TargetModules>,
    /// Layers that get none although `target_modules` names them.
    pub exclude_modules: Option<TargetModules>,
    /// The numbers of the layers (as in `layers.3`) that get the adapter; all by default.
    pub layers_to_transform: Option<Vec<usize>>,
    /// The names before those numbers, such as `layers`; any by default.
    pub layers_pattern: Vec<String>,
    /// Other ranks for the layers that a pattern matches; the first match counts.
    pub rank_pattern: Vec<(String, usize)>,
    /// Other α for the layers that a pattern matches; the first match counts.
    pub alpha_pattern: Vec<(String, f64)>,
    /// Layers that train whole and are saved with the adapter, such as a new head.
    pub modules_to_save: Vec<String>,
    /// The base checkpoint stores linear weights as (in, out), as GPT-2's do. The layers here
    /// always hold (out, in); the flag concerns files and merged checkpoints.
    pub fan_in_fan_out: bool,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            r: 8,
            lora_alpha: 8.0,
            use_rslora: false,
            init_lora_weights: Init::Kaiming,
            lora_dropout: 0.0,
            use_dora: false,
            lora_bias: false,
            bias: Bias::None,
            target_modules: None,
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: Vec::new(),
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            modules_to_save: Vec::new(),
            fan_in_fan_out: false,
        }
    }
}

/// Which biases of the base model train beside A and B: PEFT's `bias`.
///
/// ```
/// assert_eq!(lora::LoraConfig::default().bias, lora::Bias::None);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Bias {
    /// None: the base stays frozen.
    #[default]
    None,
    /// The biases of the layers that have an adapter.
    LoraOnly,
    /// The biases of all layers.
    All,
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

    /// Sets the dropout probability of the adapter's input; it acts in training only.
    ///
    /// ```
    /// assert_eq!(lora::LoraConfig::new(8, 16.0).with_dropout(0.1).lora_dropout, 0.1);
    /// ```
    #[must_use]
    pub fn with_dropout(mut self, lora_dropout: f64) -> Self {
        self.lora_dropout = lora_dropout;
        self
    }

    /// Chooses DoRA (`true`): a trained magnitude for each output beside A and B.
    ///
    /// ```
    /// assert!(lora::LoraConfig::new(8, 16.0).with_dora(true).use_dora);
    /// ```
    #[must_use]
    pub fn with_dora(mut self, use_dora: bool) -> Self {
        self.use_dora = use_dora;
        self
    }

    /// Gives B a bias (`true`).
    ///
    /// ```
    /// assert!(lora::LoraConfig::new(8, 16.0).with_lora_bias(true).lora_bias);
    /// ```
    #[must_use]
    pub fn with_lora_bias(mut self, lora_bias: bool) -> Self {
        self.lora_bias = lora_bias;
        self
    }

    /// Names the layers that get the adapter.
    ///
    /// ```
    /// use lora::{LoraConfig, TargetModules};
    ///
    /// let config = LoraConfig::new(8, 16.0).with_targets(["q_proj", "v_proj"]);
    /// assert_eq!(config.target_modules, Some(TargetModules::from(["q_proj", "v_proj"])));
    ///
    /// let config = LoraConfig::new(8, 16.0).with_targets(TargetModules::AllLinear);
    /// assert_eq!(config.target_modules, Some(TargetModules::AllLinear));
    /// ```
    #[must_use]
    pub fn with_targets(mut self, targets: impl Into<TargetModules>) -> Self {
        self.target_modules = Some(targets.into());
        self
    }

    /// The settings of one layer: rank and α after `rank_pattern` and `alpha_pattern`.
    ///
    /// A key matches a path that ends with it, at a dot; it is a regular expression. The first
    /// matching key counts, separately for rank and α.
    ///
    /// # Errors
    ///
    /// [`Error::Pattern`] when a key is not a regular expression.
    ///
    /// Source: PEFT `utils/other.py`, `get_pattern_key`.
    ///
    /// ```
    /// let mut config = lora::LoraConfig::new(8, 16.0);
    /// config.rank_pattern = vec![("layers\\.0\\.q_proj".into(), 2), ("q_proj".into(), 4)];
    /// assert_eq!(config.for_layer("model.layers.0.q_proj")?.r, 2);
    /// assert_eq!(config.for_layer("model.layers.1.q_proj")?.r, 4);
    /// assert_eq!(config.for_layer("model.layers.1.v_proj")?.r, 8);
    /// # Ok::<(), lora::Error>(())
    /// ```
    pub fn for_layer(&self, path: &str) -> Result<Self> {
        let mut own = self.clone();
        if let Some(r) = first_match("rank_pattern", &self.rank_pattern, path)? {
            own.r = r;
        }
        if let Some(alpha) = first_match("alpha_pattern", &self.alpha_pattern, path)? {
            own.lora_alpha = alpha;
        }
        Ok(own)
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
    /// [`Error::Rank`] when a rank is 0, [`Error::Alpha`] when an α is NaN, infinite, zero or
    /// negative, [`Error::Dropout`] outside [0, 1), [`Error::Unsupported`] for options that
    /// exclude each other: `lora_bias` with DoRA, or with an initialisation that PEFT does not
    /// allow beside it, an odd rank with [`Init::Orthogonal`], and `layers_to_transform` or
    /// `layers_pattern` beside targets that are no list.
    ///
    /// ```
    /// use lora::{LoraConfig, TargetModules};
    ///
    /// assert!(LoraConfig::default().validate().is_ok());
    /// assert!(LoraConfig::new(0, 8.0).validate().is_err());
    /// assert!(LoraConfig::new(8, f64::NAN).validate().is_err());
    ///
    /// let upper = |targets: TargetModules| LoraConfig {
    ///     layers_to_transform: Some(vec![4, 5]),
    ///     ..LoraConfig::new(8, 16.0).with_targets(targets)
    /// };
    /// assert!(upper(["query", "value"].into()).validate().is_ok());
    /// let error = upper(TargetModules::AllLinear).validate().unwrap_err().to_string();
    /// assert!(error.contains("need a list in target_modules"), "{error}");
    /// ```
    pub fn validate(&self) -> Result<()> {
        let ranks = self.rank_pattern.iter().map(|(_, r)| *r);
        if ranks.chain([self.r]).any(|r| r == 0) {
            return Err(Error::Rank);
        }
        for alpha in self
            .alpha_pattern
            .iter()
            .map(|(_, alpha)| *alpha)
            .chain([self.lora_alpha])
        {
            if !(alpha.is_finite() && alpha > 0.0) {
                return Err(Error::Alpha { alpha });
            }
        }
        checked_dropout("LoraConfig", self.lora_dropout)?;
        if self.lora_bias && self.use_dora {
            return Err(unsupported(
                "LoraConfig: lora_bias with use_dora",
                "choose one of them",
            ));
        }
        let plain = matches!(self.init_lora_weights, Init::Kaiming | Init::Random);
        if self.lora_bias && !plain {
            return Err(unsupported(
                "LoraConfig: lora_bias with this init_lora_weights",
                "PEFT allows it with Init::Kaiming and Init::Random only",
            ));
        }
        if self.init_lora_weights == Init::Orthogonal && !self.r.is_multiple_of(2) {
            return Err(unsupported(
                &format!(
                    "LoraConfig: Init::Orthogonal with the odd rank r = {}",
                    self.r
                ),
                "it splits an orthogonal r × r matrix into halves; use an even r",
            ));
        }
        match self.contradiction() {
            Some(why) => Err(unsupported("LoraConfig: these targets", why)),
            None => Ok(()),
        }
    }

    /// What PEFT refuses in the settings that choose layers; it would not load what is written.
    pub(crate) fn contradiction(&self) -> Option<&'static str> {
        let by_name = !matches!(
            self.target_modules,
            Some(TargetModules::Regex(_) | TargetModules::AllLinear)
        );
        let narrowed = self.layers_to_transform.is_some() || !self.layers_pattern.is_empty();
        if narrowed && !by_name {
            return Some(
                "layers_to_transform and layers_pattern need a list in target_modules; \
                 put the numbers into the regular expression",
            );
        }
        if !self.layers_pattern.is_empty() && self.layers_to_transform.is_none() {
            return Some("layers_pattern needs layers_to_transform beside it");
        }
        None
    }
}

/// The settings of a VeRA adapter: two shared random matrices, frozen, and two trained vectors a
/// layer.
///
/// y = x Wᵀ + b + λ_b ⊙ ((λ_d ⊙ (x Aᵀ)) Bᵀ), A and B from a [`VeraProjection`](crate::VeraProjection).
///
/// Source: arXiv:2310.11454; PEFT `tuners/vera/config.py`.
///
/// ```
/// let config = lora::VeraConfig::default();
/// assert_eq!((config.r, config.d_initial, config.vera_dropout), (256, 0.1, 0.0));
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct VeraConfig {
    /// The rank of the shared matrices. PEFT's default is 256.
    pub r: usize,
    /// What λ_d starts with; λ_b starts at zero. PEFT's default is 0.1.
    pub d_initial: f64,
    /// The dropout probability of the adapter's input in training. Off by default.
    pub vera_dropout: f64,
    /// The layers that get the adapter; needed by [`LoraModel`](crate::LoraModel) only.
    pub target_modules: Option<TargetModules>,
    /// PEFT's seed of the shared matrices, kept for files; PEFT's default is 0.
    pub projection_prng_key: u64,
}

impl Default for VeraConfig {
    fn default() -> Self {
        Self {
            r: 256,
            d_initial: 0.1,
            vera_dropout: 0.0,
            target_modules: None,
            projection_prng_key: 0,
        }
    }
}

impl VeraConfig {
    /// Says whether an adapter can be built from these settings.
    ///
    /// # Errors
    ///
    /// [`Error::Rank`] when r = 0, [`Error::Dropout`] outside [0, 1), [`Error::Unsupported`] when
    /// `d_initial` is not finite.
    ///
    /// ```
    /// use lora::VeraConfig;
    ///
    /// assert!(VeraConfig::default().validate().is_ok());
    /// assert!(VeraConfig { r: 0, ..VeraConfig::default() }.validate().is_err());
    /// ```
    pub fn validate(&self) -> Result<()> {
        if self.r == 0 {
            return Err(Error::Rank);
        }
        if !self.d_initial.is_finite() {
            return Err(unsupported(
                &format!("VeraConfig: d_initial = {}", self.d_initial),
                "λ_d must start finite; PEFT's default is 0.1",
            ));
        }
        checked_dropout("VeraConfig", self.vera_dropout)
    }

    /// The part of the settings that chooses layers.
    pub(crate) fn as_lora(&self) -> LoraConfig {
        LoraConfig {
            r: self.r,
            target_modules: self.target_modules.clone(),
            ..LoraConfig::default()
        }
    }
}

fn checked_dropout(config: &'static str, p: f64) -> Result<()> {
    if (0.0..1.0).contains(&p) {
        Ok(())
    } else {
        Err(Error::Dropout { config, p })
    }
}

fn first_match<T: Copy>(
    field: &'static str,
    patterns: &[(String, T)],
    path: &str,
) -> Result<Option<T>> {
    for (key, value) in patterns {
        if Pattern::ending(field, key)?.matches(path)? {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}

pub(crate) fn unsupported(what: &str, why: &str) -> Error {
    Error::Unsupported {
        what: what.to_string(),
        why: why.to_string(),
    }
}
