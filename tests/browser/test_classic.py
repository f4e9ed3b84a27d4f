"""Every lesson in the classic notebook, whose renderer shows outputs in another way than JupyterLab's."""

import sys
from pathlib import Path

import pytest
from conftest import ROOT, TOKEN, serve

NAMES = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))

# Seconds for a lesson: the longest takes four minutes.
THROUGH = 900


@pytest.fixture(scope="module")
def classic():
    """The address of a classic notebook that starts the course's kernel."""
    yield from serve([str(Path(sys.executable).parent / "jupyter-nbclassic")], "classic")


@pytest.mark.parametrize("name", NAMES)
def test_a_lesson_runs_and_shows_its_charts(page, classic, name):
    page.goto(f"{classic}/notebooks/{name}?token={TOKEN}")
    page.wait_for_function("window.Jupyter?.notebook?.kernel?.is_connected()", timeout=300_000)
    images = page.locator(".output_area img, .output_area svg")
    committed = images.count()
    assert committed >= 1
    page.evaluate("Jupyter.notebook.clear_all_output()")
    assert images.count() == 0
    page.evaluate("Jupyter.notebook.execute_all_cells()")
    through = "Jupyter.notebook.get_cells().every(c => c.cell_type !== 'code' || c.input_prompt_number > 0)"
    page.wait_for_function(through, timeout=THROUGH * 1000, polling=500)
    page.wait_for_timeout(500)
    assert page.locator(".output_stderr, .output_error").all_inner_texts() == []
    assert images.count() == committed
    page.evaluate("Jupyter.notebook.session.delete()")
