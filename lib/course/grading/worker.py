"""Runs students' functions, on inputs that the grader sends.

    python -m lib.course.grading.worker FOLDER LAYERS

The worker imports what every exercise needs, once, and forks for each job. The copy gets
two pipes to the grader. From one it reads a notebook, takes the library's own answer away
and executes the notebook's definitions; then it reads the inputs of one case after the
other, calls what is defined, and sends what came out into the other. It knows no expected
value, and no input before its call.

The worker sees nothing of this, so no job finds another's in its memory. Stdin is a
socket, by which the grader says what to begin and when to end it. Whatever a job does,
the worker goes on. A job is limited in time, memory and files, what it prints goes
nowhere, and what it leaves running is ended.
"""

import contextlib
import copy
import functools
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import tempfile
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
from lib.course.check import SEED
from lib.course.exercises import Exercise, exercises, library_answer
from lib.course.grading import sandbox, wire
from lib.course.shipped import withheld_names

MEMORY_BYTES = 2 * 2**30  # of data that a job may ask for, beyond what the worker has
# Of memory of any kind. Kernels are tried on numbers 2**30 apart, with nothing between.
VIRTUAL_BYTES, FAR_BYTES = 4 * 2**30, 24 * 2**30
FILE_BYTES = 16 * 2**20
MOST_PROCESSES = 4096  # of a user: of root's none are counted
MOST_DESCRIPTORS = 256  # each may be a pipe or pair of sockets, with memory of its own
MESSAGE_BYTES = 1000  # between grader and worker; longer than any exercise's name
# Seconds by the clock for each of processor time that a call may take.
CALL_BY_CLOCK = 2
# How a job ends, and what is said of an answer that nobody wrote.
DONE, UNREADY, TIMEOUT, CRASHED = "done", "unready", "timeout", "crashed"
NOT_THERE = "not there"
READY, COMPILING = "ready", "compiling"  # no end yet
# What chapters import, so that no job has to wait for it.
IMPORTS = (
    "IPython.display",
    "lib.figures.plotting",
    "lib.figures.drawing",
    "lib.measure.table",
    "lib.simulation",
)


def main(folder: str, layers: list[str]):
    torch.set_num_threads(1)  # the copy of a process with more of them may hang
    for name in IMPORTS:
        importlib.import_module(name)
    grader = socket.socket(fileno=os.dup(0))
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(nowhere, descriptor)
    tempfile.tempdir = folder  # no other can be written to; torch asks for one
    held = sandbox.enter(folder, layers)
    has_memory_limits = all(
        _limit(kind, limit, for_good=False) for kind, limit in _memory(VIRTUAL_BYTES)
    )
    _say(grader, {"sandbox": sandbox.in_words(held, has_memory_limits)})
    warm: set[str] = set()
    while True:
        name, pipes, *_ = socket.recv_fds(grader, MESSAGE_BYTES, 2)
        if not name:
            return
        exercise = exercises()[name.decode()]
        if exercise.name not in warm:
            warm.add(exercise.name)
            _warm_up(exercise)
            gc.freeze()  # lest each copy look through, and so copy, all that is here
        virtual_limit = FAR_BYTES if exercise.is_kernel else VIRTUAL_BYTES
        words, is_as_before = run(grader, *pipes, folder, held, virtual_limit)
        _say(grader, {"words": words, "is_as_before": is_as_before})


def _say(grader: socket.socket, message: dict):
    grader.sendall(json.dumps(message).encode() + b"\n")


def _warm_up(exercise: Exercise):
    """Do here, for all copies, what the first call of anything does once."""
    with contextlib.suppress(NotImplementedError):  # an answer that was not handed out
        inputs = copy.deepcopy(_shown_inputs(exercise.name))
        exercise.driver()(library_answer(exercise.name), **inputs)


@functools.cache
def _shown_inputs(name: str) -> dict:
    """Of the first case of a notebook, which everybody may see."""
    return exercises()[name].cases(SEED)[0].inputs


def run(
    grader: socket.socket,
    inbox: int,
    outbox: int,
    folder: str,
    held: tuple[str, ...],
    virtual_limit: int,
) -> tuple[str | None, bool]:
    """A job, until the grader says that it is over: what it used up, in words, and
    whether all of it has ended and nothing of the worker is changed."""
    child = sandbox.fork(held)
    if child == 0:
        with os.fdopen(outbox, "wb") as replies:
            try:
                _prepare(inbox, outbox, folder, held, virtual_limit)
                with os.fdopen(inbox, "rb") as messages:
                    _answer(messages, replies)
            except BaseException as error:  # SystemExit and KeyboardInterrupt too
                words = f"the worker failed: {in_a_line(error)}"
                _send(replies, {"status": CRASHED, "words": words})
        os._exit(0)
    for pipe in (inbox, outbox):
        os.close(pipe)
    words, before = None, sandbox.state()
    _say(grader, {"group": None if sandbox.NAMESPACES in held else child})
    while not words and not select.select([grader], [], [], 0.05)[0]:
        words = sandbox.too_much(folder, virtual_limit)
        if sandbox.has_ended(child):
            break  # whatever it has left holds its pipes
    is_ended = sandbox.end(child)
    if sandbox.NAMESPACES not in held:  # with them, it had another there
        sandbox.empty(folder)
    grader.recv(1)
    return words, is_ended and sandbox.state() == before


def _prepare(
    inbox: int, outbox: int, folder: str, held: tuple[str, ...], virtual_limit: int
):
    """In the copy: a group of its own, limits, no terminal, no way to the grader but the
    two pipes, an empty folder, and nothing beside it that `held` keeps away."""
    import resource  # not on Windows

    os.setsid()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    first = 3
    for kept in (*sorted((inbox, outbox)), resource.getrlimit(resource.RLIMIT_NOFILE)[0]):
        os.closerange(first, kept)
        first = kept + 1
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115  as long as the copy lives
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for name in ("HOME", "TMPDIR", "PYTHONPATH"):
        os.environ[name] = folder
    for kind, limit in (
        *_memory(virtual_limit),
        (resource.RLIMIT_NOFILE, MOST_DESCRIPTORS),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, MOST_PROCESSES),
    ):
        _limit(kind, limit)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sandbox.confine(folder, held)


def _memory(virtual_limit: int) -> list[tuple[int, int]]:
    """The limits on a job's memory: what is limited, and the bytes."""
    import resource

    return [
        (resource.RLIMIT_DATA, _data_bytes() + MEMORY_BYTES),
        # And of what is shared, or empty and mapped all the same.
        (resource.RLIMIT_AS, sandbox.virtual_bytes() + virtual_limit),
    ]


def _limit(kind: int, limit: int, for_good: bool = True) -> bool:
    """Whether this process can have that limit, as it has from now on if it is for good.
    macOS refuses those of memory that are below what a process begins with."""
    import resource

    soft, hard = resource.getrlimit(kind)
    if hard != resource.RLIM_INFINITY:  # it may be lowered, and not raised
        limit = min(limit, hard)
    try:
        resource.setrlimit(kind, (limit, limit if for_good else hard))
    except (ValueError, OSError):
        return False
    if not for_good:
        resource.setrlimit(kind, (soft, hard))
    return True


class TooLateError(BaseException):
    """No Exception, lest a student's `except Exception` keep it."""


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Of processor time, so that a busy machine is nobody's fault; by the clock a limit
    too, for what sleeps, not for what waits for a processor."""
    waited = _seconds_waited()

    def too_late(number: int, frame):
        nonlocal waited
        more = _seconds_waited() - waited
        if number == signal.SIGALRM and more > 0.1:
            waited += more
            signal.setitimer(signal.ITIMER_REAL, more)
        else:
            raise TooLateError

    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, too_late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, CALL_BY_CLOCK * seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _seconds_waited() -> float:
    """That this process was ready and had no processor; 0 where nobody can tell."""
    try:
        return int(Path("/proc/self/schedstat").read_bytes().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


def _answer(messages: BinaryIO, replies: BinaryIO):
    """What the grader sends first: {"name": of the exercise, "notebooks": code cells of
    each, "seconds": of processor time that a call may take, "num_calls"}; then, for each
    call, its inputs."""
    job = wire.decode(wire.read(messages))
    exercise = exercises()[job["name"]]
    remove(exercise)
    failures: dict[str, str] = {}
    answer = _find(exercise, job, failures)
    if answer is None:
        unready = failures.get(exercise.name, NOT_THERE)
    else:
        unready = not_ready(exercise, answer)
    if unready:
        return _send(replies, {"status": UNREADY, "words": unready})
    gc.freeze()  # what is there stays: the meter collects again and again
    others = [f"{n}: {words}" for n, words in failures.items() if n != exercise.name]
    _send(replies, {"status": READY, "words": ". ".join(others[:3])})
    for _ in range(job["num_calls"]):
        inputs = wire.decode(wire.read(messages))
        try:
            with _at_most(job["seconds"]):
                attempted = attempt(exercise, answer, inputs)
        except TooLateError:
            words = f"took longer than {job['seconds']:.0f} seconds"
            return _send(replies, {"status": TIMEOUT, "words": words})
        except BaseException as error:  # KeyboardInterrupt; others end in `attempt`
            words = f"raised {in_a_line(error)}"
            return _send(replies, {"status": CRASHED, "words": words})
        if not attempted:
            return _send(replies, {"status": UNREADY, "words": NOT_WRITTEN})
        _send(replies, attempted)
    if exercise.is_kernel:
        _send(replies, {"status": COMPILING})
    return _send(replies, {"status": DONE, "words": not_compiled(exercise, answer)})


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
    return find(exercise.name, _shown_inputs(exercise.name))


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
        pages = int(Path("/proc/self/statm").read_bytes().split()[5])
    except OSError:  # no Linux
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2].split(",") if sys.argv[2] else [])
