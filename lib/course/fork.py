"""Try something that may crash, in a copy of this process.

A wrong pointer in an interpreted kernel reads or writes memory that is not its own, and
the process dies. In a fork it takes nothing with it.
"""

import contextlib
import faulthandler
import os
import pickle
import select
import signal
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch


class ForkDiedError(Exception):
    """The copy ended before its answer was there."""


def in_fork(function: Callable[[], Any], timeout_s: float = 120) -> Any:
    """What `function()` returns, which has to be plain data.

    Raises ForkDiedError where it crashed, raised, or took longer than `timeout_s`.
    It may not use a GPU, which a fork cannot. Without os.fork it is called as it is. With
    more than one torch thread a fork may hang, so it runs with one.
    """
    if not hasattr(os, "fork"):
        return function()
    num_threads = torch.get_num_threads()
    read_end, write_end = os.pipe()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        # From Python 3.12 on: a copy of a process with threads may hang. Hence timeout_s.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        status = 1
        faulthandler.disable()  # a crash is expected here, and told by the parent
        try:
            with os.fdopen(write_end, "wb") as pipe:
                pickle.dump(function(), pipe)
            status = 0
        finally:
            os._exit(status)
    torch.set_num_threads(num_threads)
    os.close(write_end)
    answer = None
    try:
        answer = _read_all(read_end, time.monotonic() + timeout_s)
    finally:  # an interrupt too
        if answer is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.close(read_end)
    if answer is None:
        raise ForkDiedError(f"took longer than {timeout_s} seconds")
    if status < 0:
        raise ForkDiedError(f"crashed ({signal.strsignal(-status)})")
    if status > 0:
        raise ForkDiedError(f"ended with status {status}")
    return pickle.loads(answer)


def _read_all(read_end: int, deadline: float) -> bytes | None:
    """What comes until the other side closes the pipe; None if that takes too long."""
    data = b""
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([read_end], [], [], left)[0]:
            return None
        chunk = os.read(read_end, 2**20)
        if not chunk:
            return data
        data += chunk
