"""The mixture of experts equals transformers' Llama 4 and an explicit sum; its statistics and losses are checked."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

from lit_model.config import ModelConfig
from lit_model.moe import Experts, MoE, RouterStatistics, load_balance_loss, router_z_loss, stack_statistics

HF_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def config_of(n_expert: int, k: int, **fields: object) -> ModelConfig:
    fields = {"n_embd": 8, "n_head": 2, "moe_intermediate_size": 6} | fields
    return ModelConfig(n_expert=n_expert, n_expert_per_token=k, **fields)


def build(config: ModelConfig, seed: int, dtype: torch.dtype = torch.float64) -> MoE:
    torch.manual_seed(seed)
    return MoE(config).to(dtype)


def gradients(y: Tensor, x: Tensor, moe: MoE) -> dict[str, Tensor]:
    """Gradients of a random weighted sum of y, with respect to the input and every parameter."""
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(y.dtype)
    names = ["x", *(name for name, _ in moe.named_parameters())]
    return dict(zip(names, torch.autograd.grad((y * weights).sum(), [x, *moe.parameters()]), strict=True))


def written_out(moe: MoE, x: Tensor) -> Tensor:
    """x (N, C) -> (N, C), token by token and expert by expert."""
    rows = []
    for token in x:
        logits = moe.router.weight @ token
        row = torch.zeros_like(token)
        for e in sorted(range(len(logits)), key=lambda e: -logits[e].item())[: moe.n_expert_per_token]:
            gate, up = (moe.experts.gate_up[e] @ (token * torch.sigmoid(logits[e]))).chunk(2)
            row = row + moe.experts.down[e] @ (moe.experts.activation(gate) * up)
        if moe.shared is not None:
            s = moe.shared
            row = row + s.proj.weight @ (s.activation(s.fc_1.weight @ token) * (s.fc_2.weight @ token))
        rows.append(row)
    return torch.stack(rows)


@st.composite
def cases(draw: st.DrawFn) -> tuple[ModelConfig, int, int]:
    n_expert = draw(st.integers(1, 6))
    config = config_of(
        n_expert,
        draw(st.integers(1, min(n_expert, 3))),
        n_embd=draw(st.sampled_from([4, 8])),
        moe_intermediate_size=draw(st.integers(1, 9)),
        activation=draw(st.sampled_from(list(HF_ACTIVATIONS))),
        shared_expert=draw(st.booleans()),
    )
    return config, draw(st.integers(1, 12)), draw(st.integers(0, 10**6))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(cases())
def test_equals_an_explicit_sum(case: tuple[ModelConfig, int, int]) -> None:
    config, n_tokens, seed = case
    moe = build(config, seed)
    x = torch.randn(n_tokens, config.n_embd, dtype=torch.float64, requires_grad=True)
    y, _ = moe(x)
    want = written_out(moe, x)
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradients(y, x, moe), gradients(want, x, moe), rtol=1e-10, atol=1e-12)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(cases())
def test_equals_transformers(case: tuple[ModelConfig, int, int]) -> None:
    """Output, router logits and all gradients; transformers rounds the gates to float32 even in float64."""
    config, n_tokens, seed = case
    moe = build(config_of(**fields_of(config) | {"shared_expert": True}), seed)
    theirs = Llama4TextMoe(
        Llama4TextConfig(
            hidden_size=config.n_embd,
            intermediate_size=config.moe_intermediate_size,
            num_local_experts=config.n_expert,
            num_experts_per_tok=config.n_expert_per_token,
            hidden_act=HF_ACTIVATIONS[config.activation],
        )
    ).double()
    pairs = {
        "router.weight": (theirs.router.weight, lambda w: w),
        "experts.gate_up": (theirs.experts.gate_up_proj, lambda w: w.transpose(1, 2)),
        "experts.down": (theirs.experts.down_proj, lambda w: w.transpose(1, 2)),
        "shared.fc_1.weight": (theirs.shared_expert.gate_proj.weight, lambda w: w),
        "shared.fc_2.weight": (theirs.shared_expert.up_proj.weight, lambda w: w),
        "shared.proj.weight": (theirs.shared_expert.down_proj.weight, lambda w: w),
    }
    ours = dict(moe.named_parameters())
    assert set(ours) == set(pairs)
    with torch.no_grad():
        for name, (parameter, turn) in pairs.items():
            parameter.copy_(turn(ours[name]))
    x = torch.randn(1, n_tokens, config.n_embd, dtype=torch.float64, requires_grad=True)
    y, _ = moe(x)
    want = theirs(x)[0].view(x.shape)
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(y, want, **close)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (want * weights).sum().backward()
    theirs_x, x.grad = x.grad, None
    mine = gradients(y, x, moe)
    torch.testing.assert_close(mine["x"], theirs_x, **close)
    for name, (parameter, turn) in pairs.items():
        torch.testing.assert_close(mine[name], turn(parameter.grad), **close, msg=lambda m, n=name: f"{n}: {m}")


def fields_of(config: ModelConfig) -> dict[str, object]:
    names = ("n_expert", "n_embd", "moe_intermediate_size", "activation")
    return {name: getattr(config, name) for name in names} | {"k": config.n_expert_per_token}


@pytest.mark.parametrize(("n_expert", "k"), [(1, 1), (5, 1), (5, 2), (3, 3)])
def test_statistics_count_valid_tokens_only(n_expert: int, k: int) -> None:
    moe = build(config_of(n_expert, k), seed=n_expert)
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    valid = torch.rand(2, 7) < 0.6
    assert 0 < valid.sum() < 14
    y, statistics = moe(x, valid)
    assert torch.equal(y, moe(x)[0]), "uncounted tokens must still be computed"
    logits = x[valid] @ moe.router.weight.t()  # (n, E)
    assigned = torch.zeros(n_expert, dtype=torch.float64)
    for row in logits:
        for e in row.argsort(descending=True)[:k]:
            assigned[e] += 1
    assert torch.equal(statistics.assigned, assigned) and assigned.sum() == k * valid.sum()
    assert not statistics.assigned.requires_grad and statistics.tokens == valid.sum()
    probability = logits.exp() / logits.exp().sum(-1, keepdim=True)
    torch.testing.assert_close(statistics.probability, probability.sum(0), rtol=1e-12, atol=1e-12)
    z = logits.exp().sum(-1).log()
    torch.testing.assert_close(statistics.log_z_squared, z.square().sum(), rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(moe(x, torch.ones_like(valid))[1], moe(x)[1], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("k", [1, 2])
def test_losses_and_their_gradients_equal_the_formulas(k: int) -> None:
    n_expert, layers = 4, [build(config_of(4, k), seed=s) for s in range(3)]
    x = torch.randn(9, 8, dtype=torch.float64)
    statistics = stack_statistics([moe(x)[1] for moe in layers])
    assert [tuple(s.shape) for s in statistics] == [(3, 4), (3, 4), (3,), (3,)]
    balance, z = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for moe in layers:
        logits = x @ moe.router.weight.t()
        shares = F.one_hot(logits.topk(k).indices, n_expert).sum((0, 1)).double() / (9 * k)
        balance = balance + n_expert * (shares * logits.softmax(-1).mean(0)).sum() / 3
        z = z + logits.logsumexp(-1).square().mean() / 3
    routers = [moe.router.weight for moe in layers]
    for ours, theirs in ((load_balance_loss(statistics), balance), (router_z_loss(statistics), z)):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
        mine, want = (torch.autograd.grad(loss, routers, retain_graph=True) for loss in (ours, theirs))
        torch.testing.assert_close(mine, want, rtol=1e-10, atol=1e-14)
        assert all(g.abs().max() > 0 for g in mine)


def test_load_balance_loss_of_even_and_one_sided_routing() -> None:
    zero, tokens = torch.zeros(()), torch.tensor(12.0)
    even = RouterStatistics(torch.full((4,), 6.0), torch.full((4,), 3.0), zero, tokens)  # k = 2
    assert load_balance_loss(even) == 1
    one_sided = RouterStatistics(torch.tensor([12.0, 0, 0, 0]), torch.tensor([12.0, 0, 0, 0]), zero, tokens)
    assert load_balance_loss(one_sided) == 4
    none = RouterStatistics(torch.zeros(4), torch.zeros(4), zero, zero)
    assert load_balance_loss(none) == 0 and router_z_loss(none) == 0, "a micro-batch without targets"
    assert load_balance_loss(stack_statistics([even, one_sided])) == 2.5


def test_an_expert_without_tokens_has_a_gradient_of_zero() -> None:
    moe = build(config_of(4, 1), seed=0)
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[:, 0] = torch.tensor([1.0, 3.0, 2.0, 0.0])
    x = torch.rand(10, 8, dtype=torch.float64) + 0.1  # the first component is positive: all tokens go to expert 1
    y, statistics = moe(x)
    assert statistics.assigned.tolist() == [0, 10, 0, 0]
    y.square().sum().backward()
    for weight in (moe.experts.gate_up, moe.experts.down):
        assert weight.grad is not None
        assert [bool(g.abs().max() > 0) for g in weight.grad] == [False, True, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(5, 0, 3, 8), (0, 16, 0, 0), (1, 2, 3, 10)])
def test_grouped_equals_looped(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    """PyTorch's grouped matrix multiply on the CPU, called as on CUDA, against the loop; empty experts too."""
    torch.manual_seed(0)
    experts = Experts(config_of(4, 1, moe_intermediate_size=16)).to(dtype)
    x = torch.randn(16, 8, dtype=dtype, requires_grad=True)
    ends = torch.tensor(list(itertools.accumulate(sizes)), dtype=torch.int32)
    results = []
    for compute in (experts.looped, experts.grouped):
        y = compute(x, experts.gate_up, experts.down, ends)
        results.append((y, *torch.autograd.grad(y.float().square().sum(), [x, *experts.parameters()])))
    for looped, grouped in zip(*results, strict=True):
        torch.testing.assert_close(grouped, looped)


def test_the_router_is_exact_under_autocast() -> None:
    """The same statistics and experts as in float32; the outputs are those of bf16 arithmetic."""
    moe = build(config_of(4, 2, n_embd=32), seed=1, dtype=torch.float32)
    x = torch.randn(64, 32)
    y, statistics = moe(x)
    with torch.autocast("cpu", torch.bfloat16):
        low, low_statistics = moe(x)
    for ours, theirs in zip(low_statistics, statistics, strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs)
    assert low.dtype == torch.bfloat16
    # Inputs, weights, two products and a sum are each rounded to 8 bits.
    assert 0 < (low - y).abs().max() < 8 * 2**-8 * y.abs().max()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_the_cpu_without_host_sync() -> None:
    moe = build(config_of(6, 2, n_embd=64, moe_intermediate_size=48), seed=2, dtype=torch.bfloat16)
    x = torch.randn(200, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        x[:, 0] = 1
        moe.router.weight[5, 0] = -100  # which gets no token
    x.requires_grad_()
    y, statistics = moe(x)
    assert statistics.assigned[5] == 0
    want = gradients(y, x, moe)
    there = moe.cuda()
    x_there = x.detach().cuda().requires_grad_()
    there(x_there)  # the first call compiles and allocates
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        y_there, statistics_there = there(x_there)
        loss = y_there.float().square().sum() + load_balance_loss(statistics_there) + router_z_loss(statistics_there)
        loss.backward(retain_graph=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(statistics_there.assigned.cpu(), statistics.assigned)
    torch.testing.assert_close(y_there.cpu(), y, rtol=2e-2, atol=2e-2)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(y.dtype)
    grads = torch.autograd.grad((y_there * weights.cuda()).sum(), [x_there, *there.parameters()])
    for (name, one), other in zip(want.items(), grads, strict=True):
        assert (other.cpu() - one).abs().max() < 2e-2 * one.abs().max(), name
