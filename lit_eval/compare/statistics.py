"""Confidence intervals and paired tests over the items of a task.

Every resample comes from a seeded generator: the same items give the same numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

RESAMPLES = 10_000
FEW_ITEMS = 12  # up to here all sign flips are counted; a bootstrap of so few items is far too certain
CONFIDENCE = 0.95
DISTINCT = 64  # values; with at most this many, a resample is one multinomial draw of their counts
CHUNK = 1 << 22  # items drawn at a time otherwise: 32 MB


@dataclass(frozen=True)
class Interval:
    """A mean and its bootstrap confidence interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedTest:
    """Two models on the same items.

    Attributes:
        test: `McNemar exact` where every item is right or wrong, else `paired bootstrap`, or of few items `sign flips`.
        n: items.
        difference: mean of the first minus mean of the second, with its 95 % interval.
        no_interval: why the interval has no width, if the differences do not vary; else "".
        p: two-sided p-value of "no difference".
        wins, losses: items on which the first is better, or worse.
    """

    test: str
    n: int
    difference: Interval
    p: float
    wins: int
    losses: int
    no_interval: str = ""


def bootstrap_means(values: FloatArray, resamples: int = RESAMPLES, seed: int = 0) -> FloatArray:
    """Means of resamples with replacement: float64 [resamples]. Raises ValueError for no values, or non-finite ones.

    With few distinct values (right or wrong; better, equal, worse) the counts of a resample are drawn from the
    multinomial distribution that drawing its items one by one would give, in a time independent of their number.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"a bootstrap needs finite values, at least one; got {len(values)} of shape {values.shape}")
    rng = np.random.default_rng(seed)
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) <= DISTINCT:
        drawn = rng.multinomial(len(values), counts / len(values), size=resamples)
        means: FloatArray = drawn @ distinct / len(values)
        return means
    means = np.empty(resamples)
    step = max(1, CHUNK // len(values))
    for at in range(0, resamples, step):
        some = rng.integers(len(values), size=(min(step, resamples - at), len(values)))
        means[at : at + step] = values[some].mean(axis=1)
    return means


def bootstrap_interval(values: FloatArray, seed: int = 0) -> Interval:
    """95 % percentile bootstrap of the mean (Efron and Tibshirani 1993, chapter 13). Raises as `bootstrap_means`."""
    low, high = np.quantile(bootstrap_means(values, seed=seed), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(np.mean(values)), float(low), float(high))


def without_interval(values: FloatArray) -> str:
    """Why a bootstrap of these values would give an interval of no width; "" where they vary."""
    if len(values) == 1:
        return "one item: no interval"
    return "all items equal: no interval" if len(np.unique(values)) == 1 else ""


def mcnemar_exact(wins: int, losses: int) -> float:
    """Two-sided exact McNemar test: of `wins + losses` items that only one of two models gets right, each is equally
    likely to be either's. p = min(1, 2 P(X <= min(wins, losses))), X ~ Binomial(wins + losses, 1/2)."""
    if wins < 0 or losses < 0:
        raise ValueError(f"McNemar's test takes counts; got {wins} and {losses}")
    n, k = wins + losses, min(wins, losses)
    if n < 1000:
        return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / (1 << n))
    log_terms = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(k + 1)]
    top = max(log_terms)
    log_sum = top + math.log(math.fsum(math.exp(term - top) for term in log_terms))
    return min(1.0, 2 * math.exp(log_sum - n * math.log(2)))


def bootstrap_p(differences: FloatArray, seed: int = 0) -> float:
    """Two-sided p-value of "the mean difference is 0": the share of resamples of the centred differences whose mean is
    at least as far from 0 (Efron and Tibshirani 1993, section 16.4), with one added to both counts, so never 0."""
    differences = np.asarray(differences, dtype=np.float64)
    observed = float(np.mean(differences))
    centred = bootstrap_means(differences - observed, seed=seed)
    tolerance = 1e-12 * max(1.0, float(np.abs(differences).max()))
    as_far = int(np.count_nonzero(np.abs(centred) >= abs(observed) - tolerance))
    return (1 + as_far) / (RESAMPLES + 1)


def sign_flip_p(differences: FloatArray) -> float:
    """Two-sided exact randomisation test of "the mean difference is 0" (Fisher 1935, section 21): the share of all
    assignments of signs to n differences whose mean is at least as far from 0; at least 2 / 2^n."""
    differences = np.asarray(differences, dtype=np.float64)
    signs = 1 - 2 * ((np.arange(1 << len(differences))[:, None] >> np.arange(len(differences))) & 1)  # (2^n, n)
    tolerance = 1e-12 * max(1.0, float(np.abs(differences).max()))
    return float(np.mean(np.abs(signs @ differences) >= abs(differences.sum()) - tolerance))


def paired_test(first: FloatArray, second: FloatArray, seed: int = 0, *, lower_is_better: bool = False) -> PairedTest:
    """Compare two models item by item. Raises ValueError if they do not have the same number of items."""
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"a paired test needs the same items; got {len(first)} and {len(second)}")
    differences = first - second
    wins, losses = int(np.sum(differences > 0)), int(np.sum(differences < 0))
    if lower_is_better:
        wins, losses = losses, wins
    interval = bootstrap_interval(differences, seed=seed)
    right_or_wrong = bool(np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all())
    if right_or_wrong:
        test, p = "McNemar exact", mcnemar_exact(wins, losses)
    elif len(first) <= FEW_ITEMS:
        test, p = "sign flips", sign_flip_p(differences)
    else:
        test, p = "paired bootstrap", bootstrap_p(differences, seed=seed)
    return PairedTest(test, len(first), interval, p, wins, losses, without_interval(differences))


def holm(p_values: list[float]) -> list[float]:
    """p-values adjusted for several tests at once (Holm 1979), in the order given."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
