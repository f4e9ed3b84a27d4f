//! The course's own Python environment: JupyterLab and nbconvert, every version pinned by hash.

use super::tool;
use crate::home::{Home, short_hash, write_atomic};
use crate::progress::Steps;
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const REQUIREMENTS: &str = include_str!("../../python/requirements.txt");

/// Files of the environment that are ours: path inside it, content.
const FILES: &[(&str, &str)] = &[
    (
        "etc/jupyter/jupyter_nbconvert_config.py",
        include_str!("../../python/jupyter_nbconvert_config.py"),
    ),
    (
        "etc/jupyter/jupyter_server_config.json",
        include_str!("../../python/jupyter_server_config.json"),
    ),
    (
        "share/jupyter/lab/settings/overrides.json",
        include_str!("../../python/overrides.json"),
    ),
    (
        "share/jupyter/labextensions/course-figures/package.json",
        include_str!("../../python/labextension/package.json"),
    ),
    (
        "share/jupyter/labextensions/course-figures/static/remoteEntry.js",
        include_str!("../../python/labextension/static/remoteEntry.js"),
    ),
    (
        "share/jupyter/nbconvert/templates/course-site/conf.json",
        include_str!("../../python/templates/course-site/conf.json"),
    ),
    (
        "share/jupyter/nbconvert/templates/course-site/index.html.j2",
        include_str!("../../python/templates/course-site/index.html.j2"),
    ),
    (
        "share/jupyter/nbconvert/templates/course-slides/conf.json",
        include_str!("../../python/templates/course-slides/conf.json"),
    ),
    (
        "share/jupyter/nbconvert/templates/course-slides/index.html.j2",
        include_str!("../../python/templates/course-slides/index.html.j2"),
    ),
];

/// Modules that go into the environment's `site-packages/course_jupyter`.
const MODULES: &[(&str, &str)] = &[
    (
        "__init__.py",
        include_str!("../../python/course_jupyter/__init__.py"),
    ),
    (
        "failures.py",
        include_str!("../../python/course_jupyter/failures.py"),
    ),
    (
        "kernels.py",
        include_str!("../../python/course_jupyter/kernels.py"),
    ),
    (
        "late_output.py",
        include_str!("../../python/course_jupyter/late_output.py"),
    ),
    ("run.py", include_str!("../../python/course_jupyter/run.py")),
    (
        "bench.py",
        include_str!("../../python/course_jupyter/bench.py"),
    ),
    (
        "probe.py",
        include_str!("../../python/course_jupyter/probe.py"),
    ),
    (
        "publish.py",
        include_str!("../../python/course_jupyter/publish.py"),
    ),
    (
        "web/code.css",
        include_str!("../../python/course_jupyter/web/code.css"),
    ),
    (
        "web/search.js",
        include_str!("../../python/course_jupyter/web/search.js"),
    ),
    (
        "web/site.css",
        include_str!("../../python/course_jupyter/web/site.css"),
    ),
    (
        "web/slides.css",
        include_str!("../../python/course_jupyter/web/slides.css"),
    ),
    (
        "web/slides.js",
        include_str!("../../python/course_jupyter/web/slides.js"),
    ),
];

/// A Python environment.
#[derive(Debug, Clone)]
pub struct Environment(PathBuf);

impl Environment {
    /// A folder of a test's own.
    #[cfg(test)]
    pub fn at(dir: &Path) -> Self {
        Self(dir.to_owned())
    }

    /// The environment's interpreter.
    pub fn python(&self) -> PathBuf {
        self.bin("python")
    }

    /// A program of the environment.
    pub fn bin(&self, name: &str) -> PathBuf {
        self.0.join("bin").join(name)
    }

    /// A path inside.
    pub fn join(&self, part: &str) -> PathBuf {
        self.0.join(part)
    }

    /// The folder of its packages.
    pub fn site_packages(&self) -> Result<PathBuf> {
        let lib = self.join("lib");
        fs::read_dir(&lib)
            .with_context(|| format!("{} is not a Python environment", lib.display()))?
            .filter_map(|entry| Some(entry.ok()?.path().join("site-packages")))
            .find(|path| path.is_dir())
            .with_context(|| format!("{} holds no site-packages", lib.display()))
    }
}

/// A Python on this machine.
pub struct Interpreter {
    program: String,
    pub version: String,
    executable: String,
}

impl Interpreter {
    /// Its program, as an absolute path.
    pub fn executable(&self) -> &str {
        &self.executable
    }
}

/// What an environment holds.
pub struct Recipe {
    /// The folder's name under the course's home begins so.
    pub prefix: &'static str,
    /// Every package, pinned by hash.
    pub requirements: &'static str,
    /// What the step is called.
    pub what: &'static str,
    /// Time and space that it takes.
    pub estimate: &'static str,
}

/// Makes the course's environment, or finds it made.
pub fn ensure(home: &Home, steps: &mut Steps) -> Result<Environment> {
    let recipe = Recipe {
        prefix: "python",
        requirements: REQUIREMENTS,
        what: "Python environment with JupyterLab",
        estimate: "about 1 minute, 250 MB",
    };
    let environment = make(home, steps, &recipe, &interpreter()?, || Ok(()))?;
    write_files(&environment)?;
    Ok(environment)
}

/// Makes an environment, or finds it made. `before` is called before one is made.
pub fn make(
    home: &Home,
    steps: &mut Steps,
    recipe: &Recipe,
    python: &Interpreter,
    before: impl FnOnce() -> Result<()>,
) -> Result<Environment> {
    let key = short_hash([
        recipe.requirements.as_bytes(),
        python.version.as_bytes(),
        python.executable.as_bytes(),
    ]);
    let dir = home.join(format!("{}-{key}", recipe.prefix));
    let environment = Environment(dir.clone());
    let complete = dir.join("complete");
    if complete.exists() && environment.python().exists() {
        steps.skip();
    } else {
        before()?;
        let what = format!("{}, on Python {}", recipe.what, python.version);
        let step = steps.start(&what, Some(recipe.estimate));
        install(python, &dir, recipe)?;
        fs::write(&complete, "")?;
        step.done();
    }
    Ok(environment)
}

/// Finds a Python that is recent enough.
pub fn interpreter() -> Result<Interpreter> {
    let asked = std::env::var("COURSE_PYTHON").ok();
    let asked = asked.filter(|name| !name.is_empty());
    let names = match &asked {
        Some(name) => vec![name.as_str()],
        None => vec!["python3", "python"],
    };
    let script = "import sys; print('%d.%d' % sys.version_info[:2]); print(sys.executable)";
    let mut old = None;
    for name in names {
        let Ok(output) = Command::new(name).args(["-c", script]).output() else {
            continue;
        };
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let mut lines = text.lines();
        let (Some(version), Some(executable)) = (lines.next(), lines.next()) else {
            continue;
        };
        if recent_enough(version) {
            return Ok(Interpreter {
                program: name.to_owned(),
                version: version.to_owned(),
                executable: executable.to_owned(),
            });
        }
        old = Some(version.to_owned());
    }
    match old {
        Some(version) => bail!(
            "the course needs Python 3.10 or newer, and this one is {version}. Install a newer one, \
             or name one with COURSE_PYTHON=/path/to/python3."
        ),
        None => bail!(
            "no Python was found. Install Python 3.10 or newer (Debian and Ubuntu: sudo apt install \
             python3 python3-venv; macOS: brew install python), or name one with \
             COURSE_PYTHON=/path/to/python3."
        ),
    }
}

fn recent_enough(version: &str) -> bool {
    let mut parts = version
        .split('.')
        .map(|part| part.parse::<u32>().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0)) >= (3, 10)
}

fn install(python: &Interpreter, dir: &Path, recipe: &Recipe) -> Result<()> {
    // A half-made environment is of no use; pip's cache makes the second try quick.
    if dir.exists() {
        fs::remove_dir_all(dir)
            .with_context(|| format!("cannot remove the unfinished {}", dir.display()))?;
    }
    let mut venv = Command::new(&python.program);
    venv.args(["-m", "venv"]).arg(dir);
    tool::run("making the Python environment", &mut venv, |_| ())?;
    let requirements = dir.join("requirements.txt");
    fs::write(&requirements, recipe.requirements)?;
    let mut pip = Command::new(dir.join("bin/python"));
    pip.args([
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
    ])
    .args(["--no-input", "--require-hashes", "-r"])
    .arg(&requirements);
    tool::run(&format!("installing the {}", recipe.what), &mut pip, |_| ())
}

/// Writes the files of an environment that are ours.
pub fn write_files(environment: &Environment) -> Result<()> {
    for (path, content) in FILES {
        write_atomic(&environment.join(path), content)?;
    }
    let site = environment.site_packages()?;
    for (name, content) in MODULES {
        write_atomic(&site.join("course_jupyter").join(name), content)?;
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    #[test]
    fn old_pythons_are_refused() {
        assert!(recent_enough("3.10") && recent_enough("3.13") && recent_enough("4.0"));
        assert!(!recent_enough("3.9") && !recent_enough("2.7") && !recent_enough("x"));
    }

    #[test]
    fn every_requirement_is_pinned_by_hash() {
        assert_pinned(REQUIREMENTS);
    }

    pub fn assert_pinned(requirements: &str) {
        let packages = requirements
            .lines()
            .filter(|l| l.starts_with(|c: char| c.is_alphanumeric()));
        for line in packages {
            assert!(line.contains("==") && line.ends_with('\\'), "{line}");
        }
    }
}
