import importlib
import inspect
import pkgutil

import answers
import pytest
from answers import RIGHT, WRONG

from lib.course.check import judge
from lib.course.exercises import exercises, library_answer
from lib.paged_attention_triton import HAS_TRITON

for module in pkgutil.iter_modules(answers.__path__):
    importlib.import_module(f"answers.{module.name}")

SEEDS = [0, 1, 2]
NIGHTLY_SEEDS = pytest.param(range(3, 23), marks=pytest.mark.nightly, id="nightly")


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
    """Interpreting a kernel takes seconds: one seed, but for the nightly run."""
    is_slow = exercises()[name].is_kernel and seeds is SEEDS
    return seeds[:1] if is_slow else seeds


def identify(value):
    is_answer = inspect.isfunction(value) or hasattr(value, "arg_names")
    return value.__name__ if is_answer else str(value)


@pytest.mark.parametrize("name", exercises())
def test_there_are_enough_answers_to_try_a_check_with(name):
    assert len(WRONG[name]) >= 4 and len(RIGHT[name]) >= 2


@pytest.mark.parametrize("name", NAMES)
def test_the_library_passes_its_own_checks(name):
    for seed in in_ci(name, SEEDS):
        assert judge(exercises()[name], library_answer(name), seed).message == "passed"


@pytest.mark.parametrize("seeds", [SEEDS, NIGHTLY_SEEDS])
@pytest.mark.parametrize("name, answer", pairs(RIGHT), ids=identify)
def test_answers_written_differently_pass(name, answer, seeds):
    for seed in in_ci(name, seeds):
        result = judge(exercises()[name], answer, seed)
        assert result.passed, f"seed {seed}: {result.message}"


@pytest.mark.parametrize("seeds", [SEEDS, NIGHTLY_SEEDS])
@pytest.mark.parametrize("name, answer, says", pairs(WRONG), ids=identify)
def test_wrong_answers_fail_and_are_told_why(name, answer, says, seeds):
    for seed in in_ci(name, seeds):
        result = judge(exercises()[name], answer, seed)
        assert not result.passed, f"seed {seed}: passed"
        assert "\n" not in result.message and says in result.message, result.message
