"""Activation checkpointing: the same losses and gradients, less memory, and `op` repeats no matrix multiply."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lit_model.init import initialise
from lit_model.loss import LossOutput
from lit_model.model import GPT, Recompute
from lit_model.registry import get_config

B, T = 2, 32
BOUNDS = torch.tensor([0, 5, 6, 26, 32, 64, 64], dtype=torch.int32)
KINDS: tuple[Recompute, ...] = ("none", "op", "block", "full")


def build(kind: Recompute, every: int = 2, **changes: Any) -> GPT:
    config = get_config("debug", **{"n_layer": 3, **changes})
    model = GPT(config, activation_checkpointing=kind, activation_checkpointing_every=every)
    initialise(model, config, seed=3)
    return model


def step(model: GPT, documents: bool = True, length: int = T) -> LossOutput:
    generator = torch.Generator().manual_seed(0)
    tokens, targets = torch.randint(0, model.config.vocab_size, (2, B, length), generator=generator)
    torch.manual_seed(5)  # dropout's
    out = model(tokens, targets, cu_seqlens=BOUNDS if documents else None)
    out.loss_sum.backward()
    torch.rand(())  # the state of the generator after a step must not depend on recomputation either
    return out


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("low_precision", [False, True])
@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize("biases", [True, False])  # other operators, with other rules for in-place use
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


def test_which_operators_are_recomputed() -> None:
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


def peak_bytes(model: GPT, length: int) -> int:
    """Peak allocation of a step above the level before it, from the allocator's own events."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(model, documents=False, length=length)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


SIZES = {
    "small": {"n_layer": 8},
    "wide": {
        "n_layer": 12,
        "n_embd": 512,
        "n_head": 8,
        "n_query_groups": 4,
        "intermediate_size": 1408,
        "block_size": 1024,
    },
}


@pytest.mark.parametrize("size", ["small", pytest.param("wide", marks=pytest.mark.slow)])
def test_the_measured_peak_decreases(size: str) -> None:
    """The table in docs/parallelism.md: `pytest -m "slow or not slow" -s -k measured_peak` with this file."""
    peaks = {}
    for kind in KINDS:
        model = build(kind, **SIZES[size])
        step(model)  # its gradients remain allocated
        peaks[kind] = peak_bytes(model, model.config.block_size)
    print("\n" + ", ".join(f"{kind} {peak / 1e6:.1f} MB" for kind, peak in peaks.items()))
    none, op, block, full = peaks.values()
    assert none > op > block > full, peaks


@pytest.mark.slow
def test_compiled_blocks_recompute_too() -> None:
    gradients, peaks = {}, {}
    for kind in KINDS:
        model = build(kind, n_layer=4)
        for block in model.blocks():
            block.compile()
        step(model, documents=False, length=256)
        gradients[kind] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        peaks[kind] = peak_bytes(model, 256)
    for kind in KINDS[1:]:
        for name, want in gradients["none"].items():
            scale = want.abs().max().item()
            torch.testing.assert_close(gradients[kind][name], want, rtol=1e-5, atol=1e-5 * scale, msg=f"{kind} {name}")
    print("\n" + ", ".join(f"{kind} {peak / 1e6:.1f} MB" for kind, peak in peaks.items()))
    assert peaks["none"] > peaks["op"] > peaks["full"] and peaks["none"] > peaks["block"] > peaks["full"], peaks
