"""For kill tests: intercepts and counts every call that changes the run folder, so that a kill can hit any of them.

`watch` replaces the functions of `os` and `open` that training, torch.save, DCP and pyarrow write with. A file opened
for writing gets a raw file whose `write` is counted: each call is one system call, as in strace
(tests/chaos/test_train_kill.py compares them).
"""

from __future__ import annotations

import builtins
import io
import os
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

KINDS = ("rename", "sync", "write", "delete", "mkdir")
# Phases of a process. `begin`: before the first step; in a resumed run, the rollback to the checkpoint.
PHASES = (
    "begin",
    "step",
    "validation",
    "evaluation",
    "record",
    "saving",
    "publishing",
    "retention",
    "compaction",
    "metrics",
    "other",
)
FUNCTIONS = {
    "rename": ("rename", "replace", "link"),
    "sync": ("fsync", "fdatasync"),
    "write": ("write", "pwrite", "sendfile", "truncate", "ftruncate"),
    "delete": ("unlink", "remove", "rmdir"),
    "mkdir": ("mkdir",),
}


class Call(NamedTuple):
    """A call that is about to happen: the `number`-th of its kind in its phase, counted from 1."""

    kind: str
    phase: str
    number: int
    name: str


class Watch:
    """Counts calls on the files of `run`.

    Args:
        act: called before each call, in its thread, one at a time; gets the call and, for a write of bytes, a function
            that writes their first half.
    """

    def __init__(self, run: Path, act: Callable[[Call, Callable[[], object] | None], None]) -> None:
        self.run, self.act = os.path.abspath(run), act
        self.begun = False
        self.counts: Counter[tuple[str, str]] = Counter()
        self._lock = threading.RLock()
        self._open = io.open
        for kind, names in FUNCTIONS.items():
            for name in names:
                setattr(os, name, self._watched(kind, getattr(os, name)))
        io.open = builtins.open = self._watched_open

    def before(self, kind: str, path: str, target: str | None = None, half: Callable[[], object] | None = None) -> None:
        name = os.path.relpath(path, self.run)
        if name.startswith(".."):
            return
        with self._lock:
            phase = self.phase(kind, name, target)
            self.counts[kind, phase] += 1
            self.act(Call(kind, phase, self.counts[kind, phase], name), half)

    def phase(self, kind: str, name: str, target: str | None) -> str:
        """The phase of a call on `name`, relative to the run folder."""
        first = name.split("/")[0]
        if not self.begun:
            return "begin"
        if threading.current_thread().name == "llammlein-compaction":
            return "compaction"
        if first == "datapoints":
            return "record"
        if first == "metrics.csv":
            return "metrics"
        if first == "." or (target is not None and os.path.basename(target).startswith("iter-")):
            return "publishing"
        if first.startswith(".iter-"):
            return "saving"
        return "retention" if first.startswith((".deleting-", "iter-")) else "other"

    def _watched(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(what: Any, *arguments: Any, **keywords: Any) -> Any:
            target = path_of(arguments[0]) if kind == "rename" else None
            half = None
            if function.__name__ in ("write", "pwrite"):
                data, *rest = arguments
                half = lambda: function(what, data[: len(data) // 2], *rest)  # noqa: E731
            elif function.__name__ == "sendfile":
                half = lambda: function(what, *arguments[:-1], max(1, arguments[-1] // 2))  # noqa: E731
            self.before(kind, path_of(what, keywords.get("dir_fd")), target, half)
            return function(what, *arguments, **keywords)

        return watched

    def _watched_open(self, file: Any, mode: str = "r", buffering: int = -1, *arguments: Any, **keywords: Any) -> Any:
        """Like io.open, but with a watched raw file if it is writable."""
        if not set(mode) & set("wax+") or os.path.relpath(path_of(file), self.run).startswith(".."):
            return self._open(file, mode, buffering, *arguments, **keywords)
        names = ("encoding", "errors", "newline", "closefd", "opener")
        given = dict(zip(names, arguments, strict=False)) | keywords
        raw = _WatchedFile(
            file, mode.replace("b", "").replace("t", ""), given.pop("closefd", True), given.pop("opener", None)
        )
        raw.watch = self
        if buffering == 0:
            return raw
        size = buffering if buffering > 1 else max(raw._blksize, io.DEFAULT_BUFFER_SIZE)  # type: ignore[attr-defined]
        buffered = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw, size)
        if "b" in mode:
            return buffered
        text = io.TextIOWrapper(buffered, line_buffering=buffering == 1, **given)
        text.mode = mode  # type: ignore[misc]  # as io.open does
        return text


class _WatchedFile(io.FileIO):
    watch: Watch

    def write(self, data: Any) -> int:
        half = lambda: io.FileIO.write(self, memoryview(data).cast("B")[: len(data) // 2])  # noqa: E731
        self.watch.before("write", path_of(self.fileno()), None, half)
        return super().write(data)

    def truncate(self, size: int | None = None) -> int:
        self.watch.before("write", path_of(self.fileno()))
        return super().truncate(size)


def path_of(what: Any, folder: int | None = None) -> str:
    """The absolute path of a path or descriptor; with `folder`, of a path relative to that descriptor."""
    if isinstance(what, int):
        return os.readlink(f"/proc/self/fd/{what}")
    path = os.fsdecode(what)
    return os.path.join(path_of(folder) if folder is not None else os.getcwd(), path)
