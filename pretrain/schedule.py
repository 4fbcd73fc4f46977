"""Learning rates as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

from pretrain.args import OptimArgs

SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,  # Loshchilov and Hutter 2017, eq. 5
    "linear": lambda x: 1 - x,
    "sqrt": lambda x: 1 - math.sqrt(x),  # Hägele et al. 2024, eq. 2
    "square": lambda x: 1 - x * x,
}
"""Factor of lr - lr_min after a share x of the decay."""


def learning_rate(args: OptimArgs, step: int, max_steps: int) -> float:
    """The learning rate of `step` (0-based) in a run of `max_steps`, after `args.steps_before` earlier steps.

    Linear from lr / warmup_steps to lr over the warmup, then by `schedule`. `cosine` and `linear` decay from the first
    step after the warmup, which has lr, to the last, which has lr_min. `constant` stays at lr. `wsd` (Hu et al. 2024)
    stays at lr until the last `decay_steps` steps; the last of them has lr_min. Before the decay it does not depend on
    max_steps, so a run can be extended from any checkpoint of its stable phase.
    """
    step, max_steps = step + args.steps_before, max_steps + args.steps_before
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    if args.schedule == "constant":
        return args.lr
    if args.schedule == "wsd":
        shape = args.decay_shape
        x = max(0.0, (step + 1 - (max_steps - args.decay_steps)) / args.decay_steps)
    else:
        shape = args.schedule
        x = (step - args.warmup_steps) / max(1, max_steps - 1 - args.warmup_steps)
    return args.lr_min + (args.lr - args.lr_min) * SHAPES[shape](min(1.0, x))
