"""The cache in front of a slow source: waiting time, staging rate, hits, and the folder's size against its budget.

A dataset is read in the two-level order at a given rate, through a source with limited total bandwidth and a delay per
read, like a parallel file system. First without a cache (rows come directly from the source), then through caches in
one folder: `--jobs` of them concurrently, in the same order, like the ranks of a node. "Cold" is the first group of the
order, which could not be staged in advance; "staged" is everything after it.

    python benchmarks/cache.py --json FILE

Waiting is the time spent reading the source for a requested row, as a share of the time it takes to consume the rows at
the given rate.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from lit_data.loading.order import Order
from lit_data.loading.shard_cache import ShardCache, ShardFiles
from lit_data.packed.index import IntArray
from lit_data.packed.reader import PackedDataset
from lit_data.packed.writer import PackedWriter

MB = 1e6
STEP_ROWS = 16


class SlowSource(ShardFiles):
    """All readers together get `mb_s` MB/s, and each read takes `delay_s` in addition."""

    def __init__(self, dataset: PackedDataset, mb_s: float, delay_s: float) -> None:
        super().__init__(dataset)
        self.bytes_s, self.delay_s = mb_s * MB, delay_s
        self.free_at, self.turn = 0.0, threading.Lock()
        self.bytes_read = 0

    def pread(self, shard: int, offset: int, size: int) -> bytes:
        with self.turn:
            now = time.perf_counter()
            self.free_at = max(now, self.free_at) + size / self.bytes_s
            until = self.free_at + self.delay_s
            self.bytes_read += size
        data = super().pread(shard, offset, size)
        time.sleep(max(0.0, until - time.perf_counter()))
        return data


class FolderSize(threading.Thread):
    """Polls the size of a cache folder, including unfinished copies."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.peak_bytes, self.looks, self.done = folder, 0, 0, threading.Event()

    def run(self) -> None:
        lock = os.open(self.folder, os.O_RDONLY)
        while not self.done.wait(0.01):
            fcntl.flock(lock, fcntl.LOCK_SH)  # no file is added or removed while they are counted
            sizes = [p.stat().st_size for p in self.folder.glob("*/*") if not p.parent.name.startswith("holder-")]
            fcntl.flock(lock, fcntl.LOCK_UN)
            self.peak_bytes, self.looks = max(self.peak_bytes, sum(sizes)), self.looks + 1
        os.close(lock)


def write_dataset(folder: Path, mb: float) -> PackedDataset:
    """Random uint16 ids in three shards."""
    tokens = int(mb * MB / 2)
    rng = np.random.default_rng(0)
    facts = {"fingerprint": "none", "kind": "none", "folder": None}
    with PackedWriter(folder, tokenizer=facts, vocab_size=65000, eos_id=0, shard_tokens=tokens // 3) as writer:
        while writer.tokens < tokens:
            ids = rng.integers(0, 65000, size=1 << 20, dtype=np.uint16)
            ids[-1] = 0
            writer.add(ids, id=str(writer.documents))
    return PackedDataset(folder)


def consume(cache: ShardCache, starts: IntArray, stops: IntArray, use_mb_s: float, group_rows: int) -> dict[str, Any]:
    """Read rows at a rate; waiting in the first group and after it, in seconds."""
    rows = ((starts[i : i + STEP_ROWS], stops[i : i + STEP_ROWS]) for i in range(0, len(starts), STEP_ROWS))
    cache.follow(rows)
    out = np.empty(int((stops - starts).max()), dtype=np.int64)
    step_s = STEP_ROWS * len(out) * 2 / (use_mb_s * MB)
    begin = next_at = time.perf_counter()
    cold: dict[str, float] = {}
    for i, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True)):
        if i == group_rows:
            cold = {"wait_s": cache.wait_seconds, "hits": cache.hits, "misses": cache.misses}
        cache.copy_tokens(out[: stop - start], start, stop)
        if (i + 1) % STEP_ROWS == 0:
            cache.used(i + 1)
            now = time.perf_counter()
            next_at = max(now, next_at + step_s)
            time.sleep(next_at - now)
    n_cold, n_staged = group_rows, len(starts) - group_rows
    hits, misses = cache.hits - cold["hits"], cache.misses - cold["misses"]
    return {
        "seconds": time.perf_counter() - begin,
        "cold_wait_share": cold["wait_s"] / (n_cold * step_s / STEP_ROWS),
        "staged_wait_share": (cache.wait_seconds - cold["wait_s"]) / (n_staged * step_s / STEP_ROWS),
        "cold_hit_ratio": cold["hits"] / (cold["hits"] + cold["misses"]),
        "staged_hit_ratio": hits / (hits + misses),
        "staged_mb": cache.staged_bytes / MB,
    }


def copy_us(read: Any, starts: IntArray, row_tokens: int) -> float:
    """Microseconds per row, the best of five rounds."""
    out = np.empty(row_tokens, dtype=np.int64)
    places, times = starts.tolist(), []
    for _ in range(5):
        begin = time.perf_counter()
        for start in places:
            read(out, start, start + row_tokens)
        times.append((time.perf_counter() - begin) / len(places) * 1e6)
    return min(times)


def measure(a: argparse.Namespace, data: PackedDataset, folder: Path) -> dict[str, Any]:
    chunk_bytes, budget_bytes = int(a.chunk_mb * MB), int(a.budget_mb * MB)
    order = Order(data.n_tokens // a.row_tokens, seed=1, block_windows=a.block_rows, group_blocks=a.group_blocks)
    group_rows = a.block_rows * a.group_blocks
    _, windows = order.locate(np.arange(int(a.epochs * order.n_windows) // STEP_ROWS * STEP_ROWS, dtype=np.int64))
    starts = windows * a.row_tokens
    stops = starts + a.row_tokens
    source = SlowSource(data, a.source_mb_s, a.delay_ms / 1000)

    direct = ShardCache(data, folder, budget_bytes, chunk_bytes=chunk_bytes, source=source)  # gets no upcoming rows
    begin, out = time.perf_counter(), np.empty(a.row_tokens, dtype=np.int64)
    for start, stop in zip(starts[:500].tolist(), stops[:500].tolist(), strict=True):
        direct.copy_tokens(out, start, stop)
    direct_row_s = (time.perf_counter() - begin) / 500
    direct.close()

    source.bytes_read = 0
    size = FolderSize(folder)
    size.start()
    caches = [ShardCache(data, folder, budget_bytes, chunk_bytes=chunk_bytes, source=source) for _ in range(a.jobs)]
    results: list[dict[str, Any]] = []
    threads = [
        threading.Thread(
            target=lambda c=cache, r=rank: results.append(
                consume(c, starts[r :: a.jobs], stops[r :: a.jobs], a.use_mb_s / a.jobs, group_rows // a.jobs)
            )
        )
        for rank, cache in enumerate(caches)
    ]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begin
    size.done.set()
    size.join()
    staged_mb = sum(r["staged_mb"] for r in results)
    read_mb = source.bytes_read / MB
    last = min(2000, group_rows)  # more than a group may not fit into the budget
    caches[0].follow(iter([(starts[-last:], stops[-last:])]))
    while caches[0].staged_rows < last:
        time.sleep(0.01)
    misses = caches[0].misses
    row_us = copy_us(caches[0].copy_tokens, starts[-last:], a.row_tokens)
    assert caches[0].misses == misses
    map_us = copy_us(data.copy_tokens, starts[-last:], a.row_tokens)
    failures = [c.failure for c in caches if c.failure]
    for cache in caches:
        cache.close()
    return {
        "dataset_mb": data.n_tokens * 2 / MB,
        "group_mb": group_rows * a.row_tokens * 2 / MB,
        "use_mb_s": a.use_mb_s,
        "source_mb_s": a.source_mb_s,
        "budget_mb": a.budget_mb,
        "jobs": a.jobs,
        "direct_wait_share": direct_row_s * a.use_mb_s * MB / (2 * a.row_tokens),
        "cold_wait_share": max(r["cold_wait_share"] for r in results),
        "staged_wait_share": max(r["staged_wait_share"] for r in results),
        "cold_hit_ratio": min(r["cold_hit_ratio"] for r in results),
        "staged_hit_ratio": min(r["staged_hit_ratio"] for r in results),
        "staged_mb": staged_mb,
        "staged_mb_s": staged_mb / seconds,
        "read_per_used": read_mb / (len(starts) * a.row_tokens * 2 / MB),
        "peak_folder_mb": size.peak_bytes / MB,
        "folder_looks": size.looks,
        "row_us": row_us,
        "row_us_from_map": map_us,
        "seconds": seconds,
        "failures": failures,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_mb", type=float, default=240)
    parser.add_argument("--source_mb_s", type=float, default=50, help="of all readers together")
    parser.add_argument("--delay_ms", type=float, default=1, help="of each read")
    parser.add_argument(
        "--use_mb_s", type=float, default=25, help="of all jobs together; 25 are 12.5 million tokens a s"
    )
    parser.add_argument("--budget_mb", type=float, default=72)
    parser.add_argument("--chunk_mb", type=float, default=1)
    parser.add_argument("--row_tokens", type=int, default=2048)
    parser.add_argument("--block_rows", type=int, default=977, help="of the order; 977 are 4 MB")
    parser.add_argument("--group_blocks", type=int, default=6)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--jobs", type=int, default=1, help="that share the folder, as ranks do")
    parser.add_argument("--cache_dir", type=Path, default=Path("/dev/shm"), help="a new folder is made in it")
    parser.add_argument("--json", type=Path, help="write the result here")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as data, tempfile.TemporaryDirectory(dir=a.cache_dir) as folder:
        result = measure(a, write_dataset(Path(data) / "data", a.dataset_mb), Path(folder))
    for name, value in result.items():
        print(f"{name:20} {value:.4g}" if isinstance(value, float) else f"{name:20} {value}")
    within = result["peak_folder_mb"] <= a.budget_mb
    print(
        f"budget {'kept' if within else 'EXCEEDED'}; waiting once staged {result['staged_wait_share']:.3%} (below 1%)"
    )
    if a.json:
        a.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
