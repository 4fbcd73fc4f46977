"""Memory maps of files that keep no file descriptor: a process may hold thousands of them under any `ulimit -n`."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lit_files.reading import open_regular

MAX_MAPS = 1 << 15  # of a process; Linux allows 65530 by default (vm.max_map_count), libraries need some too

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_longlong,
]  # fmt: skip
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_FAILED = ctypes.c_void_p(-1).value


class _Map:
    """The bytes of a file, for as long as an array of them lives. Python's own mmap keeps a descriptor until 3.13."""

    live = 0  # in this process

    def __init__(self, path: Path, descriptor: int, size: int, random: bool) -> None:
        self._size = 0
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        if address == _FAILED:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(path))
        self._address, self._size = address, size
        _Map.live += 1
        if random and hasattr(mmap, "MADV_RANDOM"):
            _libc.madvise(address, size, mmap.MADV_RANDOM)
        self.__array_interface__ = {"version": 3, "shape": (size,), "typestr": "|u1", "data": (address, True)}

    def __del__(self) -> None:
        if self._size:
            _libc.munmap(self._address, self._size)
            _Map.live -= 1


def map_array(
    path: str | Path, dtype: npt.DTypeLike, shape: tuple[int, ...], offset: int = 0, *, random: bool = False
) -> npt.NDArray[Any]:
    """An array of a file's bytes from `offset` on, mapped read-only. The file is closed again at once.

    Args:
        random: have only what is asked for read from the disk. Where rows lie anywhere, reading megabytes ahead of
            each, as disks are often set to, costs a hundred times more.

    Raises ValueError, naming the file, if it is too short or no regular file.
    """
    path, dtype = Path(path), np.dtype(dtype)
    count = 1
    for extent in shape:  # Python's integers: a damaged header may ask for more than 2^63 bytes
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
    """Maps that this process holds; more than MAX_MAPS should not be."""
    return _Map.live
