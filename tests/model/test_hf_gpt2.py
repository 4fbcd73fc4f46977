"""GPT-2 against transformers: learned positions, transposed matrices, dropout, old files."""

import pytest
import torch
from hf_checks import build, check_dropout, family_tests, sizes, transformers
from hypothesis import strategies as st

from lit_model.config import ModelConfig
from lit_model.hf.families import config_from_hf, config_to_hf, family_of, tensors_to_hf
from lit_model.hf.table import tensors_from_hf
from lit_model.mlp import activation
from lit_model.model import parameter_shapes
from lit_model.registry import get_config

KIND = {
    "norm_class_name": "LayerNorm",
    "position_embedding": "learned",
    "mlp_gated": False,
    "attention_bias": True,
    "mlp_bias": True,
}
SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 16, "intermediate_size": 24, "block_size": 40, "vocab_size": 50}


@st.composite
def configs(draw):
    fields = draw(sizes(grouped=False, own_head_size=False))
    fields["head_size"] += draw(st.integers(0, 1))  # nothing rotates, so it may be odd
    fields["n_embd"] = fields["n_head"] * fields["head_size"]
    return ModelConfig(
        **{**fields, **KIND},
        activation=draw(st.sampled_from(["gelu_tanh", "gelu", "silu"])),
        dropout=draw(st.sampled_from([0.0, 0.2])),
    )


test_equals_transformers, test_packed_documents_equal_one_at_a_time = family_tests(configs(), "gpt2")


def test_dropout_acts_where_that_of_transformers_does(tmp_path, monkeypatch):
    check_dropout(ModelConfig(**SMALL, **KIND, dropout=0.2, attention_dropout=0.4), tmp_path / "hf", monkeypatch)


@pytest.mark.parametrize(("name", "millions"), [("gpt-97M", 97.5), ("gpt-705M", 704.9)])
def test_registry_models_have_the_published_size(name, millions):
    config = get_config(name)
    with torch.device("meta"):
        hf = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**config_to_hf(config, bos_id=1, eos_id=2))
        )
    count = sum(p.numel() for p in hf.parameters())  # the tied matrix once
    assert count == sum(torch.Size(shape).numel() for shape in parameter_shapes(config).values())
    assert round(count / 1e6, 1) == millions


MINIMAL = {"model_type": "gpt2", "n_embd": 48, "n_layer": 2, "n_head": 3, "vocab_size": 100}


@pytest.mark.parametrize("extra", [{}, {"n_inner": 50}, {"tie_word_embeddings": False}, {"resid_pdrop": 0.1}])
def test_defaults_are_those_of_transformers(extra):
    ours, theirs = config_from_hf({**MINIMAL, **extra}), transformers.AutoConfig.for_model(**MINIMAL, **extra)
    assert (ours.block_size, ours.norm_eps) == (theirs.n_positions, theirs.layer_norm_epsilon)
    assert (ours.dropout, ours.attention_dropout) == (theirs.embd_pdrop, theirs.attn_pdrop)
    assert ours.intermediate_size == (theirs.n_inner or 4 * 48) and ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours == config_from_hf({**theirs.to_dict(), "architectures": None})
    assert (ours.init, ours.activation) == ("gpt2", "gelu_tanh")


@pytest.mark.parametrize("theirs", ["gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu", "silu", "swish"])
def test_activations_are_those_of_transformers(theirs):
    config = config_from_hf({**MINIMAL, "activation_function": theirs})
    x = torch.linspace(-6, 6, 201, dtype=torch.float64)
    wanted = transformers.activations.ACT2FN[theirs](x)
    torch.testing.assert_close(activation(config.activation)(x), wanted, rtol=0, atol=1e-9)
    written = config_to_hf(config)["activation_function"]
    assert config_from_hf({**MINIMAL, "activation_function": written}) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale_attn_weights": False}, "scale_attn_weights is False; supported is True"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"activation_function": "relu"}, "activation_function is 'relu'; supported are gelu_new, "),
        ({"embd_pdrop": 0.0}, r"embd_pdrop is 0.0 and resid_pdrop 0.1; supported are equal ones"),
        ({"n_head": None, "n_layer": None}, "lacks n_layer, n_head"),
        ({"rope_theta": 1e4}, r"unknown rope_theta \(10000.0\)"),
        ({"architectures": ["GPT2DoubleHeadsModel"]}, "supported is .'GPT2LMHeadModel'"),
    ],
)
def test_unsupported_config_values_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf({**MINIMAL, **change})


def test_an_old_file_has_masks_and_no_prefix():
    # As the first published GPT-2 files: of the model below the head, each layer with its causal mask.
    config = ModelConfig(**SMALL, **KIND, tie_embeddings=True, dropout=0.1, attention_dropout=0.1, init="gpt2")
    old = {
        **config_to_hf(config),
        "n_ctx": 40,
        "_num_labels": 1,
        "reorder_and_upcast_attn": True,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_type": "cls_index",
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    }
    assert config_from_hf(old) == config
    state = build(config).state_dict()
    stored = {name.removeprefix("transformer."): tensor for name, tensor in tensors_to_hf(config, state)}
    for i in range(config.n_layer):
        stored[f"h.{i}.attn.bias"] = torch.ones(1, 1, 40, 40).tril()
        stored[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    read = tensors_from_hf(family_of(config), config, stored)
    assert set(read) == set(state) and all(torch.equal(read[name], state[name]) for name in state)
    del stored["h.1.attn.c_attn.bias"]
    with pytest.raises(ValueError, match=r"lacks transformer\.h\.1\.attn\.c_attn\.bias"):
        tensors_from_hf(family_of(config), config, stored)
