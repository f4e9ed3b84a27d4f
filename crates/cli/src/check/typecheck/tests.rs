//! Whole runs of `cargo check` over notebooks in a tiny checkout with a stub of the course.

use super::*;
use serde_json::{Value, json};
use std::fs;

const COURSE: &str = "
pub struct Figure;
impl Figure {
    pub fn evcxr_display(&self) {}
    pub fn of(_: Tensor, _: String) -> Self { Self }
}
pub struct Plain;
#[derive(Debug, Clone, Default)]
pub struct Tensor(Vec<f32>);
impl Tensor {
    pub fn first(&self) -> &f32 { &self.0[0] }
    pub fn halves(&self) -> std::slice::Chunks<'_, f32> { self.0.chunks(2) }
    pub fn eat(self) {}
}
#[derive(Debug)]
pub struct Error;
impl std::fmt::Display for Error {
    fn fmt(&self, _: &mut std::fmt::Formatter<'_>) -> std::fmt::Result { Ok(()) }
}
pub fn load() -> Result<Tensor, Error> { Ok(Tensor(vec![1.0])) }
pub mod prelude { pub use crate::{Error, Figure, Plain, Tensor, load}; }
";

/// A checkout with a course and nothing else.
struct Stub(tempfile::TempDir);

impl Stub {
    fn new(course: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let manifest = "[package]\nname = \"course\"\nversion = \"0.1.0\"\nedition = \"2024\"\n";
        write("crates/course/Cargo.toml", manifest);
        write("crates/course/src/lib.rs", course);
        write("Cargo.lock", "version = 4\n");
        fs::create_dir_all(dir.path().join("notebooks")).unwrap();
        Self(dir)
    }

    fn checkout(&self) -> Checkout {
        Checkout::holding(self.0.path()).unwrap()
    }

    fn notebook(&self, name: &str, cells: &[(&str, &str, &str)]) -> (String, Notebook) {
        let cell = |(kind, source, tag): &(&str, &str, &str)| json!({"cell_type": kind, "source": source, "metadata": {"tags": [tag]}});
        let cells: Vec<Value> = cells.iter().map(cell).collect();
        let path = self.0.path().join("notebooks").join(name);
        fs::write(&path, json!({"cells": cells, "metadata": {}}).to_string()).unwrap();
        (format!("notebooks/{name}"), Notebook::read(&path).unwrap())
    }

    /// The findings for notebooks `01_x`, `02_x` … of code cells alone.
    fn check(&self, notebooks: &[&[&str]]) -> Vec<Finding> {
        let read = notebooks.iter().enumerate().map(|(index, cells)| {
            let cells: Vec<_> = cells.iter().map(|cell| ("code", *cell, "")).collect();
            self.notebook(&format!("{:02}_x.ipynb", index + 1), &cells)
        });
        typecheck(&self.checkout(), &read.collect::<Vec<_>>()).unwrap()
    }
}

/// The places of findings, such as `notebooks/01_x.ipynb 3:2`, in order.
fn places(findings: &[Finding]) -> Vec<String> {
    let place = |finding: &Finding| {
        let name = finding.notebook.as_deref().unwrap_or("elsewhere");
        let (cell, line) = (finding.cell.unwrap_or(0), finding.line.unwrap_or(0));
        format!("{name} {cell}:{line}")
    };
    let mut places: Vec<_> = findings.iter().map(place).collect();
    places.sort();
    places
}

const USE: &str = ":dep course = { path = \"../crates/course\" }\nuse course::prelude::*;";

#[test]
fn what_evcxr_accepts_is_accepted() {
    let findings = Stub::new(COURSE).check(&[&[
        USE,
        "//! Notes.\n#![allow(unused)]\nuse std::collections::HashMap;\nmacro_rules! twice { ($x:expr) => { 2 * $x } }",
        "fn f() -> u8 { 1 }\nf()",
        "fn f() -> &'static str { \"one\" }\nlet name: &str = f();\nname // the new one",
        "#[derive(Debug)]\nstruct S { x: u8 }\nlet mut s = S { x: twice!(2) };",
        "impl S { fn grow(&mut self) { self.x += 1 } }\ns.grow();\ns",
        "let number: u8 = \"7\".parse()?;\nlet tensor = load()?; let copy = tensor.clone();",
        "let eaten = tensor;\neaten.eat();",
        "let halves = copy.halves();\nfor half in halves { println!(\"{half:?}\"); };",
        "let words = &[\"a\", \"b\"];\nif words.len() > 9 { return Ok(()); };",
        "Figure",
        "println!(\"{number}\");",
        "use std::fmt::*;\nuse std::collections::HashMap;\nlet m: HashMap<u8, u8> = HashMap::new();",
        "42",
        "for i in 0..3 { let f = |x: u8| x + i; f(1); };",
        "use course::prelude::*;\nlet x: f32 = todo!();",
    ]]);
    assert!(findings.is_empty(), "{findings:#?}");
}

#[test]
fn each_error_names_its_cell_and_line() {
    let findings = Stub::new(COURSE).check(&[
        &[USE, "let a = 1;", "let b = a;\nlet c: &str = b;"],
        &[USE, "let p = Plain;\n\nlet q = 1; p", "vec![Plain]"],
        &[USE, "// nothing wrong here"],
        &[
            USE,
            "let t = load()?;\nlet v = 1;",
            "let u = t;",
            "v;\nt.eat();",
        ],
        &[
            USE,
            "let t = load()?;",
            "let n = 1;\nlet first = t.first();",
            "first",
        ],
        &[USE, "let x = 1;\nassert_eq!(x, \"a\");", "nowhere();"],
        &[USE, "let it = load();\nSome(1)?;"],
        &[USE, "let f = |x: u8| x;", "f(1)"],
        &["let x = 1;\nlet y = ;"],
    ]);
    let expected = [
        "notebooks/01_x.ipynb 3:2",
        "notebooks/02_x.ipynb 2:3",
        "notebooks/02_x.ipynb 3:1",
        "notebooks/04_x.ipynb 4:2",
        "notebooks/05_x.ipynb 3:2",
        "notebooks/06_x.ipynb 2:2",
        "notebooks/06_x.ipynb 3:1",
        "notebooks/07_x.ipynb 2:2",
        "notebooks/08_x.ipynb 2:1",
        "notebooks/09_x.ipynb 1:2",
    ];
    assert_eq!(places(&findings), expected, "{findings:#?}");
    let text = |place: &str| {
        let found = findings
            .iter()
            .find(|f| places(std::slice::from_ref(f)) == [place]);
        found.unwrap().to_string()
    };
    let wrong_type = text(expected[0]);
    assert!(wrong_type.contains("error[E0308]: mismatched types\n  | let c: &str = b;\n"));
    assert!(
        wrong_type.contains("\n  |               ^ expected `&str`"),
        "{wrong_type}"
    );
    assert!(
        text(expected[1]).contains("`course::Plain` is not `Debug`"),
        "{}",
        text(expected[1])
    );
    assert!(
        text(expected[2]).contains("`Vec<course::Plain>` is not `Debug`"),
        "{}",
        text(expected[2])
    );
    let moved = text(expected[3]);
    assert!(
        moved.contains("= cell 3, line 1: value moved here"),
        "{moved}"
    );
    let borrows = text(expected[4]);
    assert!(
        borrows.contains("`first` borrows from another variable"),
        "{borrows}"
    );
    assert!(borrows.contains("^ borrowed here"), "{borrows}");
}

#[test]
fn a_cell_that_ends_without_a_value_wants_a_semicolon() {
    let without = [
        "let mut n = 0;\n\nfor i in 0..3 {\n    n += i;\n}",
        "while false {}",
        "loop { break }",
        "if true { n += 1; }",
        "{ n += 1; }",
        "println!(\"{n}\")",
        "assert!(n > 0)",
        "load()?.eat()",
        "n = 2",
        "match n { _ => {} }",
    ];
    let cells: Vec<_> = [USE].into_iter().chain(without).collect();
    let findings = Stub::new(COURSE).check(&[&cells]);
    let lines = without.iter().enumerate().map(|(index, source)| {
        let line = if source.contains("for i") { 3 } else { 1 };
        format!("notebooks/01_x.ipynb {}:{line}", index + 2)
    });
    let mut lines: Vec<_> = lines.collect();
    lines.sort();
    assert_eq!(places(&findings), lines, "{findings:#?}");
    assert!(findings.iter().all(|finding| finding.message == NO_VALUE));

    let with = without.map(|source| format!("{source};"));
    let mut cells: Vec<_> = [USE].into_iter().chain(with.iter().map(|s| &**s)).collect();
    let valued = [
        "loop { break 7 }",
        "if n > 0 { 1 } else { 2 }",
        "{ n }",
        "vec![n]",
        "((), 1)",
        "Some(())",
        "Figure",
        "let early = n; if early > 99 { return Ok(()); };",
    ];
    cells.extend(valued);
    assert_eq!(Stub::new(COURSE).check(&[&cells]), []);
}

#[test]
fn a_shown_value_must_not_be_made_by_moving_a_variable() {
    let moving = [
        "Figure::of(t.clone(), text)",
        "let own = load()?;\nFigure::of(\n    own,\n    String::new(),\n)",
        "let own = load()?; own.eat();\nFigure::of([load()?].map(|own| own)[0].clone(), \"x\".into())",
        "let title = String::new();\nFigure::of(load()?, title)",
    ];
    let notebooks = moving.map(|cell| [USE, "let t = load()?;\nlet text = String::new();", cell]);
    let notebooks: Vec<&[&str]> = notebooks.iter().map(|cells| &cells[..]).collect();
    let findings = Stub::new(COURSE).check(&notebooks);
    let expected = [
        "notebooks/01_x.ipynb 3:1",
        "notebooks/02_x.ipynb 3:3",
        "notebooks/04_x.ipynb 3:2",
    ];
    assert_eq!(places(&findings), expected, "{findings:#?}");
    let text = findings[0].to_string();
    assert!(text.contains("moves `text`, and evcxr shows"), "{text}");
    assert!(
        text.contains("\n  |                       ^^^^ moved here"),
        "{text}"
    );

    let findings = Stub::new(COURSE).check(&[&[
        USE,
        "let t = load()?;\nlet text = String::new();\nlet made = Figure;",
        "made",
        "&made",
        "Figure::of(t.clone(), text.clone())",
        "let figure = Figure::of(t, text);\nfigure",
        "let t = load()?;\nlet some = Some(t);",
        // Not shown by a display of its own: its `Debug` text is what evcxr prints in any case.
        "some",
        "let a = load()?;\nlet b = a.clone();",
        "(a, 1)",
        "let f = Figure::of(b, String::new());",
        "[1].map(|b| Figure)[0]",
    ]]);
    assert_eq!(findings, []);

    // A type without one does not hide that a variable is gone.
    let findings = Stub::new(COURSE).check(&[&[USE, "let a = load()?;", "(a, 1)", "a;"]]);
    assert_eq!(
        places(&findings),
        ["notebooks/01_x.ipynb 4:1"],
        "{findings:#?}"
    );
}

#[test]
fn a_forgotten_result_is_an_error() {
    let findings = Stub::new(COURSE).check(&[&[USE, "let unused = 1;\nload();"]]);
    assert_eq!(
        places(&findings),
        ["notebooks/01_x.ipynb 2:2"],
        "{findings:#?}"
    );
    assert!(
        findings[0].message.contains("unused `Result`"),
        "{findings:?}"
    );
}

#[test]
fn a_solution_is_checked_in_the_place_of_its_starter() {
    let stub = Stub::new(COURSE);
    let solution = |body: &str| {
        format!("<details>\n\n```rust\nfn f() -> u8 {{\n    {body}\n}}\n```\n</details>")
    };
    let check = |body: &str, later: &str| {
        let solution = solution(body);
        let cells = [
            ("code", "fn f() -> u8 { todo!() }", "starter-f"),
            ("code", "f() + 1", "check-f"),
            ("markdown", solution.as_str(), "solution-f"),
            ("code", later, ""),
        ];
        typecheck(&stub.checkout(), &[stub.notebook("01_x.ipynb", &cells)]).unwrap()
    };
    assert_eq!(check("7", "f();"), []);
    let wrong = check("-1i8", "f();");
    assert_eq!(places(&wrong), ["notebooks/01_x.ipynb 3:5"], "{wrong:#?}");
    assert_eq!(wrong[0].source.as_deref(), Some("    -1i8"));
    assert!(wrong[0].notes.iter().any(|note| note == SOLVED));
    let twice = check("7", "let x: i8 = f();");
    assert_eq!(places(&twice), ["notebooks/01_x.ipynb 4:1"], "{twice:#?}");
    assert!(twice[0].notes.iter().all(|note| note != SOLVED));
}

#[test]
fn several_checks_at_once_do_not_mix() {
    let stub = Stub::new(COURSE);
    let cells = |source| [("code", USE, ""), ("code", source, "")];
    let wrong = [stub.notebook("01_x.ipynb", &cells("nowhere();"))];
    let right = [stub.notebook("02_x.ipynb", &cells("let a = 1;"))];
    let checkout = stub.checkout();
    std::thread::scope(|scope| {
        let run = |notebooks| {
            let checkout = &checkout;
            scope.spawn(move || places(&typecheck(checkout, notebooks).unwrap()))
        };
        let runs: Vec<_> = (0..4).map(|_| (run(&wrong), run(&right))).collect();
        for (wrong, right) in runs {
            assert_eq!(wrong.join().unwrap(), ["notebooks/01_x.ipynb 2:1"]);
            assert_eq!(right.join().unwrap(), [""; 0]);
        }
    });
}

#[test]
fn errors_outside_the_notebooks_are_not_lost() {
    let broken = Stub::new("pub fn f() -> u8 { \"a\" }");
    let findings = broken.check(&[&["1"]]);
    assert_eq!(places(&findings), ["elsewhere 0:0"]);
    assert!(
        findings[0]
            .message
            .contains("outside the notebooks: error[E0308]")
    );
    assert!(findings[0].message.contains("src/lib.rs:1"), "{findings:?}");

    fs::write(
        broken.0.path().join("crates/course/Cargo.toml"),
        "[package]",
    )
    .unwrap();
    let findings = broken.check(&[&["1"]]);
    assert_eq!(places(&findings), ["elsewhere 0:0"]);
    assert!(
        findings[0].message.contains("cargo check failed:\n"),
        "{findings:?}"
    );
    assert!(findings[0].message.contains("name"), "{findings:?}");
}
