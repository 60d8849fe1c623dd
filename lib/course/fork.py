"""Try something that may crash, in a copy of this process.

A wrong pointer in an interpreted kernel reads or writes memory that is not its own, and
the process dies. In a fork it takes nothing with it.
"""

import os
import pickle
import select
import signal
from collections.abc import Callable
from typing import Any

import torch


class ForkDiedError(Exception):
    """The copy ended before its answer was there."""


def in_fork(function: Callable[[], Any], timeout_s: float = 120) -> Any:
    """What `function()` returns, which has to be plain data.

    Raises ForkDiedError where it crashed or took longer than `timeout_s`. Without
    os.fork, and on a GPU, which a fork cannot use, it is called as it is. With more than
    one torch thread a fork may hang, so it runs with one.
    """
    if not hasattr(os, "fork") or torch.cuda.is_available():
        return function()
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with os.fdopen(write_end, "wb") as pipe:
                pickle.dump(function(), pipe)
            status = 0
        finally:
            os._exit(status)
    os.close(write_end)
    torch.set_num_threads(num_threads)
    with os.fdopen(read_end, "rb") as pipe:
        is_late = not select.select([pipe], [], [], timeout_s)[0]
        if is_late:
            os.kill(child, signal.SIGKILL)
        answer = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if is_late:
        raise ForkDiedError(f"took longer than {timeout_s} seconds")
    if status < 0:
        raise ForkDiedError(f"crashed ({signal.Signals(-status).name})")
    if status > 0:
        raise ForkDiedError(f"ended with status {status}")
    return pickle.loads(answer)
