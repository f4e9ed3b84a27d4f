//! What VeRA's layers share.

use candle_core::{DType, Device, Tensor};
use rand::RngCore;

use crate::config::unsupported;
use crate::{Error, Result, init};

/// VeRA's frozen random matrices, shared by all layers: A (r, in) and B (out, r) for the largest
/// layer; the others use the first columns and rows.
///
/// ```
/// use candle_core::{DType, Device};
/// use lora::VeraProjection;
/// use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
///
/// let mut rng = ChaCha8Rng::seed_from_u64(1);
/// let shared = VeraProjection::new(256, 768, 3072, DType::F32, &Device::Cpu, &mut rng)?;
/// assert_eq!((shared.a().dims(), shared.b().dims()), (&[256, 768][..], &[3072, 256][..]));
/// # Ok::<(), lora::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct VeraProjection {
    a: Tensor,
    b: Tensor,
}

impl VeraProjection {
    /// Kaiming-uniform matrices (a = 0), as PEFT draws them, from the given generator.
    ///
    /// # Errors
    ///
    /// [`Error::Rank`] when a size is 0; [`Error::Unsupported`] for matrices too large for any
    /// memory; what candle reports.
    ///
    /// Source: PEFT `tuners/vera/model.py`, `_kaiming_init`.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use lora::VeraProjection;
    /// # use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
    /// # let mut rng = ChaCha8Rng::seed_from_u64(1);
    /// let shared = VeraProjection::new(8, 4, 3, DType::F32, &Device::Cpu, &mut rng)?;
    /// let widest = shared.a().abs()?.max_all()?.to_scalar::<f32>()?;
    /// assert!(widest <= (6f32 / 4.0).sqrt());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn new(
        r: usize,
        in_features: usize,
        out_features: usize,
        dtype: DType,
        device: &Device,
        rng: &mut dyn RngCore,
    ) -> Result<Self> {
        if r == 0 || in_features == 0 || out_features == 0 {
            return Err(Error::Rank);
        }
        if init::too_large(&[r, in_features]) || init::too_large(&[out_features, r]) {
            return Err(unsupported(
                &format!("VeraProjection: r = {r} beside {in_features} → {out_features}"),
                "the shared matrices would be too large; use a smaller r",
            ));
        }
        let bound = |fan: usize| (6.0 / fan as f64).sqrt();
        Ok(Self {
            a: init::uniform(&[r, in_features], bound(in_features), dtype, device, rng)?,
            b: init::uniform(&[out_features, r], bound(r), dtype, device, rng)?,
        })
    }

    /// Matrices that exist already, from a PEFT file: A (r, in), B (out, r).
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] when they are not two matrices of one rank.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use lora::VeraProjection;
    /// # let ones = |shape| Tensor::ones(shape, DType::F32, &Device::Cpu);
    /// assert!(VeraProjection::from_tensors(ones((8, 4))?, ones((3, 8))?).is_ok());
    /// assert!(VeraProjection::from_tensors(ones((8, 4))?, ones((8, 3))?).is_err());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn from_tensors(a: Tensor, b: Tensor) -> Result<Self> {
        match (a.dims(), b.dims()) {
            ([r, _], [_, rank]) if r == rank && *r > 0 => Ok(Self {
                a: a.detach(),
                b: b.detach(),
            }),
            _ => Err(unsupported(
                &format!("VeraProjection: A {:?} with B {:?}", a.dims(), b.dims()),
                "they must be [r, in] and [out, r]",
            )),
        }
    }

    /// A (r, in).
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use lora::VeraProjection;
    /// # let ones = |shape| Tensor::ones(shape, DType::F32, &Device::Cpu);
    /// let shared = VeraProjection::from_tensors(ones((8, 4))?, ones((3, 8))?)?;
    /// assert_eq!(shared.a().dims(), [8, 4]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn a(&self) -> &Tensor {
        &self.a
    }

    /// B (out, r).
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use lora::VeraProjection;
    /// # let ones = |shape| Tensor::ones(shape, DType::F32, &Device::Cpu);
    /// let shared = VeraProjection::from_tensors(ones((8, 4))?, ones((3, 8))?)?;
    /// assert_eq!(shared.b().dims(), [3, 8]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn b(&self) -> &Tensor {
        &self.b
    }

    /// The first columns of A and rows of B, as many as a layer has.
    pub(crate) fn parts(
        &self,
        layer: &str,
        r: usize,
        inputs: usize,
        out: usize,
    ) -> Result<(Tensor, Tensor)> {
        let (a, b) = (self.a.dims(), self.b.dims());
        if a[0] != r || a[1] < inputs || b[0] < out {
            return Err(unsupported(
                &format!(
                    "layer {layer}: VeRA's A {a:?} and B {b:?} beside r = {r}, {inputs} → {out}"
                ),
                "the shared matrices must have the rank and be at least as large as the layer",
            ));
        }
        Ok((
            self.a.narrow(1, 0, inputs)?.contiguous()?,
            self.b.narrow(0, 0, out)?.contiguous()?,
        ))
    }
}
