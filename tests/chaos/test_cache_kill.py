"""SIGKILL of a staging process: before each of its calls on the cache folder, and at random moments."""

from __future__ import annotations

import collections
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from running import PYTHON_PATH, ROOT

from lit_data.loading.shard_cache import ShardCache
from lit_data.packed.reader import PackedDataset
from lit_data.packed.writer import PackedWriter

pytestmark = pytest.mark.chaos

CALLS = {"open", "os.link", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "fcntl.flock"}
BUDGET_CHUNKS = 3


def write(folder: Path, tokens: int) -> PackedDataset:
    facts = {"fingerprint": "f" * 64, "kind": "test", "folder": None}
    rng = np.random.default_rng(0)
    with PackedWriter(
        folder, tokenizer=facts, vocab_size=60000, eos_id=0, shard_tokens=tokens // 2, name="data"
    ) as writer:
        for i in range(8):
            writer.add([*rng.integers(1, 60000, size=tokens // 8 - 1), 0], id=str(i))
    return PackedDataset(folder)


def check_folder(data: PackedDataset, folder: Path, chunk: int) -> None:
    """Every file with a chunk's name has the source's bytes, and all files together are within the budget."""
    for path in folder.glob(f"*-{chunk}/*.bin"):
        shard, number = (int(n) for n in path.stem.split("-"))
        with open(data.path / f"data-{shard:05d}.bin", "rb") as f:
            f.seek(number * chunk)
            assert path.read_bytes() == f.read(chunk), path
    sizes = {p.stat().st_ino: p.stat().st_size for p in folder.glob("*/*") if p.is_file()}
    assert sum(sizes.values()) <= BUDGET_CHUNKS * chunk


def read_all(data: PackedDataset, folder: Path, chunk: int) -> None:
    """Stage, read and release every chunk, one after another."""
    cache = ShardCache(data, folder, BUDGET_CHUNKS * chunk, chunk_bytes=chunk)
    assert list(folder.glob("holder-*")) == [cache._cache.own]
    assert not list(folder.glob("*/*.part"))
    tokens = chunk // data.dtype.itemsize
    starts = np.arange(0, data.n_tokens, tokens, dtype=np.int64)
    stops = np.minimum(starts + tokens, data.n_tokens)
    cache.follow(iter([(starts, stops)]))
    for i, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True)):
        end = time.monotonic() + 60
        while not cache._held.issuperset(cache._chunk_of(np.asarray([start, stop - 1])).tolist()):
            assert time.monotonic() < end and cache.failure is None
            time.sleep(0.0002)
        out = np.empty(stop - start, dtype=np.int64)
        cache.copy_tokens(out, start, stop)
        assert np.array_equal(out, data.tokens(start, stop))
        cache.used(i + 1)
    assert cache.misses == 0
    cache.close()


def test_a_kill_before_each_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_data.loading.shard_cache.POLL_SECONDS", 0.001)
    chunk = 4096
    data = write(tmp_path / "data", 16 * chunk // 2)
    folder = tmp_path / "cache"
    folder.mkdir()
    killed: collections.Counter[str] = collections.Counter()
    for n in range(10_000):
        with open(tmp_path / "call", "wb") as note:
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    data.tokens(0, data.n_tokens)
                    calls = 0

                    def hook(event: str, arguments: tuple[object, ...], n: int = n, note: int = note.fileno()) -> None:
                        nonlocal calls
                        if event in CALLS and (event == "fcntl.flock" or str(folder) in str(arguments)):
                            calls += 1
                            if calls > n:
                                os.write(note, f"{event}\n".encode())
                                os.kill(os.getpid(), signal.SIGKILL)

                    sys.addaudithook(hook)
                    read_all(data, folder, chunk)
                    status = 0
                finally:
                    os._exit(status)
        _, status = os.waitpid(child, 0)
        check_folder(data, folder, chunk)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        killed[(tmp_path / "call").read_text().splitlines()[0]] += 1  # two threads may reach it
    read_all(data, folder, chunk)
    check_folder(data, folder, chunk)
    print(dict(killed))
    assert all(killed[call] > 5 for call in ("open", "os.link", "os.rename", "os.remove", "fcntl.flock"))


def test_kills_at_random_moments(tmp_path: Path) -> None:
    chunk = 2 << 20  # two pieces
    data = write(tmp_path / "data", 9 * chunk // 2)
    folder = tmp_path / "cache"
    folder.mkdir()
    moments = random.Random(0)
    rows = [*range(0, data.n_tokens, 16384)]
    plan = {"data": str(data.path), "folder": str(folder), "budget": BUDGET_CHUNKS * chunk, "chunk": chunk}
    plan |= {"row_tokens": 16384, "sleep": 0.03, "row_seconds": 0.001}
    copying = 0
    for _ in range(30):
        start = moments.randrange(len(rows))
        order = rows[start:] + rows[:start]
        worker = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "harness" / "cache_worker.py"), json.dumps({**plan, "rows": order})],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": PYTHON_PATH},
        )
        assert worker.stdout is not None and worker.stdout.readline() == b"ready\n"
        time.sleep(moments.uniform(0, 0.3))
        assert worker.poll() is None
        worker.send_signal(signal.SIGKILL)
        assert worker.communicate()[1] == b""  # no warning: staging continued until the kill
        copying += bool(list(folder.glob("*/*.part")))
        check_folder(data, folder, chunk)
    print(f"{copying} of 30 in the middle of a copy")
    assert copying >= 5
    read_all(data, folder, chunk)
    check_folder(data, folder, chunk)
