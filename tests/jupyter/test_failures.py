"""A failure looks like a failure: plain nbconvert exits 1 for it, and the runner says where."""

import json
import subprocess
import sys

import pytest
from conftest import notebook, program

# Writes when its cell has long ended.
LATE = (
    "std::thread::spawn(|| {\n"
    "    std::thread::sleep(std::time::Duration::from_millis(250));\n"
    '    eprintln!("a warning");\n'
    "});"
)

# What is wrong, the cell, its tags, whether it is well, the failing line, what the report says.
CASES = {
    "good": ('println!("{}", 6 * 7);', (), True, None, ""),
    "allowed_stderr": ('eprintln!("a warning");', ("stderr-ok",), True, None, ""),
    "stderr": ('let a = 1;\neprintln!("a warning");', (), False, None, "a warning"),
    "late_stderr": (LATE, (), False, None, "a warning"),
    "panic": ('let a = 1;\nassert_eq!(a, 2, "one");', (), False, 2, "one"),
    "question_mark": (
        "let a = Tensor::zeros(3, DType::F32, &Device::Cpu)?.reshape((2, 2));\n"
        "println!(\"{:?}\", a?);",
        (),
        False,
        None,
        "reshape",
    ),
    "compile_error": ('let a = 1;\nlet b: u32 = "text";', (), False, 2, "mismatched types"),
    "killed": ("let a = 1;\nstd::process::abort();", (), False, None, "terminated"),
}


@pytest.mark.parametrize("name", CASES)
def test_plain_nbconvert_and_the_runner_agree(name, tmp_path):
    source, tags, well, line, words = CASES[name]
    path = notebook(tmp_path / "lesson.ipynb", source, tags=tags)
    convert = [program("jupyter"), "nbconvert", "--to", "notebook", "--execute", str(path)]
    run = [sys.executable, "-m", "course_jupyter.run", str(path)]
    converted, ran = (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command in (convert, run)
    )
    _, log = converted.communicate()
    assert (converted.returncode == 0) == well, log
    assert words in log
    report = json.loads(ran.communicate()[0].splitlines()[-1])
    assert report["ok"] == well, report
    if not well:
        assert (report["cell"], report["line"]) == (2, line), report
        assert words in report["message"]


def test_what_comes_while_another_cell_runs_is_a_failure_too(tmp_path):
    path = notebook(tmp_path / "lesson.ipynb", LATE, 'println!("next");', 'println!("more");')
    run = [sys.executable, "-m", "course_jupyter.run", str(path)]
    ran = subprocess.run(run, capture_output=True, text=True, check=True)
    report = json.loads(ran.stdout.splitlines()[-1])
    # evcxr names the cell that runs when the word comes.
    assert not report["ok"] and report["cell"] in (2, 3, 4), report
    assert "a warning" in report["message"]
