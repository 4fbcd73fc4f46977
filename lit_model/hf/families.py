"""Which family of transformers a model belongs to, and the conversion in both directions.

How to add a family, as `lit_model/hf/NAME.py` (see llama.py, and qwen3.py for a variant of it):

1. `_config_to_hf(config)`: the family's keys of config.json. `config_to_hf` here adds those that all families
   share: model_type, architectures, vocab_size, tie_word_embeddings, initializer_range, dtype, token ids, use_cache.
2. `_config_from_hf(hf)`: ModelConfig's fields from a `Fields`. Take every key that the family's configuration class in
   transformers knows: `needed` keys; `get` with transformers' default for absent ones (`optional` where null means
   something); `fixed` for those with one supported value; `ignored` for those that change nothing. A key left over is
   reported by its name. `config_from_hf` here adds name, vocab_size, tie_embeddings, init_std, init and the fields
   that the family fixes.
3. `names` and `block`: the tables of names; and `transforms`, of table.py, for tensors that differ in more than that.
4. `FAMILY = Family(...)`: which fields of ModelConfig are free and which are fixed. Whatever is not named must have its
   default, so that a field added later is an obstacle until a family declares support.
5. A line in FAMILIES, and `tests/model/test_hf_NAME.py` with the checks of tests/harness/hf_checks.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from lit_model.config import ModelConfig, check_size
from lit_model.hf import gemma2, gpt2, gpt_neox, gptj, llama, llama4, mistral, olmo2, qwen3, table
from lit_model.hf.family import Family
from lit_model.hf.fields import Fields

# A config that was not imported from one belongs to the first that can express it.
FAMILIES = (
    llama.FAMILY,
    mistral.FAMILY,
    qwen3.FAMILY,
    olmo2.FAMILY,
    gemma2.FAMILY,
    llama4.FAMILY,
    gpt2.FAMILY,
    gptj.FAMILY,
    gpt_neox.FAMILY,
)


def family_from_hf(hf: Mapping[str, Any]) -> Family:
    """The family of a config.json. Raises ValueError for one that is not supported."""
    kind = hf.get("model_type")
    for family in FAMILIES:
        if family.model_type == kind:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    if "text_config" in hf:
        inner = (hf["text_config"] or {}).get("model_type")
        raise ValueError(
            f"model_type is {kind!r}, a multimodal model; export its text model "
            f"(text_config, model_type {inner!r}) with transformers' save_pretrained. Supported are {known}"
        )
    raise ValueError(f"model_type is {kind!r}; supported are {known}")


def family_of(config: ModelConfig) -> Family:
    """The family a config was imported from if it can express it, else the first that can.

    Raises ValueError naming the obstacle of each family.
    """
    for family in sorted(FAMILIES, key=lambda family: family.model_type != config.family):
        if family.obstacle(config) is None:
            return family
    obstacles = "; ".join(f"{family.model_type}: {family.obstacle(config)}" for family in FAMILIES)
    raise ValueError(f"no family of transformers can express model {config.name or '(unnamed)'}. {obstacles}")


def config_to_hf(
    config: ModelConfig, *, bos_id: int | None = None, eos_id: int | None = None, dtype: str = "float32"
) -> dict[str, Any]:
    """config.json for transformers 4 and 5: where their keys differ, both are written, with the same values.

    The vocabulary is the unpadded one. Dropout is written where the family has it; it concerns training only.
    """
    family = family_of(config)
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": None,  # where a family has one by default, that token's embedding would get no gradient
        "use_cache": True,
        "torch_dtype": dtype,
        "dtype": dtype,
        **family.config_to_hf(config),
    }


def config_from_hf(hf: Mapping[str, Any], name: str = "") -> ModelConfig:
    """The config behind a config.json of either generation.

    Raises ValueError naming the key for anything that this model does not compute, or that is missing or unknown. The
    vocabulary is padded to a multiple of 64 here as everywhere; `table.tensors_from_hf` adds the rows.
    """
    family = family_from_hf(hf)
    architectures = hf.get("architectures")
    if architectures and family.architecture not in architectures:
        raise ValueError(f"architectures is {architectures!r}; supported is [{family.architecture!r}]")
    fields = Fields(hf)
    fields.fixed("is_encoder_decoder", False)
    fields.fixed("is_causal", True, None)
    fields.refuse_quantized()
    (vocab_size,) = fields.needed("vocab_size")
    for key in ("num_hidden_layers", "n_layer"):  # before anything is made for each layer
        if hf.get(key) is not None:
            check_size("n_layer", hf[key])
    shared = {
        "name": name,
        "family": family.model_type,
        "vocab_size": vocab_size,
        "tie_embeddings": fields.get("tie_word_embeddings", family.tied),
        "init_std": fields.get("initializer_range", 0.02),
        "init": family.init,
    }
    own = family.config_from_hf(fields)
    fields.finish()
    return ModelConfig(**shared, **family.fixed, **own)


def tensors_to_hf(config: ModelConfig, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the config's family from ours; see `table.tensors_to_hf`."""
    return table.tensors_to_hf(family_of(config), config, tensors)
