"""The datapoint record: every span once, losses add up, and planted faults are reported."""

from __future__ import annotations

import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from document_facts import facts_of
from running import flags, metrics, train
from whole_record import read_record

from lit_data.loading.rows import count_windows
from lit_data.packed.reader import PackedDataset
from lit_data.record.merge import compact
from lit_data.record.parts import committed_parts, list_parts
from lit_data.record.schema import SCHEMA
from lit_data.record.trace import open_run, spans_of_document, spans_of_step, steps_of_document
from lit_data.record.verify import naive_hash, verify


@pytest.fixture(scope="module")
def merged(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two DDP ranks over a little more than two epochs, with a partial last step; its record as left by the
    run.
    """
    folder = tmp_path_factory.mktemp("record") / "run"
    train(
        *flags(
            data, folder, devices=2, strategy="ddp", train__max_steps=None, train__max_epochs=2.1, save__every_steps=10
        )
    )
    assert {p.rank for p in list_parts(folder / "datapoints")} == {None}
    return folder


@pytest.fixture(scope="module")
def split(merged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with one part per rank and checkpoint, as before merging."""
    folder = tmp_path_factory.mktemp("split") / "run"
    shutil.copytree(merged, folder)
    table = read_record(folder)
    for part in list_parts(folder / "datapoints"):
        part.path.unlink()
    ends = [int(p.name[5:13]) for p in sorted(folder.glob("iter-*-ckpt.pth"))]
    for first, end in pairwise([0, *ends]):
        for rank in (0, 1):
            steps, ranks = table["step"].to_numpy(), table["rank"].to_numpy()
            name = f"part-{first:08d}-{end:08d}-rank{rank:05d}.parquet"
            mine = (steps >= first) & (steps < end) & (ranks == rank)
            pq.write_table(table.filter(mine), folder / "datapoints" / name)
    return folder


@pytest.fixture(params=["merged", "split"])
def run(request: pytest.FixtureRequest) -> Path:
    """An intact run, with its record merged or in parts."""
    folder: Path = request.getfixturevalue(request.param)
    return folder


def test_every_token_is_seen_once_an_epoch(run: Path, data: Path) -> None:
    dataset = PackedDataset(data / "train")
    n_windows = count_windows(dataset.n_tokens, 32)
    seen: Counter[tuple[int, int, int]] = Counter()
    for row in read_record(run).to_pylist():
        epoch = row["sample"] // n_windows
        for token in range(row["start"], row["start"] + row["length"]):
            seen[epoch, row["document"], token] += 1
    starts = [facts_of(dataset, n) for n in range(dataset.n_documents)]
    everything = {(d["number"], t) for d in starts for t in range(d["tokens"])}
    for epoch in (0, 1):
        assert {(d, t) for e, d, t in seen if e == epoch} == everything
    assert set(seen.values()) == {1}


def test_span_losses_sum_to_the_step_losses(run: Path) -> None:
    table = read_record(run)
    for row in metrics(run):
        if row["train_loss"]:
            spans = [s for s in table.to_pylist() if s["step"] == int(row["step"]) - 1]
            mean = sum(s["loss"] for s in spans) / sum(s["targets"] for s in spans)
            assert mean == pytest.approx(float(row["train_loss"]), rel=1e-6)


def test_document_is_found_by_inverting_the_order(run: Path) -> None:
    traced = open_run(run)
    table = read_record(run).to_pylist()
    for document in range(0, traced.datasets[0].n_documents, 7):
        by_scan = sorted({(r["step"], r["row"]) for r in table if r["document"] == document})
        assert steps_of_document(traced, document) == by_scan
        assert spans_of_document(traced, document).num_rows == sum(r["document"] == document for r in table)
    assert spans_of_step(traced, 3).to_pylist() == [r for r in table if r["step"] == 3]


def test_verify_finds_no_fault_in_an_intact_run(run: Path) -> None:
    assert verify(open_run(run)) == []


def change(rows: list[dict[str, Any]], **values: Any) -> None:
    rows[len(rows) // 2].update(values)


FAULTS = {
    "duplicate span": lambda rows: rows.append(dict(rows[3])),
    "wrong place": lambda rows: change(rows, start=rows[len(rows) // 2]["start"] + 1),
    "wrong rank": lambda rows: change(rows, rank=1 - rows[len(rows) // 2]["rank"]),
    "wrong tokens": lambda rows: change(rows, hash=rows[len(rows) // 2]["hash"] ^ 1),
    "wrong sample": lambda rows: change(rows, sample=rows[len(rows) // 2]["sample"] + 1),
    "wrong targets": lambda rows: change(rows, targets=rows[len(rows) // 2]["targets"] + 1),
    "unknown row": lambda rows: change(rows, row=99),
    "missing row": lambda rows: [rows.remove(r) for r in list(rows) if (r["step"], r["row"]) == (1, rows[0]["row"])],
}


@pytest.mark.parametrize("kind", FAULTS)
def test_planted_fault_is_reported(run: Path, tmp_path: Path, kind: str) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    part = committed_parts(copy)[0]
    rows = pq.read_table(part.path).to_pylist()
    FAULTS[kind](rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), part.path)
    faults = verify(open_run(copy))
    assert any(f.startswith(kind) for f in faults), faults


@pytest.mark.parametrize("ranks", [{0}, {0, 1}])
def test_missing_part_is_reported(split: Path, tmp_path: Path, ranks: set[int]) -> None:
    copy = tmp_path / "run"
    shutil.copytree(split, copy)
    for part in committed_parts(copy):
        if part.first_step == 10 and part.rank in ranks:
            part.path.unlink()
    assert any(f.startswith("missing part") for f in verify(open_run(copy)))


def test_missing_merged_file_is_reported(merged: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(merged, copy)
    (part,) = committed_parts(copy)
    part.path.rename(part.path.with_name(f"steps-00000002-{part.end_step:08d}.parquet"))
    assert any(f.startswith("missing part") for f in verify(open_run(copy)))


def test_parts_of_the_ranks_merge_to_the_same_record(split: Path, merged: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(split, copy)
    before = read_record(copy)
    assert compact(copy) > 0
    assert {p.rank for p in list_parts(copy / "datapoints")} == {None}
    assert read_record(copy).equals(before) and before.equals(read_record(merged))


def test_an_off_by_one_shift_in_a_run_is_reported(run: Path, tmp_path: Path) -> None:
    """The record of a loader that is off by one: each span is one token late, with matching hashes."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    dataset = open_run(copy).datasets[0]
    for part in committed_parts(copy):
        rows = pq.read_table(part.path).to_pylist()
        for row in rows:
            row["start"] += 1
            begin = facts_of(dataset, row["document"])["start"] + row["start"]
            row["hash"] = naive_hash(dataset.tokens(begin, min(begin + row["length"], dataset.n_tokens)).tolist())
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), part.path)
    assert any(f.startswith("wrong place") for f in verify(open_run(copy)))


def test_uncommitted_part_is_ignored(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    part = committed_parts(copy)[0]
    before = read_record(copy).num_rows
    shutil.copy(part.path, part.path.with_name("part-00000500-00000510-rank00000.parquet"))
    assert read_record(copy).num_rows == before
