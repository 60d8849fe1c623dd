"""Files that students handed in: named first, read one at a time.

Nothing is unpacked to where it says, no link is followed, and all is bounded: a megabyte
of zip can hold gigabytes. Of an archive in an archive a temporary file is made.
"""

import contextlib
import functools
import hashlib
import io
import os
import re
import shutil
import stat
import tempfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

# Figures and widgets make notebooks large: GitHub takes files up to this size.
MAX_NOTEBOOK_BYTES = 100 * 2**20
MAX_TEXT_BYTES = 4 * 2**20  # of a notebook without what its cells gave
MAX_ZIP_BYTES = 200 * 2**20  # of all archives in an archive together, unpacked
MAX_ZIP_DEPTH = 3  # of archives in each other
MAX_MEMBERS = 20_000  # of an archive, with those in it; a virtual environment has as many
MAX_NAMES_BYTES = 4 * 2**20  # of an archive's list of them
MAX_TOKENS = 5_000_000  # of lists, objects and strings in a student's outputs: seconds

NOTEBOOK = re.compile(r"\.ipynb(\.txt|\.json|\.bak)?$", re.IGNORECASE)
ARCHIVE = re.compile(r"\.zip$", re.IGNORECASE)
# A format character that may be in a name: it joins letters, or keeps them apart.
JOINERS = "\u200c\u200d"

Read = Callable[[], bytes]


class LeftOutError(ValueError):
    """A file that is not read, and why."""


@dataclass(frozen=True)
class File:
    """`name`: below the folder or archive. `read`: None for what is no notebook; it may
    raise anything, LeftOutError where the file is whole. `words`: to be noted, or "".
    `given`: the name of what was handed in, a file or an archive, before it was made
    plain: names that differ may look the same."""

    name: str
    read: Read | None
    words: str = ""
    given: str = ""


def files_in(path: Path) -> Iterator[File]:
    """What is in a folder or a zip archive. An empty folder's name ends with "/"."""
    if not path.is_dir():
        # Of a whole class: whoever grades it trusts the platform that made it.
        place = _Place(path, path.stat().st_mtime_ns, max_names_bytes=2**30)
        yield from _in_archive("", place, None)
        return
    for folder, folders, names in os.walk(path):
        folders.sort()
        at = Path(folder)
        below = at.relative_to(path).as_posix()
        prefix = "" if below == "." else f"{below}/"
        linked = [name for name in folders if (at / name).is_symlink()]
        for name in sorted([*names, *linked]):
            found = _on_disk(plain(prefix + name, 1000), at / name)
            yield from _given_as(prefix + name, found)
        if prefix and not folders and not names:
            yield from _given_as(prefix, [File(plain(prefix, 1000), None)])


def plain(text: str, most: int = 500) -> str:
    """A student's words in a line that is safe to print: not longer than this, and
    without what moves a terminal's cursor or turns the direction of a page.

    What is longer loses its middle."""
    if len(text) > 2 * most:
        text = text[:most] + text[-most:]
    text = unicodedata.normalize("NFC", text)
    text = text.encode("utf-8", "backslashreplace").decode()  # half a character
    kinds = {char: unicodedata.category(char) for char in set(text) - set(JOINERS)}
    for char, kind in kinds.items():
        if kind in ("Cc", "Cf", "Zl", "Zp"):
            text = text.replace(char, "" if kind == "Cf" else " ")
    return text if len(text) <= most else f"{text[: most - 41]}…{text[-40:]}"


def token_budget() -> Iterator[int]:
    """The steps that there are for all notebooks of a student: see without_outputs."""
    return iter(range(MAX_TOKENS))


def without_outputs(content: bytes, budget: Iterator[int]) -> bytes:
    """The JSON of a notebook without the outputs and metadata of its cells.

    They may be most of it, and are not even parsed: each list, object or string in them
    takes a step of the budget. Raises LeftOutError where that is used up, or where the
    rest is too long to be code.
    """
    kept, num_bytes, start = [], 0, 0
    while True:
        found = DROPPED.search(content, start, start + MAX_TEXT_BYTES - num_bytes + 100)
        end = found.end() if found else len(content)
        num_bytes += end - start
        if num_bytes > MAX_TEXT_BYTES:
            raise LeftOutError(
                f"expected at most {MAX_TEXT_BYTES:,} bytes beside its outputs, got more"
            )
        kept.append(content[start:end])
        if found is None:
            return b"".join(kept)
        kept.append(b"null")
        start = _end_of_value(content, end, budget)


# The key of a list or an object. In a string a quote has a backslash before it.
DROPPED = re.compile(rb'"(?:outputs|metadata|attachments)"\s*:\s*(?=[\[{])')
TOKEN = re.compile(rb'[\[\]{}"]')
# Of a string, a part up to a quote or to its hundredth backslash: a pattern for the whole
# would take memory for each of them.
PART = re.compile(rb'(?:[^"\\]*\\.){0,100}[^"\\]*', re.DOTALL)


def _end_of_value(content: bytes, position: int, budget: Iterator[int]) -> int:
    """Where the list or object ends that begins there. budget: of steps to that end."""
    depth, is_string = 0, False
    for _ in budget:
        if is_string:
            before, position = position, PART.match(content, position).end()
            if content[position : position + 1] == b'"':
                position, is_string = position + 1, False
            elif position == before:  # at the end, or at a backslash with nothing behind
                break
            continue
        token = TOKEN.search(content, position)
        if token is None:
            break
        position = token.end()
        if token[0] == b'"':
            is_string = True
        else:
            depth += 1 if token[0] in b"[{" else -1
            if depth == 0:
                return position
    else:
        raise LeftOutError(f"expected at most {MAX_TOKENS:,} parts of outputs, got more")
    raise ValueError("an output has no end")


@dataclass(frozen=True)
class _Place:
    """Of an archive: a file, and which member of it, and of that, and so on."""

    path: Path
    changed_ns: int
    max_names_bytes: int = MAX_NAMES_BYTES
    members: tuple[int, ...] = ()


@dataclass
class _Left:
    """What may still come out of an archive."""

    members: int = MAX_MEMBERS
    num_bytes: int = MAX_ZIP_BYTES


class _InPieces(io.FileIO):
    """A file to be read in pieces: zipfile reads the list of all members in one."""

    def __init__(self, file, max_bytes: int):
        super().__init__(file)
        self.max_bytes = max_bytes

    def read(self, size: int = -1) -> bytes:
        if size > self.max_bytes:
            raise LeftOutError("expected an archive with fewer files, or shorter names")
        return super().read(size)

    def __del__(self):
        self.close()


@functools.lru_cache(maxsize=MAX_ZIP_DEPTH)  # one at a time, and those around it
def _opened(place: _Place) -> zipfile.ZipFile:
    if not place.members:
        return zipfile.ZipFile(_InPieces(place.path, place.max_names_bytes))
    with tempfile.TemporaryFile() as file:
        with _member(place) as (packed, num_bytes):
            _at_most(MAX_ZIP_BYTES, num_bytes)
            shutil.copyfileobj(packed, file)
        file.flush()
        return zipfile.ZipFile(_InPieces(os.dup(file.fileno()), MAX_NAMES_BYTES))


def _on_disk(name: str, file: Path) -> Iterator[File]:
    status = file.lstat()
    if stat.S_ISLNK(status.st_mode):
        yield from _link(name)
    elif not stat.S_ISREG(status.st_mode):
        yield File(name, None, "no file")
    elif ARCHIVE.search(name) and not _is_hidden(name):
        yield from _in_archive(name, _Place(file, status.st_mtime_ns), _Left())
    else:
        yield from _file(name, functools.partial(_read_file, file))


def _in_archive(name: str, place: _Place, left: _Left | None) -> Iterator[File]:
    """What is in the archive called `name`. `left`: None for that of a whole class."""
    try:
        infos = _listed(place, left)
    except Exception as error:  # counts as a notebook that cannot be read
        if not isinstance(error, LeftOutError):
            words = f"expected a zip archive, got {type(error).__name__}: {error}"
            error = ValueError(plain(words))
        yield File(name, functools.partial(_refuse, error))
        return
    for number, info in enumerate(infos):
        given, words = _member_name(info)
        member = plain(given, most=1000)
        if not member:
            continue
        inside = f"{name}/{member}" if name else member
        this = replace(place, members=(*place.members, number))
        yield from _given_as(given, _in_member(inside, info, this, words, left))


def _in_member(
    inside: str, info: zipfile.ZipInfo, this: _Place, words: str, left: _Left | None
) -> Iterator[File]:
    """What a member of an archive, called `inside`, is or holds."""
    if stat.S_ISLNK(info.external_attr >> 16):
        yield from _link(inside)
    elif info.is_dir():
        yield File(f"{inside}/", None)
    elif not ARCHIVE.search(inside) or _is_hidden(inside):
        yield from _file(inside, functools.partial(_read_member, this), words)
    elif len(this.members) >= MAX_ZIP_DEPTH:
        words = f"expected at most {MAX_ZIP_DEPTH} archives in each other"
        yield File(inside, functools.partial(_refuse, LeftOutError(words)))
    else:
        inner = replace(this, max_names_bytes=MAX_NAMES_BYTES)
        yield from _in_archive(inside, inner, left or _Left())


def _given_as(name: str, files: Iterable[File]) -> Iterator[File]:
    """The files, which were handed in under this name. Two ways to write an accent are
    one; a part of it that is too long is cut, not to the same as another."""
    parts = name.split("/")
    for index, part in enumerate(parts):
        if len(part) > 1000:
            digest = hashlib.sha256(part.encode("utf-8", "backslashreplace"))
            parts[index] = part[:900] + digest.hexdigest()
    given = unicodedata.normalize("NFC", "/".join(parts))
    for file in files:
        yield replace(file, given=given)


def _listed(place: _Place, left: _Left | None) -> list[zipfile.ZipInfo]:
    if left is None:
        return _opened(place).infolist()
    if left.num_bytes >= 0:
        archive = _opened(place)
        if len(place.members) > 0:
            left.num_bytes -= os.fstat(archive.fp.fileno()).st_size
        left.members -= len(archive.infolist())
    if left.num_bytes < 0:
        most = f"{MAX_ZIP_BYTES:,} bytes"
        raise LeftOutError(f"expected archives in it of at most {most}, got more")
    if left.members < 0:
        raise LeftOutError(f"expected at most {MAX_MEMBERS:,} files in it, got more")
    return archive.infolist()


def _member_name(info: zipfile.ZipInfo) -> tuple[str, str]:
    """Whatever tool wrote it, not yet plain; and what there is to say of it."""
    name = info.filename
    if not info.flag_bits & 0x800:  # macOS writes UTF-8 and does not say so
        with contextlib.suppress(UnicodeError):
            name = name.encode("cp437").decode()
    parts = name.replace("\\", "/").split("/")  # PowerShell writes backslashes
    kept = [part for part in parts if part not in ("", ".", "..")]
    words = f"its archive calls it {plain(name)}" if ".." in parts else ""
    return "/".join(kept), words


def _file(name: str, read: Read, words: str = "") -> Iterator[File]:
    if _is_hidden(name):
        return
    is_notebook = NOTEBOOK.search(name) and not name.rpartition("/")[2].startswith("~$")
    if is_notebook:
        yield File(name, read, words)
    else:
        yield File(name, None, "no notebook" if MAY_BE_WORK.search(name) else "")


# What may be a student's work all the same, and is named where it is left out.
MAY_BE_WORK = re.compile(
    r"\.ipynb|\.(py|html?|docx?|pdf|rar|7z|tar|t?gz|t?bz2|xz|url|webloc|lnk|gdoc)$",
    re.IGNORECASE,
)


def _link(name: str) -> Iterator[File]:
    if _is_hidden(name):
        return
    if NOTEBOOK.search(name) or ARCHIVE.search(name):
        error = LeftOutError("expected a file, got a link to one")
        yield File(name, functools.partial(_refuse, error))
    else:
        yield File(name, None, "a link")


def _is_hidden(name: str) -> bool:
    """The system's own, but for what stands for a file that is still in a cloud."""
    *folders, last = name.split("/")
    return any(part.startswith((".", "__MACOSX")) for part in folders) or (
        last.startswith(".") and not last.endswith(".icloud")
    )


def _read_file(path: Path) -> bytes:
    with open(path, "rb") as file:
        return _whole(file, os.fstat(file.fileno()).st_size)


def _read_member(place: _Place) -> bytes:
    with _member(place) as (file, num_bytes):
        return _whole(file, num_bytes)


def _whole(file: BinaryIO, num_bytes: int) -> bytes:
    _at_most(MAX_NOTEBOOK_BYTES, num_bytes)
    return file.read(num_bytes)


@contextlib.contextmanager
def _member(place: _Place) -> Iterator[tuple[BinaryIO, int]]:
    """A file in an archive; and how large it says it is: it gives no more than that."""
    archive = _opened(replace(place, members=place.members[:-1]))
    info = archive.infolist()[place.members[-1]]
    with archive.open(info) as file:
        yield file, info.file_size


def _at_most(limit: int, num_bytes: int):
    if num_bytes > limit:
        raise LeftOutError(f"expected at most {limit:,} bytes, got {num_bytes:,}")


def _refuse(error: Exception):
    raise error
