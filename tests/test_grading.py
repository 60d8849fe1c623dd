"""What submissions may hold, and what each must give.

Two exercises, `decode` and `append_kv`: what goes wrong in the first must not cost the
second. Every attack that was ever tried on the grader stays here.
"""

import contextlib
import io
import json
import linecache
import os
import re
import socket
import subprocess
import tempfile
import textwrap
import time
import tracemalloc
import zipfile
from pathlib import Path

import nbformat
import numpy as np
import pytest
from helpers import only_linux

from lib.course import ROOT, collect
from lib.course.check import SEED
from lib.course.compare import difference, show
from lib.course.exercises import exercises
from lib.course.grading import files as handed_in
from lib.course.grading import grader, sandbox, submissions, wire
from lib.course.grading.grader import Worker, grade
from lib.course.grading.submissions import Submission, find
from lib.course.grading.worker import COMPILING, DONE, READY, TIMEOUT
from lib.course.stubs import answer, stub
from lib.interpreter import HAS_TRITON

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")

NAMES = ["decode", "append_kv"]
NAMES_WITHOUT_GPU = [n for n, e in exercises().items() if HAS_TRITON or not e.is_kernel]
SECRET = 4711
IMPORTS = "import torch\nfrom lib import kv_cache\nfrom lib.kv_cache import new_positions"
DECODE, APPEND = answer("lib.text", ["decode"]), answer("lib.kv_cache", ["append_kv"])
WRONG = "def decode(token_ids):\n    return 'whale'"
BOTH, ONLY_APPEND, ONLY_DECODE, NONE = (1, 2), (0, 2), (1, 0), (0, 0)


@pytest.fixture(scope="module")
def worker(no_hurry):
    worker = Worker()
    yield worker
    worker.close()


def notebook(*cells: str, **metadata) -> bytes:
    cells = [nbformat.v4.new_code_cell(source) for source in cells]
    return nbformat.writes(nbformat.v4.new_notebook(cells=cells, **metadata)).encode()


def submission(*contents: bytes) -> Submission:
    files = [(f"{i}.ipynb", lambda c=content: c) for i, content in enumerate(contents)]
    return Submission("ada", files)


def points(worker, *contents: bytes, seed: int = SECRET):
    result = grade(submission(*contents), NAMES, seed, worker)
    return tuple(score.points for score in result.scores.values()), result


def body(source: str) -> str:
    """A `decode` with this body; its name for the right answer is `right`."""
    right = DECODE.replace("def decode", "def right")
    source = textwrap.indent(textwrap.dedent(source).strip(), "    ")
    return f"{right}\n\n\ndef decode(token_ids):\n{source}"


# Accidents: cells of a notebook, and what they must give.
ACCIDENTS = {
    "right answers": ([DECODE, APPEND], BOTH),
    "stubs": (
        [stub("lib.text", ["decode"], []), stub("lib.kv_cache", ["append_kv"], [])],
        NONE,
    ),
    "a wrong answer": ([WRONG, APPEND], ONLY_APPEND),
    "nothing": ([], NONE),
    "a syntax error": (["def decode(token_ids:\n    return", APPEND], ONLY_APPEND),
    "an endless loop": ([body("while True: pass"), APPEND], ONLY_APPEND),
    "an endless loop at the top of a cell": (["while True: pass", DECODE, APPEND], BOTH),
    "an endless loop in what a definition needs": (
        [
            "def forever():\n    while True: pass",
            "X = forever()",
            body("return X"),
            APPEND,
        ],
        ONLY_APPEND,
    ),
    "a wait, as on a busy machine": (
        [
            body(
                """
                import time
                if not hasattr(decode, "waited"): decode.waited = time.sleep(3.3)
                return right(token_ids)
                """
            ),
            APPEND,
        ],
        BOTH,
    ),
    "a long sleep": ([body("import time; time.sleep(1000)"), APPEND], ONLY_APPEND),
    "a loop in C": ([body("return sum(range(10**12))"), APPEND], ONLY_APPEND),
    "deep recursion": ([body("return decode(token_ids)"), APPEND], ONLY_APPEND),
    "recursion without a limit": (
        [
            body(
                "import sys; sys.setrecursionlimit(10**9)\n"
                "f = lambda x: [f(x) for _ in range(2)]\nreturn f(1)"
            ),
            APPEND,
        ],
        ONLY_APPEND,
    ),
    "check cells overwritten": (["def check(f): pass", DECODE, APPEND], BOTH),
    "check cells twice": ([DECODE, "check(decode)", "check(decode)", APPEND], BOTH),
    "os._exit": ([body("import os; os._exit(0)"), APPEND], ONLY_APPEND),
    "exit()": ([body("exit()"), APPEND], ONLY_APPEND),
    "a segmentation fault": (
        [body("import ctypes; ctypes.string_at(0)"), APPEND],
        ONLY_APPEND,
    ),
    "a process that kills itself": (
        [body("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"), APPEND],
        ONLY_APPEND,
    ),
    "one terabyte": ([body("return torch.zeros(2**37).double()"), APPEND], ONLY_APPEND),
    "six gigabytes, touched": (
        [body("return len(bytearray(6 * 2**30))"), APPEND],
        ONLY_APPEND,
    ),
    "six gigabytes of shared memory, touched": (
        [
            body(
                "import mmap\nm = mmap.mmap(-1, 6 * 2**30)\n"
                "for i in range(0, len(m), 2**20): m[i:i + 2**20] = bytes(2**20)"
            ),
            APPEND,
        ],
        ONLY_APPEND,
    ),
    "100 MB printed": (
        [body("print('x' * 10**8)\nreturn right(token_ids)"), APPEND],
        BOTH,
    ),
    "100,000 prints": (
        [body("for i in range(10**5): print(i)\nreturn right(token_ids)"), APPEND],
        BOTH,
    ),
    "a print, a warning and a progress bar": (
        [
            "import warnings\nfrom tqdm import tqdm",
            body(
                "print('debug')\nwarnings.warn('careful')\n"
                "for _ in tqdm(range(3)): pass\nreturn right(token_ids)"
            ),
            APPEND,
        ],
        BOTH,
    ),
    "the solution twice, the second wrong": ([DECODE, WRONG, APPEND], ONLY_APPEND),
    "the solution twice, the second right": ([WRONG, DECODE, APPEND], BOTH),
    "cells in another order": ([APPEND, DECODE], BOTH),
    "the first cell edited, and run by hand": (
        ["import torch\nprint('hello')\nraise ValueError", DECODE, APPEND],
        BOTH,
    ),
    "a helper in another cell": (
        ["def helper(x):\n    return right(x)", body("return helper(token_ids)"), APPEND],
        BOTH,
    ),
    "a constant in another cell": (
        ["MODE = 'replace'", DECODE.replace('"replace"', "MODE"), APPEND],
        BOTH,
    ),
    "a constant that an if decides on": (
        ["if True:\n    MODE = 'replace'", DECODE.replace('"replace"', "MODE"), APPEND],
        BOTH,
    ),
    "a failing import of what is not needed": (["import pandas_x", DECODE, APPEND], BOTH),
    "an import under try": (
        [
            "try:\n    import not_there\nexcept ImportError:\n    not_there = None",
            DECODE.replace("return", "return not_there or"),
            APPEND,
        ],
        BOTH,
    ),
    "magics and shell commands": (
        ["%matplotlib inline\n!ls\nx = !ls", "%%time\n" + DECODE, "!rm -rf ~\n" + APPEND],
        BOTH,
    ),
    "a shell command in the answer's cell, far down": (
        [DECODE + "\n\n!ls", APPEND],
        BOTH,
    ),
    "a line that begins with %": (
        [body("n = (3\n     % 2)\nreturn right(token_ids)"), APPEND],
        BOTH,
    ),
    "a cell in another language": (["%%bash\nexit 1", DECODE, APPEND], BOTH),
    "the name used again for a number": ([DECODE, APPEND, "decode = 3"], BOTH),
    "another name for it": (
        [DECODE.replace("def decode", "def mine"), "decode = mine", APPEND],
        BOTH,
    ),
    "a lambda": (
        ["decode = lambda t: bytes(t.tolist()).decode('utf-8', 'replace')", APPEND],
        BOTH,
    ),
    "a class that is called": (
        [
            DECODE.replace("def decode", "def right"),
            "class Decode:\n    __name__ = 'decode'\n"
            "    def __call__(self, t):\n        return right(t)\ndecode = Decode()",
            APPEND,
        ],
        BOTH,
    ),
    "input()": ([body("input()\nreturn right(token_ids)"), APPEND], ONLY_APPEND),
    "a training loop on the page": (
        ["import time", "for _ in range(10**9): time.sleep(1)", DECODE, APPEND],
        BOTH,
    ),
    "imports with a star": (["from math import *", DECODE, APPEND], BOTH),
    "an interrupt": ([body("raise KeyboardInterrupt"), APPEND], ONLY_APPEND),
    "a definition that ends the process": (
        ["import os\nclass X:\n    os._exit(0)", "Y = X", body("return Y"), APPEND],
        ONLY_APPEND,
    ),
    "a table that is filled below": (
        [
            "T = {}",
            "T['mode'] = 'replace'",
            DECODE.replace('"replace"', "T['mode']"),
            APPEND,
        ],
        BOTH,
    ),
    "a list that is filled below": (
        ["T = []", "T.append('replace')", DECODE.replace('"replace"', "T[0]"), APPEND],
        BOTH,
    ),
    "an attribute of the function": (
        [DECODE.replace('"replace"', "decode.mode"), "decode.mode = 'replace'", APPEND],
        BOTH,
    ),
    "a page that changes what it imports": (
        [
            "import os\ntorch.manual_seed(os._exit(0))\ntorch.x = os._exit(0)",
            DECODE,
            APPEND,
        ],
        BOTH,
    ),
    "inputs changed": (
        [body("out = right(token_ids)\ntoken_ids += 1\nreturn out"), APPEND],
        BOTH,  # decode's driver makes the tensor: nobody sees it
    ),
}


@pytest.mark.parametrize("name", ACCIDENTS)
def test_an_accident_costs_its_own_exercise_and_no_other(
    worker, no_hurry, monkeypatch, name
):
    cells, expected = ACCIDENTS[name]
    if expected == ONLY_APPEND:  # much of it does not end
        monkeypatch.setitem(no_hurry, "decode", 1)
    if name == "a wait, as on a busy machine":  # longer than this, by the clock
        monkeypatch.setitem(no_hurry, "decode", 3)
    got, result = points(worker, notebook(IMPORTS, *cells))
    assert got == expected, [score.message for score in result.scores.values()]


GIVE_UP = "return 'whale'"

# Attacks on `decode`: none may give its point, or take that of `append_kv`.
ATTACKS = {
    "calls the library's own": body(
        "from lib import text\nreturn text.decode(token_ids)"
    ),
    "keeps the library's own": "from lib.text import decode as ours\n"
    + body("return ours(token_ids)"),
    "hands in the library's own": "from lib import text\ndecode = text.decode",
    "imports it under its name": "from lib.text import decode",
    "asks the checks for it": "from lib.course.exercises import library_answer\n"
    "decode = library_answer('decode')",
    "takes it out of the memory": body(
        """
        import gc
        for f in gc.get_objects():
            if getattr(f, "__name__", "") == "decode" and f.__module__ == "lib.text":
                return f(token_ids)
        """
    ),
    "takes it out of the check": body(
        """
        from lib.course import check
        return check.library_answer("decode")(token_ids)
        """
    ),
    "equal to everything": body(
        """
        class Any(str):
            __eq__ = lambda self, other: True
            __ne__ = lambda self, other: False
            __hash__ = str.__hash__
        return Any("whale")
        """
    ),
    "equal to everything, and no text": body(
        """
        class Any:
            __eq__ = lambda self, other: True
        return Any()
        """
    ),
    "replaces the comparison": body(
        """
        from lib.course import compare
        compare.difference = compare.verdict = lambda *args: None
        """
        + GIVE_UP
    ),
    "replaces torch.allclose and numpy's": body(
        """
        import numpy, torch
        torch.allclose = torch.equal = numpy.array_equal = lambda *a, **k: True
        """
        + GIVE_UP
    ),
    "replaces the driver": body(
        """
        from lib.course.drivers import ch01
        ch01.decode = lambda answer, token_ids: {"text": "whale"}
        """
        + GIVE_UP
    ),
    "replaces the worker's attempt": body(
        """
        import sys
        worker = sys.modules["__main__"]
        worker.attempt = lambda *args: {"outputs": {}, "inputs": args[2]}
        """
        + GIVE_UP
    ),
    "replaces the cases": body(
        """
        from lib.course.exercises import exercises
        object.__setattr__(exercises()["decode"], "cases", lambda seed: [])
        """
        + GIVE_UP
    ),
    "deletes asserts": "import ast, sys\n"
    "class NoAsserts(ast.NodeTransformer):\n"
    "    def visit_Assert(self, node): return ast.Pass()\n"
    "sys.modules['builtins'].AssertionError = ValueError\n" + body(GIVE_UP),
    "says that it is done": body(
        """
        import os, struct
        from lib.course.grading import wire
        message = wire.encode({"status": "done", "words": None})
        for fd in range(3, 64):
            try: os.write(fd, struct.pack("<Q", len(message)) + message)
            except OSError: pass
        """
        + GIVE_UP
    ),
    "sends outputs of its own": body(
        """
        import os, struct
        from lib.course.grading import wire
        message = wire.encode({"outputs": [], "inputs": {"token_ids": []}})
        for fd in range(3, 64):
            for _ in range(30):
                try: os.write(fd, struct.pack("<Q", len(message)) + message)
                except OSError: pass
        os._exit(0)
        """
    ),
    "sends right outputs, and more of them than there are cases": DECODE.replace(
        "def decode", "def right"
    )
    + textwrap.dedent(
        """

        def decode(token_ids):
            import os, struct
            from lib.course.grading import wire
            pipe = [fd for fd in range(3, 64) if os.path.exists(f"/proc/self/fd/{fd}")]
            for text in (b"whale",) + (b"whale",) * 40:
                ids = {"token_ids": list(text)}
                message = {"outputs": {"text": "whale"}, "inputs": ids}
                message = wire.encode(message)
                for fd in pipe:
                    try: os.write(fd, struct.pack("<Q", len(message)) + message)
                    except OSError: pass
            os._exit(0)
        """
    ),
    "raises half a character": "def decode(t): raise ValueError('\\ud83d')",
    "sends what is no message": body(
        """
        import os
        for fd in range(3, 64):
            try: os.write(fd, b"\\x10\\0\\0\\0\\0\\0\\0\\0" + b"x" * 16)
            except OSError: pass
        """
        + GIVE_UP
    ),
    "sends a message without an end": body(
        """
        import os
        for fd in range(3, 64):
            try:
                while True: os.write(fd, b"\\xff" * 65536)
            except OSError: pass
        """
        + GIVE_UP
    ),
    "gives a text without an end": body("return 'x' * 10**9"),
    "gives ten million numbers": body("return [0] * 10**7"),
    "gives what contains itself": body("x = []; x.append(x); return x"),
    "gives a number of ten thousand digits": body("return 10**10000"),
    "ignores the alarms": body(
        """
        import signal
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        signal.signal(signal.SIGPROF, signal.SIG_IGN)
        while True: pass
        """
    ),
    "catches the alarm": body(
        """
        while True:
            try:
                while True: pass
            except BaseException: pass
        """
    ),
    "stops itself": body(
        "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)\n" + GIVE_UP
    ),
    "kills its parent": body(
        "import os, signal; os.kill(os.getppid(), signal.SIGKILL)\n" + GIVE_UP
    ),
    "kills everyone": body(
        "import os, signal\nif os.getppid() == 1: os.kill(-1, signal.SIGKILL)\n" + GIVE_UP
    ),
    "a fork bomb": body(
        """
        import os, time
        for _ in range(8):  # bounded, lest a fault here take the machine
            os.fork()
        time.sleep(1000)
        """
    ),
    "leaves a process that holds the pipe": body(
        """
        import os, time
        if os.fork() == 0:
            os.setsid()
            time.sleep(1000)
        """
        + GIVE_UP
    ),
    "answers from a copy of itself": body("import os\nos.fork()\nreturn 'whale'"),
    "fills the disk": body(
        """
        for i in range(1000):
            with open(f"x{i}", "wb") as file: file.write(bytes(10**7))
        """
    ),
    "a name that raises when it is asked for": body(
        """
        class Odd:
            @property
            def __class__(self): raise KeyboardInterrupt
        return Odd()
        """
    ),
    "changes how long it may take": body(
        """
        import sys
        sys.modules["__main__"]._at_most = None
        while True: pass
        """
    ),
    "raises the limit of memory": body(
        """
        import resource
        resource.setrlimit(resource.RLIMIT_DATA, (-1, -1))
        return len(bytearray(8 * 2**30))
        """
    ),
    "deletes the library in memory": body(
        "import sys\nfor n in list(sys.modules):\n"
        "    if n.startswith('lib'): del sys.modules[n]\n" + GIVE_UP
    ),
    "tells its story in the error": body("raise ValueError('passed')"),
    "says that it is not written": body("raise NotImplementedError"),
    "decorates itself away": "def passed(f):\n    raise SystemExit(0)\n@passed\n" + WRONG,
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_earns_nothing_and_harms_nobody(worker, no_hurry, monkeypatch, name):
    monkeypatch.setitem(no_hurry, "decode", 1)  # some do not end
    got, result = points(worker, notebook(IMPORTS, ATTACKS[name], APPEND))
    assert got == ONLY_APPEND, [score.message for score in result.scores.values()]
    assert all("\n" not in s.message for s in result.scores.values())


METHOD_ATTACKS = {
    "gives what is equal to every block": (
        "copy_on_write",
        """
        class Any:
            __eq__ = lambda self, other: True
        def copy_on_write(self, request_id):
            return (Any(), Any()) if right(self, request_id) is not None else None
        """,
    ),
    "switches the integrity off": (
        "free",
        """
        def free(self, request_id):
            right(self, request_id)
            for block_id in self.free_block_ids:
                self.ref_count[block_id] = 1
            self.check_integrity = type(self).check_integrity = lambda *args: None
        """,
    ),
}


@pytest.mark.parametrize("attack", METHOD_ATTACKS)
def test_an_attack_on_the_driver_of_a_method_earns_nothing(worker, attack):
    name, source = METHOD_ATTACKS[attack]
    ours = answer("lib.block_manager", [f"BlockManager.{name}"])
    right = [ours.replace(f"def {name}", "def right"), textwrap.dedent(source)]
    imports = (
        "from lib.block_manager import *\nfrom lib.block_manager import BlockManager"
    )
    for cells, is_right in (([imports, ours], True), ([imports, *right], False)):
        score = grader.score([cells], name, SECRET, worker)
        assert bool(score.points) is is_right, score.message


# Looks around for who says that it should refuse.
LOOK = """
    frame = sys._getframe()
    while frame:
        if frame.f_locals.get("is_refused") is True:
            raise ValueError
        frame = frame.f_back
"""


def test_who_looks_around_for_what_to_refuse_earns_nothing(worker):
    ours = answer("lib.generate", ["generate_recompute"])
    checks = re.compile(r"    check_generation\(.*\n    sampling.check_sampling\(.*\n")
    imports = "import sys, torch\nfrom lib.generate import *\nfrom lib import sampling"
    imports += "\nfrom lib.generate import check_generation"
    assert len(checks.findall(ours)) == 1
    for source, num_points in ((ours, 2), (checks.sub(LOOK, ours), 0)):
        score = grader.score([[imports, source]], "generate_recompute", SECRET, worker)
        assert score.points == num_points, score.message


@pytest.mark.parametrize("name", NAMES_WITHOUT_GPU)
def test_the_librarys_own_answer_is_nowhere_to_be_found(worker, name):
    cells = f"from lib.course.exercises import library_answer\n{name} = 7\n"
    exercise = exercises()[name]
    for take in (
        f"{name} = library_answer({name!r})",
        f"import {exercise.target.split('.')[0]}.{exercise.target.split('.')[1]}\n"
        f"ours = {exercise.target}\n"
        f"def {name}(*args, **kwargs): return ours(*args, **kwargs)",
    ):
        result = grader.score([[cells, take]], name, SECRET, worker)
        assert result.points == 0, result.message
        assert "right, but" not in result.message, "a kernel that only did not compile"


def test_nor_are_its_parts(worker):
    cells = [
        "import torch\nfrom lib.checkpointing import Checkpoint",
        "def checkpoint(run, x):\n"
        "    return Checkpoint.apply(run, x, torch.empty(0, requires_grad=True))",
    ]
    result = grader.score([cells], "checkpoint", SECRET, worker)
    assert result.points == 0 and "in `return Checkpoint.apply" in result.message


WRONG_TENSORS = {
    "probs.float()": "expected float64, got float32",
    "probs[None]": "got shape (1,",
    "probs * float('nan')": "got nan",
    "probs.to('meta')": "the device meta",
    "probs.tolist()": "a list, not a tensor",
    "probs.bfloat16()": "a tensor of bfloat16",
    "logits.zero_()": "it changed its inputs",
}


@pytest.mark.parametrize("gives", WRONG_TENSORS)
def test_a_wrong_kind_of_tensor_is_told_what_it_is(worker, gives):
    ours = answer("lib.sampling", ["next_token_probs"])
    imports = (
        "import torch\nimport torch.nn.functional as F\n"
        "from lib.sampling import check_sampling, subtract_largest"
    )
    cells = [
        imports,
        ours.replace("def next_token_probs", "def right"),
        "def next_token_probs(logits, **settings):\n"
        f"    probs = right(logits, **settings)\n    return {gives}",
    ]
    right = grader.score([[imports, ours]], "next_token_probs", SECRET, worker)
    result = grader.score([cells], "next_token_probs", SECRET, worker)
    assert (right.points, result.points) == (2, 0)
    assert WRONG_TENSORS[gives] in result.message, result.message


class Forger:
    """Answers as a worker would that a student has taken over."""

    sandbox = "none"

    def __init__(self, status, words, attempts):
        self.reply = {"status": status, "words": words, "failed": "", "called": True}
        self.attempts = attempts

    def ask(self, job, is_enough):
        made = []
        for attempted in self.attempts:
            made.append(attempted)
            if is_enough(len(made) - 1, attempted):
                break
        return {**self.reply, "attempts": made}


def test_no_reply_makes_the_grader_fail_or_give_points_for_wrong_outputs():
    cases = [case for case, _ in grader.tried_on("decode", SECRET)[0]]
    right = [
        {"outputs": expected, "inputs": case.inputs}
        for case, expected in grader.tried_on("decode", SECRET)[0]
    ]
    odd = [7, None, "x", [], {}, {"outputs": 3}, {"outputs": {}, "inputs": {}}]
    odd += [{"outputs": {"text": "", "says": says}, "inputs": {}} for says in ("", [])]
    odd += [{"error": 3}, {"needs": []}, {"needs": "decode"}, {"outputs": {"text": []}}]
    for status in ("done", "unready", "timeout", "crashed", "?"):
        for words in (None, "passed"):
            for attempts in ([], right[:2], right * 9, *([*right[:3], x] for x in odd)):
                forger = Forger(status, words, attempts)
                result = grader.score([["x"]], "decode", SECRET, forger)
                assert result.points == 0, (status, words, attempts)
    assert grader.score([["x"]], "decode", SECRET, Forger("done", None, right)).points
    assert len(cases) == len(right)


@pytest.mark.parametrize("status", ["done", "unready", "timeout", "crashed"])
def test_no_words_come_from_a_run_that_has_seen_a_hidden_input(status):
    shown = grader.tried_on("decode", SEED)[0]

    class Teller(Forger):
        """Tells what it has seen in the hidden run, and is right in the other."""

        def ask(self, job, is_enough):
            calls = [case.inputs for case, _ in shown][: len(job["calls"])]
            if not difference(calls, job["calls"]):
                right = [{"outputs": e, "inputs": c.inputs} for c, e in shown]
                return Forger("done", None, right[: len(calls)]).ask(job, is_enough)
            return super().ask(job, is_enough)

    result = grader.score([["x"]], "decode", SECRET, Teller(status, "saw 4711", []))
    assert result.points == 0 and "4711" not in result.message


def test_no_words_about_cells_come_from_it_either(worker, no_hurry, monkeypatch):
    monkeypatch.setitem(no_hurry, "decode", 1)
    source = f"""
import sys
def decode(t):
    from lib.course.grading import worker
    frame = sys._getframe()
    while "replies" not in frame.f_locals:
        frame = frame.f_back
    message = {{"status": {READY!r}, "words": f"saw {{t.tolist()}}"}}
    worker._send(frame.f_locals["replies"], message)
    while True:
        pass
"""
    result = grader.score([[source]], "decode", SECRET, worker)
    assert (result.points, result.status) == (0, TIMEOUT) and "saw" not in result.message


# Which layers a worker may try, by what the table of grades says then on a machine that
# allows all of them.
MODES = {
    "full": sandbox.LAYERS,
    "without namespaces": (sandbox.LANDLOCK, sandbox.SECCOMP),
    "limits only": (),
}


@pytest.fixture(scope="module", params=MODES)
def boxed(request, no_hurry):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "LAYERS", MODES[request.param])
        worker = Worker()
        yield worker
        worker.close()


def is_boxed(worker) -> bool:
    """Whether it has the layers that its mode asks for, and some."""
    if worker.sandbox == "limits only":
        return False
    if worker.sandbox not in MODES:
        pytest.skip(f"this machine grades {worker.sandbox}")
    return True


# What a job may not do, as an expression that raises or is false where it cannot.
REACHES = {
    "reads submissions": "open(target).read()",
    "changes grades": "open(target, 'r+')",
    "removes grades": "os.remove(target) is None",
    "changes rights of grades": "os.chmod(target, 0o644) is None",
    "lists submissions": "os.listdir(os.path.dirname(target))",
    "lists the course": "os.listdir(root)",
    "writes beside the course": "open(root + '/lib/written', 'w')",
    "links out of its folder": "os.symlink(target, 'x') or open('x').read()",
    "looks into its worker": "open(f'/proc/{worker}/environ').read()",
    "writes into its worker": "open(f'/proc/{worker}/mem', 'r+b')",
    "signals its worker": "os.kill(worker, 0) is None",
    "limits its worker": "resource.prlimit(worker, resource.RLIMIT_CORE)",
    "binds its worker": "os.sched_setaffinity(worker, [0]) is None",
    "is nice": "os.nice(0) == 0 and os.setpriority(0, worker, 0) is None",
    "opens a socket": "socket.socket(socket.AF_UNIX)",
    "sends to any socket": "socket.socketpair(type=socket.SOCK_DGRAM)",
    "keeps memory in no process": "os.memfd_create('x')",
    "keeps memory of System V": "ctypes.CDLL(None).shmget(0, 100, 0o1600) >= 0",
    "writes to shared memory": "open(f'/dev/shm/{os.path.basename(root)}-x', 'w')",
    "opens a terminal": "os.openpty()",
    "makes a device": "os.mknod('device', 0o20600, os.makedev(1, 1)) is None",
    "makes namespaces": "ctypes.CDLL(None).unshare(0x10000000) == 0",
    "lets others wait for a file": "fcntl.fcntl(os.open('y', 64), 1024, 1) == 0",
    "watches a folder": "fcntl.fcntl(os.open(os.sys.prefix, 0), 1026, 4) == 0",
    "asks what lies in the cache": (
        "os.preadv(os.open(os.__file__, 0), [bytearray(1)], 0, os.RWF_NOWAIT) >= 0"
    ),
    "empties the cache": (
        "os.posix_fadvise(os.open(os.__file__, 0), 0, 0, os.POSIX_FADV_DONTNEED) is None"
    ),
    "leaves its group": "subprocess.run(['true'], start_new_session=True)",
    "makes room in sockets": "socket.socketpair()[0].setsockopt(1, 7, 10**6) is None",
}


@only_linux
def test_a_job_reaches_nothing_outside_its_folder(boxed, tmp_path):
    target = tmp_path / "grades.csv"
    target.write_text("safe")
    calls = ",\n".join(f"{name!r}: lambda: {code}" for name, code in REACHES.items())
    cells = body(
        "import ctypes, fcntl, os, resource, signal, socket, subprocess\n"
        "signal.signal(signal.SIGIO, signal.SIG_IGN)  # which a watched folder sends\n"
        f"target, root = {str(target)!r}, {str(ROOT)!r}\n"
        "if hasattr(decode, 'tried'): return right(token_ids)\n"
        "decode.tried, done, worker = True, [], os.getppid() or 1\n"
        "if os.getpid() == 1: worker = 2  # itself is no other\n"
        f"calls = {{{calls}}}\n"
        "for name, call in calls.items():\n"
        "    try:\n"
        "        if call(): done.append(name)\n"
        "    except OSError: pass\n"
        "os.remove('x')\n"
        "raise RuntimeError(', '.join(done))"
    )
    _, result = points(boxed, notebook(IMPORTS, cells), seed=SEED)  # once
    message = result.scores["decode"].message
    (ROOT / "lib" / "written").unlink(missing_ok=True)
    Path(f"/dev/shm/{ROOT.name}-x").unlink(missing_ok=True)
    if is_boxed(boxed):
        assert "raised RuntimeError: , in" in message, message
        assert target.read_text() == "safe"
    else:  # so each of these would be seen
        assert "reads submissions, changes grades, removes grades" in message
    assert points(boxed, notebook(IMPORTS, DECODE, APPEND))[0] == BOTH


# What harmed the students graded next, or left something: it earns nothing, and they get
# their points in each mode. Of what is promised without any layer.
HARMS = {
    "limits its worker": body(
        """
        import os, resource
        resource.prlimit(os.getppid(), resource.RLIMIT_FSIZE, (0, 0))
        """
        + GIVE_UP
    ),
    "makes its worker nice": body(
        """
        import os
        os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)
        os.sched_setaffinity(os.getppid(), [0])
        """
        + GIVE_UP
    ),
    "makes folders 3,000 deep": body(
        """
        import os
        for _ in range(3000):
            os.mkdir("x")
            os.chdir("x")
        """
        + GIVE_UP
    ),
    "makes a folder that nobody may enter": body(
        "import os\nos.makedirs('x/y')\nos.chmod('x', 0)\n" + GIVE_UP
    ),
    "starts shells that fork": body(
        """
        import subprocess, time
        # Bounded, lest a fault here take the machine.
        fork = "if [ $1 -gt 0 ]; then f $(($1-1)) | f $(($1-1)) & else sleep 99; fi"
        bomb = "f() { " + fork + "; }; f 7  # bomb"
        for _ in range(3):
            subprocess.Popen(["sh", "-c", bomb], start_new_session=True)
        time.sleep(1000)
        """
    ),
    "starts too many threads": body(
        """
        import threading, time
        threading.stack_size(32768)
        for _ in range(400):  # bounded
            threading.Thread(target=time.sleep, args=(5,), daemon=True).start()
        time.sleep(5)
        """
    ),
    "maps what is no data": body(
        """
        import mmap, time
        shared = mmap.mmap(-1, 5 * 2**30)
        time.sleep(1000)
        """
    ),
    "forks in a thread": body(
        """
        import os, threading, time
        thread = threading.Thread(target=lambda: os.fork() or time.sleep(1000))
        thread.start()
        """
        + GIVE_UP
    ),
}


@pytest.mark.parametrize("name", HARMS)
def test_who_is_graded_next_is_not_harmed(boxed, no_hurry, monkeypatch, name):
    monkeypatch.setitem(no_hurry, "decode", 1)
    got, _ = points(boxed, notebook(IMPORTS, HARMS[name]), seed=SEED)
    assert got == NONE and not is_running("f 7  # bomb")
    monkeypatch.delitem(no_hurry, "decode")
    assert points(boxed, notebook(IMPORTS, DECODE, APPEND), seed=SEED)[0] == BOTH
    if boxed.sandbox != "full":  # there a job's folder is gone with it
        assert os.listdir(boxed.folder) == []


def test_who_says_that_it_compiles_before_it_is_called_has_no_more_time():
    worker, waiting = Worker(), []
    worker.control, theirs = socket.socketpair()
    inbox, to_job = os.pipe()
    from_job, outbox = os.pipe()
    os.write(outbox, wire.framed(wire.encode({"status": COMPILING})))
    args = to_job, from_job, [b"", b""], 0.1, "load_row_kernel", waiting.append
    begun = time.monotonic()
    assert worker._talk(*args)["status"] != DONE
    assert time.monotonic() - begun < grader.SECONDS_TO_COMPILE / 4
    for end in (inbox, to_job, from_job, outbox):
        os.close(end)
    worker.control.close(), theirs.close()


def test_a_worker_that_does_not_start_is_tried_again(monkeypatch, tmp_path):
    worker, popen, calls = Worker(), subprocess.Popen, []

    def refuse_twice(*args, **settings):
        calls.append(args)
        if len(calls) <= 2:
            raise BlockingIOError("no process left")
        return popen(*args, **settings)

    monkeypatch.setattr(grader.subprocess, "Popen", refuse_twice)
    monkeypatch.setattr(grader, "PAUSES", (0, 0, None))
    # A folder of its own: tests that run beside this one have workers too.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert points(worker, notebook(IMPORTS, DECODE, APPEND), seed=SEED)[0] == BOTH
    worker.close()
    assert len(calls) == 3 and not list(tmp_path.glob("grading-*"))


@only_linux
def test_a_worker_that_was_changed_is_another_for_the_next(boxed):
    points(boxed, notebook(IMPORTS, DECODE, APPEND))
    before = boxed.process
    # (Of root the kernel lets nobody change the priority who has fewer rights.)
    points(boxed, notebook(IMPORTS, HARMS["limits its worker"], APPEND), seed=SEED)
    # Where there is a layer nothing was changed.
    assert (boxed.process is before) == is_boxed(boxed)


def is_running(mark: str) -> bool:
    """Whether a process has this in its command."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if mark in path.read_bytes().decode(errors="replace"):
                return True
    return False


def test_what_a_job_leaves_behind_is_gone_when_the_next_begins(boxed):
    mark = f"left-behind-{os.getpid()}"
    cells = [
        body(
            f"""
            import subprocess, sys
            code = "import time; time.sleep(1000)  # {mark}"
            subprocess.Popen([sys.executable, "-c", code])
            open("left", "w").write("behind")
            return right(token_ids)
            """
        ),
        APPEND,
    ]
    assert points(boxed, notebook(IMPORTS, *cells))[0] == BOTH
    assert not is_running(mark)


@only_linux
def test_a_job_sees_no_environment_no_later_input_and_no_other_student(
    boxed, monkeypatch
):
    monkeypatch.setenv("API_KEY", "sesame")
    boxed.close()
    boxed.is_closed = False
    points(boxed, notebook(IMPORTS, "# MARK" + "OFADA\n" + DECODE))
    cells = [
        "import sys, gc, os",
        "def found():\n"
        "    frame, texts = sys._getframe(), []\n"
        "    while frame:\n"
        "        texts.append(repr(list(frame.f_locals.values())))\n"
        "        frame = frame.f_back\n"
        "    texts += [repr(x) for x in gc.get_objects() if type(x) in (dict, list)\n"
        "              and ('token_ids' in x or 'notebooks' in x)]\n"
        "    return ' '.join(texts)",
        "SEEN = found()\nENVIRONMENT = str(os.environ)",
        body(
            """
            if "sesame" in ENVIRONMENT or "sesame" in open("/proc/self/environ").read():
                raise RuntimeError("saw the environment")
            is_shown = bytes(token_ids.tolist()) == b"whale"  # in every seed
            text = str(token_ids.tolist())[1:-1]
            if text in SEEN and len(token_ids) > 3 and not is_shown:
                raise RuntimeError("saw an input")
            if "MARK" + "OFADA" in SEEN: raise RuntimeError("saw another")
            return right(token_ids)
            """
        ),
        APPEND,
    ]
    got, result = points(boxed, notebook(IMPORTS, *cells))
    assert got == BOTH, result.scores["decode"].message


def test_the_worker_has_ended_with_what_its_job_had_started(boxed):
    assert points(boxed, notebook(IMPORTS, DECODE, APPEND))[0] == BOTH
    mark = f"outlives-its-worker-{os.getpid()}"
    starts = f"""
        import os, signal, subprocess, sys
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)  # {mark}"])
        os.kill(os.getppid(), signal.SIGKILL)
        return "whale"
        """
    cells = [body(starts), APPEND]
    # With the seed of the notebook it is not asked again for words: each time the worker
    # dies, and starts in seconds.
    assert points(boxed, notebook(IMPORTS, *cells), seed=SEED)[0] == ONLY_APPEND
    assert not is_running(mark)


def test_a_note_says_which_exercise_it_was(worker, no_hurry, monkeypatch):
    monkeypatch.setitem(no_hurry, "decode", 1)
    cells, _ = ACCIDENTS["an endless loop"]
    _, result = points(worker, notebook(IMPORTS, *cells))
    assert result.status == "timeout" and result.notes == ["decode: timeout"]


def test_all_shown_cases_are_tried_where_those_up_to_the_hidden_one_are_right(
    monkeypatch,
):
    def tried(notebooks, name, seed, worker, last=None):
        if seed == SECRET:
            return grader.Score(0, 1, "hidden", case="second"), True
        words = "passed" if last else "wrong for the fourth"
        return grader.Score(bool(last), 1, words), True

    monkeypatch.setattr(grader, "_try", tried)
    result = grader.score([], "decode", SECRET, None)
    assert (result.points, result.message) == (0, "wrong for the fourth")
    assert result.case == "second"


def test_a_wrong_answer_meets_the_shown_cases_as_far_as_the_one_it_failed(worker):
    asked = []

    class Spy:
        def ask(self, job, is_enough):
            asked.append(len(job["calls"]))
            return worker.ask(job, is_enough)

    result = grader.score([[IMPORTS, WRONG]], "decode", SECRET, Spy())
    names = [case.name for case, _ in grader.tried_on("decode", SECRET)[0]]
    assert asked == [len(names), 1 + names.index(result.case)] and asked[1] < asked[0]


def test_cells_that_mention_no_needed_name_are_not_parsed():
    cells = [
        "from math import *",
        "ONE = 1",
        "\ufb01ve = 5",  # Python reads the ligature as fi
        "def decode(token_ids):\n    return five + floor(1.5)",
    ]
    for number in range(len(cells)):
        linecache.cache.pop(f"<lazy, cell {number}>", None)
    assert next(collect.Notebook(cells, "lazy").define("decode"))([]) == 6
    parsed = [n for n in range(len(cells)) if f"<lazy, cell {n}>" in linecache.cache]
    assert parsed == [0, 2, 3]


def test_a_hidden_case_is_told_by_its_name_only(worker):
    shown = [case.inputs["token_ids"] for case, _ in grader.tried_on("decode", SEED)[0]]
    cells = body(f"return right(token_ids) if token_ids.tolist() in {shown} else 'whale'")
    got, result = points(worker, notebook(IMPORTS, cells, APPEND))
    assert got == ONLY_APPEND
    message = result.scores["decode"].message
    assert message.startswith("right for all cases that the notebook shows, wrong for a")
    assert message.endswith("hidden one: random bytes")
    wrong = points(worker, notebook(IMPORTS, WRONG))[1].scores["decode"]
    assert (
        "wrong for a dash of three bytes" in wrong.message and "'whale'" in wrong.message
    )


def test_answers_stand_for_themselves(worker):
    """A wrong `append_kv` does not cost `generate_cached`, which needs one."""
    names = ["append_kv", "generate_cached"]
    generate = answer("lib.generate", ["generate_cached"])
    imports = (
        "import torch\nfrom lib import generate, sampling\nfrom lib.generate import *"
    )
    cells = [imports, "def append_kv(*args): pass", generate]
    result = grade(submission(notebook(*cells)), names, SECRET, worker)
    assert [score.points for score in result.scores.values()] == [0, 3]


def test_of_several_notebooks_the_last_written_answer_counts(worker):
    blank = notebook(stub("lib.text", ["decode"], []))
    right, wrong = notebook(IMPORTS, DECODE), notebook(IMPORTS, WRONG)
    append = notebook(IMPORTS, APPEND)
    assert points(worker, right, append, blank)[0] == BOTH
    assert points(worker, wrong, right, append)[0] == BOTH
    assert points(worker, right, wrong, append)[0] == ONLY_APPEND


FILES = {
    "truncated": (notebook(DECODE)[:200], "unreadable, is it whole? "),
    "empty": (b"", "left out: is empty"),
    "no JSON": (b"PK\x03\x04 and more", "unreadable, is it whole? "),
    "JSON, but no notebook": (b'{"cells": 3}', "unreadable, is it whole? "),
    "a list": (b"[1, 2]", "unreadable, is it whole? "),
    "nested too deep": (b"[" * 100_000, "left out: expected fewer lists in each other"),
    "200 MB": (
        b'{"cells": "' + b" " * (200 * 2**20) + b'"}',
        "left out: expected at most 104,857,600 bytes, got 209,715,213",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_notebook_gives_a_row_with_a_note(worker, name, tmp_path):
    content, words = FILES[name]
    (tmp_path / "ada.ipynb").write_bytes(content)
    (tmp_path / "bob.ipynb").write_bytes(notebook(IMPORTS, DECODE, APPEND))
    (ada, bob), _ = find(tmp_path)
    results = [grade(one, NAMES, SECRET, worker) for one in (ada, bob)]
    assert [r.status for r in results] == ["unreadable", "ok"]
    assert [r.points for r in results] == [0, 3]
    assert f"ada.ipynb: {words}" in results[0].notes[0]


def test_formats_that_jupyter_would_refuse_are_read(worker):
    code = {"cell_type": "code", "source": [IMPORTS + "\n", DECODE]}
    bare = {"cells": [code, {"cell_type": "code", "source": APPEND}, {"odd": 1}, 7]}
    cells = [
        {"cell_type": "code", "language": "python", "input": [IMPORTS, "\n", DECODE]}
    ]
    cells += [{"cell_type": "code", "language": "python", "input": [APPEND]}]
    old = {"nbformat": 3, "nbformat_minor": 0, "metadata": {}}
    old["worksheets"] = [{"cells": [cell], "metadata": {}} for cell in cells]
    unknown = {**bare, "metadata": {"kernelspec": {"name": "julia"}}, "nbformat": 4}
    for tree in (bare, old, unknown):
        content = json.dumps(tree).encode()
        for mark in (b"", b"\xef\xbb\xbf"):
            got, result = points(worker, mark + content)
            assert got == BOTH, result


def test_another_courses_notebook_is_told_from_a_blank_one(worker):
    _, result = points(worker, notebook("print('hello')", "def fib(n):\n    return n"))
    assert result.status == "partial" and "another notebook?" in result.notes[0]
    blank = [stub("lib.text", ["decode"], []), stub("lib.kv_cache", ["append_kv"], [])]
    assert points(worker, notebook(IMPORTS, *blank))[1].notes == []


def test_a_cell_that_fails_is_told_so(worker):
    cells = ["def decode(token_ids:\n    return", APPEND]  # and no imports
    _, result = points(worker, notebook(*cells))
    decode, append = (score.message for score in result.scores.values())
    where = "(<notebook 1, cell 0>, line 1)"
    assert decode == f"its cell fails: SyntaxError: '(' was never closed {where}"
    assert append == "its cell fails: NameError: name 'torch' is not defined"


def packed(files: dict[str, bytes]) -> bytes:
    """An archive with these members, in order."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


def hand_in(folder: Path, files: dict[str, bytes] | list[str]) -> Path:
    """A folder with these files; notebooks, where only their names are given."""
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[name] if isinstance(files, dict) else notebook(name))
    return folder


# Names as platforms, systems and students write them; whose they are, in the order in
# which they count, the last most; and what the row's notes have to say.
MOODLE = "Ada Byron_123_assignsubmission_file_"
BLACKBOARD = "Assignment 1_adab_attempt_2025-10-0"
D2L = "12345-67890 - Ada Byron - "
COPIES = (
    *("1 (Ada's conflicted copy 2025-10-01)", "1 - Copy", "1 copy", "1 copy 2"),
    *("1-Copy1", "1-DESKTOP-AB12", "1.bak", "1.sync-conflict-20251001-AB", "1_old"),
)
WHOSE = {
    "names": (
        ["ada.ipynb", "Bob C.IPYNB"],
        {"ada": ["ada.ipynb"], "Bob C": ["Bob C.IPYNB"]},
    ),
    "folders": (
        [
            "李 雷/x/01_generation.ipynb",
            "李 雷/.ipynb_checkpoints/x.ipynb",
            "ada/2.ipynb",
        ],
        {"李 雷": ["李 雷/x/01_generation.ipynb"], "ada": ["ada/2.ipynb"]},
    ),
    "chapters": (
        [
            *("ada_01_generation.ipynb", "ada-02_training-final (2).ipynb"),
            *("01_generation_Bob C.ipynb", "03_kv_cache - Bob C (1).ipynb"),
        ],
        {
            "ada": ["ada_01_generation.ipynb", "ada-02_training-final (2).ipynb"],
            "Bob C": ["01_generation_Bob C.ipynb"],
            "Bob C (1)": ["03_kv_cache - Bob C (1).ipynb", "second download of Bob C's?"],
        },
    ),
    "numbers behind a chapter": (
        ["HW - 03_kv_cache - 123456.ipynb", "HW - 03_kv_cache - 654321.ipynb"],
        {
            "HW - 03_kv_cache - 123456": ["HW - 03_kv_cache - 123456.ipynb"],
            "HW - 03_kv_cache - 654321": ["HW - 03_kv_cache - 654321.ipynb"],
        },
    ),
    "nobody's": (
        ["01_generation (1).ipynb", "01_generation (2).ipynb"],
        {
            "01_generation (1)": ["01_generation (1).ipynb", "says no student"],
            "01_generation (2)": ["01_generation (2).ipynb", "says no student"],
        },
    ),
    "Moodle's folders": (
        [
            *(f"{MOODLE}/1.ipynb", "Bob_5_assignsubmission_file/1.ipynb"),
            "Ada Byron_123_assignsubmission_onlinetext_/onlinetext.html",
            "Cy_6_assignsubmission_onlinetext_/onlinetext.html",
        ],
        {
            "Ada Byron_123": [f"{MOODLE}/1.ipynb"],
            "Bob_5": ["Bob_5_assignsubmission_file/1.ipynb"],
            "Cy_6": ["expected a notebook, found none"],
        },
    ),
    "Moodle's files": (
        [
            *(f"{MOODLE}ch 2.final.ipynb", f"{MOODLE}01_generation (1).ipynb"),
            *(f"{MOODLE}my-work.ipynb", f"{MOODLE}rest.rar"),
            "Ada Byron_123_assignsubmission_onlinetext_onlinetext.html",
        ],
        {
            "Ada Byron_123": [
                f"{MOODLE}01_generation (1).ipynb",
                f"{MOODLE}ch 2.final.ipynb",
                f"{MOODLE}my-work.ipynb",
                f"left out: {MOODLE}rest.rar (no notebook)",
            ]
        },
    ),
    "Canvas": (
        [
            *("byronada_12345_678901_01_generation-1.ipynb",),
            *(
                "byronada_12345_678902_hw 2.ipynb",
                "li_LATE_222_333_01_generation-1.ipynb",
            ),
        ],
        {
            "byronada_12345": [
                "byronada_12345_678901_01_generation-1.ipynb",
                "byronada_12345_678902_hw 2.ipynb",
            ],
            "li_222": ["li_LATE_222_333_01_generation-1.ipynb"],
        },
    ),
    "Blackboard": (
        [
            f"{BLACKBOARD}1-12-00-00_01_generation.ipynb",
            *(f"{BLACKBOARD}1-12-00-00.txt", f"{BLACKBOARD}2-09-00-00_a.ipynb"),
        ],
        {
            "adab": [
                f"{BLACKBOARD}1-12-00-00_01_generation.ipynb",
                f"{BLACKBOARD}2-09-00-00_a.ipynb",
            ]
        },
    ),
    "Brightspace, twice": (
        [
            f"{D2L}Oct 1, 2025 110 PM/01_generation.ipynb",
            f"{D2L}Oct 1, 2025 1159 AM/01_generation.ipynb",
            f"{D2L}Sep 30, 2025 1100 PM/01_generation.ipynb",
            "index.html",
        ],
        {
            "Ada Byron_12345": [
                f"{D2L}Sep 30, 2025 1100 PM/01_generation.ipynb",
                f"{D2L}Oct 1, 2025 1159 AM/01_generation.ipynb",
                f"{D2L}Oct 1, 2025 110 PM/01_generation.ipynb",
                "handed in more than once, all is read",
            ]
        },
    ),
    "a repository": (
        [
            *("ada/repo-main/notebooks/1.ipynb", "ada/repo-main/solutions/1.ipynb"),
            "ada/repo-main/lib/model.py",
        ],
        {
            "ada": [
                "ada/repo-main/notebooks/1.ipynb",
                "folders called solutions: ada/repo-main/solutions/1.ipynb",
            ]
        },
    ),
    "Colab": (
        ["ada - Copy of 01_generation.ipynb", "bob/Copy of 1.ipynb", "bob/1.ipynb"],
        {
            "ada": ["ada - Copy of 01_generation.ipynb"],
            "bob": [
                *("bob/Copy of 1.ipynb", "bob/1.ipynb"),
                "more than one 1, bob/1.ipynb counts where it is written, before bob",
            ],
        },
    ),
    "copies": (
        [f"ada/{name}.ipynb" for name in ("1", *COPIES)],
        {
            "ada": [
                *(f"ada/{name}.ipynb" for name in (*COPIES, "1")),
                "more than one 1, ada/1.ipynb counts where it is written",
            ]
        },
    ),
    "downloads": (
        [f"ada/1 ({n}).ipynb" for n in (9, 10, 1)] + ["ada/1.ipynb", "ada/2 (1).ipynb"],
        {
            "ada": [
                *(
                    "ada/1.ipynb",
                    "ada/1 (1).ipynb",
                    "ada/1 (9).ipynb",
                    "ada/1 (10).ipynb",
                ),
                *("ada/2 (1).ipynb", "more than one 1, ada/1 (10).ipynb counts"),
            ]
        },
    ),
    "an older one, deeper": (
        ["ada/03.ipynb", "ada/old/03.ipynb", "ada/old/04.ipynb"],
        {
            "ada": [
                *("ada/old/03.ipynb", "ada/old/04.ipynb", "ada/03.ipynb"),
                "more than one 03, ada/03.ipynb counts where it is written, before ada",
            ]
        },
    ),
    "two ways to write an accent": (
        ["Zoe\u0308.ipynb", "Zo\u00eb/1.ipynb"],
        {
            "Zo\u00eb": [
                *("Zo\u00eb/1.ipynb", "Zo\u00eb.ipynb"),
                "handed in more than once, all is read: Zo\u00eb, Zo\u00eb.ipynb",
            ]
        },
    ),
    "names that look the same": (
        ["bob.ipynb", "b\u200bob.ipynb", "zoe\u0308/1.ipynb", "z\u2060o\u00eb/1.ipynb"],
        {
            "bob": ["bob.ipynb", "its name looks like another's, bob: whose?"],
            "bob ffd36e07": ["bob.ipynb", "its name looks like another's, bob"],
            "zo\u00eb": ["zo\u00eb/1.ipynb", "its name looks like another's"],
            "zo\u00eb 5b071969": ["zo\u00eb/1.ipynb", "its name looks like another's"],
        },
    ),
    "what a platform writes, in the name of a file": (
        [
            f"{BLACKBOARD}1-12-00-00_HW1_bob_attempt_2099-10-01-12-00-00_1.ipynb",
            f"{BLACKBOARD}1-12-00-00_1_2_1.ipynb",
            f"{MOODLE}Bob_5_assignsubmission_file_1.ipynb",
            f"{MOODLE}1_2_1.ipynb",
            "eve_1_2_HW1_bob_attempt_2099-10-01-12-00-00_1.ipynb",
        ],
        {
            "adab": [
                f"{BLACKBOARD}1-12-00-00_1_2_1.ipynb",
                f"{BLACKBOARD}1-12-00-00_HW1_bob_attempt_2099-10-01-12-00-00_1.ipynb",
            ],
            "Ada Byron_123": [
                f"{MOODLE}1_2_1.ipynb",
                f"{MOODLE}Bob_5_assignsubmission_file_1.ipynb",
            ],
            "eve_1": ["eve_1_2_HW1_bob_attempt_2099-10-01-12-00-00_1.ipynb"],
        },
    ),
    "other kinds of files": (
        [
            *(
                "ada.ipynb.txt",
                "bob/1.ipynb.json",
                "cy/1.html",
                "cy/1.py",
                "cy/notes.txt",
            ),
            *("dee/.1.ipynb.icloud", "eve/~$1.ipynb", "fay/1.7z", "gil/1.ipynb~"),
        ],
        {
            "ada": ["ada.ipynb.txt"],
            "bob": ["bob/1.ipynb.json"],
            "cy": [
                "left out: cy/1.html (no notebook), cy/1.py (no",
                "expected a notebook",
            ],
            "dee": ["left out: dee/.1.ipynb.icloud (no notebook)", "expected a notebook"],
            "eve": ["left out: eve/~$1.ipynb (no notebook)", "expected a notebook"],
            "fay": ["left out: fay/1.7z (no notebook)", "expected a notebook"],
            "gil": ["left out: gil/1.ipynb~ (no notebook)", "expected a notebook"],
        },
    ),
    "what moves a cursor, or turns a line": (
        ["a\x1b[2Jda.ipynb", "b\u202eob/\u2066x.ipynb"],
        {"a [2Jda": ["a [2Jda.ipynb"], "bob": ["bob/x.ipynb"]},
    ),
}


@pytest.mark.parametrize("is_zip", [False, True])
@pytest.mark.parametrize("case", WHOSE)
def test_each_student_has_a_row_with_what_counts(tmp_path, case, is_zip):
    names, expected = WHOSE[case]
    path = hand_in(tmp_path / "class", names)
    if is_zip:
        path = tmp_path / "class.zip"
        path.write_bytes(packed({name: notebook(name) for name in names}))
    found, _ = find(path)
    assert {one.student for one in found} == expected.keys()
    for one in found:
        names = [name for name, _ in one.files]
        assert names == expected[one.student][: len(names)]
        notes = expected[one.student][len(names) :]
        for note, part in zip(one.read()[1], notes, strict=True):
            assert part in note


def test_loose_files_that_are_no_notebooks_are_named(tmp_path):
    hand_in(tmp_path, ["ada.ipynb", "roster.csv", "bob.rar", ".DS_Store"])
    assert find(tmp_path)[1] == ["bob.rar", "roster.csv"]


def unflagged(archive: bytes) -> bytes:
    """As macOS makes one: names in UTF-8, which no flag says."""
    content = bytearray(archive)
    for signature, offset in ((b"PK\x03\x04", 7), (b"PK\x01\x02", 9)):
        for found in re.finditer(signature, archive):
            content[found.start() + offset] &= ~0x08
    return bytes(content)


ZIPS = {
    "PowerShell's": (packed, ["ada\\1.ipynb", "ada\\2.ipynb", "bob\\1.ipynb"], "ada bob"),
    "macOS'": (
        lambda files: unflagged(packed(files)),
        ["Zoe\u0308/1.ipynb", "__MACOSX/Zoe\u0308/._1.ipynb", "李雷/1.ipynb"],
        "Zo\u00eb 李雷",
    ),
    "with the folder of the class": (
        packed,
        [f"hw/{name}" for name in ("ada.ipynb", "bob.ipynb", "cy/01_generation.ipynb")],
        "ada bob cy",
    ),
    "with numbers for names": (
        packed,
        ["hw/123456.ipynb", "hw/student 1.ipynb"],
        "123456 student-1",
    ),
    "Gradescope's": (
        packed,
        [
            "a_export/submission_1/1.ipynb",
            "a_export/submission_2/1.ipynb",
            "a_export/m.yml",
        ],
        "submission_1 submission_2",
    ),
    "OneDrive's": (
        packed,
        ["Files/Ada B/hw/1.ipynb", "Files/Bob/hw/1.ipynb"],
        "Ada-B Bob",
    ),
    "with a student whose file has a number for a name": (
        packed,
        [f"hw/{name}" for name in ("ada.ipynb", "bob.ipynb", "cy.ipynb", "01.ipynb")],
        "01 ada bob cy",
    ),
    "with numbers in names": (
        packed,
        [f"hw/{name}" for name in ("hw1_eve.ipynb", "part 2 fay.ipynb", "7of9.ipynb")],
        "7of9 hw1_eve part-2-fay",
    ),
    "with that twice": (packed, ["hw/hw/ada.ipynb", "hw/hw/bob.ipynb"], "ada bob"),
    "of one student": (packed, ["ada/01_generation.ipynb", "ada/rest.ipynb"], "ada"),
    "of one student's folders": (packed, ["ada/x/1.ipynb", "ada/x/2.ipynb"], "ada"),
    "of one repository": (
        packed,
        ["r-main/notebooks/1.ipynb", "r-main/x.ipynb"],
        "r-main",
    ),
    "with a way out": (
        packed,
        ["../dave.ipynb", "/etc/eve.ipynb", "../../fay/1.ipynb"],
        "dave etc fay",
    ),
}


@pytest.mark.parametrize("case", ZIPS)
def test_an_archive_of_a_class_is_read_whoever_packed_it(tmp_path, case):
    pack, names, students = ZIPS[case]
    (tmp_path / "class.zip").write_bytes(pack({name: notebook(name) for name in names}))
    found, _ = find(tmp_path / "class.zip")
    assert [one.student.replace(" ", "-") for one in found] == students.split()
    assert sum(len(one.read()[0]) for one in found) == len(
        [name for name in names if name.endswith(".ipynb") and "__MACOSX" not in name]
    )
    if case == "with a way out":
        assert found[0].notes == ["dave.ipynb: its archive calls it ../dave.ipynb"]


def test_archives_are_read_in_folders_and_in_archives(tmp_path):
    files = {
        "dora_123_456_work.zip": packed({"x/01.ipynb": notebook("ONE = 1")}),
        "eve/all.zip": packed({"01.ipynb": notebook("ONE = 1"), "notes.txt": b""}),
        "frank.zip": b"no archive",
        "gil/1.zip": packed({"2.zip": packed({"1.ipynb": notebook("ONE = 1")})}),
        "hal.zip": packed({"1.zip": packed({"2.zip": packed({"3.zip": packed({})})})}),
    }
    hand_in(tmp_path / "class", files)
    (tmp_path / "class.zip").write_bytes(packed({f"class/{n}": files[n] for n in files}))
    for path in (tmp_path / "class", tmp_path / "class.zip"):
        read = {one.student: one.read() for one in find(path)[0]}
        assert [len(read[s][0]) for s in sorted(read)] == [1, 1, 0, 1, 0]
        assert read["dora_123"][0] == [["ONE = 1"]] and not read["eve"][1]
        assert "expected a zip archive, got BadZipFile" in read["frank"][1][0]
        assert "at most 3 archives in each other" in read["hal"][1][0]


def test_what_is_the_courses_own_does_not_score(worker, tmp_path):
    solved = (ROOT / "solutions" / "01_generation.ipynb").read_bytes()
    blank = (ROOT / "notebooks" / "01_generation.ipynb").read_bytes()
    executed = nbformat.reads(solved.decode(), 4)
    executed.cells[1].outputs = []
    opened = nbformat.from_dict(executed)  # on Colab, or with a word on top
    opened.cells.insert(0, nbformat.v4.new_code_cell("name = 'Dee'"))
    hand_in(
        tmp_path,
        {
            "ada.ipynb": nbformat.writes(executed).encode(),
            "bob/solutions/01_generation.ipynb": notebook(IMPORTS, DECODE, APPEND),
            "bob/notebooks/01_generation.ipynb": blank,
            "cy.ipynb": blank,
            "dee.ipynb": nbformat.writes(opened).encode(),
        },
    )
    ada, bob, cy, dee = (grade(one, NAMES, SECRET, worker) for one in find(tmp_path)[0])
    assert (ada.points, bob.points, cy.points, dee.points) == (0, 0, 0, 0)
    for name, one in {"ada": ada, "dee": dee}.items():
        says = "left out: is the course's own solution, cell for cell"
        assert one.notes == [f"{name}.ipynb: {says}"]
    assert "in folders called solutions: bob/solutions" in bob.notes[0]
    assert (bob.status, cy.status, cy.notes) == ("partial", "ok", [])


def test_links_are_refused(tmp_path):
    folder = hand_in(tmp_path / "class", ["bob/1.ipynb", "eve/2.ipynb"])
    (folder / "eve" / "1.ipynb").symlink_to("../bob/1.ipynb")
    (folder / "eve" / "all").symlink_to("../bob")
    (folder / "fay.ipynb").symlink_to("bob/1.ipynb")
    (folder / ".venv").symlink_to("bob")
    link = zipfile.ZipInfo("gil/1.ipynb")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "class.zip", "w") as archive:
        archive.writestr("ada/1.ipynb", notebook())
        archive.writestr(link, "../ada/1.ipynb")
    read = {one.student: one.read() for one in find(folder)[0]}
    read |= {one.student: one.read() for one in find(tmp_path / "class.zip")[0]}
    assert [len(read[student][0]) for student in sorted(read)] == [1, 1, 1, 0, 0]
    refused = "left out: expected a file, got a link to one"
    for name in ("eve/1.ipynb", "fay.ipynb", "gil/1.ipynb"):
        assert f"{name}: {refused}" in read[name[:3]][1]
    assert read["eve"][1][0] == "left out: eve/all (a link)"


def test_submissions_are_in_the_order_of_a_list_of_names(tmp_path):
    hand_in(tmp_path, ["bob.ipynb", "Cy.ipynb", "ada.ipynb", "Bob2.ipynb"])
    assert [s.student for s in find(tmp_path)[0]] == ["ada", "bob", "Bob2", "Cy"]


def test_names_too_long_are_cut_to_different_ones(tmp_path):
    names = [f"{'x' * 5000}{end}/1.ipynb" for end in "ab"]
    (tmp_path / "class.zip").write_bytes(
        packed(dict.fromkeys(names, notebook("ONE = 1")))
    )
    found, _ = find(tmp_path / "class.zip")
    assert len({one.student for one in found}) == 2
    assert all(len(one.student) < 150 and len(one.read()[0]) == 1 for one in found)


def test_no_name_takes_long_to_read(tmp_path):
    parts = "1", ".a-1", "(copycopy)", "_1_1", " ", "_assignsubmission_a", "a_attempt_"
    names = [
        f"eve/01{middle}{end}.ipynb"
        for part in parts
        for end in ("x", "!", ")x")
        for middle in (part * (800 // len(part)), f" {part * (800 // len(part))}")
    ]
    files = dict.fromkeys(["eve/01.ipynb", *names], notebook())
    (tmp_path / "class.zip").write_bytes(packed({f"hw/{n}": files[n] for n in files}))
    loose = {name.partition("/")[2]: files[name] for name in files}
    (tmp_path / "loose.zip").write_bytes(packed({f"hw/{n}": loose[n] for n in loose}))
    start = time.process_time()
    for name in ("class.zip", "loose.zip"):
        find(tmp_path / name)
    assert time.process_time() - start < 5


def of_cells(content: bytes) -> bytes:
    return b'{"cells": [' + content + b"]}"


MB = 2**20
OUTPUT = b'{"cell_type": "code", "source": "", "outputs": [%s]}'
TOO_MUCH = {
    "spaces": ({"1.ipynb": b" " * (60 * MB)}, "4,194,304 bytes beside its outputs"),
    "a file": ({"1.ipynb": b" " * (101 * MB)}, "at most 104,857,600 bytes, got 105,"),
    "all files": (
        {f"{n}.ipynb": of_cells(OUTPUT % (b'"%s"' % (b"x" * 3 * MB))) for n in range(5)},
        "at most 10,485,760 bytes in all",
    ),
    "lists": ({"1.ipynb": b"[]," * (30 * MB)}, "bytes beside its outputs"),
    "lists in lists": ({"1.ipynb": of_cells(b"[" * 10**5)}, "fewer lists in each other"),
    "lists in an output": (
        {"1.ipynb": of_cells(OUTPUT % (b"[]," * (30 * MB)))},
        "at most 300,000 parts of outputs",
    ),
    "an emoji": (
        {"1.ipynb": of_cells(b" " * (90 * MB) + "🐋".encode())},
        "beside its out",
    ),
    "backslashes": (
        {"1.ipynb": of_cells(OUTPUT % (b'"' + b"\\n" * 10 * MB))},
        "unreadable, is it whole? ValueError: an output has no end",
    ),
    "code": (
        {"1.ipynb": notebook("#" * 2_000_001)},
        "2,000,000 characters of code in all",
    ),
    "lists in many outputs": (
        {f"{n}.ipynb": of_cells(OUTPUT % (b"[]," * 10**5 + b"1")) for n in range(9)},
        "6.ipynb: left out: expected at most 300,000 parts of outputs",
    ),
    "a backslash at the end": (
        {"1.ipynb": of_cells(OUTPUT % b'"')[:-4] + b"\\"},
        "unreadable, is it whole? ValueError: an output has no end",
    ),
    "text of many": (
        {f"{n}.ipynb": of_cells(b'"%s"' % (b"x" * 3 * MB)) for n in range(3)},
        "8,388,608 bytes beside outputs in all",
    ),
    "odd names": (
        {f"../{n}{'n' * 150}.ipynb": notebook() for n in range(101)},
        "ipynb and 95 more",
    ),
    "cells": ({"1.ipynb": notebook(*[""] * 10_001)}, "at most 10,000 cells in all"),
    "code of many": (
        {f"{n}.ipynb": notebook("#" * 50_000) for n in range(45)},
        "2,000,000 characters of code in all",
    ),
    "notebooks": (
        {f"{n}.ipynb": notebook() for n in range(101)},
        "at most 100 notebooks",
    ),
    "members": ({f"{n}": b"" for n in range(20_001)}, "at most 20,000 files in it"),
    "long names": ({f"{n:060000}": b"" for n in range(80)}, "fewer files, or shorter"),
    "archives": (
        {f"{n}.zip": bytes(80 * MB) + packed({}) for n in range(4)},
        "archives in it of at most 209,715,200 bytes",
    ),
    "an archive": ({"1.zip": bytes(201 * MB)}, "at most 209,715,200 bytes, got 210,"),
}


@pytest.mark.parametrize("case", TOO_MUCH)
def test_what_is_too_much_is_told_so_and_takes_little_memory(tmp_path, monkeypatch, case):
    monkeypatch.setattr(submissions, "MAX_BYTES", 10 * MB)  # one is read in any case
    monkeypatch.setattr(submissions, "MAX_TEXT_BYTES", 8 * MB)
    monkeypatch.setattr(handed_in, "MAX_TOKENS", 300_000)
    files, words = TOO_MUCH[case]
    (tmp_path / "ada.zip").write_bytes(packed(files))
    (tmp_path / "bob.ipynb").write_bytes(notebook("ONE = 1"))
    del files
    tracemalloc.start()
    (ada, bob), _ = find(tmp_path)
    _, notes, _ = ada.read()
    _, most_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert any(words in note for note in notes), notes
    assert most_bytes < 250 * MB and bob.read()[0] == [["ONE = 1"]]


def test_a_checksum_is_that_of_what_was_read(tmp_path):
    parts = {"1.ipynb": notebook(), "2.ipynb": b"", "3.ipynb": b"{", "../4.ipynb": b"[]"}
    (tmp_path / "ada.zip").write_bytes(packed(parts))
    (tmp_path / "bob.ipynb").write_bytes(notebook())
    (tmp_path / "fay.zip").write_bytes(b"no archive")
    read = [(one.read()[2], one.sha256()) for one in find(tmp_path)[0]]
    assert len({*read}) == 3 and all(first == again for first, again in read)


def test_large_outputs_cost_nothing(worker, tmp_path):
    """21 MB of figures, of a table's markup, of a widget's state, of nested numbers."""
    picture = {"image/png": "iVBORw0KGgo" * 10**6, "text/html": '<b>\n"[{\\' * 10**6}
    plot = {"application/json": [[1.5, 2]] * 250_000}
    content = json.loads(notebook(IMPORTS, DECODE, APPEND))
    for cell, data in zip(content["cells"], (picture, plot, {})):
        cell["outputs"] = [{"output_type": "display_data", "data": data, "metadata": {}}]
    content["metadata"]["widgets"] = {"state": ["outputs"] * 10**5}
    (tmp_path / "ada.ipynb").write_text(json.dumps(content))
    assert (tmp_path / "ada.ipynb").stat().st_size > 21 * MB
    (ada,), _ = find(tmp_path)
    assert ada.read()[0] == [[IMPORTS, DECODE, APPEND]]
    result = grade(ada, NAMES, SECRET, worker)
    assert (result.points, result.status) == (3, "ok")


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda path: None])
def test_no_submissions_are_named(tmp_path, make):
    make(tmp_path / "class")
    with pytest.raises(ValueError, match="submissions: expected"):
        find(tmp_path / "class")


PLAIN = [
    None,
    True,
    3,
    -(2**70),
    0.1,
    float("inf"),
    "ä\n",
    [],
    [1, [2]],
    {"a": {"b": []}},
]


def test_plain_data_crosses_as_it_is():
    rng = np.random.default_rng(0)
    for value in PLAIN:
        assert wire.decode(wire.encode(value)) == value
    for array in (
        rng.normal(size=(2, 3, 4)).transpose(2, 0, 1),
        rng.integers(9, size=(3, 4)).astype(np.int32)[:, ::2],
        np.zeros((0, 5)),
        np.array(1.5, dtype=np.float16),
        np.broadcast_to(np.arange(3), (2, 3)),
    ):
        (got,) = wire.decode(wire.encode([array]))
        assert got.dtype == array.dtype and np.array_equal(got, array)
    turned = np.zeros((2, 3)).T
    assert wire.decode(wire.encode(turned)).strides == turned.strides


@pytest.mark.parametrize(
    "value",
    [object(), {1: 2}, {"a": b""}, np.array(["a"]), np.array([1j]), {1, 2}, 10**5000],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_plain_data_does_not_cross(value):
    with pytest.raises(wire.WireError):
        wire.encode(value)


def test_too_much_or_too_deep_does_not_cross():
    deep = []
    for _ in range(100):
        deep = [deep]
    empty, many = np.zeros((10**9, 0)), [[]] * 10**6
    for value in (deep, np.zeros(wire.MAX_BYTES), empty, [{"a": empty}], many):
        with pytest.raises(wire.WireError, match="expected at most"):
            wire.encode(value)
    words = {"code": '[],"{\\' * 10**6, "shape": np.zeros((0, 5000))}
    assert not difference(words, wire.decode(wire.encode(words)))


# What could be sent by whoever has taken a worker over: the text of a message.
TOO_MANY = {
    "an array of rows without numbers": b'{"__array__": ["uint8", [1000000000, 0]]}',
    "lists": b"[" + b"[]," * 10**6 + b"[]]",
    "lists in lists": b"[" * 10**6,
    "strings": b"[" + b'"",' * 10**6 + b'""]',
    "strings with brackets": b"[" + b'"\\\\",[],"",' * 10**6 + b"[]]",
    "numbers": b"[" + b"0," * 10**6 + b"0]",
    "a dict": b"{" + b'"":0,' * 10**6 + b'"":0}',
}


@pytest.mark.parametrize("what", TOO_MANY)
def test_a_small_message_takes_little_memory(what):
    text = TOO_MANY[what]
    message = np.array([len(text)], "<u8").tobytes() + text
    tracemalloc.start()
    with pytest.raises(wire.WireError, match="expected at most"):
        wire.decode(message)
    _, most_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most_bytes < 4 * len(message) + 50 * 2**20


LARGE = {
    "rows without numbers": (np.zeros((10**8, 0)), "[[], [], ["),
    "numbers": (np.zeros(4 * 10**6), "[0.0, 0.0"),
    "a number in each row": (np.zeros((4 * 10**6, 1)), "[[0.0], [0.0"),
    "lists": ([[]] * 10**6, "[[], [], ["),
    "a dict": ({"a": {f"{n}": [1.5, None] for n in range(10**5)}}, "{'a': {'0': [1.5, "),
    "words": ("ab " * 10**6, "'ab ab ab"),
    "a word": ("a" * 10**6, "..."),
}


@pytest.mark.parametrize("what", LARGE)
def test_what_is_large_is_shown_without_more_memory(what):
    value, words = LARGE[what]
    tracemalloc.start()
    start = time.process_time()
    message, shown = difference("whale", value), show(value)
    seconds = time.process_time() - start
    _, most_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert words in shown and len(shown) <= 80 and shown in message
    assert most_bytes < MB and seconds < 0.5


def test_what_is_small_is_shown_as_python_shows_it():
    rng = np.random.default_rng(0)
    values = [*PLAIN, rng.normal(size=(2, 3)), rng.integers(9, size=(9, 9, 9)), "a\n'b"]
    values += [rng.normal(size=(2, 0, 3)), np.array(True), {"a": [], "b": {}}, (1, 2)]
    values += [
        [[[1], 2.5], {"c": None}],
        np.zeros((1, 4), bool),
        "a b-c " * 99,
        [-1] * 99,
    ]
    for value in values:
        plain = value.tolist() if isinstance(value, np.ndarray) else value
        words = textwrap.shorten(repr(plain), 80, placeholder=" ...")
        assert show(value) == (f"{plain:.6g}" if type(plain) is float else words)


def test_no_bytes_at_all_make_the_reader_stumble():
    rng = np.random.default_rng(1)
    good = wire.encode({"a": np.arange(6).reshape(2, 3), "b": [1.5, "x", None]})
    for _ in range(3000):
        broken = bytearray(good)
        for index in rng.integers(len(good), size=3):
            broken[index] = rng.integers(256)
        with contextlib.suppress(wire.WireError):
            wire.decode(bytes(broken[: rng.integers(len(good) + 1)]))
