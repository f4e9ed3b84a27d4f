//! The step of AdamW as one pass over a parameter, its gradient and its moments.

use std::cell::RefCell;
use std::fmt;

use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, DType, InplaceOp2, Layout, Result, Tensor, Var, bail};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use rayon::prelude::*;

use super::cpu::{Real, one_pass, rows_each, slice, vectorised};

/// The moments of a parameter, for steps with the numbers of `candle_nn::AdamW`, which takes them
/// itself where one pass is not to be had.
pub(crate) struct Moments(Kind);

enum Kind {
    F32(Pair<f32>),
    F64(Pair<f64>),
    Candle(AdamW),
}

impl Moments {
    /// Zeros.
    pub(crate) fn new(parameter: &Var) -> Result<Self> {
        let here = one_pass(&[parameter]);
        Ok(Self(match parameter.dtype() {
            DType::F32 if here => Kind::F32(Pair::zeros(parameter.elem_count())),
            DType::F64 if here => Kind::F64(Pair::zeros(parameter.elem_count())),
            _ => Kind::Candle(AdamW::new_lr(vec![parameter.clone()], 0.0)?),
        }))
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
        if let Kind::Candle(adamw) = &mut self.0 {
            let mut gradients = GradStore::default();
            gradients.insert(parameter, gradient.clone());
            adamw.set_params(params.clone());
            return adamw.step(&gradients);
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
            Kind::Candle(adamw) => adamw.fmt(f),
        }
    }
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
