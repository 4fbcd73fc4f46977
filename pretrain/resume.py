"""What a run may resume from, and how: compare a checkpoint with the settings, load it, go back to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lit_data.loading.order import Segment, first_sample_of_step
from lit_model.config import ModelConfig
from pretrain.args import DistillationArgs, RunArgs, flat, plain
from pretrain.checkpoint.files import (
    load_state,
)
from pretrain.data import Data, Datasets, open_data, training_loader
from pretrain.guards import SpikeDetector
from pretrain.run import Run
from pretrain.run_folder import begin_recording

# Settings that decide what a run means: a resume with another value is refused unless --resume_allow names it.
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
# Parts of these that only decide how it is computed, or are known by their content.
MECHANICS = (
    "train.micro_batch_samples",
    "train.activation_checkpointing",
    "train.activation_checkpointing_every",
    "train.cpu_offload",
    "train.prefetch_blocks",
    "train.reduce_dtype",
    "train.defer_gradient_sync",
    "train.deterministic",
    "train.attention",
    "distillation.teachers",
    "distillation.cache",
    "distillation.teacher_device",
    "distillation.shard_teachers",
    "distillation.compile_teachers",
)


def check_resume(
    args: RunArgs, meta: dict[str, Any], data: Data, config: ModelConfig, taught_by: list[dict[str, Any]], path: Path
) -> dict[str, tuple[Any, Any]]:
    """Refuse to go on with a run whose meaning would change, listing what differs. Returns what was allowed to."""
    # What older checkpoints lack had its default.
    later = {"optim.steps_before": 0, **flat({"objective": "cross_entropy", "distillation": plain(DistillationArgs())})}
    old, new = later | flat(meta["config"]), flat(plain(args))
    keys = [
        k
        for k in sorted(set(old) | set(new))
        if any(k == m or k.startswith(m + ".") for m in MEANING) and k not in MECHANICS
    ]
    differs = {k: (old.get(k), new.get(k)) for k in keys if old.get(k) != new.get(k)}
    flag = "data.train" if args.data.train is not None else "data.mixture"
    there, here = meta["data"]["train"], [dataset.fingerprint for dataset in data.train]
    if there != here:
        differs[flag] = ([f[:12] for f in there], [f[:12] for f in here])
    weights = [[entry["weight"] for entry in config["data"]["mixture"]] for config in (meta["config"], plain(args))]
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
    refused = {k: v for k, v in differs.items() if not any(k == a or k.startswith(a + ".") for a in args.resume_allow)}
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
    """Refuse other weights for samples that were seen: the record would no longer be true."""
    step = int(meta["step"])
    seen, _ = first_sample_of_step([Segment(**s) for s in meta["segments"]], step)
    width = max(len(meta["data"]["phases"][0]["quotas"]), len(data.rows))

    def begun(phases: list[dict[str, Any]]) -> list[tuple[int, list[int]]]:
        """The phases before `seen`; a dataset that was not there yet had no row."""
        return [
            (p["first_sample"], [*p["quotas"], *[0] * (width - len(p["quotas"]))])
            for p in phases
            if p["first_sample"] < seen
        ]

    if begun(meta["data"]["phases"]) != begun([p.to_dict() for p in data.mixture.phases]):
        raise ValueError(
            f"{path}: --data.mixture and --data.phases give other weights than the {step} steps that are done had; "
            f"keep those, and let what is new begin by --data.phases from step {step} on (a new dataset has weight 0 "
            "before)"
        )


def restore(run: Run, path: Path) -> None:
    """Load a checkpoint's tensors and counters. Raises ValueError, on every rank, if it is damaged or does not fit."""
    meta = load_state(path, run.tensors())
    run.step = int(meta["step"])
    run.skipped.fill_(meta["skipped"])
    run.skipped_in_row.fill_(meta.get("skipped_in_row", 0))
    run.tokens.fill_(meta["tokens"])
    run.unfinished = meta.get("unfinished_row")
    run.skips = list(meta.get("skips", []))
    run.spikes = SpikeDetector(run.args.guard, meta.get("spikes"))
    if run.loss_scale is not None and meta["loss_scale"] is not None:
        run.loss_scale.load(meta["loss_scale"])


def go_back(run: Run, path: Path, reason: str) -> None:
    """Return to a checkpoint, and leave out the samples that were used since then. Every rank calls this."""
    end_sample, global_batch = first_sample_of_step(run.segments, run.step)
    skips = run.skips
    restore(run, path)
    first_sample, _ = first_sample_of_step(run.segments, run.step)
    skip = {"step": run.step, "first_sample": first_sample, "end_sample": end_sample, "reason": reason}
    run.skips = [*(s for s in skips if s["step"] <= run.step), skip]
    earlier = [s for s in run.segments if s.from_step < run.step]
    run.segments = [*earlier, Segment(run.step, end_sample, global_batch)]
    val = run.data.val.dataset if run.data.val is not None else None
    datasets = Datasets(run.data.train, val, run.data.block_size)
    run.data = open_data(run.args, run.fabric, datasets, run.segments)
    run.loader = training_loader(run.args, run.fabric, run.data, run.segments)
    begin_recording(run)
