"""Runs our code as another system would: names of the standard library that Windows or macOS lack are missing for our
modules, while other packages, which know their system, see them all.

    python other_systems.py win32|darwin SCRIPT [ARGUMENTS]     run a script
    python other_systems.py win32|darwin --import [MODULE ...]  import these modules of ours (default: all)

For Windows, files behave as they do there: an open or mapped file is not removed, renamed or replaced, nor is its
folder; os.rename does not replace a file; a folder is not opened; a file open for reading only is not synced; names
hold none of the characters <>:"|?*. Not covered: the console, separators, the default encoding (ruff's PLW1514 is for
that).
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import fcntl
import importlib
import os
import runpy
import shutil
import signal
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("lit_files", "lit_model", "lit_data", "lit_eval", "pretrain", "scripts")

# From the documentation of the modules ("Availability").
NO_MODULES = {"win32": "fcntl resource termios pwd grp tty pty readline syslog curses posix", "darwin": ""}
WINDOWS_OS = """
    DirEntry PathLike abc abort access add_dll_directory altsep chdir chmod close closerange cpu_count curdir defpath
    device_encoding devnull dup dup2 environ error execl execle execlp execlpe execv execve execvp execvpe _exit extsep
    fdopen fsdecode fsencode fspath fstat fsync ftruncate get_exec_path get_handle_inheritable get_inheritable
    get_terminal_size getcwd getcwdb getenv getlogin getpid getppid isatty kill linesep link listdir lseek lstat
    makedirs mkdir name open pardir path pathsep pipe popen process_cpu_count putenv read readlink remove removedirs
    rename renames replace rmdir scandir sep set_inheritable spawnl spawnle spawnv spawnve startfile stat stat_result
    strerror supports_bytes_environ supports_dir_fd supports_effective_ids supports_fd supports_follow_symlinks symlink
    system terminal_size times truncate umask unlink unsetenv urandom utime waitpid waitstatus_to_exitcode walk write
    F_OK R_OK W_OK X_OK O_APPEND O_CREAT O_EXCL O_RDONLY O_RDWR O_TRUNC O_WRONLY O_BINARY O_NOINHERIT O_TEMPORARY
    SEEK_CUR SEEK_END SEEK_SET P_NOWAIT P_WAIT EX_OK
"""
WINDOWS_SIGNAL = """
    CTRL_BREAK_EVENT CTRL_C_EVENT Handlers NSIG SIGABRT SIGBREAK SIGFPE SIGILL SIGINT SIGSEGV SIGTERM SIG_DFL SIG_IGN
    Signals default_int_handler getsignal raise_signal set_wakeup_fd signal strsignal valid_signals
"""
NOT_ON_WINDOWS = {
    "time": "CLOCK_BOOTTIME CLOCK_MONOTONIC CLOCK_REALTIME clock_gettime clock_gettime_ns pthread_getcpuclockid tzset",
    "mmap": "MAP_ANON MAP_ANONYMOUS MAP_PRIVATE MAP_SHARED PROT_READ PROT_WRITE MADV_RANDOM MADV_SEQUENTIAL",
    "socket": "AF_UNIX SO_REUSEPORT socketpair",
    "select": "poll epoll kqueue",
}
NOT_ON_MACOS = {
    "os": "sched_getaffinity sched_setaffinity posix_fadvise POSIX_FADV_DONTNEED posix_fallocate memfd_create "
    "copy_file_range splice eventfd pidfd_open getrandom setresuid O_DIRECT O_TMPFILE",
    "time": "CLOCK_BOOTTIME pthread_getcpuclockid",
    "signal": "SIGRTMIN SIGRTMAX SIGPWR SIGPOLL sigtimedwait sigwaitinfo",
    "mmap": "MADV_DONTDUMP MADV_HUGEPAGE MAP_POPULATE",
    "select": "epoll",
    "socket": "AF_PACKET SOCK_CLOEXEC",
}


class ModuleOf(types.ModuleType):
    """A module of the standard library as our modules see it on another system."""

    def __init__(self, real: types.ModuleType, lacks: Callable[[str], bool], more: dict[str, Any]) -> None:
        self.__dict__.update(_real=real, _lacks=lacks, _more=more, __name__=real.__name__)

    def __getattr__(self, name: str) -> Any:
        if name in self._more:
            return self._more[name]
        if self._lacks(name):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r} on this system")
        return getattr(self._real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._real, name, value)


def modules_of(system: str) -> dict[str, ModuleOf]:
    """The modules of the standard library that differ on a system."""

    def without(names: str) -> Callable[[str], bool]:
        return set(names.split()).__contains__

    def only(names: str) -> Callable[[str], bool]:
        known = set(names.split())
        return lambda name: name not in known and not name.startswith("__")

    platform = {"sys": ModuleOf(sys, without(""), {"platform": system})}
    if system == "darwin":
        return platform | {
            name: ModuleOf(importlib.import_module(name), without(names), {}) for name, names in NOT_ON_MACOS.items()
        }
    others = {name: ModuleOf(importlib.import_module(name), without(s), {}) for name, s in NOT_ON_WINDOWS.items()}
    flags = {"O_BINARY": 0, "O_NOINHERIT": 0, "open": open_on_windows}
    msvcrt = ModuleOf(types.ModuleType("msvcrt"), without(""), {"LK_NBLCK": 2, "LK_UNLCK": 0, "locking": locking})
    kernel = types.SimpleNamespace(GlobalMemoryStatusEx=memory_status, K32GetProcessMemoryInfo=process_memory)
    windows = {"windll": types.SimpleNamespace(kernel32=kernel), "WinError": OSError, "CDLL": refuse}
    return (
        platform
        | others
        | {
            "os": ModuleOf(os, only(WINDOWS_OS), flags),
            "signal": ModuleOf(signal, only(WINDOWS_SIGNAL), {}),
            "ctypes": ModuleOf(ctypes, without(""), windows),
            "msvcrt": msvcrt,
        }
    )


def become(system: str) -> None:
    """Let every module of ours that is imported from now on see the standard library of `system`."""
    modules, missing = modules_of(system), set(NO_MODULES[system].split())
    usual = builtins.__import__
    ours = tuple(f"{ROOT / package}{os.sep}" for package in PACKAGES)

    def import_(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        top = name.partition(".")[0]
        if level == 0 and (top in modules or top in missing) and str((globals or {}).get("__file__")).startswith(ours):
            if top in missing:
                raise ModuleNotFoundError(f"No module named {top!r} on this system", name=top)
            if top == name:
                return modules[top]
        return usual(name, globals, locals, fromlist, level)

    builtins.__import__ = import_
    if system == "win32":
        files_of_windows()


def refuse(*_: Any, **__: Any) -> None:
    raise TypeError("not on this system")


def open_on_windows(path: Any, flags: int, *more: Any) -> int:
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))
    return os.open(path, flags, *more)


def locking(descriptor: int, mode: int, size: int) -> None:
    """Like the real one, other descriptors of the same process are locked out too."""
    assert size == 1 and os.lseek(descriptor, 0, os.SEEK_CUR) > os.fstat(descriptor).st_size, "it locks the content"
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB if mode else fcntl.LOCK_UN)
    except BlockingIOError:
        raise PermissionError(errno.EACCES, "Permission denied") from None


def memory_status(reference: Any) -> int:
    status = reference._obj
    assert status.dwLength == ctypes.sizeof(status) == 64
    status.ullTotalPhys = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 1


def process_memory(process: Any, reference: Any, size: int) -> int:
    assert reference._obj.cb == size == 72
    reference._obj.PeakWorkingSetSize = 1 << 28
    return 1


def files_in_use() -> Iterator[str]:
    """Regular files that this process has open or mapped."""
    for number in os.listdir("/proc/self/fd"):
        try:
            path = os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            continue
        if os.path.isfile(path):
            yield path
    with open("/proc/self/maps", encoding="utf-8") as maps:
        yield from {words[5].strip() for line in maps if len(words := line.split(maxsplit=5)) == 6}


def files_of_windows() -> None:
    """Let removing, renaming and syncing files fail where Windows fails, for every caller in this process."""

    def check(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str) and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            name = os.path.basename(arguments[0])
            if set(name) & set('<>:"|?*'):
                raise OSError(errno.EINVAL, "Invalid argument", name)
        if event not in ("os.rename", "os.remove", "os.rmdir"):
            return
        for path in arguments[: 2 if event == "os.rename" else 1]:
            whole = os.path.realpath(os.fsdecode(path))
            for used in files_in_use():
                if used == whole or used.startswith(whole + os.sep):
                    raise PermissionError(errno.EACCES, f"Permission denied: {used} is in use", whole)

    rename, fsync = os.rename, os.fsync

    def rename_on_windows(old: Any, new: Any, **more: Any) -> None:
        if os.path.exists(new):
            raise FileExistsError(errno.EEXIST, "File exists", str(new))
        rename(old, new, **more)

    def fsync_on_windows(file: Any) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        fsync(descriptor)

    shutil._use_fd_functions = False  # type: ignore[attr-defined]  # rmtree then names the files it removes
    os.rename, os.fsync = rename_on_windows, fsync_on_windows
    sys.addaudithook(check)


def all_modules() -> Iterator[str]:
    for package in PACKAGES[:-1]:
        for file in sorted((ROOT / package).rglob("*.py")):
            yield ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def main() -> None:
    system, what, *arguments = sys.argv[1:]
    sys.path[0] = str(ROOT)
    if what == "--import":
        become(system)
        for module in arguments or all_modules():
            importlib.import_module(module)
        return
    import torch  # noqa: F401  it asks for the system itself

    become(system)
    sys.argv = [what, *arguments]
    sys.path[0] = str(Path(what).resolve().parent)
    runpy.run_path(what, run_name="__main__")


if __name__ == "__main__":
    main()
