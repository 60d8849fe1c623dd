"""The course on Windows and macOS, as far as other_systems.py can tell from here."""

import ast
import io
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import PureWindowsPath

import nbformat
import other_systems
import pytest
import yaml
from packaging.specifiers import SpecifierSet

from lib.course import ROOT
from lib.course.build import chapter_texts, solved_notebook, student_notebook
from lib.course.grading.files import files_in
from lib.course.grading.grader import Grade
from lib.course.grading.results import Results
from lib.course.grading.submissions import find
from lib.text import print_any_letter

SYSTEMS = ("windows", "macos")
LONG = ("recall", "training", "measure.bench", "measure.bench_state")
PIPES = ("stdout", "stderr")


@pytest.fixture(scope="module")
def on(tmp_path_factory):
    """Runs a command of the course as on another system: exit status, and all it says."""

    def run(system, *arguments, timeout=120):
        folder = tmp_path_factory.mktemp(system)
        result = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            env=other_systems.environment(system, folder),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout,
        )
        return result.returncode, result.stdout.decode("utf-8")

    return run


def solved(number):
    """Of a chapter, and not cell for cell the course's own."""
    text = [text for text in chapter_texts() if text.stem.startswith(number)][0]
    notebook = solved_notebook(text)
    notebook.cells.append(nbformat.v4.new_code_cell("# mine"))
    return notebook


AS_OURS = "import sys; exec(compile(sys.argv[1], 'x', 'exec'), {'__file__': sys.argv[2]})"


def found_by(on, system, code):
    """What a file of the course, with this code, prints there as JSON."""
    status, said = on(system, "-c", AS_OURS, code, ROOT / "tests" / "x.py")
    assert status == 0, said
    return json.loads(said)


ON_WINDOWS = """
import json, os, signal, socket, sys

def works(function):
    try:
        function()
        return True
    except (ModuleNotFoundError, EncodingWarning, PermissionError):
        return False

found = [hasattr(os, "fork"), hasattr(os, "killpg"), hasattr(os, "getcwd")]
found += [hasattr(signal, "SIGKILL"), hasattr(signal, "SIGINT")]
found += [hasattr(socket, "AF_UNIX"), sys.platform, sys.stdout.encoding]
for name in ("resource", "fcntl", "triton", "json"):
    found.append(works(lambda: __import__(name, globals())))
"""


def test_windows_is_without_what_it_has_not(on):
    code = ON_WINDOWS + "print(json.dumps(found))"
    assert found_by(on, "windows", code) == [
        *(False, False, True, False, True, False, "win32", "cp1252"),
        *(False, False, False, True),
    ]


def test_on_windows_what_is_open_is_not_removed(on, tmp_path):
    path = tmp_path / "file"
    code = f"""
import json, mmap, os

def refused(function, *args):
    try:
        return function(*args)
    except PermissionError:
        return "refused"

path, found = {str(path)!r}, []
with open(path, "wb") as file:
    file.write(b"x")
    found += [refused(os.remove, path), refused(os.replace, path, path + "2")]
with open(path, "rb") as file:
    mapped = mmap.mmap(file.fileno(), 1, access=mmap.ACCESS_READ)
found += [refused(os.remove, path)]
mapped.close()
found += [refused(os.replace, path, path + "2"), os.path.exists(path + "2")]
print(json.dumps(found))
"""
    got = found_by(on, "windows", code)
    assert got == ["refused", "refused", "refused", None, True]


ON_MACOS = """
import ctypes, json, os, resource, sys

library = ctypes.CDLL(None)
found = [hasattr(os, "fork"), hasattr(os, "sched_getaffinity"), hasattr(os, "waitid")]
found += [hasattr(library, "prctl"), hasattr(library, "getpid"), sys.platform]
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
try:
    resource.setrlimit(resource.RLIMIT_AS, (2**40, hard))
except ValueError:
    found.append("refused")
print(json.dumps(found))
"""


def test_macos_is_without_what_it_has_not(on):
    got = found_by(on, "macos", ON_MACOS)
    assert got == [True, False, False, False, True, "darwin", "refused"]


@pytest.mark.parametrize(
    "system", ["windows", pytest.param("macos", marks=pytest.mark.nightly)]
)
def test_a_text_comes_with_any_letter_in_it(on, system):
    drawn = ("--temperature", 50, "--seed", 1, "--max-new-tokens", 12)
    command = ("-m", "lib.generate", "--cache", "contiguous", *drawn)
    status, said = on(system, *command, "√ of a whale")
    assert status == 0 and "new tokens: 12" in said and "\ufffd" in said, said


def test_letters_that_a_pipe_does_not_know_are_printed(monkeypatch):
    pipes = {name: io.TextIOWrapper(io.BytesIO(), "cp1252") for name in PIPES}
    for name, pipe in pipes.items():
        monkeypatch.setattr(sys, name, pipe)
    print_any_letter()
    print("γ√\ufffd")
    print("γ", file=sys.stderr)
    monkeypatch.undo()
    written = []
    for pipe in pipes.values():
        pipe.flush()
        written.append(pipe.buffer.getvalue().decode("utf-8").split())
    assert written == [["γ√\ufffd"], ["γ"]]


@pytest.mark.parametrize(
    "module",
    [
        "measure.real_model",
        "measure.pooling",
        "measure.layer_needs",
        *(pytest.param(f"{name}", marks=pytest.mark.nightly) for name in LONG),
    ],
)
def test_commands_that_take_hours_say_how_they_are_called(on, module):
    status, said = on("windows", "-m", f"lib.{module}", "--help")
    assert status == 0 and said.startswith("usage:"), said


def test_without_triton_nothing_is_compiled_and_a_sentence_says_so(on):
    said = on("windows", "-m", "lib.measure.gpu_code")
    assert said == (1, f"expected Triton, which is for Linux{os.linesep}")


def test_a_class_is_not_graded_on_windows(on, tmp_path):
    status, said = on("windows", "-m", "lib.course.grading", tmp_path)
    assert status == 2
    assert said.startswith("expected Linux or macOS: ") and said.count("\n") == 1


@pytest.mark.nightly
def test_ones_own_notebooks_are_tried_on_windows(on, tmp_path):
    nbformat.write(solved("01"), tmp_path / "01_generation.ipynb")
    command = ("-m", "lib.course.grading", "--chapters")
    status, said = on("windows", *command, 1, "--mine", tmp_path)
    assert status == 0 and "9 of 9 points" in said, said


def test_what_is_wrong_with_them_is_said_in_any_letter(on, tmp_path):
    text = [text for text in chapter_texts() if text.stem.startswith("09")][0]
    notebook = student_notebook(text)
    wrong = (
        "def decay_mask(decay, T):\n"
        "    age = torch.arange(T)[:, None] - torch.arange(T)\n"
        "    return (decay[:, None, None] ** (age.clamp(min=0) + 1)).tril()"
    )
    for cell in notebook.cells:
        if cell.source.startswith("def decay_mask"):
            cell.source = wrong
    nbformat.write(notebook, tmp_path / "09_state.ipynb")
    command = ("-m", "lib.course.grading", "--mine", tmp_path, "--chapters", 9)
    status, said = on("windows", *command)
    assert status == 1 and "0 of 12 points" in said, said
    assert "has not faded yet: γ^0 = 1" in said, said


def test_a_class_is_graded_on_macos(on, tmp_path):
    """Where no limit on memory holds, and `os.waitid` is not there: the table says so."""
    folder, out = tmp_path / "class", tmp_path / "grades"
    folder.mkdir()
    nbformat.write(solved("01"), folder / "ada.ipynb")
    command = ("-m", "lib.course.grading", folder, "--out", out, "--chapters", 1)
    status, said = on("macos", *command, "--jobs", 1)
    assert status == 0, said
    table = (out / "grades.csv").read_text(encoding="utf-8")
    assert "ada,9,9,ok," in table and '"limits only, none of memory"' in table


def test_names_that_differ_by_case_are_two_rows_and_two_files(tmp_path):
    """In a zip they may be beside each other, and not in a folder of macOS."""
    path, results = tmp_path / "class.zip", Results(tmp_path / "out", ["decode"], "x")
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("Ann.ipynb", "ann.ipynb", "bob.ipynb"):
            archive.writestr(name, "{}")
    found, _ = find(path)
    names = [submission.student for submission in found]
    assert names[2:] == ["bob"] and all(re.match("[Aa]nn ", name) for name in names[:2])
    assert len({results.path(name).name.casefold() for name in names}) == 3
    assert all("looks like another's" in s.notes[0] for s in found[:2])
    assert not found[2].notes


FORBIDDEN = [
    "con",
    "AUX",
    "nul.x",
    "com1",
    "lpt³",
    "a:b",
    "who?",
    'a"b',
    "a\\b",
    "<",
    "|*",
]


@pytest.mark.parametrize("name", FORBIDDEN)
def test_a_name_that_windows_refuses_makes_a_file_that_it_takes(name, tmp_path):
    results = Results(tmp_path, ["decode"], "x")
    results.keep(Grade(name))
    written = results.path(name)
    assert written.exists() and written.parent == tmp_path / "students"
    assert not PureWindowsPath(written.name).is_reserved()
    assert not set('<>:"/\\|?*') & set(written.name)
    assert results.path(name) != results.path(name + " ")


@pytest.mark.parametrize(
    "name", ["ada", "李 雷", "Zoë_2", "constance", "ada.", "o'neill"]
)
def test_other_names_stay(name, tmp_path):
    assert Results(tmp_path, ["decode"], "x").path(name).name == f"{name}.json"


def test_backslashes_in_an_archive_are_folders(tmp_path):
    with zipfile.ZipFile(tmp_path / "class.zip", "w") as archive:
        info = zipfile.ZipInfo("x")
        info.filename = "ada\\notebooks\\01_generation.ipynb"  # as some tools write it
        archive.writestr(info, "{}")
    names = [file.name for file in files_in(tmp_path / "class.zip")]
    assert names == ["ada/notebooks/01_generation.ipynb"]


def tracked() -> list[str]:
    git = ["git", "ls-files", "-z"]
    listed = subprocess.run(git, cwd=ROOT, capture_output=True, encoding="utf-8")
    return listed.stdout.split("\0")[:-1]


def test_names_of_files_are_good_for_any_system():
    names = tracked()
    if not names:
        pytest.skip("no clone")
    assert len({name.casefold() for name in names}) == len(names)
    for name in names:
        assert len(name) < 100  # of the 260 that Windows has
        for part in name.split("/"):
            assert not PureWindowsPath(part).is_reserved(), name
            assert re.fullmatch(r"[\w.-]*[\w-]", part, re.ASCII), name


def unsaid(source: str) -> list[int]:
    """Lines that read or write text and do not say how it is encoded."""
    found = []
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call):
            continue
        words = {keyword.arg for keyword in call.keywords}
        values = [ast.unparse(value) for value in call.args]
        is_named = isinstance(call.func, ast.Name)
        name = call.func.id if is_named else getattr(call.func, "attr", "")
        is_binary = any(re.fullmatch("'[rwax+]*b[+]?'", value) for value in values)
        is_file = name == "open" and is_named and not is_binary
        is_process = name in ("run", "Popen", "check_output") and "text" in words
        is_text = is_file or is_process or name in ("read_text", "write_text")
        if is_text and "encoding" not in words:
            found.append(call.lineno)
    return found


def test_every_text_of_the_library_says_how_it_is_encoded():
    assert unsaid("open(x)\nopen(x, 'rb')\nx.read_text()\nrun(y, text=True)") == [1, 3, 4]
    for path in (ROOT / "lib").rglob("*.py"):
        assert not unsaid(path.read_text(encoding="utf-8")), path


KERNEL = """
import nbformat, sys
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
about = {"metadata": {"path": sys.argv[2]}}
NotebookClient(notebook, timeout=600, kernel_name="python3", resources=about).execute()
for cell in notebook.cells:
    for output in cell.get("outputs", []):
        print(output.get("text", ""))
"""


@pytest.mark.nightly
@pytest.mark.parametrize("chapter", ["01", "05"])
def test_a_chapter_runs_to_its_end_on_windows(on, chapter):
    path = next((ROOT / "notebooks").glob(f"{chapter}_*.ipynb"))
    status, said = on("windows", "-c", KERNEL, path, path.parent, timeout=1200)
    assert status == 0, said
    if chapter == "05":
        for name in ("load_row", "gather", "paged_decode", "paged_prefill"):
            assert f"{name}_kernel: needs Triton, which is for Linux" in said


@pytest.mark.nightly
@pytest.mark.parametrize("system", SYSTEMS)
def test_the_table_is_measured(on, system, tmp_path):
    out = "--json", tmp_path / "x.json", "--figure", tmp_path / "x.png"
    command = ("-m", "lib.measure.table", "--columns", "recompute")
    status, said = on(system, *command, *out)
    assert status == 0 and "√" not in said and "exact" in said, said
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))["cells"]


@pytest.mark.nightly
@pytest.mark.parametrize("system", SYSTEMS)
def test_what_a_teacher_makes_is_made(on, system, tmp_path):
    for command, words in (
        (("build", "--check"), "up to date"),
        (("grading.gradescope", 3, "--out", tmp_path / "g.zip"), "Configure Autograder"),
        (("release", 3, "--out", tmp_path / "r.zip"), "chapters 1 to 3"),
    ):
        module, *arguments = command
        status, said = on(system, "-m", f"lib.course.{module}", *arguments)
        assert status == 0 and words in said, said


def test_hosted_tests_are_those_of_make_on_every_python_that_the_course_takes():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    path = ROOT / ".github" / "workflows" / "test.yml"
    job = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]["test"]
    pythons = job["strategy"]["matrix"]["python"]
    assert f'requires-python = ">={pythons[0]}"' in project
    assert f"Python {pythons[0]} or later" in readme
    minors = [int(version.removeprefix("3.")) for version in pythons]
    assert minors == list(range(minors[0], minors[0] + len(minors)))
    index = re.search("PIP_EXTRA_INDEX_URL=(https://[^`]+)`", readme)[1]
    assert f"'{index}'" in job["env"]["PIP_EXTRA_INDEX_URL"]
    steps = [step["run"] for step in job["steps"] if "run" in step]
    assert steps[:2] == ["make test", "make site"]
    recipe = re.search(r"^test:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)[1]
    commands = re.split(r" && |\n", recipe.replace("\t@", "").replace(" $(ARGS)", ""))
    here = [step.removeprefix(r".venv\Scripts" + "\\") for step in steps[4:]]
    assert here == [c.removeprefix("$(BIN)/") for c in commands if c]


def test_torch_of_a_fresh_machine_is_one_that_the_course_takes():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    fresh = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    for name in ("torch", "numpy", "matplotlib", "jupyterlab", "tqdm"):
        taken = re.search(rf'"{name}([<>=][^"]+)"', project)[1]
        for version in re.findall(rf"^{name}==([\d.]+)", fresh, re.MULTILINE):
            assert SpecifierSet(taken).contains(version)


def test_the_oldest_versions_taken_are_the_oldest_that_were_tried():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    tried = json.loads((ROOT / "data/results/versions.json").read_text(encoding="utf-8"))
    oldest, newest = (
        run for run in tried["runs"] if run["which"] in ("oldest", "newest")
    )
    for name in ("torch", "triton", "numpy", "matplotlib", "jupyterlab", "tqdm"):
        low, _, high = re.search(rf'"{name}>=([\d.]+)(,<([\d.]+))?', project).groups()
        assert oldest[name].removesuffix(".0") == low, name
        assert SpecifierSet(f">={low}" + (f",<{high}" if high else "")).contains(
            newest[name]
        )
        above = SpecifierSet(f">={high}" if high else "<0")
        major, minor, *_ = newest[name].split(".")
        assert not high or above.contains(f"{major}.{int(minor) + 1}"), name
