//! `cargo course lab`: sets up what is missing, then opens JupyterLab on the notebooks.

use crate::device::{self, Device};
use crate::home::{Checkout, Home};
use crate::{bundle, kernel, setup};
use anyhow::{Context, Result, bail};
use clap::Args;
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

/// What `cargo course lab` can be told.
#[derive(Args)]
pub struct Options {
    /// Print the address and open no browser
    #[arg(long)]
    no_browser: bool,
    /// Set up from this folder, made by `cargo course bundle`, without a network
    #[arg(long, value_name = "DIR")]
    offline: Option<PathBuf>,
    /// The port on this machine; without, the first free one from 8888
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,
    /// Where tensors live [default: COURSE_DEVICE, or else cpu]
    #[arg(long)]
    device: Option<Device>,
}

/// Becomes JupyterLab; returns only if that cannot start.
pub fn lab(home: &Home, checkout: &Checkout, options: &Options) -> Result<bool> {
    if let Some(port) = options.port {
        need_port(port)?;
    }
    if let Some(folder) = &options.offline {
        bundle::offline(home, checkout, folder)?;
    }
    let device = Device::chosen(options.device)?;
    let (environment, _) = setup::ensure(home, checkout, device)?;
    kernel::sweep(home);
    let mut command = Command::new(environment.bin("jupyter"));
    command
        .arg("lab")
        .arg("--ServerApp.ip=127.0.0.1")
        .current_dir(checkout.join("notebooks"));
    if options.no_browser {
        command.arg("--no-browser");
    }
    if let Some(port) = options.port {
        command
            .arg(format!("--ServerApp.port={port}"))
            .arg("--ServerApp.port_retries=0");
    }
    // Root may run it in a container; everywhere else JupyterLab keeps its own refusal.
    if nix::unistd::geteuid().is_root() {
        command.arg("--allow-root");
    }
    let error = command
        .env("COURSE_HOME", home.join(""))
        .env(device::VARIABLE, device.name())
        .exec();
    Err(error).context("cannot start JupyterLab: run `cargo course setup`")
}

fn need_port(port: u16) -> Result<()> {
    if let Err(error) = TcpListener::bind(("127.0.0.1", port)) {
        bail!(
            "port {port} cannot be used ({error}). Choose another with --port, or leave --port \
             out: then the first free one is taken."
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_in_use_is_named() {
        let taken = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = taken.local_addr().unwrap().port();
        let error = need_port(port).unwrap_err().to_string();
        assert!(
            error.contains(&port.to_string()) && error.contains("--port"),
            "{error}"
        );
        drop(taken);
        need_port(port).unwrap();
    }
}
