"""The distillation term of the loss: the student head per micro-batch, its weight per step, its logged values."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from lit_data.loading.batches import MicroBatch
from lit_data.loading.order import first_sample_of_step
from lit_model.distillation import Distillation, DistillationHead
from pretrain.args import DistillationArgs
from pretrain.distillation.teacher_cache import CachedTeacher
from pretrain.run import Run


def setting_of(args: DistillationArgs) -> Distillation:
    """The divergence settings of the distillation loss."""
    return Distillation(args.divergence, args.temperature, args.ensemble, args.top_k)


def alpha_at(args: DistillationArgs, step: int, max_steps: int) -> float:
    """Weight of the cross-entropy at `step` (0-based), interpolated from alpha to alpha_end at the last step."""
    if args.alpha_end is None:
        return args.alpha
    x = min(1.0, step / max(1, max_steps - 1))
    shape = x if args.alpha_schedule == "linear" else (1 - math.cos(math.pi * x)) / 2
    return args.alpha + (args.alpha_end - args.alpha) * shape


def divergence_scale(run: Run, step: int, n_targets: Tensor | float) -> Tensor | float:
    """Factor for a step's divergence. The sum over the global batch is later divided by its number of targets, so a
    mean over the rows with data is that times targets per row.
    """
    if run.args.distillation.reduction == "per_token":
        return 1.0
    first, rows = first_sample_of_step(run.segments, step)
    if run.data.end_sample is not None:
        rows = min(rows, run.data.end_sample - first)
    return n_targets / rows


def student_head(
    run: Run, step: int, n_targets: Tensor
) -> Callable[[MicroBatch, Tensor, Tensor | None], DistillationHead] | None:
    """A function (micro-batch, its tokens and boundaries on the device) -> the student's head for that micro-batch.

    None without teachers and at alpha 1, so that the step is identical to one without teachers.
    """
    args, teachers = run.args.distillation, run.teachers
    alpha = alpha_at(args, step, run.data.max_steps)
    if teachers is None or alpha == 1:
        return None
    setting = setting_of(args)
    scale = divergence_scale(run, step, n_targets)

    def head(batch: MicroBatch, tokens: Tensor, bounds: Tensor | None) -> DistillationHead:
        teacher = teachers(batch) if isinstance(teachers, CachedTeacher) else teachers(tokens, bounds)
        return DistillationHead(teacher, setting, alpha, scale)

    return head


def distillation_values(
    run: Run, cross_entropy: float, divergence: float | None = None, n_targets: float = 0
) -> dict[str, float]:
    """The distillation columns at a log step. No divergence means that alpha is 1 and the teachers did not run."""
    args, step = run.args.distillation, run.step - 1
    alpha = alpha_at(args, step, run.data.max_steps)
    if divergence is None:
        return {"alpha": alpha, "total_loss": cross_entropy}
    pull = (1 - alpha) * setting_of(args).softening ** 2 * float(divergence_scale(run, step, n_targets)) * divergence
    return {"alpha": alpha, "total_loss": alpha * cross_entropy + pull, "divergence": divergence}
