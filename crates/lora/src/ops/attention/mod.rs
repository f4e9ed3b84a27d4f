//! Scaled dot-product attention as one node of the graph.

mod composed;
mod tiles;

pub(crate) use composed::attention_with_weights;

use std::sync::OnceLock;

use candle_core::{CpuStorage, CustomOp1, CustomOp3, DType, Device, Layout, Shape, Tensor, bail};
use num_traits::Zero;

use super::cpu::{Real, for_real, one_pass, read, stored, tensor, written};
use super::given;
use crate::{Error, Result};
use tiles::{Heads, Norms, Sizes, Slots, Wanted, cpu, gathered, with_masks};

/// Which keys a query sees, and what is added to its scores.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use lora::ops::{AttentionMask, attention};
///
/// let q = Tensor::new(&[[[[1f32]], [[1.]]]], &Device::Cpu)?; // one head of size 1
/// let v = Tensor::new(&[[[[2f32]], [[4.]]]], &Device::Cpu)?;
/// let with = |mask: AttentionMask<'_>| -> lora::Result<Vec<f32>> {
///     Ok(attention(&q, &q, &v, 1.0, &mask)?.flatten_all()?.to_vec1()?)
/// };
/// assert_eq!(with(AttentionMask::default())?, [3., 3.]);
/// assert_eq!(with(AttentionMask { causal: true, ..Default::default() })?, [2., 3.]);
/// let padding = Tensor::new(&[[[[1u8, 0]]]], &Device::Cpu)?; // the first key
/// assert_eq!(with(AttentionMask { masks: &[&padding], ..Default::default() })?, [4., 4.]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct AttentionMask<'a> {
    /// Query i sees the keys 0 … i only, whatever L and S are. torch's `is_causal`.
    pub causal: bool,
    /// Masks that broadcast to (batch, heads, L, S), as (batch, 1, 1, S) for padded keys.
    ///
    /// Of type u8: what is not 0 hides the key. Of floats: added to the scores, −∞ hides the key.
    pub masks: &'a [&'a Tensor],
}

/// softmax(scale · q kᵀ + mask) v for each head, with all gradients.
///
/// On the CPU in f32 and f64 the weights exist for a tile of queries and keys at a time, forward
/// and backward: memory grows with L + S and not with L · S. Two numbers for each query are kept
/// for the backward pass. Keys that a causal mask hides cost nothing.
///
/// Head h of the queries reads head h / (heads / kv heads) of the keys and values. A query that
/// sees no key gets an output of 0 and passes no gradient on. In f16 and bf16 the softmax runs in
/// f32. A mask of floats that needs a gradient gets it, by candle's own operations.
///
/// Strides of q, k and v are free but for the last dimension, which must be in one piece or is
/// copied: parts of a fused projection (`narrow`) go in as they are.
///
/// # Shapes
///
/// q (batch, L, heads, dim), k (batch, S, kv heads, dim), v (batch, S, kv heads, dim of v); →
/// (batch, L, heads, dim of v). No transposing: this is the order that projections give.
///
/// # Errors
///
/// [`Error::Operation`] when the tensors do not fit each other or are empty.
///
/// Source: Dao 2023, arXiv:2307.08691, sections 3.1 and 3.2 (FlashAttention-2); Ainslie et al.
/// 2023, arXiv:2305.13245, section 2.2.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use lora::ops::{AttentionMask, attention};
///
/// // Two queries and two keys of one head.
/// let q = Tensor::new(&[[[[1f32, 0.]], [[0., 0.]]]], &Device::Cpu)?;
/// let k = Tensor::new(&[[[[100f32, 7.]], [[0., 7.]]]], &Device::Cpu)?;
/// let v = Var::new(&[[[[1f32, 2.]], [[3., 4.]]]], &Device::Cpu)?;
/// let y = attention(&q, &k, &v, 1.0, &AttentionMask::default())?;
/// // The first query sees the first key only, the second query both alike.
/// assert_eq!(y.squeeze(2)?.to_vec3::<f32>()?, [[[1., 2.], [2., 3.]]]);
///
/// let gradients = y.sum_all()?.backward()?;
/// let dv = gradients.get(&v).unwrap().squeeze(2)?.to_vec3::<f32>()?;
/// assert_eq!(dv, [[[1.5, 1.5], [0.5, 0.5]]]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    scale: f64,
    mask: &AttentionMask<'_>,
) -> Result<Tensor> {
    attend(Given::Apart(q, k, v), checked(q, k, v)?, scale, mask, None)
}

/// The sizes of queries, keys and values that fit each other.
fn checked(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Sizes> {
    let refuse = |wants: String| {
        let given = given(&[("q", q), ("k", k), ("v", v)]);
        let op = "attention";
        Err(Error::Operation { op, given, wants })
    };
    let (&[batch, queries, heads, dim], &[b, keys, kv_heads, d], &[vb, vs, v_heads, value_dim]) =
        (q.dims(), k.dims(), v.dims())
    else {
        return refuse("each must be [batch, length, heads, dim]".to_string());
    };
    if [q, k, v].iter().any(|x| x.elem_count() == 0) {
        return refuse("every size must be at least 1".to_string());
    }
    if (b, d) != (batch, dim) || (vb, vs, v_heads) != (batch, keys, kv_heads) {
        return refuse(format!(
            "k must be [{batch}, {keys}, {kv_heads}, {dim}] and v [{batch}, {keys}, {kv_heads}, …]"
        ));
    }
    if !heads.is_multiple_of(kv_heads) {
        return refuse(format!(
            "q's {heads} heads must be a multiple of k's {kv_heads}"
        ));
    }
    for other in [k, v] {
        if other.dtype() != q.dtype() || !q.dtype().is_float() {
            return refuse("all must be of one type of floats".to_string());
        }
        if !other.device().same_device(q.device()) {
            return refuse("all must be on one device".to_string());
        }
    }
    Ok(Sizes {
        batch,
        queries,
        keys,
        heads,
        kv_heads,
        dim,
        value_dim,
    })
}

/// Groups of tokens, each of which sees those of its own group that are not later.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Groups {
    /// Tokens in a group; the first one and the last one may have fewer.
    pub size: usize,
    /// The groups of the heads from this one on begin half a group later.
    pub shifted_from: usize,
}

impl Groups {
    /// The first token of a query's group, and the first one behind it.
    fn of(self, head: usize, query: usize) -> (usize, usize) {
        let shift = if head < self.shifted_from {
            0
        } else {
            self.size / 2
        };
        let first = (query + shift) / self.size * self.size;
        (first.saturating_sub(shift), first + self.size - shift)
    }

    /// 1 where the key lies before the query's group: (1, heads, L, S).
    fn earlier(self, sizes: &Sizes, device: &Device) -> Result<Tensor> {
        let Sizes {
            heads,
            queries,
            keys,
            ..
        } = *sizes;
        let places = (0..heads).flat_map(|head| (0..queries).map(move |query| (head, query)));
        let firsts = places.map(|(head, query)| self.of(head, query).0 as u32);
        let firsts = Tensor::from_iter(firsts, device)?.reshape((1, heads, queries, 1))?;
        let keys = Tensor::arange(0u32, keys as u32, device)?.reshape((1, 1, 1, keys))?;
        Ok(keys.broadcast_lt(&firsts)?)
    }
}

/// [`attention`] with a causal mask inside of groups: where it is one pass, what lies between them
/// costs nothing.
pub(crate) fn grouped_attention(
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    scale: f64,
    groups: Groups,
) -> Result<Tensor> {
    let sizes = checked(q, k, v)?;
    let mask = AttentionMask {
        causal: true,
        masks: &[],
    };
    attend(Given::Apart(q, k, v), sizes, scale, &mask, Some(groups))
}

/// [`attention`] of queries, keys and values that one projection gives.
///
/// The same as `narrow` and [`attention`]; but the three gradients come as one tensor, where
/// candle would pad each to the size of `qkv` and add them up.
///
/// # Shapes
///
/// `qkv` (batch, L, heads + 2 · `kv_heads`, dim): the heads of the queries, then those of the keys,
/// then those of the values; → (batch, L, heads, dim).
///
/// # Errors
///
/// [`Error::Operation`] when there are too few heads, or the masks do not fit.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use lora::ops::{AttentionMask, packed_attention};
///
/// // One position of one head: a query of 5, a key of 6, a value of 7.
/// let qkv = Var::new(&[[[[5f32], [6.], [7.]]]], &Device::Cpu)?;
/// let y = packed_attention(&qkv, 1, 1.0, &AttentionMask::default())?;
/// assert_eq!(y.flatten_all()?.to_vec1::<f32>()?, [7.]);
/// let gradients = y.backward()?;
/// let gradient = gradients.get(&qkv).unwrap();
/// assert_eq!(gradient.flatten_all()?.to_vec1::<f32>()?, [0., 0., 1.]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn packed_attention(
    qkv: &Tensor,
    kv_heads: usize,
    scale: f64,
    mask: &AttentionMask<'_>,
) -> Result<Tensor> {
    let refuse = |wants: String| {
        let (op, given) = ("packed_attention", given(&[("qkv", qkv)]));
        Err(Error::Operation { op, given, wants })
    };
    let &[batch, queries, all, dim] = qkv.dims() else {
        return refuse("it must be [batch, length, heads, dim]".to_string());
    };
    let heads = all.saturating_sub(kv_heads.saturating_mul(2));
    if kv_heads == 0 || heads == 0 || !heads.is_multiple_of(kv_heads) {
        return refuse(format!(
            "there must be a multiple of {kv_heads} heads beside 2 · {kv_heads} of keys and values"
        ));
    }
    if qkv.elem_count() == 0 || !qkv.dtype().is_float() {
        return refuse("it must hold floats, and every size be at least 1".to_string());
    }
    let sizes = Sizes::packed([batch, queries, dim], (heads, kv_heads));
    attend(Given::Packed(qkv), sizes, scale, mask, None)
}

/// [`attention`] of (batch, length, heads · dim), as projections give them; nothing is checked
/// but the masks.
pub(crate) fn flat_attention(
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    (heads, kv_heads): (usize, usize),
    scale: f64,
    mask: &AttentionMask<'_>,
) -> Result<Tensor> {
    let (batch, queries, features) = q.dims3()?;
    let (_, keys, values) = v.dims3()?;
    let sizes = Sizes {
        batch,
        queries,
        keys,
        heads,
        kv_heads,
        dim: features / heads,
        value_dim: values / kv_heads,
    };
    attend(Given::Apart(q, k, v), sizes, scale, mask, None)
}

/// [`packed_attention`] of (batch, length, (heads + 2 · kv heads) · dim).
pub(crate) fn flat_packed_attention(
    qkv: &Tensor,
    (heads, kv_heads): (usize, usize),
    scale: f64,
    mask: &AttentionMask<'_>,
) -> Result<Tensor> {
    let (batch, queries, features) = qkv.dims3()?;
    let dim = features / (heads + 2 * kv_heads);
    let sizes = Sizes::packed([batch, queries, dim], (heads, kv_heads));
    attend(Given::Packed(qkv), sizes, scale, mask, None)
}

/// Queries, keys and values, with their heads in a dimension of their own or in the last one.
#[derive(Clone, Copy)]
enum Given<'a> {
    Apart(&'a Tensor, &'a Tensor, &'a Tensor),
    Packed(&'a Tensor),
}

fn attend(
    x: Given<'_>,
    sizes: Sizes,
    scale: f64,
    mask: &AttentionMask<'_>,
    groups: Option<Groups>,
) -> Result<Tensor> {
    let (Given::Apart(first, ..) | Given::Packed(first)) = x;
    let over = [sizes.batch, sizes.heads, sizes.queries, sizes.keys];
    for mask in mask.masks {
        let broadcasts = mask.rank() <= 4
            && mask
                .dims()
                .iter()
                .rev()
                .zip(over.iter().rev())
                .all(|(&ours, &wanted)| ours == wanted || ours == 1);
        if !broadcasts || !(mask.dtype() == DType::U8 || mask.dtype().is_float()) {
            return Err(Error::Operation {
                op: "attention",
                given: given(&[("q", first), ("mask", mask)]),
                wants: format!("a mask must be of u8 or floats and broadcast to {over:?}"),
            });
        }
        if !mask.device().same_device(first.device()) {
            return Err(Error::Operation {
                op: "attention",
                given: given(&[("q", first), ("mask", mask)]),
                wants: "both must be on one device".to_string(),
            });
        }
    }
    let learned = mask.masks.iter().any(|mask| mask.track_op());
    let tensors = match x {
        Given::Apart(q, k, v) => vec![q, k, v],
        Given::Packed(qkv) => vec![qkv],
    };
    if learned || !one_pass(&tensors) {
        let Some(groups) = groups else {
            return composed(x, &sizes, scale, mask);
        };
        let earlier = groups.earlier(&sizes, first.device())?;
        let masks = [mask.masks, &[&earlier]].concat();
        let mask = AttentionMask {
            causal: mask.causal,
            masks: &masks,
        };
        return composed(x, &sizes, scale, &mask);
    }
    let masks = mask.masks.iter().map(|mask| {
        let mask = match mask.dtype() {
            DType::U8 => (*mask).clone(),
            _ => mask.to_dtype(first.dtype())?,
        };
        mask.broadcast_as(&over)
    });
    let op = Attention {
        sizes,
        scale,
        causal: mask.causal,
        groups,
        masks: masks.collect::<candle_core::Result<_>>()?,
        norms: OnceLock::new(),
    };
    Ok(match x {
        Given::Apart(q, k, v) => {
            in_one_piece(q)?.apply_op3(&in_one_piece(k)?, &in_one_piece(v)?, op)?
        }
        Given::Packed(qkv) => in_one_piece(qkv)?.apply_op1(op)?,
    })
}

/// A tensor whose last dimension is without gaps.
fn in_one_piece(x: &Tensor) -> Result<Tensor> {
    Ok(match (x.dims().last(), x.stride().last()) {
        (Some(1), _) | (_, Some(1)) => x.clone(),
        _ => x.contiguous()?,
    })
}

/// By candle's operations; the output has as many dimensions as the queries.
fn composed(x: Given<'_>, sizes: &Sizes, scale: f64, mask: &AttentionMask<'_>) -> Result<Tensor> {
    let &Sizes {
        batch,
        queries,
        heads,
        kv_heads,
        dim,
        ..
    } = sizes;
    let by_head = |x: &Tensor, heads: usize| -> Result<Tensor> {
        Ok(match *x.dims() {
            [batch, rows, features] => x.reshape((batch, rows, heads, features / heads))?,
            _ => x.clone(),
        })
    };
    let (q, k, v, rank) = match x {
        Given::Apart(q, k, v) => (
            by_head(q, heads)?,
            by_head(k, kv_heads)?,
            by_head(v, kv_heads)?,
            q.rank(),
        ),
        Given::Packed(qkv) => {
            let all = qkv.reshape((batch, queries, heads + 2 * kv_heads, dim))?;
            (
                all.narrow(2, 0, heads)?,
                all.narrow(2, heads, kv_heads)?,
                all.narrow(2, heads + kv_heads, kv_heads)?,
                qkv.rank(),
            )
        }
    };
    let (mixed, _) = attention_with_weights(&q, &k, &v, scale, mask.causal, mask.masks)?;
    Ok(match rank {
        3 => mixed.reshape((batch, queries, heads * sizes.value_dim))?,
        _ => mixed,
    })
}

struct Attention {
    sizes: Sizes,
    scale: f64,
    causal: bool,
    groups: Option<Groups>,
    /// Over (batch, heads, L, S), of u8 or of the queries' type.
    masks: Vec<Tensor>,
    /// (2, batch · heads · L), what the backward pass needs; see [`Norms`].
    norms: OnceLock<Tensor>,
}

/// The arguments in memory.
type Arguments<'a> = [(&'a CpuStorage, &'a Layout, usize); 3];

impl Attention {
    fn queries(&self) -> usize {
        self.sizes.batch * self.sizes.heads * self.sizes.queries
    }

    /// The output has as many dimensions as the argument that holds the queries.
    fn output_shape(&self, rank: usize) -> Shape {
        let s = &self.sizes;
        match rank {
            3 => (s.batch, s.queries, s.heads * s.value_dim).into(),
            _ => (s.batch, s.queries, s.heads, s.value_dim).into(),
        }
    }

    /// With the arguments, each with its first head.
    fn with<T: Real, R>(
        &self,
        [q, k, v]: Arguments<'_>,
        f: impl FnOnce(tiles::Attention<'_, T>) -> candle_core::Result<R>,
    ) -> candle_core::Result<R> {
        let s = self.sizes;
        with_masks::<T, R>(&self.masks, |masks| {
            f(tiles::Attention {
                sizes: s,
                scale: T::of(self.scale),
                causal: self.causal,
                groups: self.groups,
                masks,
                q: Heads::new(q.0, q.1, q.2, s.dim)?,
                k: Heads::new(k.0, k.1, k.2, s.dim)?,
                v: Heads::new(v.0, v.1, v.2, s.value_dim)?,
            })
        })
    }

    fn forward<T: Real>(
        &self,
        arguments: Arguments<'_>,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (s, queries) = (self.sizes, self.queries());
        let shape = self.output_shape(arguments[0].1.dims().len());
        self.with::<T, _>(arguments, |attention| {
            let mut norms = vec![T::zero(); 2 * queries];
            // SAFETY: the buffers are of the sizes that the slots say, and all is written.
            let output = unsafe {
                written(queries * s.value_dim, |output| {
                    let output = Slots::new(output, s.queries, s.heads, s.value_dim, 0);
                    let (largest, inverse) = norms.split_at_mut(queries);
                    let norms = Norms {
                        largest: Slots::by_head(largest.as_mut_ptr(), s.queries, s.heads, 1),
                        inverse: Slots::by_head(inverse.as_mut_ptr(), s.queries, s.heads, 1),
                    };
                    attention.forward(output, &norms);
                })
            };
            let _ = self.norms.set(tensor(norms, (2, queries))?);
            Ok((stored(output), shape))
        })
    }

    /// The gradients of the queries, the keys and the values, `wanted` or not.
    fn backward<T: Real>(
        &self,
        arguments: Arguments<'_>,
        output: &Tensor,
        gradient: &Tensor,
        grounds: &mut Grounds<T>,
    ) -> candle_core::Result<()> {
        let Some(norms) = self.norms.get() else {
            bail!("internal: attention's backward pass without its forward pass")
        };
        let s = self.sizes;
        self.with::<T, _>(arguments, |attention| {
            let shares = attention.shares();
            let parts = shares.parts;
            // Where several tasks share a key head, each has sums of its own.
            let apart = |ground: &Option<Ground<T>>, dim: usize| {
                let len = s.batch * s.kv_heads * parts * s.keys * dim;
                (ground.is_some() && parts > 1).then(|| vec![T::zero(); len])
            };
            let [q, k, v] = grounds;
            let (mut k_parts, mut v_parts) = (apart(k, s.dim), apart(v, s.value_dim));
            let slots = |ground: &mut Option<Ground<T>>, rows, dim| {
                // SAFETY: a ground is a buffer of that size.
                ground.as_mut().map(|ground| unsafe {
                    Slots::new(ground.start, rows, ground.heads, dim, ground.first)
                })
            };
            let wanted = Wanted {
                q: slots(q, s.queries, s.dim),
                k: slots(k, s.keys, s.dim),
                v: slots(v, s.keys, s.value_dim),
            };
            let by_part = |parts_of: &mut Option<Vec<T>>, whole: Option<Slots<T>>, dim| {
                match parts_of {
                    // SAFETY: the buffer is of that size.
                    Some(buffer) => Some(unsafe {
                        Slots::by_head(buffer.as_mut_ptr(), s.keys, s.kv_heads * parts, dim)
                    }),
                    None => whole,
                }
            };
            let tasks = Wanted {
                q: wanted.q,
                k: by_part(&mut k_parts, wanted.k, s.dim),
                v: by_part(&mut v_parts, wanted.v, s.value_dim),
            };
            read(output, |output| {
                read(gradient, |gradient| {
                    read(norms, |norms| {
                        let packed = |x| Heads::packed(x, s.queries, s.heads, s.value_dim);
                        let norms = norms.split_at(self.queries());
                        // SAFETY: the slots are of the sizes, and those of keys and values zero.
                        unsafe {
                            attention.backward(
                                &shares,
                                packed(output),
                                packed(gradient),
                                norms,
                                &tasks,
                            );
                        }
                        Ok(())
                    })
                })
            })?;
            for (partial, whole, dim) in [
                (&k_parts, wanted.k, s.dim),
                (&v_parts, wanted.v, s.value_dim),
            ] {
                if let (Some(partial), Some(whole)) = (partial, whole) {
                    // SAFETY: as above.
                    unsafe { gathered(partial, &s, parts, dim, whole) };
                }
            }
            Ok(())
        })
    }
}

/// A buffer of zeros for a gradient (batch, rows, heads, dim), and the first head of interest.
struct Ground<T> {
    start: *mut T,
    heads: usize,
    first: usize,
}

/// For the queries, the keys and the values; none for what needs no gradient.
type Grounds<T> = [Option<Ground<T>>; 3];

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let arguments = [(q, q_layout, 0), (k, k_layout, 0), (v, v_layout, 0)];
        for_real!(q, T => self.forward::<T>(arguments))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        output: &Tensor,
        gradient: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let s = &self.sizes;
        let (q_held, k_held, v_held) = (
            q.storage_and_layout(),
            k.storage_and_layout(),
            v.storage_and_layout(),
        );
        let arguments = [
            (cpu(&q_held.0)?, q_held.1, 0),
            (cpu(&k_held.0)?, k_held.1, 0),
            (cpu(&v_held.0)?, v_held.1, 0),
        ];
        for_real!(q, T => {
            let zeros = |x: &Tensor| x.track_op().then(|| vec![T::zero(); x.elem_count()]);
            let mut buffers = [zeros(q), zeros(k), zeros(v)];
            let [dq, dk, dv] = &mut buffers;
            let ground = |buffer: &mut Option<Vec<T>>, heads| {
                buffer.as_mut().map(|buffer| Ground { start: buffer.as_mut_ptr(), heads, first: 0 })
            };
            let mut grounds =
                [ground(dq, s.heads), ground(dk, s.kv_heads), ground(dv, s.kv_heads)];
            self.backward::<T>(arguments, output, gradient, &mut grounds)?;
            let [dq, dk, dv] = buffers;
            let done = |numbers: Option<Vec<T>>, like: &Tensor| {
                numbers.map(|numbers| tensor(numbers, like.shape())).transpose()
            };
            Ok((done(dq, q)?, done(dk, k)?, done(dv, v)?))
        })
    }
}

impl CustomOp1 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        qkv: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (k, v) = (self.sizes.heads, self.sizes.heads + self.sizes.kv_heads);
        let arguments = [(qkv, layout, 0), (qkv, layout, k), (qkv, layout, v)];
        for_real!(qkv, T => self.forward::<T>(arguments))
    }

    fn bwd(
        &self,
        qkv: &Tensor,
        output: &Tensor,
        gradient: &Tensor,
    ) -> candle_core::Result<Option<Tensor>> {
        if !qkv.track_op() {
            return Ok(None);
        }
        let (k, v) = (self.sizes.heads, self.sizes.heads + self.sizes.kv_heads);
        let (storage, layout) = qkv.storage_and_layout();
        let storage = cpu(&storage)?;
        let arguments = [
            (storage, layout, 0),
            (storage, layout, k),
            (storage, layout, v),
        ];
        for_real!(qkv, T => {
            let mut buffer = vec![T::zero(); qkv.elem_count()];
            let start = buffer.as_mut_ptr();
            let heads = v + self.sizes.kv_heads;
            let mut grounds =
                [0, k, v].map(|first| Some(Ground { start, heads, first }));
            self.backward::<T>(arguments, output, gradient, &mut grounds)?;
            tensor(buffer, qkv.shape()).map(Some)
        })
    }
}
