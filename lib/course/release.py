"""The course for a class that must not see the answers of a chapter yet.

    python -m lib.course.release 3    # chapters 1 to 3, in release_03.zip

The answers of the chapters before it are there. Those of this one, and of all that come
later, are the stubs that the notebooks show, in the library too, and so is what computes
them again in the cases. What these give on the cases of the notebook comes along as plain
data, so that `check` works, and says why: see shipped.py.

The same course gives the same zip on the same machine.
"""

import argparse
import contextlib
import functools
import importlib
import inspect
import re
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import numpy as np

from lib.course import interpreted  # noqa: F401  first: kernels are tried here
from lib.course.build import (
    ROOT,
    BuildError,
    Marked,
    chapter_texts,
    marked_exercises,
    student_notebook,
)
from lib.course.check import SEED, expected_outputs
from lib.course.exercises import exercises
from lib.course.grading import wire
from lib.course.shipped import PATH, call_key, draws
from lib.course.stubs import withheld
from lib.interpreter import HAS_TRITON

# Patterns of what is handed out as it is, and what only those need who make the course.
FILES = (
    *("LICENSE", "pyproject.toml", "requirements.txt"),
    *("lib/**/*.py", "lib/figures/*.mplstyle", "lib/course/grading/pages/*.html"),
    *("data/README.md", "data/moby_dick.pt", "data/moby_dick.txt"),
    *("data/recall/*.pt", "data/results/*.*"),
)
NOT_FOR_STUDENTS = [
    f"lib/course/{name}"
    for name in ("build.py", "colab.py", "release.py", "slides.py", "site/*")
]
TARGETS = ("lab", "mine", "help")  # of the Makefile, that work without the answers

README = """# Where the Memory Goes, through chapter {chapter}

How language models generate text, and where the memory goes: a course in notebooks, in
which you write the library.

## Start

{start}

`make mine` tries what you have written in all notebooks, each answer in a process of its
own, and ends with "Error 1" until all pass.

## Without make

{without_make}

What you have written is tried by `python -m lib.course.grading --mine notebooks`, in that
environment.

## Chapters

{chapters}

## What is not here yet

The answers of chapter {chapter}{later}. In lib/ they are stubs, as in the notebook:

{names}

When `check` says that yours passed, it fills the library's gap for the rest of
the page, until the kernel restarts. What needs it before raises NotImplementedError and
says whose turn it is, and cells behind it may miss what it was to make. Go on then:
running all cells does not end there. With
`check.collect(".")` behind the imports, what you have saved is there from the top on.

The answers of earlier chapters are in lib/: whoever did not finish one goes on all the
same.

What an AI assistant may help you with is in [AGENTS.md](AGENTS.md).

## Licence

MIT. The book is in the public domain; see [data/README.md](data/README.md).
"""


def release(chapter: int, root: Path = ROOT) -> dict[str, bytes]:
    """What is handed out while the answers of `chapter` are not, by path in the bundle.

    Raises BuildError where there is no such chapter, or where its answers cannot be tried
    on this machine.
    """
    texts = {int(text.stem[:2]): text for text in chapter_texts(root)}
    marked = {n: marked_exercises(text) for n, text in texts.items()}
    numbers = [n for n, marks in marked.items() if marks]
    if chapter not in numbers:
        raise BuildError(
            f"THROUGH: expected a chapter with exercises, {numbers[0]} to {numbers[-1]}, "
            f"got {chapter}"
        )
    stubs = {n: marked[n] for n in numbers if n >= chapter}
    # Chapters without exercises come with the one before them.
    last = max(n for n in texts if not any(chapter < m <= n for m in numbers))
    files = {}
    dropped = {path for pattern in NOT_FOR_STUDENTS for path in root.glob(pattern)}
    for path in sorted(path for pattern in FILES for path in root.glob(pattern)):
        if path not in dropped:
            files[path.relative_to(root).as_posix()] = path.read_bytes()
    for number, marks in stubs.items():
        for mark in marks:
            name = mark.module.replace(".", "/") + ".py"
            words = f"{mark.exercise} is yours to write, in chapter {number}"
            text = files[name].decode()
            files[name] = withheld(text, mark.names, mark.given, words).encode()
        cases = cases_of(number)
        name = cases.__name__.replace(".", "/") + ".py"
        words = f"it gives an answer of chapter {number} away"
        text = files[name].decode()
        files[name] = withheld(text, list(references(cases)), [], words).encode()
    for number, text in texts.items():
        if number <= last:
            notebook = student_notebook(text)
            if number >= chapter:
                _go_on_after_errors(notebook)
            written = nbformat.writes(notebook) + "\n"
            files[f"notebooks/{text.stem}.ipynb"] = written.encode()
    files[PATH.relative_to(ROOT).as_posix()] = wire.encode(_expected(chapter, stubs))
    readme = (root / "README.md").read_text(encoding="utf-8")
    files["README.md"] = _readme(readme, chapter, last, stubs).encode()
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    files["Makefile"] = _makefile(makefile).encode()
    policy = (root / "AGENTS.md").read_text(encoding="utf-8")
    elsewhere = r"\[([^]]+)\]\((?:solutions|tests|TEACHING)[^)]*\)"
    files["AGENTS.md"] = re.sub(elsewhere, r"\1", policy).encode()
    return files


def _go_on_after_errors(notebook: nbformat.NotebookNode):
    """Some cells need what is not written yet: running all must not end there."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.metadata["tags"] = ["raises-exception"]


def cases_of(chapter: int) -> types.ModuleType:
    return importlib.import_module(f"lib.course.cases.ch{chapter:02}")


def references(module: types.ModuleType) -> dict[str, Callable]:
    """Functions of a chapter's cases that give an answer away, by name."""
    return {
        name: value
        for name, value in vars(module).items()
        if getattr(value, "is_reference", False)
    }


def _expected(chapter: int, stubs: dict[int, list[Marked]]) -> dict:
    """What the answers of `chapter` give on the cases of its notebook, and what it takes
    to explain other answers: see shipped.py."""
    tried = {}
    for mark in stubs[chapter]:
        exercise = exercises()[mark.exercise]
        if exercise.is_kernel and not HAS_TRITON:
            raise BuildError(
                f"{mark.exercise}: expected Triton, to try it, found none: make the "
                "release on Linux"
            )
        tried[mark.exercise] = [
            [case.inputs, expected_outputs(exercise, case)]
            for case in exercise.cases(SEED)
        ]
    with _recording(cases_of(chapter)) as recorded:
        for name, cases in tried.items():
            for inputs, outputs in cases:
                for odd in _odd(outputs):
                    with contextlib.suppress(Exception):  # as where an answer is tried
                        exercises()[name].explain(inputs, outputs, odd)
    numbers = {mark.exercise: number for number in stubs for mark in stubs[number]}
    return {
        "withheld": numbers,
        "tried": tried,
        "references": recorded,
        "draws": draws(),
    }


@contextlib.contextmanager
def _recording(module: types.ModuleType) -> Iterator[dict]:
    """While inside, what the references of a module give is kept, by call_key."""
    recorded, originals = {}, references(module)

    def record(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args, **kwargs):
            out = function(*args, **kwargs)
            out = list(out) if inspect.isgenerator(out) else out
            recorded[call_key(function, args, kwargs)] = out
            return out

        return call

    try:
        for name, function in originals.items():
            setattr(module, name, record(function))
        yield recorded
    finally:
        for name, function in originals.items():
            setattr(module, name, function)


def _odd(outputs: dict) -> Iterator[dict]:
    """What no slip gives, so that all are looked for: with all numbers changed, and with
    those of one output alone."""
    odd = {key: _odd_number(value) for key, value in outputs.items()}
    yield odd
    for key in outputs:
        yield {**outputs, key: odd[key]}


def _odd_number(value):
    if isinstance(value, np.ndarray) and value.dtype.kind in "if":
        return (value * 1.25 + 3).astype(value.dtype)
    if isinstance(value, np.ndarray) and value.dtype.kind == "u":  # with no room above
        return value + value.dtype.type(3)
    return value + 3 if type(value) in (int, float) else value


def _readme(text: str, chapter: int, last: int, stubs: dict[int, list[Marked]]) -> str:
    """The bundle's README: how to start, and the chapters, are those of the course's."""
    sections = dict(part.split("\n\n", 1) for part in text.split("\n## ")[1:])
    start = sections["Start"].replace("\ngit and make", "\nand make")
    rows = sections["Chapters"].split("\n\n")[0].split("\n")
    names = ", ".join(f"`{mark.exercise}`" for mark in stubs[chapter])
    return README.format(
        chapter=chapter,
        start=start.strip("\n"),
        without_make=sections["Without make"].strip("\n"),
        chapters="\n".join(rows[: 2 + last]),
        later=" and of all later ones" if len(stubs) > 1 else "",
        names=names,
    )


def _makefile(text: str) -> str:
    """The Makefile with TARGETS alone, and what they need."""
    kept = "\n\n".join(_kept_rules(text))
    kept = re.sub(r"(?m)^#   make (\w+) .*\n", _if_kept, kept)
    return re.sub(r"(?m)^\.PHONY: .*", f".PHONY: {' '.join(TARGETS)}", kept)


def _kept_rules(text: str) -> Iterator[str]:
    phony = re.search(r"(?m)^\.PHONY: (.*)", text)[1].split()
    dropped = [*phony, ".venv/dev", ".venv/site"]
    for paragraph in text.split("\n\n"):
        target = re.sub(r"(?m)^#.*\n", "", paragraph).split(":")[0]
        if target in TARGETS or target not in dropped:
            yield paragraph


def _if_kept(line: re.Match) -> str:
    return line[0] if line[1] in TARGETS else ""


def write(files: dict[str, bytes], folder: str, path: Path):
    """A zip of `files`, all in one folder; whole or not at all."""
    partial = path.with_suffix(".partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in sorted(files.items()):
            info = zipfile.ZipInfo(f"{folder}/{name}")  # of 1980, whenever it is made
            info.external_attr = 0o644 << 16
            archive.writestr(info, data, zipfile.ZIP_DEFLATED)
    partial.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lib.course.release",
        description="A zip of the course without the answers of a chapter and later.",
    )
    parser.add_argument("chapter", help="the last chapter that is handed out: 3")
    parser.add_argument("--out", type=Path, help="default: release_03.zip")
    args = parser.parse_args()
    try:
        if not args.chapter.isdecimal():
            raise BuildError(f"THROUGH: expected a chapter, as 3, got {args.chapter!r}")
        chapter = int(args.chapter)
        files = release(chapter)
        out = args.out or Path(f"release_{chapter:02}.zip")
        write(files, f"where-the-memory-goes-{chapter:02}", out)
    except (BuildError, OSError) as error:
        print(error)
        return 1
    print(f"{out}: chapters 1 to {chapter}, {out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
