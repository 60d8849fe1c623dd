"""A stock nbgrader takes our notebooks: nothing for a blank one, all for a solved one."""

import os
import shutil
import sys
from pathlib import Path

import nbformat
import pytest

from lib.course.build import (
    chapter_texts,
    notebook_paths,
    solved_notebook,
    student_notebook,
)
from lib.course.exercises import exercises

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


@pytest.mark.parametrize("text", chapter_texts(), ids=lambda path: path.stem)
def test_a_stock_course_takes_solutions_as_source_and_notebooks_as_release(
    text, tmp_path, monkeypatch
):
    nbgrader = pytest.importorskip("nbgrader.apps")
    from nbgrader.nbgraderformat import MetadataValidator
    from traitlets.config import Config

    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    monkeypatch.setenv("PATH", path)
    solved, blank = text.with_suffix(".ipynb"), notebook_paths(text)[0]
    source = tmp_path / "source" / "chapter" / solved.name
    source.parent.mkdir(parents=True)
    shutil.copy(solved, source)

    config = Config()
    config.CourseDirectory.root = str(tmp_path)
    config.CourseDirectory.db_url = f"sqlite:///{tmp_path}/gradebook.db"
    api = nbgrader.NbGraderAPI(config=config)
    assert api.generate_assignment("chapter")["success"]
    made = nbformat.read(tmp_path / "release" / "chapter" / solved.name, as_version=4)
    ours = nbformat.read(blank, as_version=4)
    MetadataValidator().validate_nb(ours)
    assert grade_ids(made) == grade_ids(ours)
    assert len(grade_ids(ours)) == 2 * len(names_in(ours))
    points = sum(exercises()[name].points for name in names_in(ours))
    with api.gradebook as gradebook:
        assert gradebook.find_assignment("chapter").max_score == points


def grade_ids(notebook) -> list[str]:
    cells = [cell.metadata.get("nbgrader") for cell in notebook.cells]
    return [cell["grade_id"] for cell in cells if cell]


def names_in(notebook) -> list[str]:
    return [name for name in grade_ids(notebook) if name in exercises()]
