"""Memory-maps files without keeping descriptors: a process may hold thousands under any `ulimit -n`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lit_files.platform import map_file
from lit_files.reading import open_regular

MAX_MAPS = 1 << 15  # per process; Linux allows 65530 by default (vm.max_map_count), libraries need some too


class _Map:
    """The mapped bytes of a file, while an array uses them. Python's own mmap keeps a descriptor until 3.13."""

    live = 0  # in this process

    def __init__(self, path: Path, descriptor: int, size: int, random: bool) -> None:
        self._unmap: Callable[[], object] | None = None
        address, self._unmap = map_file(path, descriptor, size, random)
        _Map.live += 1
        self.__array_interface__ = {"version": 3, "shape": (size,), "typestr": "|u1", "data": (address, True)}

    def __del__(self) -> None:
        if self._unmap is not None:
            self._unmap()
            _Map.live -= 1


def map_array(
    path: str | Path, dtype: npt.DTypeLike, shape: tuple[int, ...], offset: int = 0, *, random: bool = False
) -> npt.NDArray[Any]:
    """Map a file's bytes from `offset` on read-only, as an array. The file is closed immediately.

    Args:
        random: disable read-ahead. For scattered rows, the megabytes of read-ahead often configured for disks cost a
            hundred times more.

    Raises ValueError, naming the file, if it is too short or not a regular file.
    """
    path, dtype = Path(path), np.dtype(dtype)
    count = 1
    for extent in shape:  # Python integers: a damaged header may give more than 2^63 bytes
        count *= int(extent)
    end = offset + count * dtype.itemsize
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size < end:
            raise ValueError(f"{path} is truncated: it has {size} bytes, and {end} are needed")
        if count == 0:
            return np.empty(shape, dtype)
        whole = np.asarray(_Map(path, file.fileno(), end, random))
    return np.ndarray(shape, dtype, buffer=whole, offset=offset)


def live_maps() -> int:
    """Number of maps in this process; should not exceed MAX_MAPS."""
    return _Map.live
