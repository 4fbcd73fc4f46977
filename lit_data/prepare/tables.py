"""Tables of a preparation: atomically published Parquet files, queried by DuckDB in bounded memory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lit_files.database import open_database, quoted
from lit_files.publish import publish, sync_file

MIN_MEMORY_BYTES = 1 << 28
READ_ROWS = 1 << 16


class TableWriter:
    """Writes one Parquet file, a row group at a time; `close` publishes it, complete and synced.

    Dictionary encoding is off: the columns are hashes and ascending numbers.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path, self.schema = path, schema
        self.rows = 0
        self._temporary = path.with_name(f".{path.name}.tmp")  # fixed name: a rerun after a kill overwrites it
        self._writer = pq.ParquetWriter(self._temporary, schema, compression="zstd", use_dictionary=False)

    def write(self, columns: Sequence[Any]) -> None:
        """Append a row group, given as arrays in the order of the schema."""
        table = pa.table([pa.array(c, f.type) for c, f in zip(columns, self.schema, strict=True)], schema=self.schema)
        if table.num_rows:
            self._writer.write_table(table, row_group_size=table.num_rows)
            self.rows += table.num_rows

    def flush(self) -> None:
        """Write the rows that a subclass has collected."""

    def close(self) -> None:
        """Publish the file."""
        self.flush()
        self._writer.close()
        sync_file(self._temporary)
        publish(self._temporary, self.path)

    def abandon(self) -> None:
        """Remove the unfinished file; does nothing after `close`."""
        self._writer.close()
        self._temporary.unlink(missing_ok=True)


@contextmanager
def open_scratch_database(scratch: Path, memory_bytes: int) -> Iterator[Any]:
    """Open an empty database in a fresh folder `scratch`, removed at the end.

    Raises ValueError if `memory_bytes` is too small, and as `open_database` does.
    """
    if memory_bytes < MIN_MEMORY_BYTES:
        raise ValueError(f"{memory_bytes} bytes of memory for deduplication: at least {MIN_MEMORY_BYTES} are needed")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        options: dict[str, Any] = {"folder": scratch, "memory_bytes": memory_bytes, "keep_order": False}
        with open_database(scratch / "tables.duckdb", **options) as database:
            yield database
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def from_files(files: Sequence[Path]) -> str:
    """SQL that reads the rows of Parquet files, with the file's index in the list as column `file`."""
    return f"(SELECT file_index AS file, * FROM read_parquet([{', '.join(map(quoted, files))}]))"


def read_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Iterate over the rows of a Parquet file in batches."""
    with pq.ParquetFile(path) as table:
        yield from (batch for batch in table.iter_batches(READ_ROWS) if batch.num_rows)
