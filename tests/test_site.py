"""The site and the slides: what a reader is shown is what the notebooks have."""

import importlib
import inspect
import re
from pathlib import Path

import nbformat
import pytest
from docutils.core import publish_doctree

from lib.course import ROOT, slides
from lib.course.build import (
    chapter_texts,
    marked_exercises,
    notebook_paths,
    student_notebook,
)
from lib.course.site import __main__ as site_command
from lib.course.site import conf, links, pages

CHAPTERS = pytest.mark.parametrize("text", chapter_texts(), ids=lambda path: path.stem)


def read(text):
    """A chapter's student's notebook, without an address, and the executed one."""
    executed = nbformat.read(notebook_paths(text)[1], as_version=4)
    return student_notebook(text), executed


def pictures(notebook):
    """PNGs and the alt text of their cells, in order."""
    return [
        (output.data["image/png"], cell.metadata.get("alt"))
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]


@CHAPTERS
def test_a_chapters_page_has_each_stub_with_its_answer_folded_below(text):
    student, solved = read(text)
    sources = [cell.source for cell in solved.cells]
    page = pages.chapter_page(student, solved)
    nbformat.validate(page)
    folded = [i for i, cell in enumerate(page.cells) if cell.metadata.get("tags")]
    assert len(folded) == len(marked_exercises(text))
    for i in folded:
        assert page.cells[i].metadata.tags == ["hide-input"]
        assert "raise NotImplementedError" not in page.cells[i].source
        stub, hints, answer, checked = page.cells[i - 2 : i + 2]
        assert "raise NotImplementedError" in stub.source and not stub.outputs
        assert stub.source.split("(")[0] == answer.source.split("(")[0]
        assert hints.source.startswith("<details><summary>Hint 1")
        assert checked.source.startswith("check(") and checked.outputs
    stubs = [i - 2 for i in folded]
    first, *rest = (cell.source for i, cell in enumerate(page.cells) if i not in stubs)
    assert first.replace(f"\n\n{pages.SOLVED}\n", "\n") == sources[0] != first
    assert sorted(rest) == sorted(sources[1:])


@CHAPTERS
def test_a_chapters_page_keeps_its_figures_and_their_words(text):
    expected = pictures(read(text)[1])
    page = pages.chapter_page(*read(text))
    for cell in page.cells:
        if words := cell.metadata.get("mystnb", {}).get("image"):
            cell.metadata["alt"] = words["alt"]
    assert pictures(page) == expected and all(alt for _, alt in expected)


@pytest.mark.parametrize(
    "folder, text, expected",
    [
        (".", "[1](notebooks/01_x.ipynb)", "[1](/chapters/01_x.ipynb)"),
        (".", "[1](solutions/01_x.ipynb)", "[1](/chapters/01_x.ipynb)"),
        (".", "see [home](README.md)", "see [home](/index.md)"),
        ("data", "see [home](../README.md)", "see [home](/index.md)"),
        (
            ".",
            "![a\nplot](data/results/table.png)",
            "![a\nplot](/data/results/table.png)",
        ),
        (".", "in [solutions/](solutions/).", "in solutions/."),
        (".", "[a](https://a.b/c) [d](#e)", "[a](https://a.b/c) [d](#e)"),
    ],
)
def test_links_of_a_page_lead_to_pages_of_the_site(folder, text, expected):
    assert pages.with_links_of_the_site(text, Path(folder)) == expected


def test_sphinx_gets_every_chapter_page_and_module(tmp_path, monkeypatch):
    checked = []
    monkeypatch.setattr(pages, "check", checked.append)
    pages.write_sources(tmp_path)
    assert checked == chapter_texts()
    index = (tmp_path / "index.md").read_text(encoding="utf-8")
    named = re.findall(r"^(?:chapters|reference|data)/\S+$|^[A-Z]+$", index, re.M)
    chapters = [f"chapters/{text.stem}" for text in chapter_texts()]
    packages = [f"reference/{name}" for name in pages.PACKAGES]
    assert named == [*chapters, "TEACHING", "AGENTS", *packages, "data/README"]
    for name in named:
        assert [*tmp_path.glob(f"{name}.*")], name
    package = (tmp_path / "reference/lib.md").read_text(encoding="utf-8")
    row = "| [`lib.config`](lib.config.md) | The shape of a model: one frozen dataclass,"
    assert row in package and "__init__" not in package
    module = (tmp_path / "reference/lib.config.md").read_text(encoding="utf-8")
    assert ".. automodule:: lib.config\n   :members:" in module


def test_a_chapter_whose_notebooks_do_not_fit_is_refused():
    student, solved = read(chapter_texts()[0])
    del solved.cells[5]
    with pytest.raises(ValueError):
        pages.chapter_page(student, solved)


GOOD = '<html id="top"><img src="a.png" alt="A line."><a href="b.html#x">b</a></html>'


def written(folder, page):
    (folder / "a.png").touch()
    (folder / "a.html").write_text(page)
    (folder / "b.html").write_text('<p id="x"><a href="https://elsewhere.org/">e</a>')
    return [*links.faults(folder)]


def test_a_sound_site_has_no_faults(tmp_path):
    assert written(tmp_path, GOOD) == []


@pytest.mark.parametrize(
    "old, new, says",
    [
        ("b.html#x", "c.html", "a.html: leads nowhere: c.html"),
        ("b.html#x", "b.html#y", "a.html: leads to no place of that page: b.html#y"),
        ("b.html#x", "#y", "a.html: leads to no place of that page: #y"),
        ("a.png", "c.png", "a.html: leads nowhere: c.png"),
        ("a.png", "https://e.org/a.png", "expected nothing from another site"),
        ("a.png", "//e.org/a.png", "expected nothing from another site"),
        ('alt="A line."', "", "a.html: expected alt text, got none: a.png"),
        ("A line.", " ", "a.html: expected alt text, got none: a.png"),
        ("<img", '<script src="https://e.org/x.js"></script><img', "another site"),
        ("<img", "<style>@import url(https://e.org/x)</style><img", "another site"),
    ],
)
def test_a_fault_of_a_site_is_named(tmp_path, old, new, says):
    assert old in GOOD
    (found,) = written(tmp_path, GOOD.replace(old, new, 1))
    assert says in found


def test_an_empty_site_and_a_style_from_elsewhere_are_faults(tmp_path):
    (found,) = links.faults(tmp_path)
    assert "expected pages" in found
    (tmp_path / "x.css").write_text("@import url(https://fonts.org/a);")
    assert "x.css: expected nothing from another site" in written(tmp_path, GOOD)[0]


def docstrings():
    """(module, what has a docstring) of all that the reference shows."""
    for package in pages.PACKAGES:
        for name in [package, *pages.modules_of(package)]:
            module = importlib.import_module(name)
            yield name, module
            for owner in vars(module).values():
                if inspect.getmodule(owner) is module and callable(owner):
                    yield name, owner
                    for member in vars(owner).values() if inspect.isclass(owner) else ():
                        if callable(member) or isinstance(member, property):
                            yield name, member


def test_every_docstring_can_be_set():
    strict = {"halt_level": 2, "report_level": 2, "warning_stream": False}
    found = 0
    for module, thing in docstrings():
        if text := inspect.cleandoc(thing.__doc__ or ""):
            set_docstring(
                text, source_path=f"{module}: {thing}", settings_overrides=strict
            )
            found += 1
    assert found > 500


def set_docstring(text, **options):
    """As the reference sets it."""
    lines = text.split("\n")
    conf.as_restructured_text(None, "", "", None, None, lines)
    return publish_doctree(".. default-role:: literal\n\n" + "\n".join(lines), **options)


def test_a_docstring_is_set_as_it_is_read():
    text = "Sums `a*b` of *args, and x_ too:\n\n    a * b\n    c\n\nlen: its | length."
    first, code, last = set_docstring(text).children
    assert first.astext() == "Sums a*b of *args, and x_ too:"
    assert first.children[1].tagname == "literal"
    assert code.tagname == "literal_block" and code.astext() == "a * b\nc"
    assert last.astext() == "len: its | length."


@CHAPTERS
def test_slides_have_the_title_each_figure_and_the_closing_sentences(text):
    chapter = read(text)[1]
    shown = slides.slides(chapter)
    first, *_, last = shown.cells
    assert first.source == chapter.cells[0].source.split("\n")[0]
    assert pictures(shown) == pictures(chapter)
    assert re.match(r"## In (five|six) sentences\n\n1\. (?s:.*)\n5\. ", last.source)
    closing = "\n".join(
        cell.source for cell in chapter.cells if "markdown" in cell.values()
    )
    assert last.source in closing and "## " not in last.source[3:]
    words = [cell.source for cell in shown.cells if cell.source.startswith("*")]
    assert len(words) == len(pictures(chapter))
    for said in words:
        assert said.count("*") % 2 == 0 and said[-2:-1] in ".?)" and said.endswith("*")
    starts = [cell for cell in shown.cells if "slideshow" in cell.metadata]
    assert len(starts) == 2 + len(pictures(chapter))
    assert not any("Exercise" in cell.source for cell in starts)


def test_captions_are_what_stands_in_italics_below_a_figure():
    cell = nbformat.v4.new_markdown_cell
    assert (
        slides._caption(cell("*Up\n`a*b`, and down.* Why?")) == "*Up\n`a*b`, and down.*"
    )
    assert slides._caption(cell("*This is\n**it**, so.* B")) == "*This is\n**it**, so.*"
    assert slides._caption(cell("*It rises. Their\nslopes:*")) == "*It rises.*"
    assert slides._caption(cell("*Their slopes:*")) == ""
    assert slides._caption(cell("**Bold** is *none*.")) == ""
    assert slides._caption(cell("Text, *then* italics.")) == ""
    assert (
        slides._caption(nbformat.v4.new_code_cell("*a*")) == slides._caption(None) == ""
    )


def test_slides_load_nothing_from_elsewhere(tmp_path):
    written = slides.write(tmp_path / "slides")
    assert [path.stem for path in written] == [text.stem for text in chapter_texts()]
    assert list(links.faults(tmp_path / "slides")) == []


@pytest.mark.nightly
def test_the_site_is_built_and_holds_together(tmp_path):
    """A minute of one core: `make site`."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "of_old.html").touch()
    site_command.build(tmp_path / "site")
    made = {path.stem for path in tmp_path.rglob("*.html")}
    assert {"index", "TEACHING", "lib.kv_cache", "05_paged_attention"} <= made
    assert "of_old" not in made and [path.name for path in tmp_path.iterdir()] == ["site"]


def test_make_help_and_the_readme_name_every_command():
    makefile, readme = (
        (ROOT / name).read_text(encoding="utf-8") for name in ("Makefile", "README.md")
    )
    targets = set(re.search(r"^\.PHONY: (.*)", makefile, re.M)[1].split())
    assert set(re.findall(r"^#   make (\w+)", makefile, re.M)) == targets
    assert set(re.findall(r"^\| `make (\w+)", readme, re.M)) == targets
