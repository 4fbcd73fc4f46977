"""Stops or rolls back a run: signals, repeated non-finite steps, loss spikes."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_files.platform import STOP_SIGNALS, process_age_s
from pretrain.args import GuardArgs
from pretrain.checkpoint.host_copy import copy_without_waiting
from pretrain.endings import AgreedError
from pretrain.stop_signals import StopSignals

AFTER_MINUTES = "stop.after_minutes"
REASONS = (*(s.name for s in STOP_SIGNALS), AFTER_MINUTES)


class StopRequest:
    """This rank's reasons to stop all ranks: it got a signal, its time is up, or one of its threads has failed.

    The flags travel in the all-reduce of counts at the start of each step, so all ranks see them after the same step
    without an extra collective; validation has its own. On CUDA they are read one step later, when the copy is done:
    waiting for it only keeps the host from running more than a step ahead.

    Attributes:
        signals: this process's signals; None: signals don't stop the run.
        after_minutes: time limit since process start, or None.
        reason: the agreed reason to stop, once there is one.
        rank_failed: whether the ranks agreed that one has failed.
    """

    def __init__(
        self, device: torch.device, signals: StopSignals | None = None, after_minutes: float | None = None
    ) -> None:
        self.signals, self.after_minutes = signals, after_minutes
        self.reason: str | None = None
        self.rank_failed = False
        self._lag = 1 if device.type == "cuda" else 0
        self._flags: deque[tuple[Tensor, Callable[[], None]]] = deque()

    def flags(self, *, failed: bool) -> tuple[float, ...]:
        """This rank's summands: one number for each of REASONS, one for a failed thread."""
        received = self.signals.received if self.signals is not None else None
        late = self.after_minutes is not None and process_age_s() > 60 * self.after_minutes
        return (*(float(s.name == received) for s in STOP_SIGNALS), float(late), float(failed))

    def summed(self, flags: Tensor) -> None:
        """Store the sums over the ranks, on the device, for `agreed` to read."""
        self._flags.append(copy_without_waiting(flags))

    def agreed(self) -> tuple[str | None, bool]:
        """(`reason`, `rank_failed`), the same on every rank after the same step."""
        if len(self._flags) > self._lag:
            flags, wait = self._flags.popleft()
            wait()
            *reasons, failed = flags.tolist()
            self.reason = self.reason or next((r for r, n in zip(REASONS, reasons, strict=True) if n), None)
            self.rank_failed |= failed > 0
        return self.reason, self.rank_failed


def check_progress(skipped_in_row: int, most: int, step: int, folder: Path, last_checkpoint: str | None) -> None:
    """Raise AgreedError after `most` steps in a row whose loss or gradients were not finite.

    `last_checkpoint`: the newest one before them.
    """
    if skipped_in_row < most:
        return
    first = step - skipped_in_row
    if last_checkpoint is None:
        remedy = "no checkpoint was written before them: start again in another --out_dir with a lower --optim.lr"
    else:
        remedy = f"resume the last checkpoint before them, --resume {last_checkpoint}, with a lower --optim.lr and "
        remedy += "--resume_allow optim.lr"
    raise AgreedError(
        f"{skipped_in_row} steps in a row from step {first} on had a loss or gradients that were not finite and were "
        f"skipped (--guard.max_skipped_steps {most}); {remedy}. Later checkpoints hold the weights that led here. To "
        f"see the data: python scripts/trace_data.py step {folder} {first}",
        sound=True,  # skipped steps leave the state unchanged
    )


def skip_if_not_finite(norm: Tensor) -> Tensor:
    """1.0 where a gradient norm is not finite, else 0.0; a float32 scalar on its device, never read on the host."""
    return (~torch.isfinite(norm)).to(torch.float32)


@dataclass
class Spike:
    """A loss spike: started at log step `first_step`, confirmed at `step`; `good_step` is the last one before it."""

    good_step: int
    first_step: int
    step: int
    loss: float
    mean: float
    deviation: float

    def __str__(self) -> str:
        return (
            f"the loss is {self.loss:.4f} at step {self.step} and has been high since step {self.first_step} (before: "
            f"{self.mean:.4f}, standard deviation {self.deviation:.4f})"
        )


class SpikeDetector:
    """Detects losses that stay far above the earlier ones. A pure function of the logged losses, equal on all ranks.

    A loss is high if it is not finite, or exceeds the mean of the last `spike_window` normal losses by `spike_sigmas`
    of their standard deviations; `spike_rows` high losses in a row are a spike.
    """

    def __init__(self, args: GuardArgs, state: dict[str, Any] | None = None) -> None:
        self.args = args
        state = state or {"losses": [], "high": [], "good_step": 0}
        self.losses: deque[float] = deque(state["losses"], maxlen=args.spike_window)
        self.high: list[tuple[int, float]] = [(int(step), float(loss)) for step, loss in state["high"]]
        self.good_step = int(state["good_step"])

    def add(self, step: int, loss: float) -> Spike | None:
        """Add the loss after `step` steps. Returns the spike it confirms, if any."""
        if self.args.spike_action == "none":
            return None
        enough = len(self.losses) * 2 >= self.args.spike_window
        mean = statistics.fmean(self.losses) if enough else 0.0
        deviation = statistics.pstdev(self.losses, mean) if enough else 0.0
        if (not enough and math.isfinite(loss)) or loss <= mean + self.args.spike_sigmas * deviation:
            self.losses.append(loss)
            self.high, self.good_step = [], step
            return None
        self.high.append((step, loss))
        if len(self.high) < self.args.spike_rows:
            return None
        spike = Spike(self.good_step, self.high[0][0], step, loss, mean, deviation)
        # Later losses are compared with the new level, so that a permanent change is reported once.
        self.losses.clear()
        self.losses.extend(loss for _, loss in self.high if math.isfinite(loss))
        self.high, self.good_step = [], step
        return spike

    def state(self) -> dict[str, Any]:
        """JSON-serializable state; Python's json writes non-finite losses as text."""
        return {"losses": list(self.losses), "high": self.high, "good_step": self.good_step}
