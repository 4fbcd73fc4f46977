"""Resuming: compare a checkpoint with the settings, load it, go back to it after a loss spike."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lit_data.loading.order import Segment, first_sample_of_step
from lit_files.checkpoint_name import checkpoint_step, list_checkpoints
from lit_files.reading import build
from lit_model.config import ModelConfig
from lit_model.device import sums_device
from lit_model.load import Checkpoint
from pretrain.args import DistillationArgs, OptimArgs, RunArgs, TrainArgs, flat, plain
from pretrain.checkpoint.load import check_meta, load_state, training_state
from pretrain.data import Data, in_order, training_loader
from pretrain.exact_sums import FIRST_PEAK, ExactSums
from pretrain.failure.peers import on_rank_zero
from pretrain.guards import SpikeDetector
from pretrain.optim import LossScale, Optimizer
from pretrain.run import Progress, Run
from pretrain.run_folder import begin_recording
from pretrain.word_budgets import plan_budgets

# Settings that change the meaning of a run: a resume with another value is an error unless --resume_allow names it.
MEANING = (
    "seed",
    "model",
    "train",
    "optim",
    "data.packing",
    "data.document_mask",
    "data.phases",
    "data.shuffle_block_rows",
    "data.shuffle_group_blocks",
    "objective",
    "distillation",
)
# Settings that change the bits of a run with --train.topology_invariant.
BITS = (
    "precision",
    "compile",
    "train.micro_batch_samples",
    "train.attention",
    "train.loss_kernel",
    "train.cpu_offload",
    "eval.micro_batch_samples",
    "distillation.teacher_device",
    "distillation.compile_teachers",
)
# Exceptions: these only change how it is computed, or are compared by content.
MECHANICS = (
    "train.micro_batch_samples",
    "train.activation_checkpointing",
    "train.activation_checkpointing_every",
    "train.activation_checkpointing_blocks",
    "train.memory_limit_gib",
    "train.cpu_offload",
    "train.prefetch_blocks",
    "train.reduce_dtype",
    "train.defer_gradient_sync",
    "train.deterministic",
    "train.attention",
    "train.loss_kernel",
    "train.fp8_keep_ends",
    "distillation.teachers",
    "distillation.cache",
    "distillation.teacher_device",
    "distillation.shard_teachers",
    "distillation.compile_teachers",
)


@dataclass(frozen=True)
class SettingsChange:
    """A resume that changed settings.

    Attributes:
        step: the step resumed from.
        differences: setting -> [value before, value after].
    """

    step: int
    differences: dict[str, Any]


def changes_of(meta: dict[str, Any], source: object) -> list[SettingsChange]:
    """The changes of settings listed in a checkpoint's meta. Raises ValueError naming `source` if they are damaged."""
    return build(list[SettingsChange], meta.get("changes") or [], f"{source}: meta.changes")


def changes_meaning(key: str) -> bool:
    """Whether another value of a setting (such as optim.lr) makes it another run."""
    return any(key == name or key.startswith(f"{name}.") for name in MEANING) and key not in MECHANICS


def read_meta(path: Path) -> dict[str, Any]:
    """The meta of a checkpoint of a run. Raises ValueError for one that is damaged or was imported."""
    meta = Checkpoint(path).meta
    if "segments" not in meta:
        raise ValueError(f"{path} was imported: begin a run with --init_from instead of --resume")
    check_meta(meta, path)
    return meta


def progress_at(meta: dict[str, Any] | None, args: RunArgs, device: torch.device) -> Progress:
    """Where the run of a checkpoint was, or a new run is (None). Older checkpoints lack some of the keys."""
    meta = meta or {
        "step": 0,
        "segments": [Segment(0, 0, args.train.global_batch_samples).to_dict()],
        "tokens": 0,
        "skipped": 0,
        "time": {"seconds": 0.0, "device_seconds": 0.0},
    }
    spent = meta.get("time") or {}
    return Progress(
        step=int(meta["step"]),
        segments=[Segment(**segment) for segment in meta["segments"]],
        spikes=SpikeDetector(args.guard, meta.get("spikes")),
        tokens=torch.tensor(meta["tokens"], dtype=torch.float64, device=sums_device(device)),
        skipped=torch.tensor(meta["skipped"], dtype=torch.float32, device=device),
        skipped_in_row=torch.tensor(meta.get("skipped_in_row", 0), dtype=torch.float32, device=device),
        words_at=(int(meta["step"]), meta["words"]) if meta.get("words") is not None else (0, 0),
        unfinished=meta.get("unfinished_row"),
        skips=list(meta.get("skips", [])),
        changes=list(meta.get("changes", [])),
        earlier_s=spent.get("seconds"),
        earlier_device_s=spent.get("device_seconds"),
    )


def start_progress(meta: dict[str, Any] | None, args: RunArgs, device: torch.device) -> Progress:
    """Where a new or resumed run starts. Another global batch than the checkpoint's begins a new segment."""
    progress = progress_at(meta, args, device)
    last = progress.segments[-1]
    if last.global_batch != args.train.global_batch_samples:
        first = last.first_sample + (progress.step - last.from_step) * last.global_batch
        progress.segments.append(Segment(progress.step, first, args.train.global_batch_samples))
    return progress


def is_finished(folder: Path, progress: Progress, max_steps: int) -> bool:
    """Whether the checkpoint to resume is the run's last, with its validation done."""
    newest = checkpoint_step(list_checkpoints(folder)[-1])
    return progress.step == max_steps == newest and progress.unfinished is None


def check_resume(
    settings: dict[str, Any],
    meta: dict[str, Any],
    data: Data,
    config: ModelConfig,
    taught_by: list[dict[str, Any]],
    path: Path,
) -> dict[str, tuple[Any, Any]]:
    """Refuse to resume a run with settings that change its meaning. Returns the differences that --resume_allow names.

    Raises ValueError that lists every other difference.
    """
    # Settings that older checkpoints lack had these defaults (max_steps stands for the length that each of them has).
    defaults = {"distillation": DistillationArgs(), "optim": OptimArgs(), "train": TrainArgs(max_steps=1)}
    later = flat({"objective": "cross_entropy", **plain(defaults)})
    old, new = later | flat(meta["config"]), flat(settings)
    exact = settings["train"]["topology_invariant"]
    keys = [key for key in sorted(old.keys() | new.keys()) if changes_meaning(key) or (exact and key in BITS)]
    differs = {k: (old.get(k), new.get(k)) for k in keys if old.get(k) != new.get(k)}
    flag = "data.train" if settings["data"]["train"] is not None else "data.mixture"
    there, here = meta["data"]["train"], [dataset.fingerprint for dataset in data.train]
    if there != here:
        differs[flag] = ([f[:12] for f in there], [f[:12] for f in here])
    weights = [[entry["weight"] for entry in config["data"]["mixture"]] for config in (meta["config"], settings)]
    if weights[0] != weights[1] and flag not in differs:
        differs["data.mixture"] = (weights[0], weights[1])
    before = meta.get("teachers", [])
    if [(t["sha256"], t["weight"]) for t in before] != [(t["sha256"], t["weight"]) for t in taught_by]:
        differs["distillation.teachers"] = (show_teachers(before), show_teachers(taught_by))
    check_history(meta, data, path)
    if meta["model_config"] != config.to_dict():
        other = ModelConfig.from_dict(meta["model_config"]).to_dict()
        for k, v in config.to_dict().items():
            if other[k] != v:
                differs[f"model.{k}"] = (other[k], v)
    refused = {
        k: v for k, v in differs.items() if not any(k == a or k.startswith(a + ".") for a in settings["resume_allow"])
    }
    if refused:
        listing = "; ".join(f"{k}: {a!r} there, {b!r} here" for k, (a, b) in refused.items())
        raise ValueError(
            f"{path} is a checkpoint of another run: {listing}. Give the same settings, or allow a change by name with "
            f"--resume_allow={','.join(refused)}"
        )
    return differs


def show_teachers(taught_by: list[dict[str, Any]]) -> list[str]:
    return [f"{t['name']} ({t['sha256'][:12]}) x {t['weight']:g}" for t in taught_by]


def check_history(meta: dict[str, Any], data: Data, path: Path) -> None:
    """Raise ValueError for other weights of samples that were seen: the record would be wrong."""
    step = int(meta["step"])
    seen, _ = first_sample_of_step([Segment(**s) for s in meta["segments"]], step)
    width = max(len(meta["data"]["phases"][0]["quotas"]), len(data.rows))

    def begun(phases: list[dict[str, Any]]) -> list[tuple[int, list[int]]]:
        """The phases before `seen`; a new dataset had no row."""
        return [
            (p["first_sample"], [*p["quotas"], *[0] * (width - len(p["quotas"]))])
            for p in phases
            if p["first_sample"] < seen
        ]

    if begun(meta["data"]["phases"]) != begun([p.to_dict() for p in data.mixture.phases]):
        raise ValueError(
            f"{path}: --data.mixture and --data.phases give other weights than the {step} steps that are done had; "
            f"keep those, and begin new ones with --data.phases from step {step} (a new dataset has weight 0 "
            "before)"
        )


def restore(path: Path, optimizer: Optimizer, loss_scale: LossScale | None, sums: ExactSums | None) -> dict[str, Any]:
    """Load a checkpoint's model and optimizer. Returns its meta.

    Raises ValueError, on every rank, if it is damaged or does not fit.
    """
    meta = load_state(path, training_state(optimizer))
    if loss_scale is not None and meta["loss_scale"] is not None:
        loss_scale.load(meta["loss_scale"])
    if sums is not None:
        sums.peak = meta.get("gradient_peak") or FIRST_PEAK
    return meta


def go_back(run: Run, path: Path, reason: str) -> None:
    """Return to a checkpoint, and leave out the samples used since then. Every rank calls this."""
    run.stop_writing()
    end_sample, global_batch = first_sample_of_step(run.segments, run.step)
    meta = restore(path, run.optimizer, run.loss_scale, run.sums)
    old = progress_at(meta, run.args, run.device)
    first_sample, _ = first_sample_of_step(run.segments, old.step)
    skip = {"step": old.step, "first_sample": first_sample, "end_sample": end_sample, "reason": reason}
    old.skips = [*(s for s in run.skips if s["step"] <= old.step), skip]
    earlier = [s for s in run.segments if s.from_step < old.step]
    old.segments = [*earlier, Segment(old.step, end_sample, global_batch)]
    old.changes = run.changes
    vars(run).update(vars(old))
    data = run.data
    run.data = in_order(run.args, data.rows, data.val, data.block_size, run.segments)
    run.loader = training_loader(run.args, run.fabric, run.data, run.segments, run.teachers)
    plan = on_rank_zero(run.fabric, lambda: plan_budgets(run.args, run.data, run, run.words, run.folder))
    run.budgets, run.saver.kept, run.evaluated_steps = plan.at, plan.kept, plan.evaluated
    run.recorder, run.compactor, run.trackers = begin_recording(
        run.args, run.settings, run.fabric, run.folder, run.data, run, run.metrics_columns, None
    )
    if run.compactor is not None:
        run.saver.published = run.compactor.start
