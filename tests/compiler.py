"""A process that has imported Triton and compiles one kernel after the other.

gpu_code.py starts a process for each kernel, and most of its seconds are imports. Here
each is compiled in a copy of one that has them behind it.
"""

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from lib.measure import gpu_code

SECONDS = 120  # as gpu_code has it


class Compiler:
    """Stands in for `gpu_code._compile_in_child`, which threads call too."""

    def __init__(self):
        self.server, self.lock = None, threading.Lock()

    def __call__(self, job: str) -> subprocess.CompletedProcess:
        with self.lock:
            return subprocess.CompletedProcess([], *self._ask(job))

    def _ask(self, job: str) -> list:
        """The child's status, and what it wrote to stdout and stderr."""
        if self.server is None:
            self.server = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=Path(gpu_code.__file__).parents[2],
                env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONWARNINGS": "ignore"},
            )
        print(json.dumps(job), file=self.server.stdin, flush=True)
        return json.loads(self.server.stdout.readline())

    def close(self):
        if self.server is not None:
            self.server.communicate()


def serve():
    import triton.backends.compiler  # noqa: F401
    import triton.compiler  # noqa: F401

    for line in sys.stdin:
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            child = os.fork()
            if child == 0:
                compile_one(json.loads(line), out.fileno(), err.fileno())
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            texts = [file.seek(0) or file.read() for file in (out, err)]
        print(json.dumps([status, *texts]), flush=True)


def compile_one(job: str, out: int, err: int):
    """In the copy, which it ends, as a process of its own would."""
    signal.alarm(SECONDS)
    os.dup2(out, 1), os.dup2(err, 2)
    sys.stdin, status = io.StringIO(job), 0
    try:
        gpu_code._compile_stdin()
    except SystemExit as error:
        print(error, file=sys.stderr)
        status = 1
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve()
