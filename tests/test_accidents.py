"""What passes `check` in a notebook that is run from top to bottom gets the points.

Each row of the list is a notebook. It is run in IPython, cell by cell, and graded, which
runs only what the answer needs: the two verdicts must agree.
"""

import os
import sys
import textwrap
from pathlib import Path

import nbformat
import pytest

from lib.course.attempt import NOT_WRITTEN
from lib.course.check import SEED, judge
from lib.course.collect import answers
from lib.course.exercises import exercises
from lib.course.fork import in_fork
from lib.course.grading.grader import Worker, score
from lib.course.stubs import answer, stub

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")

SECRET = 4711
IMPORTS = (
    "import math\nimport torch\nimport torch.nn.functional as F\n"
    "from lib.course.check import check"
)
DECODE, STUB = answer("lib.text", ["decode"]), stub("lib.text", ["decode"], [])
APPEND = answer("lib.kv_cache", ["append_kv"])
CHECK = "check(decode)"
ATTEND = """def attend_causal(layer, q, k, v):
    q, k, v = (x.reshape(-1, *x.shape[-3:]).transpose(1, 2) for x in (q, k, v))
    return sdpa(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)"""


def decode(body: str = "", mode: str = "'replace'") -> str:
    """A right `decode` that does this first, and takes the mode from there."""
    body = textwrap.indent(textwrap.dedent(body).strip(), "    ") + "\n" if body else ""
    returned = f"    return bytes(token_ids.tolist()).decode('utf-8', errors={mode})"
    return f"def decode(token_ids):\n{body}{returned}"


# Notebooks behind their first cell, each with a right answer: a name for what happened.
RIGHT = {
    "nothing at all": [DECODE, CHECK],
    # of the language
    "annotations that nobody imported": [
        "from __future__ import annotations",
        DECODE.replace("torch.Tensor", "Tensor"),
        CHECK,
    ],
    "annotations of a class in text": [
        "from dataclasses import dataclass\n"
        "@dataclass\nclass P:\n    m: 'str' = 'replace'",
        decode(mode="P().m"),
        CHECK,
    ],
    "a class that asks for its annotations when it is called": [
        "import typing\nfrom dataclasses import dataclass\nclass A:\n    pass\n"
        "@dataclass\nclass P:\n    a: 'A'",
        decode("assert typing.get_type_hints(P)['a'] is A"),
        CHECK,
    ],
    "a look at its own module": [
        "import sys\nMODE = 'replace'",
        decode("assert sys.modules[__name__].MODE is MODE", "MODE"),
        CHECK,
    ],
    "a guard as in a script": [
        f"if __name__ == '__main__':\n{textwrap.indent(DECODE, '    ')}",
        CHECK,
    ],
    "a builtin's name rebound by an import": [
        "from torch import sum",
        decode("assert sum(token_ids) == token_ids.sum()"),
        CHECK,
    ],
    "a builtin's name rebound by a function": [
        "def bytes(ids):\n    return bytearray(ids)",
        DECODE,
        CHECK,
    ],
    "statements that share a line": [
        "x = dict(\na=1,\n); y = 2\nz = 'repl'; MODE = z + 'ace'",
        decode("assert x['a'] + y == 3", "MODE"),
        CHECK,
    ],
    "a docstring before a semicolon": [
        '"""The mode.\n"""; MODE = "replace"; "and more"',
        decode(mode="MODE"),
        CHECK,
    ],
    "a value made under with": [
        "with torch.no_grad():\n    W = torch.eye(3)",
        decode("W.sum()"),
        CHECK,
    ],
    "a value made under match": [
        "match 3:\n    case 3:\n        MODE = 'replace'\n    case other:\n        pass",
        decode(mode="MODE"),
        CHECK,
    ],
    "a walrus": [
        "print(MODE := 'replace')",
        "if (n := len(MODE)) > 3:\n    pass",
        decode("assert n == 7", "MODE"),
        CHECK,
    ],
    "a value changed in place": [
        "T = {'a': 'repl'}\nT['a'] += 'ace'\nn = 1\nn += 1",
        decode("assert n == 2", "T['a']"),
        CHECK,
    ],
    "a table that a loop fills": [
        "T = {}\nfor i in range(256):\n    T[i] = i",
        "k = 0\nwhile k < 3:\n    k += 1",
        decode("assert len(T) == 256 and k == 3"),
        CHECK,
    ],
    "a table that a function fills": [
        "T = []\ndef fill(table):\n    table.append('replace')",
        "fill(T)",
        decode(mode="T[0]"),
        CHECK,
    ],
    "a table that a function knows": [
        "T = []\ndef fill():\n    T.append('replace')",
        "fill()",
        decode(mode="T[0]"),
        CHECK,
    ],
    "functions that register themselves": [
        "TOOLS = {}\ndef register(f):\n    TOOLS[f.__name__] = f\n    return f",
        "@register\ndef mode():\n    return 'replace'",
        decode(mode="TOOLS['mode']()"),
        CHECK,
    ],
    "a list that is put into another order": [
        "import random\nfrom heapq import heapify\nT = ['replace'] * 3",
        "random.shuffle(T)\nheapify(T)",
        decode(mode="T[0]"),
        CHECK,
    ],
    "threads": [
        "from concurrent.futures import ThreadPoolExecutor",
        decode("ThreadPoolExecutor(2).submit(int, 3).result()"),
        CHECK,
    ],
    "a name that a function makes global": [
        "def setup():\n    global MODE\n    MODE = 'replace'",
        "setup()",
        decode(mode="MODE"),
        CHECK,
    ],
    "a helper set on a class": [
        "class Tools:\n    pass",
        "def mode(self):\n    return 'replace'",
        "Tools.mode = mode",
        "setattr(Tools, 'other', mode)",
        decode("Tools().other()", "Tools().mode()"),
        CHECK,
    ],
    "a class that stands below its parent's table": [
        "class Modes(dict):\n    pass\nMODES = Modes()\nMODES.update(a='replace')",
        decode(mode="MODES['a']"),
        CHECK,
    ],
    "a decorator": [
        "import functools\ndef noisy(f):\n    @functools.wraps(f)\n"
        "    def g(*args):\n        print('called')\n        return f(*args)\n"
        "    return g",
        f"@noisy\n{DECODE}",
        CHECK,
    ],
    "a decorator that loses the name": [
        "def noisy(f):\n    return lambda *args: f(*args)",
        f"@noisy\n{DECODE}",
        CHECK,
    ],
    "a partial": [
        "import functools\ndef mine(token_ids, mode):\n"
        "    return bytes(token_ids.tolist()).decode(errors=mode)",
        "decode = functools.partial(mine, mode='replace')",
        CHECK,
    ],
    "a lambda": ["decode = lambda t: bytes(t.tolist()).decode(errors='replace')", CHECK],
    "another name for it": [
        DECODE.replace("def decode", "def other"),
        "decode = other",
        CHECK,
    ],
    "an object that is called": [
        f"class Decode:\n    def __call__(self, t):\n"
        f"        return right(t)\n{DECODE.replace('def decode', 'def right')}",
        "decode = Decode()",
        CHECK,
    ],
    "a method that is bound": [
        "class Tools:\n    def decode(self, t):\n"
        "        return bytes(t.tolist()).decode(errors='replace')",
        "decode = Tools().decode",
        CHECK,
    ],
    "a class that is text": [
        "class decode(str):\n    def __new__(cls, t):\n"
        "        return bytes(t.tolist()).decode(errors='replace')",
        CHECK,
    ],
    "made by exec": [f"exec({DECODE!r})", CHECK],
    "set among the globals": [
        DECODE.replace("def decode", "def other"),
        "globals()['decode'] = other",
        CHECK,
    ],
    "an import inside try": [
        "try:\n    import not_there\nexcept ImportError:\n    not_there = None",
        decode("assert not_there is None"),
        CHECK,
    ],
    "an assertion about it below": [
        DECODE,
        "assert decode(torch.tensor([65])) == 'A'",
        CHECK,
    ],
    # of IPython
    "display left in": [decode("display(token_ids.shape)"), CHECK],
    "%time in the answer": [decode("%time x = token_ids.tolist()"), CHECK],
    "%timeit and ?": [decode("%timeit -n1 -r1 len(token_ids)"), "decode?", CHECK],
    "%%time above the answer": [f"%%time\n{DECODE}", CHECK],
    "%%capture above the answer": [f"%%capture out\n{DECODE}", CHECK],
    "%time before the check": [DECODE, f"%time {CHECK}"],
    "shell commands": ["!ls\nfiles = !ls", f"{DECODE}\n!ls", CHECK],
    "a shell command in the answer": [decode("!true"), CHECK],
    "a magic with a percent sign": ["%matplotlib inline", f"%pwd\n{DECODE}", CHECK],
    "what IPython has in every cell": [decode("get_ipython(), In, Out, _"), CHECK],
    "a question about a name in the answer's cell": [f"{DECODE}\nmath?", CHECK],
    "lone line ends of an old Mac": [DECODE.replace("\n", "\r"), CHECK],
    "line ends of Windows": [DECODE.replace("\n", "\r\n"), CHECK],
    # of notebooks
    "a stub below": [DECODE, CHECK, STUB],
    "a stub below, which is asked about too": [DECODE, CHECK, STUB, "decode?"],
    "a stub above": [STUB, CHECK, DECODE, CHECK],
    "a wrong one above": ["def decode(t):\n    return ''", CHECK, DECODE, CHECK],
    "another one below": [DECODE, CHECK, "def decode(t, n):\n    return n"],
    "a helper of the same name below": [
        "def convert(t):\n    return bytes(t.tolist())",
        "def decode(t):\n    return convert(t).decode(errors='replace')",
        CHECK,
        "def convert(t, scale):\n    return t * scale",
    ],
    "a helper between it and the check": [
        "def convert(t):\n    return None",
        "def decode(t):\n    return convert(t).decode(errors='replace')",
        "def convert(t):\n    return bytes(t.tolist())",
        CHECK,
        "def convert(t, scale):\n    return t * scale",
    ],
    "a table that is emptied below": [
        "T = {'mode': 'replace'}",
        decode(mode="T['mode']"),
        CHECK,
        "T.clear()",
        "T['mode'] = 'strict'",
        "del T",
    ],
    "its name used for its result": [
        DECODE,
        CHECK,
        "decode = decode(torch.tensor([65]))",
    ],
    "its name for the variable of a loop": [
        DECODE,
        "for decode in (decode, decode):\n    pass",
        CHECK,
    ],
    "a broken lambda below": [DECODE, CHECK, "twice = lambda x, x: decode(x)"],
    "a broken lambda above": ["twice = lambda x, x: decode(x)", DECODE, CHECK],
    "a cell that does not parse": [DECODE, CHECK, "decode(decode("],
    "a cell that raises what is no error": [
        "class Odd(BaseException):\n    pass\ndef fail():\n    raise Odd",
        "X = decode = fail()",
        DECODE,
        CHECK,
    ],
    "a cell that raises": [DECODE, CHECK, "raise ValueError(decode)"],
    "a cell in another language": ["%%bash\ndecode", DECODE, CHECK],
    "a name made and taken away": ["x = decode = 3\ndel decode, x", DECODE, CHECK],
    "raise left behind its return": [
        f"{DECODE}\n    raise NotImplementedError",
        CHECK,
    ],
    "raise left behind its return, and a stub below": [
        f"{DECODE}\n    raise NotImplementedError",
        CHECK,
        STUB,
    ],
    "raise for what never comes": [
        decode("if token_ids.ndim > 9:\n    raise NotImplementedError('so deep')"),
        CHECK,
    ],
    "state that the page has set": [
        "torch.set_default_dtype(torch.float64)\ntorch.set_grad_enabled(False)\n"
        "import sys; sys.setrecursionlimit(5000)\nimport warnings\n"
        "warnings.simplefilter('error')",
        decode("warnings.warn('careful')"),
        CHECK,
    ],
}
# Notebooks whose answer fails in both.
WRONG = {
    "a stub": ([STUB, CHECK], NOT_WRITTEN),
    "raise left before its return": (
        [decode("raise NotImplementedError"), CHECK],
        NOT_WRITTEN,
    ),
    "a helper that is not written": (
        ["def mine(t):\n    raise NotImplementedError", decode("mine(token_ids)"), CHECK],
        "not written yet",
    ),
    "an object that raises": (
        [
            "class Decode:\n    __name__ = 'decode'\n    def __call__(self, t):\n"
            "        return t.nothing\ndecode = Decode()",
            CHECK,
        ],
        "raised AttributeError: 'Tensor' object has no attribute 'nothing', in "
        "`return t.nothing`",
    ),
    "a class that raises": (
        [
            "class decode:\n    def __init__(self, t):\n        raise KeyError(1)",
            CHECK,
        ],
        "raised KeyError: 1, in `raise KeyError(1)`",
    ),
    "a partial that raises": (
        [
            "import functools\ndef mine(t, n):\n    return t[n]",
            "decode = functools.partial(mine, n='a')",
            CHECK,
        ],
        "in `return t[n]`",
    ),
    "a generator": ([decode("yield 1"), CHECK], "expected"),
    "a coroutine": ([f"async {DECODE}", CHECK], "expected"),
    "a result that cannot be shown": (
        [
            "class Odd(str):\n    def __repr__(self):\n        raise ValueError\n"
            "    __str__ = __eq__ = __bool__ = __len__ = __repr__\n    __hash__ = None",
            "def decode(t):\n    return Odd('whale')",
            CHECK,
        ],
        "",
    ),
    "an error that cannot be shown": (
        [
            "class Odd(Exception):\n    def __str__(self):\n        raise ValueError",
            "def decode(t):\n    raise Odd",
            CHECK,
        ],
        "raised Odd",
    ),
    "an error of a kind of its own": (
        [
            "class Odd(BaseException):\n    pass\ndef decode(t):\n    raise Odd('!')",
            CHECK,
        ],
        "raised Odd: !",
    ),
    "an end without a return": ([decode("return decode(token_ids)"), CHECK], "Recursion"),
    "one below that nobody has checked": (
        ["def decode(t):\n    return ''", CHECK, DECODE],
        "wrong for plain letters",
    ),
}
# What only a whole run of the page makes: right for `check`, and not for the grader.
NEVER = {
    "a file of the student's": (
        [
            "import pathlib\npathlib.Path('mine.py').write_text("
            "'def decode(t): return bytes(t.tolist()).decode(errors=\"replace\")')",
            "from mine import decode",
            CHECK,
        ],
        "No module named 'mine'",
    ),
    "a file beside the notebook": (
        [
            "import pathlib\npathlib.Path('mode.txt').write_text('replace')",
            decode(mode="open('mode.txt').read()"),
            CHECK,
        ],
        "raised FileNotFoundError: [Errno 2] No such file or directory: 'mode.txt'",
    ),
    "what must be waited for": (
        [
            "async def mode():\n    return 'replace'",
            "MODE = await mode()",
            decode(mode="MODE"),
            CHECK,
        ],
        "errors=MODE)`. MODE: its cell fails: SyntaxError: 'await' outside function",
    ),
    "a table of other processes": (
        [
            "from multiprocessing import Pool",
            "with Pool(2) as pool:\n    MODES = pool.map(str.lower, ['REPLACE'])",
            decode(mode="MODES[0]"),
            CHECK,
        ],
        "MODES: its cell fails: ",
    ),
    "a table filled in passing": (
        [
            "def fill(table):\n    table['mode'] = 'replace'",
            "t = {}",
            "_ = fill(t)",
            decode(mode="t['mode']"),
            CHECK,
        ],
        "raised KeyError: 'mode'",
    ),
    "a name that stands in text alone": (
        ["MODE = 'replace'", decode(mode="globals()['MODE']"), CHECK],
        "raised KeyError: 'MODE'",
    ),
}
FORBIDDEN = {
    "by name": "from torch.nn.functional import scaled_dot_product_attention as sdpa",
    "from a dict": "sdpa = F.__dict__['scaled_dot_product_attention']",
    "by a partial": (
        "import functools\nsdpa = functools.partial(F.scaled_dot_product_attention)"
    ),
    "by torch's operators": "def sdpa(*qkv, **settings):\n"
    "    return torch.ops.aten.scaled_dot_product_attention(*qkv, **settings)",
    "by a helper's default": (
        "def sdpa(*qkv, f=F.scaled_dot_product_attention, **settings):\n"
        "    return f(*qkv, **settings)"
    ),
}


def in_ipython(cells: list[str], name: str, folder: Path) -> tuple[bool, str]:
    """What `check` said last, in a notebook that is run from top to bottom."""

    def run() -> tuple[bool, str]:
        from IPython.core.interactiveshell import InteractiveShell
        from traitlets.config import Config

        os.chdir(folder)
        sys.path.insert(0, "")
        config = Config()
        config.HistoryManager.enabled = False
        shell = InteractiveShell.instance(config=config)
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        for cell in cells:
            shell.run_cell(cell)
        result = shell.user_ns["check"].results.get(name)
        return (result.passed, result.message) if result else (False, "not checked")

    return in_fork(run)


@pytest.fixture(scope="module")
def worker(no_hurry):
    worker = Worker()
    yield worker
    worker.close()


def verdicts(worker, cells: list[str], name: str, folder: Path):
    cells = [IMPORTS, *cells]
    result = score([cells], name, SECRET, worker)
    live = in_ipython(cells, name, folder)
    return live, (result.points == result.max_points, result.message)


@pytest.mark.parametrize("accident", RIGHT)
def test_a_right_answer_passes_in_the_notebook_and_in_the_grader(
    worker, tmp_path, accident
):
    live, graded = verdicts(worker, RIGHT[accident], "decode", tmp_path)
    assert (live, graded) == ((True, "passed"), (True, "passed"))


def test_check_collect_finds_what_the_grader_finds(tmp_path, capfd):
    def collected(cells: list[str]) -> str:
        main = sys.modules["__main__"]
        cells = [nbformat.v4.new_code_cell(source) for source in [IMPORTS, *cells]]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "a.ipynb")
        messages = {
            name: judge(exercises()[name], found, SEED).message
            for name, found in answers(tmp_path / "a.ipynb")
        }
        assert sys.modules["__main__"] is main
        return messages["decode"]

    def collect() -> dict[str, str]:
        return {accident: collected(cells) for accident, cells in RIGHT.items()}

    assert in_fork(collect) == dict.fromkeys(RIGHT, "passed")
    assert capfd.readouterr() == ("", ""), "no page is run"


@pytest.mark.parametrize("accident", WRONG)
def test_a_wrong_answer_is_told_so_by_both(worker, tmp_path, accident):
    cells, says = WRONG[accident]
    for passed, message in verdicts(worker, cells, "decode", tmp_path):
        assert not passed and says in message, message


@pytest.mark.parametrize("accident", NEVER)
def test_what_cannot_be_graded_is_told_in_words(worker, tmp_path, accident):
    cells, says = NEVER[accident]
    live, (passed, message) = verdicts(worker, cells, "decode", tmp_path)
    assert live == (True, "passed") and not passed and says in message, message


@pytest.mark.parametrize("way", FORBIDDEN)
def test_a_forbidden_function_is_refused_by_both(worker, tmp_path, way):
    cells = [FORBIDDEN[way], ATTEND, "check(attend_causal)"]
    for passed, message in verdicts(worker, cells, "attend_causal", tmp_path):
        assert not passed and "is not allowed here: write it yourself" in message
