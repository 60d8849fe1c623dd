"""A class of 200, graded whole and killed halfway. With -m nightly -s it is timed."""

import os
import random
import signal
import subprocess
import sys
import time

import nbformat
import pytest
from test_grading_answers import cells, right, wrong

from lib.course import ROOT
from lib.course.build import chapter_texts, solved_notebook, student_notebook
from lib.course.exercises import names_of

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork"),
]

CHAPTER = 4
ACCIDENTS = (
    *("while True: pass", "import time; time.sleep(1000)", "import os; os._exit(0)"),
    *("return bytearray(10**11)", "print('x' * 10**7)", "exit()", "1 / 0"),
)


def hand_in(folder, num_students: int):
    """Answers of tests/answers: of ten, seven right and three wrong; in place of one in
    thirty an accident. One notebook in twenty is blank, one in fifty half a file."""
    rng = random.Random(0)
    (text,) = [t for t in chapter_texts() if t.stem.startswith(f"{CHAPTER:02}")]
    solved, blank = solved_notebook(text), student_notebook(text)
    for number in range(num_students):
        path, kind = folder / f"student {number:03}.ipynb", rng.random()
        if kind < 0.02:
            path.write_text(nbformat.writes(solved)[:5000], encoding="utf-8")
            continue
        notebook = nbformat.from_dict(blank if kind < 0.07 else solved)
        for name in names_of(str(CHAPTER)) if kind >= 0.07 else ():
            drawn = rng.random()
            if drawn < 1 / 30:
                body = rng.choice(ACCIDENTS)
                sources = [f"def {name}(*args, **kwargs):\n    {body}"]
            else:
                of_a_kind = right(name) if drawn < 0.7 else wrong(name)
                sources = cells(name, rng.choice(of_a_kind)[1])
            sources = [
                *sources,
                f"check({name})",
            ]  # the last: what stands above it counts
            notebook.cells += [nbformat.v4.new_code_cell(source) for source in sources]
        nbformat.write(notebook, path)


def start(folder, out):
    options = ("--chapters", str(CHAPTER), "--seed", "secret", "--jobs", "2")
    return subprocess.Popen(
        [sys.executable, "-m", "lib.course.grading", folder, "--out", out, *options],
        cwd=ROOT,
    )


def test_a_class_of_200_is_graded_the_same_whole_and_killed_halfway(tmp_path):
    folder, whole, cut = (tmp_path / name for name in ("class", "whole", "cut"))
    folder.mkdir()
    hand_in(folder, 200)
    begun = time.monotonic()
    assert start(folder, whole).wait(timeout=1200) == 0
    print(f"\n200 submissions, two workers: {time.monotonic() - begun:.0f} s")

    process = start(folder, cut)
    while len(list(cut.glob("students/*.json"))) < 100:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (cut / "grades.csv").exists()
    assert start(folder, cut).wait(timeout=1200) == 0
    table = (whole / "grades.csv").read_bytes()
    assert table.count(b"\n") == 201 and (cut / "grades.csv").read_bytes() == table
