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
from collections.abc import Callable, Iterator

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
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        if raised_in == function_of(answer).__code__.co_filename:
            return {}
        return _needs(error)
    except (Exception, SystemExit) as error:
        advice = [text for part, text in exercise.errors.items() if part in str(error)]
        return {"error": ". ".join([_raised(error, answer), *advice])}
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
    """While inside, calling one of these functions raises ForbiddenCallError."""
    kept = []
    for name in names:
        module_name, attribute = name.rsplit(".", 1)
        module = importlib.import_module(module_name)
        kept.append((module, attribute, getattr(module, attribute)))

        def refuse(*args, _name=name, **kwargs):
            raise ForbiddenCallError(f"{_name} is not allowed here: write it yourself")

        setattr(module, attribute, refuse)
    try:
        yield
    finally:
        for module, attribute, original in kept:
            setattr(module, attribute, original)


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


def _raised(error: BaseException, answer: Callable) -> str:
    """The error in one line, with the answer's own line where it happened."""
    if type(error).__name__ == "InterpreterError":  # Triton's, around the kernel's own
        error = error.__cause__ or error
    text = f"raised {in_a_line(error)}"
    if isinstance(error, ForbiddenCallError):
        return str(error)
    filename = function_of(answer).__code__.co_filename
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename == filename and frame.line:
            return f"{text}, in `{frame.line}`"
    return text


def _has_source(answer: Callable) -> bool:
    """Without it Triton interprets what nobody wrote, and compiles nothing."""
    try:
        return bool(inspect.getsource(function_of(answer)))
    except (OSError, TypeError):
        return False
