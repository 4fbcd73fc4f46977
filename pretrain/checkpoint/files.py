"""Checkpoints on disk: find, load, rewind the run folder, delete old ones.

`pretrain/checkpoint/writing.py` writes them; their layout is described in `lit_model/load.py`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lit_data.loading.mixture import Phase, check_phases
from lit_data.loading.order import Segment, check_segments
from lit_data.record.merge import copy_record, cut_record
from lit_data.record.writer import remove_temporaries
from lit_files.checkpoint_name import checkpoint_step, list_checkpoints
from lit_files.publish import sync_file
from lit_files.reading import build
from lit_model.init import copy_slice
from lit_model.load import MODEL_PREFIX, OPTIMIZER_PREFIX, Checkpoint
from lit_model.sharded import load_into
from pretrain.args import SaveArgs
from pretrain.logs.layer_norms import FILE as LAYERS
from pretrain.logs.messages import warn
from pretrain.logs.metrics import COLUMNS, cut_metrics, set_aside
from pretrain.logs.metrics import FILE as METRICS
from pretrain.optim import AdamW

FORMAT_VERSION = 1
ABANDONED = "abandoned"  # in the run folder: checkpoints and record of steps that were rolled back
STEP_COUNT = "optimizer.all/step_count"  # in a checkpoint: AdamW's updates so far


def load_state(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Fill `tensors` (as `training_state` gives them) in place from a checkpoint of any kind and world size.

    Returns its meta. Raises ValueError, on every rank, if its checksums show damage, and where names or shapes do not
    fit, before anything is changed.
    """
    checkpoint = Checkpoint(path)
    check_whole(checkpoint)
    have, want = set(checkpoint.names()), set(tensors)
    if have != want:
        lacking, extra = sorted(want - have), sorted(have - want)
        raise ValueError(
            f"{path} is a checkpoint of another model or optimizer: "
            + "; ".join(
                f"{what} {names[:3]}" for what, names in (("it lacks", lacking), ("unknown here", extra)) if names
            )
        )
    if checkpoint.sharded:
        load_into(path, tensors, no_dist=not dist.is_initialized())
    else:
        for name, target in tensors.items():
            source = checkpoint.tensor(name)
            if source.shape != target.shape:
                raise ValueError(f"{path}: {name} has shape {tuple(source.shape)}, the model {tuple(target.shape)}")
            copy_slice(target, source)
    return checkpoint.meta


@dataclass(frozen=True)
class _Resumed:
    """The meta that a checkpoint needs to be resumed."""

    step: int
    segments: list[Segment]
    config: dict[str, Any]
    model_config: dict[str, Any]
    data: dict[str, Any]
    skipped: int
    tokens: int

    def __post_init__(self) -> None:
        if self.step < 0:
            raise ValueError(f"step is {self.step}")
        check_segments(self.segments)
        if not isinstance(self.config.get("data"), dict):
            raise ValueError("config.data is no object")
        fingerprints = build(list[str], self.data.get("train"), "data.train")
        check_phases(build(list[Phase], self.data.get("phases"), "data.phases"), len(fingerprints))
        build(list[_Weighted], self.config["data"].get("mixture"), "config.data.mixture")


@dataclass(frozen=True)
class _Weighted:
    path: str
    weight: float


def check_meta(meta: dict[str, Any], path: Path) -> None:
    """Raises ValueError, naming the checkpoint, if its meta is not that of a run that can be resumed."""
    names = {f.name for f in fields(_Resumed)}
    build(_Resumed, {name: value for name, value in meta.items() if name in names}, f"{path}: its meta")


def check_whole(checkpoint: Checkpoint) -> None:
    """Verify a checkpoint's checksums, each rank a share of them. Raises ValueError on every rank alike."""
    if "checksums" not in checkpoint.meta:  # made by import_from_hf, or an older version
        return
    several = dist.is_initialized() and dist.get_world_size() > 1
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    faults: list[Any] = [checkpoint.verify(rank, world_size)]
    if several:
        mine, faults = faults[0], [None] * world_size
        dist.all_gather_object(faults, mine)
    damage = list(dict.fromkeys(fault for some in faults for fault in some))
    if damage:
        raise ValueError(f"{checkpoint.path} is damaged: {'; '.join(damage[:3])}. Resume an older one with --resume")


def find_checkpoint(resume: str, run: Path) -> Path | None:
    """The checkpoint that --resume means, or None for a new run (`auto` only).

    Raises FileNotFoundError that names the place it looked at, and ValueError for a checkpoint of another folder.
    """
    if resume in ("latest", "auto"):
        checkpoints = list_checkpoints(run)
        if checkpoints:
            return checkpoints[-1]
        if resume == "auto":
            return None
        raise FileNotFoundError(
            f"--resume latest: {run} holds no checkpoint (use --resume auto to begin where there is none)"
        )
    known = ", ".join(p.name for p in list_checkpoints(run)[-3:]) or "none"
    there = run / resume
    if run.is_dir() and there.exists() and there.parent.samefile(run) and checkpoint_step(there) is not None:
        return there
    path = Path(resume)
    if not path.exists() or checkpoint_step(path) is None:
        hint = f"; it is a run folder: give --out_dir {path} --resume latest" if list_checkpoints(path) else ""
        raise FileNotFoundError(
            f"--resume {resume}: no such checkpoint in {run} or as a path; the newest there: {known}{hint}. "
            "Give latest, auto, iter-XXXXXXXX-ckpt.pth or a path to one"
        )
    mine = run / path.name
    if mine.exists() and same_state(mine, path):
        return path
    home = path.resolve().parent
    begin = f"begin a new run with its weights by --init_from {path}"
    if home.parent.name == ABANDONED:
        raise ValueError(
            f"--resume {resume}: this checkpoint was abandoned when its run went back, and the record continues from "
            f"an earlier one; {begin} and another --out_dir"
        )
    raise ValueError(
        f"--resume {resume} is not in --out_dir {run}, whose record, metrics and checkpoints would lack its steps (the "
        f"newest there: {known}); give --out_dir {home} to resume that run, or {begin}"
    )


def same_state(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same state of one run: the same file, a copy, or converted to the other kind."""
    facts = [{k: v for k, v in Checkpoint(path).meta.items() if k != "checksums"} for path in (one, other)]
    return one.samefile(other) or facts[0] == facts[1]


def rewind(run: Path, step: int, columns: Sequence[str] = COLUMNS, *, again: bool = False) -> None:
    """Restore a run folder to its state after `step` steps. Rank 0 calls this before any rank writes.

    Later checkpoints and their part of the record move to abandoned/; parts that no checkpoint had committed, which
    a killed run leaves, are removed; metrics.csv, whose `columns` are given, and layers.csv are cut, the former before
    the row of `step` if that is to be written `again`. Killed on the way, the run can be resumed from any checkpoint
    that is still in its place.
    """
    datapoints = run / "datapoints"
    for leftover in [*run.glob(".iter-*.tmp"), *run.glob(".deleting-*")]:
        remove_if_possible(leftover)
    remove_temporaries(datapoints)
    later = [p for p in list_checkpoints(run) if (checkpoint_step(p) or 0) > step]
    if later:
        grave = new_grave(run / ABANDONED, step)
        for name in (METRICS, LAYERS):
            with contextlib.suppress(OSError):  # damaged: cut_metrics handles it
                if (run / name).is_file():
                    shutil.copy2(run / name, grave / name)
        # Copied, not moved: until the later checkpoints have moved, the record must reach up to them.
        if datapoints.is_dir():
            try:
                copy_record(run, step, grave / "datapoints")
            except Exception as error:  # a damaged part may raise anything; the run keeps none of its steps
                warn(f"the record from step {step} on could not be copied whole to {grave}: {error}")
        for path in reversed(later):
            os.rename(path, grave / path.name)
        sync_file(run)
    if datapoints.is_dir():
        for damage in cut_record(datapoints, step):
            warn(damage)
    cut_metrics(run / METRICS, step, columns, again=again)
    cut_metrics(run / LAYERS, step)


def new_grave(abandoned: Path, step: int) -> Path:
    """A new folder in abandoned/ for what comes after `step`, with a folder `datapoints` in it."""
    if os.path.lexists(abandoned) and not abandoned.is_dir():
        warn(f"{abandoned} is not a folder; kept as {set_aside(abandoned).name}")
    for number in itertools.count(sum(1 for _ in abandoned.iterdir()) if abandoned.is_dir() else 0):
        grave = abandoned / f"{number:03d}-from-{step:08d}"
        with contextlib.suppress(FileExistsError):  # the numbers have gaps where some were deleted
            (grave / "datapoints").mkdir(parents=True)
            return grave
    raise AssertionError


def retain(run: Path, args: SaveArgs, undeletable: set[Path]) -> None:
    """Delete old checkpoints: keep the newest `keep_last` and multiples of `keep_every`. Never the newest one.

    Warns once of each that can't be deleted, and adds it to `undeletable`.
    """
    if args.keep_last == 0:
        return
    for path in list_checkpoints(run)[: -args.keep_last]:
        step = checkpoint_step(path) or 0
        if path in undeletable or (args.keep_every and step % args.keep_every == 0):
            continue
        try:
            aside = path.with_name(f".deleting-{path.name}")
            os.rename(path, aside)  # a name that exists is whole, also while it is being deleted
            remove(aside)
        except OSError as error:
            undeletable.add(path)
            warn(f"{path} could not be deleted: {error}")


def state_tensors(
    parameters: dict[str, torch.nn.Parameter], optimizer_state: dict[str, dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Model and optimizer as one flat dictionary, keyed as a checkpoint is."""
    tensors: dict[str, Tensor] = {MODEL_PREFIX + n: p.detach() for n, p in parameters.items()}
    for name, state in optimizer_state.items():
        tensors.update({f"{OPTIMIZER_PREFIX}{name}/{key}": value for key, value in state.items()})
    return tensors


def training_state(optimizer: AdamW) -> dict[str, Tensor]:
    """The parameters and the optimizer's state, all that a checkpoint holds as tensors."""
    return state_tensors(optimizer.parameters, optimizer.state) | {STEP_COUNT: optimizer.step_count}


def remove_if_possible(path: Path) -> None:
    """Remove a file or folder that nothing depends on; warn on failure."""
    try:
        remove(path)
    except OSError as error:
        warn(f"{path} could not be deleted: {error}")


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
