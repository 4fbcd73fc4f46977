"""Qwen 3, dense: a Llama with normed query and key heads, whose layers may have sliding windows."""

from __future__ import annotations

from typing import Any

from lit_model.config import ModelConfig
from lit_model.hf.family import Family
from lit_model.hf.fields import (
    LLAMA_FREE,
    Fields,
    layer_types_from_hf,
    layer_types_to_hf,
    llama_from_hf,
    llama_to_hf,
)
from lit_model.hf.llama import ATTENTION, MLP, NAMES, NORMS

_QK_NORMS = {"attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"}


def _config_to_hf(config: ModelConfig) -> dict[str, Any]:
    slides = config.sliding_window_size is not None
    return {
        **llama_to_hf(config),
        "attention_bias": config.attention_bias,
        "use_sliding_window": slides,
        "sliding_window": config.sliding_window_size,
        # The first sliding layer, for readers that know no layer_types; those put all later ones behind a window too.
        "max_window_layers": config.attention_pattern.index("sliding") if slides else config.n_layer,
        "layer_types": layer_types_to_hf(config),
    }


def _config_from_hf(hf: Fields) -> dict[str, Any]:
    sizes = llama_from_hf(hf, block_size=32768, n_query_groups=32, head_size=128)
    n_layer = sizes["n_layer"]
    window = hf.optional("sliding_window", 4096)
    if not hf.get("use_sliding_window", False):
        window = None
    first = hf.get("max_window_layers", 28)
    default = ["sliding" if window is not None and i >= first else "full" for i in range(n_layer)]
    pattern = layer_types_from_hf(hf, n_layer, default)
    if "sliding" in pattern and window is None:
        raise ValueError("layer_types has sliding_attention, yet use_sliding_window or sliding_window is not set")
    return {
        **sizes,
        "attention_bias": hf.get("attention_bias", False),
        "attention_pattern": pattern,
        "sliding_window_size": window if "sliding" in pattern else None,
    }


FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    free=LLAMA_FREE | {"attention_bias", "attention_pattern", "sliding_window_size"},
    fixed={"qk_norm": "head"},
    config_to_hf=_config_to_hf,
    config_from_hf=_config_from_hf,
    names=NAMES,
    block={**ATTENTION, **_QK_NORMS, **NORMS, **MLP},
)
