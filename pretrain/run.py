"""The state of a training run: settings, data, model, optimizer, position in the data, open files and threads."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_data.loading.loader import Loader
from lit_data.loading.order import Segment
from lit_data.loading.words import DatasetWords
from lit_data.record.merge import Compactor
from lit_data.record.writer import DatapointRecorder
from lit_files.lock import FileLock
from lit_model.config import ModelConfig
from lit_model.model import GPT
from pretrain.args import RunArgs
from pretrain.checkpoint.load import training_state
from pretrain.checkpoint.saver import Saver
from pretrain.data import Data
from pretrain.distillation.teacher_cache import CachedTeacher
from pretrain.distillation.teachers import Teachers
from pretrain.evaluation_plan import Evaluation
from pretrain.exact_sums import ExactSums
from pretrain.fabric import Fabric
from pretrain.failure.peers import Peers
from pretrain.failure.watchdog import Watchdog
from pretrain.guards import SpikeDetector, StopRequest
from pretrain.logs.messages import say
from pretrain.logs.trackers import Trackers
from pretrain.optim import LossScale, Optimizer
from pretrain.parallel import Placement


@dataclass(kw_only=True)
class Progress:
    """Progress of a run: the state that a checkpoint keeps besides its tensors.

    Attributes:
        step: optimizer steps done.
        segments: which samples each step reads.
        tokens: model inputs so far, float64 scalar on the device.
        skipped: steps skipped for a non-finite gradient norm, float32 scalar on the device.
        skipped_in_row: of these, the ones since the last applied step.
        words_at: a step, and the words seen by then (rank 0); (0, 0) if no checkpoint gives them.
        unfinished: the row of metrics of `step`, if its validation or evaluation is still to be done.
        skips: sample ranges left out after a loss spike.
        changes: settings changed with --resume_allow, by the step of the resume.
        earlier_s, earlier_device_s: seconds that the steps up to this start took, and seconds times ranks; None if an
            older checkpoint did not keep them.
    """

    step: int
    segments: list[Segment]
    spikes: SpikeDetector
    tokens: Tensor
    skipped: Tensor
    skipped_in_row: Tensor
    words_at: tuple[int, int] = (0, 0)
    unfinished: dict[str, float] | None = None
    skips: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    changes: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    earlier_s: float | None = 0.0
    earlier_device_s: float | None = 0.0

    def to_meta(self) -> dict[str, Any]:
        """As a checkpoint keeps it, JSON-able; pretrain/resume.py reads it. Waits for the device."""
        return {
            "step": self.step,
            "unfinished_row": self.unfinished,
            "tokens": int(self.tokens.item()),
            "segments": [segment.to_dict() for segment in self.segments],
            "skipped": int(self.skipped.item()),
            "skipped_in_row": int(self.skipped_in_row.item()),
            "spikes": self.spikes.state(),
            "skips": self.skips,
            "changes": self.changes,
        }


@dataclass(kw_only=True)
class Run(Progress):
    """One run in progress.

    Attributes:
        settings: `args` as nested dictionaries, as config.yaml and each checkpoint hold them.
        model: `raw_model` as Fabric wraps it.
        sums: with --train.topology_invariant; else None.
        taught_by: name, sha256 and weight of each teacher.
        val_loaders: of each validation set by its name; that of a single unnamed one is "".
        words: of each dataset, on rank 0; empty if they are not known.
        budgets: word budgets by the step that reaches them.
        evaluated_steps: those after which --eval.tasks_every_words evaluates.
        trackers, compactor, lock: of rank 0.
        evaluation: tasks and prompts; None if there are none.
        sound: the state is that after `step` steps; False between the optimizer update and the increment of `step`.
    """

    args: RunArgs
    settings: dict[str, Any]
    placement: Placement
    fabric: Fabric
    folder: Path
    config: ModelConfig
    data: Data
    raw_model: GPT
    model: Any
    optimizer: Optimizer
    loss_scale: LossScale | None
    sums: ExactSums | None
    teachers: Teachers | CachedTeacher | None
    taught_by: list[dict[str, Any]]
    loader: Loader
    val_loaders: dict[str, Loader]
    words: list[DatasetWords]
    budgets: dict[int, list[int]]
    evaluated_steps: set[int]
    saver: Saver
    recorder: DatapointRecorder | None
    compactor: Compactor | None
    trackers: Trackers | None
    stop: StopRequest
    watchdog: Watchdog
    peers: Peers
    lock: FileLock | None
    metrics_columns: list[str]
    evaluation: Evaluation | None = None
    sound: bool = True

    def fault(self) -> str | None:
        """The failure of a background thread of this rank that must end the run; None without one."""
        if self.saver.failed:
            return "a checkpoint could not be written"
        if self.recorder is not None and self.recorder.failed:
            return "the datapoint record could not be written"
        return None

    def beat(self, phase: str) -> None:
        """Report progress to the watchdog."""
        self.watchdog.beat(self.step, phase)

    def stop_writing(self) -> None:
        """Close the loader and the writers of record, checkpoints and trackers. Watchdog and log stay open."""
        with ExitStack() as stack:  # closes the last one first, each even if another raises
            if self.trackers is not None:
                stack.callback(self.trackers.close)
            stack.callback(self.saver.close)
            if self.compactor is not None:
                stack.callback(self.compactor.close, finish=self.step == self.data.max_steps)
            if self.recorder is not None:
                stack.callback(self.recorder.close)
            stack.callback(self.loader.close)

    def close(self) -> None:
        """Close all that the run holds open, release the run folder, and wait for the other ranks."""
        with ExitStack() as stack:
            stack.callback(self.peers.meet)
            if self.lock is not None:
                stack.callback(self.lock.close)
            stack.callback(self.watchdog.log.close)
            stack.callback(self.watchdog.close)
            stack.callback(self.stop_writing)

    def say(self, message: str) -> None:
        """Print a line on rank 0."""
        if self.fabric.global_rank == 0:
            say(message)

    @property
    def device(self) -> torch.device:
        return self.fabric.device

    @property
    def world_size(self) -> int:
        return self.fabric.world_size

    def tensors(self) -> dict[str, Tensor]:
        """The training state as a checkpoint holds it."""
        return training_state(self.optimizer)
