"""Exact deduplication of paragraphs over a whole corpus, in two passes and limited memory.

The first pass writes each paragraph's hash and place (`HashWriter`), one file a stretch of the corpus, wherever that is
done. `find_duplicates` joins all files and says of each which paragraphs have occurred before; the first by file,
document and paragraph stays. The second pass asks `Dropped` while it reads the corpus again. The outcome depends on the
order of the paragraphs only, not on how they are cut into files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from lit_data.prepare.paragraphs import HASH_BYTES
from lit_data.prepare.tables import TableWriter, from_files, open_scratch_database, read_batches
from lit_files.database import quoted

HASHES = pa.schema(
    [("hash_high", pa.uint64()), ("hash_low", pa.uint64()), ("document", pa.int64()), ("paragraph", pa.int32())]
)
DUPLICATES = pa.schema([("document", pa.int64()), ("paragraph", pa.int32())])
ROWS_PER_GROUP = 1 << 16


class HashWriter:
    """Writes the hashes of one stretch of the corpus; the file is there, whole and synced, after `close`."""

    def __init__(self, path: Path) -> None:
        self._table = TableWriter(path, HASHES)
        self._clear()

    def _clear(self) -> None:
        self._hashes: list[bytes] = []
        self._documents: list[int] = []
        self._paragraphs: list[int] = []

    def add(self, document: int, hashes: Sequence[bytes | None]) -> None:
        """The hashes of a document's paragraphs, from `hash_paragraphs`; documents come in ascending order."""
        for paragraph, paragraph_hash in enumerate(hashes):
            if paragraph_hash is not None:
                self._hashes.append(paragraph_hash)
                self._documents.append(document)
                self._paragraphs.append(paragraph)
                if len(self._hashes) >= ROWS_PER_GROUP:  # within a document, too: one may have any number
                    self._flush()

    def _flush(self) -> None:
        joined = b"".join(self._hashes)
        assert len(joined) == HASH_BYTES * len(self._hashes)
        words = np.frombuffer(joined, dtype=">u8").astype(np.uint64).reshape(-1, 2)
        self._table.write([words[:, 0], words[:, 1], self._documents, self._paragraphs])
        self._clear()

    def close(self) -> None:
        """Publish the file."""
        self._flush()
        self._table.close()

    def abandon(self) -> None:
        """Remove what was written; nothing after `close`."""
        self._table.abandon()


@dataclass(frozen=True)
class DuplicateCounts:
    """Of the paragraphs that have a hash: all of them, and those that occurred before."""

    paragraphs: int
    duplicates: int


def find_duplicates(
    hash_files: Sequence[Path],
    outputs: Sequence[Path],
    *,
    memory_bytes: int,
    temporary: Path,
    excluded: Sequence[Path] | None = None,
) -> DuplicateCounts:
    """Find all paragraphs that occurred before: in an earlier file, document or place.

    DuckDB sorts the rows by hash out of core. Its intermediate data, up to about 40 bytes a paragraph, lie in
    `temporary`/find-duplicates, which is removed at the end.

    Args:
        hash_files: of the whole corpus, in its order.
        outputs: a file for each, to be written, with columns (document int64, paragraph int32), ascending.
        memory_bytes: DuckDB's limit.
        temporary: an existing folder; one join at a time may use it.
        excluded: a file for each of `hash_files` with a column `document`: documents that are dropped as a whole
            for another reason. Their paragraphs count for nothing: else one that stands first in such a document
            would be lost from all later ones as well.

    Raises:
        ValueError: see `tables.open_scratch_database`.
    """
    assert len(hash_files) == len(outputs) > 0 and (excluded is None or len(excluded) == len(hash_files))
    scratch = temporary / "find-duplicates"
    found = scratch / "found.parquet"
    with open_scratch_database(scratch, memory_bytes) as database:
        source = f"FROM {from_files(hash_files)}"
        if excluded is not None:
            database.execute(f"CREATE TABLE excluded AS SELECT file, document FROM {from_files(excluded)}")
            source += " ANTI JOIN excluded USING (file, document)"
        (paragraphs,) = database.execute(f"SELECT count(*) {source}").fetchone()
        database.execute(
            f"""COPY (
                SELECT file, document, paragraph FROM (
                    SELECT file, document, paragraph, row_number() OVER (
                        PARTITION BY hash_high, hash_low ORDER BY file, document, paragraph) AS occurrence
                    {source}
                ) WHERE occurrence > 1 ORDER BY file, document, paragraph
            ) TO {quoted(found)} (FORMAT parquet)"""
        )
        duplicates = _cut_by_file(found, outputs)
    return DuplicateCounts(paragraphs, duplicates)


def _cut_by_file(table: Path, outputs: Sequence[Path]) -> int:
    """Write rows (file, document, paragraph), sorted, to a file each; returns how many there are."""
    rows = 0
    number, writer = 0, TableWriter(outputs[0], DUPLICATES)
    try:
        for batch in read_batches(table):
            files = batch["file"].to_numpy()
            bounds = np.flatnonzero(np.diff(files)) + 1
            for start, stop in zip([0, *bounds.tolist()], [*bounds.tolist(), len(files)], strict=True):
                while number < files[start]:
                    writer.close()
                    number += 1
                    writer = TableWriter(outputs[number], DUPLICATES)
                writer.write([batch[c].slice(start, stop - start) for c in DUPLICATES.names])
            rows += len(files)
        writer.close()
        for output in outputs[number + 1 :]:
            writer = TableWriter(output, DUPLICATES)
            writer.close()
    finally:
        writer.abandon()
    return rows


class Dropped:
    """Reads what `find_duplicates` wrote for one file, in constant memory."""

    def __init__(self, path: Path) -> None:
        self._batches = read_batches(path)
        self._documents = np.zeros(0, np.int64)
        self._paragraphs = np.zeros(0, np.int32)

    def of(self, document: int) -> list[int]:
        """The paragraphs to drop from a document, ascending; documents are asked for in ascending order."""
        found: list[int] = []
        while True:
            start, stop = np.searchsorted(self._documents, [document, document + 1]).tolist()
            found += self._paragraphs[start:stop].tolist()
            if stop < len(self._documents):
                return found
            batch = next(self._batches, None)
            if batch is None:
                self._documents = self._documents[:0]
                return found
            self._documents, self._paragraphs = batch["document"].to_numpy(), batch["paragraph"].to_numpy()
