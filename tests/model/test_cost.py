"""Counts against the reference figures, the module itself, and torch's own FLOP counter."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lit_model import cost
from lit_model.config import ModelConfig
from lit_model.model import GPT
from lit_model.registry import MODELS, get_config

PUBLISHED = {
    "LLaMmlein_120M": 124_766_976,
    "LLaMmlein_1B": 1_100_310_528,
    "LLaMmlein_7B": 6_738_939_904,
    "TinyLlama_1.1B": 1_100_048_384,
    "llama-10M": 9_685_440,
    "llama-16M": 16_584_960,
    "llama-95M": 95_371_008,
    "llama-97M": 97_241_856,
    "llama-360M": 359_973_888,
    "llama-58M": 58_343_936,
    "BabyLlama-2": 345_355_200,
    "nano-llama": 33_317_888,
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_equal_the_published_count_and_the_module(name):
    config = get_config(name)
    with torch.device("meta"):
        model = GPT(config)
    counted = cost.count_parameters(config)
    assert counted == sum(p.numel() for p in model.parameters())
    assert counted == PUBLISHED.get(name, counted)
    assert not list(model.buffers())
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and ".wte." not in n)
    if config.tie_embeddings:
        matrices += config.padded_vocab_size * config.n_embd
    assert cost.count_multiplying_parameters(config) == matrices


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True, "mlp_bias": True},
        {"tie_embeddings": True, "n_query_groups": 1},
        {"head_size": 24, "vocab_size": 513},
    ],
)
def test_parameters_of_variants(changes):
    config = get_config("debug", **changes)
    with torch.device("meta"):
        model = GPT(config)
    assert cost.count_parameters(config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"n_query_groups": 4, "head_size": 32}])
def test_flops_equal_torchs_counter(changes):
    """With attention as plain matrix multiplies over the whole square, as the formula counts it."""
    config = get_config("debug", **changes)
    B, T = 3, 64
    model = GPT(config, attention="dense")
    tokens = torch.zeros(1, T, dtype=torch.int64)
    counter = FlopCounterMode(display=False)
    with counter:
        logits = model(tokens)
        logits.sum().backward()
    per_token = counter.get_total_flops() / T
    assert per_token == cost.flops_per_token(config, T)
    assert cost.flops_per_token(config, B * T) > per_token


def test_causal_halves_the_attention_term_only():
    config = get_config("LLaMmlein_1B")
    T = 2048
    full, causal = cost.flops_per_token(config, T), cost.flops_per_token(config, T, causal=True)
    assert full - causal == 6 * config.n_layer * config.n_embd * T
    assert full == 6 * (1_100_310_528 - 32064 * 2048 - 45 * 2048) + 12 * 22 * 2048 * T


def test_memory_estimate_orders_as_expected():
    config = get_config("LLaMmlein_1B")
    plain = cost.training_memory_bytes(config, 4, 2048)
    assert plain > 16 * cost.count_parameters(config)
    assert cost.training_memory_bytes(config, 4, 2048, activation_checkpointing=True) < plain
    assert cost.training_memory_bytes(config, 8, 2048) > plain
    assert cost.training_memory_bytes(config, 4, 2048, shards=8) < plain


def test_config_dict_round_trip_and_refusals():
    for config in MODELS.values():
        assert ModelConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="unknown model field n_layers"):
        ModelConfig.from_dict({"n_layers": 3})
    with pytest.raises(ValueError, match="unknown model field rope_scaling.kind"):
        ModelConfig.from_dict({**get_config("nano-llama").to_dict(), "rope_scaling": {"kind": 1}})
    with pytest.raises(ValueError, match="missing model field rope_scaling.factor"):
        ModelConfig.from_dict({"rope_scaling": {"low_freq_factor": 1.0}})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_layer", 0),
        ("n_embd", 1.5),
        ("n_query_groups", 3),
        ("head_size", 15),
        ("padded_vocab_size", 100),
        ("dropout", 1.0),
        ("init", "xavier"),
        ("norm_eps", 0.0),
        ("rope_base", 0.0),
        ("vocab_size", True),
    ],
)
def test_bad_fields_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        ModelConfig.from_dict({**get_config("debug").to_dict(), field: value})


def test_registry_names_near_misses_and_derives_again():
    with pytest.raises(ValueError, match="LLaMmlein_120M"):
        get_config("LLammlein_120m")
    with pytest.raises(ValueError, match="unknown model field blocks"):
        get_config("debug", blocks=3)
    config = get_config("llama-10M", vocab_size=5000, n_embd=96)
    assert (config.padded_vocab_size, config.head_size) == (5056, 16)
    assert get_config("llama-10M", n_head=12).n_query_groups == 12
    assert dataclasses.replace(config, dropout=0.1).dropout == 0.1
