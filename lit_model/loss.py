"""Losses of a linear head, computed a chunk of tokens at a time so that the full logits never exist.

Dimensions: B batch, T tokens in a row, N tokens of the batch, n tokens of a chunk, C n_embd, V padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_model.kernels import cpu
from lit_model.kernels.cross_entropy import choose_loss, fused_cross_entropy
from lit_model.moe import RouterStatistics

IGNORE_INDEX = -100
"""Target of a token whose prediction does not count."""

# Float32 logits of one chunk. A chunk must hold some hundred tokens, or adding up the head's gradient (read and written
# once a chunk) costs more than the matrix multiplies; on a CPU more than 512 gain nothing and leave the caches.
CPU_CHUNK_BYTES = 64 * 2**20
CPU_CHUNK_TOKENS = 512
GPU_CHUNK_BYTES = 512 * 2**20


class LossOutput(NamedTuple):
    """The losses a model returns when it is given targets."""

    loss_sum: Tensor
    """The objective, summed over tokens, in nats: cross-entropy (for a student mixed with the divergence from its
    teachers), z-loss and router losses. A differentiable float32 scalar."""
    token_losses: Tensor
    """Cross-entropy of each token in nats, float32 (B, T), detached, 0 where the target is ignored."""
    cross_entropy_sum: Tensor
    """The sum of `token_losses`, detached."""
    divergence_sum: Tensor | None = None
    """The sum of a student's divergence from its teachers (lit_model.distillation), in nats (`mse`: squared logits),
    over the targets not ignored, detached."""
    router: RouterStatistics | None = None
    """Router statistics of a model with experts, stacked over its layers, detached."""


class Head(Protocol):
    """The last stage of `GPT.forward`: from hidden states (B, T, C) and the head's parameters to an output.

    It runs inside the root module's forward, where a sharded weight (V, C) is gathered. Arguments as in
    `chunked_cross_entropy`, which is the head of a model that is given targets. A head that holds tensors is a
    NamedTuple, so that DDP, FSDP and Fabric find them among the arguments.
    """

    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Any,
        vocab_size: int,
        /,
        *,
        bias: Tensor | None,
        softcap: float | None,
        z_loss: float,
    ) -> Any: ...


def head_logits(
    hidden: Tensor, weight: Tensor, vocab_size: int, *, bias: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """The logits of a linear head: hidden (..., C), weight (V, C), bias (V,) -> (..., vocab_size).

    With a `softcap` c they are c tanh(z / c) (Gemma 2), computed in float32 or wider and returned in the head's dtype.
    """
    logits = F.linear(hidden, weight, bias)[..., :vocab_size]
    if softcap is None:
        return logits
    return (softcap * torch.tanh(logits.to(wide(logits.dtype)) / softcap)).to(logits.dtype)


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
    kernel: str = "auto",
) -> LossOutput:
    """-log softmax(z)[target] of each token, and the sum over those not ignored; z = hidden weight^T + bias.

    With a `softcap` c the logits z become c tanh(z / c) (Gemma 2). `z_loss` adds z_loss * log(Z)^2 to the sum for each
    token not ignored, Z being the normaliser of its softmax, which keeps logits from drifting (Chowdhery et al. 2022,
    PaLM, section 5).

    hidden (B, T, C) or (N, C); weight (V, C) and bias (V,) with V >= vocab_size, whose rows from vocab_size on are
    padding and get no probability; targets int64 (B, T) or (N,), IGNORE_INDEX where there is no prediction to score.
    `chunk_bytes` bounds the float32 logits held at once (with a softcap, whose gradient needs the tanh, twice that).
    All gradients are computed in the forward, chunk by chunk, those of head and bias accumulated in float32; under
    autocast the logits are computed in its dtype and the softmax in float32. (Cut cross-entropy and Liger's fused
    linear cross-entropy use the same idea.) `kernel`: see `choose_loss` in lit_model/kernels/cross_entropy.py, which
    raises ValueError for one that can't run here.
    """
    fused = choose_loss(kernel, hidden.device, head_dtype(hidden)).name == "fused"
    of_chunk = _fused_cross_entropy_of_chunk if fused else _cross_entropy_of_chunk
    loss_sum, numbers = chunked_head_loss(
        *(hidden, weight, bias, targets),
        partial(of_chunk, vocab_size=vocab_size, softcap=softcap, z_loss=z_loss),
        lambda numbers: numbers[0].sum() + z_loss * numbers[1].square().sum() if z_loss else numbers[0].sum(),
        n_numbers=2 if z_loss else 1,
        chunk_tokens=tokens_of_chunk(hidden.device.type, weight.shape[0], chunk_bytes, CPU_CHUNK_BYTES),
    )
    return LossOutput(loss_sum, numbers[0], numbers[0].sum() if z_loss else loss_sum.detach())


class Chunk(NamedTuple):
    """Some tokens of the batch, and the head in the dtype of its product."""

    rows: slice
    hidden: Tensor
    """(n, C), zero where ignored: on the narrow side, so that the wide one (V) needs no pass for it."""
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    """int64 (n, 1), any token where ignored."""
    ignored: Tensor
    """bool (n, 1)."""
    needs_gradient: bool


def _cross_entropy_of_chunk(
    chunk: Chunk, vocab_size: int, softcap: float | None, z_loss: float
) -> tuple[Tensor, Tensor | None]:
    logits = F.linear(chunk.hidden, chunk.weight, chunk.bias)
    logits = logits.to(wide(logits.dtype))  # (n, V)
    tanh = None
    if softcap is not None:
        tanh = logits.div_(softcap).tanh_()  # (n, V)
        logits = tanh * softcap if chunk.needs_gradient else tanh.mul_(softcap)
    logits[:, vocab_size:] = -torch.inf
    target_logits = logits.gather(1, chunk.target).squeeze(-1) if z_loss else None  # (n,)
    # In place from here: logits become log-probabilities, then probabilities, then the gradient.
    torch.log_softmax(logits, dim=-1, out=logits)
    losses = logits.gather(1, chunk.target).squeeze(-1).neg_()
    log_z = None if target_logits is None else losses + target_logits  # the normaliser without another pass over logits
    numbers = losses.unsqueeze(0) if log_z is None else torch.stack((losses, log_z))
    if not chunk.needs_gradient:
        return numbers, None
    probabilities = logits.exp_()
    if log_z is not None:
        probabilities.mul_(1 + 2 * z_loss * log_z.unsqueeze(-1))
    probabilities.scatter_add_(1, chunk.target, torch.full_like(chunk.target, -1, dtype=logits.dtype))
    if tanh is not None:  # the slope of c tanh(z / c) is 1 - tanh^2
        probabilities.mul_(tanh.square_().neg_().add_(1))
    return numbers, probabilities


def _fused_cross_entropy_of_chunk(
    chunk: Chunk, vocab_size: int, softcap: float | None, z_loss: float
) -> tuple[Tensor, Tensor | None]:
    logits = F.linear(chunk.hidden, chunk.weight, chunk.bias)
    numbers = fused_cross_entropy(
        *(logits, chunk.target, chunk.ignored, vocab_size),
        softcap=softcap,
        z_loss=z_loss,
        needs_gradient=chunk.needs_gradient,
    )
    return numbers if z_loss else numbers[:1], logits if chunk.needs_gradient else None


# --- The loop shared by all losses of a head -------------------------------------------------------------------------


def wide(dtype: torch.dtype) -> torch.dtype:
    """That of softmax and accumulation: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def head_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the product with the head: autocast's if it is on, but float64 stays; on a CPU without bf16, float32
    or wider."""
    device = hidden.device.type
    if device == "cpu" and not cpu.HAS_BF16:
        return wide(hidden.dtype)
    if hidden.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return hidden.dtype
    return torch.get_autocast_dtype(device)


def tokens_of_chunk(
    device_type: str, head_rows: int, chunk_bytes: int | None, cpu_chunk_bytes: int, logits_held: int = 1
) -> int:
    """Tokens in a chunk, such that `logits_held` float32 tensors (tokens, head_rows) fit into `chunk_bytes`."""
    on_cpu = device_type == "cpu"
    if chunk_bytes is None:
        chunk_bytes = cpu_chunk_bytes if on_cpu else GPU_CHUNK_BYTES
    tokens = max(1, chunk_bytes // (4 * logits_held * head_rows))
    return min(tokens, CPU_CHUNK_TOKENS) if on_cpu else tokens


def chunked_head_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    loss_of_chunk: Callable[[Chunk], tuple[Tensor, Tensor | None]],
    total: Callable[[Tensor], Tensor],
    *,
    n_numbers: int,
    chunk_tokens: int,
    needs_gradient: bool = True,
) -> tuple[Tensor, Tensor]:
    """A loss summed over tokens, differentiable in hidden, weight and bias, and numbers of each token, detached.

    Args:
        hidden, weight, bias, targets: as in `chunked_cross_entropy`.
        loss_of_chunk: a chunk -> numbers (n_numbers, n) of its tokens, and the gradient of the loss for the head's
            output: (n, V), or without its padding (n, vocab_size), or None if it is not needed. In float32 or wider,
            with any values where ignored; or in the dtype of the product, 0 where ignored.
        total: numbers (n_numbers, N), 0 where ignored -> the loss, a scalar.

    Returns:
        the loss, and numbers (n_numbers, B, T) or (n_numbers, N), in float32 (float64 for float64).
    """
    dtype = head_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        loss_sum, numbers = _ChunkedHeadLoss.apply(  # type: ignore[no-untyped-call]
            *(hidden.flatten(0, -2), weight, bias, targets.flatten(), loss_of_chunk, total),
            *(n_numbers, chunk_tokens, dtype, needs_gradient and torch.is_grad_enabled()),
        )
    return loss_sum, numbers.view(n_numbers, *targets.shape)


class _ChunkedHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        loss_of_chunk: Callable[[Chunk], tuple[Tensor, Tensor | None]],
        total: Callable[[Tensor], Tensor],
        n_numbers: int,
        chunk_tokens: int,
        dtype: torch.dtype,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        needs = [grad_enabled and need for need in ctx.needs_input_grad[:3]]
        gradients = _HeadGradients(hidden, weight, bias, needs, dtype)
        w = weight.to(dtype)
        b = None if bias is None else bias.to(dtype)
        N = hidden.shape[0]
        numbers = torch.empty(n_numbers, N, dtype=wide(dtype), device=hidden.device)
        for start in range(0, N, chunk_tokens):
            rows = slice(start, min(start + chunk_tokens, N))
            valid = targets[rows] != IGNORE_INDEX  # (n,)
            ignored = ~valid.unsqueeze(-1)  # (n, 1)
            h = hidden[rows].to(dtype).masked_fill(ignored, 0)  # (n, C)
            target = targets[rows].clamp_min(0).unsqueeze(-1)  # (n, 1)
            # A function, so that its tensors are freed before those of the next chunk are allocated.
            found, gradient = loss_of_chunk(Chunk(rows, h, w, b, target, ignored, any(needs)))
            numbers[:, rows] = found.masked_fill_(~valid, 0)
            if gradient is not None:
                gradients.add(rows, gradient, h, w, ignored)
                del gradient
        ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias)
        ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(numbers)
        return total(numbers), numbers

    @staticmethod
    def backward(ctx: Any, grad_sum: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        if hidden is not None:
            hidden = hidden * grad_sum.to(hidden.dtype)
        if weight is not None:
            # In place: the head's gradient is the largest tensor of a small model. A second backward through the same
            # graph is then refused by autograd's version check, not wrong.
            weight = weight.mul_(grad_sum).to(ctx.weight_dtype)
        if bias is not None:
            bias = (bias * grad_sum).to(ctx.bias_dtype)
        return (hidden, weight, bias, *(None,) * 7)


class _HeadGradients:
    """Gradients of hidden states, head and bias, accumulated chunk by chunk; those not needed stay None."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool], dtype: torch.dtype):
        """`needs` for each of the three; `dtype` is that of the product with the head."""
        self._dtype, self._wide = dtype, wide(dtype)
        self.hidden = torch.empty_like(hidden) if needs[0] else None
        self.weight = torch.zeros_like(weight, dtype=self._wide) if needs[1] else None
        self.bias = torch.zeros_like(bias, dtype=self._wide) if bias is not None and needs[2] else None

    def add(self, rows: slice, gradient: Tensor, h: Tensor, w: Tensor, ignored: Tensor) -> None:
        """The gradient (n, V) of the head's output, or without its padding; h (n, C), w (V, C), ignored (n, 1)."""
        if self.bias is not None and gradient.dtype == self._wide:
            # Ignored rows are zero only before the head, so they still have a gradient here.
            self.bias[: gradient.shape[1]].addmv_(gradient.t(), (~ignored).squeeze(-1).to(gradient.dtype))
        elif self.bias is not None:
            self.bias[: gradient.shape[1]] += gradient.sum(0, dtype=self._wide)
        low = gradient.to(self._dtype)
        if low.shape[1] < w.shape[0]:
            low = F.pad(low, (0, w.shape[0] - low.shape[1]))  # (n, V)
        if self.hidden is not None:
            self.hidden[rows] = (low @ w).masked_fill_(ignored, 0)
        if self.weight is not None and self._dtype == self._wide:
            self.weight.addmm_(low.t(), h)
        elif self.weight is not None and low.is_cuda and torch.cuda.get_device_capability(low.device) >= (8, 0):
            # cuBLAS adds in float32 as it writes: no pass of its own over (V, C), and no rounding of the product.
            torch.addmm(self.weight, low.t(), h, out_dtype=self._wide, out=self.weight)
        elif self.weight is not None:
            self.weight += low.t() @ h
