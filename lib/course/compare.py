"""Expected against got, both plain data; and the words for where they differ."""

import contextlib
import math
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import numpy as np

from lib.course.attempt import NOT_WRITTEN
from lib.course.exercises import Case, Exercise, exercises
from lib.course.shipped import is_withheld

# Largest difference, beside 1 + |expected|, that rounding explains.
TOLERANCES = {"float64": 1e-9, "float32": 2e-5, "float16": 2e-3}
OTHER_DTYPE = re.compile(r"expected (float|int|bool)\d*, got")


def verdict(
    exercise: Exercise, case: Case, expected: dict | None, got: dict
) -> str | None:
    """What is wrong with an answer to one case, in a line, or None.

    expected: the library's outputs, None where nobody knows them. got: what `attempt`
    gave. All is plain data.
    """
    if not got:
        return NOT_WRITTEN
    if waits_for(exercise, got):
        return None
    if is_withheld(got.get("needs", "")):
        return got["error"]
    wrong = _wrong(exercise, case, expected, got)
    return wrong and f"wrong for {case.name}{_in_brackets(case.inputs)}: {wrong}"


def _wrong(
    exercise: Exercise, case: Case, expected: dict | None, got: dict
) -> str | None:
    if "error" in got:
        return got["error"]
    if difference(case.inputs, got["inputs"]):
        return "it changed its inputs"
    if expected is None:
        return None
    if got["outputs"].get("says") and expected.get("raised") == "nothing":
        return str(got["outputs"]["says"])
    limits = {key: case.limits[key] for key in case.limits if key in expected}
    outputs = {key: expected[key] for key in expected if key not in (*limits, "says")}
    wrong = difference(outputs, got["outputs"]) or over_limit(limits, got["outputs"])
    if not wrong:
        return None
    why = None
    with contextlib.suppress(Exception):  # an output so odd that no words fit it
        if not OTHER_DTYPE.search(wrong):  # that says it all
            why = exercise.explain(case.inputs, expected, got["outputs"])
    return f"{wrong}. {why}" if why else wrong


def waits_for(exercise: Exercise, got: dict) -> str | None:
    """The withheld answer, further down in the chapters, without which a case cannot be
    tried yet, or None."""
    names, needed = list(exercises()), got.get("needs", "")
    if is_withheld(needed) and names.index(needed) > names.index(exercise.name):
        return needed
    return None


def crash(exercise: Exercise, case: Case, how: str) -> str:
    """The words for an answer that took its process with it."""
    words = f"wrong for {case.name}: {how}"
    if not exercise.is_kernel:
        return words
    at_fault = "It reads or writes where nothing is: look at its masks and addresses"
    why = exercise.explain_crash(case.inputs) if "crashed" in how else None
    return f"{words}. {why or at_fault}"


def _in_brackets(inputs: dict) -> str:
    """A case's inputs where they are short enough to be read in a line."""
    words = ", ".join(f"{key}={show(value)}" for key, value in inputs.items())
    return f" ({words})" if len(words) <= 120 else ""


def difference(expected: Any, got: Any, where: str = "") -> str | None:
    """What is wrong with `got`, in a few words, or None. Types and shapes must agree."""
    if isinstance(expected, dict):
        if not isinstance(got, dict):
            return _words(where, show(expected), show(got))
        for key in expected:
            if key not in got:
                return f"expected {key}, got none"
            found = difference(expected[key], got[key], f"{where} {key}".strip())
            if found:
                return found
        return None
    if isinstance(expected, np.ndarray):
        return _array_difference(expected, got, where)
    if isinstance(expected, list):
        if not isinstance(got, list) or len(got) != len(expected):
            return _words(where, show(expected), show(got))
        for i, (one, other) in enumerate(zip(expected, got)):
            found = difference(one, other, f"{where}[{i}]")
            if found:
                return found
        return None
    if isinstance(expected, float) and isinstance(got, (int, float)):
        if math.isclose(expected, got, rel_tol=1e-6, abs_tol=1e-9):  # single precision
            return None
        return _words(where, *_shown(expected, got))
    if type(got) is not type(expected) or got != expected:
        return _words(where, *_shown(expected, got))
    return None


def is_same(one: Any, other: Any) -> bool:
    """Whether two are the same: to `difference` more keys in `got` are none."""
    return not difference(one, other) and not difference(other, one)


def _array_difference(expected: np.ndarray, got: Any, where: str) -> str | None:
    if not isinstance(got, np.ndarray):
        return _words(where, f"a tensor of shape {expected.shape}", show(got))
    if got.shape != expected.shape:
        return _words(where, f"shape {expected.shape}", f"shape {got.shape}")
    if got.dtype != expected.dtype:
        return _words(where, f"{expected.dtype}", f"{got.dtype}")
    if expected.dtype.kind != "f":
        wrong = got != expected
    else:
        tolerance = TOLERANCES[str(expected.dtype)]
        with np.errstate(invalid="ignore"):  # infinity minus infinity
            is_near = np.abs(got - expected) <= tolerance * (1 + np.abs(expected))
        is_same = (got == expected) | (np.isnan(got) & np.isnan(expected))
        wrong = ~(is_same | (is_near & np.isfinite(expected)))
    if not wrong.any():
        return None
    index = tuple(int(i) for i in np.argwhere(wrong)[0])
    at = f" at {list(index)}" if index else ""
    return _words(where + at, *_shown(expected[index].item(), got[index].item()))


def over_limit(limits: dict[str, float], got: dict) -> str | None:
    """Which limit `got` exceeds, in words, or None."""
    for key, limit in limits.items():
        if got[key] > limit:
            return (
                f"{key.replace('_', ' ')}: expected at most {limit:,}, got {got[key]:,}"
            )
    return None


def show(value: Any) -> str:
    """A value in at most 80 characters."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, float):
        return f"{value:.6g}"
    return textwrap.shorten(_beginning(value), 80, placeholder=" ...")


def _beginning(value: Any) -> str:
    """Of its repr 1000 characters or a little more, without what comes behind: that may
    be larger than memory."""
    words, num_characters = [], 0
    for piece in _pieces(value):
        words.append(piece)
        num_characters += len(piece)
        if num_characters > 1000:
            break
    return "".join(words)


def _pieces(value: Any) -> Iterator[str]:
    """The repr of plain data, from the left to the right."""
    if isinstance(value, str):
        yield repr(value[:1000] if type(value) is str else value)
    elif isinstance(value, np.generic):
        yield repr(value.item())
    elif isinstance(value, (list, np.ndarray)):
        for index, item in enumerate(value):
            yield ", " if index else "["
            yield from _pieces(item)
        yield "]" if len(value) else "[]"
    elif isinstance(value, dict):
        for index, (key, item) in enumerate(value.items()):
            yield f"{', ' if index else '{'}{key[:1000]!r}: "
            yield from _pieces(item)
        yield "}" if value else "{}"
    else:
        yield repr(value)


def _shown(expected: Any, got: Any) -> tuple[str, str]:
    """Both, with as many digits as it takes to tell them apart."""
    one, other = show(expected), show(got)
    if one == other and isinstance(got, str):
        return _beginning(expected), _beginning(got)
    return (one, other) if one != other else (repr(expected), repr(got))


def _words(where: str, expected: str, got: str) -> str:
    prefix = f"{where.strip()}: " if where.strip() else ""
    return f"{prefix}expected {expected}, got {got}"
