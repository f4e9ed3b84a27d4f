//! Attention of candle's own differentiable operations: on cards, in half precision, with weights.

use candle_core::{DType, Device, Tensor};

use crate::Result;
use crate::base::adapter_dtype;

/// The mixed values (batch, L, heads, dim) and the weights (batch, heads, L, S).
///
/// The weights are in f32 for half precision. Each mask broadcasts over the weights.
pub(crate) fn attention_with_weights(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    scale: f64,
    causal: bool,
    masks: &[&Tensor],
) -> Result<(Tensor, Tensor)> {
    let (n, l, heads, dim) = q.dims4()?;
    let (_, s, kv, value_dim) = v.dims4()?;
    let (per_query, own) = (heads / kv, q.dtype());
    let by_head = |x: &Tensor| x.transpose(1, 2)?.contiguous();
    // The query heads of one key head lie together: one product for all of them.
    let q = (by_head(q)? * scale)?.reshape((n, kv, per_query * l, dim))?;
    let scores = q.matmul(&by_head(k)?.t()?)?.reshape((n, heads, l, s))?;
    let mut masks: Vec<Tensor> = masks.iter().map(|&mask| mask.clone()).collect();
    if causal {
        masks.push(later(l, s, q.device())?);
    }
    let weights = masked_softmax(scores.to_dtype(adapter_dtype(own))?, &masks)?;
    let mixed = weights
        .to_dtype(own)?
        .reshape((n, kv, per_query * l, s))?
        .matmul(&by_head(v)?)?
        .reshape((n, heads, l, value_dim))?
        .transpose(1, 2)?
        .contiguous()?;
    Ok((mixed, weights))
}

/// 1 where the key is later than the query: [1, 1, L, S].
fn later(l: usize, s: usize, device: &Device) -> Result<Tensor> {
    let queries = Tensor::arange(0u32, l as u32, device)?.reshape((1, 1, l, 1))?;
    let keys = Tensor::arange(0u32, s as u32, device)?.reshape((1, 1, 1, s))?;
    Ok(keys.broadcast_gt(&queries)?)
}

/// softmax(scores + masks) over the last dimension: 0 for what is not allowed, and 0 throughout
/// where nothing is allowed.
///
/// No infinity takes part in arithmetic that gradients pass through, so none becomes NaN.
fn masked_softmax(mut scores: Tensor, masks: &[Tensor]) -> Result<Tensor> {
    let dtype = scores.dtype();
    let either = |a: Option<Tensor>, b: Tensor| -> Result<Tensor> {
        Ok(match a {
            Some(a) => a.broadcast_maximum(&b)?,
            None => b,
        })
    };
    let mut blocked = None;
    let mut added = false;
    for mask in masks {
        if mask.dtype() == DType::U8 {
            blocked = Some(either(blocked, mask.clone())?);
        } else {
            scores = scores.broadcast_add(&mask.to_dtype(dtype)?)?;
            added = true;
        }
    }
    if added {
        blocked = Some(either(blocked, scores.eq(f64::NEG_INFINITY)?)?);
    }
    let blocked = match blocked {
        Some(blocked) => Some(blocked.broadcast_as(scores.shape())?),
        None => None,
    };
    let replaced = |x: Tensor, by: f64| -> Result<Tensor> {
        Ok(match &blocked {
            Some(blocked) => {
                let by = Tensor::new(by, x.device())?.to_dtype(dtype)?;
                blocked.where_cond(&by.broadcast_as(x.shape())?, &x)?
            }
            None => x,
        })
    };
    let lowest = match dtype {
        DType::F64 => f64::MIN,
        _ => f64::from(f32::MIN),
    };
    let scores = replaced(scores, lowest)?;
    // The shift changes nothing, so no gradient has to pass through it.
    let shift = scores.max_keepdim(3)?.detach();
    let parts = replaced(scores.broadcast_sub(&shift)?.exp()?, 0.0)?;
    let sum = parts.sum_keepdim(3)?;
    // A row with anything in it sums to at least 1.
    let sum = (&sum + sum.eq(0f64)?.to_dtype(dtype)?)?;
    Ok(parts.broadcast_div(&sum)?)
}
