"""What a student's code may touch: a small folder, where the machine keeps it to that.

Each call of a student's answer is a job: a copy of the worker. Around it are three
layers, which any user of Linux may put around their own processes. Each is tried when a
worker starts; the table of grades names those that the machine refuses.

    namespaces   A job is the first of processes of its own: it can name no others, and
                 all that it starts ends with it. No network, and nobody else's System V
                 memory. Files are read-only, but for a folder in memory that ends too.
    Landlock     It reads Python, the libraries, lib/ and data/, and nothing else: no
                 submissions, grades or settings, no device, no other process. It writes
                 to its folder, and signals what it has started.
    seccomp      The kernel refuses it what stands in REFUSED: sockets, memory that no
                 process is charged for, anyone's priority, rights and dates of files,
                 what lies in the machine's cache, and to leave the group of processes,
                 which is ended as one, and has one share of the processor.

Everywhere a job has limits (worker.py), no environment of the grader's, no rights of
root's, and a worker that it has changed is replaced (`state`).

Bubblewrap, nsjail and systemd-run wrap a command. Around the worker that would leave all
jobs in one sandbox, with the worker; around each job, each would import torch anew, 3 s.
"""

import contextlib
import ctypes
import functools
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path

from lib.course import ROOT, WITHOUT_GPU

NAMESPACES, LANDLOCK, SECCOMP = "namespaces", "Landlock", "seccomp"
LAYERS = (NAMESPACES, LANDLOCK, SECCOMP)
FOLDER_BYTES = 64 * 2**20
MOST_FILES = 4096  # in the folder
MOST_PROCESSES, MOST_THREADS = 64, 256  # of a job
RESIDENT_BYTES = 4 * 2**30  # of all processes of a job together
SECONDS_TO_END = 10  # what runs away, where there are no namespaces

# What a worker is told of the grader's environment.
ENVIRONMENT = ("HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "PYTHONPATH")
UNSHARE = (
    *("unshare", "--user", "--map-root-user", "--mount", "--net", "--ipc"),
    *("--pid", "--fork", "--kill-child", "--mount-proc"),
)

# What a job may read, beside Python and its folder; write; and list.
READABLE = (
    *("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime"),
    *("/sys/devices/system/cpu", "/sys/devices/system/node", "/dev/urandom"),
    *("/proc/cpuinfo", "/proc/meminfo", "/proc/stat", ROOT / "lib", ROOT / "data"),
)
WRITABLE = ("/dev/null", "/dev/zero")

# What seccomp refuses: always, and where an argument is one of these numbers.
REFUSED = """
    socket connect bind
    memfd_create memfd_secret shmget shmat shmctl semget semop semtimedop semctl
    msgget msgsnd msgrcv msgctl mq_open mq_unlink
    ptrace process_vm_readv process_vm_writev process_madvise kcmp pidfd_open
    pidfd_getfd pidfd_send_signal move_pages migrate_pages
    setpriority ioprio_set sched_setaffinity sched_setattr sched_setparam
    sched_setscheduler
    chmod fchmod fchmodat chown fchown fchownat lchown utime utimes utimensat futimesat
    setxattr lsetxattr fsetxattr removexattr lremovexattr fremovexattr mknod mknodat
    unshare setns mount umount2 pivot_root chroot open_tree move_mount fsopen fsconfig
    fsmount fspick mount_setattr name_to_handle_at open_by_handle_at
    add_key request_key keyctl bpf perf_event_open userfaultfd io_uring_setup
    io_uring_enter io_uring_register inotify_init inotify_init1 inotify_add_watch
    fanotify_init fanotify_mark setsockopt
    fadvise64 readahead mincore cachestat preadv2 pwritev2 setsid setpgid
    init_module finit_module delete_module kexec_load kexec_file_load reboot swapon
    swapoff acct quotactl quotactl_fd syslog settimeofday clock_settime adjtimex
    clock_adjtime sethostname setdomainname iopl ioperm modify_ldt vhangup
"""
WORD = 0xFFFFFFFF
REFUSED_WITH = {  # name: which argument, the bits of it that count, their values
    "clone": [(0, 1 << bit, [1 << bit]) for bit in (17, *range(25, 31))],  # CLONE_NEW*
    "socketpair": [(1, 0xF, [2, 3, 5])],  # but for streams: others send to any socket
    # F_SETOWN, F_SETOWN_EX: whom the kernel signals. F_SETLEASE, F_NOTIFY: who waits
    "fcntl": [(1, WORD, [8, 15, 1024, 1026])],
    "ioctl": [(1, WORD, [0x8901, 0x8902, 0x5412])],  # FIOSETOWN, SIOCSPGRP, TIOCSTI
    "prctl": [(0, WORD, [1])],  # PR_SET_PDEATHSIG
}
REFUSED_FOR_OTHERS = ("prlimit64",)  # with a process that is not 0, the caller
# What was not known when this was written, and clone3, which hides what it is asked for.
ABSENT = ("clone3", *range(451, 512))

# From Linux' asm-generic/unistd.h, capability.h, fcntl.h, landlock.h, mount.h, prctl.h,
# sched.h and seccomp.h
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
MS_NOSUID, MS_NODEV = 2, 4
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 1, 4, 36
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 22, 38
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWPID = 0x20000, 0x08000000, 0x20000000
SYS_LANDLOCK_CREATE_RULESET, SYS_LANDLOCK_ADD_RULE, SYS_LANDLOCK_RESTRICT_SELF = (
    *(444, 445, 446),
)
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE = 1, 2, 4, 8, 1 << 14
MAKE_CHAR, MAKE_SOCK, MAKE_BLOCK, IOCTL_DEV = 1 << 6, 1 << 9, 1 << 11, 1 << 15
CAPABILITY_VERSION = 0x20080522
# From libseccomp's seccomp.h
ALLOW, ERRNO, EPERM, ENOSYS = 0x7FFF0000, 0x00050000, 1, 38
NOT_EQUAL, MASKED_EQUAL = 1, 7


# In the grader


@functools.cache
def prefix(layers: tuple[str, ...]) -> tuple[str, ...]:
    """What stands before a worker's command; nothing where there are no namespaces."""
    if NAMESPACES not in layers:
        return ()
    try:
        trial = subprocess.run([*UNSHARE, "true"], capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return UNSHARE if trial.returncode == 0 else ()


def environment() -> dict[str, str]:
    known = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    return known | WITHOUT_GPU


def in_words(layers: Collection[str], has_memory_limits: bool = True) -> str:
    """For the table of grades: what this machine refuses of a sandbox."""
    missing = [name for name in (NAMESPACES, LANDLOCK, SECCOMP) if name not in layers]
    if not layers:
        return f"limits only{'' if has_memory_limits else ', none of memory'}"
    return f"without {', '.join(missing)}" if missing else "full"


def end_group(group: int | None):
    """In the grader, of a worker that has died: the job that it had, where no namespace
    has ended with it."""
    with contextlib.suppress(OSError):
        if group:
            os.killpg(group, signal.SIGKILL)


# In a worker


def enter(folder: str, layers: Collection[str]) -> tuple[str, ...]:
    """Those of `layers` that hold around a job here, each tried in a copy of its own."""
    if hasattr(_libc(), "prctl"):
        # What a job leaves running comes to the worker, which can end it. No job can look
        # into the worker.
        _libc().prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        _libc().prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    with contextlib.suppress(OSError, AttributeError):
        _program()  # here, for all jobs
    held: tuple[str, ...] = ()
    for layer in layers:
        if _hold((*held, layer), folder):
            held += (layer,)
    return held


def _hold(layers: tuple[str, ...], folder: str) -> bool:
    try:
        if layers == (NAMESPACES,):
            _make_read_only_but(folder)
        child = fork(layers)
    except (OSError, AttributeError):
        return False
    if child == 0:
        status = 1
        try:
            confine(folder, layers)
            status = 0
        finally:
            os._exit(status)
    holds = os.waitpid(child, 0)[1] == 0
    empty(folder)
    return holds


def _make_read_only_but(folder: str):
    """For the worker too: torch writes there."""
    read_only = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY, 0, 0, 0)
    args = (AT_FDCWD, b"/", AT_RECURSIVE, read_only, ctypes.sizeof(read_only))
    if os.getpid() != 1:
        raise OSError("expected to be the first process of a namespace")
    _check(_libc().syscall(SYS_MOUNT_SETATTR, *args))
    _mount_in_memory(folder)


def fork(layers: Collection[str]) -> int:
    """As os.fork; with namespaces the copy is the first process of its own."""
    if NAMESPACES not in layers:
        return os.fork()
    ours = os.open("/proc/self/ns/pid", os.O_RDONLY)
    try:
        _check(_libc().unshare(CLONE_NEWPID))
        try:
            child = os.fork()
        except OSError:
            child = -1
            raise
        finally:
            if child != 0:
                _check(_libc().setns(ours, CLONE_NEWPID))
        return child
    finally:
        os.close(ours)


def too_much(folder: str, virtual_limit: int) -> str | None:
    """What the running job has used up, in words. virtual_limit: bytes that it may ask
    for beyond what the worker has."""
    pids, num_threads, resident, virtual = _descendants(os.getpid()), 0, 0, 0
    ours = virtual_bytes()
    for pid in pids:
        with contextlib.suppress(OSError, ValueError):
            num_threads += len(os.listdir(f"/proc/{pid}/task"))
            of_it = _memory_bytes(pid)
            resident += of_it[1]
            virtual += max(of_it[0] - ours, 0)
    if len(pids) > MOST_PROCESSES or num_threads > MOST_THREADS:
        return f"started more than {MOST_PROCESSES} processes or {MOST_THREADS} threads"
    if resident > RESIDENT_BYTES or virtual > virtual_limit:
        return (
            f"used more than {RESIDENT_BYTES // 2**30} GiB, or asked for more than "
            f"{virtual_limit // 2**30} GiB"
        )
    if _is_full(folder):
        return f"wrote more than {FOLDER_BYTES // 2**20} MiB or {MOST_FILES} files"
    return None


def virtual_bytes() -> int:
    """That this process has asked for; 0 where nobody can tell."""
    try:
        return _memory_bytes("self")[0]
    except OSError:  # no Linux
        return 0


def _memory_bytes(pid: int | str) -> tuple[int, int]:
    """That a process has asked for, and that it holds."""
    pages = Path(f"/proc/{pid}/statm").read_bytes().split()
    size = os.sysconf("SC_PAGE_SIZE")
    return int(pages[0]) * size, int(pages[1]) * size


def _is_full(folder: str) -> bool:
    """Or made so that nobody can tell. In namespaces it is empty, as seen from here."""
    num_bytes = num_files = 0

    def deny(error: OSError):
        if not isinstance(error, FileNotFoundError):  # gone meanwhile
            raise error

    try:
        for path, _, names in os.walk(folder, onerror=deny):
            num_files += 1 + len(names)
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    num_bytes += os.lstat(os.path.join(path, name)).st_size
            if num_bytes > FOLDER_BYTES or num_files > MOST_FILES:
                return True
    except (OSError, RecursionError):
        return True
    return False


def has_ended(child: int) -> bool:
    """A job: the copy. Its number stays its own until `end`, where the system can do
    that; macOS can from Python 3.13 on."""
    if not hasattr(os, "waitid"):
        return os.waitpid(child, os.WNOHANG)[0] != 0
    return bool(os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT))


def end(child: int) -> bool:
    """A job: the copy, and all that it has started. False if some of that gets away."""
    for kill in (os.kill, os.killpg):  # at once, where nothing can leave the group
        with contextlib.suppress(OSError):
            kill(child, signal.SIGKILL)
    deadline = time.monotonic() + SECONDS_TO_END
    with contextlib.suppress(ChildProcessError):
        while time.monotonic() < deadline:
            end_all(_descendants(os.getpid()))
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
            time.sleep(0.001)
        return False
    return True


def end_all(pids: list[int]):
    """By groups first: no process of a group can fork while all of it is killed."""
    groups = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            groups.add(os.getpgid(pid))
    for group in groups - {os.getpgid(0)}:
        with contextlib.suppress(OSError):
            os.killpg(group, signal.SIGKILL)
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, number)


def _descendants(pid: int) -> list[int]:
    """Children of its threads, theirs, and so on; none where nobody can tell."""
    found, ask = [], [pid]
    while ask:
        for path in Path(f"/proc/{ask.pop()}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                children = [int(child) for child in path.read_bytes().split()]
                found += children
                ask += children
    return found


def empty(folder: str):
    """However deep it is, and whatever may not be done to what is in it. Links are not
    followed: they may lead anywhere."""
    if os.listdir(folder):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run(["chmod", "-R", "u+rwx", "--", folder], **quiet)
        inside = [os.path.join(folder, name) for name in os.listdir(folder)]
        subprocess.run(["rm", "-rf", "--", *inside], **quiet)


def state() -> list:
    """What somebody else could change of this process."""
    import resource  # not on Windows

    limits = [name for name in dir(resource) if name.startswith("RLIMIT_")]
    mask = os.umask(0o77)
    os.umask(mask)
    found = [
        [resource.getrlimit(getattr(resource, name)) for name in limits],
        [os.getpriority(os.PRIO_PROCESS, 0), os.getcwd(), mask],
        [signal.getsignal(number) for number in sorted(signal.valid_signals())],
        signal.pthread_sigmask(signal.SIG_BLOCK, []),
        sorted(os.listdir("/dev/fd")),
    ]
    if sys.platform == "linux":
        score = Path("/proc/self/oom_score_adj").read_bytes()
        found += [os.sched_getscheduler(0), os.sched_getaffinity(0), score]
    return found


# In a job


def confine(folder: str, layers: Collection[str]):
    """From now on all that `layers` promise, and `folder` is where it works.

    Raises OSError where one does not hold.
    """
    if NAMESPACES in layers:
        _check(_libc().unshare(CLONE_NEWNS | CLONE_NEWIPC))
        _mount("proc", "/proc", "")
        _mount_in_memory(folder)
    elif hasattr(_libc(), "prctl"):  # whatever ends the worker ends this too
        _libc().prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.chdir(folder)
    os.symlink(ROOT / "lib", "lib")  # for processes that import it: ROOT cannot be listed
    if hasattr(_libc(), "prctl"):
        _libc().prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
        _libc().prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    can_scope = _restrict_files(folder, layers) if LANDLOCK in layers else False
    if hasattr(_libc(), "capset"):
        header, none = struct.pack("=Ii", CAPABILITY_VERSION, 0), bytes(24)
        _check(_libc().capset(header, none))
    if SECCOMP in layers:
        _refuse_calls(NAMESPACES in layers, can_scope)


def _mount_in_memory(folder: str):
    _mount("tmpfs", folder, f"size={FOLDER_BYTES},nr_inodes={MOST_FILES}")


def _mount(kind: str, path: str, options: str):
    kind, path, options = kind.encode(), path.encode(), options.encode()
    _check(_libc().mount(kind, path, kind, MS_NOSUID | MS_NODEV, options))


def _restrict_files(folder: str, layers: Collection[str]) -> bool:
    """By Landlock; True where signals are kept inside too.

    https://docs.kernel.org/userspace-api/landlock.html
    """
    version = _check(_libc().syscall(SYS_LANDLOCK_CREATE_RULESET, None, 0, 1))
    rights = (1 << (13, 14, 15, 15, 16)[min(version, 5) - 1]) - 1
    scoped = 3 if version >= 6 else 0
    rules = struct.pack("=QQQ", rights, 3 if version >= 4 else 0, scoped)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = _check(_libc().syscall(SYS_LANDLOCK_CREATE_RULESET, rules, size, 0))
    of_devices = MAKE_CHAR | MAKE_BLOCK | MAKE_SOCK | IOCTL_DEV
    proc = "/proc" if NAMESPACES in layers else "/proc/self"
    for right, paths in (
        (READ_FILE | READ_DIR | EXECUTE, (*READABLE, *_of_python(), proc)),
        (READ_FILE | WRITE_FILE | TRUNCATE, WRITABLE),
        (~of_devices, (folder,)),
    ):
        for path in paths:
            _allow(ruleset, path, right & rights)
    _check(_libc().syscall(SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)
    return bool(scoped)


def _allow(ruleset: int, path: str | Path, right: int):
    try:
        parent = os.open(path, os.O_PATH)
    except OSError:  # not on this machine
        return
    if not os.path.isdir(path):
        right &= EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE
    rule = struct.pack("=Qi", right, parent)
    _check(_libc().syscall(SYS_LANDLOCK_ADD_RULE, ruleset, 1, rule, 0))
    os.close(parent)


@functools.cache
def _of_python() -> list[str]:
    """Its folders, and those of packages: none in which the course's files lie."""
    paths = (os.path.realpath(path) for path in (sys.base_prefix, sys.prefix, *sys.path))
    return [
        path
        for path in dict.fromkeys(paths)
        if os.path.commonpath([path, ROOT]) != path  # not ROOT, and not above it
    ]


def _refuse_calls(is_alone: bool, can_scope: bool):
    """By seccomp. is_alone: in namespaces, with nobody that a signal could reach.
    can_scope: whether Landlock keeps signals inside."""
    if not is_alone and not can_scope:
        others = [("tkill", EPERM)]
        for call in ("kill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo"):
            others.append((call, EPERM, 0, NOT_EQUAL, os.getpid(), 0))
        _install(_compiled(others))
    _install(_program())


@functools.cache
def _program() -> bytes:
    """What is the same for all jobs of a worker: to compile it takes 10 ms."""
    refused = [(call, ENOSYS) for call in ABSENT]
    refused += [(call, EPERM) for call in REFUSED.split()]
    refused += [(call, EPERM, 0, NOT_EQUAL, 0, 0) for call in REFUSED_FOR_OTHERS]
    for call, conditions in REFUSED_WITH.items():
        for argument, mask, values in conditions:
            for value in values:
                refused.append((call, EPERM, argument, MASKED_EQUAL, mask, value))
    return _compiled(refused)


def _compiled(refused: list[tuple]) -> bytes:
    """For the kernel. refused: of calls, each with its error, and perhaps a condition."""
    library = _libseccomp()
    rules = ctypes.c_void_p(library.seccomp_init(ALLOW))
    for call, error, *condition in refused:
        number = call
        if isinstance(call, str):
            number = library.seccomp_syscall_resolve_name(call.encode())
        if number >= 0:  # else another kind of processor has no such call
            compared = struct.pack("=IiQQ", *condition) if condition else None
            num_compared = int(bool(condition))
            args = (rules, ERRNO | error, number, num_compared, compared)
            _check(library.seccomp_rule_add_array(*args))
    file = os.memfd_create("seccomp")
    try:
        _check(library.seccomp_export_bpf(rules, file))
        return os.pread(file, os.fstat(file).st_size, 0)
    finally:
        os.close(file)
        library.seccomp_release(rules)


def _install(program: bytes):
    code = ctypes.create_string_buffer(program, len(program))
    described = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
    _check(_libc().prctl(PR_SET_SECCOMP, 2, described, 0, 0))


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


@functools.cache
def _libseccomp() -> ctypes.CDLL:
    """Which apt, systemd and all container engines bring. OSError where it is not."""
    library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    library.seccomp_init.restype = ctypes.c_void_p
    return library


def _check(result: int) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result
