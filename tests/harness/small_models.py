"""Small models with a tokenizer, as Hugging Face folders: random weights, far from a uniform distribution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lit_data.corpus.synthetic import sample_documents
from lit_data.tokenizers.hf_export import write_hf_tokenizer
from lit_data.tokenizers.tokenizer import Tokenizer
from lit_data.tokenizers.training import train_on_texts
from lit_model.config import ModelConfig
from lit_model.hf.families import config_to_hf, tensors_to_hf
from lit_model.hf.io import write_folder
from lit_model.init import initialise
from lit_model.model import GPT

SIZES: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_embd": 32, "intermediate_size": 64, "block_size": 48}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"n_query_groups": 2},
    "gpt2": {
        "norm_class_name": "LayerNorm",
        "position_embedding": "learned",
        "mlp_gated": False,
        "attention_bias": True,
        "mlp_bias": True,
        "activation": "gelu_tanh",
    },
    "gemma2": {
        "n_query_groups": 2,
        "norm_offset": 1.0,
        "post_norm": True,
        "activation": "gelu_tanh",
        "scale_embeddings": True,
        "attention_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "attention_pattern": ("sliding", "full"),
        "sliding_window_size": 16,
    },
}

LAYER_NORM = {
    "norm_class_name": "LayerNorm",
    "mlp_gated": False,
    "mlp_bias": True,
    "parallel_residual": True,
}
EVERY_FAMILY: dict[str, dict[str, Any]] = {
    **FAMILIES,
    "mistral": {"attention_pattern": ("sliding",), "sliding_window_size": 8},
    "qwen3": {"qk_norm": "head", "tie_embeddings": True, "head_size": 16},
    "olmo2": {"qk_norm": "projection", "pre_norm": False, "post_norm": True},
    "llama4_text": {
        "n_query_groups": 2,
        "qk_norm": "unit",
        "rope_layers": (True, False),
        "attention_pattern": ("chunked", "full"),
        "attention_chunk_size": 8,
        "attention_temperature_scale": 0.1,
        "attention_temperature_floor": 4,
        "n_expert": 4,
        "n_expert_per_token": 2,
        "moe_layers": (False, True),
    },
    "gptj": {
        **LAYER_NORM,
        "shared_attention_norm": True,
        "activation": "gelu_tanh",
        "rotary_size": 4,
        "lm_head_bias": True,
    },
    "gpt_neox": {**LAYER_NORM, "attention_bias": True, "activation": "gelu", "rotary_size": 2},
}


def synthetic_texts(n: int, seed: int = 0) -> list[str]:
    """`n` short texts."""
    texts: list[str] = []
    for document in sample_documents("simple", seed, 200 * n):
        texts.append(document.text)
        if len(texts) == n:
            break
    return texts


def train_small_tokenizer(folder: Path, vocab_size: int = 300) -> Tokenizer:
    return train_on_texts(synthetic_texts(200), vocab_size, "byte_bpe", folder)


def write_model_folder(
    folder: Path, tokenizer: Tokenizer, family: str = "llama", *, bos: bool = False, **changes: Any
) -> Path:
    """A folder that `open_model` and transformers open. `bos`: its tokenizer begins texts with BOS."""
    config = ModelConfig(**SIZES | FAMILIES[family] | changes, vocab_size=tokenizer.vocab_size, padding_multiple=64)
    model = GPT(config)
    initialise(model, config, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    hf = config_to_hf(config, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)
    write_folder(folder, hf, tensors_to_hf(config, model.state_dict()))
    write_hf_tokenizer(tokenizer, folder, bos=bos)
    return folder
