"""AdamW, clipping, loss scaling and schedule, compared with torch's and with closed forms."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from typing import Any

import pytest
import torch
from devices import DEVICES

from lit_model.model import GPT
from lit_model.registry import get_config
from pretrain.args import OptimArgs
from pretrain.guards import skip_if_not_finite
from pretrain.optim import AdamW, LossScale, clip_coefficient, decays, gradient_norm
from pretrain.schedule import learning_rate


def parameters(seed: int = 0) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"matrix": (5, 7), "norm": (7,), "bias": (5,)}
    return {n: torch.nn.Parameter(torch.randn(s, generator=generator)) for n, s in shapes.items()}


def test_adamw_equals_torch_with_decay_on_matrices_only() -> None:
    args = OptimArgs(lr=1e-2, weight_decay=0.3)
    ours, theirs = parameters(), parameters()
    optimizer = AdamW(ours.items(), args)
    groups = [
        {"params": [theirs["matrix"]], "weight_decay": 0.3},
        {"params": [theirs["norm"], theirs["bias"]], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    for step in range(20):
        gradients = parameters(step + 1)
        for name in ours:
            ours[name].grad = gradients[name].detach().clone()
            theirs[name].grad = gradients[name].detach().clone()
        optimizer.step(1e-2)
        reference.step()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-7)


DECAYING = {
    "transformer.wte.weight",
    "transformer.wpe.weight",
    "lm_head.weight",
    "attn.qkv.weight",
    "attn.proj.weight",
    "mlp.fc.weight",
    "mlp.proj.weight",
    "mlp.router.weight",
    "mlp.experts.gate_up",
    "mlp.experts.down",
    "mlp.shared.fc_1.weight",
    "mlp.shared.fc_2.weight",
    "mlp.shared.proj.weight",
}
STAYING = {
    "transformer.ln_f.weight",
    "transformer.ln_f.bias",
    "lm_head.bias",
    "norm_1.weight",
    "norm_1.bias",
    "norm_2.weight",
    "norm_2.bias",
    "attn.qkv.bias",
    "attn.proj.bias",
    "attn.q_norm.weight",
    "attn.k_norm.weight",
    "post_attention_norm.weight",
    "post_mlp_norm.weight",
    "mlp.fc.bias",
    "mlp.proj.bias",
}


def test_which_parameters_decay() -> None:
    """In two models with every kind of parameter: which ones a step with zero gradients shrinks, and which not."""
    plain = {
        "norm_class_name": "LayerNorm",
        "position_embedding": "learned",
        "mlp_gated": False,
        "attention_bias": True,
        "mlp_bias": True,
        "lm_head_bias": True,
    }
    experts = {"n_expert": 4, "post_norm": True, "qk_norm": "projection"}
    decaying, staying = set(), set()
    for changes in (plain, experts):
        parameters = dict(GPT(get_config("debug", **changes)).named_parameters())
        optimizer = AdamW(parameters.items(), OptimArgs(weight_decay=0.5))
        for p in parameters.values():
            torch.nn.init.constant_(p, 2.0)
            p.grad = torch.zeros_like(p)
        optimizer.step(0.1)
        for name, p in parameters.items():
            kind = name.split(".", 3)[-1] if ".h." in name else name
            (decaying if decays(p) else staying).add(kind)
            torch.testing.assert_close(p.detach(), torch.full_like(p, 2.0 * (1 - 0.1 * 0.5) if decays(p) else 2.0))
    assert decaying == DECAYING and staying == STAYING


def test_experts_are_updated_like_separate_matrices() -> None:
    generator = torch.Generator().manual_seed(0)
    stacked = torch.nn.Parameter(torch.randn(3, 5, 7, generator=generator))
    separate = {str(i): torch.nn.Parameter(matrix.clone()) for i, matrix in enumerate(stacked.detach())}
    optimizers = [AdamW([("experts", stacked)], OptimArgs()), AdamW(separate.items(), OptimArgs())]
    for _ in range(5):
        stacked.grad = torch.randn(stacked.shape, generator=generator)
        for p, gradient in zip(separate.values(), stacked.grad, strict=True):
            p.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step(1e-2)
    torch.testing.assert_close(stacked.detach(), torch.stack([p.detach() for p in separate.values()]), rtol=0, atol=0)


def test_skipped_step_changes_nothing() -> None:
    ours = parameters()
    optimizer = AdamW(ours.items(), OptimArgs())
    before = {n: p.detach().clone() for n, p in ours.items()}
    for p in ours.values():
        p.grad = torch.full_like(p, float("nan"))
    norm = gradient_norm(ours.values())
    optimizer.step(1e-2, skip_if_not_finite(norm), clip_coefficient(norm, 1.0))
    assert not torch.isfinite(norm)
    assert all(torch.equal(ours[n], before[n]) for n in ours)
    assert optimizer.step_count == 0
    assert all(not state["exp_avg"].any() and not state["exp_avg_sq"].any() for state in optimizer.state.values())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("max_norm", [0.5, 100.0, 0.0])
def test_clipping_equals_torch(max_norm: float, scale: float | None, device: str) -> None:
    """By the product, and inside of the fused kernel: the same parameters as after torch's own clipping."""
    loss_scale = None if scale is None else torch.tensor(scale, device=device)
    names = ("theirs", "by product", "in kernel")
    models = {name: {n: torch.nn.Parameter(p.to(device)) for n, p in parameters().items()} for name in names}
    optimizers = {name: AdamW(models[name].items(), OptimArgs()) for name in names}
    optimizers["by product"].scales_in_kernel, optimizers["in kernel"].scales_in_kernel = False, True
    for step in range(5):
        for name, model in models.items():
            for p, gradient in zip(model.values(), parameters(step + 3).values(), strict=True):
                p.grad = gradient.detach().to(device) * (scale if scale and name != "theirs" else 1.0)
        expected = torch.nn.utils.clip_grad_norm_(models["theirs"].values(), max_norm or 1e9)
        optimizers["theirs"].step(1e-2)
        for name in names[1:]:
            norm = gradient_norm(models[name].values(), loss_scale)
            torch.testing.assert_close(norm, expected)
            coefficient = clip_coefficient(norm, max_norm, loss_scale)
            assert (coefficient is None) == (max_norm == 0 and scale is None)
            optimizers[name].step(1e-2, skip_if_not_finite(norm), coefficient)
    for name in names[1:]:
        assert optimizers[name].step_count == 5
        for ours, theirs in zip(models[name].values(), models["theirs"].values(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_loss_scale_halves_on_overflow_and_doubles_after_the_interval() -> None:
    scale = LossScale(torch.tensor(8.0), torch.tensor(0, dtype=torch.int32), interval=3)
    for skip, expected in ((1, 4), (0, 4), (0, 4), (0, 8), (0, 8), (1, 4)):
        scale.update(torch.tensor(float(skip)))
        assert scale.scale == expected
    restored = LossScale.create(torch.device("cpu"))
    restored.load(scale.to_dict())
    assert restored.scale == 4 and restored.good_steps == 0


def test_schedules_at_their_boundaries() -> None:
    args = OptimArgs(lr=1.0, lr_min=0.1, warmup_steps=10)
    assert learning_rate(args, 0, 100) == pytest.approx(0.1)
    assert learning_rate(args, 9, 100) == learning_rate(args, 10, 100) == pytest.approx(1.0)
    assert learning_rate(args, 99, 100) == pytest.approx(0.1)
    middle = 10 + 89 / 3
    assert learning_rate(args, round(middle), 100) == pytest.approx(
        0.1 + 0.9 * (1 + math.cos(math.pi / 3)) / 2, rel=0.01
    )
    linear = OptimArgs(lr=1.0, schedule="linear")
    assert [learning_rate(linear, s, 5) for s in range(5)] == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert learning_rate(OptimArgs(lr=1.0, schedule="constant"), 99, 100) == 1.0
    assert learning_rate(OptimArgs(lr=1.0), 0, 1) == 1.0


@pytest.mark.parametrize(
    ("shape", "halfway"), [("sqrt", 1 - 0.5**0.5), ("linear", 0.5), ("cosine", 0.5), ("square", 0.75)]
)
def test_wsd_at_its_boundaries(shape: Any, halfway: float) -> None:
    args = OptimArgs(lr=1.0, lr_min=0.2, warmup_steps=4, schedule="wsd", decay_steps=8, decay_shape=shape)
    rates = [learning_rate(args, step, 20) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and set(rates[4:12]) == {1.0}
    assert all(a > b for a, b in itertools.pairwise(rates[11:]))
    assert rates[15] == pytest.approx(0.2 + 0.8 * halfway) and rates[19] == 0.2
    assert rates[:12] == [learning_rate(args, step, 1000) for step in range(12)]
    after = dataclasses.replace(args, steps_before=15)
    assert [learning_rate(after, step, 5) for step in range(5)] == rates[15:]
    assert dataclasses.replace(after, decay_steps=0, decay_fraction=0.4).resolved(5).decay_steps == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "wsd"}, "wsd needs --optim.decay_steps or --optim.decay_fraction"),
        ({"decay_steps": 5}, "--optim.decay_steps 5 is for --optim.schedule wsd"),
        ({"schedule": "linear", "decay_shape": "cosine"}, "--optim.decay_shape cosine is for --optim.schedule wsd"),
        ({"schedule": "wsd", "decay_steps": 5, "decay_fraction": 0.1}, "not both; got 5 and 0.1"),
        ({"schedule": "wsd", "decay_fraction": 1.5}, "--optim.decay_fraction 1.5 must be between 0 and 1"),
        ({"momentum": 0.9}, "--optim.momentum 0.9 is for --optim.name muon"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        OptimArgs(**settings)
