"""Checks of every model family against transformers, on small random configs; called by each family's test.

A family's test file defines a hypothesis strategy `configs`, which uses `sizes` for the fields common to all families,
and takes the two tests that all families share:

    test_equals_transformers, test_packed_documents_equal_one_at_a_time = family_tests(configs(), "llama")
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from generate_one import generate
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis_examples import examples
from safetensors.torch import load_file

from lit_model.config import ModelConfig, RopeScaling
from lit_model.generate import generate_batch
from lit_model.hf.families import config_to_hf, family_from_hf, family_of, tensors_to_hf
from lit_model.hf.io import read_folder, write_folder
from lit_model.init import initialise
from lit_model.loss import IGNORE_INDEX
from lit_model.model import GPT

transformers = pytest.importorskip("transformers")
transformers.logging.disable_progress_bar()

# Both sides compute in float32 and round differently: logits of size 1 to 5 differ by a few 1e-6 at most.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}

few = examples(9)

scalings = st.one_of(
    st.none(),
    st.builds(
        RopeScaling,
        factor=st.sampled_from([1.0, 4.0, 8.0]),
        low_freq_factor=st.just(1.0),
        high_freq_factor=st.sampled_from([2.0, 4.0]),
        original_block_size=st.sampled_from([16, 64, 8192]),
    ),
)


def family_tests(configs, model_type, clear=lambda config, seed: True):
    """The tests shared by all families: `check_family` and `check_packed`.

    `clear` says whether rounding cannot change what the model computes, such as the choice of an expert.
    """

    @few
    @given(config=configs, seed=st.integers(0, 1000))
    def test_equals_transformers(config, seed, tmp_path_factory):
        assert family_of(config).model_type == model_type
        assume(clear(config, seed))
        check_family(config, tmp_path_factory.mktemp("hf"), seed)

    @few
    @given(config=configs, seed=st.integers(0, 1000))
    def test_packed_documents_equal_one_at_a_time(config, seed):
        check_packed(config, seed)

    return test_equals_transformers, test_packed_documents_equal_one_at_a_time


@st.composite
def sizes(draw, *, grouped=True, own_head_size=True):
    """Draw the fields every family has, as a dict. With `own_head_size`, n_head * head_size may differ from n_embd."""
    groups = draw(st.sampled_from([1, 2, 3]))
    n_head = groups * (draw(st.sampled_from([1, 2, 4])) if grouped else 1)
    head_size = draw(st.sampled_from([2, 6, 8, 10, 16, 24]))
    # Below a width of 12 a norm can divide by almost nothing, and both sides lose digits.
    widths = [n_head * x for x in ((head_size, 3, 4, 10, 20) if own_head_size else (6, 8, 10, 16)) if n_head * x >= 12]
    n_embd = draw(st.sampled_from(widths or [12 * n_head]))
    return {
        "n_layer": draw(st.integers(1, 3)),
        "n_head": n_head,
        "n_query_groups": groups if grouped else n_head,
        "n_embd": n_embd,
        "head_size": head_size if own_head_size else n_embd // n_head,
        "intermediate_size": draw(st.sampled_from([16, 33, 48])),
        "block_size": 64,
        "vocab_size": draw(st.integers(2, 200)),
        "padding_multiple": 64,  # what config_from_hf chooses
        "norm_eps": draw(st.sampled_from([1e-5, 1e-6])),
        "tie_embeddings": draw(st.booleans()),
        "attention_dropout": draw(st.sampled_from([0.0, 0.1])),
        "init_std": draw(st.sampled_from([0.02, 0.1])),
        "init": draw(st.sampled_from(["llammlein", "normal"])),
    }


def build(config, seed=0, **kwargs):
    """A model in eval mode with every parameter random, including norms and biases, so that a lost one is noticed."""
    model = GPT(config, **kwargs)
    initialise(model, config, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
            if name == "lm_head.bias":
                p[config.vocab_size :] = 0  # padding rows, which a conversion drops
    return model.eval()


def to_transformers(model, folder, attention="eager", **kwargs):
    """Write the model as a folder and open it with transformers, checking that every tensor of both is accounted for.

    "eager" supports everything a family does, but computes the softmax in float32.
    """
    config = model.config
    write_folder(folder, config_to_hf(config, bos_id=0, eos_id=1), tensors_to_hf(config, model.state_dict()), **kwargs)
    hf, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, attn_implementation=attention
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert type(hf).__name__ == family_of(config).architecture
    return hf.eval()


def from_folder(folder):
    config, tensors = read_folder(folder)
    model = GPT(config)
    model.load_state_dict({name: tensors[name] for name in tensors})
    return model.eval()


def draw_tokens(config, B=2, T=33, seed=0):
    return torch.randint(0, config.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def check_family(config, folder, seed=0, uncarried=()):
    """Logits, gradients, folders both ways and greedy generation of a random model equal transformers'.

    `uncarried` names config fields that the family cannot represent.
    """
    model = build(config, seed)
    hf = to_transformers(model, folder / "ours")
    with torch.no_grad():
        tokens = draw_tokens(config, seed=seed)
        logits = model(tokens)
        assert logits.shape == (2, 33, config.vocab_size)
        torch.testing.assert_close(logits, hf(tokens).logits, **TOLERANCE)
    check_generation(model, hf, seed)
    hf.save_pretrained(folder / "theirs")
    check_folders(model, folder, uncarried)
    check_gradients(model, hf, folder / "gradients", seed)


def check_folders(model, folder, uncarried=()):
    """`ours` and transformers' `theirs` hold the same tensors, and both restore every tensor and field of ours."""
    config = model.config
    ours, theirs = load_file(folder / "ours/model.safetensors"), load_file(folder / "theirs/model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name in ("ours", "theirs"):
        read_config, tensors = read_folder(folder / name)
        assert set(tensors) == set(model.state_dict())
        for parameter, wanted in model.state_dict().items():
            tensor = tensors[parameter]
            assert torch.equal(tensor, wanted) and tensor.is_contiguous(), parameter
        same = {k: getattr(read_config, k) for k in ("name", "init", *uncarried)}
        assert read_config == dataclasses.replace(config, **same)
        family = family_from_hf(json.loads((folder / name / "config.json").read_text()))
        assert family.obstacle(read_config) is None and read_config.init == family.init


def check_generation(model, hf, seed, prompt_tokens=9, new_tokens=6):
    """Greedy generation gives the same tokens with our cache, without a cache, and in transformers."""
    prompt = draw_tokens(model.config, 1, prompt_tokens, seed + 1)
    cached = generate(model, prompt[0], new_tokens, temperature=0)
    plain = prompt
    with torch.no_grad():
        for _ in range(new_tokens):
            plain = torch.cat((plain, model(plain)[:, -1:].argmax(-1)), dim=1)
    hf.generation_config.eos_token_id = None
    theirs = hf.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        use_cache=model.config.sliding_window_size != 1,  # transformers 5.23 then keeps all tokens (slices from -0)
    )
    hf.generation_config.eos_token_id = 1
    assert cached.tolist() == plain[0].tolist() == theirs[0].tolist()
    # In one batch with a longer and a shorter prompt: unequal positions, windows and chunks.
    ours = draw_tokens(model.config, 1, 14, seed + 2)[0].tolist()
    batch = [ours, prompt[0].tolist(), ours[:3], ours]
    for ids, out in zip(batch, generate_batch(model, batch, new_tokens), strict=True):
        assert ids + out.ids == generate(model, torch.tensor(ids), new_tokens, temperature=0).tolist()


def gradients(model, inputs, targets):
    """The summed loss and its gradients by name, in a model of ours."""
    model.zero_grad()
    loss = model(inputs, targets).loss_sum
    loss.backward()
    return loss.detach(), {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def check_gradients(model, hf, folder, seed):
    """Error of our float32 gradients against float64 is at most twice that of transformers', which must be small too.

    `hf` is unusable afterwards: its gradients replace its parameters, so that they are converted the same way.
    """
    config = model.config
    tokens = draw_tokens(config, 2, 21, seed + 2)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[0, 3:7] = IGNORE_INDEX
    loss, single = gradients(model, inputs, targets)
    exact_loss, exact = gradients(build(config, seed).double(), inputs, targets)
    hf.zero_grad()
    logits = hf(inputs, use_cache=False).logits
    their_loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    their_loss.backward()
    for got in (loss, their_loss):
        torch.testing.assert_close(got.double(), exact_loss, rtol=2e-6, atol=1e-5)
    for p in hf.parameters():
        p.data = torch.zeros_like(p) if p.grad is None else p.grad
    hf.save_pretrained(folder)
    _, theirs = read_folder(folder)
    # A gradient may be 0 up to rounding (a key bias shifts all scores equally), so the scale is taken over all.
    whole = torch.stack([g.norm() for g in exact.values()]).max()
    for name, reference in exact.items():
        error = (theirs[name] - reference).norm()
        assert error <= 1e-5 * reference.norm() + 1e-6 * whole, (name, "transformers", error, reference.norm(), whole)
        bound = 2 * error + 1e-6 * reference.norm() + 1e-7 * whole
        assert (single[name] - reference).norm() <= bound, (name, (single[name] - reference).norm(), bound)


def check_packed(config: ModelConfig, seed=0):
    """Packed documents give the loss and the gradients of one document at a time, in float64 and without dropout."""
    model = build(config, seed).double()
    generator = torch.Generator().manual_seed(seed)
    B, T = 2, 30
    tokens = draw_tokens(config, B, T + 1, seed + 3)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    # Pieces of 1 to 12 tokens; no piece crosses the end of a row.
    ends, alone = [0], []
    for row in range(B):
        start = 0
        while start < T:
            end = min(T, start + int(torch.randint(1, 13, (), generator=generator)))
            targets[row, end - 1] = IGNORE_INDEX
            alone.append((inputs[row : row + 1, start:end], targets[row : row + 1, start:end]))
            ends.append(row * T + end)
            start = end
    cu_seqlens = torch.tensor(ends, dtype=torch.int32)
    model.zero_grad()
    packed_loss = model(inputs, targets, cu_seqlens=cu_seqlens).loss_sum
    packed_loss.backward()
    packed = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss = sum(model(document, wanted).loss_sum for document, wanted in alone)
    loss.backward()
    torch.testing.assert_close(packed_loss, loss, rtol=1e-10, atol=1e-10)
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert packed.keys() == wanted.keys()
    whole = torch.stack([g.norm() for g in wanted.values()]).max()
    for name, gradient in wanted.items():
        assert (packed[name] - gradient).norm() <= 1e-10 * whole, name


def check_dropout(config: ModelConfig, folder, monkeypatch):
    """In training both sides drop the same number of elements at the same rates, in the same order and places.

    Each dropout call gets a mask that depends on the number of earlier calls, so the logits are equal only if each mask
    is applied to the same tensor.
    """
    model = build(config).train()
    hf = to_transformers(model, folder).train()
    tokens = draw_tokens(config)
    calls: list[tuple[int, float]] = []

    def drop(x, p=0.5, training=True, inplace=False):
        if not training or not p:
            return x
        kept = torch.rand(x.numel(), generator=torch.Generator().manual_seed(len(calls))) >= p
        calls.append((x.numel(), p))
        return x * kept.view(x.shape) / (1 - p)

    def run(network):
        calls.clear()
        with torch.no_grad():
            out = network(tokens)
        return out, list(calls)

    monkeypatch.setattr(F, "dropout", drop)
    (ours, our_calls), (theirs, their_calls) = run(model), run(hf)
    assert our_calls == their_calls and len(our_calls) == 1 + 3 * config.n_layer
    torch.testing.assert_close(ours, theirs.logits, **TOLERANCE)
    assert run(model.eval())[1] == []
    assert (ours - model(tokens)).norm() > 0.01 * ours.norm()
