//! `cargo course data`: what the notebooks read, by `data/manifest.toml`.

use crate::home::{Checkout, sha256};
use anyhow::{Context, Result};
use clap::Subcommand;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fs;

/// What to do with the data.
#[derive(Subcommand)]
pub enum Action {
    /// List the data sets: size, source, licence
    List,
    /// Compare every file with its SHA-256
    Verify,
}

/// One entry of the manifest: a file in `data/`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    /// The file's SHA-256.
    sha256: String,
    /// Where it comes from: package, version, file.
    source: String,
    /// Its licence.
    licence: String,
    /// What it holds.
    about: String,
}

/// `cargo course data`.
pub fn command(checkout: &Checkout, action: &Action) -> Result<bool> {
    let manifest = manifest(checkout)?;
    if let Action::List = action {
        for (name, entry) in &manifest {
            let bytes = fs::metadata(checkout.join("data").join(name)).map_or(0, |m| m.len());
            println!(
                "{name}  {bytes} bytes, {}\n    {}\n    {}",
                entry.licence, entry.about, entry.source
            );
        }
        return Ok(true);
    }
    let problems = problems(checkout, &manifest);
    for problem in &problems {
        eprintln!("{problem}");
    }
    println!(
        "data files: {} passed, {} failed",
        manifest.len() - problems.len(),
        problems.len()
    );
    Ok(problems.is_empty())
}

/// Whether every file of the manifest is there and unchanged.
pub fn verify(checkout: &Checkout) -> Result<bool> {
    command(checkout, &Action::Verify)
}

fn manifest(checkout: &Checkout) -> Result<BTreeMap<String, Entry>> {
    let path = checkout.join("data/manifest.toml");
    let text =
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    toml::from_str(&text).with_context(|| format!("{} is damaged", path.display()))
}

fn problems(checkout: &Checkout, manifest: &BTreeMap<String, Entry>) -> Vec<String> {
    let check = |(name, entry): (&String, &Entry)| match fs::read(checkout.join("data").join(name))
    {
        Err(error) => Some(format!(
            "data/{name}: {error}. Get it back with git restore data."
        )),
        Ok(bytes) if sha256(&bytes) != entry.sha256 => Some(format!(
            "data/{name} is not the file of the manifest (its SHA-256 is {}). Get it back with \
             git restore data.",
            sha256(&bytes)
        )),
        Ok(_) => None,
    };
    manifest.iter().filter_map(check).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::home::write_atomic;
    use std::path::Path;

    #[test]
    fn a_changed_or_missing_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        write_atomic(&dir.path().join("crates/course/Cargo.toml"), "").unwrap();
        let checkout = Checkout::holding(dir.path()).unwrap();
        let text = format!(
            "[\"a.bin\"]\nsha256 = \"{}\"\nsource = \"s\"\nlicence = \"l\"\nabout = \"x\"\n",
            sha256(b"good")
        );
        write_atomic(&checkout.join("data/manifest.toml"), text).unwrap();
        let manifest = manifest(&checkout).unwrap();
        assert!(problems(&checkout, &manifest)[0].starts_with("data/a.bin: "));
        write_atomic(&checkout.join("data/a.bin"), "bad").unwrap();
        assert!(problems(&checkout, &manifest)[0].contains("is not the file"));
        write_atomic(&checkout.join("data/a.bin"), "good").unwrap();
        assert!(problems(&checkout, &manifest).is_empty());
    }

    #[test]
    fn the_committed_data_is_as_the_manifest_says() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let checkout = Checkout::holding(root).unwrap();
        assert_eq!(
            problems(&checkout, &manifest(&checkout).unwrap()),
            Vec::<String>::new()
        );
    }
}
