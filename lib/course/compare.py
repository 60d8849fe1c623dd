"""Expected against got, both plain data; and the words for where they differ."""

import math
import textwrap
from typing import Any

import numpy as np

# Largest difference, beside 1 + |expected|, that rounding explains.
TOLERANCES = {"float64": 1e-9, "float32": 2e-5, "float16": 2e-3}


OTHER_DTYPE = "New tensors are made with the dtype of those that came in"


def difference(expected: Any, got: Any, where: str = "") -> str | None:
    """What is wrong with `got`, in a few words, or None. Types and shapes must agree."""
    if isinstance(expected, dict):
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
        return _words(where, show(expected), show(got))
    if type(got) is not type(expected) or got != expected:
        return _words(where, show(expected), show(got))
    return None


def _array_difference(expected: np.ndarray, got: Any, where: str) -> str | None:
    if not isinstance(got, np.ndarray):
        return _words(where, f"a tensor of shape {expected.shape}", show(got))
    if got.shape != expected.shape:
        return _words(where, f"shape {expected.shape}", f"shape {got.shape}")
    if got.dtype != expected.dtype:
        words = _words(where, f"{expected.dtype}", f"{got.dtype}")
        return f"{words}. {OTHER_DTYPE}"
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
    return _words(where + at, show(expected[index].item()), show(got[index].item()))


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
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, float):
        return f"{value:.6g}"
    return textwrap.shorten(repr(value), 80, placeholder=" ...")


def _words(where: str, expected: str, got: str) -> str:
    prefix = f"{where.strip()}: " if where.strip() else ""
    return f"{prefix}expected {expected}, got {got}"
