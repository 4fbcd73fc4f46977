"""Datasets with hundreds of shards: few file descriptors, fast opening and planning."""

from __future__ import annotations

import json
import os
import pickle
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from running import EOS, ROOT, VOCAB, flags, warm_python

import lit_data.packed.reader
from lit_data.loading.loader import Loader, RankLayout
from lit_data.loading.mixture import Mixture
from lit_data.loading.order import Order, Segment
from lit_data.loading.rows import ConcatRows
from lit_data.packed.documents import Documents
from lit_data.packed.reader import PackedDataset
from lit_data.packed.writer import PackedWriter
from lit_files.descriptors import MAX_OPEN, OpenFiles
from lit_files.mapping import live_maps, map_array
from lit_files.platform import raise_open_file_limit

SHARDS = 300


def write_shards(folder: Path, shards: int, seed: int) -> Path:
    """A packed dataset with this many shards of one document of 20 tokens each."""
    facts = {"kind": "none", "fingerprint": "test", "vocab_size": VOCAB, "eos_id": EOS, "bos_id": None, "folder": None}
    rng = np.random.default_rng(seed)
    with PackedWriter(folder, tokenizer=facts, vocab_size=VOCAB, eos_id=EOS, shard_tokens=20) as writer:
        for i in range(shards):
            writer.add(np.append(rng.integers(2, VOCAB, size=19), EOS), id=f"doc-{i}", source="made", place=i)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    for seed, name in enumerate(("a", "b")):
        write_shards(folder / name, SHARDS, seed)
    return folder


def limited(*words: object) -> subprocess.CompletedProcess[str]:
    """Run a script at `ulimit -n 256`, soft and hard."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))

    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    line = [warm_python(), *map(str, words)]
    return subprocess.run(line, preexec_fn=limit, capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.mark.slow
def test_two_datasets_of_hundreds_of_shards_train_and_trace_with_256_files(two: Path, tmp_path: Path) -> None:
    """A mixture of 600 shards is trained on and traced at `ulimit -n 256`."""
    run = tmp_path / "run"
    mixture = json.dumps([{"path": str(two / "a"), "weight": 1}, {"path": str(two / "b"), "weight": 1}])
    of = {"data__train": None, "data__val": None, "data__mixture": mixture, "train__max_steps": 30}
    given = flags(two, run, **of, train__block_size=16, save__every_steps=30, eval__every_steps=100)
    trained = limited("pretrain/fabric_train.py", *given)
    assert trained.returncode == 0, trained.stderr
    traced = limited("scripts/trace_data.py", "verify", run)
    assert traced.returncode == 0 and "no fault" in traced.stdout, traced.stdout + traced.stderr


def test_maps_keep_no_descriptor_and_are_released(two: Path) -> None:
    """All shards of a dataset are read and mapped simultaneously, and no descriptor stays open."""
    before, maps = len(os.listdir("/proc/self/fd")), live_maps()
    dataset = PackedDataset(two / "a")
    dataset.tokens(0, dataset.n_tokens)
    dataset.document_start(np.arange(dataset.n_documents))
    assert len(os.listdir("/proc/self/fd")) == before and live_maps() == maps + 2 * SHARDS
    del dataset
    assert live_maps() == maps


def test_datasets_share_one_budget_of_maps(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two datasets share the process's budget of maps, and give the same tokens."""
    whole = PackedDataset(two / "b").tokens(0, 20 * SHARDS)
    monkeypatch.setattr(lit_data.packed.reader, "MAX_MAPS", live_maps() + 9)
    one, other = PackedDataset(two / "a"), PackedDataset(two / "b")
    for at in range(0, 20 * SHARDS, 20):
        one.tokens(at, at + 20)
        assert np.array_equal(other.tokens(at, at + 20), whole[at : at + 20])
        assert live_maps() <= lit_data.packed.reader.MAX_MAPS + 1


def test_lookups_of_documents_leave_few_files_open(two: Path) -> None:
    """`Documents` reads 300 tables, indices and token files, and keeps a bounded number of them open."""
    before = len(os.listdir("/proc/self/fd"))
    documents = Documents(PackedDataset(two / "a"))
    assert documents.find("doc-7") == [7]
    facts = documents.facts(range(SHARDS), ["id"])
    assert [facts[n]["id"] for n in range(SHARDS)] == [f"doc-{n}" for n in range(SHARDS)]
    starts = [documents.start(n) for n in range(SHARDS + 1)]
    assert starts == list(range(0, 20 * SHARDS + 1, 20))
    assert np.array_equal(documents.tokens(0, 20 * SHARDS), documents.dataset.tokens(0, 20 * SHARDS))
    assert len(os.listdir("/proc/self/fd")) <= before + MAX_OPEN
    del documents
    assert len(os.listdir("/proc/self/fd")) == before


def test_readers_share_open_files_and_see_replaced_ones(tmp_path: Path) -> None:
    """The open files of two readers share one limit; a closed reader releases its files."""
    before = len(os.listdir("/proc/self/fd"))
    readers = OpenFiles(), OpenFiles()
    for number in range(MAX_OPEN):
        (tmp_path / str(number)).write_bytes(b"%03d" % number)
        for reader in readers:
            assert reader.read(tmp_path / str(number), 3, 0) == b"%03d" % number
    assert len(os.listdir("/proc/self/fd")) == before + MAX_OPEN
    readers[1].close()
    (tmp_path / "new").write_bytes(b"new")
    (tmp_path / "new").replace(tmp_path / "3")
    assert readers[1].read(tmp_path / "3", 3, 0) == b"new"
    with pytest.raises(ValueError, match="3 ends before byte 4"):
        readers[1].read(tmp_path / "3", 4, 0)


@pytest.fixture
def restored_limit() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_the_soft_limit_is_raised(restored_limit: None) -> None:
    """The soft limit of open files becomes the hard one; a second call changes nothing."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    raise_open_file_limit()
    raised = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert raised[0] > 256 and raised[1] == hard
    raise_open_file_limit()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == raised


def test_a_map_outlives_the_deletion_of_its_file(tmp_path: Path) -> None:
    """A deleted file that is mapped stays readable; one that is too short is refused instead of causing a bus error."""
    path = tmp_path / "x.bin"
    np.arange(1000, dtype=np.int32).tofile(path)
    mapped = map_array(path, np.int32, (999,), 4)
    path.unlink()
    assert mapped.tolist() == list(range(1, 1000)) and not mapped.flags.writeable
    path.write_bytes(b"1234")
    with pytest.raises(ValueError, match=r"x\.bin is truncated: it has 4 bytes, and 8 are needed"):
        map_array(path, np.int32, (2,))


def test_a_dataset_is_checked_once_and_trusted_by_other_ranks(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that receives the dataset from rank 0 opens no shard before it needs it."""
    dataset = PackedDataset(two / "a")
    looked: list[str] = []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda path, *a, **k: looked.append(str(path)) or stat(path, *a, **k))
    again = pickle.loads(pickle.dumps(dataset))
    assert not looked
    assert np.array_equal(again.tokens(50, 90), dataset.tokens(50, 90))
    assert {Path(path).name for path in looked} == {f"data-{n:05d}.bin" for n in (2, 3, 4)}


def test_planning_ahead_gives_the_same_steps(two: Path) -> None:
    """The order, rows and spans of steps equal those of a loader without threads."""
    rows = ConcatRows(PackedDataset(two / "a"), 16)

    def steps(prefetch: int) -> Iterator[object]:
        order = Mixture.single(Order(rows.n_windows, 3))
        loader = Loader([rows], order, RankLayout(16, 4), [Segment(0, 0, 8)], prefetch_steps=prefetch)
        for step in loader.steps(2, 60):
            for batch in step.micro_batches:
                yield step.step, batch.tokens.tolist(), batch.targets.tolist(), batch.spans.document.tolist()

    assert list(steps(0)) == list(steps(4))


def test_documents_of_positions_in_many_shards_equal_a_naive_search(two: Path) -> None:
    """Grouped by shard, with few and with many positions per shard, in any order."""
    dataset = PackedDataset(two / "a")
    rng = np.random.default_rng(0)
    for n in (1, 7, 5000, 60000):
        positions = rng.integers(0, dataset.n_tokens, n)
        assert np.array_equal(dataset.document_of(positions), positions // 20)
        documents = rng.integers(0, dataset.n_documents + 1, n)
        assert np.array_equal(dataset.document_start(documents), documents * 20)
