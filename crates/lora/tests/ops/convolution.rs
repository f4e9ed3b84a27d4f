use candle_core::{DType, Tensor, Var};
use candle_nn::{Conv1dConfig, Conv2d, Conv2dConfig};
use lora::ops::{avg_pool2d, conv1d, conv2d, lora_conv2d};
use lora::{BASE_ROW, Init, LoraConfig, LoraConv2d, LoraModel};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use super::common::{
    CPU, Ours, Plain, check, check_one_pass, differences, gap, only_what_is_tracked,
    only_what_is_tracked_in, random, refused, run, same_on_any_threads, takes_views,
    takes_views_within, values,
};

/// The sizes of one case: channels, kernel, how it goes, and what it goes over.
#[derive(Clone, Copy, Debug)]
struct Case {
    batch: usize,
    inputs: usize,
    out: usize,
    kernel: [usize; 2],
    stride: usize,
    padding: usize,
    dilation: usize,
    groups: usize,
    input: [usize; 2],
}

const fn case(
    [batch, inputs, out]: [usize; 3],
    kernel: [usize; 2],
    [stride, padding, dilation, groups]: [usize; 4],
    input: [usize; 2],
) -> Case {
    Case {
        batch,
        inputs,
        out,
        kernel,
        stride,
        padding,
        dilation,
        groups,
        input,
    }
}

const CASES: [Case; 18] = [
    case([1, 1, 1], [1, 1], [1, 0, 1, 1], [1, 1]),
    case([2, 3, 5], [3, 3], [1, 1, 1, 1], [5, 6]),
    // Remainders that differ between height and width.
    case([3, 2, 4], [3, 3], [2, 1, 1, 1], [5, 6]),
    case([2, 4, 6], [3, 2], [2, 1, 2, 2], [7, 6]),
    // Shorter than the padding.
    case([2, 2, 3], [3, 3], [4, 2, 1, 1], [1, 1]),
    case([2, 2, 2], [2, 2], [1, 3, 1, 1], [2, 1]),
    // Columns and rows of the input that nothing sees, and of the kernel that see nothing.
    case([2, 1, 2], [1, 1], [3, 0, 1, 1], [7, 8]),
    case([1, 2, 2], [3, 3], [1, 2, 2, 1], [2, 2]),
    case([2, 3, 4], [2, 3], [3, 2, 1, 1], [9, 10]),
    // One group for each input.
    case([3, 4, 8], [2, 2], [1, 0, 2, 4], [5, 5]),
    case([2, 6, 6], [3, 3], [1, 1, 1, 3], [6, 4]),
    // Its own patches, whole and grouped, and not quite.
    case([3, 5, 4], [1, 1], [1, 0, 1, 1], [6, 7]),
    case([2, 4, 6], [1, 1], [1, 0, 1, 2], [30, 40]),
    case([2, 4, 6], [1, 1], [1, 1, 1, 2], [3, 4]),
    // Several images in one product, with some left over.
    case([27, 8, 12], [3, 3], [2, 1, 1, 1], [7, 7]),
    case([19, 4, 6], [3, 3], [1, 1, 1, 2], [5, 4]),
    // Several products for one image.
    case([1, 64, 6], [3, 3], [1, 1, 1, 1], [28, 26]),
    case([3, 48, 8], [3, 3], [2, 1, 1, 4], [41, 40]),
];

impl Case {
    fn config(self) -> Conv2dConfig {
        Conv2dConfig {
            stride: self.stride,
            padding: self.padding,
            dilation: self.dilation,
            groups: self.groups,
            ..Default::default()
        }
    }

    /// x, W and b.
    fn base(self) -> [Tensor; 3] {
        let [kh, kw] = self.kernel;
        let w = [self.out, self.inputs / self.groups, kh, kw];
        let x = [self.batch, self.inputs, self.input[0], self.input[1]];
        [
            random(&x, 1.0, 1),
            random(&w, 1.0, 2),
            random(&[self.out], 1.0, 3),
        ]
    }

    /// A and B of rank r · groups.
    fn pair(self, r: usize) -> [Tensor; 2] {
        let [kh, kw] = self.kernel;
        [
            random(&[r * self.groups, self.inputs, kh, kw], 1.0, 4),
            random(&[self.out, r, 1, 1], 1.0, 5),
        ]
    }
}

/// The definition: every output place looks its patch up.
fn plain(
    x: &Tensor,
    w: &Tensor,
    padding: [usize; 2],
    [stride, dilation, groups]: [usize; 3],
) -> candle_core::Result<Tensor> {
    let ((batch, inputs, _, _), (out, _, kh, kw)) = (x.dims4()?, w.dims4()?);
    let x = x.pad_with_zeros(2, padding[0], padding[0])?;
    let x = x.pad_with_zeros(3, padding[1], padding[1])?;
    let (_, _, height, width) = x.dims4()?;
    let places = |size: usize, k: usize| (size - dilation * (k - 1) - 1) / stride + 1;
    let (oh, ow) = (places(height, kh), places(width, kw));
    let mut seen = Vec::new();
    for (ky, kx) in (0..kh).flat_map(|ky| (0..kw).map(move |kx| (ky, kx))) {
        for (oy, ox) in (0..oh).flat_map(|oy| (0..ow).map(move |ox| (oy, ox))) {
            let (y, x) = (oy * stride + ky * dilation, ox * stride + kx * dilation);
            seen.push((y * width + x) as u32);
        }
    }
    let seen = Tensor::new(seen, &CPU)?;
    let patches = x.flatten_from(2)?.index_select(&seen, 2)?;
    let patches = patches.reshape((batch, inputs * kh * kw, oh * ow))?;
    let (patches, kernels) = (
        patches.chunk(groups, 1)?,
        w.flatten_from(1)?.chunk(groups, 0)?,
    );
    let outputs = patches.iter().zip(&kernels).map(|(patches, kernel)| {
        kernel
            .broadcast_left(batch)?
            .contiguous()?
            .matmul(&patches.contiguous()?)
    });
    let outputs = outputs.collect::<candle_core::Result<Vec<_>>>()?;
    Tensor::cat(&outputs, 1)?.reshape((batch, out, oh, ow))
}

fn plain2(case: Case, x: &Tensor, w: &Tensor) -> candle_core::Result<Tensor> {
    let padding = [case.padding; 2];
    plain(x, w, padding, [case.stride, case.dilation, case.groups])
}

fn with_bias(y: Tensor, bias: Option<&Tensor>) -> candle_core::Result<Tensor> {
    match bias {
        Some(bias) => y.broadcast_add(&bias.reshape((1, (), 1, 1))?),
        None => Ok(y),
    }
}

fn like(t: &Tensor, x: &Tensor) -> Tensor {
    t.to_dtype(x.dtype()).unwrap()
}

/// Numbers that f32 holds exactly, so that both types multiply by the same weight.
fn exact(t: &Tensor) -> Tensor {
    ((t * 16.0).unwrap().round().unwrap() / 16.0).unwrap()
}

#[test]
fn conv2d_is_the_definition() {
    for case in CASES {
        let all = case.base();
        let ours: Ours<'_> = &|t| conv2d(&t[0], &t[1], t.get(2), &case.config());
        let want: Plain<'_> = &|t| with_bias(plain2(case, &t[0], &t[1])?, t.get(2));
        check_one_pass(&format!("{case:?}"), &all[..2], ours, want);
        check_one_pass(&format!("{case:?} with a bias"), &all, ours, want);
    }
}

#[test]
fn conv1d_is_the_definition() {
    for case in CASES {
        let [x, w, bias] = case.base();
        let line = |t: &Tensor| t.narrow(2, 0, 1).unwrap().squeeze(2).unwrap();
        let all = [line(&x), line(&w), bias];
        let config = Conv1dConfig {
            stride: case.stride,
            padding: case.padding,
            dilation: case.dilation,
            groups: case.groups,
            ..Default::default()
        };
        let ours: Ours<'_> = &|t| conv1d(&t[0], &t[1], Some(&t[2]), &config);
        let want: Plain<'_> = &|t| {
            let (x, w) = (t[0].unsqueeze(2)?, t[1].unsqueeze(2)?);
            let how = [case.stride, case.dilation, case.groups];
            let y = plain(&x, &w, [0, case.padding], how)?;
            with_bias(y, Some(&t[2]))?.squeeze(2)
        };
        check_one_pass(&format!("a line of {case:?}"), &all, ours, want);
    }
}

#[test]
fn lora_conv2d_is_the_definition() {
    for case in CASES {
        for r in [1, 3] {
            let [x, w, bias] = case.base();
            let (w, bias) = (exact(&w), exact(&bias));
            let [a, b] = case.pair(r);
            let thin = |t: &[Tensor]| -> candle_core::Result<Tensor> {
                let h = plain2(Case { groups: 1, ..case }, &t[0], &t[1])?;
                plain(&h, &t[2], [0, 0], [1, 1, case.groups])? * 1.5
            };
            for bias in [None, Some(&bias)] {
                let ours: Ours<'_> = &|t| {
                    let bias = bias.map(|bias| like(bias, &t[0]));
                    let w = like(&w, &t[0]);
                    lora_conv2d(&t[0], &w, bias.as_ref(), &t[1], &t[2], 1.5, &case.config())
                };
                let want: Plain<'_> = &|t| with_bias((plain2(case, &t[0], &w)? + thin(t)?)?, bias);
                let all = [x.clone(), a.clone(), b.clone()];
                check_one_pass(&format!("{case:?} of rank {r}"), &all, ours, want);
            }
        }
    }
}

#[test]
fn convolutions_take_what_the_others_take() {
    for case in &CASES[1..12] {
        let all = case.base();
        let ours: Ours<'_> = &|t| conv2d(&t[0], &t[1], t.get(2), &case.config());
        differences("conv2d", &all, ours);
        takes_views_within(1e-6, "conv2d", &all, ours);
        let types = [DType::F32, DType::F64];
        only_what_is_tracked_in(&types, "conv2d", &all[..2], ours);
        only_what_is_tracked_in(&types, "conv2d", &all, ours);

        let [x, w, bias] = all;
        let [a, b] = case.pair(2);
        let lora: Ours<'_> = &|t| {
            let (w, bias) = (like(&w, &t[0]), like(&bias, &t[0]));
            lora_conv2d(&t[0], &w, Some(&bias), &t[1], &t[2], 0.5, &case.config())
        };
        let few = [x.clone(), a.clone(), b.clone()];
        differences("lora_conv2d", &few, lora);
        takes_views_within(1e-6, "lora_conv2d", &few, lora);
        only_what_is_tracked_in(&types, "lora_conv2d", &few, lora);

        let ours: Ours<'_> =
            &|t| lora_conv2d(&t[0], &t[1], Some(&t[2]), &t[3], &t[4], 0.5, &case.config());
        differences("lora_conv2d that trains", &[x, w, bias, a, b], ours);
    }
}

#[test]
fn convolutions_are_the_same_on_any_threads() {
    for case in [
        // Parts of several images, images by themselves, and one image in several products.
        case([67, 16, 24], [3, 3], [2, 1, 1, 1], [7, 7]),
        case([9, 16, 32], [3, 3], [1, 1, 1, 2], [14, 14]),
        case([1, 64, 70], [3, 3], [1, 1, 1, 1], [40, 41]),
        case([5, 32, 48], [1, 1], [1, 0, 1, 1], [30, 31]),
        // Kernels too large for several sums of them.
        case([2, 1024, 520], [3, 3], [1, 1, 1, 1], [4, 4]),
    ] {
        let all = case.base();
        same_on_any_threads("conv2d", &all, &|t| {
            conv2d(&t[0], &t[1], Some(&t[2]), &case.config())
        });
        let [x, w, _] = all;
        let [a, b] = case.pair(8);
        same_on_any_threads("lora_conv2d", &[x, a, b], &|t| {
            let w = like(&w, &t[0]);
            lora_conv2d(&t[0], &w, None, &t[1], &t[2], 0.5, &case.config())
        });
    }
}

#[test]
fn a_frozen_kernel_and_a_first_layer_get_no_gradient() {
    let [x, w, bias] = CASES[1].base();
    let [a, b] = CASES[1].pair(2).map(|t| Var::from_tensor(&t).unwrap());
    let y = lora_conv2d(&x, &w, Some(&bias), &a, &b, 0.5, &CASES[1].config()).unwrap();
    let gradients = y.sum_all().unwrap().backward().unwrap();
    for (t, wanted) in [
        (&x, false),
        (&w, false),
        (&bias, false),
        (&a, true),
        (&b, true),
    ] {
        assert_eq!(gradients.get(t).is_some(), wanted);
    }
}

#[test]
fn no_image_moves_nothing() {
    let case = Case {
        batch: 0,
        ..CASES[1]
    };
    let all = case.base();
    let ours: Ours<'_> = &|t| conv2d(&t[0], &t[1], Some(&t[2]), &case.config());
    let (y, gradients) = run(ours, &all, &[true; 3]);
    assert_eq!(y.dims(), [0, 5, 5, 6]);
    for (gradient, like) in gradients.iter().zip(&all) {
        let gradient = gradient.as_ref().unwrap();
        assert_eq!(gradient.dims(), like.dims());
        assert!(values(gradient).iter().all(|g| *g == 0.0));
    }
}

/// In f16 the forward pass is candle's own, and the gradient is that of the definition.
#[test]
fn half_precision_is_candles_own() {
    let case = CASES[2];
    let all = case.base().map(|t| t.to_dtype(DType::F16).unwrap());
    let ours: Ours<'_> = &|t| conv2d(&t[0], &t[1], None, &case.config());
    let (y, gradients) = run(ours, &all[..2], &[true; 2]);
    let candle = all[0].conv2d(&all[1], 1, 2, 1, 1).unwrap();
    assert_eq!(values(&y), values(&candle));
    let exact = all.map(|t| t.to_dtype(DType::F64).unwrap());
    let want: Ours<'_> = &|t| Ok(plain2(case, &t[0], &t[1])?);
    let (_, wanted) = run(want, &exact[..2], &[true; 2]);
    for (got, want) in gradients.iter().zip(&wanted) {
        let off = gap(got.as_ref().unwrap(), want.as_ref().unwrap());
        assert!(off < 2e-3, "{off:e}");
    }
}

/// A batch whose images have different adapters, and some none.
#[test]
fn images_have_adapters_of_their_own() {
    for (groups, ranks, size) in [(1, [2, 3], 4), (2, [2, 6], 4), (1, [3, 1], 40)] {
        let config = Conv2dConfig {
            padding: 1,
            groups,
            ..Default::default()
        };
        let base = Conv2d::new(
            random(&[6, 4 / groups, 3, 3], 1.0, 1),
            Some(random(&[6], 1.0, 2)),
            config,
        );
        let layer = LoraConv2d::frozen("conv", base).unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut model = LoraModel::new(&[&layer]).unwrap();
        for (name, r) in ["fr", "de"].into_iter().zip(ranks) {
            let config = LoraConfig::new(r, 3.0).with_init(Init::Random);
            let config = config.with_targets(["conv"]);
            model.add_adapter(name, &config, &mut rng).unwrap();
        }
        let mut rows = vec!["fr", "fr", BASE_ROW, "de", "fr", BASE_ROW, "de", "de"];
        rows.extend(["fr"; 13]);
        let x = Var::from_tensor(&random(&[rows.len(), 4, size, size], 1.0, 3)).unwrap();
        let g = random(&[rows.len(), 6, size, size], 1.0, 4);
        let loss = |y: &Tensor, g: &Tensor| (y * g).unwrap().sum_all().unwrap();
        let mixed = model
            .with_adapters(&rows, || layer.forward_t(&x, true))
            .unwrap()
            .unwrap();
        let gradients = loss(&mixed, &g).backward().unwrap();

        let mut total = Tensor::zeros((), DType::F64, &CPU).unwrap();
        for (i, row) in rows.iter().enumerate() {
            let chosen: &[&str] = if *row == BASE_ROW { &[] } else { &[row] };
            model.set_adapter(chosen).unwrap();
            let alone = layer.forward_t(&x.narrow(0, i, 1).unwrap(), true).unwrap();
            assert!(gap(&mixed.narrow(0, i, 1).unwrap(), &alone) < 1e-13, "{i}");
            total = (total + loss(&alone, &g.narrow(0, i, 1).unwrap())).unwrap();
        }
        let wanted = total.backward().unwrap();
        let mut all = vec![x.clone()];
        for name in ["fr", "de"] {
            let adapter = layer.adapter(name).unwrap();
            all.extend([adapter.lora_a().unwrap(), adapter.lora_b().unwrap()].map(Var::clone));
        }
        for (i, var) in all.iter().enumerate() {
            let off = gap(gradients.get(var).unwrap(), wanted.get(var).unwrap());
            assert!(off < 1e-12, "{i}: {off:e}");
        }
    }
}

#[test]
fn convolutions_that_do_not_fit_are_refused() {
    let [x, w, bias] = CASES[1].base();
    let [a, b] = CASES[1].pair(2);
    let usual = Conv2dConfig::default();
    let refuse = |x: &Tensor, w: &Tensor, bias: Option<&Tensor>, config: &Conv2dConfig, words| {
        refused(conv2d(x, w, bias, config), words);
    };
    let line = x.flatten_from(2).unwrap();
    refuse(
        &line,
        &w,
        None,
        &usual,
        &["conv2d", "height, width", "[2, 3, 30]"],
    );
    refuse(
        &w,
        &x,
        None,
        &usual,
        &["[5, 3, 3, 3]", "no smaller than the kernel"],
    );
    refuse(&x, &w, Some(&w), &usual, &["b [5, 3, 3, 3]", "b [out]"]);
    let single = bias.to_dtype(DType::F32).unwrap();
    refuse(&x, &w, Some(&single), &usual, &["one floating-point type"]);
    for config in [
        Conv2dConfig { stride: 0, ..usual },
        Conv2dConfig {
            dilation: 0,
            ..usual
        },
        Conv2dConfig { groups: 0, ..usual },
        Conv2dConfig { groups: 2, ..usual },
        Conv2dConfig {
            dilation: 3,
            ..usual
        },
        Conv2dConfig {
            padding: usize::MAX,
            ..usual
        },
        Conv2dConfig {
            padding: usize::MAX / 4,
            ..usual
        },
        Conv2dConfig {
            dilation: usize::MAX,
            ..usual
        },
    ] {
        refuse(
            &x,
            &w,
            Some(&bias),
            &config,
            &["conv2d", "stride", "groups"],
        );
    }
    // Five outputs of three groups.
    let (one, three) = (
        w.narrow(1, 0, 1).unwrap(),
        Conv2dConfig { groups: 3, ..usual },
    );
    refuse(
        &x,
        &one,
        None,
        &three,
        &["out a multiple of groups", "groups 3"],
    );
    let none = w.narrow(1, 0, 0).unwrap();
    refuse(
        &x.narrow(1, 0, 0).unwrap(),
        &none,
        None,
        &usual,
        &["at least 1"],
    );
    let lora = |a: &Tensor, b: &Tensor| lora_conv2d(&x, &w, None, a, b, 1.0, &usual);
    refused(lora(&b, &a), &["lora_conv2d", "A must be [r, 3, 3, 3]"]);
    refused(lora(&a, &b.narrow(1, 0, 1).unwrap()), &["[5, 1, 1, 1]"]);
    refused(lora(&a, &b.to_dtype(DType::F32).unwrap()), &["of one type"]);
    let scalar = Tensor::zeros((), DType::F64, &CPU).unwrap();
    refused(lora(&scalar, &b), &["A [] of F64"]);
}

const POOL: Ours<'static> = &|x| avg_pool2d(&x[0], 2);

fn plain_pool(x: &Tensor, size: usize) -> candle_core::Result<Tensor> {
    let (n, c, height, width) = x.dims4()?;
    let (height, width) = (height / size, width / size);
    let x = x.narrow(2, 0, height * size)?.narrow(3, 0, width * size)?;
    let x = x.reshape((n * c, height, size, width, size))?;
    x.mean(4)?.mean(2)?.reshape((n, c, height, width))
}

#[test]
fn avg_pool2d_is_the_mean_of_squares() {
    for (shape, size) in [
        ([1, 1, 2, 2], 2),
        ([2, 3, 5, 4], 2),
        ([2, 3, 7, 8], 3),
        ([1, 2, 4, 4], 1),
        ([3, 2, 9, 5], 5),
        ([4, 16, 28, 28], 2),
        ([5, 16, 29, 31], 2),
    ] {
        let x = [random(&shape, 3.0, 1)];
        let ours: Ours<'_> = &|x| avg_pool2d(&x[0], size);
        check("avg_pool2d", &x, ours, &|x| plain_pool(&x[0], size));
    }
    let x = [random(&[2, 3, 5, 7], 3.0, 2)];
    differences("avg_pool2d", &x, POOL);
    only_what_is_tracked("avg_pool2d", &x, POOL);
    takes_views("avg_pool2d", &x, POOL);
    same_on_any_threads("avg_pool2d", &[random(&[9, 16, 29, 28], 3.0, 3)], POOL);

    let flat = avg_pool2d(&random(&[4, 6], 1.0, 1), 2).unwrap();
    assert_eq!(flat.dims(), [2, 3]);
    let none = avg_pool2d(&random(&[0, 3, 4, 4], 1.0, 1), 2).unwrap();
    assert_eq!(none.dims(), [0, 3, 2, 2]);
    let x = random(&[2, 3, 4, 1], 1.0, 1);
    refused(avg_pool2d(&x, 2), &["avg_pool2d", "[2, 3, 4, 1]", "2 × 2"]);
    refused(avg_pool2d(&x, 0), &["0 × 0"]);
    refused(avg_pool2d(&x.flatten_all().unwrap(), 1), &["[24]"]);
    refused(
        avg_pool2d(&x.to_dtype(DType::U32).unwrap(), 1),
        &["floating-point"],
    );
}
