"""What a worker may touch: nothing but a folder of its own, where the machine allows it.

On Linux, where users may make namespaces, a worker has processes of its own, no network,
and may write only to a small folder in memory.
Elsewhere only the limits of worker.py hold. The table of grades says which it was.
"""

import ctypes
import functools
import os
import signal
import subprocess

NAMESPACES, LIMITS = "namespaces", "limits only"
UNSHARE = (
    *("unshare", "--user", "--map-root-user", "--mount", "--net", "--ipc"),
    *("--pid", "--fork", "--kill-child", "--mount-proc"),
)
FOLDER_BYTES = 64 * 2**20

# From Linux' asm-generic/unistd.h, fcntl.h, mount.h, prctl.h and sched.h
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 1, 4, 36
CLONE_NEWUSER = 0x10000000


@functools.cache
def prefix() -> tuple[str, ...]:
    """What stands before a worker's command; nothing where there are no namespaces."""
    try:
        trial = subprocess.run([*UNSHARE, "true"], capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return UNSHARE if trial.returncode == 0 else ()


def enter(folder: str) -> str:
    """In a worker: from now on only `folder` can be written to. NAMESPACES or LIMITS."""
    if os.getpid() != 1:  # not in a namespace
        return LIMITS
    libc = ctypes.CDLL(None)
    read_only = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY, 0, 0, 0)
    size = ctypes.sizeof(read_only)
    options = f"size={FOLDER_BYTES},mode=777".encode()
    failed = (
        libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, read_only, size)
        or libc.mount(b"tmpfs", folder.encode(), b"tmpfs", 0, options)
        or libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # jobs cannot look into the worker
    )
    return LIMITS if failed else NAMESPACES


def drop_rights():
    """In a job: no more power over the namespaces than any other process has."""
    ctypes.CDLL(None).unshare(CLONE_NEWUSER)


def end_with_parent():
    """In a job: whatever ends the worker ends this too."""
    if hasattr(ctypes.CDLL(None), "prctl"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def adopt_orphans():
    """In a worker: what a job leaves running comes to the worker, which can end it."""
    if hasattr(ctypes.CDLL(None), "prctl"):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
