"""JupyterLab's page, as a learner uses it."""

import re
import time

import nbformat
from conftest import ROOT

# Seconds: for a kernel to answer, for a notebook to run through, for a loop to hear of the stop.
READY, THROUGH, STOP = 300, 300, 15


class Notebook:
    """A notebook open in JupyterLab."""

    def __init__(self, page, lab, name, query=""):
        self.page, self.name = page, name
        page.goto(f"{lab}/lab/tree/{name}?reset{query}")
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
        path = ROOT / "notebooks" / self.name
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
        last = self.type(code)
        prompt = last.locator(".jp-InputArea-prompt")
        self.wait("the answer", 60, lambda: re.search(r"\d", prompt.text_content()))
        output = last.locator(".jp-OutputArea-output")
        self.wait("its output", 60, lambda: output.count() > 0)
        return output.first.text_content().strip()

    def stop(self, prompt):
        """Presses stop until a cell has ended: while it is still compiled, a stop does nothing."""
        for _ in range(STOP // 3):
            self.button("Interrupt")
            self.page.wait_for_timeout(3000)
            if re.search(r"\d", prompt.text_content()):
                return
        raise AssertionError("the loop goes on")

    def type(self, code):
        """Types a new cell at the end and starts it; returns the cell."""
        self.cells().last.click()
        self.page.keyboard.press("Escape")
        self.page.keyboard.press("Control+End")
        self.page.keyboard.press("b")
        self.page.keyboard.press("Enter")
        # No closing brackets of the editor's own.
        self.page.keyboard.insert_text(code)
        self.page.keyboard.press("Control+Enter")
        return self.cells().last

    def figures(self):
        """Every image of an output: width on the page, and its alternative text."""
        script = "images => images.map(i => [i.complete && i.naturalWidth, i.clientWidth, i.alt])"
        return self.page.locator(".jp-OutputArea-output img").evaluate_all(script)
