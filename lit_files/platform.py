"""Operating systems behind one set of functions: Linux, macOS, Windows.

No other module asks which system it runs on, or uses a name of the standard library that one of them lacks;
tests/real_use/test_platforms.py runs the others without these names. Linux is tested; macOS and Windows are written
from the documentation. A function's docstring is at its first definition. Standard library only, for a quick --help.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import mmap
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

_IMPORTED = time.monotonic()

if sys.platform == "win32":
    import msvcrt

    FOLDER_LOCKS = False
    """Whether a folder can be opened and locked."""
    REMOVES_OPEN_FILES = False
    """Whether a file that a process has open can be removed or renamed."""
    STOP_SIGNALS: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM)
    """Signals that stop a run."""
    READ_FLAGS = os.O_RDONLY | os.O_BINARY | os.O_NOINHERIT
    """Flags of os.open to read a file, which never wait for the writer of a pipe."""

    _LOCKED_BYTE = 1 << 30  # beyond the content, which other processes must be able to read
    _seeking = threading.Lock()

    class _MemoryStatus(ctypes.Structure):  # MEMORYSTATUSEX
        _fields_ = (
            ("dwLength", ctypes.c_uint32),
            ("dwMemoryLoad", ctypes.c_uint32),
            ("ullTotalPhys", ctypes.c_uint64),
            ("ullAvailPhys", ctypes.c_uint64),
            ("others", ctypes.c_uint64 * 5),
        )

    class _ProcessMemory(ctypes.Structure):  # PROCESS_MEMORY_COUNTERS
        _fields_ = (
            ("cb", ctypes.c_uint32),
            ("PageFaultCount", ctypes.c_uint32),
            ("PeakWorkingSetSize", ctypes.c_size_t),
            ("others", ctypes.c_size_t * 7),
        )

    def lock(descriptor: int, *, wait: bool = True) -> None:
        """Lock an open file for this process, until it is closed; without `wait`, BlockingIOError if it is locked."""
        while True:
            os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
            try:
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
                return
            except PermissionError:
                if not wait:
                    raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK)) from None
            finally:
                os.lseek(descriptor, 0, os.SEEK_SET)
            time.sleep(0.1)

    def unlock(descriptor: int) -> None:
        """Release the lock of an open file."""
        os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)

    def open_folder(folder: str | Path) -> int:
        """A descriptor of a folder, to lock it."""
        raise OSError(errno.ENOTSUP, "folders cannot be locked on Windows", str(folder))

    def sync(path: Path) -> None:
        """Make a closed file durable. The entries of a folder are: NTFS keeps a journal of them."""
        if path.is_dir():
            return
        descriptor = os.open(path, os.O_RDWR | os.O_BINARY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(old: Path, new: Path) -> None:
        """Rename a file or folder; replaces a file, or an empty folder by a folder (OSError for one with content)."""
        if new.is_dir():
            new.rmdir()
        os.replace(old, new)

    def read_at(descriptor: int, size: int, offset: int) -> bytes:
        """At most `size` bytes from `offset` on; any thread may call it."""
        with _seeking:
            os.lseek(descriptor, offset, os.SEEK_SET)
            return os.read(descriptor, size)

    def map_file(path: Path, descriptor: int, size: int, random: bool) -> tuple[int, Callable[[], object]]:
        """Map the first bytes of an open file read-only: their address, and the function that unmaps them.

        `random`: the system should not read ahead.
        """
        import numpy as np  # here, since it is slow to import

        mapped = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
        return np.frombuffer(mapped, np.uint8).ctypes.data, mapped.close

    def signal_main_thread(number: signal.Signals) -> None:
        """Send a signal to this process's main thread, which also ends a wait of it; on Windows after the wait."""
        signal.raise_signal(number)

    def allocated_bytes(file: os.stat_result) -> int:
        """Bytes that a file occupies on its disk."""
        return file.st_size

    def open_file_limits() -> tuple[int, int] | None:
        """(soft, hard) limit of the files this process may open, -1: none; None where the system has no limits."""
        return None

    def raise_open_file_limit() -> None:
        """Raise the open file limit of this process and its children to the hard limit (`ulimit -Hn`)."""

    def memory_bytes() -> int:
        """Memory of this machine."""
        status = _MemoryStatus(dwLength=ctypes.sizeof(_MemoryStatus))
        if not ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
            raise ctypes.WinError()
        return int(status.ullTotalPhys)

    def peak_resident_bytes() -> int:
        """The most memory this process has held."""
        kernel, memory = ctypes.windll.kernel32, _ProcessMemory(cb=ctypes.sizeof(_ProcessMemory))
        process = ctypes.c_void_p(-1)  # GetCurrentProcess()
        if not kernel.K32GetProcessMemoryInfo(process, ctypes.byref(memory), memory.cb):
            raise ctypes.WinError()
        return int(memory.PeakWorkingSetSize)

else:
    import fcntl
    import resource

    FOLDER_LOCKS = True
    REMOVES_OPEN_FILES = True
    STOP_SIGNALS: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    READ_FLAGS = os.O_RDONLY | os.O_NONBLOCK

    _libc = ctypes.CDLL(None, use_errno=True)
    _libc.mmap.restype = ctypes.c_void_p
    _libc.mmap.argtypes = [
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_longlong,
    ]  # fmt: skip
    _libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    _libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    _FAILED = ctypes.c_void_p(-1).value

    def lock(descriptor: int, *, wait: bool = True) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))

    def unlock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)

    def open_folder(folder: str | Path) -> int:
        return os.open(folder, os.O_RDONLY | os.O_DIRECTORY)

    def sync(path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(old: Path, new: Path) -> None:
        os.rename(old, new)

    def read_at(descriptor: int, size: int, offset: int) -> bytes:
        return os.pread(descriptor, size, offset)

    def map_file(path: Path, descriptor: int, size: int, random: bool) -> tuple[int, Callable[[], object]]:
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        if address == _FAILED:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(path))
        if random and hasattr(mmap, "MADV_RANDOM"):
            _libc.madvise(address, size, mmap.MADV_RANDOM)
        return address, functools.partial(_libc.munmap, address, size)

    def signal_main_thread(number: signal.Signals) -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, number)

    def allocated_bytes(file: os.stat_result) -> int:
        return file.st_blocks * 512

    def open_file_limits() -> tuple[int, int] | None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        return tuple(-1 if n == resource.RLIM_INFINITY else n for n in (soft, hard))  # type: ignore[return-value]

    def raise_open_file_limit() -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 1 << 16 if hard == resource.RLIM_INFINITY else hard
        if soft != resource.RLIM_INFINITY and soft < wanted:
            with contextlib.suppress(ValueError, OSError):  # macOS has another, lower limit
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

    def memory_bytes() -> int:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def peak_resident_bytes() -> int:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


if sys.platform == "linux":
    _PR_SET_PDEATHSIG = 1

    def drop_from_cache(descriptor: int, offset: int = 0, length: int = 0) -> None:
        """Let the system write out the bytes of an open file (length 0: to its end) and give up their memory."""
        os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)

    def usable_core_numbers() -> set[int]:
        """The cores this process may use; all of them on systems that do not restrict it."""
        return os.sched_getaffinity(0)

    def process_age_s() -> float:
        """Seconds since this process started; without /proc, since this module was imported."""
        try:
            stat = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace")
            ticks = int(stat.rpartition(")")[2].split()[19])
            return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        except OSError:
            return time.monotonic() - _IMPORTED

    def end_with_parent() -> Callable[[], None] | None:
        """For subprocess's preexec_fn: the child is killed when the calling thread or its process ends, by SIGKILL too.

        None on systems that cannot do this. A child of the child does not inherit it.
        """
        parent = os.getpid()

        def preexec() -> None:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # it has ended in the meantime
                os._exit(1)

        return preexec

else:

    def drop_from_cache(descriptor: int, offset: int = 0, length: int = 0) -> None:
        pass

    def usable_core_numbers() -> set[int]:
        return set(range(os.cpu_count() or 1))

    def process_age_s() -> float:
        return time.monotonic() - _IMPORTED

    def end_with_parent() -> Callable[[], None] | None:
        return None


def usable_cores() -> int:
    """Number of cores this process may use."""
    return len(usable_core_numbers())
