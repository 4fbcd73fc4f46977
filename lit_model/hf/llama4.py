"""Llama 4's text model: chunked layers that rotate pairs of neighbours, layers without positions, experts."""

from __future__ import annotations

from typing import Any

from lit_model.config import ModelConfig
from lit_model.hf.family import Family, Transform
from lit_model.hf.fields import (
    LLAMA_FREE,
    Fields,
    layer_types_from_hf,
    layer_types_to_hf,
    llama_from_hf,
    llama_to_hf,
)
from lit_model.hf.llama import ATTENTION, NAMES, NORMS
from lit_model.hf.table import TRANSPOSED, qkv_rows

_MLP = {
    "mlp.router": "feed_forward.router",
    "mlp.experts.gate_up": "feed_forward.experts.gate_up_proj",
    "mlp.experts.down": "feed_forward.experts.down_proj",
    "mlp.shared.fc_1": "feed_forward.shared_expert.gate_proj",
    "mlp.shared.fc_2": "feed_forward.shared_expert.up_proj",
    "mlp.shared.proj": "feed_forward.shared_expert.down_proj",
    "mlp.fc_1": "feed_forward.gate_proj",
    "mlp.fc_2": "feed_forward.up_proj",
    "mlp.proj": "feed_forward.down_proj",
}


def _transforms(config: ModelConfig, layer: int) -> dict[str, Transform]:
    qkv = qkv_rows(config, pairs=config.layer_rotates(layer))
    return {"attn.qkv": qkv, "mlp.experts.gate_up": TRANSPOSED, "mlp.experts.down": TRANSPOSED}


def _config_to_hf(config: ModelConfig) -> dict[str, Any]:
    scale = config.attention_temperature_scale
    layers = range(config.n_layer)
    return {
        **llama_to_hf(config),
        "attention_bias": config.attention_bias,
        "intermediate_size": config.moe_intermediate_size,
        "intermediate_size_mlp": config.intermediate_size,
        "num_local_experts": config.n_expert,
        "num_experts_per_tok": config.n_expert_per_token,
        "moe_layers": [i for i in layers if config.layer_has_experts(i)],
        "no_rope_layers": [int(config.layer_rotates(i)) for i in layers],  # 1: it rotates
        "use_qk_norm": config.qk_norm == "unit",
        "attn_temperature_tuning": scale is not None,
        "attn_scale": 0.1 if scale is None else scale,
        "floor_scale": config.attention_temperature_floor,
        # transformers requires a chunk size even where no layer is chunked.
        "attention_chunk_size": config.attention_chunk_size or config.block_size,
        "layer_types": layer_types_to_hf(config),
    }


def _config_from_hf(hf: Fields) -> dict[str, Any]:
    hf.fixed("router_jitter_noise", 0.0)
    hf.ignored("router_aux_loss_coef", "cache_implementation", "for_llm_compressor")
    sizes = llama_from_hf(hf, block_size=131072, norm_eps=1e-5, n_query_groups=8, head_size=128, rope_base=500000.0)
    n_layer = sizes["n_layer"]
    rotates = _rotating_layers(hf, n_layer)
    default = ["chunked" if one else "full" for one in rotates]
    pattern = layer_types_from_hf(hf, n_layer, default, kinds=("full", "chunked"))
    chunk = hf.optional("attention_chunk_size", 8192)
    if "chunked" in pattern and chunk is None:
        raise ValueError(
            "attention_chunk_size is None, and layers are chunked (layer_types, by default all that rotate); "
            "give the tokens of a chunk, or layer_types of full_attention"
        )
    hf.fixed("attn_temperature_tuning", True, False, 4)  # files of the first release say 4 and mean true
    tuned, scale = hf.optional("attn_temperature_tuning", True), hf.get("attn_scale", 0.1)
    return {
        **sizes,
        **_experts(hf, n_layer),
        "moe_intermediate_size": sizes["intermediate_size"],
        "intermediate_size": hf.get("intermediate_size_mlp", 16384),
        "rope_layers": rotates,
        "attention_bias": hf.get("attention_bias", False),
        "attention_pattern": pattern,
        "attention_chunk_size": chunk if "chunked" in pattern else None,
        "qk_norm": "unit" if hf.get("use_qk_norm", True) else "none",
        "attention_temperature_scale": scale if tuned and scale else None,
        "attention_temperature_floor": hf.get("floor_scale", 8192),
    }


def _rotating_layers(hf: Fields, n_layer: int) -> tuple[bool, ...]:
    """From no_rope_layers, where 1 means that a layer rotates, or by default all but each no_rope_layer_interval-th."""
    interval = _interval(hf, "no_rope_layer_interval", 4)
    rotates = hf.optional("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(n_layer)]
    if len(rotates) < n_layer or any(one not in (0, 1) for one in rotates):
        raise ValueError(f"no_rope_layers is {rotates!r}; supported is 0 or 1 for each of the {n_layer} layers")
    return tuple(map(bool, rotates[:n_layer]))


def _experts(hf: Fields, n_layer: int) -> dict[str, Any]:
    """Which layers have experts, from moe_layers or by default every interleave_moe_layer_step-th; and how many."""
    step = _interval(hf, "interleave_moe_layer_step", 1)
    layers = hf.optional("moe_layers")
    if layers is None:
        layers = range(step - 1, n_layer, step)
    n_expert, chosen = hf.get("num_local_experts", 16), hf.get("num_experts_per_tok", 1)
    has_experts = tuple(i in layers for i in range(n_layer))
    if any(has_experts) and n_expert < 1:
        raise ValueError(f"num_local_experts is {n_expert}, and moe_layers is {list(layers)}; supported is 1 or more")
    return {
        "n_expert": n_expert if any(has_experts) else 0,
        "n_expert_per_token": chosen,
        "moe_layers": has_experts,
    }


def _interval(hf: Fields, key: str, default: int) -> int:
    interval: int = hf.get(key, default)
    if interval < 1:
        raise ValueError(f"{key} is {interval}; supported is 1 or more")
    return interval


def _further_obstacle(config: ModelConfig) -> str | None:
    if config.qk_norm not in ("none", "unit"):
        return f"qk_norm is {config.qk_norm!r}, supported is 'none' or 'unit'"
    return None


FAMILY = Family(
    model_type="llama4_text",
    architecture="Llama4ForCausalLM",
    free=LLAMA_FREE
    | {
        "rope_layers",
        "attention_bias",
        "attention_pattern",
        "attention_chunk_size",
        "qk_norm",
        "attention_temperature_scale",
        "attention_temperature_floor",
        "n_expert",
        "n_expert_per_token",
        "moe_intermediate_size",
        "moe_layers",
    },
    config_to_hf=_config_to_hf,
    config_from_hf=_config_from_hf,
    names=NAMES,
    block={**ATTENTION, **NORMS, **_MLP},
    transforms=_transforms,
    further_obstacle=_further_obstacle,
)
