//! Equality with Hugging Face PEFT 0.21.2, one row per folder of `fixtures/peft`.
//!
//! An error is the largest absolute difference divided by PEFT's largest absolute value. In f32
//! outputs and merged weights must agree to 1e-5 and gradients to 1e-4; the bounds of the rows in
//! half precision are derived in [`Bounds::of`]. The loss is `sum(probe · output)`.
//!
//! `cargo test -p lora --test parity -- --nocapture` prints the tables.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "parity/compare.rs"]
mod compare;
#[path = "parity/flaws.rs"]
mod flaws;
#[path = "parity/net.rs"]
mod net;
#[path = "parity/roundtrip.rs"]
mod roundtrip;

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use candle_core::{D, DType, Tensor, Var};
use compare::{Bound, Column, GRADIENTS, MERGED, OUTPUT, Table, Tally, gap, largest};
use lora::peft::{AdapterFiles, AdapterKind, TensorName};
use lora::{Bias, Combination, Init, LoraConfig};
use net::{
    AnyLayer, Case, Net, Parts, case_folders, config_of, json_file, on, raw_tensors, text,
    transpose,
};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use serde_json::Value;

/// What a row checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    /// One adapted layer.
    Layer,
    /// A network; also which layers are adapted, and what counts as trainable.
    Model,
    /// Two active adapters.
    Several,
    /// Another adapter for each row of the batch.
    Mixed,
    /// `add_weighted_adapter`.
    Combined,
    /// A file as one meets them, that must load.
    Loads,
    /// A file that must be refused, with this in the message.
    Refused(&'static str),
    /// In another test: `attention.rs`.
    Elsewhere,
}

use Kind::*;

const ROWS: &[(&str, Kind)] = &[
    ("linear_plain", Layer),
    ("linear_nobias", Layer),
    ("linear_rslora", Layer),
    ("linear_dora", Layer),
    ("linear_dora_nobias", Layer),
    ("linear_lora_bias", Layer),
    ("linear_fan_in_fan_out", Layer),
    ("linear_fan_in_fan_out_dora", Layer),
    ("linear_bf16", Layer),
    ("linear_bf16_dora", Layer),
    ("linear_f16", Layer),
    ("linear_vera", Layer),
    ("orthogonal_init", Layer),
    ("pissa_init", Layer),
    ("pissa_trained", Layer),
    ("pissa_converted", Layer),
    ("olora_init", Layer),
    ("conv1d_plain", Layer),
    ("conv1d_dora", Layer),
    ("conv1d_lora_bias", Layer),
    ("conv2d_plain", Layer),
    ("conv2d_1x1", Layer),
    ("conv2d_dora", Layer),
    ("conv2d_dora_1x1", Layer),
    ("conv2d_lora_bias", Layer),
    ("conv2d_rslora", Layer),
    ("conv2d_groups", Layer),
    ("embedding_plain", Layer),
    ("embedding_rslora", Layer),
    ("embedding_dora", Layer),
    ("embedding_scaled", Layer),
    ("embedding_scaled_dora", Layer),
    ("embedding_saved_base", Layer),
    ("model_list", Model),
    ("model_regex", Model),
    ("model_all_linear", Model),
    ("model_exclude", Model),
    ("model_layers", Model),
    ("model_layers_pattern", Model),
    ("model_patterns", Model),
    ("model_patterns_alpha", Model),
    ("model_patterns_clear", Model),
    ("model_modules_to_save", Model),
    ("model_bias_lora_only", Model),
    ("model_bias_all", Model),
    ("vera_two", Model),
    ("multi_active_lora_lora", Several),
    ("multi_active_lora_dora", Several),
    ("multi_active_dora_lora", Several),
    ("mixed_batch", Mixed),
    ("combine_linear", Combined),
    ("combine_cat", Combined),
    ("combine_svd", Combined),
    ("combine_svd_conv2d", Combined),
    ("combine_svd_embedding", Combined),
    ("combine_ties", Combined),
    ("combine_ties_two", Combined),
    ("combine_ties_frequency", Combined),
    ("combine_ties_svd", Combined),
    ("combine_magnitude_prune", Combined),
    ("combine_magnitude_prune_svd", Combined),
    ("wild/old_config_v02", Loads),
    ("wild/default_in_key", Loads),
    ("wild/no_prefix", Loads),
    ("wild/other_name", Loads),
    ("wild/subfolder", Loads),
    ("wild/bias_new_names", Loads),
    ("wild/bias_old_names", Loads),
    ("wild/unknown_null", Loads),
    ("wild/alpha_float", Loads),
    ("wild/target_null", Loads),
    ("wild/bf16_tensors", Loads),
    ("wild/layers_int", Loads),
    // PEFT unpickles it; here the message says how to convert the file.
    ("wild/bin_fallback", Refused("Convert it in Python")),
    ("wild/unknown_truthy", Refused("use_qalora")),
    ("wild/unknown_option_set", Refused("future_option")),
    ("wild/kasa_config", Refused("kasa_config")),
    ("wild/nan_in_b", Refused("NaN or infinite")),
    ("wild/inf_in_b", Refused("NaN or infinite")),
    ("wild/missing_b", Refused("lora_B")),
    ("wild/wrong_rank", Refused("rank 2")),
    ("wild/ab_mismatch", Refused("rank")),
    ("wild/wrong_shape", Refused("[2, 6]")),
    ("wild/no_such_layer", Refused("model.layers.9.proj")),
    (
        "wild/duplicate_names",
        Refused("two tensors for one parameter"),
    ),
    ("wild/truncated", Refused("adapter_model.safetensors")),
    ("mha_peft", Elsewhere),
    ("mha_peft_cross", Elsewhere),
    ("mha_torch_batch_first", Elsewhere),
    ("mha_torch_causal", Elsewhere),
    ("mha_torch_float_mask", Elsewhere),
    ("mha_torch_grouped", Elsewhere),
    ("mha_torch_kdim_vdim", Elsewhere),
    ("mha_torch_padding", Elsewhere),
];

/// The number of checks of all rows of a kind: a check that no longer runs is noticed.
const CHECKS: [(&str, usize); 7] = [
    ("Layer", 1284),
    ("Model", 1897),
    ("Several", 154),
    ("Mixed", 9),
    ("Combined", 102),
    ("Loads", 48),
    ("Refused", 78),
];

#[test]
fn equals_peft() {
    let rows: BTreeSet<String> = ROWS.iter().map(|(case, _)| case.to_string()).collect();
    assert_eq!(rows.len(), ROWS.len(), "a case stands twice in ROWS");
    assert_eq!(rows, case_folders(), "rows of this test, case folders");

    let (mut table, mut failures) = (Table::default(), Vec::new());
    let mut checks: BTreeMap<&str, usize> = BTreeMap::new();
    for (name, kind) in ROWS.iter().filter(|(_, kind)| *kind != Elsewhere) {
        let mut t = Tally::new(name);
        let run = || {
            let case = Case::read(name);
            match kind {
                Layer | Model => adapted(&mut t, &case, &["default"]),
                Several => adapted(&mut t, &case, &["a", "b"]),
                Mixed => mixed(&mut t, &case),
                Combined => combined(&mut t, &case),
                Loads => loads(&mut t, &case),
                Refused(why) => refused(&mut t, &case, why),
                Elsewhere => {}
            }
            let unread = case.unread();
            t.check(&format!("never looked at: {unread:?}"), unread.is_empty());
        };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(run)) {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
            t.failures
                .push(format!("{name}: panic: {}", text.unwrap_or_default()));
        }
        let kind = format!("{kind:?}");
        let kind = CHECKS.iter().find(|(k, _)| kind.starts_with(k)).unwrap().0;
        *checks.entry(kind).or_default() += t.checks;
        if kind != "Refused" {
            table.row(&[
                name.to_string(),
                t.output.text(),
                t.gradients.text(),
                t.merged.text(),
                t.checks.to_string(),
            ]);
        }
        failures.extend(t.failures);
    }
    let all: usize = checks.values().sum();
    println!(
        "{}",
        table.text(&["case", "output", "gradients", "merged", "checks"])
    );
    println!("{} rows, {all} checks: {checks:?}", ROWS.len());
    assert!(
        failures.is_empty(),
        "{} failures:\n{}",
        failures.len(),
        failures.join("\n")
    );
    assert_eq!(checks, BTreeMap::from(CHECKS), "the number of checks");
}

/// How far the numbers of a row may lie from PEFT's.
struct Bounds {
    output: Bound,
    input: Bound,
    magnitude: Bound,
    merged: Bound,
    merged_safe: Bound,
    /// The merged layer against PEFT's merged layer, and against the unmerged one here.
    joined: Bound,
    parted: Bound,
}

impl Bounds {
    /// In f32 the fixed ones.
    ///
    /// In half precision with unit roundoff u (2⁻⁸ in bf16, 2⁻¹¹ in f16) A and B lie in f32 on
    /// both sides and products are summed in f32, so only roundings of results to half count, of
    /// which each changes a number by at most u times itself. With the weight W, the update D, the
    /// merged weight M, and DoRA's largest factor f (1 without it):
    ///
    /// - output: u (5 f max(|x Wᵀ|, |x Wᵀ + b|) + 2 max|y|). Here the product, its sum with b, and
    ///   the output are rounded; in PEFT the product and its sum, in DoRA the bias taken off
    ///   again, and the output.
    /// - gradient of x, with p = |probe|: u (5 f max(p |W|) + 2 f max(p |D|) + 2 max|∇|). On each
    ///   side the gradient of the base's output, its product with W, the adapter's part and the
    ///   sum are rounded, in PEFT's DoRA one sum more.
    /// - gradient of the magnitude: 5 u max Σ p max(|x Wᵀ|, |x Wᵀ + b|) / ‖W + D‖ over the rows.
    ///   The base's output in it is rounded twice here and thrice in PEFT.
    /// - gradients of A and B: nothing is rounded, so as in f32.
    /// - merged weight: 2 u max|M|; with `safe_merge` PEFT rounds D too, + u max|D|.
    /// - merged layer: u (2 max(|x| |M|ᵀ) + 4 max(|x Mᵀ|, |y|)), on each side the weight, the
    ///   product and its sum with b; against the unmerged one half of it and half of the first.
    fn of(case: &Case, net: &Net) -> Self {
        let u = match case.dtype() {
            DType::BF16 => 2f64.powi(-8),
            DType::F16 => 2f64.powi(-11),
            _ => {
                return Self {
                    output: OUTPUT,
                    input: GRADIENTS,
                    magnitude: GRADIENTS,
                    merged: MERGED,
                    merged_safe: MERGED,
                    joined: OUTPUT,
                    parted: OUTPUT,
                };
            }
        };
        let AnyLayer::Linear(layer) = net.layers.values().next().unwrap() else {
            panic!("half precision rows are linear layers");
        };
        let wide = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
        let rows = |name: &str| {
            let t = case.get(name);
            wide(&t).reshape(((), t.dim(D::Minus1).unwrap())).unwrap()
        };
        let by = |x: &Tensor, w: &Tensor| x.matmul(w).unwrap();
        let abs = |t: &Tensor| t.abs().unwrap();
        let (w, bias) = layer.base().parts();
        let (w, d) = (wide(&w), wide(&layer.delta_weight().unwrap()));
        let m = wide(&layer.merged().unwrap().parts().0);
        let (x, p, y) = (rows("input"), abs(&rows("probe")), rows("output"));
        let bare = by(&x, &w.t().unwrap());
        let base = bare.broadcast_add(&wide(&bias.unwrap())).unwrap();
        let base = abs(&bare).maximum(&abs(&base)).unwrap();
        let norm = (&w + &d)
            .unwrap()
            .sqr()
            .unwrap()
            .sum(1)
            .unwrap()
            .sqrt()
            .unwrap();
        let f = match layer.adapter("default").unwrap().magnitude() {
            Some(m) => largest(&(wide(m) / &norm).unwrap()),
            None => 1.0,
        };
        let unmerged = 5.0 * f * largest(&base) + 2.0 * largest(&y);
        let heavy = largest(&by(&abs(&x), &abs(&m).t().unwrap()));
        let joined = 2.0 * heavy + 4.0 * largest(&by(&x, &m.t().unwrap())).max(largest(&y));
        let input = 5.0 * f * largest(&by(&p, &abs(&w)))
            + 2.0 * f * largest(&by(&p, &abs(&d)))
            + 2.0 * largest(&case.get("grad.input"));
        let magnitude = (p * base).unwrap().sum(0).unwrap();
        let magnitude = 5.0 * largest(&(magnitude / norm).unwrap());
        let merged = 2.0 * largest(&m);
        let of = |count: f64| Bound::Absolute(count * u);
        Self {
            output: of(unmerged),
            input: of(input),
            magnitude: of(magnitude),
            merged: of(merged),
            merged_safe: of(merged + largest(&d)),
            joined: of(joined),
            parted: of((joined + unmerged) / 2.0),
        }
    }
}

/// Loads the adapters of a case from their files.
fn load(t: &mut Tally, case: &Case, net: &mut Net, adapters: &[&str]) -> Vec<AdapterFiles> {
    let mut all = Vec::new();
    for adapter in adapters {
        let folder = case.adapter_folder(adapter);
        let mut files = AdapterFiles {
            config: config_of(&folder),
            tensors: raw_tensors(&folder),
        };
        if let Some(bias) = files.tensors.remove("base_model.model.model.norm.bias") {
            // Only layers of this crate train. The file is refused, not read in part.
            let refused = net
                .model
                .load_adapter(&folder, adapter)
                .unwrap_err()
                .to_string();
            t.check(&refused, refused.contains("tensors for \"model.norm\""));
            let merged = case.get("merged.model.norm.bias");
            t.close(Column::Merged, "norm", &bias, &merged, MERGED);
            let weight = net.norm.take().unwrap().0;
            net.norm = Some((weight, Var::from_tensor(&bias).unwrap().as_tensor().clone()));
            net.model.add_files(&files, adapter).unwrap();
        } else if case.info["reload"].is_string() {
            // PEFT computed with the patterns in the order given, and sorted them in the file.
            sorted_patterns(t, case, &folder);
            if let AdapterKind::Lora(lora) = &mut files.config.kind {
                lora.rank_pattern.reverse();
                lora.alpha_pattern.reverse();
            }
            net.model.add_files(&files, adapter).unwrap();
        } else {
            net.model.load_adapter(&folder, adapter).unwrap();
        }
        all.push(files);
    }
    all
}

/// What PEFT's sorted file means when it is read as it stands.
fn sorted_patterns(t: &mut Tally, case: &Case, folder: &Path) {
    let mut net = Net::of(case);
    match case.find("output_reloaded") {
        None => {
            let refused = net
                .model
                .load_adapter(folder, "default")
                .unwrap_err()
                .to_string();
            t.check(
                &refused,
                refused.contains("rank 4, the configuration says 8"),
            );
        }
        Some(output) => {
            net.model.load_adapter(folder, "default").unwrap();
            let x = case.get("input");
            t.close(
                Column::Output,
                "output_reloaded",
                &net.forward(&x),
                &output,
                OUTPUT,
            );
            scales(t, &case.info["adapted_reloaded"], &net);
        }
    }
}

/// Rank, α and scale of every adapted layer.
fn scales(t: &mut Tally, adapted: &Value, net: &Net) {
    // PEFT's VeRA has none.
    for (path, adapters) in adapted.as_object().into_iter().flatten() {
        for (adapter, numbers) in adapters.as_object().unwrap() {
            let own = on!(&net.layers[path], l => l.adapter(adapter)).unwrap();
            let ours = [own.r() as f64, own.lora_alpha(), own.scaling()];
            let theirs = ["r", "alpha", "scaling"].map(|key| numbers[key].as_f64().unwrap());
            t.equal(&format!("r, alpha, scaling of {path}"), ours, theirs);
        }
    }
}

fn adapted(t: &mut Tally, case: &Case, adapters: &[&str]) {
    let x = case.get("input");
    let plain = Net::of(case);

    // The adapter of the file.
    let mut net = Net::of(case);
    let files = load(t, case, &mut net, adapters);
    let lora = files[0].config.lora().cloned().unwrap_or_default();
    net.model.set_adapter(adapters).unwrap();
    let bounds = Bounds::of(case, &net);
    let y = net.forward(&x);
    t.close(
        Column::Output,
        "output",
        &y,
        &case.get("output"),
        bounds.output,
    );
    scales(t, &case.info["adapted"], &net);

    fresh(t, case, &files, adapters, bounds.output);
    gradients(t, case, &net, &x, adapters, &bounds);
    if case.info["trainable"].is_array() {
        counted(t, case, &net);
    }

    // Switched off.
    net.model.enable_adapters(false);
    let norm = net.norm.clone();
    net.norm.clone_from(&plain.norm);
    let off = net.forward(&x);
    net.norm = norm;
    net.model.enable_adapters(true);
    let peft = case.get("output_base");
    if lora.bias == Bias::None {
        t.close(Column::Output, "off", &off, &peft, bounds.output);
    } else {
        t.close(
            Column::Output,
            "off",
            &off,
            &case.get("output_original"),
            OUTPUT,
        );
        // PEFT leaves the trained biases in place.
        let mut base = case.starting("base.");
        for (key, tensor) in raw_tensors(&case.folder) {
            if key.ends_with(".bias") {
                let name = key.strip_prefix("base_model.model.").unwrap();
                base.insert(name.replace(".base_layer.", "."), tensor);
            }
        }
        let kept = Net::build(&case.info, base, case.dtype());
        t.close(
            Column::Output,
            "off in PEFT",
            &kept.forward(&x),
            &peft,
            OUTPUT,
        );
    }
    t.same("on again", &net.forward(&x), &y);

    // The base, as it was or as the initialisation left it.
    let (first, after) = (plain.base(), case.starting("base_after."));
    t.equal(
        "base_after",
        !after.is_empty(),
        lora.init_lora_weights.rewrites_base(),
    );
    for (name, tensor) in net.base() {
        match after.get(&name) {
            Some(wanted) => t.close(Column::Merged, "base_after", &tensor, wanted, bounds.merged),
            None => t.same(&format!("frozen {name}"), &tensor, &first[&name]),
        }
    }

    merging(t, case, &net, &x, &y, &bounds);
    saving(t, case, &net, &files, adapters, &x, &y);
}

/// A fresh adapter of the same settings changes nothing, and goes to the layers PEFT adapted.
fn fresh(t: &mut Tally, case: &Case, files: &[AdapterFiles], adapters: &[&str], bound: Bound) {
    let x = case.get("input");
    let plain = Net::of(case).forward(&x);
    let untouched = case
        .find("output_original")
        .unwrap_or_else(|| case.get("output_base"));
    t.close(Column::Output, "the base", &plain, &untouched, bound);
    let mut net = Net::of(case);
    for (adapter, files) in adapters.iter().zip(files) {
        net.add(adapter, &files.config).unwrap();
        let mut wanted: BTreeSet<String> = case.info["adapted"]
            .as_object()
            .map(|map| map.keys().cloned().collect())
            .unwrap_or_default();
        if case.text("method") == "vera" {
            wanted.extend(
                case.info["paths"]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .map(text),
            );
            wanted.extend(case.info["path"].as_str().map(str::to_string));
        }
        t.equal("adapted layers", net.adapted(adapter), wanted);
    }
    scales(t, &case.info["adapted"], &net);
    net.model.set_adapter(adapters).unwrap();
    let y = net.forward(&x);
    match files[0].config.lora().map(|lora| lora.init_lora_weights) {
        Some(Init::Orthogonal | Init::Pissa | Init::Olora) => {
            t.close(Column::Output, "fresh", &y, &plain, Bound::Relative(1e-6));
        }
        _ => t.same("a fresh adapter", &y, &plain),
    }
    let after = case.starting("base_after.");
    for (name, wanted) in &after {
        // The part that the adapter takes out of the base, whatever the signs of its vectors.
        let base = case.get(&format!("base.{name}"));
        let ours = (&base - &net.base()[name]).unwrap();
        t.close(
            Column::Merged,
            "taken",
            &ours,
            &(base - wanted).unwrap(),
            MERGED,
        );
    }
}

/// The gradients of every trainable tensor and of a float input.
fn gradients(
    t: &mut Tally,
    case: &Case,
    net: &Net,
    x: &Tensor,
    adapters: &[&str],
    bounds: &Bounds,
) {
    let float = x.dtype().is_float();
    let x = if float {
        Var::from_tensor(x).unwrap().as_tensor().clone()
    } else {
        x.clone()
    };
    let loss = (net.forward(&x) * case.get("probe"))
        .unwrap()
        .sum_all()
        .unwrap();
    let grads = loss.backward().unwrap();
    let mut compare = |what: &str, key: &str, tensor: &Tensor, bound| {
        let ours = grads
            .get(tensor)
            .unwrap_or_else(|| panic!("no gradient of {what}"));
        t.close(Column::Gradients, what, ours, &case.get(key), bound);
    };
    if float {
        compare("grad input", "grad.input", &x, bounds.input);
    }
    for (name, var) in net.model.trainable_parameters() {
        let named = TensorName::parse(&name).unwrap();
        let key = match &named.adapter {
            Some(adapter) => format!("grad.{adapter}.{}", named.key()),
            None => format!("grad.{name}"),
        };
        assert_eq!(named.adapter.is_some(), adapters.len() > 1, "{name}");
        let bound = if name.contains("magnitude") {
            bounds.magnitude
        } else {
            GRADIENTS
        };
        compare(&format!("grad {name}"), &key, &var, bound);
    }
    if let Some((_, bias)) = net.norm.as_ref().filter(|(_, bias)| bias.is_variable()) {
        compare(
            "grad norm",
            "grad.base_model.model.model.norm.bias",
            bias,
            GRADIENTS,
        );
    }
}

/// What counts as trainable, and PEFT's line of numbers.
fn counted(t: &mut Tally, case: &Case, net: &Net) {
    let theirs: BTreeMap<String, Vec<usize>> = case.info["trainable"]
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| {
            let dims = entry[1]
                .as_array()
                .unwrap()
                .iter()
                .map(|d| d.as_u64().unwrap() as usize);
            (text(&entry[0]), dims.collect())
        })
        // The name in memory has the adapter's name in it.
        .map(|(name, dims)| (TensorName::parse(&name).unwrap().key(), dims))
        .filter(|(name, _)| name != "base_model.model.model.norm.bias")
        .collect();
    let ours = net.model.trainable_parameters().into_iter();
    let ours: BTreeMap<_, _> = ours
        .map(|(name, var)| (name, var.dims().to_vec()))
        .collect();
    t.equal("trainable", ours, theirs);
    let printed = match case.folder.file_name().unwrap().to_str().unwrap() {
        // The frozen biases of q_proj stay beside the trained ones: 2 · 5 numbers more.
        "model_bias_lora_only" => "trainable params: 98 || all params: 461 || trainable%: 21.2581",
        // Here the norm's 6 do not train, and 27 frozen biases stay beside the trained ones.
        "model_bias_all" => "trainable params: 115 || all params: 478 || trainable%: 24.0586",
        _ => case.text("printed"),
    };
    t.equal(
        "printed",
        net.model.parameter_count().to_string().as_str(),
        printed,
    );
}

fn merging(t: &mut Tally, case: &Case, net: &Net, x: &Tensor, y: &Tensor, bounds: &Bounds) {
    let before = net.base();
    if let Some(why) = case.info["merge_refused"].as_str() {
        let error = net.model.merge().unwrap_err().to_string();
        t.check(&format!("{why}: {error}"), error.contains("2 groups"));
        t.same("after the refusal", &net.forward(x), y);
        return;
    }
    let mut wanted = case.starting("base.");
    wanted.extend(case.starting("merged."));
    t.check("something is merged", !case.starting("merged.").is_empty());
    wanted.retain(|name, _| !name.contains(".norm."));
    let mut wanted_safe = wanted.clone();
    wanted_safe.extend(case.starting("merged_safe."));
    if case.info["fan_in_fan_out"] == true {
        transpose(&mut wanted);
        transpose(&mut wanted_safe);
    }
    for (safe, wanted, bound) in [
        (false, wanted, bounds.merged),
        (true, wanted_safe, bounds.merged_safe),
    ] {
        if safe {
            net.model.safe_merge().unwrap()
        } else {
            net.model.merge().unwrap()
        }
        let merged = net.merged();
        t.equal(
            "merged tensors",
            merged.keys().collect::<Vec<_>>(),
            wanted.keys().collect(),
        );
        for (name, tensor) in &merged {
            t.close(
                Column::Merged,
                &format!("merged {name}"),
                tensor,
                &wanted[name],
                bound,
            );
            t.equal("type", tensor.dtype(), wanted[name].dtype());
        }
        let joined = net.forward(x);
        t.close(
            Column::Output,
            "merged = unmerged",
            &joined,
            y,
            bounds.parted,
        );
        let theirs = case.get("output_merged");
        t.close(
            Column::Output,
            "output_merged",
            &joined,
            &theirs,
            bounds.joined,
        );
        net.model.unmerge();
        t.same("unmerged output", &net.forward(x), y);
        for (name, tensor) in net.base() {
            t.same(&format!("unmerged {name}"), &tensor, &before[&name]);
        }
    }
}

/// What is saved has PEFT's names, numbers and settings, and gives the same layer again.
fn saving(
    t: &mut Tally,
    case: &Case,
    net: &Net,
    files: &[AdapterFiles],
    adapters: &[&str],
    x: &Tensor,
    y: &Tensor,
) {
    let folder = tempfile::tempdir().unwrap();
    net.model.save_pretrained(folder.path()).unwrap();
    let mut again = Net::of(case);
    again.norm.clone_from(&net.norm);
    let mut converted = false;
    for (adapter, files) in adapters.iter().zip(files) {
        let own = match *adapter {
            "default" => folder.path().to_path_buf(),
            name => folder.path().join(name),
        };
        let written = raw_tensors(&own);
        let (ours, theirs): (Vec<_>, Vec<_>) =
            (written.keys().collect(), files.tensors.keys().collect());
        t.equal("names in the file", ours, theirs);
        let init = files.config.lora().map(|lora| lora.init_lora_weights);
        if init.is_some_and(Init::rewrites_base) {
            // An adapter of twice the rank for the original base, as PEFT writes when asked to.
            converted = true;
            for (name, tensor) in &written {
                let mut dims = files.tensors[name].dims().to_vec();
                dims[usize::from(name.contains("lora_B"))] *= 2;
                t.equal("converted", tensor.dims(), &dims);
            }
        } else {
            for (name, tensor) in &written {
                t.same(&format!("saved {name}"), tensor, &files.tensors[name]);
            }
            let config = |folder: &Path| json_file(&folder.join("adapter_config.json"));
            let (ours, mut theirs) = (config(&own), config(&case.adapter_folder(adapter)));
            if let Some(name) = theirs["layers_pattern"].as_str() {
                // PEFT reads a name and a list of names; a list is written here.
                theirs["layers_pattern"] = serde_json::json!([name]);
            }
            t.equal("adapter_config.json", &ours, &theirs);
            if case.info["reload"].is_string() {
                // The same patterns, but in the order given, which says what they mean.
                for field in ["rank_pattern", "alpha_pattern"] {
                    let keys = |config: &Value| -> Vec<String> {
                        config[field].as_object().unwrap().keys().cloned().collect()
                    };
                    t.check("order", keys(&ours).iter().eq(keys(&theirs).iter().rev()));
                }
            }
        }
        again.model.load_adapter(&own, adapter).unwrap();
    }
    again.model.set_adapter(adapters).unwrap();
    let z = again.forward(x);
    if converted {
        t.close(Column::Output, "saved and loaded", &z, y, OUTPUT);
    } else {
        t.same("saved and loaded", &z, y);
    }
    if case.folder.ends_with("pissa_trained") {
        // PEFT's own conversion of the same adapter.
        let theirs = Case::read("pissa_converted");
        let mut peft = Net::of(&theirs);
        peft.model.load_adapter(&theirs.folder, "default").unwrap();
        for (ours, theirs) in again.layers.values().zip(peft.layers.values()) {
            let [ours, theirs] = [ours, theirs].map(|l| on!(l, l => l.delta_weight()).unwrap());
            t.close(Column::Merged, "converted", &ours, &theirs, MERGED);
        }
    }
}

fn mixed(t: &mut Tally, case: &Case) {
    let x = case.get("input");
    let mut net = Net::of(case);
    for adapter in ["a", "b"] {
        net.model
            .load_adapter(case.folder.join(adapter), adapter)
            .unwrap();
    }
    scales(t, &case.info["adapted"], &net);
    let rows: Vec<String> = case.info["rows"]
        .as_array()
        .unwrap()
        .iter()
        .map(text)
        .collect();
    let y = net.model.with_adapters(&rows, || net.forward(&x)).unwrap();
    t.close(Column::Output, "mixed", &y, &case.get("output"), OUTPUT);
    // Every row is what its adapter alone gives.
    for (i, name) in rows.iter().enumerate() {
        let alone: Vec<&str> = [name.as_str()]
            .into_iter()
            .filter(|n| *n != "__base__")
            .collect();
        net.model.set_adapter(&alone).unwrap();
        let row = |t: &Tensor| t.get(i).unwrap();
        t.close(
            Column::Output,
            "row",
            &row(&y),
            &row(&net.forward(&x)),
            OUTPUT,
        );
    }
}

fn combined(t: &mut Tally, case: &Case) {
    let (x, path) = (case.get("input"), case.text("path"));
    let mut net = Net::of(case);
    let embedding = case.text("kind") == "embedding";
    let mut weighted = Vec::new();
    for source in case.info["sources"].as_array().unwrap() {
        let (name, number) = (text(&source["name"]), |key: &str| {
            source[key].as_f64().unwrap()
        });
        let config = LoraConfig::new(number("r") as usize, number("alpha"))
            .with_targets(vec![path.to_string()]);
        let tensors = ["lora_A", "lora_B"].map(|part| {
            let kept = if embedding {
                part.replace("lora_", "lora_embedding_")
            } else {
                format!("{part}.weight")
            };
            (
                format!("base_model.model.{path}.{kept}"),
                case.get(&format!("{name}.{part}")),
            )
        });
        let files = AdapterFiles {
            config: config.into(),
            tensors: BTreeMap::from(tensors),
        };
        net.model.add_files(&files, &name).unwrap();
        let own = on!(&net.layers[path], l => l.adapter(&name)).unwrap();
        t.equal("scaling of a source", own.scaling(), number("scaling"));
        weighted.push((name, number("weight")));
    }
    let options = &case.info["options"];
    let how = Combination {
        combination_type: case.text("combination_type").parse().unwrap(),
        density: options["density"].as_f64(),
        majority_sign_method: options["majority_sign_method"]
            .as_str()
            .map_or_else(Default::default, |name| name.parse().unwrap()),
        svd_rank: options["svd_rank"].as_u64().map(|r| r as usize),
    };
    let known = ["density", "majority_sign_method", "svd_rank"];
    t.check(
        "options",
        options
            .as_object()
            .unwrap()
            .keys()
            .all(|k| known.contains(&k.as_str())),
    );
    let weighted: Vec<(&str, f64)> = weighted.iter().map(|(n, w)| (n.as_str(), *w)).collect();
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    net.model
        .add_weighted_adapter(&weighted, "result", &how, &mut rng)
        .unwrap();
    net.model.set_adapter(&["result"]).unwrap();

    let layer = &net.layers[path];
    let delta = on!(layer, l => l.delta_weight()).unwrap();
    t.close(
        Column::Merged,
        "delta",
        &delta,
        &case.get("result.delta"),
        MERGED,
    );
    t.close(
        Column::Output,
        "output",
        &net.forward(&x),
        &case.get("output"),
        OUTPUT,
    );
    let own = on!(layer, l => l.adapter("result")).unwrap();
    let theirs = ["r", "alpha", "scaling"].map(|k| case.info["result"][k].as_f64().unwrap());
    t.equal(
        "result",
        [own.r() as f64, own.lora_alpha(), own.scaling()],
        theirs,
    );
    let pair = [
        ("result.lora_A", own.lora_a()),
        ("result.lora_B", own.lora_b()),
    ];
    for (name, ours) in pair {
        let theirs = case.get(name);
        if how.combination_type.name().ends_with("svd") {
            // Signs are free, and with them A and B.
            t.equal(name, ours.unwrap().dims(), theirs.dims());
        } else {
            t.close(Column::Merged, name, ours.unwrap(), &theirs, MERGED);
        }
    }
}

/// The case that a wild file belongs to, with base weights.
fn source(case: &Case) -> Case {
    if case.tensors.keys().any(|key| key.starts_with("base.")) {
        return Case::at(&case.folder);
    }
    Case::at(&case.folder.join(case.text("derived_from")))
}

fn loads(t: &mut Tally, case: &Case) {
    t.equal("expected", case.text("expect"), "ok");
    let mut net = Net::of(&source(case));
    let folder = match case.info["subfolder"].as_str() {
        Some(sub) => case.folder.join(sub),
        None => case.folder.clone(),
    };
    net.model.load_adapter(&folder, "default").unwrap();
    let wanted = match case.info["outputs"].as_str() {
        Some(other) => Case::at(&case.folder.join(other)),
        None => Case::at(&case.folder),
    };
    let (x, output) = (wanted.get("input"), wanted.get("output"));
    let y = net.forward(&x);
    t.close(Column::Output, "output", &y, &output, OUTPUT);
    net.model.enable_adapters(false);
    let off = net.forward(&x);
    t.check(
        "the adapter does something",
        gap(&y, &off) > 1e-3 * largest(&y),
    );
    case.read.borrow_mut().extend(case.tensors.keys().cloned());
}

fn refused(t: &mut Tally, case: &Case, why: &str) {
    let expected = case.text("expect").starts_with("refuse: ");
    t.check(
        "expected",
        expected != case.folder.ends_with("bin_fallback"),
    );
    let source = source(case);
    let x = source.get("input");
    let mut net = Net::of(&source);
    let before = net.forward(&x);
    let error = net
        .model
        .load_adapter(&case.folder, "default")
        .unwrap_err()
        .to_string();
    t.check(&format!("{error:?} says not {why:?}"), error.contains(why));
    t.check("nothing was added", net.model.adapters().is_empty());
    t.check("no layer was changed", net.adapted("default").is_empty());
    t.same("the output", &net.forward(&x), &before);
}
