"""Generation, compared with the model without a cache and with transformers."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from generate_one import generate

from lit_model.attention import KVCache
from lit_model.generate import (
    GREEDY,
    Continuation,
    Sampling,
    distribution,
    draw,
    generate_batch,
    stream,
    uniform_numbers,
)
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
PROMPTS = [[5, 17, 250, 3], [9], [7, 7, 7, 8, 120, 60, 1, 4, 2], [5, 17, 250, 3], [44, 45]]


@pytest.mark.parametrize("cuts", [[1] * 20, [7, 1, 1, 5, 6], [20]])
def test_cache_gives_the_logits_without_cache(model, cuts):
    tokens = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = model(tokens)
        cache = KVCache(CONFIG, 2, 20, torch.device("cpu"), torch.float32)
        got = torch.cat([model(part, cache=cache) for part in tokens.split(cuts, dim=1)], dim=1)
    assert cache.length == 20
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_unequal_rows_take_one_token_at_a_time(model):
    cache = KVCache(CONFIG, 2, 20, torch.device("cpu"), torch.float32, [3, 1])
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7, 8]]), cache=cache)
        with pytest.raises(ValueError, match="one at a time"):
            model(torch.tensor([[5, 6], [7, 8]]), cache=cache)


@pytest.fixture(scope="module")
def hf(model, tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("hf")
    write_folder(folder / "hf", config_to_hf(CONFIG), tensors_to_hf(CONFIG, model.state_dict()))
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)


def theirs(hf, prompts, new_tokens, **settings):
    """Of transformers' generate, with the padding on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = {"do_sample": False, "pad_token_id": 0, **settings}
    return hf.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, **settings)[:, longest:].tolist()


def test_greedy_equals_transformers(model, hf):
    assert generate(model, PROMPT, 40, temperature=0)[4:].tolist() == theirs(hf, [PROMPT.tolist()], 40)[0]
    for batch_size in (1, 2, 8):
        batched = generate_batch(model, PROMPTS, 40, batch_size=batch_size)
        assert [out.ids for out in batched] == theirs(hf, PROMPTS, 40)
        assert {out.finish for out in batched} == {"length"}
    # With a penalty one by one: in a batch, theirs also punishes the padding's token.
    penalty = Sampling(temperature=0, repetition_penalty=1.7)
    for prompt, out in zip(PROMPTS, generate_batch(model, PROMPTS, 30, penalty), strict=True):
        assert [out.ids] == theirs(hf, [prompt], 30, repetition_penalty=1.7)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 7},
        {"temperature": 0.9, "top_p": 0.8},
        {"temperature": 1.0, "top_k": 20, "top_p": 0.5},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 0.6, "top_k": 30, "top_p": 0.9, "min_p": 0.05},
        {"temperature": 1.0, "top_p": 1e-9},
    ],
)
def test_distribution_equals_that_of_transformers(settings):
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits = 2 * torch.randn(4, 60, generator=torch.Generator().manual_seed(0))
    wanted = logits / settings["temperature"]
    for name, kind in (
        ("top_k", processors.TopKLogitsWarper),
        ("top_p", processors.TopPLogitsWarper),
        ("min_p", processors.MinPLogitsWarper),
    ):
        if name in settings:
            wanted = kind(settings[name])(None, wanted)
    ours = distribution(logits, Sampling(**settings))
    torch.testing.assert_close(ours / ours.sum(-1, keepdim=True), wanted.softmax(-1))


def test_sampling_follows_the_distribution():
    """Frequencies of draws against the probabilities, within five standard errors; and the ends of the interval."""
    logits = torch.tensor([[2.0, -torch.inf, 1.0, 0.5, 0.0, -1.0, -torch.inf]])
    draws = 20000
    sampling = Sampling(temperature=0.8)
    tokens = draw(logits.expand(draws, -1), sampling, uniform_numbers(0, draws)[:, None])
    p = (logits[0].double() / 0.8).softmax(0)
    error = (p * (1 - p) / draws).sqrt()
    assert ((torch.bincount(tokens, minlength=7) / draws - p).abs() <= 5 * error).all()
    ends = torch.tensor([[0.0], [1 - 2**-53]], dtype=torch.float64)
    assert draw(logits.flip(1).expand(2, -1), sampling, ends).tolist() == [1, 6]


def test_a_row_depends_on_its_own_seed_only(model):
    sampling = Sampling(temperature=1.0, top_p=0.95, repetition_penalty=1.1)
    seeds = [3, 1, 2, 4, 3]
    alone = [
        generate(model, torch.tensor(p), 20, temperature=1.0, top_p=0.95, repetition_penalty=1.1, seed=seed)[len(p) :]
        for p, seed in zip(PROMPTS, seeds, strict=True)
    ]
    for batch_size in (2, 5):
        batched = generate_batch(model, PROMPTS, 20, sampling, seeds=seeds, batch_size=batch_size)
        assert [out.ids for out in batched] == [ids.tolist() for ids in alone]
    assert len({tuple(ids.tolist()) for ids in alone}) == 5  # equal prompts, other seeds
    # A larger limit continues the same text.
    assert generate_batch(model, PROMPTS[:1], 9, sampling, seeds=[3])[0].ids == alone[0].tolist()[:9]


def test_excluded_ids_are_never_sampled(model):
    likely = generate(model, PROMPT, 10, temperature=0).tolist()[4:]
    greedy = generate(model, PROMPT, 10, temperature=0, excluded_ids=likely)
    with torch.no_grad():
        logits = model(greedy[None, :-1])[0, 3:]
    logits[:, likely] = -torch.inf
    assert torch.equal(greedy[4:], logits.argmax(-1))
    allowed = [7, 30, 299]
    others = [id for id in range(300) if id not in allowed]
    for settings in ({}, {"top_k": 50}, {"top_p": 0.5}, {"min_p": 0.1}, {"temperature": 100.0}):
        assert set(generate(model, PROMPT, 20, excluded_ids=others, **settings).tolist()[4:]) <= set(allowed)


def test_rows_end_by_themselves(model):
    """At the end-of-document token or where the caller says so; the other rows go on as before."""
    free = [out.ids for out in generate_batch(model, PROMPTS, 30)]
    eos = free[0][6]

    def stop(row, ids):
        assert ids == free[row][: len(ids)]
        return row == 1 and len(ids) == 5

    for out, whole in zip(generate_batch(model, PROMPTS, 30, eos_id=eos, stop=stop, batch_size=3), free, strict=True):
        end = whole.index(eos) + 1 if eos in whole else 30
        kind = "eos" if eos in whole else "length"
        assert out == (
            Continuation(whole[:5], "stop") if whole is free[1] and end > 5 else Continuation(whole[:end], kind)
        )
    tokens = list(stream(model, PROMPTS[:3], 30, GREEDY, eos_id=eos))
    assert [t.id for t in tokens if t.row == 2] == free[2][: len([t for t in tokens if t.row == 2])]
    assert sorted(t.row for t in tokens if t.finish) == [0, 1, 2]


@pytest.mark.gpu
def test_cuda_writes_the_same_texts():
    """In float64, where rounding decides no token: greedy and sampled, with windows, chunks and soft-caps."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pattern = {"attention_pattern": ("full", "sliding", "chunked"), "sliding_window_size": 5, "attention_chunk_size": 4}
    for fields in ({}, {**pattern, "n_layer": 3}, {"attention_logit_softcapping": 5.0}):
        config = get_config("debug", vocab_size=300, block_size=64, init="normal", init_std=0.2, **fields)
        model = GPT(config)
        initialise(model, config, 0)
        model = model.double()
        for sampling in (GREEDY, Sampling(0.9, 0.8, top_k=100, top_p=0.9, min_p=0.01)):
            texts = [generate_batch(model.to(d), PROMPTS, 30, sampling, seeds=range(5)) for d in ("cpu", "cuda")]
            assert texts[0] == texts[1], (fields, sampling)


def test_nothing_to_do(model):
    assert generate_batch(model, [], 5) == []
    assert generate_batch(model, PROMPTS[:2], 0) == [Continuation([], "length")] * 2


def test_training_mode_is_restored(model):
    model.train()
    generate(model, PROMPT, 1)
    assert model.training
    tokens = stream(model, PROMPTS, 5)
    next(tokens)
    tokens.close()  # as an interrupted session does
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
        ({"min_p": -0.1}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"prompt": torch.tensor([300])}, "id 300 is outside the model's vocabulary of 300"),
        ({"prompt": torch.tensor([], dtype=torch.int64)}, "at least one token"),
    ],
)
def test_bad_settings_are_named(model, kwargs, message):
    with pytest.raises(ValueError, match=message):
        generate(model, **{"prompt": PROMPT, "max_new_tokens": 3, **kwargs})


def test_a_bad_prompt_of_several_is_named(model):
    with pytest.raises(ValueError, match="prompt 2: its 60 tokens and max_new_tokens 5"):
        generate_batch(model, [[1], [2] * 60], 5)
    with pytest.raises(ValueError, match="batch_size is 0"):
        generate_batch(model, [[1]], 5, batch_size=0)
