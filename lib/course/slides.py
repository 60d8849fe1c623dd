"""`make slides`: each chapter's figures and its closing sentences, a slide for each.

Nothing is written twice: headings, figures and the words below them are those of
solutions/NN_name.ipynb. nbconvert's template for reveal.js sets them, with a copy of
reveal.js beside them, so that they are shown without a network. Keys: arrows, F for the
whole screen, O for all slides at once; with ?print-pdf behind the address they print.
"""

import argparse
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat

from lib.course import ROOT

try:
    import sphinx_revealjs  # for the copy of reveal.js that it carries
    from nbconvert import SlidesExporter

    from lib.course.build import BuildError, chapter_texts, notebook_paths, read
except ModuleNotFoundError as error:
    sys.exit(f"expected {error.name}, found none: pip install -e '.[site]'")

# nbconvert's page, without what it would load from elsewhere: of its scripts reveal.js is
# enough, and that is here.
TEMPLATE = """{% extends 'index.html.j2' %}
{% block html_head_js %}{% endblock %}
{% block html_head_js_mathjax %}{% endblock %}
{% block html_head_css %}<style>
.reveal h1, .reveal h2 { text-transform: none !important }
.reveal h1 { font-size: 56px !important }
.reveal h2 { font-size: 38px !important }
.reveal img { display: block; margin: auto !important; height: 430px !important }
.reveal img { max-width: 1080px !important; object-fit: contain }
.reveal .jp-OutputPrompt, .reveal .jp-InputPrompt { display: none }
.reveal p { font-size: 20px !important; line-height: 1.35 !important }
.reveal li { font-size: 27px !important; line-height: 1.35 !important; margin: 0.4em 0 }
.reveal .anchor-link { display: none }
</style>{% endblock %}
{% block data_png %}<img alt="{{ cell.metadata.alt | escape_html }}"
src="data:image/png;base64,{{ output.data['image/png'] }}">{% endblock %}
{% block footer_js %}
<script src="reveal.js/dist/reveal.js"></script>
<script src="reveal.js/plugin/notes/notes.js"></script>
<script>
Reveal.initialize({
  plugins: [RevealNotes], slideNumber: "c/t", hash: true, width: 1100, height: 760
});
</script>
{% endblock %}"""

# Of reveal.js, what that page loads.
REVEAL = ["LICENSE", "dist/reveal.*s", "dist/theme/white.css", "plugin/notes/notes.js"]
REVEAL += ["dist/theme/fonts/source-sans-pro/*"]


def slides(chapter: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Of an executed chapter: its title, its figures with their captions, or else the
    words for those who cannot see them, and the sentences that close it."""
    cells = [*_slide(re.match(r"# .*", chapter.cells[0].source)[0])]
    heading = ""
    for cell, after in zip(chapter.cells, [*chapter.cells[1:], None]):
        if cell.cell_type == "markdown":
            for found in re.findall(r"^##+ (?!Exercise ).*", cell.source, re.M):
                heading = found.lstrip("# ")
            if closing := re.search(
                r"^## In \w+ sentences\n.*?(?=^##)", cell.source, re.M | re.S
            ):
                cells += _slide(closing[0].strip())
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                words = _caption(after) or f"*{cell.metadata.get('alt', '')}*"
                cells += _slide(f"## {heading}", cell, output, words)
    return nbformat.v4.new_notebook(cells=cells, metadata=chapter.metadata)


def _slide(text: str, cell=None, output=None, caption: str = "") -> Iterator:
    """The cells of one slide."""
    yield nbformat.v4.new_markdown_cell(
        text, metadata={"slideshow": {"slide_type": "slide"}}
    )
    if output:
        alt = {"alt": cell.metadata.get("alt", "")}
        yield nbformat.v4.new_code_cell("", outputs=[output], metadata=alt)
    if caption:
        yield nbformat.v4.new_markdown_cell(caption)


def _caption(cell) -> str:
    """What a cell says first, in italics, of the figure above it, but for a last sentence
    that leads to what follows."""
    if cell is None or cell.cell_type != "markdown":
        return ""
    found = re.match(r"\*((?:`[^`]*`|\*\*[^*]+\*\*|[^*`])+)\*", cell.source)
    words = re.sub(r"\s*[^.]*:$", "", found[1]) if found else ""
    return f"*{words}*" if words else ""


def write(out: Path) -> list[Path]:
    """A page of slides for each chapter, and reveal.js, into `out`, which is replaced."""
    shutil.rmtree(out, ignore_errors=True)
    carried = Path(sphinx_revealjs.__file__).parent / "_static/revealjs"
    for pattern in REVEAL:
        for path in carried.glob(pattern):
            copy = out / "reveal.js" / path.relative_to(carried)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    exporter = SlidesExporter(
        raw_template=TEMPLATE,
        reveal_url_prefix="reveal.js",
        reveal_theme="white",
        exclude_input=True,
        exclude_output_prompt=True,
    )
    written = []
    for text in chapter_texts():
        chapter = read(notebook_paths(text)[1])
        title = {"metadata": {"name": text.stem}}
        page, _ = exporter.from_notebook_node(slides(chapter), title)
        written.append(out / f"{text.stem}.html")
        written[-1].write_text(page, encoding="utf-8")
    return written


def main() -> int:
    argparse.ArgumentParser(
        prog="python -m lib.course.slides",
        description="Make slides of each chapter's figures and closing sentences, in "
        "build/slides.",
    ).parse_args()
    try:
        for path in write(ROOT / "build/slides"):
            print(path)
    except BuildError as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
