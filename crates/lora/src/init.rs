//! How A and B start.

use candle_core::{DType, Device, Shape, Tensor};
use rand::{Rng, RngCore};
use rand_distr::StandardNormal;

use crate::base::{adapter_dtype, sealed::Base};
use crate::{LoraConfig, Result, svd};

/// How A and B start: `init_lora_weights` of PEFT.
///
/// | here | PEFT | A | B | base weight |
/// |---|---|---|---|---|
/// | `Kaiming` | `true` | U(−1/√fan, 1/√fan) | 0 | as it is |
/// | `Gaussian` | `"gaussian"` | N(0, 1/r) | 0 | as it is |
/// | `Orthogonal` | `"orthogonal"` | G₁ Q₁ / 10 | G₂ Q₂ / 10, so that B A = 0 | as it is |
/// | `Pissa` | `"pissa"` | √(Σ/s) Vᵀ | U √(Σ/s) | W − s B A |
/// | `PissaNiter(n)` | `"pissa_niter_n"` | as `Pissa` | as `Pissa` | W − s B A |
/// | `Olora` | `"olora"` | first r rows of R | first r columns of Q | W − s B A |
/// | `Random` | `false` | U(−1/√fan, 1/√fan) | U(−1/√r, 1/√r) | as it is |
///
/// fan is the number of inputs of one output: in, or in · kernel for a convolution. An
/// embedding draws B ~ N(0, 1) and leaves A at zero, as PEFT does. `Orthogonal`, `Pissa` and
/// `Olora` are for linear layers. `PissaNiter` is read from files and computed as `Pissa`: an
/// exact decomposition in place of PEFT's randomised one.
///
/// Source: PEFT `tuners/lora/layer.py`, `reset_lora_parameters`, `pissa_init`, `olora_init`,
/// `orthogonal_init`; PiSSA arXiv:2404.02948; OLoRA arXiv:2406.01775.
///
/// ```
/// use lora::{Init, LoraConfig};
///
/// assert_eq!(LoraConfig::default().init_lora_weights, Init::Kaiming);
/// assert!(Init::Pissa.rewrites_base() && !Init::Gaussian.rewrites_base());
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Init {
    /// A ~ U(−1/√fan, 1/√fan): Kaiming uniform with a = √5, PEFT's `init_lora_weights=True`.
    #[default]
    Kaiming,
    /// A ~ N(0, σ = 1/r), PEFT's `init_lora_weights="gaussian"`.
    Gaussian,
    /// A and B from the two halves of one orthogonal matrix, so that B A = 0; r must be even.
    Orthogonal,
    /// The principal part of W becomes the adapter, the rest the base.
    Pissa,
    /// PEFT's faster, randomised PiSSA; here the exact one.
    PissaNiter(usize),
    /// The first r columns and rows of W = Q R become the adapter, the rest the base.
    Olora,
    /// A and B both random: the fresh layer is not its base. PEFT keeps it for tests.
    Random,
}

impl Init {
    /// Whether the initialisation takes its part out of the base weight.
    ///
    /// ```
    /// assert!(lora::Init::Olora.rewrites_base());
    /// assert!(!lora::Init::Kaiming.rewrites_base());
    /// ```
    #[must_use]
    pub fn rewrites_base(self) -> bool {
        matches!(self, Init::Pissa | Init::PissaNiter(_) | Init::Olora)
    }
}

/// U(−bound, bound) in f64, rounded once, so every type sees the same numbers.
pub(crate) fn uniform(
    shape: &[usize],
    bound: f64,
    dtype: DType,
    device: &Device,
    rng: &mut dyn RngCore,
) -> Result<Tensor> {
    drawn(shape, dtype, device, || {
        bound * (2.0 * rng.random::<f64>() - 1.0)
    })
}

/// N(0, std) in f64, rounded once.
pub(crate) fn normal(
    shape: &[usize],
    std: f64,
    dtype: DType,
    device: &Device,
    rng: &mut dyn RngCore,
) -> Result<Tensor> {
    drawn(shape, dtype, device, || {
        std * rng.sample::<f64, _>(StandardNormal)
    })
}

/// Whether a tensor of this shape is larger than any A or B: 2³² numbers are 16 GiB in f32.
pub(crate) fn too_large(shape: &[usize]) -> bool {
    let count = shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
    count.is_none_or(|n| n > 1 << 32)
}

fn drawn(
    shape: &[usize],
    dtype: DType,
    device: &Device,
    draw: impl FnMut() -> f64,
) -> Result<Tensor> {
    let shape = Shape::from(shape);
    let values: Vec<f64> = std::iter::repeat_with(draw)
        .take(shape.elem_count())
        .collect();
    let drawn = Tensor::from_vec(values, shape, &Device::Cpu)?;
    Ok(drawn.to_dtype(dtype)?.to_device(device)?)
}

/// A and B as an initialisation makes them, on the CPU.
pub(crate) struct Start {
    pub a: Tensor,
    pub b: Tensor,
    /// Whether the pair is to be taken out of the base weight.
    pub rewritten: bool,
}

impl Start {
    pub(crate) fn draw<B: Base>(
        base: &B,
        config: &LoraConfig,
        rng: &mut dyn RngCore,
    ) -> Result<Self> {
        let (r, cpu) = (config.r, Device::Cpu);
        let dtype = adapter_dtype(base.weight().dtype());
        let (a_shape, b_shape) = (base.a_shape(r), base.b_shape(r));
        let zeros = |shape: &[usize]| Tensor::zeros(shape, dtype, &cpu);
        let bound = 1.0 / (base.fan_in() as f64).sqrt();
        if base.is_embedding() {
            let a = match config.init_lora_weights {
                Init::Random => normal(&a_shape, 1.0, dtype, &cpu, rng)?,
                _ => zeros(&a_shape)?,
            };
            let b = normal(&b_shape, 1.0, dtype, &cpu, rng)?;
            return Ok(Self {
                a,
                b,
                rewritten: false,
            });
        }
        let (a, b) = match config.init_lora_weights {
            Init::Kaiming => (
                uniform(&a_shape, bound, dtype, &cpu, rng)?,
                zeros(&b_shape)?,
            ),
            Init::Gaussian => {
                let std = 1.0 / r as f64;
                (normal(&a_shape, std, dtype, &cpu, rng)?, zeros(&b_shape)?)
            }
            Init::Random => {
                // PyTorch's default for B, whose outputs each see r / groups numbers.
                let b_bound = 1.0 / ((r / base.groups()) as f64).sqrt();
                let a = uniform(&a_shape, bound, dtype, &cpu, rng)?;
                (a, uniform(&b_shape, b_bound, dtype, &cpu, rng)?)
            }
            Init::Orthogonal => orthogonal(base.inputs(), base.out(), r, rng)?,
            Init::Pissa | Init::PissaNiter(_) | Init::Olora => {
                let (a, b) = principal(base, config)?;
                return Ok(Self {
                    a,
                    b,
                    rewritten: true,
                });
            }
        };
        Ok(Self {
            a,
            b,
            rewritten: false,
        })
    }
}

/// A = (G₁ Q₁)ᵀ / 10 and B = G₂ Q₂ / 10 from the odd and even rows of one orthogonal matrix.
fn orthogonal(
    inputs: usize,
    out: usize,
    r: usize,
    rng: &mut dyn RngCore,
) -> Result<(Tensor, Tensor)> {
    let (half, cpu) = (r / 2, Device::Cpu);
    let mut gauss = |m, n| normal(&[m, n], 1.0, DType::F64, &cpu, rng);
    let (q, _) = svd::qr(&gauss(r, r)?, r)?;
    let rows = |first: u32| -> Result<Tensor> {
        let index: Vec<u32> = (0..half as u32).map(|i| 2 * i + first).collect();
        Ok(q.contiguous()?
            .index_select(&Tensor::from_vec(index, half, &cpu)?, 0)?)
    };
    let a = (gauss(inputs, half)?.matmul(&rows(0)?)?.t()? / 10.0)?;
    let b = (gauss(out, half)?.matmul(&rows(1)?)? / 10.0)?;
    Ok((a, b))
}

/// The part of W that PiSSA and OLoRA make the adapter of.
fn principal<B: Base>(base: &B, config: &LoraConfig) -> Result<(Tensor, Tensor)> {
    let (r, s) = (config.r, config.scaling());
    let weight = base.to_matrix(&base.weight().dense()?)?;
    if config.init_lora_weights == Init::Olora {
        let (q, upper) = svd::qr(&weight, r)?;
        return Ok((upper, q));
    }
    let (u, sigma, vt) = svd::truncated(&weight, r)?;
    let roots: Vec<f64> = sigma.iter().map(|v| (v / s).sqrt()).collect();
    let roots = Tensor::from_vec(roots, r, &Device::Cpu)?;
    Ok((
        vt.broadcast_mul(&roots.unsqueeze(1)?)?,
        u.broadcast_mul(&roots)?,
    ))
}
