"""What a statement of a notebook binds, changes, needs and calls, from its source."""

import ast
import contextlib
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from lib.course.stubs import bound_names, read_names

IMPORTS = (ast.Import, ast.ImportFrom)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (*FUNCTIONS, ast.ClassDef)
ANY = "*"  # for the names that an import of everything, or exec, may bind
NAMESPACES = {"globals", "locals", "vars"}


@dataclass(eq=False)
class Statement:
    """At the top level of a cell. `place`: the numbers of the cell and of its own."""

    place: tuple[int, int]
    filename: str
    node: ast.stmt
    source: str

    @cached_property
    def binds(self) -> set[str]:
        """The names that it binds, and those whose objects it changes. No variables of a
        loop: `for decode in (one, other)` defines nothing."""
        if isinstance(self.node, DEFINITIONS):  # of most we need to know no more
            return {self.node.name}
        bound = set(self.changes)
        with contextlib.suppress(SyntaxError, RecursionError):  # compiling it says so
            bound |= bound_names(self.source) - _loop_variables(self._nodes)
        if isinstance(self.node, ast.ImportFrom):
            is_star = self.node.names[0].name == "*"
            bound |= {ANY} if is_star else {self.node.module or ""} & {"__future__"}
        return bound

    @cached_property
    def changes(self) -> set[str]:
        """Of `t[1] = 2`, `t.x = 2`, `t.append(2)` and `setattr(t, "x", 2)`: t."""
        return _changed(self._nodes)

    @cached_property
    def makes(self) -> set[str]:
        """Of a function, the names outside it that it binds or changes."""
        if not isinstance(self.node, FUNCTIONS):
            return set()
        nodes = list(ast.walk(self.node))
        named = (node.names for node in nodes if isinstance(node, ast.Global))
        return (_changed(nodes) & self.reads).union(*named)

    @cached_property
    def reads(self) -> set[str]:
        """The names that it needs, builtins among them, which a cell may rebind; of what
        is executed as text, all words."""
        words = words_of(self.source) if "exec" in self.calls else set()
        with contextlib.suppress(SyntaxError, RecursionError):
            return words | read_names(self.source)
        return words

    @cached_property
    def calls(self) -> set[str]:
        """Of `fill(t)`, `tools.fill(t)` and `@fill`: fill, and tools."""
        decorators = getattr(self.node, "decorator_list", [])
        called = [call.func for call in _calls(self._nodes)]
        called += [getattr(node, "func", node) for node in decorators]
        return {_root(node) for node in called} - {None}

    @cached_property
    def passes(self) -> set[str]:
        """Of `fill(t, n=u)`: t and u."""
        arguments = [
            argument
            for call in _calls(self._nodes)
            for argument in (*call.args, *(keyword.value for keyword in call.keywords))
        ]
        return {node.id for node in arguments if isinstance(node, ast.Name)}

    @cached_property
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

    @cached_property
    def _nodes(self) -> list[ast.AST]:
        """What is executed when it is: no body of a function or class."""
        found, waiting = [], [self.node]
        while waiting:
            node = waiting.pop()
            if not isinstance(node, (*IMPORTS, *DEFINITIONS, ast.Lambda)):
                found.append(node)
                waiting += ast.iter_child_nodes(node)
        return found


def words_of(source: str) -> set[str]:
    """The names in a source, and ANY where it may bind what it does not name."""
    words = set(re.findall(r"\w+", unicodedata.normalize("NFKC", source)))
    is_star = "import" in words and "*" in source
    is_any = is_star or words & {"exec", *NAMESPACES}
    return words | {ANY} if is_any else words


def _changed(nodes: Iterable[ast.AST]) -> set[str]:
    """The names whose objects these change; ANY for `exec(...)` and `globals()[...]`."""
    calls = _calls(nodes)
    changed = [*_targets(nodes), *(call.func for call in calls)]
    changed = [node for node in changed if not isinstance(node, ast.Name)]
    for call in calls:
        if _root(call.func) in ("setattr", "delattr"):
            changed += call.args[:1]
    owners = [node.func for node in map(_base, changed) if isinstance(node, ast.Call)]
    is_any = any(_root(call.func) == "exec" for call in calls)
    is_any = is_any or any(_root(owner) in NAMESPACES for owner in owners)
    return {_root(node) for node in changed} - {None} | ({ANY} if is_any else set())


def _calls(nodes: Iterable[ast.AST]) -> list[ast.Call]:
    """Those whose value nobody uses: they are there for what they change."""
    values = [node.value for node in nodes if isinstance(node, ast.Expr)]
    return [value for value in values if isinstance(value, ast.Call)]


def _targets(nodes: Iterable[ast.AST]) -> list[ast.expr]:
    """Of assignments, also of those in place, and of `del`."""
    lists = [getattr(node, "targets", []) for node in nodes]
    kinds = (ast.AugAssign, ast.AnnAssign)
    single = [node.target for node in nodes if isinstance(node, kinds)]
    return [*(target for targets in lists for target in targets), *single]


def _loop_variables(nodes: Iterable[ast.AST]) -> set[str]:
    loops = [node.target for node in nodes if isinstance(node, ast.For)]
    within = [name for target in loops for name in ast.walk(target)]
    return {name.id for name in within if isinstance(name, ast.Name)}


def _base(node: ast.AST) -> ast.AST:
    """Of `t[1].x`: t."""
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node


def _root(node: ast.AST) -> str | None:
    """The name that `_base` has, if it is one."""
    return getattr(_base(node), "id", None)
