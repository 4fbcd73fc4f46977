"""How a run is put together, from its arguments to the state before its next step."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lit_data.loading.loader import bucket
from lit_data.loading.order import Segment
from lit_files.checksum import file_sha256
from lit_model.config import ModelConfig
from lit_model.init import initialise
from lit_model.load import (
    Checkpoint,
    checkpoint_step,
    list_checkpoints,
    resolve,
)
from lit_model.loss import LossOutput
from lit_model.model import GPT
from pretrain.args import DistillationArgs, RunArgs
from pretrain.checkpoint.files import (
    check_meta,
)
from pretrain.checkpoint.saving import Saver
from pretrain.compiling import compile_blocks
from pretrain.data import (
    Datasets,
    check_memory,
    first_segments,
    open_data,
    open_datasets,
    router_losses,
    training_loader,
    validation_loader,
)
from pretrain.distillation.teacher_cache import FILE as CACHE_FILE
from pretrain.distillation.teacher_cache import CachedTeacher
from pretrain.distillation.teachers import Teachers, identify
from pretrain.fabric import Fabric
from pretrain.failure.first_failure import begin_attempt
from pretrain.failure.rank_log import RankLog
from pretrain.failure.watchdog import Watchdog, control_store
from pretrain.guards import SpikeDetector
from pretrain.init_from import load_optimizer, load_weights, model_config, optimizer_of
from pretrain.launch import is_rank
from pretrain.logs.environment import command_line, record_environment
from pretrain.optim import AdamW, LossScale
from pretrain.parallel import (
    build_fabric,
    check_shapes,
    device_kind,
    uses_fsdp,
)
from pretrain.ranks import Peers, on_rank_zero
from pretrain.resume import check_resume, restore
from pretrain.run import Run
from pretrain.run_folder import begin_recording, open_folder
from pretrain.synthetic import make_synthetic_data


def set_up(args: RunArgs, argv: Sequence[str] | None = None, *, watched: bool = True) -> Run:
    """Build the run. Raises ValueError or OSError for a user's mistake: Mistake once there are several ranks, on all of
    them alike. Any other error of one of several ranks ends the process, and the others, unless they are not `watched`.

    `argv` is the command line to record; default: this process's.
    """
    devices = check_shapes(args)
    if args.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if device_kind(args) == "cuda" and args.precision != "fp32":
        torch.set_float32_matmul_precision("high")
    there = not args.data.synthetic.tokens and args.resume is None
    opened: tuple[Datasets, ModelConfig] | None = None
    if there and not is_rank():  # a mistake in what is there already is said before any process starts
        opened = open_datasets(args, None)
    if args.data.synthetic.tokens and args.resume is None:  # of its sizes before text is made
        config = model_config(args, args.data.synthetic.vocab_size)
        check_memory(args, config, args.train.block_size or config.block_size)
    fabric = build_fabric(args, devices)
    peers = Peers(watched)
    try:
        return build(args, fabric, devices, peers, opened, argv)
    except BaseException as error:
        peers.end_set_up(error)


def build(
    args: RunArgs,
    fabric: Fabric,
    devices: int,
    peers: Peers,
    opened: tuple[Datasets, ModelConfig] | None,
    argv: Sequence[str] | None,
) -> Run:
    """The run, once the ranks have met. `opened`: the data, where this process has opened it before that."""

    def open_once(checkpoint: Path | None) -> tuple[Datasets, ModelConfig]:
        return opened or open_datasets(args, checkpoint)

    if not args.data.synthetic.tokens and args.resume is None:
        opened = on_rank_zero(fabric, lambda: open_once(None))  # thousands of shards are looked at by one rank, for all
    folder, checkpoint_path, lock, trackers = open_folder(fabric, args)
    peers.folder = folder
    if args.data.synthetic.tokens:
        train, val = on_rank_zero(fabric, lambda: make_synthetic_data(args.data.synthetic, folder / "data", args.seed))
        args = dataclasses.replace(args)
        args.data = dataclasses.replace(
            args.data, train=train, val=val, synthetic=dataclasses.replace(args.data.synthetic, tokens=0)
        )
    datasets, config = opened or on_rank_zero(fabric, lambda: open_once(checkpoint_path))
    for note in datasets.notes:
        fabric.print(f"warning: {note}")
    args.out_dir, args.devices = folder, devices

    step, segments = 0, first_segments(args)
    meta: dict[str, Any] | None = None
    changes: list[dict[str, Any]] = []
    if checkpoint_path is not None:
        meta = Checkpoint(checkpoint_path).meta
        if "segments" not in meta:
            raise ValueError(f"{checkpoint_path} was imported: begin a run with --init_from instead of --resume")
        check_meta(meta, checkpoint_path)
        step = int(meta["step"])
        segments = [Segment(**s) for s in meta["segments"]]
        if segments[-1].global_batch != args.train.global_batch_samples:
            s = segments[-1]
            first = s.first_sample + (step - s.from_step) * s.global_batch
            segments.append(Segment(step, first, args.train.global_batch_samples))
    data = open_data(args, fabric, datasets, segments)
    args.optim = args.optim.resolved(data.max_steps)
    args.distillation, taught_by = on_rank_zero(fabric, lambda: settle_teachers(args.distillation))
    if checkpoint_path is not None and meta is not None:
        differences = check_resume(args, meta, data, config, taught_by, checkpoint_path)
        changes = [*meta.get("changes", []), *([{"step": step, "differences": differences}] if differences else [])]
        if step > data.max_steps:
            raise ValueError(f"{checkpoint_path} is {step} steps old, beyond the run's {data.max_steps} steps")

    with torch.device("meta"):
        raw = GPT(
            config,
            attention=args.train.attention,
            activation_checkpointing=args.train.activation_checkpointing,
            activation_checkpointing_every=args.train.activation_checkpointing_every,
            z_loss=args.train.z_loss,
            **router_losses(args.train, config),
        )
    if not uses_fsdp(args):
        raw.to_empty(device=fabric.device)
        initialise(raw, config, args.seed)
        if args.compile:
            compile_blocks(raw)
    model = fabric.setup_module(raw, move_to_device=False)
    if args.init_from is not None and checkpoint_path is None:
        load_weights(raw, args.init_from, args.init_layers)
    optimizer = AdamW(raw.named_parameters(), args.optim)
    if args.init_optimizer and checkpoint_path is None:
        load_optimizer(optimizer, optimizer_of(args))
    loss_scale = LossScale.create(fabric.device) if args.precision == "fp16" else None

    zero = torch.zeros((), device=fabric.device)
    saver = Saver(folder, args.save, fabric.device, timeout=timedelta(seconds=args.timeout_s))
    run = Run(
        args=args,
        fabric=fabric,
        folder=folder,
        config=config,
        data=data,
        raw_model=raw,
        model=model,
        optimizer=optimizer,
        loss_scale=loss_scale,
        loader=training_loader(args, fabric, data, segments),
        val_loader=validation_loader(args, fabric, data),
        segments=segments,
        recorder=None,
        compactor=None,
        saver=saver,
        spikes=SpikeDetector(args.guard),
        lock=lock,
        trackers=trackers,
        taught_by=taught_by,
        peers=peers,
        step=step,
        changes=changes,
        skipped=zero.clone(),
        skipped_in_row=zero.clone(),
        tokens=zero.double(),
    )
    if checkpoint_path is not None and meta is not None:
        run.finished = step == data.max_steps and checkpoint_step(list_checkpoints(folder)[-1]) == step
        run.finished &= meta.get("unfinished_row") is None
    if not run.finished:
        run.teachers = open_teachers(args, fabric.device)
        run.watchdog = peers.watchdog = open_watchdog(run)
    if not run.finished and run.world_size > 2 and not uses_fsdp(args):
        settle_buckets(run)
    if checkpoint_path is not None:
        restore(run, checkpoint_path)
    if not run.finished:
        begin_recording(run)
        assert run.watchdog is not None
        record_environment(run.folder, run.watchdog.log.attempt, run.step, command_line(argv), run.device)
    return run


def settle_teachers(args: DistillationArgs) -> tuple[DistillationArgs, list[dict[str, Any]]]:
    """The same with checkpoints in place of runs, which may be saving new ones; and what `identify` says of them.

    A cache, which says itself who made it, stands for its teachers.
    """
    if args.cache is not None:
        return args, [{"name": args.cache.name, "sha256": file_sha256(args.cache / CACHE_FILE), "weight": 1.0}]
    entries = [dataclasses.replace(entry, path=resolve(entry.path)) for entry in args.teachers]
    return dataclasses.replace(args, teachers=entries), identify(entries)


def open_teachers(args: RunArgs, device: torch.device) -> Teachers | CachedTeacher | None:
    """Whoever teaches, if anyone does."""
    if args.distillation.cache is not None:
        return CachedTeacher(args.distillation.cache, device)
    return Teachers(args.distillation, args.precision, device) if args.distillation.teachers else None


def open_watchdog(run: Run) -> Watchdog:
    """Each rank's log, and what ends a run that hangs."""
    fabric = run.fabric
    attempt = on_rank_zero(fabric, lambda: begin_attempt(run.folder))
    log = RankLog(run.folder, fabric.global_rank, fabric.world_size, attempt)
    # A rank that died over its log is missed here at once; a connection to its store would be tried for minutes.
    fabric.barrier()
    store, timeout_s = control_store(attempt), run.args.guard.hang_timeout_s
    return Watchdog(store, fabric.global_rank, fabric.world_size, log, timeout_s)


def settle_buckets(run: Run) -> None:
    """Have DDP lay out its buckets of gradients for good, by a backward that counts for nothing.

    After its first backward DDP lays them out anew, in the order in which gradients came. Where in a bucket a gradient
    lies decides in which order more than two ranks add it up: the first step after a resume would differ, by rounding,
    from the same step of a run that was never stopped.
    """
    B, T = run.args.train.micro_batch_samples, run.data.block_size
    tokens = torch.zeros((B, T), dtype=torch.int64, device=run.device)
    cu_seqlens = None
    if run.args.data.document_mask:  # in a shape that steps have too, for the sake of compiled blocks
        size = int(bucket(np.asarray([B]))[0])
        cu_seqlens = torch.arange(size, dtype=torch.int32, device=run.device).clamp_(max=B) * T
    run.model.train()
    with run.autocast():
        out: LossOutput = run.model(tokens, tokens, cu_seqlens=cu_seqlens)
    run.fabric.backward(out.loss_sum)
    run.optimizer.zero_grad()
