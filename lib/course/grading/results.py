"""What is kept of a run: one file a student, and the table.

    OUT/grades.csv              a row for each submission
    OUT/students/NAME.json      its points and words, in Gradescope's format
    OUT/settings.json           which chapters, and the secret seed: keep it to yourself

A student's file is written as soon as it is graded, whole or not at all. So a run that
was ended goes on where it was, and one after a new submission grades only that.
"""

import csv
import hashlib
import io
import json
import os
import secrets
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch

from lib.course import ROOT
from lib.course.exercises import exercises
from lib.course.grading.grader import Grade, Score
from lib.course.grading.submissions import by_name


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
        kept = _read(path) or {}
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
        """Where a student's file is; a name too long for a file is cut."""
        name = student
        if len(name.encode()) > 200:
            name = f"{name[:40]}-{hash_of(student)[:10]}"
        return self.out / "students" / (name + suffix)

    def kept(self, student: str, sha256: str) -> Grade | None:
        """The grade of an earlier run, if nothing has changed since."""
        kept = (_read(self.path(student)) or {}).get("extra_data", {})
        if kept.get("settings") != self.settings or kept["grade"]["sha256"] != sha256:
            return None
        scores = {name: Score(**s) for name, s in kept["grade"]["scores"].items()}
        return Grade(**{**kept["grade"], "scores": scores})

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


def _read(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none, or none that is whole: as if it were not there
        return None


def _no_formula(value):
    """A spreadsheet runs what begins like this."""
    is_formula = isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t")
    return f"'{value}" if is_formula else value
