"""GPT-2: learned positions, LayerNorm, biases; and the names that GPT-J and GPT-NeoX share with it."""

from __future__ import annotations

from typing import Any

from lit_model.config import ModelConfig
from lit_model.hf.family import Family
from lit_model.hf.fields import Fields
from lit_model.hf.table import TRANSPOSED

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
GPT_NAMES = {f"transformer.{name}": f"transformer.{name}" for name in ("wte", "wpe", "h", "ln_f")}
GPT_NAMES["lm_head"] = "lm_head"


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
    """Sizes, norm, activation and dropout under the keys of GPT-2 and GPT-J."""
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


_BLOCK = {
    "norm_1": "ln_1",
    "attn.qkv": "attn.c_attn",
    "attn.proj": "attn.c_proj",
    "norm_2": "ln_2",
    "mlp.fc": "mlp.c_fc",
    "mlp.proj": "mlp.c_proj",
}

FAMILY = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    free={"activation"},
    fixed=GPT_FIXED | {"position_embedding": "learned", "attention_bias": True},
    config_to_hf=gpt_sizes_to_hf,
    config_from_hf=_config_from_hf,
    names=GPT_NAMES,
    block=_BLOCK,
    transforms=lambda config, layer: {name: TRANSPOSED for name in _BLOCK if not name.startswith("norm")},
    tied=True,
    init="gpt2",
    buffers=("*.attn.bias", "*.attn.masked_bias"),
)
