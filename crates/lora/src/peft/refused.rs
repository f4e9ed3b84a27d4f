//! The options of `adapter_config.json` that are refused, and why.

macro_rules! refused {
    ($($option:literal: $why:literal,)*) => {
        /// The options of `adapter_config.json` that are refused when they are set, with the
        /// reason. Unset (`null`, `false`, `[]`, `{}`), they are kept and written back.
        ///
        /// | option | why |
        /// |---|---|
        $(#[doc = concat!("| `", $option, "` | ", $why, " |")])*
        ///
        /// Any other option that is set and not known is refused too, by name. A
        /// `corda_config` or `lora_ga_config` may stand in a file that PEFT has converted back to
        /// the original base; when that is so, delete the key from the file.
        ///
        /// Accepted although they sound alike: `eva_config` with `init_lora_weights` `"eva"`, and
        /// `"mica"`. Both only choose the first A and B, the base stays as it is and the update
        /// is s B A. A fresh adapter of such a configuration starts as
        /// [`Init::Kaiming`](crate::Init::Kaiming), and B trains too, which MiCA freezes.
        ///
        /// Source: PEFT `tuners/lora/config.py`, `tuners/lora/layer.py` and
        /// `tuners/lora/variants.py`, version 0.21.
        ///
        /// ```
        /// use lora::peft::{AdapterConfig, REFUSED};
        ///
        /// for (option, why) in REFUSED.iter().filter(|(option, _)| !option.contains(' ')) {
        ///     let json = format!(r#"{{"peft_type": "LORA", "{option}": [1]}}"#);
        ///     let message = AdapterConfig::from_json(json.as_bytes()).unwrap_err().to_string();
        ///     assert!(message.contains(option) && message.contains(why), "{message}");
        /// }
        /// ```
        pub const REFUSED: &[(&str, &str)] = &[$(($option, $why)),*];
    };
}

refused! {
    "alora_invocation_tokens": "the adapter acts only on tokens after a certain text",
    "arrow_config": "a router mixes several adapters anew for every token",
    "corda_config": "CorDA takes its part out of the base weight, so the file fits only that base",
    "enable_lora": "in PEFT 0.2 it adapts some parts of a fused projection, packed in one A and B",
    "ensure_weight_tying": "the adapters of the embedding and the output head are one; \
        here they would train apart",
    "init_lora_weights = \"corda\"": "CorDA takes its part out of the base weight, \
        so the file fits only that base",
    "init_lora_weights = \"loftq\"": "LoftQ quantises the base while it makes the adapter, \
        so the file fits only that base",
    "init_lora_weights = \"lora_ga\"": "LoRA-GA takes its part out of the base weight, \
        so the file fits only that base",
    "kasa_config": "KaSA cuts singular values off the base weight and puts a diagonal \
        between A and B",
    "layer_replication": "the model is built anew from repeated layers that the base does not have",
    "loftq_config": "LoftQ quantises the base while it makes the adapter, \
        so the file fits only that base",
    "lora_ga_config": "LoRA-GA takes its part out of the base weight, so the file fits only that \
        base",
    "megatron_config": "the tensors are slices for Megatron's parallel layers",
    "monteclora_config": "random samples are added to the weights, from tensors beside A and B",
    "save_projection = false": "VeRA's A and B are not in the file but drawn by PyTorch's random \
        generator; save the adapter again in PEFT with save_projection=True",
    "target_parameters": "it adapts bare parameters, not layers",
    "trainable_token_indices": "it trains rows of the embedding beside the adapter",
    "use_bdlora": "A or B is the packed form of a block-diagonal matrix",
    "use_qalora": "the input is averaged in groups before A reads it",
    "velora_config": "the gradient of A is computed from compressed inputs, with a tensor of its \
        own",
}

/// The reason why `option` is refused, if it is.
pub(super) fn why(option: &str) -> Option<&'static str> {
    REFUSED
        .iter()
        .find(|(name, _)| *name == option)
        .map(|(_, why)| *why)
}
