"""Times LoRA with PEFT for `cargo course bench --against peft`.

    python peft_bench THREADS eager|compiled

Reads one JSON request a line and answers each with one line. crates/course/examples/peft_bench
answers the same requests in Rust:

    {"do": "load", "id": "a", "case": {...}}      builds a case, warms it up
    {"do": "time", "id": "a", "n": 20}            one unrecorded iteration, then n timed singly
    {"do": "check", "case": {...}, "file": "..."} writes the weights, gives the first losses
    {"do": "peak"}                                the most memory that was resident, in bytes
    {"do": "quit"}

An answer with the key "error" says what went wrong; the traceback is on stderr.
"""

import json
import os
import re
import sys
import time
import traceback

THREADS, MODE = int(sys.argv[1]), sys.argv[2]

# The answers keep stdout for themselves; whatever a library prints goes to stderr.
answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)

import accelerate  # noqa: E402
import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

import cases  # noqa: E402

WARM_UP = 3


def memory(field):
    """A field of /proc/self/status in bytes, 0 where the system has none."""
    try:
        with open("/proc/self/status") as status:
            found = re.search(rf"^{field}:\s+(\d+) kB", status.read(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def timed(case):
    start = time.perf_counter()
    case.iterate()
    return time.perf_counter() - start


class Worker:
    def __init__(self):
        self.loaded = {}
        self.at_start = memory("VmRSS")

    def load(self, request):
        case = cases.build(request["case"], compiled=MODE == "compiled")
        seconds = [timed(case) for _ in range(WARM_UP)]
        self.loaded[request["id"]] = case
        return {"seconds": seconds}

    def time(self, request):
        case = self.loaded[request["id"]]
        case.iterate()
        return {"seconds": [timed(case) for _ in range(request["n"])]}

    def check(self, request):
        case = cases.build(request["case"], compiled=False)
        case.write(request["file"])
        return {"losses": [case.loss() for _ in range(3)]}

    def peak(self, _):
        return {"peak": memory("VmHWM"), "start": self.at_start}


def answer(text):
    print(json.dumps(text), file=answers)


def main():
    torch.set_num_threads(THREADS)
    worker = Worker()
    modules = (accelerate, peft, torch, transformers)
    versions = {module.__name__: module.__version__ for module in modules}
    versions["python"] = sys.version.split()[0]
    answer({"ready": True, "threads": torch.get_num_threads(), "versions": versions})
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "quit":
            break
        try:
            answer(getattr(worker, request["do"])(request))
        except Exception as error:
            traceback.print_exc()
            answer({"error": f"{type(error).__name__}: {error}"})


main()
