"""`verify` finds each planted fault, in merged files and in the ranks' parts, and none in an intact record."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from document_facts import facts_of
from record_writer import RANKS, STEPS
from recorded_run import prepare, write
from whole_record import read_record

from lit_data.record.parts import committed_parts, list_parts
from lit_data.record.schema import SCHEMA
from lit_data.record.span_hash import hash_spans
from lit_data.record.trace import open_run
from lit_data.record.verify import hash_pieces, naive_hash, verify

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run, _ = prepare(tmp_path_factory.mktemp("merged"))
    assert write(run) == 0
    return run


@pytest.fixture(scope="module")
def split(merged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same record unmerged, with one part per rank and 2 steps."""
    run = Path(shutil.copytree(merged, tmp_path_factory.mktemp("split") / "run"))
    table = read_record(run)
    for part in list_parts(run / "datapoints"):
        part.path.unlink()
    for first in range(0, STEPS, 2):
        for rank in range(RANKS):
            inside = pc.and_(pc.is_in(table["step"], pa.array([first, first + 1])), pc.equal(table["rank"], rank))
            name = f"part-{first:08d}-{first + 2:08d}-rank{rank:05d}.parquet"
            pq.write_table(table.filter(inside), run / "datapoints" / name)
    return run


@pytest.fixture(params=["merged", "split"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of an intact run, with its record merged or in parts."""
    return Path(shutil.copytree(request.getfixturevalue(request.param), tmp_path / "run"))


def change(rows: Rows, **values: Any) -> None:
    rows[len(rows) // 2].update(values)


def middle(rows: Rows, column: str) -> Any:
    return rows[len(rows) // 2][column]


def replace_by_another_row(rows: Rows) -> None:
    """Two rows of the first step have the same window, so one row's data were never seen."""
    first, other = [[r for r in rows if (r["step"], r["row"]) == (rows[0]["step"], n)] for n in (0, 1)]
    for r in other:
        rows.remove(r)
    rows.extend({**r, "row": 1, "sample": other[0]["sample"]} for r in first)


def lose_first_row(rows: Rows) -> None:
    lost = (rows[0]["step"], rows[0]["row"])
    rows[:] = [r for r in rows if (r["step"], r["row"]) != lost]


FAULTS: dict[str, tuple[str, Callable[[Rows], Any]]] = {
    "duplicate": ("duplicate span", lambda rows: rows.append(dict(rows[3]))),
    "shift": ("wrong place", lambda rows: change(rows, start=middle(rows, "start") + 1)),
    "shorter": ("wrong length", lambda rows: change(rows, length=middle(rows, "length") - 1)),
    "rank": ("wrong rank", lambda rows: change(rows, rank=1 - middle(rows, "rank"))),
    "micro-batch": ("wrong rank", lambda rows: change(rows, micro_batch=1)),
    "tokens": ("wrong tokens", lambda rows: change(rows, hash=middle(rows, "hash") ^ 1)),
    "sample": ("wrong sample", lambda rows: change(rows, sample=middle(rows, "sample") + 1)),
    "dataset": ("wrong dataset", lambda rows: change(rows, dataset=1)),
    "targets": ("wrong targets", lambda rows: change(rows, targets=middle(rows, "targets") + 1)),
    "row": ("unknown row", lambda rows: change(rows, row=99)),
    "negative row": ("unknown row", lambda rows: change(rows, row=-1)),
    "document": ("unknown document", lambda rows: change(rows, document=10**6)),
    "lost span": ("gap", lambda rows: rows.remove(next(r for r in rows if r["start"] > 0 and r["length"] < 16))),
    "lost row": ("missing row", lose_first_row),
    "other window": ("gap", replace_by_another_row),
}


def test_an_intact_record_has_no_fault(run: Path) -> None:
    assert verify(open_run(run)) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_reported(run: Path, fault: str) -> None:
    kind, plant = FAULTS[fault]
    path = committed_parts(run)[0].path
    rows = pq.read_table(path).to_pylist()
    plant(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path)
    faults = verify(open_run(run))
    assert any(f.startswith(kind + ":") for f in faults), faults


def test_an_off_by_one_shift_is_reported(run: Path) -> None:
    """The record of a loader that is off by one: each span is one token late, with matching hashes."""
    dataset = open_run(run).datasets[0]
    for path in {p.path for p in committed_parts(run)}:
        rows = pq.read_table(path).to_pylist()
        for row in rows:
            row["start"] += 1
            begin = facts_of(dataset, row["document"])["start"] + row["start"]
            row["hash"] = naive_hash(dataset.tokens(begin, min(begin + row["length"], dataset.n_tokens)).tolist())
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path)
    assert any(f.startswith("wrong place") for f in verify(open_run(run)))


def test_changed_shard_is_reported(run: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(open_run(run).datasets[0].path, tmp_path / "data"))
    shard = next(data.glob("*.bin"))
    content = bytearray(shard.read_bytes())
    content[40] ^= 1
    shard.write_bytes(content)
    faults = verify(open_run(run, data))
    assert faults and all(f.startswith("wrong tokens") for f in faults)


def test_missing_files_are_reported(run: Path) -> None:
    parts = committed_parts(run)
    parts[len(parts) // 2].path.unlink()
    assert any(f.startswith("missing part") for f in verify(open_run(run)))


def test_window_seen_twice_is_reported(merged: Path) -> None:
    """An order that is not a bijection: comparing with its own formula cannot reveal this, only counting can."""
    run = open_run(merged)
    sound = run.mixture

    class Broken:
        def locate(self, samples: Any) -> Any:
            datasets, epochs, windows = sound.locate(samples)
            return datasets, epochs, np.where(windows == 3, 4, windows)

    run.mixture = Broken()  # type: ignore[assignment]
    assert any(f.startswith("seen twice") for f in verify(run))


def test_hashes_of_pieces_equal_the_loaders() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 50, size=300)
    tokens = rng.integers(0, 65536, size=lengths.sum())
    starts = np.cumsum(lengths) - lengths
    hashes = hash_pieces(tokens.astype(np.uint16), lengths)
    assert np.array_equal(hashes, hash_spans(tokens, lengths))
    assert hashes.tolist() == [naive_hash(tokens[a : a + n].tolist()) for a, n in zip(starts, lengths, strict=True)]
