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
