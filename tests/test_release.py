"""The bundle for a class that must not see the answers of a chapter yet."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from functools import cache

import nbformat
import pytest

from lib.course import release as release_module
from lib.course.attempt import NOT_WRITTEN
from lib.course.build import (
    ROOT,
    BuildError,
    chapter_texts,
    marked_exercises,
    solved_notebook,
    student_notebook,
)
from lib.course.check import SEED
from lib.course.compare import difference
from lib.course.exercises import exercises, names_of
from lib.course.release import FILES, release, write
from lib.course.stubs import answer, stub
from lib.recall import RECIPES

# Those with exercises: the others have no answers to keep.
CHAPTERS = {
    int(text.stem[:2]): text for text in chapter_texts() if marked_exercises(text)
}


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
# THEN
print(json.dumps(messages))
"""

# All answers to the exercises of the chapter, those of tests/answers.
ALL_ANSWERS = """
sys.path.append(sys.argv[1])
import importlib
from answers import RIGHT, WRONG
from lib.course.check import SEED, judge
from lib.course.exercises import exercises
importlib.import_module("answers.ch%02d")
for name in [name for name, *_ in messages]:
    assert check(namespace[name]).message == "passed", name
for name in [name for name, *_ in messages]:
    for answer in RIGHT[name]:
        result = judge(exercises()[name], answer, SEED)
        assert result.message == "passed", (name, answer, result)
    for answer, says in WRONG[name]:
        result = judge(exercises()[name], answer, SEED)
        assert not result.passed and says in result.message, (name, answer, result)
"""


def cells_of(chapter):
    """The solved notebook's imports, answers and checks."""
    cells = [c for c in solved_notebook(CHAPTERS[chapter]).cells if c.cell_type == "code"]
    imports = cells[0].source.split("\n\nplotting.")[0]
    return [imports, *(cell.source for cell in cells if "nbgrader" in cell.metadata)]


def run(bundle, cells, then=""):
    """What became of each check, [name, whether it passed, message], in a bundle, where
    `then` is run at the end."""
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT.replace("# THEN", then), str(ROOT / "tests")],
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


@pytest.mark.parametrize("chapter", [4, *NIGHTLY])
def test_in_the_bundle_answers_are_judged_in_the_order_of_the_page(chapter, unpacked):
    messages = run(unpacked(chapter), cells_of(chapter), ALL_ANSWERS % chapter)
    assert [name for name, *_ in messages] == [
        mark.exercise for mark in marked_exercises(CHAPTERS[chapter])
    ]
    assert all(passed for _, passed, _ in messages), messages
    if chapter != 4:  # in which methods are tried together with those further down
        assert all(message == "passed" for *_, message in messages), messages


def solved(bundle, chapter, share, prefix="lib."):
    """What solves an exercise of the chapter there: [exercise, function, how]."""
    result = subprocess.run(
        [sys.executable, ROOT / "tests" / "solving.py", str(chapter), str(share), prefix],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=bundle.parent,
        env={**os.environ, "PYTHONPATH": str(bundle)},
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


SAMPLE = [(3, 50), *(pytest.param(n, 1, marks=pytest.mark.nightly) for n in CHAPTERS)]


@pytest.mark.parametrize("chapter, share", SAMPLE)
def test_nothing_in_the_bundle_solves_an_exercise_of_its_chapter(
    unpacked, chapter, share
):
    assert solved(unpacked(chapter), chapter, share) == []


LEAKS = [  # what computes an answer again, and is found where it is put back
    (3, "attend_cached", "_attend"),
    pytest.param(1, "attend_causal", "_attend", marks=pytest.mark.nightly),
    pytest.param(4, "slot_mapping", "_slots", marks=pytest.mark.nightly),
]


@pytest.mark.parametrize("chapter, exercise, function", LEAKS)
def test_what_computes_an_answer_again_would_be_found(
    unpacked, tmp_path, chapter, exercise, function
):
    shutil.copytree(unpacked(chapter), tmp_path / "bundle")
    cases = f"lib/course/cases/ch{chapter:02}.py"
    shutil.copy(ROOT / cases, tmp_path / "bundle" / cases)
    module = cases.replace("/", ".").removesuffix(".py")
    rows = solved(tmp_path / "bundle", chapter, 1, module)
    found = {(name, path.removesuffix(".__wrapped__")) for name, path, _ in rows}
    assert (exercise, f"{module}.{function}") in found


def test_outputs_that_are_shipped_are_none_of_hidden_cases():
    """Whoever looks an answer up among them fails where there is another seed."""
    for name, exercise in exercises().items():
        shipped = [case.inputs for case in exercise.cases(SEED)]
        for seed in range(1, 6):
            hidden = [case.inputs for case in exercise.cases(seed)]
            assert not all(
                any(not difference(inputs, known) for known in shipped)
                for inputs in hidden
            ), (name, seed)


AFTERWARDS = """
from lib import block_manager, kv_cache, paged_kv_cache
from lib.measure import table
from lib.course.check import restore
from lib.course.exercises import exercises, library_answer

assert block_manager.BlockManager.allocate is namespace["allocate"]
restore(exercises()["allocate"])
assert block_manager.BlockManager.allocate is library_answer("allocate")
try:
    block_manager.BlockManager(4, 2).allocate("a", 1)
    raise AssertionError("it is not a stub")
except NotImplementedError as error:
    assert str(error) == "allocate is yours to write, in chapter 4", error
check.collect("notebooks")
check.results.clear()
def later(answer):
    result = check(answer)
    messages.append(["later", result.passed, result.message])
import lib.paged_attention as chapter_5
later(chapter_5.merge_splits)
def merge_splits(outs, logsumexps):
    return outs, logsumexps
later(merge_splits)
"""


def test_in_the_bundle_an_answer_that_needs_another_says_which(unpacked):
    cells = cells_of(4)
    of = {  # the cell that checks -> those of the answer and its check
        check: [answer, check]
        for answer, check in zip(cells, cells[1:])
        if check.startswith("check(")
    }
    order = ["append", "copy_on_write", "allocate", "append", "copy_on_write"]
    chosen = [cell for name in order for cell in of[f"check({name})"]]
    messages = run(unpacked(4), [cells[0], *chosen], AFTERWARDS)
    assert messages == [
        ["append", False, "needs allocate, which is yours to write: that first"],
        ["copy_on_write", False, "needs allocate, which is yours to write: that first"],
        ["allocate", True, messages[2][2]],
        ["append", True, messages[3][2]],
        ["copy_on_write", False, "needs fork, which is yours to write: that first"],
        ["later", False, NOT_WRITTEN],
        ["later", False, messages[6][2]],
    ]
    assert messages[2][2] == (
        "passed so far; 2 of 13 cases wait for free: then check it again"
    )
    assert messages[3][2].startswith("passed so far; 9 of 22 cases wait for fork")
    assert messages[6][2].startswith("is of chapter 5, which this release ends before")


def mine(bundle, *options):
    """What `--mine` ends with and prints, there."""
    command = [sys.executable, "-m", "lib.course.grading", "--mine", *options]
    # torch leaves this to its children; a learner's shell has none.
    env = {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"}
    said = subprocess.run(command, cwd=bundle, env=env, capture_output=True, text=True)
    assert not said.stderr, said.stderr
    return said.returncode, said.stdout.strip().split("\n")


@pytest.mark.parametrize("chapter, points", [(3, 9), (4, 15), (9, 12)])
def test_in_the_bundle_a_learner_sees_the_own_progress(
    unpacked, tmp_path, chapter, points
):
    """Answers that need each other, though the library has stubs for all."""
    nbformat.write(solved_notebook(CHAPTERS[chapter]), tmp_path / "mine.ipynb")
    status, lines = mine(unpacked(chapter), tmp_path, "--chapters", str(chapter))
    assert status == 0 and lines[-1] == f"{points} of {points} points", lines


def test_in_the_bundle_nobody_is_asked_for_later_chapters(unpacked):
    status, (*lines, total) = mine(unpacked(3), "notebooks")
    points = sum(exercises()[name].points for name in names_of("1,2,3"))
    assert status == 1 and total == f"0 of {points} points"
    assert {line.split("  ")[-1] for line in lines} == {NOT_WRITTEN}
    assert [line.split()[0] for line in lines] == names_of("1,2,3")


@pytest.mark.parametrize("name", ["README.md", "AGENTS.md"])
def test_in_the_bundle_every_link_leads_to_a_file(unpacked, name):
    text = (unpacked(4) / name).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert targets
    for target in targets:
        assert target.startswith("https://") or (unpacked(4) / target).exists(), target


def test_a_bundle_is_written_whole_and_starts(tmp_path, no_outputs):
    files = release(2)
    write(files, "top", tmp_path / "a.zip")
    write(files, "top", tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "b.zip"]
    assert set(zipfile.ZipFile(tmp_path / "a.zip").namelist()) == {
        f"top/{path}" for path in files
    }
    notebooks = [path for path in files if path.endswith(".ipynb")]
    assert notebooks == ["notebooks/01_generation.ipynb", "notebooks/02_training.ipynb"]
    not_given = ("solutions/", "tests/", "lib/course/site/", "lib/course/slides.py")
    assert not [path for path in files if path.startswith(not_given)]
    start = files["README.md"].decode().split("\n## Chapters")[0]
    assert "\n    make lab\n" in start and "and make. No GPU." in start
    assert "python3 -m venv .venv" in start and "git and make" not in start
    assert {"LICENSE", "requirements.txt", "data/moby_dick.pt"} <= files.keys()
    weights = {f"data/recall/{name}.pt" for name in RECIPES}
    assert weights == {path for path in files if path.startswith("data/recall/")}
    one, two = (nbformat.reads(files[path].decode(), 4) for path in notebooks)
    assert one == student_notebook(CHAPTERS[1])
    assert [c.source for c in two.cells] == [
        c.source for c in student_notebook(CHAPTERS[2]).cells
    ]
    makefile = files["Makefile"].decode()
    targets = re.findall(r"(?m)^([\w./]+):(?!=)", makefile)
    assert targets == [".PHONY", "lab", "mine", "help", ".venv/course", ".venv/models"]
    named = set(re.findall(r"make (\w+)", makefile.split("\n\n")[0]))
    assert named == {"lab", "mine", "help"}
    links = re.findall(r"\]\(([^)]*)\)", files["README.md"].decode())
    assert links and set(links) <= files.keys()


def test_chapters_without_exercises_come_with_the_one_before_them(no_outputs):
    for chapter, is_there in ((8, False), (9, True)):
        files = release(chapter)
        assert ("notebooks/10_real_model.ipynb" in files) == is_there
        readme = files["README.md"].decode()
        assert ("10_real_model.ipynb" in readme) == is_there
        assert "answers of chapter 9" in readme or chapter < 9


def test_what_is_no_chapter_is_refused():
    with pytest.raises(
        BuildError, match="expected a chapter with exercises, 1 to 9, got 10"
    ):
        release(10)


def test_without_triton_there_is_no_release_of_its_chapter(monkeypatch):
    monkeypatch.setattr(release_module, "HAS_TRITON", False)
    monkeypatch.setattr(release_module, "expected_outputs", lambda *_: {})
    with pytest.raises(BuildError, match="load_row_kernel: expected Triton"):
        release(5)


@pytest.mark.nightly  # it installs the course
def test_a_bundle_sets_itself_up_and_its_notebooks_run(unpacked):
    bundle = unpacked(3)
    setup = ["make", ".venv/course", f"PYTHON={sys.executable}"]
    subprocess.run(setup, cwd=bundle, check=True)
    solved = bundle / "notebooks" / "03_kv_cache.ipynb"
    nbformat.write(solved_notebook(CHAPTERS[3]), solved)
    for path in (bundle / "notebooks" / "02_training.ipynb", solved):
        command = [".venv/bin/jupyter", "execute", "--inplace", "--timeout=600", path]
        subprocess.run(command, cwd=bundle, check=True)
    outputs = [
        output.text
        for cell in nbformat.read(solved, 4).cells
        if cell.source.startswith("check(")
        for output in cell.outputs
    ]
    assert len(outputs) == 5
    assert all(text.endswith(": passed\n") for text in outputs), outputs
