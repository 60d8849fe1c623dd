"""The command: the table, the files, the pages, and what may come between."""

import contextlib
import csv
import errno
import functools
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
from distributed import Client, LocalCluster
from helpers import only_linux

from lib.course import ROOT
from lib.course.build import chapter_texts, solved_notebook, student_notebook
from lib.course.exercises import exercises, names_of
from lib.course.grading import __main__ as command
from lib.course.grading import cluster as clusters
from lib.course.grading import report, results
from lib.course.grading.grader import Grade, Score, Worker
from lib.course.grading.submissions import find

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")

CHAPTER_4 = [text for text in chapter_texts() if text.stem.startswith("04")][0]
POINTS_4 = sum(exercises()[name].points for name in names_of("4"))


SEED = ("--chapters", "4", "--jobs", "1", "--seed", "secret word")


def solved():
    """By a student, and not cell for cell the course's own."""
    notebook = solved_notebook(CHAPTER_4)
    notebook.cells.append(nbformat.v4.new_code_cell("# mine"))
    return notebook


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five submissions of chapter 4."""
    folder = tmp_path_factory.mktemp("class")
    nbformat.write(solved(), folder / "ada.ipynb")
    nbformat.write(student_notebook(CHAPTER_4), folder / "bob.ipynb")
    (folder / "李 雷").mkdir()
    nbformat.write(solved(), folder / "李 雷" / "04.ipynb")
    (folder / "=cmd.ipynb").write_text("{")
    endless = solved()
    loop = "def allocate(*args):\n    while True: pass\n\n\ncheck(allocate)"
    endless.cells.append(nbformat.v4.new_code_cell(loop))
    nbformat.write(endless, folder / "zoe.ipynb")
    return folder


def run(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["grading", *map(str, arguments)])
    return command.main()


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """What a run wrote that nothing came between, and what it said."""
    out, said = tmp_path_factory.mktemp("whole"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        assert run(patch, folder, "--out", out, *SEED) == 0
    return out, said.getvalue()


@pytest.fixture(scope="module")
def warm_worker():
    """One for all commands that grade a single folder: it starts in seconds."""
    worker = Worker()
    yield worker
    worker.close()


@pytest.fixture
def one_worker(warm_worker, monkeypatch):
    monkeypatch.setattr(command, "Worker", lambda: warm_worker)
    monkeypatch.setattr(warm_worker, "close", lambda: None)


# The command, which waits for ever with the page of the last student that is named.
WAITING = """
import runpy, sys, time
from lib.course.grading import report
last, page = sys.argv.pop(), report.student_page
def student_page(grade):
    if grade.student == last:
        time.sleep(1000)
    return page(grade)
report.student_page = student_page
runpy.run_module("lib.course.grading", run_name="__main__", alter_sys=True)
"""


def start(folder, out, last: str):
    return subprocess.Popen(
        [sys.executable, "-u", "-c", WAITING, folder, "--out", out, *SEED, last],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        # Python listens to Ctrl-C only where whoever starts it has not switched it off.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def rows(path):
    with open(path, encoding="utf-8-sig", newline="") as file:
        return {row["student"]: row for row in csv.DictReader(file)}


def test_a_class_gets_a_table_files_and_pages(
    folder, whole, tmp_path, monkeypatch, capsys
):
    out, folder = tmp_path / "out", shutil.copytree(folder, tmp_path / "class")
    shutil.copytree(whole[0], out)
    table = (out / "grades.csv").read_bytes()
    found = rows(out / "grades.csv")
    assert {name: (int(row["points"]), row["status"]) for name, row in found.items()} == {
        "'=cmd": (0, "unreadable"),
        "ada": (POINTS_4, "ok"),
        "bob": (0, "ok"),
        "zoe": (POINTS_4 - exercises()["allocate"].points, "timeout"),
        "李 雷": (POINTS_4, "ok"),
    }
    for row in found.values():
        assert int(row["max_points"]) == POINTS_4 and len(row["sha256"]) == 64
        assert sum(int(row[n]) for n in names_of("4")) == int(row["points"])
    kept = json.loads((out / "students" / "李 雷.json").read_text("utf-8"))
    assert kept["score"] == POINTS_4 and len(kept["tests"]) == 8
    assert "secret word" not in (out / "students" / "ada.json").read_text()
    assert "5 submissions" in whole[1]
    page = (out / "class.html").read_text("utf-8")
    links = re.findall(r'href="(students/[^"]+)"', page)
    assert len(set(links)) == 5 and "%E6%9D%8E%20%E9%9B%B7.html" in page
    assert (out / "students" / "bob.html").read_text().count("<summary>A hint") == 8

    # Again: what was graded is kept, and the seed with it; what took too long is not.
    assert run(monkeypatch, folder, "--out", out, "--chapters", "4") == 0
    assert "4 of 5 were graded before" in capsys.readouterr().out
    assert (out / "grades.csv").read_bytes() == table

    # A new submission is graded, and no other.
    capsys.readouterr()
    shutil.copy(folder / "ada.ipynb", folder / "bob.ipynb")
    assert run(monkeypatch, folder, "--out", out, "--chapters", "4") == 0
    assert "3 of 5 were graded before" in capsys.readouterr().out
    assert int(rows(out / "grades.csv")["bob"]["points"]) == POINTS_4


def test_a_run_that_was_ended_goes_on_where_it_was(folder, whole, tmp_path):
    """Interrupted, then killed, while the page of a student is written."""
    cut, kept = tmp_path / "cut", []
    for how, last in ((signal.SIGINT, "bob"), (signal.SIGKILL, "zoe"), (None, "nobody")):
        process = start(folder, cut, last)
        if how:
            waited_for = {"bob": "ada", "zoe": "bob"}[last]
            while not list(cut.glob(f"students/{waited_for}*.json")):
                assert process.poll() is None, process.communicate()[0]
                time.sleep(0.02)
            assert not (cut / "grades.csv").exists()
            process.send_signal(how)
        said = process.communicate(timeout=300)[0]
        if kept:
            assert f"{kept[-1]} of 5 were graded before" in said
        kept.append(len(list(cut.glob("students/*.json"))))
        assert len(list(cut.glob("students/*.html"))) == kept[-1]
        if how is signal.SIGINT:
            assert process.returncode == 130
            assert "interrupted: 2 of 5 are graded and kept" in said
    assert process.returncode == 0 and kept == [2, 3, 5]
    table = (whole[0] / "grades.csv").read_bytes()
    assert (cut / "grades.csv").read_bytes() == table, "graded twice, the same"


def test_a_full_disk_loses_nothing(folder, tmp_path, monkeypatch, capsys):
    out, fsync, calls = tmp_path / "out", os.fsync, []
    few = tmp_path / "class"
    few.mkdir()
    for source, name in (("=cmd", "ada"), ("bob", "bob"), ("bob", "cy")):
        shutil.copy(folder / f"{source}.ipynb", few / f"{name}.ipynb")

    def full(file):
        calls.append(file)
        if len(calls) > 3:  # settings, a file and a page
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    assert run(monkeypatch, few, "--out", out, *SEED) == 1
    said = capsys.readouterr().out
    assert "No space left on device" in said and "1 of 3 are graded and kept" in said
    assert len(list((out / "students").glob("*.json"))) == 1
    monkeypatch.setattr(os, "fsync", fsync)
    assert run(monkeypatch, few, "--out", out, *SEED) == 0
    assert "1 of 3 were graded before" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            ["no_such_folder"],
            "submissions: expected a folder or a .zip, got no_such_folder",
        ),
        (["--mine", "no_such_folder"], "expected a folder of notebooks"),
        ([ROOT / "lib"], "expected notebooks in"),
        (["--mine", ROOT / "lib"], "expected notebooks in"),
        (
            ["--mine", ".", "--chapters", "10"],
            "expected some of 1, 2, 3, 4, 5, 6, 7, 8, 9, got '10'",
        ),
        (
            ["lib", "--out", "lib/grades"],
            "--out: expected a folder outside of lib, got lib",
        ),
        (["lib", "--out", "lib"], "--out: expected a folder outside of lib, got lib"),
        (
            ["lib/course", "--out", "lib"],
            "--out: expected a folder without lib/course in",
        ),
    ],
)
def test_bad_input_is_told_what_was_expected(monkeypatch, tmp_path, arguments, words):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=re.escape(words)):
        run(monkeypatch, "--out", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_ones_own_notebooks_have_an_exit_status(folder, one_worker, monkeypatch, capsys):
    assert run(monkeypatch, "--mine", folder / "李 雷", "--chapters", "4") == 0
    assert f"{POINTS_4} of {POINTS_4} points" in capsys.readouterr().out
    assert run(monkeypatch, "--mine", folder / "李 雷", "--chapters", "3") == 1
    assert "kv_cache_bytes         0 of 1  not there" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content, points", [("solved", POINTS_4), ("broken", 0), (None, 0)]
)
def test_gradescope_finds_its_file(
    folder, one_worker, tmp_path, monkeypatch, content, points
):
    (tmp_path / "submission").mkdir()
    if content:
        path = tmp_path / "submission" / "mine.ipynb"
        shutil.copy(
            folder / {"solved": "ada.ipynb", "broken": "=cmd.ipynb"}[content], path
        )
    assert run(monkeypatch, "--gradescope", tmp_path, "--chapters", "4") == 0
    got = json.loads((tmp_path / "results" / "results.json").read_text())
    assert got["score"] == points and isinstance(got["output"], str)
    for test in got["tests"]:
        assert test.keys() >= {"name", "score", "max_score", "status", "output"}
        assert test["status"] in ("passed", "failed")


# An answer that says where it finds the seed in what belongs to the grader.
SPY = """
def allocate(*args):
    import glob
    import lib.course
    root, found = lib.course.ROOT, []
    for path in [*root.glob("*"), *map(lib.course.Path, glob.glob("/proc/*/cmdline"))]:
        try:
            found += ["4lphabet"] * (b"4lphabet" in path.read_bytes())
        except OSError:
            pass
    raise RuntimeError(f"read {found}")


check(allocate)
"""


def test_the_zip_for_gradescope_runs_where_it_is_unpacked(folder, tmp_path):
    root, file = tmp_path / "autograder", tmp_path / "gradescope.zip"
    zip_it = [sys.executable, "-m", "lib.course.grading.gradescope", "4", "--out", file]
    zip_it += ["--seed", "4lphabet"]
    said = subprocess.run(zip_it, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "it grades with the seed" in said.stdout
    with zipfile.ZipFile(file) as archive:
        archive.extractall(root / "source")
        modes = {i.filename: i.external_attr >> 16 for i in archive.infolist()}
    assert modes["run_autograder"] == modes["setup.sh"] == 0o755
    assert not any(name.startswith(("solutions", "tests", "data")) for name in modes)
    assert file.stat().st_size < 10**6
    (root / "submission").mkdir()
    spy = solved()
    spy.cells.append(nbformat.v4.new_code_cell(SPY))
    nbformat.write(spy, root / "submission" / "ada.ipynb")
    shutil.copytree(ROOT / "solutions", root / "submission" / "solutions")
    (root / "venv" / "bin").mkdir(parents=True)
    (root / "venv" / "bin" / "python").symlink_to(sys.executable)
    environment = {"PATH": os.environ["PATH"], "AUTOGRADER": str(root)}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)  # of the link's own packages
    subprocess.run(["bash", root / "source/run_autograder"], env=environment, check=True)
    written = (root / "results" / "results.json").read_text()
    got = json.loads(written)
    assert got["score"] == POINTS_4 - exercises()["allocate"].points
    assert "left out, the course's own is in folders called solutions" in got["output"]
    assert "RuntimeError: read" in written and "4lphabet" not in written


def graded(message="wrong for <b>x</b> (T=3)", student="<script>alert(1)</script>"):
    scores = {name: Score(0, 1, message) for name in ("decode", "append_kv")}
    return Grade(student, scores, notes=["<img src=x>"], sha256="0" * 64)


def test_what_students_wrote_cannot_run_in_a_page():
    for page in (
        report.student_page(graded()),
        report.class_page([graded()], lambda student: "x"),
    ):
        assert "<script>" not in page and "<b>x" not in page and "<img src=x" not in page
        assert "&lt;script&gt;" in page


def test_every_exercise_has_a_hint_in_the_report():
    assert all(report.hint(name) for name in exercises())


def test_each_choice_of_chapters_has_a_folder_of_its_own(monkeypatch):
    outs = []
    monkeypatch.setattr(command, "grade_class", lambda path, out, *_: outs.append(out))
    for options in (["--chapters", "3"], [], ["--out", "x"]):
        monkeypatch.setattr(sys, "argv", ["grading", "folder", *options])
        command.main()
    assert outs == [Path("grades/3"), Path("grades/all"), Path("x")]


def test_names_too_long_for_a_file_do_not_meet(tmp_path):
    kept = results.Results(tmp_path, ["decode"], "1")
    long = ["ß" * 120 + end for end in "ab"]
    for name in long:
        kept.keep(graded(student=name))
    assert len({kept.path(name) for name in long}) == 2
    assert kept.kept(long[0], "0" * 64).student == long[0]
    assert kept.kept(long[0], "1" * 64) is None, "another submission"
    assert results.Results(tmp_path, ["decode"], "2").kept(long[0], "0" * 64) is None
    with pytest.raises(ValueError, match="found those of chapters 1: name another"):
        results.Results(tmp_path, ["append"], "2")


@only_linux
def test_half_a_character_in_a_name_or_a_message_is_written_all_the_same(tmp_path):
    kept = results.Results(tmp_path, ["decode"], "1")
    kept.keep(graded("wrong: \ud83d", student="ada"))
    assert kept.kept("ada", "0" * 64).points == 0
    folder = tmp_path / "class"
    folder.mkdir()
    with open(os.fsencode(folder) + b"/Ren\xe9e.ipynb", "w") as file:
        file.write("{")
    (found,), _ = find(folder)
    kept.keep(graded(student=found.student))
    assert kept.kept(found.student, "0" * 64)


SETTINGS = {"chapters": [1], "seed": "1", "salt": "2"}
DAMAGED = [
    *("", "{", "[]", "3", "null", '"x"', "{}", "[" * 10**5, "\ud83d"),
    *({**SETTINGS, "chapters": value} for value in (1, None, "1", [10], [[1]], {"1": 1})),
    *({**SETTINGS, "seed": value} for value in (1, None, [], "")),
    *({**SETTINGS, "salt": value} for value in (1, None)),
]


@pytest.mark.parametrize("content", DAMAGED, ids=lambda value: str(value)[:50])
def test_damaged_settings_are_set_aside(tmp_path, capsys, content):
    path = tmp_path / "settings.json"
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    kept = results.Results(tmp_path, ["decode"], None)
    assert json.loads(path.read_text())["seed"] == kept.seed
    aside = path.with_name("settings.json.damaged")
    assert (
        aside.exists()
        and "another seed unless --seed gives it" in capsys.readouterr().out
    )


def changed(tree, *keys, to):
    """The same JSON, with something else at that place."""
    tree = json.loads(json.dumps(tree))
    at = tree
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = to
    return tree


PLACES = [
    *(("extra_data",), ("extra_data", "grade"), ("extra_data", "grade", "student")),
    *(("extra_data", "grade", "scores"), ("extra_data", "grade", "notes")),
    ("extra_data", "grade", "scores", "decode"),
    ("extra_data", "grade", "scores", "decode", "points"),
    ("extra_data", "grade", "scores", "decode", "message"),
]


@pytest.mark.parametrize("place", [(), *PLACES], ids=str)
def test_a_damaged_file_is_graded_again(tmp_path, capsys, place):
    kept = results.Results(tmp_path, ["decode"], "1")
    grade = graded(student="ada")
    del grade.scores["append_kv"]
    kept.keep(grade)
    whole, aside = kept.path("ada").read_text(), kept.path("ada", ".json.damaged")
    assert kept.kept("ada", "0" * 64) == grade and not aside.exists()
    for value in (None, 3, "x", [], [3], {}, {"x": 3}):
        if place and place[-1] == "notes" and value == []:
            continue
        if place and (place[-1], value) in (("points", 3), ("message", "x")):
            continue
        text = json.dumps(
            changed(json.loads(whole), *place, to=value) if place else value
        )
        kept.path("ada").write_text(text)
        assert kept.kept("ada", "0" * 64) is None
        assert aside.exists() and "graded again" in capsys.readouterr().out
        aside.unlink()
    kept.path("ada").write_text(whole[: len(whole) // 2])
    assert kept.kept("ada", "0" * 64) is None and aside.exists()


def test_what_crashed_is_tried_again(tmp_path):
    kept = results.Results(tmp_path, ["decode", "append_kv"], "1")
    for status, is_kept in (("ok", True), ("timeout", False), ("crashed", False)):
        grade = graded(student="ada")
        grade.scores["decode"].status = status
        kept.keep(grade)
        assert (kept.kept("ada", "0" * 64) is not None) == is_kept


FORMULAS = {
    "=cmd": "'=cmd",
    "-1": "'-1",
    "＝cmd": "'＝cmd",
    "eve;=cmd|x": "eve;'=cmd|x",
    "eve, @x": "eve, '@x",
    ' "+x': " \"'+x",
    "expected -1; got a-b": "expected -1; got a-b",
}


def test_no_cell_of_the_table_is_a_formula_whatever_parts_it(tmp_path):
    kept = results.Results(tmp_path, ["decode", "append_kv"], "1")
    for student, written in FORMULAS.items():
        grade = graded(student=student)
        grade.notes = [student]
        (row,) = rows(kept.write_table([grade])).values()
        assert (row["student"], row["notes"]) == (written, written)


def test_words_of_students_are_printed_in_a_line_that_does_no_harm(tmp_path):
    evil = "\x1b[2J\u202eevil\r\n\u2066\x00" + "x" * 41_015 + "end"
    grade = results.printable(graded(evil, student="ada"))
    grade.notes = results.printable(replace(graded(), notes=[evil])).notes
    kept = results.Results(tmp_path, ["decode", "append_kv"], "1")
    kept.keep(grade)
    kept.write_table([grade])
    written = [path.read_text("utf-8") for path in tmp_path.rglob("*.*")]
    written += [report.student_page(grade), report.class_page([grade], str)]
    for text in written:
        assert not re.search("[\x1b\u202e\u2066\x00\r]|u001b|x{500}", text)
    assert " [2Jevil  " in grade.notes[0] and grade.notes[0].endswith("xend")
    assert len(grade.notes[0]) == len(grade.scores["decode"].message) == 500


def test_notes_without_an_end_are_cut_to_a_cell_that_is_read_again(tmp_path):
    notes = [f"{number}.ipynb: {'n' * 1000}" for number in range(100)]
    grade = results.printable(replace(graded(student="eve"), notes=notes))
    kept = results.Results(tmp_path, ["decode", "append_kv"], "1")
    (row,) = rows(kept.write_table([grade])).values()
    assert row["notes"].startswith("0.ipynb: n") and len(row["notes"]) < 5_100
    assert row["notes"].endswith("n; and 90 notes more")


# As on Windows, of which this is all that the command may notice.
WITHOUT_FORK = """
import os, runpy, sys
import psutil  # there it needs none of these
del os.fork
sys.modules.update(resource=None, fcntl=None, pwd=None, termios=None)
runpy.run_module("lib.course.grading", run_name="__main__", alter_sys=True)
"""


def test_without_fork_ones_own_notebooks_are_tried_and_no_class(folder, tmp_path):
    def said(*arguments):
        return subprocess.run(
            [sys.executable, "-c", WITHOUT_FORK, *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )

    shutil.copy(folder / "ada.ipynb", tmp_path / "04_mine.ipynb")
    mine = said("--mine", tmp_path, "--chapters", "4")
    assert mine.returncode == 0 and f"{POINTS_4} of {POINTS_4} points" in mine.stdout
    assert said("--mine", tmp_path / "none").returncode == 2
    of_a_class = said(folder, "--out", tmp_path / "out")
    assert of_a_class.returncode == 2 and not of_a_class.stderr
    assert of_a_class.stdout.startswith("expected Linux or macOS")


@pytest.fixture
def cluster():
    """A scheduler, and two processes of one thread."""
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with LocalCluster(**options, silence_logs=50) as cluster:
        yield cluster


def test_a_cluster_that_loses_a_process_writes_the_same_table(
    cluster, folder, whole, tmp_path, monkeypatch
):
    killed, page = [], report.student_page

    def student_page(grade):
        """After the first row one of the two is lost, in the middle of another."""
        if not killed:
            killed.append(next(iter(cluster.workers.values())).pid)
            os.kill(killed[0], signal.SIGKILL)
        return page(grade)

    monkeypatch.setattr(report, "student_page", student_page)
    out, on = tmp_path / "out", ("--scheduler", cluster.scheduler_address)
    assert run(monkeypatch, folder, "--out", out, *SEED, *on) == 0
    assert killed and killed[0] != next(iter(cluster.workers.values())).pid
    assert (out / "grades.csv").read_bytes() == (whole[0] / "grades.csv").read_bytes()


def test_a_cluster_that_cannot_be_used_is_told(
    cluster, folder, tmp_path, monkeypatch, capsys
):
    def start_on(address):
        on = ("--scheduler", address)
        return run(monkeypatch, folder, "--out", tmp_path / "out", *SEED, *on)

    monkeypatch.setattr(clusters, "SECONDS_TO_CONNECT", 1)
    for address in ("tcp://127.0.0.1:9", "nowhere", "http://127.0.0.1:9"):
        with pytest.raises(ValueError, match="expected a Dask scheduler at " + address):
            start_on(address)
    monkeypatch.setattr(clusters, "version_here", lambda: "another")
    assert start_on(cluster.scheduler_address) == 1
    assert "expected version another of the course on every" in capsys.readouterr().out
    cluster.scale(0)
    with Client(cluster) as client:
        while client.nthreads():
            time.sleep(0.05)
    with pytest.raises(ValueError, match="expected workers at .*, found none"):
        start_on(cluster.scheduler_address)


def test_without_dask_it_is_told_how_to_get_it(folder, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "lib.course.grading.cluster")
    monkeypatch.delattr("lib.course.grading.cluster")
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ValueError, match=r"expected Dask installed, .*\[cluster\]"):
        run(monkeypatch, folder, "--out", tmp_path / "out", "--scheduler", "tcp://x:1")
