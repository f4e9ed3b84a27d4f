"""Makes a site or slides of the notebooks, which open from the disk without a network.

    python -m course_jupyter.publish site FOLDER TEACHING.md NOTEBOOK...
    python -m course_jupyter.publish slides FOLDER REVEAL NOTEBOOK...

REVEAL is the folder with reveal.js. Prints a line for each page.
"""

import html
import json
import re
import shutil
import sys
from pathlib import Path

import nbformat
from jinja2 import pass_context
from latex2mathml.converter import convert
from nbconvert.exporters import HTMLExporter, SlidesExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

WEB = Path(__file__).parent / "web"
COURSE = "LoRA in Rust"
# Cells that a slide has no room for: the solution is the notebook's, not the projector's.
NOT_SHOWN = ("starter-", "check-", "solution-")

SLIDES_INDEX = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{course}: slides</title>
<link rel="stylesheet" href="slides.css">
</head>
<body class="index">
<h1>{course}: slides</h1>
<p>Arrow keys turn the pages: to the right for the next section, down for what it holds. S opens the teacher's notes.</p>
<ul style="list-style: none; padding: 0">
{rows}</ul>
</body>
</html>
"""


class Renderer(IPythonRenderer):
    """Formulas as MathML, which a browser draws itself, and an id for every heading."""

    def heading(self, text, level, **_):
        return f'<h{level} id="{anchor(without_tags(text))}">{text}</h{level}>\n'

    def inline_math(self, body):
        return mathml(body, "inline")

    def block_math(self, body):
        return mathml(body, "block")


def mathml(formula, display):
    try:
        return convert(formula.strip(), display=display)
    except Exception as error:
        raise ValueError(f"the formula ${formula}$ cannot be drawn: {error!r}") from error


def without_tags(text):
    return html.unescape(re.sub(r"<[^>]+>", "", text))


def anchor(heading):
    """The id of a heading: its words."""
    return "-".join(re.findall(r"[\w.+%=]+", heading.replace("`", "")))


class Markdown:
    """What both exporters do with prose."""

    def __init__(self, pages):
        """For a folder that holds some pages."""
        super().__init__(exclude_input_prompt=True, exclude_output_prompt=True)
        self.pages = pages

    @pass_context
    def markdown2html(self, context, source):
        renderer = Renderer(escape=False)
        return linked(MarkdownWithMath(renderer=renderer).render(source), self.pages)


class Site(Markdown, HTMLExporter):
    template_name = "course-site"


class Slides(Markdown, SlidesExporter):
    template_name = "course-slides"


def linked(page, pages):
    """Links between notebooks as links between pages; what links to one that is not made is its text alone."""

    def link(found):
        name, anchor, text = f"{found[1]}.html", found[2] or "", found[3]
        return f'<a href="{name}{anchor}">{text}</a>' if name in pages else text

    return re.sub(r'<a href="([\w.]+)\.(?:ipynb|md)(#[^"]*)?">(.*?)</a>', link, page, flags=re.DOTALL)


class Lesson:
    """A notebook with what a page needs of it."""

    def __init__(self, path):
        self.notebook = nbformat.read(path, as_version=4)
        self.page = f"{path.stem}.html"
        first = self.notebook.cells[0].source
        self.title = first.splitlines()[0].removeprefix("# ")
        time = re.search(r"\*\*Time:\*\* (\d+) minutes", first)
        if time is None:
            raise ValueError("the first cell does not say `**Time:** 25 minutes`")
        self.minutes = time[1]
        for cell in self.notebook.cells:
            for output in cell.get("outputs", []):
                described(output)

    def sections(self):
        """Heading, anchor and text of every part, for the search."""
        heading, parts = self.title, []
        text = []
        for cell in self.notebook.cells:
            if cell.cell_type != "markdown" or is_tagged(cell, ("teacher", "solution-")):
                continue
            for line in cell.source.splitlines():
                if re.match(r"##+ ", line):
                    parts.append((heading, " ".join(text)))
                    heading, text = line.lstrip("# "), []
                else:
                    line = re.sub(r"\$\$?([^$]+)\$?\$", spoken, line)
                    text.append(re.sub(r"[*`|]|^[-#] ", "", without_tags(line)))
        parts.append((heading, " ".join(text)))
        return parts


def spoken(formula):
    """A formula as letters alone."""
    return without_tags(mathml(formula[1], "inline"))


def is_tagged(cell, beginnings):
    return any(tag.startswith(beginnings) for tag in cell.metadata.get("tags", []))


def described(output):
    """A figure as one image, with the words of its text for those who cannot see it."""
    data = output.get("data", {})
    if "image/png" in data:
        data.pop("image/svg+xml", None)
        words = " ".join(data.get("text/plain", "").split())
        output.metadata.setdefault("image/png", {})["alt"] = words


def write(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    print(name, flush=True)


def site(folder, teaching, lessons):
    exporter = Site({"TEACHING.html", *(lesson.page for lesson in lessons)})
    pages = [{"page": lesson.page, "title": lesson.title} for lesson in lessons]

    def page(name, notebook, title, previous=None, following=None):
        course = {
            "course": COURSE,
            "title": title,
            "previous": previous,
            "next": following,
        }
        body, _ = exporter.from_notebook_node(notebook, resources={"course": course})
        write(folder, name, body)

    index = []
    for number, lesson in enumerate(lessons):
        previous = pages[number - 1] if number else None
        following = pages[number + 1] if number + 1 < len(pages) else None
        page(lesson.page, lesson.notebook, lesson.title, previous, following)
        for heading, text in lesson.sections():
            index.append([lesson.page, anchor(heading), lesson.title, heading, text])

    rows = [f"| [{x.title}]({Path(x.page).stem}.ipynb) | {x.minutes} minutes |" for x in lessons]
    start = f"# {COURSE}\n\n| lesson | |\n|---|---|\n" + "\n".join(rows)
    start += "\n\nFor teachers: [schedules and how to prepare](TEACHING.md)."
    page("index.html", prose(start), COURSE)
    page("TEACHING.html", prose(teaching.read_text(encoding="utf-8")), "For teachers")
    # A script, as a page from the disk may not fetch a file.
    write(folder, "index.js", f"const INDEX = {json.dumps(index, ensure_ascii=False)};\n")
    for name in ("site.css", "code.css", "search.js"):
        write(folder, name, (WEB / name).read_text(encoding="utf-8"))


def prose(text):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)])
    notebook.metadata["language_info"] = {"name": "rust"}
    return notebook


def slides(folder, reveal, lessons):
    exporter = Slides({lesson.page for lesson in lessons})
    for lesson in lessons:
        # Hidden ones would stay in the page.
        shown = [cell for cell in lesson.notebook.cells if not is_tagged(cell, NOT_SHOWN)]
        lesson.notebook.cells = shown
        for cell in shown:
            cell.metadata["slideshow"] = {"slide_type": slide_type(cell)}
        resources = {"course": {"title": lesson.title}}
        body, _ = exporter.from_notebook_node(lesson.notebook, resources=resources)
        write(folder, lesson.page, body)
    rows = "".join(f'<li><a href="{x.page}">{html.escape(x.title)}</a></li>\n' for x in lessons)
    write(folder, "index.html", SLIDES_INDEX.format(course=COURSE, rows=rows))
    for name in ("reveal.js", "reveal.css", "notes.js"):
        shutil.copy(reveal / name, folder / name)
    for name in ("slides.css", "code.css", "slides.js"):
        write(folder, name, (WEB / name).read_text(encoding="utf-8"))


def slide_type(cell):
    """A section goes to the right; below it a slide for each piece of prose with its code."""
    if is_tagged(cell, ("teacher",)):
        return "notes"
    if cell.cell_type == "code":
        return "subslide" if is_tagged(cell, ("figure",)) else "-"
    if re.match(r"##? ", cell.source):
        return "slide"
    return "-" if cell.source.startswith("**Figure") else "subslide"


def main(kind, folder, extra, *notebooks):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    make = {"site": site, "slides": slides}[kind]
    make(folder, Path(extra), [read(Path(notebook)) for notebook in notebooks])


def read(path):
    try:
        return Lesson(path)
    except Exception as error:  # noqa: BLE001 - whatever is wrong with it, it is this notebook
        sys.exit(f"error: {path.name}: {str(error).splitlines()[0][:200]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
