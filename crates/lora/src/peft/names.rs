//! The names of tensors in adapter files.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::{bad_file, shown};
use crate::Result;

const PREFIX: &str = "base_model.model.";
const LONGEST: usize = 4096;

/// What a tensor of an adapter file is to its layer.
///
/// ```
/// use lora::peft::{Part, TensorName};
///
/// let name = TensorName::parse("base_model.model.layers.0.q_proj.lora_B.bias").unwrap();
/// assert_eq!(name.part, Part::LoraBBias);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Part {
    /// A of a linear layer (r, in) or a convolution (r, in, kernel…): `lora_A.weight`.
    LoraA,
    /// B of a linear layer (out, r) or a convolution (out, r, 1…): `lora_B.weight`.
    LoraB,
    /// The bias of B (out): `lora_B.bias`.
    LoraBBias,
    /// A of an embedding (r, vocabulary): `lora_embedding_A`.
    EmbeddingA,
    /// B of an embedding (dim, r): `lora_embedding_B`.
    EmbeddingB,
    /// DoRA's magnitude, one number for each output: `lora_magnitude_vector`.
    Magnitude,
    /// The weight of a layer that has an adapter: `base_layer.weight`.
    BaseWeight,
    /// The bias of a layer that has an adapter: `base_layer.bias`.
    BaseBias,
    /// The weight of a layer without adapter: `weight`. PEFT saves it for `modules_to_save` and
    /// for an embedding that was resized.
    Weight,
    /// The bias of a layer: `bias`. PEFT saves it for `modules_to_save`, for `bias="all"`, and up
    /// to version 0.6 also for a layer that has an adapter.
    Bias,
    /// VeRA's λ_b (out): `vera_lambda_b`.
    VeraLambdaB,
    /// VeRA's λ_d (r): `vera_lambda_d`.
    VeraLambdaD,
    /// VeRA's shared A (r, largest in): `base_model.vera_A`, of no layer.
    VeraA,
    /// VeRA's shared B (largest out, r): `base_model.vera_B`, of no layer.
    VeraB,
}

impl Part {
    /// What follows the layer's path in the name that PEFT writes.
    const fn suffix(self) -> &'static str {
        match self {
            Self::LoraA => "lora_A.weight",
            Self::LoraB => "lora_B.weight",
            Self::LoraBBias => "lora_B.bias",
            Self::EmbeddingA => "lora_embedding_A",
            Self::EmbeddingB => "lora_embedding_B",
            Self::Magnitude => "lora_magnitude_vector",
            Self::BaseWeight => "base_layer.weight",
            Self::BaseBias => "base_layer.bias",
            Self::Weight => "weight",
            Self::Bias => "bias",
            Self::VeraLambdaB => "vera_lambda_b",
            Self::VeraLambdaD => "vera_lambda_d",
            Self::VeraA => "vera_A",
            Self::VeraB => "vera_B",
        }
    }

    /// Whether the tensor makes its layer one with an adapter.
    const fn adapts(self) -> bool {
        matches!(
            self,
            Self::LoraA
                | Self::LoraB
                | Self::LoraBBias
                | Self::EmbeddingA
                | Self::EmbeddingB
                | Self::Magnitude
                | Self::VeraLambdaB
                | Self::VeraLambdaD
        )
    }

    /// The parts that PEFT keeps as parameters of their own, without `.weight`.
    fn bare(tag: &str) -> Option<Self> {
        match tag {
            "lora_embedding_A" => Some(Self::EmbeddingA),
            "lora_embedding_B" => Some(Self::EmbeddingB),
            "lora_magnitude_vector" => Some(Self::Magnitude),
            "vera_lambda_b" => Some(Self::VeraLambdaB),
            "vera_lambda_d" => Some(Self::VeraLambdaD),
            _ => None,
        }
    }
}

/// The name of a tensor, taken apart.
///
/// | in the file | read as |
/// |---|---|
/// | `base_model.model.x.lora_A.weight` | A of layer `x` |
/// | `base_model.model.x.lora_A.default.weight`, any adapter name | the same |
/// | `x.lora_A.weight`, without the prefix | the same |
/// | `x.lora_magnitude_vector`, `….weight`, `….default`, `….default.weight` | DoRA's m |
/// | `x.base_layer.bias` | the bias of `x`, which has an adapter |
/// | `x.modules_to_save.default.weight` | the whole weight of `x` |
/// | `x.weight`, `x.bias` | the whole weight or bias of `x` |
/// | `base_model.vera_A`, `base_model.vera_A.default` | VeRA's shared A |
///
/// A name is read from its end, part by part, so that layers may have `weight`, `lora_A` or an
/// adapter's name inside their own names (huggingface/peft#2772).
///
/// Source: PEFT `utils/save_and_load.py`, `tuners/tuners_utils.py` and `tuners/lora/model.py`.
///
/// ```
/// use lora::peft::{Part, TensorName};
///
/// let name = TensorName::parse("layers.0.weighted.lora_A.fr.weight").unwrap();
/// assert_eq!((name.path.as_str(), name.part), ("layers.0.weighted", Part::LoraA));
/// assert_eq!(name.adapter.as_deref(), Some("fr"));
/// assert_eq!(name.key(), "base_model.model.layers.0.weighted.lora_A.weight");
/// ```
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TensorName {
    /// The layer's dotted path in the model; empty for VeRA's shared matrices.
    pub path: String,
    /// What the tensor is to that layer.
    pub part: Part,
    /// The adapter's name, where the tensor's name holds one. PEFT leaves it out when it saves.
    pub adapter: Option<String>,
}

impl TensorName {
    /// Takes a name apart; `None` when it is no name that is understood.
    ///
    /// ```
    /// use lora::peft::TensorName;
    ///
    /// assert!(TensorName::parse("base_model.model.x.lora_B.weight").is_some());
    /// assert!(TensorName::parse("base_model.model.x.lora_diag").is_none());
    /// assert!(TensorName::parse("x.token_adapter.trainable_tokens_delta").is_none());
    /// ```
    #[must_use]
    pub fn parse(key: &str) -> Option<Self> {
        if key.len() > LONGEST || key.chars().any(|c| c.is_whitespace() || c.is_control()) {
            return None;
        }
        if let Some(shared) = Self::shared(key.strip_prefix("base_model.").unwrap_or(key)) {
            return Some(shared);
        }
        let parts: Vec<&str> = key.strip_prefix(PREFIX).unwrap_or(key).split('.').collect();
        if parts.iter().any(|part| part.is_empty()) {
            return None;
        }
        match parts.as_slice() {
            [
                path @ ..,
                tag @ ("lora_A" | "lora_B"),
                leaf @ ("weight" | "bias"),
            ] => Self::new(path, low_rank(tag, leaf)?, None),
            [
                path @ ..,
                tag @ ("lora_A" | "lora_B"),
                name,
                leaf @ ("weight" | "bias"),
            ] => Self::new(path, low_rank(tag, leaf)?, Some(name)),
            [path @ .., tag] | [path @ .., tag, "weight"] if Part::bare(tag).is_some() => {
                Self::new(path, Part::bare(tag)?, None)
            }
            [path @ .., tag, name] | [path @ .., tag, name, "weight"]
                if Part::bare(tag).is_some() =>
            {
                Self::new(path, Part::bare(tag)?, Some(name))
            }
            [path @ .., "base_layer", "weight"] => Self::new(path, Part::BaseWeight, None),
            [path @ .., "base_layer", "bias"] => Self::new(path, Part::BaseBias, None),
            [path @ .., "weight"] => Self::whole(path, Part::Weight),
            [path @ .., "bias"] => Self::whole(path, Part::Bias),
            _ => None,
        }
    }

    /// The name under which PEFT saves the tensor.
    ///
    /// ```
    /// use lora::peft::TensorName;
    ///
    /// let name = TensorName::parse("x.lora_magnitude_vector.default.weight").unwrap();
    /// assert_eq!(name.key(), "base_model.model.x.lora_magnitude_vector");
    /// ```
    #[must_use]
    pub fn key(&self) -> String {
        let suffix = self.part.suffix();
        match self.part {
            Part::VeraA | Part::VeraB => format!("base_model.{suffix}"),
            _ => format!("{PREFIX}{}.{suffix}", self.path),
        }
    }

    fn new(path: &[&str], part: Part, adapter: Option<&str>) -> Option<Self> {
        if path.is_empty() {
            return None;
        }
        Some(Self {
            path: path.join("."),
            part,
            adapter: adapter.map(str::to_string),
        })
    }

    fn shared(key: &str) -> Option<Self> {
        let (tag, adapter) = match key.split_once('.') {
            Some((tag, name)) => (tag, Some(name)),
            None => (key, None),
        };
        let part = match tag {
            "vera_A" => Part::VeraA,
            "vera_B" => Part::VeraB,
            _ => return None,
        };
        if adapter.is_some_and(|name| name.is_empty() || name.contains('.')) {
            return None;
        }
        Some(Self {
            path: String::new(),
            part,
            adapter: adapter.map(str::to_string),
        })
    }

    /// A parameter saved whole; `modules_to_save.<adapter>` may stand inside the path.
    fn whole(path: &[&str], part: Part) -> Option<Self> {
        let is_peft = |part: &&str| {
            ["lora_", "vera_"]
                .iter()
                .any(|start| part.starts_with(start))
                || ["token_adapter", "original_module"].contains(part)
        };
        if path.last().is_none_or(is_peft) {
            return None;
        }
        match path.iter().position(|part| *part == "modules_to_save") {
            None => Self::new(path, part, None),
            Some(0) => None,
            Some(at) => {
                let rest = path.get(at + 2..).unwrap_or_default();
                Self::new(
                    &[path.get(..at)?, rest].concat(),
                    part,
                    path.get(at + 1).copied(),
                )
            }
        }
    }
}

fn low_rank(tag: &str, leaf: &str) -> Option<Part> {
    match (tag, leaf) {
        ("lora_A", "weight") => Some(Part::LoraA),
        ("lora_B", "weight") => Some(Part::LoraB),
        ("lora_B", "bias") => Some(Part::LoraBBias),
        _ => None,
    }
}

/// The names of one adapter: what each is saved as, with the name given.
pub(super) fn canonical<'a>(
    keys: impl IntoIterator<Item = &'a str>,
    file: &Path,
) -> Result<BTreeMap<String, (TensorName, &'a str)>> {
    let mut names = Vec::new();
    let mut unknown = BTreeSet::new();
    for key in keys {
        match TensorName::parse(key) {
            Some(name) => names.push((name, key)),
            None => {
                unknown.insert(key);
            }
        }
    }
    if !unknown.is_empty() {
        return Err(bad_file(
            file,
            format!(
                "{} of {} tensor names are not understood: {}; the file may belong to a variant \
                 that is not supported, or to another program",
                unknown.len(),
                unknown.len() + names.len(),
                shown(unknown.iter().copied()),
            ),
        ));
    }
    let adapters: BTreeSet<&str> = names
        .iter()
        .filter_map(|(n, _)| n.adapter.as_deref())
        .collect();
    if adapters.len() > 1 {
        return Err(bad_file(
            file,
            format!(
                "tensors of {} adapters in one file: {}; save each adapter in a folder of its own",
                adapters.len(),
                shown(adapters.iter().copied()),
            ),
        ));
    }
    let adapted: BTreeSet<String> = names
        .iter()
        .filter(|(n, _)| n.part.adapts())
        .map(|(n, _)| n.path.clone())
        .collect();
    let mut out: BTreeMap<String, (TensorName, &str)> = BTreeMap::new();
    for (mut name, key) in names {
        if adapted.contains(&name.path) {
            name.part = match name.part {
                Part::Weight => Part::BaseWeight,
                Part::Bias => Part::BaseBias,
                part => part,
            };
        }
        let as_saved = name.key();
        if let Some((_, other)) = out.get(&as_saved) {
            return Err(bad_file(
                file,
                format!(
                    "two tensors for one parameter: {} both stand for {as_saved:?}; keep one",
                    shown([*other, key])
                ),
            ));
        }
        out.insert(as_saved, (name, key));
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_is_read() {
        use Part::*;
        let long = "base_model.model.m.layers.0.q_proj";
        let bare = "m.layers.0.q_proj";
        for prefix in [long, bare] {
            for (end, part, adapter) in [
                ("lora_A.weight", LoraA, None),
                ("lora_A.default.weight", LoraA, Some("default")),
                ("lora_A.weight.weight", LoraA, Some("weight")),
                ("lora_B.fr.weight", LoraB, Some("fr")),
                ("lora_B.bias", LoraBBias, None),
                ("lora_B.default.bias", LoraBBias, Some("default")),
                ("lora_embedding_A", EmbeddingA, None),
                ("lora_embedding_A.fr", EmbeddingA, Some("fr")),
                ("lora_embedding_B.weight", EmbeddingB, None),
                ("lora_magnitude_vector", Magnitude, None),
                ("lora_magnitude_vector.weight", Magnitude, None),
                ("lora_magnitude_vector.default", Magnitude, Some("default")),
                (
                    "lora_magnitude_vector.default.weight",
                    Magnitude,
                    Some("default"),
                ),
                ("base_layer.weight", BaseWeight, None),
                ("base_layer.bias", BaseBias, None),
                ("weight", Weight, None),
                ("bias", Bias, None),
                ("modules_to_save.default.weight", Weight, Some("default")),
                ("modules_to_save.bias", Bias, None),
                ("vera_lambda_b", VeraLambdaB, None),
                ("vera_lambda_d.default", VeraLambdaD, Some("default")),
            ] {
                let name = TensorName::parse(&format!("{prefix}.{end}"));
                let want = TensorName {
                    path: bare.into(),
                    part,
                    adapter: adapter.map(Into::into),
                };
                assert_eq!(name, Some(want), "{prefix}.{end}");
            }
        }
    }

    #[test]
    fn layers_may_be_called_anything() {
        for path in [
            "weight",
            "a.weight.b",
            "msa_pair_weighted_averaging.linear_no_bias",
            "lora_A",
            "default.default",
            "base_model.model.x",
            "base_layer.out_proj",
            "naïve.層",
        ] {
            for part in [Part::LoraA, Part::LoraB, Part::LoraBBias, Part::Magnitude] {
                let name = TensorName {
                    path: path.into(),
                    part,
                    adapter: None,
                };
                assert_eq!(TensorName::parse(&name.key()), Some(name));
            }
        }
    }

    #[test]
    fn inner_parts_of_a_saved_module() {
        let name = TensorName::parse("classifier.modules_to_save.default.dense.weight").unwrap();
        assert_eq!(name.key(), "base_model.model.classifier.dense.weight");
        assert_eq!(name.adapter.as_deref(), Some("default"));
    }

    #[test]
    fn what_is_not_understood() {
        for key in [
            "",
            ".",
            "weight",
            "lora_A.weight",
            "base_model.model.lora_A.weight",
            "base_model.model.weight",
            "x..lora_A.weight",
            "x.lora_A.weight.",
            ".x.lora_A.weight",
            "x y.lora_A.weight",
            "x\n.lora_A.weight",
            "x.lora_A.bias",
            "x.lora_A",
            "x.lora_diag",
            "x.lora_diag.default",
            "x.lora_diag.weight",
            "x.lora_E",
            "x.lora_velora_embed.default",
            "x.original_module.weight",
            "x.token_adapter.trainable_tokens_delta",
            "x.running_mean",
            "prompt_embeddings",
            "base_model.vera_A.a.b",
            "base_model.vera_A.",
            "lora_unet_down_blocks_0.lora_down.weight",
            "modules_to_save.default.weight",
        ] {
            assert_eq!(TensorName::parse(key), None, "{key:?}");
        }
        assert_eq!(
            TensorName::parse(&format!("{}.lora_A.weight", "x".repeat(5000))),
            None
        );
    }

    #[test]
    fn old_bias_names_move_only_where_an_adapter_is() {
        let keys = ["a.lora_A.weight", "a.bias", "b.bias", "a.weight"];
        let names = canonical(keys, Path::new("f")).unwrap();
        let saved: Vec<&str> = names.keys().map(String::as_str).collect();
        assert_eq!(
            saved,
            [
                "base_model.model.a.base_layer.bias",
                "base_model.model.a.base_layer.weight",
                "base_model.model.a.lora_A.weight",
                "base_model.model.b.bias",
            ]
        );
    }

    #[test]
    fn collisions_are_refused() {
        let refused = |keys: &[&str], want: &str| {
            let message = canonical(keys.iter().copied(), Path::new("f"))
                .unwrap_err()
                .to_string();
            assert!(
                message.starts_with("f: ") && message.contains(want),
                "{message}"
            );
        };
        refused(
            &["a.lora_A.weight", "base_model.model.a.lora_A.weight"],
            "two tensors for one",
        );
        refused(
            &["a.lora_A.x.weight", "a.lora_A.weight"],
            "two tensors for one",
        );
        refused(
            &["a.lora_A.weight", "a.bias", "a.base_layer.bias"],
            "two tensors for one",
        );
        refused(
            &["a.lora_A.x.weight", "b.lora_A.y.weight"],
            "2 adapters in one file: \"x\", \"y\"",
        );
        refused(
            &["a.lora_A.weight", "a.lora_diag"],
            "1 of 2 tensor names are not understood",
        );
    }
}
