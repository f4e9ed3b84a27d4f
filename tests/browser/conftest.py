"""A real JupyterLab, a real browser. `cargo course browser` starts these tests in an environment of their own.

They work on copies of the notebooks; screenshots and the server's log stay in target/browser.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "target" / "browser"
TOKEN = "course"
# Seconds until JupyterLab answers; a kernel's first answer can wait for its template.
STARTUP = 120


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def serve(program, name):
    """Starts `jupyter PROGRAM` in the course's environment; yields its address."""
    copies = KEPT / "notebooks"
    shutil.rmtree(copies, ignore_errors=True)
    shutil.copytree(ROOT / "notebooks", copies, ignore=shutil.ignore_patterns(".*"))
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    with open(KEPT / f"{name}.log", "w", encoding="utf-8") as log:
        server = subprocess.Popen(
            [
                *program,
                "--no-browser",
                "--allow-root",
                f"--ServerApp.port={port}",
                "--ServerApp.port_retries=0",
                f"--ServerApp.root_dir={copies}",
                f"--IdentityProvider.token={TOKEN}",
            ],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for(f"{address}/api?token={TOKEN}", server, KEPT / f"{name}.log")
        yield address
    finally:
        end(server)


def wait_for(address, server, log, seconds=STARTUP):
    """Waits until a server answers at an address."""
    # Not by a proxy of the environment.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + seconds
    while True:
        try:
            direct.open(address, timeout=5).close()
            return
        except OSError:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < end, "Jupyter does not answer:\n" + log.read_text()
            time.sleep(0.5)


def end(server):
    """Ends a server and what it has started."""
    for kind, patience in [(signal.SIGTERM, 20), (signal.SIGKILL, None)]:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, kind)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(patience)
            return


@pytest.fixture(scope="session")
def lab():
    """The address of JupyterLab, as `cargo course lab` sets it up."""
    program = [os.environ["COURSE_CLI"], "exec", "jupyter", "lab"]
    yield from serve(program, "lab")


@pytest.fixture(scope="session")
def chromium():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=os.environ["COURSE_BROWSER"], args=["--no-sandbox"]
        )
        yield browser
        browser.close()


@pytest.fixture
def page(chromium, request):
    """A page whose errors fail the test, and of which a screenshot stays."""
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    page.screenshot(path=KEPT / f"{request.node.name}.png")
    page.close()
    assert not errors, errors
