"""Known models by name. Data only; sizes from the models' papers and configuration files, counts checked in tests."""

from __future__ import annotations

import dataclasses
from typing import Any

from lit_files.near_names import did_you_mean
from lit_model.config import ModelConfig

_LLAMMLEIN: dict[str, Any] = {"vocab_size": 32064, "block_size": 2048, "norm_eps": 1e-5}
# BabyLlama's trainer leaves the norms' epsilon at transformers' default for each family.
_BABY: dict[str, Any] = {"vocab_size": 16000, "block_size": 128, "norm_eps": 1e-6}
# Trained on 128 tokens; the table of learned positions has room for 256.
_BABY_GPT2: dict[str, Any] = {
    **_BABY,
    "block_size": 256,
    "norm_eps": 1e-5,
    "norm_class_name": "LayerNorm",
    "position_embedding": "learned",
    "mlp_gated": False,
    "activation": "gelu_tanh",
    "attention_bias": True,
    "mlp_bias": True,
    "tie_embeddings": True,
    "init": "gpt2",
}
_BABY_GPTJ: dict[str, Any] = {
    **_BABY,
    "norm_eps": 1e-5,
    "norm_class_name": "LayerNorm",
    "rotary_size": 64,
    "parallel_residual": True,
    "shared_attention_norm": True,
    "mlp_gated": False,
    "activation": "gelu_tanh",
    "mlp_bias": True,
    "lm_head_bias": True,
    "tie_embeddings": True,
    "init": "normal",
}
_BABYLM2025: dict[str, Any] = {"vocab_size": 48000, "block_size": 128, "init": "normal"}

_ALL = [
    # LLäMmlein (German only; the vocabulary of 32064 counts its padding)
    ModelConfig("LLaMmlein_120M", 12, 12, 4, 768, 2048, **_LLAMMLEIN),
    ModelConfig("LLaMmlein_1B", 22, 32, 4, 2048, 5632, **_LLAMMLEIN),
    ModelConfig("LLaMmlein_7B", 32, 32, 32, 4096, 11008, **_LLAMMLEIN),
    ModelConfig("TinyLlama_1.1B", 22, 32, 4, 2048, 5632, block_size=2048, vocab_size=32000, norm_eps=1e-5),
    # BabyLlama and its teachers
    ModelConfig("llama-10M", 6, 6, 6, 192, 768, **_BABY),
    ModelConfig("llama-16M", 8, 8, 8, 256, 1024, **_BABY),
    ModelConfig("llama-95M", 10, 12, 12, 768, 2048, **_BABY),
    ModelConfig("llama-97M", 12, 12, 12, 768, 2048, tie_embeddings=True, **_BABY),
    ModelConfig("llama-360M", 24, 8, 8, 1024, 3072, **_BABY),
    ModelConfig("llama-58M", 16, 8, 8, 512, 1024, **_BABY),
    ModelConfig("BabyLlama-2", 32, 15, 5, 960, 2560, **{**_BABY, "block_size": 256}),
    ModelConfig("gpt-97M", 12, 12, 12, 768, 3072, **_BABY_GPT2),
    ModelConfig("gpt-705M", 24, 16, 16, 1536, 6144, **_BABY_GPT2),
    ModelConfig("gpt-j-97M", 12, 12, 12, 768, 3072, **_BABY_GPTJ),
    # BabyLM2025: width, layers, vocabulary and context are the source's. The rest is transformers' default for the
    # family, but for Llama 4, whose 40 heads do not divide the width and with whose experts it would have 3.9e9
    # parameters.
    ModelConfig(
        "babylm-gemma2",
        12,
        8,
        4,
        768,
        9216,
        head_size=256,
        norm_eps=1e-6,
        norm_offset=1.0,
        post_norm=True,
        activation="gelu_tanh",
        scale_embeddings=True,
        attention_scores_scalar=256,
        attention_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        attention_pattern=("sliding", "full"),
        sliding_window_size=4096,
        tie_embeddings=True,
        **_BABYLM2025,
    ),
    ModelConfig(
        "babylm-llama4",
        12,
        12,
        4,
        768,
        3072,
        norm_eps=1e-5,
        rope_base=500000.0,
        rope_layers=(True, True, True, False),
        attention_pattern=("chunked", "chunked", "chunked", "full"),
        attention_chunk_size=8192,
        qk_norm="unit",
        attention_temperature_scale=0.1,
        attention_temperature_floor=8192,
        n_expert=16,
        n_expert_per_token=1,
        moe_intermediate_size=768,
        **_BABYLM2025,
    ),
    ModelConfig(
        "babylm-olmo2",
        12,
        32,
        32,
        768,
        11008,
        norm_eps=1e-5,
        rope_base=10000.0,
        pre_norm=False,
        post_norm=True,
        qk_norm="projection",
        **_BABYLM2025,
    ),
    # Nano LLaMA 3.1; its vocabulary of 10000 has no padding to 64; RoPE base 10000, unscaled
    ModelConfig(
        "nano-llama",
        4,
        8,
        2,
        1024,
        1024,
        block_size=128,
        vocab_size=10000,
        padding_multiple=16,
        tie_embeddings=True,
    ),
    # seconds on one CPU core
    ModelConfig("debug", 2, 4, 2, 64, 192, block_size=256, vocab_size=512),
]

MODELS: dict[str, ModelConfig] = {config.name: config for config in _ALL}


def get_config(name: str, **overrides: Any) -> ModelConfig:
    """The config called `name`, with some fields replaced.

    Overriding a field from which others are derived (vocab_size, n_head, n_embd) derives them again unless they are
    given too. Raises ValueError for an unknown name (with near ones) and for an unknown field.
    """
    if name not in MODELS:
        hint = did_you_mean(name, MODELS, cutoff=0.4) or f"; known are {', '.join(MODELS)}"
        raise ValueError(f"unknown model name {name!r}{hint}")
    config = MODELS[name]
    known = {f.name for f in dataclasses.fields(ModelConfig)}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise ValueError(f"unknown model field {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    derived = {
        "padded_vocab_size": {"vocab_size", "padding_multiple"},
        "head_size": {"n_head", "n_embd"},
        "moe_layers": {"n_expert"},
    }
    # These follow another field only where they are equal to it in the registry.
    if config.n_query_groups == config.n_head:
        derived["n_query_groups"] = {"n_head"}
    if config.rotary_size in (config.head_size, 0):
        derived["rotary_size"] = {"n_head", "n_embd", "head_size", "position_embedding"}
    if config.moe_intermediate_size == config.intermediate_size:
        derived["moe_intermediate_size"] = {"intermediate_size"}
    for field, sources in derived.items():
        if sources & set(overrides):
            fields[field] = None
    return ModelConfig(**{**fields, **overrides})
