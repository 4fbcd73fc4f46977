"""Reads a folder written by torch's distributed checkpoint (DCP), one tensor at a time and without running its pickles.

`.metadata` is a pickle: for each tensor its size, dtype and chunks, and for each chunk a file of the folder, an offset
and a length. There `torch.save` wrote the chunk: an uncompressed zip archive whose record
`data/0` is the chunk's bytes, so that they can be read straight into the tensor.
"""

from __future__ import annotations

import io
import math
import pathlib
import pickle
import struct
import sys
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import torch
from torch import Tensor

from lit_files.platform import drop_from_cache
from lit_files.reading import open_regular, read_bytes
from lit_model.checksum import byte_view
from lit_model.tensor_file import fault

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

_LOCAL_HEADER = struct.Struct("<26xHH")  # of a record in a zip archive: the lengths of its name and its extra field


class _MetadataUnpickler(pickle.Unpickler):
    """Reads DCP's `.metadata`: only its own data classes, sizes, dtypes and containers."""

    ALLOWED = frozenset(
        {
            ("collections", "OrderedDict"),
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("torch.distributed.checkpoint.metadata", "Metadata"),
            ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
            ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
            ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
            ("torch.distributed.checkpoint.metadata", "TensorProperties"),
            ("torch.distributed.checkpoint.metadata", "StorageMeta"),
            ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if module in ("pathlib", "pathlib._local") and name in ("Path", "PosixPath"):
            return pathlib.PurePosixPath  # the module's name depends on the Python that wrote it
        if (module, name) in self.ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a checkpoint's metadata")


@dataclass(frozen=True)
class _Chunk:
    """A part of a tensor: its place in the tensor, and its archive's place in the folder."""

    start: tuple[int, ...]
    size: tuple[int, ...]
    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class _Stored:
    size: tuple[int, ...]
    dtype: torch.dtype
    chunks: list[_Chunk]


def read_metadata(folder: Path) -> Metadata:
    """The content of `.metadata`. Raises ValueError if it is missing, damaged, or holds anything but tensors."""
    from torch.distributed.checkpoint.metadata import Metadata

    file = folder / ".metadata"
    if not file.is_file():
        raise ValueError(f"{folder} is not a complete checkpoint: it has no .metadata")
    try:
        metadata = _MetadataUnpickler(io.BytesIO(read_bytes(file))).load()
        if not isinstance(metadata, Metadata):
            raise ValueError(f"it is a {type(metadata).__name__}")
        _stored(metadata)
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{file} is not metadata written by this project, or it is damaged{fault(error)}") from error
    return metadata


def _stored(metadata: Metadata) -> dict[str, _Stored]:
    """Every tensor's chunks. Raises ValueError where they don't make up the tensor or are outside the folder.

    The unpickler lets through only harmless classes, but with any content: all of it is checked.
    """
    from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

    tensors: dict[str, _Stored] = {}
    for name, item in metadata.state_dict_metadata.items():
        if not isinstance(name, str) or not isinstance(item, TensorStorageMetadata):
            raise ValueError(f"{name} is not a tensor")
        if not isinstance(item.properties.dtype, torch.dtype):
            raise ValueError(f"{name} has the dtype {item.properties.dtype}")
        size, chunks = _whole_numbers(item.size), []
        for chunk in item.chunks:
            start, extent = _whole_numbers(chunk.offsets), _whole_numbers(chunk.sizes)
            if len(start) != len(size) or len(extent) != len(size):
                raise ValueError(f"a chunk of {name} has another number of dimensions")
            if any(a + b > c for a, b, c in zip(start, extent, size, strict=True)):
                raise ValueError(f"a chunk of {name} reaches beyond it")
            place = metadata.storage_data[MetadataIndex(name, start)]
            if place.transform_descriptors:
                raise ValueError(f"{name} is stored with {place.transform_descriptors}")
            if not isinstance(place.relative_path, str) or Path(place.relative_path).name != place.relative_path:
                raise ValueError(f"{name} is in {place.relative_path!r}, which is not a file of the folder")
            offset, length = _whole_numbers((place.offset, place.length))
            if math.prod(extent) * item.properties.dtype.itemsize > length:
                raise ValueError(f"a chunk of {name} is larger than its bytes")
            chunks.append(_Chunk(start, extent, place.relative_path, offset, length))
        if sum(math.prod(c.size) for c in chunks) != math.prod(size) or len({c.start for c in chunks}) < len(chunks):
            raise ValueError(f"the chunks of {name} do not make up its size {size}")
        tensors[name] = _Stored(size, item.properties.dtype, chunks)
    return tensors


def _whole_numbers(values: Any) -> tuple[int, ...]:
    numbers = tuple(values)
    if any(not isinstance(n, int) or n < 0 for n in numbers):
        raise ValueError(f"{numbers} are not whole numbers")
    return numbers


def load_into(folder: Path, tensors: Mapping[str, Tensor], *, no_dist: bool) -> None:
    """Fill tensors, DTensors among them, in place by DCP; every rank of the default group calls this.

    Raises ValueError on every rank if one of them finds a file damaged, or anything in it but a tensor's bytes.
    """
    from torch.distributed.checkpoint import CheckpointException, FileSystemReader, load
    from torch.distributed.checkpoint.metadata import StorageMeta

    class SafeReader(FileSystemReader):
        """DCP's reader of a folder, with `.metadata` read by the allow-listing unpickler and byte items refused."""

        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            metadata = read_metadata(Path(self.path))
            metadata.storage_meta = StorageMeta(load_id=self.load_id)
            return metadata

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process reads, as meant
        try:
            load(dict(tensors), storage_reader=SafeReader(folder), no_dist=no_dist)
        except CheckpointException as error:  # no subclass of Exception: it would pass every handler above
            first = next(iter(error.failures.values()))[0]
            raise ValueError(f"{folder} is damaged, or was not written here{fault(first)}") from error


class ShardedTensors:
    """The tensors of a folder. Opening reads `.metadata` once and checks that the files exist.

    Raises ValueError if the metadata is damaged, or if a file is missing or shorter than the metadata says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tensors = _stored(read_metadata(folder))
        ends: dict[str, int] = {}
        for tensor in self._tensors.values():
            for chunk in tensor.chunks:
                ends[chunk.file] = max(ends.get(chunk.file, 0), chunk.offset + chunk.length)
        for file, end in ends.items():
            path = folder / file
            if not path.is_file():
                raise ValueError(f"{path} is missing: the checkpoint is not complete")
            if path.stat().st_size < end:
                raise ValueError(f"{path} is truncated: {path.stat().st_size} bytes of at least {end}")

    def names(self) -> list[str]:
        return list(self._tensors)

    def layout(self, name: str) -> Tensor:
        """A tensor of the same shape and dtype on the `meta` device."""
        stored = self._tensors[name]
        return torch.empty(stored.size, dtype=stored.dtype, device="meta")

    def buffer(self) -> Tensor:
        """A buffer large enough for any of the tensors, to be reused in calls of `tensor`."""
        largest = max((math.prod(t.size) * t.dtype.itemsize for t in self._tensors.values()), default=0)
        return torch.empty(largest, dtype=torch.uint8)

    def tensor(self, name: str, buffer: Tensor | None = None) -> Tensor:
        """Read one tensor, into new memory or into `buffer`, where it is valid until the next one is read.

        With `buffer`, that of a pass over all tensors, what was read leaves the page cache, so that the next reads get
        its pages: new ones cost far more, above all in a virtual machine. Beside the tensor at most one chunk is held,
        where the chunk is not contiguous in it. Raises ValueError if the file contradicts the metadata.
        """
        stored = self._tensors[name]
        if buffer is None:
            whole = torch.empty(stored.size, dtype=stored.dtype)
        else:
            whole = buffer[: math.prod(stored.size) * stored.dtype.itemsize].view(stored.dtype).view(stored.size)
        for chunk in stored.chunks:
            if math.prod(chunk.size) == 0:
                continue
            target = whole
            for dimension, (start, length) in enumerate(zip(chunk.start, chunk.size, strict=True)):
                target = target.narrow(dimension, start, length)
            path = self.folder / chunk.file
            try:
                with open_regular(path) as file:
                    _read_chunk(file, chunk.offset, chunk.length, target)
                    if buffer is not None:
                        drop_from_cache(file.fileno(), chunk.offset, chunk.length)
            except Exception as error:  # a damaged archive can raise anything
                raise ValueError(f"{path} is damaged, or was not written here: {name}{fault(error)}") from error
        return whole


def _read_chunk(file: BinaryIO, offset: int, length: int, target: Tensor) -> None:
    """Fill `target` from the archive at `offset`."""
    archive = io.BufferedReader(_FileSlice(file, offset, length))
    stored = torch.load(archive, map_location="meta", weights_only=True)  # shape and dtype; no data is read
    if not isinstance(stored, Tensor) or stored.shape != target.shape or stored.dtype != target.dtype:
        found = f"{stored.dtype} {tuple(stored.shape)}" if isinstance(stored, Tensor) else type(stored).__name__
        raise ValueError(f"a chunk is {found}; the metadata says {target.dtype} {tuple(target.shape)}")
    records = zipfile.ZipFile(archive)
    record = next(r for r in records.infolist() if r.filename.endswith("/data/0"))
    byte_order = next((records.read(r) for r in records.infolist() if r.filename.endswith("/byteorder")), b"little")
    whole = stored.is_contiguous() and stored.untyped_storage().nbytes() == stored.nbytes == record.file_size
    if not (whole and target.is_contiguous() and byte_order.decode() == sys.byteorder):
        archive.seek(0)
        target.copy_(torch.load(archive, weights_only=True))
        return
    archive.seek(record.header_offset)
    name_length, extra_length = _LOCAL_HEADER.unpack(archive.read(_LOCAL_HEADER.size))
    begin = record.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    if record.compress_type != zipfile.ZIP_STORED or begin + target.nbytes > length:
        raise ValueError("its archive is not one of torch.save")
    file.seek(offset + begin)
    view, done = byte_view(target), 0
    while done < len(view):
        n = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not n:
            raise ValueError("the file ended early")
        done += n


class _FileSlice(io.RawIOBase):
    """A part of an open file as a file."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._place = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, place: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._length}[whence]
        self._place = max(0, base + place)
        return self._place

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._place)]
        self._file.seek(self._offset + self._place)
        n = cast(int, self._file.readinto(view))  # type: ignore[attr-defined]
        self._place += n
        return n
