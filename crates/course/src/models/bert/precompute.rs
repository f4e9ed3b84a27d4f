//! The lower layers of a frozen encoder, done once for all passes.

use std::sync::Arc;

use candle_core::{DType, Tensor};
use lora::{LoraEmbedding, LoraLinear};

use super::{Bert, Layer};
use crate::data::Encodings;
use crate::tokenizer::Precomputed;
use crate::{Error, Result};

impl Bert {
    /// The same texts with what the layers below `first` make of them, so that every later pass
    /// begins at `first`, counted from 0.
    ///
    /// Where the layers below do not train, their output is the same in every step: with adapters in
    /// the last two of six layers alone, a step costs about a third. The numbers are those of a whole
    /// pass.
    ///
    /// Takes `hidden_size` floats for each token.
    ///
    /// # Errors
    ///
    /// A `first` above the number of layers, or a layer below it that has an adapter. And when the
    /// texts are used: by a model in which a layer below `first` has an adapter, or other weights
    /// than this one had.
    ///
    /// ```
    /// use course::models::{Bert, BertConfig};
    /// use course::prelude::*;
    /// use course::candle_nn::{VarBuilder, VarMap};
    ///
    /// let config = BertConfig {
    ///     vocab_size: 300, hidden_size: 8, num_hidden_layers: 3, num_attention_heads: 2,
    ///     intermediate_size: 16, max_position_embeddings: 16, ..BertConfig::minilm_l6()
    /// };
    /// let weights = VarMap::new();
    /// let builder = LoraBuilder::new(VarBuilder::from_varmap(&weights, DType::F32, &Device::Cpu));
    /// let bert = Bert::new(&config, &builder)?;
    /// let tokenizer = Tokenizer::train(&["ab"], 257)?;
    /// let texts = Encodings::new(&["a", "bab"], &tokenizer, 16, &Device::Cpu)?;
    ///
    /// let texts = bert.precompute(2, &texts)?;
    /// let upper = LoraConfig {
    ///     layers_to_transform: Some(vec![2]),
    ///     ..LoraConfig::new(2, 4.0).with_targets(["query", "value"])
    /// };
    /// let mut model = builder.model()?;
    /// model.add_adapter("upper", &upper, &mut rng(1))?;
    /// assert_eq!(bert.embed(&texts.batch(&[0, 1])?, false)?.dims(), [2, 8]);
    ///
    /// // This one changes what has been kept.
    /// let all = LoraConfig::new(2, 4.0).with_targets(["query"]);
    /// model.add_adapter("all", &all, &mut rng(1))?;
    /// let error = bert.embed(&texts.batch(&[0, 1])?, false).unwrap_err();
    /// assert!(error.to_string().contains("encoder.layer.0.attention.self.query"));
    /// # Ok::<(), course::Error>(())
    /// ```
    pub fn precompute(&self, first: usize, texts: &Encodings) -> Result<Encodings> {
        self.check_no_adapter_below(first)?;
        let mark = (first, self.mark(first)?);
        texts.precomputed(mark, |batch| {
            Ok(self.forward_to(first, batch, false)?.detach())
        })
    }

    /// Refuses what is no longer what this model's lower layers would give.
    pub(super) fn check_precomputed(&self, kept: &Precomputed) -> Result<()> {
        self.check_no_adapter_below(kept.first)?;
        if self.mark(kept.first)? == kept.made_by {
            return Ok(());
        }
        refuse(format!(
            "the texts were precomputed with other weights below layer {} than the model has now; \
             precompute them again, and train nothing there",
            kept.first
        ))
    }

    fn check_no_adapter_below(&self, first: usize) -> Result<()> {
        let embeddings = [
            &self.word_embeddings,
            &self.position_embeddings,
            &self.token_type_embeddings,
        ];
        let of_embeddings = embeddings.map(|e| (e.name().to_string(), e.adapters()));
        let linears = self.below(first)?.iter().flat_map(Layer::linears);
        let of_linears = linears.map(|linear| (linear.name().to_string(), linear.adapters()));
        let mut all = of_embeddings.into_iter().chain(of_linears);
        match all.find(|(_, adapters)| !adapters.is_empty()) {
            Some((layer, adapters)) => refuse(format!(
                "{layer} has the adapters {adapters:?}, so what the layers below {first} give is not \
                 always the same; adapt layers from {first} on (layers_to_transform), or do not \
                 precompute the texts"
            )),
            None => Ok(()),
        }
    }

    fn below(&self, first: usize) -> Result<&[Layer]> {
        let layers = self.layers.len();
        match self.layers.get(..first) {
            Some(below) => Ok(below),
            None => refuse(format!(
                "there is no layer {first} to begin at, of {layers}"
            )),
        }
    }

    /// A number of every weight and bias below `first`. Training or merging moves all numbers.
    fn mark(&self, first: usize) -> Result<Arc<[u32]>> {
        let table = |table: &LoraEmbedding| table.base().embeddings().clone();
        let mut weights = vec![
            table(&self.position_embeddings),
            table(&self.token_type_embeddings),
        ];
        weights.extend(self.norm.both());
        for layer in self.below(first)? {
            for linear in layer.linears() {
                let base = linear.base();
                weights.push(base.weight().clone());
                weights.extend(base.bias().cloned());
            }
            weights.extend(layer.attention_norm.both());
            weights.extend(layer.output_norm.both());
        }
        weights.iter().map(first_bits).collect()
    }
}

impl Layer {
    fn linears(&self) -> [&LoraLinear; 6] {
        [
            &self.query,
            &self.key,
            &self.value,
            &self.attention_output,
            &self.intermediate,
            &self.output,
        ]
    }
}

/// The bits of a weight's first number.
fn first_bits(weight: &Tensor) -> Result<u32> {
    let mut first = weight.clone();
    while first.rank() > 0 {
        first = first.get(0)?;
    }
    Ok(first.to_dtype(DType::F32)?.to_scalar::<f32>()?.to_bits())
}

fn refuse<T>(problem: String) -> Result<T> {
    Err(Error::Model {
        model: "Bert::precompute",
        problem,
    })
}
