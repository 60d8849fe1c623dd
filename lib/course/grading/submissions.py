"""Whose notebooks are these? Files, as a learning platform hands them over.

    folder/ada.ipynb                     one notebook, of ada
    folder/ada_01_generation.ipynb       the same
    folder/ada/01_generation.ipynb       several
    folder/ada.zip                       several, packed
    class.zip                            all of these, packed

No notebook is read before its turn comes. What it holds is known by what it defines, not
by its name.
"""

import contextlib
import functools
import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from lib.course import ROOT
from lib.course.attempt import in_a_line
from lib.course.collect import sources
from lib.course.grading.files import (
    ARCHIVE,
    NOTEBOOK,
    File,
    LeftOutError,
    Read,
    files_in,
    plain,
    token_budget,
    without_outputs,
)

MAX_NOTEBOOKS = 100  # of a student
MAX_BYTES = 300 * 2**20  # of a student's notebooks, outputs and all
MAX_TEXT_BYTES = 16 * 2**20  # of these, without what their cells gave
MAX_CELLS = 10_000  # of a student, with code
MAX_CODE = 2_000_000  # characters of a student's; all chapters together have 110,000

# How platforms begin the names of the files, or folders, that they hand over; the third
# is Blackboard's. What a student called the file comes last, and may look the same.
PLATFORMS = (
    r"(?P<student>.+?)(_LATE)?(?P<number>_\d+)_\d+_(?P<file>.+)",  # Canvas
    r"(?P<student>.+?)(?P<number>_\d+)_assignsubmission_[a-z]+(_(?P<file>.*))?",  # Moodle
    r".+?_(?P<student>[^_]+)_attempt_(?P<date>\d{4}(-\d\d){5})(_(?P<file>.+)|\.txt)?",
    r"(?P<number>\d+)-\d+ - (?P<student>.+?) - (?P<date>\w+ \d+, \d+ \d+ [AP]M)",  # D2L
)
# What follows a notebook's name in that of a copy of it, or of a later version. No name
# can be read as these in two ways: who would try all of them would never end.
AGAIN = (
    r"\s?\(\d+\)|\s?\((?=[^)]*(?:copy|conflict))[^)]*\)|\.[a-z][\w-]*(?![\w-])"
    r"|(?: - |[ _-])(?:copy|kopie|copie|copia)\d*|[ _-]v?\d{1,2}(?!\d)"
    r"|[ _-](?:final|late|new|old|bak|backup)"
)
COPY_OF = r"(?:copy of|kopie von|copie de|copia d[ei])"  # Colab's


@dataclass
class Submission:
    """The notebooks of one student. `notes`: what a teacher should know of them."""

    student: str
    files: list[tuple[str, Read]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def read(self) -> tuple[list[list[str]], list[str], str]:
        """The sources of each notebook's code cells; notes; a checksum of it all.

        What is no notebook is a note, and so is what is the course's own. Never raises.
        """
        notebooks, notes, budget = [], list(self.notes), token_budget()
        digest = hashlib.sha256("\n".join(notes).encode())
        num_bytes = num_text_bytes = num_cells = num_characters = 0
        for name, read in reversed(self.files):  # the last counts most
            try:
                content = _read(name, read, num_bytes, digest)
                num_bytes += len(content)
                _at_most(MAX_TEXT_BYTES, num_text_bytes, "bytes beside outputs")
                content = without_outputs(content, budget)  # not two before the next
                num_text_bytes += len(content)
                _at_most(MAX_TEXT_BYTES, num_text_bytes, "bytes beside outputs")
                cells = sources(content)
                num_cells += len(cells)
                _at_most(MAX_CELLS, num_cells, "cells")
                num_characters += sum(map(len, cells))
                _at_most(MAX_CODE, num_characters, "characters of code")
                if any(tuple(cells[-len(own) :]) == own for own in _solutions()):
                    raise LeftOutError("is the course's own solution, cell for cell")
                notebooks.insert(0, cells)
            except LeftOutError as error:
                notes.append(f"{name}: left out: {error}")
            except RecursionError:
                notes.append(f"{name}: left out: expected fewer lists in each other")
            except Exception as error:  # whatever is wrong with a file
                notes.append(f"{name}: unreadable, is it whole? {in_a_line(error)}")
        if not self.files:
            notes.append("expected a notebook, found none")
        return notebooks, notes, digest.hexdigest()

    def sha256(self) -> str:
        """The checksum that `read` gives. Nothing is parsed."""
        digest, num_bytes = hashlib.sha256("\n".join(self.notes).encode()), 0
        for name, read in reversed(self.files):
            with contextlib.suppress(Exception):  # whatever is wrong with a file
                num_bytes += len(_read(name, read, num_bytes, digest))
        return digest.hexdigest()


def _read(name: str, read: Read, num_bytes: int, digest) -> bytes:
    """What a notebook holds, which `digest` takes up with its name. num_bytes: of those
    before it."""
    digest.update(name.encode())
    _at_most(MAX_BYTES, num_bytes, "bytes")
    content = read()
    if not content:
        raise LeftOutError("is empty")
    digest.update(f"{len(content)} bytes".encode())
    digest.update(content)
    return content


def find(path: Path) -> tuple[list[Submission], list[str]]:
    """The submissions in a folder or a zip archive, one a student, in order of name; and
    the names of loose files that are none.

    Raises ValueError where there is no notebook.
    """
    if not path.is_dir() and not ARCHIVE.search(path.name):
        raise ValueError(f"submissions: expected a folder or a .zip, got {path}")
    files = list(files_in(path))
    if not any(file.read for file in files):
        raise ValueError(f"submissions: expected notebooks in {path}, found none")
    around = _folder_of_the_class(files, path)
    handed_in, ignored = defaultdict(list), []
    for file in files:
        name = file.name.removeprefix(around)
        if not name:  # of an empty folder
            continue
        part = _Part.of(file, name)
        if file.read or "/" in name or (file.words and part.is_platforms):
            top, slash, inside = name.partition("/")
            given = file.given.split("/")[around.count("/")]  # of the top
            is_plain = given == top
            whose = part if is_plain else _Part.of(file, given + slash + inside)
            handed_in[part.student, whose.student].append(part)
        else:
            ignored.append(file)
    ignored.sort(key=lambda file: not file.words)  # what may be work is named first
    # Ann and ann too: their pages would be one file, where case is nothing to a system.
    num_alike = Counter(student.casefold() for student, _ in handed_in)
    num_as_given = Counter(s.casefold() for s, whose in handed_in if s == whose)
    names, found = {student for student, _ in handed_in}, []
    for (student, whose), parts in handed_in.items():
        is_alone = num_alike[student.casefold()] == 1
        is_as_given = whose == student and num_as_given[student.casefold()] == 1
        name = student if is_alone or is_as_given else _marked(student, whose)
        found.append(_submission(name, parts))
        if not is_alone:
            found[-1].notes.append(f"its name looks like another's, {student}: whose?")
        first = re.sub(r"\s?\(\d+\)$", "", student)
        if first != student and first in names:
            found[-1].notes.append(f"a second download of {first}'s?")
    return sorted(found, key=by_name), [file.name for file in ignored]


def by_name(of_a_student) -> tuple[str, str]:
    """The order of a list of names: to sort by."""
    return of_a_student.student.casefold(), of_a_student.student


def in_one_folder(path: Path) -> Submission:
    """All notebooks in a folder, as one submission.

    Raises ValueError where there is none.
    """
    if not path.is_dir():
        raise ValueError(f"expected a folder of notebooks, got {path}")
    parts = [_Part(file, "", "", file.name) for file in files_in(path)]
    if not any(part.file.read for part in parts):
        raise ValueError(f"expected notebooks in {path}, found none")
    return _submission("", parts)


def listed(names: Iterable[str], most: int = 5) -> str:
    """A few of them, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(plain(name, 100) for name in names[:most]) + more


@dataclass(frozen=True)
class _Part:
    """A file, with the folder or archive that it was handed in by, or "" for a loose one;
    and its name in there."""

    file: File
    student: str
    top: str
    name: str
    date: str = ""  # at which it was handed in, as the platform tells
    is_platforms: bool = False  # its name was made by a platform
    is_nameless: bool = False  # nothing in its name is a student's

    @classmethod
    def of(cls, file: File, name: str) -> "_Part":
        """`name`: of the file, below the folder of the class."""
        top, slash, inside = name.partition("/")
        is_file = not slash or bool(ARCHIVE.search(top))
        stem = _stem(top) if is_file else top
        if found := _of_platform(stem):
            # A name alone may be that of two students.
            number = (found.get("number") or "").strip("_")
            student = f"{found['student']}_{number}" if number else found["student"]
            label, date = found.get("file") or top, _as_date(found.get("date") or "")
        else:
            student, label = _without_chapter(stem) if is_file else (stem, None)
            date = ""
        about = (date, bool(found), not student)
        student = _student(student or stem)
        if slash:
            return cls(file, student, top, inside, *about)
        return cls(file, student, "" if label else top, label or top, *about)


def _of_platform(stem: str) -> dict[str, str | None] | None:
    """Of several that it may be the one whose student ends first: a platform's words come
    before the student's."""
    matches = (re.fullmatch(pattern, stem) for pattern in PLATFORMS)
    found = [match for match in matches if match]
    first = min(found, key=lambda match: match.end("student"), default=None)
    return first and first.groupdict()


def _student(name: str) -> str:
    name = name.strip(" ") or "?"
    return _marked(f"{name[:100]}…", name) if len(name) > 120 else name


def _marked(shown: str, name: str) -> str:
    """What is shown of a name, told from what is shown of all others."""
    digest = hashlib.sha256(name.encode("utf-8", "backslashreplace"))
    return f"{shown} {digest.hexdigest()[:8]}"


def _stem(name: str) -> str:
    return ARCHIVE.sub("", NOTEBOOK.sub("", name))


def _as_date(words: str) -> str:
    """So that the later comes later in the alphabet."""
    day, _, clock = words.rpartition(", ")
    found = re.fullmatch(r"(\d{4}) (\d+) ([AP]M)", clock)
    if not found:
        return words
    year, time, half = found.groups()
    try:
        form = "%b %d %Y %I%M %p"
        return str(datetime.strptime(f"{day} {year} {time:>04} {half}", form))
    except ValueError:
        return words


@functools.cache
def _chapter_pattern() -> re.Pattern:
    """Of a name around a chapter's, which needs not be in it."""
    names = sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"))
    chapter = "|".join(names) or "(?!)"
    return re.compile(
        rf"(?P<before>.*?)(?P<file>(?:{COPY_OF} )?(?:{chapter})(?:{AGAIN})*)"
        rf"(?P<after>.*)",
        re.IGNORECASE,
    )


def _without_chapter(stem: str) -> tuple[str, str | None]:
    """Of a file's name the student's part, or "", and what is left; all of it, and None,
    where it names no chapter."""
    found = _chapter_pattern().fullmatch(stem)
    if not found:
        return stem, None
    before, after = found["before"].strip(" _-"), found["after"].strip(" _-")
    if before and after:  # which of the two is a student's, nobody can tell
        return stem, None
    return before or after, found["file"]


def _folder_of_the_class(files: list[File], path: Path) -> str:
    """What stands before the names of all notebooks, where a class was packed with the
    folder around it: "homework1/", or "".

    A student's own is told from it by what is in it: chapters, or this course.
    """
    names = [file.name for file in files if file.read]
    around = ""
    while True:
        top, slash, _ = names[0].removeprefix(around).partition("/")
        around = f"{around}{top}/"
        if not slash or ARCHIVE.search(top) or _of_platform(top):
            return ""
        if path.is_dir() and top.casefold() != path.resolve().name.casefold():
            return ""
        if not all(name.startswith(around) for name in names):
            return ""
        children = {name.removeprefix(around).partition("/")[0] for name in names}
        if 2 * sum(map(_is_of_one_student, children)) >= len(children):
            return ""
        if len(children) > 1:
            return around


def _is_of_one_student(name: str) -> bool:
    """A file or folder called "01", "hw 1" or "1 (2)", by a chapter alone, or as one of
    this course."""
    kinds = "ch|chapter|hw|homework|assignment|exercise|week|lab|part"
    number = rf"({kinds})?[ _-]*\d{{1,2}}({AGAIN})*"
    is_numbered = re.fullmatch(number, _stem(name), re.IGNORECASE)
    is_course = name in ("notebooks", "solutions", "lib")
    return bool(is_numbered) or is_course or not _without_chapter(_stem(name))[0]


def _submission(student: str, parts: list[_Part]) -> Submission:
    """What a student handed in; the last of its files counts."""
    result = Submission(student)
    notebooks, left_out, of_the_course = [], [], []
    for part in parts:
        folders = f"{part.top}/{part.name}".casefold().split("/")[:-1]
        if part.file.read and "solutions" in folders:
            of_the_course.append(part.file.name)
        elif part.file.read:
            notebooks.append(part)
        elif part.file.words and not _is_of_the_course(f"{part.top}/{part.name}"):
            left_out.append(f"{part.file.name} ({part.file.words})")
    roots = _roots(notebooks)
    notebooks.sort(key=lambda part: _when(part, roots[part]))
    if len(notebooks) > MAX_NOTEBOOKS:
        num_others = len(notebooks) - MAX_NOTEBOOKS
        words = f"expected at most {MAX_NOTEBOOKS} notebooks, left out {num_others}"
        result.notes.append(words)
        del notebooks[:num_others]
    result.files = [(part.file.name, part.file.read) for part in notebooks]
    files = [part.file for part in notebooks]
    if of_names := [f"{file.name}: {file.words}" for file in files if file.words]:
        result.notes.append(listed(of_names))
    result.notes += _ambiguities(notebooks, roots)
    if left_out:
        result.notes.append(f"left out: {listed(left_out)}")
    if of_the_course:
        words = "left out, the course's own is in folders called solutions"
        result.notes.append(f"{words}: {listed(of_the_course)}")
    return result


def _ambiguities(notebooks: list[_Part], roots: dict[_Part, str]) -> list[str]:
    tops = sorted({part.top for part in notebooks}, key=_natural)
    if len(tops) > 1:
        names = listed([top or "loose files" for top in tops])
        return [f"handed in more than once, all is read: {names}"]
    groups = defaultdict(list)
    for part in notebooks:
        groups[roots[part]].append(part.file.name)
    notes = [
        f"more than one {root}, {names[-1]} counts where it is written, before "
        f"{listed(names[:-1])}"
        for root, names in groups.items()
        if len(names) > 1
    ]
    if any(part.is_nameless for part in notebooks):
        notes.append("its name says no student's")
    return notes


def _roots(notebooks: list[_Part]) -> dict[_Part, str]:
    """By notebook, the name of which its own is a copy's or a later version's:
    "01" of "01 (2)", and, where there is an "01" beside it, of "01 - Copy"."""
    stems: dict[str, set[str]] = defaultdict(set)
    for part in notebooks:
        stems[_folder(part)].add(_name(part))
    return {part: _root(_name(part), stems[_folder(part)]) for part in notebooks}


def _root(stem: str, stems: set[str]) -> str:
    for mark in re.finditer(r"[^\w]|_", stem):  # the shortest is the first
        before, after = stem[: mark.start()], stem[mark.end() :]
        if before in stems:
            return before
        if after in stems and re.fullmatch(COPY_OF, before, re.IGNORECASE):
            return after
    return re.sub(rf"^{COPY_OF} |(\.ipynb)?\s?\(\d+\)$", "", stem)


def _when(part: _Part, root: str) -> tuple:
    """The order in which what a student handed in counts, the last most: by date; what
    lies deeper, and copies, before what they are copies of; (9) before (10)."""
    folder, stem = _folder(part), _name(part)
    rest = stem.removeprefix(root)
    of_a_version = r"[ _-]|\(\d+\)|v?\d{1,2}(?!\d)|final|late|new"
    is_version = re.fullmatch(rf"({of_a_version})*", rest)
    depth = part.name.count("/")
    return (
        (part.date, _natural(part.top), -depth, _natural(folder)),
        (bool(is_version), _natural(root), _natural(rest)),
        part.file.name,
    )


def _folder(part: _Part) -> str:
    return f"{part.top}/{part.name.rpartition('/')[0]}"


def _name(part: _Part) -> str:
    return _stem(part.name.rpartition("/")[2]).casefold()


def _natural(name: str) -> tuple:
    """To sort by: 9 before 10."""
    words = re.split(r"([0-9]+)", name.casefold())
    numbers = [word.lstrip("0") for word in words]
    return tuple(
        (len(number), number) if index % 2 else word
        for index, (word, number) in enumerate(zip(words, numbers))
    )


def _is_of_the_course(name: str) -> bool:
    """A file of this repository, or Moodle's and Canvas' page for what was typed in."""
    parts = name.split("/")
    if parts[-1].casefold() in ("onlinetext.html", "index.html"):
        return True
    ends = [parts[-depth:] for depth in range(2, 7) if depth <= len(parts)]
    return any(ROOT.joinpath(*end).is_file() for end in ends)


@functools.cache
def _solutions() -> frozenset[tuple[str, ...]]:
    """The code cells of each chapter with exercises, solved; none in a release."""
    notebooks = [path.read_bytes() for path in (ROOT / "solutions").glob("*.ipynb")]
    return frozenset(
        tuple(sources(content)) for content in notebooks if b'"nbgrader"' in content
    )


def _at_most(limit: int, number: int, of_what: str):
    if number > limit:
        raise LeftOutError(f"expected at most {limit:,} {of_what} in all, got more")
