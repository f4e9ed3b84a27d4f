//! Layers whose weight is in 4 bits, against those with the same weight in full.

#![allow(clippy::unwrap_used)]

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Linear, Module, VarBuilder};
use lora::ops::{linear, linear_4bit};
use lora::quant::{Linear4bit, QuantConfig, QuantType, quantize};
use lora::{Bias, Init, LoraBuilder, LoraConfig, LoraLayer, LoraLinear, LoraLinear4bit, LoraModel};
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const CPU: Device = Device::Cpu;

fn rng(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

fn random(shape: &[usize], seed: u64, dtype: DType) -> Tensor {
    use rand::Rng;
    let mut rng = rng(seed);
    let numbers: Vec<f64> = (0..shape.iter().product())
        .map(|_| rng.random_range(-1.0..1.0))
        .collect();
    let tensor = Tensor::from_vec(numbers, shape, &CPU).unwrap();
    tensor.to_dtype(dtype).unwrap()
}

fn numbers(tensor: &Tensor) -> Vec<f64> {
    let flat = tensor.flatten_all().unwrap().to_dtype(DType::F64).unwrap();
    flat.to_vec1().unwrap()
}

fn gap(got: &Tensor, want: &Tensor) -> f64 {
    assert_eq!((got.dims(), got.dtype()), (want.dims(), want.dtype()));
    let (got, want) = (numbers(got), numbers(want));
    let largest = want
        .iter()
        .fold(1e-9, |largest: f64, x| largest.max(x.abs()));
    let gaps = got.iter().zip(want).map(|(got, want)| (got - want).abs());
    gaps.fold(0.0, f64::max) / largest
}

#[test]
fn products_are_those_of_the_weight_in_full() -> Result<()> {
    for dtype in [DType::F32, DType::F64] {
        let near = if dtype == DType::F32 { 1e-5 } else { 1e-12 };
        for (rows, out, inputs) in [
            (1, 1, 1),
            (1, 130, 64),
            (5, 3, 37),
            (70, 128, 100),
            (3, 129, 257),
            (200, 300, 192),
            (3, 1100, 130),
            (0, 300, 300),
        ] {
            for quant_type in [QuantType::Nf4, QuantType::Fp4, QuantType::Int4] {
                let config = QuantConfig {
                    quant_type,
                    ..QuantConfig::default()
                };
                let weight = quantize(&random(&[out, inputs], 1, dtype), &config)?;
                let whole = weight.dequantize()?;
                let bias = random(&[out], 2, dtype);
                let x = Var::from_tensor(&random(&[rows, inputs], 3, dtype))?;
                let g = random(&[rows, out], 4, dtype);
                for bias in [None, Some(&bias)] {
                    let what = format!("{dtype:?} {rows} {out} {inputs} {quant_type:?}");
                    let (got, want) = (linear_4bit(&x, &weight, bias)?, linear(&x, &whole, bias)?);
                    assert!(gap(&got, &want) < near, "{what}");
                    let dx = |y: Tensor| -> Result<Tensor> {
                        let gradients = (y * &g)?.sum_all()?.backward()?;
                        Ok(gradients.get(&x).unwrap().clone())
                    };
                    assert!(gap(&dx(got)?, &dx(want)?) < near, "{what}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn products_are_the_same_on_any_number_of_threads() -> Result<()> {
    let weight = quantize(&random(&[300, 192], 1, DType::F32), &QuantConfig::default())?;
    let x = Var::from_tensor(&random(&[40, 192], 2, DType::F32))?;
    let run = || {
        let y = linear_4bit(&x, &weight, None).unwrap();
        let gradients = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        (numbers(&y), numbers(gradients.get(&x).unwrap()))
    };
    let on = |threads| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(run)
    };
    assert_eq!(on(1), on(3));
    Ok(())
}

/// Any strides and any number of leading dimensions, and a gradient whose memory is turned.
#[test]
fn inputs_of_any_shape_and_strides() -> Result<()> {
    let weight = quantize(&random(&[9, 64], 1, DType::F32), &QuantConfig::default())?;
    let whole = weight.dequantize()?;
    let wide = Var::from_tensor(&random(&[64, 5, 6], 2, DType::F32))?;
    for x in [
        wide.permute((2, 1, 0))?,
        wide.narrow(1, 1, 3)?.transpose(0, 2)?,
        wide.get_on_dim(1, 2)?.get_on_dim(1, 3)?,
    ] {
        let turned = |y: Tensor| -> Result<Tensor> {
            let g = random(&[y.elem_count()], 3, DType::F32).reshape(y.dims())?;
            let loss = match y.rank() {
                1 => (y * g)?,
                _ => (y.transpose(0, 1)? * g.transpose(0, 1)?)?,
            };
            let gradients = loss.sum_all()?.backward()?;
            Ok(gradients.get(&wide).unwrap().clone())
        };
        let (got, want) = (linear_4bit(&x, &weight, None)?, linear(&x, &whole, None)?);
        assert!(gap(&got, &want) < 1e-5, "{:?}", x.dims());
        assert!(gap(&turned(got)?, &turned(want)?) < 1e-5, "{:?}", x.dims());
    }
    Ok(())
}

/// Codes have no type: a base in half precision serves f32 too, and is computed in f32.
#[test]
fn a_base_in_half_precision_serves_both() -> Result<()> {
    for dtype in [DType::F16, DType::BF16] {
        let bias = random(&[96], 2, dtype);
        let base = Linear::new(random(&[96, 80], 1, dtype), Some(bias));
        let base = Linear4bit::quantize(&base, &QuantConfig::default())?;
        let config = LoraConfig::new(4, 8.0).with_init(Init::Random);
        let layer = LoraLinear4bit::new("proj", base, &config, &mut rng(3))?;
        assert_eq!(layer.lora_a()?.dtype(), DType::F32);
        let x = Var::from_tensor(&random(&[7, 80], 5, DType::F32))?;
        let wide = layer.forward_t(&x, true)?;
        assert_eq!(wide.dtype(), DType::F32);
        let gradients = wide.sqr()?.sum_all()?.backward()?;
        assert!(
            gradients.get(&x).is_some() && gradients.get(layer.lora_a()?.as_tensor()).is_some()
        );
        let narrow = layer.forward_t(&x.to_dtype(dtype)?, true)?;
        assert_eq!(narrow.dtype(), dtype);
        assert!(
            gap(&narrow.to_dtype(DType::F32)?, &wide) < 2e-2,
            "{dtype:?}"
        );
        let gradients = narrow.to_dtype(DType::F32)?.sqr()?.sum_all()?.backward()?;
        assert!(
            gradients.get(&x).is_some() && gradients.get(layer.lora_b()?.as_tensor()).is_some()
        );
        let in_full = layer.merged_in_full()?;
        assert_eq!(in_full.weight().dtype(), dtype);
    }
    Ok(())
}

#[test]
fn the_bias_of_a_frozen_layer_stays() -> Result<()> {
    let bias = Var::from_tensor(&random(&[4], 1, DType::F32))?;
    let linear = Linear::new(
        random(&[4, 64], 2, DType::F32),
        Some(bias.as_tensor().clone()),
    );
    let base = Linear4bit::quantize(&linear, &QuantConfig::default())?;
    let layer = LoraLinear4bit::frozen("proj", base)?;
    let x = random(&[2, 64], 3, DType::F32);
    let before = numbers(&layer.forward(&x)?);
    bias.set(&random(&[4], 9, DType::F32))?;
    assert_eq!(numbers(&layer.forward(&x)?), before);
    Ok(())
}

#[test]
fn a_weight_in_4_bits_is_not_replaced_by_one_that_trains() -> Result<()> {
    let (four, _) = twins(&LoraConfig::new(4, 8.0), false)?;
    let four = LoraLinear4bit::frozen("head", four.base())?;
    let other = LoraLinear::frozen("proj", Linear::new(random(&[4, 64], 2, DType::F32), None))?;
    let config = LoraConfig {
        modules_to_save: vec!["head".into()],
        ..LoraConfig::new(4, 8.0).with_targets(["proj"])
    };
    let mut model = LoraModel::new(&[&four, &other])?;
    let error = model
        .add_adapter("fr", &config, &mut rng(1))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("head") && error.contains("keep this layer out"),
        "{error}"
    );
    assert!(model.adapters().is_empty());
    Ok(())
}

/// A layer in 4 bits, and one with the same numbers in full.
fn twins(config: &LoraConfig, bias: bool) -> Result<(LoraLinear4bit, LoraLinear)> {
    let bias = bias.then(|| random(&[96], 2, DType::F32));
    let base = Linear::new(random(&[96, 80], 1, DType::F32), bias);
    let base = Linear4bit::quantize(&base, &QuantConfig::default())?;
    let whole = base.dequantize()?;
    Ok((
        LoraLayer::new("proj", base, config, &mut rng(3))?,
        LoraLayer::new("proj", whole, config, &mut rng(3))?,
    ))
}

#[test]
fn a_layer_and_its_gradients_are_those_of_the_weight_in_full() -> Result<()> {
    let plain = LoraConfig::new(4, 8.0).with_init(Init::Random);
    for config in [
        plain.clone(),
        plain.clone().with_dora(true),
        plain.clone().with_lora_bias(true),
        LoraConfig {
            bias: Bias::All,
            ..plain.clone()
        },
        plain.clone().with_dropout(0.3),
        plain.clone().with_dora(true).with_dropout(0.3),
    ] {
        for bias in [false, true] {
            let (four, whole) = twins(&config, bias)?;
            let x = Var::from_tensor(&random(&[7, 80], 5, DType::F32))?;
            let (got, want) = (four.forward_t(&x, true)?, whole.forward_t(&x, true)?);
            assert!(gap(&got, &want) < 1e-5, "{config:?}");
            let (got, want) = (
                got.sqr()?.sum_all()?.backward()?,
                want.sqr()?.sum_all()?.backward()?,
            );
            assert!(
                gap(got.get(&x).unwrap(), want.get(&x).unwrap()) < 1e-5,
                "{config:?}"
            );
            let names = |vars: &[(String, Var)]| -> Vec<String> {
                vars.iter().map(|(name, _)| name.clone()).collect()
            };
            let (ours, theirs) = (four.trainable_parameters(), whole.trainable_parameters());
            assert_eq!(names(&ours), names(&theirs));
            for ((name, our), (_, their)) in ours.iter().zip(&theirs) {
                let (got, want) = (got.get(our).unwrap(), want.get(their).unwrap());
                assert!(gap(got, want) < 1e-5, "{config:?} {name}");
            }
            assert_eq!(four.parameter_count(), whole.parameter_count());
        }
    }
    Ok(())
}

#[test]
fn adapters_travel_between_both() -> Result<()> {
    let config = LoraConfig::new(4, 8.0)
        .with_init(Init::Random)
        .with_targets(["proj"]);
    let (four, whole) = twins(&config, true)?;
    let (four, whole) = (
        LoraLinear4bit::frozen("proj", four.base())?,
        LoraLinear::frozen("proj", whole.base())?,
    );
    let mut model = LoraModel::new(&[&four])?;
    model.add_adapter("default", &config, &mut rng(4))?;
    let folder = tempfile::tempdir()?;
    model.save_adapter(folder.path(), "default")?;
    LoraModel::new(&[&whole])?.load_adapter(folder.path(), "default")?;
    let x = random(&[3, 80], 6, DType::F32);
    assert!(gap(&whole.forward(&x)?, &four.forward(&x)?) < 1e-5);
    Ok(())
}

/// The sum is rounded anew: by no more than half a step of a block.
#[test]
fn merging_rounds_and_unmerging_is_exact() -> Result<()> {
    let (four, whole) = twins(&LoraConfig::new(4, 0.4).with_init(Init::Random), true)?;
    let x = random(&[3, 80], 6, DType::F32);
    let apart = four.forward(&x)?;
    four.merge()?;
    whole.merge()?;
    let merged = four.forward(&x)?;
    let rounded = {
        let sum = whole.merged()?;
        Linear4bit::quantize(&sum, &QuantConfig::default())?.forward(&x)?
    };
    assert!(gap(&merged, &rounded) < 1e-5);
    let in_full = four.merged_in_full();
    assert!(in_full.unwrap_err().to_string().contains("merg"));
    assert!(
        (1e-4..0.3).contains(&gap(&merged, &apart)),
        "{}",
        gap(&merged, &apart)
    );
    four.unmerge();
    assert_eq!(numbers(&four.forward(&x)?), numbers(&apart));
    assert!(gap(&four.merged_in_full()?.forward(&x)?, &apart) < 1e-5);
    Ok(())
}

#[test]
fn merging_keeps_the_kind_of_codes_and_refuses_what_is_not_finite() -> Result<()> {
    let config = QuantConfig {
        quant_type: QuantType::Int4,
        block_size: 32,
        double_quant: false,
    };
    let base = Linear::new(random(&[8, 64], 1, DType::F32), None);
    let base = Linear4bit::quantize(&base, &config)?;
    let layer = LoraLinear4bit::new("proj", base, &LoraConfig::new(2, 4.0), &mut rng(1))?;
    assert_eq!(layer.merged()?.weight().config(), &config);
    layer
        .lora_b()?
        .set(&Tensor::full(f32::INFINITY, (8, 2), &CPU)?)?;
    for merge in [LoraLinear4bit::merge, LoraLinear4bit::safe_merge] {
        let error = merge(&layer).unwrap_err().to_string();
        assert!(
            error.contains("proj") && error.contains("512 of 512"),
            "{error}"
        );
        assert!(!layer.is_merged());
    }
    Ok(())
}

#[test]
fn rows_of_a_batch_have_adapters_of_their_own() -> Result<()> {
    let config = LoraConfig::new(4, 8.0)
        .with_init(Init::Random)
        .with_targets(["proj"]);
    let four = LoraLinear4bit::frozen("proj", twins(&config, true)?.0.base())?;
    let mut model = LoraModel::new(&[&four])?;
    model.add_adapter("fr", &config, &mut rng(8))?;
    model.add_adapter("de", &config, &mut rng(9))?;
    let x = random(&[3, 80], 6, DType::F32);
    let rows = ["fr", lora::BASE_ROW, "de"];
    let mixed = model.with_adapters(&rows, || four.forward(&x))??;
    model.set_adapter(&["de"])?;
    let alone = four.forward(&x)?;
    assert!(gap(&mixed.get(2)?, &alone.get(2)?) < 1e-5);
    assert!(gap(&mixed.get(0)?, &alone.get(0)?) > 1e-2);
    model.enable_adapters(false);
    assert!(gap(&mixed.get(1)?, &four.forward(&x)?.get(1)?) < 1e-5);
    Ok(())
}

#[test]
fn a_builder_quantises_what_it_fetches() -> Result<()> {
    let tensors = || {
        std::collections::HashMap::from([
            ("q.weight".to_string(), random(&[96, 80], 1, DType::F32)),
            ("q.bias".to_string(), random(&[96], 2, DType::F32)),
            ("v.weight".to_string(), random(&[96, 80], 3, DType::F32)),
        ])
    };
    let vb = || VarBuilder::from_tensors(tensors(), DType::F32, &CPU);
    let config = QuantConfig::default();
    let builder = LoraBuilder::new(vb());
    let q = builder.pp("q").linear_4bit(80, 96, &config)?;
    let v = builder.pp("v").linear_4bit_no_bias(80, 96, &config)?;
    assert!(
        builder.pp("v").linear_4bit(80, 96, &config).is_err(),
        "no bias there"
    );
    assert!(q.base().bias().is_some() && v.base().bias().is_none());
    let x = random(&[2, 80], 4, DType::F32);
    let whole = quantize(&tensors()["q.weight"], &config)?.dequantize()?;
    let want = linear(&x, &whole, Some(&tensors()["q.bias"]))?;
    assert!(gap(&q.forward(&x)?, &want) < 1e-5);
    let mut model = builder.model()?;
    model.add_adapter(
        "fr",
        &LoraConfig::new(4, 8.0).with_targets(["q", "v"]),
        &mut rng(1),
    )?;
    let count = model.parameter_count();
    assert_eq!(
        (count.trainable, count.all),
        (2 * 4 * 176, 2 * 4 * 176 + 2 * 96 * 80 + 96)
    );
    let error = LoraBuilder::trainable(vb())
        .pp("q")
        .linear_4bit(80, 96, &config);
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("q.weight in 4 bits") && error.contains("do not train"),
        "{error}"
    );

    // A bias may train beside codes.
    let builder = LoraBuilder::trainable_where(vb(), |name| name.ends_with("bias"));
    let q = builder.pp("q").linear_4bit(80, 96, &config)?;
    let variables = builder.variables();
    let [(name, bias)] = &variables[..] else {
        panic!("{variables:?}")
    };
    assert_eq!(name, "q.bias");
    let gradients = q.forward(&x)?.sum_all()?.backward()?;
    assert_eq!(numbers(gradients.get(bias).unwrap()), [2.0; 96]);

    let broken = Tensor::full(f32::NAN, (96, 80), &CPU)?;
    let broken = std::collections::HashMap::from([("v.weight".to_string(), broken)]);
    let builder = LoraBuilder::new(VarBuilder::from_tensors(broken, DType::F32, &CPU));
    let error = builder
        .pp("v")
        .linear_4bit_no_bias(80, 96, &config)
        .unwrap_err();
    assert!(
        error.to_string().contains("v.weight, a tensor [96, 80]"),
        "{error}"
    );
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused_by_name() -> Result<()> {
    let w = quantize(&random(&[4, 64], 1, DType::F32), &QuantConfig::default())?;
    let refused = |x: Tensor, bias: Option<Tensor>| {
        linear_4bit(&x, &w, bias.as_ref()).unwrap_err().to_string()
    };
    let x = random(&[2, 64], 2, DType::F32);
    assert!(refused(random(&[2, 63], 2, DType::F32), None).contains("[…, 64]"));
    assert!(refused(x.clone(), Some(random(&[5], 2, DType::F32))).contains("b must be [4]"));
    assert!(refused(x.to_dtype(DType::U32)?, None).contains("floating point"));
    let flat = quantize(&random(&[64], 1, DType::F32), &QuantConfig::default())?;
    let error = linear_4bit(&x, &flat, None).unwrap_err().to_string();
    assert!(error.contains("W must be [out, in]"), "{error}");
    let base = Linear4bit::new(flat, None);
    let error = LoraLinear4bit::frozen("proj", base)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("proj") && error.contains("[out, in]"),
        "{error}"
    );
    for init in [Init::Pissa, Init::Olora] {
        let base = Linear4bit::new(w.clone(), None);
        let config = LoraConfig::new(2, 4.0).with_init(init);
        let error = LoraLinear4bit::new("proj", base, &config, &mut rng(1)).unwrap_err();
        assert!(error.to_string().contains("in 4 bits"), "{error}");
    }
    Ok(())
}
