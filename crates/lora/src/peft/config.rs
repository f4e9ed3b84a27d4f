//! `adapter_config.json`.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::{CONFIG_NAME, bad_file, cut, refused};
use crate::config::unsupported;
use crate::{Bias, Error, Init, LoraConfig, Result, TargetModules, VeraConfig};

/// The largest configuration that is read.
pub(super) const CONFIG_LIMIT: usize = 4 << 20;

/// The version of PEFT whose fields are written.
const LORA_FIELDS: &str = r#"{
    "alora_invocation_tokens": null, "arrow_config": null, "auto_mapping": null,
    "base_model_name_or_path": null, "corda_config": null, "ensure_weight_tying": false,
    "eva_config": null, "inference_mode": true, "kasa_config": null, "layer_replication": null,
    "loftq_config": {}, "lora_ga_config": null, "megatron_config": null,
    "megatron_core": "megatron.core", "monteclora_config": null, "peft_version": null,
    "qalora_group_size": 16, "revision": null, "target_parameters": null, "task_type": null,
    "trainable_token_indices": null, "use_bdlora": null, "use_qalora": false, "velora_config": null
}"#;
const VERA_FIELDS: &str = r#"{
    "auto_mapping": null, "base_model_name_or_path": null, "bias": "none", "fan_in_fan_out": false,
    "inference_mode": true, "init_weights": true, "layers_pattern": null,
    "layers_to_transform": null, "modules_to_save": null, "peft_version": null, "revision": null,
    "save_projection": true, "task_type": null
}"#;

/// Keys that may be set, because they say nothing about the arithmetic.
///
/// `megatron_core` and `qalora_group_size` are always written and matter only beside
/// `megatron_config` and `use_qalora`. `eva_config` chose the first A and B. `merge_weights` of
/// PEFT 0.2 merged when training ended, which leaves the result as it is.
const HARMLESS: &[&str] = &[
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "inference_mode",
    "megatron_core",
    "merge_weights",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
];

/// Initialisations that change nothing but the first A and B, and that [`Init`] does not have.
const FOREIGN_INIT: &[&str] = &["eva", "mica"];

/// The method of an adapter, with its settings: PEFT's `peft_type`.
///
/// ```
/// use lora::{LoraConfig, peft::{AdapterConfig, AdapterKind}};
///
/// let config = AdapterConfig::from(LoraConfig::new(4, 8.0));
/// assert!(matches!(config.kind, AdapterKind::Lora(lora) if lora.r == 4));
/// ```
#[derive(Clone, Debug, PartialEq)]
pub enum AdapterKind {
    /// `"LORA"`, with DoRA and rsLoRA.
    Lora(LoraConfig),
    /// `"VERA"`.
    Vera(VeraConfig),
}

/// `adapter_config.json`: what this crate computes with, and everything else that the file holds.
///
/// Read as PEFT reads it: a missing key has PEFT's default, so files since PEFT 0.2 are read.
/// `target_modules` may be a list, a regular expression, `"all-linear"` or `null`;
/// `layers_to_transform` a number or a list; `init_lora_weights` `true`, `false` or a name;
/// `lora_alpha` whole or not.
///
/// Source: PEFT `config.py`, `tuners/lora/config.py` and `tuners/vera/config.py`.
///
/// ```
/// use lora::peft::{AdapterConfig, AdapterKind};
///
/// let json = br#"{"peft_type": "LORA", "r": 4, "lora_alpha": 16, "task_type": "CAUSAL_LM"}"#;
/// let config = AdapterConfig::from_json(json)?;
/// assert_eq!(config.lora().unwrap().scaling(), 4.0);
/// assert_eq!(config.other["task_type"], "CAUSAL_LM");
/// # Ok::<(), lora::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterConfig {
    /// The method and its settings.
    pub kind: AdapterKind,
    /// The other keys of the file, kept for writing: `base_model_name_or_path`, `task_type` and
    /// the like, unset options, and of a VeRA file also `bias`, `modules_to_save` and
    /// `layers_to_transform`.
    ///
    /// A key that is a field of [`kind`](Self::kind) has no effect here. One exception:
    /// `init_lora_weights` is here when it is `"eva"` or `"mica"`, and `kind` then says
    /// [`Init::Kaiming`].
    pub other: Map<String, Value>,
}

impl From<LoraConfig> for AdapterConfig {
    fn from(config: LoraConfig) -> Self {
        Self {
            kind: AdapterKind::Lora(config),
            other: Map::new(),
        }
    }
}

impl From<VeraConfig> for AdapterConfig {
    fn from(config: VeraConfig) -> Self {
        Self {
            kind: AdapterKind::Vera(config),
            other: Map::new(),
        }
    }
}

impl AdapterConfig {
    /// Reads the content of an `adapter_config.json`.
    ///
    /// # Errors
    ///
    /// [`Error::File`] when it is no JSON object of at most 4 MiB, when `peft_type` is missing or
    /// another method than LoRA and VeRA, or when a value has the wrong type or cannot be used;
    /// [`Error::Unsupported`] for an option of [`REFUSED`](super::REFUSED) and for an option
    /// that is set and not known. All name the key.
    ///
    /// ```
    /// use lora::peft::AdapterConfig;
    ///
    /// let read = |json: &str| AdapterConfig::from_json(json.as_bytes());
    /// let message = |json| read(json).unwrap_err().to_string();
    /// assert!(message(r#"{"peft_type": "LORA", "r": 0}"#).contains("r = 0"));
    /// assert!(message(r#"{"peft_type": "IA3"}"#).contains("IA3"));
    /// assert!(message(r#"{"peft_type": "LORA", "use_qalora": true}"#).contains("use_qalora"));
    /// ```
    pub fn from_json(json: &[u8]) -> Result<Self> {
        Self::parse(json, Path::new(CONFIG_NAME))
    }

    pub(super) fn parse(json: &[u8], path: &Path) -> Result<Self> {
        if json.len() > CONFIG_LIMIT {
            let why = format!("{} bytes; at most {CONFIG_LIMIT} are read", json.len());
            return Err(bad_file(path, why));
        }
        let map = match serde_json::from_slice(json) {
            Ok(Value::Object(map)) => map,
            Ok(_) => return Err(bad_file(path, "this is JSON, but not an object")),
            Err(error) => {
                return Err(bad_file(
                    path,
                    format!("not JSON: {}", cut(&error.to_string())),
                ));
            }
        };
        let mut fields = Fields {
            path: path.to_path_buf(),
            map,
        };
        let kind = match fields.text("peft_type")? {
            Some(name) if name == "LORA" => AdapterKind::Lora(fields.lora()?),
            Some(name) if name == "VERA" => AdapterKind::Vera(fields.vera()?),
            Some(name) => {
                let why = "only LORA and VERA adapters are read";
                return Err(unsupported(
                    &fields.named("peft_type", &Value::from(name)),
                    why,
                ));
            }
            None => return Err(bad_file(path, "no peft_type; a LoRA adapter says \"LORA\"")),
        };
        let config = Self {
            other: fields.rest(&kind)?,
            kind,
        };
        config
            .validate()
            .map_err(|error| bad_file(path, error.to_string()))?;
        Ok(config)
    }

    /// The content of `adapter_config.json`, with every key that PEFT 0.21 writes.
    ///
    /// The keys are sorted, as PEFT does. Inside `rank_pattern` and `alpha_pattern` the order
    /// stays as it is, because the first pattern that matches counts: PEFT sorts there too, and
    /// so patterns that overlap change their meaning when PEFT saves them.
    ///
    /// # Errors
    ///
    /// What [`LoraConfig::validate`] or [`VeraConfig::validate`] refuses, and what
    /// [`from_json`](Self::from_json) would not read back, such as a refused option in
    /// [`other`](Self::other).
    ///
    /// ```
    /// use lora::{LoraConfig, peft::AdapterConfig};
    ///
    /// let mut lora = LoraConfig::new(8, 16.0);
    /// lora.rank_pattern = vec![("q_proj".into(), 4), (r".*layers\.0\.q_proj".into(), 8)];
    /// let json = AdapterConfig::from(lora.clone()).to_json()?;
    /// assert!(json.contains("\"lora_alpha\": 16,"));
    /// assert_eq!(AdapterConfig::from_json(json.as_bytes())?.lora(), Some(&lora));
    /// # Ok::<(), lora::Error>(())
    /// ```
    pub fn to_json(&self) -> Result<String> {
        self.validate()?;
        let (mut map, own) = match &self.kind {
            AdapterKind::Lora(config) => (defaults(LORA_FIELDS)?, lora_fields(config, &self.other)),
            AdapterKind::Vera(config) => (defaults(VERA_FIELDS)?, vera_fields(config)),
        };
        map.extend(self.other.clone());
        map.extend(own.into_iter().map(|(key, value)| (key.to_string(), value)));
        map.sort_keys();
        let text = ascii(&serde_json::to_string_pretty(&map).map_err(unwritable)?);
        Self::from_json(text.as_bytes())?;
        Ok(text)
    }

    /// Says whether an adapter can be built from these settings.
    ///
    /// # Errors
    ///
    /// What [`LoraConfig::validate`] or [`VeraConfig::validate`] refuses.
    ///
    /// ```
    /// use lora::{LoraConfig, peft::AdapterConfig};
    ///
    /// assert!(AdapterConfig::from(LoraConfig::new(1, 1.0)).validate().is_ok());
    /// assert!(AdapterConfig::from(LoraConfig::new(0, 1.0)).validate().is_err());
    /// ```
    pub fn validate(&self) -> Result<()> {
        match &self.kind {
            AdapterKind::Lora(config) => config.validate(),
            AdapterKind::Vera(config) => config.validate(),
        }
    }

    /// The settings, if this is a LoRA adapter.
    ///
    /// ```
    /// use lora::{VeraConfig, peft::AdapterConfig};
    ///
    /// assert_eq!(AdapterConfig::from(VeraConfig::default()).lora(), None);
    /// ```
    #[must_use]
    pub fn lora(&self) -> Option<&LoraConfig> {
        match &self.kind {
            AdapterKind::Lora(config) => Some(config),
            AdapterKind::Vera(_) => None,
        }
    }

    /// The settings, if this is a VeRA adapter.
    ///
    /// ```
    /// use lora::{VeraConfig, peft::AdapterConfig};
    ///
    /// assert_eq!(AdapterConfig::from(VeraConfig::default()).vera().unwrap().r, 256);
    /// ```
    #[must_use]
    pub fn vera(&self) -> Option<&VeraConfig> {
        match &self.kind {
            AdapterKind::Lora(_) => None,
            AdapterKind::Vera(config) => Some(config),
        }
    }

    /// The names in `modules_to_save`, of either kind.
    pub(super) fn modules_to_save(&self) -> Vec<String> {
        match &self.kind {
            AdapterKind::Lora(config) => config.modules_to_save.clone(),
            AdapterKind::Vera(_) => match self.other.get("modules_to_save") {
                Some(Value::Array(names)) => names
                    .iter()
                    .filter_map(|name| name.as_str().map(str::to_string))
                    .collect(),
                _ => Vec::new(),
            },
        }
    }
}

/// The keys of a file that were not taken yet.
struct Fields {
    path: PathBuf,
    map: Map<String, Value>,
}

impl Fields {
    fn lora(&mut self) -> Result<LoraConfig> {
        let default = LoraConfig::default();
        let config = LoraConfig {
            r: self.count("r", default.r)?,
            lora_alpha: self.number("lora_alpha", default.lora_alpha)?,
            use_rslora: self.flag("use_rslora")?,
            init_lora_weights: self.init()?,
            lora_dropout: self.number("lora_dropout", default.lora_dropout)?,
            use_dora: self.flag("use_dora")?,
            lora_bias: self.flag("lora_bias")?,
            bias: match self.text("bias")?.as_deref() {
                None | Some("none") => Bias::None,
                Some("lora_only") => Bias::LoraOnly,
                Some("all") => Bias::All,
                Some(other) => {
                    let wants = "\"none\", \"lora_only\" or \"all\"";
                    return Err(self.wrong("bias", &Value::from(other), wants));
                }
            },
            target_modules: self.targets("target_modules")?,
            exclude_modules: self.targets("exclude_modules")?,
            layers_to_transform: self.layers()?,
            layers_pattern: self.names("layers_pattern", true)?,
            rank_pattern: self.pattern("rank_pattern", "a whole number of at least 1", whole)?,
            alpha_pattern: self.pattern("alpha_pattern", "a number", Value::as_f64)?,
            modules_to_save: self.names("modules_to_save", false)?,
            fan_in_fan_out: self.flag("fan_in_fan_out")?,
        };
        if let Some(why) = config.contradiction() {
            return Err(bad_file(&self.path, why));
        }
        Ok(config)
    }

    fn vera(&mut self) -> Result<VeraConfig> {
        let default = VeraConfig::default();
        // These stay in the map: they are kept, not computed with.
        let mut kept = Self {
            path: self.path.clone(),
            map: Map::new(),
        };
        for key in VERA_KEPT {
            if let Some(value) = self.map.get(*key) {
                kept.map.insert((*key).to_string(), value.clone());
            }
        }
        kept.flag("fan_in_fan_out")?;
        kept.flag("init_weights")?;
        kept.layers()?;
        kept.names("layers_pattern", true)?;
        kept.names("modules_to_save", false)?;
        if let Some(bias) = kept.text("bias")?
            && !["none", "all", "vera_only"].contains(&bias.as_str())
        {
            let wants = "\"none\", \"vera_only\" or \"all\"";
            return Err(self.wrong("bias", &Value::from(bias), wants));
        }
        if self.map.contains_key("save_projection") && !kept.flag("save_projection")? {
            return Err(self.refuse(
                "save_projection",
                &Value::Bool(false),
                "save_projection = false",
            ));
        }
        Ok(VeraConfig {
            r: self.count("r", default.r)?,
            d_initial: self.number("d_initial", default.d_initial)?,
            vera_dropout: self.number("vera_dropout", default.vera_dropout)?,
            target_modules: self.targets("target_modules")?,
            projection_prng_key: self.count("projection_prng_key", 0)? as u64,
        })
    }

    /// What is left, once it is sure that it may be left alone.
    fn rest(self, kind: &AdapterKind) -> Result<Map<String, Value>> {
        let mut other = Map::new();
        for (key, value) in &self.map {
            // PEFT never saves it, and ignores it in a file.
            if key == "runtime_config" {
                continue;
            }
            let known = HARMLESS.contains(&key.as_str())
                || match kind {
                    AdapterKind::Lora(_) => key == "init_lora_weights",
                    AdapterKind::Vera(_) => VERA_KEPT.contains(&key.as_str()),
                };
            if !known && is_set(value) {
                return Err(self.refuse(key, value, key));
            }
            other.insert(key.clone(), value.clone());
        }
        Ok(other)
    }

    /// The error for an option that is not built here.
    fn refuse(&self, key: &str, value: &Value, option: &str) -> Error {
        let unknown = "this option is not known and may change the arithmetic; \
                       if it does not, delete it from the file";
        unsupported(
            &self.named(key, value),
            refused::why(option).unwrap_or(unknown),
        )
    }

    fn named(&self, key: &str, value: &Value) -> String {
        format!(
            "{}: {} = {}",
            self.path.display(),
            cut(key),
            cut(&value.to_string())
        )
    }

    fn wrong(&self, key: &str, value: &Value, wants: &str) -> Error {
        bad_file(
            &self.path,
            format!("{key} = {} must be {wants}", cut(&value.to_string())),
        )
    }

    /// The value of `key`, which is then gone; `null` is as good as missing.
    fn take(&mut self, key: &str) -> Option<Value> {
        self.map.shift_remove(key).filter(|value| !value.is_null())
    }

    fn flag(&mut self, key: &str) -> Result<bool> {
        match self.take(key) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(flag),
            Some(value) => Err(self.wrong(key, &value, "true or false")),
        }
    }

    fn count(&mut self, key: &str, default: usize) -> Result<usize> {
        match self.take(key) {
            None => Ok(default),
            Some(value) => match whole(&value) {
                Some(count) => Ok(count),
                None => Err(self.wrong(key, &value, "a whole number")),
            },
        }
    }

    fn number(&mut self, key: &str, default: f64) -> Result<f64> {
        match self.take(key) {
            None => Ok(default),
            Some(value) => match value.as_f64() {
                Some(number) => Ok(number),
                None => Err(self.wrong(key, &value, "a number")),
            },
        }
    }

    fn text(&mut self, key: &str) -> Result<Option<String>> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(value) => Err(self.wrong(key, &value, "a text")),
        }
    }

    /// A list of names; with `one`, a single name may stand without its list.
    fn names(&mut self, key: &str, one: bool) -> Result<Vec<String>> {
        match self.take(key) {
            None => Ok(Vec::new()),
            Some(Value::String(name)) if one => {
                Ok(if name.is_empty() { vec![] } else { vec![name] })
            }
            Some(value) => self.list(key, value),
        }
    }

    fn list(&self, key: &str, value: Value) -> Result<Vec<String>> {
        let Value::Array(items) = value else {
            return Err(self.wrong(key, &value, "a list of names, or null"));
        };
        let name = |item| match item {
            Value::String(name) => Ok(name),
            other => Err(self.wrong(key, &other, "a name, as every item of this list")),
        };
        items.into_iter().map(name).collect()
    }

    fn targets(&mut self, key: &str) -> Result<Option<TargetModules>> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::String(text)) => {
                let all = key == "target_modules" && text.eq_ignore_ascii_case("all-linear");
                Ok(Some(if all {
                    TargetModules::AllLinear
                } else {
                    TargetModules::Regex(text)
                }))
            }
            Some(value) => Ok(Some(TargetModules::List(self.list(key, value)?))),
        }
    }

    fn layers(&mut self) -> Result<Option<Vec<usize>>> {
        let key = "layers_to_transform";
        let wants = "a layer's number, a list of them, or null";
        match self.take(key) {
            None => Ok(None),
            Some(Value::Array(items)) => {
                let number = |item| whole(item).ok_or_else(|| self.wrong(key, item, wants));
                items.iter().map(number).collect::<Result<_>>().map(Some)
            }
            Some(value) => match whole(&value) {
                Some(number) => Ok(Some(vec![number])),
                None => Err(self.wrong(key, &value, wants)),
            },
        }
    }

    fn pattern<T>(
        &mut self,
        key: &str,
        wants: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Vec<(String, T)>> {
        match self.take(key) {
            None => Ok(Vec::new()),
            Some(Value::Object(map)) => {
                let item = |(name, value): (String, Value)| match read(&value) {
                    Some(number) => Ok((name, number)),
                    None => Err(self.wrong(&format!("{key}: {:?}", cut(&name)), &value, wants)),
                };
                map.into_iter().map(item).collect()
            }
            Some(value) => Err(self.wrong(key, &value, "an object of patterns, or null")),
        }
    }

    fn init(&mut self) -> Result<Init> {
        let key = "init_lora_weights";
        let name = match self.take(key) {
            None | Some(Value::Bool(true)) => return Ok(Init::Kaiming),
            Some(Value::Bool(false)) => return Ok(Init::Random),
            Some(Value::String(name)) => name,
            Some(value) => return Err(self.wrong(key, &value, "true, false or a name")),
        };
        let lower = name.to_ascii_lowercase();
        let rounds = lower
            .strip_prefix("pissa_niter_")
            .and_then(|n| n.parse().ok());
        match (lower.as_str(), rounds) {
            ("gaussian", _) => Ok(Init::Gaussian),
            ("orthogonal", _) => Ok(Init::Orthogonal),
            ("pissa", _) => Ok(Init::Pissa),
            ("olora", _) => Ok(Init::Olora),
            (_, Some(rounds)) => Ok(Init::PissaNiter(rounds)),
            (foreign, _) if FOREIGN_INIT.contains(&foreign) => {
                self.map.insert(key.to_string(), Value::from(foreign));
                Ok(Init::Kaiming)
            }
            _ => Err(self.refuse(key, &Value::from(name), &format!("{key} = {lower:?}"))),
        }
    }
}

/// Keys of a VeRA file that are kept although they may be set.
const VERA_KEPT: &[&str] = &[
    "bias",
    "fan_in_fan_out",
    "init_weights",
    "layers_pattern",
    "layers_to_transform",
    "modules_to_save",
    "save_projection",
];

fn whole(value: &Value) -> Option<usize> {
    value.as_u64().and_then(|n| usize::try_from(n).ok())
}

/// What Python calls true.
fn is_set(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(flag) => *flag,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(map) => !map.is_empty(),
    }
}

fn defaults(fields: &str) -> Result<Map<String, Value>> {
    serde_json::from_str(fields).map_err(unwritable)
}

fn unwritable(error: serde_json::Error) -> Error {
    bad_file(Path::new(CONFIG_NAME), error.to_string())
}

fn lora_fields(config: &LoraConfig, other: &Map<String, Value>) -> Vec<(&'static str, Value)> {
    let ranks = config
        .rank_pattern
        .iter()
        .map(|(key, r)| (key.clone(), Value::from(*r)));
    let alphas = config
        .alpha_pattern
        .iter()
        .map(|(key, a)| (key.clone(), number(*a)));
    let init = match config.init_lora_weights {
        Init::Kaiming => match other.get("init_lora_weights") {
            Some(Value::String(name)) if FOREIGN_INIT.contains(&name.as_str()) => {
                Value::from(name.as_str())
            }
            _ => Value::Bool(true),
        },
        Init::Random => Value::Bool(false),
        Init::Gaussian => Value::from("gaussian"),
        Init::Orthogonal => Value::from("orthogonal"),
        Init::Pissa => Value::from("pissa"),
        Init::PissaNiter(rounds) => Value::from(format!("pissa_niter_{rounds}")),
        Init::Olora => Value::from("olora"),
    };
    let bias = match config.bias {
        Bias::None => "none",
        Bias::LoraOnly => "lora_only",
        Bias::All => "all",
    };
    vec![
        ("peft_type", Value::from("LORA")),
        ("r", Value::from(config.r)),
        ("lora_alpha", number(config.lora_alpha)),
        ("use_rslora", Value::from(config.use_rslora)),
        ("init_lora_weights", init),
        ("lora_dropout", Value::from(config.lora_dropout)),
        ("use_dora", Value::from(config.use_dora)),
        ("lora_bias", Value::from(config.lora_bias)),
        ("bias", Value::from(bias)),
        ("target_modules", targets(config.target_modules.as_ref())),
        ("exclude_modules", targets(config.exclude_modules.as_ref())),
        (
            "layers_to_transform",
            Value::from(config.layers_to_transform.clone()),
        ),
        ("layers_pattern", unless_empty(&config.layers_pattern)),
        ("rank_pattern", Value::Object(ranks.collect())),
        ("alpha_pattern", Value::Object(alphas.collect())),
        ("modules_to_save", unless_empty(&config.modules_to_save)),
        ("fan_in_fan_out", Value::from(config.fan_in_fan_out)),
    ]
}

fn vera_fields(config: &VeraConfig) -> Vec<(&'static str, Value)> {
    vec![
        ("peft_type", Value::from("VERA")),
        ("r", Value::from(config.r)),
        ("d_initial", Value::from(config.d_initial)),
        ("vera_dropout", Value::from(config.vera_dropout)),
        ("target_modules", targets(config.target_modules.as_ref())),
        (
            "projection_prng_key",
            Value::from(config.projection_prng_key),
        ),
    ]
}

/// PEFT's α is a whole number wherever it can be one.
fn number(x: f64) -> Value {
    const EXACT: f64 = 9_007_199_254_740_992.0;
    if x.fract() == 0.0 && x.abs() < EXACT {
        Value::from(x as i64)
    } else {
        Value::from(x)
    }
}

fn targets(modules: Option<&TargetModules>) -> Value {
    match modules {
        None => Value::Null,
        Some(TargetModules::List(names)) => Value::from(names.clone()),
        Some(TargetModules::Regex(pattern)) => Value::from(pattern.as_str()),
        Some(TargetModules::AllLinear) => Value::from("all-linear"),
    }
}

fn unless_empty(names: &[String]) -> Value {
    if names.is_empty() {
        Value::Null
    } else {
        Value::from(names)
    }
}

/// Writes every other character than ASCII as `\uXXXX`, as Python does: PEFT reads the file in
/// whatever encoding the system has.
fn ascii(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    for c in json.chars() {
        if c.is_ascii() {
            out.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                out.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lora(json: &str) -> LoraConfig {
        parsed(json).lora().unwrap().clone()
    }

    fn parsed(json: &str) -> AdapterConfig {
        AdapterConfig::from_json(with_type(json).as_bytes()).unwrap()
    }

    fn message(json: &str) -> String {
        AdapterConfig::from_json(with_type(json).as_bytes())
            .unwrap_err()
            .to_string()
    }

    fn with_type(json: &str) -> String {
        format!("{{\"peft_type\": \"LORA\", {json}}}")
    }

    #[test]
    fn missing_and_null_are_the_defaults() {
        assert_eq!(lora(r#""r": 8"#), LoraConfig::default());
        let all_null = r#""r": null, "lora_alpha": null, "target_modules": null, "bias": null,
            "init_lora_weights": null, "rank_pattern": null, "layers_pattern": null,
            "layers_to_transform": null, "use_dora": null, "modules_to_save": null"#;
        assert_eq!(lora(all_null), LoraConfig::default());
        let vera = AdapterConfig::from_json(br#"{"peft_type": "VERA"}"#).unwrap();
        assert_eq!(vera.vera(), Some(&VeraConfig::default()));
    }

    #[test]
    fn every_type_of_a_field() {
        let names =
            |list: &[&str]| TargetModules::List(list.iter().map(ToString::to_string).collect());
        for (json, want) in [
            (r#"["q", "v"]"#, Some(names(&["q", "v"]))),
            ("[]", Some(names(&[]))),
            (r#""q_proj""#, Some(TargetModules::regex("q_proj"))),
            (r#""all-linear""#, Some(TargetModules::AllLinear)),
            (r#""All-Linear""#, Some(TargetModules::AllLinear)),
            ("null", None),
        ] {
            let config = lora(&format!("\"target_modules\": {json}"));
            assert_eq!(config.target_modules, want, "{json}");
        }
        let exclude = lora(r#""exclude_modules": "all-linear""#).exclude_modules;
        assert_eq!(exclude, Some(TargetModules::regex("all-linear")));

        assert_eq!(
            lora(r#""layers_to_transform": 3"#).layers_to_transform,
            Some(vec![3])
        );
        assert_eq!(
            lora(r#""layers_to_transform": [0, 2]"#).layers_to_transform,
            Some(vec![0, 2])
        );
        let both = lora(r#""layers_to_transform": 0, "layers_pattern": "h""#);
        assert_eq!(both.layers_pattern, ["h"]);
        assert!(lora(r#""layers_pattern": """#).layers_pattern.is_empty());

        assert_eq!(lora(r#""lora_alpha": 2.5"#).lora_alpha, 2.5);
        assert_eq!(
            lora(r#""lora_alpha": 3, "alpha_pattern": {"a": 1.5}"#).alpha_pattern[0].1,
            1.5
        );

        for (json, want) in [
            ("true", Init::Kaiming),
            ("false", Init::Random),
            ("\"gaussian\"", Init::Gaussian),
            ("\"Gaussian\"", Init::Gaussian),
            ("\"pissa\"", Init::Pissa),
            ("\"pissa_niter_16\"", Init::PissaNiter(16)),
            ("\"olora\"", Init::Olora),
            ("\"orthogonal\"", Init::Orthogonal),
            ("\"eva\"", Init::Kaiming),
            ("\"mica\"", Init::Kaiming),
        ] {
            let config = parsed(&format!("\"init_lora_weights\": {json}"));
            assert_eq!(config.lora().unwrap().init_lora_weights, want, "{json}");
            let written: Value = serde_json::from_str(&config.to_json().unwrap()).unwrap();
            let text = json.to_lowercase();
            assert_eq!(written["init_lora_weights"].to_string(), text);
        }
        for (json, want) in [
            ("none", Bias::None),
            ("all", Bias::All),
            ("lora_only", Bias::LoraOnly),
        ] {
            assert_eq!(lora(&format!("\"bias\": \"{json}\"")).bias, want);
        }
    }

    #[test]
    fn wrong_values_are_named() {
        for (json, want) in [
            (r#""r": 0"#, "r = 0"),
            (r#""r": -1"#, "r = -1 must be a whole number"),
            (r#""r": 2.5"#, "r = 2.5"),
            (r#""r": "8""#, "r = \"8\""),
            (r#""r": 1e30"#, "r = 1e+30"),
            (r#""r": true"#, "r = true"),
            (r#""lora_alpha": 0"#, "lora_alpha = 0"),
            (r#""lora_alpha": "16""#, "lora_alpha = \"16\""),
            (r#""lora_dropout": 1.0"#, "dropout = 1"),
            (r#""bias": "some""#, "bias = \"some\""),
            (r#""use_dora": 1"#, "use_dora = 1 must be true or false"),
            (r#""target_modules": 7"#, "target_modules = 7"),
            (r#""target_modules": ["a", 1]"#, "target_modules = 1"),
            (r#""modules_to_save": "head""#, "modules_to_save = \"head\""),
            (
                r#""layers_to_transform": true"#,
                "layers_to_transform = true",
            ),
            (r#""layers_to_transform": [-1]"#, "layers_to_transform = -1"),
            (
                r#""layers_pattern": "h""#,
                "layers_pattern needs layers_to_transform",
            ),
            (
                r#""target_modules": "q", "layers_to_transform": 0"#,
                "need a list in target_modules",
            ),
            (
                r#""target_modules": "all-linear", "layers_to_transform": []"#,
                "need a list",
            ),
            (r#""rank_pattern": {"q": 0}"#, "r = 0"),
            (
                r#""rank_pattern": {"q": "4"}"#,
                "rank_pattern: \"q\" = \"4\"",
            ),
            (r#""rank_pattern": [4]"#, "rank_pattern = [4]"),
            (r#""alpha_pattern": {"q": -2}"#, "lora_alpha = -2"),
            (
                r#""lora_bias": true, "use_dora": true"#,
                "lora_bias with use_dora",
            ),
            (r#""init_lora_weights": 1"#, "init_lora_weights = 1"),
            (
                r#""init_lora_weights": "kasa""#,
                "init_lora_weights = \"kasa\"",
            ),
            (r#""init_lora_weights": "pissa_niter_x""#, "pissa_niter_x"),
            (r#""init_lora_weights": "loftq""#, "LoftQ quantises"),
            (r#""init_lora_weights": "corda""#, "CorDA takes"),
            (r#""init_lora_weights": "lora_ga""#, "LoRA-GA takes"),
            (
                r#""enable_lora": [true, false, true]"#,
                "enable_lora = [true,false,true]",
            ),
            (r#""future": "rotate""#, "future = \"rotate\""),
            (r#""future": 1"#, "not known and may change the arithmetic"),
        ] {
            let message = message(json);
            assert!(message.contains(want), "{json}: {message}");
            assert!(message.starts_with("adapter_config.json: "), "{message}");
        }
    }

    #[test]
    fn not_an_object() {
        for json in [
            "",
            "[]",
            "7",
            "{",
            "{\"peft_type\": \"LORA\"",
            "nonsense",
            "\u{feff}{}",
            "{} {}",
        ] {
            assert!(
                AdapterConfig::from_json(json.as_bytes()).is_err(),
                "{json:?}"
            );
        }
        assert!(AdapterConfig::from_json(&[0xff, 0xfe]).is_err());
        let deep = "[".repeat(100_000);
        assert!(AdapterConfig::from_json(deep.as_bytes()).is_err());
        let large = " ".repeat(CONFIG_LIMIT + 1);
        let message = AdapterConfig::from_json(large.as_bytes())
            .unwrap_err()
            .to_string();
        assert!(message.contains("at most 4194304"), "{message}");
        let nan = AdapterConfig::from_json(br#"{"peft_type": "LORA", "lora_alpha": NaN}"#);
        assert!(nan.unwrap_err().to_string().contains("not JSON"));
        assert!(
            AdapterConfig::from_json(b"{}")
                .unwrap_err()
                .to_string()
                .contains("no peft_type")
        );
    }

    #[test]
    fn unset_and_informational_keys_are_kept() {
        let json = r#""task_type": "CAUSAL_LM", "base_model_name_or_path": "org/base",
            "megatron_core": "megatron.core", "qalora_group_size": 16, "merge_weights": true,
            "eva_config": {"rho": 2.0}, "auto_mapping": {"a": "b"}, "enable_lora": null,
            "future": null, "other": false, "third": {}, "fourth": [], "fifth": "", "sixth": 0,
            "runtime_config": {"ephemeral_gpu_offload": true}"#;
        let config = parsed(json);
        assert_eq!(config.lora(), Some(&LoraConfig::default()));
        let want: Value = serde_json::from_str(&with_type(json)).unwrap();
        let written: Value = serde_json::from_str(&config.to_json().unwrap()).unwrap();
        for (key, value) in want.as_object().unwrap() {
            if key == "runtime_config" {
                assert!(written.get(key).is_none());
            } else {
                assert_eq!(&written[key], value, "{key}");
            }
        }
        assert_eq!(
            parsed(json),
            AdapterConfig::from_json(config.to_json().unwrap().as_bytes())
                .map(|mut read| {
                    read.other.retain(|key, _| config.other.contains_key(key));
                    read
                })
                .unwrap()
        );
    }

    #[test]
    fn every_option_of_peft_is_known() {
        for key in defaults(LORA_FIELDS).unwrap().keys() {
            let harmless = HARMLESS.contains(&key.as_str());
            assert!(harmless != refused::why(key).is_some(), "{key}");
        }
        for key in defaults(VERA_FIELDS).unwrap().keys() {
            let key = key.as_str();
            assert!(HARMLESS.contains(&key) != VERA_KEPT.contains(&key), "{key}");
        }
    }

    #[test]
    fn vera_fields_are_kept() {
        let json = r#"{"peft_type": "VERA", "r": 3, "bias": "vera_only", "fan_in_fan_out": true,
            "modules_to_save": ["head"], "layers_to_transform": [1], "projection_prng_key": 17,
            "target_modules": ["q"], "init_weights": false, "save_projection": true}"#;
        let config = AdapterConfig::from_json(json.as_bytes()).unwrap();
        assert_eq!(config.vera().unwrap().projection_prng_key, 17);
        assert_eq!(config.modules_to_save(), ["head"]);
        let written: Value = serde_json::from_str(&config.to_json().unwrap()).unwrap();
        let want: Value = serde_json::from_str(json).unwrap();
        for (key, value) in want.as_object().unwrap() {
            assert_eq!(&written[key], value, "{key}");
        }
        for (json, want) in [
            (r#""save_projection": false"#, "save_projection = false"),
            (r#""bias": "lora_only""#, "bias = \"lora_only\""),
            (r#""lora_alpha": 8"#, "lora_alpha = 8"),
            (r#""d_initial": "x""#, "d_initial = \"x\""),
            (r#""vera_dropout": 2"#, "dropout = 2"),
            (r#""modules_to_save": 1"#, "modules_to_save = 1"),
        ] {
            let json = format!("{{\"peft_type\": \"VERA\", {json}}}");
            let message = AdapterConfig::from_json(json.as_bytes())
                .unwrap_err()
                .to_string();
            assert!(message.contains(want), "{message}");
        }
    }

    #[test]
    fn what_is_written_can_be_read() {
        let mut config = AdapterConfig::from(LoraConfig::default());
        config.other.insert("use_qalora".into(), Value::Bool(true));
        assert!(
            config
                .to_json()
                .unwrap_err()
                .to_string()
                .contains("use_qalora")
        );

        let mut config = AdapterConfig::from(LoraConfig::default());
        config.other.insert("note".into(), Value::from(""));
        config
            .other
            .insert("revision".into(), Value::from("größe 𝄞"));
        config.other.insert("r".into(), Value::from(99));
        config
            .other
            .insert("init_lora_weights".into(), Value::from("loftq"));
        let json = config.to_json().unwrap();
        assert!(
            json.is_ascii() && json.contains(r"gr\u00f6\u00dfe \ud834\udd1e"),
            "{json}"
        );
        let back = AdapterConfig::from_json(json.as_bytes()).unwrap();
        assert_eq!(back.other["revision"], "größe 𝄞");
        assert_eq!(back.lora(), config.lora());
        assert!(
            AdapterConfig::from(LoraConfig::new(0, 1.0))
                .to_json()
                .is_err()
        );
        assert!(
            AdapterConfig::from(LoraConfig::new(1, f64::INFINITY))
                .to_json()
                .is_err()
        );
    }
}
