//! What every lesson must have. Each rule is a function from a lesson to its problems, and each
//! message says what to do.

use super::{Problem, commands, first_rust_line};
use crate::notebook::{Cell, DISPLAYED, Kind, Notebook, joined, prose_lines};
use crate::teaching;
use anyhow::{Context, Result};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;

/// The one dependency of a notebook, word for word.
const DEP: &str = ":dep course = { path = \"../crates/course\" }";

/// The tags that mean something.
const TAGS: [&str; 4] = ["figure", "timing", "stderr-ok", teaching::TAG];

/// The beginnings of the tags of an exercise.
const EXERCISE_TAGS: [&str; 3] = ["starter-", "check-", "solution-"];

/// Lines of a code cell, at most.
const LINES: usize = 25;

/// Columns of a line of code, at most.
const COLUMNS: usize = 90;

/// Code cells in a row without prose, at most.
const WITHOUT_PROSE: usize = 2;

/// Words that describe a figure, at least.
const FIGURE_WORDS: usize = 12;

/// Exercises of a lesson, at least.
const EXERCISES: usize = 2;

/// Beginnings of absolute paths that only one machine has.
const MACHINE_PATHS: [&str; 4] = ["/home/", "/root/", "/work/", "/Users/"];

/// A notebook and its JSON, for what [`Notebook`] leaves out.
struct Lesson<'a> {
    notebook: &'a Notebook,
    json: Value,
}

type Rule = fn(&Lesson<'_>) -> Vec<Problem>;

/// All rules.
const RULES: [Rule; 16] = [
    file_name,
    format,
    kernelspec,
    title,
    opening,
    closing,
    dependency,
    no_other_command,
    no_empty_cell,
    size,
    prose,
    figures,
    exercises,
    teacher,
    tags,
    machine_paths,
];

/// Checks the structure of a lesson, then its outputs.
pub(super) fn lint(notebook: &Notebook) -> Result<Vec<Problem>> {
    let path = &notebook.path;
    let text =
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let json = serde_json::from_str(&text)?;
    let lesson = Lesson { notebook, json };
    let mut problems: Vec<_> = RULES.iter().flat_map(|rule| rule(&lesson)).collect();
    problems.extend(outputs(&lesson));
    Ok(problems)
}

impl Lesson<'_> {
    /// The cells of a kind.
    fn cells(&self, kind: Kind) -> impl Iterator<Item = &Cell> {
        self.notebook
            .cells
            .iter()
            .filter(move |cell| cell.kind == kind)
    }

    /// The Markdown cells before the first code cell.
    fn opening(&self) -> impl Iterator<Item = &Cell> {
        let before = self
            .notebook
            .cells
            .iter()
            .take_while(|cell| cell.kind != Kind::Code);
        before.filter(|cell| cell.kind == Kind::Markdown)
    }

    /// The JSON of a cell.
    fn json(&self, cell: &Cell) -> &Value {
        &self.json["cells"][cell.number - 1]
    }

    /// The outputs of a cell.
    fn outputs(&self, cell: &Cell) -> impl Iterator<Item = &Value> {
        self.json(cell)["outputs"].as_array().into_iter().flatten()
    }
}

/// The file is named `NN_topic.ipynb`.
fn file_name(lesson: &Lesson<'_>) -> Vec<Problem> {
    let name = lesson.notebook.name();
    let topic = match name
        .strip_suffix(".ipynb")
        .and_then(|stem| stem.split_once('_'))
    {
        Some((number, topic)) if number.len() == 2 && lesson.notebook.lesson() == number => topic,
        _ => "",
    };
    let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    if !topic.is_empty() && topic.chars().all(good) {
        return Vec::new();
    }
    vec![Problem::whole(
        "name the file NN_topic.ipynb: two digits, then lower-case words joined by _",
    )]
}

/// Format 4.5, in which each cell has an id of its own.
fn format(lesson: &Lesson<'_>) -> Vec<Problem> {
    let version = (
        lesson.json["nbformat"].as_u64(),
        lesson.json["nbformat_minor"].as_u64(),
    );
    let mut problems = Vec::new();
    if !matches!(version, (Some(4), Some(5..))) {
        problems.push(Problem::whole(
            "save the notebook in format 4.5 or later of version 4",
        ));
    }
    let mut seen = BTreeSet::new();
    for cell in &lesson.notebook.cells {
        let id = lesson.json(cell)["id"].as_str().unwrap_or_default();
        if id.is_empty() {
            problems.push(Problem::cell(
                cell,
                "the cell has no id: open and save the notebook",
            ));
        } else if !seen.insert(id) {
            problems.push(Problem::cell(
                cell,
                format!("another cell has the id {id} too"),
            ));
        }
    }
    problems
}

/// The kernel is the course's.
fn kernelspec(lesson: &Lesson<'_>) -> Vec<Problem> {
    let name = &lesson.notebook.metadata["kernelspec"]["name"];
    if name == "rust" {
        return Vec::new();
    }
    vec![Problem::whole(
        "the kernel (metadata.kernelspec.name) must be `rust`",
    )]
}

/// The first cell holds the only heading of the first level.
fn title(lesson: &Lesson<'_>) -> Vec<Problem> {
    let titles: Vec<_> = lesson
        .cells(Kind::Markdown)
        .flat_map(|cell| prose_lines(&cell.source).map(move |(line, text)| (cell, line, text)))
        .filter(|(_, _, text)| text.starts_with("# "))
        .collect();
    if titles.first().is_none_or(|(cell, _, _)| cell.number != 1) {
        return vec![Problem::whole(
            "the first cell must be Markdown with the title, `# …`",
        )];
    }
    let others = titles.iter().skip(1);
    let message = "a second title: use `## …` for what comes after the first";
    others
        .map(|(cell, line, _)| Problem::line(cell, *line, message))
        .collect()
}

/// Before the first code: what is learned in three points, how long it takes, what it needs.
fn opening(lesson: &Lesson<'_>) -> Vec<Problem> {
    let text: Vec<_> = lesson.opening().map(|cell| cell.source.as_str()).collect();
    let text = text.join("\n\n");
    let lines: Vec<_> = prose_lines(&text)
        .map(|(_, line)| line.trim_end())
        .collect();
    let mut problems = Vec::new();
    match points(&lines, "What you will learn") {
        None => problems.push(Problem::whole(
            "say before the first code cell `What you will learn`, as a heading or in bold, \
             and three points in a list below",
        )),
        Some(3) => {}
        Some(other) => problems.push(Problem::whole(format!(
            "`What you will learn` wants exactly 3 points in its list, and has {other}"
        ))),
    }
    if teaching::time(lesson.notebook).is_none() {
        problems.push(Problem::whole(
            "say in the first cell how long the lesson takes, in the form \
             `**Time:** 25 minutes`",
        ));
    }
    if !lines
        .iter()
        .any(|line| field(line, "**Prerequisites:**").is_some())
    {
        problems.push(Problem::whole(
            "say before the first code cell what the lesson builds on, in the form \
             `**Prerequisites:** Rust, lesson 01`",
        ));
    }
    problems
}

/// How many points the list below a heading has.
fn points(lines: &[&str], heading: &str) -> Option<usize> {
    let is_heading = |line: &&str| line.starts_with(['#', '*']) && line.contains(heading);
    let start = lines.iter().position(is_heading)?;
    let mut points = 0;
    for line in lines[start + 1..].iter().filter(|line| !line.is_empty()) {
        if is_point(line) {
            points += 1;
        } else if !line.starts_with(' ') {
            break;
        }
    }
    Some(points)
}

/// Whether a line begins a point of a list: `- `, `* `, `1. `.
fn is_point(line: &str) -> bool {
    let number = line.trim_start_matches(|c: char| c.is_ascii_digit());
    let numbered = number.len() < line.len() && number.starts_with(". ");
    line.starts_with("- ") || line.starts_with("* ") || numbered
}

/// What follows a field such as `**Time:**`, perhaps after the mark of a list.
fn field<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    let text = line
        .trim_start_matches(['-', ' '])
        .strip_prefix(name)?
        .trim();
    (!text.is_empty()).then_some(text)
}

/// The lesson ends with a summary and with what to read next.
fn closing(lesson: &Lesson<'_>) -> Vec<Problem> {
    let has = |heading: &str| {
        let mut cells = lesson.cells(Kind::Markdown);
        cells.any(|cell| prose_lines(&cell.source).any(|(_, line)| line.trim_end() == heading))
    };
    let headings = ["## Summary", "## Read next"].into_iter();
    let missing = headings.filter(|heading| !has(heading));
    missing
        .map(|heading| Problem::whole(format!("the heading `{heading}` is missing")))
        .collect()
}

/// One `:dep`, in the first code cell, of the course crate.
fn dependency(lesson: &Lesson<'_>) -> Vec<Problem> {
    let mut found = 0;
    let mut problems = Vec::new();
    for (position, cell) in lesson.cells(Kind::Code).enumerate() {
        for (line, text) in command_lines(cell).filter(|(_, text)| is_dep(text)) {
            let message = if ["candle_core", "candle_nn", "candle-core", "candle-nn"]
                .iter()
                .any(|name| text.contains(name))
            {
                "candle as a `:dep` of its own gives wrong gradients: use course::candle_core"
                    .to_owned()
            } else if text.trim() != DEP {
                format!("the notebook's one dependency must read `{DEP}`")
            } else if position > 0 || found > 0 {
                format!("`{DEP}` belongs into the first code cell, once")
            } else {
                found += 1;
                continue;
            };
            problems.push(Problem::line(cell, line, message));
        }
    }
    if found == 0 && problems.is_empty() {
        problems.push(Problem::whole(format!(
            "the first code cell must hold `{DEP}`"
        )));
    }
    problems
}

/// The lines (from 1) of a cell that evcxr takes for commands.
fn command_lines(cell: &Cell) -> impl Iterator<Item = (usize, &str)> {
    let commands = commands(&cell.source).into_iter();
    commands.filter_map(|index| Some((index + 1, cell.source.lines().nth(index)?)))
}

fn is_dep(line: &str) -> bool {
    line.trim_start().starts_with(":dep")
}

/// No other command of evcxr.
fn no_other_command(lesson: &Lesson<'_>) -> Vec<Problem> {
    let cells = lesson.cells(Kind::Code);
    let lines = cells.flat_map(|cell| command_lines(cell).map(move |(n, text)| (cell, n, text)));
    let others = lines.filter(|(_, _, text)| !is_dep(text));
    let message = "a notebook uses no command of evcxr but its one `:dep`";
    others
        .map(|(cell, line, _)| Problem::line(cell, line, message))
        .collect()
}

/// Every cell holds something.
fn no_empty_cell(lesson: &Lesson<'_>) -> Vec<Problem> {
    let empty = lesson
        .notebook
        .cells
        .iter()
        .filter(|cell| cell.source.trim().is_empty());
    empty
        .map(|cell| Problem::cell(cell, "the cell is empty: delete it"))
        .collect()
}

/// Code stays short: the cells, and the solutions that a learner will copy.
fn size(lesson: &Lesson<'_>) -> Vec<Problem> {
    let mut problems = Vec::new();
    for cell in lesson.cells(Kind::Code) {
        problems.extend(size_of(cell, &cell.source, 1));
    }
    for exercise in lesson.notebook.exercises().unwrap_or_default() {
        let (rust, cell) = &exercise.solution;
        problems.extend(size_of(cell, rust, first_rust_line(&cell.source)));
    }
    problems
}

fn size_of(cell: &Cell, code: &str, first_line: usize) -> Vec<Problem> {
    let mut problems = Vec::new();
    let lines = code.lines().count();
    if lines > LINES {
        let message =
            format!("{lines} lines of code, and {LINES} is the most: cut the cell in two");
        problems.push(Problem::cell(cell, message));
    }
    for (index, line) in code.lines().enumerate() {
        let columns = line.chars().count();
        if columns > COLUMNS {
            let message = format!("{columns} columns, and {COLUMNS} is the most: break the line");
            problems.push(Problem::line(cell, first_line + index, message));
        }
    }
    problems
}

/// Prose comes between the code cells; the first code cell, which sets up, does not count.
fn prose(lesson: &Lesson<'_>) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut row = 0;
    let mut is_setup = true;
    for cell in &lesson.notebook.cells {
        if cell.kind == Kind::Markdown {
            row = 0;
        } else if cell.kind == Kind::Code && !std::mem::take(&mut is_setup) {
            row += 1;
            if row == WITHOUT_PROSE + 1 {
                let message = format!(
                    "more than {WITHOUT_PROSE} code cells in a row: say in a Markdown cell what \
                     comes next"
                );
                problems.push(Problem::cell(cell, message));
            }
        }
    }
    problems
}

/// At least one figure, and each is told in words beside it.
fn figures(lesson: &Lesson<'_>) -> Vec<Problem> {
    let mut problems = Vec::new();
    let figures: Vec<_> = lesson
        .cells(Kind::Code)
        .filter(|cell| cell.has("figure"))
        .collect();
    if figures.is_empty() {
        problems.push(Problem::whole(
            "no figure: tag the cell that draws one with `figure`",
        ));
    }
    for cell in figures {
        let beside = [cell.number.checked_sub(2), Some(cell.number)];
        let mut beside = beside
            .into_iter()
            .flatten()
            .filter_map(|i| lesson.notebook.cells.get(i));
        if !beside.any(tells_figure) {
            let message = format!(
                "the Markdown cell right before or after a figure must say in words what it \
                 shows: the word `Figure` and at least {FIGURE_WORDS} words"
            );
            problems.push(Problem::cell(cell, message));
        }
    }
    problems
}

fn tells_figure(cell: &Cell) -> bool {
    cell.kind == Kind::Markdown
        && cell.source.contains("Figure")
        && cell.source.split_whitespace().count() >= FIGURE_WORDS
}

/// At least two exercises, each with hint, starter, check and hidden solution.
fn exercises(lesson: &Lesson<'_>) -> Vec<Problem> {
    let exercises = match lesson.notebook.exercises() {
        Ok(exercises) => exercises,
        Err(error) => {
            // The file's name is said once, in front.
            let message = format!("{error:#}");
            let name = format!("{}: ", lesson.notebook.name());
            return vec![Problem::whole(message.trim_start_matches(&name))];
        }
    };
    let mut problems = Vec::new();
    if exercises.len() < EXERCISES {
        let message = format!(
            "{} exercises, and a lesson wants {EXERCISES}: three cells each, tagged \
             starter-NAME, check-NAME and solution-NAME",
            exercises.len()
        );
        problems.push(Problem::whole(message));
    }
    for exercise in &exercises {
        let solution = exercise.solution.1;
        if exercise.starter.kind != Kind::Code || exercise.check.kind != Kind::Code {
            problems.push(Problem::cell(
                exercise.starter,
                "starter and check must be code cells",
            ));
        }
        if !(exercise.starter.number..solution.number).contains(&exercise.check.number) {
            let message = "the order of an exercise is starter, check, solution";
            problems.push(Problem::cell(exercise.starter, message));
        }
        if solution.kind != Kind::Markdown || !is_hidden(&solution.source) {
            let message = "hide the solution: a Markdown cell with its ```rust block between \
                           <details> and </details>";
            problems.push(Problem::cell(solution, message));
        }
        if !has_hint(lesson, exercise.starter) {
            let message = "the Markdown cell before the starter must state the exercise, below \
                           `### Exercise N — …`, and fold a hint away: \
                           `<details><summary>Hint</summary>`, the hint, `</details>`";
            problems.push(Problem::cell(exercise.starter, message));
        }
    }
    problems
}

/// Whether the first block of Rust stands between `<details>` and `</details>`.
fn is_hidden(solution: &str) -> bool {
    let places = ["<details>", "```rust", "</details>"].map(|part| solution.find(part));
    matches!(places, [Some(open), Some(code), Some(close)] if open < code && code < close)
}

/// Whether the Markdown before the starter states the exercise and folds a hint away.
fn has_hint(lesson: &Lesson<'_>, starter: &Cell) -> bool {
    let before = lesson.notebook.cells.iter().take(starter.number - 1).rev();
    let mut before = before.filter(|cell| cell.kind == Kind::Markdown);
    before.next().is_some_and(|cell| {
        let places = [
            "### Exercise ",
            "<details><summary>Hint</summary>",
            "</details>",
        ];
        let places = places.map(|part| cell.source.find(part));
        matches!(places, [Some(heading), Some(open), Some(close)] if heading < open && open < close)
    })
}

/// Notes for the teacher of every kind, folded, and the minutes of every section.
fn teacher(lesson: &Lesson<'_>) -> Vec<Problem> {
    let notes = || {
        let tagged = lesson.notebook.cells.iter();
        tagged.filter(|cell| cell.has(teaching::TAG))
    };
    let mut problems = Vec::new();
    for kind in teaching::NOTES {
        if !notes().any(|cell| teaching::note(cell) == Some(kind)) {
            problems.push(Problem::whole(format!(
                "no note for the teacher of the kind `{kind}`: a Markdown cell tagged `{}`, \
                 `<details><summary>For the teacher: {kind}</summary>`, the note, `</details>`",
                teaching::TAG
            )));
        }
    }
    for cell in notes() {
        let kind = teaching::note(cell);
        if !kind.is_some_and(|kind| teaching::NOTES.contains(&kind) || kind == teaching::MINUTES) {
            let message = format!(
                "a note for the teacher begins with `<details><summary>For the teacher: \
                 KIND</summary>` and an empty line, KIND being {}, and ends with an empty line \
                 and `</details>`",
                teaching::NOTES.join(", ")
            );
            problems.push(Problem::cell(cell, message));
        }
    }
    match teaching::sections(lesson.notebook) {
        Err(error) => problems.push(Problem::whole(format!("{error:#}"))),
        Ok(sections) => {
            let stated = sections.iter().filter(|s| s.is_exercise()).count();
            let made = lesson.notebook.exercises().map_or(stated, |all| all.len());
            if stated != made {
                problems.push(Problem::whole(format!(
                    "{stated} headings `### Exercise …`, and {made} starters: give each exercise one"
                )));
            }
        }
    }
    problems
}

/// Only tags that mean something, and no part of an exercise without a starter.
fn tags(lesson: &Lesson<'_>) -> Vec<Problem> {
    let starters: BTreeSet<_> = lesson
        .notebook
        .cells
        .iter()
        .flat_map(|cell| &cell.tags)
        .filter_map(|tag| tag.strip_prefix("starter-"))
        .collect();
    let mut problems = Vec::new();
    let mut seen = BTreeSet::new();
    for cell in &lesson.notebook.cells {
        for tag in cell.tags.iter().filter(|tag| !TAGS.contains(&tag.as_str())) {
            let name = EXERCISE_TAGS
                .iter()
                .find_map(|prefix| tag.strip_prefix(prefix));
            let message = match name {
                None => format!(
                    "the tag `{tag}` means nothing: there are {}, and {}NAME",
                    TAGS.join(", "),
                    EXERCISE_TAGS.join("NAME, ")
                ),
                Some(name) if !starters.contains(name) => {
                    format!("the tag `{tag}` belongs to no starter: no cell is starter-{name}")
                }
                Some(_) if !seen.insert(tag) => format!("another cell has the tag `{tag}` too"),
                Some(_) => continue,
            };
            problems.push(Problem::cell(cell, message));
        }
    }
    problems
}

/// No path that only the author's machine has, in sources and in printed outputs.
fn machine_paths(lesson: &Lesson<'_>) -> Vec<Problem> {
    let mut problems = Vec::new();
    for cell in &lesson.notebook.cells {
        for (index, line) in cell.source.lines().enumerate() {
            if let Some(path) = machine_path(line) {
                let message = format!("`{path}…` is a path of one machine: use a relative path");
                problems.push(Problem::line(cell, index + 1, message));
            }
        }
        let printed = lesson.outputs(cell).map(printed);
        if let Some(path) = printed.into_iter().find_map(|text| machine_path(&text)) {
            let message = format!("the cell prints `{path}…`, a path of one machine");
            problems.push(Problem::cell(cell, message));
        }
    }
    problems
}

/// The beginning of an absolute path in a text; not one inside a longer path or an address.
fn machine_path(text: &str) -> Option<&'static str> {
    let starts = |path: &str| {
        let mut places = text.match_indices(path);
        places.any(|(at, _)| {
            let before = text[..at].chars().next_back();
            before.is_none_or(|c| !c.is_alphanumeric() && !"_-./~".contains(c))
        })
    };
    MACHINE_PATHS.into_iter().find(|path| starts(path))
}

/// The text of an output.
fn printed(output: &Value) -> String {
    let texts = [&output["text"], &output["data"]["text/plain"]].into_iter();
    texts.map(joined).collect()
}

/// The committed outputs are those of the committed code, without an error, and figures are
/// where the tags say.
fn outputs(lesson: &Lesson<'_>) -> Vec<Problem> {
    let notebook = lesson.notebook;
    let remedy = format!("run `cargo course run {} --write`", notebook.lesson());
    if let Some(cell) = notebook.code().find(|cell| !cell.executed) {
        let message = format!("the cell was not executed: {remedy}");
        return vec![Problem::cell(cell, message)];
    }
    let mut problems = Vec::new();
    if notebook.metadata["course"]["code_sha256"] != notebook.code_sha256().as_str() {
        problems.push(Problem::whole(format!(
            "the outputs are older than the code: {remedy}"
        )));
    }
    for cell in notebook.code() {
        if lesson
            .outputs(cell)
            .any(|output| output["output_type"] == "error")
        {
            problems.push(Problem::cell(cell, "the cell's output is an error"));
        }
        if let Some(kind) = lesson.outputs(cell).find_map(debug_text) {
            let message = format!(
                "the cell's output is the `Debug` text of its `{kind}`, not its display: let the \
                 last expression move no variable (borrow or clone it, or bind the value with \
                 `let` and end the cell with its name)"
            );
            problems.push(Problem::cell(cell, message));
        }
        let image = lesson
            .outputs(cell)
            .any(|output| !output["data"]["image/png"].is_null());
        let message = match (cell.has("figure"), image) {
            (true, false) => "the cell is tagged `figure`, and its output holds no image",
            (false, true) => "the cell's output is an image: tag it `figure`",
            _ => continue,
        };
        problems.push(Problem::cell(cell, message));
    }
    problems
}

/// The type with a display of its own of which an output holds nothing but the `Debug` text.
fn debug_text(output: &Value) -> Option<&'static str> {
    let data = output["data"].as_object()?;
    let text = joined(data.get("text/plain")?);
    let written = |name: &&str| {
        let mut places = text.match_indices(name);
        places.any(|(at, _)| {
            let (before, after) = (&text[..at], &text[at + name.len()..]);
            let opens = after.starts_with('(') || after.starts_with(" {");
            opens && !before.ends_with(char::is_alphanumeric)
        })
    };
    (data.len() == 1).then(|| DISPLAYED.into_iter().find(written))?
}

#[cfg(test)]
mod tests;
