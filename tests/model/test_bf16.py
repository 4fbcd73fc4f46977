"""bf16 on a CPU without bf16 instructions: products in float32 give the results of a bf16 product."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lit_model.bf16 import Float32ProductLinear, use_float32_products
from lit_model.config import ModelConfig
from lit_model.kernels import cpu
from lit_model.kernels.choose import attention
from lit_model.model import GPT

BF16 = 2.0**-8


def exact(x: Tensor) -> Tensor:
    """Rounded to bf16, as float64."""
    return x.detach().bfloat16().double()


@pytest.mark.parametrize("bias", [False, True])
def test_a_product_is_that_of_the_rounded_operands(bias: bool) -> None:
    """Against float64: output and gradients are within the rounding of their own result."""
    torch.manual_seed(0)
    linear = nn.Linear(48, 32, bias=bias)
    layer = Float32ProductLinear.of(linear)
    assert layer.weight is linear.weight
    x = torch.randn(3, 20, 48, requires_grad=True)
    weights = torch.randn(3, 20, 32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.backward(weights.bfloat16())

    x64, w64 = exact(x).requires_grad_(), exact(linear.weight).requires_grad_()
    y64 = x64 @ w64.t() + (exact(linear.bias) if bias else 0)
    y64.backward(exact(weights))
    assert x.grad is not None and layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(y.double(), y64, rtol=2 * BF16, atol=0.02)
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=2 * BF16, atol=1e-5)
    torch.testing.assert_close(layer.weight.grad.double(), w64.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("documents", [False, True])
def test_attention_is_that_of_the_rounded_operands(documents: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for attention, whose scores and weights stay in float32."""
    monkeypatch.setattr(cpu, "HAS_BF16", False)
    torch.manual_seed(0)
    cu_seqlens = torch.tensor([0, 7, 16, 32], dtype=torch.int32) if documents else None
    q, k, v = (torch.randn(2, 16, 2, 8).bfloat16() for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        y = attention(q, k, v, cu_seqlens, "loop")
    expected = attention(q.double(), k.double(), v.double(), cu_seqlens, "dense")
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected, rtol=BF16, atol=1e-6)


@pytest.mark.parametrize("has_bf16", [False, True])
def test_a_model_trains_either_way(has_bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss under autocast is near that of float32, with the layers replaced only where it helps."""
    monkeypatch.setattr(cpu, "HAS_BF16", has_bf16)
    config = ModelConfig(n_layer=1, n_head=2, n_embd=16, intermediate_size=32, vocab_size=64, block_size=16)
    torch.manual_seed(0)
    model = GPT(config)
    names = [name for name, _ in model.named_parameters()]
    tokens = torch.randint(0, 64, (2, 17))
    plain = model(tokens[:, :-1], tokens[:, 1:]).loss_sum
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        use_float32_products(model.blocks(), torch.device(device), dtype)
        assert type(next(model.blocks()).attn.qkv) is nn.Linear
    use_float32_products(model.blocks(), torch.device("cpu"), torch.bfloat16)
    assert [name for name, _ in model.named_parameters()] == names
    assert isinstance(next(model.blocks()).attn.qkv, Float32ProductLinear) != has_bf16
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens[:, :-1], tokens[:, 1:]).loss_sum
    loss.backward()
    torch.testing.assert_close(loss, plain, rtol=1e-3, atol=0)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
