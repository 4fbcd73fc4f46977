"""The mixture, compared with a naive run through all samples and, for large sample numbers, with its own inverse."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_data.loading.mixture import BLOCK, Mixture, phase_list, quotas
from lit_data.loading.order import Order


def mixture_of(sizes: list[int], phases: list[tuple[int, list[float]]], seed: int = 7) -> Mixture:
    return Mixture(tuple(Order(n, seed, d) for d, n in enumerate(sizes)), phase_list(phases), seed)


@given(weights=st.lists(st.floats(0.2, 10), min_size=1, max_size=12))
def test_quotas_are_the_nearest_whole_shares(weights):
    found = quotas(weights)
    assert sum(found) == BLOCK
    for w, q in zip(weights, found, strict=True):
        assert abs(q - w / sum(weights) * BLOCK) < 1


@pytest.mark.parametrize("weights", [[], [-1.0, 2.0], [0.0, 0.0], [1.0, float("inf")], [1.0, 1e-9]])
def test_impossible_weights_are_refused(weights):
    with pytest.raises(ValueError, match="weight"):
        quotas(weights)


def test_phases_that_do_not_ascend_are_refused():
    with pytest.raises(ValueError, match="must begin at increasing samples"):
        phase_list([(0, [1]), (100, [1]), (100, [1])])


CASES = [
    ([5, 900], [(0, [1.0, 3.0])]),
    ([70, 11, 300], [(0, [0.5, 0.25, 0.25]), (1500, [0.1, 0.0, 0.9]), (2100, [1.0, 1.0, 1.0])]),
    ([40, 40], [(0, [1.0, 0.0]), (10, [0.0, 1.0]), (3000, [1.0, 1.0])]),
]


@pytest.mark.parametrize(("sizes", "phases"), CASES)
def test_a_mixture_is_exact(sizes, phases):
    """Each block has its quotas, each dataset is read in its own order, epoch by epoch, and no row is omitted."""
    mixture = mixture_of(sizes, phases)
    n = 6 * BLOCK + 77
    samples = np.arange(n, dtype=np.int64)
    dataset, epoch, window = mixture.locate(samples)
    for d, size in enumerate(sizes):
        mine = np.flatnonzero(dataset == d)
        expected_epochs, expected_windows = mixture.orders[d].locate(np.arange(len(mine), dtype=np.int64))
        assert epoch[mine].tolist() == expected_epochs.tolist() and window[mine].tolist() == expected_windows.tolist()
        for e in range(len(mine) // size):
            assert sorted(window[mine][epoch[mine] == e].tolist()) == list(range(size))
        assert mixture.sample(d, epoch[mine], window[mine]).tolist() == mine.tolist()
    firsts = [first for first, _ in phases] + [n]
    for (first, weights), end in zip(phases, firsts[1:], strict=True):
        for begin in range(first, end - BLOCK + 1, BLOCK):
            held = Counter(dataset[begin : begin + BLOCK].tolist())
            assert [held[d] for d in range(len(sizes))] == list(quotas(weights))
    for s in [0, 1, 9, 10, 11, 1499, 1500, 1501, 2100, 3000, n]:
        held = Counter(dataset[:s].tolist())
        assert mixture.counts(s).tolist() == [held[d] for d in range(len(sizes))]


def test_rows_that_are_never_drawn_have_no_sample():
    mixture = mixture_of([40, 40], [(0, [1.0, 1.0]), (BLOCK, [1.0, 0.0])])
    some = np.asarray([0, 3], dtype=np.int64)
    assert (mixture.sample(1, np.asarray([12, 12]), some) >= 0).all()  # 512 rows: 12 epochs and 32 rows
    assert (mixture.sample(1, np.asarray([13, 10**6]), some) == -1).all()


def test_a_call_does_not_depend_on_the_others_in_it():
    mixture = mixture_of(*CASES[1])
    samples = np.random.default_rng(0).integers(0, 5 * BLOCK, 400)
    together = np.stack(mixture.locate(samples))
    alone = np.concatenate([np.stack(mixture.locate(samples[i : i + 1])) for i in range(len(samples))], axis=1)
    assert np.array_equal(together, alone)


def test_a_block_is_mixed():
    """A dataset's rows are spread over the block, not all of one dataset first."""
    dataset, _, _ = mixture_of([10**6, 10**6], [(0, [1.0, 3.0])]).locate(np.arange(64 * BLOCK, dtype=np.int64))
    means = np.asarray([np.flatnonzero(block == 0).mean() for block in dataset.reshape(64, BLOCK)])
    assert abs(means.mean() - BLOCK / 2) < 10 and 5 < means.std() < 40  # for 256 random positions: 15.9
    assert len({tuple(block) for block in dataset.reshape(64, BLOCK).tolist()}) == 64


@settings(max_examples=25, deadline=None)
@given(
    weights=st.lists(st.floats(0.05, 1), min_size=2, max_size=4),
    other=st.integers(1, 10**10),
    seed=st.integers(0, 2**40),
    data=st.data(),
)
def test_large_sample_numbers_invert(weights, other, seed, data):
    """Datasets of up to 10^13 tokens, arbitrary samples, two phases."""
    sizes = [data.draw(st.integers(1, 10**13 // 2048)) for _ in weights]
    mixture = mixture_of(sizes, [(0, weights), (other, weights[::-1])], seed)
    samples = np.unique(
        np.asarray(data.draw(st.lists(st.integers(0, 10**12), min_size=1, max_size=20)), dtype=np.int64)
    )
    dataset, epoch, window = mixture.locate(samples)
    for d in range(len(sizes)):
        mine = dataset == d
        assert mixture.sample(d, epoch[mine], window[mine]).tolist() == samples[mine].tolist()
        assert ((window[mine] >= 0) & (window[mine] < sizes[d])).all()
