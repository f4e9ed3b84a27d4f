//! Dropout with a seed.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::Tensor;
use rand::{Rng, RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::Result;

/// Dropout with a generator of its own: candle's cannot be seeded on the CPU.
#[derive(Debug)]
pub(crate) struct Dropout {
    p: f64,
    rng: Mutex<ChaCha8Rng>,
}

impl Dropout {
    /// Draws a seed from `rng` only where there is something to drop.
    pub(crate) fn new(p: f64, rng: &mut dyn RngCore) -> Option<Arc<Self>> {
        (p > 0.0).then(|| {
            Arc::new(Self {
                p,
                rng: Mutex::new(ChaCha8Rng::seed_from_u64(rng.next_u64())),
            })
        })
    }

    /// x with each number zeroed with probability p, the others divided by 1 − p.
    pub(crate) fn mask(&self, x: &Tensor) -> Result<Tensor> {
        let kept = (1.0 / (1.0 - self.p)) as f32;
        let mut rng = self.rng.lock().unwrap_or_else(PoisonError::into_inner);
        let mask: Vec<f32> = (0..x.elem_count())
            .map(|_| {
                if rng.random::<f64>() < self.p {
                    0.0
                } else {
                    kept
                }
            })
            .collect();
        let mask = Tensor::from_vec(mask, x.shape(), &candle_core::Device::Cpu)?;
        Ok((x * mask.to_dtype(x.dtype())?.to_device(x.device())?)?)
    }
}
