"""Llama 2, 3, 3.1, 3.2, SmolLM2, TinyLlama; and the names that Mistral, Qwen and OLMo share with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lit_model.config import ModelConfig
from lit_model.hf.family import Entry, Family
from lit_model.hf.fields import Fields, rope_from_hf, rope_to_hf, sizes_from_hf, sizes_to_hf
from lit_model.hf.table import linear, qkv_rows

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
NORMS = {"norm_1": "input_layernorm", "norm_2": "post_attention_layernorm"}
MLP = {"mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj", "mlp.proj": "mlp.down_proj"}


def entries_with(config: ModelConfig, norms: Mapping[str, str]) -> Iterator[Entry]:
    """Llama's table of names, with these norms of a block."""
    yield from linear("transformer.wte", "model.embed_tokens", bias=False)
    for i in range(config.n_layer):
        ours, theirs = f"transformer.h.{i}.", f"model.layers.{i}."
        qkv = tuple(theirs + name for name in QKV)
        yield from linear(ours + "attn.qkv", qkv, bias=config.attention_bias, transform=qkv_rows(config))
        yield from linear(ours + "attn.proj", theirs + "self_attn.o_proj", bias=config.attention_bias)
        for norm, name in norms.items():
            yield from linear(ours + norm, theirs + name, bias=False)
        for linear_name, name in MLP.items():
            yield from linear(ours + linear_name, theirs + name, bias=config.mlp_bias)
    yield from linear("transformer.ln_f", "model.norm", bias=False)
    if not config.tie_embeddings:
        yield from linear("lm_head", "lm_head", bias=False)


def _config_to_hf(config: ModelConfig) -> dict[str, Any]:
    return {
        **sizes_to_hf(config),
        **rope_to_hf(config),
        "hidden_act": "silu",
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }


def _config_from_hf(hf: Fields) -> dict[str, Any]:
    hf.fixed("hidden_act", "silu")
    hf.fixed("sliding_window", None)
    hf.fixed("pretraining_tp", 1)  # how a matrix was cut when it was trained
    hf.ignored("is_llama_config")
    sizes = sizes_from_hf(hf, block_size=2048)
    rope = rope_from_hf(hf, block_size=sizes["block_size"])
    return {
        **sizes,
        "rope_base": rope.base,
        "rope_scaling": rope.scaling,
        "attention_bias": hf.get("attention_bias", False),
        "mlp_bias": hf.get("mlp_bias", False),
    }


FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    free={"n_query_groups", "head_size", "rope_base", "rope_scaling", "attention_bias", "mlp_bias"},
    fixed={},
    config_to_hf=_config_to_hf,
    config_from_hf=_config_from_hf,
    entries=lambda config: entries_with(config, NORMS),
)
