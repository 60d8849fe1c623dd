"""One call of an answer, and what came of it, as plain data.

This runs beside the reader's code, in a notebook or in a grader's worker, and knows no
expected value. compare.py says what to think of it.
"""

import contextlib
import copy
import dis
import inspect
import os
import pkgutil
import re
import sys
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from lib.course.exercises import Exercise
from lib.course.shipped import is_withheld

NOT_WRITTEN = "not written yet (it raises NotImplementedError)"
RECURSION_LIMIT = 1500  # of calls: not the notebook's, which no grader knows


def attempt(exercise: Exercise, answer: Callable, inputs: dict) -> dict:
    """Call `answer` with the `inputs` of a case, which it may change.

    The result holds "outputs" and "inputs" where it came to its end, "error" where it
    raised, and is empty where it is not written yet. Where another answer has to be there
    first, "needs" names it. What it prints goes nowhere.
    """
    try:
        with silence(), known_state(), forbid(exercise.forbidden):
            outputs = exercise.driver()(answer, **inputs)
    except (Exception, SystemExit) as error:
        if type(error).__name__ == "InterpreterError":  # Triton's, around the kernel's
            error = error.__cause__ or error
        if _has_stubs_line(answer, is_bare=True):
            return {}  # the lines that are missing may be what it stumbled over
        if not isinstance(error, NotImplementedError) or not _is_of_a_stub(error):
            return {"error": words_of(error, exercise, answer)}
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        return {} if raised_in == _file_of(answer) else _needs(error)
    if "says" in outputs and _has_stubs_line(answer, is_bare=True):
        return {}
    return {"outputs": outputs, "inputs": inputs}


def not_ready(exercise: Exercise, answer: Callable) -> str | None:
    """Why there is no point in calling `answer`, in words, or None."""
    if exercise.is_kernel and _has_stubs_line(answer):  # no GPU can raise it
        return NOT_WRITTEN
    if exercise.is_kernel and not hasattr(answer, "arg_names"):
        return "expected a kernel, under @triton.jit, got a plain function"
    if exercise.is_kernel and not _has_source(answer):
        return "expected its source in a cell or a file, found none"
    return None


def not_compiled(exercise: Exercise, answer: Callable) -> str | None:
    """What the compilers say against a kernel, in words, or None."""
    error = exercise.is_kernel and exercise.compile_error(kernel_of(answer))
    return f"right, but not for a GPU: {error}" if error else None


def is_stub(exercise: Exercise, answer: Callable, inputs: dict | None) -> bool:
    """Whether `answer` does not come past its `raise NotImplementedError` with `inputs`.

    It is called only where it has that line, and not at all where it is a kernel, or
    there are no inputs.
    """
    if not _has_stubs_line(answer) or inputs is None or exercise.is_kernel:
        return _has_stubs_line(answer)
    return not attempt(exercise, answer, copy.deepcopy(inputs))


def _has_stubs_line(answer: Callable, is_bare: bool = False) -> bool:
    """Whether a `raise NotImplementedError`, or one without words, can be reached: the
    compiler leaves out what stands behind a return."""
    code = code_of(answer)
    steps = list(dis.get_instructions(code)) if code else []
    return any(
        step.argval == "NotImplementedError"
        and not (is_bare and after.opname != "RAISE_VARARGS")
        for step, after in zip(steps, steps[1:])
    )


def kernel_of(answer: Callable) -> Callable:
    """What @triton.jit made of a function, without @triton.autotune and its like."""
    while hasattr(getattr(answer, "fn", None), "arg_names"):
        answer = answer.fn
    return answer


def function_of(answer: Callable) -> Callable:
    """Of a kernel the function under @triton.jit, whatever else decorates it; of a
    partial, of what is bound or wrapped, the function inside."""
    for _ in range(20):  # an odd object may have one inside for ever
        inside = ("fn", "func", "__func__", "__wrapped__")
        found = [getattr(answer, name) for name in inside if hasattr(answer, name)]
        if not found or isinstance(answer, type):
            break
        answer = found[0]
    return answer


def code_of(answer: Callable) -> types.CodeType | None:
    """What runs when it is called: of a class, what makes an object; of an object, its
    __call__. None where that is not Python."""
    with contextlib.suppress(Exception):  # of an object that is asked for an attribute
        function = function_of(answer)
        if isinstance(function, type):
            parts = [function.__new__, function.__init__]
        else:
            parts = [function, type(function).__call__]
        codes = [getattr(part, "__code__", None) for part in parts]
        return next((code for code in codes if code is not None), None)


def _file_of(answer: Callable) -> str | None:
    return getattr(code_of(answer), "co_filename", None)


@contextlib.contextmanager
def known_state() -> Iterator[None]:
    """While inside, torch, numpy and warnings are set as in a new process, whatever the
    page has set; afterwards as they were."""
    with contextlib.ExitStack() as stack:
        for get, put, value in (
            (torch.get_default_dtype, torch.set_default_dtype, torch.float32),
            (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode, 0),
            (
                torch.get_float32_matmul_precision,
                torch.set_float32_matmul_precision,
                "highest",
            ),
            (sys.getrecursionlimit, sys.setrecursionlimit, RECURSION_LIMIT),
        ):
            stack.callback(put, get())
            put(value)
        stack.enter_context(np.errstate(all="ignore"))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if torch.is_autocast_enabled("cpu"):
            stack.enter_context(torch.autocast("cpu", enabled=False))
        if not _is_made_on_the_cpu():
            stack.enter_context(torch.device("cpu"))
        yield


def _is_made_on_the_cpu() -> bool:
    """A tensor of which nobody says where."""
    try:
        return torch.empty(0).device.type == "cpu"
    except Exception:  # a GPU that is not there
        return False


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """While inside, what is printed goes nowhere."""
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


class ForbiddenCallError(Exception):
    """An answer called what its exercise asks it to do itself."""


@contextlib.contextmanager
def forbid(names: tuple[str, ...]) -> Iterator[None]:
    """While inside, calling one of these functions raises ForbiddenCallError, by whatever
    name the caller knows it."""
    compiled = {}
    with contextlib.ExitStack() as stack:
        for name in names:
            owner_name, attribute = name.rsplit(".", 1)
            owner = pkgutil.resolve_name(owner_name)
            function = getattr(owner, attribute)
            if isinstance(function, types.FunctionType):
                for part in _layers(function):
                    code = _refusing_code(name, part.__code__)
                    stack.enter_context(_replaced(part, "__code__", code))
            else:  # compiled: torch asks the mode before it calls
                compiled[attribute] = name
                stack.enter_context(_replaced(owner, attribute, _refusal(name)))
        if compiled:
            stack.enter_context(_RefusingMode(compiled))
        yield


class _RefusingMode(TorchFunctionMode):
    """Refuses torch's compiled functions, and what they call one by one:
    `scaled_dot_product_attention`, `aten._scaled_dot_product_flash_attention.default`."""

    def __init__(self, names: dict[str, str]):
        super().__init__()
        self.names = names  # attribute -> with its module

    def __torch_function__(self, func, types, args=(), kwargs=None):
        called = getattr(func, "__name__", "").partition(".")[0].lstrip("_")
        for attribute, name in self.names.items():
            stem = attribute.rsplit("_", 1)[0]  # scaled_dot_product
            if called == attribute or called.startswith(f"{stem}_"):
                _refusal(name)()
        return func(*args, **(kwargs or {}))


def _refusal(name: str) -> Callable:
    def refuse(*args, **kwargs):
        raise ForbiddenCallError(f"{name} is not allowed here: write it yourself")

    return refuse


def _refusing_code(name: str, original: types.CodeType) -> types.CodeType:
    """To stand in a function's place: its closure must have as many cells."""
    cells = "".join(f"{cell} = " for cell in original.co_freevars)
    used = ", ".join(original.co_freevars)
    source = f"""
def outer():
    {cells}None
    def refuse(*args, **kwargs):
        ({used})
        from lib.course.attempt import _refusal
        _refusal({name!r})()
    return refuse
"""
    namespace: dict = {}
    exec(source, namespace)
    return namespace["outer"]().__code__


def _layers(function: Callable) -> Iterator[Callable]:
    """A function, and those that its decorators have wrapped."""
    while isinstance(function, types.FunctionType):
        yield function
        function = getattr(function, "__wrapped__", None)


@contextlib.contextmanager
def _replaced(owner: Any, attribute: str, value: Any) -> Iterator[None]:
    original = getattr(owner, attribute)
    setattr(owner, attribute, value)
    try:
        yield
    finally:
        setattr(owner, attribute, original)


def in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {_text_of(error)}".split("\n")[0][:300]


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # of a kind of the answer's own
        return "it cannot be shown"


def _needs(error: NotImplementedError) -> dict:
    """What to say of a stub that was called: a notebook's, or the library's, which says
    whose it is."""
    caller = traceback.extract_tb(error.__traceback__)[-1].name
    says = re.match(r"(\w+) is yours to write", _text_of(error))
    name = says[1] if says else caller
    if not says and not is_withheld(name):
        return {"error": "it calls what is not written yet: use the library's"}
    return {"error": f"needs {name}, which is yours to write: that first", "needs": name}


def _is_of_a_stub(error: NotImplementedError) -> bool:
    """Not torch's, which says it of what it cannot do: softmax of integers, say."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    is_torch = f"{os.sep}torch{os.sep}" in last.filename
    return not is_torch and (not last.line or "raise" in last.line)


def words_of(error: BaseException, exercise: Exercise, answer: Callable) -> str:
    """What was raised, and the exercise's advice on it."""
    advice = [text for part, text in exercise.errors.items() if part in _text_of(error)]
    return ". ".join([_raised(error, answer), *advice])


def _raised(error: BaseException, answer: Callable) -> str:
    """The error in one line, with the answer's own line where it happened."""
    text = f"raised {in_a_line(error)}"
    if isinstance(error, ForbiddenCallError):
        return str(error)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename == _file_of(answer) and frame.line:
            return f"{text}, in `{frame.line}`"
    return text


def _has_source(answer: Callable) -> bool:
    """Without it Triton interprets what nobody wrote, and compiles nothing."""
    try:
        return bool(inspect.getsource(function_of(answer)))
    except (OSError, TypeError):
        return False
