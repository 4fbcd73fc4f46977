"""Llama in Hugging Face's names: config.json and tensors, both ways. Each direction is the other's exact inverse.

Dimensions: C n_embd, H query heads, G key/value heads, D head size, V padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lit_model.config import ModelConfig, RopeScaling

ARCHITECTURE = "LlamaForCausalLM"

# Fields of config.json that change what is computed, with the one value that is supported. Read when present.
_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "pretraining_tp": 1,
    "attention_dropout": 0.0,
    "quantization_config": None,
    "sliding_window": None,
}


def config_to_hf(
    config: ModelConfig, *, bos_id: int | None = None, eos_id: int | None = None, dtype: str = "float32"
) -> dict[str, Any]:
    """config.json for transformers >= 4.43 and 5: the fields of both generations are written, they agree.

    The vocabulary is the unpadded one. Dropout and initialisation concern training only and are left out.
    """
    hf: dict[str, Any] = {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "hidden_size": config.n_embd,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_query_groups,
        "head_dim": config.head_size,
        "max_position_embeddings": config.block_size,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "use_cache": True,
        "torch_dtype": dtype,
        "dtype": dtype,
        "rope_theta": config.rope_base,
        "rope_scaling": None,
    }
    parameters: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        parameters = {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": config.rope_scaling.original_block_size,
        }
        hf["rope_scaling"] = parameters
    hf["rope_parameters"] = {**parameters, "rope_theta": config.rope_base}
    return hf


def config_from_hf(hf: Mapping[str, Any], name: str = "") -> ModelConfig:
    """The config behind a config.json of either generation.

    Raises ValueError naming the field for anything this model does not compute, or that is missing. The vocabulary is
    padded to a multiple of 64 here as everywhere; `tensors_from_hf` adds the rows.
    """
    if hf.get("model_type") != "llama":
        raise ValueError(f"model_type is {hf.get('model_type')!r}; supported is 'llama'")
    architectures = hf.get("architectures")
    if architectures and ARCHITECTURE not in architectures:
        raise ValueError(f"architectures is {architectures!r}; supported is [{ARCHITECTURE!r}]")
    for field, supported in _FIXED.items():
        if field in hf and hf[field] != supported:
            raise ValueError(f"{field} is {hf[field]!r}; supported is {supported!r}")
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    missing = [field for field in needed if hf.get(field) is None]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    rope_base, rope_scaling = _rope_from_hf(hf)
    n_head = hf["num_attention_heads"]
    # Where a field is absent, transformers' own default holds.
    return ModelConfig(
        name=name,
        n_layer=hf["num_hidden_layers"],
        n_head=n_head,
        n_query_groups=hf.get("num_key_value_heads") or n_head,
        n_embd=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        block_size=hf.get("max_position_embeddings", 2048),
        vocab_size=hf["vocab_size"],
        head_size=hf.get("head_dim") or hf["hidden_size"] // n_head,
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        rope_base=rope_base,
        rope_scaling=rope_scaling,
        tie_embeddings=hf.get("tie_word_embeddings", False),
        attention_bias=hf.get("attention_bias", False),
        mlp_bias=hf.get("mlp_bias", False),
    )


def _rope_from_hf(hf: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    # transformers 5 keeps everything in rope_parameters; before, rope_theta stood alone beside rope_scaling.
    key = "rope_parameters" if hf.get("rope_parameters") else "rope_scaling"
    rope: dict[str, Any] = dict(hf.get(key) or {})
    base = float(rope.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0)
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    partial = rope.pop("partial_rotary_factor", None) or hf.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise ValueError(f"partial_rotary_factor is {partial!r}; supported is 1.0")
    if kind == "default":
        if rope.keys() - {"factor"} or rope.get("factor", 1.0) != 1.0:
            raise ValueError(f"{key} of type 'default' has unsupported entries {rope!r}")
        return base, None
    if kind != "llama3":
        raise ValueError(f"{key}.rope_type is {kind!r}; supported are 'default' and 'llama3'")
    fields = {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_block_size",
    }
    missing, extra = sorted(fields.keys() - rope.keys()), sorted(rope.keys() - fields.keys())
    if missing or extra:
        raise ValueError(f"{key} of type 'llama3': missing {missing}, unsupported {extra}")
    return base, RopeScaling(**{ours: rope[theirs] for theirs, ours in fields.items()})


# --- Tensors: a table of names per kind, and two transforms (rows of qkv, rows of padding) ---------------------------

_BLOCK = {
    "norm_1.weight": "input_layernorm.weight",
    "attn.proj": "self_attn.o_proj",
    "norm_2.weight": "post_attention_layernorm.weight",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
}
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def _names(config: ModelConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Our name, and the names in Hugging Face's model whose rows one after the other are ours; in the model's order."""
    yield "transformer.wte.weight", ("model.embed_tokens.weight",)
    for i in range(config.n_layer):
        ours, theirs = f"transformer.h.{i}.", f"model.layers.{i}."
        kinds = ("weight", "bias") if config.attention_bias else ("weight",)
        for kind in kinds:
            yield f"{ours}attn.qkv.{kind}", tuple(f"{theirs}{name}.{kind}" for name in _QKV)
        for mine, their in _BLOCK.items():
            if mine.endswith(".weight"):
                yield ours + mine, (theirs + their,)
                continue
            biased = config.attention_bias if mine.startswith("attn") else config.mlp_bias
            for kind in ("weight", "bias") if biased else ("weight",):
                yield f"{ours}{mine}.{kind}", (f"{theirs}{their}.{kind}",)
    yield "transformer.ln_f.weight", ("model.norm.weight",)
    if not config.tie_embeddings:
        yield "lm_head.weight", ("lm_head.weight",)


_VOCABULARY = ("transformer.wte.weight", "lm_head.weight")


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Our parameter names and shapes."""
    C, F, HD = config.n_embd, config.intermediate_size, config.n_head * config.head_size
    matrices = {"attn.qkv": (config.n_qkv, C), "attn.proj": (C, HD), "mlp.fc_1": (F, C), "mlp.fc_2": (F, C)}
    matrices["mlp.proj"] = (C, F)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, _ in _names(config):
        matrix = next((shape for part, shape in matrices.items() if f".{part}." in name), (C,))
        if name in _VOCABULARY:
            matrix = (config.padded_vocab_size, C)
        shapes[name] = matrix[:1] if name.endswith(".bias") else matrix
    return shapes


def tensors_to_hf(config: ModelConfig, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face's names and tensors from ours, one at a time; padding rows of the vocabulary are dropped.

    `tensors` may load lazily on item access. Raises ValueError naming missing, unknown or misshapen ones.
    """
    shapes = expected_shapes(config)
    check_names(shapes, tensors, "the checkpoint")
    sizes = [heads * config.head_size for heads in (config.n_head, config.n_query_groups, config.n_query_groups)]
    for ours, theirs in _names(config):
        tensor = tensors[ours]
        if tuple(tensor.shape) != shapes[ours]:
            raise ValueError(f"{ours} has shape {tuple(tensor.shape)}; the config asks for {shapes[ours]}")
        if ours in _VOCABULARY:
            tensor = tensor[: config.vocab_size]
        yield from zip(theirs, torch.split(tensor, sizes) if len(theirs) > 1 else (tensor,), strict=True)
        del tensor  # before the next one is read


def tensors_from_hf(config: ModelConfig, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A mapping from our names that builds each tensor when asked for it; the inverse of `tensors_to_hf`.

    Padding rows are zeros: they get no probability and no gradient. Raises ValueError naming missing or unknown
    tensors at once, misshapen ones when they are asked for. A stored `lm_head.weight` of a tied model must equal the
    embedding, else it is an error; so-called `rotary_emb.inv_freq` buffers of old files are passed over.
    """
    names = dict(_names(config))
    wanted = {their for theirs in names.values() for their in theirs}
    found = {key for key in tensors if not key.endswith(".rotary_emb.inv_freq")}
    if config.tie_embeddings and "lm_head.weight" in found:
        if not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]):
            raise ValueError("tie_word_embeddings is set, yet lm_head.weight differs from model.embed_tokens.weight")
        found.discard("lm_head.weight")
    check_names(wanted, found, "the Hugging Face folder")
    shapes = expected_shapes(config)

    def build(ours: str) -> Tensor:
        parts = [tensors[their] for their in names[ours]]
        if ours in _VOCABULARY and parts[0].shape[0] == config.vocab_size:
            parts.append(parts[0].new_zeros(config.padded_vocab_size - config.vocab_size, config.n_embd))
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        if tuple(tensor.shape) != shapes[ours]:
            raise ValueError(
                f"{' + '.join(names[ours])} give shape {tuple(tensor.shape)}; the config asks for {shapes[ours]}"
            )
        return tensor

    return LazyTensors(names, build)


class LazyTensors(Mapping[str, Tensor]):
    """A read-only mapping whose tensors are made on access and not kept."""

    def __init__(self, names: Any, build: Callable[[str], Tensor]) -> None:
        self._names = dict.fromkeys(names)
        self._build = build

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._build(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def check_names(wanted: Any, found: Any, where: str) -> None:
    """Raise ValueError naming what `found` lacks of `wanted` or has beyond it."""
    missing, unknown = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing or unknown:
        parts = [f"{label} {_short(names)}" for label, names in (("lacks", missing), ("has unknown", unknown)) if names]
        raise ValueError(f"{where} does not fit the config: it {' and '.join(parts)}")


def _short(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
