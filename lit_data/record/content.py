"""Checksums of a record's content, however it is divided into files; and checks that need no data."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lit_data.loading.order import Segment, first_sample_of_step
from lit_data.record.reader import stream_record
from lit_data.record.schema import SCHEMA


@dataclass(frozen=True)
class RecordContent:
    """Steps `first_step` to `end_step - 1` of a record.

    Attributes:
        rows: spans.
        tokens: input tokens.
        applied_steps: steps whose update was not skipped.
        sha256: of all columns of all rows, sorted as the reader does; independent of files, parts and row groups.
    """

    first_step: int
    end_step: int
    rows: int
    tokens: int
    applied_steps: int
    sha256: str


@dataclass
class RecordScan:
    """The content of some steps, the mean loss of each (nats per target, float64), and faults, a sentence each."""

    content: RecordContent
    losses: npt.NDArray[np.float64]
    faults: list[str] = field(default_factory=list)


class _Digest:
    """One SHA-256 per column, so that the division of the rows into tables does not matter."""

    def __init__(self) -> None:
        self._columns = {name: hashlib.sha256() for name in SCHEMA.names}

    def add(self, table: pa.Table) -> None:
        for name, digest in self._columns.items():
            values = table[name].to_numpy()
            digest.update(np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<")).tobytes())

    def hexdigest(self) -> str:
        whole = hashlib.sha256()
        for name, digest in self._columns.items():
            whole.update(f"{name} {SCHEMA.field(name).type} {digest.hexdigest()}\n".encode())
        return whole.hexdigest()


def scan_record(run: Path, first_step: int, end_step: int, segments: Sequence[Segment] | None = None) -> RecordScan:
    """Read the committed rows of some steps of a run folder once, in bounded memory.

    Args:
        segments: of the run's order; each row must then have the sample that they give for its step.

    Raises ValueError naming a damaged file, or a step without rows.
    """
    digest, rows, tokens, applied, expected = _Digest(), 0, 0, 0, first_step
    losses: list[npt.NDArray[np.float64]] = [np.empty(0)]
    faults: list[str] = []
    for table in stream_record(run, first_step, end_step):
        digest.add(table)
        step = table["step"].to_numpy()
        begins = np.flatnonzero(np.append(True, step[1:] != step[:-1]))
        present = step[begins]
        lacking = np.flatnonzero(present != np.arange(expected, expected + len(present)))
        if len(lacking):
            raise ValueError(f"{run}: the record has no rows of step {expected + int(lacking[0])}")
        expected += len(present)
        rows += table.num_rows
        tokens += int(table["length"].to_numpy().astype(np.int64).sum())
        applied += int(table["applied"].to_numpy()[begins].sum())
        sums = np.add.reduceat(table["loss"].to_numpy(), begins)
        targets = np.add.reduceat(table["targets"].to_numpy().astype(np.int64), begins)
        losses.append(sums / np.maximum(targets, 1))
        if segments is not None:
            first = np.asarray([first_sample_of_step(segments, int(s))[0] for s in present])
            wrong = table["sample"].to_numpy() - table["row"].to_numpy() != np.repeat(
                first, np.diff(begins, append=len(step))
            )
            if wrong.any():
                at = int(step[np.flatnonzero(wrong)[0]])
                faults.append(f"the samples of step {at} are not those of the order")
    if expected != end_step:
        raise ValueError(f"{run}: the record has no rows of step {expected}")
    content = RecordContent(first_step, end_step, rows, tokens, applied, digest.hexdigest())
    return RecordScan(content, np.concatenate(losses), faults)
