//! Attention from a checkpoint in PyTorch's names.

use candle_core::Tensor;
use candle_nn::Linear;

use super::{AttentionConfig, LoraMultiHeadAttention};
use crate::config::unsupported;
use crate::{LoraBuilder, Result};

impl LoraBuilder<'_> {
    /// Attention from the checkpoint of a torch `nn.MultiheadAttention`, split into the layers
    /// `q_proj`, `k_proj`, `v_proj` and `out_proj` below this place.
    ///
    /// Reads `in_proj_weight`, `out_proj.weight` and, where the checkpoint has them,
    /// `in_proj_bias` and `out_proj.bias`. Each projection takes adapters of its own, so LoRA on
    /// q and v alone is `with_targets(["q_proj", "v_proj"])`. For checkpoints with other names
    /// build four layers with [`linear`](Self::linear) and join them with
    /// [`LoraMultiHeadAttention::new`].
    ///
    /// # Shapes
    ///
    /// `in_proj_weight` (embed_dim + 2 · num_kv_heads · head_dim, embed_dim), with head_dim =
    /// embed_dim / num_heads; `out_proj.weight` (embed_dim, embed_dim).
    ///
    /// # Errors
    ///
    /// A tensor that is missing or has another shape; one bias without the other; `bias_k` and
    /// `bias_v`, which are not supported; what [`LoraMultiHeadAttention::new`] refuses.
    ///
    /// Source: torch `nn/modules/activation.py`, `MultiheadAttention`.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::VarBuilder;
    /// # use lora::{AttentionConfig, LoraBuilder};
    /// let builder = LoraBuilder::new(VarBuilder::zeros(DType::F32, &Device::Cpu));
    /// let attention = builder.pp("self_attn").attention(8, &AttentionConfig::new(4))?;
    /// assert_eq!(attention.head_dim(), 2);
    /// assert_eq!(builder.model()?.layer_names(), [
    ///     "self_attn.k_proj", "self_attn.out_proj", "self_attn.q_proj", "self_attn.v_proj",
    /// ]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn attention(
        &self,
        embed_dim: usize,
        config: &AttentionConfig,
    ) -> Result<LoraMultiHeadAttention> {
        self.attention_with_dims(embed_dim, embed_dim, embed_dim, config)
    }

    /// As [`attention`](Self::attention), with keys and values of their own sizes.
    ///
    /// Where `kdim` or `vdim` is not `embed_dim`, it reads `q_proj_weight`, `k_proj_weight` and
    /// `v_proj_weight` in place of `in_proj_weight`, as torch does.
    ///
    /// # Shapes
    ///
    /// `q_proj_weight` (embed_dim, embed_dim), `k_proj_weight` (num_kv_heads · head_dim, kdim),
    /// `v_proj_weight` (num_kv_heads · head_dim, vdim).
    ///
    /// # Errors
    ///
    /// As [`attention`](Self::attention).
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::VarBuilder;
    /// # use lora::{AttentionConfig, LoraBuilder};
    /// let builder = LoraBuilder::new(VarBuilder::zeros(DType::F32, &Device::Cpu));
    /// let config = AttentionConfig::new(2);
    /// let attention = builder.pp("cross_attn").attention_with_dims(8, 6, 4, &config)?;
    /// assert_eq!(attention.k_proj().map(|layer| layer.in_features()), Some(6));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn attention_with_dims(
        &self,
        embed_dim: usize,
        kdim: usize,
        vdim: usize,
        config: &AttentionConfig,
    ) -> Result<LoraMultiHeadAttention> {
        let place = TorchAttention::new(self, embed_dim, config)?;
        let (rows, vb) = (place.rows(), self.vb());
        let weights = if kdim == embed_dim && vdim == embed_dim {
            let weight = vb.get((place.all_rows(), embed_dim), "in_proj_weight")?;
            cut(&weight, &rows)?
        } else {
            let [q, k, v] = rows;
            [
                vb.get((q, embed_dim), "q_proj_weight")?,
                vb.get((k, kdim), "k_proj_weight")?,
                vb.get((v, vdim), "v_proj_weight")?,
            ]
        };
        let biases = match place.in_bias()? {
            Some(bias) => cut(&bias, &rows)?.map(Some),
            None => [const { None }; 3],
        };
        let out = place.out()?;
        let noted = |at: &str, weight: Tensor, bias| self.pp(at).noted(Linear::new(weight, bias));
        let ([q, k, v], [q_bias, k_bias, v_bias]) = (weights, biases);
        LoraMultiHeadAttention::new(
            &place.name,
            noted("q_proj", q, q_bias)?,
            noted("k_proj", k, k_bias)?,
            noted("v_proj", v, v_bias)?,
            self.pp("out_proj").noted(out)?,
            config,
        )
    }

    /// As [`attention`](Self::attention), with q, k and v in one layer: the form, and the names,
    /// of PEFT's adapters for `nn.MultiheadAttention`.
    ///
    /// The fused layer has the name of this place, such as `layers.0.self_attn`, the other one
    /// PEFT's `layers.0.self_attn.base_layer.out_proj`. PEFT adapts both for the one target
    /// `self_attn`; here name both: `["self_attn", "out_proj"]`.
    ///
    /// # Errors
    ///
    /// As [`attention`](Self::attention); [`Error::Name`](crate::Error::Name) at the root, which has
    /// no name.
    ///
    /// Source: PEFT `tuners/lora/layer.py`, `MultiheadAttention`.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::VarBuilder;
    /// # use lora::{AttentionConfig, LoraBuilder};
    /// let builder = LoraBuilder::new(VarBuilder::zeros(DType::F32, &Device::Cpu));
    /// let attention = builder.pp("self_attn").attention_fused(8, &AttentionConfig::new(4))?;
    /// assert_eq!(attention.in_proj().map(|layer| layer.out_features()), Some(24));
    /// assert_eq!(
    ///     builder.model()?.layer_names(),
    ///     ["self_attn", "self_attn.base_layer.out_proj"]
    /// );
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn attention_fused(
        &self,
        embed_dim: usize,
        config: &AttentionConfig,
    ) -> Result<LoraMultiHeadAttention> {
        let place = TorchAttention::new(self, embed_dim, config)?;
        let shape = (place.all_rows(), embed_dim);
        let weight = self.vb().get(shape, "in_proj_weight")?;
        let (bias, out) = (place.in_bias()?, place.out()?);
        let in_proj = self.noted(Linear::new(weight, bias))?;
        let out = self.pp("base_layer").pp("out_proj").noted(out)?;
        LoraMultiHeadAttention::fused(&place.name, in_proj, out, config)
    }
}

/// Where the tensors of a torch `nn.MultiheadAttention` lie.
struct TorchAttention<'a> {
    builder: &'a LoraBuilder<'a>,
    name: String,
    embed_dim: usize,
    kv_rows: usize,
    biased: bool,
}

impl<'a> TorchAttention<'a> {
    fn new(
        builder: &'a LoraBuilder<'_>,
        embed_dim: usize,
        config: &AttentionConfig,
    ) -> Result<Self> {
        let vb = builder.vb();
        let name = match vb.prefix() {
            empty if empty.is_empty() => "attention".to_string(),
            path => path,
        };
        config.check(&name)?;
        let heads = config.num_heads;
        if embed_dim == 0 || !embed_dim.is_multiple_of(heads) {
            return Err(unsupported(
                &format!("layer {name}: embed_dim = {embed_dim} with num_heads = {heads}"),
                "embed_dim must be a multiple of num_heads",
            ));
        }
        // `VarBuilder::zeros` says yes to every name.
        let honest = !vb.contains_tensor("no tensor has this name");
        if let Some(extra) = ["bias_k", "bias_v"]
            .into_iter()
            .find(|extra| honest && vb.contains_tensor(extra))
        {
            return Err(unsupported(
                &format!("layer {name}: {extra}"),
                "a key and value of the layer's own (torch's add_bias_kv) have no place here",
            ));
        }
        let biased = vb.contains_tensor("in_proj_bias");
        if biased != vb.contains_tensor("out_proj.bias") {
            return Err(unsupported(
                &format!("layer {name}: only one of in_proj_bias and out_proj.bias"),
                "torch has both or none; build the layers one by one for other checkpoints",
            ));
        }
        Ok(Self {
            builder,
            name,
            embed_dim,
            kv_rows: embed_dim / heads * config.num_kv_heads,
            biased,
        })
    }

    fn rows(&self) -> [usize; 3] {
        [self.embed_dim, self.kv_rows, self.kv_rows]
    }

    fn all_rows(&self) -> usize {
        self.embed_dim
            .saturating_add(self.kv_rows.saturating_mul(2))
    }

    fn in_bias(&self) -> Result<Option<Tensor>> {
        Ok(match self.biased {
            true => Some(self.builder.vb().get(self.all_rows(), "in_proj_bias")?),
            false => None,
        })
    }

    fn out(&self) -> Result<Linear> {
        let (size, vb) = (self.embed_dim, self.builder.vb().pp("out_proj"));
        Ok(match self.biased {
            true => candle_nn::linear(size, size, vb)?,
            false => candle_nn::linear_no_bias(size, size, vb)?,
        })
    }
}

/// A tensor in three, by rows.
fn cut(tensor: &Tensor, &[q, k, v]: &[usize; 3]) -> Result<[Tensor; 3]> {
    Ok([
        tensor.narrow(0, 0, q)?,
        tensor.narrow(0, q, k)?,
        tensor.narrow(0, q + k, v)?,
    ])
}
