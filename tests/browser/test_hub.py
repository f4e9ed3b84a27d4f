"""A class on one server: five learners at JupyterHub at once. Needs root; `cargo course browser --hub` starts it."""

import json
import os
import pwd
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from conftest import KEPT, end, free_port, wait_for
from learner import READY, THROUGH, Notebook

NAMES = [f"test-{number}" for number in range(1, 6)]
LESSON = "01_introduction.ipynb"
PASSWORD = "a word for the class"
TOOLS = Path(os.environ["COURSE_HOME"])
STATE = KEPT / "hub-state"

# A loop that would take a quarter of an hour, as a training does.
LOOP = """\
let mut turns = 0;
for _ in interrupt::steps(0..100_000) {
    turns += 1;
    std::thread::sleep(std::time::Duration::from_millis(10));
}
"""


@pytest.fixture(scope="module")
def hub():
    """The hub's address. Its accounts are removed at the end."""
    taken = [name for name in [*NAMES, "root"] if has_account(f"lora-{name}")]
    assert not taken, f"accounts lora-NAME exist already: {taken}"
    port = free_port()
    path = KEPT / "hub.log"
    shutil.rmtree(STATE, ignore_errors=True)
    with open(path, "w", encoding="utf-8") as log:
        server = subprocess.Popen(
            [os.environ["COURSE_CLI"], "hub", "--ip", "127.0.0.1", "--port", str(port), "--state", str(STATE)],
            env={**os.environ, "COURSE_HUB_PASSWORD": PASSWORD},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        # It may have to be installed.
        wait_for(f"{address}/hub/api", server, path, 600)
        yield address
    finally:
        end(server)
        for name in NAMES:
            remove_account(f"lora-{name}")


def remove_account(account):
    """Removes an account with its home, and what still runs there."""
    if not has_account(account):
        return
    subprocess.run(["pkill", "-KILL", "-u", account], check=False)
    time.sleep(1)
    # It also removes a mailbox, and complains when there is none.
    subprocess.run(["/usr/sbin/userdel", "--remove", account], stderr=subprocess.DEVNULL, check=False)
    assert not has_account(account)


def has_account(name):
    return name in {user.pw_name for user in pwd.getpwall()}


class Learner:
    """Somebody with a browser of their own."""

    def __init__(self, chromium, hub, name):
        self.name, self.account = name, f"lora-{name}"
        self.page = chromium.new_context(viewport={"width": 1280, "height": 900}).new_page()
        self.hub = f"{hub}/user/{self.account}"
        self.page.goto(f"{hub}/hub/login")
        self.page.fill("#username_input", name)
        self.page.fill("#password_input", PASSWORD)
        self.page.click("#login_submit", no_wait_after=True)

    def has_a_server(self):
        return f"/user/{self.account}/" in self.page.url

    def processes(self):
        """The processes of the account: number and command."""
        try:
            uid = pwd.getpwnam(self.account).pw_uid
        except KeyError:
            return  # The login is under way.
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if folder.stat().st_uid == uid:
                    yield folder, (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue

    def memory(self):
        """Bytes of the account's processes; what several share is divided among them."""
        total = 0
        for folder, _ in self.processes():
            try:
                rollup = (folder / "smaps_rollup").read_text()
            except OSError:
                continue
            total += sum(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:"))
        return total


def everybody(what, seconds, learners, condition):
    """Waits until a condition holds for every learner; returns when it did, in seconds, and each one's largest memory."""
    start = time.monotonic()
    reached, memory = {}, dict.fromkeys((learner.name for learner in learners), 0)
    while len(reached) < len(learners):
        for learner in learners:
            memory[learner.name] = max(memory[learner.name], learner.memory())
            if learner.name not in reached and condition(learner):
                reached[learner.name] = time.monotonic() - start
        assert time.monotonic() < start + seconds, f"{what}: only {sorted(reached)}"
        learners[0].page.wait_for_timeout(200)
    return sorted(reached.values()), memory


def shared_files():
    """The files of the course's tools with their times."""
    kept = {"locks"}
    return {
        str(path): path.lstat().st_mtime_ns
        for path in TOOLS.rglob("*")
        if path.relative_to(TOOLS).parts[0] not in kept
    }


def test_five_learners_at_once(chromium, hub):
    before = shared_files()
    measured = {"learners": len(NAMES), "cores": os.cpu_count()}
    start = time.monotonic()
    learners = [Learner(chromium, hub, name) for name in NAMES]
    everybody("servers", READY, learners, Learner.has_a_server)
    measured["login to JupyterLab, s"] = time.monotonic() - start
    alone = [learner.memory() for learner in learners]
    measured["memory of a server without a kernel, MB"] = max(alone) / 1e6

    start = time.monotonic()
    for learner in learners:
        learner.page.goto(f"{learner.hub}/lab/tree/{LESSON}?reset", wait_until="commit")
    notebooks = {}
    for learner in learners:
        notebooks[learner.name] = Notebook(learner.page, learner.hub, LESSON)
    measured["opening the notebook to five kernels ready, s"] = time.monotonic() - start
    first = learners[0]
    notebook = notebooks[first.name]
    committed = len(notebook.figures())
    for learner in learners:
        notebooks[learner.name].run_all()
    times, memory = everybody(
        "lesson 01", THROUGH, learners, lambda learner: notebooks[learner.name].is_through()
    )
    measured["lesson 01, all five at once, s"] = times
    measured["largest memory of a learner in lesson 01, MB"] = max(memory.values()) / 1e6
    for learner in learners:
        assert notebooks[learner.name].failures() == []
    notebook.wait("the charts", 30, lambda: len(notebook.figures()) == committed)
    first.page.screenshot(path=KEPT / "hub_lesson_01.png")

    # Everybody's kernel runs with their account, in their home.
    for learner in learners:
        kernels = Path(pwd.getpwnam(learner.account).pw_dir, ".cache/lora-course-kernels")
        folders = [path for path in kernels.glob("run-*") if path.is_dir()]
        assert len(folders) == 1 and folders[0].owner() == learner.account
        commands = [command[0] for _, command in learner.processes()]
        assert any(command.endswith(b"/evcxr_jupyter") for command in commands), commands

    # Stop: all loops are under way before anybody presses, and only one's own ends.
    loops = {learner.name: notebooks[learner.name].type(LOOP) for learner in learners}
    for learner in learners:
        prompt = loops[learner.name].locator(".jp-InputArea-prompt")
        notebooks[learner.name].wait("the loop", 60, lambda prompt=prompt: "*" in prompt.text_content())
    first.page.wait_for_timeout(10_000)
    for place, learner in enumerate(learners):
        notebooks[learner.name].stop(loops[learner.name].locator(".jp-InputArea-prompt"))
        for other in learners[place + 1 :]:
            assert "*" in loops[other.name].locator(".jp-InputArea-prompt").text_content()
    for learner in learners:
        turns = int(notebooks[learner.name].ask('println!("{turns}");'))
        assert 1 <= turns < 100_000, turns

    # What they share is as it was, and nobody had to compile it.
    assert shared_files() == before
    said = (STATE / "learners.log").read_text(encoding="utf-8")
    assert "Kernel started" in said
    assert "Compiling" not in said and "could not be prepared" not in said
    for learner in learners:
        assert Path(pwd.getpwnam(learner.account).pw_dir).stat().st_mode & 0o077 == 0
    (KEPT / "hub.json").write_text(json.dumps(measured, indent=1))


def test_names_that_are_no_names_get_no_account(chromium, hub):
    accounts = len(pwd.getpwall())
    page = chromium.new_context().new_page()
    for name, password in [("../root", PASSWORD), ("a b", PASSWORD), ("-x", PASSWORD), ("test-1", "wrong word")]:
        page.goto(f"{hub}/hub/login")
        page.fill("#username_input", name)
        page.fill("#password_input", password)
        page.click("#login_submit")
        page.locator(".login_error").wait_for()
        assert "/hub/login" in page.url, (name, page.url)
    assert len(pwd.getpwall()) == accounts
    page.context.close()


def test_root_is_a_learner_like_any_other(chromium, hub):
    learner = Learner(chromium, hub, "root")
    try:
        everybody("the server", READY, [learner], Learner.has_a_server)
        assert pwd.getpwnam(learner.account).pw_uid != 0
    finally:
        learner.page.context.close()
        remove_account(learner.account)
