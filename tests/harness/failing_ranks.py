"""For fault tests: runs the cases of tests/harness/watchdog_worker.py, each rank in a separate process."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from running import PYTHON_PATH, ROOT


class Case:
    """Outcome of a worker case: exit statuses (negative: signal), and seconds from the fault to each rank's exit."""

    def __init__(self, folder: Path, statuses: list[int], seconds: list[float]) -> None:
        self.folder, self.statuses, self.seconds = folder, statuses, seconds

    def log(self, rank: int) -> str:
        return (self.folder / "logs" / f"rank-{rank:05d}.log").read_text()

    def message(self, rank: int) -> str:
        """The one line of the rank's standard error that starts with the failure."""
        lines = [line for line in (self.folder / f"stderr-{rank}").read_text().splitlines() if "error: " in line]
        assert len(lines) == 1, lines
        return lines[0]


def run_cases(temporary: pytest.TempPathFactory, name: str, cases: list[str]) -> dict[str, Case]:
    """Run worker cases concurrently (dozens of processes): once per name, and never at the same time as another name's,
    however many pytest processes share the tests. The run folder of each case is FOLDER/CASE."""
    base = temporary.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    outcome = folder / "outcome.json"
    with open(folder.parent / "failing_ranks.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not outcome.exists():
            worker = ROOT / "tests" / "harness" / "watchdog_worker.py"
            line = [sys.executable, str(worker), str(folder), *cases]
            environment = {**os.environ, "PYTHONPATH": PYTHON_PATH, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=120)
            assert done.returncode == 0, done.stderr
            outcome.write_text(done.stdout)
    return {case: Case(folder / case, **facts) for case, facts in json.loads(outcome.read_text()).items()}
