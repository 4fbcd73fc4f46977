"""The record of what was seen: one row a span, in Parquet parts that a checkpoint commits.

A part `part-A-B-rankR.parquet` holds the record steps A to B - 1 of one rank. It counts once the checkpoint after
step B exists; until then readers ignore it, and a resume removes it.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from lit_data.loader import PADDING, StepData
from lit_data.order import row_of

SCHEMA = pa.schema(
    [
        ("step", pa.int64()),  # 0-based: the optimizer step in which the data was used
        ("rank", pa.int32()),
        ("micro_batch", pa.int32()),
        ("row", pa.int64()),  # of the step
        ("sample", pa.int64()),  # number of the row in the run
        ("dataset", pa.int32()),
        ("document", pa.int64()),
        ("start", pa.int64()),  # first token, counted in the document
        ("length", pa.int32()),  # tokens that were inputs
        ("targets", pa.int32()),  # tokens that had a loss
        ("hash", pa.uint64()),  # of the tokens as they went into the model
        ("loss", pa.float64()),  # summed over the targets, nats
        ("applied", pa.bool_()),  # False: the step's gradient was not finite and the update was skipped
    ]
)
PART_NAME = re.compile(r"part-(\d{8,})-(\d{8,})-rank(\d{5})\.parquet")
CHECKPOINT_NAME = re.compile(r"iter-(\d{8,})-ckpt\.pth")
ROWS_PER_GROUP = 1 << 16


@dataclass(frozen=True)
class Part:
    """One file of the record: steps `first_step` to `end_step - 1` of one rank."""

    path: Path
    first_step: int
    end_step: int
    rank: int


def list_parts(folder: Path) -> list[Part]:
    """All published parts of a record folder, by step and rank."""
    parts = []
    for path in folder.glob("part-*.parquet"):
        if match := PART_NAME.fullmatch(path.name):
            parts.append(Part(path, int(match[1]), int(match[2]), int(match[3])))
    return sorted(parts, key=lambda p: (p.first_step, p.rank))


def newest_checkpoint_step(run: Path) -> int:
    """Steps done in the newest checkpoint of a run folder; 0 where there is none."""
    return max((int(m[1]) for path in run.iterdir() if (m := CHECKPOINT_NAME.fullmatch(path.name))), default=0)


def committed_parts(run: Path) -> list[Part]:
    """The parts that a checkpoint has committed."""
    newest = newest_checkpoint_step(run)
    return [p for p in list_parts(run / "datapoints") if p.end_step <= newest]


def read_record(run: Path, columns: list[str] | None = None) -> pa.Table:
    """The committed record of a run as one table, sorted by step, row and start."""
    tables = [pq.read_table(p.path, columns=columns, schema=SCHEMA) for p in committed_parts(run)]
    table = pa.concat_tables(tables) if tables else SCHEMA.empty_table()
    keys = [k for k in ("step", "row", "document", "start") if columns is None or k in columns]
    return table.sort_by([(k, "ascending") for k in keys]) if keys else table


@dataclass
class _Entry:
    data: StepData
    losses: Callable[[], tuple[list[npt.NDArray[np.float64]], bool]]


class DatapointRecorder:
    """Writes one rank's record in a thread of its own.

    Args:
        folder: RUN/datapoints; made if it is missing.
        rank, world_size, micro_batch_samples: where this rank's rows lie in a step.
        first_step: the step the run begins or goes on with.
    """

    def __init__(self, folder: Path, rank: int, world_size: int, micro_batch_samples: int, first_step: int) -> None:
        self.folder, self.rank = folder, rank
        self.world_size, self.micro_batch_samples = world_size, micro_batch_samples
        self._first_step = self._end_step = first_step
        folder.mkdir(parents=True, exist_ok=True)
        # Bounded: if the disk stalls, training waits here instead of filling the memory.
        self._queue: queue.Queue[_Entry | threading.Event | None] = queue.Queue(maxsize=1024)
        self._writer: pq.ParquetWriter | None = None
        self._file: Any = None
        self._pending: list[pa.Table] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="llammlein-datapoints", daemon=True)
        self._thread.start()

    def add(self, data: StepData, losses: Callable[[], tuple[list[npt.NDArray[np.float64]], bool]]) -> None:
        """Queue one step. `losses()` is called in the writer's thread and may wait for the device.

        It returns, per micro-batch, the summed loss of each piece (float64, in the order of its spans), and whether
        the step was applied.
        """
        self._raise_if_failed()
        assert data.step == self._end_step, f"step {data.step} recorded after step {self._end_step - 1}"
        self._end_step += 1
        self._queue.put(_Entry(data, losses))

    def publish(self) -> None:
        """Write, sync and name the part of all steps since the last one. The checkpoint that follows commits it."""
        done = threading.Event()
        self._queue.put(done)
        done.wait()
        self._raise_if_failed()
        if self._writer is None:
            return
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._writer = self._file = None
        name = f"part-{self._first_step:08d}-{self._end_step:08d}-rank{self.rank:05d}.parquet"
        os.rename(self._temporary, self.folder / name)
        sync_folder(self.folder)
        self._first_step = self._end_step

    def close(self) -> None:
        """End the thread; what was not published is discarded."""
        self._queue.put(None)
        self._thread.join()
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
            self._file.close()
            self._temporary.unlink(missing_ok=True)

    @property
    def _temporary(self) -> Path:
        return self.folder / f".part-rank{self.rank:05d}.tmp"

    def _raise_if_failed(self) -> None:
        if self._error is not None:
            raise RuntimeError(f"writing the datapoint record in {self.folder} failed") from self._error

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                if isinstance(item, _Entry):
                    if self._error is None:
                        self._pending.append(self._table(item))
                        if sum(t.num_rows for t in self._pending) >= ROWS_PER_GROUP:
                            self._flush()
                elif self._error is None:
                    self._flush()
            except BaseException as error:  # raised again by the next add or publish
                self._error = error
            if isinstance(item, threading.Event):
                item.set()

    def _flush(self) -> None:
        if not self._pending:
            return
        if self._writer is None:
            self._file = open(self._temporary, "wb")  # noqa: SIM115 - closed by publish
            self._writer = pq.ParquetWriter(self._file, SCHEMA, compression="zstd")
        self._writer.write_table(pa.concat_tables(self._pending))
        self._pending.clear()

    def _table(self, entry: _Entry) -> pa.Table:
        losses, applied = entry.losses()
        tables = []
        for m, (batch, loss) in enumerate(zip(entry.data.micro_batches, losses, strict=True)):
            s = batch.spans
            keep = s.document != PADDING
            place = s.place[keep]
            n = len(place)
            first_row = row_of(m, self.rank, 0, self.world_size, self.micro_batch_samples)
            columns = {
                "step": np.full(n, entry.data.step),
                "rank": np.full(n, self.rank, dtype=np.int32),
                "micro_batch": np.full(n, m, dtype=np.int32),
                "row": first_row + place,
                "sample": s.sample[place],
                "dataset": np.zeros(n, dtype=np.int32),
                "document": s.document[keep],
                "start": s.start[keep],
                "length": s.length[keep].astype(np.int32),
                "targets": s.targets[keep].astype(np.int32),
                "hash": s.hash[keep],
                "loss": loss[: len(keep)][keep],
                "applied": np.full(n, applied),
            }
            tables.append(pa.table(columns, schema=SCHEMA))
        return pa.concat_tables(tables)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporaries(folder: Path) -> None:
    """Remove what writers that were killed left behind."""
    for path in folder.glob(".part-*.tmp"):
        path.unlink()


def rows_of(table: pa.Table) -> Iterable[dict[str, Any]]:
    """The rows of a table as dictionaries."""
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows
