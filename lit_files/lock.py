"""Locks a folder or file for one process at a time.

Normally by flock: the system releases it however the process exits, so the next start does not wait. On file systems
without it (Lustre mounted without flock, some NFS and FUSE mounts) a file beside the lock holds an id that the holder
renews every 10 s. Host clocks are never compared: a process that finds the file watches whether it changes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lit_files.platform import REMOVES_OPEN_FILES, lock

LOCK = ".lock"
HEARTBEAT = ".heartbeat"
LOCK_NAMES = (LOCK, LOCK + HEARTBEAT)
"""Files of a locked folder to keep when emptying it."""

BEAT_S = 10.0
STALE_S = 120.0
"""A heartbeat not renewed for this long belongs to a dead process. Several times the NFS attribute cache time (60 s).
"""

WITHOUT_FLOCK = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL)


class LockBusy(ValueError):
    """Raised when another process holds the lock."""


def end_process(message: str) -> None:
    """Default action for a lost lock: exit without any clean-up, as another process now owns the folder."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(1)


class FileLock:
    """Holds a lock from its creation until `close`, or until the process ends.

    Args:
        path: the lock file; created, and names the holder.
        name: purpose of the lock, for messages.
        advice: what a user can do if the lock is taken.
        remove: `close` removes the file.
        beat_s, stale_s: only without flock: interval of heartbeats, and age at which one is stale.
        on_lost: only without flock: called in a thread once another process has taken over the lock because this one
            was stalled for `stale_s`.

    Raises:
        LockBusy: another process holds it; the message names the holder.
        OSError: the file can't be created or locked; has its path.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        advice: str,
        *,
        remove: bool = False,
        beat_s: float = BEAT_S,
        stale_s: float = STALE_S,
        on_lost: Callable[[str], None] = end_process,
    ) -> None:
        self.path, self.name, self.advice, self.remove = path, name, advice, remove
        self._heartbeat: Heartbeat | None = None
        self._file = self._open_locked()
        try:
            beating = path.with_name(path.name + HEARTBEAT)
            if self._file is None or beating.exists():  # flock may be missing only on the other process's node
                self._heartbeat = Heartbeat(beating, name, beat_s, stale_s, on_lost)
                if (holder := self._heartbeat.acquire()) is not None:
                    raise self._busy(holder)
            if self._file is not None:
                self._file.truncate(0)
                self._file.write(json.dumps(this_process()))
                self._file.flush()
        except BaseException:
            self.close()
            raise

    def _open_locked(self) -> Any:
        """Open and lock the file; None if its file system has no locks."""
        while True:
            file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115 - held until close
            try:
                lock(file.fileno(), wait=False)
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(file.fileno()), os.stat(self.path)):
                        return file
                file.close()  # the previous holder removed it between the two calls
            except OSError as error:
                file.seek(0)
                holder = file.read()
                file.close()
                if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
                    raise self._busy(holder) from None
                if error.errno in WITHOUT_FLOCK:
                    return None
                raise OSError(error.errno, error.strerror, str(self.path)) from error

    def _busy(self, holder: str) -> LockBusy:
        return LockBusy(f"{self.name} is in use by another job ({describe(holder)}); {self.advice}")

    def close(self) -> None:
        """Release the lock."""
        if self._heartbeat is not None:
            self._heartbeat.close()
        if self.remove and REMOVES_OPEN_FILES:
            self.path.unlink(missing_ok=True)
        if self._file is not None:
            self._file.close()
        if self.remove and not REMOVES_OPEN_FILES:
            with contextlib.suppress(OSError):  # another process has it open
                self.path.unlink()

    def remove_folder(self, *, ignore_errors: bool = False) -> None:
        """Remove the folder of the lock file. The lock is held until it is gone, where open files can be removed."""
        if not REMOVES_OPEN_FILES:
            self.close()
        shutil.rmtree(self.path.parent, ignore_errors=ignore_errors)


def lock_folder(folder: Path, advice: str) -> FileLock:
    """Create the folder if missing, and lock it for this process. Raises as FileLock does."""
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / LOCK, str(folder), advice)


class Heartbeat:
    """A lease: a file with an id and a count, renewed by a thread. Same arguments as FileLock.

    A process that finds a stale one replaces it by its own, and holds the lease if its own is still there a beat later.
    The holder checks the id before each beat, and so notices a takeover.
    """

    def __init__(
        self, path: Path, name: str, beat_s: float, stale_s: float, on_lost: Callable[[str], None] = end_process
    ) -> None:
        self.path, self.name, self.beat_s, self.stale_s, self.on_lost = path, name, beat_s, stale_s, on_lost
        self.id = uuid.uuid4().hex
        self._beats = 0
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> str | None:
        """Acquire the lease. Returns None, or the text of the file if another holder is alive."""
        while not self._create():
            stale, found = self._watch()
            if stale:
                self._replace()
                found = self._read()
            if self.id in found:
                break
            if found:
                return found
        self._thread = threading.Thread(target=self._beat, name="llammlein-lock", daemon=True)
        self._thread.start()
        return None

    def _text(self) -> str:
        return json.dumps({"id": self.id, **this_process(), "beats": f"{self._beats:012d}"})

    def _create(self) -> bool:
        """Create the file unless it exists."""
        try:
            with open(self.path, "x", encoding="utf-8") as file:
                file.write(self._text())
        except FileExistsError:
            return False
        return True

    def _watch(self) -> tuple[bool, str]:
        """Watch another holder's file until it changes, is gone ("") or is stale: (whether stale, its text)."""
        found = self._read()
        began = next_report = time.monotonic()
        while found and (waited := time.monotonic() - began) < self.stale_s:
            if time.monotonic() >= next_report:
                print(
                    f"{self.name}: the file system has no file locks, and {describe(found)} held this lock last; "
                    f"waiting to see whether it is still alive: {waited:.0f} of {self.stale_s:g} s",
                    file=sys.stderr,
                    flush=True,
                )
                next_report += self.beat_s
            time.sleep(min(1.0, self.beat_s / 4))
            if (now := self._read()) != found:
                return False, now
        return bool(found), found

    def _replace(self) -> None:
        mine = self.path.with_name(f"{self.path.name}.{self.id}")
        mine.write_text(self._text(), encoding="utf-8")
        os.replace(mine, self.path)
        time.sleep(self.beat_s)  # another process may have found it stale too: the last to replace it wins

    def _read(self) -> str:
        """The file's text, "" if there is none."""
        try:
            return self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ""

    def _beat(self) -> None:
        """Thread body. A failed beat is retried: the lease is lost only when another process has it."""
        while not self._closing.wait(self.beat_s):
            # In place: if another process replaces the file after this open, its file is not overwritten.
            with contextlib.suppress(OSError), open(self.path, "r+", encoding="utf-8", errors="replace") as file:
                found = file.read()
                if found and self.id not in found:
                    self.on_lost(
                        f"{self.name} was taken over by another job ({describe(found)}) while this process did not "
                        f"run for over {self.stale_s:g} s; it exits without writing anything more"
                    )
                    return
                self._beats += 1
                file.seek(0)
                file.write(self._text())

    def close(self) -> None:
        """Stop the thread, and remove the file if it belongs to this lease."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(OSError):
            if self.id in self._read():
                self.path.unlink()


def this_process() -> dict[str, Any]:
    """This process's identity, for the lock file."""
    facts: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid()}
    job = os.environ.get("SLURM_JOB_ID")
    return facts | ({"slurm_job": job} if job else {})


def describe(holder: str) -> str:
    """The holder as described in the lock file, for a message."""
    try:
        facts = json.loads(holder)
        job = f", SLURM job {facts['slurm_job']}" if "slurm_job" in facts else ""
        return f"process {facts['pid']} on {facts['host']}{job}"
    except (ValueError, KeyError, TypeError):
        return "unknown process"
