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
        try:
            with os.fdopen(write_end, "wb") as pipe:
                pickle.dump(function(), pipe)
        finally:
            os._exit(0)
    os.close(write_end)
    torch.set_num_threads(num_threads)
    try:
        with os.fdopen(read_end, "rb") as pipe:
            if not select.select([pipe], [], [], timeout_s)[0]:
                raise ForkDiedError(f"took longer than {timeout_s} seconds")
            answer = pipe.read()
    finally:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    if not answer:
        raise ForkDiedError(f"crashed ({signal.Signals(os.WTERMSIG(status)).name})")
    return pickle.loads(answer)
