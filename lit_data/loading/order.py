"""Maps sample numbers to windows. Integers only: no files, no ranks, no state.

The order of a run is a pure function of the seed and the number of windows. A keyed bijection permutes the windows of
an epoch, so any sample is found without an index and any window is traced back to its sample without a scan.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lit_data.packed.index import IntArray

_UintArray = npt.NDArray[np.uint64]

ROUNDS = 6  # even, so that unequal halves of the Feistel network end in their original positions


def round_keys(seed: int, *labels: int | str) -> _UintArray:
    """The Feistel keys of one permutation, (ROUNDS,) uint64, drawn from SHA-512.

    Args:
        labels: identify the permutation in the run: (dataset, epoch) for the windows of an epoch, longer for others.
    """
    text = ":".join(map(str, ("llammlein-order-1", seed, *labels)))
    return np.frombuffer(hashlib.sha512(text.encode()).digest(), dtype="<u8")[:ROUNDS].astype(np.uint64)


def mix64(x: _UintArray) -> _UintArray:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): a bijection on 64 bits with full avalanche."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _feistel(x: _UintArray, bits: int, keys: _UintArray, inverse: bool) -> _UintArray:
    """A keyed bijection on [0, 2^bits) by a Feistel network whose halves may differ by one bit."""
    low_bits = np.uint64(bits // 2)
    high_bits = np.uint64(bits - bits // 2)
    low_mask = (np.uint64(1) << low_bits) - np.uint64(1)
    high_mask = (np.uint64(1) << high_bits) - np.uint64(1)
    high, low = x >> low_bits, x & low_mask
    # Even rounds change `high` by a function of `low`, odd rounds the reverse: each round is its own inverse.
    order = range(ROUNDS - 1, -1, -1) if inverse else range(ROUNDS)
    for i in order:
        if i % 2 == 0:
            high = high ^ (mix64(low + keys[i]) & high_mask)
        else:
            low = low ^ (mix64(high + keys[i]) & low_mask)
    return (high << low_bits) | low


def permute(index: IntArray, n: int, keys: _UintArray, inverse: bool = False) -> IntArray:
    """Apply a keyed permutation of [0, n), or its inverse, to an array of indices.

    Cycle walking (Black and Rogaway 2002): the network acts on the next power of two; an image outside [0, n) is mapped
    again until it is inside; fewer than two applications are needed on average.

    Args:
        index: int64, any shape, values in [0, n).
        n: size of the domain, up to 2^62.
        keys: from `round_keys`; or (ROUNDS, ...) broadcastable with `index`, if n is a power of two.
    """
    assert keys.ndim == 1 or n & (n - 1) == 0
    bits = max(2, int(n - 1).bit_length())
    with np.errstate(over="ignore"):
        x = _feistel(index.astype(np.uint64), bits, keys, inverse)
        outside = x >= np.uint64(n)
        while outside.any():
            x[outside] = _feistel(x[outside], bits, keys, inverse)
            outside = x >= np.uint64(n)
    return x.astype(np.int64)


@dataclass(frozen=True)
class Order:
    """The order of the windows of one dataset.

    With `block_windows` the shuffle has two levels, which keeps reads local: blocks of that many contiguous windows are
    permuted, each `group_blocks` consecutive blocks of that order form a group, and the windows of a group are
    permuted. A run then reads from `group_blocks` regions of the corpus at a time. The last block may be short; offsets
    after its position shift by the missing windows, so no padding or lookup is needed.

    Attributes:
        n_windows: windows in the dataset.
        seed: the run's seed.
        dataset: number of the dataset in the run; part of the key.
        shuffle: False keeps the order of the corpus (validation).
        block_windows: windows per block; 0 shuffles all windows at once.
        group_blocks: blocks per group.
    """

    n_windows: int
    seed: int = 0
    dataset: int = 0
    shuffle: bool = True
    block_windows: int = 0
    group_blocks: int = 64

    def __post_init__(self) -> None:
        if self.n_windows < 1:
            raise ValueError(f"the dataset has {self.n_windows} windows; at least one is needed")
        assert self.block_windows >= 0 and self.group_blocks >= 1

    def locate(self, samples: IntArray) -> tuple[IntArray, IntArray]:
        """Sample numbers -> (epoch, window), each int64 of the same shape."""
        epochs, rest = np.divmod(samples, self.n_windows)
        return epochs, self._map(epochs, rest, inverse=False)

    def sample(self, epochs: IntArray, windows: IntArray) -> IntArray:
        """(epoch, window) -> sample number: the inverse of `locate`."""
        return epochs * self.n_windows + self._map(epochs, windows, inverse=True)

    def _map(self, epochs: IntArray, index: IntArray, inverse: bool) -> IntArray:
        if not self.shuffle:
            return index
        out = np.empty_like(index)
        for epoch in _distinct(epochs):
            here = epochs == epoch
            if self.block_windows == 0:
                keys = round_keys(self.seed, self.dataset, epoch)
                out[here] = permute(index[here], self.n_windows, keys, inverse)
            else:
                levels = _TwoLevels(self, epoch)
                out[here] = levels.rank(index[here]) if inverse else levels.window(index[here])
        return out


class _TwoLevels:
    """One epoch of an order with blocks. A window's position in the order is its `rank`, a block's its `turn`."""

    def __init__(self, order: Order, epoch: int) -> None:
        self.order, self.epoch, self.size = order, epoch, order.block_windows
        self.n_blocks = -(-order.n_windows // self.size)
        self.lack = self.n_blocks * self.size - order.n_windows  # windows missing from the last block
        self.keys = round_keys(order.seed, order.dataset, epoch)
        last = np.asarray([self.n_blocks - 1], dtype=np.int64)
        self.short = int(permute(last, self.n_blocks, self.keys, inverse=True)[0])  # the last block's turn

    def first_of(self, turns: IntArray) -> IntArray:
        """Windows before the blocks with these turns."""
        return turns * self.size - np.where(turns > self.short, self.lack, 0)

    def turn_of(self, offsets: IntArray) -> IntArray:
        """The turns of the blocks at these offsets, counted over the permuted blocks' windows."""
        behind = offsets >= (self.short + 1) * self.size - self.lack
        return (offsets + np.where(behind, self.lack, 0)) // self.size

    def shuffled(self, offsets: IntArray, inverse: bool) -> IntArray:
        """Permute offsets within each group."""
        groups = self.turn_of(offsets) // self.order.group_blocks
        out = np.empty_like(offsets)
        for group in _distinct(groups):
            here = groups == group
            turns = np.minimum(np.asarray([group, group + 1]) * self.order.group_blocks, self.n_blocks)
            first, end = self.first_of(turns).tolist()
            keys = round_keys(self.order.seed, self.order.dataset, self.epoch, group)
            out[here] = first + permute(offsets[here] - first, end - first, keys, inverse)
        return out

    def window(self, ranks: IntArray) -> IntArray:
        """Ranks in the epoch -> windows."""
        offsets = self.shuffled(ranks, inverse=False)
        turns = self.turn_of(offsets)
        return permute(turns, self.n_blocks, self.keys) * self.size + offsets - self.first_of(turns)

    def rank(self, windows: IntArray) -> IntArray:
        """Windows -> ranks in the epoch: the inverse of `window`."""
        blocks, inside = np.divmod(windows, self.size)
        turns = permute(blocks, self.n_blocks, self.keys, inverse=True)
        return self.shuffled(self.first_of(turns) + inside, inverse=True)


def _distinct(values: IntArray) -> list[int]:
    """The distinct values; fast for the usual case of a single one."""
    if not values.size:
        return []
    low, high = int(values.min()), int(values.max())
    return [low] if low == high else list(np.unique(values).tolist())


@dataclass(frozen=True)
class Segment:
    """From `from_step` on, step t consists of samples `first_sample + (t - from_step) * global_batch ...`."""

    from_step: int
    first_sample: int
    global_batch: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_segments(segments: Sequence[Segment]) -> None:
    """Check segments read from a file. Raises ValueError unless they start at step 0 and ascend."""
    steps = [s.from_step for s in segments]
    if not steps or steps[0] != 0 or steps != sorted(steps):
        raise ValueError(f"segments begin at steps {steps!r:.80}")
    if any(s.first_sample < 0 or not 1 <= s.global_batch < 1 << 31 for s in segments):
        raise ValueError("a segment begins at a negative sample, or its steps hold no samples")


def segment_of(segments: Sequence[Segment], step: int) -> Segment:
    """The segment of `step`: the last one that starts at or before it."""
    return max((s for s in segments if s.from_step <= step), key=lambda s: s.from_step)


def first_sample_of_step(segments: Sequence[Segment], step: int) -> tuple[int, int]:
    """(first sample, number of samples) of a step."""
    s = segment_of(segments, step)
    return s.first_sample + (step - s.from_step) * s.global_batch, s.global_batch


def steps_of_sample(segments: Sequence[Segment], sample: int, n_steps: int) -> list[tuple[int, int]]:
    """All (step, row) below `n_steps` that used a sample; empty if it was skipped or is still to come."""
    found = []
    ordered = sorted(segments, key=lambda s: s.from_step)
    for i, s in enumerate(ordered):
        end = ordered[i + 1].from_step if i + 1 < len(ordered) else n_steps
        offset = sample - s.first_sample
        if offset >= 0 and s.from_step + offset // s.global_batch < min(end, n_steps):
            found.append((s.from_step + offset // s.global_batch, offset % s.global_batch))
    return found


def row_of(micro_batch: int, rank: int, row: int, world_size: int, micro_batch_samples: int) -> int:
    """Row of the step for (micro-batch, data-parallel rank, row of the micro-batch). The loader's fixed rule."""
    return (micro_batch * world_size + rank) * micro_batch_samples + row
