"""`course_jupyter.run`: exercises are proved, and storing outputs changes nothing else."""

import json
import subprocess
import sys

import nbformat
from conftest import notebook

CHECK = 'Exercise::new("double").hint("Add it to itself.").expect("2", double(2), 4).check()'
SOLUTION = "<details>\n\n```rust\nfn double(x: u32) -> u32 {\n    x + x\n}\n```\n\n</details>"


def run(path, *options):
    command = [sys.executable, "-m", "course_jupyter.run", str(path), *options]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(ran.stdout.splitlines()[-1])


def lesson(path, starter):
    notebook(path, 'record("two", 2)?;', starter, CHECK)
    written = nbformat.read(path, as_version=4)
    written.cells[2].metadata["tags"] = ["starter-double"]
    written.cells[3].metadata["tags"] = ["check-double"]
    written.cells.append(nbformat.v4.new_markdown_cell(SOLUTION, metadata={"tags": ["solution-double"]}))
    nbformat.write(written, path)
    return [(cell.cell_type, cell.source) for cell in written.cells]


def test_storing_outputs_keeps_every_source_and_is_repeatable(tmp_path):
    path = tmp_path / "lesson.ipynb"
    sources = lesson(path, "fn double(x: u32) -> u32 { x }")
    report = run(path, "--exercises", "--write")
    assert report["ok"] and report["exercises"] == 1 and report["metrics"] == {"two": 2.0}, report
    first = path.read_text()
    stored = nbformat.read(path, as_version=4)
    assert [(cell.cell_type, cell.source) for cell in stored.cells] == sources
    assert "Not yet" in stored.cells[3].outputs[0].text
    assert run(path, "--exercises", "--write")["ok"]
    assert path.read_text() == first


def test_a_starter_that_passes_its_check_is_refused(tmp_path):
    path = tmp_path / "lesson.ipynb"
    lesson(path, "fn double(x: u32) -> u32 { x * 2 }")
    report = run(path, "--exercises")
    assert not report["ok"] and "the starter passes the check" in report["message"], report


def test_what_ran_of_a_failing_notebook_is_kept_beside_it(tmp_path):
    path, kept = tmp_path / "lesson.ipynb", tmp_path / "build" / "lesson.failed.ipynb"
    notebook(path, 'println!("ran");', "let _ = usize::MAX + nowhere;", "1 + 1")
    committed = nbformat.read(path, as_version=4)
    committed.cells[3].outputs = [nbformat.v4.new_output("stream", text="old\n")]
    nbformat.write(committed, path)
    before = path.read_text()
    report = run(path, "--write", "--failed", str(kept))
    assert not report["ok"] and report["cell"] == 3 and report["kept"] == str(kept), report
    assert path.read_text() == before
    cells = nbformat.read(kept, as_version=4).cells
    assert cells[1].outputs[0].text == "ran\n"
    assert [output.output_type for output in cells[2].outputs] == ["error"]
    assert cells[3].outputs == [] and cells[3].execution_count is None
    assert sorted(p.name for p in tmp_path.rglob("*.*")) == ["lesson.failed.ipynb", "lesson.ipynb"]

    notebook(path, "1 + 1")
    assert run(path, "--write", "--failed", str(kept))["ok"]
    assert not kept.exists()


def test_the_debug_text_of_what_has_a_display_is_a_failure(tmp_path):
    outcome = 'Exercise::new("one").expect("one", NAME, "1".to_string()).check()'
    path = tmp_path / "lesson.ipynb"
    notebook(path, 'let name = "1".to_string();', outcome.replace("NAME", "name"))
    report = run(path, "--displayed", "Figure,Outcome")
    assert not report["ok"] and report["cell"] == 3, report
    assert "`Debug` text of its `Outcome`" in report["message"]
    notebook(path, 'let name = "1".to_string();', outcome.replace("NAME", "name.clone()"))
    assert run(path, "--displayed", "Figure,Outcome")["ok"]
