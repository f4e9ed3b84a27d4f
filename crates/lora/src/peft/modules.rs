//! The tensors of a folder, layer by layer, and whether they fit each other and the
//! configuration.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Tensor};

use super::names::{self, Part};
use super::{AdapterConfig, AdapterFiles, AdapterKind, WEIGHTS_NAME, bad_file};
use crate::targets::{Pattern, saved_whole};
use crate::{LoraConfig, Result};

/// What an adapter folder holds for one layer.
///
/// ```
/// let empty = lora::peft::ModuleTensors::default();
/// assert!(!empty.has_adapter());
/// ```
#[derive(Clone, Debug, Default)]
pub struct ModuleTensors {
    /// A: (r, in), or (r, in, kernel…) of a convolution.
    pub lora_a: Option<Tensor>,
    /// B: (out, r), or (out, r / groups, 1…) of a convolution.
    pub lora_b: Option<Tensor>,
    /// The bias of B: (out).
    pub lora_b_bias: Option<Tensor>,
    /// A of an embedding: (r, vocabulary).
    pub embedding_a: Option<Tensor>,
    /// B of an embedding: (dim, r).
    pub embedding_b: Option<Tensor>,
    /// DoRA's magnitude: (out), (1, out, 1…) of a convolution, (dim) of an embedding.
    pub magnitude: Option<Tensor>,
    /// The base weight of a layer that has an adapter, to be put in the base's place.
    pub base_weight: Option<Tensor>,
    /// A bias of the base model that was trained (`bias` in the configuration).
    pub base_bias: Option<Tensor>,
    /// The weight of a layer that was trained whole (`modules_to_save`) or resized.
    pub saved_weight: Option<Tensor>,
    /// The bias of a layer that was trained whole (`modules_to_save`).
    pub saved_bias: Option<Tensor>,
    /// VeRA's λ_b: (out).
    pub vera_lambda_b: Option<Tensor>,
    /// VeRA's λ_d: (r).
    pub vera_lambda_d: Option<Tensor>,
}

impl ModuleTensors {
    /// Whether the layer has an adapter, and not only a saved weight or bias.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use lora::peft::ModuleTensors;
    ///
    /// let a = Tensor::ones((2, 5), DType::F32, &Device::Cpu)?;
    /// assert!(ModuleTensors { lora_a: Some(a), ..Default::default() }.has_adapter());
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    #[must_use]
    pub fn has_adapter(&self) -> bool {
        self.lora_a.is_some() || self.embedding_a.is_some() || self.vera_lambda_d.is_some()
    }

    /// The bias that takes the place of the base's.
    pub(crate) fn saved_bias_or_base(&self) -> &Option<Tensor> {
        if self.saved_bias.is_some() {
            &self.saved_bias
        } else {
            &self.base_bias
        }
    }
}

impl AdapterFiles {
    /// The tensors by layer, under the layers' dotted paths.
    ///
    /// # Errors
    ///
    /// [`Error::File`](crate::Error::File), naming the tensor, when a name is not understood, two
    /// names stand for one tensor, A or B is missing, ranks differ from each other or from
    /// `r` and `rank_pattern`, a shape cannot be that of its part, the magnitude or B's bias is
    /// there without `use_dora` or `lora_bias` or the other way around, or a tensor belongs to
    /// another method; [`Error::Pattern`](crate::Error::Pattern) when a pattern of the
    /// configuration cannot be used.
    ///
    /// ```
    /// use std::collections::BTreeMap;
    /// use candle_core::{DType, Device, Tensor};
    /// use lora::{LoraConfig, peft::AdapterFiles};
    ///
    /// let a = Tensor::ones((2, 5), DType::F32, &Device::Cpu)?;
    /// let mut files = AdapterFiles {
    ///     config: LoraConfig::new(2, 4.0).into(),
    ///     tensors: BTreeMap::from([("base_model.model.x.lora_A.weight".to_string(), a)]),
    /// };
    /// let message = files.modules().unwrap_err().to_string();
    /// assert!(message.contains("layer x: lora_B is missing"));
    ///
    /// let b = Tensor::ones((7, 2), DType::F32, &Device::Cpu)?;
    /// files.tensors.insert("base_model.model.x.lora_B.weight".to_string(), b);
    /// assert!(files.modules().unwrap()["x"].has_adapter());
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn modules(&self) -> Result<BTreeMap<String, ModuleTensors>> {
        self.modules_of(Path::new(WEIGHTS_NAME))
    }

    /// VeRA's shared matrices A (r, largest in) and B (largest out, r), if both are there.
    ///
    /// ```
    /// use std::collections::BTreeMap;
    /// use lora::{LoraConfig, peft::AdapterFiles};
    ///
    /// let config = LoraConfig::new(2, 4.0).into();
    /// assert!(AdapterFiles { config, tensors: BTreeMap::new() }.vera_projection().is_none());
    /// ```
    #[must_use]
    pub fn vera_projection(&self) -> Option<(&Tensor, &Tensor)> {
        Some((
            self.tensors.get("base_model.vera_A")?,
            self.tensors.get("base_model.vera_B")?,
        ))
    }

    pub(super) fn modules_of(&self, file: &Path) -> Result<BTreeMap<String, ModuleTensors>> {
        let keys = names::canonical(self.tensors.keys().map(String::as_str), file)?;
        let mut modules: BTreeMap<String, ModuleTensors> = BTreeMap::new();
        let mut shared = Shared::default();
        let whole = Whole::of(&self.config);
        for (name, key) in keys.into_values() {
            let Some(tensor) = self.tensors.get(key) else {
                continue;
            };
            let tensor = Some(tensor.clone());
            match name.part {
                Part::VeraA => {
                    shared.a = tensor;
                    continue;
                }
                Part::VeraB => {
                    shared.b = tensor;
                    continue;
                }
                _ => {}
            }
            let saved = name.part == Part::Bias && whole.holds(&name.path)?;
            let module = modules.entry(name.path).or_default();
            match name.part {
                Part::LoraA => module.lora_a = tensor,
                Part::LoraB => module.lora_b = tensor,
                Part::LoraBBias => module.lora_b_bias = tensor,
                Part::EmbeddingA => module.embedding_a = tensor,
                Part::EmbeddingB => module.embedding_b = tensor,
                Part::Magnitude => module.magnitude = tensor,
                Part::BaseWeight => module.base_weight = tensor,
                Part::BaseBias => module.base_bias = tensor,
                Part::Weight => module.saved_weight = tensor,
                Part::Bias if saved => module.saved_bias = tensor,
                Part::Bias => module.base_bias = tensor,
                Part::VeraLambdaB => module.vera_lambda_b = tensor,
                Part::VeraLambdaD => module.vera_lambda_d = tensor,
                Part::VeraA | Part::VeraB => {}
            }
        }
        match &self.config.kind {
            AdapterKind::Lora(config) => {
                if shared.a.is_some() || shared.b.is_some() {
                    return Err(bad_file(file, "VeRA's shared matrices in a LoRA adapter"));
                }
                let ranks = Ranks::of(config)?;
                for (path, module) in &modules {
                    lora_layer(config, &ranks, path, module).map_err(|why| match why {
                        Fault::Why(why) => bad_file(file, format!("layer {path}: {why}")),
                        Fault::Other(error) => *error,
                    })?;
                }
            }
            AdapterKind::Vera(config) => {
                let shapes = shared.shapes(config.r).map_err(|why| bad_file(file, why))?;
                for (path, module) in &modules {
                    vera_layer(config.r, shapes, module)
                        .map_err(|why| bad_file(file, format!("layer {path}: {why}")))?;
                }
            }
        }
        Ok(modules)
    }
}

/// `modules_to_save`, asked for one layer after the other.
struct Whole(LoraConfig);

impl Whole {
    fn of(config: &AdapterConfig) -> Self {
        Self(LoraConfig {
            modules_to_save: config.modules_to_save(),
            ..LoraConfig::default()
        })
    }

    fn holds(&self, path: &str) -> Result<bool> {
        saved_whole(&self.0, path)
    }
}

/// `rank_pattern`, compiled once for all layers; the same rule as [`LoraConfig::for_layer`].
struct Ranks {
    r: usize,
    patterns: Vec<(Pattern, usize)>,
}

impl Ranks {
    fn of(config: &LoraConfig) -> Result<Self> {
        let compile = |(key, r): &(String, usize)| Ok((Pattern::ending("rank_pattern", key)?, *r));
        Ok(Self {
            r: config.r,
            patterns: config
                .rank_pattern
                .iter()
                .map(compile)
                .collect::<Result<_>>()?,
        })
    }

    fn of_layer(&self, path: &str) -> Result<usize> {
        for (pattern, r) in &self.patterns {
            if pattern.matches(path)? {
                return Ok(*r);
            }
        }
        Ok(self.r)
    }
}

enum Fault {
    Why(String),
    Other(Box<crate::Error>),
}

impl From<String> for Fault {
    fn from(why: String) -> Self {
        Self::Why(why)
    }
}

impl From<crate::Error> for Fault {
    fn from(error: crate::Error) -> Self {
        Self::Other(Box::new(error))
    }
}

fn lora_layer(
    config: &LoraConfig,
    ranks: &Ranks,
    path: &str,
    module: &ModuleTensors,
) -> Result<(), Fault> {
    if module.vera_lambda_b.is_some() || module.vera_lambda_d.is_some() {
        return Err("a VeRA vector in a LoRA adapter".to_string().into());
    }
    let linear = pair(("lora_A", &module.lora_a), ("lora_B", &module.lora_b))?;
    let embedding = pair(
        ("lora_embedding_A", &module.embedding_a),
        ("lora_embedding_B", &module.embedding_b),
    )?;
    let (kind, (a, b)) = match (linear, embedding) {
        (None, None) => {
            for (name, tensor) in [
                ("lora_magnitude_vector", &module.magnitude),
                ("lora_B.bias", &module.lora_b_bias),
            ] {
                if tensor.is_some() {
                    return Err(format!("{name} without A and B").into());
                }
            }
            return Ok(());
        }
        (Some(_), Some(_)) => {
            return Err("tensors of a linear layer and of an embedding"
                .to_string()
                .into());
        }
        (Some(found), None) => ("lora", found),
        (None, Some(found)) => ("lora_embedding", found),
    };
    let (a_dims, b_dims) = (a.dims(), b.dims());
    let fits = match (a_dims, b_dims) {
        ([_, _], [_, _]) => true,
        ([_, _, kernel @ ..], [_, _, ones @ ..]) => {
            kind == "lora" && kernel.len() == ones.len() && kernel.len() <= 3 && all_one(ones)
        }
        _ => false,
    };
    let ([rank, ..], [out, b_rank, ..]) = (a_dims, b_dims) else {
        return Err(format!("{kind}_A {a_dims:?} and {kind}_B {b_dims:?} are no matrices").into());
    };
    if !fits || a_dims.contains(&0) || b_dims.contains(&0) {
        let why = format!("{kind}_A {a_dims:?} and {kind}_B {b_dims:?} do not belong together");
        return Err(why.into());
    }
    // A convolution in groups stores B for one group.
    let grouped = a_dims.len() > 2 && b_rank < rank && rank.is_multiple_of(*b_rank);
    if rank != b_rank && !grouped {
        return Err(format!("{kind}_A has rank {rank}, {kind}_B rank {b_rank}").into());
    }
    let wanted = ranks.of_layer(path)?;
    if *rank != wanted {
        return Err(format!(
            "A and B have rank {rank}, the configuration says {wanted} for this layer; correct r \
             or rank_pattern. PEFT sorts rank_pattern when it saves, so that of patterns that \
             overlap another one may come first than in training"
        )
        .into());
    }
    let options = [
        (
            "lora_B.bias",
            &module.lora_b_bias,
            "lora_bias",
            config.lora_bias,
        ),
        (
            "lora_magnitude_vector",
            &module.magnitude,
            "use_dora",
            config.use_dora,
        ),
    ];
    for (name, tensor, option, wanted) in options {
        match (tensor, wanted) {
            (None, true) => return Err(format!("{name} is missing, but {option} is true").into()),
            (Some(_), false) => {
                return Err(format!("{name} is there, but {option} is false").into());
            }
            (None, false) => {}
            (Some(tensor), true) => {
                let dims = tensor.dims();
                let fits = match dims {
                    [n] => n == out,
                    [1, n, ones @ ..] => {
                        option == "use_dora"
                            && n == out
                            && dims.len() == a_dims.len()
                            && a_dims.len() > 2
                            && all_one(ones)
                    }
                    _ => false,
                };
                if !fits {
                    return Err(format!("{name} {dims:?} does not fit {out} outputs").into());
                }
            }
        }
    }
    Ok(())
}

fn all_one(dims: &[usize]) -> bool {
    dims.iter().all(|d| *d == 1)
}

/// Both tensors, or none.
fn pair<'a>(
    (a_name, a): (&str, &'a Option<Tensor>),
    (b_name, b): (&str, &'a Option<Tensor>),
) -> Result<Option<(&'a Tensor, &'a Tensor)>, String> {
    match (a, b) {
        (Some(a), Some(b)) => Ok(Some((a, b))),
        (None, None) => Ok(None),
        (Some(_), None) => Err(format!("{b_name} is missing, {a_name} is there")),
        (None, Some(_)) => Err(format!("{a_name} is missing, {b_name} is there")),
    }
}

/// VeRA's shared matrices.
#[derive(Default)]
struct Shared {
    a: Option<Tensor>,
    b: Option<Tensor>,
}

impl Shared {
    /// The largest output of B, when both matrices are there and have rank `r`.
    fn shapes(&self, r: usize) -> Result<Option<usize>, String> {
        match pair(("vera_A", &self.a), ("vera_B", &self.b))? {
            None => Ok(None),
            Some((a, b)) => match (a.dims(), b.dims()) {
                ([a_rank, inputs], [out, b_rank])
                    if *a_rank == r && *b_rank == r && *inputs > 0 && *out > 0 =>
                {
                    Ok(Some(*out))
                }
                (a, b) => Err(format!(
                    "vera_A {a:?} and vera_B {b:?} must be (r, inputs) and (outputs, r), r = {r}"
                )),
            },
        }
    }
}

fn vera_layer(r: usize, largest: Option<usize>, module: &ModuleTensors) -> Result<(), String> {
    let lora = [
        ("lora_A", &module.lora_a),
        ("lora_B", &module.lora_b),
        ("lora_B.bias", &module.lora_b_bias),
        ("lora_embedding_A", &module.embedding_a),
        ("lora_embedding_B", &module.embedding_b),
        ("lora_magnitude_vector", &module.magnitude),
    ];
    if let Some((name, _)) = lora.iter().find(|(_, tensor)| tensor.is_some()) {
        return Err(format!("{name} in a VeRA adapter"));
    }
    let (b, d) = (&module.vera_lambda_b, &module.vera_lambda_d);
    let Some((b, d)) = pair(("vera_lambda_b", b), ("vera_lambda_d", d))? else {
        return Ok(());
    };
    let Some(largest) = largest else {
        return Err(
            "vera_A and vera_B are missing; save the adapter with save_projection=True".into(),
        );
    };
    match (b.dims(), d.dims()) {
        ([out], [rank]) if *rank == r && (1..=largest).contains(out) => Ok(()),
        (b, d) => Err(format!(
            "vera_lambda_b {b:?} and vera_lambda_d {d:?} must be (outputs), at most {largest}, \
             and (r), r = {r}"
        )),
    }
}

/// Whether tensors of this type are read and written.
pub(super) fn is_float(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F64 | DType::F16 | DType::BF16)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::VeraConfig;

    fn files(config: impl Into<AdapterConfig>, tensors: &[(&str, &[usize])]) -> AdapterFiles {
        let tensor = |(key, shape): &(&str, &[usize])| {
            (
                key.to_string(),
                Tensor::ones(*shape, DType::F32, &Device::Cpu).unwrap(),
            )
        };
        AdapterFiles {
            config: config.into(),
            tensors: tensors.iter().map(tensor).collect(),
        }
    }

    fn refused(config: impl Into<AdapterConfig>, tensors: &[(&str, &[usize])], want: &str) {
        let message = files(config, tensors).modules().unwrap_err().to_string();
        assert!(message.contains(want), "{message}");
    }

    #[test]
    fn each_part_of_a_lora_layer() {
        let config = || LoraConfig::new(2, 4.0);
        let a: (&str, &[usize]) = ("x.lora_A.weight", &[2, 5]);
        let b: (&str, &[usize]) = ("x.lora_B.weight", &[7, 2]);
        assert!(files(config(), &[a, b]).modules().unwrap()["x"].has_adapter());
        refused(
            config(),
            &[a],
            "layer x: lora_B is missing, lora_A is there",
        );
        refused(config(), &[b], "layer x: lora_A is missing");
        refused(
            config(),
            &[("x.lora_embedding_A", &[2, 5])],
            "lora_embedding_B is missing",
        );
        refused(
            config(),
            &[a, ("x.lora_B.weight", &[7, 3])],
            "lora_A has rank 2, lora_B rank 3",
        );
        refused(
            config(),
            &[a, ("x.lora_B.weight", &[7, 1])],
            "lora_A has rank 2, lora_B rank 1",
        );
        refused(
            config(),
            &[a, ("x.lora_B.weight", &[7, 2, 1])],
            "do not belong together",
        );
        refused(
            config(),
            &[a, ("x.lora_B.weight", &[0, 2])],
            "do not belong together",
        );
        refused(
            config(),
            &[a, ("x.lora_B.weight", &[14])],
            "are no matrices",
        );
        refused(
            config(),
            &[
                ("x.lora_A.weight", &[2, 3, 3, 3]),
                ("x.lora_B.weight", &[7, 2, 3, 3]),
            ],
            "do not belong together",
        );
        refused(
            LoraConfig::new(4, 4.0),
            &[a, b],
            "have rank 2, the configuration says 4",
        );
        refused(
            config(),
            &[a, b, ("x.lora_B.bias", &[7])],
            "lora_bias is false",
        );
        refused(
            config(),
            &[a, b, ("x.lora_magnitude_vector", &[7])],
            "use_dora is false",
        );
        refused(
            config().with_lora_bias(true),
            &[a, b],
            "lora_B.bias is missing",
        );
        refused(
            config().with_dora(true),
            &[a, b],
            "lora_magnitude_vector is missing",
        );
        for dims in [&[6][..], &[1, 7], &[7, 1]] {
            let magnitude = ("x.lora_magnitude_vector", dims);
            refused(
                config().with_dora(true),
                &[a, b, magnitude],
                "does not fit 7 outputs",
            );
        }
        refused(
            config().with_lora_bias(true),
            &[a, b, ("x.lora_B.bias", &[1, 7])],
            "fit 7 outputs",
        );
        refused(
            config(),
            &[("x.lora_magnitude_vector", &[7])],
            "without A and B",
        );
        refused(
            config(),
            &[("x.vera_lambda_b", &[7])],
            "a VeRA vector in a LoRA adapter",
        );
        refused(
            config(),
            &[("base_model.vera_A", &[2, 5])],
            "VeRA's shared matrices",
        );
        let embedding: [(&str, &[usize]); 2] = [
            ("x.lora_embedding_A", &[2, 5]),
            ("x.lora_embedding_B", &[3, 2]),
        ];
        refused(
            config(),
            &[&[a, b], &embedding[..]].concat(),
            "of a linear layer and of an",
        );
        assert!(files(config(), &embedding).modules().is_ok());
        let grouped: [(&str, &[usize]); 2] = [
            ("x.lora_A.weight", &[4, 4, 3, 3]),
            ("x.lora_B.weight", &[6, 2, 1, 1]),
        ];
        assert!(files(LoraConfig::new(4, 4.0), &grouped).modules().is_ok());
    }

    #[test]
    fn ranks_follow_the_first_pattern() {
        let mut config = LoraConfig::new(2, 4.0);
        config.rank_pattern = vec![("q".into(), 3), (r".*0\.q".into(), 4), ("^v$".into(), 5)];
        let ranks = Ranks::of(&config).unwrap();
        for path in ["q", "a.q", "layers.0.q", "layers.0.v", "v", "q.x", "aq"] {
            let own = config.for_layer(path).unwrap();
            assert_eq!(ranks.of_layer(path).unwrap(), own.r, "{path}");
        }
        let q: [(&str, &[usize]); 2] = [
            ("l.0.q.lora_A.weight", &[3, 5]),
            ("l.0.q.lora_B.weight", &[7, 3]),
        ];
        assert!(files(config.clone(), &q).modules().is_ok());
        config.rank_pattern.swap(0, 1);
        refused(
            config,
            &q,
            "have rank 3, the configuration says 4 for this layer",
        );
        let mut config = LoraConfig::new(2, 4.0);
        config.rank_pattern = vec![("(".into(), 3)];
        refused(
            config,
            &q,
            "rank_pattern: \"(\" is not a usable regular expression",
        );
    }

    #[test]
    fn biases_and_whole_layers() {
        let mut config = LoraConfig::new(2, 4.0);
        config.modules_to_save = vec!["head".into()];
        let files = files(
            config,
            &[
                ("x.lora_A.weight", &[2, 5]),
                ("x.lora_B.weight", &[7, 2]),
                ("x.bias", &[7]),
                ("norm.bias", &[5]),
                ("head.weight", &[3, 7]),
                ("head.bias", &[3]),
                ("embed_tokens.weight", &[9, 5]),
            ],
        );
        let modules = files.modules().unwrap();
        assert!(modules["x"].base_bias.is_some() && modules["x"].saved_bias.is_none());
        assert!(modules["norm"].base_bias.is_some() && !modules["norm"].has_adapter());
        assert!(modules["head"].saved_bias.is_some() && modules["head"].base_bias.is_none());
        assert!(modules["head"].saved_weight.is_some());
        assert!(modules["embed_tokens"].saved_weight.is_some());
    }

    #[test]
    fn each_part_of_a_vera_layer() {
        let config = || VeraConfig {
            r: 3,
            ..VeraConfig::default()
        };
        let a: (&str, &[usize]) = ("base_model.vera_A", &[3, 5]);
        let b: (&str, &[usize]) = ("base_model.vera_B", &[7, 3]);
        let lb: (&str, &[usize]) = ("x.vera_lambda_b", &[7]);
        let ld: (&str, &[usize]) = ("x.vera_lambda_d", &[3]);
        let whole = files(config(), &[a, b, lb, ld]);
        assert!(whole.modules().unwrap()["x"].has_adapter());
        assert!(
            files(config(), &[a, b, ("x.vera_lambda_b", &[4]), ld])
                .modules()
                .is_ok()
        );
        refused(config(), &[a, b, lb], "vera_lambda_d is missing");
        refused(config(), &[a, lb, ld], "vera_B is missing");
        refused(config(), &[lb, ld], "vera_A and vera_B are missing");
        refused(
            config(),
            &[a, b, ("x.vera_lambda_b", &[8]), ld],
            "at most 7",
        );
        refused(config(), &[a, b, lb, ("x.vera_lambda_d", &[2])], "r = 3");
        refused(
            config(),
            &[("base_model.vera_A", &[2, 5]), b, lb, ld],
            "vera_A [2, 5]",
        );
        refused(
            config(),
            &[a, b, lb, ld, ("x.lora_A.weight", &[3, 5])],
            "lora_A in a VeRA adapter",
        );
    }
}
