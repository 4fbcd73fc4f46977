"""The packed format, compared with a reader written from Megatron's description that uses only struct."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from document_facts import facts_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_data.packed.documents import Documents
from lit_data.packed.index import MAX_DOCUMENT_TOKENS
from lit_data.packed.reader import FEW_VALUES, PackedDataset, _last_at_or_below
from lit_data.packed.summary import faults_of
from lit_data.packed.writer import PackedWriter

FACTS = {"fingerprint": "f" * 64, "kind": "test", "folder": None}


def write(folder: Path, documents: list[list[int]], vocab_size: int = 100, shard_tokens: int = 1 << 31, **kw) -> Path:
    with PackedWriter(
        folder, tokenizer=FACTS, vocab_size=vocab_size, eos_id=0, shard_tokens=shard_tokens, **kw
    ) as writer:
        for i, ids in enumerate(documents):
            writer.add(ids, id=f"d{i}", source="made", place=i, n_bytes=3 * len(ids))
    return folder


def naive_read(folder: Path) -> list[list[int]]:
    """All documents of all shards, read by the MMIDIDX layout alone."""
    documents = []
    for idx in sorted(folder.glob("*.idx")):
        raw = idx.read_bytes()
        assert raw[:9] == b"MMIDIDX\x00\x00"
        (version,) = struct.unpack_from("<Q", raw, 9)
        (code,) = struct.unpack_from("<B", raw, 17)
        n_sequences, n_boundaries = struct.unpack_from("<QQ", raw, 18)
        assert version == 1 and n_boundaries == n_sequences + 1
        letter, width = {8: ("H", 2), 4: ("i", 4)}[code]
        at = 34
        lengths = struct.unpack_from(f"<{n_sequences}i", raw, at)
        at += 4 * n_sequences
        pointers = struct.unpack_from(f"<{n_sequences}q", raw, at)
        at += 8 * n_sequences
        boundaries = struct.unpack_from(f"<{n_boundaries}q", raw, at)
        at += 8 * n_boundaries
        assert at == len(raw) and list(boundaries) == list(range(n_boundaries))
        data = idx.with_suffix(".bin").read_bytes()
        assert len(data) == width * sum(lengths)
        for length, pointer in zip(lengths, pointers, strict=True):
            documents.append(list(struct.unpack_from(f"<{length}{letter}", data, pointer)))
    return documents


DOCUMENT = st.lists(st.integers(0, 99), max_size=12).map(lambda ids: [*ids, 0])
DOCUMENTS = st.lists(DOCUMENT, min_size=1, max_size=20)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents=DOCUMENTS, shard_tokens=st.integers(1, 60), wide=st.booleans())
def test_round_trip_and_positions(tmp_path_factory, documents, shard_tokens, wide):
    folder = tmp_path_factory.mktemp("packed") / "set"
    write(folder, documents, vocab_size=70_000 if wide else 100, shard_tokens=shard_tokens)
    assert naive_read(folder) == documents

    dataset = PackedDataset(folder)
    stream = [t for d in documents for t in d]
    assert dataset.n_tokens == len(stream) and dataset.n_documents == len(documents)
    assert dataset.manifest.bytes == 3 * len(stream)
    for start in range(0, len(stream) + 1, 3):
        for stop in range(start, len(stream) + 1, 5):
            assert dataset.tokens(start, stop).tolist() == stream[start:stop]
    owner = [number for number, d in enumerate(documents) for _ in d]
    assert dataset.document_of(np.arange(len(stream))).tolist() == owner
    starts = [sum(map(len, documents[:i])) for i in range(len(documents) + 1)]
    assert dataset.document_start(np.arange(len(documents) + 1)).tolist() == starts
    assert faults_of(dataset.path) == []


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents=DOCUMENTS, shard_tokens=st.integers(1, 60), data=st.data())
def test_resuming_after_a_kill_gives_the_same_files(tmp_path_factory, documents, shard_tokens, data):
    """Documents arrive in batches of any size, the writer dies at some point, and a new one resumes its last state."""
    folder = tmp_path_factory.mktemp("packed")
    whole = write(folder / "whole", documents, shard_tokens=shard_tokens)

    synced = data.draw(st.integers(0, len(documents)), label="documents added before the state was taken")
    lost = data.draw(st.integers(synced, len(documents)), label="documents added before the kill")
    facts = {"tokenizer": FACTS, "vocab_size": 100, "eos_id": 0, "shard_tokens": shard_tokens}

    def add(writer: PackedWriter, first: int, last: int) -> None:
        while first < last:
            stop = data.draw(st.integers(first + 1, last))
            part = documents[first:stop]
            rows = {
                "id": [f"d{i}" for i in range(first, stop)],
                "source": ["made"] * len(part),
                "place": list(range(first, stop)),
                "bytes": [3 * len(ids) for ids in part],
            }
            tokens = np.asarray([t for ids in part for t in ids])
            writer.add_batch(tokens, np.asarray([len(ids) for ids in part]), rows)
            first = stop

    work = folder / "work"
    killed = PackedWriter(folder / "again", work=work, **facts)
    add(killed, 0, synced)
    state = json.loads(json.dumps(killed.state()))
    add(killed, synced, lost)
    killed.abandon()  # closes the files unchanged, as the kernel would

    with PackedWriter(folder / "again", work=work, state=state, **facts) as writer:
        add(writer, synced, len(documents))
    assert not work.exists()
    assert {f.name: f.read_bytes() for f in whole.iterdir()} == {
        f.name: f.read_bytes() for f in (folder / "again").iterdir()
    }


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 2], "document 'x' (y.txt 3) does not end with the end-of-document id 0"),
        ([], "document 'x' (y.txt 3) has no tokens"),
        ([7, 100, 0], "document 'x' (y.txt 3) holds token id 100, outside the vocabulary of 100"),
        ([-1, 0], "document 'x' (y.txt 3) holds token id -1, outside"),
    ],
)
def test_bad_document_is_refused(tmp_path, ids, message):
    with (
        pytest.raises(ValueError) as error,
        PackedWriter(tmp_path / "set", tokenizer=FACTS, vocab_size=100, eos_id=0) as writer,
    ):
        writer.add(np.asarray(ids, dtype=np.int64), id="x", source="y.txt", place=3)
    assert message in str(error.value)
    assert not any(tmp_path.iterdir())


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=40))
def test_search_equals_numpy(lengths):
    ascending = np.cumsum([0, *lengths])
    values = np.arange(ascending[-1] + 5)
    expected = np.searchsorted(ascending, values, side="right") - 1
    for some in (slice(None), slice(0, FEW_VALUES), slice(0, 0)):
        np.testing.assert_array_equal(_last_at_or_below(ascending, values[some]), expected[some])


def test_shards_are_cut_at_the_limit(tmp_path):
    folder = write(tmp_path / "set", [[1, 0], [2, 0], [3, 3, 3, 3, 3, 0], [4, 0]], shard_tokens=4)
    manifest = PackedDataset(folder).manifest
    assert [s.tokens for s in manifest.shards] == [4, 6, 2]
    assert [s.name for s in manifest.shards] == ["data-00000", "data-00001", "data-00002"]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_499, "uint16"), (65_500, "int32"), (200_000, "int32")])
def test_dtype_changes_at_megatrons_limit(tmp_path, vocab_size, dtype):
    top = vocab_size - 1
    folder = write(tmp_path / "set", [[top, 0]], vocab_size=vocab_size)
    dataset = PackedDataset(folder)
    assert dataset.manifest.dtype == dtype and dataset.tokens(0, 2).dtype == np.dtype(dtype)
    assert naive_read(folder) == [[top, 0]]


def test_document_facts(tmp_path):
    folder = tmp_path / "set"
    with PackedWriter(
        folder, tokenizer=FACTS, vocab_size=10, eos_id=0, metadata=["genre"], shard_tokens=5, name="text"
    ) as writer:
        writer.add([1, 2, 0], id="a", source="x.jsonl", place=1, n_bytes=7, genre="drama")
        writer.add([3, 0], id="b", source="x.jsonl", place=2, n_bytes=2, genre="")
        writer.add([4, 0], id="a", source="y.jsonl", place=1, n_bytes=2, genre="é")
    dataset = PackedDataset(folder)
    assert facts_of(dataset, 0) == {
        "number": 0, "id": "a", "source": "x.jsonl", "place": 1, "bytes": 7, "words": None, "genre": "drama",
        "start": 0, "tokens": 3,
    }  # fmt: skip
    assert facts_of(dataset, 2)["genre"] == "é" and facts_of(dataset, 2)["start"] == 5
    assert Documents(dataset).find("a") == [0, 2] and Documents(dataset).find("none") == []
    assert pq.read_table(folder / "text-00001.docs.parquet")["id"].to_pylist() == ["a"]
    with pytest.raises(ValueError, match="document 3 is not in"):
        facts_of(dataset, 3)


def test_document_facts_across_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr("lit_data.packed.writer.DOCUMENTS_PER_GROUP", 3)
    dataset = PackedDataset(write(tmp_path / "set", [[i, 0] for i in range(8)]))
    assert [facts_of(dataset, i)["id"] for i in range(8)] == [f"d{i}" for i in range(8)]


def test_pickled_dataset_reads_the_same(tmp_path):
    dataset = PackedDataset(write(tmp_path / "set", [[1, 2, 0], [3, 0]]))
    again = pickle.loads(pickle.dumps(dataset))
    assert again.tokens(0, 5).tolist() == [1, 2, 0, 3, 0] and again.fingerprint == dataset.fingerprint


def test_fingerprint_depends_on_the_content(tmp_path):
    prints = [
        PackedDataset(write(tmp_path / name, documents)).fingerprint
        for name, documents in {
            "a": [[1, 0], [2, 0]],
            "same": [[1, 0], [2, 0]],
            "order": [[2, 0], [1, 0]],
            "cut": [[1, 0, 2, 0]],
        }.items()
    ]
    assert prints[0] == prints[1] and len(set(prints)) == 3


@pytest.mark.parametrize("kind", ["bin", "idx", "docs.parquet"])
def test_a_truncated_or_missing_file_is_named(tmp_path, kind):
    folder = write(tmp_path / "set", [[1, 2, 0], [3, 0]])
    file = folder / f"data-00000.{kind}"
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    with pytest.raises(
        ValueError, match=rf"data-00000\.{kind} has {len(data) - 1} bytes instead of {len(data)}.*again"
    ):
        PackedDataset(folder)
    file.unlink()
    with pytest.raises(ValueError, match=rf"data-00000\.{kind} is missing"):
        PackedDataset(folder)


@pytest.mark.parametrize("kind", ["bin", "idx", "docs.parquet"])
def test_verify_finds_a_flipped_bit(tmp_path, kind):
    folder = write(tmp_path / "set", [[1, 2, 0], [3, 0]])
    file = folder / f"data-00000.{kind}"
    data = bytearray(file.read_bytes())
    data[-3 if kind == "bin" else 36 if kind == "idx" else 10] ^= 4
    file.write_bytes(data)
    (found,) = faults_of(folder)
    assert f"data-00000.{kind}" in found


def test_a_wrong_count_in_the_index_is_refused(tmp_path):
    folder = write(tmp_path / "set", [[1, 2, 0], [3, 0]])
    data = bytearray((folder / "data-00000.idx").read_bytes())
    data[18] = 3
    (folder / "data-00000.idx").write_bytes(data)
    with pytest.raises(ValueError, match="holds 3 documents, but the manifest says 2"):
        PackedDataset(folder)


def test_a_folder_without_manifest_is_not_a_dataset(tmp_path):
    folder = write(tmp_path / "set", [[1, 0]])
    (folder / "manifest.json").rename(folder / "elsewhere")
    with pytest.raises(FileNotFoundError, match="not a packed dataset"):
        PackedDataset(folder)
    with pytest.raises(FileNotFoundError, match="not a packed dataset"):
        PackedDataset(tmp_path / "nowhere")
    write(tmp_path / "out" / "train", [[1, 0]])
    with pytest.raises(FileNotFoundError, match=r"did you mean .*train"):
        PackedDataset(tmp_path / "out")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"shards": []}'])
def test_a_damaged_manifest_is_named(tmp_path, text):
    folder = write(tmp_path / "set", [[1, 0]])
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged or of another version"):
        PackedDataset(folder)


def test_another_format_version_is_refused(tmp_path):
    folder = write(tmp_path / "set", [[1, 0]])
    raw = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**raw, "format_version": 99}))
    with pytest.raises(ValueError, match="format version 99"):
        PackedDataset(folder)


@pytest.mark.parametrize(
    ("ids", "message"), [([100, 0], "id 100, outside"), ([-1, 0], "id -1, outside"), ([], "no tokens")]
)
def test_bad_documents_are_refused_and_leave_nothing(tmp_path, ids, message):
    with (
        pytest.raises(ValueError, match=message),
        PackedWriter(tmp_path / "set", tokenizer=FACTS, vocab_size=100, eos_id=0) as writer,
    ):
        writer.add([1, 0], id="good")
        writer.add(ids, id="bad")
    assert list(tmp_path.iterdir()) == []


def test_a_document_beyond_int32_lengths_is_refused(tmp_path):
    huge = np.broadcast_to(np.uint16(1), (MAX_DOCUMENT_TOKENS + 1,))  # a view: no memory behind it
    with (
        pytest.raises(ValueError, match="split it"),
        PackedWriter(tmp_path / "set", tokenizer=FACTS, vocab_size=100, eos_id=0) as writer,
    ):
        writer.add(huge, id="huge")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_writer_leaves_nothing(tmp_path, error):
    with (
        pytest.raises(error),
        PackedWriter(tmp_path / "set", tokenizer=FACTS, vocab_size=100, eos_id=0, shard_tokens=2) as writer,
    ):
        writer.add([1, 0], id="a")
        writer.add([2, 0], id="b")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_failure_while_closing_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("lit_data.packed.writer.sync_file", fail)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / "set", [[1, 0]])
    assert list(tmp_path.iterdir()) == []


def test_empty_and_existing_outputs_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no documents"):
        write(tmp_path / "set", [])
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "set", [[1, 0]])
    with pytest.raises(ValueError, match="exists already"):
        write(tmp_path / "set", [[1, 0]])
    with pytest.raises(ValueError, match="end-of-document id 7"):
        PackedWriter(tmp_path / "other", tokenizer=FACTS, vocab_size=7, eos_id=7)


def test_columns_that_a_batch_lacks_stay_empty(tmp_path: Path) -> None:
    with PackedWriter(tmp_path / "data", tokenizer=FACTS, vocab_size=100, eos_id=0) as writer:
        writer.add_batch(np.asarray([5, 0, 0]), np.asarray([2, 1]), {"id": ["a", "b"]})
    manifest = PackedDataset(tmp_path / "data").manifest
    assert (manifest.documents, manifest.tokens, manifest.bytes, manifest.words) == (2, 3, 0, None)
