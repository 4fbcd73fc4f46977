"""The order of the windows: a keyed bijection, and the arithmetic of steps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_data.loading.order import (
    Order,
    Segment,
    first_sample_of_step,
    permute,
    round_keys,
    row_of,
    segment_of,
    steps_of_sample,
)


def one_epoch(order: Order, epoch: int) -> list[int]:
    samples = np.arange(order.n_windows, dtype=np.int64) + epoch * order.n_windows
    epochs, windows = order.locate(samples)
    assert (epochs == epoch).all()
    return windows.tolist()


@settings(deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**40), epoch=st.integers(0, 1000))
def test_each_epoch_is_a_permutation_and_has_an_inverse(n, seed, epoch):
    keys = round_keys(seed, 0, epoch)
    index = np.arange(n, dtype=np.int64)
    image = permute(index, n, keys)
    assert image.dtype == np.int64 and sorted(image.tolist()) == list(range(n))
    np.testing.assert_array_equal(permute(image, n, keys, inverse=True), index)
    np.testing.assert_array_equal(permute(permute(index, n, keys, inverse=True), n, keys), index)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 9, 255, 256, 257, 4096, 4097])
def test_small_and_boundary_sizes(n):
    for seed in range(20):
        assert sorted(one_epoch(Order(n, seed), 0)) == list(range(n))


@pytest.mark.parametrize("n", [10**13, 2**40, 2**40 + 1, 2**62])
def test_huge_sizes_by_spot_checks(n):
    keys = round_keys(3, 0, 0)
    index = np.unique(np.concatenate([np.arange(1000), n - 1 - np.arange(1000), np.arange(1, 1000) * (n // 1000)]))
    image = permute(index, n, keys)
    assert image.min() >= 0 and image.max() < n and len(np.unique(image)) == len(index)
    np.testing.assert_array_equal(permute(image, n, keys, inverse=True), index)
    # Spread over the whole domain: each tenth of it contains about a tenth of the images.
    shares = np.histogram(image / n, bins=10, range=(0, 1))[0] / len(image)
    assert (abs(shares - 0.1) < 0.04).all()


def test_order_depends_on_seed_dataset_and_epoch_only():
    n = 500
    base = one_epoch(Order(n, 1), 0)
    assert base == one_epoch(Order(n, 1), 0)
    others = [one_epoch(Order(n, 2), 0), one_epoch(Order(n, 1, dataset=1), 0), one_epoch(Order(n, 1), 1)]
    for other in others:
        assert sorted(other) == sorted(base)
        assert sum(a == b for a, b in zip(base, other, strict=True)) < 20  # one is expected to coincide by chance


def test_order_is_pinned():
    """These numbers are part of the format: tracing old runs depends on them."""
    assert one_epoch(Order(10, 0), 0) == [1, 4, 7, 8, 0, 3, 6, 2, 9, 5]
    assert Order(10**13, 7, 2).locate(np.asarray([0, 1, 10**13 + 5]))[1].tolist() == [
        3332711400286,
        6862988230717,
        4468367006694,
    ]


def test_a_call_does_not_depend_on_the_others_in_it():
    order = Order(777, 5)
    samples = np.random.default_rng(0).integers(0, 5 * 777, 200)
    epochs, windows = order.locate(samples)
    for i, sample in enumerate(samples):
        epoch, window = order.locate(np.asarray([sample]))
        assert (epoch[0], window[0]) == (epochs[i], windows[i])
    np.testing.assert_array_equal(order.sample(epochs, windows), samples)


def test_positions_are_shuffled_without_visible_structure():
    """Neighbours end up far apart, and the first positions are distributed evenly over the windows."""
    n = 1000
    steps = np.abs(np.diff(one_epoch(Order(n, 0), 0)))
    assert abs(steps.mean() - n / 3) < 4 * n * np.sqrt(1 / 18 / n)  # mean of |x - y| of uniform draws, 4 sigma
    firsts = np.asarray([one_epoch(Order(16, seed), 0)[0] for seed in range(1600)])
    counts = np.bincount(firsts, minlength=16)
    assert ((counts - 100) ** 2 / 100).sum() < 45  # chi-square with 15 degrees of freedom, p about 1e-4


def test_unshuffled_order_is_the_corpus():
    order = Order(5, 9, shuffle=False)
    epochs, windows = order.locate(np.arange(12))
    assert windows.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    assert epochs.tolist() == [0] * 5 + [1] * 5 + [2] * 2
    np.testing.assert_array_equal(order.sample(epochs, windows), np.arange(12))


def test_no_windows_is_refused():
    with pytest.raises(ValueError, match="0 windows"):
        Order(0)


SEGMENTS = [Segment(0, 0, 4), Segment(5, 20, 6), Segment(8, 100, 2)]  # a new batch size, then samples skipped


def test_steps_of_segments():
    assert [first_sample_of_step(SEGMENTS, s) for s in (0, 1, 4, 5, 6, 7, 8, 9)] == [
        (0, 4), (4, 4), (16, 4), (20, 6), (26, 6), (32, 6), (100, 2), (102, 2)
    ]  # fmt: skip
    assert segment_of(SEGMENTS, 7) is SEGMENTS[1] and segment_of(list(reversed(SEGMENTS)), 8) is SEGMENTS[2]


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    batches=st.lists(st.integers(1, 7), min_size=5, max_size=5),
    gaps=st.lists(st.integers(-10, 10), min_size=5, max_size=5),
    n_steps=st.integers(0, 30),
)
def test_steps_of_sample_inverts_first_sample_of_step(lengths, batches, gaps, n_steps):
    """Compared with a table of all steps; segments may skip samples and may go back."""
    segments, step, sample = [], 0, 0
    for length, batch, gap in zip(lengths, batches, gaps, strict=False):
        segments.append(Segment(step, sample, batch))
        step, sample = step + length, max(0, sample + length * batch + gap)
    used: dict[int, list[tuple[int, int]]] = {}
    for s in range(n_steps):
        first, count = first_sample_of_step(segments, s)
        for row in range(count):
            used.setdefault(first + row, []).append((s, row))
    for sample in range(max(used, default=0) + 20):
        assert steps_of_sample(segments, sample, n_steps) == used.get(sample, [])


@pytest.mark.parametrize(("micro_batches", "world", "rows"), [(1, 1, 1), (3, 2, 4), (2, 4, 3), (5, 1, 2)])
def test_each_row_is_assigned_once(micro_batches, world, rows):
    dealt = [
        row_of(m, rank, row, world, rows) for m in range(micro_batches) for rank in range(world) for row in range(rows)
    ]
    assert sorted(dealt) == list(range(micro_batches * world * rows))
