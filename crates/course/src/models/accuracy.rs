//! How many images a classifier reads rightly.

use candle_core::{D, DType, Tensor};

use crate::{Error, Result};

/// The share of images whose largest logit is that of the right class, from 0 to 1.
///
/// `model` stands in the error of no image at all.
pub(super) fn accuracy(
    model: &'static str,
    images: &Tensor,
    labels: &Tensor,
    logits: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<f64> {
    /// So many at a time keep memory small.
    const CHUNK: usize = 250;
    let n = images.dim(0)?;
    if n == 0 {
        return Err(Error::Model {
            model,
            problem: "there is no image to read".to_string(),
        });
    }
    let mut right = 0.0;
    for start in (0..n).step_by(CHUNK) {
        let count = CHUNK.min(n - start);
        let logits = logits(&images.narrow(0, start, count)?)?;
        let hits = logits
            .argmax(D::Minus1)?
            .eq(&labels.narrow(0, start, count)?)?;
        right += hits.to_dtype(DType::F64)?.sum_all()?.to_scalar::<f64>()?;
    }
    Ok(right / n as f64)
}
