"""The loader against slices of a Python list of documents."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_data.loader import (
    IGNORE_TARGET,
    PADDING,
    Layout,
    Loader,
    bucketed_boundaries,
    count_windows,
    hash_spans,
    read_rows,
)
from lit_data.order import Order, Segment
from lit_data.packed import PackedDataset, PackedWriter

MASK64 = (1 << 64) - 1


def make_dataset(folder: Path, lengths: list[int], shard_tokens: int = 50) -> tuple[PackedDataset, list[list[int]]]:
    """Documents of given lengths. Ids count up, so that each token says where it is (up to a vocabulary of 60 000)."""
    documents, next_id = [], 1
    with PackedWriter(
        folder, tokenizer={"fingerprint": "t"}, vocab_size=60_000, eos_id=0, shard_tokens=shard_tokens
    ) as writer:
        for i, length in enumerate(lengths):
            ids = [*range(next_id, next_id + length - 1), 0]
            next_id += length - 1
            documents.append(ids)
            writer.add(ids, id=str(i))
    return PackedDataset(folder), documents


@dataclass
class NaiveRow:
    tokens: list[int]
    targets: list[int]
    spans: list[tuple[int, int, int, int]]  # document, start, length, targets


def naive_row(documents: list[list[int]], window: int, block_size: int, document_mask: bool) -> NaiveRow:
    """One row, token by token."""
    flat = [(number, place, token) for number, d in enumerate(documents) for place, token in enumerate(d)]
    tokens, targets, spans = [], [], []
    for column in range(block_size):
        at = window * block_size + column
        if window < 0 or at >= len(flat):
            number, place, token, target = PADDING, None, 0, IGNORE_TARGET
        else:
            number, place, token = flat[at]
            target = IGNORE_TARGET
            if at + 1 < len(flat) and (not document_mask or flat[at + 1][0] == number):
                target = flat[at + 1][2]
        tokens.append(token)
        targets.append(target)
        if not spans or spans[-1][0] != number:
            spans.append([number, place or 0, 0, 0])
        spans[-1][2] += 1
        spans[-1][3] += target != IGNORE_TARGET
    return NaiveRow(tokens, targets, [tuple(s) for s in spans])


def naive_hash(tokens: list[int]) -> int:
    total = 0
    for place, token in enumerate(tokens):
        x = (token + place * 0x9E3779B97F4A7C15 + 1) & MASK64
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
        total += x ^ (x >> 31)
    return total & MASK64


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=25),
    block_size=st.integers(1, 40),
    document_mask=st.booleans(),
    data=st.data(),
)
def test_read_rows_equals_naive_slices(tmp_path_factory, lengths, block_size, document_mask, data):
    dataset, documents = make_dataset(tmp_path_factory.mktemp("d") / "set", lengths)
    n_windows = count_windows(dataset.n_tokens, block_size)
    windows = data.draw(st.lists(st.integers(-1, n_windows - 1), min_size=1, max_size=5))
    samples = np.arange(len(windows)) + 100
    batch = read_rows(dataset, np.asarray(windows), samples, block_size, document_mask)
    rows = [naive_row(documents, w, block_size, document_mask) for w in windows]

    assert batch.tokens.tolist() == [r.tokens for r in rows]
    assert batch.targets.tolist() == [r.targets for r in rows]
    assert batch.tokens.is_contiguous() and batch.targets.is_contiguous()
    s = batch.spans
    got = list(zip(s.place, s.document, s.start, s.length, s.targets, strict=True))
    assert got == [(place, *span) for place, row in enumerate(rows) for span in row.spans]
    assert s.window.tolist() == windows and s.sample.tolist() == samples.tolist()
    assert batch.n_targets == int((batch.targets != IGNORE_TARGET).sum())

    ends = np.cumsum(s.length)
    boundaries = batch.cu_seqlens.tolist()
    total = len(windows) * block_size
    assert boundaries[: len(ends) + 1] == [0, *ends.tolist()] and set(boundaries[len(ends) :]) == {total}
    flat = [t for r in rows for t in r.tokens]
    expected = [naive_hash(flat[end - length : end]) for end, length in zip(ends, s.length, strict=True)]
    assert s.hash.tolist() == expected


def test_a_document_that_ends_with_the_row_has_no_target_there(tmp_path):
    dataset, _ = make_dataset(tmp_path / "set", [4, 4, 3])
    batch = read_rows(dataset, np.asarray([0, 1, 2]), np.arange(3), 4, document_mask=True)
    assert batch.targets[0].tolist() == [2, 3, 0, IGNORE_TARGET]
    assert batch.targets[2].tolist() == [8, 0, IGNORE_TARGET, IGNORE_TARGET]  # the tail: 3 tokens and padding
    assert batch.spans.document.tolist() == [0, 1, 2, PADDING]
    open_rows = read_rows(dataset, np.asarray([0, 1, 2]), np.arange(3), 4, document_mask=False)
    assert open_rows.targets[0].tolist() == [2, 3, 0, 4]
    assert open_rows.targets[2].tolist() == [8, 0, IGNORE_TARGET, IGNORE_TARGET]


def test_rows_without_data(tmp_path):
    dataset, _ = make_dataset(tmp_path / "set", [4])
    batch = read_rows(dataset, np.asarray([-1, -1]), np.asarray([-1, -1]), 8, True)
    assert not batch.tokens.any() and (batch.targets == IGNORE_TARGET).all() and batch.n_targets == 0
    assert batch.cu_seqlens.tolist()[:3] == [0, 8, 16]


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=20), seed=st.integers(0, 2**32 - 1))
def test_hash_spans_equals_python(lengths, seed):
    tokens = np.random.default_rng(seed).integers(0, 2**31, sum(lengths))
    offsets = np.cumsum([0, *lengths[:-1]])
    expected = [naive_hash(tokens[o : o + n].tolist()) for o, n in zip(offsets, lengths, strict=True)]
    assert hash_spans(tokens, offsets).tolist() == expected


def test_hash_sees_order_and_shift():
    def one(ids: list[int]) -> int:
        return int(hash_spans(np.asarray(ids), np.asarray([0]))[0])

    assert len({one([1, 2, 3]), one([1, 3, 2]), one([2, 3, 4]), one([0, 1, 2, 3]), one([1, 2]), one([1, 2, 3, 0])}) == 6


@pytest.mark.parametrize(
    ("pieces", "size"), [(1, 16), (15, 16), (16, 32), (31, 32), (32, 64), (1000, 1024), (1024, 2048)]
)
def test_boundaries_fill_buckets_and_are_never_cut(pieces, size):
    out = bucketed_boundaries(np.arange(pieces), pieces)
    assert out.dtype == np.int32 and len(out) == size
    assert out.tolist() == [*range(pieces), *[pieces] * (size - pieces)]


def loaders(dataset, block_size, world, micro, batch, **kw):
    order = Order(count_windows(dataset.n_tokens, block_size), seed=11)
    layouts = [Layout(block_size, micro, rank, world) for rank in range(world)]
    return [Loader(dataset, order, layout, [Segment(0, 0, batch)], **kw) for layout in layouts]


@pytest.mark.parametrize(
    ("world", "micro", "batch"), [(1, 1, 1), (1, 3, 6), (2, 1, 4), (2, 2, 12), (4, 2, 8), (3, 5, 15)]
)
def test_each_token_is_an_input_exactly_once_an_epoch(tmp_path, world, micro, batch):
    lengths = np.random.default_rng(1).integers(1, 30, 60).tolist()
    dataset, documents = make_dataset(tmp_path / "set", lengths)
    n_windows = count_windows(dataset.n_tokens, 16)
    steps = -(-n_windows // batch)
    seen = np.zeros(dataset.n_tokens, dtype=np.int64)
    targets = 0
    starts = np.cumsum([0, *map(len, documents)])
    for loader in loaders(dataset, 16, world, micro, batch, end_sample=n_windows):
        for step in loader.steps(0, steps):
            assert len(step.micro_batches) == batch // (world * micro)
            targets += step.n_targets
            for m in step.micro_batches:
                s = m.spans
                for document, start, length in zip(s.document, s.start, s.length, strict=True):
                    if document != PADDING:
                        seen[starts[document] + start :][:length] += 1
    assert (seen == 1).all()
    # With the document mask each token but a document's first is a target once: also the one beyond a window's end.
    assert targets == dataset.n_tokens - dataset.n_documents


def test_a_step_holds_the_same_samples_for_every_world_size(tmp_path):
    dataset, _ = make_dataset(tmp_path / "set", [17] * 40)
    tables = []
    for world, micro in [(1, 8), (1, 2), (2, 4), (2, 1), (4, 2)]:
        steps = []
        for step in range(3, 9):  # beyond one epoch of 43 windows
            rows: dict[int, list[int]] = {}
            for loader in loaders(dataset, 16, world, micro, 8):
                for m in loader.read_step(step).micro_batches:
                    rows |= dict(zip(m.spans.sample.tolist(), m.tokens.tolist(), strict=True))
            assert sorted(rows) == list(range(step * 8, step * 8 + 8))
            steps.append(sorted(rows.items()))
        tables.append(steps)
    assert all(t == tables[0] for t in tables)


def test_prefetched_steps_equal_steps_read_alone(tmp_path):
    dataset, _ = make_dataset(tmp_path / "set", [9] * 30)
    (loader,) = loaders(dataset, 8, 1, 2, 4)
    for step, data in zip(range(5, 12), loader.steps(5, 12), strict=True):
        alone = loader.read_step(step)
        assert data.step == step
        for a, b in zip(data.micro_batches, alone.micro_batches, strict=True):
            assert a.tokens.equal(b.tokens) and a.targets.equal(b.targets) and a.cu_seqlens.equal(b.cu_seqlens)


def test_samples_beyond_the_end_are_rows_without_data(tmp_path):
    dataset, _ = make_dataset(tmp_path / "set", [10] * 4)
    (loader,) = loaders(dataset, 8, 1, 4, 4, end_sample=5)
    (batch,) = loader.read_step(1).micro_batches
    assert batch.spans.sample.tolist() == [4, -1, -1, -1] and (batch.spans.window[1:] == -1).all()
    assert (batch.targets[1:] == IGNORE_TARGET).all() and batch.n_targets > 0


def loader_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "llammlein-loader"]


def test_an_error_in_the_thread_is_raised_where_it_is_read(tmp_path, monkeypatch):
    dataset, _ = make_dataset(tmp_path / "set", [10] * 10)
    (loader,) = loaders(dataset, 8, 1, 1, 1)
    good = loader.read_step

    def read(step: int):
        if step == 2:
            raise OSError("the disk is gone")
        return good(step)

    monkeypatch.setattr(loader, "read_step", read)
    steps = loader.steps(0, 5)
    assert [next(steps).step, next(steps).step] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(steps)
    assert not loader_threads()


def test_closing_the_iterator_ends_the_thread(tmp_path):
    dataset, _ = make_dataset(tmp_path / "set", [10] * 10)
    (loader,) = loaders(dataset, 8, 1, 1, 1)
    steps = loader.steps(0, 1000)
    next(steps)
    assert len(loader_threads()) == 1
    steps.close()
    assert not loader_threads()


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    dataset, _ = make_dataset(tmp_path / "set", [10] * 10)
    with pytest.raises(AssertionError, match="no multiple of 4"):
        loaders(dataset, 8, 2, 2, 6)
