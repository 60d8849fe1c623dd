"""What TEACHING.md and AGENTS.md say of the course is what the code says."""

import importlib
import pkgutil
import re
from collections import Counter
from pathlib import Path

import answers
import pytest
from answers import WRONG

from lib.course.attempt import function_of
from lib.course.build import chapter_texts
from lib.course.check import judge
from lib.course.exercises import exercises
from lib.course.grading import files, grader, results, sandbox, submissions, worker

for module in pkgutil.iter_modules(answers.__path__):
    importlib.import_module(f"answers.{module.name}")

ROOT = Path(__file__).parents[1]
TEACHING, AGENTS = (
    (ROOT / name).read_text(encoding="utf-8") for name in ("TEACHING.md", "AGENTS.md")
)
CHAPTERS = [
    re.sub(r"\n(# )?", "\n", path.read_text(encoding="utf-8")) for path in chapter_texts()
]
# (1, 1): ("decode", "★", 5), of the chapters' headings.
HEADINGS = {
    (int(chapter), int(number)): (name, stars, int(minutes))
    for text in CHAPTERS
    for chapter, number, name, stars, minutes in re.findall(
        r"### Exercise (\d)\.(\d) · `(?:\w+\.)?(\w+)` (★+) \((\d+) minutes\)", text
    )
}
# (chapter, exercise, answer, case, words), of what TEACHING.md says of wrong answers.
TOLD = [
    (number, *(re.sub(r"\s+", " ", part) for part in parts))
    for number, section in enumerate(TEACHING.split("\n### Chapter ")[1:], start=1)
    for parts in re.findall(
        r'\n- `(\w+)`, `([^`]+)`:[^"]*?Wrong\s+for\s+([^"]+?):\s+"([^"]+)"', section
    )
]


def chapter_points(chapter):
    names = [name for key, (name, *_) in HEADINGS.items() if key[0] == chapter]
    return sum(exercises()[name].points for name in names)


def chapter_minutes(text):
    """Of the chapter, as its first cell says."""
    return int(re.search(r"\*\*You need:\*\*.*?(\d+)\s+minutes", text, re.S)[1])


def answer_of(exercise, name):
    """A wrong answer and what it is told, by its name, or by its title if it has one."""
    for answer, says in WRONG[exercise]:
        code = function_of(answer).__code__
        if name == code.co_name or code.co_filename == f"<{exercise}: {name}>":
            return answer, says
    raise LookupError(f"{exercise}: expected a wrong answer {name}, found none")


def test_the_chapters_have_every_exercise_in_their_order():
    assert [name for name, *_ in HEADINGS.values()] == list(exercises())


def test_every_exercise_is_listed_with_its_stars_minutes_and_points():
    rows = re.findall(
        r"^\| (\d)\.(\d) `(\w+)` \| (★+) \| (\d+) \| (\d+) \| \w.* \|$", TEACHING, re.M
    )
    assert [
        (int(chapter), int(number), name, stars, int(minutes), int(points))
        for chapter, number, name, stars, minutes, points in rows
    ] == [
        (*key, name, stars, minutes, exercises()[name].points)
        for key, (name, stars, minutes) in HEADINGS.items()
    ]


def test_each_exercise_stands_under_its_chapter():
    for number, section in enumerate(TEACHING.split("\n### Chapter ")[1:], start=1):
        assert section.startswith(f"{number}\n")
        of_chapter = {str(key[0]) for key in HEADINGS if key[0] == number}
        assert set(re.findall(r"^\| (\d)\.\d ", section, re.M)) == of_chapter


def test_an_exercise_gives_as_many_points_as_it_has_stars():
    assert "as many points as it has stars" in TEACHING
    for name, stars, _ in HEADINGS.values():
        assert exercises()[name].points == len(stars), name


def test_minutes_and_points_of_chapters_are_those_of_the_texts():
    rows = []
    for number, text in enumerate(CHAPTERS, start=1):
        minutes = [m for key, (*_, m) in HEADINGS.items() if key[0] == number]
        row = [chapter_minutes(text), sum(minutes), len(minutes), chapter_points(number)]
        rows.append(row)
    listed = re.findall(
        r"^\| \[\d+\. .*\]\(.*\) \| .* \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$",
        TEACHING,
        re.M,
    )
    assert [[int(cell) for cell in row] for row in listed] == rows
    totals = re.search(
        r"^\| all \| +\| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", TEACHING, re.M
    )
    assert [int(cell) for cell in totals.groups()] == [
        sum(column) for column in zip(*rows)
    ]
    short = sum(row[0] for row in rows) - rows[1][0]
    assert (
        f"chapters 1, 3, 4, 5, 6, 7, 8, 9 and 10 are a course of {short} minutes"
        in TEACHING
    )


def test_sessions_have_every_exercise_once_and_end_at_headings():
    sessions = re.findall(
        r"^\| (\d+) \| (\d)\.(\d)–(\d)\.(\d) \| (\d+) \| (.*) \|$", TEACHING, re.M
    )
    covered = []
    for number, (session, *numbers, total, end) in enumerate(sessions, start=1):
        chapter, first, same, last = map(int, numbers)
        keys = [(chapter, n) for n in range(first, last + 1)]
        covered += keys
        assert int(session) == number and same == chapter
        assert int(total) == sum(HEADINGS[key][2] for key in keys), session
        for heading in re.findall(r"\*([^*]+)\*", end):  # behind the last exercise
            assert CHAPTERS[chapter - 1].index(f"\n## {heading}\n") > CHAPTERS[
                chapter - 1
            ].index(f"### Exercise {chapter}.{last} "), heading
    assert covered == list(HEADINGS)
    for chapter, text in enumerate(CHAPTERS, start=1):
        num_sessions = sum(int(row[1]) == chapter for row in sessions)
        if chapter not in {key[0] for key in HEADINGS}:
            num_sessions = 1  # of its own
        assert chapter_minutes(text) <= 90 * num_sessions


def test_the_points_out_of_reach_without_triton_are_those_of_the_kernels():
    points = sum(e.points for e in exercises().values() if e.is_kernel)
    words = f"{points} of its {chapter_points(5)} points"
    assert words in re.sub(r"\s+", " ", TEACHING)


def test_each_chapter_tells_of_three_to_six_wrong_answers_of_its_own():
    counts = Counter(number for number, *_ in TOLD)
    with_exercises = {key[0] for key in HEADINGS}
    assert all(3 <= counts[number] <= 6 for number in with_exercises), counts
    assert len(TOLD) == len(re.findall(r"Wrong\s+for\s(?!\*)", TEACHING))
    for number, exercise, *_ in TOLD:
        assert exercise in [
            name for key, (name, *_) in HEADINGS.items() if key[0] == number
        ]


@pytest.mark.parametrize("number, exercise, name, case, words", TOLD)
def test_a_wrong_answer_is_told_what_the_page_says(number, exercise, name, case, words):
    answer, says = answer_of(exercise, name)
    if exercises()[exercise].is_kernel:  # slow: test_exercises.py holds it to `says`
        assert says and (says in words or words in says)
        assert case in [c.name for c in exercises()[exercise].cases(0)]
    else:
        message = judge(exercises()[exercise], answer, 0).message
        assert message.startswith((f"wrong for {case}:", f"wrong for {case} (")), message
        assert words in message, message


def test_assistants_are_told_every_exercise_by_chapter():
    listed = re.findall(r"^- Chapter (\d): ((?:`\w+`,?\s+)+)", AGENTS, re.M)
    assert [
        (int(chapter), name)
        for chapter, names in listed
        for name in re.findall(r"\w+", names)
    ] == [(key[0], name) for key, (name, *_) in HEADINGS.items()]


def test_assistants_are_told_of_two_hints_and_each_exercise_has_two():
    assert "Hint 1 of the exercise, then hint 2" in AGENTS
    for text in CHAPTERS:
        for part in text.split("### Exercise ")[1:]:
            assert re.findall(r"<summary>(Hint \d)</summary>", part) == [
                "Hint 1",
                "Hint 2",
            ]


@pytest.mark.parametrize("name", ["TEACHING.md", "AGENTS.md"])
def test_every_link_leads_to_a_file(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert targets
    for target in targets:
        assert target.startswith("https://") or (ROOT / target.split("#")[0]).exists(), (
            target
        )


def test_the_limits_of_the_grader_are_those_that_the_page_states():
    text = " ".join((ROOT / "TEACHING.md").read_text(encoding="utf-8").split())
    gib = 2**30
    for words in (
        f"A call may take {grader.LEAST_SECONDS} seconds",
        f"by the clock {worker.CALL_BY_CLOCK} times that, and an exercise "
        f"{grader.ALL_BY_CLOCK} times",
        f"or {grader.MOST_TIMES_SLOWER} times as long as the library's",
        f"may ask for {worker.MEMORY_BYTES // gib} GiB beyond",
        f"together may hold {sandbox.RESIDENT_BYTES // gib} GiB, in "
        f"{sandbox.MOST_THREADS} threads",
        f"there are {worker.VIRTUAL_BYTES // gib} GiB, and {worker.FAR_BYTES // gib} for "
        f"a kernel",
        f"{sandbox.FOLDER_BYTES // 2**20} MiB in memory",
        f"may have {files.MAX_NOTEBOOK_BYTES // 2**20} MiB, of which "
        f"{files.MAX_TEXT_BYTES // 2**20} MiB beside its outputs",
        f"a student {submissions.MAX_BYTES // 2**20} MiB, of which "
        f"{submissions.MAX_TEXT_BYTES // 2**20} MiB beside outputs, "
        f"{submissions.MAX_NOTEBOOKS} notebooks, {files.MAX_TOKENS:,} lists, objects and "
        f"strings in their outputs, {submissions.MAX_CELLS:,} code cells",
        f"notes are cut to about {results.MAX_NOTES:,} characters",
        f"and {submissions.MAX_CODE:,} characters of code",
        f"an archive {files.MAX_MEMBERS:,} files, and archives in it "
        f"{files.MAX_ZIP_BYTES // 2**20} MiB, at most {files.MAX_ZIP_DEPTH} in each",
    ):
        assert words in text, words


@pytest.mark.parametrize("name", ["TEACHING.md", "AGENTS.md"])
def test_no_page_calls_a_thing_easy_or_is_wider_than_120_columns(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not re.findall(r"\b(?:simply|just|obviously|trivial\w*|easy)\b", text, re.I)
    for line in text.split("\n"):
        assert len(line) <= 120 or line.startswith("|"), line
