"""What counts as a failed cell, and where in its source it failed."""

import re

# A stale kernel template is renewed before the kernel answers; that can take minutes.
STARTUP_TIMEOUT = 1800
# Seconds between a cell's reply and the last of its output, on a machine busy with other things.
OUTPUT_TIMEOUT = 60

ANSI = re.compile(r"\x1b\[[0-9;]*m")


class CellFailed(Exception):
    """A cell did not compile, panicked, met an error with `?`, or its process died."""


def plain(text):
    """Text without terminal colours."""
    return ANSI.sub("", text)


def stderr_of(cell):
    """What a cell wrote to stderr, unless it may."""
    if "stderr-ok" in cell.get("metadata", {}).get("tags", []):
        return ""
    return "".join(
        plain("".join(output["text"]))
        for output in cell.get("outputs", [])
        if output["output_type"] == "stream" and output["name"] == "stderr"
    )


def error_of(cell):
    """The kernel's own message for a cell that did not compile or whose process died."""
    return plain(
        "\n".join(
            "\n".join(output["traceback"]) or output["evalue"]
            for output in cell.get("outputs", [])
            if output["output_type"] == "error"
        )
    )


def raise_on_stderr(cell, cell_index, **_):
    """nbclient's hook `on_cell_executed`."""
    text = stderr_of(cell)
    if text:
        raise failed(cell, cell_index, f"wrote to stderr:\n{text}")


def raise_on_error(cell, cell_index, **_):
    """nbclient's hook `on_cell_error`: evcxr's reply holds no message, its output does."""
    raise failed(cell, cell_index, error_of(cell))


def failed(cell, cell_index, text):
    """The exception that names the cell and shows it."""
    return CellFailed(f"cell {cell_index + 1}: {text}\n--- the cell ---\n{cell['source']}")


def failing_line(source, message, generated=None):
    """The line of a cell (from 1) that a message points at, or None.

    A compiler's message shows the line behind its number, ` 3 │ let b: …` (the position in its head
    is always 1:1). A panic names a line of the file that evcxr generated: `generated` is that
    file's text, and the cell's line is the one that reads the same.
    """
    lines = source.splitlines()
    found = re.search(r"^ *(\d+) │", message, re.M)
    if found and 1 <= int(found[1]) <= len(lines):
        return int(found[1])
    found = re.search(r"panicked at src/lib\.rs:(\d+):\d+", message)
    if found and generated:
        written = generated.splitlines()
        number = int(found[1])
        if 1 <= number <= len(written):
            wanted = written[number - 1].strip()
            same = [i for i, line in enumerate(lines, 1) if line.strip() and line.strip() in wanted]
            if same:
                return max(same, key=lambda i: len(lines[i - 1].strip()))
    questions = [i for i, line in enumerate(lines, 1) if "?" in line.split("//")[0]]
    if len(questions) == 1 and "panicked at" not in message:
        return questions[0]
    return None
