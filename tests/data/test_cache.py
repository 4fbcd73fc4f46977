"""Staged tokens equal the dataset's; the cache folder as seen from outside, while several processes use it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import PYTHON_PATH, ROOT

import lit_data.loading.shard_cache
import lit_files.descriptors
from lit_data.loading.cache_folder import CacheFolder
from lit_data.loading.shard_cache import ShardCache, ShardFiles
from lit_data.packed.reader import PackedDataset
from lit_data.packed.writer import PackedWriter

CHUNK = 8192  # bytes
ROW = 64  # tokens
WORKER = [sys.executable, str(ROOT / "tests" / "harness" / "cache_worker.py")]
ENVIRONMENT = {**os.environ, "PYTHONPATH": PYTHON_PATH}


def write(folder: Path, vocab_size: int = 60000, tokens: int = 100_000, seed: int = 0) -> PackedDataset:
    rng = np.random.default_rng(seed)
    facts = {"fingerprint": "f" * 64, "kind": "test", "folder": None}
    with PackedWriter(folder, tokenizer=facts, vocab_size=vocab_size, eos_id=0, shard_tokens=30_000) as writer:
        while writer.tokens < tokens:
            ids = rng.integers(1, vocab_size, size=rng.integers(1, 3000))
            writer.add([*ids, 0], id=f"d{writer.documents}")
    return PackedDataset(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PackedDataset:
    return write(tmp_path_factory.mktemp("packed") / "data")


def windows(data: PackedDataset, seed: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """All rows of the dataset, (starts, stops), in order or shuffled."""
    starts = np.arange(0, data.n_tokens, ROW, dtype=np.int64)
    if seed is not None:
        np.random.default_rng(seed).shuffle(starts)
    return starts, np.minimum(starts + ROW, data.n_tokens)


def chunk_sizes(data: PackedDataset) -> list[int]:
    """Sizes of all chunks, from the sizes of the files alone."""
    sizes = []
    for file in sorted(data.path.glob("*.bin")):
        size = file.stat().st_size
        sizes += [CHUNK] * (size // CHUNK) + ([size % CHUNK] if size % CHUNK else [])
    return sizes


def read(cache: ShardCache, start: int, stop: int) -> np.ndarray:
    out = np.full(stop - start, -1, dtype=np.int64)
    cache.copy_tokens(out, start, stop)
    return out


def until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out waiting for the condition"
        time.sleep(0.002)


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Path -> (inode, size) of every file, under the folder's lock, so between two changes."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_SH)
        found = {}
        for path in folder.rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # a link released meanwhile: the chunk itself stays
                facts = path.stat()
                if path.is_file():
                    found[str(path.relative_to(folder))] = (facts.st_ino, facts.st_size)
        return found
    finally:
        os.close(lock)


def folder_bytes(folder: Path) -> int:
    return sum(dict(files(folder).values()).values())


def shared_chunks(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob(f"*-{CHUNK}/*") if p.suffix == ".bin")


@pytest.fixture
def opened() -> Iterator[Callable[..., ShardCache]]:
    caches: list[ShardCache] = []

    def open_cache(data: PackedDataset, folder: Path, chunks: int, **kw: Any) -> ShardCache:
        caches.append(ShardCache(data, folder, chunks * CHUNK, chunk_bytes=CHUNK, **kw))
        return caches[-1]

    yield open_cache
    for cache in caches:
        cache.close()


def start_worker(data: PackedDataset, folder: Path, chunks: int, rows: np.ndarray, **kw: Any) -> subprocess.Popen[str]:
    plan = {"data": str(data.path), "folder": str(folder), "budget": chunks * CHUNK, "chunk": CHUNK}
    plan |= {"rows": rows.tolist(), "row_tokens": ROW, **kw}
    return subprocess.Popen(
        [*WORKER, json.dumps(plan)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    )


def result(worker: subprocess.Popen[str]) -> dict[str, int]:
    output, _ = worker.communicate(timeout=120)
    assert worker.returncode == 0
    return json.loads(output.splitlines()[-1])


@pytest.mark.parametrize("vocab_size", [60000, 70000])
def test_tokens_equal_the_datasets(tmp_path: Path, opened: Callable[..., ShardCache], vocab_size: int) -> None:
    data = write(tmp_path / "data", vocab_size)
    assert data.dtype.itemsize == (2 if vocab_size < 65500 else 4)
    assert len(data.manifest.shards) > 2
    cache = opened(data, tmp_path / "cache", 200)
    rng = np.random.default_rng(1)
    ranges = [tuple(sorted(rng.integers(0, data.n_tokens + 1, size=2).tolist())) for _ in range(60)]
    ranges += [(a, min(a + ROW, data.n_tokens)) for a in rng.integers(0, data.n_tokens, size=300).tolist()]
    ranges += [(0, data.n_tokens), (0, 0), (data.n_tokens, data.n_tokens)]
    for start, stop in ranges:
        assert np.array_equal(read(cache, start, stop), data.tokens(start, stop))
    assert cache.hits == 0 and cache.misses > 0 and cache.wait_seconds > 0

    cache.follow(iter([windows(data)]))
    until(lambda: cache.staged_rows == len(windows(data)[0]))
    misses = cache.misses
    for start, stop in ranges:
        assert np.array_equal(read(cache, start, stop), data.tokens(start, stop))
    assert cache.misses == misses and cache.hits > 300
    assert cache.staged_bytes == sum(chunk_sizes(data)) == folder_bytes(tmp_path / "cache")
    assert sorted(p.stat().st_size for p in shared_chunks(tmp_path / "cache")) == sorted(chunk_sizes(data))


def test_it_stages_upcoming_chunks_within_the_budget(
    tmp_path: Path, data: PackedDataset, opened: Callable[..., ShardCache]
) -> None:
    cache = opened(data, tmp_path, 4)
    starts, stops = windows(data)
    batches = ((starts[i : i + 5], stops[i : i + 5]) for i in range(0, len(starts), 5))
    cache.follow(batches)
    for i, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True)):
        if i % 40 == 0:
            # The chunks of this row and the next appear without being read: they are staged ahead, and others evicted.
            ahead = min(stop + 3000, data.n_tokens) - 1
            until(lambda at=start, to=ahead: is_held(cache, at) and is_held(cache, to))
        assert np.array_equal(read(cache, start, stop), data.tokens(start, stop))
        cache.used(i + 1)
        assert folder_bytes(tmp_path) <= 4 * CHUNK
    assert cache.staged_bytes == sum(chunk_sizes(data))  # each chunk once
    assert cache.hits > 5 * cache.misses


def is_held(cache: ShardCache, position: int) -> bool:
    return int(cache._chunk_of(np.asarray([position]))[0]) in cache._held


def test_each_epoch_of_the_two_level_order_reads_the_source_once(
    tmp_path: Path, data: PackedDataset, opened: Callable[..., ShardCache]
) -> None:
    """Groups of five chunks, shuffled inside; the budget fits two and a half groups, an epoch has five."""
    rng = np.random.default_rng(2)
    group = 5 * CHUNK // 2 // ROW
    epochs = []
    for _ in range(2):
        starts = windows(data)[0]
        groups = [starts[i : i + group] for i in range(0, len(starts), group)]
        for g in groups:
            rng.shuffle(g)
        epochs += [groups[i] for i in rng.permutation(len(groups))]
    starts = np.concatenate(epochs)
    stops = np.minimum(starts + ROW, data.n_tokens)
    cache = opened(data, tmp_path, 13)
    cache.follow((starts[i : i + 8], stops[i : i + 8]) for i in range(0, len(starts), 8))
    for i, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True)):
        until(lambda a=start, b=stop - 1: is_held(cache, a) and is_held(cache, b))
        assert np.array_equal(read(cache, start, stop), data.tokens(start, stop))
        cache.used(i + 1)
    assert cache.misses == 0
    total = sum(chunk_sizes(data))
    assert (
        total < cache.staged_bytes <= 2.5 * total
    )  # a chunk in two groups may be staged twice, or still be in the cache
    assert folder_bytes(tmp_path) <= 13 * CHUNK


def test_a_chunk_needed_again_soon_is_not_released(
    tmp_path: Path, data: PackedDataset, opened: Callable[..., ShardCache]
) -> None:
    """A row in the first chunk, 60 rows in the second, a row in the first: 60 rows apart, of which 48 count as soon."""
    cache = opened(data, tmp_path, 3)
    starts = np.asarray([0, *[CHUNK // 2] * 60, 0], dtype=np.int64)
    for batch in (starts[:48], starts[48:]):
        cache._learn(batch, batch + ROW)
    assert cache._stage() and cache._stage()
    cache.used(20)
    cache._release()
    assert is_held(cache, 0)
    later = opened(data, tmp_path, 3)
    for batch in (starts[:48], starts[48:]):
        later._learn(batch, batch + ROW)
    assert later._stage()
    later.used(5)
    later._release()
    assert not is_held(later, 0) and is_held(later, CHUNK // 2)


def test_no_chunk_is_released_before_the_next_rows_are_known(
    tmp_path: Path, data: PackedDataset, opened: Callable[..., ShardCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader has used all rows that the staging thread has learned of; the next ones need the same chunk."""
    cache, released = opened(data, tmp_path, 3), []
    stage, release = cache._stage, cache._cache.release

    def stage_slowly() -> bool:
        done = stage()
        cache.used(4)
        time.sleep(2 * lit_data.loading.shard_cache.POLL_SECONDS)
        return done

    monkeypatch.setattr(cache, "_stage", stage_slowly)
    monkeypatch.setattr(cache._cache, "release", lambda name: (released.append(name), release(name)))
    rows = np.arange(0, 4 * ROW, ROW, dtype=np.int64)
    cache.follow(iter([(rows, rows + ROW)] * 2))
    until(lambda: cache.staged_rows == 8)
    assert released == []
    cache.used(8)
    until(lambda: released)


def test_rows_without_data_and_a_new_order(
    tmp_path: Path, data: PackedDataset, opened: Callable[..., ShardCache]
) -> None:
    cache = opened(data, tmp_path, 3)
    starts = np.asarray([-1, 100, 0, 200], dtype=np.int64)
    cache.follow(iter([(starts, np.asarray([-1, 164, 0, 264], dtype=np.int64)), (starts[:1], starts[:1])]))
    until(lambda: cache.staged_rows == 5)
    assert cache.staged_bytes == CHUNK
    last = np.asarray([data.n_tokens - ROW], dtype=np.int64)
    cache.follow(iter([(last, last + ROW)]))
    until(lambda: cache.staged_rows and is_held(cache, data.n_tokens - 1))
    until(lambda: not is_held(cache, 100))
    assert np.array_equal(read(cache, 100, 164), data.tokens(100, 164))
    assert cache.misses == 1


def test_two_processes_with_different_orders_keep_the_budget(tmp_path: Path, data: PackedDataset) -> None:
    """Sizes are summed under the folder's lock: an unlocked listing would mix files of different moments."""
    folder = tmp_path / "cache"
    folder.mkdir()
    counts = []
    done = threading.Event()

    def sample() -> None:
        while not done.is_set():
            counts.append(folder_bytes(folder))
            time.sleep(0.001)  # the lock is not fair

    sampler = threading.Thread(target=sample)
    sampler.start()
    rows = [windows(data)[0], windows(data)[0][::-1]]
    workers = [start_worker(data, folder, 5, r, row_seconds=0.001, sleep=0.001) for r in rows]
    results = [result(w) for w in workers]
    done.set()
    sampler.join()
    assert max(counts) <= 5 * CHUNK
    assert len(counts) > 100 and len(set(counts)) > 2
    assert all(counters["staged"] > 0 and counters["hits"] > 0 for counters in results)
    assert folder_bytes(folder) <= 5 * CHUNK
    assert not list(folder.glob("*/*.part")) and not list(folder.glob("holder-*"))


def test_processes_share_what_is_staged(tmp_path: Path, data: PackedDataset) -> None:
    total = sum(chunk_sizes(data))
    workers = [start_worker(data, tmp_path, 100, windows(data, i)[0], wait_until_staged="yes") for i in range(2)]
    together = [result(w) for w in workers]
    assert sum(r["staged"] for r in together) == total  # each chunk was copied by one of them
    assert [r["misses"] for r in together] == [0, 0]
    later = result(start_worker(data, tmp_path, 100, windows(data, 3)[0], wait_until_staged="yes"))
    assert later["staged"] == later["misses"] == 0
    assert folder_bytes(tmp_path) == total


def test_a_kill_in_the_middle_of_a_copy(tmp_path: Path, data: PackedDataset) -> None:
    folder = tmp_path / "cache"
    chunk = 2 * lit_data.loading.shard_cache.PIECE_BYTES  # two pieces: it sleeps between them
    with PackedWriter(tmp_path / "large", tokenizer=data.manifest.tokenizer, vocab_size=60000, eos_id=0) as writer:
        writer.add([*np.random.default_rng(0).integers(1, 60000, size=chunk), 0], id="0")
    data = PackedDataset(tmp_path / "large")
    plan = {"data": str(data.path), "folder": str(folder), "budget": 3 * chunk, "chunk": chunk, "row_tokens": ROW}
    plan |= {"rows": [0], "wait_until_staged": "yes", "sleep": 1000, "reads_before_sleep": 1}
    worker = subprocess.Popen([*WORKER, json.dumps(plan)], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    until(lambda: list(folder.glob("*/*.part")))
    part = next(folder.glob("*/*.part"))
    until(lambda: part.read_bytes()[: chunk // 2] == (data.path / "data-00000.bin").read_bytes()[: chunk // 2])
    worker.send_signal(signal.SIGKILL)
    worker.communicate()
    assert part.stat().st_size == chunk  # has the full size, but is incomplete
    assert len(list(folder.glob("holder-*"))) == 1

    cache = ShardCache(data, folder, 3 * chunk, chunk_bytes=chunk)
    try:
        assert not part.exists()
        assert list(folder.glob("holder-*")) == [cache._cache.own]
        assert list(folder.glob(f"*-{chunk}/*")) == []
        cache.follow(iter([(np.asarray([0]), np.asarray([data.n_tokens]))]))
        until(lambda: cache.staged_rows)
        assert np.array_equal(read(cache, 0, data.n_tokens), data.tokens(0, data.n_tokens))
        assert cache.misses == 0
    finally:
        cache.close()


def test_chunks_in_use_are_not_evicted(tmp_path: Path, data: PackedDataset, opened: Callable[..., ShardCache]) -> None:
    first, second = opened(data, tmp_path, 3), opened(data, tmp_path, 3)
    per_chunk = CHUNK // 2
    two = np.asarray([0, per_chunk], dtype=np.int64)
    first.follow(iter([(two, two + ROW)]))
    until(lambda: first.staged_rows == 2)
    read(first, 0, ROW)  # mapped; the other one is only held
    mine = {p.name: p.stat().st_ino for p in shared_chunks(tmp_path)}
    assert len(mine) == 2
    starts, stops = windows(data)
    later = starts >= 2 * per_chunk
    second.follow(iter([(starts[later], stops[later])]))
    for i, (start, stop) in enumerate(zip(starts[later].tolist(), stops[later].tolist(), strict=True)):
        assert np.array_equal(read(second, start, stop), data.tokens(start, stop))
        if i % 60 == 0:
            until(lambda at=start: is_held(second, at))
        second.used(i + 1)
    there = {p.name: p.stat().st_ino for p in shared_chunks(tmp_path)}
    assert mine.items() <= there.items() and len(there) <= 3
    assert second.staged_bytes > 10 * CHUNK
    misses = first.misses
    assert np.array_equal(read(first, 0, 2 * per_chunk), data.tokens(0, 2 * per_chunk))
    assert first.misses == misses


def test_the_least_recently_released_chunk_is_evicted_first(tmp_path: Path) -> None:
    folder = CacheFolder(tmp_path, f"{'a' * 16}-10", 30)
    for name in ("x", "y", "z"):
        assert folder.hold([(name, 10)]) == ([], [name])
        folder.write(name, 0, b"0123456789")
        folder.publish(name)
    for name in ("y", "z", "x"):
        time.sleep(0.02)  # coarser than the file system's clock
        folder.release(name)
    assert folder.hold([("v", 10), ("w", 10)]) == ([], ["v"])
    assert {p.name for p in folder.shared.iterdir() if p.suffix != ".part"} == {"x", "z"}
    folder.drop("v")
    assert folder.hold([("x", 10)]) == (["x"], [])
    folder.close()


def test_chunks_needed_later_are_evicted_for_those_needed_now(tmp_path: Path) -> None:
    folder = CacheFolder(tmp_path, f"{'a' * 16}-10", 30)
    for name in ("x", "y", "z"):
        folder.hold([(name, 10)])
        folder.write(name, 0, bytes(10))
        folder.publish(name)
        folder.release(name)
    assert folder.hold([("v", 10), ("x", 10), ("w", 10), ("y", 10), ("z", 10)]) == (["x"], ["v"])
    assert {p.name for p in folder.shared.iterdir() if p.suffix != ".part"} == {"x", "y"}
    folder.drop("v")
    assert folder.hold([("w", 10), ("y", 10)]) == (["y"], ["w"])
    folder.drop("w")
    assert folder.hold([("u", 10), ("v", 10)]) == ([], ["u"])
    assert folder.hold([("v", 10), ("w", 10)]) == ([], [])
    folder.close()


def test_the_smallest_budget_is_respected(tmp_path: Path) -> None:
    kind = f"{'a' * 16}-10"
    large = CacheFolder(tmp_path, kind, 100)
    names = [f"c{i}" for i in range(10)]
    for name in names:
        large.hold([(name, 10)])
        large.write(name, 0, b"0123456789")
        large.publish(name)
    for name in names[4:]:
        large.release(name)
    assert folder_bytes(tmp_path) == 100
    small = CacheFolder(tmp_path, kind, 30)
    assert folder_bytes(tmp_path) == 40  # the four in use stay
    assert large.hold([("new", 10)]) == ([], []) and small.hold([("new", 10)]) == ([], [])
    large.release("c0")
    large.release("c1")
    assert small.hold([("new", 10)]) == ([], ["new"])
    assert folder_bytes(tmp_path) == 30
    small.close()
    assert large.hold([("c5", 10)]) == ([], ["c5"])
    large.close(keep=False)
    assert files(tmp_path) == {}


def test_no_process_exceeds_its_share_while_another_waits(tmp_path: Path) -> None:
    kind = f"{'a' * 16}-10"
    first, second = CacheFolder(tmp_path, kind, 40), CacheFolder(tmp_path, kind, 40)
    for i in range(4):
        assert first.hold([(f"a{i}", 10)]) == ([], [f"a{i}"])
        first.write(f"a{i}", 0, bytes(10))
        first.publish(f"a{i}")
    assert second.hold([("b0", 10)]) == ([], [])
    first.release("a0")
    assert first.hold([("a4", 10)]) == ([], [])  # it has 30 of its share of 20
    assert second.hold([("b0", 10)]) == ([], ["b0"])
    second.write("b0", 0, bytes(10))
    second.publish("b0")
    assert second.hold([("a1", 10)]) == (["a1"], [])  # shared: half for each
    first.release("a2")
    assert second.hold([("b1", 10)]) == ([], ["b1"])
    first.close()
    second.close()


def test_a_truncated_chunk_is_copied_again(
    tmp_path: Path, data: PackedDataset, opened: Callable[..., ShardCache], capsys: pytest.CaptureFixture[str]
) -> None:
    result(start_worker(data, tmp_path, 100, windows(data)[0], wait_until_staged="yes"))
    cut, grown = shared_chunks(tmp_path)[2:4]
    os.truncate(cut, 100)
    os.truncate(grown, CHUNK + 1)
    cache = opened(data, tmp_path, 100)
    cache.follow(iter([windows(data)]))
    until(lambda: cache.staged_rows == len(windows(data)[0]))
    assert cache.staged_bytes == 2 * CHUNK
    os.truncate(shared_chunks(tmp_path)[0], 100)  # held, not yet mapped
    assert np.array_equal(read(cache, 0, data.n_tokens), data.tokens(0, data.n_tokens))
    assert cache.misses == 1
    assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.parametrize("where", ["write", "publish", "hold"])
def test_a_failing_folder_only_stops_staging(
    where: str,
    tmp_path: Path,
    data: PackedDataset,
    opened: Callable[..., ShardCache],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cache = opened(data, tmp_path, 100)
    original, calls = getattr(CacheFolder, where), []

    def fail(self: CacheFolder, *arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, *arguments)

    monkeypatch.setattr(CacheFolder, where, fail)
    cache.follow(iter([windows(data)]))
    until(lambda: cache.failure)
    assert np.array_equal(read(cache, 0, data.n_tokens), data.tokens(0, data.n_tokens))
    assert cache.hits == 3 and cache.misses == len(chunk_sizes(data)) - 3
    err = capsys.readouterr().err
    assert err.count("warning") == 1 and "No space left" in err and "--data.cache_dir" in err and str(tmp_path) in err
    assert len(calls) == 4
    cache.close()
    assert not list(tmp_path.glob("*/*.part"))


@contextlib.contextmanager
def file_system(folder: Path, size: int) -> Iterator[None]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(
    tmp_path: Path, data: PackedDataset, opened: Callable[..., ShardCache], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "small"
    with file_system(folder, 128 << 10):
        (folder / "other").write_bytes(bytes(64 << 10))
        with pytest.raises(ValueError, match="--data.cache_gb"):
            opened(data, folder, 17)  # more than the file system has
        cache = opened(data, folder, 16)
        cache.follow(iter([windows(data)]))
        until(lambda: cache.failure)
        assert np.array_equal(read(cache, 0, data.n_tokens), data.tokens(0, data.n_tokens))
        assert cache.hits >= 6 and "No space left" in capsys.readouterr().err
        cache.close()
        assert not list(folder.glob("*/*.part"))


def test_a_file_system_as_large_as_the_budget_suffices(tmp_path: Path, data: PackedDataset) -> None:
    """Enforced by the kernel: with one chunk too many at any moment, a write would fail."""
    folder = tmp_path / "small"
    chunk, pages = 32768, 4096 * len(data.manifest.shards)  # the last chunk of a shard only partly fills its last page
    assert pages < chunk
    with file_system(folder, 3 * chunk + pages):
        rows = [windows(data)[0], windows(data)[0][::-1]]
        workers = [start_worker(data, folder, 0, r, chunk=chunk, budget=3 * chunk, row_seconds=0.0005) for r in rows]
        for worker in workers:
            counters = result(worker)
            assert counters["failure"] is None and counters["staged"] > 0


def test_a_folder_that_is_deleted(
    tmp_path: Path, data: PackedDataset, opened: Callable[..., ShardCache], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "cache"
    cache = opened(data, folder, 4)
    starts, stops = windows(data)
    cache.follow(iter([(starts, stops)]))
    until(lambda: is_held(cache, 3 * CHUNK // 2))

    def removed() -> bool:  # the cache may be adding a file just then
        shutil.rmtree(folder, ignore_errors=True)
        return not folder.exists()

    until(removed)
    cache.used(int(np.searchsorted(starts, CHUNK)))
    until(lambda: cache.failure)
    assert np.array_equal(read(cache, 0, data.n_tokens), data.tokens(0, data.n_tokens))
    assert str(folder) in capsys.readouterr().err
    cache.close()


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/llammlein"])
def test_a_folder_that_cannot_be_used(place: str, tmp_path: Path, data: PackedDataset) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=f"--data.cache_dir.*{place}"):
        ShardCache(data, tmp_path / place, 10 * CHUNK, chunk_bytes=CHUNK)


def test_impossible_budgets_are_refused(tmp_path: Path, data: PackedDataset) -> None:
    with pytest.raises(ValueError, match="--data.cache_gb 1e-07 is less"):
        ShardCache(data, tmp_path, 100, chunk_bytes=CHUNK)
    with pytest.raises(ValueError, match="--data.cache_gb.*file system"):
        ShardCache(data, tmp_path, 1 << 60)
    with pytest.raises(ValueError, match="no token"):
        ShardCache(data, tmp_path, 100, chunk_bytes=1)
    assert files(tmp_path) == {} and not list(tmp_path.glob("holder-*"))


def test_errors_of_the_source_and_of_the_order_are_raised(
    tmp_path: Path, data: PackedDataset, opened: Callable[..., ShardCache]
) -> None:
    copy = tmp_path / "data"
    shutil.copytree(data.path, copy)
    damaged = PackedDataset(copy)
    os.truncate(copy / "data-00000.bin", 100)
    cache = opened(damaged, tmp_path / "cache", 10)
    with pytest.raises(ValueError, match="data-00000.bin ends before.*truncated"):
        read(cache, 0, ROW)
    cache.follow(iter([windows(damaged)]))
    until(lambda: cache._error)
    with pytest.raises(ValueError, match="data-00000.bin ends before"):
        read(cache, damaged.n_tokens - ROW, damaged.n_tokens)

    def broken() -> Iterator[Any]:
        yield windows(data)
        raise RuntimeError("order")

    other = opened(data, tmp_path / "cache", 100)
    other.follow(broken())
    until(lambda: other._error)
    with pytest.raises(RuntimeError, match="order"):
        read(other, 0, ROW)


def test_few_files_are_kept_open(
    tmp_path: Path, data: PackedDataset, opened: Callable[..., ShardCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lit_data.loading.shard_cache, "MAX_MAPS", 2)
    monkeypatch.setattr(lit_files.descriptors, "MAX_OPEN", 2)
    source = ShardFiles(data)
    cache = opened(data, tmp_path, 100, source=source)
    before = len(os.listdir("/proc/self/fd"))
    starts, stops = windows(data, seed=5)
    for start, stop in zip(starts[:200].tolist(), stops[:200].tolist(), strict=True):
        assert np.array_equal(read(cache, start, stop), data.tokens(start, stop))
    assert len(os.listdir("/proc/self/fd")) <= before + 2  # maps keep no descriptor
    cache.follow(iter([(starts, stops)]))
    until(lambda: cache.staged_rows == len(starts))
    for start, stop in zip(starts[:200].tolist(), stops[:200].tolist(), strict=True):
        assert np.array_equal(read(cache, start, stop), data.tokens(start, stop))
    assert cache.hits >= 200
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    assert len(cache._maps) <= 2
    source.close()
    cache.close()
    assert len(os.listdir("/proc/self/fd")) < before
