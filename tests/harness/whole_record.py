"""For tests of the record: reads all of it as one table, with Arrow alone."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lit_data.record.parts import committed_parts
from lit_data.record.schema import SCHEMA, sort_rows


def read_record(run: Path) -> pa.Table:
    """Read the committed record of a run, sorted by step, row, document and start."""
    tables = [SCHEMA.empty_table()]
    for part in committed_parts(run):
        steps = (pc.field("step") >= part.first_step) & (pc.field("step") < part.end_step)
        tables.append(pq.read_table(part.path, partitioning=None).filter(steps))
    return sort_rows(pa.concat_tables(tables))
