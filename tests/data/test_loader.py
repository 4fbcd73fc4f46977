"""The loader, compared with slices of a Python list of documents."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_data.loading.batches import IGNORE_TARGET, PADDING, bucket, read_rows
from lit_data.loading.loader import Loader, RankLayout
from lit_data.loading.mixture import Mixture, phase_list
from lit_data.loading.order import Order, Segment
from lit_data.loading.rows import ConcatRows, Rows, count_windows, open_rows
from lit_data.loading.shard_cache import ShardCache
from lit_data.packed.reader import PackedDataset
from lit_data.packed.writer import PackedWriter
from lit_data.record.span_hash import hash_spans
from lit_data.record.verify import naive_hash


def make_dataset(
    folder: Path, lengths: list[int], shard_tokens: int = 50, first_id: int = 1
) -> tuple[PackedDataset, list[list[int]]]:
    """Documents of given lengths. Ids count up, so each token shows its position (up to a vocabulary of 60 000)."""
    documents, next_id = [], first_id
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
    """One row of windows over the stream, token by token."""
    flat = [(number, place, token) for number, d in enumerate(documents) for place, token in enumerate(d)]
    inside = [] if window < 0 else flat[window * block_size : (window + 1) * block_size + 1]
    return fill(inside, documents, block_size, document_mask)


def naive_planned_row(
    documents: list[list[int]], pieces: list[tuple[int, int, int]], block_size: int, document_mask: bool
) -> NaiveRow:
    """One row of pieces (document, start, length), token by token; then the token after the last one."""
    inside = [(d, p, documents[d][p]) for d, start, length in pieces for p in range(start, start + length)]
    document, place, _ = inside[-1]
    if place + 1 < len(documents[document]):
        assert len(inside) == block_size  # no document that fits in a row is cut
        inside.append((document, place + 1, documents[document][place + 1]))
    return fill(inside, documents, block_size, document_mask)


def fill(
    inside: list[tuple[int, int, int]], documents: list[list[int]], block_size: int, document_mask: bool
) -> NaiveRow:
    """(document, position, token) of a row, and of one more target if there is one -> the row."""
    tokens, targets, spans = [], [], []
    for column in range(block_size):
        number, place, token = inside[column] if column < len(inside) else (PADDING, 0, 0)
        target = IGNORE_TARGET
        if column + 1 < len(inside) and not (document_mask and place + 1 == len(documents[number])):
            target = inside[column + 1][2]
        tokens.append(token)
        targets.append(target)
        if not spans or spans[-1][0] != number:
            spans.append([number, place, 0, 0])
        spans[-1][2] += 1
        spans[-1][3] += target != IGNORE_TARGET
    return NaiveRow(tokens, targets, [tuple(s) for s in spans])


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=25),
    block_size=st.integers(1, 40),
    document_mask=st.booleans(),
    packing=st.sampled_from(["concat", "best_fit", "pad"]),
    data=st.data(),
)
def test_read_rows_equals_naive_slices(tmp_path_factory, lengths, block_size, document_mask, packing, data):
    shard_tokens = data.draw(st.sampled_from([50, 10**6]))
    dataset, documents = make_dataset(tmp_path_factory.mktemp("d") / "set", lengths, shard_tokens)
    rows_of = open_rows(dataset, packing, block_size)
    windows = data.draw(st.lists(st.integers(-1, rows_of.n_windows - 1), min_size=1, max_size=5))
    samples = np.arange(len(windows)) + 100
    batch = read_rows(rows_of, np.asarray(windows), samples, document_mask)
    if packing == "concat":
        rows = [naive_row(documents, w, block_size, document_mask) for w in windows]
    else:
        rows = [
            naive_planned_row(documents, rows_of.plan.pieces_of_row(w), block_size, document_mask)
            if w >= 0
            else naive_row(documents, w, block_size, document_mask)
            for w in windows
        ]
    compare(batch, rows, block_size)
    assert batch.spans.window.tolist() == windows and batch.spans.sample.tolist() == samples.tolist()


def compare(batch, rows: list[NaiveRow], block_size: int) -> None:
    assert batch.tokens.tolist() == [r.tokens for r in rows]
    assert batch.targets.tolist() == [r.targets for r in rows]
    assert batch.tokens.is_contiguous() and batch.targets.is_contiguous()
    s = batch.spans
    got = list(zip(s.row, s.document, s.start, s.length, s.targets, strict=True))
    assert got == [(place, *span) for place, row in enumerate(rows) for span in row.spans]
    assert batch.n_targets == int((batch.targets != IGNORE_TARGET).sum())
    assert batch.n_inputs == int(s.length[s.document >= 0].sum())
    ends = np.cumsum(s.length)
    boundaries = batch.cu_seqlens.tolist()
    assert boundaries[: len(ends) + 1] == [0, *ends.tolist()] and set(boundaries[len(ends) :]) == {batch.tokens.numel()}
    step = max(1, (1 << len(ends).bit_length()) // 8)  # four steps for each doubling
    assert len(boundaries) == max(16, next(n for n in range(len(ends) + 1, 2 * len(ends) + 2) if n % step == 0))


def test_a_document_that_ends_with_the_row_has_no_target_there(tmp_path):
    dataset, _ = make_dataset(tmp_path / "set", [4, 4, 3])
    batch = read_rows(ConcatRows(dataset, 4), np.asarray([0, 1, 2]), np.arange(3), document_mask=True)
    assert batch.targets[0].tolist() == [2, 3, 0, IGNORE_TARGET]
    assert batch.targets[2].tolist() == [8, 0, IGNORE_TARGET, IGNORE_TARGET]  # the tail: 3 tokens and padding
    assert batch.spans.document.tolist() == [0, 1, 2, PADDING]
    open_rows = read_rows(ConcatRows(dataset, 4), np.asarray([0, 1, 2]), np.arange(3), document_mask=False)
    assert open_rows.targets[0].tolist() == [2, 3, 0, 4]
    assert open_rows.targets[2].tolist() == [8, 0, IGNORE_TARGET, IGNORE_TARGET]


def test_rows_without_data(tmp_path):
    dataset, _ = make_dataset(tmp_path / "set", [4])
    batch = read_rows(ConcatRows(dataset, 8), np.asarray([-1, -1]), np.asarray([-1, -1]), True)
    assert not batch.tokens.any() and (batch.targets == IGNORE_TARGET).all() and batch.n_targets == 0
    assert batch.cu_seqlens.tolist()[:3] == [0, 8, 16]


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=20), seed=st.integers(0, 2**32 - 1))
def test_hash_spans_equals_python(lengths, seed):
    tokens = np.random.default_rng(seed).integers(0, 2**31, sum(lengths))
    offsets = np.cumsum([0, *lengths[:-1]])
    expected = [naive_hash(tokens[o : o + n].tolist()) for o, n in zip(offsets, lengths, strict=True)]
    assert hash_spans(tokens, np.asarray(lengths)).tolist() == expected


def test_hash_depends_on_order_and_shift():
    def one(ids: list[int]) -> int:
        return int(hash_spans(np.asarray(ids), np.asarray([len(ids)]))[0])

    assert len({one([1, 2, 3]), one([1, 3, 2]), one([2, 3, 4]), one([0, 1, 2, 3]), one([1, 2]), one([1, 2, 3, 0])}) == 6


@pytest.mark.parametrize(
    ("pieces", "size"),
    [(1, 16), (15, 16), (16, 20), (20, 24), (31, 32), (32, 40), (1000, 1024), (1024, 1280), (2**37, 5 * 2**35)],
)
def test_sizes_of_boundaries(pieces, size):
    assert bucket(np.asarray([pieces])).tolist() == [size]


def loaders(dataset, block_size, world, micro, batch, packing="concat", order=None, **kw):
    rows = open_rows(dataset, packing, block_size)
    mixture = Mixture.single(order or Order(rows.n_windows, seed=11))
    layouts = [RankLayout(block_size, micro, rank, world) for rank in range(world)]
    return [Loader([rows], mixture, layout, [Segment(0, 0, batch)], **kw) for layout in layouts]


@pytest.mark.parametrize("packing", ["concat", "best_fit", "pad"])
@pytest.mark.parametrize(
    ("world", "micro", "batch"), [(1, 1, 1), (1, 3, 6), (2, 1, 4), (2, 2, 12), (4, 2, 8), (3, 5, 15)]
)
def test_each_token_is_an_input_exactly_once_an_epoch(tmp_path, world, micro, batch, packing):
    lengths = np.random.default_rng(1).integers(1, 30, 60).tolist()
    dataset, documents = make_dataset(tmp_path / "set", lengths)
    n_windows = open_rows(dataset, packing, 16).n_windows
    steps = -(-n_windows // batch)
    seen = np.zeros(dataset.n_tokens, dtype=np.int64)
    targets = 0
    starts = np.cumsum([0, *map(len, documents)])
    for loader in loaders(dataset, 16, world, micro, batch, packing, end_sample=n_windows):
        for step in loader.steps(0, steps):
            assert len(step.micro_batches) == batch // (world * micro)
            targets += step.n_targets
            for m in step.micro_batches:
                s = m.spans
                for document, start, length in zip(s.document, s.start, s.length, strict=True):
                    if document != PADDING:
                        seen[starts[document] + start :][:length] += 1
    assert (seen == 1).all()
    # With the document mask each token except a document's first is a target once, including the one after a window.
    assert targets == dataset.n_tokens - dataset.n_documents


def test_a_step_has_the_same_samples_for_every_world_size(tmp_path):
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


def same(a, b) -> bool:
    tensors = all(getattr(a, name).equal(getattr(b, name)) for name in ("tokens", "targets", "cu_seqlens"))
    spans = all(np.array_equal(x, y) for x, y in zip(vars(a.spans).values(), vars(b.spans).values(), strict=True))
    return tensors and spans and (a.n_targets, a.n_inputs) == (b.n_targets, b.n_inputs)


def mixed(folder: Path, packing: str) -> tuple[list[Rows], Mixture]:
    """Three datasets and two phases."""
    rng = np.random.default_rng(5)
    rows: list[Rows] = []
    for d in range(3):
        dataset, _ = make_dataset(folder / str(d), rng.integers(1, 40, 100 + 50 * d).tolist(), 700, 1 + 15000 * d)
        rows.append(open_rows(dataset, packing, 16))
    orders = tuple(Order(r.n_windows, 3, d, block_windows=8, group_blocks=3) for d, r in enumerate(rows))
    return rows, Mixture(orders, phase_list([(0, (1, 2, 0)), (40, (1, 1, 1))]), 3)


@pytest.mark.parametrize("packing", ["concat", "best_fit", "pad"])
@pytest.mark.parametrize("prefetch", [0, pytest.param(1, marks=pytest.mark.slow), 2, 16])
def test_resume_at_any_step_equals_steps_read_alone(tmp_path, packing, prefetch):
    """Several datasets, and a segment with another batch size."""
    rows, mixture = mixed(tmp_path, packing)
    segments = [Segment(0, 0, 4), Segment(10, 40, 8)]
    for rank in range(2):
        loader = Loader(rows, mixture, RankLayout(16, 2, rank, 2), segments, prefetch_steps=prefetch)
        alone = [loader.read_step(step) for step in range(40)]
        assert len({d for step in alone for m in step.micro_batches for d in m.spans.dataset.tolist()} - {-1}) == 3
        for first in (0, 1, 9, 10, 33):
            steps = list(loader.steps(first, 40))
            assert [s.step for s in steps] == list(range(first, 40))
            for a, b in zip(steps, alone[first:], strict=True):
                assert all(map(same, a.micro_batches, b.micro_batches)) and len(a.micro_batches) == len(b.micro_batches)


@pytest.mark.parametrize("packing", ["concat", "best_fit", "pad"])
def test_a_cache_changes_nothing(tmp_path, packing):
    rows, mixture = mixed(tmp_path, packing)
    segments = [Segment(0, 0, 4)]
    plain = Loader(rows, mixture, RankLayout(16, 2), segments)
    caches = [ShardCache(r.dataset, tmp_path / "cache", 100_000, chunk_bytes=1000) for r in rows]
    cached = Loader(rows, mixture, RankLayout(16, 2), segments, caches=caches)
    for a, b in zip(plain.steps(3, 200), cached.steps(3, 200), strict=True):
        assert all(map(same, a.micro_batches, b.micro_batches))
    cached.close()


def test_a_mixture_reads_each_row_from_its_dataset(tmp_path):
    """Tokens of dataset d start at 15 000 d: each comes from the right dataset and the right row."""
    rows, mixture = mixed(tmp_path, "concat")
    loader = Loader(rows, mixture, RankLayout(16, 8), [Segment(0, 0, 8)])
    for step in loader.steps(0, 100):
        (batch,) = step.micro_batches
        dataset, _, window = mixture.locate(batch.spans.sample)
        assert batch.spans.window.tolist() == window.tolist()
        for row, d, w in zip(batch.tokens.numpy(), dataset.tolist(), window.tolist(), strict=True):
            alone = read_rows(rows[d], np.asarray([w]), np.asarray([0]), True)
            assert row.tolist() == alone.tokens[0].tolist()
            assert ((row == 0) | (row // 15000 == d)).all()


def test_mock_repeats_the_first_step(tmp_path):
    dataset, _ = make_dataset(tmp_path / "set", [9] * 30)
    (loader,) = loaders(dataset, 8, 1, 2, 4, mock=True)
    steps = list(loader.steps(2, 6))
    assert [s.step for s in steps] == [2, 3, 4, 5]
    assert all(s.micro_batches[0].tokens is steps[0].micro_batches[0].tokens for s in steps)


def test_samples_beyond_the_end_are_rows_without_data(tmp_path):
    dataset, _ = make_dataset(tmp_path / "set", [10] * 4)
    (loader,) = loaders(dataset, 8, 1, 4, 4, end_sample=5)
    (batch,) = loader.read_step(1).micro_batches
    assert batch.spans.sample.tolist() == [4, -1, -1, -1] and (batch.spans.window[1:] == -1).all()
    assert (batch.targets[1:] == IGNORE_TARGET).all() and batch.n_targets > 0


def loader_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "llammlein-loader"]


def test_an_error_in_the_thread_is_raised_in_the_reader(tmp_path, monkeypatch):
    dataset, _ = make_dataset(tmp_path / "set", [10] * 10)
    (loader,) = loaders(dataset, 8, 1, 1, 1)
    good = loader._read

    def read(plan, step, *of):
        if step == 2:
            raise OSError("the disk is gone")
        return good(plan, step, *of)

    monkeypatch.setattr(loader, "_read", read)
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


def test_1024_ranks_over_ten_trillion_tokens_draw_each_row_once():
    """Positions only: some steps' rows on all ranks are all different; each step is the union of its ranks' rows."""
    n_windows, world, micro, batch = count_windows(10**13, 2048), 1024, 8, 16384
    for order in (Order(n_windows, 9), Order(n_windows, 9, block_windows=512)):
        seen = []
        for step in (0, 1, 2, 1000, 298_022, 298_023):
            parts = [
                np.arange(micro) + step * batch + (m * world + rank) * micro
                for rank in range(world)
                for m in range(batch // (world * micro))
            ]
            samples = np.concatenate(parts)
            assert np.array_equal(np.sort(samples), np.arange(step * batch, (step + 1) * batch))
            epoch, window = order.locate(samples)
            seen.append(epoch * n_windows + window)
        drawn = np.concatenate(seen)
        assert len(np.unique(drawn)) == len(drawn) and drawn.min() >= 0
