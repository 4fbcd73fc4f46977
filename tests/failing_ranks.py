"""For tests of faults: runs the cases of tests/training/watchdog_worker.py, ranks in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from running import ROOT


class Case:
    """How a case of the worker ended: exit statuses (negative: of a signal), seconds from the fault to each end."""

    def __init__(self, folder: Path, statuses: list[int], seconds: list[float]) -> None:
        self.folder, self.statuses, self.seconds = folder, statuses, seconds

    def log(self, rank: int) -> str:
        return (self.folder / "logs" / f"rank-{rank:05d}.log").read_text()

    def message(self, rank: int) -> str:
        """The one line of its standard error that begins with what went wrong."""
        lines = [line for line in (self.folder / f"stderr-{rank}").read_text().splitlines() if "error: " in line]
        assert len(lines) == 1, lines
        return lines[0]


def run_cases(folder: Path, cases: list[str]) -> dict[str, Case]:
    """Run cases of the worker at once; the run folder of each is FOLDER/CASE."""
    worker = ROOT / "tests" / "training" / "watchdog_worker.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(worker), str(folder), *cases], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return {name: Case(folder / name, **facts) for name, facts in json.loads(done.stdout).items()}
