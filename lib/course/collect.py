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
import functools
import json
import linecache
import re
import sys
import types
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from IPython.core.inputtransformer2 import TransformerManager

from lib.course.attempt import in_a_line, is_stub, silence
from lib.course.exercises import Exercise, exercises
from lib.course.stubs import bound_names, read_names

IMPORTS = (ast.Import, ast.ImportFrom)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (*FUNCTIONS, ast.ClassDef)
ANY = "*"  # for the names that an import of everything, or exec, may bind
NAMESPACES = {"globals", "locals", "vars"}
SHOWS = {"check", "print", "display"}
RUNS_ITS_CELL = {"time", "capture", "prun"}  # as a magic of a whole cell


def answers(path: Path) -> dict[str, Callable]:
    """By exercise, what the notebook at `path` defines under its name, stubs too.

    Raises ValueError for what is no notebook.
    """
    try:
        notebook = Notebook(sources(path.read_bytes()), path.name)
    except Exception as error:  # whatever is wrong with a file
        words = f"expected a notebook, got {in_a_line(error)}"
        raise ValueError(f"{path.name}: {words}") from None
    ours = sys.modules["__main__"]
    try:
        found = {
            name: written(exercise, notebook.define(name))
            for name, exercise in exercises().items()
        }
    finally:
        sys.modules["__main__"] = ours
    return {name: answer for name, answer in found.items() if answer is not None}


def written(
    exercise: Exercise,
    candidates: Iterable[Callable],
    inputs: dict | None = None,
    guard: Callable = contextlib.nullcontext,
) -> Callable | None:
    """Of candidates, the best first, the first that is written; a stub where all are.

    inputs: to call them with; without, what mentions NotImplementedError is a stub.
    """
    first = None
    for answer in candidates:
        first = answer if first is None else first
        with guard():
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
        self.words = [_words(source) for source in cells]
        self.parsed: dict[int, list[_Statement]] = {}

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
    ) -> "list[_Statement]":
        """The statements that bind `wanted`, those that these need, and so on.

        check: where the last `check` stands. A cell that mentions none of these names is
        not even parsed.
        """
        failures = {} if failures is None else failures
        needed: set[_Statement] = set()
        names = {wanted, ANY, "__future__"}
        while True:
            self._parse(names, failures)
            statements = self._statements()
            above = _bound(s for s in statements if check is None or s.place < check)
            imports = [s for s in statements if isinstance(s.node, IMPORTS)]
            functions = [s for s in statements if isinstance(s.node, FUNCTIONS)]
            shows = SHOWS | _bound(s for s in imports if s.is_of_the_course)
            imported = _bound(imports)
            may_be_filled = names - imported - _bound(functions) - {wanted}
            # functions that bind what `global` says they do
            make = {s.node.name for s in functions if s.binds - {s.node.name} & names}
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
            if not more:
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

    def _statements(self) -> "list[_Statement]":
        return [s for number in sorted(self.parsed) for s in self.parsed[number]]


@dataclass(eq=False)
class _Statement:
    """At the top level of a cell. `place`: the numbers of the cell and of its own."""

    place: tuple[int, int]
    filename: str
    node: ast.stmt
    source: str

    @functools.cached_property
    def binds(self) -> set[str]:
        """The names that it binds, and those whose objects it changes. No variables of a
        loop: `for decode in (one, other)` defines nothing."""
        if isinstance(self.node, DEFINITIONS):
            by_global = (n for n in ast.walk(self.node) if isinstance(n, ast.Global))
            return {self.node.name}.union(*(n.names for n in by_global))
        bound = set(self.changes)
        with contextlib.suppress(SyntaxError):  # executing it will say so
            bound |= bound_names(self.source) - self._loop_variables
        if isinstance(self.node, ast.ImportFrom):
            is_star = self.node.names[0].name == "*"
            bound |= {ANY} if is_star else {self.node.module or ""} & {"__future__"}
        return bound

    @functools.cached_property
    def reads(self) -> set[str]:
        """The names that it needs, those of builtins too, which a cell may rebind; of
        what is executed as text, all words."""
        try:
            words = _words(self.source) if "exec" in self.calls else set()
            return words | read_names(self.source)
        except SyntaxError:
            return set()

    @functools.cached_property
    def changes(self) -> set[str]:
        """Of `t[1] = 2`, `t.x = 2`, `t.append(2)` and `setattr(t, "x", 2)`: t."""
        changed = [*self._targets, *(call.func for call in self._calls)]
        changed = [node for node in changed if not isinstance(node, ast.Name)]
        for call in self._calls:
            if _root(call.func) in ("setattr", "delattr"):
                changed += call.args[:1]
        is_any = {"exec"} & self.calls or NAMESPACES & {
            _root(node.func) for node in map(_base, changed) if isinstance(node, ast.Call)
        }
        return {_root(node) for node in changed} - {None} | ({ANY} if is_any else set())

    @functools.cached_property
    def calls(self) -> set[str]:
        """Of `fill(t)` and `tools.fill(t)`: fill, and tools."""
        return {_root(call.func) for call in self._calls} - {None}

    @functools.cached_property
    def passes(self) -> set[str]:
        """Of `fill(t, n=u)`: t and u."""
        arguments = [
            arg
            for call in self._calls
            for arg in (*call.args, *(k.value for k in call.keywords))
        ]
        return {arg.id for arg in arguments if isinstance(arg, ast.Name)}

    @functools.cached_property
    def checks(self) -> set[str]:
        """Of `check(decode)`, wherever it stands: decode."""
        return {
            node.args[0].id
            for node in self._nodes
            if isinstance(node, ast.Call)
            and getattr(node.func, "id", getattr(node.func, "attr", None)) == "check"
            and node.args
            and isinstance(node.args[0], ast.Name)
        }

    @property
    def is_of_the_course(self) -> bool:
        """Whether it imports from the course's library."""
        modules = [getattr(self.node, "module", None)]
        modules += [alias.name for alias in self.node.names]
        return any(str(module).split(".")[0] == "lib" for module in modules)

    @functools.cached_property
    def _nodes(self) -> list[ast.AST]:
        """What is executed when it is: no body of a function or class."""
        found, waiting = [], [self.node]
        while waiting:
            node = waiting.pop()
            if not isinstance(node, (*IMPORTS, *DEFINITIONS, ast.Lambda)):
                found.append(node)
                waiting += ast.iter_child_nodes(node)
        return found

    @functools.cached_property
    def _calls(self) -> list[ast.Call]:
        """Those whose value nobody uses: they are there for what they change."""
        values = [node.value for node in self._nodes if isinstance(node, ast.Expr)]
        return [value for value in values if isinstance(value, ast.Call)]

    @property
    def _loop_variables(self) -> set[str]:
        loops = [node.target for node in self._nodes if isinstance(node, ast.For)]
        return {
            name.id
            for target in loops
            for name in ast.walk(target)
            if isinstance(name, ast.Name)
        }

    @functools.cached_property
    def _targets(self) -> list[ast.expr]:
        """Of assignments, also of those in place and of `del`."""
        lists = [getattr(node, "targets", []) for node in self._nodes]
        kinds = (ast.AugAssign, ast.AnnAssign)
        single = [node.target for node in self._nodes if isinstance(node, kinds)]
        return [*(target for targets in lists for target in targets), *single]


def _base(node: ast.expr) -> ast.expr:
    """Of `t[1].x`: t."""
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node


def _root(node: ast.expr) -> str | None:
    """The name that `_base` has, if it is one."""
    return getattr(_base(node), "id", None)


def _bound(statements: Iterable[_Statement]) -> set[str]:
    return set().union(*(statement.binds for statement in statements))


@contextlib.contextmanager
def _noted(failures: dict[str, str], names: Collection[str]) -> Iterator[None]:
    """What is raised inside ends here, and is noted under these names."""
    try:
        yield
    except (Exception, SystemExit) as error:
        words = f"its cell fails: {in_a_line(error)}"
        failures.update(dict.fromkeys(names, words))


def _words(source: str) -> set[str]:
    """The names in a cell, and ANY where it may bind what it does not name."""
    words = set(re.findall(r"\w+", unicodedata.normalize("NFKC", source)))
    is_star = "import" in words and "*" in source
    is_any = is_star or words & {"exec", *NAMESPACES}
    return words | {ANY} if is_any else words


def _statements(
    source: str, number: int, filename: str, failures: dict[str, str]
) -> list[_Statement]:
    found = []
    with _noted(failures, re.findall(r"^(?:async )?def (\w+)", source, re.MULTILINE)):
        source, tree = _parse(source, filename)
        lines = source.split("\n")
        register(filename, source)
        for index, node in enumerate(tree.body):
            decorators = getattr(node, "decorator_list", [])
            if decorators:  # alone in their lines
                own = "\n".join(lines[decorators[0].lineno - 1 : node.end_lineno])
            else:
                own = ast.get_source_segment(source, node)
            found.append(_Statement((number, index), filename, node, own))
    return found


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
