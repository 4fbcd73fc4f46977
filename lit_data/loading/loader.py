"""Loads the micro-batches of each step, prefetched by one background thread and planned by another."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from lit_data.loading.batches import BatchPlan, BatchReader, MicroBatch, RowNumbers, StepData
from lit_data.loading.mixture import Mixture
from lit_data.loading.order import Segment, first_sample_of_step, row_of
from lit_data.loading.rows import Rows
from lit_data.loading.shard_cache import ShardCache
from lit_data.packed.index import IntArray

FIRST_PLAN_ROWS = 8  # small first plan, so that the first batch is not delayed
MAX_GROUP_ROWS = 64  # of the steps handed over together
MAX_PLAN_ROWS = 8192  # of a plan: about 100 bytes per piece


@dataclass(frozen=True)
class RankLayout:
    """How the rows of a step are split over ranks. `world_size` counts data-parallel ranks."""

    block_size: int
    micro_batch_samples: int
    rank: int = 0
    world_size: int = 1
    document_mask: bool = True


class Loader:
    """Yields one rank's steps in order, prefetched by one thread and planned by another.

    Args:
        rows: of each dataset.
        mixture: sample number -> dataset and window.
        segments: the samples of each step.
        end_sample: samples from this number on are rows without data (the end of the last epoch, of a validation
            split); None: no end.
        prefetch_steps: steps read ahead; 0 reads each on demand, without a thread.
        pin_memory: pin the tensors' memory, for asynchronous copies to CUDA.
        caches: read through these, one per dataset, instead of from the datasets.
        mock: repeat the first step forever, to measure training speed without a loader.
        read_extra: reads more tensors for a micro-batch (`MicroBatch.extra`), in the thread that reads its tokens.
    """

    def __init__(
        self,
        rows: Sequence[Rows],
        mixture: Mixture,
        layout: RankLayout,
        segments: Sequence[Segment],
        *,
        end_sample: int | None = None,
        prefetch_steps: int = 8,
        pin_memory: bool = False,
        caches: Sequence[ShardCache] | None = None,
        mock: bool = False,
        read_extra: Callable[[MicroBatch], tuple[torch.Tensor, ...]] | None = None,
    ) -> None:
        for s in segments:
            group = layout.world_size * layout.micro_batch_samples
            assert s.global_batch % group == 0, f"global batch {s.global_batch} is no multiple of {group}"
        assert all(r.block_size == layout.block_size for r in rows) and len(rows) == len(mixture.orders)
        self.rows, self.mixture, self.layout, self.segments = list(rows), mixture, layout, tuple(segments)
        self.end_sample, self.prefetch_steps, self.caches, self.mock = end_sample, prefetch_steps, caches, mock
        self._reader, self._read_extra = BatchReader(self.rows, caches, pin_memory), read_extra
        self._done = 0  # steps before this one have been read

    def read_step(self, step: int) -> StepData:
        """Read one step synchronously; a pure function of its number."""
        return self._read(self.plan(step, step + 1), step, 0, 1)

    def steps(self, first_step: int, last_step: int) -> Iterator[StepData]:
        """Iterate over steps `first_step` to `last_step - 1`, prefetched in a thread; its errors are raised here.

        Close the iterator (or exhaust it) to stop the thread.
        """
        if self.mock:
            batches = self.read_step(first_step).micro_batches
            yield from (StepData(step, batches) for step in range(first_step, last_step))
            return
        steps = self._read_steps(first_step, last_step, plan_ahead=self.prefetch_steps > 0)
        if self.prefetch_steps == 0:
            yield from steps
            return
        # Handing over to another thread costs about 30 us, twice the time to read a small step: so in groups.
        small = MAX_GROUP_ROWS // (self._batches(first_step) * self.layout.micro_batch_samples)
        group = max(1, min(small, self.prefetch_steps // 2))
        ahead: queue.Queue[list[StepData] | BaseException] = queue.Queue(maxsize=-(-self.prefetch_steps // group))
        stop = threading.Event()

        def put(item: list[StepData] | BaseException) -> None:
            while not stop.is_set():
                try:
                    return ahead.put(item, timeout=0.1)
                except queue.Full:
                    continue

        def read() -> None:
            some: list[StepData] = []
            size = 1  # the first step is handed over immediately
            try:
                for data in steps:
                    some.append(data)
                    if len(some) >= size:
                        put(some)
                        some, size = [], min(2 * size, group)
                    if stop.is_set():
                        return
                put(some)
            except BaseException as error:  # handed to the consumer, which raises it after the steps before
                put(some)
                put(error)
            finally:
                steps.close()

        thread = threading.Thread(target=read, name="llammlein-loader", daemon=True)
        thread.start()
        try:
            left = last_step - first_step
            while left > 0:
                item = ahead.get()
                if isinstance(item, BaseException):
                    raise item
                yield from item
                left -= len(item)
        finally:
            stop.set()
            thread.join()

    def _read_steps(self, first_step: int, last_step: int, plan_ahead: bool) -> Generator[StepData, None, None]:
        """Read steps in order, planned together and announced to the caches."""
        self._done = first_step
        counts = self._follow(first_step, last_step)
        plan_of = self._plans_ahead if plan_ahead else self._plans
        for begin, end, plan in plan_of(first_step, last_step):
            for step in range(begin, end):
                yield self._read(plan, step, step - begin, end - begin)
                self._done = step + 1
                for cache, count in zip(self.caches or (), counts, strict=True):
                    if (rows := count.pop(step, None)) is not None:
                        cache.used(rows)

    def _plans(self, first_step: int, last_step: int) -> Iterator[tuple[int, int, BatchPlan]]:
        """Iterate over the ranges of steps planned together: (first step, end, plan)."""
        for begin, end in self._stretches(first_step, last_step):
            yield begin, end, self.plan(begin, end)

    def _plans_ahead(self, first_step: int, last_step: int) -> Iterator[tuple[int, int, BatchPlan]]:
        """Like `_plans`, each plan made in a thread while the one before is read: slow with thousands of shards."""
        waiting: deque[tuple[int, int, Future[BatchPlan]]] = deque()
        with ThreadPoolExecutor(1, "llammlein-planning") as pool:
            for begin, end in self._stretches(first_step, last_step):
                waiting.append((begin, end, pool.submit(self.plan, begin, end)))
                if len(waiting) > 1:
                    first, last, plan = waiting.popleft()
                    yield first, last, plan.result()
            for first, last, plan in waiting:
                yield first, last, plan.result()

    def close(self) -> None:
        """Close the caches."""
        for cache in self.caches or ():
            cache.close()

    def _batches(self, step: int) -> int:
        """Number of this rank's micro-batches in a step."""
        return first_sample_of_step(self.segments, step)[1] // (
            self.layout.world_size * self.layout.micro_batch_samples
        )

    def _stretches(self, first_step: int, last_step: int) -> Iterator[tuple[int, int]]:
        """Ranges of steps planned together, of one global batch size: few steps at first, then many."""
        rows, begin = FIRST_PLAN_ROWS, first_step
        changes = sorted(s.from_step for s in self.segments)
        while begin < last_step:
            steps = max(1, rows // (self._batches(begin) * self.layout.micro_batch_samples))
            end = min([begin + steps, last_step, *(c for c in changes if c > begin)])
            yield begin, end
            begin, rows = end, min(2 * rows, MAX_PLAN_ROWS)

    def _numbers(self, begin: int, end: int) -> RowNumbers:
        """The windows of this rank's rows of some steps with one global batch."""
        lay = self.layout
        first, global_batch = first_sample_of_step(self.segments, begin)
        row = [row_of(m, lay.rank, 0, lay.world_size, lay.micro_batch_samples) for m in range(self._batches(begin))]
        samples = (
            first
            + np.arange(end - begin, dtype=np.int64)[:, None, None] * global_batch
            + np.asarray(row, dtype=np.int64)[:, None]
            + np.arange(lay.micro_batch_samples, dtype=np.int64)
        ).reshape(-1)
        if self.end_sample is None or samples[-1] < self.end_sample:
            dataset, _, window = self.mixture.locate(samples)
            return RowNumbers(dataset, window, samples)
        real = samples < self.end_sample
        dataset, _, window = self.mixture.locate(np.where(real, samples, 0))
        return RowNumbers(*(np.where(real, x, -1) for x in (dataset, window, samples)))

    def plan(self, begin: int, end: int) -> BatchPlan:
        """The layout of this rank's micro-batches of some steps with one global batch."""
        return BatchPlan(
            self.rows, self._numbers(begin, end), self.layout.micro_batch_samples, self.layout.document_mask
        )

    def _read(self, plan: BatchPlan, step: int, nth: int, of: int) -> StepData:
        """The `nth` step of the `of` in a plan."""
        n = plan.n_batches // of
        batches = [self._reader.read(plan, b) for b in range(nth * n, (nth + 1) * n)]
        if self._read_extra is not None:
            for batch in batches:
                batch.extra = self._read_extra(batch)
        return StepData(step, batches)

    def _follow(self, first_step: int, last_step: int) -> list[dict[int, int]]:
        """Let the caches stage the data of these steps. Returns, per cache, the cumulative number of ranges at each
        step's end.
        """
        counts: list[dict[int, int]] = [{} for _ in self.caches or ()]
        for d, cache in enumerate(self.caches or ()):
            cache.follow(self._ranges(d, first_step, last_step, counts[d]))
        return counts

    def _ranges(
        self, dataset: int, first_step: int, last_step: int, counts: dict[int, int]
    ) -> Iterator[tuple[IntArray, IntArray]]:
        """The ranges of a dataset's stream in reading order; records the number of ranges at each step's end."""
        total = 0
        for begin, end in self._stretches(first_step, last_step):
            numbers = self._numbers(begin, end)
            mine = np.flatnonzero(numbers.dataset == dataset)
            row, starts, stops = self.rows[dataset].ranges(numbers.window[mine])
            step = mine[row] // (len(numbers.window) // (end - begin))
            ends = total + np.cumsum(np.bincount(step, minlength=end - begin))
            total = int(ends[-1])
            counts.update(zip(range(begin, end), ends.tolist(), strict=True))
            done = min(self._done, end)
            if done > begin and self.caches is not None:  # the reader was faster: these are no longer needed
                self.caches[dataset].used(int(ends[done - begin - 1]))
            yield starts, stops
