"""Mistral: a Llama whose tokens see the last sliding_window before them, in every layer."""

from __future__ import annotations

from typing import Any

from lit_model.config import ModelConfig
from lit_model.hf.family import Family
from lit_model.hf.fields import LLAMA_FREE, Fields, llama_from_hf, llama_to_hf
from lit_model.hf.llama import ATTENTION, MLP, NAMES, NORMS


def _config_to_hf(config: ModelConfig) -> dict[str, Any]:
    return {**llama_to_hf(config), "sliding_window": config.sliding_window_size}


def _config_from_hf(hf: Fields) -> dict[str, Any]:
    window = hf.optional("sliding_window", 4096)
    return {
        **llama_from_hf(hf, block_size=131072, n_query_groups=8),
        "attention_pattern": ("full",) if window is None else ("sliding",),
        "sliding_window_size": window,
    }


def _further_obstacle(config: ModelConfig) -> str | None:
    if config.attention_pattern in (("full",), ("sliding",)):
        return None
    return f"attention_pattern is {config.attention_pattern}, supported is one kind for all layers, full or sliding"


FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    free=LLAMA_FREE | {"attention_pattern", "sliding_window_size"},
    config_to_hf=_config_to_hf,
    config_from_hf=_config_from_hf,
    names=NAMES,
    block={**ATTENTION, **NORMS, **MLP},
    further_obstacle=_further_obstacle,
)
