"""Points for submissions: asks a worker for outputs, and compares them here.

No line of a student's is executed in this process. What comes back is plain data.
"""

import contextlib
import functools
import json
import os
import queue
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from lib.course import ROOT
from lib.course.attempt import in_a_line
from lib.course.check import SEED, expected_outputs
from lib.course.compare import crash, verdict, waits_for
from lib.course.exercises import Case, exercises
from lib.course.grading import sandbox, wire
from lib.course.grading.submissions import Submission
from lib.course.grading.worker import (
    COMPILING,
    CRASHED,
    DONE,
    MESSAGE_BYTES,
    NOT_THERE,
    READY,
    TIMEOUT,
    UNREADY,
)

LEAST_SECONDS = 2  # of processor time, that any answer has for a call
MOST_TIMES_SLOWER = 20  # than the library's, where that takes longer
ALL_BY_CLOCK = 8  # seconds for all calls of an answer, for each that a call may take
SECONDS_TO_COMPILE = 120  # a kernel; it has limits of its own
PAUSES = (1, 5, 15, None)  # seconds, before a worker is started again
SECONDS_TO_START = 300  # a worker, or what a worker answers at once
REPLY_BYTES = wire.MAX_BYTES // 2  # of a job; the largest right one is 1.1 MB
OK, PARTIAL, UNREADABLE = "ok", "partial", "unreadable"  # what else a row's status may be
NO_NOTEBOOK = "no notebook that can be read"


@dataclass
class Score:
    """What became of one exercise.

    message: "passed", or what is wrong, in a line, on cases that anyone may see; of a
    hidden case only its name.
    """

    points: int
    max_points: int
    message: str
    case: str = ""  # the first that it failed, hidden or not
    status: str = OK  # whether it came to its end


@dataclass
class Grade:
    """What became of one submission."""

    student: str
    scores: dict[str, Score] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    is_readable: bool = True
    seconds: float = 0.0
    sandbox: str = ""
    sha256: str = ""

    @property
    def points(self) -> int:
        return sum(score.points for score in self.scores.values())

    @property
    def max_points(self) -> int:
        return sum(score.max_points for score in self.scores.values())

    @property
    def status(self) -> str:
        """Of its exercises' the worst; partial where there is something to note."""
        if not self.is_readable:
            return UNREADABLE
        ends = {score.status for score in self.scores.values()}
        for status in (TIMEOUT, CRASHED):
            if status in ends:
                return status
        return PARTIAL if self.notes else OK


class Worker:
    """A process that runs students' functions; started again when it has died, or when a
    student has changed it."""

    def __init__(self):
        self.process: subprocess.Popen | None = None
        self.is_closed = False
        self.sandbox = ""

    def ask(self, job: dict, is_enough: Callable[[int, dict], bool]) -> dict:
        """What became of a job; that it crashed where the worker died twice over it.

        job: {"name": of the exercise, "notebooks": code cells of each, "calls": inputs of
        each case, "seconds": of processor time that a call may take}. is_enough: of the
        number of a call and what came of it, whether no other has to be made. Reply:
        {"status": how it ended, "words": what there is to say of that, or None, "failed":
        what there is to say of the cells that it needs, "called": whether it has got the
        inputs of a call, "attempts": one a call, as far as it got}. Raises OSError where
        the worker does not start, which is no student's fault.
        """
        header = {key: value for key, value in job.items() if key != "calls"}
        header["num_calls"] = len(job["calls"])
        try:
            messages = [wire.framed(wire.encode(m)) for m in (header, *job["calls"])]
        except wire.WireError as error:
            return _reply(UNREADY, f"its cells: {error}")
        for _ in range(2):
            if self.is_closed:
                break
            self._be_there()
            try:
                return self._run(job["name"], messages, job["seconds"], is_enough)
            except (EOFError, OSError, ValueError, KeyError, TypeError):
                self._end()
        return _reply(CRASHED, CRASHED)

    def _be_there(self):
        """Wait for it; begin again where what others do on the machine has ended it."""
        for seconds in PAUSES:
            try:
                if self.process is None:
                    self.start()
                if not self.sandbox:
                    self._greet()
                return
            except OSError:
                if seconds is None or self.is_closed:
                    raise
                time.sleep(seconds)

    def start(self):
        """Do not wait for it: that is a few seconds of imports."""
        self.sandbox, self.group = "", None
        self.folder = tempfile.mkdtemp(prefix="grading-")
        module = "lib.course.grading.worker"
        layers = sandbox.LAYERS
        command = (sys.executable, "-m", module, self.folder, ",".join(layers))
        self.control, theirs = socket.socketpair()
        try:
            with theirs:
                self.process = subprocess.Popen(
                    [*sandbox.prefix(layers), *command],
                    stdin=theirs,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd=ROOT,
                    env=sandbox.environment(),
                    start_new_session=True,  # Ctrl-C is for the grader
                )
        except OSError:
            self.control.close()
            os.rmdir(self.folder)
            raise
        self.replies = self.control.makefile("r")
        if self.is_closed:  # meanwhile
            self.process.kill()

    def _greet(self):
        try:
            self.sandbox = self._hear(SECONDS_TO_START)["sandbox"]
        except (EOFError, OSError, ValueError):
            self._end()
            raise OSError("a worker did not start: is there memory?") from None

    def _hear(self, seconds: float) -> dict:
        """What the worker says. It does so in time: this is for one that cannot."""
        self.control.settimeout(seconds)
        line = self.replies.readline(MESSAGE_BYTES)
        if not line:
            raise EOFError("the worker has gone")
        return json.loads(line)

    def _run(
        self, name: str, messages: list[bytes], seconds: float, is_enough: Callable
    ) -> dict:
        """The worker copies itself; we talk to the copy, until it or we have enough."""
        (inbox, to_job), (from_job, outbox) = os.pipe(), os.pipe()
        try:
            try:
                socket.send_fds(self.control, [name.encode()], [inbox, outbox])
            finally:
                os.close(inbox)
                os.close(outbox)
            self.group = self._hear(SECONDS_TO_START)["group"]
            reply = self._talk(to_job, from_job, messages, seconds, name, is_enough)
        finally:
            os.close(to_job)
            os.close(from_job)
        self.control.sendall(b".")
        end = self._hear(SECONDS_TO_START)
        self.group = None
        if not end["is_as_before"]:
            self._end()
        if end["words"]:  # the worker has ended it
            reply |= {"status": CRASHED, "words": str(end["words"])}
        return reply

    def _talk(
        self,
        to_job: int,
        from_job: int,
        messages: list[bytes],
        seconds: float,
        name: str,
        is_enough: Callable[[int, dict], bool],
    ) -> dict:
        """Send each message when the copy has done what the one before asks for, and
        collect what comes, until it is enough, the copy ends or its time is used up."""
        attempts: list[dict] = []
        failed = ""

        def ended(status: str, words: str | None) -> dict:
            return _reply(status, words, attempts, num_sent > 1, failed)

        to_send, num_sent = bytearray(messages[0]), 1
        os.set_blocking(to_job, False)
        data, num_bytes = bytearray(), 0
        may_compile = exercises()[name].is_kernel
        deadline = time.monotonic() + ALL_BY_CLOCK * seconds
        while True:
            left = deadline - time.monotonic()
            if left < 0:
                return ended(TIMEOUT, "took too long, and could not be interrupted")
            writing = [to_job] if to_send else []
            here, open_ends, _ = select.select(
                [from_job, self.control], writing, [], left
            )
            if open_ends:
                try:
                    del to_send[: os.write(to_job, to_send[: select.PIPE_BUF])]
                except BrokenPipeError:  # it reads no more
                    to_send.clear()
            if from_job not in here:
                if self.control in here:
                    raise EOFError("the worker has gone")
                continue
            chunk = os.read(from_job, 2**20)
            if not chunk:
                return ended(CRASHED, "crashed: its process ended")
            data += chunk
            num_bytes += len(chunk)
            if num_bytes > REPLY_BYTES:
                return ended(CRASHED, f"gave more than {REPLY_BYTES:,} bytes")
            try:
                for message in wire.take_messages(data):
                    is_called = len(attempts) == len(messages) - 1
                    if message.get("status") == COMPILING and may_compile and is_called:
                        may_compile = False  # but once
                        deadline = time.monotonic() + SECONDS_TO_COMPILE
                        continue
                    if "status" not in message:
                        attempts.append(message)
                        if is_enough(len(attempts) - 1, message):
                            return ended(DONE, None)
                    else:
                        words = message["words"] and str(message["words"])[:500]
                        if message["status"] != READY:  # the end
                            return ended(str(message["status"]), words)
                        if num_sent == 1:  # it has seen no inputs
                            failed = words or ""
                    if num_sent == len(attempts) + 1 < len(messages):
                        to_send += messages[num_sent]
                        num_sent += 1
            except (wire.WireError, AttributeError, KeyError):
                return ended(CRASHED, "sent what is no message")

    def close(self):
        self.is_closed = True
        self._end()

    def _end(self):
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()
            self.replies.close()
            self.control.close()
            sandbox.end_group(self.group)
            sandbox.empty(self.folder)
            os.rmdir(self.folder)


def _reply(
    status: str,
    words: str | None,
    attempts: Iterable[dict] = (),
    called: bool = False,
    failed: str = "",
) -> dict:
    return {
        "status": status,
        "words": words,
        "failed": failed,
        "called": called,
        "attempts": list(attempts),
    }


@functools.cache
def tried_on(name: str, seed: int) -> tuple[list[tuple[Case, dict]], float]:
    """The cases of an exercise, each with what the library's answer gives; and how many
    seconds an answer has for one of them."""
    pairs, slowest = [], 0.0
    cases = exercises()[name].cases(seed)
    expected_outputs(exercises()[name], cases[0])  # what the first call does once
    for case in cases:
        start = time.perf_counter()
        pairs.append((case, expected_outputs(exercises()[name], case)))
        slowest = max(slowest, time.perf_counter() - start)
    return pairs, max(LEAST_SECONDS, MOST_TIMES_SLOWER * slowest)


def grade(submission: Submission, names: list[str], seed: int, worker: Worker) -> Grade:
    """One row, whatever the submission holds."""
    return grade_read(submission.student, *submission.read(), names, seed, worker)


def grade_read(
    student: str,
    notebooks: list[list[str]],
    notes: list[str],
    sha256: str,
    names: list[str],
    seed: int,
    worker: Worker,
) -> Grade:
    """`grade` of what `Submission.read` gave."""
    start = time.perf_counter()
    result = Grade(student, notes=notes, sha256=sha256)
    result.is_readable = bool(notebooks)
    for name in names:
        if notebooks:
            result.scores[name] = score(notebooks, name, seed, worker)
        else:
            result.scores[name] = Score(0, exercises()[name].points, NO_NOTEBOOK)
        if result.scores[name].status != OK:
            result.notes.append(f"{name}: {result.scores[name].status}")
    if notebooks and all(s.message == NOT_THERE for s in result.scores.values()):
        result.notes.append("it has none of these exercises: another notebook?")
    result.sandbox = worker.sandbox if notebooks else ""
    result.seconds = round(time.perf_counter() - start, 2)
    return result


def score(notebooks: list[list[str]], name: str, seed: int, worker: Worker) -> Score:
    """Points for one exercise, tried on the cases of `seed`.

    notebooks: code cells of each. Where the answer fails, the words are about the cases
    that the notebook shows, which have another seed: those of `seed` are hidden.
    """
    result, called = _try(notebooks, name, seed, worker)
    if result.points or not called or seed == SEED or result.status == TIMEOUT:
        return result
    # From here on what it says may hold a hidden input. Most answers fail the same case
    # here: try no more.
    for last in (result.case, None):
        shown, _ = _try(notebooks, name, SEED, worker, last)
        if not shown.points:
            return replace(shown, case=result.case)
    words = "right for all cases that the notebook shows, wrong for a hidden one: "
    return replace(result, message=words + (result.case or "it did not come to its end"))


def _try(
    notebooks: list[list[str]],
    name: str,
    seed: int,
    worker: Worker,
    last: str | None = None,
) -> tuple[Score, bool]:
    """Points for the cases of `seed`, as far as the one called `last`, or the first that
    fails; and whether the answer was called at all."""
    exercise, (cases, seconds) = exercises()[name], tried_on(name, seed)
    called = [case.name for case, _ in cases]
    if last in called:
        cases = cases[: called.index(last) + 1]
    wrong: dict[int, str | None] = {}

    def is_enough(number: int, attempted: dict) -> bool:
        if number == len(cases):  # somebody has forged a message
            return True
        case, expected = cases[number]
        try:
            wrong[number] = verdict(exercise, case, expected, attempted)
        except Exception:  # no answer gives such data: forged too
            wrong[number] = f"wrong for {case.name}: gave what cannot be compared"
        return bool(wrong[number])

    reply = worker.ask(
        {
            "name": name,
            "notebooks": notebooks,
            "calls": [case.inputs for case, _ in cases],
            "seconds": seconds,
        },
        is_enough,
    )
    attempts, words = reply["attempts"], reply["words"]
    none = Score(0, exercise.points, words or "")

    def scored(score: Score) -> tuple[Score, bool]:
        if reply["failed"] and not score.points:
            score = replace(score, message=f"{score.message}. {reply['failed']}")
        return score, reply["called"]

    if attempts and wrong.get(len(attempts) - 1):
        case, _ = cases[len(attempts) - 1]
        return scored(replace(none, message=wrong[len(attempts) - 1], case=case.name))
    waiting = [name for name in (waits_for(exercise, a) for a in attempts) if name]
    if waiting and len(waiting) == len(cases):  # in a release
        return scored(
            replace(none, message=f"needs {waiting[0]}, which is yours to write")
        )
    if reply["status"] in (TIMEOUT, CRASHED):
        case, _ = cases[min(len(attempts), len(cases) - 1)]
        if reply["status"] == TIMEOUT:  # whatever it says itself
            words = f"took longer than {seconds:.0f} seconds"
        message = crash(exercise, case, str(words))
        about = {"message": message, "case": case.name, "status": reply["status"]}
        return scored(replace(none, **about))
    if words:  # unready, or not compiled
        return scored(none)
    if len(attempts) != len(cases):  # forged
        return scored(replace(none, message="sent another number of outputs than cases"))
    return scored(replace(none, points=exercise.points, message="passed"))


def failed(student: str, names: list[str], error: Exception) -> Grade:
    """The row of a submission that the grader itself failed over."""
    words = f"the grader failed: {in_a_line(error)}"
    scores = {
        name: Score(0, exercises()[name].points, words, status=CRASHED) for name in names
    }
    return Grade(student, scores, [words])


def grade_all(
    submissions: list[Submission],
    names: list[str],
    seed: int,
    num_jobs: int,
    done: Callable[[Grade], None],
):
    """Grade each with `num_jobs` workers; `done` hears of each, in any order.

    What `done` raises, or an interrupt, ends it: no submission is begun after that.
    """
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    graded: queue.SimpleQueue = queue.SimpleQueue()
    for submission in submissions:
        waiting.put(submission)
    workers = [Worker() for _ in range(min(num_jobs, len(submissions)))]

    def serve(worker: Worker):
        with contextlib.suppress(queue.Empty):
            while True:
                submission = waiting.get_nowait()
                try:
                    graded.put(grade(submission, names, seed, worker))
                except OSError as error:  # of the machine: the run ends, and can go on
                    graded.put(error)
                except Exception as error:  # of the grader: one row more to look at
                    graded.put(failed(submission.student, names, error))

    threads = [threading.Thread(target=serve, args=(w,), daemon=True) for w in workers]
    try:
        for worker in workers:
            with contextlib.suppress(OSError):  # it is tried again
                worker.start()
        for name in names:  # here, before the threads ask for it
            tried_on(name, seed), tried_on(name, SEED)
        for thread in threads:
            thread.start()
        for _ in submissions:
            result = graded.get()
            if isinstance(result, Exception):
                raise result
            done(result)
    finally:
        with contextlib.suppress(queue.Empty):
            while True:
                waiting.get_nowait()
        for worker, thread in zip(workers, threads):
            worker.is_closed, process = True, worker.process
            if process is not None:
                process.kill()
            if thread.ident is not None:  # it was started
                thread.join()
            worker.close()
