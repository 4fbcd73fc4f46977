"""For tests of legacy checkpoints: converts our weights and optimizer state to the old trainers' format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_model.config import ModelConfig

# The fused projection, and the MLP's gate, up and down, inside `attn` and `mlp`.
MLP_NAMES = {
    "tinyllama": ("attn", "swiglu.w1", "swiglu.w2", "swiglu.w3"),
    "llammlein": ("attn", "w1", "w2", "w3"),
    "lit-gpt": ("attn", "fc_1", "fc_2", "proj"),
    "litgpt": ("qkv", "fc_1", "fc_2", "proj"),
}
NAMINGS = list(MLP_NAMES)
SETTINGS = {"learning_rate": 1e-2, "min_lr": 1e-3, "warmup_steps": 2, "max_step": 12, "global_batch_size": 8}


def group(qkv: Tensor, config: ModelConfig) -> Tensor:
    """Reorder rows from all queries, all keys, all values to queries, key, value of each query group."""
    H, G, D = config.n_head, config.n_query_groups, config.head_size
    heads = list(qkv.split(D))
    per_group = H // G
    rows = []
    for g in range(G):
        rows += [*heads[g * per_group : (g + 1) * per_group], heads[H + g], heads[H + G + g]]
    return torch.cat(rows)


def to_legacy(state: Mapping[str, Tensor], config: ModelConfig, naming: str) -> dict[str, Tensor]:
    """Convert our named tensors to theirs, in the parameter order of their model."""
    fused, gate, up, down = MLP_NAMES[naming]
    theirs: dict[str, Tensor] = {}

    def put(ours: str, name: str) -> None:
        for kind in ("weight", "bias"):
            if f"{ours}.{kind}" in state:
                tensor = state[f"{ours}.{kind}"].detach().clone()
                theirs[f"{name}.{kind}"] = group(tensor, config) if name.endswith(".attn.attn") else tensor

    put("lm_head", "lm_head")
    put("transformer.wte", "transformer.wte")
    for i in range(config.n_layer):
        block = f"transformer.h.{i}."
        for ours, name in (
            ("norm_1", "norm_1"),
            ("attn.qkv", f"attn.{fused}"),
            ("attn.proj", "attn.proj"),
            ("norm_2", "norm_2"),
            ("mlp.fc_1", f"mlp.{gate}"),
            ("mlp.fc_2", f"mlp.{up}"),
            ("mlp.proj", f"mlp.{down}"),
        ):
            put(block + ours, block + name)
    put("transformer.ln_f", "transformer.ln_f")
    assert len(theirs) == len(state)
    return theirs


def optimizer_to_legacy(
    moments: Mapping[str, Mapping[str, Tensor]], step: int, config: ModelConfig, naming: str, *, by_name: bool = False
) -> dict[str, Any]:
    """{"state", "param_groups"} of torch's AdamW: keyed by index, or by name as with FSDP."""
    parts = {
        key: to_legacy({n: m[key] for n, m in moments.items()}, config, naming) for key in ("exp_avg", "exp_avg_sq")
    }
    names = list(parts["exp_avg"])
    keys: list[Any] = names if by_name else list(range(len(names)))
    state = {
        key: {"step": torch.tensor(float(step)), **{part: parts[part][name] for part in parts}}
        for key, name in zip(keys, names, strict=True)
    }
    settings = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "amsgrad": False, "maximize": False}
    return {"state": state, "param_groups": [{**settings, "params": keys}]}


def save_legacy(
    path: Path,
    state: Mapping[str, Tensor],
    *,
    optimizer: dict[str, Any] | None = None,
    step: int = 0,
    hparams: dict[str, Any] | None = None,
) -> None:
    """Write a file as TinyLlama's trainer does."""
    content: dict[str, Any] = {"model": dict(state), "hparams": hparams or {}, "iter_num": 4 * step, "step_count": step}
    torch.save(content if optimizer is None else {**content, "optimizer": optimizer}, path)


def litgpt_fields(config: ModelConfig) -> dict[str, Any]:
    """The fields of litgpt's Config for one of our Llamas."""
    scaling = config.rope_scaling
    return {
        "name": config.name,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_query_groups": config.n_query_groups,
        "n_embd": config.n_embd,
        "head_size": config.head_size,
        "intermediate_size": config.intermediate_size,
        "block_size": config.block_size,
        "vocab_size": config.vocab_size,
        "padded_vocab_size": config.padded_vocab_size,
        "norm_class_name": "RMSNorm",
        "norm_eps": config.norm_eps,
        "mlp_class_name": "LLaMAMLP",
        "rotary_percentage": 1.0,
        "rope_base": int(config.rope_base),
        "rope_condense_ratio": 1,
        "rope_adjustments": None
        if scaling is None
        else {
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_seq_len": scaling.original_block_size,
        },
        "parallel_residual": False,
        "bias": config.attention_bias,
    }
