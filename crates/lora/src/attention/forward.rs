//! A pass through the layer: projections, masks, attention.

use candle_core::{DType, Tensor};

use super::input::{AttentionInput, AttentionOutput, AttentionWeights};
use super::{InProjection, LoraMultiHeadAttention, Sizes, dims, misfit};
use crate::base::check_input;
use crate::config::unsupported;
use crate::ops::{AttentionMask, attention_with_weights, flat_attention, flat_packed_attention};
use crate::{Error, Result};

/// Queries, keys and values of (N, length, heads · head_dim).
enum Projected {
    Apart(Tensor, Tensor, Tensor),
    /// All of them side by side.
    Packed(Tensor),
}

impl LoraMultiHeadAttention {
    /// One pass; `train` turns the adapters' dropout on.
    ///
    /// [`Module::forward`](candle_nn::Module::forward) is self-attention without masks and with
    /// `train = false`. With [`LoraModel::with_adapters`](crate::LoraModel::with_adapters) each of
    /// the N rows has its own adapter, in either layout.
    ///
    /// # Shapes
    ///
    /// [`AttentionInput`] and [`AttentionOutput`] tell them.
    ///
    /// # Errors
    ///
    /// [`Error::Attention`] for inputs or masks that do not fit each other or hold nothing;
    /// [`Error::Unsupported`] for a mask that is neither of type u8 nor of floats; whatever
    /// [`LoraLayer::forward_t`](crate::LoraLayer::forward_t) refuses.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::Linear;
    /// # use lora::{AttentionConfig, AttentionInput, AttentionWeights, LoraLinear};
    /// # use lora::LoraMultiHeadAttention;
    /// # let frozen = |name: &str, out: usize, inputs: usize| {
    /// #     let weight = Tensor::ones((out, inputs), DType::F32, &Device::Cpu)?;
    /// #     LoraLinear::frozen(name, Linear::new(weight, None))
    /// # };
    /// # let (in_proj, out) = (frozen("attn", 6, 2)?, frozen("attn.out_proj", 2, 2)?);
    /// let config = AttentionConfig::new(1).with_batch_first(true);
    /// let attention = LoraMultiHeadAttention::fused("attn", in_proj, out, &config)?;
    /// let x = Tensor::ones((1, 3, 2), DType::F32, &Device::Cpu)?;
    /// let padding = Tensor::new(&[[0u8, 0, 1]], &Device::Cpu)?;
    /// let answer = attention.forward_t(&AttentionInput {
    ///     key_padding_mask: Some(&padding),
    ///     weights: AttentionWeights::Averaged,
    ///     ..AttentionInput::self_attention(&x)
    /// }, false)?;
    /// assert_eq!(answer.weights.unwrap().to_vec3::<f32>()?, [[[0.5, 0.5, 0.0]; 3]]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn forward_t(&self, input: &AttentionInput<'_>, train: bool) -> Result<AttentionOutput> {
        let sizes = self.check(input)?;
        let answer = self.attend(input, sizes, train);
        answer.map_err(|error| match error {
            Error::Candle(source) => Error::Layer {
                layer: self.name.clone(),
                input: input.query.dims().to_vec(),
                weight: dims(&self.out),
                source: Box::new(source),
            },
            other => other,
        })
    }

    fn check(&self, input: &AttentionInput<'_>) -> Result<Sizes> {
        let (query, key, value) = (input.query, input.key, input.value);
        let named = [("query", query), ("key", key), ("value", value)];
        let layers = match &self.input {
            InProjection::Fused(layer) => [layer; 3],
            InProjection::Separate(layers) => [&layers[0], &layers[1], &layers[2]],
        };
        for ((what, x), layer) in named.into_iter().zip(layers) {
            check_input(layer.name(), &layer.base(), x)?;
            let beside = format!("query {:?}", query.dims());
            let refuse = |wants: &str| {
                let (beside, wants) = (beside.clone(), wants.to_string());
                Err(misfit(&self.name, what, x.dims(), beside, wants))
            };
            if !matches!(x.rank(), 2 | 3) || x.rank() != query.rank() {
                return refuse(if self.config.batch_first {
                    "all inputs must be [N, L, E], or all [L, E]"
                } else {
                    "all inputs must be [L, N, E], or all [L, E]"
                });
            }
            if x.elem_count() == 0 {
                return refuse("every size must be at least 1");
            }
        }
        let batched = query.rank() == 3;
        let size = |x: &Tensor| match (x.dims(), self.config.batch_first) {
            (&[n, l, _], true) | (&[l, n, _], false) => (n, l),
            (other, _) => (1, other[0]),
        };
        let ((n, l), (_, s)) = (size(query), size(key));
        for (what, x) in [("key", key), ("value", value)] {
            if size(x).0 != n {
                let beside = format!("query {:?}", query.dims());
                let wants = format!("both must have {n} rows");
                return Err(misfit(&self.name, what, x.dims(), beside, wants));
            }
        }
        if size(value).1 != s {
            let beside = format!("key {:?}", key.dims());
            let wants = format!("there must be a value for each of the {s} keys");
            return Err(misfit(&self.name, "value", value.dims(), beside, wants));
        }
        Ok(Sizes { batched, n, l, s })
    }

    fn attend(
        &self,
        input: &AttentionInput<'_>,
        sizes: Sizes,
        train: bool,
    ) -> Result<AttentionOutput> {
        let Sizes { batched, n, l, .. } = sizes;
        let heads = (self.config.num_heads, self.config.num_kv_heads);
        let masks = self.masks(input, sizes)?;
        let masks: Vec<&Tensor> = masks.iter().collect();
        let projected = self.project(input, train)?;
        let dim = self.head_dim as f64;
        let scale = self.config.scale.unwrap_or(1.0 / dim.sqrt());
        let (mixed, weights) = match input.weights {
            AttentionWeights::No => {
                let mask = AttentionMask {
                    causal: input.is_causal,
                    masks: &masks,
                };
                let mixed = match &projected {
                    Projected::Packed(qkv) => flat_packed_attention(qkv, heads, scale, &mask)?,
                    Projected::Apart(q, k, v) => flat_attention((q, k, v), heads, scale, &mask)?,
                };
                (mixed, None)
            }
            AttentionWeights::Averaged | AttentionWeights::PerHead => {
                let (q, k, v) = self.by_head(projected)?;
                let (mixed, weights) =
                    attention_with_weights(&q, &k, &v, scale, input.is_causal, &masks)?;
                let mixed = mixed.reshape((n, l, heads.0 * self.head_dim))?;
                (mixed, Some(weights))
            }
        };
        let output = self.out.forward_t(&mixed, train)?;
        let output = match (batched, self.config.batch_first) {
            (false, _) => output.squeeze(0)?,
            (true, true) => output,
            (true, false) => output.transpose(0, 1)?.contiguous()?,
        };
        let own = output.dtype();
        let finish = |weights: Tensor| -> Result<Tensor> {
            let weights = match input.weights {
                AttentionWeights::Averaged => weights.mean(1)?,
                _ => weights,
            };
            let weights = weights.to_dtype(own)?;
            Ok(if batched {
                weights
            } else {
                weights.squeeze(0)?
            })
        };
        Ok(AttentionOutput {
            output,
            weights: weights.map(finish).transpose()?,
        })
    }

    /// Queries [N, L, num_heads, head_dim], keys and values [N, S, num_kv_heads, head_dim].
    fn by_head(&self, projected: Projected) -> Result<(Tensor, Tensor, Tensor)> {
        let split = |y: &Tensor| -> Result<Tensor> {
            let (n, length, features) = y.dims3()?;
            Ok(y.reshape((n, length, features / self.head_dim, self.head_dim))?)
        };
        Ok(match projected {
            Projected::Apart(q, k, v) => (split(&q)?, split(&k)?, split(&v)?),
            Projected::Packed(qkv) => {
                let [q, k, v] = self.parts([&qkv; 3])?;
                (split(&q)?, split(&k)?, split(&v)?)
            }
        })
    }

    /// The features of the queries, the keys and the values of outputs of the fused layer.
    fn parts(&self, [q, k, v]: [&Tensor; 3]) -> Result<[Tensor; 3]> {
        let queries = self.config.num_heads * self.head_dim;
        let keys = self.config.num_kv_heads * self.head_dim;
        Ok([
            q.narrow(2, 0, queries)?,
            k.narrow(2, queries, keys)?,
            v.narrow(2, queries + keys, keys)?,
        ])
    }

    fn project(&self, input: &AttentionInput<'_>, train: bool) -> Result<Projected> {
        let batch_first = |x: &Tensor| -> Result<Tensor> {
            let x = match (x.rank(), self.config.batch_first) {
                (2, _) => x.unsqueeze(0)?,
                (_, true) => x.clone(),
                (_, false) => x.transpose(0, 1)?,
            };
            Ok(x.contiguous()?)
        };
        // Each different tensor once; equal ids below tell which are the same.
        let query = batch_first(input.query)?;
        let key = if input.key.id() == input.query.id() {
            query.clone()
        } else {
            batch_first(input.key)?
        };
        let value = if input.value.id() == input.key.id() {
            key.clone()
        } else if input.value.id() == input.query.id() {
            query.clone()
        } else {
            batch_first(input.value)?
        };
        match &self.input {
            InProjection::Separate(layers) => {
                let [q, k, v] = &**layers;
                Ok(Projected::Apart(
                    q.forward_t(&query, train)?,
                    k.forward_t(&key, train)?,
                    v.forward_t(&value, train)?,
                ))
            }
            InProjection::Fused(layer) => {
                let of_query = layer.forward_t(&query, train)?;
                let of_key = if key.id() == query.id() {
                    of_query.clone()
                } else {
                    layer.forward_t(&key, train)?
                };
                let of_value = if value.id() == key.id() {
                    of_key.clone()
                } else if value.id() == query.id() {
                    of_query.clone()
                } else {
                    layer.forward_t(&value, train)?
                };
                if of_key.id() == of_query.id() && of_value.id() == of_query.id() {
                    return Ok(Projected::Packed(of_query));
                }
                let [q, k, v] = self.parts([&of_query, &of_key, &of_value])?;
                Ok(Projected::Apart(q, k, v))
            }
        }
    }

    /// The masks given, each of a shape that broadcasts over scores [N, num_heads, L, S].
    fn masks(&self, input: &AttentionInput<'_>, sizes: Sizes) -> Result<Vec<Tensor>> {
        let Sizes { batched, n, l, s } = sizes;
        let heads = self.config.num_heads;
        let refuse = |what, mask: &Tensor, wants: String| {
            let (query, key) = (input.query.dims(), input.key.dims());
            let beside = format!("query {query:?} and key {key:?}");
            Err(misfit(&self.name, what, mask.dims(), beside, wants))
        };
        let mut masks = Vec::new();
        if let Some(mask) = input.attn_mask {
            self.check_mask("attn_mask", mask)?;
            masks.push(match mask.dims() {
                [a, b] if (*a, *b) == (l, s) => mask.reshape((1, 1, l, s))?,
                [a, b, c] if (*a, *b, *c) == (n * heads, l, s) => mask.reshape((n, heads, l, s))?,
                _ => {
                    let wants = format!("it must be [{l}, {s}] or [{}, {l}, {s}]", n * heads);
                    return refuse("attn_mask", mask, wants);
                }
            });
        }
        if let Some(mask) = input.key_padding_mask {
            self.check_mask("key_padding_mask", mask)?;
            masks.push(match mask.dims() {
                [a, b] if (*a, *b) == (n, s) => mask.reshape((n, 1, 1, s))?,
                [a] if !batched && *a == s => mask.reshape((1, 1, 1, s))?,
                _ => {
                    let wants = format!("it must be [{n}, {s}]");
                    return refuse("key_padding_mask", mask, wants);
                }
            });
        }
        Ok(masks)
    }

    fn check_mask(&self, what: &str, mask: &Tensor) -> Result<()> {
        if mask.dtype() == DType::U8 || mask.dtype().is_float() {
            return Ok(());
        }
        Err(unsupported(
            &format!("layer {}: {what} of type {:?}", self.name, mask.dtype()),
            "use u8 (1 = not allowed) or floats that are added to the scores",
        ))
    }
}
