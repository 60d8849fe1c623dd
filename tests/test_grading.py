"""What submissions may hold, and what each must give.

Two exercises, `decode` and `append_kv`: what goes wrong in the first must not cost the
second. Every attack that was ever tried on the grader stays here.
"""

import contextlib
import io
import json
import linecache
import os
import textwrap
import zipfile
from pathlib import Path

import nbformat
import numpy as np
import pytest

from lib.course import ROOT, collect
from lib.course.check import SEED
from lib.course.exercises import exercises
from lib.course.grading import grader, sandbox, wire
from lib.course.grading.grader import Worker, grade
from lib.course.grading.submissions import Submission, find
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
        import os
        while True:
            try: os.fork()
            except OSError: pass
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
        self.reply = {"status": status, "words": words, "attempts": attempts}

    def ask(self, job):
        return self.reply


def test_no_reply_makes_the_grader_fail_or_give_points_for_wrong_outputs():
    cases = [case for case, _ in grader.tried_on("decode", SECRET)[0]]
    right = [
        {"outputs": expected, "inputs": case.inputs}
        for case, expected in grader.tried_on("decode", SECRET)[0]
    ]
    odd = [7, None, "x", [], {}, {"outputs": 3}, {"outputs": {}, "inputs": {}}]
    odd += [{"error": 3}, {"needs": []}, {"needs": "decode"}, {"outputs": {"text": []}}]
    for status in ("done", "unready", "timeout", "crashed", "?"):
        for words in (None, "passed"):
            for attempts in ([], right[:2], right * 9, *([*right[:3], x] for x in odd)):
                forger = Forger(status, words, attempts)
                result = grader.score([["x"]], "decode", SECRET, forger)
                assert result.points == 0, (status, words, attempts)
    assert grader.score([["x"]], "decode", SECRET, Forger("done", None, right)).points
    assert len(cases) == len(right)


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
}


def test_a_job_reaches_nothing_outside_its_folder(boxed, tmp_path):
    target = tmp_path / "grades.csv"
    target.write_text("safe")
    calls = ",\n".join(f"{name!r}: lambda: {code}" for name, code in REACHES.items())
    cells = body(
        "import ctypes, os, resource, socket\n"
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
        for _ in range(3):
            subprocess.Popen(["sh", "-c", "f() { f | f & }; f"], start_new_session=True)
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
    assert got == NONE
    monkeypatch.delitem(no_hurry, "decode")
    assert points(boxed, notebook(IMPORTS, DECODE, APPEND), seed=SEED)[0] == BOTH
    if boxed.sandbox != "full":  # there a job's folder is gone with it
        assert os.listdir(boxed.folder) == []


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
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            assert mark not in path.read_bytes().decode(errors="replace")


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
            if str(token_ids.tolist())[1:-1] in SEEN and len(token_ids) > 3:
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
    cells = [ATTACKS["kills its parent"], APPEND]
    # With the seed of the notebook it is not asked again for words: each time the worker
    # dies, and starts in seconds.
    assert points(boxed, notebook(IMPORTS, *cells), seed=SEED)[0] == ONLY_APPEND


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
            return grader.Score(0, 1, "hidden", case="second")
        return grader.Score(bool(last), 1, "passed" if last else "wrong for the fourth")

    monkeypatch.setattr(grader, "_try", tried)
    result = grader.score([], "decode", SECRET, None)
    assert (result.points, result.message) == (0, "wrong for the fourth")
    assert result.case == "second"


def test_a_wrong_answer_meets_the_shown_cases_as_far_as_the_one_it_failed(worker):
    asked = []

    class Spy:
        def ask(self, job):
            asked.append(len(job["calls"]))
            return worker.ask(job)

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
    assert collect.define(cells, "lazy", {"decode"})["decode"]([]) == 6
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
    "truncated": (notebook(DECODE)[:200], "unreadable"),
    "empty": (b"", "unreadable"),
    "no JSON": (b"PK\x03\x04 and more", "unreadable"),
    "JSON, but no notebook": (b'{"cells": 3}', "unreadable"),
    "a list": (b"[1, 2]", "unreadable"),
    "nested too deep": (b"[" * 100_000, "unreadable"),
    "200 MB": (b'{"cells": "' + b" " * (200 * 2**20) + b'"}', "unreadable"),
}


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_notebook_gives_a_row_with_a_note(worker, name, tmp_path):
    content, status = FILES[name]
    (tmp_path / "ada.ipynb").write_bytes(content)
    (tmp_path / "bob.ipynb").write_bytes(notebook(IMPORTS, DECODE, APPEND))
    (ada, bob), _ = find(tmp_path)
    results = [grade(one, NAMES, SECRET, worker) for one in (ada, bob)]
    assert [r.status for r in results] == [status, "ok"]
    assert [r.points for r in results] == [0, 3]
    assert (
        results[0].notes and "ada.ipynb: unreadable, is it whole? " in results[0].notes[0]
    )


def test_formats_that_jupyter_would_refuse_are_read(worker):
    code = {"cell_type": "code", "source": [IMPORTS + "\n", DECODE]}
    bare = {"cells": [code, {"cell_type": "code", "source": APPEND}, {"odd": 1}, 7]}
    cells = [
        {"cell_type": "code", "language": "python", "input": [IMPORTS, "\n", DECODE]}
    ]
    cells += [{"cell_type": "code", "language": "python", "input": [APPEND]}]
    old = {"nbformat": 3, "nbformat_minor": 0, "metadata": {}}
    old["worksheets"] = [{"cells": cells, "metadata": {}}]
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
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


def test_submissions_are_found_however_a_platform_hands_them_over(tmp_path):
    one, other = notebook("ONE = 1"), notebook("OTHER = 2")
    files = {
        "ada.ipynb": one,
        "bob_03_kv_cache.ipynb": one,
        "Čapek, Karel_123_assignsubmission_file_/03_kv_cache (2).ipynb": one,
        "李 雷/inside/01_generation.ipynb": one,
        "李 雷/02_training.ipynb": other,
        "李 雷/.ipynb_checkpoints/02_training-checkpoint.ipynb": other,
        "bob_03_kv_cache-final (2).ipynb": one,
        "cy_03_kv_cache-Copy1.IPYNB": one,
        "dora.zip": packed({"x/01.ipynb": one, "__MACOSX/x/._01.ipynb": other}),
        "eve/all.zip": packed({"01.ipynb": one, "notes.txt": b""}),
        "frank.zip": b"no archive",
        "gil/report.pdf": b"%PDF",
        "roster.csv": b"",
        ".DS_Store": b"",
    }
    for name, content in files.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(content)
    (tmp_path / "folder" / "hal").mkdir()
    (tmp_path / "class.zip").write_bytes(packed(files))
    for path in (tmp_path / "folder", tmp_path / "class.zip"):
        found, ignored = find(path)
        sizes = {s.student: len(s.files) for s in found}
        sizes.pop("hal", None)  # a zip need not list an empty folder
        others = {"Čapek, Karel_123": 1, "李 雷": 2, "gil": 0}
        names = ("ada", "cy", "dora", "eve", "frank")
        assert sizes == others | dict.fromkeys(names, 1) | {"bob": 2}
        assert ignored == ["roster.csv"]
        notes = {s.student: s.read()[1] for s in found}
        assert "expected a zip archive" in notes["frank"][0]
        assert notes["gil"] == ["expected a notebook, found none"]


def test_the_last_of_several_files_is_the_one_handed_in_again(tmp_path):
    files = ("b (1).ipynb", "b.ipynb", "a.ipynb", "b-Copy1.ipynb")
    (tmp_path / "ada.zip").write_bytes(packed(dict.fromkeys(files, notebook())))
    (ada,), _ = find(tmp_path)
    assert [name for name, _ in ada.files] == [
        f"ada.zip/{name}" for name in ("a.ipynb", "b.ipynb", "b (1).ipynb")
    ]


def test_submissions_are_in_the_order_of_a_list_of_names(tmp_path):
    for name in ("bob.ipynb", "Cy.ipynb", "ada.ipynb", "Bob2.ipynb"):
        (tmp_path / name).write_bytes(notebook())
    assert [s.student for s in find(tmp_path)[0]] == ["ada", "bob", "Bob2", "Cy"]


def test_what_follows_a_chapters_name_may_be_the_students(tmp_path):
    for name in ("HW - 03_kv_cache - Bob.ipynb", "HW - 03_kv_cache - Ada.ipynb"):
        (tmp_path / name).write_bytes(notebook())
    assert len(find(tmp_path)[0]) == 2


def test_two_submissions_of_one_student_are_one_row_with_a_note(tmp_path):
    (tmp_path / "Zoe\u0308.ipynb").write_bytes(notebook("ONE = 1"))  # as macOS writes it
    (tmp_path / "Zo\u00eb.zip").write_bytes(packed({"a.ipynb": notebook("TWO = 2")}))
    (found,), _ = find(tmp_path)
    assert found.student == "Zo\u00eb" and len(found.files) == 2
    assert "handed in more than once, all is read" in found.notes[0]


def test_an_archive_cannot_grow_without_limit(tmp_path):
    bomb = packed({"a.ipynb": b" " * (60 * 2**20)})
    assert len(bomb) < 100_000
    (tmp_path / "ada.zip").write_bytes(bomb)
    (ada,), _ = find(tmp_path)
    assert "expected at most 20,971,520 bytes, got more" in ada.read()[1][0]


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
    for value in (deep, np.zeros(wire.MAX_BYTES)):
        with pytest.raises(wire.WireError, match="expected at most"):
            wire.encode(value)


def test_no_bytes_at_all_make_the_reader_stumble():
    rng = np.random.default_rng(1)
    good = wire.encode({"a": np.arange(6).reshape(2, 3), "b": [1.5, "x", None]})
    for _ in range(3000):
        broken = bytearray(good)
        for index in rng.integers(len(good), size=3):
            broken[index] = rng.integers(256)
        with contextlib.suppress(wire.WireError):
            wire.decode(bytes(broken[: rng.integers(len(good) + 1)]))
