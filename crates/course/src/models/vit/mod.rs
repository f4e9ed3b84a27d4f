//! A Vision Transformer: ViT-B/16 and its relatives.

mod config;
mod rollout;

use std::fmt;

use candle_core::{Module, Tensor};
use candle_nn::Conv2dConfig;
use lora::ops::{self, AttentionMask};
use lora::{LoraBuilder, LoraConv2d, LoraLinear};

use super::accuracy::accuracy;
use super::norm::Norm;
use crate::{Error, Result};

pub use config::ViTConfig;

/// An encoder-only transformer over the patches of an image, with a layer norm before each part.
///
/// The patches go through one convolution with a stride of its kernel; the class token is put
/// before them, as one token more, and each gets its learned position:
/// h = [E class; E patch₁; …; E patchₙ] + E position. Then in every layer
/// h ← h + Wₒ attention(W_q n, W_k n, W_v n) with n = norm(h), and
/// h ← h + W₂ gelu(W₁ n) with n = norm(h). The classifier reads the class token, normed.
///
/// Its layers are named as in transformers
/// (`vit.encoder.layer.0.attention.attention.query`), so weights load under their own names and
/// adapters exchange with PEFT. `"query"` and `"value"` are the usual targets; `"dense"` names the
/// other linear layers, and `"projection"` the convolution.
///
/// A checkpoint without a classifier is read too. One of transformers' `ViTModel` has names
/// without `vit.` and keeps them; its pooler is not read. Such a model has
/// [`features`](Self::features), on which a [`Classifier`](super::Classifier) can be trained.
///
/// Source: Dosovitskiy et al. 2020, arXiv:2010.11929; transformers `modeling_vit.py`.
///
/// ```
/// use course::prelude::*;
/// use course::candle_nn::VarBuilder;
///
/// let config = ViTConfig { num_hidden_layers: 2, ..ViTConfig::fashion() };
/// let weights = config.random_weights(&mut rng(1), &Device::Cpu)?.into_iter().collect();
/// let builder = LoraBuilder::new(VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu));
/// let vit = ViT::new(&config, &builder)?;
/// let lora = LoraConfig::new(4, 8.0).with_targets(["query", "value"]);
/// builder.model()?.add_adapter("default", &lora, &mut rng(1))?;
///
/// let images = Tensor::zeros((5, 1, 28, 28), DType::F32, &Device::Cpu)?;
/// assert_eq!(vit.forward_t(&images, false)?.dims(), [5, 10]);
/// assert_eq!(vit.features(&images, false)?.dims(), [5, 64]);
/// # Ok::<(), course::Error>(())
/// ```
#[derive(Debug)]
pub struct ViT {
    config: ViTConfig,
    cls_token: Tensor,
    position_embeddings: Tensor,
    projection: LoraConv2d,
    layers: Vec<Layer>,
    layernorm: Norm,
    /// Where the checkpoint has one.
    classifier: Option<LoraLinear>,
}

#[derive(Debug)]
struct Layer {
    layernorm_before: Norm,
    query: LoraLinear,
    key: LoraLinear,
    value: LoraLinear,
    attention_output: LoraLinear,
    layernorm_after: Norm,
    intermediate: LoraLinear,
    output: LoraLinear,
}

impl ViT {
    /// The model of the builder's weights, which are frozen with [`LoraBuilder::new`] and train with
    /// [`LoraBuilder::trainable`]; adapters come from the builder's [`model`](LoraBuilder::model).
    ///
    /// # Errors
    ///
    /// Sizes that do not fit each other; a weight that is missing or of another shape.
    pub fn new(config: &ViTConfig, builder: &LoraBuilder<'_>) -> Result<Self> {
        config.validate()?;
        let has = |name: &str| builder.vb().contains_tensor(name);
        let (with_prefix, without) = (has("vit.embeddings.cls_token"), has("embeddings.cls_token"));
        let mut config = config.clone();
        // A checkpoint that is there and has none; weights that are yet to be made get one.
        if (with_prefix || without) && !has("classifier.weight") {
            config.num_labels = 0;
        }
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let classifier = match config.num_labels {
            0 => None,
            labels => {
                let head = builder.pp("classifier").linear(hidden, labels)?;
                Some(head.output_head())
            }
        };
        let vit = match without && !with_prefix {
            true => builder.clone(),
            false => builder.pp("vit"),
        };
        let norm = |b: LoraBuilder<'_>| Norm::new(hidden, config.layer_norm_eps, &b);
        let layer = |number: usize| -> Result<Layer> {
            let b = vit.pp("encoder").pp("layer").pp(number);
            let attention = b.pp("attention");
            let of = |name: &str| {
                let b = attention.pp("attention").pp(name);
                match config.qkv_bias {
                    true => b.linear(hidden, hidden),
                    false => b.linear_no_bias(hidden, hidden),
                }
            };
            let out = attention.pp("output").pp("dense");
            Ok(Layer {
                layernorm_before: norm(b.pp("layernorm_before"))?,
                query: of("query")?,
                key: of("key")?,
                value: of("value")?,
                attention_output: out.linear(hidden, hidden)?,
                layernorm_after: norm(b.pp("layernorm_after"))?,
                intermediate: b.pp("intermediate").pp("dense").linear(hidden, inner)?,
                output: b.pp("output").pp("dense").linear(inner, hidden)?,
            })
        };
        let embeddings = vit.pp("embeddings");
        let table = |name: &str, rows: usize| embeddings.vb().get((1, rows, hidden), name);
        let (channels, patch) = (config.num_channels, config.patch_size);
        let stride = Conv2dConfig {
            stride: patch,
            ..Conv2dConfig::default()
        };
        let projection = embeddings.pp("patch_embeddings").pp("projection");
        Ok(Self {
            cls_token: table("cls_token", 1)?,
            position_embeddings: table("position_embeddings", config.patches() + 1)?,
            projection: projection.conv2d(channels, hidden, patch, stride)?,
            layers: (0..config.num_hidden_layers)
                .map(layer)
                .collect::<Result<_>>()?,
            layernorm: norm(vit.pp("layernorm"))?,
            classifier,
            config,
        })
    }

    /// The logits of the classes; `train` turns the adapters' dropout on.
    ///
    /// # Shapes
    ///
    /// `images` [n, `num_channels`, `image_size`, `image_size`] → [n, `num_labels`].
    ///
    /// # Errors
    ///
    /// Images of another size; a checkpoint without a classifier.
    pub fn forward_t(&self, images: &Tensor, train: bool) -> Result<Tensor> {
        let Some(classifier) = &self.classifier else {
            return Err(Error::Model {
                model: "ViT",
                problem: "its checkpoint has no classifier; take `features`, and a Classifier on \
                          them"
                    .to_string(),
            });
        };
        Ok(classifier.forward_t(&self.features(images, train)?, train)?)
    }

    /// The mean cross entropy of the right classes, in nats.
    ///
    /// # Shapes
    ///
    /// `images` as in [`forward_t`](Self::forward_t), `labels` (n) of u32; → a number.
    ///
    /// # Errors
    ///
    /// As [`forward_t`](Self::forward_t); a label that is no class.
    pub fn loss(&self, images: &Tensor, labels: &Tensor, train: bool) -> Result<Tensor> {
        Ok(ops::cross_entropy(&self.forward_t(images, train)?, labels)?)
    }

    /// The share of images whose likeliest class is the right one, from 0 to 1.
    ///
    /// # Errors
    ///
    /// As [`loss`](Self::loss); no image at all.
    pub fn accuracy(&self, images: &Tensor, labels: &Tensor) -> Result<f64> {
        accuracy("ViT::accuracy", images, labels, |images| {
            self.forward_t(images, false)
        })
    }

    /// The vectors that go into the first layer: the class token's, then those of the patches, row
    /// by row from the top left, each with its position.
    ///
    /// # Shapes
    ///
    /// `images` as in [`forward_t`](Self::forward_t) → [n, patches + 1, `hidden_size`].
    ///
    /// # Errors
    ///
    /// Images of another size.
    pub fn embeddings(&self, images: &Tensor, train: bool) -> Result<Tensor> {
        let (channels, side) = (self.config.num_channels, self.config.image_size);
        let &[n, ..] = images.dims() else {
            return Err(self.refuse_images(images));
        };
        if images.dims() != [n, channels, side, side] {
            return Err(self.refuse_images(images));
        }
        let patches = self.projection.forward_t(images, train)?;
        let patches = patches.flatten_from(2)?.transpose(1, 2)?;
        let class = self
            .cls_token
            .broadcast_as((n, 1, self.config.hidden_size))?;
        let tokens = Tensor::cat(&[&class, &patches], 1)?;
        Ok(tokens.broadcast_add(&self.position_embeddings)?)
    }

    /// An image's vector: what the last layer makes of the class token, normed. The classifier reads
    /// it.
    ///
    /// # Shapes
    ///
    /// `images` as in [`forward_t`](Self::forward_t) → [n, `hidden_size`].
    ///
    /// # Errors
    ///
    /// Images of another size.
    pub fn features(&self, images: &Tensor, train: bool) -> Result<Tensor> {
        let mut h = self.embeddings(images, train)?;
        for layer in &self.layers {
            h = layer.forward(&self.config, &h, train)?;
        }
        self.layernorm.forward(&h.narrow(1, 0, 1)?.squeeze(1)?)
    }

    /// What every head looks at, layer by layer: softmax(q kᵀ / √`head_dim`). Each row sums to 1.
    ///
    /// # Shapes
    ///
    /// `images` as in [`forward_t`](Self::forward_t) → for each layer [n, heads, tokens, tokens],
    /// the query first; tokens = patches + 1, the class token first.
    ///
    /// # Errors
    ///
    /// Images of another size.
    pub fn attentions(&self, images: &Tensor) -> Result<Vec<Tensor>> {
        let mut h = self.embeddings(images, false)?;
        let mut maps = Vec::with_capacity(self.layers.len());
        for layer in &self.layers {
            maps.push(layer.attention_map(&self.config, &h)?);
            h = layer.forward(&self.config, &h, false)?;
        }
        Ok(maps)
    }

    /// The sizes; `num_labels` is 0 where the checkpoint has no classifier.
    #[must_use]
    pub fn config(&self) -> &ViTConfig {
        &self.config
    }

    fn refuse_images(&self, images: &Tensor) -> Error {
        let (channels, side) = (self.config.num_channels, self.config.image_size);
        Error::Model {
            model: "ViT",
            problem: format!(
                "images of shape {:?}; they must be [n, {channels}, {side}, {side}], so resize them \
                 first",
                images.dims()
            ),
        }
    }
}

impl Layer {
    /// q, k and v of normed inputs: [n, tokens, heads, `head_dim`] each.
    fn project(&self, config: &ViTConfig, normed: &Tensor, train: bool) -> Result<[Tensor; 3]> {
        let (n, tokens, _) = normed.dims3()?;
        let shape = (n, tokens, config.num_attention_heads, config.head_dim());
        let heads = |layer: &LoraLinear| -> Result<Tensor> {
            Ok(layer.forward_t(normed, train)?.reshape(shape)?)
        };
        Ok([heads(&self.query)?, heads(&self.key)?, heads(&self.value)?])
    }

    fn forward(&self, config: &ViTConfig, h: &Tensor, train: bool) -> Result<Tensor> {
        let normed = self.layernorm_before.forward(h)?;
        let [q, k, v] = self.project(config, &normed, train)?;
        let scale = config.attention_scale();
        let mixed = ops::attention(&q, &k, &v, scale, &AttentionMask::default())?;
        let mixed = mixed.flatten_from(2)?;
        let h = (h + self.attention_output.forward_t(&mixed, train)?)?;

        let normed = self.layernorm_after.forward(&h)?;
        let inner = self.intermediate.forward_t(&normed, train)?;
        let inner = config.hidden_act.forward(&inner)?;
        Ok((h + self.output.forward_t(&inner, train)?)?)
    }

    fn attention_map(&self, config: &ViTConfig, h: &Tensor) -> Result<Tensor> {
        let normed = self.layernorm_before.forward(h)?;
        let [q, k, _] = self.project(config, &normed, false)?;
        let by_head = |x: Tensor| x.transpose(1, 2)?.contiguous();
        let scores = by_head(q)?.matmul(&by_head(k)?.t()?)?;
        let scores = (scores * config.attention_scale())?;
        Ok(ops::softmax_last_dim(&scores)?)
    }
}

impl Module for ViT {
    fn forward(&self, images: &Tensor) -> candle_core::Result<Tensor> {
        self.forward_t(images, false)
            .map_err(candle_core::Error::wrap)
    }
}

impl fmt::Display for ViT {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.config, f)
    }
}

#[cfg(test)]
mod tests;
