"""Any combination of the model's fields: packed documents, the cache and recomputation change nothing.

The tests against transformers fix the meaning of each field; these cover combinations that no family has.
"""

from itertools import pairwise

import pytest
import torch
from generate_one import generate
from hypothesis import given
from hypothesis import strategies as st
from hypothesis_examples import examples

from lit_model.attention import KVCache
from lit_model.config import ModelConfig, RopeScaling
from lit_model.init import initialise
from lit_model.loss import IGNORE_INDEX
from lit_model.model import GPT

BLOCK = 48  # the models' context
B, T = 2, 24


@st.composite
def configs(draw, *, dropout=False):
    """Any config, of small size; windows, chunks and floors are shorter than the documents."""

    def one_of(*values):
        return draw(st.sampled_from(values))

    n_layer = draw(st.integers(1, 3))

    def layers(*kinds):
        return tuple(draw(st.lists(st.sampled_from(kinds), min_size=n_layer, max_size=n_layer)))

    groups, per_group, head_size = one_of(1, 2), one_of(1, 3), one_of(2, 4, 10)
    n_head = groups * per_group
    rope = one_of(True, True, False)
    pattern = layers("full", "sliding", "chunked")
    gated = one_of(True, True, False)
    has_experts = layers(True, False) if gated and one_of(True, False) else (False,)
    n_expert = one_of(1, 2, 5) if any(has_experts) else 0
    parallel = one_of(False, True)
    norms = {"pre_norm": True, "post_norm": False}
    if not parallel:
        norms = one_of(norms, {"pre_norm": False, "post_norm": True}, {"pre_norm": True, "post_norm": True})
    scaling = RopeScaling(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_block_size=16)
    return ModelConfig(
        n_layer=n_layer,
        n_head=n_head,
        n_query_groups=groups,
        n_embd=n_head * one_of(4, 10),
        head_size=head_size,
        intermediate_size=one_of(7, 16),
        block_size=BLOCK,
        vocab_size=50,
        tie_embeddings=draw(st.booleans()),
        scale_embeddings=draw(st.booleans()),
        norm_class_name=one_of("RMSNorm", "LayerNorm"),
        norm_offset=one_of(0.0, 1.0),
        **norms,
        parallel_residual=parallel,
        shared_attention_norm=parallel and draw(st.booleans()),
        position_embedding="rope" if rope else "learned",
        rope_base=100.0,
        rope_scaling=one_of(None, scaling),
        rotary_size=one_of(head_size, 2) if rope else None,
        rope_layers=layers(True, False) if rope else (True,),
        attention_bias=draw(st.booleans()),
        attention_scores_scalar=one_of(None, 3.0),
        attention_logit_softcapping=one_of(None, 0.7),
        attention_pattern=pattern,
        sliding_window_size=one_of(1, 3, 6) if "sliding" in pattern else None,
        attention_chunk_size=one_of(1, 3, 5) if "chunked" in pattern else None,
        qk_norm=one_of("none", "head", "projection", "unit"),
        attention_temperature_scale=one_of(None, 0.8),
        attention_temperature_floor=one_of(1, 3),
        mlp_gated=gated,
        activation=one_of("silu", "gelu", "gelu_tanh"),
        mlp_bias=n_expert == 0 and draw(st.booleans()),
        n_expert=n_expert,
        n_expert_per_token=min(n_expert, one_of(1, 2)) or 1,
        moe_intermediate_size=one_of(5, 16),
        shared_expert=draw(st.booleans()),
        moe_layers=has_experts,
        lm_head_bias=draw(st.booleans()),
        final_logit_softcapping=one_of(None, 2.0),
        dropout=one_of(0.0, 0.2) if dropout else 0.0,
        attention_dropout=one_of(0.0, 0.2) if dropout else 0.0,
        init_std=0.2,
        init="normal",
    )


def build(config, seed, dtype=torch.float64, **kwargs):
    """A model whose parameters are all random, with varied attention scores and router choices."""
    model = GPT(config, **kwargs)
    initialise(model, config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model.to(dtype)


def draw_batch(config, seed):
    """Tokens and targets (B, T), boundaries of pieces of 1 to 12 tokens, and the pieces' (row, start, end)."""
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(0, config.vocab_size, (2, B, T), generator=generator)
    targets[torch.rand((B, T), generator=generator) < 0.1] = IGNORE_INDEX
    pieces = []
    for row in range(B):
        start = 0
        while start < T:
            end = min(T, start + int(torch.randint(1, 13, (), generator=generator)))
            pieces.append((row, start, end))
            start = end
    ends = [row * T + end for row, _, end in pieces]
    cu_seqlens = torch.tensor([0, *ends, B * T, B * T], dtype=torch.int32)  # with empty pieces, as a loader pads
    return tokens, targets, cu_seqlens, pieces


def gradients(model, losses):
    """The loss, and its gradients by name."""
    model.zero_grad()
    loss = sum(losses)
    loss.backward()
    return loss.detach(), {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


@examples(15)
@given(config=configs(), seed=st.integers(0, 1000))
def test_packed_documents_equal_one_at_a_time(config, seed):
    """With the CPU's loop and with the reference attention; a document alone is run without batching."""
    tokens, targets, cu_seqlens, pieces = draw_batch(config, seed)
    alone = [(tokens[row : row + 1, start:end], targets[row : row + 1, start:end]) for row, start, end in pieces]
    reference = None
    for attention in ("dense", "auto"):
        model = build(config, seed, attention=attention)
        for losses in (
            [model(one, wanted).loss_sum for one, wanted in alone],
            [model(tokens, targets, cu_seqlens=cu_seqlens).loss_sum],
        ):
            loss, grads = gradients(model, losses)
            reference = reference or (loss, grads)
            torch.testing.assert_close(loss, reference[0], rtol=1e-10, atol=1e-10)
            # A gradient may be 0 up to rounding (a key bias shifts all scores equally), so the scale is taken over all.
            largest = torch.stack([g.norm() for g in reference[1].values()]).max()
            for name, wanted in reference[1].items():
                assert (grads[name] - wanted).norm() <= 1e-10 * largest, name


@examples(15)
@given(config=configs(), seed=st.integers(0, 1000), cuts=st.sets(st.integers(1, T - 1), max_size=6))
def test_cache_equals_no_cache(config, seed, cuts):
    """Logits of rows fed in pieces of one or several tokens; and greedy tokens."""
    model = build(config, seed).eval()
    tokens, _, _, _ = draw_batch(config, seed)
    cache = KVCache(config, B, T, torch.device("cpu"), torch.float64)
    bounds = [0, *sorted(cuts), T]
    with torch.no_grad():
        parts = [model(tokens[:, a:b], cache=cache) for a, b in pairwise(bounds)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), rtol=1e-10, atol=1e-10)
        plain = tokens[:1, :5]
        for _ in range(8):
            plain = torch.cat((plain, model(plain)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(generate(model, tokens[0, :5], 8, temperature=0), plain[0])


@examples(15)
@given(config=configs(), seed=st.integers(0, 1000), lengths=st.lists(st.integers(1, 16), min_size=2, max_size=4))
def test_a_batch_of_unequal_prompts_equals_no_cache(config, seed, lengths):
    """Logits of each token: packed prompts, then one token a row, then without some of the rows."""
    model = build(config, seed).eval()
    tokens = torch.randint(0, config.vocab_size, (len(lengths), 24), generator=torch.Generator().manual_seed(seed))
    cache = KVCache(config, len(lengths), max(lengths) + 8, torch.device("cpu"), torch.float64, lengths)
    with torch.no_grad():
        alone = [model(row[None, : n + 8])[0] for row, n in zip(tokens, lengths, strict=True)]
        prompts = [row[:n] for row, n in zip(tokens, lengths, strict=True)]
        packed = torch.cat(prompts)[None] if len(set(lengths)) > 1 else torch.stack(prompts)
        first = model(packed, cache=cache).view(-1, config.vocab_size)
        wanted = torch.cat([logits[:n] for logits, n in zip(alone, lengths, strict=True)])
        torch.testing.assert_close(first, wanted, rtol=1e-10, atol=1e-10)
        rows = list(range(len(lengths)))
        for step in range(8):
            if step == 4:
                rows = rows[1:] + rows[1:]
                cache.select(torch.tensor(rows))
            new = torch.stack([tokens[row, lengths[row] + step] for row in rows])[:, None]
            wanted = torch.stack([alone[row][lengths[row] + step] for row in rows])
            torch.testing.assert_close(model(new, cache=cache)[:, 0], wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["full", "op"])
@examples(10)
@given(config=configs(dropout=True), seed=st.integers(0, 1000))
def test_recomputation_changes_no_bit(kind, config, seed):
    """Gradients in training are bit-equal, with dropout and router losses."""
    tokens, targets, cu_seqlens, _ = draw_batch(config, seed)
    results = []
    for recompute in ("none", kind):
        model = build(
            config,
            seed,
            torch.float32,
            activation_checkpointing=recompute,
            load_balance_loss=0.1,
            router_z_loss=0.1,
        )
        torch.manual_seed(seed)
        results.append(gradients(model, [model(tokens, targets, cu_seqlens=cu_seqlens).loss_sum]))
    (loss, grads), (other_loss, other_grads) = results
    assert torch.equal(loss, other_loss) and loss.isfinite()
    for name, grad in grads.items():
        assert torch.equal(grad, other_grads[name]), name
