"""Opens Parquet files of our own formats; a damaged one raises an error that names it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lit_files.reading import regular


@contextlib.contextmanager
def open_table(path: Path, metadata: pq.FileMetaData | None = None) -> Iterator[pq.ParquetFile]:
    """Open a file for reading in a `with` block.

    Raises FileNotFoundError if there is none, and ValueError naming the file for any error of Arrow or of the block.
    """
    regular(path)
    try:
        with pq.ParquetFile(path, metadata=metadata, page_checksum_verification=True) as file:
            yield file
    except OSError as error:
        if error.errno is not None:  # a disk error, not a fault of the content
            raise
        raise _damaged(path, error) from error
    except (pa.ArrowException, ValueError, LookupError, TypeError, AttributeError, MemoryError) as error:
        if str(path) in str(error):
            raise
        raise _damaged(path, error) from error


def read_footer(path: Path, schema: pa.Schema | None = None) -> pq.FileMetaData:
    """Read a file's metadata; with `schema`, the columns must match. Raises as `open_table` does."""
    with open_table(path) as file:
        if schema is not None and not file.schema_arrow.equals(schema):
            raise ValueError(f"its columns are {', '.join(f'{f.name} {f.type}' for f in file.schema_arrow)}")
        return file.metadata


def group_rows(metadata: pq.FileMetaData) -> list[int]:
    """Rows of each row group. Raises ValueError if they don't sum to the file's."""
    rows: list[int] = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
    if sum(rows) != metadata.num_rows or min(rows, default=0) < 0:
        raise ValueError(f"its row groups have {sum(rows)} rows, the file {metadata.num_rows}")
    return rows


def _damaged(path: Path, error: BaseException) -> ValueError:
    fault: Any = f"{type(error).__name__}: {error}"
    return ValueError(f"{path} is damaged, or not a Parquet file of this kind: {fault.splitlines()[0][:300]}")


class _NoPandas:
    """In sys.meta_path: importing pandas fails as if it were not installed."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name == "pandas":
            raise ModuleNotFoundError("pandas is hidden here", name=name)


def leave_pandas_out() -> None:
    """Keep pyarrow from importing pandas, where it is installed, at its first array. It saves half a second.

    pyarrow looks for it once, to recognise its Series, which a run does not use; `to_pandas` still imports it.
    """
    if "pandas" not in sys.modules:
        sys.meta_path.insert(0, _NoPandas)
        try:
            pa.array([0])
        finally:
            sys.meta_path.remove(_NoPandas)
