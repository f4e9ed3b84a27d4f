//! The generated text and its table of lines.

use super::*;
use serde_json::{Value, json};

fn notebook(cells: &[(&str, &str, &str)]) -> Notebook {
    let cell = |(kind, source, tag): &(&str, &str, &str)| json!({"cell_type": kind, "source": source, "metadata": {"tags": [tag]}});
    let cells: Vec<Value> = cells.iter().map(cell).collect();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("07_x.ipynb");
    std::fs::write(&path, json!({"cells": cells, "metadata": {}}).to_string()).unwrap();
    Notebook::read(&path).unwrap()
}

fn code(sources: &[&str]) -> Notebook {
    let cells: Vec<_> = sources.iter().map(|source| ("code", *source, "")).collect();
    notebook(&cells)
}

/// The generated text without its frame, and the problems.
fn generated(source: &str) -> (String, Vec<Problem>) {
    let (module, problems) = generate(&code(&[source]), Purpose::Check(&Variables::new()));
    let lines = module.text.lines().zip(&module.lines);
    let own = lines.filter(|(line, origin)| origin.is_some() && !line.trim().is_empty());
    (
        own.map(|(line, _)| line).collect::<Vec<_>>().join("\n"),
        problems,
    )
}

#[test]
fn every_line_of_a_cell_is_found_again_at_its_columns() {
    let sources = [
        "let a = 1; let b = a;\nlet text = \"two\n  lines\"; // x\n\nfn f() {}\n a + b // end",
        ":dep course = \"1\"\n#![allow(x)] let a = 1;\nif a > 0 { a } else { 2 }\n",
    ];
    let (module, problems) = generate(&code(&sources), Purpose::Check(&Variables::new()));
    assert_eq!(problems, []);
    let mut seen = BTreeSet::new();
    for (line, origin) in module.text.lines().zip(&module.lines) {
        let Some(Origin {
            cell,
            line: number,
            role: Role::Source,
        }) = origin
        else {
            continue;
        };
        let source = sources[cell - 1].lines().nth(number - 1).unwrap();
        for (column, character) in line.chars().enumerate().filter(|(_, c)| *c != ' ') {
            assert_eq!(source.chars().nth(column), Some(character), "{line}");
            seen.insert((*cell, *number, column));
        }
    }
    for (index, source) in sources.iter().enumerate() {
        for (number, line) in source.lines().enumerate() {
            for (column, _) in line.chars().enumerate().filter(|(_, c)| *c != ' ') {
                let blanked = index == 1 && (number == 0 || number == 1 && column < 13);
                let place = (index + 1, number + 1, column);
                assert_ne!(seen.contains(&place), blanked, "{place:?}");
            }
        }
    }
}

#[test]
fn only_an_expression_at_the_end_is_shown() {
    for (source, expected) in [
        ("let a = f(); 1", "(\n             1\n).evcxr_display();"),
        (
            "f(\n  1,\n) // comment",
            "(\nf(\n  1,\n) // comment\n).evcxr_display();",
        ),
        ("println!(\"x\")", "(\nprintln!(\"x\")\n).evcxr_display();"),
        (
            "for i in 0..2 {}",
            "(\nfor i in 0..2 {}\n).evcxr_display();",
        ),
        (
            "let a = f(); let b = 1; g(a)",
            "(\n                        g(a)\n).evcxr_display();\n\
             if crate::support::maybe() && shown_.by_type() {\ncrate::support::asks(&a);\n}",
        ),
        ("f();", "f();"),
        ("fn f() {}", "fn f() {}"),
        ("// nothing", "// nothing"),
    ] {
        let (text, problems) = generated(source);
        assert!(text.ends_with(expected), "{text}");
        assert_eq!(
            text.contains("evcxr_display"),
            expected.contains("evcxr_display")
        );
        assert_eq!(problems, []);
    }
}

#[test]
fn each_variable_is_tested_after_its_last_let() {
    let keeps = |source: &str| {
        let (text, _) = generated(source);
        let lines = text.lines().filter(|line| line.contains("keeps"));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    let keep = |name: &str| format!("crate::support::keeps(&{name});");
    assert_eq!(
        keeps("let (a, B { b, c: [d, ..] }) = x();"),
        ["a", "b", "d"].map(keep)
    );
    assert_eq!(keeps("let Some(mut x) = y else { panic!() };"), [keep("x")]);
    assert_eq!(
        keeps("let None = y else { panic!() };\nlet z;\n{ let w = 1; }"),
        [""; 0]
    );
    let (text, _) = generated("let x = &a;\nlet x = x.len();\nx");
    assert_eq!(text.matches("keeps").count(), 1, "{text}");
    assert!(
        text.find("x.len").unwrap() < text.find("keeps").unwrap(),
        "{text}"
    );
}

#[test]
fn a_late_variable_is_tested_at_the_end_of_its_cell() {
    let notebook = code(&["let a = 1;\nf(a);\na"]);
    let (module, _) = generate(
        &notebook,
        Purpose::Check(&Variables::from([(1, "a".to_owned())])),
    );
    let lines: Vec<_> = module.text.lines().collect();
    let end = lines
        .iter()
        .position(|line| line.contains(").evcxr_display"))
        .unwrap();
    let after = [
        "if crate::support::maybe() && shown_.by_type() {",
        "crate::support::asks(&a);",
        "}",
    ];
    assert_eq!(lines[end + 1..end + 4], after);
    assert_eq!(lines[end + 4], "crate::support::keeps(&a);");
    assert_eq!(module.lines[end + 4].as_ref().unwrap().line, 1);
}

#[test]
fn closures_that_evcxr_cannot_keep_are_refused() {
    for refused in [
        "let f = |x| x;",
        "let f = move || a;",
        "1;\nlet mut f = (|x: u8| x);",
    ] {
        let (_, problems) = generated(refused);
        assert_eq!(problems.len(), 1, "{refused}");
        assert!(problems[0].message.contains("closure `f`"), "{problems:?}");
        assert_eq!(problems[0].line, Some(refused.lines().count()));
    }
    for good in [
        "let f: Box<dyn Fn(u8) -> u8> = Box::new(|x| x);",
        "let f: fn(u8) -> u8 = |x| x;",
        "{ let f = |x| x; f(1) }",
        "let y = xs.iter().map(|x| x).sum::<u8>();",
    ] {
        assert_eq!(generated(good).1, [], "{good}");
    }
}

#[test]
fn an_empty_collection_must_say_what_it_holds() {
    for refused in [
        "let mut v = Vec::new();",
        "let v = vec![]; // vv",
        "let v = None;",
    ] {
        let (_, problems) = generated(refused);
        assert_eq!(problems.len(), 1, "{refused}");
        assert!(problems[0].message.contains("type of `v`"), "{problems:?}");
    }
    for good in [
        "let mut v: Vec<f32> = Vec::new();",
        "let v = Vec::<f32>::new();",
        "let mut v = Vec::new();\nv.push(1);",
        "let v = Some(1);",
        "let v = Tape::new();",
    ] {
        assert_eq!(generated(good).1, [], "{good}");
    }
}

#[test]
fn a_syntax_error_names_its_line_and_ends_the_function() {
    for (source, line) in [
        ("let a = 1;\nlet b = ;", 2),
        ("let a = 1;\nfn f( {", 2),
        ("let a = 1;\nlet b = 2", 2),
        ("let a = 1;\nf())", 2),
        ("let a = \"x;\n", 1),
    ] {
        let (module, problems) = generate(
            &code(&["1", source, "late()"]),
            Purpose::Check(&Variables::new()),
        );
        let places: Vec<_> = problems.iter().map(|p| (p.cell, p.line)).collect();
        assert_eq!(places, [(Some(2), Some(line))], "{source}: {problems:?}");
        assert!(!module.text.contains("late"), "{source}");
    }
}

#[test]
fn solutions_stand_for_their_starters_in_a_second_function() {
    let solution = "Solution\n\n```rust\nfn f() -> u8 {\n    7\n}\n```";
    let cells = [
        ("code", "fn f() -> u8 { 0 }", "starter-f"),
        ("code", "f();", "check-f"),
        ("markdown", solution, "solution-f"),
    ];
    let (module, _) = generate(&notebook(&cells), Purpose::Check(&Variables::new()));
    let (plain, solved) = module.text.split_once("fn solved").unwrap();
    assert!(plain.contains("{ 0 }") && !plain.contains('7'));
    assert!(solved.contains("    7") && !solved.contains("{ 0 }") && solved.contains("f();"));
    let line = module
        .text
        .lines()
        .position(|line| line == "    7")
        .unwrap()
        + 1;
    let origin = module.origin(line).unwrap();
    assert_eq!(
        (origin.cell, origin.line, &origin.role),
        (3, 5, &Role::Source)
    );
    assert!(module.is_solved(line) && !module.is_solved(3));
}

#[test]
fn a_program_asks_the_compiler_nothing() {
    let cells = [
        ("code", "let a = 1;", ""),
        ("code", "todo()", "starter-x"),
        ("code", "a", "check-x"),
        ("markdown", "```rust\nfn todo() {}\n```", "solution-x"),
    ];
    let (module, problems) = generate(&notebook(&cells), Purpose::Program);
    assert_eq!(problems, []);
    assert!(module.text.contains("evcxr_display"), "{}", module.text);
    for asked in ["keeps(", "asks(", "by_type", "fn solved"] {
        assert!(!module.text.contains(asked), "{}", module.text);
    }
}
