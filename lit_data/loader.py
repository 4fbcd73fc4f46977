"""Whole steps of micro-batches, read ahead by a background thread.

Dimensions: `B` rows in a micro-batch, `T` tokens in a row, `N = B * T`, `P` pieces (spans of documents, and padding).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from lit_data.order import IntArray, Order, Segment, first_sample_of_step, mix64, row_of
from lit_data.packed import PackedDataset

IGNORE_TARGET = -100  # what torch's and the model's cross-entropy leave out
PADDING = -1  # the document number of a piece that is padding
MIN_BUCKET = 16


def count_windows(n_tokens: int, block_size: int) -> int:
    """Windows of stride `block_size` over a stream: each token is an input exactly once; the tail is padded."""
    return -(-n_tokens // block_size)


@dataclass
class Spans:
    """The pieces of a micro-batch in their order in it. Arrays of length P.

    Attributes:
        place: row of the micro-batch.
        document: number of the document in its dataset, or PADDING.
        start: first token of the piece, counted in its document.
        length: tokens that are inputs.
        targets: tokens that are targets, i.e. have a loss.
        hash: of the tokens as they go into the model (see `hash_spans`), uint64.
        window: of the row, and `sample`: the row's number in the run, per row (length B); -1 for a row without data.
    """

    place: IntArray
    document: IntArray
    start: IntArray
    length: IntArray
    targets: IntArray
    hash: npt.NDArray[np.uint64]
    window: IntArray
    sample: IntArray


@dataclass
class MicroBatch:
    """What one rank puts through the model at once.

    Attributes:
        tokens: int64 [B, T].
        targets: int64 [B, T], IGNORE_TARGET where there is none.
        cu_seqlens: int32 [power of two], boundaries of the pieces in the flattened rows, padded by repeating N.
        spans: where the tokens come from (host memory).
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor
    spans: Spans

    @property
    def n_targets(self) -> int:
        return int(self.spans.targets.sum())


@dataclass
class StepData:
    """One rank's part of one step: its micro-batches and the number of its valid targets."""

    step: int
    micro_batches: list[MicroBatch]

    @property
    def n_targets(self) -> int:
        return sum(m.n_targets for m in self.micro_batches)


def hash_spans(tokens: npt.NDArray[np.int64], offsets: IntArray) -> npt.NDArray[np.uint64]:
    """Hash each piece of a flat token array: the sum mod 2^64 of SplitMix64 over (place in the piece, token).

    Args:
        tokens: int64 [N].
        offsets: int64 [P], ascending, first 0; piece i is tokens[offsets[i]:offsets[i + 1]].

    Returns:
        uint64 [P]. Vectorised: about 10 ns a token.
    """
    lengths = np.diff(offsets, append=len(tokens))
    place = np.arange(len(tokens), dtype=np.uint64) - np.repeat(offsets.astype(np.uint64), lengths)
    with np.errstate(over="ignore"):
        mixed = mix64(tokens.astype(np.uint64) + place * np.uint64(0x9E3779B97F4A7C15) + np.uint64(1))
        return np.add.reduceat(mixed, offsets)


def read_rows(
    dataset: PackedDataset, windows: IntArray, samples: IntArray, block_size: int, document_mask: bool
) -> MicroBatch:
    """Read windows of a packed dataset as the rows of one micro-batch.

    Args:
        windows: int64 [B], window numbers; -1 gives a row of padding without targets.
        samples: int64 [B], their numbers in the run; only carried along.
        document_mask: with it no target crosses a document's end; without it only the stream's end has none.
    """
    n_rows, n_stream = len(windows), dataset.n_tokens
    real = windows >= 0
    begin = np.where(real, windows * block_size, 0)
    end = np.where(real, np.minimum(begin + block_size, n_stream), 0)

    text = np.zeros((n_rows, block_size + 1), dtype=np.int64)
    for row in np.flatnonzero(real):
        stop = min(int(end[row]) + 1, n_stream)
        text[row, : stop - int(begin[row])] = dataset.tokens(int(begin[row]), stop)
    tokens = text[:, :-1]  # (B, T)
    targets = text[:, 1:].copy()  # (B, T)

    # Documents of each row: the run of numbers from the first to the last one it touches.
    first = dataset.document_of(begin[real])
    last = dataset.document_of(end[real] - 1)
    counts = last - first + 1
    place = np.repeat(np.flatnonzero(real), counts)
    document = np.repeat(first, counts) + _ramps(counts)
    doc_begin, doc_end = dataset.document_start(document), dataset.document_start(document + 1)
    span_begin = np.maximum(doc_begin, begin[place])
    span_end = np.minimum(doc_end, end[place])
    ends_here = (doc_end <= end[place]) if document_mask else (span_end == n_stream)
    offset = place * block_size + span_begin - begin[place]
    length = span_end - span_begin

    # Padding: the tail of the last window, and rows without data.
    filled = end - begin
    padded = np.flatnonzero(filled < block_size)
    flat_targets = targets.reshape(-1)
    flat_targets[(offset + length - 1)[ends_here]] = IGNORE_TARGET
    for row in padded:
        targets[row, filled[row] :] = IGNORE_TARGET

    offset_all = np.concatenate([offset, padded * block_size + filled[padded]])
    sort = np.argsort(offset_all, kind="stable")
    zeros = np.zeros(len(padded), dtype=np.int64)
    offset_all = offset_all[sort]
    spans = Spans(
        place=np.concatenate([place, padded])[sort],
        document=np.concatenate([document, zeros + PADDING])[sort],
        start=np.concatenate([span_begin - doc_begin, zeros])[sort],
        length=np.concatenate([length, block_size - filled[padded]])[sort],
        targets=np.concatenate([length - ends_here, zeros])[sort],
        hash=hash_spans(tokens.reshape(-1), offset_all),
        window=windows,
        sample=samples,
    )
    return MicroBatch(
        tokens=torch.from_numpy(np.ascontiguousarray(tokens)),
        targets=torch.from_numpy(targets),
        cu_seqlens=torch.from_numpy(bucketed_boundaries(offset_all, n_rows * block_size)),
        spans=spans,
    )


def bucketed_boundaries(offsets: IntArray, total: int) -> npt.NDArray[np.int32]:
    """Piece offsets [P] and their end -> boundaries padded with `total` to the next power of two above P.

    A few fixed sizes, so that a compiled kernel is not built anew for each batch; never cut.
    """
    size = max(MIN_BUCKET, 1 << len(offsets).bit_length())
    out = np.full(size, total, dtype=np.int32)
    out[: len(offsets)] = offsets
    return out


def _ramps(counts: IntArray) -> IntArray:
    """[2, 3] -> [0, 1, 0, 1, 2]."""
    total = int(counts.sum())
    return np.arange(total, dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)


@dataclass(frozen=True)
class Layout:
    """How the rows of a step are dealt out. `world_size` counts data-parallel ranks."""

    block_size: int
    micro_batch_samples: int
    rank: int = 0
    world_size: int = 1
    document_mask: bool = True


class Loader:
    """One rank's steps `first_step` to `last_step - 1`, in order, prefetched by a thread.

    Args:
        segments: which samples make up which step.
        end_sample: samples from this number on are rows without data (the end of the last epoch, of a validation
            split); None if there is no end.
        prefetch_steps: steps read ahead.
        pin_memory: page-lock the tensors, for copies to CUDA that do not wait.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        order: Order,
        layout: Layout,
        segments: Sequence[Segment],
        *,
        end_sample: int | None = None,
        prefetch_steps: int = 2,
        pin_memory: bool = False,
    ) -> None:
        for s in segments:
            group = layout.world_size * layout.micro_batch_samples
            assert s.global_batch % group == 0, f"global batch {s.global_batch} is no multiple of {group}"
        self.dataset, self.order, self.layout, self.segments = dataset, order, layout, tuple(segments)
        self.end_sample, self.prefetch_steps, self.pin_memory = end_sample, prefetch_steps, pin_memory

    def read_step(self, step: int) -> StepData:
        """Read one step now: a pure function of its number."""
        lay = self.layout
        first, global_batch = first_sample_of_step(self.segments, step)
        places = np.arange(lay.micro_batch_samples, dtype=np.int64)
        micro_batches = []
        for m in range(global_batch // (lay.world_size * lay.micro_batch_samples)):
            samples = first + row_of(m, lay.rank, 0, lay.world_size, lay.micro_batch_samples) + places
            real = samples < self.end_sample if self.end_sample is not None else np.ones_like(samples, dtype=bool)
            _, windows = self.order.place(np.where(real, samples, 0))
            batch = read_rows(
                self.dataset,
                np.where(real, windows, -1),
                np.where(real, samples, -1),
                lay.block_size,
                lay.document_mask,
            )
            micro_batches.append(self._pin(batch))
        return StepData(step, micro_batches)

    def steps(self, first_step: int, last_step: int) -> Iterator[StepData]:
        """Iterate over steps, reading ahead in a thread; an error there is raised here.

        Close the iterator (or exhaust it) to end the thread.
        """
        ahead: queue.Queue[StepData | BaseException] = queue.Queue(maxsize=max(1, self.prefetch_steps))
        stop = threading.Event()

        def put(item: StepData | BaseException) -> None:
            while not stop.is_set():
                try:
                    return ahead.put(item, timeout=0.1)
                except queue.Full:
                    continue

        def read() -> None:
            try:
                for step in range(first_step, last_step):
                    if stop.is_set():
                        return
                    put(self.read_step(step))
            except BaseException as error:  # handed to the consumer, which raises it
                put(error)

        thread = threading.Thread(target=read, name="llammlein-loader", daemon=True)
        thread.start()
        try:
            for _ in range(first_step, last_step):
                item = ahead.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()

    def _pin(self, batch: MicroBatch) -> MicroBatch:
        if self.pin_memory:
            batch.tokens, batch.targets = batch.tokens.pin_memory(), batch.targets.pin_memory()
            batch.cu_seqlens = batch.cu_seqlens.pin_memory()
        return batch
