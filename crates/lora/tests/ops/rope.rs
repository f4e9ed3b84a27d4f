use candle_core::{DType, Result, Tensor, Var};
use lora::ops::rope;

use super::common::{
    CPU, Ours, Plain, check, differences, gap, only_what_is_tracked, random, refused, run,
    same_on_any_threads, takes_views, values,
};

/// cos and sin (length, half) of Llama's frequencies.
fn tables(length: usize, half: usize) -> (Tensor, Tensor) {
    let angle = |i: usize| {
        let (position, at) = ((i / half) as f64, (i % half) as f64);
        position * 10_000f64.powf(-at / half as f64)
    };
    let angles: Vec<f64> = (0..length * half).map(angle).collect();
    let angles = Tensor::from_vec(angles, (length, half), &CPU).unwrap();
    (angles.cos().unwrap(), angles.sin().unwrap())
}

/// Llama's own form: x · [cos, cos] + rotate_half(x) · [sin, sin].
fn plain(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let half = x.dim(3)? / 2;
    let twice = |t: &Tensor| Tensor::cat(&[t, t], 1)?.unsqueeze(1);
    let turned = [x.narrow(3, half, half)?.neg()?, x.narrow(3, 0, half)?];
    let turned = Tensor::cat(&turned, 3)?;
    x.broadcast_mul(&twice(cos)?)? + turned.broadcast_mul(&twice(sin)?)?
}

#[test]
fn rope_is_the_composition() {
    for [batch, length, heads, dim] in [
        [1, 1, 1, 2],
        [2, 3, 2, 6],
        [1, 5, 3, 14],
        [2, 4, 3, 64],
        [2, 33, 5, 66],
        [3, 7, 9, 128],
    ] {
        let (cos, sin) = tables(length, dim / 2);
        let x = random(&[batch, length, heads, dim], 3.0, 1);
        // The tables are rounded with x, so that both sides turn by the same angles.
        for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
            let rounded = |t: &Tensor| t.to_dtype(dtype).unwrap();
            let (x, cos, sin) = (rounded(&x), rounded(&cos), rounded(&sin));
            let wide = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
            let (y, dx) = run(
                &|x| rope(&x[0], &cos, &sin),
                std::slice::from_ref(&x),
                &[true],
            );
            let plain: Plain<'_> = &|x| plain(&x[0], &wide(&cos), &wide(&sin));
            let (forward, backward) = match dtype {
                DType::F64 => (1e-15, 1e-15),
                DType::F32 => (2e-7, 2e-7),
                DType::F16 => (6e-4, 6e-4),
                _ => (5e-3, 5e-3),
            };
            let off = gap(&y, &plain(&[wide(&x)]).unwrap());
            assert!(off <= forward, "{dtype:?}: {off:e}");
            let x = Var::from_tensor(&wide(&x)).unwrap();
            let g = random(y.dims(), 1.0, 77).to_dtype(dtype).unwrap();
            let y = plain(&[x.as_tensor().clone()]).unwrap();
            let wanted = (y * wide(&g))
                .unwrap()
                .sum_all()
                .unwrap()
                .backward()
                .unwrap();
            let off = gap(dx[0].as_ref().unwrap(), wanted.get(&x).unwrap());
            assert!(off <= backward, "{dtype:?}: gradient {off:e}");
        }
    }
}

#[test]
fn rope_takes_what_the_others_take() {
    let (cos, sin) = tables(3, 4);
    let x = [random(&[2, 3, 2, 8], 2.0, 2)];
    let ours: Ours<'_> = &|x| rope(&x[0], &cos, &sin);
    differences("rope", &x, ours);
    only_what_is_tracked("rope", &x, ours);
    takes_views("rope", &x, ours);
    let (cos, sin) = tables(31, 32);
    let x = [random(&[3, 31, 5, 64], 2.0, 3)];
    same_on_any_threads("rope", &x, &|x| rope(&x[0], &cos, &sin));
}

#[test]
fn rope_takes_strided_tables() {
    let (cos, sin) = tables(5, 4);
    let x = random(&[2, 5, 3, 8], 2.0, 4);
    let want = rope(&x, &cos, &sin).unwrap();
    let strided = |t: &Tensor| t.t().unwrap().contiguous().unwrap().t().unwrap();
    let y = rope(&x, &strided(&cos), &strided(&sin)).unwrap();
    assert_eq!(values(&y), values(&want));
    let (longer_cos, longer_sin) = tables(9, 4);
    let part = |t: &Tensor| t.narrow(0, 0, 5).unwrap();
    let y = rope(&x, &part(&longer_cos), &part(&longer_sin)).unwrap();
    assert_eq!(values(&y), values(&want));
}

#[test]
fn tables_that_train_get_gradients() {
    let (cos, sin) = tables(3, 4);
    let all = [random(&[2, 3, 2, 8], 2.0, 5), cos, sin];
    let ours: Ours<'_> = &|x| rope(&x[0], &x[1], &x[2]);
    check("rope of variables", &all, ours, &|x| {
        plain(&x[0], &x[1], &x[2])
    });
}

#[test]
fn tables_of_another_type_are_taken_over() {
    let (cos, sin) = tables(3, 4);
    let x = random(&[2, 3, 2, 8], 2.0, 6).to_dtype(DType::F32).unwrap();
    let y = rope(&x, &cos, &sin).unwrap();
    assert_eq!(y.dtype(), DType::F32);
    let single = |t: &Tensor| t.to_dtype(DType::F32).unwrap();
    assert_eq!(
        values(&y),
        values(&rope(&x, &single(&cos), &single(&sin)).unwrap())
    );
    // Tables in f32 beside half precision lose nothing.
    let x = x.to_dtype(DType::BF16).unwrap();
    let y = rope(&x, &single(&cos), &single(&sin)).unwrap();
    assert_eq!(y.dtype(), DType::BF16);
    let want = plain(&x.to_dtype(DType::F64).unwrap(), &cos, &sin).unwrap();
    assert!(gap(&y, &want) < 4e-3);
}

#[test]
fn rope_refuses_by_name() {
    let (cos, sin) = tables(3, 4);
    let x = random(&[2, 3, 2, 8], 1.0, 1);
    refused(
        rope(&x.narrow(1, 0, 2).unwrap(), &cos, &sin),
        &["rope", "cos [3, 4]", "[2, 4]"],
    );
    refused(
        rope(&x, &cos, &sin.narrow(1, 0, 3).unwrap()),
        &["sin [3, 3]", "[3, 4]"],
    );
    refused(
        rope(&x.narrow(3, 0, 7).unwrap(), &cos, &sin),
        &["x [2, 3, 2, 7]", "even"],
    );
    refused(
        rope(&x.flatten(0, 1).unwrap(), &cos, &sin),
        &["batch, length, heads, dim"],
    );
    let ids = Tensor::zeros((2, 3, 2, 8), DType::U32, &CPU).unwrap();
    refused(rope(&ids, &cos, &sin), &["rope", "U32"]);
    let whole = cos.to_dtype(DType::U32).unwrap();
    refused(rope(&x, &whole, &sin), &["cos [3, 4] of U32"]);
    assert_eq!(
        rope(&x.narrow(2, 0, 0).unwrap(), &cos, &sin)
            .unwrap()
            .dims(),
        [2, 3, 0, 8]
    );
}
