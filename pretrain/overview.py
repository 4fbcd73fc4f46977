"""The lines that a run prints before its first step."""

from __future__ import annotations

import os

import torch

from lit_model.attention import attention_variant
from lit_model.cost import count_active_parameters, count_parameters
from lit_model.float8 import Float8Linear
from lit_model.hf.families import family_of
from lit_model.kernels.choose import AttentionChoice, choose_attention
from lit_model.kernels.cross_entropy import choose_loss
from pretrain.fabric import DDPStrategy
from pretrain.launch import has_gpus
from pretrain.run import Run


def describe(run: Run) -> str:
    """Model, data, devices, teachers, the attention kernels with the reason for each, and warnings."""
    args, data, config = run.args, run.data, run.config
    how = f" with FSDP2 ({args.sharding_strategy})" if run.placement.fsdp else ""
    how = " with DDP" if isinstance(run.fabric.strategy, DDPStrategy) else how
    threads = torch.get_num_threads()
    documents, tokens = sum(d.n_documents for d in data.train), sum(d.n_tokens for d in data.train)
    rows = sum(r.n_windows for r in data.rows)
    parameters = f"{count_parameters(config):,} parameters"
    if config.n_expert:
        parameters += f" ({count_active_parameters(config):,} for a token)"
    lines = [
        f"run      {run.folder}" + (f", resumed after step {run.step}" if run.step else ""),
        f"model    {config.name or 'custom'}: {parameters}, vocabulary {config.vocab_size}",
        f"data     {documents:,} documents, {tokens:,} tokens, {rows:,} rows of {data.block_size}, {args.data.packing}",
        f"steps    {data.max_steps:,} of {args.train.global_batch_samples * data.block_size:,} tokens",
        f"devices  {run.world_size} x {run.device.type}{how}, {args.precision}, {threads} thread{'s' * (threads > 1)}",
        f"step     {describe_step(run)}",
        *describe_kernels(run),
    ]
    if args.precision == "fp8":
        layers = [layer for block in run.raw_model.blocks() for layer in block.modules()]
        n = sum(isinstance(layer, Float8Linear) for layer in layers)
        slow = "; on a CPU only to try it out, bf16 is faster" if run.device.type == "cpu" else ""
        lines.append(f"float8   {n} of {sum(isinstance(x, torch.nn.Linear) for x in layers)} linear layers{slow}")
    if run.taught_by:
        d = args.distillation
        names = " + ".join(f"{t['name']} x {t['weight']:g}" for t in run.taught_by)
        alpha = f"{d.alpha:g}" + (f" to {d.alpha_end:g}, {d.alpha_schedule}" if d.alpha_end is not None else "")
        how = f"{d.divergence} at temperature {d.temperature:g}, {d.reduction}, alpha {alpha}"
        lines.append(f"teachers {names}{', cached' if d.cache is not None else ''}; {how}")
    try:
        family_of(config)
    except ValueError as error:  # no model of transformers, but it can be trained
        lines.append(f"warning  it can be trained and opened here, but not exported to Hugging Face: {error}")
    if run.device.type == "cpu" and args.accelerator == "auto" and has_gpus(os.environ):
        lines.append("warning  SLURM gave this job GPUs, but torch finds none (the driver, or apptainer's --nv?)")
    if args.data.mock:
        lines.append("mock     the first step's data again and again (--data.mock); nothing is recorded")
    return "\n".join(lines)


def describe_step(run: Run) -> str:
    """How a device computes its share of a step: micro-batches, compilation, recomputation."""
    t, n_layer = run.args.train, run.config.n_layer
    count = t.global_batch_samples // (run.world_size * t.micro_batch)
    parts = [f"{count} micro-batch{'es' * (count > 1)} of {t.micro_batch} row{'s' * (t.micro_batch > 1)} a device"]
    parts.append("blocks compiled" if run.args.compile else "not compiled (--compile)")
    recomputed = sum(block.recompute != "none" for block in run.raw_model.blocks())
    if recomputed:
        kind = " but for matrix products and attention" if t.activation_checkpointing == "op" else ""
        parts.append(f"{recomputed} of {n_layer} blocks recomputed{kind}")
    return ", ".join(parts)


def describe_kernels(run: Run) -> list[str]:
    """A line for each attention kernel: name, reason, layers if there are several; on CUDA one for the loss."""
    args, config = run.args, run.config
    layers: dict[AttentionChoice, list[int]] = {}
    for i in range(config.n_layer):
        chunked = config.layer_attention(i) == "chunked"
        choice = choose_attention(
            run.device,
            run.placement.dtype,
            config.head_size,
            args.train.attention,
            documents=args.data.document_mask or chunked,
            variant=attention_variant(config, i),
        )
        layers.setdefault(choice, []).append(i)
    loss = choose_loss(args.train.loss_kernel, run.device, run.placement.dtype)
    mixed = "; plain operations where teachers are mixed in" if run.taught_by and loss.name == "fused" else ""
    return [
        f"kernel   {choice.name}: {choice.reason}"
        + (f" (layers {', '.join(map(str, some))})" if len(layers) > 1 else "")
        for choice, some in layers.items()
    ] + ([f"loss     {loss.name}: {loss.reason}{mixed}"] if run.device.type == "cuda" else [])
