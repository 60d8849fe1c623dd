"""Local pass is graded pass: the answers of tests/answers through worker and grader."""

import importlib
import inspect
import linecache
import os
import re

import pytest
from test_exercises import NAMES
from test_exercises import RIGHT as ANSWERS_RIGHT
from test_exercises import WRONG as ANSWERS_WRONG

from lib.course.collect import Notebook
from lib.course.exercises import exercises
from lib.course.grading.grader import Worker, score
from lib.interpreter import HAS_TRITON

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")

SECRET_SEEDS = range(1000, 1020)
CHEAP = [name for name in NAMES if not exercises()[name].is_kernel]


@pytest.fixture(scope="module")
def worker(no_hurry):
    worker = Worker()
    yield worker
    worker.close()


def cells(name: str, answer) -> list[str]:
    """A notebook in which this is the answer: its module, without the registers."""
    function = inspect.unwrap(getattr(answer, "fn", answer))
    source = inspect.getsource(importlib.import_module(function.__module__))
    source = re.sub(r"^from answers import .*$", "", source, flags=re.MULTILINE)
    registers = r"^@(right|wrong)\(.*?\)$"
    source = re.sub(registers, "", source, flags=re.MULTILINE | re.DOTALL)
    filename = function.__code__.co_filename
    # A kernel of the library, with other lines in it: it needs the module's imports too.
    changed = linecache.getlines(filename) if filename.startswith("<") else []
    sources = [source, "".join(changed)]
    needed = Notebook(sources, "answers").needed(function.__name__)
    return [
        *(statement.source for statement in needed),
        f"{name} = {function.__name__}",
    ]


def right(name):
    return [(name, answer) for answer in ANSWERS_RIGHT[name]]


def wrong(name):
    return [(name, *answer) for answer in ANSWERS_WRONG[name]]


def identify(value):
    return value if isinstance(value, str) else getattr(value, "__name__", "kernel")


def graded(worker, name, answer, seed):
    result = score([cells(name, answer)], name, seed, worker)
    return result.points == result.max_points, result.message


def is_told(says: str, message: str) -> bool:
    """The words of the notebook's check, and no word of a notebook that was not read."""
    return says in message and "its cell fails" not in message


# A sample: of each exercise one of either kind, and of the kernels the smallest.
SAMPLE = [*CHEAP, *(name for name in NAMES if name == "load_row_kernel")]


@pytest.mark.parametrize("name", SAMPLE)
def test_a_right_and_a_wrong_answer_are_graded_as_the_notebook_checks_them(worker, name):
    passed, message = graded(worker, *right(name)[0], 999)
    assert passed, message
    _, answer, says = wrong(name)[0]
    passed, message = graded(worker, name, answer, 999)
    assert not passed and is_told(says, message), message


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_a_kernel_with_other_lines_in_it_is_graded_as_the_notebook_checks_it(worker):
    _, answer, says = next(
        row for row in wrong("load_row_kernel") if row[1].__name__.endswith("no_other")
    )
    passed, message = graded(worker, "load_row_kernel", answer, 999)
    assert not passed and is_told(says, message), message


@pytest.mark.nightly
@pytest.mark.parametrize(
    "name, answer", [pair for name in NAMES for pair in right(name)], ids=identify
)
def test_right_answers_pass_twenty_secret_seeds(worker, name, answer):
    for seed in SECRET_SEEDS:
        passed, message = graded(worker, name, answer, seed)
        assert passed, f"seed {seed}: {message}"


@pytest.mark.nightly
@pytest.mark.parametrize(
    "name, answer, says", [row for name in NAMES for row in wrong(name)], ids=identify
)
def test_wrong_answers_fail_twenty_secret_seeds(worker, name, answer, says):
    for seed in SECRET_SEEDS:
        passed, message = graded(worker, name, answer, seed)
        assert not passed and is_told(says, message), f"seed {seed}: {message}"
