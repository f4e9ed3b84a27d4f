//! Which layers get an adapter: PEFT's `target_modules` and the rules around it.

use std::fmt;

use fancy_regex::Regex;

use crate::{Error, LoraConfig, Result};

/// Names of layers: PEFT's `target_modules` and `exclude_modules`.
///
/// ```
/// use lora::TargetModules;
///
/// let list = TargetModules::from(["q_proj", "layers.0.v_proj"]);
/// assert!(list.matches("model.layers.3.q_proj")?);
/// assert!(list.matches("layers.0.v_proj")? && !list.matches("layers.1.v_proj")?);
/// assert!(!list.matches("model.layers.3.my_q_proj")?);
///
/// let regex = TargetModules::regex(r".*\.[qv]_proj");
/// assert!(regex.matches("model.layers.3.v_proj")?);
/// assert!(!regex.matches("model.layers.3.v_proj.base")?);
/// # Ok::<(), lora::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetModules {
    /// Paths, or ends of paths that start after a dot.
    List(Vec<String>),
    /// A regular expression that must match the whole path.
    Regex(String),
    /// Every linear layer but the output head: PEFT's `"all-linear"`.
    AllLinear,
}

impl TargetModules {
    /// A regular expression that must match a layer's whole path.
    ///
    /// ```
    /// assert!(lora::TargetModules::regex("layers\\.[01]\\.q").matches("layers.1.q").unwrap());
    /// ```
    #[must_use]
    pub fn regex(pattern: impl Into<String>) -> Self {
        Self::Regex(pattern.into())
    }

    /// Whether `path` is named. [`AllLinear`](Self::AllLinear) names every path: what kind of
    /// layer lies there is the model's knowledge.
    ///
    /// # Errors
    ///
    /// [`Error::Pattern`] when the regular expression cannot be used.
    ///
    /// Source: PEFT `tuners/tuners_utils.py`, `check_target_module_exists`.
    ///
    /// ```
    /// assert!(lora::TargetModules::from("q_proj").matches("layers.0.q_proj").unwrap());
    /// ```
    pub fn matches(&self, path: &str) -> Result<bool> {
        match self {
            Self::List(names) => Ok(names.iter().any(|name| ends_with(path, name))),
            Self::Regex(pattern) => Pattern::whole("target_modules", pattern)?.matches(path),
            Self::AllLinear => Ok(true),
        }
    }
}

impl fmt::Display for TargetModules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::List(names) => write!(f, "{names:?}"),
            Self::Regex(pattern) => write!(f, "{pattern:?}"),
            Self::AllLinear => write!(f, "\"all-linear\""),
        }
    }
}

impl From<&str> for TargetModules {
    /// One name; `"all-linear"` in any case is [`TargetModules::AllLinear`].
    fn from(name: &str) -> Self {
        if name.eq_ignore_ascii_case("all-linear") {
            Self::AllLinear
        } else {
            Self::List(vec![name.to_string()])
        }
    }
}

impl<const N: usize> From<[&str; N]> for TargetModules {
    fn from(names: [&str; N]) -> Self {
        Self::List(names.iter().map(ToString::to_string).collect())
    }
}

impl From<Vec<String>> for TargetModules {
    fn from(names: Vec<String>) -> Self {
        Self::List(names)
    }
}

/// Whether `path` is `name` or ends with a dot and `name`.
pub(crate) fn ends_with(path: &str, name: &str) -> bool {
    match path.strip_suffix(name) {
        Some(head) => !name.is_empty() && (head.is_empty() || head.ends_with('.')),
        None => false,
    }
}

/// A regular expression as Python's `re` reads it.
pub(crate) struct Pattern {
    field: &'static str,
    regex: Regex,
}

impl Pattern {
    /// As `re.fullmatch(pattern, path)`.
    pub(crate) fn whole(field: &'static str, pattern: &str) -> Result<Self> {
        Self::new(field, pattern, &format!(r"\A(?:{pattern})\z"))
    }

    /// As `re.match(rf"(.*\.)?({pattern})$", path)`.
    pub(crate) fn ending(field: &'static str, pattern: &str) -> Result<Self> {
        Self::new(field, pattern, &format!(r"\A(?:.*\.)?(?:{pattern})\z"))
    }

    /// As `re.match(rf"(^|.*\.){pattern}($|\..*)", path)`.
    fn within(field: &'static str, pattern: &str) -> Result<Self> {
        Self::new(
            field,
            pattern,
            &format!(r"\A(?:.*\.)?(?:{pattern})(?:\z|\..*)"),
        )
    }

    fn new(field: &'static str, pattern: &str, full: &str) -> Result<Self> {
        let refused = |error: fancy_regex::Error| Error::Pattern {
            field,
            pattern: pattern.to_string(),
            why: error.to_string(),
        };
        // Alone first: a stray parenthesis must not close the group around it.
        Regex::new(pattern).map_err(refused)?;
        Ok(Self {
            field,
            regex: Regex::new(full).map_err(refused)?,
        })
    }

    pub(crate) fn matches(&self, path: &str) -> Result<bool> {
        self.regex.is_match(path).map_err(|error| Error::Pattern {
            field: self.field,
            pattern: self.regex.as_str().to_string(),
            why: error.to_string(),
        })
    }
}

/// What a model knows of a layer when targets are chosen.
pub struct Candidate<'a> {
    pub path: &'a str,
    pub linear: bool,
    pub embedding: bool,
    pub groups: usize,
    pub output_head: bool,
}

/// Whether `config` gives the layer an adapter.
///
/// As PEFT does, a path written out in full skips `layers_to_transform`.
pub(crate) fn targeted(config: &LoraConfig, layer: &Candidate<'_>) -> Result<bool> {
    let Some(targets) = &config.target_modules else {
        return Ok(false);
    };
    if let Some(exclude) = &config.exclude_modules
        && exclude.matches(layer.path)?
    {
        return Ok(false);
    }
    if saved_whole(config, layer.path)? {
        return Ok(false);
    }
    let by_name =
        matches!(targets, TargetModules::List(names) if !names.iter().any(|n| n == layer.path));
    let by_kind =
        !matches!(targets, TargetModules::AllLinear) || (layer.linear && !layer.output_head);
    Ok(by_kind && targets.matches(layer.path)? && (!by_name || in_range(config, layer.path)?))
}

/// Whether `modules_to_save` names the layer or a module around it.
pub(crate) fn saved_whole(config: &LoraConfig, path: &str) -> Result<bool> {
    for name in &config.modules_to_save {
        if Pattern::within("modules_to_save", name)?.matches(path)? {
            return Ok(true);
        }
    }
    Ok(false)
}

fn in_range(config: &LoraConfig, path: &str) -> Result<bool> {
    let Some(wanted) = config
        .layers_to_transform
        .as_ref()
        .filter(|w| !w.is_empty())
    else {
        return Ok(true);
    };
    let parts: Vec<&str> = path.split('.').collect();
    // A number with a part after it; the first one counts.
    let numbers: Vec<(usize, usize)> = (1..parts.len().saturating_sub(1))
        .filter_map(|i| Some((i, parts[i].parse().ok()?)))
        .collect();
    if config.layers_pattern.is_empty() {
        // As PEFT, only a number with two parts before it.
        let first = numbers.iter().find(|(i, _)| *i >= 2);
        return Ok(first.is_some_and(|(_, index)| wanted.contains(index)));
    }
    for name in &config.layers_pattern {
        let pattern = Pattern::ending("layers_pattern", name)?;
        for (i, index) in &numbers {
            if pattern.matches(&parts[..*i].join("."))? {
                return Ok(wanted.contains(index));
            }
        }
    }
    Ok(false)
}

/// The paths most like one of `wanted`, for an error message.
pub(crate) fn nearest(targets: &TargetModules, paths: &[&str]) -> String {
    if paths.is_empty() {
        return "the model holds no layer that could take an adapter".to_string();
    }
    let wanted: Vec<&str> = match targets {
        TargetModules::List(names) => names.iter().map(String::as_str).collect(),
        TargetModules::Regex(pattern) => vec![pattern],
        TargetModules::AllLinear => vec![],
    };
    let last = |path: &str| path.rsplit('.').next().unwrap_or(path).to_string();
    let mut ranked: Vec<(usize, &str)> = paths
        .iter()
        .map(|path| {
            let near = |name: &&str| strsim::levenshtein(&last(name), &last(path));
            (wanted.iter().map(near).min().unwrap_or(0), *path)
        })
        .collect();
    ranked.sort();
    let names: Vec<String> = ranked
        .iter()
        .take(5)
        .map(|(_, p)| format!("{p:?}"))
        .collect();
    format!(
        "the nearest of {} layers: {}",
        paths.len(),
        names.join(", ")
    )
}
