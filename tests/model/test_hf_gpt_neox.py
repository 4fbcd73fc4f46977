"""GPT-NeoX against transformers: branches parallel or not, part of a head rotated, one projection head by head."""

import pytest
import torch
from hf_checks import build, check_dropout, family_tests, scalings, sizes, transformers
from hypothesis import strategies as st

from lit_model.config import ModelConfig
from lit_model.hf.families import config_from_hf, config_to_hf, family_of, tensors_to_hf
from lit_model.hf.table import tensors_from_hf

KIND = {"norm_class_name": "LayerNorm", "mlp_gated": False, "mlp_bias": True}
SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 16, "intermediate_size": 24, "block_size": 40, "vocab_size": 50}


@st.composite
def configs(draw):
    fields = {**draw(sizes(grouped=False, own_head_size=False)), **KIND}
    return ModelConfig(
        **fields,
        parallel_residual=draw(st.booleans()),
        rope_base=draw(st.sampled_from([10000.0, 500000.0])),
        rope_scaling=draw(scalings),
        rotary_size=2 * draw(st.integers(1, fields["head_size"] // 2)),
        attention_bias=draw(st.booleans()),
        activation=draw(st.sampled_from(["gelu", "gelu_tanh", "silu"])),
        dropout=draw(st.sampled_from([0.0, 0.2])),
    )


test_equals_transformers, test_packed_documents_equal_one_at_a_time = family_tests(configs(), "gpt_neox")


@pytest.mark.parametrize("parallel", [True, False])
def test_dropout_acts_where_that_of_transformers_does(parallel, tmp_path, monkeypatch):
    config = ModelConfig(**SMALL, **KIND, parallel_residual=parallel, dropout=0.2, attention_dropout=0.4)
    check_dropout(config, tmp_path / "hf", monkeypatch)


MINIMAL = {
    "model_type": "gpt_neox",
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"rotary_pct": 0.5, "rotary_emb_base": 5000},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 1.0}},
        {"use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True},
    ],
)
def test_defaults_are_those_of_transformers(extra):
    ours = config_from_hf({**MINIMAL, **extra})
    theirs = transformers.AutoConfig.for_model(**{**MINIMAL, **extra})
    rope = theirs.rope_parameters
    assert (ours.rope_base, ours.rotary_size) == (rope["rope_theta"], int(16 * rope["partial_rotary_factor"]))
    assert (ours.block_size, ours.norm_eps) == (theirs.max_position_embeddings, theirs.layer_norm_eps)
    assert (ours.parallel_residual, ours.attention_bias) == (theirs.use_parallel_residual, theirs.attention_bias)
    assert (ours.dropout, ours.attention_dropout) == (theirs.hidden_dropout, theirs.attention_dropout)
    assert (ours.tie_embeddings, ours.activation) == (theirs.tie_word_embeddings, theirs.hidden_act)
    assert ours == config_from_hf({**theirs.to_dict(), "architectures": None})


@pytest.mark.parametrize("absent", [("rope_parameters",), ("rotary_emb_base", "rotary_pct", "rope_scaling")])
def test_config_of_both_generations_is_read(absent):
    config = ModelConfig(**SMALL, **KIND, parallel_residual=True, rotary_size=6, rope_base=5e5, init="normal")
    assert config_from_hf({k: v for k, v in config_to_hf(config).items() if k not in absent}) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; supported are gelu_new, "),
        ({"rotary_emb_base": 500, "rope_parameters": {"rope_theta": 1e4}}, "rope_parameters says rope_theta 10000.0"),
        ({"rope_theta": 5e5}, "rope_theta is 500000.0; supported is 10000.0"),  # transformers does not look at it
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ({"rotary_pct": 0.2}, "rotary_size is 3"),
        ({"num_attention_heads": 0}, "n_head"),
        ({"num_key_value_heads": 2}, r"unknown num_key_value_heads \(2\)"),
        ({"hidden_size": None}, "lacks hidden_size"),
    ],
)
def test_unsupported_config_values_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf({**MINIMAL, **change})


def test_a_published_file_has_masks_and_frequencies():
    # The keys of Pythia's files.
    config = ModelConfig(**SMALL, **KIND, parallel_residual=True, rotary_size=2, attention_bias=True)
    published = {
        "architectures": ["GPTNeoXForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "gelu",
        "hidden_size": 16,
        "initializer_range": 0.02,
        "intermediate_size": 24,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 40,
        "model_type": "gpt_neox",
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.24.0",
        "use_cache": True,
        "use_parallel_residual": True,
        "vocab_size": 50,
    }
    read_config = config_from_hf(published)
    known = {"activation": "gelu", "init": "normal", "family": "gpt_neox"}
    assert read_config.to_dict() == {**config.to_dict(), **known}
    state = build(read_config).state_dict()
    stored = dict(tensors_to_hf(read_config, state))
    for i in range(config.n_layer):
        attention = f"gpt_neox.layers.{i}.attention."
        stored[attention + "bias"] = torch.ones(1, 1, 40, 40, dtype=torch.uint8).tril()
        stored[attention + "masked_bias"] = torch.tensor(-1e9)
        stored[attention + "rotary_emb.inv_freq"] = torch.ones(1)
    read = tensors_from_hf(family_of(read_config), read_config, stored)
    assert set(read) == set(state) and all(torch.equal(read[name], state[name]) for name in state)
