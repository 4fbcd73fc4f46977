"""Caches tokens of a packed dataset in the node's memory or on its disk, ahead of use.

A dataset is staged in chunks of a shard's .bin, in the order of the coming rows and within the budget; a chunk stays
until no known row needs it. Anything not staged is read from the source. See `cache_folder` for how processes share
chunks.

The source is read about once per epoch if the order uses each chunk many times within a short span: two-level
shuffling, blocks no smaller than a chunk, groups of at most half the budget. A fully random order over a dataset much
larger than the budget gains nothing.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lit_data.loading.cache_folder import CacheFolder
from lit_data.packed.index import IntArray
from lit_data.packed.reader import PackedDataset
from lit_files.descriptors import OpenFiles
from lit_files.mapping import map_array

CHUNK_BYTES = 16 << 20
PIECE_BYTES = 1 << 20  # bytes per read while staging, so that other reads of a slow source can interleave
AHEAD_ROWS = 1 << 20  # rows of lookahead
AHEAD_BUDGETS = 4  # or this many times the budget's chunks: more lookahead has no effect
# A chunk stays cached between two rows that need it unless the gap is long, as until the next epoch. The limit in rows,
# per chunk of the budget:
PAUSE_ROWS = 16
POLL_SECONDS = 0.05
MAX_MAPS = 4096  # chunks mapped at once; a process has 65530 maps
CHUNKS_PER_REQUEST = 256  # under one lock

Ranges = Iterator[tuple[IntArray, IntArray]]


class ShardReader(Protocol):
    """The source of the tokens. Called by two threads concurrently."""

    def pread(self, shard: int, offset: int, size: int) -> bytes:
        """Read exactly `size` bytes of a shard's .bin at `offset`."""
        ...


class ShardFiles:
    """Reads the shards of a dataset by pread: a page fault would block the entire process, a read only its thread."""

    def __init__(self, dataset: PackedDataset) -> None:
        self._paths = [dataset.path / f"{s.name}.bin" for s in dataset.manifest.shards]
        self._files = OpenFiles()

    def pread(self, shard: int, offset: int, size: int) -> bytes:
        """See `ShardReader`. Raises ValueError if the file is too short."""
        return self._files.read(self._paths[shard], size, offset)

    def close(self) -> None:
        self._files.close()


class _StagingError(Exception):
    """Raised when the cache folder failed, not the source."""


class ShardCache:
    """Reads tokens of a dataset from staged chunks, or from the source where one is not staged.

    One thread may call `copy_tokens`; this object's own thread stages.

    Args:
        folder: the cache folder, ideally local to the node; shared with other holders.
        budget_bytes: budget for the entire folder, at least one chunk.
        chunk_bytes: holders with different sizes share the budget, but no chunks.
        source: read from this instead of the dataset's files.
        keep: leave the chunks for the next job; else the last holder removes them.

    Attributes:
        hits, misses: pieces copied from a chunk, and from the source.
        wait_seconds: time `copy_tokens` spent reading the source.
        staged_bytes: bytes copied to the cache by this holder.
        failure: why staging stopped early, if it did; reads then use the source.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        folder: str | Path,
        budget_bytes: int,
        *,
        chunk_bytes: int = CHUNK_BYTES,
        source: ShardReader | None = None,
        keep: bool = True,
    ) -> None:
        if chunk_bytes < dataset.dtype.itemsize:
            raise ValueError(f"chunks of {chunk_bytes} bytes hold no token")
        if budget_bytes < chunk_bytes:
            raise ValueError(
                f"--data.cache_gb {budget_bytes / 1e9:g} is less than a chunk of {chunk_bytes} bytes; give enough for "
                "several"
            )
        self.dataset, self.keep = dataset, keep
        self.hits = self.misses = self.staged_bytes = 0
        self.wait_seconds = 0.0
        self.failure: str | None = None
        self._files = ShardFiles(dataset)
        self._source: ShardReader = self._files if source is None else source
        chunks = budget_bytes // chunk_bytes
        self._pause_rows, self._ahead_chunks = PAUSE_ROWS * chunks, AHEAD_BUDGETS * chunks
        self._dtype, self._chunk_tokens = dataset.dtype, chunk_bytes // dataset.dtype.itemsize
        tokens = np.asarray([s.tokens for s in dataset.manifest.shards], dtype=np.int64)
        self._shard_start = np.cumsum([0, *tokens], dtype=np.int64)  # stream position of each shard's first token
        self._chunk_start = np.cumsum([0, *-(-tokens // self._chunk_tokens)], dtype=np.int64)  # its first chunk
        self._shard_starts: list[int] = self._shard_start.tolist()  # lists: faster than numpy for one number
        self._chunk_starts: list[int] = self._chunk_start.tolist()
        self._cache = CacheFolder(folder, f"{dataset.fingerprint[:16]}-{chunk_bytes}", budget_bytes)

        self._lock = threading.Lock()  # guards the next two: no chunk is released while being read
        self._held: set[int] = set()
        self._maps: dict[int, npt.NDArray[Any]] = {}  # of held chunks, at most MAX_MAPS

        self._used = 0
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._error: BaseException | None = None
        # Used by the staging thread only.
        self._known = 0  # rows taken from the iterator
        self._needed: dict[int, list[tuple[int, int]]] = {}  # chunk -> its periods of use: first row, last row
        self._wanted: dict[int, int] = {}  # missing chunk -> first row that needs it

    # ------------------------------------------------------------ reading

    def copy_tokens(self, out: npt.NDArray[Any], start: int, stop: int) -> None:
        """Copy tokens [start, stop) of the stream to `out`, [stop - start] of any integer type that holds them.

        Raises errors of the source, from this call or from staging.
        """
        if self._error is not None:
            raise self._error
        assert 0 <= start <= stop <= self._shard_starts[-1], f"[{start}, {stop}) is outside the dataset"
        starts, chunk_tokens = self._shard_starts, self._chunk_tokens
        shard = bisect_right(starts, start) - 1
        done = 0
        while start < stop:
            if start >= starts[shard + 1]:
                shard += 1
                continue
            inside = start - starts[shard]
            chunk = inside // chunk_tokens
            at = inside - chunk * chunk_tokens
            n = min(stop - start, chunk_tokens - at, starts[shard + 1] - start)
            with self._lock:
                number = self._chunk_starts[shard] + chunk
                view = self._maps.get(number)
                if view is None and number in self._held:
                    view = self._map(number)
                if view is not None:
                    out[done : done + n] = view[at : at + n]
            if view is not None:
                self.hits += 1
            else:
                self._copy_from_source(out[done : done + n], shard, inside)
            start += n
            done += n

    def _copy_from_source(self, out: npt.NDArray[Any], shard: int, inside: int) -> None:
        begin = time.perf_counter()
        size = self._dtype.itemsize
        out[:] = np.frombuffer(self._source.pread(shard, inside * size, len(out) * size), dtype=self._dtype)
        self.wait_seconds += time.perf_counter() - begin
        self.misses += 1

    def _map(self, chunk: int) -> npt.NDArray[Any] | None:
        """Map a held chunk; None if another program removed or truncated it. The caller has the lock."""
        name, size = self._chunk(chunk)
        try:
            path = self._cache.own / name
            if (actual := path.stat().st_size) != size:
                raise OSError(f"{name} has {actual} bytes instead of {size}")
            view = map_array(path, self._dtype, (size // self._dtype.itemsize,))
        except OSError as error:
            self._held.discard(chunk)
            self._end_staging(error)
            return None
        while len(self._maps) >= MAX_MAPS:
            del self._maps[next(iter(self._maps))]  # FIFO: no bookkeeping per read
        self._maps[chunk] = view
        return view

    def _chunk(self, chunk: int) -> tuple[str, int]:
        """A chunk's file name and size in bytes."""
        shard = bisect_right(self._chunk_starts, chunk) - 1
        number = chunk - self._chunk_starts[shard]
        rest = self._shard_starts[shard + 1] - self._shard_starts[shard] - number * self._chunk_tokens
        return f"{shard:05d}-{number:06d}.bin", min(self._chunk_tokens, rest) * self._dtype.itemsize

    # ------------------------------------------------------------ staging

    def follow(self, ranges: Ranges) -> None:
        """Stage ahead of a consumer, from now on.

        Args:
            ranges: the coming rows in batches: first tokens and ends in the stream, int64 [n] each, in order of use;
                start == stop is a row without data. Read by the staging thread.
        """
        self._halt()
        self._stop, self._used, self._known = threading.Event(), 0, 0
        self._needed = {chunk: [] for chunk in self._held}
        self._wanted.clear()
        self._thread = threading.Thread(target=self._run, args=(ranges,), name="llammlein-cache", daemon=True)
        self._thread.start()

    def used(self, rows: int) -> None:
        """Note that the first `rows` rows since `follow` were copied: chunks only they need may be evicted."""
        self._used = max(self._used, rows)

    @property
    def staged_rows(self) -> int:
        """Rows since `follow` before the first known one that lacks a chunk."""
        known = self._known  # read first: the other thread updates it last
        return min(list(self._wanted.values()), default=known)

    def _run(self, ranges: Ranges) -> None:
        try:
            self._work(ranges)
        except _StagingError as error:
            self._end_staging(error.__cause__)
        except BaseException as error:  # raised again in copy_tokens
            self._error = error

    def _end_staging(self, reason: BaseException | None) -> None:
        self._stop.set()
        if self.failure is None:
            self.failure = f"{self._cache.folder}: {reason}"
            print(
                f"warning: staging to --data.cache_dir {self._cache.folder} ends ({reason}); what is not staged is "
                f"read from {self.dataset.path} from now on, which may be slower",
                file=sys.stderr,
            )

    def _work(self, ranges: Ranges) -> None:
        batches = (
            (starts[i : i + self._pause_rows], stops[i : i + self._pause_rows])
            for starts, stops in ranges
            for i in range(0, len(starts), self._pause_rows)
        )
        next_release = next_stage = 0.0
        ended = False
        while not self._stop.is_set():
            now = time.monotonic()
            # With few rows known ahead, the next ones may need a chunk that the known ones no longer do.
            if now >= next_release and (ended or self._known - self._used >= self._pause_rows or self._is_full()):
                next_release = now + POLL_SECONDS
                if self._release():
                    next_stage = 0.0
            if self._wanted and now >= next_stage:
                if self._stage():
                    continue
                next_stage = time.monotonic() + max(POLL_SECONDS, 20 * (time.monotonic() - now))
            if ended or self._is_full():
                self._stop.wait(POLL_SECONDS)
            elif (batch := next(batches, None)) is not None:
                self._learn(*batch)
            else:
                ended = True

    def _is_full(self) -> bool:
        """Whether enough of the coming rows is known."""
        return self._known - self._used >= AHEAD_ROWS or len(self._needed) >= self._ahead_chunks

    def _learn(self, starts: IntArray, stops: IntArray) -> None:
        """Record which chunks each row of a batch needs."""
        rows = np.flatnonzero(stops > starts)
        first, last = self._chunk_of(starts[rows]), self._chunk_of(stops[rows] - 1)
        widest = int((last - first).max(initial=0)) + 1
        chunks = np.minimum(first[:, None] + np.arange(widest), last[:, None]).reshape(-1)
        rows = np.repeat(rows + self._known, widest)
        unique, first_use = np.unique(chunks, return_index=True)
        last_use = len(rows) - 1 - np.unique(chunks[::-1], return_index=True)[1]
        uses = (x.tolist() for x in (unique, rows[first_use], rows[last_use]))
        for chunk, begin, end in zip(*uses, strict=True):
            if end < self._used:
                continue
            times = self._needed.setdefault(chunk, [])
            if times and begin - times[-1][1] <= self._pause_rows:
                times[-1] = times[-1][0], end
            else:
                times.append((begin, end))
            if len(times) == 1 and chunk not in self._held:
                self._wanted[chunk] = times[0][0]
        self._known += len(starts)

    def _chunk_of(self, positions: IntArray) -> IntArray:
        shards = np.searchsorted(self._shard_start, positions, side="right") - 1
        inside: IntArray = (positions - self._shard_start[shards]) // self._chunk_tokens
        return self._chunk_start[shards] + inside

    def _release(self) -> bool:
        """Release the chunks not needed soon; returns whether there was one."""
        used = self._used
        passed = [chunk for chunk, times in self._needed.items() if not times or times[0][1] < used]
        for chunk in passed:
            times = [t for t in self._needed[chunk] if t[1] >= used]
            if times and chunk in self._held and times[0][0] - used <= self._pause_rows:
                self._needed[chunk] = times
                continue
            with self._lock:
                held = chunk in self._held
                self._held.discard(chunk)
                self._maps.pop(chunk, None)
            if held:
                with _as_staging_error():
                    self._cache.release(self._chunk(chunk)[0])
            if times:
                self._needed[chunk], self._wanted[chunk] = times, times[0][0]
            else:
                del self._needed[chunk]
                self._wanted.pop(chunk, None)
        return bool(passed)

    def _stage(self) -> bool:
        """Hold or copy some of the chunks needed next; False if there was nothing to do."""
        by_need = sorted(self._wanted, key=self._wanted.__getitem__)
        first = [(chunk, *self._chunk(chunk)) for chunk in by_need[:CHUNKS_PER_REQUEST]]
        chunks = {name: chunk for chunk, name, _ in first}
        with _as_staging_error():
            held, claimed = self._cache.hold([(name, size) for _, name, size in first])
        if not held and not claimed:
            return False
        for name in held:
            self._hold(chunks[name])
        try:
            while claimed and self._copy(chunks[claimed[0]]):
                self._hold(chunks[claimed.pop(0)])
        finally:
            for name in claimed:
                with contextlib.suppress(OSError):  # the folder may have failed already; close removes the rest
                    self._cache.drop(name)
        return True

    def _hold(self, chunk: int) -> None:
        with self._lock:
            self._held.add(chunk)
        del self._wanted[chunk]  # last: `staged_rows` counts the chunk from here on

    def _copy(self, chunk: int) -> bool:
        """Copy a claimed chunk and publish it; False if the cache is being closed."""
        name, size = self._chunk(chunk)
        shard = bisect_right(self._chunk_starts, chunk) - 1
        base = (chunk - self._chunk_starts[shard]) * self._chunk_tokens * self._dtype.itemsize
        for at in range(0, size, PIECE_BYTES):
            if self._stop.is_set():
                return False
            data = self._source.pread(shard, base + at, min(PIECE_BYTES, size - at))
            with _as_staging_error():
                self._cache.write(name, at, data)
        with _as_staging_error():
            self._cache.publish(name)
        self.staged_bytes += size
        return True

    def _halt(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """Stop staging and release all chunks. No reads after this."""
        self._halt()
        with self._lock:
            self._held.clear()
            self._maps.clear()
        self._cache.close(self.keep)
        self._files.close()


@contextlib.contextmanager
def _as_staging_error() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _StagingError from error
