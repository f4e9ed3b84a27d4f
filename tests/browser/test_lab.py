"""What a learner does: runs all, looks at the charts, stops a training, goes on, starts anew."""

import re
import time

import nbformat
from conftest import KEPT, TOKEN

# Seconds: for a kernel to answer, for a notebook to run through, for a loop to hear of the stop.
READY, THROUGH, STOP = 300, 300, 15


class Notebook:
    """A notebook open in JupyterLab."""

    def __init__(self, page, lab, name):
        self.page, self.name = page, name
        page.goto(f"{lab}/lab/tree/{name}?token={TOKEN}&reset")
        page.wait_for_selector(".jp-NotebookPanel:visible .jp-CodeCell", timeout=READY * 1000)
        self.wait("the kernel", READY, self.is_idle)

    def wait(self, what, seconds, condition):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"no end of waiting for {what}: {self.prompts()}"
            self.page.wait_for_timeout(100)

    def is_idle(self):
        """Whether the bar at the bottom says so."""
        return "Rust | Idle" in self.page.locator("#jp-main-statusbar").text_content()

    def menu(self, menu, entry):
        self.page.get_by_role("menubar").get_by_text(menu, exact=True).click()
        self.page.locator(".lm-Menu-item", has_text=re.compile(f"^{entry}")).first.click()

    def button(self, title):
        self.page.locator(f".jp-NotebookPanel-toolbar [title^='{title}']").first.click()

    def cells(self):
        return self.page.locator(".jp-NotebookPanel .jp-CodeCell")

    def place_of(self, text):
        """The place among the code cells of the one that holds a text. (The page draws what is in view.)"""
        path = KEPT / "notebooks" / self.name
        cells = nbformat.read(path, as_version=4).cells
        code = [cell.source for cell in cells if cell.cell_type == "code"]
        return next(place for place, source in enumerate(code) if text in source)

    def prompts(self):
        prompts = self.page.locator(".jp-CodeCell .jp-InputArea-prompt").all_text_contents()
        return [prompt.strip().strip(":") for prompt in prompts]

    def is_at(self, place):
        """Whether the cells before one are through and it is not."""
        prompts = self.prompts()
        return all("*" not in prompt for prompt in prompts[:place]) and prompts[place] == "[*]"

    def is_through(self):
        return all(re.fullmatch(r"\[\d+\]", prompt) for prompt in self.prompts())

    def run_all(self):
        self.menu("Edit", "Clear Outputs of All Cells")
        self.menu("Run", "Run All Cells")
        self.wait("the first cell", READY, lambda: "[*]" in self.prompts())

    def failures(self):
        """What cells wrote to stderr, or said when they failed."""
        kinds = ("stderr", "error")
        found = [
            self.page.locator(f"[data-mime-type='application/vnd.jupyter.{kind}']").all_text_contents()
            for kind in kinds
        ]
        return sum(found, [])

    def ask(self, code):
        """Types a new cell at the end and runs it; returns what it printed."""
        self.cells().last.click()
        self.page.keyboard.press("Escape")
        self.page.keyboard.press("Control+End")
        self.page.keyboard.press("b")
        self.page.keyboard.press("Enter")
        # No closing brackets of the editor's own.
        self.page.keyboard.insert_text(code)
        self.page.keyboard.press("Control+Enter")
        last = self.cells().last
        prompt = last.locator(".jp-InputArea-prompt")
        self.wait("the answer", 60, lambda: re.search(r"\d", prompt.text_content()))
        output = last.locator(".jp-OutputArea-output")
        self.wait("its output", 60, lambda: output.count() > 0)
        return output.first.text_content().strip()

    def figures(self):
        """Every image of an output: width on the page, and its alternative text."""
        script = "images => images.map(i => [i.complete && i.naturalWidth, i.clientWidth, i.alt])"
        return self.page.locator(".jp-OutputArea-output img").evaluate_all(script)


def test_lesson_01_runs_and_its_charts_have_words(page, lab):
    notebook = Notebook(page, lab, "01_introduction.ipynb")
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
    notebook = Notebook(page, lab, "13_reinforcement.ipynb")
    place = notebook.place_of("interrupt::steps(METHODS)")
    training = notebook.cells().nth(place)
    prompt = training.locator(".jp-InputArea-prompt")
    notebook.run_all()
    notebook.wait("the training", THROUGH, lambda: notebook.is_at(place))
    training.scroll_into_view_if_needed()
    page.wait_for_timeout(1000)
    page.screenshot(path=KEPT / "lesson_13_training.png")
    # The cell may still be compiled, and a stop then does nothing: press until the loop has ended.
    for _ in range(STOP // 3):
        notebook.button("Interrupt")
        page.wait_for_timeout(3000)
        if re.search(r"\d", prompt.text_content()):
            break
    assert re.search(r"\d", prompt.text_content()), "the loop goes on"
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
