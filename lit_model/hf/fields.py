"""Reading and writing config.json: the parts that families share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from lit_model.config import ModelConfig, RopeScaling

# Keys that any config.json may have and that change nothing in the model: transformers' bookkeeping, notes of programs
# for training and serving, fine-tuning tasks, and settings of generation, which old files keep here. auto_map names
# Python code for a model_type that transformers knows by itself: like transformers, unless asked to trust that
# code, we compute the model_type.
BOOKKEEPING = (
    "model_type",
    "architectures",
    "*_version",
    "auto_map",
    "unsloth_*",
    "neftune_noise_alpha",
    "attn_implementation",
    "experts_implementation",
    "use_flash_attn",
    "use_flash_attention",
    "use_flash_attention_2",
    "transformers.js_config",
    "name_or_path",
    "_*",
    "dtype",
    "torch_dtype",
    "use_cache",
    "return_dict",
    "output_*",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "finetuning_task",
    "task_specific_params",
    "tokenizer_class",
    "*_token",
    "model_max_length",
    "torchscript",
    "use_bfloat16",
    "is_decoder",
    "tie_encoder_decoder",
    "cross_attention_hidden_size",
    "gradient_checkpointing",
    "chunk_size_feed_forward",
    "keys_to_ignore_at_inference",
    "*_token_id",
    "prefix",
    "max_length",
    "min_length",
    "max_new_tokens",
    "do_sample",
    "early_stopping",
    "num_beams",
    "num_beam_groups",
    "diversity_penalty",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
    "repetition_penalty",
    "length_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "num_return_sequences",
    "*_token_ids",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "remove_invalid_values",
    "exponential_decay_length_penalty",
)

# Keys of quantized weights: of transformers, compressed-tensors and MLX.
QUANTIZATION = ("quantization_config", "compression_config", "quantization")


class Fields:
    """A config.json being read: the reader takes its keys, and `finish` raises an error for those not taken."""

    def __init__(self, hf: Mapping[str, Any]) -> None:
        self._hf = hf
        self._taken: set[str] = set()

    def __contains__(self, key: str) -> bool:
        """Whether the key is present, null or not."""
        return key in self._hf

    def needed(self, *keys: str) -> tuple[Any, ...]:
        """The values of required keys. Raises ValueError naming all that are missing."""
        self._taken.update(keys)
        missing = [key for key in keys if self._hf.get(key) is None]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}")
        return tuple(self._hf[key] for key in keys)

    def get(self, key: str, default: Any) -> Any:
        """A key's value, or `default` (transformers' own for the family) where the key is absent.

        Raises ValueError for a value of another type than the default's, null included. See `optional`.
        """
        value = self.optional(key, default)
        kind: Any = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{key} is {value!r}; supported is a value like {default!r}")
        return value

    def optional(self, key: str, default: Any = None) -> Any:
        """A key's value, which may be null; `default` where the key is absent."""
        self._taken.add(key)
        return self._hf.get(key, default)

    def fixed(self, key: str, *supported: Any) -> None:
        """A key that, if present, must have one of these values. Raises ValueError naming it."""
        self._taken.add(key)
        if key in self._hf and self._hf[key] not in supported:
            raise ValueError(f"{key} is {self._hf[key]!r}; supported is {' or '.join(map(repr, supported))}")

    def refuse_quantized(self) -> None:
        """Raise ValueError for a config of quantized weights, naming the key."""
        for key in QUANTIZATION:
            self._taken.add(key)
            if self._hf.get(key) is not None:
                raise ValueError(
                    f"{key} is {self._hf[key]!r}: the weights are quantized; load them dequantized in transformers "
                    "(model.dequantize()) and save them again"
                )

    def ignored(self, *patterns: str) -> None:
        """Keys that do not change the computation, by pattern."""
        self._taken.update(key for key in self._hf if any(fnmatchcase(key, pattern) for pattern in patterns))

    def finish(self) -> None:
        """Raise ValueError naming keys that were not taken, are not bookkeeping, and hold a value."""
        self.ignored(*BOOKKEEPING)
        unknown = {k: v for k, v in self._hf.items() if k not in self._taken and v not in (None, False, "", {}, [])}
        if unknown:
            listed = ", ".join(f"{key} ({value!r})" for key, value in unknown.items())
            raise ValueError(f"unknown {listed}: remove it from config.json if it does not change the computation")


# --- Keys shared by Llama and the families after it -------------------------------------------------------------------


# Fields of ModelConfig that may have any value in all of them.
LLAMA_FREE = frozenset({"n_query_groups", "head_size", "rope_base", "rope_scaling"})


def llama_to_hf(config: ModelConfig, hidden_act: str = "silu") -> dict[str, Any]:
    """Sizes, norm, attention, rotary embedding and activation by the names of Llama, Mistral, Qwen, OLMo and Gemma."""
    return {
        "hidden_size": config.n_embd,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_query_groups,
        "head_dim": config.head_size,
        "max_position_embeddings": config.block_size,
        "rms_norm_eps": config.norm_eps,
        "attention_dropout": config.attention_dropout,
        **rope_to_hf(config),
        "hidden_act": hidden_act,
    }


def llama_from_hf(
    hf: Fields,
    *,
    block_size: int,
    norm_eps: float = 1e-6,
    n_query_groups: int | None = None,
    head_size: int | None = None,
    rope_base: float = 10000.0,
    hidden_act: str = "silu",
) -> dict[str, Any]:
    """The inverse of `llama_to_hf`. The arguments are transformers' defaults for the family, by our names.

    Only the one `hidden_act` is supported.
    """
    hf.fixed("hidden_act", hidden_act)
    n_embd, width, n_layer, n_head = hf.needed(
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"
    )
    block_size = hf.get("max_position_embeddings", block_size)
    rope = rope_from_hf(hf, block_size=block_size, base=rope_base)
    return {
        "n_embd": n_embd,
        "intermediate_size": width,
        "n_layer": n_layer,
        "n_head": n_head,
        "n_query_groups": hf.optional("num_key_value_heads", n_query_groups),  # null: as many as query heads
        "head_size": hf.optional("head_dim", head_size),  # null: n_embd / n_head
        "block_size": block_size,
        "norm_eps": hf.get("rms_norm_eps", norm_eps),
        "attention_dropout": hf.get("attention_dropout", 0.0),
        "rope_base": rope.base,
        "rope_scaling": rope.scaling,
    }


_LAYER_TYPES = {"full": "full_attention", "sliding": "sliding_attention", "chunked": "chunked_attention"}


def layer_types_to_hf(config: ModelConfig) -> list[str]:
    """The attention of each layer, in transformers' terms."""
    return [_LAYER_TYPES[config.layer_attention(i)] for i in range(config.n_layer)]


def layer_types_from_hf(
    hf: Fields, n_layer: int, default: list[str], kinds: tuple[str, ...] = ("full", "sliding")
) -> tuple[str, ...]:
    """attention_pattern from layer_types; `default`, in our words, where it is absent.

    Raises ValueError for kinds of layers that are not among the family's `kinds`.
    """
    types = hf.optional("layer_types")
    if types is None:
        return tuple(default)
    ours = {_LAYER_TYPES[kind]: kind for kind in kinds}
    unknown = [kind for kind in types if kind not in ours]
    if unknown or len(types) != n_layer:
        raise ValueError(f"layer_types is {types!r}; supported are {n_layer} (num_hidden_layers) of {', '.join(ours)}")
    return tuple(ours[kind] for kind in types)


# --- Rotary embedding ------------------------------------------------------------------------------------------------

LLAMA3_ROPE = {  # transformers' names of its scaling -> ours
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_block_size",
}


class Rope(NamedTuple):
    base: float
    scaling: RopeScaling | None
    fraction: float
    """Of a head's dimensions that are rotated."""

    def rotary_size(self, head_size: int) -> int:
        """Rounded as transformers does."""
        return int(head_size * self.fraction)


def rope_to_hf(config: ModelConfig, *, partial: bool = False) -> dict[str, Any]:
    """rope_theta and rope_scaling (transformers 4) and rope_parameters (5), which agree.

    With `partial` also partial_rotary_factor, for a family that rotates a part of each head.
    """
    parameters: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        scaling = {theirs: getattr(config.rope_scaling, ours) for theirs, ours in LLAMA3_ROPE.items()}
        parameters = {"rope_type": "llama3", **scaling}
    if partial:
        parameters["partial_rotary_factor"] = rotary_fraction(config)
    hf: dict[str, Any] = {
        "rope_theta": config.rope_base,
        "rope_scaling": parameters if config.rope_scaling is not None else None,
        "rope_parameters": {**parameters, "rope_theta": config.rope_base},
    }
    if partial:
        hf["partial_rotary_factor"] = parameters["partial_rotary_factor"]
    return hf


def rotary_fraction(config: ModelConfig) -> float:
    """The part of a head that is rotated, such that int(head_size * it) is rotary_size."""
    fraction = config.rotary_size / config.head_size
    if int(config.head_size * fraction) < config.rotary_size:  # 44 * (30 / 44) is below 30
        fraction = math.nextafter(fraction, 2)
    assert int(config.head_size * fraction) == config.rotary_size
    return fraction


def rope_from_hf(
    hf: Fields,
    *,
    block_size: int,
    base: float = 10000.0,
    fraction: float | None = None,
    base_key: str = "rope_theta",
    fraction_key: str = "partial_rotary_factor",
) -> Rope:
    """The rotary embedding from the keys of either generation; `base` and `fraction` are the defaults.

    `fraction` None: the family rotates whole heads. `base_key` and `fraction_key` are the names outside of
    rope_parameters. Raises ValueError for kinds of scaling that are not computed here, and where the two generations
    contradict each other: which of them a reader uses depends on its version.
    """
    old = dict(hf.optional("rope_scaling") or {})
    new = dict(hf.optional("rope_parameters") or {})
    for rope in (old, new):
        if "type" in rope:
            rope.setdefault("rope_type", rope.pop("type"))
            rope.pop("type", None)
    for key, value in ((base_key, "rope_theta"), (fraction_key, "partial_rotary_factor")):
        outside = hf.optional(key)
        if outside is not None:
            old[value] = outside
    differing = [key for key in old.keys() & new.keys() if old[key] != new[key]]
    if differing:
        key = differing[0]
        raise ValueError(
            f"rope_parameters says {key} {new[key]!r}, and the older keys {old[key]!r}; remove one of them"
        )
    rope = {**old, **new}
    theta = float(rope.pop("rope_theta", None) or base)
    part = rope.pop("partial_rotary_factor", None)
    if fraction is None and part not in (None, 1.0):
        raise ValueError(f"partial_rotary_factor is {part!r}; supported is 1.0")
    part = float(part if part is not None else fraction if fraction is not None else 1.0)
    kind = rope.pop("rope_type", "default")
    if kind == "default":
        if rope.keys() - {"factor"} or rope.get("factor", 1.0) != 1.0:
            raise ValueError(f"rope_parameters (or rope_scaling) of type 'default' has unsupported entries {rope!r}")
        return Rope(theta, None, part)
    if kind != "llama3":
        raise ValueError(
            f"rope_parameters (or rope_scaling): rope_type is {kind!r}; supported are 'default' and 'llama3'"
        )
    rope.setdefault("original_max_position_embeddings", block_size)
    missing, extra = sorted(LLAMA3_ROPE.keys() - rope.keys()), sorted(rope.keys() - LLAMA3_ROPE.keys())
    if missing or extra:
        raise ValueError(f"rope_parameters (or rope_scaling) of type 'llama3': missing {missing}, unsupported {extra}")
    return Rope(theta, RopeScaling(**{ours: rope[theirs] for theirs, ours in LLAMA3_ROPE.items()}), part)
