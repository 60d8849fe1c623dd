"""From the library's source to what a notebook shows: a stub to fill in, or the answer.

Both are cut from the same lines of the library, so neither can drift from it.
"""

import ast
import builtins
import importlib
import inspect
import re
import symtable
import textwrap
from pathlib import Path


def answer(module: str, names: list[str]) -> str:
    """The library's source of `names`, one after the other, as a cell shows it.

    A name may be a method, "BlockManager.allocate": it comes as a function.
    """
    return "\n\n\n".join(textwrap.dedent(_source(module, name)) for name in names)


def stub(module: str, names: list[str], given: list[str]) -> str:
    """The same, with what the reader is to write left out.

    Signature, docstring and decorators stay. `given` names what else stays: a function or
    method, or a paragraph of a body, called by the first word of its leading comment, or
    by its number.
    """
    return "\n\n\n".join(_blank(answer(module, [name]), given) for name in names)


def withheld(text: str, names: list[str], given: list[str], words: str) -> str:
    """The text of a module in which `names` are the stubs that `stub` gives.

    words: what the NotImplementedError of each says. It is raised where the first line is
    missing: a given paragraph below may need what is not there.
    """
    for name in names:
        first, last = _lines(text, name)
        lines = text.split("\n")
        source = "\n".join(lines[first:last])
        indent = source[: len(source) - len(source.lstrip())]
        blank = textwrap.indent(_blank(textwrap.dedent(source), given), indent)
        raising = f'raise NotImplementedError("{words}")'
        for line in (r"\.\.\.(?=  # about \d)", "raise NotImplementedError$"):
            blank = re.sub(f"(?m)^( *){line}", rf"\g<1>{raising}", blank)
        lines[first:last] = blank.split("\n")
        text = "\n".join(lines)
    return text


def free_names(source: str) -> set[str]:
    """The names that a cell with this source needs from cells before it."""
    return read_names(source) - set(dir(builtins))


def read_names(source: str) -> set[str]:
    """The same, and the builtins that it uses."""
    table = symtable.symtable(source, "cell", "exec")
    free = {s.get_name() for s in table.get_symbols() if not s.is_assigned()}
    scopes = list(table.get_children())
    while scopes:
        scope = scopes.pop()
        free |= {s.get_name() for s in scope.get_symbols() if s.is_global()}
        scopes += scope.get_children()
    return free - bound_names(source)


def bound_names(source: str) -> set[str]:
    """The names that a cell with this source defines, imports or assigns."""
    symbols = symtable.symtable(source, "cell", "exec").get_symbols()
    return {s.get_name() for s in symbols if s.is_assigned() or s.is_imported()}


def _source(module: str, name: str) -> str:
    """From the file, not the live object, which a reader's answer may have replaced."""
    path = Path(inspect.getsourcefile(importlib.import_module(module)))
    text = path.read_text(encoding="utf-8")
    try:
        first, last = _lines(text, name)
    except LookupError:
        raise LookupError(f"expected {name} in {path.name}, found none") from None
    return "\n".join(text.split("\n")[first:last])


def _lines(text: str, name: str) -> tuple[int, int]:
    """Where in a module's text `name` is defined: its first line, and behind its last."""
    body = ast.parse(text).body
    for part in name.split("."):
        found = [node for node in body if getattr(node, "name", None) == part]
        if not found:
            raise LookupError(f"expected {name}, found none")
        body = found[0].body
    first = min([found[0].lineno, *(d.lineno for d in found[0].decorator_list)])
    return first - 1, found[0].end_lineno


def _blank(source: str, given: list[str]) -> str:
    """A function, or each method of a class, with its body left out."""
    lines = source.split("\n")
    (node,) = ast.parse(source).body
    functions = [node] if isinstance(node, ast.FunctionDef) else node.body
    functions = [f for f in functions if isinstance(f, ast.FunctionDef)]
    for function in reversed(functions):
        if function.name not in given:
            if ast.get_docstring(function) is not None:
                start = function.body[0].end_lineno
            else:
                start = function.body[0].lineno - 1
                while lines[start - 1].strip().startswith("#"):  # a comment before it
                    start -= 1
            body = lines[start : function.end_lineno]
            lines[start : function.end_lineno] = _blank_body(body, given)
    return "\n".join(lines)


def _blank_body(body: list[str], given: list[str]) -> list[str]:
    first = next(line for line in body if line.strip())
    indent = " " * (len(first) - len(first.lstrip()))
    paragraphs = textwrap.dedent("\n".join(body)).strip("\n").split("\n\n")
    out, is_any_kept = [], False
    end, depth = 0, ""  # of what is left out
    for number, paragraph in enumerate(paragraphs, start=1):
        lines = paragraph.split("\n")
        words = lines[0].split()
        step = words[1].strip(":,.") if words[0] == "#" else None
        if step in given or str(number) in given:
            is_any_kept = True
            out += [*lines, ""]
        else:
            comment = lines[:1] if step else []
            depth = " " * (len(lines[0]) - len(lines[0].lstrip()))
            out += [*comment, f"{depth}...  # about {_count_lines(lines)}", ""]
            end = len(out)
    if not is_any_kept:
        out, end, depth = [f"# about {_count_lines(body)}"], 1, ""
    out.insert(end, f"{depth}raise NotImplementedError")
    if out[end + 1 :]:
        out = [*out[: end + 1], "", *out[end + 1 : -1]]
    return [indent + line if line else "" for line in out]


def _count_lines(lines: list[str]) -> str:
    code = [line for line in lines if line.strip() and not line.strip().startswith("#")]
    return "1 line" if len(code) == 1 else f"{len(code)} lines"
