"""Randomness of the order, compared with numpy's permutation; locality of the block shuffle."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from lit_data.loading.order import Order

SEEDS = 40


def statistics(windows: npt.NDArray[np.int64]) -> dict[str, float]:
    """Statistics of a permutation of n, each with mean 0 and variance 1 for a random one (n large).

    Spearman's rank correlation of position and value, of neighbours at several lags, and of positions with values
    modulo small numbers; the number of ascents; the share of values that stay in their half.
    """
    n = len(windows)
    centred = (windows - (n - 1) / 2) / np.sqrt((n * n - 1) / 12)
    position = (np.arange(n) - (n - 1) / 2) / np.sqrt((n * n - 1) / 12)
    found = {"rank correlation": float(position @ centred / np.sqrt(n))}
    for lag in (1, 2, 3, 4, 8, 64, 1024):
        found[f"serial, lag {lag}"] = float(centred[lag:] @ centred[:-lag] / np.sqrt(n))
    ascents = np.count_nonzero(np.diff(windows) > 0)
    found["ascents"] = float((ascents - (n - 1) / 2) / np.sqrt((n + 1) / 12))
    for modulus in (2, 3, 8):
        residue = windows % modulus
        residue = (residue - residue.mean()) / residue.std()
        found[f"serial of residues mod {modulus}"] = float(residue[1:] @ residue[:-1] / np.sqrt(n))
    half = np.count_nonzero(windows[: n // 2] < n // 2)
    found["stay in their half"] = float((half - n / 4) / np.sqrt(n / 16))
    return found


def mean_squares(orders: list[npt.NDArray[np.int64]]) -> dict[str, float]:
    """The mean square of each statistic over the orders: about 1, chi-squared with SEEDS degrees of freedom."""
    each = [statistics(o) for o in orders]
    return {name: float(np.mean([e[name] ** 2 for e in each])) for name in each[0]}


@pytest.mark.parametrize("n", [10_007, 65_536, 100_001])
def test_order_is_as_random_as_numpys(n):
    everything = np.arange(n, dtype=np.int64)
    ours = [Order(n, seed=s // 2, dataset=0).locate(everything + s % 2 * n)[1] for s in range(SEEDS)]
    numpys = [np.random.default_rng(s).permutation(n) for s in range(SEEDS)]
    # chi-squared with 40 degrees of freedom is within [0.34, 2.1] times its mean, except for 1 in 10^4.
    for orders in (ours, numpys):
        for name, value in mean_squares(orders).items():
            assert 0.34 < value < 2.1, f"{name}: mean square {value:.2f}"


def test_epochs_and_seeds_are_independent():
    n = 50_021
    everything = np.arange(n, dtype=np.int64)
    orders = [Order(n, seed=s).locate(everything + e * n)[1] for s in (0, 1, 2) for e in (0, 1, 2)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            correlation = np.corrcoef(a, b)[0, 1] * np.sqrt(n)
            assert abs(correlation) < 4.5 and np.count_nonzero(a == b) < 12  # expected: 1


def test_statistics_detect_bad_orders():
    n = 10_007
    random = np.random.default_rng(0).permutation(n)
    assert abs(statistics(np.arange(n))["rank correlation"]) > 50
    assert abs(statistics((np.arange(n) * 5003) % n)["serial, lag 2"]) > 50
    swapped = np.sort(random[:-1].reshape(-1, 2), axis=1).reshape(-1)
    assert abs(statistics(swapped)["ascents"]) > 20


def test_order_with_blocks_is_local_and_random_inside_a_group():
    """It reads from one group's blocks at a time; within them the windows are as random as the blocks allow."""
    block, group = 128, 32
    order = Order(100_003, seed=3, block_windows=block, group_blocks=group)
    windows = order.locate(np.arange(order.n_windows, dtype=np.int64))[1]
    assert np.array_equal(np.sort(windows), np.arange(order.n_windows))
    # Any stretch as long as a group touches at most two groups' blocks; a random order touches nearly all blocks.
    stretch = block * group
    touched = [len(np.unique(windows[i : i + stretch] // block)) for i in range(0, order.n_windows - stretch, 997)]
    assert max(touched) <= 2 * group
    whole = Order(order.n_windows, seed=3).locate(np.arange(stretch, dtype=np.int64))[1]
    assert len(np.unique(whole // block)) > 700
    # Inside a group the order of blocks is random, and so is the position inside a block.
    inside = windows[:stretch]
    of_block = np.unique(inside // block, return_inverse=True)[1].astype(float)
    for values in (of_block, (inside % block).astype(float)):
        centred = (values - values.mean()) / values.std()
        for lag in (1, 2, 3, 7):
            assert abs(centred[lag:] @ centred[:-lag]) / np.sqrt(stretch) < 4.5
        assert abs(centred @ np.arange(stretch)) / (np.sqrt(stretch) * np.arange(stretch).std()) < 4.5


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 63, 64, 65, 200])
@pytest.mark.parametrize(("block", "group"), [(1, 1), (1, 5), (4, 1), (4, 3), (8, 4), (300, 2)])
def test_order_with_blocks_is_a_bijection(n, block, group):
    order = Order(n, seed=5, block_windows=block, group_blocks=group)
    samples = np.arange(3 * n, dtype=np.int64)
    epochs, windows = order.locate(samples)
    for epoch in range(3):
        assert sorted(windows[epochs == epoch].tolist()) == list(range(n))
    assert order.sample(epochs, windows).tolist() == samples.tolist()


@pytest.mark.parametrize("block", [512, 1000, 4096])
def test_order_with_blocks_of_ten_trillion_tokens(block):
    """5 * 10^9 windows: each sample is recovered from its window; samples on both sides of a group boundary differ."""
    n = 10**13 // 2048
    order = Order(n, seed=9, block_windows=block, group_blocks=64)
    samples = np.random.default_rng(0).integers(0, 4 * n, 2000)
    samples = np.unique(np.concatenate([samples, [0, n - 1, n, 2 * n - 1], np.arange(64 * block - 3, 64 * block + 3)]))
    epochs, windows = order.locate(samples)
    assert windows.min() >= 0 and windows.max() < n
    assert order.sample(epochs, windows).tolist() == samples.tolist()
