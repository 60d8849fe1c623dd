import base64
import inspect
import io
import re
import shutil

import nbformat
import pytest
from PIL import Image

from lib.course import build
from lib.course.build import (
    BuildError,
    chapter_texts,
    check,
    notebook_paths,
    student_notebook,
)
from lib.text import decode

CHAPTER = """# %% [markdown]
# # 9. A chapter

# %%
answer = 6 * 7
answer

# %%
answer
"""


@pytest.fixture
def chapter(tmp_path):
    """A small chapter in a tree of its own, built."""
    (tmp_path / "solutions").mkdir(), (tmp_path / "notebooks").mkdir()
    text = tmp_path / "solutions" / "09_small.py"
    text.write_text(CHAPTER)
    build.build(text)
    return text


def test_students_get_the_text_without_outputs_and_readers_get_it_run(chapter):
    student, executed = (
        nbformat.read(path, as_version=4) for path in notebook_paths(chapter)
    )
    assert [cell.source for cell in student.cells] == [
        cell.source for cell in executed.cells
    ]
    assert student.cells[1].outputs == [] and student.cells[1].execution_count is None
    assert executed.cells[1].outputs[0].data["text/plain"] == "42"
    check(chapter)


def test_the_same_text_gives_the_same_bytes(chapter):
    before = [path.read_bytes() for path in notebook_paths(chapter)]
    build.build(chapter)
    assert [path.read_bytes() for path in notebook_paths(chapter)] == before


def test_a_new_cell_leaves_the_ids_of_the_others_alone(chapter):
    before = [cell.id for cell in student_notebook(chapter).cells]
    assert len(set(before)) == len(before)
    chapter.write_text("# %%\nfirst = 1\n\n" + CHAPTER)
    assert [cell.id for cell in student_notebook(chapter).cells][1:] == before


def edit(path, old, new):
    assert old in path.read_text(), "the test edits nothing"
    path.write_text(path.read_text().replace(old, new, 1))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda text, student, executed: edit(text, "6 * 7", "6 * 8"), "is not what"),
        (
            lambda text, student, executed: edit(student, "6 * 7", "6 * 8"),
            "is not what",
        ),
        (
            lambda text, student, executed: edit(executed, "6 * 7", "6 * 8"),
            "is not what",
        ),
        (lambda text, student, executed: student.unlink(), "found nothing"),
        (lambda text, student, executed: executed.unlink(), "found nothing"),
        (
            lambda text, student, executed: shutil.copy(student, executed),
            "every cell run once",
        ),
        (lambda text, student, executed: shutil.copy(executed, student), "is not what"),
    ],
)
def test_a_stale_notebook_is_found(chapter, spoil, message):
    spoil(chapter, *notebook_paths(chapter))
    with pytest.raises(BuildError, match=message):
        check(chapter)


def test_an_executed_notebook_with_a_failed_cell_is_found(chapter):
    _, path = notebook_paths(chapter)
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].outputs = [nbformat.v4.new_output("error", ename="E", evalue="")]
    nbformat.write(notebook, path)
    with pytest.raises(BuildError, match="expected no cell to fail"):
        check(chapter)


def test_a_notebook_that_somebody_worked_in_is_not_overwritten(chapter):
    student, executed = notebook_paths(chapter)
    shutil.copy(executed, student)
    with pytest.raises(BuildError, match="somebody worked in it"):
        build.build(chapter)


SEEN = "A line of slope 1: y = x, 99 points, it's {50%} # full; √x·½ is not drawn."
MARK = f'# %% alt="{SEEN}"'
DRAW = "import matplotlib.pyplot as plt\nplt.plot(range(99));\n"
FIGURE = f"\n{MARK}\n{DRAW}"


def test_figures_are_kept_small_and_readable(chapter):
    chapter.write_text(CHAPTER + FIGURE)
    build.build(chapter)
    executed = nbformat.read(notebook_paths(chapter)[1], as_version=4)
    (png,) = [o.data["image/png"] for o in executed.cells[-1].outputs if "data" in o]
    picture = Image.open(io.BytesIO(base64.b64decode(png)))
    assert picture.mode == "P" and picture.width > 300


def test_both_notebooks_say_in_words_what_is_to_be_seen_in_a_figure(chapter):
    chapter.write_text(CHAPTER + FIGURE)
    build.build(chapter)
    for path in notebook_paths(chapter):
        cells = nbformat.read(path, as_version=4).cells
        assert [cell.metadata for cell in cells] == [{}, {}, {}, {"alt": SEEN}]
        assert cells[-1].source == DRAW.strip()
    check(chapter)


UNSEEN = [
    FIGURE.replace(MARK, "# %%"),  # a figure without words
    f"\n{MARK}\n6 * 7\n",  # words without a figure
]


@pytest.mark.parametrize("cell", UNSEEN, ids=["a figure", "words"])
def test_a_figure_without_words_or_words_without_one_are_not_built(chapter, cell):
    before = [path.read_bytes() for path in notebook_paths(chapter)]
    chapter.write_text(CHAPTER + cell)
    source = re.escape(cell.strip().split("\n", 1)[1])
    with pytest.raises(BuildError, match=rf"09_small.py: expected alt=.*\n{source}"):
        build.build(chapter)
    assert [path.read_bytes() for path in notebook_paths(chapter)] == before


@pytest.mark.parametrize("cell", UNSEEN, ids=["a figure", "words"])
def test_a_figure_without_words_or_words_without_one_are_found(
    chapter, cell, monkeypatch
):
    chapter.write_text(CHAPTER + cell)
    with monkeypatch.context() as patch:
        patch.setattr(build, "check_executed", lambda notebook, path: None)
        build.build(chapter)
    with pytest.raises(BuildError, match="09_small.ipynb: expected alt="):
        check(chapter)


EXERCISE = """# %%
import torch

# %% [markdown]
# ### Exercise

# %% exercise="decode"
from lib.text import decode

# %%
check(decode)
"""


def test_an_exercise_becomes_a_stub_and_the_librarys_source(chapter):
    chapter.write_text(EXERCISE)
    student, solved = student_notebook(chapter), build.solved_notebook(chapter)
    assert "raise NotImplementedError" in student.cells[2].source
    assert "raise NotImplementedError" not in solved.cells[2].source
    assert solved.cells[2].source == inspect.getsource(decode).rstrip()
    head = solved.cells[2].source.split('"""')[:2]
    assert student.cells[2].source.split('"""')[:2] == head  # signature and docstring
    answer, grade = (cell.metadata["nbgrader"] for cell in student.cells[2:])
    assert answer["solution"] and not answer["grade"] and answer["grade_id"] == "decode"
    assert grade["grade"] and grade["locked"] and grade["points"] == 1
    assert [cell.id for cell in student.cells] == [cell.id for cell in solved.cells]


def test_an_answer_whose_names_the_chapter_does_not_define_is_refused(chapter):
    chapter.write_text(EXERCISE.replace("import torch", "pass"))
    with pytest.raises(
        BuildError, match=r"decode: no cell before it defines \['torch'\]"
    ):
        student_notebook(chapter)


def test_a_check_of_nothing_fails(tmp_path):
    with pytest.raises(BuildError, match="expected chapter texts .* found none"):
        chapter_texts(tmp_path)


@pytest.mark.parametrize(
    "line, message",
    [
        ("1 / 0", "a cell failed"),
        (
            "import sys; print('oh', file=sys.stderr)",
            "expected nothing on stderr, got: oh",
        ),
        (
            "from IPython.display import HTML; HTML('x' * 600_000)",
            "expected at most 500000",
        ),
    ],
)
def test_a_chapter_that_fails_or_is_noisy_or_too_large_is_not_built(
    chapter, line, message
):
    before = [path.read_bytes() for path in notebook_paths(chapter)]
    chapter.write_text(CHAPTER + f"\n# %%\n{line}\n")
    with pytest.raises(BuildError, match=message):
        build.build(chapter)
    assert [path.read_bytes() for path in notebook_paths(chapter)] == before
    assert not list(chapter.parents[1].rglob("*.partial"))


@pytest.mark.parametrize("text", chapter_texts(), ids=lambda path: path.stem)
def test_the_notebooks_are_what_their_text_gives(text):
    check(text)
