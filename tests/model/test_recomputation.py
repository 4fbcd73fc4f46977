"""Activation checkpointing: the same losses and gradients, less memory, and `op` repeats no matrix multiply."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lit_model.init import initialise
from lit_model.model import GPT, LossOutput, Recompute
from lit_model.registry import get_config

B, T = 2, 32
BOUNDS = torch.tensor([0, 5, 6, 26, 32, 64, 64], dtype=torch.int32)
KINDS: tuple[Recompute, ...] = ("none", "op", "block", "full")


def build(kind: Recompute, every: int = 2, **changes: Any) -> GPT:
    config = get_config("debug", **{"n_layer": 3, **changes})
    model = GPT(config, activation_checkpointing=kind, activation_checkpointing_every=every)
    initialise(model, config, seed=3)
    return model


def step(model: GPT, documents: bool = True) -> LossOutput:
    generator = torch.Generator().manual_seed(0)
    tokens, targets = torch.randint(0, model.config.vocab_size, (2, B, T), generator=generator)
    torch.manual_seed(5)  # dropout's
    out = model(tokens, targets, cu_seqlens=BOUNDS if documents else None)
    out.loss_sum.backward()
    torch.rand(())  # the state of the generator after a step must not depend on recomputation either
    return out


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("low_precision", [False, True])
@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize("biases", [True, False])  # other operators, and other rules for what may be overwritten
@pytest.mark.parametrize("kind", KINDS[1:])
def test_losses_and_gradients_are_equal(
    kind: Recompute, biases: bool, documents: bool, low_precision: bool, dropout: float
) -> None:
    changes = {"dropout": dropout, "attention_bias": biases, "mlp_bias": biases}
    plain, recomputed = (build(k, **changes) for k in ("none", kind))
    ends = []
    for model in (plain, recomputed):
        for _ in range(2):  # accumulation
            with torch.autocast("cpu", torch.bfloat16) if low_precision else contextlib.nullcontext():
                out = step(model, documents)
        ends.append((out.token_losses, torch.get_rng_state()))
    for a, b in zip(*ends, strict=True):
        assert torch.equal(a, b)
    for (name, p), q in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


@pytest.mark.parametrize("every", [1, 2, 3, 4])
def test_every_nth_block_is_recomputed(every: int) -> None:
    kinds = [block.recompute for block in build("block", every, n_layer=6).blocks()]
    assert kinds == ["full" if i % every == 0 else "none" for i in range(1, 7)]


class Calls(TorchDispatchMode):
    """Counts calls of operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split(".")[0]
        self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def test_what_is_computed_again() -> None:
    calls = {}
    for kind in KINDS:
        with Calls() as counted:
            step(build(kind))
        calls[kind] = counted.counts
    for name in ("aten::mm", "llammlein::attention_loop"):
        none, op, block, full = (calls[kind][name] for kind in KINDS)
        assert none == op < block < full, name
    assert calls["full"]["llammlein::attention_loop"] == 6 and calls["block"]["llammlein::attention_loop"] == 4
    assert calls["none"]["aten::silu"] == 3 and calls["op"]["aten::silu"] == 6


def test_evaluation_recomputes_nothing() -> None:
    model = build("full").eval()
    with Calls() as counted:
        step(model)
    assert counted.counts["llammlein::attention_loop"] == 3


def peak_bytes(model: GPT) -> int:
    """The most that is allocated at once in a step, beyond what was there before: the allocator's own events."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(model)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def test_the_measured_peak_falls() -> None:
    peaks = []
    for kind in KINDS:
        model = build(kind, n_layer=8)
        step(model)  # its gradients stay
        peaks.append(peak_bytes(model))
    none, op, block, full = peaks
    assert none > op > block > full, peaks


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS[1:])
def test_compiled_blocks_recompute_too(kind: Recompute) -> None:
    plain, recomputed = build("none"), build(kind)
    for model in (plain, recomputed):
        for block in model.blocks():
            block.compile()
        step(model)
    for (name, p), q in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-5, atol=1e-6 * p.grad.abs().max().item(), msg=name)
