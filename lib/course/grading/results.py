"""What is kept of a run: one file a student, and the table.

    OUT/grades.csv              a row for each submission
    OUT/students/NAME.json      its points and words, in Gradescope's format
    OUT/settings.json           which chapters, and the secret seed: keep it to yourself

A student's file is written as soon as it is graded, whole or not at all. So a run that
was ended goes on where it was, and one after a new submission grades only that. A file
that somebody has damaged is set aside, and what it held is made anew.
"""

import csv
import hashlib
import io
import json
import os
import re
import secrets
import tempfile
import typing
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from lib.course import ROOT
from lib.course.exercises import exercises
from lib.course.grading.files import plain
from lib.course.grading.grader import CRASHED, TIMEOUT, Grade, Score
from lib.course.grading.submissions import by_name

# Of Windows, whatever stands behind a dot.
DEVICE = re.compile(r"con(in\$|out\$)?|prn|aux|nul|(com|lpt)[0-9¹²³]", re.IGNORECASE)
MAX_NOTES = 5_000  # characters of a row's: a spreadsheet's cell holds 32,767


def course_version() -> str:
    """Of the checks, the library and torch, by what is in them."""
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted((ROOT / "lib").rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            digest.update(path.relative_to(ROOT).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:10]


class Results:
    """The folder of a run. `seed`: None for the one kept there, or a new one.

    Raises ValueError where the folder holds grades of other chapters.
    """

    def __init__(self, out: Path, names: list[str], seed: str | None):
        self.out, self.names, self.version = out, names, course_version()
        (out / "students").mkdir(parents=True, exist_ok=True)
        path = out / "settings.json"
        kept = _settings(path)
        chapters = sorted({exercises()[name].chapter for name in names})
        if kept.get("chapters", chapters) != chapters:
            theirs = ", ".join(map(str, kept["chapters"]))
            raise ValueError(
                f"{out}: expected a folder for these grades alone, found those of "
                f"chapters {theirs}: name another with --out"
            )
        self.seed = seed or kept.get("seed") or secrets.token_hex(8)
        salt = kept.get("salt") or secrets.token_hex(8)
        settings = {"chapters": chapters, "seed": self.seed, "salt": salt}
        if kept != settings:
            write(path, json.dumps(settings, indent=2))
        # Under what a grade came about; says nothing of the seed to who has no salt.
        self.settings = hash_of(salt, self.seed, self.version, *names)[:16]

    def path(self, student: str, suffix: str = ".json") -> Path:
        """Where a student's file is. A name that some system refuses is changed: one that
        is too long, and on Windows a device's, or one with these characters."""
        name = re.sub(r'[\x00-\x1f<>:"/\\|?*]', "_", student)
        is_device = DEVICE.fullmatch(name.partition(".")[0].rstrip())
        if name != student or is_device or len(name.encode()) > 200:
            start = name[:40].replace(".", "_")  # else nul.x is a device all the same
            name = f"{start}-{hash_of(student)[:10]}"
        return self.out / "students" / (name + suffix)

    def kept(self, student: str, sha256: str) -> Grade | None:
        """The grade of an earlier run, if nothing has changed since.

        What crashed or took too long is none: that may have been the machine's fault.
        """
        path = self.path(student)
        if not path.exists():
            return None
        try:
            about = _read(path)["extra_data"]
            if about["settings"] != self.settings:
                return None
            grade = _as(Grade, about["grade"])
            scores = {name: _as(Score, s) for name, s in grade.scores.items()}
            if grade.student != student or not scores.keys() >= set(self.names):
                raise ValueError("of another student, or other exercises")
            if not all(isinstance(note, str) for note in grade.notes):
                raise TypeError("expected words")
        except DAMAGES:
            _set_aside(path, "graded again")
            return None
        ends = {score.status for score in scores.values()}
        if grade.sha256 != sha256 or ends & {CRASHED, TIMEOUT}:
            return None
        return replace(grade, scores=scores)

    def keep(self, grade: Grade):
        """Raises OSError where there is no room."""
        about = {"settings": self.settings, "version": self.version}
        extra = {"extra_data": {**about, "grade": asdict(grade)}}
        content = {**as_gradescope(grade), **extra}
        write(self.path(grade.student), json.dumps(content, indent=1, ensure_ascii=False))

    def write_table(self, grades: Iterable[Grade]) -> Path:
        """All grades as CSV, the same for the same submissions."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        columns = ("student", "points", "max_points", "status", *self.names)
        writer.writerow((*columns, "sandbox", "version", "sha256", "notes"))
        for grade in sorted(grades, key=by_name):
            totals = (grade.points, grade.max_points, grade.status)
            points = [grade.scores[name].points for name in self.names]
            about = (grade.sandbox, self.version, grade.sha256, "; ".join(grade.notes))
            row = (grade.student, *totals, *points, *about)
            writer.writerow([_no_formula(value) for value in row])
        path = self.out / "grades.csv"
        write(path, "\ufeff" + file.getvalue())  # the mark lets Excel see UTF-8
        return path


def printable(grade: Grade) -> Grade:
    """The same, with all that a student's code may have said made plain, and no more than
    a cell of a table has room for: any that is written or printed comes from here."""
    scores = {
        name: replace(score, message=plain(score.message), case=plain(score.case))
        for name, score in grade.scores.items()
    }
    notes, num_characters = [], 0
    for note in map(plain, grade.notes):
        num_characters += len(note)
        if num_characters > MAX_NOTES:
            notes.append(f"and {len(grade.notes) - len(notes)} notes more")
            break
        notes.append(note)
    return replace(grade, scores=scores, notes=notes)


def as_gradescope(grade: Grade) -> dict:
    """A grade in the format of Gradescope's results.json."""
    tests = [
        {
            "name": name,
            "score": score.points,
            "max_score": score.max_points,
            "status": "passed" if score.points else "failed",
            "output": score.message,
            "visibility": "visible",
        }
        for name, score in grade.scores.items()
    ]
    notes = "\n".join(grade.notes)
    return {
        "score": grade.points,
        "execution_time": grade.seconds,
        "output": f"{grade.points} of {grade.max_points} points\n{notes}".strip(),
        "tests": tests,
    }


def hash_of(*words: str) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()


def seed_number(seed: str) -> int:
    """The number that cases are drawn from: a number stands for itself."""
    return int(seed) if seed.isdecimal() else int(hash_of(seed)[:15], 16)


def write(path: Path, text: str):
    """Whole, or not at all. Raises OSError where there is no room."""
    with tempfile.NamedTemporaryFile(
        "w",
        encoding="utf-8",
        errors="backslashreplace",  # half a character, in a student's error message
        dir=path.parent,
        prefix=".",
        delete=False,
    ) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            os.unlink(file.name)
            raise
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


# What there is to raise where a file does not hold what was written into it.
DAMAGES = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError)


def _read(path: Path) -> Any:
    """What the file holds. Raises one of DAMAGES."""
    return json.loads(path.read_text(encoding="utf-8"))


def _settings(path: Path) -> dict:
    """What an earlier run has kept, or nothing."""
    if not path.exists():
        return {}
    try:
        kept = _read(path)
        texts = [kept["seed"], kept["salt"]]
        if not all(isinstance(text, str) and text for text in texts):
            raise TypeError("expected words")
        if not set(kept["chapters"]) <= {e.chapter for e in exercises().values()}:
            raise ValueError("expected chapters")
        return kept
    except DAMAGES:
        _set_aside(path, "all are graded again, with another seed unless --seed gives it")
        return {}


def _as(kind: type, values: dict) -> Any:
    """A dataclass from what `asdict` made of one. Raises TypeError for anything else."""
    made = kind(**values)
    for name, expected in typing.get_type_hints(kind).items():
        value = getattr(made, name)
        if not isinstance(value, typing.get_origin(expected) or expected):
            raise TypeError(f"{name}: expected {expected}, got {value!r}")
    return made


def _set_aside(path: Path, what_now: str):
    aside = path.with_name(f"{path.name}.damaged")
    os.replace(path, aside)
    print(
        f"{path}: expected what a run has written, found none: {what_now}, and the file"
    )
    print(f"is set aside, as {aside.name}")


def _no_formula(value):
    """A spreadsheet runs what begins like this, also behind what it may take for the end
    of a cell: a comma here, a semicolon where a comma is in numbers."""
    if not isinstance(value, str):
        return value
    return re.sub(r"(^|[,;])([\s\"']*)(?=[=+\-@＝＋－＠])", r"\1\2'", value)
