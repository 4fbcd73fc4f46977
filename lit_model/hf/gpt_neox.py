"""GPT-NeoX and Pythia: attention and MLP side by side or not, each with its norm, a part of each head rotated."""

from __future__ import annotations

from typing import Any

from lit_model.config import ModelConfig
from lit_model.hf.family import Family
from lit_model.hf.fields import Fields, rope_from_hf, rope_to_hf, rotary_fraction
from lit_model.hf.gpt2 import GPT_FIXED, activation_from_hf, activation_to_hf
from lit_model.hf.table import head_by_head


def _config_to_hf(config: ModelConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.n_embd,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "max_position_embeddings": config.block_size,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": activation_to_hf(config),
        "use_parallel_residual": config.parallel_residual,
        "attention_bias": config.attention_bias,
        "hidden_dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        **rope_to_hf(config, partial=True),
        "rotary_emb_base": config.rope_base,  # transformers 4's names of rope_theta and partial_rotary_factor
        "rotary_pct": rotary_fraction(config),
    }


def _config_from_hf(hf: Fields) -> dict[str, Any]:
    hf.ignored("classifier_dropout", "is_decoder")
    n_embd, width, n_layer, n_head = hf.needed(
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"
    )
    block_size = hf.get("max_position_embeddings", 2048)
    rope = rope_from_hf(hf, block_size=block_size, fraction=0.25, base_key="rotary_emb_base", fraction_key="rotary_pct")
    # transformers writes these too, but reads the others.
    hf.fixed("rope_theta", rope.base, None)
    hf.fixed("partial_rotary_factor", rope.fraction, None)
    return {
        "n_embd": n_embd,
        "intermediate_size": width,
        "n_layer": n_layer,
        "n_head": n_head,
        "block_size": block_size,
        "norm_eps": hf.get("layer_norm_eps", 1e-5),
        "parallel_residual": hf.get("use_parallel_residual", True),
        "rope_base": rope.base,
        "rope_scaling": rope.scaling,
        "rotary_size": rope.rotary_size(n_embd // (n_head or 1)),  # ModelConfig complains about no head
        "attention_bias": hf.get("attention_bias", True),
        "activation": activation_from_hf(hf, "hidden_act", "gelu"),
        "dropout": hf.get("hidden_dropout", 0.0),
        "attention_dropout": hf.get("attention_dropout", 0.0),
    }


_NAMES = {
    "transformer.wte": "gpt_neox.embed_in",
    "transformer.h": "gpt_neox.layers",
    "transformer.ln_f": "gpt_neox.final_layer_norm",
    "lm_head": "embed_out",
}
_BLOCK = {
    "norm_1": "input_layernorm",
    "attn.qkv": "attention.query_key_value",
    "attn.proj": "attention.dense",
    "norm_2": "post_attention_layernorm",
    "mlp.fc": "mlp.dense_h_to_4h",
    "mlp.proj": "mlp.dense_4h_to_h",
}

FAMILY = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    free={"activation", "attention_bias", "parallel_residual", "rope_base", "rope_scaling", "rotary_size"},
    fixed=GPT_FIXED,
    config_to_hf=_config_to_hf,
    config_from_hf=_config_from_hf,
    names=_NAMES,
    block=_BLOCK,
    transforms=lambda config, layer: {"attn.qkv": head_by_head(config.n_head)},
    buffers=("*.attention.bias", "*.attention.masked_bias"),
)
