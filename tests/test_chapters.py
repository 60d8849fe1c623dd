"""The chapters run on the reader's code: solved they pass, broken they fail later."""

import os
import subprocess
import sys

import pytest

from lib.course.build import ROOT, chapter_texts

# Runs a solved chapter cell by cell. After each check it forks: the child replaces that
# exercise by a function that raises, and goes on until a cell fails.
SCRIPT = """
import os, sys
from pathlib import Path
import matplotlib
matplotlib.use("agg")
import torch
torch.set_num_threads(1)  # more, and a forked child hangs
from lib.course.build import solved_notebook
from lib.course.check import check
from lib.course.collect import register
from lib.course.exercises import exercises

class Raiser:  # a function, or a kernel, which is launched on a grid
    def __call__(self, *args, **kwargs):
        raise ZeroDivisionError("the exercise was replaced")
    def __getitem__(self, grid):
        return self

cells = [c for c in solved_notebook(Path(sys.argv[1])).cells if c.cell_type == "code"]
namespace = {"__name__": "__main__"}
for number, cell in enumerate(cells):
    filename = register(f"cell {number}", cell.source)
    exec(compile(cell.source, filename, "exec"), namespace)
    if not cell.source.startswith("check(") or not cell.metadata:
        continue
    name = cell.source[len("check("):-1]
    assert check.results[name].message == "passed", check.results[name]
    child = os.fork()
    if child == 0:
        setattr(exercises()[name].owner, name, Raiser())
        try:
            for later in cells[number + 1:]:
                exec(compile(later.source, "later", "exec"), namespace)
        except ZeroDivisionError:
            os._exit(0)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    print("RAISED" if status == 0 else "NOT USED", name, flush=True)
"""


# Chapter 5 where nobody installed Triton. (Of the table one column is enough.)
WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
from pathlib import Path
import matplotlib
matplotlib.use("agg")
import torch
torch.set_num_threads(1)
from lib.course import build
from lib.measure import columns
del columns.COLUMNS["recompute"], columns.COLUMNS["contiguous"]
notebook = getattr(build, sys.argv[2])(Path(sys.argv[1]))
namespace = {"__name__": "__main__"}
for number, cell in enumerate(c for c in notebook.cells if c.cell_type == "code"):
    exec(compile(cell.source, f"cell {number}", "exec"), namespace)
"""


@pytest.mark.parametrize("kind", ["solved_notebook", "student_notebook"])
def test_chapter_5_runs_without_triton_and_says_what_its_checks_need(kind):
    (text,) = (path for path in chapter_texts() if path.stem == "05_paged_attention")
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON, str(text), kind],
        capture_output=True,
        text=True,
        cwd=ROOT / "notebooks",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("_kernel: needs Triton, which is for Linux") == 3
    assert result.stderr.count("UserWarning: no Triton here") == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("text", chapter_texts(), ids=lambda path: path.stem)
def test_a_solved_chapter_passes_and_runs_on_the_readers_code(text):
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(text)],
        capture_output=True,
        text=True,
        cwd=ROOT / "notebooks",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [line for line in result.stdout.split("\n") if line.split(" ")[0].isupper()]
    assert "NOT USED" not in result.stdout, lines
    assert result.stdout.count("RAISED") >= 5, result.stdout
