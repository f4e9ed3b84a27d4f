//! Texts of different lengths as one tensor.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::refused;
use crate::Result;

/// Texts as an encoder reads them: rows of token ids, filled up to the longest one.
#[derive(Clone, Debug)]
pub struct TextBatch {
    /// The ids, [n, length] of u32.
    pub input_ids: Tensor,
    /// 1 where there is a token and 0 where there is padding, [n, length] of u8.
    pub attention_mask: Tensor,
    /// What [`Bert::precompute`](crate::models::Bert::precompute) has kept of the texts.
    pub(crate) precomputed: Option<Precomputed>,
}

/// What the lower layers of a model make of texts.
#[derive(Clone, Debug)]
pub(crate) struct Precomputed {
    /// The first layer that is left to do.
    pub first: usize,
    /// What goes into it: [n, length, size].
    pub hidden: Tensor,
    /// The mark of the weights that made it.
    pub made_by: Arc<[u32]>,
}

impl TextBatch {
    /// Rows of token ids, filled up with the id `pad`.
    ///
    /// # Errors
    ///
    /// No row at all, or one without a token.
    ///
    /// ```
    /// use course::tokenizer::TextBatch;
    /// use course::prelude::*;
    ///
    /// let batch = TextBatch::new(&[vec![7, 8, 9], vec![5]], 0, &Device::Cpu)?;
    /// assert_eq!(batch.input_ids.to_vec2::<u32>()?, [[7, 8, 9], [5, 0, 0]]);
    /// assert_eq!(batch.attention_mask.to_vec2::<u8>()?, [[1, 1, 1], [1, 0, 0]]);
    /// # Ok::<(), course::Error>(())
    /// ```
    pub fn new(rows: &[impl AsRef<[u32]>], pad: u32, device: &Device) -> Result<Self> {
        let lengths = rows.iter().map(|row| row.as_ref().len());
        let (Some(longest), Some(1..)) = (lengths.clone().max(), lengths.min()) else {
            return Err(refused(format!(
                "a batch of {} texts, one of them without a token; leave empty texts out",
                rows.len()
            )));
        };
        let shape = (rows.len(), longest);
        let mut ids = Vec::with_capacity(rows.len() * longest);
        let mut mask = Vec::with_capacity(rows.len() * longest);
        for row in rows {
            let row = row.as_ref();
            ids.extend_from_slice(row);
            mask.resize(mask.len() + row.len(), 1u8);
            ids.resize(ids.len() + longest - row.len(), pad);
            mask.resize(ids.len(), 0);
        }
        Ok(Self {
            input_ids: Tensor::from_vec(ids, shape, device)?,
            attention_mask: Tensor::from_vec(mask, shape, device)?,
            precomputed: None,
        })
    }

    /// How many texts there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.input_ids.dims().first().copied().unwrap_or(0)
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The mean of each text's token vectors, padding left out.
    ///
    /// # Shapes
    ///
    /// h [n, length, size] → [n, size].
    ///
    /// # Errors
    ///
    /// Vectors that are not of this batch.
    ///
    /// ```
    /// use course::tokenizer::TextBatch;
    /// use course::prelude::*;
    ///
    /// let batch = TextBatch::new(&[vec![7, 8], vec![5]], 0, &Device::Cpu)?;
    /// let h = Tensor::new(&[[[1f32], [3.]], [[5.], [100.]]], &Device::Cpu)?;
    /// assert_eq!(batch.mean(&h)?.to_vec2::<f32>()?, [[2.], [5.]]);
    /// # Ok::<(), course::Error>(())
    /// ```
    pub fn mean(&self, h: &Tensor) -> Result<Tensor> {
        let mask = self.attention_mask.to_dtype(DType::F32)?;
        let share = mask.broadcast_div(&mask.sum_keepdim(1)?)?;
        let share = share.to_dtype(h.dtype())?;
        Ok(share.unsqueeze(1)?.matmul(h)?.squeeze(1)?)
    }
}
