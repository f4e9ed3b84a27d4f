//! What the class token has gathered, and from where.

use candle_core::Tensor;

use super::ViT;
use crate::Result;

impl ViT {
    /// How much of each patch the class token has gathered after the last layer.
    ///
    /// With Aₗ the mean of a layer's heads, Ãₗ is Aₗ + I with rows that sum to 1 again, since the
    /// residual connection carries each token on beside what attention brings. The rollout is the
    /// class token's row of Ã_L … Ã₂ Ã₁. What is missing to a sum of 1 is the class token's own share.
    ///
    /// # Shapes
    ///
    /// `images` as in [`forward_t`](Self::forward_t) → [n, side, side], rows from top to bottom.
    ///
    /// # Errors
    ///
    /// Images of another size.
    ///
    /// Source: Abnar and Zuidema 2020, arXiv:2005.00928, section 3.
    ///
    /// ```
    /// use course::prelude::*;
    /// use course::candle_nn::VarBuilder;
    ///
    /// let config = ViTConfig::fashion();
    /// let weights = config.random_weights(&mut rng(1), &Device::Cpu)?.into_iter().collect();
    /// let builder = LoraBuilder::new(VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu));
    /// let vit = ViT::new(&config, &builder)?;
    /// let images = data::fashion(&Device::Cpu)?.test.take(2)?.images;
    /// let shares = vit.attention_rollout(&images)?;
    /// assert_eq!(shares.dims(), [2, config.side(), config.side()]);
    /// assert!(shares.get(0)?.sum_all()?.to_scalar::<f32>()? < 1.0);
    /// # Ok::<(), course::Error>(())
    /// ```
    pub fn attention_rollout(&self, images: &Tensor) -> Result<Tensor> {
        let n = images.dim(0)?;
        let (tokens, side) = (self.config.patches() + 1, self.config.side());
        // The class token's row of the identity, to which the last layer comes first.
        let mut row = vec![0f32; tokens];
        row[0] = 1.0;
        let row = Tensor::new(row, images.device())?.to_dtype(images.dtype())?;
        let mut row = row.broadcast_as((n, 1, tokens))?.contiguous()?;
        for map in self.attentions(images)?.iter().rev() {
            // Rows of A sum to 1, so those of A + I sum to 2.
            row = ((row.matmul(&map.mean(1)?)? + &row)? / 2.0)?;
        }
        Ok(row.narrow(2, 1, tokens - 1)?.reshape((n, side, side))?)
    }
}
