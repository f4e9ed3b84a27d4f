//! `cargo course bundle`: everything that a set-up downloads, in a folder, for laptops without a
//! network; and `cargo course lab --offline FOLDER`, which sets up from it.
//!
//! ```text
//! FOLDER/
//!   bundle.json   for which machine it is
//!   course/       the checkout; its .cargo/config.toml takes crates from vendor/
//!   vendor/       the sources of every crate, evcxr_jupyter and its own among them
//!   wheels/       the Python packages
//!   data/         the data and models
//!   evcxr/        evcxr_jupyter, built: of use where Rust lies in the same place
//! ```

use crate::data;
use crate::device::Device;
use crate::home::{Checkout, Home, remove_folder, write_atomic};
use crate::progress::Steps;
use crate::setup::template::without_cargo;
use crate::setup::{self, evcxr, python, tool};
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde::{Deserialize, Serialize};
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where the bundle goes.
#[derive(Args)]
pub struct Options {
    /// A new folder, or an older bundle to renew [default: target/bundle]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

const RECORD: &str = "bundle.json";

/// Lies in a bundle that is not whole yet.
const BEGUN: &str = "bundle.unfinished";

/// For which machine a bundle is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Bundle {
    /// `rustc -vV`.
    rustc: String,
    /// Where that compiler lies; evcxr's binary holds it.
    sysroot: PathBuf,
    /// The Python for which the wheels are, such as `3.12`.
    python: String,
}

impl Bundle {
    fn of_this_machine(dir: &Path) -> Result<Self> {
        let rustc = evcxr::Rustc::of(dir)?;
        Ok(Self {
            rustc: rustc.version,
            sysroot: rustc.sysroot,
            python: python::interpreter()?.version,
        })
    }

    fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(RECORD);
        let text = fs::read_to_string(&path).with_context(|| {
            format!(
                "{} cannot be read: give a folder that `cargo course bundle` has made",
                path.display()
            )
        })?;
        serde_json::from_str(&text).with_context(|| format!("{} is damaged", path.display()))
    }

    /// Why this machine cannot use a bundle, if it cannot.
    fn misfit(&self, here: &Self) -> Option<String> {
        let line = |rustc: &str, name: &str| {
            let mut lines = rustc.lines();
            let found = lines.find_map(|line| line.strip_prefix(name).map(str::to_owned));
            found.unwrap_or_default()
        };
        let (theirs, ours) = (line(&self.rustc, "host: "), line(&here.rustc, "host: "));
        if theirs != ours {
            return Some(format!(
                "the bundle is for {theirs}, and this machine is {ours}: make one on a machine of \
                 this kind"
            ));
        }
        if self.rustc != here.rustc {
            return Some(format!(
                "the bundle is for rustc {}, and this one is {}: install that toolchain by rustup",
                line(&self.rustc, "release: "),
                line(&here.rustc, "release: ")
            ));
        }
        (self.python != here.python).then(|| {
            format!(
                "the bundle's packages are for Python {}, and this one is {}: name another with \
                 COURSE_PYTHON=/path/to/python{}",
                self.python, here.python, self.python
            )
        })
    }
}

/// Makes a bundle.
pub fn command(home: &Home, checkout: &Checkout, options: &Options) -> Result<bool> {
    let (environment, installed) = setup::ensure(home, checkout, Device::Cpu)?;
    let folder = match &options.out {
        Some(folder) => std::path::absolute(folder)?,
        None => checkout.join("target/bundle"),
    };
    let begun = folder.join(BEGUN);
    if folder.exists() && Bundle::read(&folder).is_err() && !begun.exists() {
        ensure!(
            fs::read_dir(&folder)?.next().is_none(),
            "{} is no bundle and not empty: give a new folder as --out",
            folder.display()
        );
    }
    write_atomic(&begun, "")?;
    remove_file(&folder.join(RECORD))?;
    let mut steps = Steps::new(5);
    let step = steps.start("The checkout", None);
    let course = folder.join("course");
    if course.exists() {
        // Somebody may have worked in it.
        let mut names = (1..).map(|n| folder.join(format!("course.old-{n}")));
        let old = names.find(|name| !name.exists()).unwrap_or_default();
        fs::rename(&course, &old)
            .with_context(|| format!("cannot move {} away", course.display()))?;
        eprintln!("      the one that was there is kept as {}", old.display());
    }
    copy_checkout(checkout, &folder)?;
    step.done();

    let step = steps.start("Sources of every crate", Some("a minute"));
    vendor(home, checkout, &installed, &folder)?;
    step.done();

    let step = steps.start("Python packages", None);
    let wheels = folder.join("wheels");
    remove_folder(&wheels)?;
    let mut pip = Command::new(environment.python());
    pip.args(["-m", "pip", "download", "--quiet", "--no-input"])
        .args(["--disable-pip-version-check", "--require-hashes"])
        .arg("--requirement")
        .arg(environment.join("requirements.txt"))
        .arg("--dest")
        .arg(&wheels);
    tool::run("downloading the Python packages", &mut pip, |_| ())?;
    step.done();

    let step = steps.start("Data and models", None);
    replace(&home.join("data"), &folder.join("data"))?;
    step.done();

    let step = steps.start("evcxr_jupyter", None);
    remove_folder(&folder.join("evcxr"))?;
    fs::create_dir_all(folder.join("evcxr"))?;
    fs::copy(&installed.evcxr, folder.join("evcxr/evcxr_jupyter"))?;
    step.done();

    let record = Bundle::of_this_machine(checkout.root())?;
    write_atomic(
        &folder.join(RECORD),
        serde_json::to_string_pretty(&record)? + "\n",
    )?;
    remove_file(&begun)?;
    println!(
        "The bundle is in {}. A laptop needs Python {}, a C compiler and the toolchain, which it gets while \
         it has a network:\n  rustup toolchain install {} -c rust-src -c rustfmt -c clippy\nCopy the folder \
         there; then cd {}/course and cargo course lab --offline ..",
        folder.display(),
        record.python,
        record.rustc.split(' ').nth(1).unwrap_or_default(),
        folder.file_name().unwrap_or_default().to_string_lossy()
    );
    Ok(true)
}

/// The files of the checkout that git knows, and an alias that needs no network.
fn copy_checkout(checkout: &Checkout, folder: &Path) -> Result<()> {
    let to = folder.join("course");
    let output = Command::new("git")
        .args([
            "ls-files",
            "-z",
            "--cached",
            "--others",
            "--exclude-standard",
        ])
        .current_dir(checkout.root())
        .output()
        .context("a bundle needs git, which says what belongs to the checkout")?;
    if !output.status.success() {
        bail!(
            "git cannot list the checkout's files: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    let names = String::from_utf8(output.stdout).context("a file's name is no UTF-8")?;
    for name in names.split('\0').filter(|name| !name.is_empty()) {
        let from = checkout.join(name);
        // Deleted and not yet committed so, or of a bundle that is made inside the checkout.
        if !from.is_file() || from.starts_with(folder) {
            continue;
        }
        let at = to.join(name);
        fs::create_dir_all(at.parent().unwrap_or(&to))?;
        fs::copy(&from, &at).with_context(|| format!("cannot copy {}", from.display()))?;
    }
    let config = to.join(".cargo/config.toml");
    let text = fs::read_to_string(&config)?;
    write_atomic(&config, text + "\n" + &sources(Path::new("../vendor")))
}

/// What makes cargo take crates from a folder.
fn sources(vendor: &Path) -> String {
    format!(
        "[source.crates-io]\nreplace-with = \"bundle\"\n\n[source.bundle]\ndirectory = {}\n\n\
         [net]\noffline = true\n",
        toml::Value::from(vendor.display().to_string())
    )
}

/// The sources of the crates of the workspace, of evcxr_jupyter and what it was released with, and of
/// what the standard library uses.
fn vendor(
    home: &Home,
    checkout: &Checkout,
    installed: &setup::Installed,
    folder: &Path,
) -> Result<()> {
    let _lock = home.lock("bundle", || {
        eprintln!("Another `cargo course bundle` is at work: waiting for it.");
    })?;
    let work = home.join("bundle-unfinished");
    remove_folder(&work)?;
    // A crate that depends on it, so that cargo gets its sources.
    let manifest = format!(
        "[package]\nname = \"probe\"\nversion = \"0.0.0\"\nedition = \"2024\"\n\n\
         [dependencies]\nevcxr_jupyter = \"={}\"\n\n[workspace]\n",
        evcxr::VERSION
    );
    let probe = work.join("probe");
    write_atomic(&probe.join("Cargo.toml"), manifest)?;
    write_atomic(&probe.join("src/lib.rs"), "")?;
    let cargo = |what: &str, dir: &Path, arguments: &[&Path]| {
        let mut command = Command::new("cargo");
        without_cargo(&mut command, checkout);
        command
            .args(["vendor", "--quiet", "--versioned-dirs"])
            .args(arguments)
            // Its manifest uses what only a nightly cargo reads, or one that is told so.
            .env("RUSTC_BOOTSTRAP", "1")
            .current_dir(dir);
        tool::run(what, &mut command, |_| ())
    };
    cargo("getting evcxr_jupyter", &probe, &[&work.join("vendor")])?;
    let name = format!("evcxr_jupyter-{}", evcxr::VERSION);
    let own = work.join(&name);
    fs::rename(work.join("vendor").join(&name), &own)?;
    let vendor = folder.join("vendor");
    remove_folder(&vendor)?;
    let sync = own.join("Cargo.toml");
    // The kernel's analyser asks cargo for what the standard library is made of, to know types.
    let library = installed.rustc.library_sources().join("Cargo.toml");
    let mut arguments = vec![Path::new("--locked"), Path::new("--sync"), &sync];
    if library.is_file() {
        arguments.extend([Path::new("--sync"), &library]);
    }
    arguments.push(&vendor);
    cargo(
        "getting the sources of every crate",
        checkout.root(),
        &arguments,
    )?;
    replace(&own, &vendor.join(&name))?;
    remove_folder(&work)
}

/// A folder as pip reads it in a variable: one with a space would be two.
fn address(dir: &Path) -> String {
    let bytes = dir.as_os_str().as_encoded_bytes().iter();
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/-_.~".contains(&byte);
    let path = bytes.map(|&byte| match plain(byte) {
        true => char::from(byte).to_string(),
        false => format!("%{byte:02X}"),
    });
    format!("file://{}", path.collect::<String>())
}

/// Sets up from a bundle: puts its parts where a set-up finds them, and starts the same command
/// again in an environment that asks no network.
pub fn offline(home: &Home, checkout: &Checkout, folder: &Path) -> Result<()> {
    let folder = std::path::absolute(folder)?
        .canonicalize()
        .with_context(|| format!("there is no bundle {}", folder.display()))?;
    let bundle = Bundle::read(&folder)?;
    let here = Bundle::of_this_machine(checkout.root())?;
    if let Some(misfit) = bundle.misfit(&here) {
        bail!("{misfit}");
    }
    if !takes_bundle(checkout) {
        bail!(
            "this checkout takes its crates from the network: change into {} and say the same there",
            folder.join("course").display()
        );
    }
    let vendor = folder.join("vendor");
    write_atomic(&home.offline_cargo().join("config.toml"), sources(&vendor))?;
    for name in data::incomplete(home, checkout)? {
        let from = folder.join("data").join(&name);
        ensure!(
            from.is_dir(),
            "the bundle holds no {}: make it anew with `cargo course bundle`",
            from.display()
        );
        replace(&from, &home.join("data").join(&name))?;
    }
    if bundle.sysroot == here.sysroot {
        let rustc = evcxr::Rustc::of(checkout.root())?;
        let binary = evcxr::binary(home, &rustc);
        if !binary.exists() {
            let part = binary.with_extension("part");
            fs::create_dir_all(binary.parent().context("no folder")?)?;
            fs::copy(folder.join("evcxr/evcxr_jupyter"), &part)?;
            fs::rename(&part, &binary)?;
        }
    }
    let mut again = Command::new(std::env::current_exe()?);
    let mut arguments = std::env::args_os().skip(1).peekable();
    while let Some(argument) = arguments.next() {
        let text = argument.to_string_lossy();
        if text == "--offline" {
            arguments.next();
        } else if !text.starts_with("--offline=") {
            again.arg(argument);
        }
    }
    let error = again
        .env("CARGO_HOME", home.offline_cargo())
        .env("CARGO_NET_OFFLINE", "true")
        .env("PIP_NO_INDEX", "1")
        .env("PIP_FIND_LINKS", address(&folder.join("wheels")))
        .exec();
    Err(error).context("cannot start again without a network")
}

/// Whether a checkout is that of a bundle, whose cargo asks no network.
fn takes_bundle(checkout: &Checkout) -> bool {
    let config = fs::read_to_string(checkout.join(".cargo/config.toml"));
    config.is_ok_and(|text| text.contains("[source.bundle]"))
}

/// The `CARGO_HOME` of a bundle's checkout that was set up without a network, as long as the bundle
/// is there.
pub fn offline_cargo(home: &Home, checkout: &Checkout) -> Option<PathBuf> {
    if !takes_bundle(checkout) {
        return None;
    }
    let dir = home.offline_cargo();
    let text = fs::read_to_string(dir.join("config.toml")).ok()?;
    let config: toml::Table = toml::from_str(&text).ok()?;
    let vendor = config.get("source")?.get("bundle")?.get("directory")?;
    Path::new(vendor.as_str()?).is_dir().then_some(dir)
}

fn remove_file(file: &Path) -> Result<()> {
    match fs::remove_file(file) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", file.display()))
        }
        _ => Ok(()),
    }
}

/// Copies a folder in place of another; the other is whole or the new one is.
fn replace(from: &Path, to: &Path) -> Result<()> {
    let part = to.with_extension("part");
    remove_folder(&part)?;
    fs::create_dir_all(to.parent().unwrap_or(to))?;
    tool::copy(from, &part)?;
    remove_folder(to)?;
    fs::rename(&part, to).with_context(|| format!("cannot create {}", to.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle(host: &str, release: &str, python: &str) -> Bundle {
        Bundle {
            rustc: format!("rustc {release} (x 2026)\nhost: {host}\nrelease: {release}"),
            sysroot: "/rust".into(),
            python: python.into(),
        }
    }

    #[test]
    fn another_machine_is_told_what_it_lacks() {
        let ours = bundle("x86_64-linux", "1.95.0", "3.12");
        assert_eq!(ours.misfit(&ours), None);
        for (other, said) in [
            (
                bundle("aarch64-darwin", "1.95.0", "3.12"),
                "for aarch64-darwin",
            ),
            (bundle("x86_64-linux", "1.96.0", "3.12"), "for rustc 1.96.0"),
            (
                bundle("x86_64-linux", "1.95.0", "3.11"),
                "COURSE_PYTHON=/path/to/python3.11",
            ),
        ] {
            let misfit = other.misfit(&ours).unwrap();
            assert!(misfit.contains(said), "{misfit}");
        }
    }

    #[test]
    fn a_folder_that_is_no_bundle_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let error = format!("{:#}", Bundle::read(dir.path()).unwrap_err());
        assert!(error.contains("cargo course bundle"), "{error}");
        fs::write(dir.path().join(RECORD), "{").unwrap();
        let error = format!("{:#}", Bundle::read(dir.path()).unwrap_err());
        assert!(error.contains("is damaged"), "{error}");
    }

    #[test]
    fn cargo_reads_what_a_bundle_writes() {
        let text = sources(Path::new("/a \"b\"/vendor"));
        let value: toml::Table = toml::from_str(&text).unwrap();
        let directory = &value["source"]["bundle"]["directory"];
        assert_eq!(directory.as_str(), Some("/a \"b\"/vendor"));
    }

    #[test]
    fn a_bundle_serves_its_own_checkout_as_long_as_it_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let (home, vendor) = (Home::at(dir.path()), dir.path().join("vendor"));
        let checkout = |name: &str| {
            let root = dir.path().join(name);
            write_atomic(&root.join("crates/course/Cargo.toml"), "").unwrap();
            Checkout::holding(&root).unwrap()
        };
        let (own, other) = (checkout("own"), checkout("other"));
        let taken = sources(Path::new("../vendor"));
        write_atomic(&own.join(".cargo/config.toml"), taken).unwrap();
        let config = home.offline_cargo().join("config.toml");
        assert_eq!(offline_cargo(&home, &own), None);
        write_atomic(&config, sources(&vendor)).unwrap();
        assert_eq!(offline_cargo(&home, &own), None);
        fs::create_dir(&vendor).unwrap();
        assert_eq!(offline_cargo(&home, &own), Some(home.offline_cargo()));
        assert_eq!(offline_cargo(&home, &other), None);
    }

    #[test]
    fn pip_is_told_of_a_folder_in_one_word() {
        let address = address(Path::new("/media/USB STICK/100%/wheels"));
        assert_eq!(address, "file:///media/USB%20STICK/100%25/wheels");
    }
}
