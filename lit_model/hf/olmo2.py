"""OLMo 2: norms after attention and MLP instead of before them, and over whole query and key projections."""

from __future__ import annotations

from typing import Any

from lit_model.config import ModelConfig
from lit_model.hf.family import Family
from lit_model.hf.fields import LLAMA_FREE, Fields, llama_from_hf, llama_to_hf
from lit_model.hf.llama import ATTENTION, MLP, NAMES

_NORMS = {
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}


def _config_to_hf(config: ModelConfig) -> dict[str, Any]:
    return {**llama_to_hf(config), "attention_bias": config.attention_bias}


def _config_from_hf(hf: Fields) -> dict[str, Any]:
    sizes = llama_from_hf(hf, block_size=2048, norm_eps=1e-5)
    return {**sizes, "attention_bias": hf.get("attention_bias", False)}


FAMILY = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    # transformers reads head_dim here too, though its configuration does not name it.
    free=LLAMA_FREE | {"attention_bias"},
    fixed={"pre_norm": False, "post_norm": True, "qk_norm": "projection"},
    config_to_hf=_config_to_hf,
    config_from_hf=_config_from_hf,
    names=NAMES,
    block={**ATTENTION, **_NORMS, **MLP},
)
