"""The kernel's life: it answers from any folder, stop keeps what you have, nothing is left."""

import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request

import pytest
from conftest import DEP, KERNELS, NOTEBOOKS, gone, kernel, program, wait_until

SLEEP = "std::thread::sleep(std::time::Duration::from_millis(10));"


def stop_after(cells, seconds):
    threading.Timer(seconds, cells.manager.interrupt_kernel).start()


class TestStopButton:
    def test_a_loop_that_asks_ends_and_keeps_everything(self, cells):
        cells.run("let mut steps = 0u64;")
        stop_after(cells, 3)
        cells.run(f"for _ in interrupt::steps(0..6000) {{ {SLEEP} steps += 1; }}")
        assert 0 < int(cells.run('println!("{steps}");')) < 6000

    def test_outer_loops_hear_it_too(self, cells):
        cells.run("let mut outer = 0u64;")
        stop_after(cells, 3)
        cells.run(
            "for _ in interrupt::steps(0..100) {\n"
            f"    for _ in interrupt::steps(0..600) {{ {SLEEP} }}\n"
            "    outer += 1;\n"
            "}"
        )
        assert int(cells.run('println!("{outer}");')) == 1

    def test_a_stop_when_nothing_runs_does_nothing(self, cells):
        cells.run("let kept = 41u64;")
        cells.manager.interrupt_kernel()
        time.sleep(0.5)
        assert cells.run('println!("{}", kept + 1);') == "42"
        # … and the next loop does not hear of it.
        assert cells.run('println!("{}", interrupt::steps(0..5).count());') == "5"

    def test_a_loop_that_does_not_ask_is_ended_as_in_stock_evcxr(self, cells):
        cells.run("let lost = 1u64;")
        stop_after(cells, 3)
        status, said = cells.send(f"loop {{ {SLEEP} }}")
        assert status == "error" and "SIGINT" in said and "variables are lost" in said
        assert cells.send('println!("{lost}");')[0] == "error"
        # The next cells work, and their loops can be stopped.
        cells.run("let mut steps = 0u64;")
        stop_after(cells, 3)
        cells.run(f"for _ in interrupt::steps(0..6000) {{ {SLEEP} steps += 1; }}")
        assert 0 < int(cells.run('println!("{steps}");')) < 6000


class TestNothingIsLeft:
    @pytest.mark.parametrize(
        ("how", "busy"),
        [("shutdown", False), ("shutdown", True), ("SIGTERM", True), ("SIGKILL", True)],
    )
    def test_however_the_kernel_ends(self, how, busy):
        with kernel(dep=False) as cells:
            assert cells.folder.is_dir()
            if busy:
                cells.client.execute(f"loop {{ {SLEEP} }}")
                time.sleep(3)
            processes, folder = cells.processes(), cells.folder
            assert len(processes) >= 4  # launcher, guard, evcxr, runtime
            if how == "shutdown":
                cells.manager.shutdown_kernel(now=busy)
            else:
                os.kill(cells.launcher, getattr(signal, how))
            assert wait_until(lambda: all(map(gone, processes)))
            assert wait_until(lambda: not folder.exists())
            assert wait_until(lambda: not folder.with_suffix(".lock").exists())

    def test_when_jupyter_is_killed(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = subprocess.Popen(
            [program("jupyter"), "lab", "--no-browser", "--allow-root", f"--ServerApp.port={port}",
             "--IdentityProvider.token=secret", f"--ServerApp.root_dir={NOTEBOOKS}"],
            stderr=subprocess.DEVNULL,
        )
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/api/kernels",
            json.dumps({"name": "rust"}).encode(),
            {"Authorization": "token secret"},
        )

        def ask():
            try:
                return urllib.request.urlopen(request)
            except urllib.error.URLError:
                return False

        try:
            before = set(KERNELS.glob("run-*"))
            assert wait_until(ask, 60)
            assert wait_until(lambda: set(KERNELS.glob("run-*")) - before)
            time.sleep(5)
            new = set(KERNELS.glob("run-*")) - before
            server.kill()
            assert wait_until(lambda: not any(path.exists() for path in new), 30)
        finally:
            server.kill()
            server.wait()

    def test_what_a_killed_guard_left_is_swept(self):
        stale = KERNELS / "run-999999999"
        stale.mkdir()
        stale.with_suffix(".lock").touch()
        with kernel(dep=False):
            assert not stale.exists() and not stale.with_suffix(".lock").exists()


def test_two_kernels_at_once():
    with kernel() as one, kernel() as two:
        one.run("let who = 1;")
        two.run("let who = 2;")
        assert (one.run('println!("{who}");'), two.run('println!("{who}");')) == ("1", "2")


def test_a_notebook_in_another_folder(tmp_path):
    with kernel(cwd=tmp_path) as cells:
        assert cells.run('println!("{:?}", Device::Cpu.is_cpu());') == "true"


def test_where_the_tools_are_shared_a_kernel_works_in_a_folder_of_its_own(tmp_path, monkeypatch):
    own = tmp_path / "own"
    monkeypatch.setenv("COURSE_KERNELS", str(own))
    before, start = set(KERNELS.iterdir()), time.time()
    with kernel() as cells:
        assert cells.run('println!("{:?}", Device::Cpu.is_cpu());') == "true"
        assert [path.name for path in own.glob("run-*") if path.is_dir()] == [f"run-{cells.launcher}"]
        # The folder of a kernel before it may still go.
        assert set(KERNELS.iterdir()) <= before
        # What the template holds is not compiled anew.
        stamps = own.glob("run-*/target/**/.fingerprint/*/invoked.timestamp")
        anew = {path.parent.name for path in stamps if path.stat().st_mtime > start}
        assert anew and all(name.startswith("ctx-") for name in anew), anew
    assert wait_until(lambda: not list(own.glob("run-*")))


def test_a_template_that_cannot_be_made_is_told_in_the_first_cell(tmp_path):
    """A checkout whose crate does not compile: the kernel starts and shows the compiler's words."""
    broken = tmp_path / "a checkout"
    (broken / "notebooks").mkdir(parents=True)
    root = NOTEBOOKS.parent
    shutil.copytree(root / "crates", broken / "crates", ignore=shutil.ignore_patterns("target"))
    for name in ("Cargo.toml", "Cargo.lock", "rust-toolchain.toml"):
        shutil.copy(root / name, broken / name)
    (broken / "crates/lora/src/lib.rs").write_text("fn broken( {")
    with kernel(cwd=broken / "notebooks", dep=False) as cells:
        status, said = cells.send(DEP)
        assert status == "error" and "unclosed delimiter" in said, said
