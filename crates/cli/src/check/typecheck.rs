//! Type-checks the notebooks' code with one `cargo check`, and says where in a notebook it fails.

use super::cargo::{self, Diagnostic, Modules, Span, Verdict};
use super::source::{self, Origin, Purpose, Role, Variables};
use super::{Finding, Mark, source_line};
use crate::home::Checkout;
use crate::notebook::Notebook;
use anyhow::Result;
use std::collections::{BTreeMap, BTreeSet};

/// Type-checks notebooks, each with the name under which to report it.
pub fn typecheck(checkout: &Checkout, notebooks: &[(String, Notebook)]) -> Result<Vec<Finding>> {
    if notebooks.is_empty() {
        return Ok(Vec::new());
    }
    let first = Run::new(checkout, notebooks, &BTreeMap::new())?;
    if first.borrowing.is_empty() {
        return Ok(first.findings);
    }
    // A variable that borrows may be used up in its own cell; then evcxr does not keep it. Only
    // the compiler knows: it is asked again with the test at the end of the cell.
    let second = Run::new(checkout, notebooks, &first.borrowing)?;
    let mut findings = second.findings;
    findings.extend(first.findings.into_iter().filter(|f| !is_keep(f)));
    drop_repeats(&mut findings);
    Ok(findings)
}

/// Variables that borrow, by module.
type Borrowing = BTreeMap<String, Variables>;

/// One `cargo check`, and what it found.
struct Run<'a> {
    notebooks: BTreeMap<String, &'a (String, Notebook)>,
    modules: Modules,
    findings: Vec<Finding>,
    borrowing: Borrowing,
}

/// A variable: its module, its cell, its name.
type Variable = (String, (usize, String));

/// What a message of the compiler means for the author of a notebook.
enum Meaning {
    /// An error.
    Error(Finding),
    /// A variable is used up in its own cell: evcxr forgets it, and all is well.
    UsedUp(Variable),
    /// A variable borrows: evcxr cannot keep it, unless it is used up.
    Borrows(Variable, Finding),
    /// Nothing.
    Nothing,
}

/// A place in a notebook.
#[derive(Clone, Copy)]
struct Place<'a> {
    module: &'a str,
    origin: &'a Origin,
    span: &'a Span,
    solved: bool,
}

impl<'a> Run<'a> {
    fn new(
        checkout: &Checkout,
        notebooks: &'a [(String, Notebook)],
        late: &Borrowing,
    ) -> Result<Self> {
        let mut run = Self {
            notebooks: BTreeMap::new(),
            modules: Modules::new(),
            findings: Vec::new(),
            borrowing: Borrowing::new(),
        };
        let none = Variables::new();
        for named in notebooks {
            let (label, notebook) = named;
            let name = module_name(notebook);
            let (module, problems) =
                source::generate(notebook, Purpose::Check(late.get(&name).unwrap_or(&none)));
            let problems = problems.into_iter();
            run.findings
                .extend(problems.map(|problem| problem.into_finding(label, notebook)));
            run.modules.insert(name.clone(), module);
            run.notebooks.insert(name, named);
        }
        let verdict = cargo::check(checkout, &run.modules)?;
        run.judge(&verdict);
        Ok(run)
    }

    /// Turns the compiler's messages into findings.
    fn judge(&mut self, verdict: &Verdict) {
        let mut explained = false;
        for text in &verdict.elsewhere {
            explained = true;
            self.findings.push(Finding {
                message: format!("outside the notebooks: {text}"),
                ..Finding::default()
            });
        }
        let mut used_up = BTreeSet::new();
        let mut borrowing = Vec::new();
        for diagnostic in &verdict.notebooks {
            explained = true;
            match self.meaning(diagnostic) {
                Meaning::Error(finding) => self.findings.push(finding),
                Meaning::UsedUp(variable) => drop(used_up.insert(variable)),
                Meaning::Borrows(variable, finding) => borrowing.push((variable, finding)),
                Meaning::Nothing => {}
            }
        }
        borrowing.retain(|(variable, _)| !used_up.contains(variable));
        for ((module, variable), finding) in borrowing {
            self.borrowing.entry(module).or_default().insert(variable);
            self.findings.push(finding);
        }
        if !verdict.success && !explained {
            self.findings.push(Finding {
                message: format!("cargo check failed:\n{}", verdict.stderr.trim_end()),
                ..Finding::default()
            });
        }
        drop_repeats(&mut self.findings);
    }

    /// What a message means for the author of the notebook.
    fn meaning(&self, diagnostic: &Diagnostic) -> Meaning {
        let spans = diagnostic.spans.iter();
        let places: Vec<_> = spans.filter_map(|span| self.place(span)).collect();
        let ask = places.iter().find_map(|place| match &place.origin.role {
            Role::Ask(variable, column) => Some((place, variable, *column)),
            _ => None,
        });
        if let Some((place, variable, column)) = ask {
            let moved = code(diagnostic) == MOVED;
            let taken = places
                .iter()
                .find(|other| moved && lies_in_tail(other, place, column));
            return taken.map_or(Meaning::Nothing, |taken| {
                Meaning::Error(self.not_shown(taken, variable))
            });
        }
        let keep = places.iter().find_map(|place| match &place.origin.role {
            Role::Keep(variable) => Some((place, variable)),
            _ => None,
        });
        let code = code(diagnostic);
        let Some((place, name)) = keep else {
            return Meaning::Error(self.ordinary(diagnostic, &places));
        };
        let variable = (place.module.to_owned(), (place.origin.cell, name.clone()));
        if code == MOVED {
            Meaning::UsedUp(variable)
        } else if BORROW_ERRORS.contains(&code) {
            Meaning::Borrows(variable, self.keep_finding(place, name, &places))
        } else {
            Meaning::Error(self.ordinary(diagnostic, &places))
        }
    }

    /// Where in a notebook a span lies; inside a macro, where the macro is called.
    fn place<'b>(&'b self, span: &'b Span) -> Option<Place<'b>> {
        span.chain().find_map(|span| {
            let name = span.file_name.strip_prefix("src/")?.strip_suffix(".rs")?;
            let (module, found) = self.modules.get_key_value(name)?;
            Some(Place {
                module,
                origin: found.origin(span.line_start)?,
                span,
                solved: found.is_solved(span.line_start),
            })
        })
    }

    /// Any other error.
    fn ordinary(&self, diagnostic: &Diagnostic, places: &[Place<'_>]) -> Finding {
        let main = places
            .iter()
            .find(|place| place.span.is_primary)
            .or_else(|| places.first());
        let Some(main) = main else {
            return self.placeless(diagnostic);
        };
        let mut finding = self.at(main);
        if main.origin.role == Role::Show && code(diagnostic) == "E0599" {
            finding.message = cannot_be_shown(&diagnostic.message);
            return finding;
        }
        if main.origin.role == Role::Show && code(diagnostic) == AMBIGUOUS {
            finding.message = NO_VALUE.to_owned();
            return finding;
        }
        finding.message = headline(diagnostic);
        let mut ordered: Vec<_> = places.iter().collect();
        ordered.sort_by_key(|place| !std::ptr::eq(*place, main));
        for place in ordered {
            let label = place.span.label.as_deref().unwrap_or_default();
            if place.origin.role != Role::Source {
                continue;
            }
            if (place.module, place.origin) == (main.module, main.origin) {
                finding.marks.push(self.mark(place, label));
            } else if !label.is_empty() {
                let (cell, line) = (place.origin.cell, place.origin.line);
                finding
                    .notes
                    .push(format!("cell {cell}, line {line}: {label}"));
            }
        }
        let children = diagnostic.children.iter();
        finding
            .notes
            .extend(children.filter_map(|child| self.note(child)));
        finding
    }

    /// A note or help. One that speaks of generated lines says nothing to an author.
    fn note(&self, child: &Diagnostic) -> Option<String> {
        let generated = |place: Place<'_>| place.origin.role != Role::Source;
        let mut places = child.spans.iter().filter_map(|span| self.place(span));
        if places.any(generated) || child.message.contains("support::") {
            return None;
        }
        let mut text = format!("{}: {}", child.level, child.message);
        if let [span] = child.spans.as_slice()
            && let Some(replacement) = &span.suggested_replacement
            && !replacement.trim().is_empty()
            && let Some(place) = self.place(span)
        {
            let (cell, line) = (place.origin.cell, place.origin.line);
            text += &format!(": `{}` (cell {cell}, line {line})", replacement.trim());
        }
        Some(text)
    }

    /// An error that points at no line of a cell: nothing may get lost.
    fn placeless(&self, diagnostic: &Diagnostic) -> Finding {
        let name = diagnostic.spans.iter().find_map(|span| {
            let name = span.file_name.strip_prefix("src/")?.strip_suffix(".rs")?;
            self.notebooks.get(name)
        });
        let rendered = diagnostic.rendered.as_deref();
        Finding {
            notebook: name.map(|(label, _)| label.clone()),
            message: rendered.map_or_else(|| headline(diagnostic), |r| r.trim_end().to_owned()),
            ..Finding::default()
        }
    }

    /// evcxr would not keep a variable, because it borrows.
    fn keep_finding(&self, keep: &Place<'_>, variable: &str, places: &[Place<'_>]) -> Finding {
        let mut finding = self.at(keep);
        finding.message = format!("error: `{variable}` {BORROWS}");
        let borrowed = places.iter().find(|place| {
            place.origin.role == Role::Source
                && (place.origin.cell, place.origin.line) == (keep.origin.cell, keep.origin.line)
        });
        if let Some(place) = borrowed {
            finding.marks.push(self.mark(place, "borrowed here"));
        }
        finding.notes.push(format!(
            "help: let `{variable}` own its value (`.clone()`, `.to_owned()`), or put the code \
             that needs it in braces"
        ));
        finding
    }

    /// A cell's last expression is not shown as its type wants it.
    fn not_shown(&self, taken: &Place<'_>, variable: &str) -> Finding {
        Finding {
            message: format!(
                "error: the cell's last expression moves `{variable}`, and evcxr shows a value by \
                 its `Debug` text instead of its own display when making it moves a variable. \
                 Borrow or clone `{variable}`, or bind the value with `let` and end the cell with \
                 its name; where nothing is to be seen, append `;`"
            ),
            marks: vec![self.mark(taken, "moved here")],
            ..self.at(taken)
        }
    }

    /// A finding at a place, still without its message.
    fn at(&self, place: &Place<'_>) -> Finding {
        let Origin { cell, line, .. } = *place.origin;
        let named = self.notebooks.get(place.module);
        Finding {
            notebook: named.map(|(label, _)| label.clone()),
            cell: Some(cell),
            line: Some(line),
            source: named.and_then(|(_, n)| source_line(n, Some(cell), Some(line))),
            notes: solved_note(place.solved),
            ..Finding::default()
        }
    }

    /// The part of a line that a span covers.
    fn mark(&self, place: &Place<'_>, label: &str) -> Mark {
        let span = place.span;
        let start = span.column_start.saturating_sub(1);
        let end = if span.line_start == span.line_end {
            span.column_end.saturating_sub(1)
        } else {
            let named = self.notebooks.get(place.module);
            let (cell, line) = (Some(place.origin.cell), Some(place.origin.line));
            let text = named.and_then(|(_, notebook)| source_line(notebook, cell, line));
            text.map_or(start, |text| text.trim_end().chars().count())
        };
        Mark {
            start,
            end,
            label: label.to_owned(),
        }
    }
}

/// The compiler's errors about a borrow that lasts too long. Here it lasts for ever, since evcxr
/// keeps variables.
const BORROW_ERRORS: [&str; 9] = [
    "E0499", "E0502", "E0503", "E0505", "E0506", "E0515", "E0521", "E0597", "E0716",
];

/// The compiler's error about a value that was moved away.
const MOVED: &str = "E0382";

/// The compiler's error about a method that two traits have: `().evcxr_display()` has.
const AMBIGUOUS: &str = "E0034";

/// What is wrong with a last expression of type `()`.
const NO_VALUE: &str = "error: the cell ends with an expression that has no value: evcxr compiles \
                        the cell twice and prints `()`. Append `;`";

/// What marks a finding about a variable that borrows.
const BORROWS: &str = "borrows from another variable, and evcxr cannot keep it for later cells";

/// What marks a finding of the function with the solutions.
const SOLVED: &str = "note: with the solutions in place of the starters";

/// Whether a place lies in the expression at the end of the cell of `ask`, which begins in the
/// line of `ask` at `column`, from 0.
fn lies_in_tail(place: &Place<'_>, ask: &Place<'_>, column: usize) -> bool {
    let (origin, tail) = (place.origin, ask.origin);
    let here = (origin.line, place.span.column_start);
    origin.role == Role::Source
        && place.solved == ask.solved
        && origin.cell == tail.cell
        && here > (tail.line, column)
}

fn is_keep(finding: &Finding) -> bool {
    finding.message.contains(BORROWS)
}

fn solved_note(solved: bool) -> Vec<String> {
    solved.then(|| SOLVED.to_owned()).into_iter().collect()
}

/// Removes findings of the function with the solutions that the plain one has as well, and
/// several about one variable.
fn drop_repeats(findings: &mut Vec<Finding>) {
    let key = |f: &Finding| (f.notebook.clone(), f.cell, f.line, f.message.clone());
    let mut seen = Vec::new();
    // Those without the note come first, and stay.
    findings.sort_by_key(|finding| finding.notes.iter().any(|note| note == SOLVED));
    findings.retain(|finding| {
        let place = finding.cell.is_some();
        let is_new = !place
            || !seen.iter().any(|(k, marks)| {
                *k == key(finding) && (is_keep(finding) || *marks == finding.marks)
            });
        seen.push((key(finding), finding.marks.clone()));
        is_new
    });
}

/// `error[E0308]: mismatched types`.
fn headline(diagnostic: &Diagnostic) -> String {
    let code = diagnostic
        .code
        .as_ref()
        .map(|code| format!("[{}]", code.code));
    format!(
        "{}{}: {}",
        diagnostic.level,
        code.unwrap_or_default(),
        diagnostic.message
    )
}

/// The code of an error, such as `E0308`.
fn code(diagnostic: &Diagnostic) -> &str {
    diagnostic.code.as_ref().map_or("", |code| &code.code)
}

/// The last expression has a type that evcxr cannot show.
fn cannot_be_shown(message: &str) -> String {
    // "`S` doesn't implement `Debug`", or "the method `evcxr_display` exists for struct `S`, …".
    let names: Vec<_> = message.split('`').skip(1).step_by(2).collect();
    let kind = names
        .into_iter()
        .find(|name| *name != "evcxr_display")
        .unwrap_or("its type");
    format!(
        "error: the cell's last expression cannot be shown: `{kind}` is not `Debug`. \
         End the line with `;`, or show something else"
    )
}

/// The module of a notebook: `nb_` and the file's name.
pub(super) fn module_name(notebook: &Notebook) -> String {
    let name = notebook.name();
    let stem = name.trim_end_matches(".ipynb").chars();
    let stem = stem.map(|c| if c.is_ascii_alphanumeric() { c } else { '_' });
    format!("nb_{}", stem.collect::<String>())
}

#[cfg(test)]
mod tests;
