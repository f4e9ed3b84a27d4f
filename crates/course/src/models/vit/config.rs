//! The sizes of a Vision Transformer, and its weights before any training.

use std::collections::BTreeMap;
use std::fmt;

use candle_core::{DType, Device, Tensor};
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use crate::chart::grouped;
use crate::models::HiddenAct;
use crate::rng::Rng;
use crate::{Error, Result};

/// The sizes of a [`ViT`](super::ViT), under the names of Hugging Face's `config.json`.
///
/// ```
/// use course::models::ViTConfig;
///
/// let base = ViTConfig::base_patch16_224();
/// assert_eq!(base.parameter_count(), 86_567_656);
/// assert_eq!((base.patches(), base.head_dim()), (196, 64));
///
/// let config: ViTConfig = serde_json::from_str(r#"{"model_type": "vit", "hidden_size": 64,
///     "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
///     "hidden_act": "gelu", "layer_norm_eps": 1e-12, "image_size": 32, "patch_size": 8,
///     "num_channels": 3, "id2label": {"0": "cat", "1": "dog", "2": "horse"}}"#)?;
/// assert_eq!((config.patches(), config.num_labels), (16, 3));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "ConfigFile")]
pub struct ViTConfig {
    /// Numbers in a token's vector.
    pub hidden_size: usize,
    /// Transformer layers.
    pub num_hidden_layers: usize,
    /// Attention heads.
    pub num_attention_heads: usize,
    /// Numbers inside the feed-forward part.
    pub intermediate_size: usize,
    /// What stands inside the feed-forward part.
    pub hidden_act: HiddenAct,
    /// ε of the layer norms.
    pub layer_norm_eps: f64,
    /// Side of an image in pixels.
    pub image_size: usize,
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Colours of a pixel: 3, or 1 in grey images.
    pub num_channels: usize,
    /// Whether query, key and value have a bias.
    pub qkv_bias: bool,
    /// Classes; 0 for a model without a classifier.
    pub num_labels: usize,
}

/// `config.json`, with what a model may have that this one does not do.
#[derive(Deserialize)]
struct ConfigFile {
    model_type: Option<String>,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    intermediate_size: usize,
    #[serde(default)]
    hidden_act: HiddenAct,
    layer_norm_eps: f64,
    image_size: usize,
    patch_size: usize,
    num_channels: usize,
    qkv_bias: Option<bool>,
    num_labels: Option<usize>,
    id2label: Option<BTreeMap<String, IgnoredAny>>,
}

impl ConfigFile {
    /// transformers writes the classes' names, and nothing where they are its usual two.
    fn labels(&self) -> Result<usize> {
        let named = self.id2label.as_ref().map(BTreeMap::len);
        match (self.num_labels, named) {
            (Some(given), Some(named)) if given != named => refuse(format!(
                "its num_labels is {given}, and its id2label names {named}; they must agree"
            )),
            (given, named) => Ok(named.or(given).unwrap_or(2)),
        }
    }
}

impl TryFrom<ConfigFile> for ViTConfig {
    type Error = Error;

    fn try_from(file: ConfigFile) -> Result<Self> {
        let num_labels = file.labels()?;
        if let Some(kind) = file.model_type.filter(|kind| kind != "vit") {
            return refuse(format!("its model_type is {kind:?}, not \"vit\""));
        }
        let config = Self {
            hidden_size: file.hidden_size,
            num_hidden_layers: file.num_hidden_layers,
            num_attention_heads: file.num_attention_heads,
            intermediate_size: file.intermediate_size,
            hidden_act: file.hidden_act,
            layer_norm_eps: file.layer_norm_eps,
            image_size: file.image_size,
            patch_size: file.patch_size,
            num_channels: file.num_channels,
            qkv_bias: file.qkv_bias.unwrap_or(true),
            num_labels,
        };
        config.validate()?;
        Ok(config)
    }
}

fn refuse<T>(problem: String) -> Result<T> {
    Err(Error::Model {
        model: "ViT",
        problem,
    })
}

impl ViTConfig {
    /// The shape of ViT-B/16 for images of 224 × 224 pixels and the 1,000 classes of ImageNet.
    ///
    /// Source: Dosovitskiy et al. 2020, arXiv:2010.11929, table 1; `config.json` of
    /// google/vit-base-patch16-224.
    #[must_use]
    pub fn base_patch16_224() -> Self {
        Self {
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            intermediate_size: 3072,
            hidden_act: HiddenAct::Gelu,
            layer_norm_eps: 1e-12,
            image_size: 224,
            patch_size: 16,
            num_channels: 3,
            qkv_bias: true,
            num_labels: 1000,
        }
    }

    /// The shape of what `cargo course pretrain fashion-vit` trains: grey images of 28 × 28 pixels in
    /// ten classes.
    ///
    /// ```
    /// let config = course::models::ViTConfig::fashion();
    /// assert_eq!(config.parameter_count(), 205_066);
    /// ```
    #[must_use]
    pub fn fashion() -> Self {
        Self {
            hidden_size: 64,
            num_hidden_layers: 4,
            num_attention_heads: 4,
            intermediate_size: 256,
            image_size: 28,
            patch_size: 7,
            num_channels: 1,
            num_labels: 10,
            ..Self::base_patch16_224()
        }
    }

    /// Numbers in one head: `hidden_size` / `num_attention_heads`.
    #[must_use]
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads.max(1)
    }

    /// Patches along a side of the image: `image_size` / `patch_size`.
    #[must_use]
    pub fn side(&self) -> usize {
        self.image_size / self.patch_size.max(1)
    }

    /// Patches of an image. The model's tokens are one more, the class token before them.
    #[must_use]
    pub fn patches(&self) -> usize {
        self.side() * self.side()
    }

    /// Weights and biases of the embeddings, all layers and the classifier.
    #[must_use]
    pub fn parameter_count(&self) -> usize {
        self.parts().iter().map(|(_, count, _)| count).sum()
    }

    /// The weights of a model that has not been trained, under transformers' names: normal
    /// numbers with a deviation of 0.02, biases at 0, norms at 1 and 0.
    ///
    /// Source: transformers `initializer_range`.
    ///
    /// # Errors
    ///
    /// Sizes that do not fit each other; what candle reports when it moves a tensor to `device`.
    ///
    /// ```
    /// use course::models::ViTConfig;
    /// use course::prelude::*;
    ///
    /// let config = ViTConfig::fashion();
    /// let weights = config.random_weights(&mut rng(1), &Device::Cpu)?;
    /// let count: usize = weights.values().map(|w| w.elem_count()).sum();
    /// assert_eq!(count, config.parameter_count());
    /// # Ok::<(), course::Error>(())
    /// ```
    pub fn random_weights(
        &self,
        rng: &mut Rng,
        device: &Device,
    ) -> Result<BTreeMap<String, Tensor>> {
        self.validate()?;
        let hidden = self.hidden_size;
        let mut tensors = BTreeMap::new();
        let tables = [
            ("vit.embeddings.cls_token", vec![1, 1, hidden]),
            (
                "vit.embeddings.position_embeddings",
                vec![1, self.patches() + 1, hidden],
            ),
        ];
        let mut drawn = |shape: Vec<usize>| -> Result<Tensor> {
            let normal = rng.randn(shape, device)?;
            Ok((normal * 0.02)?)
        };
        for (name, shape) in tables {
            tensors.insert(name.to_string(), drawn(shape)?);
        }
        for (layer, shape, bias) in self.layers() {
            if bias {
                let zeros = Tensor::zeros(shape[0], DType::F32, device)?;
                tensors.insert(format!("{layer}.bias"), zeros);
            }
            tensors.insert(format!("{layer}.weight"), drawn(shape)?);
        }
        for norm in self.norms() {
            let (ones, zeros) = (
                Tensor::ones(hidden, DType::F32, device)?,
                Tensor::zeros(hidden, DType::F32, device)?,
            );
            tensors.insert(format!("{norm}.weight"), ones);
            tensors.insert(format!("{norm}.bias"), zeros);
        }
        Ok(tensors)
    }

    /// Every layer that can take an adapter: its name, the shape of its weight, whether it has a
    /// bias.
    fn layers(&self) -> Vec<(String, Vec<usize>, bool)> {
        let (h, inner, patch) = (self.hidden_size, self.intermediate_size, self.patch_size);
        let projection = vec![h, self.num_channels, patch, patch];
        let name = "vit.embeddings.patch_embeddings.projection";
        let mut layers = vec![(name.to_string(), projection, true)];
        for number in 0..self.num_hidden_layers {
            for (part, shape, bias) in [
                ("attention.attention.query", [h, h], self.qkv_bias),
                ("attention.attention.key", [h, h], self.qkv_bias),
                ("attention.attention.value", [h, h], self.qkv_bias),
                ("attention.output.dense", [h, h], true),
                ("intermediate.dense", [inner, h], true),
                ("output.dense", [h, inner], true),
            ] {
                let name = format!("vit.encoder.layer.{number}.{part}");
                layers.push((name, shape.to_vec(), bias));
            }
        }
        if self.num_labels > 0 {
            layers.push(("classifier".to_string(), vec![self.num_labels, h], true));
        }
        layers
    }

    fn norms(&self) -> Vec<String> {
        let of = |number| {
            ["before", "after"].map(|at| format!("vit.encoder.layer.{number}.layernorm_{at}"))
        };
        let mut norms: Vec<String> = (0..self.num_hidden_layers).flat_map(of).collect();
        norms.push("vit.layernorm".to_string());
        norms
    }

    /// 1 / √`head_dim`, by which the scores are multiplied.
    pub(super) fn attention_scale(&self) -> f64 {
        1.0 / (self.head_dim() as f64).sqrt()
    }

    pub(super) fn validate(&self) -> Result<()> {
        let (hidden, heads) = (self.hidden_size, self.num_attention_heads);
        if heads == 0 || hidden == 0 || !hidden.is_multiple_of(heads) {
            return refuse(format!(
                "hidden_size = {hidden} must be a multiple of num_attention_heads = {heads}"
            ));
        }
        let (image, patch) = (self.image_size, self.patch_size);
        if patch == 0 || image == 0 || !image.is_multiple_of(patch) {
            return refuse(format!(
                "image_size = {image} must be a multiple of patch_size = {patch}, or part of the \
                 image would not be seen"
            ));
        }
        if self.num_channels == 0 {
            return refuse("num_channels = 0 must be at least 1".to_string());
        }
        Ok(())
    }

    /// Each part's name, its parameters, and a word about it.
    fn parts(&self) -> [(&'static str, usize, String); 5] {
        let (h, inner, layers) = (
            self.hidden_size,
            self.intermediate_size,
            self.num_hidden_layers,
        );
        let (patch, patches) = (self.patch_size, self.patches());
        let projection = self.num_channels * patch * patch * h + h;
        let biases = if self.qkv_bias { 4 * h } else { h };
        [
            (
                "embeddings",
                projection + h + (patches + 1) * h,
                format!(
                    "{patches} patches of {} × {patch} × {patch}, a class token, {} positions",
                    self.num_channels,
                    patches + 1
                ),
            ),
            (
                "attention",
                layers * (4 * h * h + biases),
                format!(
                    "{layers} layers, {} heads of {}",
                    self.num_attention_heads,
                    self.head_dim()
                ),
            ),
            (
                "feed-forward",
                layers * (2 * h * inner + inner + h),
                format!("{layers} layers, {h} → {inner} → {h}"),
            ),
            (
                "norms",
                (2 * layers + 1) * 2 * h,
                "a scale and a shift for each number".to_string(),
            ),
            (
                "classifier",
                self.num_labels * (h + 1),
                format!("{} classes", grouped(&self.num_labels.to_string())),
            ),
        ]
    }
}

/// The parts and their numbers of parameters.
///
/// ```
/// let text = course::models::ViTConfig::base_patch16_224().to_string();
/// assert!(text.starts_with("ViT with 86,567,656 parameters"));
/// ```
impl fmt::Display for ViTConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = |count: usize| grouped(&count.to_string());
        write!(f, "ViT with {} parameters", number(self.parameter_count()))?;
        for (part, count, how) in self.parts() {
            write!(f, "\n  {part:<12}  {:>11}  {how}", number(count))?;
        }
        Ok(())
    }
}
