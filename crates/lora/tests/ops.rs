//! Every one-pass operation against the plain composition of candle's operations, and against
//! finite differences: values, gradients, odd sizes, strided inputs, extremes, and what is refused.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "ops/activation.rs"]
mod activation;
#[path = "ops/attention.rs"]
mod attention;
#[path = "ops/common.rs"]
mod common;
#[path = "ops/convolution.rs"]
mod convolution;
#[path = "ops/linear.rs"]
mod linear;
#[path = "ops/loss.rs"]
mod loss;
#[path = "ops/norm.rs"]
mod norm;
#[path = "ops/rope.rs"]
mod rope;
#[path = "ops/second_order.rs"]
mod second_order;
#[path = "ops/softmax.rs"]
mod softmax;
