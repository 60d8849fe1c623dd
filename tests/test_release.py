"""The bundle for a class that must not see the answers of a chapter yet."""

import json
import os
import re
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

import nbformat
import pytest

from lib.course import release as release_module
from lib.course.build import (
    ROOT,
    BuildError,
    chapter_texts,
    marked_exercises,
    solved_notebook,
)
from lib.course.release import FILES, release, write
from lib.course.stubs import answer, stub

CHAPTERS = {int(text.stem[:2]): text for text in chapter_texts()}


@pytest.fixture
def no_outputs(monkeypatch):
    """What the answers give takes seconds to compute, and is no text."""
    monkeypatch.setattr(release_module, "expected_outputs", lambda *_: {})


def plain_lines(text):
    """Its lines without comments, blank ones, and spaces that say nothing."""
    lines = (
        " ".join(re.sub(r"(^|\s)# .*", "", line).split()) for line in text.split("\n")
    )
    return [line for line in lines if line]


def secrets(mark):
    """What the stub of an exercise does not show: any two lines that follow each other
    in its answer, or of a body of one line that line."""
    source = plain_lines(answer(mark.module, mark.names))
    shown = set(plain_lines(stub(mark.module, mark.names, mark.given)))
    pairs = [
        f"\n{line}\n{following}\n"
        for line, following in zip(source, source[1:])
        if not {line, following} & shown and len(line + following) >= 20
    ]
    return pairs or [f"\n{line}\n" for line in source if line not in shown]


@cache
def text_of(path, data):
    """What can be read in a file; of a notebook its cells."""
    text = data.decode("utf-8", errors="replace")
    if path.endswith(".ipynb"):
        text = "\n".join(cell.source for cell in nbformat.reads(text, 4).cells)
    return "\n" + "\n".join(plain_lines(text)) + "\n"


def leaks(files, marks):
    """What can be read in `files` of what may not be read of `marks`."""
    looked_for = [secret for mark in marks for secret in secrets(mark)]
    lines = {path: text_of(path, data) for path, data in files.items()}
    return [(path, s) for path, text in lines.items() for s in looked_for if s in text]


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_no_withheld_answer_is_anywhere_in_the_bundle(chapter, no_outputs):
    files = release(chapter)
    later = [n for n in CHAPTERS if n >= chapter]
    marks = [mark for n in later for mark in marked_exercises(CHAPTERS[n])]
    assert all(secrets(mark) for mark in marks), "nothing was looked for"
    assert leaks(files, marks) == []

    # The control: in the library of the course each is found, and so are earlier ones.
    whole = {
        path.relative_to(ROOT).as_posix(): path.read_bytes()
        for pattern in FILES
        for path in ROOT.glob(pattern)
    }
    for mark in marks:
        found = {secret for _, secret in leaks(whole, [mark])}
        assert found == set(secrets(mark)), mark.exercise
    for number in range(1, chapter):
        for mark in marked_exercises(CHAPTERS[number]):
            assert leaks(files, [mark]), f"{mark.exercise} is missing"


# In a bundle: runs cells, and says what became of each check.
SCRIPT = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import lib
assert Path(lib.__file__).is_relative_to(Path.cwd()), lib.__file__
from lib.course.check import check
from lib.course.collect import register
namespace, messages = {}, []
for number, source in enumerate(json.load(sys.stdin)):
    filename = register(f"cell {number}", source)
    exec(compile(source, filename, "exec"), namespace)
    if source.startswith("check("):
        name = source[len("check("):-1]
        messages.append([name, check.results[name].passed, check.results[name].message])
print(json.dumps(messages))
"""


def cells_of(chapter):
    """The solved notebook's imports, which stand in its first cell, answers and checks."""
    cells = [c for c in solved_notebook(CHAPTERS[chapter]).cells if c.cell_type == "code"]
    imports = cells[0].source.split("\n\nplotting.")[0]
    return [imports, *(cell.source for cell in cells if cell.metadata)]


def run(bundle, cells):
    """What became of each check, [name, whether it passed, message], in a bundle."""
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps(cells),
        capture_output=True,
        text=True,
        cwd=bundle,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """chapter -> the folder of its bundle, made and unpacked once."""
    folder = tmp_path_factory.mktemp("released")

    @cache
    def unpack(chapter):
        write(release(chapter), f"through_{chapter}", folder / "release.zip")
        zipfile.ZipFile(folder / "release.zip").extractall(folder)
        return folder / f"through_{chapter}"

    return unpack


NIGHTLY = [pytest.param(n, marks=pytest.mark.nightly) for n in CHAPTERS if n != 4]
    pytest.param(n, marks=pytest.mark.nightly) for n in CHAPTERS if n not in (3, 4)
]


@pytest.mark.parametrize("chapter", [4, *NIGHTLY])
def test_in_the_bundle_right_answers_pass_in_the_order_of_the_page(chapter, unpacked):
    messages = run(unpacked(chapter), cells_of(chapter))
    assert [name for name, *_ in messages] == [
        mark.exercise for mark in marked_exercises(CHAPTERS[chapter])
    ]
    assert all(passed for _, passed, _ in messages), messages
    if chapter != 4:  # in which methods are tried together with those further down
        assert all(message == "passed" for *_, message in messages), messages
