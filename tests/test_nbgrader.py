"""A stock nbgrader takes our notebooks: nothing for a blank one, all for a solved one."""

import os
import sys
from pathlib import Path

import nbformat
import pytest

from lib.course.build import solved_notebook, student_notebook

CHAPTER = """# %%
import torch
from lib.course.check import check

# %% exercise="decode"
from lib.text import decode

# %%
check(decode)
"""


def test_nbgrader_gives_a_blank_notebook_0_and_a_solved_one_all_points(
    tmp_path, monkeypatch
):
    nbgrader = pytest.importorskip("nbgrader.apps")
    from traitlets.config import Config

    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    monkeypatch.setenv("PATH", path)  # nbgrader calls alembic, installed beside it

    text = tmp_path / "09_small.py"
    text.write_text(CHAPTER)
    blank, solved = student_notebook(text), solved_notebook(text)
    for path, notebook in (
        ("source/ch9/small.ipynb", solved),
        ("submitted/blank/ch9/small.ipynb", blank),
        ("submitted/solved/ch9/small.ipynb", solved),
    ):
        (tmp_path / path).parent.mkdir(parents=True)
        nbformat.write(notebook, tmp_path / path)

    config = Config()
    config.CourseDirectory.root = str(tmp_path)
    config.CourseDirectory.db_url = f"sqlite:///{tmp_path}/gradebook.db"
    api = nbgrader.NbGraderAPI(config=config)
    assert api.generate_assignment("ch9")["success"]
    for student in ("blank", "solved"):
        result = api.autograde("ch9", student, create=True)
        assert result["success"], result["error"]
    with api.gradebook as gradebook:
        scores = {
            student: gradebook.find_submission("ch9", student).score
            for student in ("blank", "solved")
        }
        assert gradebook.find_assignment("ch9").max_score == 1
    assert scores == {"blank": 0, "solved": 1}
