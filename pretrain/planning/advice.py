"""Warnings about a plan, by rules of thumb with their sources."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from lit_model.model import parameter_shapes
from pretrain.planning.plan import Plan

TOKENS_PER_PARAMETER = 20.0
"""Compute-optimal (Hoffmann et al. 2022, approach 1 and 2)."""
REPEATED_EPOCHS = 4.0
"""Passes over the same data up to which repetition costs almost nothing (Muennighoff et al. 2023)."""
LR_AT_768 = 6e-4
"""AdamW's peak rate of GPT-3 125M at width 768; larger published models follow about 1 / sqrt(width)."""
LEAST_STEPS = 1000
SHARE_OF_WARMUP = (0.0005, 0.2)
LARGEST_VOCABULARY_SHARE = 0.5


def warnings(plan: Plan) -> Iterator[str]:
    args, config = plan.args, plan.config
    ratio = plan.tokens / plan.active
    if ratio < TOKENS_PER_PARAMETER:
        yield (
            f"{ratio:.3g} tokens per parameter: below about {TOKENS_PER_PARAMETER:.0f} a smaller model reaches a lower "
            "loss for the same compute (Hoffmann et al. 2022)"
        )
    if plan.epochs is not None and plan.epochs > REPEATED_EPOCHS:
        yield (
            f"{plan.epochs:.1f} passes over the data: beyond {REPEATED_EPOCHS:.0f}, repeated tokens teach less and "
            "less (Muennighoff et al. 2023)"
        )
    optim = args.optim.resolved(plan.steps)
    share = optim.warmup_steps / plan.steps
    if share > 1:
        yield (
            f"--optim.warmup_steps {optim.warmup_steps} exceeds the run's {plan.steps} steps: the run would be refused"
        )
    elif not SHARE_OF_WARMUP[0] <= share <= SHARE_OF_WARMUP[1]:
        yield (
            f"--optim.warmup_steps {optim.warmup_steps} is {share:.2%} of the run: common are 0.1 to 10 %, and at "
            "least some hundred steps"
        )
    usual = LR_AT_768 * (768 / config.n_embd) ** 0.5
    if not usual / 5 <= optim.lr <= 3 * usual:
        yield (
            f"--optim.lr {optim.lr:g} at a width of {config.n_embd}: published models of this width use about "
            f"{usual:.1e} (GPT-3, TinyLlama, Llama)"
        )
    if plan.steps < LEAST_STEPS:
        step_tokens = args.train.global_batch_samples * plan.block_size
        yield (
            f"{plan.steps} steps of {step_tokens:,} tokens: so few updates rarely use the data well"
            + ("; lower --train.global_batch_samples" if args.train.global_batch_samples > plan.devices else "")
        )
    shapes = parameter_shapes(config)
    lookups = sum(prod(shapes[name]) for name in ("transformer.wte.weight", "lm_head.weight") if name in shapes)
    if lookups > LARGEST_VOCABULARY_SHARE * plan.parameters:
        yield (
            f"embedding and head are {lookups / plan.parameters:.0%} of the parameters: a smaller vocabulary, or "
            "--model.tie_embeddings true, leaves more for the blocks"
        )
    given = args.train.micro_batch_samples
    per_device, left = divmod(args.train.global_batch_samples, plan.devices)
    if left or (isinstance(given, int) and per_device % given):
        yield (
            f"--train.global_batch_samples {args.train.global_batch_samples} is not a multiple of {plan.devices} "
            f"devices x {given} rows: the run would be refused"
        )
