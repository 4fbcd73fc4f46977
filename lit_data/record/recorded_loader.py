"""Loads the steps of a run as its record names them: documents and spans, without the run's order, seed or plans."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lit_data.loading.batches import BatchPlan, RowNumbers
from lit_data.loading.loader import Loader
from lit_data.loading.rows import Packing, Pieces, Rows, document_bounds, ramps
from lit_data.packed.index import IntArray
from lit_data.packed.reader import PackedDataset
from lit_data.record.reader import blocks_of_steps, read_steps


class RecordedLoader(Loader):
    """A Loader that takes each row's documents and spans from the record in `run`, in the record's order.

    Of the segments only the number of rows of each step is used. A row may go to another rank than it did in the run.
    The other arguments are those of Loader.
    """

    def __init__(self, run: Path, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.run = run

    def plan(self, begin: int, end: int) -> BatchPlan:
        """As Loader.plan. Raises ValueError if the record does not fit the data or the layout of the steps."""
        lay, batches = self.layout, self._batches(begin)
        record = read_steps(self.run, range(begin, end))
        spans = {k: record[k].to_numpy() for k in ("step", "row", "sample", "dataset", "document", "start", "length")}
        if spans["dataset"].size and not 0 <= spans["dataset"].min() <= spans["dataset"].max() < len(self.rows):
            raise ValueError(f"the record of {self.run} names a dataset that the run does not have")
        group, place = np.divmod(spans["row"], lay.micro_batch_samples)
        batch, rank = np.divmod(group, lay.world_size)
        if spans["row"].size and not 0 <= spans["row"].min() <= spans["row"].max() < (
            batches * lay.world_size * lay.micro_batch_samples
        ):
            raise ValueError(f"the record of {self.run} has more rows in steps {begin} to {end - 1} than these steps")
        at = ((spans["step"] - begin) * batches + batch) * lay.micro_batch_samples + place
        mine = np.flatnonzero(rank == lay.rank)
        at = at[mine]
        n_rows = (end - begin) * batches * lay.micro_batch_samples
        numbers = RowNumbers(*(np.full(n_rows, -1, dtype=np.int64) for _ in range(3)))
        numbers.dataset[at], numbers.window[at], numbers.sample[at] = spans["dataset"][mine], at, spans["sample"][mine]
        rows = []
        for number, of in enumerate(self.rows):
            here = spans["dataset"][mine] == number
            document, start, length = (spans[k][mine][here].astype(np.int64) for k in ("document", "start", "length"))
            rows.append(RecordedRows(of, at[here], document, start, length, f"{self.run}: steps {begin} to {end - 1}"))
        plan = BatchPlan(rows, numbers, lay.micro_batch_samples, lay.document_mask)
        if self._read_extra is not None:  # cached predictions are found by the dataset's window
            real = numbers.sample >= 0
            numbers.window[real] = self.mixture.locate(numbers.sample[real])[2]
        return plan


class RecordedRows:
    """Recorded rows of one dataset; a window is the number of a row among those read together.

    Args:
        window: of each span, ascending; and its document, first token and length, int64 each.
        where: names the record in errors.

    Raises ValueError for spans that are not in the dataset or do not fit in a row.
    """

    def __init__(
        self, rows: Rows, window: IntArray, document: IntArray, start: IntArray, length: IntArray, where: str
    ) -> None:
        self.dataset: PackedDataset = rows.dataset
        self.packing: Packing = rows.packing
        self.block_size = rows.block_size
        self.window, self.document, self.start, self.length = window, document, start, length
        known = (document >= 0) & (document < self.dataset.n_documents) & (start >= 0) & (length > 0)
        if not known.all():
            raise ValueError(f"{where}: document {document[~known][0]} is not in {self.dataset.path}")
        first, end = document_bounds(self.dataset, document)
        if (start + length > end - first).any() or (_sums(window, length) > self.block_size).any():
            raise ValueError(f"{where}: the record's spans do not fit the documents of {self.dataset.path}")

    def pieces(self, windows: IntArray) -> Pieces:
        first = np.searchsorted(self.window, windows)
        count = np.searchsorted(self.window, windows, side="right") - first
        row = np.repeat(np.arange(len(windows), dtype=np.int64), count)
        at = np.repeat(first, count) + ramps(count)
        document, start, length = self.document[at], self.start[at], self.length[at]
        begin, end = document_bounds(self.dataset, document)
        return Pieces(row, document, start, length, begin + start, begin + start + length == end)


def _sums(groups: IntArray, values: IntArray) -> IntArray:
    """Sums of values over equal, adjacent groups."""
    begins = np.flatnonzero(np.append(True, groups[1:] != groups[:-1])[: len(groups)])
    return np.add.reduceat(values, begins) if len(begins) else values


def missing_shards(dataset: PackedDataset) -> list[int]:
    """The shards of a dataset, opened without checks, whose tokens are not in its folder."""
    return [i for i, shard in enumerate(dataset.manifest.shards) if not (dataset.path / f"{shard.name}.bin").exists()]


def first_unreadable_step(run: Path, datasets: Sequence[PackedDataset], first: int, end: int) -> int | None:
    """The first recorded step in [first, end) that used tokens of a missing shard; None if all can be read."""
    missing = {number: found for number, dataset in enumerate(datasets) if (found := missing_shards(dataset))}
    for block in blocks_of_steps(first, end) if missing else ():
        record = read_steps(run, block)
        steps: list[int] = []
        for number, shards in missing.items():
            here = record.filter(record["dataset"].to_numpy() == number)
            document, start, length = (here[k].to_numpy().astype(np.int64) for k in ("document", "start", "length"))
            lost: npt.NDArray[np.bool_] = np.zeros(len(document), dtype=np.bool_)
            position = datasets[number].document_start(document) + start
            for shard in shards:  # the token after a span may be a target
                low, high = datasets[number].token_start[shard : shard + 2].tolist()
                lost |= (position <= high - 1) & (position + length >= low)
            steps += here["step"].to_numpy()[lost][:1].tolist()
        if steps:
            return min(steps)
    return None
