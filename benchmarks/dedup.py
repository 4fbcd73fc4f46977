"""Deduplication measured: a Bloom filter against exact hashing, the joins of both kinds, and hashing text.

    python benchmarks/dedup.py --corpus PATH --paragraphs 10000000 --json FILE

A synthetic stream stands in for a large corpus: paragraph hashes, one in four of which repeats an earlier one chosen at
random. Each measurement runs in a separate process, so that peak memory is not shared.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from lit_data.corpus.readers import read_documents
from lit_data.prepare.bloom import BloomDedup, bloom_bytes, bloom_rate
from lit_data.prepare.exact_dedup import HashWriter, find_duplicates
from lit_data.prepare.near_dedup import SignatureWriter, find_near_duplicates, signatures
from lit_data.prepare.paragraphs import hash_paragraphs

BLOCK = 1 << 16
DOCUMENT = 20  # paragraphs
PARTS = 4


def stream(paragraphs: int) -> Iterator[tuple[list[bytes], npt.NDArray[np.bool_]]]:
    """Hashes in blocks, and which of them occurred before."""
    rng = np.random.default_rng(0)
    different = 0
    for start in range(0, paragraphs, BLOCK):
        n = min(BLOCK, paragraphs - start)
        repeated = (rng.random(n) < 0.25) & (different > 0)
        old = rng.integers(0, max(different, 1), n)
        numbers = np.where(repeated, old, different + np.cumsum(~repeated) - 1)
        different += int((~repeated).sum())
        yield hashes_of(numbers), repeated


def hashes_of(numbers: npt.NDArray[np.int64]) -> list[bytes]:
    """16 bytes each, distinct for distinct numbers: splitmix64 (Steele et al., 2014) from two seeds."""
    words = np.empty((len(numbers), 2), np.uint64)
    for column, begin in enumerate((1, 1 << 62)):
        x = (numbers.astype(np.uint64) + np.uint64(begin)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        words[:, column] = x ^ (x >> np.uint64(31))
    data = words.tobytes()
    return [data[i : i + 16] for i in range(0, len(data), 16)]


def peak_bytes() -> int:
    """Peak resident memory of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure_bloom(paragraphs: int, rate: float) -> dict[str, Any]:
    """A filter sized for the stream."""
    different = sum(int((~repeated).sum()) for _, repeated in stream(paragraphs))
    before = peak_bytes()
    bloom = BloomDedup(different, rate)
    seconds, wrong, missed = 0.0, 0, 0
    for hashes, repeated in stream(paragraphs):
        began = time.perf_counter()
        answers = np.array([bloom.seen(h) for h in hashes])
        seconds += time.perf_counter() - began
        wrong += int((answers & ~repeated).sum())
        missed += int((repeated & ~answers).sum())
    trials = min(100_000, max(1, different // 50))  # queries are added too: only a few, so as not to fill it further
    wrong_when_full = sum(bloom.seen(h) for h in hashes_of(np.arange(trials) + (1 << 40)))
    middles = (np.arange(1000) + 0.5) / 1000 * different
    full = bloom_rate(different, bloom.size_bytes, bloom.n_hashes)
    return {
        "different_paragraphs": different,
        "missed": missed,
        "false_positive_rate_over_the_pass": wrong / different,
        "computed_over_the_pass": float(np.mean([bloom_rate(m, bloom.size_bytes, bloom.n_hashes) for m in middles])),
        "false_positive_rate_when_full": wrong_when_full / trials,
        "computed_when_full": full,
        "standard_error_when_full": math.sqrt(full / trials),
        "memory_mb": (peak_bytes() - before) / 1e6,
        "computed_memory_mb": bloom_bytes(different, rate) / 1e6,
        "million_paragraphs_per_s": paragraphs / seconds / 1e6,
    }


def measure_exact(paragraphs: int, memory_bytes: int) -> dict[str, Any]:
    """The join of all hashes, in parts."""
    with tempfile.TemporaryDirectory() as folder:
        hash_files, outputs = ([Path(folder, f"{kind}-{p}.parquet") for p in range(PARTS)] for kind in ("in", "out"))
        began = time.perf_counter()
        writers = [HashWriter(path) for path in hash_files]
        place, expected = 0, 0
        for hashes, repeated in stream(paragraphs):
            expected += int(repeated.sum())
            for i in range(0, len(hashes), DOCUMENT):
                writers[place * PARTS // paragraphs].add(place // DOCUMENT, hashes[i : i + DOCUMENT])
                place += len(hashes[i : i + DOCUMENT])
        for writer in writers:
            writer.close()
        written, before = time.perf_counter(), peak_bytes()
        counts = find_duplicates(hash_files, outputs, memory_bytes=memory_bytes, temporary=Path(folder))
        seconds = time.perf_counter() - written
        assert (counts.paragraphs, counts.duplicates) == (paragraphs, expected)
        return {
            "duplicates": counts.duplicates,
            "write_s": written - began,
            "bytes_a_paragraph_on_disk": sum(p.stat().st_size for p in hash_files) / paragraphs,
            "join_s": seconds,
            "memory_limit_mb": memory_bytes / 1e6,
            "peak_memory_mb": peak_bytes() / 1e6,
            "peak_memory_before_the_join_mb": before / 1e6,
        }


def measure_near(documents: int, memory_bytes: int) -> dict[str, Any]:
    """The join and pass over random signatures, one in four a near-duplicate of an earlier one (115 of 128 values)."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        made = rng.integers(0, 1 << 32, (documents, 128), dtype=np.uint32)
        copies = np.flatnonzero(rng.random(documents) < 0.25)[1:]
        for copy in copies:
            made[copy] = made[rng.integers(0, copy)]
            made[copy, rng.choice(128, 13, replace=False)] += np.uint32(1)
        writer = SignatureWriter(Path(folder, "in.parquet"))
        for number, signature in enumerate(made):
            writer.add(number, signature)
        writer.close()
        began = time.perf_counter()
        counts = find_near_duplicates(
            [Path(folder, "in.parquet")],
            [Path(folder, "out.parquet")],
            threshold=0.8,
            memory_bytes=memory_bytes,
            temporary=Path(folder),
        )
        return {
            "documents": documents,
            "copies": len(copies),
            "candidates": counts.candidates,
            "duplicates": counts.duplicates,
            "join_s": time.perf_counter() - began,
            "memory_limit_mb": memory_bytes / 1e6,
            "peak_memory_mb": peak_bytes() / 1e6,
            "of_which_signatures_mb": made.nbytes / 1e6,
        }


def measure_text(corpus: str, documents: int, min_characters: int) -> dict[str, Any]:
    """Hashing the paragraphs of text, and its MinHash signatures, in one thread."""
    texts = [document.text for document in islice(read_documents([corpus]), documents)]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    facts: dict[str, Any] = {"documents": len(texts), "megabytes": megabytes}
    work: dict[str, Callable[[str], object]] = {
        "hash_paragraphs": lambda text: hash_paragraphs(text, min_characters),
        "signatures": signatures,
    }
    for name, function in work.items():
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            for text in texts:
                function(text)
            seconds.append(time.perf_counter() - began)
        facts[f"{name}_mb_per_s"] = megabytes / min(seconds)
    return facts


def main() -> None:
    """Run all, print and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--corpus", help="text to hash, as scripts/prepare_data.py reads it; skipped if not given")
    parser.add_argument("--documents", type=int, default=500, help="of the corpus")
    parser.add_argument("--paragraphs", type=int, default=10_000_000, help="of the synthetic stream")
    parser.add_argument("--signatures", type=int, default=200_000, help="of the synthetic documents")
    parser.add_argument("--false_positives", type=float, default=0.001)
    parser.add_argument("--memory_mb", type=int, default=512, help="DuckDB's limit in the joins")
    parser.add_argument("--json", type=Path, help="where to write the results")
    args = parser.parse_args()
    memory_bytes = args.memory_mb * 1_000_000
    tasks: dict[str, tuple[Callable[..., dict[str, Any]], tuple[Any, ...]]] = {
        "bloom": (measure_bloom, (args.paragraphs, args.false_positives)),
        "exact": (measure_exact, (args.paragraphs, memory_bytes)),
        "near": (measure_near, (args.signatures, memory_bytes)),
    }
    if args.corpus:
        tasks["text"] = (measure_text, (args.corpus, args.documents, 50))
    results = {}
    for name, (function, arguments) in tasks.items():
        with multiprocessing.get_context("spawn").Pool(1) as process:
            results[name] = process.apply(function, arguments)
        print(name)
        for key, value in results[name].items():
            print(f"  {key.replace('_', ' ')}: {value if isinstance(value, int) else f'{value:.6g}'}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"arguments": vars(args) | {"json": str(args.json)}} | results, indent=1))


if __name__ == "__main__":
    main()
