"""Finds the folder of a running kernel."""

import os
from pathlib import Path


def folder(connection_file):
    """evcxr's working folder of the kernel with this connection file, or None."""
    home, own = os.environ.get("COURSE_HOME"), os.environ.get("COURSE_KERNELS")
    if not (home or own):
        return None
    for lock in Path(own or Path(home, "kernels")).glob("run-*.lock"):
        try:
            if lock.read_text() == os.path.abspath(connection_file):
                return lock.with_suffix("")
        except OSError:
            continue
    return None


def generated_source(connection_file):
    """The Rust file that evcxr compiled last for this kernel, or None."""
    place = folder(connection_file)
    try:
        return place and (place / "src/lib.rs").read_text()
    except OSError:
        return None
