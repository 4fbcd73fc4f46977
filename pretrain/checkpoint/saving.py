"""Writing checkpoints, at once or while training goes on. The layout is described in `lit_model/load.py`.

Publishing: everything is written under a temporary name, each rank syncs its own files and its part of the datapoint
record, then rank 0 renames. A checkpoint whose name exists is whole, and it commits the record up to its step.

The ranks do it in stages. After each they exchange what went wrong, so that all of them give up together, and they do
so on a gloo group of the saver's own: training's collectives run at the same time.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter
from torch.distributed.checkpoint import save as dcp_save
from torch.distributed.tensor import DTensor

from lit_files.checkpoint_name import checkpoint_name
from lit_files.checksum import file_sha256
from lit_files.publish import sync_file
from lit_model.checksum import tensor_checksum
from lit_model.load import MODEL_PREFIX, OPTIMIZER_PREFIX
from pretrain.args import SaveArgs
from pretrain.checkpoint.files import FORMAT_VERSION, remove, retain
from pretrain.logs.messages import say, warn

T = TypeVar("T")

# One process writes a folder by itself, as meant. (For all threads: a filter of one save would end the others'.)
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

SPARE_BYTES = 16 << 20  # beside the tensors: their index, the facts, the next rows of metrics and record


class SaveError(RuntimeError):
    """A checkpoint could not be written; every rank raises it alike. The one before is untouched."""


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
        published: called on rank 0 after each publication and the retention that follows.

    Attributes:
        times: of the newest save.
        skipped: saves given up under `on_error: skip`.
    """

    def __init__(
        self,
        run: Path,
        args: SaveArgs,
        device: torch.device,
        *,
        timeout: timedelta,
        published: Callable[[], None] = lambda: None,
    ) -> None:
        self.run, self.args, self.device, self.published = run, args, device, published
        several = dist.is_initialized() and dist.get_world_size() > 1
        self.rank = dist.get_rank() if several else 0
        self.group = dist.new_group(backend="gloo", timeout=timeout) if several else None
        self.times, self.skipped = SaveTimes(), 0
        self._undeletable: set[Path] = set()
        self._thread: ThreadPoolExecutor | None = None
        self._staged: dict[str, Tensor] = {}
        self._pending: Future[None] | None = None

    @property
    def failed(self) -> bool:
        """Whether a save in the background has failed in a way that is to end the run."""
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

        With `asynchronous` it returns when the state lies in host memory, else when the checkpoint has its name.

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
            tensors = self._stage(tensors)
        copied = time.perf_counter()
        job = partial(self._save, path, tensors, meta, finish_part, began)
        self.times.copy_s = copied - copying
        if self.args.asynchronous:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="llammlein-saver")
            self._pending = self._thread.submit(job)
        else:
            self._settle(job)
        self.times.blocked_s = time.perf_counter() - began

    def wait(self) -> None:
        """Wait until nothing is being written. Raises SaveError if the save in the background failed."""
        if (pending := self._pending) is not None:
            self._pending = None
            self._settle(pending.result)

    def close(self) -> None:
        """Give up what is being written: after an exception. Call `wait` before it at the end of a run."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
            self._thread = None

    def _settle(self, job: Callable[[], None]) -> None:
        try:
            job()
        except SaveError as error:
            if self.args.on_error == "stop":
                raise
            self.skipped += 1
            if self.rank == 0:
                warn(f"{error}; training continues without this checkpoint (--save.on_error skip)")

    def _stage(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A copy of the ranks' shards in host memory, in buffers that are used again by the next save.

        Not DCP's DefaultStager: on torch 2.11 its second call fails (it clears its own table of types), and it
        allocates and pins new memory for every save.
        """
        for name, tensor in tensors.items():
            if name not in self._staged:
                self._staged[name] = host_buffer(tensor)
            local_tensor(self._staged[name]).copy_(local_tensor(tensor), non_blocking=tensor.is_cuda)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return {name: self._staged[name] for name in tensors}

    def _save(
        self,
        path: Path,
        tensors: dict[str, Tensor],
        meta: dict[str, Any],
        finish_part: Callable[[], None],
        began: float,
    ) -> None:
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            self._write(path, temporary, tensors, meta, finish_part)
        except SaveError:
            if self.rank == 0:
                with contextlib.suppress(OSError):
                    remove(temporary)
            raise
        self.times.total_s = time.perf_counter() - began
        if self.rank == 0:
            retain(self.run, self.args, self._undeletable)
            self.published()
            say(f"step {meta['step']}: saved {path}")

    def _write(
        self,
        path: Path,
        temporary: Path,
        tensors: dict[str, Tensor],
        meta: dict[str, Any],
        finish_part: Callable[[], None],
    ) -> None:
        sharded = self.args.state_dict_type == "sharded"

        def begin() -> None:
            if self.rank == 0:
                clear(temporary)
                check_free_space(self.run, sum(t.numel() * t.element_size() for t in tensors.values()))
                if sharded:
                    temporary.mkdir()

        def write_shards() -> dict[str, dict[str, Any]]:
            try:
                dcp_save(
                    dict(tensors),
                    storage_writer=_ShardWriter(temporary, sync_files=True),
                    process_group=self.group,
                    no_dist=self.group is None,
                )
            except CheckpointException as error:  # every rank gets those of all
                if self.rank in error.failures:
                    raise error.failures[self.rank][0] from None
                return {}
            mine = sorted(temporary.glob(f"__{self.rank}_*"))
            if self.rank == 0:
                mine.append(temporary / ".metadata")
            return {p.name: {"bytes": p.stat().st_size, "sha256": file_sha256(p)} for p in mine}

        def write_file() -> None:
            if self.rank == 0:
                meta["checksums"] = {name: tensor_checksum(tensor) for name, tensor in tensors.items()}
                with open(temporary, "wb") as f:
                    torch.save({**nested(tensors), "meta": json.dumps(meta)}, f)
                    f.flush()
                    os.fsync(f.fileno())

        def publish() -> None:
            if self.rank == 0:
                if sharded:
                    with open(temporary / "meta.json", "w", encoding="utf-8") as f:
                        json.dump(meta, f, indent=1)
                        f.flush()
                        os.fsync(f.fileno())
                    sync_file(temporary)
                os.rename(temporary, path)
                sync_file(path.parent)

        self._together(path, begin)
        if sharded:
            parts = self._together(path, write_shards)
            meta["checksums"] = {name: facts for part in parts for name, facts in sorted(part.items())}
        else:
            self._together(path, write_file)
        self._together(path, finish_part)
        self._together(path, publish)

    def _together(self, path: Path, work: Callable[[], T]) -> list[T]:
        """Do a stage on every rank; the results of all, or SaveError on all if one of them failed."""
        result: T | None = None
        fault = None
        try:
            result = work()
        except Exception as error:
            beneath = system_error(error)
            fault = f"{type(beneath).__name__}: {beneath}"
        outcomes: list[Any] = [(fault, result)]
        if self.group is not None:
            outcomes = [None] * dist.get_world_size(self.group)
            try:
                dist.all_gather_object(outcomes, (fault, result), group=self.group)
            except RuntimeError as error:
                raise SaveError(f"{path} was not written: a rank has gone ({error})") from error
        faults = {rank: f for rank, (f, _) in enumerate(outcomes) if f is not None}
        if faults:
            told = "; ".join(f"rank {rank}: {f}" for rank, f in list(faults.items())[:3])
            raise SaveError(f"{path} could not be written: {told}")
        return [r for _, r in outcomes]


def clear(temporary: Path) -> None:
    """Make way for a new file or folder: what a killed save left is removed, or renamed where it can't be."""
    try:
        remove(temporary)
    except OSError:
        os.rename(temporary, temporary.with_name(f".deleting-{temporary.name}-{time.time_ns()}"))


class _ShardWriter(FileSystemWriter):
    """DCP's writer, whose errors say what happened: torch.save hides a full disk beneath an error of its own."""

    def write_data(self, *arguments: Any) -> Any:
        try:
            return super().write_data(*arguments)
        except Exception as error:
            raise system_error(error) from None


def system_error(error: BaseException) -> BaseException:
    """The error of the system that lies beneath an error, or the error itself."""
    beneath: BaseException | None = error
    while beneath is not None and not isinstance(beneath, OSError):
        beneath = beneath.__cause__ or beneath.__context__
    return beneath or error


def check_free_space(folder: Path, n_bytes: int) -> None:
    """Raise OSError if a file system has no room for so many bytes and a little more."""
    free = shutil.disk_usage(folder).free
    if free < n_bytes + SPARE_BYTES:
        raise OSError(
            f"{folder} has {free / 1e9:.3f} GB free, the checkpoint takes {(n_bytes + SPARE_BYTES) / 1e9:.3f} GB; "
            "make room, or keep fewer with --save.keep_last"
        )


def gather(tensors: dict[str, Tensor], rank: int, *, copy: bool) -> dict[str, Tensor]:
    """Whole tensors in host memory, on rank 0; shards are gathered one tensor at a time. The others get none.

    With `copy` nothing of it shares memory with the training state.
    """
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if rank == 0:
            host = full.detach().cpu()
            whole[name] = host.clone() if copy and host.data_ptr() == local_tensor(tensor).data_ptr() else host
    return whole


def host_buffer(tensor: Tensor) -> Tensor:
    """Host memory for a tensor of the same shape and shards, pinned if the tensor is on a GPU."""
    buffer = tensor.detach().to("cpu", copy=True)
    if not tensor.is_cuda:
        return buffer
    if isinstance(buffer, DTensor):  # from_local would move it to the mesh's device; DCP's stagers set it likewise
        buffer._local_tensor = buffer._local_tensor.pin_memory()
        return buffer
    return buffer.pin_memory()


def local_tensor(tensor: Tensor) -> Tensor:
    """A tensor's own data on this rank, without its history."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def nested(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The flat names of a checkpoint -> the contents of a file: {"model": ..., "optimizer": {name: {key: ...}}}."""
    model: dict[str, Tensor] = {}
    optimizer: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(MODEL_PREFIX):
            model[name.removeprefix(MODEL_PREFIX)] = tensor
        else:
            parameter, key = name.removeprefix(OPTIMIZER_PREFIX).rsplit("/", 1)
            optimizer.setdefault(parameter, {})[key] = tensor
    return {"model": model, "optimizer": optimizer}
