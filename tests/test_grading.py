"""What submissions may hold, and what each must give.

Two exercises, `decode` and `append_kv`: what goes wrong in the first must not cost the
second. Every attack that was ever tried on the grader stays here.
"""

import os
import textwrap

import nbformat
import pytest

from lib.course.grading import grader
from lib.course.grading.grader import Worker, grade
from lib.course.grading.submissions import Submission
from lib.course.stubs import answer, stub

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")

NAMES = ["decode", "append_kv"]
SECRET = 4711
IMPORTS = "import torch\nfrom lib import kv_cache\nfrom lib.kv_cache import new_positions"
DECODE, APPEND = answer("lib.text", ["decode"]), answer("lib.kv_cache", ["append_kv"])
WRONG = "def decode(token_ids):\n    return 'whale'"
BOTH, ONLY_APPEND, ONLY_DECODE, NONE = (1, 2), (0, 2), (1, 0), (0, 0)


@pytest.fixture(scope="module")
def worker():
    grader.tried_on.cache_clear()
    kept, grader.LEAST_SECONDS = grader.LEAST_SECONDS, 1  # lest we wait for time-outs
    worker = Worker()
    yield worker
    worker.close()
    grader.LEAST_SECONDS = kept
    grader.tried_on.cache_clear()


def notebook(*cells: str, **metadata) -> bytes:
    cells = [nbformat.v4.new_code_cell(source) for source in cells]
    return nbformat.writes(nbformat.v4.new_notebook(cells=cells, **metadata)).encode()


def submission(*contents: bytes) -> Submission:
    files = [(f"{i}.ipynb", lambda c=content: c) for i, content in enumerate(contents)]
    return Submission("ada", files)


def points(worker, *contents: bytes):
    result = grade(submission(*contents), NAMES, SECRET, worker)
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
    "inputs changed": (
        [body("out = right(token_ids)\ntoken_ids += 1\nreturn out"), APPEND],
        BOTH,  # decode's driver makes the tensor: nobody sees it
    ),
}


@pytest.mark.parametrize("name", ACCIDENTS)
def test_an_accident_costs_its_own_exercise_and_no_other(worker, name):
    cells, expected = ACCIDENTS[name]
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
    "ignores the alarm": body(
        """
        import signal
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
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
def test_an_attack_earns_nothing_and_harms_nobody(worker, name):
    got, result = points(worker, notebook(IMPORTS, ATTACKS[name], APPEND))
    assert got == ONLY_APPEND, [score.message for score in result.scores.values()]
    assert all("\n" not in s.message for s in result.scores.values())
