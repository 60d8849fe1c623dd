"""What an exercise is: one function or method of the library, and the cases that try it.

Three kinds of thing are kept apart, so that a grader in another process can use them too:

    cases     plain data: inputs, and limits on what they may cost    lib/course/cases/
    drivers   call the answer with a case's inputs, give plain data   lib/course/drivers/
    compare   expected against got, both plain data                  compare.py

Plain data are numbers, strings, None, numpy arrays, and lists and dicts of those.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from lib.course import cases, drivers
from lib.course.shipped import is_withheld, not_shipped


@dataclass(frozen=True)
class Case:
    """One call of an answer. `inputs` are the driver's keyword arguments."""

    name: str  # completes "wrong for ..."
    inputs: dict[str, Any]
    limits: dict[str, float] = field(default_factory=dict)  # output -> the most it may be
    draws: bool = False  # whether outputs follow from the random numbers of torch


@dataclass(frozen=True)
class Exercise:
    """`target` is where the library's own answer stands: "lib.text.decode".

    A method stands on its class, "lib.block_manager.BlockManager.allocate".
    """

    target: str
    points: int
    cases: Callable[[int], list[Case]]  # seed -> cases, the smallest first
    # (inputs, expected, got) -> the likely misconception, or None.
    explain: Callable[[dict, dict, dict], str | None] = lambda inputs, expected, got: None
    forbidden: tuple[str, ...] = ()  # functions that an answer may not call
    errors: dict[str, str] = field(default_factory=dict)  # part of a message -> advice
    # Of a Triton kernel: inputs -> the likely cause, where it takes its process with it.
    explain_crash: Callable[[dict], str | None] = lambda inputs: None
    parts: tuple[str, ...] = ()  # what else the answer is made of, beside `target`
    # Of a Triton kernel: what the compiler says against an answer, in a line, or None.
    compile_error: Callable[[Any], str | None] | None = None

    @property
    def name(self) -> str:
        return self.target.rsplit(".", 1)[1]

    @property
    def chapter(self) -> int:
        return int(self.driver().__module__.rsplit(".ch", 1)[1])

    @property
    def is_kernel(self) -> bool:
        return self.compile_error is not None

    @property
    def owner(self) -> Any:
        """The module or class that holds the answer."""
        module_name, name = self.target.rsplit(".", 1)
        try:
            return importlib.import_module(module_name)
        except ModuleNotFoundError:
            module_name, class_name = module_name.rsplit(".", 1)
            return getattr(importlib.import_module(module_name), class_name)

    def driver(self) -> Callable[..., dict]:
        for module in _modules(drivers):
            if hasattr(module, self.name):
                return getattr(module, self.name)
        raise LookupError(f"{self.name}: expected a driver of that name, found none")


@cache
def exercises() -> dict[str, Exercise]:
    """Every exercise by name, in the order of the chapters."""
    found = [exercise for module in _modules(cases) for exercise in module.EXERCISES]
    names = [exercise.name for exercise in found]
    assert len(set(names)) == len(names), f"two exercises of one name: {sorted(names)}"
    return dict(zip(names, found))


def names_of(chapters: str | None) -> list[str]:
    """The exercises of chapters, "3" or "1,2", or of all; ValueError for another.

    A release has nothing to try those of later chapters on: they are none of it.
    """
    here = [name for name in exercises() if not (is_withheld(name) and not_shipped(name))]
    known = sorted({str(exercises()[name].chapter) for name in here})
    chosen = chapters.split(",") if chapters else known
    for chapter in chosen:
        if chapter not in known:
            raise ValueError(
                f"chapters: expected some of {', '.join(known)}, got {chapter!r}"
            )
    return [name for name in here if str(exercises()[name].chapter) in chosen]


@cache
def library_answer(name: str) -> Any:
    """The library's own answer, as it was before any other took its place."""
    exercise = exercises()[name]
    return vars(exercise.owner)[name]


def _modules(package) -> list:
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return [importlib.import_module(f"{package.__name__}.{name}") for name in names]
