"""For kill tests: training runs of forked ranks that are killed, checked against an undisturbed run, and resumed."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from rank_server import Answer, RankServer
from running import flags, metrics, shared_rank_server, write_dataset
from torch import Tensor
from whole_record import read_record

from lit_data.record.trace import open_run
from lit_data.record.verify import verify
from lit_files.checkpoint_name import checkpoint_step, list_checkpoints
from lit_model.load import Checkpoint

STEPS = 8
SURVIVAL_S = 30  # limit for the other ranks to exit after one is killed
COLUMNS = ("step", "tokens", "train_loss", "val_loss", "lr", "grad_norm", "skipped")


class Setting(NamedTuple):
    """Parallelism and checkpointing settings of a run."""

    world_size: int
    strategy: str
    kind: str
    asynchronous: bool

    def __str__(self) -> str:
        return f"{self.world_size}-{self.strategy}-{self.kind}-{'asynchronous' if self.asynchronous else 'synchronous'}"

    def arguments(self, data: Path, run: Path, **changes: object) -> list[str]:
        """Command line: 8 steps, a checkpoint every 2; retention keeps the newest and every fourth step's."""
        settings: dict[str, object] = {
            "resume": "auto",
            "devices": self.world_size,
            "strategy": self.strategy,
            "model__n_layer": 1,
            "model__dropout": 0.1,
            "train__max_steps": STEPS,
            "eval__every_steps": 3,
            "save__every_steps": 2,
            "save__keep_last": 1,
            "save__keep_every": 4,
            "save__state_dict_type": self.kind,
            "save__asynchronous": str(self.asynchronous).lower(),
        }
        return flags(data, run, **(settings | changes))


class Whole(NamedTuple):
    """An undisturbed run: the state at each checkpoint, its final files, and its ranks' calls."""

    states: dict[int, dict[str, Tensor]]
    record: pa.Table
    metrics: list[list[str]]
    names: list[str]
    answer: Answer


class Bench:
    """Runs trials of settings, and checks them against the undisturbed run of each."""

    def __init__(self, folder: Path, before: tuple[str, ...] = ()) -> None:
        self.folder, self.server = folder, RankServer(folder, before) if before else shared_rank_server()
        self.data, self.killed = folder / "data", folder / "killed"
        rng = np.random.default_rng(7)
        write_dataset(self.data / "train", rng.integers(1, 90, size=60).tolist())
        write_dataset(self.data / "val", rng.integers(1, 90, size=5).tolist(), seed=1)
        self._wholes: dict[Setting, Whole] = {}

    def train(self, setting: Setting, run: Path, changes: dict[str, object] | None = None, **request: Any) -> Answer:
        """Train until the run ends or is killed; see tests/harness/rank_server.py for the request."""
        arguments = setting.arguments(self.data, run, **(changes or {}))
        return self.server.run(setting.world_size, run, arguments, watch=True, **request)

    def end(self, setting: Setting, run: Path, **changes: object) -> Answer:
        """Train to the end, undisturbed."""
        answer = self.train(setting, run, changes)
        assert answer.statuses == [0] * setting.world_size, f"{answer.statuses}\n{answer.output[-3000:]}"
        return answer

    def whole(self, setting: Setting) -> Whole:
        """The undisturbed run, trained once."""
        if setting not in self._wholes:
            every, run = self.folder / "every", self.folder / "whole"
            self.end(setting, every, save__keep_last=0)
            states = {checkpoint_step(p) or 0: read_state(p) for p in list_checkpoints(every)}
            answer = self.end(setting, run)
            assert read_record(every).equals(read_record(run)) and rows(every) == rows(run)
            names = [p.name for p in list_checkpoints(run)]
            self._wholes[setting] = Whole(states, read_record(run), rows(run), names, answer)
            shutil.rmtree(every)
            shutil.rmtree(run)
        return self._wholes[setting]

    def kill(
        self, setting: Setting, begun: Path | None = None, changes: dict[str, object] | None = None, **request: Any
    ) -> Answer:
        """Kill a run (resumed from a copy of `begun`, if given), check its files, resume it, and check the result.

        Returns the answer of the killed run.
        """
        whole, run = self.whole(setting), self.killed
        shutil.rmtree(run, ignore_errors=True)
        if begun is not None:
            shutil.copytree(begun, run, symlinks=True)
        answer = self.train(setting, run, changes, **request)
        if not answer.killed:
            assert answer.statuses == [0] * setting.world_size, answer.output[-3000:]
            return answer
        details = f"statuses {answer.statuses}, in step {answer.step}, survived {answer.survived_s:.1f} s"
        assert not answer.exceeded and answer.survived_s < SURVIVAL_S, details
        newest = check(run, whole)
        assert newest == STEPS or 0 not in answer.statuses, f"a rank exited with status 0: {details}"
        if answer.phase != "begin":  # a run that is still rolling back has later checkpoints
            assert newest <= answer.step, f"{newest} was published after the kill: {details}"
        again = self.end(setting, run).outputs[0]
        resumed = re.search(r"resumed after step (\d+)|is finished", again)
        assert (int(resumed[1] or STEPS) if resumed else 0) == newest, again
        assert check(run, whole) == STEPS
        assert rows(run) == whole.metrics, "metrics.csv differs"
        names = [p.name for p in list_checkpoints(run)]
        # Resuming a finished run changes nothing, so checkpoints its last retention did not delete remain.
        assert names == whole.names or (newest == STEPS and set(names) > set(whole.names)), names
        if newest < STEPS:
            left = [p for p in run.rglob(".*") if p.name not in (".lock", ".metadata")]
            assert left == [], f"left behind: {left}"
        return answer


def check(run: Path, whole: Whole) -> int:
    """Check that all published files are readable and correct. Returns the newest checkpoint's step, 0 if none."""
    checkpoints = list_checkpoints(run)
    for path in checkpoints:
        step = checkpoint_step(path) or 0
        state = read_state(path)
        assert state.keys() == whole.states[step].keys()
        for name, tensor in state.items():
            assert torch.equal(tensor, whole.states[step][name]), f"{path.name}: {name}"
    if not checkpoints:
        return 0
    assert verify(open_run(run)) == []
    assert read_record(run).equals(whole.record.filter(pc.less(whole.record["step"], step)))
    return step


def read_state(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, after verifying its checksums."""
    checkpoint = Checkpoint(path)
    assert checkpoint.verify() == []
    return {name: checkpoint.tensor(name).clone() for name in checkpoint.names()}


def rows(run: Path) -> list[list[str]]:
    """metrics.csv without its timing columns."""
    return [[row[column] for column in COLUMNS] for row in metrics(run)]
