"""Packings, compared with the documents: each token once, no short document cut, little padding."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_data.loading import row_plans as plans
from lit_data.loading.row_plans import best_fit_decreasing, check_plan, pack
from lit_data.loading.rows import open_rows
from lit_data.packed.reader import PackedDataset
from lit_data.packed.writer import PackedWriter


def dataset_of(folder: Path, lengths: list[int], shard_tokens: int = 64) -> PackedDataset:
    facts = {"fingerprint": "t"}
    with PackedWriter(folder, tokenizer=facts, vocab_size=99, eos_id=0, shard_tokens=shard_tokens) as writer:
        for i, length in enumerate(lengths):
            writer.add([*([1 + i % 98] * (length - 1)), 0], id=str(i))
    return PackedDataset(folder)


@pytest.mark.parametrize("packing", ["concat", "best_fit", "pad"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60), block_size=st.integers(2, 24))
def test_each_token_is_in_one_row(tmp_path_factory, packing, lengths, block_size):
    dataset = dataset_of(tmp_path_factory.mktemp("p") / "set", lengths)
    rows = open_rows(dataset, packing, block_size)
    pieces = rows.pieces(np.arange(rows.n_windows, dtype=np.int64))
    seen = [(d, s + i) for d, s, n in zip(pieces.document, pieces.start, pieces.length, strict=True) for i in range(n)]
    assert sorted(seen) == [(d, i) for d, length in enumerate(lengths) for i in range(length)]
    filled = np.bincount(pieces.row, weights=pieces.length, minlength=rows.n_windows)
    assert filled.min() >= 1 and filled.max() <= block_size
    assert pieces.ends.tolist() == [
        s + n == lengths[d] for d, s, n in zip(pieces.document, pieces.start, pieces.length, strict=True)
    ]
    for document in range(len(lengths)):
        expected = np.unique(pieces.row[pieces.document == document])
        assert rows.windows_of_document(document).tolist() == expected.tolist()
    if packing != "concat":
        # A document that fits in a row is not cut; a longer one is cut into full rows and a remainder.
        for document, length in enumerate(lengths):
            own = sorted(pieces.length[pieces.document == document].tolist(), reverse=True)
            whole = [block_size] * (length // block_size)
            assert own == [*whole, *([length % block_size] if length % block_size else [])]
        assert check_plan(rows.plan, dataset, block_size) == []  # type: ignore[attr-defined]
    if packing == "pad":
        assert np.bincount(pieces.row).max() == 1


def naive_best_fit_decreasing(lengths: list[int], capacity: int) -> int:
    """Number of bins that the textbook algorithm needs."""
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [r for r in room if r >= length]
        if fitting:
            room[room.index(min(fitting))] -= length
        else:
            room.append(capacity - length)
    return len(room)


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), max_size=80), capacity=st.integers(30, 40))
def test_best_fit_needs_no_more_rows_than_the_textbook_algorithm(lengths, capacity):
    bins = best_fit_decreasing(np.asarray(lengths, dtype=np.int64), capacity)
    used = np.bincount(bins, weights=lengths) if lengths else np.zeros(0)
    assert (used <= capacity).all() and (used > 0).all()
    assert len(used) == naive_best_fit_decreasing(lengths, capacity)


def test_best_fit_leaves_little_padding():
    """Lengths like those of web pages: rows are nearly full; with one document per row they would be mostly padding."""
    lengths = np.clip(np.random.default_rng(0).lognormal(6, 1.2, 20_000).astype(np.int64), 1, None)
    packed, padded = (pack(lengths, 2048, share=share)[1].max() + 1 for share in (True, False))
    assert lengths.sum() / (packed * 2048) > 0.995 and lengths.sum() / (padded * 2048) < 0.5


def test_groups_of_documents_are_packed_separately(tmp_path, monkeypatch):
    """Building a plan keeps one group in memory; a group's rows contain only its own documents."""
    monkeypatch.setattr(plans, "GROUP_DOCUMENTS", 7)
    dataset = dataset_of(tmp_path / "set", [3, 9, 14, 2, 5] * 6)
    rows = open_rows(dataset, "best_fit", 10)
    pieces = rows.pieces(np.arange(rows.n_windows, dtype=np.int64))
    groups = pieces.document // 7
    assert (np.diff(groups) >= 0).all()
    assert check_plan(rows.plan, dataset, 10) == []  # type: ignore[attr-defined]
    assert rows.windows_of_document(29).tolist() == np.unique(pieces.row[pieces.document == 29]).tolist()


def test_a_plan_is_built_once_and_named_after_its_inputs(tmp_path):
    dataset = dataset_of(tmp_path / "set", [3, 9, 14])
    open_rows(dataset, "best_fit", 8)
    (plan,) = (dataset.path / "plans").iterdir()
    before = {f.name: f.stat().st_mtime_ns for f in plan.iterdir()}
    open_rows(dataset, "best_fit", 8)
    assert {f.name: f.stat().st_mtime_ns for f in plan.iterdir()} == before
    open_rows(dataset, "best_fit", 9)
    open_rows(dataset, "pad", 8)
    other = dataset_of(tmp_path / "other", [3, 9, 15])
    open_rows(other, "best_fit", 8, tmp_path / "elsewhere")
    names = [p.name for p in [*(dataset.path / "plans").iterdir(), *(tmp_path / "elsewhere").iterdir()]]
    assert len(set(names)) == 4 and not (other.path / "plans").exists()


def test_a_damaged_plan_is_named(tmp_path):
    dataset = dataset_of(tmp_path / "set", [3, 9, 14])
    open_rows(dataset, "pad", 8)
    (plan,) = (dataset.path / "plans").iterdir()
    with open(plan / "pieces.bin", "r+b") as file:
        file.truncate(20)
    with pytest.raises(ValueError, match=r"is damaged .*delete it to have it rebuilt"):
        open_rows(dataset, "pad", 8)
    shutil.rmtree(plan)
    open_rows(dataset, "pad", 8)


def test_a_wrong_plan_is_detected(tmp_path):
    dataset = dataset_of(tmp_path / "set", [3, 9, 14, 4])
    open_rows(dataset, "best_fit", 8)
    (plan,) = (dataset.path / "plans").iterdir()
    pieces = np.fromfile(plan / "pieces.bin", dtype=plans.PIECE)
    pieces["start"][-1] += 1
    pieces.tofile(plan / "pieces.bin")
    faults = check_plan(open_rows(dataset, "best_fit", 8).plan, dataset, 8)  # type: ignore[attr-defined]
    assert faults and "is not covered exactly once" in faults[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder_names_the_flag(tmp_path):
    dataset = dataset_of(tmp_path / "set", [3, 9])
    dataset.path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(ValueError, match="--data.plan_dir"):
        open_rows(dataset, "pad", 8)


def test_a_plan_folder_that_is_a_file_names_the_flag(tmp_path):
    dataset = dataset_of(tmp_path / "set", [3, 9])
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--data.plan_dir"):
        open_rows(dataset, "pad", 8, tmp_path / "file")
