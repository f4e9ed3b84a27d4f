//! A good lesson, then one thing wrong at a time.

use super::*;
use serde_json::json;
use std::path::PathBuf;

const HEAD: &str = "# LoRA from scratch

**Time:** 25 minutes

**Prerequisites:** Rust

## What you will learn

- what the two
  matrices are
- why B starts at zero
- how many parameters that saves";

fn cell(kind: &str, source: &str, tag: &str) -> Value {
    let tags: Vec<_> = [tag].into_iter().filter(|tag| !tag.is_empty()).collect();
    let mut cell = json!({"cell_type": kind, "source": source, "metadata": {"tags": tags}});
    if kind == "code" {
        let data = json!({"image/png": "iVBO"});
        let figure = json!([{"output_type": "display_data", "data": data}]);
        cell["outputs"] = if tag == "figure" { figure } else { json!([]) };
        cell["execution_count"] = json!(1);
    }
    cell
}

/// A note for the teacher.
fn note(kind: &str, text: &str) -> Value {
    let folded =
        format!("<details><summary>For the teacher: {kind}</summary>\n\n{text}\n\n</details>");
    cell("markdown", &folded, "teacher")
}

fn exercise(name: &str) -> [Value; 4] {
    let solution = "<details>\n\n```rust\nfn f() -> u8 { 1 }\n```\n\n</details>";
    [
        cell(
            "markdown",
            &format!(
                "### Exercise {name}\n\nReturn one.\n\n\
                 <details><summary>Hint</summary>\n\nIt is a digit.\n\n</details>"
            ),
            "",
        ),
        cell("code", "fn f() -> u8 { 0 }", &format!("starter-{name}")),
        cell("code", "f()", &format!("check-{name}")),
        cell("markdown", solution, &format!("solution-{name}")),
    ]
}

/// A lesson without a fault: its file's name and its JSON.
fn good() -> (String, Value) {
    let words = "**Figure.** The number of parameters grows in a straight line with the rank.";
    let mut cells = vec![
        cell("markdown", HEAD, ""),
        cell("code", &format!("{DEP}\nuse course::prelude::*;"), ""),
        cell(
            "markdown",
            "Now we draw. See https://example.org/home/x.",
            "",
        ),
        cell("code", "let a = 1;", ""),
        cell("code", "draw(a)", "figure"),
        cell("markdown", words, ""),
    ];
    cells.extend(exercise("one"));
    cells.extend(exercise("two"));
    cells.push(cell(
        "markdown",
        "## Summary\n\nIt works.\n\n## Read next\n\nLesson 02.",
        "",
    ));
    cells.push(note("ask", "What is one?"));
    cells.push(note("demo", "Return two."));
    cells.push(note("watch out", "Some return none."));
    let rows = "| Exercise one | 9 |\n| Exercise two | 10 |\n| Summary | 4 |\n| Read next | 2 |";
    let table = format!("| section | minutes |\n|---|---|\n{rows}");
    cells.push(note("minutes", &table));
    for (index, cell) in cells.iter_mut().enumerate() {
        cell["id"] = json!(format!("cell-{index}"));
    }
    let metadata = json!({"kernelspec": {"name": "rust"}});
    let json = json!({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5});
    ("01_from_scratch.ipynb".to_owned(), json)
}

/// The problems of a lesson. Its hash of the code is set right first, unless it has one.
fn problems(name: &str, mut json: Value) -> Vec<Problem> {
    let dir = tempfile::tempdir().unwrap();
    let path: PathBuf = dir.path().join(name);
    fs::write(&path, json.to_string()).unwrap();
    if json["metadata"]["course"].is_null() {
        let hash = Notebook::read(&path).unwrap().code_sha256();
        json["metadata"]["course"] = json!({"code_sha256": hash});
        fs::write(&path, json.to_string()).unwrap();
    }
    lint(&Notebook::read(&path).unwrap()).unwrap()
}

fn messages(problems: &[Problem]) -> Vec<&str> {
    problems
        .iter()
        .map(|problem| problem.message.as_str())
        .collect()
}

/// A change to the good lesson, and a part of the only message that it must bring.
type Case = (&'static str, fn(&mut Value));

fn source(json: &mut Value, cell: usize, text: &str) {
    json["cells"][cell]["source"] = json!(text);
}

fn edit(json: &mut Value, cell: usize, from: &str, to: &str) {
    let text = json["cells"][cell]["source"].as_str().unwrap();
    assert!(text.contains(from), "{text}");
    json["cells"][cell]["source"] = json!(text.replace(from, to));
}

fn remove(json: &mut Value, from: usize, count: usize) {
    json["cells"]
        .as_array_mut()
        .unwrap()
        .drain(from..from + count);
}

#[test]
fn the_good_lesson_is_good() {
    let (name, json) = good();
    assert_eq!(messages(&problems(&name, json)), Vec::<&str>::new());
}

#[test]
fn each_fault_is_found_and_nothing_else() {
    const CASES: &[Case] = &[
        ("format 4.5", |j| j["nbformat_minor"] = json!(4)),
        ("has no id", |j| j["cells"][3]["id"] = json!("")),
        ("has the id cell-0 too", |j| {
            j["cells"][3]["id"] = json!("cell-0")
        }),
        ("must be `rust`", |j| {
            j["metadata"]["kernelspec"]["name"] = json!("python3")
        }),
        ("with the title", |j| edit(j, 0, "# LoRA", "LoRA")),
        ("a second title", |j| edit(j, 2, "Now", "# Now\n\nNow")),
        ("say before the first code cell `What you", |j| {
            edit(j, 0, "will learn", "learn")
        }),
        ("exactly 3 points", |j| edit(j, 0, "- why", "and why")),
        ("exactly 3 points", |j| edit(j, 0, "- why", "- this\n- why")),
        ("**Time:** 25 minutes", |j| {
            edit(j, 0, "25 minutes", "half an hour")
        }),
        ("**Prerequisites:**", |j| {
            edit(j, 0, "Prerequisites", "You need")
        }),
        ("`## Summary` is missing", |j| {
            edit(j, 14, "## Summary", "## The end");
            edit(j, 18, "Summary", "The end");
        }),
        ("`## Read next` is missing", |j| {
            edit(j, 14, "## Read next", "### Read next");
            edit(j, 18, "| Read next | 2 |", "");
            edit(j, 18, "Summary | 4", "Summary | 6");
        }),
        ("must hold `:dep", |j| {
            source(j, 1, "use course::prelude::*;")
        }),
        ("must read `:dep", |j| {
            edit(j, 1, "../crates", "../../crates")
        }),
        ("wrong gradients", |j| {
            edit(j, 1, ":dep", ":dep candle_core = \"0.11\"\n:dep")
        }),
        ("belongs into the first code cell", |j| source(j, 3, DEP)),
        ("belongs into the first code cell", |j| {
            edit(j, 1, ":dep", &format!("{DEP}\n:dep"))
        }),
        ("no command of evcxr", |j| source(j, 3, "// all\n:vars")),
        ("no command of evcxr", |j| source(j, 3, "!ls")),
        ("the cell is empty", |j| source(j, 3, " \n")),
        ("26 lines of code", |j| source(j, 3, &"a();\n".repeat(26))),
        ("26 lines of code", |j| {
            edit(j, 9, "fn f", &format!("{}fn f", "a();\n".repeat(25)))
        }),
        ("91 columns", |j| {
            source(j, 3, &format!("//{}", "é".repeat(89)))
        }),
        ("91 columns", |j| {
            edit(j, 9, "fn f", &format!("{}\nfn f", "x".repeat(91)))
        }),
        ("code cells in a row", |j| {
            let mut extra = j["cells"][3].clone();
            extra["id"] = json!("extra");
            j["cells"].as_array_mut().unwrap().insert(3, extra);
        }),
        ("must say in words", |j| edit(j, 5, "**Figure.**", "")),
        ("must say in words", |j| source(j, 5, "**Figure.** A line.")),
        ("1 exercises, and a lesson wants 2", |j| {
            remove(j, 10, 4);
            edit(j, 14, "| Exercise two | 10 |\n", "");
            edit(j, 14, "Summary | 4", "Summary | 14");
        }),
        ("wants a cell tagged check-one", |j| {
            j["cells"][8]["metadata"]["tags"] = json!([])
        }),
        ("order of an exercise", |j| {
            j["cells"].as_array_mut().unwrap().swap(7, 8)
        }),
        ("hide the solution", |j| edit(j, 9, "<details>", "")),
        ("hide the solution", |j| edit(j, 9, "</details>", "")),
        ("fold a hint away", |j| {
            edit(j, 6, "<details><summary>Hint</summary>", "Hint:")
        }),
        ("fold a hint away", |j| edit(j, 6, "</details>", "")),
        ("of the kind `ask`", |j| {
            edit(j, 15, "teacher: ask", "teacher: demo")
        }),
        ("of the kind `watch out`", |j| {
            j["cells"][17]["metadata"]["tags"] = json!([])
        }),
        ("KIND being ask, demo, watch out", |j| {
            let mut extra = j["cells"][16].clone();
            extra["id"] = json!("extra");
            let cells = j["cells"].as_array_mut().unwrap();
            cells.insert(15, extra);
            edit(j, 15, "</details>", "");
        }),
        ("the last cell must be the teacher's", |j| {
            j["cells"][18]["metadata"]["tags"] = json!([])
        }),
        ("the last cell must be the teacher's", |j| {
            j["cells"].as_array_mut().unwrap().swap(17, 18);
        }),
        ("no row for `Now`", |j| edit(j, 2, "Now", "## Now\n\nNow")),
        ("more rows than", |j| {
            edit(
                j,
                18,
                "| Read next | 2 |",
                "| Read next | 2 |\n| More | 0 |",
            )
        }),
        ("`Summary` where `Exercise two` comes", |j| {
            edit(
                j,
                18,
                "| Exercise two | 10 |\n| Summary | 4 |",
                "| Summary | 4 |\n| Exercise two | 10 |",
            )
        }),
        ("no section and its minutes: `| Summary | four |`", |j| {
            edit(j, 18, "Summary | 4", "Summary | four")
        }),
        ("take 26 minutes together", |j| {
            edit(j, 18, "Summary | 4", "Summary | 5")
        }),
        ("the tag `figur` means nothing", |j| {
            j["cells"][3]["metadata"]["tags"] = json!(["figur"])
        }),
        ("belongs to no starter", |j| {
            j["cells"][3]["metadata"]["tags"] = json!(["check-x"])
        }),
        ("has the tag `check-one` too", |j| {
            j["cells"][9]["metadata"]["tags"] = json!(["solution-one", "check-one"]);
        }),
        ("a path of one machine: use", |j| {
            source(j, 3, "read(\"/home/me/x\")")
        }),
        ("a path of one machine: use", |j| source(j, 2, "/root/x")),
        ("the cell prints `/Users/…`", |j| {
            let output =
                json!({"output_type": "stream", "name": "stdout", "text": ["at\n", "/Users/x"]});
            j["cells"][3]["outputs"] = json!([output]);
        }),
        ("not executed", |j| {
            j["cells"][3]["execution_count"] = json!(null)
        }),
        ("older than the code", |j| {
            j["metadata"]["course"] = json!({"code_sha256": "0"})
        }),
        ("output is an error", |j| {
            j["cells"][3]["outputs"] = json!([{"output_type": "error"}])
        }),
        ("`Debug` text of its `Outcome`", |j| {
            let data = json!({"text/plain": ["Outcome { passed: true, text: \"x\" }"]});
            j["cells"][3]["outputs"] = json!([{"output_type": "execute_result", "data": data}]);
        }),
        ("`Debug` text of its `Figure`", |j| {
            let data = json!({"text/plain": "Some(Figure(\"loss\", 640 × 400))"});
            j["cells"][3]["outputs"] = json!([{"output_type": "execute_result", "data": data}]);
        }),
        ("output holds no image", |j| {
            j["cells"][4]["outputs"] = json!([])
        }),
        ("tag it `figure`", |j| {
            let image = j["cells"][4]["outputs"].clone();
            j["cells"][3]["outputs"] = image;
        }),
    ];
    let mut failures = Vec::new();
    for (expected, change) in CASES {
        let (name, mut json) = good();
        change(&mut json);
        let problems = problems(&name, json);
        let [only] = problems.as_slice() else {
            failures.push(format!("{expected}: {:?}", messages(&problems)));
            continue;
        };
        if !only.message.contains(expected) {
            failures.push(format!("{expected}: {}", only.message));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn other_texts_and_displays_are_no_debug_text() {
    for data in [
        json!({"text/plain": "Outcome { … }", "text/html": "<b>x</b>"}),
        json!({"text/plain": "Figure. The outcome of MyOutcome { x: 1 }"}),
        json!({"text/plain": "[1, 2]"}),
    ] {
        let (name, mut json) = good();
        json["cells"][3]["outputs"] = json!([{"output_type": "execute_result", "data": data}]);
        assert_eq!(messages(&problems(&name, json)), Vec::<&str>::new());
    }
}

#[test]
fn a_lesson_without_a_figure_is_found() {
    let (name, mut json) = good();
    remove(&mut json, 4, 1);
    let problems = problems(&name, json);
    assert!(
        messages(&problems)[0].starts_with("no figure"),
        "{problems:?}"
    );
}

#[test]
fn names_of_files_are_two_digits_and_a_topic() {
    for (name, is_good) in [
        ("01_from_scratch.ipynb", true),
        ("1_x.ipynb", false),
        ("001_x.ipynb", false),
        ("01_.ipynb", false),
        ("01-x.ipynb", false),
        ("01_From.ipynb", false),
        ("intro.ipynb", false),
    ] {
        let problems = problems(name, good().1);
        assert_eq!(problems.is_empty(), is_good, "{name}: {problems:?}");
    }
}

#[test]
fn a_problem_names_the_line_in_the_cell() {
    let (name, mut json) = good();
    edit(&mut json, 9, "fn f", &format!("{}\nfn f", "x".repeat(91)));
    let problems = problems(&name, json);
    assert_eq!((problems[0].cell, problems[0].line), (Some(10), Some(4)));
}

#[test]
fn headings_inside_fenced_code_do_not_count() {
    let lines: Vec<_> = prose_lines("# a\n```sh\n# b\n```\n# c").collect();
    assert_eq!(lines, [(1, "# a"), (5, "# c")]);
}
