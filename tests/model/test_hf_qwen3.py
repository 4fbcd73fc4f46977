"""Qwen 3 against transformers: normed heads, biases, layers with and without a window."""

import pytest
from hf_checks import family_tests, scalings, sizes, transformers
from hypothesis import strategies as st

from lit_model.config import ModelConfig
from lit_model.hf.families import config_from_hf, config_to_hf


@st.composite
def configs(draw):
    pattern = draw(st.lists(st.sampled_from(["full", "sliding"]), min_size=1, max_size=3))
    fields = {  # The norm of a head of two can divide by almost nothing.
        **draw(sizes().filter(lambda drawn: drawn["head_size"] > 2)),
        "n_layer": 3,
    }
    return ModelConfig(
        **fields,
        rope_base=draw(st.sampled_from([10000.0, 1000000.0])),
        rope_scaling=draw(scalings),
        attention_bias=draw(st.booleans()),
        qk_norm="head",
        attention_pattern=tuple(pattern),
        sliding_window_size=draw(st.sampled_from([1, 5, 12])) if "sliding" in pattern else None,
    )


test_equals_transformers, test_packed_documents_equal_one_at_a_time = family_tests(configs(), "qwen3")


MINIMAL = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "vocab_size": 100,
}


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"num_key_value_heads": None, "head_dim": 8},
        {"sliding_window": 7, "max_window_layers": 2},  # not used without use_sliding_window
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
        {"use_sliding_window": True, "max_window_layers": 0},
        {"use_sliding_window": True},
        {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"] * 2},
    ],
)
def test_defaults_are_those_of_transformers(extra):
    ours = config_from_hf({**MINIMAL, **extra})
    theirs = transformers.AutoConfig.for_model(**MINIMAL, **extra)
    assert (ours.n_query_groups, ours.head_size) == (theirs.num_key_value_heads, theirs.head_dim)
    assert (ours.block_size, ours.norm_eps) == (theirs.max_position_embeddings, theirs.rms_norm_eps)
    assert [f"{ours.layer_attention(i)}_attention" for i in range(4)] == theirs.layer_types
    assert ours == config_from_hf({**theirs.to_dict(), "architectures": None})
    # What is written is read alike with and without layer_types, where that can say it.
    written = config_to_hf(ours)
    if ours.attention_pattern != ("full", "sliding"):
        del written["layer_types"]
    assert config_from_hf(written) == ours


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["sliding_attention"] * 4}, "use_sliding_window or sliding_window is not set"),
        ({"layer_types": ["full_attention"] * 3}, r"layer_types is .*supported are 4 \(num_hidden_layers\)"),
        ({"layer_types": ["linear_attention"] * 4}, "layer_types is .*linear_attention"),
    ],
)
def test_unsupported_layers_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf({**MINIMAL, **change})
