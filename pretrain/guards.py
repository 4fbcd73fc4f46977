"""What ends a run early: signals, and steps that stay non-finite."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
MAX_SKIPPED_IN_ROW = 100


class StopRequest:
    """Turns SIGTERM and SIGUSR1 into a save and a clean end, at a step that all ranks agree on."""

    def __init__(self, device: torch.device) -> None:
        self._signal: int | None = None
        self._device = device
        self._old = {s: signal.signal(s, self._receive) for s in STOP_SIGNALS}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._signal = number

    def agreed(self, log_step: bool) -> str | None:
        """The name of the signal to stop for, or None. Several ranks agree at log steps, where they wait anyway."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            if not log_step:
                return None
            flag = torch.tensor(self._signal or 0, device=self._device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            number = int(flag)
        else:
            number = self._signal or 0
        return signal.Signals(number).name if number else None

    def close(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


class RunLock:
    """One job at a time in a run folder. The system releases the lock when the process ends, however it ends."""

    def __init__(self, run: Path) -> None:
        path = run / ".lock"
        self._file: Any = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - held for the life of the run
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            raise ValueError(
                f"{run} is in use by another job ({holder}); wait for it, or choose another --out_dir"
            ) from error
        self._file.truncate(0)
        self._file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        self._file.flush()

    def release(self) -> None:
        self._file.close()


def check_progress(skipped_in_row: int, step: int, last_checkpoint: str) -> None:
    """Raise RuntimeError after too many steps in a row whose gradients were not finite."""
    if skipped_in_row >= MAX_SKIPPED_IN_ROW:
        raise RuntimeError(
            f"the last {skipped_in_row} steps before step {step} had non-finite gradients and were skipped; "
            f"the last checkpoint is {last_checkpoint}. Lower --optim.lr or look at the data of these steps with "
            "scripts/trace_data.py step"
        )


def skip_if_not_finite(norm: Tensor) -> Tensor:
    """1.0 where a gradient norm is not finite, else 0.0; a float32 scalar on its device, read by nobody."""
    return (~torch.isfinite(norm)).to(torch.float32)
