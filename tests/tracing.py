"""A chapter run once, as an untouched notebook and as a solved one.

`traced` puts a cell behind each check of an untouched notebook. It tries the answer of
the solved one, and lets it take the library's place, as the reader's would. On the page
the stub stays: a cell that calls it fails, as it would for whoever skips the exercise.
And the answer notes that it was called, but not while an answer is tried: so we know
whether the page goes on with the reader's code.
"""

import functools
import json
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell

from lib.course.build import execute, solved_notebook, student_notebook
from lib.course.exercises import exercises

# Names nothing on the page, where it might stand in for an import that is missing.
HERE = f"__import__('sys').path.append({str(Path(__file__).parent)!r})"
TRACING = "__import__('tracing')"


def run(text: Path, first: str = "pass") -> tuple[dict[str, bool], str]:
    """Of each exercise whether the page, further down, calls the reader's answer; and
    all that was printed.

    first: is executed before anything else. Raises BuildError where a cell fails or
    writes to stderr.
    """
    cells = execute(traced(text, first), text.stem).cells
    outputs = [o for cell in cells for o in cell.get("outputs", []) if "text" in o]
    printed = "".join(output.text for output in outputs)
    return json.loads(outputs[-1].text), printed


def traced(text: Path, first: str) -> nbformat.NotebookNode:
    """The untouched notebook of a chapter, with the cells that trace it."""
    notebook, solved = student_notebook(text), solved_notebook(text)
    answers = {
        cell.metadata.nbgrader.grade_id: cell.source
        for cell in solved.cells
        if cell.get("metadata", {}).get("nbgrader", {}).get("solution")
    }
    cells = [new_code_cell(source) for source in (first, HERE, f"{TRACING}.begin()")]
    for cell in notebook.cells:
        cells.append(cell)
        if "nbgrader" in cell.metadata and cell.metadata.nbgrader.grade:
            name = cell.metadata.nbgrader.grade_id.removeprefix("check-")
            arguments = f"{name!r}, {answers[name]!r}, globals()"
            cells.append(new_code_cell(f"{TRACING}.solve({arguments})"))
    cells.append(new_code_cell(f"{TRACING}.report()"))
    notebook.cells = cells
    return notebook


# What follows is called by those cells, in the kernel.

_is_called: dict[str, bool] = {}  # by exercise
_is_trying = False  # an answer
_answers: dict[str, object] = {}  # what the cells of answers have bound


def begin():
    """Let nothing be measured more often, or at larger sizes, than it takes to run."""
    from lib.course.check import Check
    from lib.measure import meter, table

    table.SIZES.update(table.SMALL_SIZES)
    medians_in_turns = meter.medians_in_turns
    meter.medians_in_turns = lambda functions, repeats=1: medians_in_turns(functions, 1)
    try_ = Check._try

    def _try(check, name, answer):
        global _is_trying
        _is_trying = True
        try:
            return try_(check, name, answer)
        finally:
            _is_trying = False

    Check._try = _try


def solve(name: str, source: str, page: dict):
    """Try an answer, and let it take the library's place. The page's stub stays."""
    from lib.course.check import check
    from lib.course.collect import register

    assert not check.results[name].passed, f"{name}: a stub has passed"
    namespace = {**page, **_answers}
    filename = register(f"<answer to {name}>", source)
    exec(compile(source, filename, "exec"), namespace)
    bound = {k: v for k, v in namespace.items() if k not in page or page[k] is not v}
    _answers.update(bound)
    result = check(namespace[name])
    needs_triton = result.message.startswith("needs Triton")
    assert result.message == "passed" or needs_triton, result
    if result.passed:
        _is_called[name] = False
        owner = exercises()[name].owner
        assert vars(owner)[name] is namespace[name], f"{name}: not in its place"
        wrapper = _Kernel if exercises()[name].is_kernel else _function
        setattr(owner, name, wrapper(name, namespace[name]))


def report():
    print()
    print(json.dumps(_is_called))


def _note(name: str):
    if not _is_trying:
        _is_called[name] = True


def _function(name: str, answer):
    @functools.wraps(answer)
    def noting(*args, **kwargs):
        _note(name)
        return answer(*args, **kwargs)

    return noting


class _Kernel:
    """Called by another kernel, or launched on a grid."""

    def __init__(self, name: str, kernel):
        self._name, self._kernel = name, kernel

    def __getattr__(self, attribute: str):
        return getattr(self._kernel, attribute)

    def __call__(self, *args, **kwargs):
        _note(self._name)
        return self._kernel(*args, **kwargs)

    def __getitem__(self, grid):
        _note(self._name)
        return self._kernel[grid]
