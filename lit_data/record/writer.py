"""Writes one rank's parts of the datapoint record in a thread, so that training does not wait."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from lit_data.loading.order import row_of
from lit_data.record.schema import ROWS_PER_GROUP, SCHEMA, open_writer
from lit_data.record.span_hash import hash_spans
from lit_files.publish import publish, sync_file

if TYPE_CHECKING:  # the loader imports torch, which queries of the record don't need
    from lit_data.loading.batches import Spans, StepData

GROUPED_ROWS = 1 << 19  # rows in one row group of every rank: the memory of a merge of all ranks


@dataclass
class _Entry:
    step: int
    micro_batches: list[tuple[Spans, Any]]  # with their tokens
    losses: Callable[[], tuple[list[npt.NDArray[np.float64]], bool]]


@dataclass
class _Publication:
    end_step: int
    done: threading.Event = field(default_factory=threading.Event)


class DatapointRecorder:
    """Writes one rank's record in a background thread.

    Args:
        folder: RUN/datapoints; created if missing.
        rank, world_size, micro_batch_samples: determine this rank's rows of a step.
        first_step: the step the run starts or resumes at.
    """

    def __init__(self, folder: Path, rank: int, world_size: int, micro_batch_samples: int, first_step: int) -> None:
        self.folder, self.rank = folder, rank
        self.world_size, self.micro_batch_samples = world_size, micro_batch_samples
        self._first_step = first_step  # of the part being written; used by the thread only
        self._end_step = first_step
        # A merge reads one row group of each rank at a time.
        self._rows_per_group = min(ROWS_PER_GROUP, max(1024, GROUPED_ROWS // world_size))
        folder.mkdir(parents=True, exist_ok=True)
        # Bounded: if the disk stalls, training waits here instead of filling memory with queued tokens.
        self._queue: queue.Queue[_Entry | _Publication | None] = queue.Queue(maxsize=64)
        self._writer: pq.ParquetWriter | None = None
        self._file: Any = None
        self._pending: list[pa.Table] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="llammlein-datapoints", daemon=True)
        self._thread.start()

    def add(self, data: StepData, losses: Callable[[], tuple[list[npt.NDArray[np.float64]], bool]]) -> None:
        """Queue one step. `losses()` is called in the writer thread and may wait for the device.

        It returns, per micro-batch, the summed loss of each piece (float64, in the order of its spans), and whether
        the step was applied.
        """
        self._raise_if_failed()
        assert data.step == self._end_step, f"step {data.step} recorded after step {self._end_step - 1}"
        self._end_step += 1
        self._queue.put(_Entry(data.step, [(b.spans, b.tokens) for b in data.micro_batches], losses))

    def publish(self) -> None:
        """Write, sync and publish the part with all steps since the last one. The next checkpoint commits it."""
        self.publish_later()()

    def publish_later(self) -> Callable[[], None]:
        """Publish the part with all steps so far, in the thread. The returned function waits for it, or raises."""
        request = _Publication(self._end_step)
        self._queue.put(request)

        def finish() -> None:
            request.done.wait()
            self._raise_if_failed()

        return finish

    @property
    def failed(self) -> bool:
        """Whether a step could not be recorded; the next call raises it."""
        return self._error is not None

    def close(self) -> None:
        """Stop the thread; discards unpublished rows."""
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
                        if sum(t.num_rows for t in self._pending) >= self._rows_per_group:
                            self._flush()
                elif self._error is None:
                    self._publish(item.end_step)
            except BaseException as error:  # re-raised by the next add or publish
                self._error = error
            if isinstance(item, _Publication):
                item.done.set()

    def _publish(self, end_step: int) -> None:
        self._flush()
        if self._writer is None:
            return
        self._writer.close()
        sync_file(self._file)
        self._file.close()
        self._writer = self._file = None
        name = f"part-{self._first_step:08d}-{end_step:08d}-rank{self.rank:05d}.parquet"
        publish(self._temporary, self.folder / name)
        self._first_step = end_step

    def _flush(self) -> None:
        if not self._pending:
            return
        if self._writer is None:
            self._file = open(self._temporary, "wb")  # noqa: SIM115 - closed by publish
            self._writer = open_writer(self._file)
        table = pa.concat_tables(self._pending)
        if table.num_rows:  # an empty row group would have no bounds
            self._writer.write_table(table)
        self._pending.clear()

    def _table(self, entry: _Entry) -> pa.Table:
        losses, applied = entry.losses()
        tables = []
        for m, ((s, tokens), loss) in enumerate(zip(entry.micro_batches, losses, strict=True)):
            hashes = hash_spans(np.asarray(tokens).reshape(-1), s.length)
            keep = s.document >= 0  # negative numbers are padding
            row = s.row[keep]
            n = len(row)
            first_row = row_of(m, self.rank, 0, self.world_size, self.micro_batch_samples)
            columns = {
                "step": np.full(n, entry.step),
                "rank": np.full(n, self.rank),
                "micro_batch": np.full(n, m),
                "row": first_row + row,
                "sample": s.sample[row],
                "dataset": s.dataset[keep],
                "document": s.document[keep],
                "start": s.start[keep],
                "length": s.length[keep],
                "targets": s.targets[keep],
                "hash": hashes[keep],
                "loss": loss[: len(keep)][keep],
                "applied": np.full(n, applied),
            }
            tables.append(pa.table([as_arrow(columns[f.name], f.type) for f in SCHEMA], schema=SCHEMA))
        return pa.concat_tables(tables)


def as_arrow(values: npt.NDArray[Any], kind: pa.DataType) -> pa.Array:
    """Convert numbers or booleans to an Arrow array of a fixed-width type.

    pa.array would do the same, but imports pandas for a type check: 1 s and 60 MB per rank.
    """
    if pa.types.is_boolean(kind):
        content = np.packbits(values, bitorder="little")
    else:
        content = np.ascontiguousarray(values, dtype=str(kind).replace("double", "float64"))
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(content)])


def remove_temporaries(folder: Path) -> None:
    """Remove temporary files of killed writers."""
    for pattern in (".part-*.tmp", ".steps-*.tmp"):
        for path in folder.glob(pattern):
            with contextlib.suppress(OSError):  # a writer truncates existing files
                path.unlink()
