"""Hugging Face datasets as a source, from local folders, offline."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lit_data.corpus.files import ReadErrors, list_files, part_of_files
from lit_data.corpus.hf_source import HubDataset, parse_hub_dataset
from lit_data.corpus.readers import Place, read_documents


@pytest.fixture
def corpus(tmp_path, monkeypatch) -> Path:
    """A dataset of two data files in train (row groups of 7) and one in test."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    for name, rows in {"train-0": range(20), "train-1": range(20, 33), "test-0": range(33, 36)}.items():
        table = pa.table(
            {
                "key": [f"k{i}" for i in rows],
                "text": [None if i == 25 else f"text {i} ä" for i in rows],
                "genre": ["law"] * len(rows),
                "unread": list(rows),
            }
        )
        pq.write_table(table, tmp_path / "set" / f"{name}.parquet", row_group_size=7)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("hf:name", HubDataset("name", None, "train")),
        ("hf:org/name@de:validation", HubDataset("org/name", "de", "validation")),
        ("hf:./folder:test", HubDataset("./folder", None, "test")),
        ("folder/hf:x", None),
        ("x.jsonl", None),
    ],
)
def test_spec(spec, expected):
    assert parse_hub_dataset(spec) == expected


@pytest.mark.parametrize(("spec", "message"), [("hf:", "names no dataset"), ("hf:x:train[:10]", "whole split")])
def test_bad_spec(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_hub_dataset(spec)


def test_a_dataset_together_with_files(corpus):
    (corpus / "x.txt").write_text("a file")
    inputs = ["hf:./set:test", corpus / "x.txt", "hf:./set"]
    files = list_files(inputs)
    assert [f.relative for f in files] == ["./set:test", "x.txt", "./set:train#0", "./set:train#1"]
    errors = ReadErrors()
    documents = list(read_documents(inputs, id_field="key", metadata=["genre"], on_error="skip", errors=errors))
    rows = [i for i in (*range(33, 36), None, *range(33)) if i != 25]
    assert [d.text for d in documents] == ["a file" if i is None else f"text {i} ä" for i in rows]
    assert [d.id for d in documents] == ["x.txt" if i is None else f"k{i}" for i in rows]
    assert documents[0].source == "hf:./set:test" and documents[0].meta == {"genre": "law"}
    assert [(d.source, d.place, d.file) for d in documents[4:6]] == [
        ("hf:./set:train#0", 1, 2), ("hf:./set:train#0", 2, 2)
    ]  # fmt: skip
    assert errors.first == ["hf:./set:train#1, row 6: the field 'text' holds a JSON null, not text"]
    assert next(read_documents(["hf:./set"])).id == "./set:train#0:1"


def test_reading_resumes_after_any_row(corpus):
    options = {"on_error": "skip", "id_field": "key"}
    documents = [d.id for d in read_documents(["hf:./set"], **options)]
    for last in (0, 6, 18, 19, 20, 31):
        file, place = (0, last + 1) if last < 20 else (1, last - 20 + 1 + (last >= 25))
        rest = [d.id for d in read_documents(["hf:./set"], start=Place(file, place), **options)]
        assert rest == documents[last + 1 :]


def test_shards_are_parts(corpus):
    files = list_files(["hf:./set"])
    read = [
        [d.id for d in read_documents(part_of_files(files, part, 2), id_field="key", on_error="skip")]
        for part in (0, 1)
    ]
    assert read == [[f"k{i}" for i in range(20)], [f"k{i}" for i in range(20, 33) if i != 25]]


@pytest.mark.parametrize("splits", [False, True])
def test_a_dataset_saved_to_disk(corpus, splits):
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "id": [1, 2, 3]})
    (datasets.DatasetDict({"train": saved}) if splits else saved).save_to_disk(str(corpus / "saved"))
    assert [(d.id, d.text) for d in read_documents(["hf:./saved"])] == [("1", "a"), ("2", "b"), ("3", "c")]
    assert [d.id for d in read_documents(["hf:./saved"], start=Place(0, 2))] == ["3"]
    if splits:
        with pytest.raises(ValueError, match=r"hf:./saved:dev cannot be opened: it has no split 'dev'.*train"):
            list_files(["hf:./saved:dev"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hf:./nowhere", r"hf:./nowhere:train cannot be opened: ./nowhere is not a folder"),
        ("hf:no/such", r"hf:no/such:train cannot be opened: .*no/such.*"),
        ("hf:./set:dev", r"hf:./set:dev cannot be opened: .*(test.*train|train.*test)"),
        ("hf:./set@de", r"hf:./set@de:train cannot be opened: .*de.*"),
    ],
)
def test_a_missing_source_is_named_immediately(corpus, spec, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_documents([spec])


def test_a_missing_column_is_named(corpus):
    for options in ({"text_field": "body"}, {"metadata": ["body"]}, {"id_field": "body", "require_id": True}):
        documents = read_documents(["hf:./set"], on_error="skip", **options)
        with pytest.raises(ValueError, match=r"has no column 'body'; its columns are key, text, genre, unread"):
            next(documents)


def test_json_lines_dataset_and_a_damaged_file(corpus):
    (corpus / "lines").mkdir()
    file = corpus / "lines" / "train.jsonl"
    file.write_text("".join(json.dumps({"text": f"t{i}", "year": i}) + "\n" for i in range(5)))
    found = list(read_documents(["hf:./lines"], metadata=["year"]))
    assert [(d.id, d.text, d.meta["year"]) for d in found][1] == ("./lines:train:2", "t1", "1")
    file.write_text("no JSON")
    with pytest.raises(ValueError, match=r"hf:./lines:train cannot be (read|opened)"):
        list(read_documents(["hf:./lines"], on_error="skip"))


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"hf:org/name:train is read with the package datasets.*llammlein\[data\]"):
        list_files(["hf:org/name"])
