"""A class too large for one machine: its submissions go to a running Dask cluster.

    .venv/bin/dask scheduler                        on one machine
    .venv/bin/dask worker tcp://HOST:8786           on each, in a copy of the course
    make grade SUBMISSIONS=folder ARGS="--scheduler tcp://HOST:8786"

Files are read and grades are kept here. What travels is the source of a student's cells,
and back comes a row. Each thread of the cluster has a grader's worker of its own, with
its sandbox; a submission whose machine is lost is graded on another. `pip install
.[cluster]` brings Dask: https://distributed.dask.org.
"""

import functools
import itertools
import threading
from collections.abc import Callable

from distributed import Client, KilledWorker, as_completed

from lib.course import interpreted  # noqa: F401  first: kernels are tried here, too
from lib.course.grading.grader import Grade, Worker, failed, grade_read
from lib.course.grading.results import course_version
from lib.course.grading.submissions import Submission

AT_A_TIME = 2  # submissions of a thread: one that it grades, and one that waits there
SECONDS_TO_CONNECT = 30
workers = threading.local()  # a grader's worker for each thread of a cluster's process
version_here = functools.cache(course_version)


def grade_all(
    submissions: list[Submission],
    names: list[str],
    seed: int,
    scheduler: str,
    done: Callable[[Grade], None],
):
    """As `grader.grade_all`, on the cluster of the scheduler at this address.

    Raises ValueError where there is none or it has no workers, and OSError where one of
    its machines has another version of the course.
    """
    try:
        client = Client(scheduler, timeout=SECONDS_TO_CONNECT, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--scheduler: expected a Dask scheduler at {scheduler}, got {error}"
        ) from None
    with client:
        num_threads = sum(client.nthreads().values())
        if not num_threads:
            raise ValueError(f"--scheduler: expected workers at {scheduler}, found none")
        waiting, of_future = iter(submissions), {}
        graded = as_completed(loop=client.loop)

        def send(number: int):
            for submission in itertools.islice(waiting, number):
                task = (submission.student, *submission.read(), names, seed)
                # Not pure: two students may hand in the same, and time is theirs.
                future = client.submit(grade_there, task, version_here(), pure=False)
                of_future[future] = submission
                graded.add(future)

        send(AT_A_TIME * num_threads)
        for future in graded:
            submission = of_future.pop(future)
            try:
                done(future.result())
            except KilledWorker as error:  # machine after machine was lost over it
                done(failed(submission.student, names, error))
            future.release()
            send(1)


def grade_there(task: tuple, version: str) -> Grade:
    """In the cluster: one row."""
    if version_here() != version:
        raise OSError(
            f"expected version {version} of the course on every machine of the cluster, "
            f"got {version_here()} on one"
        )
    if not hasattr(workers, "worker"):
        workers.worker = Worker()
    student, *_, names, _ = task
    try:
        return grade_read(*task, workers.worker)
    except OSError:  # of the machine: the run ends, and can go on
        raise
    except Exception as error:  # of the grader: one row more to look at
        return failed(student, names, error)
