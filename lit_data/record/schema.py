"""The datapoint record's table (one row per span), and the options of its Parquet files."""

from __future__ import annotations

from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA = pa.schema(
    [
        ("step", pa.int64()),  # 0-based optimizer step that used the data
        ("rank", pa.int32()),
        ("micro_batch", pa.int32()),
        ("row", pa.int64()),  # of the step
        ("sample", pa.int64()),  # sample number in the run
        ("dataset", pa.int32()),
        ("document", pa.int64()),
        ("start", pa.int64()),  # first token, relative to the document
        ("length", pa.int32()),  # number of input tokens
        ("targets", pa.int32()),  # number of tokens with a loss
        ("hash", pa.uint64()),  # hash of the tokens fed to the model
        ("loss", pa.float64()),  # summed over the targets, nats
        ("applied", pa.bool_()),  # False: the step's gradient was not finite and the update was skipped
    ]
)
SORT_KEYS = ("step", "row", "document", "start")
ROWS_PER_GROUP = 1 << 16  # read entirely to find one step: about 2 MB, 10 ms


def open_writer(file: BinaryIO) -> pq.ParquetWriter:
    """Open a Parquet writer for record rows: delta-encodes ascending columns; statistics only for searched ones."""
    return pq.ParquetWriter(
        file,
        SCHEMA,
        compression="zstd",
        compression_level=1,
        use_dictionary=["rank", "micro_batch", "dataset", "length", "targets"],
        column_encoding={k: "DELTA_BINARY_PACKED" for k in ("step", "row", "sample", "document", "start")},
        write_statistics=["step", "row", "sample", "dataset", "document"],
        write_page_index=True,
    )


def sort_rows(table: pa.Table) -> pa.Table:
    """Sort rows by step, row, document and start."""
    return table.sort_by([(k, "ascending") for k in SORT_KEYS])
