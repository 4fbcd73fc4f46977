"""Initial state of a run: the model config, and weights and optimizer moments from another checkpoint."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from torch import nn

from lit_model.config import ModelConfig
from lit_model.init import copy_slice
from lit_model.load import OPTIMIZER_PREFIX, Checkpoint, is_hf_folder, load_tensors, resolve
from lit_model.matrices import hidden_matrices
from lit_model.registry import get_config
from pretrain.args import ModelArgs, RunArgs
from pretrain.checkpoint.load import STEP_COUNT, state_tensors
from pretrain.optim import Optimizer

# Fields of the model that may differ from --init_from: no weight depends on them.
FREE = ("dropout", "attention_dropout")
FREE_WITH_ROPE = ("rope_base", "rope_scaling")


def model_config(args: RunArgs, vocab_size: int, checkpoint: Path | None = None) -> ModelConfig:
    """The model config: from the registry and the flags, or from --init_from.

    With rotary embeddings a --train.block_size above the model's raises its maximum context. A resumed run reads the
    config from its checkpoint, and no longer needs --init_from.
    """
    if args.init_from is None:
        return config_of(args.model, vocab_size, args.train.block_size)
    config = load_tensors(args.init_from)[0] if checkpoint is None else Checkpoint(checkpoint).model_config
    if args.init_layers is not None and checkpoint is None:
        config = with_layers(config, args.init_layers)
    if args.init_optimizer and checkpoint is None:
        optimizer_of(args, config)
    given = {k: v for k, v in vars(args.model).items() if v is not None}
    changed = dataclasses.replace(config, **given)
    free = FREE if config.position_embedding == "learned" else (*FREE, *FREE_WITH_ROPE)
    for key, value in given.items():
        if key not in free and getattr(config, key) != getattr(changed, key):
            raise ValueError(
                f"--model.{key} {value} contradicts --init_from {args.init_from}, which has {getattr(config, key)}; "
                f"{', '.join(f'--model.{name}' for name in free)} may differ"
            )
    block_size = args.train.block_size
    if block_size is None or block_size <= config.block_size:
        return changed
    if config.position_embedding == "learned":
        raise ValueError(
            f"--train.block_size {block_size} exceeds the {config.block_size} learned positions of --init_from "
            f"{args.init_from}"
        )
    return dataclasses.replace(changed, block_size=block_size)


def config_of(args: ModelArgs, vocab_size: int, block_size: int | None) -> ModelConfig:
    """The registered model, or one of the given sizes, with the given fields. `vocab_size`: the data's."""
    given = {"vocab_size": vocab_size} | {k: v for k, v in vars(args).items() if v is not None and k != "name"}
    if args.name is not None:
        config = get_config(args.name, **given)
    else:
        missing = [f for f in ("n_layer", "n_head", "n_embd", "intermediate_size") if f not in given]
        if missing:
            flags = " ".join(f"--model.{f}" for f in missing)
            raise ValueError(f"the model is incomplete: give --model.name (a registered model) or {flags}")
        config = ModelConfig(**(given if block_size is None else given | {"block_size": block_size}))
    if block_size is not None and block_size > config.block_size:
        raise ValueError(
            f"--train.block_size {block_size} exceeds the model's maximum context of {config.block_size} tokens "
            f"(--model.name {args.name})"
        )
    return config


def load_weights(model: nn.Module, path: Path, layers: list[int] | None) -> None:
    """Copy the weights of a checkpoint or Hugging Face folder, or of the given layers only, into a model (sharded or
    not).
    """
    _, tensors = load_tensors(path)
    for name, parameter in model.named_parameters():
        if layers is not None and (found := re.fullmatch(r"(transformer\.h\.)(\d+)(\..+)", name)):
            name = f"{found[1]}{layers[int(found[2])]}{found[3]}"
        copy_slice(parameter, tensors[name])


def with_layers(config: ModelConfig, layers: list[int]) -> ModelConfig:
    """The config of a model with a subset of another's layers. Raises ValueError for a layer that does not exist."""
    if not all(0 <= i < config.n_layer for i in layers):
        raise ValueError(f"--init_layers {layers}: --init_from has the layers 0 to {config.n_layer - 1}")
    attention = tuple(config.layer_attention(i) for i in layers)
    experts = tuple(config.layer_has_experts(i) for i in layers)
    return dataclasses.replace(
        config,
        name="",
        n_layer=len(layers),
        rope_layers=tuple(config.rope_layers[i % len(config.rope_layers)] for i in layers),
        attention_pattern=attention,
        sliding_window_size=config.sliding_window_size if "sliding" in attention else None,
        attention_chunk_size=config.attention_chunk_size if "chunked" in attention else None,
        moe_layers=experts,
        n_expert=config.n_expert if any(experts) else 0,
    )


def optimizer_of(args: RunArgs, config: ModelConfig) -> Checkpoint:
    """The --init_from checkpoint. Raises ValueError if it lacks the optimizer's state for any parameter."""
    assert args.init_from is not None
    path = resolve(args.init_from)
    if is_hf_folder(path):
        raise ValueError(f"--init_optimizer true: --init_from {path} is a Hugging Face folder, without an optimizer")
    checkpoint = Checkpoint(path)
    shapes = {name: tuple(layout.shape) for name, layout in checkpoint.model_layout().items()}
    by_muon = hidden_matrices(config) if args.optim.name == "muon" else {}
    wanted: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        keys = ("momentum_buffer",) if name in by_muon else ("exp_avg", "exp_avg_sq")
        wanted |= {f"{OPTIMIZER_PREFIX}{name}/{key}": shape for key in keys}
    wanted[STEP_COUNT] = ()
    found = set(checkpoint.names())
    for name, shape in wanted.items():
        if name not in found or tuple(checkpoint.layout(name).shape) != shape:
            raise ValueError(
                f"--init_optimizer true: --init_from {path} holds no {name} of shape {shape}, which --optim.name "
                f"{args.optim.name} keeps"
            )
    return checkpoint


def load_optimizer(optimizer: Optimizer, checkpoint: Checkpoint) -> None:
    """Copy the state and update count of a checkpoint (see `optimizer_of`) into an optimizer."""
    for name, target in (state_tensors({}, optimizer.state) | {STEP_COUNT: optimizer.step_count}).items():
        copy_slice(target, checkpoint.tensor(name))
