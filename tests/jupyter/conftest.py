"""Kernels and notebooks for the tests. `cargo course test` runs them in the course's environment."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from jupyter_client import KernelManager

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"
KERNELS = Path(os.environ["COURSE_HOME"], "kernels")
DEP = ':dep course = { path = "../crates/course" }\nuse course::prelude::*;'
STARTUP = 600

# `cargo course test` runs below cargo, whose library path would hide a kernel that cannot find
# Rust's standard library: the tests start kernels as a plain Jupyter does.
os.environ.pop("LD_LIBRARY_PATH", None)


class Cells:
    """A running kernel: cells go in, what they said comes out."""

    def __init__(self, cwd=NOTEBOOKS, dep=True):
        self.manager = KernelManager(kernel_name="rust")
        self.manager.start_kernel(cwd=str(cwd))
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=STARTUP)
        if dep:
            self.run(DEP)

    def send(self, code):
        """Runs a cell; returns its status and everything that it said."""
        said = []

        def keep(message):
            content = message["content"]
            said.append(content.get("text") or content.get("evalue") or "")

        reply = self.client.execute_interactive(
            code, output_hook=keep, allow_stdin=False, timeout=120
        )
        return reply["content"]["status"], "".join(said)

    def run(self, code):
        """Runs a cell that must succeed; returns its output."""
        status, said = self.send(code)
        assert status == "ok", said
        return said.strip()

    @property
    def launcher(self):
        return self.manager.provisioner.process.pid

    @property
    def folder(self):
        return KERNELS / f"run-{self.launcher}"

    def processes(self):
        """Every process below the launcher, the launcher included."""
        table = subprocess.run(
            ["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True
        ).stdout
        children = {}
        for line in table.splitlines():
            pid, parent = map(int, line.split())
            children.setdefault(parent, []).append(pid)
        found, todo = [], [self.launcher]
        while todo:
            pid = todo.pop()
            found.append(pid)
            todo += children.get(pid, [])
        return found

    def shut_down(self):
        self.client.stop_channels()
        if self.manager.has_kernel:
            self.manager.shutdown_kernel(now=True)


@contextlib.contextmanager
def kernel(**options):
    cells = Cells(**options)
    try:
        yield cells
    finally:
        cells.shut_down()


@pytest.fixture(scope="module")
def cells():
    """One kernel for the tests of a file."""
    with kernel() as running:
        yield running


def gone(pid):
    """Whether a process has ended (a zombie has)."""
    state = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True
    ).stdout.strip()
    return not state or state.startswith("Z")


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return False


def notebook(path, *sources, tags=()):
    """Writes a notebook whose last cell has the tags."""
    written = nbformat.v4.new_notebook()
    written.cells = [nbformat.v4.new_code_cell(source) for source in (DEP, *sources)]
    written.cells[-1].metadata["tags"] = list(tags)
    written.metadata["kernelspec"] = {"name": "rust", "display_name": "Rust", "language": "rust"}
    nbformat.write(written, path)
    return path


def program(name):
    """A program of the course's environment."""
    return str(Path(sys.executable).parent / name)
