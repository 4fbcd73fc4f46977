"""Hashes the tokens of a span for the record. Without torch, which the record does not need.

A multilinear hash (Carter and Wegman 1979): sum of (token[i] + 1) * key[i] mod 2^64 over the span. The keys are fixed,
odd, and drawn by SplitMix64. A change of one token is always detected, since odd keys are invertible.
Two spans not chosen to defeat these keys collide with probability at most 2^(v - 63), where 2^v divides all differences
of their tokens: usually 2^-63, at worst 2^-46 with ids below 2^17.
"""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

from lit_data.loading.order import mix64
from lit_data.packed.index import IntArray

_UintArray = npt.NDArray[np.uint64]


class _Keys:
    """Keys by position in a span, and their prefix sums; extended for the longest span seen."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.keys = self.sums = np.zeros(0, dtype=np.uint64)

    def get(self, n: int) -> tuple[_UintArray, _UintArray]:
        """At least the first n keys, and their prefix sums, from 0."""
        with self.lock:
            if n > len(self.keys):
                positions = np.arange(1, 2 * n + 1, dtype=np.uint64)
                with np.errstate(over="ignore"):
                    self.keys = mix64(positions * np.uint64(0x9E3779B97F4A7C15)) | np.uint64(1)
                    self.sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(self.keys, dtype=np.uint64)])
            return self.keys, self.sums


_KEYS = _Keys()


def hash_spans(tokens: npt.NDArray[np.int64], lengths: IntArray) -> _UintArray:
    """Hash consecutive spans in a flat array of tokens.

    Args:
        tokens: int64 (N,), not negative.
        lengths: int64 (P,), at least 1 each; they sum to N.

    Returns:
        uint64 (P,).
    """
    if not len(lengths):
        return np.zeros(0, dtype=np.uint64)
    keys, sums = _KEYS.get(int(lengths.max()))
    products = np.concatenate([keys[:n] for n in lengths.tolist()])  # one copy; indexing costs five times that
    products *= tokens.view(np.uint64)
    found: _UintArray = np.add.reduceat(products, np.cumsum(lengths) - lengths)
    return found + sums[lengths]
