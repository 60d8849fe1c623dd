"""Runs students' functions, on inputs that the grader sends.

    python -m lib.course.grading.worker FOLDER     jobs on stdin, replies on stdout

The worker imports what every exercise needs, once, and forks for each job. The copy takes
the library's own answer away, executes the definitions of the notebook, calls what they
define with the inputs of one case after the other, and sends what came out. It knows no
expected value.

Whatever a job does, the worker goes on. A job is limited in time, memory and files, what
it prints goes nowhere, and what it leaves running is ended.
"""

import contextlib
import copy
import importlib
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import torch

from lib.course import collect
from lib.course.attempt import (
    NOT_WRITTEN,
    attempt,
    function_of,
    in_a_line,
    not_compiled,
    not_ready,
)
from lib.course.exercises import Exercise, exercises, library_answer
from lib.course.grading import sandbox, wire
from lib.course.shipped import withheld_names

MEMORY_BYTES = 2 * 2**30  # of data that a job may ask for, beyond what the worker has
RESIDENT_BYTES = 4 * 2**30  # of all processes of a job together
FILE_BYTES = 16 * 2**20
REPLY_BYTES = wire.MAX_BYTES // 2  # to a job; the largest right one is 1.1 MB
# Seconds by the clock for each of processor time that a call may take: a call, all calls.
CALL_BY_CLOCK, ALL_BY_CLOCK = 2, 4
SECONDS_TO_COMPILE = 120  # a kernel; it has limits of its own
# How a job ends, and what is said of an answer that nobody wrote.
DONE, UNREADY, TIMEOUT, CRASHED = "done", "unready", "timeout", "crashed"
NOT_THERE = "not there"
COMPILING = "compiling"  # no end yet
# What chapters import, so that no job has to wait for it.
IMPORTS = (
    "IPython.display",
    "lib.figures.plotting",
    "lib.figures.drawing",
    "lib.measure.table",
    "lib.simulation",
)


def main(folder: str):
    torch.set_num_threads(1)  # the copy of a process with more of them may hang
    for name in IMPORTS:
        importlib.import_module(name)
    jobs, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sandbox.adopt_orphans()
    tempfile.tempdir = folder  # no other can be written to; torch asks for one
    wire.write(replies, wire.encode({"sandbox": sandbox.enter(folder)}))
    warm: set[str] = set()
    while True:
        try:
            job = wire.decode(wire.read(jobs))
        except EOFError:
            return
        if job["name"] not in warm:
            warm.add(job["name"])
            _warm_up(exercises()[job["name"]], job["calls"][0])
        wire.write(replies, wire.encode(run(job, folder)))


def _warm_up(exercise: Exercise, inputs: dict):
    """Do here, for all copies, what the first call of anything does once."""
    with contextlib.suppress(NotImplementedError):  # an answer that was not handed out
        exercise.driver()(library_answer(exercise.name), **copy.deepcopy(inputs))


def run(job: dict, folder: str) -> dict:
    """The reply to a job, whatever happens.

    job: {"name": of the exercise, "notebooks": code cells of each, "calls": inputs of
    each case, "seconds": of processor time that a call may take}. Reply: {"status": how
    it ended, "words": what there is to say of that, or None, "attempts": one a case, as
    far as it got}.
    """
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        with os.fdopen(write_end, "wb") as pipe:
            try:
                _prepare(folder, write_end)
                _answer(job, pipe)
            except BaseException as error:  # SystemExit and KeyboardInterrupt too
                words = f"the worker failed: {in_a_line(error)}"
                _send(pipe, {"status": CRASHED, "words": words})
        os._exit(0)
    os.close(write_end)
    try:
        is_kernel = exercises()[job["name"]].is_kernel
        return _listen(read_end, ALL_BY_CLOCK * job["seconds"], is_kernel)
    finally:
        os.close(read_end)
        _end_all(child)
        _empty(folder)


def _listen(read_end: int, seconds: float, may_compile: bool) -> dict:
    """Collect what the copy sends until it ends, or its time or memory is used up."""
    attempts: list[dict] = []

    def ended(status: str, words: str | None) -> dict:
        return {"status": status, "words": words, "attempts": attempts}

    data, num_bytes, deadline = bytearray(), 0, time.monotonic() + seconds
    look_again = 0.0  # at the memory
    while True:
        now = time.monotonic()
        if now > deadline:
            return ended(TIMEOUT, "took too long, and could not be interrupted")
        if now > look_again:
            look_again = now + 0.05
            if _resident_bytes() > RESIDENT_BYTES:
                return ended(CRASHED, f"used more than {RESIDENT_BYTES // 2**30} GiB")
        if not select.select([read_end], [], [], 0.05)[0]:
            continue
        chunk = os.read(read_end, 2**20)
        if not chunk:
            return ended(CRASHED, "crashed: its process ended")
        data += chunk
        num_bytes += len(chunk)
        if num_bytes > REPLY_BYTES:
            return ended(CRASHED, f"gave more than {REPLY_BYTES:,} bytes")
        try:
            for message in wire.take_messages(data):
                if message.get("status") == COMPILING and may_compile:
                    may_compile = False  # but once
                    deadline = time.monotonic() + SECONDS_TO_COMPILE
                elif "status" in message:  # the end, whoever still holds the pipe
                    words = message["words"]
                    return ended(str(message["status"]), words and str(words)[:500])
                else:
                    attempts.append(message)
        except (wire.WireError, AttributeError, KeyError):
            return ended(CRASHED, "sent what is no message")


def _prepare(folder: str, pipe: int):
    """In the copy: a group of its own, limits, no terminal, no way to the grader but
    `pipe`, an empty folder."""
    os.setsid()
    os.closerange(3, pipe)
    os.closerange(pipe + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    if os.getppid() == 1:
        sandbox.drop_rights()
    sandbox.end_with_parent()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    sys.stdin = open(os.devnull)  # noqa: SIM115  for as long as the copy lives
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    os.chdir(folder)
    os.environ["HOME"] = os.environ["TMPDIR"] = folder
    for kind, limit in (
        (resource.RLIMIT_DATA, _data_bytes() + MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))
    signal.signal(signal.SIGPROF, _too_late)
    signal.signal(signal.SIGALRM, _too_late)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class TooLateError(BaseException):
    """No Exception, lest a student's `except Exception` keep it."""


def _too_late(*_):
    raise TooLateError


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Of processor time, so that a busy machine is nobody's fault; by the clock a limit
    too, for what sleeps."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, CALL_BY_CLOCK * seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _answer(job: dict, pipe: BinaryIO):
    exercise = exercises()[job["name"]]
    remove(exercise)
    failures: dict[str, str] = {}
    answer = _find(exercise, job, failures)
    if answer is None:
        unready = failures.get(exercise.name, NOT_THERE)
    else:
        unready = not_ready(exercise, answer)
    if unready:
        return _send(pipe, {"status": UNREADY, "words": unready})
    for inputs in job["calls"]:
        try:
            with _at_most(job["seconds"]):
                attempted = attempt(exercise, answer, inputs)
        except TooLateError:
            words = f"took longer than {job['seconds']:.0f} seconds"
            return _send(pipe, {"status": TIMEOUT, "words": words})
        except BaseException as error:  # KeyboardInterrupt; others end in `attempt`
            return _send(pipe, {"status": CRASHED, "words": f"raised {in_a_line(error)}"})
        if not attempted:
            return _send(pipe, {"status": UNREADY, "words": NOT_WRITTEN})
        _send(pipe, attempted)
    if exercise.is_kernel:
        _send(pipe, {"status": COMPILING})
    return _send(pipe, {"status": DONE, "words": not_compiled(exercise, answer)})


def _send(pipe: BinaryIO, message: dict):
    try:
        encoded = wire.encode(message)
    except wire.WireError as error:
        encoded = wire.encode({"error": f"gave what cannot be compared: {error}"})
    wire.write(pipe, encoded)


def _find(exercise: Exercise, job: dict, failures: dict[str, str]) -> Callable | None:
    """The student's answer, now in the library's place, or None.

    Of several notebooks' answers the last counts that is written. Where the library's
    others are withheld, the student's stand in for these too.
    """
    notebooks = [
        collect.Notebook(cells, f"notebook {number}")
        for number, cells in enumerate(job["notebooks"], start=1)
    ]
    guard = _Guard(job["seconds"])

    def find(name: str, inputs: dict | None) -> Callable | None:
        candidates = (
            answer
            for notebook in reversed(notebooks)
            for answer in notebook.define(name, guard, failures)
        )
        answer = collect.written(exercises()[name], candidates, inputs, guard)
        if answer is not None:
            setattr(exercises()[name].owner, name, answer)
        return answer

    for name in withheld_names():
        if name != exercise.name:
            find(name, None)
    return find(exercise.name, job["calls"][0])


class _Guard:
    """Around each statement and try: too late is no worse than any other error, but it
    halves the time that there is for the next."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        try:
            with _at_most(self.seconds):
                yield
        except (TooLateError, KeyboardInterrupt):
            self.seconds /= 2


def remove(exercise: Exercise):
    """Take the library's own answer away, from whoever holds on to it."""

    def removed(*args, **kwargs):
        raise LookupError("the library's own answer is not here: write yours")

    for name in (exercise.name, *exercise.parts):
        ours = vars(exercise.owner)[name]
        functions = [ours] if not isinstance(ours, type) else list(vars(ours).values())
        for function in functions:
            function = function_of(getattr(function, "__func__", function))
            if hasattr(function, "__code__"):
                function.__code__ = removed.__code__
                function.__defaults__, function.__kwdefaults__ = (), {}
        if exercise.is_kernel:
            vars(ours).clear()  # what Triton has made of it


def _data_bytes() -> int:
    """What RLIMIT_DATA counts of this process."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[5])
    except OSError:  # no Linux
        return 0
    return pages * resource.getpagesize()


def _resident_bytes() -> int:
    """Of all processes of the job, from 0 where nobody can tell."""
    total = 0
    for pid in _descendants(os.getpid()):
        with contextlib.suppress(OSError):
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return total * resource.getpagesize()


def _descendants(pid: int) -> list[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    children = [int(child) for child in text.split()]
    return children + [other for child in children for other in _descendants(child)]


def _end_all(child: int):
    """The copy, and all that it started, also what left its group."""
    with contextlib.suppress(OSError):
        os.killpg(child, signal.SIGKILL)
    while True:
        with contextlib.suppress(OSError):
            if os.getpid() == 1:
                os.kill(-1, signal.SIGKILL)  # all of this namespace but the worker
            else:
                for pid in _descendants(os.getpid()):
                    os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _empty(folder: str):
    for path in Path(folder).iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()


if __name__ == "__main__":
    main(sys.argv[1])
