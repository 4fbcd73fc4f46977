"""Parquet files that appear whole (written under another name beside their own, synced, renamed), and DuckDB over them
in limited memory.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lit_files.publish import sync_file

MIN_MEMORY_BYTES = 1 << 28
READ_ROWS = 1 << 16


def temporary_name(path: Path) -> Path:
    """Where a file is written before it is whole. Always the same: a rerun after a kill writes over what was left."""
    return path.with_name(f".{path.name}.tmp")


def publish_file(path: Path) -> None:
    """Make the file written under `temporary_name(path)` durable and give it its name."""
    sync_file(temporary_name(path))
    os.replace(temporary_name(path), path)
    sync_file(path.parent)


class TableWriter:
    """Writes one Parquet file, a row group at a time; the file is there after `close`.

    Dictionaries are off: the columns here are hashes and ascending numbers.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path, self.schema = path, schema
        self.rows = 0
        self._writer = pq.ParquetWriter(temporary_name(path), schema, compression="zstd", use_dictionary=False)

    def write(self, columns: Sequence[Any]) -> None:
        """Append a row group, given as arrays in the order of the schema."""
        table = pa.table([pa.array(c, f.type) for c, f in zip(columns, self.schema, strict=True)], schema=self.schema)
        if table.num_rows:
            self._writer.write_table(table, row_group_size=table.num_rows)
            self.rows += table.num_rows

    def close(self) -> None:
        """Publish the file."""
        self._writer.close()
        publish_file(self.path)

    def abandon(self) -> None:
        """Remove what was written; nothing after `close`."""
        self._writer.close()
        temporary_name(self.path).unlink(missing_ok=True)


@contextmanager
def open_duckdb(scratch: Path, memory_bytes: int) -> Iterator[Any]:
    """A connection to an empty database that spills to the folder `scratch`, which is made, and removed at the end.

    Args:
        scratch: what a killed run left there is removed first.
        memory_bytes: DuckDB's limit; the process needs about 200 MB besides.

    Raises:
        ValueError: too little memory, duckdb is not installed, or DuckDB ran out of memory or disk.
    """
    try:
        import duckdb
    except ImportError as error:
        raise ValueError("deduplication needs the package duckdb: pip install 'llammlein[data]'") from error
    if memory_bytes < MIN_MEMORY_BYTES:
        raise ValueError(f"{memory_bytes} bytes of memory for deduplication: at least {MIN_MEMORY_BYTES} are needed")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    settings: dict[str, Any] = {
        "memory_limit": f"{memory_bytes}B",
        "temp_directory": str(scratch / "spilled"),
        "preserve_insertion_order": False,  # saves memory; what must be in order says ORDER BY
    }
    try:
        with duckdb.connect(scratch / "tables.duckdb", config=settings) as database:
            database.execute("SET enable_progress_bar = false")
            yield database
    except duckdb.Error as error:
        raise ValueError(
            f"deduplication failed with {memory_bytes >> 20} MB of memory and its intermediate data in {scratch}: "
            f"{error}"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def quoted(path: Path) -> str:
    """A path as a literal of SQL."""
    return "'" + str(path).replace("'", "''") + "'"


def from_files(files: Sequence[Path]) -> str:
    """SQL that reads the rows of Parquet files, with the number of the file in the list as column `file`."""
    return f"(SELECT file_index AS file, * FROM read_parquet([{', '.join(map(quoted, files))}]))"


def read_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """The rows of a Parquet file, some at a time."""
    with pq.ParquetFile(path) as table:
        yield from (batch for batch in table.iter_batches(READ_ROWS) if batch.num_rows)
