"""Builds micro-batches of rows: their layout is planned for many at a time, their tokens are copied one by one.

A `BatchPlan` maps the windows of many rows to positions in the data: which documents, where the targets end. Each
micro-batch then only copies its tokens and takes a few slices.

Dimensions: `B` rows in a micro-batch, `T` tokens in a row, `N = B * T`, `P` pieces (spans of documents, and padding),
`M` micro-batches, `R = M * B` rows, `U` runs (contiguous ranges of the stream, one copy each).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from lit_data.loading.rows import Pieces, RowPieces, Rows
from lit_data.packed.index import IntArray

IGNORE_TARGET = -100  # ignore_index of torch's and the model's cross-entropy
PADDING = -1  # the document number of padding
# Allowed sizes of cu_seqlens: 16, and above it four steps for each doubling (16, 20, 24, 28, 32, 40, ...).
_BUCKETS = np.asarray([1 << 4, *((1 << bits) // 4 * quarters for bits in range(4, 40) for quarters in (5, 6, 7, 8))])


class TokenSource(Protocol):
    """The source of tokens: a dataset, or a cache in front of it."""

    def copy_tokens(self, out: npt.NDArray[Any], start: int, stop: int) -> None:
        """Copy tokens [start, stop) of the stream to `out`, whose integer type must hold them."""
        ...


@dataclass
class Spans:
    """The pieces of a micro-batch, in order; they fill its rows. Arrays of length P.

    Attributes:
        row: of the micro-batch.
        dataset: number of the dataset in the run; PADDING for padding.
        document: number of the document in its dataset, or PADDING.
        start: first token of the piece, relative to its document.
        length: number of input tokens.
        targets: number of target tokens, i.e. with a loss.
        window: of the row, and `sample`: the row's number in the run, per row (length B); -1 for a row without data.
    """

    row: IntArray
    dataset: IntArray
    document: IntArray
    start: IntArray
    length: IntArray
    targets: IntArray
    window: IntArray
    sample: IntArray


@dataclass
class MicroBatch:
    """The rows one rank puts through the model at once.

    Attributes:
        tokens: int64 [B, T].
        targets: int64 [B, T], IGNORE_TARGET for positions without one.
        cu_seqlens: int32 [a size of `bucket`], boundaries of the pieces in the flattened rows, padded by repeating N.
        spans: origin of the tokens (host memory).
        n_targets: number of tokens with a loss.
        n_inputs: number of document tokens, without padding.
        extra: tensors that the loader's `read_extra` read for these rows, for example cached teacher predictions.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor
    spans: Spans
    n_targets: int
    n_inputs: int
    extra: tuple[torch.Tensor, ...] = ()


@dataclass
class StepData:
    """One rank's share of a step: its micro-batches and the number of its valid targets."""

    step: int
    micro_batches: list[MicroBatch]

    @property
    def n_targets(self) -> int:
        return sum(m.n_targets for m in self.micro_batches)

    @property
    def n_inputs(self) -> int:
        return sum(m.n_inputs for m in self.micro_batches)


@dataclass
class RowNumbers:
    """The windows of some rows. int64 (R,) each, all -1 for a row without data."""

    dataset: IntArray
    window: IntArray
    sample: IntArray


class BatchPlan:
    """The layout of micro-batches, everything except the tokens. See the module's legend."""

    def __init__(self, rows: Sequence[RowPieces], numbers: RowNumbers, batch_rows: int, document_mask: bool) -> None:
        self.numbers, self.batch_rows, self.block_size = numbers, batch_rows, rows[0].block_size
        n_rows = len(numbers.window)
        self.n_batches = n_rows // batch_rows
        self._find_pieces(rows)
        real = self.document >= 0
        self._find_targets(rows, real, document_mask)
        self._find_runs(rows, real)
        starts = np.arange(0, n_rows + 1, batch_rows)
        self.piece_bounds: list[int] = np.searchsorted(self.row, starts).tolist()
        self.n_targets: list[int] = np.add.reduceat(self.targets, self.piece_bounds[:-1]).tolist()
        inputs = np.where(real, self.length, 0)
        self.n_inputs: list[int] = np.add.reduceat(inputs, self.piece_bounds[:-1]).tolist()
        self.batch_row = self.row % batch_rows
        self._find_boundaries()
        self.simple = self._find_simple(rows)

    def _find_pieces(self, rows: Sequence[RowPieces]) -> None:
        """Find the pieces of documents and padding, by row; arrays (P,)."""
        found: list[Pieces] = []
        row, dataset = [], []
        for d, of in enumerate(rows):
            mine = np.flatnonzero(self.numbers.dataset == d)
            if len(mine):
                found.append(of.pieces(self.numbers.window[mine]))
                row.append(mine[found[-1].row])
                dataset.append(np.full(len(found[-1].row), d, dtype=np.int64))
        filled = np.zeros(len(self.numbers.window), dtype=np.int64)
        for at, p in zip(row, found, strict=True):
            filled += np.bincount(at, weights=p.length, minlength=len(filled)).astype(np.int64)  # exact below 2^53
        self.pad_row = np.flatnonzero(filled < self.block_size)
        self.pad_from = filled[self.pad_row]
        nothing = np.full(len(self.pad_row), PADDING, dtype=np.int64)
        zeros = np.zeros(len(self.pad_row), dtype=np.int64)
        self.row = np.concatenate([*row, self.pad_row])
        self.dataset = np.concatenate([*dataset, nothing])
        self.document = np.concatenate([*(p.document for p in found), nothing])
        self.start = np.concatenate([*(p.start for p in found), zeros])
        self.length = np.concatenate([*(p.length for p in found), self.block_size - self.pad_from])
        self.position = np.concatenate([*(p.position for p in found), nothing])
        self.ends = np.concatenate([*(p.ends for p in found), np.ones(len(self.pad_row), dtype=np.bool_)])
        if len(found) > 1 or len(self.pad_row):
            order = np.argsort(self.row, kind="stable")  # padding is last in its row
            self.row, self.dataset, self.document = self.row[order], self.dataset[order], self.document[order]
            self.start, self.length, self.position = self.start[order], self.length[order], self.position[order]
            self.ends = self.ends[order]
        self.first = np.cumsum(self.length) - self.length  # in the flattened rows

    def _find_targets(self, rows: Sequence[RowPieces], real: npt.NDArray[np.bool_], document_mask: bool) -> None:
        """Find the pieces without a target at their last token, and the number of targets of each."""
        if document_mask:
            silent = self.ends
        else:
            # With `concat` the stream continues beyond the row; otherwise padding or another row follows.
            following = np.append(self.row[1:], -1) == self.row
            following[:-1] &= real[1:]
            runs_on = np.asarray([r.packing == "concat" for r in rows])[self.dataset]
            at_end = self.position + self.length == np.asarray([r.dataset.n_tokens for r in rows])[self.dataset]
            silent = np.where(runs_on, at_end, self.ends & ~following) | ~real
        self.silent = silent
        self.targets = np.where(real, self.length - silent, 0)
        n = self.batch_rows * self.block_size
        ends = (self.first + self.length - 1)[silent & real]
        self.silent_columns = ends % n  # in the flattened micro-batch
        self.silent_bounds: list[int] = np.searchsorted(ends // n, np.arange(self.n_batches + 1)).tolist()
        self.pad_list = list(zip((self.pad_row % self.batch_rows).tolist(), self.pad_from.tolist(), strict=True))
        self.pad_bounds: list[int] = np.searchsorted(
            self.pad_row // self.batch_rows, range(self.n_batches + 1)
        ).tolist()

    def _find_runs(self, rows: Sequence[RowPieces], real: npt.NDArray[np.bool_]) -> None:
        """Find contiguous ranges of the stream within a row, plus the next token where it is a target."""
        row, position, length = self.row[real], self.position[real], self.length[real]
        begins = np.ones(len(row), dtype=np.bool_)
        begins[1:] = (row[1:] != row[:-1]) | (position[1:] != position[:-1] + length[:-1])
        heads = np.flatnonzero(begins)
        tails = np.append(heads[1:], len(row))[: len(heads)] - 1
        self.run_row, self.run_dataset = row[heads], self.dataset[real][heads]
        self.run_column = self.first[real][heads] - self.run_row * self.block_size
        self.run_position = position[heads]
        end = position[tails] + length[tails]
        n_tokens = np.asarray([r.dataset.n_tokens for r in rows], dtype=np.int64)[self.run_dataset]
        self.run_length = end - self.run_position
        self.run_end = end + (~self.silent[real][tails] & (end < n_tokens))
        self.run_bounds: list[int] = np.searchsorted(
            self.run_row // self.batch_rows, range(self.n_batches + 1)
        ).tolist()

    def _find_boundaries(self) -> None:
        """Compute cu_seqlens of each micro-batch, batched by size."""
        bounds = np.asarray(self.piece_bounds)
        sizes = bucket(np.diff(bounds))
        n = self.batch_rows * self.block_size
        batch = self.row // self.batch_rows
        column = np.arange(len(self.row)) - bounds[batch]
        self.cu_seqlens: list[torch.Tensor] = [torch.empty(0)] * self.n_batches
        for size in sorted(set(sizes.tolist())):
            batches = np.flatnonzero(sizes == size)
            table = np.full((len(batches), size), n, dtype=np.int32)
            mine = sizes[batch] == size
            table[np.searchsorted(batches, batch[mine]), column[mine]] = (self.first - batch * n)[mine]
            for b, boundaries in zip(batches.tolist(), torch.from_numpy(table).unbind(), strict=True):
                self.cu_seqlens[b] = boundaries

    def _find_simple(self, rows: Sequence[RowPieces]) -> list[tuple[int, int] | None]:
        """For each micro-batch, the (dataset, shard) of which all its rows are complete windows, or None."""
        starts = [r.dataset.token_start for r in rows]
        whole = self.run_length == self.block_size
        shard, base = np.empty_like(self.run_row), np.empty_like(self.run_row)
        for d, start in enumerate(starts):
            mine = self.run_dataset == d
            shard[mine] = np.searchsorted(start, self.run_position[mine], side="right") - 1
            base[mine] = start[shard[mine]]
            whole[mine] &= self.run_position[mine] + self.block_size < start[shard[mine] + 1]
        self.run_inside = self.run_position - base
        same = np.append(True, (self.run_dataset[1:] == self.run_dataset[:-1]) & (shard[1:] == shard[:-1]))
        out: list[tuple[int, int] | None] = [None] * self.n_batches
        changes, others = np.cumsum(~same), np.cumsum(~whole)
        low, high = np.asarray(self.run_bounds[:-1]), np.asarray(self.run_bounds[1:])
        full = np.flatnonzero(high - low == self.batch_rows)
        a, b = low[full], high[full] - 1
        fine = (changes[a] == changes[b]) & (others[b] - others[a] == 0) & whole[a]
        a = a[fine]
        for batch, d, s in zip(full[fine].tolist(), self.run_dataset[a].tolist(), shard[a].tolist(), strict=True):
            out[batch] = d, s
        return out


def bucket(pieces: IntArray) -> IntArray:
    """The size of cu_seqlens for a number of pieces: the next of a few fixed sizes above it; never truncates.

    Fixed, since shapes that keep changing cost recompilations and memory; tight, since kernels launch thread blocks for
    empty pieces too: from 16 pieces on, less than a fifth are empty. benchmarks/boundaries.py measures other steps.
    """
    return _BUCKETS[np.searchsorted(_BUCKETS, pieces, side="right")]


class BatchReader:
    """Copies the tokens of planned micro-batches."""

    def __init__(self, rows: Sequence[Rows], sources: Sequence[TokenSource] | None, pin_memory: bool) -> None:
        self.rows, self.pin_memory = rows, pin_memory
        self.direct = sources is None
        self.sources = [r.dataset for r in rows] if sources is None else list(sources)
        self.dtype = np.result_type(*(r.dataset.dtype for r in rows))
        self.text = np.zeros((0, 0), dtype=self.dtype)
        self.windows: tuple[tuple[int, int], npt.NDArray[Any]] | None = None

    def read(self, plan: BatchPlan, batch: int) -> MicroBatch:
        n_rows, t = plan.batch_rows, plan.block_size
        simple = plan.simple[batch]
        if simple is not None and self.direct:
            a, b = plan.run_bounds[batch], plan.run_bounds[batch + 1]
            text = self.shard_windows(*simple, t + 1)[plan.run_inside[a:b]]  # (B, T + 1), in one call
        else:
            text = self.copy_runs(plan, batch)
        cu_seqlens = plan.cu_seqlens[batch]
        if self.pin_memory:
            tokens, targets = (torch.empty((n_rows, t), dtype=torch.int64, pin_memory=True) for _ in range(2))
            outputs = targets.numpy()
            tokens.numpy()[:] = text[:, :-1]
            outputs[:] = text[:, 1:]
            cu_seqlens = cu_seqlens.pin_memory()
        else:
            outputs = text[:, 1:].astype(np.int64)
            tokens, targets = torch.from_numpy(text[:, :-1].astype(np.int64)), torch.from_numpy(outputs)
        a, b = plan.silent_bounds[batch], plan.silent_bounds[batch + 1]
        outputs.reshape(-1)[plan.silent_columns[a:b]] = IGNORE_TARGET
        for row, filled in plan.pad_list[plan.pad_bounds[batch] : plan.pad_bounds[batch + 1]]:
            outputs[row, filled:] = IGNORE_TARGET
        a, b = plan.piece_bounds[batch], plan.piece_bounds[batch + 1]
        rows = slice(batch * n_rows, (batch + 1) * n_rows)
        spans = Spans(
            plan.batch_row[a:b],
            plan.dataset[a:b],
            plan.document[a:b],
            plan.start[a:b],
            plan.length[a:b],
            plan.targets[a:b],
            plan.numbers.window[rows],
            plan.numbers.sample[rows],
        )
        return MicroBatch(tokens, targets, cu_seqlens, spans, plan.n_targets[batch], plan.n_inputs[batch])

    def copy_runs(self, plan: BatchPlan, batch: int) -> npt.NDArray[Any]:
        """The rows and the token after each, (B, T + 1), copied run by run; padding is 0."""
        if self.text.shape != (plan.batch_rows, plan.block_size + 1):
            self.text = np.zeros((plan.batch_rows, plan.block_size + 1), dtype=self.dtype)
        text = self.text
        for row, filled in plan.pad_list[plan.pad_bounds[batch] : plan.pad_bounds[batch + 1]]:
            text[row, filled:] = 0
        runs = slice(plan.run_bounds[batch], plan.run_bounds[batch + 1])
        for row, dataset, column, start, end in zip(
            (plan.run_row[runs] - batch * plan.batch_rows).tolist(),
            plan.run_dataset[runs].tolist(),
            plan.run_column[runs].tolist(),
            plan.run_position[runs].tolist(),
            plan.run_end[runs].tolist(),
            strict=True,
        ):
            self.sources[dataset].copy_tokens(text[row, column : column + end - start], start, end)
        return text

    def shard_windows(self, dataset: int, shard: int, width: int) -> npt.NDArray[Any]:
        """Sliding windows of `width` tokens over a shard, as a view indexed by first token; caches the last shard."""
        if self.windows is None or self.windows[0] != (dataset, shard):
            of = self.rows[dataset].dataset
            tokens = of.tokens(*of.token_start[shard : shard + 2].tolist())
            self.windows = (dataset, shard), np.lib.stride_tricks.sliding_window_view(tokens, width)
        return self.windows[1]


def read_rows(rows: Rows, windows: IntArray, samples: IntArray, document_mask: bool) -> MicroBatch:
    """Read windows of a dataset as one micro-batch.

    Args:
        windows: int64 [B], window numbers; -1 gives a row of padding without targets.
        samples: int64 [B], their numbers in the run; only passed through.
        document_mask: if true, no target crosses a document's end; else the next document's first token is a target.
    """
    numbers = RowNumbers(np.where(windows >= 0, 0, -1), windows, samples)
    return BatchReader([rows], None, False).read(BatchPlan([rows], numbers, len(windows), document_mask), 0)
