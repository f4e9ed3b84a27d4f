//! What is too large to be committed.

use super::refused;
use crate::{Error, Result};
use std::path::{Component, Path, PathBuf};

/// The folder of a set that `cargo course setup` or `cargo course data fetch NAME` has fetched.
///
/// It lies in `data/NAME` of the folder of the course's tools, which `COURSE_HOME` names or which
/// is `~/.cache/lora-course` (macOS: `~/Library/Caches/lora-course`).
///
/// # Errors
/// [`Error::Data`] when it is not there yet; it names the command to type.
///
/// ```
/// let error = course::data::fetched("no-such-set").unwrap_err();
/// assert!(error.to_string().contains("cargo course data fetch no-such-set"));
/// ```
pub fn fetched(name: &str) -> Result<PathBuf> {
    within(&home(|variable| std::env::var_os(variable))?, name)
}

/// A file of a set, which is UTF-8.
pub(super) fn lines_of(set: &str, file: &str) -> Result<String> {
    let path = fetched(set)?.join(file);
    let bytes = std::fs::read(&path).map_err(Error::file(&path))?;
    String::from_utf8(bytes).map_err(|_| damaged_set(set, file, "it is not UTF-8"))
}

/// The error of a set's file that is not what it should be.
pub(super) fn damaged_set(set: &str, file: &str, problem: &str) -> Error {
    let remedy = format!("get it anew with `cargo course data fetch {set}`");
    Error::damaged(format_args!("{set}/{file}"), problem, &remedy)
}

/// A set's folder appears only when all its files are there.
fn within(home: &Path, name: &str) -> Result<PathBuf> {
    let mut parts = Path::new(name).components();
    let plain = matches!(
        (parts.next(), parts.next()),
        (Some(Component::Normal(_)), None)
    );
    let dir = home.join("data").join(name);
    if plain && dir.is_dir() {
        return Ok(dir);
    }
    Err(refused(
        name,
        format!(
            "it is not on this machine yet; type `cargo course data fetch {name}` in the checkout"
        ),
    ))
}

/// The folder of the course's tools, by the same rule as in `cargo course` (`home.rs`).
fn home(variable: impl Fn(&str) -> Option<std::ffi::OsString>) -> Result<PathBuf> {
    let path = |name| variable(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    if let Some(home) = path("COURSE_HOME") {
        return std::path::absolute(&home).map_err(Error::file(&home));
    }
    let cache = if cfg!(target_os = "macos") {
        path("HOME").map(|home| home.join("Library/Caches"))
    } else {
        path("XDG_CACHE_HOME").or_else(|| path("HOME").map(|home| home.join(".cache")))
    };
    cache.map(|cache| cache.join("lora-course")).ok_or_else(|| {
        refused(
            "fetched",
            "neither HOME nor COURSE_HOME is set; set COURSE_HOME to the folder of the course's tools",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn home_of(variables: &[(&str, &str)]) -> Result<PathBuf> {
        home(|name| {
            variables
                .iter()
                .find(|(n, _)| *n == name)
                .map(|(_, value)| value.into())
        })
    }

    #[test]
    fn the_folder_of_the_tools_is_the_command_s() -> Result<()> {
        let both = [("COURSE_HOME", "/tools"), ("HOME", "/me")];
        assert_eq!(home_of(&both)?, Path::new("/tools"));
        let empty = [("COURSE_HOME", ""), ("XDG_CACHE_HOME", ""), ("HOME", "/me")];
        let default = if cfg!(target_os = "macos") {
            "/me/Library/Caches/lora-course"
        } else {
            "/me/.cache/lora-course"
        };
        assert_eq!(home_of(&empty)?, Path::new(default));
        if cfg!(not(target_os = "macos")) {
            let cache = [("XDG_CACHE_HOME", "/cache"), ("HOME", "/me")];
            assert_eq!(home_of(&cache)?, Path::new("/cache/lora-course"));
        }
        assert!(home_of(&[("COURSE_HOME", "tools")])?.is_absolute());
        let said = home_of(&[]).unwrap_err().to_string();
        assert!(said.contains("set COURSE_HOME"), "{said}");
        Ok(())
    }

    #[test]
    fn only_what_was_fetched_is_there() {
        let home = std::env::temp_dir().join(format!("course-fetched-{}", std::process::id()));
        std::fs::create_dir_all(home.join("data/a-set/inner")).unwrap();
        let found = within(&home, "a-set").unwrap();
        let missing: Vec<String> = ["other", "", ".", "..", "a-set/inner", "/"]
            .iter()
            .map(|name| within(&home, name).unwrap_err().to_string())
            .collect();
        std::fs::remove_dir_all(&home).unwrap();
        assert_eq!(found, home.join("data/a-set"));
        assert!(missing[0].contains("data \"other\"") && missing[0].contains("data fetch other"));
    }
}
