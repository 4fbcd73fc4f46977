"""Mutations of every kind of file that the system reads; see tests/harness/fuzzed_files.py, which prints the table."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from running import ROOT, warm_python


def fuzz(count: int, folder: Path) -> None:
    line = [
        warm_python(),
        str(ROOT / "tests" / "harness" / "fuzzed_files.py"),
        f"--count={count}",
        f"--json={folder / 'found'}",
    ]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((folder / "found").read_text())
    assert len(found) > 20 and all(outcomes["mutations"] == count for outcomes in found.values())
    assert all(outcomes["refused"] for name, outcomes in found.items() if name != "metrics.csv"), (
        "damage is not detected"
    )


def test_every_file_with_few_mutations(tmp_path: Path) -> None:
    """5 mutations of each file: a clean error that names it, or a value within its schema."""
    fuzz(5, tmp_path)


@pytest.mark.slow
def test_every_file_with_many_mutations(tmp_path: Path) -> None:
    """200 mutations of each file."""
    fuzz(200, tmp_path)
