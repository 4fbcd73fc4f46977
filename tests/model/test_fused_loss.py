"""The fused cross-entropy against float64 and the plain path, on CUDA, or on a CPU in Triton's interpreter:

TRITON_INTERPRET=1 python -m pytest tests/model/test_fused_loss.py
"""

import importlib.util
import os

import pytest
import torch
import torch.nn.functional as F

from lit_model.kernels import cross_entropy
from lit_model.kernels.cross_entropy import choose_loss
from lit_model.loss import IGNORE_INDEX, chunked_cross_entropy

HAS_TRITON = importlib.util.find_spec("triton") is not None


@pytest.fixture
def device(monkeypatch):
    if not HAS_TRITON:
        pytest.skip("triton is not installed")
    if torch.cuda.is_available():
        return "cuda"
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no CUDA device, and TRITON_INTERPRET=1 is not set")
    monkeypatch.setattr(cross_entropy, "obstacle", lambda device, dtype: None)
    return "cpu"


def test_choice():
    assert choose_loss("auto", "cpu", torch.bfloat16) == ("plain", "it needs CUDA, not cpu")
    assert choose_loss("plain", "cuda", torch.bfloat16) == ("plain", "requested")
    assert choose_loss("auto", "cuda", torch.float32).reason == "it needs bfloat16 or float16 logits, not float32"
    assert choose_loss("auto", "cuda", torch.bfloat16).name == ("fused" if HAS_TRITON else "plain")
    with pytest.raises(ValueError, match="fused loss can't run here: it needs CUDA, not cpu; choose plain or auto"):
        choose_loss("fused", "cpu", torch.bfloat16)


def losses(hidden, weight, bias, targets, vocab, kernel, softcap, z_loss):
    """(loss, token losses, gradients of hidden, weight and bias), the exact ones in float64 with kernel None."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in (hidden, weight, bias)]
    if kernel is None:
        leaves = [None if x is None else x.detach().double().requires_grad_() for x in leaves]
        z = F.linear(*leaves)[:, :vocab]
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        valid = targets != IGNORE_INDEX
        token_losses = F.cross_entropy(z, targets, ignore_index=IGNORE_INDEX, reduction="none")
        loss = token_losses.sum() + z_loss * z.logsumexp(-1)[valid].square().sum()
    else:
        out = chunked_cross_entropy(
            *(leaves[0], leaves[1], targets, vocab),
            bias=leaves[2],
            softcap=softcap,
            z_loss=z_loss,
            kernel=kernel,
            chunk_bytes=4 * weight.shape[0] * 7,
        )
        loss, token_losses = out.loss_sum, out.token_losses
    loss.backward()
    return [loss.detach(), token_losses.detach(), *(x.grad for x in leaves if x is not None)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize(("z_loss", "bias"), [(0.0, False), (0.1, True)])
@pytest.mark.parametrize(("vocab", "padded"), [(90, 96), (9000, 9024)])
def test_as_close_to_float64_as_the_plain_path(device, vocab, padded, z_loss, bias, softcap, dtype):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(17, 32, generator=g), torch.randn(padded, 32, generator=g) / 4
    targets = torch.randint(vocab, (17,), generator=g)
    targets[[0, 5, 16]] = IGNORE_INDEX
    b = torch.randn(padded, generator=g).to(device, dtype) if bias else None
    args = (hidden.to(device, dtype), weight.to(device, dtype), b, targets.to(device), vocab)
    exact, plain, fused = (losses(*args, kernel, softcap, z_loss) for kernel in (None, "plain", "fused"))
    for want, other, got in zip(exact, plain, fused, strict=True):
        bound = (other - want).abs().max() + 2 * torch.finfo(dtype).eps * want.abs().max()
        assert (got - want).abs().max() <= bound
    torch.testing.assert_close(fused[1], plain[1], rtol=1e-6, atol=1e-5)
    assert not fused[3][vocab:].any() and not fused[2][[0, 5, 16]].any() and not fused[1][[0, 5, 16]].any()


@pytest.mark.gpu
def test_ignored_rows_may_hold_anything(device):
    hidden, weight = torch.randn(3, 16, device=device).bfloat16(), torch.randn(32, 16, device=device).bfloat16()
    hidden[1] = float("nan")
    targets = torch.tensor([3, IGNORE_INDEX, 31], device=device)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    out = chunked_cross_entropy(*leaves, targets, 32, kernel="fused")
    out.loss_sum.backward()
    assert out.token_losses[1] == 0 and all(torch.isfinite(x.grad).all() for x in leaves)
    with torch.no_grad():  # without a gradient: the same losses, bit for bit
        assert torch.equal(chunked_cross_entropy(*leaves, targets, 32, kernel="fused").token_losses, out.token_losses)
    hidden.data[0] = float("nan")  # a row that counts: its loss is not finite, so that the step is skipped
    assert not torch.isfinite(chunked_cross_entropy(*leaves, targets, 32, kernel="fused").loss_sum)
