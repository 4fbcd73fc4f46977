"""Gemma 2 against transformers: soft-caps that bend, windows that cut, offset norms on both sides."""

import pytest
from hf_checks import build, family_tests, scalings, sizes, to_transformers, transformers
from hypothesis import strategies as st

from lit_eval.agreement import transformers_span_losses
from lit_model.config import ModelConfig
from lit_model.hf.families import config_from_hf, config_to_hf
from lit_model.registry import get_config

GEMMA2 = {
    "norm_offset": 1.0,
    "post_norm": True,
    "activation": "gelu_tanh",
    "scale_embeddings": True,
}


@st.composite
def configs(draw):
    fields = draw(sizes())
    pattern = draw(st.sampled_from([("sliding", "full"), ("full", "sliding"), ("sliding",), ("full",)]))
    pattern = pattern[: fields["n_layer"]]
    return ModelConfig(
        **fields,
        **GEMMA2,
        rope_base=draw(st.sampled_from([10000.0, 500.0])),
        rope_scaling=draw(scalings),
        attention_bias=draw(st.booleans()),
        attention_scores_scalar=draw(st.sampled_from([1, 7, 24, 256])),
        attention_logit_softcapping=draw(st.sampled_from([None, 0.5, 2.0, 50.0])),
        final_logit_softcapping=draw(st.sampled_from([None, 2.0, 30.0])),
        attention_pattern=pattern,
        sliding_window_size=draw(st.sampled_from([1, 4, 11])) if "sliding" in pattern else None,
    )


test_equals_transformers, test_packed_documents_equal_one_at_a_time = family_tests(configs(), "gemma2")


def test_a_lost_soft_cap_is_noticed(tmp_path, monkeypatch):
    """transformers before 5.21 takes SDPA, which has no soft-cap; verify_hf.py refuses there."""
    hf = to_transformers(build(ModelConfig(**GEMMA2, attention_logit_softcapping=1.0)), tmp_path, attention=None)
    since = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    assert hf.config._attn_implementation == ("eager" if since >= (5, 21) else "sdpa")
    monkeypatch.setattr("transformers.models.gemma2.modeling_gemma2.Gemma2PreTrainedModel._supports_sdpa", True)
    with pytest.raises(ValueError, match="with SDPA, which leaves out its soft-cap of attention scores: install"):
        transformers_span_losses(tmp_path, None, None)


MINIMAL = {
    "model_type": "gemma2",
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "vocab_size": 100,
}


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"num_key_value_heads": 8, "head_dim": 6, "tie_word_embeddings": False},
        {"sliding_window": 7, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
        {"layer_types": ["full_attention"] * 3},
        {"attn_logit_softcapping": None, "final_logit_softcapping": None, "query_pre_attn_scalar": 144},
        {"cache_implementation": "hybrid", "hidden_act": "gelu_pytorch_tanh", "sliding_window_size": 4096},
    ],
)
def test_defaults_are_those_of_transformers(extra):
    ours = config_from_hf({**MINIMAL, **extra})
    theirs = transformers.AutoConfig.for_model(**MINIMAL, **extra)
    assert (ours.n_query_groups, ours.head_size) == (theirs.num_key_value_heads, theirs.head_dim)
    assert (ours.block_size, ours.norm_eps) == (theirs.max_position_embeddings, theirs.rms_norm_eps)
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.attention_scores_scalar == theirs.query_pre_attn_scalar
    assert ours.attention_logit_softcapping == theirs.attn_logit_softcapping
    assert ours.final_logit_softcapping == theirs.final_logit_softcapping
    assert [f"{ours.layer_attention(i)}_attention" for i in range(3)] == theirs.layer_types
    assert ours.sliding_window_size == (theirs.sliding_window if "sliding" in ours.attention_pattern else None)
    assert ours == config_from_hf({**theirs.to_dict(), "architectures": None}) == config_from_hf(config_to_hf(ours))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ({"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
        ({"hidden_act": "silu"}, "hidden_act is 'silu'"),
        ({"sliding_window": None}, "sliding_window is None"),
        ({"sliding_window_size": 5}, "sliding_window_size is 5; supported is 4096"),
        ({"layer_types": ["chunked_attention"] * 3}, "layer_types is .*of full_attention, sliding_attention"),
        ({"mlp_bias": True}, r"unknown mlp_bias \(True\)"),
    ],
)
def test_unsupported_values_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf({**MINIMAL, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_scores_scalar": 7.5}, "gemma2: attention_scores_scalar is 7.5, supported is a whole number"),
        ({"attention_pattern": ["chunked"], "attention_chunk_size": 4}, "gemma2: attention_chunk_size is 4"),
        ({"post_norm": False}, "gemma2: post_norm is False"),
        ({"qk_norm": "head"}, "gemma2: qk_norm is 'head'"),
    ],
)
def test_other_models_are_no_gemma(change, message):
    with pytest.raises(ValueError, match=message):
        config_to_hf(ModelConfig(**{**GEMMA2, **change}))


def test_the_head_size_is_the_scalar_where_none_is_given():
    assert config_to_hf(ModelConfig(**GEMMA2))["query_pre_attn_scalar"] == 16


def test_the_registered_model_has_the_defaults_of_transformers():
    ours = get_config("babylm-gemma2")
    theirs = transformers.AutoConfig.for_model(
        "gemma2", hidden_size=768, num_hidden_layers=12, vocab_size=48000, max_position_embeddings=128
    )
    fields = {**config_from_hf({**theirs.to_dict(), "architectures": None}).to_dict(), "name": ours.name}
    assert fields == {**ours.to_dict(), "family": "gemma2"}
