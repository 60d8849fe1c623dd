"""Pages to read: one for a student, one for the class. What students wrote is escaped."""

import base64
import io
import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import jinja2
import matplotlib.pyplot as plt
import mistune
from matplotlib.ticker import MaxNLocator

from lib.course import ROOT
from lib.course.attempt import NOT_WRITTEN
from lib.course.collect import sources
from lib.course.exercises import exercises
from lib.course.grading.grader import NO_NOTEBOOK, Grade, Score
from lib.course.grading.submissions import by_name
from lib.course.grading.worker import NOT_THERE
from lib.figures.plotting import NEW, WASTED, use_course_style

PAGES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "pages"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def student_page(grade: Grade) -> str:
    """HTML: what passed, and for the rest what failed, and the first hint."""
    hints = {
        name: "" if score.message == NO_NOTEBOOK else hint(name)
        for name, score in grade.scores.items()
        if not score.points
    }
    return PAGES.get_template("student.html").render(
        grade=grade, hints=hints, chapters=_chapters(grade)
    )


def class_page(grades: list[Grade], page_of: Callable[[str], str]) -> str:
    """HTML: how each exercise went, what went wrong most, who needs help.

    page_of: student -> link to the page.
    """
    names = list(grades[0].scores)
    mistakes = {
        name: Counter(
            re.sub(r"^(wrong for [^:]*?) \(.*?\):", r"\1:", grade.scores[name].message)
            for grade in grades
            if _kind(grade.scores[name]) == "wrong"
        ).most_common(3)
        for name in names
    }
    below_half = [g for g in grades if 2 * g.points < g.max_points]
    return PAGES.get_template("class.html").render(
        grades=sorted(grades, key=by_name),
        mistakes=mistakes,
        below_half=sorted(below_half, key=lambda grade: (grade.points, by_name(grade))),
        with_accidents=[g for g in grades if g.status != "ok"],
        figure=_picture(grades, names),
        page_of=page_of,
        points=sorted(grade.points for grade in grades),
        chapters=_chapters(grades[0]),
    )


def _chapters(grade: Grade) -> str:
    """What it is about: "chapter 3"."""
    numbers = sorted({exercises()[name].chapter for name in grade.scores})
    return f"chapter{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def _picture(grades: list[Grade], names: list[str]) -> str:
    """A bar an exercise: how many passed, were wrong, never came; PNG in base64."""
    kinds = {name: Counter(_kind(g.scores[name]) for g in grades) for name in names}
    use_course_style()
    figure, ax = plt.subplots(figsize=(8, 1.2 + 0.28 * len(names)))
    looks = {
        "passed": {"color": NEW},
        "wrong": {"color": "#E69F00"},
        "not written": WASTED,
    }
    left = [0] * len(names)
    for kind, look in looks.items():
        widths = [kinds[name][kind] for name in names]
        ax.barh(names, widths, left=left, label=kind, **look)
        left = [a + b for a, b in zip(left, widths)]
    hardest = min(names, key=lambda name: kinds[name]["passed"])
    num_passed = kinds[hardest]["passed"]
    ax.set_title(f"{hardest}: fewest passed, {num_passed} of {len(grades)}")
    ax.invert_yaxis()
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("submissions")
    ax.grid(axis="y", visible=False)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    file = io.BytesIO()
    figure.savefig(file, format="png")
    plt.close(figure)
    return base64.b64encode(file.getvalue()).decode()


def _kind(score: Score) -> str:
    if score.points:
        return "passed"
    is_there = score.message not in (NOT_WRITTEN, NOT_THERE, NO_NOTEBOOK)
    return "wrong" if is_there else "not written"


@cache
def hint(name: str) -> str:
    """The first hint that the chapter gives, as HTML; empty where there is none."""
    for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        cells = sources(path.read_bytes(), ("code", "markdown"))
        for cell, after in zip(cells, cells[1:]):
            if cell == f"check({name})":
                found = re.search(r"Hint 1</summary>(.*?)</details>", after, re.S)
                return str(mistune.html(found[1].strip())) if found else ""
    return ""
