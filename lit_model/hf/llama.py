"""Llama 2, 3, 3.1, 3.2, SmolLM2, TinyLlama; and the names that Mistral, Qwen and OLMo share with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lit_model.config import ModelConfig
from lit_model.hf.family import Entry, Family, Transform
from lit_model.hf.fields import LLAMA_FREE, Fields, llama_from_hf, llama_to_hf
from lit_model.hf.table import linear, qkv_rows

NORMS = {"norm_1": "input_layernorm", "norm_2": "post_attention_layernorm"}
MLP = {"fc_1": "gate_proj", "fc_2": "up_proj", "proj": "down_proj"}


def _qkv(config: ModelConfig, layer: int) -> Transform:
    return qkv_rows(config)


def _mlp(config: ModelConfig, layer: int) -> Iterator[Entry]:
    for name, their in MLP.items():
        yield from linear(
            f"transformer.h.{layer}.mlp.{name}", f"model.layers.{layer}.mlp.{their}", bias=config.mlp_bias
        )


def entries_with(
    config: ModelConfig,
    norms: Mapping[str, str],
    qkv: Callable[[ModelConfig, int], Transform] = _qkv,
    mlp: Callable[[ModelConfig, int], Iterator[Entry]] = _mlp,
) -> Iterator[Entry]:
    """Llama's table of names, with these norms of a block, and transforms and MLPs by layer."""
    yield from linear("transformer.wte", "model.embed_tokens", bias=False)
    for i in range(config.n_layer):
        ours, theirs = f"transformer.h.{i}.", f"model.layers.{i}."
        names = tuple(f"{theirs}self_attn.{name}_proj" for name in "qkv")
        yield from linear(ours + "attn.qkv", names, bias=config.attention_bias, transform=qkv(config, i))
        yield from linear(ours + "attn.proj", theirs + "self_attn.o_proj", bias=config.attention_bias)
        for norm, name in norms.items():
            yield from linear(ours + norm, theirs + name, bias=False)
        yield from mlp(config, i)
    yield from linear("transformer.ln_f", "model.norm", bias=False)
    if not config.tie_embeddings:
        yield from linear("lm_head", "lm_head", bias=False)


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
    fixed={},
    config_to_hf=_config_to_hf,
    config_from_hf=_config_from_hf,
    entries=lambda config: entries_with(config, NORMS),
)
