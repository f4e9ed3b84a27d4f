//! ReLU, GELU, SiLU and SwiGLU.

use std::marker::PhantomData;
use std::mem::MaybeUninit;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, DType, Layout, Shape, Tensor};
use rayon::prelude::*;

use super::cpu::{
    Real, filled, for_real, one_pass, read, rows_each, slice, stored, tensor, vectorised,
};
use super::{check_alike, refuse, wide};
use crate::Result;

/// ReLU: y = max(x, 0). The slope at 0 is 1, as candle has it; NaN stays.
///
/// # Shapes
///
/// Any; y has x's.
///
/// # Errors
///
/// [`Error::Operation`](crate::Error::Operation) when x holds no floating-point numbers.
///
/// Source: Glorot et al. 2011, "Deep sparse rectifier neural networks", section 3.
///
/// ```
/// use candle_core::{Device, Var};
/// use lora::ops::relu;
///
/// let x = Var::new(&[-2f32, 0., 3.], &Device::Cpu)?;
/// let y = relu(&x)?;
/// assert_eq!(y.to_vec1::<f32>()?, [0., 0., 3.]);
///
/// let slope = y.sum_all()?.backward()?.get(&x).unwrap().to_vec1::<f32>()?;
/// assert_eq!(slope, [0., 1., 1.]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn relu(x: &Tensor) -> Result<Tensor> {
    apply::<Relu>(x)
}

/// GELU in its tanh form: y = ½ x (1 + tanh(√(2/π) (x + 0.044715 x³))), GPT-2's `gelu_new`.
///
/// PyTorch's `gelu(approximate="tanh")`. Half precision is computed in f32.
///
/// # Shapes
///
/// Any; y has x's.
///
/// # Errors
///
/// [`Error::Operation`](crate::Error::Operation) when x holds no floating-point numbers.
///
/// Source: Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2.
///
/// ```
/// use candle_core::{Device, Var};
/// use lora::ops::gelu;
///
/// let x = Var::new(&[0f64, 1.0, -20.0], &Device::Cpu)?;
/// let y = gelu(&x)?;
/// let [zero, one, far] = y.to_vec1::<f64>()?.try_into().unwrap();
/// assert!(zero == 0.0 && (one - 0.841192).abs() < 1e-6 && far.abs() < 1e-20);
///
/// let slope = y.sum_all()?.backward()?.get(&x).unwrap().to_vec1::<f64>()?;
/// assert!(slope[0] == 0.5 && (slope[1] - 1.082964).abs() < 1e-6);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    apply::<Gelu>(x)
}

/// GELU in its exact form: y = x Φ(x) with Φ the normal distribution, PyTorch's `gelu`.
///
/// Half precision is computed in f32.
///
/// # Shapes
///
/// Any; y has x's.
///
/// # Errors
///
/// [`Error::Operation`](crate::Error::Operation) when x holds no floating-point numbers.
///
/// Source: Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2.
///
/// ```
/// use candle_core::{Device, Var};
/// use lora::ops::gelu_erf;
///
/// let x = Var::new(&[0f64, 1.0, -1.0], &Device::Cpu)?;
/// let y = gelu_erf(&x)?;
/// let [zero, one, minus] = y.to_vec1::<f64>()?.try_into().unwrap();
/// assert!(zero == 0.0 && (one - 0.841345).abs() < 1e-6 && (minus + 0.158655).abs() < 1e-6);
///
/// let slope = y.sum_all()?.backward()?.get(&x).unwrap().to_vec1::<f64>()?;
/// assert!(slope[0] == 0.5 && (slope[1] - 1.083315).abs() < 1e-6);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn gelu_erf(x: &Tensor) -> Result<Tensor> {
    apply::<GeluErf>(x)
}

/// SiLU, also called swish: y = x σ(x) with σ(x) = 1 / (1 + e⁻ˣ).
///
/// Half precision is computed in f32.
///
/// # Shapes
///
/// Any; y has x's.
///
/// # Errors
///
/// [`Error::Operation`](crate::Error::Operation) when x holds no floating-point numbers.
///
/// Source: Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2.
///
/// ```
/// use candle_core::{Device, Var};
/// use lora::ops::silu;
///
/// let x = Var::new(&[0f64, 1.0], &Device::Cpu)?;
/// let y = silu(&x)?;
/// let [zero, one] = y.to_vec1::<f64>()?.try_into().unwrap();
/// assert!(zero == 0.0 && (one - 0.731059).abs() < 1e-6);
///
/// let slope = y.sum_all()?.backward()?.get(&x).unwrap().to_vec1::<f64>()?;
/// assert!(slope[0] == 0.5 && (slope[1] - 0.927671).abs() < 1e-6);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn silu(x: &Tensor) -> Result<Tensor> {
    apply::<Silu>(x)
}

/// y = silu(gate) · up, the middle of a Llama feed-forward layer.
///
/// Half precision is computed in f32.
///
/// # Shapes
///
/// `gate` and `up` alike, any; y has theirs.
///
/// # Errors
///
/// [`Error::Operation`](crate::Error::Operation) when the two differ in shape, type or device, or
/// hold no floating-point numbers.
///
/// Source: Shazeer 2020, arXiv:2002.05202, equation 5.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use lora::ops::swiglu;
///
/// let gate = Var::new(&[0f64, 1.0], &Device::Cpu)?;
/// let up = Tensor::new(&[5f64, 10.0], &Device::Cpu)?;
/// let y = swiglu(&gate, &up)?;
/// let [zero, one] = y.to_vec1::<f64>()?.try_into().unwrap();
/// assert!(zero == 0.0 && (one - 7.31059).abs() < 1e-5);
///
/// let gradients = y.sum_all()?.backward()?;
/// assert_eq!(gradients.get(&gate).unwrap().to_vec1::<f64>()?[0], 2.5);
/// assert!(gradients.get(&up).is_none());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let both = [("gate", gate), ("up", up)];
    check_alike("swiglu", &both)?;
    if gate.dims() != up.dims() {
        return refuse("swiglu", &both, "gate and up must have one shape");
    }
    if one_pass(&[gate, up]) {
        return Ok(gate.contiguous()?.apply_op2(&up.contiguous()?, SwiGlu)?);
    }
    let y = (wide(gate)?.silu()? * wide(up)?)?;
    Ok(y.to_dtype(gate.dtype())?)
}

/// The normal distribution, for [`gelu_erf`].
trait Normal: Real {
    /// Φ(x) and its derivative φ(x), for |x| <= 40.
    fn normal(self) -> (Self, Self);
}

/// 1 / √(2π).
const DENSITY_AT_ZERO: f64 = 0.398_942_280_401_432_7;

impl Normal for f32 {
    #[inline(always)]
    fn normal(self) -> (Self, Self) {
        // The tail beyond |x| is e^(-x²/2) P(w) / (1 + 0.24 |x|) with w = 0.24 |x| / (1 + 0.24 |x|).
        // P is interpolated in the Chebyshev points of 0 <= |x| <= 15: 4e-9 of the tail by itself,
        // 7e-7 with the rounding of f32, and 7e-8 of Φ.
        let a = self.abs() * 0.24;
        let r = 1.0 / (1.0 + a);
        let w = a * r;
        let p = -0.025_770_564_f32;
        let p = p * w + 0.105_908_796;
        let p = p * w - 0.128_429_23;
        let p = p * w - 0.050_760_82;
        let p = p * w + 0.172_164_8;
        let p = p * w + 0.254_901_62;
        let p = p * w - 1.085_789_7;
        let p = p * w + 1.515_775_8;
        let p = p * w - 1.162_26;
        let p = p * w + 0.5;
        let e = (self * self * -0.5).exp_fast();
        let tail = e * (p * r);
        let below = if self > 0.0 { 1.0 - tail } else { tail };
        (below, e * DENSITY_AT_ZERO as f32)
    }
}

impl Normal for f64 {
    #[inline(always)]
    fn normal(self) -> (Self, Self) {
        let erf = candle_core::cpu::erf::erf_f64(self * std::f64::consts::FRAC_1_SQRT_2);
        (
            0.5 * (1.0 + erf),
            (self * self * -0.5).exp() * DENSITY_AT_ZERO,
        )
    }
}

/// x from -40 to 40, beyond which these curves are straight; NaN stays.
#[inline(always)]
fn near<T: Real>(x: T) -> T {
    let (low, high) = (T::of(-40.0), T::of(40.0));
    let x = if x < low { low } else { x };
    if x > high { high } else { x }
}

/// A function of one number.
trait Curve: Send + Sync + 'static {
    const NAME: &'static str;
    fn value<T: Normal>(x: T) -> T;
    fn slope<T: Normal>(x: T) -> T;
    /// The function from candle's operations.
    fn composed(x: &Tensor) -> candle_core::Result<Tensor>;
}

struct Relu;

impl Curve for Relu {
    const NAME: &'static str = "relu";

    #[inline(always)]
    fn value<T: Normal>(x: T) -> T {
        if x < T::zero() { T::zero() } else { x }
    }

    #[inline(always)]
    fn slope<T: Normal>(x: T) -> T {
        let above = if x >= T::zero() { T::one() } else { x };
        if x < T::zero() { T::zero() } else { above }
    }

    fn composed(x: &Tensor) -> candle_core::Result<Tensor> {
        x.relu()
    }
}

struct Gelu;

/// 2 √(2/π), for ½ (1 + tanh z) = σ(2z).
const TWICE: f64 = 1.595_769_121_605_730_7;
const CUBIC: f64 = 0.044_715;

impl Gelu {
    /// σ(2z), and the x it was taken at: farther out it is 0 or 1, and x³ might overflow.
    #[inline(always)]
    fn sigmoid<T: Real>(x: T) -> (T, T) {
        let x = near(x);
        let minus = x * (T::of(-TWICE) - T::of(TWICE * CUBIC) * x * x);
        (T::one() / (T::one() + minus.exp_fast()), x)
    }
}

impl Curve for Gelu {
    const NAME: &'static str = "gelu";

    #[inline(always)]
    fn value<T: Normal>(x: T) -> T {
        x * Self::sigmoid(x).0
    }

    #[inline(always)]
    fn slope<T: Normal>(x: T) -> T {
        let (s, x) = Self::sigmoid(x);
        let inner = T::of(TWICE) + T::of(3.0 * TWICE * CUBIC) * x * x;
        s + x * inner * (s * (T::one() - s))
    }

    fn composed(x: &Tensor) -> candle_core::Result<Tensor> {
        if x.dtype() != DType::F64 {
            return x.gelu();
        }
        // candle's own gradient has constants of six digits.
        let cubic = (x.sqr()?.affine(CUBIC, 1.0)? * x)?;
        let tanh = (cubic * (TWICE / 2.0))?.tanh()?;
        (x * 0.5)?.mul(&(tanh + 1.0)?)
    }
}

struct GeluErf;

impl Curve for GeluErf {
    const NAME: &'static str = "gelu_erf";

    #[inline(always)]
    fn value<T: Normal>(x: T) -> T {
        x * near(x).normal().0
    }

    #[inline(always)]
    fn slope<T: Normal>(x: T) -> T {
        let x = near(x);
        let (below, density) = x.normal();
        below + x * density
    }

    fn composed(x: &Tensor) -> candle_core::Result<Tensor> {
        if x.dtype() != DType::F64 {
            return x.gelu_erf();
        }
        let erf = (x * std::f64::consts::FRAC_1_SQRT_2)?.erf()?;
        (x * 0.5)?.mul(&(erf + 1.0)?)
    }
}

struct Silu;

impl Silu {
    #[inline(always)]
    fn sigmoid<T: Real>(x: T) -> T {
        T::one() / (T::one() + (-x).exp_fast())
    }

    /// The slope where σ(x) is `s`.
    #[inline(always)]
    fn slope_at<T: Real>(x: T, s: T) -> T {
        s + x * (s * (T::one() - s))
    }
}

impl Curve for Silu {
    const NAME: &'static str = "silu";

    #[inline(always)]
    fn value<T: Normal>(x: T) -> T {
        x * Self::sigmoid(x)
    }

    #[inline(always)]
    fn slope<T: Normal>(x: T) -> T {
        Self::slope_at(x, Self::sigmoid(x))
    }

    fn composed(x: &Tensor) -> candle_core::Result<Tensor> {
        x.silu()
    }
}

fn apply<C: Curve>(x: &Tensor) -> Result<Tensor> {
    check_alike(C::NAME, &[("x", x)])?;
    if one_pass(&[x]) {
        return Ok(x.contiguous()?.apply_op1(Activation::<C>(PhantomData))?);
    }
    Ok(C::composed(&wide(x)?)?.to_dtype(x.dtype())?)
}

struct Activation<C>(PhantomData<C>);

impl<C: Curve> CustomOp1 for Activation<C> {
    fn name(&self) -> &'static str {
        C::NAME
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        for_real!(x, T => {
            let y = values::<C, T>(slice(x, layout)?);
            Ok((stored(y), layout.shape().clone()))
        })
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, g: &Tensor) -> candle_core::Result<Option<Tensor>> {
        if !x.track_op() {
            return Ok(None);
        }
        for_real!(g, T => {
            let dx = read(x, |x| read(g, |g| Ok(slopes::<C, T>(x, g))))?;
            tensor(dx, x.shape()).map(Some)
        })
    }
}

/// f(x).
fn values<C: Curve, T: Normal>(x: &[T]) -> Vec<T> {
    let each = rows_each(x.len(), 1);
    let fill = |y: &mut [MaybeUninit<T>]| {
        let pieces = y.par_chunks_mut(each).zip(x.par_chunks(each));
        pieces.for_each(|(y, x)| {
            vectorised!(|| {
                for (y, &x) in y.iter_mut().zip(x) {
                    y.write(C::value(x));
                }
            })
        });
    };
    // SAFETY: the pieces of y and x cover them, and each number of y is written.
    unsafe { filled(x.len(), fill) }
}

/// g f'(x).
fn slopes<C: Curve, T: Normal>(x: &[T], g: &[T]) -> Vec<T> {
    assert_eq!(x.len(), g.len(), "internal: sizes of an activation");
    let each = rows_each(x.len(), 1);
    let fill = |dx: &mut [MaybeUninit<T>]| {
        let given = x.par_chunks(each).zip(g.par_chunks(each));
        dx.par_chunks_mut(each).zip(given).for_each(|(dx, (x, g))| {
            vectorised!(|| {
                for ((dx, &x), &g) in dx.iter_mut().zip(x).zip(g) {
                    dx.write(g * C::slope(x));
                }
            })
        });
    };
    // SAFETY: x and g are as long as dx, and each number of dx is written.
    unsafe { filled(x.len(), fill) }
}

struct SwiGlu;

impl CustomOp2 for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gate_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        for_real!(gate, T => {
            let y = gated::<T>(slice(gate, gate_layout)?, slice(up, up_layout)?);
            Ok((stored(y), gate_layout.shape().clone()))
        })
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _: &Tensor,
        g: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let wanted = (gate.track_op(), up.track_op());
        for_real!(g, T => {
            let (dgate, dup) = read(gate, |gate| {
                read(up, |up| read(g, |g| Ok(gated_backward::<T>(gate, up, g, wanted))))
            })?;
            let shape = gate.shape();
            let dgate = wanted.0.then(|| tensor(dgate, shape)).transpose()?;
            let dup = wanted.1.then(|| tensor(dup, shape)).transpose()?;
            Ok((dgate, dup))
        })
    }
}

/// silu(gate) · up.
fn gated<T: Normal>(gate: &[T], up: &[T]) -> Vec<T> {
    assert_eq!(gate.len(), up.len(), "internal: sizes of swiglu");
    let each = rows_each(gate.len(), 1);
    let fill = |y: &mut [MaybeUninit<T>]| {
        let given = gate.par_chunks(each).zip(up.par_chunks(each));
        y.par_chunks_mut(each)
            .zip(given)
            .for_each(|(y, (gate, up))| {
                vectorised!(|| {
                    for ((y, &gate), &up) in y.iter_mut().zip(gate).zip(up) {
                        y.write(Silu::value(gate) * up);
                    }
                })
            });
    };
    // SAFETY: gate and up are as long as y, and each number of y is written.
    unsafe { filled(gate.len(), fill) }
}

/// The gradients of gate and up; one that is not wanted is empty.
fn gated_backward<T: Normal>(
    gate: &[T],
    up: &[T],
    g: &[T],
    wanted: (bool, bool),
) -> (Vec<T>, Vec<T>) {
    match wanted {
        (true, true) => gated_both(gate, up, g),
        (false, _) => (Vec::new(), gated(gate, g)),
        (true, false) => (gated_gate(gate, up, g), Vec::new()),
    }
}

fn gated_gate<T: Normal>(gate: &[T], up: &[T], g: &[T]) -> Vec<T> {
    assert!(
        gate.len() == up.len() && up.len() == g.len(),
        "internal: sizes of swiglu"
    );
    let each = rows_each(gate.len(), 1);
    let fill = |dgate: &mut [MaybeUninit<T>]| {
        let given = gate
            .par_chunks(each)
            .zip(up.par_chunks(each))
            .zip(g.par_chunks(each));
        let pieces = dgate.par_chunks_mut(each).zip(given);
        pieces.for_each(|(dgate, ((gate, up), g))| {
            vectorised!(|| {
                for (((dgate, &gate), &up), &g) in dgate.iter_mut().zip(gate).zip(up).zip(g) {
                    dgate.write(g * up * Silu::slope(gate));
                }
            })
        });
    };
    // SAFETY: all are as long as dgate, and each of its numbers is written.
    unsafe { filled(gate.len(), fill) }
}

fn gated_both<T: Normal>(gate: &[T], up: &[T], g: &[T]) -> (Vec<T>, Vec<T>) {
    assert!(
        gate.len() == up.len() && up.len() == g.len(),
        "internal: sizes of swiglu"
    );
    let each = rows_each(gate.len(), 1);
    let mut dgate = Vec::new();
    let fill = |dup: &mut [MaybeUninit<T>]| {
        let fill = |dgate: &mut [MaybeUninit<T>]| {
            let given = gate
                .par_chunks(each)
                .zip(up.par_chunks(each))
                .zip(g.par_chunks(each));
            let written = dgate.par_chunks_mut(each).zip(dup.par_chunks_mut(each));
            written
                .zip(given)
                .for_each(|((dgate, dup), ((gate, up), g))| {
                    vectorised!(|| {
                        let written = dgate.iter_mut().zip(dup);
                        for ((((dgate, dup), &gate), &up), &g) in written.zip(gate).zip(up).zip(g) {
                            let s = Silu::sigmoid(gate);
                            dgate.write(g * up * Silu::slope_at(gate, s));
                            dup.write(gate * s * g);
                        }
                    })
                });
        };
        // SAFETY: all are as long as dgate, and each of its numbers is written.
        dgate = unsafe { filled(gate.len(), fill) };
    };
    // SAFETY: the same of dup.
    let dup = unsafe { filled(gate.len(), fill) };
    (dgate, dup)
}
