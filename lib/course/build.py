"""Make the notebooks from the chapter texts.

    python -m lib.course.build            # every chapter, or those that are named
    python -m lib.course.build --check    # exits 1 where a notebook is stale
    python -m lib.course.build --repo https://github.com/OWNER/NAME    # see colab.py

A chapter is one text file, solutions/NN_name.py, in jupytext's percent format. From it
come two notebooks:

    notebooks/NN_name.ipynb    what students open: no outputs
    solutions/NN_name.ipynb    run from the first cell to the last, outputs kept

An exercise is an import of its answer, marked: `# %% exercise="decode"`, or, if it is a
method, an assignment, `allocate = BlockManager.allocate`. It becomes a stub in the first
notebook and the library's source in the second. A second mark, `given="1"`, keeps parts
of the body in the stub: see lib/course/stubs.py. A cell that draws says in words what is
to be seen, for those who cannot see it: `# %% alt="A line that rises."`.

The same text gives the same notebook, to the byte but for what running it measured.
"""

import argparse
import ast
import base64
import hashlib
import io
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import (
    CellExecutionError,
    CellTimeoutError,
    DeadKernelError,
)
from PIL import Image
from tqdm import tqdm

from lib.course import ROOT
from lib.course.colab import Address
from lib.course.exercises import exercises
from lib.course.stubs import answer, bound_names, free_names, stub
from lib.text import print_any_letter

MAX_BYTES = 500_000  # of an executed notebook: it is read online


class BuildError(Exception):
    """A chapter that cannot be built, or a notebook that is out of date."""


def chapter_texts(root: Path = ROOT) -> list[Path]:
    """Every chapter text, in order. BuildError when there is none to build or check."""
    paths = sorted((root / "solutions").glob("[0-9][0-9]_*.py"))
    if not paths:
        raise BuildError(
            f"expected chapter texts NN_name.py in {root / 'solutions'}, found none"
        )
    return paths


def notebook_paths(text: Path) -> tuple[Path, Path]:
    """Where the student's and the executed notebook of a chapter text belong."""
    student = text.parents[1] / "notebooks" / f"{text.stem}.ipynb"
    return student, text.with_suffix(".ipynb")


def read(path: Path) -> nbformat.NotebookNode:
    """The notebook at `path`. BuildError where there is none, or what is no notebook."""
    if not path.exists():
        raise BuildError(f"expected {path}, found nothing: run `make notebooks`")
    try:
        return nbformat.read(path, as_version=4)
    except Exception as error:  # whatever is wrong with a file
        raise BuildError(
            f"{path}: expected a notebook, got {type(error).__name__}: move it away, "
            "then run `make notebooks`"
        ) from None


def student_notebook(text: Path, address: Address | None = None) -> nbformat.NotebookNode:
    """The chapter as students get it: a stub for each exercise, no outputs. With an
    address it begins with the cells that fetch the course from there."""
    return _notebook(text, is_solved=False, address=address)


def solved_notebook(text: Path) -> nbformat.NotebookNode:
    """The same, with the library's source for each exercise."""
    return _notebook(text, is_solved=True)


def _notebook(
    text: Path, is_solved: bool, address: Address | None = None
) -> nbformat.NotebookNode:
    notebook = jupytext.reads(text.read_text(encoding="utf-8"), fmt="py:percent")
    notebook.metadata = {
        "kernelspec": {
            "display_name": "Python 3",
            "language": "python",
            "name": "python3",
        },
        "language_info": {"name": "python"},
    }
    if address:
        notebook.metadata["course"] = asdict(address)
        links, code = address.first_cells(f"notebooks/{text.stem}.ipynb")
        first = nbformat.v4.new_markdown_cell(links), nbformat.v4.new_code_cell(code)
        notebook.cells = [*first, *notebook.cells]
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    seen, bound = {}, set()
    for cell in notebook.cells:
        # From the text of the cell, so that a new cell leaves the others' ids alone.
        digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[
            :10
        ]
        seen[digest] = seen.get(digest, 0) + 1
        cell.id = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
        exercise, given = cell.metadata.get("exercise"), cell.metadata.get("given", "")
        alt = cell.metadata.get("alt")
        cell.metadata = {"alt": alt} if alt else {}
        if exercise:
            _expand(cell, exercise, given.split(), bound, is_solved)
        elif check := re.fullmatch(r"check\((\w+)\)", cell.source):
            points = exercises()[check[1]].points
            cell.metadata = _nbgrader(f"check-{check[1]}", points=points)
        if cell.cell_type == "code":
            bound |= bound_names(cell.source)
    nbformat.validate(notebook)
    return notebook


def _expand(cell, exercise: str, given: list[str], bound: set[str], is_solved: bool):
    """Put a stub, or the library's source, in the place of the marked import."""
    module, names = _marked_names(cell, exercise)
    source = answer(module, names)
    missing = free_names(source) - bound
    if missing:
        raise BuildError(f"{exercise}: no cell before it defines {sorted(missing)}")
    cell.source = source if is_solved else stub(module, names, given)
    compile(cell.source, exercise, "exec")
    cell.metadata = _nbgrader(exercise, is_solution=True)


def _marked_names(cell, exercise: str) -> tuple[str, list[str]]:
    """The module of a marked import, and what is imported."""
    (node,) = ast.parse(cell.source).body
    if isinstance(node, ast.ImportFrom):
        return node.module, [alias.name for alias in node.names]
    # a method: allocate = BlockManager.allocate
    module, class_name, name = exercises()[exercise].target.rsplit(".", 2)
    return module, [f"{class_name}.{name}"]


@dataclass(frozen=True)
class Marked:
    """An exercise of a chapter text: what its cell names, and what its stub keeps."""

    exercise: str
    module: str
    names: list[str]
    given: list[str]


def marked_exercises(text: Path) -> list[Marked]:
    """The exercises of a chapter, in order."""
    found = []
    for cell in jupytext.reads(text.read_text(encoding="utf-8"), fmt="py:percent").cells:
        if exercise := cell.metadata.get("exercise"):
            given = cell.metadata.get("given", "").split()
            found.append(Marked(exercise, *_marked_names(cell, exercise), given))
    return found


def _nbgrader(
    grade_id: str, points: int | None = None, is_solution: bool = False
) -> dict:
    """Cell metadata of nbgrader's schema 3: an answer, or the check that grades it."""
    data = {
        "grade": points is not None,
        "grade_id": grade_id,
        "locked": not is_solution,
        "schema_version": 3,
        "solution": is_solution,
        "task": False,
    }
    return {"nbgrader": data if points is None else {**data, "points": points}}


def execute(notebook: nbformat.NotebookNode, name: str) -> nbformat.NotebookNode:
    """A copy of `notebook`, run from top to bottom.

    Raises BuildError when a cell fails or writes to stderr, or the result is too large.
    """
    notebook = nbformat.from_dict(notebook)
    metadata = notebook.metadata.copy()
    client = NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,  # of a progress bar keep what was seen last
        resources={"metadata": {"path": str(ROOT / "solutions")}},
    )
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        raise BuildError(f"{name}: a cell failed\n{error}") from None
    notebook.metadata = (
        metadata  # without the versions of the kernel that happened to run it
    )
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                raise BuildError(
                    f"{name}: expected nothing on stderr, got: {output.text}"
                )
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = _shrink_png(output.data["image/png"])
    num_bytes = len(nbformat.writes(notebook).encode())
    if num_bytes > MAX_BYTES:
        raise BuildError(f"{name}: expected at most {MAX_BYTES} bytes, got {num_bytes}")
    return notebook


def _shrink_png(encoded: str) -> str:
    """The same picture in 64 colours, a quarter of the size: enough for lines on
    white.
    """
    picture = (
        Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB").quantize(64)
    )
    file = io.BytesIO()
    picture.save(file, "png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def build(text: Path, address: Address | None = None):
    """Write both notebooks of one chapter, whole or not at all. With an address, which is
    for students alone, the executed one is left as it is where it is up to date.

    Raises BuildError, before anything else, where somebody has worked in the student's:
    has run a cell of it, or saved it with a kernel at hand.
    """
    student_path, executed_path = notebook_paths(text)
    if student_path.exists() and _is_worked_in(read(student_path)):
        raise BuildError(
            f"{student_path}: somebody worked in it; move it away, then build"
        )
    built = {student_path: student_notebook(text, address)}
    if not (address and _is_up_to_date(text)):
        built[executed_path] = execute(solved_notebook(text), text.stem)
        check_executed(built[executed_path], text)
    for path, notebook in built.items():
        partial = path.with_suffix(".partial")
        partial.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
        partial.replace(path)


def _is_worked_in(notebook: nbformat.NotebookNode) -> bool:
    """Whether a cell was run, or a front end has saved it with a kernel at hand, without
    outputs maybe: JupyterLab and VS Code note its version, Colab itself."""
    is_run = any(cell.get("execution_count") for cell in notebook.cells)
    language = notebook.metadata.get("language_info", {})
    return is_run or "version" in language or "colab" in notebook.metadata


def _is_up_to_date(text: Path) -> bool:
    """Whether the executed notebook is what the text gives."""
    try:
        _check_one(notebook_paths(text)[1], solved_notebook(text), text)
    except BuildError:
        return False
    return True


def check(text: Path):
    """Raise BuildError unless both notebooks of a chapter are what its text gives, the
    second one executed."""
    student_path, executed_path = notebook_paths(text)
    _check_one(student_path, student_notebook(text, address_in(student_path)), text)
    _check_one(executed_path, solved_notebook(text), text)


def _check_one(path: Path, wanted: nbformat.NotebookNode, text: Path):
    notebook = read(path)
    if path.parent == text.parent:
        check_executed(notebook, path)
        notebook = without_outputs(notebook)
    if notebook != wanted:
        raise BuildError(f"{path} is not what {text.name} gives: run `make notebooks`")


def address_in(path: Path) -> Address | None:
    """What the notebook at `path` was built with; None also where there is none."""
    if not path.exists():
        return None
    metadata = read(path).metadata.get("course")
    try:
        return metadata and Address(**metadata)
    except (TypeError, ValueError) as error:
        raise BuildError(f"{path}: {error}: run `make notebooks`") from None


def check_one_address(texts: list[Path]):
    """Raise BuildError unless all students' notebooks were built with the same address,
    or all without."""
    paths = [notebook_paths(text)[0] for text in texts]
    addresses = [address_in(path) for path in paths]
    for path, address in zip(paths, addresses):
        if address != addresses[0]:
            raise BuildError(
                f"expected one address in all notebooks, got {address} in {path.name} "
                f"and {addresses[0]} in {paths[0].name}: run `make notebooks`"
            )


def check_executed(notebook: nbformat.NotebookNode, path: Path):
    """Raise BuildError unless every code cell was run once, in order, none failed, and
    those with a figure, and no others, say what is to be seen.
    """
    code_cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if [cell.execution_count for cell in code_cells] != list(
        range(1, len(code_cells) + 1)
    ):
        raise BuildError(
            f"{path}: expected every cell run once, in order: run `make notebooks`"
        )
    if any(
        output.output_type == "error" for cell in code_cells for output in cell.outputs
    ):
        raise BuildError(f"{path}: expected no cell to fail: run `make notebooks`")
    for cell in code_cells:
        has_figure = any("image/png" in output.get("data", {}) for output in cell.outputs)
        if has_figure != bool(str(cell.metadata.get("alt", "")).strip()):
            raise BuildError(
                f'{path}: expected alt="..." at cells with a figure, and at no others, '
                f"but not so at this one:\n{cell.source}"
            )


def without_outputs(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    notebook = nbformat.from_dict(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.execution_count, cell.outputs = None, []
    return notebook


def _address(repo: str, tag: str) -> Address | None:
    """Of what the command line says; by default the tag is that of pyproject.toml."""
    if not repo:
        if tag:
            raise BuildError("REPO: expected an address beside the TAG, got none")
        return None
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    version = re.search(r'^version = "(.+)"$', project, re.MULTILINE)[1]
    try:
        return Address(repo, tag or f"v{version}")
    except ValueError as error:
        raise BuildError(str(error)) from None


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lib.course.build",
        description="Make the notebooks from the chapter texts.",
    )
    parser.add_argument(
        "chapters",
        nargs="*",
        type=Path,
        help="chapter texts, as solutions/01_x.py (default: all)",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="change nothing; exit 1 where a notebook is stale",
    )
    parser.add_argument(
        "--repo",
        default="",
        metavar="URL",
        help="for Colab: https://github.com/OWNER/NAME",
    )
    parser.add_argument(
        "--tag", default="", help="of that repository (default: that of this version)"
    )
    args = parser.parse_args()
    print_any_letter()  # of a cell that fails
    try:
        address = _address(args.repo, args.tag)
        texts = [path.resolve() for path in args.chapters] or chapter_texts()
        if args.check:
            for text in texts:
                check(text)
            check_one_address(texts)
            print(f"{len(texts)} chapter(s) checked: their notebooks are up to date")
            return 0
        for text in tqdm(texts, unit="chapter", file=sys.stdout, disable=None):
            start = time.perf_counter()
            build(text, address)
            print(f"{text.stem}: built in {time.perf_counter() - start:.0f} s")
    except BuildError as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
