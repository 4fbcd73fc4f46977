"""Reads a packed dataset as one memory-mapped stream of tokens across all shards."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lit_data.packed.index import DTYPE_CODES, HEADER, MAGIC, IntArray
from lit_data.packed.manifest import MANIFEST, WORDS_WORK, Shard, read_manifest
from lit_files.mapping import MAX_MAPS, live_maps, map_array
from lit_files.platform import read_at
from lit_files.reading import open_regular

COARSE_BITS = 10  # index search: bits of the position found by one np.searchsorted
FEW_VALUES = 32  # index search: up to this many values are faster one by one
CHECK_DOCUMENTS = 1 << 20  # index entries compared at a time, 20 MB
CHECK_THREADS = 8  # threads for stat calls: slow on network file systems


def _by_shard(starts: IntArray, values: IntArray) -> Iterator[tuple[int, IntArray | slice]]:
    """Group values by shard: (shard, indices of its values). Shard s covers [starts[s], starts[s + 1])."""
    if not len(values):
        return
    shards = np.searchsorted(starts, values, side="right") - 1
    low, high = int(shards.min()), int(shards.max())
    if low == high:
        yield low, slice(None)
        return
    order = np.argsort(shards, kind="stable")
    ordered = shards[order]
    begins = np.append(0, np.flatnonzero(ordered[1:] != ordered[:-1]) + 1)
    of = ordered[begins].tolist()
    for shard, a, b in zip(of, begins.tolist(), [*begins[1:].tolist(), len(order)], strict=True):
        yield shard, order[a:b]


def _last_at_or_below(ascending: IntArray, values: IntArray) -> IntArray:
    """Index of the last element <= each value; the first element is <= all of them.

    For unaligned memory-mapped arrays, as in an .idx: np.searchsorted would copy the entire array each time. Here it
    only searches a sample of elements, no more than there are values; bisection does the rest.
    """
    if len(values) <= FEW_VALUES:
        view = memoryview(ascending.view(np.uint8).data).cast("q")  # Python integers: three times as fast
        return np.asarray([bisect_right(view, value) - 1 for value in values.tolist()], dtype=np.int64)
    coarse = min(COARSE_BITS, len(values).bit_length())
    step = 1 << max(0, (len(ascending) - 1).bit_length() - coarse)
    found = (np.searchsorted(ascending[::step], values, side="right") - 1) * step
    while step := step // 2:
        ahead = found + step
        inside = np.minimum(ahead, len(ascending) - 1)
        found = np.where((ahead < len(ascending)) & (ascending[inside] <= values), ahead, found)
    return found


class PackedDataset:
    """A packed dataset, memory-mapped for reading. Cheap to open and to pickle.

    The documents of all shards form one stream of tokens.

    Args:
        check: compare the files' sizes, counts and last pointers with the manifest. One process of a run does this for
            all; the others, and unpickled datasets, skip it. A shard's pointers are checked at its first document
            lookup.

    Raises ValueError if a file is missing, truncated or does not match the manifest.
    """

    def __init__(self, folder: str | Path, *, check: bool = True) -> None:
        self.path = Path(folder)
        self.manifest = read_manifest(self.path)
        self._open()
        if check:
            self._check_shards()

    def _open(self) -> None:
        self.dtype = np.dtype(self.manifest.dtype)
        self.n_tokens, self.n_documents = self.manifest.tokens, self.manifest.documents
        self.vocab_size, self.eos_id = self.manifest.vocab_size, self.manifest.eos_id
        self.token_start: IntArray = np.cumsum([0] + [s.tokens for s in self.manifest.shards], dtype=np.int64)
        """Position in the stream of each shard's first token, and the number of tokens; (shards + 1,)."""
        self._document_start = np.cumsum([0] + [s.documents for s in self.manifest.shards], dtype=np.int64)
        self._token_starts: list[int] = self.token_start.tolist()  # bisect is faster than numpy for one number
        self._maps: OrderedDict[tuple[int, str], npt.NDArray[Any]] = OrderedDict()
        self._sound: set[int] = set()  # shards with checked pointers

    def _check_shards(self) -> None:
        shards = self.manifest.shards
        with ThreadPoolExecutor(CHECK_THREADS if len(shards) > CHECK_THREADS else 1) as pool:
            for _ in pool.map(self._check_shard, shards):
                pass

    def _check_shard(self, shard: Shard) -> None:
        prefix = os.path.join(self.path, shard.name)
        for kind, size in shard.sizes.items():
            file = f"{prefix}.{kind}"
            try:
                actual: int | None = os.stat(file).st_size
            except FileNotFoundError:
                actual = None
            if actual not in (None, size) and kind == "docs.parquet":
                size = self._size_with_words(shard) or size
            if actual != size:
                state = "is missing" if actual is None else f"has {actual} bytes instead of {size}"
                raise ValueError(f"{file} {state}: the shard is truncated or was replaced; prepare the dataset again")
        n = shard.documents
        if shard.sizes["idx"] < HEADER.size + 12 * n:
            raise ValueError(
                f"{prefix}.idx is too short for the {n} documents of the manifest: prepare the dataset again"
            )
        with open_regular(f"{prefix}.idx") as f:
            head = f.read(HEADER.size)
            last_length = read_at(f.fileno(), 4, HEADER.size + 4 * (n - 1)) if n else b""
            last_pointer = read_at(f.fileno(), 8, HEADER.size + 12 * n - 8) if n else b""
        magic, version, code, sequences, _ = HEADER.unpack(head)
        if magic != MAGIC or version != 1 or np.dtype(DTYPE_CODES.get(code, np.float32)) != self.dtype:
            raise ValueError(
                f"{prefix}.idx is not an MMIDIDX version 1 index of {self.dtype} tokens; prepare the dataset again"
            )
        if sequences != n:
            raise ValueError(
                f"{prefix}.idx holds {sequences} documents, but the manifest says {n}: prepare the dataset again"
            )
        end = int.from_bytes(last_pointer, "little", signed=True)
        end += int.from_bytes(last_length, "little", signed=True) * self.dtype.itemsize
        if end != shard.tokens * self.dtype.itemsize:
            raise ValueError(
                f"{prefix}.idx ends at byte {end} of the .bin, the manifest says {shard.tokens} tokens: it was damaged "
                "or replaced; prepare the dataset again"
            )

    def _size_with_words(self, shard: Shard) -> int | None:
        """Size of a shard's docs.parquet once scripts/count_words.py, killed while replacing them, has replaced it."""
        work = self.path / WORDS_WORK
        counted = read_manifest(work).shards if (work / MANIFEST).is_file() else []
        return next((s.sizes["docs.parquet"] for s in counted if s.name == shard.name), None)

    def _map(self, shard: int, kind: str) -> npt.NDArray[Any]:
        """A shard's tokens (`bin`) or the byte offsets of its documents (`idx`), mapped on first use."""
        key = (shard, kind)
        found = self._maps.get(key)
        if found is not None:
            return found
        facts = self.manifest.shards[shard]
        path = self.path / f"{facts.name}.{kind}"
        if kind == "bin":
            found = map_array(path, self.dtype, (facts.tokens,), random=True)
        else:
            found = map_array(path, np.int64, (facts.documents,), HEADER.size + 4 * facts.documents, random=True)
            if shard not in self._sound:
                self._check_pointers(facts)
                self._sound.add(shard)
        self._maps[key] = found
        while live_maps() > MAX_MAPS and len(self._maps) > 1:
            self._maps.popitem(last=False)
        return found

    def _check_pointers(self, shard: Shard) -> None:
        """Check that a shard's documents are contiguous according to their lengths. Raises ValueError if not."""
        path, n = self.path / f"{shard.name}.idx", shard.documents
        lengths = map_array(path, np.int32, (n,), HEADER.size)  # separate maps, as these are read sequentially
        pointers = map_array(path, np.int64, (n,), HEADER.size + 4 * n)
        end = 0
        for first in range(0, n, CHECK_DOCUMENTS):
            size = lengths[first : first + CHECK_DOCUMENTS].astype(np.int64)
            ends = end + np.cumsum(size) * self.dtype.itemsize
            wrong = (pointers[first : first + CHECK_DOCUMENTS] != ends - size * self.dtype.itemsize) | (size < 1)
            if wrong.any():
                number = first + int(wrong.argmax())
                raise ValueError(
                    f"{path} is damaged: the offset or the length of document {number} of the shard is wrong; prepare "
                    "the dataset again (scripts/inspect_dataset.py --verify compares all files with their checksums)"
                )
            end = int(ends[-1])
        if end != shard.tokens * self.dtype.itemsize:
            raise ValueError(
                f"{path} is damaged: it covers {end} bytes of the .bin, not {shard.tokens} tokens; prepare the "
                "dataset again"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path, self.manifest = state["path"], state["manifest"]
        self._open()

    @property
    def n_words(self) -> int:
        """Words of the text. If not counted, raises ValueError naming the command that counts them."""
        if self.manifest.words is None:
            raise ValueError(
                f"the words of {self.path} are not counted: it was made by an earlier version or from tokens; count "
                f"them with: python scripts/count_words.py {self.path}"
            )
        return self.manifest.words

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def tokenizer_folder(self) -> Path | None:
        """Folder of the stored tokenizer, if there is one."""
        folder = self.manifest.tokenizer.get("folder")
        path = (self.path / folder).resolve() if folder else None
        return path if path is not None and path.exists() else None

    def tokens(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Tokens [start, stop) of the stream, across shards, in the dataset's dtype; 0 <= start <= stop <= n_tokens."""
        assert 0 <= start <= stop <= self.n_tokens, f"[{start}, {stop}) is outside the {self.n_tokens} tokens"
        parts = [self._map(shard, "bin")[a:b] for shard, a, b in self.shard_ranges(start, stop)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.empty(0, dtype=self.dtype)

    def copy_tokens(self, out: npt.NDArray[Any], start: int, stop: int) -> None:
        """Copy tokens [start, stop) of the stream to `out`, [stop - start] of any integer type that holds them."""
        done = 0
        for shard, a, b in self.shard_ranges(start, stop):
            out[done : done + b - a] = self._map(shard, "bin")[a:b]
            done += b - a

    def shard_ranges(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Split tokens [start, stop) of the stream by shard: (shard, first, end), relative to the shard."""
        ranges = []
        shard = bisect_right(self._token_starts, start) - 1
        while start < stop:
            base, end = self._token_starts[shard], min(stop, self._token_starts[shard + 1])
            if end > start:
                ranges.append((shard, start - base, end - base))
                start = end
            shard += 1
        return ranges

    def document_of(self, positions: IntArray) -> IntArray:
        """Numbers of the documents at stream positions [n], int64 [n]."""
        out = np.empty(len(positions), dtype=np.int64)
        for shard, here in _by_shard(self.token_start, positions):
            pointer = (positions[here] - self._token_starts[shard]) * self.dtype.itemsize
            out[here] = self._document_start[shard] + _last_at_or_below(self._map(shard, "idx"), pointer)
        return out

    def document_start(self, documents: IntArray) -> IntArray:
        """Stream positions of the first tokens of documents [n], int64 [n]; `n_documents` gives `n_tokens`."""
        out = np.full(len(documents), self.n_tokens, dtype=np.int64)
        for shard, here in _by_shard(self._document_start, documents):
            if shard < len(self.manifest.shards):
                pointers = self._map(shard, "idx")[documents[here] - self._document_start[shard]]
                out[here] = self._token_starts[shard] + pointers // self.dtype.itemsize
        return out
