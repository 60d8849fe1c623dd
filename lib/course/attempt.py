"""One call of an answer, and what came of it, as plain data.

This runs beside the reader's code, in a notebook or in a grader's worker, and knows no
expected value. compare.py says what to think of it.
"""

import ast
import contextlib
import importlib
import inspect
import os
import re
import textwrap
import traceback
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch.overrides import TorchFunctionMode

from lib.course.exercises import Exercise, exercises, library_answer

NOT_WRITTEN = "not written yet (it raises NotImplementedError)"


def attempt(exercise: Exercise, answer: Callable, inputs: dict) -> dict:
    """Call `answer` with the `inputs` of a case, which it may change.

    The result holds "outputs" and "inputs" where it came to its end, "error" where it
    raised, and is empty where it is not written yet. Where another answer has to be there
    first, "needs" names it. What it prints goes nowhere.
    """
    try:
        with silence(), forbid(exercise.forbidden):
            outputs = exercise.driver()(answer, **inputs)
    except NotImplementedError as error:
        if not _is_of_a_stub(error):
            return {"error": _words(error, exercise, answer)}
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        if raised_in == _file_of(answer):
            return {}
        return _needs(error)
    except (Exception, SystemExit) as error:
        return {"error": _words(error, exercise, answer)}
    return {"outputs": outputs, "inputs": inputs}


def not_ready(exercise: Exercise, answer: Callable) -> str | None:
    """Why there is no point in calling `answer`, in words, or None."""
    if is_stub(answer):
        return NOT_WRITTEN
    if exercise.is_kernel and not hasattr(answer, "arg_names"):
        return "expected a kernel, under @triton.jit, got a plain function"
    if exercise.is_kernel and not _has_source(answer):
        return "expected its source in a cell or a file, found none"
    return None


def not_compiled(exercise: Exercise, answer: Callable) -> str | None:
    """What the compilers say against a kernel, in words, or None."""
    error = exercise.is_kernel and exercise.compile_error(answer)
    return f"right, but not for a GPU: {error}" if error else None


def is_stub(answer: Callable) -> bool:
    """Whether the source of `answer` still raises NotImplementedError."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function_of(answer))))
    except (OSError, TypeError, SyntaxError):
        return False
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and "NotImplementedError" in ast.unparse(node):
            return True
    return False


def function_of(answer: Callable) -> Callable:
    """Of a kernel, the function under @triton.jit."""
    return inspect.unwrap(getattr(answer, "fn", answer))


def _file_of(answer: Callable) -> str | None:
    """Where its code stands: a partial, or an object with __call__, has what it calls."""
    function = getattr(answer, "func", answer)
    if not hasattr(function_of(function), "__code__"):
        function = type(function).__call__ if callable(function) else None
    return getattr(getattr(function_of(function), "__code__", None), "co_filename", None)


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
            module_name, attribute = name.rsplit(".", 1)
            module = importlib.import_module(module_name)
            function = getattr(module, attribute)
            if isinstance(function, types.FunctionType):
                for part in _layers(function):
                    code = _refusing_code(name, part.__code__)
                    stack.enter_context(_replaced(part, "__code__", code))
            else:  # compiled: torch asks the mode before it calls
                compiled[attribute] = name
                stack.enter_context(_replaced(module, attribute, _refusal(name)))
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
    return f"{type(error).__name__}: {error}".split("\n")[0][:300]


def _needs(error: NotImplementedError) -> dict:
    """What to say of a stub that was called: a notebook's, or the library's, which says
    whose it is."""
    caller = traceback.extract_tb(error.__traceback__)[-1].name
    says = re.match(r"(\w+) is yours to write", str(error))
    name = says[1] if says else caller
    if not says and not (name in exercises() and is_stub(library_answer(name))):
        return {"error": "it calls what is not written yet: use the library's"}
    return {"error": f"needs {name}, which is yours to write: that first", "needs": name}


def _is_of_a_stub(error: NotImplementedError) -> bool:
    """Not torch's, which says it of what it cannot do: softmax of integers, say."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    is_torch = f"{os.sep}torch{os.sep}" in last.filename
    return not is_torch and (not last.line or "raise" in last.line)


def _words(error: BaseException, exercise: Exercise, answer: Callable) -> str:
    """What was raised, and the exercise's advice on it."""
    advice = [text for part, text in exercise.errors.items() if part in str(error)]
    return ". ".join([_raised(error, answer), *advice])


def _raised(error: BaseException, answer: Callable) -> str:
    """The error in one line, with the answer's own line where it happened."""
    if type(error).__name__ == "InterpreterError":  # Triton's, around the kernel's own
        error = error.__cause__ or error
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
