"""For tests: starts multi-rank training runs without import time, forked from a process with everything imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from running import PYTHON_PATH, ROOT
from watched_calls import Call

TIMEOUT_S = 100


@dataclass
class Answer:
    """Outcome of a run.

    Attributes:
        statuses: exit status of each rank; negative: killed by that signal.
        outputs: output of each rank.
        exceeded: the run timed out, had to dump its stacks, and was killed.
        seconds: total time; `train_s` from the first step on, if the run was watched.
        killed: whether the requested kill happened, in this `phase`, after this `step`; the other ranks lived on for
            `survived_s`.
        calls: calls of each rank, and how often it `entered` each phase, if the run was watched.
    """

    statuses: list[int]
    outputs: list[str]
    exceeded: bool
    seconds: float
    train_s: float
    killed: bool
    phase: str
    step: int
    survived_s: float
    calls: list[list[Call]]
    entered: list[dict[str, int]]

    @property
    def output(self) -> str:
        return "\n".join(self.outputs)


class RankServer:
    """Starts tests/harness/forked_ranks.py, and sends it requests for runs.

    Args:
        folder: for the ranks' outputs.
        before: a command prefix to start the process with.
    """

    def __init__(self, folder: Path, before: Sequence[str] = ()) -> None:
        self.folder = folder
        # One thread: the arithmetic of all other tests. Arrow's allocator would start a thread, which no fork survives.
        environment = {"OMP_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
        environment["PYTHONPATH"] = PYTHON_PATH
        self._process = subprocess.Popen(
            [*before, sys.executable, str(ROOT / "tests" / "harness" / "forked_ranks.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )

    def run(
        self,
        world_size: int,
        run: Path,
        arguments: Sequence[str],
        *,
        plants: Sequence[dict[str, Any]] = (),
        env: Mapping[str, str] | None = None,
        watch: bool = False,
        kill: dict[str, Any] | None = None,
        moment: dict[str, Any] | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> Answer:
        """Train in the run folder `run`, and wait for the end. See `trial` in forked_ranks.py for the arguments."""
        assert self._process.stdin is not None and self._process.stdout is not None
        for old in self.folder.glob("rank-*"):
            old.unlink()
        request = {
            "world_size": world_size,
            "run": str(run),
            "arguments": list(arguments),
            "log": str(self.folder / "rank"),
            "plants": list(plants),
            "env": dict(env or {}),
            "watch": watch,
            "kill": kill,
            "moment": moment,
            "timeout_s": timeout_s,
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        outcome = json.loads(self._process.stdout.readline())
        ranks = range(world_size)
        outputs = [(self.folder / f"rank-{rank}").read_text(errors="replace") for rank in ranks]
        return Answer(outputs=outputs, calls=[self._calls(rank) for rank in ranks] if watch else [], **outcome)

    def serve_python(self, address: Path) -> None:
        """Start the server for tests/harness/warm_python.py at this address."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"address": str(address)}) + "\n")
        self._process.stdin.flush()
        assert json.loads(self._process.stdout.readline()) == {"address": str(address)}

    def _calls(self, rank: int) -> list[Call]:
        """Read a rank's calls; the last line may be incomplete after a kill."""
        path = self.folder / f"rank-calls-{rank}"
        lines = path.read_text().splitlines() if path.exists() else []
        return [Call(*json.loads(line)) for line in lines if line.endswith("]")]

    def close(self) -> None:
        self._process.communicate()
