"""Float8 linear layers compared with their definition in float64 and with torchao's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lit_model.float8 import Float8Linear, use_float8
from lit_model.model import GPT
from lit_model.registry import get_config

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as float8 numbers with one scale represent it, float64."""
    largest = x.abs().max().double()
    scale = torch.finfo(dtype).max / largest if largest else 1.0
    return (x.double() * scale).to(dtype).double() / scale


def run(layer: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(grad.to(y.dtype))
    assert x.grad is not None and isinstance(layer.weight.grad, Tensor)
    return y.detach(), x.grad, layer.weight.grad.clone()


def draw(dtype: torch.dtype, magnitude: float = 1.0) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    layer = nn.Linear(64, 48)
    return layer, (magnitude * torch.randn(4, 32, 64)).to(dtype), (1e-7 * torch.randn(4, 32, 48)).to(dtype)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


@pytest.mark.parametrize("magnitude", [1.0, 1e-6, 1e5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_of_rounded_operands(dtype: torch.dtype, magnitude: float) -> None:
    """All three multiply what float8 keeps of their operands, whatever the magnitudes; results are rounded once."""
    layer, x, grad = draw(dtype, magnitude)
    y, of_x, of_weight = run(Float8Linear.of(layer), x, grad)
    x8, w8 = rounded(x, E4M3).flatten(0, 1), rounded(layer.weight.detach(), E4M3)
    g8 = rounded(grad, E5M2).flatten(0, 1)
    eps = float(torch.finfo(dtype).eps)
    bias = layer.bias.detach().to(dtype).double()
    # The scales are float32: a value at the middle between two numbers may round either way.
    assert relative(y.flatten(0, 1), x8 @ w8.t() + bias) < 2 * eps + 1e-3
    assert relative(of_x.flatten(0, 1), g8 @ w8) < 2 * eps + 1e-3
    assert relative(of_weight, g8.t() @ x8) < 1e-3 and of_weight.dtype == layer.weight.dtype


def test_equals_torchao() -> None:
    """Bit for bit in bf16: an implementation by others, of the same recipe."""
    torchao = pytest.importorskip("torchao.float8")
    layer, x, grad = draw(torch.bfloat16)
    layer.to(torch.bfloat16)
    want = run(torchao.convert_to_float8_training(nn.Sequential(layer))[0], x, grad)
    for got, expected in zip(run(Float8Linear.of(layer), x, grad), want, strict=True):
        assert torch.equal(got, expected)


def test_special_values() -> None:
    """Zeros give zeros; a value that is not finite reaches every result that depends on it."""
    layer, x, grad = draw(torch.float32)
    float8 = Float8Linear.of(layer)
    y, of_x, of_weight = run(float8, torch.zeros_like(x), torch.zeros_like(grad))
    assert torch.equal(y, layer.bias.expand_as(y)) and not of_x.any() and not of_weight.any()
    for value in (torch.inf, torch.nan):
        bad = x.clone()
        bad[0, 0, 0] = value
        assert not run(float8, bad, grad)[0].isfinite().all()
        assert not run(float8, bad, grad)[2].isfinite().all()
        bad_grad = grad.clone()
        bad_grad[0, 0, 0] = value
        _, of_x, of_weight = run(float8, x, bad_grad)
        assert not of_x.isfinite().all() and not of_weight.isfinite().all()


def test_outside_training_it_is_a_linear_layer() -> None:
    layer, x, _ = draw(torch.float32)
    float8 = Float8Linear.of(layer)
    assert float8.weight is layer.weight and float8.bias is layer.bias
    with torch.no_grad():
        assert torch.equal(float8(x), layer(x))
    assert torch.equal(float8.eval()(x), layer(x))
    assert not torch.equal(float8.train()(x), layer(x))


def test_the_layers_that_are_converted() -> None:
    """Those of attention and MLP with sizes of multiples of 16; routers, experts and the head stay. No name changes."""
    with torch.device("meta"):
        model = GPT(get_config("debug", n_layer=4, n_expert=4, n_expert_per_token=1, shared_expert=True))
        other = GPT(get_config("debug", n_layer=4, intermediate_size=40))
    names = [name for name, _ in model.named_parameters()]
    assert use_float8(list(model.blocks())) == 4 * 5
    assert [name for name, _ in model.named_parameters()] == names
    converted = [name for name, module in model.named_modules() if isinstance(module, Float8Linear)]
    assert len(converted) == 20 and not any("router" in name for name in converted)
    assert use_float8(list(other.blocks()), keep_ends=True) == 2 * 2  # 40 is no multiple of 16
    inside = {name.split(".")[2] for name, module in other.named_modules() if isinstance(module, Float8Linear)}
    assert inside == {"1", "2"}
    assert len({block.kind() for block in other.blocks()}) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_on_cuda(compiled: bool) -> None:
    """The same products as on the CPU, under autocast, eager and compiled."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no CUDA device with float8")
    layer, x, grad = draw(torch.bfloat16)
    want = run(Float8Linear.of(layer), x, grad)
    float8 = Float8Linear.of(layer).cuda()
    if compiled:
        float8.compile(fullgraph=True)
    with torch.autocast("cuda", torch.bfloat16):
        got = run(float8, x.cuda(), grad.cuda())
    assert got[2].dtype == torch.float32
    for one, other in zip(got, want, strict=True):
        assert relative(one.cpu(), other) < 1e-2
