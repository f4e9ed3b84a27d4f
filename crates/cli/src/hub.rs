//! `cargo course hub`: JupyterHub for a class on one Linux server. The settings are
//! `crates/cli/python/hub/jupyterhub_config.py`; here is made what they need.
//!
//! ```text
//! configurable-http-proxy ── JupyterHub (root) ── a server per learner, with their account
//!                                                    └── launcher ── evcxr_jupyter
//! <tools>/            for all to read: environment, evcxr_jupyter, data, template
//! ~lora-NAME/         of a learner: notebooks, and the folders in which their kernels run
//! ```

use crate::device::Device;
use crate::home::{Checkout, Home, remove_folder, short_hash, write_atomic};
use crate::lean_cargo;
use crate::progress::{Step, Steps};
use crate::setup::evcxr::Rustc;
use crate::setup::python::{self, Recipe};
use crate::setup::template::without_cargo;
use crate::setup::{self, kernelspec, tool};
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use std::fs::{self, File};
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The course's environment with JupyterHub: servers of learners run in it.
const RECIPE: Recipe = Recipe {
    prefix: "hub",
    requirements: include_str!("../python/hub-requirements.txt"),
    what: "Python environment with JupyterHub",
    estimate: "about 1 minute, 280 MB",
};

/// What npm makes the proxy from, pinned by hash.
const PROXY: [(&str, &str); 2] = [
    ("package.json", include_str!("../python/hub/package.json")),
    (
        "package-lock.json",
        include_str!("../python/hub/package-lock.json"),
    ),
];

/// The class's password.
const PASSWORD: &str = "COURSE_HUB_PASSWORD";

/// What `cargo course hub` can be told.
#[derive(Args)]
pub struct Options {
    /// The address to listen at; 127.0.0.1 is for this machine alone
    #[arg(long, default_value = "0.0.0.0")]
    ip: IpAddr,
    /// The port
    #[arg(long, default_value_t = 8000, value_parser = clap::value_parser!(u16).range(1..))]
    port: u16,
    /// The folder of the hub's secrets and logs [default: hub-state among the course's tools]
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// JupyterHub settings of your own, read last
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// Becomes JupyterHub; returns only if that cannot start.
pub fn command(home: &Home, checkout: &Checkout, options: &Options) -> Result<bool> {
    ensure!(
        cfg!(target_os = "linux") && nix::unistd::geteuid().is_root(),
        "a class's server needs Linux and root, since each learner gets an account; \
         notebooks/TEACHING.md has the two lines that start it"
    );
    // What is made from here on, everybody can read; what must not be is closed below.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    let own = options.config.as_ref().map(std::path::absolute);
    let own = own.transpose()?;
    if let Some(own) = &own {
        ensure!(own.is_file(), "there is no file {}", own.display());
    }
    let state = match &options.state {
        Some(folder) => std::path::absolute(folder)?,
        None => home.join("hub-state"),
    };
    close(&state)?;
    let _lock = alone(&state)?;
    let address = SocketAddr::new(options.ip, options.port);
    if let Err(error) = TcpListener::bind(address) {
        bail!("{address} cannot be used ({error}): choose another --port or --ip");
    }
    let rustc = Rustc::of(checkout.root())?;
    let interpreter = python::interpreter()?;
    let crates = cargo_home()?.join("registry");
    fs::create_dir_all(&crates)?;
    // Before anything is compiled: moved elsewhere, all would be compiled anew.
    for path in [
        &home.join(""),
        checkout.root(),
        &rustc.sysroot,
        &crates,
        Path::new(interpreter.executable()),
    ] {
        for_everybody(path)?;
    }
    let (_, installed) = setup::ensure(home, checkout, Device::Cpu)?;
    for_everybody(&installed.evcxr)?;
    lean_cargo::cargo_home(home, checkout)?;
    let (environment, proxy) = {
        let _lock = home.lock("hub", || {
            eprintln!("Another `cargo course` is installing JupyterHub: waiting for it.");
        })?;
        let mut steps = Steps::new(3);
        let environment = python::make(home, &mut steps, &RECIPE, &interpreter, || Ok(()))?;
        python::write_files(&environment)?;
        kernelspec::ensure(home, &environment, &mut steps)?;
        (environment, proxy(home, &mut steps)?)
    };
    let password = password(&state.join("password"))?;
    let place = match options.ip.is_unspecified() {
        true => format!("http://NAME-OF-THIS-MACHINE:{}", options.port),
        false => format!("http://{address}"),
    };
    println!(
        "Learners open {place} and log in with a name (small letters, digits, hyphens) and the password \
         {password} (set {PASSWORD} for another)."
    );
    let mut command = Command::new(environment.bin("jupyterhub"));
    without_cargo(&mut command, checkout);
    command
        .arg("--config")
        .arg(checkout.join("crates/cli/python/hub/jupyterhub_config.py"))
        .current_dir(&state)
        .env("COURSE_HOME", home.join(""))
        .env("COURSE_CHECKOUT", checkout.root())
        .env("COURSE_SYSROOT", &installed.rustc.sysroot)
        .env("COURSE_HUB_PROXY", proxy)
        .env("COURSE_HUB_ADDRESS", format!("http://{address}"))
        .env("COURSE_HUB_PORT", free_port()?.to_string())
        .env("COURSE_HUB_PROXY_PORT", free_port()?.to_string())
        .env(PASSWORD, password);
    if let Some(own) = own {
        command.env("COURSE_HUB_CONFIG", own);
    }
    Err(command.exec()).context("cannot start JupyterHub")
}

/// The hub's lock in its folder.
const LOCK: &str = "lock";

/// Makes the hub's folder, into which nobody else may look. One with other things in it is left alone.
fn close(state: &Path) -> Result<()> {
    fs::create_dir_all(state).with_context(|| format!("cannot create {}", state.display()))?;
    ensure!(
        state.join(LOCK).is_file() || fs::read_dir(state)?.next().is_none(),
        "{} holds other things than a hub's: name a new folder with --state",
        state.display()
    );
    fs::set_permissions(state, fs::Permissions::from_mode(0o700))
        .with_context(|| format!("cannot close {}", state.display()))
}

/// Holds the hub's folder as long as JupyterHub lives, which this program becomes.
fn alone(state: &Path) -> Result<File> {
    let path = state.join(LOCK);
    let file = File::create(&path).with_context(|| format!("cannot open {}", path.display()))?;
    ensure!(
        file.try_lock().is_ok(),
        "a hub is at work in {}: stop it first, or name another folder with --state",
        state.display()
    );
    fcntl(&file, FcntlArg::F_SETFD(FdFlag::empty()))?;
    Ok(file)
}

/// A port of this machine at which the hub and its proxy speak to each other.
fn free_port() -> Result<u16> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).context("no port is free")?;
    Ok(listener.local_addr()?.port())
}

/// Where cargo keeps the sources of crates.
fn cargo_home() -> Result<PathBuf> {
    let named = std::env::var_os("CARGO_HOME").filter(|value| !value.is_empty());
    named
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")))
        .context("neither HOME nor CARGO_HOME is set")
}

/// Fails unless everybody can read a path: each folder on the way must be open.
fn for_everybody(path: &Path) -> Result<()> {
    let path = path
        .canonicalize()
        .with_context(|| format!("{} is missing", path.display()))?;
    for part in path.ancestors() {
        let mode = fs::metadata(part)?.permissions().mode();
        let needed = match part {
            _ if !part.is_dir() => 0o004,
            _ if part == path => 0o005,
            _ => 0o001,
        };
        ensure!(
            mode & needed == needed,
            "learners cannot read {}, since {} is closed to them. Put Rust, the course's tools and its \
             checkout where everybody can read (RUSTUP_HOME and CARGO_HOME below /opt/rust, \
             COURSE_HOME=/opt/lora-course), or open that folder: chmod {} {}",
            path.display(),
            part.display(),
            if part == path { "-R o+rX" } else { "o+x" },
            part.display()
        );
    }
    Ok(())
}

/// The class's password: that of the environment, or one that is made once and kept.
fn password(kept: &Path) -> Result<String> {
    let asked = std::env::var(PASSWORD)
        .ok()
        .filter(|asked| !asked.is_empty());
    if let Some(asked) = asked {
        // JupyterHub takes no shorter one, and compares no other letters.
        ensure!(
            asked.len() >= 8 && asked.is_ascii(),
            "{PASSWORD} is no password for the class: choose one of at least 8 characters, without \
             accents or other letters beyond ASCII"
        );
        return Ok(asked);
    }
    match fs::read_to_string(kept) {
        Ok(password) => return Ok(password.trim().to_owned()),
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot read {}", kept.display()));
        }
        Err(_) => {}
    }
    let mut bytes = [0; 16];
    fs::File::open("/dev/urandom")
        .and_then(|mut file| std::io::Read::read_exact(&mut file, &mut bytes))
        .context("cannot read /dev/urandom")?;
    let password = short_hash([bytes.as_slice()]);
    write_atomic(kept, &password)?;
    Ok(password)
}

/// JupyterHub's proxy, from npm; returns its program.
fn proxy(home: &Home, steps: &mut Steps) -> Result<PathBuf> {
    let key = short_hash(PROXY.map(|(_, content)| content.as_bytes()));
    let dir = home.join(format!("hub-proxy-{key}"));
    let program = dir.join("node_modules/.bin/configurable-http-proxy");
    if dir.join("complete").exists() && program.exists() {
        steps.skip();
        return Ok(program);
    }
    for name in ["node", "npm"] {
        let output = Command::new(name).arg("--version").output();
        let found = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
        let found = found.unwrap_or_default();
        ensure!(
            name == "npm" && !found.is_empty() || major(&found) >= Some(18),
            "JupyterHub's proxy needs Node.js 18 or newer with npm, and {name} {} (Debian 12 and newer, \
             Ubuntu 24.04 and newer: sudo apt install nodejs npm; elsewhere from nodejs.org)",
            match found.trim() {
                "" => "was not found".to_owned(),
                found => format!("is {found}"),
            }
        );
    }
    let step = steps.start("configurable-http-proxy, by npm", None);
    remove_folder(&dir)?;
    for (name, content) in PROXY {
        write_atomic(&dir.join(name), content)?;
    }
    let mut npm = Command::new("npm");
    npm.args(["ci", "--omit=dev", "--ignore-scripts", "--no-audit"])
        .args(["--no-fund", "--loglevel=error"])
        .current_dir(&dir);
    tool::run("installing configurable-http-proxy", &mut npm, |_| ())?;
    write_atomic(&dir.join("complete"), "")?;
    Step::done(step);
    Ok(program)
}

/// The first number of a version such as `v20.1.0`.
fn major(version: &str) -> Option<u32> {
    version
        .trim()
        .trim_start_matches('v')
        .split('.')
        .next()?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_major_version_of_node_is_read() {
        assert_eq!(major("v20.20.2\n"), Some(20));
        assert_eq!(major("v12.22.9"), Some(12));
        assert_eq!(major(""), None);
    }

    #[test]
    fn one_hub_works_in_a_folder() {
        let dir = tempfile::tempdir().unwrap();
        close(dir.path()).unwrap();
        let held = alone(dir.path()).unwrap();
        let error = alone(dir.path()).unwrap_err().to_string();
        assert!(error.contains("--state"), "{error}");
        drop(held);
        write_atomic(&dir.path().join("password"), "x").unwrap();
        close(dir.path()).unwrap();
        alone(dir.path()).unwrap();
        fs::remove_file(dir.path().join(LOCK)).unwrap();
        let error = close(dir.path()).unwrap_err().to_string();
        assert!(error.contains("other things"), "{error}");
    }

    #[test]
    fn every_requirement_is_pinned_by_hash() {
        assert!(RECIPE.requirements.contains("\njupyterhub==5."));
        python::tests::assert_pinned(RECIPE.requirements);
        let lock: serde_json::Value = serde_json::from_str(PROXY[1].1).unwrap();
        let packages = lock["packages"].as_object().unwrap();
        assert!(packages.contains_key("node_modules/configurable-http-proxy"));
        for (name, package) in packages.iter().filter(|(name, _)| !name.is_empty()) {
            assert!(package["integrity"].is_string(), "{name}");
        }
    }

    #[test]
    fn learners_run_the_jupyterlab_that_everybody_runs() {
        // The environment of the course is a part of that of the hub.
        let own = include_str!("../python/requirements.txt");
        let pins = |text: &'static str| {
            let lines = text.lines().filter(|line| line.contains("=="));
            lines.map(|line| line.trim_end_matches('\\').trim())
        };
        let hub: Vec<_> = pins(RECIPE.requirements).collect();
        for pin in pins(own).filter(|pin| pin.starts_with("jupyterlab==")) {
            assert!(hub.contains(&pin), "{pin}");
        }
    }

    #[test]
    fn a_closed_folder_on_the_way_is_named() {
        // Not in TMPDIR, which is often closed to others.
        let dir = tempfile::tempdir_in("/tmp").unwrap();
        let dir = dir.path().canonicalize().unwrap();
        let (closed, inside) = (dir.join("closed"), dir.join("closed/inside"));
        fs::create_dir_all(&inside).unwrap();
        let open = |path: &Path, mode| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        };
        for path in [&dir, &closed, &inside] {
            open(path, 0o755);
        }
        for_everybody(&inside).unwrap();
        open(&closed, 0o710);
        let error = for_everybody(&inside).unwrap_err().to_string();
        let advice = format!("chmod o+x {}", closed.display());
        assert!(error.contains(&advice), "{error}");
        // To pass through, a folder need not be listed.
        open(&closed, 0o711);
        for_everybody(&inside).unwrap();
        open(&inside, 0o751);
        assert!(for_everybody(&inside).is_err());
        open(&closed, 0o755);
    }

    #[test]
    fn the_password_is_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let kept = dir.path().join("password");
        let first = password(&kept).unwrap();
        assert_eq!(first.len(), 12);
        assert_eq!(password(&kept).unwrap(), first);
    }
}
