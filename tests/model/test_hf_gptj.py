"""GPT-J against transformers: one norm for two parallel branches, part of a head rotated in pairs, a head with bias."""

import pytest
import torch
from hf_checks import build, check_dropout, family_tests, sizes, transformers
from hypothesis import strategies as st

from lit_model.config import ModelConfig
from lit_model.hf.families import config_from_hf, config_to_hf, family_of, tensors_to_hf
from lit_model.hf.table import tensors_from_hf
from lit_model.model import parameter_shapes
from lit_model.registry import get_config

KIND = {
    "norm_class_name": "LayerNorm",
    "parallel_residual": True,
    "shared_attention_norm": True,
    "mlp_gated": False,
    "mlp_bias": True,
    "lm_head_bias": True,
}
SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 16, "intermediate_size": 24, "block_size": 40, "vocab_size": 50}


@st.composite
def configs(draw):
    fields = {**draw(sizes(grouped=False, own_head_size=False)), **KIND}
    return ModelConfig(
        **fields,
        rotary_size=2 * draw(st.integers(1, fields["head_size"] // 2)),
        activation=draw(st.sampled_from(["gelu_tanh", "gelu", "silu"])),
        dropout=draw(st.sampled_from([0.0, 0.2])),
    )


test_equals_transformers, test_packed_documents_equal_one_at_a_time = family_tests(configs(), "gptj")


def test_dropout_acts_where_that_of_transformers_does(tmp_path, monkeypatch):
    config = ModelConfig(**SMALL, **KIND, rotary_size=4, dropout=0.2, attention_dropout=0.4)
    check_dropout(config, tmp_path / "hf", monkeypatch)


def test_the_registry_model_has_the_published_size():
    config = get_config("gpt-j-97M")
    with torch.device("meta"):
        hf = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**config_to_hf(config, bos_id=1, eos_id=2))
        )
    count = sum(p.numel() for p in hf.parameters())  # the tied matrix once
    assert count == sum(torch.Size(shape).numel() for shape in parameter_shapes(config).values())
    assert round(count / 1e6, 1) == 97.3


MINIMAL = {"model_type": "gptj", "n_embd": 128, "n_layer": 2, "n_head": 2, "vocab_size": 100}


@pytest.mark.parametrize("extra", [{}, {"n_inner": 50}, {"tie_word_embeddings": True}, {"rotary_dim": 8}])
def test_defaults_are_those_of_transformers(extra):
    ours, theirs = config_from_hf({**MINIMAL, **extra}), transformers.AutoConfig.for_model(**MINIMAL, **extra)
    assert (ours.block_size, ours.norm_eps) == (theirs.n_positions, theirs.layer_norm_epsilon)
    assert (ours.dropout, ours.attention_dropout) == (theirs.embd_pdrop, theirs.attn_pdrop)
    assert ours.intermediate_size == (theirs.n_inner or 4 * 128) and ours.rotary_size == theirs.rotary_dim
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours == config_from_hf({**theirs.to_dict(), "architectures": None})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rotary_dim": None}, "rotary_dim is None; supported is a value like 64"),
        ({"rotary_dim": 66}, "rotary_size is 66"),
        ({"rotary": False}, "rotary is False; supported is True"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False; supported is True"),
        ({"activation_function": "relu"}, "activation_function is 'relu'; supported are gelu_new, "),
        ({"embd_pdrop": 0.1}, r"embd_pdrop is 0.1 and resid_pdrop 0.0; supported are equal ones"),
        ({"n_embd": None}, "lacks n_embd"),
        ({"rope_theta": 5e5}, r"unknown rope_theta \(500000.0\)"),
    ],
)
def test_unsupported_config_values_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf({**MINIMAL, **change})


def test_another_base_belongs_to_no_family():
    config = ModelConfig(**SMALL, **KIND, rope_base=5e5)
    with pytest.raises(ValueError, match=r"gptj: rope_base is 500000.0, supported is 10000.0"):
        family_of(config)


def test_an_old_file_has_masks():
    config = ModelConfig(**SMALL, **KIND, rotary_size=4, init="normal")
    old = {
        **config_to_hf(config),
        "gradient_checkpointing": False,
        "rotary": True,
        "scale_attn_weights": True,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
    }
    assert config_from_hf(old) == config
    state = build(config).state_dict()
    stored = dict(tensors_to_hf(config, state))
    for i in range(config.n_layer):
        stored[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 40, 40, dtype=torch.bool).tril()
        stored[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e9)
    read = tensors_from_hf(family_of(config), config, stored)
    assert set(read) == set(state) and all(torch.equal(read[name], state[name]) for name in state)
