//! Where a notebook's tensors live: `--device`, or the variable that `course::device` reads.

use anyhow::{Result, bail};
use clap::ValueEnum;

/// The variable that chooses the device in a kernel.
pub const VARIABLE: &str = "COURSE_DEVICE";

/// Where tensors live.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Device {
    /// The processor
    Cpu,
    /// The first NVIDIA card
    Cuda,
}

impl Device {
    /// What was asked for on the command line, or else in the environment, or else the processor.
    pub fn chosen(asked: Option<Self>) -> Result<Self> {
        asked.map_or_else(
            || {
                Self::named(
                    &std::env::var_os(VARIABLE)
                        .unwrap_or_default()
                        .to_string_lossy(),
                )
            },
            Ok,
        )
    }

    /// The device of a name, as `course::device` takes it.
    fn named(name: &str) -> Result<Self> {
        match name.trim().to_ascii_lowercase().as_str() {
            "" | "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda),
            other => {
                bail!("{VARIABLE}={other} is not known; use {VARIABLE}=cpu or {VARIABLE}=cuda")
            }
        }
    }

    /// Its name in the environment.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_the_kernel_reads_them() {
        for (name, device) in [
            ("", Device::Cpu),
            ("cpu", Device::Cpu),
            (" CUDA ", Device::Cuda),
        ] {
            assert_eq!(Device::named(name).unwrap(), device);
            assert_eq!(Device::named(device.name()).unwrap(), device);
        }
        let error = Device::named("gpu").unwrap_err().to_string();
        assert!(error.contains("COURSE_DEVICE=gpu"), "{error}");
    }

    #[test]
    fn the_command_line_goes_before_the_environment() {
        assert_eq!(Device::chosen(Some(Device::Cuda)).unwrap(), Device::Cuda);
    }
}
