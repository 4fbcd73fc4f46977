"""Cross-entropy of a linear head, a chunk of tokens at a time: the full logits never exist.

Dimensions: B batch, T tokens in a row, N tokens of the batch, n tokens of a chunk, C n_embd, V padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_model.moe import RouterStatistics

IGNORE_INDEX = -100
"""Target of a token whose prediction does not count."""

# Float32 logits of one chunk. A chunk must hold some hundred tokens, or adding up the head's gradient (read and written
# once a chunk) costs more than the matrix multiplies; on a CPU more than 512 gain nothing and leave the caches.
CPU_CHUNK_BYTES = 64 * 2**20
CPU_CHUNK_TOKENS = 512
GPU_CHUNK_BYTES = 512 * 2**20


class LossOutput(NamedTuple):
    """What a model returns when it gets targets."""

    loss_sum: Tensor
    """What is minimised: the sum of cross-entropy, in nats, and of z-loss. A differentiable float32 scalar."""
    token_losses: Tensor
    """Cross-entropy of each token in nats, float32 (B, T), detached, 0 where the target is ignored."""
    cross_entropy_sum: Tensor
    """The sum of `token_losses`: `loss_sum` without z-loss, detached."""
    divergence_sum: Tensor | None = None
    """Of a student: the sum of its divergence from its teachers (lit_model.distillation), detached."""
    router: RouterStatistics | None = None
    """What the routers of a model with experts did, stacked over their layers, detached."""


def head_logits(
    hidden: Tensor, weight: Tensor, vocab_size: int, *, bias: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """The logits of a linear head: hidden (..., C), weight (V, C), bias (V,) -> (..., vocab_size).

    With a `softcap` c they are c tanh(z / c) (Gemma 2), computed in float32 or wider and given in the head's dtype.
    """
    logits = F.linear(hidden, weight, bias)[..., :vocab_size]
    if softcap is None:
        return logits
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (softcap * torch.tanh(wide / softcap)).to(logits.dtype)


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
    chunk_bytes: int | None = None,
) -> LossOutput:
    """-log softmax(z)[target] for each token, and the sum over those not ignored; z = hidden weight^T + bias.

    With a `softcap` c the logits z become c tanh(z / c) (Gemma 2). `z_loss` adds z_loss * log(Z)^2 to the sum for each
    token not ignored, Z being its softmax's normaliser, which keeps logits from drifting (Chowdhery et al. 2022, PaLM,
    section 5).

    hidden (B, T, C) or (N, C); weight (V, C) and bias (V,) with V >= vocab_size, whose rows from vocab_size on are
    padding and get no probability; targets int64 (B, T) or (N,), IGNORE_INDEX where nothing is to be predicted.
    `chunk_bytes` bounds the float32 logits held at once (with a softcap, whose gradient needs the tanh, twice that).
    All gradients are made in the forward, chunk by chunk, those of head and bias accumulated in float32; under autocast
    the logits are computed in its dtype and the softmax in float32. (Cut cross-entropy and Liger's fused linear
    cross-entropy rest on the same idea.)
    """
    on_cpu = hidden.device.type == "cpu"
    if chunk_bytes is None:
        chunk_bytes = CPU_CHUNK_BYTES if on_cpu else GPU_CHUNK_BYTES
    chunk_tokens = max(1, chunk_bytes // (4 * weight.shape[0]))
    if on_cpu:
        chunk_tokens = min(chunk_tokens, CPU_CHUNK_TOKENS)
    device = hidden.device.type
    dtype = head_dtype(hidden)
    with torch.autocast(device, enabled=False):
        flat = hidden.flatten(0, -2)  # (N, C)
        loss_sum, token_losses = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            *(flat, weight, bias, targets.flatten(), vocab_size),
            *(softcap, z_loss, chunk_tokens, dtype, torch.is_grad_enabled()),
        )
    cross_entropy_sum = token_losses.sum() if z_loss else loss_sum.detach()
    return LossOutput(loss_sum, token_losses.view(targets.shape), cross_entropy_sum)


def head_dtype(hidden: Tensor) -> torch.dtype:
    """That of the product with the head: autocast's, if it is on, but float64 stays."""
    device = hidden.device.type
    if hidden.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return hidden.dtype
    return torch.get_autocast_dtype(device)


class HeadGradients:
    """Gradients of hidden states, head and bias, made in a forward chunk by chunk; those not needed stay None."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool], dtype: torch.dtype):
        """`needs` for each of the three; `dtype` is that of the product with the head."""
        self._dtype, self._wide = dtype, torch.promote_types(dtype, torch.float32)
        self.any = any(needs)
        self.hidden = torch.empty_like(hidden) if needs[0] else None
        self.weight = torch.zeros_like(weight, dtype=self._wide) if needs[1] else None
        self.bias = torch.zeros_like(bias, dtype=self._wide) if bias is not None and needs[2] else None
        self._saved_dtypes = weight.dtype, None if bias is None else bias.dtype

    def add(self, chunk: slice, gradient: Tensor, h: Tensor, w: Tensor, ignored: Tensor) -> None:
        """The gradient (n, V) of the head's output, or without its padding; h (n, C), w (V, C), ignored (n, 1)."""
        if self.bias is not None:  # ignored rows were emptied before the head, so that they still hold something
            self.bias[: gradient.shape[1]].addmv_(gradient.t(), (~ignored).squeeze(-1).to(gradient.dtype))
        low = gradient.to(self._dtype)
        if low.shape[1] < w.shape[0]:
            low = F.pad(low, (0, w.shape[0] - low.shape[1]))  # (n, V)
        if self.hidden is not None:
            self.hidden[chunk] = (low @ w).masked_fill_(ignored, 0)
        if self.weight is not None and self._dtype == self._wide:
            self.weight.addmm_(low.t(), h)
        elif self.weight is not None:
            self.weight += low.t() @ h

    def save(self, ctx: Any) -> None:
        ctx.save_for_backward(self.hidden, self.weight, self.bias)
        ctx.weight_dtype, ctx.bias_dtype = self._saved_dtypes

    @staticmethod
    def scaled(ctx: Any, grad_sum: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The three for backward, times the loss's own gradient."""
        hidden, weight, bias = ctx.saved_tensors
        if hidden is not None:
            hidden = hidden * grad_sum.to(hidden.dtype)
        if weight is not None:
            # In place: the head's gradient is the largest tensor of a small model. A second backward through the same
            # graph is then refused by autograd's version check, not wrong.
            weight = weight.mul_(grad_sum).to(ctx.weight_dtype)
        if bias is not None:
            bias = (bias * grad_sum).to(ctx.bias_dtype)
        return hidden, weight, bias


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        vocab_size: int,
        softcap: float | None,
        z_loss: float,
        chunk_tokens: int,
        dtype: torch.dtype,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        gradients = HeadGradients(
            hidden, weight, bias, [grad_enabled and need for need in ctx.needs_input_grad[:3]], dtype
        )
        softmax_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        w = weight.to(dtype)
        b = None if bias is None else bias.to(dtype)
        N = hidden.shape[0]
        token_losses = torch.empty(N, dtype=softmax_dtype, device=hidden.device)
        log_z = torch.zeros(N if z_loss else 0, dtype=softmax_dtype, device=hidden.device)
        for start in range(0, N, chunk_tokens):
            chunk = slice(start, min(start + chunk_tokens, N))
            valid = targets[chunk] != IGNORE_INDEX  # (n,)
            ignored = ~valid.unsqueeze(-1)  # (n, 1)
            target = targets[chunk].clamp_min(0).unsqueeze(-1)  # (n, 1)
            # Ignored rows are emptied on the narrow side (C, not V), so that the wide one needs no pass for them.
            h = hidden[chunk].to(dtype).masked_fill(ignored, 0)  # (n, C)
            logits = (h @ w.t() if b is None else torch.addmm(b, h, w.t())).to(softmax_dtype)  # (n, V)
            tanh = None
            if softcap is not None:
                tanh = logits.div_(softcap).tanh_()  # (n, V)
                logits = tanh * softcap if gradients.any else tanh.mul_(softcap)
            logits[:, vocab_size:] = -torch.inf
            target_logits = logits.gather(1, target).squeeze(-1) if z_loss else None  # (n,)
            # In place from here: logits become log-probabilities, then probabilities, then the gradient.
            torch.log_softmax(logits, dim=-1, out=logits)
            token_losses[chunk] = logits.gather(1, target).squeeze(-1).neg_().masked_fill_(~valid, 0)
            if target_logits is not None:  # the normaliser without another pass over the logits
                log_z[chunk] = token_losses[chunk].add(target_logits).masked_fill_(~valid, 0)
            if not gradients.any:
                continue
            probabilities = logits.exp_()
            if z_loss:
                probabilities.mul_(1 + 2 * z_loss * log_z[chunk].unsqueeze(-1))
            probabilities.scatter_add_(1, target, torch.full_like(target, -1, dtype=softmax_dtype))
            if tanh is not None:  # the slope of c tanh(z / c) is 1 - tanh^2
                probabilities.mul_(tanh.square_().neg_().add_(1))
            gradients.add(chunk, probabilities, h, w, ignored)
        gradients.save(ctx)
        ctx.mark_non_differentiable(token_losses)
        loss_sum = token_losses.sum()
        return loss_sum + z_loss * log_z.square().sum() if z_loss else loss_sum, token_losses

    @staticmethod
    def backward(ctx: Any, grad_sum: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        return (*HeadGradients.scaled(ctx, grad_sum), *(None,) * 7)
