"""GPT-J: attention and MLP side by side behind one norm, a part of each head rotated in neighbouring pairs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lit_model.config import ModelConfig
from lit_model.hf.family import Entry, Family
from lit_model.hf.fields import Fields
from lit_model.hf.gpt2 import GPT_FIXED, gpt_sizes_from_hf, gpt_sizes_to_hf
from lit_model.hf.table import SAME, Interleaved, linear, qkv_rows

_QKV = ("attn.q_proj", "attn.k_proj", "attn.v_proj")


def _config_to_hf(config: ModelConfig) -> dict[str, Any]:
    return {**gpt_sizes_to_hf(config), "rotary_dim": config.rotary_size}


def _config_from_hf(hf: Fields) -> dict[str, Any]:
    hf.fixed("rotary", True)  # in files older than transformers' GPT-J
    return {
        **gpt_sizes_from_hf(hf, block_size=2048, dropout=0.0),
        # Not null: transformers then makes angles for n_embd dimensions, which fit a head only if there is just one.
        "rotary_size": hf.get("rotary_dim", 64),
    }


def _entries(config: ModelConfig) -> Iterator[Entry]:
    pairs = Interleaved(config.n_head, config.rotary_size)
    yield from linear("transformer.wte", "transformer.wte", bias=False)
    for i in range(config.n_layer):
        block = f"transformer.h.{i}."
        qkv = tuple(block + name for name in _QKV)
        yield from linear(block + "norm_1", block + "ln_1", bias=True)
        yield from linear(block + "attn.qkv", qkv, bias=False, transform=qkv_rows(config, pairs, pairs, SAME))
        yield from linear(block + "attn.proj", block + "attn.out_proj", bias=False)
        yield from linear(block + "mlp.fc", block + "mlp.fc_in", bias=True)
        yield from linear(block + "mlp.proj", block + "mlp.fc_out", bias=True)
    yield from linear("transformer.ln_f", "transformer.ln_f", bias=True)
    if not config.tie_embeddings:
        yield Entry("lm_head.weight", ("lm_head.weight",), SAME)
    yield Entry("lm_head.bias", ("lm_head.bias",), SAME)


FAMILY = Family(
    model_type="gptj",
    architecture="GPTJForCausalLM",
    free={"activation", "rotary_size"},
    fixed=GPT_FIXED | {"parallel_residual": True, "shared_attention_norm": True, "lm_head_bias": True},
    config_to_hf=_config_to_hf,
    config_from_hf=_config_from_hf,
    entries=_entries,
    prefix="transformer.",
    buffers=("*.attn.bias", "*.attn.masked_bias"),
)
