"""GPT-2: learned positions, LayerNorm, biases; and the words that GPT-J and GPT-NeoX share with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lit_model.config import ModelConfig
from lit_model.hf.family import Entry, Family
from lit_model.hf.fields import Fields
from lit_model.hf.table import TRANSPOSED, linear

# Theirs -> ours. Three names for one formula: "fast" and "new" write the tanh out, and round a little differently.
_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",  # the first of several is the one written
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "silu": "silu",
    "swish": "silu",
}


GPT_FIXED = {"norm_class_name": "LayerNorm", "mlp_gated": False, "mlp_bias": True}


def activation_to_hf(config: ModelConfig) -> str:
    """transformers' name of the MLP's activation."""
    return next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == config.activation)


def activation_from_hf(hf: Fields, key: str, default: str) -> str:
    """Our name of the activation under `key`. Raises ValueError for one that is not computed here."""
    name = hf.get(key, default)
    if name not in _ACTIVATIONS:
        raise ValueError(f"{key} is {name!r}; supported are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def gpt_sizes_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Sizes, norm, activation and dropout in the words of GPT-2 and GPT-J."""
    return {
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": config.intermediate_size,
        "n_positions": config.block_size,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": activation_to_hf(config),
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "attn_pdrop": config.attention_dropout,
    }


def gpt_sizes_from_hf(hf: Fields, *, block_size: int, dropout: float) -> dict[str, Any]:
    """The inverse of `gpt_sizes_to_hf`; the arguments are defaults."""
    hf.ignored("summary_*", "n_ctx", "_num_labels")  # heads for classification; another name of n_positions
    hf.fixed("scale_attn_weights", True)
    n_embd, n_layer, n_head = hf.needed("n_embd", "n_layer", "n_head")
    width = hf.optional("n_inner")
    embedding, residual = hf.get("embd_pdrop", dropout), hf.get("resid_pdrop", dropout)
    if embedding != residual:
        raise ValueError(f"embd_pdrop is {embedding} and resid_pdrop {residual}; supported are equal ones")
    return {
        "n_embd": n_embd,
        "n_layer": n_layer,
        "n_head": n_head,
        "intermediate_size": 4 * n_embd if width is None else width,
        "block_size": hf.get("n_positions", block_size),
        "norm_eps": hf.get("layer_norm_epsilon", 1e-5),
        "activation": activation_from_hf(hf, "activation_function", "gelu_new"),
        "dropout": residual,
        "attention_dropout": hf.get("attn_pdrop", dropout),
    }


def _config_from_hf(hf: Fields) -> dict[str, Any]:
    hf.fixed("scale_attn_by_inverse_layer_idx", False)
    hf.fixed("add_cross_attention", False)
    hf.ignored("reorder_and_upcast_attn")  # the order of operations in low precision
    return gpt_sizes_from_hf(hf, block_size=1024, dropout=0.1)


def _entries(config: ModelConfig) -> Iterator[Entry]:
    yield from linear("transformer.wte", "transformer.wte", bias=False)
    yield from linear("transformer.wpe", "transformer.wpe", bias=False)
    for i in range(config.n_layer):
        block = f"transformer.h.{i}."
        yield from linear(block + "norm_1", block + "ln_1", bias=True)
        yield from linear(block + "attn.qkv", block + "attn.c_attn", bias=True, transform=TRANSPOSED)
        yield from linear(block + "attn.proj", block + "attn.c_proj", bias=True, transform=TRANSPOSED)
        yield from linear(block + "norm_2", block + "ln_2", bias=True)
        yield from linear(block + "mlp.fc", block + "mlp.c_fc", bias=True, transform=TRANSPOSED)
        yield from linear(block + "mlp.proj", block + "mlp.c_proj", bias=True, transform=TRANSPOSED)
    yield from linear("transformer.ln_f", "transformer.ln_f", bias=True)
    if not config.tie_embeddings:
        yield from linear("lm_head", "lm_head", bias=False)


FAMILY = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    free={"activation"},
    fixed=GPT_FIXED | {"position_embedding": "learned", "attention_bias": True},
    config_to_hf=gpt_sizes_to_hf,
    config_from_hf=_config_from_hf,
    entries=_entries,
    tied=True,
    init="gpt2",
    prefix="transformer.",
    buffers=("*.attn.bias", "*.attn.masked_bias"),
)
