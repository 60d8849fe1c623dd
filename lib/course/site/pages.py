"""What Sphinx reads: chapters, pages and reference, from what the course already has."""

import ast
import posixpath
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import nbformat

from lib.course import ROOT
from lib.course.build import chapter_texts, check, notebook_paths, read, student_notebook

# The pages in Markdown, in the order of the menu, and what they are called there.
PAGES = {"README.md": "index.md", "TEACHING.md": "TEACHING.md", "AGENTS.md": "AGENTS.md"}
DATA = "data/README.md"
# Packages of the reference. What is below lib/course is for those who change the course.
PACKAGES = {"lib": "What the course teaches", "lib.measure": "The instruments"}
PACKAGES |= {"lib.figures": "The pictures", "lib.course": "How it is taught"}

SOLVED = """
```{note}
Here the chapter is solved, and its answers are folded. To write them yourself, and run
everything on your machine: [start](/index.md#start).
```
"""
FOLDED = {
    "tags": ["hide-input"],
    "mystnb": {
        "code_prompt_show": "Show the answer",
        "code_prompt_hide": "Hide the answer",
    },
}
TOCTREE = """
```{{toctree}}
:hidden:
:caption: {caption}
{options}
{entries}
```
"""


def write_sources(folder: Path):
    """Everything that Sphinx needs, into a folder that is new or empty.

    Raises BuildError where a chapter's notebook is not what its text gives.
    """
    chapters = chapter_texts()
    (folder / "chapters").mkdir(parents=True)
    for text in chapters:
        check(text)
        solved = read(notebook_paths(text)[1])
        page = chapter_page(student_notebook(text), solved)
        nbformat.write(page, folder / "chapters" / f"{text.stem}.ipynb")
    shutil.copytree(ROOT / "data/results", folder / "data/results")
    for source, name in {**PAGES, DATA: DATA}.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        write(folder / name, with_links_of_the_site(text, Path(source).parent))
    modules = {package: list(modules_of(package)) for package in PACKAGES}
    for package, names in modules.items():
        title = PACKAGES[package]
        write(folder / f"reference/{package}.md", package_page(package, title, names))
        for name in names:
            write(folder / f"reference/{name}.md", module_page(name))
    menu = [
        ("Chapters", ":titlesonly:", [f"chapters/{text.stem}" for text in chapters]),
        ("For teachers", ":maxdepth: 2", ["TEACHING", "AGENTS"]),
        ("The library", ":titlesonly:", [f"reference/{name}" for name in PACKAGES]),
        ("Sources", ":titlesonly:", [DATA.removesuffix(".md")]),
    ]
    with (folder / "index.md").open("a", encoding="utf-8") as file:
        for caption, options, entries in menu:
            file.write(toctree(caption, options, entries))


def toctree(caption: str, options: str, entries: list[str]) -> str:
    return TOCTREE.format(caption=caption, options=options, entries="\n".join(entries))


def write(path: Path, text: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def chapter_page(
    student: nbformat.NotebookNode, solved: nbformat.NotebookNode
) -> nbformat.NotebookNode:
    """A chapter as it is read: outputs of the solved notebook, and of each exercise the
    stub that students get, the hints, the answer, folded, and what its check says."""
    page = nbformat.from_dict({**solved, "cells": []})
    pairs = zip(student.cells, solved.cells, strict=True)
    for stub, cell in pairs:
        is_exercise = stub.metadata.get("nbgrader", {}).get("solution")
        cell.metadata = {}
        if alt := stub.metadata.get("alt"):
            cell.metadata = {"mystnb": {"image": {"alt": alt}}}
        if not is_exercise:
            page.cells.append(cell)
            continue
        stub.metadata, cell.metadata = {}, nbformat.from_dict(FOLDED)
        cell.id += "-answer"
        (_, check), (_, hints) = next(pairs), next(pairs)
        page.cells += [stub, hints, cell, check]
    title, text = page.cells[0].source.split("\n", 1)
    page.cells[0].source = f"{title}\n\n{SOLVED}\n{text}"
    return page


def with_links_of_the_site(text: str, folder: Path) -> str:
    """A page in Markdown whose links lead to pages of the site.

    A link to either notebook of a chapter leads to the chapter; one to a folder, which
    has no page, becomes its text alone.
    """

    def link(match: re.Match) -> str:
        label, target = match.groups()
        if re.match(r"\w+:|#", target):
            return match[0]
        target, hash_mark, place = target.partition("#")
        path = posixpath.normpath((folder / target).as_posix())
        if (ROOT / path).is_dir():
            return label
        path = re.sub(r"^(notebooks|solutions)/(?=\w+\.ipynb$)", "chapters/", path)
        return f"[{label}](/{PAGES.get(path, path)}{hash_mark}{place})"

    return re.sub(r"(?<!`)\[([^\[\]]*)\]\(([^()\s]+)\)", link, text)


def modules_of(package: str) -> Iterator[str]:
    """Names of a package's own modules, in order of the alphabet."""
    for path in sorted((ROOT / package.replace(".", "/")).glob("*.py")):
        if path.stem != "__init__":
            yield f"{package}.{path.stem}"


def package_page(package: str, title: str, modules: list[str]) -> str:
    """The docstring of a package, and its modules, each with its first sentence."""
    rows = [f"| [`{name}`]({name}.md) | {summary(name)} |" for name in modules]
    return "\n".join(
        [
            f"# {title}: `{package}`",
            *("", "```{eval-rst}", f".. automodule:: {package}", "```", ""),
            *("| module | |", "|---|---|", *rows, ""),
            toctree(package, ":titlesonly:", modules),
        ]
    )


def module_page(name: str) -> str:
    return f"# `{name}`\n\n```{{eval-rst}}\n.. automodule:: {name}\n   :members:\n```\n"


def summary(module: str) -> str:
    """The first sentence of a module's docstring."""
    source = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(source)).split("\n\n")[0].replace("\n", " ")
