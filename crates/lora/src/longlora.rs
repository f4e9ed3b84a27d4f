//! Fine-tuning on long texts: attention in groups while training, and norms and embeddings that
//! train beside the adapters.
//!
//! Full attention over N tokens costs N² products. LongLoRA trains with attention inside groups of
//! G tokens, which costs N · G, and lets half of the heads see groups that are shifted by G/2, so
//! that neighbours hear of each other from layer to layer. At inference attention is full again.
//!
//! Low-rank adapters alone follow the longer context badly; with the norms and the embedding
//! trained too (LongLoRA+) they come near full fine-tuning. [`trains`] names these tensors:
//!
//! ```
//! use candle_core::{DType, Device};
//! use candle_nn::VarBuilder;
//! use lora::{LoraBuilder, longlora};
//!
//! let vb = VarBuilder::zeros(DType::F32, &Device::Cpu);
//! let b = LoraBuilder::trainable_where(vb, longlora::trains);
//! let _embedding = b.pp("model.embed_tokens").embedding(10, 4)?;
//! let _norm = b.pp("model.layers.0.input_layernorm").vb().get(4, "weight")?;
//! let _q = b.pp("model.layers.0.self_attn.q_proj").linear_no_bias(4, 4)?;
//! let names: Vec<String> = b.variables().into_iter().map(|(name, _)| name).collect();
//! assert_eq!(names, ["model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Source: Chen et al. 2023, arXiv:2309.12307, sections 3.2 and 3.3.

use candle_core::{Device, Tensor};

use crate::ops::{AttentionMask, Groups, attention, grouped_attention};
use crate::{Error, Result};

/// Whether LongLoRA trains the base's tensor of this name, beside the adapters: those of norms and
/// of embeddings. For [`LoraBuilder::trainable_where`](crate::LoraBuilder::trainable_where).
///
/// Source: LongLoRA `fine-tune.py`, `trainable_params = "embed,norm"`.
///
/// ```
/// assert!(lora::longlora::trains("model.norm.weight"));
/// assert!(!lora::longlora::trains("model.layers.0.mlp.up_proj.weight"));
/// ```
#[must_use]
pub fn trains(name: &str) -> bool {
    name.contains("norm") || name.contains("embed")
}

/// How the shifted half of the heads treats the two ends of a text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ends {
    /// The first and the last half group are groups of their own, as in LongLoRA's path with
    /// flash attention.
    #[default]
    Apart,
    /// The last half group and the first one are one group, as in its path without: in that group
    /// the text's first tokens come behind its last ones, and read them. For showing the leak; a
    /// model that trains with it learns to look into the future.
    Wrapped,
}

/// Shifted sparse attention, S²-Attn: causal attention in groups of
/// [`group_size`](Self::group_size) tokens, shifted by half a group for the second half of the
/// heads.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use lora::longlora::ShiftedAttention;
///
/// // Two heads over eight tokens. With an identity for values the output is the weights.
/// let zeros = Tensor::zeros((1, 8, 2, 4), DType::F32, &Device::Cpu)?;
/// let v = Tensor::eye(8, DType::F32, &Device::Cpu)?.reshape((1, 8, 1, 8))?;
/// let v = v.broadcast_as((1, 8, 2, 8))?.contiguous()?;
/// let weights = ShiftedAttention::new(4)?.attention(&zeros, &zeros, &v, 1.0)?;
/// let sees = |head: usize, query: usize| -> candle_core::Result<Vec<f32>> {
///     weights.get(0)?.get(query)?.get(head)?.to_vec1()
/// };
/// assert_eq!(sees(0, 4)?, [0., 0., 0., 0., 1., 0., 0., 0.]); // a group begins
/// assert_eq!(sees(1, 4)?, [0., 0., 1. / 3., 1. / 3., 1. / 3., 0., 0., 0.]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShiftedAttention {
    group_size: usize,
    ends: Ends,
}

impl ShiftedAttention {
    /// Attention in groups of `group_size` tokens, G. The paper takes a quarter of the text.
    ///
    /// # Errors
    ///
    /// A `group_size` that is odd or 0: half of it is the shift.
    pub fn new(group_size: usize) -> Result<Self> {
        if group_size == 0 || !group_size.is_multiple_of(2) {
            return Err(Error::Operation {
                op: "ShiftedAttention",
                given: format!("group_size = {group_size}"),
                wants: "an even number of tokens, for half a group is the shift".into(),
            });
        }
        Ok(Self {
            group_size,
            ends: Ends::default(),
        })
    }

    /// The same with another treatment of the text's ends.
    #[must_use]
    pub fn with_ends(self, ends: Ends) -> Self {
        Self { ends, ..self }
    }

    /// Tokens in a group.
    #[must_use]
    pub fn group_size(&self) -> usize {
        self.group_size
    }

    /// softmax(scale · q kᵀ) v for each head, over the keys of a query's group that are not later.
    ///
    /// The heads from heads / 2 on are the shifted ones. A text need not be a multiple of the group:
    /// its last group is shorter then. On the CPU in f32 and f64 with the ends apart it costs L · G / 2
    /// products instead of L² / 2; elsewhere all are computed, and hidden.
    ///
    /// # Shapes
    ///
    /// As [`attention`], with as many keys as queries: q (batch, L, heads, dim), k and v (batch, L,
    /// kv heads, …); → (batch, L, heads, dim of v).
    ///
    /// # Errors
    ///
    /// As [`attention`]; other numbers of keys than queries; fewer than two heads; with
    /// [`Ends::Wrapped`], a length that is no multiple of the group.
    pub fn attention(&self, q: &Tensor, k: &Tensor, v: &Tensor, scale: f64) -> Result<Tensor> {
        let refuse = |wants: &str| {
            Err(Error::Operation {
                op: "ShiftedAttention",
                given: format!("q {:?}, k {:?}, v {:?}", q.dims(), k.dims(), v.dims()),
                wants: wants.into(),
            })
        };
        let (&[_, length, heads, _], &[_, keys, kv_heads, _], &[_, values, v_heads, _]) =
            (q.dims(), k.dims(), v.dims())
        else {
            return refuse("each must be [batch, length, heads, dim]");
        };
        if keys != length || values != length {
            return refuse("as many keys and values as queries: groups hold all three");
        }
        if heads < 2 || kv_heads == 0 || v_heads != kv_heads || !heads.is_multiple_of(kv_heads) {
            return refuse("two heads or more, a multiple of k's and v's");
        }
        let groups = Groups {
            size: self.group_size,
            shifted_from: heads / 2,
        };
        if self.ends == Ends::Apart {
            return grouped_attention((q, k, v), scale, groups);
        }
        if !length.is_multiple_of(self.group_size) {
            return refuse("with Ends::Wrapped, a length that is a multiple of the group");
        }
        let hidden = self.wrapped(heads, length, q.device())?;
        let mask = AttentionMask {
            causal: false,
            masks: &[&hidden],
        };
        attention(q, k, v, scale, &mask)
    }

    /// 1 where a query must not look: (1, heads, L, L).
    fn wrapped(&self, heads: usize, length: usize, device: &Device) -> Result<Tensor> {
        // The shifted heads see the text rolled by half a group.
        let place = |head: usize, token: usize| match head < heads / 2 {
            true => token,
            false => (token + length - self.group_size / 2) % length,
        };
        let hides = |head, query, key| {
            let (query, key) = (place(head, query), place(head, key));
            u8::from(key > query || key / self.group_size != query / self.group_size)
        };
        let rows = (0..heads).flat_map(|head| (0..length).map(move |query| (head, query)));
        let hidden =
            rows.flat_map(|(head, query)| (0..length).map(move |key| hides(head, query, key)));
        Ok(Tensor::from_iter(hidden, device)?.reshape((1, heads, length, length))?)
    }
}
