"""Every command of the documents is one that works: it runs here, or it stands below with the test that runs it."""

import os
import re
import signal
import subprocess
import time
import urllib.request

import pytest
from conftest import ROOT

CLI = os.environ["COURSE_CLI"]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "notebooks/TEACHING.md", "crates/lora/README.md"]
COMMAND = r"(?:cargo|jupyter|jupytext|pip|python|rustup|sudo|brew|xcode-select)\s"

# A command as it is written, and what of `cargo course` is run for it: the words in capitals and in brackets filled in.
RUN = {
    "cargo course setup": ["setup"],
    "cargo course check [NN …]": ["check", "02"],
    "cargo course check NN": ["check", "2"],
    "cargo course check 02": ["check", "02"],
    "cargo course exercises": ["exercises"],
    "cargo course exercises [NN …]": ["exercises", "01", "13"],
    "cargo course schedule": ["schedule"],
    r"cargo course data list\|verify": ["data", "list"],
    "cargo course data verify": ["data", "verify"],
    "cargo course data fetch NAME": ["data", "fetch", "reveal"],
    "cargo course exec PROGRAM …": ["exec", "jupyter", "--version"],
    "cargo course exec jupyter nbconvert --to notebook --execute --output-dir target/nbconvert "
    "notebooks/01_introduction.ipynb": None,
}

# Where else a command is run, or why it cannot be: it changes the machine, or takes long on purpose.
ELSEWHERE = {
    "cargo course": "only named",
    "cargo course test": "runs this test",
    "cargo course lab": "test_lab_answers below",
    "cargo course check": "a stage of `cargo course test`",
    "cargo course run": "a stage of `cargo course test`",
    "cargo course run [NN …]": "a stage of `cargo course test`",
    "cargo course run 01 04": "a stage of `cargo course test`",
    "cargo course check --cuda": ".github/workflows/ci.yml",
    "cargo course lab --device cuda": "needs a card; tests/jupyter/test_hostile.py without one",
    "cargo course test --device cuda": ".github/workflows/ci.yml",
    "cargo course export --bin --cuda": ".github/workflows/ci.yml",
    "cargo course browser --hub": ".github/workflows/ci.yml",
    'sudo env "PATH=$PATH" RUSTUP_HOME=$RUSTUP_HOME CARGO_HOME=$CARGO_HOME COURSE_HOME=$COURSE_HOME cargo course hub': "needs "
    "root; tests/browser/test_hub.py",
    "cargo course hub": "tests/browser/test_hub.py",
    "cargo course run 02": "a stage of `cargo course test`",
    "cargo course run --timeout 20 02": "a stage of `cargo course test`",
    "cargo course run NN --write": "tests/jupyter/test_run.py",
    "cargo course schedule --write": "tests/jupyter/test_hostile.py",
    "cargo course site": "tests/jupyter/test_publish.py",
    "cargo course slides": "tests/jupyter/test_publish.py",
    "cargo course browser": ".github/workflows/ci.yml",
    "cargo course bundle": ".github/workflows/ci.yml",
    "cargo course lab --offline ..": "tests/offline.sh",
    "cargo course export --bin [NN …]": ".github/workflows/ci.yml",
    "cargo course pretrain NAME": "minutes a model; crates/course/tests/checkpoints.rs measures what it made",
    "cargo course bench kernel": "a benchmark",
    "cargo course bench growth": "a benchmark",
    "cargo course bench --against peft": "a benchmark, with 7 GB to install",
    "cargo bench -p lora": "a benchmark",
    "cargo bench -p lora --bench ops -- conv": "a benchmark",
    "cargo run --release -p finetune -- --model MODEL --data FILE.jsonl --out OUT": "crates/finetune/tests/finetune.rs",
    "cargo test -p lora -p course --test parity write_roundtrip -- --ignored": "writes fixtures for PEFT to read",
    "python data/excerpts.py FOLDER": "needs packages that are downloaded by hand",
    "pip install jupytext": "changes the machine",
    "jupytext --to md:myst NN_topic.ipynb": "a program of its own",
    "jupytext --to ipynb --update NN_topic.md": "a program of its own",
    "sudo apt install python3-venv": "changes the machine",
    "brew install python": "changes the machine",
    "xcode-select --install": "changes the machine",
    "rustup component add rust-src": "changes the machine",
}


def documented():
    """Every command of the documents, without the comment behind it."""
    found = set()
    for document in DOCUMENTS:
        fenced = False
        for line in (ROOT / document).read_text(encoding="utf-8").splitlines():
            if line.lstrip().startswith("```"):
                fenced = not fenced
            elif fenced and re.match(rf"\s*{COMMAND}", line):
                found.add(re.sub(r"\s+# .*", "", line).strip())
            elif not fenced:
                found.update(re.findall(rf"`({COMMAND}[^`]*)`", line))
    return found | {"cargo course"}


def test_no_command_is_left_out_and_none_is_gone():
    assert documented() - RUN.keys() - ELSEWHERE.keys() == set()
    assert (RUN.keys() | ELSEWHERE.keys()) - documented() == set()


def test_the_places_named_run_the_command():
    for command, where in ELSEWHERE.items():
        if re.fullmatch(r"[\w./]+", where):
            # `cargo course NAME`, or `cargo run … -p NAME`.
            name = re.search(r"cargo course (\w+)|-p (\w+)", command)
            text = (ROOT / where).read_text(encoding="utf-8")
            assert (name[1] or name[2]) in text, (command, where)


@pytest.mark.parametrize("command", RUN)
def test_a_command_of_the_documents_runs(command):
    arguments = RUN[command] or command.split()[2:]
    ran = subprocess.run(
        [CLI, *arguments], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_lab_answers(tmp_path):
    path = tmp_path / "log"
    with open(path, "w", encoding="utf-8") as log:
        lab = subprocess.Popen(
            [CLI, "lab", "--no-browser"], cwd=ROOT, stdin=subprocess.DEVNULL, stderr=log, start_new_session=True
        )
    try:
        end = time.monotonic() + 60
        address = r"http://127\.0\.0\.1:\d+/lab\?token=\w+"
        while not (found := re.search(address, path.read_text(encoding="utf-8"))):
            assert lab.poll() is None and time.monotonic() < end, path.read_text(encoding="utf-8")
            time.sleep(0.2)
        # Not by a proxy of the environment.
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(found[0], timeout=10) as answer:
            assert answer.status == 200 and b"JupyterLab" in answer.read()
    finally:
        if lab.poll() is None:
            os.killpg(lab.pid, signal.SIGTERM)
        lab.wait(20)
