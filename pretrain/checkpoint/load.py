"""Checkpoints that a run resumes from: find, check, load. Their layout is described in `lit_model/load.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lit_data.loading.mixture import Phase, check_phases
from lit_data.loading.order import Segment, check_segments
from lit_files.checkpoint_name import checkpoint_step, list_checkpoints
from lit_files.nested_run import did_you_mean_run
from lit_files.reading import build
from lit_files.run_files import ABANDONED
from lit_model.init import copy_slice
from lit_model.load import MODEL_PREFIX, OPTIMIZER_PREFIX, WITHOUT_TENSORS, Checkpoint
from lit_model.sharded import load_into
from pretrain.optim import Optimizer

STEP_COUNT = "optimizer.all/step_count"  # in a checkpoint: the optimizer's updates so far


def load_state(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Fill `tensors` (as `training_state` gives them) in place from a checkpoint of any kind and world size.

    Returns its meta. Raises ValueError, on every rank, if its checksums show damage, and where names or shapes do not
    fit, before anything is changed.
    """
    checkpoint = Checkpoint(path)
    if checkpoint.meta.get(WITHOUT_TENSORS):
        raise ValueError(f"{path} was published without its training state: nothing can be resumed from it")
    check_whole(checkpoint)
    have, want = set(checkpoint.names()), set(tensors)
    if have != want:
        lacking, extra = sorted(want - have), sorted(have - want)
        raise ValueError(
            f"{path} is a checkpoint of another model or optimizer: "
            + "; ".join(f"{kind} {names[:3]}" for kind, names in (("missing", lacking), ("unexpected", extra)) if names)
        )
    if checkpoint.sharded:
        load_into(path, tensors, no_dist=not dist.is_initialized())
    else:
        for name, target in tensors.items():
            source = checkpoint.tensor(name)
            if source.shape != target.shape:
                raise ValueError(f"{path}: {name} has shape {tuple(source.shape)}; the model has {tuple(target.shape)}")
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
    words: int | None = None
    word_budgets: list[int] = field(default_factory=list)
    time: dict[str, float] | None = None

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
    """The checkpoint that --resume names, or None for a new run (`auto` only).

    Raises FileNotFoundError that names the place it looked at, and ValueError for a checkpoint of another folder.
    """
    if resume in ("latest", "auto"):
        checkpoints = list_checkpoints(run)
        if checkpoints:
            return checkpoints[-1]
        if resume == "auto":
            return None
        raise FileNotFoundError(
            f"--resume latest: {run} holds no checkpoint (--resume auto starts a new run where there is none)"
            f"{did_you_mean_run(run)}"
        )
    known = ", ".join(p.name for p in list_checkpoints(run)[-3:]) or "none"
    there = run / resume
    if run.is_dir() and there.exists() and there.parent.samefile(run) and checkpoint_step(there) is not None:
        return there
    path = Path(resume)
    if not path.exists() or checkpoint_step(path) is None:
        hint = f"; it is a run folder: give --out_dir {path} --resume latest" if list_checkpoints(path) else ""
        raise FileNotFoundError(
            f"--resume {resume}: no such checkpoint, neither in {run} nor as a path; the newest in it: {known}{hint}. "
            "Give latest, auto, iter-XXXXXXXX-ckpt.pth or a path to one"
        )
    mine = run / path.name
    if mine.exists() and same_state(mine, path):
        return path
    home = path.resolve().parent
    fresh = f"start a new run from its weights with --init_from {path}"
    if home.parent.name == ABANDONED:
        raise ValueError(
            f"--resume {resume}: this checkpoint was abandoned when its run was rolled back, and the record continues "
            f"from an earlier one; {fresh} and another --out_dir"
        )
    raise ValueError(
        f"--resume {resume} is not in --out_dir {run}, whose record, metrics and checkpoints would lack its steps (the "
        f"newest in it: {known}); give --out_dir {home} to resume that run, or {fresh}"
    )


def same_state(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same state of one run: the same file, a copy, or converted to the other kind."""
    facts = [{k: v for k, v in Checkpoint(path).meta.items() if k != "checksums"} for path in (one, other)]
    return one.samefile(other) or facts[0] == facts[1]


def state_tensors(parameters: Mapping[str, Tensor], optimizer_state: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Model and optimizer as one flat dictionary, keyed as a checkpoint is."""
    tensors: dict[str, Tensor] = {MODEL_PREFIX + n: p.detach() for n, p in parameters.items()}
    for name, state in optimizer_state.items():
        tensors.update({f"{OPTIMIZER_PREFIX}{name}/{key}": value for key, value in state.items()})
    return tensors


def training_state(optimizer: Optimizer) -> dict[str, Tensor]:
    """The parameters and the optimizer's state, all that a checkpoint holds as tensors."""
    return state_tensors(optimizer.parameters, optimizer.state) | {STEP_COUNT: optimizer.step_count}
