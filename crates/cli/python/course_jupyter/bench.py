"""Times the kernel as a learner meets it; prints the figures as JSON.

    python -m course_jupyter.bench RUNS MATMUL_PROGRAM
"""

import json
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

# The same loop as crates/course/examples/matmul.rs: seconds of the fastest of 20 products.
MATMUL = """
let square = Tensor::ones((1024, 1024), DType::F32, &Device::Cpu)?;
let mut fastest = f64::INFINITY;
for _ in 0..20 {
    let start = std::time::Instant::now();
    let _ = square.matmul(&square)?;
    fastest = fastest.min(start.elapsed().as_secs_f64());
}
println!("{fastest}");
"""


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


def measure(program, figures):
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
        notebook = float(run(client, MATMUL)[1])
        release = float(subprocess.run([program], capture_output=True, check=True).stdout)
        figures["matmul_ratio"].append(notebook / release)
    finally:
        client.stop_channels()
        manager.shutdown_kernel()


def main(runs, program):
    figures = {name: [] for name in ("ready", *CELLS, "matmul_ratio")}
    for number in range(1, runs + 1):
        measure(program, figures)
        print(f"kernel {number} of {runs} measured", file=sys.stderr)
    json.dump(figures, sys.stdout)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
