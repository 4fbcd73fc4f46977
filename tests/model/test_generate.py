"""Generation against the model without a cache and against transformers."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from lit_model.attention import KVCache
from lit_model.generate import generate, sample
from lit_model.hf.families import config_to_hf, tensors_to_hf
from lit_model.hf.io import write_folder
from lit_model.init import initialise
from lit_model.model import GPT
from lit_model.registry import get_config

CONFIG = get_config("debug", vocab_size=300, block_size=64, init="normal", init_std=0.2)


@pytest.fixture(scope="module")
def model():
    model = GPT(CONFIG)
    initialise(model, CONFIG, 0)
    return model.eval()


PROMPT = torch.tensor([5, 17, 250, 3])


@pytest.mark.parametrize("cuts", [[1] * 20, [7, 1, 1, 5, 6], [20]])
def test_cache_gives_the_logits_without_cache(model, cuts):
    tokens = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = model(tokens)
        cache = KVCache(CONFIG, 2, 20, torch.device("cpu"), torch.float32)
        got = torch.cat([model(part, cache=cache) for part in tokens.split(cuts, dim=1)], dim=1)
    assert cache.length == 20
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_greedy_equals_transformers(model, tmp_path):
    transformers = pytest.importorskip("transformers")
    write_folder(tmp_path / "hf", config_to_hf(CONFIG), tensors_to_hf(CONFIG, model.state_dict()))
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    theirs = hf.generate(
        PROMPT[None],
        attention_mask=torch.ones(1, 4, dtype=torch.int64),
        max_new_tokens=40,
        do_sample=False,
        pad_token_id=0,
    )
    assert torch.equal(generate(model, PROMPT, 40, temperature=0), theirs[0])


def test_excluded_ids_are_never_taken(model):
    likely = generate(model, PROMPT, 10, temperature=0).tolist()[4:]
    greedy = generate(model, PROMPT, 10, temperature=0, excluded_ids=likely)
    with torch.no_grad():
        logits = model(greedy[None, :-1])[0, 3:]
    logits[:, likely] = -torch.inf
    assert torch.equal(greedy[4:], logits.argmax(-1))
    allowed = [7, 30, 299]
    others = [id for id in range(300) if id not in allowed]
    for settings in ({}, {"top_k": 50}, {"top_p": 0.5}, {"temperature": 100.0}):
        assert set(generate(model, PROMPT, 20, excluded_ids=others, **settings).tolist()[4:]) <= set(allowed)


def test_seed_decides(model):
    a, b, c = (generate(model, PROMPT, 30, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(a[:4], PROMPT) and a.shape == (34,) and a.dtype == torch.int64


def test_stops_at_eos(model):
    free = generate(model, PROMPT, 30, temperature=0)
    eos = int(free[10])
    stopped = generate(model, PROMPT, 30, temperature=0, eos_id=eos)
    first = next(i for i in range(4, 34) if int(free[i]) == eos)
    assert torch.equal(stopped, free[: first + 1])


def test_sampling_follows_the_distribution():
    """Frequencies of 4000 draws against the probabilities, within five standard errors."""
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0])
    draws = 4000
    kept = {
        "plain": ((1.0, None, None), torch.ones(5, dtype=torch.bool)),
        "temperature": ((0.5, None, None), torch.ones(5, dtype=torch.bool)),
        "top_k": ((1.0, 2, None), torch.tensor([1, 1, 0, 0, 0]).bool()),
        # probabilities 0.563 0.207 0.126 0.076 0.028: two tokens hold 0.770, three 0.896
        "top_p": ((1.0, None, 0.8), torch.tensor([1, 1, 1, 0, 0]).bool()),
        "tiny top_p": ((1.0, None, 1e-9), torch.tensor([1, 0, 0, 0, 0]).bool()),
    }
    for name, ((temperature, top_k, top_p), mask) in kept.items():
        generator = torch.Generator().manual_seed(0)
        counts = torch.bincount(
            torch.tensor([sample(logits, temperature, top_k, top_p, generator) for _ in range(draws)]), minlength=5
        )
        p = (logits.double() / temperature).softmax(0) * mask
        p = p / p.sum()
        error = (p * (1 - p) / draws).sqrt()
        assert (counts[~mask] == 0).all(), name
        assert ((counts / draws - p).abs() <= 5 * error + 1e-12).all(), name


def test_training_mode_is_left_as_it_was(model):
    model.train()
    generate(model, PROMPT, 1)
    assert model.training
    model.eval()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_new_tokens": 61}, "block_size 64"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 1.5}, "top_p"),
        ({"prompt": torch.tensor([300])}, "prompt id 300 is outside the model's vocabulary of 300"),
        ({"prompt": torch.tensor([], dtype=torch.int64)}, "at least one token"),
    ],
)
def test_bad_settings_are_named(model, kwargs, message):
    with pytest.raises(ValueError, match=message):
        generate(model, **{"prompt": PROMPT, "max_new_tokens": 3, **kwargs})
