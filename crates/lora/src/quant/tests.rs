//! Against what bitsandbytes itself made; `tests/fixtures/bitsandbytes/generate.py`.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};

use super::codes::dynamic;
use super::tensor::Absmax;
use super::{QuantConfig, QuantType, quantize};
use crate::Result;

const CPU: Device = Device::Cpu;

fn fixture() -> HashMap<String, Tensor> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/bitsandbytes");
    candle_core::safetensors::load(format!("{folder}/blocks.safetensors"), &CPU).unwrap()
}

fn numbers(tensor: &Tensor) -> Vec<f32> {
    let flat = tensor.flatten_all().unwrap().to_dtype(DType::F32).unwrap();
    flat.to_vec1().unwrap()
}

/// The largest difference, as a part of the largest number.
fn gap(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let largest = want.iter().fold(0f32, |largest, x| largest.max(x.abs()));
    let gaps = got.iter().zip(want).map(|(got, want)| (got - want).abs());
    gaps.fold(0.0, f32::max) / largest
}

#[test]
fn the_tables_are_those_of_bitsandbytes() {
    let fixture = fixture();
    assert!(gap(QuantType::Nf4.values(), &numbers(&fixture["nf4.values"])) < 1e-7);
    assert!(gap(QuantType::Fp4.values(), &numbers(&fixture["fp4.values"])) < 1e-7);
    assert!(gap(dynamic(), &numbers(&fixture["dynamic"])) < 1e-7);
}

#[test]
fn codes_and_magnitudes_are_those_of_bitsandbytes() {
    let fixture = fixture();
    let mut seen = 0;
    for (key, codes) in fixture.iter().filter(|(key, _)| key.ends_with(".codes")) {
        let key = key.trim_end_matches(".codes");
        let part = |part: &str| &fixture[&format!("{key}.{part}")];
        let weight = &fixture[&format!("{}.weight", key.split('.').next().unwrap())];
        let config = QuantConfig {
            quant_type: if key.contains("nf4") {
                QuantType::Nf4
            } else {
                QuantType::Fp4
            },
            double_quant: key.ends_with("double"),
            ..QuantConfig::default()
        };
        let quantized = quantize(weight, &config).unwrap();
        assert_eq!(numbers(&quantized.codes), numbers(codes), "{key}");
        match &quantized.absmax {
            Absmax::Plain(absmax) => assert_eq!(numbers(absmax), numbers(part("absmax")), "{key}"),
            Absmax::Double {
                codes,
                absmax,
                offset,
            } => {
                assert_eq!(numbers(codes), numbers(part("absmax")), "{key}");
                assert!(gap(&[*offset], &numbers(part("offset"))) < 1e-6, "{key}");
                assert!(
                    gap(&numbers(absmax), &numbers(part("nested_absmax"))) < 1e-6,
                    "{key}"
                );
            }
        }
        let back = quantized.dequantize().unwrap();
        assert_eq!(back.dims(), weight.dims());
        assert!(gap(&numbers(&back), &numbers(part("back"))) < 1e-6, "{key}");
        seen += 1;
    }
    assert_eq!(seen, 9);
}

/// Any stretch, odd or even at both ends, in one block or in many.
#[test]
fn a_stretch_is_a_part_of_the_whole() -> Result<()> {
    let weight = &fixture()["odd.weight"];
    for double_quant in [false, true] {
        let config = QuantConfig {
            double_quant,
            block_size: 32,
            ..QuantConfig::default()
        };
        let quantized = quantize(weight, &config)?;
        let whole = numbers(&quantized.dequantize()?);
        for start in [0, 1, 2, 31, 32, 33, 63, 500, 2255] {
            for len in [0, 1, 2, 3, 30, 31, 32, 33, 64, 65, 200, 2257] {
                let len = len.min(whole.len() - start);
                let mut some = vec![f64::NAN; len];
                quantized.view(|view| view.expand(start, &mut some))?;
                let want: Vec<f64> = whole[start..start + len]
                    .iter()
                    .map(|x| f64::from(*x))
                    .collect();
                assert_eq!(some, want, "{start}, {len}");
            }
        }
    }
    Ok(())
}

/// What a device without this crate's own loops computes.
#[test]
fn the_way_of_every_device_gives_the_same() -> Result<()> {
    let fixture = fixture();
    for name in ["odd", "far"] {
        for double_quant in [false, true] {
            let config = QuantConfig {
                double_quant,
                ..QuantConfig::default()
            };
            let quantized = quantize(&fixture[&format!("{name}.weight")], &config)?;
            let ours = numbers(&quantized.dequantize()?);
            assert!(
                gap(&numbers(&quantized.composed()?), &ours) < 1e-6,
                "{name}"
            );
        }
    }
    Ok(())
}

#[test]
fn types_are_kept() -> Result<()> {
    let weight = &fixture()["normal.weight"];
    for dtype in [DType::F16, DType::BF16, DType::F64] {
        let quantized = quantize(&weight.to_dtype(dtype)?, &QuantConfig::default())?;
        assert_eq!(quantized.dequantize()?.dtype(), dtype);
    }
    // A weight whose memory is turned is read in the order of its rows.
    let turned = quantize(&weight.t()?, &QuantConfig::default())?;
    let plain = quantize(&weight.t()?.contiguous()?, &QuantConfig::default())?;
    assert_eq!(
        numbers(&turned.dequantize()?),
        numbers(&plain.dequantize()?)
    );
    Ok(())
}

#[test]
fn what_cannot_be_quantised_is_refused_by_name() {
    let error = |tensor: &Tensor, block_size| {
        let config = QuantConfig {
            block_size,
            ..QuantConfig::default()
        };
        quantize(tensor, &config).unwrap_err().to_string()
    };
    let some = Tensor::new(&[1f32, f32::NAN], &CPU).unwrap();
    assert!(error(&some, 64).contains("number 1 is NaN"));
    let whole = Tensor::new(&[1u32], &CPU).unwrap();
    assert!(error(&whole, 64).contains("[1] of U32"));
    let none = Tensor::zeros((0, 3), DType::F32, &CPU).unwrap();
    assert!(error(&none, 64).contains("at least one number"));
    for size in [0, 1, 63, 1 << 17] {
        assert!(
            error(&some, size).contains(&format!("block_size = {size}")),
            "{size}"
        );
    }
}
