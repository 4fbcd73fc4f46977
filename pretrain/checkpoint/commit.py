"""Writing one checkpoint, all ranks together. The layout is described in `lit_model/load.py`.

Everything is written under a temporary name, each rank syncs its own files and its part of the datapoint record, then
rank 0 renames. A checkpoint that has its name is whole, and it commits the record up to its step.

The ranks write in stages. After each they exchange their errors, so that all of them give up together. They do so on a
gloo group of the saver's own: training's collectives run at the same time.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lit_files.checksum import file_sha256
from lit_files.publish import publish, sync_file, write_json
from lit_model.checksum import tensor_checksum
from lit_model.load import MODEL_PREFIX, OPTIMIZER_PREFIX
from pretrain.checkpoint.retention import remove

T = TypeVar("T")

# A single process is intended. Set here once, since filters belong to all threads: one save would reset another's.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

SPARE_BYTES = 16 << 20  # beside the tensors: their index, the meta, the next rows of metrics and record


class SaveError(RuntimeError):
    """A checkpoint could not be written; every rank raises it alike. The one before is untouched."""


class CheckpointWriter:
    """Writes checkpoints as one file, or `sharded`: a folder to which every rank writes its shards."""

    def __init__(self, *, sharded: bool, timeout: timedelta) -> None:
        several = dist.is_initialized() and dist.get_world_size() > 1
        self.sharded = sharded
        if sharded:  # here and not by the first save, which may run in a thread beside the training
            importlib.import_module("torch.distributed.checkpoint")
        self.rank = dist.get_rank() if several else 0
        self.group = dist.new_group(backend="gloo", timeout=timeout) if several else None

    def write(
        self, path: Path, tensors: dict[str, Tensor], meta: dict[str, Any], finish_part: Callable[[], None]
    ) -> None:
        """Write a checkpoint and give it its name. Every rank calls this; the arguments are those of `Saver.save`."""
        temporary = path.with_name(f".{path.name}.tmp")

        def begin() -> None:
            if self.rank == 0:
                clear(temporary)
                check_free_space(path.parent, sum(t.numel() * t.element_size() for t in tensors.values()))
                if self.sharded:
                    temporary.mkdir()

        def write_shards() -> dict[str, dict[str, Any]]:
            if not write_sharded(temporary, tensors, self.group, self.rank):
                return {}
            mine = sorted(temporary.glob(f"__{self.rank}_*"))
            if self.rank == 0:
                mine.append(temporary / ".metadata")
            return {p.name: {"bytes": p.stat().st_size, "sha256": file_sha256(p)} for p in mine}

        def write_file() -> None:
            if self.rank == 0:
                with open(temporary, "wb") as f:
                    write_full(f, tensors, meta)
                    sync_file(f)

        def commit() -> None:
            if self.rank == 0:
                if self.sharded:
                    write_json(temporary / "meta.json", meta)
                publish(temporary, path)

        try:
            self._together(path, begin)
            if self.sharded:
                parts = self._together(path, write_shards)
                meta["checksums"] = {name: facts for part in parts for name, facts in sorted(part.items())}
            else:
                self._together(path, write_file)
            self._together(path, finish_part)
            self._together(path, commit)
        except SaveError:
            if self.rank == 0:
                with contextlib.suppress(OSError):
                    remove(temporary)
            raise

    def _together(self, path: Path, work: Callable[[], T]) -> list[T]:
        """Do a stage on every rank. Returns the results of all; raises SaveError on all if one of them failed."""
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
                raise SaveError(f"{path} was not written: lost the connection to a rank ({error})") from error
        faults = {rank: f for rank, (f, _) in enumerate(outcomes) if f is not None}
        if faults:
            message = "; ".join(f"rank {rank}: {f}" for rank, f in list(faults.items())[:3])
            raise SaveError(f"{path} could not be written: {message}")
        return [r for _, r in outcomes]


def clear(temporary: Path) -> None:
    """Remove the remains of a killed save, or rename them if that fails."""
    try:
        remove(temporary)
    except OSError:
        os.rename(temporary, temporary.with_name(f".deleting-{temporary.name}-{time.time_ns()}"))


def write_sharded(folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None, rank: int) -> bool:
    """Write this rank's shards by DCP. Raises this rank's own error; returns whether all the others succeeded."""
    from torch.distributed.checkpoint import CheckpointException, FileSystemWriter, save

    class ShardWriter(FileSystemWriter):
        """Raises the cause of an error: torch.save hides a full disk behind its own error."""

        def write_data(self, *arguments: Any) -> Any:
            try:
                return super().write_data(*arguments)
            except Exception as error:
                raise system_error(error) from None

    writer = ShardWriter(folder, sync_files=True)
    try:
        save(dict(tensors), storage_writer=writer, process_group=group, no_dist=group is None)
    except CheckpointException as error:  # it holds the errors of all ranks
        if rank in error.failures:
            raise error.failures[rank][0] from None
        return False
    return True


def system_error(error: BaseException) -> BaseException:
    """The OSError that caused an error, or the error itself."""
    beneath: BaseException | None = error
    while beneath is not None and not isinstance(beneath, OSError):
        beneath = beneath.__cause__ or beneath.__context__
    return beneath or error


def check_free_space(folder: Path, n_bytes: int) -> None:
    """Raise OSError if a file system has no room for `n_bytes` and a little more."""
    free = shutil.disk_usage(folder).free
    if free < n_bytes + SPARE_BYTES:
        raise OSError(
            f"{folder} has {free / 1e9:.3f} GB free, the checkpoint needs {(n_bytes + SPARE_BYTES) / 1e9:.3f} GB; "
            "free some space, or keep fewer with --save.keep_last"
        )


def write_full(file: BinaryIO, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write the content of a checkpoint file, with checksums of the tensors in its meta."""
    checksums = {name: tensor_checksum(tensor) for name, tensor in tensors.items()}
    torch.save({**nested(tensors), "meta": json.dumps(meta | {"checksums": checksums})}, file)


def nested(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Flat names -> the content of a checkpoint file: {"model": ..., "optimizer": {name: {key: ...}}}."""
    model: dict[str, Tensor] = {}
    optimizer: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(MODEL_PREFIX):
            model[name.removeprefix(MODEL_PREFIX)] = tensor
        else:
            parameter, key = name.removeprefix(OPTIMIZER_PREFIX).rsplit("/", 1)
            optimizer.setdefault(parameter, {})[key] = tensor
    return {"model": model, "optimizer": optimizer}
