//! The one error type of this crate.

use std::path::PathBuf;

use candle_core::{DType, DeviceLocation};
use thiserror::Error;

use crate::CombinationType;

/// Everything this crate refuses, with the layer's name, both shapes and what to do.
///
/// ```
/// use lora::LoraConfig;
///
/// let message = LoraConfig::new(0, 16.0).validate().unwrap_err().to_string();
/// assert!(message.contains("r = 0") && message.contains("r >= 1"));
/// ```
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// The rank is zero.
    #[error("LoraConfig: rank r = 0 leaves nothing to train; use r >= 1 (PEFT's default is r = 8)")]
    Rank,

    /// The rank is so large that A or B could not be addressed.
    #[error("layer {layer}: rank r = {r} beside a weight {weight:?} is too large; use a smaller r")]
    HugeRank {
        /// The layer's name.
        layer: String,
        /// The rank asked for.
        r: usize,
        /// The base weight's shape.
        weight: Vec<usize>,
    },

    /// `lora_alpha` is not a positive finite number.
    #[error(
        "LoraConfig: lora_alpha = {alpha} must be positive and finite; \
         common choices are lora_alpha = r and lora_alpha = 2 r"
    )]
    Alpha {
        /// The value given.
        alpha: f64,
    },

    /// The dropout probability is not in [0, 1).
    #[error("{config}: dropout = {p} must be at least 0 and below 1; PEFT's default is 0")]
    Dropout {
        /// The configuration's name.
        config: &'static str,
        /// The value given.
        p: f64,
    },

    /// Two options of a configuration exclude each other, or the layer cannot have the option.
    #[error("{what} is not supported: {why}")]
    Unsupported {
        /// The option, with its layer or configuration.
        what: String,
        /// The reason, and what to do.
        why: String,
    },

    /// The tensors of one of the [`ops`](crate::ops) do not fit each other.
    #[error("{op}: {given}; {wants}")]
    Operation {
        /// The function's name.
        op: &'static str,
        /// The tensors, with their shapes and types.
        given: String,
        /// What they must be.
        wants: String,
    },

    /// A tensor or a setting that [`quant`](crate::quant) cannot put into 4 bits.
    #[error("quantize: {what} will not do; it takes {wants}")]
    Quantize {
        /// The tensor or the setting.
        what: String,
        /// What it must be.
        wants: String,
    },

    /// A pattern of `target_modules`, `exclude_modules`, `rank_pattern` or `alpha_pattern` is
    /// not a regular expression.
    #[error("{field}: {pattern:?} is not a usable regular expression: {why}")]
    Pattern {
        /// The field of the configuration.
        field: &'static str,
        /// The pattern given.
        pattern: String,
        /// What the regular expression engine says.
        why: String,
    },

    /// The configuration matches no layer of the model.
    #[error("{field} {wanted} matches no layer{clause}; {nearest}")]
    NoTarget {
        /// The field of the configuration.
        field: &'static str,
        /// What it holds.
        wanted: String,
        /// What else narrows the choice, or nothing.
        clause: String,
        /// The names that come nearest.
        nearest: String,
    },

    /// The layer's name cannot become part of a parameter name.
    #[error(
        "layer name {name:?}: give the module's dotted path, such as \"layers.0.q_proj\"; \
         no part of it may be empty or hold white space"
    )]
    Name {
        /// The name given.
        name: String,
    },

    /// An adapter's name cannot become part of a parameter name or a folder's name.
    #[error("adapter name {name:?}: use letters, digits, '-' and '_', such as \"default\"")]
    AdapterName {
        /// The name given.
        name: String,
    },

    /// There is an adapter of this name already.
    #[error(
        "{place}: there is an adapter {adapter:?} already; delete it first or choose another name"
    )]
    AdapterExists {
        /// The layer or model.
        place: String,
        /// The adapter's name.
        adapter: String,
    },

    /// There is no adapter of this name.
    #[error("{place}: no adapter {adapter:?}; there {}", there_are(known))]
    NoAdapter {
        /// The layer or model.
        place: String,
        /// The adapter's name.
        adapter: String,
        /// The adapters there are.
        known: Vec<String>,
    },

    /// No adapter is active, and the call needs one.
    #[error(
        "layer {layer}: no adapter is active; choose one with set_adapter; there {}",
        there_are(known)
    )]
    NoneActive {
        /// The layer's name.
        layer: String,
        /// The adapters there are.
        known: Vec<String>,
    },

    /// The layer is merged, and the call needs it unmerged.
    #[error("{place}: {adapters:?} merged into the weight; call unmerge() before {before}")]
    Merged {
        /// The layer's name.
        place: String,
        /// The merged adapters.
        adapters: Vec<String>,
        /// What was asked for.
        before: &'static str,
    },

    /// A merge would give a weight or bias that is not finite.
    #[error(
        "layer {layer}: merging {adapters:?} gives {count} of {of} values of the {what} that are \
         NaN or infinite; nothing was changed, the adapter seems to be broken"
    )]
    MergeNotFinite {
        /// The layer's name.
        layer: String,
        /// The adapters to merge.
        adapters: Vec<String>,
        /// "weight" or "bias".
        what: &'static str,
        /// How many values are not finite.
        count: usize,
        /// How many there are.
        of: usize,
    },

    /// The number of adapter names is not the batch size.
    #[error(
        "layer {layer}: {rows} adapter names for an input {input:?}; give one for each row of dimension 0"
    )]
    Rows {
        /// The layer's name.
        layer: String,
        /// The number of names.
        rows: usize,
        /// The input's shape.
        input: Vec<usize>,
    },

    /// The base weight has not the shape that the layer needs.
    #[error(
        "layer {layer}: the base weight must be {wants}, got {weight:?}; reshape it or wrap another layer"
    )]
    Weight {
        /// The layer's name.
        layer: String,
        /// The weight's shape.
        weight: Vec<usize>,
        /// The shape needed, in words.
        wants: &'static str,
    },

    /// The base bias does not fit the base weight.
    #[error("layer {layer}: bias {bias:?} does not fit weight {weight:?}; it must be [{out}]")]
    Bias {
        /// The layer's name.
        layer: String,
        /// The bias's shape.
        bias: Vec<usize>,
        /// The weight's shape.
        weight: Vec<usize>,
        /// The number of outputs.
        out: usize,
    },

    /// The base weight's type holds no fractions (or too few of them) to be adapted.
    #[error(
        "layer {layer}: a weight of type {dtype:?} cannot be adapted; \
         convert the base to f32, f64, f16 or bf16 first"
    )]
    WeightType {
        /// The layer's name.
        layer: String,
        /// The type of the base weight.
        dtype: DType,
    },

    /// The input does not fit the layer.
    #[error("layer {layer}: input {input:?} does not fit weight {weight:?}; {wants}")]
    Input {
        /// The layer's name.
        layer: String,
        /// The input's shape.
        input: Vec<usize>,
        /// The base weight's shape.
        weight: Vec<usize>,
        /// What would fit.
        wants: String,
    },

    /// The input's type is not the layer's.
    #[error("layer {layer}: the input is {input:?}, the base weight {weight:?}; {wants}")]
    InputType {
        /// The layer's name.
        layer: String,
        /// The input's type.
        input: DType,
        /// The base weight's type.
        weight: DType,
        /// What to do.
        wants: String,
    },

    /// The input lies on another device than the layer.
    #[error(
        "layer {layer}: input {shape:?} is on {input:?}, the base weight {weight:?} on {base:?}; \
         move it with x.to_device(...)"
    )]
    Device {
        /// The layer's name.
        layer: String,
        /// The input's shape.
        shape: Vec<usize>,
        /// The input's device.
        input: DeviceLocation,
        /// The base weight's shape.
        weight: Vec<usize>,
        /// The base weight's device.
        base: DeviceLocation,
    },

    /// A tensor operation failed inside a layer.
    #[error("layer {layer}: input {input:?}, weight {weight:?}: {source}")]
    Layer {
        /// The layer's name.
        layer: String,
        /// The input's shape.
        input: Vec<usize>,
        /// The base weight's shape.
        weight: Vec<usize>,
        /// What candle reports.
        source: Box<candle_core::Error>,
    },

    /// A matrix to decompose or to combine holds NaN or infinity.
    #[error(
        "{what} holds NaN or infinity, which no decomposition and no combination survives; \
         look for a training run that diverged"
    )]
    NotFinite {
        /// What the matrix is.
        what: String,
    },

    /// The rank asked of a decomposition is not one the matrix has room for.
    #[error(
        "rank {rank} of a {rows} x {columns} matrix: a truncated decomposition keeps 1 to {} \
         vectors; choose a rank in that range",
        rows.min(columns)
    )]
    SvdRank {
        /// The rank given.
        rank: usize,
        /// The matrix's rows: the layer's outputs.
        rows: usize,
        /// The matrix's columns: the layer's inputs.
        columns: usize,
    },

    /// An optimiser without a single parameter.
    #[error(
        "LoraOptimizer: no parameters to train; pass the layers' trainable_parameters() \
         and check that the target modules matched any layer"
    )]
    NoParameters,

    /// Two parameters of one name.
    #[error(
        "LoraOptimizer: two parameters are called {name}; give each layer a name of its own, \
         and each parameter to one group only"
    )]
    ParameterName {
        /// The name both have.
        name: String,
    },

    /// One variable under two names: it would be stepped twice.
    #[error(
        "LoraOptimizer: {first} and {second} are the same variable; \
         pass a shared variable once"
    )]
    ParameterTwice {
        /// The first name.
        first: String,
        /// The second name.
        second: String,
    },

    /// A parameter's type is not one AdamW can train in.
    #[error(
        "LoraOptimizer: {name} is {dtype:?}, and AdamW trains f32 or f64; \
         keep adapters in f32 (LoraLinear does so beside an f16 or bf16 base)"
    )]
    ParameterType {
        /// The parameter's name.
        name: String,
        /// Its type.
        dtype: DType,
    },

    /// The state of another optimiser.
    #[error(
        "LoraOptimizer::load_state_dict: {name}: {problem}; load the state of an optimiser over \
         the same parameters"
    )]
    OptimizerState {
        /// The tensor's name.
        name: String,
        /// What is wrong with it.
        problem: String,
    },

    /// A number given to the optimiser, to clipping or to accumulation is out of range.
    #[error("{what} = {value} must be {must}")]
    OptimizerSetting {
        /// Where and which number.
        what: String,
        /// The value given.
        value: f64,
        /// What it must be.
        must: &'static str,
    },

    /// The loss is not a single number.
    #[error("LoraOptimizer: the loss is {shape:?}, not a single number; take loss.mean_all()?")]
    Loss {
        /// The loss's shape.
        shape: Vec<usize>,
    },

    /// Some trainable parameters received no gradient.
    #[error(
        "LoraOptimizer: no gradient for {} ({} of {of} parameters); nothing was changed. \
         Is the layer used in the forward pass, its adapter enabled and not merged? \
         Does a fused candle op stand between it and the loss \
         (candle_nn::ops::layer_norm, rms_norm, softmax_last_dim, rotary_emb::rope, and the \
         layers built on them)? These cut the gradient without a word; layer_norm_slow, \
         rms_norm_slow, softmax and rope_slow keep it",
        listed(names),
        names.len()
    )]
    GradientMissing {
        /// All parameters without a gradient.
        names: Vec<String>,
        /// The number of trainable parameters.
        of: usize,
    },

    /// A gradient is NaN, infinite, or too large to be squared.
    #[error(
        "parameter {name}: the norm of its gradient is {norm}; nothing was changed. \
         Look for a loss that is not finite, lower the learning rate, or warm it up"
    )]
    GradientNotFinite {
        /// The parameter's name.
        name: String,
        /// The norm: NaN or infinite.
        norm: f64,
    },

    /// A gradient does not belong to its parameter.
    #[error(
        "parameter {name}: a gradient {gradient:?} of {gradient_type:?} does not fit \
         the parameter {parameter:?} of {parameter_type:?}; \
         insert gradients with the parameter's shape and type"
    )]
    GradientShape {
        /// The parameter's name.
        name: String,
        /// The gradient's shape.
        gradient: Vec<usize>,
        /// The gradient's type.
        gradient_type: DType,
        /// The parameter's shape.
        parameter: Vec<usize>,
        /// The parameter's type.
        parameter_type: DType,
    },

    /// The mean of no micro-batch at all.
    #[error(
        "GradientAccumulator: no micro-batch was added since the last mean; \
         call add(&loss.backward()?) first"
    )]
    NothingAccumulated,

    /// There is nothing to combine.
    #[error("combine: no adapter given; pass at least one")]
    CombineNone,

    /// An adapter's A and B do not belong together, or to the layer of the first adapter.
    #[error(
        "combine: adapter {index} (counted from 0) has A {a:?} and B {b:?}, adapter 0 has A \
         {first_a:?} and B {first_b:?}; A must be (r, in) and B (out, r) with r >= 1, and in and \
         out the same for all adapters"
    )]
    CombineShape {
        /// The adapter's place in the list.
        index: usize,
        /// The shape of its A.
        a: Vec<usize>,
        /// The shape of its B.
        b: Vec<usize>,
        /// The shape of the first adapter's A.
        first_a: Vec<usize>,
        /// The shape of the first adapter's B.
        first_b: Vec<usize>,
    },

    /// The ranks differ, and the method adds A to A and B to B.
    #[error(
        "combine: {combination_type} needs adapters of one rank, but adapter 0 has r = {first} \
         and adapter {index} r = {rank}; use cat or svd"
    )]
    CombineRanks {
        /// The method.
        combination_type: CombinationType,
        /// The first adapter's rank.
        first: usize,
        /// The other adapter's place in the list, counted from 0.
        index: usize,
        /// The other adapter's rank.
        rank: usize,
    },

    /// An adapter's weight or scaling is NaN or infinite.
    #[error(
        "combine: adapter {index} (counted from 0) has weight {weight} and scaling {scaling}; \
         both must be finite"
    )]
    CombineWeight {
        /// The adapter's place in the list.
        index: usize,
        /// Its weight.
        weight: f64,
        /// Its scaling.
        scaling: f64,
    },

    /// The method prunes, and the share to keep is missing or impossible.
    #[error(
        "combine: {combination_type} keeps a share of the entries, which must be set with \
         with_density to a number {}, got {}",
        density_range(*combination_type),
        density.map_or("none".to_string(), |density| density.to_string())
    )]
    Density {
        /// The method.
        combination_type: CombinationType,
        /// The density given, if any.
        density: Option<f64>,
    },

    /// No method of combining has this name.
    #[error("combine: unknown {what} {name:?}; use one of {}", known.join(", "))]
    CombineName {
        /// What the name was to choose.
        what: &'static str,
        /// The name given.
        name: String,
        /// The names there are.
        known: Vec<&'static str>,
    },

    /// A file cannot be read, written or understood.
    #[error("{}: {why}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what to do.
        why: String,
    },

    /// An input, a mask or a weight does not fit the rest of an attention layer.
    #[error("layer {layer}: {what} {shape:?} does not fit {beside}; {wants}")]
    Attention {
        /// The attention layer's name.
        layer: String,
        /// What does not fit.
        what: &'static str,
        /// Its shape.
        shape: Vec<usize>,
        /// What it should fit.
        beside: String,
        /// What would fit.
        wants: String,
    },

    /// A tensor operation failed in candle.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl From<Error> for candle_core::Error {
    /// Keeps the message as it is, so that `Module::forward` reports it unchanged.
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(inner) => inner,
            other => candle_core::Error::Wrapped(Box::new(other)),
        }
    }
}

/// `Result` with this crate's [`enum@Error`].
///
/// ```
/// fn rank(r: usize) -> lora::Result<f64> {
///     let config = lora::LoraConfig::new(r, 16.0);
///     config.validate()?;
///     Ok(config.scaling())
/// }
/// assert_eq!(rank(8).unwrap(), 2.0);
/// assert!(rank(0).is_err());
/// ```
pub type Result<T, E = Error> = std::result::Result<T, E>;

fn there_are(names: &[String]) -> String {
    match names {
        [] => "is none".to_string(),
        [one] => format!("is {one:?}"),
        more => format!(
            "are {}",
            more.iter()
                .map(|n| format!("{n:?}"))
                .collect::<Vec<_>>()
                .join(", ")
        ),
    }
}

/// The first names, and how many more there are.
fn listed(names: &[String]) -> String {
    const SHOWN: usize = 8;
    let shown = names.get(..SHOWN).unwrap_or(names).join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

fn density_range(combination_type: CombinationType) -> &'static str {
    if combination_type.draws() {
        "above 0 and at most 1 (entries kept are divided by it)"
    } else {
        "from 0 to 1"
    }
}
