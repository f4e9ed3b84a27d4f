//! Where tensors live: the CPU, or one CUDA card when `COURSE_DEVICE=cuda` asks for it.

use std::sync::OnceLock;

use candle_core::Device;

use crate::{Error, Result};

/// The environment variable that chooses the device.
const VARIABLE: &str = "COURSE_DEVICE";

/// The device every lesson computes on: the CPU, or the first CUDA card when the environment
/// says `COURSE_DEVICE=cuda`.
///
/// # Errors
///
/// [`Error::Device`] when `COURSE_DEVICE` holds something else than `cpu` or `cuda`, when this
/// crate was built without its feature `cuda`, or when no card answers. It never falls back to the
/// CPU in silence: a timing taken on the wrong device is worse than an error.
///
/// ```
/// if std::env::var_os("COURSE_DEVICE").is_none() {
///     assert!(course::device::device()?.is_cpu());
/// }
/// # Ok::<(), course::Error>(())
/// ```
pub fn device() -> Result<Device> {
    let wanted = std::env::var_os(VARIABLE).unwrap_or_default();
    choose(&wanted.to_string_lossy(), cfg!(feature = "cuda"), card)
}

/// The first card. candle takes two handles of one card for two cards, so there is one.
fn card() -> candle_core::Result<Device> {
    static CARD: OnceLock<Device> = OnceLock::new();
    if let Some(card) = CARD.get() {
        return Ok(card.clone());
    }
    let card = Device::new_cuda(0)?;
    Ok(CARD.get_or_init(|| card).clone())
}

fn choose(
    wanted: &str,
    built_for_cuda: bool,
    card: impl FnOnce() -> candle_core::Result<Device>,
) -> Result<Device> {
    let refuse = |problem: String| Err(Error::Device { problem });
    match wanted.trim().to_ascii_lowercase().as_str() {
        "" | "cpu" => Ok(Device::Cpu),
        "cuda" if !built_for_cuda => refuse(format!(
            "{VARIABLE}=cuda, but this kernel was built without CUDA; `cargo course setup --device \
             cuda` prepares one (a program of your own: feature `cuda` of crate `course`), or \
             unset {VARIABLE} for the CPU"
        )),
        "cuda" => match card() {
            Ok(device) => Ok(device),
            Err(error) => refuse(format!(
                "{VARIABLE}=cuda, but no CUDA card answers: {}; check that `nvidia-smi` lists one, \
                 or unset {VARIABLE} for the CPU",
                first_line(&error.to_string())
            )),
        },
        other => refuse(format!(
            "{VARIABLE}={other} is not known; use {VARIABLE}=cpu or {VARIABLE}=cuda"
        )),
    }
}

/// candle may add a backtrace below its message.
fn first_line(message: &str) -> &str {
    message.lines().next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn no_card() -> candle_core::Result<Device> {
        candle_core::bail!("driver says no")
    }

    #[test]
    fn the_cpu_is_the_default() {
        for wanted in ["", "cpu", " CPU "] {
            assert!(choose(wanted, false, no_card).unwrap().is_cpu());
        }
    }

    #[test]
    fn cuda_is_the_card_s_answer() {
        // Any device will do to see that the answer is passed on.
        assert!(choose("cuda", true, || Ok(Device::Cpu)).is_ok());
    }

    #[test]
    fn every_refusal_says_what_to_do() {
        for (wanted, built, says) in [
            ("cuda", false, "feature `cuda`"),
            ("cuda", true, "nvidia-smi"),
            ("gpu", true, "COURSE_DEVICE=gpu is not known"),
        ] {
            let text = choose(wanted, built, no_card).unwrap_err().to_string();
            assert!(
                text.contains(says) && text.contains("COURSE_DEVICE"),
                "{text}"
            );
            assert!(!text.contains('\n'), "{text}");
        }
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn without_the_feature_candle_has_no_card_either() {
        assert!(Device::new_cuda(0).is_err());
    }
}
