//! A small network whose gradient is written out by hand.

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::config::{BESIDE, layer};
use super::{Adapt, MetaConfig};
use crate::{Error, Result};

/// Tensors by name: `network.layers.0.weight`, `network.layers.0.lora_A.weight`, ….
///
/// Each is shared by all tasks, such as a weight of [out, in], or has one value per task, such as
/// [tasks, out, in] (a bias: `[out]` or [tasks, 1, out]).
pub type Parameters = BTreeMap<String, Tensor>;

/// Linear layers with ReLU between them, for many tasks at once, and the gradient of their mean
/// squared error.
///
/// It holds no weights: they are an argument, for they change from one inner step to the next.
#[derive(Clone, Debug)]
pub struct MetaNetwork {
    config: MetaConfig,
}

/// What a forward pass leaves for the backward pass.
struct Pass {
    /// What goes into each layer.
    inputs: Vec<Tensor>,
    /// Ones where the ReLU before the layer lets through, else zeros; the first layer has none.
    masks: Vec<Option<Tensor>>,
    prediction: Tensor,
}

impl MetaNetwork {
    /// The network of these sizes.
    ///
    /// # Errors
    ///
    /// Settings that exclude each other, which the message names.
    pub fn new(config: &MetaConfig) -> Result<Self> {
        config.validate()?;
        Ok(Self {
            config: config.clone(),
        })
    }

    /// What the network says of points.
    ///
    /// # Shapes
    ///
    /// `x` [tasks, n, in] → [tasks, n, out].
    ///
    /// # Errors
    ///
    /// A parameter that is missing; points or parameters of another shape.
    pub fn forward(&self, parameters: &Parameters, x: &Tensor) -> Result<Tensor> {
        Ok(self.pass(parameters, x)?.prediction)
    }

    /// The mean squared error of each task.
    ///
    /// # Shapes
    ///
    /// `x` [tasks, n, in], `y` [tasks, n, out] → `[tasks]`.
    ///
    /// # Errors
    ///
    /// As [`forward`](Self::forward), and values of another shape.
    pub fn errors(&self, parameters: &Parameters, x: &Tensor, y: &Tensor) -> Result<Tensor> {
        let prediction = self.forward(parameters, x)?;
        Ok(difference(&prediction, y)?.sqr()?.mean((1, 2))?)
    }

    /// The gradient of each task's mean squared error, for the tensors that the inner loop moves.
    ///
    /// With δ = ∂error / ∂(output of a layer) and h what goes into it, for each task:
    ///
    /// δ of the last layer = 2 (prediction − y) / numbers in y, and going back
    /// ∂W = δᵀ h, ∂b = Σ δ, δ before = (δ W) · mask of the ReLU.
    ///
    /// A LoRA pair adds s·B·A to W, so with u = h Aᵀ: ∂B = s δᵀ u and ∂A = s (δ B)ᵀ h.
    ///
    /// All of it are ordinary tensor operations: candle can differentiate the result with respect to
    /// the parameters. The masks are constants, as the second derivative of ReLU is 0.
    ///
    /// # Shapes
    ///
    /// `x` [tasks, n, in], `y` [tasks, n, out] → one tensor per adapted parameter, with tasks first.
    ///
    /// # Errors
    ///
    /// As [`errors`](Self::errors).
    pub fn gradients(&self, parameters: &Parameters, x: &Tensor, y: &Tensor) -> Result<Parameters> {
        let pass = self.pass(parameters, x)?;
        let numbers = (y.elem_count() / y.dim(0)?.max(1)) as f64;
        let mut delta = (difference(&pass.prediction, y)? * (2.0 / numbers))?;
        let mut gradients = Parameters::new();
        if let Adapt::Beside { .. } = self.config.adapt {
            self.pair_gradient(BESIDE, parameters, x, &delta, &mut gradients)?;
            return Ok(gradients);
        }
        for (i, (h, mask)) in pass.inputs.iter().zip(&pass.masks).enumerate().rev() {
            let name = layer(i);
            // δ through the layer, from its weight and from its pair
            let weight = get(parameters, &format!("{name}.weight"))?;
            let mut before = mask
                .as_ref()
                .map(|_| delta.broadcast_matmul(weight))
                .transpose()?;
            if self.config.adapt == Adapt::Full {
                gradients.insert(format!("{name}.weight"), delta.t()?.matmul(h)?);
                gradients.insert(format!("{name}.bias"), delta.sum_keepdim(1)?);
            } else {
                let inner = self.pair_gradient(&name, parameters, h, &delta, &mut gradients)?;
                if let Some(sum) = before {
                    let a = get(parameters, &format!("{name}.lora_A.weight"))?;
                    before = Some((sum + inner.broadcast_matmul(a)?)?);
                }
            }
            if let (Some(before), Some(mask)) = (before, mask) {
                delta = (before * mask)?;
            }
        }
        Ok(gradients)
    }

    /// ∂A and ∂B of a pair that h goes into; returns s δ B.
    fn pair_gradient(
        &self,
        name: &str,
        parameters: &Parameters,
        h: &Tensor,
        delta: &Tensor,
        gradients: &mut Parameters,
    ) -> Result<Tensor> {
        let [of_a, of_b] = ["lora_A", "lora_B"].map(|part| format!("{name}.{part}.weight"));
        let (a, b) = (get(parameters, &of_a)?, get(parameters, &of_b)?);
        let delta = (delta * self.config.adapt.scaling())?;
        let inner = delta.broadcast_matmul(b)?;
        gradients.insert(of_a, inner.t()?.matmul(h)?);
        gradients.insert(of_b, delta.t()?.matmul(&h.broadcast_matmul(&a.t()?)?)?);
        Ok(inner)
    }

    /// The forward pass, with all that the backward pass needs.
    fn pass(&self, parameters: &Parameters, x: &Tensor) -> Result<Pass> {
        let sizes = &self.config.layer_sizes;
        if x.rank() != 3 || x.dim(2)? != sizes[0] {
            return Err(refused(format!(
                "points of shape {:?}; they must be [tasks, points, {}]",
                x.dims(),
                sizes[0]
            )));
        }
        let (mut inputs, mut masks) = (Vec::new(), Vec::new());
        let mut h = x.contiguous()?;
        for i in 0..sizes.len() - 1 {
            let mut mask = None;
            if i > 0 {
                // ReLU, as a product with a constant
                let open = h.ge(0.0)?.to_dtype(h.dtype())?;
                h = (h * &open)?;
                mask = Some(open);
            }
            let name = layer(i);
            let weight = get(parameters, &format!("{name}.weight"))?;
            let bias = get(parameters, &format!("{name}.bias"))?;
            let mut out = h.broadcast_matmul(&weight.t()?)?.broadcast_add(bias)?;
            if let Adapt::Lora { .. } = self.config.adapt {
                out = (out + self.pair(&name, parameters, &h)?)?;
            }
            inputs.push(std::mem::replace(&mut h, out));
            masks.push(mask);
        }
        if let Adapt::Beside { .. } = self.config.adapt {
            h = (h + self.pair(BESIDE, parameters, x)?)?;
        }
        Ok(Pass {
            inputs,
            masks,
            prediction: h,
        })
    }

    /// s·h·Aᵀ·Bᵀ
    fn pair(&self, name: &str, parameters: &Parameters, h: &Tensor) -> Result<Tensor> {
        let a = get(parameters, &format!("{name}.lora_A.weight"))?;
        let b = get(parameters, &format!("{name}.lora_B.weight"))?;
        let u = (h.broadcast_matmul(&a.t()?)? * self.config.adapt.scaling())?;
        Ok(u.broadcast_matmul(&b.t()?)?)
    }
}

/// prediction − y, of one shape.
fn difference(prediction: &Tensor, y: &Tensor) -> Result<Tensor> {
    if prediction.dims() != y.dims() {
        return Err(refused(format!(
            "values of shape {:?} for predictions of shape {:?}",
            y.dims(),
            prediction.dims()
        )));
    }
    Ok((prediction - y)?)
}

fn get<'a>(parameters: &'a Parameters, name: &str) -> Result<&'a Tensor> {
    let missing = || refused(format!("there is no parameter {name}"));
    parameters.get(name).ok_or_else(missing)
}

pub(super) fn refused(problem: String) -> Error {
    Error::Model {
        model: "MetaNetwork",
        problem,
    }
}
