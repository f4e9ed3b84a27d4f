"""`cargo course site` and `slides`: whole pages that need no network and name every image."""

import json
import os
import re
import subprocess
from html.parser import HTMLParser
from urllib.parse import unquote

import nbformat
import pytest
from conftest import NOTEBOOKS, ROOT

NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
# What a browser loads by itself.
LOADED = {"script": "src", "link": "href", "img": "src", "iframe": "src"}


class Page(HTMLParser):
    """What a page loads, links to and shows."""

    def __init__(self, path):
        super().__init__()
        self.loads, self.links, self.ids, self.images = [], [], set(), []
        self.notes = self.formulas = 0
        self.text, self.within = [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag in LOADED and attributes.get(LOADED[tag]):
            self.loads.append(attributes[LOADED[tag]])
        if tag == "img":
            self.images.append(attributes.get("alt") or "")
        if tag == "a":
            self.links.append(attributes.get("href", ""))
        if "id" in attributes:
            self.ids.add(attributes["id"])
        self.notes += tag == "aside" and "notes" in attributes.get("class", "")
        self.formulas += tag == "math"
        if tag in ("pre", "code", "script", "style"):
            self.within.append(tag)

    def handle_endtag(self, tag):
        if self.within and self.within[-1] == tag:
            self.within.pop()

    def handle_data(self, data):
        if not self.within:
            self.text.append(data)


def made(kind, folder, *lessons):
    command = [os.environ["COURSE_CLI"], kind, "--out", str(folder), *lessons]
    subprocess.run(command, cwd=ROOT, check=True, stdin=subprocess.DEVNULL)
    return {path.name: Page(path) for path in folder.glob("*.html")}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    return folder, made("site", folder)


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    return folder, made("slides", folder)


def teacher_cells(name):
    cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells
    return [cell for cell in cells if "teacher" in cell.metadata.get("tags", [])]


def check_pages(folder, pages):
    for name, page in pages.items():
        for target in page.loads:
            if not target.startswith("data:"):
                assert (folder / target).is_file(), f"{name} loads {target}"
        for link in page.links:
            if link.startswith(("https://", "http://")):
                continue
            file, _, anchor = link.partition("#")
            assert not file or (folder / file).is_file(), f"{name} links to {link}"
            if anchor:
                assert unquote(anchor) in pages[file or name].ids, f"{name} links to {link}"
        for words in page.images:
            # What nbconvert says of an image that says nothing is no description.
            assert len(words.split()) > 5 and "No description" not in words, f"{name}: an image without words"
        formula = re.search(r"\$[^$\n]*\\\w+[^$\n]*\$", "".join(page.text))
        assert formula is None, f"{name}: {formula[0]}"


def test_the_site_is_whole(site):
    folder, pages = site
    assert sorted(pages) == sorted([f"{name}.html" for name in NAMES] + ["TEACHING.html", "index.html"])
    check_pages(folder, pages)
    for name in NAMES:
        page = pages[f"{name}.html"]
        source = (NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8")
        assert len(page.images) >= 1 and (page.formulas > 0) == ("$" in source), name
        assert f"{name}.html" in pages["index.html"].links
    for first, second in zip(NAMES, NAMES[1:]):
        assert f"{second}.html" in pages[f"{first}.html"].links
        assert f"{first}.html" in pages[f"{second}.html"].links


@pytest.mark.parametrize("kind", ["site", "slides"])
def test_pages_of_some_lessons_link_to_no_others(kind, tmp_path):
    pages = made(kind, tmp_path, "02", "13")
    lessons = [name for name in pages if name[0].isdigit()]
    assert sorted(lessons) == ["02_architecture.html", "13_reinforcement.html"]
    check_pages(tmp_path, pages)
    assert set(lessons) <= set(pages["index.html"].links)


def test_what_the_search_finds_is_there(site):
    folder, pages = site
    script = (folder / "index.js").read_text(encoding="utf-8")
    index = json.loads(script.removeprefix("const INDEX = ").rstrip(";\n"))
    assert len(index) > 150
    for page, anchor, lesson, heading, text in index:
        assert heading == lesson or anchor in pages[page].ids, (page, anchor)
        assert "$" not in text and "<details" not in text, (page, heading)
    assert any("CartPole" in heading for _, _, _, heading, _ in index)


def test_the_slides_are_whole_and_hold_the_notes(slides):
    folder, pages = slides
    assert sorted(pages) == [f"{name}.html" for name in NAMES] + ["index.html"]
    check_pages(folder, pages)
    for name in NAMES:
        assert pages[f"{name}.html"].notes == len(teacher_cells(name)) >= 4, name
        assert "<summary>Solution</summary>" not in (folder / f"{name}.html").read_text(encoding="utf-8"), name
