"""Columns of Parquet files and Arrow tables: found by name or nested name, in bounded memory, with damaged values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

ROWS_PER_BATCH = 64


def first_group(metadata: Any, row: int) -> tuple[int, int]:
    """The row group of a 0-based row of a Parquet file, and the number of rows before the group; after the last row,
    none.
    """
    before = 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if before + rows > row:
            return group, before
        before += rows
    return metadata.num_row_groups, before


def rows_at_once(path: Path, group: Any, columns: Sequence[str], limit_bytes: int) -> int:
    """Number of rows of a row group to read at once, so that they take at most a few document limits.

    Plain text takes the size given in the file. A dictionary entry may repeat in any number of rows, so its maximum
    size decides.
    """
    rows, size = ROWS_PER_BATCH, 0
    for number in range(group.num_columns):
        column = group.column(number)
        if not any(column.path_in_schema == c or column.path_in_schema.startswith(f"{c}.") for c in columns):
            continue
        size += column.total_uncompressed_size
        if column.has_dictionary_page and column.total_uncompressed_size * ROWS_PER_BATCH > limit_bytes:
            entry = _page_bytes(path, column.dictionary_page_offset) or column.total_uncompressed_size
            rows = min(rows, max(1, limit_bytes // max(1, entry)))
    return min(rows, 2) if size > 4 * limit_bytes else rows


def _page_bytes(path: Path, offset: int | None) -> int | None:
    """The decompressed size of a Parquet page, or None if its header is not as expected.

    A header starts with the page type and that size, as fields 1 and 2 of Thrift's compact protocol: a byte for "next
    field, int32", and a zigzag varint.
    """
    if offset is None:
        return None
    with open(path, "rb") as f:
        f.seek(offset)
        head = f.read(16)
    if len(head) < 4 or head[0] != 0x15 or head[2] != 0x15:
        return None
    value = 0
    for i, byte in enumerate(head[3:]):
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return value >> 1
    return None


def no_column(path: Path, column: str, flag: str, schema: Any) -> ValueError:
    """The error for a column that a file lacks; `flag` named it."""
    have = ", ".join(map(_shown, schema))
    return ValueError(f"{path} has no column {column!r} (--{flag}); its columns are {have}")


def has_column(schema: Any, name: str) -> bool:
    """Whether an Arrow schema or struct has a column, or a nested field (`translation.de`)."""
    if schema.get_all_field_indices(name):
        return True
    head, _, rest = name.partition(".")
    indices = schema.get_all_field_indices(head) if rest else []
    return (
        bool(indices)
        and pa.types.is_struct(schema.field(indices[0]).type)
        and has_column(schema.field(indices[0]).type, rest)
    )


def column_of(batch: Any, name: str) -> Any:
    """A column by name (the first of several), or a nested field."""
    if indices := batch.schema.get_all_field_indices(name):
        return batch.column(indices[0])
    head, _, rest = name.partition(".")
    column = column_of(batch, head)
    while rest:
        if column.type.get_all_field_indices(rest):
            head, rest = rest, ""
        else:
            head, _, rest = rest.partition(".")
        column = pc.struct_field(column, [column.type.get_all_field_indices(head)[0]])
    return column


def _shown(field: Any) -> str:
    """A column, with its nested fields, for messages."""
    if not pa.types.is_struct(field.type):
        return str(field.name)
    return f"{field.name} (with {', '.join(f'{field.name}.{inner.name}' for inner in field.type)})"


def values_of(column: Any) -> list[Any]:
    """The values of an Arrow array; invalid UTF-8 as bytes, None for values Python can't represent."""
    try:
        values: list[Any] = column.to_pylist()
        return values
    except (ValueError, OverflowError, pa.ArrowException):  # caused by any single value; includes UnicodeDecodeError
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        scalar = scalar.value if isinstance(scalar, pa.DictionaryScalar) else scalar
        return scalar.as_buffer().to_pybytes() if isinstance(scalar, pa.BinaryScalar) else None
    except (ValueError, OverflowError, pa.ArrowException):  # a date beyond Python's years
        try:
            return scalar.cast(pa.string()).as_py()
        except (ValueError, OverflowError, pa.ArrowException):
            return None
