import ast
import contextlib
import ctypes
import functools
import itertools
import os
import shutil
import sys
import time
import warnings

import nbformat
import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from tqdm import tqdm

from lib import generate, interpreter, paged_kv_cache_triton, text
from lib.course import WITHOUT_GPU
from lib.course.attempt import NOT_WRITTEN, ForbiddenCallError, forbid
from lib.course.build import (
    ROOT,
    chapter_texts,
    marked_exercises,
    student_notebook,
)
from lib.course.cases.ch02 import TORCHS_CHECKPOINTS
from lib.course.check import Check, judge
from lib.course.collect import Notebook, register
from lib.course.compare import difference
from lib.course.exercises import exercises, library_answer
from lib.course.fork import ForkDiedError, in_fork
from lib.model import attend_fused


@pytest.fixture
def check():
    yield Check()
    for exercise in exercises().values():
        setattr(exercise.owner, exercise.name, library_answer(exercise.name))


def decode(token_ids):
    return bytes(token_ids.tolist()).decode("utf-8", errors="replace")


def named(name, answer):
    answer.__name__ = name
    return answer


def test_a_right_answer_takes_the_librarys_place(check, capsys):
    result = check(decode)
    assert result.passed and capsys.readouterr().out == "decode: passed\n"
    assert text.decode is decode


def test_no_module_holds_on_to_an_exercise_whose_place_another_takes():
    """By `from lib.x import name` it would go on with what was there at first."""
    for path in sorted((ROOT / "lib").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lib"):
                held = {alias.name for alias in node.names} & set(exercises())
                assert not held, f"{path}, line {node.lineno}: {held}"


def test_a_wrong_answer_changes_nothing_and_is_told_why_in_one_line(check, capsys):
    result = check(named("decode", lambda token_ids: "whale"))
    assert not result.passed
    out = capsys.readouterr().out
    assert out == f"decode: {result.message}\n" and out.count("\n") == 1
    assert "wrong for a dash of three bytes" in out and "got 'whale'" in out
    assert text.decode is library_answer("decode")


def test_a_wrong_answer_after_a_right_one_gives_the_place_back(check):
    check(decode)
    check(named("decode", lambda token_ids: "whale"))
    assert text.decode is library_answer("decode")


def test_an_answer_that_raises_is_shown_its_own_line(check):
    def decode(token_ids):
        return token_ids.no_such_thing

    message = check(decode).message
    assert "AttributeError" in message and "`return token_ids.no_such_thing`" in message


@pytest.mark.parametrize(
    "chapter",
    [text for text in chapter_texts() if marked_exercises(text)],
    ids=lambda path: path.stem,
)
def test_every_untouched_stub_is_not_written_yet(check, chapter, tmp_path):
    cells = student_notebook(chapter).cells
    names = [c.source.split("(")[1][:-1] for c in cells if c.source.startswith("check(")]
    imports = cells[1].source.replace("from lib.course.check import check", "")
    stubs = [c.source for c in cells if "raise NotImplementedError" in c.source]
    path = tmp_path / f"stubs_of_{chapter.stem}.py"
    path.write_text(imports + "\n" + "\n\n".join(stubs))
    sys.path.insert(0, str(tmp_path))
    module = __import__(path.stem)
    sys.path.pop(0)
    assert len(names) == len(stubs) >= 5
    for name in names:
        result = check(getattr(module, name))
        assert not result.passed and result.message == NOT_WRITTEN, name


def test_prints_warnings_and_progress_bars_do_no_harm(check, capfd):
    def decode(token_ids):
        print("debug", token_ids)
        warnings.warn("careful", stacklevel=1)
        return bytes(tqdm(token_ids.tolist())).decode("utf-8", errors="replace")

    assert check(decode).passed
    assert capfd.readouterr() == ("decode: passed\n", "")


class Clock:
    """Of processor time, which only those answers move on that are made here."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def answer(self, *seconds: float):
        """An `attention_flops` that takes as long: a number for each call in which it is
        timed, the last one for all that follow."""
        num_cases = len(exercises()["attention_flops"].cases(0))  # tried before that
        right = library_answer("attention_flops")
        takes = itertools.chain([0] * num_cases, seconds, itertools.repeat(seconds[-1]))

        def attention_flops(config, prompt_len, num_new_tokens):
            self.now += next(takes)
            return right(config, prompt_len, num_new_tokens)

        return attention_flops


@pytest.mark.parametrize(
    "takes, ours_takes, slowdown",
    [
        ([0.6], [0.1], 6),
        ([0.625], [0.125], 5),  # as slow as it may be
        ([0.9, 0.2], [0.1], 2),  # the first call does what is done once
        ([1.5, 1.5, 0.7, 0.8], [0.2, 0.1, 0.3], 7),  # of each the fastest call counts
        ([1.4], [0.4, 0.1], 3.5),  # one round is enough
        ([0.02], [0.0001], 2),  # for so little nobody waits
        ([0.08], [0.0001], 8),
    ],
)
def test_an_answer_far_slower_than_ours_passes_but_is_not_used(
    check, monkeypatch, capsys, takes, ours_takes, slowdown
):
    clock = Clock()
    answer, ours = clock.answer(*takes), clock.answer(*ours_takes)
    monkeypatch.setattr("lib.course.check.process_time", clock)
    monkeypatch.setattr("lib.course.check.library_answer", lambda name: ours)
    result = check(answer)
    assert (result.passed, result.message) == (True, "passed")
    assert result.slowdown == pytest.approx(slowdown)
    said = capsys.readouterr().out
    if slowdown > 5:
        slower = f"{slowdown} times slower: the page goes on with ours"
        assert said == f"attention_flops: passed, but {slower}\n"
        assert result.is_slower and generate.attention_flops is ours
    else:
        assert said == "attention_flops: passed\n"
        assert not result.is_slower and generate.attention_flops is answer


def test_an_answer_that_has_to_wait_for_a_busy_machine_is_not_slower(check):
    def attention_flops(config, prompt_len, num_new_tokens):
        time.sleep(0.06)  # six times what the library is taken to need, by the clock
        return library_answer("attention_flops")(config, prompt_len, num_new_tokens)

    assert not check(attention_flops).is_slower
    assert generate.attention_flops is attention_flops


def test_an_answer_that_leaves_the_interpreter_or_returns_oddities_is_only_wrong(check):
    assert "SystemExit" in check(named("decode", lambda token_ids: sys.exit(3))).message
    for odd in (None, object(), {"text": 1}, torch.zeros(3), float("nan")):
        assert not check(named("decode", lambda token_ids, odd=odd: odd)).passed
        assert not check(named("attend_causal", lambda *args, odd=odd: odd)).passed
        assert not check(named("attention_flops", lambda *args, odd=odd: odd)).passed
        assert not check(named("training_bytes", lambda *args, odd=odd: odd)).passed
        assert not check(named("checkpoint_recursive", lambda *args, odd=odd: odd)).passed


def test_an_answer_that_calls_another_stub_is_told_so(check):
    stub = {}
    exec(compile("def other():\n    raise NotImplementedError", "cell 2", "exec"), stub)
    result = check(named("decode", lambda token_ids: stub["other"]()))
    assert "it calls what is not written yet" in result.message


def test_an_unknown_name_is_told_what_there_is(check):
    result = check(named("decoder", lambda token_ids: ""))
    assert not result.passed and "expected one of decode, attend_causal" in result.message


def test_what_has_another_name_is_found_by_the_name_that_a_cell_gives_it(check):
    text = "lambda token_ids: bytes(token_ids.tolist()).decode(errors='replace')"
    cell = {"check": check}
    exec(f"decode = {text}\nresult = check(decode)", cell)
    assert cell["result"].passed
    assert next(Notebook([f"decode = {text}"], "a notebook").define("decode"))


def test_only_nbgrader_sees_an_exception(check, monkeypatch):
    wrong = named("decode", lambda token_ids: 1)
    check(wrong)
    monkeypatch.setenv("NBGRADER_EXECUTION", "autograde")
    check(decode)
    with pytest.raises(AssertionError, match="decode: wrong for plain letters"):
        check(wrong)


def test_the_summary_counts_points(check, capsys):
    check(decode)
    check(named("attention_flops", lambda *args: 1))
    capsys.readouterr()
    check.summary()
    lines = capsys.readouterr().out.split("\n")
    assert lines[0].split() == ["decode", "passed"]
    assert lines[1].split() == ["attention_flops", "not", "yet"]
    assert lines[2] == "1 of 3 points"


def notebook(path, *sources):
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)


def test_answers_are_collected_from_notebooks_of_which_nothing_else_runs(
    check, tmp_path, capsys
):
    notebook(
        tmp_path / "01_generation.ipynb",
        "import math\nfrom lib import no_such_module\nimport torch",
        "%matplotlib inline",
        "raise SystemExit('a cell was run')",
        "def decode(token_ids):\n    return '?'",
        "def decode(token_ids):\n    ids = bytes(token_ids.tolist())\n"
        "    return ids.decode(errors='replace')",
        "def attention_flops(config, prompt_len, num_new_tokens):\n    return 7",
        "def attend_causal(layer, q, k, v):\n    raise NotImplementedError",
        "def no_exercise():\n    pass",
        "%%time\nTEMPERATURE = 1 / 2\nUNUSED = print('a cell was run')",
        "def next_token_loss(logits, token_ids):\n    return TEMPERATURE",
        "class Odd:\n    raise SystemExit",
        "from lib.training import training_bytes as mine\ntraining_bytes = mine",
    )
    (tmp_path / "00_broken.ipynb").write_text("{")
    shutil.copy(tmp_path / "01_generation.ipynb", tmp_path / "01_generation-Copy1.ipynb")
    notebook(tmp_path / "02_training.ipynb", "def best_num_segments(:")
    check(library_answer("kv_cache_bytes"))
    notebook(tmp_path / "03_kv_cache.ipynb", "def kv_cache_bytes():\n    return 7")
    capsys.readouterr()
    check.collect(tmp_path)
    lines = capsys.readouterr().out.strip().split("\n")
    assert lines[0].startswith("00_broken.ipynb: expected a notebook, got")
    assert lines[1].startswith("attention_flops: wrong for")
    assert lines[2].startswith("next_token_loss: wrong for") and "a float" in lines[2]
    assert lines[3:] == [
        "01_generation: 2 of 5 answers are yours",
        "02_training: 0 of 0 answers are yours",
        "03_kv_cache: 1 of 1 answers are yours",
    ]
    assert text.decode.__code__.co_filename == "<01_generation.ipynb, cell 4>"
    assert generate.attention_flops is library_answer("attention_flops")


def test_kernels_are_left_out_where_nobody_wants_them(check, tmp_path, capsys):
    notebook(
        tmp_path / "05_paged_attention.ipynb",
        "def gather_kernel():\n    return 7",
        "def attend_online(q, k, v):\n    return 7",
    )
    check.collect(tmp_path, kernels=False)
    lines = capsys.readouterr().out.strip().split("\n")
    assert lines[0].startswith("attend_online: ")
    assert lines[1:] == ["05_paged_attention: 0 of 1 answers are yours"]
    assert "gather_kernel" not in check.results


def test_a_folder_without_notebooks_is_named(check, tmp_path, capsys):
    check.collect(tmp_path)
    assert f"expected notebooks in {tmp_path}, found none" in capsys.readouterr().out


def test_untouched_notebooks_have_no_answers_that_are_yours(check, tmp_path, capsys):
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    check.collect(tmp_path / "notebooks")
    lines = capsys.readouterr().out.strip().split("\n")
    assert len(lines) == len(chapter_texts())
    assert all(": 0 of " in line for line in lines), lines


def test_what_was_forbidden_works_again_afterwards():
    name = "torch.nn.functional.scaled_dot_product_attention"
    before = torch.nn.functional.scaled_dot_product_attention
    with pytest.raises(ZeroDivisionError), forbid((name,)):
        assert torch.nn.functional.scaled_dot_product_attention is not before
        raise ZeroDivisionError
    assert torch.nn.functional.scaled_dot_product_attention is before


@pytest.mark.parametrize(
    "expected, got, words",
    [
        (1, 1, None),
        (1, 2, "expected 1, got 2"),
        (1, 1.0, "expected 1, got 1.0"),
        (1, True, "expected 1, got True"),
        ([1, 2], [1, 3], "[1]: expected 2, got 3"),
        ([1, 2], [1], "expected [1, 2], got [1]"),
        ("a", None, "expected 'a', got None"),
        ({"x": 1}, {}, "expected x, got none"),
        ({"x": 1}, {"x": 1, "y": 2}, None),
        (0.1 + 0.2, 0.3, None),
        (np.zeros(2), np.zeros(3), "expected shape (2,), got shape (3,)"),
        (np.zeros(2), np.zeros(2, np.float32), "expected float64, got float32"),
        (np.array([0.1]), np.array([0.1 + 1e-8]), "at [0]: expected 0.1, got 0.10000001"),
        (np.zeros(2), [0, 0], "expected a tensor of shape (2,), got [0, 0]"),
        (np.array([0.0, 1.0]), np.array([0.0, np.nan]), "at [1]: expected 1, got nan"),
        (np.array([np.nan, -np.inf]), np.array([np.nan, -np.inf]), None),
        (np.array([np.inf]), np.array([-np.inf]), "at [0]: expected inf, got -inf"),
        (np.array([1.0]), np.array([1.0 + 1e-12]), None),
        (np.array([3, 4]), np.array([3, 5]), "at [1]: expected 4, got 5"),
    ],
)
def test_differences_are_put_into_words(expected, got, words):
    found = difference(expected, got)
    assert (found and found.strip()) == words


class EqualToEverything:
    def __eq__(self, other):
        return True

    def __ne__(self, other):
        return False


@pytest.mark.parametrize("expected", [1, 0.5, "a", None, [1], np.zeros(2)])
def test_an_object_equal_to_everything_is_equal_to_nothing(expected):
    assert difference(expected, EqualToEverything()) is not None


class Slow:
    def __reduce__(self):
        time.sleep(1000)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_fork_gives_its_answer_and_takes_nothing_with_it_when_it_dies():
    torch.set_num_threads(1)
    seen = []
    assert in_fork(lambda: seen.append(1) or {"sum": torch.ones(3).sum().item()}) == {
        "sum": 3.0
    }
    assert seen == [], "the fork's memory is its own"
    assert in_fork(lambda: None) is None
    with pytest.raises(ForkDiedError, match="crashed .Segmentation fault"):
        in_fork(lambda: ctypes.string_at(0))
    start = time.monotonic()
    with pytest.raises(ForkDiedError, match="took longer than 0.2 seconds"):
        in_fork(lambda: time.sleep(1000), timeout_s=0.2)
    with pytest.raises(ForkDiedError, match="took longer than 0.2 seconds"):
        in_fork(lambda: Slow(), timeout_s=0.2)
    assert time.monotonic() - start < 500, "the copy was waited for"
    assert in_fork(lambda: bytes(10**7)) == bytes(10**7), "more than a pipe holds"
    assert torch.get_num_threads() == 1
    torch.set_num_threads(2)
    assert in_fork(torch.get_num_threads) == 1 and torch.get_num_threads() == 2
    torch.set_num_threads(1)
    with pytest.raises(ForkDiedError, match="ended with status 3"):
        in_fork(lambda: os._exit(3))
    with pytest.raises(ForkDiedError, match="ended with status 1"):
        in_fork(lambda: [][0])


def test_a_kernel_that_crashes_only_now_and_then_is_told_so(check, monkeypatch):
    pytest.importorskip("triton")
    module = sys.modules["lib.course.check"]
    monkeypatch.setattr(module, "_slowdown", lambda *args: ctypes.string_at(0))
    result = check(library_answer("load_row_kernel"))
    words = "launched again and again it crashed (Segmentation fault)"
    assert (result.passed, result.message) == (False, words)


def test_a_kernel_check_needs_triton_and_says_so(check, monkeypatch, capsys):
    monkeypatch.setattr("lib.interpreter.HAS_TRITON", False)

    def gather_kernel(*args):
        raise NotImplementedError

    result = check(gather_kernel)
    assert not result.passed
    assert capsys.readouterr().out == (
        "gather_kernel: needs Triton, which is for Linux: read on, the page goes on "
        "without\n"
    )


# Kernels where they are compiled: tried in a process that interprets them.


@pytest.fixture
def compiled(monkeypatch):
    """As on a machine with a GPU; here no kernel may be launched then."""
    pytest.importorskip("triton")
    monkeypatch.setattr(interpreter, "IS_INTERPRETED", False)
    monkeypatch.setattr(sys.modules["lib.course.check"], "attempt", raising(OSError))


def kernel(tail, tile="", above="", **names):
    """A `load_row_kernel` of which the last lines are these; `tile` follows TILE, and
    `above` stands above it."""
    head = f"""{above}
@triton.jit
def load_row_kernel(x_ptr, out_ptr, x_stride, num_cols, TILE: tl.constexpr{tile}):
    row, col = tl.program_id(0).to(tl.int64), tl.arange(0, TILE)
"""
    triton, tl = interpreter.triton, interpreter.tl
    cell = {"triton": triton, "tl": tl, **names}
    source = head + "".join(f"    {line}\n" for line in tail)
    exec(compile(source, register(f"<{tail}>", source), "exec"), cell)
    return cell["load_row_kernel"]


LOAD = "x = tl.load(x_ptr + row * x_stride + col, mask=col < num_cols, other=0.0)"
STORE = "tl.store(out_ptr + row * TILE + col, x)"


def test_a_kernel_that_passed_in_a_process_of_its_own_is_used_here(check, compiled):
    zero = interpreter.tl.constexpr(0.0)
    answer = kernel([LOAD.replace("0.0", "ZERO"), STORE], ZERO=zero)
    result = check(answer)
    assert (result.passed, result.message) == (True, "passed")
    assert paged_kv_cache_triton.load_row_kernel is answer


@pytest.mark.parametrize(
    "load, says",
    [
        ("x = tl.load(x_ptr + row * x_stride + col)", "bytes read: expected at most 20"),
        ("x = tl.load(x_ptr + (1 << 45) + col)", "crashed (Segmentation fault)"),
        pytest.param(
            "x = tl.load(no_such_name)",
            "'no_such_name' is not defined, in `x = tl.load(",
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_a_wrong_kernel_is_told_the_same_where_kernels_are_compiled(
    check, request, load, says
):
    answer = kernel([load, STORE])
    expected = check(answer).message
    request.getfixturevalue("compiled")
    got = check(answer)
    assert (got.passed, got.message) == (False, expected)
    assert says in expected and "\n" not in expected
    ours = library_answer("load_row_kernel")
    assert paged_kv_cache_triton.load_row_kernel is ours


def test_a_kernel_without_an_end_is_ended_with_all_that_tries_it(
    check, compiled, monkeypatch
):
    module, children = sys.modules["lib.course.check"], []
    popen = module.subprocess.Popen
    for name in WITHOUT_GPU:  # as where there is a GPU: the child must not see it
        monkeypatch.setenv(name, "0")

    def start(*args, **options):
        assert WITHOUT_GPU.items() <= options["env"].items()
        children.append(popen(*args, **options))
        return children[-1]

    monkeypatch.setattr(module.subprocess, "Popen", start)
    monkeypatch.setattr(module, "SECONDS_ELSEWHERE", 1)
    result = check(kernel(["while num_cols > 0:", "    col += 1", LOAD, STORE]))
    assert (result.passed, result.message) == (False, "took longer than 1 seconds")
    (child,) = children
    with pytest.raises(ProcessLookupError):
        os.killpg(child.pid, 0)


def test_a_kernel_that_cannot_be_defined_elsewhere_is_told_so(check, compiled):
    result = check(kernel([LOAD, STORE], tile=" = WIDTH", WIDTH=8))
    words = "the process that was to try it ended: NameError: name 'WIDTH' is not defined"
    assert (result.passed, result.message) == (False, words)


# What an exercise forbids, however an answer came by it.

SDPA = "torch.nn.functional.scaled_dot_product_attention"


def kept_in_a_default(q, attend=torch.nn.functional.scaled_dot_product_attention):
    return attend(q, q, q)


WAYS_TO_ATTEND = {
    "import torch.nn.functional as F": "F.scaled_dot_product_attention",
    "from torch.nn.functional import scaled_dot_product_attention as sdpa": "sdpa",
    "from torch.nn import functional": "functional.scaled_dot_product_attention",
    "import torch": "torch._C._nn.scaled_dot_product_attention",
    "import torch ": "torch.ops.aten.scaled_dot_product_attention",
    "import torch  ": "torch.ops.aten.scaled_dot_product_attention.default",
    "import torch   ": "lambda *qkv: torch._scaled_dot_product_attention_math(*qkv)[0]",
    "import functools, torch.nn.functional as F": (
        "functools.partial(F.scaled_dot_product_attention)"
    ),
    "from lib.model import attend_fused as f": "lambda q, k, v: f(0, q[0], q[0], q[0])",
}
WAYS_TO_CHECKPOINT = {
    "import torch.utils.checkpoint as c": "c.checkpoint",
    "from torch.utils.checkpoint import checkpoint": "checkpoint",
    "from torch.utils.checkpoint import checkpoint as c ": "c.__wrapped__",
    "import torch; from torch.utils import checkpoint": (
        "lambda f, *x, **kw: "
        "checkpoint.checkpoint_sequential([f, torch.clone], 2, *x, **kw)"
    ),
    "from torch.utils.checkpoint import CheckpointFunction as c": (
        "lambda f, *x, **kw: c.apply(f, True, *x)"
    ),
    "from torch.distributed._composable import checkpoint as c": (
        "lambda f, x, **kw: c(Calls(f))(x)"
    ),
}


class Calls(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def imported(line, expression):
    """The function, from a cell that imports it before anything is forbidden."""
    cell = {"Calls": Calls}
    exec(f"{line}\nfunction = {expression}\n", cell)
    exec("def helper(*args, **kwargs):\n    return function(*args, **kwargs)", cell)
    return cell


@pytest.mark.parametrize("line, expression", WAYS_TO_ATTEND.items())
@pytest.mark.parametrize("name", ["function", "helper"])
def test_torchs_attention_is_refused_by_any_name(line, expression, name):
    function, q = imported(line, expression)[name], torch.zeros(1, 2, 3, 4)
    with forbid((SDPA,)), pytest.raises(ForbiddenCallError, match=SDPA):
        function(q, q, q)
    assert function(q, q, q).shape[-3:] == q.shape[1:]


@pytest.mark.parametrize("line, expression", WAYS_TO_CHECKPOINT.items())
@pytest.mark.parametrize("name", ["function", "helper"])
def test_torchs_checkpoint_is_refused_by_any_name(line, expression, name):
    function, x = imported(line, expression)[name], torch.ones(2, requires_grad=True)
    for _ in range(2):
        refused = pytest.raises(ForbiddenCallError, match="torch.utils.checkpoint")
        with forbid(TORCHS_CHECKPOINTS), refused:
            function(torch.sin, x, use_reentrant=False)
        assert torch.equal(function(torch.sin, x, use_reentrant=False), x.sin())


def test_what_was_forbidden_is_whole_again_after_an_error_inside():
    with pytest.raises(ZeroDivisionError), forbid((SDPA, *TORCHS_CHECKPOINTS)):
        raise ZeroDivisionError
    q = torch.zeros(1, 2, 3, 4, requires_grad=True)
    assert kept_in_a_default(q).shape == q.shape
    assert torch.utils.checkpoint.checkpoint(torch.sin, q, use_reentrant=False).sum() == 0


def test_a_default_and_a_closure_are_refused_too():
    q, attend = torch.zeros(1, 2, 3, 4), torch.nn.functional.scaled_dot_product_attention
    for function in (kept_in_a_default, lambda q: attend(q, q, q)):
        with forbid((SDPA,)), pytest.raises(ForbiddenCallError):
            function(q)
        assert function(q).shape == q.shape


def test_what_is_not_forbidden_works_beside_what_is():
    q = torch.randn(3, 4, requires_grad=True)
    with forbid((SDPA,)):
        (q @ q.T).softmax(-1).sum().backward()
        assert torch.nn.functional.silu(q).shape == q.shape
    with forbid(TORCHS_CHECKPOINTS):
        x = torch.zeros(3, 2, 4)
        assert attend_fused(0, x, x, x).shape == x.shape
    with forbid(()):
        assert kept_in_a_default(x).shape == x.shape


@pytest.mark.parametrize("name", ["attend_causal", "attend_cached"])
def test_an_answer_that_imports_torchs_attention_by_name_is_told_so(check, name):
    line = "from torch.nn.functional import scaled_dot_product_attention as sdpa"
    sdpa = imported(line, "sdpa")["helper"]
    answer = named(name, lambda *args: sdpa(*(x[None].double() for x in args[1:4])))
    assert f"{SDPA} is not allowed here: write it yourself" in check(answer).message


class Answer:
    """No function, and without a name or code of its own."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *args):
        return self.function(*args)


def raising(error):
    def answer(*args):
        raise error

    return answer


@pytest.mark.parametrize("wrap", [functools.partial, Answer])
def test_an_answer_without_code_of_its_own_is_told_of_its_errors_too(wrap):
    exercise = exercises()["decode"]
    assert judge(exercise, wrap(decode), seed=0).passed
    message = judge(exercise, wrap(raising(KeyError("a"))), seed=0).message
    assert "raised KeyError: 'a'" in message
    message = judge(exercise, wrap(raising(NotImplementedError("mine"))), seed=0).message
    assert "it calls what is not written yet" in message or message == NOT_WRITTEN


# What a page has set is nobody's mistake.


@contextlib.contextmanager
def as_set(put, value, before):
    put(value)
    try:
        yield
    finally:
        put(before)


STATES = {
    "another dtype": lambda: as_set(
        torch.set_default_dtype, torch.float64, torch.float32
    ),
    "tensors without numbers": lambda: torch.device("meta"),
    "a GPU that is not there": lambda: as_set(torch.set_default_device, "cuda", None),
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
    "only what is deterministic": lambda: as_set(
        torch.use_deterministic_algorithms, True, False
    ),
    "less precise products": lambda: as_set(
        torch.set_float32_matmul_precision, "medium", "highest"
    ),
    "fewer bits": lambda: torch.autocast("cpu"),
    "numpy that raises": lambda: np.errstate(all="raise"),
    "warnings that raise": lambda: warnings_are(lambda: warnings.simplefilter("error")),
}


@contextlib.contextmanager
def warnings_are(put):
    with warnings.catch_warnings():
        put()
        yield


def state():
    """What a page may set."""
    return (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_deterministic_debug_mode(),
        torch.get_float32_matmul_precision(),
        torch.is_autocast_enabled("cpu"),
        np.geterr(),
        list(warnings.filters),
        sys.getrecursionlimit(),
        torch.overrides._len_torch_function_stack(),
    )


@pytest.mark.parametrize(
    "name, answer",
    [
        *itertools.product(STATES, ["append_kv", "next_token_probs"]),
        ("no gradients", "checkpoint"),
        ("inference", "checkpoint"),
    ],
)
def test_a_right_answer_passes_whatever_the_page_has_set(check, name, answer):
    with STATES[name]():
        before = state()
        result = check(library_answer(answer))
        assert state() == before
    assert (result.passed, result.message) == (True, "passed")


def test_an_answer_that_sets_something_sets_it_for_itself(check):
    def decode(token_ids):
        assert torch.get_default_dtype() is torch.float32 and torch.is_grad_enabled()
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        sys.setrecursionlimit(4000)
        return bytes(token_ids.tolist()).decode("utf-8", errors="replace")

    before = state()
    assert check(decode).passed and state() == before


class Odd(str):
    """Text that can be neither shown nor compared."""

    __hash__ = None

    def __repr__(self):
        raise ValueError("no")

    __str__ = __eq__ = __ne__ = __bool__ = __len__ = __iter__ = __repr__


class OddError(Exception):
    def __str__(self):
        raise ValueError("no")


class NoErrorError(BaseException):
    pass


class RaisesInInit:
    def __init__(self, *args):
        raise KeyError("in init")


class RaisesWhenAsked:
    def __getattr__(self, name):
        raise RuntimeError(name)

    def __call__(self, *args):
        return 1 / 0


async def coroutine(*args):
    return "whale"


def generator(*args):
    yield "whale"


ODD_ANSWERS = {
    "odd text": (lambda *args: Odd("whale"), "gave what cannot be compared"),
    "an odd error": (raising(OddError()), "raised OddError: it cannot be shown"),
    "no error at all": (raising(NoErrorError("!")), "raised NoErrorError: !"),
    "an end": (raising(SystemExit(3)), "raised SystemExit: 3"),
    "the end of a generator": (raising(GeneratorExit()), "raised GeneratorExit"),
    "a class": (RaisesInInit, "raised KeyError: 'in init', in `raise KeyError"),
    "an odd object": (RaisesWhenAsked(), "raised ZeroDivisionError: division by zero"),
    "a coroutine": (coroutine, "expected"),
    "a generator": (generator, "expected"),
    "a method of numbers": ((3).__add__, ""),
    "a builtin": (sorted, ""),
    "a number": (3, "not callable"),
    "nothing": (None, "not callable"),
    # With its arguments: Python 3.13.0 counts no calls without any.
    "without an end": (
        lambda *args: ODD_ANSWERS["without an end"][0](*args),
        "Recursion",
    ),
}


@pytest.mark.parametrize("odd", ODD_ANSWERS)
def test_no_answer_is_so_odd_that_check_raises(check, monkeypatch, capsys, odd):
    answer, says = ODD_ANSWERS[odd]
    monkeypatch.setitem(globals(), "decode", answer)
    result = check(answer)
    assert not result.passed and says in result.message, result.message
    assert capsys.readouterr().out == f"decode: {result.message}\n"
    for name in ("append_kv", "attention_flops", "checkpoint", "allocate"):
        result = judge(exercises()[name], answer, seed=0)
        assert not result.passed and "\n" not in result.message


def test_a_print_that_a_page_has_replaced_is_not_used(check, monkeypatch, capsys):
    monkeypatch.setattr("builtins.print", lambda *args: 1 / 0)
    assert check(decode).passed and capsys.readouterr().out == "decode: passed\n"


def test_an_interrupt_goes_through(check):
    with pytest.raises(KeyboardInterrupt):
        check(named("decode", raising(KeyboardInterrupt())))


@pytest.mark.parametrize(
    "make",
    [
        lambda: functools.partial(decode),
        lambda: lambda token_ids: text_of(token_ids),
        lambda: text_of,
        lambda: Answer(text_of),
    ],
)
def test_an_answer_is_known_by_the_name_that_the_page_gave_it(check, monkeypatch, make):
    answer = make()
    assert not hasattr(answer, "__name__") or answer.__name__ != "decode"
    monkeypatch.setitem(globals(), "decode", answer)
    assert check(answer).passed and text.decode is answer


def text_of(token_ids):
    return bytes(token_ids.tolist()).decode("utf-8", errors="replace")


TUNED = {
    "@triton.autotune([triton.Config({}, num_warps=4)], key=[])": "passed",
    "@triton.heuristics({'num_warps': lambda args: 4})": "passed",
    "@triton.autotune([triton.Config({'TILE': 16})], key=[])": "'TILE'",
    "ZERO = 0.0": "Cannot access global variable ZERO from within @jit'ed function",
}


@pytest.mark.parametrize("line", TUNED)
def test_a_kernel_under_other_decorators_or_with_globals_hears_triton(check, line):
    pytest.importorskip("triton")
    load = LOAD.replace("0.0", "ZERO" if "ZERO" in line else "0.0")
    result = check(kernel([load, STORE], above=line))
    assert TUNED[line] in result.message and "\n" not in result.message
