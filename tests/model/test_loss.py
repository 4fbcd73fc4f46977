"""The chunked cross-entropy, compared with torch's over full logits in float64."""

import pytest
import torch
import torch.nn.functional as F

from lit_model.loss import IGNORE_INDEX, chunked_cross_entropy, head_logits


def draw(N=37, C=24, V=96, vocab=90, ignore=0.3, seed=0, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, C, generator=g)
    weight = torch.randn(V, C, generator=g)
    targets = torch.randint(0, vocab, (N,), generator=g)
    targets[torch.rand(N, generator=g) < ignore] = IGNORE_INDEX
    return hidden.to(device), weight.to(device), targets.to(device), vocab


def reference(hidden, weight, targets, vocab, scale=1.0, dtype=torch.float64):
    hidden, weight = (x.detach().to(dtype).requires_grad_() for x in (hidden, weight))
    logits = (hidden @ weight.t())[:, :vocab]
    losses = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="none")
    (losses.sum() * scale).backward()
    return losses.detach(), hidden.grad, weight.grad


def ours(hidden, weight, targets, vocab, scale=1.0, chunk_tokens=None):
    hidden, weight = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    chunk_bytes = None if chunk_tokens is None else 4 * weight.shape[0] * chunk_tokens
    out = chunked_cross_entropy(hidden, weight, targets, vocab, chunk_bytes=chunk_bytes)
    (out.loss_sum * scale).backward()
    return out, hidden.grad, weight.grad


@pytest.mark.parametrize("chunk_tokens", [1, 5, 36, 37, 100, None])
def test_float64_equals_reference(chunk_tokens):
    hidden, weight, targets, vocab = draw()
    out, gh, gw = ours(hidden.double(), weight.double(), targets, vocab, 0.37, chunk_tokens)
    losses, rh, rw = reference(hidden, weight, targets, vocab, 0.37)
    for got, want in ((out.token_losses, losses), (out.loss_sum, losses.sum()), (gh, rh), (gw, rw)):
        torch.testing.assert_close(got.detach(), want, rtol=1e-12, atol=1e-12)


def test_float32_is_as_close_to_float64_as_torch():
    hidden, weight, targets, vocab = draw(N=300, C=64)
    exact = reference(hidden, weight, targets, vocab)
    own = reference(hidden, weight, targets, vocab, dtype=torch.float32)
    out, gh, gw = ours(hidden, weight, targets, vocab, chunk_tokens=64)
    assert out.loss_sum.dtype == out.token_losses.dtype == gh.dtype == gw.dtype == torch.float32
    for got, torchs, want in zip((out.token_losses, gh, gw), own, exact, strict=True):
        bound = 2 * (torchs - want).abs().max() + 2 * torch.finfo(torch.float32).eps * want.abs().max()
        assert (got - want).abs().max() <= bound


def test_shapes_and_ignored_targets():
    hidden, weight, targets, vocab = draw(N=36)
    hidden, targets = hidden.view(3, 12, -1).requires_grad_(), targets.view(3, 12)
    out = chunked_cross_entropy(hidden, weight, targets, vocab)
    assert out.token_losses.shape == (3, 12) and out.loss_sum.shape == () and not out.token_losses.requires_grad
    ignored = targets == IGNORE_INDEX
    assert (out.token_losses[ignored] == 0).all() and (out.token_losses[~ignored] > 0).all()
    out.loss_sum.backward()
    assert (hidden.grad[ignored] == 0).all() and (hidden.grad[~ignored] != 0).any(-1).all()


def test_padding_rows_get_no_probability_and_no_gradient():
    hidden, weight, targets, vocab = draw()
    weight[vocab:] = 1e3  # would dominate every softmax
    out, _, gw = ours(hidden, weight, targets, vocab)
    losses, _, _ = reference(hidden, weight, targets, vocab)
    torch.testing.assert_close(out.token_losses.double(), losses, rtol=1e-5, atol=1e-5)
    assert (gw[vocab:] == 0).all()


def test_no_valid_target_gives_zero_loss_and_zero_gradients():
    hidden, weight, targets, vocab = draw(ignore=2.0)
    hidden[3] = torch.inf  # the content of an ignored row must not matter
    out, gh, gw = ours(hidden, weight, targets, vocab)
    assert out.loss_sum == 0 and (out.token_losses == 0).all() and (gh == 0).all() and (gw == 0).all()


def test_without_gradients():
    hidden, weight, targets, vocab = draw()
    hidden.requires_grad_()
    losses, _, _ = reference(hidden, weight, targets, vocab)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for _ in range(2):
                out = chunked_cross_entropy(hidden, weight, targets, vocab, chunk_bytes=4 * 96 * 8)
                assert not out.loss_sum.requires_grad
                torch.testing.assert_close(out.token_losses.double(), losses, rtol=1e-5, atol=1e-5)


def test_frozen_head_or_frozen_hidden():
    hidden, weight, targets, vocab = draw()
    _, rh, rw = reference(hidden, weight, targets, vocab)
    h = hidden.clone().requires_grad_()
    chunked_cross_entropy(h, weight, targets, vocab).loss_sum.backward()
    torch.testing.assert_close(h.grad.double(), rh, rtol=1e-4, atol=1e-5)
    w = weight.clone().requires_grad_()
    chunked_cross_entropy(hidden, w, targets, vocab).loss_sum.backward()
    torch.testing.assert_close(w.grad.double(), rw, rtol=1e-4, atol=1e-5)


def test_second_backward_is_refused_not_wrong():
    hidden, weight, targets, vocab = draw()
    out = chunked_cross_entropy(hidden, weight.requires_grad_(), targets, vocab)
    (2 * out.loss_sum).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss_sum.backward()


def bf16_bounded(hidden, weight, targets, vocab, device):
    """Autocast: within the error of torch's own bfloat16 head with a float32 softmax."""
    exact = reference(hidden, weight, targets, vocab)

    def torchs():
        h, w = (x.detach().clone().requires_grad_() for x in (hidden, weight))
        with torch.autocast(device, torch.bfloat16):
            logits = F.linear(h, w)[:, :vocab]
        losses = F.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="none")
        losses.sum().backward()
        return losses.detach(), h.grad, w.grad

    h, w = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    with torch.autocast(device, torch.bfloat16):
        out = chunked_cross_entropy(h, w, targets, vocab, chunk_bytes=4 * w.shape[0] * 64)
    out.loss_sum.backward()
    assert h.grad.dtype == w.grad.dtype == torch.float32
    for got, own, want in zip((out.token_losses, h.grad, w.grad), torchs(), exact, strict=True):
        assert (got - want).norm() <= 1.5 * (own - want).norm() + 1e-6 * want.norm()


def test_autocast_is_bounded_by_torchs_error():
    bf16_bounded(*draw(N=300, C=64), "cpu")


def test_bfloat16_tensors_keep_their_dtype():
    hidden, weight, targets, vocab = draw()
    out, gh, gw = ours(hidden.bfloat16(), weight.bfloat16(), targets, vocab)
    assert gh.dtype == gw.dtype == torch.bfloat16 and out.loss_sum.dtype == torch.float32


@pytest.mark.gpu
def test_cuda():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    bf16_bounded(*draw(N=2000, C=256, V=4096, vocab=4000, device="cuda"), "cuda")
    hidden, weight, targets, vocab = draw(N=8192, C=512, V=32064, vocab=32000, device="cuda")
    losses, rh, rw = reference(hidden, weight, targets, vocab)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, gh, gw = ours(hidden, weight, targets, vocab, chunk_tokens=512)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < hidden.shape[0] * weight.shape[0] * 4  # never the full float32 logits
    torch.testing.assert_close(out.token_losses.double(), losses, rtol=1e-4, atol=1e-3)
    assert (gh - rh).norm() < 1e-3 * rh.norm() and (gw - rw).norm() < 1e-3 * rw.norm()


# --- z-loss ----------------------------------------------------------------------------------------------------------


def z_reference(hidden, weight, targets, vocab, z_loss, scale=1.0):
    """Cross-entropy plus z_loss * logsumexp^2 over the valid targets, in float64 over full logits."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logits = (hidden @ weight.t())[:, :vocab]
    losses = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="none")
    squares = logits.logsumexp(-1)[targets != IGNORE_INDEX].square()
    total = losses.sum() + z_loss * squares.sum()
    (total * scale).backward()
    return total.detach(), losses.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("chunk_tokens", [1, 5, 37, None])
@pytest.mark.parametrize("z_loss", [1e-4, 0.3])
def test_z_loss_equals_reference(z_loss, chunk_tokens):
    hidden, weight, targets, vocab = draw()
    weight[vocab:] = 1e3  # padding, which must not be part of the normaliser
    want = z_reference(hidden, weight, targets, vocab, z_loss, 0.37)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        h, w = (x.to(dtype).requires_grad_() for x in (hidden, weight))
        chunk_bytes = None if chunk_tokens is None else 4 * weight.shape[0] * chunk_tokens
        out = chunked_cross_entropy(h, w, targets, vocab, z_loss=z_loss, chunk_bytes=chunk_bytes)
        (out.loss_sum * 0.37).backward()
        for got, exact in zip((out.loss_sum.detach(), out.token_losses, h.grad, w.grad), want, strict=True):
            torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance * exact.abs().max().item())
        assert out.cross_entropy_sum == out.token_losses.sum() and not out.cross_entropy_sum.requires_grad
        assert (w.grad[vocab:] == 0).all() and (h.grad[targets == IGNORE_INDEX] == 0).all()


def test_z_loss_gradient_equals_finite_differences():
    hidden, weight, targets, vocab = (x.double() if isinstance(x, torch.Tensor) else x for x in draw(N=9))
    targets = targets.long()

    def loss(h, w):
        return chunked_cross_entropy(h, w, targets, vocab, z_loss=0.2, chunk_bytes=4 * weight.shape[0] * 4).loss_sum

    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss(h, w).backward()
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        dh, dw = (torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (hidden, weight))
        eps = 1e-5
        slope = (loss(hidden + eps * dh, weight + eps * dw) - loss(hidden - eps * dh, weight - eps * dw)) / (2 * eps)
        torch.testing.assert_close(slope, (h.grad * dh).sum() + (w.grad * dw).sum(), rtol=1e-7, atol=0)


def test_z_loss_of_zero_changes_no_bit():
    hidden, weight, targets, vocab = draw(N=300, C=64)
    results = []
    for options in ({}, {"z_loss": 0.0}):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = chunked_cross_entropy(h, w, targets, vocab, **options)
        out.loss_sum.backward()
        results.append((*out[:3], h.grad, w.grad))
        assert torch.equal(out.loss_sum, out.cross_entropy_sum)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_z_loss_is_not_in_the_token_losses():
    hidden, weight, targets, vocab = draw(N=300, C=64)
    plain, with_z = (chunked_cross_entropy(hidden, weight, targets, vocab, z_loss=z) for z in (0.0, 0.1))
    assert torch.equal(plain.token_losses, with_z.token_losses)
    assert torch.equal(plain.cross_entropy_sum, with_z.cross_entropy_sum) and with_z.loss_sum > plain.loss_sum
    nothing = chunked_cross_entropy(hidden, weight, torch.full_like(targets, IGNORE_INDEX), vocab, z_loss=0.1)
    assert nothing.loss_sum == 0


# --- bias and soft-cap ----------------------------------------------------------------------------------------------

HEADS = [(True, None), (False, 1.5), (True, 4.0), (True, 30.0)]  # 1.5 is a strong cap: logits here reach 20


def full_loss(hidden, weight, bias, targets, vocab, softcap, z_loss):
    """(loss to minimise, cross-entropy of each token) over full logits; in float64 or the tensors' dtype."""
    logits = F.linear(hidden, weight, bias)[..., :vocab]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="none")
    squares = logits.logsumexp(-1)[targets != IGNORE_INDEX].square()
    return losses.sum() + z_loss * squares.sum(), losses


def chunked_loss(hidden, weight, bias, targets, vocab, softcap, z_loss, chunk_tokens):
    chunk_bytes = 4 * weight.shape[0] * chunk_tokens
    out = chunked_cross_entropy(
        hidden, weight, targets, vocab, bias=bias, softcap=softcap, z_loss=z_loss, chunk_bytes=chunk_bytes
    )
    return out.loss_sum, out.token_losses


def losses_and_gradients(loss, hidden, weight, bias, *args, dtype=None, autocast=False):
    """[loss, token losses, gradients of hidden, weight and, if there is one, of bias], all detached."""
    leaves = [
        x if x is None else x.detach().clone().to(dtype or x.dtype).requires_grad_() for x in (hidden, weight, bias)
    ]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        total, losses = loss(*leaves, *args)
    (0.37 * total).backward()
    return [total.detach(), losses.detach(), *(x.grad for x in leaves if x is not None)]


def draw_head(with_bias, N=37, C=24):
    hidden, weight, targets, vocab = draw(N=N, C=C)
    bias = torch.randn(weight.shape[0], generator=torch.Generator().manual_seed(9)) if with_bias else None
    weight[vocab:] = 1e3  # padding, which must not matter
    if bias is not None:
        bias[vocab:] = 1e3
    return hidden, weight, bias, targets, vocab


@pytest.mark.parametrize("chunk_tokens", [1, 5, 36, 37, 100])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize(("with_bias", "softcap"), HEADS)
def test_bias_and_softcap_equal_reference(with_bias, softcap, z_loss, chunk_tokens):
    *tensors, targets, vocab = draw_head(with_bias)
    exact = losses_and_gradients(full_loss, *tensors, targets, vocab, softcap, z_loss, dtype=torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        got = losses_and_gradients(chunked_loss, *tensors, targets, vocab, softcap, z_loss, chunk_tokens, dtype=dtype)
        assert len(got) == len(exact) == 4 + with_bias
        for value, want in zip(got, exact, strict=True):
            assert value.dtype == dtype
            torch.testing.assert_close(value.double(), want, rtol=tolerance, atol=tolerance * want.abs().max().item())
        assert (got[2][targets == IGNORE_INDEX] == 0).all() and all((g[vocab:] == 0).all() for g in got[3:])


@pytest.mark.parametrize(("with_bias", "softcap"), HEADS)
def test_bias_and_softcap_under_autocast_are_bounded_by_torchs_error(with_bias, softcap):
    *tensors, targets, vocab = draw_head(with_bias, N=300, C=64)
    exact = losses_and_gradients(full_loss, *tensors, targets, vocab, softcap, 0.01, dtype=torch.float64)
    torchs = losses_and_gradients(full_loss, *tensors, targets, vocab, softcap, 0.01, autocast=True)
    got = losses_and_gradients(chunked_loss, *tensors, targets, vocab, softcap, 0.01, 64, autocast=True)
    for value, own, want in zip(got[1:], torchs[1:], exact[1:], strict=True):
        assert value.dtype == torch.float32
        assert (value - want).norm() <= 1.5 * (own - want).norm() + 1e-6 * want.norm()


def test_only_the_bias_learns():
    """With hidden states and head frozen; and without gradients, where the cap is applied in place."""
    hidden, weight, bias, targets, vocab = draw_head(True)
    want = losses_and_gradients(full_loss, hidden, weight, bias, targets, vocab, 2.0, 0.3, dtype=torch.float64)
    bias.requires_grad_()
    total, losses = chunked_loss(hidden, weight, bias, targets, vocab, 2.0, 0.3, 8)
    total.mul(0.37).backward()
    torch.testing.assert_close(bias.grad.double(), want[-1], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        unlearnt, unlearnt_losses = chunked_loss(hidden, weight, bias, targets, vocab, 2.0, 0.3, 8)
    assert torch.equal(total, unlearnt) and torch.equal(losses, unlearnt_losses)


def test_ignored_rows_may_hold_anything_beside_a_bias():
    hidden, weight, bias, targets, vocab = draw_head(True)
    want = losses_and_gradients(chunked_loss, hidden, weight, bias, targets, vocab, 4.0, 0.1, 8)
    hidden[targets == IGNORE_INDEX] = torch.inf
    for a, b in zip(
        losses_and_gradients(chunked_loss, hidden, weight, bias, targets, vocab, 4.0, 0.1, 8), want, strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("with_bias", "softcap"), [(False, None), *HEADS])
def test_head_logits_equal_those_of_the_loss(with_bias, softcap):
    hidden, weight, bias, targets, vocab = draw_head(with_bias)
    args = {"bias": bias, "softcap": softcap}
    logits = head_logits(hidden.view(1, *hidden.shape), weight, vocab, **args)[0]
    assert logits.shape == (37, vocab) and logits.dtype == torch.float32
    losses = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="none")
    out = chunked_cross_entropy(hidden, weight, targets, vocab, **args)
    torch.testing.assert_close(losses, out.token_losses, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        low = head_logits(hidden, weight, vocab, **args)
        plain = head_logits(hidden, weight, vocab, bias=bias)
    assert low.dtype == torch.bfloat16
    if softcap is not None:  # within one bfloat16 rounding of the capped logits, and never beyond the cap
        want = softcap * torch.tanh(plain.double() / softcap)
        torch.testing.assert_close(low.double(), want, rtol=2**-8, atol=1e-5)
        assert low.abs().max() <= softcap
