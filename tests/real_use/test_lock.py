"""Folder locks, with flock and on file systems without it. Real processes, with short intervals."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from running import PYTHON_PATH, flags, script, train, write_dataset

from lit_files import lock as module
from lit_files.lock import WITHOUT_FLOCK, FileLock, LockBusy, lock_folder

# Holds the lock argv[1] until its standard input ends, without flock; prints events.
HOLDER = """
import errno, fcntl, sys
from pathlib import Path
def none(*_): raise OSError(errno.ENOSYS, "Function not implemented")
fcntl.flock = none
from lit_files.lock import FileLock, LockBusy
try:
    lock = FileLock(Path(sys.argv[1]), "the folder", "wait", beat_s=0.1, stale_s=0.8)
except LockBusy as error:
    print(f"busy: {error}", flush=True)
    sys.exit(3)
print("held", flush=True)
sys.stdin.read()
lock.close()
"""


class Holder:
    """A process that wants the lock."""

    def __init__(self, path: Path) -> None:
        line = [sys.executable, "-c", HOLDER, str(path)]
        pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        self.process = subprocess.Popen(line, **pipes, text=True, env={**os.environ, "PYTHONPATH": PYTHON_PATH})
        assert self.process.stdout is not None
        self.read = self.process.stdout.readline

    def end(self) -> tuple[int, str]:
        """Let it exit; returns its status and standard error."""
        _, errors = self.process.communicate(timeout=30)
        return self.process.returncode, errors


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], Holder]]:
    holders: list[Holder] = []

    def begin() -> Holder:
        holders.append(Holder(tmp_path / ".lock"))
        return holders[-1]

    yield begin
    for holder in holders:
        holder.process.kill()
        holder.process.communicate()


def refuse(patch: pytest.MonkeyPatch, number: int) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    patch.setattr(fcntl, "flock", flock)


def test_the_holder_is_named(tmp_path: Path) -> None:
    """A folder held by another process is refused immediately, and the message names the holder."""
    lock = lock_folder(tmp_path / "run", "wait for it")
    with pytest.raises(LockBusy, match=rf"run is in use by another job \(process {os.getpid()} on .+\); wait for it"):
        lock_folder(tmp_path / "run", "wait for it")
    lock.close()
    lock_folder(tmp_path / "run", "").close()
    assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"], "heartbeat despite flock"


@pytest.mark.parametrize("number", WITHOUT_FLOCK)
def test_a_file_system_without_flock_is_used(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a mount without flock (Lustre: ENOSYS; NFS: ENOLCK; others: ENOTSUP, EINVAL) a start gets the lock
    immediately, and leaves no heartbeat behind."""
    refuse(monkeypatch, number)
    lock = lock_folder(tmp_path, "")
    assert (tmp_path / ".lock.heartbeat").exists()
    lock.close()
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.EROFS])
def test_other_errors_are_reported_unchanged(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failing or read-only file system is not mistaken for another job: the error and the path are named."""
    refuse(monkeypatch, number)
    with pytest.raises(OSError, match=rf"{os.strerror(number)}.*\.lock") as raised:
        lock_folder(tmp_path, "")
    assert raised.value.errno == number


def test_a_run_folder_that_cannot_be_created(tmp_path: Path) -> None:
    """--out_dir below a file: status 2 and the reason, no traceback, no mention of another job."""
    (tmp_path / "file").write_text("x")
    write_dataset(tmp_path / "data" / "train", [60] * 20)
    write_dataset(tmp_path / "data" / "val", [60] * 5)
    done = train(*flags(tmp_path / "data", tmp_path / "file" / "run"), check=False)
    assert done.returncode == 2 and f"--out_dir {tmp_path}/file/run cannot be used: Not a directory" in done.stderr
    assert "Traceback" not in done.stderr and "another job" not in done.stderr


def test_without_flock_a_live_holder_is_noticed_within_a_beat(start: Callable[[], Holder]) -> None:
    """Without flock, a second start is refused as soon as it sees the holder's heartbeat change."""
    first = start()
    assert first.read() == "held\n"
    second = start()
    assert second.read().startswith(f"busy: the folder is in use by another job (process {first.process.pid} on ")
    status, errors = second.end()
    assert status == 3 and "the file system has no file locks, and process" in errors
    assert first.end() == (0, "")
    third = start()
    assert third.read() == "held\n"
    assert third.end() == (0, ""), "waited after a clean exit"


def test_without_flock_waiting_for_a_dead_holder_prints_messages(start: Callable[[], Holder], tmp_path: Path) -> None:
    """Without flock, after a kill the next start waits until the heartbeat is stale, with a message per beat."""
    first = start()
    assert first.read() == "held\n"
    first.process.kill()
    first.process.wait()
    second = start()
    assert second.read() == "held\n"
    assert str(second.process.pid) in (tmp_path / ".lock.heartbeat").read_text()
    status, errors = second.end()
    lines = errors.splitlines()
    assert status == 0 and 3 <= len(lines) <= 9
    assert f"process {first.process.pid} on" in lines[0] and "0 of 0.8 s" in lines[0]
    assert not (tmp_path / ".lock.heartbeat").exists()


def test_without_flock_a_suspended_holder_notices_the_lost_lock(start: Callable[[], Holder], tmp_path: Path) -> None:
    """Without flock, a holder suspended for longer than the heartbeat's lifetime loses the lock; when it wakes
    up, it exits with a message and does not touch the new holder's heartbeat."""
    first = start()
    assert first.read() == "held\n"
    first.process.send_signal(signal.SIGSTOP)
    second = start()
    assert second.read() == "held\n"
    first.process.send_signal(signal.SIGCONT)
    assert first.process.wait(timeout=30) == 1
    errors = first.end()[1]
    assert f"error: the folder was taken over by another job (process {second.process.pid} on " in errors
    assert str(second.process.pid) in (tmp_path / ".lock.heartbeat").read_text()
    assert second.process.poll() is None and second.end()[0] == 0


def test_without_flock_one_of_many_starts_gets_a_stale_lock(start: Callable[[], Holder]) -> None:
    """Without flock, one of several starts that find the same stale heartbeat gets the lock."""
    first = start()
    assert first.read() == "held\n"
    first.process.kill()
    first.process.wait()
    others = [start() for _ in range(3)]
    said = [holder.read() for holder in others]
    assert said.count("held\n") == 1, said
    assert all(s == "held\n" or s.startswith("busy: ") for s in said)


def test_flock_respects_a_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One node mounts the file system without flock, the other with it: the second sees the first's
    heartbeat."""
    with monkeypatch.context() as patch:
        refuse(patch, errno.ENOSYS)
        lock = FileLock(tmp_path / ".lock", "it", "", beat_s=0.1, stale_s=60)
    with pytest.raises(LockBusy):
        FileLock(tmp_path / ".lock", "it", "", beat_s=0.1, stale_s=60)
    lock.close()
    FileLock(tmp_path / ".lock", "it", "").close()


def test_a_removed_lock_file_still_excludes_a_second_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process waiting for a lock file that its holder then removes does not end up holding the removed file."""
    real, path = fcntl.flock, tmp_path / "x.lock"

    def flock(file: Any, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        path.unlink()  # like the holder's close, between this process's open and its flock
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = FileLock(path, "it", "", remove=True)
    with pytest.raises(LockBusy):
        FileLock(path, "it", "", remove=True)
    assert path.exists()
    lock.close()
    assert not path.exists()


def test_a_preparation_without_flock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Preparation works without flock, and leaves no lock file."""
    refuse(monkeypatch, errno.ENOSYS)
    text = tmp_path / "text.txt"
    text.write_text("ein Satz. Noch ein anderer, laengerer Satz.\n" * 50)
    trained = script("train_tokenizer.py", "--input", text, "--vocab_size", 262, "--output", tmp_path / "tok")
    assert trained.returncode == 0, trained.stderr
    done = script(
        "prepare_data.py", "--input", text, "--tokenizer", tmp_path / "tok", "--output", tmp_path / "out",
        "--workers", 1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "text.txt", "tok"]


def test_a_failed_beat_is_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A temporarily unreachable heartbeat file (a stalled server) costs neither the lock nor the process."""
    lost: list[str] = []
    with monkeypatch.context() as patch:
        refuse(patch, errno.ENOSYS)
        lock = FileLock(tmp_path / ".lock", "it", "", beat_s=0.02, stale_s=60, on_lost=lost.append)
    beating = tmp_path / ".lock.heartbeat"
    beating.rename(tmp_path / "away")
    time.sleep(0.1)
    (tmp_path / "away").rename(beating)
    before = beating.read_text()
    until = time.monotonic() + 10
    while beating.read_text() in (before, "") and time.monotonic() < until:
        time.sleep(0.01)
    assert beating.read_text() != before and not lost
    lock.close()
    assert module.describe("") == "unknown process"
