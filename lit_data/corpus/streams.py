"""Reads bytes and lines of optionally compressed files in constant memory; detects truncated streams."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

# A zstd block of 4 bytes can expand to 128 KiB, so one step yields up to 8 MiB. Larger saves at most 3% of reading.
ZSTD_CHUNK_BYTES = 256
GZIP_CHUNK_BYTES = 1 << 16
PIECE_BYTES = 1 << 18  # of decompressed data, from gzip
FILE_CHUNK_BYTES = 1 << 20
MAX_WINDOW_BYTES = 1 << 31  # archives made with `zstd --long=31` are common; the default of 2^27 refuses them
GZIP_WINDOW_BITS = 31  # 15, plus 16 for a gzip header


GIVE_UP_BYTES = 1 << 31  # give up on longer lines


class DamagedError(Exception):
    """A compressed stream that is truncated or invalid, or an endless line."""


OnRead = Callable[[int], object]  # called with the number of bytes read from a file, as they are there


def ignore(_: int) -> None:
    """Reading is not followed."""


def chunks_of(path: Path, compression: str = "", on_read: OnRead = ignore) -> Iterator[bytes]:
    """Iterate over the decompressed content of a file (`compression`: "gz", "zst", "zstd", or "" for none).

    Raises:
        DamagedError: while iterating, after all readable data.
    """
    if compression == "":
        return _raw_chunks(path, FILE_CHUNK_BYTES, on_read)
    return _gunzipped(path, on_read) if compression == "gz" else _unzstded(path, on_read)


def lines_of(chunks: Iterator[bytes], limit_bytes: int | None = None) -> Iterator[bytes | None]:
    """Split at newlines only: a JSON string may hold other line separators of Unicode. The last may lack one.

    Yields None instead of a line longer than `limit_bytes`, as soon as known; skips its rest.

    Raises:
        DamagedError: a line longer than GIVE_UP_BYTES and the limit.
    """
    limit = limit_bytes if limit_bytes is not None else math.inf
    parts: list[bytes] = []  # of the incomplete line; joined once, so that long lines cost linear time
    size = 0
    for chunk in chunks:
        first, *rest = chunk.split(b"\n")
        fitted = size <= limit
        size += len(first)
        if size <= limit:
            parts.append(first)
        elif fitted:
            parts = []
            yield None
        elif size > GIVE_UP_BYTES:
            raise DamagedError(f"a line of more than {size >> 20} MB: what follows it is not read")
        for line in rest:
            if size <= limit:
                yield b"".join(parts)
            parts, size = [line], len(line)
            if size > limit:
                parts = []
                yield None
    last = b"".join(parts)
    if last:
        yield last


def bytes_within(chunks: Iterator[bytes], limit_bytes: int) -> bytes | None:
    """The concatenated chunks, or None as soon as they exceed `limit_bytes`."""
    parts, size = [], 0
    for chunk in chunks:
        parts.append(chunk)
        size += len(chunk)
        if size > limit_bytes:
            return None
    return b"".join(parts)


def after_lines(chunks: Iterator[bytes], lines: int, name: str) -> Iterator[bytes]:
    """Skip the first `lines` lines of the file `name`; they are counted, not parsed.

    Raises:
        ValueError: there are fewer lines.
    """
    unfinished = False
    for chunk in chunks:
        if lines:
            count = chunk.count(b"\n")
            unfinished = not chunk.endswith(b"\n")
            if count < lines:
                lines -= count
                continue
            end = -1
            for _ in range(lines):
                end = chunk.index(b"\n", end + 1)
            chunk, lines = chunk[end + 1 :], 0
        if chunk:
            yield chunk
    if lines > unfinished:
        missing = lines - unfinished
        raise ValueError(
            f"{name} ends {missing} lines before the line to resume after: the file has changed; start again with "
            "--fresh"
        )


def _raw_chunks(path: Path, chunk_bytes: int, on_read: OnRead) -> Iterator[bytes]:
    with open(path, "rb") as f:
        while chunk := f.read(chunk_bytes):
            on_read(len(chunk))
            yield chunk


def _unzstded(path: Path, on_read: OnRead) -> Iterator[bytes]:
    """Decompress a zstd file of one or more frames.

    zstandard's own stream reader does not detect truncation; here the end of each frame is checked.
    """
    import zstandard  # only here: other files are read without it

    make = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompressobj
    frame = make()
    started, any_frame = False, False
    for chunk in _raw_chunks(path, ZSTD_CHUNK_BYTES, on_read):
        while chunk:
            started = any_frame = True
            try:
                data = frame.decompress(chunk)
            except zstandard.ZstdError as error:
                raise DamagedError(f"damaged, or not a zstd file: {error}") from error
            if data:
                yield data
            chunk = b""
            if frame.eof:
                chunk, frame, started = frame.unused_data, make(), False
    if started or not any_frame:
        raise DamagedError("the zstd file is truncated; copy or download it again")


def _gunzipped(path: Path, on_read: OnRead) -> Iterator[bytes]:
    """Decompress a gzip file of one or more members; zeros after the last are padding, as for gzip."""
    member = zlib.decompressobj(GZIP_WINDOW_BITS)
    started, any_member = False, False
    for chunk in _raw_chunks(path, GZIP_CHUNK_BYTES, on_read):
        while chunk:
            if any_member and not started:
                chunk = chunk.lstrip(b"\0")
                if not chunk:
                    break
            started = any_member = True
            try:
                data = member.decompress(chunk, PIECE_BYTES)
            except zlib.error as error:
                raise DamagedError(f"damaged, or not a gzip file: {error}") from error
            if data:
                yield data
            chunk = member.unconsumed_tail
            if member.eof:
                chunk, member, started = member.unused_data, zlib.decompressobj(GZIP_WINDOW_BITS), False
    if started or not any_member:
        raise DamagedError("the gzip file is truncated; copy or download it again")
