//! Shifted sparse attention against attention with the mask that it stands for.

#![allow(clippy::unwrap_used)]

use candle_core::{DType, Device, Tensor, Var};
use lora::longlora::{Ends, ShiftedAttention};
use lora::ops::{AttentionMask, attention};

const SCALE: f64 = 0.5;

fn random(shape: (usize, usize, usize, usize), seed: usize) -> Var {
    let count = shape.0 * shape.1 * shape.2 * shape.3;
    let numbers = (0..count).map(|i| ((i + 1) as f64 * (seed as f64 + 0.7)).sin());
    let t = Tensor::from_iter(numbers, &Device::Cpu).unwrap();
    Var::from_tensor(&t.reshape(shape).unwrap()).unwrap()
}

/// Where each token stands: its group, and its place in the order of that group.
fn place(token: usize, length: usize, group: usize, shifted: bool, wraps: bool) -> (usize, usize) {
    let half = group / 2;
    match (shifted, wraps) {
        (false, _) => (token / group, token),
        (true, false) => ((token + half) / group, token),
        (true, true) => {
            let rolled = (token + length - half) % length;
            (rolled / group, rolled)
        }
    }
}

/// 1 where a query must not look, for each head.
fn mask(length: usize, heads: usize, group: usize, wraps: bool) -> Tensor {
    let mut hidden = Vec::new();
    for head in 0..heads {
        for query in 0..length {
            for key in 0..length {
                let shifted = head >= heads / 2;
                let (group_q, place_q) = place(query, length, group, shifted, wraps);
                let (group_k, place_k) = place(key, length, group, shifted, wraps);
                hidden.push(u8::from(group_q != group_k || place_k > place_q));
            }
        }
    }
    Tensor::from_vec(hidden, (1, heads, length, length), &Device::Cpu).unwrap()
}

fn gap(a: &Tensor, b: &Tensor) -> f64 {
    let gap = (a - b).unwrap().abs().unwrap().max_all().unwrap();
    gap.to_scalar().unwrap()
}

#[test]
fn it_is_attention_with_its_mask_forward_and_backward() {
    for (length, heads, kv_heads, group, ends) in [
        (16, 2, 2, 4, Ends::Apart),
        (16, 4, 2, 8, Ends::Apart),
        // The cut goes through the heads of one key.
        (12, 9, 3, 4, Ends::Apart),
        (12, 3, 1, 4, Ends::Apart),
        // The last group is shorter; there is one group only; there is half a group.
        (19, 2, 1, 6, Ends::Apart),
        (5, 2, 2, 8, Ends::Apart),
        (3, 2, 2, 8, Ends::Apart),
        (1, 2, 2, 2, Ends::Apart),
        // Groups that are no multiple of a tile of queries, and larger than one.
        (300, 2, 1, 96, Ends::Apart),
        (300, 4, 4, 200, Ends::Apart),
        (16, 9, 3, 4, Ends::Wrapped),
        (8, 2, 2, 8, Ends::Wrapped),
    ] {
        let q = random((2, length, heads, 4), 1);
        let k = random((2, length, kv_heads, 4), 2);
        let v = random((2, length, kv_heads, 3), 3);
        let shifted = ShiftedAttention::new(group).unwrap().with_ends(ends);
        let got = shifted.attention(&q, &k, &v, SCALE).unwrap();
        let half = [&q, &k, &v].map(|t| t.as_tensor().to_dtype(DType::F16).unwrap());
        let half = shifted
            .attention(&half[0], &half[1], &half[2], SCALE)
            .unwrap();
        let hidden = mask(length, heads, group, ends == Ends::Wrapped);
        let wanted = AttentionMask {
            causal: false,
            masks: &[&hidden],
        };
        let want = attention(&q, &k, &v, SCALE, &wanted).unwrap();
        let case = format!("{length} tokens, {heads} and {kv_heads} heads, {group}, {ends:?}");
        assert!(gap(&got, &want) < 1e-12, "{case}");
        // In half precision it is made of candle's own operations.
        let half = half.to_dtype(DType::F64).unwrap();
        assert!(gap(&half, &want) < 5e-3, "{case} in f16");
        let weights = random((2, length, heads, 3), 4);
        let loss = |y: &Tensor| (y * weights.as_tensor()).unwrap().sum_all().unwrap();
        let got = loss(&got).backward().unwrap();
        let want = loss(&want).backward().unwrap();
        for (name, var) in [("q", &q), ("k", &k), ("v", &v)] {
            let off = gap(got.get(var).unwrap(), want.get(var).unwrap());
            assert!(off < 1e-12, "{case}, gradient of {name}: {off:e}");
        }
    }
}

/// Which tokens' outputs change when the last token does.
fn touched(ends: Ends) -> Vec<usize> {
    let (length, group) = (16, 8);
    let inputs = |seed| {
        let of = |seed| random((1, length, 2, 4), seed).as_tensor().clone();
        let last = of(seed).narrow(1, length - 1, 1).unwrap();
        [1, 2, 3].map(|part| {
            let kept = of(part).narrow(1, 0, length - 1).unwrap();
            Tensor::cat(&[kept, last.clone()], 1).unwrap()
        })
    };
    let output = |[q, k, v]: [Tensor; 3]| {
        let shifted = ShiftedAttention::new(group).unwrap().with_ends(ends);
        shifted.attention(&q, &k, &v, SCALE).unwrap()
    };
    let change = (output(inputs(10)) - output(inputs(11))).unwrap();
    let change = change
        .abs()
        .unwrap()
        .sum((2, 3))
        .unwrap()
        .squeeze(0)
        .unwrap();
    let change: Vec<f64> = change.to_vec1().unwrap();
    (0..length).filter(|token| change[*token] > 0.0).collect()
}

#[test]
fn the_first_tokens_read_the_last_one_only_where_ends_wrap() {
    assert_eq!(touched(Ends::Apart), [15]);
    assert_eq!(touched(Ends::Wrapped), [0, 1, 2, 3, 15]);
}

#[test]
fn what_does_not_fit_is_refused() {
    for group in [0, 1, 7] {
        let error = ShiftedAttention::new(group).unwrap_err().to_string();
        assert!(error.contains(&format!("group_size = {group}")), "{error}");
    }
    let four = ShiftedAttention::new(4).unwrap();
    assert_eq!(four.group_size(), 4);
    let t = |length, heads| Tensor::zeros((1, length, heads, 2), DType::F32, &Device::Cpu).unwrap();
    let refused = |shifted: ShiftedAttention, q: Tensor, k: Tensor| {
        let error = shifted.attention(&q, &k, &k, 1.0).unwrap_err();
        error.to_string()
    };
    assert!(refused(four, t(8, 2), t(7, 2)).contains("as many keys"));
    assert!(refused(four, t(8, 1), t(8, 1)).contains("two heads"));
    assert!(refused(four, t(8, 4), t(8, 3)).contains("a multiple of k's"));
    assert!(refused(four.with_ends(Ends::Wrapped), t(6, 2), t(6, 2)).contains("Wrapped"));
    assert!(refused(four, t(8, 2).squeeze(0).unwrap(), t(8, 2)).contains("[batch, length"));
}
