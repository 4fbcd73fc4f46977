"""The Bloom filter: its size, its false positives, and saving and reloading it."""

from __future__ import annotations

import hashlib
import math
import sys
from pathlib import Path

import pytest

from lit_data.prepare.bloom import HEADER_BYTES, BloomDedup, bloom_bytes, bloom_rate


def hashes(start: int, stop: int) -> list[bytes]:
    return [hashlib.blake2b(str(n).encode(), digest_size=16).digest() for n in range(start, stop)]


def test_no_false_negatives() -> None:
    bloom = BloomDedup(5000, 1e-6)
    assert not any(bloom.seen(h) for h in hashes(0, 5000))
    assert all(bloom.seen(h) for h in hashes(0, 5000))


@pytest.mark.parametrize("expected, rate", [(1000, 0.1), (20_000, 0.01), (30_000, 0.001)])
def test_false_positives_and_size_are_as_computed(expected: int, rate: float, tmp_path: Path) -> None:
    bloom = BloomDedup(expected, rate)
    for h in hashes(0, expected):
        bloom.seen(h)
    bloom.save(tmp_path / "bloom.bin")
    assert bloom.size_bytes == bloom_bytes(expected, rate) == (tmp_path / "bloom.bin").stat().st_size - HEADER_BYTES
    computed = bloom_rate(expected, bloom.size_bytes, bloom.n_hashes)
    assert rate <= computed <= 1.1 * rate
    assert bloom.rate() == pytest.approx(computed, rel=0.1)
    # `seen` also adds its arguments: a fresh copy for each small batch keeps that from affecting the count.
    trials, few, found = 10_000, expected // 50, 0
    for start in range(10**6, 10**6 + trials, few):
        copy = BloomDedup(expected, rate, tmp_path / "bloom.bin")
        found += sum(copy.seen(h) for h in hashes(start, start + few))
    assert found / trials == pytest.approx(computed, abs=5 * math.sqrt(computed / trials))


def test_the_size_in_closed_form() -> None:
    # 14.3776 bits each for 0.1%: 1.8 GB for 10^9 paragraphs.
    assert bloom_bytes(10**9, 0.001) == pytest.approx(1.7972e9, rel=1e-4)
    assert bloom_bytes(1, 0.4) == 1


def test_a_rate_that_is_a_power_of_one_half_survives_saving(tmp_path: Path) -> None:
    for power in range(2, 30):  # rbloom's number of hash functions is this or one less
        BloomDedup(1000, 0.5**power).save(tmp_path / "bloom.bin")
        assert BloomDedup(1000, 0.5**power, tmp_path / "bloom.bin").n_hashes in (power - 1, power)


def test_a_reloaded_filter_behaves_like_one_never_saved(tmp_path: Path) -> None:
    stream = hashes(0, 3000) + hashes(1500, 4500)
    whole = BloomDedup(1500, 0.05)  # too small on purpose: many false positives
    answers = [whole.seen(h) for h in stream]
    assert any(answers[:3000])

    first = BloomDedup(1500, 0.05)
    resumed_answers = [first.seen(h) for h in stream[:2500]]
    first.save(tmp_path / "bloom.bin")
    assert [p.name for p in tmp_path.iterdir()] == ["bloom.bin"]
    resumed = BloomDedup(1500, 0.05, tmp_path / "bloom.bin")
    resumed_answers += [resumed.seen(h) for h in stream[2500:]]
    assert resumed_answers == answers
    whole.save(tmp_path / "whole.bin")
    resumed.save(tmp_path / "resumed.bin")
    assert (tmp_path / "whole.bin").read_bytes() == (tmp_path / "resumed.bin").read_bytes()


def test_a_file_that_is_not_a_filter_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bloom.bin"
    BloomDedup(1000, 0.01).save(path)
    content = path.read_bytes()
    with pytest.raises(FileNotFoundError, match="other.bin"):
        BloomDedup(1000, 0.01, tmp_path / "other.bin")
    with pytest.raises(ValueError, match=rf"bloom.bin has {len(content)} bytes.*--bloom_paragraphs"):
        BloomDedup(1001, 0.01, path)
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"bloom.bin has {len(content) - 1} bytes.* has {len(content)}"):
        BloomDedup(1000, 0.01, path)
    path.write_bytes(b"\xff" * len(content))
    with pytest.raises(ValueError, match="bloom.bin is damaged"):
        BloomDedup(1000, 0.01, path)


@pytest.mark.parametrize(
    "paragraphs, rate, message",
    [
        (0, 0.01, "--bloom_paragraphs 0"),
        (10, 0.0, "--bloom_false_positives 0.0"),
        (10, 0.5, "--bloom_false_positives 0.5"),
    ],
)
def test_impossible_sizes_are_refused(paragraphs: int, rate: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BloomDedup(paragraphs, rate)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rbloom", None)
    with pytest.raises(ValueError, match=r"rbloom: pip install 'llammlein\[data\]'"):
        BloomDedup(10, 0.1)
