"""Deduplication: the Bloom filter against exact hashing, the join of all hashes, the hashing of paragraphs.

    python benchmarks/dedup.py --corpus PATH --paragraphs 10000000 --json FILE

Each measurement runs in a process of its own, so that its peak memory is its own. The synthetic stream has one repeated
paragraph in four, at random places before; paragraphs stand there as their hashes.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from lit_data.corpus.bloom import BloomDedup, bloom_bytes, bloom_rate
from lit_data.corpus.exact_dedup import HashWriter, find_duplicates
from lit_data.corpus.near_dedup import SignatureWriter, find_near_duplicates, signatures
from lit_data.corpus.paragraphs import hash_paragraphs
from lit_data.corpus.readers import read_documents

BLOCK = 1 << 16
PARAGRAPHS_PER_DOCUMENT = 20
PARTS = 4


def stream(paragraphs: int, seed: int = 0) -> Iterator[list[bytes]]:
    """Hashes of 16 bytes in blocks; a quarter of them occurred before."""
    rng = np.random.default_rng(seed)
    made = 0  # different ones
    for start in range(0, paragraphs, BLOCK):
        n = min(BLOCK, paragraphs - start)
        repeated = (rng.random(n) < 0.25) & (made > 0)
        numbers = np.where(repeated, rng.integers(0, max(made, 1), n), made + np.cumsum(~repeated) - 1)
        made += int((~repeated).sum())
        yield scramble(numbers)


def scramble(numbers: np.ndarray[Any, Any]) -> list[bytes]:
    """Different hashes for different numbers: two rounds of splitmix64's finaliser."""
    words = np.empty((len(numbers), 2), np.uint64)
    for column, salt in enumerate((0x9E3779B97F4A7C15, 0xD1B54A32D192ED03)):
        x = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(salt)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        words[:, column] = x ^ (x >> np.uint64(31))
    data = words.tobytes()
    return [data[i : i + 16] for i in range(0, len(data), 16)]


def measure_bloom(paragraphs: int, rate: float) -> dict[str, Any]:
    """The filter over the stream, beside a set of all hashes that knows the truth."""
    different = sum(len(block) for block in stream(paragraphs)) - count_repeated(paragraphs)
    before = resident_bytes()
    bloom = BloomDedup(different, rate)
    seconds = 0.0
    truth: set[bytes] = set()
    wrong = missed = new = 0
    for block in stream(paragraphs):
        began = time.perf_counter()
        answers = [bloom.seen(h) for h in block]
        seconds += time.perf_counter() - began
        for h, seen in zip(block, answers, strict=True):
            known = h in truth
            new += not known
            wrong += seen and not known
            missed += known and not seen
            truth.add(h)
    # Paragraphs that never came, asked of the full filter: each added one fills it by less than a part in a million.
    trials = 100_000
    fresh = scramble(np.arange(trials) + 2**40)
    wrong_when_full = sum(bloom.seen(h) for h in fresh)
    k, n = bloom.n_hashes, different
    steps = np.linspace(0, n, 1001)[:-1] + n / 2000
    return {
        "paragraphs": paragraphs,
        "different": different,
        "missed": missed,
        "false_positives": wrong / new,
        "false_positives_computed": float(np.mean([bloom_rate(s, bloom.size_bytes, k) for s in steps])),
        "false_positives_full": wrong_when_full / trials,
        "false_positives_full_computed": bloom_rate(n, bloom.size_bytes, k),
        "standard_error_full": math.sqrt(rate / trials),
        "bytes_computed": bloom_bytes(different, rate),
        "bytes_grown": resident_bytes() - before - sys.getsizeof(truth) - len(truth) * sys.getsizeof(bytes(16)),
        "million_paragraphs_per_s": paragraphs / seconds / 1e6,
    }


def count_repeated(paragraphs: int) -> int:
    """Paragraphs of the stream that occurred before."""
    truth: set[bytes] = set()
    repeated = 0
    for block in stream(paragraphs):
        for h in block:
            repeated += h in truth
            truth.add(h)
    return repeated
