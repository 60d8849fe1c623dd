"""What a release has in the place of answers that it withholds: what they give.

The same for what would give one away: functions of the cases that compute an answer
again, to name what may be wrong.

release.py writes expected.bin, plain data as of grading/wire.py. Where there is no such
file the library is whole, and nothing is withheld.
"""

import functools
import hashlib
import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch

from lib.course.grading import wire

PATH = Path(__file__).with_name("expected.bin")


def is_withheld(name: str) -> bool:
    """Whether the library has a stub in the place of this answer."""
    return name in _shipped()["withheld"]


def withheld_names() -> list[str]:
    """The answers in whose place the library has stubs."""
    return list(_shipped()["withheld"])


def not_shipped(name: str) -> str | None:
    """Why a withheld answer cannot be tried, in words, or None."""
    chapter = _shipped()["withheld"][name]
    if name in _shipped()["tried"]:
        return None
    return (
        f"is of chapter {chapter}, which this release ends before: nothing to try it on"
    )


def tried(name: str) -> list[tuple[dict, dict]]:
    """Inputs and outputs of a withheld answer, of each case of the notebook."""
    return _shipped()["tried"].get(name, [])


def reference(function: Callable) -> Callable:
    """Marks a function of the cases that gives an answer away: it computes the answer
    again, to say what would come of a slip.

    A release has a stub in its place, where it withholds the answer. What explaining the
    cases of the notebook asks for is looked up; for all else the stub raises.
    """

    @functools.wraps(function)
    def look_up(*args, **kwargs):
        known = _shipped()["references"]
        key = call_key(function, args, kwargs) if known else ""
        return known[key] if key in known else function(*args, **kwargs)

    look_up.is_reference = True
    return look_up


def call_key(function: Callable, args: tuple, kwargs: dict) -> str:
    """What tells a call from all others; the arguments are plain data."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    name = f"{function.__module__}.{function.__name__}"
    return hashlib.sha256(wire.encode([name, bound.arguments])).hexdigest()


def draws_the_same() -> bool:
    """Whether random numbers here are those of the machine that made the release."""
    return np.allclose(_shipped()["draws"], draws())


def draws() -> np.ndarray:
    """Random numbers as sampling and dropout draw them: torch has others on other kinds
    of CPU, from the same seed."""
    generator, numbers = torch.Generator().manual_seed(0), torch.empty(16).double()
    drawn = numbers.exponential_(generator=generator).tolist()
    return np.array(drawn + numbers.bernoulli_(0.5, generator=generator).tolist())


@cache
def _shipped() -> dict:
    """The chapter of each stub ("withheld"), inputs and outputs of each case ("tried"),
    both by name, what references give, by call_key ("references"), and the random numbers
    of the machine that computed all that ("draws").
    """
    if not PATH.exists():
        return {"withheld": {}, "tried": {}, "references": {}, "draws": draws()}
    return wire.decode(PATH.read_bytes())
