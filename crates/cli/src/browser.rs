//! `cargo course browser`: real JupyterLab in a real browser, as a learner uses it.

use crate::device::{self, Device};
use crate::home::{Checkout, Home};
use crate::progress::Steps;
use crate::setup;
use crate::setup::python::{self, Environment, Recipe};
use crate::setup::template::without_cargo;
use anyhow::{Context, Result};
use clap::Args;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// What the tests need beside the course's own environment.
const RECIPE: Recipe = Recipe {
    prefix: "browser",
    requirements: include_str!("../python/browser-requirements.txt"),
    what: "Python environment with Playwright",
    estimate: "about 1 minute, 250 MB",
};

/// Names the browser.
const BROWSER: &str = "COURSE_BROWSER";

/// Where Chromium is found, in this order.
const NAMES: [&str; 5] = [
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
];

/// What `cargo course browser` can be told.
#[derive(Args)]
pub struct Options {
    /// Run every lesson in the classic notebook as well
    #[arg(long)]
    classic: bool,
    /// Let five learners work at JupyterHub as well; makes accounts, so it needs root
    #[arg(long)]
    hub: bool,
}

/// Runs the tests; screenshots stay in `target/browser`.
pub fn command(home: &Home, checkout: &Checkout, options: &Options) -> Result<bool> {
    let browser = find().with_context(|| {
        format!(
            "no Chromium was found. Install it (Debian: sudo apt install chromium; macOS: brew install \
             chromium), or name one with {BROWSER}=/path/to/chromium."
        )
    })?;
    let (environment, _) = setup::ensure(home, checkout, Device::Cpu)?;
    let own = {
        let _lock = home.lock("browser", || {
            eprintln!("Another `cargo course` is installing Playwright: waiting for it.");
        })?;
        let interpreter = python::interpreter()?;
        python::make(home, &mut Steps::new(1), &RECIPE, &interpreter, || Ok(()))?
    };
    let kept = checkout.join("target/browser");
    std::fs::create_dir_all(&kept).with_context(|| format!("cannot create {}", kept.display()))?;
    let status = tests(home, checkout, &environment, &own, options)?
        .env(BROWSER, browser)
        .status()
        .context("cannot start the tests' Python")?;
    println!("Screenshots and logs: {}", kept.display());
    Ok(status.success())
}

fn tests(
    home: &Home,
    checkout: &Checkout,
    environment: &Environment,
    own: &Environment,
    options: &Options,
) -> Result<Command> {
    let mut command = Command::new(own.python());
    without_cargo(&mut command, checkout);
    command
        .args(["-m", "pytest", "-q", "-p", "no:cacheprovider"])
        .args(["tests/browser/test_lab.py", "tests/browser/test_pages.py"])
        .current_dir(checkout.root())
        .stdin(Stdio::null())
        .env("COURSE_CLI", std::env::current_exe()?)
        .env("COURSE_HOME", home.join(""))
        .env(device::VARIABLE, Device::Cpu.name())
        // The kernel is the course's, also for a Jupyter of the tests' own.
        .env("JUPYTER_PATH", environment.join("share/jupyter"))
        .env("PYTHONDONTWRITEBYTECODE", "1");
    if options.classic {
        command.arg("tests/browser/test_classic.py");
    }
    if options.hub {
        command.arg("tests/browser/test_hub.py");
    }
    Ok(command)
}

/// The browser: the one that `COURSE_BROWSER` names, or a Chromium of this machine.
pub fn find() -> Option<PathBuf> {
    if let Some(named) = std::env::var_os(BROWSER).filter(|name| !name.is_empty()) {
        return Some(named.into());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    let mut places = NAMES
        .iter()
        .flat_map(|name| folders.iter().map(move |folder| folder.join(name)));
    places.find(|place| place.is_file())
}
