//! A notebook file as cells: what `check` and `run` need of it.

use crate::home::{Checkout, sha256};
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};

/// The types of `crates/course` that show themselves at the end of a cell. evcxr sometimes gives up
/// such a display for the type's `Debug` text.
pub const DISPLAYED: [&str; 2] = ["Figure", "Outcome"];

/// A notebook as it lies on disk.
#[derive(Debug)]
pub struct Notebook {
    /// Its path.
    pub path: PathBuf,
    /// Its cells, in order.
    pub cells: Vec<Cell>,
    /// Its metadata.
    pub metadata: Value,
}

/// One cell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cell {
    /// Position in the notebook, from 1, as the reports name it.
    pub number: usize,
    /// What the cell holds.
    pub kind: Kind,
    /// Its text.
    pub source: String,
    /// Its tags.
    pub tags: Vec<String>,
    /// Whether it has an execution count.
    pub executed: bool,
    /// What it has printed.
    pub printed: String,
}

/// What a cell holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Rust.
    Code,
    /// Prose.
    Markdown,
    /// Anything else.
    Raw,
}

/// An exercise: three cells, tagged `starter-NAME`, `check-NAME` and `solution-NAME`.
#[derive(Debug)]
pub struct Exercise<'a> {
    /// The cell that the learner fills in.
    pub starter: &'a Cell,
    /// The cell that checks.
    pub check: &'a Cell,
    /// The solution's Rust, out of the collapsed Markdown cell, and the cell.
    pub solution: (String, &'a Cell),
}

impl Notebook {
    /// Reads a notebook.
    pub fn read(path: &Path) -> Result<Self> {
        let text =
            fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        Self::parse(path, &text)
    }

    fn parse(path: &Path, text: &str) -> Result<Self> {
        let json: Value = serde_json::from_str(text)
            .with_context(|| format!("{} is not a notebook", path.display()))?;
        let cells = json["cells"]
            .as_array()
            .with_context(|| format!("{} has no cells", path.display()))?;
        let cells = cells
            .iter()
            .enumerate()
            .map(|(i, cell)| Cell::parse(i + 1, cell))
            .collect();
        Ok(Self {
            path: path.to_owned(),
            cells,
            metadata: json["metadata"].clone(),
        })
    }

    /// The file's name, such as `01_introduction.ipynb`.
    pub fn name(&self) -> String {
        self.path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned()
    }

    /// The lesson's number, such as `01`.
    pub fn lesson(&self) -> String {
        self.name()
            .chars()
            .take_while(char::is_ascii_digit)
            .collect()
    }

    /// The code cells.
    pub fn code(&self) -> impl Iterator<Item = &Cell> {
        self.cells.iter().filter(|cell| cell.kind == Kind::Code)
    }

    /// The SHA-256 of all code, by which stale outputs are found. `course_jupyter.run` computes
    /// the same.
    pub fn code_sha256(&self) -> String {
        let code: Vec<_> = self.code().map(|cell| cell.source.as_str()).collect();
        sha256(code.join("\n\0\n").as_bytes())
    }

    /// The exercises, by their tags; an incomplete one is an error.
    pub fn exercises(&self) -> Result<Vec<Exercise<'_>>> {
        let tagged = |tag: String| self.cells.iter().find(|cell| cell.tags.contains(&tag));
        let mut exercises = Vec::new();
        for starter in &self.cells {
            for name in starter
                .tags
                .iter()
                .filter_map(|tag| tag.strip_prefix("starter-"))
            {
                let (Some(check), Some(solution)) = (
                    tagged(format!("check-{name}")),
                    tagged(format!("solution-{name}")),
                ) else {
                    bail!(
                        "{}: exercise {name} (cell {}) wants a cell tagged check-{name} and one \
                         tagged solution-{name}",
                        self.name(),
                        starter.number
                    );
                };
                let rust = fenced_rust(&solution.source).with_context(|| {
                    format!(
                        "{}: cell {} holds no ```rust block",
                        self.name(),
                        solution.number
                    )
                })?;
                exercises.push(Exercise {
                    starter,
                    check,
                    solution: (rust, solution),
                });
            }
        }
        Ok(exercises)
    }
}

impl Cell {
    fn parse(number: usize, cell: &Value) -> Self {
        let tags = cell["metadata"]["tags"].as_array().into_iter().flatten();
        let outputs = cell["outputs"].as_array().into_iter().flatten();
        let kind = match cell["cell_type"].as_str() {
            Some("code") => Kind::Code,
            Some("markdown") => Kind::Markdown,
            _ => Kind::Raw,
        };
        Self {
            number,
            kind,
            source: joined(&cell["source"]),
            tags: tags
                .filter_map(|tag| Some(tag.as_str()?.to_owned()))
                .collect(),
            executed: cell["execution_count"].is_u64(),
            printed: outputs.map(|output| joined(&output["text"])).collect(),
        }
    }

    /// Whether the cell has a tag.
    pub fn has(&self, tag: &str) -> bool {
        self.tags.iter().any(|own| own == tag)
    }
}

/// A text of a notebook, which may be a list of lines.
pub fn joined(text: &Value) -> String {
    match text {
        Value::String(text) => text.clone(),
        lines => {
            let lines = lines.as_array().into_iter().flatten();
            lines.filter_map(Value::as_str).collect()
        }
    }
}

/// The lines of a Markdown text (from 1) outside fenced blocks.
pub fn prose_lines(source: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut fenced = false;
    source.lines().enumerate().filter_map(move |(index, line)| {
        let fence = line.trim_start().starts_with("```");
        fenced ^= fence;
        (!fenced && !fence).then_some((index + 1, line))
    })
}

/// The first block fenced as Rust in a Markdown text.
fn fenced_rust(markdown: &str) -> Option<String> {
    let mut lines = markdown.lines().skip_while(|line| line.trim() != "```rust");
    lines.next()?;
    let code: Vec<_> = lines.take_while(|line| line.trim() != "```").collect();
    Some(code.join("\n"))
}

/// The notebooks of the lessons named (`01`, `1` or a path); all of them when none is.
pub fn select(checkout: &Checkout, lessons: &[String]) -> Result<Vec<PathBuf>> {
    let dir = checkout.join("notebooks");
    let mut all: Vec<_> = fs::read_dir(&dir)
        .with_context(|| format!("cannot read {}", dir.display()))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "ipynb"))
        .collect();
    all.sort();
    if lessons.is_empty() {
        return Ok(all);
    }
    let mut chosen = Vec::new();
    for lesson in lessons {
        if lesson.ends_with(".ipynb") && Path::new(lesson).is_file() {
            chosen.push(PathBuf::from(lesson).canonicalize()?);
            continue;
        }
        let number = format!("{lesson:0>2}_");
        let found = all.iter().find(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with(&number))
        });
        chosen.push(found.cloned().with_context(|| {
            let names: Vec<_> = all
                .iter()
                .filter_map(|p| Some(p.file_stem()?.to_string_lossy().into_owned()))
                .collect();
            format!(
                "there is no lesson {lesson}; there are: {}",
                names.join(", ")
            )
        })?);
    }
    Ok(chosen)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn notebook(cells: Value) -> Notebook {
        let text = json!({"cells": cells, "metadata": {}}).to_string();
        Notebook::parse(Path::new("notebooks/07_x.ipynb"), &text).unwrap()
    }

    fn cell(kind: &str, source: &str, tag: &str) -> Value {
        json!({"cell_type": kind, "source": source, "metadata": {"tags": [tag]}})
    }

    #[test]
    fn every_type_of_the_course_that_shows_itself_is_known() {
        fn read(dir: &Path, found: &mut Vec<String>) {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    read(&path, found);
                    continue;
                }
                let text = fs::read_to_string(path).unwrap();
                for (at, _) in text.match_indices("fn evcxr_display") {
                    let head = text[..at].rfind("\nimpl").map(|start| &text[start + 1..at]);
                    let head = head.and_then(|head| head.lines().next()).unwrap();
                    let name = head.trim_end_matches(" {").rsplit(' ').next().unwrap();
                    found.push(name.to_owned());
                }
            }
        }
        let mut found = Vec::new();
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../course/src");
        read(&sources, &mut found);
        found.sort();
        assert_eq!(found, DISPLAYED);
    }

    #[test]
    fn source_may_be_text_or_lines() {
        let notebook = notebook(json!([
            {"cell_type": "code", "source": ["let a = 1;\n", "a"], "metadata": {}},
            {"cell_type": "markdown", "source": "# T", "metadata": {}},
        ]));
        assert_eq!(notebook.cells[0].source, "let a = 1;\na");
        assert_eq!(notebook.cells[1].kind, Kind::Markdown);
        assert_eq!(notebook.lesson(), "07");
    }

    #[test]
    fn an_exercise_is_three_tagged_cells() {
        let solution = "<details>\n\n```rust\nfn f() {}\n```\n</details>";
        let good = notebook(json!([
            cell("code", "fn f() {}", "starter-f"),
            cell("code", "f()", "check-f"),
            cell("markdown", solution, "solution-f"),
        ]));
        assert_eq!(good.exercises().unwrap()[0].solution.0, "fn f() {}");
        let bad = notebook(json!([cell("code", "fn f() {}", "starter-f")]));
        assert!(bad.exercises().unwrap_err().to_string().contains("check-f"));
    }

    #[test]
    fn the_hash_follows_code_alone() {
        let with = |prose: &str, code: &str| {
            notebook(json!([
                cell("markdown", prose, "x"),
                cell("code", code, "x")
            ]))
            .code_sha256()
        };
        assert_eq!(with("a", "1"), with("b", "1"));
        assert_ne!(with("a", "1"), with("a", "2"));
    }
}
