"""Hostile and unlucky input to `cargo course`: each time one clear message, nothing lost, and the next run is well.

A case works on a copy of the checkout and a home of its own. It names what goes wrong, the command,
what the message must hold, and what makes the command succeed again.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from ctypes.util import find_library
from hashlib import sha256
from pathlib import Path

import pytest
from conftest import NOTEBOOKS, ROOT

CLI = os.environ["COURSE_CLI"]
LESSON = "notebooks/01_introduction.ipynb"
DIGITS = "data/digits.u8"
FUTURE = 4_102_444_800  # 2100


class Place:
    """A copy of the checkout without the crates' sources, and an empty home."""

    def __init__(self, folder):
        self.root, self.home = folder / "checkout", folder / "home"
        self.home.mkdir()
        (self.root / "crates/course").mkdir(parents=True)
        shutil.copy(ROOT / "crates/course/Cargo.toml", self.root / "crates/course")
        shutil.copytree(NOTEBOOKS, self.root / "notebooks", ignore=shutil.ignore_patterns(".*"))
        shutil.copytree(ROOT / "data", self.root / "data")

    def has_tools(self):
        """Gives the home the Python environment and reveal.js of the home that runs these tests."""
        home = Path(os.environ["COURSE_HOME"])
        for entry in [*home.glob("python-*"), home / "data"]:
            if not (self.home / entry.name).exists():
                (self.home / entry.name).symlink_to(entry)

    def run(self, *command, before=(), **environment):
        return subprocess.run(
            [*before, CLI, *command],
            cwd=self.root,
            env={**os.environ, "COURSE_HOME": str(self.home), **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def path(self, name):
        return self.root / name

    def everything(self):
        """Every file of the checkout with its content."""
        files = (path for path in sorted(self.root.rglob("*")) if path.is_file())
        return {str(path.relative_to(self.root)): path.read_bytes() for path in files}


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def cut(name, keep=0.5):
    def damage(place):
        path = place.path(name)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * keep)])

    return damage


def written(name, content):
    return lambda place: place.path(name).write_bytes(content)


def edited(name, old, new):
    def damage(place):
        text = place.path(name).read_text(encoding="utf-8")
        assert old in text
        place.path(name).write_text(text.replace(old, new, 1), encoding="utf-8")

    return damage


def removed(name):
    return lambda place: place.path(name).unlink()


# What goes wrong, the command, what its message must hold.
DAMAGE = {
    "notebook cut off": (cut(LESSON), ["exercises"], "01_introduction.ipynb is not a notebook"),
    "notebook empty": (cut(LESSON, 0), ["schedule"], "01_introduction.ipynb is not a notebook"),
    "notebook of zeros": (written(LESSON, bytes(99)), ["exercises", "01"], "is not a notebook"),
    "notebook no text": (written(LESSON, b"\xff\xfe{}"), ["exercises", "01"], "01_introduction.ipynb"),
    "notebook another JSON": (written(LESSON, b"[1]"), ["exercises", "01"], "has no cells"),
    "notebook without minutes": (
        edited(LESSON, "For the teacher: minutes", "minutes"),
        ["schedule"],
        "teacher's table of minutes",
    ),
    "exercise without a check": (
        edited(LESSON, "check-break_even", "other"),
        ["exercises", "01"],
        "wants a cell tagged check-break_even",
    ),
    "page without its place": (
        edited("notebooks/TEACHING.md", "<!-- End of what is written. -->", ""),
        ["schedule", "--write"],
        "put the line `<!-- End of what is written. -->` back",
    ),
    "notebook cut off, for the site": (cut(LESSON), ["site"], "01_introduction.ipynb"),
    "notebook without its time": (
        edited(LESSON, "**Time:**", "Time:"),
        ["slides", "01"],
        "01_introduction.ipynb: the first cell does not say `**Time:**",
    ),
    "page gone": (removed("notebooks/TEACHING.md"), ["schedule"], "TEACHING.md"),
    "manifest cut off": (cut("data/manifest.toml"), ["data", "verify"], "manifest.toml"),
    "manifest no TOML": (written("data/manifest.toml", b"]["), ["data", "list"], "is damaged"),
    "manifest with a way out": (
        edited("data/manifest.toml", '[fetch.minilm.files."config.json"]', '[fetch.minilm.files."../x"]'),
        ["data", "list"],
        "must be a plain file name",
    ),
    "data cut off": (cut(DIGITS), ["data", "verify"], "Get it back with git restore data"),
    "data of the same size": (
        written(DIGITS, bytes(116805)),
        ["data", "verify"],
        "its SHA-256 is",
    ),
    "data gone": (removed(DIGITS), ["data", "verify"], "data/digits.u8"),
    "checkpoint cut off": (
        cut("data/checkpoints/sotu-lm/model.safetensors"),
        ["data", "verify"],
        "data/checkpoints/sotu-lm/model.safetensors",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_and_nothing_else_changes(name, place):
    damage, command, words = DAMAGE[name]
    if command[0] in ("site", "slides"):
        place.has_tools()
        command = [*command, "--out", str(place.home / "pages")]
    whole = place.everything()
    damage(place)
    damaged = place.everything()
    ran = place.run(*command)
    assert ran.returncode == 1, ran
    assert_one_message(ran, words)
    assert place.everything() == damaged
    for path, content in whole.items():
        place.path(path).write_bytes(content)
    ran = place.run(*command)
    assert ran.returncode == 0, ran


def assert_one_message(ran, words):
    said = ran.stderr
    assert words in said, said
    assert "panicked" not in said and "RUST_BACKTRACE" not in said, said
    assert len(said.splitlines()) < 12, said


# Environment, the command, what its message must hold.
ENVIRONMENT = {
    "a home with a space": ({"COURSE_HOME": "/tmp/a b"}, "Set COURSE_HOME to a folder without one"),
    "a home that is a file": ({"COURSE_HOME": __file__}, "set COURSE_HOME to a folder you may write to"),
    "a home below a file": (
        {"COURSE_HOME": f"{__file__}/home"},
        "set COURSE_HOME to a folder you may write to",
    ),
    "no home at all": (
        {"COURSE_HOME": "", "HOME": "", "XDG_CACHE_HOME": ""},
        "set COURSE_HOME to a folder for the tools",
    ),
    "another Python that is none": ({"COURSE_PYTHON": "/nowhere/python3"}, "COURSE_PYTHON=/path/to/python3"),
    "no Python": ({"PATH": "/nowhere", "COURSE_PYTHON": ""}, "Install Python 3.10 or newer"),
}


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_an_environment_that_cannot_be_is_named(name, place):
    environment, words = ENVIRONMENT[name]
    ran = place.run("data", "fetch", "reveal", **environment)
    assert ran.returncode == 1, ran
    assert_one_message(ran, words)


# What a machine without a card is asked for: command, environment, what its message must hold.
CARD = {
    "no driver": (["setup", "--device", "cuda"], {}, "needs an NVIDIA card with its driver"),
    "no driver, by the variable": (["setup"], {"COURSE_DEVICE": "cuda"}, "`cargo course check --cuda`"),
    "a device of another kind": (["setup"], {"COURSE_DEVICE": "gpu"}, "use COURSE_DEVICE=cpu or COURSE_DEVICE=cuda"),
    "a toolkit that is none": (["check", "--cuda"], {"CUDA_HOME": "/nowhere"}, "unset CUDA_HOME"),
    "a card of no kind": (["check", "--cuda"], {"CUDA_COMPUTE_CAP": "hopper"}, "write 90 for 9.0"),
}


@pytest.mark.parametrize("name", CARD)
def test_a_card_that_is_not_there_is_named(name, place):
    if name.startswith("no driver") and find_library("cuda"):
        pytest.skip("this machine has a driver")
    command, environment, words = CARD[name]
    ran = place.run(*command, **environment)
    assert ran.returncode == 1, ran
    assert_one_message(ran, words)


def test_a_folder_that_is_no_checkout(tmp_path, place):
    place.root = tmp_path
    ran = place.run("exercises")
    assert ran.returncode == 1
    assert_one_message(ran, "is not inside a checkout of the course")


def test_times_in_the_future_and_at_the_beginning_change_nothing(place):
    for stamp in (FUTURE, 0):
        for path in [place.root, *place.root.rglob("*")]:
            os.utime(path, (stamp, stamp))
        before = place.everything()
        for command in (["data", "verify"], ["schedule", "--write"], ["exercises"]):
            ran = place.run(*command)
            assert ran.returncode == 0, ran
        assert place.everything() == before


# A disk of its own for the command, mounted by a user of a namespace of its own.
SMALL_DISK = "mount -t tmpfs -o size={size} none '{folder}' && {then}"


def on_a_disk(folder, size, then, *command):
    script = SMALL_DISK.format(size=size, folder=folder, then=then)
    return ["unshare", "-rm", "sh", "-c", f'{script} && exec "$0" "$@"', *command]


def can_mount():
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return False
    command = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs none /mnt"]
    return subprocess.run(command, capture_output=True).returncode == 0


needs_mounts = pytest.mark.skipif(not can_mount(), reason="this system lets no user mount")


@needs_mounts
def test_a_full_disk_leaves_the_page_as_it_was(place):
    """The notebooks lie on a disk with no byte left."""
    page = place.path("notebooks/TEACHING.md")
    text = page.read_text(encoding="utf-8")
    (place.home / "copy").mkdir()
    shutil.copytree(place.path("notebooks"), place.home / "copy", dirs_exist_ok=True)
    stale = place.home / "copy/TEACHING.md"
    stale.write_text(text.replace("| 09:00 |", "| 08:00 |"), encoding="utf-8")
    fill = (
        f"cp -r '{place.home}/copy/.' . ; cat /dev/zero > fill 2>/dev/null; "
        f"cd '{place.root}'"
    )
    notebooks = place.path("notebooks")
    size = sum(path.stat().st_size for path in notebooks.iterdir()) // 1024 + 100
    before = on_a_disk(notebooks, f"{size}k", f"cd '{notebooks}' && {{ {fill}; }}")
    after = f"; code=$?; cmp -s notebooks/TEACHING.md '{stale}' || echo DAMAGED; ls notebooks >&2; exit $code"
    before[4] = before[4].replace('exec "$0" "$@"', f'"$0" "$@"{after}')
    ran = place.run("schedule", "--write", before=before)
    assert ran.returncode == 1, ran
    assert "TEACHING.md" in ran.stderr and "No space left" in ran.stderr, ran.stderr
    assert "DAMAGED" not in ran.stdout and "fill" in ran.stderr and ".part" not in ran.stderr, ran


@needs_mounts
def test_a_small_disk_for_the_tools_is_told_before_anything_is_made(place):
    before = on_a_disk(place.home, "50m", "true")
    ran = place.run("setup", before=before)
    assert ran.returncode == 1, ran
    assert_one_message(ran, "Make room, or set COURSE_HOME to a folder on another disk")


@needs_mounts
def test_a_home_that_may_not_be_written(place):
    before = on_a_disk(place.home, "1m", f"mount -o remount,ro '{place.home}'")
    ran = place.run("data", "fetch", "reveal", before=before)
    assert ran.returncode == 1, ran
    assert_one_message(ran, "Read-only file system")
    assert place.run("data", "list").returncode == 0


def wheel(folder, size):
    """A package of one file, for pip to find in a folder."""
    path = folder / "tiny_data-1.0-py3-none-any.whl"
    content = b"x" * size
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {
            "tiny_data/a.bin": content,
            "tiny_data-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n",
            "tiny_data-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            "tiny_data-1.0.dist-info/RECORD": b"",
        }.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    sums = [sha256(data).hexdigest() for data in (path.read_bytes(), content)]
    return (
        '\n[fetch.tiny]\nabout = "x"\nlicence = "l"\npackage = "pypi:tiny-data==1.0"\n'
        f'package_size = {path.stat().st_size}\npackage_sha256 = "{sums[0]}"\n'
        f'[fetch.tiny.files."a.bin"]\nfile = "tiny_data/a.bin"\nsize = {size}\nsha256 = "{sums[1]}"\n'
    )


def test_a_download_that_is_killed_at_any_moment_comes_well_the_next_time(place, tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with open(place.path("data/manifest.toml"), "a", encoding="utf-8") as manifest:
        manifest.write(wheel(wheels, 3_000_000))
    # The environment of the course that runs these tests, so that none is made.
    home = Path(os.environ["COURSE_HOME"])
    for entry in home.glob("python-*"):
        (place.home / entry.name).symlink_to(entry)
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_CONFIG_FILE": "/dev/null"}
    environment = {**os.environ, "COURSE_HOME": str(place.home), **offline}
    there = place.home / "data/tiny/a.bin"
    start = time.monotonic()
    ran = place.run("data", "fetch", "tiny", **offline)
    assert ran.returncode == 0, ran
    whole = time.monotonic() - start
    killed = 0
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        shutil.rmtree(there.parent, ignore_errors=True)
        fetching = subprocess.Popen(
            [CLI, "data", "fetch", "tiny"],
            cwd=place.root,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        time.sleep(share * whole)
        if fetching.poll() is None:
            os.killpg(fetching.pid, signal.SIGKILL)
            killed += 1
        fetching.wait()
        # The folder of a set appears whole or not at all.
        assert not there.exists() or there.stat().st_size == 3_000_000
    assert killed >= 1
    assert place.run("data", "fetch", "tiny", **offline).returncode == 0
    assert there.stat().st_size == 3_000_000
    # Cut short by somebody else: named, and got anew.
    there.write_bytes(b"x" * 10)
    ran = place.run("data", "verify")
    assert ran.returncode == 1
    assert_one_message(ran, "cargo course data fetch tiny")
    assert place.run("data", "fetch", "tiny", **offline).returncode == 0
    assert place.run("data", "verify").returncode == 0


def test_a_damaged_record_of_the_set_up_is_told(place):
    """What the kernel's launcher reads; Jupyter shows it in its log."""
    (place.home / "installed.json").write_text('{"checkout": ', encoding="utf-8")
    ran = place.run("kernel", str(place.home / "connection.json"))
    assert ran.returncode == 1
    assert_one_message(ran, "installed.json is damaged: run `cargo course setup`")
