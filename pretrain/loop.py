"""The training loop: `fit` is the outline, `train_step` one optimizer step, `validate` a full validation.

Dimensions: B rows in a micro-batch, T tokens in a row, P pieces of a micro-batch (padded, see
lit_data/loading/batches.py).
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from lit_data.loading.batches import MicroBatch, StepData
from lit_data.loading.loader import Loader
from lit_data.loading.order import first_sample_of_step
from lit_data.loading.rows import Rows
from lit_eval.model.text_encoding import encoding_facts
from lit_files.checkpoint_name import checkpoint_name, checkpoint_step, list_checkpoints
from lit_files.run_files import LAYERS, METRICS
from lit_model.device import sums_device, to_float64
from lit_model.distillation import DistillationHead
from lit_model.loss import LossOutput
from lit_model.model import GPT
from lit_model.moe import RouterStatistics
from pretrain.checkpoint.commit import SaveError
from pretrain.checkpoint.host_copy import copy_without_waiting
from pretrain.compiling import CompiledBlocks
from pretrain.distillation.objective import distillation_values, student_head
from pretrain.distillation.teachers import Teachers
from pretrain.endings import AgreedError, Mistake
from pretrain.evaluation import Stopped, evaluate
from pretrain.evaluation_plan import is_due
from pretrain.exact_sums import norm_by_rows, summand, summands
from pretrain.failure.peers import on_rank_zero
from pretrain.guards import check_progress, skip_if_not_finite
from pretrain.logs.layer_norms import LayerNorms
from pretrain.logs.metrics import ROUTER_COLUMNS, MetricsFile, router_values, validation_values
from pretrain.logs.progress import ProgressDisplay
from pretrain.logs.throughput import Throughput
from pretrain.optim import clip_coefficient, gradient_norm
from pretrain.resume import go_back
from pretrain.run import Run
from pretrain.schedule import learning_rate
from pretrain.step_profile import StepProfiler
from pretrain.word_budgets import words_seen

HeadOfBatch = Callable[[MicroBatch, Tensor, Tensor | None], DistillationHead]
SpanLosses = Callable[[], tuple[list[npt.NDArray[np.float64]], bool]]


@dataclass
class StepResult:
    """Results of one step, still on the device.

    Attributes:
        loss_sum: this rank's summed loss, float64 scalar.
        n_targets: targets of the step over all ranks.
        grad_norm: global norm before clipping, float32 scalar.
        span_losses: returns the losses of the pieces; called in the record's thread.
        router: this rank's sums over its micro-batches, float64; None for a model without experts.
        divergence_sum: this rank's divergence from the teachers, float64 scalar; None if no teachers were used.
    """

    loss_sum: Tensor
    n_targets: Tensor
    grad_norm: Tensor
    span_losses: SpanLosses
    router: RouterStatistics | None
    divergence_sum: Tensor | None


class RollBack(Exception):
    """Roll back to a checkpoint after a loss spike. Every rank raises it at the same step."""

    def __init__(self, checkpoint: Path, reason: str) -> None:
        super().__init__(reason)
        self.checkpoint, self.reason = checkpoint, reason


def fit(run: Run) -> str | None:
    """Train to the end of the run. Returns why it stopped early: a signal's name or stop.after_minutes; else None.

    Raises AgreedError, Mistake or SaveError on every rank at the same step if the run cannot continue. Any other
    exception comes from one rank, or from all ranks; in the latter case the state, if valid, has been saved.
    """
    try:
        while True:
            try:
                return run_steps(run)
            except RollBack as back:
                run.say(f"{back.reason}: rolling back to {back.checkpoint.name} and skipping the samples since")
                go_back(run, back.checkpoint, back.reason)
    finally:
        run.stop_writing()


def run_steps(run: Run) -> str | None:
    """Train from `run.step` to the end, or to a signal, a fault or a loss spike."""
    args, max_steps = run.args, run.data.max_steps
    rank_zero = run.fabric.global_rank == 0
    metrics = MetricsFile(run.folder / METRICS, run.metrics_columns) if rank_zero else None
    norms = LayerNorms(run.raw_model, run.optimizer.parameters, run.device) if args.log.layers else None
    layers = MetricsFile(run.folder / LAYERS, ["step", *norms.columns]) if rank_zero and norms is not None else None
    throughput = Throughput(run.config, run.data.block_size, run.device, run.world_size)
    slots = args.train.global_batch_samples * run.data.block_size
    progress = ProgressDisplay(run.step, max_steps, slots, show=rank_zero)
    stopped = None
    profiler = open_profiler(run)
    steps = run.loader.steps(run.step, max_steps)
    try:
        if run.step == 0 or run.unfinished is not None:
            row = run.unfinished or {"tokens": 0, **words_column(run)}
            if is_validated(run, run.step) and not any(name.startswith("val_") for name in row):
                row = with_validation(run, row, throughput, progress)
            if row and is_evaluated(run, run.step):
                row = with_evaluation(run, row, throughput, progress)
            if row:
                publish_row(run, metrics, progress, {"step": run.step} | row)
            if run.stop.reason is not None:
                save(run, throughput)
                run.saver.wait()
                return run.stop.reason
        compiled = compiled_blocks(run)
        if compiled is not None:
            progress.phase("compiling")
        for data in steps:
            run.beat("step")
            last = run.step + 1 == max_steps
            evaluated = is_evaluated(run, run.step + 1)
            log_step = last or evaluated or (run.step + 1) % args.log.every_steps == 0
            result = train_step(run, data, norms if log_step else None)
            run.step += 1
            progress.step = run.step  # of what follows: validating, saving
            if run.recorder is not None:
                run.recorder.add(data, result.span_losses)
            run.sound = True
            if compiled is not None:
                progress.say(compiled.describe())
                compiled = None
            throughput.add(slots)
            row = measure(run, result, throughput) if log_step else {}
            whole = row
            if is_validated(run, run.step):
                whole = with_validation(run, row, throughput, progress)
            spike = after_spike(run, row) if log_step else None
            saved = False
            if whole and evaluated and spike is None:
                if is_saved(run):
                    run.unfinished, saved = whole, True
                    progress.phase("saving")
                    save(run, throughput)
                whole = with_evaluation(run, whole, throughput, progress)
            by_layer = norms.read() if norms is not None and log_step else {}
            if by_layer and layers is not None:
                layers.write({"step": run.step} | by_layer)
            if whole:
                publish_row(run, metrics, progress, {"step": run.step} | whole, by_layer)
            stopped, failed = run.stop.agreed()
            if failed:
                raise_fault(run)
            if spike is not None:
                raise spike
            if not saved and (stopped or is_saved(run)):
                progress.phase("saving")
                save(run, throughput)
            progress.advance(run.step)
            if profiler is not None:
                add_to_profile(run, profiler, throughput, progress)
            if stopped:
                break
        run.saver.wait()
    except AgreedError as error:
        if error.sound:
            save(run, throughput)
            run.saver.wait()
        raise
    except (Exception, KeyboardInterrupt) as error:
        agreed = isinstance(error, (SaveError, Mistake, RollBack))
        if not agreed and may_save(run) and run.peers.all_reach(error, run.step):
            save_before_the_end(run, throughput)
        raise
    finally:
        steps.close()  # type: ignore[attr-defined]
        progress.close()
        if profiler is not None:
            profiler.close()
        for file in (metrics, layers):
            if file is not None:
                file.close()
    return None if run.step == max_steps and run.unfinished is None else stopped


def train_step(run: Run, data: StepData, norms: LayerNorms | None = None) -> StepResult:
    """One optimizer step: forward and backward of each micro-batch, clipping, update. No host sync, except with exact
    sums (`ExactSums.finish`).

    The loss is the mean over the targets of the global batch: each micro-batch backpropagates
    loss_sum * world_size / n_targets, since DDP and FSDP2 average gradients over the ranks; exact sums do not.
    """
    args = run.args
    run.model.train()
    numbers = (float(data.n_targets), float(data.n_inputs), *run.stop.flags(failed=run.fault() is not None))
    device = sums_device(run.device)
    counts = torch.stack([torch.full((), n, dtype=torch.float64, device=device) for n in numbers])
    sum_over_ranks(run, counts)
    run.stop.summed(counts[2:])
    n_targets = counts[0]
    factor = ((1 if run.sums is not None else run.world_size) / n_targets.clamp(min=1)).float().to(run.device)
    if run.loss_scale is not None:
        factor = factor * run.loss_scale.scale

    head_of = student_head(run, data.step, n_targets)
    passes = forward_and_backward(run, data, factor, head_of, norms)
    while run.sums is not None and not run.sums.finish():
        run.say(f"step {run.step + 1}: its gradients did not fit the grid of the exact sums; it is computed again")
        passes = forward_and_backward(run, data, factor, head_of, norms)

    scale = None if run.loss_scale is None else run.loss_scale.scale
    if norms is not None:
        norms.gradients(scale)
        norms.before_update()
    with record_function("llammlein::optimizer"):
        gradients = run.optimizer.parameters.values()
        norm = gradient_norm(gradients, scale) if run.sums is None else norm_by_rows(gradients)
    skip = skip_if_not_finite(norm)
    run.sound = False
    if run.sums is not None:
        run.sums.keep_peak()
    run.tokens += counts[1]
    lr = learning_rate(args.optim, data.step, run.data.max_steps)
    with record_function("llammlein::optimizer"):
        run.optimizer.step(lr, skip, clip_coefficient(norm, args.train.clip_norm, scale))
    if norms is not None:
        norms.after_update()
    run.optimizer.zero_grad()
    norm, skip = norm.to(run.device), skip.to(run.device)  # from the host under CPU offload
    if run.loss_scale is not None:
        run.loss_scale.update(skip)
    run.skipped += skip
    run.skipped_in_row.add_(1.0).mul_(skip)
    span_losses = read_later(passes.piece_losses, skip)
    return StepResult(passes.loss_sum, n_targets, norm, span_losses, add_routers(passes.routers), passes.divergence_sum)


class Passes(NamedTuple):
    """Results of the forward and backward passes of a step on this rank; see StepResult."""

    loss_sum: Tensor
    divergence_sum: Tensor | None
    piece_losses: list[Tensor]
    routers: list[RouterStatistics]


def forward_and_backward(
    run: Run, data: StepData, factor: Tensor, head_of: HeadOfBatch | None, norms: LayerNorms | None
) -> Passes:
    """Forward and backward of each micro-batch of a step, whose losses are multiplied by `factor`, float32 scalar."""
    args, sums = run.args, run.sums
    has_dropout = bool(run.config.dropout or run.config.attention_dropout)
    loss_sum = torch.zeros((), dtype=torch.float64, device=sums_device(run.device))
    divergence_sum = None if head_of is None else torch.zeros_like(loss_sum)
    piece_losses: list[Tensor] = []
    routers: list[RouterStatistics] = []
    if norms is not None:
        norms.begin()
    if sums is not None:
        sums.begin(len(data.micro_batches) * run.world_size)
    elif has_dropout:
        seed_step(args.seed, data.step, run.fabric.global_rank)
    for m, batch in enumerate(data.micro_batches):
        if sums is not None:
            sums.begin_leaf()
            if has_dropout:  # of the leaf, whichever rank computes it
                seed_step(args.seed, data.step, m * run.world_size + run.fabric.global_rank)
        last = m == len(data.micro_batches) - 1
        with sync_gradients(run, last):
            with record_function("llammlein::to_device"):
                tokens, targets, cu_seqlens = to_device(batch, run.device)
            bounds = cu_seqlens if args.data.document_mask else None
            head = None
            if head_of is not None:
                with record_function("llammlein::teachers"):
                    head = head_of(batch, tokens, bounds)
            with run.placement.autocast():
                out: LossOutput = run.model(tokens, targets, cu_seqlens=bounds, head=head)
            # A non-finite loss makes every gradient non-finite on every rank, so the step is skipped.
            run.fabric.backward(out.loss_sum * (factor + 0 * out.loss_sum.detach()))
        loss_sum += summand(out.cross_entropy_sum, sums)
        with record_function("llammlein::loss"):
            piece_losses.append(sum_over_pieces(out.token_losses, cu_seqlens))
        if out.router is not None:
            routers.append(summands(out.router, sums))
        if divergence_sum is not None and out.divergence_sum is not None:
            divergence_sum += summand(out.divergence_sum, sums)
    return Passes(loss_sum, divergence_sum, piece_losses, routers)


def open_profiler(run: Run) -> StepProfiler | None:
    """The profiler of --profile.steps, on rank 0; None if there is none, or too few steps are left for it."""
    args = run.args.profile
    if not args.steps or run.fabric.global_rank != 0:
        return None
    if run.step + args.needed_steps > run.data.max_steps:
        left = run.data.max_steps - run.step
        run.say(
            f"warning: no profile: --profile.steps {args.steps} needs {args.needed_steps} steps, but {left} are left"
        )
        return None
    return StepProfiler(args, run.folder, run.device)


def add_to_profile(run: Run, profiler: StepProfiler, throughput: Throughput, progress: ProgressDisplay) -> None:
    """End a step of the profiler, and print the table after the last one."""
    paused = throughput.pause()
    table = profiler.after_step(run.step)
    throughput.resume(paused)
    if table is not None:
        progress.say(table)


def compiled_blocks(run: Run) -> CompiledBlocks | None:
    """The counter of compiled blocks; None if nothing is compiled."""
    models: dict[str, Sequence[GPT]] = {}
    if run.args.compile:
        models["model"] = [run.raw_model]
    if isinstance(run.teachers, Teachers) and run.args.distillation.compile_teachers:
        models["teachers"] = run.teachers.models
    return CompiledBlocks(models) if models else None


def sync_gradients(run: Run, last: bool) -> AbstractContextManager[Any]:
    """Set whether this micro-batch's backward reduces gradients over the ranks."""
    if run.placement.fsdp:
        run.raw_model.set_requires_gradient_sync(last or not run.args.train.defer_gradient_sync)  # type: ignore[operator]
        return nullcontext()
    if run.world_size > 1:
        return run.fabric.no_backward_sync(run.model, enabled=not last or run.sums is not None)
    return nullcontext()


def sum_over_ranks(run: Run, *tensors: Tensor) -> None:
    """Replace each tensor by its sum over the ranks."""
    for tensor in tensors if run.world_size > 1 else ():
        dist.all_reduce(tensor)


def to_device(batch: MicroBatch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and targets int64 [B, T] and piece boundaries int32 [P + 1] on the device; non-blocking copies."""
    return (
        batch.tokens.to(device, non_blocking=True),
        batch.targets.to(device, non_blocking=True),
        batch.cu_seqlens.to(device, non_blocking=True),
    )


def sum_over_pieces(token_losses: Tensor, cu_seqlens: Tensor) -> Tensor:
    """float32 [B, T] and boundaries int32 [P + 1] -> float64 [P]: per-piece sums in a deterministic order."""
    losses = to_float64(token_losses.reshape(-1))
    lengths = cu_seqlens.to(losses.device).diff().to(torch.int64)
    return torch.segment_reduce(losses, "sum", lengths=lengths, unsafe=True, initial=0.0)


def add_routers(routers: list[RouterStatistics]) -> RouterStatistics | None:
    """Router statistics summed over a step's micro-batches, float64; None without experts."""
    if not routers:
        return None
    return RouterStatistics(*(to_float64(torch.stack(values)).sum(0) for values in zip(*routers, strict=True)))


def read_later(piece_losses: list[Tensor], skip: Tensor) -> SpanLosses:
    """Start copying to the host; the returned function waits for the copies (in the record's thread)."""
    sizes = [len(p) for p in piece_losses]
    host, wait = copy_without_waiting(torch.cat([*piece_losses, to_float64(skip).reshape(1)]))

    def read() -> tuple[list[npt.NDArray[np.float64]], bool]:
        wait()
        values = host.numpy()
        parts = np.split(values[:-1], np.cumsum(sizes)[:-1])
        return list(parts), bool(values[-1] == 0)

    return read


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed dropout from (seed, step, rank), so that a step is reproducible wherever the run was interrupted."""
    digest = hashlib.sha256(f"step:{seed}:{step}:{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def measure(run: Run, result: StepResult, throughput: Throughput) -> dict[str, float]:
    """Read the metrics of a log step: the only host sync in `log.every_steps` steps."""
    total = result.loss_sum.clone()
    sum_over_ranks(run, total, *(result.router or ()))
    loss = total / result.n_targets.clamp(min=1)
    values = [loss, result.grad_norm, run.skipped, run.skipped_in_row, run.tokens]
    values += router_values(result.router) if result.router is not None else ()
    if result.divergence_sum is not None:
        divergence = result.divergence_sum.clone()
        sum_over_ranks(run, divergence)
        values += [divergence / result.n_targets.clamp(min=1), result.n_targets]
    train_loss, grad_norm, skipped, in_row, tokens, *more = torch.stack([to_float64(v) for v in values]).tolist()
    before = last_checkpoint_name(run, int(in_row))
    check_progress(int(in_row), run.args.guard.max_skipped_steps, run.step, run.folder, before)
    first, _ = first_sample_of_step(run.segments, run.step)
    row: dict[str, float] = {
        "tokens": int(tokens),
        **words_column(run),
        **dict(epoch_columns(run, run.data.epochs(first))),
        "train_loss": train_loss,
        "lr": learning_rate(run.args.optim, run.step - 1, run.data.max_steps),
        "grad_norm": grad_norm,
        "skipped": int(skipped),
    }
    if result.router is not None:
        row |= dict(zip(ROUTER_COLUMNS, more, strict=False))
    if run.args.objective == "distillation":
        row |= distillation_values(run, train_loss, *(more[-2:] if result.divergence_sum is not None else ()))
    if run.loss_scale is not None:
        row["loss_scale"] = run.loss_scale.scale.item()
    return row | throughput.read()


def words_column(run: Run) -> dict[str, float]:
    """Words seen so far, as a metrics column; empty if unknown."""
    words = words_seen(run)
    return {} if words is None else {"words": words}


def epoch_columns(run: Run, epochs: list[float]) -> list[tuple[str, float]]:
    """Epochs so far, as metrics columns: `epoch`, and for a mixture `epoch_0`, ... by dataset index."""
    if len(epochs) == 1:
        return [("epoch", epochs[0])]
    return [(f"epoch_{d}", epoch) for d, epoch in enumerate(epochs)]


def with_validation(
    run: Run, row: dict[str, float], throughput: Throughput, progress: ProgressDisplay
) -> dict[str, float]:
    """A metrics row with the validation columns added. Empty if a stop interrupted the validation: the row is then kept
    in the checkpoint, and a resume starts with the validation.
    """
    values = validate(run, throughput, progress)
    run.unfinished = row if values is None else None
    return {} if values is None else row | values


def is_saved(run: Run) -> bool:
    """Whether a checkpoint is due now."""
    return run.step == run.data.max_steps or run.step % run.args.save.every_steps == 0 or run.step in run.budgets


def is_validated(run: Run, step: int) -> bool:
    """Whether the validation sets are due after `step` steps."""
    return step in (0, run.data.max_steps) or step % run.args.eval.every_steps == 0


def is_evaluated(run: Run, step: int) -> bool:
    """Whether tasks and prompts are due after `step` steps."""
    if run.evaluation is None:
        return False
    if run.args.eval.tasks_every_words is not None:
        return step in (0, run.data.max_steps) or step in run.evaluated_steps
    return is_due(run.args.eval, run.segments, run.data.block_size, step, run.data.max_steps)


def with_evaluation(
    run: Run, row: dict[str, float], throughput: Throughput, progress: ProgressDisplay
) -> dict[str, float]:
    """A metrics row with the columns of evaluated tasks added. Empty if a stop interrupted the evaluation: a resume
    from this step then repeats it."""
    assert run.evaluation is not None

    def check_stop() -> bool:
        run.beat("evaluation")
        return stop_validation(run)

    paused = throughput.pause()
    run.unfinished = row
    try:
        columns = evaluate(run, run.evaluation, check_stop, progress.phase)
    except Stopped:
        progress.say(f"step {run.step}: {run.stop.reason}; the resume will repeat the evaluation")
        return {}
    finally:
        throughput.resume(paused)
    run.unfinished = None
    return row | columns


@torch.no_grad()
def validate(run: Run, throughput: Throughput, progress: ProgressDisplay) -> dict[str, float] | None:
    """The validation columns: of all sets together, and of each named one. None if the ranks have agreed to stop."""
    if not run.val_loaders:
        return {}
    paused = throughput.pause()
    run.model.eval()
    # Summed loss, targets.
    sums = torch.zeros(len(run.val_loaders), 2, dtype=torch.float64, device=sums_device(run.device))
    for total, (name, loader) in zip(sums, run.val_loaders.items(), strict=True):
        add_losses(run, loader, total, progress, f"validating {name}".rstrip())
        if run.stop.reason is not None:
            break
    sum_over_ranks(run, sums)
    throughput.resume(paused)
    if run.stop.reason is not None:
        progress.say(f"step {run.step}: {run.stop.reason}; the resume will repeat the validation")
        return None
    datasets = {name: rows.dataset for name, rows in run.data.val.items()}
    return validation_values(datasets, dict(zip(datasets, sums.tolist(), strict=True)))


def add_losses(run: Run, loader: Loader, total: Tensor, progress: ProgressDisplay, phase: str) -> None:
    """Add this rank's summed loss and its targets in a validation set to `total`, float64 [2]. Ends early at a stop."""
    assert loader.end_sample is not None
    n_steps = math.ceil(loader.end_sample / loader.segments[0].global_batch)
    for i, data in enumerate(loader.steps(0, n_steps)):
        run.beat("validation")
        if stop_validation(run):
            break
        progress.phase(phase, i, n_steps)
        for batch in data.micro_batches:
            tokens, targets, cu_seqlens = to_device(batch, run.device)
            with run.placement.autocast():
                out: LossOutput = run.model(
                    tokens, targets, cu_seqlens=cu_seqlens if run.args.data.document_mask else None
                )
            total[0] += summand(to_float64(out.token_losses).sum(), run.sums)
            total[1] += batch.n_targets


def stop_validation(run: Run) -> bool:
    """Whether the ranks have agreed to stop: a validation may take longer than the time left after a signal."""
    mine = run.stop.flags(failed=run.fault() is not None)
    flags = torch.tensor(mine, dtype=torch.float64, device=sums_device(run.device))
    sum_over_ranks(run, flags)
    run.stop.summed(flags)
    return run.stop.agreed()[0] is not None


def publish_row(
    run: Run,
    metrics: MetricsFile | None,
    progress: ProgressDisplay,
    row: dict[str, float],
    by_layer: dict[str, float] | None = None,
) -> None:
    """Write a metrics row, send it to the trackers, and display it."""
    if metrics is None:
        return
    metrics.write(row)
    if run.trackers is not None:
        run.trackers.log(row | {f"layers/{name}": value for name, value in (by_layer or {}).items()})
    progress.row(row)


def after_spike(run: Run, row: dict[str, float]) -> RollBack | AgreedError | None:
    """Check for a loss spike. Returns what to raise: RollBack, or AgreedError if the run cannot roll back; None without
    a spike, or after a warning."""
    guard = run.args.guard
    spike = run.spikes.add(run.step, row["train_loss"])
    if spike is None:
        return None
    if guard.spike_action == "warn":
        run.say(f"warning: loss spike: {spike}")
        return None
    if len(run.skips) >= guard.max_rollbacks:
        return AgreedError(
            f"loss spike: {spike}; {len(run.skips)} rollbacks did not help (--guard.max_rollbacks)", sound=False
        )
    run.saver.wait()
    before = on_rank_zero(
        run.fabric, lambda: [p for p in list_checkpoints(run.folder) if (checkpoint_step(p) or 0) <= spike.good_step]
    )
    if not before:
        return AgreedError(f"loss spike: {spike}; no earlier checkpoint to go back to", sound=False)
    return RollBack(before[-1], f"loss spike: {spike}")


def raise_fault(run: Run) -> NoReturn:
    """End the run after some ranks failed, with the same error on all ranks."""
    faults = [run.fault()]
    if run.world_size > 1:
        faults = [None] * run.world_size
        dist.all_gather_object(faults, run.fault())
    run.saver.wait()  # raises the saver's own error, on every rank
    message = "; ".join(f"rank {rank}: {fault}" for rank, fault in enumerate(faults) if fault is not None)
    raise AgreedError(message, sound=False)


def save(run: Run, throughput: Throughput) -> None:
    """Save a checkpoint, and publish the record since the last save."""
    paused = throughput.pause()
    run.beat("saving")
    finish_part = run.recorder.publish_later() if run.recorder is not None else lambda: None
    run.saver.save(run.step, run.tensors(), checkpoint_meta(run, throughput), finish_part)
    throughput.resume(paused)


def may_save(run: Run) -> bool:
    """Whether the state after `run.step` steps is consistent and can be saved without training collectives: after an
    error the ranks may be at different ones."""
    gathers = run.placement.fsdp and run.args.save.state_dict_type == "full" and run.world_size > 1
    return run.sound and not gathers and run.fault() is None


def save_before_the_end(run: Run, throughput: Throughput) -> None:
    """Save after an error raised on all ranks. If saving fails, only warn."""
    try:
        if (run.folder / checkpoint_name(run.step)).exists():
            return
        save(run, throughput)
        run.saver.wait()
    except (Exception, KeyboardInterrupt) as error:
        print(f"warning: step {run.step} could not be saved after the error: {error}", file=sys.stderr)


def time_spent(run: Run, throughput: Throughput) -> dict[str, float] | None:
    """Seconds of the steps done, over all starts, on the clock and times the ranks; and of this start. None if unknown:
    metrics.csv misses the time between its last row and a stop."""
    if run.earlier_s is None or run.earlier_device_s is None:
        return None
    here = throughput.elapsed_s()
    return {
        "seconds": run.earlier_s + here,
        "device_seconds": run.earlier_device_s + here * run.world_size,
        "seconds_of_start": here,
    }


def checkpoint_meta(run: Run, throughput: Throughput | None = None) -> dict[str, object]:
    """A checkpoint's meta: everything except the tensors, JSON-serializable. `throughput`: None in a replay."""
    datasets = run.data.train
    return {
        **run.to_meta(),  # waits for the device
        "time": None if throughput is None else time_spent(run, throughput),
        "words": words_seen(run),
        "word_budgets": run.budgets.get(run.step, []),
        "max_steps": run.data.max_steps,
        "config": run.settings,
        "model_config": run.config.to_dict(),
        "data": {
            "train": [dataset.fingerprint for dataset in datasets],
            "phases": [phase.to_dict() for phase in run.data.mixture.phases],
            "val": val_fingerprints(run.data.val),
            "tokenizer": datasets[0].manifest.tokenizer,
            "n_tokens": sum(dataset.n_tokens for dataset in datasets),
            "n_documents": sum(dataset.n_documents for dataset in datasets),
            "eos_id": datasets[0].eos_id,
            **encoding_facts(datasets),
        },
        "teachers": run.taught_by,
        "loss_scale": run.loss_scale.to_dict() if run.loss_scale is not None else None,
        "gradient_peak": run.sums.peak if run.sums is not None else None,
        "world_size": run.world_size,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "environment": run.watchdog.log.attempt,
    }


def val_fingerprints(val: dict[str, Rows]) -> str | dict[str, str] | None:
    """The fingerprint of a single unnamed validation set, or of each by its name; None without one."""
    found = {name: rows.dataset.fingerprint for name, rows in val.items()}
    return found.get("", found or None)


def last_checkpoint_name(run: Run, steps: int) -> str | None:
    """Name of the newest checkpoint before the last `steps` steps."""
    names = [p.name for p in list_checkpoints(run.folder) if (checkpoint_step(p) or 0) <= run.step - steps]
    return names[-1] if names else None
