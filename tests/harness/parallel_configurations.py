"""For tests of parallel strategies: the configurations, and a client that runs them in gradient_worker.py."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from running import PYTHON_PATH, ROOT, metrics
from torch import Tensor

GLOBAL_BATCH = 8


class Configuration(NamedTuple):
    """Number of processes and their flags. Each process has 2 micro-batches per step."""

    world_size: int
    settings: dict[str, object]


def _fsdp(world_size: int, sharding: str, **settings: object) -> Configuration:
    return Configuration(world_size, {"strategy": "fsdp", "sharding_strategy": sharding, **settings})


CONFIGURATIONS = {
    "single": Configuration(1, {}),
    "ddp2": Configuration(2, {"strategy": "ddp"}),
    "ddp4": Configuration(4, {"strategy": "fsdp", "sharding_strategy": "NO_SHARD"}),  # equivalent to ddp
    "full2": _fsdp(2, "FULL_SHARD"),
    "full4": _fsdp(4, "FULL_SHARD", train__prefetch_blocks=2),
    "sgo2": _fsdp(2, "SHARD_GRAD_OP", train__defer_gradient_sync="true"),
    "sgo4": _fsdp(4, "SHARD_GRAD_OP", train__activation_checkpointing="op"),
    "hybrid2": _fsdp(2, "HYBRID_SHARD"),
    "hybrid4": _fsdp(4, "HYBRID_SHARD", train__defer_gradient_sync="true"),
    "full1": _fsdp(1, "FULL_SHARD"),
    "offload2": _fsdp(2, "FULL_SHARD", train__cpu_offload="true"),
}


class Trainer:
    """Starts the worker, and sends it requests for runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs = 0
        # One thread: the arithmetic of all other tests. Arrow's allocator would start a thread, which no fork survives.
        environment = {"OMP_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
        environment["PYTHONPATH"] = PYTHON_PATH
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "harness" / "gradient_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )

    def run(
        self, name: str, arguments: list[str], *, gradient_steps: tuple[int, ...] = (), loaded: Path | None = None
    ) -> dict[int, dict[str, Any]]:
        """Train a configuration; returns the gradients of some steps: {step: {gradients, norm, counts}}.

        With `loaded`, the state before the first step must equal that checkpoint.
        """
        loaded_path = None if loaded is None else str(loaded)
        request = {"arguments": arguments, "gradient_steps": gradient_steps, "loaded": loaded_path}
        steps: dict[int, dict[str, Any]] = self.ask(name, CONFIGURATIONS[name].world_size, **request)
        return steps

    def ask(self, name: str, world_size: int, **request: Any) -> dict[Any, Any]:
        """The report of rank 0 of `world_size` ranks. See `train` in the worker for the request."""
        self.runs += 1
        report = self.folder / f"{self.runs}-{name}"
        request |= {"world_size": world_size, "report": str(report), "timeout_s": 240}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        statuses = json.loads(self._process.stdout.readline())
        logs = "\n".join(p.read_text() for p in sorted(self.folder.glob(f"{report.name}-*.log")))
        assert not any(statuses), f"{name}: exit statuses {statuses}\n{logs}"
        answer: dict[Any, Any] = torch.load(f"{report}.pt", weights_only=True)
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(timeout=30) == 0


@functools.cache
def shared_trainer() -> Trainer:
    """The trainer of this process: starting one costs as much as importing torch and Lightning."""
    trainer = Trainer(Path(tempfile.mkdtemp(prefix="llammlein-strategies-")))
    atexit.register(trainer.close)
    return trainer


def settings_of(name: str) -> dict[str, object]:
    """The flags of a configuration, for running.flags."""
    world_size, settings = CONFIGURATIONS[name]
    return {"devices": world_size, "train__micro_batch_samples": max(1, GLOBAL_BATCH // 2 // world_size), **settings}


def column(run: Path, name: str, after: int = 0) -> Tensor:
    """The non-empty values of a metrics.csv column in rows after step `after`; float64."""
    rows = [r for r in metrics(run) if int(r["step"]) > after or after == 0]
    return torch.tensor([float(r[name]) for r in rows if r[name]], dtype=torch.float64)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest relative difference."""
    assert ours.shape == theirs.shape and ours.numel()
    return ((ours - theirs).abs() / theirs.abs()).max().item()
