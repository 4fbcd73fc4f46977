"""Checkpoints of TinyLlama, LLäMmlein, lit-gpt and litgpt: their configs, names, tensors -> ours. No input or output.

All of them are the same model under several names (from the sources of TinyLlama and LLäMmlein, and litgpt 0.5.13):

- `attn.attn` (before litgpt 0.5) holds, for each of G query groups, its H / G query heads, its key and its value head;
  `attn.qkv` (since) holds all queries, all keys, all values, as ours does.
- The gated MLP is `mlp.fc_1`, `fc_2`, `proj` (lit-gpt), `mlp.swiglu.w1`, `w2`, `w3` (TinyLlama, whose module is from
  xformers) or `mlp.w1`, `w2`, `w3` (LLäMmlein): gate, up and down, in this order.

An optimizer's moments have the shapes of the parameters, and are converted the same way.

Dimensions: C n_embd, H query heads, G query groups, D head size, R rows of the vocabulary in the file.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lit_model.config import ModelConfig, RopeScaling
from lit_model.hf.fields import LLAMA3_ROPE
from lit_model.hf.table import LazyTensors, check_names, first_names, plain_name
from lit_model.model import parameter_shapes
from lit_model.registry import MODELS, get_config

_LAYER = re.compile(r"transformer\.h\.(0|[1-9]\d*)\.(.+)\.(weight|bias)")

EMBEDDING, HEAD = "transformer.wte.weight", "lm_head.weight"

# Inside a block, in the order in which their modules were built: their names -> ours.
_BLOCK = {
    "norm_1": "norm_1",
    "attn.attn": "attn.qkv",
    "attn.qkv": "attn.qkv",
    "attn.proj": "attn.proj",
    "norm_2": "norm_2",
    "mlp.fc_1": "mlp.fc_1",
    "mlp.swiglu.w1": "mlp.fc_1",
    "mlp.w1": "mlp.fc_1",
    "mlp.fc_2": "mlp.fc_2",
    "mlp.swiglu.w2": "mlp.fc_2",
    "mlp.w2": "mlp.fc_2",
    "mlp.proj": "mlp.proj",
    "mlp.swiglu.w3": "mlp.proj",
    "mlp.w3": "mlp.proj",
}
_ORDER = {ours: place for place, ours in enumerate(_BLOCK.values())}

# Names of the trainers' own lists of models -> the registry's; the rows of the file choose where there are several.
_ALIASES = {"tiny_LLaMA_1b": ("TinyLlama_1.1B", "LLaMmlein_1B"), "tiny_LLaMA_120M": ("LLaMmlein_120M",)}

# --- Configs ---------------------------------------------------------------------------------------------------------

# Fields that change the computation: the supported values, and litgpt's default where the field is absent.
_FIXED: dict[str, tuple[tuple[Any, ...], Any]] = {
    "norm_class_name": (("RMSNorm", "FusedRMSNorm"), "LayerNorm"),
    "mlp_class_name": (("LLaMAMLP", "xformersfree_LLaMAMLP"), "GptNeoxMLP"),
    "rotary_percentage": ((1.0,), 0.25),
    "parallel_residual": ((False,), True),
    "shared_attention_norm": ((False,), False),
    "norm_1": ((True,), True),
    "norm_2": ((True,), True),
    "norm_qk": ((False,), False),
    "post_attention_norm": ((False,), False),
    "post_mlp_norm": ((False,), False),
    "attn_bias": ((False,), False),
    "attention_scores_scalar": ((None,), None),
    "attention_logit_softcapping": ((None,), None),
    "sliding_window_size": ((None,), None),
    "latent_attention": ((None,), None),
    "rope_condense_ratio": ((1,), 1),
    "rope_interleave": ((False,), False),
    "rope_local_base_freq": ((None,), None),
    "rope_indices": ((None,), None),
    "n_expert": ((0,), 0),
    "scale_embeddings": ((False,), False),
    "lm_head_bias": ((False,), False),
    "final_logit_softcapping": ((None,), None),
}
# Names of fields before litgpt's first release.
_OLD_FIELDS = {
    "_norm_class": "norm_class_name",
    "_mlp_class": "mlp_class_name",
    "condense_ratio": "rope_condense_ratio",
}
_SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "intermediate_size")
_READ = {*_SIZES, "name", "n_query_groups", "head_size", "padded_vocab_size", "padding_multiple", "norm_eps"} | {
    "rope_base",
    "rope_adjustments",
    "bias",
}
# Without effect, given the values required above.
_WITHOUT_EFFECT = {
    "org",
    "hf_config",
    "norm_qk_type",
    "sliding_window_indices",
    "gelu_approximate",
    "moe_intermediate_size",
    "n_shared_expert",
    "n_expert_groups",
    "n_topk_groups",
    "n_topk_scores_per_group",
    "n_expert_per_token",
    "first_k_dense_replace",
    "routed_scaling_factor",
    "norm_topk_prob",
}


def config_from_litgpt(fields: Mapping[str, Any]) -> ModelConfig:
    """The config behind a model_config.yaml (litgpt) or lit_config.json (lit-gpt).

    Raises ValueError naming the field for anything but a Llama, and for missing and unknown fields.
    """
    both = sorted(old for old, new in _OLD_FIELDS.items() if old in fields and new in fields)
    if both:
        raise ValueError(f"both {both[0]} and {_OLD_FIELDS[both[0]]} are given, an old and a new name of one field")
    fields = {_OLD_FIELDS.get(key, key): value for key, value in fields.items()}
    for field, (supported, default) in _FIXED.items():
        value = fields.get(field, default)
        if value not in supported:
            absent = "" if field in fields else " (litgpt's default: the field is absent)"
            known = " or ".join(map(repr, supported))
            raise ValueError(f"{field} is {value!r}{absent}; supported is {known}: only Llamas are imported")
    unknown = sorted(set(fields) - set(_FIXED) - _READ - _WITHOUT_EFFECT)
    if unknown:
        raise ValueError(
            f"unknown field {', '.join(unknown)}: remove it from the file if it does not change the computation"
        )
    missing = [field for field in _SIZES if fields.get(field) is None]
    if missing:
        raise ValueError(f"field {', '.join(missing)} is missing")
    bias = fields.get("bias", True)
    return ModelConfig(
        name=str(fields.get("name") or ""),
        **{field: fields[field] for field in _SIZES},
        n_query_groups=fields.get("n_query_groups"),  # type: ignore[arg-type]
        head_size=fields.get("head_size"),  # type: ignore[arg-type]
        norm_eps=fields.get("norm_eps", 1e-5),
        rope_base=float(fields.get("rope_base", 10000)),
        rope_scaling=_rope_scaling(fields.get("rope_adjustments")),
        attention_bias=bias,
        mlp_bias=bias,
    )


def _rope_scaling(adjustments: Mapping[str, Any] | None) -> RopeScaling | None:
    if not adjustments:
        return None
    names = {**LLAMA3_ROPE, "original_max_seq_len": LLAMA3_ROPE["original_max_position_embeddings"]}
    del names["original_max_position_embeddings"]
    if set(adjustments) != set(names):
        raise ValueError(f"rope_adjustments is {dict(adjustments)!r}; supported are those of Llama 3: {list(names)}")
    return RopeScaling(**{names[key]: value for key, value in adjustments.items()})


def config_by_name(name: str, rows: int) -> ModelConfig:
    """A registered model, or one by the name it had in TinyLlama's or LLäMmlein's trainer.

    Args:
        rows: R, which distinguishes models of the same name.
    """
    if name not in _ALIASES:
        return get_config(name)
    candidates = [MODELS[alias] for alias in _ALIASES[name]]
    return next((c for c in candidates if c.padded_vocab_size == rows), candidates[0])


def fit_vocabulary(config: ModelConfig, rows: int, vocab_size: int | None) -> ModelConfig:
    """The config with the file's vocabulary: `vocab_size` ids if it is given, R rows, padded to the config's multiple.

    Raises ValueError if the file has fewer rows than ids.
    """
    ids = vocab_size if vocab_size is not None else config.vocab_size
    if ids > rows:
        raise ValueError(
            f"the embedding has {rows} rows, the model {ids} ids: give the vocabulary size with --vocab_size"
            if vocab_size is None
            else f"--vocab_size {vocab_size}: the embedding has only {rows} rows"
        )
    multiple = config.padding_multiple
    return dataclasses.replace(config, vocab_size=ids, padded_vocab_size=-(-rows // multiple) * multiple)


# --- Names -----------------------------------------------------------------------------------------------------------


def match_names(names: Iterable[str]) -> dict[str, str]:
    """Our names -> those of the file, in the order of the model's parameters there.

    That order is the one in which its modules were built: head, embedding, blocks, last norm; it gives an optimizer's
    numbers their meaning. Raises ValueError naming unknown and repeated parameters.
    """
    found: dict[str, str] = {}
    unknown = []
    for name in names:
        ours = _our_name(plain_name(name))
        if ours is None:
            unknown.append(name)
        elif ours in found:
            raise ValueError(f"{found[ours]} and {name} are both {ours}")
        else:
            found[ours] = name
    if unknown:
        raise ValueError(
            f"unknown parameter {first_names(unknown)}: no Llama of TinyLlama, LLäMmlein, lit-gpt or litgpt has it"
        )
    return {ours: found[ours] for ours in sorted(found, key=_place)}


def _our_name(name: str) -> str | None:
    if name in (EMBEDDING, HEAD, "transformer.ln_f.weight"):
        return name
    match = _LAYER.fullmatch(name)
    if match is None or match[2] not in _BLOCK or (match[2].startswith("norm") and match[3] == "bias"):
        return None
    return f"transformer.h.{match[1]}.{_BLOCK[match[2]]}.{match[3]}"


def _place(ours: str) -> tuple[int, int, int, bool]:
    match = _LAYER.fullmatch(ours)
    if match is not None:
        return 2, int(match[1]), _ORDER[match[2]], match[3] == "bias"
    return {HEAD: 0, EMBEDDING: 1, "transformer.ln_f.weight": 3}[ours], 0, 0, False


# --- Tensors ---------------------------------------------------------------------------------------------------------


def ungroup(qkv: Tensor, config: ModelConfig) -> Tensor:
    """`attn.attn` -> `attn.qkv`: rows (G, H/G queries + key + value, D) -> H query, G key, G value heads of D rows."""
    G, D = config.n_query_groups, config.head_size
    grouped = qkv.reshape(G, config.n_head // G + 2, D, *qkv.shape[1:])
    q, k, v = grouped[:, :-2], grouped[:, -2], grouped[:, -1]
    return torch.cat([part.reshape(-1, *qkv.shape[1:]) for part in (q, k, v)])  # ((H + 2 G) D, ...)


def legacy_tensors(
    config: ModelConfig, names: Mapping[str, str], tensors: Mapping[str, Tensor], where: str
) -> Mapping[str, Tensor]:
    """Our names -> tensors, each built when it is asked for. For parameters, and for the moments of an optimizer.

    Rows that pad the vocabulary are zeros: they get no probability and no gradient.

    Args:
        names: ours -> those of the file, see `match_names`.
        tensors: by the names of the file.
        where: a name for the tensors in error messages.

    Raises ValueError at once, naming missing, unknown and misshapen tensors.
    """
    shapes = parameter_shapes(config)
    check_names(shapes, names, where)
    for ours, theirs in names.items():
        wanted, shape = shapes[ours], tuple(tensors[theirs].shape)
        padded = ours in (EMBEDDING, HEAD) and shape[1:] == wanted[1:] and config.vocab_size <= shape[0] <= wanted[0]
        if shape != wanted and not padded:
            raise ValueError(f"{where}: {theirs} has shape {shape}; the model expects {wanted}")

    def build(ours: str) -> Tensor:
        tensor = tensors[names[ours]]
        if ".attn.attn." in names[ours]:
            tensor = ungroup(tensor, config)
        if tensor.shape[0] < shapes[ours][0]:
            tensor = torch.cat([tensor, tensor.new_zeros(shapes[ours][0] - tensor.shape[0], *tensor.shape[1:])])
        return tensor

    return LazyTensors(shapes, build)
