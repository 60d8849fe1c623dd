"""Solve exercises with what is in a bundle: every function of it in an answer's place.

    PYTHONPATH=bundle python tests/solving.py 3 10    # the exercises of chapter 3

Prints what passes, as JSON: [exercise, function, how it was called]. Each function is
called with the answer's arguments, some of them, in other orders, by name, and all of
them in a dict, as tensors and as arrays; what else it asks for is filled in. The other
exercises of the chapter are solved already. 10: of the functions outside of the cases
only each tenth is tried. A third argument is what their names have to begin with.
"""

import contextlib
import copy
import dataclasses
import functools
import importlib
import inspect
import itertools
import json
import pkgutil
import signal
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from answers import RIGHT

import lib
from lib.course import interpreted  # noqa: F401  first: kernels are tried here
from lib.course.attempt import function_of, silence
from lib.course.check import SEED, expected_outputs, judge
from lib.course.compare import difference
from lib.course.exercises import exercises, library_answer
from lib.course.fork import ForkDiedError, in_fork
from lib.course.shipped import is_withheld
from lib.measure import gpu_code

SECONDS = 3  # of processor time, for one function, called in all ways
# Their names are those of the system too, and nothing in them computes.
DANGEROUS = ("lib.course.grading.",)
HOLDERS = (staticmethod, classmethod, property)
INSIDE = ("__wrapped__", "__func__", "fget", "func", "args", "keywords", "fn")
INSIDE += ("__defaults__", "__kwdefaults__", "__code__")
CHUNK = 100  # functions that are tried in one fork
FILLERS = (
    0,
    "",
    None,
    False,
    "zeros",
)  # for what a function asks for beside the arguments


class TooLong(BaseException):
    """Passes by what catches an Exception."""


def modules() -> Iterator[types.ModuleType]:
    """All of the library that can be imported, but for what runs and ends processes."""
    for found in pkgutil.walk_packages(lib.__path__, "lib."):
        if not found.name.startswith(DANGEROUS):
            with contextlib.suppress(ImportError):
                yield importlib.import_module(found.name)


def callables() -> dict[str, Callable]:
    """What can be called and is the library's, however deep it lies: methods, functions
    in functions, what decorators have wrapped, defaults and closures."""
    found: dict[str, Callable] = {}
    seen: set[int] = set()
    kept = []  # so that no id is given anew

    def look(name: str, value: Any, scope: dict):
        if id(value) in seen or isinstance(value, (str, int, float, types.ModuleType)):
            return
        seen.add(id(value))
        kept.append(value)
        if isinstance(value, types.CodeType):
            for inner in value.co_consts:
                # What a comprehension or a generator asks for is none of Python's.
                if isinstance(inner, types.CodeType) and inner.co_name[0] != "<":
                    if not inner.co_freevars:
                        function = types.FunctionType(inner, scope)
                        found[f"{name}.{inner.co_name}"] = function
                    look(f"{name}.{inner.co_name}", inner, scope)
            return
        if isinstance(value, (list, tuple, set, frozenset, dict)):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in items:
                look(f"{name}[{key!r}]", item, scope)
            return
        module = getattr(value, "__module__", None) or type(value).__module__
        is_holder = isinstance(value, HOLDERS) or type(value).__module__ == "functools"
        if not f"{module}.".startswith("lib.") and not is_holder:
            return
        if f"{module}.".startswith(DANGEROUS):
            return
        if callable(value):
            found[name] = value
        scope = getattr(value, "__globals__", scope)
        with contextlib.suppress(TypeError):
            for key, item in list(vars(value).items()):
                if key not in ("__dict__", "__weakref__"):
                    look(f"{name}.{key}", item, scope)
        for key in INSIDE:
            with contextlib.suppress(AttributeError):
                look(f"{name}.{key}", getattr(value, key), scope)
        for cell in getattr(value, "__closure__", None) or ():
            with contextlib.suppress(ValueError):
                look(f"{name}'s closure", cell.cell_contents, scope)

    for module in list(modules()):
        for name, value in list(vars(module).items()):
            if not name.startswith("__"):
                look(f"{module.__name__}.{name}", value, vars(module))
    return found


def as_arrays(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().numpy()
    if isinstance(value, (list, tuple)):
        return type(value)(as_arrays(item) for item in value)
    return value


def as_tensors(value: Any, like: Any) -> Any:
    """Arrays and numpy's numbers as torch's and Python's; fractions in the dtype of what
    came in."""
    if isinstance(value, (np.ndarray, np.generic)) and np.ndim(value) == 0:
        return value.item()
    if isinstance(value, np.ndarray):
        tensor = torch.from_numpy(np.ascontiguousarray(value))
        dtypes = [x.dtype for x in like if isinstance(x, torch.Tensor)]
        dtypes = [dtype for dtype in dtypes if dtype.is_floating_point]
        return tensor.to(dtypes[0]) if dtypes and tensor.is_floating_point() else tensor
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (list, tuple)):
        return type(value)(as_tensors(item, like) for item in value)
    return value


def ways(function: Callable, names: list[str]) -> Iterator[tuple[str, Callable]]:
    """How `function` can be called, in words, and as what turns the answer's arguments,
    by name, into its own, (args, kwargs)."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    parameters = signature.parameters.values()
    required = [p.name for p in parameters if p.default is p.empty and p.kind < 2]
    flags = [
        {},
        *({p.name: not p.default} for p in parameters if p.default in (True, False)),
    ]
    few = len(names) <= 4
    orders = [
        *([*itertools.permutations(names)] if few else [names, names[::-1]]),
        *itertools.combinations(names, len(names) - 1),
        *itertools.permutations(names, 2 if few else 1),
        *itertools.combinations(names, 1),
    ]
    found = {", ".join(order): functools.partial(_in_order, order) for order in orders}
    known = [p.name for p in parameters if p.name in names]
    for filler in FILLERS:
        asked = [name for name in required if name not in names]
        by_name = functools.partial(_by_name, known, asked, filler)
        in_a_dict = functools.partial(_in_a_dict, len(required) - 1, filler)
        found[f"by name and {filler!r} for {asked}" if asked else "by name"] = by_name
        found[f"in a dict, then {filler!r}" if required[1:] else "in a dict"] = in_a_dict
    sample = dict.fromkeys(names)
    for words, way in found.items():
        for flag in flags:
            args, kwargs = way(sample)
            with contextlib.suppress(TypeError):
                signature.bind(*args, **{**kwargs, **flag})
                yield f"{words} {flag or ''}".strip(), functools.partial(_with, flag, way)


def _in_order(order, given):
    return [given[name] for name in order], {}


def _by_name(known, asked, filler, given):
    named = {name: given[name] for name in known}
    return [], {**named, **dict.fromkeys(asked, _filled(filler, given))}


def _in_a_dict(num_others, filler, given):
    return [dict(given), *[_filled(filler, given)] * num_others], {}


def _with(flag, way, given):
    args, kwargs = way(given)
    return args, {**kwargs, **flag}


def _filled(filler, given):
    if filler != "zeros":
        return filler
    rows = [x for x in given.values() if getattr(x, "ndim", 0) == 1]
    return 0 * rows[0] if rows else 0


class Answer:
    """A function of the library in the place of a stub."""

    def __init__(
        self, function: Callable, way: Callable, are_arrays: bool, stub: Callable
    ):
        self.function, self.way, self.are_arrays = function, way, are_arrays
        self.signature = inspect.signature(stub)

    def __call__(self, *args, **kwargs):
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        if self.are_arrays:
            given = {name: as_arrays(value) for name, value in given.items()}
        args, kwargs = self.way(given)
        out = self.function(*args, **kwargs)
        return as_tensors(out, bound.arguments.values()) if self.are_arrays else out


def solve(exercise, found: dict[str, Callable]) -> list[list[str]]:
    """What passes of `found`, by name, in the exercise's place."""
    stub, run, passed = library_answer(exercise.name), exercise.driver(), []
    cases = exercise.cases(SEED)
    judged = dataclasses.replace(exercise, cases=lambda seed: cases)
    if exercise.is_kernel:
        kernels = {n: f for n, f in found.items() if hasattr(f, "arg_names")}
        return [
            [exercise.name, name, "as it is"]
            for name, kernel in kernels.items()
            if judge(judged, kernel, SEED).passed
        ]
    gpu_code.compile_kernel = None  # it takes seconds, and answers nothing here
    expected = expected_outputs(exercise, cases[0])
    names, calls = list(inspect.signature(stub).parameters), []
    with contextlib.suppress(Exception):
        run(lambda *args, **kwargs: calls.append((args, kwargs)), **copy_of(cases[0]))

    def is_promising(answer: Answer, given: tuple) -> bool:
        """Whether it gives anything, and for the first case what is right: all others
        would fail there."""
        try:
            answer(*given[0], **given[1])
            got = run(answer, **copy_of(cases[0]))
        except (Exception, SystemExit):
            return False
        keys = expected.keys() - cases[0].limits
        return not difference({key: expected[key] for key in keys}, got)

    if not calls:
        raise LookupError(f"{exercise.name}: expected a call in its first case")
    for name, function in found.items():
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        with contextlib.suppress(TooLong), silence():
            given = copy.deepcopy(calls[0])  # once: of a model it takes long
            for words, way in ways(function, names):
                for are_arrays in (False, True):
                    answer = Answer(function, way, are_arrays, function_of(stub))
                    if is_promising(answer, given) and judge(judged, answer, SEED).passed:
                        passed.append([exercise.name, name, words])
                        raise TooLong
        signal.setitimer(signal.ITIMER_PROF, 0)
    return passed


def copy_of(case) -> dict:
    return copy.deepcopy(case.inputs)


def _too_long(*_):
    raise TooLong


def solve_safely(exercise, found: dict[str, Callable]) -> list[list[str]]:
    """The same in a fork, where some may crash: then one by one, to find out which."""
    try:
        return in_fork(lambda: solve(exercise, found), SECONDS * (len(found) + 5))
    except ForkDiedError as error:
        if len(found) == 1:
            print(exercise.name, *found, error, file=sys.stderr)
            return []
    names = list(found)
    return [
        row
        for half in (names[: len(names) // 2], names[len(names) // 2 :])
        for row in solve_safely(exercise, {name: found[name] for name in half})
    ]


def functions(share: int, prefix: str) -> dict[str, Callable]:
    """All callables of the cases, and of others one in so many."""
    found = {n: f for n, f in callables().items() if n.startswith(prefix)}
    # Cases take long to make, and are no answers.
    of_cases = [n for n in found if n.startswith("lib.course.cases.")]
    others = [n for n in found if not n.startswith("lib.course.cases.")]
    tried = [n for n in of_cases if not n.endswith("_cases")] + others[::share]
    return {name: found[name] for name in tried}


def main(chapter: int, share: int, prefix: str = "lib.") -> list[list[str]]:
    signal.signal(signal.SIGPROF, _too_long)
    found, passed = functions(share, prefix), []
    names = list(found)
    importlib.import_module(f"answers.ch{chapter:02}")
    of_chapter = [e for e in exercises().values() if e.chapter == chapter]
    for exercise in of_chapter:
        assert is_withheld(exercise.name), exercise.name
        library_answer(exercise.name)  # is remembered
    for exercise in of_chapter:
        for other in of_chapter:
            answer = (
                library_answer(other.name) if other is exercise else RIGHT[other.name][0]
            )
            setattr(other.owner, other.name, answer)
        for first in range(0, len(names), CHUNK):
            chunk = {name: found[name] for name in names[first : first + CHUNK]}
            passed += solve_safely(exercise, chunk)
    return passed


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])))
