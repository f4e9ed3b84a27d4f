//! `cargo course check`: types and structure of the notebooks, without a kernel.
//!
//! [`typecheck`] turns the code cells into one generated crate and lets `cargo check` judge it;
//! [`lint`] looks at what each lesson must have. Both name a notebook, a cell and a line.

mod cargo;
mod cuda;
mod lint;
mod source;
mod typecheck;

use crate::home::Checkout;
use crate::notebook::{self, Cell, Notebook};
use crate::teaching;
use anyhow::{Result, bail};
pub use cuda::check as cuda;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// What a check found.
#[derive(Debug, Default)]
pub struct Report {
    /// How many notebooks were looked at.
    pub notebooks: usize,
    /// What is wrong with them.
    pub findings: Vec<Finding>,
}

/// One thing that is wrong.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Finding {
    /// The notebook's file, or nothing when the fault lies elsewhere.
    pub notebook: Option<String>,
    /// The cell, from 1.
    pub cell: Option<usize>,
    /// The line in the cell, from 1.
    pub line: Option<usize>,
    /// What is wrong, such as `error[E0308]: mismatched types`.
    pub message: String,
    /// The text of that line.
    pub source: Option<String>,
    /// The parts of that line to point at, the most important one first.
    pub marks: Vec<Mark>,
    /// Further lines: notes, help, other places.
    pub notes: Vec<String>,
}

/// A part of a source line to point at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mark {
    /// The first column, from 0, in characters.
    pub start: usize,
    /// The column after the last.
    pub end: usize,
    /// What to say about it.
    pub label: String,
}

/// Something wrong in a notebook whose name is known from the context.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Problem {
    /// The cell, from 1; the whole notebook without.
    cell: Option<usize>,
    /// The line in the cell, from 1.
    line: Option<usize>,
    /// The columns in that line, from 0.
    columns: Option<(usize, usize)>,
    /// What is wrong and what to do.
    message: String,
}

impl Problem {
    /// A problem of the notebook as a whole.
    fn whole(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            ..Self::default()
        }
    }

    /// A problem of one cell.
    fn cell(cell: &Cell, message: impl Into<String>) -> Self {
        Self {
            cell: Some(cell.number),
            ..Self::whole(message)
        }
    }

    /// A problem of one line (from 1) of a cell.
    fn line(cell: &Cell, line: usize, message: impl Into<String>) -> Self {
        Self {
            line: Some(line),
            ..Self::cell(cell, message)
        }
    }

    /// The finding, with the name of the notebook and the line's text.
    fn into_finding(self, label: &str, notebook: &Notebook) -> Finding {
        let columns = self.columns.into_iter();
        let marks = columns.map(|(start, end)| Mark {
            start,
            end,
            label: String::new(),
        });
        Finding {
            marks: marks.collect(),
            source: source_line(notebook, self.cell, self.line),
            message: format!("error: {}", self.message),
            notebook: Some(label.to_owned()),
            cell: self.cell,
            line: self.line,
            notes: Vec::new(),
        }
    }
}

/// The text of a line of a cell, both counted from 1.
fn source_line(notebook: &Notebook, cell: Option<usize>, line: Option<usize>) -> Option<String> {
    let cell = notebook.cells.get(cell?.checked_sub(1)?)?;
    let text = cell.source.lines().nth(line?.checked_sub(1)?)?;
    Some(text.to_owned())
}

impl Report {
    /// Whether nothing was found.
    pub fn is_clean(&self) -> bool {
        self.findings.is_empty()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for finding in &self.findings {
            writeln!(f, "{finding}")?;
        }
        let notebooks = counted(self.notebooks, "notebook");
        if self.is_clean() {
            writeln!(f, "check: {notebooks}, all well")
        } else {
            let errors = counted(self.findings.len(), "error");
            writeln!(f, "check: {notebooks}, {errors}")
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(notebook) = &self.notebook {
            f.write_str(notebook)?;
            if let Some(cell) = self.cell {
                write!(f, ", cell {cell}")?;
            }
            if let Some(line) = self.line {
                write!(f, ", line {line}")?;
            }
            f.write_str(": ")?;
        }
        writeln!(f, "{}", self.message.trim_end())?;
        if let Some(source) = &self.source {
            writeln!(f, "  | {}", source.trim_end())?;
        }
        for (index, mark) in self.marks.iter().enumerate() {
            let sign = if index == 0 { "^" } else { "-" };
            let line = sign.repeat(mark.end.saturating_sub(mark.start).max(1));
            let text = format!("{}{line} {}", " ".repeat(mark.start), mark.label);
            writeln!(f, "  | {}", text.trim_end())?;
        }
        for note in &self.notes {
            writeln!(f, "  = {}", note.trim_end().replace('\n', "\n    "))?;
        }
        Ok(())
    }
}

/// `1 error`, `2 errors`.
fn counted(number: usize, noun: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {noun}{plural}")
}

/// `cargo course check`: prints what was found and returns whether all is well.
pub fn command(checkout: &Checkout, lessons: &[String]) -> Result<bool> {
    let start = Instant::now();
    let report = check(checkout, lessons)?;
    print!("{report}");
    println!("       ({:.1} s)", start.elapsed().as_secs_f64());
    Ok(report.is_clean())
}

/// Checks the notebooks of the lessons named; all of them when none is.
pub fn check(checkout: &Checkout, lessons: &[String]) -> Result<Report> {
    let mut notebooks = Vec::new();
    for path in notebook::select(checkout, lessons)? {
        notebooks.push((label(checkout, &path), Notebook::read(&path)?));
    }
    let mut findings = Vec::new();
    for (label, notebook) in &notebooks {
        let problems = lint::lint(notebook)?.into_iter();
        findings.extend(problems.map(|problem| problem.into_finding(label, notebook)));
    }
    findings.extend(typecheck::typecheck(checkout, &notebooks)?);
    // Sums of all lessons, so not of a choice of them.
    let late = teaching::out_of_step(checkout).filter(|_| lessons.is_empty());
    findings.extend(late.map(|message| Finding {
        message: format!("error: {message}"),
        ..Finding::default()
    }));
    sort(&mut findings);
    Ok(Report {
        notebooks: notebooks.len(),
        findings,
    })
}

/// A notebook as a module of Rust with a function `notebook`.
pub struct Exported {
    /// The lesson, such as `01`.
    pub number: String,
    /// The module's name.
    pub module: String,
    /// Its text.
    pub text: String,
}

/// The notebooks of the lessons named as modules; all of them when none is. They need a module
/// `support` at the root of their crate.
pub fn exported(checkout: &Checkout, lessons: &[String]) -> Result<Vec<Exported>> {
    let notebooks = notebook::select(checkout, lessons)?;
    let one = |path: &PathBuf| -> Result<Exported> {
        let notebook = Notebook::read(path)?;
        let (module, problems) = source::generate(&notebook, source::Purpose::Program);
        if let Some(problem) = problems.into_iter().next() {
            let finding = problem.into_finding(&label(checkout, path), &notebook);
            bail!("{finding}");
        }
        Ok(Exported {
            number: notebook.lesson(),
            module: typecheck::module_name(&notebook),
            text: module.text,
        })
    };
    notebooks.iter().map(one).collect()
}

/// Faults outside the notebooks first, then by notebook, cell and line; each once.
fn sort(findings: &mut Vec<Finding>) {
    let key = |finding: &Finding| (finding.notebook.clone(), finding.cell, finding.line);
    findings.sort_by_key(key);
    let mut seen: Vec<Finding> = Vec::new();
    for finding in findings.drain(..) {
        if !seen.contains(&finding) {
            seen.push(finding);
        }
    }
    *findings = seen;
}

/// How a notebook is called in a report: its path in the checkout.
fn label(checkout: &Checkout, path: &Path) -> String {
    let inside = path.strip_prefix(checkout.root()).unwrap_or(path);
    inside.display().to_string()
}

/// The lines (from 0) that evcxr takes for commands: those that begin with `:` or `!` before
/// the first line of Rust.
fn commands(source: &str) -> Vec<usize> {
    let mut found = Vec::new();
    for (index, line) in source.lines().enumerate() {
        if line.starts_with('!') || line.trim_start_matches(' ').starts_with(':') {
            found.push(index);
        } else if !line.starts_with("//") && !line.trim().is_empty() {
            break;
        }
    }
    found
}

/// The first line (from 1) inside the first block fenced as Rust in a Markdown text.
fn first_rust_line(markdown: &str) -> usize {
    let fence = markdown.lines().position(|line| line.trim() == "```rust");
    fence.map_or(1, |line| line + 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_stand_before_the_first_line_of_rust() {
        assert_eq!(commands("// x\n\n:dep a = 1\n  :vars\nlet a =\n:b"), [2, 3]);
        assert_eq!(commands("!ls\nlet a = 1;"), [0]);
        assert!(commands("let a\n: u8 = 1;").is_empty());
    }

    #[test]
    fn a_finding_reads_like_a_compiler_error() {
        let finding = Finding {
            notebook: Some("notebooks/01_x.ipynb".into()),
            cell: Some(7),
            line: Some(3),
            message: "error[E0308]: mismatched types".into(),
            source: Some("let x: u8 = \"a\";".into()),
            marks: vec![
                Mark {
                    start: 12,
                    end: 15,
                    label: "expected `u8`, found `&str`".into(),
                },
                Mark {
                    start: 7,
                    end: 9,
                    label: String::new(),
                },
            ],
            notes: vec!["help: two\nlines".into()],
        };
        let expected = "\
notebooks/01_x.ipynb, cell 7, line 3: error[E0308]: mismatched types
  | let x: u8 = \"a\";
  |             ^^^ expected `u8`, found `&str`
  |        --
  = help: two
    lines
";
        assert_eq!(finding.to_string(), expected);
    }

    #[test]
    fn a_report_counts_and_shows_each_finding_once() {
        let finding = |line| Finding {
            notebook: Some("n".into()),
            cell: Some(1),
            line: Some(line),
            ..Finding::default()
        };
        let mut findings = vec![finding(2), finding(1), finding(2)];
        sort(&mut findings);
        let report = Report {
            notebooks: 1,
            findings,
        };
        let text = report.to_string();
        assert!(text.ends_with("check: 1 notebook, 2 errors\n"), "{text}");
        assert_eq!(report.findings[0].line, Some(1));
    }
}
