"""Exact deduplication of paragraphs across a corpus, in two passes and bounded memory.

The first pass writes each paragraph's hash and position (`HashWriter`), one file per section of the corpus, on any
machine. `find_duplicates` joins all files and lists, for each, the paragraphs that occurred before; the first by file,
document and paragraph is kept. The second pass queries `Dropped` while it reads the corpus again. The result depends
only on the order of the paragraphs, not on how they are split into files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from lit_data.prepare.paragraphs import HASH_BYTES
from lit_data.prepare.tables import TableWriter, from_files, open_scratch_database, read_batches
from lit_files.database import quoted, showing

HASHES = pa.schema(
    [("hash_high", pa.uint64()), ("hash_low", pa.uint64()), ("document", pa.int64()), ("paragraph", pa.int32())]
)
DUPLICATES = pa.schema([("document", pa.int64()), ("paragraph", pa.int32())])
ROWS_PER_GROUP = 1 << 16


class HashWriter(TableWriter):
    """Writes the hashes of one section of the corpus."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, HASHES)
        self._clear()

    def _clear(self) -> None:
        self._hashes: list[bytes] = []
        self._documents: list[int] = []
        self._paragraphs: list[int] = []

    def add(self, document: int, hashes: Sequence[bytes | None]) -> None:
        """Add the hashes of a document's paragraphs (`hash_paragraphs`); documents must come in ascending order."""
        for paragraph, paragraph_hash in enumerate(hashes):
            if paragraph_hash is not None:
                self._hashes.append(paragraph_hash)
                self._documents.append(document)
                self._paragraphs.append(paragraph)
                if len(self._hashes) >= ROWS_PER_GROUP:  # within a document too: they can be long
                    self.flush()

    def flush(self) -> None:
        joined = b"".join(self._hashes)
        assert len(joined) == HASH_BYTES * len(self._hashes)
        words = np.frombuffer(joined, dtype=">u8").astype(np.uint64).reshape(-1, 2)
        self.write([words[:, 0], words[:, 1], self._documents, self._paragraphs])
        self._clear()


@dataclass(frozen=True)
class DuplicateCounts:
    """Counts of hashed paragraphs: all of them, and those that occurred before."""

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

    DuckDB sorts the rows by hash out of core. Its intermediate data, up to about 40 bytes per paragraph, are in
    `temporary`/find-duplicates, which is removed at the end.

    Args:
        hash_files: hash files of the entire corpus, in order.
        outputs: the file to write for each, with columns (document int64, paragraph int32), ascending.
        memory_bytes: DuckDB's limit.
        temporary: an existing folder; one join at a time may use it.
        excluded: a file for each of `hash_files` with a column `document`: documents dropped entirely for another
            reason. Their paragraphs are ignored: otherwise a paragraph first seen in a dropped document would be
            removed from all later ones too.

    Raises:
        ValueError: see `tables.open_scratch_database`.
    """
    assert len(hash_files) == len(outputs) > 0 and (excluded is None or len(excluded) == len(hash_files))
    scratch = temporary / "find-duplicates"
    found = scratch / "found.parquet"
    title = "looking for repeated paragraphs"
    with open_scratch_database(scratch, memory_bytes) as database, showing(database, title):
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
    """Write sorted rows (file, document, paragraph) to one output per file; returns the number of rows."""
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
    """Reads one output file of `find_duplicates` in constant memory."""

    def __init__(self, path: Path) -> None:
        self._batches = read_batches(path)
        self._documents = np.zeros(0, np.int64)
        self._paragraphs = np.zeros(0, np.int32)

    def of(self, document: int) -> list[int]:
        """The paragraphs to drop from a document, ascending; query documents in ascending order."""
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
