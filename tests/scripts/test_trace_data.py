"""scripts/trace_data.py as a user calls it: answers, JSON, and errors without a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from document_facts import facts_of
from record_writer import STEPS
from recorded_run import prepare, write
from running import ROOT, script
from whole_record import read_record

from lit_data.packed.reader import PackedDataset


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, _ = prepare(tmp_path_factory.mktemp("trace"))
    assert write(folder) == 0
    return folder


def ask(command: str, run: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return script("trace_data.py", command, run, *arguments)


def answers(command: str, run: Path, *arguments: object) -> list[dict[str, Any]]:
    done = ask(command, run, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_step_gives_its_spans_with_their_text(run: Path) -> None:
    dataset = PackedDataset(run.parent / "data")
    rows = answers("step", run, 7)
    expected = [r for r in read_record(run).to_pylist() if r["step"] == 7]
    assert len(rows) == len(expected)
    for row, span in zip(rows, expected, strict=True):
        start = facts_of(dataset, span["document"])["start"] + span["start"]
        tokens = dataset.tokens(start, start + span["length"]).tolist()
        assert row == {**span, "id": f"doc-{span['document']}", "source": "random", "text": " ".join(map(str, tokens))}
    assert "row    0  rank 0  doc-" in ask("step", run, 7).stdout


@pytest.mark.parametrize("name", ["doc-33", "#33", "#0:33"])
def test_document_gives_every_step_that_saw_it(run: Path, name: str) -> None:
    expected = [{**r, "id": "doc-33"} for r in read_record(run).to_pylist() if r["document"] == 33]
    assert answers("document", run, name) == expected
    assert f"seen in {len({r['step'] for r in expected})} steps" in ask("document", run, name).stdout


def test_difference_by_names_and_numbers(run: Path) -> None:
    by_number = answers("diff", run, 4, 10, "--limit", 0)
    assert answers("diff", run, "iter-00000004-ckpt.pth", run / "iter-00000010-ckpt.pth", "--limit", 0) == by_number
    expected = {r["document"] for r in read_record(run).to_pylist() if 4 <= r["step"] < 10}
    assert {r["document"] for r in by_number} == expected
    text = ask("diff", run, 4, 10, "--limit", 3).stdout
    assert text.startswith(f"steps 4 to 9: {len(expected)} documents") and f"and {len(expected) - 3} more" in text
    assert "0 new documents" in ask("diff", run, STEPS - 1, STEPS, "--new").stdout


def test_verify_export_and_exposures(run: Path, tmp_path: Path) -> None:
    assert ask("verify", run).stdout.endswith("no fault\n")
    assert ask("export", run, tmp_path / "r.csv").returncode == 0 and (tmp_path / "r.csv").exists()
    rows = answers("exposures", run, "--picture", tmp_path / "p.svg")
    assert rows[0]["shares"][0] == 1 and rows[-1]["steps"] == STEPS and sum(rows[-1]["shares"]) == pytest.approx(1)
    assert (tmp_path / "p.svg").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("step", STEPS), f"step {STEPS} is not in the record"),
        (("document", "nobody"), "no document has the id 'nobody'"),
        (("document", "#60"), "has 60 documents"),
        (("document", "#1:0"), "the run has 1 datasets"),
        (("diff", 10, 4), "the first must be before the second"),
        (("diff", 0, STEPS + 1), "ends with the checkpoint"),
        (("diff", 0, "last"), "neither a number of steps nor a checkpoint's name"),
        (("export", "x.xlsx"), "one of .duckdb, .parquet, .csv"),
    ],
)
def test_errors_are_reported(run: Path, arguments: tuple[object, ...], message: str) -> None:
    done = ask(str(arguments[0]), run, *arguments[1:])
    assert done.returncode == 2 and done.stderr.startswith("error: ") and message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_that_is_not_a_run_is_refused(tmp_path: Path) -> None:
    """In a separate process, as a user calls it."""
    command = [sys.executable, str(ROOT / "scripts" / "trace_data.py"), "step", str(tmp_path), "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "is not a run folder" in done.stderr
