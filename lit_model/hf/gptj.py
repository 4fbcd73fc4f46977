"""GPT-J: attention and MLP side by side after one norm, a part of each head rotated in neighbouring pairs."""

from __future__ import annotations

from typing import Any

from lit_model.config import ModelConfig
from lit_model.hf.family import Family
from lit_model.hf.fields import Fields
from lit_model.hf.gpt2 import GPT_FIXED, GPT_NAMES, gpt_sizes_from_hf, gpt_sizes_to_hf
from lit_model.hf.table import qkv_rows


def _config_to_hf(config: ModelConfig) -> dict[str, Any]:
    return {**gpt_sizes_to_hf(config), "rotary_dim": config.rotary_size}


def _config_from_hf(hf: Fields) -> dict[str, Any]:
    hf.fixed("rotary", True)  # in files older than transformers' GPT-J
    return {
        **gpt_sizes_from_hf(hf, block_size=2048, dropout=0.0),
        # Not null: transformers then makes angles for n_embd dimensions, which fit a head only if there is just one.
        "rotary_size": hf.get("rotary_dim", 64),
    }


_BLOCK = {
    "norm_1": "ln_1",
    "attn.qkv": ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    "attn.proj": "attn.out_proj",
    "mlp.fc": "mlp.fc_in",
    "mlp.proj": "mlp.fc_out",
}

FAMILY = Family(
    model_type="gptj",
    architecture="GPTJForCausalLM",
    free={"activation", "rotary_size"},
    fixed=GPT_FIXED | {"parallel_residual": True, "shared_attention_norm": True, "lm_head_bias": True},
    config_to_hf=_config_to_hf,
    config_from_hf=_config_from_hf,
    names=GPT_NAMES,
    block=_BLOCK,
    transforms=lambda config, layer: {"attn.qkv": qkv_rows(config, pairs=True)},
    buffers=("*.attn.bias", "*.attn.masked_bias"),
)
