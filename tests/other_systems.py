"""A process as on another system: what Windows or macOS lacks is taken away.

`environment(system, folder)` is that of a process which becomes so as it starts, and so
do those that it starts. The course's own code, that of tests and cells with it, finds
none of the modules, calls and signals that are not there, and files as that system reads,
removes and replaces them. Other libraries stay those of this machine.
"""

import builtins
import contextlib
import ctypes
import errno
import importlib.abc
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Of os, by the documentation: "Availability: Unix", and "Availability: Linux".
ONLY_LINUX = """
    sched_getaffinity sched_setaffinity sched_getscheduler sched_setscheduler
    sched_getparam sched_setparam sched_rr_get_interval memfd_create eventfd
    eventfd_read eventfd_write pidfd_open setns unshare pipe2 getrandom posix_fadvise
    posix_fallocate fdatasync splice copy_file_range getxattr setxattr listxattr
    removexattr waitid P_PID P_PGID P_ALL P_PIDFD WEXITED WNOWAIT WSTOPPED O_PATH
    O_TMPFILE O_DIRECT O_NOATIME RWF_NOWAIT getresuid getresgid setresuid setresgid
    timerfd_create
"""
ONLY_UNIX = """
    fork forkpty geteuid getuid getegid getgid getgroups setuid setgid
    seteuid setegid setsid getsid setpgid getpgid getpgrp setpgrp killpg kill_signals
    wait wait3 wait4 WNOHANG WUNTRACED WIFEXITED WIFSIGNALED WEXITSTATUS WTERMSIG nice
    getpriority setpriority PRIO_PROCESS sysconf getloadavg mkfifo mknod openpty
    ctermid pread pwrite preadv pwritev readv writev sendfile chown fchown lchown chroot
    lockf statvfs fstatvfs sync confstr fchdir posix_spawn posix_spawnp sched_yield
    ttyname tcgetpgrp tcsetpgrp O_NONBLOCK O_CLOEXEC O_NOFOLLOW O_DIRECTORY
"""
SIGNALS_OF_WINDOWS = {
    *("SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM"),
    *("SIG_DFL", "SIG_IGN"),
}
CALLS_WITH_SIGNALS = """
    setitimer getitimer ITIMER_REAL ITIMER_VIRTUAL ITIMER_PROF ItimerError alarm pause
    pthread_kill pthread_sigmask sigwait sigwaitinfo sigtimedwait sigpending siginterrupt
    SIG_BLOCK SIG_UNBLOCK SIG_SETMASK
"""
SOCKETS_OF_UNIX = "AF_UNIX send_fds recv_fds CMSG_LEN CMSG_SPACE SCM_RIGHTS"
NO_CALLS_OF_C = ("prctl", "unshare", "setns", "capset", "capget")
NO_FOLDERS = ("/proc", "/sys")
LIMITS_REFUSED_BY_MACOS = ("RLIMIT_AS", "RLIMIT_DATA")


def environment(system: str, folder: Path) -> dict[str, str]:
    """Of a process that is on "windows" or "macos" from its first line on. folder: an
    empty one, for what Python reads as it starts."""
    (folder / "sitecustomize.py").write_text(
        f"import other_systems\nother_systems.become({system!r})\n", encoding="utf-8"
    )
    paths = os.pathsep.join(map(str, (folder, ROOT / "tests", ROOT)))
    found = {**os.environ, "PYTHONPATH": paths}
    if system == "windows":
        found |= {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0", "USERNAME": "ann"}
    return found


def become(system: str):
    """In a process that starts: be on that system."""
    {"windows": _as_windows, "macos": _as_macos}[system]()


def _as_windows():
    kept = {name for name in dir(signal) if name.startswith("SIG")} - SIGNALS_OF_WINDOWS
    _show_to_ours(
        {
            "os": ONLY_LINUX + ONLY_UNIX,
            "signal": " ".join(kept) + CALLS_WITH_SIGNALS,
            "socket": SOCKETS_OF_UNIX,
        },
        "resource fcntl pwd grp termios tty pty syslog readline triton",
        "win32",
    )
    _start_by_spawn()
    _open_as_cp1252()
    _refuse_what_is_in_use()
    started = subprocess.Popen.__init__

    def start(self, args, *rest, **options):
        if _is_ours():
            if options.get("preexec_fn"):
                raise ValueError("preexec_fn is not supported on Windows platforms")
            if options.get("pass_fds"):
                raise ValueError("pass_fds not supported on Windows.")
            options.pop("start_new_session", None)  # it means nothing there
        _check_encoding(options)
        started(self, args, *rest, **options)

    subprocess.Popen.__init__ = start


def _as_macos():
    import resource

    _show_to_ours(
        {
            "os": ONLY_LINUX,
            "signal": "sigtimedwait sigwaitinfo SIGRTMIN SIGRTMAX SIGPWR SIGSTKFLT",
            "resource": "prlimit RLIMIT_MSGQUEUE RLIMIT_NICE RLIMIT_RTPRIO RLIMIT_RTTIME "
            "RLIMIT_SIGPENDING RLIMIT_OFILE",
        },
        "triton",
        "darwin",
    )
    _start_by_spawn()
    refused = {getattr(resource, name) for name in LIMITS_REFUSED_BY_MACOS}
    setrlimit, getrusage = resource.setrlimit, resource.getrusage

    def set_limit(kind, limits):
        if kind in refused:  # the address space of a process is 400 GB from its start
            raise ValueError("current limit exceeds maximum limit")
        setrlimit(kind, limits)

    def in_bytes(who):
        usage = getrusage(who)
        return resource.struct_rusage((*usage[:2], usage[2] * 1024, *usage[3:]))

    resource.setrlimit, resource.getrusage = set_limit, in_bytes
    _hide_folders()
    found = ctypes.CDLL.__getattr__

    def symbol(self, name):
        if self._name is None and name in NO_CALLS_OF_C:
            raise AttributeError(f"dlsym(RTLD_DEFAULT, {name}): symbol not found")
        return found(self, name)

    ctypes.CDLL.__getattr__ = symbol
    loaded, started = ctypes.CDLL.__init__, subprocess.Popen.__init__

    def load(self, name, *args, **options):
        if name and "seccomp" in str(name):
            raise OSError(f"dlopen({name}, 0x0006): no such file")
        loaded(self, name, *args, **options)

    def start(self, args, *rest, **options):
        if not isinstance(args, (str, bytes)) and args[0] == "unshare":
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", "unshare")
        started(self, args, *rest, **options)

    ctypes.CDLL.__init__, subprocess.Popen.__init__ = load, start


class _Without(types.ModuleType):
    """A module, without some of its names, and with others."""

    def __init__(self, module: types.ModuleType, names: set[str], others: dict):
        super().__init__(module.__name__)
        self.__dict__.update({"_module": module, "_names": names, **others})

    def __getattr__(self, name):
        if name in self._names:
            words = f"module {self.__name__!r} has no attribute {name!r}"
            raise AttributeError(words)
        return getattr(self._module, name)

    def __setattr__(self, name, value):
        setattr(self._module, name, value)

    def __delattr__(self, name):
        delattr(self._module, name)

    def __dir__(self):
        return [name for name in dir(self._module) if name not in self._names]


class _Blocker(importlib.abc.MetaPathFinder):
    """No Triton, whoever asks."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return


def _show_to_ours(missing: dict[str, str], no_modules: str, platform: str):
    """What our code imports. missing: by module the names that it has not here."""
    imported = builtins.__import__
    names = {module: set(words.split()) for module, words in missing.items()}
    names["sys"], others = set(), {"sys": {"platform": platform}}
    absent, shown = set(no_modules.split()), {}

    def asked(name, globals=None, locals=None, fromlist=(), level=0):
        if level == 0 and globals is not None and _is_our_file(globals.get("__file__")):
            if name.partition(".")[0] in absent:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            if name in names:
                if name not in shown:
                    module, other = imported(name), others.get(name, {})
                    shown[name] = _Without(module, names[name], other)
                return shown[name]
        return imported(name, globals, locals, fromlist, level)

    builtins.__import__ = asked
    sys.meta_path.insert(0, _Blocker())


def _is_our_file(name: str | None) -> bool:
    """Of the course; the cell of a notebook has none."""
    if name is None:
        return True
    return name.startswith(f"{ROOT}{os.sep}") and "site-packages" not in name


def _start_by_spawn():
    multiprocessing.get_all_start_methods = lambda: ["spawn"]
    multiprocessing.set_start_method("spawn")


def _is_ours() -> bool:
    """Whether a line of the course asks, whatever of the standard library is between."""
    frame, library = sys._getframe(1), os.path.dirname(os.__file__)
    while frame:
        name = frame.f_code.co_filename
        is_between = name == __file__ or name.startswith("<frozen")
        if not is_between and (not name.startswith(library) or "site-packages" in name):
            return _is_our_file(name)
        frame = frame.f_back
    return False


def _check_encoding(options: dict):
    is_text = options.get("text") or options.get("universal_newlines")
    if is_text and not options.get("encoding"):
        if _is_ours():
            raise EncodingWarning("'encoding' argument not specified.")
        options["encoding"] = "cp1252"


def _open_as_cp1252():
    """Text without a word on how it is encoded is cp1252; where lib/ asks, an error."""
    opened = io.open

    def open(file, mode="r", buffering=-1, encoding=None, *args, **options):
        if "b" not in mode and encoding in (None, "locale"):
            if _is_ours() and file != os.devnull:
                raise EncodingWarning("'encoding' argument not specified.")
            encoding = "cp1252"
        return opened(file, mode, buffering, encoding, *args, **options)

    io.open = builtins.open = sys.modules["_io"].open = open


def _refuse_what_is_in_use():
    """To remove or replace a file that this process has open, or has mapped."""

    def refuse(path, dir_fd=None):
        if dir_fd is not None:
            path = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), os.fspath(path))
        real = os.path.realpath(os.fsdecode(path))
        opened = set()
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                opened.add(os.readlink(f"/proc/self/fd/{number}"))
        if real in opened:
            raise PermissionError(errno.EACCES, "it is in use", str(path))
        with open("/proc/self/maps", encoding="utf-8") as maps:
            if any(line.rstrip("\n").endswith(f" {real}") for line in maps):
                raise PermissionError(errno.EACCES, "it is mapped", str(path))

    def careful(call: Callable, both: bool) -> Callable:
        def called(path, *args, **options):
            refuse(path, options.get("dir_fd") or options.get("src_dir_fd"))
            if both and os.path.exists(args[0] if args else options["dst"]):
                refuse(args[0] if args else options["dst"], options.get("dst_dir_fd"))
            return call(path, *args, **options)

        return called

    for name in ("unlink", "remove", "rmdir"):
        setattr(os, name, careful(getattr(os, name), both=False))
    for name in ("rename", "replace"):
        setattr(os, name, careful(getattr(os, name), both=True))


def _hide_folders():
    """/proc and /sys are not there."""

    def careful(call: Callable) -> Callable:
        def called(path=".", *args, **options):
            if isinstance(path, (str, os.PathLike)):
                name = os.fspath(path)
                if str(name).startswith(NO_FOLDERS) and _is_ours():
                    raise FileNotFoundError(errno.ENOENT, "No such file", name)
            return call(path, *args, **options)

        return called

    for name in ("open", "listdir", "scandir", "stat", "lstat", "readlink"):
        setattr(os, name, careful(getattr(os, name)))
    io.open = builtins.open = careful(io.open)
