"""Starts evcxr itself, without the launcher, and runs a first cell: this fills its folder.

    python -m course_jupyter.probe EVCXR_JUPYTER

The environment (EVCXR_TMPDIR, …) is the caller's. Exits non-zero with evcxr's message when the
kernel does not come up or the cell fails.
"""

import os
import sys

from jupyter_client import KernelManager
from jupyter_client.kernelspec import KernelSpec

from .failures import STARTUP_TIMEOUT, plain

FIRST_CELL = """\
:dep course = { path = "../crates/course" }
use course::prelude::*;
let course_probe = Tensor::arange(0f32, 6., &Device::Cpu)?.reshape((2, 3))?;
println!("{}", course_probe.elem_count());
"""


def main(evcxr):
    manager = KernelManager()
    manager._kernel_spec = KernelSpec(
        argv=[evcxr, "--control_file", "{connection_file}"], display_name="Rust", language="rust"
    )
    manager.start_kernel(env=dict(os.environ), cwd=os.getcwd())
    client = manager.client()
    client.start_channels()
    messages = []

    def keep(message):
        content = message["content"]
        if message["msg_type"] == "stream":
            messages.append(content["text"])
        elif message["msg_type"] == "error":
            messages.append("\n".join(content["traceback"]))

    try:
        client.wait_for_ready(timeout=STARTUP_TIMEOUT)
        reply = client.execute_interactive(
            FIRST_CELL, timeout=STARTUP_TIMEOUT, output_hook=keep, allow_stdin=False
        )
        text = plain("".join(messages))
        if reply["content"]["status"] != "ok" or text.strip() != "6":
            sys.exit(f"the first cell failed:\n{text}")
    except RuntimeError as error:
        # evcxr has written why to stderr itself.
        sys.exit(f"the Rust kernel did not start: {error}")
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


if __name__ == "__main__":
    main(sys.argv[1])
