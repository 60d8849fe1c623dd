"""The reader's answers, from a notebook: what it defines, and little of what it runs.

An answer is what a run from top to bottom has under its name when the last `check(name)`
of the notebook comes. Nobody waits for such a run. Executed are the statements that the
answer needs, in their order, as a kernel would:

- those that bind a name that it needs: imports, functions, assignments, loops, blocks;
- those that change what such a name stands for: `t[1] = 2`, `t.append(2)`, `fill(t)`;
- of what stands below its `check` only what binds a name that nothing above it binds.

What torch and other modules are told (`torch.manual_seed(0)`), and what the course's own
functions show or measure, is left out, and so is what fails or does not parse.
"""

import ast
import codeop
import contextlib
import json
import linecache
import re
import sys
import types
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from IPython.core.inputtransformer2 import TransformerManager

from lib.course.attempt import in_a_line, is_stub, silence
from lib.course.exercises import Exercise, exercises
from lib.course.statements import ANY, FUNCTIONS, IMPORTS, Statement, words_of

SHOWS = {"check", "print", "display"}
RUNS_ITS_CELL = {"time", "capture", "prun"}  # as a magic of a whole cell


def answers(path: Path) -> Iterator[tuple[str, Callable]]:
    """Exercises, and what the notebook at `path` defines under their names, stubs too.
    While one is looked at the notebook is the module __main__.

    Raises ValueError for what is no notebook.
    """
    try:
        notebook = Notebook(sources(path.read_bytes()), path.name)
    except Exception as error:  # whatever is wrong with a file
        words = f"expected a notebook, got {in_a_line(error)}"
        raise ValueError(f"{path.name}: {words}") from None
    ours = sys.modules["__main__"]
    try:
        for name, exercise in exercises().items():
            answer = written(exercise, notebook.define(name))
            if answer is not None:
                yield name, answer
    finally:
        sys.modules["__main__"] = ours


def written(
    exercise: Exercise,
    candidates: Iterable[Callable],
    inputs: dict | None = None,
    guard: Callable = contextlib.nullcontext,
) -> Callable | None:
    """Of candidates, the best first, the first that is written; a stub where all are.

    inputs: to call them with. Without, what has the line of a stub is one.
    """
    first = None
    for answer in candidates:
        first = answer if first is None else first
        with _noted({}, ()), guard():
            if not is_stub(exercise, answer, inputs):
                return answer
    return first


def sources(content: bytes, kinds: tuple[str, ...] = ("code",)) -> list[str]:
    """What stands in a notebook's cells. Of the format only that is asked for.

    Raises whatever there is to raise for what is no notebook.
    """
    tree = json.loads(content)
    sheets = tree.get("worksheets") if isinstance(tree, dict) else None
    cells = []
    for sheet in sheets or [tree]:  # several, as it was before 2015
        if not isinstance(sheet, dict) or not isinstance(sheet.get("cells"), list):
            raise ValueError("found no cells in it")
        cells += sheet["cells"]
    found = []
    for cell in cells:
        if isinstance(cell, dict) and cell.get("cell_type") in kinds:
            source = cell.get("source", cell.get("input", ""))
            found.append(source if isinstance(source, str) else "".join(source))
    return found


class _NoKernel:
    """In the place of IPython's functions: asked or called, it does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args, **kwargs) -> Any:
        return self

    def __iter__(self) -> Iterator:
        return iter(())


# What a kernel has in every notebook, beside builtins.
IN_EVERY_NOTEBOOK = dict.fromkeys(("display", "get_ipython"), _NoKernel())
IN_EVERY_NOTEBOOK |= {"In": [""], "Out": {}, "_": "", "__": "", "___": ""}


class Notebook:
    """The code cells of a notebook, of which those are parsed that are asked for.

    name: for tracebacks.
    """

    def __init__(self, cells: list[str], name: str):
        self.cells, self.name = cells, name
        self.words = [words_of(source) for source in cells]
        self.parsed: dict[int, list[Statement]] = {}

    def define(
        self,
        wanted: str,
        guard: Callable = contextlib.nullcontext,
        failures: dict[str, str] | None = None,
    ) -> Iterator[Callable]:
        """What it defines under this name, the best first: of what stands above its
        `check` the last; then, where none of these is asked for, of all.

        Becomes the module __main__. guard: a context in which each statement is executed.
        failures: gets, by name, what was wrong with a definition that failed.
        """
        failures = {} if failures is None else failures
        check = self._check_of(wanted, failures)
        yield from self._run(wanted, check, guard, failures)
        if check is not None:
            below = [s for s in self._statements() if s.place > check]
            if any(wanted in s.binds for s in below):
                yield from self._run(wanted, None, guard, failures)

    def _run(
        self,
        wanted: str,
        check: tuple[int, int] | None,
        guard: Callable,
        failures: dict[str, str],
    ) -> list[Callable]:
        module = sys.modules["__main__"] = types.ModuleType("__main__")
        namespace = vars(module)
        namespace.update(IN_EVERY_NOTEBOOK)
        compiler = codeop.Compile()  # it remembers `from __future__`, as a kernel does
        found, last = [], None
        for statement in self.needed(wanted, check, failures):
            with _noted(failures, statement.binds), guard(), silence():
                tree = ast.Module([statement.node], [])
                exec(compiler(tree, statement.filename, "exec"), namespace)
            value = namespace.get(wanted)
            if value is not last:
                last = value
                # `free = 3` is no answer to `free`; nor is an import, of the library's
                if callable(value) and not isinstance(statement.node, IMPORTS):
                    found.append(value)
        return found[::-1]

    def needed(
        self,
        wanted: str,
        check: tuple[int, int] | None = None,
        failures: dict[str, str] | None = None,
    ) -> list[Statement]:
        """The statements that bind `wanted`, those that these need, and so on.

        check: where the last `check` stands. A cell that mentions none of these names is
        not even parsed.
        """
        failures = {} if failures is None else failures
        needed: set[Statement] = set()
        names, make = {wanted, ANY, "__future__"}, set[str]()
        while True:
            made = make
            self._parse(names | make, failures)
            statements = self._statements()
            above = _bound(s for s in statements if check is None or s.place < check)
            imports = [s for s in statements if isinstance(s.node, IMPORTS)]
            functions = [s for s in statements if isinstance(s.node, FUNCTIONS)]
            shows = SHOWS | _bound(s for s in imports if s.is_of_the_course)
            imported = _bound(imports)
            may_be_filled = names - imported - _bound(functions) - {wanted}
            make = {s.node.name for s in functions if s.makes & names - imported}
            more = []
            for s in statements:
                touched = s.binds & names
                if not s.calls & shows:
                    touched |= s.passes & may_be_filled | s.calls & make
                if check is not None and s.place > check:
                    touched -= above | {ANY}
                # torch.manual_seed(0), plt.show(): what a page does, not what it defines
                is_told = s.changes and touched <= imported
                if touched and not is_told and s not in needed:
                    more.append(s)
            if not more and make <= made:
                return [s for s in statements if s in needed]
            needed.update(more)
            names = names.union(*(s.reads | s.binds for s in more))

    def _check_of(self, wanted: str, failures: dict[str, str]) -> tuple[int, int] | None:
        self._parse({wanted}, failures)
        places = [s.place for s in self._statements() if wanted in s.checks]
        return max(places, default=None)

    def _parse(self, names: set[str], failures: dict[str, str]):
        for number, source in enumerate(self.cells):
            if number not in self.parsed and self.words[number] & names:
                filename = f"<{self.name}, cell {number}>"
                self.parsed[number] = _statements(source, number, filename, failures)

    def _statements(self) -> list[Statement]:
        return [s for number in sorted(self.parsed) for s in self.parsed[number]]


def _bound(statements: Iterable[Statement]) -> set[str]:
    return set().union(*(statement.binds for statement in statements))


@contextlib.contextmanager
def _noted(failures: dict[str, str], names: Collection[str]) -> Iterator[None]:
    """What is raised inside ends here, and is noted under these names."""
    try:
        yield
    except KeyboardInterrupt:  # the reader's
        raise
    except BaseException as error:
        words = f"its cell fails: {in_a_line(error)}"
        failures.update(dict.fromkeys(names, words))


def _statements(
    source: str, number: int, filename: str, failures: dict[str, str]
) -> list[Statement]:
    found = []
    with _noted(failures, re.findall(r"^(?:async )?def (\w+)", source, re.MULTILINE)):
        source, tree = _parse(source, filename)
        lines = source.split("\n")
        register(filename, source)
        for index, node in enumerate(tree.body):
            own = _segment(lines, node)
            found.append(Statement((number, index), filename, node, own))
    return found


def _segment(lines: list[str], node: ast.stmt) -> str:
    """A statement's own source: it may share its lines with others."""
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(d.lineno for d in decorators)])
    own = lines[first - 1 : node.end_lineno]
    if not decorators:  # columns are of UTF-8
        own[-1] = own[-1].encode()[: node.end_col_offset].decode()
        own[0] = own[0].encode()[node.col_offset :].decode()
    return "\n".join(own)


def _parse(source: str, filename: str) -> tuple[str, ast.Module]:
    """A cell as Python; what IPython adds to it, magics and commands, as calls."""
    source = source.replace("\r\n", "\n").replace("\r", "\n")
    try:
        return source, ast.parse(source, filename)
    except SyntaxError:
        magic = re.match(r"\s*%%(\w+)", source)
        if magic and magic[1] not in RUNS_ITS_CELL:
            return "", ast.parse("")
        if magic:
            source = source.replace("%%", "# ", 1)
        timed = r"^(\s*(?:\w+ *= *)?)%time +"
        source = re.sub(timed, r"\1", source, flags=re.MULTILINE)
        source = TransformerManager().transform_cell(source)
        return source, ast.parse(source, filename)


def register(filename: str, source: str) -> str:
    """Let tracebacks, and Triton, find source that no file holds; gives the filename."""
    lines = [line + "\n" for line in source.split("\n")]
    linecache.cache[filename] = len(source), None, lines, filename
    return filename
