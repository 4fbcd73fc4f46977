"""Gemma 2: norms before and after attention and MLP with weights around 0, soft-capped scores and logits, windows."""

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
from lit_model.hf.llama import ATTENTION, MLP, NAMES

_NORMS = {
    "norm_1": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "norm_2": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}


def _config_to_hf(config: ModelConfig) -> dict[str, Any]:
    scalar = config.attention_scores_scalar
    return {
        **llama_to_hf(config, "gelu_pytorch_tanh"),
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": config.attention_bias,
        "query_pre_attn_scalar": config.head_size if scalar is None else int(scalar),
        "attn_logit_softcapping": config.attention_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
        # transformers requires a window even where no layer has one.
        "sliding_window": config.sliding_window_size or config.block_size,
        "layer_types": layer_types_to_hf(config),
        "use_bidirectional_attention": False,
    }


def _config_from_hf(hf: Fields) -> dict[str, Any]:
    hf.fixed("hidden_activation", "gelu_pytorch_tanh")
    hf.fixed("use_bidirectional_attention", False, None)
    hf.ignored("cache_implementation")
    # transformers does not read hidden_act, but published files have it.
    sizes = llama_from_hf(hf, block_size=8192, n_query_groups=4, head_size=256, hidden_act="gelu_pytorch_tanh")
    window = hf.optional("sliding_window", 4096)
    hf.fixed("sliding_window_size", window)  # an older name that published files have too
    n_layer = sizes["n_layer"]
    pattern = layer_types_from_hf(hf, n_layer, [("sliding", "full")[i % 2] for i in range(n_layer)])
    if "sliding" in pattern and window is None:
        raise ValueError("sliding_window is None, and layer_types has sliding_attention; give the tokens of a window")
    return {
        **sizes,
        "attention_bias": hf.get("attention_bias", False),
        "attention_scores_scalar": hf.get("query_pre_attn_scalar", 256),
        "attention_logit_softcapping": hf.optional("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": hf.optional("final_logit_softcapping", 30.0),
        "attention_pattern": pattern,
        "sliding_window_size": window if "sliding" in pattern else None,
    }


def _further_obstacle(config: ModelConfig) -> str | None:
    scalar = config.attention_scores_scalar
    if scalar is not None and scalar != int(scalar):
        return f"attention_scores_scalar is {scalar}, supported is a whole number"
    return None


FAMILY = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    free=LLAMA_FREE
    | {
        "attention_bias",
        "attention_scores_scalar",
        "attention_logit_softcapping",
        "final_logit_softcapping",
        "attention_pattern",
        "sliding_window_size",
    },
    fixed={"norm_offset": 1.0, "post_norm": True, "activation": "gelu_tanh", "scale_embeddings": True},
    config_to_hf=_config_to_hf,
    config_from_hf=_config_from_hf,
    names=NAMES,
    block={**ATTENTION, **_NORMS, **MLP},
    further_obstacle=_further_obstacle,
    tied=True,
)
