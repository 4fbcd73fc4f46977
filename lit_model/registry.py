"""Known models by name. Data only; sizes from the models' papers and configuration files, counts checked in tests."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from lit_model.config import ModelConfig

_LLAMMLEIN: dict[str, Any] = {"vocab_size": 32064, "block_size": 2048, "norm_eps": 1e-5}
_BABY: dict[str, Any] = {"vocab_size": 16000, "block_size": 128, "norm_eps": 1e-5}

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
        near = difflib.get_close_matches(name, MODELS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(MODELS)}"
        raise ValueError(f"unknown model name {name!r}; {hint}")
    config = MODELS[name]
    known = {f.name for f in dataclasses.fields(ModelConfig)}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise ValueError(f"unknown model field {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    derived = {
        "padded_vocab_size": {"vocab_size", "padding_multiple"},
        "head_size": {"n_head", "n_embd"},
    }
    for field, sources in derived.items():
        if sources & set(overrides):
            fields[field] = None
    if "n_head" in overrides and config.n_query_groups == config.n_head:
        fields["n_query_groups"] = None
    return ModelConfig(**{**fields, **overrides})
