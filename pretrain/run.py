"""What a training run is: its arguments, model, optimizer, data, and the counters that a checkpoint restores."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_data.loading.loader import Loader
from lit_data.loading.order import Segment
from lit_data.record.merge import Compactor
from lit_data.record.parts import DatapointRecorder
from lit_files.lock import FileLock
from lit_model.config import ModelConfig
from lit_model.model import GPT
from pretrain.args import RunArgs
from pretrain.checkpoint.files import (
    STEP_COUNT,
    state_tensors,
)
from pretrain.checkpoint.saving import Saver
from pretrain.data import Data
from pretrain.distillation.teacher_cache import CachedTeacher
from pretrain.distillation.teachers import Teachers
from pretrain.fabric import Fabric
from pretrain.failure.watchdog import Watchdog
from pretrain.guards import SpikeDetector, StopRequest
from pretrain.logs.messages import say
from pretrain.logs.trackers import Trackers
from pretrain.optim import AdamW, LossScale
from pretrain.parallel import (
    DTYPES,
    uses_fsdp,
)
from pretrain.ranks import Peers


@dataclass
class Run:
    """One run in progress. `step` counts the optimizer steps done."""

    args: RunArgs
    fabric: Fabric
    folder: Path
    config: ModelConfig
    data: Data
    raw_model: GPT
    model: Any
    optimizer: AdamW
    loss_scale: LossScale | None
    loader: Loader
    val_loader: Loader | None
    segments: list[Segment]
    recorder: DatapointRecorder | None
    compactor: Compactor | None
    saver: Saver
    spikes: SpikeDetector
    lock: FileLock | None
    trackers: Trackers | None  # on rank 0
    taught_by: list[dict[str, Any]]  # name, sha256 and weight of each teacher
    teachers: Teachers | CachedTeacher | None = None
    peers: Peers = dataclasses.field(default_factory=Peers)
    stop: StopRequest = dataclasses.field(init=False)
    watchdog: Watchdog | None = None
    sound: bool = True  # the state is that after `step` steps: not between an update and the count of it
    step: int = 0
    finished: bool = False
    unfinished: dict[str, float] | None = None  # the row of metrics of `step`, whose validation a stop has cut short
    changes: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # of settings, allowed when resuming
    skips: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # samples left out after a loss spike
    tokens: Tensor = dataclasses.field(default_factory=lambda: torch.zeros((), dtype=torch.float64))  # inputs seen
    skipped: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(()))
    skipped_in_row: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(()))

    def __post_init__(self) -> None:
        self.stop = StopRequest(self.device, lambda: self.fault() is not None, self.args.stop.after_minutes)

    def fault(self) -> str | None:
        """What a thread of this rank has failed in, so that the run must end; None if nothing has."""
        if self.saver.failed:
            return "a checkpoint could not be written"
        if self.recorder is not None and self.recorder.failed:
            return "the datapoint record could not be written"
        return None

    def beat(self, phase: str) -> None:
        """Tell the watchdog that training gets on."""
        if self.watchdog is not None:
            self.watchdog.beat(self.step, phase)

    def release(self) -> None:
        """Let another job have the run folder."""
        if self.lock is not None:
            self.lock.close()

    def say(self, message: str) -> None:
        """A line on standard output, from rank 0."""
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
        state = state_tensors(self.optimizer.parameters, self.optimizer.state)
        return state | {STEP_COUNT: self.optimizer.step_count}

    def autocast(self) -> AbstractContextManager[Any]:
        """The arithmetic of one forward. FSDP casts by its own policy."""
        if self.args.precision == "fp32" or uses_fsdp(self.args):
            return nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.args.precision])
