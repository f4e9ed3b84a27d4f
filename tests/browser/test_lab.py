"""What a learner does: runs all, looks at the charts, stops a training, goes on, starts anew."""

import re

from conftest import KEPT, TOKEN
from learner import READY, THROUGH, Notebook


def test_lesson_01_runs_and_its_charts_have_words(page, lab):
    notebook = Notebook(page, lab, "01_introduction.ipynb", f"&token={TOKEN}")
    notebook.wait("the committed charts", 30, lambda: len(notebook.figures()) >= 3)
    committed = len(notebook.figures())
    notebook.run_all()
    notebook.wait("all cells", THROUGH, notebook.is_through)
    assert notebook.failures() == []
    notebook.wait("the charts", 30, lambda: len(notebook.figures()) == committed)
    for loaded, width, words in notebook.figures():
        assert loaded and width > 400, (loaded, width)
        assert len(words.split()) > 12 and ("axis" in words or "Labels" in words), words
    page.locator(".jp-OutputArea-output img").first.scroll_into_view_if_needed()
    page.wait_for_timeout(1000)
    page.screenshot(path=KEPT / "lesson_01_chart.png")


def test_the_stop_button_ends_a_training_and_keeps_the_variables(page, lab):
    notebook = Notebook(page, lab, "13_reinforcement.ipynb", f"&token={TOKEN}")
    place = notebook.place_of("interrupt::steps(METHODS)")
    training = notebook.cells().nth(place)
    prompt = training.locator(".jp-InputArea-prompt")
    notebook.run_all()
    notebook.wait("the training", THROUGH, lambda: notebook.is_at(place))
    training.scroll_into_view_if_needed()
    page.wait_for_timeout(1000)
    page.screenshot(path=KEPT / "lesson_13_training.png")
    notebook.stop(prompt)
    printed = training.locator(".jp-OutputArea-output").all_text_contents()
    assert "stopped: " in "".join(printed), "the training was over before it could be stopped"
    notebook.wait("the cells after it", THROUGH, notebook.is_through)
    # A chart with nothing to show says so; nothing else fails.
    assert all(re.match(r'chart ".*": has no', said) for said in notebook.failures())
    said = notebook.ask('println!("{} methods, of {}", runs.len(), METHODS.len());')
    assert re.fullmatch("[0-3] methods, of 4", said), said

    notebook.button("Restart the kernel")
    page.locator(".jp-Dialog button.jp-mod-accept").click()
    notebook.wait("the new kernel", READY, notebook.is_idle)
    notebook.ask(':dep course = { path = "../crates/course" }\nprintln!("one");')
    assert "cannot find value" in notebook.ask("println!(\"{}\", runs.len());")
