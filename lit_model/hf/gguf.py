"""Writes a GGUF file for llama.cpp and programs based on it: names, metadata and tensors of the Llama-like families.

llama.cpp knows Llama and Mistral as `llama`, and rotates neighbouring dimensions there: rows of queries and keys are
permuted. As `qwen3` it rotates halves, as here. It computes no window in either, so that a model with one is refused.
The package gguf lays out the file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_files.progress import track
from lit_files.publish import replace_file
from lit_model.config import ModelConfig
from lit_model.hf.families import family_of
from lit_model.hf.table import LazyTensors, qkv_rows, tensors_to_hf
from lit_model.model import parameter_shapes
from lit_model.rope import rope_frequencies

# model_type in transformers -> architecture in llama.cpp
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen3": "qwen3"}
# q8_0 is computed from float32: blocks of 32 numbers in a row share a scale.
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "q8_0": torch.float32}
Q8_0_BLOCK = 32

_NAMES = {
    "transformer.wte": "token_embd",
    "transformer.h": "blk",
    "transformer.ln_f": "output_norm",
    "lm_head": "output",
}
_BLOCK = {
    "attn.qkv": ("attn_q", "attn_k", "attn_v"),
    "norm_1": "attn_norm",
    "attn.q_norm": "attn_q_norm",
    "attn.k_norm": "attn_k_norm",
    "attn.proj": "attn_output",
    "norm_2": "ffn_norm",
    "mlp.fc_1": "ffn_gate",
    "mlp.fc_2": "ffn_up",
    "mlp.proj": "ffn_down",
}


def architecture_of(config: ModelConfig) -> str:
    """The architecture in llama.cpp. Raises ValueError for a model that it does not compute."""
    family = family_of(dataclasses.replace(config, family=""))  # the computation counts, not the origin
    architecture = ARCHITECTURES.get(family.model_type)
    if architecture is None:
        raise ValueError(f"GGUF is written for {', '.join(ARCHITECTURES)}; this model is of family {family.model_type}")
    window = config.sliding_window_size
    if window is not None and window < config.block_size:
        raise ValueError(
            f"sliding_window_size is {window}, below block_size {config.block_size}: llama.cpp computes no window here"
        )
    if architecture == "qwen3" and config.attention_bias:
        raise ValueError("attention_bias is set: llama.cpp computes none in a qwen3")
    return architecture


def check_dtype(config: ModelConfig, dtype: str) -> None:
    """Raise ValueError if llama.cpp does not compute the model, or not in this dtype (a key of DTYPES)."""
    architecture = architecture_of(config)
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    if dtype == "q8_0":
        for name, like in _tensors(config, _layout(config), architecture, dtype):
            if like.dim() > 1 and like.shape[-1] % Q8_0_BLOCK:
                raise ValueError(
                    f"dtype q8_0: {name} has rows of {like.shape[-1]} numbers, not a multiple of {Q8_0_BLOCK}; choose "
                    "another dtype"
                )


def write_gguf(
    path: str | Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    *,
    dtype: str = "float16",
    tokenizer: Mapping[str, Any] | None = None,
) -> None:
    """Write one file; it appears complete or not at all. Tensors are read one at a time.

    Args:
        tensors: ours, by our names, in any precision; may load lazily.
        dtype: of the matrices, a key of DTYPES. Norms and biases are float32, as llama.cpp expects.
        tokenizer: keys and values of `lit_data.tokenizers.gguf`; None: without, which only programs that bring
            their own tokenizer can use.

    Raises ValueError for a model that llama.cpp does not compute, and for a file that exists.
    """
    try:
        import gguf  # an optional dependency
    except ImportError as error:
        raise ValueError("GGUF needs the package gguf: pip install 'llammlein[gguf]'") from error
    path = Path(path)
    if path.exists():
        raise ValueError(f"output {path} exists already; give another name or remove it")
    architecture = architecture_of(config)
    kinds = {"float16": gguf.GGMLQuantizationType.F16, "bfloat16": gguf.GGMLQuantizationType.BF16}
    kinds |= {"float32": gguf.GGMLQuantizationType.F32, "q8_0": gguf.GGMLQuantizationType.Q8_0}

    def kind_of(tensor: Tensor) -> Any:
        return kinds[dtype if tensor.dim() > 1 else "float32"]

    check_dtype(config, dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as temporary, contextlib.closing(gguf.GGUFWriter(temporary, architecture)) as writer:
        for key, value in {**_metadata(config, architecture, dtype), **(tokenizer or {})}.items():
            _add(writer, gguf, key, value)
        if tokenizer is None:
            writer.add_tokenizer_model("none")
        for name, like in _tensors(config, _layout(config), architecture, dtype):
            kind = kind_of(like)
            shape = gguf.quant_shape_to_byte_shape(tuple(like.shape), kind)  # as the library wants raw types
            writer.add_tensor_info(name, shape, _BYTE, math.prod(shape), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        total = sum(like.nbytes for _, like in _tensors(config, _layout(config), architecture, dtype)) / 1e6
        source = _tensors(config, tensors, architecture, dtype)
        for _, tensor in track(source, "writing", "MB", total, size=lambda one: one[1].nbytes / 1e6):
            tensor = tensor.cpu().contiguous()
            if kind_of(tensor) == kinds["q8_0"]:
                writer.write_tensor_data(gguf.quantize(tensor.numpy(), kinds["q8_0"]))
            else:
                writer.write_tensor_data(tensor.view(torch.uint8).numpy())
            del tensor  # before the next one is read


_BYTE = torch.empty(0, dtype=torch.uint8).numpy().dtype


def _metadata(config: ModelConfig, architecture: str, dtype: str) -> dict[str, Any]:
    """Keys of llama.cpp's loader; floats are float32 there, whole numbers uint32."""
    sizes = {
        "vocab_size": config.vocab_size,
        "context_length": config.block_size,
        "embedding_length": config.n_embd,
        "block_count": config.n_layer,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.n_head,
        "attention.head_count_kv": config.n_query_groups,
        "attention.key_length": config.head_size,
        "attention.value_length": config.head_size,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "rope.dimension_count": config.head_size,
        "rope.freq_base": float(config.rope_base),
    }
    file_type = {"float32": 0, "float16": 1, "q8_0": 7, "bfloat16": 32}[dtype]  # llama.cpp's enum llama_ftype
    general = {"general.name": config.name or "model", "general.file_type": file_type}
    return {**general, **{f"{architecture}.{key}": value for key, value in sizes.items()}}


def _add(writer: Any, gguf: Any, key: str, value: Any) -> None:
    """One key with the type that its value has."""
    if isinstance(value, list):
        writer.add_array(key, value)
        return
    kinds = {
        bool: gguf.GGUFValueType.BOOL,
        int: gguf.GGUFValueType.UINT32,
        float: gguf.GGUFValueType.FLOAT32,
        str: gguf.GGUFValueType.STRING,
    }
    writer.add_key_value(key, value, kinds[type(value)])


def _tensors(
    config: ModelConfig, tensors: Mapping[str, Tensor], architecture: str, dtype: str
) -> Iterator[tuple[str, Tensor]]:
    """llama.cpp's names and tensors, in the precision that is written."""
    if config.rope_scaling is not None:
        # The factors by which llama.cpp divides each frequency.
        plain = rope_frequencies(dataclasses.replace(config, rope_scaling=None))
        yield "rope_freqs.weight", plain / rope_frequencies(config)
    turned = {"attn.qkv": qkv_rows(config, pairs=True)} if architecture == "llama" else {}
    family = dataclasses.replace(family_of(config), names=_NAMES, block=_BLOCK, transforms=lambda config, layer: turned)
    for name, tensor in tensors_to_hf(family, config, tensors):
        yield name, tensor.to(DTYPES[dtype] if tensor.dim() > 1 else torch.float32)


def _layout(config: ModelConfig) -> Mapping[str, Tensor]:
    shapes = parameter_shapes(config)
    return LazyTensors(shapes, lambda name: torch.empty(shapes[name], device="meta"))
