"""Queries of the record, compared with plain loops over its rows: documents, differences, exposures, exports."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from document_facts import facts_of
from record_writer import STEPS
from recorded_run import prepare, write
from whole_record import read_record

from lit_data.loading.order import Segment, first_sample_of_step
from lit_data.packed.documents import Documents
from lit_data.packed.reader import PackedDataset
from lit_data.packed.writer import PackedWriter
from lit_data.record.exposures import count_exposures, draw_exposures, times_seen
from lit_data.record.sql import difference, export, record_sql
from lit_data.record.trace import open_run
from lit_files.database import open_database


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of more than two epochs whose record is in several merged files."""
    folder, _ = prepare(tmp_path_factory.mktemp("queries"))
    assert write(folder) == 0
    return folder


@pytest.fixture(scope="module")
def dataset(run: Path) -> PackedDataset:
    return PackedDataset(run.parent / "data")


@pytest.fixture(scope="module")
def rows(run: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read_record(run).to_pylist()
    return found


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> PackedDataset:
    """10000 documents in several shards and row groups, with unsorted ids, every third of which is the same."""
    facts = {"kind": "none", "fingerprint": "x", "vocab_size": 900, "eos_id": 1, "bos_id": None, "folder": None}
    folder = tmp_path_factory.mktemp("shards") / "data"
    with PackedWriter(folder, tokenizer=facts, vocab_size=900, eos_id=1, shard_tokens=15_000) as writer:
        for i in range(10_000):
            id = "same" if i % 3 == 0 else f"id-{i * 7919 % 10_000}"
            writer.add(np.append(np.full(i % 5, i % 900), 1), id=id, source=f"s{i % 2}", place=i, n_bytes=i)
    return PackedDataset(folder)


def test_documents_by_number(shards: PackedDataset) -> None:
    numbers = [9999, 0, 4095, 4096, 5000, 17]
    facts = Documents(shards).facts(numbers)
    for n in numbers:
        assert (facts[n]["source"], facts[n]["place"], facts[n]["bytes"]) == (f"s{n % 2}", n, n)
    assert Documents(shards).facts([3], ["id"]) == {3: {"id": "same"}}
    with pytest.raises(ValueError, match="document 10000 is not in"):
        Documents(shards).facts([10_000])


def test_documents_by_id(shards: PackedDataset) -> None:
    documents = Documents(shards)
    assert documents.find("same") == list(range(0, 10_000, 3))
    assert documents.find("id-7919") == [1]
    assert documents.find("nowhere") == []


def test_documents_equal_those_of_the_memory_map(shards: PackedDataset) -> None:
    documents = Documents(shards)
    numbers = np.arange(10_001)
    assert [documents.start(n) for n in numbers.tolist()] == shards.document_start(numbers).tolist()
    for start, stop in [(0, 5), (14_990, 15_010), (0, shards.n_tokens), (7, 7)]:
        assert np.array_equal(documents.tokens(start, stop), shards.tokens(start, stop))


def test_all_documents_in_batches(shards: PackedDataset) -> None:
    tables = list(Documents(shards).batches())
    assert [n for t in tables for n in t["document"].to_pylist()] == list(range(10_000))
    assert [n for t in tables for n in t["tokens"].to_pylist()] == [1 + i % 5 for i in range(10_000)]


@pytest.mark.parametrize(("first", "end"), [(0, STEPS), (3, 4), (5, 13)])
@pytest.mark.parametrize("new", [False, True])
def test_difference(
    run: Path, dataset: PackedDataset, rows: list[dict[str, Any]], first: int, end: int, new: bool
) -> None:
    before = {r["document"] for r in rows if r["step"] < first}
    tokens: Counter[int] = Counter()
    losses: dict[int, float] = defaultdict(float)
    targets: Counter[int] = Counter()
    for r in rows:
        if first <= r["step"] < end and not (new and r["document"] in before):
            tokens[r["document"]] += r["length"]
            targets[r["document"]] += r["targets"]
            losses[r["document"]] += r["loss"]
    found = difference(run, [dataset], first, end, new=new, limit=0)
    assert {r["document"]: r["tokens"] for r in found.rows} == dict(tokens)
    assert (found.documents, found.tokens) == (len(tokens), sum(tokens.values()))
    if targets.total():
        assert found.mean_loss == pytest.approx(sum(losses.values()) / targets.total())
    for r in found.rows:
        facts = facts_of(dataset, r["document"])
        assert (r["id"], r["source"]) == (facts["id"], facts["source"])
        assert r["exposures"] == pytest.approx(tokens[r["document"]] / facts["tokens"])
        if targets[r["document"]]:
            assert r["mean_loss"] == pytest.approx(losses[r["document"]] / targets[r["document"]])
        else:
            assert r["mean_loss"] is None
    assert [r["tokens"] for r in found.rows] == sorted(tokens.values(), reverse=True)


def test_difference_is_sorted_and_limited(run: Path, dataset: PackedDataset) -> None:
    everything = difference(run, [dataset], 0, STEPS, sort="document", limit=0).rows
    assert [r["document"] for r in everything] == sorted(r["document"] for r in everything)
    by_loss = difference(run, [dataset], 0, STEPS, sort="loss", limit=5).rows
    losses = sorted((r["mean_loss"] for r in everything if r["mean_loss"] is not None), reverse=True)
    assert [r["mean_loss"] for r in by_loss] == losses[:5]


def test_exposures(run: Path, dataset: PackedDataset, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    (found,) = count_exposures(open_run(run))
    assert found.steps.tolist() == list(range(STEPS + 1))
    seen: Counter[tuple[int, int]] = Counter()
    for step in range(STEPS + 1):
        times = Counter(seen.values())
        times[0] = dataset.n_tokens - len(seen)
        expected = [times[n] / dataset.n_tokens for n in range(found.shares.shape[1])]
        assert found.shares[step].tolist() == pytest.approx(expected, abs=1e-12)
        for r in rows:
            if r["step"] == step:
                seen.update((r["document"], t) for t in range(r["start"], r["start"] + r["length"]))
    assert max(seen.values()) == found.shares.shape[1] - 1 == 3
    draw_exposures([found, found], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_times_seen_with_skipped_and_reused_samples(run: Path) -> None:
    """Three segments: an epoch and a half, then samples are skipped, then some are reused."""
    traced = replace(open_run(run), segments=[Segment(0, 0, 8), Segment(11, 120, 8), Segment(17, 40, 8)])
    seen: Counter[int] = Counter()
    for step in range(STEPS):
        first, count = first_sample_of_step(traced.segments, step)
        samples = np.arange(first, first + count)
        _, _, windows = traced.mixture.locate(samples)
        datasets, times = times_seen(traced, samples, np.full(count, step))
        assert not datasets.any() and times.tolist() == [seen[w] + 1 for w in windows.tolist()]
        seen.update(windows.tolist())


def test_export_to_a_database(run: Path, dataset: PackedDataset, tmp_path: Path) -> None:
    file = tmp_path / "record.duckdb"
    export(run, [dataset], STEPS, file)
    record = read_record(run)
    with open_database(file) as database:
        spans = database.sql("SELECT * FROM spans ORDER BY step, row, document, start").to_arrow_table()
        assert spans.cast(record.schema).equals(record)
        documents = database.execute("SELECT document, id, tokens FROM documents ORDER BY document").fetchall()
        assert documents == [(n, f"doc-{n}", facts_of(dataset, n)["tokens"]) for n in range(dataset.n_documents)]
        steps = database.execute("SELECT step, samples, tokens, mean_loss FROM steps ORDER BY step").fetchall()
        for step, samples, tokens, mean_loss in steps:
            mine = record.filter(pc.equal(record["step"], step))
            assert (samples, tokens) == (8, pc.sum(mine["length"]).as_py())
            assert mean_loss == pytest.approx(pc.sum(mine["loss"]).as_py() / pc.sum(mine["targets"]).as_py())
        assert len(steps) == STEPS
        ids = database.execute("SELECT DISTINCT document, id FROM seen").fetchall()
        assert all(id == f"doc-{n}" for n, id in ids)
    assert [p.name for p in tmp_path.iterdir()] == ["record.duckdb"]


@pytest.mark.parametrize("ending", [".parquet", ".csv"])
def test_export_to_a_table(run: Path, dataset: PackedDataset, tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"it's{ending}"
    export(run, [dataset], STEPS, file)
    record = read_record(run).to_pylist()
    if ending == ".parquet":
        found = pq.read_table(file).to_pylist()
        assert found == [{**r, "id": f"doc-{r['document']}", "source": "random"} for r in record]
    else:
        header, *lines = file.read_text().splitlines()
        assert header.split(",") == [*record[0], "id", "source"] and len(lines) == len(record)
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


def test_the_next_export_removes_what_a_killed_one_left(run: Path, dataset: PackedDataset, tmp_path: Path) -> None:
    file, leftover = tmp_path / "record.csv", tmp_path / ".record.csv.abc.tmp"
    leftover.mkdir()
    (leftover / "record.duckdb").touch()
    export(run, [dataset], STEPS, file)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_unsupported_exports_are_refused(run: Path, dataset: PackedDataset, tmp_path: Path) -> None:
    (tmp_path / "there.csv").touch()
    with pytest.raises(ValueError, match="there.csv exists already"):
        export(run, [dataset], STEPS, tmp_path / "there.csv")
    with pytest.raises(ValueError, match="one of .duckdb, .parquet, .csv"):
        export(run, [dataset], STEPS, tmp_path / "record.xlsx")
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        export(run, [dataset], STEPS, tmp_path / "nowhere" / "record.csv")


def test_steps_missing_from_the_record_are_refused(run: Path) -> None:
    with pytest.raises(ValueError, match="no committed record"):
        record_sql(run, STEPS, STEPS + 5)
