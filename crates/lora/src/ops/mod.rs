//! Differentiable operations as one pass: the LoRA products, of linear layers and of convolutions,
//! and what a network needs beside them.
//!
//! candle builds these from many small operations, each with a buffer of its own forward and two
//! or three backward, or has a fused version that cuts the gradient (`candle_nn::ops::layer_norm`,
//! `rms_norm`, `softmax_last_dim`, `rotary_emb::rope`). Here each is one node of the graph with its
//! own backward pass, on all cores, with the CPU's widest vectors, and computes no gradient that
//! nothing asks for.
//!
//! That holds for f32 and f64 on the CPU. On a card, in half precision, and where second
//! derivatives are asked for (`CANDLE_GRAD_DO_NOT_DETACH=1`, candle's own switch, set before a
//! thread's first use), every function falls back to candle's differentiable operations with the
//! same result.

mod activation;
mod adamw;
mod attention;
mod convolution;
mod cpu;
mod cross_entropy;
mod frozen;
mod gradient;
mod linear;
mod linear_4bit;
mod linear_cross_entropy;
mod mse;
mod norm;
mod pool;
mod rope;
mod softmax;

pub use activation::{gelu, gelu_erf, relu, silu, swiglu};
pub(crate) use adamw::Moments;
pub use attention::{AttentionMask, attention, packed_attention};
pub(crate) use attention::{
    Groups, attention_with_weights, flat_attention, flat_packed_attention, grouped_attention,
};
pub(crate) use convolution::{How, convolution, convolution_shares};
pub use convolution::{conv1d, conv2d, lora_conv2d};
pub use cross_entropy::{IGNORE_INDEX, cross_entropy};
pub(crate) use gradient::{plus_scaled, scaled, square_norms};
pub(crate) use linear::{Share, lora_shares};
pub use linear::{linear, lora_linear};
pub use linear_4bit::linear_4bit;
pub use linear_cross_entropy::linear_cross_entropy;
pub use mse::mse_loss;
pub use norm::{layer_norm, rms_norm};
pub use pool::avg_pool2d;
pub use rope::rope;
pub use softmax::{causal_softmax, softmax_last_dim};

use candle_core::{DType, Tensor};

use crate::{Error, Result};

/// Tensors by name, with shape and type, for a message.
fn given(tensors: &[(&str, &Tensor)]) -> String {
    let described: Vec<String> = tensors
        .iter()
        .map(|(name, t)| format!("{name} {:?} of {:?}", t.dims(), t.dtype()))
        .collect();
    described.join(", ")
}

/// The error of tensors that do not fit.
fn refuse<T>(op: &'static str, tensors: &[(&str, &Tensor)], wants: impl Into<String>) -> Result<T> {
    Err(Error::Operation {
        op,
        given: given(tensors),
        wants: wants.into(),
    })
}

/// Refuses tensors that are not of one floating-point type on one device.
fn check_alike(op: &'static str, tensors: &[(&str, &Tensor)]) -> Result<()> {
    let first = tensors[0].1;
    if !first.dtype().is_float() || tensors.iter().any(|(_, t)| t.dtype() != first.dtype()) {
        return refuse(op, tensors, "all must be of one floating-point type");
    }
    if tensors
        .iter()
        .any(|(_, t)| !t.device().same_device(first.device()))
    {
        return refuse(op, tensors, "all must be on one device");
    }
    Ok(())
}

/// Half precision in f32, as PyTorch computes such operations; f32 and f64 as they are.
fn wide(x: &Tensor) -> candle_core::Result<Tensor> {
    match x.dtype() {
        DType::F32 | DType::F64 => Ok(x.clone()),
        _ => x.to_dtype(DType::F32),
    }
}
