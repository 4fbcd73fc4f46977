"""Deduplication by a Bloom filter (Bloom, 1970), for corpora whose paragraph hashes do not fit: one pass, in order.

A filter never misses a paragraph it has seen, but reports some new ones as seen: a fraction `false_positive_rate` once
the expected number has been added, fewer before, more after.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from lit_files.platform import memory_bytes
from lit_files.publish import replace_file

HEADER_BYTES = 8  # header of a saved filter: the number of hash functions


def bloom_bytes(expected_paragraphs: int, false_positive_rate: float) -> int:
    """Size of a filter: n ln(1/p) / ln(2)^2 bits, in whole bytes; 1.8 bytes per paragraph for p = 0.001."""
    bits = -expected_paragraphs * math.log(false_positive_rate) / math.log(2) ** 2
    return max(1, math.ceil(int(bits) / 8))  # as rbloom rounds


def bloom_rate(paragraphs: float, size_bytes: int, n_hashes: int) -> float:
    """The false positive rate after adding this many distinct paragraphs: (1 - exp(-k n / m))^k."""
    return float((1 - math.exp(-n_hashes * paragraphs / (8 * size_bytes))) ** n_hashes)


def _as_integer(paragraph_hash: bytes) -> int:
    return int.from_bytes(paragraph_hash, "big", signed=True)  # rbloom needs 128 bits, the same in every process


class BloomDedup:
    """Detects repeated paragraphs in constant memory.

    Args:
        expected_paragraphs: number of distinct paragraphs.
        false_positive_rate: at that number, below 0.5. The number of hash functions is rounded down, which makes the
            rate a little higher (0.00102 for 0.001, 0.33 for 0.3).
        path: a saved filter to continue from.

    Raises:
        ValueError: the number or the rate is impossible, the file is not a filter of this size, or rbloom is missing.
    """

    def __init__(self, expected_paragraphs: int, false_positive_rate: float, path: Path | None = None) -> None:
        try:
            import rbloom
        except ImportError as error:
            raise ValueError("--dedup bloom needs the package rbloom: pip install 'llammlein[data]'") from error
        if expected_paragraphs < 1:
            raise ValueError(f"--bloom_paragraphs {expected_paragraphs}: at least 1 is needed")
        if not 0 < false_positive_rate < 0.5:
            raise ValueError(f"--bloom_false_positives {false_positive_rate}: give a rate above 0 and below 0.5")
        self.size_bytes = bloom_bytes(expected_paragraphs, false_positive_rate)
        if self.size_bytes > (most := memory_bytes()):  # the library aborts the process when asked for more
            raise ValueError(
                f"--bloom_paragraphs {expected_paragraphs} with --bloom_false_positives {false_positive_rate} takes "
                f"{self.size_bytes / 2**30:,.0f} GB of memory, and this machine has {most / 2**30:,.0f}"
            )
        self.n_hashes = int(-math.log2(false_positive_rate))
        self._rbloom = rbloom
        if path is None:
            self._filter = rbloom.Bloom(expected_paragraphs, false_positive_rate, _as_integer)
        else:
            self.load(path)
        assert self._filter.size_in_bits == 8 * self.size_bytes, "rbloom computes sizes in another way"

    def seen(self, paragraph_hash: bytes) -> bool:
        """Whether the paragraph (by its 16-byte hash) was seen before; also adds it."""
        if paragraph_hash in self._filter:
            return True
        self._filter.add(paragraph_hash)
        return False

    def rate(self) -> float:
        """The current false positive rate, from an estimate of the paragraphs added. Reads the entire filter."""
        return bloom_rate(self._filter.approx_items, self.size_bytes, self.n_hashes)

    def save(self, path: Path) -> None:
        """Write the filter, `size_bytes` + 8 bytes, atomically and durably."""
        with replace_file(path) as temporary:
            self._filter.save(str(temporary))

    def load(self, path: Path) -> None:
        """Load a saved filter, which must have been made for the same number and rate."""
        expected = self.size_bytes + HEADER_BYTES
        if not path.is_file():
            raise FileNotFoundError(f"{path}: the Bloom filter is missing; start again with --fresh")
        if os.path.getsize(path) != expected:
            raise ValueError(
                f"{path} has {os.path.getsize(path)} bytes, a Bloom filter for the --bloom_paragraphs and "
                f"--bloom_false_positives given has {expected}: it is damaged or belongs to another preparation"
            )
        with open(path, "rb") as file:
            n_hashes = int.from_bytes(file.read(HEADER_BYTES), "little")
        if abs(n_hashes - self.n_hashes) > 1:  # for powers of 1/2 the result depends on float rounding
            raise ValueError(f"{path} is damaged or no Bloom filter: {n_hashes} hash functions, not {self.n_hashes}")
        self.n_hashes = n_hashes
        self._filter = self._rbloom.Bloom.load(str(path), _as_integer)
