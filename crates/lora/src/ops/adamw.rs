//! The step of AdamW as one pass over a parameter, its gradient and its moments.

use std::cell::RefCell;
use std::fmt;

use candle_core::{CpuStorage, DType, InplaceOp2, Layout, Result, Tensor, Var, WithDType, bail};
use candle_nn::ParamsAdamW;
use rayon::prelude::*;

use super::cpu::{Real, one_pass, rows_each, slice, vectorised};

/// The moments of a parameter, for steps with the numbers of `candle_nn::AdamW`; of candle's
/// operations where one pass is not to be had.
pub(crate) struct Moments(Kind);

enum Kind {
    F32(Pair<f32>),
    F64(Pair<f64>),
    Tensors(Tensor, Tensor),
}

impl Moments {
    /// Zeros.
    pub(crate) fn new(parameter: &Var) -> Result<Self> {
        let here = one_pass(&[parameter]);
        Ok(Self(match parameter.dtype() {
            DType::F32 if here => Kind::F32(Pair::zeros(parameter.elem_count())),
            DType::F64 if here => Kind::F64(Pair::zeros(parameter.elem_count())),
            _ => Kind::Tensors(parameter.zeros_like()?, parameter.zeros_like()?),
        }))
    }

    /// m and v, in the shape, type and place of the parameter that they were made for.
    pub(crate) fn tensors(&self, parameter: &Var) -> Result<[Tensor; 2]> {
        let (shape, device) = (parameter.shape(), parameter.device());
        match &self.0 {
            Kind::F32(Pair { m, v }) => Ok([
                Tensor::from_slice(m, shape, device)?,
                Tensor::from_slice(v, shape, device)?,
            ]),
            Kind::F64(Pair { m, v }) => Ok([
                Tensor::from_slice(m, shape, device)?,
                Tensor::from_slice(v, shape, device)?,
            ]),
            Kind::Tensors(m, v) => Ok([m.copy()?, v.copy()?]),
        }
    }

    /// Takes other numbers, of the parameter's shape and type, for m and v.
    pub(crate) fn set(&mut self, [m, v]: [&Tensor; 2]) -> Result<()> {
        fn numbers<T: WithDType>(t: &Tensor) -> Result<Vec<T>> {
            t.flatten_all()?.to_vec1()
        }
        self.0 = match &self.0 {
            Kind::F32(_) => Kind::F32(Pair {
                m: numbers(m)?,
                v: numbers(v)?,
            }),
            Kind::F64(_) => Kind::F64(Pair {
                m: numbers(m)?,
                v: numbers(v)?,
            }),
            Kind::Tensors(old, _) => {
                let here = |t: &Tensor| t.to_device(old.device())?.copy();
                Kind::Tensors(here(m)?, here(v)?)
            }
        };
        Ok(())
    }

    /// Step `t` = 1, 2, … of the parameter that the moments were made for.
    ///
    /// The gradient must have its shape and type, and not share its storage.
    pub(crate) fn step(
        &mut self,
        parameter: &Var,
        gradient: &Tensor,
        params: &ParamsAdamW,
        t: i32,
    ) -> Result<()> {
        if let Kind::Tensors(m, v) = &mut self.0 {
            return composed(parameter, gradient, (m, v), params, t);
        }
        let moments = RefCell::new(&mut self.0);
        let step = Step { moments, params, t };
        parameter.inplace_op2(&gradient.contiguous()?, &step)
    }
}

impl fmt::Debug for Moments {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Kind::F32(Pair { m, .. }) => write!(f, "Moments[{}; f32]", m.len()),
            Kind::F64(Pair { m, .. }) => write!(f, "Moments[{}; f64]", m.len()),
            Kind::Tensors(m, _) => write!(f, "Moments{m:?}"),
        }
    }
}

/// The step by candle's operations, in its order.
fn composed(
    parameter: &Var,
    g: &Tensor,
    (m, v): (&mut Tensor, &mut Tensor),
    params: &ParamsAdamW,
    t: i32,
) -> Result<()> {
    let ParamsAdamW { beta1, beta2, .. } = *params;
    *m = ((&*m * beta1)? + (g * (1.0 - beta1))?)?;
    *v = ((&*v * beta2)? + (g.sqr()? * (1.0 - beta2))?)?;
    let m_hat = (&*m * (1.0 / (1.0 - beta1.powi(t))))?;
    let v_hat = (&*v * (1.0 / (1.0 - beta2.powi(t))))?;
    let kept = (parameter.as_tensor() * (1.0 - params.lr * params.weight_decay))?;
    let adjusted = (m_hat / (v_hat.sqrt()? + params.eps)?)?;
    parameter.set(&(kept - (adjusted * params.lr)?)?)
}

/// m and v.
struct Pair<T> {
    m: Vec<T>,
    v: Vec<T>,
}

impl<T: Real> Pair<T> {
    fn zeros(len: usize) -> Self {
        Self {
            m: vec![T::zero(); len],
            v: vec![T::zero(); len],
        }
    }

    /// Each number by itself, in candle's order of operations, so that all its bits are candle's.
    fn step(&mut self, theta: &mut [T], g: &[T], params: &ParamsAdamW, t: i32) {
        let Self { m, v } = self;
        assert!(
            theta.len() == g.len() && theta.len() == m.len(),
            "internal: sizes of an AdamW step"
        );
        let ParamsAdamW { beta1, beta2, .. } = *params;
        let (keep_m, new_m) = (T::of(beta1), T::of(1.0 - beta1));
        let (keep_v, new_v) = (T::of(beta2), T::of(1.0 - beta2));
        let scale_m = T::of(1.0 / (1.0 - beta1.powi(t)));
        let scale_v = T::of(1.0 / (1.0 - beta2.powi(t)));
        let keep = T::of(1.0 - params.lr * params.weight_decay);
        let (lr, eps) = (T::of(params.lr), T::of(params.eps));

        let each = rows_each(theta.len(), 1);
        let moments = m.par_chunks_mut(each).zip(v.par_chunks_mut(each));
        let given = theta.par_chunks_mut(each).zip(g.par_chunks(each));
        given.zip(moments).for_each(|((theta, g), (m, v))| {
            vectorised!(|| {
                for (((theta, &g), m), v) in theta.iter_mut().zip(g).zip(m).zip(v) {
                    *m = *m * keep_m + g * new_m;
                    *v = *v * keep_v + g * g * new_v;
                    let adjusted = *m * scale_m / ((*v * scale_v).sqrt() + eps);
                    *theta = *theta * keep - adjusted * lr;
                }
            })
        });
    }
}

struct Step<'a> {
    moments: RefCell<&'a mut Kind>,
    params: &'a ParamsAdamW,
    t: i32,
}

impl InplaceOp2 for Step<'_> {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(
        &self,
        theta: &mut CpuStorage,
        layout: &Layout,
        g: &CpuStorage,
        g_layout: &Layout,
    ) -> Result<()> {
        let Some((start, end)) = layout.contiguous_offsets() else {
            bail!("internal: AdamW got a strided parameter");
        };
        match (&mut **self.moments.borrow_mut(), theta) {
            (Kind::F32(pair), CpuStorage::F32(theta)) => {
                let g = slice(g, g_layout)?;
                pair.step(&mut theta[start..end], g, self.params, self.t);
            }
            (Kind::F64(pair), CpuStorage::F64(theta)) => {
                let g = slice(g, g_layout)?;
                pair.step(&mut theta[start..end], g, self.params, self.t);
            }
            _ => bail!("internal: AdamW got moments of another type"),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use candle_nn::{AdamW, Optimizer};

    use super::*;

    /// What runs on a card, here on the CPU: the numbers of candle's own optimiser.
    #[test]
    fn by_candles_operations_it_is_candles_step() {
        let start = Tensor::new(&[[0.3f32, -2.0], [0.0, 5.0]], &Device::Cpu).unwrap();
        let (ours, theirs) = (
            Var::from_tensor(&start).unwrap(),
            Var::from_tensor(&start).unwrap(),
        );
        let mut params = ParamsAdamW {
            lr: 0.1,
            weight_decay: 0.01,
            ..Default::default()
        };
        let zeros = || start.zeros_like().unwrap();
        let mut moments = Moments(Kind::Tensors(zeros(), zeros()));
        let mut adamw = AdamW::new(vec![theirs.clone()], params.clone()).unwrap();
        for t in 1..=5 {
            params.lr /= 2.0;
            let slope = |var: &Var| (var.sqr().unwrap() * f64::from(t)).unwrap();
            let loss = slope(&theirs).sum_all().unwrap();
            let gradients = loss.backward().unwrap();
            adamw.set_params(params.clone());
            adamw.step(&gradients).unwrap();
            let gradients = slope(&ours).sum_all().unwrap().backward().unwrap();
            let gradient = gradients.get(&ours).unwrap();
            moments.step(&ours, gradient, &params, t).unwrap();
            // A state that goes out and in again changes nothing.
            let [m, v] = moments.tensors(&ours).unwrap();
            moments.set([&m, &v]).unwrap();
        }
        assert_eq!(
            ours.to_vec2::<f32>().unwrap(),
            theirs.to_vec2::<f32>().unwrap()
        );
    }
}
