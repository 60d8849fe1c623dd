import functools
import importlib
import inspect
import pkgutil

import answers
import pytest
from answers import RIGHT, WRONG

import lib.course.check as check
from lib.course.compare import difference
from lib.course.exercises import exercises, library_answer
from lib.paged_attention_triton import HAS_TRITON

for module in pkgutil.iter_modules(answers.__path__):
    importlib.import_module(f"answers.{module.name}")

pytestmark = pytest.mark.usefixtures("warm_compiler")

SEEDS = [0, 1, 2]
NIGHTLY_SEEDS = pytest.param(range(1, 23), marks=pytest.mark.nightly, id="nightly")
# Of which a seed takes seconds: one is a sample, but for the nightly run.
SLOW = {"generate_recompute", "generate_cached", "checkpoint_recursive"}


NAMES = [
    name for name, exercise in exercises().items() if HAS_TRITON or not exercise.is_kernel
]


def pairs(table):
    return [
        pytest.param(name, *(answer if isinstance(answer, tuple) else (answer,)))
        for name in NAMES
        for answer in table[name]
    ]


def in_ci(name, seeds):
    is_slow = exercises()[name].is_kernel or name in SLOW
    return seeds[:1] if is_slow and seeds is SEEDS else seeds


@functools.cache
def expected_by_case(name, seed):
    """What the library gives, which many answers are compared with."""
    exercise = exercises()[name]
    return [(case.inputs, give(exercise, case)) for case in exercise.cases(seed)]


give = check.expected_outputs


def judge(name, answer, seed, monkeypatch):
    """The check's result, with what the library gives looked up; slowness has tests of
    its own."""
    expected = expected_by_case(name, seed)  # here, before a kernel is tried in a fork

    def look_up(exercise, case):
        return next(o for inputs, o in expected if not difference(inputs, case.inputs))

    monkeypatch.setattr(check, "expected_outputs", look_up)
    monkeypatch.setattr(check, "_slowdown", lambda *_: 1.0)
    return check.judge(exercises()[name], answer, seed)


def identify(value):
    is_answer = inspect.isfunction(value) or hasattr(value, "arg_names")
    return value.__name__ if is_answer else str(value)


@pytest.mark.parametrize("name", exercises())
def test_there_are_enough_answers_to_try_a_check_with(name):
    assert len(WRONG[name]) >= 4 and len(RIGHT[name]) >= 2


@pytest.mark.parametrize("name", NAMES)
def test_the_library_passes_its_own_checks(name, monkeypatch):
    for seed in in_ci(name, SEEDS):
        result = judge(name, library_answer(name), seed, monkeypatch)
        assert result.message == "passed"


@pytest.mark.parametrize("seeds", [SEEDS, NIGHTLY_SEEDS])
@pytest.mark.parametrize("name, answer", pairs(RIGHT), ids=identify)
def test_answers_written_differently_pass(name, answer, seeds, monkeypatch):
    for seed in in_ci(name, seeds):
        result = judge(name, answer, seed, monkeypatch)
        assert result.passed, f"seed {seed}: {result.message}"


@pytest.mark.parametrize("seeds", [SEEDS, NIGHTLY_SEEDS])
@pytest.mark.parametrize("name, answer, says", pairs(WRONG), ids=identify)
def test_wrong_answers_fail_and_are_told_why(name, answer, says, seeds, monkeypatch):
    for seed in in_ci(name, seeds):
        result = judge(name, answer, seed, monkeypatch)
        assert not result.passed, f"seed {seed}: passed"
        assert "\n" not in result.message and says in result.message, result.message
