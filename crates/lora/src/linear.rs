//! The linear layer as a base.

use candle_core::Tensor;
use candle_nn::Linear;

use crate::Result;
use crate::base::{Keys, filled, sealed, stacked};
use crate::ops::{self, Share, lora_shares};

/// A [`candle_nn::Linear`] with trainable low-rank updates beside it.
///
/// y = x Wᵀ + b + s · (x Aᵀ) Bᵀ. See [`LoraLayer`](crate::LoraLayer) for everything it can do.
///
/// # Shapes
///
/// W (out, in), b (out), A (r, in), B (out, r); input (…, in) → output (…, out) for any number
/// of leading dimensions, none included.
///
/// Source: Hu et al. 2021, arXiv:2106.09685, section 4.1, equation 3; PEFT
/// `tuners/lora/layer.py`, `Linear`.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_nn::{Linear, Module};
/// use lora::{LoraConfig, LoraLinear};
/// use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
///
/// let w = Tensor::new(&[[1f32, 2.], [3., 4.], [5., 6.]], &Device::Cpu)?;
/// let mut rng = ChaCha8Rng::seed_from_u64(1);
/// let layer = LoraLinear::new("proj", Linear::new(w, None), &LoraConfig::new(1, 2.0), &mut rng)?;
///
/// // B = 0: the base's own answer.
/// let x = Tensor::new(&[[10f32, 100.]], &Device::Cpu)?;
/// assert_eq!(layer.forward(&x)?.to_vec2::<f32>()?, [[210., 430., 650.]]);
///
/// // s = 2, A = [1, 1], B = [1, 0, 0]ᵀ add 2 · (10 + 100) to the first output.
/// layer.lora_a()?.set(&Tensor::new(&[[1f32, 1.]], &Device::Cpu)?)?;
/// layer.lora_b()?.set(&Tensor::new(&[[1f32], [0.], [0.]], &Device::Cpu)?)?;
/// assert_eq!(layer.forward(&x)?.to_vec2::<f32>()?, [[430., 430., 650.]]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub type LoraLinear = crate::LoraLayer<Linear>;

impl sealed::Base for Linear {
    const LAYER: &'static str = "LoraLinear";
    const KEYS: Keys = Keys::WEIGHTS;

    fn weight(&self) -> &Tensor {
        Linear::weight(self)
    }

    fn bias(&self) -> Option<&Tensor> {
        Linear::bias(self)
    }

    fn with(&self, weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        Ok(Linear::new(weight, bias))
    }

    fn refused_shape(&self) -> Option<&'static str> {
        let good = Linear::weight(self).rank() == 2 && filled(Linear::weight(self));
        (!good).then_some("a matrix [out, in] with both sizes at least 1")
    }

    fn out(&self) -> usize {
        Linear::weight(self).dims()[0]
    }

    fn inputs(&self) -> usize {
        Linear::weight(self).dims()[1]
    }

    fn fan_in(&self) -> usize {
        self.inputs()
    }

    fn refused_input(&self, x: &Tensor) -> Option<String> {
        let wanted = self.inputs();
        let hint = match x.dims() {
            [.., last] if *last == wanted => return None,
            [first, _] if *first == wanted => "; x.t()? would fit",
            [] => "; a scalar has none, unsqueeze it first",
            _ => "",
        };
        Some(format!("the input's last dimension must be {wanted}{hint}"))
    }

    fn flat(&self, x: &Tensor) -> Result<Tensor> {
        let rows = x.elem_count() / self.inputs();
        Ok(x.reshape((rows, self.inputs()))?)
    }

    fn unflat(&self, y: Tensor, x: &Tensor) -> Result<Tensor> {
        let leading = &x.dims()[..x.rank() - 1];
        Ok(y.reshape([leading, &[self.out()]].concat())?)
    }

    fn flat_output(&self, y: &Tensor) -> Result<Tensor> {
        let rows = y.elem_count() / self.out();
        Ok(y.reshape((rows, self.out()))?)
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::linear(x, Linear::weight(self), Linear::bias(self))
    }

    fn whole(&self, x: &Tensor) -> Result<Tensor> {
        sealed::Base::forward(self, x)
    }

    fn with_shares(
        &self,
        x: &Tensor,
        pairs: &[(&Tensor, &Tensor)],
        shares: Vec<Share>,
    ) -> Result<Option<Tensor>> {
        let (weight, bias) = (Linear::weight(self), Linear::bias(self));
        let (a, b) = stacked(pairs)?;
        lora_shares(x, weight, bias, &a, &b, shares)
    }

    fn a_shape(&self, r: usize) -> Vec<usize> {
        vec![r, self.inputs()]
    }

    fn b_shape(&self, r: usize) -> Vec<usize> {
        vec![self.out(), r]
    }

    fn magnitude_shape(&self) -> Vec<usize> {
        vec![self.out()]
    }

    fn down(&self, x: &Tensor, a: &Tensor) -> Result<Tensor> {
        Ok(x.matmul(&a.t()?)?)
    }

    fn up(&self, h: &Tensor, b: &Tensor) -> Result<Tensor> {
        Ok(h.matmul(&b.t()?)?)
    }

    fn to_weight_layout(&self, product: Tensor) -> Result<Tensor> {
        Ok(product)
    }

    fn to_matrix(&self, weight: &Tensor) -> Result<Tensor> {
        Ok(weight.clone())
    }

    fn over_output(&self, v: &Tensor) -> Result<Tensor> {
        Ok(v.clone())
    }

    fn is_linear(&self) -> bool {
        true
    }
}
