"""Merging the record: which file a step is read from, how much is rewritten, truncation, kills, resuming."""

from __future__ import annotations

import os
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from record_writer import MAX_ROWS, RANKS, STEPS
from recorded_run import check, prepare, write
from whole_record import read_record

from lit_data.record.merge import Compactor, compact, next_merge
from lit_data.record.parts import Part, committed_parts, list_parts, select_files
from lit_data.record.reader import read_steps, stream_record
from lit_data.record.rewind import copy_record, cut_record
from lit_data.record.schema import SCHEMA, open_writer


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pa.Table]:
    """A run folder before its first step, and the record it must have at the end."""
    return prepare(tmp_path_factory.mktemp("begun"))


@pytest.fixture(scope="module")
def written(begun: tuple[Path, pa.Table], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run, whose record was merged in the background."""
    run = tmp_path_factory.mktemp("written") / "run"
    shutil.copytree(begun[0], run)
    assert write(run) == 0
    return run


@pytest.fixture
def run(written: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(written, tmp_path / "run"))


@pytest.fixture
def unmerged(run: Path, begun: tuple[Path, pa.Table]) -> Path:
    """The finished run with unmerged parts: one per rank and 2 steps."""
    for part in list_parts(run / "datapoints"):
        part.path.unlink()
    for first in range(0, STEPS, 2):
        for rank in range(RANKS):
            table = begun[1]
            inside = pc.is_in(table["step"], pa.array([first, first + 1]))
            mine = table.filter(pc.and_(inside, pc.equal(table["rank"], rank)))
            path = run / "datapoints" / f"part-{first:08d}-{first + 2:08d}-rank{rank:05d}.parquet"
            with open(path, "wb") as f, open_writer(f) as writer:
                writer.write_table(mine)
    return run


def test_record_is_exact_and_its_files_are_few_and_bounded(run: Path, begun: tuple[Path, pa.Table]) -> None:
    assert check(run, begun[1]) == STEPS
    parts = list_parts(run / "datapoints")
    rows = [pq.read_metadata(p.path).num_rows for p in parts]
    assert {p.rank for p in parts} == {None} and max(rows) <= MAX_ROWS
    assert len(parts) < STEPS / 2, "files that could be merged were not"
    assert [(a.end_step, b.first_step) for a, b in pairwise(parts)] == [(b.first_step, b.first_step) for b in parts[1:]]


def test_rows_of_a_merged_file_are_sorted(run: Path, begun: tuple[Path, pa.Table]) -> None:
    tables = [pq.read_table(p.path) for p in committed_parts(run)]
    assert pa.concat_tables(tables).equals(begun[1])


def test_unmerged_and_merged_records_read_the_same(unmerged: Path, begun: tuple[Path, pa.Table]) -> None:
    check(unmerged, begun[1])
    before = {tuple(r.values()) for r in read_steps(unmerged, [3, 11, 17]).to_pylist()}
    compact(unmerged, 100)
    check(unmerged, begun[1])
    assert {tuple(r.values()) for r in read_steps(unmerged, [3, 11, 17]).to_pylist()} == before
    assert pa.concat_tables(list(stream_record(unmerged, 5, 20))).equals(
        begun[1].filter(pc.and_(pc.greater_equal(begun[1]["step"], 5), pc.less(begun[1]["step"], 20)))
    )


def test_reader_survives_a_merge_while_it_reads(unmerged: Path, begun: tuple[Path, pa.Table]) -> None:
    tables = stream_record(unmerged, 0, STEPS)
    seen = [next(tables)]
    compact(unmerged, 100)
    assert pa.concat_tables([*seen, *tables]).equals(begun[1])


def test_uncommitted_parts_are_not_merged(unmerged: Path, begun: tuple[Path, pa.Table]) -> None:
    for step in range(10, STEPS + 1, 2):
        (unmerged / f"iter-{step:08d}-ckpt.pth").unlink()
    compact(unmerged)
    merged = [p for p in list_parts(unmerged / "datapoints") if p.rank is None]
    assert [(p.first_step, p.end_step) for p in merged] == [(0, 8)]
    assert len(list_parts(unmerged / "datapoints")) == 1 + RANKS * (STEPS - 8) // 2
    assert check(unmerged, begun[1]) == 8


@pytest.mark.parametrize("step", [0, 1, 6, 11, STEPS - 1, STEPS])
def test_cut_inside_a_merged_file(unmerged: Path, begun: tuple[Path, pa.Table], step: int, tmp_path: Path) -> None:
    compact(unmerged)
    (tmp_path / "grave").mkdir()
    copy_record(unmerged, step, tmp_path / "grave")
    cut_record(unmerged / "datapoints", step)
    expected = begun[1]
    assert read_record(unmerged).equals(expected.filter(pc.less(expected["step"], step)))
    assert all(p.end_step <= step for p in list_parts(unmerged / "datapoints"))
    later = [pq.read_table(p.path) for p in select_files(list_parts(tmp_path / "grave"), STEPS)]
    assert pa.concat_tables([SCHEMA.empty_table(), *later]).equals(
        expected.filter(pc.greater_equal(expected["step"], step))
    )


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_each_step_is_read_from_one_source(data: st.DataObject) -> None:
    """Any set of merged files over the parts of 2 ranks: each step is read from one merged file or from both parts."""
    cuts = sorted(data.draw(st.sets(st.integers(1, 30), max_size=6)) | {0, 31})
    parts = [Part(Path(f"part-{a}-{r}"), a, b, r) for a, b in pairwise(cuts) for r in range(2)]
    for a, b in {(a, min(a + n, 31)) for a, n in data.draw(st.sets(st.tuples(st.integers(0, 30), st.integers(1, 31))))}:
        parts.append(Part(Path(f"steps-{a}-{b}"), a, b, None))
    newest = data.draw(st.sampled_from(cuts[1:]))
    found = select_files(parts, newest)
    for step in range(31):
        here = [p for p in found if p.first_step <= step < p.end_step]
        ranks = [p.rank for p in here]
        assert ranks == [] if step >= newest else ranks in ([None], [0, 1])
        for part in here:
            (file,) = {(p.first_step, p.end_step) for p in parts if p.path == part.path}
            assert file[0] <= part.first_step and part.end_step <= file[1]


def test_each_row_is_rewritten_logarithmically_often() -> None:
    """1000 checkpoints of 3 to 9 rows: rewritten rows stay below n log2 n, files are few and below the size limit."""
    rng = np.random.default_rng(0)
    rows: dict[Path, int] = {}
    parts: list[Part] = []
    written, total, limit = 0, 0, 2000
    for step in range(1000):
        name = Path(f"{step}-{step + 1}")
        rows[name] = int(rng.integers(3, 10))
        total += rows[name]
        parts.append(Part(name, step, step + 1, 0))
        while sources := next_merge(parts, rows.__getitem__, limit):
            merged = Part(
                Path(f"m{sources[0].first_step}-{sources[-1].end_step}"), sources[0].first_step, step + 1, None
            )
            rows[merged.path] = sum(rows[p.path] for p in sources)
            written += rows[merged.path]
            parts = [p for p in parts if p not in sources] + [merged]
            assert rows[merged.path] <= limit
    assert written < total * (1 + np.log2(limit / 6))
    assert len(parts) <= 2 * total / limit + 4 * np.log2(limit)


KILLS = ["rename:6", "rename:9", "fsync:13"]
MORE_KILLS = ["rename:2", "fsync:3", "fsync:20"]


@pytest.mark.parametrize("kill", [*KILLS, *(pytest.param(kill, marks=pytest.mark.slow) for kill in MORE_KILLS)])
def test_killed_writer_leaves_an_exact_record(begun: tuple[Path, pa.Table], tmp_path: Path, kill: str) -> None:
    run = Path(shutil.copytree(begun[0], tmp_path / "run"))
    assert write(run, "--kill", kill) == 137
    assert check(run, begun[1]) < STEPS
    assert write(run) == 0
    assert check(run, begun[1]) == STEPS
    assert not list((run / "datapoints").glob(".*"))


def test_an_error_ends_compaction_and_is_reported_once(
    unmerged: Path, begun: tuple[Path, pa.Table], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    compactor = Compactor(unmerged)
    monkeypatch.setattr(os, "fsync", full)
    for _ in range(3):
        compactor.start()
    compactor.close(finish=True)
    monkeypatch.undo()
    assert capfd.readouterr().err.count("stay unmerged") == 1
    assert check(unmerged, begun[1]) == STEPS
    assert not list((unmerged / "datapoints").glob(".*"))


@pytest.mark.parametrize("finish", [True, False])
def test_background_merge_ends_with_the_run(unmerged: Path, begun: tuple[Path, pa.Table], finish: bool) -> None:
    compactor = Compactor(unmerged)
    compactor.start()
    compactor.close(finish)
    assert check(unmerged, begun[1]) == STEPS
    assert not list((unmerged / "datapoints").glob(".*"))
    if finish:
        assert {p.rank for p in list_parts(unmerged / "datapoints")} == {None}
