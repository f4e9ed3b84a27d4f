"""A failure looks like a failure: plain nbconvert exits 1 for it, and the runner says where."""

import json
import subprocess
import sys

import pytest
from conftest import notebook, program

# What is wrong, the cell, its tags, whether it is well, the failing line, what the report says.
CASES = {
    "good": ('println!("{}", 6 * 7);', (), True, None, ""),
    "allowed_stderr": ('eprintln!("a warning");', ("stderr-ok",), True, None, ""),
    "stderr": ('let a = 1;\neprintln!("a warning");', (), False, None, "a warning"),
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
