"""A family of models in transformers: its names, its fields, and the configs it can express."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from lit_model.config import ModelConfig
from lit_model.hf.fields import Fields

# Names in old files, of any family, that hold no parameters.
BUFFERS = ("*.rotary_emb.inv_freq",)


class Transform(Protocol):
    """How one tensor of ours becomes theirs and back: cut, joined, rows moved; no arithmetic, so nothing is rounded.

    The two are exact inverses, for weights and biases, and on the meta device too.
    """

    def to_theirs(self, tensor: Tensor) -> Sequence[Tensor]: ...

    def to_ours(self, parts: Sequence[Tensor]) -> Tensor: ...


class Entry(NamedTuple):
    """A row of the table of names: one tensor of ours is one or more of theirs, never several of ours one of theirs."""

    ours: str
    theirs: tuple[str, ...]
    transform: Transform


@dataclass(frozen=True, kw_only=True)
class Family:
    """A `model_type` of transformers. lit_model/hf/families.py says how to add one."""

    model_type: str
    """As config.json names it."""
    architecture: str
    """The class that `AutoModelForCausalLM` opens."""
    free: Set[str]
    """Fields of ModelConfig that may have any value, beyond those that are free in every family (ALWAYS_FREE)."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ModelConfig that have one value. All fields neither free nor fixed must have ModelConfig's default."""
    config_to_hf: Callable[[ModelConfig], dict[str, Any]]
    """The family's keys of config.json; `families.config_to_hf` adds those common to all families."""
    config_from_hf: Callable[[Fields], dict[str, Any]]
    """ModelConfig's fields from config.json, but for those that `families.config_from_hf` adds. It must take every key
    that the family knows: any other key is an error."""
    names: Mapping[str, str]
    """Their names, by ours, of the modules around the blocks and, under `transformer.h`, of the list of blocks."""
    block: Mapping[str, str | Sequence[str]]
    """Their names, by ours, of the modules in a block; three for our fused queries, keys and values where theirs are
    separate. Modules that a config lacks are skipped. Tensors are written in this order."""
    transforms: Callable[[ModelConfig, int], Mapping[str, Transform]] = lambda config, layer: {}
    """Of modules in a layer's block, by our name, that differ in more than the name (and in being separate)."""
    further_obstacle: Callable[[ModelConfig], str | None] = lambda config: None
    """A limit that `free` and `fixed` cannot express, as a sentence."""
    tied: bool = False
    """Whether an absent `tie_word_embeddings` means that the head is tied."""
    init: str = "normal"
    """Initialisation scheme of a model that is imported and then trained from scratch."""
    buffers: tuple[str, ...] = ()
    """Patterns of names in old files that hold no parameters, beyond BUFFERS."""

    @property
    def prefix(self) -> str:
        """Of the model below the head. Files of that model alone lack it."""
        return self.names["transformer.h"].partition(".")[0] + "."

    @property
    def head(self) -> str:
        """Their name of the head's matrix."""
        return self.names["lm_head"] + ".weight"

    def is_buffer(self, name: str) -> bool:
        """Whether a name in a file is that of a buffer, which holds no parameters."""
        return any(fnmatchcase(name, pattern) for pattern in (*BUFFERS, *self.buffers))

    def obstacle(self, config: ModelConfig) -> str | None:
        """Why the family cannot express a config, as a sentence; None if it can."""
        defaults = _defaults(config)
        for name, default in defaults.items():
            value, wanted = getattr(config, name), self.fixed.get(name, default)
            if name not in self.free and value != wanted:
                return f"{name} is {value!r}, supported is {wanted!r}"
        return self.further_obstacle(config)


# Sizes, and settings of training alone, which a family without these fields need not carry.
ALWAYS_FREE = {
    "name",
    "family",
    "n_layer",
    "n_head",
    "n_embd",
    "intermediate_size",
    "block_size",
    "vocab_size",
    "padding_multiple",
    "padded_vocab_size",
    "norm_eps",
    "tie_embeddings",
    "dropout",
    "attention_dropout",
    "init",
    "init_std",
}


def _defaults(config: ModelConfig) -> dict[str, Any]:
    """The default of each field for these sizes, without fields that have no effect."""
    defaults = {field.name: field.default for field in fields(ModelConfig) if field.name not in ALWAYS_FREE}
    defaults["n_query_groups"] = config.n_head
    defaults["head_size"] = config.n_embd // config.n_head
    defaults["rotary_size"] = config.head_size if config.position_embedding == "rope" else 0
    defaults["moe_intermediate_size"] = config.intermediate_size
    defaults["moe_layers"] = (config.n_expert > 0,)
    without_effect = [] if config.n_expert else ["n_expert_per_token", "moe_intermediate_size", "shared_expert"]
    if config.position_embedding != "rope":
        without_effect += ["rope_base", "rope_scaling"]
    if config.attention_temperature_scale is None:
        without_effect.append("attention_temperature_floor")
    return {field: default for field, default in defaults.items() if field not in without_effect}
