//! Where the course keeps its tools: a folder per user, outside every checkout.

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// The per-user folder of tools (`COURSE_HOME` overrides it).
#[derive(Debug, Clone)]
pub struct Home(PathBuf);

impl Home {
    /// Finds the folder and creates it.
    pub fn find() -> Result<Self> {
        let path = match std::env::var_os("COURSE_HOME") {
            Some(dir) if !dir.is_empty() => std::path::absolute(PathBuf::from(dir))?,
            _ => default_home()?,
        };
        if path.to_string_lossy().contains(char::is_whitespace) {
            bail!(
                "the folder for the course's tools is {}, and the Rust kernel cannot work in a \
                 path that holds a space. Set COURSE_HOME to a folder without one, for example \
                 COURSE_HOME=/tmp/lora-course.",
                path.display()
            );
        }
        fs::create_dir_all(&path).with_context(|| {
            format!(
                "cannot create {}: set COURSE_HOME to a folder you may write to",
                path.display()
            )
        })?;
        // Cargo and evcxr see canonical paths; so do we.
        Ok(Self(path.canonicalize()?))
    }

    /// A folder of a test's own.
    #[cfg(test)]
    pub fn at(dir: &Path) -> Self {
        Self(dir.to_owned())
    }

    /// A path inside.
    pub fn join(&self, part: impl AsRef<Path>) -> PathBuf {
        self.0.join(part)
    }

    /// The folder of templates, from which kernels start.
    pub fn templates(&self) -> PathBuf {
        self.join("kernels")
    }

    /// The folder in which kernels run: beside the templates, or what `COURSE_KERNELS` names, which
    /// is a folder of each learner's own where many share the tools.
    pub fn kernels(&self) -> PathBuf {
        own_kernels().unwrap_or_else(|| self.templates())
    }

    /// Whether others share the tools, so that a kernel may not write there.
    pub fn is_shared(&self) -> bool {
        own_kernels().is_some()
    }

    /// The `CARGO_HOME` of a set-up without a network, made by `cargo course lab --offline`.
    pub fn offline_cargo(&self) -> PathBuf {
        self.join("offline-cargo")
    }

    /// Holds one of the folder's locks, as [`lock`].
    pub fn lock(&self, name: &str, waiting: impl FnOnce()) -> Result<File> {
        lock(&self.join("locks").join(name), waiting)
    }
}

/// Holds an exclusive lock until the returned file is dropped or the process ends, however that
/// may be. `waiting` is called once if another process has it.
pub fn lock(path: &Path, waiting: impl FnOnce()) -> Result<File> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    }
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    if file.try_lock().is_err() {
        waiting();
        file.lock()
            .with_context(|| format!("cannot lock {}", path.display()))?;
    }
    Ok(file)
}

fn own_kernels() -> Option<PathBuf> {
    let named = std::env::var_os("COURSE_KERNELS").filter(|value| !value.is_empty())?;
    std::path::absolute(PathBuf::from(named)).ok()
}

fn default_home() -> Result<PathBuf> {
    let var = |name| {
        std::env::var_os(name)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
    };
    if cfg!(target_os = "macos") {
        var("HOME").map(|home| home.join("Library/Caches/lora-course"))
    } else {
        var("XDG_CACHE_HOME")
            .or_else(|| var("HOME").map(|home| home.join(".cache")))
            .map(|cache| cache.join("lora-course"))
    }
    .context("neither HOME nor COURSE_HOME is set: set COURSE_HOME to a folder for the tools")
}

/// Removes a folder with all that it holds, if it is there.
pub fn remove_folder(dir: &Path) -> Result<()> {
    if dir.exists() {
        fs::remove_dir_all(dir).with_context(|| format!("cannot remove {}", dir.display()))?;
    }
    Ok(())
}

/// A checkout of the course.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkout(PathBuf);

impl Checkout {
    /// The checkout that holds `dir`.
    pub fn holding(dir: &Path) -> Option<Self> {
        let dir = dir.canonicalize().ok()?;
        dir.ancestors()
            .find(|d| d.join("crates/course/Cargo.toml").is_file())
            .map(|d| Self(d.to_owned()))
    }

    /// The checkout that the command runs in.
    pub fn current() -> Result<Self> {
        let dir = std::env::current_dir()?;
        Self::holding(&dir).with_context(|| {
            format!(
                "{} is not inside a checkout of the course: change into it first",
                dir.display()
            )
        })
    }

    /// A path inside.
    pub fn join(&self, part: impl AsRef<Path>) -> PathBuf {
        self.0.join(part)
    }

    /// The root folder.
    pub fn root(&self) -> &Path {
        &self.0
    }
}

/// The first 12 hexadecimal digits of the SHA-256 of some parts, each ended by a zero byte.
pub fn short_hash<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update(part);
        hash.update([0]);
    }
    hex(&hash.finalize())[..12].to_owned()
}

/// The SHA-256 of some bytes, in hexadecimal.
pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Writes a file so that a reader sees the old content or the new, never half of it. Does
/// nothing when the content is the same.
pub fn write_atomic(path: &Path, content: impl AsRef<[u8]>) -> Result<()> {
    let content = content.as_ref();
    if fs::read(path).is_ok_and(|old| old == content) {
        return Ok(());
    }
    let dir = path.parent().context("a file path without a folder")?;
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let part = path.with_extension(format!("part{}", std::process::id()));
    fs::write(&part, content)
        .and_then(|()| fs::rename(&part, path))
        .inspect_err(|_| drop(fs::remove_file(&part)))
        .with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkout_is_found_from_a_folder_inside_it() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let found = Checkout::holding(&root.join("crates/cli/src"));
        assert_eq!(found, Some(Checkout(root.canonicalize().unwrap())));
        assert_eq!(Checkout::holding(Path::new("/")), None);
    }

    #[test]
    fn writing_leaves_no_part_behind() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b.txt");
        write_atomic(&path, "one").unwrap();
        write_atomic(&path, "two").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "two");
        assert_eq!(fs::read_dir(dir.path().join("a")).unwrap().count(), 1);
    }

    #[test]
    fn a_lock_is_waited_for_and_ends_with_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/lock");
        let held = lock(&path, || panic!("nobody has it")).unwrap();
        let (said, waits) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            let second = scope.spawn(|| lock(&path, || said.send(()).unwrap()));
            waits.recv().unwrap();
            std::thread::sleep(std::time::Duration::from_millis(50));
            assert!(!second.is_finished());
            drop(held);
            second.join().unwrap().unwrap();
        });
    }

    #[test]
    fn hashes_separate_their_parts() {
        assert_ne!(
            short_hash([b"ab".as_slice(), b"c"]),
            short_hash([b"a".as_slice(), b"bc"])
        );
    }
}
