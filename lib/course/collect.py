"""The reader's answers, from a notebook: what it defines, and nothing that it runs."""

import ast
import contextlib
import functools
import json
import linecache
import re
import types
import unicodedata
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from IPython.core.inputtransformer2 import TransformerManager

from lib.course.attempt import in_a_line
from lib.course.exercises import exercises
from lib.course.stubs import bound_names, free_names

IMPORTS = (ast.Import, ast.ImportFrom)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
# No loops: they are what a page runs.
OTHERS = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.If, ast.Try, ast.Expr)


def answers(path: Path) -> dict[str, Callable]:
    """By exercise, what the notebook at `path` defines under its name, stubs too.

    Raises ValueError for what is no notebook.
    """
    try:
        cells = sources(path.read_bytes())
    except Exception as error:  # whatever is wrong with a file
        words = f"expected a notebook, got {in_a_line(error)}"
        raise ValueError(f"{path.name}: {words}") from None
    return define(cells, path.name, exercises())


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


def define(
    cells: list[str],
    name: str,
    wanted: Collection[str],
    guard: Callable = contextlib.nullcontext,
    failures: dict[str, str] | None = None,
) -> dict[str, Callable]:
    """Of `wanted`, what these cells define.

    Executed is what that needs, in the order of the cells: imports, functions, classes,
    and what binds or changes a name that one of these needs. All else is left out, and so
    is what fails or does not parse. Of several definitions the last counts. name: of the
    notebook, for tracebacks. guard: a context in which each statement is executed.
    failures: gets, by name, what was wrong with a definition that failed.
    """
    failures = {} if failures is None else failures
    statements = _needed(cells, name, wanted, failures)
    module, found = types.ModuleType(name), {}
    for statement in statements:
        with _noted(failures, statement.binds), guard():
            code = compile(ast.Module([statement.node], []), statement.filename, "exec")
            exec(code, vars(module))
            if not isinstance(statement.node, IMPORTS):  # of the library's own
                for bound in statement.binds & set(wanted):
                    value = vars(module)[bound]
                    # `free = 3`, further down, is no other answer to `free`
                    if callable(value) or bound not in found:
                        found[bound] = value
    return found


@dataclass(eq=False)
class _Statement:
    """At the top level of a cell."""

    filename: str
    node: ast.stmt
    source: str

    @functools.cached_property
    def binds(self) -> set[str]:
        """The names that it binds, and those whose objects it changes."""
        if isinstance(self.node, FUNCTIONS):  # of most we need to know no more
            return {self.node.name}
        if isinstance(self.node, ast.Expr):
            return self.changes
        is_star = isinstance(self.node, ast.ImportFrom) and self.node.names[0].name == "*"
        return bound_names(self.source) | self.changes | ({"*"} if is_star else set())

    @functools.cached_property
    def changes(self) -> set[str]:
        """Of `t[1] = 2`, `t.x = 2` and `t.append(2)`: t."""
        changed: set[str] = set()
        if isinstance(self.node, (*IMPORTS, *FUNCTIONS)):
            return changed
        is_block = isinstance(self.node, (ast.If, ast.Try))
        for node in ast.walk(self.node) if is_block else [self.node]:
            is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
            targets = [node.value.func] if is_call else getattr(node, "targets", [])
            for target in targets:
                while isinstance(target, (ast.Attribute, ast.Subscript)):
                    target = target.value
                    if isinstance(target, ast.Name):
                        changed.add(target.id)
        return changed


@contextlib.contextmanager
def _noted(failures: dict[str, str], names: Collection[str]) -> Iterator[None]:
    """What is raised inside ends here, and is noted under these names."""
    try:
        yield
    except (Exception, SystemExit) as error:
        words = f"its cell fails: {in_a_line(error)}"
        failures.update(dict.fromkeys(names, words))


def _needed(
    cells: list[str], name: str, wanted: Collection[str], failures: dict[str, str]
) -> list[_Statement]:
    """The statements that bind one of `wanted`, those that these need, and so on.

    A cell that mentions none of these names is not even parsed.
    """
    words, parsed = [_words(source) for source in cells], {}
    needed: set[_Statement] = set()
    names = {*wanted, "*"}  # an import of everything may bind anything
    while True:
        for number, source in enumerate(cells):
            if number not in parsed and words[number] & names:
                filename = f"<{name}, cell {number}>"
                parsed[number] = _statements(source, filename, failures)
        statements = [s for number in sorted(parsed) for s in parsed[number]]
        imports = [s.binds for s in statements if isinstance(s.node, IMPORTS)]
        imported = set().union(*imports)
        more = [
            s
            for s in statements
            if s not in needed
            and s.binds & names
            # torch.manual_seed(0), plt.show(): what a page does, not what it defines
            and not (s.changes and s.binds & names <= imported)
        ]
        if not more:
            return [s for s in statements if s in needed]
        needed.update(more)
        names = names.union(*(free_names(s.source) | s.binds for s in more))


def _words(source: str) -> set[str]:
    """The names in a cell, and "*" where it may import everything."""
    words = set(re.findall(r"\w+", unicodedata.normalize("NFKC", source)))
    return words | {"*"} if "import" in words and "*" in source else words


def _statements(source: str, filename: str, failures: dict[str, str]) -> list[_Statement]:
    found = []
    with _noted(failures, re.findall(r"^def (\w+)", source, re.MULTILINE)):
        source, tree = _parse(source, filename)
        lines = source.split("\n")
        register(filename, source)
        for node in tree.body:
            if isinstance(node, (*IMPORTS, *FUNCTIONS, *OTHERS)):
                decorators = getattr(node, "decorator_list", [])
                first = min([node.lineno, *(d.lineno for d in decorators)])
                own = "\n".join(lines[first - 1 : node.end_lineno])
                found.append(_Statement(filename, node, own))
    return found


def _parse(source: str, filename: str) -> tuple[str, ast.Module]:
    """A cell as Python; what IPython adds to it, magics and commands, as calls."""
    try:
        return source, ast.parse(source, filename)
    except SyntaxError:
        if source.lstrip().startswith("%%"):  # of the whole cell: only this line
            source = source.replace("%%", "# ", 1)
        source = TransformerManager().transform_cell(source)
        return source, ast.parse(source, filename)


def register(filename: str, source: str) -> str:
    """Let tracebacks, and Triton, find source that no file holds; gives the filename."""
    lines = [line + "\n" for line in source.split("\n")]
    linecache.cache[filename] = len(source), None, lines, filename
    return filename
