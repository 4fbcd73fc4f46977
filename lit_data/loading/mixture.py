"""Mixes datasets by weight: sample number -> (dataset, epoch, window). Integers only, as in order.py.

The samples of a run are cut into blocks of BLOCK. A block holds a fixed number of rows of each dataset, its quota, in
an order permuted by a key of (seed, phase, block); the n-th row of a dataset in the run is the n-th of its own order.
The rows of each dataset among the first s samples are therefore a product plus a count in one block.

Each phase has its own quotas. Its blocks start at its first sample, which truncates the previous phase's last block.

Dimensions: `D` datasets, `P` phases, `S` requested samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from lit_data.loading.order import ROUNDS, Order, permute, round_keys
from lit_data.packed.index import IntArray

BLOCK = 1024  # rows; a power of two. The resolution of the weights.
BLOCKS_AT_ONCE = 256  # blocks evaluated together: about 10 MB


def quotas(weights: Sequence[float]) -> tuple[int, ...]:
    """Rows of each dataset in a block, by the largest remainder method; they sum to BLOCK.

    Raises ValueError for weights that are negative, all zero, or so small that a dataset would get no row.
    """
    total = sum(weights)
    if not weights or min(weights) < 0 or not 0 < total < float("inf"):
        raise ValueError(f"weights {list(weights)}: none may be negative, and at least one must be positive")
    exact = [w / total * BLOCK for w in weights]
    whole = [int(x) for x in exact]
    order = sorted(range(len(exact)), key=lambda i: (whole[i] - exact[i], i))
    for i in order[: BLOCK - sum(whole)]:
        whole[i] += 1
    for w, q in zip(weights, whole, strict=True):
        if w > 0 and q == 0:
            raise ValueError(f"weight {w} of {total} gives less than half a row in {BLOCK}: make it larger, or 0")
    return tuple(whole)


@dataclass(frozen=True)
class Phase:
    """A phase: from `first_sample` on, each block holds `quotas[d]` rows of dataset d."""

    first_sample: int
    quotas: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"first_sample": self.first_sample, "quotas": list(self.quotas)}


@dataclass(frozen=True)
class Mixture:
    """The order of the samples of a run.

    Attributes:
        orders: the order of each dataset.
        phases: ascending; the first starts at sample 0.
        seed: of the run.
    """

    orders: tuple[Order, ...]
    phases: tuple[Phase, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        firsts = [p.first_sample for p in self.phases]
        assert firsts and firsts[0] == 0 and all(a < b for a, b in pairwise(firsts)), firsts
        assert all(len(p.quotas) == len(self.orders) and sum(p.quotas) == BLOCK for p in self.phases)

    @classmethod
    def single(cls, order: Order) -> Mixture:
        """A mixture of one dataset."""
        return cls((order,), (Phase(0, (BLOCK,)),), order.seed)

    @cached_property
    def _before(self) -> IntArray:
        """Rows of each dataset before each phase, (P, D)."""
        before = np.zeros((len(self.phases), len(self.orders)), dtype=np.int64)
        for p in range(1, len(self.phases)):
            length = self.phases[p].first_sample - self.phases[p - 1].first_sample
            before[p] = before[p - 1] + self._counts_in_phase(p - 1, length)
        return before

    def counts(self, samples: int) -> IntArray:
        """Rows of each dataset among the first `samples` samples, int64 (D,)."""
        phase = self._phase_of(np.asarray([samples]))[0]
        inside = self._counts_in_phase(phase, samples - self.phases[phase].first_sample)
        out: IntArray = self._before[phase] + inside
        return out

    def locate(self, samples: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        """Sample numbers, int64 (S,) -> (dataset, epoch, window), int64 (S,) each."""
        if len(self.orders) == 1:
            return np.zeros_like(samples), *self.orders[0].locate(samples)
        dataset, row = np.empty_like(samples), np.empty_like(samples)
        phases = self._phase_of(samples)
        for phase in np.unique(phases).tolist():
            here = np.flatnonzero(phases == phase)
            block, offset = np.divmod(samples[here] - self.phases[phase].first_sample, BLOCK)
            distinct, which = np.unique(block, return_inverse=True)
            for first in range(0, len(distinct), BLOCKS_AT_ONCE):
                chosen = distinct[first : first + BLOCKS_AT_ONCE]
                inside = (which >= first) & (which < first + len(chosen))
                of, rank = self._blocks(phase, chosen)
                at = which[inside] - first, offset[inside]
                d = of[at]
                dataset[here[inside]] = d
                row[here[inside]] = (
                    self._before[phase, d] + block[inside] * np.asarray(self.phases[phase].quotas)[d] + rank[at]
                )
        epoch, window = np.empty_like(samples), np.empty_like(samples)
        for d, order in enumerate(self.orders):
            here = np.flatnonzero(dataset == d)
            if len(here):
                epoch[here], window[here] = order.locate(row[here])
        return dataset, epoch, window

    def sample(self, dataset: int, epochs: IntArray, windows: IntArray) -> IntArray:
        """(epoch, window) of a dataset, int64 (S,) each -> sample numbers, -1 for windows never reached; the inverse of
        `locate`.
        """
        rows = self.orders[dataset].sample(epochs, windows)
        if len(self.orders) == 1:
            return rows
        before = self._before[:, dataset]
        # Of phases that start at the same count, only the last holds rows of the dataset.
        phases = np.searchsorted(before, rows, side="right") - 1
        out = np.full_like(rows, -1)
        for phase in np.unique(phases).tolist():
            quota = self.phases[phase].quotas[dataset]
            if quota == 0:
                continue
            here = np.flatnonzero(phases == phase)
            block, rank = np.divmod(rows[here] - before[phase], quota)
            distinct, which = np.unique(block, return_inverse=True)
            for first in range(0, len(distinct), BLOCKS_AT_ONCE):
                chosen = distinct[first : first + BLOCKS_AT_ONCE]
                inside = (which >= first) & (which < first + len(chosen))
                of, _ = self._blocks(phase, chosen)
                offsets = np.nonzero(of == dataset)[1].reshape(len(chosen), quota)  # order of the rows of each block
                offset = offsets[which[inside] - first, rank[inside]]
                out[here[inside]] = self.phases[phase].first_sample + block[inside] * BLOCK + offset
        return out

    def _phase_of(self, samples: IntArray) -> IntArray:
        return np.searchsorted([p.first_sample for p in self.phases], samples, side="right") - 1

    def _counts_in_phase(self, phase: int, samples: int) -> IntArray:
        """Rows of each dataset among the first `samples` of a phase, ignoring its end."""
        blocks, rest = divmod(samples, BLOCK)
        counts = blocks * np.asarray(self.phases[phase].quotas, dtype=np.int64)
        if rest:
            of, _ = self._blocks(phase, np.asarray([blocks]))
            counts += np.bincount(of[0, :rest], minlength=len(self.orders))
        return counts

    def _blocks(self, phase: int, blocks: IntArray) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """For each position in some blocks, its dataset and the number of that dataset's rows before it in the block.

        Args:
            blocks: (K,), block numbers in the phase.

        Returns:
            int64 (K, BLOCK) each.
        """
        keys = np.stack([round_keys(self.seed, "mixture", phase, b) for b in blocks.tolist()], axis=1)
        offsets = np.broadcast_to(np.arange(BLOCK, dtype=np.int64), (len(blocks), BLOCK))
        slots = permute(offsets, BLOCK, keys.reshape(ROUNDS, len(blocks), 1))  # (K, BLOCK)
        bounds = np.cumsum(self.phases[phase].quotas)
        of = np.searchsorted(bounds, slots, side="right").astype(np.int64)
        rank = np.empty_like(of)
        for d in range(len(self.orders)):
            mine = of == d
            rank[mine] = (np.cumsum(mine, axis=1) - 1)[mine]
        return of, rank


def check_phases(phases: Sequence[Phase], datasets: int) -> None:
    """Check phases read from a file. Raises ValueError if they are impossible for this number of datasets."""
    firsts = [p.first_sample for p in phases]
    if not firsts or firsts[0] != 0 or firsts != sorted(set(firsts)):
        raise ValueError(f"phases begin at samples {firsts!r:.80}")
    if any(len(p.quotas) != datasets or min(p.quotas, default=-1) < 0 or sum(p.quotas) != BLOCK for p in phases):
        raise ValueError(f"the quotas of a phase do not share {BLOCK} rows among {datasets} datasets")


def phase_list(weights: Sequence[tuple[int, Sequence[float]]]) -> tuple[Phase, ...]:
    """[(first sample, weights)] -> phases. Raises ValueError if they do not ascend from 0, and as `quotas` does."""
    firsts = [first for first, _ in weights]
    if any(a >= b for a, b in pairwise(firsts)):
        raise ValueError(f"phases must begin at increasing samples; these begin at {firsts}")
    return tuple(Phase(first, quotas(w)) for first, w in weights)
