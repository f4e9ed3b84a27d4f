use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Device, IndexOp, Var};
use candle_nn::VarBuilder;
use candle_transformers::models::vit as reference;
use lora::{LoraConfig, LoraModel, TargetModules};

use super::*;
use crate::models::testing::gap;
use crate::models::{Classifier, Pretrained};
use crate::rng::rng;

const CPU: Device = Device::Cpu;

/// Nine patches of 4 × 4 pixels in three colours.
fn small() -> ViTConfig {
    ViTConfig {
        hidden_size: 16,
        num_hidden_layers: 3,
        num_attention_heads: 2,
        intermediate_size: 24,
        image_size: 12,
        patch_size: 4,
        num_channels: 3,
        num_labels: 10,
        ..ViTConfig::base_patch16_224()
    }
}

/// Weights of which none is 0 and no norm is idle.
fn weights(config: &ViTConfig) -> BTreeMap<String, Tensor> {
    let mut rng = rng(3);
    let plain = config.random_weights(&mut rng, &CPU).unwrap();
    let moved = |(name, start): (String, Tensor)| {
        let noise = (rng.randn(start.dims(), &CPU).unwrap() * 0.3).unwrap();
        (name, (start + noise).unwrap())
    };
    plain.into_iter().map(moved).collect()
}

fn vb(weights: &BTreeMap<String, Tensor>, dtype: DType) -> VarBuilder<'static> {
    let weights: HashMap<_, _> = weights.clone().into_iter().collect();
    VarBuilder::from_tensors(weights, dtype, &CPU)
}

fn images(config: &ViTConfig, n: usize) -> Tensor {
    let side = config.image_size;
    let shape = (n, config.num_channels, side, side);
    rng(4).uniform(-1.0, 1.0, shape, &CPU).unwrap()
}

fn model(config: &ViTConfig) -> (ViT, LoraModel) {
    let builder = LoraBuilder::new(vb(&weights(config), DType::F32));
    let vit = ViT::new(config, &builder).unwrap();
    (vit, builder.model().unwrap())
}

fn number(tensor: &Tensor) -> f64 {
    let tensor = tensor.to_dtype(DType::F64).unwrap();
    tensor.to_scalar().unwrap()
}

fn largest(tensor: &Tensor) -> f64 {
    number(&tensor.abs().unwrap().max_all().unwrap())
}

/// candle's own Vision Transformer with the same weights.
fn theirs(config: &ViTConfig, weights: &BTreeMap<String, Tensor>) -> reference::Model {
    let act = match config.hidden_act {
        crate::models::HiddenAct::Gelu => candle_nn::Activation::Gelu,
        crate::models::HiddenAct::GeluTanh => candle_nn::Activation::NewGelu,
        crate::models::HiddenAct::Relu => candle_nn::Activation::Relu,
    };
    let sizes = reference::Config {
        hidden_size: config.hidden_size,
        num_hidden_layers: config.num_hidden_layers,
        num_attention_heads: config.num_attention_heads,
        intermediate_size: config.intermediate_size,
        hidden_act: act,
        layer_norm_eps: config.layer_norm_eps,
        image_size: config.image_size,
        patch_size: config.patch_size,
        num_channels: config.num_channels,
        qkv_bias: config.qkv_bias,
    };
    reference::Model::new(&sizes, config.num_labels, vb(weights, DType::F32)).unwrap()
}

#[test]
fn logits_are_those_of_candles_model() {
    let images = images(&small(), 5);
    for (num_labels, qkv_bias, hidden_act) in [
        (10, true, crate::models::HiddenAct::Gelu),
        (1000, true, crate::models::HiddenAct::Gelu),
        (10, false, crate::models::HiddenAct::GeluTanh),
    ] {
        let config = ViTConfig {
            num_labels,
            qkv_bias,
            hidden_act,
            // Large enough that a forgotten one shows.
            layer_norm_eps: 1e-2,
            ..small()
        };
        let (vit, _) = model(&config);
        let got = vit.forward_t(&images, false).unwrap();
        assert_eq!(got.dims(), [5, num_labels]);
        let want = theirs(&config, &weights(&config)).forward(&images).unwrap();
        let off = gap(&got, &want);
        assert!(off < 1e-5, "{num_labels} classes: {off:e}");
        assert!(gap(&vit.forward(&images).unwrap(), &want) < 1e-5);
    }
}

/// With adapters on every kind of layer, the model is candle's with the updates added to its
/// weights.
#[test]
fn adapted_logits_are_those_of_merged_weights() {
    let config = small();
    let (vit, mut model) = model(&config);
    let images = images(&config, 4);
    let base = vit.forward_t(&images, false).unwrap();
    let targets = ["query", "key", "value", "dense", "projection"];
    adapt(&mut model, &targets, DType::F32);
    let adapted = vit.forward_t(&images, false).unwrap();
    assert!(gap(&adapted, &base) > 0.1);

    let mut merged = weights(&config);
    let mut layers: Vec<(&str, Tensor)> = vec![(
        vit.projection.name(),
        vit.projection.delta_weight().unwrap(),
    )];
    for layer in &vit.layers {
        for linear in [
            &layer.query,
            &layer.key,
            &layer.value,
            &layer.attention_output,
            &layer.intermediate,
            &layer.output,
        ] {
            layers.push((linear.name(), linear.delta_weight().unwrap()));
        }
    }
    assert_eq!(layers.len(), model.targets("default").unwrap().len());
    for (name, update) in layers {
        let weight = merged.get_mut(&format!("{name}.weight")).unwrap();
        *weight = (&*weight + update).unwrap();
    }
    let want = theirs(&config, &merged).forward(&images).unwrap();
    assert!(gap(&adapted, &want) < 1e-5);
}

/// An adapter whose numbers are not zero.
fn adapt(model: &mut LoraModel, targets: &[&str], dtype: DType) {
    let targets: Vec<String> = targets.iter().map(ToString::to_string).collect();
    let config = LoraConfig::new(2, 3.0).with_targets(targets);
    model.add_adapter("default", &config, &mut rng(5)).unwrap();
    for (place, (_, var)) in model.trainable_parameters().into_iter().enumerate() {
        let fresh = rng(place as u64).randn(var.dims(), &CPU).unwrap();
        let fresh = (fresh * 0.3).unwrap().to_dtype(dtype).unwrap();
        var.set(&fresh).unwrap();
    }
}

#[test]
fn the_base_model_is_counted_to_the_number() {
    let config = ViTConfig::base_patch16_224();
    let zeros = || LoraBuilder::new(VarBuilder::zeros(DType::F32, &CPU));
    let builder = zeros();
    let _vit = ViT::new(&config, &builder).unwrap();
    let mut model = builder.model().unwrap();
    assert_eq!(model.parameter_count().all, 86_567_656);
    assert_eq!(config.parameter_count(), 86_567_656);
    let lora = LoraConfig::new(16, 16.0).with_targets(["query", "value"]);
    model.add_adapter("default", &lora, &mut rng(1)).unwrap();
    assert_eq!(model.parameter_count().trainable, 589_824);

    let ten = ViTConfig {
        num_labels: 10,
        ..config
    };
    let vit = ViT::new(&ten, &zeros()).unwrap();
    let image = Tensor::zeros((1, 3, 224, 224), DType::F32, &CPU).unwrap();
    assert_eq!(vit.forward_t(&image, false).unwrap().dims(), [1, 10]);
    assert_eq!(vit.embeddings(&image, false).unwrap().dims(), [1, 197, 768]);
    // 990 classes fewer, of 768 weights and a bias.
    assert_eq!(ten.parameter_count(), 86_567_656 - 990 * 769);
}

#[test]
fn what_is_counted_is_what_is_drawn_and_read() {
    let bare = ViTConfig {
        qkv_bias: false,
        num_labels: 0,
        ..small()
    };
    for config in [small(), bare, ViTConfig::fashion()] {
        let (vit, model) = model(&config);
        let drawn: usize = weights(&config).values().map(Tensor::elem_count).sum();
        assert_eq!(drawn, config.parameter_count());
        assert_eq!(model.parameter_count().all, drawn);
        assert!(vit.to_string().starts_with("ViT with "));
    }
}

#[test]
fn adapters_reach_every_layer_but_the_classifier() {
    let of = |targets: TargetModules| {
        let (_vit, mut model) = model(&small());
        let config = LoraConfig::new(2, 4.0).with_targets(targets);
        model.add_adapter("default", &config, &mut rng(1)).unwrap();
        let targets = model.targets("default").unwrap();
        targets.into_iter().map(String::from).collect::<Vec<_>>()
    };
    let at = |number: usize, part: &str| format!("vit.encoder.layer.{number}.{part}");
    let attention = [
        "attention.attention.key",
        "attention.attention.query",
        "attention.attention.value",
    ];
    let dense = [
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ];
    let all = |parts: &[&str]| -> Vec<String> {
        let mut names: Vec<String> = (0..3)
            .flat_map(|number| parts.iter().map(move |part| at(number, part)))
            .collect();
        names.sort();
        names
    };
    assert_eq!(of(["query", "key", "value"].into()), all(&attention));
    assert_eq!(of("dense".into()), all(&dense));
    assert_eq!(
        of(TargetModules::AllLinear),
        all(&[attention, dense].concat())
    );
    assert_eq!(
        of("projection".into()),
        ["vit.embeddings.patch_embeddings.projection"]
    );
    assert_eq!(of("classifier".into()), ["classifier"]);
}

/// Holds `gradient`, of which `at` is the steepest number, against a difference of losses.
fn check_slope(name: &str, var: &Var, gradient: &Tensor, loss: &dyn Fn() -> Tensor) {
    let values: Vec<f64> = gradient.flatten_all().unwrap().to_vec1().unwrap();
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*b].abs().total_cmp(&values[*a].abs()));
    let start = var.as_tensor().copy().unwrap();
    // The steepest, one in the middle, and the flattest.
    for at in [0, order.len() / 2, order.len() - 1].map(|place| order[place]) {
        let moved = |by: f64| {
            let mut numbers: Vec<f64> = start.flatten_all().unwrap().to_vec1().unwrap();
            numbers[at] += by;
            let there = Tensor::from_vec(numbers, start.dims(), &CPU).unwrap();
            var.set(&there).unwrap();
            number(&loss())
        };
        let step = 1e-5;
        let slope = (moved(step) - moved(-step)) / (2.0 * step);
        var.set(&start).unwrap();
        let want = values[at];
        let off = (slope - want).abs();
        assert!(
            off < 1e-6 * want.abs() + 1e-9,
            "{name}, number {at}: {slope}, not {want}"
        );
    }
}

#[test]
fn gradients_are_those_of_the_loss() {
    let config = small();
    let images = images(&config, 3).to_dtype(DType::F64).unwrap();
    let labels = Tensor::new(&[7u32, 0, 4], &CPU).unwrap();
    let vb = || vb(&weights(&config), DType::F64);

    let builder = LoraBuilder::trainable(vb());
    let trained = ViT::new(&config, &builder).unwrap();
    let all = builder.variables();
    assert_eq!(all.len(), weights(&config).len());

    let builder = LoraBuilder::new(vb());
    let frozen = ViT::new(&config, &builder).unwrap();
    let mut model = builder.model().unwrap();
    let targets = ["query", "key", "value", "dense", "projection"];
    adapt(&mut model, &targets, DType::F64);
    let adapters = model.trainable_parameters();
    assert_eq!(adapters.len(), 2 * (6 * config.num_hidden_layers + 1));

    for (vit, vars) in [(trained, all), (frozen, adapters)] {
        let loss = || vit.loss(&images, &labels, true).unwrap();
        let gradients = loss().backward().unwrap();
        for (name, var) in vars {
            let gradient = gradients.get(&var).unwrap_or_else(|| {
                panic!("{name} has no gradient");
            });
            // A number that all keys get alike does not change what a query sees.
            let flat = name.ends_with("key.bias");
            assert_eq!(largest(gradient) < 1e-12, flat, "{name}");
            check_slope(&name, &var, gradient, &loss);
        }
    }
}

/// The class token is a token of its own, before the patches; it is not added to them.
#[test]
fn the_class_token_comes_first_and_alone() {
    let config = small();
    let weights = weights(&config);
    let (vit, _) = model(&config);
    let images = images(&config, 4);
    let tokens = vit.embeddings(&images, false).unwrap();
    let patches = config.patches();
    assert_eq!(tokens.dims(), [4, patches + 1, config.hidden_size]);

    let positions = &weights["vit.embeddings.position_embeddings"];
    let class = &weights["vit.embeddings.cls_token"];
    let first = (class + positions.i((.., ..1, ..)).unwrap()).unwrap();
    // The patches by hand: pixels of a patch times the kernel.
    let (side, patch) = (config.side(), config.patch_size);
    let name = "vit.embeddings.patch_embeddings.projection";
    let kernel = weights[&format!("{name}.weight")].flatten_from(1).unwrap();
    let bias = &weights[&format!("{name}.bias")];
    for image in 0..4 {
        let got = tokens.i((image..=image, ..1, ..)).unwrap();
        assert!(gap(&got, &first) < 1e-6, "image {image}");
        for place in 0..patches {
            let (y, x) = (patch * (place / side), patch * (place % side));
            let pixels = images
                .i((image, .., y..y + patch, x..x + patch))
                .unwrap()
                .flatten_all()
                .unwrap()
                .unsqueeze(1)
                .unwrap();
            let want = kernel.matmul(&pixels).unwrap().squeeze(1).unwrap();
            let want = (want + bias).unwrap();
            let want = (want + positions.i((0, 1 + place)).unwrap()).unwrap();
            let got = tokens.i((image, 1 + place)).unwrap();
            assert!(gap(&got, &want) < 1e-5, "image {image}, patch {place}");
        }
    }
}

/// A model whose attention, layer by layer, is `attentions` gives the same features.
#[test]
fn attentions_are_what_the_pass_uses() {
    let config = small();
    let (vit, mut model) = model(&config);
    adapt(&mut model, &["query", "key", "value", "dense"], DType::F32);
    let images = images(&config, 4);
    let (tokens, heads) = (config.patches() + 1, config.num_attention_heads);
    let maps = vit.attentions(&images).unwrap();
    assert_eq!(maps.len(), config.num_hidden_layers);

    let mut h = vit.embeddings(&images, false).unwrap();
    for (map, layer) in maps.iter().zip(&vit.layers) {
        assert_eq!(map.dims(), [4, heads, tokens, tokens]);
        let sums = map.sum(3).unwrap();
        assert!(largest(&(sums - 1.0).unwrap()) < 1e-6);
        assert!(number(&map.min_all().unwrap()) >= 0.0);
        // Heads and queries differ, so that a mix-up shows.
        let uneven = (map - 1.0 / tokens as f64).unwrap();
        assert!(largest(&uneven) > 0.1);

        let value = layer.layernorm_before.forward(&h).unwrap();
        let value = layer.value.forward_t(&value, false).unwrap();
        let mut mixed = Vec::new();
        for head in 0..heads {
            let dim = config.head_dim();
            let of_head = value.narrow(2, head * dim, dim).unwrap();
            let seen = map.i((.., head)).unwrap().contiguous().unwrap();
            mixed.push(seen.matmul(&of_head.contiguous().unwrap()).unwrap());
        }
        let mixed = Tensor::cat(&mixed, 2).unwrap();
        let mixed = layer.attention_output.forward_t(&mixed, false).unwrap();
        h = (h + mixed).unwrap();
        let inner = layer.layernorm_after.forward(&h).unwrap();
        let inner = layer.intermediate.forward_t(&inner, false).unwrap();
        let inner = ops::gelu_erf(&inner).unwrap();
        h = (&h + layer.output.forward_t(&inner, false).unwrap()).unwrap();
    }
    let got = vit.layernorm.forward(&h.i((.., 0)).unwrap()).unwrap();
    let want = vit.features(&images, false).unwrap();
    assert!(gap(&got, &want) < 1e-5);
}

/// Against the product of whole matrices.
#[test]
fn rollout_is_the_product_of_what_the_layers_see() {
    let config = small();
    let (vit, _) = model(&config);
    let images = images(&config, 2);
    let (tokens, side) = (config.patches() + 1, config.side());
    let rollout = vit.attention_rollout(&images).unwrap();
    assert_eq!(rollout.dims(), [2, side, side]);

    let identity = Tensor::eye(tokens, DType::F32, &CPU).unwrap();
    for image in 0..2 {
        let mut joint = identity.clone();
        for map in vit.attentions(&images).unwrap() {
            let mean = map.get(image).unwrap().mean(0).unwrap();
            let with_residual = (mean + &identity).unwrap();
            let sums = with_residual.sum_keepdim(1).unwrap();
            let step = with_residual.broadcast_div(&sums).unwrap();
            joint = step.matmul(&joint).unwrap();
        }
        let row = joint.i((0, 1..)).unwrap().reshape((side, side)).unwrap();
        assert!(gap(&rollout.get(image).unwrap(), &row) < 1e-6);
        // What is missing is the class token's own share.
        let own = number(&joint.i((0, 0)).unwrap());
        let rest = number(&rollout.get(image).unwrap().sum_all().unwrap());
        assert!((own + rest - 1.0).abs() < 1e-6);
    }
}

/// Rows with their own adapters are what separate passes give.
#[test]
fn a_mixed_batch_is_its_rows() {
    let config = small();
    let (vit, mut model) = model(&config);
    let lora = LoraConfig::new(2, 4.0).with_targets(["query", "dense", "projection"]);
    for name in ["one", "two"] {
        model.add_adapter(name, &lora, &mut rng(5)).unwrap();
    }
    model.set_adapter(&["one", "two"]).unwrap();
    for (place, (_, var)) in model.trainable_parameters().into_iter().enumerate() {
        let fresh = rng(place as u64).randn(var.dims(), &CPU).unwrap();
        var.set(&(fresh * 0.3).unwrap()).unwrap();
    }
    let images = images(&config, 4);
    let names = ["two", lora::BASE_ROW, "one", "two"];
    let mixed = model.with_adapters(&names, || vit.forward_t(&images, false));
    let mixed = mixed.unwrap().unwrap();
    for (place, name) in names.into_iter().enumerate() {
        let active: &[&str] = if name == lora::BASE_ROW { &[] } else { &[name] };
        model.set_adapter(active).unwrap();
        let alone = vit.forward_t(&images.narrow(0, place, 1).unwrap(), false);
        let row = mixed.narrow(0, place, 1).unwrap();
        assert!(gap(&row, &alone.unwrap()) < 1e-5, "row {place}");
    }
}

/// A folder as transformers writes it, of a model with a classifier and of one without.
#[test]
fn folders_of_both_models_of_transformers_are_read() {
    let config = small();
    let images = images(&config, 3);
    let weights = weights(&config);
    let (whole, _) = model(&config);
    let folder = |tensors: HashMap<String, Tensor>, labels: &str| {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("model.safetensors");
        candle_core::safetensors::save(&tensors, file).unwrap();
        let mut json = serde_json::to_value(&config).unwrap();
        json["model_type"] = "vit".into();
        json["architectures"] = serde_json::json!(["ViTForImageClassification"]);
        json["num_labels"].take();
        let name = |i: usize| (i.to_string(), format!("{labels}_{i}"));
        let names: BTreeMap<_, _> = (0..10).map(name).collect();
        json["id2label"] = serde_json::to_value(names).unwrap();
        std::fs::write(folder.path().join("config.json"), json.to_string()).unwrap();
        folder
    };

    let with_head = folder(weights.clone().into_iter().collect(), "LABEL");
    let base = Pretrained::open(with_head.path()).unwrap();
    assert_eq!(base.config::<ViTConfig>().unwrap(), config);
    let (vit, _) = base.frozen(&CPU, ViT::new).unwrap();
    let (got, want) = (
        vit.forward_t(&images, false).unwrap(),
        whole.forward_t(&images, false).unwrap(),
    );
    assert!(gap(&got, &want) == 0.0);

    let stripped = |(name, tensor): (String, Tensor)| {
        let name = name.strip_prefix("vit.")?;
        Some((name.to_string(), tensor))
    };
    let mut bare: HashMap<_, _> = weights.clone().into_iter().filter_map(stripped).collect();
    let pooler = Tensor::ones((16, 16), DType::F32, &CPU).unwrap();
    bare.insert("pooler.dense.weight".to_string(), pooler);
    let without_head = folder(bare, "UNUSED");
    let base = Pretrained::open(without_head.path()).unwrap();
    let (vit, mut model) = base.frozen(&CPU, ViT::new).unwrap();
    let features = vit.features(&images, false).unwrap();
    assert!(gap(&features, &whole.features(&images, false).unwrap()) == 0.0);
    let error = vit.forward_t(&images, false).unwrap_err().to_string();
    assert!(error.contains("no classifier; take `features`"), "{error}");
    assert_eq!(vit.config().num_labels, 0);
    let count = model.parameter_count().all;
    assert_eq!(vit.config().parameter_count(), count);
    let lora = LoraConfig::new(2, 4.0).with_targets(["query"]);
    model.add_adapter("default", &lora, &mut rng(1)).unwrap();
    let targets = model.targets("default").unwrap();
    assert_eq!(targets[0], "encoder.layer.0.attention.attention.query");

    // Features and a classifier of its own, with the same numbers, are the whole model.
    let head = Classifier::new(16, 10, &CPU).unwrap();
    for (name, var) in head.parameters() {
        var.set(&weights[&name]).unwrap();
    }
    assert!(gap(&head.forward(&features).unwrap(), &want) < 1e-6);

    // With the prefix, and no head.
    let mut prefixed: HashMap<_, _> = weights.into_iter().collect();
    prefixed.retain(|name, _| name.starts_with("vit."));
    let prefixed = folder(prefixed, "UNUSED");
    let base = Pretrained::open(prefixed.path()).unwrap();
    let (vit, _) = base.frozen(&CPU, ViT::new).unwrap();
    assert!(gap(&vit.features(&images, false).unwrap(), &features) == 0.0);
    assert!(vit.forward_t(&images, false).is_err());
}

#[test]
fn what_does_not_fit_is_refused() {
    let json = serde_json::to_value(small()).unwrap();
    let with = |key: &str, value: serde_json::Value| {
        let mut file = json.clone();
        file[key] = value;
        serde_json::from_value::<ViTConfig>(file).map_err(|error| error.to_string())
    };
    for (key, value, says) in [
        ("model_type", "deit".into(), "\"deit\", not \"vit\""),
        ("patch_size", 5.into(), "multiple of patch_size = 5"),
        ("patch_size", 0.into(), "multiple of patch_size = 0"),
        ("num_attention_heads", 3.into(), "num_attention_heads = 3"),
        ("num_channels", 0.into(), "num_channels = 0"),
        ("hidden_act", "swish".into(), "swish"),
        ("id2label", serde_json::json!({"0": "a"}), "names 1"),
    ] {
        let said = with(key, value).unwrap_err();
        assert!(said.contains(says), "{said}");
    }
    // What transformers leaves out.
    let mut file = json.clone();
    for key in ["qkv_bias", "hidden_act", "num_labels"] {
        file.as_object_mut().unwrap().remove(key);
    }
    let plain: ViTConfig = serde_json::from_value(file).unwrap();
    let want = ViTConfig {
        num_labels: 2,
        ..small()
    };
    assert_eq!(plain, want);

    let config = small();
    let (vit, _) = model(&config);
    for shape in [&[3, 12, 12][..], &[1, 1, 12, 12], &[1, 3, 12, 16], &[]] {
        let images = Tensor::zeros(shape, DType::F32, &CPU).unwrap();
        let said = vit.features(&images, false).unwrap_err().to_string();
        assert!(said.contains("must be [n, 3, 12, 12]"), "{said}");
    }
    let none = images(&config, 1).narrow(0, 0, 0).unwrap();
    let labels = Tensor::zeros(0, DType::U32, &CPU).unwrap();
    let said = vit.accuracy(&none, &labels).unwrap_err().to_string();
    assert!(
        said.starts_with("ViT::accuracy") && said.contains("no image"),
        "{said}"
    );
}
