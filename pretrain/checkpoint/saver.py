"""When checkpoints are written: at once or in the background, one at a time, and which old ones are deleted.

`pretrain/checkpoint/commit.py` writes each of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_files.checkpoint_name import checkpoint_name
from lit_model.load import FORMAT_VERSION
from pretrain.args import SaveArgs
from pretrain.checkpoint.commit import CheckpointWriter, SaveError
from pretrain.checkpoint.host_copy import HostBuffers, gather
from pretrain.checkpoint.retention import retain
from pretrain.logs.messages import say, warn


@dataclass
class SaveTimes:
    """Seconds of the newest save. `blocked_s`: training waited; `copy_s` of these for the copy to host memory."""

    blocked_s: float = 0.0
    copy_s: float = 0.0
    total_s: float = 0.0


class Saver:
    """Writes the checkpoints of a run, one at a time.

    Args:
        run: the run folder.

    Attributes:
        published: called on rank 0 after each publication and the retention that follows.
        times: of the newest save.
        kept: steps whose checkpoints are never deleted.
        skipped: saves given up under `on_error: skip`.
    """

    def __init__(
        self,
        run: Path,
        args: SaveArgs,
        device: torch.device,
        *,
        timeout: timedelta,
    ) -> None:
        self.run, self.args = run, args
        self.published: Callable[[], None] = lambda: None
        self.writer = CheckpointWriter(sharded=args.state_dict_type == "sharded", timeout=timeout)
        self.rank = self.writer.rank
        self.times, self.skipped = SaveTimes(), 0
        self.kept: set[int] = set()
        self._undeletable: set[Path] = set()
        self._thread: ThreadPoolExecutor | None = None
        self._buffers = HostBuffers(device)
        self._pending: Future[None] | None = None

    @property
    def failed(self) -> bool:
        """Whether a background save has failed and must end the run (`on_error: stop`)."""
        pending = self._pending
        return (
            self.args.on_error == "stop" and pending is not None and pending.done() and pending.exception() is not None
        )

    def save(
        self,
        step: int,
        tensors: dict[str, Tensor],
        meta: dict[str, Any],
        finish_part: Callable[[], None] = lambda: None,
    ) -> None:
        """Save the state after `step` steps. Every rank calls this.

        With `asynchronous` it returns once the state is in host memory, otherwise once the checkpoint is published.

        Args:
            tensors: keys as in `Checkpoint.names`; plain tensors (the same on every rank) or DTensors.
            meta: JSON-able; its key `step` must agree with `step`.
            finish_part: waits until this rank's part of the record is on the disk, or raises.

        Raises SaveError, of this save or, with `asynchronous`, of the one before.
        """
        began = time.perf_counter()
        self.wait()
        path = self.run / checkpoint_name(step)
        meta = {"format_version": FORMAT_VERSION, **meta}
        copying = time.perf_counter()
        if self.args.state_dict_type == "full":
            tensors = gather(tensors, self.rank, copy=self.args.asynchronous)
        elif self.args.asynchronous:
            tensors = self._buffers.copy(tensors)
        copied = time.perf_counter()
        job = partial(self._save, path, tensors, meta, finish_part, began)
        self.times.copy_s = copied - copying
        if self.args.asynchronous:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="llammlein-saver")
            self._pending = self._thread.submit(job)
        else:
            self._finish(job)
        self.times.blocked_s = time.perf_counter() - began

    def wait(self) -> None:
        """Wait for the background save. Raises SaveError if it failed."""
        if (pending := self._pending) is not None:
            self._pending = None
            self._finish(pending.result)

    def close(self) -> None:
        """Abandon the background save, as after an exception; `wait` first to keep it. `save` may be called again."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
            self._thread = None

    def _finish(self, job: Callable[[], None]) -> None:
        try:
            job()
        except SaveError as error:
            if self.args.on_error == "stop":
                raise
            self.skipped += 1
            if self.rank == 0:
                warn(f"{error}; training continues without this checkpoint (--save.on_error skip)")

    def _save(
        self,
        path: Path,
        tensors: dict[str, Tensor],
        meta: dict[str, Any],
        finish_part: Callable[[], None],
        began: float,
    ) -> None:
        self.writer.write(path, tensors, meta, finish_part)
        self.times.total_s = time.perf_counter() - began
        if self.rank == 0:
            retain(self.run, self.args, self._undeletable, self.kept)
            self.published()
            say(f"step {meta['step']}: saved {path}")
