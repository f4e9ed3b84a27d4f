//! Writing an adapter folder.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use tempfile::NamedTempFile;

use super::{AdapterFiles, CONFIG_NAME, WEIGHTS_NAME, bad_file, checked_name, tensors};
use crate::{Error, Result};

impl AdapterFiles {
    /// Writes the adapter into `folder`, which is made when it does not exist.
    ///
    /// Tensors are written in the type that they have, under the names that PEFT uses; the same
    /// adapter gives the same bytes. Other files in the folder stay. The numbers are not looked
    /// at: NaN is written too, and refused when it is read.
    ///
    /// **Safe against a crash.** Both files are first written in full under other names. The
    /// adapter becomes the new one at one moment, when the file of the weights takes its place:
    /// until then [`read`](Self::read) finds the old adapter, from then on the new one. A
    /// configuration that differs from the old one waits until after that moment, under a name
    /// made of the weights that it belongs to, where `read` finds it. PEFT does not look there:
    /// if a crash falls between the two renames, and the configuration has changed, write the
    /// adapter once more before PEFT reads it. A crash may also leave hidden files behind, named
    /// `.adapter-….tmp`, which nothing reads. A second program that reads while this one writes is
    /// not kept out.
    ///
    /// # Errors
    ///
    /// What [`modules`](Self::modules) and
    /// [`AdapterConfig::to_json`](super::AdapterConfig::to_json) refuse; [`Error::File`] when a
    /// tensor is no float, or when the folder or a file cannot be written. The old adapter is then
    /// still there; only when the last renaming fails, the new one already counts.
    ///
    /// ```
    /// use std::collections::BTreeMap;
    /// use candle_core::{DType, Device, Tensor};
    /// use lora::{LoraConfig, peft::AdapterFiles};
    ///
    /// let folder = tempfile::tempdir()?;
    /// let one = Tensor::ones((1, 1), DType::F32, &Device::Cpu)?;
    /// let tensors = BTreeMap::from([
    ///     ("x.lora_A.weight".to_string(), one.clone()),
    ///     ("x.lora_B.weight".to_string(), one),
    /// ]);
    /// let path = folder.path().join("new");
    /// AdapterFiles { config: LoraConfig::new(1, 1.0).into(), tensors }.write(&path)?;
    ///
    /// let files = AdapterFiles::read(&path, &Device::Cpu)?;
    /// let keys: Vec<&String> = files.tensors.keys().collect();
    /// assert_eq!(keys[0], "base_model.model.x.lora_A.weight");
    /// assert_eq!(std::fs::read_dir(&path)?.count(), 2);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn write(&self, folder: impl AsRef<Path>) -> Result<()> {
        let folder = folder.as_ref();
        let (config_path, weights_path) = (folder.join(CONFIG_NAME), folder.join(WEIGHTS_NAME));
        if self.tensors.is_empty() {
            return Err(bad_file(&weights_path, "there is no tensor to write"));
        }
        self.modules_of(&weights_path)?;
        let config = self.config.to_json()?;
        let weights = tensors::serialize(&self.tensors, &weights_path)?;

        fs::create_dir_all(folder).map_err(|error| unwritten(folder, &error))?;
        for path in [&config_path, &weights_path] {
            if path.is_dir() {
                return Err(bad_file(
                    path,
                    "a folder lies where the file must be; move it away",
                ));
            }
        }
        commit(folder, config.as_bytes(), &weights, |_| Ok(()))
    }

    /// Writes the adapter where PEFT puts one of this name: `"default"` into `folder` itself,
    /// any other into the folder of its name inside.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write), and [`Error::AdapterName`] when the name has other characters
    /// than letters, digits, `-` and `_`.
    ///
    /// ```
    /// use std::collections::BTreeMap;
    /// use candle_core::{DType, Device, Tensor};
    /// use lora::{LoraConfig, peft::AdapterFiles};
    ///
    /// let folder = tempfile::tempdir()?;
    /// let one = Tensor::ones((1, 1), DType::F32, &Device::Cpu)?;
    /// let tensors = BTreeMap::from([
    ///     ("x.lora_A.weight".to_string(), one.clone()),
    ///     ("x.lora_B.weight".to_string(), one),
    /// ]);
    /// let files = AdapterFiles { config: LoraConfig::new(1, 1.0).into(), tensors };
    /// files.write_named(folder.path(), "fr")?;
    /// assert!(folder.path().join("fr/adapter_config.json").is_file());
    /// assert!(AdapterFiles::read_named(folder.path(), "fr", &Device::Cpu).is_ok());
    /// assert!(files.write_named(folder.path(), "a/b").is_err());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn write_named(&self, folder: impl AsRef<Path>, adapter: &str) -> Result<()> {
        match checked_name(adapter)? {
            "default" => self.write(folder),
            name => self.write(folder.as_ref().join(name)),
        }
    }
}

/// How far a write has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Begun,
    WeightsReady,
    ConfigWaits,
    WeightsInPlace,
    ConfigInPlace,
}

/// Puts both files in place, see [`AdapterFiles::write`]. `reached` is told of every step, so
/// that tests can stop there as a crash would.
fn commit(
    folder: &Path,
    config: &[u8],
    weights: &[u8],
    mut reached: impl FnMut(Step) -> Result<()>,
) -> Result<()> {
    let (config_path, weights_path) = (folder.join(CONFIG_NAME), folder.join(WEIGHTS_NAME));
    reached(Step::Begun)?;
    let new_weights = temporary(folder, weights)?;
    reached(Step::WeightsReady)?;
    let path = pending_config::path(folder, weights);
    // One may be there already, left by a crash, for the same weights.
    let waiting = if same_content(&config_path, config) && !path.exists() {
        None
    } else {
        keep(temporary(folder, config)?, &path)?;
        Some(path)
    };
    reached(Step::ConfigWaits)?;
    // From here on, the new adapter is the one that is read.
    if let Err(error) = keep(new_weights, &weights_path) {
        if let Some(path) = waiting {
            let _ = fs::remove_file(path);
        }
        return Err(error);
    }
    reached(Step::WeightsInPlace)?;
    if let Some(path) = waiting {
        fs::rename(&path, &config_path).map_err(|error| unwritten(&config_path, &error))?;
        synced(folder);
    }
    reached(Step::ConfigInPlace)?;
    pending_config::clear(folder);
    Ok(())
}

fn unwritten(path: &Path, error: &std::io::Error) -> Error {
    bad_file(path, format!("cannot be written: {error}"))
}

/// A new file in `folder` with this content, on the disk.
fn temporary(folder: &Path, content: &[u8]) -> Result<NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".adapter-").suffix(".tmp");
    #[cfg(unix)]
    {
        // As any new file: what the user's umask leaves of it.
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(fs::Permissions::from_mode(0o666));
    }
    let mut file = builder
        .tempfile_in(folder)
        .map_err(|error| unwritten(folder, &error))?;
    file.write_all(content)
        .and_then(|()| file.as_file().sync_all())
        .map_err(|error| unwritten(file.path(), &error))?;
    Ok(file)
}

fn keep(file: NamedTempFile, path: &Path) -> Result<()> {
    file.persist(path)
        .map_err(|error| unwritten(path, &error.error))?;
    if let Some(folder) = path.parent() {
        synced(folder);
    }
    Ok(())
}

/// Puts the folder's new names on the disk, where the system can do that.
fn synced(folder: &Path) {
    if cfg!(unix)
        && let Ok(folder) = File::open(folder)
    {
        let _ = folder.sync_all();
    }
}

fn same_content(path: &Path, content: &[u8]) -> bool {
    fs::metadata(path).is_ok_and(|m| m.is_file() && m.len() == content.len() as u64)
        && fs::read(path).is_ok_and(|old| old == content)
}

/// The configuration that waits for its weights.
pub(super) mod pending_config {
    use std::fs;
    use std::path::{Path, PathBuf};

    const START: &str = ".adapter_config.";
    const END: &str = ".json";

    /// Where the configuration of these weights waits.
    pub(crate) fn path(folder: &Path, weights: &[u8]) -> PathBuf {
        folder.join(format!("{START}{:016x}{END}", fingerprint(weights)))
    }

    /// Whether any waits in this folder.
    pub(crate) fn any(folder: &Path) -> bool {
        all(folder).next().is_some()
    }

    /// Removes those that nothing waits for any more.
    pub(crate) fn clear(folder: &Path) {
        for path in all(folder) {
            let _ = fs::remove_file(path);
        }
    }

    fn all(folder: &Path) -> impl Iterator<Item = PathBuf> {
        fs::read_dir(folder)
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name();
                let middle = name.to_str()?.strip_prefix(START)?.strip_suffix(END)?;
                (middle.len() == 16).then(|| entry.path())
            })
    }

    /// FNV-1a, 64 bits: it tells the old weights from the new ones, nothing more.
    fn fingerprint(bytes: &[u8]) -> u64 {
        bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
        })
    }

    #[cfg(test)]
    #[test]
    fn known_fingerprints() {
        assert_eq!(fingerprint(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fingerprint(b"a"), 0xaf63_dc4c_8601_ec8c);
        assert_eq!(fingerprint(b"foobar"), 0x8594_4171_f739_67e8);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use candle_core::{DType, Device, Tensor};

    use super::*;
    use crate::LoraConfig;

    fn adapter(r: usize, alpha: f64, value: f64) -> AdapterFiles {
        let full = |shape: (usize, usize)| {
            let ones = Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap();
            (ones * value).unwrap()
        };
        let config = LoraConfig::new(r, alpha).into();
        let tensors = BTreeMap::from([
            ("base_model.model.x.lora_A.weight".to_string(), full((r, 5))),
            ("base_model.model.x.lora_B.weight".to_string(), full((7, r))),
        ]);
        AdapterFiles { config, tensors }
    }

    fn same(a: &AdapterFiles, b: &AdapterFiles) -> bool {
        let numbers = |files: &AdapterFiles| -> Vec<Vec<f32>> {
            let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1().unwrap();
            files.tensors.values().map(flat).collect()
        };
        a.config.kind == b.config.kind && numbers(a) == numbers(b)
    }

    #[test]
    fn a_crash_at_any_step_leaves_one_whole_adapter() {
        use Step::*;
        let old = adapter(2, 4.0, 1.0);
        for new in [
            adapter(3, 4.0, 2.0),
            adapter(2, 8.0, 1.0),
            adapter(2, 8.0, 2.0),
            adapter(2, 4.0, 3.0),
        ] {
            for crash in [
                Begun,
                WeightsReady,
                ConfigWaits,
                WeightsInPlace,
                ConfigInPlace,
            ] {
                let folder = tempfile::tempdir().unwrap();
                let path = folder.path();
                fs::write(path.join("README.md"), "kept").unwrap();
                old.write(path).unwrap();
                let config = new.config.to_json().unwrap();
                let weights = tensors::serialize(&new.tensors, path).unwrap();
                let stop = |step| {
                    if step == crash {
                        Err(bad_file(path, "crash"))
                    } else {
                        Ok(())
                    }
                };
                commit(path, config.as_bytes(), &weights, stop).unwrap_err();
                let read = AdapterFiles::read(path, &Device::Cpu).unwrap();
                // With the same weights, there is nothing to tell old from new but the config.
                let same_weights = weights == tensors::serialize(&old.tensors, path).unwrap();
                let placed = matches!(crash, WeightsInPlace | ConfigInPlace)
                    || (same_weights && crash == ConfigWaits);
                let want = if placed { &new } else { &old };
                assert!(same(&read, want), "{crash:?}: {:?}", read.config);

                // The next write puts everything in order.
                new.write(path).unwrap();
                assert!(same(&AdapterFiles::read(path, &Device::Cpu).unwrap(), &new));
                let mut names: Vec<_> = fs::read_dir(path)
                    .unwrap()
                    .map(|e| e.unwrap().file_name())
                    .collect();
                names.sort();
                assert_eq!(names, ["README.md", CONFIG_NAME, WEIGHTS_NAME]);
            }
        }
    }

    #[test]
    fn a_file_that_cannot_take_its_place() {
        for (at, file) in [
            (Step::ConfigWaits, WEIGHTS_NAME),
            (Step::WeightsInPlace, CONFIG_NAME),
        ] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path();
            adapter(2, 4.0, 1.0).write(path).unwrap();
            let new = adapter(2, 8.0, 2.0);
            let config = new.config.to_json().unwrap();
            let weights = tensors::serialize(&new.tensors, path).unwrap();
            let block = |step| {
                if step == at {
                    fs::remove_file(path.join(file)).unwrap();
                    fs::create_dir(path.join(file)).unwrap();
                }
                Ok(())
            };
            let error = commit(path, config.as_bytes(), &weights, block).unwrap_err();
            assert!(
                error
                    .to_string()
                    .contains(&format!("{file}: cannot be written"))
            );
            let waits = pending_config::any(path);
            assert_eq!(waits, at == Step::WeightsInPlace);
            if waits {
                let read = AdapterFiles::read(path, &Device::Cpu).unwrap();
                assert!(same(&read, &new));
            }
        }
    }

    #[test]
    fn a_waiting_configuration_of_the_same_weights_does_not_win() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        let (old, crashed, new) = (
            adapter(2, 4.0, 1.0),
            adapter(2, 8.0, 2.0),
            adapter(2, 4.0, 2.0),
        );
        old.write(path).unwrap();
        let weights = tensors::serialize(&new.tensors, path).unwrap();
        for (files, crash) in [(&crashed, Step::ConfigWaits), (&new, Step::WeightsInPlace)] {
            let config = files.config.to_json().unwrap();
            let stop = |step| match step {
                step if step == crash => Err(bad_file(path, "crash")),
                _ => Ok(()),
            };
            commit(path, config.as_bytes(), &weights, stop).unwrap_err();
        }
        assert!(same(&AdapterFiles::read(path, &Device::Cpu).unwrap(), &new));
    }

    #[test]
    fn the_first_write_counts_from_the_weights_on() {
        let new = adapter(2, 4.0, 1.0);
        let folder = tempfile::tempdir().unwrap();
        let config = new.config.to_json().unwrap();
        let weights = tensors::serialize(&new.tensors, folder.path()).unwrap();
        let stop = |step| match step {
            Step::WeightsInPlace => Err(bad_file(folder.path(), "crash")),
            _ => Ok(()),
        };
        commit(folder.path(), config.as_bytes(), &weights, stop).unwrap_err();
        assert!(!folder.path().join(CONFIG_NAME).exists());
        assert!(same(
            &AdapterFiles::read(folder.path(), &Device::Cpu).unwrap(),
            &new
        ));
    }
}
