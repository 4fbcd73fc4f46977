"""Copies from the training data against brute force, and the steps that saw them against the record."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import pytest
import recorded_run
from hypothesis import given
from hypothesis import strategies as st
from hypothesis_examples import examples
from running import EOS, VOCAB

from lit_data.packed.reader import PackedDataset
from lit_data.packed.writer import PackedWriter
from lit_data.record.trace import open_run
from lit_eval.generation import copies as search
from lit_eval.generation.copies import add_steps, find_copies
from lit_eval.generation.memorization import evaluate_memorization
from lit_eval.generation.settings import GenerationSettings
from lit_eval.generation.text import Generated
from lit_eval.model.eval_model import EvalModel


def write(folder: Path, documents: list[list[int]], shard_tokens: int) -> PackedDataset:
    facts = {"kind": "none", "fingerprint": "test", "vocab_size": VOCAB, "eos_id": EOS, "bos_id": None, "folder": None}
    with PackedWriter(folder, tokenizer=facts, vocab_size=VOCAB, eos_id=EOS, shard_tokens=shard_tokens) as writer:
        for i, ids in enumerate(documents):
            writer.add(np.asarray([*ids, EOS]), id=f"doc-{i}", source="s", place=i, n_bytes=1)
    return PackedDataset(folder)


def brute_force(text: list[int], datasets: list[list[list[int]]], m: int) -> tuple[int, int, set, int]:
    """(length, start, places, tokens copied): every window of the text against every window of the data."""
    windows: dict[tuple[int, ...], list[tuple[int, int, int]]] = {}
    for number, documents in enumerate(datasets):
        for d, ids in enumerate(documents):
            for i in range(len(ids)):
                for j in range(i + m, len(ids) + 1):
                    windows.setdefault(tuple(ids[i:j]), []).append((number, d, i))
    found = [(j - i, i) for i in range(len(text)) for j in range(i + m, len(text) + 1) if tuple(text[i:j]) in windows]
    if not found:
        return 0, 0, set(), 0
    length, start = max(found, key=lambda pair: (pair[0], -pair[1]))
    copied = {k for n, i in found for k in range(i, i + n)}
    return length, start, set(windows[tuple(text[start : start + length])]), len(copied)


tokens = st.integers(2, 4)
documents = st.lists(st.lists(tokens, min_size=1, max_size=12), min_size=1, max_size=4)


@examples(25)
@given(
    datasets=st.lists(documents, min_size=1, max_size=2),
    texts=st.lists(st.lists(st.one_of(tokens, st.just(EOS)), max_size=14), max_size=3),
    m=st.integers(1, 6),
    piece=st.sampled_from([1, 5, 1000]),
)
def test_equals_brute_force(datasets: list[list[list[int]]], texts: list[list[int]], m: int, piece: int) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "PLACES", 1000)
        patch.setattr(search, "PAIRS", 7)
        packed = [write(Path(folder) / str(i), documents, shard_tokens=9) for i, documents in enumerate(datasets)]
        copies = find_copies(texts, packed, min_tokens=m, piece=piece)
    for copy, text in zip(copies, texts, strict=True):
        places = {(p.dataset, p.document, p.start) for p in copy.places}
        assert (copy.length, copy.start, places, copy.copied) == brute_force(text, datasets, m)
        assert copy.occurrences == len(places) and copy.tokens == sum(id != EOS for id in text)
        assert all(p.id == f"doc-{p.document}" and p.source == "s" for p in copy.places)


def test_a_planted_passage_in_many_tokens(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(2, VOCAB, size=20_000) for _ in range(50)]
    documents[17][5_000:5_070] = planted = rng.integers(2, VOCAB, size=70)
    documents[31][19_960:] = planted[:40]
    dataset = write(tmp_path / "data", [d.tolist() for d in documents], shard_tokens=300_000)
    text = [*rng.integers(2, VOCAB, size=100).tolist(), *planted.tolist(), *rng.integers(2, VOCAB, size=9).tolist()]
    (copy,) = find_copies([text], [dataset], piece=65_536)
    assert (copy.length, copy.start, copy.occurrences, copy.copied) == (70, 100, 1, 70)
    assert [(p.document, p.start, p.steps) for p in copy.places] == [(17, 5_000, None)]
    (short,) = find_copies([planted[:40].tolist()], [dataset])
    assert (short.length, [p.document for p in short.places]) == (40, [17, 31])


def test_the_task_on_a_run(generation_run: Path, generation_model: EvalModel, data: Path) -> None:
    """Texts of the training data are found, with the steps before the checkpoint; and a model without a record."""
    dataset = PackedDataset(data / "train")
    ids = dataset.tokens(0, int(dataset.document_start(np.asarray([1]))[0])).tolist()
    texts = [Generated(None, [5], 0, ids, None, "eos"), Generated(None, [5], 1, [VOCAB + 1] * 9, None, "length")]
    result = evaluate_memorization(
        generation_model, [[5]], GenerationSettings(num_samples=2), texts=texts, min_tokens=4
    )
    n = len(ids) - 1
    assert result.items == [n, 0] and result.metrics["longest_max"] == n and result.metrics["longest_mean"] == n / 2
    assert result.metrics["copied"] == pytest.approx(n / (n + 9)) and result.metrics["memorized"] == (n >= 50) / 2
    first = result.details["copies"][0]
    assert first["places"][0]["id"] == "doc-0" and first["text"] is not None
    assert set(first["places"][0]["steps"]) <= {0, 1} and result.source["data"] == [str(data / "train")]
    elsewhere = dataclasses.replace(generation_model, path=data / "hf")
    with pytest.raises(ValueError, match="no datapoint record beside it: give the packed training .* --train_data"):
        evaluate_memorization(elsewhere, [[5]], GenerationSettings(), texts=texts)
    again = evaluate_memorization(elsewhere, [[5]], GenerationSettings(), texts=texts, data=[data / "train"])
    assert again.items == result.items and again.details["copies"][0]["places"][0]["steps"] is None
    written = evaluate_memorization(generation_model, ["Gr"], GenerationSettings(max_new_tokens=12), min_tokens=1)
    assert written.n == 1 and 0 <= written.metrics["copied"] <= 1


def test_steps_are_those_of_the_record(tmp_path: Path) -> None:
    """Of a passage of a document that is cut into rows, against every row of the record."""
    folder, expected = recorded_run.prepare(tmp_path)
    recorded_run.write(folder)
    run = open_run(folder)
    (dataset,) = run.datasets
    record = expected.to_pylist()
    starts = dataset.document_start(np.arange(dataset.n_documents + 1))
    longest = int(np.diff(starts).argmax())
    first = int(starts[longest])
    steps = sorted({row["step"] for row in record if row["document"] == longest})
    for start, length in ((3, 9), (0, 36), (20, 8)):
        text = dataset.tokens(first + start, first + start + length).tolist()
        (copy,) = find_copies([text], [dataset])
        assert copy.length == length and (longest, start) in [(p.document, p.start) for p in copy.places]
        for before in (None, steps[-1]):
            add_steps([copy], run, before)
            for place in copy.places:
                seen = {
                    row["step"]
                    for row in record
                    if row["document"] == place.document
                    and row["start"] < place.start + length
                    and row["start"] + row["length"] > place.start
                    and (before is None or row["step"] < before)
                }
                assert place.steps == sorted(seen)
                assert before is not None or seen
