"""Builds a run from its arguments, up to the state before its next step."""

from __future__ import annotations

import dataclasses
import importlib
import os
import shutil
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from lit_data.loading.batches import bucket
from lit_data.loading.words import DatasetWords
from lit_files.parquet import leave_pandas_out
from lit_files.run_files import METRICS
from lit_model.bf16 import use_float32_products
from lit_model.config import ModelConfig
from lit_model.float8 import ALIGNMENT, use_float8
from lit_model.init import allocate, initialise
from lit_model.loss import LossOutput
from lit_model.model import GPT
from pretrain.args import AUTO, OptimArgs, RunArgs, plain
from pretrain.checkpoint.saver import Saver
from pretrain.compiling import compile_blocks
from pretrain.data import (
    Data,
    Datasets,
    open_before_launch,
    open_data,
    open_datasets,
    router_losses,
    training_loader,
    validation_loader,
)
from pretrain.distillation.teacher_cache import open_teachers, resolve_teachers
from pretrain.endings import RunFinished
from pretrain.evaluation_plan import open_evaluation
from pretrain.exact_sums import ExactSums
from pretrain.fabric import Fabric
from pretrain.failure.first_failure import begin_attempt
from pretrain.failure.peers import Peers, on_rank_zero
from pretrain.failure.rank_log import RankLog
from pretrain.failure.watchdog import Watchdog, control_store
from pretrain.free_memory import resident_bytes
from pretrain.guards import StopRequest
from pretrain.init_from import load_optimizer, load_weights, optimizer_of
from pretrain.logs.environment import command_line, record_environment
from pretrain.logs.metrics import has_row
from pretrain.memory_fit import Trial, fit_to_memory
from pretrain.muon import Muon
from pretrain.optim import AdamW, LossScale, Optimizer
from pretrain.parallel import Placement, build_fabric, choose_placement, float8_fault
from pretrain.planning.expectation import expectation
from pretrain.resume import check_resume, is_finished, read_meta, restore, start_progress
from pretrain.run import Progress, Run
from pretrain.run_folder import begin_recording, metrics_columns, open_folder
from pretrain.stop_signals import StopSignals
from pretrain.synthetic import make_synthetic_data
from pretrain.trial_args import as_new_run
from pretrain.word_budgets import WordBudgets, count_words, plan_budgets

TRIALS = ".memory_trials"
"""Folder in the run folder, while `auto` settings are measured."""


def set_up(
    args: RunArgs,
    argv: Sequence[str] | None = None,
    signals: StopSignals | None = None,
    *,
    watched: bool = True,
    trial: Trial | None = None,
) -> Run:
    """Put a run together, up to the state before its next step.

    Args:
        argv: the command line to record. None: this process's.
        signals: handlers of the signals that stop the run. None: no signal does.
        watched: an error of one of several ranks ends the others too.
        trial: measures the memory of automatic settings. None: it is estimated.

    Raises ValueError or OSError for a user's mistake: Mistake once there are several ranks, on all of them alike.
    Raises RunFinished if there is nothing left to do. Any other error of one of several ranks ends its process.
    """
    leave_pandas_out()
    placement = choose_placement(args)
    args = dataclasses.replace(args, devices=placement.devices)
    set_arithmetic(args.train.only_deterministic, placement)
    opened = open_before_launch(args, placement.kind)
    fabric = build_fabric(args, placement)
    peers = Peers(watched)
    try:
        return build(args, placement, fabric, peers, opened, signals, argv, trial)
    except BaseException as error:
        if peers.lock is not None:
            peers.lock.close()
        if isinstance(error, RunFinished):
            peers.meet()
            raise
        peers.end_set_up(error)


def set_arithmetic(deterministic: bool, placement: Placement) -> None:
    """Set torch's switches for deterministic algorithms and for TF32."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # As torch.use_deterministic_algorithms, without importing torch.compile's machinery: see compile_blocks.
        torch.set_deterministic_debug_mode("error")
    if placement.kind == "cuda" and placement.dtype != torch.float32:
        torch.set_float32_matmul_precision("high")


def build(
    args: RunArgs,
    placement: Placement,
    fabric: Fabric,
    peers: Peers,
    opened: tuple[Datasets, ModelConfig] | None,
    signals: StopSignals | None,
    argv: Sequence[str] | None,
    trial: Trial | None,
) -> Run:
    """Put the run together, once the ranks have met. `opened`: the data, if this process has opened it already."""
    if fabric.world_size > 1 or placement.fsdp:
        importlib.import_module("torch._dynamo")  # by DDP and FSDP: 75 MiB of the process, not of what it trains
    device, resident = fabric.device, resident_bytes()
    if (fault := float8_fault(args.precision, device)) is not None:
        raise ValueError(f"{fault}; use --precision bf16")
    if not args.data.synthetic.tokens and args.resume is None:
        # Rank 0 alone looks at the shards, which may be thousands, before it makes the run folder.
        opened = on_rank_zero(fabric, lambda: opened or open_datasets(args, placement.kind))
    folder, checkpoint, lock, trackers = open_folder(fabric, args, plain(args))
    peers.folder, peers.lock = folder, lock
    args = with_synthetic_data(args, fabric, folder)
    datasets, config = opened or on_rank_zero(fabric, lambda: open_datasets(args, placement.kind, checkpoint))
    for note in datasets.notes:
        fabric.print(f"warning: {note}")

    meta = read_meta(checkpoint) if checkpoint is not None else None
    if args.train.is_automatic:
        args = with_fitting_memory(args, fabric, folder, config, datasets.block_size, checkpoint, meta, trial)
    progress = start_progress(meta, args, device)
    data = open_data(args, fabric, datasets, progress.segments)
    if checkpoint is None and args.profile.steps and args.profile.needed_steps > data.max_steps:
        raise ValueError(
            f"--profile.steps {args.profile.steps} after --profile.start {args.profile.start} needs "
            f"{args.profile.needed_steps} steps; the run has {data.max_steps}"
        )
    teacher_paths, taught_by = on_rank_zero(fabric, lambda: resolve_teachers(args.distillation))
    args = args.resolved(folder, data.max_steps, teacher_paths)
    settings = plain(args)
    if checkpoint is not None and meta is not None:
        differences = check_resume(settings, meta, data, config, taught_by, checkpoint)
        threads = meta.get("threads")
        if args.train.topology_invariant and placement.kind == "cpu" and threads != torch.get_num_threads():
            raise ValueError(
                f"{checkpoint} was computed with {threads} threads, this process has {torch.get_num_threads()}, which "
                f"changes the bits: set OMP_NUM_THREADS={threads}"
            )
        if differences:
            progress.changes.append({"step": progress.step, "differences": differences})
        if progress.step > data.max_steps:
            raise ValueError(
                f"{checkpoint} is at step {progress.step}, past the end of the run ({data.max_steps} steps)"
            )
        if progress.unfinished is not None and on_rank_zero(fabric, lambda: has_row(folder / METRICS, progress.step)):
            progress.unfinished = None
        if is_finished(folder, progress, data.max_steps):
            raise RunFinished(folder, data.max_steps)

    evaluation = on_rank_zero(
        fabric, lambda: open_evaluation(args.eval, data.train[0], config.vocab_size, data.block_size)
    )
    raw_model, model = build_model(args, placement, fabric, config)
    if args.init_from is not None and checkpoint is None:
        load_weights(raw_model, args.init_from, args.init_layers)
    optimizer = build_optimizer(args.optim, raw_model, whole_vectors=args.train.topology_invariant)
    if args.init_optimizer and checkpoint is None:
        load_optimizer(optimizer, optimizer_of(args, config))
    loss_scale = LossScale.create(device) if args.precision == "fp16" else None
    val_loaders = {name: validation_loader(args, fabric, data, rows) for name, rows in data.val.items()}
    saver = Saver(folder, args.save, device, timeout=timedelta(seconds=args.timeout_s))
    teachers = open_teachers(args.distillation, args.precision, device)
    loader = training_loader(args, fabric, data, progress.segments, teachers)
    watchdog = peers.watchdog = open_watchdog(fabric, folder, args.guard.hang_timeout_s)
    if fabric.world_size > 2 and not placement.fsdp and not args.train.topology_invariant:
        fix_ddp_buckets(args, placement, fabric, model, optimizer, data.block_size)
    sums = ExactSums(raw_model, optimizer.parameters.values(), device) if args.train.topology_invariant else None
    if checkpoint is not None:
        restore(checkpoint, optimizer, loss_scale, sums)
    words, plan = open_words(args, fabric, data, progress, folder, saver)
    columns = metrics_columns(args, config, data, evaluation)
    recorder, compactor, trackers = begin_recording(args, settings, fabric, folder, data, progress, columns, trackers)
    if compactor is not None:
        saver.published = compactor.start
    plan_record = {}
    if fabric.global_rank == 0:
        plan_record = expectation(args, config, data.train, data.block_size, data.max_steps, device, fabric.world_size)
        plan_record["resident_bytes"] = resident
    record_environment(folder, watchdog.log.attempt, progress.step, command_line(argv), device, plan_record)
    return Run(
        **vars(progress),
        args=args,
        settings=settings,
        placement=placement,
        fabric=fabric,
        folder=folder,
        config=config,
        data=data,
        raw_model=raw_model,
        model=model,
        optimizer=optimizer,
        loss_scale=loss_scale,
        sums=sums,
        teachers=teachers,
        taught_by=taught_by,
        loader=loader,
        val_loaders=val_loaders,
        words=words,
        budgets=plan.at,
        evaluated_steps=plan.evaluated,
        saver=saver,
        recorder=recorder,
        compactor=compactor,
        trackers=trackers,
        stop=StopRequest(device, signals, args.stop.after_minutes),
        watchdog=watchdog,
        peers=peers,
        metrics_columns=columns,
        lock=lock,
        evaluation=evaluation,
    )


def open_words(
    args: RunArgs, fabric: Fabric, data: Data, progress: Progress, folder: Path, saver: Saver
) -> tuple[list[DatasetWords], WordBudgets]:
    """The words of the datasets (on rank 0), and the word budgets, whose checkpoints `saver` keeps."""
    words: list[DatasetWords] = []

    def work() -> WordBudgets:
        words.extend(count_words(args, data))
        return plan_budgets(args, data, progress, words, folder)

    plan = on_rank_zero(fabric, work)
    for note in plan.notes:
        fabric.print(f"warning: {note}")
    saver.kept = plan.kept
    return words, plan


def with_synthetic_data(args: RunArgs, fabric: Fabric, folder: Path) -> RunArgs:
    """The settings with synthetic data made in the run folder, if they ask for it, as packed datasets."""
    if not args.data.synthetic.tokens:
        return args
    train, val = on_rank_zero(fabric, lambda: make_synthetic_data(args.data.synthetic, folder / "data", args.seed))
    made = dataclasses.replace(args.data.synthetic, tokens=0)
    return dataclasses.replace(args, data=dataclasses.replace(args.data, train=train, val=val, synthetic=made))


def with_fitting_memory(
    args: RunArgs,
    fabric: Fabric,
    folder: Path,
    config: ModelConfig,
    block_size: int,
    checkpoint: Path | None,
    meta: dict[str, Any] | None,
    trial: Trial | None,
) -> RunArgs:
    """The settings with automatic ones replaced. Trials run in a folder of the run folder, which is removed."""
    trials = folder / TRIALS
    on_rank_zero(fabric, lambda: shutil.rmtree(trials, ignore_errors=True))

    def gather(value: Any) -> list[Any]:
        values = [value] * fabric.world_size
        if fabric.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def attempt(tried: RunArgs) -> int:
        assert trial is not None
        t = tried.train
        name = f"{t.micro_batch}-{t.activation_checkpointing}-{t.activation_checkpointing_blocks}"
        return trial(as_new_run(tried, trials / name, checkpoint))

    kept = None if meta is None else meta["config"]["train"]
    measured = attempt if trial is not None else None
    try:
        args, line = fit_to_memory(args, config, block_size, fabric.device, gather, kept=kept, trial=measured)
    finally:
        if fabric.global_rank == 0:
            shutil.rmtree(trials, ignore_errors=True)
    if line is not None:
        fabric.print(f"memory   {line}")
    return args


def build_model(
    args: RunArgs, placement: Placement, fabric: Fabric, config: ModelConfig
) -> tuple[GPT, torch.nn.Module]:
    """The initialised model, and the same as Fabric wraps it. FSDP initialises it after sharding."""
    recompute = args.train.activation_checkpointing
    assert recompute != AUTO, "activation_checkpointing auto must be resolved first"
    with torch.device("meta"):
        raw_model = GPT(
            config,
            attention=args.train.attention,
            activation_checkpointing=recompute,
            activation_checkpointing_every=args.train.activation_checkpointing_every,
            activation_checkpointing_blocks=args.train.activation_checkpointing_blocks,
            z_loss=args.train.z_loss,
            loss_kernel=args.train.loss_kernel,
            **router_losses(args.train, config),
        )
    if args.precision == "fp8":
        convert_to_float8(raw_model, args, config)
    use_float32_products(raw_model.blocks(), fabric.device, placement.dtype)
    if not placement.fsdp:
        allocate(raw_model, fabric.device)
        initialise(raw_model, config, args.seed)
        if args.compile:
            compile_blocks(raw_model)
    return raw_model, fabric.setup_module(raw_model, move_to_device=False)


def build_optimizer(args: OptimArgs, model: GPT, *, whole_vectors: bool = False) -> Optimizer:
    """The optimizer that --optim.name selects, of a model on its final device. `whole_vectors`: see AdamW."""
    if args.name == "muon":
        return Muon(model.named_parameters(), args, model.config)
    return AdamW(model.named_parameters(), args, whole_vectors=whole_vectors)


def convert_to_float8(model: GPT, args: RunArgs, config: ModelConfig) -> None:
    """Raises ValueError if no layer can be converted, or for a number of tokens that float8 products do not take."""
    rows, tokens = args.train.micro_batch, args.train.block_size or config.block_size
    if rows * tokens % ALIGNMENT:
        raise ValueError(
            f"--precision fp8: a micro-batch of {rows} rows of {tokens} tokens is not a multiple of {ALIGNMENT}; "
            "change --train.micro_batch_samples or --train.block_size"
        )
    if not use_float8(list(model.blocks()), args.train.fp8_keep_ends):
        ends = " between the first and the last block" if args.train.fp8_keep_ends else ""
        raise ValueError(
            f"--precision fp8: no linear layer{ends} has sizes that are multiples of {ALIGNMENT}; use --precision bf16"
        )


def open_watchdog(fabric: Fabric, folder: Path, timeout_s: float) -> Watchdog:
    """Open each rank's log, and start the watchdog that ends a hung run."""
    attempt = on_rank_zero(fabric, lambda: begin_attempt(folder))
    log = RankLog(folder, fabric.global_rank, fabric.world_size, attempt)
    # The barrier notices at once a rank that died over its log; connecting to its store would be tried for minutes.
    fabric.barrier()
    return Watchdog(control_store(attempt), fabric.global_rank, fabric.world_size, log, timeout_s)


def fix_ddp_buckets(
    args: RunArgs, placement: Placement, fabric: Fabric, model: torch.nn.Module, optimizer: Optimizer, block_size: int
) -> None:
    """Run one dummy backward so that DDP fixes its bucket order.

    DDP rebuilds its gradient buckets after the first backward, in the order in which gradients came. The place in a
    bucket decides in which order more than two ranks add a gradient up: without this the first step after a resume
    would differ, by rounding, from the same step of an uninterrupted run.
    """
    B, T = args.train.micro_batch, block_size
    tokens = torch.zeros((B, T), dtype=torch.int64, device=fabric.device)
    cu_seqlens = None
    if args.data.document_mask:  # of a shape that steps have too, so that blocks are compiled once
        size = int(bucket(np.asarray([B]))[0])
        cu_seqlens = torch.arange(size, dtype=torch.int32, device=fabric.device).clamp_(max=B) * T
    model.train()
    with placement.autocast():
        out: LossOutput = model(tokens, tokens, cu_seqlens=cu_seqlens)
    fabric.backward(out.loss_sum)
    optimizer.zero_grad()
