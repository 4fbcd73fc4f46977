"""Llama 4's text model against transformers: chunks that cut, layers without positions, experts beside dense layers."""

import pytest
import torch
from generate_one import generate
from hf_checks import (
    TOLERANCE,
    build,
    draw_tokens,
    family_tests,
    from_folder,
    scalings,
    sizes,
    transformers,
)
from hypothesis import assume
from hypothesis import strategies as st

from lit_model.config import ModelConfig
from lit_model.hf.families import config_from_hf, config_to_hf, family_of
from lit_model.hf.io import read_folder
from lit_model.moe import MoE
from lit_model.registry import get_config


@st.composite
def configs(draw):
    fields = draw(sizes())
    n_layer = fields["n_layer"]

    def layers(*kinds):
        return tuple(draw(st.lists(st.sampled_from(kinds), min_size=n_layer, max_size=n_layer)))

    pattern, experts = layers("chunked", "full"), layers(True, True, False)
    config = ModelConfig(
        **fields,
        rope_base=draw(st.sampled_from([500000.0, 100.0])),
        rope_scaling=draw(scalings),
        rope_layers=layers(True, False),
        attention_bias=draw(st.booleans()),
        attention_pattern=pattern,
        attention_chunk_size=draw(st.sampled_from([2, 5, 8, 13])) if "chunked" in pattern else None,
        qk_norm=draw(st.sampled_from(["none", "unit"])),
        attention_temperature_scale=draw(st.sampled_from([None, 0.1, 0.7])),
        attention_temperature_floor=draw(st.sampled_from([1, 3, 10])),
        n_expert=draw(st.integers(2, 5)) if any(experts) else 0,
        n_expert_per_token=draw(st.integers(1, 2)),
        moe_intermediate_size=draw(st.sampled_from([8, 21, 48])),
        moe_layers=experts,
    )
    # The first family that can express a config is its own, and a Llama with nothing more is a Llama.
    assume(family_of(config).model_type == "llama4_text")
    return config


def router_margin(config, seed):
    """How far the choice of experts is from being another one, in router logits, for all tokens of `check_family`."""
    model = build(config, seed)
    gaps = [torch.tensor(torch.inf)]

    def look(moe, inputs):
        ordered = (inputs[0] @ moe.router.weight.T).sort(-1).values
        if config.n_expert_per_token < config.n_expert:
            k = config.n_expert_per_token
            gaps.append((ordered[..., -k] - ordered[..., -k - 1]).min())

    for module in model.modules():
        if isinstance(module, MoE):
            module.register_forward_pre_hook(look)
    with torch.no_grad():
        model(draw_tokens(config, seed=seed))
        model(draw_tokens(config, 2, 21, seed + 2)[:, :-1])
    generate(model, draw_tokens(config, 1, 9, seed + 1)[0], 8, temperature=0)
    return torch.stack(gaps).min()


# The router's logits are rounded to about 1e-7.
test_equals_transformers, test_packed_documents_equal_one_at_a_time = family_tests(
    configs(), "llama4_text", clear=lambda config, seed: router_margin(config, seed) > 1e-5
)


MINIMAL = {
    "model_type": "llama4_text",
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 16,
    "vocab_size": 100,
}


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"num_key_value_heads": 4, "head_dim": 6, "num_local_experts": 3, "num_experts_per_tok": 2},
        {"interleave_moe_layer_step": 2, "intermediate_size_mlp": 40, "no_rope_layer_interval": 2},
        {"moe_layers": [0, 3], "no_rope_layers": [0, 1, 1, 0, 1], "attention_chunk_size": 7},
        {"moe_layers": []},
        {"interleave_moe_layer_step": 6, "no_rope_layers": []},  # no layer is the sixth; as if it were absent
        {"layer_types": ["full_attention"] * 5, "use_qk_norm": False, "attn_temperature_tuning": False},
        {"attn_scale": 0.5, "floor_scale": 16, "tie_word_embeddings": True, "attention_bias": True},
        {"rope_theta": 1000.0, "router_aux_loss_coef": 0.5, "output_router_logits": True},
    ],
)
def test_defaults_are_those_of_transformers(extra):
    ours = config_from_hf({**MINIMAL, **extra})
    theirs = transformers.AutoConfig.for_model(**MINIMAL, **extra)
    layers = range(5)
    assert (ours.n_query_groups, ours.head_size) == (theirs.num_key_value_heads, theirs.head_dim)
    assert (ours.block_size, ours.norm_eps) == (theirs.max_position_embeddings, theirs.rms_norm_eps)
    assert (ours.intermediate_size, ours.moe_intermediate_size) == (theirs.intermediate_size_mlp, 48)
    assert ours.tie_embeddings == theirs.tie_word_embeddings and ours.attention_bias == theirs.attention_bias
    assert ours.rope_base == theirs.rope_parameters["rope_theta"]
    assert [ours.layer_has_experts(i) for i in layers] == [i in theirs.moe_layers for i in layers]
    assert ours.n_expert == (theirs.num_local_experts if any(ours.moe_layers) else 0)
    assert ours.n_expert_per_token == theirs.num_experts_per_tok
    assert [ours.layer_rotates(i) for i in layers] == list(map(bool, theirs.no_rope_layers))
    assert [f"{ours.layer_attention(i)}_attention" for i in layers] == theirs.layer_types
    chunked = "chunked" in ours.attention_pattern
    assert ours.attention_chunk_size == (theirs.attention_chunk_size if chunked else None)
    assert (ours.qk_norm == "unit") == theirs.use_qk_norm
    assert ours.attention_temperature_scale == (theirs.attn_scale if theirs.attn_temperature_tuning else None)
    assert ours.attention_temperature_floor == theirs.floor_scale
    assert ours == config_from_hf({**theirs.to_dict(), "architectures": None}) == config_from_hf(config_to_hf(ours))


def test_published_keys_that_change_nothing():
    old = {"cache_implementation": "hybrid", "for_llm_compressor": False, "attn_temperature_tuning": 4}
    assert config_from_hf({**MINIMAL, **old}) == config_from_hf(MINIMAL)
    assert config_from_hf({**MINIMAL, "attn_scale": 0.0}).attention_temperature_scale is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_chunk_size": None}, "attention_chunk_size is None"),
        ({"layer_types": ["sliding_attention"] * 5}, "layer_types is .*of full_attention, chunked_attention"),
        ({"no_rope_layers": [1, 0]}, r"no_rope_layers is \[1, 0\]"),
        ({"no_rope_layers": [1, 0, 2, 1, 1]}, r"no_rope_layers is \[1, 0, 2"),
        ({"no_rope_layer_interval": 0}, "no_rope_layer_interval is 0"),
        ({"interleave_moe_layer_step": 0}, "interleave_moe_layer_step is 0"),
        ({"num_local_experts": 0}, "num_local_experts is 0"),
        ({"attn_temperature_tuning": "yes"}, "attn_temperature_tuning is 'yes'"),
        ({"mlp_bias": True}, r"unknown mlp_bias \(True\)"),
    ],
)
def test_unsupported_values_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf({**MINIMAL, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shared_expert": False}, "llama4_text: shared_expert is False, supported is True"),
        ({"qk_norm": "head"}, "llama4_text: qk_norm is 'head'"),
        ({"attention_pattern": ["sliding"], "sliding_window_size": 4}, "llama4_text: sliding_window_size is 4"),
        ({"activation": "gelu"}, "llama4_text: activation is 'gelu'"),
    ],
)
def test_other_models_are_no_llama4(change, message):
    with pytest.raises(ValueError, match=message):
        config_to_hf(ModelConfig(n_expert=4, **change))


def test_the_registered_model_goes_both_ways():
    config = get_config("babylm-llama4")
    written = config_to_hf(config)
    theirs = transformers.AutoConfig.for_model(**written)
    for hf in (written, {**theirs.to_dict(), "architectures": None}):
        assert {**config_from_hf(hf).to_dict(), "name": config.name, "family": ""} == config.to_dict()


def test_a_multimodal_model_is_refused_and_its_text_model_opens(tmp_path):
    """As the message says: transformers opens the text model alone, and what it saves is read here."""
    text = {**MINIMAL, "num_hidden_layers": 2, "num_key_value_heads": 4, "head_dim": 6, "num_local_experts": 2}
    text |= {"intermediate_size_mlp": 24, "max_position_embeddings": 64, "attention_chunk_size": 4}
    text |= {"pad_token_id": None, "bos_token_id": 0, "eos_token_id": 1}
    vision = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 32}
    vision |= {"vision_output_dim": 8, "image_size": 4, "patch_size": 2, "projector_input_dim": 8}
    vision |= {"projector_output_dim": 8}
    config = transformers.AutoConfig.for_model("llama4", text_config=text, vision_config=vision)
    whole = transformers.Llama4ForConditionalGeneration(config)
    whole.save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"'llama4', a multimodal model.*text_config, model_type 'llama4_text'"):
        read_folder(tmp_path / "whole")
    alone = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    alone.save_pretrained(tmp_path / "alone")
    model = from_folder(tmp_path / "alone")
    tokens = draw_tokens(model.config)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), whole(tokens).logits, **TOLERANCE)
