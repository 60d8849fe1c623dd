"""The reader's answers, from a notebook: what it defines, and nothing that it runs."""

import ast
import contextlib
import linecache
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat

from lib.course.exercises import exercises
from lib.course.stubs import bound_names, free_names

DEFINITIONS = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)


def answers(path: Path) -> dict[str, Callable]:
    """By exercise, what the notebook at `path` defines under its name, stubs too.

    Raises ValueError for what is no notebook.
    """
    try:
        cells = nbformat.read(path, as_version=4).cells
    except Exception as error:  # whatever nbformat finds wrong with a file
        raise ValueError(f"{path.name}: expected a notebook, got {error}") from None
    return define([c.source for c in cells if c.cell_type == "code"], path.name)


def define(cells: list[str], name: str) -> dict[str, Callable]:
    """By exercise, what these cells define under its name.

    Imports, functions and classes are executed, and assignments that one of these needs;
    all else is left out, and so is what fails or does not parse. Of several definitions
    the last counts. name: of the notebook, for tracebacks.
    """
    statements = list(_statements(cells, name))
    needed = set(exercises())  # decode = my_decode is an answer too
    for _, source, node in statements:
        if isinstance(node, DEFINITIONS):
            needed |= free_names(source)
    module, found = types.ModuleType(name), {}
    for filename, source, node in statements:
        is_needed = isinstance(node, (ast.Assign, ast.AnnAssign)) and (
            bound_names(source) & needed
        )
        if not isinstance(node, DEFINITIONS) and not is_needed:
            continue
        with contextlib.suppress(Exception, SystemExit):
            exec(compile(ast.Module([node], []), filename, "exec"), vars(module))
            for bound in bound_names(source) & exercises().keys():
                if not isinstance(node, (ast.Import, ast.ImportFrom)):
                    found[bound] = vars(module)[bound]
    return found


def _statements(cells: list[str], name: str) -> Iterator[tuple[str, str, ast.stmt]]:
    """Top-level statements, each with its file's name and its own source."""
    for number, source in enumerate(cells):
        # A magic, or a command for the shell, is no Python: a comment of as many lines.
        lines = [
            "#" + s if s.lstrip()[:1] in ("%", "!") else s for s in source.split("\n")
        ]
        with contextlib.suppress(SyntaxError, ValueError, RecursionError):
            filename = register(f"<{name}, cell {number}>", "\n".join(lines))
            for node in ast.parse("\n".join(lines)).body:
                decorators = getattr(node, "decorator_list", [])
                first = min([node.lineno, *(d.lineno for d in decorators)])
                yield filename, "\n".join(lines[first - 1 : node.end_lineno]), node


def register(filename: str, source: str) -> str:
    """Let tracebacks, and Triton, find source that no file holds; gives the filename."""
    lines = [line + "\n" for line in source.split("\n")]
    linecache.cache[filename] = len(source), None, lines, filename
    return filename
