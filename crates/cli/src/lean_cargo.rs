//! The cargo that the kernel's analyser sees.
//!
//! evcxr lets rust-analyzer infer the types of variables, and rust-analyzer reads every crate that
//! `cargo metadata` names: tokenizers, pyo3, gemm, nalgebra … none of which a notebook's types
//! mention. It looks for cargo in `$CARGO_HOME/bin` first, so there the kernel finds this program
//! under cargo's name. It is cargo in everything but one: the metadata leave out what the course's
//! own crates use only inside.

use crate::bundle;
use crate::home::{Checkout, Home};
use crate::setup::evcxr::Rustc;
use anyhow::{Context, Result};
use serde_json::Value;
use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

/// Names the true cargo.
const TRUE_CARGO: &str = "COURSE_CARGO";

/// The crates of the course and what stands in their interfaces: each is read without everything
/// else that it uses.
const LEAN: &[&str] = &[
    "course",
    "lora",
    "candle-core",
    "candle-nn",
    "gymnasium-rs",
    "half",
    "num-traits",
    "plotters",
    "plotters-backend",
    "rand",
    "rand_chacha",
    "rand_core",
    "rand_distr",
];

/// What the analyser's cargo shares with the user's own `CARGO_HOME`.
const SHARED: &[&str] = &[
    "registry",
    "git",
    "config.toml",
    "config",
    "credentials.toml",
    "credentials",
    ".package-cache",
    ".package-cache-mutate",
    ".global-cache",
];

/// Whether this program was started under cargo's name.
pub fn is_meant() -> bool {
    let name = std::env::args_os().next().map(PathBuf::from);
    name.is_some_and(|name| name.file_stem().is_some_and(|stem| stem == "cargo"))
}

/// Makes the `CARGO_HOME` of kernels: the user's own, seen through links, with this program as
/// its cargo. (It lies in one place for the template and for all kernels: cargo compiles a crate
/// anew when the path of its sources is another.)
pub fn cargo_home(home: &Home, checkout: &Checkout) -> Result<PathBuf> {
    let own = home.join("cargo-home");
    if home.is_shared() {
        return Ok(own);
    }
    let asked = std::env::var_os("CARGO_HOME").filter(|v| !v.is_empty());
    let asked = asked.map(PathBuf::from).filter(|users| *users != own);
    // What was set up without a network stays so: rustup names a CARGO_HOME to all that it starts.
    let users = bundle::offline_cargo(home, checkout)
        .or(asked)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")))
        .context("neither HOME nor CARGO_HOME is set")?;
    fs::create_dir_all(own.join("bin"))?;
    for dir in ["registry", "git"] {
        fs::create_dir_all(users.join(dir))?;
    }
    for name in SHARED {
        link(&users.join(name), &own.join(name))?;
    }
    link(&home.join("bin/course-cli"), &own.join("bin/cargo"))?;
    Ok(own)
}

/// Makes `at` a link to `to`, whatever it was.
fn link(to: &Path, at: &Path) -> Result<()> {
    if fs::read_link(at).is_ok_and(|old| old == to) {
        return Ok(());
    }
    let part = at.with_extension(format!("link{}", std::process::id()));
    symlink(to, &part)
        .and_then(|()| fs::rename(&part, at))
        .with_context(|| format!("cannot make the link {}", at.display()))
}

/// Lets the command's analyser use this cargo.
pub fn apply(command: &mut Command, home: &Home, checkout: &Checkout, rustc: &Rustc) -> Result<()> {
    let cargo = rustc.sysroot.join("bin/cargo");
    let cargo = if cargo.is_file() {
        cargo
    } else {
        PathBuf::from("cargo")
    };
    command
        .env("CARGO_HOME", cargo_home(home, checkout)?)
        .env(TRUE_CARGO, cargo);
    Ok(())
}

/// Is cargo.
pub fn run() -> Result<ExitCode> {
    let cargo = std::env::var_os(TRUE_CARGO).context("this cargo is for the course's kernel")?;
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let has = |wanted: &str| arguments.iter().any(|argument| argument == wanted);
    let mut command = Command::new(cargo);
    command.args(&arguments);
    if !has("metadata") || has("--no-deps") {
        return Err(command.exec()).context("cannot start cargo");
    }
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .context("cannot start cargo")?;
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    if let Ok(mut metadata) = serde_json::from_str(&text)
        && prune_what_is_known(&mut metadata)
    {
        text = metadata.to_string() + "\n";
    }
    print!("{text}");
    Ok(ExitCode::from(
        output.status.code().map_or(1, |code| code as u8),
    ))
}

/// Prunes the metadata of a kernel's crate and of the standard library; says whether it did.
fn prune_what_is_known(metadata: &mut Value) -> bool {
    if is_of_a_kernel(metadata) {
        prune(metadata);
    } else if is_of_std(metadata) {
        prune_std(metadata);
    } else {
        return false;
    }
    true
}

/// Whether the metadata are those of the standard library's own workspace.
fn is_of_std(metadata: &Value) -> bool {
    let root = metadata["workspace_root"].as_str().unwrap_or_default();
    root.ends_with("rustlib/src/rust/library")
}

/// Leaves the standard library's own crates and none from a registry (libc, gimli, …).
fn prune_std(metadata: &mut Value) {
    let own: HashSet<String> = packages(metadata)
        .filter(|package| package["source"].is_null())
        .filter_map(|package| package["id"].as_str().map(str::to_owned))
        .collect();
    let kept = |id: &Value| id.as_str().is_some_and(|id| own.contains(id));
    if let Some(packages) = metadata["packages"].as_array_mut() {
        packages.retain(|package| kept(&package["id"]));
    }
    if let Some(nodes) = metadata["resolve"]["nodes"].as_array_mut() {
        nodes.retain(|node| kept(&node["id"]));
        for node in nodes {
            if let Some(deps) = node["deps"].as_array_mut() {
                deps.retain(|dep| kept(&dep["pkg"]));
            }
            if let Some(ids) = node["dependencies"].as_array_mut() {
                ids.retain(kept);
            }
        }
    }
}

/// Whether the metadata are those of evcxr's crate `ctx`.
fn is_of_a_kernel(metadata: &Value) -> bool {
    let root = metadata["resolve"]["root"].as_str();
    packages(metadata).any(|package| package["id"].as_str() == root && package["name"] == "ctx")
}

fn packages(metadata: &Value) -> impl Iterator<Item = &Value> {
    metadata["packages"].as_array().into_iter().flatten()
}

/// Cuts what our crates use only inside, and then every crate that nothing leads to. A crate that
/// a notebook adds by its own `:dep` keeps all of its own.
fn prune(metadata: &mut Value) {
    let name_of: HashMap<String, String> = packages(metadata)
        .filter_map(|p| Some((p["id"].as_str()?.to_owned(), p["name"].as_str()?.to_owned())))
        .collect();
    let name = |id: &Value| {
        id.as_str()
            .and_then(|id| name_of.get(id))
            .map_or("", String::as_str)
    };

    let mut uses: HashMap<String, Vec<String>> = HashMap::new();
    let nodes = metadata["resolve"]["nodes"].as_array_mut();
    for node in nodes.into_iter().flatten() {
        let lean = LEAN.contains(&name(&node["id"]));
        let kept = |id: &Value| !lean || LEAN.contains(&name(id));
        if let Some(deps) = node["deps"].as_array_mut() {
            deps.retain(|dep| kept(&dep["pkg"]));
        }
        if let Some(ids) = node["dependencies"].as_array_mut() {
            ids.retain(kept);
        }
        let ids = node["dependencies"].as_array().into_iter().flatten();
        let ids = ids
            .filter_map(|id| id.as_str().map(str::to_owned))
            .collect();
        uses.insert(node["id"].as_str().unwrap_or_default().to_owned(), ids);
    }

    let mut reached = HashSet::new();
    let mut todo = vec![
        metadata["resolve"]["root"]
            .as_str()
            .unwrap_or_default()
            .to_owned(),
    ];
    while let Some(id) = todo.pop() {
        if reached.insert(id.clone()) {
            todo.extend(uses.get(&id).into_iter().flatten().cloned());
        }
    }
    let reached = |item: &Value| item["id"].as_str().is_some_and(|id| reached.contains(id));
    if let Some(packages) = metadata["packages"].as_array_mut() {
        packages.retain(reached);
    }
    if let Some(nodes) = metadata["resolve"]["nodes"].as_array_mut() {
        nodes.retain(reached);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Metadata of crates named `a` that use the crates in `b`.
    fn metadata(uses: &[(&str, &[&str])]) -> Value {
        let packages: Vec<_> = uses
            .iter()
            .map(|(name, _)| json!({"id": format!("{name} 1"), "name": name}))
            .collect();
        let nodes: Vec<_> = uses
            .iter()
            .map(|(name, uses)| {
                let ids: Vec<_> = uses.iter().map(|used| format!("{used} 1")).collect();
                let deps: Vec<_> = ids.iter().map(|id| json!({"pkg": id})).collect();
                json!({"id": format!("{name} 1"), "dependencies": ids, "deps": deps})
            })
            .collect();
        json!({"packages": packages, "resolve": {"root": "ctx 1", "nodes": nodes}})
    }

    fn names(metadata: &Value) -> Vec<&str> {
        packages(metadata)
            .filter_map(|package| package["name"].as_str())
            .collect()
    }

    #[test]
    fn what_our_crates_use_inside_is_not_read() {
        let mut metadata = metadata(&[
            ("ctx", &["course"]),
            ("course", &["candle-core", "nalgebra"]),
            ("candle-core", &["half", "tokenizers"]),
            ("half", &["zerocopy"]),
            ("nalgebra", &["typenum"]),
            ("tokenizers", &[]),
            ("typenum", &[]),
            ("zerocopy", &[]),
        ]);
        assert!(is_of_a_kernel(&metadata));
        prune(&mut metadata);
        assert_eq!(names(&metadata), ["ctx", "course", "candle-core", "half"]);
        let nodes = metadata["resolve"]["nodes"].as_array().unwrap();
        assert_eq!(nodes.len(), 4);
        assert_eq!(nodes[1]["deps"], json!([{"pkg": "candle-core 1"}]));
    }

    #[test]
    fn a_notebooks_own_dependency_keeps_everything() {
        let mut metadata = metadata(&[
            ("ctx", &["course", "statrs"]),
            ("course", &["nalgebra"]),
            ("statrs", &["nalgebra"]),
            ("nalgebra", &["typenum"]),
            ("typenum", &[]),
        ]);
        prune(&mut metadata);
        assert_eq!(
            names(&metadata),
            ["ctx", "course", "statrs", "nalgebra", "typenum"]
        );
    }

    #[test]
    fn the_standard_library_is_read_without_its_registry_crates() {
        let mut std = metadata(&[("std", &["core", "libc"]), ("core", &[]), ("libc", &[])]);
        std["workspace_root"] = json!("/t/lib/rustlib/src/rust/library");
        std["packages"][2]["source"] = json!("registry");
        assert!(prune_what_is_known(&mut std));
        assert_eq!(names(&std), ["std", "core"]);
        let nodes = std["resolve"]["nodes"].as_array().unwrap();
        assert_eq!(nodes[0]["dependencies"], json!(["core 1"]));
        assert_eq!(nodes.len(), 2);
    }

    #[test]
    fn other_metadata_are_left_alone() {
        assert!(!is_of_a_kernel(
            &json!({"packages": [{"id": "x", "name": "std"}],
                                         "resolve": {"root": "x"}})
        ));
        assert!(!is_of_a_kernel(&json!({"packages": [], "resolve": null})));
    }

    #[test]
    fn a_link_is_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("at");
        for to in ["one", "two", "two"] {
            link(&dir.path().join(to), &at).unwrap();
            assert_eq!(fs::read_link(&at).unwrap(), dir.path().join(to));
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
