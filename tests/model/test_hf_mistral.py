"""Mistral against transformers: a window in every layer, or in none."""

import dataclasses

import pytest
from hf_checks import family_tests, scalings, sizes, transformers
from hypothesis import strategies as st

from lit_model.config import ModelConfig
from lit_model.hf.families import config_from_hf, config_to_hf, family_of


@st.composite
def configs(draw):
    return ModelConfig(
        **draw(sizes()),
        rope_base=draw(st.sampled_from([10000.0, 1000000.0])),
        rope_scaling=draw(scalings),
        attention_pattern=("sliding",),
        sliding_window_size=draw(st.sampled_from([1, 2, 5, 12, 40])),
    )


test_equals_transformers, test_packed_documents_equal_one_at_a_time = family_tests(configs(), "mistral")


MINIMAL = {
    "model_type": "mistral",
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "vocab_size": 100,
}


def test_defaults_are_those_of_transformers():
    ours = config_from_hf(MINIMAL)
    theirs = transformers.AutoConfig.for_model(**MINIMAL)
    assert ours.n_query_groups == theirs.num_key_value_heads == 8
    assert ours.block_size == theirs.max_position_embeddings and ours.norm_eps == theirs.rms_norm_eps
    assert ours.sliding_window_size == theirs.sliding_window == 4096
    assert ours == config_from_hf({**theirs.to_dict(), "architectures": None})


def test_without_a_window_it_computes_a_llama_and_stays_a_mistral():
    config = config_from_hf({**MINIMAL, "sliding_window": None})
    assert config.attention_pattern == ("full",) and family_of(config).model_type == "mistral"
    assert family_of(dataclasses.replace(config, family="")).model_type == "llama"


def test_layers_that_differ_have_no_family():
    config = ModelConfig(attention_pattern=("sliding", "full"), sliding_window_size=3)
    with pytest.raises(ValueError, match="mistral: attention_pattern is .*supported is one kind for all layers"):
        config_to_hf(config)
