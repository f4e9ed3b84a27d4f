"""Times the kernel as a learner meets it; prints the figures as JSON.

    python -m course_jupyter.bench RUNS PROGRAM CELLS

PROGRAM is a release build of the cells in the folder CELLS and prints what they print, a line each
in the order of their names: seconds.
"""

import json
import pathlib
import subprocess
import sys
import time

from jupyter_client import KernelManager

from .failures import STARTUP_TIMEOUT, plain

CELLS = {
    "first_cell": ':dep course = { path = "../crates/course" }\nuse course::prelude::*;',
    "first_let": "let x = Tensor::arange(0f32, 6., &Device::Cpu)?.reshape((2, 3))?;",
    "println": 'println!("{:?}", x.dims());',
}


def run(client, code):
    """Runs a cell; returns seconds and what it printed. A failed cell ends the measurement."""
    said = []

    def keep(message):
        content = message["content"]
        if message["msg_type"] == "error" or content.get("name") == "stderr":
            sys.exit(f"cell failed: {plain(str(content))}")
        if message["msg_type"] == "stream":
            said.append(content["text"])

    start = time.monotonic()
    client.execute_interactive(code, output_hook=keep, allow_stdin=False, timeout=600)
    return time.monotonic() - start, "".join(said)


def measure(program, cells, figures):
    """One kernel's life."""
    manager = KernelManager(kernel_name="rust")
    start = time.monotonic()
    manager.start_kernel()
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=STARTUP_TIMEOUT)
        figures["ready"].append(time.monotonic() - start)
        for name, code in CELLS.items():
            figures[name].append(run(client, code)[0])
        notebook = [float(run(client, cell.read_text())[1]) for cell in cells]
        release = subprocess.run([program], capture_output=True, check=True).stdout.split()
        for cell, here, there in zip(cells, notebook, release, strict=True):
            figures[f"{cell.stem}_ratio"].append(here / float(there))
    finally:
        client.stop_channels()
        manager.shutdown_kernel()


def main(runs, program, folder):
    cells = sorted(pathlib.Path(folder).glob("*.rs"))
    ratios = [f"{cell.stem}_ratio" for cell in cells]
    figures = {name: [] for name in ("ready", *CELLS, *ratios)}
    for number in range(1, runs + 1):
        measure(program, cells, figures)
        print(f"kernel {number} of {runs} measured", file=sys.stderr)
    json.dump(figures, sys.stdout)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
