"""The command, and what it prints.

    python -m lib.course.grading SUBMISSIONS        a folder or zip of students' notebooks
    python -m lib.course.grading --mine notebooks/  one's own: exit status 0 if all pass
    python -m lib.course.grading --gradescope       inside Gradescope's container

Exit status 2 for bad input, 1 for a full disk, 130 for an interrupt.
"""

from __future__ import annotations  # some are not there on Windows

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import torch
from tqdm import tqdm

from lib.course import interpreted  # noqa: F401  first: kernels are tried here
from lib.course.check import SEED, check
from lib.course.exercises import names_of
from lib.course.grading.submissions import find, in_one_folder, listed
from lib.text import print_any_letter

HAS_FORK = hasattr(
    os, "fork"
)  # not on Windows, where a worker could not even be imported
if HAS_FORK:
    from lib.course.grading import report
    from lib.course.grading.grader import Grade, Worker, grade, grade_all
    from lib.course.grading.results import (
        Results,
        as_gradescope,
        printable,
        seed_number,
        write,
    )


def main() -> int:
    print_any_letter()
    args = _arguments()
    torch.set_num_threads(1)  # beside the workers
    names = names_of(args.chapters)
    if args.mine:
        return mine(args.mine, names) if HAS_FORK else mine_here(args.mine, names)
    if not HAS_FORK:
        raise ValueError(
            "expected Linux or macOS: here no answer can be tried in a process of its own"
        )
    if args.seed == "-":
        args.seed = sys.stdin.readline().strip()
        if not args.seed:
            raise ValueError("--seed -: expected the seed in a line of input, got none")
    if args.gradescope:
        return gradescope(args.gradescope, names, args.seed)
    out = args.out or Path("grades", args.chapters or "all")
    if args.scheduler:
        try:
            from lib.course.grading import cluster
        except ModuleNotFoundError as error:
            raise ValueError(
                f"--scheduler: expected Dask installed, got no {error.name}: "
                "pip install '.[cluster]'"
            ) from None
        grade_them = functools.partial(cluster.grade_all, scheduler=args.scheduler)
    else:
        grade_them = functools.partial(grade_all, num_jobs=args.jobs)
    return grade_class(args.submissions, out, names, args.seed, grade_them)


def grade_class(
    path: Path, out: Path, names: list[str], seed: str | None, grade_them: Callable
) -> int:
    """Grade every submission in `path`; 0 when the table is written.

    grade_them: as `grader.grade_all`, which knows how many workers, and where.
    """
    _check_apart(path, out)
    submissions, ignored = find(path)
    if ignored:
        print(f"no notebooks, left out: {listed(ignored, 20)}")
    around = {name.partition("/")[0] for s in submissions for name, _ in s.files}
    if len(submissions) > 1 and len(around) == 1:
        print(f"{around.pop()}: taken for the folder of the class, not of a student")
    if len(submissions) == 1 and len(submissions[0].files) > 1:
        print(
            f"one student, {submissions[0].student}? For a class, give the folder, "
            "unpacked, that holds a file or a folder of each"
        )
    results = Results(out, names, seed)
    grades, new = {}, []
    for submission in submissions:
        kept = results.kept(submission.student, submission.sha256())
        if kept is None:
            new.append(submission)
        else:
            grades[submission.student] = kept
    if grades:
        print(f"{len(grades)} of {len(submissions)} were graded before, and are kept")
    bar = tqdm(total=len(new), unit="submission", file=sys.stdout, disable=None)

    def done(graded: Grade):
        grade = printable(graded)
        write(results.path(grade.student, ".html"), report.student_page(grade))
        results.keep(grade)  # last: from now on it counts as graded
        grades[grade.student] = grade
        bar.update()

    try:
        grade_them(new, names, seed_number(results.seed), done=done)
    except (KeyboardInterrupt, OSError) as error:
        bar.close()
        why = "interrupted" if isinstance(error, KeyboardInterrupt) else error
        print(f"{why}: {len(grades)} of {len(submissions)} are graded and kept")
        print("The same command again goes on from here")
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    bar.close()
    return _finish(results, list(grades.values()))


def _check_apart(path: Path, out: Path):
    """Raises ValueError where results would be taken for submissions, or around them."""
    handed_in, written = path.resolve(), out.resolve()
    if path.is_dir() and handed_in in (written, *written.parents):
        raise ValueError(f"--out: expected a folder outside of {path}, got {out}")
    if path.is_dir() and written in handed_in.parents:
        raise ValueError(f"--out: expected a folder without {path} in it, got {out}")


def _finish(results: Results, grades: list[Grade]) -> int:
    def page_of(student: str) -> str:
        path = results.path(student, ".html").relative_to(results.out)
        return quote(path.as_posix())

    try:
        table = results.write_table(grades)
        page = results.out / "class.html"
        write(page, report.class_page(grades, page_of))
    except OSError as error:
        print(f"{error}: the grades are kept; the same command again writes the table")
        return 1
    print(f"{len(grades)} submissions: {table}, {page}")
    return 0


def mine(path: Path, names: list[str]) -> int:
    """Grade the notebooks of one folder on the cases that they show themselves.

    Prints a line an exercise; 0 if all of them pass.
    """
    worker = Worker()
    try:
        result = grade(in_one_folder(path), names, SEED, worker)
    finally:
        worker.close()
    result = printable(result)
    for name, score in result.scores.items():
        print(f"{name:22} {score.points} of {score.max_points}  {score.message}")
    for note in result.notes:
        print(note)
    print(f"{result.points} of {result.max_points} points")
    return 0 if result.points == result.max_points else 1


def mine_here(path: Path, names: list[str]) -> int:
    """The same in this process, as a cell of the notebook would."""
    in_one_folder(path)
    print("Each answer is tried in this process: one that hangs or crashes ends it too")
    check.collect(path)
    check.summary()
    results = [check.results.get(name) for name in names]
    return 0 if all(result and result.passed for result in results) else 1


def gradescope(root: Path, names: list[str], seed: str | None) -> int:
    """Grade root/submission into root/results/results.json, as Gradescope asks."""
    worker = Worker()
    try:
        submission = in_one_folder(root / "submission")
        result = grade(submission, names, seed_number(seed or str(SEED)), worker)
    except ValueError as error:
        result = Grade("", notes=[str(error)], is_readable=False)
    finally:
        worker.close()
    result = printable(result)
    (root / "results").mkdir(parents=True, exist_ok=True)
    write(root / "results" / "results.json", json.dumps(as_gradescope(result), indent=1))
    print(f"{result.points} of {result.max_points} points")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m lib.course.grading",
        description="Grade students' notebooks, each function on hidden cases.",
    )
    parser.add_argument(
        "submissions", nargs="?", type=Path, help="a folder, or a platform's .zip"
    )
    parser.add_argument(
        "--out", type=Path, help="where results go (default: grades/3 for chapter 3)"
    )
    parser.add_argument("--chapters", help="as 3 or 1,2 (default: all)")
    parser.add_argument(
        "--seed",
        help="a secret word or number for the hidden cases (default: drawn once); "
        "- reads it from the input",
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="workers (one a core)"
    )
    parser.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="of a running Dask cluster, in place of workers here: tcp://host:8786",
    )
    parser.add_argument("--mine", type=Path, help="a folder of your own notebooks")
    parser.add_argument(
        "--gradescope", nargs="?", type=Path, const=Path("/autograder"), metavar="ROOT"
    )
    args = parser.parse_args()
    if sum(bool(x) for x in (args.submissions, args.mine, args.gradescope)) != 1:
        parser.error("expected one of SUBMISSIONS, --mine, --gradescope")
    if args.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {args.jobs}")
    return args


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        print(error)
        sys.exit(2)
    except OSError as error:  # before anything was graded
        print(error)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted")
        sys.exit(130)
