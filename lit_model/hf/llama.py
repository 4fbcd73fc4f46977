"""Llama 2, 3, 3.1, 3.2, SmolLM2, TinyLlama; and the names that Mistral, Qwen and OLMo share with them."""

from __future__ import annotations

from typing import Any

from lit_model.config import ModelConfig
from lit_model.hf.family import Family
from lit_model.hf.fields import LLAMA_FREE, Fields, llama_from_hf, llama_to_hf

NAMES = {
    "transformer.wte": "model.embed_tokens",
    "transformer.h": "model.layers",
    "transformer.ln_f": "model.norm",
    "lm_head": "lm_head",
}
ATTENTION = {"attn.qkv": tuple(f"self_attn.{name}_proj" for name in "qkv"), "attn.proj": "self_attn.o_proj"}
NORMS = {"norm_1": "input_layernorm", "norm_2": "post_attention_layernorm"}
MLP = {"mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj", "mlp.proj": "mlp.down_proj"}


def _config_to_hf(config: ModelConfig) -> dict[str, Any]:
    return {
        **llama_to_hf(config),
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }


def _config_from_hf(hf: Fields) -> dict[str, Any]:
    hf.fixed("sliding_window", None)
    hf.fixed("pretraining_tp", 1)  # how a matrix was cut when it was trained
    hf.ignored("is_llama_config")
    return {
        **llama_from_hf(hf, block_size=2048),
        "attention_bias": hf.get("attention_bias", False),
        "mlp_bias": hf.get("mlp_bias", False),
    }


FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    free=LLAMA_FREE | {"attention_bias", "mlp_bias"},
    config_to_hf=_config_to_hf,
    config_from_hf=_config_from_hf,
    names=NAMES,
    block={**ATTENTION, **NORMS, **MLP},
)
