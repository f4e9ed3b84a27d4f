//! Everything that a notebook needs on this machine, made step by step. Each step finds its work
//! done, or does it; cut off at any point and started again, the set-up goes on.

pub mod cuda;
pub mod evcxr;
pub mod kernelspec;
pub mod peft;
pub mod python;
pub mod template;
pub mod tool;

use crate::data;
use crate::device::Device;
use crate::home::{Checkout, Home, write_atomic};
use crate::progress::Steps;
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// What the last set-up installed; the kernel's launcher reads it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Installed {
    /// The checkout for notebooks that lie outside of any.
    pub checkout: PathBuf,
    /// The environment's Python.
    pub python: PathBuf,
    /// evcxr_jupyter.
    pub evcxr: PathBuf,
    /// The compiler.
    pub rustc: evcxr::Rustc,
    /// For kernels whose tensors live on a card, once a set-up was told of one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cuda: Option<cuda::Toolkit>,
}

const RECORD: &str = "installed.json";

impl Installed {
    /// Reads what the last set-up wrote.
    pub fn read(home: &Home) -> Result<Self> {
        let path = home.join(RECORD);
        let text = std::fs::read_to_string(&path).with_context(|| {
            format!(
                "{} is missing: run `cargo course setup` in the checkout",
                path.display()
            )
        })?;
        serde_json::from_str(&text)
            .with_context(|| format!("{} is damaged: run `cargo course setup`", path.display()))
    }

    fn write(&self, home: &Home) -> Result<()> {
        write_atomic(&home.join(RECORD), serde_json::to_string_pretty(self)?)
    }
}

/// Needed for a set-up from nothing: Python environment, data, kernel build, template and a copy.
const NEEDED_BYTES: u64 = 4_000_000_000;

/// Does all the set-up that is missing for kernels on a device.
pub fn ensure(
    home: &Home,
    checkout: &Checkout,
    device: Device,
) -> Result<(python::Environment, Installed)> {
    let _lock = home.lock("setup", || {
        eprintln!("Another `cargo course` is setting up: waiting for it.");
    })?;
    let mut steps = Steps::new(match device {
        Device::Cpu => 6,
        Device::Cuda => 7,
    });
    let rustc = evcxr::Rustc::of(checkout.root())?;
    evcxr::need_linker()?;
    if !home.join(RECORD).exists() {
        need_space(home.join("").as_path(), NEEDED_BYTES)?;
    }
    let cuda = match device {
        Device::Cuda => Some(cuda::Toolkit::for_card(home, &mut steps)?),
        // Kernels on the card go on as they were set up.
        Device::Cpu => Installed::read(home).ok().and_then(|last| last.cuda),
    };
    let environment = python::ensure(home, &mut steps)?;
    data::ensure(home, checkout, &environment.python(), &mut steps)?;
    evcxr::ensure_library_sources(&rustc, &mut steps);
    let binary = evcxr::ensure(home, &rustc, &mut steps)?;
    let installed = Installed {
        checkout: checkout.root().to_owned(),
        python: environment.python(),
        evcxr: binary,
        rustc,
        cuda: cuda.filter(cuda::Toolkit::is_there),
    };
    kernelspec::ensure(home, &environment, &mut steps)?;
    template::ensure(home, checkout, &installed, device, &mut steps)?;
    installed.write(home)?;
    Ok((environment, installed))
}

fn need_space(dir: &Path, bytes: u64) -> Result<()> {
    match tool::free_bytes(dir) {
        Some(free) if free < bytes => bail!(
            "{} has {:.1} GB free, and the set-up needs {:.0} GB. Make room, or set COURSE_HOME to \
             a folder on another disk.",
            dir.display(),
            free as f64 / 1e9,
            bytes as f64 / 1e9
        ),
        _ => Ok(()),
    }
}
