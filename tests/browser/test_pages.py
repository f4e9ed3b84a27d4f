"""The site and the slides from the disk, as somebody reads them: search, links, keys; no request to a network."""

import os
import subprocess

import pytest
from conftest import KEPT, ROOT


def made(kind):
    folder = KEPT / kind
    command = [os.environ["COURSE_CLI"], kind, "--out", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, stdin=subprocess.DEVNULL)
    return f"file://{folder}"


@pytest.fixture
def disk(page):
    """A page that only reads from the disk."""
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    yield page
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


def test_the_search_leads_to_its_section(disk):
    disk.goto(f"{made('site')}/index.html")
    disk.fill("#search", "four ways learn long pole")
    first = disk.locator("#found a").first
    first.wait_for()
    assert "13" in first.get_attribute("href")
    disk.screenshot(path=KEPT / "site_search.png")
    first.click()
    disk.wait_for_url("**/13_reinforcement.html*")
    anchor = disk.evaluate("decodeURIComponent(location.hash.slice(1))")
    assert anchor and disk.evaluate("id => document.getElementById(id) !== null", anchor)
    disk.fill("#search", "xylophone quagmire")
    assert disk.locator("#found").inner_text() == "Nothing holds all of these words."


def test_keys_turn_the_slides(disk):
    disk.goto(f"{made('slides')}/01_introduction.html")
    disk.wait_for_function("window.Reveal?.isReady()")
    total = disk.evaluate("Reveal.getTotalSlides()")
    assert total > 20
    places = [disk.evaluate("Reveal.getIndices().h")]
    for _ in range(3):
        disk.keyboard.press("ArrowRight")
        disk.wait_for_timeout(500)
        places.append(disk.evaluate("Reveal.getIndices().h"))
    assert places == [0, 1, 2, 3]
    notes = disk.evaluate("Reveal.getSlides().map(slide => Reveal.getSlideNotes(slide) || '').join()")
    assert "For the teacher: watch out" in notes
