"""Learning rates as pure functions of the step."""

from __future__ import annotations

import math

from pretrain.args import OptimArgs


def learning_rate(args: OptimArgs, step: int, max_steps: int) -> float:
    """The learning rate of `step` (0-based) in a run of `max_steps`, with `args.steps_before` before its first.

    Linear from lr / warmup_steps to lr over the warm-up, then by `schedule` to lr_min, which the last step has:
    cosine lr_min + (lr - lr_min) (1 + cos(pi x)) / 2 (Loshchilov and Hutter 2017, eq. 5), linear, or constant.
    """
    step, max_steps = step + args.steps_before, max_steps + args.steps_before
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    if args.schedule == "constant":
        return args.lr
    decay_steps = max(1, max_steps - 1 - args.warmup_steps)
    x = min(1.0, (step - args.warmup_steps) / decay_steps)
    shape = (1 + math.cos(math.pi * x)) / 2 if args.schedule == "cosine" else 1 - x
    return args.lr_min + (args.lr - args.lr_min) * shape
