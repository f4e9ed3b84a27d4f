//! From cells to Rust: one module per notebook, every line of which remembers its cell.
//!
//! A notebook becomes a function whose cells are nested blocks, so that a later cell sees the
//! variables and items of the earlier ones and its own items shadow theirs:
//!
//! ```text
//! fn notebook() -> Result<(), CellError> {
//! {
//! let a = 1;                      // cell 1, word for word
//! crate::support::keeps(&a);      // evcxr keeps `a`: it must own what it holds
//! {
//! let shown_ = (                  // cell 2 ends with an expression, which evcxr shows
//! a + 1
//! ).evcxr_display();
//! if crate::support::maybe() && shown_.by_type() {  // by a display of the type's own …
//! crate::support::asks(&a);       // … unless making the value moves a variable
//! }
//! Ok(())
//! }}
//! }
//! ```
//!
//! Two differences from evcxr are accepted: a function of an earlier cell goes on calling the
//! functions that it was compiled with after a later cell has redefined them, and the type of a
//! variable may be settled by a later cell. Running the notebook finds both.

use super::{Problem, commands, first_rust_line};
use crate::notebook::{Cell, Notebook};
use anyhow::Result;
use proc_macro2::{LineColumn, Span};
use std::collections::BTreeSet;
use syn::parse::{ParseStream, Parser};
use syn::spanned::Spanned;
use syn::{Attribute, Block, Expr, Local, Pat, Stmt};

/// Variables by cell and name.
pub type Variables = BTreeSet<(usize, String)>;

/// The module of one notebook.
#[derive(Debug, Default)]
pub struct Module {
    /// Its text.
    pub text: String,
    /// Where each line comes from; `None` for a line that belongs to no cell.
    lines: Vec<Option<Origin>>,
    /// The first line (from 0) of the function in which the solutions replace the starters.
    solved: Option<usize>,
}

/// Where a line of generated code comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// The cell, from 1.
    pub cell: usize,
    /// The line in it, from 1.
    pub line: usize,
    /// What the generated line is for.
    pub role: Role,
}

/// What a generated line is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// The cell's own text, at its own columns.
    Source,
    /// Stands for evcxr's display of the cell's last expression.
    Show,
    /// Stands for evcxr's keeping of a variable.
    Keep(String),
    /// Asks whether a variable is still there after a last expression with a display of its own,
    /// which begins at this column, from 0, of the origin's line.
    Ask(String, usize),
}

/// Rust code to compile, and where it is from.
struct Piece<'a> {
    cell: &'a Cell,
    first_line: usize,
    source: String,
}

/// What the syntax of a cell tells.
#[derive(Debug, Default)]
struct Syntax {
    /// The text, with commands and inner attributes blanked.
    text: String,
    /// The last expression, if evcxr would show it.
    tail: Option<Tail>,
    /// The variables that the cell leaves behind.
    variables: Vec<Variable>,
    /// What evcxr would refuse: span and reason.
    refused: Vec<(Span, String)>,
}

/// The expression at the end of a cell.
#[derive(Debug)]
struct Tail {
    /// Where it begins.
    start: LineColumn,
    /// Its text.
    text: String,
}

/// A variable that a cell leaves behind.
#[derive(Debug, PartialEq)]
struct Variable {
    name: String,
    line: usize,
    /// Where its `let` ends.
    end: LineColumn,
}

/// A generated line to put between the cell's own.
struct Insertion {
    at: LineColumn,
    text: String,
    line: usize,
    role: Role,
}

/// What a module is generated for.
#[derive(Debug, Clone, Copy)]
pub enum Purpose<'a> {
    /// To be judged by the compiler, which is asked what evcxr would do; the exercises' solutions
    /// too. The variables of the set are tested at the end of their cell, not at their `let`.
    Check(&'a Variables),
    /// To run.
    Program,
}

/// Generates the module of a notebook.
pub fn generate(notebook: &Notebook, purpose: Purpose<'_>) -> (Module, Vec<Problem>) {
    let mut module = Module::default();
    let mut problems = Vec::new();
    let traits = match purpose {
        Purpose::Check(_) => "use crate::support::{ByType as _, Shown as _, Unit as _};",
        Purpose::Program => "use crate::support::Shown as _;",
    };
    module.push(traits, None);
    module.function("notebook", &pieces(notebook), purpose, &mut problems);
    // An exercise that is not complete is a matter for the lint.
    if let (Purpose::Check(_), Ok(Some(solved))) = (purpose, solved_pieces(notebook)) {
        module.solved = Some(module.lines.len());
        module.function("solved", &solved, purpose, &mut problems);
    }
    (module, problems)
}

/// The code cells as they stand.
fn pieces(notebook: &Notebook) -> Vec<Piece<'_>> {
    let piece = |cell| Piece {
        cell,
        first_line: 1,
        source: cell.source.clone(),
    };
    notebook.code().map(piece).collect()
}

/// The code cells with each starter replaced by its solution; `None` without exercises.
fn solved_pieces(notebook: &Notebook) -> Result<Option<Vec<Piece<'_>>>> {
    let exercises = notebook.exercises()?;
    let mut pieces = pieces(notebook);
    for exercise in &exercises {
        let (rust, cell) = &exercise.solution;
        for piece in &mut pieces {
            if piece.cell.number == exercise.starter.number {
                *piece = Piece {
                    cell,
                    first_line: first_rust_line(&cell.source),
                    source: rust.clone(),
                };
            }
        }
    }
    Ok((!exercises.is_empty()).then_some(pieces))
}

impl Module {
    /// Where a line (from 1) of the text comes from.
    pub fn origin(&self, line: usize) -> Option<&Origin> {
        self.lines.get(line.checked_sub(1)?)?.as_ref()
    }

    /// Whether a line (from 1) lies in the function with the solutions.
    pub fn is_solved(&self, line: usize) -> bool {
        self.solved.is_some_and(|first| line > first)
    }

    fn push(&mut self, text: &str, origin: Option<Origin>) {
        self.text.push_str(text);
        self.text.push('\n');
        self.lines.push(origin);
    }

    /// A function of all pieces, up to the first that cannot be parsed.
    fn function(
        &mut self,
        name: &str,
        pieces: &[Piece<'_>],
        purpose: Purpose<'_>,
        problems: &mut Vec<Problem>,
    ) {
        let head = "() -> ::core::result::Result<(), crate::support::CellError> {";
        self.push(&format!("pub fn {name}{head}"), None);
        let mut blocks = 0;
        let mut sound = true;
        let mut known = BTreeSet::new();
        for piece in pieces {
            match Syntax::of(&piece.source) {
                Ok(syntax) => {
                    let refused = syntax.refused.iter();
                    problems.extend(refused.map(|(span, why)| piece.problem(*span, why)));
                    let variables = syntax.variables.iter();
                    known.extend(variables.map(|variable| variable.name.clone()));
                    if sound {
                        self.cell(piece, &syntax, purpose, &known);
                        blocks += 1;
                    }
                }
                Err(error) => {
                    problems.push(piece.syntax_error(&error));
                    sound = false;
                }
            }
        }
        self.push("::core::result::Result::Ok(())", None);
        self.push(&"}".repeat(blocks + 1), None);
    }

    /// Opens a block and puts a cell into it; the block stays open for the next cells.
    /// `known` are the variables of this and the earlier cells.
    fn cell(
        &mut self,
        piece: &Piece<'_>,
        syntax: &Syntax,
        purpose: Purpose<'_>,
        known: &BTreeSet<String>,
    ) {
        self.push("{", None);
        let insertions = insertions(piece, syntax, purpose, known);
        for (index, line) in syntax.text.lines().enumerate() {
            let here = insertions.iter().filter(|i| i.at.line == index + 1);
            self.source_line(piece, index, line, here);
        }
        let end = syntax.text.lines().count();
        for insertion in insertions.iter().filter(|i| i.at.line > end) {
            self.push(&insertion.text, Some(piece.origin(insertion)));
        }
    }

    /// A line of a cell, cut where something is to be put in between. Every part keeps its
    /// columns.
    fn source_line<'a>(
        &mut self,
        piece: &Piece<'_>,
        index: usize,
        line: &str,
        insertions: impl Iterator<Item = &'a Insertion>,
    ) {
        let origin = Origin {
            cell: piece.cell.number,
            line: piece.first_line + index,
            role: Role::Source,
        };
        let characters: Vec<char> = line.chars().collect();
        let part = |start: usize, end: usize| -> String {
            let end = end.min(characters.len());
            let text = characters.get(start..end).unwrap_or_default();
            let indent = std::iter::repeat_n(' ', start);
            indent.chain(text.iter().copied()).collect()
        };
        let mut start = 0;
        for insertion in insertions {
            let before = part(start, insertion.at.column);
            if !before.trim().is_empty() {
                self.push(&before, Some(origin.clone()));
            }
            self.push(&insertion.text, Some(piece.origin(insertion)));
            start = insertion.at.column;
        }
        let rest = part(start, characters.len());
        if start == 0 || !rest.trim().is_empty() {
            self.push(&rest, Some(origin));
        }
    }
}

/// What is put between the lines of a cell, in order.
fn insertions(
    piece: &Piece<'_>,
    syntax: &Syntax,
    purpose: Purpose<'_>,
    known: &BTreeSet<String>,
) -> Vec<Insertion> {
    let end = LineColumn {
        line: syntax.text.lines().count() + 1,
        column: 0,
    };
    let mut insertions = Vec::new();
    if let Some(tail) = &syntax.tail {
        let mut insert = |at: LineColumn, text: &str, role: Role| {
            insertions.push(Insertion {
                at,
                text: text.to_owned(),
                line: tail.start.line,
                role,
            });
        };
        insert(tail.start, OPEN, Role::Show);
        insert(end, ").evcxr_display();", Role::Show);
        let mentioned = |name: &&String| mentions(&tail.text, name);
        let asks = matches!(purpose, Purpose::Check(_));
        let asked: Vec<_> = known.iter().filter(|_| asks).filter(mentioned).collect();
        if !asked.is_empty() {
            insert(
                end,
                "if crate::support::maybe() && shown_.by_type() {",
                Role::Show,
            );
            for name in asked {
                let role = Role::Ask(name.clone(), tail.start.column);
                insert(end, &format!("crate::support::asks(&{name});"), role);
            }
            insert(end, "}", Role::Show);
        }
    }
    if let Purpose::Check(late) = purpose {
        for variable in &syntax.variables {
            let is_late = late.contains(&(piece.cell.number, variable.name.clone()));
            insertions.push(Insertion {
                at: if is_late { end } else { variable.end },
                text: format!("crate::support::keeps(&{});", variable.name),
                line: variable.line,
                role: Role::Keep(variable.name.clone()),
            });
        }
    }
    // Stable: at one place, the end of the tail comes before the variables kept late, and a
    // `let` ends before the tail begins.
    insertions.sort_by_key(|i| (i.at.line, i.at.column, i.text == OPEN));
    insertions
}

/// What opens the expression that is shown.
const OPEN: &str = "let shown_ = (";

impl Piece<'_> {
    fn origin(&self, insertion: &Insertion) -> Origin {
        Origin {
            cell: self.cell.number,
            line: self.first_line + insertion.line - 1,
            role: insertion.role.clone(),
        }
    }

    fn problem(&self, span: Span, message: &str) -> Problem {
        let (start, end) = (span.start(), span.end());
        let line = start.line.max(1);
        let text = self.source.lines().nth(line - 1).unwrap_or_default();
        let end = if end.line == start.line {
            end.column
        } else {
            text.chars().count()
        };
        Problem {
            columns: Some((start.column, end)),
            ..Problem::line(self.cell, self.first_line + line - 1, message)
        }
    }

    fn syntax_error(&self, error: &syn::Error) -> Problem {
        let message = format!("syntax: {error}");
        // The end of the text has no place of its own: the last line stands for it.
        if error.span().start() == error.span().end() {
            let last = self.source.trim_end().lines().count().max(1);
            return Problem::line(self.cell, self.first_line + last - 1, message);
        }
        self.problem(error.span(), &message)
    }
}

impl Syntax {
    /// Parses a cell.
    fn of(source: &str) -> syn::Result<Self> {
        let mut text = blank_commands(source);
        let (attributes, statements) = parse_cell.parse_str(&text)?;
        for attribute in &attributes {
            text = blank(&text, attribute.span());
        }
        let mut syntax = Self {
            text,
            ..Self::default()
        };
        syntax.tail = statements.last().and_then(shown).map(|start| Tail {
            start,
            text: after(&syntax.text, start),
        });
        for statement in &statements {
            if let Stmt::Local(local) = statement {
                let rest = after(&syntax.text, local.semi_token.span.end());
                syntax.refused.extend(refusal(local, &rest));
                syntax.leave(local);
            }
        }
        Ok(syntax)
    }

    /// Notes the variables of a `let`; one that was declared before in the cell is replaced.
    fn leave(&mut self, local: &Local) {
        let mut names = Vec::new();
        bound(&local.pat, &mut names);
        for name in names {
            self.variables.retain(|old| old.name != name);
            // Without a value there is nothing to test yet.
            if local.init.is_some() {
                self.variables.push(Variable {
                    name,
                    line: local.let_token.span.start().line,
                    end: local.semi_token.span.end(),
                });
            }
        }
    }
}

fn parse_cell(input: ParseStream<'_>) -> syn::Result<(Vec<Attribute>, Vec<Stmt>)> {
    Ok((
        input.call(Attribute::parse_inner)?,
        input.call(Block::parse_within)?,
    ))
}

/// The text with evcxr's commands replaced by empty lines.
fn blank_commands(source: &str) -> String {
    let commands = commands(source);
    let lines = source.lines().enumerate();
    let kept = lines.map(|(i, line)| if commands.contains(&i) { "" } else { line });
    kept.collect::<Vec<_>>().join("\n")
}

/// The text with the characters of a span replaced by spaces.
fn blank(text: &str, span: Span) -> String {
    let (start, end) = (span.start(), span.end());
    let inside = |line: usize, column: usize| {
        (start.line, start.column) <= (line, column) && (line, column) < (end.line, end.column)
    };
    let lines = text.lines().enumerate().map(|(index, line)| {
        let characters = line.chars().enumerate();
        let blanked = characters.map(|(column, c)| if inside(index + 1, column) { ' ' } else { c });
        blanked.collect::<String>()
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// Where a cell's last statement begins, if it is an expression that evcxr shows.
fn shown(last: &Stmt) -> Option<LineColumn> {
    let is_shown = match last {
        Stmt::Expr(_, None) => true,
        Stmt::Macro(statement) => statement.semi_token.is_none(),
        _ => false,
    };
    is_shown.then(|| last.span().start())
}

/// The names that a pattern binds.
fn bound(pattern: &Pat, names: &mut Vec<String>) {
    match pattern {
        Pat::Ident(pattern) => {
            let name = pattern.ident.to_string();
            // `None` and constants look like variables.
            if !name.starts_with(char::is_uppercase) {
                names.push(name);
            }
            if let Some((_, inner)) = &pattern.subpat {
                bound(inner, names);
            }
        }
        Pat::Type(pattern) => bound(&pattern.pat, names),
        Pat::Paren(pattern) => bound(&pattern.pat, names),
        Pat::Reference(pattern) => bound(&pattern.pat, names),
        Pat::Tuple(pattern) => pattern.elems.iter().for_each(|p| bound(p, names)),
        Pat::TupleStruct(pattern) => pattern.elems.iter().for_each(|p| bound(p, names)),
        Pat::Slice(pattern) => pattern.elems.iter().for_each(|p| bound(p, names)),
        Pat::Struct(pattern) => pattern.fields.iter().for_each(|f| bound(&f.pat, names)),
        Pat::Or(pattern) => pattern.cases.iter().take(1).for_each(|p| bound(p, names)),
        _ => {}
    }
}

/// What evcxr would refuse in a `let` at the top level, by its syntax alone.
fn refusal(local: &Local, rest: &str) -> Option<(Span, String)> {
    let Pat::Ident(name) = &local.pat else {
        return None;
    };
    let value = &*local.init.as_ref()?.expr;
    let name = name.ident.to_string();
    if is_closure(value) {
        let message = format!(
            "evcxr cannot keep the closure `{name}` for later cells: write a `fn`, box it \
             (`let {name}: Box<dyn Fn(…) -> …> = Box::new(…);`), or put the code in braces"
        );
        return Some((value.span(), message));
    }
    if is_untyped(value) && !mentions(rest, &name) {
        let message = format!(
            "evcxr settles the type of `{name}` in this cell, and nothing here says what it \
             holds: write the type, as in `let {name}: Vec<f32> = …`"
        );
        return Some((value.span(), message));
    }
    None
}

fn is_closure(value: &Expr) -> bool {
    match value {
        Expr::Closure(_) => true,
        Expr::Paren(value) => is_closure(&value.expr),
        _ => false,
    }
}

/// Whether a value is an empty collection that does not name its type.
fn is_untyped(value: &Expr) -> bool {
    const COLLECTIONS: [&str; 6] = [
        "Vec", "VecDeque", "HashMap", "HashSet", "BTreeMap", "BTreeSet",
    ];
    const CONSTRUCTORS: [&str; 3] = ["new", "with_capacity", "default"];
    match value {
        Expr::Macro(value) => value.mac.path.is_ident("vec") && value.mac.tokens.is_empty(),
        Expr::Path(value) => value.path.is_ident("None"),
        Expr::Call(call) => {
            let Expr::Path(function) = &*call.func else {
                return false;
            };
            let mut segments = function.path.segments.iter().rev();
            let (Some(method), Some(kind)) = (segments.next(), segments.next()) else {
                return false;
            };
            CONSTRUCTORS.iter().any(|known| method.ident == known)
                && COLLECTIONS.iter().any(|known| kind.ident == known)
                && kind.arguments.is_empty()
        }
        _ => false,
    }
}

/// The text from a place on.
fn after(text: &str, place: LineColumn) -> String {
    let mut lines = text.lines().skip(place.line - 1);
    let first = lines.next().unwrap_or_default();
    let rest: String = first.chars().skip(place.column).collect();
    let lines: Vec<_> = std::iter::once(rest.as_str()).chain(lines).collect();
    lines.join("\n")
}

/// Whether a text names a variable.
fn mentions(text: &str, name: &str) -> bool {
    let words = text.split(|c: char| !c.is_alphanumeric() && c != '_');
    words.into_iter().any(|word| word == name)
}

#[cfg(test)]
mod tests;
