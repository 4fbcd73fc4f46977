"""Looks up the documents of a dataset (id, source, ...) in bounded memory, even among 10^8."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lit_data.packed.index import HEADER
from lit_data.packed.manifest import check_documents_table
from lit_data.packed.reader import PackedDataset
from lit_files.descriptors import OpenFiles
from lit_files.parquet import group_rows, open_table, read_footer
from lit_files.platform import usable_cores

GROUPS_AT_A_TIME = 64  # row groups that one thread searches
BATCH = 1 << 16  # documents in memory at a time, per thread


class Documents:
    """The documents of a packed dataset by number and by id.

    Few and scattered documents are read with `pread`: a memory map would read ahead around each of them.
    """

    def __init__(self, dataset: PackedDataset) -> None:
        self.dataset = dataset
        self.files = [dataset.path / f"{s.name}.docs.parquet" for s in dataset.manifest.shards]
        self._first = np.cumsum([0] + [s.documents for s in dataset.manifest.shards], dtype=np.int64).tolist()
        self._first_token = np.cumsum([0] + [s.tokens for s in dataset.manifest.shards], dtype=np.int64).tolist()
        self._begins: dict[int, list[int]] = {}
        self._opened = OpenFiles()

    def start(self, number: int) -> int:
        """Position of a document's first token in the stream; `n_documents` gives `n_tokens`. Read from the .idx."""
        if number == self.dataset.n_documents:
            return self.dataset.n_tokens
        shard = bisect.bisect_right(self._first, number) - 1
        facts = self.dataset.manifest.shards[shard]
        offset = HEADER.size + 4 * facts.documents + 8 * (number - self._first[shard])
        path = self.dataset.path / f"{facts.name}.idx"
        pointer = int.from_bytes(self._opened.read(path, 8, offset), "little", signed=True)
        if not 0 <= pointer < facts.tokens * np.dtype(self.dataset.manifest.dtype).itemsize:
            raise ValueError(
                f"{path} is damaged: document {number} would begin at byte {pointer} of the .bin; prepare the dataset "
                "again"
            )
        return int(self._first_token[shard]) + pointer // np.dtype(self.dataset.manifest.dtype).itemsize

    def tokens(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Tokens [start, stop) of the stream, read from the .bin files."""
        dtype = np.dtype(self.dataset.manifest.dtype)
        read = []
        for first, end, facts in zip(
            self._first_token, self._first_token[1:], self.dataset.manifest.shards, strict=False
        ):
            low, high = max(start, first), min(stop, end)
            if low < high:
                path = self.dataset.path / f"{facts.name}.bin"
                offset, size = (low - first) * dtype.itemsize, (high - low) * dtype.itemsize
                read.append(np.frombuffer(self._opened.read(path, size, offset), dtype=dtype))
        return np.concatenate(read) if read else np.zeros(0, dtype=dtype)

    def facts(self, numbers: Iterable[int], columns: list[str] | None = None) -> dict[int, dict[str, Any]]:
        """Rows of docs.parquet for document numbers (all columns, or some). Reads each row group once.

        Raises ValueError for a number outside the dataset.
        """
        wanted: dict[tuple[int, int], list[int]] = {}
        for number in sorted(set(numbers)):
            if not 0 <= number < self.dataset.n_documents:
                raise ValueError(f"document {number} is not in {self.dataset.path}, which has {self._first[-1]}")
            shard = bisect.bisect_right(self._first, number) - 1
            begins = self._groups(shard)
            wanted.setdefault((shard, bisect.bisect_right(begins, number) - 1), []).append(number)
        found: dict[int, dict[str, Any]] = {}
        for shard, here in groupby(wanted.items(), key=lambda item: item[0][0]):  # in ascending order
            with open_table(self.files[shard]) as file:
                for (_, group), some in here:
                    rows = file.read_row_group(group, columns=columns, use_threads=False)
                    offsets = [number - self._begins[shard][group] for number in some]
                    found.update(zip(some, rows.take(offsets).to_pylist(), strict=True))
        return found

    def find(self, id: str) -> list[int]:
        """Numbers of all documents with an id (ids may repeat). Reads only row groups whose bounds contain it."""
        found: list[int] = []
        with ThreadPoolExecutor(min(8, usable_cores())) as pool:
            for begin, path in zip(self._first, self.files, strict=False):
                found.extend(n for numbers in pool.map(*_split(path, begin, id)) for n in numbers)
        return found

    def batches(self) -> Iterator[pa.Table]:
        """Iterate over all documents, BATCH at a time: number, id, source, place, bytes, tokens and metadata."""
        number = 0
        for path, shard in zip(self.files, self.dataset.manifest.shards, strict=True):
            with open_table(path) as file:
                check_documents_table(file, shard)
                for batch in file.iter_batches(BATCH, use_threads=False):
                    numbers = np.arange(number, number + batch.num_rows + 1, dtype=np.int64)
                    tokens = np.diff(self.dataset.document_start(numbers))
                    table = pa.Table.from_batches([batch]).append_column("tokens", pa.array(tokens))
                    yield table.add_column(0, "document", pa.array(numbers[:-1]))
                    number += batch.num_rows

    def _groups(self, shard: int) -> list[int]:
        """Number of each row group's first document."""
        if shard not in self._begins:
            with open_table(self.files[shard]) as file:
                check_documents_table(file, self.dataset.manifest.shards[shard])
                rows = group_rows(file.metadata)
            self._begins[shard] = (self._first[shard] + np.cumsum([0, *rows])[:-1]).tolist()
        return self._begins[shard]


def _split(path: Path, begin: int, id: str) -> tuple[Callable[[list[tuple[int, int]]], list[int]], Any]:
    """A function that searches row groups of a file for an id, and the batches of row groups to call it with.

    Each group is paired with the number of its first document; `begin` is that of the file's first group.
    """
    facts = read_footer(path)
    column = facts.schema.to_arrow_schema().get_field_index("id")
    groups: list[tuple[int, int]] = []
    for group in range(facts.num_row_groups):
        bounds = facts.row_group(group).column(column).statistics
        if bounds is None or not bounds.has_min_max or bounds.min <= id <= bounds.max:
            groups.append((group, begin))
        begin += facts.row_group(group).num_rows

    def find(some: list[tuple[int, int]]) -> list[int]:
        found: list[int] = []
        with open_table(path, facts) as file:
            for group, first in some:
                ids = file.read_row_group(group, columns=["id"], use_threads=False)["id"]
                matches = pc.equal(ids, id).to_numpy(zero_copy_only=False)
                found.extend((first + np.flatnonzero(matches)).tolist())
        return found

    return find, [groups[i : i + GROUPS_AT_A_TIME] for i in range(0, len(groups), GROUPS_AT_A_TIME)]
