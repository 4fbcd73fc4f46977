"""What is minimised beside the cross-entropy: teaching for a batch, its weight at a step, its numbers at a log step."""

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
    """How the distance of a student from its teachers is measured."""
    return Distillation(args.divergence, args.temperature, args.ensemble, args.top_k)


def alpha_at(args: DistillationArgs, step: int, max_steps: int) -> float:
    """The weight of the cross-entropy at `step` (0-based): from alpha to alpha_end, which the last step has."""
    if args.alpha_end is None:
        return args.alpha
    x = min(1.0, step / max(1, max_steps - 1))
    shape = x if args.alpha_schedule == "linear" else (1 - math.cos(math.pi * x)) / 2
    return args.alpha + (args.alpha_end - args.alpha) * shape


def divergence_scale(run: Run, step: int, n_targets: Tensor | float) -> Tensor | float:
    """What a step's divergence is multiplied by. The sum over the global batch is divided by its targets later on: a
    mean over the rows that hold data is that times targets per row.
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
    """A function from a micro-batch, and its tokens and boundaries on the device, to the student's head for it.

    None without teachers and at alpha 1, so that the step equals that of a run without teachers.
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
    """The columns of a student at a log step. Without a divergence the teachers were not asked: alpha is 1."""
    args, step = run.args.distillation, run.step - 1
    alpha = alpha_at(args, step, run.data.max_steps)
    if divergence is None:
        return {"alpha": alpha, "total_loss": cross_entropy}
    pull = (1 - alpha) * setting_of(args).softening ** 2 * float(divergence_scale(run, step, n_targets)) * divergence
    return {"alpha": alpha, "total_loss": alpha * cross_entropy + pull, "divergence": divergence}
