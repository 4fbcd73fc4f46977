"""The record of what was seen: one row a span, in Parquet parts that a checkpoint commits.

A part `part-A-B-rankR.parquet` holds the record steps A to B - 1 of one rank. It counts once the checkpoint after
step B exists; until then readers ignore it, and a resume removes it. `lit_data/record/merge.py` merges committed parts
into files `steps-A-B.parquet` of all ranks.

Which file a step is read from follows from the names alone (`believe`), so that a merge may be killed at any moment:
a merged file goes before the parts inside it, a longer one before a shorter one.
"""

from __future__ import annotations

import bisect
import contextlib
import os
import queue
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lit_data.loading.order import row_of
from lit_data.record.span_hash import hash_spans
from lit_files.checkpoint_name import checkpoint_step, list_checkpoints
from lit_files.parquet import open_table
from lit_files.publish import sync_file

if TYPE_CHECKING:  # the loader imports torch, which a question to the record should not wait for
    from lit_data.loading.loader import Spans, StepData

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
SORT_KEYS = ("step", "row", "document", "start")
PART_NAME = re.compile(r"part-(\d{8,})-(\d{8,})-rank(\d{5,})\.parquet")
MERGED_NAME = re.compile(r"steps-(\d{8,})-(\d{8,})\.parquet")
ROWS_PER_GROUP = 1 << 16  # read as a whole to find one step: about 2 MB, 10 ms
GROUPED_ROWS = 1 << 19  # in one row group of each rank: what a merge of all ranks holds in memory


@dataclass(frozen=True)
class Part:
    """Steps `first_step` to `end_step - 1` of one file of the record.

    Attributes:
        rank: whose rows it holds; None for a merged file, which holds all ranks'.
    """

    path: Path
    first_step: int
    end_step: int
    rank: int | None


def list_parts(folder: Path) -> list[Part]:
    """All published files of a record folder, with all steps they hold, by step and rank."""
    parts = []
    for name in os.listdir(folder):
        if match := PART_NAME.fullmatch(name):
            parts.append(Part(folder / name, int(match[1]), int(match[2]), int(match[3])))
        elif match := MERGED_NAME.fullmatch(name):
            parts.append(Part(folder / name, int(match[1]), int(match[2]), None))
    return sorted(parts, key=_by_step_and_rank)


def _by_step_and_rank(part: Part) -> tuple[int, int, int]:
    return part.first_step, part.end_step, -1 if part.rank is None else part.rank


def believe(parts: Iterable[Part], steps: int) -> list[Part]:
    """What of these files holds the first `steps` steps: each step in one merged file, or one part of each rank.

    Returns parts cut to the steps that are to be read from them; those of the same steps follow each other.
    """
    groups: dict[tuple[bool, int, int], list[Part]] = {}
    for part in parts:
        merged = part.rank is None
        if part.first_step < steps and (merged or part.end_step <= steps):
            groups.setdefault((not merged, part.first_step - part.end_step, part.first_step), []).append(part)
    covered: list[tuple[int, int]] = []  # apart from each other, ascending
    found: list[Part] = []
    for (_, minus_length, first), group in sorted(groups.items(), key=lambda item: item[0]):
        at, end = first, min(first - minus_length, steps)
        place = max(0, bisect.bisect_right(covered, (at, at)) - 1)
        gaps = []
        while at < end:
            low, high = covered[place] if place < len(covered) else (end, end)
            if min(low, end) > at:
                gaps.append((at, min(low, end)))
            at, place = max(at, high), place + 1
        found.extend(replace(p, first_step=a, end_step=b) for a, b in gaps for p in group)
        for gap in gaps:
            bisect.insort(covered, gap)
    return sorted(found, key=_by_step_and_rank)


def newest_checkpoint_step(run: Path) -> int:
    """Steps done in the newest checkpoint of a run folder; 0 where there is none."""
    return max((checkpoint_step(path) or 0 for path in list_checkpoints(run)), default=0)


def committed_parts(run: Path) -> list[Part]:
    """The parts of a run's record that a checkpoint has committed, as `believe` gives them."""
    steps = newest_checkpoint_step(run)
    return believe(list_parts(run / "datapoints"), steps)


def read_record(run: Path, columns: list[str] | None = None) -> pa.Table:
    """The committed record of a run as one table in memory, sorted by step, row, document and start."""
    tables = []
    for part in committed_parts(run):
        with open_table(part.path) as file:
            read = file.read(None if columns is None else list(dict.fromkeys(["step", *columns])))
            inside = read.filter((pc.field("step") >= part.first_step) & (pc.field("step") < part.end_step))
            tables.append(inside if columns is None else inside.select(columns))
    table = pa.concat_tables(tables) if tables else SCHEMA.empty_table()
    keys = [k for k in SORT_KEYS if columns is None or k in columns]
    return table.sort_by([(k, "ascending") for k in keys]) if keys else table


def open_writer(file: BinaryIO) -> pq.ParquetWriter:
    """A Parquet writer for rows of the record: what ascends as differences, bounds only for what is looked for."""
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
    """Writes one rank's record in a thread of its own.

    Args:
        folder: RUN/datapoints; made if it is missing.
        rank, world_size, micro_batch_samples: where this rank's rows lie in a step.
        first_step: the step the run begins or goes on with.
    """

    def __init__(self, folder: Path, rank: int, world_size: int, micro_batch_samples: int, first_step: int) -> None:
        self.folder, self.rank = folder, rank
        self.world_size, self.micro_batch_samples = world_size, micro_batch_samples
        self._first_step = first_step  # of the part that is being written; the thread's
        self._end_step = first_step
        # A merge reads one row group of each rank at a time.
        self._rows_per_group = min(ROWS_PER_GROUP, max(1024, GROUPED_ROWS // world_size))
        folder.mkdir(parents=True, exist_ok=True)
        # Bounded: if the disk stalls, training waits here instead of filling the memory with the tokens of its steps.
        self._queue: queue.Queue[_Entry | _Publication | None] = queue.Queue(maxsize=64)
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
        self._queue.put(_Entry(data.step, [(b.spans, b.tokens) for b in data.micro_batches], losses))

    def publish(self) -> None:
        """Write, sync and name the part of all steps since the last one. The checkpoint that follows commits it."""
        self.publish_later()()

    def publish_later(self) -> Callable[[], None]:
        """Publish the part of all steps up to now in the thread. The returned function waits for it, or raises."""
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
                        if sum(t.num_rows for t in self._pending) >= self._rows_per_group:
                            self._flush()
                elif self._error is None:
                    self._publish(item.end_step)
            except BaseException as error:  # raised again by the next add or publish
                self._error = error
            if isinstance(item, _Publication):
                item.done.set()

    def _publish(self, end_step: int) -> None:
        self._flush()
        if self._writer is None:
            return
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._writer = self._file = None
        name = f"part-{self._first_step:08d}-{end_step:08d}-rank{self.rank:05d}.parquet"
        os.rename(self._temporary, self.folder / name)
        sync_file(self.folder)
        self._first_step = end_step

    def _flush(self) -> None:
        if not self._pending:
            return
        if self._writer is None:
            self._file = open(self._temporary, "wb")  # noqa: SIM115 - closed by publish
            self._writer = open_writer(self._file)
        table = pa.concat_tables(self._pending)
        if table.num_rows:  # a row group without rows would have no bounds
            self._writer.write_table(table)
        self._pending.clear()

    def _table(self, entry: _Entry) -> pa.Table:
        losses, applied = entry.losses()
        tables = []
        for m, ((s, tokens), loss) in enumerate(zip(entry.micro_batches, losses, strict=True)):
            hashes = hash_spans(np.asarray(tokens).reshape(-1), s.length)
            keep = s.document >= 0  # a negative number is padding
            place = s.place[keep]
            n = len(place)
            first_row = row_of(m, self.rank, 0, self.world_size, self.micro_batch_samples)
            columns = {
                "step": np.full(n, entry.step),
                "rank": np.full(n, self.rank),
                "micro_batch": np.full(n, m),
                "row": first_row + place,
                "sample": s.sample[place],
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
    """Numbers or truth values as an Arrow array of a fixed-width type.

    pa.array does the same, and imports pandas to see whether it was given something of pandas: 1 s and 60 MB a rank.
    """
    if pa.types.is_boolean(kind):
        content = np.packbits(values, bitorder="little")
    else:
        content = np.ascontiguousarray(values, dtype=str(kind).replace("double", "float64"))
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(content)])


def remove_temporaries(folder: Path) -> None:
    """Remove what writers that were killed left behind."""
    for pattern in (".part-*.tmp", ".steps-*.tmp"):
        for path in folder.glob(pattern):
            with contextlib.suppress(OSError):  # a writer truncates what is there
                path.unlink()


def rows_of(table: pa.Table) -> Iterable[dict[str, Any]]:
    """The rows of a table as dictionaries."""
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows
