"""Whose notebooks are these? Files, as a learning platform hands them over.

    folder/ada.ipynb                     one notebook, of ada
    folder/ada_01_generation.ipynb       the same
    folder/ada/01_generation.ipynb       several
    folder/ada.zip                       several, packed
    class.zip                            all of these, packed

Nothing is unpacked to disk, and no notebook is read before its turn comes. What it holds
is known by what it defines, not by its name.
"""

import hashlib
import io
import re
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from lib.course import ROOT
from lib.course.attempt import in_a_line
from lib.course.collect import sources

MAX_BYTES = 20 * 2**20  # of a notebook
MAX_ZIP_BYTES = 100 * 2**20  # of a student's archive
MAX_NOTEBOOKS = 100  # of a student

Read = Callable[[], bytes]


@dataclass
class Submission:
    """The notebooks of one student. `notes`: what a teacher should know of them."""

    student: str
    files: list[tuple[str, Read]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def read(self) -> tuple[list[list[str]], list[str], str]:
        """The sources of each notebook's code cells; notes; a checksum of it all.

        What is no notebook is a note. Never raises.
        """
        notebooks, notes, digest = [], list(self.notes), hashlib.sha256()
        for name, read in self.files:
            try:
                content = read()
                digest.update(content)
                notebooks.append(sources(content))
            except Exception as error:  # whatever is wrong with a file
                notes.append(f"{name}: unreadable, is it whole? {in_a_line(error)}")
        if not self.files:
            notes.append("expected a notebook, found none")
        return notebooks, notes, digest.hexdigest()


def find(path: Path) -> tuple[list[Submission], list[str]]:
    """The submissions in a folder or a zip archive, one a student, in order of name; and
    the names of loose files that are none.

    Raises ValueError where there is no notebook.
    """
    if not path.is_dir() and path.suffix.lower() != ".zip":
        raise ValueError(f"submissions: expected a folder or a .zip, got {path}")
    found: dict[str, Submission] = {}
    handed_in: dict[str, set[str]] = {}
    ignored = []
    for name, read in _files(path):
        if read is None and "/" not in name:
            ignored.append(name)
            continue
        top = PurePosixPath(name).parts[0]
        student = _student(top)
        submission = found.setdefault(student, Submission(student))
        if read is not None:
            submission.files.append((name, read))
        handed_in.setdefault(student, set()).add(top)
    if not any(submission.files for submission in found.values()):
        raise ValueError(f"submissions: expected notebooks in {path}, found none")
    for submission in found.values():
        submission.files = _in_order(submission.files)
        tops = sorted(handed_in[submission.student])
        if len(tops) > 1:
            words = f"handed in more than once, all is read: {', '.join(tops)}"
            submission.notes.append(words)
        left_out = submission.files[MAX_NOTEBOOKS:]
        if left_out:
            words = (
                f"expected at most {MAX_NOTEBOOKS} notebooks, left out {len(left_out)}"
            )
            submission.notes.append(words)
            del submission.files[MAX_NOTEBOOKS:]
    return sorted(found.values(), key=by_name), ignored


def by_name(of_a_student) -> tuple[str, str]:
    """The order of a list of names: to sort by."""
    return of_a_student.student.casefold(), of_a_student.student


def in_one_folder(path: Path) -> Submission:
    """All notebooks in a folder, as one submission.

    Raises ValueError where there is none.
    """
    if not path.is_dir():
        raise ValueError(f"expected a folder of notebooks, got {path}")
    files = _in_order([pair for pair in _files(path) if pair[1] is not None])
    if not files:
        raise ValueError(f"expected notebooks in {path}, found none")
    return Submission("", files)


def _in_order(files: list[tuple[str, Read]]) -> list[tuple[str, Read]]:
    """The last counts: "03 (1).ipynb" after "03.ipynb". JupyterLab's copies do not."""
    own = [(name, read) for name, read in files if not re.search(r"-Copy\d+\.", name)]

    def key(pair: tuple[str, Read]) -> tuple[str, str]:
        path = PurePosixPath(pair[0])
        return path.parent.as_posix(), path.stem

    return sorted(own or files, key=key)


def _student(top: str) -> str:
    """From the name of a file or folder; the same for any way to write an accent."""
    name = re.sub(r"\.(ipynb|zip)$", "", top, flags=re.IGNORECASE)
    name = re.sub(r"_assignsubmission_\w+$", "", name)  # Moodle's
    again = r"([ _-]*(\(\d+\)|copy|final|late|v?\d+))*"  # a download, a version
    for chapter in sorted(p.stem for p in (ROOT / "notebooks").glob("[0-9]*.ipynb")):
        name = re.sub(rf"(?<=.)[ _-]+{chapter}{again}$", "", name, flags=re.IGNORECASE)
    name = unicodedata.normalize("NFC", name).strip() or top
    return name.encode("utf-8", "backslashreplace").decode()  # names from old archives


def _files(path: Path) -> Iterator[tuple[str, Read | None]]:
    """Each file by its name below `path`, with a way to read it if it is a notebook."""
    if not path.is_dir():
        yield from _zipped("", path.read_bytes)
        return
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if _is_hidden(name):
            continue
        if name.lower().endswith(".zip") and file.is_file():
            yield from _zipped(name, _reader(file, MAX_ZIP_BYTES))
        elif name.lower().endswith(".ipynb") and file.is_file():
            yield name, _reader(file, MAX_BYTES)
        else:
            yield (f"{name}/." if file.is_dir() else name), None


def _zipped(name: str, read: Read) -> Iterator[tuple[str, Read | None]]:
    """The same, in an archive called `name`, and in archives in it."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(read()))
    except Exception as error:  # a broken one counts as a broken notebook
        words = f"expected a zip archive, got {in_a_line(error)}"
        yield f"{name}/", lambda: _refuse(words)
        return
    for info in archive.infolist():
        inside = PurePosixPath(name, info.filename.lstrip("/")).as_posix()
        if _is_hidden(inside):
            continue
        if inside.lower().endswith(".zip") and inside.lower().count(".zip") <= 2:
            yield from _zipped(inside, _unpacker(archive, info, MAX_ZIP_BYTES))
        elif inside.lower().endswith(".ipynb"):
            yield inside, _unpacker(archive, info, MAX_BYTES)
        else:
            yield (f"{inside}/." if info.is_dir() else inside), None


def _is_hidden(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return any(part.startswith((".", "__MACOSX")) for part in parts)


def _reader(file: Path, limit: int) -> Read:
    def read() -> bytes:
        size = file.stat().st_size
        if size > limit:
            _refuse(f"expected at most {limit:,} bytes, got {size:,}")
        return file.read_bytes()

    return read


def _unpacker(archive: zipfile.ZipFile, info: zipfile.ZipInfo, limit: int) -> Read:
    def read() -> bytes:
        with archive.open(info) as file:
            content = file.read(limit + 1)  # a header may lie about the size
        if len(content) > limit:
            _refuse(f"expected at most {limit:,} bytes, got more")
        return content

    return read


def _refuse(words: str):
    raise ValueError(words)
