//! `LoraMultiHeadAttention` against torch and PEFT (see `fixtures/peft/README.md`) and itself.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::HashMap;
use std::path::PathBuf;

use candle_core::backprop::GradStore;
use candle_core::{D, DType, Device, Tensor, Var};
use candle_nn::{Linear, Module, VarBuilder};
use lora::{
    AnyLayer, AttentionConfig, AttentionInput, AttentionWeights, BASE_ROW, Init, LoraBuilder,
    LoraConfig, LoraLinear, LoraModel, LoraMultiHeadAttention,
};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;
type Tensors = HashMap<String, Tensor>;

const CPU: Device = Device::Cpu;

fn seeded(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

fn random(shape: &[usize], dtype: DType, rng: &mut ChaCha8Rng) -> Result<Tensor> {
    let numbers = (0..shape.iter().product()).map(|_| rng.random_range(-1.0..1.0));
    let numbers: Vec<f64> = numbers.collect();
    Ok(Tensor::from_vec(numbers, shape, &CPU)?.to_dtype(dtype)?)
}

fn values(t: &Tensor) -> Result<Vec<f64>> {
    Ok(t.flatten_all()?.to_dtype(DType::F64)?.to_vec1()?)
}

/// The largest difference beside the largest number; NaN is infinitely far.
fn error(ours: &Tensor, theirs: &Tensor) -> Result<f64> {
    assert_eq!(ours.dims(), theirs.dims());
    let largest = |v: &[f64]| v.iter().fold(0f64, |m, x| m.max(x.abs()));
    let (ours, theirs) = (values(ours)?, values(theirs)?);
    let gaps: Vec<f64> = ours.iter().zip(&theirs).map(|(a, b)| a - b).collect();
    if gaps.iter().any(|gap| !gap.is_finite()) {
        return Ok(f64::INFINITY);
    }
    assert!(largest(&theirs) > 0.0, "nothing to compare with");
    Ok(largest(&gaps) / largest(&theirs))
}

// ------------------------------------------------------------------------------------- fixtures

struct Fixture {
    name: &'static str,
    tensors: Tensors,
    case: serde_json::Value,
}

impl Fixture {
    fn load(name: &'static str) -> Result<Self> {
        let folder = folder(name);
        let case = std::fs::read_to_string(folder.join("case.json"))?;
        Ok(Self {
            name,
            tensors: candle_core::safetensors::load(folder.join("case.safetensors"), &CPU)?,
            case: serde_json::from_str(&case)?,
        })
    }

    fn get(&self, key: &str) -> &Tensor {
        &self.tensors[key]
    }

    fn size(&self, key: &str) -> usize {
        self.case[key].as_u64().unwrap() as usize
    }

    /// A builder of the base; what has no path in the file comes to be under `attn`.
    fn builder(&self) -> LoraBuilder<'static> {
        let mut base = HashMap::new();
        for (key, tensor) in &self.tensors {
            if let Some(key) = key.strip_prefix("base.") {
                let path = if key.starts_with("model.") {
                    ""
                } else {
                    "attn."
                };
                base.insert(format!("{path}{key}"), tensor.clone());
            }
        }
        LoraBuilder::new(VarBuilder::from_tensors(base, DType::F32, &CPU))
    }

    fn config(&self) -> AttentionConfig {
        AttentionConfig::new(self.size("num_heads"))
            .with_batch_first(self.case["batch_first"].as_bool().unwrap())
    }

    /// The adapters of `mha_torch_*`, on all four projections.
    fn adapt(&self, attention: &LoraMultiHeadAttention) -> Result<Vec<(String, Var)>> {
        let mut pairs = Vec::new();
        for (at, layer) in ["q", "k", "v", "out"].iter().zip(attention.layers()) {
            let spec = &self.case["adapters"][at];
            let (r, alpha) = (spec["r"].as_u64().unwrap(), spec["alpha"].as_f64().unwrap());
            let config = LoraConfig::new(r as usize, alpha);
            layer.add_adapter("default", &config, &mut seeded(0))?;
            for (half, var) in [("A", layer.lora_a()?), ("B", layer.lora_b()?)] {
                var.set(self.get(&format!("{at}.lora_{half}")))?;
                pairs.push((format!("{at}.lora_{half}"), var));
            }
        }
        Ok(pairs)
    }

    /// The inputs as variables: query, key, value; the same variable where the file has no other.
    fn inputs(&self) -> Result<Vec<(String, Var)>> {
        let mut inputs = Vec::new();
        for key in ["input", "input_k", "input_v", "input_kv"] {
            if let Some(input) = self.tensors.get(key) {
                inputs.push((key.to_string(), Var::from_tensor(input)?));
            }
        }
        Ok(inputs)
    }

    /// Compares output, weights and all gradients; prints a line of the parity table.
    fn compare(
        &self,
        attention: &LoraMultiHeadAttention,
        variables: Vec<(String, Var)>,
        once: &str,
    ) -> Result {
        let inputs = self.inputs()?;
        let at = |i: usize| inputs[i.min(inputs.len() - 1)].1.as_tensor();
        let answer = attention.forward_t(
            &AttentionInput {
                attn_mask: self.tensors.get("attn_mask"),
                key_padding_mask: self.tensors.get("key_padding_mask"),
                is_causal: self.case["causal"] == true,
                weights: AttentionWeights::Averaged,
                ..AttentionInput::new(at(0), at(1), at(2))
            },
            false,
        )?;
        let output = error(&answer.output, self.get(&format!("{once}output")))?;
        let weights = match self.tensors.get("attn") {
            Some(theirs) => error(&answer.weights.unwrap(), theirs)?,
            None => 0.0,
        };
        let grads = (answer.output * self.get("probe"))?.sum_all()?.backward()?;
        let mut gradient = (0f64, String::new());
        let mut compared = 0;
        for (key, var) in variables.iter().chain(&inputs) {
            let ours = grads
                .get(var)
                .unwrap_or_else(|| panic!("no gradient: {key}"));
            let gap = error(ours, self.get(&format!("{once}grad.{key}")))?;
            compared += 1;
            if gap >= gradient.0 {
                gradient = (gap, key.clone());
            }
        }
        println!(
            "{:24} output {output:.1e}  attn {weights:.1e}  gradient {:.1e} ({}; of {compared})",
            self.name, gradient.0, gradient.1
        );
        let stored = |key: &&String| key.starts_with(&format!("{once}grad."));
        assert_eq!(compared, self.tensors.keys().filter(stored).count());
        assert!(
            output <= 1e-5 && weights <= 1e-5,
            "{}: {output}, {weights}",
            self.name
        );
        assert!(gradient.0 <= 1e-4, "{}: {gradient:?}", self.name);
        Ok(())
    }
}

fn folder(name: &str) -> PathBuf {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    root.join("tests/fixtures/peft").join(name)
}

#[test]
fn torch_attention() -> Result {
    for name in [
        "mha_torch_causal",
        "mha_torch_padding",
        "mha_torch_float_mask",
        "mha_torch_kdim_vdim",
        "mha_torch_batch_first",
    ] {
        let fixture = Fixture::load(name)?;
        let attention = fixture.builder().pp("attn").attention_with_dims(
            fixture.size("embed_dim"),
            fixture.size("kdim"),
            fixture.size("vdim"),
            &fixture.config(),
        )?;
        let variables = fixture.adapt(&attention)?;
        fixture.compare(&attention, variables, "")?;
    }
    Ok(())
}

#[test]
fn the_causal_flag_is_the_causal_mask() -> Result {
    let fixture = Fixture::load("mha_torch_causal")?;
    let attention = fixture
        .builder()
        .pp("attn")
        .attention(6, &fixture.config())?;
    fixture.adapt(&attention)?;
    let input = AttentionInput {
        is_causal: true,
        ..AttentionInput::self_attention(fixture.get("input"))
    };
    let ours = attention.forward_t(&input, false)?.output;
    assert!(error(&ours, fixture.get("output"))? <= 1e-5);
    Ok(())
}

#[test]
fn torch_grouped_query_attention() -> Result {
    let fixture = Fixture::load("mha_torch_grouped")?;
    let builder = fixture.builder().pp("attn");
    let linear = |at: &str, out| builder.pp(at).linear(10, out);
    let attention = LoraMultiHeadAttention::new(
        "attn",
        linear("q_proj", 12)?,
        linear("k_proj", 6)?,
        linear("v_proj", 6)?,
        builder.pp("out_proj").linear_no_bias(12, 10)?,
        &fixture.config().with_kv_heads(fixture.size("num_kv_heads")),
    )?;
    assert_eq!(attention.head_dim(), fixture.size("head_dim"));
    let variables = fixture.adapt(&attention)?;
    fixture.compare(&attention, variables, "")
}

#[test]
fn peft_attention_with_each_update_once() -> Result {
    for name in ["mha_peft", "mha_peft_cross"] {
        let fixture = Fixture::load(name)?;
        let adapter =
            candle_core::safetensors::load(folder(name).join("adapter_model.safetensors"), &CPU)?;
        let builder = fixture.builder();
        let place = builder.pp("model.layers.0.self_attn");
        let attention = place.attention_fused(6, &fixture.config())?;
        let mut model = builder.model()?;
        let config = LoraConfig::new(2, 3.0).with_targets(["self_attn", "out_proj"]);
        model.add_adapter("default", &config, &mut seeded(0))?;

        // PEFT's own names.
        let variables = attention.trainable_parameters();
        let mut keys: Vec<&String> = adapter.keys().collect();
        keys.sort();
        assert_eq!(keys, variables.iter().map(|(n, _)| n).collect::<Vec<_>>());
        for (key, var) in &variables {
            var.set(&adapter[key])?;
        }
        let names = |(key, var): &(String, Var)| (key.clone(), var.clone());
        fixture.compare(&attention, variables.iter().map(names).collect(), "once.")?;

        // PEFT's output has one more update of out_proj.
        let query = fixture.get("input");
        let memory = fixture.tensors.get("input_kv").unwrap_or(query);
        let pass = || -> Result<Tensor> {
            let input = AttentionInput::new(query, memory, memory);
            Ok(attention.forward_t(&input, false)?.output)
        };
        let (peft, ours) = (fixture.get("output"), pass()?);
        attention.out_proj().enable_adapters(false);
        let update = (&ours - pass()?)?;
        attention.out_proj().enable_adapters(true);
        let gap = error(&(peft - &ours)?, &update)?;
        println!("{name:24} PEFT's output minus ours is one update, but for {gap:.1e}");
        assert!(gap <= 1e-5);
        assert!(
            error(&ours, peft)? > 0.1,
            "PEFT's second update is gone from the fixture"
        );

        model.enable_adapters(false);
        assert!(error(&pass()?, fixture.get("output_base"))? <= 1e-5);
        model.enable_adapters(true);

        // Merged: in_proj as PEFT's, out_proj with the update once.
        let path = "model.layers.0.self_attn";
        let theirs = |kind: &str, at: &str| fixture.get(&format!("{kind}.{path}.{at}")).clone();
        let in_proj = attention.in_proj().unwrap().merged()?;
        assert!(error(in_proj.weight(), &theirs("merged", "in_proj_weight"))? <= 1e-6);
        let (twice, base) = ("merged", theirs("base", "out_proj.weight"));
        let middle = ((theirs(twice, "out_proj.weight") + base)? * 0.5)?;
        assert!(error(attention.out_proj().merged()?.weight(), &middle)? <= 1e-6);
        attention.merge()?;
        assert!(error(&pass()?, &ours)? <= 1e-5);
    }
    Ok(())
}

// ------------------------------------------------------------------------------------ behaviour

/// A small attention layer: E = 6, 4 query heads, 2 key heads, head_dim 3, kdim 5, vdim 4.
struct Small {
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
    config: AttentionConfig,
}

impl Small {
    fn new(dtype: DType, batch_first: bool) -> Result<Self> {
        let mut rng = seeded(7);
        let mut linear = |out: usize, inputs: usize| -> Result<Linear> {
            let weight = random(&[out, inputs], dtype, &mut rng)?;
            Ok(Linear::new(weight, Some(random(&[out], dtype, &mut rng)?)))
        };
        Ok(Self {
            q: linear(12, 6)?,
            k: linear(6, 5)?,
            v: linear(6, 4)?,
            out: linear(6, 12)?,
            config: AttentionConfig::new(4)
                .with_kv_heads(2)
                .with_batch_first(batch_first),
        })
    }

    fn build(&self) -> Result<LoraMultiHeadAttention> {
        let frozen =
            |at: &str, base: &Linear| LoraLinear::frozen(format!("attn.{at}_proj"), base.clone());
        Ok(LoraMultiHeadAttention::new(
            "attn",
            frozen("q", &self.q)?,
            frozen("k", &self.k)?,
            frozen("v", &self.v)?,
            frozen("out", &self.out)?,
            &self.config,
        )?)
    }

    /// With an adapter whose B is not zero on every projection.
    fn adapted(&self) -> Result<LoraMultiHeadAttention> {
        let attention = self.build()?;
        adapt(&attention)?;
        Ok(attention)
    }
}

fn adapt(attention: &LoraMultiHeadAttention) -> Result {
    let mut rng = seeded(8);
    let config = LoraConfig::new(2, 3.0).with_init(Init::Random);
    for layer in attention.layers() {
        layer.add_adapter("default", &config, &mut rng)?;
    }
    Ok(())
}

/// Query, key and value for [`Small`], batch first: N = 2, L = 3, S = 4.
fn small_inputs(dtype: DType) -> Result<[Tensor; 3]> {
    let mut rng = seeded(9);
    Ok([
        random(&[2, 3, 6], dtype, &mut rng)?,
        random(&[2, 4, 5], dtype, &mut rng)?,
        random(&[2, 4, 4], dtype, &mut rng)?,
    ])
}

fn fused(dtype: DType, batch_first: bool) -> Result<LoraMultiHeadAttention> {
    let mut rng = seeded(10);
    let mut tensors = HashMap::new();
    for (name, shape) in [
        ("in_proj_weight", &[18, 6][..]),
        ("in_proj_bias", &[18]),
        ("out_proj.weight", &[6, 6]),
        ("out_proj.bias", &[6]),
    ] {
        tensors.insert(format!("attn.{name}"), random(shape, dtype, &mut rng)?);
    }
    let builder = LoraBuilder::new(VarBuilder::from_tensors(tensors, dtype, &CPU));
    let config = AttentionConfig::new(2).with_batch_first(batch_first);
    Ok(builder.pp("attn").attention_fused(6, &config)?)
}

#[test]
fn no_future_leaks_through_a_causal_mask() -> Result {
    let attention = fused(DType::F32, true)?;
    adapt(&attention)?;
    let x = random(&[2, 5, 6], DType::F32, &mut seeded(1))?;
    let last = (x.narrow(1, 4, 1)? + 3.0)?;
    let other = Tensor::cat(&[&x.narrow(1, 0, 4)?, &last], 1)?;
    let pass = |x: &Tensor, is_causal| -> Result<Vec<Vec<Vec<f32>>>> {
        let input = AttentionInput {
            is_causal,
            ..AttentionInput::self_attention(x)
        };
        Ok(attention.forward_t(&input, false)?.output.to_vec3()?)
    };
    let (one, two) = (pass(&x, true)?, pass(&other, true)?);
    for (a, b) in one.iter().zip(&two) {
        assert_eq!(a[..4], b[..4]);
        assert_ne!(a[4], b[4]);
    }
    assert_ne!(pass(&x, false)?[0][0], pass(&other, false)?[0][0]);
    Ok(())
}

#[test]
fn padding_has_no_influence() -> Result {
    let attention = Small::new(DType::F32, true)?.adapted()?;
    let [q, k, v] = small_inputs(DType::F32)?;
    // Row 0 ignores its last key, row 1 its last two.
    let padding = Tensor::new(&[[0u8, 0, 0, 1], [0, 0, 1, 1]], &CPU)?;
    let added = padding.to_dtype(DType::F32)?;
    let added = padding.where_cond(
        &(added.ones_like()? * f64::NEG_INFINITY)?,
        &added.zeros_like()?,
    )?;
    let pass = |k: &Tensor, v: &Tensor, mask: Option<&Tensor>| -> Result<Vec<Vec<Vec<f32>>>> {
        let input = AttentionInput {
            key_padding_mask: mask,
            ..AttentionInput::new(&q, k, v)
        };
        Ok(attention.forward_t(&input, false)?.output.to_vec3()?)
    };
    let keep = (padding.eq(0u8)?.to_dtype(DType::F32)?).unsqueeze(2)?;
    let noise = (keep.affine(-1.0, 1.0)? * 50.0)?;
    let (k2, v2) = (k.broadcast_add(&noise)?, v.broadcast_sub(&noise)?);
    let plain = pass(&k, &v, Some(&padding))?;
    assert_eq!(plain, pass(&k2, &v2, Some(&padding))?);
    assert_eq!(plain, pass(&k2, &v2, Some(&added))?);
    assert_ne!(plain, pass(&k, &v, None)?);
    assert_ne!(pass(&k, &v, None)?, pass(&k2, &v2, None)?);

    // What is not padding answers as if the padding were not there.
    let row = |x: &Tensor, n, keys| x.narrow(0, n, 1).unwrap().narrow(1, 0, keys).unwrap();
    for (n, keys) in [(0, 3), (1, 2)] {
        let (query, key, value) = (row(&q, n, 3), row(&k, n, keys), row(&v, n, keys));
        let input = AttentionInput::new(&query, &key, &value);
        let alone = attention.forward_t(&input, false)?.output;
        let together = Tensor::new(plain[n].clone(), &CPU)?.unsqueeze(0)?;
        assert!(error(&together, &alone)? < 1e-6);
    }
    Ok(())
}

#[test]
fn masks_of_all_kinds_agree() -> Result {
    let attention = Small::new(DType::F32, true)?.adapted()?;
    let [q, k, v] = small_inputs(DType::F32)?;
    let blocked = Tensor::new(&[[0u8, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0]], &CPU)?;
    let heads = blocked.unsqueeze(0)?.broadcast_as((8, 3, 4))?;
    // 200 + 56 is 0 in a u8.
    let odd = (&blocked * 200.0)?;
    let padding = (Tensor::new(&[[0u8, 0, 0, 1], [0, 0, 0, 0]], &CPU)? * 56.0)?;
    let infinite = |mask: &Tensor| -> Result<Tensor> {
        let zero = mask.to_dtype(DType::F32)?.zeros_like()?;
        Ok(mask.where_cond(&(zero.ones_like()? * f64::NEG_INFINITY)?, &zero)?)
    };
    let pass = |attn_mask: &Tensor, padding: &Tensor| -> Result<Tensor> {
        let input = AttentionInput {
            attn_mask: Some(attn_mask),
            key_padding_mask: Some(padding),
            weights: AttentionWeights::PerHead,
            ..AttentionInput::new(&q, &k, &v)
        };
        Ok(attention.forward_t(&input, false)?.weights.unwrap())
    };
    let weights = pass(&blocked, &padding)?;
    let expected = values(&weights)?;
    for (attn_mask, padding) in [
        (&heads, &padding),
        (&odd, &padding),
        (&infinite(&blocked)?, &padding),
        (&blocked, &infinite(&padding)?),
        (&infinite(&heads.contiguous()?)?, &infinite(&padding)?),
    ] {
        assert_eq!(values(&pass(attn_mask, padding)?)?, expected);
    }
    // Zero exactly where blocked, and only there.
    for n in 0..2 {
        for (h, head) in weights.get(n)?.to_vec3::<f32>()?.iter().enumerate() {
            for (i, row) in head.iter().enumerate() {
                for (j, weight) in row.iter().enumerate() {
                    let mask = blocked.get(i)?.get(j)?.to_scalar::<u8>()?;
                    let zero = mask == 1 || (n == 0 && j == 3);
                    assert_eq!(*weight == 0.0, zero, "{n} {h} {i} {j}");
                }
                assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-6);
            }
        }
    }
    // A mask for each head of each row: heads of a row lie together.
    let mut one = vec![0u8; 8 * 3 * 4];
    one[(4 + 2) * 12 + 4 + 3] = 1; // row 1, head 2, query 1, key 3
    let one = pass(
        &Tensor::from_vec(one, (8, 3, 4), &CPU)?,
        &padding.zeros_like()?,
    )?;
    let zeros = one.eq(0f32)?.to_dtype(DType::U32)?;
    assert_eq!(zeros.sum_all()?.to_scalar::<u32>()?, 1);
    assert_eq!(
        zeros.get(1)?.get(2)?.get(1)?.to_vec1::<u32>()?,
        [0, 0, 0, 1]
    );
    Ok(())
}

#[test]
fn a_query_that_sees_nothing_gives_the_bias() -> Result {
    let small = Small::new(DType::F32, true)?;
    let attention = small.adapted()?;
    let [q, k, v] = small_inputs(DType::F32)?;
    let [q, k, v] = [
        Var::from_tensor(&q)?,
        Var::from_tensor(&k)?,
        Var::from_tensor(&v)?,
    ];
    let boolean = Tensor::new(&[[0u8, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]], &CPU)?;
    let zero = Tensor::zeros((3, 4), DType::F32, &CPU)?;
    let infinite = boolean.where_cond(&(zero.ones_like()? * f64::NEG_INFINITY)?, &zero)?;
    for mask in [&boolean, &infinite] {
        let input = AttentionInput {
            attn_mask: Some(mask),
            weights: AttentionWeights::PerHead,
            ..AttentionInput::new(&q, &k, &v)
        };
        let answer = attention.forward_t(&input, false)?;
        let bias = small.out.bias().unwrap().to_vec1::<f32>()?;
        let output = answer.output.to_vec3::<f32>()?;
        assert_eq!(output[0][1], bias);
        assert_ne!(output[0][0], bias);
        let weights = answer.weights.unwrap();
        assert_eq!(values(&weights.narrow(2, 1, 1)?)?, [0.0; 2 * 4 * 4]);

        let grads = answer.output.sqr()?.sum_all()?.backward()?;
        for (name, var) in attention.trainable_parameters() {
            let gradient = values(grads.get(&var).unwrap())?;
            assert!(gradient.iter().all(|g| g.is_finite()), "{name}");
            assert!(gradient.iter().any(|g| *g != 0.0), "{name}");
        }
        for var in [&q, &k, &v] {
            assert!(
                values(grads.get(var).unwrap())?
                    .iter()
                    .all(|g| g.is_finite())
            );
        }
        let query = grads.get(&q).unwrap();
        assert_eq!(values(&query.narrow(1, 1, 1)?)?, [0.0; 2 * 6]);
        assert!(values(&query.narrow(1, 0, 1)?)?.iter().any(|g| *g != 0.0));
    }
    // f32::MIN is a number, not a block: such a row is even over what is not blocked.
    let lowest = (zero.ones_like()? * f64::from(f32::MIN))?;
    let padding = Tensor::new(&[[0u8, 0, 0, 1], [0, 0, 1, 1]], &CPU)?;
    let input = AttentionInput {
        attn_mask: Some(&lowest),
        key_padding_mask: Some(&padding),
        weights: AttentionWeights::Averaged,
        ..AttentionInput::new(&q, &k, &v)
    };
    let weights = attention.forward_t(&input, false)?.weights.unwrap();
    assert_eq!(weights.get(1)?.to_vec2::<f32>()?, [[0.5, 0.5, 0.0, 0.0]; 3]);
    Ok(())
}

#[test]
fn large_scores_stay_finite() -> Result {
    let attention = Small::new(DType::F32, true)?.adapted()?;
    let [q, k, v] = small_inputs(DType::F32)?;
    let (q, k) = (Var::from_tensor(&(q * 1e4)?)?, (k * 1e4)?);
    let input = AttentionInput {
        is_causal: true,
        ..AttentionInput::new(&q, &k, &v)
    };
    let output = attention.forward_t(&input, false)?.output;
    assert!(values(&output)?.iter().all(|x| x.is_finite()));
    let grads = output.sum_all()?.backward()?;
    for (name, var) in attention.trainable_parameters() {
        let gradient = values(grads.get(&var).unwrap())?;
        assert!(gradient.iter().all(|g| g.is_finite()), "{name}");
    }
    Ok(())
}

#[test]
fn grouped_heads_are_repeated_heads() -> Result {
    for kv in [1, 2] {
        let mut small = Small::new(DType::F64, true)?;
        let first = |base: &Linear| -> Result<Linear> {
            let (weight, bias) = (base.weight(), base.bias().unwrap());
            let bias = bias.narrow(0, 0, 3 * kv)?;
            Ok(Linear::new(weight.narrow(0, 0, 3 * kv)?, Some(bias)))
        };
        (small.k, small.v) = (first(&small.k)?, first(&small.v)?);
        small.config.num_kv_heads = kv;
        let grouped = small.adapted()?;
        let repeat = |layer: Option<&LoraLinear>| -> Result<Linear> {
            let base = layer.unwrap().merged()?;
            // candle-transformers' repeat_kv: head h is read by h · g … (h + 1) · g − 1.
            let heads = |x: &Tensor| -> Result<Tensor> {
                let part = |h: usize| x.narrow(0, h / (4 / kv) * 3, 3).unwrap();
                Ok(Tensor::cat(&[part(0), part(1), part(2), part(3)], 0)?)
            };
            let bias = heads(base.bias().unwrap())?;
            Ok(Linear::new(heads(base.weight())?, Some(bias)))
        };
        let full = Small {
            q: grouped.q_proj().unwrap().merged()?,
            k: repeat(grouped.k_proj())?,
            v: repeat(grouped.v_proj())?,
            out: grouped.out_proj().merged()?,
            config: AttentionConfig::new(4).with_batch_first(true),
        };
        let [q, k, v] = small_inputs(DType::F64)?;
        let input = AttentionInput {
            weights: AttentionWeights::PerHead,
            ..AttentionInput::new(&q, &k, &v)
        };
        let one = grouped.forward_t(&input, false)?;
        let two = full.build()?.forward_t(&input, false)?;
        assert!(error(&one.output, &two.output)? < 1e-13);
        assert!(error(&one.weights.unwrap(), &two.weights.unwrap())? < 1e-13);
    }
    Ok(())
}

#[test]
fn a_fresh_adapter_changes_nothing() -> Result {
    for batch_first in [false, true] {
        let x = random(&[3, 4, 6], DType::F32, &mut seeded(2))?;
        let attention = fused(DType::F32, batch_first)?;
        let base = attention.forward(&x)?.to_vec3::<f32>()?;
        for layer in attention.layers() {
            layer.add_adapter("default", &LoraConfig::new(2, 4.0), &mut seeded(3))?;
        }
        assert_eq!(attention.forward(&x)?.to_vec3::<f32>()?, base);
        let b = attention.out_proj().lora_b()?;
        b.set(&b.ones_like()?)?;
        assert_ne!(attention.forward(&x)?.to_vec3::<f32>()?, base);
    }
    Ok(())
}

#[test]
fn dropout_acts_in_every_projection() -> Result {
    let [q, k, v] = small_inputs(DType::F64)?;
    let input = AttentionInput::new(&q, &k, &v);
    for i in 0..4 {
        let attention = Small::new(DType::F64, true)?.build()?;
        let config = LoraConfig::new(2, 3.0).with_init(Init::Random);
        let config = config.with_dropout(0.5);
        attention.layers()[i].add_adapter("default", &config, &mut seeded(4))?;
        let pass =
            |train| -> Result<Vec<f64>> { values(&attention.forward_t(&input, train)?.output) };
        assert_ne!(pass(true)?, pass(true)?, "projection {i}");
        assert_eq!(pass(false)?, pass(false)?);
    }
    Ok(())
}

#[test]
fn merged_is_unmerged() -> Result {
    let attention = Small::new(DType::F64, true)?.adapted()?;
    let [q, k, v] = small_inputs(DType::F64)?;
    let input = AttentionInput::new(&q, &k, &v);
    let apart = attention.forward_t(&input, false)?.output;
    attention.safe_merge()?;
    assert!(attention.is_merged());
    let merged = attention.forward_t(&input, false)?.output;
    assert!(error(&merged, &apart)? < 1e-13);
    let message = attention.forward_t(&input, true).unwrap_err().to_string();
    assert!(message.contains("attn.q_proj"), "{message}");
    attention.unmerge();
    let again = attention.forward_t(&input, true)?.output;
    assert_eq!(values(&again)?, values(&apart)?);

    // A merge that fails leaves no projection merged.
    let b = attention.out_proj().lora_b()?;
    b.set(&(b.ones_like()? * f64::INFINITY)?)?;
    let message = attention.safe_merge().unwrap_err().to_string();
    assert!(message.contains("attn.out_proj"), "{message}");
    assert!(!attention.is_merged());
    Ok(())
}

#[test]
fn fused_and_split_are_one_computation() -> Result {
    let mut rng = seeded(11);
    let mut tensors = HashMap::new();
    for (name, shape) in [
        ("in_proj_weight", &[12, 8][..]), // q: 8 rows, k and v: 2 each
        ("in_proj_bias", &[12]),
        ("out_proj.weight", &[8, 8]),
        ("out_proj.bias", &[8]),
    ] {
        tensors.insert(format!("a.{name}"), random(shape, DType::F64, &mut rng)?);
    }
    let build = || LoraBuilder::new(VarBuilder::from_tensors(tensors.clone(), DType::F64, &CPU));
    let config = AttentionConfig::new(4).with_kv_heads(1);
    let (one, two) = (build(), build());
    let split = one.pp("a").attention(8, &config)?;
    let whole = two.pp("a").attention_fused(8, &config)?;
    let numbers = 12 * 8 + 12 + 8 * 8 + 8;
    assert_eq!(one.model()?.parameter_count().all, numbers);
    assert_eq!(two.model()?.parameter_count().all, numbers);
    assert_eq!(split.parameter_count().all, numbers);

    let x = random(&[3, 2, 8], DType::F64, &mut rng)?;
    let y = random(&[5, 2, 8], DType::F64, &mut rng)?;
    let z = random(&[5, 2, 8], DType::F64, &mut rng)?;
    let w = random(&[3, 2, 8], DType::F64, &mut rng)?;
    for [q, k, v] in [
        [&x, &x, &x],
        [&x, &y, &y],
        [&x, &y, &z],
        [&x, &x, &w],
        [&x, &w, &x],
    ] {
        let input = AttentionInput::new(q, k, v);
        let (a, b) = (
            split.forward_t(&input, false)?,
            whole.forward_t(&input, false)?,
        );
        assert!(error(&a.output, &b.output)? < 1e-13);
    }
    Ok(())
}

/// With W_q = W_k and one dropout for both, scores are symmetric; with two they are not.
#[test]
fn a_fused_layer_runs_once_for_one_tensor() -> Result {
    let zero = Linear::new(Tensor::zeros((6, 2), DType::F64, &CPU)?, None);
    let identity = Linear::new(Tensor::eye(2, DType::F64, &CPU)?, None);
    let config = LoraConfig::new(2, 4.0).with_dropout(0.5);
    let in_proj = LoraLinear::new("attn", zero, &config, &mut seeded(1))?;
    let third = random(&[2, 2], DType::F64, &mut seeded(2))?;
    in_proj
        .lora_b()?
        .set(&Tensor::cat(&[&third, &third, &third], 0)?)?;
    let out = LoraLinear::frozen("attn.out_proj", identity)?;
    let config = AttentionConfig::new(1).with_batch_first(true);
    let attention = LoraMultiHeadAttention::fused("attn", in_proj, out, &config)?;
    let x = random(&[1, 16, 2], DType::F64, &mut seeded(3))?;
    // log w_ij − log w_ji = log z_j − log z_i for symmetric scores, so it sums to 0 in a ring.
    let ring = |x: &Tensor, y: &Tensor| -> Result<f64> {
        let input = AttentionInput {
            weights: AttentionWeights::Averaged,
            ..AttentionInput::new(x, y, x)
        };
        let weights = attention.forward_t(&input, true)?.weights.unwrap();
        let w = weights.get(0)?.log()?.to_vec2::<f64>()?;
        let at = |i: usize, j: usize, k: usize| {
            w[i][j] + w[j][k] + w[k][i] - w[j][i] - w[k][j] - w[i][k]
        };
        Ok((0..14)
            .map(|i| at(i, i + 1, i + 2).abs())
            .fold(0.0, f64::max))
    };
    assert!(ring(&x, &x)? < 1e-12);
    assert!(ring(&x, &x.copy()?)? > 1e-6);
    Ok(())
}

#[test]
fn half_precision() -> Result {
    for (dtype, bound) in [(DType::F16, 5e-3), (DType::BF16, 4e-2)] {
        let small = Small::new(dtype, false)?;
        let attention = small.adapted()?;
        let wide = |base: &Linear| -> Result<Linear> {
            let bias = base.bias().unwrap().to_dtype(DType::F64)?;
            Ok(Linear::new(base.weight().to_dtype(DType::F64)?, Some(bias)))
        };
        let exact = Small {
            q: wide(&small.q)?,
            k: wide(&small.k)?,
            v: wide(&small.v)?,
            out: wide(&small.out)?,
            config: small.config.clone(),
        };
        let exact = exact.adapted()?;
        for (from, to) in attention.layers().iter().zip(exact.layers()) {
            assert_eq!(from.lora_a()?.dtype(), DType::F32);
            to.lora_a()?.set(&from.lora_a()?.to_dtype(DType::F64)?)?;
            to.lora_b()?.set(&from.lora_b()?.to_dtype(DType::F64)?)?;
        }
        let inputs = small_inputs(dtype)?;
        let first = |x: &Tensor| x.transpose(0, 1)?.contiguous();
        let [q, k, v] = [first(&inputs[0])?, first(&inputs[1])?, first(&inputs[2])?];
        let padding = Tensor::new(&[[0u8, 0, 0, 1], [1, 1, 1, 1]], &CPU)?;
        let added = Tensor::new(&[[-1f32, 0., 0.5, 2.]; 3], &CPU)?;
        let pass = |attention: &LoraMultiHeadAttention, dtype: DType| -> Result<_> {
            let [q, k, v] = [q.to_dtype(dtype)?, k.to_dtype(dtype)?, v.to_dtype(dtype)?];
            let input = AttentionInput {
                attn_mask: Some(&added.to_dtype(dtype)?),
                key_padding_mask: Some(&padding),
                weights: AttentionWeights::Averaged,
                ..AttentionInput::new(&q, &k, &v)
            };
            let answer = attention.forward_t(&input, false)?;
            let grads = answer.output.sum_all()?.backward()?;
            Ok((answer, grads))
        };
        let (ours, grads) = pass(&attention, dtype)?;
        let (theirs, exact_grads) = pass(&exact, DType::F64)?;
        assert_eq!(ours.output.dtype(), dtype);
        assert_eq!(ours.weights.as_ref().unwrap().dtype(), dtype);
        let output = error(&ours.output, &theirs.output)?;
        let weights = error(&ours.weights.unwrap(), &theirs.weights.unwrap())?;
        let mut worst = 0f64;
        let pairs = attention.trainable_parameters().into_iter();
        for ((_, one), (_, two)) in pairs.zip(exact.trainable_parameters()) {
            let (one, two) = (grads.get(&one).unwrap(), exact_grads.get(&two).unwrap());
            worst = worst.max(error(one, two)?);
        }
        println!("{dtype:?}: output {output:.1e}, attn {weights:.1e}, gradient {worst:.1e}");
        assert!(output < bound && weights < bound && worst < 2.0 * bound);
    }
    Ok(())
}

#[test]
fn scores_are_scaled_before_f16_overflows() -> Result {
    // 64 · 40² is infinite in f16, an eighth of it is not.
    let one = |at: &str| {
        let weight = Tensor::eye(64, DType::F16, &CPU)?;
        LoraLinear::frozen(at, Linear::new(weight, None))
    };
    let config = AttentionConfig::new(1);
    let attention =
        LoraMultiHeadAttention::new("a", one("q")?, one("k")?, one("v")?, one("out")?, &config)?;
    let x = (Tensor::ones((3, 64), DType::F16, &CPU)? * 40.0)?;
    assert_eq!(values(&attention.forward(&x)?)?, [40.0; 3 * 64]);
    Ok(())
}

#[test]
fn the_softmax_of_half_precision_is_in_f32() -> Result {
    // 4096 equal keys: in bf16 a sum of ones stops at 256, and weights would be 1/256.
    let one = |at: &str| {
        let weight = Tensor::ones((1, 1), DType::BF16, &CPU)?;
        LoraLinear::frozen(at, Linear::new(weight, None))
    };
    let attention = LoraMultiHeadAttention::new(
        "attn",
        one("q")?,
        one("k")?,
        one("v")?,
        one("out")?,
        &AttentionConfig::new(1),
    )?;
    let x = Tensor::ones((4096, 1), DType::BF16, &CPU)?;
    let query = x.narrow(0, 0, 1)?;
    let input = AttentionInput {
        weights: AttentionWeights::Averaged,
        ..AttentionInput::new(&query, &x, &x)
    };
    let weights = attention.forward_t(&input, false)?.weights.unwrap();
    let worst = values(&weights)?
        .into_iter()
        .fold(0f64, |m, w| m.max((w * 4096.0 - 1.0).abs()));
    assert!(worst < 1e-2, "{worst}");
    Ok(())
}

#[test]
fn gradients_by_finite_differences() -> Result {
    let attention = Small::new(DType::F64, true)?.adapted()?;
    let [q, k, v] = small_inputs(DType::F64)?;
    let inf = f64::NEG_INFINITY;
    let mask = random(&[8, 3, 4], DType::F64, &mut seeded(12))?;
    let stop = Tensor::new(&[[0u8, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]], &CPU)?;
    let stop = stop.unsqueeze(0)?.broadcast_as((8, 3, 4))?;
    let mask = stop.where_cond(&(mask.ones_like()? * inf)?, &mask)?;
    let mut variables: Vec<(String, Var)> = attention.trainable_parameters();
    for (name, x) in [("query", &q), ("key", &k), ("value", &v), ("mask", &mask)] {
        variables.push((name.to_string(), Var::from_tensor(x)?));
    }
    let of = |name: &str| &variables.iter().find(|(n, _)| n == name).unwrap().1;
    let (q, k, v, mask) = (of("query"), of("key"), of("value"), of("mask"));
    // Row 1, query 0 sees nothing: causal leaves key 0, and that is padding.
    let padding = Tensor::new(&[[0u8, 0, 0, 0], [1, 0, 0, 0]], &CPU)?;
    let probe = random(&[2, 3, 6], DType::F64, &mut seeded(13))?;
    let inner = random(&[2, 4, 3, 4], DType::F64, &mut seeded(14))?;
    let loss = || -> Result<Tensor> {
        let input = AttentionInput {
            attn_mask: Some(mask),
            key_padding_mask: Some(&padding),
            is_causal: true,
            weights: AttentionWeights::PerHead,
            ..AttentionInput::new(q, k, v)
        };
        let answer = attention.forward_t(&input, false)?;
        let weights = (answer.weights.unwrap() * &inner)?.sum_all()?;
        Ok(((answer.output * &probe)?.sum_all()? + weights)?)
    };
    let grads: GradStore = loss()?.backward()?;
    let (mut checked, mut worst) = (0, 0f64);
    for (name, var) in &variables {
        let gradient = values(grads.get(var).unwrap())?;
        assert!(
            gradient.iter().all(|g| g.is_finite()),
            "{name}: {gradient:?}"
        );
        assert!(gradient.iter().any(|g| *g != 0.0), "{name} has no gradient");
        let start = values(var)?;
        for (i, g) in gradient.iter().enumerate() {
            if start[i] == inf {
                assert_eq!(*g, 0.0, "{name}[{i}]");
                continue;
            }
            let at = |step: f64| -> Result<f64> {
                let mut moved = start.clone();
                moved[i] += step;
                var.set(&Tensor::from_vec(moved, var.shape(), &CPU)?)?;
                Ok(loss()?.to_scalar::<f64>()?)
            };
            let slope = (at(1e-5)? - at(-1e-5)?) / 2e-5;
            let gap = (slope - g).abs() / g.abs().max(1.0);
            assert!(gap < 1e-7, "{name}[{i}]: {g} against {slope}");
            (checked, worst) = (checked + 1, worst.max(gap));
        }
        var.set(&Tensor::from_vec(start, var.shape(), &CPU)?)?;
    }
    println!("finite differences: {checked} numbers, largest gap {worst:.1e}");
    assert!(checked > 200);
    Ok(())
}

#[test]
fn rows_with_adapters_of_their_own() -> Result {
    for batch_first in [false, true] {
        let attention = fused(DType::F64, batch_first)?;
        let layers: Vec<&dyn AnyLayer> = attention.layers().into_iter().map(|l| l as _).collect();
        let mut model = LoraModel::new(&layers)?;
        let mut rng = seeded(21);
        for name in ["fr", "de"] {
            let config = LoraConfig::new(2, 3.0).with_init(Init::Random);
            let config = config.with_targets(["attn", "out_proj"]);
            model.add_adapter(name, &config, &mut rng)?;
        }
        // N = 3, L = 4: a wrong dimension has a wrong number of rows.
        let (n, l) = if batch_first { (0, 1) } else { (1, 0) };
        let shape = |rows, length| {
            let mut shape = [0, 0, 6];
            (shape[n], shape[l]) = (rows, length);
            shape
        };
        let x = random(&shape(3, 4), DType::F64, &mut rng)?;
        let memory = random(&shape(3, 5), DType::F64, &mut rng)?;
        let padding = Tensor::new(&[[0u8, 0, 0, 0, 1], [0; 5], [1, 0, 0, 0, 0]], &CPU)?;
        let pass = |x: &Tensor, memory: &Tensor, padding: &Tensor| -> Result<Tensor> {
            let input = AttentionInput {
                key_padding_mask: Some(padding),
                ..AttentionInput::new(x, memory, memory)
            };
            Ok(attention.forward_t(&input, false)?.output)
        };
        let rows = ["de", BASE_ROW, "fr"];
        let mixed = model.with_adapters(&rows, || pass(&x, &memory, &padding))??;
        for (i, row) in rows.iter().enumerate() {
            let alone = model.with_adapters(&[row], || {
                let (x, memory) = (x.narrow(n, i, 1)?, memory.narrow(n, i, 1)?);
                pass(&x, &memory, &padding.narrow(0, i, 1)?)
            })??;
            assert!(error(&mixed.narrow(n, i, 1)?, &alone)? < 1e-13);
            // And alone is what the model gives with that adapter active.
            match *row {
                BASE_ROW => model.set_adapter(&[])?,
                name => model.set_adapter(&[name])?,
            }
            let active = pass(&x, &memory, &padding)?.narrow(n, i, 1)?;
            assert!(error(&active, &alone)? < 1e-13);
        }
    }
    Ok(())
}

#[test]
fn layouts_agree() -> Result {
    let small = Small::new(DType::F64, true)?;
    let [q, k, v] = small_inputs(DType::F64)?;
    let attention = small.adapted()?;
    let sequence_first = Small::new(DType::F64, false)?.adapted()?;
    let batch = |weights| AttentionInput {
        is_causal: true,
        weights,
        ..AttentionInput::new(&q, &k, &v)
    };
    let one = attention.forward_t(&batch(AttentionWeights::PerHead), false)?;
    let mean = attention.forward_t(&batch(AttentionWeights::Averaged), false)?;
    let plain = attention.forward_t(&batch(AttentionWeights::No), false)?;
    assert!(plain.weights.is_none());
    // Without weights another operation does the work.
    assert!(error(&plain.output, &one.output)? < 1e-13);
    let weights = one.weights.unwrap();
    assert_eq!(weights.dims(), [2, 4, 3, 4]);
    assert!(error(&mean.weights.unwrap(), &weights.mean(1)?)? < 1e-15);

    // Strided inputs, not copied by the caller.
    let turned = [q.transpose(0, 1)?, k.transpose(0, 1)?, v.transpose(0, 1)?];
    let input = AttentionInput {
        is_causal: true,
        ..AttentionInput::new(&turned[0], &turned[1], &turned[2])
    };
    let two = sequence_first.forward_t(&input, false)?.output;
    assert_eq!(two.dims(), [3, 2, 6]);
    assert_eq!(values(&two.transpose(0, 1)?)?, values(&plain.output)?);

    // One row, with and without the dimension N.
    let mask = Tensor::new(&[0u8, 0, 0, 1], &CPU)?;
    let heads = random(&[4, 3, 4], DType::F64, &mut seeded(31))?;
    for attention in [&attention, &sequence_first] {
        let (q, k, v) = (q.get(1)?, k.get(1)?, v.get(1)?);
        let at = if attention.config().batch_first { 0 } else { 1 };
        let rows = [q.unsqueeze(at)?, k.unsqueeze(at)?, v.unsqueeze(at)?];
        let with = |q, k, v, mask| AttentionInput {
            attn_mask: Some(&heads),
            key_padding_mask: Some(mask),
            weights: AttentionWeights::PerHead,
            ..AttentionInput::new(q, k, v)
        };
        let bare = attention.forward_t(&with(&q, &k, &v, &mask), false)?;
        let mask = mask.unsqueeze(0)?;
        let input = with(&rows[0], &rows[1], &rows[2], &mask);
        let batched = attention.forward_t(&input, false)?;
        assert_eq!(bare.output.dims(), [3, 6]);
        assert_eq!(values(&bare.output)?, values(&batched.output)?);
        let (bare, batched) = (bare.weights.unwrap(), batched.weights.unwrap());
        assert_eq!(
            (bare.dims(), batched.dims()),
            (&[4, 3, 4][..], &[1, 4, 3, 4][..])
        );
    }
    Ok(())
}

#[test]
fn checkpoints_of_torch() -> Result {
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &CPU).unwrap();
    let build = |tensors: &[(&str, &[usize])]| {
        let named = |(name, shape): &(&str, &[usize])| (format!("m.attn.{name}"), zeros(shape));
        let tensors: HashMap<_, _> = tensors.iter().map(named).collect();
        LoraBuilder::new(VarBuilder::from_tensors(tensors, DType::F32, &CPU)).pp("m.attn")
    };
    let config = AttentionConfig::new(2);
    let bare: [(&str, &[usize]); 2] = [("in_proj_weight", &[18, 6]), ("out_proj.weight", &[6, 6])];
    let attention = build(&bare).attention(6, &config)?;
    assert!(
        attention
            .layers()
            .iter()
            .all(|layer| layer.base().bias().is_none())
    );
    assert_eq!(
        attention.to_string(),
        "\
LoraMultiHeadAttention(m.attn: 2 heads of 3, 0 trainable)
  LoraLinear(m.attn.q_proj: 6 → 6, 0 trainable)
  LoraLinear(m.attn.k_proj: 6 → 6, 0 trainable)
  LoraLinear(m.attn.v_proj: 6 → 6, 0 trainable)
  LoraLinear(m.attn.out_proj: 6 → 6, 0 trainable)"
    );
    let with = |more: &[(&'static str, &'static [usize])]| build(&[&bare, more].concat());
    let first_line = |error: lora::Error| error.to_string().lines().next().unwrap().to_string();
    let refused = |builder: LoraBuilder<'_>, embed, config: &AttentionConfig| {
        let one = first_line(builder.attention(embed, config).unwrap_err());
        let two = first_line(builder.attention_fused(embed, config).unwrap_err());
        assert_eq!(one, two);
        assert!(one.contains("m.attn"), "{one}");
        one
    };
    let message = refused(with(&[("in_proj_bias", &[18])]), 6, &config);
    assert!(message.contains("out_proj.bias"), "{message}");
    let message = refused(with(&[("out_proj.bias", &[6])]), 6, &config);
    assert!(message.contains("only one of in_proj_bias"), "{message}");
    let message = refused(with(&[("bias_k", &[1, 1, 6])]), 6, &config);
    assert!(message.contains("bias_k"), "{message}");
    let message = refused(with(&[]), 7, &config);
    assert!(message.contains("embed_dim = 7"), "{message}");
    refused(with(&[]), 0, &config);
    refused(with(&[]), 6, &AttentionConfig::new(0));
    refused(with(&[]), 8, &config); // another shape
    let message = refused(build(&bare[1..]), 6, &config);
    assert!(message.contains("in_proj_weight"), "{message}");
    let message = build(&bare)
        .attention_with_dims(6, 5, 6, &config)
        .unwrap_err();
    assert!(message.to_string().contains("q_proj_weight"), "{message}");
    Ok(())
}

#[test]
fn parameters_are_sorted_and_counted() -> Result {
    let attention = Small::new(DType::F32, true)?.adapted()?;
    let names: Vec<_> = attention
        .trainable_parameters()
        .into_iter()
        .map(|(n, _)| n)
        .collect();
    let of = |at: &str| {
        ["A", "B"].map(|half| format!("base_model.model.attn.{at}_proj.lora_{half}.weight"))
    };
    assert_eq!(names, [of("k"), of("out"), of("q"), of("v")].concat());
    let trainable = 2 * ((12 + 6) + (6 + 5) + (6 + 4) + (6 + 12));
    let frozen = 12 * 6 + 12 + 6 * 5 + 6 + 6 * 4 + 6 + 6 * 12 + 6;
    let count = attention.parameter_count();
    assert_eq!(
        (count.trainable, count.all),
        (trainable, trainable + frozen)
    );
    let first = "LoraMultiHeadAttention(attn: 4 heads of 3, 2 for keys and values, 114 trainable)";
    assert_eq!(attention.to_string().lines().next(), Some(first));
    // Clones are handles.
    let clone = attention.clone();
    clone.q_proj().unwrap().delete_adapter("default")?;
    assert_eq!(attention.parameter_count().trainable, trainable - 2 * 18);
    Ok(())
}

#[test]
fn refuses_layers_that_do_not_fit() -> Result {
    let frozen = |at: &str, out: usize, inputs: usize| {
        let weight = Tensor::zeros((out, inputs), DType::F32, &CPU)?;
        LoraLinear::frozen(at, Linear::new(weight, None))
    };
    let build = |rows: [usize; 3], columns: usize, config: AttentionConfig| -> Result<String> {
        let built = LoraMultiHeadAttention::new(
            "layers.0.attn",
            frozen("q", rows[0], 6)?,
            frozen("k", rows[1], 5)?,
            frozen("v", rows[2], 4)?,
            frozen("out", 7, columns)?,
            &config,
        );
        match built {
            Ok(_) => Ok(String::new()),
            Err(error) => Ok(error.to_string()),
        }
    };
    let four = || AttentionConfig::new(4);
    assert_eq!(build([12, 12, 12], 12, four())?, "");
    assert_eq!(build([12, 6, 6], 12, four().with_kv_heads(2))?, "");
    let cases = [
        (
            build([6, 6, 6], 6, four())?,
            "the weight of q [6, 6] does not fit num_heads = 4",
        ),
        (
            build([12, 6, 12], 12, four())?,
            "the weight of k [6, 5] does not fit num_kv_heads = 4",
        ),
        (
            build([12, 12, 6], 12, four())?,
            "the weight of v [6, 4] does not fit num_kv_heads = 4",
        ),
        (
            build([12, 12, 12], 6, four())?,
            "the weight of out [7, 6] does not fit",
        ),
        (
            build([12, 9, 9], 12, four().with_kv_heads(3))?,
            "num_heads = 4 with num_kv_heads = 3",
        ),
        (
            build([12, 24, 24], 12, four().with_kv_heads(8))?,
            "num_kv_heads = 8",
        ),
        (
            build([12, 12, 12], 12, four().with_kv_heads(0))?,
            "num_kv_heads = 0",
        ),
        (
            build([12, 12, 12], 12, AttentionConfig::new(0))?,
            "num_heads = 0",
        ),
        (
            build([12, 12, 12], 12, AttentionConfig::new(usize::MAX))?,
            "the weight of q",
        ),
        (
            build([12, 12, 12], 12, four().with_scale(0.0))?,
            "scale = 0",
        ),
        (
            build([12, 12, 12], 12, four().with_scale(f64::NAN))?,
            "scale = NaN",
        ),
    ];
    for (message, wanted) in cases {
        assert!(message.contains(wanted), "{message:?} without {wanted:?}");
        assert!(message.starts_with("layer layers.0.attn: "), "{message}");
    }
    let fuse = |rows, columns, config: &AttentionConfig| {
        let (in_proj, out) = (
            frozen("in", rows, 6).unwrap(),
            frozen("out", 6, columns).unwrap(),
        );
        let built = LoraMultiHeadAttention::fused("attn", in_proj, out, config);
        built.map_or_else(|error| error.to_string(), |_| String::new())
    };
    assert_eq!(fuse(24, 12, &four().with_kv_heads(2)), "");
    let message = fuse(20, 12, &four().with_kv_heads(2));
    assert!(
        message.contains("layer attn: the weight of in_proj [20, 6]"),
        "{message}"
    );
    assert!(fuse(24, 6, &four().with_kv_heads(2)).contains("it must have 12 columns"));
    assert!(fuse(24, 6, &AttentionConfig::new(usize::MAX)).contains("in_proj"));

    let other = Linear::new(Tensor::zeros((6, 6), DType::F64, &CPU)?, None);
    let other = LoraLinear::frozen("out", other)?;
    let config = AttentionConfig::new(2);
    let mixed = LoraMultiHeadAttention::fused("attn", frozen("in", 18, 6)?, other, &config);
    assert!(mixed.unwrap_err().to_string().contains("one type"));
    let twice =
        LoraMultiHeadAttention::fused("attn", frozen("a", 18, 6)?, frozen("a", 6, 6)?, &config);
    assert!(
        twice
            .unwrap_err()
            .to_string()
            .contains("two projections named \"a\"")
    );
    Ok(())
}

#[test]
fn refuses_inputs_that_do_not_fit() -> Result {
    let small = Small::new(DType::F32, true)?;
    let (attention, sequence_first) = (small.adapted()?, Small::new(DType::F32, false)?.adapted()?);
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &CPU).unwrap();
    let refused = |attention: &LoraMultiHeadAttention, input: AttentionInput<'_>, wanted: &str| {
        let message = attention.forward_t(&input, false).unwrap_err().to_string();
        assert!(message.contains(wanted), "{message:?} without {wanted:?}");
        assert!(message.starts_with("layer attn"), "{message}");
    };
    let (q, k, v) = (zeros(&[2, 3, 6]), zeros(&[2, 4, 5]), zeros(&[2, 4, 4]));
    assert!(
        attention
            .forward_t(&AttentionInput::new(&q, &k, &v), false)
            .is_ok()
    );
    for (q, k, v, wanted) in [
        (
            &zeros(&[2, 3, 7]),
            &k,
            &v,
            "attn.q_proj: input [2, 3, 7] does not fit weight [12, 6]",
        ),
        (
            &q,
            &zeros(&[2, 4, 6]),
            &v,
            "attn.k_proj: input [2, 4, 6] does not fit weight [6, 5]",
        ),
        (
            &q,
            &k,
            &zeros(&[2, 4, 5]),
            "attn.v_proj: input [2, 4, 5] does not fit weight [6, 4]",
        ),
        (
            &zeros(&[6]),
            &zeros(&[5]),
            &zeros(&[4]),
            "query [6] does not fit",
        ),
        (&zeros(&[]), &k, &v, "attn.q_proj: input []"),
        (
            &zeros(&[1, 2, 3, 6]),
            &k,
            &v,
            "all inputs must be [N, L, E]",
        ),
        (
            &zeros(&[3, 6]),
            &k,
            &v,
            "key [2, 4, 5] does not fit query [3, 6]",
        ),
        (
            &q,
            &zeros(&[3, 4, 5]),
            &v,
            "key [3, 4, 5] does not fit query [2, 3, 6]",
        ),
        (
            &q,
            &k,
            &zeros(&[1, 4, 4]),
            "value [1, 4, 4] does not fit query [2, 3, 6]",
        ),
        (
            &q,
            &k,
            &zeros(&[2, 5, 4]),
            "value [2, 5, 4] does not fit key [2, 4, 5]",
        ),
        (&zeros(&[2, 0, 6]), &k, &v, "query [2, 0, 6] does not fit"),
        (
            &zeros(&[0, 3, 6]),
            &zeros(&[0, 4, 5]),
            &zeros(&[0, 4, 4]),
            "every size",
        ),
        (
            &q,
            &zeros(&[2, 0, 5]),
            &zeros(&[2, 0, 4]),
            "key [2, 0, 5] does not fit",
        ),
        (
            &zeros(&[0, 6]),
            &zeros(&[0, 5]),
            &zeros(&[0, 4]),
            "every size",
        ),
        (&q.to_dtype(DType::F64)?, &k, &v, "F64"),
    ] {
        refused(&attention, AttentionInput::new(q, k, v), wanted);
    }
    let (q1, k1, v1) = (zeros(&[3, 2, 6]), zeros(&[4, 1, 5]), zeros(&[4, 1, 4]));
    let input = AttentionInput::new(&q1, &k1, &v1);
    refused(
        &sequence_first,
        input,
        "key [4, 1, 5] does not fit query [3, 2, 6]; both must have 2",
    );

    let plain = AttentionInput::new(&q, &k, &v);
    for shape in [
        &[4, 3][..],
        &[3, 3],
        &[2, 3, 4],
        &[2, 4, 3, 4],
        &[3],
        &[],
        &[0, 4],
        &[1, 3, 4],
    ] {
        let mask = zeros(shape).to_dtype(DType::U8)?;
        let input = AttentionInput {
            attn_mask: Some(&mask),
            ..plain
        };
        refused(
            &attention,
            input,
            &format!("attn: attn_mask {shape:?} does not fit query"),
        );
        refused(&attention, input, "it must be [3, 4] or [8, 3, 4]");
    }
    for shape in [&[2, 3][..], &[4, 2], &[4], &[1, 4], &[2, 1, 4], &[]] {
        let mask = zeros(shape);
        let input = AttentionInput {
            key_padding_mask: Some(&mask),
            ..plain
        };
        refused(
            &attention,
            input,
            &format!("attn: key_padding_mask {shape:?} does not fit"),
        );
        refused(&attention, input, "it must be [2, 4]");
    }
    let ids = zeros(&[3, 4]).to_dtype(DType::U32)?;
    let input = AttentionInput {
        attn_mask: Some(&ids),
        ..plain
    };
    refused(&attention, input, "attn_mask of type U32");
    let ids = zeros(&[2, 4]).to_dtype(DType::I64)?;
    let input = AttentionInput {
        key_padding_mask: Some(&ids),
        ..plain
    };
    refused(&attention, input, "key_padding_mask of type I64");
    Ok(())
}

/// The formula again, one number at a time.
#[test]
fn the_scale_is_the_configured_one() -> Result {
    let small = Small::new(DType::F64, true)?;
    let [q, k, v] = small_inputs(DType::F64)?;
    for scale in [None, Some(0.3)] {
        let mut config = small.config.clone();
        config.scale = scale;
        let (q_proj, k_proj) = (small.q.forward(&q)?, small.k.forward(&k)?);
        let attention = Small {
            config,
            ..Small::new(DType::F64, true)?
        }
        .build()?;
        let input = AttentionInput {
            weights: AttentionWeights::PerHead,
            ..AttentionInput::new(&q, &k, &v)
        };
        let weights = attention.forward_t(&input, false)?.weights.unwrap();
        let (q_proj, k_proj) = (q_proj.to_vec3::<f64>()?, k_proj.to_vec3::<f64>()?);
        let factor = scale.unwrap_or(1.0 / 3f64.sqrt());
        for n in 0..2 {
            let ours = weights.get(n)?.to_vec3::<f64>()?;
            for (h, head) in ours.iter().enumerate() {
                for (i, row) in head.iter().enumerate() {
                    let score = |j: usize| -> f64 {
                        let dot = |d| q_proj[n][i][h * 3 + d] * k_proj[n][j][h / 2 * 3 + d];
                        (factor * (0..3).map(dot).sum::<f64>()).exp()
                    };
                    let sum: f64 = (0..4).map(score).sum();
                    for (j, weight) in row.iter().enumerate() {
                        assert!((weight - score(j) / sum).abs() < 1e-14, "{n} {h} {i} {j}");
                    }
                }
            }
        }
        assert!(
            error(
                &weights.sum(D::Minus1)?,
                &Tensor::ones((2, 4, 3), DType::F64, &CPU)?
            )? < 1e-14
        );
    }
    Ok(())
}
