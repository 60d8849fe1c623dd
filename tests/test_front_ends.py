"""The notebooks where people open them: Colab, VS Code, JupyterLab, papermill."""

import json
import os
import shutil
import site
import subprocess
import sys

import nbformat
import pytest
from nbclient import NotebookClient

from lib.course import ROOT, build, colab, collect
from lib.course import release as release_module
from lib.course.build import (
    BuildError,
    chapter_texts,
    marked_exercises,
    notebook_paths,
    student_notebook,
)
from lib.course.colab import Address
from lib.course.stubs import answer

ADDRESS = Address("https://github.com/ada/whales", "v0.1.0")
FETCH = ADDRESS.first_cells("notebooks/01_x.ipynb")[1]

CHAPTER = """# %% [markdown]
# # 9. A chapter

# %%
import torch
from lib.course.check import check

# %% exercise="decode"
from lib.text import decode

# %%
check(decode)
"""


@pytest.fixture
def runs(monkeypatch):
    """The names of the chapters that were executed, which is not done: it takes
    seconds."""
    names = []

    def execute(notebook, name):
        names.append(name)
        code_cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        for count, cell in enumerate(code_cells, start=1):
            cell.execution_count = count
        return notebook

    monkeypatch.setattr(build, "execute", execute)
    return names


@pytest.fixture
def chapter(tmp_path, runs):
    """The text of a small chapter, built with an address, in a tree of its own."""
    (tmp_path / "solutions").mkdir(), (tmp_path / "notebooks").mkdir()
    text = tmp_path / "solutions" / "09_small.py"
    text.write_text(CHAPTER)
    build.build(text, ADDRESS)
    return text


# An address


@pytest.mark.parametrize("end", ["", "/", ".git", ".git/"])
def test_an_address_may_end_as_people_copy_it(end):
    assert Address(f"https://github.com/ada/whales{end}", "v1") == Address(
        "https://github.com/ada/whales", "v1"
    )


@pytest.mark.parametrize(
    "repo",
    [
        *("http://github.com/a/b", "git@github.com:a/b.git", "https://gitlab.com/a/b"),
        *("https://github.com/a", "https://github.com/a/b/tree/main", "github.com/a/b"),
        *("https://me@github.com/a/b", "https://github.com.evil.org/a/b"),
        *(
            "https://github.com/a/..",
            "https://github.com/a/b?x",
            "https://github.com/a/ b",
        ),
        *(
            'https://github.com/a/b"',
            "https://github.com/a/{b}",
            "https://github.com/a/b\n",
        ),
    ],
)
def test_what_colab_cannot_open_is_refused(repo):
    with pytest.raises(ValueError, match="REPO: expected https://github.com/OWNER/NAME"):
        Address(repo, "v0.1.0")


@pytest.mark.parametrize(
    "tag", ["", "a/b", "-v1", "a..b", "v1.", "v 1", 'v1"', "{tag}", "v1\n"]
)
def test_what_is_no_tag_or_would_end_early_in_a_link_is_refused(tag):
    with pytest.raises(ValueError, match="TAG: expected a tag, as v0.1.0, got"):
        Address("https://github.com/ada/whales", tag)


def command(monkeypatch, capsys, *arguments) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["build", *map(str, arguments)])
    status = build.main()
    return status, capsys.readouterr().out


def test_the_command_takes_the_tag_of_this_version_unless_it_gets_one(
    chapter, monkeypatch, capsys
):
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    student = notebook_paths(chapter)[0]
    for tags, tag in (((), f"v{project['version']}"), (("--tag", "fall"), "fall")):
        repo = ("--repo", "https://github.com/ada/whales.git")
        assert command(monkeypatch, capsys, chapter, *repo, *tags)[0] == 0
        assert build.address_in(student) == Address(ADDRESS.repo, tag)
        assert command(monkeypatch, capsys, chapter, "--check")[0] == 0


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--repo", "ada/whales"), "REPO: expected https://github.com/OWNER/NAME, got"),
        (("--repo", ADDRESS.repo, "--tag", "a/b"), "TAG: expected a tag, as v0.1.0, got"),
        (("--tag", "v1"), "REPO: expected an address beside the TAG, got none"),
    ],
)
def test_the_command_says_in_a_sentence_what_it_does_not_take(
    chapter, monkeypatch, capsys, arguments, words
):
    before = [path.read_bytes() for path in notebook_paths(chapter)]
    status, said = command(monkeypatch, capsys, chapter, *arguments)
    assert status == 1 and said.startswith(words) and said.count("\n") == 1
    assert [path.read_bytes() for path in notebook_paths(chapter)] == before


# Building


def test_two_cells_come_first_and_all_others_are_as_without(chapter):
    student, executed = (nbformat.read(path, 4) for path in notebook_paths(chapter))
    plain = student_notebook(chapter)
    links, code = student.cells[:2]
    assert student.cells[2:] == plain.cells
    assert (links.cell_type, code.cell_type) == ("markdown", "code")
    where = "https://colab.research.google.com/github/ada/whales/blob/v0.1.0/notebooks/"
    assert f"]({where}09_small.ipynb)" in links.source
    assert "](https://github.com/ada/whales/tree/v0.1.0)" in links.source
    assert "![" not in links.source and "<" not in links.source  # it reads offline too
    assert code.source == FETCH and FETCH.count("\n") < 20
    assert student.metadata == {**plain.metadata, "course": vars(ADDRESS)}
    assert "course" not in executed.metadata
    assert FETCH not in [cell.source for cell in executed.cells]


def test_only_a_notebook_that_is_stale_is_run_again(chapter, runs):
    assert runs == ["09_small"]
    build.build(chapter, ADDRESS)
    assert runs == ["09_small"]
    chapter.write_text(CHAPTER + "\n# %%\n1 + 1\n")
    build.build(chapter, ADDRESS)
    build.check(chapter)
    assert runs == ["09_small"] * 2
    build.build(chapter)  # without an address all is made anew
    assert runs == ["09_small"] * 3
    assert notebook_paths(chapter)[0].read_text(encoding="utf-8") == (
        nbformat.writes(student_notebook(chapter)) + "\n"
    )


def edit(path, change):
    notebook = nbformat.read(path, 4)
    change(notebook)
    nbformat.write(notebook, path)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda n: n.metadata.pop("course"), "is not what 09_small.py gives"),
        (lambda n: n.metadata.course.update(tag="v2"), "is not what 09_small.py gives"),
        (lambda n: n.metadata.course.update(tag="a/b"), "TAG: expected a tag"),
        (lambda n: n.metadata.course.update(repo="x"), "REPO: expected https"),
        (lambda n: n.metadata.course.update(more="x"), "unexpected keyword"),
        (lambda n: n.metadata.update(course=["x"]), "must be a mapping"),
        (lambda n: n.cells.pop(0), "is not what 09_small.py gives"),
        (lambda n: n.cells.pop(1), "is not what 09_small.py gives"),
    ],
)
def test_what_the_metadata_say_and_what_the_cells_do_is_compared(chapter, change, words):
    build.check(chapter)
    edit(notebook_paths(chapter)[0], change)
    with pytest.raises(BuildError, match=words):
        build.check(chapter)


@pytest.mark.parametrize("other", [None, Address(ADDRESS.repo, "v2")])
def test_notebooks_of_several_addresses_are_found(chapter, other, monkeypatch, capsys):
    second = chapter.with_name("10_other.py")
    second.write_text(CHAPTER)
    build.build(second, ADDRESS)
    build.check_one_address([chapter, second])
    build.build(second, other)
    status, said = command(monkeypatch, capsys, "--check", chapter, second)
    assert status == 1 and "expected one address in all notebooks" in said


def test_the_notebooks_of_the_course_have_one_address():
    build.check_one_address(chapter_texts())


def test_a_release_does_not_say_where_the_answers_are(tmp_path, monkeypatch):
    monkeypatch.setattr(release_module, "expected_outputs", lambda *_: {})
    for name in ("README.md", "AGENTS.md", "Makefile"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "lib", tmp_path / "lib")
    (tmp_path / "solutions").mkdir(), (tmp_path / "notebooks").mkdir()
    for text in chapter_texts():
        shutil.copy(text, tmp_path / "solutions")
    for text in chapter_texts(tmp_path):
        path = notebook_paths(text)[0]
        path.write_text(nbformat.writes(student_notebook(text, ADDRESS)))
    files = release_module.release(3, tmp_path)
    assert len([name for name in files if name.endswith(".ipynb")]) == 3
    assert not [name for name, data in files.items() if ADDRESS.repo.encode() in data]
    assert not [
        name
        for name, data in files.items()
        if name.endswith(".ipynb") and (b"fetch_course" in data or b'"course"' in data)
    ]


# On Colab, and anywhere else

# As Colab's kernel: nothing is installed but packages, google.colab is loaded.
KERNEL = """
import sys
sys.path += SITE
if IS_COLAB:
    import types
    sys.modules["google.colab"] = types.ModuleType("google.colab")
"""
PRELUDE = KERNEL.replace("SITE", repr(site.getsitepackages()))

SCRIPT = """
import io, contextlib, json, os
def run(namespace):
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(CELL, namespace)
    return said.getvalue()
namespace = {}
first = run(namespace), os.getcwd()
second = run(namespace), os.getcwd()
try:
    import lib.course
    found = os.path.relpath(lib.course.__file__, START)
except ImportError:
    found = None
names = sorted(name for name in namespace if not name.startswith("__"))
print(json.dumps({"first": first, "second": second, "lib": found, "names": names}))
"""


def environment(tmp_path, bare):
    """In which the address leads to a repository on this disk."""
    config = tmp_path / "gitconfig"
    config.write_text(f'[url "file://{bare}"]\n\tinsteadOf = {ADDRESS.repo}\n')
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and "GIT" not in k}
    return {**kept, "GIT_CONFIG_GLOBAL": str(config), "GIT_CONFIG_NOSYSTEM": "1"}


def publish(tree, bare, env):
    """The files in `tree`, in a bare repository, under the tag of ADDRESS. What comes
    later there is of no use."""
    author = ("-c", "user.name=Ada", "-c", "user.email=ada@example.org")
    commit = (*author, "commit", "--quiet", "--message", "The course")
    for arguments in (
        ("init", "--quiet"),
        ("add", "--all"),
        commit,
        ("tag", ADDRESS.tag),
        ("rm", "--quiet", "-r", "lib"),
        commit,
        ("clone", "--quiet", "--bare", ".", bare),
    ):
        subprocess.run(["git", *arguments], cwd=tree, env=env, check=True)


PROJECT = """
[project]
dependencies = [
    "torch>=999,<1000",  # none has it
    "numpy>=1",
    "no-such-package>=3; platform_system != 'Nowhere'",
    "nor-such-a-one>=3; platform_system == 'Nowhere'",
    "jupyterlab>=999",
]
"""


@pytest.fixture
def published(tmp_path):
    """An environment in which a small course can be fetched: of the library only what
    the cell needs."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    tree, bare = tmp_path / "tree", tmp_path / "bare.git"
    for name in ("lib/__init__.py", "lib/course/__init__.py", "lib/course/colab.py"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    (tree / "notebooks").mkdir()
    (tree / "notebooks" / "01_x.ipynb").write_text("{}")
    (tree / "pyproject.toml").write_text(PROJECT)
    env = environment(tmp_path, bare)
    publish(tree, bare, env)
    return env


def run_cell(folder, env, is_colab):
    """What came of the cell, run twice by a process of its own; on its stderr nothing."""
    start = PRELUDE.replace("IS_COLAB", str(is_colab))
    script = f"CELL, START = {FETCH!r}, {str(folder)!r}\n{start}\n{SCRIPT}"
    command = [sys.executable, "-S", "-c", script]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return json.loads(done.stdout)


def test_on_colab_the_cell_fetches_the_course_once(published, tmp_path):
    pytest.importorskip("tomllib")
    folder = tmp_path / "content"
    folder.mkdir()
    notebooks = str(folder / "whales-v0.1.0" / "notebooks")
    found = run_cell(folder, published, is_colab=True)
    said = "This runtime: expected torch>=999,<1000, got "
    assert found["first"][0].startswith(said)
    assert found["first"][0].endswith(
        "; expected no-such-package>=3, found none. What needs it may fail.\n"
    )
    assert found["first"][0].count("\n") == 1 and found["first"][1] == notebooks
    assert found["second"] == ["", notebooks]
    assert found["lib"] == "whales-v0.1.0/lib/course/__init__.py"
    assert found["names"] == ["fetch_course"]
    assert [path.name for path in folder.iterdir()] == ["whales-v0.1.0"]

    # After a restart it is there, and nobody asks for it again.
    shutil.rmtree(tmp_path / "bare.git")
    again = run_cell(folder, published, is_colab=True)
    assert again == found


def test_anywhere_else_the_cell_does_nothing(published, tmp_path):
    folder = tmp_path / "content"
    folder.mkdir()
    found = run_cell(folder, published, is_colab=False)
    assert found["first"] == found["second"] == ["", str(folder)]
    assert found["lib"] is None and found["names"] == ["fetch_course"]
    assert list(folder.iterdir()) == []


@pytest.mark.nightly  # a chapter takes minutes
@pytest.mark.parametrize("stem", ["01_generation", "04_paged_kv_cache"])
def test_on_colab_a_chapter_runs_to_its_end(stem, tmp_path, monkeypatch):
    """The notebook alone in an empty folder, in a kernel that has no course."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    tree, bare, folder = tmp_path / "tree", tmp_path / "bare.git", tmp_path / "content"
    leave_out = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in ("lib", "data", "notebooks"):
        shutil.copytree(ROOT / name, tree / name, ignore=leave_out)
    shutil.copy(ROOT / "pyproject.toml", tree)
    env = environment(tmp_path, bare)
    publish(tree, bare, env)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_NOSYSTEM"):
        monkeypatch.setenv(name, env[name])

    start = PRELUDE.replace("IS_COLAB", "True")
    start += "from ipykernel.kernelapp import launch_new_instance as start; start()"
    command = [sys.executable, "-S", "-c", start, "-f", "{connection_file}"]
    spec = {"argv": command, "display_name": "Colab", "language": "python"}
    kernel = tmp_path / "jupyter" / "kernels" / "colab" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    kernel.write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))

    folder.mkdir()
    (text,) = [text for text in chapter_texts() if text.stem == stem]
    notebook = student_notebook(text, ADDRESS)
    notebook.cells.append(nbformat.v4.new_code_cell("import lib\nprint(lib.__file__)"))
    where = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=600, kernel_name="colab", resources=where).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code[0].source == FETCH and not code[0].outputs
    assert code[-1].outputs[0].text.startswith(str(folder / "whales-v0.1.0" / "lib"))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [o for o in outputs if o.get("name") == "stderr"]
    said = [o.text for c in code for o in c.outputs if c.source.startswith("check(")]
    assert len(said) == len(marked_exercises(text))
    assert all(": not written yet" in line for line in said), said


def test_a_runtime_that_has_all_is_not_spoken_of(monkeypatch, capsys):
    pytest.importorskip("tomllib")
    colab.say_what_differs()
    assert capsys.readouterr().out == ""  # the course's own environment
    versions = {"numpy": "1.26.4", "torch": "2.11.0+cu130", "tqdm": "5.0.0rc1"}
    monkeypatch.setattr(
        colab.importlib.metadata, "version", lambda n: versions.get(n, "9")
    )
    found = [words for words in colab.differences() if "triton" not in words]
    assert found == ["expected numpy>=2.0, got 1.26.4"]


USES_THE_SAME_NAMES = """
import os, sys, subprocess
folder = "whales"
sys.path.append(folder)
def mine():
    return os, sys, subprocess, folder, repo, say_what_differs
"""


def test_no_answer_needs_the_cell():
    """Nor is it executed where a chapter collects answers, which may be on Colab."""
    for text in chapter_texts():
        notebook = student_notebook(text, ADDRESS)
        cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
        cells.append(USES_THE_SAME_NAMES)
        assert cells[0] == FETCH
        ours, plain = (collect.Notebook(of_one, "x") for of_one in (cells, cells[1:]))
        for name in ("mine", *(mark.exercise for mark in marked_exercises(text))):
            needed = ours.needed(name)
            assert not [s for s in needed if s.place[0] == 0], name
            sources = [s.source for s in needed]
            assert sources == [s.source for s in plain.needed(name)] != [], name


def test_a_notebook_with_the_cell_is_graded_as_one_without(no_hurry):
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    from lib.course.grading.grader import Worker, grade

    right = answer("lib.text", ["decode"])
    uses = right.replace("def decode", "def right") + "\n\n" + USES_ITS_NAMES
    own = ["import torch", "import os, sys, subprocess", "folder = 'whales'"]
    worker = Worker()
    try:
        for cells in ([*own, right], [*own, uses], [*own, WRONG], [*own, FAILS]):
            cells = [*cells, "check(decode)"]
            ours, plain = (
                grade(submission([*first, *cells]), ["decode"], 4711, worker)
                for first in ([FETCH], [])
            )
            assert ours.scores == plain.scores
            assert ours.notes == plain.notes
            expected = 0 if cells[-2] in (WRONG, FAILS) else 1
            assert ours.scores["decode"].points == expected, ours.scores
    finally:
        worker.close()


USES_ITS_NAMES = """
def decode(token_ids):
    assert folder == 'whales' and os.sep in os.getcwd() and 'torch' in sys.modules
    assert subprocess.run is not None
    return right(token_ids)
"""
WRONG = "def decode(token_ids):\n    return 'whale'"
FAILS = "def decode(token_ids):\n    return no_such_name"


def submission(cells):
    from lib.course.grading.submissions import Submission

    cells = [nbformat.v4.new_code_cell(source) for source in cells]
    content = nbformat.writes(nbformat.v4.new_notebook(cells=cells)).encode()
    return Submission("ada", [("01.ipynb", lambda: content)])


# What a front end writes into a notebook that somebody has run and saved in it


def in_jupyterlab(notebook):
    notebook["metadata"]["language_info"].update(VERSION)
    for count, cell in enumerate(_code(notebook), start=1):
        cell["execution_count"] = count
        cell["metadata"]["execution"] = {"iopub.execute_input": "2026-11-27T12:00:00Z"}
        cell["metadata"]["collapsed"] = False


def in_vs_code(notebook):
    in_jupyterlab(notebook)
    notebook["metadata"]["kernelspec"] = {
        "display_name": ".venv (3.13.0)",
        "language": "python",
        "name": "python3",
    }
    for cell in notebook["cells"]:
        cell["metadata"].pop("execution", None)
        cell["source"] = "".join(cell["source"]).splitlines(keepends=True)
    notebook["cells"].append(
        {
            "cell_type": "code",
            "execution_count": None,
            "id": "0f0f0f0f",
            "metadata": {"vscode": {"languageId": "shellscript"}},
            "outputs": [],
            "source": ["ls\n"],
        }
    )


def in_vs_code_without_outputs(notebook):
    in_vs_code(notebook)
    _clear(notebook)


def in_colab(notebook):
    """Its files are of format 4.0, in which a cell's id is in its metadata."""
    notebook["nbformat_minor"] = 0
    notebook["metadata"]["colab"] = {"provenance": [], "toc_visible": True}
    notebook["metadata"]["accelerator"] = "GPU"
    for number, cell in enumerate(notebook["cells"]):
        cell.pop("id")
        cell["metadata"]["id"] = f"Xq{number:010}"
    for count, cell in enumerate(_code(notebook), start=1):
        cell["execution_count"] = count
        cell["metadata"] |= {
            "colab": {"base_uri": "https://localhost:8080/"},
            "outputId": "d1c9354e-43db-45ab-c38b-b24bcee97356",
            "executionInfo": {
                "status": "ok",
                "timestamp": 1722608125960,
                "user_tz": -60,
                "elapsed": 5820,
                "user": {"displayName": "Ada", "userId": "121360"},
            },
        }


def in_colab_without_outputs(notebook):
    """Its setting "omit code cell output when saving"."""
    in_colab(notebook)
    notebook["metadata"]["colab"]["private_outputs"] = True
    _clear(notebook)


def in_papermill(notebook):
    in_jupyterlab(notebook)
    notebook["metadata"]["papermill"] = {"exception": None, "version": "2.7.0"}
    for cell in notebook["cells"]:
        cell["metadata"] |= {"tags": [], "papermill": {"status": "completed"}}


FRONT_ENDS = (
    *(in_jupyterlab, in_vs_code, in_vs_code_without_outputs),
    *(in_colab, in_colab_without_outputs, in_papermill),
)
VERSION = {
    "codemirror_mode": {"name": "ipython", "version": 3},
    "file_extension": ".py",
    "mimetype": "text/x-python",
    "nbconvert_exporter": "python",
    "pygments_lexer": "ipython3",
    "version": "3.13.0",
}


def _code(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def _clear(notebook):
    for cell in _code(notebook):
        cell.update(execution_count=None, outputs=[])
        cell["metadata"].pop("executionInfo", None)


@pytest.fixture(params=FRONT_ENDS, ids=lambda save: save.__name__)
def saved(request, chapter):
    """The text of a chapter whose student's notebook was saved by a front end, with an
    answer in it."""
    path = notebook_paths(chapter)[0]
    notebook = json.loads(path.read_text(encoding="utf-8"))
    answers = answer("lib.text", ["decode"]).splitlines(keepends=True)
    for cell in notebook["cells"]:
        if cell["metadata"].get("nbgrader", {}).get("solution"):
            cell["source"] = answers
    request.param(notebook)
    path.write_text(json.dumps(notebook, indent=2, ensure_ascii=False), encoding="utf-8")
    return chapter


def test_our_metadata_are_there_when_a_front_end_has_saved(saved):
    path = notebook_paths(saved)[0]
    ours, found = student_notebook(saved, ADDRESS), nbformat.read(path, as_version=4)
    nbformat.validate(found)
    assert build.address_in(path) == ADDRESS
    for cell, wanted in zip(found.cells, ours.cells):
        assert cell.cell_type == wanted.cell_type
        assert wanted.metadata.items() <= cell.metadata.items()
    assert found.metadata.kernelspec.name == "python3"


def test_a_notebook_that_a_front_end_has_saved_is_not_overwritten(saved):
    before = notebook_paths(saved)[0].read_bytes()
    for address in (None, ADDRESS):
        with pytest.raises(BuildError, match="somebody worked in it"):
            build.build(saved, address)
    assert notebook_paths(saved)[0].read_bytes() == before


def test_a_notebook_that_a_front_end_has_saved_is_graded_as_ours(saved, worker):
    from lib.course.grading.grader import grade
    from lib.course.grading.submissions import find

    path = notebook_paths(saved)[0]
    (found,), _ = find(path.parent)
    score = grade(found, ["decode"], 4711, worker).scores["decode"]
    assert score.points == 1, score
    ((name, decode),) = collect.answers(path)
    assert name == "decode" and decode.__module__ == "__main__"


@pytest.fixture(scope="module")
def worker(no_hurry):
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    from lib.course.grading.grader import Worker

    worker = Worker()
    yield worker
    worker.close()


def test_a_fresh_notebook_has_what_front_ends_ask_for(chapter):
    """A kernel's name and language; ids, in a format that has them."""
    notebook = nbformat.read(notebook_paths(chapter)[0], as_version=4)
    assert notebook.metadata.kernelspec == {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    }
    assert notebook.metadata.language_info == {"name": "python"}
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert all(cell.id for cell in notebook.cells)
    build.build(chapter, ADDRESS)  # and nobody is taken to have worked in it


@pytest.mark.parametrize("text", chapter_texts(), ids=lambda path: path.stem)
def test_what_a_chapter_shows_needs_no_widgets_no_html_and_no_colours(text):
    """So that every front end shows it, and a terminal reads it out."""
    notebook = nbformat.read(text.with_suffix(".ipynb"), as_version=4)
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        if cell.source.startswith("check("):
            assert [output.get("name") for output in outputs] == ["stdout"], cell.source
            assert outputs[0].text.count("\n") == 1
        for output in outputs:
            plain = {"text/plain", "text/markdown", "image/png"}
            assert set(output.get("data", {})) <= plain, cell.source
            said = output.get("text", output.get("data", {}).get("text/plain", ""))
            assert not set(said) & set("\r\x1b"), cell.source
