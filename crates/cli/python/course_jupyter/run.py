"""Executes one notebook headless and prints what happened as one line of JSON.

    python -m course_jupyter.run NOTEBOOK [--exercises] [--timeout SECONDS]
        [--displayed TYPE,TYPE] [--write] [--failed FILE]

Cells run in order in a fresh kernel; the first failed cell ends the run. With --exercises each
solution is then put in place of its starter and its check is run again. With --write the outputs
are stored, normalised so that a second run gives the same file; what ran of a notebook that fails
goes to the file of --failed instead. The types of --displayed have a display of their own, and
their `Debug` text as a cell's result is a failure.
"""

import argparse
import copy
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

from .failures import OUTPUT_TIMEOUT, STARTUP_TIMEOUT, error_of, failing_line, stderr_of
from .kernels import generated_source
from .late_output import last_word, listen_for_it

KERNELSPEC = {"display_name": "Rust", "language": "rust", "name": "rust"}
LANGUAGE = {"file_extension": ".rs", "mimetype": "text/rust", "name": "rust"}


class Failed(Exception):
    """A cell failed: which one, at which line, and why."""

    def __init__(self, number, source, message, generated=None):
        super().__init__(message)
        self.number, self.message = number, message.strip()
        self.line = failing_line(source, self.message, generated)
        lines = source.splitlines()
        self.text = lines[self.line - 1].strip() if self.line else ""


class Events:
    """The metrics and exercise results that the notebook's process writes to COURSE_METRICS."""

    def __init__(self):
        handle, self.path = tempfile.mkstemp(prefix="course-metrics-")
        os.close(handle)
        os.environ["COURSE_METRICS"] = self.path

    def read(self):
        with open(self.path, encoding="utf-8") as file:
            return [json.loads(line) for line in file if line.strip()]

    def close(self):
        os.unlink(self.path)


def run_cell(client, cell, number, displayed):
    """Runs a cell; raises Failed for everything that a learner would call a failure."""
    try:
        client.execute_cell(cell, number - 1)
    except CellTimeoutError as error:
        raise Failed(number, cell.source, str(error).splitlines()[0]) from None
    except (CellExecutionError, DeadKernelError) as error:
        raise Failed(number, cell.source, error_of(cell) or str(error)) from None
    check_stderr(client, number, cell)
    kind = debug_text(cell, displayed)
    if kind:
        # No line of the cell is to blame.
        raise Failed(
            number,
            "",
            f"the cell shows the `Debug` text of its `{kind}`, not its display: let the last "
            "expression move no variable (borrow or clone it, or bind the value with `let` and "
            "end the cell with its name)",
        )


def check_stderr(client, number, last):
    """Raises Failed for a cell up to this number that wrote to stderr: what an earlier one wrote can come late."""
    for place, ran in enumerate(client.nb.cells[:number], 1):
        text = stderr_of(ran)
        if text:
            generated = generated_source(client.km.connection_file) if ran is last else None
            raise Failed(place, ran.source, text, generated)


def debug_text(cell, displayed):
    """The type of which a cell's result is nothing but the `Debug` text."""
    kinds = re.compile(rf"\b({'|'.join(displayed)})(?:\(| {{)")
    for output in cell.outputs:
        if displayed and list(output.get("data", [])) == ["text/plain"]:
            found = kinds.search(output["data"]["text/plain"])
            if found:
                return found[1]
    return None


def tagged(notebook, prefix):
    """Cells by the rest of a tag: {name: (number, cell)}."""
    return {
        tag.removeprefix(prefix): (number, cell)
        for number, cell in enumerate(notebook.cells, 1)
        for tag in cell.metadata.get("tags", [])
        if tag.startswith(prefix)
    }


def run_exercises(client, notebook, events, displayed):
    """Starter must fail its check, the solution must pass it."""
    checks, solutions = tagged(notebook, "check-"), tagged(notebook, "solution-")
    starters = tagged(notebook, "starter-")
    outcome = {e["exercise"]: e["passed"] for e in events.read() if "exercise" in e}
    for name, (number, starter) in starters.items():
        if name not in outcome:
            raise Failed(number, starter.source, f"exercise {name}: its check reported nothing")
        if outcome[name]:
            raise Failed(number, starter.source, f"exercise {name}: the starter passes the check")
    for name in starters:
        number, cell = solutions[name]
        rust = re.search(r"^```rust\n(.*?)^```", cell.source, re.S | re.M)
        run_cell(client, nbformat.v4.new_code_cell(rust[1]), number, displayed)
        number, check = checks[name]
        run_cell(client, nbformat.v4.new_code_cell(check.source), number, displayed)
        passed = [e["passed"] for e in events.read() if e.get("exercise") == name]
        if len(passed) < 2 or not passed[-1]:
            raise Failed(number, check.source, f"exercise {name}: the solution fails the check")
    if starters:
        last_word(client)
        check_stderr(client, len(client.nb.cells), None)


def code_sha256(notebook):
    """The same as `Notebook::code_sha256` of the command-line tool."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\n\0\n".join(code).encode()).hexdigest()


def normalise(executed, committed, metrics):
    """Makes outputs the same for every run: no timings, no volatile numbers."""
    unchanged = code_sha256(executed) == code_sha256(committed)
    count = 0
    for cell, old in zip(executed.cells, committed.cells):
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        count += 1
        cell.execution_count = count
        # A cell tagged `timing` shows what this machine measured: kept until the code changes.
        if "timing" in cell.metadata.get("tags", []) and unchanged and old.get("outputs"):
            cell.outputs = old.outputs
        cell.outputs = merged(cell.outputs)
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
    executed.metadata = nbformat.from_dict(
        {
            **{k: v for k, v in executed.metadata.items() if k != "widgets"},
            "kernelspec": KERNELSPEC,
            "language_info": LANGUAGE,
            "course": {"code_sha256": code_sha256(executed), "metrics": metrics},
        }
    )


def merged(outputs):
    """Joins what the kernel sent line by line."""
    result = []
    for output in outputs:
        last = result[-1] if result else None
        if last and output.output_type == last.output_type == "stream" and output.name == last.name:
            last.text += output.text
        else:
            result.append(output)
    return result


def so_far(notebook, reached, failed):
    """Leaves of a notebook what ran: up to the cell `reached`, and why a cell failed."""
    for number, cell in enumerate(notebook.cells, 1):
        if cell.cell_type == "code" and number > reached:
            cell.outputs, cell.execution_count = [], None
    if failed:
        cell = notebook.cells[failed.number - 1]
        if cell.cell_type == "code" and not error_of(cell):
            error = {"ename": "Failed", "evalue": failed.message, "traceback": [failed.message]}
            cell.outputs.append(nbformat.v4.new_output("error", **error))


def store(notebook, path):
    """Writes a notebook so that a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        part.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def execute(path, options):
    """Runs a notebook; returns the report as a dictionary."""
    committed = nbformat.read(path, as_version=4)
    notebook = nbformat.read(path, as_version=4)
    events = Events()
    client = NotebookClient(
        notebook,
        timeout=options.timeout,
        startup_timeout=STARTUP_TIMEOUT,
        iopub_timeout=OUTPUT_TIMEOUT,
        raise_on_iopub_timeout=True,
        kernel_name="rust",
        resources={"metadata": {"path": str(path.parent)}},
    )
    report = {"notebook": path.name, "ok": True, "exercises": 0}
    executed, reached, failure = None, 0, None
    start = time.monotonic()
    try:
        with client.setup_kernel():
            report["startup_seconds"] = round(time.monotonic() - start, 2)
            start = time.monotonic()
            for number, cell in enumerate(notebook.cells, 1):
                if cell.cell_type == "code":
                    reached = number
                    run_cell(client, cell, number, options.displayed)
            report["seconds"] = round(time.monotonic() - start, 2)
            metrics = {e["metric"]: e["value"] for e in events.read() if "metric" in e}
            report["metrics"] = metrics
            # nbclient puts every cell that it runs into its notebook: what is stored is a copy.
            executed = copy.deepcopy(notebook)
            if options.exercises:
                run_exercises(client, notebook, events, options.displayed)
                report["exercises"] = len(tagged(notebook, "starter-"))
    except Failed as failed:
        failure = failed
        report.update(ok=False, cell=failed.number, line=failed.line, source=failed.text)
        report["message"] = failed.message
    except Exception as error:  # noqa: BLE001 - a kernel that does not start is a failed notebook
        report.update(ok=False, message=f"{type(error).__name__}: {error}")
    finally:
        events.close()
    report.setdefault("seconds", round(time.monotonic() - start, 2))
    if report["ok"] and options.write:
        normalise(executed, committed, metrics)
        store(executed, path)
        if options.failed:
            options.failed.unlink(missing_ok=True)
    elif options.write and options.failed and reached:
        kept = executed or notebook
        try:
            so_far(kept, reached, failure)
            store(kept, options.failed)
            report["kept"] = str(options.failed)
        except OSError as error:
            report["message"] += f"\n(What ran could not be kept: {error})"
    return report


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--failed", type=Path)
    parser.add_argument("--displayed", type=lambda names: names.split(","), default=[])
    parser.add_argument("--exercises", action="store_true")
    parser.add_argument("--timeout", type=int, default=300)
    options = parser.parse_args()
    listen_for_it()
    print(json.dumps(execute(options.notebook.resolve(), options)))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
