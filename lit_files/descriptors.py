"""Limits open files per process, so that datasets of thousands of shards can be read under any `ulimit -n`."""

from __future__ import annotations

import itertools
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import ClassVar

from lit_files.platform import read_at
from lit_files.reading import open_regular

MAX_OPEN = 64  # files kept open for the next read; the lowest usual limit is 256 for the entire process


class OpenFiles:
    """Reads parts of files and keeps them open for later reads, within the process's budget.

    Any thread may read. Close it, or drop the last reference, when no thread reads any more.
    """

    _kept: ClassVar[OrderedDict[tuple[int, str], list[int]]] = OrderedDict()
    """(reader, path) -> [descriptor, reads in progress], of all readers of the process; most recently used last."""
    _lock: ClassVar[threading.RLock] = threading.RLock()  # re-entrant: a reader may be collected while it is held
    _numbers = itertools.count()

    def __init__(self) -> None:
        self._number = next(self._numbers)

    def read(self, path: str | Path, size: int, offset: int) -> bytes:
        """Read exactly `size` bytes of a file at `offset`. Raises ValueError naming the file if it is too short."""
        key = self._number, str(path)
        with self._lock:
            file = self._kept.get(key)
            if file is None:
                with open_regular(path) as opened:
                    file = self._kept[key] = [os.dup(opened.fileno()), 0]
            file[1] += 1
            self._kept.move_to_end(key)
            for other in list(self._kept)[: max(0, len(self._kept) - MAX_OPEN)]:
                self._close(other)
        try:
            data = read_at(file[0], size, offset)
            while len(data) < size:
                more = read_at(file[0], size - len(data), offset + len(data))
                if not more:
                    raise ValueError(f"{path} ends before byte {offset + size}: it is truncated")
                data += more
            return data
        finally:
            with self._lock:
                file[1] -= 1

    def close(self) -> None:
        """Close this reader's files."""
        with self._lock:
            for key in list(self._kept):
                if key[0] == self._number:
                    self._close(key)

    __del__ = close

    def _close(self, key: tuple[int, str]) -> None:
        file = self._kept.get(key)
        if file is not None and not file[1]:
            del self._kept[key]
            os.close(file[0])
