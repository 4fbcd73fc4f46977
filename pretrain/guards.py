"""What ends or turns back a run: signals, steps that stay non-finite, loss spikes."""

from __future__ import annotations

import math
import signal
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from pretrain.args import GuardArgs

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class AgreedError(RuntimeError):
    """The run must end, and every rank sees it at the same step. `sound`: the state may be saved before."""

    def __init__(self, message: str, *, sound: bool) -> None:
        super().__init__(message)
        self.sound = sound


class StopRequest:
    """What one rank wants all to know: that it got a signal, or that a thread of its own has failed.

    It rides on the all-reduce of counts that each step begins with, so all ranks see it after the same step without a
    collective of its own. On CUDA it is read a step later, from memory that the copy has filled by then: waiting for
    it only keeps the host from running more than a step ahead.
    """

    def __init__(self, device: torch.device, failed: Callable[[], bool] = lambda: False) -> None:
        self.failed = failed
        self._signal: int | None = None
        self._lag = 1 if device.type == "cuda" else 0
        self._flags: deque[tuple[Tensor, Callable[[], None]]] = deque()
        self._old = {s: signal.signal(s, self._receive) for s in STOP_SIGNALS}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._signal = number

    def flags(self) -> tuple[float, ...]:
        """What this rank adds to the sum: one number for each signal, one for a failure."""
        return (*(float(self._signal == s) for s in STOP_SIGNALS), float(self.failed()))

    def summed(self, flags: Tensor) -> None:
        """Take the sums over the ranks, as they lie on the device, for `agreed` to read."""
        if flags.is_cuda:
            host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
            host.copy_(flags, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._flags.append((host, event.synchronize))
        else:
            self._flags.append((flags.clone(), lambda: None))

    def agreed(self) -> tuple[str | None, bool]:
        """(name of the signal to stop for, whether a rank has failed), the same on every rank after the same step."""
        if len(self._flags) <= self._lag:
            return None, False
        flags, wait = self._flags.popleft()
        wait()
        *signals, failed = flags.tolist()
        name = next((s.name for s, n in zip(STOP_SIGNALS, signals, strict=True) if n), None)
        return name, failed > 0

    def close(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


def check_progress(skipped_in_row: int, most: int, step: int, last_checkpoint: str) -> None:
    """Raise AgreedError after `most` steps in a row whose loss or gradients were not finite."""
    if skipped_in_row >= most:
        raise AgreedError(
            f"the last {skipped_in_row} steps before step {step} had a loss or gradients that were not finite and were "
            f"skipped (--guard.max_skipped_steps {most}); the last checkpoint before them is {last_checkpoint}. Lower "
            "--optim.lr, or look at the data of these steps with scripts/trace_data.py step",
            sound=True,  # skipped steps have changed nothing
        )


def skip_if_not_finite(norm: Tensor) -> Tensor:
    """1.0 where a gradient norm is not finite, else 0.0; a float32 scalar on its device, read by nobody."""
    return (~torch.isfinite(norm)).to(torch.float32)


@dataclass
class Spike:
    """A loss spike: first seen at log step `first_step`, believed at `step`; `good_step` was the last before it."""

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
    """Finds losses that stay far above those before them. A pure function of the logged losses, the same on all ranks.

    A loss is high if it is not finite, or exceeds the mean of the last `spike_window` that were not high by
    `spike_sigmas` of their standard deviations; `spike_rows` high ones in a row are a spike.
    """

    def __init__(self, args: GuardArgs, state: dict[str, Any] | None = None) -> None:
        self.args = args
        state = state or {"losses": [], "high": [], "good_step": 0}
        self.losses: deque[float] = deque(state["losses"], maxlen=args.spike_window)
        self.high: list[tuple[int, float]] = [(int(step), float(loss)) for step, loss in state["high"]]
        self.good_step = int(state["good_step"])

    def add(self, step: int, loss: float) -> Spike | None:
        """Take the loss after `step` steps; the spike that it completes, if it does."""
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
        # The new level is what later losses are compared with, lest a lasting change be said again and again.
        self.losses.clear()
        self.losses.extend(loss for _, loss in self.high if math.isfinite(loss))
        self.high, self.good_step = [], step
        return spike

    def state(self) -> dict[str, Any]:
        """JSON-able; not finite losses are kept as text by Python's json."""
        return {"losses": list(self.losses), "high": self.high, "good_step": self.good_step}
